//! Cold workloads: bytes come from elsewhere, and others do or do not wait for them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::load::{Anywhere, InOrder, Load, Next, Opened, Places, Reads, drive};
use super::report::{Case, Contender, Family, Measures, Series, alternate, by_measure};
use super::subject::{Program, Served, Tree};
use crate::support::fault_registry::{Fault, FaultRegistry};
use crate::support::fuse_client::{Fuse, Reply};

const BLOCK: usize = 128 << 10;

/// The daemons that have anything to fetch.
const PROGRAMS: [Program; 2] = [Program::Rafsd, Program::Nydusd];

/// Reads all files of an image whose blob lies in a local directory, with an empty cache.
fn read_all(program: Program, tree: &Tree, dir: &Path) -> Result<Option<Measures>> {
    let launch = program.launch(&tree.bootstrap, &tree.blobs, dir)?;
    let _ = fs::remove_dir_all(&launch.work_dir);
    let mut served = Served::of(program, launch.spawn()?)?;
    let all: Vec<usize> = (0..tree.files.len()).collect();
    let files = served.nodes(tree, &all)?;
    let places = InOrder::new(files.iter().map(|file| file.size), BLOCK, None);
    let (outcome, cpu) = served.drive(8, &mut Reads::new(&files, places, BLOCK))?;
    let gib = outcome.bytes as f64 / (1u64 << 30) as f64;
    Ok(Some(vec![
        ("MiB/s", gib * 1024.0 / outcome.time.as_secs_f64()),
        ("CPU s/GiB", cpu.as_secs_f64() / gib),
    ]))
}

/// All files of the Debian tree, by compressor.
pub fn sequential(runs: usize, tree: &Tree, scratch: &Path) -> Result<Family> {
    let mut cases = Vec::new();
    for compressor in ["zstd", "none"] {
        let dir = scratch.join(format!("cold-{compressor}"));
        fs::create_dir(&dir)?;
        let tree = Tree::of(tree.root.clone(), &dir, &["--compressor", compressor])?;
        let contenders = PROGRAMS.map(|program| {
            let (tree, dir) = (&tree, &dir);
            Contender::new(program.name(), move || read_all(program, tree, dir))
        });
        let all = alternate(contenders.into_iter().collect(), runs)?;
        cases.push(Case { name: format!("{compressor}, depth 8"), all });
        fs::remove_dir_all(&dir)?;
    }
    Ok(Family {
        name: "cold reads",
        what: "All files of the tree in order, READs of 128 KiB, an empty cache; the blob is a local file in the page \
               cache. So this is what fetching, decompressing, verifying and writing to the cache cost."
            .into(),
        lead: ("MiB/s", true),
        cost: Some("CPU s/GiB"),
        cases,
    })
}

/// Reads of 4 KiB from a cached file and GETATTRs in turns, until a time.
struct Warm<'a> {
    file: Opened,
    places: Anywhere,
    reading: bool,
    sent: Instant,
    waits: &'a mut Vec<Duration>,
}

impl Load for Warm<'_> {
    fn next(&mut self, fuse: &mut Fuse, _: usize, answer: Option<&Reply>) -> Next {
        if let Some(reply) = answer {
            self.waits.push(self.sent.elapsed());
            reply.result()?;
        }
        let Some((_, offset)) = self.places.next() else { return Ok(None) };
        self.reading = !self.reading;
        self.sent = Instant::now();
        let Opened { node, fh, .. } = self.file;
        let ticket = if self.reading {
            fuse.submit_read(node, fh, offset, 4096)
        } else {
            fuse.submit_getattr(node)
        };
        ticket.context("a full ring").map(Some)
    }

    fn done(&self) -> (u64, u64) {
        (self.waits.len() as u64, 0)
    }
}

/// One task of a warm load, the others of a cold one.
struct Beside<A, B>(A, B);

impl<A: Load, B: Load> Load for Beside<A, B> {
    fn next(&mut self, fuse: &mut Fuse, task: usize, answer: Option<&Reply>) -> Next {
        match task {
            0 => self.0.next(fuse, 0, answer),
            _ => self.1.next(fuse, task - 1, answer),
        }
    }

    fn done(&self) -> (u64, u64) {
        self.0.done()
    }
}

/// Files one after the other until a time, then no more.
struct Until(InOrder, Instant);

impl Places for Until {
    fn next(&mut self) -> Option<(usize, u64)> {
        if Instant::now() < self.1 { self.0.next() } else { None }
    }
}

/// p50 and p99 in microseconds; those of no answer at all are infinite.
fn shares(mut waits: Vec<Duration>) -> (f64, f64) {
    waits.sort();
    let Some(last) = waits.len().checked_sub(1) else { return (f64::INFINITY, f64::INFINITY) };
    let at = |share: usize| waits[last * share / 100].as_secs_f64() * 1e6;
    (at(50), at(99))
}

/// How long one warm request at a time takes: alone, beside one cold stream, beside reads that hang.
fn beside(
    program: Program,
    tree: &Tree,
    registry: &FaultRegistry,
    dir: &Path,
) -> Result<Option<Measures>> {
    const TIME: Duration = Duration::from_millis(700);
    registry.set(Fault::None);
    registry.link(Duration::from_millis(20), Some(50 << 20));
    let backend = json!({"scheme": "http", "host": registry.host(), "repo": "r", "timeout": 60});
    let launch = program.launch(&tree.bootstrap, &tree.blobs, dir)?.backend("registry", backend);
    let _ = fs::remove_dir_all(&launch.work_dir);
    let mut served = Served::of(program, launch.spawn()?)?;
    let large = tree.large();
    let warm = served.open(tree, large[0])?;
    let cold = large[1..].iter().map(|file| served.open(tree, *file));
    let cold: Vec<Opened> = cold.collect::<Result<_>>()?;
    let fuse = &mut served.queues[0];
    // 1 MiB of the first file is warm from here on.
    let warm = Opened { size: 1 << 20, ..warm };
    for block in 0..(1 << 20) / BLOCK {
        fuse.read(warm.node, warm.fh, (block * BLOCK) as u64, BLOCK)?;
    }
    let load = |waits| Warm {
        file: warm,
        places: Anywhere::new([warm.size].into_iter(), 4096, 5, Instant::now() + TIME),
        reading: false,
        sent: Instant::now(),
        waits,
    };
    let (mut alone, mut stream, mut hanging) = (Vec::new(), Vec::new(), Vec::new());
    drive(fuse, 1, &mut load(&mut alone))?;
    let (near, far) = cold.split_at(cold.len() / 2);
    let places = InOrder::new(near.iter().map(|file| file.size), BLOCK, None);
    let reads = Reads::new(near, Until(places, Instant::now() + TIME), BLOCK);
    drive(fuse, 2, &mut Beside(load(&mut stream), reads))?;
    registry.set(Fault::Hang);
    for file in far.iter().take(32) {
        fuse.submit_read(file.node, file.fh, 0, 4096).context("a full ring")?;
    }
    fuse.flush();
    // Gives the daemon time to reach the registry; whether it answers anything after that is the question.
    std::thread::sleep(Duration::from_millis(200));
    let ticket = fuse.submit_getattr(warm.node).context("a full ring")?;
    fuse.flush();
    if let Ok(reply) = fuse.wait(ticket, Duration::from_secs(2)) {
        fuse.recycle(reply);
        drive(fuse, 1, &mut load(&mut hanging))?;
    }
    registry.set(Fault::None);
    let (alone, stream, hanging) = (shares(alone), shares(stream), shares(hanging));
    Ok(Some(vec![
        ("alone p50 µs", alone.0),
        ("alone p99", alone.1),
        ("beside a stream p50", stream.0),
        ("beside a stream p99", stream.1),
        ("beside hanging reads p50", hanging.0),
        ("beside hanging reads p99", hanging.1),
    ]))
}

/// The text of the section, and its rows.
pub fn stall(runs: usize, tree: &Tree, scratch: &Path) -> Result<(String, Vec<Series>)> {
    let dir = scratch.join("stall");
    fs::create_dir(&dir)?;
    let registry = FaultRegistry::start(&tree.blobs)?;
    let contenders = PROGRAMS.map(|program| {
        let (dir, registry) = (&dir, &registry);
        Contender::new(program.name(), move || beside(program, tree, registry, dir))
    });
    let all = alternate(contenders.into_iter().collect(), runs)?;
    let text = format!(
        "### waiting beside others\n\nOne request at a time, READs of 4 KiB of a cached file and GETATTRs in turns, on one \
         queue: alone; beside one cold stream of READs of 128 KiB over a registry with 20 ms and 50 MiB/s; beside 32 READs \
         whose registry has stopped to answer. ∞: no answer within two seconds.\n\n{}\n",
        by_measure("daemon", &all)
    );
    Ok((text, all))
}
