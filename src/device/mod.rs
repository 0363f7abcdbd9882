//! The virtio-fs device: a vhost-user back end that carries requests from a guest's virtqueues to
//! the file system and the answers back.
//!
//! One VMM is served at a time, one connection after the other; who connects meanwhile waits. Each
//! virtqueue has a thread of its own, from the moment the VMM starts the ring until it stops it, and
//! that thread alone touches the guest's memory for it. It never waits for data: a request that
//! cannot be answered yet is put aside (`held`) and the thread goes on. Nothing that a guest writes
//! into its rings stops a queue, and nothing that a VMM does to its connection outlives it.
//!
//! `docs/device.md` describes the messages, the life of a queue and what becomes of malformed input.
//! What a request means is the business of whoever implements [`Serve`].

mod chain;
mod counters;
mod fuse_service;
mod held;
mod helper;
mod inflight;
mod intake;
mod memory;
mod parked;
mod polling;
mod queue;
mod ring;
mod session;
mod shmem;
mod socket;
mod split;
mod state;
mod stop;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;
use vm_memory::VolatileSlice;

use crate::fuse::SharedMemory;

pub use counters::Counters;
pub use parked::{Parked, ParkedRequest};
pub use polling::BusyPoll;
pub use socket::Listener;
pub use stop::Stop;

/// Answers requests. One value serves one connection, on all its queue threads at once.
pub trait Serve: Send + Sync + 'static {
    /// A request that has been understood; owns all it needs.
    type Request: Send + 'static;
    /// What an earlier [`Outcome::Wait`] made ready and keeps so.
    type Pins: Default + Send + 'static;

    /// Longest request in bytes, header and body; what a guest sends beyond is not copied.
    const MAX_REQUEST_LEN: usize;

    /// Called first on each thread that serves a queue of its own; 0 is the queue for urgent requests.
    /// Not on a helper, which shares large requests with one.
    fn enter(&self, _queue: u16) {}

    /// What has been agreed with the guest, for a service of another process that goes on with it;
    /// 0 if nothing has. Asked for each request, so it has to be cheap.
    fn agreed(&self) -> u64 {
        0
    }

    /// What stands in the way of another process that is to go on from here, knowing no more than
    /// what has been [`Self::agreed`].
    fn ties(&self) -> Option<String> {
        None
    }

    /// Goes on with what another process [`Self::agreed`] on. The error says why that cannot be.
    fn resume(&self, _agreed: u64) -> Result<(), &'static str> {
        Ok(())
    }

    /// Reads a request from the bytes a guest sent: any bytes, of any length. The error is an errno.
    fn parse(&self, bytes: &[u8]) -> Result<Self::Request, i32>;

    /// The guest's id of a request.
    fn unique(request: &Self::Request) -> u64;

    /// What a request is about and what it asks: node id and opcode.
    fn subject(request: &Self::Request) -> (u64, u32);

    /// Carries out a request and writes its answer to `reply`, guest memory of any shape. Never
    /// waits for data or for another process.
    fn handle(
        &self,
        request: &Self::Request,
        reply: &[VolatileSlice<'_>],
        pins: &Self::Pins,
    ) -> Outcome<Self::Pins>;

    /// Writes an error answer to the request with this id and returns its length in bytes; 0 if it
    /// does not fit.
    fn error(&self, unique: u64, errno: i32, reply: &[VolatileSlice<'_>]) -> u32;

    /// Writes an error answer to the request that begins with `bytes` and returns its length in
    /// bytes; writes nothing and returns 0 if no id can be read there or the answer does not fit.
    fn refuse(&self, bytes: &[u8], errno: i32, reply: &[VolatileSlice<'_>]) -> u32;
}

/// What a request waits for: holds no thread of the device meanwhile.
pub struct Wait<P> {
    /// Ends when the wait is over.
    pub work: Pin<Box<dyn Future<Output = P> + Send>>,
    /// Whether the request may be answered with EINTR instead, when the guest asks for that.
    pub interruptible: bool,
}

/// What became of a request.
pub enum Outcome<P> {
    /// Answered, with so many bytes, header included.
    Reply(u32),
    /// Done, and by its nature without an answer.
    NoReply,
    /// Cannot be answered yet. When the future is done, `handle` is called again with its result.
    Wait(Wait<P>),
    /// Done, and the request with this id should be cut short, if it waits.
    Interrupt(u64),
}

/// How the device presents itself to guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Name under which a guest mounts the file system: 1 to 36 bytes.
    pub tag: String,
    /// Most queues for ordinary requests beside the one for urgent ones: 1 to 64.
    pub request_queues: u16,
    /// Size of the DAX window in bytes, a power of two; `None`: none is offered.
    pub window: Option<u64>,
    /// Whether the VMM may show us its memory region by region (`CONFIGURE_MEM_SLOTS`), up to 512 of
    /// them; otherwise it has to do with eight.
    pub memory_slots: bool,
    /// How many of them whoever asks is told to use: 1 to `request_queues`.
    pub advised_queues: u16,
    /// How long a queue looks for the next request before it sleeps.
    pub busy_poll: BusyPoll,
}

/// Why the device cannot be, or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The tag does not fit into the device's configuration space.
    #[error("the tag {0:?} has {len} bytes; it must have 1 to 36", len = .0.len())]
    Tag(String),
    /// More queues, or fewer, than the device can have.
    #[error("{0} request queues, {1} advised; there must be 1 to 64, and no more advised")]
    Queues(u16, u16),
    /// The path is longer than the kernel takes for a socket.
    #[error("the socket path {path:?} has {len} bytes; the kernel takes at most 107")]
    PathTooLong {
        /// The path as given.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Something that is no socket is in the way, and is left alone.
    #[error("{0:?} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("listening on {path:?}")]
    Listen {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Waiting for a VMM is impossible.
    #[error("waiting for a VMM")]
    Wait(#[source] io::Error),
}

/// Makes what serves a connection, which may have a DAX window.
type MakeService<S> = dyn Fn(Option<Arc<dyn SharedMemory>>) -> S + Send + Sync;

/// A virtio-fs device that VMMs can connect to.
pub struct Device<S: Serve> {
    config: DeviceConfig,
    runtime: Handle,
    service: Box<MakeService<S>>,
    counters: Arc<Counters>,
}

impl<S: Serve> Device<S> {
    /// A device whose connections are each served by a fresh value from `service`. Waits run on
    /// `runtime`.
    pub fn with_service(
        config: DeviceConfig,
        runtime: Handle,
        service: impl Fn(Option<Arc<dyn SharedMemory>>) -> S + Send + Sync + 'static,
    ) -> Result<Device<S>, DeviceError> {
        if !(1..=session::TAG_LEN).contains(&config.tag.len()) {
            return Err(DeviceError::Tag(config.tag));
        }
        let (most, advised) = (config.request_queues, config.advised_queues);
        if !(1..=64).contains(&most) || !(1..=most).contains(&advised) {
            return Err(DeviceError::Queues(most, advised));
        }
        Ok(Device { config, runtime, service: Box::new(service), counters: Arc::default() })
    }

    /// What has happened so far, on all connections.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Serves one VMM after the other, in the calling thread and one more per started queue, until
    /// `stop` is raised; then everything of the current connection ends within half a second.
    ///
    /// A connection that breaks, however it does, only ends itself. An error means that no VMM can
    /// be waited for any more.
    pub fn serve(&self, listener: &Listener, stop: &Stop) -> Result<(), DeviceError> {
        while !stop.is_raised() {
            let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(DeviceError::Wait(e.into())),
            }
            if stop.is_raised() {
                break;
            }
            match listener.accept() {
                Ok(Some(stream)) => {
                    counters::count(&self.counters.connections_total);
                    session::run(self, stream, stop);
                }
                Ok(None) => {}
                Err(e) => {
                    // Out of file descriptors or memory: the VMM stays in the backlog.
                    log::error!("vhost-user socket: accepting a VMM: {e}");
                    pause(stop, Duration::from_millis(100));
                }
            }
        }
        Ok(())
    }
}

/// Waits for `stop`, but not longer than `limit`.
fn pause(stop: &Stop, limit: Duration) {
    let limit = Timespec::try_from(limit).unwrap_or_default();
    let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&limit));
}
