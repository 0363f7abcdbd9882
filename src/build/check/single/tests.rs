use std::path::{Path, PathBuf};

use super::*;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden").join(case)
}

fn args(bootstrap: &Path, blob_dir: Option<&Path>) -> Args {
    Args {
        bootstrap: bootstrap.to_owned(),
        blob_dir: blob_dir.map(Path::to_owned),
        max_problems: 100,
    }
}

/// Exit code and output.
fn checked(args: &Args) -> (u8, String) {
    let findings = check(args);
    let mut out = Vec::new();
    print(&findings, args, &mut out).unwrap();
    (exit_code(&findings), String::from_utf8(out).unwrap())
}

/// A copy of a golden case that a test may damage.
fn copy(case: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let bootstrap = dir.path().join("bootstrap");
    std::fs::copy(golden(case).join("bootstrap"), &bootstrap).unwrap();
    let blobs = dir.path().join("blobs");
    std::fs::create_dir(&blobs).unwrap();
    for blob in std::fs::read_dir(golden(case).join("blobs")).unwrap() {
        let blob = blob.unwrap();
        std::fs::copy(blob.path(), blobs.join(blob.file_name())).unwrap();
    }
    (dir, bootstrap, blobs)
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

fn only_blob(blobs: &Path) -> PathBuf {
    super::only_file(blobs).unwrap()
}

#[test]
fn golden_images_are_sound() {
    // (case, bootstrap, chunks in blobs)
    let cases = [
        ("v6-zstd", "bootstrap", "256 chunks in 1 blob"),
        ("v6-lz4", "bootstrap", "chunks in 1 blob"),
        ("v6-none", "bootstrap", "9 chunks in 1 blob"),
        ("v6-sha256", "bootstrap", "chunks in 1 blob"),
        ("v6-blake3", "bootstrap", "chunks in 1 blob"),
        ("v6-batch", "bootstrap", "chunks in 1 blob"),
        ("v6-two-layers", "bootstrap", "chunks in 2 blobs"),
        ("v6-two-layers", "lower-bootstrap", "chunks in 1 blob"),
        ("v6-chunkdict", "bootstrap", "chunks in 2 blobs"),
        ("v6-chunkdict", "dict-bootstrap", "chunks in 1 blob"),
        ("v6-oci-packed", "bootstrap", "chunks in 1 blob"),
        ("v6-merged", "bootstrap", "chunks in 2 blobs"),
        ("v6-empty", "bootstrap", "0 chunks in 0 blobs"),
    ];
    for (case, bootstrap, data) in cases {
        let bootstrap = golden(case).join(bootstrap);
        let (code, out) = checked(&args(&bootstrap, None));
        assert_eq!(code, 0, "{case}: {out}");
        assert!(out.contains("blobs not read (no --blob-dir): nothing is wrong"), "{case}: {out}");
        let (code, out) = checked(&args(&bootstrap, Some(&golden(case).join("blobs"))));
        assert_eq!(code, 0, "{case}: {out}");
        assert!(out.contains(data), "{case}: {out}");
    }
}

#[test]
fn a_packed_blob_is_checked_by_itself() {
    for case in ["v6-oci-packed", "v6-empty"] {
        let blob = only_blob(&golden(case).join("blobs"));
        let (code, out) = checked(&args(&blob, None));
        assert_eq!((code, out.lines().count()), (0, 1), "{case}: {out}");
    }
}

#[test]
fn what_cannot_be_checked_is_neither_right_nor_wrong() {
    let dir = tempfile::tempdir().unwrap();
    // (bootstrap, blob directory, in the output)
    let cases = [
        (golden("v5-lz4/bootstrap"), None, "RAFS v5 images are not supported"),
        (golden("v6-zran/bootstrap"), None, "zran (OCI reference) images are not supported"),
        (golden("v6-encrypted/bootstrap"), None, "encrypted images are not supported"),
        (golden("nowhere"), None, "cannot read"),
        (golden("v6-none/bootstrap"), Some(dir.path()), "cannot read"),
        (golden("v6-oci-packed/bootstrap"), Some(dir.path()), "does not hold one file only"),
    ];
    for (bootstrap, blobs, message) in cases {
        let (code, out) = checked(&args(&bootstrap, blobs));
        assert_eq!(code, 2, "{out}");
        assert!(out.contains(message), "{message}: {out}");
    }
    let (code, out) = checked(&args(&golden("v6-none/tree.json"), None));
    assert_eq!(code, 1, "{out}");
}

#[test]
fn any_flipped_byte_of_a_blob_is_found() {
    for (case, step) in [("v6-none", 97), ("v6-batch", 997), ("v6-oci-packed", 997)] {
        let (_dir, bootstrap, blobs) = copy(case);
        let blob = only_blob(&blobs);
        let size = usize::try_from(std::fs::metadata(&blob).unwrap().len()).unwrap();
        for at in (0..size).step_by(step).chain([size - 1]) {
            change(&blob, |bytes| bytes[at] ^= 0x10);
            // A packed layer does not know its own id: ask by the file, which is named by it.
            let args = match case {
                "v6-oci-packed" => args(&blob, None),
                _ => args(&bootstrap, Some(&blobs)),
            };
            let (code, out) = checked(&args);
            assert_eq!(code, 1, "{case}, byte {at}: {out}");
            change(&blob, |bytes| bytes[at] ^= 0x10);
        }
    }
}

#[test]
fn damage_is_named() {
    // In v6-none: chunk 1 is stored at 5..4101 and part of /b; chunks are plain.
    let (_dir, bootstrap, blobs) = copy("v6-none");
    let blob = only_blob(&blobs);
    change(&blob, |bytes| bytes[100] ^= 1);
    let (code, out) = checked(&args(&bootstrap, Some(&blobs)));
    assert_eq!(code, 1);
    assert!(
        out.contains("chunk 1, stored bytes 5..4101: does not match its digest (part of /b)\n"),
        "{out}"
    );
    assert!(out.contains("SHA-256 of"), "{out}");
    assert!(out.ends_with("9 chunks in 1 blob: 2 problems\n"), "{out}");

    let (code, out) = checked(&Args { max_problems: 1, ..args(&bootstrap, Some(&blobs)) });
    assert_eq!(code, 1);
    assert!(out.contains("1 more problems, see --max-problems"), "{out}");

    change(&blob, |bytes| bytes.truncate(20_000));
    let (_, out) = checked(&args(&bootstrap, Some(&blobs)));
    assert!(out.contains("the file at 20000"), "{out}");
    assert!(out.contains("the file has 20000 bytes, the blob table says 22351"), "{out}");
}

#[test]
fn a_damaged_batch_names_its_members_as_one() {
    let (_dir, bootstrap, blobs) = copy("v6-batch");
    change(&only_blob(&blobs), |bytes| bytes[20] ^= 0x55);
    let (code, out) = checked(&args(&bootstrap, Some(&blobs)));
    assert_eq!(code, 1);
    assert!(out.contains("chunk 0, stored bytes 0..9023: "), "{out}");
}

#[test]
fn tables_that_disagree() {
    // (offset in v6-none's bootstrap, bytes, in the output). Record 0 is that of chunk 4.
    let cases: [(usize, &[u8], &str); 12] = [
        (0x312c - 0x20, &[2], "/a, nid 135: link count is 2, its names are 1"),
        (0x302c, &[2], "/, nid 128: link count is 2, 2 and one for each sub-directory make 3"),
        (1040, &[13], "counts 13 paths, found 14"),
        (0x3124, &[1], "/a, chunk 0: chunk 0 of blob 4de91e"),
        (0x30e8, &[4], "has 4 bytes, in the chunk table 5"),
        (0x4000, &[0xff], "not above the record before it"),
        (0x4020, &[1], "no such blob"),
        (0x4024, &[0x60], "unknown flags"),
        (0x4028, &[1], "stored range in the chunk table is not that in the chunk-info array"),
        (0x4038, &[0, 0x30], "uncompressed offset in the chunk table is not"),
        (0x404c, &[9], "does not match its CRC in the chunk table"),
        (0x4001, &[9], "chunk 4, stored bytes"),
    ];
    let (_dir, bootstrap, blobs) = copy("v6-none");
    for (at, bytes, message) in cases {
        let sound = std::fs::read(&bootstrap).unwrap();
        change(&bootstrap, |image| image[at..at + bytes.len()].copy_from_slice(bytes));
        let (code, out) = checked(&args(&bootstrap, Some(&blobs)));
        assert_eq!(code, 1, "{message}: {out}");
        assert!(out.contains(message), "{message}: {out}");
        std::fs::write(&bootstrap, sound).unwrap();
    }
}

#[test]
fn a_prefetch_table_that_leads_nowhere() {
    let (_dir, bootstrap, _) = copy("v6-blake3");
    change(&bootstrap, |image| image[0x1100] = image[0x1100].wrapping_add(1));
    let (code, out) = checked(&args(&bootstrap, None));
    assert_eq!(code, 1);
    assert!(out.contains("prefetch table: nid"), "{out}");
}

#[test]
fn without_a_chunk_table_digests_cannot_be_told() {
    let (_dir, bootstrap, blobs) = copy("v6-none");
    change(&bootstrap, |image| image[1184..1192].fill(0));
    let (code, out) = checked(&args(&bootstrap, Some(&blobs)));
    assert_eq!(code, 2, "{out}");
    assert!(out.contains("no chunk table"), "{out}");
    // The chunk-info array is still compared with the inodes.
    change(&bootstrap, |image| image[0x30e8] = 4);
    let (code, out) = checked(&args(&bootstrap, Some(&blobs)));
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("has 4 bytes, in the chunk-info array 5"), "{out}");
}

#[test]
fn damaged_files_are_checked_to_the_end() {
    use proptest::test_runner::{Config, TestRunner};
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    for case in ["v6-none", "v6-batch"] {
        let (_dir, bootstrap, blobs) = copy(case);
        let blob = only_blob(&blobs);
        let sound = [&bootstrap, &blob].map(|path| std::fs::read(path).unwrap());
        let changes = proptest::collection::vec(proptest::prelude::any::<(bool, u32, u8)>(), 1..6);
        TestRunner::new(config.clone())
            .run(&changes, |changes| {
                let mut files = sound.clone();
                for (in_blob, at, byte) in changes {
                    let file = &mut files[usize::from(in_blob)];
                    // Most of a bootstrap is not read: aim at where the tables and inodes are.
                    let span = if in_blob { file.len() } else { 0x4400 };
                    file[at as usize % span] = byte;
                }
                std::fs::write(&bootstrap, &files[0]).unwrap();
                std::fs::write(&blob, &files[1]).unwrap();
                let (code, out) = checked(&args(&bootstrap, Some(&blobs)));
                assert_eq!(code == 0, out.ends_with(": nothing is wrong\n"), "{out}");
                assert!(code != 0 || files[1] == sound[1], "{out}");
                Ok(())
            })
            .unwrap();
    }
}
