//! Where inodes and directory data go in the bootstrap.
//!
//! Inodes lie on 32-byte slots, in the order of the tree: a directory, then its children that are
//! no directories, then its sub-directories one by one. A directory or link whose last block is
//! short has it behind its inode, and inode, attributes and that block must lie in one block of the
//! file. What is skipped for that, or to align whole blocks, is used by later inodes.

use std::ops::Range;

use super::dirent;
use super::tree::{Kind, NodeId, Tree};
use super::xattrs;
use crate::rafs::id::Nid;
use crate::rafs::layout::{BLOCK_SIZE, ChunkAddr, InodeExtended, SLOT_SIZE};

/// Space below block boundaries that was skipped; more are forgotten.
const GAPS: usize = 16;

/// Place of one inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Bytes from the start of the bootstrap.
    pub inode: u64,
    /// Start of the whole blocks of a directory's or link's data, in bytes. If there are none, the
    /// block of the inode, which nobody looks at.
    pub data: u64,
    /// True if the last block of the data is behind the inode.
    pub inline: bool,
}

/// Where everything is.
#[derive(Debug)]
pub struct Plan {
    meta_start: u64,
    /// By node; a hard-linked file has its inode at its first name.
    places: Vec<Place>,
    /// First byte behind inodes and data, a multiple of the block size.
    pub end: u64,
}

impl Plan {
    /// Places all inodes of `tree` from the byte `start` on, which begins a block. Nids count from
    /// `meta_start`.
    pub fn new(tree: &Tree, meta_start: u64, start: u64, chunk_size: u32) -> Plan {
        let mut plan = Plan { meta_start, places: vec![Place::default(); tree.len()], end: 0 };
        let mut space = Space::new(start);
        let mut dirs = vec![NodeId::ROOT];
        while let Some(dir) = dirs.pop() {
            plan.places[dir.index()] = place(tree, dir, chunk_size, &mut space);
            for child in tree.children(dir) {
                if !tree.is_dir(child) && tree.inode_of(child) == child {
                    plan.places[child.index()] = place(tree, child, chunk_size, &mut space);
                }
            }
            dirs.extend(tree.children(dir).rev().filter(|&child| tree.is_dir(child)));
        }
        plan.end = space.end.next_multiple_of(BLOCK_SIZE);
        plan
    }

    pub fn place(&self, tree: &Tree, id: NodeId) -> Place {
        self.places[tree.inode_of(id).index()]
    }

    pub fn nid(&self, tree: &Tree, id: NodeId) -> Nid {
        Nid((self.place(tree, id).inode - self.meta_start) / SLOT_SIZE)
    }
}

/// Number of chunks of a file of `size` bytes.
pub fn chunk_count(size: u64, chunk_size: u32) -> u64 {
    size.div_ceil(u64::from(chunk_size))
}

/// Bytes of the inode and its attributes.
pub fn inode_len(tree: &Tree, id: NodeId) -> u64 {
    (size_of::<InodeExtended>() + xattrs::area_len(&tree.node(id).xattrs)) as u64
}

fn place(tree: &Tree, id: NodeId, chunk_size: u32, space: &mut Space) -> Place {
    let inode_len = inode_len(tree, id);
    let data_len = match &tree.node(id).kind {
        Kind::Dir { .. } => {
            let names = tree.entries(id);
            dirent::data_size(&dirent::fill(names.iter().map(|(name, _)| name.len())))
        }
        Kind::Symlink(target) => target.len() as u64,
        Kind::File(file) => {
            let chunks = chunk_count(tree.file(*file).size, chunk_size);
            let len = inode_len.next_multiple_of(8) + chunks * size_of::<ChunkAddr>() as u64;
            return Place { inode: space.take(len, false), ..Place::default() };
        }
        Kind::Special { .. } => 0,
    };
    let tail = data_len % BLOCK_SIZE;
    let inline = tail > 0 && inode_len + tail <= BLOCK_SIZE;
    let blocks = if inline { data_len / BLOCK_SIZE } else { data_len.div_ceil(BLOCK_SIZE) };
    let inode = space.take(if inline { inode_len + tail } else { inode_len }, inline);
    let data = match blocks {
        0 => inode / BLOCK_SIZE * BLOCK_SIZE,
        blocks => space.take_blocks(blocks),
    };
    Place { inode, data, inline }
}

/// Space of the bootstrap, handed out from its start to its end.
struct Space {
    /// First byte that was never handed out.
    end: u64,
    /// Ranges before it that are free; none crosses a block boundary.
    gaps: Vec<Range<u64>>,
}

impl Space {
    fn new(start: u64) -> Space {
        Space { end: start, gaps: Vec::new() }
    }

    /// `len` bytes from a slot on; inside one block if `one_block`.
    fn take(&mut self, len: u64, one_block: bool) -> u64 {
        if let Some(gap) = self.gaps.iter_mut().find(|gap| gap.end - gap.start >= len) {
            let start = gap.start;
            gap.start = (start + len).next_multiple_of(SLOT_SIZE).min(gap.end);
            return start;
        }
        let mut start = self.end.next_multiple_of(SLOT_SIZE);
        if one_block && start % BLOCK_SIZE + len > BLOCK_SIZE {
            start = self.skip_to_block();
        }
        self.end = start + len;
        start
    }

    /// Whole blocks, one after the other.
    fn take_blocks(&mut self, count: u64) -> u64 {
        let start = self.skip_to_block();
        self.end = start + count * BLOCK_SIZE;
        start
    }

    /// Start of the next block; remembers what is left of this one.
    fn skip_to_block(&mut self) -> u64 {
        let block = self.end.next_multiple_of(BLOCK_SIZE);
        let gap = self.end.next_multiple_of(SLOT_SIZE)..block;
        // A slot at the least must be left, or the gap is of no use.
        self.gaps.retain(|gap| gap.end - gap.start >= size_of::<InodeExtended>() as u64);
        if gap.end > gap.start {
            if self.gaps.len() == GAPS {
                let len = |gap: &Range<u64>| gap.end - gap.start;
                let smallest = (0..GAPS).min_by_key(|&i| len(&self.gaps[i]));
                self.gaps.remove(smallest.expect("the list is full"));
            }
            self.gaps.push(gap);
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inline_tails_never_cross_a_block_and_gaps_are_used() {
        let mut space = Space::new(4096);
        // (length, in one block, place)
        let cases = [
            (4000, true, 4096),
            (97, true, 8192),    // 8096 + 97 would cross
            (96, true, 8096),    // the gap is 96 bytes
            (5000, false, 8320), // may cross
            (64, false, 13344),
            (4096, true, 16384), // a whole block
            (65, true, 13408),   // back in the gap before it
            (64, false, 13504),
        ];
        for (len, one_block, at) in cases {
            assert_eq!(space.take(len, one_block), at, "{len} bytes, in one block: {one_block}");
        }
        assert_eq!(space.take_blocks(2), 20480);
        assert_eq!(space.end, 28672);
    }

    #[test]
    fn no_two_things_share_a_byte() {
        let mut space = Space::new(0);
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut seed = 1_u64;
        for _ in 0..2000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let len = 64 + (seed >> 33) % 4000;
            let (start, len) = match seed >> 62 {
                0 => (space.take_blocks(1 + len % 3), (1 + len % 3) * BLOCK_SIZE),
                1 => (space.take(len, false), len),
                _ => (space.take(len, true), len),
            };
            assert_eq!(start % SLOT_SIZE, 0);
            if seed >> 62 >= 2 {
                assert_eq!(start / BLOCK_SIZE, (start + len - 1) / BLOCK_SIZE, "crosses a block");
            }
            taken.push(start..start + len);
        }
        taken.sort_by_key(|range| range.start);
        assert!(taken.windows(2).all(|pair| pair[0].end <= pair[1].start), "something overlaps");
    }
}
