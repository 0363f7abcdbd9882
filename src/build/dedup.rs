//! The distinct chunks of a build: those of its own blob, numbered in the order of their first use,
//! and those of other blobs that it may use instead.
//!
//! A chunk is looked up by digest and length: in the dictionary first, then in the parent and in
//! what was stored so far.

use std::collections::HashMap;

use zerocopy::little_endian::{U32, U64};

use super::error::BuildError;
use super::load::Image;
use crate::rafs::layout::{
    BLOCK_SIZE, BlobEntry, ChunkAddr, ChunkFlags, ChunkRecord, MAX_BLOBS, MAX_CHUNKS,
    MAX_UNCOMPRESSED_SIZE,
};

type Content = ([u8; 32], u32);

/// Chunks of another image that a build may use instead of storing its own.
#[derive(Debug, Default)]
pub struct Dictionary {
    blobs: Vec<BlobEntry>,
    by_content: HashMap<Content, ChunkRecord>,
}

impl Dictionary {
    /// All chunks in the chunk table of `image`, at most 130 bytes of memory each.
    pub fn new(image: &Image) -> Dictionary {
        let mut by_content = HashMap::with_capacity(image.records.len());
        for record in &image.records {
            // Of two blobs that have a chunk the first is used.
            by_content.entry((record.digest, record.uncompressed_size.get())).or_insert(*record);
        }
        Dictionary { blobs: image.blobs.clone(), by_content }
    }

    /// The blobs that chunks may be in.
    pub fn blobs(&self) -> &[BlobEntry] {
        &self.blobs
    }
}

/// Distinct chunks so far. Memory: about 140 bytes for each.
#[derive(Debug, Default)]
pub struct Chunks<'d> {
    dictionary: Option<&'d Dictionary>,
    /// Chunks of the parent and of the own blob.
    by_content: HashMap<Content, ChunkAddr>,
    /// The own chunks in the order of their indexes.
    own: Vec<ChunkRecord>,
    /// Chunks of the dictionary in use, and where.
    from_dictionary: HashMap<Content, ChunkAddr>,
    others: Vec<ChunkRecord>,
    parent_blobs: Vec<BlobEntry>,
    blobs: Vec<Slot>,
    /// End of the own uncompressed blob in bytes, a multiple of the block size.
    end: u64,
    /// Bytes that were not stored because they were there.
    pub saved: u64,
}

/// A blob that chunks in use are in.
#[derive(Debug)]
enum Slot {
    /// That of the parent at this position.
    Parent(usize),
    /// That of the dictionary at this position.
    Dictionary(usize),
    Own,
}

/// What a build refers to when all its chunks are known.
#[derive(Debug, Default)]
pub struct BlobTable {
    /// By device number less one.
    pub blobs: Vec<BlobEntry>,
    /// Records of all chunks that may be in use.
    pub records: Vec<ChunkRecord>,
}

impl<'d> Chunks<'d> {
    /// Knows the chunks of the images that are given.
    pub fn new(dictionary: Option<&'d Dictionary>, parent: Option<&Image>) -> Chunks<'d> {
        let mut chunks = Chunks { dictionary, ..Chunks::default() };
        let Some(parent) = parent else { return chunks };
        chunks.parent_blobs.clone_from(&parent.blobs);
        chunks.blobs = (0..parent.blobs.len()).map(Slot::Parent).collect();
        chunks.others.clone_from(&parent.records);
        for record in &parent.records {
            let content = (record.digest, record.uncompressed_size.get());
            chunks.by_content.entry(content).or_insert_with(|| addr(device(record), record));
        }
        chunks
    }

    /// Where a chunk is, and whether it is new. It is new if no chunk so far has this digest and
    /// length (bytes); then it gets the next index of the own blob and the next place in it.
    /// `file_offset` is where the file that brings it has it.
    pub fn admit(
        &mut self,
        digest: [u8; 32],
        len: u32,
        crc32c: u32,
        file_offset: u64,
    ) -> Result<(ChunkAddr, bool), BuildError> {
        let content = (digest, len);
        if let Some(&known) = self.from_dictionary.get(&content) {
            self.saved += u64::from(len);
            return Ok((known, false));
        }
        if let Some(record) = self.dictionary.and_then(|d| d.by_content.get(&content)) {
            let addr = self.use_dictionary(*record)?;
            self.from_dictionary.insert(content, addr);
            self.saved += u64::from(len);
            return Ok((addr, false));
        }
        if let Some(&known) = self.by_content.get(&content) {
            self.saved += u64::from(len);
            return Ok((known, false));
        }
        // The writer's limit is one below what readers accept.
        let index = u32::try_from(self.own.len()).ok().filter(|&n| n < MAX_CHUNKS - 1);
        let index = index.ok_or(BuildError::Limit {
            what: "the number of distinct chunks",
            limit: u64::from(MAX_CHUNKS - 1),
            advice: "; a larger --chunk-size makes fewer",
        })?;
        let end = self.end + u64::from(len).next_multiple_of(BLOCK_SIZE);
        if end > MAX_UNCOMPRESSED_SIZE {
            return Err(BuildError::Limit {
                what: "the bytes of distinct chunks",
                limit: MAX_UNCOMPRESSED_SIZE,
                advice: "",
            });
        }
        // Readers take a CRC of 0 for damage, so it must not be announced.
        let flags = if crc32c == 0 { ChunkFlags::empty() } else { ChunkFlags::HAS_CRC32C };
        let record = ChunkRecord {
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
        };
        let device = self.slot(|slot| matches!(slot, Slot::Own), || Slot::Own)?;
        let addr = addr(device, &record);
        self.own.push(record);
        self.by_content.insert(content, addr);
        self.end = end;
        Ok((addr, true))
    }

    fn use_dictionary(&mut self, record: ChunkRecord) -> Result<ChunkAddr, BuildError> {
        let at = record.blob_index.get() as usize;
        let blob = self.dictionary.expect("the record is from there").blobs[at];
        // A parent may have been built with the same dictionary.
        let known = self.parent_blobs.iter().position(|other| other.blob_id == blob.blob_id);
        let is_it = |slot: &Slot| match slot {
            Slot::Dictionary(other) => *other == at,
            Slot::Parent(other) => Some(*other) == known,
            Slot::Own => false,
        };
        let device = self.slot(is_it, || Slot::Dictionary(at))?;
        let addr = addr(device, &record);
        let mut record = record;
        record.blob_index = U32::new(u32::from(device) - 1);
        self.others.push(record);
        Ok(addr)
    }

    /// The device number of a blob, which counts from 1.
    fn slot(
        &mut self,
        is_it: impl Fn(&Slot) -> bool,
        new: impl FnOnce() -> Slot,
    ) -> Result<u8, BuildError> {
        let at = match self.blobs.iter().position(is_it) {
            Some(at) => at,
            None => {
                self.blobs.push(new());
                self.blobs.len() - 1
            }
        };
        u8::try_from(at + 1).ok().filter(|_| at < MAX_BLOBS).ok_or_else(too_many_blobs)
    }

    /// Number and bytes of the chunks that are new.
    pub fn own(&self) -> (usize, u64) {
        let bytes = self.own.iter().map(|record| u64::from(record.uncompressed_size.get())).sum();
        (self.own.len(), bytes)
    }

    /// The records of the own blob in the order of their indexes; where they are stored is to be
    /// filled in.
    pub fn own_mut(&mut self) -> &mut Vec<ChunkRecord> {
        &mut self.own
    }

    /// The blobs and records, `own` being the entry of the own blob if it has chunks.
    pub fn finish(mut self, own: Option<BlobEntry>) -> BlobTable {
        let at = self.blobs.iter().position(|slot| matches!(slot, Slot::Own));
        if let Some(at) = at {
            let index = U32::new(u32::try_from(at).expect("at most 254"));
            self.own.iter_mut().for_each(|record| record.blob_index = index);
        }
        let blobs = self.blobs.into_iter().map(|slot| match slot {
            Slot::Parent(at) => self.parent_blobs[at],
            Slot::Dictionary(at) => self.dictionary.expect("it is in use").blobs[at],
            Slot::Own => own.expect("it has chunks"),
        });
        let blobs = blobs.collect();
        self.others.append(&mut self.own);
        BlobTable { blobs, records: self.others }
    }
}

pub(super) fn too_many_blobs() -> BuildError {
    BuildError::Limit { what: "the number of blobs", limit: MAX_BLOBS as u64, advice: "" }
}

/// The device number of the blob that a checked record is of.
fn device(record: &ChunkRecord) -> u8 {
    u8::try_from(record.blob_index.get() + 1).expect("an image has at most 254 blobs")
}

fn addr(device: u8, record: &ChunkRecord) -> ChunkAddr {
    let block = record.uncompressed_offset.get() / BLOCK_SIZE;
    let block = u32::try_from(block).expect("a blob has at most 2^32 blocks");
    ChunkAddr::new(device, record.index.get(), block)
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
            let (addr, is_new) = chunks.admit([digest; 32], len, 7, file_offset).unwrap();
            let got = (addr.chunk_index(), is_new);
            assert_eq!(got, (index, new), "chunk {digest} of {len} bytes");
        }
        assert_eq!(chunks.saved, 5);
        let places: Vec<_> = chunks
            .own_mut()
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
        assert_eq!(chunks.own_mut()[0].flags.get(), 0);
    }
}
