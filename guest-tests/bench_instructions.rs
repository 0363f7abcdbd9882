//! What a warm request costs the daemon in instructions and system calls: figures that repeat on a
//! noisy machine, for a change at hand.
//!
//! Run by `scripts/bench instructions`. The daemon runs under callgrind, which counts, and then under
//! strace; each workload is done once with some requests and once with more, and the difference is
//! divided by the requests that were more. So what start and end cost is not in it. The kernel's own
//! work is not in it either: copying file data is not counted.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use comfy_table::{CellAlignment, Table};
use support::daemon::{Daemon, Launch};
use support::frontend::VmConfig;
use support::fuse_abi::ROOT_ID;
use support::fuse_client::{Fuse, Shape, Ticket};
use support::image::{Image, name};

/// Counts instructions and system calls of warm requests, and prints a table.
#[derive(Parser)]
struct Args {
    /// Only workloads whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Keep callgrind's output in this directory, for callgrind_annotate.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Passed by `cargo bench`; changes nothing.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Files of the image, and their size.
const FILES: usize = 48;
const FILE_SIZE: usize = 1 << 20;

#[derive(Clone, Copy)]
enum Ask {
    Getattr,
    Lookup,
    /// READDIRPLUS of the root, with this buffer; counted by entry.
    List(usize),
    Read(usize),
}

struct Workload {
    name: &'static str,
    ask: Ask,
    /// Requests that are shown to the daemon with one kick.
    depth: usize,
    shape: Shape,
    /// Batches of so many requests in the shorter run.
    batches: usize,
}

const fn workload(name: &'static str, ask: Ask, depth: usize, batches: usize) -> Workload {
    Workload { name, ask, depth, shape: Shape::Linux, batches }
}

const WORKLOADS: [Workload; 10] = [
    workload("getattr, depth 1", Ask::Getattr, 1, 500),
    workload("getattr, depth 8", Ask::Getattr, 8, 200),
    workload("lookup, depth 8", Ask::Lookup, 8, 200),
    workload("readdirplus 128 KiB, an entry", Ask::List(128 << 10), 1, 10),
    workload("read 4 KiB, depth 1", Ask::Read(4 << 10), 1, 500),
    workload("read 4 KiB, depth 32", Ask::Read(4 << 10), 32, 50),
    workload("read 128 KiB, depth 8", Ask::Read(128 << 10), 8, 100),
    Workload {
        shape: Shape::Pages,
        ..workload("read 128 KiB in 32 pages, depth 8", Ask::Read(128 << 10), 8, 100)
    },
    workload("read 1 MiB, depth 8", Ask::Read(1 << 20), 8, 20),
    Workload {
        shape: Shape::Pages,
        ..workload("read 1 MiB in 256 pages, depth 8", Ask::Read(1 << 20), 8, 20)
    },
];

/// Does `batches` times what the workload asks for; returns how much it was.
fn work(fuse: &mut Fuse, nodes: &[u64], workload: &Workload, batches: usize) -> Result<u64> {
    let (mut done, mut next) = (0, 0usize);
    for _ in 0..batches {
        if let Ask::List(size) = workload.ask {
            done += fuse.list(ROOT_ID, size, true)?.len() as u64;
            continue;
        }
        let mut tickets: Vec<Ticket> = Vec::new();
        for _ in 0..workload.depth {
            let (file, place) = (next % nodes.len(), next / nodes.len());
            next += 1;
            let ticket = match workload.ask {
                Ask::Getattr => fuse.submit_getattr(nodes[file]),
                Ask::Lookup => fuse.submit_lookup(ROOT_ID, name(file).as_bytes()),
                Ask::Read(size) => {
                    let offset = place * size % FILE_SIZE;
                    fuse.submit_read(nodes[file], 0, offset as u64, size)
                }
                Ask::List(_) => None,
            };
            tickets.push(ticket.context("the ring is full")?);
        }
        fuse.flush();
        for ticket in tickets {
            let reply = fuse.wait(ticket, Duration::from_secs(60))?;
            reply.result()?;
            fuse.recycle(reply);
            done += 1;
        }
    }
    Ok(done)
}

/// Starts the daemon by `wrapper`, does the workload, and ends it; returns how much was done.
fn run(
    image: &Image,
    dir: &Path,
    wrapper: &str,
    workload: &Workload,
    batches: usize,
) -> Result<u64> {
    let script = dir.join("wrapper");
    let mut launch: Launch = image.launch(dir);
    let program = std::mem::replace(&mut launch.program, script.clone());
    fs::write(&script, format!("#!/bin/sh\nexec {wrapper} {} \"$@\"\n", program.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    launch.log_level = "warn".into();
    let daemon: Daemon = launch.spawn()?;
    let mut vm = daemon.boot(VmConfig::default())?;
    let mut fuse = vm.fuse(1);
    fuse.init()?;
    fuse.shape = workload.shape;
    let nodes = image.nodes(&mut fuse)?;
    if matches!(workload.ask, Ask::Read(_)) {
        for &node in &nodes {
            for offset in (0..FILE_SIZE).step_by(1 << 20) {
                let ticket = fuse.submit_read(node, 0, offset as u64, 1 << 20);
                let ticket = ticket.context("the ring is full")?;
                fuse.flush();
                let reply = fuse.wait(ticket, Duration::from_secs(60))?;
                fuse.recycle(reply);
            }
        }
    }
    let done = work(&mut fuse, &nodes, workload, batches)?;
    drop(fuse);
    drop(vm);
    daemon.terminate(Duration::from_secs(60))?;
    Ok(done)
}

/// Instructions that callgrind counted in one run, and how much was done.
fn instructions(
    image: &Image,
    dir: &Path,
    workload: &Workload,
    batches: usize,
    out: &Path,
) -> Result<(u64, u64)> {
    let wrapper = format!("valgrind --tool=callgrind --callgrind-out-file={}", out.display());
    let done = run(image, dir, &wrapper, workload, batches)?;
    let text = fs::read_to_string(out).context("callgrind wrote nothing")?;
    let total = text.lines().find_map(|line| line.strip_prefix("summary: "));
    let total = total.or_else(|| text.lines().find_map(|line| line.strip_prefix("totals: ")));
    Ok((total.context("callgrind counted nothing")?.trim().parse()?, done))
}

/// System calls by name in one run, and how much was done.
fn calls(
    image: &Image,
    dir: &Path,
    workload: &Workload,
    batches: usize,
) -> Result<(BTreeMap<String, u64>, u64)> {
    let out = dir.join("strace");
    let wrapper = format!("strace -D -f -c -U name,calls -o {}", out.display());
    let _ = fs::remove_file(&out);
    let done = run(image, dir, &wrapper, workload, batches)?;
    // Written by strace when the daemon has ended.
    let deadline = Instant::now() + Duration::from_secs(10);
    let text = loop {
        let text = fs::read_to_string(&out).unwrap_or_default();
        if text.contains("\ntotal") {
            break text;
        }
        ensure!(Instant::now() < deadline, "strace wrote nothing");
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(Ok(count))) = (words.next(), words.next().map(str::parse)) {
            counts.insert(name.to_owned(), count);
        }
    }
    counts.remove("total");
    Ok((counts, done))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let scratch = tempfile::tempdir()?;
    let dir = scratch.path().join("image");
    fs::create_dir(&dir)?;
    let image = Image::build(&dir, FILES, FILE_SIZE as u64, 1 << 20, "none")?;
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["warm request", "instructions", "system calls"]);
    for workload in WORKLOADS.iter().filter(|w| w.name.contains(&args.only)) {
        let few = workload.batches;
        let many = 5 * few;
        let short = name_of(workload.name);
        let out = |what: &str| match &args.keep {
            Some(keep) => keep.join(format!("callgrind.{short}.{what}")),
            None => scratch.path().join("callgrind"),
        };
        let (base, base_done) = instructions(&image, &dir, workload, few, &out("few"))?;
        let (more, more_done) = instructions(&image, &dir, workload, many, &out("many"))?;
        ensure!(more_done > base_done, "{}: nothing was done", workload.name);
        let per = more.saturating_sub(base) as f64 / (more_done - base_done) as f64;
        let (before, base_done) = calls(&image, &dir, workload, few)?;
        let (after, more_done) = calls(&image, &dir, workload, many)?;
        let mut shares = Vec::new();
        for (name, count) in after {
            let less = before.get(&name).copied().unwrap_or(0);
            let share = count.saturating_sub(less) as f64 / (more_done - base_done) as f64;
            if share >= 0.005 {
                shares.push(format!("{share:.2} {name}"));
            }
        }
        table.add_row([workload.name.to_owned(), format!("{per:.0}"), shares.join(", ")]);
    }
    for column in table.column_iter_mut().skip(1).take(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    writeln!(std::io::stdout(), "{table}").context("writing the results")
}

/// A name as a part of a file's name.
fn name_of(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}
