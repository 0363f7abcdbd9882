//! Why an image could not be read or written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What failed. No variant ever holds a secret: addresses are without their query, which may be a
/// signature.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// The name of an image cannot be understood.
    #[error("{text:?} is no image reference: {reason}")]
    Reference { text: String, reason: String },
    /// The client cannot be set up.
    #[error("HTTP client: {reason}")]
    Setup { reason: String },
    /// No answer arrived, or it broke off.
    #[error("{what}: {reason}")]
    Transport { what: String, reason: String },
    /// The server refuses these credentials, or wants some.
    #[error("{host} denies access: {reason}")]
    Denied { host: String, reason: String },
    /// Credentials could not be found out.
    #[error("credentials for {host}: {reason}")]
    Credentials { host: String, reason: String },
    /// It does not exist.
    #[error("{what} does not exist")]
    NotFound { what: String },
    /// Another status than is right for the request.
    #[error("{what}: HTTP status {status}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Status { what: String, status: u16, detail: String, retry_after: Option<Duration> },
    /// An answer that breaks the rules.
    #[error("{what}: {reason}")]
    Protocol { what: String, reason: String },
    /// Content is not what its name says.
    #[error("{what} does not match its digest: it has {got}")]
    Digest { what: String, got: String },
    /// Content has another size than its descriptor says.
    #[error("{what} has {got} bytes instead of {want}")]
    Size { what: String, got: u64, want: u64 },
    /// More than is ever accepted.
    #[error("{what} has more than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    /// A document that is none.
    #[error("{what} is not valid: {reason}")]
    Invalid { what: String, reason: String },
    /// Legal, but not done here.
    #[error("{what} is not supported: {reason}")]
    Unsupported { what: String, reason: String },
    /// The system refused or failed.
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: Arc<io::Error> },
}

impl OciError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> OciError {
        OciError::Io { action, path: path.to_owned(), source: Arc::new(source) }
    }

    /// May the same succeed soon, without anybody's action?
    pub fn retryable(&self) -> bool {
        match self {
            OciError::Transport { .. } => true,
            // Truncated or garbled on the way; a second copy may be right.
            OciError::Digest { .. } | OciError::Size { .. } => true,
            OciError::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// How long the server asks to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            OciError::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
