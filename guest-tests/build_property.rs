//! Any tree that goes into an image comes out of it the same.
//!
//! Needs root: owners, devices and `trusted.` attributes are set.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use build_support::{assert_same, check, check_by_rafs_reader, create, describe, read_image};
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

/// What a path becomes.
#[derive(Clone, Debug)]
enum Kind {
    Dir,
    /// Pieces of data (seed, length) or of nothing.
    File(Vec<(Option<u8>, usize)>),
    Symlink(Vec<u8>),
    Node(FileType, u32, u32),
    /// A link to one of the files so far.
    Link(prop::sample::Index),
}

#[derive(Clone, Debug)]
struct Item {
    parent: prop::sample::Index,
    name: Vec<u8>,
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: Vec<(String, Vec<u8>)>,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1_u8..=255).prop_filter("no separators", |&b| b != b'/');
    prop_oneof![
        4 => "[-a-z0-9.!~ ]{1,12}".prop_map(String::into_bytes),
        2 => vec(byte.clone(), 1..20),
        1 => vec(byte, 200..=255),
    ]
    .prop_filter("names of their own", |name| name != b"." && name != b"..")
}

fn kind() -> impl Strategy<Value = Kind> {
    let len = prop_oneof![0..200_usize, 4090..4100_usize, 0..70_000_usize];
    // Few seeds, so that chunks repeat.
    let piece = (prop::option::weighted(0.7, 0..4_u8), len);
    let node = prop_oneof![
        Just(FileType::CharacterDevice),
        Just(FileType::BlockDevice),
        Just(FileType::Fifo),
        Just(FileType::Socket),
    ];
    let target = prop_oneof![
        vec(1_u8..=255, 1..60),
        vec(1_u8..=255, 4020..4040),
        vec(1_u8..=255, 4090..=4095)
    ];
    prop_oneof![
        3 => Just(Kind::Dir),
        6 => vec(piece, 0..4).prop_map(Kind::File),
        1 => target.prop_map(Kind::Symlink),
        1 => (node, 0..1_u32 << 12, 0..1_u32 << 20).prop_map(|(t, a, b)| Kind::Node(t, a, b)),
        2 => any::<prop::sample::Index>().prop_map(Kind::Link),
    ]
}

fn item() -> impl Strategy<Value = Item> {
    let xattr = ("(user|trusted|security)\\.[a-z.]{1,30}", vec(any::<u8>(), 0..100));
    (
        any::<prop::sample::Index>(),
        name(),
        kind(),
        0..0o10000_u32,
        (0..u32::MAX, 0..u32::MAX),
        (-(1_i64 << 31)..1 << 33, 0..1_000_000_000_i64),
        prop_oneof![3 => Just(Vec::new()), 1 => vec(xattr, 1..5)],
    )
        .prop_map(|(parent, name, kind, mode, owner, mtime, xattrs)| Item {
            parent,
            name,
            kind,
            mode,
            owner,
            mtime,
            xattrs,
        })
}

/// Makes the items below `root`; those whose name is taken, or that link to nothing, are left out.
fn make(root: &Path, items: &[Item]) {
    fs::create_dir(root).unwrap();
    let mut dirs = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut made = Vec::new();
    for item in items {
        let path = item.parent.get(&dirs).join(OsStr::from_bytes(&item.name));
        if fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match &item.kind {
            Kind::Dir => {
                fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            Kind::File(pieces) => {
                let file = fs::File::create(&path).unwrap();
                let mut end = 0;
                for &(seed, len) in pieces {
                    if let Some(seed) = seed {
                        file.write_all_at(&content(seed, len), end).unwrap();
                    }
                    end += len as u64;
                }
                file.set_len(end).unwrap();
                files.push(path.clone());
            }
            Kind::Symlink(target) => {
                std::os::unix::fs::symlink(OsStr::from_bytes(target), &path).unwrap();
            }
            Kind::Node(file_type, major, minor) => {
                let dev = rustix::fs::makedev(*major, *minor);
                rustix::fs::mknodat(CWD, &path, *file_type, Mode::empty(), dev).unwrap();
            }
            Kind::Link(_) if files.is_empty() => {}
            Kind::Link(to) => fs::hard_link(to.get(&files), &path).unwrap(),
        }
        if !matches!(item.kind, Kind::Link(_)) {
            made.push((path, item));
        }
    }
    for (path, item) in made.iter().rev() {
        let (uid, gid) = (Uid::from_raw(item.owner.0), Gid::from_raw(item.owner.1));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).unwrap();
        if !matches!(item.kind, Kind::Symlink(_)) {
            rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(item.mode), AtFlags::empty())
                .unwrap();
        }
        for (name, value) in &item.xattrs {
            // Some file systems have little room, and user. is for files and directories only.
            rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).ok();
        }
        let time = Timespec { tv_sec: item.mtime.0, tv_nsec: item.mtime.1 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// Bytes of which the halves of each seed can be compressed or not.
fn content(seed: u8, len: usize) -> Vec<u8> {
    let noise = |at: usize| crc32c::crc32c(&(at as u64 + u64::from(seed)).to_le_bytes());
    let flat = |at: usize| u32::from(seed) + u32::try_from(at / 4096).unwrap();
    (0..len)
        .map(|at| if at & 0x4000 == 0 { flat(at) } else { noise(at) }.to_le_bytes()[0])
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_in_the_same_tree_out(
        items in vec(item(), 0..60),
        chunk_size in prop_oneof![Just("0x1000"), Just("0x4000"), Just("1048576")],
        compressor in prop_oneof![Just("zstd"), Just("lz4_block"), Just("none")],
        digester in prop_oneof![Just("blake3"), Just("sha256")],
        threads in prop_oneof![Just("1"), Just("3")],
        foreign in prop::bool::weighted(0.15),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("tree");
        make(&source, &items);
        let want = describe(&source);
        // The foreign reader has no fast BLAKE3.
        let digester = if foreign { "sha256" } else { digester };
        let options = [
            "--chunk-size", chunk_size,
            "--compressor", compressor,
            "--digester", digester,
            "--threads", threads,
            "--whiteout-spec", "none",
        ];
        let built = create(&source, &dir.path().join("image"), &options, b"");
        check(&built);
        assert_same(&read_image(&built), &want, "our reader");
        if foreign {
            check_by_rafs_reader(&built, &want, dir.path());
        }
    }
}
