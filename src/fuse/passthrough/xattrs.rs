//! Extended attributes: those of the host's file, of every name space.

use std::os::fd::AsFd;

use rustix::fs::{Mode, XattrFlags};
use rustix::io::Errno;

use super::calls::Calls;
use super::inode::{Inode, proc_path};
use super::stat::Stat;
use crate::fuse::abi;
use crate::fuse::file_system::FsError;
use crate::fuse::reply::Reply;

/// Longest value and longest list of names in bytes: `XATTR_SIZE_MAX`.
const MAX: usize = 65_536;

impl Calls {
    pub(super) fn setxattr(
        &self,
        inode: &Inode,
        name: &[u8],
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<(), FsError> {
        let flags = XattrFlags::from_bits(flags).ok_or(FsError::InvalidArgument)?;
        let fd = inode.path()?;
        let path = proc_path(fd.as_fd());
        rustix::fs::setxattr(&path, name, value, flags)?;
        if kill_sgid {
            // Whoever sets an ACL on a file of a group that it is not in loses this bit.
            let mode = Stat::of(fd.as_fd())?.attr.mode;
            if mode & libc::S_ISGID != 0 {
                let mode = Mode::from_raw_mode(mode & 0o7777 & !libc::S_ISGID);
                rustix::fs::chmod(&path, mode)?;
            }
        }
        Ok(())
    }

    /// Sends a value, or with `size` 0 its length.
    pub(super) fn getxattr(
        &self,
        inode: &Inode,
        name: &[u8],
        size: u32,
        unique: u64,
        reply: &mut Reply<'_>,
    ) -> Result<u32, FsError> {
        let fd = inode.path()?;
        let path = proc_path(fd.as_fd());
        send(size, unique, reply, |buffer| rustix::fs::getxattr(&path, name, buffer))
    }

    /// Sends all names, or with `size` 0 their length.
    pub(super) fn listxattr(
        &self,
        inode: &Inode,
        size: u32,
        unique: u64,
        reply: &mut Reply<'_>,
    ) -> Result<u32, FsError> {
        let fd = inode.path()?;
        let path = proc_path(fd.as_fd());
        send(size, unique, reply, |buffer| rustix::fs::listxattr(&path, buffer))
    }

    pub(super) fn removexattr(&self, inode: &Inode, name: &[u8]) -> Result<(), FsError> {
        let fd = inode.path()?;
        Ok(rustix::fs::removexattr(proc_path(fd.as_fd()), name)?)
    }
}

/// Sends what `read` puts into a buffer of `size` bytes; with an empty buffer it says how much it
/// would be.
fn send(
    size: u32,
    unique: u64,
    reply: &mut Reply<'_>,
    read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Result<u32, FsError> {
    let room = usize::try_from(size).unwrap_or(MAX).min(MAX);
    let mut buffer = vec![0; room];
    let len = read(&mut buffer)?;
    if size == 0 {
        let size = u32::try_from(len).map_err(|_| FsError::SmallBuffer)?;
        return Ok(reply.send(unique, &abi::GetxattrOut { size, padding: 0 }));
    }
    let bytes = buffer.get(..len).ok_or(FsError::SmallBuffer)?;
    Ok(reply.bytes(unique, bytes))
}
