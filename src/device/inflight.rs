//! The record of requests in flight, in memory that the VMM keeps when this process dies.
//!
//! The VMM asks for a buffer (GET_INFLIGHT_FD), hands it back on every connection (SET_INFLIGHT_FD)
//! and never looks inside. A ring's thread notes in it which chains it has taken and not given back,
//! so that the process that serves the ring next, after a kill or a broken connection, answers
//! exactly those. The layout is that of the vhost-user specification for split rings, with a cell of
//! our own behind it for what was agreed at INIT, which a guest does not repeat.
//!
//! What is in the buffer is not believed: it may come from another program, or belong to a ring
//! whose driver has started over since.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::MmapRegion;
use vm_memory::guest_memory::FileOffset;

use super::ring::MAX_SIZE;

/// Words of 8 bytes before the entries of a queue.
///
/// Source: vhost-user specification, `QueueRegionSplit`: u64 features (0), u16 version, u16
/// desc_num, u16 last_batch_head, u16 used_idx.
const HEAD_WORDS: usize = 2;
/// Words of an entry, one for each descriptor.
///
/// Source: vhost-user specification, `DescStateSplit`: u8 inflight, u8 padding\[5\], u16 next, u64
/// counter. `next` links answers that are given back together; we give each back alone, so it is 0.
const ENTRY_WORDS: usize = 2;
/// Queues begin at multiples of so many words (64 bytes), as others lay them out.
const ALIGN_WORDS: usize = 8;
/// Version of the layout; 0 is a buffer that nobody has used.
const VERSION: u16 = 1;
/// Words behind the queues: [`MAGIC`], and what was agreed at INIT.
const TAIL_WORDS: usize = ALIGN_WORDS;
/// Marks the words behind the queues as ours.
const MAGIC: u64 = u64::from_le_bytes(*b"rafsd\0\0\x01");

/// Why a buffer was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    #[error("{queues} queues of {size} descriptors: there can be at most {max} of {MAX_SIZE}")]
    Shape { queues: u16, size: u16, max: usize },
    #[error("a buffer of {len} bytes for queues that need {need}")]
    Short { len: u64, need: u64 },
    #[error("a buffer that ends at byte {end} of a file of {file_len} bytes")]
    PastFile { end: u64, file_len: u64 },
    #[error("making the buffer")]
    Make(#[source] io::Error),
    #[error("looking at the buffer's file")]
    Stat(#[source] io::Error),
    #[error("mapping the buffer")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
}

/// How many rings a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub queues: u16,
    /// Descriptors of the longest ring.
    pub size: u16,
}

impl Shape {
    /// Words of one queue.
    fn stride(self) -> usize {
        (HEAD_WORDS + ENTRY_WORDS * usize::from(self.size)).next_multiple_of(ALIGN_WORDS)
    }

    /// Words of all queues.
    fn queue_words(self) -> usize {
        self.stride() * usize::from(self.queues)
    }

    /// Bytes of a buffer of ours.
    fn len(self) -> u64 {
        8 * (self.queue_words() + TAIL_WORDS) as u64
    }
}

/// A buffer for rings of this shape, empty, and its length in bytes. It cannot be cut short.
pub(super) fn create(shape: Shape) -> Result<(File, u64), InflightError> {
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("rafsd-inflight", flags)?;
        ftruncate(&file, shape.len())?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(File::from(file))
    };
    make()
        .map(|file| (file, shape.len()))
        .map_err(|e: rustix::io::Errno| InflightError::Make(e.into()))
}

/// A buffer that the VMM has handed over.
///
/// Its words are looked at with every request, so those who use them have references of their own;
/// none of these leaves a value that keeps the mapping.
pub(super) struct Inflight {
    shape: Shape,
    words: &'static [AtomicU64],
    /// For what was agreed at INIT, if there is room.
    cell: Option<&'static AtomicU64>,
    _mapping: MmapRegion<()>,
}

impl Inflight {
    /// Maps `len` bytes at `offset` of `file`.
    pub(super) fn open(
        file: File,
        offset: u64,
        len: u64,
        shape: Shape,
    ) -> Result<Inflight, InflightError> {
        let need = 8 * shape.queue_words() as u64;
        let short = || InflightError::Short { len, need };
        if len < need {
            return Err(short());
        }
        let size = usize::try_from(len.min(shape.len())).map_err(|_| short())?;
        let end = offset.checked_add(len).ok_or_else(short)?;
        let file_len = file.metadata().map_err(InflightError::Stat)?.len();
        if file_len < end {
            return Err(InflightError::PastFile { end, file_len });
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), size)
            .map_err(InflightError::Map)?;
        // SAFETY: the mapping begins at a page, has at least so many words, and nothing but atomics
        // ever refers to it. It lives as long as the value, which is as long as any reference.
        let words: &'static [AtomicU64] =
            unsafe { std::slice::from_raw_parts(mapping.as_ptr().cast(), size / 8) };
        let cell = words.get(shape.queue_words()..).and_then(cell);
        Ok(Inflight { shape, words, cell, _mapping: mapping })
    }

    /// What was agreed at INIT when the buffer was last in use; 0 if nothing.
    pub(super) fn agreed(&self) -> u64 {
        self.cell.map_or(0, |cell| cell.load(Ordering::Relaxed))
    }
}

/// The cell for what was agreed, in the words behind the queues: if nobody else uses them.
fn cell(words: &'static [AtomicU64]) -> Option<&'static AtomicU64> {
    let [magic, cell, ..] = words else { return None };
    match magic.compare_exchange(0, MAGIC, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) | Err(MAGIC) => Some(cell),
        Err(_) => None,
    }
}

/// What a buffer says about a ring that is to start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing: nobody has used it for this ring.
    Nothing,
    /// That these chains, the oldest first, were taken and not given back.
    Heads(Vec<u16>),
    /// Something about another ring than the one that is here.
    Stale,
}

/// One ring's part of a buffer, written by the ring's thread.
pub(super) struct Record {
    /// Those of the head, then two for each descriptor.
    words: &'static [AtomicU64],
    inflight: Arc<Inflight>,
    size: u16,
    /// Chains noted so far: their order.
    counter: u64,
}

impl Record {
    /// The part for ring `index` with `size` descriptors. `None` if the buffer has no room for it.
    pub(super) fn of(inflight: &Arc<Inflight>, index: u16, size: u16) -> Option<Record> {
        let shape = inflight.shape;
        if index >= shape.queues || size > shape.size {
            return None;
        }
        let at = usize::from(index) * shape.stride();
        let words = &inflight.words[at..][..HEAD_WORDS + ENTRY_WORDS * usize::from(size)];
        Some(Record { words, inflight: Arc::clone(inflight), size, counter: 0 })
    }

    /// What is there, for a ring whose driver has offered chains up to `avail` and whose device has
    /// given back those up to `used`, as the guest's memory says.
    pub(super) fn find(&self, used: u16, avail: u16) -> Found {
        let words = self.words;
        let (version, size, last, noted) = split(words[1].load(Ordering::Acquire));
        if version == 0 {
            return Found::Nothing;
        }
        if version != VERSION || size != self.size {
            return Found::Stale;
        }
        let entry = |head: u16| words.get(HEAD_WORDS + ENTRY_WORDS * usize::from(head));
        let counter = |head: u16| {
            words[HEAD_WORDS + 1 + ENTRY_WORDS * usize::from(head)].load(Ordering::Relaxed)
        };
        let marked = |head: &u16| {
            entry(*head).is_some_and(|entry| entry.load(Ordering::Relaxed) & 0xff != 0)
        };
        let mut heads: Vec<u16> = (0..self.size).filter(marked).collect();
        // Given back after it was last noted so: these are linked, the last one first.
        let unnoted = used.wrapping_sub(noted);
        let mut given = last;
        for _ in 0..unnoted {
            heads.retain(|head| *head != given);
            let Some(entry) = entry(given) else { return Found::Stale };
            given = u16::try_from(entry.load(Ordering::Relaxed) >> 48).unwrap_or_default();
            if unnoted > self.size {
                return Found::Stale;
            }
        }
        // No more can be in flight than the driver has offered and not got back.
        if heads.len() > usize::from(avail.wrapping_sub(used)) {
            return Found::Stale;
        }
        heads.sort_by_key(|head| counter(*head));
        Found::Heads(heads)
    }

    /// Notes that exactly `heads` are in flight, the oldest first, of a ring whose device has given
    /// back those up to `used`. Whoever finds it half done finds what was there before, or, if
    /// `heads` is empty, nothing.
    pub(super) fn begin(&mut self, used: u16, heads: &[u16]) {
        self.counter = 0;
        if heads.is_empty() {
            self.forget();
        }
        for head in 0..self.size {
            let entry = &self.words[HEAD_WORDS + ENTRY_WORDS * usize::from(head)];
            let word = entry.load(Ordering::Relaxed);
            if word & 0xff != 0 && !heads.contains(&head) {
                // What it is linked to stays, for whoever has to follow it.
                entry.store(word & !0xff, Ordering::Release);
            }
        }
        for head in heads {
            // The n-th of them has a number of at least n: so they stay in order.
            self.taken(*head);
        }
        self.words[0].store(0, Ordering::Release);
        self.words[1].store(join(self.size, 0, used), Ordering::Release);
    }

    /// Notes that nobody has used it for this ring.
    pub(super) fn forget(&self) {
        self.words[1].store(0, Ordering::Release);
    }

    // The order in which a killed process has made its stores is the order of the program, so that
    // of the compiler is all that has to be held: `Release` does.

    /// Notes that the chain at `head` was taken.
    pub(super) fn taken(&mut self, head: u16) {
        self.counter += 1;
        let at = HEAD_WORDS + ENTRY_WORDS * usize::from(head);
        if let Some([entry, counter]) = self.words.get(at..at + ENTRY_WORDS) {
            counter.store(self.counter, Ordering::Release);
            entry.store(1, Ordering::Release);
        }
    }

    /// Notes that the chain at `head` is about to be given back, after those up to `used`.
    pub(super) fn giving(&self, head: u16, used: u16) {
        self.words[1].store(join(self.size, head, used), Ordering::Release);
    }

    /// Notes that the chain at `head` has been given back, the last of those up to `used`.
    pub(super) fn given(&self, head: u16, used: u16) {
        let words = self.words;
        if let Some(entry) = words.get(HEAD_WORDS + ENTRY_WORDS * usize::from(head)) {
            entry.store(0, Ordering::Release);
        }
        words[1].store(join(self.size, head, used), Ordering::Release);
    }

    /// Keeps what was agreed at INIT, where the buffer has room for it.
    pub(super) fn keep_agreed(&self, agreed: u64) {
        if let Some(cell) = self.inflight.cell
            && cell.load(Ordering::Relaxed) != agreed
        {
            cell.store(agreed, Ordering::Release);
        }
    }
}

/// Version, desc_num, last_batch_head and used_idx.
fn split(word: u64) -> (u16, u16, u16, u16) {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    let half = |low, high| u16::from_le_bytes([low, high]);
    (half(a, b), half(c, d), half(e, f), half(g, h))
}

fn join(size: u16, last: u16, used: u16) -> u64 {
    u64::from(VERSION) | u64::from(size) << 16 | u64::from(last) << 32 | u64::from(used) << 48
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(shape: Shape) -> (File, Record) {
        let (file, len) = create(shape).unwrap();
        let inflight = Inflight::open(file.try_clone().unwrap(), 0, len, shape).unwrap();
        (file, Record::of(&Arc::new(inflight), shape.queues - 1, shape.size).unwrap())
    }

    /// The bytes as the specification has them, written down by hand.
    #[test]
    fn the_layout_is_that_of_the_specification() {
        use std::os::unix::fs::FileExt;
        let shape = Shape { queues: 2, size: 4 };
        let (file, mut record) = record(shape);
        record.begin(7, &[]);
        for head in [3, 1, 2] {
            record.taken(head);
        }
        record.giving(1, 7);
        record.given(1, 8);
        let mut bytes = [0u8; 80];
        // A queue of 4 has 16 + 4 * 16 = 80 bytes, rounded up to 128.
        file.read_exact_at(&mut bytes, 128).unwrap();
        #[rustfmt::skip]
        let want: [u8; 80] = [
            0, 0, 0, 0, 0, 0, 0, 0, // features
            1, 0, 4, 0, 1, 0, 8, 0, // version, desc_num, last_batch_head, used_idx
            0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0, // descriptor 0
            0, 0, 0, 0, 0, 0, 0, 0,  2, 0, 0, 0, 0, 0, 0, 0, // given back
            1, 0, 0, 0, 0, 0, 0, 0,  3, 0, 0, 0, 0, 0, 0, 0,
            1, 0, 0, 0, 0, 0, 0, 0,  1, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes, want);
        assert_eq!(record.find(8, 11), Found::Heads(vec![3, 2]));
    }

    #[test]
    fn what_is_found_after_a_kill_between_any_two_stores() {
        let (_file, mut record) = record(Shape { queues: 1, size: 8 });
        assert_eq!(record.find(0, 0), Found::Nothing);
        record.begin(65_535, &[5]);
        assert_eq!(record.find(65_535, 0), Found::Heads(vec![5]));
        record.taken(2);
        assert_eq!(record.find(65_535, 1), Found::Heads(vec![5, 2]));
        record.giving(5, 65_535);
        assert_eq!(record.find(65_535, 1), Found::Heads(vec![5, 2]), "not yet in the used ring");
        assert_eq!(record.find(0, 1), Found::Heads(vec![2]), "in the used ring, not yet noted");
        record.given(5, 0);
        assert_eq!(record.find(0, 1), Found::Heads(vec![2]));
        record.taken(5);
        assert_eq!(record.find(0, 2), Found::Heads(vec![2, 5]), "the same head again");
    }

    #[test]
    fn answers_of_another_program_that_gives_back_many_at_once() {
        let (_file, mut record) = record(Shape { queues: 1, size: 8 });
        record.begin(10, &[1, 2, 3, 4]);
        // A batch of 3, then 2 after it; killed before their marks were cleared.
        record.words[HEAD_WORDS + 2 * 3].store(1, Ordering::Relaxed);
        record.words[HEAD_WORDS + 2 * 2].store(1 | 3 << 48, Ordering::Relaxed);
        record.giving(2, 10);
        assert_eq!(record.find(12, 14), Found::Heads(vec![1, 4]));
        assert_eq!(record.find(10, 14), Found::Heads(vec![1, 2, 3, 4]));
    }

    #[test]
    fn a_record_of_another_ring_is_not_taken_for_this_one() {
        let shape = Shape { queues: 1, size: 8 };
        let (_file, mut record) = record(shape);
        record.begin(100, &[1, 2, 3]);
        for (used, avail, why) in [
            (0, 0, "a fresh ring"),
            (100, 102, "more in flight than offered"),
            (100, 100, "nothing offered"),
            (90, 93, "behind"),
            (300, 303, "far ahead"),
        ] {
            assert_eq!(record.find(used, avail), Found::Stale, "{why}");
        }
        assert_eq!(record.find(100, 103), Found::Heads(vec![1, 2, 3]));
        let shorter = Record::of(&record.inflight, 0, 4).unwrap();
        assert_eq!(shorter.find(100, 103), Found::Stale, "a ring of another length");
        record.words[1].store(join(8, 2000, 99), Ordering::Relaxed);
        assert_eq!(record.find(100, 103), Found::Stale, "a head that cannot be");
        assert!(Record::of(&record.inflight, 1, 8).is_none(), "no such queue");
        assert!(Record::of(&record.inflight, 0, 16).is_none(), "a ring that is longer");
    }

    #[test]
    fn what_was_agreed_is_kept() {
        let shape = Shape { queues: 1, size: 8 };
        let (file, record) = record(shape);
        assert_eq!(record.inflight.agreed(), 0);
        record.keep_agreed(77);
        let again = Inflight::open(file, 0, shape.len(), shape).unwrap();
        assert_eq!(again.agreed(), 77);
        // A buffer of another program: no room, or something else in it.
        let bare = |len: u64, word: u64| {
            use std::os::unix::fs::FileExt;
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            if word != 0 {
                file.write_all_at(&word.to_le_bytes(), 192).unwrap();
            }
            let inflight = Arc::new(Inflight::open(file, 0, len, shape).unwrap());
            Record::of(&inflight, 0, 8).unwrap().keep_agreed(9);
            inflight.agreed()
        };
        assert_eq!((bare(192, 0), bare(4096, 5), bare(4096, 0)), (0, 0, 9));
    }

    #[test]
    fn buffers_that_cannot_be() {
        let shape = Shape { queues: 2, size: 128 };
        let open = |file_len: u64, offset, len| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(file_len).unwrap();
            Inflight::open(file, offset, len, shape).map(drop)
        };
        let len = shape.len();
        assert!(open(len, 0, len).is_ok());
        assert!(open(4096 + len, 4096, len).is_ok());
        assert!(matches!(open(len, 0, 64), Err(InflightError::Short { .. })));
        assert!(matches!(open(len - 1, 0, len), Err(InflightError::PastFile { .. })));
        assert!(matches!(open(len, u64::MAX - 8, len), Err(InflightError::Short { .. })));
        assert!(matches!(open(2 * len, 8, len), Err(InflightError::Map(_))));
    }
}
