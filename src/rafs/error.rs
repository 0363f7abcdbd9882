//! What can be wrong with a bootstrap, a chunk-info array or a packed blob.

/// A file of the format cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// Legal RAFS that this program does not read.
    #[error("{feature} images are not supported by this program")]
    Unsupported { feature: &'static str },
    /// `what` (a structure, by its name in the format) at byte `offset` breaks a rule.
    #[error("{what} at byte {offset}: {reason}")]
    Invalid { what: &'static str, offset: u64, reason: String },
    /// The file ends inside `what`.
    #[error("{what} at byte {offset} needs {len} bytes, the file has {size}")]
    Truncated { what: &'static str, offset: u64, len: u64, size: u64 },
    /// The file could not be read.
    #[error("cannot read {path}")]
    Io { path: String, source: std::io::Error },
}

impl FormatError {
    /// [`FormatError::Invalid`] with fewer words.
    pub(super) fn invalid(what: &'static str, offset: u64, reason: impl Into<String>) -> Self {
        FormatError::Invalid { what, offset, reason: reason.into() }
    }
}

pub type Result<T> = std::result::Result<T, FormatError>;
