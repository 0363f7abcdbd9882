//! Hostile bytes: whatever they are, reading them ends in an image or an error, soon and in little
//! memory. A short run each time; `RAFSD_FUZZ_SECONDS` makes a long one, see `scripts/fuzz`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rafsd::rafs::toc::{PackedBlob, SectionKind};
use rafsd::rafs::{Bootstrap, FileKind, Inode};

/// No image of these sizes may take longer; a mutation that loops takes for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// Reads all there is of an inode, as a server would. Returns how many things there were.
fn use_inode(image: &Bootstrap, inode: &Inode<'_>, cookies: &[u64]) -> u64 {
    let mut seen = 1;
    let _ = inode.symlink_target();
    if let Ok(xattrs) = inode.xattrs() {
        seen += xattrs.map(|x| x.full_name().len().min(1) as u64).sum::<u64>();
    }
    for i in 0..inode.chunk_count().saturating_add(1).min(10_000) {
        if let Ok(addr) = inode.chunk(i) {
            let blob = addr.blob().expect("a checked chunk has a blob");
            let blob = &image.blobs()[usize::from(blob.0)];
            assert!(addr.chunk_index() < blob.chunk_count);
            let end = u64::from(addr.start_block()) * 4096 + u64::from(inode.chunk_len(i));
            assert!(end <= blob.uncompressed_size);
            seen += 1;
        }
    }
    let Ok(dir) = inode.dir() else { return seen };
    let mut last = None;
    for entry in dir.entries_from(0).into_iter().flatten().map_while(Result::ok) {
        assert!((1..=255).contains(&entry.name.len()) && !entry.name.contains(&b'/'));
        assert!(entry.next_cookie != 0);
        let _ = dir.lookup(entry.name);
        let _ = dir.inode_of(&entry);
        last = Some(entry.next_cookie);
        seen += 1;
    }
    for &cookie in cookies.iter().chain(&last) {
        // A restart never yields more than a listing from the start could.
        let rest = dir.entries_from(cookie).into_iter().flatten().count() as u64;
        assert!(rest <= image.len() / 13 + 1);
        let _ = dir.lookup(&cookie.to_le_bytes());
    }
    seen
}

/// Everything that can be asked of a bootstrap.
fn use_bootstrap(bytes: Vec<u8>) -> bool {
    let len = bytes.len() as u64;
    let Ok(image) = Bootstrap::from_bytes(bytes) else { return false };
    let cookies = [1, 2, 511, 512, 513, len, u64::MAX, u64::MAX - 511, 1 << 63];
    let mut left: u64 = 200_000;
    for item in image.walk() {
        if let Ok(item) = item {
            assert!(item.depth <= rafsd::rafs::walk::MAX_DEPTH);
            if item.inode.kind() != FileKind::Directory || item.depth < 8 {
                left = left.saturating_sub(use_inode(&image, &item.inode, &cookies));
            }
            if item.depth < 8 {
                assert!(item.path().starts_with(b"/"));
            }
        }
        left = left.saturating_sub(1);
        if left == 0 {
            break;
        }
    }
    for nid in image.prefetch_nids().take(1000) {
        let _ = image.inode(nid);
    }
    for blob in image.blobs() {
        if let Ok(digests) = image.chunk_digests(blob.index) {
            assert!(digests.get(rafsd::rafs::id::ChunkIndex(blob.chunk_count)).is_none());
        }
    }
    // Any number that a guest may send as a nid.
    for nid in (0..image.slots().min(2000)).chain([u64::MAX, 1 << 59, (1 << 48) - 1]) {
        if let Ok(inode) = image.inode(rafsd::rafs::id::Nid(nid)) {
            use_inode(&image, &inode, &[3]);
        }
    }
    true
}

fn use_packed(bytes: &[u8]) -> bool {
    let Ok(packed) = PackedBlob::read(bytes) else { return false };
    for section in packed.sections() {
        assert!(section.stored.end <= bytes.len() as u64);
        if section.kind != SectionKind::ImageBlob {
            let _ = section.content(bytes, 1 << 20);
        }
    }
    if let Ok(bootstrap) = packed.bootstrap(bytes) {
        use_bootstrap(bootstrap);
    }
    true
}

/// SplitMix64: enough for mutations, and the same everywhere from one seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).unwrap()
    }
}

/// Changes a few fields: numbers that matter at places that are likely to hold some.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const NUMBERS: [u64; 14] =
        [0, 1, 2, 12, 31, 32, 63, 64, 128, 0xFF, 0xFFF, 0x1000, u32::MAX as u64, u64::MAX];
    for _ in 0..=random.below(6) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        let at = match random.below(4) {
            0 => 1024 + random.below(640),
            1 => random.below(len) & !31,
            2 => random.below(len) & !3,
            _ => random.below(len),
        }
        .min(len - 1);
        let width = 1 << random.below(4);
        let end = (at + width).min(len);
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            2 => {
                let number = random.next().to_le_bytes();
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            3 => {
                let from = random.below(len);
                let count = (1 << random.below(9)).min(len - from).min(len - at);
                bytes.copy_within(from..from + count, at);
            }
            4 => {
                let delta = random.below(7).to_le_bytes()[0].wrapping_sub(3);
                bytes[at] = bytes[at].wrapping_add(delta);
            }
            _ if random.below(8) == 0 => bytes.truncate((at + 4095) & !4095),
            _ => bytes[at] = 0,
        }
    }
}

fn golden() -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden");
    let mut files = Vec::new();
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let path = entry.path();
        if entry.file_type().is_file() && path.extension().is_none() {
            files.push((path.display().to_string(), std::fs::read(path).unwrap()));
        }
    }
    files
}

/// Mutates golden files until the time is up. The seed of a failure is in its message.
#[test]
fn mutated_golden_files_are_read_or_refused() {
    let seconds = std::env::var("RAFSD_FUZZ_SECONDS").map_or(3, |s| s.parse().unwrap());
    let mut seed = std::env::var("RAFSD_FUZZ_SEED").map_or(1, |s| s.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let files = golden();
    let (mut rounds, mut opened) = (0_u64, 0_u64);
    // Enough of them also where the machine is busy.
    while Instant::now() < end || rounds < 1000 {
        let mut random = Random(seed);
        let (name, bytes) = &files[random.below(files.len())];
        let mut bytes = bytes.clone();
        mutate(&mut bytes, &mut random);
        let start = Instant::now();
        let body = || use_packed(&bytes) | use_bootstrap(bytes.clone());
        match catch_unwind(AssertUnwindSafe(body)) {
            Ok(read) => opened += u64::from(read),
            Err(_) => panic!("RAFSD_FUZZ_SEED={seed}: panic on a mutation of {name}"),
        }
        let took = start.elapsed();
        assert!(took < LIMIT, "RAFSD_FUZZ_SEED={seed}: {took:?} on a mutation of {name}");
        seed += 1;
        rounds += 1;
    }
    println!("{rounds} mutations, {opened} of them opened");
    assert!(opened * 20 > rounds, "mutations are too harsh to test anything: {opened}/{rounds}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_an_image_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..16384)) {
        use_packed(&bytes);
        use_bootstrap(bytes);
    }

    /// Random inodes and directories behind sound super blocks.
    #[test]
    fn any_metadata_behind_sound_super_blocks(
        bytes in prop::collection::vec(any::<u8>(), 0x2000),
        root in any::<[u8; 24]>(),
    ) {
        let path = "guest-tests/golden/v6-none/bootstrap";
        let mut image = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        // The root inode stays, so that the image opens; its entries do not.
        image[0x3040..0x4000].copy_from_slice(&bytes[..0xfc0]);
        image[0x4000..].copy_from_slice(&bytes[0x1000..0x2000]);
        image[0x3040..0x3058].copy_from_slice(&root);
        image[0x3048..0x304a].copy_from_slice(&[24, 0]);
        prop_assert!(use_bootstrap(image));
    }
}
