//! Benchmarks: what a guest waits for, of rafsd and its peers, measured from our own front end.
//!
//! Run by `scripts/bench`. Daemons and limits take turns within each workload; what comes out are medians, how far
//! runs were apart, and ratios. The load generator shares the machine with the daemon, so the CPU time that a daemon
//! needs for a request says more than how many requests it answers. A run of everything writes its results into
//! `docs/benchmarks.md`.

#[path = "bench/cold.rs"]
mod cold;
#[path = "bench/growth.rs"]
mod growth;
#[path = "bench/limits.rs"]
mod limits;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/subject.rs"]
mod subject;
mod support;
#[path = "bench/warm.rs"]
mod warm;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

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
    /// Only sections whose name contains this; nothing is written to docs/.
    #[arg(long, default_value = "")]
    only: String,
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
    pub only: String,
    pub runs: usize,
    /// Of a run that lasts as long as one wants.
    pub time: Duration,
    pub files: Vec<usize>,
}

impl Settings {
    fn wants(&self, section: &str) -> bool {
        section.contains(&self.only)
    }
}

/// Between these lines `docs/benchmarks.md` is written by this program.
const BEGIN: &str = "<!-- scripts/bench writes from here -->";
const END: &str = "<!-- scripts/bench writes to here -->";

/// What came out, section by section.
#[derive(Default)]
struct Results {
    text: String,
}

impl Results {
    /// Goes to standard output at once; progress goes to standard error.
    fn add(&mut self, section: &str) -> Result<()> {
        self.text += section;
        self.text += "\n";
        writeln!(std::io::stdout(), "{section}").context("writing the results")
    }

    /// Replaces what an earlier run left in `docs/benchmarks.md`.
    fn write(&self) -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks.md");
        let old = fs::read_to_string(&path)?;
        let (before, rest) = old.split_once(BEGIN).context("no line to write from")?;
        let (_, after) = rest.split_once(END).context("no line to write to")?;
        fs::write(&path, format!("{before}{BEGIN}\n\n{}{END}{after}", self.text))?;
        say(format!("written to {}", path.display()));
        Ok(())
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

fn warm(settings: &Settings, scratch: &Path, results: &mut Results) -> Result<()> {
    let dir = scratch.join("warm");
    fs::create_dir(&dir)?;
    let start = Instant::now();
    let tree = Tree::debian(&dir)?;
    say(format!(
        "{} entries, {} MB, an image of it: {:.1?}",
        tree.names.len(),
        tree.bytes / 1_000_000,
        start.elapsed()
    ));
    let mut warm = Warm::start(settings, &tree, &dir)?;
    for name in WARM.iter().filter(|name| settings.wants(name)) {
        let start = Instant::now();
        let measured = warm.measure(name).with_context(|| (*name).to_owned())?;
        say(format!("{name}: {:.1?}", start.elapsed()));
        for family in &measured {
            results.add(&family.section())?;
        }
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
    let scratch = tempfile::tempdir()?;
    let mut results = Results::default();
    results.add(&format!(
        "{}. Medians of {} runs ± half of the distance between the best and the worst.\n",
        versions()?,
        settings.runs
    ))?;
    if WARM.iter().any(|name| settings.wants(name)) {
        warm(&settings, scratch.path(), &mut results)?;
    }
    if settings.wants("files") {
        results.add(&growth::section(&growth::measure(&settings, scratch.path())?))?;
    }
    if settings.wants("cold-start") {
        results.add(&cold::measure(settings.runs, scratch.path())?)?;
    }
    if !settings.quick && settings.only.is_empty() {
        results.write()?;
    }
    Ok(())
}
