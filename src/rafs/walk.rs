//! Every path of an image, however damaged: bounded time and memory, no recursion.

use std::collections::HashSet;
use std::rc::Rc;

use super::bootstrap::Image;
use super::dir::{Dir, DirEntry, Entries};
use super::error::{FormatError, Result};
use super::id::Nid;
use super::inode::{FileKind, Inode};
use super::layout::Dirent;

/// Deepest directory that a walk enters: more names than the kernel's `PATH_MAX` has room for.
pub const MAX_DEPTH: usize = 2048;

/// Walks an image depth first, a directory before what it holds, names in stored order.
///
/// Refuses what no tree has: a directory reached twice, a symlink or special file of two names,
/// a `.` or `..` that lies or is missing. An error costs the entry it is about, or the rest of its
/// directory if that cannot be read on; then the walk continues.
pub struct Walk<'a> {
    image: &'a Image,
    /// Not yet started.
    root: bool,
    levels: Vec<Level<'a>>,
    /// Everything seen that may have one name only.
    seen: HashSet<Nid>,
    /// Entries that may still come: each takes bytes of the file that no other has.
    left: u64,
}

/// One path of an image.
#[derive(Clone)]
pub struct WalkItem<'a> {
    pub inode: Inode<'a>,
    /// Last part of the path; empty for the root.
    pub name: &'a [u8],
    /// Names above it: 0 for the root.
    pub depth: usize,
    parent: Option<Rc<Node<'a>>>,
}

/// What is wrong with an image, and at which path.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.escape_ascii())]
pub struct WalkError {
    /// Absolute; of the directory if an entry of it has no readable name.
    pub path: Vec<u8>,
    pub source: FormatError,
}

struct Level<'a> {
    node: Rc<Node<'a>>,
    dir: Dir<'a>,
    nid: Nid,
    parent: Nid,
    entries: Entries<'a>,
    /// Whether `.` and `..` have been seen.
    dots: [bool; 2],
}

/// A directory on the way to a path.
struct Node<'a> {
    name: &'a [u8],
    parent: Option<Rc<Node<'a>>>,
}

fn path(parent: Option<&Rc<Node<'_>>>, name: &[u8]) -> Vec<u8> {
    let mut parts = vec![name];
    let mut next = parent;
    while let Some(node) = next {
        parts.push(node.name);
        next = node.parent.as_ref();
    }
    parts.reverse();
    match parts.as_slice() {
        [_root] => b"/".to_vec(),
        parts => parts.join(&b'/'),
    }
}

impl WalkItem<'_> {
    /// Absolute path.
    pub fn path(&self) -> Vec<u8> {
        path(self.parent.as_ref(), self.name)
    }
}

impl<'a> Walk<'a> {
    pub(super) fn new(image: &'a Image) -> Self {
        let left = image.len() / (size_of::<Dirent>() as u64 + 1);
        Walk { image, root: true, levels: Vec::new(), seen: HashSet::new(), left }
    }

    /// The inode of an entry, its type as the entry says, allowed to be here.
    fn child(&mut self, dir: Dir<'a>, entry: &DirEntry<'a>) -> Result<Inode<'a>> {
        let inode = dir.inode_of(entry)?;
        if inode.kind() != FileKind::Regular && !self.seen.insert(entry.nid) {
            let reason = format!("second name of a {}", inode.kind().name());
            return Err(FormatError::invalid("inode", inode.offset(), reason));
        }
        Ok(inode)
    }

    /// Makes the directory `item` the next to be listed.
    fn enter(&mut self, item: &WalkItem<'a>) -> Result<()> {
        if item.inode.kind() != FileKind::Directory {
            return Ok(());
        }
        let (nid, dir) = (item.inode.nid(), item.inode.dir()?);
        if self.levels.len() == MAX_DEPTH {
            let reason = format!("more than {MAX_DEPTH} directories deep");
            return Err(FormatError::invalid("inode", item.inode.offset(), reason));
        }
        let parent = self.levels.last().map_or(nid, |level| level.nid);
        let node = Rc::new(Node { name: item.name, parent: item.parent.clone() });
        let entries = dir.entries_from(0)?;
        self.levels.push(Level { node, dir, nid, parent, entries, dots: [false; 2] });
        Ok(())
    }

    fn start(&mut self) -> Result<WalkItem<'a>> {
        let inode = Inode::read(self.image, self.image.sb.root)?;
        self.seen.insert(inode.nid());
        let item = WalkItem { inode, name: b"", depth: 0, parent: None };
        self.enter(&item)?;
        Ok(item)
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = std::result::Result<WalkItem<'a>, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if std::mem::take(&mut self.root) {
            return Some(self.start().map_err(|source| WalkError { path: b"/".to_vec(), source }));
        }
        loop {
            let depth = self.levels.len();
            let level = self.levels.last_mut()?;
            let offset = self.image.len();
            let fail = |node: &Rc<Node<'_>>, name: Option<&[u8]>, source| {
                let path = match name {
                    Some(name) => path(Some(node), name),
                    None => path(node.parent.as_ref(), node.name),
                };
                Some(Err(WalkError { path, source }))
            };
            let Some(left) = self.left.checked_sub(1) else {
                let node = level.node.clone();
                self.levels.clear();
                let reason = "more entries than the file has room for";
                return fail(&node, None, FormatError::invalid("bootstrap", offset, reason));
            };
            self.left = left;
            let Some(entry) = level.entries.next() else {
                let level = self.levels.pop().expect("there is a last level");
                if level.dots == [true; 2] {
                    continue;
                }
                let reason = "no \".\" or no \"..\"";
                return fail(&level.node, None, FormatError::invalid("directory", 0, reason));
            };
            let node = level.node.clone();
            let entry = match entry {
                Ok(entry) => entry,
                Err(source) => {
                    // The rest cannot be read: not news that the dots are missing.
                    self.levels.pop();
                    return fail(&node, None, source);
                }
            };
            let dot = match entry.name {
                b"." => Some((0, level.nid)),
                b".." => Some((1, level.parent)),
                _ => None,
            };
            if let Some((i, nid)) = dot {
                level.dots[i] = true;
                if entry.nid == nid && matches!(entry.file_type, 0 | 2) {
                    continue;
                }
                let reason = format!("leads to nid {} instead of {}", entry.nid.0, nid.0);
                let source = FormatError::invalid("directory entry", 0, reason);
                return fail(&node, Some(entry.name), source);
            }
            let dir = level.dir;
            let item = self.child(dir, &entry).and_then(|inode| {
                let parent = Some(node.clone());
                let item = WalkItem { inode, name: entry.name, depth, parent };
                self.enter(&item)?;
                Ok(item)
            });
            return match item {
                Ok(item) => Some(Ok(item)),
                Err(source) => fail(&node, Some(entry.name), source),
            };
        }
    }
}
