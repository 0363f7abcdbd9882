//! Writes the archive that a kernel unpacks as its first root: cpio in "newc" format.
//!
//! Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Uncompressed, which
//! an emulated CPU unpacks fastest.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use walkdir::WalkDir;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive in the making. All files are executable and belong to root.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Initramfs {
    /// Adds a file under a path without leading slash, and the directories above it.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        for (at, _) in path.match_indices('/') {
            let directory = &path[..at];
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, DIRECTORY, &[]);
            }
        }
        self.entry(path, PROGRAM, content);
    }

    /// Adds all regular files below `directory` of the host, which becomes the archive's `below`, empty
    /// or a path with a slash at its end.
    pub fn tree(&mut self, below: &str, directory: &Path) -> Result<()> {
        for entry in WalkDir::new(directory).sort_by_file_name() {
            let entry = entry?;
            if entry.file_type().is_file() {
                let path = entry.path().strip_prefix(directory)?;
                let path = path.to_str().context("the parts have plain names")?;
                self.file(&format!("{below}{path}"), &fs::read(entry.path())?);
            }
        }
        Ok(())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("newc has 32 bits for a size");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        self.bytes.extend_from_slice(b"070701");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
