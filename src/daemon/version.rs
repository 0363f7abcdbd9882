//! What this binary was made from, for `--version` and `GET /api/v1/daemon`.
//!
//! nydus-snapshotter compares the commit it reads from `--version` with the one the API reports, so
//! both come from here. The values are set by the build script.

use serde::Serialize;

/// Five strings, as clients of the API insist; none is ever absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Version {
    pub package_ver: &'static str,
    /// Hash of the commit, or `unknown`.
    pub git_commit: &'static str,
    /// RFC 3339, UTC.
    pub build_time: &'static str,
    /// `release` or `debug`.
    pub profile: &'static str,
    pub rustc: &'static str,
}

/// The version of this binary.
pub const VERSION: Version = Version {
    package_ver: env!("CARGO_PKG_VERSION"),
    git_commit: env!("RAFSD_GIT_COMMIT"),
    build_time: env!("RAFSD_BUILD_TIME"),
    profile: env!("RAFSD_PROFILE"),
    rustc: env!("RAFSD_RUSTC"),
};

impl Version {
    /// The text of `--version`, in the lines and spelling that nydus-snapshotter parses.
    pub fn text(&self) -> String {
        let Version { package_ver, git_commit, build_time, profile, rustc } = self;
        format!(
            "Version: \t{package_ver}\nGit Commit: \t{git_commit}\nBuild Time: \t{build_time}\n\
             Profile: \t{profile}\nRustc: \t\t{rustc}\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_a_value() {
        let text = VERSION.text();
        for name in ["Version:", "Git Commit:", "Build Time:", "Profile:", "Rustc:"] {
            let line = text.lines().find(|l| l.starts_with(name)).expect(name);
            assert!(!line[name.len()..].trim().is_empty(), "{line:?}");
        }
    }
}
