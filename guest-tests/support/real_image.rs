//! The realistic images of `scripts/parts images`: what is in a registry, and what a guest must see of it.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use walkdir::WalkDir;

use super::parts::{Parts, run};
use super::tree_text::describe;

/// Of the files that are no larger than this, every `SAMPLE_STEP`th is in the sample.
const SAMPLE_MAX: u64 = 256 << 10;
const SAMPLE_STEP: usize = 60;

/// An image of 200 MB or more in five or more layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RealImage {
    Python,
    Node,
    /// Every oddity that a layer can have.
    Nasty,
}

impl RealImage {
    pub fn name(self) -> &'static str {
        match self {
            RealImage::Python => "python",
            RealImage::Node => "node",
            RealImage::Nasty => "nasty",
        }
    }

    fn dir(self) -> Result<PathBuf> {
        Ok(Parts::install(&["images", "tools"])?.path("images")?.join(self.name()))
    }

    /// Where skopeo finds it: `oci:DIR:latest`.
    pub fn source(self) -> Result<String> {
        Ok(format!("oci:{}:latest", self.dir()?.join("layout").display()))
    }

    /// What umoci unpacks of it. Not to be written to.
    pub fn tree(self) -> Result<PathBuf> {
        Ok(self.dir()?.join("tree"))
    }

    /// A program in it to start, as a line for the image's own shell.
    pub fn start(self) -> &'static str {
        match self {
            RealImage::Python => "PYTHONDONTWRITEBYTECODE=1 /srv/venv/bin/python /srv/app/main.py",
            RealImage::Node => "/usr/bin/node /srv/app/main.js",
            RealImage::Nasty => {
                "perl -e 'use POSIX; print strtol(q(42), 10)' && cat /nasty/later/2 /nasty/names/*"
            }
        }
    }
}

/// What a guest must see of an image, written down on the host.
pub struct Expected {
    pub metadata: Vec<u8>,
    pub contents: Vec<u8>,
    pub edges: Vec<u8>,
    /// Of the files called `bottom`, some of which have no path that can be named.
    pub bottom: Vec<u8>,
    /// Output of the program to start.
    pub start: Vec<u8>,
    /// Paths that end with NUL.
    pub sample_names: Vec<u8>,
    pub sample: Vec<u8>,
    /// Sum of the sizes of all files, in bytes; links count once.
    pub bytes: u64,
    pub paths: u64,
}

impl Expected {
    pub fn of(image: RealImage) -> Result<Expected> {
        let parts = Parts::install(&["tools", "images"])?;
        let tree = image.tree()?;
        let (mut bytes, mut paths, mut small) = (0, 0, Vec::new());
        let mut seen = std::collections::HashSet::new();
        // Directories of more than PATH_MAX are left out: an error each.
        for entry in WalkDir::new(&tree).sort_by_file_name().into_iter().filter_map(Result::ok) {
            paths += 1;
            let Ok(metadata) = entry.metadata() else { continue };
            if !metadata.is_file() {
                continue;
            }
            use std::os::unix::fs::MetadataExt;
            if seen.insert(metadata.ino()) {
                bytes += metadata.len();
            }
            if metadata.len() <= SAMPLE_MAX {
                small.push(entry.path().strip_prefix(&tree)?.to_owned());
            }
        }
        let mut sample_names = Vec::new();
        for path in small.iter().step_by(SAMPLE_STEP) {
            sample_names.extend_from_slice(path.as_os_str().as_bytes());
            sample_names.push(0);
        }
        let names = tempfile::NamedTempFile::new()?;
        std::fs::write(names.path(), &sample_names)?;
        let sample = format!("busybox xargs -0 busybox sha256sum <'{}'", names.path().display());
        let bottom =
            "\"$tools/find\" . -name bottom -execdir busybox sha256sum '{}' ';' | busybox sort";
        Ok(Expected {
            metadata: describe(&parts, &tree, "metadata .")?,
            contents: describe(&parts, &tree, "contents .")?,
            edges: describe(&parts, &tree, "edges .")?,
            bottom: describe(&parts, &tree, bottom)?,
            start: start_on_the_host(&tree, image.start())?,
            sample: describe(&parts, &tree, &sample)?,
            sample_names,
            bytes,
            paths,
        })
    }
}

/// Runs a line of shell in a tree that it can not write to.
fn start_on_the_host(tree: &Path, line: &str) -> Result<Vec<u8>> {
    let script = r#"mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec chroot "$0" /bin/sh -c "$1""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(tree).arg(line);
    // As the first process of a guest has it.
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let output = run(&mut command)?;
    ensure!(!output.is_empty(), "{line} printed nothing");
    Ok(output)
}
