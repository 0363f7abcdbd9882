//! DAX: file data in a window of the guest's address space, which the guest's programs read without
//! asking and the guest's page cache does not hold.
//!
//! The window is memory that the VMM shows to the guest ([`SharedMemory`]). The guest cuts it into
//! ranges of [`RANGE`] bytes and asks for a part of a file to appear in one of them (SETUPMAPPING)
//! or gives one back (REMOVEMAPPING). One thread for each session, the `mapper`, carries this out, in
//! the order in which it was asked for; requests wait for it as they wait for chunks, on no thread.
//!
//! Nothing appears in the window but verified chunks. A guest gets no writable view of the cache: see
//! `docs/dax.md`.

mod mapper;
mod window;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::sync::oneshot;

use super::abi;
use super::file_system::FsError;
use super::request::RemoveList;
use super::wait::{Answer, Pins, Wait};
pub(super) use mapper::{Extent, Source};
use mapper::{Job, Mapper};

/// Bytes that a guest maps at a time: ranges of the window begin at multiples of it, and no mapping
/// is longer.
///
/// Source: Linux `fs/fuse/dax.c`, `FUSE_DAX_SHIFT`.
pub const RANGE: u64 = 2 << 20;
/// What files and mappings begin at multiples of, in bytes.
const PAGE: u64 = 4096;
/// Smallest file that is marked for the window, in bytes. A mapping takes a whole range of the window,
/// whatever the size of the file.
pub(super) const MIN_FILE: u64 = 256 << 10;
/// Smallest window, in bytes: eight ranges.
pub const MIN_WINDOW: u64 = 8 * RANGE;
/// Largest window where each range is a mapping of the VMM's, in bytes. QEMU ends when there are more
/// than 512 of them and of the guest's memory together.
pub const MAX_SHARED_WINDOW: u64 = 512 << 20;
/// Largest window where the VMM has one mapping, in bytes.
pub const MAX_PRIVATE_WINDOW: u64 = 8 << 30;

/// How often somebody who waits looks whether the VMM still answers.
const LOOK: Duration = Duration::from_secs(2);
/// How long a VMM may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What appears in the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DaxPolicy {
    /// No window is offered.
    #[default]
    Off,
    /// The cache files, read-only: all guests of the host share their pages.
    Shared,
    /// Copies of verified chunks, in memory of the guest's own.
    Private,
}

/// How the window is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DaxOptions {
    pub policy: DaxPolicy,
    /// In place of `Shared`, for a VMM that maps nothing read-only: `Private`, or `Off`: files are read.
    pub fallback: DaxPolicy,
}

impl DaxOptions {
    /// Whether the VMM may be asked to map memory that can be written to, for as long as the guest
    /// has a session.
    ///
    /// QEMU 11.1 shows it to us as guest memory. When the guest is reset, QEMU forgets the mapping
    /// and keeps its record of memory slots, and ends with SIGSEGV when it next starts the device. So
    /// slots and such a mapping do not go together.
    pub fn maps_writable(&self) -> bool {
        match self.policy {
            DaxPolicy::Off => false,
            DaxPolicy::Private => true,
            DaxPolicy::Shared => self.fallback == DaxPolicy::Private,
        }
    }
}

/// How files of a session are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Not at all: they are read.
    #[default]
    None,
    Private,
    Shared,
}

/// Memory of a guest into which the VMM maps what we tell it to.
///
/// The methods block until the VMM has answered. Only the mapper calls them, and nobody who serves
/// the VMM or the guest waits for it.
pub trait SharedMemory: Send + Sync {
    /// Bytes; a power of two.
    fn size(&self) -> u64;

    /// Why nothing can be mapped; `None`: it can.
    fn missing(&self) -> Option<&'static str>;

    /// Maps `len` bytes of `file` from `file_offset` on to `offset`, for reading.
    fn map(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), MapError>;

    /// Takes away a mapping, named by exactly its place and length.
    fn unmap(&self, offset: u64, len: u64) -> Result<(), MapError>;

    /// For how long the VMM has owed an answer.
    fn owed(&self) -> Option<Duration>;
}

/// Why something was not mapped or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The VMM's answer was no.
    #[error("the VMM refused it")]
    Refused,
    /// It cannot be asked any more.
    #[error("the VMM is gone")]
    Gone,
    #[error("asking the VMM")]
    Channel(#[source] io::Error),
}

/// What was done, on all connections since the daemon started.
#[derive(Debug, Default)]
pub struct DaxCounters {
    /// Ranges of windows that were filled.
    pub ranges_total: AtomicU64,
    /// Ranges that could not be filled: the guest got EIO.
    pub failed_total: AtomicU64,
    /// Mappings of cache files.
    pub maps_total: AtomicU64,
    /// Bytes copied into memory of one guest.
    pub copied_bytes_total: AtomicU64,
    /// Ranges that are in use now.
    pub ranges: AtomicU64,
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// The window of one session.
pub(super) struct Dax {
    memory: Arc<dyn SharedMemory>,
    jobs: Sender<Job>,
    /// Something is, or may be, mapped.
    open: AtomicBool,
    said: AtomicBool,
}

impl Dax {
    /// Starts the mapper. `None`, and a line in the log, if there can be no thread for it.
    pub(super) fn new(
        memory: Arc<dyn SharedMemory>,
        options: DaxOptions,
        counters: Arc<DaxCounters>,
    ) -> Option<Dax> {
        let (jobs, asked) = crossbeam_channel::unbounded();
        let mapper = Mapper::new(Arc::clone(&memory), options, counters);
        let thread = std::thread::Builder::new().name("dax".into());
        match thread.spawn(move || mapper.run(&asked)) {
            Ok(_) => Some(Dax {
                memory,
                jobs,
                open: AtomicBool::new(false),
                said: AtomicBool::new(false),
            }),
            Err(e) => {
                log::error!("DAX: starting its thread: {e}; files are read");
                None
            }
        }
    }

    /// What an INIT waits for: a fresh window, if the guest has one (`wanted`), and none otherwise.
    /// `None`: nothing.
    pub(super) fn begin(&self, wanted: bool) -> Option<Wait> {
        let missing = self.memory.missing();
        if wanted && missing.is_none() {
            self.open.store(true, Ordering::Relaxed);
            return Some(self.wait_mapping(Job::Open));
        }
        if !self.said.swap(true, Ordering::Relaxed) {
            let why = missing.unwrap_or("the guest does not ask for one");
            log::info!("DAX: no window, files are read: {why}");
        }
        self.finish()
    }

    /// What a DESTROY waits for: that nothing is mapped any more. `None`: nothing.
    pub(super) fn finish(&self) -> Option<Wait> {
        let open = self.open.swap(false, Ordering::Relaxed);
        open.then(|| self.wait_mapping(Job::Close))
    }

    fn wait_mapping(&self, job: impl FnOnce(oneshot::Sender<Mapping>) -> Job) -> Wait {
        let (answer, answered) = oneshot::channel();
        let sent = self.jobs.send(job(answer)).is_ok();
        let memory = Arc::clone(&self.memory);
        Wait::uninterruptible(async move {
            let mapping = match sent {
                true => patiently(&*memory, answered).await.unwrap_or_default(),
                false => Mapping::None,
            };
            Pins::mapping(mapping)
        })
    }

    /// Checks a SETUPMAPPING. Returns the place in the window, and in the file, in bytes.
    pub(super) fn check(&self, args: &abi::SetupmappingIn) -> Result<(u64, u64), FsError> {
        if args.flags & abi::SETUPMAPPING_WRITE != 0 {
            return Err(FsError::ReadOnly);
        }
        let end = args.moffset.checked_add(args.len).ok_or(FsError::InvalidArgument)?;
        let fits = args.len > 0 && args.len <= RANGE && end <= self.memory.size();
        let aligned = args.moffset.is_multiple_of(RANGE) && args.foffset.is_multiple_of(PAGE);
        let possible = args.foffset.checked_add(args.len).is_some();
        if !(fits && aligned && possible) {
            return Err(FsError::InvalidArgument);
        }
        Ok((args.moffset, args.foffset))
    }

    /// Waits until `extents`, parts of a file, are in the window from `offset` on, and nothing else is
    /// there up to the end of that range. `pins` are those of the request so far.
    pub(super) fn set_up(&self, offset: u64, extents: Vec<Extent>, pins: &Pins) -> FsError {
        let (answer, answered) = oneshot::channel();
        self.wait_done(Job::Map { offset, extents, answer }, answered, pins)
    }

    /// Waits until the ranges are free.
    pub(super) fn remove(&self, list: RemoveList<'_>, pins: &Pins) -> Result<FsError, FsError> {
        let size = self.memory.size();
        let mut ranges = Vec::new();
        if list.ranges().count() as u64 > size / RANGE {
            return Err(FsError::InvalidArgument);
        }
        for (offset, len) in list.ranges() {
            let end = offset.checked_add(len).filter(|&end| end <= size);
            match end {
                Some(end) if offset.is_multiple_of(RANGE) => ranges.push((offset, end)),
                _ => return Err(FsError::InvalidArgument),
            }
        }
        let (answer, answered) = oneshot::channel();
        Ok(self.wait_done(Job::Unmap { ranges, answer }, answered, pins))
    }

    fn wait_done(
        &self,
        job: Job,
        answered: oneshot::Receiver<mapper::Done>,
        pins: &Pins,
    ) -> FsError {
        let sent = self.jobs.send(job).is_ok();
        let (memory, mut pins) = (Arc::clone(&self.memory), pins.clone());
        FsError::Wait(Wait::uninterruptible(async move {
            let done = match sent {
                true => patiently(&*memory, answered).await,
                false => None,
            };
            match done {
                Some(mapper::Done::Yes) => pins.answer = Some(Arc::new(Answer::Body(Vec::new()))),
                // What was not there is no longer taken for verified: the request starts over.
                Some(mapper::Done::Damaged) => pins.rounds += 1,
                Some(mapper::Done::No) | None => {
                    pins.answer = Some(Arc::new(Answer::Errno(libc::EIO)));
                }
            }
            pins
        }))
    }
}

/// Waits for the mapper, but not for a VMM that does not answer. `None`: it is no use.
async fn patiently<T>(memory: &dyn SharedMemory, mut answered: oneshot::Receiver<T>) -> Option<T> {
    loop {
        match tokio::time::timeout(LOOK, &mut answered).await {
            Ok(answer) => return answer.ok(),
            Err(_) if memory.owed().is_some_and(|owed| owed > PATIENCE) => {
                log::error!("DAX: the VMM has not answered for {PATIENCE:?}");
                return None;
            }
            Err(_) => {}
        }
    }
}
