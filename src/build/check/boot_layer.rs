//! The layer with the bootstrap: a tar of `image/image.boot`, and of a chunk-info array for each blob.
//!
//! Memory: the bootstrap, at most 2 GiB, and the arrays, together at most [`METAS_MAX`] bytes.

use std::collections::BTreeMap;
use std::io::{self, Read};

use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes};

use super::findings::{Findings, describe};
use super::tar_stream::{EntryKind, TarStream};
use crate::build::image_file::printable;
use crate::rafs::BlobInfo;
use crate::rafs::ci::ChunkInfos;
use crate::rafs::id::BlobId;
use crate::rafs::layout::{BLOCK_SIZE, CiHeader};

const BOOT_MAX: u64 = 1 << 31;
const METAS_MAX: u64 = 1 << 30;
const PLACE: &str = "bootstrap layer";

/// What the layer holds.
#[derive(Default)]
pub(super) struct BootLayer {
    pub bootstrap: Option<Vec<u8>>,
    /// Files `image/<id>.blob.meta`.
    metas: BTreeMap<BlobId, Vec<u8>>,
    /// SHA-256 of the tar.
    pub diff_id: [u8; 32],
}

/// Reads the uncompressed layer to its end.
///
/// # Errors
///
/// Of reading. What is wrong with the content is a finding.
pub(super) fn read(tar: &mut dyn Read, findings: &mut Findings) -> io::Result<BootLayer> {
    let mut hashed = Hashed { inner: tar, hash: Sha256::new() };
    let mut layer = BootLayer::default();
    if let Err(e) = entries(&mut hashed, &mut layer, findings) {
        findings.problem(PLACE, describe(&e));
    }
    // Fails again, if that was because it cannot be read.
    io::copy(&mut hashed, &mut io::sink())?;
    layer.diff_id = hashed.hash.finalize().into();
    Ok(layer)
}

fn entries(
    tar: &mut Hashed<'_>,
    layer: &mut BootLayer,
    findings: &mut Findings,
) -> Result<(), super::tar_stream::TarError> {
    let mut tar = TarStream::new(tar);
    let mut metas = 0;
    let mut first = true;
    while let Some(entry) = tar.next()? {
        let path = printable(&entry.path);
        let place = format!("{PLACE}, {path}");
        let name = entry.path.strip_prefix(b"./").unwrap_or(&entry.path);
        if entry.kind == EntryKind::Dir && matches!(name, b"image" | b"image/") {
            mode(&place, 0o755, entry.mode, findings);
            if !first {
                findings.problem(place, "is not the first entry");
            }
            first = false;
            continue;
        }
        first = false;
        let Some(file) = name.strip_prefix(b"image/").filter(|_| entry.kind == EntryKind::File)
        else {
            findings.problem(place, "is neither the directory image nor a file in it");
            continue;
        };
        let meta = file.strip_suffix(b".blob.meta").and_then(BlobId::parse);
        let is_boot = file == b"image.boot";
        if !is_boot && meta.is_none() {
            // Files of other tools, such as `backend.json`.
            continue;
        }
        mode(&place, 0o444, entry.mode, findings);
        let room = if is_boot { BOOT_MAX } else { METAS_MAX - metas };
        if entry.size > room {
            findings.undecided(format!("{place}: {} bytes, more than is read", entry.size));
            continue;
        }
        let mut content = Vec::new();
        tar.content(|bytes| content.extend_from_slice(bytes))?;
        let second = match meta {
            None => layer.bootstrap.replace(content).is_some(),
            Some(id) => {
                metas += content.len() as u64;
                layer.metas.insert(id, content).is_some()
            }
        };
        if second {
            findings.problem(place, "is there twice");
        }
    }
    if layer.bootstrap.is_none() {
        findings.problem(PLACE, "no image/image.boot");
    }
    Ok(())
}

fn mode(place: &str, expected: u16, found: u16, findings: &mut Findings) {
    if expected != found {
        let what = format!("mode {found:04o}, not {expected:04o}");
        let [expected, found] = [expected, found].map(|mode| format!("{mode:04o}"));
        findings.mismatch(place, "mode", expected, found, what);
    }
}

impl BootLayer {
    /// The chunk-info array that the layer has for a blob.
    pub(super) fn chunk_infos(
        &self,
        info: &BlobInfo,
        findings: &mut Findings,
    ) -> Option<ChunkInfos> {
        let place = format!("{PLACE}, image/{}.blob.meta", info.id);
        let Some(meta) = self.metas.get(&info.id) else {
            findings.mismatch(place, "file", "present", "absent", "there is no such file");
            return None;
        };
        match parse(info, meta) {
            Ok(chunks) => Some(chunks),
            Err(what) => {
                findings.problem(place, what);
                None
            }
        }
    }

    /// Ids that the layer has an array for.
    pub(super) fn meta_ids(&self) -> impl Iterator<Item = &BlobId> {
        self.metas.keys()
    }
}

fn parse(info: &BlobInfo, meta: &[u8]) -> Result<ChunkInfos, String> {
    let padded = info.ci_uncompressed_size.next_multiple_of(BLOCK_SIZE);
    let want = padded + size_of::<CiHeader>() as u64;
    if meta.len() as u64 != want {
        return Err(format!("{} bytes, not {want}", meta.len()));
    }
    let split = |at: u64| usize::try_from(at).map_err(|e| e.to_string());
    let (table, header_bytes) = meta.split_at(split(padded)?);
    let (table, padding) = table.split_at(split(info.ci_uncompressed_size)?);
    if padding.iter().any(|&b| b != 0) {
        return Err("the padding behind the table is not zero".to_owned());
    }
    let mut header = CiHeader::new_zeroed();
    header.as_mut_bytes().copy_from_slice(header_bytes);
    ChunkInfos::parse(info, table.to_vec(), &header).map_err(|e| describe(&e))
}

struct Hashed<'a> {
    inner: &'a mut dyn Read,
    hash: Sha256,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        Ok(got)
    }
}
