//! The one time that tests hold the daemon to: half a second from a signal to its end.

use std::time::Duration;

/// From the signal, or whatever else ends a daemon, until it is gone.
const LIMIT: Duration = Duration::from_millis(500);
/// A daemon that waits for something is late each time, one on a busy machine now and then.
const TRIES: usize = 10;

/// Panics unless a daemon ends within the limit in one of a few tries. `end` starts one, ends it and
/// returns how long that took.
#[track_caller]
pub fn ends_at_once(what: &str, mut end: impl FnMut() -> Duration) {
    let mut late = Vec::new();
    while late.len() < TRIES {
        let took = end();
        if took < LIMIT {
            return;
        }
        late.push(took);
    }
    panic!("{what}: gone after {late:?}, never within {LIMIT:?}");
}
