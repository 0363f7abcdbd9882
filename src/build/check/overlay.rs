//! The file system that the layers of an image make, computed from their tar streams.
//!
//! This is the converter's counterpart and shares no code with it. The rules are those of the OCI
//! image specification, "layer":
//!
//! - `.wh.NAME` removes NAME, `.wh..wh..opq` everything, of the layers below; never what the same
//!   layer has, wherever in it the mark stands. Marks are not seen in the result.
//! - A path of an upper layer replaces that of a lower one, attributes and all. If both are
//!   directories their children are merged, else what was below is gone.
//! - Of a path given twice in a layer the later one counts. A directory in place of a file that its own
//!   layer had hides what is below as the file did.
//! - A hard link joins the file that its target names when it comes: in the same layer before it,
//!   else in the layers below, as they were before this layer; if there is none, in the same layer
//!   behind it. So do programs that unpack layers one entry after the other.
//! - A directory that only its children or marks in it imply is left as it is; a symbolic link in its place is
//!   followed, within the root; a new one has mode 0755, owner 0:0 and time 0. The same goes for the
//!   root.
//!
//! Memory: for each path of the result and of one layer its bytes, about 150 more, its extended
//! attributes, and 32 bytes for each chunk of content. Content itself is hashed as it comes.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::ops::Bound;
use std::sync::Arc;

use sha2::Digest;

use super::tar_stream::{Entry, EntryKind, TarError, TarStream};
use crate::rafs::codec::Digester;

/// Most symbolic links that are followed on the way to a path, as in the kernel.
const LINKS_MAX: usize = 40;

/// A path as its names, separated by NUL; the root is empty. Sorts as a walk goes: a directory, all
/// that it holds, then its next sibling.
pub(super) type Key = Box<[u8]>;

/// Attributes that every type of file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attrs {
    /// Permission bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// By full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dir,
    File(Content),
    Symlink(Box<[u8]>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

/// Content of a regular file, as digests of its chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub size: u64,
    /// For each chunk its digest by each of the digesters asked for.
    pub digests: Box<[[u8; 32]]>,
}

/// A file; its names share it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct File {
    pub attrs: Attrs,
    pub kind: Kind,
}

/// How content is cut and hashed: as the image to compare with does it.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    /// Bytes.
    pub chunk_size: u32,
    /// One or two, as blobs of an image may differ.
    pub digesters: Vec<Digester>,
}

/// What one layer says.
#[derive(Debug, Default)]
pub(super) struct Layer {
    /// With the number of the entry, as entries are put in place in their order.
    named: BTreeMap<Key, (u64, Named)>,
    whiteouts: BTreeMap<Key, ()>,
    opaque: BTreeMap<Key, ()>,
    /// Entries of the tar.
    pub entries: u64,
    /// Bytes of all files.
    pub content_bytes: u64,
}

#[derive(Debug)]
enum Named {
    File(Arc<File>),
    /// Hard link to a path that was not there when the link came.
    Link(Key),
}

/// The layers applied so far: every path and its file.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    pub files: BTreeMap<Key, Arc<File>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum LayerError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("{}: hard link to {}, which no layer has", shown(path), shown(target))]
    DeadLink { path: Key, target: Key },
    #[error("{}: hard link to {}, which is a directory", shown(path), shown(target))]
    LinkToDirectory { path: Key, target: Key },
    #[error("{}: more than {LINKS_MAX} symbolic links on the way", shown(path))]
    Loop { path: Key },
    #[error("{}: name of more than 255 bytes or with a NUL", path.escape_ascii())]
    Name { path: Vec<u8> },
    #[error("the entry {} stands for the root, which can only be a directory", path.escape_ascii())]
    Root { path: Vec<u8> },
}

/// The path that `key` stands for.
pub(super) fn path_of(key: &[u8]) -> Vec<u8> {
    let mut path = vec![b'/'];
    path.extend(key.iter().map(|&b| if b == 0 { b'/' } else { b }));
    path
}

fn shown(key: &[u8]) -> String {
    path_of(key).escape_ascii().to_string()
}

/// `None` for the root.
fn parent(key: &[u8]) -> Option<&[u8]> {
    if key.is_empty() {
        return None;
    }
    Some(key.iter().rposition(|&b| b == 0).map_or(&[][..], |at| &key[..at]))
}

fn name(key: &[u8]) -> &[u8] {
    key.iter().rposition(|&b| b == 0).map_or(key, |at| &key[at + 1..])
}

/// The key of a path in a tar: relative to the root, `..` does not leave it.
fn key_of(path: &[u8]) -> Result<Key, LayerError> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name if name.len() > 255 || name.contains(&0) => {
                return Err(LayerError::Name { path: path.to_vec() });
            }
            name => names.push(name),
        }
    }
    Ok(names.join(&0).into())
}

/// The key that `key` leads to if symbolic links in front of its last name are followed; `at` says
/// what is where.
fn follow<'a>(key: &Key, at: impl Fn(&[u8]) -> Option<&'a Arc<File>>) -> Result<Key, LayerError> {
    let link = |key: &[u8]| match at(key).map(|file| &file.kind) {
        Some(Kind::Symlink(target)) => Some(target),
        _ => None,
    };
    let ends = key.iter().enumerate().filter(|(_, b)| **b == 0).map(|(end, _)| end);
    if !ends.clone().any(|end| link(&key[..end]).is_some()) {
        return Ok(key.clone());
    }
    let last = name(key);
    let above = parent(key).unwrap_or_default();
    // The next name is the last one here.
    let mut to_come: Vec<&[u8]> = above.split(|&b| b == 0).rev().collect();
    let mut resolved: Vec<&[u8]> = Vec::new();
    let mut followed = 0;
    while let Some(next) = to_come.pop() {
        match next {
            b"" | b"." => continue,
            b".." => {
                resolved.pop();
                continue;
            }
            next => resolved.push(next),
        }
        if let Some(target) = link(&resolved.join(&0)) {
            followed += 1;
            if followed > LINKS_MAX {
                return Err(LayerError::Loop { path: key.clone() });
            }
            resolved.pop();
            if target.starts_with(b"/") {
                resolved.clear();
            }
            to_come.extend(target.split(|&b| b == b'/').rev());
        }
    }
    resolved.push(last);
    Ok(resolved.join(&0).into())
}

/// The keys strictly below `key`.
fn below(key: &[u8]) -> (Bound<Key>, Bound<Key>) {
    if key.is_empty() {
        return (Bound::Excluded(key.into()), Bound::Unbounded);
    }
    let bound = |end: u8| Bound::Excluded([key, &[end]].concat().into());
    (bound(0), bound(1))
}

fn remove_below<V>(map: &mut BTreeMap<Key, V>, key: &[u8]) {
    // Most paths are no directories: look before the keys are copied.
    while let Some((found, _)) = map.range(below(key)).next() {
        let found = found.clone();
        map.remove(&found);
    }
}

/// Cuts bytes into chunks and hashes each.
pub(super) struct ChunkHasher<'a> {
    cut: &'a Cut,
    hashers: Vec<Hasher>,
    /// Bytes of the open chunk, and of all.
    open: u32,
    size: u64,
    digests: Vec<[u8; 32]>,
}

enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Sha256(sha2::Sha256),
}

impl<'a> ChunkHasher<'a> {
    pub(super) fn new(cut: &'a Cut) -> Self {
        let hashers = cut.digesters.iter().map(|digester| match digester {
            Digester::Blake3 => Hasher::Blake3(Box::default()),
            Digester::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
        });
        ChunkHasher { cut, hashers: hashers.collect(), open: 0, size: 0, digests: Vec::new() }
    }

    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        self.size += bytes.len() as u64;
        while !bytes.is_empty() {
            let room = self.cut.chunk_size - self.open;
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(len);
            for hasher in &mut self.hashers {
                match hasher {
                    Hasher::Blake3(hasher) => drop(hasher.update(now)),
                    Hasher::Sha256(hasher) => hasher.update(now),
                }
            }
            self.open += u32::try_from(len).expect("at most the chunk size");
            if self.open == self.cut.chunk_size {
                self.close();
            }
            bytes = rest;
        }
    }

    fn close(&mut self) {
        for hasher in &mut self.hashers {
            self.digests.push(match hasher {
                Hasher::Blake3(hasher) => {
                    let digest = *hasher.finalize().as_bytes();
                    hasher.reset();
                    digest
                }
                Hasher::Sha256(hasher) => hasher.finalize_reset().into(),
            });
        }
        self.open = 0;
    }

    pub(super) fn finish(mut self) -> Content {
        if self.open > 0 {
            self.close();
        }
        Content { size: self.size, digests: self.digests.into() }
    }
}

impl Layer {
    /// Reads a layer to the end of its stream.
    pub(super) fn read(tar: impl Read, cut: &Cut) -> Result<Layer, LayerError> {
        let mut layer = Layer::default();
        let mut tar = TarStream::new(tar);
        while let Some(entry) = tar.next()? {
            layer.entries += 1;
            layer.add(entry, cut, &mut tar)?;
        }
        tar.drain()?;
        Ok(layer)
    }

    fn add<R: Read>(
        &mut self,
        entry: Entry,
        cut: &Cut,
        tar: &mut TarStream<R>,
    ) -> Result<(), LayerError> {
        let key = self.follow(&key_of(&entry.path)?)?;
        // Nothing below a mark is seen either: AUFS kept its hard links in `.wh..wh.plnk`.
        if parent(&key).is_some_and(|dir| dir.split(|&b| b == 0).any(|n| n.starts_with(b".wh."))) {
            return Ok(());
        }
        let dir = parent(&key).unwrap_or_default();
        if name(&key) == b".wh..wh..opq" {
            self.make_way(&key);
            self.opaque.insert(dir.into(), ());
            return Ok(());
        }
        if let Some(hidden) = name(&key).strip_prefix(b".wh.") {
            let gone = if dir.is_empty() { hidden.to_vec() } else { [dir, &[0], hidden].concat() };
            self.make_way(&key);
            self.whiteouts.insert(gone.into(), ());
            return Ok(());
        }
        if key.is_empty() && entry.kind != EntryKind::Dir {
            return Err(LayerError::Root { path: entry.path });
        }
        let attrs = Attrs {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            mtime_nsec: entry.mtime_nsec,
            xattrs: entry.xattrs,
        };
        let (major, minor) = entry.rdev;
        let kind = match entry.kind {
            EntryKind::Dir => Kind::Dir,
            EntryKind::Symlink => Kind::Symlink(entry.link.into()),
            EntryKind::Char => Kind::Char(major, minor),
            EntryKind::Block => Kind::Block(major, minor),
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::File => {
                let mut hasher = ChunkHasher::new(cut);
                tar.content(|bytes| hasher.update(bytes))?;
                self.content_bytes += entry.size;
                Kind::File(hasher.finish())
            }
            EntryKind::HardLink => {
                let target = self.follow(&key_of(&entry.link)?)?;
                if target == key {
                    return match self.named.contains_key(&key) {
                        true => Ok(()),
                        false => Err(LayerError::DeadLink { path: key, target }),
                    };
                }
                let named = match self.named.get(&target) {
                    Some((_, Named::File(file))) => {
                        Named::File(not_a_directory(file, &key, &target)?)
                    }
                    _ => Named::Link(target),
                };
                self.insert(key, named);
                return Ok(());
            }
        };
        self.insert(key, Named::File(Arc::new(File { attrs, kind })));
        Ok(())
    }

    /// Follows the symbolic links that this layer has had so far.
    fn follow(&self, key: &Key) -> Result<Key, LayerError> {
        follow(key, |key| match self.named.get(key) {
            Some((_, Named::File(file))) => Some(file),
            _ => None,
        })
    }

    fn insert(&mut self, key: Key, named: Named) {
        if !named.is_dir() {
            remove_below(&mut self.named, &key);
            remove_below(&mut self.whiteouts, &key);
            remove_below(&mut self.opaque, &key);
            self.opaque.remove(&key);
        }
        let was_a_file = self.named.get(&key).is_some_and(|(_, named)| !named.is_dir());
        if named.is_dir() && was_a_file {
            self.whiteouts.insert(key.clone(), ());
        }
        self.make_way(&key);
        self.named.insert(key, (self.entries, named));
    }

    /// What was a file on the way to `key` becomes a directory. The file has hidden all that lower
    /// layers have there, and the directory does not show it again.
    fn make_way(&mut self, key: &[u8]) {
        let mut above = parent(key);
        while let Some(dir) = above {
            if self.named.get(dir).is_some_and(|(_, named)| !named.is_dir()) {
                self.named.remove(dir);
                self.whiteouts.insert(dir.into(), ());
            }
            above = parent(dir);
        }
    }

    /// Follows the symbolic links of this layer and of `lower`.
    fn follow_in(&self, key: &Key, lower: &Overlay) -> Result<Key, LayerError> {
        follow(key, |key| match self.named.get(key) {
            Some((_, Named::File(file))) => Some(file),
            Some((_, Named::Link(_))) => None,
            None => lower.files.get(key),
        })
    }

    /// The file that the link at `path` to `target` joins. The layer did not have it before.
    fn resolve(&self, path: &Key, target: &Key, lower: &Overlay) -> Result<Arc<File>, LayerError> {
        let dead = || LayerError::DeadLink { path: path.clone(), target: target.clone() };
        let mut at = target.clone();
        // A chain of links is no longer than there are names, unless it is a circle.
        for _ in 0..=self.named.len() {
            at = self.follow_in(&at, lower)?;
            if let Some(file) = lower.files.get(&at) {
                return not_a_directory(file, path, target);
            }
            match self.named.get(&at) {
                Some((_, Named::File(file))) => return not_a_directory(file, path, target),
                Some((_, Named::Link(next))) => at = next.clone(),
                None => return Err(dead()),
            }
        }
        Err(dead())
    }
}

fn not_a_directory(file: &Arc<File>, path: &Key, target: &Key) -> Result<Arc<File>, LayerError> {
    if file.kind == Kind::Dir {
        return Err(LayerError::LinkToDirectory { path: path.clone(), target: target.clone() });
    }
    Ok(file.clone())
}

impl Named {
    fn is_dir(&self) -> bool {
        matches!(self, Named::File(file) if file.kind == Kind::Dir)
    }
}

impl Overlay {
    /// Puts `layer` on top.
    pub(super) fn apply(&mut self, layer: Layer) -> Result<(), LayerError> {
        let mut named: Vec<_> = layer.named.iter().collect();
        named.sort_unstable_by_key(|(_, (number, _))| *number);
        let mut links = Vec::new();
        for (path, (_, named)) in &named {
            if let Named::Link(target) = named {
                links.push(layer.resolve(path, target, self)?);
            }
        }
        let mut links = links.into_iter();
        // Where marks are is found out before any of them removes something.
        let follow = |key: &Key| layer.follow_in(key, self);
        let whiteouts = layer.whiteouts.keys().map(follow).collect::<Result<Vec<_>, _>>()?;
        let mark = |dir: &Key| {
            // As an entry of the directory, so that this is followed, too.
            let inside = if dir.is_empty() { b"_".to_vec() } else { [dir, &b"\0_"[..]].concat() };
            let inside = layer.follow_in(&inside.into(), self)?;
            Ok::<Key, LayerError>(parent(&inside).unwrap_or_default().into())
        };
        let opaque = layer.opaque.keys().map(mark).collect::<Result<Vec<_>, _>>()?;
        for gone in &whiteouts {
            self.files.remove(gone);
            remove_below(&mut self.files, gone);
        }
        for dir in &opaque {
            remove_below(&mut self.files, dir);
        }
        // A mark needs the directory that it stands in, as every entry does.
        for gone in &whiteouts {
            self.imply(parent(gone));
        }
        for dir in &opaque {
            self.imply(Some(dir));
        }
        for (key, (_, named)) in named {
            let file = match named {
                Named::File(file) => file.clone(),
                Named::Link(_) => links.next().expect("each link was resolved above, in order"),
            };
            let key = layer.follow_in(key, self)?;
            self.imply(parent(&key));
            if file.kind != Kind::Dir {
                remove_below(&mut self.files, &key);
            }
            self.files.insert(key, file);
        }
        Ok(())
    }

    /// Makes sure that `dir` and all above it are directories.
    fn imply(&mut self, mut dir: Option<&[u8]>) {
        while let Some(key) = dir {
            if self.files.get(key).is_some_and(|file| file.kind == Kind::Dir) {
                return;
            }
            self.files.insert(key.into(), implied_dir());
            dir = parent(key);
        }
    }

    /// Adds one path, for sources that are no tar. Its parent must have been added.
    pub(super) fn insert(&mut self, key: Key, file: Arc<File>) {
        self.files.insert(key, file);
    }

    /// All that the layers made; a root is implied.
    pub(super) fn finish(mut self) -> BTreeMap<Key, Arc<File>> {
        self.imply(Some(&[]));
        self.files
    }

    /// For each directory, in the order of the paths, how many directories it holds.
    pub(super) fn subdirectories(files: &BTreeMap<Key, Arc<File>>) -> Vec<u32> {
        let mut counts: Vec<u32> = Vec::new();
        let mut open: HashMap<&[u8], usize> = HashMap::new();
        for (key, file) in files {
            if file.kind != Kind::Dir {
                continue;
            }
            if let Some(&above) = parent(key).and_then(|dir| open.get(dir)) {
                counts[above] += 1;
            }
            open.insert(key, counts.len());
            counts.push(0);
        }
        counts
    }
}

fn implied_dir() -> Arc<File> {
    let attrs = Attrs { mode: 0o755, ..Attrs::default() };
    Arc::new(File { attrs, kind: Kind::Dir })
}

#[cfg(test)]
mod tests;
