//! One changed bit, anywhere: it must be found, and nothing may panic.

use super::super::filesystem::{self, ChunkContent};
use super::super::overlay::{Layer, Overlay};
use super::super::test_tar::Tar;
use super::super::testing::{Store, lower_and_upper, merged, packed, tarable};
use super::super::{metadata, tables};
use super::*;
use crate::oci::manifest::Descriptor;
use crate::rafs::FileKind;

/// Flips one bit of the file of `descriptor` at every `step`-th byte; each time the images differ, or
/// where it does not parse any more that cannot be told.
fn flip(store: &Store, descriptor: &Descriptor, step: usize) {
    let path = store.path(descriptor);
    let sound = std::fs::read(&path).unwrap();
    for at in (0..sound.len()).step_by(step) {
        let mut bytes = sound.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bytes).unwrap();
        let report = compare(&super::tests::args(store)).unwrap();
        let code = report.outcome().exit_code();
        assert!(code == 1 || code == 2, "byte {at} of {}", descriptor.media_type);
        // Its digest says so, however little else does.
        assert_eq!(code, 1, "byte {at} of {}: {report:?}", descriptor.media_type);
    }
    std::fs::write(&path, &sound).unwrap();
    assert_eq!(compare(&super::tests::args(store)).unwrap().outcome().exit_code(), 0);
}

#[test]
fn any_flipped_bit_of_manifest_and_configuration_is_found() {
    let (store, manifest) = Store::merged();
    let root = store.layout.resolve(Some("target")).unwrap().unwrap();
    flip(&store, &root, 1);
    flip(&store, &manifest.config, 1);
}

#[test]
fn any_flipped_bit_of_bootstrap_layer_and_blobs_is_found() {
    let (store, manifest) = Store::merged();
    let [lower, upper, boot] = &manifest.layers[..] else { panic!("three layers") };
    flip(&store, boot, 3);
    flip(&store, lower, 67);
    flip(&store, upper, 71);
}

/// The same, with every digest above it made right again: what is left are the rules for metadata.
/// Bytes that mean nothing to any reader are listed; everything else must be found.
#[test]
fn any_flipped_bit_of_metadata_is_found_without_its_digest() {
    let mut overlay = Overlay::default();
    for layer in lower_and_upper() {
        let image = Bootstrap::from_bytes(merged().0).unwrap();
        let cut = filesystem::cut_of(&image);
        overlay.apply(Layer::read(Tar::of(&layer).as_slice(), &cut).unwrap()).unwrap();
    }
    let in_merged = undetected(&merged().0, &overlay.finish());

    let mut overlay = Overlay::default();
    let image = Bootstrap::from_bytes(packed().0).unwrap();
    let layer = Layer::read(Tar::of(&tarable()).as_slice(), &filesystem::cut_of(&image));
    overlay.apply(layer.unwrap()).unwrap();
    let in_packed = undetected(&packed().0, &overlay.finish());
    assert_eq!((in_merged, in_packed), (Vec::<String>::new(), Vec::<String>::new()));
}

/// Bytes of `sound` of which a flipped bit is not noticed and that ought to mean something.
fn undetected(
    sound: &[u8],
    files: &std::collections::BTreeMap<
        super::super::overlay::Key,
        std::sync::Arc<super::super::overlay::File>,
    >,
) -> Vec<String> {
    let spare = Spare::of(sound);
    let mut lost = Vec::new();
    for at in 0..sound.len() {
        if spare.covers(at) {
            continue;
        }
        let mut bytes = sound.to_vec();
        bytes[at] ^= 1 << (at % 8);
        let Ok(image) = Bootstrap::from_bytes(bytes) else { continue };
        let mut findings = Findings { limit: 1, ..Findings::default() };
        metadata::check(&image, tables::ChunkInfosByBlob::new(), &mut findings);
        if findings.problem_count > 0 {
            continue;
        }
        let mut chunks = ChunkContent::default();
        for blob in image.blobs() {
            chunks.table.insert(blob.index, image.chunk_digests(blob.index).unwrap());
        }
        let mut report = Report::new(String::new(), String::new(), 1);
        filesystem::compare(files, &image, &chunks, MtimePrecision::Exact, &mut report);
        if report.rule_outcome(Rule::FileSystem).exit_code() == 0 {
            lost.push(format!("{at:#x}"));
        }
    }
    lost
}

/// What no reader looks at, or what only the blob can tell.
struct Spare(Vec<std::ops::Range<usize>>);

impl Spare {
    fn covers(&self, at: usize) -> bool {
        self.0.iter().any(|range| range.contains(&at))
    }

    fn of(bytes: &[u8]) -> Spare {
        let image = Bootstrap::from_bytes(bytes.to_vec()).unwrap();
        let size = |value: u64| usize::try_from(value).unwrap();
        let mut used: Vec<std::ops::Range<usize>> = Vec::new();
        let (_, ext) = image.super_blocks().unwrap();
        // The super blocks, without build time, uuid, volume name and what is reserved; compatible
        // features and flags have bits of no meaning.
        used.extend([1024..1032, 1036..1048, 1060..1072, 1104..1114, 1160..1192]);
        // Either of the two says that there is no prefetch table.
        if ext.prefetch_table_offset.get() != 0 {
            used.push(1192..1204);
        }
        for i in 0..image.blobs().len() {
            let slot = 1408 + 128 * i;
            used.push(slot..slot + 68);
            // The digester decides how the source is hashed, which is done already. What follows is
            // compared with the blob, which is not here.
            let entry = size(ext.blob_table_offset.get()) + 256 * i;
            used.push(entry..entry + 80);
        }
        for item in image.walk() {
            let inode = item.unwrap().inode;
            let at = size(inode.offset());
            // Format to size; owner to nlink. The address of data that is inline, and `ino`, are not.
            used.extend([at..at + 6, at + 24..at + 48]);
            // Special files have a size that nobody looks at.
            let sized = [FileKind::Directory, FileKind::Regular, FileKind::Symlink];
            if sized.contains(&inode.kind()) {
                used.push(at + 8..at + 16);
            }
            if matches!(inode.kind(), FileKind::CharDevice | FileKind::BlockDevice) {
                used.push(at + 16..at + 20);
            }
            let mut end = at + 64;
            for (i, xattr) in inode.xattrs().unwrap().enumerate() {
                end += if i == 0 { 12 } else { 0 };
                let len = 4 + xattr.name.len() + xattr.value.len();
                used.push(end..end + len);
                end += len.next_multiple_of(4);
            }
            let chunks = end.next_multiple_of(8);
            used.push(chunks..chunks + 8 * usize::try_from(inode.chunk_count()).unwrap());
        }
        let table = size(image.chunk_table_offset());
        for i in 0..image.chunk_records().len() {
            let at = table + 80 * i;
            // Digest, blob, flags; sizes and offsets of stored bytes and the CRC are the blob's matter.
            used.extend([at..at + 36, at + 44..at + 48, at + 56..at + 64, at + 72..at + 76]);
        }
        let mut spare = Vec::new();
        let mut end = 0;
        used.sort_unstable_by_key(|range| range.start);
        for range in used {
            spare.push(end..range.start.max(end));
            end = end.max(range.end);
        }
        spare.push(end..bytes.len());
        Spare(spare)
    }
}
