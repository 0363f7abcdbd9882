//! The tables of a bootstrap: do they agree with each other, and with the blobs?

use std::collections::BTreeMap;

use super::findings::Findings;
use super::place;
use crate::rafs::ci::{ChunkForm, ChunkInfos};
use crate::rafs::id::{BlobIndex, ChunkIndex};
use crate::rafs::layout::{BLOCK_SIZE, BlobFeatures, ChunkFlags, ChunkRecord, ImageFlags};
use crate::rafs::{Bootstrap, ChunkDigests};

/// The chunk-info arrays that are known.
pub(super) type ChunkInfosByBlob<'a> = BTreeMap<BlobIndex, &'a ChunkInfos>;

/// What is known of the chunks of each blob.
pub(super) struct ChunkTables<'a> {
    infos: ChunkInfosByBlob<'a>,
    digests: Vec<Option<ChunkDigests>>,
}

impl ChunkTables<'_> {
    /// From the chunk table; `None` without one, or if its records contradict each other.
    pub(super) fn digests(&self, blob: BlobIndex) -> Option<&ChunkDigests> {
        self.digests.get(usize::from(blob.0))?.as_ref()
    }

    pub(super) fn infos(&self, blob: BlobIndex) -> Option<&ChunkInfos> {
        self.infos.get(&blob).copied()
    }
}

/// Checks the tables of `image` against each other and against `infos`.
pub(super) fn check<'a>(
    image: &Bootstrap,
    infos: ChunkInfosByBlob<'a>,
    findings: &mut Findings,
) -> ChunkTables<'a> {
    super_block(image, findings);
    let digests = chunk_table(image, findings);
    for (index, chunks) in &infos {
        if let Some(table) = &digests[usize::from(index.0)] {
            compare_tables(image, *index, chunks, table, findings);
        }
    }
    ChunkTables { infos, digests }
}

/// What the super blocks and the device table say about all blobs together.
fn super_block(image: &Bootstrap, findings: &mut Findings) {
    let (Ok((sb, ext)), Ok(slots)) = (image.super_blocks(), image.device_slots()) else { return };
    // Old images say that there is none by the offset alone.
    let listed = image.prefetch_nids().count() as u64;
    let room = u64::from(ext.prefetch_table_size.get()) / 4;
    if ext.prefetch_table_offset.get() != 0 && listed != room {
        let what = format_args!("has room for {room} nids, a zero ends it after {listed}");
        findings.mismatch("prefetch table", "nids", room, listed, what);
    }
    let blocks: u64 = slots.iter().map(|slot| u64::from(slot.blocks.get())).sum();
    let found = u64::from(sb.blocks.get());
    if !slots.is_empty() && blocks != found {
        let what = format_args!("counts {found} blocks, the blobs have {blocks}");
        findings.mismatch("super block", "blocks", blocks, found, what);
    }
    let inlined = ImageFlags::INLINED_CHUNK_DIGEST;
    let all = image.blobs().iter();
    let all = all.map(|blob| blob.features.contains(BlobFeatures::INLINED_CHUNK_DIGEST));
    if image.flags().contains(inlined) && all.into_iter().any(|has| !has) {
        let what = "flag INLINED_CHUNK_DIGEST is set, but a blob has no digests";
        findings.mismatch("super block", "flag INLINED_CHUNK_DIGEST", "not set", "set", what);
    }
    // In the flat address space the blobs follow the bootstrap, apart from each other.
    let mut end = image.len() / BLOCK_SIZE;
    for (i, slot) in slots.iter().enumerate() {
        let start = u64::from(slot.mapped_block.get());
        if start < end {
            let what = format_args!("is mapped at block {start}, which others have up to {end}");
            let expected = format_args!("{end} or more");
            findings.mismatch(
                format_args!("device slot {i}"),
                "mapped block",
                expected,
                start,
                what,
            );
        }
        end = end.max(start + u64::from(slot.blocks.get()));
    }
}

/// Checks each record by itself and against its neighbour. The table of a blob whose records
/// contradict each other is left out.
fn chunk_table(image: &Bootstrap, findings: &mut Findings) -> Vec<Option<ChunkDigests>> {
    let records = image.chunk_records();
    let mut previous: Option<&ChunkRecord> = None;
    for (i, record) in records.iter().enumerate() {
        let at = image.chunk_table_offset() + (i * size_of::<ChunkRecord>()) as u64;
        let mut problem = |what: &str| {
            findings.problem(format_args!("chunk table record {i} at byte {at}"), what);
        };
        let index = record.blob_index.get();
        if u64::from(index) >= image.blobs().len() as u64 {
            problem("no such blob");
        }
        if ChunkFlags::from_bits(record.flags.get()).is_none() {
            problem("unknown flags");
        }
        let key = |record: &ChunkRecord| (record.digest, record.blob_index.get());
        if previous.is_some_and(|previous| key(previous) >= key(record)) {
            problem("not above the record before it");
        }
        previous = Some(record);
    }
    if records.is_empty() && !image.blobs().is_empty() {
        findings.undecided("no chunk table, so no chunk has a digest to compare with");
        return image.blobs().iter().map(|_| None).collect();
    }
    let mut table = |index| match image.chunk_digests(index) {
        Ok(digests) => Some(digests),
        Err(e) => {
            findings.problem("chunk table", e);
            None
        }
    };
    image.blobs().iter().map(|blob| table(blob.index)).collect()
}

/// Compares the chunk table of the bootstrap with the chunk-info array of a blob.
fn compare_tables(
    image: &Bootstrap,
    index: BlobIndex,
    chunks: &ChunkInfos,
    table: &ChunkDigests,
    findings: &mut Findings,
) {
    let blob = &image.blobs()[usize::from(index.0)];
    for i in 0..chunks.len() {
        let (Some(info), Some(record)) = (chunks.get(ChunkIndex(i)), table.record(ChunkIndex(i)))
        else {
            continue;
        };
        // The table has no place for the stored range of a batch.
        let stored = match info.form {
            ChunkForm::Batch { .. } => None,
            _ => Some((
                info.compressed_offset == record.compressed_offset.get()
                    && info.compressed_size == record.compressed_size.get(),
                "stored range",
            )),
        };
        let has_crc = record.flags.get() & ChunkFlags::HAS_CRC32C.bits() != 0;
        let crc = info.crc32c.filter(|_| has_crc);
        let facts = [
            (info.uncompressed_offset == record.uncompressed_offset.get(), "uncompressed offset"),
            (info.uncompressed_size == record.uncompressed_size.get(), "uncompressed size"),
            (crc.is_none_or(|crc| crc == record.crc32c.get()), "CRC"),
        ];
        for (equal, what) in facts.into_iter().chain(stored) {
            if !equal {
                findings.problem(
                    format_args!("{}, chunk {i}", place(blob)),
                    format_args!("{what} in the chunk table is not that in the chunk-info array"),
                );
            }
        }
    }
}
