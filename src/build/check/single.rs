//! One image by itself, from files: is it what it says, every byte of it?
//!
//! `metadata` walks the bootstrap, `tables` compares its tables, `blob` reads a blob file and all its
//! chunks.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::blob::BlobFile;
use super::findings::{Findings, describe};
use super::{metadata, place};
use crate::build::image_file::{self, ImageFile};
use crate::rafs::id::{BlobId, BlobIndex};
use crate::rafs::layout::BlobFeatures;

/// What to check.
#[derive(Debug)]
pub(super) struct Args {
    pub bootstrap: PathBuf,
    pub blob_dir: Option<PathBuf>,
    pub max_problems: usize,
}

/// Checks and prints; the exit code says what came out.
///
/// # Errors
///
/// If the result cannot be printed.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let findings = check(args);
    let mut out = io::stdout().lock();
    match print(&findings, args, &mut out).and_then(|()| out.flush()) {
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
    let infos = blobs.iter().filter_map(|(&index, blob)| Some((index, blob.chunks.as_ref()?)));
    metadata::check(&image.bootstrap, infos.collect(), &mut findings);
    for (&index, blob) in &blobs {
        blob.check(&image.bootstrap, index, &mut findings);
    }
    findings.name_files(&image.bootstrap);
    findings
}

/// Opens the blobs that there are files of, and reads their chunk-info arrays.
pub(super) fn open_blobs(
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

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file.with_context(|| dir.display().to_string())?.path()),
        _ => anyhow::bail!("{} does not hold one file only", dir.display()),
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

#[cfg(test)]
mod tests;
