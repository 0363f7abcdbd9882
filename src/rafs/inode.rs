//! Inodes: checked when read, then plain values and slices of the mapping.

use std::fmt;

use super::bootstrap::Image;
use super::dir::Dir;
use super::error::{FormatError, Result};
use super::id::{BlobIndex, Nid};
use super::layout::{
    BLOCK_SIZE, CHUNK_FORMAT_INDEXES, ChunkAddr, InodeCompact, InodeExtended, LAYOUT_CHUNK_BASED,
    LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN, LayerMark, SYMLINK_MAX,
};
use super::xattr::Xattrs;

/// Block address that EROFS gives a hole. RAFS has none, so it is refused.
const NULL_BLOCK: u32 = u32::MAX;
/// Bits of `u` that a regular file may have: log2 of its chunk size in blocks, and the flag.
const CHUNK_FORMAT_MASK: u32 = 0x1F | CHUNK_FORMAT_INDEXES;

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    Regular,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

/// One inode of a bootstrap. Its place, type, xattr area and data are inside the file.
#[derive(Clone, Copy)]
pub struct Inode<'a> {
    pub(super) image: &'a Image,
    nid: Nid,
    /// Byte offset in the bootstrap.
    offset: u64,
    kind: FileKind,
    inline: bool,
    /// Bytes of the inode and its xattr area.
    head_len: u64,
    /// Bytes of the inode alone.
    inode_len: u64,
    mode: u16,
    size: u64,
    u: u32,
    ino: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
    mtime_nsec: u32,
    nlink: u32,
    chunk_count: u32,
    mark: u8,
}

impl FileKind {
    /// The type of an `st_mode`; `None` if it is not one of the seven.
    pub fn from_mode(mode: u16) -> Option<FileKind> {
        Some(match mode >> 12 {
            0o01 => FileKind::Fifo,
            0o02 => FileKind::CharDevice,
            0o04 => FileKind::Directory,
            0o06 => FileKind::BlockDevice,
            0o10 => FileKind::Regular,
            0o12 => FileKind::Symlink,
            0o14 => FileKind::Socket,
            _ => return None,
        })
    }

    /// The type bits of an `st_mode`. Shifted right by 12 they are the `d_type` of a directory entry.
    pub fn mode_bits(self) -> u16 {
        let bits = match self {
            FileKind::Fifo => 0o01,
            FileKind::CharDevice => 0o02,
            FileKind::Directory => 0o04,
            FileKind::BlockDevice => 0o06,
            FileKind::Regular => 0o10,
            FileKind::Symlink => 0o12,
            FileKind::Socket => 0o14,
        };
        bits << 12
    }

    /// The type of a stored directory entry; `None` for 0, "unknown", and what has no meaning.
    pub fn from_dirent(file_type: u8) -> Option<FileKind> {
        Some(match file_type {
            1 => FileKind::Regular,
            2 => FileKind::Directory,
            3 => FileKind::CharDevice,
            4 => FileKind::BlockDevice,
            5 => FileKind::Fifo,
            6 => FileKind::Socket,
            7 => FileKind::Symlink,
            _ => return None,
        })
    }

    /// The number of this type in a stored directory entry.
    pub fn to_dirent(self) -> u8 {
        match self {
            FileKind::Regular => 1,
            FileKind::Directory => 2,
            FileKind::CharDevice => 3,
            FileKind::BlockDevice => 4,
            FileKind::Fifo => 5,
            FileKind::Socket => 6,
            FileKind::Symlink => 7,
        }
    }

    /// The word of error messages and listings.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::Regular => "file",
            FileKind::Directory => "dir",
            FileKind::Symlink => "symlink",
            FileKind::CharDevice => "char",
            FileKind::BlockDevice => "block",
            FileKind::Fifo => "fifo",
            FileKind::Socket => "socket",
        }
    }
}

impl<'a> Inode<'a> {
    /// Reads and checks the inode at `nid`.
    pub(super) fn read(image: &'a Image, nid: Nid) -> Result<Inode<'a>> {
        let beyond = || FormatError::invalid("inode", image.len(), format!("no nid {}", nid.0));
        let offset = nid.byte_offset(image.sb.meta_start).ok_or_else(beyond)?;
        let compact: &InodeCompact = image.read("inode", offset)?;
        let format = compact.format.get();
        let mode = compact.mode.get();
        let kind = FileKind::from_mode(mode)
            .ok_or_else(|| FormatError::invalid("inode", offset, format!("mode {mode:#o}")))?;
        let mut inode = Inode {
            image,
            nid,
            offset,
            kind,
            inline: (format >> 1) & 7 == LAYOUT_FLAT_INLINE,
            head_len: 0,
            inode_len: size_of::<InodeCompact>() as u64,
            mode,
            size: compact.size.get().into(),
            u: compact.u.get(),
            ino: compact.ino.get(),
            uid: compact.uid.get().into(),
            gid: compact.gid.get().into(),
            // A compact inode stores no time; the kernel shows the build time of the image.
            mtime: image.sb.build_time.0,
            mtime_nsec: image.sb.build_time.1,
            nlink: compact.nlink.get().into(),
            chunk_count: 0,
            mark: 0,
        };
        if format & 1 != 0 {
            let extended: &InodeExtended = image.read("inode", offset)?;
            inode.inode_len = size_of::<InodeExtended>() as u64;
            inode.size = extended.size.get();
            inode.u = extended.u.get();
            inode.ino = extended.ino.get();
            inode.uid = extended.uid.get();
            inode.gid = extended.gid.get();
            inode.mtime = extended.mtime.get().cast_signed();
            inode.mtime_nsec = extended.mtime_nsec.get();
            inode.nlink = extended.nlink.get();
            inode.mark = extended.layer_mark;
        }
        let xattr_len = match u64::from(compact.xattr_count.get()) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        };
        inode.head_len = inode.inode_len + xattr_len;
        image.slice("xattr area", offset, inode.head_len)?;
        inode.check(format)?;
        Ok(inode)
    }

    fn check(&mut self, format: u16) -> Result<()> {
        let layout = (format >> 1) & 7;
        let fits = match self.kind {
            FileKind::Regular => layout == LAYOUT_CHUNK_BASED,
            FileKind::Directory | FileKind::Symlink => {
                matches!(layout, LAYOUT_FLAT_PLAIN | LAYOUT_FLAT_INLINE)
            }
            _ => layout == LAYOUT_FLAT_PLAIN,
        };
        if !fits || format & !0xF != 0 {
            let reason = format!("format {format:#x} does not fit a {}", self.kind.name());
            return Err(self.invalid(reason));
        }
        if self.nlink == 0 {
            return Err(self.invalid("link count is 0"));
        }
        if self.mtime_nsec >= 1_000_000_000 {
            return Err(self.invalid("nanoseconds exceed a second"));
        }
        if i64::try_from(self.size).is_err() {
            return Err(self.invalid("size exceeds 63 bits"));
        }
        match self.kind {
            FileKind::Regular => self.check_chunks(),
            FileKind::Directory if self.size == 0 => Err(self.invalid("directory of size 0")),
            FileKind::Symlink if !(1..=SYMLINK_MAX).contains(&self.size) => {
                Err(self.invalid(format!("symlink target of {} bytes", self.size)))
            }
            FileKind::Directory | FileKind::Symlink => self.check_flat(),
            _ => {
                self.size = 0;
                Ok(())
            }
        }
    }

    fn check_chunks(&mut self) -> Result<()> {
        if self.u & CHUNK_FORMAT_INDEXES == 0 || self.u & !CHUNK_FORMAT_MASK != 0 {
            return Err(self.invalid(format!("chunk format {:#x}", self.u)));
        }
        let count = self.size.div_ceil(self.image.sb.chunk_size.into());
        self.chunk_count =
            u32::try_from(count).map_err(|_| self.invalid("chunk count exceeds 32 bits"))?;
        let len = count * size_of::<ChunkAddr>() as u64;
        self.image.slice("chunk addresses", self.chunks_offset(), len)?;
        Ok(())
    }

    /// Data of a directory or symlink: full blocks elsewhere, the rest there too or behind us.
    fn check_flat(&self) -> Result<()> {
        let blocks = self.blocks();
        let tail = self.size - (blocks - 1) * BLOCK_SIZE;
        let elsewhere = if self.inline { self.size - tail } else { self.size };
        if elsewhere > 0 {
            self.image.slice("data blocks", self.block_offset(0), elsewhere)?;
        }
        if self.inline {
            self.image.slice("inline data", self.offset + self.head_len, tail)?;
            if self.offset % BLOCK_SIZE + self.head_len + tail > BLOCK_SIZE {
                return Err(self.invalid("inline data leaves the block of its inode"));
            }
        }
        Ok(())
    }

    fn invalid(&self, reason: impl Into<String>) -> FormatError {
        FormatError::invalid("inode", self.offset, reason)
    }

    /// Byte offset of the chunk addresses: behind inode and xattrs, in steps of 8.
    fn chunks_offset(&self) -> u64 {
        self.offset + self.head_len.next_multiple_of(8)
    }

    /// Byte offset of block `i` of the data that is not inline.
    fn block_offset(&self, i: u64) -> u64 {
        (u64::from(self.u) + i) * BLOCK_SIZE
    }

    /// Blocks of the data of a directory or symlink, the short one included.
    pub(super) fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }

    /// Block `i` of the data of a directory or symlink, `i < blocks()`, without the bytes behind
    /// the end of the data.
    pub(super) fn block(&self, i: u64) -> Result<&'a [u8]> {
        let last = i + 1 == self.blocks();
        let len = if last { self.size - i * BLOCK_SIZE } else { BLOCK_SIZE };
        let offset =
            if self.inline && last { self.offset + self.head_len } else { self.block_offset(i) };
        self.image.slice("data block", offset, len)
    }

    /// Byte offset of block `i` in the bootstrap, for error messages.
    pub(super) fn block_place(&self, i: u64) -> u64 {
        if self.inline && i + 1 == self.blocks() {
            self.offset + self.head_len
        } else {
            self.block_offset(i)
        }
    }

    pub fn nid(&self) -> Nid {
        self.nid
    }

    /// Bytes from the start of the bootstrap.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Type and permissions, as `st_mode`.
    pub fn mode(&self) -> u16 {
        self.mode
    }

    /// Bytes of a file, of a symlink's target, of a directory's entries; 0 for all else.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn uid(&self) -> u32 {
        self.uid
    }

    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Seconds since the epoch, may be negative.
    pub fn mtime(&self) -> i64 {
        self.mtime
    }

    /// Below 1,000,000,000.
    pub fn mtime_nsec(&self) -> u32 {
        self.mtime_nsec
    }

    /// At least 1.
    pub fn nlink(&self) -> u32 {
        self.nlink
    }

    /// Device number in the kernel's 32-bit encoding; 0 for all but devices.
    pub fn rdev(&self) -> u32 {
        match self.kind {
            FileKind::CharDevice | FileKind::BlockDevice => self.u,
            _ => 0,
        }
    }

    /// Major and minor of [`Inode::rdev`].
    pub fn rdev_major_minor(&self) -> (u32, u32) {
        let rdev = self.rdev();
        ((rdev >> 8) & 0xFFF, (rdev & 0xFF) | ((rdev >> 12) & 0xF_FF00))
    }

    /// The builder's running number, which hard links share: informative only.
    pub fn ino(&self) -> u32 {
        self.ino
    }

    /// What a layer that is to be merged says about the path; an unknown mark is none.
    pub fn layer_mark(&self) -> LayerMark {
        LayerMark::from_number(self.mark).unwrap_or_default()
    }

    /// Whether the inode is one of the 32-byte form, which stores no time and 16-bit owners.
    pub fn is_compact(&self) -> bool {
        self.inode_len == size_of::<InodeCompact>() as u64
    }

    /// The entries of a directory.
    ///
    /// # Errors
    ///
    /// If this is no directory.
    pub fn dir(&self) -> Result<Dir<'a>> {
        match self.kind {
            FileKind::Directory => Ok(Dir::new(*self)),
            kind => Err(self.invalid(format!("a {}, not a directory", kind.name()))),
        }
    }

    /// The target of a symlink, 1 to 4096 bytes without a NUL.
    ///
    /// # Errors
    ///
    /// If this is no symlink, or its target holds a NUL.
    pub fn symlink_target(&self) -> Result<&'a [u8]> {
        if self.kind != FileKind::Symlink {
            return Err(self.invalid(format!("a {}, not a symlink", self.kind.name())));
        }
        // At most 4096 bytes are one block, so the target is never in two pieces.
        let target = self.block(0)?;
        if target.contains(&0) {
            return Err(self.invalid("NUL in a symlink target"));
        }
        Ok(target)
    }

    /// Chunks of a regular file, each but the last of the image's chunk size; 0 for all else.
    pub fn chunk_count(&self) -> u32 {
        self.chunk_count
    }

    /// Bytes of a chunk as the kernel's EROFS driver cuts a regular file: the image's chunk size, or
    /// more if all chunks of the file follow each other in one blob.
    pub fn kernel_chunk_size(&self) -> Option<u64> {
        (self.kind == FileKind::Regular).then(|| BLOCK_SIZE << (self.u & 0x1F))
    }

    /// Bytes of chunk `i` that belong to the file; 0 from `chunk_count()` on.
    pub fn chunk_len(&self, i: u32) -> u32 {
        if i >= self.chunk_count {
            return 0;
        }
        let chunk_size = u64::from(self.image.sb.chunk_size);
        let rest = self.size - u64::from(i) * chunk_size;
        u32::try_from(rest.min(chunk_size)).expect("a chunk size has 25 bits")
    }

    /// Where chunk `i` of the file is: a chunk index that its blob has, with room for it there.
    ///
    /// # Errors
    ///
    /// If the file has no chunk `i`, or its address points at no chunk of a blob of the image.
    pub fn chunk(&self, i: u32) -> Result<ChunkAddr> {
        let offset = self.chunks_offset() + u64::from(i) * size_of::<ChunkAddr>() as u64;
        let invalid = |reason: String| FormatError::invalid("chunk address", offset, reason);
        if i >= self.chunk_count {
            return Err(invalid(format!("no chunk {i} in a file of {}", self.chunk_count)));
        }
        let addr = *self.image.read::<ChunkAddr>("chunk address", offset)?;
        if addr.start_block() == NULL_BLOCK {
            return Err(invalid("a hole, which RAFS has not".to_owned()));
        }
        let blob = addr
            .blob()
            .and_then(|BlobIndex(index)| self.image.blobs.get(usize::from(index)))
            .ok_or_else(|| invalid(format!("no device {}", addr.device())))?;
        if addr.chunk_index() >= blob.chunk_count {
            let reason =
                format!("chunk {} of {} in blob {}", addr.chunk_index(), blob.chunk_count, blob.id);
            return Err(invalid(reason));
        }
        let start = u64::from(addr.start_block()) * BLOCK_SIZE;
        if start + u64::from(self.chunk_len(i)) > blob.uncompressed_size {
            let reason = format!("block {} is too far in blob {}", addr.start_block(), blob.id);
            return Err(invalid(reason));
        }
        Ok(addr)
    }

    /// Of each `range` bytes (not 0) of a regular file, in order: in how many pieces they lie in the
    /// uncompressed blobs. 1 where they can be mapped at once.
    ///
    /// # Errors
    ///
    /// An address of a chunk is damaged.
    pub fn pieces(&self, range: u64) -> impl Iterator<Item = Result<u32>> {
        let chunk_size = u64::from(self.image.sb.chunk_size);
        let size = if self.chunk_count == 0 { 0 } else { self.size };
        (0..size.div_ceil(range)).map(move |number| {
            let (start, end) = (number * range, size.min((number + 1).saturating_mul(range)));
            let (mut pieces, mut next) = (0, None);
            for i in start / chunk_size..end.div_ceil(chunk_size) {
                let addr = self.chunk(u32::try_from(i).unwrap_or(u32::MAX))?;
                let (blob, offset) = (addr.blob(), u64::from(addr.start_block()) * BLOCK_SIZE);
                if next != Some((blob, offset)) {
                    pieces += 1;
                }
                next = Some((blob, offset + chunk_size));
            }
            Ok(pieces)
        })
    }

    /// The extended attributes, all checked.
    ///
    /// # Errors
    ///
    /// If one of them breaks a rule; then none can be told apart safely.
    pub fn xattrs(&self) -> Result<Xattrs<'a>> {
        let (start, len) = (self.offset + self.inode_len, self.head_len - self.inode_len);
        Xattrs::check(self.image.slice("xattr area", start, len)?, start)
    }
}

impl fmt::Debug for Inode<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inode")
            .field("nid", &self.nid)
            .field("mode", &format_args!("{:#o}", self.mode))
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}
