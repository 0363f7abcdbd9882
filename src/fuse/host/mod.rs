//! The FUSE server on a host mount: requests from `/dev/fuse`, answers back to it.
//!
//! A few threads take requests and answer them. One that needs chunks which are not here yet waits
//! on the runtime and holds no thread; it is answered by a thread of the runtime's blocking pool
//! when its wait is over. Requests and mount belong to the descriptor, not to the process: another
//! process that has a copy of it can go on where this one stopped.

mod mount;

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use vm_memory::VolatileSlice;
use zerocopy::IntoBytes;

pub use mount::{HostMount, MountHostError, is_mounted};

use super::abi::{self, OutHeader};
use super::counters::serve_queue;
use super::reply::Reply;
use super::request::Request;
use super::server::{Outcome, Server};
use super::wait::{Pins, Wait};

/// Bytes of the longest answer: a read of 1 MiB and its header.
const REPLY_MAX: usize = (1 << 20) + size_of::<OutHeader>();

/// How long the kernel may take to send INIT, which it does before `mount(2)` returns.
const INIT_LIMIT: Duration = Duration::from_secs(10);

/// A session on a host mount.
pub struct HostSession {
    server: Server,
    device: OwnedFd,
    runtime: Handle,
    /// Readable once the threads are to end.
    stop: OwnedFd,
    waiting: Mutex<Waiting>,
}

/// Requests that wait, by their `unique`.
#[derive(Default)]
struct Waiting {
    requests: HashMap<u64, Parked>,
    /// No more waits: the session goes on elsewhere.
    closed: bool,
}

struct Parked {
    task: Option<AbortHandle>,
    interruptible: bool,
}

/// How the threads of a session came to their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody unmounted it: there will be no more requests.
    Unmounted,
    /// [`HostSession::stop`].
    Stopped,
}

impl HostSession {
    /// A session over `device`, an open `/dev/fuse` that is mounted. Waits run on `runtime`.
    ///
    /// # Errors
    ///
    /// The descriptor cannot be made non-blocking, or there are no more of them.
    pub fn new(server: Server, device: OwnedFd, runtime: Handle) -> io::Result<Arc<HostSession>> {
        rustix::io::ioctl_fionbio(&device, true)?;
        Ok(Arc::new(HostSession {
            server,
            device,
            runtime,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            waiting: Mutex::default(),
        }))
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The device, to be handed to another process.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Makes `serve` return, from any thread. Requests that wait are dropped without an answer:
    /// who takes the session over asks the kernel for them.
    pub fn stop(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        for parked in waiting.requests.drain().filter_map(|(_, parked)| parked.task) {
            parked.abort();
        }
        drop(waiting);
        // Fails only when the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Serves with the calling thread and `threads - 1` more, until the mount is gone or `stop`.
    ///
    /// # Errors
    ///
    /// No thread can be started, or the device fails.
    pub fn serve(self: &Arc<Self>, threads: usize) -> io::Result<Ended> {
        let more: Vec<_> = (1..threads)
            .map(|number| {
                let session = Arc::clone(self);
                thread::Builder::new().name("fuse".into()).spawn(move || session.work(number))
            })
            .collect::<io::Result<_>>()
            .inspect_err(|_| self.stop())?;
        let mut ended = self.work(0);
        for thread in more {
            let other = thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
            // The first thread that notices stops the others.
            if matches!(ended, Ok(Ended::Stopped)) {
                ended = other;
            }
        }
        ended
    }

    /// Answers INIT, which the kernel has sent with the mount: before it nothing is agreed on that
    /// could be handed to another process. Takes at most [`INIT_LIMIT`].
    ///
    /// # Errors
    ///
    /// The kernel sends none, or one that is too old, or the mount is gone.
    pub fn open(self: &Arc<Self>) -> io::Result<()> {
        let deadline = Instant::now() + INIT_LIMIT;
        let mut request = vec![0; Request::MAX_LEN];
        let mut answer = vec![0; REPLY_MAX];
        while self.server.agreed() == 0 {
            match rustix::io::read(&self.device, &mut request[..]) {
                Ok(len) => self.serve_one(&request[..len], &mut answer),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "no session begins"));
                    }
                    self.sleep(Timespec::try_from(left).ok().as_ref())?;
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Asks the kernel to offer again what was taken and not answered, by the process that had the
    /// session before. Needs Linux 6.9.
    ///
    /// # Errors
    ///
    /// The kernel cannot.
    pub fn resend(&self) -> io::Result<()> {
        /// `FUSE_NOTIFY_RESEND`.
        const RESEND: i32 = 7;
        let len = u32::try_from(size_of::<OutHeader>()).expect("16");
        let header = OutHeader { len, error: RESEND, unique: 0 };
        rustix::io::write(&self.device, header.as_bytes())?;
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does.
    fn work(self: &Arc<Self>, number: usize) -> io::Result<Ended> {
        serve_queue(number);
        let mut request = vec![0; Request::MAX_LEN];
        let mut answer = vec![0; REPLY_MAX];
        loop {
            match rustix::io::read(&self.device, &mut request[..]) {
                Ok(len) => self.serve_one(&request[..len], &mut answer),
                Err(Errno::AGAIN) => {
                    if self.sleep(None)? {
                        return Ok(Ended::Stopped);
                    }
                }
                // The request was interrupted before it could be read.
                Err(Errno::NOENT | Errno::INTR) => {}
                // ECONNABORTED: the connection was ended by way of its file in sysfs.
                Err(Errno::NODEV | Errno::CONNABORTED) => {
                    self.stop();
                    return Ok(Ended::Unmounted);
                }
                Err(e) => {
                    self.stop();
                    return Err(e.into());
                }
            }
            if self.waiting().closed {
                return Ok(Ended::Stopped);
            }
        }
    }

    /// Sleeps until there is a request, or for so long; true if the thread should end.
    fn sleep(&self, limit: Option<&Timespec>) -> io::Result<bool> {
        let mut fds =
            [PollFd::new(&self.device, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
        match poll(&mut fds, limit) {
            Ok(_) => Ok(!fds[1].revents().is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Answers one request, or lets it wait.
    fn serve_one(self: &Arc<Self>, bytes: &[u8], answer: &mut [u8]) {
        let request = match Request::parse(bytes) {
            Ok(request) => request,
            Err(error) => {
                log::error!("the kernel sent what is no request: {error}");
                if let Some(unique) = error.unique() {
                    self.send_error(unique, error.errno());
                }
                return;
            }
        };
        self.handle(request, &Pins::default(), answer);
    }

    fn handle(self: &Arc<Self>, request: Request, pins: &Pins, answer: &mut [u8]) {
        let unique = request.header.unique;
        let outcome = {
            let slices = [VolatileSlice::from(&mut *answer)];
            let mut reply = Reply::new(&slices);
            let server = &self.server;
            catch_unwind(AssertUnwindSafe(|| server.handle(&request, &mut reply, pins)))
        };
        match outcome {
            Ok(Outcome::Reply(len)) => {
                let len = usize::try_from(len).unwrap_or(0);
                self.send(&answer[..len.min(answer.len())]);
            }
            Ok(Outcome::NoReply) => {}
            Ok(Outcome::Interrupt(unique)) => self.interrupt(unique),
            Ok(Outcome::Wait(wait)) => self.park(request, wait),
            Err(_) => {
                log::error!("request {unique}: panicked");
                self.send_error(unique, libc::EIO);
            }
        }
    }

    /// Keeps a request until its wait is over.
    fn park(self: &Arc<Self>, request: Request, wait: Wait) {
        let unique = request.header.unique;
        let interruptible = wait.interruptible();
        let mut waiting = self.waiting();
        if waiting.closed {
            return;
        }
        // Entered before the task starts, which takes it out.
        waiting.requests.insert(unique, Parked { task: None, interruptible });
        let session = Arc::clone(self);
        let task = self.runtime.spawn(async move {
            let mut promise = Promise { session: Some(session), unique };
            let pins = wait.ready().await;
            let Some(session) = promise.session.take() else { return };
            let done = move || {
                if session.waiting().requests.remove(&unique).is_some() {
                    let mut answer = vec![0; answer_len(&request)];
                    session.handle(request, &pins, &mut answer);
                }
            };
            // Reading the cache file may take a disk's time.
            tokio::task::spawn_blocking(done);
        });
        if let Some(parked) = waiting.requests.get_mut(&unique) {
            parked.task = Some(task.abort_handle());
        }
    }

    /// Answers a request with EINTR, if it waits and may be cut short.
    fn interrupt(&self, unique: u64) {
        let mut waiting = self.waiting();
        if !waiting.requests.get(&unique).is_some_and(|parked| parked.interruptible) {
            return;
        }
        let parked = waiting.requests.remove(&unique);
        drop(waiting);
        if let Some(task) = parked.and_then(|parked| parked.task) {
            task.abort();
        }
        self.send_error(unique, libc::EINTR);
    }

    fn send_error(&self, unique: u64, errno: i32) {
        let len = u32::try_from(size_of::<OutHeader>()).expect("16");
        let header = OutHeader { len, error: -errno, unique };
        self.send(header.as_bytes());
    }

    fn send(&self, answer: &[u8]) {
        if answer.is_empty() {
            return;
        }
        loop {
            match rustix::io::writev(&self.device, &[IoSlice::new(answer)]) {
                Err(Errno::INTR) => {}
                // Nobody waits for it any more: it was interrupted, or the mount is gone.
                Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => return,
                Err(e) => {
                    log::error!("an answer of {} bytes was refused: {e}", answer.len());
                    return;
                }
            }
        }
    }
}

/// Bytes that the answer to a request may have.
fn answer_len(request: &Request) -> usize {
    let small = 64 * 1024 + size_of::<OutHeader>();
    match request.header.opcode {
        abi::opcode::READ | abi::opcode::READDIR | abi::opcode::READDIRPLUS => request
            .grown_args::<abi::ReadIn>(24)
            .ok()
            .and_then(|args| usize::try_from(args.size).ok())
            .map_or(REPLY_MAX, |size| size.saturating_add(size_of::<OutHeader>()).min(REPLY_MAX)),
        _ => small.max(size_of::<abi::StatxOut>()),
    }
}

/// A task's obligation: a wait that ends without a result, because it panicked or the runtime is
/// gone, is answered with EIO.
struct Promise {
    session: Option<Arc<HostSession>>,
    unique: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // One that was interrupted, or dropped with the session, is there no more.
            let left = session.waiting().requests.remove(&self.unique).is_some();
            if left {
                log::error!("request {}: its wait broke off", self.unique);
                session.send_error(self.unique, libc::EIO);
            }
        }
    }
}

/// A new `/dev/fuse`.
fn open_device() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/fuse", flags, rustix::fs::Mode::empty())?)
}
