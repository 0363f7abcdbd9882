//! The wish to end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// Tells `Device::serve` to return. Clones are one and the same; once raised it stays so.
#[derive(Clone, Debug)]
pub struct Stop(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    raised: AtomicBool,
    fd: OwnedFd,
}

impl Stop {
    /// A stop that nobody has raised yet. Fails when the process has no file descriptor left.
    pub fn new() -> io::Result<Stop> {
        Ok(Stop(Arc::new(Inner {
            raised: AtomicBool::new(false),
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// Makes every holder end, from any thread; returns at once.
    pub fn raise(&self) {
        self.0.raised.store(true, Ordering::Release);
        // Fails only when the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.0.fd, &1u64.to_ne_bytes());
    }

    /// Whether somebody has raised it.
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::Acquire)
    }
}

impl AsFd for Stop {
    /// Readable once raised, and for ever after: nobody reads it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}
