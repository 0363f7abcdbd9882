//! What it is worth, and what it costs, that a queue looks for the next request before it sleeps.
//!
//! Run by `scripts/bench polling`. One reader asks for 4 KiB anywhere in cached files, waits for the
//! answer, pauses, and asks again. For each pause and each `--busy-poll`: how long an answer takes, and
//! what it costs the daemon. The reader sleeps for the answer, or spins for it as KVM does for an idle
//! virtual processor (`halt_poll_ns`). The pauses are spent spinning, so that they are as long as they
//! say: two processors have to be idle.

mod support;

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use comfy_table::{CellAlignment, Table};
use support::frontend::VmConfig;
use support::image::Image;
use support::rng::Rng;

/// Measures busy-polling, and prints a table.
#[derive(Parser)]
struct Args {
    /// Runs of each kind, in turns; the table shows medians.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Passed by `cargo bench`; changes nothing.
    #[arg(long, hide = true)]
    bench: bool,
}

const POLLS: [&str; 4] = ["off", "auto", "50us", "200us"];
/// Microseconds.
const PAUSES: [u64; 7] = [0, 10, 20, 50, 100, 200, 1000];
const TIME: Duration = Duration::from_millis(400);
const IDLE: Duration = Duration::from_millis(1000);
const FILES: usize = 16;
const FILE_SIZE: usize = 1 << 20;

/// Microseconds to the answer (the median), and of the daemon's CPU time for each request.
type Cell = (f64, f64);

/// What one daemon did: a cell for each pause, and microseconds of its CPU time for a second without requests.
struct Row {
    cells: Vec<Cell>,
    idle: f64,
}

fn run(image: &Image, dir: &std::path::Path, poll: &str, spins: bool) -> Result<Row> {
    let mut launch = image.launch(dir).arg("--busy-poll").arg(poll);
    launch.log_level = "warn".into();
    let daemon = launch.spawn()?;
    let mut vm = daemon.boot(VmConfig::default())?;
    let mut fuse = vm.fuse(1);
    fuse.init()?;
    fuse.busy_poll = spins;
    let nodes = image.nodes(&mut fuse)?;
    for &node in &nodes {
        fuse.read_all(node, 1 << 20)?;
    }
    let mut rng = Rng::new(7);
    let mut cells = Vec::new();
    for pause in PAUSES {
        let mut waits = Vec::new();
        let (cpu, start) = (daemon.cpu_time(), Instant::now());
        while start.elapsed() < TIME {
            let (node, page) = (nodes[rng.index(FILES)], rng.index(FILE_SIZE / 4096));
            let sent = Instant::now();
            let ticket = fuse.submit_read(node, 0, page as u64 * 4096, 4096);
            let ticket = ticket.context("the ring is full")?;
            fuse.flush();
            let reply = fuse.wait(ticket, Duration::from_secs(10))?;
            waits.push(sent.elapsed());
            reply.result()?;
            fuse.recycle(reply);
            let next = Instant::now() + Duration::from_micros(pause);
            while Instant::now() < next {
                std::hint::spin_loop();
            }
        }
        let cpu = daemon.cpu_time() - cpu;
        waits.sort();
        let middle = waits[waits.len() / 2].as_secs_f64() * 1e6;
        cells.push((middle, cpu.as_secs_f64() * 1e6 / waits.len() as f64));
    }
    let cpu = daemon.cpu_time();
    std::thread::sleep(IDLE);
    let idle = (daemon.cpu_time() - cpu).as_secs_f64() * 1e6 / IDLE.as_secs_f64();
    Ok(Row { cells, idle })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let args = Args::parse();
    let scratch = tempfile::tempdir()?;
    let image = Image::build(scratch.path(), FILES, FILE_SIZE as u64, 1 << 20, "none")?;
    let kinds = [false, true].map(|spins| POLLS.map(|poll| (spins, poll))).concat();
    let mut rows: Vec<Vec<Row>> = kinds.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.runs.max(1) {
        for ((spins, poll), rows) in kinds.iter().zip(&mut rows) {
            rows.push(run(&image, scratch.path(), poll, *spins)?);
        }
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let pauses = PAUSES.iter().map(|pause| format!("pause {pause} µs"));
    let first = [String::from("p50 µs · CPU µs/request")].into_iter();
    table.set_header(first.chain(pauses).chain([String::from("idle, CPU µs/s")]));
    for ((spins, poll), runs) in kinds.iter().zip(&rows) {
        let guest = if *spins { "spins" } else { "sleeps" };
        let cells = (0..PAUSES.len()).map(|i| {
            let part = |part: fn(&Cell) -> f64| {
                median(runs.iter().map(|row| part(&row.cells[i])).collect())
            };
            format!("{:.1} · {:.1}", part(|cell| cell.0), part(|cell| cell.1))
        });
        let idle = format!("{:.0}", median(runs.iter().map(|row| row.idle).collect()));
        let name = format!("guest {guest}, --busy-poll {poll}");
        table.add_row([name].into_iter().chain(cells).chain([idle]));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    writeln!(std::io::stdout(), "{table}").context("writing the results")
}
