//! The golden images, read by our format room, are what their `tree.json` says.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

#[path = "support/golden_cases.rs"]
mod golden_cases;

use std::collections::BTreeMap;

use golden_cases::{READABLE, golden};
use rafsd::rafs::ci::ChunkInfos;
use rafsd::rafs::id::{BlobId, BlobIndex, ChunkIndex, Nid};
use rafsd::rafs::layout::BlobFeatures;
use rafsd::rafs::toc::PackedBlob;
use rafsd::rafs::{Bootstrap, FileKind, FormatError, WalkItem};
use serde_json::{Value, json};

fn open(case: &str, bootstrap: &str) -> Bootstrap {
    let path = golden(case).join(bootstrap);
    Bootstrap::open(&path).unwrap_or_else(|e| panic!("{case}/{bootstrap}: {e}"))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let mut word = 0;
        for i in 0..3 {
            word = word << 8 | u32::from(group.get(i).copied().unwrap_or(0));
        }
        for i in 0..4 {
            let digit = DIGITS[usize::try_from(word >> (18 - 6 * i) & 63).unwrap()];
            out.push(if i <= group.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// An item in the form of `tree.json`, without the content of files.
fn described(item: &WalkItem<'_>) -> Value {
    let inode = &item.inode;
    let path = item.path();
    let mut out = json!({
        "type": inode.kind().name(),
        "mode": format!("{:04o}", inode.mode() & 0o7777),
        "uid": inode.uid(),
        "gid": inode.gid(),
        "mtime": inode.mtime(),
        "mtime_nsec": inode.mtime_nsec(),
        "nlink": inode.nlink(),
    });
    match String::from_utf8(path) {
        Ok(path) => out["path"] = path.into(),
        Err(e) => out["path_b64"] = base64(e.as_bytes()).into(),
    }
    match inode.kind() {
        FileKind::Regular => out["size"] = inode.size().into(),
        FileKind::Symlink => {
            out["size"] = inode.size().into();
            let target = inode.symlink_target().unwrap();
            match std::str::from_utf8(target) {
                Ok(target) => out["target"] = target.into(),
                Err(_) => out["target_b64"] = base64(target).into(),
            }
        }
        FileKind::CharDevice | FileKind::BlockDevice => {
            let (major, minor) = inode.rdev_major_minor();
            out["rdev"] = json!([major, minor]);
        }
        _ => {}
    }
    let xattrs: serde_json::Map<_, _> = inode
        .xattrs()
        .unwrap()
        .map(|x| (String::from_utf8(x.full_name()).unwrap(), base64(x.value).into()))
        .collect();
    if !xattrs.is_empty() {
        out["xattrs"] = xattrs.into();
    }
    out
}

#[test]
fn metadata_is_what_the_tree_says() {
    for (case, bootstrap, tree) in READABLE {
        let want: Vec<Value> =
            serde_json::from_slice(&std::fs::read(golden(case).join(tree)).unwrap()).unwrap();
        let key =
            |v: &Value| v.get("path").or(v.get("path_b64")).unwrap().as_str().unwrap().to_owned();
        let mut want: BTreeMap<_, _> = want
            .into_iter()
            .map(|mut v| {
                v.as_object_mut().unwrap().remove("sha256");
                (key(&v), v)
            })
            .collect();
        let image = open(case, bootstrap);
        let mut paths = 0;
        for item in image.walk() {
            let got = described(&item.unwrap());
            paths += 1;
            let key = key(&got);
            let wanted = want.remove(&key).unwrap_or_else(|| panic!("{case}: {key} is new"));
            assert_eq!(got, wanted, "{case}");
        }
        assert!(want.is_empty(), "{case}: missing {:?}", want.keys());
        assert_eq!(paths, image.path_count(), "{case}");
    }
}

#[test]
fn every_name_is_found_and_others_are_not() {
    for (case, bootstrap, _) in READABLE {
        let image = open(case, bootstrap);
        for item in image.walk() {
            let item = item.unwrap();
            if item.inode.kind() != FileKind::Directory {
                continue;
            }
            let dir = item.inode.dir().unwrap();
            let entries: Vec<_> = dir.entries_from(0).unwrap().map(|e| e.unwrap()).collect();
            for (i, entry) in entries.iter().enumerate() {
                assert_eq!(dir.lookup(entry.name).unwrap().as_ref(), Some(entry), "{case}");
                let other = [entry.name, b"\x01"].concat();
                assert_eq!(dir.lookup(&other).unwrap(), None, "{case}");
                let rest: Vec<_> =
                    dir.entries_from(entry.next_cookie).unwrap().map(|e| e.unwrap()).collect();
                assert_eq!(rest, entries[i + 1..], "{case}: listing from the middle");
            }
            for name in [&b""[..], b"\x01", b"\xff\xff", &[b'n'; 256]] {
                assert_eq!(dir.lookup(name).unwrap(), None, "{case}");
            }
        }
    }
}

#[test]
fn chunks_agree_with_the_chunk_table() {
    for (case, bootstrap, _) in READABLE {
        let image = open(case, bootstrap);
        let tables: Vec<_> =
            image.blobs().iter().map(|b| image.chunk_digests(b.index).unwrap()).collect();
        let mut chunks = 0;
        for item in image.walk() {
            let inode = item.unwrap().inode;
            for i in 0..inode.chunk_count() {
                let addr = inode.chunk(i).unwrap();
                let BlobIndex(blob) = addr.blob().unwrap();
                let index = ChunkIndex(addr.chunk_index());
                let record = tables[usize::from(blob)].record(index).unwrap();
                assert_eq!(record.uncompressed_size, inode.chunk_len(i), "{case}");
                assert_eq!(record.uncompressed_offset, u64::from(addr.start_block()) * 4096);
                chunks += 1;
            }
            assert!(inode.chunk(inode.chunk_count()).is_err());
        }
        assert_eq!(chunks == 0, image.blobs().is_empty(), "{case}");
    }
}

#[test]
fn a_chunk_table_with_all_chunks_tells_the_context_table() {
    let mut told = Vec::new();
    for (case, bootstrap, _) in READABLE {
        let image = open(case, bootstrap);
        for info in image.blobs() {
            let records = image.chunk_digests(info.index).unwrap();
            let blobs = golden(case).join("blobs");
            let file = match info.id {
                BlobId::UNKNOWN => {
                    std::fs::read_dir(blobs).unwrap().next().unwrap().unwrap().path()
                }
                id => blobs.join(id.to_string()),
            };
            let blob = std::fs::read(file).unwrap();
            let from = usize::try_from(info.ci_offset).unwrap();
            let stored = &blob[from..from + usize::try_from(info.ci_compressed_size).unwrap()];
            let mut own = vec![0; usize::try_from(info.ci_uncompressed_size).unwrap()];
            info.ci_compressor.decompress(stored, &mut own).unwrap();
            match records.entries(info) {
                Some(entries) => {
                    assert_eq!(entries, own, "{case}/{bootstrap}, blob {}", info.index.0);
                    let infos = ChunkInfos::of_entries(info, entries).unwrap();
                    assert_eq!(infos.len(), info.chunk_count);
                    told.push(format!("{case}/{bootstrap}/{}", info.index.0));
                }
                None => {
                    let all = (0..info.chunk_count).all(|i| records.get(ChunkIndex(i)).is_some());
                    let batches = info.features.contains(BlobFeatures::BATCH);
                    assert!(!all || batches, "{case}/{bootstrap}, blob {}", info.index.0);
                }
            }
        }
    }
    let want = [
        "v6-zstd/bootstrap/0",
        "v6-lz4/bootstrap/0",
        "v6-none/bootstrap/0",
        "v6-sha256/bootstrap/0",
        "v6-blake3/bootstrap/0",
        "v6-two-layers/bootstrap/1",
        "v6-two-layers/lower-bootstrap/0",
        "v6-chunkdict/bootstrap/1",
        "v6-chunkdict/dict-bootstrap/0",
        "v6-oci-packed/bootstrap/0",
        "v6-merged/bootstrap/0",
    ];
    assert_eq!(told, want);
}

#[test]
fn what_is_not_read_is_named() {
    // (case, the feature in the message)
    let cases = [
        ("v5-lz4", "RAFS v5"),
        ("v5-zstd-sha256", "RAFS v5"),
        ("v6-encrypted", "encrypted"),
        ("v6-zran", "zran"),
        ("v6-tarref", "tar-ref"),
        ("v6-tarfs-512", "tarfs"),
    ];
    for (case, feature) in cases {
        let error = Bootstrap::open(&golden(case).join("bootstrap")).unwrap_err();
        assert!(matches!(error, FormatError::Unsupported { .. }), "{case}: {error}");
        assert!(error.to_string().contains(feature), "{case}: {error}");
    }
}

#[test]
fn prefetch_table_lists_the_paths_that_were_asked_for() {
    let image = open("v6-blake3", "bootstrap");
    let nids: Vec<Nid> = image.prefetch_nids().collect();
    let mut by_nid = BTreeMap::new();
    for item in image.walk() {
        let item = item.unwrap();
        by_nid.entry(item.inode.nid()).or_insert(Vec::new()).push(item.path());
    }
    let want = ["/hello.txt", "/dup", "/tiny/t05", "/links/rel", "/hard/h2"];
    assert_eq!(nids.len(), want.len());
    for (nid, want) in nids.iter().zip(want) {
        assert!(by_nid[nid].contains(&want.as_bytes().to_vec()), "{want} is {nid:?}");
    }
    assert_eq!(open("v6-merged", "bootstrap").prefetch_nids().collect::<Vec<_>>(), [Nid(128)]);
    assert_eq!(open("v6-none", "bootstrap").prefetch_nids().count(), 0);
}

#[test]
fn an_unmerged_layer_gets_its_id_from_outside() {
    let image = open("v6-oci-packed", "bootstrap");
    assert_eq!(image.blobs()[0].id, BlobId::UNKNOWN);
    let id = BlobId::from_sha256([7; 32]);
    assert_eq!(image.with_blob_id(id).unwrap().blobs()[0].id, id);
    let named = open("v6-none", "bootstrap");
    assert_eq!(named.with_blob_id(id).unwrap().blobs()[0].id, named.blobs()[0].id);
}

#[test]
fn a_packed_blob_holds_the_bootstrap() {
    // (case, blob, its bootstrap, sections)
    let all = ["image.blob", "blob.meta", "blob.meta.header", "blob.digest", "image.boot"];
    let cases = [("v6-oci-packed", "bootstrap", &all[..]), ("v6-empty", "bootstrap", &all[4..])];
    for (case, bootstrap, sections) in cases {
        let blob = std::fs::read_dir(golden(case).join("blobs")).unwrap().next().unwrap().unwrap();
        let file = std::fs::File::open(blob.path()).unwrap();
        let packed = PackedBlob::read(&file).unwrap();
        let found: Vec<_> = packed.sections().iter().map(|s| s.kind.name()).collect();
        assert_eq!(found, sections, "{case}");
        let bytes = packed.bootstrap(&file).unwrap();
        assert_eq!(bytes, std::fs::read(golden(case).join(bootstrap)).unwrap(), "{case}");
        Bootstrap::from_bytes(bytes).unwrap();
    }
}

#[test]
fn layers_of_a_merged_image_are_in_its_blobs() {
    let layers = golden("v6-merged").join("layer-bootstraps");
    for layer in std::fs::read_dir(layers).unwrap() {
        let layer = layer.unwrap();
        let blob = golden("v6-merged").join("blobs").join(layer.file_name());
        let file = std::fs::File::open(blob).unwrap();
        let bytes = PackedBlob::read(&file).unwrap().bootstrap(&file).unwrap();
        assert_eq!(bytes, std::fs::read(layer.path()).unwrap());
        let image = Bootstrap::from_bytes(bytes).unwrap();
        assert!(image.walk().all(|item| item.is_ok()));
    }
}
