//! A tree that still changes: a layer whose entries come one by one, a stack of layers being merged.
//!
//! Names lead to inodes, so all names of a hard-linked file are equal. A draft is numbered into a
//! [`Tree`] when it is complete.
//!
//! Paths are followed as in a file system whose root is the draft's: symbolic links in front of the
//! last part lead on, never outside.
//!
//! Memory: about 150 bytes, the name, target and attributes for each entry ever added.

use std::collections::BTreeMap;

use super::error::BuildError;
use super::tree::{DataId, File, FileChunks, Kind, Node, NodeId, Tree};
use super::xattrs::Xattr;
use crate::rafs::FileKind;
use crate::rafs::layout::{LayerMark, SYMLINK_MAX};
use crate::rafs::walk::MAX_DEPTH;

/// Most entries a draft takes: their inodes alone would fill half of the largest bootstrap.
const ENTRIES_MAX: usize = 1 << 24;
/// Symbolic links in one path, as the kernel has it.
const LINKS_MAX: usize = 40;

/// Position of an inode in a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub(super) u32);

impl InodeId {
    pub const ROOT: InodeId = InodeId(0);

    fn index(self) -> usize {
        self.0 as usize
    }
}

/// Attributes of an inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Type and permission bits, as `st_mode`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// Sorted by full name.
    pub xattrs: Box<[Xattr]>,
}

/// What a path leads to.
#[derive(Clone, Debug)]
pub struct Inode {
    pub attributes: Attributes,
    pub body: Body,
}

#[derive(Clone, Debug)]
pub enum Body {
    Dir(Dir),
    File {
        /// Bytes.
        size: u64,
        data: DataId,
    },
    Symlink(Box<[u8]>),
    Special {
        rdev: u32,
    },
    /// A hard link to this path, in parts, which the layer did not hold when the link came.
    Link(Vec<Box<[u8]>>),
}

#[derive(Clone, Debug, Default)]
pub struct Dir {
    pub children: BTreeMap<Box<[u8]>, InodeId>,
    /// The layer has no entry for it, only for something below it.
    pub implied: bool,
    /// Nothing of a lower layer shows through.
    pub opaque: bool,
}

/// A tree that still changes.
#[derive(Debug)]
pub struct Draft {
    inodes: Vec<Inode>,
    /// Chunks of the files, by their data's number.
    pub chunks: FileChunks,
    /// Numbers of data given out.
    files: usize,
}

impl Default for Draft {
    fn default() -> Draft {
        Draft::new()
    }
}

impl Draft {
    /// A root that nothing is known of.
    pub fn new() -> Draft {
        Draft { inodes: vec![Inode::implied_dir()], chunks: FileChunks::default(), files: 0 }
    }

    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.index()]
    }

    /// All inodes, those that nothing leads to any more included.
    pub(super) fn inodes(&self) -> impl Iterator<Item = (InodeId, &Inode)> {
        (0..).map(InodeId).zip(&self.inodes)
    }

    pub(super) fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.index()]
    }

    /// The number of the next file's data.
    pub fn next_data(&mut self) -> Result<DataId, BuildError> {
        self.files += 1;
        DataId::new(self.files - 1)
    }

    /// Numbers of data given out so far.
    pub fn files(&self) -> usize {
        self.files
    }

    pub(super) fn add(&mut self, inode: Inode) -> Result<InodeId, BuildError> {
        if self.inodes.len() == ENTRIES_MAX {
            return Err(BuildError::Limit {
                what: "the number of entries",
                limit: ENTRIES_MAX as u64,
                advice: "",
            });
        }
        self.inodes.push(inode);
        Ok(InodeId(u32::try_from(self.inodes.len() - 1).expect("the limit has 24 bits")))
    }

    /// The directory `id`.
    ///
    /// # Panics
    ///
    /// If it is something else.
    pub fn dir(&self, id: InodeId) -> &Dir {
        match &self.inode(id).body {
            Body::Dir(dir) => dir,
            _ => panic!("not a directory"),
        }
    }

    pub(super) fn dir_mut(&mut self, id: InodeId) -> &mut Dir {
        match &mut self.inode_mut(id).body {
            Body::Dir(dir) => dir,
            _ => panic!("not a directory"),
        }
    }

    pub fn is_dir(&self, id: InodeId) -> bool {
        matches!(self.inode(id).body, Body::Dir(_))
    }

    /// Puts an entry of a tar stream in its place: a directory over a directory changes its
    /// attributes, everything else takes the place of what was there. Directories that the path
    /// needs and nothing has named yet are made, root's, with mode 0755 and time 0.
    pub fn insert(&mut self, path: &[Box<[u8]>], inode: Inode) -> Result<(), BuildError> {
        let Some((name, dirs)) = path.split_last() else {
            let Body::Dir(_) = inode.body else {
                return Err(unsupported(path, "the root of a layer must be a directory"));
            };
            self.set_dir_attributes(InodeId::ROOT, inode.attributes);
            return Ok(());
        };
        let parent = self.make_dirs(InodeId::ROOT, dirs).map_err(|e| e.at(path))?;
        if path.len() > MAX_DEPTH {
            return Err(unsupported(path, "too many directories deep"));
        }
        let old = self.dir(parent).children.get(name).copied();
        let replaced_by_dir = match (old, &inode.body) {
            (Some(old), Body::Dir(_)) if self.is_dir(old) => {
                self.set_dir_attributes(old, inode.attributes);
                return Ok(());
            }
            (Some(_), Body::Dir(_)) => true,
            _ => false,
        };
        let id = self.add(inode)?;
        if replaced_by_dir {
            // What a lower layer had in a directory of this name went when it became a file.
            self.dir_mut(id).opaque = true;
        }
        self.dir_mut(parent).children.insert(name.clone(), id);
        Ok(())
    }

    fn set_dir_attributes(&mut self, id: InodeId, attributes: Attributes) {
        self.inode_mut(id).attributes = attributes;
        self.dir_mut(id).implied = false;
    }

    /// Puts a hard link in its place: another name of a regular file, a copy of anything else but
    /// a directory, and a promise if there is nothing at `target` yet.
    pub fn link(&mut self, path: &[Box<[u8]>], target: &[Box<[u8]>]) -> Result<(), BuildError> {
        let Some((name, dirs)) = path.split_last() else {
            return Err(unsupported(path, "the root of a layer must be a directory"));
        };
        let id = match self.find(target).map_err(|e| e.at(path))? {
            Some(found) => match &self.inode(found).body {
                Body::Dir(_) => return Err(unsupported(path, "a hard link to a directory")),
                Body::File { .. } => found,
                // RAFS gives everything but files one name each.
                _ => self.add(self.inode(found).clone())?,
            },
            None => {
                let len = target.iter().map(|part| part.len() + 1).sum::<usize>() as u64;
                if len > SYMLINK_MAX {
                    return Err(unsupported(path, "the path that the hard link names is too long"));
                }
                let attributes = Attributes {
                    mode: FileKind::Symlink.mode_bits() | 0o777,
                    ..Attributes::default()
                };
                self.add(Inode { attributes, body: Body::Link(target.to_vec()) })?
            }
        };
        let parent = self.make_dirs(InodeId::ROOT, dirs).map_err(|e| e.at(path))?;
        self.dir_mut(parent).children.insert(name.clone(), id);
        Ok(())
    }

    /// What is at a path, the last part not followed. The root for an empty one.
    pub(super) fn find(&self, path: &[Box<[u8]>]) -> Result<Option<InodeId>, PathError> {
        let Some((name, dirs)) = path.split_last() else { return Ok(Some(InodeId::ROOT)) };
        let mut walk = PathWalk::new(InodeId::ROOT, dirs);
        while let Some(part) = walk.next()? {
            match self.dir(walk.dir()).children.get(&part).copied() {
                Some(id) if walk.enter(self, id)? => {}
                _ => return Ok(None),
            }
        }
        Ok(self.dir(walk.dir()).children.get(name).copied())
    }

    /// The directory at `dirs` below `from`, made where it is missing. A file in its way goes.
    pub(super) fn make_dirs(
        &mut self,
        from: InodeId,
        dirs: &[Box<[u8]>],
    ) -> Result<InodeId, PathError> {
        let mut walk = PathWalk::new(from, dirs);
        while let Some(part) = walk.next()? {
            let dir = walk.dir();
            match self.dir(dir).children.get(&part).copied() {
                Some(id) if walk.enter(self, id)? => {}
                old => {
                    let id = self.add(Inode::implied_dir()).map_err(PathError::Build)?;
                    self.dir_mut(id).opaque = old.is_some();
                    self.dir_mut(dir).children.insert(part, id);
                    walk.push(id)?;
                }
            }
        }
        Ok(walk.dir())
    }

    /// The directory that the symbolic link with this target in `dir` leads to, made where it is
    /// missing. `dir` is the last of `above`, which starts with the root.
    pub(super) fn follow(
        &mut self,
        above: &[InodeId],
        target: &[u8],
    ) -> Result<Vec<InodeId>, PathError> {
        let mut walk = PathWalk { dirs: above.to_vec(), parts: Vec::new(), links: 0 };
        walk.add_target(target)?;
        while let Some(part) = walk.next()? {
            let dir = walk.dir();
            match self.dir(dir).children.get(&part).copied() {
                Some(id) if walk.enter(self, id)? => {}
                Some(_) => return Err(PathError::NotDir),
                None => {
                    let id = self.add(Inode::implied_dir()).map_err(PathError::Build)?;
                    self.dir_mut(dir).children.insert(part, id);
                    walk.push(id)?;
                }
            }
        }
        Ok(walk.dirs)
    }

    /// Appends everything of `other`; what the numbers of its inodes grow by.
    pub(super) fn append(&mut self, other: Draft) -> Result<u32, BuildError> {
        if self.inodes.len() + other.inodes.len() > ENTRIES_MAX {
            return Err(BuildError::Limit {
                what: "the number of entries",
                limit: ENTRIES_MAX as u64,
                advice: "",
            });
        }
        let shift = u32::try_from(self.inodes.len()).expect("the limit has 24 bits");
        let files = self.files;
        DataId::new(files + other.files)?;
        self.files += other.files;
        self.chunks.append(other.chunks, files);
        for mut inode in other.inodes {
            match &mut inode.body {
                Body::Dir(dir) => dir.children.values_mut().for_each(|id| id.0 += shift),
                Body::File { data, .. } => *data = DataId::new(data.index() + files)?,
                _ => {}
            }
            self.inodes.push(inode);
        }
        Ok(shift)
    }

    /// Numbers the tree. `layer`: what cannot be known without lower layers is kept as marks. Else it
    /// must have been put through [`super::overlay::apply`].
    pub fn into_tree(mut self, layer: bool) -> Result<(Tree, FileChunks), BuildError> {
        let mut tree = Tree::default();
        // File of the tree by inode of the draft.
        let mut names: BTreeMap<InodeId, super::tree::FileId> = BTreeMap::new();
        let root = NodeId::ROOT;
        self.add_node(&mut tree, &mut names, root, Box::default(), InodeId::ROOT, layer)?;
        let mut to_enter = vec![(root, InodeId::ROOT, 0)];
        while let Some((node, id, depth)) = to_enter.pop() {
            // Readers refuse what is deeper; links on the way may have led there.
            if depth >= MAX_DEPTH {
                return Err(BuildError::Unsupported {
                    path: tree.path(node),
                    reason: "too many directories deep".to_owned(),
                });
            }
            let Body::Dir(dir) = &mut self.inode_mut(id).body else { continue };
            let (children, opaque) = (std::mem::take(&mut dir.children), dir.opaque);
            let start = tree.next_id();
            let mut dirs = Vec::new();
            let opaque = if layer && opaque { Some(super::whiteout::OPAQUE) } else { None };
            let mark = match opaque {
                Some(name) if !children.contains_key(name) => {
                    let mode = FileKind::Regular.mode_bits();
                    let attributes = Attributes { mode, ..Attributes::default() };
                    let body = Body::File { size: 0, data: self.next_data()? };
                    Some((name.into(), self.add(Inode { attributes, body })?))
                }
                _ => None,
            };
            let mut children: Vec<(Box<[u8]>, InodeId)> = children.into_iter().collect();
            if let Some(mark) = mark {
                let at = children.partition_point(|(name, _)| *name < mark.0);
                children.insert(at, mark);
            }
            for (name, child) in children {
                let added = self.add_node(&mut tree, &mut names, node, name, child, layer)?;
                if self.is_dir(child) {
                    dirs.push((added, child, depth + 1));
                }
            }
            tree.nodes[node.index()].kind = Kind::Dir { children: start..tree.next_id() };
            to_enter.extend(dirs.into_iter().rev());
        }
        Ok((tree, self.chunks))
    }

    fn add_node(
        &mut self,
        tree: &mut Tree,
        names: &mut BTreeMap<InodeId, super::tree::FileId>,
        parent: NodeId,
        name: Box<[u8]>,
        id: InodeId,
        layer: bool,
    ) -> Result<NodeId, BuildError> {
        let first = tree.next_node();
        let inode = self.inode(id);
        let mut mark = LayerMark::None;
        let mut later_name = false;
        let kind = match &inode.body {
            Body::Dir(dir) => {
                if layer && dir.implied {
                    mark = LayerMark::Implied;
                }
                Kind::Dir { children: 0..0 }
            }
            Body::File { size, data } => {
                let new = tree.next_file();
                let file = *names.entry(id).or_insert(new);
                if file == new {
                    tree.files.push(File { first, names: 1, size: *size, data: *data });
                } else {
                    tree.files[file.index()].names += 1;
                    later_name = true;
                }
                Kind::File(file)
            }
            Body::Symlink(target) => Kind::Symlink(target.clone()),
            Body::Special { rdev } => Kind::Special { rdev: *rdev },
            Body::Link(target) => {
                assert!(layer, "hard links are resolved when layers are merged");
                mark = LayerMark::HardLink;
                let path = target.iter().flat_map(|part| [&b"/"[..], part]);
                Kind::Symlink(path.collect::<Vec<_>>().concat().into())
            }
        };
        let Attributes { mode, uid, gid, mtime, mtime_nsec, xattrs } = inode.attributes.clone();
        let xattrs = if later_name { Box::default() } else { xattrs };
        tree.add(Node { parent, name, mode, uid, gid, mtime, mtime_nsec, xattrs, kind, mark })
    }

    /// The tree as a draft, with `chunks` of its files in their own order.
    pub fn from_tree(tree: Tree, mut chunks: FileChunks) -> Result<Draft, BuildError> {
        let mut draft = Draft::new();
        for _ in tree.files() {
            let data = draft.next_data()?;
            // Files without data never began.
            if chunks.files() <= data.index() {
                chunks.begin(data);
            }
        }
        draft.chunks = chunks;
        let mut ids: Vec<InodeId> = Vec::with_capacity(tree.len());
        for id in tree.ids() {
            let node = tree.node(id);
            let first = tree.inode_of(id);
            if first != id {
                let inode = ids[first.index()];
                ids.push(inode);
                let parent = ids[node.parent.index()];
                draft.dir_mut(parent).children.insert(node.name.clone(), inode);
                continue;
            }
            let body = match &node.kind {
                Kind::Dir { .. } => Body::Dir(Dir::default()),
                Kind::File(file) => {
                    let file = tree.file(*file);
                    Body::File { size: file.size, data: file.data }
                }
                Kind::Symlink(target) => Body::Symlink(target.clone()),
                Kind::Special { rdev } => Body::Special { rdev: *rdev },
            };
            let inode = Inode {
                attributes: Attributes {
                    mode: node.mode,
                    uid: node.uid,
                    gid: node.gid,
                    mtime: node.mtime,
                    mtime_nsec: node.mtime_nsec,
                    xattrs: node.xattrs.clone(),
                },
                body,
            };
            if id == NodeId::ROOT {
                *draft.inode_mut(InodeId::ROOT) = inode;
                ids.push(InodeId::ROOT);
            } else {
                let inode = draft.add(inode)?;
                ids.push(inode);
                let parent = ids[node.parent.index()];
                draft.dir_mut(parent).children.insert(node.name.clone(), inode);
            }
        }
        Ok(draft)
    }
}

impl Inode {
    /// A directory that nothing is known of.
    pub fn implied_dir() -> Inode {
        let mode = FileKind::Directory.mode_bits() | 0o755;
        Inode {
            attributes: Attributes { mode, ..Attributes::default() },
            body: Body::Dir(Dir { implied: true, ..Dir::default() }),
        }
    }
}

/// Why a path cannot be followed.
#[derive(Debug)]
pub(super) enum PathError {
    TooManyLinks,
    TooDeep,
    /// Something on the way is not a directory.
    NotDir,
    Build(BuildError),
}

impl PathError {
    /// The error of an entry at `path`.
    pub(super) fn at(self, path: &[Box<[u8]>]) -> BuildError {
        match self {
            PathError::TooManyLinks => unsupported(path, "too many symbolic links on the way"),
            PathError::TooDeep => unsupported(path, "too many directories deep"),
            PathError::NotDir => unsupported(path, "a file is on the way"),
            PathError::Build(e) => e,
        }
    }
}

fn unsupported(path: &[Box<[u8]>], reason: &str) -> BuildError {
    use std::os::unix::ffi::OsStrExt;
    let bytes = [&b"/"[..], &path.join(&b'/')].concat();
    BuildError::Unsupported {
        path: std::ffi::OsStr::from_bytes(&bytes).into(),
        reason: reason.to_owned(),
    }
}

/// A path on the way through a draft.
struct PathWalk {
    /// From the root to where it is.
    dirs: Vec<InodeId>,
    /// Parts to come, in reverse order.
    parts: Vec<Box<[u8]>>,
    links: usize,
}

impl PathWalk {
    fn new(from: InodeId, parts: &[Box<[u8]>]) -> PathWalk {
        PathWalk { dirs: vec![from], parts: parts.iter().rev().cloned().collect(), links: 0 }
    }

    fn dir(&self) -> InodeId {
        *self.dirs.last().expect("the root is never left")
    }

    /// The next part that is a name.
    fn next(&mut self) -> Result<Option<Box<[u8]>>, PathError> {
        while let Some(part) = self.parts.pop() {
            match &part[..] {
                b"" | b"." => {}
                b".." if self.dirs.len() > 1 => drop(self.dirs.pop()),
                b".." => {}
                _ => return Ok(Some(part)),
            }
        }
        Ok(None)
    }

    /// Goes on at `id`, a child of the directory; false if that is neither a directory nor a link.
    fn enter(&mut self, draft: &Draft, id: InodeId) -> Result<bool, PathError> {
        match &draft.inode(id).body {
            Body::Dir(_) => self.push(id)?,
            Body::Symlink(target) => self.add_target(target)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn push(&mut self, dir: InodeId) -> Result<(), PathError> {
        if self.dirs.len() > MAX_DEPTH {
            return Err(PathError::TooDeep);
        }
        self.dirs.push(dir);
        Ok(())
    }

    fn add_target(&mut self, target: &[u8]) -> Result<(), PathError> {
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(PathError::TooManyLinks);
        }
        if target.starts_with(b"/") {
            self.dirs.truncate(1);
        }
        self.parts.extend(target.rsplit(|&b| b == b'/').map(Box::from));
        Ok(())
    }
}
