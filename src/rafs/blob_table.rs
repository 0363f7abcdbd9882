//! What a bootstrap says about its blobs.

use super::codec::{Compressor, Digester};
use super::id::{BlobId, BlobIndex};
use super::layout::BlobFeatures;

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
