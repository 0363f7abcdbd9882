//! Readers of images that share no code with us: fsck.erofs and the kernel.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::erofs::{Mount, devices};
use super::{Built, Tree, assert_same, describe, part, run};

/// Shows an image to fsck.erofs and the kernel: it is the tree `want`. `out` is for scratch.
pub fn assert_erofs(built: &Built, want: &Tree, out: &Path, what: &str) {
    let devices = devices(built, out);
    let fsck = by_fsck(built, &devices, out);
    assert_same(&fsck, &no_xattrs(want), &format!("fsck.erofs, {what}"));
    let mount = Mount::new(&built.bootstrap, &devices, out.join("mnt"));
    assert_same(&describe(&mount.at), want, &format!("kernel, {what}"));
    assert_links(&mount.at, want);
}

/// What `fsck.erofs` extracts; it must have nothing to complain of.
fn by_fsck(built: &Built, devices: &[PathBuf], out: &Path) -> Tree {
    let to = out.join("extracted");
    let mut fsck = Command::new(part("fsck_erofs"));
    for device in devices {
        fsck.arg(format!("--device={}", device.display()));
    }
    fsck.arg("--preserve").arg(format!("--extract={}", to.display()));
    run(fsck.arg(&built.bootstrap));
    no_xattrs(&describe(&to))
}

/// A tree without attributes: fsck.erofs 1.9 gives up a file's at the first with an empty value,
/// and loses `security.capability` when it sets the owner afterwards.
fn no_xattrs(tree: &Tree) -> Tree {
    let mut tree = tree.clone();
    tree.values_mut().for_each(|entry| entry.xattrs.clear());
    tree
}

/// The link counts the kernel shows are those of the source, not those we counted.
fn assert_links(root: &Path, want: &Tree) {
    use std::os::unix::fs::MetadataExt;
    for (path, entry) in want {
        let meta = fs::symlink_metadata(root.join(OsStr::from_bytes(&path[1..]))).unwrap();
        assert_eq!(meta.nlink(), entry.nlink, "links of {}", path.escape_ascii());
    }
}
