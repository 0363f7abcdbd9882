//! The tree of an image: names, attributes, hard links; no file data.
//!
//! Nodes are numbered as nydus-image does: all children of a directory, in byte order of their
//! names, then the sub-directories are entered in that order. Data is stored and inode numbers are
//! given in this order.
//!
//! Memory: about 120 bytes and the name for each path, 32 more for each regular file.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::error::BuildError;
use super::xattrs::Xattr;
use crate::rafs::layout::{ChunkAddr, LayerMark};

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

    /// The file's data, in a tree whose files have it in their own order.
    pub fn data(self) -> DataId {
        DataId(self.0)
    }
}

/// Position of a file's chunks in [`FileChunks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DataId(u32);

impl DataId {
    /// The data of the `n`-th file.
    pub fn new(n: usize) -> Result<DataId, BuildError> {
        u32::try_from(n).map(DataId).map_err(|_| too_many_paths())
    }

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
    /// What a layer that is not merged yet says about the path.
    pub mark: LayerMark,
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
    /// Bytes.
    pub size: u64,
    pub data: DataId,
}

/// Which chunks each file consists of. Memory: 8 bytes for each chunk, 8 for each file.
#[derive(Debug, Default)]
pub struct FileChunks {
    /// Chunks of all files in the order in which they were found.
    all: Vec<ChunkAddr>,
    /// Start of each file's in `all`.
    start: Vec<usize>,
}

impl FileChunks {
    /// The chunks of a file with `count` of them.
    pub fn of(&self, data: DataId, count: usize) -> &[ChunkAddr] {
        if count == 0 {
            return &[];
        }
        let start = self.start[data.index()];
        &self.all[start..start + count]
    }

    pub fn of_mut(&mut self, data: DataId, count: usize) -> &mut [ChunkAddr] {
        if count == 0 {
            return &mut [];
        }
        let start = self.start[data.index()];
        &mut self.all[start..start + count]
    }

    /// The chunks that are added from here on are those of this file.
    pub fn begin(&mut self, data: DataId) {
        if self.start.len() <= data.index() {
            self.start.resize(data.index() + 1, 0);
        }
        self.start[data.index()] = self.all.len();
    }

    pub fn push(&mut self, chunk: ChunkAddr) {
        self.all.push(chunk);
    }

    /// Number of chunks of all files, shared ones counted for each use.
    pub fn total(&self) -> usize {
        self.all.len()
    }

    /// Number of files that are known.
    pub fn files(&self) -> usize {
        self.start.len()
    }

    /// Adds the files of `other`, whose numbers grow by `files`, at least [`FileChunks::files`].
    pub fn append(&mut self, other: FileChunks, files: usize) {
        self.start.resize(files, 0);
        let shift = self.all.len();
        self.start.extend(other.start.into_iter().map(|start| start + shift));
        self.all.extend(other.all);
    }

    /// All chunks, to be told other devices.
    pub fn all_mut(&mut self) -> &mut [ChunkAddr] {
        &mut self.all
    }
}

/// All paths of an image.
#[derive(Default)]
pub struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) files: Vec<File>,
}

impl Tree {
    /// The id that the next node gets.
    pub(super) fn next_id(&self) -> u32 {
        u32::try_from(self.nodes.len()).expect("checked when nodes are added")
    }

    pub(super) fn next_node(&self) -> NodeId {
        NodeId(self.next_id())
    }

    /// The id that the next file gets.
    pub(super) fn next_file(&self) -> FileId {
        FileId(u32::try_from(self.files.len()).expect("no more files than nodes"))
    }

    pub(super) fn add(&mut self, node: Node) -> Result<NodeId, BuildError> {
        let id = u32::try_from(self.nodes.len())
            .ok()
            .filter(|&id| id < u32::MAX)
            .ok_or_else(too_many_paths)?;
        self.nodes.push(node);
        Ok(NodeId(id))
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
        (0..self.next_id()).map(NodeId)
    }

    /// The file of this data, in a tree whose files have it in their own order.
    pub fn file_at(&self, data: DataId) -> FileId {
        FileId(data.0)
    }

    pub fn file(&self, id: FileId) -> &File {
        &self.files[id.index()]
    }

    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Regular files in the order of their first names.
    pub fn file_ids(&self) -> impl Iterator<Item = FileId> + use<> {
        (0..self.next_file().0).map(FileId)
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

    /// Path below the root, without a slash in front; empty for the root.
    pub fn path(&self, id: NodeId) -> PathBuf {
        let mut names = Vec::new();
        let mut at = id;
        while at != NodeId::ROOT {
            names.push(OsStr::from_bytes(&self.node(at).name));
            at = self.node(at).parent;
        }
        names.into_iter().rev().collect()
    }
}

pub(super) fn too_many_paths() -> BuildError {
    BuildError::Limit { what: "the number of paths", limit: u32::MAX.into(), advice: "" }
}
