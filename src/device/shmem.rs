//! The shared memory region of the device: the VMM maps into it what we ask for.
//!
//! Questions go over a channel of their own, and each is answered before the next. A VMM takes them
//! only while it has the device started, so nothing is asked between the message that stops a ring
//! and the one that starts it again: who asks then waits until it is known how it goes on. The thread
//! that reads the VMM's messages never waits for an answer: a VMM may not give one before we have
//! answered it, and everything it maps comes back to us as a message.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserMMap;
use vhost::vhost_user::{Backend, Error, VhostUserFrontendReqHandler};

use crate::fuse::{MapError, SharedMemory};

/// Region 0 of one connection.
pub(super) struct Shmem {
    size: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    channel: Option<Backend>,
    /// The VMM takes our messages, and says what became of them.
    negotiated: bool,
    /// A ring works.
    started: bool,
    /// The connection has ended.
    gone: bool,
    /// Since when an answer is awaited.
    asked: Option<Instant>,
}

impl Shmem {
    /// A region of `size` bytes, a power of two.
    pub(super) fn new(size: u64) -> Shmem {
        Shmem { size, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM has opened the channel.
    pub(super) fn set_channel(&self, channel: Backend) {
        channel.set_reply_ack_flag(true);
        channel.set_shmem_flag(true);
        self.lock().channel = Some(channel);
    }

    /// Whether the messages were agreed on, and answers to them.
    pub(super) fn set_negotiated(&self, negotiated: bool) {
        self.lock().negotiated = negotiated;
    }

    /// The VMM has started the device, or stopped it.
    pub(super) fn set_started(&self, started: bool) {
        let mut state = self.lock();
        if state.started != started {
            state.started = started;
            self.changed.notify_all();
        }
    }

    /// The connection ends.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.gone = true;
        state.channel = None;
        self.changed.notify_all();
    }

    /// Asks the VMM, once it can be asked.
    fn ask(&self, question: impl FnOnce(&Backend) -> std::io::Result<u64>) -> Result<(), MapError> {
        let mut state = self.lock();
        while !state.started && !state.gone {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let channel = match &state.channel {
            Some(channel) if !state.gone && state.negotiated => channel.clone(),
            _ => return Err(MapError::Gone),
        };
        state.asked = Some(Instant::now());
        drop(state);
        let answer = question(&channel);
        self.lock().asked = None;
        match answer {
            Ok(_) => Ok(()),
            Err(e) if is_refusal(&e) => Err(MapError::Refused),
            Err(e) => Err(MapError::Channel(e)),
        }
    }
}

/// Whether the VMM has answered, with a no.
fn is_refusal(error: &std::io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    matches!(cause, Some(Error::FrontendInternalError))
}

impl SharedMemory for Shmem {
    fn size(&self) -> u64 {
        self.size
    }

    fn missing(&self) -> Option<&'static str> {
        let state = self.lock();
        if !state.negotiated {
            Some("the VMM does not know the messages for it")
        } else if state.channel.is_none() {
            Some("the VMM has opened no channel for it")
        } else {
            None
        }
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), MapError> {
        let mut request = message(offset, len);
        request.fd_offset = file_offset;
        self.ask(|channel| channel.shmem_map(&request, &Raw(file)))
    }

    fn unmap(&self, offset: u64, len: u64) -> Result<(), MapError> {
        self.ask(|channel| channel.shmem_unmap(&message(offset, len)))
    }

    fn owed(&self) -> Option<Duration> {
        self.lock().asked.map(|asked| asked.elapsed())
    }
}

/// A range of region 0, for reading only.
fn message(offset: u64, len: u64) -> VhostUserMMap {
    VhostUserMMap { shm_offset: offset, len, ..VhostUserMMap::default() }
}

/// A borrowed descriptor as the `vhost` crate takes it.
struct Raw<'a>(BorrowedFd<'a>);

impl AsRawFd for Raw<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
