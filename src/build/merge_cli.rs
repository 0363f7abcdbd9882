//! `rafs merge`: an image of the bootstraps of layers.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use indicatif::HumanBytes;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::create::parse_chunk_dict;
use super::dedup::Dictionary;
use super::image_file;
use super::load::Image;
use super::merge::{Layer, Options, merge};
use super::output::{refuse_special, write_json};
use super::prefetch::{Patterns, PrefetchPolicy};
use super::whiteout::WhiteoutSpec;
use super::write::save;
use crate::rafs::id::BlobId;

/// Merge layers into an image.
///
/// Takes the bootstraps of layers, lowest first, applies what each says is gone, and writes one
/// bootstrap for all, which points into the blobs of the layers. No data is read. Each source is a
/// bootstrap or a packed blob that holds one; the id of a layer's blob is the name of the bootstrap's
/// file, of a packed blob its SHA-256.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bootstraps or packed blobs of the layers, lowest first.
    #[arg(value_name = "LAYER", required = true)]
    sources: Vec<PathBuf>,

    /// File for the merged bootstrap. A regular file of that name is replaced.
    #[arg(short = 'B', long, value_name = "FILE")]
    bootstrap: PathBuf,

    /// Ids of the layers' blobs, separated by commas, instead of the names of their files.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    blob_digests: Vec<String>,

    /// Bootstrap of an image that lies below all layers.
    #[arg(short = 'p', long, value_name = "FILE")]
    parent_bootstrap: Option<PathBuf>,

    /// Bootstrap of the dictionary that the layers were made with: bootstrap=FILE.
    ///
    /// A layer that brings more than one blob that is not of the dictionary is refused.
    #[arg(short = 'M', long, value_name = "bootstrap=FILE", value_parser = parse_chunk_dict)]
    chunk_dict: Option<PathBuf>,

    /// What a daemon fetches before it is asked for.
    ///
    /// With `fs`, patterns are read from standard input: absolute paths of files and directories, one
    /// on each line. No data is moved, so `blob` has no effect and is refused.
    #[arg(long, value_name = "POLICY", default_value = "none")]
    prefetch_policy: PrefetchPolicy,

    /// What marks removed files in the layers.
    #[arg(long, value_name = "SPEC", default_value = "oci")]
    whiteout_spec: WhiteoutSpec,

    /// File for a machine-readable summary, in JSON; sizes are bytes.
    #[arg(short = 'J', long, value_name = "FILE")]
    output_json: Option<PathBuf>,
}

/// What was merged.
#[derive(Debug, Serialize)]
struct Summary {
    version: &'static str,
    fs_version: &'static str,
    bootstrap: PathBuf,
    layers: usize,
    /// Ids of the blobs in use.
    blobs: Vec<String>,
    paths: usize,
    files: usize,
    file_bytes: u64,
    bootstrap_bytes: usize,
}

/// Merges and prints what was merged.
///
/// # Errors
///
/// If the layers cannot be merged, or the result cannot be written.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    refuse_special(&args.bootstrap)?;
    let patterns = match args.prefetch_policy {
        PrefetchPolicy::None => Patterns::default(),
        PrefetchPolicy::Fs => Patterns::read(io::stdin().lock())
            .context("cannot read prefetch patterns from standard input")?,
        PrefetchPolicy::Blob => bail!("--prefetch-policy blob: merging moves no data"),
    };
    if !args.blob_digests.is_empty() && args.blob_digests.len() != args.sources.len() {
        let (ids, layers) = (args.blob_digests.len(), args.sources.len());
        bail!("--blob-digests names {ids} blobs, there are {layers} layers");
    }
    let dictionary = match &args.chunk_dict {
        Some(path) => {
            let image = image_file::open(path)?;
            let name = path.display().to_string();
            Some(Dictionary::new(&Image::read(&image.bootstrap, &name)?))
        }
        None => None,
    };
    let mut layers = Vec::with_capacity(args.sources.len() + 1);
    if let Some(path) = &args.parent_bootstrap {
        let image = image_file::open(path)?;
        layers.push(Layer::new(&image.bootstrap, None, &path.display().to_string())?);
    }
    for (i, path) in args.sources.iter().enumerate() {
        layers.push(open(path, args.blob_digests.get(i).map(String::as_str))?);
    }
    let options = Options {
        whiteouts: args.whiteout_spec,
        prefetch: &patterns,
        dictionary: dictionary.as_ref(),
    };
    let merged = merge(&layers, &options)?;
    save(&merged.bootstrap, &args.bootstrap)?;
    let summary = Summary {
        version: env!("CARGO_PKG_VERSION"),
        fs_version: "6",
        bootstrap: args.bootstrap,
        layers: layers.len(),
        blobs: merged.blobs.iter().map(ToString::to_string).collect(),
        paths: merged.paths,
        files: merged.files,
        file_bytes: merged.file_bytes,
        bootstrap_bytes: merged.bootstrap.len(),
    };
    if let Some(path) = &args.output_json {
        write_json(path, &summary)?;
    }
    summary.print(&mut io::stdout().lock()).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Opens a layer. `id` is that of its blob, unless the file tells.
fn open(path: &Path, id: Option<&str>) -> anyhow::Result<Layer> {
    let image = image_file::open(path)?;
    let name = path.display().to_string();
    let id = match id {
        Some(id) => {
            let id = id.strip_prefix("sha256:").unwrap_or(id);
            let id = BlobId::parse(id.as_bytes()).filter(|id| *id != BlobId::UNKNOWN);
            Some(id.with_context(|| format!("--blob-digests: no id of a blob for {name}"))?)
        }
        // A packed blob that is not named by its digest.
        None if image.packed.is_some()
            && image.bootstrap.blobs().iter().any(|blob| blob.id == BlobId::UNKNOWN) =>
        {
            Some(BlobId::from_sha256(sha256_of(path).with_context(|| name.clone())?))
        }
        None => None,
    };
    Ok(Layer::new(&image.bootstrap, id, &name)?)
}

fn sha256_of(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = std::fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buf = vec![0; 64 << 10];
    loop {
        match file.read(&mut buf)? {
            0 => return Ok(hash.finalize().into()),
            n => hash.update(&buf[..n]),
        }
    }
}

impl Summary {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let size = |bytes: u64| format!("{} ({bytes} bytes)", HumanBytes(bytes));
        let bootstrap = self.bootstrap.display();
        writeln!(out, "bootstrap  {bootstrap}, {}", size(self.bootstrap_bytes as u64))?;
        for id in &self.blobs {
            writeln!(out, "uses blob  {id}")?;
        }
        writeln!(out, "layers     {}", self.layers)?;
        writeln!(out, "paths      {}, of them {} files", self.paths, self.files)?;
        writeln!(out, "data       {}", size(self.file_bytes))
    }
}
