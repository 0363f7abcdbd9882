//! Extended attributes: from the source tree to the area behind an inode.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use crate::rafs::layout::{XattrEntry, XattrHeader};

/// Name prefixes the format has numbers for. The ACLs are whole names: nothing may follow them.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Largest value in bytes: its size is stored in 16 bits.
const VALUE_MAX: usize = 65535;

/// One attribute: the number of its prefix, the rest of its name, its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    prefix: u8,
    name: Box<[u8]>,
    value: Box<[u8]>,
}

impl Xattr {
    /// An attribute by its full name; the error says why the format cannot hold it.
    pub fn new(full_name: &[u8], value: Vec<u8>) -> Result<Xattr, String> {
        let shown = full_name.escape_ascii();
        let (prefix, name) = prefix_of(full_name).ok_or_else(|| {
            format!(
                "RAFS cannot store the extended attribute {shown}: only user.*, trusted.*, \
                 security.* and POSIX ACLs"
            )
        })?;
        if full_name.len() > 255 || full_name.contains(&0) {
            return Err(format!(
                "the name of the extended attribute {shown} is too long or has a NUL in it"
            ));
        }
        if value.len() > VALUE_MAX {
            return Err(format!(
                "the extended attribute {shown} has {} bytes, RAFS stores at most {VALUE_MAX}",
                value.len()
            ));
        }
        Ok(Xattr { prefix, name: name.into(), value: value.into() })
    }

    /// True if the format has a number for the namespace of this name; Linux has no others that a
    /// file system would store.
    pub fn is_known(full_name: &[u8]) -> bool {
        prefix_of(full_name).is_some()
    }

    pub fn full_name(&self) -> Vec<u8> {
        let (_, prefix) = PREFIXES.iter().find(|(n, _)| *n == self.prefix).expect("made by new");
        [prefix, &*self.name].concat()
    }

    pub fn value(&self) -> &[u8] {
        &self.value
    }

    /// Bytes of the entry, padded to 4.
    fn len(&self) -> usize {
        (size_of::<XattrEntry>() + self.name.len() + self.value.len()).next_multiple_of(4)
    }
}

/// The number of the prefix of a name, and the rest.
fn prefix_of(full_name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(number, prefix)| {
        let rest = full_name.strip_prefix(prefix)?;
        let whole = !prefix.ends_with(b".");
        (whole == rest.is_empty()).then_some((number, rest))
    })
}

/// Sorted attributes of one inode; the error says why the format cannot hold them.
pub fn sorted(mut xattrs: Vec<Xattr>) -> Result<Box<[Xattr]>, String> {
    if count_field(area_len(&xattrs)).is_none() {
        let len = area_len(&xattrs);
        return Err(format!("its extended attributes need {len} bytes, RAFS allows 262148"));
    }
    xattrs.sort_by_key(Xattr::full_name);
    Ok(xattrs.into())
}

/// Bytes of the area that holds `xattrs`; 0 for none.
pub fn area_len(xattrs: &[Xattr]) -> usize {
    if xattrs.is_empty() {
        return 0;
    }
    size_of::<XattrHeader>() + xattrs.iter().map(Xattr::len).sum::<usize>()
}

/// The `xattr_count` of an inode with such an area; `None` if it does not fit the field.
pub fn count_field(area_len: usize) -> Option<u16> {
    match area_len {
        0 => Some(0),
        len => u16::try_from((len - size_of::<XattrHeader>()) / 4 + 1).ok(),
    }
}

/// Writes the area to the start of `out`, which is zeroed and at least [`area_len`] bytes long.
pub fn write_area(xattrs: &[Xattr], out: &mut [u8]) {
    let mut at = size_of::<XattrHeader>();
    for xattr in xattrs {
        let entry = XattrEntry {
            name_len: u8::try_from(xattr.name.len()).expect("checked by Xattr::new"),
            name_index: xattr.prefix,
            value_size: U16::new(u16::try_from(xattr.value.len()).expect("checked by Xattr::new")),
        };
        let mut pos = at;
        for part in [entry.as_bytes(), &xattr.name, &xattr.value] {
            out[pos..pos + part.len()].copy_from_slice(part);
            pos += part.len();
        }
        at += xattr.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_of_the_worked_example() {
        let xattrs = [Xattr::new(b"user.k", b"v".to_vec()).unwrap()];
        let mut area = [0; 20];
        assert_eq!(area_len(&xattrs), area.len());
        assert_eq!(count_field(area.len()), Some(3));
        write_area(&xattrs, &mut area);
        assert_eq!(area, *b"\0\0\0\0\0\0\0\0\0\0\0\0\x01\x01\x01\0kv\0\0");
        assert_eq!((area_len(&[]), count_field(0)), (0, Some(0)));
    }

    #[test]
    fn names_the_format_has_no_number_for_are_refused() {
        for good in ["user.a", "trusted.a", "security.a", "system.posix_acl_access"] {
            Xattr::new(good.as_bytes(), vec![]).expect(good);
        }
        for bad in ["system.nfs4_acl", "system.posix_acl_access2", "user.", "btrfs.compression", ""]
        {
            Xattr::new(bad.as_bytes(), vec![]).expect_err(bad);
        }
        Xattr::new(b"user.big", vec![0; 65535]).unwrap();
        Xattr::new(b"user.big", vec![0; 65536]).unwrap_err();
    }
}
