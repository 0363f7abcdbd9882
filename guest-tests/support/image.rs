//! Images of generated files, built by `rafs create`.
//!
//! Every byte of a file follows from the file's number and the byte's offset, so that a read is
//! checked anywhere without a copy of the tree, and nothing compresses or deduplicates by chance.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::daemon::{Daemon, Launch};
use super::frontend::{Vm, VmConfig};
use super::fuse_client::{Fuse, FuseError};
use super::rng::Rng;
use super::to_usize;

/// `len` bytes of file `number` from `offset` on.
pub fn pattern(number: usize, offset: u64, len: usize) -> Vec<u8> {
    let first_word = offset / 8;
    let skip = to_usize(offset % 8);
    let mut bytes = Vec::with_capacity(len + 16);
    let mut word = first_word;
    while bytes.len() < skip + len {
        let seed = (number as u64) << 40 ^ word;
        bytes.extend_from_slice(&Rng::new(seed).next().to_le_bytes());
        word += 1;
    }
    bytes.drain(..skip);
    bytes.truncate(len);
    bytes
}

/// Files of equal size, `/f0000` and on, in one image with one blob.
#[derive(Clone, Debug)]
pub struct Image {
    pub bootstrap: PathBuf,
    pub blobs: PathBuf,
    pub files: usize,
    /// Bytes per file.
    pub file_size: u64,
    /// Bytes per chunk.
    pub chunk_size: u64,
}

impl Image {
    pub fn build(
        dir: &Path,
        files: usize,
        file_size: u64,
        chunk_size: u64,
        compressor: &str,
    ) -> Result<Image> {
        let tree = dir.join("tree");
        let blobs = dir.join("blobs");
        fs::create_dir_all(&tree)?;
        fs::create_dir_all(&blobs)?;
        for number in 0..files {
            let mut file = File::create(tree.join(name(number)))?;
            file.write_all(&pattern(number, 0, to_usize(file_size)))?;
        }
        let bootstrap = dir.join("bootstrap");
        create(&[
            "--bootstrap".as_ref(),
            bootstrap.as_ref(),
            "--blob-dir".as_ref(),
            blobs.as_ref(),
            "--compressor".as_ref(),
            compressor.as_ref(),
            "--chunk-size".as_ref(),
            format!("{chunk_size:#x}").as_ref(),
            tree.as_ref(),
        ])?;
        fs::remove_dir_all(&tree)?;
        Ok(Image { bootstrap, blobs, files, file_size, chunk_size })
    }

    /// The blob, of which there is one.
    pub fn blob(&self) -> PathBuf {
        let mut blobs = fs::read_dir(&self.blobs).expect("a folder of blobs");
        blobs.next().expect("one blob").expect("readable").path()
    }

    pub fn bytes(&self) -> u64 {
        self.files as u64 * self.file_size
    }

    pub fn launch(&self, scratch: &Path) -> Launch {
        Launch::new(&self.bootstrap, &self.blobs, scratch)
    }

    /// The same image with its blobs read through another directory.
    pub fn launch_over(&self, blobs: &Path, scratch: &Path) -> Launch {
        Launch::new(&self.bootstrap, blobs, scratch)
    }

    /// Node of every file.
    pub fn nodes(&self, fuse: &mut Fuse) -> Result<Vec<u64>, FuseError> {
        (0..self.files).map(|number| fuse.resolve(name(number).as_bytes())).collect()
    }

    /// Reads a whole file and compares.
    pub fn check_file(&self, fuse: &mut Fuse, number: usize, node: u64) -> Result<()> {
        let got = fuse.read_all(node, 128 << 10)?;
        if got != pattern(number, 0, to_usize(self.file_size)) {
            bail!("{} differs", name(number));
        }
        Ok(())
    }

    /// Reads every file and compares.
    pub fn check_all(&self, fuse: &mut Fuse) -> Result<()> {
        let nodes = self.nodes(fuse)?;
        for (number, node) in nodes.into_iter().enumerate() {
            self.check_file(fuse, number, node)?;
        }
        Ok(())
    }
}

/// A guest of a daemon of its own that serves an image.
pub struct Guest {
    pub daemon: Daemon,
    _vm: Vm,
    pub fuse: Fuse,
    pub nodes: Vec<u64>,
}

impl Guest {
    pub fn boot(launch: &Launch, image: &Image) -> Guest {
        let daemon = launch.spawn().expect("a daemon");
        let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let nodes = image.nodes(&mut fuse).expect("lookups");
        Guest { daemon, _vm: vm, fuse, nodes }
    }

    /// Reads whole files and compares.
    pub fn check(&mut self, image: &Image, files: impl IntoIterator<Item = usize>) {
        for number in files {
            let checked = image.check_file(&mut self.fuse, number, self.nodes[number]);
            checked.unwrap_or_else(|e| panic!("file {number}: {e:#}\n{}", self.daemon.log()));
        }
    }
}

pub fn name(number: usize) -> String {
    format!("f{number:04}")
}

/// Runs `rafs create` with these arguments.
pub fn create(args: &[&std::ffi::OsStr]) -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_rafs")).arg("create").args(args).output()?;
    if !output.status.success() {
        bail!("rafs create: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
