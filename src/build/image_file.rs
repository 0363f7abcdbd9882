//! The file that a user names as an image: a bootstrap, or a packed blob with one inside.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;

use crate::rafs::id::BlobId;
use crate::rafs::toc::PackedBlob;
use crate::rafs::{Bootstrap, FormatError};

/// An image that is open for reading.
#[derive(Debug)]
pub struct ImageFile {
    pub bootstrap: Bootstrap,
    /// Set if the file is a packed blob, so that it holds the chunk data too.
    pub packed: Option<PackedBlob>,
}

/// Opens `path`, whichever of both it is. A layer that cannot know the id of its own blob is given
/// the name of the file, if that is one.
///
/// # Errors
///
/// A [`FormatError`] is in the chain of causes, see [`is_undecided`].
pub fn open(path: &Path) -> Result<ImageFile> {
    let describe = || format!("{}", path.display());
    let io = |source| FormatError::Io { path: path.display().to_string(), source };
    let file = File::open(path).map_err(io)?;
    // A packed blob is known by its end: that of a layer without data starts with its bootstrap.
    let packed = PackedBlob::read(&file).ok();
    let bootstrap = match &packed {
        Some(packed) => packed
            .bootstrap(&file)
            .and_then(Bootstrap::from_bytes)
            .with_context(|| format!("bootstrap in packed blob {}", path.display()))?,
        // Not packed either: let the reader of bootstraps say what is missing.
        None => Bootstrap::open(path).with_context(describe)?,
    };
    let bootstrap = match path.file_stem().and_then(|stem| BlobId::parse(stem.as_encoded_bytes())) {
        Some(id) => bootstrap.with_blob_id(id).with_context(describe)?,
        None => bootstrap,
    };
    Ok(ImageFile { bootstrap, packed })
}

/// Whether `error` says nothing about the image, because it could not be read or is of a kind that
/// we do not read.
pub fn is_undecided(error: &anyhow::Error) -> bool {
    let undecided =
        |e: &FormatError| matches!(e, FormatError::Io { .. } | FormatError::Unsupported { .. });
    error.chain().any(|cause| cause.downcast_ref().is_some_and(undecided))
}

/// Bytes as JSON has them: as text where they are UTF-8, otherwise as base64 in a field of its own.
pub fn json_text(bytes: &[u8]) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (None, Some(base64(bytes))),
    }
}

/// Standard base64, padded.
pub fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Bytes for a terminal: printable text stays, all else is escaped.
pub fn printable(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' | '\'' => out.push(c),
                _ => out.extend(c.escape_debug()),
            }
        }
        for b in chunk.invalid() {
            out.push_str(&format!("\\x{b:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_printable_on_one_line() {
        // (bytes, printed)
        let cases: [(&[u8], &str); 5] = [
            (b"/plain name", "/plain name"),
            ("/\u{fc}n\u{ef}".as_bytes(), "/\u{fc}n\u{ef}"),
            (b"/a\nb\x1b[0m", "/a\\nb\\u{1b}[0m"),
            (b"/\xff\\", "/\\xff\\\\"),
            (b"it's", "it's"),
        ];
        for (bytes, want) in cases {
            assert_eq!(printable(bytes), want);
        }
    }

    #[test]
    fn text_is_text_and_the_rest_is_base64() {
        assert_eq!(json_text(b"/a"), (Some("/a".into()), None));
        assert_eq!(json_text(b"/\xff"), (None, Some("L/8=".into())));
    }
}
