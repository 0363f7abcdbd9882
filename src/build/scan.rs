//! A source directory as it was when it was scanned.

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
use super::tree::{File, FileId, Kind, Node, NodeId, Tree};
use super::whiteout::WhiteoutSpec;
use super::xattrs::{self, Xattr};
use crate::rafs::layout::{LayerMark, NAME_MAX, SYMLINK_MAX, encode_rdev};

/// What becomes of marks of removed files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// There is nothing below that they could change.
    Drop,
    /// They will be applied to a lower layer. Only their names are kept.
    Keep,
}

/// A scanned directory. Memory: that of the tree and 48 bytes for each regular file.
pub struct Scanned {
    pub tree: Tree,
    path: PathBuf,
    root: OwnedFd,
    sources: Vec<SourceFile>,
}

/// What is known of a file beside its place in the tree.
#[derive(Clone, Copy)]
pub struct SourceFile {
    pub identity: Identity,
    /// False if the file system says that all of it is allocated.
    pub may_have_holes: bool,
}

impl Scanned {
    /// Scans the directory `path`; `progress` counts the paths.
    pub fn scan(
        path: &Path,
        whiteouts: WhiteoutSpec,
        marks: Marks,
        progress: &ProgressBar,
    ) -> Result<Scanned, BuildError> {
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
            done: Scanned {
                tree: Tree::default(),
                path: path.to_owned(),
                root,
                sources: Vec::new(),
            },
            links: HashMap::new(),
            whiteouts,
            marks,
        };
        scan.add_root(&stat)?;
        let mut cursor = Cursor::default();
        let mut to_enter = vec![NodeId::ROOT];
        while let Some(dir) = to_enter.pop() {
            let children = scan.enter(&mut cursor, dir)?;
            progress.inc(children.len() as u64);
            let tree = &scan.done.tree;
            to_enter.extend(tree.children(dir).rev().filter(|&id| tree.is_dir(id)));
        }
        Ok(scan.done)
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Path in the source, for messages.
    pub fn path(&self, id: NodeId) -> PathBuf {
        let below = self.tree.path(id);
        if below.as_os_str().is_empty() { self.path.clone() } else { self.path.join(below) }
    }

    pub fn source(&self, id: FileId) -> SourceFile {
        self.sources[id.index()]
    }
}

/// A scan on its way.
struct Scan {
    done: Scanned,
    /// Regular files with more than one name.
    links: HashMap<(u64, u64), FileId>,
    whiteouts: WhiteoutSpec,
    marks: Marks,
}

impl Scan {
    fn add_root(&mut self, stat: &Stat) -> Result<(), BuildError> {
        let xattrs = read_xattrs(self.done.root(), b".", self.opaque())
            .map_err(|e| e.at(&self.done.path))?;
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
        self.done.tree.add(Node {
            parent,
            name,
            mode: u16::try_from(stat.st_mode & 0xFFFF).expect("masked"),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs,
            kind,
            mark: LayerMark::None,
        })?;
        Ok(())
    }

    /// Adds the children of a directory; their ids.
    fn enter(&mut self, cursor: &mut Cursor, dir: NodeId) -> Result<Range<u32>, BuildError> {
        let fail = |done: &Scanned, source: io::Error| BuildError::Source {
            action: "read the directory",
            path: done.path(dir),
            source,
        };
        let fd = cursor.dir(&self.done, dir).map_err(|e| fail(&self.done, e))?;
        let mut names = Vec::new();
        for entry in Dir::read_from(fd).map_err(|e| fail(&self.done, e.into()))? {
            let entry = entry.map_err(|e| fail(&self.done, e.into()))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(Box::<[u8]>::from(name));
            }
        }
        names.sort_unstable();

        let start = self.done.tree.next_id();
        for name in names {
            self.add_child(fd, dir, name)?;
        }
        let children = start..self.done.tree.next_id();
        self.done.tree.nodes[dir.index()].kind = Kind::Dir { children: children.clone() };
        Ok(children)
    }

    fn add_child(
        &mut self,
        dir_fd: BorrowedFd<'_>,
        dir: NodeId,
        name: Box<[u8]>,
    ) -> Result<(), BuildError> {
        let path = |done: &Scanned| {
            let mut path = done.path(dir);
            path.push(OsStr::from_bytes(&name));
            path
        };
        let fail = |done: &Scanned, action, e: Errno| BuildError::Source {
            action,
            path: path(done),
            source: e.into(),
        };
        let os_name = OsStr::from_bytes(&name);
        let stat = statat(dir_fd, os_name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| fail(&self.done, "examine", e))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if self.whiteouts.is_whiteout(&name, file_type, stat.st_rdev) {
            return match self.marks {
                Marks::Drop => Ok(()),
                // Its name says all; whatever it holds is not looked at.
                Marks::Keep => {
                    self.add(dir, name, &stat, Box::default(), Kind::Special { rdev: 0 })
                }
            };
        }
        if name.len() > NAME_MAX {
            return Err(BuildError::Unsupported {
                path: path(&self.done),
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
                    .map_err(|e| fail(&self.done, "read the link", e))?
                    .into_bytes();
                if target.is_empty() || target.len() as u64 > SYMLINK_MAX {
                    return Err(BuildError::Unsupported {
                        path: path(&self.done),
                        reason: format!("the link's target has {} bytes", target.len()),
                    });
                }
                (Kind::Symlink(target.into()), true)
            }
            FileType::CharacterDevice | FileType::BlockDevice => (
                Kind::Special { rdev: encode_rdev(major(stat.st_rdev), minor(stat.st_rdev)) },
                true,
            ),
            FileType::Fifo | FileType::Socket => (Kind::Special { rdev: 0 }, true),
            FileType::Unknown => {
                return Err(BuildError::Unsupported {
                    path: path(&self.done),
                    reason: format!("unknown type of file, mode {:o}", stat.st_mode),
                });
            }
        };
        let xattrs = if first_name {
            read_xattrs(dir_fd, &name, self.opaque()).map_err(|e| e.at(&path(&self.done)))?
        } else {
            Box::default()
        };
        self.add(dir, name, &stat, xattrs, kind)
    }

    /// The file that the next node names, and whether this is its first name.
    fn add_file(&mut self, stat: &Stat) -> (FileId, bool) {
        let identity = Identity::of(stat);
        let tree = &mut self.done.tree;
        let new = tree.next_file();
        if stat.st_nlink > 1 {
            let file = *self.links.entry(identity.link_key()).or_insert(new);
            if file != new {
                tree.files[file.index()].names += 1;
                return (file, false);
            }
        }
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let first = tree.next_node();
        tree.files.push(File { first, names: 1, size: identity.size, data: new.data() });
        let may_have_holes = allocated < identity.size;
        self.done.sources.push(SourceFile { identity, may_have_holes });
        (new, true)
    }

    /// The convention whose opaque marks are dropped.
    fn opaque(&self) -> WhiteoutSpec {
        match self.marks {
            Marks::Drop => self.whiteouts,
            Marks::Keep => WhiteoutSpec::None,
        }
    }
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
    xattrs::sorted(found).map_err(XattrFailure::Unsupported)
}
