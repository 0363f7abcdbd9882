//! The two super blocks: what makes a file a RAFS v6 bootstrap that we read.
//!
//! Checking touches only the first block of the file. What passes has its tables inside the file,
//! disjoint from each other and from the super blocks, and none of the kinds we refuse.

use std::ops::Range;

use zerocopy::FromBytes;

use super::codec::{Compressor, Digester};
use super::error::{FormatError, Result};
use super::id::Nid;
use super::layout::{
    BLOCK_BITS, BLOCK_SIZE, BlobEntry, CHUNK_SIZE_RANGE, COMPAT_RAFS_V6, ChunkRecord,
    DEVICE_SLOT_OFFSET, DEVICE_TABLE_OFFSET, DeviceSlot, EROFS_MAGIC, EXT_SUPER_OFFSET,
    ExtSuperBlock, INCOMPAT_RAFS_V6, ImageFlags, MAX_BLOBS, RAFS_V5_MAGIC, SUPER_OFFSET,
    SuperBlock,
};

/// Largest bootstrap in bytes: 2 GiB, the limit of the reference implementation too.
pub(super) const MAX_BOOTSTRAP_SIZE: u64 = 1 << 31;

/// What the super blocks say, checked. Ranges are bytes from the start of the file and inside it;
/// an absent table is an empty range.
#[derive(Clone, Debug)]
pub(super) struct SuperInfo {
    pub root: Nid,
    pub meta_start: u64,
    pub path_count: u64,
    /// Seconds and nanoseconds: the time of inodes that store none.
    pub build_time: (i64, u32),
    pub flags: ImageFlags,
    pub chunk_size: u32,
    pub device_table: Range<u64>,
    pub blob_table: Range<u64>,
    pub chunk_table: Range<u64>,
    pub prefetch_table: Range<u64>,
}

const SUPER: &str = "super block";
const EXT: &str = "extended super block";

fn invalid_super(reason: impl Into<String>) -> FormatError {
    FormatError::invalid(SUPER, SUPER_OFFSET as u64, reason)
}

fn invalid_ext(reason: impl Into<String>) -> FormatError {
    FormatError::invalid(EXT, EXT_SUPER_OFFSET as u64, reason)
}

/// The structure `T` at byte `offset`, a constant of the format.
fn read<T>(bytes: &[u8], what: &'static str, offset: usize) -> Result<T>
where
    T: FromBytes,
{
    let rest = bytes.get(offset..).unwrap_or_default();
    T::read_from_prefix(rest).map(|(value, _)| value).map_err(|_| FormatError::Truncated {
        what,
        offset: offset as u64,
        len: size_of::<T>() as u64,
        size: bytes.len() as u64,
    })
}

/// Both super blocks as they stand in the file; for printing.
pub(super) fn raw(bytes: &[u8]) -> Result<(SuperBlock, ExtSuperBlock)> {
    Ok((read(bytes, SUPER, SUPER_OFFSET)?, read(bytes, EXT, EXT_SUPER_OFFSET)?))
}

/// Checks the super blocks of the bootstrap `bytes`.
pub(super) fn check(bytes: &[u8]) -> Result<SuperInfo> {
    if bytes.get(..4) == Some(&RAFS_V5_MAGIC.to_le_bytes()) {
        return Err(FormatError::Unsupported { feature: "RAFS v5" });
    }
    let sb: SuperBlock = read(bytes, SUPER, SUPER_OFFSET)?;
    if sb.magic.get() != EROFS_MAGIC {
        return Err(invalid_super(format!(
            "magic is {:#010x}, not {EROFS_MAGIC:#010x}: this is no RAFS bootstrap",
            sb.magic
        )));
    }
    if sb.feature_compat.get() & COMPAT_RAFS_V6 == 0 {
        return Err(invalid_super("this is EROFS but not RAFS v6"));
    }
    let ext: ExtSuperBlock = read(bytes, EXT, EXT_SUPER_OFFSET)?;
    let flags = ImageFlags::from_bits(ext.flags.get()).ok_or_else(|| {
        let unknown = ext.flags.get() & !ImageFlags::all().bits();
        invalid_ext(format!("unknown flags {unknown:#x}"))
    })?;
    if flags.contains(ImageFlags::TARFS) || sb.block_bits == 9 {
        return Err(FormatError::Unsupported { feature: "tarfs" });
    }
    let len = bytes.len() as u64;
    if len < BLOCK_SIZE || !len.is_multiple_of(BLOCK_SIZE) || len > MAX_BOOTSTRAP_SIZE {
        return Err(FormatError::invalid(
            "bootstrap",
            0,
            format!("length {len} is not a multiple of {BLOCK_SIZE} up to 2 GiB"),
        ));
    }
    check_super(&sb, len)?;
    check_ext(&ext, flags)?;

    let devices = u64::from(sb.extra_devices.get());
    let head = 0..DEVICE_TABLE_OFFSET as u64 + devices * size_of::<DeviceSlot>() as u64;
    let info = SuperInfo {
        root: Nid(sb.root_nid.get().into()),
        meta_start: u64::from(sb.meta_block.get()) << BLOCK_BITS,
        path_count: sb.inode_count.get(),
        build_time: (sb.build_time.get().cast_signed(), sb.build_time_nsec.get()),
        flags,
        chunk_size: ext.chunk_size.get(),
        device_table: DEVICE_TABLE_OFFSET as u64..head.end,
        blob_table: table::<BlobEntry>(
            "blob table",
            ext.blob_table_offset.get(),
            ext.blob_table_size.get().into(),
            BLOCK_SIZE,
            len,
        )?,
        chunk_table: table::<ChunkRecord>(
            "chunk table",
            ext.chunk_table_offset.get(),
            ext.chunk_table_size.get(),
            BLOCK_SIZE,
            len,
        )?,
        // Old images give a size where there is no table; the offset decides.
        prefetch_table: match ext.prefetch_table_offset.get() {
            0 => 0..0,
            offset => table::<u32>(
                "prefetch table",
                offset,
                ext.prefetch_table_size.get().into(),
                8,
                len,
            )?,
        },
    };
    disjoint([
        (SUPER, &head),
        ("blob table", &info.blob_table),
        ("chunk table", &info.chunk_table),
        ("prefetch table", &info.prefetch_table),
    ])?;
    let entries = (info.blob_table.end - info.blob_table.start) / size_of::<BlobEntry>() as u64;
    if entries != devices {
        return Err(invalid_ext(format!("{entries} blobs, but {devices} device slots")));
    }
    Ok(info)
}

fn check_super(sb: &SuperBlock, len: u64) -> Result<()> {
    let devices = sb.extra_devices.get();
    let rules = [
        (sb.checksum.get() == 0, "checksum is not zero"),
        (sb.block_bits == BLOCK_BITS, "block size is neither 4096 nor 512"),
        (sb.ext_slots == 0, "extension slots are in use"),
        (sb.inode_count.get() != 0, "no inodes"),
        (sb.xattr_block.get() == 0, "shared xattrs are in use"),
        (
            sb.feature_incompat.get() == INCOMPAT_RAFS_V6,
            "incompatible features are not those of RAFS v6",
        ),
        (sb.compression.get() == 0, "compression algorithms are in use"),
        (
            sb.device_slot_offset.get() == DEVICE_SLOT_OFFSET,
            "device table is not behind the super blocks",
        ),
        (usize::from(devices) <= MAX_BLOBS, "more than 254 devices"),
        (devices != 0 || matches!(sb.blocks.get(), 0 | 4096), "blocks without devices"),
        (
            u64::from(sb.meta_block.get()) << BLOCK_BITS < len,
            "metadata area starts behind the end of the file",
        ),
        (sb.build_time_nsec.get() < 1_000_000_000, "nanoseconds of the build time exceed a second"),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        Some((_, reason)) => Err(invalid_super(reason)),
        None => Ok(()),
    }
}

fn check_ext(ext: &ExtSuperBlock, flags: ImageFlags) -> Result<()> {
    let count = |names: &[ImageFlags]| names.iter().filter(|&&f| flags.contains(f)).count();
    let compressors = [Compressor::None, Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd]
        .map(Compressor::image_flag);
    if count(&compressors) != 1 {
        return Err(invalid_ext("flags name not exactly one compressor"));
    }
    if count(&[Digester::Blake3, Digester::Sha256].map(Digester::image_flag)) != 1 {
        return Err(invalid_ext("flags name not exactly one digester"));
    }
    let chunk_size = ext.chunk_size.get();
    if !chunk_size.is_power_of_two() || !CHUNK_SIZE_RANGE.contains(&chunk_size) {
        return Err(invalid_ext(format!("chunk size {chunk_size}")));
    }
    Ok(())
}

/// The bytes of a table of `T`; of an empty one the offset means nothing.
fn table<T>(
    what: &'static str,
    offset: u64,
    size: u64,
    align: u64,
    len: u64,
) -> Result<Range<u64>> {
    if size == 0 {
        return Ok(0..0);
    }
    let entry = size_of::<T>() as u64;
    if !size.is_multiple_of(entry) {
        let reason = format!("size {size} is not a multiple of {entry}");
        return Err(FormatError::invalid(what, offset, reason));
    }
    if !offset.is_multiple_of(align) || offset < BLOCK_SIZE {
        let reason = format!("offset is not a multiple of {align} from {BLOCK_SIZE} on");
        return Err(FormatError::invalid(what, offset, reason));
    }
    match offset.checked_add(size) {
        Some(end) if end <= len => Ok(offset..end),
        _ => Err(FormatError::Truncated { what, offset, len: size, size: len }),
    }
}

fn disjoint(tables: [(&'static str, &Range<u64>); 4]) -> Result<()> {
    for (i, (what, a)) in tables.iter().enumerate() {
        for (other, b) in &tables[..i] {
            if !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end {
                return Err(FormatError::invalid(what, a.start, format!("overlaps the {other}")));
            }
        }
    }
    Ok(())
}
