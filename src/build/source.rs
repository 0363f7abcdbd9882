//! Opening what is in the source tree.
//!
//! Directories are opened one below the other and never through a symbolic link, so a path may be
//! longer than PATH_MAX, and a directory that is replaced by a link cannot lead outside.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags, Stat, fstat, openat};

use super::error::BuildError;
use super::scan::Scanned;
use super::tree::{FileId, NodeId};

const OPEN_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
// NONBLOCK: a fifo that took the place of a file must not stop the build.
const OPEN_FILE: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// Opens directories and files of a tree; keeps the last directory open. One for each thread.
#[derive(Default)]
pub struct Cursor {
    at: Option<(NodeId, OwnedFd)>,
}

impl Cursor {
    /// Opens a directory of the tree.
    pub fn dir(&mut self, scanned: &Scanned, dir: NodeId) -> io::Result<BorrowedFd<'_>> {
        let last = self.at.take();
        let mut below = Vec::new();
        let mut id = dir;
        while id != NodeId::ROOT && last.as_ref().is_none_or(|(at, _)| *at != id) {
            below.push(id);
            id = scanned.tree.node(id).parent;
        }
        let mut fd = match last {
            Some((at, fd)) if at == id => fd,
            _ => openat(scanned.root(), ".", OPEN_DIR, Mode::empty())?,
        };
        for id in below.into_iter().rev() {
            let name = OsStr::from_bytes(&scanned.tree.node(id).name);
            fd = openat(&fd, name, OPEN_DIR, Mode::empty())?;
        }
        Ok(self.at.insert((dir, fd)).1.as_fd())
    }

    /// Opens a regular file of the tree, after making sure that it is still the one that was
    /// scanned.
    pub fn file(&mut self, scanned: &Scanned, file: FileId) -> Result<OwnedFd, BuildError> {
        let first = scanned.tree.file(file).first;
        let node = scanned.tree.node(first);
        let fd = self
            .dir(scanned, node.parent)
            .and_then(|dir| {
                Ok(openat(dir, OsStr::from_bytes(&node.name), OPEN_FILE, Mode::empty())?)
            })
            .map_err(|source| BuildError::Source {
                action: "open",
                path: scanned.path(first),
                source,
            })?;
        unchanged(scanned, file, fd.as_fd())?;
        Ok(fd)
    }
}

/// Refuses a file whose content may differ from what was scanned.
pub fn unchanged(scanned: &Scanned, file: FileId, fd: BorrowedFd<'_>) -> Result<(), BuildError> {
    let path = || scanned.path(scanned.tree.file(file).first);
    let now = fstat(fd).map_err(|e| BuildError::Source {
        action: "examine",
        path: path(),
        source: e.into(),
    })?;
    let now = Identity::of(&now);
    let was = scanned.source(file).identity;
    let what = if (now.dev, now.ino) != (was.dev, was.ino) {
        "another file has its name"
    } else if now.size != was.size {
        "its size is another"
    } else if now.mtime != was.mtime {
        "it was written to"
    } else {
        return Ok(());
    };
    Err(BuildError::Changed { path: path(), what })
}

/// What tells one state of a file's content from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    dev: u64,
    ino: u64,
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, u64),
}

impl Identity {
    pub fn of(stat: &Stat) -> Identity {
        Identity {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
        }
    }

    /// What the names of a hard-linked file have in common.
    pub fn link_key(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }
}
