//! Why a backend could not give the bytes, and what that means for the next attempt.

use std::io;
use std::time::Duration;

use crate::rafs::id::BlobId;

/// Why a backend could not give the bytes. `source_name` is [`Backend::name`](super::Backend::name),
/// the name of one of its sources, or a file's path. No variant holds a secret: addresses are without
/// user, password and query.
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
    /// The source sends, but so little that it would take forever.
    #[error("{source_name} sent {bytes} bytes in {} ms", within.as_millis())]
    TooSlow { source_name: String, bytes: u64, within: Duration },
    /// There is no way to the source: no address, no connection, no agreement about TLS.
    #[error("{source_name}: {reason}")]
    Connect { source_name: String, reason: String },
    /// The connection broke while the answer was on its way.
    #[error("{source_name}: {reason}")]
    Broken { source_name: String, reason: String },
    /// The source does not let us in.
    #[error("{source_name} denies access: {reason}")]
    Denied { source_name: String, reason: String },
    /// The source wants to be asked less often.
    #[error("{source_name}: HTTP status 429, too many requests{}", asks_to_wait(retry_after))]
    Throttled { source_name: String, retry_after: Option<Duration> },
    /// The source says that it is at fault.
    #[error("{source_name}: HTTP status {status}{}", asks_to_wait(retry_after))]
    Server { source_name: String, status: u16, retry_after: Option<Duration> },
    /// The answer breaks the rules, such as a range that nobody asked for.
    #[error("{source_name}: {reason}")]
    Protocol { source_name: String, reason: String },
}

fn asks_to_wait(retry_after: &Option<Duration>) -> String {
    retry_after.map(|d| format!(", asks to wait {} s", d.as_secs())).unwrap_or_default()
}

impl BackendError {
    /// May the same read succeed soon, without anybody's action?
    pub fn retryable(&self) -> bool {
        match self {
            BackendError::NotFound { .. }
            | BackendError::OutOfRange { .. }
            | BackendError::Denied { .. } => false,
            BackendError::ShortRead { .. }
            | BackendError::Timeout { .. }
            | BackendError::TooSlow { .. }
            | BackendError::Connect { .. }
            | BackendError::Broken { .. }
            | BackendError::Throttled { .. }
            | BackendError::Server { .. }
            | BackendError::Protocol { .. } => true,
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

    /// How long the source asks to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            BackendError::Throttled { retry_after, .. }
            | BackendError::Server { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The kind of failure, as a label for counters and logs.
    pub fn cause(&self) -> BackendCause {
        match self {
            BackendError::NotFound { .. } => BackendCause::NotFound,
            BackendError::OutOfRange { .. } => BackendCause::OutOfRange,
            BackendError::ShortRead { .. } => BackendCause::ShortRead,
            BackendError::Io { .. } => BackendCause::Io,
            BackendError::Timeout { .. } | BackendError::TooSlow { .. } => BackendCause::Timeout,
            BackendError::Connect { .. } => BackendCause::Connect,
            BackendError::Broken { .. } => BackendCause::Broken,
            BackendError::Denied { .. } => BackendCause::Denied,
            BackendError::Throttled { .. } => BackendCause::Throttled,
            BackendError::Server { .. } => BackendCause::Server,
            BackendError::Protocol { .. } => BackendCause::Protocol,
        }
    }
}

/// Kinds of [`BackendError`] that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendCause {
    NotFound,
    OutOfRange,
    ShortRead,
    Io,
    Timeout,
    Connect,
    Broken,
    Denied,
    Throttled,
    Server,
    Protocol,
}

impl BackendCause {
    pub const ALL: [BackendCause; 11] = [
        BackendCause::NotFound,
        BackendCause::OutOfRange,
        BackendCause::ShortRead,
        BackendCause::Io,
        BackendCause::Timeout,
        BackendCause::Connect,
        BackendCause::Broken,
        BackendCause::Denied,
        BackendCause::Throttled,
        BackendCause::Server,
        BackendCause::Protocol,
    ];

    /// Label of the metric.
    pub fn label(self) -> &'static str {
        match self {
            BackendCause::NotFound => "not_found",
            BackendCause::OutOfRange => "out_of_range",
            BackendCause::ShortRead => "short_read",
            BackendCause::Io => "io",
            BackendCause::Timeout => "timeout",
            BackendCause::Connect => "connect",
            BackendCause::Broken => "broken",
            BackendCause::Denied => "denied",
            BackendCause::Throttled => "throttled",
            BackendCause::Server => "server",
            BackendCause::Protocol => "protocol",
        }
    }
}
