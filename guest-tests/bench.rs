//! Benchmarks: what a guest waits for, measured from our own front end, medians of several runs.
//!
//! Run by `scripts/bench`. A [`Workload`] measures one contender once per call; the program runs the
//! contenders of a workload alternating, so that a change of the machine's mood hits all of them.
//! The load generator shares the machine with the daemon: compare ratios and CPU time, not wishes.

#[path = "bench/cold.rs"]
mod cold;
mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use comfy_table::{CellAlignment, Table};
use support::daemon::{Daemon, Launch};
use support::frontend::{Vm, VmConfig};
use support::fuse_abi::ROOT_ID;
use support::fuse_client::{Fuse, Shape};
use support::image::create;
use support::rng::Rng;
use support::say;

/// Measures rafsd with a front end of its own and prints tables of medians.
#[derive(Parser)]
struct Args {
    /// Runs per workload; the table shows medians and the spread from the best to the worst run.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Numbers of files of the images, one row of the mount table each.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000")]
    files: Vec<usize>,
    /// Seconds per run of the workloads that last a while.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only workloads whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Passed by `cargo bench`; changes nothing.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one run measured: name, unit and value per column.
type Measures = Vec<(&'static str, f64)>;

/// A daemon that can be measured, and the tree it serves.
struct Contender {
    name: String,
    launch: Launch,
    files: usize,
}

struct Workload {
    name: &'static str,
    /// What is measured, for the reader of the table.
    what: &'static str,
    run: fn(&Contender, Duration) -> Result<Measures>,
    /// Run on the largest image only.
    largest_only: bool,
}

const WORKLOADS: [Workload; 6] = [
    Workload {
        name: "mount",
        what: "from exec to the first answer, cache directory empty, page cache warm",
        run: mount,
        largest_only: false,
    },
    Workload {
        name: "walk",
        what: "READDIRPLUS of the whole tree, one request at a time",
        run: walk,
        largest_only: false,
    },
    Workload {
        name: "getattr-1",
        what: "GETATTR, depth 1, sleeping in between as a guest does",
        run: |contender, time| requests(contender, time, 1, Kind::Getattr),
        largest_only: true,
    },
    Workload {
        name: "getattr-8",
        what: "GETATTR, depth 8",
        run: |contender, time| requests(contender, time, 8, Kind::Getattr),
        largest_only: true,
    },
    Workload {
        name: "read-1",
        what: "warm READ of small files, depth 1",
        run: |contender, time| requests(contender, time, 1, Kind::Read),
        largest_only: true,
    },
    Workload {
        name: "read-32",
        what: "warm READ of small files, depth 32",
        run: |contender, time| requests(contender, time, 32, Kind::Read),
        largest_only: true,
    },
];

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// A guest that has said INIT.
fn guest(daemon: &Daemon) -> Result<(Vm, Fuse)> {
    let mut vm = daemon.boot(VmConfig::default())?;
    let mut fuse = vm.fuse(1);
    fuse.shape = Shape::Linux;
    fuse.init()?;
    Ok((vm, fuse))
}

fn mount(contender: &Contender, _: Duration) -> Result<Measures> {
    let _ = fs::remove_dir_all(&contender.launch.work_dir);
    let start = Instant::now();
    let daemon = contender.launch.spawn()?;
    let listening = start.elapsed();
    let (_vm, mut fuse) = guest(&daemon)?;
    let init = start.elapsed();
    fuse.lookup(ROOT_ID, b"d00000").context("the first LOOKUP")?;
    let answer = start.elapsed();
    let usage = daemon.usage();
    Ok(vec![
        ("socket ms", ms(listening)),
        ("INIT ms", ms(init)),
        ("first LOOKUP ms", ms(answer)),
        ("RSS MiB", mib(usage.rss_kib)),
        ("anonymous MiB", mib(usage.anon_kib)),
        ("CPU ms", ms(daemon.cpu_time())),
    ])
}

fn walk(contender: &Contender, _: Duration) -> Result<Measures> {
    let daemon = contender.launch.spawn()?;
    let (_vm, mut fuse) = guest(&daemon)?;
    let (start, cpu) = (Instant::now(), daemon.cpu_time());
    let mut todo = vec![ROOT_ID];
    let mut entries = 0u64;
    while let Some(node) = todo.pop() {
        for item in fuse.list(node, 128 << 10, true)? {
            entries += 1;
            if item.kind == libc::S_IFDIR >> 12 && item.name != b"." && item.name != b".." {
                todo.push(item.entry.context("READDIRPLUS")?.nodeid);
            }
        }
    }
    let took = start.elapsed();
    let cpu = daemon.cpu_time() - cpu;
    Ok(vec![
        ("entries/s", entries as f64 / took.as_secs_f64()),
        ("ms", ms(took)),
        ("CPU µs/entry", cpu.as_secs_f64() * 1e6 / entries as f64),
        ("RSS MiB", mib(daemon.usage().rss_kib)),
    ])
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Getattr,
    Read,
}

fn requests(contender: &Contender, time: Duration, depth: usize, kind: Kind) -> Result<Measures> {
    let daemon = contender.launch.spawn()?;
    let (_vm, mut fuse) = guest(&daemon)?;
    let mut rng = Rng::new(1);
    let mut nodes = Vec::new();
    for _ in 0..2000 {
        let path = path_of(rng.index(contender.files));
        nodes.push(fuse.resolve(path.as_bytes())?);
    }
    for &node in nodes.iter().filter(|_| kind == Kind::Read) {
        fuse.read(node, 0, 0, 4096)?;
    }
    let cpu = daemon.cpu_time();
    let start = Instant::now();
    let (mut done, mut flying) = (0u64, 0);
    let mut waits = Vec::new();
    let mut sent = Instant::now();
    while start.elapsed() < time {
        while flying < depth {
            let node = nodes[rng.index(nodes.len())];
            let ticket = match kind {
                Kind::Getattr => fuse.submit_getattr(node),
                Kind::Read => fuse.submit_read(node, 0, 0, 4096),
            };
            ticket.context("the ring is full")?;
            flying += 1;
            sent = Instant::now();
        }
        fuse.flush();
        let mut next = Some(fuse.complete(Instant::now() + Duration::from_secs(10))?);
        while let Some(reply) = next {
            reply.result()?;
            fuse.recycle(reply);
            flying -= 1;
            done += 1;
            if depth == 1 {
                waits.push(sent.elapsed());
            }
            next = fuse.try_complete()?;
        }
    }
    let took = start.elapsed();
    let cpu = daemon.cpu_time() - cpu;
    let mut measures = vec![
        ("requests/s", done as f64 / took.as_secs_f64()),
        ("CPU µs/request", cpu.as_secs_f64() * 1e6 / done as f64),
    ];
    if depth == 1 {
        waits.sort();
        let at = |share: usize| waits[waits.len() * share / 100].as_secs_f64() * 1e6;
        measures.extend([("p50 µs", at(50)), ("p99 µs", at(99))]);
    }
    Ok(measures)
}

/// Files per directory of the generated tree.
const PER_DIR: usize = 1000;

fn path_of(number: usize) -> String {
    format!("d{:05}/f{number:07}", number / PER_DIR)
}

/// A tree of small files, none like another, as an image.
fn tree(dir: &Path, files: usize) -> Result<(PathBuf, PathBuf)> {
    let (root, blobs, bootstrap) = (dir.join("tree"), dir.join("blobs"), dir.join("bootstrap"));
    fs::create_dir_all(&blobs)?;
    let mut rng = Rng::new(files as u64);
    for number in 0..files {
        let path = root.join(path_of(number));
        if number % PER_DIR == 0 {
            fs::create_dir_all(path.parent().context("a directory")?)?;
        }
        let len = 8 + rng.index(400);
        fs::write(path, rng.bytes(len))?;
    }
    let start = Instant::now();
    create(&[
        "--bootstrap".as_ref(),
        bootstrap.as_ref(),
        "--blob-dir".as_ref(),
        blobs.as_ref(),
        root.as_ref(),
    ])?;
    let size = fs::metadata(&bootstrap)?.len() / 1024;
    say(format!("{files} files: built in {:.1?}, bootstrap {size} KiB", start.elapsed()));
    fs::remove_dir_all(&root)?;
    Ok((bootstrap, blobs))
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn show(value: f64) -> String {
    match value.abs() {
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Runs a workload on all contenders, alternating, and prints its table.
fn measure(workload: &Workload, contenders: &[&Contender], args: &Args) -> Result<()> {
    let time = Duration::from_secs_f64(args.seconds);
    let mut results: Vec<Vec<Measures>> = contenders.iter().map(|_| Vec::new()).collect();
    for run in 0..args.runs {
        for (contender, results) in contenders.iter().zip(&mut results) {
            let measures = (workload.run)(contender, time)
                .with_context(|| format!("{}, {}, run {run}", workload.name, contender.name))?;
            results.push(measures);
        }
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let columns: Vec<&str> = results[0][0].iter().map(|m| m.0).collect();
    table.set_header([&["daemon, files"], columns.as_slice()].concat());
    for (contender, runs) in contenders.iter().zip(&results) {
        let mut row = vec![contender.name.clone()];
        for column in 0..columns.len() {
            let mut values: Vec<f64> = runs.iter().map(|m| m[column].1).collect();
            values.sort_by(f64::total_cmp);
            let (low, high) = (values[0], values[values.len() - 1]);
            row.push(format!("{} ({}–{})", show(median(&values)), show(low), show(high)));
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    print(format_args!("\n{}: {}\n{table}", workload.name, workload.what))
}

/// The result, on standard output; progress goes to standard error.
fn print(text: std::fmt::Arguments<'_>) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").context("writing the results")
}

/// The machine, for whoever reads the figures later.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
    let cores = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let memory = read("/proc/meminfo");
    let kib: u64 = memory
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
        .unwrap_or(0);
    format!(
        "{cores} × {}, {} GiB, Linux {}",
        model.trim_matches([':', ' ', '\t']),
        kib >> 20,
        read("/proc/sys/kernel/osrelease").trim()
    )
}

fn main() -> Result<()> {
    let args = Args::parse();
    anyhow::ensure!(args.runs > 0 && !args.files.is_empty(), "nothing to do");
    let wanted = |name: &str| name.contains(&args.only);
    let scratch = tempfile::tempdir()?;
    print(format_args!(
        "rafsd {} on {}, medians of {} runs (best–worst)",
        env!("CARGO_PKG_VERSION"),
        machine(),
        args.runs
    ))?;
    if wanted("cold-start") {
        cold::measure(args.runs, scratch.path())?;
    }
    if !WORKLOADS.iter().any(|w| wanted(w.name)) {
        return Ok(());
    }
    let mut contenders = Vec::new();
    for &files in &args.files {
        let dir = scratch.path().join(files.to_string());
        fs::create_dir(&dir)?;
        let (bootstrap, blobs) = tree(&dir, files)?;
        let mut launch = Launch::new(&bootstrap, &blobs, &dir);
        launch.log_level = "warn".into();
        contenders.push(Contender { name: format!("rafsd, {files}"), launch, files });
    }
    let largest = contenders.iter().map(|c| c.files).max().unwrap_or(0);
    for workload in WORKLOADS.iter().filter(|w| wanted(w.name)) {
        let chosen: Vec<&Contender> =
            contenders.iter().filter(|c| !workload.largest_only || c.files == largest).collect();
        measure(workload, &chosen, &args)?;
    }
    Ok(())
}
