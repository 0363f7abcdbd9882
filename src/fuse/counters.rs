//! What guests asked of each mount, how it ended and how long it took.
//!
//! Counting must cost nothing that a request would notice. Each queue's thread has numbers of its own,
//! which only it writes and anyone may read, so there is no locked instruction and no cache line that
//! two threads write. Requests that were answered at once are timed in samples: the first 16 of a kind
//! on a queue, then each 16th, which stands for 16; those that had to wait are timed each.
//! `daemon::metrics` renders it all.

use std::array;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::abi::opcode;
use super::file_stats::FileStats;

/// Opcodes that are counted apart; larger ones count as 0, which is none.
pub const OPCODES: usize = 64;
/// Queues that have numbers of their own: one for urgent requests and 64 others.
const LANES: usize = 65;
/// Of so many requests that are answered at once, one is timed.
const SAMPLE: u64 = 16;

/// Upper bounds, in bytes and exclusive, of the sizes by which reads are counted.
const READ_SIZES: [u64; 7] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];
/// Upper bounds, in microseconds and inclusive, of the times by which reads are counted.
const READ_TIMES: [u64; 7] = [200, 1000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000];
/// Upper bounds, in microseconds and inclusive, of the histograms of all opcodes.
pub const TIMES: [u64; 14] =
    [2, 5, 10, 25, 50, 100, 250, 1000, 5000, 25_000, 100_000, 500_000, 2_500_000, 10_000_000];

thread_local! {
    /// The queue whose thread this is.
    static LANE: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Says that the calling thread serves queue `queue`, and is the only one that does. Counting works
/// without, at the price of locked instructions.
pub fn serve_queue(queue: usize) {
    LANE.set(queue);
}

/// Numbers that one thread writes.
#[repr(align(128))]
struct Lane {
    requests: [AtomicU64; OPCODES],
    read_bytes: AtomicU64,
    read_sizes: [AtomicU64; READ_SIZES.len() + 1],
}

impl Lane {
    fn new() -> Lane {
        Lane { requests: zeros(), read_bytes: AtomicU64::new(0), read_sizes: zeros() }
    }
}

/// The numbers of one mount.
pub(super) struct OpCounters {
    /// What was done with each file, if that is recorded.
    pub(super) files: Option<Arc<FileStats>>,
    lanes: [OnceLock<Box<Lane>>; LANES],
    /// For threads that serve no queue of their own.
    shared: Lane,
    errors: [AtomicU64; OPCODES],
    /// Microseconds.
    time: [AtomicU64; OPCODES],
    read_times: [AtomicU64; READ_TIMES.len() + 1],
    waited_reads: AtomicU64,
}

/// How long requests of each kind took, over all mounts.
pub(super) struct OpTimes([Histogram; OPCODES]);

struct Histogram {
    counts: [AtomicU64; TIMES.len() + 1],
    /// Microseconds.
    sum: AtomicU64,
}

/// Times of the requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    pub opcode: usize,
    /// Requests up to each of [`TIMES`], and above the last; not cumulated.
    pub counts: [u64; TIMES.len() + 1],
    pub sum: Duration,
}

/// What was counted on a mount, or on all of them. Arrays by opcode have [`OPCODES`] elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpTotals {
    pub requests: [u64; OPCODES],
    /// Of these, answered with an errno; "never ask again" is none.
    pub errors: [u64; OPCODES],
    /// Microseconds that they took, estimated from samples.
    pub time_us: [u64; OPCODES],
    pub read_bytes: u64,
    /// Reads of less than 1, 4, 16, 64, 128, 512, 1024 KiB, and longer ones.
    pub read_sizes: [u64; 8],
    /// Reads that took at most 0.2, 1, 20, 50, 500, 1000, 2000 ms, and longer ones; estimated.
    pub read_times: [u64; 8],
    /// Reads that had to wait for something.
    pub waited_reads: u64,
}

impl Default for OpTotals {
    fn default() -> Self {
        OpTotals {
            requests: [0; OPCODES],
            errors: [0; OPCODES],
            time_us: [0; OPCODES],
            read_bytes: 0,
            read_sizes: [0; 8],
            read_times: [0; 8],
            waited_reads: 0,
        }
    }
}

impl OpTotals {
    /// Adds what `other` counted.
    pub fn add(&mut self, other: &OpTotals) {
        for (sum, more) in self.requests.iter_mut().zip(other.requests) {
            *sum += more;
        }
        for (sum, more) in self.errors.iter_mut().zip(other.errors) {
            *sum += more;
        }
        for (sum, more) in self.time_us.iter_mut().zip(other.time_us) {
            *sum += more;
        }
        for (sum, more) in self.read_sizes.iter_mut().zip(other.read_sizes) {
            *sum += more;
        }
        for (sum, more) in self.read_times.iter_mut().zip(other.read_times) {
            *sum += more;
        }
        self.read_bytes += other.read_bytes;
        self.waited_reads += other.waited_reads;
    }
}

/// A request that is being served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    opcode: usize,
    /// Since when, and for how many requests it stands, if it is timed.
    timed: Option<(Instant, u64)>,
}

impl OpCounters {
    pub(super) fn new(files: Option<Arc<FileStats>>) -> OpCounters {
        OpCounters {
            files,
            lanes: array::from_fn(|_| OnceLock::new()),
            shared: Lane::new(),
            errors: zeros(),
            time: zeros(),
            read_times: zeros(),
            waited_reads: AtomicU64::new(0),
        }
    }

    /// Counts a request that has come. `since` is when it came, if it has waited since then: then it
    /// was counted.
    pub(super) fn begin(&self, opcode: u32, since: Option<Instant>) -> Begun {
        let opcode = usize::try_from(opcode).ok().filter(|&op| op < OPCODES).unwrap_or(0);
        if let Some(since) = since {
            return Begun { opcode, timed: Some((since, 1)) };
        }
        let before = self.bump(|lane| &lane.requests[opcode], 1);
        let timed = match before {
            0..SAMPLE => Some((Instant::now(), 1)),
            _ if before.is_multiple_of(SAMPLE) => Some((Instant::now(), SAMPLE)),
            _ => None,
        };
        Begun { opcode, timed }
    }

    /// A request has been answered, with `errno` (0 if it worked) and so many bytes behind the
    /// answer's header.
    pub(super) fn end(&self, begun: Begun, errno: i32, bytes: u32, times: &OpTimes) {
        let Begun { opcode, timed } = begun;
        if errno != 0 && errno != libc::ENOSYS {
            self.errors[opcode].fetch_add(1, Ordering::Relaxed);
        }
        if opcode == READ && errno == 0 {
            let bytes = u64::from(bytes);
            self.bump(|lane| &lane.read_bytes, bytes);
            self.bump(|lane| &lane.read_sizes[read_size_class(bytes)], 1);
        }
        if let Some((since, weight)) = timed {
            let us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX >> 8);
            self.time[opcode].fetch_add(us * weight, Ordering::Relaxed);
            if opcode == READ {
                self.read_times[class(&READ_TIMES, us)].fetch_add(weight, Ordering::Relaxed);
            }
            times.add(opcode, us, weight);
        }
    }

    /// A request waits for something; returns since when it is under way. Called once for a request.
    pub(super) fn wait(&self, begun: Begun) -> Instant {
        if begun.opcode == READ {
            self.waited_reads.fetch_add(1, Ordering::Relaxed);
        }
        begun.timed.map_or_else(Instant::now, |(since, _)| since)
    }

    /// Adds to a number of the calling thread; returns what it was.
    fn bump(&self, number: impl Fn(&Lane) -> &AtomicU64, by: u64) -> u64 {
        match self.lanes.get(LANE.get()) {
            Some(lane) => {
                let number = number(lane.get_or_init(|| Box::new(Lane::new())));
                // Nobody else writes it.
                let before = number.load(Ordering::Relaxed);
                number.store(before.wrapping_add(by), Ordering::Relaxed);
                before
            }
            None => number(&self.shared).fetch_add(by, Ordering::Relaxed),
        }
    }

    pub(super) fn totals(&self) -> OpTotals {
        let mut totals = OpTotals {
            errors: values(&self.errors),
            time_us: values(&self.time),
            read_times: values(&self.read_times),
            waited_reads: self.waited_reads.load(Ordering::Relaxed),
            ..OpTotals::default()
        };
        let lanes = self.lanes.iter().filter_map(|lane| lane.get().map(|lane| &**lane));
        for lane in lanes.chain([&self.shared]) {
            totals.add(&OpTotals {
                requests: values(&lane.requests),
                read_bytes: lane.read_bytes.load(Ordering::Relaxed),
                read_sizes: values(&lane.read_sizes),
                ..OpTotals::default()
            });
        }
        totals
    }
}

impl OpTimes {
    pub(super) fn new() -> OpTimes {
        OpTimes(array::from_fn(|_| Histogram { counts: zeros(), sum: AtomicU64::new(0) }))
    }

    fn add(&self, opcode: usize, us: u64, weight: u64) {
        let Histogram { counts, sum } = &self.0[opcode];
        counts[class(&TIMES, us)].fetch_add(weight, Ordering::Relaxed);
        sum.fetch_add(us * weight, Ordering::Relaxed);
    }

    /// Of all kinds of requests that there were.
    pub(super) fn totals(&self) -> Vec<Times> {
        let times = self.0.iter().enumerate().map(|(opcode, Histogram { counts, sum })| Times {
            opcode,
            counts: values(counts),
            sum: Duration::from_micros(sum.load(Ordering::Relaxed)),
        });
        times.filter(|times| times.counts.iter().any(|&count| count > 0)).collect()
    }
}

const READ: usize = opcode::READ as usize;

/// Which of the eight sizes a read of so many bytes has.
pub(super) fn read_size_class(bytes: u64) -> usize {
    class(&READ_SIZES, bytes + 1)
}

/// The first of `bounds` that is not below `value`, or one behind the last.
fn class(bounds: &[u64], value: u64) -> usize {
    bounds.iter().position(|&bound| value <= bound).unwrap_or(bounds.len())
}

fn zeros<const N: usize>() -> [AtomicU64; N] {
    array::from_fn(|_| AtomicU64::new(0))
}

fn values<const N: usize>(numbers: &[AtomicU64; N]) -> [u64; N] {
    array::from_fn(|i| numbers[i].load(Ordering::Relaxed))
}

/// What an opcode is called in metrics.
pub fn opcode_name(number: usize) -> &'static str {
    const NAMES: [(u32, &str); 45] = [
        (opcode::LOOKUP, "lookup"),
        (opcode::FORGET, "forget"),
        (opcode::GETATTR, "getattr"),
        (opcode::SETATTR, "setattr"),
        (opcode::READLINK, "readlink"),
        (opcode::SYMLINK, "symlink"),
        (opcode::MKNOD, "mknod"),
        (opcode::MKDIR, "mkdir"),
        (opcode::UNLINK, "unlink"),
        (opcode::RMDIR, "rmdir"),
        (opcode::RENAME, "rename"),
        (opcode::LINK, "link"),
        (opcode::OPEN, "open"),
        (opcode::READ, "read"),
        (opcode::WRITE, "write"),
        (opcode::STATFS, "statfs"),
        (opcode::RELEASE, "release"),
        (opcode::FSYNC, "fsync"),
        (opcode::SETXATTR, "setxattr"),
        (opcode::GETXATTR, "getxattr"),
        (opcode::LISTXATTR, "listxattr"),
        (opcode::REMOVEXATTR, "removexattr"),
        (opcode::FLUSH, "flush"),
        (opcode::INIT, "init"),
        (opcode::OPENDIR, "opendir"),
        (opcode::READDIR, "readdir"),
        (opcode::RELEASEDIR, "releasedir"),
        (opcode::FSYNCDIR, "fsyncdir"),
        (opcode::ACCESS, "access"),
        (opcode::CREATE, "create"),
        (opcode::INTERRUPT, "interrupt"),
        (opcode::DESTROY, "destroy"),
        (opcode::NOTIFY_REPLY, "notify_reply"),
        (opcode::BATCH_FORGET, "batch_forget"),
        (opcode::FALLOCATE, "fallocate"),
        (opcode::READDIRPLUS, "readdirplus"),
        (opcode::RENAME2, "rename2"),
        (opcode::LSEEK, "lseek"),
        (opcode::COPY_FILE_RANGE, "copy_file_range"),
        (opcode::SETUPMAPPING, "setupmapping"),
        (opcode::REMOVEMAPPING, "removemapping"),
        (opcode::SYNCFS, "syncfs"),
        (opcode::TMPFILE, "tmpfile"),
        (opcode::STATX, "statx"),
        (opcode::COPY_FILE_RANGE_64, "copy_file_range_64"),
    ];
    let name = NAMES.iter().find(|(op, _)| usize::try_from(*op) == Ok(number));
    name.map_or("other", |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(counters: &OpCounters, times: &OpTimes, opcode: u32, errno: i32, bytes: u32) {
        counters.end(counters.begin(opcode, None), errno, bytes, times);
    }

    #[test]
    fn every_request_is_counted_on_any_number_of_threads() {
        let (counters, times) = (OpCounters::new(None), OpTimes::new());
        std::thread::scope(|scope| {
            for queue in 0..4 {
                let (counters, times) = (&counters, &times);
                scope.spawn(move || {
                    // Two of them have no queue of their own.
                    if queue < 2 {
                        serve_queue(queue);
                    }
                    for _ in 0..10_000 {
                        serve(counters, times, opcode::GETATTR, 0, 104);
                    }
                    serve(counters, times, opcode::READ, libc::EIO, 0);
                    serve(counters, times, opcode::OPEN, libc::ENOSYS, 0);
                    serve(counters, times, 4711, 0, 0);
                });
            }
        });
        let totals = counters.totals();
        assert_eq!(totals.requests[3], 40_000);
        assert_eq!((totals.requests[15], totals.errors[15], totals.errors[14]), (4, 4, 0));
        assert_eq!((totals.requests[0], totals.read_bytes), (4, 0));
        let timed = times.totals();
        let getattr = timed.iter().find(|times| times.opcode == 3).unwrap();
        let counted: u64 = getattr.counts.iter().sum();
        assert!((39_900..=40_100).contains(&counted), "{counted}");
    }

    #[test]
    fn reads_are_counted_by_size_and_time() {
        let (counters, times) = (OpCounters::new(None), OpTimes::new());
        for bytes in [0, 1023, 1024, 4096, 65_535, 131_072, 524_287, 524_288, 1 << 20] {
            serve(&counters, &times, opcode::READ, 0, bytes);
        }
        let begun = counters.begin(opcode::READ, None);
        let since = counters.wait(begun);
        let before = since.checked_sub(Duration::from_millis(30)).unwrap();
        counters.end(counters.begin(opcode::READ, Some(before)), 0, 1, &times);
        let totals = counters.totals();
        assert_eq!(totals.read_sizes, [3, 1, 1, 1, 0, 2, 1, 1]);
        assert_eq!((totals.requests[15], totals.waited_reads), (10, 1));
        assert_eq!(totals.read_times.iter().sum::<u64>(), 10);
        assert!(totals.read_times[2..].iter().sum::<u64>() >= 1, "{totals:?}");
        assert!(totals.time_us[15] >= 30_000);
    }

    #[test]
    fn opcodes_have_names() {
        assert_eq!(opcode_name(15), "read");
        assert_eq!(opcode_name(0), "other");
        assert_eq!(opcode_name(63), "other");
    }
}
