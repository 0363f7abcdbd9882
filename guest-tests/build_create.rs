//! `rafs create` as a user runs it: what it prints, what it refuses, what it promises for large
//! trees and files.
//!
//! Needs root: devices and `trusted.` attributes are made.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use build_support::{
    Content, Tree, assert_same, create, describe, make_golden_tree, rafs, read_image, repository,
    run,
};
use rafsd::rafs::FileKind;
use rafsd::rafs::layout::ImageFlags;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Bootstrap and blobs of an image, by name.
fn files_of(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn the_same_tree_gives_the_same_bytes_whatever_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_golden_tree("full", &tree);
    // Many runs, with chunks that repeat across them: who is first must not depend on the threads.
    for i in 0..60_u32 {
        let bytes: Vec<u8> = (0..400_000_u32)
            .map(|at| ((at / 4096) % (3 + i % 7)).wrapping_mul(i % 5 + at % 11).to_le_bytes()[0])
            .collect();
        fs::write(tree.join(format!("repeat{i:02}")), bytes).unwrap();
    }
    for options in [
        &["--chunk-size", "0x1000"][..],
        &["--compressor", "lz4_block", "--digester", "sha256", "--chunk-size", "0x4000"],
        &["--compressor", "none"],
    ] {
        let build = |threads: &str| {
            let out = tempfile::tempdir().unwrap();
            create(&tree, out.path(), &[options, &["--threads", threads]].concat(), b"");
            files_of(out.path())
        };
        let want = build("1");
        for threads in ["2", "7", "2"] {
            assert!(build(threads) == want, "{options:?} on {threads} threads differs");
        }
    }
}

#[test]
fn a_directory_of_65000_names_lists_and_finds_them_all() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let name = |i: usize| format!("{i:05}{}", "n".repeat(i * 37 % 251));
    for i in 0..65000 {
        // Empty files cost an inode each; links to one of them do not.
        if i % 60000 == 0 {
            fs::write(tree.join(name(i)), "").unwrap();
        } else {
            fs::hard_link(tree.join(name(i / 60000 * 60000)), tree.join(name(i))).unwrap();
        }
    }
    let image = create(&tree, &dir.path().join("image"), &[], b"").open();
    let root = image.inode(image.root()).unwrap();
    let entries = root.dir().unwrap().entries_from(0).unwrap();
    let names: Vec<Vec<u8>> = entries.map(|e| e.unwrap().name.to_vec()).collect();
    let want: Vec<Vec<u8>> = [".".to_owned(), "..".to_owned()]
        .into_iter()
        .chain((0..65000).map(name))
        .map(String::into_bytes)
        .collect();
    assert!(names == want, "names differ");
    for i in (0..65000).step_by(97) {
        let found = root.dir().unwrap().lookup(name(i).as_bytes()).unwrap().expect("listed");
        assert_eq!(image.inode(found.nid).unwrap().nlink(), [60000, 5000][i / 60000]);
    }
}

#[test]
fn a_sparse_file_of_5_gib_costs_neither_time_nor_memory() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let size = 5 * 1024 * MIB + 3;
    let file = fs::File::create(tree.join("five")).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(b"island", 4096 * MIB + MIB - 3).unwrap();
    file.write_all_at(b"end", size - 3).unwrap();
    let out = dir.path().join("image");
    let (peak_kib, cpu_time) = cost(["-D".as_ref(), out.as_ref(), tree.as_ref()]);
    assert!(cpu_time < Duration::from_secs(5), "took {cpu_time:?}");
    // 6 runs of at most 1 MiB read and 1 MiB packed, and the program itself.
    assert!(peak_kib < 48 << 10, "{peak_kib} KiB at the peak");

    let built = build_support::Built { bootstrap: out.join("image.boot"), blobs: out };
    let image = built.open();
    let root = image.inode(image.root()).unwrap();
    let nid = root.dir().unwrap().lookup(b"five").unwrap().unwrap().nid;
    let inode = image.inode(nid).unwrap();
    assert_eq!((inode.size(), inode.chunk_count()), (size, 5121));
    let index = |i| inode.chunk(i).unwrap().chunk_index();
    // Chunks in the order of first use: zeros, "isl", "and", "end".
    for i in 0..5120 {
        let want = if i == 4096 {
            1
        } else if i == 4097 {
            2
        } else {
            0
        };
        assert_eq!(index(i), want, "chunk {i}");
    }
    assert_eq!(index(5120), 3);
    let records = image.chunk_records();
    assert_eq!(records.len(), 4);
    Content::open(&image, &built.blobs);
}

/// Runs `rafs` on two threads; its largest resident set in KiB, and its processor time.
///
/// The kernel counts what a process was before `exec` too, so its parent must be small: not us.
fn cost(args: [&OsStr; 3]) -> (u64, Duration) {
    const MEASURE: &str = "
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)";
    let rafs = [env!("CARGO_BIN_EXE_rafs"), "create", "--threads", "2"];
    let out = run(Command::new("python3").args(["-c", MEASURE]).args(rafs).args(args));
    let (peak_kib, cpu_seconds) = out.trim().split_once(' ').unwrap();
    (peak_kib.parse().unwrap(), Duration::from_secs_f64(cpu_seconds.parse().unwrap()))
}

#[test]
fn memory_is_bounded_while_a_large_file_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let file = fs::File::create(tree.join("large")).unwrap();
    let mut block = vec![0_u8; 1 << 20];
    for i in 0..300_u64 {
        for (at, byte) in block.iter_mut().enumerate() {
            *byte = ((at as u64 * 31 + i * 7919) >> 3).to_le_bytes()[0];
        }
        file.write_all_at(&block, i * MIB).unwrap();
    }
    let out = dir.path().join("image");
    let (peak_kib, _) = cost(["-D".as_ref(), out.as_ref(), tree.as_ref()]);
    assert!(peak_kib < 48 << 10, "{peak_kib} KiB at the peak for a file of 300 MiB");
}

#[test]
fn paths_longer_than_path_max_are_built() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    let name = "d".repeat(250);
    let mut fd: std::os::fd::OwnedFd = fs::File::open(&root).unwrap().into();
    let depth = 30;
    for _ in 0..depth {
        use rustix::fs::{Mode, OFlags, mkdirat, openat};
        mkdirat(&fd, &name, Mode::from_raw_mode(0o755)).unwrap();
        fd = openat(&fd, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    let leaf = rustix::fs::openat(
        &fd,
        "leaf",
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
        rustix::fs::Mode::from_raw_mode(0o644),
    )
    .unwrap();
    rustix::io::write(&leaf, b"deep").unwrap();
    rustix::fs::fsetxattr(&leaf, "user.deep", b"too", rustix::fs::XattrFlags::empty()).unwrap();

    let built = create(&root, &dir.path().join("image"), &[], b"");
    let image = built.open();
    let deepest = image.walk().map(Result::unwrap).last().unwrap();
    assert_eq!(deepest.path().len(), depth * 251 + 5);
    assert_eq!(Content::open(&image, &built.blobs).of(&deepest.inode), b"deep");
    assert_eq!(deepest.inode.xattrs().unwrap().get(b"user.deep"), Some(&b"too"[..]));
    // fs::remove_dir_all of the temporary directory can do this too: it does not use long paths.
}

#[test]
fn whiteouts_are_dropped_by_the_convention_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("opaque/.wh.dir/below")).unwrap();
    for name in [".wh.gone", "opaque/.wh..wh..opq", "kept", "opaque/.wh.dir/below/f"] {
        fs::write(tree.join(name), name).unwrap();
    }
    for (name, minor) in [("removed", 0), ("null", 3)] {
        mknod(&tree.join(name), libc::S_IFCHR, libc::makedev(u32::from(minor > 0), minor));
    }
    fs::hard_link(tree.join("kept"), tree.join(".wh.link")).unwrap();
    xattr::set(tree.join("opaque"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(tree.join("opaque"), "trusted.overlay.origin", b"o").unwrap();
    let all = describe(&tree);
    // What each convention leaves out.
    let oci = |path: &[u8]| path.windows(5).any(|part| part == b"/.wh.");
    let overlayfs = |path: &[u8]| path == b"/removed";
    type Dropped<'a> = &'a dyn Fn(&[u8]) -> bool;
    let cases: [(&[&str], Dropped<'_>, bool); 4] = [
        (&[], &oci, false),
        (&["--whiteout-spec", "oci"], &oci, false),
        (&["--whiteout-spec", "overlayfs"], &overlayfs, true),
        (&["--whiteout-spec", "none"], &|_| false, false),
    ];
    for (i, (options, dropped, opaque)) in cases.into_iter().enumerate() {
        let mut want: Tree = all.clone();
        want.retain(|path, _| !dropped(path));
        if opaque {
            let xattrs = &mut want.get_mut(&b"/opaque"[..]).unwrap().xattrs;
            xattrs.remove(&b"trusted.overlay.opaque"[..]).unwrap();
        }
        // Names and directories that were dropped do not count as links.
        let kept_names =
            want.values().filter(|e| e.sha256.is_some() && e.sha256 == all[&b"/kept"[..]].sha256);
        let kept_names = kept_names.count() as u64;
        for (path, entry) in &mut want {
            if path == b"/opaque" && dropped(b"/opaque/.wh.dir") {
                entry.nlink = 2;
            }
            if path == b"/kept" {
                entry.nlink = kept_names;
                entry.first_name = path.clone();
            }
        }
        if want.contains_key(&b"/.wh.link"[..]) {
            for path in [&b"/kept"[..], b"/.wh.link"] {
                let entry = want.get_mut(path).unwrap();
                (entry.nlink, entry.first_name) = (2, b"/.wh.link".to_vec());
            }
        }
        let built = create(&tree, &dir.path().join(format!("image{i}")), options, b"");
        assert_same(&read_image(&built), &want, &format!("{options:?}"));
    }
}

fn mknod(path: &Path, kind: u32, dev: u64) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the pointer is to a string that ends with NUL and outlives the call.
    let done = unsafe { libc::mknod(path.as_ptr(), kind | 0o644, dev) };
    assert_eq!(done, 0, "mknod: {}", std::io::Error::last_os_error());
}

#[test]
fn every_type_of_file_and_every_namespace_of_attributes() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_golden_tree("small", &tree);
    xattr::set(tree.join("dev/fifo"), "trusted.on-a-fifo", b"1").unwrap();
    xattr::set(tree.join("dev/wide"), "security.on-a-device", b"\0\xff").unwrap();
    xattr::set(&tree, "user.on-the-root", b"r").unwrap();
    let built = create(&tree, &dir.path().join("image"), &[], b"");
    let got = read_image(&built);
    assert_same(&got, &describe(&tree), "small tree");
    let kinds: std::collections::BTreeSet<_> = got.values().map(|e| e.kind).collect();
    assert_eq!(kinds.len(), 7, "the tree should have every type: {kinds:?}");
    assert!(built.open().flags().contains(ImageFlags::HAS_XATTR));
}

#[test]
fn prefetch_patterns_go_into_the_table_only_by_policy_fs() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("d")).unwrap();
    for name in ["a", "b", "d/c"] {
        fs::write(tree.join(name), name).unwrap();
    }
    // (policy, patterns, first file in the blob, entries of the table)
    let cases = [
        ("none", "/d\n", "a", 0),
        ("blob", "/d\n", "d/c", 0),
        ("fs", "/d\n/none\n/b", "d/c", 2),
        ("fs", "", "a", 0),
        ("fs", "/\n", "a", 1),
    ];
    for (i, (policy, patterns, first, entries)) in cases.into_iter().enumerate() {
        let out = dir.path().join(format!("image{i}"));
        let options = ["--prefetch-policy", policy, "--compressor", "none"];
        let built = create(&tree, &out, &options, patterns.as_bytes());
        let image = built.open();
        let blob = fs::read(out.join(image.blobs()[0].id.as_str())).unwrap();
        assert!(blob.starts_with(first.as_bytes()), "{policy} {patterns:?}");
        assert_eq!(image.prefetch_nids().count(), entries, "{policy} {patterns:?}");
    }
    // Without a blob there is nothing to fetch.
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let built = create(&empty, &dir.path().join("none"), &["--prefetch-policy", "fs"], b"/\n");
    assert_eq!(built.open().prefetch_nids().count(), 0);
}

#[test]
fn the_summary_says_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), [7; 10000]).unwrap();
    fs::write(tree.join("b"), [7; 10000]).unwrap();
    fs::hard_link(tree.join("a"), tree.join("c")).unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string();
    let done = rafs(
        &[
            "create".into(),
            "--bootstrap".into(),
            path("boot"),
            "--blob".into(),
            path("data"),
            "--output-json".into(),
            path("out.json"),
            "--chunk-size=4096".into(),
            path("tree"),
        ],
        b"",
    );
    assert!(done.status.success());
    assert_eq!(done.stderr, b"", "there is no progress bar without a terminal");
    let summary: Value = serde_json::from_slice(&fs::read(path("out.json")).unwrap()).unwrap();
    let want = [
        ("fs_version", Value::from("6")),
        ("paths", 4.into()),
        ("files", 2.into()),
        ("file_bytes", 20000.into()),
        ("chunks", 6.into()),
        ("distinct_chunks", 2.into()),
        ("distinct_bytes", (4096 + 1808).into()),
        ("blob_bytes", fs::metadata(path("data")).unwrap().len().into()),
        ("bootstrap_bytes", fs::metadata(path("boot")).unwrap().len().into()),
    ];
    for (key, value) in want {
        assert_eq!(summary[key], value, "{key}");
    }
    let text = String::from_utf8(done.stdout).unwrap();
    let id = summary["blobs"][0].as_str().unwrap();
    for line in [
        &format!("blob id    {id}\n"),
        "paths      4, of them 2 files\n",
        "chunks     6, 2 stored: 70.5 % saved by dedup\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
}

#[test]
fn help_is_the_documentation() {
    let file = repository().join("guest-tests/snapshots/rafs-create-help.txt");
    let help = String::from_utf8(rafs(&["create", "--help"], b"").stdout).unwrap();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&file, &help).unwrap();
    }
    let want = fs::read_to_string(&file).unwrap();
    assert_eq!(help, want, "if this is meant, run the test with UPDATE_SNAPSHOTS=1");
}

#[test]
fn failures_name_the_file_and_the_reason_and_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
    fs::create_dir_all(path("tree/sub")).unwrap();
    fs::write(path("tree/sub/f"), "data").unwrap();
    fs::write(path("file"), "").unwrap();
    fs::create_dir(path("a-directory")).unwrap();
    // (arguments, exit code, what the message says)
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["-D", &path("out"), &path("no-such")], 1, &[&path("no-such"), "No such file"]),
        (&["-D", &path("out"), &path("file")], 1, &[&path("file"), "Not a directory"]),
        (&["-B", &path("no/boot"), &path("tree")], 1, &[&path("no"), "No such file"]),
        (
            &["-D", &path("out"), "-B", &path("a-directory"), &path("tree")],
            1,
            &[&path("a-directory"), "not a regular file"],
        ),
        (&["-D", &path("out"), "-B", "/dev/null", &path("tree")], 1, &["/dev/null"]),
        (&[&path("tree")], 2, &["--bootstrap <FILE>|--blob-dir <DIR>"]),
        (&["-B", &path("x"), "-b", &path("x"), &path("tree")], 2, &["one file"]),
        (&["-D", &path("out"), "--fs-version", "5", &path("tree")], 2, &["RAFS v5"]),
        (&["-D", &path("out"), "--compressor", "gzip", &path("tree")], 2, &["gzip"]),
    ];
    for (args, code, messages) in cases {
        let done = rafs(&[&["create"], args].concat(), b"");
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(code), "{args:?}: {stderr}");
        if code == 1 {
            assert!(stderr.starts_with("rafs: ") && stderr.lines().count() == 1, "{stderr}");
        }
        for message in messages {
            assert!(stderr.contains(message), "{args:?}: {message:?} is not in {stderr}");
        }
    }
    let left: Vec<_> = fs::read_dir(path("out"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|name| name.len() != 64)
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn a_blob_that_cannot_be_written_ends_the_build() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
    fs::create_dir(&tree).unwrap();
    for i in 0..100_u32 {
        let noise = |at: u32| crc32c::crc32c(&[at.to_le_bytes(), i.to_le_bytes()].concat());
        let bytes: Vec<u8> = (0..50_000).map(|at| noise(at).to_le_bytes()[0]).collect();
        fs::write(tree.join(format!("f{i:03}")), bytes).unwrap();
    }
    // A limit for the size of files is the nearest to a full disk that needs no disk.
    for threads in ["1", "5"] {
        let done = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""])
            .args([env!("CARGO_BIN_EXE_rafs"), "create", "--threads", threads, "-D"])
            .args([&out, &tree])
            .output()
            .unwrap();
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("cannot write") && stderr.contains("too large"), "{stderr}");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "a half blob stays behind");
    }
}

#[test]
fn a_file_that_may_not_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for i in 0..300 {
        fs::write(tree.join(format!("f{i:03}")), "data").unwrap();
    }
    use std::os::unix::fs::PermissionsExt;
    for name in ["f100", "f250"] {
        fs::set_permissions(tree.join(name), fs::Permissions::from_mode(0o000)).unwrap();
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // Root may read everything, so this needs another user, who must reach the program.
    let program = dir.path().join("rafs");
    fs::copy(env!("CARGO_BIN_EXE_rafs"), &program).unwrap();
    for threads in ["1", "4"] {
        let done = Command::new(&program)
            .args(["create", "--threads", threads, "-D"])
            .args([dir.path().join(format!("out{threads}")), tree.clone()])
            .uid(65534)
            .gid(65534)
            .output()
            .unwrap();
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(1), "{stderr}");
        // Always the first of them.
        assert!(stderr.contains("f100") && stderr.contains("Permission denied"), "{stderr}");
    }
}

#[test]
fn names_of_all_bytes_and_the_longest() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for byte in (1..=255_u8).filter(|&b| b != b'/' && b != b'.') {
        fs::write(tree.join(OsStr::from_bytes(&[byte])), [byte]).unwrap();
        fs::write(tree.join(OsStr::from_bytes(&[byte; 255])), [byte]).unwrap();
    }
    let built = create(&tree, &dir.path().join("image"), &[], b"");
    assert_same(&read_image(&built), &describe(&tree), "names");
    let image = built.open();
    let regular = |item: &rafsd::rafs::WalkItem<'_>| item.inode.kind() == FileKind::Regular;
    assert_eq!(image.walk().map(Result::unwrap).filter(regular).count(), 253 * 2);
}
