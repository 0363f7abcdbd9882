//! Our images, read by programs that share no code with us, are the trees they were made of.
//!
//! Needs root, a kernel with EROFS on files, python3 and `scripts/parts erofs`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use build_support::foreign::assert_erofs;
use build_support::{
    assert_same, check, check_by_rafs_reader, create, describe, make_golden_tree, read_image,
};

/// Options of the images that all readers are shown.
const OPTIONS: [&[&str]; 4] = [
    &["--digester", "sha256"],
    &["--compressor", "lz4_block", "--chunk-size", "0x1000", "--digester", "sha256"],
    &["--compressor", "none", "--chunk-size", "0x4000", "--digester", "sha256"],
    &["--compressor", "zstd", "--chunk-size", "0x10000", "--digester", "blake3"],
];

#[test]
fn the_golden_tree_through_all_readers() {
    let dir = tempfile::tempdir().unwrap();
    make_golden_tree("full", &dir.path().join("tree"));
    through_all_readers(dir.path());
}

#[test]
fn a_tree_of_edge_cases_through_all_readers() {
    let dir = tempfile::tempdir().unwrap();
    make_edges(&dir.path().join("tree"));
    through_all_readers(dir.path());
}

#[test]
fn a_tree_without_data_through_all_readers() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("empty/er")).unwrap();
    fs::write(tree.join("nothing"), "").unwrap();
    through_all_readers(dir.path());
}

/// Directories, links, attributes and files that end exactly at, before and behind block and chunk
/// boundaries.
fn make_edges(root: &Path) {
    fs::create_dir_all(root).unwrap();
    // A directory's data is 27 bytes for `.` and `..`, 12 and the name for each child. An inode is
    // 64 bytes, so 4032 bytes are the most that go behind it.
    for size in [4031, 4032, 4033, 4095, 4096, 4097, 8128, 8129, 8192, 8193, 12288] {
        let dir = root.join(format!("dir{size}"));
        fs::create_dir(&dir).unwrap();
        let mut left = size - 27;
        let mut n = 0;
        while left > 0 {
            // The block boundaries inside the directory fall where they may; the end does not.
            let name_len = if left > 2 * 267 { 255 } else { (left - 12).min(200) };
            let name_len = if left - 12 - name_len < 20 { left - 12 } else { name_len };
            fs::write(dir.join(format!("{n:0name_len$}")), "").unwrap();
            left -= 12 + name_len;
            n += 1;
        }
    }
    for len in [1, 4031, 4032, 4033, 4095] {
        let link = root.join(format!("link{len}"));
        symlink("t".repeat(len), &link).unwrap();
        let with_xattr = root.join(format!("xlink{len}"));
        symlink("x".repeat(len), &with_xattr).unwrap();
        xattr::set(&with_xattr, "trusted.a", &[b'v'; 40]).unwrap();
    }
    // Attributes shift the chunk addresses behind them by every multiple of 4.
    for len in 0..20 {
        let file = root.join(format!("x{len}"));
        fs::write(&file, vec![b'd'; 5000 + len]).unwrap();
        xattr::set(&file, "user.n", &vec![1; len]).unwrap();
        for n in 0..len {
            xattr::set(&file, format!("user.{}", "n".repeat(n + 2)), b"v").unwrap();
        }
    }
    let big = root.join("xattrs-of-more-than-a-block");
    fs::write(&big, "small").unwrap();
    xattr::set(&big, "user.big", &[b'B'; 3500]).unwrap();
    fs::create_dir(root.join("dir-with-xattrs")).unwrap();
    xattr::set(root.join("dir-with-xattrs"), "trusted.big", &[b'D'; 3500]).unwrap();
    for i in 0..40 {
        fs::write(root.join(format!("dir-with-xattrs/child-{i:040}")), [i]).unwrap();
    }
    for (i, size) in [1, 4095, 4096, 4097, 16384, 65536, 65537, 1 << 20, (1 << 20) + 1, 3 << 20]
        .into_iter()
        .enumerate()
    {
        // Different content, so that files are in one piece.
        let bytes: Vec<u8> =
            (0..size).map(|at| u8::try_from((at * 7 + at / 251 + i * 31) % 256).unwrap()).collect();
        fs::write(root.join(format!("file{size}")), bytes).unwrap();
    }
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len((5 << 20) + 3).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"middle", (2 << 20) - 3).unwrap();
    fs::File::create(root.join("hole")).unwrap().set_len(70000).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"\xff\xfenot utf-8\n")), "named").unwrap();
    fs::write(root.join("n".repeat(255)), "named").unwrap();
    for name in ["...", "..a", "-dash", " space", "~"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    fs::hard_link(root.join("x3"), root.join("~/linked")).unwrap();
    fs::hard_link(root.join("x3"), root.join("!first")).unwrap();
    let old = fs::FileTimes::new()
        .set_modified(std::time::UNIX_EPOCH - std::time::Duration::from_nanos(1_500_000_000));
    fs::File::options().write(true).open(root.join("x5")).unwrap().set_times(old).unwrap();
}

/// Builds `dir/tree` in several ways and shows each image to all readers.
fn through_all_readers(dir: &Path) {
    let source = dir.join("tree");
    let want = describe(&source);
    for (i, options) in OPTIONS.into_iter().enumerate() {
        let what = |reader| format!("{reader}, {}", options.join(" "));
        let out = dir.join(format!("image{i}"));
        let built = create(&source, &out, options, b"");
        check(&built);
        assert_same(&read_image(&built), &want, &what("our reader"));
        // Without a compiled BLAKE3 that reader takes a minute for this much data.
        if options.contains(&"sha256") {
            check_by_rafs_reader(&built, &want, dir);
        }
        assert_erofs(&built, &want, &out, &options.join(" "));
    }
}
