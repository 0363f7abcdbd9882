//! Where something is mounted: a path in the tree that guests see.

use std::fmt;

use super::abi;

/// Most bytes of a path, as the kernel has it.
const PATH_MAX: usize = 4096;

/// An absolute path without empty parts, `.` or `..`; `/` is the root.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MountPath {
    /// `/a/b`, or nothing for the root.
    text: String,
}

/// Why a text names no place in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    #[error("a mountpoint starts with `/`")]
    Relative,
    #[error("a mountpoint has no `.` or `..` in it")]
    Dots,
    #[error("a name in a mountpoint has at most 255 bytes, the whole at most {PATH_MAX}")]
    TooLong,
    #[error("a mountpoint has no NUL in it")]
    Nul,
}

impl MountPath {
    /// `/`
    pub fn root() -> MountPath {
        MountPath { text: String::new() }
    }

    /// Takes a path as clients write it: slashes at the end or in a row mean nothing.
    ///
    /// # Errors
    ///
    /// [`PathError`] says what is wrong with it.
    pub fn parse(text: &str) -> Result<MountPath, PathError> {
        if !text.starts_with('/') {
            return Err(PathError::Relative);
        }
        if text.len() > PATH_MAX {
            return Err(PathError::TooLong);
        }
        let mut path = String::with_capacity(text.len());
        for name in text.split('/').filter(|name| !name.is_empty()) {
            match name {
                "." | ".." => return Err(PathError::Dots),
                _ if name.len() > abi::NAME_MAX => return Err(PathError::TooLong),
                _ if name.contains('\0') => return Err(PathError::Nul),
                _ => {}
            }
            path.push('/');
            path.push_str(name);
        }
        Ok(MountPath { text: path })
    }

    pub fn is_root(&self) -> bool {
        self.text.is_empty()
    }

    /// Whether `other` lies below this path.
    pub fn leads_to(&self, other: &MountPath) -> bool {
        other.text.strip_prefix(&self.text).is_some_and(|rest| rest.starts_with('/'))
    }

    /// The names from the root on.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.text.split('/').skip(1)
    }
}

impl fmt::Display for MountPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_root() { "/" } else { &self.text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_write_is_a_path_or_an_error() {
        let cases = [
            ("/", Ok("/")),
            ("//", Ok("/")),
            ("/containers", Ok("/containers")),
            ("/rafs/c1/lowerdir/", Ok("/rafs/c1/lowerdir")),
            ("/rafs//c1", Ok("/rafs/c1")),
            ("/a b/ü+%", Ok("/a b/ü+%")),
            ("/...", Ok("/...")),
            ("", Err(PathError::Relative)),
            ("a", Err(PathError::Relative)),
            ("/a/../b", Err(PathError::Dots)),
            ("/.", Err(PathError::Dots)),
            ("/a\0", Err(PathError::Nul)),
        ];
        for (text, want) in cases {
            let got = MountPath::parse(text).map(|path| path.to_string());
            assert_eq!(got, want.map(str::to_owned), "{text:?}");
        }
        let long = format!("/{}", "n".repeat(256));
        assert_eq!(MountPath::parse(&long), Err(PathError::TooLong));
        assert!(MountPath::parse(&long[..256]).is_ok());
        assert_eq!(MountPath::parse(&"/n".repeat(2049)), Err(PathError::TooLong));
    }

    #[test]
    fn paths_lead_to_what_lies_below() {
        let path = |text| MountPath::parse(text).unwrap();
        assert!(path("/").leads_to(&path("/a")));
        assert!(path("/a").leads_to(&path("/a/b")));
        assert!(!path("/a").leads_to(&path("/ab")));
        assert!(!path("/a").leads_to(&path("/a")));
        assert!(!path("/").leads_to(&path("/")));
        assert_eq!(path("/").names().count(), 0);
        assert_eq!(path("/a/b").names().collect::<Vec<_>>(), ["a", "b"]);
    }
}
