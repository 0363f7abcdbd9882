//! Where a sparse file has data: the maps of the GNU and PAX formats.

use super::header;
use super::pax::decimal;

/// Most pieces of one file.
const SEGMENTS_MAX: usize = 1 << 20;

/// A piece of a file that is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Pieces in order, none of them overlapping.
#[derive(Clone, Debug, Default)]
pub struct Map {
    segments: Vec<Segment>,
    end: u64,
}

impl Map {
    pub fn add(&mut self, offset: u64, len: u64) -> Result<(), String> {
        let end = offset.checked_add(len).filter(|_| offset >= self.end);
        self.end = end.ok_or("the pieces of a sparse file overlap")?;
        if len == 0 {
            // Stands for the end of a file that ends with a hole.
            return Ok(());
        }
        if self.segments.len() == SEGMENTS_MAX {
            return Err(format!("a sparse file of more than {SEGMENTS_MAX} pieces"));
        }
        self.segments.push(Segment { offset, len });
        Ok(())
    }

    /// Adds the pieces of a header; false if they are the last.
    pub fn add_gnu(&mut self, headers: &[::tar::GnuSparseHeader]) -> Result<bool, String> {
        for header in headers {
            if header.numbytes[0] == 0 {
                return Ok(false);
            }
            let offset = header::number(&header.offset, "sparse map")?;
            self.add(offset, header::number(&header.numbytes, "sparse map")?)?;
        }
        Ok(true)
    }

    /// The pieces of a file of `size` bytes, of which `stored` are in the archive.
    pub fn finish(self, size: u64, stored: u64) -> Result<Vec<Segment>, String> {
        if self.end > size || size > i64::MAX.cast_unsigned() {
            return Err(format!("a sparse file of {size} bytes with data up to {}", self.end));
        }
        let sum: u64 = self.segments.iter().map(|segment| segment.len).sum();
        if sum != stored {
            return Err(format!("a sparse file with {sum} bytes of data, {stored} are stored"));
        }
        Ok(self.segments)
    }
}

/// The numbers of a map that is stored in front of the data: how many pieces, then the start and
/// length of each, one number on each line.
#[derive(Default)]
pub struct Lines {
    map: Map,
    /// The line that has begun.
    line: Vec<u8>,
    /// Pieces that are still to come, once known.
    left: Option<u64>,
    offset: Option<u64>,
}

impl Lines {
    /// Takes a block; the map if it ends there.
    pub fn add(&mut self, block: &[u8]) -> Result<Option<Map>, String> {
        for &byte in block {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > 20 {
                    return Err("an odd map of a sparse file".to_owned());
                }
                continue;
            }
            let number = decimal(&self.line, "sparse map")?;
            self.line.clear();
            match (self.left, self.offset.take()) {
                (None, _) => self.left = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(left), Some(offset)) => {
                    self.map.add(offset, number)?;
                    self.left = Some(left - 1);
                }
            }
            if self.left == Some(0) {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_lie_are_refused() {
        // (pieces, size, stored, accepted)
        type Case = (&'static [(u64, u64)], u64, u64, bool);
        let cases: [Case; 8] = [
            (&[], 0, 0, true),
            (&[], 1 << 40, 0, true),
            (&[(0, 5), (10, 5), (100, 0)], 100, 10, true),
            (&[(0, 5), (4, 5)], 100, 10, false),
            (&[(10, 5), (0, 5)], 100, 10, false),
            (&[(0, 5)], 4, 5, false),
            (&[(0, 5)], 100, 6, false),
            (&[(u64::MAX, 5)], u64::MAX, 5, false),
        ];
        for (pieces, size, stored, accepted) in cases {
            let mut map = Map::default();
            let result = pieces
                .iter()
                .try_for_each(|&(offset, len)| map.add(offset, len))
                .and_then(|()| map.finish(size, stored));
            assert_eq!(result.is_ok(), accepted, "{pieces:?}: {result:?}");
        }
    }

    #[test]
    fn a_map_may_end_in_any_block() {
        let mut lines = Lines::default();
        assert!(lines.add(b"2\n0\n").unwrap().is_none());
        assert!(lines.add(b"51").unwrap().is_none());
        let map = lines.add(b"2\n1024\n1\n\0\0\0").unwrap().unwrap();
        let want = [Segment { offset: 0, len: 512 }, Segment { offset: 1024, len: 1 }];
        assert_eq!(map.finish(2000, 513).unwrap(), want);
        for bad in [&b"1\nx\n"[..], b"\n", b"1\n\n", b"000000000000000000000000000001\n"] {
            assert!(Lines::default().add(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(Lines::default().add(b"0\n").unwrap().is_some(), "a file without data");
    }
}
