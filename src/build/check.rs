//! `rafs check`: is this image what it says, every byte of it?
//!
//! `metadata` walks the bootstrap, `blob` reads a blob file and all its chunks; both report to the
//! [`Findings`] here. Problems are what the image has; what could not be looked at is kept apart,
//! so that "nothing wrong" is never said of what was not seen.

mod blob;
mod metadata;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use self::blob::BlobFile;
use super::image_file::{self, ImageFile, printable};
use crate::rafs::id::{BlobId, BlobIndex, ChunkIndex};
use crate::rafs::layout::BlobFeatures;
use crate::rafs::{BlobInfo, Bootstrap};

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

/// What was found, bounded in memory.
#[derive(Debug, Default)]
struct Findings {
    limit: usize,
    problems: Vec<Problem>,
    problem_count: u64,
    /// Why something could not be looked at.
    undecided: Vec<String>,
    /// What was looked at.
    paths: u64,
    chunks: u64,
    blobs: u64,
}

#[derive(Debug)]
struct Problem {
    place: String,
    what: String,
    /// The chunk that it concerns, to name a file that has it.
    chunk: Option<(BlobIndex, ChunkIndex)>,
}

impl Findings {
    fn problem(&mut self, place: impl Display, what: impl Display) {
        self.add(Problem { place: place.to_string(), what: what.to_string(), chunk: None });
    }

    fn add(&mut self, problem: Problem) {
        self.problem_count += 1;
        if self.problems.len() < self.limit {
            self.problems.push(problem);
        }
    }

    fn undecided(&mut self, what: impl Display) {
        self.undecided.push(what.to_string());
    }
}

/// Checks and prints; the exit code says what came out.
///
/// # Errors
///
/// If the result cannot be printed.
pub fn run(args: Args) -> Result<ExitCode> {
    let findings = check(&args);
    let mut out = io::stdout().lock();
    match print(&findings, &args, &mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            return Err(e).context("standard output");
        }
        _ => {}
    }
    Ok(ExitCode::from(exit_code(&findings)))
}

fn exit_code(findings: &Findings) -> u8 {
    match (findings.problem_count, findings.undecided.len()) {
        (0, 0) => 0,
        (0, _) => 2,
        _ => 1,
    }
}

fn check(args: &Args) -> Findings {
    let mut findings = Findings { limit: args.max_problems, ..Findings::default() };
    let image = match image_file::open(&args.bootstrap) {
        Ok(image) => image,
        Err(e) if image_file::is_undecided(&e) => {
            findings.undecided(format!("{e:#}"));
            return findings;
        }
        Err(e) => {
            // The chain starts with the name of the file.
            findings.problem(&e, e.source().map(describe).unwrap_or_default());
            return findings;
        }
    };
    let blobs = open_blobs(&image, args, &mut findings);
    metadata::check(&image.bootstrap, &blobs, &mut findings);
    for (&index, blob) in &blobs {
        blob.check(&image.bootstrap, index, &mut findings);
    }
    name_files(&image.bootstrap, &mut findings);
    findings
}

/// An error with its causes, on one line.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Opens the blobs that there are files of, and reads their chunk-info arrays.
fn open_blobs(
    image: &ImageFile,
    args: &Args,
    findings: &mut Findings,
) -> BTreeMap<BlobIndex, BlobFile> {
    let mut blobs = BTreeMap::new();
    for info in image.bootstrap.blobs() {
        let inside =
            image.packed.is_some() && info.features.contains(BlobFeatures::INLINED_FS_META);
        let path = match &args.blob_dir {
            _ if inside => args.bootstrap.clone(),
            Some(dir) if info.id == BlobId::UNKNOWN => match only_file(dir) {
                Ok(path) => path,
                Err(e) => {
                    findings.undecided(format!("blob of unknown id: {e:#}"));
                    continue;
                }
            },
            Some(dir) => dir.join(info.id.as_str()),
            None => continue,
        };
        match BlobFile::open(&path, info) {
            Ok(blob) => {
                blobs.insert(info.index, blob);
            }
            Err(e) if image_file::is_undecided(&e) => findings.undecided(format!("{e:#}")),
            Err(e) => findings.problem(place(info), format!("{e:#}")),
        }
    }
    blobs
}

fn place(blob: &BlobInfo) -> String {
    format!("blob {}", blob.id)
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file.with_context(|| dir.display().to_string())?.path()),
        _ => anyhow::bail!("{} does not hold one file only", dir.display()),
    }
}

/// Adds to each problem of a chunk the first path that has this chunk.
fn name_files(image: &Bootstrap, findings: &mut Findings) {
    let mut wanted: HashMap<_, Option<String>> =
        findings.problems.iter().filter_map(|p| p.chunk).map(|chunk| (chunk, None)).collect();
    let mut left = wanted.len();
    for item in image.walk().flatten() {
        if left == 0 {
            break;
        }
        for addr in (0..item.inode.chunk_count()).filter_map(|i| item.inode.chunk(i).ok()) {
            let Some(blob) = addr.blob() else { continue };
            if let Some(path @ None) = wanted.get_mut(&(blob, ChunkIndex(addr.chunk_index()))) {
                *path = Some(printable(&item.path()));
                left -= 1;
            }
        }
    }
    for problem in &mut findings.problems {
        if let Some(path) = problem.chunk.and_then(|chunk| wanted.get(&chunk)) {
            let path = path.as_deref().unwrap_or("no file of this image");
            problem.what = format!("{} (part of {path})", problem.what);
        }
    }
}

fn print(findings: &Findings, args: &Args, out: &mut impl Write) -> io::Result<()> {
    for problem in &findings.problems {
        writeln!(out, "{}: {}", problem.place, problem.what)?;
    }
    let hidden = findings.problem_count - findings.problems.len() as u64;
    if hidden > 0 {
        writeln!(out, "{hidden} more problems, see --max-problems")?;
    }
    for what in &findings.undecided {
        writeln!(out, "could not check: {what}")?;
    }
    let data = match (findings.blobs, &args.blob_dir) {
        (0, None) => "blobs not read (no --blob-dir)".to_owned(),
        (1, _) => format!("{} chunks in 1 blob", findings.chunks),
        (blobs, _) => format!("{} chunks in {blobs} blobs", findings.chunks),
    };
    let verdict = match (findings.problem_count, findings.undecided.len()) {
        (0, 0) => "nothing is wrong".to_owned(),
        (0, _) if findings.paths == 0 => "not checked".to_owned(),
        (0, _) => "nothing is wrong in what could be checked".to_owned(),
        (1, _) => "1 problem".to_owned(),
        (n, _) => format!("{n} problems"),
    };
    writeln!(out, "{}: {} paths, {data}: {verdict}", args.bootstrap.display(), findings.paths)
}

/// A bar on standard error, invisible if that is no terminal. Counts bytes.
fn progress(what: String, bytes: u64) -> ProgressBar {
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {eta}";
    let style = ProgressStyle::with_template(template).expect("the template is a literal");
    ProgressBar::new(bytes).with_style(style).with_message(what)
}

#[cfg(test)]
mod tests;
