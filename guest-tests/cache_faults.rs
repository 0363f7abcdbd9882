//! The cache when the backend, the disk or another image misbehaves.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod cache_support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cache_support::*;
use rafsd::backend::{Backend, BackendCause, BackendError, LocalFs, LocalFsConfig};
use rafsd::blob::{ChunkData, ChunkFailure, ChunkRef, Store, StoreConfig, StoreError};
use rafsd::rafs::Bootstrap;
use rafsd::rafs::id::BlobId;

fn open(case: &str) -> Bootstrap {
    Bootstrap::open(&golden(case).join("bootstrap")).unwrap()
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// All chunks of blob 0.
fn chunks(image: &Bootstrap) -> Vec<ChunkRef> {
    let mut chunks: Vec<_> = files(image)
        .into_iter()
        .flat_map(|file| file.chunks)
        .filter_map(|(blob, chunk)| (blob == 0).then_some(chunk))
        .collect();
    chunks.sort_by_key(|chunk| chunk.index);
    chunks.dedup();
    chunks
}

#[test]
fn every_waiter_of_a_hung_backend_ends_at_its_own_deadline() {
    let runtime = runtime();
    let image = open("v6-zstd");
    let scripted = Arc::new(Scripted::new("v6-zstd", &image));
    let dir = tempfile::tempdir().unwrap();
    let mut config = StoreConfig::new(dir.path());
    config.stall_timeout = Duration::from_secs(1);
    let store = Store::new(config, runtime.handle().clone()).unwrap();
    let blob = open_blobs(&store, &image, &scripted).remove(0);
    let all = chunks(&image);
    let warm = all[0];
    runtime.block_on(blob.fetch(vec![warm], Instant::now() + PATIENT)).remove(0).unwrap();

    for mode in [Mode::Hang, Mode::HangMidway] {
        scripted.set(mode.clone());
        let start = Instant::now();
        let cold = *all.last().unwrap();
        let waiters: Vec<_> = (0..1000usize)
            .map(|i| {
                let deadline = start + Duration::from_millis(if i % 2 == 0 { 200 } else { 600 });
                let chunk = if i % 3 == 0 { all[1 + i % (all.len() - 1)] } else { cold };
                let wait = blob.fetch(vec![chunk], deadline);
                runtime.spawn(async move {
                    let result = wait.await.remove(0);
                    (deadline, Instant::now(), result)
                })
            })
            .collect();
        // Meanwhile what is verified costs nothing.
        assert!(blob.verified(warm).is_some());
        for waiter in waiters {
            let (deadline, end, result) = runtime.block_on(waiter).unwrap();
            let Err(error) = result else {
                assert!(matches!(mode, Mode::HangMidway), "nothing came, but something is there");
                continue; // its bytes were in the first piece
            };
            assert!(matches!(error.source, ChunkFailure::Timeout { .. }), "{}", chain(&error));
            assert!(end >= deadline, "early by {:?}", deadline - end);
            assert!(end < deadline + PATIENT, "late by {:?}", end - deadline);
        }
        assert!(count(&store.counters().timeouts_total) > 0);
    }
    // And when it answers again, all is well at once.
    scripted.set(Mode::Good);
    let results = runtime.block_on(blob.fetch(all.clone(), Instant::now() + PATIENT));
    assert!(results.iter().all(Result::is_ok));
}

#[test]
fn waiters_are_served_when_the_backend_comes_back_in_time() {
    let runtime = runtime();
    let image = open("v6-zstd");
    for mode in [Mode::Fail, Mode::Short] {
        let scripted = Arc::new(Scripted::new("v6-zstd", &image));
        scripted.set(mode.clone());
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), &runtime);
        let blob = open_blobs(&store, &image, &scripted).remove(0);
        let all = chunks(&image);
        let waiters: Vec<_> = (0..256)
            .map(|i| runtime.spawn(blob.fetch(vec![all[i % all.len()]], Instant::now() + PATIENT)))
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        assert!(blob.ready_chunks().0 == 0);
        scripted.set(Mode::Good);
        for waiter in waiters {
            let result = runtime.block_on(waiter).unwrap().remove(0);
            assert!(matches!(result, Ok(ChunkData::Cached)), "{mode:?}: {result:?}");
        }
        let cause = match mode {
            Mode::Fail => BackendCause::Io,
            _ => BackendCause::ShortRead,
        };
        assert!(store.counters().backend_errors_total(cause) > 0, "{mode:?}");
    }
}

#[test]
fn an_error_names_blob_chunk_backend_attempts_and_cause() {
    let runtime = runtime();
    let image = open("v6-none");
    let scripted = Arc::new(Scripted::new("v6-none", &image));
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &runtime);
    let blob = open_blobs(&store, &image, &scripted).remove(0);
    let chunk = chunks(&image)[1];
    runtime.block_on(blob.fetch(vec![chunks(&image)[0]], Instant::now() + PATIENT));
    scripted.set(Mode::Fail);
    let start = Instant::now();
    let fetch = blob.fetch(vec![chunk], start + Duration::from_secs(3));
    let error = runtime.block_on(fetch).remove(0).unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(150), "given up too soon");
    let line = chain(&error);
    let facts = [
        "chunk 1 of blob 4de91e90",
        "(error ",
        "bytes 5..4101",
        "script",
        "attempts",
        "as scripted",
    ];
    for fact in facts {
        assert!(line.contains(fact), "{fact} in {line}");
    }
    assert!(scripted.requests.lock().unwrap().len() > 3, "no retries");
}

#[test]
fn one_download_for_all_who_want_a_chunk() {
    let runtime = runtime();
    let image = open("v6-batch");
    let mut scripted = Scripted::new("v6-batch", &image);
    scripted.latency = Duration::from_millis(20);
    let scripted = Arc::new(scripted);
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &runtime);
    let blob = open_blobs(&store, &image, &scripted).remove(0);
    let all = chunks(&image);
    let waiters: Vec<_> = (0..400)
        .map(|i| {
            let some = all.iter().copied().cycle().skip(i * 7).take(1 + i % 5).collect();
            runtime.spawn(blob.fetch(some, Instant::now() + PATIENT))
        })
        .collect();
    for waiter in waiters {
        assert!(runtime.block_on(waiter).unwrap().iter().all(Result::is_ok));
    }
    let mut requests: Vec<_> =
        scripted.requests.lock().unwrap().iter().map(|(_, range)| range.clone()).collect();
    requests.sort_by_key(|range| range.start);
    for pair in requests.windows(2) {
        assert!(pair[0].end <= pair[1].start, "fetched twice: {pair:?}");
    }
    assert!(count(&store.counters().joined_fetches_total) > 0);
}

#[test]
fn adjacent_chunks_are_one_request() {
    let runtime = runtime();
    let image = open("v6-zstd");
    let scripted = Arc::new(Scripted::new("v6-zstd", &image));
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &runtime);
    let blob = open_blobs(&store, &image, &scripted).remove(0);
    let all = chunks(&image);
    let results = runtime.block_on(blob.fetch(all.clone(), Instant::now() + PATIENT));
    assert!(results.iter().all(Result::is_ok));
    let requests = scripted.requests.lock().unwrap().len();
    assert!(requests <= 4, "{requests} requests for {} adjacent chunks", all.len());
}

/// A tmpfs that goes away with the test.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(options: &str) -> Tmpfs {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(mount.success(), "these tests run as root");
        Tmpfs(dir)
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let deadline = Instant::now() + PATIENT;
        loop {
            // Busy as long as the task of the last download has not closed its files.
            let mount = Command::new("mount").args(["-o", &options]).arg(self.0.path()).status();
            if mount.unwrap().success() {
                return;
            }
            assert!(Instant::now() < deadline, "{options}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
    }
}

#[test]
fn a_full_disk_costs_the_cache_and_not_the_reader() {
    let runtime = runtime();
    let image = open("v6-zstd");
    let want = expected(&golden("v6-zstd").join("tree.json"));
    // (blocks of 4 KiB, what fits)
    for blocks in [4, 30, 200] {
        let disk = Tmpfs::new(&format!("size={}k", blocks * 4));
        let scripted = Arc::new(Scripted::new("v6-zstd", &image));
        let store = store(disk.0.path(), &runtime);
        let blobs = open_blobs(&store, &image, &scripted);
        let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
        assert_eq!(got, want, "{blocks} blocks");
        assert!(count(&store.counters().cache_write_errors_total) > 0, "{blocks} blocks");
        assert!(count(&store.counters().uncached_chunks_total) > 0, "{blocks} blocks");
        // There is room again: the same daemon goes on caching.
        disk.remount("size=64m");
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap(), want);
        let before = scripted.requests.lock().unwrap().len();
        assert_eq!(runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap(), want);
        assert_eq!(scripted.requests.lock().unwrap().len(), before, "{blocks}: all is cached now");
    }
}

#[test]
fn a_read_only_cache_is_used_for_what_it_holds() {
    let runtime = runtime();
    let image = open("v6-zstd");
    let want = expected(&golden("v6-zstd").join("tree.json"));
    let disk = Tmpfs::new("size=64m");
    let scripted = Arc::new(Scripted::new("v6-zstd", &image));
    let all = chunks(&image);
    {
        let store = store(disk.0.path(), &runtime);
        let blob = open_blobs(&store, &image, &scripted).remove(0);
        let half = all[..all.len() / 2].to_vec();
        let results = runtime.block_on(blob.fetch(half, Instant::now() + PATIENT));
        assert!(results.iter().all(Result::is_ok));
    }
    disk.remount("ro");
    scripted.requests.lock().unwrap().clear();
    let store = store(disk.0.path(), &runtime);
    let blobs = open_blobs(&store, &image, &scripted);
    let results = runtime.block_on(blobs[0].fetch(all.clone(), Instant::now() + PATIENT));
    for (i, result) in results.iter().enumerate() {
        match result {
            Ok(ChunkData::Cached) => assert!(i < all.len() / 2, "chunk {i}"),
            Ok(ChunkData::Memory(_)) => assert!(i >= all.len() / 2, "chunk {i}"),
            Err(e) => panic!("chunk {i}: {}", chain(e)),
        }
    }
    assert_eq!(runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap(), want);
    disk.remount("rw");

    // No directory at all, and no room for one.
    let empty = Tmpfs::new("size=64m");
    empty.remount("ro");
    let store = Store::new(StoreConfig::new(empty.0.path()), runtime.handle().clone()).unwrap();
    let blobs = open_blobs(&store, &image, &scripted);
    assert_eq!(runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap(), want);
}

#[test]
fn traps_in_the_cache_directory() {
    let runtime = runtime();
    let image = open("v6-none");
    let want = expected(&golden("v6-none").join("tree.json"));
    let id = image.blobs()[0].id;
    let scripted = Arc::new(Scripted::new("v6-none", &image));
    let victim = tempfile::tempdir().unwrap();
    let precious = victim.path().join("precious");
    type Trap = fn(&Path, &Path);
    let traps: [(&str, Trap); 6] = [
        ("symlink", |at, precious| symlink(precious, at).unwrap()),
        ("dangling symlink", |at, precious| symlink(precious.with_extension("new"), at).unwrap()),
        ("hard link", |at, precious| fs::hard_link(precious, at).unwrap()),
        ("fifo", |at, _| {
            assert!(Command::new("mkfifo").arg(at).status().unwrap().success());
        }),
        ("writable for all", |at, _| {
            fs::write(at, b"x").unwrap();
            fs::set_permissions(at, PermissionsExt::from_mode(0o666)).unwrap();
        }),
        ("another user's", |at, _| {
            fs::write(at, b"x").unwrap();
            std::os::unix::fs::chown(at, Some(12345), None).unwrap();
        }),
    ];
    for (what, trap) in traps {
        for suffix in ["", "chunk_map", "blob.meta", "layer.disk.tmp", "chunk_map.tmp"] {
            fs::write(&precious, b"precious").unwrap();
            let dir = tempfile::tempdir().unwrap();
            let files = dir.path().join("rafsd");
            fs::create_dir(&files).unwrap();
            fs::set_permissions(&files, PermissionsExt::from_mode(0o700)).unwrap();
            let at = match suffix {
                "" => dir.path().join(format!("{id}.layer.disk")),
                _ => files.join(format!("{id}.{suffix}")),
            };
            trap(&at, &precious);
            let store = store(dir.path(), &runtime);
            let blobs = open_blobs(&store, &image, &scripted);
            let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
            assert_eq!(got, want, "{what} at {suffix}");
            assert_eq!(fs::read(&precious).unwrap(), b"precious", "{what} at {suffix}");
            assert!(!victim.path().join("precious.new").exists(), "{what} at {suffix}");
        }
    }
}

/// As nydus-snapshotter does when no image needs a blob any more.
#[test]
fn who_removes_a_data_file_frees_its_space_and_harms_nobody() {
    let runtime = runtime();
    // Its context table is saved: with batches the bootstrap does not tell it.
    let image = open("v6-batch");
    let want = expected(&golden("v6-batch").join("tree.json"));
    let id = image.blobs()[0].id;
    let scripted = Arc::new(Scripted::new("v6-batch", &image));
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join(format!("{id}.layer.disk"));
    let companions = [".chunk_map", ".blob.meta"];
    let companions =
        companions.map(|suffix| dir.path().join("rafsd").join(format!("{id}{suffix}")));
    let age = |path: &Path| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(7200)).unwrap();
    };
    let before = store(dir.path(), &runtime);
    let old = open_blobs(&before, &image, &scripted);
    let read = |blobs| runtime.block_on(read_tree(&image, blobs, PATIENT)).unwrap();
    assert_eq!(read(&old), want);

    // While the data file is there, everything stays.
    companions.iter().for_each(|path| age(path));
    drop(store(dir.path(), &runtime));
    assert!(companions.iter().all(|path| path.exists()));

    // Who has it open goes on; the next one starts anew, at once.
    fs::remove_file(&data).unwrap();
    assert_eq!(read(&old), want);
    companions.iter().for_each(|path| {
        fs::File::open(path).unwrap().set_modified(std::time::SystemTime::now()).unwrap()
    });
    let after = store(dir.path(), &runtime);
    assert!(
        companions.iter().all(|path| path.exists()),
        "somebody may be about to make the data file"
    );
    let new = open_blobs(&after, &image, &scripted);
    assert_eq!(read(&new), want);
    assert_eq!(count(&after.counters().cache_hits_total), 0);
    assert!(data.exists());

    // What is left of it goes with the next start.
    fs::remove_file(&data).unwrap();
    companions.iter().for_each(|path| age(path));
    drop(store(dir.path(), &runtime));
    assert!(!companions.iter().any(|path| path.exists()));
}

#[test]
fn a_directory_that_others_can_change_is_refused() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("rafsd");
    let open = || Store::new(StoreConfig::new(dir.path()), runtime.handle().clone());
    symlink("/tmp", &files).unwrap();
    assert!(matches!(open(), Err(StoreError::UnsafeCacheDir { .. })), "symlink");
    fs::remove_file(&files).unwrap();
    fs::create_dir(&files).unwrap();
    fs::set_permissions(&files, PermissionsExt::from_mode(0o777)).unwrap();
    assert!(matches!(open(), Err(StoreError::UnsafeCacheDir { .. })), "writable for all");
    fs::set_permissions(&files, PermissionsExt::from_mode(0o700)).unwrap();
    assert!(open().is_ok());
    std::os::unix::fs::chown(&files, Some(12345), None).unwrap();
    assert!(matches!(open(), Err(StoreError::UnsafeCacheDir { .. })), "another user's");
}

/// An image that claims other contents for the same chunks of the same blob, and a source that
/// agrees with it.
fn forged(case: &str) -> (Bootstrap, Scripted) {
    let path = golden(case).join("bootstrap");
    let image = Bootstrap::open(&path).unwrap();
    let mut scripted = Scripted::new(case, &image);
    let blob = image.blobs()[0].clone();
    let mut bytes = scripted.blobs[&blob.id].to_vec();
    let mut bootstrap = fs::read(&path).unwrap();
    let at = usize::try_from(image.chunk_table_offset()).unwrap();
    for (i, record) in image.chunk_records().iter().enumerate() {
        let start = usize::try_from(record.compressed_offset.get()).unwrap();
        let chunk =
            &mut bytes[start..start + usize::try_from(record.compressed_size.get()).unwrap()];
        chunk[0] ^= 0xFF;
        let digest = blob.digester.digest(chunk);
        bootstrap[at + i * 80..at + i * 80 + 32].copy_from_slice(&digest);
    }
    scripted.blobs.insert(blob.id, bytes.into());
    (Bootstrap::from_bytes(bootstrap).unwrap(), scripted)
}

#[test]
fn an_image_that_lies_about_a_blob_cannot_change_what_others_read() {
    let runtime = runtime();
    let honest = open("v6-none");
    let want = expected(&golden("v6-none").join("tree.json"));
    let (liar, forged) = forged("v6-none");
    let (good, forged) = (Arc::new(Scripted::new("v6-none", &honest)), Arc::new(forged));
    for liar_first in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (store(dir.path(), &runtime), store(dir.path(), &runtime));
        let mine = open_blobs(&ours, &honest, &good);
        let lies = open_blobs(&theirs, &liar, &forged);
        let read_honest = || runtime.block_on(read_tree(&honest, &mine, PATIENT)).unwrap();
        let read_liar = || runtime.block_on(read_tree(&liar, &lies, PATIENT)).unwrap();
        let lie = if liar_first {
            read_liar()
        } else {
            assert_eq!(read_honest(), want);
            read_liar()
        };
        assert_ne!(lie, want, "the liar reads what it asked for");
        assert_eq!(read_honest(), want);
        assert_eq!(read_liar(), lie);
        assert_eq!(read_honest(), want, "after both have read");
        let after = store(dir.path(), &runtime);
        let again = open_blobs(&after, &honest, &good);
        assert_eq!(runtime.block_on(read_tree(&honest, &again, PATIENT)).unwrap(), want);
    }
}

/// A bootstrap whose chunk table says that chunks end a byte earlier than they do.
#[test]
fn a_chunk_table_that_is_wrong_about_places_is_made_up_for_by_the_blob() {
    let runtime = runtime();
    for case in ["v6-none", "v6-zstd"] {
        let path = golden(case).join("bootstrap");
        let want = expected(&golden(case).join("tree.json"));
        let right = Bootstrap::open(&path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let at = usize::try_from(right.chunk_table_offset()).unwrap();
        for (i, record) in right.chunk_records().iter().enumerate() {
            if record.compressed_size.get() > 1 {
                let size = at + i * 80 + 40;
                let less = record.compressed_size.get() - 1;
                bytes[size..size + 4].copy_from_slice(&less.to_le_bytes());
            }
        }
        let image = Bootstrap::from_bytes(bytes).unwrap();
        let scripted = Arc::new(Scripted::new(case, &image));
        let dir = tempfile::tempdir().unwrap();
        for round in 0..2 {
            let store = store(dir.path(), &runtime);
            let blobs = open_blobs(&store, &image, &scripted);
            let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
            assert_eq!(got, want, "{case}, round {round}");
            assert_eq!(count(&store.counters().cache_hits_total) > 0, round == 1, "{case}");
        }
        // A source that lies finds no better place, and is not believed.
        let data_end = image.blobs()[0].data_end;
        scripted.set(Mode::Flip(data_end - 1));
        let dir = tempfile::tempdir().unwrap();
        let blobs = open_blobs(&store(dir.path(), &runtime), &image, &scripted);
        let error = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap_err();
        let source = &error.source;
        assert!(
            matches!(source, ChunkFailure::DigestMismatch { .. } | ChunkFailure::Codec { .. }),
            "{}",
            chain(&error)
        );
    }
}

#[test]
fn an_image_without_digests_is_not_shared_and_says_what_it_has() {
    let runtime = runtime();
    for (case, source) in [
        ("v6-none", rafsd::blob::DigestSource::Nothing),
        ("v6-batch", rafsd::blob::DigestSource::Crc32c),
        ("v6-oci-packed", rafsd::blob::DigestSource::BlobDigest),
    ] {
        let mut bytes = fs::read(golden(case).join("bootstrap")).unwrap();
        bytes[1152 + 32..1152 + 40].fill(0); // chunk_table_size
        let image = Bootstrap::from_bytes(bytes).unwrap();
        let want = expected(&golden(case).join("tree.json"));
        let scripted = Arc::new(Scripted::new(case, &image));
        let dir = tempfile::tempdir().unwrap();
        for round in 0..2 {
            let store = store(dir.path(), &runtime);
            let blobs = open_blobs(&store, &image, &scripted);
            let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
            assert_eq!(got, want, "{case}");
            assert_eq!(blobs[0].digest_source(), Some(source), "{case}");
            let hits = count(&store.counters().cache_hits_total);
            let shared = source == rafsd::blob::DigestSource::BlobDigest;
            assert_eq!(hits > 0, shared && round == 1, "{case}, round {round}");
        }
        let data = dir.path().join(format!("{}.layer.disk", image.blobs()[0].id));
        assert_eq!(data.exists(), source == rafsd::blob::DigestSource::BlobDigest, "{case}");
    }
}

#[test]
fn local_blobs_are_looked_up_in_order_and_errors_name_the_path() {
    let runtime = runtime();
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let id = BlobId::from_sha256([7; 32]);
    let config = LocalFsConfig {
        blob_file: None,
        dir: Some(first.path().into()),
        alt_dirs: vec![second.path().into()],
    };
    let backend = LocalFs::new(config.clone(), runtime.handle().clone());
    let error = runtime.block_on(backend.size(&id)).unwrap_err();
    assert!(matches!(error, BackendError::NotFound { .. }) && !error.retryable(), "{error}");
    fs::write(second.path().join(id.as_str()), b"0123456789").unwrap();
    assert_eq!(runtime.block_on(backend.size(&id)).unwrap(), 10);
    let error = runtime.block_on(backend.read(&id, 5..11)).err().unwrap();
    assert!(error.to_string().contains(second.path().to_str().unwrap()), "{error}");
    fs::write(first.path().join(id.as_str()), b"abc").unwrap();
    let fresh = LocalFs::new(config.clone(), runtime.handle().clone());
    assert_eq!(runtime.block_on(fresh.size(&id)).unwrap(), 3, "dir comes before alt_dirs");
    let file = second.path().join(id.as_str());
    let config = LocalFsConfig { blob_file: Some(file), ..config };
    let backend = LocalFs::new(config, runtime.handle().clone());
    assert_eq!(runtime.block_on(backend.size(&BlobId::UNKNOWN)).unwrap(), 10, "whatever the id");
}

#[test]
fn a_directory_that_hangs_leaves_the_blocking_pool_to_others() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(rafsd::backend::localfs::MAX_THREADS + 2)
        .enable_all()
        .build()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<_> = (0..40).map(|i| BlobId::from_sha256([i; 32])).collect();
    for id in &ids {
        // Opening a FIFO for reading waits for a writer: a file system that does not answer.
        let status = Command::new("mkfifo").arg(dir.path().join(id.as_str())).status();
        assert!(status.unwrap().success());
    }
    let config = LocalFsConfig { dir: Some(dir.path().into()), ..LocalFsConfig::default() };
    let backend = Arc::new(LocalFs::new(config, runtime.handle().clone()));
    let sizes: Vec<_> = ids
        .iter()
        .map(|&id| {
            let backend = backend.clone();
            runtime.spawn(async move { backend.size(&id).await })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let other = runtime.block_on(async {
        let work = tokio::task::spawn_blocking(|| 7);
        tokio::time::timeout(PATIENT, work).await
    });
    assert_eq!(other.expect("the pool is stuck").unwrap(), 7);
    assert!(sizes.iter().all(|size| !size.is_finished()));
    // It answers again: every read goes on.
    let opened: Vec<_> = ids
        .iter()
        .map(|id| {
            fs::File::options().read(true).write(true).open(dir.path().join(id.as_str())).unwrap()
        })
        .collect();
    for size in sizes {
        runtime.block_on(size).unwrap().unwrap();
    }
    drop(opened);
}
