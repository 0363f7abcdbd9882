//! Directory data: entries into blocks.
//!
//! Entries are sorted by name over the whole directory, `.` and `..` among them. A block takes
//! entries while they fit; the last block may be short.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U64};

use crate::rafs::id::Nid;
use crate::rafs::layout::{BLOCK_BITS, Dirent};

const BLOCK: usize = 1 << BLOCK_BITS;

/// Entries of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub entries: usize,
    /// Bytes in use, at most the block size.
    pub used: usize,
}

/// How entries with names of these lengths (bytes, 1..=255) fill blocks.
pub fn fill(name_lens: impl Iterator<Item = usize>) -> Vec<Block> {
    let mut blocks = Vec::with_capacity(1);
    let mut open = Block { entries: 0, used: 0 };
    for name_len in name_lens {
        let len = size_of::<Dirent>() + name_len;
        if open.used + len > BLOCK {
            blocks.push(open);
            open = Block { entries: 0, used: 0 };
        }
        open.entries += 1;
        open.used += len;
    }
    blocks.push(open);
    blocks
}

/// Bytes of the directory data, that is, the size of the directory.
pub fn data_size(blocks: &[Block]) -> u64 {
    let last = blocks.last().map_or(0, |b| b.used);
    (blocks.len().saturating_sub(1) * BLOCK + last) as u64
}

/// An entry to write.
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub nid: Nid,
    pub file_type: u8,
}

/// Writes the entries of one block to the start of `out`, which is zeroed.
pub fn write_block(entries: &[Entry<'_>], out: &mut [u8]) {
    let mut name_at = entries.len() * size_of::<Dirent>();
    for (i, entry) in entries.iter().enumerate() {
        let dirent = Dirent {
            nid: U64::new(entry.nid.0),
            name_offset: U16::new(u16::try_from(name_at).expect("a block has 4096 bytes")),
            file_type: entry.file_type,
            reserved: 0,
        };
        let at = i * size_of::<Dirent>();
        out[at..at + size_of::<Dirent>()].copy_from_slice(dirent.as_bytes());
        out[name_at..name_at + entry.name.len()].copy_from_slice(entry.name);
        name_at += entry.name.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_up_to_the_last_byte() {
        // (name lengths, (entries, bytes) of each block, size of the directory)
        type Case = (Vec<usize>, Vec<(usize, usize)>, u64);
        let cases: [Case; 6] = [
            (vec![1, 2], vec![(2, 27)], 27),
            // 15 entries of 267 bytes leave 91: one more of 79 + 12 fills the block exactly.
            ([vec![255; 15], vec![79]].concat(), vec![(16, 4096)], 4096),
            ([vec![255; 15], vec![80]].concat(), vec![(15, 4005), (1, 92)], 4096 + 92),
            (vec![255; 16], vec![(15, 4005), (1, 267)], 4096 + 267),
            // As nydus-image packs 2000 names of 10 bytes: `v6-zstd /bigdir`.
            (
                [vec![1, 2], vec![10; 2000]].concat(),
                [vec![(186, 13 + 14 + 184 * 22)], vec![(186, 4092); 9], vec![(142, 3124)]].concat(),
                44084,
            ),
            (vec![], vec![(0, 0)], 0),
        ];
        for (lens, want, size) in cases {
            let got = fill(lens.iter().copied());
            let shown: Vec<_> = got.iter().map(|b| (b.entries, b.used)).collect();
            assert_eq!(shown, want, "names of {lens:?} bytes");
            assert_eq!(data_size(&got), size);
        }
    }

    #[test]
    fn a_block_is_that_of_the_worked_example() {
        let entries = [(&b"."[..], 128, 2), (b"..", 128, 2), (b"a", 135, 1)]
            .map(|(name, nid, file_type)| Entry { name, nid: Nid(nid), file_type });
        let mut block = [0; 40];
        write_block(&entries, &mut block);
        let want = b"\x80\0\0\0\0\0\0\0\x24\0\x02\0\
                     \x80\0\0\0\0\0\0\0\x25\0\x02\0\
                     \x87\0\0\0\0\0\0\0\x27\0\x01\0...a";
        assert_eq!(block, *want);
    }
}
