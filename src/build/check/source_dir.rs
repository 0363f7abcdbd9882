//! A directory as the source: what `rafs create` makes an image of.
//!
//! Marks of removed files are left out; hard links are told by device and inode number. Nothing is mounted and nothing is written;
//! what the user may not read cannot be compared.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File as OsFile};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::overlay::{Attrs, ChunkHasher, Cut, File, Key, Kind, Overlay};
use super::progress;

/// Bytes read at a time.
const STEP: usize = 256 << 10;

/// Reads the tree at `root`; also the bytes of all files in it. `root_time`: the root has its own
/// time; else it has time 0, as nydus-image gives it.
///
/// # Errors
///
/// If something in it cannot be read, or changes while it is.
pub(super) fn read(root: &Path, root_time: bool, cut: &Cut) -> Result<(Overlay, u64)> {
    let mut overlay = Overlay::default();
    let mut linked: HashMap<(u64, u64), Arc<File>> = HashMap::new();
    let mut total = 0;
    let bar = progress::spinner("paths of the source");
    let walk = walkdir::WalkDir::new(root).follow_root_links(true).sort_by_file_name();
    let walk = walk.into_iter().filter_entry(|entry| {
        entry.depth() == 0 || !entry.file_name().as_bytes().starts_with(b".wh.")
    });
    for entry in walk {
        let entry = entry.context("cannot read the directory")?;
        bar.inc(1);
        let path = entry.path();
        let shown = || path.display().to_string();
        let depth = entry.depth();
        let meta = if depth == 0 { fs::metadata(path) } else { fs::symlink_metadata(path) };
        let meta = meta.with_context(shown)?;
        let key = key_of(path.strip_prefix(root).unwrap_or(path));
        let identity = (meta.dev(), meta.ino());
        if let Some(file) = linked.get(&identity) {
            overlay.insert(key, file.clone());
            continue;
        }
        let kind = kind(path, &meta, cut).with_context(shown)?;
        if let Kind::File(content) = &kind {
            total += content.size;
        }
        let timeless = depth == 0 && !root_time;
        let attrs = Attrs {
            mode: u16::try_from(meta.mode() & 0o7777).expect("12 bits"),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: if timeless { 0 } else { meta.mtime() },
            mtime_nsec: if timeless { 0 } else { u32::try_from(meta.mtime_nsec())? },
            xattrs: xattrs(path, depth == 0).with_context(shown)?,
        };
        let file = Arc::new(File { attrs, kind });
        if meta.nlink() > 1 && meta.is_file() {
            linked.insert(identity, file.clone());
        }
        overlay.insert(key, file);
    }
    bar.finish_and_clear();
    Ok((overlay, total))
}

fn key_of(path: &Path) -> Key {
    let bytes = path.as_os_str().as_bytes();
    bytes.iter().map(|&b| if b == b'/' { 0 } else { b }).collect()
}

fn kind(path: &Path, meta: &fs::Metadata, cut: &Cut) -> Result<Kind> {
    let kind = meta.file_type();
    let device = || (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    Ok(if kind.is_dir() {
        Kind::Dir
    } else if kind.is_symlink() {
        Kind::Symlink(fs::read_link(path)?.as_os_str().as_bytes().into())
    } else if kind.is_char_device() {
        let (major, minor) = device();
        Kind::Char(major, minor)
    } else if kind.is_block_device() {
        let (major, minor) = device();
        Kind::Block(major, minor)
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else {
        let mut hasher = ChunkHasher::new(cut);
        let mut file = OsFile::open(path)?;
        let mut buffer = vec![0; STEP];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                got => hasher.update(&buffer[..got]),
            }
        }
        let content = hasher.finish();
        if content.size != meta.len() {
            bail!("it had {} bytes and then {}", meta.len(), content.size);
        }
        Kind::File(content)
    })
}

fn xattrs(path: &Path, follow: bool) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let names = if follow { xattr::list_deref(path) } else { xattr::list(path) };
    let names = match names {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(e) => return Err(e).context("cannot list extended attributes"),
    };
    let get = |name: &OsStr| {
        if follow { xattr::get_deref(path, name) } else { xattr::get(path, name) }
    };
    let mut attributes = BTreeMap::new();
    for name in names {
        if let Some(value) = get(&name).context("cannot read an extended attribute")? {
            attributes.insert(name.as_bytes().to_vec(), value);
        }
    }
    Ok(attributes)
}
