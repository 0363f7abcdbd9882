//! An image as a directory tree.
//!
//! The tree is made below an open directory, one level at a time and never through a symbolic link,
//! so that no image can write elsewhere. A directory gets its attributes when all below it is done.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chmodat, chownat, linkat,
    makedev, mkdirat, mknodat, open, openat, symlinkat, utimensat,
};

use super::{Data, Target};
use crate::rafs::{FileKind, Inode, WalkItem};

const OPEN_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A tree that is being written.
pub struct Directory {
    root: OwnedFd,
    /// The directory that the last path was in, and those it is in with what they are to get.
    at: OwnedFd,
    open: Vec<Pending>,
    owners: bool,
}

/// Attributes that a directory gets at last.
struct Pending {
    name: Vec<u8>,
    attributes: Attributes,
}

/// Attributes of one path.
struct Attributes {
    is_link: bool,
    mode: u16,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Directory {
    /// Makes `path`, or takes it if it is an empty directory.
    pub fn create(path: &Path, owners: bool) -> Result<Directory> {
        let name = || path.display().to_string();
        std::fs::create_dir_all(path).with_context(name)?;
        if std::fs::read_dir(path).with_context(name)?.next().is_some() {
            bail!("{} is not empty", path.display());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty()).with_context(name)?;
        let at = openat(&root, ".", OPEN_DIR, Mode::empty()).with_context(name)?;
        Ok(Directory { root, at, open: Vec::new(), owners })
    }

    /// Goes up until `depth` directories are open, the root one of them.
    fn leave(&mut self, depth: usize) -> Result<()> {
        while self.open.len() > depth {
            let pending = self.open.pop().expect("there is one more");
            // The root has no name, and no directory that it would be in.
            let (above, name) = if self.open.is_empty() {
                (openat(&self.root, ".", OPEN_DIR, Mode::empty())?, b".".to_vec())
            } else {
                (openat(&self.at, "..", OPEN_DIR, Mode::empty())?, pending.name)
            };
            self.at = above;
            set(self.at.as_fd(), &name, &pending.attributes, self.owners)?;
        }
        Ok(())
    }

    fn make(&self, name: &OsStr, inode: &Inode<'_>, data: &mut Data<'_, '_>) -> Result<()> {
        let at = self.at.as_fd();
        // Nobody else may look at what is not complete.
        let mode = Mode::RUSR | Mode::WUSR;
        let node = |kind| {
            let (major, minor) = inode.rdev_major_minor();
            mknodat(at, name, kind, mode, makedev(major, minor))
        };
        match inode.kind() {
            FileKind::Directory => mkdirat(at, name, mode | Mode::XUSR)?,
            FileKind::Symlink => symlinkat(OsStr::from_bytes(inode.symlink_target()?), at, name)?,
            FileKind::CharDevice => node(FileType::CharacterDevice)?,
            FileKind::BlockDevice => node(FileType::BlockDevice)?,
            FileKind::Fifo => node(FileType::Fifo)?,
            FileKind::Socket => node(FileType::Socket)?,
            FileKind::Regular => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let file = std::fs::File::from(openat(at, name, flags, mode)?);
                // What is not written stays a hole.
                file.set_len(inode.size())?;
                let mut offset = 0;
                for (i, (len, zero)) in (0..).zip(data.holes(inode)?) {
                    if !zero {
                        file.write_all_at(data.chunk(inode, i)?, offset)?;
                    }
                    offset += u64::from(len);
                }
            }
        }
        Ok(())
    }
}

impl Target for Directory {
    fn add(&mut self, item: &WalkItem<'_>, data: &mut Data<'_, '_>) -> Result<()> {
        let attributes = Attributes::of(&item.inode)?;
        if item.depth == 0 {
            self.open.push(Pending { name: Vec::new(), attributes });
            return Ok(());
        }
        self.leave(item.depth)?;
        let name = OsStr::from_bytes(item.name);
        self.make(name, &item.inode, data)?;
        if item.inode.kind() == FileKind::Directory {
            self.at = openat(&self.at, name, OPEN_DIR, Mode::empty())?;
            self.open.push(Pending { name: item.name.to_vec(), attributes });
            return Ok(());
        }
        set(self.at.as_fd(), item.name, &attributes, self.owners)
    }

    fn link(&mut self, item: &WalkItem<'_>, first: &[u8]) -> Result<()> {
        self.leave(item.depth)?;
        let (from, to) = (OsStr::from_bytes(&first[1..]), OsStr::from_bytes(item.name));
        linkat(&self.root, from, &self.at, to, AtFlags::empty())
            .context("cannot link it to its first name")
    }

    fn finish(mut self) -> Result<()> {
        self.leave(0)
    }
}

impl Attributes {
    fn of(inode: &Inode<'_>) -> Result<Attributes> {
        Ok(Attributes {
            is_link: inode.kind() == FileKind::Symlink,
            mode: inode.mode() & 0o7777,
            owner: (inode.uid(), inode.gid()),
            mtime: (inode.mtime(), inode.mtime_nsec()),
            xattrs: inode.xattrs()?.map(|x| (x.full_name(), x.value.to_vec())).collect(),
        })
    }
}

/// Sets all attributes of `name` in `dir`. The owner comes first: changing it takes away modes and
/// capabilities. The time comes last.
fn set(dir: BorrowedFd<'_>, name: &[u8], want: &Attributes, owners: bool) -> Result<()> {
    let path = OsStr::from_bytes(name);
    if owners {
        let (uid, gid) = (Uid::from_raw(want.owner.0), Gid::from_raw(want.owner.1));
        chownat(dir, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .with_context(|| format!("cannot give it to {}:{}", want.owner.0, want.owner.1))?;
    }
    // There is no lsetxattrat before Linux 6.13; this spelling works for every kind of file.
    let full = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
    for (key, value) in &want.xattrs {
        xattr::set(OsStr::from_bytes(&full), OsStr::from_bytes(key), value)
            .with_context(|| format!("cannot set its attribute {}", key.escape_ascii()))?;
    }
    if !want.is_link {
        chmodat(dir, path, Mode::from_raw_mode(want.mode.into()), AtFlags::empty())
            .context("cannot set its mode")?;
    }
    let time = Timespec { tv_sec: want.mtime.0, tv_nsec: want.mtime.1.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(dir, path, &times, AtFlags::SYMLINK_NOFOLLOW).context("cannot set its time")
}
