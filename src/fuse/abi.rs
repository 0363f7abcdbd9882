//! The FUSE wire protocol, 7.45: one type per structure, nothing but layout.
//!
//! Integers are in the byte order of both sides, which is the host's. A structure that grew over
//! time is described in its newest form; `session` and `request` know the older lengths.
//!
//! Source: Linux `include/uapi/linux/fuse.h`, the public interface of the kernel.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol spoken here.
pub const MAJOR: u32 = 7;
/// Newest minor version known here.
pub const MINOR: u32 = 45;
/// Node id of the root directory of a mount.
pub const ROOT_ID: u64 = 1;
/// Longest file name in bytes.
pub const NAME_MAX: usize = 255;

/// `InHeader::opcode`.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
    pub const COPY_FILE_RANGE_64: u32 = 53;
}

bitflags::bitflags! {
    /// `InitIn` and `InitOut`: the low half is `flags`, the high half `flags2`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        /// Several reads of one file may be under way at once.
        const ASYNC_READ = 1 << 0;
        /// `open(O_TRUNC)` truncates without a SETATTR.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// LOOKUP of `.` and `..` works on any node id.
        const EXPORT_SUPPORT = 1 << 4;
        /// Writes may be larger than 4 KiB.
        const BIG_WRITES = 1 << 5;
        /// The server applies the umask, so that default ACLs can take its place.
        const DONT_MASK = 1 << 6;
        /// The guest drops cached pages when mtime or size have changed.
        const AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS works.
        const DO_READDIRPLUS = 1 << 13;
        /// The guest chooses between READDIR and READDIRPLUS.
        const READDIRPLUS_AUTO = 1 << 14;
        const ASYNC_DIO = 1 << 15;
        /// The guest keeps what is written for a while. Nobody else sees it until then.
        const WRITEBACK_CACHE = 1 << 16;
        /// The guest stops sending OPEN and RELEASE when OPEN is answered by ENOSYS.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// LOOKUP and READDIR of one directory may run at the same time.
        const PARALLEL_DIROPS = 1 << 18;
        /// The guest's kernel checks POSIX ACLs, which it reads as xattrs.
        const POSIX_ACL = 1 << 20;
        /// `InitOut::max_pages` means something.
        const MAX_PAGES = 1 << 22;
        /// Targets of symbolic links are cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// The guest stops sending OPENDIR and RELEASEDIR when OPENDIR is answered by ENOSYS.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        const EXPLICIT_INVAL_DATA = 1 << 25;
        /// `InitOut::map_alignment` means something; only a guest with a DAX window offers it.
        const MAP_ALIGNMENT = 1 << 26;
        /// A directory may be the root of another file system: [`super::abi::ATTR_SUBMOUNT`].
        const SUBMOUNTS = 1 << 27;
        /// The server clears set-id bits on writing, truncating and changing the owner.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// [`super::abi::SetxattrIn`] is sent in full.
        const SETXATTR_EXT = 1 << 29;
        /// `flags2` means something.
        const INIT_EXT = 1 << 30;
        /// The window is used for files that are marked with [`super::abi::ATTR_DAX`].
        const HAS_INODE_DAX = 1 << 33;
        /// Who makes a file in a directory of another group it belongs to says so.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// The mount may be mapped into user namespaces; owners in headers are void then.
        const ALLOW_IDMAP = 1 << 40;
    }
}

/// `Attr::flags`: the directory is the root of another file system of the host.
pub const ATTR_SUBMOUNT: u32 = 1;
/// `Attr::flags`: the file should be read through the DAX window.
pub const ATTR_DAX: u32 = 1 << 1;
/// `SetupmappingIn::flags`: the mapping is to be written to.
pub const SETUPMAPPING_WRITE: u64 = 1;
/// `GetattrIn::getattr_flags`: `fh` is set.
pub const GETATTR_FH: u32 = 1;
/// `OpenIn::open_flags` and `CreateIn::open_flags`: clear set-id bits when truncating.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `WriteIn::write_flags`: clear set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FsyncIn::fsync_flags`: only data and what is needed to read it.
pub const FSYNC_FDATASYNC: u32 = 1;
/// `SetxattrIn::setxattr_flags`: clear the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// `ExtHeader::kind` of [`SuppGroups`].
pub const EXT_GROUPS: u32 = 32;

bitflags::bitflags! {
    /// `SetattrIn::valid`: which attributes to set.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Set: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        /// `fh` is set.
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const CTIME = 1 << 10;
        /// Clear set-id bits.
        const KILL_SUIDGID = 1 << 11;
    }
}

bitflags::bitflags! {
    /// `OpenOut::open_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpenFlags: u32 {
        /// Reads and writes go past the guest's page cache.
        const DIRECT_IO = 1 << 0;
        /// Pages cached before this open stay valid.
        const KEEP_CACHE = 1 << 1;
        /// Directory content may be cached.
        const CACHE_DIR = 1 << 3;
        /// No FLUSH on close.
        const NO_FLUSH = 1 << 5;
    }
}

/// Declares `#[repr(C)]` structures that can be read from and written as bytes, with their sizes.
macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident, $size:literal { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire! {
    /// Starts every request.
    InHeader, 40 {
        /// Bytes of the whole request, this header included.
        len: u32,
        opcode: u32,
        /// Identity of the request; its answer carries the same.
        unique: u64,
        /// What the request is about; see `mounts`.
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        /// Extensions at the end of the request, in units of 8 bytes.
        total_extlen: u16,
        padding: u16,
    }

    /// Starts every answer.
    OutHeader, 16 {
        /// Bytes of the whole answer, this header included.
        len: u32,
        /// 0 or a negative errno.
        error: i32,
        unique: u64,
    }

    /// Attributes of a node.
    Attr, 88 {
        ino: u64,
        /// Bytes.
        size: u64,
        /// Units of 512 bytes.
        blocks: u64,
        /// Seconds since the epoch, two's complement, as are the next two.
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        /// As `st_mode`.
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        /// The kernel's new encoding: minor bits 0..8, major bits 8..20, minor bits 20..32.
        rdev: u32,
        /// Bytes. Missing before 7.9, with all that follows.
        blksize: u32,
        /// `FUSE_ATTR_*`: 1 submount, 2 DAX.
        flags: u32,
    }

    /// A name that was found; `nodeid` 0 says that there is none.
    EntryOut, 128 {
        nodeid: u64,
        generation: u64,
        /// Seconds for which the guest may remember that the name leads to the node.
        entry_valid: u64,
        /// Seconds for which it may remember the attributes.
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }

    /// Answer to GETATTR.
    AttrOut, 104 {
        /// Seconds.
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }

    StatxIn, 24 {
        getattr_flags: u32,
        reserved: u32,
        fh: u64,
        sx_flags: u32,
        sx_mask: u32,
    }

    StatxTime, 16 {
        /// Seconds since the epoch.
        tv_sec: i64,
        tv_nsec: u32,
        reserved: i32,
    }

    /// As `struct statx`.
    Statx, 256 {
        /// `STATX_*`: which fields are filled.
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        spare0: u16,
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: StatxTime,
        btime: StatxTime,
        ctime: StatxTime,
        mtime: StatxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        spare2: [u64; 14],
    }

    StatxOut, 288 {
        /// Seconds.
        attr_valid: u64,
        attr_valid_nsec: u32,
        flags: u32,
        spare: [u64; 2],
        stat: Statx,
    }

    ForgetIn, 8 {
        nlookup: u64,
    }

    /// Followed by `count` [`ForgetOne`].
    BatchForgetIn, 8 {
        count: u32,
        dummy: u32,
    }

    ForgetOne, 16 {
        nodeid: u64,
        nlookup: u64,
    }

    OpenIn, 8 {
        /// As for `open(2)`.
        flags: u32,
        open_flags: u32,
    }

    OpenOut, 16 {
        fh: u64,
        /// [`OpenFlags`].
        open_flags: u32,
        padding: u32,
    }

    /// READ, READDIR and READDIRPLUS; before 7.9 it ends after `read_flags`.
    ReadIn, 40 {
        fh: u64,
        /// Bytes, or the cookie of a directory entry.
        offset: u64,
        /// Bytes.
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    LseekIn, 24 {
        fh: u64,
        offset: u64,
        /// `SEEK_DATA` or `SEEK_HOLE`; the guest's kernel knows the others itself.
        whence: u32,
        padding: u32,
    }

    LseekOut, 8 {
        offset: u64,
    }

    SetupmappingIn, 40 {
        /// 2^64 - 1 where the guest has no handle: the node id says which file.
        fh: u64,
        /// Where in the file, in bytes.
        foffset: u64,
        /// Bytes; may reach past the end of the file.
        len: u64,
        flags: u64,
        /// Where in the window, in bytes.
        moffset: u64,
    }

    /// Followed by `count` [`RemovemappingOne`].
    RemovemappingIn, 4 {
        count: u32,
    }

    RemovemappingOne, 16 {
        /// Where in the window, in bytes.
        moffset: u64,
        /// Bytes.
        len: u64,
    }

    /// Answer to STATFS; before 7.4 it ends after `namelen`.
    StatfsOut, 80 {
        /// Units of `frsize`.
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        /// Bytes.
        bsize: u32,
        /// Bytes.
        namelen: u32,
        /// Bytes.
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }

    AccessIn, 8 {
        /// As for `access(2)`.
        mask: u32,
        padding: u32,
    }

    /// GETXATTR, where the name follows, and LISTXATTR.
    GetxattrIn, 8 {
        /// Bytes the guest has room for; 0 asks how many there are.
        size: u32,
        padding: u32,
    }

    /// Answer to a GETXATTR or LISTXATTR of size 0.
    GetxattrOut, 8 {
        /// Bytes.
        size: u32,
        padding: u32,
    }

    InterruptIn, 8 {
        /// Of the request to cut short.
        unique: u64,
    }

    /// Before 7.6 it ends after `minor`, before 7.36 after `flags`.
    InitIn, 64 {
        major: u32,
        minor: u32,
        /// Bytes.
        max_readahead: u32,
        /// Low half of [`InitFlags`].
        flags: u32,
        /// High half, if `flags` has INIT_EXT.
        flags2: u32,
        unused: [u32; 11],
    }

    /// Before 7.5 it ends after `minor`, before 7.23 after `max_write`.
    InitOut, 64 {
        major: u32,
        minor: u32,
        /// Bytes.
        max_readahead: u32,
        /// Low half of [`InitFlags`].
        flags: u32,
        /// Requests nobody waits for (read-ahead) that may be under way.
        max_background: u16,
        /// How many of them count as congestion.
        congestion_threshold: u16,
        /// Bytes.
        max_write: u32,
        /// Granularity of times in ns.
        time_gran: u32,
        /// Largest request in pages of 4 KiB.
        max_pages: u16,
        /// Base-2 logarithm of what offsets of mappings are a multiple of.
        map_alignment: u16,
        /// High half of [`InitFlags`].
        flags2: u32,
        max_stack_depth: u32,
        request_timeout: u16,
        unused: [u16; 11],
    }

    /// An entry of READDIR: the name and zeros up to a multiple of 8 bytes follow.
    Dirent, 24 {
        ino: u64,
        /// Cookie of the next entry.
        off: u64,
        /// Bytes.
        namelen: u32,
        /// `DT_*`.
        kind: u32,
    }

    /// An entry of READDIRPLUS: the name and zeros up to a multiple of 8 bytes follow.
    Direntplus, 152 {
        entry: EntryOut,
        dirent: Dirent,
    }

    GetattrIn, 16 {
        getattr_flags: u32,
        dummy: u32,
        fh: u64,
    }

    SetattrIn, 88 {
        /// [`Set`].
        valid: u32,
        padding: u32,
        fh: u64,
        /// Bytes.
        size: u64,
        lock_owner: u64,
        /// Seconds since the epoch, two's complement, as are the next two.
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }

    /// Followed by a name. Before 7.12 it ends after `rdev`.
    MknodIn, 16 {
        mode: u32,
        /// As in [`Attr`].
        rdev: u32,
        umask: u32,
        padding: u32,
    }

    /// Followed by a name.
    MkdirIn, 8 {
        mode: u32,
        umask: u32,
    }

    /// Followed by the old and the new name.
    RenameIn, 8 {
        newdir: u64,
    }

    /// Followed by the old and the new name.
    Rename2In, 16 {
        newdir: u64,
        /// As for `renameat2(2)`.
        flags: u32,
        padding: u32,
    }

    /// Followed by the new name.
    LinkIn, 8 {
        oldnodeid: u64,
    }

    /// CREATE and TMPFILE; followed by a name. Before 7.12 it ends after 8 bytes.
    CreateIn, 16 {
        /// As for `open(2)`.
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }

    /// Answer to CREATE and TMPFILE.
    CreateOut, 144 {
        entry: EntryOut,
        open: OpenOut,
    }

    /// RELEASE and RELEASEDIR.
    ReleaseIn, 24 {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }

    FlushIn, 24 {
        fh: u64,
        unused: u32,
        padding: u32,
        lock_owner: u64,
    }

    /// Followed by the data. Before 7.9 it ends after `write_flags`.
    WriteIn, 40 {
        fh: u64,
        offset: u64,
        /// Bytes.
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    /// Answer to WRITE and COPY_FILE_RANGE.
    WriteOut, 8 {
        /// Bytes.
        size: u32,
        padding: u32,
    }

    /// FSYNC and FSYNCDIR.
    FsyncIn, 16 {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }

    /// Followed by the name and the value. Without SETXATTR_EXT it ends after `flags`.
    SetxattrIn, 16 {
        /// Bytes of the value.
        size: u32,
        /// As for `setxattr(2)`.
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }

    FallocateIn, 32 {
        fh: u64,
        /// Bytes, as is `length`.
        offset: u64,
        length: u64,
        /// As for `fallocate(2)`.
        mode: u32,
        padding: u32,
    }

    CopyFileRangeIn, 56 {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        /// Bytes.
        len: u64,
        flags: u64,
    }

    /// Answer to COPY_FILE_RANGE_64.
    CopyFileRangeOut, 8 {
        /// Bytes.
        bytes_copied: u64,
    }

    /// Starts each extension at the end of a request.
    ExtHeader, 8 {
        /// Bytes of the extension, this header included; a multiple of 8.
        size: u32,
        kind: u32,
    }

    /// Followed by `nr_groups` numbers of 4 bytes.
    SuppGroups, 4 {
        nr_groups: u32,
    }
}
