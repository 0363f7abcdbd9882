//! Benchmarks: what a guest waits for, of rafsd and its peers, measured from our own front end.
//!
//! Run by `scripts/bench`. Daemons and limits take turns within each workload; what comes out are medians, how far
//! runs were apart, and ratios. The load generator shares the machine with the daemon, so the CPU time that a daemon
//! needs for a request says more than how many requests it answers. A run of everything writes its results into
//! `docs/benchmarks.md`.

#[path = "bench/bars.rs"]
mod bars;
#[path = "bench/cold.rs"]
mod cold;
#[path = "bench/cold_start.rs"]
mod cold_start;
#[path = "bench/dax.rs"]
mod dax;
#[path = "bench/growth.rs"]
mod growth;
#[path = "bench/guest.rs"]
mod guest;
#[path = "bench/limits.rs"]
mod limits;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/pieces.rs"]
mod pieces;
#[path = "bench/plot.rs"]
mod plot;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/subject.rs"]
mod subject;
mod support;
#[path = "bench/warm.rs"]
mod warm;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use plot::Groups;
use report::{Case, Family, Series};
use subject::Tree;
use support::parts::{Parts, run};
use support::say;
use warm::{WARM, Warm};

/// Measures rafsd, its peers and the limits of this machine, in turns, and prints tables of medians.
#[derive(Parser)]
struct Args {
    /// Two minutes for a change at hand: fewer workloads, three runs, nothing is written to docs/.
    #[arg(long)]
    quick: bool,
    /// Only these sections, separated by commas: walk, stat, random, sequential, small, cold-reads, cold-start, stall,
    /// files, blobs, images, guest, dax. Nothing is written to docs/.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Runs of each contender (default 5, quick 3).
    #[arg(long)]
    runs: Option<usize>,
    /// Seconds per run of the workloads that last as long as one wants (default 0.4, quick 0.3).
    #[arg(long)]
    seconds: Option<f64>,
    /// Numbers of files of the generated images (default 10000,100000,1000000, quick 10000).
    #[arg(long, value_delimiter = ',')]
    files: Option<Vec<usize>>,
    /// Passed by `cargo bench`; changes nothing.
    #[arg(long, hide = true)]
    bench: bool,
}

/// How to measure.
pub struct Settings {
    pub quick: bool,
    pub only: Vec<String>,
    pub runs: usize,
    /// Of a run that lasts as long as one wants.
    pub time: Duration,
    pub files: Vec<usize>,
}

impl Settings {
    fn wants(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == section)
    }
}

/// Between these lines `docs/benchmarks.md` is written by this program.
const BEGIN: &str = "<!-- scripts/bench writes from here -->";
const END: &str = "<!-- scripts/bench writes to here -->";

/// What came out.
#[derive(Default)]
struct Results {
    text: String,
    families: Vec<Family>,
    /// By section.
    rows: HashMap<&'static str, Vec<Series>>,
}

impl Results {
    /// Goes to standard output at once; progress goes to standard error.
    fn say(&mut self, section: &str) -> Result<()> {
        self.text += section;
        self.text += "\n";
        writeln!(std::io::stdout(), "{section}").context("writing the results")
    }

    fn add(&mut self, families: Vec<Family>) -> Result<()> {
        for family in families {
            self.say(&family.section())?;
            self.families.push(family);
        }
        Ok(())
    }

    fn add_rows(&mut self, name: &'static str, text: &str, rows: Vec<Series>) -> Result<()> {
        self.rows.insert(name, rows);
        self.say(text)
    }

    fn case(&self, family: &str, case: &str) -> Option<&Case> {
        let family = self.families.iter().find(|known| known.name == family)?;
        family.cases.iter().find(|known| known.name == case)
    }

    fn rows(&self, section: &str) -> Option<&[Series]> {
        self.rows.get(section).map(Vec::as_slice)
    }

    /// Replaces what an earlier run left in `docs/`.
    fn write(&self) -> Result<()> {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
        let path = docs.join("benchmarks.md");
        let old = fs::read_to_string(&path)?;
        let (before, rest) = old.split_once(BEGIN).context("no line to write from")?;
        let (_, after) = rest.split_once(END).context("no line to write to")?;
        fs::write(&path, format!("{before}{BEGIN}\n\n{}{END}{after}", self.text))?;
        let rate = self.ratios(|family| Some(family.lead.0), true);
        let title = "requests per second, those of rafsd = 1: longer is faster";
        plot::bars(&docs.join("benchmarks-rate.svg"), title, &rate, 3.0)?;
        let cost = self.ratios(|family| family.cost, false);
        let title = "CPU time for the same work, that of rafsd = 1: shorter is cheaper";
        plot::bars(&docs.join("benchmarks-cost.svg"), title, &cost, 10.0)?;
        say(format!("written to {}", docs.display()));
        Ok(())
    }

    /// A few cases, each contender's value by ours; limits only where they are of the same kind of work.
    fn ratios(&self, column: impl Fn(&Family) -> Option<&'static str>, limits: bool) -> Groups {
        const SHOWN: [(&str, &str); 8] = [
            ("walk", "depth 8"),
            ("stat", "depth 8"),
            ("random reads", "4 KiB, depth 1"),
            ("random reads", "4 KiB, depth 32"),
            ("random reads", "64 KiB, depth 8"),
            ("sequential reads", "128 KiB, depth 8"),
            ("sequential reads", "1 MiB, depth 32"),
            ("small files", "depth 8"),
        ];
        let group = |(name, case): &(&str, &str)| {
            let family = self.families.iter().find(|family| family.name == *name)?;
            let (column, case) = (column(family)?, self.case(name, case)?);
            let ours = case.median(report::OURS, column)?;
            let shown = case.all.iter().filter(|series| {
                let limit = series.contender.starts_with("limit");
                !limit || (limits && case.name != "4 KiB, depth 1")
            });
            let bars = shown.filter_map(|series| {
                Some((series.contender.clone(), series.median(column)? / ours))
            });
            Some((format!("{name}, {}", case.name), bars.collect()))
        };
        SHOWN.iter().filter_map(group).collect()
    }
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

/// First line that a program says about its version.
fn version(program: &Path) -> Result<String> {
    let text = String::from_utf8(run(Command::new(program).arg("--version"))?)?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn versions() -> Result<String> {
    let parts = Parts::install(&["virtiofsd"])?;
    Ok(format!(
        "rafsd {}, nydusd of nydus-rs 2.2.0, {}; {}",
        env!("CARGO_PKG_VERSION"),
        version(&parts.path("virtiofsd")?)?,
        machine()
    ))
}

/// Everything but the warm workloads, which share their daemons, in the order of the page.
const OTHERS: [&str; 8] =
    ["cold-reads", "cold-start", "stall", "files", "blobs", "images", "guest", "dax"];

/// Measures the sections that are wanted, one after the other.
fn measure(settings: &Settings, scratch: &Path, results: &mut Results) -> Result<()> {
    let dir = scratch.join("tree-and-image");
    fs::create_dir(&dir)?;
    let start = Instant::now();
    let tree = Tree::debian(&dir)?;
    let (names, mb) = (tree.names.len(), tree.bytes / 1_000_000);
    say(format!("{names} entries, {mb} MB, an image of it: {:.1?}", start.elapsed()));
    if WARM.iter().any(|name| settings.wants(name)) {
        let mut warm = Warm::start(settings, &tree, &dir)?;
        for name in WARM.iter().filter(|name| settings.wants(name)) {
            let start = Instant::now();
            results.add(warm.measure(name).with_context(|| (*name).to_owned())?)?;
            say(format!("{name}: {:.1?}", start.elapsed()));
        }
    }
    let few = settings.runs.min(3);
    for name in OTHERS.iter().filter(|name| settings.wants(name)) {
        let start = Instant::now();
        let (text, rows) = match *name {
            "cold-reads" => {
                results.add(vec![cold::sequential(few, &tree, scratch).context(*name)?])?;
                continue;
            }
            "cold-start" => cold_start::measure(few, scratch),
            "stall" => cold::stall(few, &tree, scratch),
            "files" => growth::measure(settings, few, scratch),
            "blobs" => pieces::blobs(settings, few, scratch),
            "images" => pieces::images(few, &tree, scratch),
            // Boots of guests take their time.
            "dax" if settings.quick && settings.only.is_empty() => continue,
            "dax" => dax::measure(1, scratch),
            _ => guest::measure(few, &tree, scratch),
        }
        .with_context(|| (*name).to_owned())?;
        results.add_rows(name, &text, rows)?;
        say(format!("{name}: {:.1?}", start.elapsed()));
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let pick = |full, quick| if args.quick { quick } else { full };
    let settings = Settings {
        quick: args.quick,
        only: args.only,
        runs: args.runs.unwrap_or(pick(5, 3)),
        time: Duration::from_secs_f64(args.seconds.unwrap_or(if args.quick { 0.3 } else { 0.4 })),
        files: args.files.unwrap_or(if args.quick {
            vec![10_000]
        } else {
            vec![10_000, 100_000, 1_000_000]
        }),
    };
    ensure!(settings.runs > 0 && !settings.files.is_empty(), "nothing to do");
    for name in &settings.only {
        let known = WARM.iter().chain(&OTHERS).any(|section| section == name);
        ensure!(known, "no section is called '{name}'; see --help");
    }
    let scratch = tempfile::tempdir()?;
    let mut results = Results::default();
    results.say(&format!(
        "{}. Medians of {} runs ± half of the distance between the best and the worst.\n",
        versions()?,
        settings.runs
    ))?;
    measure(&settings, scratch.path(), &mut results)?;
    if let Some(goals) = bars::section(&results) {
        results.say(&goals)?;
    }
    if !settings.quick && settings.only.is_empty() {
        results.write()?;
    }
    Ok(())
}
