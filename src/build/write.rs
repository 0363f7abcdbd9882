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

use super::blob_file::{Blob, FEATURES};
use super::dirent::{self, Entry};
use super::error::BuildError;
use super::output::{Output, parent_dir};
use super::pipeline::{FileChunks, Settings};
use super::place::{self, Plan};
use super::tree::{FileId, Kind, Node, NodeId, Tree};
use super::xattrs;
use crate::rafs::FileKind;
use crate::rafs::layout::{
    BLOCK_BITS, BLOCK_SIZE, BlobEntry, CHUNK_FORMAT_INDEXES, COMPAT_RAFS_V6, ChunkAddr,
    ChunkRecord, DEVICE_SLOT_OFFSET, DEVICE_TABLE_OFFSET, DeviceSlot, EROFS_MAGIC,
    EXT_SUPER_OFFSET, ExtSuperBlock, INCOMPAT_RAFS_V6, ImageFlags, InodeExtended,
    LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN, SUPER_OFFSET, SuperBlock,
};

/// Blobs follow the metadata in one address space from multiples of this many bytes on.
const MAPPED_ALIGN: u64 = 0x8_0000;
/// `InodeExtended::format` bit that says so.
const EXTENDED: u16 = 1;

/// All that goes into a bootstrap.
pub struct Image<'a> {
    pub tree: &'a Tree,
    pub settings: Settings,
    pub files: &'a FileChunks,
    /// In the order of their indexes.
    pub chunks: Vec<ChunkRecord>,
    pub blob: Option<&'a Blob>,
    /// What a daemon should fetch first.
    pub prefetch: &'a [NodeId],
}

impl Image<'_> {
    /// The bytes of the bootstrap.
    pub fn into_bytes(mut self) -> Result<Vec<u8>, BuildError> {
        let prefetch = if self.blob.is_some() { self.prefetch } else { &[] };
        let blob_table = (DEVICE_TABLE_OFFSET + size_of::<DeviceSlot>()) as u64;
        let blob_table = blob_table.next_multiple_of(BLOCK_SIZE);
        let prefetch_table = blob_table + size_of::<BlobEntry>() as u64;
        let prefetch_len = size_of_val(prefetch) as u64;
        let meta_start = match self.blob {
            Some(_) => (prefetch_table + prefetch_len).next_multiple_of(BLOCK_SIZE),
            None => 0,
        };
        let tree = self.tree;
        let chunk_size = self.settings.chunk_size;
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
        if let Some(blob) = self.blob {
            ext.blob_table_size = U32::new(size_u32::<BlobEntry>());
            out.put(DEVICE_TABLE_OFFSET as u64, &device_slot(blob, len));
            out.put(blob_table, &self.blob_entry(blob));
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
        // The index is unique, so it makes no difference that the sort is unstable.
        self.chunks.sort_unstable_by_key(|r| (r.digest, r.index.get()));
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
        if let Some(blob) = self.blob {
            sb.blocks = U32::new(blocks_of(blob.uncompressed_size));
            sb.extra_devices = U16::new(1);
        }
        sb
    }

    fn flags(&self) -> ImageFlags {
        let mut flags = self.settings.compressor.image_flag()
            | self.settings.digester.image_flag()
            | ImageFlags::EXPLICIT_UID_GID
            | ImageFlags::ENCRYPTION_NONE;
        if self.tree.ids().any(|id| !self.tree.node(id).xattrs.is_empty()) {
            flags |= ImageFlags::HAS_XATTR;
        }
        if self.blob.is_none() {
            // True of all blobs, as there are none: nydus-image says so too.
            flags |= ImageFlags::INLINED_CHUNK_DIGEST;
        }
        flags
    }

    fn blob_entry(&self, blob: &Blob) -> BlobEntry {
        let mut entry = BlobEntry::new_zeroed();
        entry.blob_id = *blob.id.as_bytes();
        entry.chunk_size = U32::new(self.settings.chunk_size);
        entry.chunk_count = U32::new(u32_of(self.chunks.len() as u64));
        entry.compressor = U32::new(self.settings.compressor as u32);
        entry.digester = U32::new(self.settings.digester as u32);
        entry.features = U32::new(FEATURES.bits());
        entry.compressed_size = U64::new(blob.size);
        entry.uncompressed_size = U64::new(blob.uncompressed_size);
        entry.ci_compressor = U32::new(blob.ci_compressor as u32);
        entry.ci_offset = U64::new(blob.ci_offset);
        entry.ci_compressed_size = U64::new(blob.ci_compressed_size);
        entry.ci_uncompressed_size = U64::new(blob.ci_uncompressed_size);
        entry
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
                (file.identity.size, file.names, u)
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
        out.put(place.inode, &inode);
        if xattrs_len > 0 {
            let area = place.inode + size_of::<InodeExtended>() as u64;
            xattrs::write_area(&node.xattrs, out.range(area, xattrs_len));
        }
    }

    /// Writes the chunk addresses of a file; the chunk format of its inode.
    fn put_chunks(&self, out: &mut Out, id: FileId, at: u64) -> u32 {
        let chunk_size = u64::from(self.settings.chunk_size);
        let size = self.tree.file(id).identity.size;
        let count = place::chunk_count(size, self.settings.chunk_size);
        let chunks = if count == 0 { &[] } else { self.files.of(id, to_usize(count)) };
        let offset = |i: usize| self.chunks[chunks[i].0 as usize].uncompressed_offset.get();
        for (i, chunk) in chunks.iter().enumerate() {
            let addr = ChunkAddr::new(1, chunk.0, blocks_of(offset(i)));
            out.put(at + (i * size_of::<ChunkAddr>()) as u64, &addr);
        }
        // A file that lies in one piece is one chunk to the kernel, whose page cache likes that.
        let in_one_piece = (1..chunks.len()).all(|i| offset(i) == offset(i - 1) + chunk_size);
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

fn device_slot(blob: &Blob, bootstrap_len: u64) -> DeviceSlot {
    let mut slot = DeviceSlot::new_zeroed();
    slot.tag = *blob.id.as_bytes();
    slot.blocks = U32::new(blocks_of(blob.uncompressed_size));
    slot.mapped_block = U32::new(blocks_of(bootstrap_len.next_multiple_of(MAPPED_ALIGN)));
    slot
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

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("structures are small")
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("what is in memory has a length that fits")
}
