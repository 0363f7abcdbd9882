//! Operations on open files and on what an inode is: data, size, owner, permissions, times.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid,
    chownat, copy_file_range, fallocate, fchmod, ftruncate, futimens, seek,
};
use rustix::io::Errno;

use super::Cache;
use super::calls::Calls;
use super::credentials::drop_fsetid;
use super::inode::{Handle, Inode, proc_path};
use super::request::set_of;
use crate::fuse::abi::{self, OpenFlags, Set};
use crate::fuse::file_system::FsError;
use crate::fuse::session::Terms;

/// Bytes that one request copies at most, so that it does not hold its thread for long; the guest
/// asks again for the rest. Where the host shares extents instead, it is done at once anyway.
const COPY_MAX: u64 = 128 << 20;

impl Calls {
    /// Opens a regular file for the guest.
    pub(super) fn open(
        &self,
        inode: &Inode,
        terms: &Terms,
        flags: u32,
        kill_suidgid: bool,
    ) -> Result<abi::OpenOut, FsError> {
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(FsError::IsDirectory),
            // Devices, pipes and sockets are the guest's own: its kernel does not ask.
            _ => return Err(FsError::Host(Errno::NXIO)),
        }
        let truncate = flags.cast_signed() & libc::O_TRUNC != 0;
        let mut host = open_flags(terms, flags);
        if truncate {
            host |= OFlags::TRUNC;
        }
        let _dropped = (truncate && kill_suidgid).then(drop_fsetid).transpose()?;
        let file = inode.open(host)?;
        Ok(self.open_out(self.table.open(inode.node, file)))
    }

    /// The answer to opening a file that the guest calls `fh`.
    pub(super) fn open_out(&self, fh: u64) -> abi::OpenOut {
        let mut flags = match self.cache {
            Cache::Never | Cache::Metadata => OpenFlags::DIRECT_IO,
            Cache::Auto => OpenFlags::empty(),
            Cache::Always => OpenFlags::KEEP_CACHE,
        };
        if self.local {
            flags |= OpenFlags::NO_FLUSH;
        }
        abi::OpenOut { fh, open_flags: flags.bits(), padding: 0 }
    }

    /// Writes all of `data`, or as much as there is room for.
    pub(super) fn write(
        &self,
        handle: &Handle,
        offset: u64,
        data: &[u8],
        kill_suidgid: bool,
    ) -> Result<u32, FsError> {
        let _dropped = kill_suidgid.then(drop_fsetid).transpose()?;
        let mut done = 0;
        while done < data.len() {
            let at = offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX));
            match rustix::io::pwrite(&handle.file, &data[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) if done == 0 => return Err(e.into()),
                // What was written counts; the next write gets the error.
                Err(_) => break,
            }
        }
        u32::try_from(done).map_err(|_| FsError::InvalidArgument)
    }

    pub(super) fn fallocate(
        &self,
        handle: &Handle,
        args: &abi::FallocateIn,
    ) -> Result<(), FsError> {
        let mode = FallocateFlags::from_bits(args.mode).ok_or(FsError::Host(Errno::OPNOTSUPP))?;
        Ok(fallocate(&handle.file, mode, args.offset, args.length)?)
    }

    pub(super) fn lseek(&self, handle: &Handle, offset: u64, whence: u32) -> Result<u64, FsError> {
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(FsError::InvalidArgument),
        };
        let _position = handle.listing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(seek(&handle.file, position)?)
    }

    /// Copies between two open files; returns the bytes copied, which may be fewer than asked for.
    pub(super) fn copy(
        &self,
        from: &Handle,
        to: &Handle,
        args: &abi::CopyFileRangeIn,
    ) -> Result<u64, FsError> {
        if args.flags != 0 {
            return Err(FsError::InvalidArgument);
        }
        let (mut off_in, mut off_out) = (args.off_in, args.off_out);
        let len = usize::try_from(args.len.min(COPY_MAX)).map_err(|_| FsError::InvalidArgument)?;
        let n = copy_file_range(&from.file, Some(&mut off_in), &to.file, Some(&mut off_out), len)?;
        u64::try_from(n).map_err(|_| FsError::InvalidArgument)
    }

    /// Changes what the request names, in the order in which the host's kernel would.
    pub(super) fn setattr(&self, inode: &Inode, args: &abi::SetattrIn) -> Result<(), FsError> {
        let set = set_of(args);
        let handle = match set.contains(Set::FH) {
            true => Some(self.handle(inode, args.fh)?),
            false => None,
        };
        let file = handle.as_ref().map(|handle| handle.file.as_fd());
        if set.contains(Set::MODE) {
            let mode = Mode::from_raw_mode(args.mode & 0o7777);
            match file {
                Some(file) => fchmod(file, mode)?,
                None => rustix::fs::chmod(proc_path(inode.path()?.as_fd()), mode)?,
            }
        }
        if set.intersects(Set::UID | Set::GID) {
            // All bits set means "as it is", and the kernel takes it as a number in no case.
            let uid = set.contains(Set::UID).then(|| Uid::from_raw(args.uid));
            let gid = set.contains(Set::GID).then(|| Gid::from_raw(args.gid));
            if args.uid == u32::MAX && uid.is_some() || args.gid == u32::MAX && gid.is_some() {
                return Err(FsError::InvalidArgument);
            }
            chownat(inode.path()?, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if set.contains(Set::SIZE) {
            if inode.kind != FileType::RegularFile {
                return Err(FsError::InvalidArgument);
            }
            let _dropped = set.contains(Set::KILL_SUIDGID).then(drop_fsetid).transpose()?;
            let opened: OwnedFd;
            let file = match file {
                Some(file) => file,
                None => {
                    opened = inode.open(OFlags::WRONLY | OFlags::NONBLOCK)?;
                    opened.as_fd()
                }
            };
            ftruncate(file, args.size)?;
        }
        if set.intersects(Set::ATIME | Set::MTIME) {
            let times = Timestamps {
                last_access: time(set, Set::ATIME, Set::ATIME_NOW, args.atime, args.atimensec),
                last_modification: time(
                    set,
                    Set::MTIME,
                    Set::MTIME_NOW,
                    args.mtime,
                    args.mtimensec,
                ),
            };
            match file {
                Some(file) => futimens(file, &times)?,
                None => {
                    let fd = inode.path()?;
                    let path = proc_path(fd.as_fd());
                    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::empty())?;
                }
            }
        }
        Ok(())
    }
}

/// A time as `utimensat(2)` wants it.
fn time(set: Set, given: Set, now: Set, secs: u64, nsec: u32) -> Timespec {
    let tv_nsec = if set.contains(given | now) {
        libc::UTIME_NOW
    } else if set.contains(given) {
        nsec.into()
    } else {
        libc::UTIME_OMIT
    };
    Timespec { tv_sec: secs.cast_signed(), tv_nsec }
}

/// Flags for the host's `open(2)`: of what the guest says, that which concerns data. Nothing is
/// created or cut short by them.
pub(super) fn open_flags(terms: &Terms, flags: u32) -> OFlags {
    let kept = libc::O_ACCMODE | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;
    let mut flags = OFlags::from_bits_retain((flags.cast_signed() & kept).cast_unsigned());
    if terms.writeback() {
        // The guest reads what it fills up, and knows itself where the end is.
        flags -= OFlags::APPEND;
        if flags & OFlags::ACCMODE == OFlags::WRONLY {
            flags = (flags - OFlags::ACCMODE) | OFlags::RDWR;
        }
    }
    flags | OFlags::CLOEXEC
}
