//! Layers: tars of every maker, stacks of them, packed, merged and unpacked again.
//!
//! Needs root, python3, GNU tar and `scripts/parts erofs umoci bsdtar`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

#[path = "../build_support/mod.rs"]
mod build_support;

mod dialects;
mod golden;
mod oci_layout;
mod readers;
mod stacks;
mod unpack;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use build_support::{Built, rafs};

/// `rafs` with these arguments, which succeeds; its standard output.
fn rafs_ok<S: AsRef<OsStr>>(args: &[S], stdin: &[u8]) -> String {
    let done = rafs(args, stdin);
    let shown: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "rafs {}: {stderr}", shown.join(" "));
    String::from_utf8(done.stdout).unwrap()
}

/// An image of one tar alone.
fn create_from_tar(tar: &Path, out: &Path, options: &[&str]) -> Built {
    let mut args: Vec<&OsStr> =
        ["create", "-t", "tar-rafs", "-D"].iter().map(AsRef::as_ref).collect();
    args.push(out.as_ref());
    args.extend(options.iter().map(OsStr::new));
    args.push(tar.as_ref());
    rafs_ok(&args, b"");
    Built { bootstrap: out.join("image.boot"), blobs: out.to_owned() }
}

/// Packs a layer into `dir`; the packed blob.
fn pack(tar: &Path, dir: &Path, options: &[&str]) -> PathBuf {
    let fixed =
        ["create", "-t", "tar-rafs", "-i", "-F", "blob-toc", "--whiteout-spec", "none", "-D"];
    let mut args: Vec<&OsStr> = fixed.iter().map(AsRef::as_ref).collect();
    args.push(dir.as_ref());
    args.extend(options.iter().map(OsStr::new));
    args.push(tar.as_ref());
    let text = rafs_ok(&args, b"");
    let id = text.lines().find_map(|line| line.strip_prefix("blob id ")).unwrap().trim().to_owned();
    dir.join(id)
}

/// Merges packed layers, lowest first.
fn merge(layers: &[PathBuf], bootstrap: &Path, options: &[&str], stdin: &[u8]) -> Built {
    let mut args: Vec<&OsStr> = vec!["merge".as_ref(), "-B".as_ref(), bootstrap.as_ref()];
    args.extend(options.iter().map(OsStr::new));
    args.extend(layers.iter().map(|path| path.as_os_str()));
    rafs_ok(&args, stdin);
    Built { bootstrap: bootstrap.to_owned(), blobs: layers[0].parent().unwrap().to_owned() }
}

/// A tar made of a directory as the golden layers were.
fn golden_tar(tree: &Path, tar: &Path) {
    use std::process::Command;
    let mut command = Command::new("tar");
    command
        .args(["--format=pax", "--pax-option=delete=atime,delete=ctime", "--xattrs"])
        .args(["--xattrs-include=*", "--sort=name", "--numeric-owner", "-C"])
        .arg(tree)
        .arg("-cf")
        .arg(tar)
        .arg(".");
    build_support::run(&mut command);
    assert!(fs::metadata(tar).unwrap().len() > 0);
}
