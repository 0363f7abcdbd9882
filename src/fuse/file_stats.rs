//! What guests did with each file, for images whose config asks for it.
//!
//! Three records, each on its own: numbers per file, which files were read and when first, and which
//! were read since somebody last asked. They are bounded: what a guest does with files beyond
//! [`MAX_FILES`] is not recorded, and the log says so once. Only a mount that records pays, with a
//! lock for each request.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::abi::opcode;
use super::counters::read_size_class;

/// Files that each record has room for: some 12 MiB of numbers at most.
pub const MAX_FILES: usize = 32 * 1024;

/// Kinds of requests as nydusd counts them, with their opcodes.
pub const OPERATIONS: [&[u32]; 15] = [
    &[opcode::GETATTR, opcode::STATX],
    &[opcode::READLINK],
    &[opcode::OPEN],
    &[opcode::RELEASE],
    &[opcode::READ],
    &[opcode::STATFS],
    &[opcode::GETXATTR],
    &[opcode::LISTXATTR],
    &[opcode::OPENDIR],
    &[opcode::LOOKUP],
    &[opcode::READDIR],
    &[opcode::READDIRPLUS],
    &[opcode::ACCESS],
    &[opcode::FORGET],
    &[opcode::BATCH_FORGET],
];

/// Which records to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileStatsOptions {
    /// Numbers per file (`iostats_files`).
    pub numbers: bool,
    /// Which files were read, how often and when first (`access_pattern`).
    pub pattern: bool,
    /// Which files were read lately (`latest_read_files`).
    pub latest: bool,
}

/// Numbers of one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileNumbers {
    /// Requests and, of these, failures: by [`OPERATIONS`].
    pub requests: [u64; OPERATIONS.len()],
    pub errors: [u64; OPERATIONS.len()],
    pub read_bytes: u64,
    /// Reads of less than 1, 4, 16, 64, 128, 512, 1024 KiB, and longer ones.
    pub read_sizes: [u64; 8],
}

/// How a file was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub node: u64,
    pub reads: u64,
    pub first: SystemTime,
}

/// The records of one image.
#[derive(Debug, Default)]
pub struct FileStats {
    options: FileStatsOptions,
    numbers: Mutex<HashMap<u64, FileNumbers>>,
    pattern: Mutex<HashMap<u64, Access>>,
    latest: Mutex<BTreeSet<u64>>,
    /// Something was left out.
    full: AtomicBool,
}

impl FileStats {
    /// `None` if nothing is to be recorded.
    pub fn new(options: FileStatsOptions) -> Option<FileStats> {
        let wanted = options != FileStatsOptions::default();
        wanted.then(|| FileStats { options, ..FileStats::default() })
    }

    /// What is recorded.
    pub fn options(&self) -> FileStatsOptions {
        self.options
    }

    /// A request about `node` has been answered, with `errno` (0 if it worked) and so many bytes.
    pub(super) fn note(&self, node: u64, op: u32, errno: i32, bytes: u32) {
        if self.options.numbers
            && let Some(kind) = OPERATIONS.iter().position(|opcodes| opcodes.contains(&op))
        {
            let mut numbers = lock(&self.numbers);
            if let Some(file) = self.entry(&mut numbers, node, FileNumbers::default) {
                file.requests[kind] += 1;
                if errno != 0 && errno != libc::ENOSYS {
                    file.errors[kind] += 1;
                } else if op == opcode::READ {
                    file.read_bytes += u64::from(bytes);
                    file.read_sizes[read_size_class(bytes.into())] += 1;
                }
            }
        }
        if op != opcode::READ || errno != 0 {
            return;
        }
        if self.options.pattern {
            let new = || Access { node, reads: 0, first: SystemTime::now() };
            let mut pattern = lock(&self.pattern);
            if let Some(access) = self.entry(&mut pattern, node, new) {
                access.reads += 1;
            }
        }
        if self.options.latest {
            let mut latest = lock(&self.latest);
            if latest.len() < MAX_FILES {
                latest.insert(node);
            } else if !latest.contains(&node) {
                self.leave_out();
            }
        }
    }

    /// Numbers of each file, by node.
    pub fn numbers(&self) -> Vec<(u64, FileNumbers)> {
        let mut all: Vec<_> = lock(&self.numbers).iter().map(|(k, v)| (*k, *v)).collect();
        all.sort_unstable_by_key(|(node, _)| *node);
        all
    }

    /// Files that were read, in the order in which they first were.
    pub fn pattern(&self) -> Vec<Access> {
        let mut all: Vec<Access> = lock(&self.pattern).values().copied().collect();
        all.sort_unstable_by_key(|access| (access.first, access.node));
        all
    }

    /// Files that were read since this was last asked, by node.
    pub fn take_latest(&self) -> Vec<u64> {
        std::mem::take(&mut *lock(&self.latest)).into_iter().collect()
    }

    /// What is recorded of `node`, if there is room.
    fn entry<'a, T>(
        &self,
        map: &'a mut HashMap<u64, T>,
        node: u64,
        new: impl FnOnce() -> T,
    ) -> Option<&'a mut T> {
        let full = map.len() >= MAX_FILES;
        match map.entry(node) {
            Entry::Occupied(entry) => Some(entry.into_mut()),
            Entry::Vacant(_) if full => {
                self.leave_out();
                None
            }
            Entry::Vacant(entry) => Some(entry.insert(new())),
        }
    }

    #[cold]
    fn leave_out(&self) {
        if !self.full.swap(true, Ordering::Relaxed) {
            log::warn!("statistics per file: {MAX_FILES} files are recorded, others are left out");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: FileStatsOptions = FileStatsOptions { numbers: true, pattern: true, latest: true };

    #[test]
    fn what_was_done_with_each_file() {
        let stats = FileStats::new(ALL).unwrap();
        stats.note(7, opcode::READ, 0, 4096);
        stats.note(9, opcode::READ, 0, 100);
        stats.note(7, opcode::READ, 0, 4095);
        stats.note(7, opcode::READ, libc::EIO, 0);
        stats.note(7, opcode::GETATTR, 0, 104);
        stats.note(7, opcode::STATX, 0, 104);
        stats.note(7, opcode::OPEN, libc::ENOSYS, 0);
        stats.note(7, opcode::WRITE, libc::EROFS, 0);
        let [(7, seven), (9, nine)] = stats.numbers()[..] else { panic!() };
        assert_eq!(seven.requests, [2, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(seven.errors, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((seven.read_bytes, seven.read_sizes), (8191, [0, 1, 1, 0, 0, 0, 0, 0]));
        assert_eq!((nine.read_bytes, nine.read_sizes), (100, [1, 0, 0, 0, 0, 0, 0, 0]));
        let pattern: Vec<_> = stats.pattern().iter().map(|a| (a.node, a.reads)).collect();
        assert_eq!(pattern, [(7, 2), (9, 1)]);
        assert_eq!(stats.take_latest(), [7, 9]);
        stats.note(9, opcode::READ, 0, 1);
        assert_eq!((stats.take_latest(), stats.take_latest()), (vec![9], vec![]));
    }

    #[test]
    fn only_what_was_asked_for_is_recorded() {
        assert!(FileStats::new(FileStatsOptions::default()).is_none());
        let only = FileStatsOptions { pattern: true, ..FileStatsOptions::default() };
        let stats = FileStats::new(only).unwrap();
        stats.note(7, opcode::READ, 0, 1);
        let kept = (stats.numbers().len(), stats.pattern().len(), stats.take_latest().len());
        assert_eq!(kept, (0, 1, 0));
    }

    #[test]
    fn the_records_are_bounded_and_known_files_stay() {
        let stats = FileStats::new(ALL).unwrap();
        for node in 0..MAX_FILES as u64 + 1000 {
            stats.note(node, opcode::READ, 0, 1);
        }
        stats.note(5, opcode::READ, 0, 1);
        assert_eq!((stats.numbers().len(), stats.pattern().len()), (MAX_FILES, MAX_FILES));
        assert_eq!(stats.numbers()[5].1.read_bytes, 2);
        assert_eq!(stats.take_latest().len(), MAX_FILES);
    }
}
