//! Packed blobs: the sections behind the chunk data, for registries.
//!
//! ```text
//! chunk data | header        context table, its header | header        chunk digests | header
//! bootstrap | header         table of contents | header
//! ```
//!
//! Each header is a tar header and says what precedes it. Without a table of contents there are no
//! digests, and the bootstrap is stored as it is. Without chunks only the last two sections are
//! there.

use std::io::Write;

use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::blob_file::{BlobWriter, FEATURES};
use super::error::BuildError;
use super::pipeline::Settings;
use crate::rafs::codec::Compressor;
use crate::rafs::id::BlobId;
use crate::rafs::layout::{BlobEntry, BlobFeatures, ChunkRecord, TAR_MAGIC, TarHeader, TocEntry};
use crate::rafs::toc::SectionKind;

/// A packed blob that is complete.
#[derive(Debug)]
pub struct Packed<W> {
    /// SHA-256 of the whole blob: its id, and its digest in a registry.
    pub id: BlobId,
    /// Bytes of the blob.
    pub size: u64,
    /// The bootstrap inside.
    pub bootstrap: Vec<u8>,
    /// Context table and header as a bootstrap layer carries them; `None` without chunks.
    pub meta: Option<Vec<u8>>,
    /// The output, flushed.
    pub out: W,
}

/// Bytes that a section's header counts up to in octal digits.
const OCTAL_MAX: u64 = (1 << 33) - 1;

/// Completes a blob whose chunks are `records`. `bootstrap` makes the bootstrap, being given the
/// blob's entry in the blob table, if it has chunks. With `toc` there is a table of contents.
pub fn finish<W: Write>(
    mut blob: BlobWriter<W>,
    mut records: Vec<ChunkRecord>,
    settings: Settings,
    toc: bool,
    bootstrap: impl FnOnce(Vec<ChunkRecord>, Option<BlobEntry>) -> Result<Vec<u8>, BuildError>,
) -> Result<Packed<W>, BuildError> {
    let mut features = FEATURES | BlobFeatures::INLINED_FS_META | BlobFeatures::HAS_TAR_HEADER;
    if toc {
        features |= BlobFeatures::HAS_TOC | BlobFeatures::INLINED_CHUNK_DIGEST;
    }
    let mut entries = Vec::new();
    let data_size = blob.offset();
    let mut data_digest = [0; 32];
    if !records.is_empty() {
        blob.write(header(SectionKind::ImageBlob.name(), data_size).as_bytes())?;
        // Of the stored bytes and the header behind them.
        data_digest = blob.digest();
    }
    let meta_start = blob.offset();
    let info = blob.finish_chunks(&mut records, settings, features)?;
    let mut entry = None;
    let mut meta = None;
    if let Some(info) = info {
        let mut blob_entry = info.entry;
        blob_entry.blob_id = *BlobId::UNKNOWN.as_bytes();
        let meta_size = blob.offset() - meta_start;
        blob.write(header(SectionKind::BlobMeta.name(), meta_size).as_bytes())?;
        let table_size = blob_entry.ci_compressed_size.get();
        entries.push(section(
            SectionKind::ImageBlob,
            Compressor::None,
            data_digest,
            0,
            data_size,
            blob_entry.uncompressed_size.get(),
        ));
        entries.push(section(
            SectionKind::BlobMeta,
            Compressor::from_number(blob_entry.ci_compressor.get()).expect("made from one"),
            info.digests[0],
            meta_start,
            table_size,
            blob_entry.ci_uncompressed_size.get(),
        ));
        entries.push(section(
            SectionKind::BlobMetaHeader,
            Compressor::None,
            info.digests[1],
            meta_start + table_size,
            meta_size - table_size,
            meta_size - table_size,
        ));
        if toc {
            let start = blob.offset();
            let mut hash = Sha256::new();
            for record in &records {
                blob.write(&record.digest)?;
                hash.update(record.digest);
            }
            let size = blob.offset() - start;
            let digest = hash.finalize().into();
            let kind = SectionKind::BlobDigest;
            entries.push(section(kind, Compressor::None, digest, start, size, size));
            blob.write(header(kind.name(), size).as_bytes())?;
        }
        blob_entry.compressed_size = U64::new(blob.offset());
        meta = Some(info.meta);
        entry = Some(blob_entry);
    }
    let bootstrap = bootstrap(records, entry)?;
    let start = blob.offset();
    let zstd = if toc {
        Compressor::Zstd
            .compress(&bootstrap)
            .map_err(|source| BuildError::Compress { codec: "zstd", source })?
    } else {
        None
    };
    let (compressor, stored) = match &zstd {
        Some(zstd) => (Compressor::Zstd, zstd),
        None => (Compressor::None, &bootstrap),
    };
    blob.write(stored)?;
    let digest = Sha256::digest(&bootstrap).into();
    let (kind, size) = (SectionKind::ImageBoot, stored.len() as u64);
    entries.push(section(kind, compressor, digest, start, size, bootstrap.len() as u64));
    blob.write(header(kind.name(), size).as_bytes())?;
    if toc {
        blob.write(entries.as_bytes())?;
        let size = size_of_val(&*entries) as u64;
        blob.write(header(crate::rafs::toc::TOC_NAME, size).as_bytes())?;
    }
    let (digest, size, out) = blob.into_parts()?;
    Ok(Packed { id: BlobId::from_sha256(digest), size, bootstrap, meta, out })
}

fn section(
    kind: SectionKind,
    compressor: Compressor,
    digest: [u8; 32],
    offset: u64,
    stored: u64,
    size: u64,
) -> TocEntry {
    let mut entry = TocEntry::new_zeroed();
    // Readers know no other: nydus-image writes nothing else here, either.
    entry.flags = U32::new(match compressor {
        Compressor::None | Compressor::Gzip => 1,
        Compressor::Zstd => 2,
        Compressor::Lz4Block => 4,
    });
    let name = kind.name().as_bytes();
    entry.name[..name.len()].copy_from_slice(name);
    entry.digest = digest;
    entry.compressed_offset = U64::new(offset);
    entry.compressed_size = U64::new(stored);
    entry.uncompressed_size = U64::new(size);
    entry
}

/// The tar header behind a section of `size` bytes.
fn header(name: &str, size: u64) -> TarHeader {
    let mut header = TarHeader::new_zeroed();
    header.name[..name.len()].copy_from_slice(name.as_bytes());
    if size <= OCTAL_MAX {
        header.size[..11].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        header.size[0] = 0x80;
        header.size[4..].copy_from_slice(&size.to_be_bytes());
    }
    header.mtime[..11].fill(b'0');
    header.kind = b'0';
    header.magic = TAR_MAGIC;
    header.checksum = [b' '; 8];
    let sum: u64 = header.as_bytes().iter().map(|&b| u64::from(b)).sum();
    header.checksum = [0; 8];
    header.checksum[..7].copy_from_slice(format!("{sum:07o}").as_bytes());
    header
}
