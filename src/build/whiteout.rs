//! Whiteouts: how a layer says that a name of a lower layer is gone.
//!
//! What is built as the lowest layer has nothing to remove: its marks are dropped.

use rustix::fs::FileType;

use super::draft::{Body, Inode};
use super::xattrs::Xattr;
use crate::rafs::FileKind;

/// Name of the entry that hides all that lower layers have in its directory.
pub const OPAQUE: &[u8] = b".wh..wh..opq";
const PREFIX: &[u8] = b".wh.";
/// Names that AUFS needed for itself, and no file of a lower layer can have.
const AUFS: &[u8] = b".wh..wh.";

/// What an entry of a layer says instead of being a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Everything of lower layers in this directory is gone.
    Opaque,
    /// This name of lower layers is gone.
    Remove(Box<[u8]>),
    /// Nothing that concerns anybody.
    Nothing,
}

/// How the source tree marks removed names and opaque directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WhiteoutSpec {
    /// Files named `.wh.NAME` and `.wh..wh..opq`.
    Oci,
    /// Character devices 0/0 and the attribute `trusted.overlay.opaque` = `y`.
    Overlayfs,
    /// No marks: everything is an ordinary file.
    None,
}

impl WhiteoutSpec {
    /// True if an entry of a directory is a mark and no file. `rdev` is its device number.
    pub fn is_whiteout(self, name: &[u8], file_type: FileType, rdev: u64) -> bool {
        match self {
            WhiteoutSpec::Oci => name.starts_with(b".wh."),
            WhiteoutSpec::Overlayfs => file_type == FileType::CharacterDevice && rdev == 0,
            WhiteoutSpec::None => false,
        }
    }

    /// What the entry `name` of a directory says, if it is a mark.
    pub fn mark(self, name: &[u8], inode: &Inode) -> Option<Mark> {
        match self {
            WhiteoutSpec::Oci if name == OPAQUE => Some(Mark::Opaque),
            WhiteoutSpec::Oci => match name.strip_prefix(PREFIX)? {
                _ if name.starts_with(AUFS) => Some(Mark::Nothing),
                b"" | b"." | b".." => Some(Mark::Nothing),
                removed => Some(Mark::Remove(removed.into())),
            },
            WhiteoutSpec::Overlayfs => {
                let kind = FileKind::from_mode(inode.attributes.mode);
                let zero = matches!(inode.body, Body::Special { rdev: 0 });
                let removes = zero && kind == Some(FileKind::CharDevice);
                removes.then(|| Mark::Remove(name.into()))
            }
            WhiteoutSpec::None => None,
        }
    }

    /// True if the name alone says that an entry is a mark, so that its content means nothing.
    pub fn is_mark_name(self, name: &[u8]) -> bool {
        self == WhiteoutSpec::Oci && name.starts_with(PREFIX)
    }

    /// Takes the mark of an opaque directory off its attributes; true if it was there.
    pub fn take_opaque_mark(self, xattrs: &mut Box<[Xattr]>) -> bool {
        let is_mark = |x: &Xattr| self.is_opaque_mark(&x.full_name(), x.value());
        if !xattrs.iter().any(is_mark) {
            return false;
        }
        *xattrs = xattrs.iter().filter(|x| !is_mark(x)).cloned().collect();
        true
    }

    /// True if an attribute of a directory is the mark of an opaque one.
    pub fn is_opaque_mark(self, name: &[u8], value: &[u8]) -> bool {
        self == WhiteoutSpec::Overlayfs && name == b"trusted.overlay.opaque" && value == b"y"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_convention_knows_its_own_marks_only() {
        // (name, type, rdev, oci, overlayfs)
        let cases: [(&[u8], FileType, u64, bool, bool); 6] = [
            (b".wh.gone", FileType::RegularFile, 0, true, false),
            (b".wh..wh..opq", FileType::RegularFile, 0, true, false),
            (b".wh.\xff", FileType::RegularFile, 0, true, false),
            (b".whatever", FileType::RegularFile, 0, false, false),
            (b"gone", FileType::CharacterDevice, 0, false, true),
            (b"null", FileType::CharacterDevice, 0x103, false, false),
        ];
        for (name, file_type, rdev, oci, overlayfs) in cases {
            let shown = name.escape_ascii();
            assert_eq!(WhiteoutSpec::Oci.is_whiteout(name, file_type, rdev), oci, "oci {shown}");
            assert_eq!(
                WhiteoutSpec::Overlayfs.is_whiteout(name, file_type, rdev),
                overlayfs,
                "overlayfs {shown}"
            );
            assert!(!WhiteoutSpec::None.is_whiteout(name, file_type, rdev), "none {shown}");
        }
        assert!(WhiteoutSpec::Overlayfs.is_opaque_mark(b"trusted.overlay.opaque", b"y"));
        assert!(!WhiteoutSpec::Overlayfs.is_opaque_mark(b"trusted.overlay.opaque", b"x"));
        assert!(!WhiteoutSpec::Oci.is_opaque_mark(b"trusted.overlay.opaque", b"y"));
    }
}
