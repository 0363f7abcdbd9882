//! The bootstrap: super blocks, tables, inodes, directories.
//!
//! ```text
//! 0     1024 zeros, super block, extended super block, device table
//! 4096  blob table, prefetch table
//! M     one block left empty, so that the root's number is not 0; the root; everything else
//! C     chunk table, to the end of the file
//! ```
//!
//! Without a blob there are no tables, M is 0 and the root follows the super blocks.

use std::io::Write;
use std::path::Path;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::dirent::{self, Entry};
use super::error::BuildError;
use super::output::{Output, parent_dir};
use super::pipeline::Settings;
use super::place::{self, Plan};
use super::tree::{File, FileChunks, FileId, Kind, Node, NodeId, Tree};
use super::xattrs;
use crate::rafs::FileKind;
use crate::rafs::codec::{Compressor, Digester};
use crate::rafs::layout::{
    BLOCK_BITS, BLOCK_SIZE, BlobEntry, BlobFeatures, CHUNK_FORMAT_INDEXES, COMPAT_RAFS_V6,
    ChunkAddr, ChunkRecord, DEVICE_SLOT_OFFSET, DEVICE_TABLE_OFFSET, DeviceSlot, EROFS_MAGIC,
    EXT_SUPER_OFFSET, ExtSuperBlock, INCOMPAT_RAFS_V6, ImageFlags, InodeExtended,
    LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN, MAX_BLOBS, SUPER_OFFSET, SuperBlock,
};

/// Blobs follow the metadata in one address space from multiples of this many bytes on.
const MAPPED_ALIGN: u64 = 0x8_0000;
/// `InodeExtended::format` bit that says so.
const EXTENDED: u16 = 1;

/// All that goes into a bootstrap.
pub struct Image<'a> {
    pub tree: &'a Tree,
    pub defaults: Defaults,
    pub files: &'a FileChunks,
    /// In any order.
    pub chunks: Vec<ChunkRecord>,
    /// In the order of the device numbers that the chunks of the files have.
    pub blobs: &'a [BlobEntry],
    /// What a daemon should fetch first.
    pub prefetch: &'a [NodeId],
}

/// What the super block says of all blobs.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    pub compressor: Compressor,
    pub digester: Digester,
    /// Bytes, a power of two.
    pub chunk_size: u32,
}

impl From<Settings> for Defaults {
    fn from(settings: Settings) -> Defaults {
        let Settings { compressor, digester, chunk_size, .. } = settings;
        Defaults { compressor, digester, chunk_size }
    }
}

impl Image<'_> {
    /// The bytes of the bootstrap.
    pub fn into_bytes(mut self) -> Result<Vec<u8>, BuildError> {
        let blobs = self.blobs;
        if blobs.len() > MAX_BLOBS {
            return Err(super::dedup::too_many_blobs());
        }
        let prefetch = if blobs.is_empty() { &[] } else { self.prefetch };
        let device_table_len = size_of::<DeviceSlot>() * blobs.len().max(1);
        let blob_table = (DEVICE_TABLE_OFFSET + device_table_len) as u64;
        let blob_table = blob_table.next_multiple_of(BLOCK_SIZE);
        let blob_table_len = size_of_val(blobs) as u64;
        let prefetch_table = blob_table + blob_table_len;
        let prefetch_len = size_of_val(prefetch) as u64;
        let meta_start = if blobs.is_empty() {
            0
        } else {
            (prefetch_table + prefetch_len).next_multiple_of(BLOCK_SIZE)
        };
        // The sum of their blocks has 32 bits in the super block.
        let device_blocks: u64 =
            blobs.iter().map(|blob| blob.uncompressed_size.get() / BLOCK_SIZE).sum();
        if u32::try_from(device_blocks).is_err() {
            return Err(BuildError::Limit {
                what: "the bytes of all blobs",
                limit: u64::from(u32::MAX) * BLOCK_SIZE,
                advice: "",
            });
        }
        let tree = self.tree;
        let chunk_size = self.defaults.chunk_size;
        let plan = Plan::new(tree, meta_start, meta_start + BLOCK_SIZE, chunk_size);
        let chunk_table = plan.end;
        let chunk_table_len = size_of_val(&*self.chunks) as u64;
        let len = (chunk_table + chunk_table_len).next_multiple_of(BLOCK_SIZE);
        // Kernels and prefetch tables count blocks and inodes in 32 bits.
        u32::try_from(len / BLOCK_SIZE)
            .ok()
            .filter(|_| plan.end / 32 <= u64::from(u32::MAX))
            .ok_or(BuildError::Limit {
                what: "the size of the bootstrap",
                limit: u64::from(u32::MAX) * 32,
                advice: "; a larger --chunk-size makes it smaller",
            })?;

        let mut out = Out(vec![0; to_usize(len)]);
        let root_nid = plan.nid(tree, NodeId::ROOT).0;
        out.put(SUPER_OFFSET as u64, &self.super_block(root_nid, meta_start));
        let mut ext = ExtSuperBlock::new_zeroed();
        ext.flags = U64::new(self.flags().bits());
        ext.blob_table_offset = U64::new(blob_table);
        ext.chunk_size = U32::new(chunk_size);
        ext.chunk_table_offset = U64::new(chunk_table);
        ext.chunk_table_size = U64::new(chunk_table_len);
        ext.blob_table_size = U32::new(u32_of(blob_table_len));
        let mut mapped = len;
        for (i, blob) in (0..).zip(blobs) {
            let mut entry = *blob;
            entry.blob_index = U32::new(i);
            let blocks = blocks_of(blob.uncompressed_size.get());
            mapped = mapped.next_multiple_of(MAPPED_ALIGN);
            let mut slot = DeviceSlot::new_zeroed();
            slot.tag = blob.blob_id;
            slot.blocks = U32::new(blocks);
            // Counts for a kernel that is given one device for all; beyond 16 TiB there is none.
            slot.mapped_block = U32::new(u32::try_from(mapped / BLOCK_SIZE).unwrap_or(0));
            mapped += u64::from(blocks) * BLOCK_SIZE;
            let at = u64::from(i);
            out.put(DEVICE_TABLE_OFFSET as u64 + at * size_of::<DeviceSlot>() as u64, &slot);
            out.put(blob_table + at * size_of::<BlobEntry>() as u64, &entry);
        }
        if !prefetch.is_empty() {
            ext.prefetch_table_offset = U64::new(prefetch_table);
            ext.prefetch_table_size = U32::new(u32_of(prefetch_len));
            for (i, &id) in (0..).zip(prefetch) {
                let nid = U32::new(u32_of(plan.nid(tree, id).0));
                out.put(prefetch_table + i * size_of::<U32>() as u64, &nid);
            }
        }
        out.put(EXT_SUPER_OFFSET as u64, &ext);

        for id in tree.ids().filter(|&id| tree.inode_of(id) == id) {
            self.put_inode(&mut out, &plan, id);
        }
        // The index is unique in a blob, so it makes no difference that the sort is unstable.
        self.chunks.sort_unstable_by_key(|r| (r.digest, r.blob_index.get(), r.index.get()));
        for (i, record) in (0..).zip(&self.chunks) {
            out.put(chunk_table + i * size_of::<ChunkRecord>() as u64, record);
        }
        Ok(out.0)
    }

    fn super_block(&self, root_nid: u64, meta_start: u64) -> SuperBlock {
        let mut sb = SuperBlock::new_zeroed();
        sb.magic = U32::new(EROFS_MAGIC);
        sb.feature_compat = U32::new(COMPAT_RAFS_V6);
        sb.block_bits = BLOCK_BITS;
        sb.root_nid = U16::new(u16::try_from(root_nid).expect("the root is placed first"));
        sb.inode_count = U64::new(self.tree.len() as u64);
        sb.meta_block = U32::new(blocks_of(meta_start));
        sb.feature_incompat = U32::new(INCOMPAT_RAFS_V6);
        sb.device_slot_offset = U16::new(DEVICE_SLOT_OFFSET);
        let blocks = self.blobs.iter().map(|blob| blob.uncompressed_size.get() / BLOCK_SIZE);
        sb.blocks = U32::new(u32_of(blocks.sum()));
        sb.extra_devices = U16::new(u16::try_from(self.blobs.len()).expect("at most 254"));
        sb
    }

    fn flags(&self) -> ImageFlags {
        let mut flags = self.defaults.compressor.image_flag()
            | self.defaults.digester.image_flag()
            | ImageFlags::EXPLICIT_UID_GID
            | ImageFlags::ENCRYPTION_NONE;
        if self.tree.ids().any(|id| !self.tree.node(id).xattrs.is_empty()) {
            flags |= ImageFlags::HAS_XATTR;
        }
        let inlined = BlobFeatures::INLINED_CHUNK_DIGEST.bits();
        // True of all blobs if there are none: nydus-image says so too.
        if self.blobs.iter().all(|blob| blob.features.get() & inlined != 0) {
            flags |= ImageFlags::INLINED_CHUNK_DIGEST;
        }
        flags
    }

    fn put_inode(&self, out: &mut Out, plan: &Plan, id: NodeId) {
        let tree = self.tree;
        let node = tree.node(id);
        let place = plan.place(tree, id);
        let (size, nlink, u) = match &node.kind {
            Kind::Dir { .. } => {
                let size = put_dir(out, plan, tree, id);
                let dirs = tree.children(id).filter(|&child| tree.is_dir(child)).count();
                (size, u32_of(2 + dirs as u64), blocks_of(place.data))
            }
            Kind::File(file) => {
                let at = place.inode + place::inode_len(tree, id).next_multiple_of(8);
                let u = self.put_chunks(out, *file, at);
                let file = tree.file(*file);
                (file.size, file.names, u)
            }
            Kind::Symlink(target) => {
                let tail = place.inode + place::inode_len(tree, id);
                out.put_bytes(if place.inline { tail } else { place.data }, target);
                (target.len() as u64, 1, blocks_of(place.data))
            }
            Kind::Special { rdev } => (0, 1, *rdev),
        };
        let layout = match &node.kind {
            Kind::File(_) => LAYOUT_CHUNK_BASED,
            _ if place.inline => LAYOUT_FLAT_INLINE,
            _ => LAYOUT_FLAT_PLAIN,
        };
        let xattrs_len = xattrs::area_len(&node.xattrs);
        let mut inode = InodeExtended::new_zeroed();
        inode.format = U16::new(EXTENDED | layout << 1);
        inode.xattr_count =
            U16::new(xattrs::count_field(xattrs_len).expect("checked when the tree was scanned"));
        inode.mode = U16::new(node.mode);
        inode.size = U64::new(size);
        inode.u = U32::new(u);
        inode.ino = U32::new(id.number() + 1);
        inode.uid = U32::new(node.uid);
        inode.gid = U32::new(node.gid);
        inode.mtime = U64::new(node.mtime.cast_unsigned());
        inode.mtime_nsec = U32::new(node.mtime_nsec);
        inode.nlink = U32::new(nlink);
        inode.layer_mark = node.mark as u8;
        out.put(place.inode, &inode);
        if xattrs_len > 0 {
            let area = place.inode + size_of::<InodeExtended>() as u64;
            xattrs::write_area(&node.xattrs, out.range(area, xattrs_len));
        }
    }

    /// Writes the chunk addresses of a file; the chunk format of its inode.
    fn put_chunks(&self, out: &mut Out, id: FileId, at: u64) -> u32 {
        let chunk_size = u64::from(self.defaults.chunk_size);
        let File { size, data, .. } = *self.tree.file(id);
        let count = place::chunk_count(size, self.defaults.chunk_size);
        let chunks = self.files.of(data, to_usize(count));
        for (i, chunk) in chunks.iter().enumerate() {
            out.put(at + (i * size_of::<ChunkAddr>()) as u64, chunk);
        }
        // A file that lies in one piece is one chunk to the kernel, whose page cache likes that.
        let step = chunk_size / BLOCK_SIZE;
        let follows = |a: ChunkAddr, b: ChunkAddr| {
            a.device() == b.device()
                && u64::from(b.start_block()) == u64::from(a.start_block()) + step
        };
        let in_one_piece = chunks.windows(2).all(|pair| follows(pair[0], pair[1]));
        let kernel_chunk =
            if in_one_piece && size > chunk_size { size.next_power_of_two() } else { chunk_size };
        CHUNK_FORMAT_INDEXES | (kernel_chunk.ilog2() - u32::from(BLOCK_BITS))
    }
}

/// Writes the data of a directory; its size in bytes.
fn put_dir(out: &mut Out, plan: &Plan, tree: &Tree, dir: NodeId) -> u64 {
    let entries: Vec<Entry<'_>> = tree
        .entries(dir)
        .into_iter()
        .map(|(name, id)| Entry {
            name,
            nid: plan.nid(tree, id),
            file_type: file_type(tree.node(id)),
        })
        .collect();
    let place = plan.place(tree, dir);
    let blocks = dirent::fill(entries.iter().map(|e| e.name.len()));
    let mut rest = &entries[..];
    for (i, block) in blocks.iter().enumerate() {
        let (now, later) = rest.split_at(block.entries);
        rest = later;
        let at = if place.inline && i + 1 == blocks.len() {
            place.inode + place::inode_len(tree, dir)
        } else {
            place.data + i as u64 * BLOCK_SIZE
        };
        dirent::write_block(now, out.range(at, block.used));
    }
    dirent::data_size(&blocks)
}

/// The file type of a directory entry.
fn file_type(node: &Node) -> u8 {
    FileKind::from_mode(node.mode).expect("the scan refuses other types").to_dirent()
}

/// Writes a bootstrap to `path`, which appears when it is complete.
pub fn save(bytes: &[u8], path: &Path) -> Result<(), BuildError> {
    let mut out = Output::create(parent_dir(path))?;
    out.write_all(bytes).map_err(|e| out.failed(e))?;
    out.commit(path)
}

/// The file while it is put together.
struct Out(Vec<u8>);

impl Out {
    fn range(&mut self, at: u64, len: usize) -> &mut [u8] {
        let at = to_usize(at);
        &mut self.0[at..at + len]
    }

    fn put_bytes(&mut self, at: u64, bytes: &[u8]) {
        self.range(at, bytes.len()).copy_from_slice(bytes);
    }

    fn put(&mut self, at: u64, value: &(impl IntoBytes + Immutable)) {
        self.put_bytes(at, value.as_bytes());
    }
}

fn blocks_of(bytes: u64) -> u32 {
    u32_of(bytes / BLOCK_SIZE)
}

/// A number that a limit checked before keeps in 32 bits.
fn u32_of(n: u64) -> u32 {
    u32::try_from(n).expect("a limit was checked before")
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("what is in memory has a length that fits")
}
