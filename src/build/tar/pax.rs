//! PAX extended headers: records of the form `LENGTH KEY=VALUE\n`.
//!
//! The length counts the whole record, so a value may hold any byte, newlines included.

use super::sparse::Map;

/// What the records in front of an entry say. Of two records of one key the later one counts.
#[derive(Clone, Debug, Default)]
pub struct Pax {
    pub path: Option<Vec<u8>>,
    pub linkpath: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    /// Full names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: Sparse,
    /// Keys that have no effect here and might have elsewhere.
    pub ignored: Vec<Vec<u8>>,
}

/// The records `GNU.sparse.*`.
#[derive(Clone, Debug, Default)]
pub struct Sparse {
    /// Major and minor; formats 0.0 and 0.1 do not say theirs.
    pub version: (u64, u64),
    /// The name of the file, where that of the header is made up.
    pub name: Option<Vec<u8>>,
    /// Bytes of the file, holes included.
    pub size: Option<u64>,
    /// The map of formats 0.0 and 0.1.
    pub map: Map,
    pub has_map: bool,
    /// Start of the next piece, in format 0.0.
    offset: Option<u64>,
}

/// Keys without an effect on an image, that programs write as a matter of course.
const HARMLESS: [&[u8]; 10] = [
    b"atime",
    b"ctime",
    b"comment",
    b"charset",
    b"hdrcharset",
    b"uname",
    b"gname",
    b"LIBARCHIVE.creationtime",
    b"GNU.sparse.numblocks",
    b"SCHILY.fflags",
];

impl Pax {
    pub fn parse(mut bytes: &[u8]) -> Result<Pax, String> {
        let mut pax = Pax::default();
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or("a damaged PAX record")?;
            pax.add(key, value)?;
            bytes = rest;
        }
        Ok(pax)
    }

    /// Adds records that come later.
    pub fn merge(&mut self, later: Pax) {
        fn over<T>(old: &mut Option<T>, new: Option<T>) {
            if new.is_some() {
                *old = new;
            }
        }
        over(&mut self.path, later.path);
        over(&mut self.linkpath, later.linkpath);
        over(&mut self.size, later.size);
        over(&mut self.uid, later.uid);
        over(&mut self.gid, later.gid);
        over(&mut self.mtime, later.mtime);
        for (name, value) in later.xattrs {
            self.set_xattr(&name, &value);
        }
        if later.sparse.size.is_some() || later.sparse.name.is_some() {
            self.sparse = later.sparse;
        }
        self.ignored.extend(later.ignored);
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) {
        self.xattrs.retain(|(other, _)| other != name);
        self.xattrs.push((name.to_vec(), value.to_vec()));
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let sparse = &mut self.sparse;
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.linkpath = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value, "size")?),
            b"uid" => self.uid = Some(decimal(value, "uid")?),
            b"gid" => self.gid = Some(decimal(value, "gid")?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => sparse.version.0 = decimal(value, "sparse format")?,
            b"GNU.sparse.minor" => sparse.version.1 = decimal(value, "sparse format")?,
            b"GNU.sparse.name" => sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                sparse.size = Some(decimal(value, "size of a sparse file")?);
            }
            b"GNU.sparse.map" => {
                sparse.map = Map::default();
                let mut numbers = value.split(|&b| b == b',').filter(|n| !n.is_empty());
                while let Some(offset) = numbers.next() {
                    let len = numbers.next().ok_or("an odd map of a sparse file")?;
                    sparse.map.add(decimal(offset, "sparse map")?, decimal(len, "sparse map")?)?;
                }
                sparse.has_map = true;
            }
            b"GNU.sparse.offset" => sparse.offset = Some(decimal(value, "sparse map")?),
            b"GNU.sparse.numbytes" => {
                let offset = sparse.offset.take().ok_or("an odd map of a sparse file")?;
                sparse.map.add(offset, decimal(value, "sparse map")?)?;
                sparse.has_map = true;
            }
            _ => match key.strip_prefix(b"SCHILY.xattr.") {
                Some(name) => {
                    let name = name.to_vec();
                    self.set_xattr(&name, value);
                }
                None if HARMLESS.contains(&key) => {}
                // The same attributes in another encoding.
                None if key.starts_with(b"LIBARCHIVE.xattr.") => {}
                None => self.ignored.push(key.to_vec()),
            },
        }
        if !matches!(sparse_version(&self.sparse), (0, _) | (1, 0)) {
            let (major, minor) = self.sparse.version;
            return Err(format!("a sparse file of format {major}.{minor}"));
        }
        Ok(())
    }
}

fn sparse_version(sparse: &Sparse) -> (u64, u64) {
    sparse.version
}

/// Key and value of the first record, and the bytes behind it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|&b| b == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space], "").ok()?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&b| b == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (!key.is_empty()).then_some((key, value, rest))
}

pub fn decimal(digits: &[u8], what: &str) -> Result<u64, String> {
    let odd = || format!("{what} is no number: {:?}", digits.escape_ascii().to_string());
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(odd());
    }
    let text = std::str::from_utf8(digits).map_err(|_| odd())?;
    text.parse().map_err(|_| odd())
}

/// Seconds since the epoch with a fraction, which is cut after nanoseconds and counts towards the
/// future: -1.5 is 2 seconds before the epoch and half a second.
fn time(value: &[u8]) -> Result<(i64, u32), String> {
    let odd = || format!("mtime is no time: {:?}", value.escape_ascii().to_string());
    let (negative, number) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let (whole, fraction) = match number.iter().position(|&b| b == b'.') {
        Some(dot) => (&number[..dot], &number[dot + 1..]),
        None => (number, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(odd());
    }
    let seconds = i64::try_from(decimal(whole, "mtime").map_err(|_| odd())?).map_err(|_| odd())?;
    let mut nanoseconds = 0;
    for i in 0..9 {
        nanoseconds = nanoseconds * 10 + fraction.get(i).map_or(0, |digit| u32::from(digit - b'0'));
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_hold_any_byte() {
        let bytes = b"17 path=a\nb/c=\xff\0\n32 SCHILY.xattr.user.x=1\n9 a=b\n\n12 path=end\n";
        let pax = Pax::parse(bytes).unwrap();
        assert_eq!(pax.path.unwrap(), b"end");
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"1\n9 a=b\n".to_vec())]);
    }

    #[test]
    fn damaged_records_are_refused() {
        let cases: [&[u8]; 9] = [
            b"x path=a\n",
            b"11 path=a\n",
            b"8 path=a\n",
            b"9 path=a ",
            b"6 path\n",
            b"6 =abc\n",
            b"99999999999999999999999 path=a\n",
            b"0 path=a\n",
            b"2 ",
        ];
        for bytes in cases {
            assert!(Pax::parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        for bytes in [&b"12 size=1e3\n"[..], b"11 uid=-12\n", b"12 mtime=1.x\n"] {
            assert!(Pax::parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn times_have_nanoseconds_and_may_be_before_the_epoch() {
        // (text, seconds, nanoseconds)
        let cases: [(&[u8], i64, u32); 7] = [
            (b"1600000001", 1_600_000_001, 0),
            (b"1600000001.5", 1_600_000_001, 500_000_000),
            (b"0.0000000019", 0, 1),
            (b"1.", 1, 0),
            (b"-1", -1, 0),
            (b"-1.5", -2, 500_000_000),
            (b"-0.000000001", -1, 999_999_999),
        ];
        for (text, seconds, nanoseconds) in cases {
            assert_eq!(time(text), Ok((seconds, nanoseconds)), "{}", text.escape_ascii());
        }
        for text in [&b""[..], b".", b"--1", b"1.2.3", b"1e9", b"99999999999999999999"] {
            assert!(time(text).is_err(), "{}", text.escape_ascii());
        }
    }
}
