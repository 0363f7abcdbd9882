//! Tar streams of OCI layers, read once and in order.
//!
//! Every dialect that layers are written in: V7, ustar, GNU (long names, sparse files), PAX (long
//! names, large numbers, times with fractions, extended attributes as `SCHILY.xattr.`, the three
//! forms of sparse files). `header` reads the fixed fields, `pax` the records, `sparse` the maps, `input`
//! finds out how the stream is compressed.
//!
//! The framing is ours because the `tar` crate's is not safe for layers that others made: it reads
//! extension headers of any length into memory, splits PAX records at newlines, which binary
//! attributes contain, and does not know PAX sparse files. Its types name the fields here.
//!
//! Memory: 1 MiB for the extension headers of an entry at most, and 16 bytes for each piece of a sparse
//! file, at most 2^20 pieces. What an entry claims to hold is never allocated.

mod header;
mod input;
mod pax;
mod sparse;

use std::collections::HashSet;
use std::io::{self, Read};

use super::error::BuildError;
pub use input::{Compression, Input};
use pax::Pax;
use sparse::Segment;

/// Bytes of a header; what an entry stores is padded to a multiple of it.
const BLOCK: usize = 512;
const BLOCK_LEN: u64 = BLOCK as u64;
/// Most bytes of the extension headers of one entry.
const EXTENSIONS_MAX: u64 = 1 << 20;
/// Most bytes of the global headers of a stream.
const GLOBAL_MAX: u64 = 1 << 20;

/// What one header of the stream says, dialects resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Parts of the path below the root of the layer, each 1 to 255 bytes and neither `.` nor `..`.
    /// Empty for the root itself.
    pub path: Vec<Box<[u8]>>,
    pub kind: EntryKind,
    /// Permission bits, 0o7777 at most.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch, may be negative.
    pub mtime: i64,
    /// Below 1,000,000,000.
    pub mtime_nsec: u32,
    /// Full names and values in the order of the stream; of two of one name the later one.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Of this many bytes, holes included.
    File {
        size: u64,
    },
    Dir,
    Symlink(Vec<u8>),
    /// To this path, in parts as [`Entry::path`].
    HardLink(Vec<Box<[u8]>>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

impl Entry {
    /// The path as text with slashes, for messages.
    pub fn shown(&self) -> String {
        shown(&self.path)
    }
}

/// A path in parts, as text for messages.
pub fn shown(path: &[Box<[u8]>]) -> String {
    path.iter().map(|part| format!("/{}", part.escape_ascii())).collect()
}

/// Reads the entries of a plain tar stream; see [`Input`] for compressed ones.
pub struct TarReader<R> {
    input: R,
    /// Bytes taken from `input`.
    offset: u64,
    /// Stored bytes of the current entry that have not been read, and padding behind them.
    stored: u64,
    padding: u64,
    /// Where the current file has data, from the next byte to be read on, in reverse order.
    segments: Vec<Segment>,
    /// Bytes of the current file from its start, and its size.
    position: u64,
    size: u64,
    /// What records of global headers say of all entries behind them.
    global: Pax,
    /// Bytes of them.
    global_len: u64,
    /// PAX keys that were ignored and named in the log.
    ignored: HashSet<Vec<u8>>,
}

impl<R: Read> TarReader<R> {
    pub fn new(input: R) -> TarReader<R> {
        TarReader {
            input,
            offset: 0,
            stored: 0,
            padding: 0,
            segments: Vec::new(),
            position: 0,
            size: 0,
            global: Pax::default(),
            global_len: 0,
            ignored: HashSet::new(),
        }
    }

    /// Bytes of the tar stream read so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The stream below.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; what was not read of the one before is skipped. `None` at the end of the
    /// archive; what follows there, which no reader looks at, is read to its end and ignored.
    ///
    /// # Errors
    ///
    /// [`BuildError::ReadLayer`] if the stream fails, [`BuildError::Layer`] if it ends too early or
    /// is no tar, with the byte offset in the uncompressed stream.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, BuildError> {
        self.skip(self.stored)?;
        self.skip(self.padding)?;
        (self.stored, self.padding) = (0, 0);
        self.segments.clear();
        (self.position, self.size) = (0, 0);
        let mut pax: Option<Pax> = None;
        let (mut long_name, mut long_link) = (None, None);
        let mut extensions = 0;
        loop {
            let at = self.offset;
            let Some(block) = self.header_block()? else {
                if pax.is_some() || long_name.is_some() || long_link.is_some() {
                    return Err(self.invalid("an extension header without an entry"));
                }
                self.drain()?;
                return Ok(None);
            };
            let header = ::tar::Header::from_byte_slice(&block);
            header::check_sum(header).map_err(|reason| invalid(at, reason))?;
            let kind = header.as_old().linkflag[0];
            if matches!(kind, b'x' | b'X' | b'g' | b'L' | b'K') {
                let size = header::number(&header.as_old().size, "size")
                    .map_err(|reason| invalid(at, reason))?;
                extensions += size;
                if extensions > EXTENSIONS_MAX {
                    let reason = format!("extension headers of more than {EXTENSIONS_MAX} bytes");
                    return Err(invalid(at, reason));
                }
                let body = self.extension(size)?;
                match kind {
                    b'L' => long_name = Some(until_nul(body)),
                    b'K' => long_link = Some(until_nul(body)),
                    b'g' => {
                        let records = Pax::parse(&body).map_err(|reason| invalid(at, reason))?;
                        // They are not bounded in number, so what they say is.
                        self.global_len += size;
                        if self.global_len > GLOBAL_MAX {
                            let reason = format!("global headers of more than {GLOBAL_MAX} bytes");
                            return Err(invalid(at, reason));
                        }
                        self.global.merge(records);
                    }
                    _ => {
                        let records = Pax::parse(&body).map_err(|reason| invalid(at, reason))?;
                        pax.get_or_insert_default().merge(records);
                    }
                }
                continue;
            }
            // A volume label is no file.
            if kind == b'V' {
                continue;
            }
            let mut all = self.global.clone();
            all.merge(pax.unwrap_or_default());
            return self.entry(at, header, all, long_name, long_link).map(Some);
        }
    }

    fn entry(
        &mut self,
        at: u64,
        header: &::tar::Header,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, BuildError> {
        let fail = |reason: String| invalid(at, reason);
        let old = header.as_old();
        let name = pax
            .sparse
            .name
            .take()
            .or(pax.path.take())
            .or(long_name)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let path = split(&name).map_err(fail)?;
        let named = |reason: String| invalid(at, format!("{}: {reason}", shown(&path)));
        for key in std::mem::take(&mut pax.ignored) {
            self.ignore(&key);
        }
        let link = || {
            pax.linkpath
                .clone()
                .or(long_link)
                .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
                .unwrap_or_default()
        };
        let devices = || -> Result<(u32, u32), BuildError> {
            let fields = match (header.as_ustar(), header.as_gnu()) {
                (Some(ustar), _) => Some((ustar.dev_major, ustar.dev_minor)),
                (_, Some(gnu)) => Some((gnu.dev_major, gnu.dev_minor)),
                _ => None,
            };
            let (major, minor) =
                fields.ok_or_else(|| named("a device without a number".to_owned()))?;
            header::device(&major, &minor).map_err(named)
        };
        let trailing_slash = name.ends_with(b"/");
        let kind = match old.linkflag[0] {
            // V7 has no type for directories.
            0 if trailing_slash => EntryKind::Dir,
            0 | b'0' | b'7' | b'S' => EntryKind::File { size: 0 },
            b'1' => EntryKind::HardLink(split(&link()).map_err(named)?),
            b'2' => EntryKind::Symlink(link()),
            b'3' => {
                let (major, minor) = devices()?;
                EntryKind::CharDevice { major, minor }
            }
            b'4' => {
                let (major, minor) = devices()?;
                EntryKind::BlockDevice { major, minor }
            }
            b'5' | b'D' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            b'M' => return Err(named("a part of a multi-volume archive".to_owned())),
            other => {
                let shown = [other];
                return Err(named(format!(
                    "unknown type of entry {:?}",
                    shown.escape_ascii().to_string()
                )));
            }
        };
        let mode = header::number(&old.mode, "mode").map_err(named)? & 0o7777;
        let owner = |pax: Option<u64>, field: &[u8], what| {
            let id = match pax {
                Some(id) => id,
                None => header::number(field, what).map_err(named)?,
            };
            u32::try_from(id).map_err(|_| named(format!("{what} {id} exceeds 32 bits")))
        };
        let (mtime, mtime_nsec) = match pax.mtime {
            Some(time) => time,
            None => (header::signed(&old.mtime, "mtime").map_err(named)?, 0),
        };
        let mut entry = Entry {
            mode: u16::try_from(mode).expect("masked"),
            uid: owner(pax.uid, &old.uid, "uid")?,
            gid: owner(pax.gid, &old.gid, "gid")?,
            mtime,
            mtime_nsec,
            xattrs: std::mem::take(&mut pax.xattrs),
            kind,
            path: Vec::new(),
        };
        // Types without data have none, whatever their size field says; incremental GNU archives
        // list the names of a directory.
        let has_data = matches!(entry.kind, EntryKind::File { .. }) || old.linkflag[0] == b'D';
        if has_data {
            let stored = match pax.size {
                Some(size) => size,
                None => header::number(&old.size, "size").map_err(named)?,
            };
            if stored > i64::MAX.cast_unsigned() {
                return Err(named(format!("size {stored}")));
            }
            self.stored = stored;
            self.padding = stored.next_multiple_of(BLOCK_LEN) - stored;
        }
        if let EntryKind::File { size } = &mut entry.kind {
            *size = self.map(header, &pax).map_err(|e| match e {
                MapError::Reason(reason) => named(reason),
                MapError::Stream(e) => e,
            })?;
        }
        entry.path = path;
        Ok(entry)
    }

    /// Finds out where the file has data; its size with holes.
    fn map(&mut self, header: &::tar::Header, pax: &Pax) -> Result<u64, MapError> {
        let sparse = &pax.sparse;
        let (map, size) = if header.as_old().linkflag[0] == b'S' {
            let gnu = header.as_gnu().ok_or("a sparse file of an unknown dialect".to_owned())?;
            let mut map = sparse::Map::default();
            let mut more = map.add_gnu(&gnu.sparse)? && gnu.isextended[0] != 0;
            let size = header::number(&gnu.realsize, "size of a sparse file")?;
            while more {
                let mut block = ::tar::GnuExtSparseHeader::new();
                self.fill(block.as_mut_bytes())?;
                more = map.add_gnu(&block.sparse)? && block.isextended[0] != 0;
            }
            (map, size)
        } else if sparse.version == (1, 0) {
            let size = sparse.size.ok_or("a sparse file without a size".to_owned())?;
            (self.map_in_data()?, size)
        } else if let Some(size) = sparse.size.filter(|_| sparse.has_map) {
            (sparse.map.clone(), size)
        } else {
            self.segments.push(Segment { offset: 0, len: self.stored });
            self.size = self.stored;
            return Ok(self.stored);
        };
        self.segments = map.finish(size, self.stored)?;
        self.segments.reverse();
        self.size = size;
        Ok(size)
    }

    /// The map that format 1.0 stores in front of the data: decimal numbers, one on each line.
    fn map_in_data(&mut self) -> Result<sparse::Map, MapError> {
        let mut numbers = sparse::Lines::default();
        loop {
            let mut block = [0; BLOCK];
            if self.stored < BLOCK_LEN {
                return Err(MapError::Reason("a sparse file whose map has no end".to_owned()));
            }
            self.stored -= BLOCK_LEN;
            self.fill(&mut block)?;
            if let Some(map) = numbers.add(&block)? {
                return Ok(map);
            }
        }
    }

    /// Bytes of the current file that come before its next data, so are zeros; the rest of the
    /// file if it has no more.
    pub fn hole(&self) -> u64 {
        let next = self.segments.last().map_or(self.size, |segment| segment.offset);
        next.saturating_sub(self.position)
    }

    /// Passes over `len` bytes of a hole.
    ///
    /// # Panics
    ///
    /// If [`TarReader::hole`] is less.
    pub fn skip_hole(&mut self, len: u64) {
        assert!(len <= self.hole(), "no hole of {len} bytes");
        self.position += len;
    }

    /// Fills `buf` with the next bytes of the current file, which has as many left.
    ///
    /// # Errors
    ///
    /// As [`TarReader::next_entry`].
    pub fn read_file(&mut self, buf: &mut [u8]) -> Result<(), BuildError> {
        let mut rest = buf;
        while !rest.is_empty() {
            let hole = usize::try_from(self.hole()).unwrap_or(usize::MAX).min(rest.len());
            rest[..hole].fill(0);
            rest = &mut rest[hole..];
            self.position += hole as u64;
            let Some(segment) = self.segments.last_mut() else {
                assert!(rest.is_empty(), "no more is read than the file has");
                break;
            };
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(rest.len());
            segment.offset += len as u64;
            segment.len -= len as u64;
            if segment.len == 0 {
                self.segments.pop();
            }
            let (now, later) = rest.split_at_mut(len);
            self.stored -= len as u64;
            self.fill(now)?;
            self.position += len as u64;
            rest = later;
        }
        Ok(())
    }

    /// The next header; `None` at the end of the archive.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, BuildError> {
        let mut block = [0; BLOCK];
        let mut zeros = false;
        loop {
            let at = self.offset;
            let mut filled = 0;
            while filled < block.len() {
                match self.read(&mut block[filled..])? {
                    // An archive may end without the zeros that should end it.
                    0 if filled == 0 => return Ok(None),
                    0 => return Err(self.truncated()),
                    n => filled += n,
                }
            }
            match (block.iter().all(|&b| b == 0), zeros) {
                (true, true) => return Ok(None),
                (true, false) => zeros = true,
                (false, true) => return Err(invalid(at, "an entry behind the end of the archive")),
                (false, false) => return Ok(Some(block)),
            }
        }
    }

    /// The body of an extension header of `size` bytes, which was checked.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, BuildError> {
        let mut body = vec![0; usize::try_from(size).expect("checked before")];
        self.fill(&mut body)?;
        self.skip(size.next_multiple_of(BLOCK_LEN) - size)?;
        Ok(body)
    }

    /// Says once for each key of a PAX record that it has no effect.
    fn ignore(&mut self, key: &[u8]) {
        // The stream decides how many keys there are; the log needs no more.
        if self.ignored.len() < 64 && self.ignored.insert(key.to_vec()) {
            log::warn!("tar layer: ignored {}", key.escape_ascii());
        }
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), BuildError> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.read(&mut buf[filled..])? {
                0 => return Err(self.truncated()),
                n => filled += n,
            }
        }
        Ok(())
    }

    fn skip(&mut self, mut len: u64) -> Result<(), BuildError> {
        let mut buf = [0; 16 << 10];
        while len > 0 {
            let now = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            self.fill(&mut buf[..now])?;
            len -= now as u64;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), BuildError> {
        let mut buf = [0; 16 << 10];
        while self.read(&mut buf)? > 0 {}
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, BuildError> {
        loop {
            match self.input.read(buf) {
                Ok(n) => {
                    self.offset += n as u64;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(BuildError::ReadLayer { offset: self.offset, source }),
            }
        }
    }

    fn invalid(&self, reason: impl Into<String>) -> BuildError {
        invalid(self.offset, reason)
    }

    fn truncated(&self) -> BuildError {
        self.invalid("the stream ends in the middle of an entry")
    }
}

/// The content of the current file, holes as zeros.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size - self.position;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        self.read_file(&mut buf[..len]).map_err(io::Error::other)?;
        Ok(len)
    }
}

/// Why a map of a sparse file cannot be had.
enum MapError {
    Reason(String),
    Stream(BuildError),
}

impl From<String> for MapError {
    fn from(reason: String) -> MapError {
        MapError::Reason(reason)
    }
}

impl From<BuildError> for MapError {
    fn from(e: BuildError) -> MapError {
        MapError::Stream(e)
    }
}

fn invalid(offset: u64, reason: impl Into<String>) -> BuildError {
    BuildError::Layer { offset: Some(offset), reason: reason.into() }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// The parts of a path below the root: absolute names and `.` are harmless, `..` is not.
fn split(path: &[u8]) -> Result<Vec<Box<[u8]>>, String> {
    let refuse = |what: &str| Err(format!("the path {} {what}", path.escape_ascii()));
    let mut parts = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return refuse("has `..` in it"),
            _ if part.contains(&0) => return refuse("has a NUL in it"),
            _ if part.len() > crate::rafs::layout::NAME_MAX => {
                return Err(format!("a name of {} bytes, RAFS allows 255", part.len()));
            }
            _ => parts.push(part.into()),
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests;
