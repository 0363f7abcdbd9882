//! An image as a PAX tar.
//!
//! Fields that a ustar header holds are there; what it cannot hold is in records in front of it. A
//! file with holes is written in the form 1.0 of sparse files, its map in front of its data.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Data, Target};
use crate::build::output::{Output, parent_dir, refuse_special};
use crate::rafs::{FileKind, WalkItem};

const BLOCK: usize = 512;
/// Largest numbers that fit the octal fields of 8 and 12 bytes.
const ID_MAX: u32 = 0o7_777_777;
const SIZE_MAX: u64 = 0o77_777_777_777;

/// A tar that is being written.
pub struct TarFile {
    out: BufWriter<Sink>,
    path: PathBuf,
}

enum Sink {
    Stdout(io::Stdout),
    File(Output),
    /// Something with this name that is no regular file, such as a fifo.
    Special(File),
}

impl TarFile {
    /// Opens the tar for writing; a file appears when it is complete.
    pub fn create(path: &Path) -> Result<TarFile> {
        let sink = if path == Path::new("-") {
            Sink::Stdout(io::stdout())
        } else if refuse_special(path).is_err() {
            let file = File::options().write(true).open(path);
            Sink::Special(file.with_context(|| path.display().to_string())?)
        } else {
            Sink::File(Output::create(parent_dir(path))?)
        };
        Ok(TarFile { out: BufWriter::with_capacity(256 << 10, sink), path: path.to_owned() })
    }

    /// Writes an entry up to its data, which has `stored` bytes.
    fn head(&mut self, item: &WalkItem<'_>, kind: u8, link: &[u8], entry: Extra) -> Result<()> {
        let inode = &item.inode;
        let mut path = item.path();
        if inode.kind() == FileKind::Directory && path != b"/" {
            path.push(b'/');
        }
        // Names are relative, the root is `./`.
        let path: Cow<'_, [u8]> =
            if path == b"/" { Cow::Borrowed(b"./") } else { Cow::Owned(path[1..].to_vec()) };
        let mut records = entry.records;
        let mut header = ::tar::Header::new_ustar();
        let old = header.as_old_mut();
        old.linkflag[0] = kind;
        put(&mut old.name, &path, "path", &mut records);
        put(&mut old.linkname, link, "linkpath", &mut records);
        header.set_mode(u32::from(inode.mode() & 0o7777));
        for (key, id) in [("uid", inode.uid()), ("gid", inode.gid())] {
            if id > ID_MAX {
                records.push((key.into(), id.to_string().into_bytes()));
            }
            let id = u64::from(id.min(ID_MAX));
            if key == "uid" { header.set_uid(id) } else { header.set_gid(id) }
        }
        let (seconds, nanoseconds) = (inode.mtime(), inode.mtime_nsec());
        let field = u64::try_from(seconds).ok().filter(|&s| s <= SIZE_MAX);
        if nanoseconds > 0 || field.is_none() {
            records.push(("mtime".into(), decimal(seconds, nanoseconds)));
        }
        header.set_mtime(field.unwrap_or(0));
        if entry.stored > SIZE_MAX {
            records.push(("size".into(), entry.stored.to_string().into_bytes()));
        }
        header.set_size(if entry.stored > SIZE_MAX { 0 } else { entry.stored });
        if matches!(inode.kind(), FileKind::CharDevice | FileKind::BlockDevice) && kind != b'1' {
            let (major, minor) = inode.rdev_major_minor();
            header.set_device_major(major)?;
            header.set_device_minor(minor)?;
        }
        if kind != b'1' {
            for xattr in inode.xattrs()? {
                let key = [b"SCHILY.xattr.", &*xattr.full_name()].concat();
                records.push((key, xattr.value.to_vec()));
            }
        }
        if [&path, link].iter().any(|name| std::str::from_utf8(name).is_err()) {
            // Names are text elsewhere; POSIX has this for those that are none.
            records.insert(0, (b"hdrcharset".to_vec(), b"BINARY".to_vec()));
        }
        if !records.is_empty() {
            let body: Vec<u8> =
                records.iter().flat_map(|(key, value)| record(key, value)).collect();
            let mut extension = ::tar::Header::new_ustar();
            let old = extension.as_old_mut();
            old.linkflag[0] = b'x';
            old.name[..11].copy_from_slice(b"PaxHeaders/");
            let len = path.len().min(88);
            old.name[11..11 + len].copy_from_slice(&path[..len]);
            extension.set_mode(0o644);
            extension.set_mtime(0);
            extension.set_size(body.len() as u64);
            extension.set_cksum();
            self.out.write_all(extension.as_bytes())?;
            self.out.write_all(&body)?;
            self.pad(body.len() as u64)?;
        }
        header.set_cksum();
        Ok(self.out.write_all(header.as_bytes())?)
    }

    fn pad(&mut self, len: u64) -> Result<()> {
        let zeros = [0; BLOCK];
        let padding = len.next_multiple_of(BLOCK as u64) - len;
        let len = usize::try_from(padding).expect("less than a block");
        Ok(self.out.write_all(&zeros[..len])?)
    }

    fn file(&mut self, item: &WalkItem<'_>, data: &mut Data<'_, '_>) -> Result<()> {
        let inode = &item.inode;
        let chunks = data.holes(inode)?;
        let map = map(&chunks);
        let mut extra = Extra { records: Vec::new(), stored: inode.size() };
        let mut front = Vec::new();
        if let Some(map) = &map {
            front = map.text();
            extra.stored = front.len() as u64 + map.stored;
            let path = item.path();
            extra.records = vec![
                (b"GNU.sparse.major".to_vec(), b"1".to_vec()),
                (b"GNU.sparse.minor".to_vec(), b"0".to_vec()),
                (b"GNU.sparse.name".to_vec(), path[1..].to_vec()),
                (b"GNU.sparse.realsize".to_vec(), inode.size().to_string().into_bytes()),
            ];
        }
        let stored = extra.stored;
        self.head(item, b'0', b"", extra)?;
        self.out.write_all(&front)?;
        for (i, (_, zero)) in (0..).zip(&chunks) {
            if !zero || map.is_none() {
                self.out.write_all(data.chunk(inode, i)?)?;
            }
        }
        self.pad(stored)
    }
}

/// What an entry has beside its fields.
struct Extra {
    records: Vec<(Vec<u8>, Vec<u8>)>,
    stored: u64,
}

impl Target for TarFile {
    fn add(&mut self, item: &WalkItem<'_>, data: &mut Data<'_, '_>) -> Result<()> {
        let (kind, link) = match item.inode.kind() {
            FileKind::Regular => return self.file(item, data),
            FileKind::Directory => (b'5', &b""[..]),
            FileKind::Symlink => (b'2', item.inode.symlink_target()?),
            FileKind::CharDevice => (b'3', &b""[..]),
            FileKind::BlockDevice => (b'4', &b""[..]),
            FileKind::Fifo => (b'6', &b""[..]),
            FileKind::Socket => {
                log::warn!("{}: left out: no tar can hold a socket", item.path().escape_ascii());
                return Ok(());
            }
        };
        self.head(item, kind, link, Extra { records: Vec::new(), stored: 0 })
    }

    fn link(&mut self, item: &WalkItem<'_>, first: &[u8]) -> Result<()> {
        self.head(item, b'1', &first[1..], Extra { records: Vec::new(), stored: 0 })
    }

    fn finish(mut self) -> Result<()> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        let sink = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        if let Sink::File(out) = sink {
            out.commit(&self.path)?;
        }
        Ok(())
    }
}

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Stdout(out) => out.write(buf),
            Sink::File(out) => out.write(buf),
            Sink::Special(out) => out.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Sink::Stdout(out) => out.flush(),
            Sink::File(out) => out.flush(),
            Sink::Special(out) => out.flush(),
        }
    }
}

/// Where a file has data: start and length of each piece, in bytes.
struct Map {
    pieces: Vec<(u64, u64)>,
    stored: u64,
    size: u64,
}

/// The map of a file with holes.
fn map(chunks: &[(u32, bool)]) -> Option<Map> {
    if !chunks.iter().any(|&(_, zero)| zero) {
        return None;
    }
    let mut map = Map { pieces: Vec::new(), stored: 0, size: 0 };
    for &(len, zero) in chunks {
        let (start, len) = (map.size, u64::from(len));
        map.size += len;
        if zero {
            continue;
        }
        map.stored += len;
        match map.pieces.last_mut() {
            Some((at, piece)) if *at + *piece == start => *piece += len,
            _ => map.pieces.push((start, len)),
        }
    }
    Some(map)
}

impl Map {
    /// The map as it stands in front of the data. A file that ends with a hole has an empty piece
    /// there.
    fn text(&self) -> Vec<u8> {
        let end = self.pieces.last().map_or(0, |(start, len)| start + len);
        let last = (end < self.size).then_some((self.size, 0));
        let pieces: Vec<_> = self.pieces.iter().copied().chain(last).collect();
        let mut text = format!("{}\n", pieces.len());
        for (start, len) in pieces {
            text.push_str(&format!("{start}\n{len}\n"));
        }
        let mut text = text.into_bytes();
        text.resize(text.len().next_multiple_of(512), 0);
        text
    }
}

/// Puts text into a field, and into a record if it does not fit there.
fn put(field: &mut [u8], text: &[u8], key: &str, records: &mut Vec<(Vec<u8>, Vec<u8>)>) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text[..len]);
    if len < text.len() || !text.is_ascii() {
        records.push((key.into(), text.to_vec()));
    }
}

/// A PAX record; its length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len += 1;
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A time as a decimal number. Nanoseconds count towards the future.
fn decimal(seconds: i64, nanoseconds: u32) -> Vec<u8> {
    let text = match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        (-1, _) => format!("-0.{:09}", 1_000_000_000 - nanoseconds),
        (_, _) => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanoseconds),
    };
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch() {
        // (seconds, nanoseconds, text)
        let cases = [
            (0, 0, "0"),
            (5, 1, "5.000000001"),
            (-5, 0, "-5"),
            (-2, 500_000_000, "-1.500000000"),
            (-1, 999_999_999, "-0.000000001"),
        ];
        for (seconds, nanoseconds, text) in cases {
            assert_eq!(decimal(seconds, nanoseconds), text.as_bytes());
        }
    }

    #[test]
    fn a_record_counts_itself() {
        assert_eq!(record(b"path", b"abc"), b"12 path=abc\n");
        // One digit more makes the length one of two digits.
        assert_eq!(record(b"abc", b"de"), b"9 abc=de\n");
        assert_eq!(record(b"abc", b"def"), b"11 abc=def\n");
    }

    #[test]
    fn maps_join_what_adjoins() {
        let map = map(&[(4, false), (4, false), (4, true), (4, false), (2, true)]).unwrap();
        assert_eq!((map.pieces.as_slice(), map.stored), (&[(0, 8), (12, 4)][..], 12));
        assert!(map.text().starts_with(b"3\n0\n8\n12\n4\n18\n0\n\0"));
    }
}
