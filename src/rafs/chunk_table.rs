//! The chunk table: digests of chunks, needed to verify data. Where it has a record of each chunk of a blob,
//! it also tells all that the blob's own context table tells, so that this need not be fetched.

use zerocopy::IntoBytes;

use super::blob_table::BlobInfo;
use super::bootstrap::Bootstrap;
use super::ci::v1_entry;
use super::error::{FormatError, Result};
use super::id::{BlobIndex, ChunkIndex};
use super::layout::{BLOCK_SIZE, BlobFeatures, ChunkFlags, ChunkRecord};

/// No record for this chunk.
const NONE: u32 = u32::MAX;

/// The chunk-table records of one blob by chunk index: 4 bytes for each chunk of the blob, and a
/// share in the bootstrap.
#[derive(Clone, Debug)]
pub struct ChunkDigests {
    bootstrap: Bootstrap,
    /// Position in the chunk table, by chunk index.
    records: Vec<u32>,
}

impl ChunkDigests {
    pub(super) fn new(bootstrap: &Bootstrap, blob: BlobIndex) -> Result<Self> {
        let table = bootstrap.chunk_records();
        let invalid = |i: usize, reason: String| {
            let at = bootstrap.chunk_table_offset() + (i * size_of::<ChunkRecord>()) as u64;
            FormatError::invalid("chunk table record", at, reason)
        };
        let info = bootstrap
            .blobs()
            .get(usize::from(blob.0))
            .ok_or_else(|| FormatError::invalid("blob table", 0, format!("no blob {}", blob.0)))?;
        let mut records = vec![NONE; usize::try_from(info.chunk_count).expect("at most 1 << 24")];
        for (i, record) in table.iter().enumerate() {
            if record.blob_index.get() != u32::from(blob.0) {
                continue;
            }
            let index = record.index.get();
            let slot = usize::try_from(index)
                .ok()
                .and_then(|index| records.get_mut(index))
                .ok_or_else(|| {
                    invalid(i, format!("chunk {index} of {} in blob {}", info.chunk_count, info.id))
                })?;
            let uncompressed_size = record.uncompressed_size.get();
            let end = record.uncompressed_offset.get().checked_add(uncompressed_size.into());
            if !(1..=info.chunk_size).contains(&uncompressed_size)
                || end.is_none_or(|end| end > info.uncompressed_size)
            {
                return Err(invalid(i, format!("chunk {index} is not inside blob {}", info.id)));
            }
            if *slot != NONE {
                return Err(invalid(i, format!("second record of chunk {index}")));
            }
            *slot = u32::try_from(i).expect("80 bytes each of at most 2 GiB");
        }
        Ok(ChunkDigests { bootstrap: bootstrap.clone(), records })
    }

    /// The digest of a chunk's uncompressed bytes, by the blob's digester; `None` if the table has
    /// no record of it.
    pub fn get(&self, index: ChunkIndex) -> Option<&[u8; 32]> {
        self.record(index).map(|record| &record.digest)
    }

    /// The whole record, to compare with the chunk-info array.
    pub fn record(&self, index: ChunkIndex) -> Option<&ChunkRecord> {
        let i = *self.records.get(usize::try_from(index.0).ok()?)?;
        self.bootstrap.chunk_records().get(usize::try_from(i).ok()?)
    }

    /// The context table of `blob`, decompressed, byte for byte, if the records tell it: there is one for
    /// each chunk, and the blob's table has entries of version 1, which are nothing but sizes and
    /// places. What is inside a batch only the blob itself tells.
    pub fn entries(&self, blob: &BlobInfo) -> Option<Vec<u8>> {
        let records = self.bootstrap.chunk_records().len() as u64;
        if blob.features.contains(BlobFeatures::CHUNK_INFO_V2) || records < blob.chunk_count.into()
        {
            return None;
        }
        let unlike = ChunkFlags::HOLE | ChunkFlags::ENCRYPTED | ChunkFlags::BATCH;
        let size = |size: u32| (1..=1 << 24).contains(&size);
        let mut table = Vec::with_capacity(usize::try_from(blob.ci_uncompressed_size).ok()?);
        for index in 0..blob.chunk_count {
            let record = self.record(ChunkIndex(index))?;
            let (stored, place) =
                (record.compressed_offset.get(), record.uncompressed_offset.get());
            let fits = size(record.compressed_size.get())
                && size(record.uncompressed_size.get())
                && stored < 1 << 40
                && place < 1 << 44
                && place.is_multiple_of(BLOCK_SIZE);
            if !fits || ChunkFlags::from_bits_retain(record.flags.get()).intersects(unlike) {
                return None;
            }
            table.extend_from_slice(v1_entry(record).as_bytes());
        }
        (table.len() as u64 == blob.ci_uncompressed_size).then_some(table)
    }
}
