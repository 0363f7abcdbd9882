//! The file system rule: is the tree in the bootstrap the one that the source makes?
//!
//! Both sides come in the same order, so they are compared in one walk. What an entry of the image
//! cannot be read is said once, and what it hides is counted rather than listed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::overlay::{Attrs, Content, Cut, File, Key, Kind, Overlay, path_of};
use super::report::{Report, Rule, Value, counted};
use crate::rafs::codec::Digester;
use crate::rafs::id::{BlobIndex, ChunkIndex, Nid};
use crate::rafs::{Bootstrap, ChunkDigests, FileKind, Inode, WalkError, WalkItem};

const RULE: Rule = Rule::FileSystem;

/// What is known of the chunks of an image, by blob.
#[derive(Default)]
pub(super) struct ChunkContent {
    /// Digests that were computed from the blob's bytes; `None` for a chunk that is damaged.
    pub seen: HashMap<BlobIndex, Vec<Option<[u8; 32]>>>,
    /// Digests as the chunk table has them.
    pub table: HashMap<BlobIndex, ChunkDigests>,
}

/// How exactly times must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum MtimePrecision {
    /// To the nanosecond.
    Exact,
    /// To the second: nydus-image drops fractions.
    Seconds,
}

/// Reads how an image cuts and digests content.
pub(super) fn cut_of(image: &Bootstrap) -> Cut {
    let mut digesters = Vec::new();
    for blob in image.blobs() {
        if !digesters.contains(&blob.digester) {
            digesters.push(blob.digester);
        }
    }
    if digesters.is_empty() {
        // There is content to hash only if the source has some, which is a difference then.
        digesters.push(Digester::Blake3);
    }
    Cut { chunk_size: image.chunk_size(), digesters }
}

/// Compares `files`, hashed by `cut_of(image)`, with the tree of `image`.
pub(super) fn compare(
    files: &BTreeMap<Key, Arc<File>>,
    image: &Bootstrap,
    chunks: &ChunkContent,
    mtime: MtimePrecision,
    report: &mut Report,
) {
    let names = names(files);
    let mut compare = Compare {
        image,
        chunks,
        cut: cut_of(image),
        mtime,
        names,
        subdirectories: Overlay::subdirectories(files).into_iter(),
        source_links: HashMap::new(),
        target_links: HashMap::new(),
        report,
    };
    compare.report.counts.paths += files.len() as u64;
    let mut source = files.iter().peekable();
    // Paths that cannot be read, and how many of the source's they hide.
    let mut damaged: BTreeMap<Key, (WalkError, u64)> = BTreeMap::new();
    for item in image.walk() {
        let item = match item {
            Ok(item) => item,
            Err(e) => {
                damaged.entry(key_of(&e.path)).or_insert((e, 0));
                continue;
            }
        };
        let key = key_of(&item.path());
        while let Some((missing, file)) = source.next_if(|(path, _)| **path < key) {
            compare.missing(missing, file, &mut damaged);
        }
        match source.next_if(|(path, _)| **path == key) {
            Some((path, file)) => compare.pair(path, file, &item),
            None => compare.report.difference(
                RULE,
                item.path(),
                "type",
                Value::Absent,
                item.inode.kind().name(),
            ),
        }
    }
    for (missing, file) in source {
        compare.missing(missing, file, &mut damaged);
    }
    for (e, hidden) in damaged.into_values() {
        let expected = counted(hidden, "path");
        let what = format!("cannot be read: {}", e.source);
        compare.report.difference(RULE, e.path, "entry", expected, what);
    }
}

/// For each regular file with several names, how many.
fn names(files: &BTreeMap<Key, Arc<File>>) -> HashMap<*const File, u32> {
    let mut names = HashMap::new();
    for file in files.values().filter(|file| Arc::strong_count(file) > 1) {
        *names.entry(Arc::as_ptr(file)).or_insert(0) += 1;
    }
    names
}

fn key_of(path: &[u8]) -> Key {
    let path = path.strip_prefix(b"/").unwrap_or(path);
    path.iter().map(|&b| if b == b'/' { 0 } else { b }).collect()
}

fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Dir => FileKind::Directory,
        Kind::File(_) => FileKind::Regular,
        Kind::Symlink(_) => FileKind::Symlink,
        Kind::Char(..) => FileKind::CharDevice,
        Kind::Block(..) => FileKind::BlockDevice,
        Kind::Fifo => FileKind::Fifo,
        Kind::Socket => FileKind::Socket,
    }
    .name()
}

struct Compare<'a> {
    image: &'a Bootstrap,
    chunks: &'a ChunkContent,
    cut: Cut,
    mtime: MtimePrecision,
    names: HashMap<*const File, u32>,
    subdirectories: std::vec::IntoIter<u32>,
    /// The first path of each regular file, among those that both sides have.
    source_links: HashMap<*const File, &'a Key>,
    target_links: HashMap<Nid, &'a Key>,
    report: &'a mut Report,
}

impl<'a> Compare<'a> {
    fn missing(
        &mut self,
        key: &Key,
        file: &Arc<File>,
        damaged: &mut BTreeMap<Key, (WalkError, u64)>,
    ) {
        if file.kind == Kind::Dir {
            self.subdirectories.next();
        }
        // Itself or a directory above it.
        let mut above = Some(&key[..]);
        while let Some(dir) = above {
            if let Some((_, hidden)) = damaged.get_mut(dir) {
                *hidden += 1;
                return;
            }
            above = match dir.iter().rposition(|&b| b == 0) {
                Some(at) => Some(&dir[..at]),
                None if dir.is_empty() => None,
                None => Some(&[]),
            };
        }
        self.report.difference(RULE, path_of(key), "type", kind_name(&file.kind), Value::Absent);
    }

    fn pair(&mut self, key: &'a Key, file: &'a Arc<File>, item: &WalkItem<'_>) {
        let inode = &item.inode;
        let nlink = match &file.kind {
            Kind::Dir => 2 + self.subdirectories.next().unwrap_or_default(),
            // RAFS has hard links of regular files only: other names are files of their own.
            Kind::File(_) => self.names.get(&Arc::as_ptr(file)).copied().unwrap_or(1),
            _ => 1,
        };
        let mut fields = Fields { path: key, report: self.report };
        let (source, target) = (kind_name(&file.kind), inode.kind().name());
        if source != target {
            return fields.compare("type", source, target);
        }
        // What chmod cannot change says nothing: a link's mode is 0777 once it is unpacked.
        let mode = match inode.mode() & 0o7777 {
            0o777 if inode.kind() == FileKind::Symlink => file.attrs.mode,
            mode => mode,
        };
        fields.compare("mode", octal(file.attrs.mode), octal(mode));
        fields.compare("uid", file.attrs.uid.to_string(), inode.uid().to_string());
        fields.compare("gid", file.attrs.gid.to_string(), inode.gid().to_string());
        let time = |seconds: i64, nanoseconds: u32| match self.mtime {
            MtimePrecision::Exact => time(seconds, nanoseconds),
            MtimePrecision::Seconds => seconds.to_string(),
        };
        fields.compare(
            "mtime",
            time(file.attrs.mtime, file.attrs.mtime_nsec),
            time(inode.mtime(), inode.mtime_nsec()),
        );
        fields.compare("nlink", nlink.to_string(), inode.nlink().to_string());
        xattrs(&file.attrs, inode, &mut fields);
        match &file.kind {
            Kind::Symlink(target) => match inode.symlink_target() {
                Ok(found) => fields.compare("target", bytes(target), bytes(found)),
                Err(e) => fields.compare("target", bytes(target), unreadable(&e)),
            },
            Kind::Char(major, minor) | Kind::Block(major, minor) => {
                let (found_major, found_minor) = inode.rdev_major_minor();
                let found = format!("{found_major}:{found_minor}");
                fields.compare("rdev", format!("{major}:{minor}"), found);
            }
            Kind::File(content) => {
                fields.compare("size", content.size.to_string(), inode.size().to_string());
                if content.size == inode.size() {
                    self.content(key, content, inode);
                }
                let source = *self.source_links.entry(Arc::as_ptr(file)).or_insert(key);
                let target = *self.target_links.entry(inode.nid()).or_insert(key);
                if source != target {
                    let first = |first: &Key| match first == key {
                        true => Value::Absent,
                        false => Value::Bytes(path_of(first)),
                    };
                    let (source, target) = (first(source), first(target));
                    self.report.difference(RULE, path_of(key), "hard link to", source, target);
                }
            }
            Kind::Dir | Kind::Fifo | Kind::Socket => {}
        }
    }

    fn content(&mut self, key: &Key, content: &Content, inode: &Inode<'_>) {
        let stride = self.cut.digesters.len();
        let mut first = None;
        let (mut differing, mut unknown) = (0, 0);
        for (i, digests) in (0..inode.chunk_count()).zip(content.digests.chunks_exact(stride)) {
            let (digester, found) = match self.chunk(inode, i) {
                Ok(Some(found)) => found,
                Ok(None) => {
                    unknown += 1;
                    continue;
                }
                Err(what) => {
                    first.get_or_insert((i, digests[0], self.cut.digesters[0], Err(what)));
                    differing += 1;
                    continue;
                }
            };
            let slot = self.cut.digesters.iter().position(|&d| d == digester).unwrap_or_default();
            if digests[slot] != found {
                first.get_or_insert((i, digests[slot], digester, Ok(found)));
                differing += 1;
            }
        }
        if let Some((i, want, digester, found)) = first {
            let shown = |digest| format!("{}:{}", digester.name(), hex::encode(digest));
            let found = found.map_or_else(|what| what, shown);
            let (path, count) = (path_of(key), inode.chunk_count());
            self.report.difference(RULE, path, "content", shown(want), found);
            let detail = match differing {
                1 => format!("chunk {i} of {count}"),
                n => format!("chunk {i} of {count}, {} more differ", n - 1),
            };
            self.report.detail(RULE, detail);
        }
        if unknown > 0 {
            let what = "content: chunks without a digest in the image and not read from a blob";
            self.report.not_told(RULE, what);
        }
    }

    /// The digest of chunk `i` of a file as the image has it; `None` if nothing is known of it.
    fn chunk(
        &self,
        inode: &Inode<'_>,
        i: u32,
    ) -> std::result::Result<Option<(Digester, [u8; 32])>, String> {
        let addr = inode.chunk(i).map_err(|e| e.to_string())?;
        let blob = addr.blob().ok_or("a chunk in no blob")?;
        let index = ChunkIndex(addr.chunk_index());
        let digester = self
            .image
            .blobs()
            .get(usize::from(blob.0))
            .map(|blob| blob.digester)
            .ok_or_else(|| format!("no blob {}", blob.0))?;
        if let Some(seen) = self.chunks.seen.get(&blob) {
            let at = usize::try_from(index.0).unwrap_or(usize::MAX);
            return match seen.get(at) {
                Some(Some(digest)) => Ok(Some((digester, *digest))),
                Some(None) => Err(format!("chunk {} of its blob is damaged", index.0)),
                None => Err(format!("chunk {} of its blob does not exist", index.0)),
            };
        }
        let digest = self.chunks.table.get(&blob).and_then(|table| table.get(index));
        Ok(digest.map(|digest| (digester, *digest)))
    }
}

/// Reports on one path.
struct Fields<'a> {
    path: &'a Key,
    report: &'a mut Report,
}

impl Fields<'_> {
    fn compare(&mut self, field: &str, source: impl Into<Value>, target: impl Into<Value>) {
        let (source, target) = (source.into(), target.into());
        if source != target {
            self.report.difference(RULE, path_of(self.path), field, source, target);
        }
    }
}

fn xattrs(attrs: &Attrs, inode: &Inode<'_>, fields: &mut Fields<'_>) {
    let found = match inode.xattrs() {
        Ok(found) => found,
        Err(e) => {
            let count = u64::try_from(attrs.xattrs.len()).unwrap_or(u64::MAX);
            return fields.compare("xattrs", counted(count, "attribute"), unreadable(&e));
        }
    };
    let mut found: BTreeMap<Vec<u8>, &[u8]> =
        found.map(|xattr| (xattr.full_name(), xattr.value)).collect();
    let field = |name: &[u8]| format!("xattr {}", crate::build::image_file::printable(name));
    for (name, value) in &attrs.xattrs {
        let there = found.remove(name).map_or(Value::Absent, bytes);
        fields.compare(&field(name), bytes(value), there);
    }
    for (name, value) in found {
        fields.compare(&field(&name), Value::Absent, bytes(value));
    }
}

fn octal(mode: u16) -> String {
    format!("{mode:04o}")
}

/// Seconds since the epoch as a decimal number.
fn time(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (seconds, 0) => seconds.to_string(),
        (0.., nanoseconds) => format!("{seconds}.{nanoseconds:09}"),
        // Nanoseconds count forward from a negative second.
        (-1, nanoseconds) => format!("-0.{:09}", 1_000_000_000 - nanoseconds),
        (_, nanoseconds) => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanoseconds),
    }
}

fn bytes(bytes: &[u8]) -> Value {
    Value::Bytes(bytes.to_vec())
}

fn unreadable(e: &crate::rafs::FormatError) -> String {
    format!("cannot be read: {e}")
}
