//! The source tree as it was when it was scanned: names, attributes, hard links; no file data.
//!
//! Nodes are numbered as nydus-image does: all children of a directory, in byte order of their
//! names, then the sub-directories are entered in that order. Data is stored and inode numbers are
//! given in this order.
//!
//! Memory: about 120 bytes and the name for each path, 80 more for each regular file.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, major, minor, open, readlinkat, statat,
};
use rustix::io::Errno;

use super::error::BuildError;
use super::source::{Cursor, Identity};
use super::whiteout::WhiteoutSpec;
use super::xattrs::{self, Xattr};
use crate::rafs::layout::{NAME_MAX, SYMLINK_MAX};

/// Position of a path in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u32);

impl NodeId {
    pub const ROOT: NodeId = NodeId(0);

    pub fn index(self) -> usize {
        self.0 as usize
    }

    pub fn number(self) -> u32 {
        self.0
    }
}

/// Position of a regular file in the tree's list of them; its names share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId(u32);

impl FileId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One path.
pub struct Node {
    /// The root is its own parent.
    pub parent: NodeId,
    /// Empty for the root.
    pub name: Box<[u8]>,
    /// Type and permission bits, as `st_mode`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// Sorted by full name; of the names of a hard-linked file only the first carries them.
    pub xattrs: Box<[Xattr]>,
    pub kind: Kind,
}

/// What a path is.
pub enum Kind {
    /// The children are nodes with consecutive ids, in byte order of their names.
    Dir {
        children: Range<u32>,
    },
    File(FileId),
    Symlink(Box<[u8]>),
    /// Device, fifo or socket. `rdev` in the kernel's new encoding, 0 for fifos and sockets.
    Special {
        rdev: u32,
    },
}

/// One regular file, whatever the number of its names.
pub struct File {
    /// The first of its names in the order of the tree.
    pub first: NodeId,
    /// Names it has in the tree.
    pub names: u32,
    pub identity: Identity,
    /// False if the file system says that all of it is allocated.
    pub may_have_holes: bool,
}

/// A scanned source tree.
pub struct Tree {
    path: PathBuf,
    root: OwnedFd,
    nodes: Vec<Node>,
    files: Vec<File>,
}

impl Tree {
    /// Scans the directory `path`; `progress` counts the paths.
    pub fn scan(
        path: &Path,
        whiteouts: WhiteoutSpec,
        progress: &ProgressBar,
    ) -> Result<Tree, BuildError> {
        let fail = |e: Errno| BuildError::Source {
            action: "open the directory",
            path: path.to_owned(),
            source: e.into(),
        };
        // The source itself may be named by a symbolic link.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty()).map_err(fail)?;
        let stat = fstat(&root).map_err(fail)?;
        let mut scan = Scan {
            tree: Tree { path: path.to_owned(), root, nodes: Vec::new(), files: Vec::new() },
            links: HashMap::new(),
            whiteouts,
        };
        scan.add_root(&stat)?;
        let mut cursor = Cursor::default();
        let mut to_enter = vec![NodeId::ROOT];
        while let Some(dir) = to_enter.pop() {
            let children = scan.enter(&mut cursor, dir)?;
            progress.inc(children.len() as u64);
            let nodes = &scan.tree.nodes;
            to_enter.extend(
                children
                    .rev()
                    .map(NodeId)
                    .filter(|id| matches!(nodes[id.index()].kind, Kind::Dir { .. })),
            );
        }
        Ok(scan.tree)
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Number of paths, the root among them.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All paths in the order of the tree.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        let count = u32::try_from(self.nodes.len()).expect("checked when nodes are added");
        (0..count).map(NodeId)
    }

    pub fn file(&self, id: FileId) -> &File {
        &self.files[id.index()]
    }

    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Regular files in the order of their first names.
    pub fn file_ids(&self) -> impl Iterator<Item = FileId> + use<> {
        let count = u32::try_from(self.files.len()).expect("no more files than nodes");
        (0..count).map(FileId)
    }

    /// Ids of the children of a directory; empty for anything else.
    pub fn children(&self, id: NodeId) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        match &self.node(id).kind {
            Kind::Dir { children } => children.clone().map(NodeId),
            _ => (0..0).map(NodeId),
        }
    }

    pub fn is_dir(&self, id: NodeId) -> bool {
        matches!(self.node(id).kind, Kind::Dir { .. })
    }

    /// The node that carries the inode of `id`: itself, or the first name of a hard-linked file.
    pub fn inode_of(&self, id: NodeId) -> NodeId {
        match self.node(id).kind {
            Kind::File(file) => self.file(file).first,
            _ => id,
        }
    }

    /// Everything below a directory, which are consecutive nodes.
    pub fn below(&self, id: NodeId) -> impl Iterator<Item = NodeId> + use<> {
        let start = match &self.node(id).kind {
            Kind::Dir { children } => children.start,
            _ => 0,
        };
        let mut end = start;
        let mut last = Some(id);
        while let Some(dir) = last {
            if let Kind::Dir { children } = &self.node(dir).kind {
                end = children.end;
            }
            last = self.children(dir).rev().find(|&child| self.is_dir(child));
        }
        (start..end).map(NodeId)
    }

    /// What a directory lists, `.` and `..` among it, in byte order of the names.
    pub fn entries(&self, dir: NodeId) -> Vec<(&[u8], NodeId)> {
        let mut entries: Vec<(&[u8], NodeId)> =
            self.children(dir).map(|child| (&*self.node(child).name, child)).collect();
        for (name, id) in [(&b"."[..], dir), (b"..", self.node(dir).parent)] {
            let at = entries.partition_point(|(other, _)| *other < name);
            entries.insert(at, (name, id));
        }
        entries
    }

    /// The child of a directory with this name.
    pub fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        let Kind::Dir { children } = &self.node(dir).kind else { return None };
        let nodes = &self.nodes[children.start as usize..children.end as usize];
        let at = nodes.binary_search_by(|node| (*node.name).cmp(name)).ok()?;
        Some(NodeId(children.start + u32::try_from(at).ok()?))
    }

    /// Path in the source, for messages.
    pub fn path(&self, id: NodeId) -> PathBuf {
        let mut names = Vec::new();
        let mut at = id;
        while at != NodeId::ROOT {
            names.push(OsStr::from_bytes(&self.node(at).name));
            at = self.node(at).parent;
        }
        let mut path = self.path.clone();
        path.extend(names.into_iter().rev());
        path
    }
}

/// A scan on its way.
struct Scan {
    tree: Tree,
    /// Regular files with more than one name.
    links: HashMap<(u64, u64), FileId>,
    whiteouts: WhiteoutSpec,
}

impl Scan {
    fn add_root(&mut self, stat: &Stat) -> Result<(), BuildError> {
        let xattrs = read_xattrs(self.tree.root(), b".", self.whiteouts)
            .map_err(|e| e.at(&self.tree.path))?;
        self.add(NodeId::ROOT, Box::default(), stat, xattrs, Kind::Dir { children: 0..0 })
    }

    fn add(
        &mut self,
        parent: NodeId,
        name: Box<[u8]>,
        stat: &Stat,
        xattrs: Box<[Xattr]>,
        kind: Kind,
    ) -> Result<(), BuildError> {
        if self.tree.nodes.len() >= u32::MAX as usize {
            return Err(BuildError::Limit {
                what: "the number of paths",
                limit: u32::MAX.into(),
                advice: "",
            });
        }
        self.tree.nodes.push(Node {
            parent,
            name,
            mode: u16::try_from(stat.st_mode & 0xFFFF).expect("masked"),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs,
            kind,
        });
        Ok(())
    }

    /// Adds the children of a directory; their ids.
    fn enter(&mut self, cursor: &mut Cursor, dir: NodeId) -> Result<Range<u32>, BuildError> {
        let fail = |tree: &Tree, source: io::Error| BuildError::Source {
            action: "read the directory",
            path: tree.path(dir),
            source,
        };
        let fd = cursor.dir(&self.tree, dir).map_err(|e| fail(&self.tree, e))?;
        let mut names = Vec::new();
        for entry in Dir::read_from(fd).map_err(|e| fail(&self.tree, e.into()))? {
            let entry = entry.map_err(|e| fail(&self.tree, e.into()))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(Box::<[u8]>::from(name));
            }
        }
        names.sort_unstable();

        let start = self.next_id();
        for name in names {
            self.add_child(fd, dir, name)?;
        }
        let children = start..self.next_id();
        self.tree.nodes[dir.index()].kind = Kind::Dir { children: children.clone() };
        Ok(children)
    }

    fn next_id(&self) -> u32 {
        u32::try_from(self.tree.nodes.len()).expect("checked when nodes are added")
    }

    fn add_child(
        &mut self,
        dir_fd: BorrowedFd<'_>,
        dir: NodeId,
        name: Box<[u8]>,
    ) -> Result<(), BuildError> {
        let path = |tree: &Tree| {
            let mut path = tree.path(dir);
            path.push(OsStr::from_bytes(&name));
            path
        };
        let fail = |tree: &Tree, action, e: Errno| BuildError::Source {
            action,
            path: path(tree),
            source: e.into(),
        };
        let os_name = OsStr::from_bytes(&name);
        let stat = statat(dir_fd, os_name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| fail(&self.tree, "examine", e))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if self.whiteouts.is_whiteout(&name, file_type, stat.st_rdev) {
            return Ok(());
        }
        if name.len() > NAME_MAX {
            return Err(BuildError::Unsupported {
                path: path(&self.tree),
                reason: format!("the name has {} bytes, RAFS allows {NAME_MAX}", name.len()),
            });
        }
        let (kind, first_name) = match file_type {
            FileType::Directory => (Kind::Dir { children: 0..0 }, true),
            FileType::RegularFile => {
                let (file, first) = self.add_file(&stat);
                (Kind::File(file), first)
            }
            FileType::Symlink => {
                let target = readlinkat(dir_fd, os_name, Vec::new())
                    .map_err(|e| fail(&self.tree, "read the link", e))?
                    .into_bytes();
                if target.is_empty() || target.len() as u64 > SYMLINK_MAX {
                    return Err(BuildError::Unsupported {
                        path: path(&self.tree),
                        reason: format!("the link's target has {} bytes", target.len()),
                    });
                }
                (Kind::Symlink(target.into()), true)
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                (Kind::Special { rdev: encode_rdev(stat.st_rdev) }, true)
            }
            FileType::Fifo | FileType::Socket => (Kind::Special { rdev: 0 }, true),
            FileType::Unknown => {
                return Err(BuildError::Unsupported {
                    path: path(&self.tree),
                    reason: format!("unknown type of file, mode {:o}", stat.st_mode),
                });
            }
        };
        let xattrs = if first_name {
            read_xattrs(dir_fd, &name, self.whiteouts).map_err(|e| e.at(&path(&self.tree)))?
        } else {
            Box::default()
        };
        self.add(dir, name, &stat, xattrs, kind)
    }

    /// The file that the next node names, and whether this is its first name.
    fn add_file(&mut self, stat: &Stat) -> (FileId, bool) {
        let identity = Identity::of(stat);
        let new = FileId(u32::try_from(self.tree.files.len()).expect("no more files than nodes"));
        if stat.st_nlink > 1 {
            let file = *self.links.entry(identity.link_key()).or_insert(new);
            if file != new {
                self.tree.files[file.index()].names += 1;
                return (file, false);
            }
        }
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        self.tree.files.push(File {
            first: NodeId(self.next_id()),
            names: 1,
            identity,
            may_have_holes: allocated < identity.size,
        });
        (new, true)
    }
}

/// The kernel's new encoding of a device number.
fn encode_rdev(rdev: u64) -> u32 {
    let (major, minor) = (major(rdev), minor(rdev));
    (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xF_FF00) << 12
}

/// Why the attributes of a file cannot be had.
enum XattrFailure {
    Read(io::Error),
    Unsupported(String),
}

impl XattrFailure {
    fn at(self, path: &Path) -> BuildError {
        let path = path.to_owned();
        match self {
            XattrFailure::Read(source) => {
                BuildError::Source { action: "read the extended attributes of", path, source }
            }
            XattrFailure::Unsupported(reason) => BuildError::Unsupported { path, reason },
        }
    }
}

/// The attributes of `name` in the directory `dir`, sorted, without whiteout marks.
fn read_xattrs(
    dir: BorrowedFd<'_>,
    name: &[u8],
    whiteouts: WhiteoutSpec,
) -> Result<Box<[Xattr]>, XattrFailure> {
    // There is no llistxattrat before Linux 6.13; this spelling works for every kind of file.
    let mut path = OsString::from(format!("/proc/self/fd/{}/", dir.as_raw_fd())).into_vec();
    path.extend_from_slice(name);
    let path = PathBuf::from(OsString::from_vec(path));
    let list = match xattr::list(&path) {
        Ok(list) => list,
        Err(e) if e.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
            return Ok(Box::default());
        }
        Err(e) => return Err(XattrFailure::Read(e)),
    };
    let mut names: Vec<OsString> = list.collect();
    if names.is_empty() {
        return Ok(Box::default());
    }
    names.sort_unstable();
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        let value = xattr::get(&path, &name)
            .and_then(|value| value.ok_or_else(|| Errno::NODATA.into()))
            .map_err(XattrFailure::Read)?;
        if whiteouts.is_opaque_mark(name.as_bytes(), &value) {
            continue;
        }
        found.push(Xattr::new(name.as_bytes(), value).map_err(XattrFailure::Unsupported)?);
    }
    if xattrs::count_field(xattrs::area_len(&found)).is_none() {
        let len = xattrs::area_len(&found);
        return Err(XattrFailure::Unsupported(format!(
            "its extended attributes need {len} bytes, RAFS allows 262148"
        )));
    }
    Ok(found.into())
}
