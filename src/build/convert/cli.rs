//! Arguments of `rafs convert`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use indicatif::{MultiProgress, ProgressDrawTarget};

use super::dictionary::{Dictionary, Place};
use super::{Context, convert};
use crate::build::create::{CompressorName, DigesterName, parse_chunk_size, parse_fs_version};
use crate::build::output::write_json;
use crate::build::pipeline::Settings;
use crate::build::prefetch::Patterns;
use crate::oci::http::HttpOptions;
use crate::oci::image::{Source, Target};
use crate::oci::manifest::PlatformName;
use crate::oci::reference::Reference;
use crate::oci::registry::Access;

/// Convert an OCI or Docker image to RAFS.
///
/// Reads the layers of an image while they arrive, and writes a RAFS image to a registry or an OCI
/// layout. Layers that the target has already, made of the same layers in the same way, are used
/// again. The same source and options give the same digest on every machine.
///
/// References are [docker://]HOST[:PORT]/REPO[:TAG][@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG] and
/// docker-archive:FILE[:TAG]; archives can only be read. Credentials are those of docker and podman
/// (~/.docker/config.json, $DOCKER_CONFIG, $REGISTRY_AUTH_FILE), with credential helpers. Registries on
/// this machine may lack TLS.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image to convert.
    #[arg(long, value_name = "REF")]
    source: Reference,

    /// Image to write.
    #[arg(long, value_name = "REF")]
    target: Reference,

    /// Of an index, only images for these platforms: linux/amd64, linux/arm64/v8, ...
    ///
    /// Default: all. May be given several times, or with commas. What is not an image is copied either
    /// way, but for attestations of images that are left out.
    #[arg(long, value_name = "PLATFORM", value_delimiter = ',')]
    platform: Vec<PlatformName>,

    /// How chunks are compressed.
    #[arg(long, value_name = "NAME", default_value = "zstd")]
    compressor: CompressorName,

    /// How chunks are digested.
    #[arg(long, value_name = "NAME", default_value = "blake3")]
    digester: DigesterName,

    /// Bytes of a chunk, in decimal or as 0x…: a power of two from 4096 to 16777216.
    #[arg(long, value_name = "BYTES", default_value = "0x100000", value_parser = parse_chunk_size)]
    chunk_size: u32,

    /// Image whose chunks are used instead of storing them again: bootstrap=FILE, or
    /// bootstrap:registry:REF for an image.
    ///
    /// Blobs of it that are used become layers of the target. For a FILE they must be in the target's
    /// repository, or in the file's directory or `blobs` there, named by their ids.
    #[arg(long, value_name = "DICT")]
    chunk_dict: Option<Place>,

    /// Read from standard input what a daemon fetches before it is asked for.
    ///
    /// Absolute paths of files and directories, one on each line. Default: the whole image, which a
    /// daemon does only if it is configured to prefetch.
    #[arg(long)]
    prefetch_patterns: bool,

    /// Version of the format: only 6.
    #[arg(long, value_name = "N", default_value = "6", value_parser = parse_fs_version)]
    fs_version: u32,

    /// Threads that compress, for each layer under way. Default: one for each core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Layers under way at once. Default: one for each core, at most 4.
    ///
    /// Each needs about 30 MiB, and 4 MiB for each thread; more if chunks are larger than 1 MiB.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel_layers: Option<u16>,

    /// Take the source's registry without checking its certificate, or without TLS if it has none.
    #[arg(long)]
    source_insecure: bool,

    /// The same for the target's registry.
    #[arg(long)]
    target_insecure: bool,

    /// PEM file with certificates of authorities to trust, too. May be given several times.
    #[arg(long, value_name = "FILE")]
    ca_file: Vec<PathBuf>,

    /// File for a machine-readable summary, in JSON; sizes are bytes.
    #[arg(short = 'J', long, value_name = "FILE")]
    output_json: Option<PathBuf>,
}

impl Args {
    fn access(&self, insecure: bool) -> Access {
        let http = HttpOptions {
            ca_files: self.ca_file.clone(),
            skip_verify: insecure,
            ..HttpOptions::default()
        };
        Access { http, credentials: None }
    }
}

/// Converts and prints what was done.
///
/// # Errors
///
/// If the source cannot be read, is no image or not what its digests say, or the target cannot be
/// written.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.source == args.target {
        bail!("source and target are both {}: the original would lose its name", args.source);
    }
    let patterns = match args.prefetch_patterns {
        true => Patterns::read(io::stdin().lock())
            .context("cannot read prefetch patterns from standard input")?,
        false => Patterns::read(&b"/\n"[..]).context("the pattern of everything")?,
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = Settings {
        compressor: args.compressor.into(),
        digester: args.digester.into(),
        chunk_size: args.chunk_size,
        threads: args.threads.map_or(cores, usize::from),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(4))
        .enable_all()
        .build()
        .context("cannot start threads")?;
    // Draws nothing where standard error is no terminal.
    let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let converted = runtime.block_on(async {
        let (from, to) = (args.access(args.source_insecure), args.access(args.target_insecure));
        let source = Source::open(&args.source, &from).await.context("source")?;
        let target = Target::open(&args.target, &to).await.context("target")?;
        let dictionary = match &args.chunk_dict {
            Some(place) => {
                let dictionary = Dictionary::open(place, &from, settings).await;
                Some(Arc::new(dictionary.context("chunk dictionary")?))
            }
            None => None,
        };
        let context = Context {
            source,
            target,
            settings,
            dictionary,
            patterns: Arc::new(patterns),
            parallel_layers: args.parallel_layers.map_or(cores.min(4), usize::from),
        };
        convert(&context, &args.platform, &bars).await
    });
    // Threads that wait for a network that has failed are not waited for.
    runtime.shutdown_background();
    let mut report = converted?;
    report.source = args.source.to_string();
    report.target = args.target.to_string();
    if let Some(path) = &args.output_json {
        write_json(path, &report)?;
    }
    report.print(&mut io::stdout().lock()).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}
