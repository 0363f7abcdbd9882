//! A request, done: which system calls answer it.
//!
//! [`Calls::answer`] may wait for the host; [`Calls::quick`] answers what certainly does not.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, fdatasync, fsync, syncfs};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::Cache;
use super::inode::{Handle, Inode, Table};
use super::request::Ask;
use super::stat::{InodeNumbers, Stat};
use crate::fuse::abi::{self, Attr, EntryOut};
use crate::fuse::file_system::{Call, FsError};
use crate::fuse::reply::Reply;

/// Everything that system calls are made with.
pub(super) struct Calls {
    pub(super) cache: Cache,
    pub(super) numbers: InodeNumbers,
    /// The root is on a file system of this machine.
    pub(super) local: bool,
    pub(super) root_dev: u64,
    pub(super) table: Table,
}

impl Calls {
    /// Answers a request, and may wait for the host to do so. Returns the bytes written.
    pub(super) fn answer(
        &self,
        call: &Call<'_>,
        ask: &Ask<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<u32, FsError> {
        let unique = call.request.header.unique;
        let inode = self.inode(call, call.request.header.nodeid)?;
        let done = |reply: &mut Reply<'_>| reply.done(unique);
        Ok(match *ask {
            Ask::Lookup { name } => {
                let entry = self.lookup(call, &inode, name, false)?;
                self.send_entry(call, entry.as_ref(), reply)
            }
            Ask::Getattr { fh } => self.send_attr(call, &self.stat(&inode, fh)?, reply),
            Ask::Statx { fh } => {
                let stat = self.stat(&inode, fh)?;
                let ino = self.ino(&stat);
                let attr_valid = self.cache.valid_secs();
                let out = abi::StatxOut { attr_valid, stat: stat.statx(ino), ..Default::default() };
                reply.send(unique, &out)
            }
            Ask::Setattr(ref args) => {
                self.setattr(&inode, args)?;
                let fh = (args.valid & abi::Set::FH.bits() != 0).then_some(args.fh);
                self.send_attr(call, &self.stat(&inode, fh)?, reply)
            }
            Ask::Readlink => {
                if inode.kind != FileType::Symlink {
                    return Err(FsError::WrongType);
                }
                let target = rustix::fs::readlinkat(inode.path()?, "", Vec::new())?;
                reply.bytes(unique, target.as_bytes())
            }
            Ask::Symlink { name, target, ref caller } => {
                self.symlink(&inode, name, target, caller)?;
                self.send_made(call, &inode, name, reply)?
            }
            Ask::Mknod { name, mode, rdev, ref caller } => {
                self.mknod(&inode, name, mode, rdev, caller)?;
                self.send_made(call, &inode, name, reply)?
            }
            Ask::Mkdir { name, mode, ref caller } => {
                self.mkdir(&inode, name, mode, caller)?;
                self.send_made(call, &inode, name, reply)?
            }
            Ask::Link { nodeid, name } => {
                let target = self.inode(call, nodeid)?;
                self.link(&target, &inode, name)?;
                self.send_made(call, &inode, name, reply)?
            }
            Ask::Unlink { name } => {
                self.unlink(&inode, name, false)?;
                done(reply)
            }
            Ask::Rmdir { name } => {
                self.unlink(&inode, name, true)?;
                done(reply)
            }
            Ask::Rename { newdir, flags, old, new } => {
                let to = self.inode(call, newdir)?;
                self.rename(&inode, old, &to, new, flags)?;
                done(reply)
            }
            Ask::Open { flags, kill_suidgid } => {
                reply.send(unique, &self.open(&inode, &call.terms, flags, kill_suidgid)?)
            }
            Ask::Create { name, flags, mode, kill_suidgid, ref caller } => {
                let made = self.create(call, &inode, name, flags, mode, kill_suidgid, caller)?;
                self.send_created(call, made, reply)
            }
            Ask::Tmpfile { flags, mode, ref caller } => {
                let made = self.tmpfile(call, &inode, flags, mode, caller)?;
                self.send_created(call, made, reply)
            }
            Ask::Read { fh, offset, size } => {
                let handle = self.handle(&inode, fh)?;
                let len = usize::try_from(size).unwrap_or(usize::MAX);
                let mut payload = reply.payload(len);
                payload.put_file(handle.file.as_fd(), offset, len)?;
                reply.finish(unique, &payload)
            }
            Ask::Write { fh, offset, data, kill_suidgid } => {
                let size = self.write(&*self.handle(&inode, fh)?, offset, data, kill_suidgid)?;
                reply.send(unique, &abi::WriteOut { size, padding: 0 })
            }
            Ask::Flush { fh } => {
                // Closing a copy reports what a network file system could not write.
                let copy = rustix::io::dup(&self.handle(&inode, fh)?.file)?;
                // SAFETY: the descriptor was made above and is given up here.
                let failed = unsafe {
                    use std::os::fd::IntoRawFd;
                    libc::close(copy.into_raw_fd()) < 0
                };
                if failed {
                    return Err(io::Error::last_os_error().into());
                }
                done(reply)
            }
            Ask::Fsync { fh, data_only } => {
                let handle = self.handle(&inode, fh)?;
                if data_only { fdatasync(&handle.file) } else { fsync(&handle.file) }?;
                done(reply)
            }
            Ask::Opendir => {
                let file = inode.open(OFlags::RDONLY | OFlags::DIRECTORY)?;
                let fh = self.table.open(inode.node, file);
                let open_flags = match self.cache {
                    Cache::Always => {
                        (abi::OpenFlags::CACHE_DIR | abi::OpenFlags::KEEP_CACHE).bits()
                    }
                    _ => 0,
                };
                reply.send(unique, &abi::OpenOut { fh, open_flags, padding: 0 })
            }
            Ask::Readdir { fh, cookie, size, plus } => {
                self.readdir(call, &inode, fh, cookie, size, plus, reply)?
            }
            Ask::Statfs => {
                let out = statfs(&inode)?;
                let len = if call.terms.minor() < 4 { 48 } else { size_of::<abi::StatfsOut>() };
                reply.bytes(unique, &out.as_bytes()[..len])
            }
            Ask::Syncfs => {
                syncfs(inode.open(OFlags::RDONLY)?)?;
                done(reply)
            }
            // Identities are checked by the guest's kernel.
            Ask::Access => {
                self.stat(&inode, None)?;
                done(reply)
            }
            Ask::Setxattr { name, value, flags, kill_sgid } => {
                self.setxattr(&inode, name, value, flags, kill_sgid)?;
                done(reply)
            }
            Ask::Getxattr { name, size } => self.getxattr(&inode, name, size, unique, reply)?,
            Ask::Listxattr { size } => self.listxattr(&inode, size, unique, reply)?,
            Ask::Removexattr { name } => {
                self.removexattr(&inode, name)?;
                done(reply)
            }
            Ask::Fallocate(ref args) => {
                self.fallocate(&*self.handle(&inode, args.fh)?, args)?;
                done(reply)
            }
            Ask::Lseek { fh, offset, whence } => {
                let offset = self.lseek(&*self.handle(&inode, fh)?, offset, whence)?;
                reply.send(unique, &abi::LseekOut { offset })
            }
            Ask::Copy { ref args, wide } => {
                let from = self.handle(&inode, args.fh_in)?;
                let to = self.handle(&*self.inode(call, args.nodeid_out)?, args.fh_out)?;
                let bytes_copied = self.copy(&from, &to, args)?;
                match u32::try_from(bytes_copied) {
                    Ok(size) if !wide => reply.send(unique, &abi::WriteOut { size, padding: 0 }),
                    _ => reply.send(unique, &abi::CopyFileRangeOut { bytes_copied }),
                }
            }
            Ask::Release { .. } => done(reply),
            Ask::Unknown => return Err(FsError::Unknown),
        })
    }

    /// Answers a request if that is certain to wait for nobody.
    pub(super) fn quick(
        &self,
        call: &Call<'_>,
        ask: &Ask<'_>,
        reply: &mut Reply<'_>,
    ) -> Option<Result<u32, FsError>> {
        match *ask {
            Ask::Unknown => return Some(Err(FsError::Unknown)),
            // No delayed errors there.
            Ask::Flush { .. } if self.local => {
                return Some(Ok(reply.done(call.request.header.unique)));
            }
            _ => {}
        }
        let inode = match self.inode(call, call.request.header.nodeid) {
            Ok(inode) => inode,
            Err(error) => return Some(Err(error)),
        };
        if inode.dev != self.root_dev || !self.local {
            return None;
        }
        match *ask {
            Ask::Getattr { fh } if fh.is_some() || inode.kept().is_some() => {
                Some(self.stat(&inode, fh).map(|stat| self.send_attr(call, &stat, reply)))
            }
            Ask::Lookup { name } if inode.kept().is_some() => {
                match self.lookup(call, &inode, name, true) {
                    Ok(entry) => Some(Ok(self.send_entry(call, entry.as_ref(), reply))),
                    // Not in the host's memory.
                    Err(FsError::Host(Errno::AGAIN)) => None,
                    Err(error) => Some(Err(error)),
                }
            }
            Ask::Read { fh, offset, size } => {
                let handle = match self.handle(&inode, fh) {
                    Ok(handle) => handle,
                    Err(error) => return Some(Err(error)),
                };
                let len = usize::try_from(size).unwrap_or(usize::MAX);
                let mut payload = reply.payload(len);
                let unique = call.request.header.unique;
                let read = payload.put_cached(handle.file.as_fd(), offset, len);
                read.is_ok().then(|| Ok(reply.finish(unique, &payload)))
            }
            Ask::Open { flags, kill_suidgid }
                if inode.kept().is_some() && flags.cast_signed() & libc::O_TRUNC == 0 =>
            {
                let open = self.open(&inode, &call.terms, flags, kill_suidgid);
                Some(open.map(|open| reply.send(call.request.header.unique, &open)))
            }
            _ => None,
        }
    }

    /// The inode that a guest means.
    pub(super) fn inode(&self, call: &Call<'_>, nodeid: u64) -> Result<Arc<Inode>, FsError> {
        // A node of another file system: nothing can be moved or linked from there to here.
        let node = call.naming.node(nodeid).ok_or(FsError::Host(Errno::XDEV))?;
        self.table.get(node).ok_or(FsError::Stale)
    }

    pub(super) fn handle(&self, inode: &Inode, fh: u64) -> Result<Arc<Handle>, FsError> {
        self.table.handle(inode.node, fh).ok_or(FsError::Host(Errno::BADF))
    }

    pub(super) fn attr(&self, node: u64) -> Result<Attr, FsError> {
        let inode = self.table.get(node).ok_or(FsError::Stale)?;
        let stat = self.stat(&inode, None)?;
        Ok(Attr { ino: self.numbers.number(stat.dev, stat.attr.ino), ..stat.attr })
    }

    /// What the host says of an inode, by way of an open file if the guest has one: it may have no
    /// name any more.
    pub(super) fn stat(&self, inode: &Inode, fh: Option<u64>) -> Result<Stat, FsError> {
        if let Some(handle) = fh.and_then(|fh| self.table.handle(inode.node, fh)) {
            return Ok(Stat::of(handle.file.as_fd())?);
        }
        Ok(Stat::of(inode.path()?.as_fd())?)
    }

    /// The inode number that guests see.
    pub(super) fn ino(&self, stat: &Stat) -> u64 {
        self.numbers.number(stat.dev, stat.attr.ino)
    }

    fn send_attr(&self, call: &Call<'_>, stat: &Stat, reply: &mut Reply<'_>) -> u32 {
        let attr = Attr { ino: self.ino(stat), ..stat.attr };
        let attr_valid = self.cache.valid_secs();
        let out = abi::AttrOut { attr_valid, attr, ..Default::default() };
        let len = if call.terms.minor() < 9 { 96 } else { size_of::<abi::AttrOut>() };
        reply.bytes(call.request.header.unique, &out.as_bytes()[..len])
    }

    /// Sends what a name leads to. That there is nothing may not be remembered: the host may make
    /// it, or mount something there, at any time.
    fn send_entry(&self, call: &Call<'_>, entry: Option<&EntryOut>, reply: &mut Reply<'_>) -> u32 {
        let unique = call.request.header.unique;
        let Some(entry) = entry else { return reply.error(unique, libc::ENOENT) };
        let len = if call.terms.minor() < 9 { 120 } else { size_of::<EntryOut>() };
        reply.bytes(unique, &entry.as_bytes()[..len])
    }

    /// Sends what was just made.
    fn send_made(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        name: &[u8],
        reply: &mut Reply<'_>,
    ) -> Result<u32, FsError> {
        let entry = self.lookup(call, dir, name, false)?;
        Ok(self.send_entry(call, entry.as_ref(), reply))
    }

    fn send_created(
        &self,
        call: &Call<'_>,
        (entry, open): (EntryOut, abi::OpenOut),
        reply: &mut Reply<'_>,
    ) -> u32 {
        let unique = call.request.header.unique;
        if call.terms.minor() < 9 {
            return reply.bytes(unique, &[&entry.as_bytes()[..120], open.as_bytes()].concat());
        }
        reply.send(unique, &abi::CreateOut { entry, open })
    }
}

fn statfs(inode: &Inode) -> Result<abi::StatfsOut, FsError> {
    let statfs = rustix::fs::fstatvfs(inode.path()?)?;
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Ok(abi::StatfsOut {
        blocks: statfs.f_blocks,
        bfree: statfs.f_bfree,
        bavail: statfs.f_bavail,
        files: statfs.f_files,
        ffree: statfs.f_ffree,
        bsize: small(statfs.f_bsize),
        namelen: small(statfs.f_namemax),
        frsize: small(statfs.f_frsize),
        ..Default::default()
    })
}
