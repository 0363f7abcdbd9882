//! Chunks that hold nothing but zeros.
//!
//! RAFS has no holes: a sparse file is stored with chunks of zeros. A whole chunk of them is known
//! by its digest, so it can be shown as the hole it was, without a look at its bytes.

use crate::rafs::codec::Digester;
use crate::rafs::layout::{BLOCK_SIZE, ChunkAddr};
use crate::rafs::{BlobInfo, Bootstrap};

/// The chunk of zeros of each blob, if it has one.
pub(super) struct ZeroChunks {
    /// (chunk index, start block) by blob; empty if no blob has one.
    by_blob: Vec<Option<(u32, u32)>>,
}

impl ZeroChunks {
    /// Looks each blob's chunk of zeros up in the chunk table. Takes the time of one digest of a
    /// chunk for each digester in use.
    pub(super) fn find(image: &Bootstrap) -> ZeroChunks {
        let records = image.chunk_records();
        let mut by_blob = vec![None; image.blobs().len()];
        if records.is_empty() {
            return ZeroChunks { by_blob: Vec::new() };
        }
        let size = image.chunk_size();
        let zeros = vec![0; usize::try_from(size).expect("a chunk fits in memory")];
        for digester in [Digester::Blake3, Digester::Sha256] {
            let uses = |blob: &BlobInfo| blob.digester == digester;
            if !image.blobs().iter().any(uses) {
                continue;
            }
            let digest = digester.digest(&zeros);
            let start = records.partition_point(|record| record.digest < digest);
            for record in records[start..].iter().take_while(|record| record.digest == digest) {
                let blob = usize::try_from(record.blob_index.get()).unwrap_or(usize::MAX);
                let start_block = u32::try_from(record.uncompressed_offset.get() / BLOCK_SIZE);
                if let (Some(slot @ None), Ok(start_block)) = (by_blob.get_mut(blob), start_block)
                    && image.blobs().get(blob).is_some_and(uses)
                    && record.uncompressed_size.get() == size
                {
                    *slot = Some((record.index.get(), start_block));
                }
            }
        }
        if by_blob.iter().all(Option::is_none) {
            by_blob.clear();
        }
        ZeroChunks { by_blob }
    }

    /// Whether no blob has such a chunk.
    pub(super) fn is_empty(&self) -> bool {
        self.by_blob.is_empty()
    }

    /// Whether the chunk at `addr` is one.
    pub(super) fn contains(&self, addr: ChunkAddr) -> bool {
        let zero =
            usize::from(addr.device()).checked_sub(1).and_then(|blob| self.by_blob.get(blob));
        zero == Some(&Some((addr.chunk_index(), addr.start_block())))
    }
}
