//! `rafs inspect`: what is in an image, for people and for programs.
//!
//! Everything printed is first collected in the structs below; their fields are the JSON keys.

use std::collections::HashSet;
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::image_file::{self, base64, json_text, printable};
use crate::rafs::id::ChunkIndex;
use crate::rafs::layout::{BLOCK_SIZE, BlobFeatures};
use crate::rafs::{Bootstrap, ChunkDigests, FileKind, Inode};

/// Show what is in an image.
///
/// Without PATH: the super block, the blobs and how many files of each type there are. With PATH:
/// the file's attributes, and its chunks, its target or its entries. All sizes and offsets are
/// bytes. Nothing is read but metadata; `rafs check` verifies it. The exit code is 1 if the image
/// or the path cannot be read.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Bootstrap, or packed blob that holds one.
    ///
    /// If the file is named by a blob id, a layer that does not know its own id shows that one.
    bootstrap: PathBuf,

    /// Path in the image to show, from its root.
    ///
    /// Symbolic links are not followed. Any bytes are accepted, as the shell passes them.
    path: Option<PathBuf>,

    /// Print JSON instead of text.
    ///
    /// One object. Paths, names and targets that are not UTF-8 have `_b64` behind their key and are
    /// base64.
    #[arg(long)]
    json: bool,
}

/// Bytes that a guest maps at a time: see `docs/dax.md`.
const MAPPED_AT_ONCE: u64 = 2 << 20;

/// What an image is made of.
#[derive(Debug, Serialize)]
struct ImageReport {
    format: &'static str,
    packed_blob: bool,
    bootstrap_size: u64,
    block_size: u32,
    chunk_size: u32,
    root_nid: u64,
    path_count: u64,
    flags: Vec<String>,
    chunk_table_records: usize,
    prefetch_nids: Vec<u64>,
    blobs: Vec<BlobReport>,
    counts: Counts,
}

/// One blob; sizes and offsets in bytes.
#[derive(Debug, Serialize)]
struct BlobReport {
    index: u8,
    id: String,
    chunk_count: u32,
    compressor: &'static str,
    digester: &'static str,
    compressed_size: u64,
    uncompressed_size: u64,
    features: Vec<String>,
    ci_compressor: &'static str,
    ci_offset: u64,
    ci_compressed_size: u64,
    ci_uncompressed_size: u64,
    mapped_block: u32,
}

/// How much of each there is; a hard-linked file is one file of several paths.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Counts {
    paths: u64,
    files: u64,
    directories: u64,
    symlinks: u64,
    devices: u64,
    fifos: u64,
    sockets: u64,
    /// Bytes of all files.
    file_bytes: u64,
    /// Chunks of all files, those that files share counted for each.
    chunks: u64,
    /// Ranges of 2 MiB, or less at the end, of all files: what a guest maps at a time.
    ranges: u64,
    /// Those of them that lie in one piece in the cache.
    ranges_in_one_piece: u64,
    /// Paths that could not be read.
    damaged: u64,
}

/// One file of an image.
#[derive(Debug, Serialize)]
struct PathReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_b64: Option<String>,
    nid: u64,
    /// Of the inode in the bootstrap, in bytes.
    offset: u64,
    compact: bool,
    r#type: &'static str,
    /// Permission bits in octal.
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: i64,
    mtime_nsec: u32,
    nlink: u32,
    ino: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    rdev: Option<(u32, u32)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_b64: Option<String>,
    #[serde(skip)]
    target_line: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    xattrs: Vec<XattrReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entries: Option<Vec<EntryReport>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunks: Option<Vec<ChunkReport>>,
}

#[derive(Debug, Serialize)]
struct XattrReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name_b64: Option<String>,
    value_b64: String,
    #[serde(skip)]
    line: String,
}

#[derive(Debug, Serialize)]
struct EntryReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name_b64: Option<String>,
    nid: u64,
    r#type: &'static str,
    #[serde(skip)]
    line: String,
}

#[derive(Debug, Serialize)]
struct ChunkReport {
    file_offset: u64,
    size: u32,
    blob_index: u8,
    chunk_index: u32,
    uncompressed_offset: u64,
    /// In hexadecimal; absent without a chunk table.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
}

/// Prints to standard output; a reader that has seen enough is no error.
///
/// # Errors
///
/// If the image or the path cannot be read, or the output not be written.
pub fn run(args: Args) -> Result<ExitCode> {
    let mut out = BufWriter::new(io::stdout().lock());
    let printed = print(&args, &mut out).and_then(|()| Ok(out.flush()?));
    match printed {
        Err(e) if is_broken_pipe(&e) => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause
            .downcast_ref::<io::Error>()
            .map(io::Error::kind)
            .or_else(|| cause.downcast_ref::<serde_json::Error>().and_then(|e| e.io_error_kind()));
        kind == Some(io::ErrorKind::BrokenPipe)
    })
}

fn print(args: &Args, out: &mut impl Write) -> Result<()> {
    let image = image_file::open(&args.bootstrap)?;
    let packed = image.packed.is_some();
    let image = &image.bootstrap;
    match &args.path {
        None => {
            let report = image_report(image, packed)?;
            if args.json { print_json(&report, out) } else { print_image(&report, out) }
        }
        Some(path) => {
            let path = path.as_os_str().as_bytes();
            let inode = find(image, path)?;
            let report = path_report(image, &inode, path)?;
            if args.json { print_json(&report, out) } else { print_path(&report, path, out) }
        }
    }
}

fn print_json(report: &impl Serialize, out: &mut impl Write) -> Result<()> {
    serde_json::to_writer_pretty(&mut *out, report)?;
    Ok(writeln!(out)?)
}

/// The inode at `path`, relative or absolute.
fn find<'a>(image: &'a Bootstrap, path: &[u8]) -> Result<Inode<'a>> {
    let mut inode = image.inode(image.root())?;
    for name in path.split(|&b| b == b'/').filter(|name| !matches!(*name, b"" | b".")) {
        let shown = || printable(path);
        if inode.kind() != FileKind::Directory {
            bail!("{}: a {} is on the way, not a directory", shown(), inode.kind().name());
        }
        let dir = inode.dir()?;
        let entry = dir.lookup(name).with_context(shown)?;
        let entry = entry.with_context(|| format!("{}: no such path in the image", shown()))?;
        inode = dir.inode_of(&entry).with_context(shown)?;
    }
    Ok(inode)
}

fn names<F: bitflags::Flags>(flags: &F, unknown: u64) -> Vec<String> {
    let mut names: Vec<_> = flags.iter_names().map(|(name, _)| name.to_owned()).collect();
    if unknown != 0 {
        names.push(format!("{unknown:#x}"));
    }
    names
}

fn image_report(image: &Bootstrap, packed_blob: bool) -> Result<ImageReport> {
    let entries = image.blob_entries()?.iter().zip(image.device_slots()?);
    let blobs = image.blobs().iter().zip(entries).map(|(blob, (entry, slot))| {
        let known = BlobFeatures::all().iter_names().fold(0, |bits, (_, flag)| bits | flag.bits());
        BlobReport {
            index: blob.index.0,
            id: blob.id.to_string(),
            chunk_count: blob.chunk_count,
            compressor: blob.compressor.name(),
            digester: blob.digester.name(),
            compressed_size: entry.compressed_size.get(),
            uncompressed_size: entry.uncompressed_size.get(),
            features: names(&blob.features, (blob.features.bits() & !known).into()),
            ci_compressor: blob.ci_compressor.name(),
            ci_offset: blob.ci_offset,
            ci_compressed_size: blob.ci_compressed_size,
            ci_uncompressed_size: blob.ci_uncompressed_size,
            mapped_block: slot.mapped_block.get(),
        }
    });
    Ok(ImageReport {
        format: "RAFS v6",
        packed_blob,
        bootstrap_size: image.len(),
        block_size: image.block_size(),
        chunk_size: image.chunk_size(),
        root_nid: image.root().0,
        path_count: image.path_count(),
        flags: names(&image.flags(), 0),
        chunk_table_records: image.chunk_records().len(),
        prefetch_nids: image.prefetch_nids().map(|nid| nid.0).collect(),
        blobs: blobs.collect(),
        counts: count(image),
    })
}

fn count(image: &Bootstrap) -> Counts {
    let mut counts = Counts::default();
    let mut linked = HashSet::new();
    for item in image.walk() {
        let Ok(item) = item else {
            counts.damaged += 1;
            continue;
        };
        counts.paths += 1;
        let inode = item.inode;
        match inode.kind() {
            FileKind::Regular => {
                if inode.nlink() > 1 && !linked.insert(inode.nid()) {
                    continue;
                }
                counts.files += 1;
                counts.file_bytes = counts.file_bytes.saturating_add(inode.size());
                counts.chunks += u64::from(inode.chunk_count());
                for pieces in inode.pieces(MAPPED_AT_ONCE) {
                    counts.ranges += 1;
                    counts.ranges_in_one_piece += u64::from(pieces.is_ok_and(|pieces| pieces == 1));
                }
            }
            FileKind::Directory => counts.directories += 1,
            FileKind::Symlink => counts.symlinks += 1,
            FileKind::CharDevice | FileKind::BlockDevice => counts.devices += 1,
            FileKind::Fifo => counts.fifos += 1,
            FileKind::Socket => counts.sockets += 1,
        }
    }
    counts
}

fn path_report(image: &Bootstrap, inode: &Inode<'_>, path: &[u8]) -> Result<PathReport> {
    let kind = inode.kind();
    let (path_text, path_b64) = json_text(path);
    let mut report = PathReport {
        path: path_text,
        path_b64,
        nid: inode.nid().0,
        offset: inode.offset(),
        compact: inode.is_compact(),
        r#type: kind.name(),
        mode: format!("{:04o}", inode.mode() & 0o7777),
        uid: inode.uid(),
        gid: inode.gid(),
        size: inode.size(),
        mtime: inode.mtime(),
        mtime_nsec: inode.mtime_nsec(),
        nlink: inode.nlink(),
        ino: inode.ino(),
        rdev: None,
        target: None,
        target_b64: None,
        target_line: None,
        xattrs: Vec::new(),
        entries: None,
        chunks: None,
    };
    for xattr in inode.xattrs()? {
        let full_name = xattr.full_name();
        let (name, name_b64) = json_text(&full_name);
        let line = format!("{}={}", printable(&full_name), printable(xattr.value));
        report.xattrs.push(XattrReport { name, name_b64, value_b64: base64(xattr.value), line });
    }
    match kind {
        FileKind::Regular => report.chunks = Some(chunks(image, inode)?),
        FileKind::Directory => report.entries = Some(entries(inode)?),
        FileKind::Symlink => {
            let target = inode.symlink_target()?;
            (report.target, report.target_b64) = json_text(target);
            report.target_line = Some(printable(target));
        }
        FileKind::CharDevice | FileKind::BlockDevice => {
            report.rdev = Some(inode.rdev_major_minor());
        }
        FileKind::Fifo | FileKind::Socket => {}
    }
    Ok(report)
}

fn chunks(image: &Bootstrap, inode: &Inode<'_>) -> Result<Vec<ChunkReport>> {
    let digests: Vec<ChunkDigests> = image
        .blobs()
        .iter()
        .map(|blob| image.chunk_digests(blob.index))
        .collect::<Result<_, _>>()?;
    let describe = |i: u32| {
        let addr = inode.chunk(i)?;
        let blob_index = addr.blob().map_or(0, |blob| blob.0);
        let digests = &digests[usize::from(blob_index)];
        Ok(ChunkReport {
            file_offset: u64::from(i) * u64::from(image.chunk_size()),
            size: inode.chunk_len(i),
            blob_index,
            chunk_index: addr.chunk_index(),
            uncompressed_offset: u64::from(addr.start_block()) * BLOCK_SIZE,
            digest: digests.get(ChunkIndex(addr.chunk_index())).map(hex::encode),
        })
    };
    (0..inode.chunk_count()).map(describe).collect()
}

fn entries(inode: &Inode<'_>) -> Result<Vec<EntryReport>> {
    let describe = |entry: crate::rafs::Result<crate::rafs::DirEntry<'_>>| {
        let entry = entry?;
        let (name, name_b64) = json_text(entry.name);
        let kind = FileKind::from_dirent(entry.file_type).map_or("unknown", FileKind::name);
        let line = format!("{:>10}  {kind:<7}  {}", entry.nid.0, printable(entry.name));
        Ok(EntryReport { name, name_b64, nid: entry.nid.0, r#type: kind, line })
    };
    inode.dir()?.entries_from(0)?.map(describe).collect()
}

/// `key   value` lines, the values in one column.
fn print_facts(facts: &[(&str, String)], out: &mut impl Write) -> Result<()> {
    for (key, value) in facts {
        writeln!(out, "{key:<20}{value}")?;
    }
    Ok(())
}

/// How many of a file's ranges a guest's VMM can map at once.
fn share(ranges: u64, in_one_piece: u64) -> String {
    let percent = in_one_piece.saturating_mul(100).checked_div(ranges).unwrap_or(100);
    format!("{ranges}, {in_one_piece} in one piece ({percent} %)")
}

fn print_image(report: &ImageReport, out: &mut impl Write) -> Result<()> {
    let counts = &report.counts;
    let packed = if report.packed_blob { ", in a packed blob" } else { "" };
    print_facts(
        &[
            ("format", format!("{}{packed}", report.format)),
            ("bootstrap", format!("{} bytes", report.bootstrap_size)),
            ("block size", report.block_size.to_string()),
            ("chunk size", report.chunk_size.to_string()),
            ("flags", report.flags.join(" ")),
            ("root nid", report.root_nid.to_string()),
            ("paths", format!("{} by the super block", report.path_count)),
            ("chunk table", format!("{} records", report.chunk_table_records)),
            (
                "prefetch nids",
                match report.prefetch_nids.as_slice() {
                    [] => "none".to_owned(),
                    nids => nids.iter().map(u64::to_string).collect::<Vec<_>>().join(" "),
                },
            ),
            (
                "files",
                format!(
                    "{} of {} bytes in {} chunks",
                    counts.files, counts.file_bytes, counts.chunks
                ),
            ),
            ("ranges of 2 MiB", share(counts.ranges, counts.ranges_in_one_piece)),
            ("directories", counts.directories.to_string()),
            ("symlinks", counts.symlinks.to_string()),
            ("devices", counts.devices.to_string()),
            ("fifos, sockets", format!("{}, {}", counts.fifos, counts.sockets)),
        ],
        out,
    )?;
    if counts.damaged > 0 {
        writeln!(out, "{:<20}{} (see `rafs check`)", "damaged paths", counts.damaged)?;
    }
    if report.blobs.is_empty() {
        return Ok(writeln!(out, "\nno blobs")?);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "blob",
        "id",
        "chunks",
        "compressor",
        "digester",
        "stored",
        "uncompressed",
        "ci offset",
        "ci size",
        "features",
    ]);
    for blob in &report.blobs {
        table.add_row([
            blob.index.to_string(),
            blob.id.clone(),
            blob.chunk_count.to_string(),
            blob.compressor.to_owned(),
            blob.digester.to_owned(),
            blob.compressed_size.to_string(),
            blob.uncompressed_size.to_string(),
            blob.ci_offset.to_string(),
            blob.ci_compressed_size.to_string(),
            blob.features.join(" "),
        ]);
    }
    for column in [0, 2, 5, 6, 7, 8] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    writeln!(out)?;
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn print_path(report: &PathReport, path: &[u8], out: &mut impl Write) -> Result<()> {
    let form = if report.compact { "compact" } else { "extended" };
    let mut facts = vec![
        ("path", printable(path)),
        ("type", report.r#type.to_owned()),
        ("mode", report.mode.clone()),
        ("owner", format!("{}:{}", report.uid, report.gid)),
        ("size", report.size.to_string()),
        ("mtime", time(report.mtime, report.mtime_nsec)),
        ("links", report.nlink.to_string()),
        ("nid", format!("{}, {form} inode at byte {}", report.nid, report.offset)),
    ];
    if let Some((major, minor)) = report.rdev {
        facts.push(("device", format!("{major}:{minor}")));
    }
    if let Some(target) = &report.target_line {
        facts.push(("target", target.clone()));
    }
    facts.extend(report.xattrs.iter().map(|xattr| ("xattr", xattr.line.clone())));
    print_facts(&facts, out)?;
    if let Some(entries) = &report.entries {
        writeln!(out, "\n{:>10}  {:<7}  name", "nid", "type")?;
        for entry in entries {
            writeln!(out, "{}", entry.line)?;
        }
    }
    if let Some(chunks) = &report.chunks {
        writeln!(
            out,
            "\n{:>14}  {:>8}  {:>4}  {:>8}  {:>14}  digest",
            "file offset", "size", "blob", "chunk", "uncompressed"
        )?;
        for chunk in chunks {
            writeln!(
                out,
                "{:>14}  {:>8}  {:>4}  {:>8}  {:>14}  {}",
                chunk.file_offset,
                chunk.size,
                chunk.blob_index,
                chunk.chunk_index,
                chunk.uncompressed_offset,
                chunk.digest.as_deref().unwrap_or("unknown")
            )?;
        }
    }
    Ok(())
}

/// Seconds, and as a date where that has four digits for the year.
fn time(seconds: i64, nanoseconds: u32) -> String {
    const YEAR_10000: u64 = 253_402_300_800;
    let plain = format!("{seconds}.{nanoseconds:09}");
    match u64::try_from(seconds) {
        Ok(seconds) if seconds < YEAR_10000 => {
            let time = std::time::UNIX_EPOCH + std::time::Duration::new(seconds, nanoseconds);
            format!("{plain} = {}", humantime::format_rfc3339_nanos(time))
        }
        _ => plain,
    }
}

#[cfg(test)]
mod tests;
