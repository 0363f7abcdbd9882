//! What nydus-image made of the same layers.

use std::fs;
use std::path::{Path, PathBuf};

use rafsd::rafs::Bootstrap;
use rafsd::rafs::toc::{PackedBlob, SectionKind};
use serde_json::Value;

use crate::build_support::{
    Built, assert_same, check, create, describe, make_golden_tree, rafs_reader_check, read_image,
    repository,
};
use crate::{golden_tar, merge, pack, rafs_ok};

const CHUNK_SIZE: [&str; 2] = ["--chunk-size", "0x4000"];
const LOWER: &str = "dff0c4c4fa0a39fc90c36ebe45aac7c60fa2666d4daa0fd0cca0a2d03bf09e51";
const UPPER: &str = "6daa86dee9b44780bf3c074ff4a4a23953859673d8f29c425e65803dfc68db9b";

fn golden(case: &str) -> PathBuf {
    repository().join("guest-tests/golden").join(case)
}

fn tar_of(kind: &str, dir: &Path) -> PathBuf {
    make_golden_tree(kind, &dir.join(kind));
    let tar = dir.join(format!("{kind}.tar"));
    golden_tar(&dir.join(kind), &tar);
    tar
}

#[test]
fn merging_nydus_images_layers_gives_nydus_images_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let layers = golden("v6-merged").join("layer-bootstraps");
    let layers = [layers.join(LOWER), layers.join(UPPER)];
    let merged = dir.path().join("boot");
    merge(&layers, &merged, &["--prefetch-policy", "fs"], b"/\n");
    let want = fs::read(golden("v6-merged/bootstrap")).unwrap();
    assert!(fs::read(&merged).unwrap() == want, "the merged bootstraps differ");
    // The ids may also be given, the files then having any names.
    let copies = ["lower", "upper"].map(|name| dir.path().join(name));
    for (layer, copy) in layers.iter().zip(&copies) {
        fs::copy(layer, copy).unwrap();
    }
    let ids = format!("{LOWER},sha256:{UPPER}");
    let options = ["--prefetch-policy", "fs", "--blob-digests", &ids];
    merge(&copies, &merged, &options, b"/\n");
    assert!(fs::read(&merged).unwrap() == want, "the merged bootstraps differ");
}

#[test]
fn sections_of_packed_layers_are_nydus_images() {
    let dir = tempfile::tempdir().unwrap();
    let only = |case: &str| {
        fs::read_dir(golden(case).join("blobs")).unwrap().next().unwrap().unwrap().path()
    };
    let merged = |id: &str| golden("v6-merged/blobs").join(id);
    let cases =
        [("tarable", only("v6-oci-packed")), ("lower", merged(LOWER)), ("upper", merged(UPPER))];
    for (kind, theirs) in cases {
        let ours = pack(&tar_of(kind, dir.path()), dir.path(), &CHUNK_SIZE);
        let theirs = fs::read(theirs).unwrap();
        let ours = fs::read(ours).unwrap();
        let read = |blob: &Vec<u8>| PackedBlob::read(&blob[..]).unwrap();
        let (our_sections, their_sections) = (read(&ours), read(&theirs));
        let kinds = |packed: &PackedBlob| -> Vec<SectionKind> {
            packed.sections().iter().map(|section| section.kind).collect()
        };
        assert_eq!(kinds(&our_sections), kinds(&their_sections), "{kind}");
        for (a, b) in our_sections.sections().iter().zip(their_sections.sections()) {
            // Bootstraps differ: we keep nanoseconds, they order attributes at random.
            if a.kind != SectionKind::ImageBoot {
                assert_eq!(a, b, "{kind}");
                let range = |s: &rafsd::rafs::toc::Section| {
                    usize::try_from(s.stored.start).unwrap()..usize::try_from(s.stored.end).unwrap()
                };
                assert!(ours[range(a)] == theirs[range(b)], "{kind}: {}", a.kind.name());
            }
        }
        let boot = |packed: &PackedBlob, blob: &Vec<u8>| {
            Bootstrap::from_bytes(packed.bootstrap(&blob[..]).unwrap()).unwrap()
        };
        let (a, b) = (boot(&our_sections, &ours), boot(&their_sections, &theirs));
        assert_eq!(a.blob_entries().unwrap()[0].features, b.blob_entries().unwrap()[0].features);
        assert_eq!(
            a.blob_entries().unwrap()[0].compressed_size,
            b.blob_entries().unwrap()[0].compressed_size
        );
        assert_eq!((a.flags(), a.path_count()), (b.flags(), b.path_count()), "{kind}");
    }
}

/// The tree of a golden image with times that a builder of our kind keeps.
fn with_times_of(json: &Path, tree: &Path, out: &Path) {
    let mut entries: Vec<Value> = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let times = describe(tree);
    for entry in &mut entries {
        let path = entry["path"].as_str().unwrap().as_bytes().to_vec();
        if let Some(time) = times.get(&path) {
            entry["mtime"] = time.mtime.into();
            entry["mtime_nsec"] = time.mtime_nsec.into();
        }
    }
    fs::write(out, Value::from(entries).to_string()).unwrap();
}

fn check_tree(built: &Built, json: &Path) {
    check(built);
    rafs_reader_check(built, json);
}

#[test]
fn a_parent_and_a_dictionary_give_nydus_images_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for kind in ["lower", "upper", "small", "chunkfill"] {
        make_golden_tree(kind, &path(kind));
    }
    // (golden case, first tree, second tree, option that names the first image)
    let cases = [
        ("v6-two-layers", "lower", "upper", "--parent-bootstrap="),
        ("v6-chunkdict", "small", "chunkfill", "--chunk-dict=bootstrap="),
    ];
    for (case, first, second, option) in cases {
        let out = path(case);
        let base = path(&format!("{case}-base"));
        fs::create_dir(&base).unwrap();
        let first_boot = base.join("boot");
        let boot = first_boot.to_str().unwrap();
        create(&path(first), &out, &[&CHUNK_SIZE[..], &["-B", boot]].concat(), b"");
        let option = format!("{option}{boot}");
        let built = create(&path(second), &out, &[&CHUNK_SIZE[..], &[&option]].concat(), b"");
        // The same chunks in the same blobs, to the byte.
        for blob in fs::read_dir(golden(case).join("blobs")).unwrap() {
            let blob = blob.unwrap();
            let ours = fs::read(out.join(blob.file_name())).unwrap();
            assert!(ours == fs::read(blob.path()).unwrap(), "{case}");
        }
        let theirs = Bootstrap::open(&golden(case).join("bootstrap")).unwrap();
        let ids = |image: &Bootstrap| -> Vec<_> { image.blobs().iter().map(|b| b.id).collect() };
        assert_eq!(ids(&built.open()), ids(&theirs), "{case}");
        assert_eq!(built.open().chunk_records().len(), theirs.chunk_records().len(), "{case}");
        let json = path("tree.json");
        with_times_of(&golden(case).join("tree.json"), &path(second), &json);
        if case == "v6-chunkdict" {
            check_tree(&built, &json);
            assert_same(&read_image(&built), &describe(&path(second)), case);
        } else {
            check(&built);
        }
    }
}

#[test]
fn a_merge_of_our_layers_is_the_same_tree() {
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<PathBuf> = ["lower", "upper"]
        .map(|kind| pack(&tar_of(kind, dir.path()), dir.path(), &CHUNK_SIZE))
        .to_vec();
    let merged = merge(&layers, &dir.path().join("boot"), &[], b"");
    // nydus-image drops nanoseconds of tars; those of names that both layers have are the upper's.
    let json = dir.path().join("tree.json");
    with_times_of(&golden("v6-merged/tree.json"), &dir.path().join("lower"), &json);
    let second = dir.path().join("tree2.json");
    with_times_of(&json, &dir.path().join("upper"), &second);
    check_tree(&merged, &second);
    // The same by way of a parent: other blobs, the same tree.
    let out = dir.path().join("stacked");
    let base = dir.path().join("base");
    let tar = |kind: &str| dir.path().join(format!("{kind}.tar")).into_os_string();
    let create = |boot: &Path, more: &[&str], tar: std::ffi::OsString| {
        let mut args = vec!["create".into(), "-t".into(), "tar-rafs".into(), "-D".into()];
        args.extend([out.clone().into_os_string(), "-B".into(), boot.to_owned().into_os_string()]);
        args.extend(CHUNK_SIZE.iter().chain(more).map(Into::into));
        args.push(tar);
        rafs_ok(&args, b"");
    };
    create(&base, &[], tar("lower"));
    let boot = dir.path().join("stacked.boot");
    create(&boot, &["-p", base.to_str().unwrap()], tar("upper"));
    let stacked = Built { bootstrap: boot, blobs: out.clone() };
    check_tree(&stacked, &second);
    assert_same(&read_image(&stacked), &read_image(&merged), "parent and merge");
}
