//! One blob file: its hash, its sections, and every chunk in it.
//!
//! Chunks are read, decompressed and digested on all processors; each holds one stored and one
//! uncompressed chunk (or batch), so at most 32 MiB. One more thread hashes the file meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::findings::{Findings, Problem, describe};
use super::{place, progress};
use crate::build::blob_reader::read_chunks;
use crate::rafs::ci::{ChunkForm, ChunkInfo, ChunkInfos};
use crate::rafs::id::{BlobId, BlobIndex, ChunkIndex};
use crate::rafs::layout::{BlobFeatures, ChunkFlags};
use crate::rafs::toc::{PackedBlob, Section, SectionKind};
use crate::rafs::{BlobInfo, Bootstrap, ChunkDigests, FormatError};

/// Bytes that the hashing thread reads at a time.
const HASH_STEP: usize = 1 << 20;
/// Most bytes of a section that is kept in memory: digests of `MAX_CHUNKS` chunks, twice over.
const SECTION_LIMIT: u64 = 1 << 30;
/// Bytes of a tar header, which belongs to what the digest of the chunk data covers.
const TAR_HEADER_SIZE: u64 = 512;

/// A blob file that is open.
pub(super) struct BlobFile {
    path: PathBuf,
    file: File,
    size: u64,
    /// `None` if it cannot be read: `damage` says why.
    pub(super) chunks: Option<ChunkInfos>,
    damage: Option<String>,
}

/// What the threads share.
struct Work<'a> {
    file: &'a BlobFile,
    info: &'a BlobInfo,
    chunks: &'a ChunkInfos,
    digests: Option<&'a ChunkDigests>,
    /// The digests in the blob itself, 32 bytes each.
    section: Option<&'a [u8]>,
    next: AtomicU32,
    findings: Mutex<&'a mut Findings>,
    progress: &'a ProgressBar,
}

impl BlobFile {
    /// Opens `path` and reads the chunk-info array of `info` in it.
    ///
    /// # Errors
    ///
    /// If there is no such file. A damaged one is opened.
    pub(super) fn open(path: &Path, info: &BlobInfo) -> Result<BlobFile> {
        let io = |source| FormatError::Io { path: path.display().to_string(), source };
        let file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let (chunks, damage) = match read_chunks(&file, size, info) {
            Ok(chunks) => (Some(chunks), None),
            Err(e) => (None, Some(format!("{e:#}"))),
        };
        Ok(BlobFile { path: path.to_owned(), file, size, chunks, damage })
    }

    /// Its path, its size in bytes and its chunk-info array.
    pub(super) fn into_parts(self) -> (PathBuf, u64, Option<ChunkInfos>) {
        (self.path, self.size, self.chunks)
    }

    pub(super) fn check(&self, image: &Bootstrap, index: BlobIndex, findings: &mut Findings) {
        let info = &image.blobs()[usize::from(index.0)];
        findings.blobs += 1;
        if let Some(damage) = &self.damage {
            findings.problem(place(info), damage);
        }
        let packed = self.is_packed(info).then(|| PackedBlob::read(&self.file));
        let packed = packed.and_then(|packed| match packed {
            Ok(packed) => Some(packed),
            Err(e) => {
                findings.problem(place(info), describe(&e));
                None
            }
        });
        if !self.is_packed(info) {
            let want = image
                .blob_entries()
                .map_or(0, |entries| entries[usize::from(index.0)].compressed_size.get());
            if want != self.size && info.features.contains(BlobFeatures::CAP_TAR_TOC) {
                let what = format!("the file has {} bytes, the blob table says {want}", self.size);
                findings.problem(place(info), what);
            }
        }
        let section = packed.as_ref().and_then(|packed| self.sections(packed, info, findings));
        let digests = image.chunk_digests(index).ok();
        if let (Some(section), Some(digests)) = (&section, &digests) {
            compare_digests(info, section, digests, findings);
        }
        let bytes = self.chunks.as_ref().map_or(0, |chunks| stored_bytes(chunks, info));
        let progress = progress::bytes(info.id.as_str()[..12].to_owned(), self.size + bytes);
        match &self.chunks {
            Some(chunks) => {
                let work = Work {
                    file: self,
                    info,
                    chunks,
                    digests: digests.as_ref(),
                    section: section.as_deref(),
                    next: AtomicU32::new(0),
                    findings: Mutex::new(findings),
                    progress: &progress,
                };
                let threads = std::thread::available_parallelism().map_or(1, usize::from);
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| work.run());
                    }
                    work.record(self.hash(info, packed.as_ref(), &progress));
                });
            }
            None => {
                if let Some(problem) = self.hash(info, packed.as_ref(), &progress) {
                    findings.add(problem);
                }
            }
        }
        progress.finish_and_clear();
    }

    fn is_packed(&self, info: &BlobInfo) -> bool {
        info.features.intersects(
            BlobFeatures::HAS_TAR_HEADER | BlobFeatures::HAS_TOC | BlobFeatures::INLINED_FS_META,
        )
    }

    /// Checks the digests of the sections and returns those of the chunks.
    fn sections(
        &self,
        packed: &PackedBlob,
        info: &BlobInfo,
        findings: &mut Findings,
    ) -> Option<Vec<u8>> {
        let mut digests = None;
        for section in packed.sections() {
            let checked = match section.kind {
                SectionKind::ImageBlob => self.check_data(section).map(|()| Vec::new()),
                _ => section.content(&self.file, SECTION_LIMIT).map_err(|e| describe(&e)),
            };
            match checked {
                Ok(content) if section.kind == SectionKind::BlobDigest => digests = Some(content),
                Ok(_) => {}
                Err(what) => {
                    findings.problem(format_args!("{}, {}", place(info), section.kind.name()), what)
                }
            }
        }
        digests.filter(|digests| {
            let want = u64::from(info.chunk_count) * 32;
            if digests.len() as u64 != want {
                let what = format!("{} bytes, not {want}", digests.len());
                findings.problem(format_args!("{}, blob.digest", place(info)), what);
            }
            digests.len() as u64 == want
        })
    }

    /// The digest of chunk data covers the tar header behind it.
    fn check_data(&self, section: &Section) -> Result<(), String> {
        let Some(digest) = section.digest else { return Ok(()) };
        let (start, end) = (section.stored.start, section.stored.end + TAR_HEADER_SIZE);
        let mut hasher = Sha256::new();
        self.read_to(start..end, |bytes| hasher.update(bytes)).map_err(|e| format!("{e:#}"))?;
        if hasher.finalize()[..] == digest[..] {
            Ok(())
        } else {
            Err("stored bytes do not match their digest".to_owned())
        }
    }

    /// Compares the blob's id with the hash of the file.
    fn hash(
        &self,
        info: &BlobInfo,
        packed: Option<&PackedBlob>,
        progress: &ProgressBar,
    ) -> Option<Problem> {
        if info.id == BlobId::UNKNOWN {
            return None;
        }
        let left_out = packed
            .and_then(|packed| packed.section(SectionKind::BlobDigest))
            .map_or(0..0, |section| section.stored.clone());
        let mut whole = Sha256::new();
        // The builder leaves the digests out of the hash if it writes no bootstrap behind them.
        let mut partial = Sha256::new();
        let mut read = || -> Result<()> {
            self.read_to(0..left_out.start, |bytes| {
                whole.update(bytes);
                progress.inc(bytes.len() as u64);
            })?;
            partial = whole.clone();
            self.read_to(left_out.clone(), |bytes| whole.update(bytes))?;
            self.read_to(left_out.end..self.size, |bytes| {
                whole.update(bytes);
                if !left_out.is_empty() {
                    partial.update(bytes);
                }
                progress.inc(bytes.len() as u64);
            })
        };
        let what = match read() {
            Err(e) => format!("{e:#}"),
            Ok(()) => {
                let whole = BlobId::from_sha256(whole.finalize().into());
                let without = BlobId::from_sha256(partial.finalize().into());
                if info.id == whole || (!left_out.is_empty() && info.id == without) {
                    return None;
                }
                format!("SHA-256 of {} is {whole}", self.path.display())
            }
        };
        Some(Problem { place: place(info), what, chunk: None, values: None })
    }

    /// Feeds the bytes of `range` to `sink`.
    fn read_to(&self, range: std::ops::Range<u64>, mut sink: impl FnMut(&[u8])) -> Result<()> {
        let mut buffer = vec![0; HASH_STEP];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(HASH_STEP).min(HASH_STEP);
            let buffer = &mut buffer[..len];
            self.file
                .read_exact_at(buffer, at)
                .with_context(|| format!("bytes {at}..{} of the file", at + len as u64))?;
            sink(buffer);
            at += len as u64;
        }
        Ok(())
    }
}

/// Bytes of chunk data, for the progress bar.
fn stored_bytes(chunks: &ChunkInfos, info: &BlobInfo) -> u64 {
    if chunks.is_empty() { 0 } else { info.data_end }
}

/// The digests in the blob must be those of the bootstrap.
fn compare_digests(
    info: &BlobInfo,
    section: &[u8],
    digests: &ChunkDigests,
    findings: &mut Findings,
) {
    for (index, want) in (0..info.chunk_count).zip(section.chunks_exact(32)) {
        if digests.get(ChunkIndex(index)).is_some_and(|digest| digest[..] != *want) {
            findings.add(Problem {
                place: format!("{}, chunk {index}", place(info)),
                what: "digest in blob.digest is not that of the chunk table".to_owned(),
                chunk: Some((info.index, ChunkIndex(index))),
                values: None,
            });
        }
    }
}

impl Work<'_> {
    /// Checks chunks until there are none left.
    fn run(&self) {
        let (mut stored, mut uncompressed) = (Vec::new(), Vec::new());
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.chunks.len() {
                return;
            }
            let unit = self.chunks.unit(ChunkIndex(index)).unwrap_or(index..index + 1);
            if unit.start == index {
                self.check_unit(unit, &mut stored, &mut uncompressed);
            }
        }
    }

    fn record(&self, problem: Option<Problem>) {
        if let Some(problem) = problem {
            self.findings.lock().expect("no thread panics while it reports").add(problem);
        }
    }

    fn chunk_problem(&self, index: u32, info: &ChunkInfo, what: String) {
        let start = info.compressed_offset;
        self.record(Some(Problem {
            place: format!(
                "{}, chunk {index}, stored bytes {start}..{}",
                place(self.info),
                info.compressed_end()
            ),
            what,
            chunk: Some((self.info.index, ChunkIndex(index))),
            values: None,
        }));
    }

    /// Reads the stored bytes that chunks `unit` share, and checks each of these.
    fn check_unit(
        &self,
        unit: std::ops::Range<u32>,
        stored: &mut Vec<u8>,
        uncompressed: &mut Vec<u8>,
    ) {
        let first = unit.start;
        let Some(info) = self.chunks.get(ChunkIndex(first)) else { return };
        let read = self.read_unit(&info, stored, uncompressed);
        self.progress.inc(info.compressed_size.into());
        match read {
            Err(what) => self.chunk_problem(first, &info, what),
            Ok(data) => {
                for index in unit.clone() {
                    self.check_chunk(index, data);
                }
            }
        }
        let mut findings = self.findings.lock().expect("no thread panics while it reports");
        findings.chunks += u64::from(unit.end - unit.start);
    }

    fn read_unit<'b>(
        &self,
        info: &ChunkInfo,
        stored: &'b mut Vec<u8>,
        uncompressed: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], String> {
        let size = match info.form {
            ChunkForm::Plain | ChunkForm::Compressed => info.uncompressed_size,
            ChunkForm::Batch { index, .. } => {
                let context = self.chunks.batch(index).ok_or("its batch does not exist")?;
                context.uncompressed_size.get()
            }
        };
        let plain = match info.form {
            ChunkForm::Plain => true,
            ChunkForm::Compressed => false,
            ChunkForm::Batch { .. } => info.compressed_size == size,
        };
        let len = |size: u32| usize::try_from(size).map_err(|e| e.to_string());
        stored.resize(len(info.compressed_size)?, 0);
        self.file
            .file
            .read_exact_at(stored, info.compressed_offset)
            .map_err(|e| format!("cannot be read: {e}"))?;
        if plain {
            return Ok(stored);
        }
        uncompressed.resize(len(size)?, 0);
        self.info.compressor.decompress(stored, uncompressed).map_err(|e| describe(&e))?;
        Ok(uncompressed)
    }

    /// Compares chunk `index`, which lies in `data`, with what is known of it.
    fn check_chunk(&self, index: u32, data: &[u8]) {
        let Some(info) = self.chunks.get(ChunkIndex(index)) else { return };
        let offset = match info.form {
            ChunkForm::Batch { offset, .. } => offset,
            _ => 0,
        };
        let range = usize::try_from(offset).ok().zip(usize::try_from(info.uncompressed_size).ok());
        let Some(data) = range.and_then(|(start, len)| data.get(start..)?.get(..len)) else {
            return self.chunk_problem(index, &info, "lies behind the end of its batch".to_owned());
        };
        let record = self.digests.and_then(|digests| digests.record(ChunkIndex(index)));
        let section = self
            .section
            .and_then(|section| section.chunks_exact(32).nth(usize::try_from(index).ok()?));
        if let Some(want) = record.map(|record| &record.digest[..]).or(section)
            && self.info.digester.digest(data)[..] != *want
        {
            // The CRCs would say the same.
            return self.chunk_problem(index, &info, "does not match its digest".to_owned());
        }
        let has_crc = |flags: u32| flags & ChunkFlags::HAS_CRC32C.bits() != 0;
        let in_table = record.filter(|r| has_crc(r.flags.get())).map(|r| r.crc32c.get());
        let crcs = [(info.crc32c, "chunk-info array"), (in_table, "chunk table")];
        for (want, table) in crcs {
            if want.is_some_and(|want| want != crc32c::crc32c(data)) {
                self.chunk_problem(index, &info, format!("does not match its CRC in the {table}"));
            }
        }
    }
}
