//! `rafs create`: builds an image from a directory.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{ArgGroup, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::blob_file::{Blob, BlobTarget, BlobWriter};
use super::output::{parent_dir, refuse_special};
use super::pipeline::{self, Settings};
use super::prefetch::{Patterns, PrefetchPolicy, data_order};
use super::tree::Tree;
use super::whiteout::WhiteoutSpec;
use super::write::{Image, save};
use crate::rafs::codec::{Compressor, Digester};
use crate::rafs::layout::CHUNK_SIZE_RANGE;

/// Name of the bootstrap in the blob directory, unless it is given.
const BOOTSTRAP_NAME: &str = "image.boot";

/// Build a RAFS v6 image from a directory.
///
/// Writes a bootstrap (all metadata) and a data blob (the content of all files, deduplicated and
/// compressed). The same directory gives the same image, whatever the number of threads. Times,
/// owners and attributes are those of the directory, its own included. A file that changes
/// meanwhile ends the build.
#[derive(Debug, clap::Args)]
#[command(group(
    ArgGroup::new("output").required(true).multiple(true).args(["bootstrap", "blob_dir", "blob"])
))]
pub struct Args {
    /// Directory to build from.
    #[arg(value_name = "DIR")]
    source: PathBuf,

    /// File for the bootstrap.
    ///
    /// Default: `image.boot` in the directory given by --blob-dir, or beside the file given by
    /// --blob. A regular file of that name is replaced.
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
    /// Patterns are absolute paths of files and directories, one on each line of standard input.
    #[arg(long, value_name = "POLICY", default_value = "none")]
    prefetch_policy: PrefetchPolicy,

    /// What marks removed files and is dropped, as there is no lower layer to change.
    #[arg(long, value_name = "SPEC", default_value = "oci")]
    whiteout_spec: WhiteoutSpec,

    /// Threads that read and compress. Default: one for each core this process may use.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// File for a machine-readable summary, in JSON; sizes are bytes.
    #[arg(short = 'J', long, value_name = "FILE")]
    output_json: Option<PathBuf>,

    /// Kind of the source: only directories.
    #[arg(short = 't', long = "type", alias = "source-type", value_name = "TYPE", hide = true)]
    #[arg(default_value = "dir-rafs", value_parser = parse_type)]
    _source_type: Directory,

    /// Version of the format: only 6.
    #[arg(short = 'v', long, value_name = "N", hide = true)]
    #[arg(default_value = "6", value_parser = parse_fs_version)]
    fs_version: u32,
}

/// Compressors that this builder offers, by nydus-image's names.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompressorName {
    #[value(name = "zstd")]
    Zstd,
    #[value(name = "lz4_block")]
    Lz4Block,
    #[value(name = "none")]
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DigesterName {
    #[value(name = "blake3")]
    Blake3,
    #[value(name = "sha256")]
    Sha256,
}

fn parse_chunk_size(text: &str) -> Result<u32, String> {
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

/// The only kind of source.
#[derive(Clone, Debug)]
struct Directory;

fn parse_type(text: &str) -> Result<Directory, String> {
    match text {
        "directory" | "dir-rafs" => Ok(Directory),
        _ => Err("only directories can be built from: dir-rafs".to_owned()),
    }
}

fn parse_fs_version(text: &str) -> Result<u32, String> {
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
    bootstrap: PathBuf,
    /// Ids of the blobs: one, or none if no file has data.
    blobs: Vec<String>,
    blob: Option<PathBuf>,
    paths: usize,
    files: usize,
    /// Bytes of all regular files, hard links counted once.
    file_bytes: u64,
    chunks: usize,
    distinct_chunks: usize,
    distinct_bytes: u64,
    blob_bytes: u64,
    bootstrap_bytes: usize,
    seconds: f64,
}

/// Builds the image and prints what was built.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let (bootstrap, blob_target) = outputs(&args)?;
    if let Some(dir) = &args.blob_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    // Better now than when everything has been read.
    refuse_special(&bootstrap)?;
    if let BlobTarget::File(blob) = &blob_target {
        refuse_special(blob)?;
    }
    let patterns = match args.prefetch_policy {
        PrefetchPolicy::None => Patterns::default(),
        PrefetchPolicy::Fs | PrefetchPolicy::Blob => Patterns::read(io::stdin().lock())
            .context("cannot read prefetch patterns from standard input")?,
    };
    let settings = Settings {
        compressor: match args.compressor {
            CompressorName::Zstd => Compressor::Zstd,
            CompressorName::Lz4Block => Compressor::Lz4Block,
            CompressorName::None => Compressor::None,
        },
        digester: match args.digester {
            DigesterName::Blake3 => Digester::Blake3,
            DigesterName::Sha256 => Digester::Sha256,
        },
        chunk_size: args.chunk_size,
        threads: match args.threads {
            Some(n) => n.into(),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        },
    };

    let progress = ProgressBar::new_spinner()
        .with_style(style("{spinner} scanning: {human_pos} paths"))
        .with_message("scanning");
    progress.enable_steady_tick(Duration::from_millis(200));
    let tree = Tree::scan(&args.source, args.whiteout_spec, &progress)?;
    progress.finish_and_clear();

    let first = patterns.find(&tree);
    let order = data_order(&tree, &first);
    let file_bytes = tree.files().iter().map(|file| file.identity.size).sum();
    let blob = BlobWriter::create(blob_target)?;
    let progress = ProgressBar::new(file_bytes)
        .with_style(style("{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left"));
    let (chunks, files, blob) = pipeline::store(&tree, order, settings, blob, &progress)?;
    progress.finish_and_clear();
    let mut chunks = chunks.into_records();
    let blob = blob.finish(&mut chunks, settings.compressor)?;
    let distinct_chunks = chunks.len();
    let distinct_bytes = chunks.iter().map(|c| u64::from(c.uncompressed_size.get())).sum();
    let in_table = if args.prefetch_policy == PrefetchPolicy::Fs { first.as_slice() } else { &[] };
    let image = Image {
        tree: &tree,
        settings,
        files: &files,
        chunks,
        blob: blob.as_ref(),
        prefetch: in_table,
    };
    let bytes = image.into_bytes()?;
    save(&bytes, &bootstrap)?;

    let summary = Summary {
        version: env!("CARGO_PKG_VERSION"),
        fs_version: args.fs_version.to_string(),
        bootstrap,
        blobs: blob.iter().map(|b| b.id.to_string()).collect(),
        blob: blob.as_ref().map(|b: &Blob| b.path.clone()),
        paths: tree.len(),
        files: tree.files().len(),
        file_bytes,
        chunks: files.total(),
        distinct_chunks,
        distinct_bytes,
        blob_bytes: blob.as_ref().map_or(0, |b| b.size),
        bootstrap_bytes: bytes.len(),
        seconds: started.elapsed().as_secs_f64(),
    };
    if let Some(path) = &args.output_json {
        let mut text = serde_json::to_string_pretty(&summary).context("cannot write JSON")?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    summary.print(&mut io::stdout().lock()).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Where bootstrap and blob go. Clap has made sure that something is given.
fn outputs(args: &Args) -> Result<(PathBuf, BlobTarget), clap::Error> {
    let target = match (&args.blob_dir, &args.blob, &args.bootstrap) {
        (Some(dir), _, _) => BlobTarget::Dir(dir.clone()),
        (None, Some(blob), _) => BlobTarget::File(blob.clone()),
        (None, None, bootstrap) => {
            BlobTarget::Dir(parent_dir(bootstrap.as_deref().unwrap_or(Path::new(""))).to_owned())
        }
    };
    let bootstrap = args.bootstrap.clone().unwrap_or_else(|| target.dir().join(BOOTSTRAP_NAME));
    match &target {
        BlobTarget::File(blob) if *blob == bootstrap => Err(clap::Error::raw(
            ErrorKind::ArgumentConflict,
            format!("bootstrap and blob would be one file, {}\n", blob.display()),
        )),
        _ => Ok((bootstrap, target)),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a literal")
}

impl Summary {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let size = |bytes: u64| format!("{} ({bytes} bytes)", HumanBytes(bytes));
        let saved = match self.file_bytes {
            0 => 0.0,
            // Percentages need no more digits than a double has.
            all => 100.0 * (1.0 - self.distinct_bytes as f64 / all as f64),
        };
        let bootstrap = self.bootstrap.display();
        writeln!(out, "bootstrap  {bootstrap}, {}", size(self.bootstrap_bytes as u64))?;
        match (&self.blob, self.blobs.first()) {
            (Some(path), Some(id)) => {
                writeln!(out, "blob       {}, {}", path.display(), size(self.blob_bytes))?;
                writeln!(out, "blob id    {id}")?;
            }
            _ => writeln!(out, "blob       none: no file has data")?,
        }
        writeln!(out, "paths      {}, of them {} files", self.paths, self.files)?;
        writeln!(out, "data       {}", size(self.file_bytes))?;
        let (chunks, distinct) = (self.chunks, self.distinct_chunks);
        writeln!(out, "chunks     {chunks}, {distinct} distinct: {saved:.1} % saved by dedup")?;
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
        ];
        for (line, chunk_size) in good {
            assert_eq!(parse(line).expect(line).chunk_size, chunk_size, "{line}");
        }
        // (arguments, what the message says)
        let bad = [
            ("--fs-version 5 -D d src", "RAFS v5"),
            ("--type tar-rafs -D d src", "only directories"),
            ("--chunk-size 4097 -D d src", "power of two"),
            ("--chunk-size 2048 -D d src", "power of two"),
            ("--chunk-size 0x2000000 -D d src", "power of two"),
            ("--compressor gzip -D d src", "lz4_block"),
            ("-D d --blob b src", "cannot be used with"),
            ("-D d", "<DIR>"),
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
            assert_eq!(outputs(&parse(line).unwrap()).unwrap(), (bootstrap.into(), blob), "{line}");
        }
        for line in ["--blob y/image.boot src", "-B x --blob x src"] {
            outputs(&parse(line).unwrap()).expect_err(line);
        }
    }
}
