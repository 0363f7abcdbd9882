//! Whole images through the cache: right the first time, from the cache, and with any byte wrong.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod cache_support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cache_support::*;
use rafsd::blob::{ChunkFailure, DigestSource};
use rafsd::rafs::Bootstrap;

fn open(case: &str) -> (Bootstrap, BTreeMap<String, String>) {
    let image = Bootstrap::open(&golden(case).join("bootstrap")).unwrap();
    (image, expected(&golden(case).join("tree.json")))
}

#[test]
fn every_golden_image_reads_right_cold_and_from_the_cache() {
    let runtime = runtime();
    for (case, bootstrap, tree) in READABLE {
        let image = Bootstrap::open(&golden(case).join(bootstrap)).unwrap();
        let want = expected(&golden(case).join(tree));
        let dir = tempfile::tempdir().unwrap();
        for round in ["cold", "cached"] {
            let store = store(dir.path(), &runtime);
            let backend = local(case, &image, &runtime);
            let blobs = open_blobs(&store, &image, &backend);
            assert_eq!(store.fetched().0, 0, "{case}: opening reads nothing");
            let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
            assert_eq!(got, want, "{case}, {round}");
            let (fetched, size) = store.fetched();
            let count = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
            let counters = store.counters();
            if round == "cached" {
                assert_eq!(fetched, 0, "{case}: all is in the cache");
                assert_eq!(counters.fetch_requests_total.load(Ordering::Relaxed), 0, "{case}");
            } else {
                let tables: u64 = image.blobs().iter().map(|b| b.ci_compressed_size + 4096).sum();
                assert!(fetched <= size + tables, "{case}: {fetched} of {size} bytes: some twice");
                assert_eq!(count(&counters.cache_hits_total), 0, "{case}");
            }
            for blob in &blobs {
                if blob.ready_chunks().0 > 0 {
                    assert_eq!(blob.digest_source(), Some(DigestSource::ChunkTable), "{case}");
                }
            }
            assert_eq!(count(&counters.digest_mismatches_total), 0, "{case}");
            assert_eq!(count(&counters.cache_damage_total), 0, "{case}");
            assert_eq!(count(&counters.uncached_chunks_total), 0, "{case}");
            // Readers that come later find everything without waiting.
            for file in files(&image) {
                for (blob, chunk) in file.chunks {
                    assert!(blobs[blob].verified(chunk).is_some(), "{case}: {chunk:?}");
                }
            }
        }
    }
}

#[test]
fn the_data_file_is_the_uncompressed_blob() {
    let runtime = runtime();
    let (image, _) = open("v6-none");
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &runtime);
    let blobs = open_blobs(&store, &image, &local("v6-none", &image, &runtime));
    runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
    let id = "4de91e905cfb82e8d9fcfc648c3eb31717c38cb2557a97df34327eade97f9849";
    let data = fs::read(dir.path().join(format!("{id}.layer.disk"))).unwrap();
    let stored = fs::read(golden("v6-none").join("blobs").join(id)).unwrap();
    // (uncompressed offset, size, stored offset), from the worked example of the format's page.
    for (at, size, from) in [(0, 5, 0), (0x1000, 4096, 5), (0x3000, 808, 0x2005)] {
        assert_eq!(data[at..at + size], stored[from..from + size]);
        let end = (at + size).next_multiple_of(4096);
        assert!(data[at + size..end].iter().all(|&b| b == 0), "padding of the chunk at {at}");
    }
    assert_eq!(data.len(), 0x9000);
    use std::os::unix::fs::MetadataExt;
    for entry in walkdir::WalkDir::new(dir.path()).into_iter().flatten() {
        let metadata = entry.metadata().unwrap();
        assert!(metadata.is_dir() || metadata.mode() & 0o777 == 0o600, "{entry:?}");
    }
    assert_eq!(fs::metadata(dir.path().join("rafsd")).unwrap().mode() & 0o777, 0o700);
}

/// Every byte of the blob file, on the way to us.
#[test]
fn a_wrong_byte_from_the_backend_is_never_served() {
    let runtime = runtime();
    let (image, want) = open("v6-none");
    let scripted = Arc::new(Scripted::new("v6-none", &image));
    let blob = &image.blobs()[0];
    let (len, data_end) = (scripted.blobs[&blob.id].len() as u64, blob.data_end);
    let mut refused = 0;
    for at in 0..len {
        // The reserved bytes of the chunk-info header mean nothing: a sample of them will do.
        if at > data_end + 300 && at < len - 8 && at % 97 != 0 {
            continue;
        }
        scripted.set(Mode::Flip(at));
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = store(dir.path(), &runtime);
        let blobs = open_blobs(&store, &image, &scripted);
        match runtime.block_on(read_tree(&image, &blobs, PATIENT)) {
            Ok(got) => {
                assert_eq!(got, want, "byte {at}");
                assert!(at >= data_end, "byte {at} of a chunk is wrong and nobody noticed");
            }
            Err(error) => {
                refused += 1;
                assert!(
                    matches!(
                        error.source,
                        ChunkFailure::DigestMismatch { .. }
                            | ChunkFailure::Codec { .. }
                            | ChunkFailure::Table(_)
                    ),
                    "byte {at}: {}",
                    chain(&error)
                );
            }
        }
    }
    assert!(refused >= data_end, "{refused} of {len} wrong bytes were noticed");
}

#[test]
fn wrong_bytes_of_compressed_and_batched_images_are_never_served() {
    let runtime = runtime();
    for case in ["v6-zstd", "v6-lz4", "v6-batch", "v6-merged", "v6-oci-packed"] {
        let (image, want) = open(case);
        let scripted = Arc::new(Scripted::new(case, &image));
        let len = image.blobs()[0].ci_offset + image.blobs()[0].ci_compressed_size;
        for at in (0..len).step_by(usize::try_from(len / 60).unwrap()) {
            scripted.set(Mode::Flip(at));
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let store = store(dir.path(), &runtime);
            let blobs = open_blobs(&store, &image, &scripted);
            if let Ok(got) = runtime.block_on(read_tree(&image, &blobs, PATIENT)) {
                assert_eq!(got, want, "{case}, byte {at}");
            }
        }
    }
}

#[test]
fn bytes_that_are_wrong_once_are_fetched_again() {
    let runtime = runtime();
    for (case, at) in [("v6-none", 6), ("v6-batch", 100), ("v6-zstd", 70)] {
        let (image, want) = open(case);
        let scripted = Arc::new(Scripted::new(case, &image));
        scripted.set(Mode::FlipOnce(at));
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), &runtime);
        let blobs = open_blobs(&store, &image, &scripted);
        let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
        assert_eq!(got, want, "{case}");
        assert_eq!(scripted.mistrusted.load(Ordering::Relaxed), 1, "{case}");
    }
}

/// Flips byte `at` of `file`, reads the image through a new store, puts the files back.
fn read_damaged(
    dir: &Path,
    pristine: &BTreeMap<String, Vec<u8>>,
    file: &str,
    at: usize,
    read: impl FnOnce(),
) {
    for (name, bytes) in pristine {
        let mut bytes = bytes.clone();
        if name == file {
            bytes[at] ^= 0x01;
        }
        fs::write(dir.join(name), bytes).unwrap();
    }
    read();
}

#[test]
fn a_wrong_byte_in_any_cache_file_is_never_served() {
    // Of an image with batches the context table is saved.
    for (case, which, count, least) in [("v6-none", "", 3, 3500), ("v6-batch", "meta", 4, 500)] {
        flip_cached_bytes(case, which, count, least);
    }
}

/// Flips bytes of the cache files of `case`, of which there are `count`: of those with ending `which`, if it has one;
/// of `least` bytes at least.
fn flip_cached_bytes(case: &str, which: &str, count: usize, least: usize) {
    let runtime = runtime();
    let (image, want) = open(case);
    let scripted = Arc::new(Scripted::new(case, &image));
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let files = dir.path();
    let read = || {
        let store = store(dir.path(), &runtime);
        let blobs = open_blobs(&store, &image, &scripted);
        let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
        (got, store)
    };
    assert_eq!(read().0, want);
    let name = |path: &Path| path.strip_prefix(files).unwrap().to_str().unwrap().to_owned();
    let pristine: BTreeMap<String, Vec<u8>> = walkdir::WalkDir::new(files)
        .into_iter()
        .flatten()
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| (name(entry.path()), fs::read(entry.path()).unwrap()))
        .collect();
    assert_eq!(pristine.len(), count, "{:?}", pristine.keys());
    let mut tried = 0;
    for (name, bytes) in pristine.iter().filter(|(name, _)| name.ends_with(which)) {
        for at in 0..bytes.len() {
            let all = match name.rsplit_once('.').unwrap_or(("", name)).1 {
                "disk" => at % 4096 < 16 || at % 11 == 0,
                "chunk_map" => at < 4096 + 16 && !(160..=4090).contains(&at) || at >= 8192,
                "meta" => at < 160 || (4096..4160).contains(&at) || at >= 8180,
                _ => true,
            };
            if !all && at % 101 != 0 {
                continue;
            }
            tried += 1;
            read_damaged(files, &pristine, name, at, || {
                let (got, _) = read();
                assert_eq!(got, want, "{name}, byte {at}");
            });
        }
    }
    assert!(tried > least, "{case}: {tried}");
}

#[test]
fn damage_in_the_data_file_is_repaired_for_the_next_process() {
    let runtime = runtime();
    let (image, want) = open("v6-none");
    let scripted = Arc::new(Scripted::new("v6-none", &image));
    let dir = tempfile::tempdir().unwrap();
    let read = || {
        let store = store(dir.path(), &runtime);
        let blobs = open_blobs(&store, &image, &scripted);
        let got = runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap();
        assert_eq!(got, want);
        store.counters().cache_damage_total.load(Ordering::Relaxed)
    };
    read();
    let data = dir.path().join(format!("{}.layer.disk", image.blobs()[0].id));
    let mut bytes = fs::read(&data).unwrap();
    bytes[0x1003] ^= 1;
    bytes[10] = 1; // padding behind the five bytes of chunk 0
    fs::write(&data, bytes).unwrap();
    assert_eq!(read(), 2);
    assert_eq!(read(), 0);
    // Shortened: the size is wrong, so it starts anew.
    fs::File::options().write(true).open(&data).unwrap().set_len(0x2000).unwrap();
    read();
    assert_eq!(fs::metadata(&data).unwrap().len(), 0x9000);
}

#[test]
fn a_reader_that_finds_the_file_short_gets_the_chunk_again() {
    let runtime = runtime();
    let (image, want) = open("v6-none");
    let scripted = Arc::new(Scripted::new("v6-none", &image));
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &runtime);
    let blobs = open_blobs(&store, &image, &scripted);
    assert_eq!(runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap(), want);
    let data = dir.path().join(format!("{}.layer.disk", image.blobs()[0].id));
    fs::File::options().write(true).open(&data).unwrap().set_len(0).unwrap();
    for file in files(&image) {
        for (blob, chunk) in file.chunks {
            blobs[blob].distrust(chunk);
            assert_eq!(blobs[blob].verified(chunk), None);
        }
    }
    assert_eq!(runtime.block_on(read_tree(&image, &blobs, PATIENT)).unwrap(), want);
}

#[test]
fn an_inode_that_lies_about_its_chunk_gets_an_error() {
    let runtime = runtime();
    let (image, _) = open("v6-none");
    let scripted = Arc::new(Scripted::new("v6-none", &image));
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &runtime);
    let blob = open_blobs(&store, &image, &scripted).remove(0);
    let right = files(&image)[0].chunks[0].1;
    let fetch = |chunk| {
        let deadline = std::time::Instant::now() + PATIENT;
        runtime.block_on(blob.fetch(vec![chunk], deadline)).remove(0)
    };
    fetch(right).unwrap();
    let mut block = right;
    block.start_block += 1;
    let mut size = right;
    size.size += 1;
    let mut index = right;
    index.index.0 = 9;
    let mut far = right;
    far.index.0 = u32::MAX;
    for wrong in [block, size, index, far] {
        assert_eq!(blob.verified(wrong), None, "{wrong:?}");
        let error = fetch(wrong).unwrap_err();
        assert!(matches!(error.source, ChunkFailure::Contradiction { .. }), "{}", chain(&error));
    }
    assert!(blob.verified(right).is_some());
}
