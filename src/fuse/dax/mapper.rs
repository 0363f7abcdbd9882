//! The thread that fills the window of one session.
//!
//! It does what is asked in the order in which it is asked, so that nothing needs a lock. It ends
//! with the session; if it is waiting for the VMM then, as soon as that has answered or gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Receiver;
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::window::{FillError, Filled, Window, maps_read_only};
use super::{DaxCounters, DaxOptions, DaxPolicy, Mapping, RANGE, SharedMemory, add};
use crate::blob::{Blob, ChunkRef};
use crate::fuse::file_system::chain;

/// A part of a file.
pub(in crate::fuse) struct Extent {
    /// Where it begins, in bytes from the first byte that was asked for.
    pub(in crate::fuse) at: u64,
    /// Bytes; not 0.
    pub(in crate::fuse) len: u64,
    pub(in crate::fuse) source: Source,
}

/// Where its bytes are.
pub(in crate::fuse) enum Source {
    /// In the cache file, from `offset` (bytes) on: verified.
    Cached { blob: Arc<Blob>, offset: u64, chunks: SmallVec<[ChunkRef; 2]> },
    /// Here, from `from` on: the cache could not take them.
    Memory { bytes: Arc<[u8]>, from: usize },
}

impl Extent {
    /// Makes a reader verify again what did not come as it was.
    fn distrust(&self) {
        if let Source::Cached { blob, chunks, .. } = &self.source {
            chunks.iter().for_each(|&chunk| blob.distrust(chunk));
        }
    }
}

/// What the mapper is to do. Nobody listening for the answer any more means that it is not wanted.
pub(super) enum Job {
    /// A new guest: an empty window.
    Open(oneshot::Sender<Mapping>),
    /// No guest.
    Close(oneshot::Sender<Mapping>),
    Map {
        offset: u64,
        extents: Vec<Extent>,
        answer: oneshot::Sender<Done>,
    },
    /// Ranges from one offset to another, in bytes.
    Unmap {
        ranges: Vec<(u64, u64)>,
        answer: oneshot::Sender<Done>,
    },
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Yes,
    No,
    /// The cache does not hold what was verified: once more.
    Damaged,
}

pub(super) struct Mapper {
    memory: Arc<dyn SharedMemory>,
    options: DaxOptions,
    counters: Arc<DaxCounters>,
    window: Option<Window>,
    /// Ranges that `counters` has as in use.
    counted: u64,
    said_failure: bool,
    said_refusal: bool,
}

impl Mapper {
    pub(super) fn new(
        memory: Arc<dyn SharedMemory>,
        options: DaxOptions,
        counters: Arc<DaxCounters>,
    ) -> Mapper {
        Mapper {
            memory,
            options,
            counters,
            window: None,
            counted: 0,
            said_failure: false,
            said_refusal: false,
        }
    }

    /// Works until there is nobody who could ask.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            match job {
                Job::Open(answer) => {
                    self.close();
                    let _ = answer.send(self.open());
                }
                Job::Close(answer) => {
                    self.close();
                    let _ = answer.send(Mapping::None);
                }
                Job::Map { offset, extents, answer } if !answer.is_closed() => {
                    let _ = answer.send(self.map(offset, &extents));
                }
                Job::Unmap { ranges, answer } => {
                    let _ = answer.send(self.unmap(&ranges));
                }
                Job::Map { .. } => {}
            }
            self.count();
        }
        // The VMM goes as well, and takes its mappings with it.
        self.window = None;
        self.count();
    }

    fn count(&mut self) {
        let used = self.window.as_ref().map_or(0, Window::used);
        if used >= self.counted {
            add(&self.counters.ranges, used - self.counted);
        } else {
            self.counters.ranges.fetch_sub(self.counted - used, Ordering::Relaxed);
        }
        self.counted = used;
    }

    fn close(&mut self) {
        if let Some(window) = self.window.take() {
            window.close(&*self.memory);
        }
    }

    fn open(&mut self) -> Mapping {
        let opened = self.choose().and_then(|mapping| match mapping {
            Mapping::None => Ok(None),
            mapping => Window::open(&*self.memory, mapping).map(Some),
        });
        match opened {
            Ok(window) => self.window = window,
            Err(e) => log::warn!("DAX: no window, files are read: {}", chain(&e)),
        }
        let mapping = self.window.as_ref().map_or(Mapping::None, Window::mapping);
        if mapping != Mapping::None {
            let (mib, mapping) = (self.memory.size() >> 20, format!("{mapping:?}").to_lowercase());
            log::info!("DAX: a window of {mib} MiB, {mapping}");
        }
        mapping
    }

    /// What the VMM lets us do.
    fn choose(&mut self) -> Result<Mapping, FillError> {
        let shared = match self.options.policy {
            DaxPolicy::Off => return Ok(Mapping::None),
            DaxPolicy::Private => return Ok(Mapping::Private),
            DaxPolicy::Shared => maps_read_only(&*self.memory)?,
        };
        if shared {
            return Ok(Mapping::Shared);
        }
        let (then, mapping) = match self.options.fallback {
            DaxPolicy::Private => {
                ("each guest gets copies (--dax-fallback private)", Mapping::Private)
            }
            _ => ("files are read", Mapping::None),
        };
        if !std::mem::replace(&mut self.said_refusal, true) {
            log::warn!("DAX: the VMM does not map files read-only, so they are not shared: {then}");
        }
        Ok(mapping)
    }

    fn map(&mut self, offset: u64, extents: &[Extent]) -> Done {
        let filled = match &mut self.window {
            Some(window) => window.fill(&*self.memory, offset, extents),
            // A guest without a session, or one that was told that there is no window.
            None => return Done::No,
        };
        match filled {
            Ok(filled) => {
                add(&self.counters.ranges_total, 1);
                match filled {
                    Filled::Mapped(maps) => add(&self.counters.maps_total, maps),
                    Filled::Copied(bytes) => add(&self.counters.copied_bytes_total, bytes),
                }
                Done::Yes
            }
            Err(FillError::Damaged) => {
                extents.iter().for_each(Extent::distrust);
                Done::Damaged
            }
            Err(e) => {
                add(&self.counters.failed_total, 1);
                if !std::mem::replace(&mut self.said_failure, true) {
                    log::error!(
                        "DAX: a range of the window at {offset:#x}: {}; more are only counted",
                        chain(&e)
                    );
                }
                Done::No
            }
        }
    }

    fn unmap(&mut self, ranges: &[(u64, u64)]) -> Done {
        let Some(window) = &mut self.window else { return Done::Yes };
        for &(start, end) in ranges {
            let mut at = start;
            while at < end {
                if let Err(e) = window.empty(&*self.memory, at) {
                    log::warn!("DAX: a range of the window at {at:#x}: {}", chain(&e));
                    return Done::No;
                }
                at += RANGE;
            }
        }
        Done::Yes
    }
}
