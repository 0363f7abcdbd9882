//! One blob, read once from its first byte to its last, as it comes from a registry.
//!
//! Where the chunks are is known before, from the bootstrap layer or another pass, so each is
//! decompressed and digested when its bytes pass by. What follows the chunk data (chunk-info array,
//! digests, the layer's bootstrap, table of contents) is kept and checked at the end.
//!
//! Memory: one stored and one uncompressed chunk or batch, together at most 32 MiB; 32 bytes for
//! each chunk; and what follows the chunk data, at most [`TAIL_MAX`] bytes.

use std::io::{self, Read};
use std::ops::Range;

use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes};

use super::findings::{Findings, Problem, describe};
use super::progress::Bar;
use crate::rafs::ci::{ChunkForm, ChunkInfo, ChunkInfos};
use crate::rafs::codec::Compressor;
use crate::rafs::id::{BlobId, ChunkIndex};
use crate::rafs::layout::{BlobFeatures, ChunkFlags, CiHeader};
use crate::rafs::toc::{self, PackedBlob, Section, SectionKind};
use crate::rafs::{BlobInfo, Bootstrap, ChunkDigests};

/// Most bytes behind the chunk data that are kept.
const TAIL_MAX: usize = 512 << 20;
/// Of a blob that no file uses, bytes at its end that are kept: it is not known where its chunks end.
const UNUSED_TAIL: usize = 64 << 20;
/// Bytes read at a time.
const STEP: usize = 256 << 10;
const TAR_HEADER: u64 = 512;

/// What the image says about the blob.
pub(super) struct Expected<'a> {
    /// `None` if no file of the image has a chunk in it.
    pub info: Option<&'a BlobInfo>,
    /// `None` if it has to be found in the blob first; then no chunk is checked in this pass.
    pub chunks: Option<&'a ChunkInfos>,
    pub table: Option<&'a ChunkDigests>,
    /// Its entry in the blob table: digest and size of the table of contents.
    pub toc: Option<([u8; 32], u32)>,
    /// What the blob is called in findings.
    pub place: String,
}

/// What was seen.
pub(super) struct Seen {
    pub sha256: [u8; 32],
    pub size: u64,
    /// Of each chunk the digest of what its bytes are; `None` if they are damaged. Empty if the
    /// chunks were not known.
    pub digests: Vec<Option<[u8; 32]>>,
    /// The array in the blob, if it is sound.
    pub chunks: Option<ChunkInfos>,
    /// The blob has the id that the blob table gives it, whichever way that was computed.
    pub is_named: bool,
}

/// The stream, and what has been read of it.
struct Stream<'a> {
    inner: &'a mut dyn Read,
    hash: Sha256,
    at: u64,
    bar: &'a Bar<'a>,
}

/// Reads the blob to its end and reports what is wrong with it.
///
/// # Errors
///
/// Of reading. A blob that ends too early is a finding.
pub(super) fn check(
    blob: &mut dyn Read,
    expected: &Expected<'_>,
    findings: &mut Findings,
    bar: &Bar<'_>,
) -> io::Result<Seen> {
    let mut stream = Stream { inner: blob, hash: Sha256::new(), at: 0, bar };
    let mut seen =
        Seen { sha256: [0; 32], size: 0, digests: Vec::new(), chunks: None, is_named: false };
    findings.blobs += 1;
    let mut pass = Pass { expected, findings, digests: Vec::new(), section: Vec::new() };
    match pass.read(&mut stream, &mut seen) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            let what = format!("ends at byte {}, before its chunk data does", stream.at);
            pass.findings.problem(&expected.place, what);
            let count = expected.chunks.map_or(0, ChunkInfos::len);
            pass.digests.resize(usize::try_from(count).unwrap_or_default(), None);
        }
        Err(e) => return Err(e),
    }
    seen.digests = pass.digests;
    seen.size = stream.at;
    seen.sha256 = stream.hash.finalize().into();
    seen.is_named |= expected.info.is_some_and(|info| info.id == BlobId::from_sha256(seen.sha256));
    Ok(seen)
}

impl Stream<'_> {
    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(buffer)?;
        self.hash.update(&*buffer);
        self.at += buffer.len() as u64;
        self.bar.inc(buffer.len() as u64);
        Ok(())
    }

    fn skip_to(&mut self, end: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
        while self.at < end {
            let len = usize::try_from(end - self.at).unwrap_or(STEP).min(STEP);
            buffer.resize(len, 0);
            self.read_exact(buffer)?;
        }
        Ok(())
    }

    /// The last `max` bytes of what is left; `whole` if that is all of it.
    fn rest(&mut self, max: usize, whole: bool) -> io::Result<Tail> {
        let mut tail = Tail { start: self.at, bytes: Vec::new() };
        let mut buffer = vec![0; STEP];
        loop {
            let got = match self.inner.read(&mut buffer) {
                Ok(0) => return Ok(tail),
                Ok(got) => &buffer[..got],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            self.hash.update(got);
            self.at += got.len() as u64;
            self.bar.inc(got.len() as u64);
            tail.bytes.extend_from_slice(got);
            let excess = tail.bytes.len().saturating_sub(max);
            // Dropped by halves, so that little is copied.
            if excess > 0 && (whole || excess >= max) {
                tail.bytes.drain(..excess);
                tail.start += excess as u64;
            }
        }
    }
}

/// The end of the blob, as a file that begins with bytes nobody reads.
struct Tail {
    start: u64,
    bytes: Vec<u8>,
}

impl Tail {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn get(&self, range: Range<u64>) -> Option<&[u8]> {
        let start = usize::try_from(range.start.checked_sub(self.start)?).ok()?;
        let end = usize::try_from(range.end.checked_sub(self.start)?).ok()?;
        self.bytes.get(start..end)
    }
}

impl toc::Source for Tail {
    fn size(&self) -> io::Result<u64> {
        Ok(self.end())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        let bytes = self.get(offset..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

struct Pass<'a> {
    expected: &'a Expected<'a>,
    findings: &'a mut Findings,
    digests: Vec<Option<[u8; 32]>>,
    /// The blob's own digests.
    section: Vec<u8>,
}

impl Pass<'_> {
    fn read(&mut self, stream: &mut Stream<'_>, seen: &mut Seen) -> io::Result<()> {
        let mut buffer = Vec::new();
        let Some(info) = self.expected.info else {
            let tail = stream.rest(UNUSED_TAIL, false)?;
            self.unused(&tail);
            return Ok(());
        };
        if let Some(chunks) = self.expected.chunks {
            self.chunks(stream, info, chunks, &mut buffer)?;
        }
        stream.skip_to(info.data_end, &mut buffer)?;
        let at_data_end = stream.hash.clone();
        let tail = stream.rest(TAIL_MAX, true)?;
        if tail.start != info.data_end {
            let what = format!("more than {TAIL_MAX} bytes behind the chunk data");
            self.findings.undecided(format!("{}: {what}", self.expected.place));
            return Ok(());
        }
        match chunk_infos(info, &tail) {
            Ok(found) => {
                if let Some(chunks) = self.expected.chunks
                    && chunks.as_bytes() != found.as_bytes()
                {
                    let what = "the chunk-info array is not the one in the bootstrap layer";
                    self.findings.problem(&self.expected.place, what);
                }
                seen.chunks = Some(found);
            }
            Err(what) => self.findings.problem(&self.expected.place, what),
        }
        if is_packed(info) {
            self.packed(info, &tail, &at_data_end, seen);
        }
        self.compare_digests(info);
        Ok(())
    }

    /// Reads all chunk data.
    fn chunks(
        &mut self,
        stream: &mut Stream<'_>,
        info: &BlobInfo,
        chunks: &ChunkInfos,
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let mut uncompressed = Vec::new();
        let mut next = 0;
        while let Some(first) = chunks.get(ChunkIndex(next)) {
            let unit = chunks.unit(ChunkIndex(next)).unwrap_or(next..next + 1);
            stream.skip_to(first.compressed_offset, buffer)?;
            buffer.resize(usize::try_from(first.compressed_size).expect("24 bits"), 0);
            stream.read_exact(buffer)?;
            match decompress(info.compressor, chunks, &first, buffer, &mut uncompressed) {
                Ok(data) => {
                    for index in unit.clone() {
                        let digest = self.chunk(info, chunks, index, data);
                        self.digests.push(digest);
                    }
                }
                Err(what) => {
                    self.chunk_problem(info, unit.start, &first, what);
                    self.digests.extend(unit.clone().map(|_| None));
                }
            }
            self.findings.chunks += u64::from(unit.end - unit.start);
            next = unit.end.max(next + 1);
        }
        Ok(())
    }

    /// Checks chunk `index`, which lies in `data`, and returns its digest.
    fn chunk(
        &mut self,
        info: &BlobInfo,
        chunks: &ChunkInfos,
        index: u32,
        data: &[u8],
    ) -> Option<[u8; 32]> {
        let chunk = chunks.get(ChunkIndex(index))?;
        let offset = match chunk.form {
            ChunkForm::Batch { offset, .. } => usize::try_from(offset).ok()?,
            _ => 0,
        };
        let len = usize::try_from(chunk.uncompressed_size).ok()?;
        let Some(data) = data.get(offset..).and_then(|data| data.get(..len)) else {
            let what = "lies behind the end of its batch".to_owned();
            self.chunk_problem(info, index, &chunk, what);
            return None;
        };
        let digest = info.digester.digest(data);
        let record = self.expected.table.and_then(|table| table.record(ChunkIndex(index)));
        if record.is_some_and(|record| record.digest != digest) {
            let what = "does not match its digest".to_owned();
            self.chunk_problem(info, index, &chunk, what);
            return Some(digest);
        }
        let has_crc = |flags: u32| flags & ChunkFlags::HAS_CRC32C.bits() != 0;
        let in_table = record.filter(|r| has_crc(r.flags.get())).map(|r| r.crc32c.get());
        let crcs = [(chunk.crc32c, "chunk-info array"), (in_table, "chunk table")];
        let computed = crcs.iter().any(|(crc, _)| crc.is_some()).then(|| crc32c::crc32c(data));
        for (want, table) in crcs {
            if want.is_some() && want != computed {
                let what = format!("does not match its CRC in the {table}");
                self.chunk_problem(info, index, &chunk, what);
            }
        }
        Some(digest)
    }

    fn chunk_problem(&mut self, info: &BlobInfo, index: u32, chunk: &ChunkInfo, what: String) {
        let (start, end) = (chunk.compressed_offset, chunk.compressed_end());
        self.findings.add(Problem {
            place: format!("{}, chunk {index}, stored bytes {start}..{end}", self.expected.place),
            what,
            chunk: Some((info.index, ChunkIndex(index))),
            values: None,
        });
    }

    fn section_problem(&mut self, name: &str, what: impl std::fmt::Display) {
        self.findings.problem(format_args!("{}, {name}", self.expected.place), what);
    }

    /// A blob that no file of the image uses: its sections must be sound all the same.
    fn unused(&mut self, tail: &Tail) {
        let packed = match PackedBlob::read(tail) {
            Ok(packed) => packed,
            Err(e) => return self.findings.problem(&self.expected.place, describe(&e)),
        };
        for section in packed.sections() {
            if section.kind == SectionKind::ImageBlob || section.stored.start < tail.start {
                continue;
            }
            if let Err(e) = section.content(tail, TAIL_MAX as u64) {
                self.section_problem(section.kind.name(), describe(&e));
            }
        }
    }

    fn packed(&mut self, info: &BlobInfo, tail: &Tail, at_data_end: &Sha256, seen: &mut Seen) {
        let packed = match PackedBlob::read(tail) {
            Ok(packed) => packed,
            Err(e) => return self.findings.problem(&self.expected.place, describe(&e)),
        };
        match toc::tar_sections(tail) {
            Ok(found) => self.compare_headers(&packed, found),
            Err(e) => self.findings.problem(&self.expected.place, describe(&e)),
        }
        self.toc(&packed, tail);
        for section in packed.sections() {
            let name = section.kind.name();
            let content = match section.kind {
                SectionKind::ImageBlob => {
                    self.image_blob(info, section, tail, at_data_end);
                    continue;
                }
                _ => section.content(tail, TAIL_MAX as u64),
            };
            match (content, section.kind) {
                (Err(e), _) => self.section_problem(name, describe(&e)),
                (Ok(content), SectionKind::BlobDigest) => {
                    let want = u64::from(info.chunk_count) * 32;
                    if content.len() as u64 != want {
                        let got = content.len();
                        let what = format_args!("{got} bytes, not {want}");
                        let place = format!("{}, {name}", self.expected.place);
                        self.findings.mismatch(place, "size", want, got, what);
                    } else {
                        self.section = content;
                    }
                }
                (Ok(content), SectionKind::ImageBoot) => self.layer_bootstrap(content, info, seen),
                (Ok(_), _) => {}
            }
        }
        // Without a bootstrap behind them the builder leaves the digests out of the hash.
        let left_out = packed.section(SectionKind::BlobDigest).map(|s| s.stored.clone());
        if let Some(left_out) = left_out {
            let mut hash = at_data_end.clone();
            hash.update(tail.get(tail.start..left_out.start).unwrap_or_default());
            hash.update(tail.get(left_out.end..tail.end()).unwrap_or_default());
            seen.is_named |= info.id == BlobId::from_sha256(hash.finalize().into());
        }
    }

    /// The digest of the chunk data covers the tar header behind it.
    fn image_blob(
        &mut self,
        info: &BlobInfo,
        section: &Section,
        tail: &Tail,
        at_data_end: &Sha256,
    ) {
        let name = section.kind.name();
        if section.stored != (0..info.data_end) {
            let (start, end) = (section.stored.start, section.stored.end);
            let expected = format!("0..{}", info.data_end);
            let place = format!("{}, {name}", self.expected.place);
            let what = format!("stored at {start}..{end}, the blob table says {expected}");
            return self.findings.mismatch(
                place,
                "stored bytes",
                expected,
                format!("{start}..{end}"),
                what,
            );
        }
        if section.digest.is_some() && section.uncompressed_size != info.uncompressed_size {
            let (want, got) = (info.uncompressed_size, section.uncompressed_size);
            let place = format!("{}, {name}", self.expected.place);
            let what = format_args!("{got} bytes uncompressed, the blob table says {want}");
            self.findings.mismatch(place, "uncompressed size", want, got, what);
        }
        let Some(want) = section.digest else { return };
        let mut hash = at_data_end.clone();
        hash.update(tail.get(tail.start..tail.start + TAR_HEADER).unwrap_or_default());
        if hash.finalize()[..] != want {
            self.section_problem(name, "stored bytes do not match their digest");
        }
    }

    /// Tar headers and table of contents must tell of the same sections.
    fn compare_headers(&mut self, packed: &PackedBlob, mut found: Vec<toc::NamedSection>) {
        if !packed.has_toc() {
            return;
        }
        found.pop(); // The table of contents itself.
        let mut expected: Vec<toc::NamedSection> = Vec::new();
        for section in packed.sections() {
            match (section.kind, expected.last_mut()) {
                (SectionKind::BlobMetaHeader, Some((_, stored)))
                    if stored.end == section.stored.start =>
                {
                    stored.end = section.stored.end;
                }
                (kind, _) => expected.push((kind.name().into(), section.stored.clone())),
            }
        }
        let shown = |sections: &[toc::NamedSection]| {
            let shown = sections.iter().map(|(name, stored)| {
                format!("{} {}..{}", name.escape_ascii(), stored.start, stored.end)
            });
            shown.collect::<Vec<_>>().join(", ")
        };
        if expected != found {
            let (expected, found) = (shown(&expected), shown(&found));
            let what = format!("has {expected}; the tar headers have {found}");
            let place = format!("{}, table of contents", self.expected.place);
            self.findings.mismatch(place, "sections", expected, found, what);
        }
    }

    /// The blob table may have the digest and the size of the table of contents.
    fn toc(&mut self, packed: &PackedBlob, tail: &Tail) {
        let Some((digest, size)) = self.expected.toc else { return };
        if !packed.has_toc() || size == 0 {
            return;
        }
        let toc = tail.end().checked_sub(size.into()).and_then(|start| tail.get(start..tail.end()));
        let matches = toc.is_some_and(|toc| Sha256::digest(toc)[..] == digest);
        if digest != [0; 32] && !matches {
            self.section_problem(
                "table of contents",
                "does not match its digest in the blob table",
            );
        }
    }

    /// The bootstrap that the layer brings must tell of the same chunks.
    fn layer_bootstrap(&mut self, content: Vec<u8>, info: &BlobInfo, seen: &Seen) {
        let image = match Bootstrap::from_bytes(content) {
            Ok(image) => image,
            Err(e) => return self.section_problem("image.boot", describe(&e)),
        };
        let mut inner = Findings { limit: self.findings.limit, ..Findings::default() };
        let own =
            image.blobs().iter().find(|blob| blob.id == BlobId::UNKNOWN || blob.id == info.id);
        let mut infos = super::tables::ChunkInfosByBlob::new();
        if let (Some(own), Some(chunks)) = (own, &seen.chunks)
            && own.chunk_count == chunks.len()
        {
            infos.insert(own.index, chunks);
        }
        super::metadata::check(&image, infos, &mut inner);
        self.findings.absorb(&format!("{}, image.boot", self.expected.place), inner);
        let Some(own) = own else { return };
        let facts = [
            ("chunks", u64::from(info.chunk_count), u64::from(own.chunk_count)),
            ("uncompressed size", info.uncompressed_size, own.uncompressed_size),
            ("end of the chunk data", info.data_end, own.data_end),
            ("ci offset", info.ci_offset, own.ci_offset),
            ("ci size", info.ci_uncompressed_size, own.ci_uncompressed_size),
        ];
        for (field, want, got) in facts {
            if want != got {
                let what = format_args!("{field} {got}, the image's blob table says {want}");
                let place = format!("{}, image.boot", self.expected.place);
                self.findings.mismatch(place, field, want, got, what);
            }
        }
        let Ok(table) = image.chunk_digests(own.index) else { return };
        for (index, digest) in (0..).zip(&self.digests) {
            if let (Some(digest), Some(record)) = (digest, table.get(ChunkIndex(index)))
                && digest != record
            {
                let place = format!("{}, image.boot, chunk {index}", self.expected.place);
                self.findings.problem(place, "does not match its digest");
            }
        }
    }

    /// The digests in the blob must be those of its chunks.
    fn compare_digests(&mut self, info: &BlobInfo) {
        let section = std::mem::take(&mut self.section);
        let digests = std::mem::take(&mut self.digests);
        for (index, (want, digest)) in (0..).zip(section.chunks_exact(32).zip(&digests)) {
            if digest.is_some_and(|digest| digest[..] != *want) {
                self.findings.add(Problem {
                    place: format!("{}, chunk {index}", self.expected.place),
                    what: "does not match its digest in blob.digest".to_owned(),
                    chunk: Some((info.index, ChunkIndex(index))),
                    values: None,
                });
            }
        }
        self.digests = digests;
    }
}

fn is_packed(info: &BlobInfo) -> bool {
    let framed = BlobFeatures::HAS_TAR_HEADER | BlobFeatures::HAS_TOC;
    info.features.intersects(framed | BlobFeatures::INLINED_FS_META)
}

/// The chunk-info array in the end of the blob.
fn chunk_infos(info: &BlobInfo, tail: &Tail) -> Result<ChunkInfos, String> {
    let stored_end = info.ci_offset + info.ci_compressed_size;
    let header_end = stored_end + size_of::<CiHeader>() as u64;
    let (Some(stored), Some(header_bytes)) =
        (tail.get(info.ci_offset..stored_end), tail.get(stored_end..header_end))
    else {
        let size = tail.end();
        return Err(format!(
            "the chunk-info array and its header are at {}..{header_end}, the blob ends at {size}",
            info.ci_offset
        ));
    };
    let mut header = CiHeader::new_zeroed();
    header.as_mut_bytes().copy_from_slice(header_bytes);
    let table = if info.ci_compressor == Compressor::None {
        stored.to_vec()
    } else {
        let size = usize::try_from(info.ci_uncompressed_size).map_err(|e| e.to_string())?;
        let mut table = vec![0; size];
        let decompressed = info.ci_compressor.decompress(stored, &mut table);
        decompressed.map_err(|e| format!("chunk-info array: {e}"))?;
        table
    };
    ChunkInfos::parse(info, table, &header).map_err(|e| describe(&e))
}

/// The bytes that the stored ones of a chunk or batch make.
fn decompress<'b>(
    compressor: Compressor,
    chunks: &ChunkInfos,
    info: &ChunkInfo,
    stored: &'b [u8],
    uncompressed: &'b mut Vec<u8>,
) -> Result<&'b [u8], String> {
    let (size, plain) = match info.form {
        ChunkForm::Plain => (info.uncompressed_size, true),
        ChunkForm::Compressed => (info.uncompressed_size, false),
        ChunkForm::Batch { index, .. } => {
            let context = chunks.batch(index).ok_or("its batch does not exist")?;
            let size = context.uncompressed_size.get();
            (size, info.compressed_size == size)
        }
    };
    if plain {
        return Ok(stored);
    }
    uncompressed.resize(usize::try_from(size).map_err(|e| e.to_string())?, 0);
    compressor.decompress(stored, uncompressed).map_err(|e| describe(&e))?;
    Ok(uncompressed)
}
