//! What a bootstrap says about its blobs.

use std::collections::HashSet;

use super::codec::{Compressor, Digester};
use super::error::{FormatError, Result};
use super::id::{BlobId, BlobIndex};
use super::layout::{
    BLOCK_SIZE, BatchContext, BlobEntry, BlobFeatures, CI_HEADER_SIZE, CiV1, CiV2, DeviceSlot,
    MAX_CHUNKS, MAX_COMPRESSED_SIZE, MAX_UNCOMPRESSED_SIZE, TarHeader,
};
use super::toc::MAX_TOC_SIZE;

/// Feature bits that no reader knows but must know, and one that is never stored.
const REFUSED_FEATURES: u32 = 0x8000_F000;

/// One blob of an image: a checked entry of the blob table.
#[derive(Clone, Debug)]
pub struct BlobInfo {
    pub id: BlobId,
    pub index: BlobIndex,
    /// Entries of the chunk-info array, at most `MAX_CHUNKS`.
    pub chunk_count: u32,
    /// Bytes; the image's.
    pub chunk_size: u32,
    pub compressor: Compressor,
    pub digester: Digester,
    pub features: BlobFeatures,
    /// First byte of the blob file that is not chunk data: bounds every chunk.
    pub data_end: u64,
    /// Bytes of the uncompressed blob, a multiple of 4096: the size of its cache file.
    pub uncompressed_size: u64,
    /// The chunk-info array (context table) in the blob file: compression, place, sizes in bytes.
    pub ci_compressor: Compressor,
    pub ci_offset: u64,
    pub ci_compressed_size: u64,
    pub ci_uncompressed_size: u64,
}

/// Checks the blob table against the device table; both have the same number of entries.
/// `offset` is the byte at which the blob table starts.
pub(super) fn check(
    entries: &[BlobEntry],
    slots: &[DeviceSlot],
    offset: u64,
    chunk_size: u32,
) -> Result<Vec<BlobInfo>> {
    let mut ids = HashSet::new();
    let mut blobs = Vec::with_capacity(entries.len());
    for (i, (entry, slot)) in entries.iter().zip(slots).enumerate() {
        let at = offset + (i * size_of::<BlobEntry>()) as u64;
        let invalid = |reason: String| FormatError::invalid("blob table entry", at, reason);
        supported(entry)?;
        let blob = check_entry(entry, i, chunk_size).map_err(invalid)?;
        if slot.tag != entry.blob_id {
            return Err(invalid("device slot names another blob".to_owned()));
        }
        if u64::from(slot.blocks.get()) != entry.uncompressed_size.get() / BLOCK_SIZE {
            let reason = format!("device slot has {} blocks", slot.blocks);
            return Err(invalid(reason));
        }
        if !ids.insert(blob.id) {
            return Err(invalid(format!("second blob named {}", blob.id)));
        }
        blobs.push(blob);
    }
    Ok(blobs)
}

/// Names the feature of a blob that we do not read.
fn supported(entry: &BlobEntry) -> Result<()> {
    let features = BlobFeatures::from_bits_retain(entry.features.get());
    let refused = [
        (BlobFeatures::TARFS, "tarfs"),
        (BlobFeatures::ZRAN, "zran (OCI reference)"),
        (BlobFeatures::ENCRYPTED, "encrypted"),
        (BlobFeatures::EXTERNAL, "external"),
        (BlobFeatures::SEPARATE, "tar-ref (OCI reference)"),
        (BlobFeatures::CHUNKDICT_GENERATED, "generated chunk dictionary"),
    ];
    if let Some((_, feature)) = refused.into_iter().find(|&(bit, _)| features.contains(bit)) {
        return Err(FormatError::Unsupported { feature });
    }
    if entry.cipher.get() != 0 {
        return Err(FormatError::Unsupported { feature: "encrypted" });
    }
    Ok(())
}

/// The rules of one entry, or which one it breaks.
fn check_entry(
    entry: &BlobEntry,
    position: usize,
    chunk_size: u32,
) -> std::result::Result<BlobInfo, String> {
    let ensure = |holds: bool, reason: &str| if holds { Ok(()) } else { Err(reason.to_owned()) };

    let id = BlobId::parse(&entry.blob_id).ok_or("blob id is not 64 hexadecimal digits")?;
    let index = u8::try_from(position).map_err(|_| "too many blobs")?;
    ensure(entry.blob_index.get() == u32::from(index), "index is not the position")?;
    ensure(entry.chunk_size.get() == chunk_size, "chunk size is not the image's")?;
    let features = entry.features.get();
    if features & REFUSED_FEATURES != 0 {
        return Err(format!("unknown features {:#x}", features & REFUSED_FEATURES));
    }
    let features = BlobFeatures::from_bits_retain(features);
    ensure(features.contains(BlobFeatures::ALIGNED), "chunks are not aligned to blocks")?;
    let v2 = features.contains(BlobFeatures::CHUNK_INFO_V2);
    let batch = features.contains(BlobFeatures::BATCH);
    ensure(v2 || !batch, "batches need version 2 of the chunk-info array")?;

    let compressor = |number| {
        Compressor::from_number(number).ok_or_else(|| format!("unknown compressor {number}"))
    };
    let digester = entry.digester.get();
    let digester =
        Digester::from_number(digester).ok_or_else(|| format!("unknown digester {digester}"))?;

    let compressed_size = entry.compressed_size.get();
    let uncompressed_size = entry.uncompressed_size.get();
    ensure(compressed_size <= MAX_COMPRESSED_SIZE, "compressed size exceeds 1 TiB")?;
    ensure(uncompressed_size <= MAX_UNCOMPRESSED_SIZE, "uncompressed size exceeds 16 TiB")?;
    let uncompressed_size = uncompressed_size.next_multiple_of(BLOCK_SIZE);
    ensure(uncompressed_size / BLOCK_SIZE <= u32::MAX.into(), "more blocks than 32 bits count")?;
    ensure(uncompressed_size != 0, "no blocks")?;
    let chunk_count = entry.chunk_count.get();
    let count = u64::from(chunk_count);
    ensure(chunk_count <= MAX_CHUNKS, "more than 1 << 24 chunks")?;
    // Every chunk starts a block of its own, and the next one follows without a gap.
    ensure(
        (count * BLOCK_SIZE..=count * u64::from(chunk_size)).contains(&uncompressed_size),
        "chunk count does not fit the uncompressed size",
    )?;
    let toc_size = entry.toc_size.get();
    ensure(toc_size <= MAX_TOC_SIZE && toc_size.is_multiple_of(128), "size of table of contents")?;

    let ci_offset = entry.ci_offset.get();
    let ci_compressed_size = entry.ci_compressed_size.get();
    let ci_uncompressed_size = entry.ci_uncompressed_size.get();
    let entries = count * if v2 { size_of::<CiV2>() } else { size_of::<CiV1>() } as u64;
    let contexts = if batch { count * size_of::<BatchContext>() as u64 } else { 0 };
    ensure(
        (entries..=entries + contexts).contains(&ci_uncompressed_size),
        "size of the chunk-info array does not fit the chunk count",
    )?;
    ensure(
        ci_compressed_size <= ci_uncompressed_size,
        "chunk-info array is larger stored than read",
    )?;
    let ci_end = ci_offset
        .checked_add(ci_compressed_size)
        .and_then(|end| end.checked_add(CI_HEADER_SIZE))
        .ok_or("chunk-info array ends beyond 64 bits")?;
    let data_end = if !features.contains(BlobFeatures::CAP_TAR_TOC) {
        compressed_size
    } else {
        ensure(ci_end <= compressed_size, "chunk-info array is not inside the blob")?;
        let header = features.contains(BlobFeatures::HAS_TAR_HEADER);
        ci_offset
            .checked_sub(if header { size_of::<TarHeader>() as u64 } else { 0 })
            .ok_or("chunk-info array starts inside the tar header before it")?
    };
    Ok(BlobInfo {
        id,
        index: BlobIndex(index),
        chunk_count,
        chunk_size,
        compressor: compressor(entry.compressor.get())?,
        digester,
        features,
        data_end,
        uncompressed_size,
        ci_compressor: compressor(entry.ci_compressor.get())?,
        ci_offset,
        ci_compressed_size,
        ci_uncompressed_size,
    })
}
