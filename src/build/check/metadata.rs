//! The bootstrap, all of it: does it describe one tree, and do its tables agree with each other?

use std::collections::{BTreeMap, HashMap, HashSet};

use indicatif::ProgressBar;

use super::blob::BlobFile;
use super::{Findings, place};
use crate::build::image_file::printable;
use crate::rafs::id::{BlobIndex, ChunkIndex, Nid};
use crate::rafs::layout::{BLOCK_SIZE, ChunkFlags, ChunkRecord};
use crate::rafs::{Bootstrap, ChunkDigests, FileKind, Inode, WalkItem};

/// What link counts are compared with.
struct Links {
    /// Names found, for a file; sub-directories, for a directory.
    found: u32,
    stored: u32,
    kind: FileKind,
    path: Vec<u8>,
}

/// Checks `image`; with the chunk-info arrays of `blobs` where there are files of them.
pub(super) fn check(
    image: &Bootstrap,
    blobs: &BTreeMap<BlobIndex, BlobFile>,
    findings: &mut Findings,
) {
    let tables = chunk_table(image, findings);
    for (index, blob) in blobs {
        if let (Some(blob), Some(table)) = (&blob.chunks, &tables[usize::from(index.0)]) {
            compare_tables(image, *index, blob, table, findings);
        }
    }
    tree(image, blobs, &tables, findings);
}

/// Checks each record by itself and against its neighbour. The table of a blob whose records
/// contradict each other is left out.
fn chunk_table(image: &Bootstrap, findings: &mut Findings) -> Vec<Option<ChunkDigests>> {
    let records = image.chunk_records();
    let mut previous: Option<&ChunkRecord> = None;
    for (i, record) in records.iter().enumerate() {
        let at = image.chunk_table_offset() + (i * size_of::<ChunkRecord>()) as u64;
        let mut problem = |what: &str| {
            findings.problem(format_args!("chunk table record {i} at byte {at}"), what);
        };
        let index = record.blob_index.get();
        if u64::from(index) >= image.blobs().len() as u64 {
            problem("no such blob");
        }
        if ChunkFlags::from_bits(record.flags.get()).is_none() {
            problem("unknown flags");
        }
        let key = |record: &ChunkRecord| (record.digest, record.blob_index.get());
        if previous.is_some_and(|previous| key(previous) >= key(record)) {
            problem("not above the record before it");
        }
        previous = Some(record);
    }
    if records.is_empty() && !image.blobs().is_empty() {
        findings.undecided("no chunk table, so no chunk has a digest to compare with");
        return image.blobs().iter().map(|_| None).collect();
    }
    let mut table = |index| match image.chunk_digests(index) {
        Ok(digests) => Some(digests),
        Err(e) => {
            findings.problem("chunk table", e);
            None
        }
    };
    image.blobs().iter().map(|blob| table(blob.index)).collect()
}

/// Compares the chunk table of the bootstrap with the chunk-info array of a blob.
fn compare_tables(
    image: &Bootstrap,
    index: BlobIndex,
    chunks: &crate::rafs::ci::ChunkInfos,
    table: &ChunkDigests,
    findings: &mut Findings,
) {
    use crate::rafs::ci::ChunkForm;
    let blob = &image.blobs()[usize::from(index.0)];
    for i in 0..chunks.len() {
        let (Some(info), Some(record)) = (chunks.get(ChunkIndex(i)), table.record(ChunkIndex(i)))
        else {
            continue;
        };
        // The table has no place for the stored range of a batch.
        let stored = match info.form {
            ChunkForm::Batch { .. } => None,
            _ => Some((
                info.compressed_offset == record.compressed_offset.get()
                    && info.compressed_size == record.compressed_size.get(),
                "stored range",
            )),
        };
        let has_crc = record.flags.get() & ChunkFlags::HAS_CRC32C.bits() != 0;
        let crc = info.crc32c.filter(|_| has_crc);
        let facts = [
            (info.uncompressed_offset == record.uncompressed_offset.get(), "uncompressed offset"),
            (info.uncompressed_size == record.uncompressed_size.get(), "uncompressed size"),
            (crc.is_none_or(|crc| crc == record.crc32c.get()), "CRC"),
        ];
        for (equal, what) in facts.into_iter().chain(stored) {
            if !equal {
                findings.problem(
                    format_args!("{}, chunk {i}", place(blob)),
                    format_args!("{what} in the chunk table is not that in the chunk-info array"),
                );
            }
        }
    }
}

fn tree(
    image: &Bootstrap,
    blobs: &BTreeMap<BlobIndex, BlobFile>,
    tables: &[Option<ChunkDigests>],
    findings: &mut Findings,
) {
    let progress = ProgressBar::new_spinner();
    let mut links: HashMap<Nid, Links> = HashMap::new();
    // The directories above the path being looked at.
    let mut above: Vec<Nid> = Vec::new();
    for item in image.walk() {
        progress.inc(1);
        let item = match item {
            Ok(item) => item,
            Err(e) => {
                findings.problem(printable(&e.path), e.source);
                continue;
            }
        };
        findings.paths += 1;
        let inode = &item.inode;
        above.truncate(item.depth);
        if inode.kind() == FileKind::Directory {
            if let Some(parent) = above.last().and_then(|nid| links.get_mut(nid)) {
                parent.found += 1;
            }
            above.push(inode.nid());
        }
        let is_new = match links.entry(inode.nid()) {
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                entry.get_mut().found += 1;
                false
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                let directory = inode.kind() == FileKind::Directory;
                entry.insert(Links {
                    found: if directory { 2 } else { 1 },
                    stored: inode.nlink(),
                    kind: inode.kind(),
                    path: item.path(),
                });
                true
            }
        };
        if is_new {
            contents(image, &item, blobs, tables, findings);
        }
    }
    progress.finish_and_clear();
    let mut links: Vec<_> = links.into_iter().collect();
    links.sort_unstable_by_key(|(nid, _)| *nid);
    for (nid, link) in &links {
        if link.found != link.stored {
            let expected = if link.kind == FileKind::Directory {
                "2 and one for each sub-directory make"
            } else {
                "its names are"
            };
            findings.problem(
                format_args!("{}, nid {}", printable(&link.path), nid.0),
                format_args!("link count is {}, {expected} {}", link.stored, link.found),
            );
        }
    }
    let (counted, found) = (image.path_count(), findings.paths);
    if counted != found {
        findings.problem("super block", format_args!("counts {counted} paths, found {found}"));
    }
    let known: HashSet<Nid> = links.into_iter().map(|(nid, _)| nid).collect();
    for nid in image.prefetch_nids().filter(|nid| !known.contains(nid)) {
        findings.problem("prefetch table", format_args!("nid {} is not in the tree", nid.0));
    }
}

/// What an inode has besides its name and attributes.
fn contents(
    image: &Bootstrap,
    item: &WalkItem<'_>,
    blobs: &BTreeMap<BlobIndex, BlobFile>,
    tables: &[Option<ChunkDigests>],
    findings: &mut Findings,
) {
    let inode = &item.inode;
    let path = || printable(&item.path());
    if let Err(e) = inode.xattrs() {
        findings.problem(path(), e);
    }
    if inode.kind() == FileKind::Symlink
        && let Err(e) = inode.symlink_target()
    {
        findings.problem(path(), e);
    }
    for i in 0..inode.chunk_count() {
        if let Err(what) = chunk(image, inode, i, blobs, tables) {
            findings.problem(format_args!("{}, chunk {i}", path()), what);
        }
    }
}

/// Compares chunk `i` of a file with what the tables say about it.
fn chunk(
    image: &Bootstrap,
    inode: &Inode<'_>,
    i: u32,
    blobs: &BTreeMap<BlobIndex, BlobFile>,
    tables: &[Option<ChunkDigests>],
) -> Result<(), String> {
    let addr = inode.chunk(i).map_err(|e| e.to_string())?;
    let blob = addr.blob().expect("a checked address has a blob");
    let index = ChunkIndex(addr.chunk_index());
    let offset = u64::from(addr.start_block()) * BLOCK_SIZE;
    let name = format!("chunk {} of {}", index.0, place(&image.blobs()[usize::from(blob.0)]));
    let compare = |table: &str, there: Option<(u64, u32)>| {
        let (there_offset, there_size) = there.ok_or(format!("{name} is not in the {table}"))?;
        if there_offset != offset {
            return Err(format!("{name} is at {offset}, in the {table} at {there_offset}"));
        }
        if there_size != inode.chunk_len(i) {
            let len = inode.chunk_len(i);
            return Err(format!("{name} has {len} bytes, in the {table} {there_size}"));
        }
        Ok(())
    };
    if let Some(table) = &tables[usize::from(blob.0)] {
        let record = table.record(index);
        compare(
            "chunk table",
            record.map(|r| (r.uncompressed_offset.get(), r.uncompressed_size.get())),
        )?;
    }
    if let Some(chunks) = blobs.get(&blob).and_then(|blob| blob.chunks.as_ref()) {
        let info = chunks.get(index);
        compare(
            "chunk-info array",
            info.map(|info| (info.uncompressed_offset, info.uncompressed_size)),
        )?;
    }
    Ok(())
}
