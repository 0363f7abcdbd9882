//! The distinct chunks of a blob, numbered in the order of their first use.

use std::collections::HashMap;

use zerocopy::little_endian::{U32, U64};

use super::error::BuildError;
use crate::rafs::id::ChunkIndex;
use crate::rafs::layout::{BLOCK_SIZE, ChunkFlags, ChunkRecord, MAX_CHUNKS, MAX_UNCOMPRESSED_SIZE};

/// Distinct chunks so far. Memory: about 140 bytes for each.
#[derive(Default)]
pub struct Chunks {
    by_content: HashMap<([u8; 32], u32), ChunkIndex>,
    records: Vec<ChunkRecord>,
    /// End of the uncompressed blob in bytes, a multiple of the block size.
    end: u64,
}

impl Chunks {
    /// The index of a chunk, and whether it is new. It is new if no chunk so far has this digest
    /// and length (bytes); then it gets the next index and the next place in the uncompressed blob.
    /// `file_offset` is where the file that brings it has it.
    pub fn admit(
        &mut self,
        digest: [u8; 32],
        len: u32,
        crc32c: u32,
        file_offset: u64,
    ) -> Result<(ChunkIndex, bool), BuildError> {
        // The writer's limit is one below what readers accept.
        let next = u32::try_from(self.records.len()).ok().filter(|&n| n < MAX_CHUNKS - 1);
        let end = self.end + u64::from(len).next_multiple_of(BLOCK_SIZE);
        match self.by_content.entry((digest, len)) {
            std::collections::hash_map::Entry::Occupied(known) => Ok((*known.get(), false)),
            std::collections::hash_map::Entry::Vacant(new) => {
                let index = next.ok_or(BuildError::Limit {
                    what: "the number of distinct chunks",
                    limit: u64::from(MAX_CHUNKS - 1),
                    advice: "; a larger --chunk-size makes fewer",
                })?;
                if end > MAX_UNCOMPRESSED_SIZE {
                    return Err(BuildError::Limit {
                        what: "the bytes of distinct chunks",
                        limit: MAX_UNCOMPRESSED_SIZE,
                        advice: "",
                    });
                }
                // Readers take a CRC of 0 for damage, so it must not be announced.
                let flags = if crc32c == 0 { ChunkFlags::empty() } else { ChunkFlags::HAS_CRC32C };
                self.records.push(ChunkRecord {
                    digest,
                    blob_index: U32::ZERO,
                    flags: U32::new(flags.bits()),
                    compressed_size: U32::ZERO,
                    uncompressed_size: U32::new(len),
                    compressed_offset: U64::ZERO,
                    uncompressed_offset: U64::new(self.end),
                    file_offset: U64::new(file_offset),
                    index: U32::new(index),
                    crc32c: U32::new(crc32c),
                });
                self.end = end;
                Ok((*new.insert(ChunkIndex(index)), true))
            }
        }
    }

    /// The records in the order of their indexes; where they are stored is not filled in.
    pub fn into_records(self) -> Vec<ChunkRecord> {
        self.records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_get_one_place_and_the_first_user_names_it() {
        let mut chunks = Chunks::default();
        // (digest, length, offset in the file, index, new)
        let cases = [
            (1, 5, 0, 0, true),
            (2, 4096, 0, 1, true),
            (1, 5, 8192, 0, false),
            (1, 6, 0, 2, true), // the digest alone does not make it the same chunk
            (3, 4097, 4096, 3, true),
            (4, 1, 0, 4, true),
        ];
        for (digest, len, file_offset, index, new) in cases {
            let got = chunks.admit([digest; 32], len, 7, file_offset).unwrap();
            assert_eq!(got, (ChunkIndex(index), new), "chunk {digest} of {len} bytes");
        }
        let places: Vec<_> = chunks
            .into_records()
            .iter()
            .map(|r| (r.uncompressed_offset.get(), r.file_offset.get(), r.flags.get()))
            .collect();
        let want = [(0, 0, 16), (4096, 0, 16), (8192, 0, 16), (12288, 4096, 16), (20480, 0, 16)];
        assert_eq!(places, want);
    }

    #[test]
    fn a_crc_of_zero_is_not_announced() {
        let mut chunks = Chunks::default();
        chunks.admit([0; 32], 1, 0, 0).unwrap();
        assert_eq!(chunks.into_records()[0].flags.get(), 0);
    }
}
