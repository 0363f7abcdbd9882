//! Several processes on one cache directory: this program runs itself as the others.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod cache_support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cache_support::*;
use futures_util::future::BoxFuture;
use rafsd::backend::{Backend, BackendError, ByteStream};
use rafsd::rafs::Bootstrap;
use rafsd::rafs::id::BlobId;

/// What the child is to do: `read`, `hang` or `loop`. Not set in the parent.
const ROLE: &str = "CACHE_TEST_ROLE";
const CACHE: &str = "CACHE_TEST_DIR";
const CASE: &str = "CACHE_TEST_CASE";

/// A backend that notes each request in a file all processes share.
struct Counted {
    inner: Scripted,
    log: PathBuf,
}

impl Backend for Counted {
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>> {
        let mut log = fs::File::options().append(true).create(true).open(&self.log).unwrap();
        let line = format!("{blob} {} {}\n", range.start, range.end);
        log.write_all(line.as_bytes()).unwrap();
        self.inner.read(blob, range)
    }

    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>> {
        self.inner.size(blob)
    }

    fn name(&self) -> &str {
        "counted"
    }
}

fn log_of(cache: &Path) -> PathBuf {
    cache.join("requests")
}

/// The requests so far, by blob, in the order of their offsets.
fn requests(cache: &Path) -> BTreeMap<String, Vec<Range<u64>>> {
    let mut out: BTreeMap<String, Vec<Range<u64>>> = BTreeMap::new();
    for line in fs::read_to_string(log_of(cache)).unwrap_or_default().lines() {
        let mut words = line.split(' ');
        let blob = words.next().unwrap().to_owned();
        let mut number = || words.next().unwrap().parse().unwrap();
        out.entry(blob).or_default().push(number()..number());
    }
    out.values_mut().for_each(|ranges| ranges.sort_by_key(|range| (range.start, range.end)));
    out
}

/// Not a test: what the other processes run.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let cache = PathBuf::from(std::env::var(CACHE).unwrap());
    let case = std::env::var(CASE).unwrap();
    let image = Bootstrap::open(&golden(&case).join("bootstrap")).unwrap();
    let want = expected(&golden(&case).join("tree.json"));
    let mut inner = Scripted::new(&case, &image);
    inner.latency = Duration::from_millis(2);
    if role == "hang" {
        inner.latency = Duration::from_secs(3600);
    }
    let backend = Arc::new(Counted { inner, log: log_of(&cache) });
    let runtime = runtime();
    loop {
        let store = store(&cache, &runtime);
        let blobs = open_blobs(&store, &image, &backend);
        let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
        if got != want {
            fs::write(cache.join("wrong"), format!("{got:?}")).unwrap();
            std::process::exit(3);
        }
        let uncached = store.counters().uncached_chunks_total.load(Ordering::Relaxed);
        assert_eq!(uncached, 0, "everything could be cached");
        if role != "loop" {
            return;
        }
    }
}

fn spawn(role: &str, case: &str, cache: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(CACHE, cache)
        .env(CASE, case)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn processes_that_start_one_image_together_fetch_each_byte_once() {
    for case in ["v6-zstd", "v6-batch", "v6-merged", "v6-none"] {
        let dir = tempfile::tempdir().unwrap();
        let children: Vec<_> = (0..6).map(|_| spawn("read", case, dir.path())).collect();
        for mut child in children {
            assert!(child.wait().unwrap().success(), "{case}");
        }
        let image = Bootstrap::open(&golden(case).join("bootstrap")).unwrap();
        let requests = requests(dir.path());
        for blob in image.blobs() {
            let Some(ranges) = requests.get(blob.id.as_str()) else { continue };
            for pair in ranges.windows(2) {
                assert!(
                    pair[0].end <= pair[1].start,
                    "{case}: {pair:?} fetched twice, the table is at {}",
                    blob.ci_offset
                );
            }
        }
        assert!(!requests.is_empty(), "{case}");
    }
}

#[test]
fn the_claims_of_a_killed_process_are_free() {
    let dir = tempfile::tempdir().unwrap();
    // The table is there, so that the claims are on chunks.
    let image = Bootstrap::open(&golden("v6-zstd").join("bootstrap")).unwrap();
    let runtime = runtime();
    let scripted = Arc::new(Scripted::new("v6-zstd", &image));
    let warm = store(dir.path(), &runtime);
    let blob = open_blobs(&warm, &image, &scripted).remove(0);
    let (_, first) = files(&image).iter().find_map(|f| f.chunks.last().copied()).unwrap();
    runtime.block_on(blob.fetch(vec![first], Instant::now() + PATIENT)).remove(0).unwrap();

    let mut owner = spawn("hang", "v6-zstd", dir.path());
    wait_until("the owner never asked", || !requests(dir.path()).is_empty());
    let mut waiter = spawn("read", "v6-zstd", dir.path());
    std::thread::sleep(Duration::from_millis(700));
    assert!(waiter.try_wait().unwrap().is_none(), "it waits for the owner");
    let before = requests(dir.path());
    let claimed = before.values().next().unwrap()[0].clone();
    assert_eq!(before.values().flatten().count(), 1, "it asked for what the owner has claimed");
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert!(waiter.wait().unwrap().success());
    let twice = requests(dir.path()).values().flatten().filter(|range| **range == claimed).count();
    assert_eq!(twice, 2, "the heir fetches what the owner did not");
}

#[test]
fn kill_at_any_time_and_never_a_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("rafsd");
    for round in 0u64..30 {
        let mut children: Vec<_> = (0..2).map(|_| spawn("loop", "v6-batch", dir.path())).collect();
        // A time that differs from round to round and covers start, download and verification.
        std::thread::sleep(Duration::from_millis(round * 37 % 140));
        for child in &mut children {
            assert!(
                child.try_wait().unwrap().is_none_or(|status| status.success()),
                "round {round}"
            );
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(!dir.path().join("wrong").exists(), "round {round}");
        // Every few rounds from nothing, else from what the killed left.
        if round % 5 == 4 {
            fs::remove_dir_all(&files).unwrap();
        }
        if round % 5 == 2 {
            // What the snapshotter removes.
            for entry in fs::read_dir(dir.path()).unwrap().flatten() {
                if entry.file_name().to_string_lossy().ends_with(".layer.disk") {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
        }
    }
    assert!(spawn("read", "v6-batch", dir.path()).wait().unwrap().success());
}
