//! Extended attributes, stored behind their inode.

use smallvec::SmallVec;
use zerocopy::FromBytes;

use super::error::{FormatError, Result};
use super::layout::{XattrEntry, XattrHeader};

/// Longest attribute name in bytes, prefix included: the kernel's `XATTR_NAME_MAX`.
const NAME_MAX: usize = 255;

/// One attribute: its name is `prefix` followed by `name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    pub prefix: &'static str,
    /// Empty for the POSIX ACLs, whose prefix says all.
    pub name: &'a [u8],
    pub value: &'a [u8],
}

/// The attributes of one inode, in stored order: an iterator over entries that were all checked.
#[derive(Clone, Debug)]
pub struct Xattrs<'a> {
    rest: &'a [u8],
}

fn prefix(index: u8) -> Option<&'static str> {
    Some(match index {
        1 => "user.",
        2 => "system.posix_acl_access",
        3 => "system.posix_acl_default",
        4 => "trusted.",
        6 => "security.",
        _ => return None,
    })
}

impl Xattr<'_> {
    /// Whether `name`, with its prefix, is this attribute's.
    pub fn is_named(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix.as_bytes()) == Some(self.name)
    }

    /// Prefix and name.
    pub fn full_name(&self) -> Vec<u8> {
        [self.prefix.as_bytes(), self.name].concat()
    }
}

impl<'a> Xattrs<'a> {
    /// Checks the xattr area `bytes`, which starts at byte `offset` of the bootstrap and is empty
    /// if there are no attributes.
    pub(super) fn check(bytes: &'a [u8], offset: u64) -> Result<Xattrs<'a>> {
        if bytes.is_empty() {
            return Ok(Xattrs { rest: &[] });
        }
        let (header, entries) = XattrHeader::ref_from_prefix(bytes)
            .map_err(|_| FormatError::invalid("xattr area", offset, "no room for its header"))?;
        if header.shared_count != 0 {
            return Err(FormatError::invalid("xattr area", offset, "shared xattrs are in use"));
        }
        let mut rest = entries;
        let mut names: SmallVec<[_; 8]> = SmallVec::new();
        while !rest.is_empty() {
            let at = offset + (bytes.len() - rest.len()) as u64;
            let (xattr, behind) =
                split(rest).map_err(|reason| FormatError::invalid("xattr entry", at, reason))?;
            names.push((xattr.prefix, xattr.name));
            rest = behind;
        }
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(FormatError::invalid("xattr area", offset, "two xattrs of one name"));
        }
        Ok(Xattrs { rest: entries })
    }

    /// The value of the attribute with this full name, if it is still to come.
    pub fn get(mut self, name: &[u8]) -> Option<&'a [u8]> {
        self.find(|xattr| xattr.is_named(name)).map(|xattr| xattr.value)
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Xattr<'a>;

    fn next(&mut self) -> Option<Xattr<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        // A failure means that the file has changed since `check`: then there is nothing more.
        let (xattr, rest) = split(self.rest).ok()?;
        self.rest = rest;
        Some(xattr)
    }
}

/// The first entry of `bytes`, and what follows its padding.
fn split(bytes: &[u8]) -> std::result::Result<(Xattr<'_>, &[u8]), &'static str> {
    const LONG: &str = "longer than its area";
    let (entry, rest) = XattrEntry::ref_from_prefix(bytes).map_err(|_| LONG)?;
    let (name, rest) = rest.split_at_checked(entry.name_len.into()).ok_or(LONG)?;
    let (value, rest) = rest.split_at_checked(entry.value_size.get().into()).ok_or(LONG)?;
    let prefix = prefix(entry.name_index).ok_or("unknown namespace")?;
    if prefix.ends_with('.') == name.is_empty() {
        return Err("name does not fit its namespace");
    }
    if prefix.len() + name.len() > NAME_MAX || name.contains(&0) {
        return Err("name is longer than 255 bytes or holds a NUL");
    }
    // The area is a multiple of 4 long, so only a damaged entry ends without its padding.
    let padding = (name.len() + value.len()).next_multiple_of(4) - name.len() - value.len();
    Ok((Xattr { prefix, name, value }, rest.get(padding..).ok_or(LONG)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An area of these entries: name index, name, value.
    fn area(entries: &[(u8, &[u8], &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 12];
        for (index, name, value) in entries {
            bytes.extend([u8::try_from(name.len()).unwrap(), *index]);
            bytes.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
            bytes.extend(*name);
            bytes.extend(*value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn attributes_come_in_stored_order_and_by_name() {
        // `user.k` = `v`, as it stands in v6-none, and two more.
        let mut bytes = b"\0\0\0\0\0\0\0\0\0\0\0\0\x01\x01\x01\0kv\0\0".to_vec();
        bytes.extend(&area(&[(6, b"capability", b"12345"), (2, b"", b"acl")])[12..]);
        let xattrs = Xattrs::check(&bytes, 0).unwrap();
        let names: Vec<_> = xattrs.clone().map(|x| x.full_name()).collect();
        assert_eq!(names, [&b"user.k"[..], b"security.capability", b"system.posix_acl_access"]);
        // (name, value)
        let cases: [(&[u8], Option<&[u8]>); 7] = [
            (b"user.k", Some(b"v")),
            (b"security.capability", Some(b"12345")),
            (b"system.posix_acl_access", Some(b"acl")),
            (b"system.posix_acl_default", None),
            (b"user.", None),
            (b"k", None),
            (b"", None),
        ];
        for (name, value) in cases {
            assert_eq!(xattrs.clone().get(name), value, "{}", name.escape_ascii());
        }
        assert_eq!(Xattrs::check(&[], 0).unwrap().count(), 0);
    }

    #[test]
    fn areas_that_break_a_rule() {
        let long = [b'n'; 251];
        let mut cut = area(&[(1, b"k", b"v")]);
        cut.pop();
        let cases = [
            ("one name twice", area(&[(1, b"k", b"v"), (4, b"k", b"v"), (1, b"k", b"w")])),
            ("256 bytes with the prefix", area(&[(1, &long, b"")])),
            ("a NUL in a name", area(&[(1, b"a\0b", b"")])),
            ("an entry without its padding", cut),
            ("no room for the header", vec![0; 8]),
            ("zeros behind the last entry", [area(&[(1, b"k", b"v")]), vec![0; 4]].concat()),
        ];
        for (what, bytes) in cases {
            assert!(Xattrs::check(&bytes, 0).is_err(), "{what}");
        }
        assert!(Xattrs::check(&area(&[(1, &long[1..], b"")]), 0).is_ok(), "255 bytes");
    }
}
