//! The bootstrap, all of it: does it describe one tree, and do its tables agree with it?

use std::collections::{HashMap, HashSet};

use super::findings::Findings;
use super::tables::{self, ChunkTables};
use super::{place, progress};
use crate::build::image_file::printable;
use crate::rafs::id::{ChunkIndex, Nid};
use crate::rafs::layout::{BLOCK_SIZE, Dirent, ImageFlags};
use crate::rafs::{Bootstrap, FileKind, Inode, WalkItem};

/// What link counts are compared with.
struct Links {
    /// Names found, for a file; sub-directories, for a directory.
    found: u32,
    stored: u32,
    kind: FileKind,
    path: Vec<u8>,
}

/// Checks `image`; with the chunk-info arrays where they are known.
pub(super) fn check(
    image: &Bootstrap,
    infos: tables::ChunkInfosByBlob<'_>,
    findings: &mut Findings,
) {
    let tables = tables::check(image, infos, findings);
    tree(image, &tables, findings);
}

fn tree(image: &Bootstrap, tables: &ChunkTables<'_>, findings: &mut Findings) {
    let bar = progress::spinner("metadata");
    let mut with_xattrs = None;
    let mut links: HashMap<Nid, Links> = HashMap::new();
    // The directories above the path being looked at.
    let mut above: Vec<Nid> = Vec::new();
    for item in image.walk() {
        bar.inc(1);
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
            if let Some(what) = spare_bytes(inode) {
                findings.problem(printable(&item.path()), what);
            }
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
        if is_new && contents(image, &item, tables, findings) {
            with_xattrs.get_or_insert_with(|| item.path());
        }
    }
    bar.finish_and_clear();
    let mut links: Vec<_> = links.into_iter().collect();
    links.sort_unstable_by_key(|(nid, _)| *nid);
    for (nid, link) in &links {
        if link.found != link.stored {
            let expected = if link.kind == FileKind::Directory {
                "2 and one for each sub-directory make"
            } else {
                "its names are"
            };
            findings.mismatch(
                format_args!("{}, nid {}", printable(&link.path), nid.0),
                "nlink",
                link.found,
                link.stored,
                format_args!("link count is {}, {expected} {}", link.stored, link.found),
            );
        }
    }
    let (counted, found) = (image.path_count(), findings.paths);
    if counted != found {
        let what = format_args!("counts {counted} paths, found {found}");
        findings.mismatch("super block", "paths", found, counted, what);
    }
    let flag = image.flags().contains(ImageFlags::HAS_XATTR);
    if let Some(path) = with_xattrs.filter(|_| !flag) {
        let what = format!("flag HAS_XATTR is not set, {} has attributes", printable(&path));
        findings.mismatch("super block", "flag HAS_XATTR", "set", "not set", what);
    }
    let known: HashSet<Nid> = links.into_iter().map(|(nid, _)| nid).collect();
    for nid in image.prefetch_nids().filter(|nid| !known.contains(nid)) {
        findings.problem("prefetch table", format_args!("nid {} is not in the tree", nid.0));
    }
}

/// Says so if the data of a directory goes on behind its last name. Entries that cannot be read are
/// reported by the walk.
fn spare_bytes(inode: &Inode<'_>) -> Option<String> {
    let (mut block, mut used) = (u64::MAX, 0);
    for entry in inode.dir().ok()?.entries_from(0).ok()? {
        let entry = entry.ok()?;
        if entry.block() != block {
            (block, used) = (entry.block(), 0);
        }
        used += size_of::<Dirent>() + entry.name.len();
    }
    let want = block.checked_mul(BLOCK_SIZE)? + used as u64;
    let full = inode.size().is_multiple_of(BLOCK_SIZE) && inode.size() >= want;
    (inode.size() != want && !full)
        .then(|| format!("directory of {} bytes, its entries end at {want}", inode.size()))
}

/// Checks what an inode has besides its name and attributes; true if it has extended attributes.
fn contents(
    image: &Bootstrap,
    item: &WalkItem<'_>,
    tables: &ChunkTables<'_>,
    findings: &mut Findings,
) -> bool {
    let inode = &item.inode;
    let path = || printable(&item.path());
    let has_xattrs = match inode.xattrs() {
        Ok(mut xattrs) => xattrs.next().is_some(),
        Err(e) => {
            findings.problem(path(), e);
            true
        }
    };
    if inode.kind() == FileKind::Symlink
        && let Err(e) = inode.symlink_target()
    {
        findings.problem(path(), e);
    }
    let mut sound = true;
    for i in 0..inode.chunk_count() {
        if let Err(what) = chunk(image, inode, i, tables) {
            sound = false;
            findings.problem(format_args!("{}, chunk {i}", path()), what);
        }
    }
    if sound && let Err(what) = kernel_chunks(image, inode) {
        findings.problem(path(), what);
    }
    has_xattrs
}

/// Compares chunk `i` of a file with what the tables say about it.
fn chunk(
    image: &Bootstrap,
    inode: &Inode<'_>,
    i: u32,
    tables: &ChunkTables<'_>,
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
    if let Some(table) = tables.digests(blob) {
        let record = table.record(index);
        compare(
            "chunk table",
            record.map(|r| (r.uncompressed_offset.get(), r.uncompressed_size.get())),
        )?;
    }
    if let Some(chunks) = tables.infos(blob) {
        let info = chunks.get(index);
        compare(
            "chunk-info array",
            info.map(|info| (info.uncompressed_offset, info.uncompressed_size)),
        )?;
    }
    Ok(())
}

/// The kernel's EROFS driver cuts a file by the chunk bits of its inode and takes the address of
/// each such piece: it must find there what RAFS, which cuts by the image's chunk size, finds.
fn kernel_chunks(image: &Bootstrap, inode: &Inode<'_>) -> Result<(), String> {
    let (Some(kernel), ours) = (inode.kernel_chunk_size(), u64::from(image.chunk_size())) else {
        return Ok(());
    };
    if kernel == ours || inode.chunk_count() == 0 {
        return Ok(());
    }
    let shown = |what: &str| format!("the kernel's chunk size of {kernel} bytes {what}");
    if kernel < inode.size() {
        return Err(shown("is neither the image's nor holds the file"));
    }
    let first = inode.chunk(0).map_err(|e| e.to_string())?;
    for i in 1..inode.chunk_count() {
        let addr = inode.chunk(i).map_err(|e| e.to_string())?;
        let want = u64::from(first.start_block()) + u64::from(i) * ours / BLOCK_SIZE;
        if addr.blob() != first.blob() || u64::from(addr.start_block()) != want {
            return Err(shown("makes one piece of chunks that do not follow each other"));
        }
    }
    Ok(())
}
