//! Real images, converted, read by programs that share no code with us: `rafs_reader.py`, `fsck.erofs` and the
//! kernel, which mounts all blobs of an image as devices. What they must read is what umoci unpacks.
//!
//! Needs root and a kernel with EROFS on files.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;
mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod parts;
    pub mod real_image;
    pub mod tree_text;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use build_support::erofs::{Mount, devices};
use build_support::{Built, check_by_rafs_reader, describe, part, rafs, run};
use support::parts::Parts;
use support::real_image::RealImage;
use support::tree_text;

#[test]
fn the_python_image() {
    let dir = tempfile::tempdir().unwrap();
    // `rafs_reader.py` needs a minute for this much of BLAKE3.
    let built = convert(RealImage::Python, dir.path(), &["--digester", "sha256"]);
    check_by_rafs_reader(&built, &describe(&RealImage::Python.tree().unwrap()), dir.path());
    fsck_and_mount(RealImage::Python, &built, dir.path());
    assert_eq!(in_pieces(&built), 0, "ranges of a DAX window that are no single mapping");
}

#[test]
fn the_node_image_in_lz4_and_small_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["--compressor", "lz4_block", "--chunk-size", "0x10000"];
    let built = convert(RealImage::Node, dir.path(), &options);
    fsck_and_mount(RealImage::Node, &built, dir.path());
    // A few files are parts of others.
    assert!(in_pieces(&built) <= 10, "{} ranges are no single mapping", in_pieces(&built));
}

/// How many ranges of 2 MiB, of all files, lie in more than one piece in the blobs.
fn in_pieces(built: &Built) -> u64 {
    let path = built.bootstrap.to_str().unwrap();
    let done = rafs(&["inspect", "--json", path], b"");
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let count = |name: &str| report["counts"][name].as_u64().unwrap();
    assert!(count("ranges") > 10_000, "{report}");
    count("ranges") - count("ranges_in_one_piece")
}

#[test]
fn the_nasty_image() {
    let dir = tempfile::tempdir().unwrap();
    let built = convert(RealImage::Nasty, dir.path(), &[]);
    // fsck.erofs gives up at a path of more than PATH_MAX.
    mount(RealImage::Nasty, &built, dir.path());
}

#[test]
fn the_nasty_image_merged_from_layers_that_were_made_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    let (layout, layers) = layers(RealImage::Nasty.source().unwrap().as_str());
    let mut merge = vec!["merge".to_owned(), "--bootstrap".to_owned()];
    merge.push(dir.path().join("merged.boot").display().to_string());
    for layer in layers {
        let packed = dir.path().join("packed");
        let create = [
            "create",
            "--type",
            "targz-rafs",
            "--blob-inline-meta",
            "--whiteout-spec",
            "none",
            "--blob",
        ];
        let mut args: Vec<String> = create.map(str::to_owned).into();
        args.push(packed.display().to_string());
        args.push(layout.join("blobs/sha256").join(&layer).display().to_string());
        succeed(&args);
        let digest = run(Command::new("sha256sum").arg(&packed));
        let blob = blobs.join(&digest[..64]);
        fs::rename(&packed, &blob).unwrap();
        merge.push(blob.display().to_string());
    }
    succeed(&merge);
    let built = Built { bootstrap: dir.path().join("merged.boot"), blobs };
    mount(RealImage::Nasty, &built, dir.path());
}

fn succeed(args: &[String]) {
    let done = rafs(args, b"");
    assert!(done.status.success(), "rafs {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// The directory of `oci:DIR:TAG`, and the layers of its only image, in hex.
fn layers(reference: &str) -> (PathBuf, Vec<String>) {
    let layout = PathBuf::from(reference.split(':').nth(1).unwrap());
    let json =
        |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let hex = |value: &Value| value["digest"].as_str().unwrap()["sha256:".len()..].to_owned();
    let index = json(layout.join("index.json"));
    let manifest = json(layout.join("blobs/sha256").join(hex(&index["manifests"][0])));
    let layers = manifest["layers"].as_array().unwrap().iter().map(hex).collect();
    (layout, layers)
}

/// `rafs convert` into an OCI layout; the blobs are where they are in it.
fn convert(image: RealImage, dir: &Path, options: &[&str]) -> Built {
    let target = format!("oci:{}:rafs", dir.join("layout").display());
    let mut args = vec!["convert".to_owned(), "--source".to_owned(), image.source().unwrap()];
    args.extend(["--target".to_owned(), target.clone()]);
    args.extend(options.iter().map(|&option| option.to_owned()));
    succeed(&args);
    let (layout, layers) = layers(&target);
    let blobs = layout.join("blobs/sha256");
    let last = blobs.join(layers.last().unwrap());
    run(Command::new("tar").arg("-xzf").arg(last).arg("-C").arg(dir).arg("image/image.boot"));
    Built { bootstrap: dir.join("image/image.boot"), blobs }
}

fn fsck_and_mount(image: RealImage, built: &Built, dir: &Path) {
    let devices = mount(image, built, dir);
    let mut fsck = Command::new(part("fsck_erofs"));
    for device in devices {
        fsck.arg(format!("--device={}", device.display()));
    }
    // It decodes all files, and writes none.
    run(fsck.arg("--extract").arg(&built.bootstrap));
}

/// The kernel's view of an image is umoci's tree, in all metadata and all content.
fn mount(image: RealImage, built: &Built, dir: &Path) -> Vec<PathBuf> {
    let parts = Parts::install(&["tools", "erofs", "images"]).unwrap();
    let devices = devices(built, dir);
    assert!(devices.len() >= 4, "each layer with data is a device: {devices:?}");
    let mount = Mount::new(&built.bootstrap, &devices, dir.join("mnt"));
    for function in ["metadata .", "contents .", "edges ."] {
        let text = |tree: &Path, name: &str| {
            let text = tree_text::describe(&parts, tree, function).unwrap();
            let file = dir.join(name);
            fs::write(&file, text).unwrap();
            file
        };
        let want = text(&image.tree().unwrap(), "want");
        let got = text(&mount.at, "got");
        let diff = Command::new("diff").arg("-U0").arg(want).arg(got).output().unwrap();
        let shown = String::from_utf8_lossy(&diff.stdout);
        let shown: Vec<&str> = shown.lines().take(40).collect();
        assert!(diff.status.success(), "{function} of {image:?}:\n{}", shown.join("\n"));
    }
    devices
}
