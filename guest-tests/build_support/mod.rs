//! Source trees, images made of them by `rafs create`, and what both look like when they are read.
#![allow(dead_code, reason = "each test program uses another part of this")]

pub mod erofs;
pub mod foreign;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rafsd::rafs::id::ChunkIndex;
use rafsd::rafs::{Bootstrap, FileKind};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs `rafs` with some arguments and this standard input.
pub fn rafs<S: AsRef<OsStr>>(args: &[S], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rafs"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // `rafs` may end without reading all of it.
    child.stdin.take().unwrap().write_all(stdin).ok();
    child.wait_with_output().unwrap()
}

/// An image on disk.
pub struct Built {
    pub bootstrap: PathBuf,
    pub blobs: PathBuf,
}

impl Built {
    pub fn open(&self) -> Bootstrap {
        Bootstrap::open(&self.bootstrap).unwrap()
    }
}

/// `rafs create` of `source` into `out`, with more options.
pub fn create(source: &Path, out: &Path, options: &[&str], stdin: &[u8]) -> Built {
    let mut args: Vec<&OsStr> = vec!["create".as_ref(), "-D".as_ref(), out.as_ref()];
    args.extend(options.iter().map(OsStr::new));
    args.push(source.as_ref());
    let done = rafs(&args, stdin);
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "rafs create {options:?}: {stderr}");
    Built { bootstrap: out.join("image.boot"), blobs: out.to_owned() }
}

/// `rafs check` of an image and its blobs: nothing is wrong.
pub fn check(built: &Built) {
    let args: [&OsStr; 5] = [
        "check".as_ref(),
        "--bootstrap".as_ref(),
        built.bootstrap.as_ref(),
        "--blob-dir".as_ref(),
        built.blobs.as_ref(),
    ];
    let done = rafs(&args, b"");
    let stdout = String::from_utf8_lossy(&done.stdout);
    assert_eq!(done.status.code(), Some(0), "rafs check: {stdout}");
}

/// A program that must be there, its output if it succeeds.
pub fn run(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (shown(&done.stdout), shown(&done.stderr));
    assert!(done.status.success(), "{command:?}: {}\n{stdout}{stderr}", done.status);
    stdout
}

/// Makes one of the trees that the golden images were made of.
pub fn make_golden_tree(kind: &str, dir: &Path) {
    let tool = repository().join("guest-tests/tools/rafs_golden_tree.py");
    run(Command::new("python3").arg(tool).args(["make", kind]).arg(dir));
}

/// One path of a tree, as an image must show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub kind: &'static str,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: i64,
    /// Directories: 2 and one for each sub-directory. Files: their names in the tree. Others: 1.
    pub nlink: u64,
    pub size: Option<u64>,
    pub rdev: Option<(u32, u32)>,
    pub target: Option<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sha256: Option<String>,
    /// The first name of this file.
    pub first_name: Vec<u8>,
}

pub type Tree = BTreeMap<Vec<u8>, Entry>;

/// What is in a directory.
pub fn describe(root: &Path) -> Tree {
    let mut metadata = BTreeMap::new();
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry.unwrap();
        let below = entry.path().strip_prefix(root).unwrap();
        let path = [b"/", below.as_os_str().as_bytes()].concat();
        metadata.insert(path, (entry.path().to_owned(), entry.metadata().unwrap()));
    }
    let mut names: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut sub_dirs: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for (path, (_, meta)) in &metadata {
        if meta.is_file() {
            names.entry(meta.ino()).or_default().push(path.clone());
        } else if meta.is_dir() && path != b"/" {
            *sub_dirs.entry(parent(path)).or_default() += 1;
        }
    }
    let entry = |path: &[u8], file: &Path, meta: &fs::Metadata| {
        let kind = meta.file_type();
        let kind = match () {
            () if kind.is_file() => "file",
            () if kind.is_dir() => "dir",
            () if kind.is_symlink() => "symlink",
            () if kind.is_char_device() => "char",
            () if kind.is_block_device() => "block",
            () if kind.is_fifo() => "fifo",
            () => "socket",
        };
        Entry {
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime(),
            mtime_nsec: meta.mtime_nsec(),
            nlink: match kind {
                "dir" => 2 + sub_dirs.get(path).copied().unwrap_or(0),
                "file" => names[&meta.ino()].len() as u64,
                _ => 1,
            },
            size: matches!(kind, "file" | "symlink").then(|| meta.size()),
            rdev: matches!(kind, "char" | "block")
                .then(|| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()))),
            target: (kind == "symlink")
                .then(|| fs::read_link(file).unwrap().into_os_string().into_encoded_bytes()),
            xattrs: xattr::list(file)
                .unwrap()
                .map(|name| {
                    let value = xattr::get(file, &name).unwrap().unwrap();
                    (name.into_encoded_bytes(), value)
                })
                .collect(),
            sha256: (kind == "file").then(|| sha256_of(&fs::read(file).unwrap())),
            first_name: match names.get(&meta.ino()) {
                Some(names) if kind == "file" => names[0].clone(),
                _ => path.to_vec(),
            },
        }
    };
    metadata.iter().map(|(path, (file, meta))| (path.clone(), entry(path, file, meta))).collect()
}

fn parent(path: &[u8]) -> Vec<u8> {
    let end = path.iter().rposition(|&b| b == b'/').unwrap();
    path[..end.max(1)].to_vec()
}

fn sha256_of(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// What is in an image, by our own reader.
pub fn read_image(built: &Built) -> Tree {
    let image = built.open();
    let content = Content::open(&image, &built.blobs);
    let mut tree = Tree::new();
    let mut first_names = BTreeMap::new();
    for item in image.walk() {
        let item = item.unwrap();
        let inode = &item.inode;
        // The walk does not go by bytes: the first name is the least.
        let path = item.path();
        let kind = inode.kind();
        if kind == FileKind::Regular {
            let first = first_names.entry(inode.nid()).or_insert_with(|| path.clone());
            if path < *first {
                *first = path.clone();
            }
        }
        let device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
        let file = kind == FileKind::Regular;
        let entry = Entry {
            kind: kind.name(),
            mode: u32::from(inode.mode() & 0o7777),
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: inode.mtime(),
            mtime_nsec: inode.mtime_nsec().into(),
            nlink: inode.nlink().into(),
            size: (file || kind == FileKind::Symlink).then(|| inode.size()),
            rdev: device.then(|| inode.rdev_major_minor()),
            target: (kind == FileKind::Symlink).then(|| inode.symlink_target().unwrap().to_vec()),
            xattrs: inode.xattrs().unwrap().map(|x| (x.full_name(), x.value.to_vec())).collect(),
            sha256: file.then(|| sha256_of(&content.of(inode))),
            first_name: inode.nid().0.to_le_bytes().to_vec(),
        };
        tree.insert(path, entry);
    }
    assert_eq!(tree.len() as u64, image.path_count());
    for (path, entry) in &mut tree {
        let nid = u64::from_le_bytes(entry.first_name.as_slice().try_into().unwrap());
        let first = first_names.get(&rafsd::rafs::id::Nid(nid));
        entry.first_name = first.unwrap_or(path).clone();
    }
    tree
}

/// The blobs of an image and their chunk-info arrays, read by our own code.
pub struct Content {
    blobs: Vec<Blob>,
}

struct Blob {
    info: rafsd::rafs::BlobInfo,
    infos: rafsd::rafs::ci::ChunkInfos,
    file: Vec<u8>,
    digests: rafsd::rafs::ChunkDigests,
}

impl Content {
    pub fn open(image: &Bootstrap, blobs: &Path) -> Content {
        use rafsd::rafs::layout::{BlobFeatures, CI_HEADER_SIZE, CiHeader};
        use zerocopy::FromBytes;
        let open = |info: &rafsd::rafs::BlobInfo| {
            let file = fs::read(blobs.join(info.id.as_str())).unwrap();
            assert_eq!(sha256_of(&file), info.id.as_str(), "a blob is named by its digest");
            let at = usize::try_from(info.ci_offset).unwrap();
            let end = at + usize::try_from(info.ci_compressed_size).unwrap();
            let mut table = vec![0; usize::try_from(info.ci_uncompressed_size).unwrap()];
            info.ci_compressor.decompress(&file[at..end], &mut table).unwrap();
            let header_end = end + usize::try_from(CI_HEADER_SIZE).unwrap();
            if !info.features.contains(BlobFeatures::HAS_TAR_HEADER) {
                assert_eq!(file.len(), header_end, "the header ends the blob");
            }
            let header = CiHeader::read_from_bytes(&file[end..header_end]).unwrap();
            let infos = rafsd::rafs::ci::ChunkInfos::parse(info, table, &header).unwrap();
            let digests = image.chunk_digests(info.index).unwrap();
            Blob { info: info.clone(), infos, file, digests }
        };
        Content { blobs: image.blobs().iter().map(open).collect() }
    }

    /// The bytes of a file, every chunk checked against its digest.
    pub fn of(&self, inode: &rafsd::rafs::Inode<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for i in 0..inode.chunk_count() {
            let addr = inode.chunk(i).unwrap();
            let Blob { info, infos, file, digests } = &self.blobs[usize::from(addr.device()) - 1];
            let index = ChunkIndex(addr.chunk_index());
            let chunk = infos.get(index).unwrap();
            assert_eq!(chunk.uncompressed_offset, u64::from(addr.start_block()) * 4096);
            let at = usize::try_from(chunk.compressed_offset).unwrap();
            let stored = &file[at..at + chunk.compressed_size as usize];
            let mut plain = vec![0; chunk.uncompressed_size as usize];
            if stored.len() == plain.len() {
                plain.copy_from_slice(stored);
            } else {
                info.compressor.decompress(stored, &mut plain).unwrap();
            }
            let digest = digests.get(index).expect("in the chunk table");
            assert_eq!(info.digester.digest(&plain), *digest, "chunk {index:?}");
            bytes.extend_from_slice(&plain);
        }
        assert_eq!(bytes.len() as u64, inode.size());
        bytes
    }
}

/// Fails with the paths that differ, and how.
pub fn assert_same(got: &Tree, want: &Tree, what: &str) {
    let show = |path: &[u8]| path.escape_ascii().to_string();
    for (path, want) in want {
        let got = got.get(path).unwrap_or_else(|| panic!("{what}: {} is missing", show(path)));
        assert_eq!(got, want, "{what}: {}", show(path));
    }
    for path in got.keys() {
        assert!(want.contains_key(path), "{what}: {} should not be there", show(path));
    }
}

/// A tree in the form that `rafs_reader.py check` compares with.
pub fn to_json(tree: &Tree) -> Value {
    let text = |out: &mut Value, key: &str, bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => out[key] = text.into(),
        Err(_) => out[format!("{key}_b64")] = base64(bytes).into(),
    };
    let entry = |(path, e): (&Vec<u8>, &Entry)| {
        let mut out = json!({
            "type": e.kind,
            "mode": format!("{:04o}", e.mode),
            "uid": e.uid,
            "gid": e.gid,
            "mtime": e.mtime,
            "mtime_nsec": e.mtime_nsec,
            "nlink": e.nlink,
        });
        text(&mut out, "path", path);
        if let Some(size) = e.size {
            out["size"] = size.into();
        }
        if let Some((major, minor)) = e.rdev {
            out["rdev"] = json!([major, minor]);
        }
        if let Some(target) = &e.target {
            text(&mut out, "target", target);
        }
        if let Some(sha256) = &e.sha256 {
            out["sha256"] = sha256.as_str().into();
        }
        if !e.xattrs.is_empty() {
            out["xattrs"] = e
                .xattrs
                .iter()
                .map(|(name, value)| {
                    (String::from_utf8(name.clone()).unwrap(), Value::from(base64(value)))
                })
                .collect::<serde_json::Map<_, _>>()
                .into();
        }
        out
    };
    tree.iter().map(entry).collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let word = (0..3).fold(0, |w, i| w << 8 | u32::from(*group.get(i).unwrap_or(&0)));
        for i in 0..4 {
            let digit = DIGITS[usize::try_from(word >> (18 - 6 * i) & 63).unwrap()];
            out.push(if i <= group.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// `rafs_reader.py`, which knows nothing of our code.
pub fn rafs_reader(args: &[&OsStr]) -> String {
    let tool = repository().join("guest-tests/tools/rafs_reader.py");
    run(Command::new("python3").arg(tool).args(args))
}

/// Compares an image with a tree by `rafs_reader.py`.
pub fn check_by_rafs_reader(built: &Built, want: &Tree, scratch: &Path) {
    let json = scratch.join("tree.json");
    fs::write(&json, to_json(want).to_string()).unwrap();
    rafs_reader_check(built, &json);
}

/// The same, with a tree as it describes them.
pub fn rafs_reader_check(built: &Built, json: &Path) {
    rafs_reader(&[
        "check".as_ref(),
        built.bootstrap.as_ref(),
        "--blobs".as_ref(),
        built.blobs.as_ref(),
        "--tree".as_ref(),
        json.as_ref(),
    ]);
}

/// A file of the parts that `scripts/parts` installs.
pub fn part(name: &str) -> PathBuf {
    let list = run(Command::new(repository().join("scripts/parts")).arg("--paths"));
    list.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("{name} is not installed: run scripts/parts"))
}
