//! Merged images of several blobs, read by programs that share no code with us.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::build_support::foreign::assert_erofs;
use crate::build_support::{
    assert_same, check, check_by_rafs_reader, describe, make_golden_tree, read_image,
};
use crate::{golden_tar, merge, pack};

/// Two large trees and some small layers, one of them without data; the tree they make.
fn make_layers(dir: &Path, options: &[&str]) -> Vec<PathBuf> {
    let blobs = dir.join("blobs");
    let layer = |name: &str, fill: &dyn Fn(&Path)| {
        let tree = dir.join(name);
        fill(&tree);
        let tar = dir.join(format!("{name}.tar"));
        golden_tar(&tree, &tar);
        pack(&tar, &blobs, options)
    };
    vec![
        layer("base", &|tree| make_golden_tree("tarable", tree)),
        layer("links", &|tree| {
            fs::create_dir_all(tree.join("links")).unwrap();
            symlink("../hello.txt", tree.join("links/more")).unwrap();
        }),
        layer("more", &|tree| {
            fs::create_dir_all(tree.join("added/below")).unwrap();
            fs::write(tree.join("added/below/big"), vec![7; 3 << 20]).unwrap();
            fs::write(tree.join(".wh.emptydir"), "").unwrap();
            fs::write(tree.join("hello.txt"), "another hello").unwrap();
        }),
    ]
}

#[test]
fn merged_images_through_all_readers() {
    for options in [
        &["--digester", "sha256"][..],
        &["--compressor", "lz4_block", "--chunk-size", "0x1000", "--digester", "sha256"],
        &["--compressor", "none", "--chunk-size", "0x4000", "--digester", "sha256"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let layers = make_layers(dir.path(), options);
        let merged = merge(&layers, &dir.path().join("boot"), &[], b"");
        assert_eq!(merged.open().blobs().len(), 2, "the layer of links has no data");
        check(&merged);
        // What the layers make, applied by hand.
        let root = dir.path().join("base");
        fs::remove_dir(root.join("emptydir")).unwrap();
        crate::build_support::run(
            std::process::Command::new("cp")
                .arg("-a")
                .arg(dir.path().join("links/."))
                .arg(dir.path().join("more/."))
                .arg(&root),
        );
        fs::remove_file(root.join(".wh.emptydir")).unwrap();
        copy_attributes(&dir.path().join("more"), &root);
        copy_attributes(&dir.path().join("links/links"), &root.join("links"));
        let want = describe(&root);
        let what = options.join(" ");
        assert_same(&read_image(&merged), &want, &what);
        check_by_rafs_reader(&merged, &want, dir.path());
        assert_erofs(&merged, &want, dir.path(), &what);
    }
}

fn copy_attributes(from: &Path, to: &Path) {
    let mut command = std::process::Command::new("touch");
    crate::build_support::run(command.arg("-r").arg(from).arg(to));
}

/// From 22 blobs on the blob table does not fit behind the device table's block.
#[test]
fn many_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, tree) = (dir.path().join("blobs"), dir.path().join("tree"));
    fs::create_dir(&tree).unwrap();
    let mut layers = Vec::new();
    for i in 0..30 {
        let layer = dir.path().join("layer");
        fs::create_dir_all(&layer).unwrap();
        let name = format!("file{i}");
        for dir in [&layer, &tree] {
            fs::write(dir.join(&name), format!("content {i}").repeat(1000)).unwrap();
        }
        copy_attributes(&layer.join(&name), &tree.join(&name));
        let tar = dir.path().join("layer.tar");
        golden_tar(&layer, &tar);
        copy_attributes(&layer, &tree);
        layers.push(pack(&tar, &blobs, &["--digester", "sha256"]));
        fs::remove_dir_all(&layer).unwrap();
    }
    let merged = merge(&layers, &dir.path().join("boot"), &[], b"");
    assert_eq!(merged.open().blobs().len(), 30);
    check(&merged);
    let want = describe(&tree);
    check_by_rafs_reader(&merged, &want, dir.path());
    assert_erofs(&merged, &want, dir.path(), "30 blobs");
}
