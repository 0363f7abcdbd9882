//! Why an image could not be built.

use std::io;
use std::path::PathBuf;

use crate::rafs::FormatError;

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
    /// The stream of a layer failed, at this byte of the uncompressed tar.
    #[error("cannot read the layer from byte {offset} of its tar on")]
    ReadLayer { offset: u64, source: io::Error },
    /// A layer is damaged, or asks for what no image can have. With the byte of the uncompressed tar
    /// where the entry begins, if that is known.
    #[error("layer{}: {reason}", at_byte(.offset))]
    Layer { offset: Option<u64>, reason: String },
    /// An image to build on cannot be read.
    #[error("cannot read the image {name}")]
    Image { name: String, source: FormatError },
    /// Images that do not fit together.
    #[error("{name}: {reason}")]
    Mismatch { name: String, reason: String },
    /// RAFS has no place for this.
    #[error("{}: {reason}", path.display())]
    Unsupported { path: PathBuf, reason: String },
    /// The image as a whole would break a limit of the format.
    #[error("{what} would exceed {limit}{advice}")]
    Limit { what: &'static str, limit: u64, advice: &'static str },
    /// A codec failed, for want of memory.
    #[error("cannot compress with {codec}")]
    Compress { codec: &'static str, source: io::Error },
    /// The blob could not be written.
    #[error("cannot write the blob")]
    WriteBlob { source: io::Error },
    /// The image could not be written.
    #[error("cannot write {}", path.display())]
    Output { path: PathBuf, source: io::Error },
}

impl BuildError {
    /// Names the place of a blob that could not be written.
    pub fn blob_at(self, path: &std::path::Path) -> BuildError {
        match self {
            BuildError::WriteBlob { source } => {
                BuildError::Output { path: path.to_owned(), source }
            }
            other => other,
        }
    }
}

fn at_byte(offset: &Option<u64>) -> String {
    offset.map(|offset| format!(", byte {offset} of its tar")).unwrap_or_default()
}
