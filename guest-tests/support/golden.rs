//! Images whose content is written down: `guest-tests/golden`, made by the reference builder.
//!
//! [`Tree`] is a parsed `tree.json`; [`check`] reads a served image and says where it differs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use sha2::{Digest, Sha256};

use super::daemon::Launch;
use super::fuse_abi::{Attr, EntryOut, ROOT_ID};
use super::fuse_client::{Fuse, FuseError};
use super::rng::Rng;
use super::to_usize;

/// One path of `tree.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub path: Vec<u8>,
    /// `S_IFMT` and permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, also before it.
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub nlink: u32,
    /// Of files and symlinks.
    pub size: Option<u64>,
    /// Of files, in hex.
    pub sha256: Option<String>,
    pub target: Option<Vec<u8>>,
    /// Major and minor.
    pub rdev: Option<(u32, u32)>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|&b| b == b'/').next().unwrap_or(&[])
    }

    pub fn show(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

/// All paths of an image, in the order of their bytes.
pub struct Tree {
    pub nodes: BTreeMap<Vec<u8>, Node>,
}

fn base64(text: &str) -> Result<Vec<u8>> {
    Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
}

/// `key`, or `key_b64` where the bytes are not UTF-8.
fn bytes_of(object: &serde_json::Value, key: &str) -> Result<Option<Vec<u8>>> {
    if let Some(text) = object[key].as_str() {
        return Ok(Some(text.as_bytes().to_vec()));
    }
    object[format!("{key}_b64")].as_str().map(base64).transpose()
}

impl Tree {
    pub fn load(file: &Path) -> Result<Tree> {
        let text = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        let all: Vec<serde_json::Value> = serde_json::from_slice(&text)?;
        let mut nodes = BTreeMap::new();
        for object in &all {
            let node = Tree::node(object).with_context(|| object.to_string())?;
            nodes.insert(node.path.clone(), node);
        }
        ensure!(nodes.len() == all.len(), "a path is listed twice");
        Ok(Tree { nodes })
    }

    fn node(object: &serde_json::Value) -> Result<Node> {
        let number = |key: &str| -> Result<u32> {
            Ok(u32::try_from(object[key].as_u64().with_context(|| key.to_string())?)?)
        };
        let kind = match object["type"].as_str().context("type")? {
            "file" => libc::S_IFREG,
            "dir" => libc::S_IFDIR,
            "symlink" => libc::S_IFLNK,
            "char" => libc::S_IFCHR,
            "block" => libc::S_IFBLK,
            "fifo" => libc::S_IFIFO,
            "socket" => libc::S_IFSOCK,
            other => bail!("type {other}"),
        };
        let mode = u32::from_str_radix(object["mode"].as_str().context("mode")?, 8)?;
        let mut xattrs = BTreeMap::new();
        for (name, value) in object["xattrs"].as_object().into_iter().flatten() {
            xattrs.insert(name.as_bytes().to_vec(), base64(value.as_str().context("xattr")?)?);
        }
        let rdev = match object["rdev"].as_array() {
            Some(pair) => {
                let part = |i: usize| -> Result<u32> {
                    Ok(u32::try_from(pair.get(i).and_then(|v| v.as_u64()).context("rdev")?)?)
                };
                Some((part(0)?, part(1)?))
            }
            None => None,
        };
        Ok(Node {
            path: bytes_of(object, "path")?.context("path")?,
            mode: kind | mode,
            uid: number("uid")?,
            gid: number("gid")?,
            mtime: object["mtime"].as_i64().context("mtime")?,
            mtime_nsec: number("mtime_nsec")?,
            nlink: number("nlink")?,
            size: object["size"].as_u64(),
            sha256: object["sha256"].as_str().map(str::to_owned),
            target: bytes_of(object, "target")?,
            rdev,
            xattrs,
        })
    }

    pub fn files(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|n| n.is_file())
    }

    /// Names in the directory `path`.
    pub fn children(&self, path: &[u8]) -> BTreeSet<Vec<u8>> {
        let prefix = if path == b"/" { b"/".to_vec() } else { [path, b"/"].concat() };
        self.nodes
            .range(prefix.clone()..)
            .map(|(p, _)| p)
            .take_while(|p| p.starts_with(&prefix))
            .filter(|p| p.len() > prefix.len() && !p[prefix.len()..].contains(&b'/'))
            .map(|p| p[prefix.len()..].to_vec())
            .collect()
    }
}

/// One image of `guest-tests/golden`.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub bootstrap: PathBuf,
    pub blobs: PathBuf,
    pub tree: PathBuf,
}

/// Cases that are served; those with a second bootstrap in the same folder come again under it.
pub const SERVED: [(&str, &str, &str); 13] = [
    ("v6-zstd", "bootstrap", "tree.json"),
    ("v6-lz4", "bootstrap", "tree.json"),
    ("v6-none", "bootstrap", "tree.json"),
    ("v6-sha256", "bootstrap", "tree.json"),
    ("v6-blake3", "bootstrap", "tree.json"),
    ("v6-batch", "bootstrap", "tree.json"),
    ("v6-two-layers", "bootstrap", "tree.json"),
    ("v6-two-layers", "lower-bootstrap", "lower-tree.json"),
    ("v6-chunkdict", "bootstrap", "tree.json"),
    ("v6-chunkdict", "dict-bootstrap", "dict-tree.json"),
    ("v6-oci-packed", "bootstrap", "tree.json"),
    ("v6-merged", "bootstrap", "tree.json"),
    ("v6-empty", "bootstrap", "tree.json"),
];

pub fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden")
}

pub fn case(name: &'static str) -> Case {
    case_of(name, "bootstrap", "tree.json")
}

pub fn case_of(name: &'static str, bootstrap: &str, tree: &str) -> Case {
    let dir = golden_dir().join(name);
    Case { name, bootstrap: dir.join(bootstrap), blobs: dir.join("blobs"), tree: dir.join(tree) }
}

impl Case {
    pub fn tree(&self) -> Tree {
        Tree::load(&self.tree).expect("the golden images are in the repository")
    }

    /// How to serve it from below `scratch`.
    pub fn launch(&self, scratch: &Path) -> Launch {
        let launch = Launch::new(&self.bootstrap, &self.blobs, scratch);
        if self.name == "v6-oci-packed" {
            // The bootstrap inside a packed blob cannot name the blob: its id is 64 times `x`.
            let mut files = fs::read_dir(&self.blobs).expect("a folder of blobs");
            let only = files.next().expect("one blob").expect("readable").path();
            return launch.blob_file(&only);
        }
        launch
    }
}

/// What was found to differ, one line each.
#[derive(Default)]
pub struct Differences(pub Vec<String>);

impl Differences {
    fn note(&mut self, node: &Node, what: impl std::fmt::Display) {
        self.0.push(format!("{}: {what}", node.show()));
    }

    fn same<T: PartialEq + std::fmt::Debug>(&mut self, node: &Node, what: &str, got: T, want: T) {
        if got != want {
            self.note(node, format!("{what} is {got:?}, should be {want:?}"));
        }
    }

    pub fn assert_none(&self, context: &str) {
        let shown = self.0.iter().take(20).cloned().collect::<Vec<_>>().join("\n  ");
        assert!(self.0.is_empty(), "{context}: {} differences\n  {shown}", self.0.len());
    }
}

/// `rdev` as FUSE carries it: the kernel's new encoding.
fn new_encode_dev((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn check_attr(node: &Node, attr: &Attr, diff: &mut Differences) {
    diff.same(node, "mode", attr.mode, node.mode);
    diff.same(node, "uid", attr.uid, node.uid);
    diff.same(node, "gid", attr.gid, node.gid);
    diff.same(node, "nlink", attr.nlink, node.nlink);
    let time = (node.mtime, node.mtime_nsec);
    diff.same(node, "mtime", (attr.mtime.cast_signed(), attr.mtimensec), time);
    diff.same(node, "ctime", (attr.ctime.cast_signed(), attr.ctimensec), time);
    if let Some(size) = node.size {
        diff.same(node, "size", attr.size, size);
    }
    diff.same(node, "rdev", attr.rdev, node.rdev.map_or(0, new_encode_dev));
    if node.is_file() && attr.blocks > attr.size.next_multiple_of(1 << 20) / 512 + 8 {
        diff.note(node, format!("{} blocks for {} bytes", attr.blocks, attr.size));
    }
}

/// STATX says the same as GETATTR. A server need not know it: the guest then asks for attributes.
fn check_statx(
    fuse: &mut Fuse,
    node: &Node,
    nodeid: u64,
    attr: &Attr,
    diff: &mut Differences,
) -> Result<()> {
    let stat = match fuse.statx(nodeid) {
        Ok(stat) => stat,
        Err(FuseError::Errno(libc::ENOSYS)) => return Ok(()),
        Err(error) => return Err(error).with_context(|| node.show()),
    };
    let basic = libc::STATX_BASIC_STATS;
    diff.same(node, "STATX mask", stat.mask & basic, basic);
    let got = (u32::from(stat.mode), stat.ino, stat.size, stat.blocks, stat.nlink);
    diff.same(node, "STATX", got, (attr.mode, attr.ino, attr.size, attr.blocks, attr.nlink));
    diff.same(node, "STATX owner", (stat.uid, stat.gid), (attr.uid, attr.gid));
    let time = (stat.mtime.sec, stat.mtime.nsec);
    diff.same(node, "STATX mtime", time, (attr.mtime.cast_signed(), attr.mtimensec));
    let rdev = (stat.rdev_major, stat.rdev_minor);
    diff.same(node, "STATX rdev", rdev, node.rdev.unwrap_or((0, 0)));
    Ok(())
}

/// How to look at an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// LOOKUP of every path of the list, GETATTR, and READDIR of every directory.
    Lookup,
    /// READDIRPLUS from the root; the list only says what should have come out.
    ReaddirPlus,
}

/// Reads all of the served image: metadata as `how` says, xattrs, links and content always.
/// `step` is the size of reads in bytes.
pub fn check(fuse: &mut Fuse, tree: &Tree, how: How, step: usize) -> Result<Differences> {
    let mut diff = Differences::default();
    let found = match how {
        How::Lookup => by_lookup(fuse, tree, &mut diff)?,
        How::ReaddirPlus => by_readdirplus(fuse, tree, &mut diff)?,
    };
    let mut rng = Rng::new(step as u64);
    let any_xattrs = tree.nodes.values().any(|node| !node.xattrs.is_empty());
    for (path, (nodeid, attr)) in &found {
        let node = &tree.nodes[path];
        check_attr(node, attr, &mut diff);
        check_statx(fuse, node, *nodeid, attr, &mut diff)?;
        check_xattrs(fuse, node, *nodeid, any_xattrs, &mut diff)?;
        if let Some(target) = &node.target {
            let got = fuse.readlink(*nodeid).with_context(|| node.show())?;
            diff.same(node, "target", &got, target);
        }
        if node.is_file() {
            check_content(fuse, node, *nodeid, step, &mut rng, &mut diff)?;
        }
    }
    check_hard_links(tree, &found, &mut diff);
    let forget: Vec<_> = found.values().filter(|f| f.0 != ROOT_ID).map(|f| (f.0, 1)).collect();
    for some in forget.chunks(100) {
        fuse.batch_forget(some)?;
    }
    Ok(diff)
}

type Found = BTreeMap<Vec<u8>, (u64, Attr)>;

fn by_lookup(fuse: &mut Fuse, tree: &Tree, diff: &mut Differences) -> Result<Found> {
    let mut found = Found::new();
    for (path, node) in &tree.nodes {
        if path == b"/" {
            found.insert(path.clone(), (ROOT_ID, fuse.getattr(ROOT_ID)?));
        } else {
            let cut = path.iter().rposition(|&b| b == b'/').context("absolute paths")?;
            let parent = if cut == 0 { &path[..1] } else { &path[..cut] };
            let Some(&(parent, _)) = found.get(parent) else {
                diff.note(node, "has no parent");
                continue;
            };
            let entry = match fuse.lookup(parent, node.name()) {
                Ok(entry) if entry.nodeid != 0 => entry,
                Ok(_) | Err(FuseError::Errno(_)) => {
                    diff.note(node, "not found");
                    continue;
                }
                Err(error) => return Err(error).context(node.show()),
            };
            check_entry(node, &entry, diff);
            let attr = fuse.getattr(entry.nodeid).with_context(|| node.show())?;
            diff.same(node, "attributes of LOOKUP and GETATTR", entry.attr, attr);
            found.insert(path.clone(), (entry.nodeid, attr));
        }
        if node.is_dir() {
            let listed = fuse.list(found[path].0, 4096, false).with_context(|| node.show())?;
            let mut names = BTreeSet::new();
            for entry in listed.iter().filter(|e| e.name != b"." && e.name != b"..") {
                let child = [path.as_slice(), if path == b"/" { b"" } else { b"/" }, &entry.name];
                if let Some(child) = tree.nodes.get(&child.concat()) {
                    diff.same(child, "d_type", entry.kind, (child.mode & libc::S_IFMT) >> 12);
                }
                if !names.insert(entry.name.clone()) {
                    diff.note(node, format!("lists {:?} twice", entry.name));
                }
            }
            diff.same(node, "list of names", names, tree.children(path));
        }
    }
    for missing in [&b"no such name"[..], b"\xff\xfe", &[b'x'; 255]] {
        match fuse.lookup(ROOT_ID, missing) {
            Ok(entry) if entry.nodeid == 0 => {}
            Err(FuseError::Errno(libc::ENOENT)) => {}
            other => diff.0.push(format!("/{missing:?}, which does not exist: {other:?}")),
        }
    }
    Ok(found)
}

fn check_entry(node: &Node, entry: &EntryOut, diff: &mut Differences) {
    if entry.entry_valid == 0 || entry.attr_valid == 0 {
        diff.note(node, "an immutable entry is not cached");
    }
}

fn by_readdirplus(fuse: &mut Fuse, tree: &Tree, diff: &mut Differences) -> Result<Found> {
    let mut found = Found::new();
    let mut todo = vec![(b"/".to_vec(), ROOT_ID)];
    found.insert(b"/".to_vec(), (ROOT_ID, fuse.getattr(ROOT_ID)?));
    while let Some((path, nodeid)) = todo.pop() {
        let listed = fuse
            .list(nodeid, 32 << 10, true)
            .with_context(|| String::from_utf8_lossy(&path).into_owned())?;
        for item in listed {
            let entry = item.entry.context("READDIRPLUS carries entries")?;
            if item.name == b"." || item.name == b".." {
                ensure!(entry.nodeid == 0, "`.` and `..` count as no lookup");
                continue;
            }
            let slash: &[u8] = if path == b"/" { b"" } else { b"/" };
            let child = [path.as_slice(), slash, &item.name].concat();
            let Some(node) = tree.nodes.get(&child) else {
                diff.0.push(format!("{}: not in the tree", String::from_utf8_lossy(&child)));
                continue;
            };
            let (nodeid, attr) = if entry.nodeid == 0 {
                // The server may leave the attributes out; then the guest looks the name up.
                let entry = fuse.lookup(nodeid, &item.name)?;
                (entry.nodeid, entry.attr)
            } else {
                check_entry(node, &entry, diff);
                (entry.nodeid, entry.attr)
            };
            diff.same(node, "d_type", item.kind, (node.mode & libc::S_IFMT) >> 12);
            diff.same(node, "d_ino", item.ino, attr.ino);
            if node.is_dir() {
                todo.push((child.clone(), nodeid));
            }
            if found.insert(child, (nodeid, attr)).is_some() {
                diff.note(node, "listed twice");
            }
        }
    }
    for (path, node) in &tree.nodes {
        if !found.contains_key(path) {
            diff.note(node, "not listed");
        }
    }
    Ok(found)
}

fn check_xattrs(
    fuse: &mut Fuse,
    node: &Node,
    nodeid: u64,
    any_in_image: bool,
    diff: &mut Differences,
) -> Result<()> {
    let names = match fuse.listxattr(nodeid) {
        Ok(names) => names,
        // The guest then asks no more, which is right where no file has any.
        Err(FuseError::Errno(libc::ENOSYS)) if !any_in_image => return Ok(()),
        Err(error) => {
            diff.note(node, format!("LISTXATTR: {error}"));
            return Ok(());
        }
    };
    let got: BTreeSet<Vec<u8>> = names.into_iter().collect();
    let want: BTreeSet<Vec<u8>> = node.xattrs.keys().cloned().collect();
    diff.same(node, "names of xattrs", got, want);
    for (name, want) in &node.xattrs {
        match fuse.getxattr(nodeid, name) {
            Ok(got) => diff.same(node, "xattr", &got, want),
            Err(error) => diff.note(node, format!("xattr {name:?}: {error}")),
        }
    }
    match fuse.getxattr(nodeid, b"user.no such attribute") {
        Err(FuseError::Errno(libc::ENODATA)) => {}
        other => diff.note(node, format!("an xattr that does not exist: {other:?}")),
    }
    Ok(())
}

fn check_content(
    fuse: &mut Fuse,
    node: &Node,
    nodeid: u64,
    step: usize,
    rng: &mut Rng,
    diff: &mut Differences,
) -> Result<()> {
    let all = match fuse.read_all(nodeid, step) {
        Ok(all) => all,
        Err(error) => {
            diff.note(node, format!("READ: {error}"));
            return Ok(());
        }
    };
    diff.same(node, "length of content", all.len() as u64, node.size.context("size")?);
    let digest = hex::encode(Sha256::digest(&all));
    diff.same(node, "sha256 of content", Some(digest), node.sha256.clone());
    check_holes(fuse, node, nodeid, &all, diff)?;
    // Odd places: across chunk and block borders, up to and past the end.
    for _ in 0..3 {
        let offset = rng.below(all.len() as u64 + 2);
        let len = 1 + rng.index(9000);
        let got = fuse.read(nodeid, 0, offset, len).with_context(|| node.show())?;
        let from = to_usize(offset).min(all.len());
        let to = (from + len).min(all.len());
        if got != all[from..to] {
            diff.note(node, format!("read of {len} bytes at {offset} differs"));
        }
    }
    Ok(())
}

/// Holes and data take turns from the start of a file to its end, and holes are zeros.
fn check_holes(
    fuse: &mut Fuse,
    node: &Node,
    nodeid: u64,
    all: &[u8],
    diff: &mut Differences,
) -> Result<()> {
    let size = all.len() as u64;
    let mut at = 0;
    while at < size {
        let data = match fuse.lseek(nodeid, at, libc::SEEK_DATA) {
            Ok(data) => data,
            Err(FuseError::Errno(libc::ENXIO)) => size,
            Err(FuseError::Errno(libc::ENOSYS)) => return Ok(()),
            Err(error) => return Err(error).with_context(|| node.show()),
        };
        if data < at || data > size || all[to_usize(at)..to_usize(data)].iter().any(|&b| b != 0) {
            diff.note(node, format!("SEEK_DATA from {at} says {data}"));
            return Ok(());
        }
        if data == size {
            break;
        }
        let hole = fuse.lseek(nodeid, data, libc::SEEK_HOLE).with_context(|| node.show())?;
        if hole <= data || hole > size {
            diff.note(node, format!("SEEK_HOLE from {data} says {hole}"));
            return Ok(());
        }
        at = hole;
    }
    for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
        match fuse.lseek(nodeid, size, whence) {
            Err(FuseError::Errno(libc::ENXIO | libc::ENOSYS)) => {}
            other => diff.note(node, format!("LSEEK {whence} from the end: {other:?}")),
        }
    }
    Ok(())
}

/// Names of one file share an inode number and a nodeid, and only they do.
fn check_hard_links(tree: &Tree, found: &Found, diff: &mut Differences) {
    let mut by_ino: BTreeMap<u64, Vec<&Vec<u8>>> = BTreeMap::new();
    let mut by_node: BTreeMap<u64, usize> = BTreeMap::new();
    for (path, (nodeid, attr)) in found {
        by_ino.entry(attr.ino).or_default().push(path);
        *by_node.entry(*nodeid).or_default() += 1;
    }
    for (ino, paths) in &by_ino {
        let node = &tree.nodes[paths[0]];
        // Directories have one name, however many links they count.
        let want = if node.is_file() { to_usize(u64::from(node.nlink)) } else { 1 };
        if paths.len() != want {
            diff.note(node, format!("inode {ino} has {} names, should have {want}", paths.len()));
        }
        let (nodeid, _) = found[paths[0]];
        diff.same(node, "names of the nodeid", by_node[&nodeid], paths.len());
    }
}
