//! What is unpacked is what was packed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::build_support::{Tree, assert_same, create, describe, make_golden_tree, rafs, run};
use crate::{golden_tar, merge, pack, rafs_ok};

fn make_tree(root: &Path) {
    make_golden_tree("small", root);
    let sparse = fs::File::create(root.join("holes")).unwrap();
    sparse.set_len(10 << 20).unwrap();
    sparse.write_all_at(b"island", 5 << 20).unwrap();
    fs::write(root.join("z".repeat(255)), "long name").unwrap();
    xattr::set(root.join("hello.txt"), "user.bin", b"a\n20 path=evil\n=\0\xff").unwrap();
    xattr::set(root.join("dev/null"), "trusted.on-a-device", b"1").unwrap();
}

/// Bytes on disk of all files.
fn blocks(root: &Path) -> u64 {
    walkdir::WalkDir::new(root)
        .into_iter()
        .map(|entry| entry.unwrap().metadata().unwrap())
        .filter(fs::Metadata::is_file)
        .map(|meta| meta.blocks() * 512)
        .sum()
}

fn sockets_gone(mut tree: Tree) -> Tree {
    tree.retain(|_, entry| entry.kind != "socket");
    tree
}

#[test]
fn a_tree_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    let want = describe(&tree);
    for (i, options) in
        [&["--chunk-size", "0x1000"][..], &["--compressor", "lz4_block"], &["--compressor", "none"]]
            .into_iter()
            .enumerate()
    {
        let what = options.join(" ");
        let built = create(&tree, &dir.path().join(format!("image{i}")), options, b"");
        let to = dir.path().join(format!("out{i}"));
        let args = |more: [&str; 1], to: &Path| -> Vec<std::ffi::OsString> {
            let mut args: Vec<std::ffi::OsString> = vec!["unpack".into(), "-B".into()];
            args.extend([built.bootstrap.clone().into(), "-D".into(), built.blobs.clone().into()]);
            args.push(more[0].into());
            args.push(to.into());
            args
        };
        rafs_ok(&args(["--output-dir"], &to), b"");
        assert_same(&describe(&to), &want, &format!("directory, {what}"));
        assert!(blocks(&to) <= blocks(&tree) + (2 << 20), "holes stay holes");

        let tar = dir.path().join("out.tar");
        rafs_ok(&args(["-o"], &tar), b"");
        assert!(fs::metadata(&tar).unwrap().len() < 4 << 20, "holes stay holes");
        // Three other programs read it.
        for program in ["tar", "bsdtar", "ours"] {
            let to = dir.path().join(format!("{program}{i}"));
            fs::create_dir(&to).unwrap();
            match program {
                "tar" => {
                    let mut command = Command::new("tar");
                    command.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-C"]);
                    run(command.arg(&to).arg("-xpf").arg(&tar));
                }
                "bsdtar" => {
                    let bsdtar = crate::build_support::part("bsdtar");
                    let mut command = Command::new(bsdtar);
                    command.env("LC_ALL", "C.UTF-8").args(["--xattrs", "--numeric-owner", "-C"]);
                    run(command.arg(&to).arg("-xpf").arg(&tar));
                }
                _ => {
                    let image = dir.path().join(format!("again{i}"));
                    let built = crate::create_from_tar(&tar, &image, &[]);
                    let args: [&OsStr; 7] = [
                        "unpack".as_ref(),
                        "-B".as_ref(),
                        built.bootstrap.as_ref(),
                        "-D".as_ref(),
                        built.blobs.as_ref(),
                        "--output-dir".as_ref(),
                        to.as_ref(),
                    ];
                    rafs_ok(&args, b"");
                }
            }
            let mut got = describe(&to);
            let mut want = sockets_gone(want.clone());
            if program == "bsdtar" {
                // It takes times before the epoch for damage, and drops empty attributes and ACLs
                // that are attributes.
                for tree in [&mut got, &mut want] {
                    for entry in tree.values_mut() {
                        let acl = |name: &[u8]| name.starts_with(b"system.posix_acl");
                        entry.xattrs.retain(|name, value| !value.is_empty() && !acl(name));
                    }
                    // The time of the directory that it fills is not restored.
                    tree.get_mut(&b"/"[..]).unwrap().mtime = 0;
                    tree.get_mut(&b"/"[..]).unwrap().mtime_nsec = 0;
                    for entry in tree.values_mut() {
                        if entry.mtime < 0 {
                            (entry.mtime, entry.mtime_nsec) = (0, 0);
                        }
                    }
                }
            }
            assert_same(&got, &want, &format!("{program}, {what}"));
        }
    }
}

#[test]
fn layers_and_images_of_several_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for kind in ["lower", "upper"] {
        make_golden_tree(kind, &path(kind));
        golden_tar(&path(kind), &path(&format!("{kind}.tar")));
    }
    let blobs = path("blobs");
    let layers = ["lower", "upper"].map(|kind| pack(&path(&format!("{kind}.tar")), &blobs, &[]));
    // A packed blob holds its data.
    let unpack = |args: &[&OsStr], to: &Path| {
        let fixed: [&OsStr; 3] = ["unpack".as_ref(), "--output-dir".as_ref(), to.as_ref()];
        rafs_ok(&[&fixed[..], args].concat(), b"");
        describe(to)
    };
    let got = unpack(&["-B".as_ref(), layers[0].as_ref()], &path("lower.out"));
    assert_same(&got, &describe(&path("lower")), "a packed blob");
    let boot = path("boot");
    merge(&layers, &boot, &[], b"");
    let got =
        unpack(&["-B".as_ref(), boot.as_ref(), "-D".as_ref(), blobs.as_ref()], &path("merged.out"));
    assert_eq!(got.len(), 24);
    assert_eq!(got[&b"/dir2file"[..]].kind, "file");
}

#[test]
fn damage_and_odd_places_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "some content that is stored").unwrap();
    let built = create(&tree, &dir.path().join("image"), &["--compressor", "none"], b"");
    let blob = built.blobs.join(built.open().blobs()[0].id.as_str());
    let (boot, image) = (path("image/image.boot"), path("image"));
    let unpack = |args: &[&str]| {
        let done = rafs(&[&["unpack", "-B"], args].concat(), b"");
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    fs::create_dir(path("full")).unwrap();
    fs::write(path("full/x"), "").unwrap();
    // (arguments, exit code, what the message says)
    let (full, out, none, missing) = (path("full"), path("out"), path("none"), path("missing"));
    let cases: [(&[&str], i32, &str); 5] = [
        (&[&boot, "-D", &image, "--output-dir", &full], 1, "is not empty"),
        (&[&boot, "-D", &image], 2, "--output"),
        (&[&boot, "--output-dir", &none], 1, "no place is given"),
        (&[&boot, "-D", &full, "--output-dir", &out], 1, "No such file"),
        (&[&missing, "-D", &image, "-o", &out], 1, "No such file"),
    ];
    for (args, code, message) in cases {
        let (got, stderr) = unpack(args);
        assert!(got == Some(code) && stderr.contains(message), "{args:?}: {got:?}, {stderr}");
    }
    let mut bytes = fs::read(&blob).unwrap();
    bytes[3] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let tar = path("damaged.tar");
    let (code, stderr) = unpack(&[&boot, "-D", &image, "-o", &tar]);
    assert!(code == Some(1) && stderr.contains("/file: chunk 0"), "{stderr}");
    assert!(!Path::new(&tar).exists(), "a tar with wrong bytes must not appear");
}
