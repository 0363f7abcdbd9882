//! Files that appear under their name only when they are complete.
//!
//! They are not synced: a power cut may cost an image that was just built, as it may cost any file.
//! Readers notice, as they verify every chunk.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::NamedTempFile;

use super::error::BuildError;

/// A file in the directory of its final name, removed again if it is dropped before `commit`.
pub struct Output {
    file: NamedTempFile,
    dir: PathBuf,
}

impl Output {
    pub fn create(dir: &Path) -> Result<Output, BuildError> {
        let file = tempfile::Builder::new()
            .prefix(".rafs-")
            .suffix(".tmp")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(dir)
            .map_err(|source| BuildError::Output { path: dir.to_owned(), source })?;
        Ok(Output { file, dir: dir.to_owned() })
    }

    /// What a failed write says; the final name may not be known yet.
    pub fn failed(&self, source: io::Error) -> BuildError {
        BuildError::Output { path: self.dir.clone(), source }
    }

    /// Gives the file its name, in place of a regular file that has it.
    pub fn commit(self, path: &Path) -> Result<(), BuildError> {
        refuse_special(path)?;
        self.file
            .persist(path)
            .map_err(|e| BuildError::Output { path: path.to_owned(), source: e.error })?;
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes a summary for programs.
pub fn write_json(path: &Path, summary: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = json(summary)?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// A summary as JSON of several lines.
pub fn json(summary: &impl serde::Serialize) -> anyhow::Result<String> {
    let mut text = serde_json::to_string_pretty(summary).context("cannot write JSON")?;
    text.push('\n');
    Ok(text)
}

/// Refuses a name that something other than a regular file has: renaming over `/dev/null` would
/// take it away from everyone else.
pub fn refuse_special(path: &Path) -> Result<(), BuildError> {
    let source = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => return Ok(()),
        Ok(_) => io::Error::new(
            io::ErrorKind::AlreadyExists,
            "something that is not a regular file has this name",
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => e,
    };
    Err(BuildError::Output { path: path.to_owned(), source })
}

/// The directory that holds `path`.
pub fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_when_it_is_complete_and_replaces_only_files() {
        let dir = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(dir.path()).unwrap().count();
        let path = dir.path().join("x");
        let mut out = Output::create(dir.path()).unwrap();
        out.write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(out);
        assert_eq!(names(), 0, "an unfinished file must not stay");

        for content in [&b"one"[..], b"two"] {
            let mut out = Output::create(dir.path()).unwrap();
            out.write_all(content).unwrap();
            out.commit(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        Output::create(dir.path()).unwrap().commit(&path).unwrap_err();
        assert_eq!(names(), 1);
    }
}
