//! Packed blobs: chunk data, chunk-info array, digests and bootstrap of one layer in one file.
//!
//! Each section is followed by a tar header that describes it, so the file is read from its end.
//! A table of contents, where there is one, says more: compression and digest of each section.
//! Nothing of a section is handed out before its bounds and, where it is known, its digest hold.

use std::io;
use std::ops::Range;

use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes};

use super::codec::Compressor;
use super::error::{FormatError, Result};
use super::layout::{TAR_MAGIC, TarHeader, TocEntry};
use super::superblock::MAX_BOOTSTRAP_SIZE;

/// Largest table of contents in bytes, its tar header included.
pub(super) const MAX_TOC_SIZE: u32 = 0x1_0000;
/// Most sections that a packed blob may have.
const MAX_SECTIONS: usize = 8;
/// Name of the section that holds the table of contents.
pub const TOC_NAME: &str = "rafs.blob.toc";
const HEADER_SIZE: u64 = size_of::<TarHeader>() as u64;

/// The bytes of a packed blob, wherever they are.
pub trait Source {
    /// Bytes of the blob.
    ///
    /// # Errors
    ///
    /// Of the file system below.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// Of the file system below; also if the blob ends before `buf` is full.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// Chunk data.
    ImageBlob,
    /// Context table; without a table of contents its header too.
    BlobMeta,
    /// Header of the context table.
    BlobMetaHeader,
    /// Digests of the chunks, 32 bytes each, by chunk index.
    BlobDigest,
    /// The layer's bootstrap.
    ImageBoot,
}

/// One section of a packed blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    pub kind: SectionKind,
    pub compressor: Compressor,
    /// Bytes of the blob file, inside it and before the table of contents.
    pub stored: Range<u64>,
    /// Bytes. Of chunk data: the size of the uncompressed blob.
    pub uncompressed_size: u64,
    /// SHA-256 of the uncompressed content; unknown without a table of contents. Of chunk data:
    /// of the stored bytes and the tar header behind them.
    pub digest: Option<[u8; 32]>,
}

/// The sections of a packed blob.
#[derive(Clone, Debug)]
pub struct PackedBlob {
    sections: Vec<Section>,
    has_toc: bool,
}

impl Source for std::fs::File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset)
    }
}

impl Source for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..buf.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

impl SectionKind {
    const ALL: [SectionKind; 5] = [
        SectionKind::ImageBlob,
        SectionKind::BlobMeta,
        SectionKind::BlobMetaHeader,
        SectionKind::BlobDigest,
        SectionKind::ImageBoot,
    ];

    /// As in tar headers and the table of contents.
    pub fn name(self) -> &'static str {
        match self {
            SectionKind::ImageBlob => "image.blob",
            SectionKind::BlobMeta => "blob.meta",
            SectionKind::BlobMetaHeader => "blob.meta.header",
            SectionKind::BlobDigest => "blob.digest",
            SectionKind::ImageBoot => "image.boot",
        }
    }

    fn from_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name().as_bytes() == name)
    }
}

fn io_error(source: io::Error) -> FormatError {
    FormatError::Io { path: "packed blob".to_owned(), source }
}

fn unpadded(name: &[u8]) -> &[u8] {
    &name[..name.iter().position(|&b| b == 0).unwrap_or(name.len())]
}

impl PackedBlob {
    /// Finds the sections of `source`.
    ///
    /// # Errors
    ///
    /// [`FormatError::Io`], or [`FormatError::Invalid`] where `source` is no packed blob or a
    /// damaged one.
    pub fn read<S: Source + ?Sized>(source: &S) -> Result<PackedBlob> {
        let size = source.size().map_err(io_error)?;
        let (name, body) = section_before(source, size)?;
        let has_toc = unpadded(&name) == TOC_NAME.as_bytes();
        let sections = if has_toc { from_toc(source, body)? } else { from_headers(source, size)? };
        for (i, section) in sections.iter().enumerate() {
            if sections[..i].iter().any(|other| other.kind == section.kind) {
                let reason = format!("second section {}", section.kind.name());
                return Err(FormatError::invalid("packed blob", section.stored.start, reason));
            }
        }
        Ok(PackedBlob { sections, has_toc })
    }

    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Whether the sections are known from a table of contents, so that digests are known.
    pub fn has_toc(&self) -> bool {
        self.has_toc
    }

    pub fn section(&self, kind: SectionKind) -> Option<&Section> {
        self.sections.iter().find(|section| section.kind == kind)
    }

    /// The layer's bootstrap, decompressed, and of the right digest where that is known. Its blob
    /// id is unknown: see `Bootstrap::with_blob_id`.
    ///
    /// # Errors
    ///
    /// If there is none, it exceeds 2 GiB, or is not what the table of contents promises.
    pub fn bootstrap<S: Source + ?Sized>(&self, source: &S) -> Result<Vec<u8>> {
        let section = self
            .section(SectionKind::ImageBoot)
            .ok_or_else(|| FormatError::invalid("packed blob", 0, "no section image.boot"))?;
        section.content(source, MAX_BOOTSTRAP_SIZE)
    }
}

/// A section by its tar header alone: its name and the bytes before the header.
pub type NamedSection = (Vec<u8>, Range<u64>);

/// The sections as the tar headers of `source` tell, in the order of the file; the table of contents
/// is one of them, the context table and its header are one.
///
/// # Errors
///
/// As [`PackedBlob::read`]; names are not checked.
pub fn tar_sections<S: Source + ?Sized>(source: &S) -> Result<Vec<NamedSection>> {
    let mut end = source.size().map_err(io_error)?;
    let mut sections = Vec::new();
    while end > 0 {
        if sections.len() > MAX_SECTIONS {
            return Err(FormatError::invalid("packed blob", end, "too many sections"));
        }
        let (name, stored) = section_before(source, end)?;
        end = stored.start;
        sections.push((unpadded(&name).to_vec(), stored));
    }
    sections.reverse();
    Ok(sections)
}

impl Section {
    /// The content, decompressed, and of the right digest where that is known. Not for chunk data,
    /// whose chunks are compressed one by one.
    ///
    /// # Errors
    ///
    /// If the content exceeds `limit` bytes, cannot be read, or is not what was promised.
    pub fn content<S: Source + ?Sized>(&self, source: &S, limit: u64) -> Result<Vec<u8>> {
        let (name, start) = (self.kind.name(), self.stored.start);
        let invalid = |reason: String| FormatError::invalid("section", start, reason);
        let stored_size = self.stored.end - start;
        if self.uncompressed_size > limit || stored_size > limit {
            return Err(invalid(format!("{name} exceeds {limit} bytes")));
        }
        let buffer = |size: u64| {
            usize::try_from(size)
                .map(|size| vec![0; size])
                .map_err(|_| invalid(format!("{name} does not fit in memory")))
        };
        let mut content = buffer(stored_size)?;
        source.read_exact_at(&mut content, start).map_err(io_error)?;
        if self.compressor != Compressor::None {
            // Zeroed pages cost nothing until the decoder fills them, whatever size was promised.
            let mut out = buffer(self.uncompressed_size)?;
            self.compressor
                .decompress(&content, &mut out)
                .map_err(|e| invalid(format!("{name}: {e}")))?;
            content = out;
        }
        match self.digest {
            Some(digest) if digest != <[u8; 32]>::from(Sha256::digest(&content)) => {
                Err(invalid(format!("{name} does not match its digest")))
            }
            _ => Ok(content),
        }
    }
}

/// Name and bytes of the section whose tar header ends at `end`.
fn section_before<S: Source + ?Sized>(source: &S, end: u64) -> Result<([u8; 100], Range<u64>)> {
    let invalid = |offset, reason: &str| FormatError::invalid("tar header", offset, reason);
    let at = end.checked_sub(HEADER_SIZE).ok_or_else(|| invalid(0, "no room for it"))?;
    let mut header = TarHeader::new_zeroed();
    source.read_exact_at(header.as_mut_bytes(), at).map_err(io_error)?;
    if header.magic != TAR_MAGIC || header.kind != b'0' {
        return Err(invalid(at, "no tar header of a section: this is no packed blob"));
    }
    let spaces = header.checksum.len() as u64 * u64::from(b' ');
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u64::from(b)).sum::<u64>();
    let want = sum(header.as_bytes()) - sum(&header.checksum) + spaces;
    if octal(&header.checksum) != Some(want) {
        return Err(invalid(at, "wrong checksum"));
    }
    let start = tar_size(&header.size)
        .and_then(|size| at.checked_sub(size))
        .ok_or_else(|| invalid(at, "section is longer than what precedes it"))?;
    Ok((header.name, start..at))
}

fn octal(field: &[u8]) -> Option<u64> {
    let digits = field.split(|b| matches!(b, 0 | b' ')).find(|part| !part.is_empty())?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

fn tar_size(field: &[u8; 12]) -> Option<u64> {
    match field {
        [0x80, 0, 0, 0, binary @ ..] => Some(u64::from_be_bytes(*binary)),
        _ => octal(field),
    }
}

fn from_headers<S: Source + ?Sized>(source: &S, mut end: u64) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    while end > 0 {
        let (name, stored) = section_before(source, end)?;
        let invalid = |reason: &str| FormatError::invalid("packed blob", stored.start, reason);
        let kind = SectionKind::from_name(unpadded(&name))
            .ok_or_else(|| invalid("section of unknown name"))?;
        if sections.len() == MAX_SECTIONS {
            return Err(invalid("too many sections"));
        }
        end = stored.start;
        sections.push(Section {
            kind,
            compressor: Compressor::None,
            uncompressed_size: stored.end - stored.start,
            stored,
            digest: None,
        });
    }
    sections.reverse();
    Ok(sections)
}

fn from_toc<S: Source + ?Sized>(source: &S, toc: Range<u64>) -> Result<Vec<Section>> {
    const ENTRY_SIZE: u64 = size_of::<TocEntry>() as u64;
    let size = toc.end - toc.start;
    let count = usize::try_from(size / ENTRY_SIZE).unwrap_or(usize::MAX);
    if size + HEADER_SIZE > MAX_TOC_SIZE.into()
        || !size.is_multiple_of(ENTRY_SIZE)
        || count > MAX_SECTIONS
    {
        let reason = format!("size {size}");
        return Err(FormatError::invalid("table of contents", toc.start, reason));
    }
    let mut entries = vec![TocEntry::new_zeroed(); count];
    source.read_exact_at(entries.as_mut_bytes(), toc.start).map_err(io_error)?;
    let mut at = toc.start;
    let mut sections = Vec::with_capacity(count);
    for entry in &entries {
        let section = toc_entry(entry, toc.start)
            .map_err(|reason| FormatError::invalid("table of contents entry", at, reason))?;
        sections.push(section);
        at += ENTRY_SIZE;
    }
    Ok(sections)
}

/// Checks an entry; `end` is where the table of contents starts.
fn toc_entry(entry: &TocEntry, end: u64) -> std::result::Result<Section, String> {
    let kind = SectionKind::from_name(unpadded(&entry.name)).ok_or("section of unknown name")?;
    let name = kind.name();
    let compressor = match entry.flags.get() & 0xF {
        1 => Compressor::None,
        2 => Compressor::Zstd,
        4 => Compressor::Lz4Block,
        number => return Err(format!("{name}: unknown compressor {number}")),
    };
    let start = entry.compressed_offset.get();
    let stored = start
        .checked_add(entry.compressed_size.get())
        .filter(|&stored_end| stored_end <= end)
        .map(|stored_end| start..stored_end)
        .ok_or_else(|| format!("{name} is not before the table of contents"))?;
    let uncompressed_size = entry.uncompressed_size.get();
    let plain = compressor == Compressor::None && kind != SectionKind::ImageBlob;
    if plain && uncompressed_size != stored.end - stored.start {
        return Err(format!("{name} is stored plain, but in another size"));
    }
    Ok(Section { kind, compressor, stored, uncompressed_size, digest: Some(entry.digest) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A section and the header behind it, in octal or binary size.
    fn section(name: &str, body: &[u8], binary: bool) -> Vec<u8> {
        let mut header = TarHeader::new_zeroed();
        header.name[..name.len()].copy_from_slice(name.as_bytes());
        if binary {
            header.size[0] = 0x80;
            header.size[4..].copy_from_slice(&(body.len() as u64).to_be_bytes());
        } else {
            header.size[..11].copy_from_slice(format!("{:011o}", body.len()).as_bytes());
        }
        header.kind = b'0';
        header.magic = TAR_MAGIC;
        header.checksum = [b' '; 8];
        let sum: u64 = header.as_bytes().iter().map(|&b| u64::from(b)).sum();
        header.checksum = *b"0000000\0";
        header.checksum[..7].copy_from_slice(format!("{sum:07o}").as_bytes());
        [body, header.as_bytes()].concat()
    }

    #[test]
    fn sections_are_found_by_their_headers() {
        for binary in [false, true] {
            let blob = [
                section("image.blob", b"data", binary),
                section("blob.meta", b"array", binary),
                section("image.boot", b"boot", binary),
            ]
            .concat();
            let packed = PackedBlob::read(&blob[..]).unwrap();
            assert!(!packed.has_toc());
            let found: Vec<_> =
                packed.sections().iter().map(|s| (s.kind.name(), s.stored.clone())).collect();
            assert_eq!(
                found,
                [("image.blob", 0..4), ("blob.meta", 516..521), ("image.boot", 1033..1037)]
            );
            assert_eq!(packed.bootstrap(&blob[..]).unwrap(), b"boot");
        }
    }

    #[test]
    fn damage_is_an_error() {
        let good = section("image.boot", b"boot", false);
        let mut wrong_sum = good.clone();
        wrong_sum[4] ^= 1;
        // (what, blob, in the message)
        let cases = [
            ("empty", vec![], "no room"),
            ("short", vec![0; 511], "no room"),
            ("zeros", vec![0; 1024], "no packed blob"),
            ("flipped bit", wrong_sum, "checksum"),
            ("unknown name", section("image.bad", b"", false), "unknown name"),
            ("twice", [good.clone(), good.clone()].concat(), "second section"),
            ("cut off", good[1..].to_vec(), "longer than what precedes"),
            ("bytes before", [b"x", &good[..]].concat(), "no room"),
            ("odd table", section("rafs.blob.toc", &[0; 100], false), "size 100"),
        ];
        for (what, blob, message) in cases {
            let error = PackedBlob::read(&blob[..]).unwrap_err().to_string();
            assert!(error.contains(message), "{what}: {error}");
        }
    }

    #[test]
    fn a_bootstrap_of_another_digest_is_not_handed_out() {
        let boot = b"the bootstrap ".repeat(20);
        let stored = Compressor::Zstd.compress(&boot).unwrap().unwrap();
        let mut entry = TocEntry::new_zeroed();
        entry.flags = 2.into();
        entry.name[..10].copy_from_slice(b"image.boot");
        entry.digest = Sha256::digest(&boot).into();
        entry.compressed_size = (stored.len() as u64).into();
        entry.uncompressed_size = (boot.len() as u64).into();
        let blob = |entry: &TocEntry| {
            [
                section("image.boot", &stored, false),
                section("rafs.blob.toc", entry.as_bytes(), false),
            ]
            .concat()
        };
        let read = |entry: &TocEntry| {
            let blob = blob(entry);
            PackedBlob::read(&blob[..])?.bootstrap(&blob[..])
        };
        assert_eq!(read(&entry).unwrap(), boot);

        type Damage = fn(&mut TocEntry);
        let cases: [(Damage, &str); 5] = [
            (|e| e.digest[0] ^= 1, "digest"),
            (|e| e.uncompressed_size = 10.into(), "damaged"),
            (|e| e.uncompressed_size = (1 << 40).into(), "exceeds"),
            (|e| e.compressed_size = 5000.into(), "not before"),
            (|e| e.flags = 1.into(), "another size"),
        ];
        for (damage, message) in cases {
            let mut entry = entry;
            damage(&mut entry);
            let error = read(&entry).unwrap_err().to_string();
            assert!(error.contains(message), "{message}: {error}");
        }
    }
}
