//! Why an image could not be built.

use std::io;
use std::path::PathBuf;

/// A build that failed. Paths are those of the source tree, or of the file being written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The source tree could not be read.
    #[error("cannot {action} {}", path.display())]
    Source { action: &'static str, path: PathBuf, source: io::Error },
    /// What was found when the tree was scanned is not what was found when it was read.
    #[error("{} changed while the image was being built: {what}", path.display())]
    Changed { path: PathBuf, what: &'static str },
    /// RAFS has no place for this.
    #[error("{}: {reason}", path.display())]
    Unsupported { path: PathBuf, reason: String },
    /// The image as a whole would break a limit of the format.
    #[error("{what} would exceed {limit}{advice}")]
    Limit { what: &'static str, limit: u64, advice: &'static str },
    /// A codec failed, for want of memory.
    #[error("cannot compress with {codec}")]
    Compress { codec: &'static str, source: io::Error },
    /// The image could not be written.
    #[error("cannot write {}", path.display())]
    Output { path: PathBuf, source: io::Error },
}
