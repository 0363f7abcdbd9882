//! The context table of a blob: where each chunk is, stored and uncompressed.
//!
//! The table is checked whole, once, in [`ChunkInfos::parse`]; it stays in memory as it was stored
//! (16 or 24 bytes per chunk) and an entry is decoded when asked for. What holds afterwards:
//!
//! - every chunk lies inside the uncompressed blob, no larger than the image's chunk size, and the
//!   chunks tile it: the next begins where the one before ends, rounded up to a block;
//! - stored bytes lie before the end of the chunk data, in the order of the chunks, and overlap
//!   only inside a batch; a batch has consecutive members and uncompresses to at most 16 MiB.

use std::ops::Range;

use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::blob_table::BlobInfo;
use super::error::{FormatError, Result};
use super::id::ChunkIndex;
use super::layout::{
    BLOCK_SIZE, BatchContext, BlobFeatures, CI_MAGIC, ChunkRecord, CiHeader, CiV1, CiV2, MAX_CHUNKS,
};

/// Most bytes a batch may hold after decompression.
pub const MAX_BATCH_SIZE: u32 = 16 << 20;

const V1_SIZE: usize = size_of::<CiV1>();
const V2_SIZE: usize = size_of::<CiV2>();
const CONTEXT_SIZE: usize = size_of::<BatchContext>();

/// Features that decide how the table is read: header and blob table must agree on them.
const LAYOUT_FEATURES: BlobFeatures = BlobFeatures::CHUNK_INFO_V2
    .union(BlobFeatures::ZRAN)
    .union(BlobFeatures::BATCH)
    .union(BlobFeatures::ENCRYPTED);

/// How the stored bytes of a chunk become the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkForm {
    /// Stored as it is.
    Plain,
    /// Compressed on its own, by the blob's compressor.
    Compressed,
    /// Part of batch `index`, `offset` bytes into the uncompressed batch.
    Batch { index: u32, offset: u32 },
}

/// One chunk of a blob. Offsets and sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Place in the uncompressed blob (the cache file), a multiple of 4096.
    pub uncompressed_offset: u64,
    /// 1 to the image's chunk size.
    pub uncompressed_size: u32,
    /// Place in the blob file; of the whole batch for a member of one.
    pub compressed_offset: u64,
    /// Stored size; of the whole batch for a member of one. At most 16 MiB.
    pub compressed_size: u32,
    pub form: ChunkForm,
    /// CRC-32C of the uncompressed chunk, if the entry has one.
    pub crc32c: Option<u32>,
}

impl ChunkInfo {
    /// End of the stored bytes in the blob file.
    pub fn compressed_end(&self) -> u64 {
        self.compressed_offset + u64::from(self.compressed_size)
    }

    /// End of the chunk in the uncompressed blob, padding not included.
    pub fn uncompressed_end(&self) -> u64 {
        self.uncompressed_offset + u64::from(self.uncompressed_size)
    }
}

/// The context table of one blob, checked.
pub struct ChunkInfos {
    table: Vec<u8>,
    count: u32,
    v2: bool,
    /// Where the batch contexts start in `table`, and how many there are.
    contexts: usize,
    batches: u32,
}

impl ChunkInfos {
    /// Checks the decompressed `table` and its header against the blob's entry in the blob table.
    ///
    /// The caller compares no field of `header`; it only must not have decompressed more than
    /// `blob.ci_uncompressed_size` bytes.
    pub fn parse(blob: &BlobInfo, table: Vec<u8>, header: &CiHeader) -> Result<Self> {
        let count = check_header(blob, table.len(), header)?;
        let v2 = blob.features.contains(BlobFeatures::CHUNK_INFO_V2);
        let entry = if v2 { V2_SIZE } else { V1_SIZE };
        let contexts = usize::try_from(count)
            .ok()
            .and_then(|n| n.checked_mul(entry))
            .filter(|&end| end <= table.len())
            .ok_or_else(|| bad(0, format!("{} bytes hold no {count} entries", table.len())))?;
        let exempt = blob.features.contains(BlobFeatures::CHUNKDICT_GENERATED);
        let batch = v2 && blob.features.contains(BlobFeatures::BATCH);
        let batches = if batch { header.context_count.get() } else { 0 };
        let contexts_len = (table.len() - contexts) as u64;
        if batches > 0 {
            let want = u64::from(batches) * CONTEXT_SIZE as u64;
            if header.context_offset.get() != contexts as u64
                || header.context_size.get() != want
                || contexts_len != want
            {
                return Err(bad(
                    contexts as u64,
                    format!("{batches} batch contexts in {contexts_len} bytes"),
                ));
            }
        } else if contexts_len != 0 && !exempt {
            return Err(bad(contexts as u64, format!("{contexts_len} bytes behind the entries")));
        }
        let infos = ChunkInfos { table, count, v2, contexts, batches };
        infos.check_entries(blob)?;
        Ok(infos)
    }

    /// Checks the entries, of version 1, that the chunk table of the bootstrap stands for
    /// ([`ChunkDigests::entries`](super::chunk_table::ChunkDigests::entries)).
    pub fn of_entries(blob: &BlobInfo, entries: Vec<u8>) -> Result<Self> {
        let (count, contexts) = (blob.chunk_count, entries.len());
        if usize::try_from(count).ok().and_then(|n| n.checked_mul(V1_SIZE)) != Some(contexts) {
            return Err(bad(0, format!("{contexts} bytes for {count} entries")));
        }
        let infos = ChunkInfos { table: entries, count, v2: false, contexts, batches: 0 };
        infos.check_entries(blob)?;
        Ok(infos)
    }

    /// Number of chunks.
    pub fn len(&self) -> u32 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The decompressed context table, as parsed.
    pub fn as_bytes(&self) -> &[u8] {
        &self.table
    }

    /// `None` behind the last chunk.
    pub fn get(&self, index: ChunkIndex) -> Option<ChunkInfo> {
        self.raw(index.0).map(|(info, _)| info)
    }

    /// Batch context number `n`.
    pub fn batch(&self, n: u32) -> Option<BatchContext> {
        if n >= self.batches {
            return None;
        }
        let at = self.contexts + usize::try_from(n).ok()? * CONTEXT_SIZE;
        BatchContext::read_from_prefix(self.table.get(at..)?).ok().map(|(context, _)| context)
    }

    /// The chunks that come out of one decompression with chunk `index`: itself, or all members of
    /// its batch. `None` behind the last chunk.
    pub fn unit(&self, index: ChunkIndex) -> Option<Range<u32>> {
        let info = self.get(index)?;
        let ChunkForm::Batch { .. } = info.form else { return Some(index.0..index.0 + 1) };
        // Stored offsets never decrease and only members of a batch share one.
        let start = self.partition_point(|other| other < info.compressed_offset);
        let end = self.partition_point(|other| other <= info.compressed_offset);
        Some(start..end)
    }

    /// First chunk whose stored offset does not satisfy `before`.
    fn partition_point(&self, before: impl Fn(u64) -> bool) -> u32 {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.get(ChunkIndex(middle)) {
                Some(info) if before(info.compressed_offset) => low = middle + 1,
                _ => high = middle,
            }
        }
        low
    }

    /// Entry `index` and its flags; version 1 has none.
    fn raw(&self, index: u32) -> Option<(ChunkInfo, u8)> {
        if index >= self.count {
            return None;
        }
        let index = usize::try_from(index).ok()?;
        if !self.v2 {
            let (entry, _) = CiV1::read_from_prefix(self.table.get(index * V1_SIZE..)?).ok()?;
            return Some((v1(entry), 0));
        }
        let (entry, _) = CiV2::read_from_prefix(self.table.get(index * V2_SIZE..)?).ok()?;
        let (mut info, flags) = v2(entry);
        if let ChunkForm::Batch { index, .. } = info.form {
            info.compressed_size = self.batch(index)?.compressed_size.get();
        }
        Some((info, flags))
    }

    /// All rules about entries; the struct documentation of this file sums them up.
    fn check_entries(&self, blob: &BlobInfo) -> Result<()> {
        let end = blob
            .uncompressed_size
            .checked_next_multiple_of(BLOCK_SIZE)
            .ok_or_else(|| bad(0, "the uncompressed size overflows".into()))?;
        let mut next_uncompressed = None;
        let mut stored_end = 0;
        let mut open_batch = None;
        for i in 0..self.count {
            let at = u64::from(i) * if self.v2 { V2_SIZE } else { V1_SIZE } as u64;
            let fail = |reason: String| Err(bad(at, format!("chunk {i}: {reason}")));
            let Some((info, flags)) = self.raw(i) else {
                return fail("its batch does not exist".into());
            };
            if flags & !flag::KNOWN != 0 {
                return fail(format!("unknown flags {flags:#x}"));
            }
            if flags & flag::ZRAN != 0 || flags & flag::ENCRYPTED != 0 {
                return fail(format!("flags {flags:#x} in a blob without that feature"));
            }
            if info.uncompressed_size > blob.chunk_size {
                return fail(format!("{} bytes are more than a chunk", info.uncompressed_size));
            }
            if info.uncompressed_end() > end {
                return fail(format!("ends at {}, the blob at {end}", info.uncompressed_end()));
            }
            if next_uncompressed.is_some_and(|next| next != info.uncompressed_offset) {
                return fail(format!(
                    "begins at {}, not behind its predecessor",
                    info.uncompressed_offset
                ));
            }
            next_uncompressed = Some(info.uncompressed_end().next_multiple_of(BLOCK_SIZE));

            if info.compressed_size == 0 {
                return fail("no stored bytes".into());
            }
            if info.compressed_end() > blob.data_end {
                return fail(format!(
                    "stored bytes end at {}, the chunk data at {}",
                    info.compressed_end(),
                    blob.data_end
                ));
            }
            match info.form {
                ChunkForm::Plain if info.compressed_size != info.uncompressed_size => {
                    return fail("stored plain, in another size".into());
                }
                ChunkForm::Batch { index, offset } => {
                    self.check_member(index, offset, &info).or_else(fail)?;
                    if open_batch == Some((index, info.compressed_offset)) {
                        continue; // a further member: the stored range is already accounted for
                    }
                    open_batch = Some((index, info.compressed_offset));
                }
                _ => open_batch = None,
            }
            if info.compressed_offset < stored_end {
                return fail(format!(
                    "stored at {}, before the end of its predecessor",
                    info.compressed_offset
                ));
            }
            stored_end = info.compressed_end();
        }
        Ok(())
    }

    fn check_member(
        &self,
        index: u32,
        offset: u32,
        info: &ChunkInfo,
    ) -> std::result::Result<(), String> {
        let context = self.batch(index).ok_or("its batch does not exist")?;
        let size = context.uncompressed_size.get();
        if size > MAX_BATCH_SIZE {
            return Err(format!("batch {index} has {size} bytes"));
        }
        if context.compressed_size.get() > size {
            return Err(format!("batch {index} is stored in more bytes than it has"));
        }
        if offset.checked_add(info.uncompressed_size).is_none_or(|end| end > size) {
            return Err(format!("lies behind the end of batch {index}"));
        }
        Ok(())
    }
}

impl std::fmt::Debug for ChunkInfos {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkInfos")
            .field("count", &self.count)
            .field("v2", &self.v2)
            .field("batches", &self.batches)
            .finish_non_exhaustive()
    }
}

/// Checks everything the header and the blob table both say; returns the number of entries.
fn check_header(blob: &BlobInfo, table_len: usize, header: &CiHeader) -> Result<u32> {
    for (feature, name) in [
        (BlobFeatures::ZRAN, "zran"),
        (BlobFeatures::ENCRYPTED, "encrypted"),
        (BlobFeatures::TARFS, "tarfs"),
        (BlobFeatures::SEPARATE, "separate chunk-info array"),
    ] {
        if blob.features.contains(feature) {
            return Err(FormatError::Unsupported { feature: name });
        }
    }
    let at = blob.ci_offset.saturating_add(blob.ci_compressed_size);
    let fail = |reason: String| {
        Err(FormatError::Invalid { what: "chunk-info header", offset: at, reason })
    };
    if header.magic.get() != CI_MAGIC || header.magic2.get() != CI_MAGIC {
        return fail(format!("magic {:#x}, {:#x}", header.magic.get(), header.magic2.get()));
    }
    let features = BlobFeatures::from_bits_retain(header.features.get());
    if (features ^ blob.features).intersects(LAYOUT_FEATURES) {
        return fail(format!("features {features:?}, the blob table says {:?}", blob.features));
    }
    if blob.features.contains(BlobFeatures::BATCH)
        && !blob.features.contains(BlobFeatures::CHUNK_INFO_V2)
    {
        return fail("batches need entries of version 2".into());
    }
    let pairs = [
        ("compressor", u64::from(header.compressor.get()), blob.ci_compressor as u64),
        ("offset", header.offset.get(), blob.ci_offset),
        ("stored size", header.compressed_size.get(), blob.ci_compressed_size),
        ("size", header.uncompressed_size.get(), blob.ci_uncompressed_size),
        ("size", header.uncompressed_size.get(), table_len as u64),
    ];
    for (what, got, want) in pairs {
        if got != want {
            return fail(format!("{what} {got}, not {want}"));
        }
    }
    let count = header.entries.get();
    let exempt = blob.features.contains(BlobFeatures::CHUNKDICT_GENERATED);
    if count > MAX_CHUNKS || (count != blob.chunk_count && !exempt) {
        return fail(format!("{count} entries, the blob table says {}", blob.chunk_count));
    }
    Ok(count)
}

/// Flags of a version 2 entry.
mod flag {
    pub const COMPRESSED: u8 = 0x1;
    pub const ZRAN: u8 = 0x2;
    pub const BATCH: u8 = 0x4;
    pub const ENCRYPTED: u8 = 0x8;
    pub const HAS_CRC32C: u8 = 0x10;
    pub const KNOWN: u8 = COMPRESSED | ZRAN | BATCH | ENCRYPTED | HAS_CRC32C;
}

/// The 24 bits of `size - 1` in a version 1 word: bits 44..64 are the low, `high` the high ones.
fn v1_size(word: u64, high: u64) -> u32 {
    let less_one = (word >> 44) | (high & 0xF) << 20;
    u32::try_from(less_one).expect("24 bits") + 1
}

/// The entry, version 1, of a chunk that is stored as `record` says; the reverse of [`v1`]. Sizes are not 0
/// and have at most 24 bits, offsets 40 and 44.
///
/// First word: bits 8..12 and 44..64 are bits 20..24 and 0..20 of the uncompressed size less one,
/// bits 12..44 those of the uncompressed offset. Second word: bits 0..40 are the compressed offset,
/// bits 40..44 and 44..64 the compressed size less one.
pub fn v1_entry(record: &ChunkRecord) -> CiV1 {
    let uncompressed_size = u64::from(record.uncompressed_size.get() - 1);
    let compressed_size = u64::from(record.compressed_size.get() - 1);
    CiV1 {
        uncompressed: U64::new(
            record.uncompressed_offset.get()
                | (uncompressed_size >> 20) << 8
                | (uncompressed_size & 0xF_FFFF) << 44,
        ),
        compressed: U64::new(
            record.compressed_offset.get()
                | (compressed_size >> 20) << 40
                | (compressed_size & 0xF_FFFF) << 44,
        ),
    }
}

fn v1(entry: CiV1) -> ChunkInfo {
    let (uncompressed, compressed) = (entry.uncompressed.get(), entry.compressed.get());
    let uncompressed_size = v1_size(uncompressed, uncompressed >> 8);
    let compressed_size = v1_size(compressed, compressed >> 40);
    ChunkInfo {
        uncompressed_offset: uncompressed & 0xFFF_FFFF_F000,
        uncompressed_size,
        compressed_offset: compressed & 0xFF_FFFF_FFFF,
        compressed_size,
        form: if compressed_size == uncompressed_size {
            ChunkForm::Plain
        } else {
            ChunkForm::Compressed
        },
        crc32c: None,
    }
}

/// The entry and its flags; of a batch member `compressed_size` is still to be looked up.
fn v2(entry: CiV2) -> (ChunkInfo, u8) {
    let low = |word: u64| u32::try_from(word & 0xFFFF_FFFF).expect("32 bits");
    let size = |word: u64| u32::try_from(word & 0xFF_FFFF).expect("24 bits");
    let (uncompressed, compressed) = (entry.uncompressed.get(), entry.compressed.get());
    let data = entry.data.get();
    let [.., flags] = uncompressed.to_le_bytes();
    let form = if flags & flag::BATCH != 0 {
        ChunkForm::Batch { index: low(data >> 32), offset: low(data) }
    } else if flags & flag::COMPRESSED != 0 {
        ChunkForm::Compressed
    } else {
        ChunkForm::Plain
    };
    let has_crc = flags & flag::HAS_CRC32C != 0 && flags & (flag::BATCH | flag::ZRAN) == 0;
    let info = ChunkInfo {
        uncompressed_offset: u64::from(low(uncompressed)) * BLOCK_SIZE,
        uncompressed_size: size(uncompressed >> 32) + 1,
        compressed_offset: compressed & 0xFF_FFFF_FFFF,
        compressed_size: size(compressed >> 40),
        form,
        crc32c: has_crc.then(|| low(data)),
    };
    (info, flags)
}

fn bad(offset: u64, reason: String) -> FormatError {
    FormatError::Invalid { what: "context table", offset, reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::little_endian::U32;
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;
    use crate::rafs::codec::{Compressor, Digester};
    use crate::rafs::id::{BlobId, BlobIndex};

    /// The whole array of the `v6-none` golden image (`docs/rafs.md`, worked example).
    const V1: &str = "\
        00000000004000000000000000400000 0010000000f0ff000500000000f0ff00\
        0020000000f0ff000510000000f0ff00 00300000007032000520000000703200\
        0040000000f0ff002d23000000f0ff00 00500000000000002d33000000000000\
        0060000000f0ff002e33000000f0ff00 00700000007038002e43000000703800\
        0080000000800000b646000000800000";

    /// The first entries of the `v6-batch` golden image, and their context.
    const V2: &str = "\
        00000000ff0f0005 0000000000000000 0000000000000000\
        0100000000100005 0000000000000000 0010000000000000\
        0300000087130005 0000000000000000 0120000000000000\
        050000000d000005 0000000000000000 8933000000000000\
        06000000d1840011 3f230000006c2200 0d7349de00000000\
        3f23000097330000 \
        0000000000000000000000000000000000000000000000000000000000000000";

    fn bytes(hex_digits: &str) -> Vec<u8> {
        hex::decode(hex_digits.replace(' ', "")).unwrap()
    }

    fn blob(features: BlobFeatures, count: u32, table: &[u8]) -> BlobInfo {
        BlobInfo {
            id: BlobId::UNKNOWN,
            index: BlobIndex(0),
            chunk_count: count,
            chunk_size: 0x10000,
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            features,
            data_end: 0x46bf,
            uncompressed_size: 0xF000,
            ci_compressor: Compressor::None,
            ci_offset: 0x46bf,
            ci_compressed_size: table.len() as u64,
            ci_uncompressed_size: table.len() as u64,
        }
    }

    fn header(blob: &BlobInfo, batches: u32) -> CiHeader {
        let mut header = CiHeader::new_zeroed();
        header.magic = U32::new(CI_MAGIC);
        header.magic2 = U32::new(CI_MAGIC);
        header.features = U32::new(blob.features.bits());
        header.compressor = U32::new(blob.ci_compressor as u32);
        header.entries = U32::new(blob.chunk_count);
        header.offset = U64::new(blob.ci_offset);
        header.compressed_size = U64::new(blob.ci_compressed_size);
        header.uncompressed_size = U64::new(blob.ci_uncompressed_size);
        if batches > 0 {
            header.context_count = U32::new(batches);
            header.context_offset = U64::new(u64::from(blob.chunk_count) * 24);
            header.context_size = U64::new(u64::from(batches) * 40);
        }
        header
    }

    fn v1_case() -> (BlobInfo, Vec<u8>, CiHeader) {
        let table = bytes(V1);
        let blob = blob(BlobFeatures::ALIGNED, 9, &table);
        let header = header(&blob, 0);
        (blob, table, header)
    }

    fn v2_case() -> (BlobInfo, Vec<u8>, CiHeader) {
        let table = bytes(V2);
        let features = BlobFeatures::ALIGNED | BlobFeatures::CHUNK_INFO_V2 | BlobFeatures::BATCH;
        let blob = blob(features, 5, &table);
        let header = header(&blob, 1);
        (blob, table, header)
    }

    #[test]
    fn version_1_entries_of_the_worked_example() {
        let (blob, table, header) = v1_case();
        let infos = ChunkInfos::parse(&blob, table, &header).unwrap();
        assert_eq!(infos.len(), 9);
        // (uncompressed offset, size, stored offset)
        let want = [(0, 5, 0), (0x1000, 4096, 5), (0x2000, 4096, 0x1005), (0x3000, 808, 0x2005)];
        for (i, (uncompressed_offset, uncompressed_size, compressed_offset)) in (0..).zip(want) {
            let want = ChunkInfo {
                uncompressed_offset,
                uncompressed_size,
                compressed_offset,
                compressed_size: uncompressed_size,
                form: ChunkForm::Plain,
                crc32c: None,
            };
            assert_eq!(infos.get(ChunkIndex(i)), Some(want), "chunk {i}");
            assert_eq!(infos.unit(ChunkIndex(i)), Some(i..i + 1));
        }
        assert_eq!(infos.get(ChunkIndex(9)), None);
    }

    #[test]
    fn chunk_info_entries_are_those_of_the_worked_example_and_use_the_high_nibbles() {
        // (uncompressed offset, size, compressed offset, size, bytes)
        let cases: [(u64, u32, u64, u32, &str); 3] = [
            (0, 5, 0, 5, "00000000004000000000000000400000"),
            (0x3000, 808, 0x2005, 808, "00300000007032000520000000703200"),
            // 16 MiB and 4 MiB - 1: bits above the twentieth.
            (
                0xFF0_1234_5000,
                1 << 24,
                0xAB_CDEF_0123,
                0x3F_FFFF,
                "005f3412f0ffffff2301efcdabe3ffff",
            ),
        ];
        for (uncompressed_offset, uncompressed_size, compressed_offset, compressed_size, bytes) in
            cases
        {
            let mut record = ChunkRecord::new_zeroed();
            record.uncompressed_offset = U64::new(uncompressed_offset);
            record.uncompressed_size = U32::new(uncompressed_size);
            record.compressed_offset = U64::new(compressed_offset);
            record.compressed_size = U32::new(compressed_size);
            assert_eq!(hex::encode(v1_entry(&record).as_bytes()), bytes);
        }
    }

    #[test]
    fn high_bits_of_version_1_sizes() {
        let entry = CiV1 {
            uncompressed: U64::new(0xFFFF_F001_2345_6300),
            compressed: U64::new(0xFFFF_E2AB_CDEF_0123),
        };
        let info = v1(entry);
        assert_eq!(info.uncompressed_offset, 0x1_2345_6000);
        assert_eq!(info.uncompressed_size, 0x40_0000);
        assert_eq!(info.compressed_offset, 0xAB_CDEF_0123);
        assert_eq!(info.compressed_size, 0x2F_FFFF);
        assert_eq!(info.form, ChunkForm::Compressed);
    }

    #[test]
    fn version_2_entries_and_the_members_of_a_batch() {
        let (blob, table, header) = v2_case();
        let infos = ChunkInfos::parse(&blob, table, &header).unwrap();
        let member = infos.get(ChunkIndex(2)).unwrap();
        assert_eq!((member.uncompressed_offset, member.uncompressed_size), (0x3000, 5000));
        assert_eq!((member.compressed_offset, member.compressed_size), (0, 0x233f));
        assert_eq!(member.form, ChunkForm::Batch { index: 0, offset: 0x2001 });
        let single = infos.get(ChunkIndex(4)).unwrap();
        assert_eq!((single.uncompressed_offset, single.uncompressed_size), (0x6000, 34002));
        assert_eq!((single.compressed_offset, single.compressed_size), (0x233f, 0x226c));
        assert_eq!((single.form, single.crc32c), (ChunkForm::Compressed, Some(0xde49_730d)));
        for i in 0..4 {
            assert_eq!(infos.unit(ChunkIndex(i)), Some(0..4), "chunk {i}");
        }
        assert_eq!(infos.unit(ChunkIndex(4)), Some(4..5));
        assert_eq!(infos.unit(ChunkIndex(5)), None);
        assert_eq!(infos.batch(0).unwrap().uncompressed_size.get(), 0x3397);
        assert!(infos.batch(1).is_none());
    }

    #[test]
    fn what_the_header_says_must_be_what_the_blob_table_says() {
        type Change = fn(&mut CiHeader);
        let changes: [(&str, Change); 9] = [
            ("magic", |h| h.magic = U32::new(1)),
            ("magic2", |h| h.magic2 = U32::new(1)),
            ("layout feature", |h| h.features = U32::new(0x1)),
            ("entries", |h| h.entries = U32::new(4)),
            ("compressor", |h| h.compressor = U32::new(3)),
            ("offset", |h| h.offset = U64::new(0)),
            ("stored size", |h| h.compressed_size = U64::new(1)),
            ("size", |h| h.uncompressed_size = U64::new(1)),
            ("contexts", |h| h.context_count = U32::new(2)),
        ];
        for (what, change) in changes {
            let (blob, table, mut header) = v2_case();
            change(&mut header);
            assert!(ChunkInfos::parse(&blob, table, &header).is_err(), "{what}");
        }
        let (blob, table, mut header) = v2_case();
        header.features = U32::new(blob.features.bits() | BlobFeatures::INLINED_FS_META.bits());
        ChunkInfos::parse(&blob, table, &header).expect("merging clears a bit in the blob table");
    }

    #[test]
    fn entries_that_break_a_rule() {
        // (rule, byte of the table, value put there)
        let v1_cases = [
            ("a gap between chunks", 16 + 1, 0x20),
            ("going backwards", 32 + 1, 0x10),
            ("stored bytes overlap", 16 + 8, 0x04),
            ("stored bytes behind the chunk data", 8 * 16 + 8, 0xb7),
        ];
        for (rule, at, value) in v1_cases {
            let (blob, mut table, header) = v1_case();
            assert_ne!(table[at], value);
            table[at] = value;
            assert!(ChunkInfos::parse(&blob, table, &header).is_err(), "{rule}");
        }
        let v2_cases = [
            ("unknown flag", 4 * 24 + 7, 0x31),
            ("zran in a blob without", 4 * 24 + 7, 0x13),
            ("encrypted in a blob without", 4 * 24 + 7, 0x19),
            ("plain in another size", 4 * 24 + 7, 0x10),
            ("no stored bytes", 4 * 24 + 13, 0x00),
            ("batch that does not exist", 24 + 20, 0x01),
            ("member behind the end of its batch", 24 + 17, 0x30),
            ("batch stored in more than it has", 5 * 24 + 1, 0x34),
            ("batch of more than 16 MiB", 5 * 24 + 7, 0x01),
        ];
        for (rule, at, value) in v2_cases {
            let (blob, mut table, header) = v2_case();
            assert_ne!(table[at], value, "{rule}");
            table[at] = value;
            if rule == "no stored bytes" {
                table[4 * 24 + 14] = 0;
            }
            assert!(ChunkInfos::parse(&blob, table, &header).is_err(), "{rule}");
        }
        let (mut small, table, header) = v2_case();
        small.chunk_size = 0x8000;
        assert!(ChunkInfos::parse(&small, table, &header).is_err(), "larger than a chunk");
        let (mut short, table, header) = v2_case();
        short.uncompressed_size = 0xE000;
        assert!(ChunkInfos::parse(&short, table, &header).is_err(), "behind the blob's end");
    }

    #[test]
    fn blobs_this_program_does_not_read_are_named() {
        for feature in [BlobFeatures::ZRAN, BlobFeatures::ENCRYPTED, BlobFeatures::TARFS] {
            let (mut blob, table, header) = v2_case();
            blob.features |= feature;
            let error = ChunkInfos::parse(&blob, table, &header).unwrap_err();
            assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_table_is_checked_or_refused(
            v2 in any::<bool>(),
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let (blob, mut table, header) = if v2 { v2_case() } else { v1_case() };
            for (at, value) in flips {
                let at = at.index(table.len());
                table[at] = value;
            }
            if let Ok(infos) = ChunkInfos::parse(&blob, table, &header) {
                for i in 0..infos.len() {
                    let info = infos.get(ChunkIndex(i)).unwrap();
                    prop_assert!(info.compressed_end() <= blob.data_end);
                    prop_assert!(info.uncompressed_end() <= blob.uncompressed_size);
                    let unit = infos.unit(ChunkIndex(i)).unwrap();
                    prop_assert!(unit.contains(&i));
                }
            }
        }
    }
}
