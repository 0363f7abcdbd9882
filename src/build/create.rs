//! `rafs create`: builds an image from a directory or a tar stream.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{ArgGroup, ValueEnum};
use indicatif::HumanBytes;
use serde::Serialize;

use super::blob_file::BlobTarget;
use super::compose::{self, Form, Request, SourceKind};
use super::output::{parent_dir, refuse_special, write_json};
use super::pipeline::Settings;
use super::prefetch::{Patterns, PrefetchPolicy};
use super::whiteout::WhiteoutSpec;
use super::write::save;
use crate::rafs::codec::{Compressor, Digester};
use crate::rafs::layout::CHUNK_SIZE_RANGE;

/// Name of the bootstrap in the blob directory, unless it is given.
const BOOTSTRAP_NAME: &str = "image.boot";

/// Build a RAFS v6 image from a directory or a tar stream.
///
/// Writes a bootstrap (all metadata) and a data blob (the content of all files, deduplicated and
/// compressed), or one packed blob that holds both. The same source gives the same image, whatever
/// the number of threads. Times, owners and attributes are those of the source. A file of a directory
/// that changes meanwhile ends the build; a tar stream is read once and never held as a whole.
#[derive(Debug, clap::Args)]
#[command(group(
    ArgGroup::new("output").required(true).multiple(true).args(["bootstrap", "blob_dir", "blob"])
))]
pub struct Args {
    /// Directory to build from, or tar file with --type tar-rafs; `-` is standard input.
    #[arg(value_name = "SOURCE")]
    source: PathBuf,

    /// Kind of the source.
    #[arg(short = 't', long = "type", alias = "source-type", value_name = "TYPE")]
    #[arg(default_value = "dir-rafs")]
    source_type: SourceType,

    /// File for the bootstrap.
    ///
    /// Default: `image.boot` in the directory given by --blob-dir, or beside the file given by
    /// --blob; with --blob-inline-meta none but in the blob. A regular file of that name is replaced.
    #[arg(short = 'B', long, value_name = "FILE")]
    bootstrap: Option<PathBuf>,

    /// Directory for the blob, which is named by the SHA-256 of its content.
    ///
    /// Created if missing. Default: the directory of the bootstrap.
    #[arg(short = 'D', long, value_name = "DIR", conflicts_with = "blob")]
    blob_dir: Option<PathBuf>,

    /// File for the blob, instead of a name made of its digest.
    ///
    /// Readers look a blob up by its id, which is printed: serve or upload the file under it.
    #[arg(short = 'b', long, value_name = "FILE")]
    blob: Option<PathBuf>,

    /// How chunks are compressed.
    #[arg(long, value_name = "NAME", default_value = "zstd")]
    compressor: CompressorName,

    /// How chunks are digested.
    #[arg(long, value_name = "NAME", default_value = "blake3")]
    digester: DigesterName,

    /// Bytes of a chunk, in decimal or as 0x…: a power of two from 4096 to 16777216.
    ///
    /// A chunk is the unit of deduplication, compression and download. Smaller ones find more
    /// duplicates and cost less to fetch, larger ones compress better and make less metadata.
    #[arg(long, value_name = "BYTES", default_value = "0x100000", value_parser = parse_chunk_size)]
    chunk_size: u32,

    /// What a daemon fetches before it is asked for.
    ///
    /// Patterns are absolute paths of files and directories, one on each line of standard input. A tar
    /// stream is stored in its own order, so that only the list in the bootstrap follows them.
    #[arg(long, value_name = "POLICY", default_value = "none")]
    prefetch_policy: PrefetchPolicy,

    /// What marks removed files.
    ///
    /// Marks take effect on the parent, if there is one, and are dropped. A layer that is to be merged
    /// later keeps them: use `none` and --blob-inline-meta.
    #[arg(long, value_name = "SPEC", default_value = "oci")]
    whiteout_spec: WhiteoutSpec,

    /// Threads that read and compress. Default: one for each core this process may use.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// File for a machine-readable summary, in JSON; sizes are bytes.
    #[arg(short = 'J', long, value_name = "FILE")]
    output_json: Option<PathBuf>,

    /// Put the bootstrap into the blob.
    ///
    /// The blob is then named by the SHA-256 of all, which its bootstrap cannot know: it has a blob of
    /// unknown id until layers are merged.
    #[arg(short = 'i', long)]
    blob_inline_meta: bool,

    /// What else the blob holds: blob-toc, a table of contents and the digests of the chunks.
    ///
    /// Registries want it, with --blob-inline-meta.
    #[arg(short = 'F', long, value_name = "NAMES", value_delimiter = ',')]
    #[arg(requires = "blob_inline_meta")]
    features: Vec<Feature>,

    /// Bootstrap of an image that lies below.
    ///
    /// The source is a layer on top of it, with marks of removed files. Chunks that it has are not
    /// stored again. Chunk size and digester must be equal.
    #[arg(short = 'p', long, value_name = "FILE")]
    parent_bootstrap: Option<PathBuf>,

    /// Bootstrap of an image whose chunks are used instead of storing them again: bootstrap=FILE.
    ///
    /// The image then needs the blobs that it uses of this one. Chunk size and digester must be equal.
    #[arg(short = 'M', long, value_name = "bootstrap=FILE", value_parser = parse_chunk_dict)]
    chunk_dict: Option<PathBuf>,

    /// Version of the format: only 6.
    #[arg(short = 'v', long, value_name = "N", hide = true)]
    #[arg(default_value = "6", value_parser = parse_fs_version)]
    fs_version: u32,
}

/// Compressors that this builder offers, by nydus-image's names.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum CompressorName {
    #[value(name = "zstd")]
    Zstd,
    #[value(name = "lz4_block")]
    Lz4Block,
    #[value(name = "none")]
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum DigesterName {
    #[value(name = "blake3")]
    Blake3,
    #[value(name = "sha256")]
    Sha256,
}

impl From<CompressorName> for Compressor {
    fn from(name: CompressorName) -> Compressor {
        match name {
            CompressorName::Zstd => Compressor::Zstd,
            CompressorName::Lz4Block => Compressor::Lz4Block,
            CompressorName::None => Compressor::None,
        }
    }
}

impl From<DigesterName> for Digester {
    fn from(name: DigesterName) -> Digester {
        match name {
            DigesterName::Blake3 => Digester::Blake3,
            DigesterName::Sha256 => Digester::Sha256,
        }
    }
}

pub(super) fn parse_chunk_size(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    match number {
        Ok(n) if n.is_power_of_two() && CHUNK_SIZE_RANGE.contains(&n) => Ok(n),
        Ok(n) => Err(format!("{n} is no power of two from 4096 to 16777216")),
        Err(e) => Err(e.to_string()),
    }
}

/// Kinds of sources, by nydus-image's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SourceType {
    /// A directory.
    #[value(name = "dir-rafs", alias = "directory")]
    Dir,
    /// A tar stream: plain, or compressed with gzip or zstd, whichever it is.
    #[value(name = "tar-rafs")]
    Tar,
    /// The same: how the stream is compressed is found out.
    #[value(name = "targz-rafs")]
    TarGz,
}

/// What a packed blob may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Feature {
    #[value(name = "blob-toc")]
    BlobToc,
}

/// The file of `bootstrap=FILE`; `FILE` alone means the same.
pub(super) fn parse_chunk_dict(text: &str) -> Result<PathBuf, String> {
    let path = match text.split_once('=') {
        Some(("bootstrap", path)) => path,
        Some((kind, _)) if !kind.contains('/') => {
            return Err(format!("a chunk dictionary is given as bootstrap=FILE, not as {kind}="));
        }
        _ => text,
    };
    if path.is_empty() { Err("no file is named".to_owned()) } else { Ok(path.into()) }
}

pub(super) fn parse_fs_version(text: &str) -> Result<u32, String> {
    match text {
        "6" => Ok(6),
        "5" => Err("RAFS v5 images can be read but not built; leave the option out".to_owned()),
        _ => Err("the only version that can be built is 6".to_owned()),
    }
}

/// What was built.
#[derive(Debug, Serialize)]
struct Summary {
    version: &'static str,
    fs_version: String,
    bootstrap: Option<PathBuf>,
    /// Of the new blob: SHA-256 of its file.
    blob_id: Option<String>,
    /// Ids of all blobs of the image, as far as its bootstrap knows them.
    blobs: Vec<String>,
    /// File of the new blob; none if no file has data that is not elsewhere.
    blob: Option<PathBuf>,
    paths: usize,
    files: usize,
    /// Bytes of all regular files, hard links counted once.
    file_bytes: u64,
    chunks: usize,
    /// Chunks that were stored.
    distinct_chunks: usize,
    distinct_bytes: u64,
    /// Bytes of chunks that were there already.
    saved_bytes: u64,
    blob_bytes: u64,
    bootstrap_bytes: usize,
    seconds: f64,
}

/// Builds the image and prints what was built.
///
/// # Errors
///
/// If it cannot be built, or what was built cannot be printed.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let (bootstrap, blob) = outputs(&args)?;
    if let Some(dir) = &args.blob_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    // Better now than when everything has been read.
    if let Some(bootstrap) = &bootstrap {
        refuse_special(bootstrap)?;
    }
    if let BlobTarget::File(blob) = &blob {
        refuse_special(blob)?;
    }
    let patterns = match args.prefetch_policy {
        PrefetchPolicy::None => Patterns::default(),
        PrefetchPolicy::Fs | PrefetchPolicy::Blob => Patterns::read(io::stdin().lock())
            .context("cannot read prefetch patterns from standard input")?,
    };
    let settings = Settings {
        compressor: args.compressor.into(),
        digester: args.digester.into(),
        chunk_size: args.chunk_size,
        threads: threads(args.threads),
    };
    let form = match args.blob_inline_meta {
        true => Form::Packed { toc: args.features.contains(&Feature::BlobToc) },
        false => Form::Native,
    };
    let request = Request {
        kind: match args.source_type {
            SourceType::Dir => SourceKind::Directory,
            SourceType::Tar | SourceType::TarGz => SourceKind::Tar,
        },
        source: args.source,
        settings,
        whiteouts: args.whiteout_spec,
        form,
        blob,
        parent: args.parent_bootstrap,
        dictionary: args.chunk_dict,
        policy: args.prefetch_policy,
        patterns,
    };
    let composed = compose::compose(&request)?;
    if let Some(bootstrap) = &bootstrap {
        save(&composed.bootstrap, bootstrap)?;
    }
    let counts = composed.counts;
    let (id, blob, blob_bytes) = match composed.blob {
        Some((id, path, bytes)) => (Some(id.to_string()), Some(path), bytes),
        None => (None, None, 0),
    };
    let summary = Summary {
        version: env!("CARGO_PKG_VERSION"),
        fs_version: args.fs_version.to_string(),
        bootstrap,
        blob_id: id,
        blobs: composed.blobs.iter().map(ToString::to_string).collect(),
        blob,
        paths: counts.paths,
        files: counts.files,
        file_bytes: counts.file_bytes,
        chunks: counts.chunks,
        distinct_chunks: counts.stored_chunks,
        distinct_bytes: counts.stored_bytes,
        saved_bytes: counts.saved_bytes,
        blob_bytes,
        bootstrap_bytes: composed.bootstrap.len(),
        seconds: started.elapsed().as_secs_f64(),
    };
    if let Some(path) = &args.output_json {
        write_json(path, &summary)?;
    }
    summary.print(&mut io::stdout().lock()).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// The number of threads that is asked for, or one for each core.
pub(super) fn threads(asked: Option<u16>) -> usize {
    match asked {
        Some(n) => n.into(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// Where bootstrap and blob go. Clap has made sure that something is given.
fn outputs(args: &Args) -> Result<(Option<PathBuf>, BlobTarget), clap::Error> {
    let refuse = |text: String| clap::Error::raw(ErrorKind::ArgumentConflict, text + "\n");
    let stream = args.source_type != SourceType::Dir;
    if stream && args.prefetch_policy == PrefetchPolicy::Blob {
        let text = "--prefetch-policy blob: a tar stream is stored in its own order";
        return Err(refuse(text.to_owned()));
    }
    if stream && args.source == Path::new("-") && args.prefetch_policy != PrefetchPolicy::None {
        let text = "standard input cannot be both the tar and the prefetch patterns";
        return Err(refuse(text.to_owned()));
    }
    let target = match (&args.blob_dir, &args.blob, &args.bootstrap) {
        (Some(dir), _, _) => BlobTarget::Dir(dir.clone()),
        (None, Some(blob), _) => BlobTarget::File(blob.clone()),
        (None, None, bootstrap) => {
            BlobTarget::Dir(parent_dir(bootstrap.as_deref().unwrap_or(Path::new(""))).to_owned())
        }
    };
    if args.blob_inline_meta && args.bootstrap.is_none() {
        return Ok((None, target));
    }
    let bootstrap = args.bootstrap.clone().unwrap_or_else(|| target.dir().join(BOOTSTRAP_NAME));
    match &target {
        BlobTarget::File(blob) if *blob == bootstrap => {
            Err(refuse(format!("bootstrap and blob would be one file, {}", blob.display())))
        }
        _ => Ok((Some(bootstrap), target)),
    }
}

impl Summary {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let size = |bytes: u64| format!("{} ({bytes} bytes)", HumanBytes(bytes));
        let all = self.distinct_bytes + self.saved_bytes;
        // Percentages need no more digits than a double has.
        let saved = if all == 0 { 0.0 } else { 100.0 * self.saved_bytes as f64 / all as f64 };
        let bootstrap = match &self.bootstrap {
            Some(path) => path.display().to_string(),
            None => "in the blob".to_owned(),
        };
        writeln!(out, "bootstrap  {bootstrap}, {}", size(self.bootstrap_bytes as u64))?;
        match (&self.blob, &self.blob_id) {
            (Some(path), Some(id)) => {
                writeln!(out, "blob       {}, {}", path.display(), size(self.blob_bytes))?;
                writeln!(out, "blob id    {id}")?;
            }
            _ => writeln!(out, "blob       none: no file has data that is not elsewhere")?,
        }
        for id in self.blobs.iter().filter(|&id| Some(id) != self.blob_id.as_ref()) {
            writeln!(out, "uses blob  {id}")?;
        }
        writeln!(out, "paths      {}, of them {} files", self.paths, self.files)?;
        writeln!(out, "data       {}", size(self.file_bytes))?;
        let (chunks, distinct) = (self.chunks, self.distinct_chunks);
        writeln!(out, "chunks     {chunks}, {distinct} stored: {saved:.1} % saved by dedup")?;
        writeln!(out, "time       {:.2} s", self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Ok(Cli::try_parse_from(["create"].into_iter().chain(line.split_whitespace()))?.args)
    }

    #[test]
    fn options_of_nydus_image_mean_the_same() {
        // (arguments, chunk size)
        let good = [
            ("-B b -D d src", 0x10_0000),
            ("--type directory --fs-version 6 --blob-dir d --chunk-size 0x1000 src", 4096),
            ("--source-type dir-rafs -v 6 -D d --chunk-size 16777216 -J out src", 1 << 24),
            ("-t tar-rafs -i -F blob-toc --whiteout-spec none -b blob src.tar", 0x10_0000),
            ("-t targz-rafs -D d -p parent -M bootstrap=dict src.tar.gz", 0x10_0000),
        ];
        for (line, chunk_size) in good {
            assert_eq!(parse(line).expect(line).chunk_size, chunk_size, "{line}");
        }
        // (arguments, what the message says)
        let bad = [
            ("--fs-version 5 -D d src", "RAFS v5"),
            ("--type tar-ref -D d src", "tar-rafs"),
            ("--features blob-toc -D d src", "--blob-inline-meta"),
            ("--chunk-dict redis=x -D d src", "bootstrap=FILE"),
            ("--chunk-size 4097 -D d src", "power of two"),
            ("--chunk-size 2048 -D d src", "power of two"),
            ("--chunk-size 0x2000000 -D d src", "power of two"),
            ("--compressor gzip -D d src", "lz4_block"),
            ("-D d --blob b src", "cannot be used with"),
            ("-D d", "<SOURCE>"),
            ("src", "--bootstrap <FILE>|--blob-dir <DIR>|--blob <FILE>"),
        ];
        for (line, message) in bad {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
    }

    #[test]
    fn outputs_have_sensible_places() {
        let dir = |name: &str| BlobTarget::Dir(name.into());
        let file = |name: &str| BlobTarget::File(name.into());
        let cases = [
            ("-B x/boot src", "x/boot", dir("x")),
            ("-B boot src", "boot", dir(".")),
            ("-B x/boot -D y src", "x/boot", dir("y")),
            ("-D y src", "y/image.boot", dir("y")),
            ("-B x/boot --blob y/blob src", "x/boot", file("y/blob")),
            ("--blob y/blob src", "y/image.boot", file("y/blob")),
        ];
        for (line, bootstrap, blob) in cases {
            let want = (Some(bootstrap.into()), blob);
            assert_eq!(outputs(&parse(line).unwrap()).unwrap(), want, "{line}");
        }
        assert_eq!(outputs(&parse("-i -D y src").unwrap()).unwrap(), (None, dir("y")));
        for line in [
            "--blob y/image.boot src",
            "-B x --blob x src",
            "-t tar-rafs -D d --prefetch-policy blob src",
            "-t tar-rafs -D d --prefetch-policy fs -",
        ] {
            outputs(&parse(line).unwrap()).expect_err(line);
        }
    }
}
