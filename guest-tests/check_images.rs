//! `rafs check --source --target` against a real registry, real images, and what umoci unpacks.
//!
//! Needs root and `scripts/parts registry skopeo umoci images`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod parts;
    pub mod real_image;
    pub mod registry;
    pub mod tree_text;
}

use std::fs;
use std::process::Command;

use serde_json::Value;
use support::real_image::RealImage;
use support::registry::{Registry, Setup};

/// Runs rafs with the registry's user and authority; its exit code and output.
fn rafs(registry: &Registry, args: &[&str]) -> (i32, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_rafs"))
        .args(args)
        .arg("--ca-file")
        .arg(registry.ca())
        .env("DOCKER_CONFIG", registry.docker_config())
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&done.stdout).into_owned();
    let error = String::from_utf8_lossy(&done.stderr);
    (done.status.code().unwrap_or(-1), format!("{out}{error}"))
}

/// From a registry with users and TLS, converted in it, proven, then damaged where the registry keeps it.
#[test]
fn a_converted_image_is_proven_and_one_flipped_bit_in_the_registry_disproves_it() {
    let user = Some(("someone".to_owned(), "pass:word".to_owned()));
    let registry = Registry::start(Setup { user, tls: true }).unwrap();
    registry.push(&RealImage::Nasty.source().unwrap(), "nasty:1", &["--preserve-digests"]).unwrap();
    let (source, target) = (registry.reference("nasty:1"), registry.reference("nasty:rafs"));
    let pair = ["--source", &source, "--target", &target];
    let (code, said) = rafs(&registry, &[&["check"], &pair[..]].concat());
    assert_eq!(code, 2, "there is no target yet: {said}");
    let (code, said) = rafs(&registry, &[&["convert"], &pair[..]].concat());
    assert_eq!(code, 0, "{said}");
    let (code, said) = rafs(&registry, &[&["check"], &pair[..]].concat());
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("\nfile system   same\n"), "{said}");

    let manifest = registry.manifest("nasty:rafs").unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    for layer in [&layers[0], &layers[layers.len() - 1], &manifest["config"]] {
        let digest = layer["digest"].as_str().unwrap();
        let path = registry.blob_file(digest);
        let sound = fs::read(&path).unwrap();
        let mut damaged = sound.clone();
        damaged[sound.len() / 3] ^= 4;
        fs::write(&path, damaged).unwrap();
        let (code, said) = rafs(&registry, &[&["check", "--json"], &pair[..]].concat());
        fs::write(&path, sound).unwrap();
        assert_eq!(code, 1, "{digest}: {said}");
        let report: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(report["result"], "different");
        assert_ne!(report["rules"][0]["difference_count"], 0, "{said}");
    }
}

/// Our overlay of the layers and the tree that umoci unpacks are the same, seen from one target.
#[test]
fn umoci_unpacks_what_the_overlay_says() {
    let dir = tempfile::tempdir().unwrap();
    for image in [RealImage::Python, RealImage::Node] {
        let source = image.source().unwrap();
        let target = format!("oci:{}:{}", dir.path().display(), image.name());
        let tree = image.tree().unwrap();
        let run = |args: &[&str]| {
            let done = build_support::rafs(args, b"");
            let said = String::from_utf8_lossy(&done.stdout).into_owned();
            assert_eq!(done.status.code(), Some(0), "{}: {args:?}: {said}", image.name());
        };
        run(&["convert", "--source", &source, "--target", &target]);
        run(&["check", "--source", &source, "--target", &target]);
        run(&["check", "--source-dir", tree.to_str().unwrap(), "--target", &target]);
    }
}
