//! What is likely to be read next, from where it lies and what it is.
//!
//! A blob holds files in the order of the tree: what lies near a chunk comes from the same directory
//! or package. Programs read many small files of one kind (`.pyc`, `.js`, `.conf`) and few of those
//! in between. So the neighbours of a chunk are the small files nearest to it, of its file's kind, or
//! of any kind if they are very near. Large files are left out: for the same bytes several small
//! ones can be had, each of which would cost a round trip.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::rafs::ci::ChunkInfos;
use crate::rafs::id::ChunkIndex;
use crate::rafs::{Bootstrap, FileKind};

/// How far away neighbours may be, in stored bytes.
const REACH: u64 = 4 << 20;
/// How far away files of another kind may be.
const NEXT_DOOR: u64 = 64 << 10;
/// Missing chunks between two neighbours are taken along if they are fewer bytes: a request saved.
const GAP: u64 = 16 << 10;
/// Chunks looked at on each side.
const MAX_LOOKED_AT: u32 = 4096;

/// In a mark: the chunk is the first of a file.
const FIRST: u8 = 0x80;

/// Which chunks belong together, for all blobs of one image. One byte for each chunk, found by a walk
/// of the image when it is first worth it.
pub struct ImageFiles {
    image: Bootstrap,
    begun: AtomicBool,
    /// By blob, by chunk: kind of the file (1 to 127, 0 = no file), and [`FIRST`].
    marks: OnceLock<Vec<Vec<u8>>>,
}

impl ImageFiles {
    pub fn new(image: &Bootstrap) -> Self {
        ImageFiles { image: image.clone(), begun: AtomicBool::new(false), marks: OnceLock::new() }
    }

    pub fn is_of(&self, image: &Bootstrap) -> bool {
        self.image.is(image)
    }

    /// The marks of a blob's chunks; `None` before [`ImageFiles::find`] has ended.
    pub fn marks(&self, blob: usize) -> Option<&[u8]> {
        self.marks.get()?.get(blob).map(Vec::as_slice)
    }

    /// True for the one who should call [`ImageFiles::find`].
    pub fn begin(&self) -> bool {
        !self.begun.swap(true, Ordering::Relaxed)
    }

    /// Walks the image. Takes some microseconds for each file, so for the blocking pool.
    pub fn find(&self) {
        let mut marks: Vec<Vec<u8>> = self
            .image
            .blobs()
            .iter()
            .map(|blob| vec![0; usize::try_from(blob.chunk_count).unwrap_or(0)])
            .collect();
        for item in self.image.walk().flatten() {
            if item.inode.kind() != FileKind::Regular {
                continue;
            }
            let kind = kind_of(item.name);
            for number in 0..item.inode.chunk_count() {
                let Ok(addr) = item.inode.chunk(number) else { break };
                let Some(blob) = addr.blob() else { continue };
                let mark = marks
                    .get_mut(usize::from(blob.0))
                    .and_then(|marks| marks.get_mut(usize::try_from(addr.chunk_index()).ok()?));
                if let Some(mark) = mark
                    && *mark == 0
                {
                    *mark = kind | if number == 0 { FIRST } else { 0 };
                }
            }
        }
        drop(self.marks.set(marks));
    }
}

/// 1 to 127: the same for names with the same ending.
fn kind_of(name: &[u8]) -> u8 {
    let library = name.windows(4).any(|part| part == b".so.") || name.ends_with(b".so");
    let ending = match name.iter().rposition(|&byte| byte == b'.') {
        _ if library => b"so",
        Some(dot) if name.len() - dot <= 9 => &name[dot + 1..],
        _ => b"",
    };
    let hash =
        ending.iter().fold(0x811C_9DC5u32, |h, &b| (h ^ u32::from(b)).wrapping_mul(16_777_619));
    u8::try_from(hash % 127 + 1).unwrap_or(1)
}

/// Where chunks are stored. Units are what one decompression gives: chunks, or batches of them.
pub trait Places {
    fn count(&self) -> u32;
    /// The chunks of the unit that chunk `index`, which exists, belongs to.
    fn unit(&self, index: u32) -> Range<u32>;
    /// Bytes of the blob file.
    fn stored(&self, index: u32) -> Range<u64>;
}

impl Places for ChunkInfos {
    fn count(&self) -> u32 {
        self.len()
    }

    fn unit(&self, index: u32) -> Range<u32> {
        ChunkInfos::unit(self, ChunkIndex(index)).unwrap_or(index..index + 1)
    }

    fn stored(&self, index: u32) -> Range<u64> {
        let info = self.get(ChunkIndex(index));
        info.map_or(0..0, |info| info.compressed_offset..info.compressed_end())
    }
}

/// A blob's chunks, and what is known of the files in it.
pub struct Neighbourhood<'a, P: Places> {
    pub places: &'a P,
    /// By chunk; empty if nothing is known: then each unit counts as a file.
    pub marks: &'a [u8],
}

impl<P: Places> Neighbourhood<'_, P> {
    fn mark(&self, index: u32) -> u8 {
        usize::try_from(index).ok().and_then(|i| self.marks.get(i)).copied().unwrap_or(FIRST)
    }

    /// Is it the first chunk of a file, as far as is known?
    pub fn starts_file(&self, index: u32) -> bool {
        self.mark(index) & FIRST != 0 || self.mark(index) == 0
    }

    /// The end of the unit or file that begins at or goes through `from`.
    fn file_end(&self, from: u32) -> u32 {
        let mut end = self.places.unit(from).end;
        let last = from.saturating_add(MAX_LOOKED_AT).min(self.places.count());
        while end < last && !self.starts_file(end) {
            end = self.places.unit(end).end;
        }
        end.min(self.places.count())
    }

    /// The start of the unit or file that goes through `index`.
    fn file_start(&self, index: u32) -> u32 {
        let mut start = self.places.unit(index).start;
        let first = index.saturating_sub(MAX_LOOKED_AT);
        while start > first && !self.starts_file(start) {
            start = self.places.unit(start - 1).start;
        }
        start
    }

    /// Stored bytes of whole units.
    pub fn bytes(&self, chunks: &Range<u32>) -> u64 {
        match chunks.is_empty() {
            true => 0,
            false => {
                let start = self.places.stored(chunks.start).start;
                self.places.stored(chunks.end - 1).end.saturating_sub(start)
            }
        }
    }

    /// Whole units behind `from` that hold at most `budget` bytes; inside the file, if `in_file`.
    pub fn following(&self, from: u32, budget: u64, in_file: bool) -> Range<u32> {
        let mut end = from;
        while end < self.places.count() && !(in_file && self.starts_file(end)) {
            let next = self.places.unit(end).end;
            if self.bytes(&(from..next)) > budget {
                break;
            }
            end = next;
        }
        from..end
    }

    /// Small files around `anchor` that are `missing`, as runs of chunks, the nearest first: each of at
    /// most `small` stored bytes, together at most `budget`, gaps not counted.
    pub fn around(
        &self,
        anchor: &Range<u32>,
        budget: u64,
        small: u64,
        missing: impl Fn(u32) -> bool,
    ) -> Vec<Range<u32>> {
        let count = self.places.count();
        if anchor.is_empty() || anchor.end > count {
            return Vec::new();
        }
        let kind = self.mark(anchor.start) & !FIRST;
        let (from, to) =
            (self.places.stored(anchor.start).start, self.places.stored(anchor.end - 1).end);
        let (mut left, mut right) =
            (self.file_start(anchor.start), self.file_end(anchor.end.saturating_sub(1)));
        let (first, last) =
            (left.saturating_sub(MAX_LOOKED_AT), right.saturating_add(MAX_LOOKED_AT));
        let mut files: Vec<Range<u32>> = Vec::new();
        let mut taken = 0;
        loop {
            let before = (left > first).then(|| self.file_start(left - 1)..left);
            let after = (right < last.min(count)).then(|| right..self.file_end(right));
            let distance = |file: &Range<u32>| {
                let place =
                    self.places.stored(file.start).start..self.places.stored(file.end - 1).end;
                from.saturating_sub(place.end).max(place.start.saturating_sub(to))
            };
            let file = match (before, after) {
                (None, None) => break,
                (Some(file), None) | (None, Some(file)) => file,
                (Some(a), Some(b)) => {
                    if distance(&a) <= distance(&b) {
                        a
                    } else {
                        b
                    }
                }
            };
            match file.start >= anchor.end {
                true => right = file.end,
                false => left = file.start,
            }
            let far = distance(&file);
            if far > REACH {
                break;
            }
            let size = self.bytes(&file);
            let alike = far <= NEXT_DOOR || self.mark(file.start) & !FIRST == kind;
            if size > small || !alike || !file.clone().all(&missing) {
                continue;
            }
            taken += size;
            if taken > budget {
                break;
            }
            files.push(file);
        }
        files.sort_unstable_by_key(|file| file.start);
        let mut runs = self.join(&files, GAP, &missing);
        runs.sort_by_key(|run| {
            let place = self.places.stored(run.start).start..self.places.stored(run.end - 1).end;
            from.saturating_sub(place.end).max(place.start.saturating_sub(to))
        });
        runs
    }

    /// Joins ranges of chunks, which are in order, over gaps of at most `gap` bytes whose chunks are
    /// all `missing`.
    pub fn join(
        &self,
        ranges: &[Range<u32>],
        gap: u64,
        missing: impl Fn(u32) -> bool,
    ) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for range in ranges {
            if let Some(run) = runs.last_mut() {
                let between = run.end..range.start;
                if between.is_empty()
                    || (self.bytes(&between) <= gap && between.clone().all(&missing))
                {
                    run.end = run.end.max(range.end);
                    continue;
                }
            }
            runs.push(range.clone());
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of these stored sizes, one behind the other.
    struct Sizes(Vec<u64>);

    impl Places for Sizes {
        fn count(&self) -> u32 {
            u32::try_from(self.0.len()).unwrap()
        }

        fn unit(&self, index: u32) -> Range<u32> {
            index..index + 1
        }

        fn stored(&self, index: u32) -> Range<u64> {
            let index = usize::try_from(index).unwrap();
            let start = self.0[..index].iter().sum();
            start..start + self.0[index]
        }
    }

    const KIB: u64 = 1 << 10;

    /// Files as (ending, sizes of their chunks).
    fn blob(files: &[(&str, &[u64])]) -> (Sizes, Vec<u8>) {
        let (mut sizes, mut marks) = (Vec::new(), Vec::new());
        for (ending, chunks) in files {
            for (i, &chunk) in chunks.iter().enumerate() {
                sizes.push(chunk * KIB);
                let kind = kind_of(format!("name.{ending}").as_bytes());
                marks.push(kind | if i == 0 { FIRST } else { 0 });
            }
        }
        (Sizes(sizes), marks)
    }

    #[test]
    fn neighbours_are_near_small_and_of_the_same_kind() {
        let (places, marks) = blob(&[
            ("pyc", &[10]),       // 0
            ("py", &[30]),        // 1
            ("pyc", &[20]),       // 2
            ("so", &[1000, 800]), // 3, 4
            ("pyc", &[40]),       // 5: the anchor
            ("py", &[70]),        // 6: next door
            ("py", &[60]),        // 7: too far for another kind
            ("pyc", &[70]),       // 8
            ("pyc", &[200]),      // 9: large
            ("pyc", &[30, 30]),   // 10, 11
            ("pyc", &[5000]),     // 12
            ("pyc", &[1]),        // 13: out of reach
        ]);
        let known = Neighbourhood { places: &places, marks: &marks };
        let all = known.around(&(5..6), 1000 * KIB, 128 * KIB, |_| true);
        assert_eq!(all, [6..7, 8..9, 10..12, 2..3, 0..1], "the nearest first");
        // What is nearest comes first if not all may be had.
        assert_eq!(known.around(&(5..6), 145 * KIB, 128 * KIB, |_| true), [6..7, 8..9]);
        assert_eq!(known.around(&(5..6), 0, 128 * KIB, |_| true), Vec::<Range<u32>>::new());
        // What is there is left out.
        assert_eq!(
            known.around(&(5..6), 1000 * KIB, 128 * KIB, |i| i != 8 && i != 11),
            [6..7, 2..3, 0..1]
        );
        // Without knowledge of files, whatever is small.
        let unknown = Neighbourhood { places: &places, marks: &[] };
        assert_eq!(
            unknown.around(&(5..6), 10 * KIB, 128 * KIB, |_| true),
            Vec::<Range<u32>>::new()
        );
        assert_eq!(unknown.around(&(5..6), 1000 * KIB, 128 * KIB, |_| true), [6..9, 10..12, 0..3]);
    }

    #[test]
    fn small_gaps_are_taken_along_if_they_are_missing() {
        let (places, marks) =
            blob(&[("a", &[10]), ("b", &[10]), ("a", &[10]), ("b", &[20]), ("a", &[9])]);
        let known = Neighbourhood { places: &places, marks: &marks };
        let ranges = [0..1, 2..3, 4..5];
        assert_eq!(known.join(&ranges, 16 * KIB, |_| true), [0..3, 4..5]);
        assert_eq!(known.join(&ranges, 16 * KIB, |i| i != 1), ranges);
        let two = [0..1, 1..2, 4..5];
        assert_eq!(known.join(&two, 0, |_| true), [0..2, 4..5], "adjacent ones need no gap");
    }

    #[test]
    fn what_follows_ends_with_the_file_and_the_budget() {
        let (places, marks) = blob(&[("a", &[100, 100, 100]), ("b", &[10]), ("b", &[10])]);
        let known = Neighbourhood { places: &places, marks: &marks };
        // (from, budget, in the file, chunks)
        let cases = [
            (1, 1000, true, 1..3),
            (1, 150, true, 1..2),
            (1, 99, true, 1..1),
            (1, 1000, false, 1..5),
            (3, 1000, true, 3..3),
            (5, 1000, false, 5..5),
        ];
        for (from, budget, in_file, want) in cases {
            let got = known.following(from, budget * KIB, in_file);
            assert_eq!(got, want, "from {from}, {budget} KiB, {in_file}");
        }
    }

    #[test]
    fn kinds_follow_the_ending() {
        let same = [("a.pyc", "b.cpython-311.pyc"), ("libc.so.6", "x.so"), ("Makefile", "README")];
        for (a, b) in same {
            assert_eq!(kind_of(a.as_bytes()), kind_of(b.as_bytes()), "{a} {b}");
        }
        for (a, b) in [("a.py", "a.pyc"), ("a.js", "a.so"), ("a", "a.a")] {
            assert_ne!(kind_of(a.as_bytes()), kind_of(b.as_bytes()), "{a} {b}");
        }
    }

    #[test]
    fn a_large_file_is_crossed_quickly_and_its_end_bounded() {
        let chunks = vec![4; 20_000];
        let (places, marks) = blob(&[("big", &chunks), ("a", &[1])]);
        let known = Neighbourhood { places: &places, marks: &marks };
        assert_eq!(known.file_end(0), MAX_LOOKED_AT);
        assert_eq!(known.file_start(10_000), 10_000 - MAX_LOOKED_AT);
    }
}
