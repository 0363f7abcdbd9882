//! Operations on names: what leads where, what is made, moved and removed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, SeekFrom, seek,
};
use rustix::io::{self, Errno};

use super::calls::Calls;
use super::credentials::{Caller, become_caller};
use super::data::open_flags;
use super::inode::{Inode, proc_path};
use super::stat::{Stat, decode_dev};
use crate::fuse::abi::{self, EntryOut};
use crate::fuse::file_system::{Call, FsError};
use crate::fuse::listing::{Name, Records};
use crate::fuse::reply::Reply;

/// Bytes of directory entries taken from the host at once.
const LIST_BYTES: usize = 32 * 1024;

impl Calls {
    /// What `name` in `dir` leads to; from now on the guest knows it. With `cached`, EAGAIN if the
    /// host would have to look on a disk.
    pub(super) fn lookup(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        name: &[u8],
        cached: bool,
    ) -> Result<Option<EntryOut>, FsError> {
        match name {
            b"." => {
                let fd = reopen(dir)?;
                let stat = Stat::of(fd.as_fd())?;
                return self.enter(call, dir, fd, &stat).map(Some);
            }
            b".." => return self.parent(call, dir).map(Some),
            _ => {}
        }
        if dir.kind != FileType::Directory {
            return Err(FsError::NotDirectory);
        }
        let fd = match find(dir, name, cached) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let stat = Stat::of(fd.as_fd())?;
        self.enter(call, dir, fd, &stat).map(Some)
    }

    /// The directory above `dir`, which the guest must know: `dir` may have been moved out of what
    /// is shared.
    fn parent(&self, call: &Call<'_>, dir: &Inode) -> Result<EntryOut, FsError> {
        if dir.kind != FileType::Directory {
            return Err(FsError::NotDirectory);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir.path()?, "..", flags, Mode::empty())?;
        let stat = Stat::of(fd.as_fd())?;
        let known = self.table.known(fd.as_fd(), &stat)?.ok_or(FsError::Stale)?;
        self.enter(call, &known, fd, &stat)
    }

    /// Tells the guest of the inode behind `fd`, found in `dir`.
    pub(super) fn enter(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        fd: OwnedFd,
        stat: &Stat,
    ) -> Result<EntryOut, FsError> {
        let inode = self.table.enter(fd, stat)?;
        let mut attr = abi::Attr { ino: self.ino(stat), ..stat.attr };
        let crossed = (inode.mount, inode.dev) != (dir.mount, dir.dev);
        if crossed && inode.kind == FileType::Directory && call.terms.submounts() {
            attr.flags = abi::ATTR_SUBMOUNT;
        }
        let valid = self.cache.valid_secs();
        Ok(EntryOut {
            nodeid: call.naming.nodeid(inode.node),
            entry_valid: valid,
            attr_valid: valid,
            attr,
            ..EntryOut::default()
        })
    }

    pub(super) fn symlink(
        &self,
        dir: &Inode,
        name: &[u8],
        target: &[u8],
        caller: &Caller,
    ) -> Result<(), FsError> {
        let fd = dir.path()?;
        let _acting = become_caller(caller)?;
        Ok(rustix::fs::symlinkat(target, fd, name)?)
    }

    pub(super) fn mknod(
        &self,
        dir: &Inode,
        name: &[u8],
        mode: u32,
        rdev: u32,
        caller: &Caller,
    ) -> Result<(), FsError> {
        let kind = match FileType::from_raw_mode(mode) {
            // A mode without a type means a regular file.
            FileType::Unknown if mode & libc::S_IFMT == 0 => FileType::RegularFile,
            FileType::Unknown | FileType::Directory | FileType::Symlink => {
                return Err(FsError::InvalidArgument);
            }
            kind => kind,
        };
        let fd = dir.path()?;
        let _acting = become_caller(caller)?;
        Ok(rustix::fs::mknodat(fd, name, kind, permissions(mode), decode_dev(rdev))?)
    }

    pub(super) fn mkdir(
        &self,
        dir: &Inode,
        name: &[u8],
        mode: u32,
        caller: &Caller,
    ) -> Result<(), FsError> {
        let fd = dir.path()?;
        let _acting = become_caller(caller)?;
        Ok(rustix::fs::mkdirat(fd, name, permissions(mode))?)
    }

    pub(super) fn link(&self, target: &Inode, dir: &Inode, name: &[u8]) -> Result<(), FsError> {
        let target = target.path()?;
        let path = proc_path(target.as_fd());
        // Through the path, so that a file without a name, of O_TMPFILE, can get one.
        let follow = AtFlags::SYMLINK_FOLLOW;
        Ok(rustix::fs::linkat(rustix::fs::CWD, path, dir.path()?, name, follow)?)
    }

    pub(super) fn unlink(&self, dir: &Inode, name: &[u8], is_dir: bool) -> Result<(), FsError> {
        self.pin(dir, name);
        let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        Ok(rustix::fs::unlinkat(dir.path()?, name, flags)?)
    }

    pub(super) fn rename(
        &self,
        from: &Inode,
        old: &[u8],
        to: &Inode,
        new: &[u8],
        flags: u32,
    ) -> Result<(), FsError> {
        let flags = RenameFlags::from_bits(flags).ok_or(FsError::InvalidArgument)?;
        if !flags.intersects(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE) {
            self.pin(to, new);
        }
        Ok(rustix::fs::renameat_with(from.path()?, old, to.path()?, new, flags)?)
    }

    /// An inode that is known by its handle only and loses this name is kept open from now on: the
    /// guest may still use it, and without a name or a descriptor the host would take it away.
    fn pin(&self, dir: &Inode, name: &[u8]) {
        let pin = || -> std::io::Result<()> {
            let fd = find(dir, name, false)?;
            let stat = Stat::of(fd.as_fd())?;
            if let Some(inode) = self.table.known(fd.as_fd(), &stat)?
                && inode.kept().is_none()
            {
                self.table.pin(&inode, fd);
            }
            Ok(())
        };
        // An error means that there is nothing to keep; what follows fails in the same way.
        let _ = pin();
    }

    /// Makes and opens a file, or opens the one that is there. Returns the answer to CREATE.
    #[allow(clippy::too_many_arguments, reason = "they are what CREATE brings")]
    pub(super) fn create(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        name: &[u8],
        flags: u32,
        mode: u32,
        kill_suidgid: bool,
        caller: &Caller,
    ) -> Result<(EntryOut, abi::OpenOut), FsError> {
        let made = {
            let fd = dir.path()?;
            let _acting = become_caller(caller)?;
            let flags =
                open_flags(&call.terms, flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            rustix::fs::openat(fd, name, flags, permissions(mode))
        };
        match made {
            Ok(file) => self.opened(call, dir, file),
            Err(Errno::EXIST) if flags.cast_signed() & libc::O_EXCL == 0 => {
                let entry = self.lookup(call, dir, name, false)?.ok_or(Errno::NOENT)?;
                let open = self
                    .inode(call, entry.nodeid)
                    .and_then(|inode| self.open(&inode, &call.terms, flags, kill_suidgid));
                if open.is_err() {
                    // The guest does not learn of it.
                    let node = call.naming.node(entry.nodeid);
                    drop(node.and_then(|node| self.table.forget(node, 1)));
                }
                Ok((entry, open?))
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Makes and opens a file without a name. Returns the answer to TMPFILE.
    ///
    /// Not in a directory that nobody may enter, which is how overlayfs makes its work directory. It
    /// would copy files up by way of TMPFILE and LINK, and some kernels (6.1.176 and 6.18.15; neither
    /// 6.12.117 nor 7.2) then go on with the dentry that had no name: once that is looked at again, the
    /// file is ESTALE. Refused here, it copies by way of MKNOD and RENAME, as it does on file systems
    /// without O_TMPFILE.
    pub(super) fn tmpfile(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        flags: u32,
        mode: u32,
        caller: &Caller,
    ) -> Result<(EntryOut, abi::OpenOut), FsError> {
        if Stat::of(dir.path()?.as_fd())?.attr.mode & 0o7777 == 0 {
            return Err(FsError::Host(Errno::OPNOTSUPP));
        }
        let file = {
            let fd = dir.path()?;
            let _acting = become_caller(caller)?;
            // Without O_EXCL, or it could never get a name; the guest's kernel keeps to it.
            let flags = open_flags(&call.terms, flags) | OFlags::TMPFILE;
            rustix::fs::openat(fd, ".", flags, permissions(mode))?
        };
        let made = self.opened(call, dir, file)?;
        // It has no name to be found by.
        if let Ok(inode) = self.inode(call, made.0.nodeid)
            && inode.kept().is_none()
        {
            let fd = inode.path()?;
            let kept = path_of(fd.as_fd())?;
            self.table.pin(&inode, kept);
        }
        Ok(made)
    }

    /// Tells the guest of a file that was just made, and keeps it open for it.
    fn opened(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        file: OwnedFd,
    ) -> Result<(EntryOut, abi::OpenOut), FsError> {
        let stat = Stat::of(file.as_fd())?;
        let entry = self.enter(call, dir, path_of(file.as_fd())?, &stat)?;
        let node = call.naming.node(entry.nodeid).ok_or(FsError::Stale)?;
        Ok((entry, self.open_out(self.table.open(node, file))))
    }

    /// Lists a directory.
    #[allow(clippy::too_many_arguments, reason = "they are what READDIR brings")]
    pub(super) fn readdir(
        &self,
        call: &Call<'_>,
        dir: &Inode,
        fh: u64,
        cookie: u64,
        size: u32,
        plus: bool,
        reply: &mut Reply<'_>,
    ) -> Result<u32, FsError> {
        let handle = self.handle(dir, fh)?;
        if dir.kind != FileType::Directory {
            return Err(FsError::NotDirectory);
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let mut out = Records::new(reply.payload(size), plus);
        let mut buffer = Vec::with_capacity(LIST_BYTES.min(size.max(4096)));
        let _position = handle.listing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        seek(&handle.file, SeekFrom::Start(cookie))?;
        let mut entries = RawDir::new(&handle.file, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let itself = matches!(name, b"." | b"..");
            // What is gone in the meantime, or cannot be looked at, is listed without attributes.
            let found = match plus && !itself {
                true => self.lookup(call, dir, name, false).ok().flatten(),
                false => None,
            };
            let kind = entry.file_type().as_raw_mode() >> 12;
            let item = Name {
                name,
                ino: found.map_or(self.numbers.number(dir.dev, entry.ino()), |e| e.attr.ino),
                kind,
                next_cookie: entry.next_entry_cookie(),
            };
            if !out.put(&item, found.as_ref()) {
                // The guest was not told of it after all.
                let node = found.and_then(|entry| call.naming.node(entry.nodeid));
                drop(node.and_then(|node| self.table.forget(node, 1)));
                break;
            }
        }
        let payload = out.into_payload().ok_or(FsError::InvalidArgument)?;
        Ok(reply.finish(call.request.header.unique, &payload))
    }
}

/// A descriptor of what `name` in `dir` leads to.
fn find(dir: &Inode, name: &[u8], cached: bool) -> io::Result<OwnedFd> {
    let fd = dir.path().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    if cached {
        resolve |= ResolveFlags::CACHED;
    }
    match rustix::fs::openat2(&fd, name, flags, Mode::empty(), resolve) {
        // A sandbox or a kernel without openat2: one component without a link leads nowhere else.
        Err(Errno::NOSYS | Errno::PERM) if cached => Err(Errno::AGAIN),
        Err(Errno::NOSYS | Errno::PERM) => rustix::fs::openat(&fd, name, flags, Mode::empty()),
        found => found,
    }
}

/// A second descriptor that only names what `fd` refers to.
fn path_of(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<OwnedFd> {
    rustix::fs::open(proc_path(fd), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

fn reopen(inode: &Inode) -> Result<OwnedFd, FsError> {
    Ok(path_of(inode.path()?.as_fd())?)
}

/// Permissions with set-id and sticky bits.
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
