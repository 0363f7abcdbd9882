//! A RAFS image as a file system: read only, and never changing while it is mounted.
//!
//! A node is numbered by its nid. Everything but file data comes from the mapped bootstrap, without
//! a system call, a lock or an allocation; file data is in `rafs_read`. Numbers a guest was not
//! given are refused: see `known`.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use super::abi::{self, Attr, OpenFlags};
use super::dax::{Extent, Mapping};
use super::file_stats::{FileStats, FileStatsOptions};
use super::file_system::{Entry, FileSystem, FsError};
use super::known::Known;
use super::listing::{Listing, Name};
use super::reply::Payload;
use super::wait::{Pins, Wait};
use super::zeros::ZeroChunks;
use crate::blob::{Blob, Prefetch};
use crate::rafs::id::Nid;
use crate::rafs::layout::{BLOCK_SIZE, ImageFlags};
use crate::rafs::{Bootstrap, Dir, FileKind, FormatError, Inode};

/// Seconds for which a guest may remember names and attributes: the most that every kernel turns
/// into a time without overflow, 136 years.
pub(super) const VALID_SECS: u64 = u32::MAX as u64;

/// How an image is shown. Extended attributes are, if the image's flags say that it has some.
#[derive(Clone, Debug)]
pub struct RafsOptions {
    /// What logs call the image, such as its mountpoint.
    pub name: String,
    /// Owner (uid, gid) of everything in an image that stores no owners.
    pub owner: (u32, u32),
    /// How long one read may wait for its chunks.
    pub read_timeout: Duration,
    /// What to record of what guests do with each file.
    pub file_stats: FileStatsOptions,
}

impl Default for RafsOptions {
    fn default() -> Self {
        RafsOptions {
            name: "/".to_owned(),
            owner: (0, 0),
            read_timeout: Duration::from_secs(30),
            file_stats: FileStatsOptions::default(),
        }
    }
}

/// A mounted image.
pub struct RafsFs {
    pub(super) image: Bootstrap,
    /// By blob index.
    pub(super) blobs: Vec<Arc<Blob>>,
    pub(super) options: RafsOptions,
    known: Arc<Known>,
    zeros: ZeroChunks,
    file_stats: Option<Arc<FileStats>>,
    #[expect(dead_code, reason = "held, not read: it ends with the file system")]
    prefetch: Option<Prefetch>,
}

impl RafsFs {
    /// `blobs` are those of `image.blobs()`, in this order. Nothing is read ahead.
    pub fn new(image: Bootstrap, blobs: Vec<Arc<Blob>>, options: RafsOptions) -> RafsFs {
        RafsFs {
            known: Arc::new(Known::new(options.name.clone(), image.clone())),
            zeros: ZeroChunks::find(&image),
            file_stats: FileStats::new(options.file_stats).map(Arc::new),
            image,
            blobs,
            options,
            prefetch: None,
        }
    }

    /// Lets `prefetch` go on as long as the file system is there.
    pub fn with_prefetch(self, prefetch: Option<Prefetch>) -> RafsFs {
        RafsFs { prefetch, ..self }
    }

    /// The inode a guest means by `node`.
    fn inode(&self, node: u64) -> Result<Inode<'_>, FsError> {
        if !self.known.contains(node) {
            self.ask_walk(node)?;
        }
        self.image.inode(Nid(node)).map_err(|source| FsError::Damaged { node, source })
    }

    /// Whether `node`, which is not known, is an inode after all: waits for the walk to tell.
    #[cold]
    fn ask_walk(&self, node: u64) -> Result<(), FsError> {
        if !self.known.complete() {
            let walk = self.known.clone().find_all();
            return Err(FsError::Wait(Wait::new(async {
                walk.await;
                Pins::default()
            })));
        }
        // The walk may have found it since the caller looked.
        if self.known.contains(node) { Ok(()) } else { Err(FsError::Stale) }
    }

    fn dir(&self, node: u64) -> Result<Dir<'_>, FsError> {
        let inode = self.inode(node)?;
        if inode.kind() != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        inode.dir().map_err(|source| FsError::Damaged { node, source })
    }

    /// The inode of a regular file.
    fn file(&self, node: u64) -> Result<Inode<'_>, FsError> {
        let inode = self.inode(node)?;
        match inode.kind() {
            FileKind::Regular => Ok(inode),
            FileKind::Directory => Err(FsError::IsDirectory),
            _ => Err(FsError::WrongType),
        }
    }

    /// What a name in a directory leads to: from now on a guest knows it.
    fn entry(&self, inode: &Inode<'_>) -> Entry {
        let node = inode.nid().0;
        self.known.insert(node);
        Entry { node, attr: self.attr_of(inode) }
    }

    fn find(&self, parent: u64, name: &[u8]) -> Result<Option<Entry>, FsError> {
        let damaged = |source: FormatError| FsError::Damaged { node: parent, source };
        let dir = self.dir(parent)?;
        let Some(found) = dir.lookup(name).map_err(damaged)? else { return Ok(None) };
        let inode = dir
            .inode_of(&found)
            .map_err(|source| FsError::Damaged { node: found.nid.0, source })?;
        Ok(Some(self.entry(&inode)))
    }

    fn attr_of(&self, inode: &Inode<'_>) -> Attr {
        let stores_owner = self.image.flags().contains(ImageFlags::EXPLICIT_UID_GID);
        let (uid, gid) = if stores_owner { (inode.uid(), inode.gid()) } else { self.options.owner };
        let (time, nsec) = (inode.mtime().cast_unsigned(), inode.mtime_nsec());
        Attr {
            ino: inode.nid().0,
            size: inode.size(),
            blocks: self.blocks(inode),
            atime: time,
            mtime: time,
            ctime: time,
            atimensec: nsec,
            mtimensec: nsec,
            ctimensec: nsec,
            mode: inode.mode().into(),
            nlink: inode.nlink(),
            uid,
            gid,
            rdev: inode.rdev(),
            blksize: 4096,
            flags: 0,
        }
    }

    /// Units of 512 bytes that the inode takes: whole blocks, less its chunks of zeros.
    fn blocks(&self, inode: &Inode<'_>) -> u64 {
        let stored = inode.size().div_ceil(BLOCK_SIZE) * (BLOCK_SIZE / 512);
        let chunk_size = u64::from(self.image.chunk_size());
        if self.zeros.is_empty() || inode.chunk_count() == 0 || inode.size() < chunk_size {
            return stored;
        }
        let holes = (0..inode.chunk_count()).filter(|&i| self.is_hole(inode, i).unwrap_or(false));
        stored - holes.map(|i| u64::from(inode.chunk_len(i)) / 512).sum::<u64>()
    }

    /// Whether chunk `i` of a file is a whole chunk of zeros.
    fn is_hole(&self, inode: &Inode<'_>, i: u32) -> Result<bool, FsError> {
        if self.zeros.is_empty() || inode.chunk_len(i) != self.image.chunk_size() {
            return Ok(false);
        }
        let addr =
            inode.chunk(i).map_err(|source| FsError::Damaged { node: inode.nid().0, source })?;
        Ok(self.zeros.contains(addr))
    }
}

impl FileSystem for RafsFs {
    fn name(&self) -> &str {
        self.known.name()
    }

    fn root(&self) -> u64 {
        self.image.root().0
    }

    /// The file that the bootstrap was opened from, as it was then.
    fn identity(&self) -> Option<[u8; 32]> {
        self.image.file_id()
    }

    fn file_stats(&self) -> Option<Arc<FileStats>> {
        self.file_stats.clone()
    }

    fn counts_inodes(&self) -> bool {
        true
    }

    fn valid_secs(&self) -> u64 {
        VALID_SECS
    }

    fn immutable(&self) -> bool {
        true
    }

    fn has_xattrs(&self) -> bool {
        self.image.flags().contains(ImageFlags::HAS_XATTR)
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Entry>, FsError> {
        self.find(parent, name)
    }

    fn parent(&self, node: u64) -> Result<Entry, FsError> {
        let missing = FsError::Broken { node, reason: "the directory has no entry `..`" };
        self.find(node, b"..")?.ok_or(missing)
    }

    fn forget(&self, _node: u64, _lookups: u64) {
        // Numbers are places in the bootstrap: there is nothing to forget.
    }

    fn attr(&self, node: u64) -> Result<Attr, FsError> {
        Ok(self.attr_of(&self.inode(node)?))
    }

    fn readlink(&self, node: u64) -> Result<Cow<'_, [u8]>, FsError> {
        let inode = self.inode(node)?;
        if inode.kind() != FileKind::Symlink {
            return Err(FsError::WrongType);
        }
        let target = inode.symlink_target().map_err(|source| FsError::Damaged { node, source })?;
        Ok(Cow::Borrowed(target))
    }

    fn open(&self, node: u64, flags: u32) -> Result<abi::OpenOut, FsError> {
        self.file(node)?;
        let flags = flags.cast_signed();
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(FsError::ReadOnly);
        }
        let open_flags = (OpenFlags::KEEP_CACHE | OpenFlags::NO_FLUSH).bits();
        Ok(abi::OpenOut { open_flags, ..Default::default() })
    }

    fn opendir(&self, node: u64) -> Result<abi::OpenOut, FsError> {
        self.dir(node)?;
        let open_flags = (OpenFlags::KEEP_CACHE | OpenFlags::CACHE_DIR).bits();
        Ok(abi::OpenOut { open_flags, ..Default::default() })
    }

    fn read(
        &self,
        node: u64,
        offset: u64,
        into: &mut Payload<'_>,
        pins: &Pins,
    ) -> Result<(), FsError> {
        self.read_file(&self.file(node)?, offset, into, pins)
    }

    fn extents(
        &self,
        node: u64,
        offset: u64,
        len: u64,
        pins: &Pins,
    ) -> Result<Vec<Extent>, FsError> {
        self.file_extents(&self.file(node)?, offset, len, pins)
    }

    fn maps_well(&self, node: u64, mapping: Mapping) -> bool {
        self.file(node).is_ok_and(|inode| RafsFs::maps_well(self, &inode, mapping))
    }

    fn lseek(&self, node: u64, offset: u64, whence: i32) -> Result<u64, FsError> {
        let want_hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return Err(FsError::InvalidArgument),
        };
        let inode = self.file(node)?;
        if offset >= inode.size() {
            return Err(FsError::PastEnd);
        }
        let chunk_size = u64::from(self.image.chunk_size());
        let first = u32::try_from(offset / chunk_size).map_err(|_| FsError::PastEnd)?;
        for i in first..inode.chunk_count() {
            if self.is_hole(&inode, i)? == want_hole {
                return Ok(offset.max(u64::from(i) * chunk_size));
            }
        }
        // Every file ends with a hole of no length.
        if want_hole { Ok(inode.size()) } else { Err(FsError::PastEnd) }
    }

    fn readdir(&self, node: u64, cookie: u64, out: &mut Listing<'_>) -> Result<(), FsError> {
        let damaged = |source| FsError::Damaged { node, source };
        let dir = self.dir(node)?;
        for entry in dir.entries_from(cookie).map_err(damaged)? {
            let entry = match entry {
                Ok(entry) => entry,
                // What was read is good; the next listing starts with the error.
                Err(_) if !out.is_empty() => break,
                Err(source) => return Err(damaged(source)),
            };
            let itself = matches!(entry.name, b"." | b"..");
            let found = if out.wants_attributes() && !itself {
                dir.inode_of(&entry).ok().map(|inode| self.entry(&inode))
            } else {
                None
            };
            let kind = FileKind::from_dirent(entry.file_type).map_or(0, FileKind::mode_bits) >> 12;
            let name = Name {
                name: entry.name,
                ino: entry.nid.0,
                kind: kind.into(),
                next_cookie: entry.next_cookie,
            };
            if !out.put(&name, found.as_ref()) {
                break;
            }
        }
        Ok(())
    }

    fn statfs(&self) -> abi::StatfsOut {
        let data: u64 = self.image.blobs().iter().map(|blob| blob.uncompressed_size).sum();
        abi::StatfsOut {
            blocks: (data + self.image.len()).div_ceil(BLOCK_SIZE),
            files: self.image.path_count(),
            bsize: 4096,
            namelen: 255,
            frsize: 4096,
            ..Default::default()
        }
    }

    fn access(&self, node: u64, mask: u32) -> Result<(), FsError> {
        let inode = self.inode(node)?;
        let mask = mask.cast_signed();
        let device = matches!(
            inode.kind(),
            FileKind::CharDevice | FileKind::BlockDevice | FileKind::Fifo | FileKind::Socket
        );
        if mask & libc::W_OK != 0 && !device {
            return Err(FsError::ReadOnly);
        }
        let executable = inode.mode() & 0o111 != 0 || inode.kind() == FileKind::Directory;
        if mask & libc::X_OK != 0 && !executable {
            return Err(FsError::NotExecutable);
        }
        Ok(())
    }

    fn getxattr(&self, node: u64, name: &[u8]) -> Result<Cow<'_, [u8]>, FsError> {
        let inode = self.inode(node)?;
        if !self.has_xattrs() {
            return Err(FsError::NoAttribute);
        }
        let xattrs = inode.xattrs().map_err(|source| FsError::Damaged { node, source })?;
        xattrs.get(name).map(Cow::Borrowed).ok_or(FsError::NoAttribute)
    }

    fn listxattr(&self, node: u64, each: &mut dyn FnMut(&str, &[u8])) -> Result<(), FsError> {
        let inode = self.inode(node)?;
        if self.has_xattrs() {
            let xattrs = inode.xattrs().map_err(|source| FsError::Damaged { node, source })?;
            xattrs.for_each(|xattr| each(xattr.prefix, xattr.name));
        }
        Ok(())
    }
}
