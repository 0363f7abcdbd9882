//! The inodes and open files that a guest knows.
//!
//! A guest names an inode by a number of ours. Its identity on the host is mount and file handle,
//! or mount, device and inode number where there are no handles; then it is kept open, so that the
//! host does not use the number again. An inode leaves when the guest has forgotten it as often as
//! it was told about it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use rustix::fs::{FileType, Mode, OFlags};

use super::file_handle::FileHandle;
use super::stat::Stat;
use crate::fuse::mounts::NODE_BITS;

/// Number of the root directory.
pub(super) const ROOT: u64 = 1;
/// Numbers end below this.
const NODES: u64 = 1 << NODE_BITS;

/// What makes two looks at the host find the same inode.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Handle { mount: u64, handle: FileHandle },
    Number { mount: u64, dev: u64, ino: u64 },
}

/// A mounted file system of the host, kept mounted and open to handles.
#[derive(Debug)]
struct Mount {
    file: OwnedFd,
}

/// An inode that a guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) node: u64,
    /// Never changes.
    pub(super) kind: FileType,
    /// Mount and device: a name that leads elsewhere crosses into another file system.
    pub(super) mount: u64,
    pub(super) dev: u64,
    key: Key,
    /// `O_PATH`. Without one there is a handle and a mount.
    fd: OnceLock<OwnedFd>,
    by_handle: Option<Arc<Mount>>,
    /// Times the guest was told of it and has not forgotten. Changed only under the table's lock.
    lookups: AtomicU64,
}

/// A descriptor of an inode: kept, or opened for this use.
pub(super) enum PathFd<'a> {
    Kept(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for PathFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            PathFd::Kept(fd) => *fd,
            PathFd::Opened(fd) => fd.as_fd(),
        }
    }
}

impl Inode {
    /// A descriptor that only names the inode.
    pub(super) fn path(&self) -> io::Result<PathFd<'_>> {
        match self.fd.get() {
            Some(fd) => Ok(PathFd::Kept(fd.as_fd())),
            None => self.open_handle(libc::O_PATH | libc::O_NOFOLLOW).map(PathFd::Opened),
        }
    }

    /// The kept descriptor, if there is one: using it opens nothing.
    pub(super) fn kept(&self) -> Option<BorrowedFd<'_>> {
        self.fd.get().map(AsFd::as_fd)
    }

    /// Opens a regular file or directory; never anything else, as opening a device or a pipe of the
    /// host has effects there. `flags` must not create.
    pub(super) fn open(&self, flags: OFlags) -> io::Result<OwnedFd> {
        if !matches!(self.kind, FileType::RegularFile | FileType::Directory) {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        match self.fd.get() {
            Some(fd) => Ok(rustix::fs::open(proc_path(fd.as_fd()), flags, Mode::empty())?),
            None => self.open_handle(flags.bits().cast_signed()),
        }
    }

    fn open_handle(&self, flags: i32) -> io::Result<OwnedFd> {
        match (&self.key, &self.by_handle) {
            (Key::Handle { handle, .. }, Some(mount)) => handle.open(&mount.file, flags),
            _ => Err(io::Error::from_raw_os_error(libc::ESTALE)),
        }
    }
}

/// A path that leads to what `fd` refers to, whatever that is, a symbolic link included.
pub(super) fn proc_path(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// An open file or directory of a guest.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: u64,
    pub(super) file: OwnedFd,
    /// Held while the position of a directory matters.
    pub(super) listing: Mutex<()>,
}

/// All inodes and open files.
pub(super) struct Table {
    inodes: Mutex<Inodes>,
    handles: Mutex<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    /// Inodes kept open at most, where they need not be.
    keep_open: usize,
}

#[derive(Default)]
struct Inodes {
    by_node: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, u64>,
    mounts: HashMap<u64, Weak<Mount>>,
    next_node: u64,
    /// How many of them are kept open although they have a handle.
    kept: usize,
}

impl Table {
    /// A table of the root directory only, which it keeps open. Of the other inodes at most
    /// `keep_open` are, where the host's file system has handles.
    pub(super) fn new(root: OwnedFd, stat: &Stat, keep_open: usize) -> Table {
        let key = Key::Number { mount: stat.mount, dev: stat.dev, ino: stat.attr.ino };
        let root = Arc::new(Inode {
            node: ROOT,
            kind: stat.kind(),
            mount: stat.mount,
            dev: stat.dev,
            key: key.clone(),
            fd: OnceLock::from(root),
            by_handle: None,
            lookups: AtomicU64::new(1),
        });
        let inodes = Inodes {
            by_node: HashMap::from([(ROOT, root)]),
            by_key: HashMap::from([(key, ROOT)]),
            next_node: ROOT + 1,
            ..Inodes::default()
        };
        Table {
            inodes: Mutex::new(inodes),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            keep_open,
        }
    }

    fn inodes(&self) -> MutexGuard<'_, Inodes> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, Arc<Handle>>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inodes that the guest knows, the root among them.
    pub(super) fn len(&self) -> usize {
        self.inodes().by_node.len()
    }

    /// The inode that a guest calls so.
    pub(super) fn get(&self, node: u64) -> Option<Arc<Inode>> {
        self.inodes().by_node.get(&node).cloned()
    }

    /// The inode behind `fd`, an `O_PATH` descriptor, of which the guest is told now.
    pub(super) fn enter(&self, fd: OwnedFd, stat: &Stat) -> io::Result<Arc<Inode>> {
        let root = self.inodes().by_node.get(&ROOT).cloned();
        if let Some(root) = root.filter(|root| is_same(root, stat)) {
            return Ok(root);
        }
        let (mount, dev) = (stat.mount, stat.dev);
        let key = match FileHandle::of(fd.as_fd())? {
            Some(handle) => Key::Handle { mount, handle },
            None => Key::Number { mount, dev, ino: stat.attr.ino },
        };
        if let Some(inode) = self.inodes().find(&key) {
            return Ok(inode);
        }
        // Opened outside of the lock: a file system may be slow.
        let by_handle = match &key {
            Key::Handle { handle, .. } => self.mount(fd.as_fd(), stat, handle),
            Key::Number { .. } => None,
        };
        let mut inodes = self.inodes();
        if let Some(inode) = inodes.find(&key) {
            return Ok(inode);
        }
        let node = inodes.next_node;
        if node >= NODES {
            // At ten thousand new files a second this takes three years.
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        inodes.next_node += 1;
        let keep = by_handle.is_none() || inodes.kept < self.keep_open;
        if by_handle.is_some() && keep {
            inodes.kept += 1;
        }
        let inode = Arc::new(Inode {
            node,
            kind: stat.kind(),
            mount,
            dev,
            key: key.clone(),
            fd: if keep { OnceLock::from(fd) } else { OnceLock::new() },
            by_handle,
            lookups: AtomicU64::new(1),
        });
        inodes.by_node.insert(node, Arc::clone(&inode));
        inodes.by_key.insert(key, node);
        Ok(inode)
    }

    /// The inode behind `fd`, if the guest knows it already.
    pub(super) fn known(&self, fd: BorrowedFd<'_>, stat: &Stat) -> io::Result<Option<Arc<Inode>>> {
        let (mount, dev) = (stat.mount, stat.dev);
        let handle = FileHandle::of(fd)?;
        let inodes = self.inodes();
        if let Some(root) = inodes.by_node.get(&ROOT).filter(|root| is_same(root, stat)) {
            return Ok(Some(Arc::clone(root)));
        }
        let key = match handle {
            Some(handle) => Key::Handle { mount, handle },
            None => Key::Number { mount, dev, ino: stat.attr.ino },
        };
        Ok(inodes.by_key.get(&key).and_then(|node| inodes.by_node.get(node)).cloned())
    }

    /// Keeps `inode` open from now on: its last name is about to go, and with it what a handle
    /// leads to.
    pub(super) fn pin(&self, inode: &Inode, fd: OwnedFd) {
        let mut inodes = self.inodes();
        if inode.fd.set(fd).is_ok() {
            inodes.kept += 1;
        }
    }

    /// The mount of `fd`, if inodes in it can be opened by their handles, as `handle` is.
    fn mount(&self, fd: BorrowedFd<'_>, stat: &Stat, handle: &FileHandle) -> Option<Arc<Mount>> {
        let known = self.inodes().mounts.get(&stat.mount).and_then(Weak::upgrade);
        if known.is_some() {
            return known;
        }
        if !matches!(stat.kind(), FileType::RegularFile | FileType::Directory) {
            return None;
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(proc_path(fd), flags, Mode::empty()).ok()?;
        handle.open(&file, libc::O_PATH).ok()?;
        let mount = Arc::new(Mount { file });
        let mut inodes = self.inodes();
        if let Some(known) = inodes.mounts.get(&stat.mount).and_then(Weak::upgrade) {
            return Some(known);
        }
        inodes.mounts.retain(|_, mount| mount.strong_count() > 0);
        inodes.mounts.insert(stat.mount, Arc::downgrade(&mount));
        Some(mount)
    }

    /// The guest gives back `lookups` of the times it was told about `node`. What is returned need
    /// no longer be open; closing it may take long.
    #[must_use]
    pub(super) fn forget(&self, node: u64, lookups: u64) -> Option<Arc<Inode>> {
        if node == ROOT {
            return None;
        }
        let mut inodes = self.inodes();
        let inode = inodes.by_node.get(&node)?;
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(lookups);
        inode.lookups.store(left, Ordering::Relaxed);
        if left > 0 {
            return None;
        }
        let inode = inodes.by_node.remove(&node)?;
        inodes.by_key.remove(&inode.key);
        if inode.by_handle.is_some() && inode.fd.get().is_some() {
            inodes.kept -= 1;
        }
        Some(inode)
    }

    /// Forgets all but the root, and closes all files: the guest has left. What is returned need no
    /// longer be open.
    #[must_use]
    pub(super) fn clear(&self) -> (Vec<Arc<Inode>>, Vec<Arc<Handle>>) {
        let mut inodes = self.inodes();
        let root = inodes.by_node.remove(&ROOT);
        let gone = inodes.by_node.drain().map(|(_, inode)| inode).collect();
        inodes.by_key.clear();
        inodes.kept = 0;
        if let Some(root) = root {
            inodes.by_key.insert(root.key.clone(), ROOT);
            inodes.by_node.insert(ROOT, root);
        }
        drop(inodes);
        (gone, self.handles().drain().map(|(_, handle)| handle).collect())
    }

    /// Keeps an open file; returns the number by which the guest will call it.
    pub(super) fn open(&self, node: u64, file: OwnedFd) -> u64 {
        let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
        let handle = Handle { node, file, listing: Mutex::new(()) };
        self.handles().insert(fh, Arc::new(handle));
        fh
    }

    /// The open file that a guest calls `fh`, if it is one of `node`.
    pub(super) fn handle(&self, node: u64, fh: u64) -> Option<Arc<Handle>> {
        self.handles().get(&fh).filter(|handle| handle.node == node).cloned()
    }

    /// Takes an open file out. Closing it may take long.
    #[must_use]
    pub(super) fn close(&self, node: u64, fh: u64) -> Option<Arc<Handle>> {
        let mut handles = self.handles();
        handles.get(&fh).filter(|handle| handle.node == node)?;
        handles.remove(&fh)
    }
}

impl Inodes {
    /// The inode of this key, of which the guest is told once more.
    fn find(&self, key: &Key) -> Option<Arc<Inode>> {
        let inode = self.by_node.get(self.by_key.get(key)?)?;
        inode.lookups.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(inode))
    }
}

fn is_same(root: &Inode, stat: &Stat) -> bool {
    root.key == Key::Number { mount: stat.mount, dev: stat.dev, ino: stat.attr.ino }
}
