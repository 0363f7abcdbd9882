//! Our images of the golden trees, next to those of nydus-image.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use build_support::{create, make_golden_tree, repository};
use rafsd::rafs::layout::ChunkRecord;
use rafsd::rafs::{Bootstrap, FileKind, WalkItem};

/// Case, tree, options, prefetch patterns.
type Case = (&'static str, &'static str, &'static [&'static str], &'static str);

const CASES: [Case; 5] = [
    ("v6-zstd", "full", &["--compressor", "zstd"], ""),
    ("v6-lz4", "small", &["--compressor", "lz4_block", "--chunk-size", "0x4000"], ""),
    ("v6-none", "mini", &["--compressor", "none", "--chunk-size", "0x1000"], ""),
    (
        "v6-sha256",
        "small",
        &["--digester", "sha256", "--compressor", "zstd", "--chunk-size", "0x4000"],
        "",
    ),
    (
        "v6-blake3",
        "small",
        &[
            "--digester",
            "blake3",
            "--compressor",
            "lz4_block",
            "--chunk-size",
            "0x4000",
            "--prefetch-policy",
            "fs",
        ],
        "/hello.txt\n/dup\n/tiny/t05\n/no/such\n/links/rel\n/hard/h2\n",
    ),
];

fn golden(case: &str) -> std::path::PathBuf {
    repository().join("guest-tests/golden").join(case)
}

fn built(dir: &Path, (case, tree, options, patterns): Case) -> (Bootstrap, Bootstrap) {
    let source = dir.join(case);
    make_golden_tree(tree, &source);
    let built = create(&source, &dir.join("image"), options, patterns.as_bytes());
    (built.open(), Bootstrap::open(&golden(case).join("bootstrap")).unwrap())
}

/// What both builders must agree on of an inode. Nydus drops the root's time.
fn shown(item: &WalkItem<'_>) -> String {
    let inode = &item.inode;
    let root = item.path() == b"/";
    let mut xattrs: Vec<_> =
        inode.xattrs().unwrap().map(|x| (x.full_name(), x.value.to_vec())).collect();
    xattrs.sort();
    let chunks: Vec<_> = (0..inode.chunk_count())
        .map(|i| inode.chunk(i).unwrap())
        .map(|addr| (addr.device(), addr.chunk_index(), addr.start_block()))
        .collect();
    let target = (inode.kind() == FileKind::Symlink).then(|| inode.symlink_target().unwrap());
    format!(
        "{:o} {} {} {} {} {:?} {} {} {:?} {xattrs:?} {chunks:?}",
        inode.mode(),
        inode.size(),
        inode.uid(),
        inode.gid(),
        inode.ino(),
        (!root).then(|| (inode.mtime(), inode.mtime_nsec())),
        inode.nlink(),
        inode.rdev(),
        target,
    )
}

#[test]
fn inodes_and_chunks_are_those_of_nydus_image() {
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = built(dir.path(), case);
        let case = case.0;
        let walk = |image: &Bootstrap| -> BTreeMap<Vec<u8>, String> {
            image.walk().map(Result::unwrap).map(|item| (item.path(), shown(&item))).collect()
        };
        let (got, want) = (walk(&ours), walk(&theirs));
        for (path, want) in &want {
            let got = got.get(path);
            assert_eq!(got, Some(want), "{case}: {}", path.escape_ascii());
        }
        assert_eq!(got.len(), want.len(), "{case}");
        assert_eq!(ours.flags(), theirs.flags(), "{case}");
        assert_eq!(ours.path_count(), theirs.path_count(), "{case}");
        let (ours, theirs) = (&ours.blobs()[0], &theirs.blobs()[0]);
        assert_eq!(ours.chunk_count, theirs.chunk_count, "{case}");
        assert_eq!(ours.uncompressed_size, theirs.uncompressed_size, "{case}");
        assert_eq!(ours.features, theirs.features, "{case}");
        assert_eq!(ours.ci_compressor, theirs.ci_compressor, "{case}");
        // The codecs are other implementations of the same formats: about as good, not the same.
        let (got, want) = (ours.data_end, theirs.data_end);
        assert!(got.abs_diff(want) <= want / 500, "{case}: {got} bytes of blob, {want} expected");
    }
}

#[test]
fn chunk_tables_are_those_of_nydus_image() {
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = built(dir.path(), case);
        // What compression decides differs by codec, and the file offset of a shared chunk is that
        // of any file that has it.
        let shown = |r: &ChunkRecord| {
            (
                hex::encode(r.digest),
                r.blob_index.get(),
                r.flags.get(),
                r.uncompressed_size.get(),
                r.uncompressed_offset.get(),
                r.index.get(),
                r.crc32c.get(),
            )
        };
        let got: Vec<_> = ours.chunk_records().iter().map(shown).collect();
        let want: Vec<_> = theirs.chunk_records().iter().map(shown).collect();
        assert_eq!(got, want, "{}", case.0);
    }
}

#[test]
fn prefetch_tables_name_the_same_paths() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = built(dir.path(), CASES[4]);
    let paths = |image: &Bootstrap| -> Vec<Vec<Vec<u8>>> {
        let mut by_nid: BTreeMap<_, Vec<Vec<u8>>> = BTreeMap::new();
        for item in image.walk().map(Result::unwrap) {
            by_nid.entry(item.inode.nid()).or_default().push(item.path());
        }
        by_nid.values_mut().for_each(|paths| paths.sort());
        image.prefetch_nids().map(|nid| by_nid[&nid].clone()).collect()
    };
    let got = paths(&ours);
    assert_eq!(got, paths(&theirs));
    assert_eq!(got.len(), 5);
}

#[test]
fn the_worked_example_is_the_same_to_the_byte_but_for_the_time_of_the_root() {
    let dir = tempfile::tempdir().unwrap();
    built(dir.path(), CASES[2]);
    let mut ours = fs::read(dir.path().join("image/image.boot")).unwrap();
    let theirs = fs::read(golden("v6-none").join("bootstrap")).unwrap();
    // The root is at 0x3000, its time at 32 of it: seconds, then nanoseconds.
    assert_eq!(ours[0x3020..0x302c], *b"\x00\x10\x5e\x5f\0\0\0\0\0\0\0\0");
    ours[0x3020..0x302c].fill(0);
    assert!(ours == theirs, "the bootstraps differ");
    let [blob] = fs::read_dir(golden("v6-none").join("blobs"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let ours = fs::read(dir.path().join("image").join(blob.file_name())).unwrap();
    assert!(ours == fs::read(blob.path()).unwrap(), "the blobs differ");
}
