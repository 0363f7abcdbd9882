//! The data blob: stored chunks, then the chunk-info array, then its header.
//!
//! The blob's name is the SHA-256 of the whole file, so it is known last.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::error::BuildError;
use super::output::Output;
use crate::rafs::codec::Compressor;
use crate::rafs::id::BlobId;
use crate::rafs::layout::{
    BLOCK_SIZE, BlobFeatures, CI_HEADER_SIZE, CI_MAGIC, ChunkFlags, ChunkRecord, CiHeader, CiV1,
    MAX_COMPRESSED_SIZE,
};

/// What every blob of this builder is: native, with version 1 of the chunk-info array.
pub const FEATURES: BlobFeatures = BlobFeatures::ALIGNED.union(BlobFeatures::CAP_TAR_TOC);

/// Where the blob goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobTarget {
    /// Into this directory, named by its id.
    Dir(PathBuf),
    /// To this file.
    File(PathBuf),
}

impl BlobTarget {
    /// The directory that will hold the blob.
    pub fn dir(&self) -> &Path {
        match self {
            BlobTarget::Dir(dir) => dir,
            BlobTarget::File(file) => super::output::parent_dir(file),
        }
    }
}

/// A blob that is being written.
pub struct BlobWriter {
    out: BufWriter<Output>,
    hash: Sha256,
    target: BlobTarget,
    /// Bytes written.
    offset: u64,
    /// Offset and size of each stored chunk.
    places: Vec<(u64, u32)>,
}

/// A blob that is complete.
#[derive(Debug)]
pub struct Blob {
    pub id: BlobId,
    pub path: PathBuf,
    /// Bytes of the file.
    pub size: u64,
    /// End of the last chunk in bytes, rounded up to a block.
    pub uncompressed_size: u64,
    pub ci_compressor: Compressor,
    /// Place and sizes of the chunk-info array in bytes.
    pub ci_offset: u64,
    pub ci_compressed_size: u64,
    pub ci_uncompressed_size: u64,
}

impl BlobWriter {
    pub fn create(target: BlobTarget) -> Result<BlobWriter, BuildError> {
        let out = BufWriter::with_capacity(256 << 10, Output::create(target.dir())?);
        Ok(BlobWriter { out, hash: Sha256::new(), target, offset: 0, places: Vec::new() })
    }

    /// Adds the stored form of the next chunk.
    pub fn append(&mut self, stored: &[u8]) -> Result<(), BuildError> {
        let size = u32::try_from(stored.len()).expect("a chunk has at most 16 MiB");
        self.places.push((self.offset, size));
        self.write(stored)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        let end = self.offset + bytes.len() as u64;
        if end > MAX_COMPRESSED_SIZE {
            return Err(BuildError::Limit {
                what: "the size of the blob",
                limit: MAX_COMPRESSED_SIZE,
                advice: "",
            });
        }
        self.hash.update(bytes);
        self.out.write_all(bytes).map_err(|e| self.out.get_ref().failed(e))?;
        self.offset = end;
        Ok(())
    }

    /// Tells `records`, in the order of the chunks, where they are stored, and completes the blob.
    /// Without chunks there is no blob.
    pub fn finish(
        mut self,
        records: &mut [ChunkRecord],
        compressor: Compressor,
    ) -> Result<Option<Blob>, BuildError> {
        assert_eq!(records.len(), self.places.len(), "every distinct chunk is stored once");
        let Some(last) = records.last() else { return Ok(None) };
        let uncompressed_size = last.uncompressed_offset.get()
            + u64::from(last.uncompressed_size.get()).next_multiple_of(BLOCK_SIZE);
        let mut table = Vec::with_capacity(size_of_val(records) / 5);
        for (record, (offset, size)) in records.iter_mut().zip(&self.places) {
            record.compressed_offset = U64::new(*offset);
            record.compressed_size = U32::new(*size);
            if *size != record.uncompressed_size.get() {
                record.flags |= U32::new(ChunkFlags::COMPRESSED.bits());
            }
            table.extend_from_slice(ci_entry(record).as_bytes());
        }
        let packed = compressor
            .compress(&table)
            .map_err(|source| BuildError::Compress { codec: "the blob's compressor", source })?;
        let (ci_compressor, stored) = match &packed {
            Some(packed) => (compressor, packed),
            None => (Compressor::None, &table),
        };
        let ci_offset = self.offset;
        let (ci_compressed_size, ci_uncompressed_size) = (stored.len() as u64, table.len() as u64);
        self.write(stored)?;

        let mut header = CiHeader::new_zeroed();
        header.magic = U32::new(CI_MAGIC);
        header.features = U32::new(FEATURES.bits());
        header.compressor = U32::new(ci_compressor as u32);
        header.entries =
            U32::new(u32::try_from(records.len()).expect("chunks have 24-bit indexes"));
        header.offset = U64::new(ci_offset);
        header.compressed_size = U64::new(ci_compressed_size);
        header.uncompressed_size = U64::new(ci_uncompressed_size);
        header.magic2 = U32::new(CI_MAGIC);
        self.write(header.as_bytes())?;
        debug_assert_eq!(self.offset, ci_offset + ci_compressed_size + CI_HEADER_SIZE);

        let id = BlobId::from_sha256(self.hash.finalize().into());
        let path = match self.target {
            BlobTarget::Dir(dir) => dir.join(id.as_str()),
            BlobTarget::File(file) => file,
        };
        let out = self
            .out
            .into_inner()
            .map_err(|e| BuildError::Output { path: path.clone(), source: e.into_error() })?;
        out.commit(&path)?;
        Ok(Some(Blob {
            id,
            path,
            size: self.offset,
            uncompressed_size,
            ci_compressor,
            ci_offset,
            ci_compressed_size,
            ci_uncompressed_size,
        }))
    }
}

/// The entry of the chunk-info array, version 1, for a stored chunk.
///
/// First word: bits 8..12 and 44..64 are bits 20..24 and 0..20 of the uncompressed size less one,
/// bits 12..44 those of the uncompressed offset. Second word: bits 0..40 are the compressed offset,
/// bits 40..44 and 44..64 the compressed size less one.
fn ci_entry(record: &ChunkRecord) -> CiV1 {
    let uncompressed_size = u64::from(record.uncompressed_size.get() - 1);
    let compressed_size = u64::from(record.compressed_size.get() - 1);
    CiV1 {
        uncompressed: U64::new(
            record.uncompressed_offset.get()
                | (uncompressed_size >> 20) << 8
                | (uncompressed_size & 0xF_FFFF) << 44,
        ),
        compressed: U64::new(
            record.compressed_offset.get()
                | (compressed_size >> 20) << 40
                | (compressed_size & 0xF_FFFF) << 44,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_info_entries_are_those_of_the_worked_example_and_use_the_high_nibbles() {
        // (uncompressed offset, size, compressed offset, size, bytes)
        let cases: [(u64, u32, u64, u32, &str); 3] = [
            (0, 5, 0, 5, "00000000004000000000000000400000"),
            (0x3000, 808, 0x2005, 808, "00300000007032000520000000703200"),
            // 16 MiB and 4 MiB - 1: bits above the twentieth.
            (
                0xFF0_1234_5000,
                1 << 24,
                0xAB_CDEF_0123,
                0x3F_FFFF,
                "005f3412f0ffffff2301efcdabe3ffff",
            ),
        ];
        for (uncompressed_offset, uncompressed_size, compressed_offset, compressed_size, bytes) in
            cases
        {
            let mut record = ChunkRecord::new_zeroed();
            record.uncompressed_offset = U64::new(uncompressed_offset);
            record.uncompressed_size = U32::new(uncompressed_size);
            record.compressed_offset = U64::new(compressed_offset);
            record.compressed_size = U32::new(compressed_size);
            assert_eq!(hex::encode(ci_entry(&record).as_bytes()), bytes);
        }
    }
}
