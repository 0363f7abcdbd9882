//! `rafs stat`: what images are made of, and what they have in common.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::HumanBytes;
use serde::Serialize;

use super::{image_file, output};
use crate::rafs::{Bootstrap, FileKind};

/// Count what is in images, and what they share.
///
/// For each image: its paths by type, its chunks, the bytes they have before and after compression,
/// and how much deduplication saves. Of several images also what they have together, and with
/// --target how much of one image is in the others: what a chunk dictionary would save. Chunks are
/// the same if digest and size are. Reads metadata only.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bootstraps, or packed blobs that hold them.
    #[arg(value_name = "IMAGE")]
    images: Vec<PathBuf>,

    /// One more image; the same as naming it as IMAGE.
    #[arg(short = 'B', long, value_name = "FILE")]
    bootstrap: Option<PathBuf>,

    /// Directory of packed blobs, each an image more.
    #[arg(short = 'D', long, value_name = "DIR")]
    blob_dir: Option<PathBuf>,

    /// An image to compare with the others.
    #[arg(short = 'T', long, value_name = "FILE")]
    target: Option<PathBuf>,

    /// Print JSON instead of a table; sizes are bytes.
    #[arg(long)]
    json: bool,

    /// File for the JSON, beside the table.
    #[arg(short = 'J', long, value_name = "FILE")]
    output_json: Option<PathBuf>,
}

/// What one image has, or several together.
#[derive(Debug, Default, Serialize)]
struct Counts {
    /// Names; hard-linked files once for each.
    paths: u64,
    directories: u64,
    /// Regular files, and their names beyond the first.
    files: u64,
    hard_links: u64,
    /// Files of one chunk at most.
    small_files: u64,
    symlinks: u64,
    /// Devices, fifos and sockets.
    special: u64,
    /// Bytes of all files, and of those that are small.
    file_bytes: u64,
    small_file_bytes: u64,
    /// Blobs in use.
    blobs: u64,
    /// Chunks of all files, shared ones counted for each use.
    chunks: u64,
    /// Distinct ones, their bytes, and the bytes that are stored for them.
    distinct_chunks: u64,
    distinct_bytes: u64,
    stored_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Image {
    name: String,
    #[serde(flatten)]
    counts: Counts,
}

/// How much of an image is in others.
#[derive(Debug, Serialize)]
struct Shared {
    chunks: u64,
    bytes: u64,
    stored_bytes: u64,
    /// Of its distinct bytes.
    percent: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    images: Vec<Image>,
    /// All images together, without the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<Counts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Image>,
    /// Of the target in the other images.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<Shared>,
}

/// Digest and size of a chunk, and the bytes that are stored for it.
type Chunks = HashMap<([u8; 32], u32), u64>;

/// Counts and prints.
///
/// # Errors
///
/// If an image cannot be read.
pub fn run(args: Args) -> Result<ExitCode> {
    let mut paths = args.images;
    paths.extend(args.bootstrap);
    if let Some(dir) = &args.blob_dir {
        let name = || dir.display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(name)? {
            let path = entry.with_context(name)?.path();
            if image_file::open(&path).is_ok() {
                found.push(path);
            } else {
                log::info!("{}: no image", path.display());
            }
        }
        found.sort();
        paths.extend(found);
    }
    if paths.is_empty() && args.target.is_none() {
        bail!("no image is named");
    }
    let mut all = Chunks::new();
    let mut total = Counts::default();
    let mut blobs = HashSet::new();
    let mut images = Vec::new();
    for path in &paths {
        let (image, chunks) = count(path, &mut blobs)?;
        total.add(&image.counts);
        for (chunk, stored) in chunks {
            all.entry(chunk).or_insert(stored);
        }
        images.push(image);
    }
    total.blobs = blobs.len() as u64;
    total.set_distinct(&all);
    let mut report =
        Report { total: (images.len() > 1).then_some(total), images, target: None, shared: None };
    if let Some(path) = &args.target {
        let (image, chunks) = count(path, &mut HashSet::new())?;
        let common = chunks.iter().filter(|(chunk, _)| all.contains_key(*chunk));
        let mut shared = Shared { chunks: 0, bytes: 0, stored_bytes: 0, percent: 0.0 };
        for (&(_, size), stored) in common {
            shared.chunks += 1;
            shared.bytes += u64::from(size);
            shared.stored_bytes += stored;
        }
        shared.percent = percent(shared.bytes, image.counts.distinct_bytes);
        (report.target, report.shared) = (Some(image), Some(shared));
    }
    let json = output::json(&report)?;
    if let Some(path) = &args.output_json {
        std::fs::write(path, &json).with_context(|| path.display().to_string())?;
    }
    let mut out = io::stdout().lock();
    let printed = if args.json { out.write_all(json.as_bytes()) } else { report.print(&mut out) };
    match printed {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// What one image has, and its distinct chunks. Its blobs are added to `blobs`.
fn count(path: &Path, blobs: &mut HashSet<[u8; 64]>) -> Result<(Image, Chunks)> {
    let image = image_file::open(path)?.bootstrap;
    let name = path.display().to_string();
    let (mut counts, chunks) = count_paths(&image).with_context(|| name.clone())?;
    counts.blobs = image.blobs().len() as u64;
    counts.set_distinct(&chunks);
    blobs.extend(image.blobs().iter().map(|blob| *blob.id.as_bytes()));
    Ok((Image { name, counts }, chunks))
}

fn count_paths(image: &Bootstrap) -> Result<(Counts, Chunks)> {
    let mut counts = Counts::default();
    let mut seen = HashSet::new();
    for item in image.walk() {
        let inode = item?.inode;
        counts.paths += 1;
        match inode.kind() {
            FileKind::Directory => counts.directories += 1,
            FileKind::Symlink => counts.symlinks += 1,
            FileKind::Regular if inode.nlink() > 1 && !seen.insert(inode.nid()) => {
                counts.hard_links += 1;
            }
            FileKind::Regular => {
                counts.files += 1;
                counts.file_bytes += inode.size();
                counts.chunks += u64::from(inode.chunk_count());
                if inode.chunk_count() <= 1 {
                    counts.small_files += 1;
                    counts.small_file_bytes += inode.size();
                }
            }
            _ => counts.special += 1,
        }
    }
    let mut chunks = Chunks::new();
    for record in image.chunk_records() {
        let stored = record.compressed_size.get().into();
        chunks.entry((record.digest, record.uncompressed_size.get())).or_insert(stored);
    }
    Ok((counts, chunks))
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.paths += other.paths;
        self.directories += other.directories;
        self.files += other.files;
        self.hard_links += other.hard_links;
        self.small_files += other.small_files;
        self.symlinks += other.symlinks;
        self.special += other.special;
        self.file_bytes += other.file_bytes;
        self.small_file_bytes += other.small_file_bytes;
        self.chunks += other.chunks;
    }

    fn set_distinct(&mut self, chunks: &Chunks) {
        self.distinct_chunks = chunks.len() as u64;
        self.distinct_bytes = chunks.keys().map(|(_, size)| u64::from(*size)).sum();
        self.stored_bytes = chunks.values().sum();
    }
}

fn percent(part: u64, all: u64) -> f64 {
    // Percentages need no more digits than a double has.
    if all == 0 { 0.0 } else { 100.0 * part as f64 / all as f64 }
}

impl Report {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let columns = self
            .images
            .iter()
            .map(|image| (image.name.as_str(), &image.counts))
            .chain(self.total.iter().map(|total| ("together", total)))
            .chain(self.target.iter().map(|image| (image.name.as_str(), &image.counts)));
        let columns: Vec<_> = columns.collect();
        let size = |bytes: u64| HumanBytes(bytes).to_string();
        type Row<'r> = (&'r str, &'r dyn Fn(&Counts) -> String);
        let rows: [Row<'_>; 14] = [
            ("paths", &|c| c.paths.to_string()),
            ("directories", &|c| c.directories.to_string()),
            ("files", &|c| c.files.to_string()),
            ("  of one chunk at most", &|c| c.small_files.to_string()),
            ("more names of files", &|c| c.hard_links.to_string()),
            ("symbolic links", &|c| c.symlinks.to_string()),
            ("devices, fifos, sockets", &|c| c.special.to_string()),
            ("bytes of files", &|c| size(c.file_bytes)),
            ("blobs", &|c| c.blobs.to_string()),
            ("chunks", &|c| c.chunks.to_string()),
            ("distinct chunks", &|c| c.distinct_chunks.to_string()),
            ("  their bytes", &|c| size(c.distinct_bytes)),
            ("  stored", &|c| size(c.stored_bytes)),
            ("saved by dedup", &|c| {
                let saved = c.file_bytes.saturating_sub(c.distinct_bytes);
                format!("{:.1} %", percent(saved, c.file_bytes))
            }),
        ];
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let names = columns.iter().map(|(name, _)| short(name));
        table.set_header(std::iter::once(String::new()).chain(names));
        for (label, value) in rows {
            let cells = columns.iter().map(|(_, counts)| value(counts));
            table.add_row(std::iter::once(label.to_owned()).chain(cells));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for line in table.to_string().lines() {
            writeln!(out, "{}", line.trim_end())?;
        }
        if let Some(shared) = &self.shared {
            writeln!(
                out,
                "of the target {} chunks, {} ({:.1} %), are in the other images",
                shared.chunks,
                size(shared.bytes),
                shared.percent
            )?;
        }
        Ok(())
    }
}

/// The last part of a path, cut if it is the digest of a blob.
fn short(name: &str) -> String {
    let last = Path::new(name).file_name().map_or(name.into(), |last| last.to_string_lossy());
    if last.len() == 64 { last[..12].to_owned() } else { last.into_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_columns() {
        assert_eq!(short("/a/image.boot"), "image.boot");
        assert_eq!(short(&"0123456789abcdef".repeat(4)), "0123456789ab");
        assert_eq!(short("together"), "together");
    }

    #[test]
    fn nothing_is_no_percentage() {
        assert_eq!((percent(0, 0), percent(1, 4)), (0.0, 25.0));
    }
}
