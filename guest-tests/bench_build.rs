//! What it costs to make images: `rafs create` beside nydus-image, `rafs convert`, `rafs check`.
//!
//! Run by `scripts/bench build`. Every program is a process of its own; its CPU time and peak memory are what the
//! kernel counted. Contenders run alternating. Images and trees are those of `scripts/parts`.

#[path = "bench/report.rs"]
#[allow(dead_code)] // families are of the other benchmark
mod report;
mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod parts;
}

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use report::{Contender, Measures, alternate, by_measure};
use support::parts::{Parts, run};

/// Measures how images are made and prints tables of medians.
#[derive(Parser)]
struct Args {
    /// Runs of each contender; the tables show medians and the spread from the best to the worst run.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only workloads whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Options that are given to both `rafs create` and `nydus-image create`.
    #[arg(long, value_delimiter = ' ', allow_hyphen_values = true)]
    create: Vec<String>,
    /// Passed by `cargo bench`; changes nothing.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Parts whose files make up the tree to build: 1 GB of programs, libraries and modules.
const TREE: [&str; 12] = [
    "images/python/tree",
    "images/node/tree",
    "qemu-11",
    "qemu-7",
    "skopeo",
    "registry",
    "erofs",
    "uml",
    "umoci",
    "virtiofsd",
    "libarchive",
    "linux-6.1",
];

/// What a process used.
#[derive(Clone, Copy)]
struct Used {
    time: Duration,
    /// Of all its threads, in and out of the kernel.
    cpu: Duration,
    /// Peak resident memory, mapped files included.
    peak_kib: u64,
}

/// Runs a program to its end; what it printed is shown if it fails.
fn measure(command: &mut Command) -> Result<Used> {
    let log = tempfile::NamedTempFile::new()?;
    let start = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(log.reopen()?)
        .stderr(log.reopen()?)
        .spawn()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    let pid = libc::pid_t::try_from(child.id())?;
    let mut status = 0;
    // SAFETY: a struct of integers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to variables that outlive the call, and the child was not waited for.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    let time = start.elapsed();
    ensure!(waited == pid, "waiting: {}", std::io::Error::last_os_error());
    let status = ExitStatus::from_raw(status);
    ensure!(status.success(), "{command:?}: {status}\n{}", fs::read_to_string(log.path())?);
    let duration = |time: libc::timeval| {
        let micros = time.tv_sec * 1_000_000 + time.tv_usec;
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    };
    Ok(Used {
        time,
        cpu: duration(usage.ru_utime) + duration(usage.ru_stime),
        peak_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    })
}

/// Figures of a program that worked on `bytes`.
fn figures(used: Used, bytes: u64) -> Measures {
    let mb = bytes as f64 / 1e6;
    vec![
        ("seconds", used.time.as_secs_f64()),
        ("MB/s", mb / used.time.as_secs_f64()),
        ("MB per CPU second", mb / used.cpu.as_secs_f64()),
        ("peak MiB", used.peak_kib as f64 / 1024.0),
    ]
}

/// Runs all contenders, alternating, and prints their table.
fn table(title: &str, contenders: Vec<Contender<'_>>, runs: usize) -> Result<()> {
    let all = alternate(contenders, runs)?;
    print(format_args!("\n{title}\n{}", by_measure("program", &all)))
}

/// The result, on standard output; progress goes to standard error.
fn print(text: std::fmt::Arguments<'_>) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").context("writing the results")
}

/// Bytes of all files below a directory; links count once.
fn size_of(dir: &Path) -> Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let mut seen = std::collections::HashSet::new();
    let (mut files, mut bytes) = (0, 0);
    for entry in walkdir::WalkDir::new(dir) {
        let metadata = entry?.metadata()?;
        if metadata.is_file() && seen.insert(metadata.ino()) {
            files += 1;
            bytes += metadata.len();
        }
    }
    Ok((files, bytes))
}

/// The tree to build: copies, so that every run finds it in the page cache.
fn make_tree(parts: &Parts, tree: &Path) -> Result<()> {
    fs::create_dir(tree)?;
    let from = parts.path("parts")?;
    for name in TREE {
        let to = tree.join(name.replace('/', "-"));
        run(Command::new("cp").arg("-a").arg(from.join(name)).arg(to))?;
    }
    Ok(())
}

fn rafs() -> Command {
    Command::new(env!("CARGO_BIN_EXE_rafs"))
}

/// `create` of one program into an empty directory.
fn create(
    mut command: Command,
    tree: &Path,
    out: &Path,
    options: &[String],
    bytes: u64,
) -> Result<Measures> {
    let _ = fs::remove_dir_all(out);
    fs::create_dir_all(out.join("blobs"))?;
    command.arg("create").args(options);
    command.arg("--bootstrap").arg(out.join("bootstrap")).arg("--blob-dir").arg(out.join("blobs"));
    let used = measure(command.arg(tree))?;
    let mut measures = figures(used, bytes);
    measures.push(("blob MB", size_of(&out.join("blobs"))?.1 as f64 / 1e6));
    measures.push(("bootstrap MB", fs::metadata(out.join("bootstrap"))?.len() as f64 / 1e6));
    Ok(measures)
}

fn creating(args: &Args, parts: &Parts, scratch: &Path) -> Result<()> {
    let nydus = Parts::install(&["nydus"])?.path("nydus_image")?;
    let tree = scratch.join("tree");
    make_tree(parts, &tree)?;
    let (files, bytes) = size_of(&tree)?;
    for compressor in ["zstd", "lz4_block", "none"] {
        let mut options = args.create.clone();
        options.extend(["--compressor", compressor].map(str::to_owned));
        let mut theirs = options.clone();
        theirs.extend(["--fs-version", "6"].map(str::to_owned));
        let (tree, nydus, options, theirs) = (&tree, &nydus, &options, &theirs);
        let contenders = vec![
            Contender::new("rafs", move || {
                create(rafs(), tree, &scratch.join("ours"), options, bytes).map(Some)
            }),
            Contender::new("nydus-image", move || {
                create(Command::new(nydus), tree, &scratch.join("theirs"), theirs, bytes).map(Some)
            }),
        ];
        let title = format!(
            "create, {compressor}: {files} files, {:.0} MB, page cache warm",
            bytes as f64 / 1e6
        );
        table(&title, contenders, args.runs)?;
    }
    Ok(())
}

/// An image of `scripts/parts images` as it is, and the bytes of its layers without compression.
fn source(parts: &Parts, name: &str) -> Result<(PathBuf, u64)> {
    let layout = parts.path("images")?.join(name).join("layout");
    let mut bytes = 0;
    let text = run(Command::new(parts.path("skopeo")?)
        .args(["inspect", "--raw"])
        .arg(reference(&layout, "latest")))?;
    let manifest: serde_json::Value = serde_json::from_slice(&text)?;
    for layer in manifest["layers"].as_array().context("layers")? {
        let digest = layer["digest"].as_str().context("a digest")?.replace("sha256:", "");
        let blob = layout.join("blobs/sha256").join(digest);
        let tar = run(Command::new("sh")
            .args([
                "-c",
                "if test \"$1\" = zstd; then zstd -dc \"$0\"; else gzip -dc \"$0\"; fi | wc -c",
            ])
            .arg(blob)
            .arg(layer["mediaType"].as_str().context("a type")?.rsplit('+').next().unwrap_or("")))?;
        bytes += String::from_utf8(tar)?.trim().parse::<u64>()?;
    }
    Ok((layout, bytes))
}

fn reference(layout: &Path, tag: &str) -> String {
    format!("oci:{}:{tag}", layout.display())
}

fn converting(args: &Args, parts: &Parts, scratch: &Path) -> Result<()> {
    let (mut convert, mut check) = (Vec::new(), Vec::new());
    for name in ["python", "node", "nasty"] {
        let (layout, bytes) = source(parts, name)?;
        let target = scratch.join(name);
        let (from, to) = (reference(&layout, "latest"), reference(&target, "rafs"));
        let ends = move |command: &mut Command| {
            command.arg("--source").arg(&from).arg("--target").arg(&to);
        };
        let (ends_too, what) = (ends.clone(), format!("{name}, {:.0} MB", bytes as f64 / 1e6));
        convert.push(Contender::new(what.clone(), move || {
            let _ = fs::remove_dir_all(&target);
            let mut command = rafs();
            ends(command.arg("convert"));
            Ok(Some(figures(measure(&mut command)?, bytes)))
        }));
        check.push(Contender::new(what, move || {
            let mut command = rafs();
            ends_too(command.arg("check"));
            Ok(Some(figures(measure(&mut command)?, bytes)))
        }));
    }
    table(
        "convert: OCI layout to OCI layout; MB are those of the layers' tars",
        convert,
        args.runs,
    )?;
    table("check: source and target, all metadata and content", check, args.runs)
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.runs > 0, "nothing to do");
    let parts = Parts::install(&["all"])?;
    let scratch = tempfile::tempdir()?;
    print(format_args!(
        "rafs {}, medians of {} runs (best–worst)",
        env!("CARGO_PKG_VERSION"),
        args.runs
    ))?;
    if "create".contains(&args.only) {
        creating(&args, &parts, scratch.path())?;
    }
    if "convert check".contains(&args.only) {
        converting(&args, &parts, scratch.path())?;
    }
    Ok(())
}
