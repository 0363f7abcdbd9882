//! Signals and limits of the process.

use std::io;
use std::sync::Arc;
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::state::{Status, StopReason};

/// SIGTERM and SIGINT ask the daemon to stop, from now on and in every phase.
///
/// # Errors
///
/// The kernel refuses a handler or a thread.
pub fn stop_on_signals(status: Arc<Status>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let forward = move || {
        for signal in signals.forever() {
            status.request_stop(StopReason::Signal(signal));
        }
    };
    thread::Builder::new().name("signals".into()).spawn(forward)?;
    Ok(())
}

/// Raises the limit of open files towards `wanted`, as far as the hard limit or our rights allow;
/// 0 leaves it alone. Returns the limit in effect.
pub fn raise_open_files(wanted: u64) -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let (soft, hard) = (now.current.unwrap_or(u64::MAX), now.maximum.unwrap_or(u64::MAX));
    if wanted <= soft {
        return soft;
    }
    // Beyond the hard limit only with CAP_SYS_RESOURCE; up to it always.
    for limit in [wanted, wanted.min(hard)] {
        let to = Rlimit { current: Some(limit), maximum: Some(limit.max(hard)) };
        if setrlimit(Resource::Nofile, to).is_ok() {
            return limit;
        }
    }
    soft
}
