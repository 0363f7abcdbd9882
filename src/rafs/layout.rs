//! RAFS v6 on disk: one type per structure, nothing but layout.
//!
//! All integers are little-endian. Every struct is unaligned, so it may be read at any offset of a
//! mapped bootstrap; reading one costs a bounds check and no copy. Rules about the values live with
//! their readers (`superblock`, `inode`, `dir`, ...), not here.
//!
//! Sources: `docs/rafs.md`; Linux `fs/erofs/erofs_fs.h` for what EROFS defines.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::id::BlobIndex;

/// Byte offset of the EROFS super block.
pub const SUPER_OFFSET: usize = 1024;
/// Byte offset of the RAFS extended super block.
pub const EXT_SUPER_OFFSET: usize = SUPER_OFFSET + size_of::<SuperBlock>();
/// Byte offset of the first device slot.
pub const DEVICE_TABLE_OFFSET: usize = EXT_SUPER_OFFSET + size_of::<ExtSuperBlock>();
/// `SuperBlock::magic`.
pub const EROFS_MAGIC: u32 = 0xE0F5_E1E2;
/// `SuperBlock::feature_compat` bit that marks RAFS v6.
pub const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// `SuperBlock::feature_incompat` of every RAFS v6 image: chunked files and a device table.
pub const INCOMPAT_RAFS_V6: u32 = 0x0000_000C;
/// `SuperBlock::devt_slotoff` in units of 128 bytes.
pub const DEVICE_SLOT_OFFSET: u16 = 11;
/// log2 of the block size of every image but tarfs ones.
pub const BLOCK_BITS: u8 = 12;
/// Block size in bytes of every image but tarfs ones.
pub const BLOCK_SIZE: u64 = 1 << BLOCK_BITS;
/// Size in bytes of an inode slot: nids count these.
pub const SLOT_SIZE: u64 = 32;
/// Magic of RAFS v5, at file offset 0.
pub const RAFS_V5_MAGIC: u32 = 0x5241_4653;
/// `CiHeader::magic`.
pub const CI_MAGIC: u32 = 0xB10B_B10B;
/// Size in bytes of the header that follows the context table of a blob.
pub const CI_HEADER_SIZE: u64 = 4096;
/// Blobs per image: an index plus one must fit in 8 bits, and the builder stops one below.
pub const MAX_BLOBS: usize = 254;
/// Chunks per blob that readers accept.
pub const MAX_CHUNKS: u32 = 1 << 24;
/// Smallest and largest chunk size in bytes; every power of two between is legal.
pub const CHUNK_SIZE_RANGE: std::ops::RangeInclusive<u32> = 0x1000..=0x100_0000;
/// Largest uncompressed size of a blob in bytes.
pub const MAX_UNCOMPRESSED_SIZE: u64 = 1 << 44;
/// Largest compressed size of a blob in bytes.
pub const MAX_COMPRESSED_SIZE: u64 = 1 << 40;
/// Longest file name in bytes.
pub const NAME_MAX: usize = 255;
/// Longest symbolic link target in bytes that readers accept.
pub const SYMLINK_MAX: u64 = 4096;

/// EROFS super block, 128 bytes at offset 1024.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    pub magic: U32,
    /// Zero: RAFS images carry no checksum.
    pub checksum: U32,
    pub feature_compat: U32,
    /// log2 of the block size: 12, or 9 in tarfs images.
    pub block_bits: u8,
    pub ext_slots: u8,
    pub root_nid: U16,
    /// Number of paths: a hard-linked file counts once for each name.
    pub inode_count: U64,
    pub build_time: U64,
    pub build_time_nsec: U32,
    /// Blocks of all blobs together, metadata not included.
    pub blocks: U32,
    /// Start of the metadata area, in blocks.
    pub meta_block: U32,
    pub xattr_block: U32,
    pub uuid: [u8; 16],
    pub volume_name: [u8; 16],
    pub feature_incompat: U32,
    pub compression: U16,
    /// Number of device slots, that is, of blobs.
    pub extra_devices: U16,
    /// Start of the device table in units of 128 bytes.
    pub device_slot_offset: U16,
    pub reserved: [u8; 38],
}
const _: () = assert!(size_of::<SuperBlock>() == 128);

/// RAFS extended super block, 256 bytes behind the EROFS one.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtSuperBlock {
    /// [`ImageFlags`].
    pub flags: U64,
    /// Bytes from the start of the bootstrap, a multiple of 4096.
    pub blob_table_offset: U64,
    /// Bytes, a multiple of 256.
    pub blob_table_size: U32,
    /// Bytes, a power of two.
    pub chunk_size: U32,
    /// Bytes from the start of the bootstrap, a multiple of 4096.
    pub chunk_table_offset: U64,
    /// Bytes, a multiple of 80.
    pub chunk_table_size: U64,
    /// Bytes from the start of the bootstrap; 0 if there is none.
    pub prefetch_table_offset: U64,
    /// Bytes, a multiple of 4.
    pub prefetch_table_size: U32,
    pub padding: U32,
    pub reserved: [u8; 200],
}
const _: () = assert!(size_of::<ExtSuperBlock>() == 256);

bitflags::bitflags! {
    /// `ExtSuperBlock::flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ImageFlags: u64 {
        const COMPRESSION_NONE = 0x1;
        const COMPRESSION_LZ4 = 0x2;
        const HASH_BLAKE3 = 0x4;
        const HASH_SHA256 = 0x8;
        /// Owners of inodes are meaningful.
        const EXPLICIT_UID_GID = 0x10;
        /// Some inode has extended attributes.
        const HAS_XATTR = 0x20;
        const COMPRESSION_GZIP = 0x40;
        const COMPRESSION_ZSTD = 0x80;
        /// Every blob has a `blob.digest` section.
        const INLINED_CHUNK_DIGEST = 0x100;
        /// 512-byte blocks, blobs are plain tar files.
        const TARFS = 0x200;
        const ENCRYPTION_NONE = 0x0100_0000;
        const ENCRYPTION_AES_128_XTS = 0x0200_0000;
        /// Compatible bits set aside: accepted and ignored.
        const RESERVED_COMPATIBLE = 0xFC00_0000;
    }
}

bitflags::bitflags! {
    /// `BlobEntry::features` and `CiHeader::features`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BlobFeatures: u32 {
        /// Uncompressed offsets are multiples of 4096.
        const ALIGNED = 0x1;
        /// The blob file also holds the bootstrap.
        const INLINED_FS_META = 0x2;
        /// Entries of the chunk-info array are [`CiV2`].
        const CHUNK_INFO_V2 = 0x4;
        const ZRAN = 0x8;
        /// Data and chunk-info array are in two files.
        const SEPARATE = 0x10;
        /// The blob has a `blob.digest` section.
        const INLINED_CHUNK_DIGEST = 0x20;
        const TARFS = 0x40;
        const BATCH = 0x80;
        const ENCRYPTED = 0x100;
        const CHUNKDICT_GENERATED = 0x200;
        const PREFETCH_FILES = 0x400;
        const EXTERNAL = 0x800;
        /// Sections are followed by tar headers.
        const HAS_TAR_HEADER = 0x1000_0000;
        const HAS_TOC = 0x2000_0000;
        /// Made by a builder that knows the two bits before.
        const CAP_TAR_TOC = 0x4000_0000;
        // Unknown bits of the upper half are compatible, those of 0xF000 are not.
        const _ = !0;
    }
}

/// Device slot, 128 bytes: tells the kernel about one blob.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeviceSlot {
    /// Blob id, padded with zeros.
    pub tag: [u8; 64],
    /// Whole blocks of the uncompressed blob.
    pub blocks: U32,
    /// Start in the flat address space of a single block device, in blocks.
    pub mapped_block: U32,
    pub reserved: [u8; 56],
}
const _: () = assert!(size_of::<DeviceSlot>() == 128);

/// Blob table entry, 256 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlobEntry {
    pub blob_id: [u8; 64],
    pub blob_index: U32,
    /// Bytes; equals the image's.
    pub chunk_size: U32,
    pub chunk_count: U32,
    /// Compressor number, see `codec`.
    pub compressor: U32,
    /// Digester number, see `codec`.
    pub digester: U32,
    /// [`BlobFeatures`].
    pub features: U32,
    /// Bytes; what it covers differs by kind of blob.
    pub compressed_size: U64,
    /// End of the last chunk in bytes, rounded up to a block.
    pub uncompressed_size: U64,
    /// Bytes, tar header included; 0 if there is no table of contents.
    pub toc_size: U32,
    /// Compressor number of the chunk-info array.
    pub ci_compressor: U32,
    /// Bytes from the start of the file that holds the array.
    pub ci_offset: U64,
    /// Stored bytes.
    pub ci_compressed_size: U64,
    /// Bytes after decompression.
    pub ci_uncompressed_size: U64,
    pub toc_digest: [u8; 32],
    /// Separate blobs: SHA-256 of the file with the array. Encrypted blobs: the key.
    pub meta_digest: [u8; 32],
    /// Separate blobs: size of that file in bytes. Encrypted blobs: half of the IV.
    pub meta_size: U64,
    pub cipher_iv: U64,
    /// 0 none, 1 AES-128-XTS.
    pub cipher: U32,
    pub reserved: [u8; 36],
}
const _: () = assert!(size_of::<BlobEntry>() == 256);

/// Data layout of an inode: bits 1..=3 of `format`.
pub const LAYOUT_FLAT_PLAIN: u16 = 0;
/// Data of which the last, short block lies behind the inode.
pub const LAYOUT_FLAT_INLINE: u16 = 2;
/// Regular files: an array of [`ChunkAddr`] behind the inode.
pub const LAYOUT_CHUNK_BASED: u16 = 4;
/// Bit of `InodeExtended::u` of a regular file: the array is one of [`ChunkAddr`].
pub const CHUNK_FORMAT_INDEXES: u32 = 0x20;

/// Extended inode, 64 bytes: `format` bit 0 is 1.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InodeExtended {
    /// Bit 0: extended. Bits 1..=3: data layout. The rest is zero.
    pub format: U16,
    /// 0, or the size of the xattr area as (size - 12) / 4 + 1.
    pub xattr_count: U16,
    /// Type and permission bits, as `st_mode`.
    pub mode: U16,
    pub reserved: U16,
    /// Bytes.
    pub size: U64,
    /// Start block (directory, symlink), device number (special), chunk format (regular).
    pub u: U32,
    /// Running number, only informative.
    pub ino: U32,
    pub uid: U32,
    pub gid: U32,
    /// Seconds since the epoch, two's complement.
    pub mtime: U64,
    pub mtime_nsec: U32,
    pub nlink: U32,
    /// [`LayerMark`]; reserved and zero in the format, where no reader looks at it.
    pub layer_mark: u8,
    pub reserved2: [u8; 15],
}
const _: () = assert!(size_of::<InodeExtended>() == 64);

/// What the bootstrap of a layer says about a path beside the format, for the merge that is to come.
///
/// Other readers see a directory and a symbolic link. Merged images have no marks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum LayerMark {
    #[default]
    None = 0,
    /// A directory that the layer has no entry for, only for something below it: attributes of a
    /// lower layer's directory stay as they are.
    Implied = 1,
    /// A hard link whose target, an absolute path, the layer did not hold at this point. The inode
    /// is that of a symbolic link.
    HardLink = 2,
}

impl LayerMark {
    /// `None` if `number` has no meaning.
    pub fn from_number(number: u8) -> Option<LayerMark> {
        [LayerMark::None, LayerMark::Implied, LayerMark::HardLink]
            .into_iter()
            .find(|&mark| mark as u8 == number)
    }
}

/// The kernel's 32-bit encoding of a device number, of 12 bits for `major` and 20 for `minor`.
pub fn encode_rdev(major: u32, minor: u32) -> u32 {
    (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xF_FF00) << 12
}

/// Compact inode, 32 bytes: `format` bit 0 is 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InodeCompact {
    pub format: U16,
    pub xattr_count: U16,
    pub mode: U16,
    pub nlink: U16,
    pub size: U32,
    pub reserved: U32,
    pub u: U32,
    pub ino: U32,
    pub uid: U16,
    pub gid: U16,
    pub reserved2: U32,
}
const _: () = assert!(size_of::<InodeCompact>() == 32);

/// Directory entry, 12 bytes; the names of a block follow its last entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Dirent {
    pub nid: U64,
    /// Bytes from the start of the block.
    pub name_offset: U16,
    /// 0 unknown, 1 regular, 2 directory, 3 char, 4 block, 5 fifo, 6 socket, 7 symlink.
    pub file_type: u8,
    pub reserved: u8,
}
const _: () = assert!(size_of::<Dirent>() == 12);

/// Where one chunk of a file lives: RAFS v6 chunk address, 8 bytes.
///
/// Source: Linux `struct erofs_inode_chunk_index`. RAFS keeps the kernel's meaning of
/// `start_block` and of the low byte of `device`, and packs the chunk index around them.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkAddr {
    /// Bits 0..16 of the chunk index.
    index_lo: U16,
    /// Low byte: device, from 1 (0 is the bootstrap). High byte: bits 16..24 of the chunk index.
    device: U16,
    /// Start of the chunk in its blob's uncompressed space, in blocks of the superblock's size.
    start_block: U32,
}
const _: () = assert!(size_of::<ChunkAddr>() == 8);

impl ChunkAddr {
    /// `device` counts from 1; `chunk_index` is below `1 << 24`.
    pub fn new(device: u8, chunk_index: u32, start_block: u32) -> Self {
        let [lo, mid, hi, _] = chunk_index.to_le_bytes();
        ChunkAddr {
            index_lo: U16::from_bytes([lo, mid]),
            device: U16::from_bytes([device, hi]),
            start_block: U32::new(start_block),
        }
    }

    /// The same chunk, its blob having another device number.
    pub fn with_device(self, device: u8) -> Self {
        let [_, hi] = self.device.to_bytes();
        ChunkAddr { device: U16::from_bytes([device, hi]), ..self }
    }

    /// Device slot plus one; 0 is not a blob.
    pub fn device(self) -> u8 {
        self.device.to_bytes()[0]
    }

    /// The blob; `None` for device 0, the bootstrap, which holds no chunks.
    pub fn blob(self) -> Option<BlobIndex> {
        self.device().checked_sub(1).map(BlobIndex)
    }

    /// Index in the chunk-info array of the blob.
    pub fn chunk_index(self) -> u32 {
        let [lo, mid] = self.index_lo.to_bytes();
        u32::from_le_bytes([lo, mid, self.device.to_bytes()[1], 0])
    }

    /// Start in the blob's uncompressed space, in blocks.
    pub fn start_block(self) -> u32 {
        self.start_block.get()
    }
}

/// Header of the xattr area behind an inode, 12 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    pub name_filter: U32,
    /// Zero: RAFS has no shared xattrs.
    pub shared_count: u8,
    pub reserved: [u8; 7],
}
const _: () = assert!(size_of::<XattrHeader>() == 12);

/// Start of an xattr entry, 4 bytes; name, value and padding to 4 follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes, prefix not included.
    pub name_len: u8,
    /// 1 user., 2 and 3 the POSIX ACLs, 4 trusted., 6 security.
    pub name_index: u8,
    /// Bytes.
    pub value_size: U16,
}
const _: () = assert!(size_of::<XattrEntry>() == 4);

/// Chunk table record, 80 bytes; records are sorted by digest, then blob index.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkRecord {
    /// Digest of the uncompressed chunk.
    pub digest: [u8; 32],
    pub blob_index: U32,
    /// [`ChunkFlags`].
    pub flags: U32,
    pub compressed_size: U32,
    pub uncompressed_size: U32,
    pub compressed_offset: U64,
    pub uncompressed_offset: U64,
    /// Offset in the file that first brought the chunk.
    pub file_offset: U64,
    /// Index in the chunk-info array of the blob.
    pub index: U32,
    pub crc32c: U32,
}
const _: () = assert!(size_of::<ChunkRecord>() == 80);

bitflags::bitflags! {
    /// `ChunkRecord::flags`; the low byte of a [`CiV2`] has its own numbering.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u32 {
        const COMPRESSED = 0x1;
        const HOLE = 0x2;
        const ENCRYPTED = 0x4;
        const BATCH = 0x8;
        const HAS_CRC32C = 0x10;
    }
}

/// Header behind the context table of a blob, 4096 bytes, never compressed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CiHeader {
    pub magic: U32,
    /// [`BlobFeatures`].
    pub features: U32,
    pub compressor: U32,
    pub entries: U32,
    pub offset: U64,
    pub compressed_size: U64,
    /// Whole context table in bytes.
    pub uncompressed_size: U64,
    /// Start of the contexts in the table; batch and zran only.
    pub context_offset: U64,
    /// Bytes, dictionaries included.
    pub context_size: U64,
    pub context_count: U32,
    pub reserved: [u8; 4032],
    pub magic2: U32,
}
const _: () = assert!(size_of::<CiHeader>() == 4096);

/// Chunk-info array entry, version 1, 16 bytes of packed bits: see `ci`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CiV1 {
    pub uncompressed: U64,
    pub compressed: U64,
}
const _: () = assert!(size_of::<CiV1>() == 16);

/// Chunk-info array entry, version 2, 24 bytes of packed bits: see `ci`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CiV2 {
    pub uncompressed: U64,
    pub compressed: U64,
    pub data: U64,
}
const _: () = assert!(size_of::<CiV2>() == 24);

/// Batch context, 40 bytes: several small chunks compressed together.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BatchContext {
    pub compressed_size: U32,
    pub uncompressed_size: U32,
    pub reserved: [u8; 32],
}
const _: () = assert!(size_of::<BatchContext>() == 40);

/// Entry of the table of contents of a packed blob, 128 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TocEntry {
    /// Low 4 bits: 1 plain, 2 zstd, 4 lz4 block.
    pub flags: U32,
    pub reserved: U32,
    /// Section name, padded with zeros.
    pub name: [u8; 16],
    /// SHA-256 of the uncompressed content.
    pub digest: [u8; 32],
    pub compressed_offset: U64,
    pub compressed_size: U64,
    pub uncompressed_size: U64,
    pub reserved2: [u8; 48],
}
const _: () = assert!(size_of::<TocEntry>() == 128);

/// GNU tar header, 512 bytes: stands *behind* each section of a packed blob and describes it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TarHeader {
    /// Section name, padded with zeros.
    pub name: [u8; 100],
    pub mode: [u8; 8],
    pub uid: [u8; 8],
    pub gid: [u8; 8],
    /// Bytes of the section: octal digits, or big-endian binary if the first bit is set.
    pub size: [u8; 12],
    pub mtime: [u8; 12],
    /// Sum of all bytes of the header with this field full of spaces, in octal digits.
    pub checksum: [u8; 8],
    /// `0`: a regular file.
    pub kind: u8,
    pub link_name: [u8; 100],
    /// [`TAR_MAGIC`].
    pub magic: [u8; 8],
    pub reserved: [u8; 247],
}
const _: () = assert!(size_of::<TarHeader>() == 512);
/// `TarHeader::magic`, in the form of GNU tar.
pub const TAR_MAGIC: [u8; 8] = *b"ustar  \0";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_address_packs_the_index_around_the_device() {
        // (device, chunk index, start block, bytes)
        let cases: [(u8, u32, u32, [u8; 8]); 3] = [
            (1, 5, 5, [5, 0, 1, 0, 5, 0, 0, 0]),
            (2, 0x0A_0B0C, 0x0102_0304, [0x0C, 0x0B, 2, 0x0A, 4, 3, 2, 1]),
            (254, 0xFF_FFFE, u32::MAX - 1, [0xFE, 0xFF, 254, 0xFF, 0xFE, 0xFF, 0xFF, 0xFF]),
        ];
        for (device, index, block, bytes) in cases {
            let addr = ChunkAddr::new(device, index, block);
            assert_eq!(addr.as_bytes(), bytes);
            assert_eq!(
                (addr.device(), addr.chunk_index(), addr.start_block()),
                (device, index, block)
            );
        }
    }
}
