//! What an image keeps of the blobs it was put together from: those that its files use.

use std::collections::HashSet;

use zerocopy::little_endian::U32;

use super::dedup::BlobTable;
use super::place::chunk_count;
use super::tree::{FileChunks, Kind, Tree};
use crate::rafs::id::BlobId;
use crate::rafs::layout::BlobEntry;

/// In which order the blobs stand in the blob table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As before.
    Given,
    /// As the tree uses them, in its order: what merged images have.
    FirstUse,
}

/// Drops the blobs and records that no file of `tree` uses, and renumbers the chunks of `files`.
/// A blob for which `keep` is true stays, with all its records.
pub fn keep_used(
    tree: &Tree,
    files: &mut FileChunks,
    table: BlobTable,
    chunk_size: u32,
    order: Order,
    keep: impl Fn(&BlobEntry) -> bool,
) -> BlobTable {
    let kept: Vec<bool> = table.blobs.iter().map(&keep).collect();
    let mut first_use = Vec::new();
    let mut seen = vec![false; table.blobs.len()];
    let mut used: HashSet<(u32, u32)> = HashSet::new();
    let used_files = || {
        tree.ids().filter_map(|id| match tree.node(id).kind {
            Kind::File(file) if tree.inode_of(id) == id => Some(tree.file(file)),
            _ => None,
        })
    };
    let count = |size| usize::try_from(chunk_count(size, chunk_size)).expect("they are in memory");
    for file in used_files() {
        for chunk in files.of(file.data, count(file.size)) {
            let at = usize::from(chunk.device()) - 1;
            if !std::mem::replace(&mut seen[at], true) {
                first_use.push(at);
            }
            if !kept[at] {
                used.insert((u32::from(chunk.device()) - 1, chunk.chunk_index()));
            }
        }
    }
    let stays = |at: usize| seen[at] || kept[at];
    let order: Vec<usize> = match order {
        Order::Given => (0..table.blobs.len()).filter(|&at| stays(at)).collect(),
        Order::FirstUse => {
            let unused = (0..table.blobs.len()).filter(|&at| kept[at] && !seen[at]);
            first_use.iter().copied().chain(unused).collect()
        }
    };
    let mut index = vec![None; table.blobs.len()];
    for (new, &old) in (0..).zip(&order) {
        index[old] = Some(new);
    }
    let new_index = |old: u32| index[old as usize];
    for file in used_files() {
        for chunk in files.of_mut(file.data, count(file.size)) {
            let new: u8 = new_index(u32::from(chunk.device()) - 1).expect("it is in use");
            *chunk = chunk.with_device(new + 1);
        }
    }
    let records = table.records.into_iter().filter_map(|mut record| {
        let old = record.blob_index.get();
        let wanted = kept[old as usize] || used.contains(&(old, record.index.get()));
        record.blob_index = U32::new(new_index(old).filter(|_| wanted)?.into());
        Some(record)
    });
    let records = records.collect();
    BlobTable { blobs: order.into_iter().map(|at| table.blobs[at]).collect(), records }
}

/// True of the blob that is being built.
pub fn is_own(id: BlobId) -> impl Fn(&BlobEntry) -> bool {
    move |entry| entry.blob_id == *id.as_bytes()
}
