//! The chunk table: digests of chunks, needed to verify data and not to find it.

use super::bootstrap::Bootstrap;
use super::error::{FormatError, Result};
use super::id::{BlobIndex, ChunkIndex};
use super::layout::ChunkRecord;

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
}
