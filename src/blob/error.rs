//! What can go wrong with chunks and with the cache.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::BackendError;
use crate::rafs::FormatError;
use crate::rafs::codec::CodecError;
use crate::rafs::id::{BlobId, BlobIndex, ChunkIndex};

/// The store or a blob cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The image has no blob of this index.
    #[error("the image has {count} blobs, none with index {}", index.0)]
    NoSuchBlob { index: BlobIndex, count: usize },
    /// The cache directory cannot be made or opened.
    #[error("cannot use {path} as cache directory")]
    CacheDir { path: PathBuf, source: io::Error },
    /// Others could change what is in the cache directory.
    #[error("{path} must be a directory of ours that nobody else can write to: {reason}")]
    UnsafeCacheDir { path: PathBuf, reason: String },
}

/// A chunk cannot be had. `id` is in the log too, once for each failed download.
#[derive(Debug, thiserror::Error)]
#[error("chunk {} of blob {blob} (error {id})", index.0)]
pub struct ChunkError {
    /// Unique in the life of the process, from 1.
    pub id: u64,
    pub blob: BlobId,
    pub index: ChunkIndex,
    pub source: ChunkFailure,
}

/// Why a chunk cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkFailure {
    /// The backend failed, for good or until the deadline. Bytes of the blob file.
    #[error("fetching bytes {start}..{end} from {backend}, {attempts} attempts")]
    Fetch { start: u64, end: u64, backend: String, attempts: u32, source: Arc<BackendError> },
    /// Nothing came in time; `last` is what the backend said before, if it said anything.
    #[error("not there after {} ms", waited.as_millis())]
    Timeout {
        waited: Duration,
        #[source]
        last: Option<Arc<BackendError>>,
    },
    /// What the backend gives does not match the digest in the image, nor did it the second time.
    #[error("the bytes from {backend} do not match the digest")]
    DigestMismatch { backend: String },
    /// What the backend gives cannot be decompressed, nor could it the second time.
    #[error("the bytes from {backend} cannot be decompressed")]
    Codec { backend: String, source: Arc<CodecError> },
    /// The context table of the blob is damaged, or contradicts the bootstrap.
    #[error("the context table of the blob")]
    Table(#[source] Arc<FormatError>),
    /// The inode and the context table disagree about the chunk.
    #[error("the inode says {said}, the context table {have}")]
    Contradiction { said: String, have: String },
    /// The daemon is ending.
    #[error("the download was given up")]
    Abandoned,
}

/// The error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
