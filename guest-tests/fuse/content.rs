//! File data: what a guest reads is what was in the tree, or an error.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::golden::{CASES, bytes, tree};
use super::guest::{Guest, RUNTIME, bootstrap, path};
use rafsd::backend::{Backend, BackendError, ByteStream, LocalFs, LocalFsConfig};
use rafsd::blob::{Blob, Store, StoreConfig};
use rafsd::fuse::abi::{LseekIn, LseekOut, ReadIn, opcode};
use rafsd::fuse::{Mounts, Outcome, Pins, RafsFs, RafsOptions, Reply};
use rafsd::rafs::Bootstrap;
use rafsd::rafs::codec::Digester;
use rafsd::rafs::id::BlobId;

/// A golden image, mounted; its cache goes away with it.
struct Image {
    guest: Guest,
    blobs: Vec<Arc<Blob>>,
    cache: tempfile::TempDir,
    chunk_size: usize,
}

/// Blobs of a case, until they are out of reach.
struct Source {
    files: LocalFs,
    stuck: AtomicBool,
}

impl Source {
    /// Files of `case`, in its directory `dir`.
    fn new(case: &str, dir: &str) -> Arc<Source> {
        let config = LocalFsConfig { dir: Some(path(case).join(dir)), ..Default::default() };
        let files = LocalFs::new(config, RUNTIME.handle().clone());
        Arc::new(Source { files, stuck: AtomicBool::new(false) })
    }
}

impl Backend for Source {
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>> {
        if self.stuck.load(Ordering::SeqCst) {
            return Box::pin(std::future::pending());
        }
        self.files.read(blob, range)
    }

    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>> {
        self.files.size(blob)
    }

    fn name(&self) -> &str {
        "test"
    }
}

impl Image {
    fn mount(case: &str) -> Image {
        let cache = tempfile::tempdir().unwrap();
        Image::mount_with(case, cache, Source::new(case, "blobs"), Duration::from_secs(30))
    }

    fn mount_with(
        case: &str,
        cache: tempfile::TempDir,
        source: Arc<Source>,
        read_timeout: Duration,
    ) -> Image {
        let image = named(case, bootstrap(case));
        let store = Store::new(StoreConfig::new(cache.path()), RUNTIME.handle().clone()).unwrap();
        let blobs: Vec<_> = image
            .blobs()
            .iter()
            .map(|blob| store.open_blob(&image, blob.index, source.clone()).unwrap())
            .collect();
        let chunk_size = image.chunk_size() as usize;
        let options = RafsOptions { read_timeout, ..Default::default() };
        let guest = Guest::mount(Mounts::single(RafsFs::new(image, blobs.clone(), options)));
        Image { guest, blobs, cache, chunk_size }
    }

    /// The whole file, read in pieces of `size` bytes.
    fn content(&self, node: u64, size: u32) -> Vec<u8> {
        let mut content = vec![];
        loop {
            let piece = self.guest.read(node, content.len() as u64, size).unwrap();
            if piece.is_empty() {
                return content;
            }
            content.extend(piece);
        }
    }

    /// Cuts the cache files of all blobs to `len` bytes.
    fn cut_cache_files(&self, len: u64) {
        for entry in std::fs::read_dir(self.cache.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.to_str().unwrap().ends_with(".layer.disk") {
                std::fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
            }
        }
    }
}

/// The image with the id that a packed layer cannot know: the name of its only blob.
fn named(case: &str, image: Bootstrap) -> Bootstrap {
    if !image.blobs().iter().any(|blob| blob.id == BlobId::UNKNOWN) {
        return image;
    }
    let file = std::fs::read_dir(path(case).join("blobs")).unwrap().next().unwrap().unwrap();
    let id = BlobId::parse(file.file_name().as_encoded_bytes()).unwrap();
    image.with_blob_id(id).unwrap()
}

#[test]
fn every_byte_is_that_of_the_tree() {
    for case in CASES {
        let image = Image::mount(case);
        // Cold in the size of read-ahead, then warm in the largest and an odd one.
        for size in [131_072, 1 << 20, 5000] {
            for want in tree(case).iter().filter(|want| want["type"] == "file") {
                let path = bytes(want, "path");
                let content = image.content(image.guest.at(&path), size);
                let digest = hex::encode(Digester::Sha256.digest(&content));
                assert_eq!(digest, want["sha256"], "{case} {} by {size}", path.escape_ascii());
            }
        }
    }
}

#[test]
fn reads_end_with_the_file() {
    let image = Image::mount("v6-none");
    let node = image.guest.at(b"/b");
    let content = image.content(node, 4096);
    assert_eq!(content.len(), 9000);
    // (offset, size, room in the buffers, bytes got)
    let cases: [(u64, u32, usize, std::ops::Range<usize>); 10] = [
        (0, 0, 0, 0..0),
        (0, 9000, 9000, 0..9000),
        (0, 10_000, 10_000, 0..9000),
        (0, u32::MAX, 9000, 0..9000),
        (4095, 2, 2, 4095..4097),
        (0, 8192, 100, 0..100),
        (8999, 4096, 4096, 8999..9000),
        (9000, 4096, 4096, 0..0),
        (u64::MAX, 4096, 4096, 0..0),
        (u64::MAX - 100, u32::MAX, 4096, 0..0),
    ];
    for (offset, size, room, want) in cases {
        let args = ReadIn { offset, size, ..Default::default() };
        let got = image.guest.ask(opcode::READ, node, args.as_bytes(), room);
        assert_eq!(got.unwrap(), content[want], "read({offset}, {size}) into {room} bytes");
    }
    assert_eq!(image.guest.read(1, 0, 10), Err(libc::EISDIR));
    assert_eq!(image.guest.read(image.guest.at(b"/s"), 0, 10), Err(libc::EINVAL));
}

#[test]
fn holes_are_the_whole_chunks_of_zeros() {
    for case in ["v6-zstd", "v6-lz4", "v6-sha256", "v6-merged"] {
        let image = Image::mount(case);
        let mut holes = 0;
        for want in tree(case).iter().filter(|want| want["type"] == "file") {
            let path = bytes(want, "path");
            let node = image.guest.at(&path);
            let content = image.content(node, 1 << 20);
            let is_hole =
                |chunk: &[u8]| chunk.len() == image.chunk_size && chunk.iter().all(|&b| b == 0);
            let map: Vec<bool> = content.chunks(image.chunk_size).map(is_hole).collect();
            let count = map.iter().filter(|&&hole| hole).count();
            holes += count;
            let at = format!("{case} {}", path.escape_ascii());
            let blocks = content.len().div_ceil(4096) * 8 - count * image.chunk_size / 512;
            assert_eq!(image.guest.attr(node).unwrap().blocks, blocks as u64, "{at}");

            let seek = |offset: usize, whence: i32| {
                let whence = whence.cast_unsigned();
                let args = LseekIn { offset: offset as u64, whence, ..Default::default() };
                let got: Result<LseekOut, _> =
                    image.guest.get(opcode::LSEEK, node, args.as_bytes());
                got.map(|out| out.offset)
            };
            let chunk_start = |n: usize| n * image.chunk_size;
            for n in 0..map.len() {
                for offset in [chunk_start(n), (chunk_start(n) + 100).min(content.len() - 1)] {
                    // The next chunk of this kind, from where we are.
                    let next = |kind: bool| (n..map.len()).find(|&n| map[n] == kind);
                    let want = next(false).map(|n| chunk_start(n).max(offset) as u64);
                    assert_eq!(seek(offset, libc::SEEK_DATA), want.ok_or(libc::ENXIO), "{at}");
                    let want = next(true).map_or(content.len(), |n| chunk_start(n).max(offset));
                    assert_eq!(seek(offset, libc::SEEK_HOLE), Ok(want as u64), "{at}");
                }
            }
            for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
                assert_eq!(seek(content.len(), whence), Err(libc::ENXIO), "{at}: the end");
            }
            for whence in [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END, 5, -1] {
                assert_eq!(seek(0, whence), Err(libc::EINVAL), "{at}: {whence}");
            }
        }
        if case == "v6-zstd" {
            assert!(holes > 0, "the image has sparse files");
        }
    }
}

#[test]
fn a_cache_file_that_was_cut_is_read_again() {
    let image = Image::mount("v6-zstd");
    let want = &tree("v6-zstd")
        .into_iter()
        .filter(|want| want["type"] == "file")
        .max_by_key(|want| want["size"].as_u64())
        .unwrap();
    let node = image.guest.at(&bytes(want, "path"));
    for keep in [0, 4096, 1_500_000] {
        let content = image.content(node, 1 << 20);
        assert_eq!(hex::encode(Digester::Sha256.digest(&content)), want["sha256"], "{keep}");
        image.cut_cache_files(keep);
    }
    let content = image.content(node, 1 << 20);
    assert_eq!(hex::encode(Digester::Sha256.digest(&content)), want["sha256"]);
}

#[test]
fn a_blob_that_cannot_be_had_fails_the_read_and_nothing_else() {
    let source = Source::new("v6-none", "no-such-directory");
    let cache = tempfile::tempdir().unwrap();
    let image = Image::mount_with("v6-none", cache, source, Duration::from_millis(200));
    let node = image.guest.at(b"/b");
    assert_eq!(image.guest.read(node, 0, 4096), Err(libc::EIO));
    assert_eq!(image.guest.read(node, 9000, 4096), Ok(vec![]), "no chunk is needed for this");
    assert_eq!(image.guest.attr(node).unwrap().size, 9000);
    assert_eq!(image.blobs[0].ready_chunks().0, 0);
}

/// A disk that goes away with the test; mounting one needs root.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, options: &str) -> Disk {
        let args = ["-t", "tmpfs", "-o", options, "none"];
        assert!(Command::new("mount").args(args).arg(at).status().unwrap().success());
        Disk(at.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(done.is_ok_and(|status| status.success()));
    }
}

#[test]
fn chunks_that_the_cache_cannot_take_come_from_memory() {
    for disk in ["ro", "size=4k"] {
        for case in ["v6-none", "v6-zstd"] {
            let cache = tempfile::tempdir().unwrap();
            let _disk = Disk::mount(cache.path(), disk);
            let source = Source::new(case, "blobs");
            let image = Image::mount_with(case, cache, source, Duration::from_secs(30));
            for want in tree(case).iter().filter(|want| want["type"] == "file") {
                let path = bytes(want, "path");
                let content = image.content(image.guest.at(&path), 1 << 20);
                let digest = hex::encode(Digester::Sha256.digest(&content));
                assert_eq!(digest, want["sha256"], "{disk} {}", path.escape_ascii());
                for (offset, size) in [(4000, 200), (4096, 4096), (8191, 2), (1, 100_000)] {
                    let got = image.guest.read(image.guest.at(&path), offset, size).unwrap();
                    let start = content.len().min(usize::try_from(offset).unwrap());
                    let end = content.len().min(start + size as usize);
                    assert!(got == content[start..end], "{disk} read({offset}, {size})");
                }
            }
            let ready: u32 = image.blobs.iter().map(|blob| blob.ready_chunks().0).sum();
            assert_eq!(ready, 0, "{disk}: nothing is in the cache");
        }
    }
}

/// One round of a READ of 9000 bytes from the start of `node`.
fn round(image: &Image, node: u64, pins: &Pins) -> Outcome {
    let args = ReadIn { size: 9000, ..Default::default() };
    let request = image.guest.request(opcode::READ, node, args.as_bytes());
    let mut memory = vec![0; 9016];
    let slices = [vm_memory::VolatileSlice::from(&mut memory[..])];
    image.guest.server.handle(&request, &mut Reply::new(&slices), pins)
}

#[test]
fn a_read_waits_once_for_all_its_chunks() {
    let image = Image::mount("v6-none");
    let node = image.guest.at(b"/b");
    let Outcome::Wait(wait) = round(&image, node, &Pins::default()) else { panic!("cold") };
    assert_eq!(image.blobs[0].ready_chunks().0, 0, "nothing starts before the wait is polled");
    let pins = RUNTIME.block_on(wait.ready());
    assert!(matches!(round(&image, node, &pins), Outcome::Reply(9016)));
    assert!(matches!(round(&image, node, &Pins::default()), Outcome::Reply(9016)), "warm");
    assert_eq!(image.blobs[0].ready_chunks().0, 3);
}

#[test]
fn a_read_does_not_wait_for_ever() {
    let image = Image::mount("v6-none");
    let node = image.guest.at(b"/b");
    let mut pins = Pins::default();
    for rounds in 0.. {
        // Somebody keeps cutting the cache file between the wait and the read.
        image.cut_cache_files(0);
        match round(&image, node, &pins) {
            Outcome::Wait(wait) => pins = RUNTIME.block_on(wait.ready()),
            outcome => {
                assert!(matches!(outcome, Outcome::Reply(16)), "EIO: {outcome:?}");
                assert_eq!(rounds, 4);
                break;
            }
        }
    }
    assert_eq!(image.guest.read(node, 0, 9000).unwrap().len(), 9000, "the next one is served");
}

#[test]
fn waits_of_one_read_share_a_deadline() {
    let (cache, source) = (tempfile::tempdir().unwrap(), Source::new("v6-none", "blobs"));
    let timeout = Duration::from_secs(10);
    let image = Image::mount_with("v6-none", cache, source.clone(), timeout);
    let node = image.guest.at(b"/b");
    let start = Instant::now();
    let Outcome::Wait(wait) = round(&image, node, &Pins::default()) else { panic!("cold") };
    let pins = RUNTIME.block_on(wait.ready());
    image.cut_cache_files(0);
    source.stuck.store(true, Ordering::SeqCst);
    std::thread::sleep(timeout / 2);
    let Outcome::Wait(wait) = round(&image, node, &pins) else { panic!("the file was cut") };
    let pins = RUNTIME.block_on(wait.ready());
    let took = start.elapsed();
    // With a time of its own the second wait would end half a timeout later.
    assert!((timeout..timeout * 3 / 2).contains(&took), "{took:?}");
    assert!(matches!(round(&image, node, &pins), Outcome::Reply(16)), "EIO");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_part_of_a_file_is_that_part(
        reads in proptest::collection::vec((0u64..4_000_000, 0u32..1_500_000), 1..6),
    ) {
        let image = Image::mount("v6-zstd");
        let want = tree("v6-zstd")
            .into_iter()
            .filter(|want| want["type"] == "file")
            .max_by_key(|want| want["size"].as_u64())
            .unwrap();
        let node = image.guest.at(&bytes(&want, "path"));
        let got: Vec<_> = reads
            .iter()
            .map(|&(offset, size)| image.guest.read(node, offset, size).unwrap())
            .collect();
        let content = image.content(node, 1 << 20);
        for ((offset, size), got) in reads.into_iter().zip(got) {
            let start = content.len().min(usize::try_from(offset).unwrap());
            let end = content.len().min(start + size as usize);
            prop_assert!(got == content[start..end], "read({offset}, {size})");
        }
    }
}
