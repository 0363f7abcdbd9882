//! `rafs unpack`: an image back into a tar or a directory.
//!
//! Every chunk is verified before it is written. Chunks of zeros become holes. Memory: what
//! `blob_reader` needs, one chunk, and 60 bytes and the path for each file of more than one name.

mod directory;
mod tar_file;

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ArgGroup;
use indicatif::HumanBytes;

use self::directory::Directory;
use self::tar_file::TarFile;
use super::blob_reader::{Blobs, Places};
use super::image_file;
use crate::rafs::codec::Digester;
use crate::rafs::id::Nid;
use crate::rafs::layout::{ChunkAddr, LayerMark};
use crate::rafs::{FileKind, Inode, WalkItem};

/// Write what is in an image to a tar or a directory.
///
/// All of it: types, owners, modes, times with nanoseconds, extended attributes, hard links, holes.
/// Every chunk is compared with its digest first. The tar is PAX; sockets, which no tar can hold, are
/// left out and named in the log.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("to").required(true).args(["output", "output_dir"])))]
pub struct Args {
    /// Bootstrap, or packed blob that holds one.
    #[arg(short = 'B', long, value_name = "FILE")]
    bootstrap: PathBuf,

    /// Directory with the blobs, each in a file named by its id.
    ///
    /// The data of a packed blob is in the file itself, so that it needs none.
    #[arg(short = 'D', long, value_name = "DIR")]
    blob_dir: Option<PathBuf>,

    /// The blob of an image that has only one.
    #[arg(short = 'b', long, value_name = "FILE", conflicts_with = "blob_dir")]
    blob: Option<PathBuf>,

    /// Tar file to write, replaced if it is there; `-` is standard output.
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Directory to write to, made if missing; it must be empty.
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,

    /// Leave owners as they are for whoever runs this, instead of failing where they cannot be set.
    #[arg(long, requires = "output_dir")]
    no_same_owner: bool,
}

/// What an image is written to.
trait Target {
    /// One path, parents first. `first` is the path that a file was given before, if it has names.
    fn add(&mut self, item: &WalkItem<'_>, data: &mut Data<'_, '_>) -> Result<()>;

    /// Another name of a file that was added as `first`.
    fn link(&mut self, item: &WalkItem<'_>, first: &[u8]) -> Result<()>;

    fn finish(self) -> Result<()>;
}

/// The content of the files of an image.
struct Data<'a, 'b> {
    blobs: &'b mut Blobs<'a>,
    chunk_size: u32,
    buf: Vec<u8>,
    /// A chunk of zeros, once one is needed.
    zeros: Vec<u8>,
    /// Digests of zeros, by their number.
    zero_digests: HashMap<(Digester, u32), [u8; 32]>,
}

impl<'a, 'b> Data<'a, 'b> {
    fn new(blobs: &'b mut Blobs<'a>, chunk_size: u32) -> Data<'a, 'b> {
        let (buf, zeros) = (Vec::new(), Vec::new());
        Data { blobs, chunk_size, buf, zeros, zero_digests: HashMap::new() }
    }

    /// Bytes of each chunk of a file, in order, and whether they are zeros.
    fn holes(&mut self, inode: &Inode<'_>) -> Result<Vec<(u32, bool)>> {
        (0..inode.chunk_count())
            .map(|i| Ok((inode.chunk_len(i), self.is_zero(inode.chunk(i)?, inode.chunk_len(i))?)))
            .collect()
    }

    /// Whether a chunk is zeros, as its digest tells.
    fn is_zero(&mut self, addr: ChunkAddr, len: u32) -> Result<bool> {
        let Some((digest, digester)) = self.blobs.digest(addr)? else { return Ok(false) };
        let chunk_size = self.chunk_size as usize;
        let zeros = &mut self.zeros;
        let zero = self.zero_digests.entry((digester, len)).or_insert_with(|| {
            zeros.resize(chunk_size, 0);
            digester.digest(&zeros[..len as usize])
        });
        let is_zero = *zero == digest;
        // Ends of files have many lengths.
        if self.zero_digests.len() > 1024 {
            self.zero_digests.clear();
        }
        Ok(is_zero)
    }

    /// Chunk `i` of a file, verified.
    fn chunk(&mut self, inode: &Inode<'_>, i: u32) -> Result<&[u8]> {
        self.buf.resize(inode.chunk_len(i) as usize, 0);
        self.blobs.read(inode.chunk(i)?, &mut self.buf)?;
        Ok(&self.buf)
    }
}

/// Writes the image and prints how much that was.
///
/// # Errors
///
/// If the image cannot be read, a chunk is damaged, or the target cannot be written.
pub fn run(args: Args) -> Result<ExitCode> {
    let image = image_file::open(&args.bootstrap)?;
    let places = Places { dir: args.blob_dir, file: args.blob, image: args.bootstrap.clone() };
    let mut blobs = Blobs::new(&image, places);
    let (paths, bytes) = match (&args.output, &args.output_dir) {
        (Some(file), _) => {
            let target = TarFile::create(file)?;
            unpack(&image.bootstrap, &mut blobs, target)?
        }
        (None, Some(dir)) => {
            let target = Directory::create(dir, !args.no_same_owner)?;
            unpack(&image.bootstrap, &mut blobs, target)?
        }
        (None, None) => unreachable!("clap asks for one of them"),
    };
    if args.output.as_deref() != Some("-".as_ref()) {
        let size = HumanBytes(bytes);
        writeln!(io::stdout(), "{paths} paths, {size} ({bytes} bytes) of files")
            .context("cannot write to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn unpack(
    image: &crate::rafs::Bootstrap,
    blobs: &mut Blobs<'_>,
    mut target: impl Target,
) -> Result<(u64, u64)> {
    let mut data = Data::new(blobs, image.chunk_size());
    let mut names: HashMap<Nid, Vec<u8>> = HashMap::new();
    let (mut paths, mut bytes) = (0, 0);
    for item in image.walk() {
        let item = item.context("the image is damaged")?;
        let path = item.path();
        let place = || path.escape_ascii().to_string();
        paths += 1;
        let inode = &item.inode;
        if inode.layer_mark() == LayerMark::HardLink {
            anyhow::bail!("{}: a hard link to a lower layer: merge the layers first", place());
        }
        if inode.kind() == FileKind::Regular {
            if let Some(first) = names.get(&inode.nid()) {
                target.link(&item, first).with_context(place)?;
                continue;
            }
            if inode.nlink() > 1 {
                names.insert(inode.nid(), path.clone());
            }
            bytes += inode.size();
        }
        target.add(&item, &mut data).with_context(place)?;
    }
    target.finish()?;
    Ok((paths, bytes))
}
