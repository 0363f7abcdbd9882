//! Whiteouts: how a layer says that a name of a lower layer is gone.
//!
//! A directory is built as the lowest layer: there is nothing to remove, so the marks are dropped.

use rustix::fs::FileType;

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
