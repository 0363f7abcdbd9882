//! Reads the tar stream of a layer, entry by entry, in every dialect that image tools write.
//!
//! The converter reads tars with other code. This reader shares none of it, so that what one of
//! them gets wrong is a difference and not an agreement. V7, ustar, star, PAX (local and global
//! headers; values are bytes, newlines included), GNU long names, base-256 numbers, GNU sparse files
//! of all four forms.
//!
//! Memory: one header's records, at most [`RECORDS_MAX`] bytes, and one sparse map. Content is
//! handed on in pieces as it comes.

use std::collections::BTreeMap;
use std::io::{self, Read};

const BLOCK: usize = 512;
/// Most bytes of PAX records or of a long name.
const RECORDS_MAX: u64 = 16 << 20;
/// Most pieces in a sparse map.
const SPARSE_MAX: usize = 1 << 20;
/// Largest file in bytes, holes included: what a RAFS blob can hold.
const FILE_MAX: u64 = 1 << 44;
/// Bytes of content handed on at a time.
const STEP: usize = 128 << 10;

/// What an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// One entry, long names, PAX records and sparse maps applied.
#[derive(Debug)]
pub(super) struct Entry {
    /// As written: may be absolute, hold `.` and `..`, end in a slash.
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Target of a symbolic or hard link.
    pub link: Vec<u8>,
    /// `SCHILY.xattr.*`, by name without that prefix.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Bytes of content, holes included.
    pub size: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum TarError {
    #[error("reading the tar at byte {at}")]
    Io { at: u64, source: io::Error },
    #[error("tar entry at byte {at}: {what}")]
    Invalid { at: u64, what: String },
}

type Result<T> = std::result::Result<T, TarError>;
type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// Entries of the tar that `R` yields.
pub(super) struct TarStream<R> {
    inner: R,
    /// Bytes read.
    at: u64,
    /// Where the current entry's header starts.
    entry_at: u64,
    global: Records,
    /// Stored bytes of the current entry that are still unread, and its padding.
    stored: u64,
    padding: u64,
    /// Pieces of the current entry's content that are stored: offset and length, in order.
    map: Vec<(u64, u64)>,
    size: u64,
}

/// What precedes an entry and describes it.
#[derive(Default)]
struct Ahead {
    records: Records,
    /// Offsets and lengths of `GNU.sparse` 0.0, which repeats its keys.
    pieces: Vec<u64>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> TarStream<R> {
    pub(super) fn new(inner: R) -> Self {
        TarStream {
            inner,
            at: 0,
            entry_at: 0,
            global: Records::new(),
            stored: 0,
            padding: 0,
            map: Vec::new(),
            size: 0,
        }
    }

    /// The next entry; what is left of the content of the one before is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let mut ahead = Ahead::default();
        loop {
            self.skip_content()?;
            self.entry_at = self.at;
            let Some(header) = self.header()? else {
                if ahead.is_empty() {
                    return Ok(None);
                }
                return Err(self.invalid("the tar ends behind a header that describes the next"));
            };
            let size = self.number(&header[124..136], "size")?;
            match header[156] {
                b'x' => {
                    let bytes = self.records(size)?;
                    self.parse_records(&bytes, &mut ahead.records, Some(&mut ahead.pieces))?;
                }
                b'g' => {
                    let bytes = self.records(size)?;
                    let mut global = std::mem::take(&mut self.global);
                    self.parse_records(&bytes, &mut global, None)?;
                    self.global = global;
                }
                b'L' => ahead.long_name = Some(until_nul(&self.records(size)?).to_vec()),
                b'K' => ahead.long_link = Some(until_nul(&self.records(size)?).to_vec()),
                _ => return self.entry(&header, size, ahead).map(Some),
            }
        }
    }

    /// Hands the content of the current entry to `sink`, holes as zeros.
    pub(super) fn content(&mut self, mut sink: impl FnMut(&[u8])) -> Result<()> {
        let mut buffer = vec![0; STEP];
        let mut done = 0;
        let map = std::mem::take(&mut self.map);
        for &(offset, len) in map.iter().chain([&(self.size, 0)]) {
            if offset > done {
                buffer.fill(0);
                while done < offset {
                    let step = clamp(offset - done, STEP);
                    sink(&buffer[..step]);
                    done += step as u64;
                }
            }
            let end = offset + len;
            while done < end {
                let step = clamp(end - done, STEP);
                self.read(&mut buffer[..step])?;
                self.stored -= step as u64;
                sink(&buffer[..step]);
                done += step as u64;
            }
        }
        Ok(())
    }

    /// Reads what is left, so that all of the stream has been seen.
    pub(super) fn drain(&mut self) -> Result<()> {
        let at = self.at;
        let copied = io::copy(&mut self.inner, &mut io::sink());
        self.at += copied.map_err(|source| TarError::Io { at, source })?;
        Ok(())
    }

    fn invalid(&self, what: impl Into<String>) -> TarError {
        TarError::Invalid { at: self.entry_at, what: what.into() }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.inner.read_exact(buffer).map_err(|source| TarError::Io { at: self.at, source })?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn skip_content(&mut self) -> Result<()> {
        let left = self.stored + self.padding;
        let mut limited = (&mut self.inner).take(left);
        let skipped = io::copy(&mut limited, &mut io::sink());
        let skipped = skipped.map_err(|source| TarError::Io { at: self.at, source })?;
        self.at += skipped;
        (self.stored, self.padding) = (0, 0);
        self.map.clear();
        if skipped != left {
            let source = io::ErrorKind::UnexpectedEof.into();
            return Err(TarError::Io { at: self.at, source });
        }
        Ok(())
    }

    /// A header with a sound checksum; `None` at the end of the tar.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut header = [0; BLOCK];
        if !self.block(&mut header)? {
            return Ok(None);
        }
        if header == [0; BLOCK] {
            // Two of them end a tar. What follows one alone would be seen by some tools only.
            if self.block(&mut header)? && header != [0; BLOCK] {
                return Err(self.invalid("an entry follows a block of zeros"));
            }
            return Ok(None);
        }
        let sum = |byte: fn(u8) -> i64| {
            let bytes = header.iter().enumerate();
            bytes.map(|(i, &b)| byte(if (148..156).contains(&i) { b' ' } else { b })).sum::<i64>()
        };
        let want = self.number(&header[148..156], "checksum")?;
        let sums = [sum(i64::from), sum(|b| i64::from(b.cast_signed()))];
        if !sums.iter().any(|&sum| u64::try_from(sum) == Ok(want)) {
            return Err(self.invalid("wrong header checksum"));
        }
        Ok(Some(header))
    }

    /// Fills `block`; false at the end of the stream.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut got = 0;
        while got < BLOCK {
            let read = self.inner.read(&mut block[got..]);
            match read {
                Ok(0) if got == 0 => return Ok(false),
                Ok(0) => {
                    let source = io::ErrorKind::UnexpectedEof.into();
                    return Err(TarError::Io { at: self.at, source });
                }
                Ok(n) => {
                    got += n;
                    self.at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { at: self.at, source }),
            }
        }
        Ok(true)
    }

    /// An unsigned field: octal digits, or big-endian binary if the first bit is set.
    fn number(&self, field: &[u8], name: &str) -> Result<u64> {
        let value = self.signed(field, name)?;
        u64::try_from(value).map_err(|_| self.invalid(format!("{name} is negative")))
    }

    fn signed(&self, field: &[u8], name: &str) -> Result<i64> {
        if field[0] & 0x80 != 0 {
            // Two's complement below the first bit, which is the mark.
            let first = if field[0] & 0x40 != 0 { field[0] } else { field[0] & 0x7F };
            let mut value = i128::from(first.cast_signed());
            for &byte in &field[1..] {
                value = (value << 8) | i128::from(byte);
            }
            return i64::try_from(value).map_err(|_| self.invalid(format!("{name} is too large")));
        }
        let digits = field.iter().skip_while(|b| matches!(b, b' ' | 0));
        let digits: Vec<u8> = digits.copied().take_while(|b| !matches!(b, b' ' | 0)).collect();
        if digits.is_empty() {
            return Ok(0);
        }
        std::str::from_utf8(&digits)
            .ok()
            .and_then(|digits| i64::from_str_radix(digits, 8).ok())
            .filter(|&value| value >= 0)
            .ok_or_else(|| self.invalid(format!("{name} is not an octal number")))
    }

    /// The content of a header that describes the next entry.
    fn records(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > RECORDS_MAX {
            return Err(self.invalid(format!("{size} bytes of records, at most {RECORDS_MAX} are")));
        }
        let mut bytes = vec![0; clamp(size, usize::MAX)];
        self.read(&mut bytes)?;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(bytes)
    }

    /// PAX records: `LENGTH KEY=VALUE\n`, the length of all of it.
    fn parse_records(
        &self,
        mut bytes: &[u8],
        records: &mut Records,
        mut pieces: Option<&mut Vec<u64>>,
    ) -> Result<()> {
        let bad = || self.invalid("damaged PAX record");
        while !bytes.is_empty() {
            let space = bytes.iter().position(|&b| b == b' ').ok_or_else(bad)?;
            let len = std::str::from_utf8(&bytes[..space]).ok().and_then(|len| len.parse().ok());
            let record = len.and_then(|len: usize| bytes.get(space + 1..len)).ok_or_else(bad)?;
            bytes = &bytes[space + 1 + record.len()..];
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if key.is_empty() {
                return Err(bad());
            }
            if let Some(pieces) = &mut pieces
                && matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes")
            {
                pieces.push(self.decimal(value, key)?);
            }
            records.insert(key.to_vec(), value.to_vec());
        }
        Ok(())
    }

    fn decimal(&self, value: &[u8], key: &[u8]) -> Result<u64> {
        std::str::from_utf8(value)
            .ok()
            .filter(|value| value.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|value| value.parse().ok())
            .ok_or_else(|| self.invalid(format!("{} is not a number", key.escape_ascii())))
    }

    fn entry(&mut self, header: &[u8; BLOCK], size: u64, ahead: Ahead) -> Result<Entry> {
        let get = |key: &[u8]| {
            // An empty value of the entry's own header takes back what a global one says.
            let value = ahead.records.get(key).or_else(|| self.global.get(key));
            value.map(Vec::as_slice).filter(|value| !value.is_empty())
        };
        let decimal = |key: &[u8]| get(key).map(|value| self.decimal(value, key)).transpose();
        let gnu = header[257..265] == *b"ustar  \0";
        let posix = header[257..262] == *b"ustar" && !gnu;

        let plain_path = |prefix: &[u8]| match prefix {
            b"" => until_nul(&header[..100]).to_vec(),
            prefix => [prefix, b"/", until_nul(&header[..100])].concat(),
        };
        let prefix = match &header[345..] {
            star if posix && star[163..] == *b"tar\0" => until_nul(&star[..131]),
            ustar if posix => until_nul(&ustar[..155]),
            _ => b"",
        };
        let path = get(b"GNU.sparse.name")
            .or_else(|| get(b"path"))
            .map(<[u8]>::to_vec)
            .or(ahead.long_name.clone())
            .unwrap_or_else(|| plain_path(prefix));
        let link = get(b"linkpath")
            .map(<[u8]>::to_vec)
            .or(ahead.long_link.clone())
            .unwrap_or_else(|| until_nul(&header[157..257]).to_vec());
        let kind = match header[156] {
            0 if path.ends_with(b"/") => EntryKind::Dir,
            0 | b'0' | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            other => {
                let what = format!("entries of type {:?} make no file", char::from(other));
                return Err(self.invalid(what));
            }
        };
        let id = |value: u64, name: &str| {
            u32::try_from(value).map_err(|_| self.invalid(format!("{name} {value} is too large")))
        };
        let owner = |key: &[u8], field: &[u8], name: &str| match decimal(key)? {
            Some(value) => id(value, name),
            None => id(self.number(field, name)?, name),
        };
        let (uid, gid) =
            (owner(b"uid", &header[108..116], "uid")?, owner(b"gid", &header[116..124], "gid")?);
        let (mtime, mtime_nsec) = match get(b"mtime") {
            Some(value) => {
                seconds(value).ok_or_else(|| self.invalid("mtime is not a decimal number"))?
            }
            None => (self.signed(&header[136..148], "mtime")?, 0),
        };
        let device = |field| {
            let number = self.number(&header[field], "device number")?;
            id(number, "device number")
        };
        let rdev = match kind {
            EntryKind::Char | EntryKind::Block => (device(329..337)?, device(337..345)?),
            _ => (0, 0),
        };
        let mode = self.number(&header[100..108], "mode")? & 0o7777;
        let mut xattrs = BTreeMap::new();
        for (key, value) in self.global.iter().chain(&ahead.records) {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattrs.insert(name.to_vec(), value.clone());
            }
        }

        let stored = decimal(b"size")?.unwrap_or(size);
        let stored = if kind == EntryKind::File { stored } else { 0 };
        let sparse_size = match decimal(b"GNU.sparse.realsize")? {
            Some(size) => Some(size),
            None => decimal(b"GNU.sparse.size")?,
        };
        let version_1 = get(b"GNU.sparse.major") == Some(b"1");
        let list = get(b"GNU.sparse.map").map(<[u8]>::to_vec);
        self.stored = stored;
        self.padding = stored.checked_next_multiple_of(BLOCK as u64).map_or(0, |end| end - stored);
        let (map, size) = match (kind, header[156], sparse_size) {
            (EntryKind::File, b'S', _) => {
                let map = self.old_sparse_map(header)?;
                (map, self.number(&header[483..495], "real size")?)
            }
            (EntryKind::File, _, Some(size)) if version_1 => (self.leading_sparse_map()?, size),
            (EntryKind::File, _, Some(size)) if list.is_some() => {
                let list = list.unwrap_or_default();
                let numbers = list.split(|&b| b == b',');
                let numbers = numbers.map(|value| self.decimal(value, b"GNU.sparse.map"));
                (pairs(&numbers.collect::<Result<Vec<_>>>()?), size)
            }
            (EntryKind::File, _, Some(size)) => (pairs(&ahead.pieces), size),
            _ => (vec![(0, self.stored)], self.stored),
        };
        self.check_map(&map, size)?;
        (self.map, self.size) = (map, size);
        let mode = u16::try_from(mode).expect("12 bits");
        Ok(Entry { path, kind, mode, uid, gid, mtime, mtime_nsec, rdev, link, xattrs, size })
    }

    /// The map of an entry of type `S`: in its header, and in blocks behind that.
    fn old_sparse_map(&mut self, header: &[u8; BLOCK]) -> Result<Vec<(u64, u64)>> {
        let mut numbers = Vec::new();
        let mut fields = header[386..482].to_vec();
        let mut more = header[482] != 0;
        loop {
            for field in fields.chunks_exact(12) {
                if field[0] == 0 {
                    break;
                }
                numbers.push(self.number(field, "sparse map")?);
            }
            if !more {
                return Ok(pairs(&numbers));
            }
            let mut block = [0; BLOCK];
            self.read(&mut block)?;
            more = block[504] != 0;
            fields = block[..504].to_vec();
            if numbers.len() > 2 * SPARSE_MAX {
                return Err(self.invalid("sparse map is too long"));
            }
        }
    }

    /// The map of `GNU.sparse` 1.0: decimal lines in whole blocks, before the stored bytes.
    fn leading_sparse_map(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut line = Vec::new();
        let mut want = None;
        while want.is_none_or(|want| numbers.len() < want) {
            let mut block = [0; BLOCK];
            if self.stored < BLOCK as u64 {
                return Err(self.invalid("sparse map is longer than the entry"));
            }
            self.read(&mut block)?;
            self.stored -= BLOCK as u64;
            for &byte in &block {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let number = self.decimal(&line, b"sparse map")?;
                line.clear();
                match want {
                    None => {
                        let count = usize::try_from(number).ok().filter(|&n| n <= SPARSE_MAX);
                        let count = count.ok_or_else(|| self.invalid("sparse map is too long"))?;
                        want = Some(2 * count);
                    }
                    Some(_) => numbers.push(number),
                }
                if want.is_some_and(|want| numbers.len() == want) {
                    break; // The rest of the block is padding.
                }
            }
            if line.len() > BLOCK {
                return Err(self.invalid("damaged sparse map"));
            }
        }
        Ok(pairs(&numbers))
    }

    /// Stored pieces must be in order, inside the file, and as long together as what is stored.
    fn check_map(&self, map: &[(u64, u64)], size: u64) -> Result<()> {
        if size > FILE_MAX {
            return Err(self.invalid(format!("file of {size} bytes, at most {FILE_MAX} are read")));
        }
        let (mut end, mut stored) = (0, 0);
        for &(offset, len) in map {
            let piece_end = offset.checked_add(len).filter(|&end| end <= size);
            match piece_end {
                Some(piece_end) if offset >= end => end = piece_end,
                _ => return Err(self.invalid("sparse map is not in order or not in the file")),
            }
            stored += len;
        }
        if stored != self.stored {
            return Err(
                self.invalid(format!("sparse map has {stored} bytes, the entry {}", self.stored))
            );
        }
        Ok(())
    }
}

impl Ahead {
    fn is_empty(&self) -> bool {
        self.records.is_empty() && self.long_name.is_none() && self.long_link.is_none()
    }
}

fn pairs(numbers: &[u64]) -> Vec<(u64, u64)> {
    numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

fn clamp(value: u64, limit: usize) -> usize {
    usize::try_from(value).unwrap_or(limit).min(limit)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len())]
}

/// Seconds and nanoseconds of a decimal number, which may be negative; digits behind the ninth are
/// cut off.
fn seconds(value: &[u8]) -> Option<(i64, u32)> {
    let value = std::str::from_utf8(value).ok()?;
    let (negative, value) = match value.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole: i64 = whole.parse().ok()?;
    let nine: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nsec: u32 = nine.parse().ok()?;
    Some(match (negative, nsec) {
        (false, nsec) => (whole, nsec),
        (true, 0) => (-whole, 0),
        (true, nsec) => ((-whole).checked_sub(1)?, 1_000_000_000 - nsec),
    })
}

#[cfg(test)]
mod tests;
