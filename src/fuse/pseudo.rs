//! Directories that nobody has made: they lead to where file systems are mounted.
//!
//! They come with the first mount below them and go with the last. A directory's number follows from
//! its path, so a guest that is inside one finds it again when it comes back, also in the daemon
//! that was started again. Guests may remember neither names nor missing names here, but attributes for
//! ever: while a host's mount has no daemon, who looks at the mountpoint must not wait for one. That is what
//! nydus-snapshotter does before it starts the next.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::abi::{self, Attr};
use super::file_system::{Entry, FileSystem, FsError};
use super::listing::{Listing, Name};
use super::mount_path::MountPath;
use super::mounts::NODE_BITS;
use super::rafs_fs::VALID_SECS;
use super::reply::Payload;
use super::wait::Pins;

/// Cookies of `.` and `..`; those of children come behind.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

/// All of them, by number. Cloning copies no directory.
#[derive(Clone)]
pub(super) struct Directories {
    dirs: HashMap<u64, Arc<Directory>>,
    next_cookie: u64,
}

#[derive(Clone)]
struct Directory {
    /// Number of the directory that holds it; the root holds itself.
    parent: u64,
    children: BTreeMap<Arc<[u8]>, (Child, u64)>,
    /// Names by cookie.
    order: BTreeMap<u64, Arc<[u8]>>,
    changed: SystemTime,
}

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Child {
    /// A directory of this kind, by number.
    Dir(u64),
    /// The root of a mounted file system, by slot.
    Mount(u32),
}

impl Directory {
    fn new(parent: u64) -> Directory {
        let changed = SystemTime::now();
        Directory { parent, children: BTreeMap::new(), order: BTreeMap::new(), changed }
    }

    fn insert(&mut self, name: &str, child: Child, cookie: u64) {
        let name: Arc<[u8]> = name.as_bytes().into();
        self.children.insert(Arc::clone(&name), (child, cookie));
        self.order.insert(cookie, name);
        self.changed = SystemTime::now();
    }

    fn remove(&mut self, name: &str) {
        if let Some((_, cookie)) = self.children.remove(name.as_bytes()) {
            self.order.remove(&cookie);
        }
        self.changed = SystemTime::now();
    }
}

impl Default for Directories {
    /// The root alone.
    fn default() -> Self {
        let root = Arc::new(Directory::new(abi::ROOT_ID));
        Directories { dirs: HashMap::from([(abi::ROOT_ID, root)]), next_cookie: DOT_DOT + 1 }
    }
}

impl Directories {
    /// Enters a mount, whose place is free, with the directories that lead to it.
    pub(super) fn add(&mut self, at: &MountPath, slot: u32) {
        let (mut node, mut path) = (abi::ROOT_ID, String::new());
        let mut names = at.names().peekable();
        while let Some(name) = names.next() {
            path.push('/');
            path.push_str(name);
            let last = names.peek().is_none();
            match self.find(node, name.as_bytes()) {
                Ok(Child::Dir(child)) if !last => node = child,
                _ if last => self.insert(node, name, Child::Mount(slot)),
                _ => {
                    let child = self.number(&path);
                    self.dirs.insert(child, Arc::new(Directory::new(node)));
                    self.insert(node, name, Child::Dir(child));
                    node = child;
                }
            }
        }
    }

    /// Lets the name of a mount lead to another one.
    pub(super) fn replace(&mut self, at: &MountPath, slot: u32) {
        if let (Some(node), Some(name)) = (self.parent_of(at), at.names().last()) {
            self.edit(node, |dir| {
                if let Some((child, _)) = dir.children.get_mut(name.as_bytes()) {
                    *child = Child::Mount(slot);
                }
                dir.changed = SystemTime::now();
            });
        }
    }

    /// Removes a mount, and the directories that are empty without it.
    pub(super) fn remove(&mut self, at: &MountPath) {
        let Some(mut node) = self.parent_of(at) else { return };
        let names: Vec<&str> = at.names().collect();
        for name in names.into_iter().rev() {
            self.edit(node, |dir| dir.remove(name));
            let Some(dir) = self.dirs.get(&node) else { return };
            if node == abi::ROOT_ID || !dir.children.is_empty() {
                return;
            }
            let parent = dir.parent;
            self.dirs.remove(&node);
            node = parent;
        }
    }

    /// The directory in which a mount is.
    pub(super) fn parent_of(&self, at: &MountPath) -> Option<u64> {
        let mut node = abi::ROOT_ID;
        let depth = at.names().count().checked_sub(1)?;
        for name in at.names().take(depth) {
            let Ok(Child::Dir(child)) = self.find(node, name.as_bytes()) else { return None };
            node = child;
        }
        Some(node)
    }

    /// What `name` in directory `node` leads to.
    pub(super) fn find(&self, node: u64, name: &[u8]) -> Result<Child, FsError> {
        let dir = self.dir(node)?;
        match name {
            b"." => Ok(Child::Dir(node)),
            b".." => Ok(Child::Dir(dir.parent)),
            _ => dir.children.get(name).map(|(child, _)| *child).ok_or(FsError::NoEntry),
        }
    }

    fn dir(&self, node: u64) -> Result<&Directory, FsError> {
        self.dirs.get(&node).map(|dir| &**dir).ok_or(FsError::Stale)
    }

    fn insert(&mut self, node: u64, name: &str, child: Child) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.edit(node, |dir| dir.insert(name, child, cookie));
    }

    fn edit(&mut self, node: u64, change: impl FnOnce(&mut Directory)) {
        if let Some(dir) = self.dirs.get_mut(&node) {
            change(Arc::make_mut(dir));
        }
    }

    /// A number for the directory at `path`, of those that nobody has.
    fn number(&self, path: &str) -> u64 {
        let hash = blake3::hash(path.as_bytes());
        let mut start = [0; 8];
        start.copy_from_slice(&hash.as_bytes()[..8]);
        let mut node = u64::from_le_bytes(start) >> (64 - NODE_BITS);
        while node <= abi::ROOT_ID || self.dirs.contains_key(&node) {
            node = (node + 1) & ((1 << NODE_BITS) - 1);
        }
        node
    }
}

impl FileSystem for Directories {
    fn name(&self) -> &str {
        "directories of mountpoints"
    }

    fn root(&self) -> u64 {
        abi::ROOT_ID
    }

    fn identity(&self) -> Option<[u8; 32]> {
        None
    }

    fn valid_secs(&self) -> u64 {
        VALID_SECS
    }

    fn immutable(&self) -> bool {
        false
    }

    fn counts_inodes(&self) -> bool {
        false
    }

    fn has_xattrs(&self) -> bool {
        false
    }

    /// Not asked: a name may lead into another file system, so the table looks names up.
    fn lookup(&self, _parent: u64, _name: &[u8]) -> Result<Option<Entry>, FsError> {
        Err(FsError::NoEntry)
    }

    fn parent(&self, node: u64) -> Result<Entry, FsError> {
        let node = self.dir(node)?.parent;
        Ok(Entry { node, attr: self.attr(node)? })
    }

    fn forget(&self, _node: u64, _lookups: u64) {}

    fn attr(&self, node: u64) -> Result<Attr, FsError> {
        let dir = self.dir(node)?;
        let time = dir.changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (secs, nsec) = (time.as_secs(), time.subsec_nanos());
        Ok(Attr {
            ino: node,
            size: 4096,
            blocks: 8,
            atime: secs,
            mtime: secs,
            ctime: secs,
            atimensec: nsec,
            mtimensec: nsec,
            ctimensec: nsec,
            mode: libc::S_IFDIR | 0o755,
            // As on btrfs: it says nothing of the directories inside, which come and go.
            nlink: 1,
            blksize: 4096,
            ..Attr::default()
        })
    }

    fn readlink(&self, node: u64) -> Result<Cow<'_, [u8]>, FsError> {
        self.dir(node)?;
        Err(FsError::WrongType)
    }

    fn open(&self, node: u64, _flags: u32) -> Result<abi::OpenOut, FsError> {
        self.dir(node)?;
        Err(FsError::IsDirectory)
    }

    fn opendir(&self, node: u64) -> Result<abi::OpenOut, FsError> {
        self.dir(node)?;
        Ok(abi::OpenOut::default())
    }

    fn read(
        &self,
        node: u64,
        _offset: u64,
        _into: &mut Payload<'_>,
        _pins: &Pins,
    ) -> Result<(), FsError> {
        self.dir(node)?;
        Err(FsError::IsDirectory)
    }

    fn lseek(&self, node: u64, _offset: u64, _whence: i32) -> Result<u64, FsError> {
        self.dir(node)?;
        Err(FsError::IsDirectory)
    }

    /// Without attributes: a guest asks for each name anyway.
    fn readdir(&self, node: u64, cookie: u64, out: &mut Listing<'_>) -> Result<(), FsError> {
        let dir = self.dir(node)?;
        let kind = libc::DT_DIR.into();
        for (name, ino, next_cookie) in [(&b"."[..], node, DOT), (b"..", dir.parent, DOT_DOT)] {
            if cookie < next_cookie && !out.put(&Name { name, ino, kind, next_cookie }, None) {
                return Ok(());
            }
        }
        let Some(from) = cookie.max(DOT_DOT).checked_add(1) else { return Ok(()) };
        for (&next_cookie, name) in dir.order.range(from..) {
            let ino = match dir.children.get(name) {
                Some((Child::Dir(node), _)) => *node,
                Some((Child::Mount(slot), _)) => u64::from(*slot) << NODE_BITS,
                None => continue,
            };
            if !out.put(&Name { name, ino, kind, next_cookie }, None) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn statfs(&self) -> abi::StatfsOut {
        abi::StatfsOut { bsize: 4096, namelen: 255, frsize: 4096, ..Default::default() }
    }

    fn access(&self, node: u64, mask: u32) -> Result<(), FsError> {
        self.dir(node)?;
        match mask.cast_signed() & libc::W_OK {
            0 => Ok(()),
            _ => Err(FsError::ReadOnly),
        }
    }

    fn getxattr(&self, node: u64, _name: &[u8]) -> Result<Cow<'_, [u8]>, FsError> {
        self.dir(node)?;
        Err(FsError::NoAttribute)
    }

    fn listxattr(&self, node: u64, _each: &mut dyn FnMut(&str, &[u8])) -> Result<(), FsError> {
        self.dir(node).map(drop)
    }
}
