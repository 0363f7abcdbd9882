//! `rafs check`: is this image what it says, every byte of it, and is it the image it was made of?
//!
//! With `--bootstrap` alone, `single` checks one image from its files. With a source, `pair` compares
//! two images by three rules: `manifest` (and `index`), bootstrap (`metadata`, `tables`, `boot_layer`,
//! `blob_stream`) and `filesystem`. What the source's file system is, `overlay` and `tar_stream`
//! compute from its layers, with none of the converter's code. `report` lists what differs.

mod blob;
mod blob_stream;
mod boot_layer;
mod filesystem;
mod findings;
mod images;
mod index;
mod layers;
mod manifest;
mod metadata;
mod overlay;
mod pair;
mod progress;
mod proof;
mod report;
mod single;
mod source_dir;
mod tables;
mod tar_stream;
#[cfg(test)]
mod test_tar;
#[cfg(test)]
mod testing;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

pub use self::filesystem::MtimePrecision;
use crate::oci::http::HttpOptions;
use crate::oci::manifest::PlatformName;
use crate::oci::reference::Reference;
use crate::oci::registry::Access;
use crate::rafs::BlobInfo;

/// Verify an image, by itself or against its source.
///
/// With --source and --target: whether the RAFS image is the image that it was converted from, by
/// three rules. Manifest: media types, annotations, digests and sizes, the configuration. Bootstrap:
/// super blocks, tables, every inode, the order of every directory, every chunk of every blob,
/// decompressed and compared with its digest. File system: the layers of the source on top of each
/// other, computed from their tar streams, against the tree of the image: type, size, mode, owner,
/// device, link target, times, link counts, hard links, extended attributes, content. Every
/// difference is listed with its path, its field and both values. It needs neither root nor docker,
/// mounts nothing and unpacks nothing; both images are read once.
///
/// With --bootstrap alone: whether an image is sound by itself. Walks all metadata, and with
/// --blob-dir reads every blob.
///
/// The exit code is 0 if nothing is wrong or different, 1 if something is, 2 if that cannot be told,
/// because something could not be reached or read or is of an unsupported kind.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("from").args(["source", "source_dir"]))]
#[command(group = clap::ArgGroup::new("image").args(["target", "bootstrap"]).required(true))]
pub struct Args {
    /// Image that the target was converted from.
    ///
    /// [docker://]HOST/REPOSITORY[:TAG|@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG] or
    /// docker-archive:FILE[:TAG]. Credentials for a registry are those of docker.
    #[arg(long, value_name = "REF")]
    source: Option<Reference>,

    /// Directory that the target was made of by `rafs create`.
    ///
    /// In place of --source; there is no manifest to compare then. Its files must be readable.
    #[arg(long, value_name = "DIR")]
    source_dir: Option<PathBuf>,

    /// RAFS image to verify, in a registry or an OCI layout.
    ///
    /// Written as --source.
    #[arg(long, value_name = "REF", requires = "from")]
    target: Option<Reference>,

    /// Bootstrap to verify, or packed blob that holds one.
    ///
    /// In place of --target. Of a packed blob the chunks inside are verified too, even without
    /// --blob-dir.
    #[arg(long, value_name = "FILE")]
    bootstrap: Option<PathBuf>,

    /// Directory with the blobs of --bootstrap, each in a file named by its id.
    ///
    /// Default: blobs are not read, and nothing is said about them. For the bootstrap of a layer
    /// that does not know its blob's id, the only file of the directory is taken.
    #[arg(long, value_name = "DIR", requires = "bootstrap")]
    blob_dir: Option<PathBuf>,

    /// Of images for several platforms compare this one only: OS/ARCHITECTURE[/VARIANT].
    ///
    /// Default: every platform of the source must be in the target.
    #[arg(long, value_name = "PLATFORM", requires = "from")]
    platform: Option<PlatformName>,

    /// How exactly times of files must agree.
    ///
    /// nydus-image drops fractions of seconds: compare images that it made with `seconds`.
    #[arg(long, value_enum, value_name = "PRECISION", default_value = "exact", requires = "from")]
    mtime: MtimePrecision,

    /// Take the source's registry without checking its certificate, or without TLS if it has none.
    ///
    /// Registries on this machine may lack TLS without it. What is read is compared with its digest
    /// either way.
    #[arg(long, requires = "source")]
    source_insecure: bool,

    /// The same for the target's registry.
    #[arg(long, requires = "target")]
    target_insecure: bool,

    /// PEM file with certificates of authorities to trust, too.
    ///
    /// May be given several times.
    #[arg(long, value_name = "FILE", requires = "from")]
    ca_file: Vec<PathBuf>,

    /// Print JSON instead of a table.
    ///
    /// One object, described in docs/check.md.
    #[arg(long, requires = "from")]
    json: bool,

    /// List at most this many problems, or differences of each rule.
    ///
    /// The others are counted.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_problems: usize,
}

/// Checks and prints; the exit code says what came out.
///
/// # Errors
///
/// If the result cannot be printed.
pub fn run(args: Args) -> Result<ExitCode> {
    let source = match (args.source, args.source_dir) {
        (Some(reference), _) => Some(pair::Source::Image(reference)),
        (None, dir) => dir.map(pair::Source::Dir),
    };
    let (blob_dir, max_problems) = (args.blob_dir, args.max_problems);
    let target = match (args.target, args.bootstrap) {
        (Some(reference), _) => pair::Target::Image(reference),
        (None, Some(bootstrap)) if source.is_none() => {
            return single::run(&single::Args { bootstrap, blob_dir, max_problems });
        }
        (None, Some(bootstrap)) => pair::Target::Files { bootstrap, blob_dir },
        (None, None) => unreachable!("the command line names one of them"),
    };
    let Some(source) = source else { unreachable!("a target is named with a source only") };
    let access = |insecure| {
        let ca_files = args.ca_file.clone();
        let http = HttpOptions { ca_files, skip_verify: insecure, ..HttpOptions::default() };
        Access { http, credentials: None }
    };
    pair::run(&pair::Args {
        source,
        target,
        platform: args.platform,
        mtime: args.mtime,
        max_differences: max_problems,
        json: args.json,
        source_access: access(args.source_insecure),
        target_access: access(args.target_insecure),
    })
}

fn place(blob: &BlobInfo) -> String {
    format!("blob {}", blob.id)
}
