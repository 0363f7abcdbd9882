//! Tars of every maker and dialect show the tree that they were made of.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::build_support::{
    Tree, assert_same, check, describe, make_golden_tree, part, read_image, run,
};
use crate::create_from_tar;

/// What a dialect keeps of a tree.
#[derive(Clone, Copy)]
struct Keeps {
    nanoseconds: bool,
    xattrs: bool,
    /// Names, owners and types beyond what V7 and ustar can say.
    rich: bool,
}

const PAX: Keeps = Keeps { nanoseconds: true, xattrs: true, rich: true };
const GNU: Keeps = Keeps { nanoseconds: false, xattrs: false, rich: true };
const OLD: Keeps = Keeps { nanoseconds: false, xattrs: false, rich: false };

/// Files of every kind that a tar holds; `rich` ones and those that every dialect can say.
fn make_tree(root: &Path, rich: bool) {
    if rich {
        make_golden_tree("tarable", root);
    } else {
        fs::create_dir_all(root.join("d/e")).unwrap();
        fs::write(root.join("d/f"), "data").unwrap();
        fs::write(root.join("empty"), "").unwrap();
        fs::write(root.join("n".repeat(90)), "long").unwrap();
        fs::hard_link(root.join("d/f"), root.join("d/e/hard")).unwrap();
        symlink("d/f", root.join("link")).unwrap();
    }
    let sparse = fs::File::create(root.join("holes")).unwrap();
    sparse.set_len((1 << 20) + 5).unwrap();
    for i in 0..40_u64 {
        sparse.write_all_at(b"island", i * 24_576 + 100).unwrap();
    }
    let tail = fs::File::create(root.join("hole at the end")).unwrap();
    tail.set_len(300_000).unwrap();
    tail.write_all_at(&[7; 5000], 8192).unwrap();
    fs::File::create(root.join("only a hole")).unwrap().set_len(100_000).unwrap();
    if rich {
        let long = root.join("a".repeat(200)).join("b".repeat(200));
        fs::create_dir_all(&long).unwrap();
        fs::write(long.join("c".repeat(255)), "far").unwrap();
        symlink("t".repeat(3000), root.join("long link")).unwrap();
        fs::hard_link(long.join("c".repeat(255)), root.join("hard to far")).unwrap();
        fs::write(root.join(OsStr::from_bytes(b"not \xff utf-8")), "bytes").unwrap();
        fs::write(root.join("new\nline"), "n").unwrap();
        fs::write(root.join("binary xattr"), "x").unwrap();
        xattr::set(root.join("binary xattr"), "user.bin", b"a\n20 path=evil\n=\0\xff").unwrap();
        xattr::set(root.join("binary xattr"), "user.empty", b"").unwrap();
    }
}

fn kept(mut tree: Tree, keeps: Keeps) -> Tree {
    for entry in tree.values_mut() {
        if !keeps.nanoseconds {
            entry.mtime_nsec = 0;
        }
        if !keeps.xattrs {
            entry.xattrs.clear();
        }
    }
    tree
}

fn check_tar(dir: &Path, tar: &Path, keeps: Keeps, what: &str) {
    check_tar_less(dir, tar, keeps, what, |tree| tree);
}

/// As [`check_tar`], without what `less` takes out.
fn check_tar_less(dir: &Path, tar: &Path, keeps: Keeps, what: &str, less: impl Fn(Tree) -> Tree) {
    let tree = dir.join(if keeps.rich { "rich" } else { "old" });
    let out = dir.join("image");
    let built = create_from_tar(tar, &out, &["--chunk-size", "0x1000"]);
    check(&built);
    let got = less(kept(read_image(&built), Keeps { nanoseconds: true, ..keeps }));
    assert_same(&got, &less(kept(describe(&tree), keeps)), what);
    fs::remove_dir_all(&out).unwrap();
    fs::remove_file(tar).unwrap();
}

fn trees() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    make_tree(&dir.path().join("rich"), true);
    make_tree(&dir.path().join("old"), false);
    dir
}

#[test]
fn gnu_tar() {
    let dir = trees();
    // (options, what is kept)
    let cases: [(&[&str], Keeps); 11] = [
        (&["--format=v7"], OLD),
        (&["--format=ustar"], OLD),
        (&["--format=oldgnu"], GNU),
        (&["--format=gnu"], GNU),
        (&["--format=gnu", "--sparse"], GNU),
        (&["--format=pax", "--xattrs", "--xattrs-include=*"], PAX),
        (&["--format=pax", "--sparse", "--sparse-version=0.0"], Keeps { xattrs: false, ..PAX }),
        (&["--format=pax", "--sparse", "--sparse-version=0.1"], Keeps { xattrs: false, ..PAX }),
        (&["--format=pax", "--sparse", "--sparse-version=1.0"], Keeps { xattrs: false, ..PAX }),
        (&["--format=pax", "--sparse", "--xattrs", "--xattrs-include=*", "--gzip"], PAX),
        (&["--format=gnu", "--blocking-factor=1"], GNU),
    ];
    for (options, keeps) in cases {
        let what = format!("tar {}", options.join(" "));
        let tar = dir.path().join("made.tar");
        let tree = dir.path().join(if keeps.rich { "rich" } else { "old" });
        let mut command = Command::new("tar");
        command.args(options).arg("--numeric-owner").arg("-C").arg(&tree);
        run(command.arg("-cf").arg(&tar).arg("."));
        check_tar(dir.path(), &tar, keeps, &what);
    }
}

#[test]
fn absolute_names_of_gnu_tar() {
    let dir = trees();
    let (tar, tree) = (dir.path().join("made.tar"), dir.path().join("old"));
    let mut command = Command::new("tar");
    run(command.arg("--absolute-names").arg("-cf").arg(&tar).arg(&tree));
    let built = create_from_tar(&tar, &dir.path().join("image"), &[]);
    let prefix = tree.as_os_str().as_bytes();
    let got: Tree = read_image(&built)
        .into_iter()
        .filter_map(|(path, mut entry)| {
            let below = path.strip_prefix(prefix)?;
            let first = entry.first_name.strip_prefix(prefix)?.to_vec();
            let or_root = |path: Vec<u8>| if path.is_empty() { b"/".to_vec() } else { path };
            entry.first_name = or_root(first);
            Some((or_root(below.to_vec()), entry))
        })
        .collect();
    assert_same(&got, &kept(describe(&tree), OLD), "absolute names");
}

/// libarchive and star write ACLs as text in records of their own, which programs that unpack layers
/// do not look at; the mode is then that of the file's owner group.
fn without_acls(mut tree: Tree) -> Tree {
    tree.retain(|path, _| !path.starts_with(b"/xattr/acl"));
    tree
}

#[test]
fn bsdtar() {
    let dir = trees();
    let cases: [(&[&str], Keeps); 5] = [
        (&["--format=pax"], PAX),
        (&["--format=pax", "--zstd"], PAX),
        (&["--format=pax", "--no-read-sparse", "--gzip"], PAX),
        (&["--format=gnutar"], GNU),
        (&["--format=ustar"], OLD),
    ];
    for (options, keeps) in cases {
        let tar = dir.path().join("made.tar");
        let tree = dir.path().join(if keeps.rich { "rich" } else { "old" });
        let mut command = Command::new(part("bsdtar"));
        // Names that are no text it stores as bytes only if it is told that they are text of bytes.
        command.env("LC_ALL", "C.UTF-8").args(options).arg("--numeric-owner").arg("-C").arg(&tree);
        run(command.arg("-cf").arg(&tar).arg("."));
        let what = format!("bsdtar {}", options.join(" "));
        check_tar_less(dir.path(), &tar, keeps, &what, without_acls);
    }
}

#[test]
fn python_tarfile() {
    let dir = trees();
    for (format, keeps) in [("GNU", GNU), ("PAX", Keeps { xattrs: false, ..PAX }), ("USTAR", OLD)] {
        let tar = dir.path().join("made.tar");
        let tree = dir.path().join(if keeps.rich { "rich" } else { "old" });
        let program = format!(
            "import sys, tarfile\n\
             t = tarfile.open(sys.argv[1], 'w', format=tarfile.{format}_FORMAT)\n\
             t.add(sys.argv[2], arcname='.')\n\
             t.close()\n"
        );
        run(Command::new("python3").arg("-c").arg(program).arg(&tar).arg(&tree));
        // Python's times are floating point numbers, which round.
        let rounded = |mut tree: Tree| {
            for entry in tree.values_mut() {
                let up = entry.mtime_nsec >= 999_999_000;
                (entry.mtime, entry.mtime_nsec) = (entry.mtime + i64::from(up), 0);
            }
            tree
        };
        let out = dir.path().join("image");
        let built = create_from_tar(&tar, &out, &["--chunk-size", "0x1000"]);
        check(&built);
        let all = Keeps { nanoseconds: true, ..keeps };
        let got = rounded(kept(read_image(&built), all));
        assert_same(&got, &rounded(kept(describe(&tree), all)), &format!("tarfile {format}"));
        fs::remove_dir_all(&out).unwrap();
    }
}

/// Layers of umoci are made by Go's archive/tar.
#[test]
fn go_archive_tar() {
    let dir = trees();
    let layout = dir.path().join("layout");
    let image = format!("{}:image", layout.display());
    let umoci = |args: &[&OsStr]| run(Command::new(part("umoci")).args(args));
    umoci(&["init".as_ref(), "--layout".as_ref(), layout.as_ref()]);
    umoci(&["new".as_ref(), "--image".as_ref(), image.as_ref()]);
    let tree = dir.path().join("rich");
    umoci(&["insert".as_ref(), "--image".as_ref(), image.as_ref(), tree.as_ref(), "/".as_ref()]);
    let layer = fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read(path).unwrap().starts_with(b"\x1f\x8b"))
        .expect("a layer compressed with gzip");
    let built = create_from_tar(&layer, &dir.path().join("image"), &["--chunk-size", "0x1000"]);
    check(&built);
    let seconds = Keeps { nanoseconds: false, ..PAX };
    // Go's package writes no empty attribute.
    let not_empty = |mut tree: Tree| {
        tree.values_mut().for_each(|entry| entry.xattrs.retain(|_, value| !value.is_empty()));
        tree
    };
    let got = not_empty(kept(read_image(&built), seconds));
    assert_same(&got, &not_empty(kept(describe(&tree), seconds)), "umoci insert");
}
