//! Names and numbers of the format that must not be mixed up.

use std::fmt;

use super::layout::SLOT_SIZE;

/// Name of a blob: 64 lower-case hexadecimal digits, or 64 times `x` in a layer's own bootstrap,
/// where the hash of the file that holds it cannot be known yet. Safe as a file name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId([u8; 64]);

impl BlobId {
    /// The id in the bootstrap of an unmerged packed layer.
    pub const UNKNOWN: BlobId = BlobId([b'x'; 64]);

    /// `None` unless `bytes` are 64 digits of `[0-9a-f]`, or 64 times `x`.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let id: [u8; 64] = bytes.try_into().ok()?;
        let hex = id.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (hex || id == [b'x'; 64]).then_some(BlobId(id))
    }

    /// The id of content whose SHA-256 is `digest`.
    pub fn from_sha256(digest: [u8; 32]) -> Self {
        let mut id = [0; 64];
        hex::encode_to_slice(digest, &mut id).expect("64 bytes hold the digits of 32");
        BlobId(id)
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("ASCII by construction")
    }

    pub fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Position of a blob in the blob table of one image, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobIndex(pub u8);

/// Position of a chunk in the chunk-info array of its blob, below `1 << 24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkIndex(pub u32);

/// Inode number as EROFS counts it: the inode starts `nid * 32` bytes into the metadata area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(pub u64);

impl Nid {
    /// Offset of the inode from the start of the bootstrap, in bytes.
    ///
    /// `meta_start` is the byte offset of the metadata area. `None` if the sum does not fit in 64
    /// bits, which only a damaged bootstrap can cause.
    pub fn byte_offset(self, meta_start: u64) -> Option<u64> {
        self.0.checked_mul(SLOT_SIZE)?.checked_add(meta_start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_id_is_a_safe_file_name() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(BlobId::parse(good.as_bytes()).unwrap().as_str(), good);
        assert_eq!(BlobId::parse(&[b'x'; 64]), Some(BlobId::UNKNOWN));
        for bad in [
            "../".repeat(22),
            good.to_uppercase(),
            good[1..].to_owned(),
            format!("{}/", &good[1..]),
        ] {
            assert_eq!(BlobId::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
