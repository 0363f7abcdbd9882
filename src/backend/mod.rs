//! The bytes of blobs, wherever they are.
//!
//! A [`Backend`] answers ranged reads of blobs by id, as a stream: the first bytes can be
//! decompressed and verified while the rest is on its way. A read holds no thread while it waits,
//! and dropping it ends it. Backends do not verify, cache or retry what a caller could retry;
//! `blob` does. Nothing here knows what a chunk is.

use std::io;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use crate::rafs::id::BlobId;

pub mod localfs;

pub use localfs::{LocalFs, LocalFsConfig};

/// The bytes of one read, in order, in pieces of any size but zero. Ends behind the last byte
/// asked for, or with an error; a stream that ends early is [`BackendError::ShortRead`].
pub type ByteStream = BoxStream<'static, Result<Bytes, BackendError>>;

/// A source of blobs.
///
/// Implementations bound their own memory and threads, but not time: whoever asks drops the future
/// or the stream when it has waited long enough.
pub trait Backend: Send + Sync {
    /// Streams bytes `range` of `blob`. An empty range yields an empty stream.
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>>;

    /// Bytes of the whole blob file.
    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>>;

    /// What the operator calls this source, for logs: `localfs /var/lib/blobs`. Holds no secret.
    fn name(&self) -> &str;

    /// What `range` of `blob` gave did not match its digest. A backend with several sources takes
    /// another one for the next read of the range; others have nothing to do.
    fn mistrust(&self, blob: &BlobId, range: Range<u64>) {
        let _ = (blob, range);
    }
}

/// Why a backend could not give the bytes. `source_name` is [`Backend::name`] or a file's path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// No source has the blob.
    #[error("{source_name} has no blob {blob}")]
    NotFound { blob: BlobId, source_name: String },
    /// The blob is there but ends before the range does.
    #[error("{source_name} has {size} bytes, {start}..{end} were asked for")]
    OutOfRange { source_name: String, size: u64, start: u64, end: u64 },
    /// Fewer bytes than asked for arrived before the stream ended.
    #[error("{source_name} ended after {got} of {want} bytes")]
    ShortRead { source_name: String, got: u64, want: u64 },
    /// The system refused or failed.
    #[error("reading {source_name}")]
    Io { source_name: String, source: io::Error },
    /// The source did not answer in the time given to it.
    #[error("{source_name} did not answer in {} ms", after.as_millis())]
    Timeout { source_name: String, after: Duration },
}

impl BackendError {
    /// May the same read succeed soon, without anybody's action?
    pub fn retryable(&self) -> bool {
        match self {
            BackendError::NotFound { .. } | BackendError::OutOfRange { .. } => false,
            BackendError::ShortRead { .. } | BackendError::Timeout { .. } => true,
            BackendError::Io { source, .. } => !matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::Unsupported
            ),
        }
    }

    /// The kind of failure, as a label for counters and logs.
    pub fn cause(&self) -> BackendCause {
        match self {
            BackendError::NotFound { .. } => BackendCause::NotFound,
            BackendError::OutOfRange { .. } | BackendError::ShortRead { .. } => {
                BackendCause::ShortRead
            }
            BackendError::Io { .. } => BackendCause::Io,
            BackendError::Timeout { .. } => BackendCause::Timeout,
        }
    }
}

/// Kinds of [`BackendError`] that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendCause {
    NotFound,
    ShortRead,
    Io,
    Timeout,
}

impl BackendCause {
    pub const ALL: [BackendCause; 4] =
        [BackendCause::NotFound, BackendCause::ShortRead, BackendCause::Io, BackendCause::Timeout];

    /// Label of the metric.
    pub fn label(self) -> &'static str {
        match self {
            BackendCause::NotFound => "not_found",
            BackendCause::ShortRead => "short_read",
            BackendCause::Io => "io",
            BackendCause::Timeout => "timeout",
        }
    }
}
