//! `rafs check`: is this image what it says, every byte of it, and is it the image it was made of?
//!
//! With `--bootstrap` alone, `single` checks one image from its files. With a source, `pair` compares
//! two images by three rules: `manifest`, bootstrap (`metadata`, `tables`, `boot_layer`,
//! `blob_stream`) and `filesystem`. What the source's file system is, `overlay` and `tar_stream`
//! compute from its layers, with none of the converter's code.

mod blob;
mod blob_stream;
mod filesystem;
mod findings;
mod metadata;
mod overlay;
mod progress;
mod report;
mod single;
mod tables;
mod tar_stream;
#[cfg(test)]
mod test_tar;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::rafs::BlobInfo;

/// Verify an image.
///
/// Walks all metadata: super blocks, tables, every inode, the order of every directory, link
/// counts, chunk addresses against the chunk table. With --blob-dir also every blob: its SHA-256,
/// its chunk-info array, and every chunk, decompressed and compared with its digest and CRC, on all
/// processors. Prints what is wrong and where, one line each. The exit code is 0 if nothing is, 1 if
/// something is, 2 if that cannot be told, because a file is missing or of an unsupported kind.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bootstrap, or packed blob that holds one.
    ///
    /// Of a packed blob the chunks inside are verified too, even without --blob-dir.
    #[arg(long, value_name = "FILE")]
    bootstrap: PathBuf,

    /// Directory with the blobs, each in a file named by its id.
    ///
    /// Default: blobs are not read, and nothing is said about them. For the bootstrap of a layer
    /// that does not know its blob's id, the only file of the directory is taken.
    #[arg(long, value_name = "DIR")]
    blob_dir: Option<PathBuf>,

    /// Print at most this many problems.
    ///
    /// The others are counted.
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_problems: usize,
}

/// Checks and prints; the exit code says what came out.
///
/// # Errors
///
/// If the result cannot be printed.
pub fn run(args: Args) -> Result<ExitCode> {
    single::run(&single::Args {
        bootstrap: args.bootstrap,
        blob_dir: args.blob_dir,
        max_problems: args.max_problems,
    })
}

fn place(blob: &BlobInfo) -> String {
    format!("blob {}", blob.id)
}
