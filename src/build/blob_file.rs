//! The data blob: stored chunks, then the chunk-info array, then its header.
//!
//! The blob's name is the SHA-256 of the whole file, so it is known last. What else a packed blob
//! holds is in `packed`.

use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::error::BuildError;
use super::pipeline::Settings;
use crate::rafs::ci::v1_entry;
use crate::rafs::codec::Compressor;
use crate::rafs::id::BlobId;
use crate::rafs::layout::{
    BLOCK_SIZE, BlobEntry, BlobFeatures, CI_HEADER_SIZE, CI_MAGIC, ChunkFlags, ChunkRecord,
    CiHeader, MAX_COMPRESSED_SIZE,
};

/// What every blob of this builder is: version 1 of the chunk-info array.
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

    /// The file for a blob of this id.
    pub fn path(&self, id: BlobId) -> PathBuf {
        match self {
            BlobTarget::Dir(dir) => dir.join(id.as_str()),
            BlobTarget::File(file) => file.clone(),
        }
    }
}

/// A blob that is being written, from its start to its end. Memory: 12 bytes for each chunk.
pub struct BlobWriter<W> {
    out: W,
    hash: Sha256,
    /// Bytes written.
    offset: u64,
    /// Offset and size of each stored chunk.
    places: Vec<(u64, u32)>,
}

/// The chunk-info array of a blob, as it was stored.
#[derive(Debug)]
pub struct ChunkInfo {
    /// The array and its header, as the file of the daemon's cache has them: the array padded to 4096
    /// bytes with zeros.
    pub meta: Vec<u8>,
    /// SHA-256 of the array, and of its header.
    pub digests: [[u8; 32]; 2],
    /// The blob as the table of an image has it; its id and what only packed blobs have is missing.
    pub entry: BlobEntry,
}

impl<W: Write> BlobWriter<W> {
    pub fn new(out: W) -> BlobWriter<W> {
        BlobWriter { out, hash: Sha256::new(), offset: 0, places: Vec::new() }
    }

    /// Bytes written so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// SHA-256 of what was written so far.
    pub fn digest(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }

    /// Adds the stored form of the next chunk.
    pub fn append(&mut self, stored: &[u8]) -> Result<(), BuildError> {
        let size = u32::try_from(stored.len()).expect("a chunk has at most 16 MiB");
        self.places.push((self.offset, size));
        self.write(stored)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        let end = self.offset + bytes.len() as u64;
        if end > MAX_COMPRESSED_SIZE {
            return Err(BuildError::Limit {
                what: "the size of the blob",
                limit: MAX_COMPRESSED_SIZE,
                advice: "",
            });
        }
        self.hash.update(bytes);
        self.out.write_all(bytes).map_err(|source| BuildError::WriteBlob { source })?;
        self.offset = end;
        Ok(())
    }

    /// Tells `records`, in the order of the chunks, where they are stored. `None` without chunks.
    /// Then writes the array of them and its header.
    pub(super) fn finish_chunks(
        &mut self,
        records: &mut [ChunkRecord],
        settings: Settings,
        features: BlobFeatures,
    ) -> Result<Option<ChunkInfo>, BuildError> {
        assert_eq!(records.len(), self.places.len(), "every distinct chunk is stored once");
        let Some(last) = records.last() else { return Ok(None) };
        let uncompressed_size = last.uncompressed_offset.get()
            + u64::from(last.uncompressed_size.get()).next_multiple_of(BLOCK_SIZE);
        let mut table = Vec::with_capacity(size_of_val(records) / 5 + 2 * 4096);
        for (record, (offset, size)) in records.iter_mut().zip(&self.places) {
            record.compressed_offset = U64::new(*offset);
            record.compressed_size = U32::new(*size);
            if *size != record.uncompressed_size.get() {
                record.flags |= U32::new(ChunkFlags::COMPRESSED.bits());
            }
            table.extend_from_slice(v1_entry(record).as_bytes());
        }
        let packed = settings
            .compressor
            .compress(&table)
            .map_err(|source| BuildError::Compress { codec: "the blob's compressor", source })?;
        let (ci_compressor, stored) = match &packed {
            Some(packed) => (settings.compressor, packed),
            None => (Compressor::None, &table),
        };
        let count = U32::new(u32::try_from(records.len()).expect("chunks have 24-bit indexes"));
        let mut entry = BlobEntry::new_zeroed();
        entry.chunk_size = U32::new(settings.chunk_size);
        entry.chunk_count = count;
        entry.compressor = U32::new(settings.compressor as u32);
        entry.digester = U32::new(settings.digester as u32);
        entry.features = U32::new(features.bits());
        entry.uncompressed_size = U64::new(uncompressed_size);
        entry.ci_compressor = U32::new(ci_compressor as u32);
        entry.ci_offset = U64::new(self.offset);
        entry.ci_compressed_size = U64::new(stored.len() as u64);
        entry.ci_uncompressed_size = U64::new(table.len() as u64);
        self.write(stored)?;

        let mut header = CiHeader::new_zeroed();
        header.magic = U32::new(CI_MAGIC);
        header.features = entry.features;
        header.compressor = entry.ci_compressor;
        header.entries = count;
        header.offset = entry.ci_offset;
        header.compressed_size = entry.ci_compressed_size;
        header.uncompressed_size = entry.ci_uncompressed_size;
        header.magic2 = U32::new(CI_MAGIC);
        self.write(header.as_bytes())?;

        let sha256 = |bytes: &[u8]| Sha256::digest(bytes).into();
        let digests = [sha256(&table), sha256(header.as_bytes())];
        let mut meta = table;
        meta.resize(meta.len().next_multiple_of(4096), 0);
        debug_assert_eq!(header.as_bytes().len() as u64, CI_HEADER_SIZE);
        meta.extend_from_slice(header.as_bytes());
        Ok(Some(ChunkInfo { meta, digests, entry }))
    }

    /// Completes a native blob: its entry in a blob table if it has chunks, and the output.
    pub fn finish(
        mut self,
        records: &mut [ChunkRecord],
        settings: Settings,
    ) -> Result<(Option<BlobEntry>, W), BuildError> {
        let info = self.finish_chunks(records, settings, FEATURES)?;
        let (digest, size, out) = self.into_parts()?;
        let entry = info.map(|info| {
            let mut entry = info.entry;
            entry.blob_id = *BlobId::from_sha256(digest).as_bytes();
            entry.compressed_size = U64::new(size);
            entry
        });
        Ok((entry, out))
    }

    /// SHA-256 and bytes of everything written, and the output, flushed.
    pub(super) fn into_parts(mut self) -> Result<([u8; 32], u64, W), BuildError> {
        self.out.flush().map_err(|source| BuildError::WriteBlob { source })?;
        Ok((self.hash.finalize().into(), self.offset, self.out))
    }
}
