//! Read-ahead: asking for chunks before a reader does.
//!
//! Two guesses are made, both as work that gives way to demand. A reader that takes chunks in their
//! order gets the next ones, more of them each time it uses what came; and around a chunk that had
//! to be fetched its neighbours are, the more the longer an answer takes ([`Link::width`]). How much is
//! risked depends on how much of it was used so far: readers that jump about in a large file soon cost
//! nothing but what they read.
//!
//! [`Link::width`]: super::link::Link::width

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::counters::add;
use super::gate::Class;
use super::neighbours::{Neighbourhood, Places};
use super::readiness::Bitmap;
use super::store::Blob;
use super::table::Table;
use crate::rafs::ci::ChunkInfos;

/// Readers that are told apart; of more, those that read last.
const MAX_READERS: usize = 16;
/// Runs of chunks that wait to be fetched; the oldest guesses are dropped.
const MAX_QUEUE: usize = 256;
/// As long as one in so many bytes is used, guessing goes on at full width.
const WORTHWHILE: u64 = 3;
/// Bytes that may be guessed wrong before the width shrinks.
const CREDIT: u64 = 4 << 20;
/// Bytes after which what was guessed before counts half.
const MEMORY: u64 = 32 << 20;
/// A reader that went from file to file in their order so often goes on.
const FILES_IN_ORDER: u32 = 3;
/// A file that is taken along has at most one in so many of the bytes that may be guessed at once,
/// and at most so many.
const FILE_SHARE: u64 = 3;
const FILE_MOST: u64 = 128 << 10;
/// How long the first answer of a source is waited for.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// A guess of fewer bytes is not worth a request.
const LEAST: u64 = 4 << 10;

/// What one blob's readers did and will do.
pub struct Ahead {
    state: Mutex<State>,
    /// Chunks that were guessed and came, and nobody has read yet.
    unread: Bitmap,
    /// How many those are: readers look no further if there are none.
    unread_count: AtomicU32,
    /// Lists of what will be read that are being fetched. They know better than guesses.
    listed: AtomicU32,
}

/// As long as it is there, a list of what will be read is being fetched.
pub struct Listed(Arc<Blob>);

impl Listed {
    pub fn new(blob: &Arc<Blob>) -> Listed {
        blob.ahead.listed.fetch_add(1, Ordering::Relaxed);
        Listed(blob.clone())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.ahead.listed.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct State {
    /// The one who read last is in front.
    readers: VecDeque<Reader>,
    trust: Trust,
    /// What is to be fetched, the latest guess first.
    queue: VecDeque<Range<u32>>,
    /// A task takes from the queue.
    running: bool,
}

/// Somebody who takes chunks in their order, or may do.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reader {
    /// The chunk behind the last one it took.
    next: u32,
    /// What was asked for early ends here.
    asked: u32,
    /// Stored bytes that it took in order.
    read: u64,
    /// Times that it went on to the next file.
    files: u32,
}

/// How many bytes were guessed, and how many of those were used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Trust {
    guessed: u64,
    used: u64,
}

impl Trust {
    /// As much of `bytes` as guesses deserve.
    fn share(&self, bytes: u64) -> u64 {
        let good = self.used.saturating_mul(WORTHWHILE).saturating_add(CREDIT);
        if self.guessed <= good {
            return bytes;
        }
        let share = u128::from(bytes) * u128::from(good) / u128::from(self.guessed);
        // Squared, so that it ends: half the success is a quarter of the width.
        let share = share * u128::from(good) / u128::from(self.guessed);
        u64::try_from(share).unwrap_or(bytes)
    }

    fn guessed(&mut self, bytes: u64) {
        self.guessed += bytes;
        if self.guessed > MEMORY {
            self.guessed /= 2;
            self.used /= 2;
        }
    }
}

impl Ahead {
    pub fn new(chunks: u32) -> Ahead {
        Ahead {
            state: Mutex::default(),
            unread: Bitmap::new(chunks),
            unread_count: AtomicU32::new(0),
            listed: AtomicU32::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chunks of a guess came.
    pub fn came(&self, chunks: Range<u32>) {
        for chunk in chunks {
            if !self.unread.get(chunk) {
                self.unread.set(chunk);
                self.unread_count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Is this the first reader of a chunk that came because of a guess?
    pub fn take_unread(&self, chunk: u32) -> bool {
        if self.unread_count.load(Ordering::Relaxed) == 0 || !self.unread.take(chunk) {
            return false;
        }
        self.unread_count.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

impl State {
    /// A reader took `chunks`. What to ask for now: no more than `window` makes of what it has read in
    /// order, or, to begin with, than `width`; at first inside the file. It is topped up early, so that a
    /// reader as quick as the link never waits.
    fn follow<P: Places>(
        &mut self,
        chunks: &Range<u32>,
        window: impl Fn(u64) -> u64,
        width: u64,
        blob: &Neighbourhood<'_, P>,
    ) -> Option<Range<u32>> {
        let goes_on = |r: &Reader| (r.next..=r.asked.max(r.next)).contains(&chunks.start);
        let mut reader = match self.readers.iter().position(goes_on) {
            Some(known) => self.readers.remove(known)?,
            None => Reader { next: chunks.start, asked: chunks.end, read: 0, files: 0 },
        };
        if reader.read > 0 && blob.starts_file(chunks.start) {
            reader.files += 1;
        }
        reader.read = reader.read.saturating_add(blob.bytes(chunks));
        reader.next = chunks.end;
        reader.asked = reader.asked.max(chunks.end);
        let in_order = reader.files >= FILES_IN_ORDER;
        let first = if in_order { 0 } else { self.trust.share(width) };
        let window = window(reader.read).max(first);
        let ahead = blob.bytes(&(reader.next..reader.asked));
        let next = match window.checked_sub(ahead) {
            Some(room) if ahead <= window / 4 * 3 && room >= LEAST => {
                blob.following(reader.asked, room, !in_order)
            }
            _ => reader.asked..reader.asked,
        };
        reader.asked = next.end;
        self.readers.push_front(reader);
        self.readers.truncate(MAX_READERS);
        (!next.is_empty()).then_some(next)
    }
}

impl Blob {
    /// Somebody waits for `units`, in the order of their chunks, that are downloaded now.
    pub(super) fn missed(self: &Arc<Self>, units: &[Range<u32>]) {
        if self.amplify() > 0 && self.link.estimate().0.is_none() {
            // How much is worth asking for is known when the first answer begins.
            self.learn_files();
            let (blob, units) = (self.clone(), units.to_vec());
            self.store.runtime.spawn(async move {
                let first = blob.link.measured_once();
                if tokio::time::timeout(FIRST_ANSWER, first).await.is_ok() {
                    blob.guess_after(&units);
                }
            });
            return;
        }
        self.guess_after(units);
    }

    fn guess_after(self: &Arc<Self>, units: &[Range<u32>]) {
        let (product, width) = (self.link.product(), self.width());
        if product == 0 || self.amplify() == 0 || self.ahead.listed.load(Ordering::Relaxed) > 0 {
            return;
        }
        let Some(table) = self.table.get() else { return };
        self.learn_files();
        let near = self.neighbourhood(table);
        let mut runs = Vec::new();
        let mut state = self.ahead.state();
        for chunks in near.join(units, 0, |_| false) {
            runs.extend(state.follow(&chunks, |read| self.link.window(read), width, &near));
            let budget = state.trust.share(width);
            runs.extend(self.guess(&mut state, &near, &chunks, budget));
        }
        self.ask(state, runs);
    }

    /// Somebody reads a chunk that was asked for early, for the first time. Takes no time.
    #[cold]
    pub(super) fn follow(&self, chunk: u32) {
        if let Some(blob) = self.me.upgrade() {
            self.store.runtime.spawn(async move { blob.hit(chunk) });
        }
    }

    /// The same for a reader that need not be quick.
    pub(super) fn hit(self: &Arc<Self>, chunk: u32) {
        let Some(table) = self.table.get() else { return };
        let width = self.width();
        let near = self.neighbourhood(table);
        let members = Places::unit(near.places, chunk);
        let bytes = near.bytes(&members) / members.len().max(1) as u64;
        let unit = chunk..chunk + 1;
        add(&self.store.counters.read_ahead_used_bytes_total, bytes);
        let mut state = self.ahead.state();
        state.trust.used += bytes;
        let runs =
            state.follow(&unit, |read| self.link.window(read), width, &near).into_iter().collect();
        self.ask(state, runs);
    }

    /// Neighbours of `chunks` that are neither here nor on their way.
    fn guess(
        &self,
        state: &mut State,
        near: &Neighbourhood<'_, ChunkInfos>,
        chunks: &Range<u32>,
        budget: u64,
    ) -> Vec<Range<u32>> {
        if budget < LEAST {
            return Vec::new();
        }
        let flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |i| !self.verified.get(i) && !flights.contains_key(&i);
        let runs = near.around(chunks, budget, (budget / FILE_SHARE).min(FILE_MOST), |i| {
            missing(i) && !state.queue.iter().any(|run| run.contains(&i))
        });
        drop(flights);
        state.trust.guessed(runs.iter().map(|run| near.bytes(run)).sum());
        runs
    }

    /// Puts `runs`, in the order of their urgency, in front of the queue.
    fn ask(self: &Arc<Self>, mut state: MutexGuard<'_, State>, runs: Vec<Range<u32>>) {
        for mut run in runs.into_iter().rev() {
            // What a reader who goes on will want is asked for in the order in which it will.
            if let Some(before) = state.queue.iter().position(|queued| queued.end == run.start) {
                run.start = state.queue.remove(before).map_or(run.start, |before| before.start);
            }
            state.queue.push_front(run);
        }
        state.queue.truncate(MAX_QUEUE);
        if !state.queue.is_empty() && !std::mem::replace(&mut state.running, true) {
            let blob = self.clone();
            self.store.runtime.spawn(async move {
                loop {
                    // First, so that what is sent is the latest guess.
                    let _turn = blob.link.turn().await;
                    let Some(run) = blob.next_guess() else { break };
                    let admitted = blob.admit(Class::ReadAhead, &run).await;
                    blob.store.runtime.spawn(blob.clone().fetch_early(run, admitted));
                }
            });
        }
    }

    fn next_guess(&self) -> Option<Range<u32>> {
        let mut state = self.ahead.state();
        let next = state.queue.pop_front();
        state.running = next.is_some();
        let (mut next, table) = (next?, self.table.get()?);
        let near = self.neighbourhood(table);
        let piece = near.following(next.start, self.link.piece(), false);
        // At least one unit, however large.
        let end = piece.end.max(Places::unit(near.places, next.start).end);
        if end < next.end {
            state.queue.push_front(end..next.end);
            next.end = end;
        }
        Some(next)
    }

    /// Most bytes asked for early because of one chunk; 0: nothing is ever (config `amplify_io`,
    /// `rafs.batch_size`).
    fn amplify(&self) -> u64 {
        self.amplify.load(Ordering::Relaxed)
    }

    /// Most bytes asked for early because of one chunk, as things are.
    fn width(&self) -> u64 {
        self.link.width().min(self.amplify())
    }

    pub(super) fn neighbourhood<'a>(&'a self, table: &'a Table) -> Neighbourhood<'a, ChunkInfos> {
        let blob = usize::from(self.info.index.0);
        let marks = self.files.marks(blob).unwrap_or_default();
        Neighbourhood { places: &table.infos, marks }
    }

    /// Finds out, once, which chunks belong to which kind of file.
    fn learn_files(&self) {
        if self.files.begin() {
            let files = self.files.clone();
            self.store.runtime.spawn_blocking(move || files.find());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn guesses_that_nobody_uses_become_few() {
        let mut trust = Trust::default();
        let mut asked = 0;
        for _ in 0..1000 {
            let share = trust.share(MIB);
            trust.guessed(share);
            asked += share;
        }
        // A thousand misses would be a thousand MiB.
        assert!(asked < 64 * MIB, "{asked}");
        assert!(trust.share(MIB) < MIB / 16, "{}", trust.share(MIB));
        // Used again, it grows again.
        for _ in 0..200 {
            let share = trust.share(MIB);
            trust.guessed(share);
            trust.used += share;
        }
        assert_eq!(trust.share(MIB), MIB);
    }

    #[test]
    fn one_in_three_is_enough() {
        let mut trust = Trust::default();
        for _ in 0..1000 {
            let share = trust.share(MIB);
            assert_eq!(share, MIB);
            trust.guessed(share);
            trust.used += share / 2;
        }
    }

    /// Chunks of 100 KiB; a file begins at each of `files`.
    fn follow_all(files: &[u32], reads: &[u32]) -> Vec<Option<Range<u32>>> {
        struct Even;
        impl Places for Even {
            fn count(&self) -> u32 {
                200
            }
            fn unit(&self, index: u32) -> Range<u32> {
                index..index + 1
            }
            fn stored(&self, index: u32) -> Range<u64> {
                let start = u64::from(index) * 100 * 1024;
                start..start + 100 * 1024
            }
        }
        let mut marks = [1; 200];
        files.iter().for_each(|&first| marks[first as usize] |= 0x80);
        let near = Neighbourhood { places: &Even, marks: &marks };
        let mut state = State::default();
        reads
            .iter()
            .map(|&i| {
                let window = |read: u64| (2 * read).min(12 * 100 * 1024);
                state.follow(&(i..i + 1), window, 3 * 100 * 1024, &near)
            })
            .collect()
    }

    #[test]
    fn a_reader_in_a_file_gets_more_the_more_it_reads_and_not_beyond_its_end() {
        let asked = follow_all(&[0, 15, 16], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let want = [
            Some(1..4), // what may be asked for at first
            Some(4..6), // twice what was read lies ahead
            Some(6..9),
            Some(9..12),
            Some(12..15), // the end of the file
            None,
            None,
            None,
            None,
            None,
        ];
        assert_eq!(asked, want);
    }

    #[test]
    fn a_reader_of_small_files_goes_beyond_them_once_it_takes_them_in_order() {
        let each: Vec<u32> = (0..200).collect();
        let asked = follow_all(&each, &[50, 51, 52, 53, 54, 55]);
        assert_eq!(asked[..3], [None, None, None], "it might be chance");
        assert_eq!(asked[3], Some(54..62), "twice as much as it has read");
        // Jumping about asks for nothing.
        let asked = follow_all(&each, &[50, 20, 90, 21, 3, 91, 22, 130]);
        assert!(asked.iter().all(Option::is_none), "{asked:?}");
    }

    #[test]
    fn a_chunk_is_unread_once() {
        let ahead = Ahead::new(100);
        assert!(!ahead.take_unread(5));
        ahead.came(4..7);
        ahead.came(5..6);
        assert!(ahead.take_unread(5));
        assert!(!ahead.take_unread(5) && !ahead.take_unread(7));
        assert!(ahead.take_unread(4) && ahead.take_unread(6));
        assert_eq!(ahead.unread_count.load(Ordering::Relaxed), 0);
    }
}
