//! Warm workloads: everything is in caches, no byte comes from elsewhere.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::limits::{Files, round_trips, small_files};
use super::load::{Anywhere, InOrder, Opened, Outcome, Places, SmallFiles, Stat, Walk};
use super::report::{
    Case, Contender, Family, LIMIT_COPY, LIMIT_FILES, LIMIT_PREADV, LIMIT_ROUND_TRIP, Measures,
    alternate,
};
use super::subject::{Program, Served, Tree};
use super::{Settings, say};

const KIB: usize = 1 << 10;

/// What [`Warm::measure`] knows.
pub const WARM: [&str; 5] = ["walk", "stat", "random", "sequential", "small"];

/// All daemons, each with a guest, and the tree that they serve.
pub struct Warm<'a> {
    settings: &'a Settings,
    tree: &'a Tree,
    served: Vec<Served>,
    files: Files,
}

fn per_second(count: u64, outcome: &Outcome) -> f64 {
    count as f64 / outcome.time.as_secs_f64()
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Units of an outcome by the second, CPU time for each; how long single ones took.
fn figures(
    (outcome, cpu): (Outcome, Duration),
    rate: &'static str,
    cost: &'static str,
) -> Option<Measures> {
    let mut measures = vec![
        (rate, per_second(outcome.units, &outcome)),
        (cost, micros(cpu) / outcome.units as f64),
        ("MiB/s", per_second(outcome.bytes, &outcome) / (1 << 20) as f64),
        ("CPU s/GiB", cpu.as_secs_f64() * (1 << 30) as f64 / outcome.bytes.max(1) as f64),
    ];
    if let Some(last) = outcome.waits.len().checked_sub(1) {
        let at = |share: usize| micros(outcome.waits[last * share / 100]);
        measures.extend([("p50 µs", at(50)), ("p99 µs", at(99))]);
    }
    Some(measures)
}

impl<'a> Warm<'a> {
    /// Starts the daemons one after the other and has each serve everything once.
    pub fn start(settings: &'a Settings, tree: &'a Tree, dir: &Path) -> Result<Warm<'a>> {
        let mut served = Vec::new();
        for program in Program::ALL {
            let start = Instant::now();
            served.push(Served::start(program, tree, dir)?);
            say(format!("{} has served everything once: {:.1?}", program.name(), start.elapsed()));
        }
        Ok(Warm { settings, tree, served, files: Files::open(tree)? })
    }

    /// One case: every daemon in turns with the limits.
    fn case<'s>(
        &'s mut self,
        name: String,
        run: impl Fn(&mut Served, &Tree) -> Result<Option<Measures>> + Copy + 's,
        limits: impl FnOnce(&'s mut Files, &'s Tree) -> Vec<Contender<'s>>,
    ) -> Result<Case> {
        let tree = self.tree;
        let daemons = self
            .served
            .iter_mut()
            .map(|served| Contender::new(served.program.name(), move || run(&mut *served, tree)));
        let mut contenders: Vec<Contender<'_>> = daemons.collect();
        contenders.extend(limits(&mut self.files, tree));
        let all = alternate(contenders, self.settings.runs)?;
        Ok(Case { name, all })
    }

    /// One of [`WARM`].
    pub fn measure(&mut self, name: &str) -> Result<Vec<Family>> {
        match name {
            "walk" => Ok(vec![self.walk()?]),
            "stat" => Ok(vec![self.stat()?]),
            "random" => self.random(),
            "sequential" => Ok(vec![self.sequential()?]),
            _ => Ok(vec![self.small()?]),
        }
    }

    /// Requests in flight where metadata is asked for.
    fn depths(&self) -> &'static [usize] {
        if self.settings.quick { &[8] } else { &[1, 8] }
    }

    fn walk(&mut self) -> Result<Family> {
        let mut cases = Vec::new();
        for &depth in self.depths() {
            let run = move |served: &mut Served, _: &Tree| {
                let mut walk = Walk::new();
                let outcome = served.drive(depth, &mut walk)?;
                served.forget(&walk.known)?;
                Ok(figures(outcome, "entries/s", "CPU µs/entry"))
            };
            cases.push(self.case(format!("depth {depth}"), run, |_, _| Vec::new())?);
        }
        Ok(Family {
            name: "walk",
            what: "Every directory once: OPENDIR and RELEASEDIR where the server wants them, READDIRPLUS with 32 KiB \
                   until it is empty. Lookups are forgotten between two runs."
                .into(),
            lead: ("entries/s", true),
            cost: Some("CPU µs/entry"),
            cases,
        })
    }

    fn stat(&mut self) -> Result<Family> {
        let mut cases = Vec::new();
        let step = if self.settings.quick { 4 } else { 1 };
        for &depth in self.depths() {
            let run = move |served: &mut Served, tree: &Tree| {
                let names: Vec<_> = served.names(tree)?.into_iter().step_by(step).collect();
                let mut stat = Stat::new(&names);
                let outcome = served.drive(depth, &mut stat)?;
                let known = stat.known;
                served.forget(&known)?;
                Ok(figures(outcome, "requests/s", "CPU µs/request"))
            };
            cases.push(self.case(format!("depth {depth}"), run, |_, _| Vec::new())?);
        }
        Ok(Family {
            name: "stat",
            what: "LOOKUP and GETATTR of every name once. Lookups are forgotten between two runs."
                .into(),
            lead: ("requests/s", true),
            cost: Some("CPU µs/request"),
            cases,
        })
    }

    fn large(served: &mut Served, tree: &Tree) -> Result<Vec<Opened>> {
        tree.large().into_iter().map(|file| served.open(tree, file)).collect()
    }

    /// READs of `block` bytes; `places` gives a queue its own for files of these sizes.
    fn reads<P: Places + Send>(
        &mut self,
        (block, depth, queues): (usize, usize, usize),
        places: impl Fn(&[u64], usize) -> P + Copy,
        round_trip: Duration,
    ) -> Result<Case> {
        let sizes = large_sizes(self.tree);
        let of_limits = sizes.clone();
        let run = |served: &mut Served, tree: &Tree| {
            if served.queues.len() < queues || served.max_read < block {
                return Ok(None);
            }
            let files = Warm::large(served, tree)?;
            let each = (0..queues).map(|queue| places(&sizes, queue)).collect();
            Ok(figures(served.read(&files, block, depth, each)?, "requests/s", "CPU µs/request"))
        };
        let name = named(block, depth, queues);
        self.case(name, run, |files, _| {
            limits(files, queues, block, depth, move || places(&of_limits, 0), round_trip)
        })
    }

    fn random_case(&mut self, block: usize, depth: usize, queues: usize) -> Result<Case> {
        let time = self.settings.time;
        let places = move |sizes: &[u64], seed: usize| {
            let end = Instant::now() + time;
            Anywhere::new(sizes.iter().copied(), block, seed as u64, end)
        };
        self.reads((block, depth, queues), places, time)
    }

    /// Random reads, and the time that single ones take.
    fn random(&mut self) -> Result<Vec<Family>> {
        let mut cases = Vec::new();
        let blocks: &[usize] = if self.settings.quick { &[4] } else { &[4, 64, 128] };
        for &block in blocks {
            for depth in [1, 8, 32] {
                cases.push(self.random_case(block * KIB, depth, 1)?);
            }
        }
        cases.push(self.random_case(4 * KIB, 32, 2)?);
        let single = cases.iter().filter(|case| case.name.ends_with("depth 1")).cloned().collect();
        let random = Family {
            name: "random reads",
            what:
                "READs at random multiples of their size, in files of 1 MiB and more. With two queues, each has a \
                   thread of the guest and half of the requests."
                    .into(),
            lead: ("requests/s", true),
            cost: Some("CPU µs/request"),
            cases,
        };
        let latency = Family {
            name: "latency",
            what: "The same READs one at a time; the guest sleeps until the answer, but for that of `rafsd, polling`."
                .into(),
            lead: ("p50 µs", false),
            cost: Some("p99 µs"),
            cases: single,
        };
        Ok(vec![random, latency])
    }

    fn sequential(&mut self) -> Result<Family> {
        let mut cases = Vec::new();
        let blocks: &[usize] =
            if self.settings.quick { &[128, 1024] } else { &[4, 16, 64, 128, 256, 1024] };
        let depths: &[usize] = if self.settings.quick { &[8] } else { &[1, 8, 32] };
        for queues in [1, 2] {
            for block in blocks.iter().map(|kib| kib * KIB) {
                for &depth in depths.iter().filter(|depth| **depth >= queues) {
                    if queues == 2 && (self.settings.quick || block == 16 * KIB) {
                        continue;
                    }
                    cases.push(self.sequential_case(block, depth, queues)?);
                }
            }
        }
        Ok(Family {
            name: "sequential reads",
            what: "One file of 1 MiB and more after the other, in READs of one size. With two queues each has its own \
                   files."
                .into(),
            lead: ("MiB/s", true),
            cost: Some("CPU s/GiB"),
            cases,
        })
    }

    fn sequential_case(&mut self, block: usize, depth: usize, queues: usize) -> Result<Case> {
        let time = self.settings.time;
        // Queues begin at different files: what is before is empty to them.
        let places = move |sizes: &[u64], queue: usize| {
            let from = sizes.len() * queue / queues;
            let own = sizes.iter().enumerate().map(|(at, size)| if at < from { 0 } else { *size });
            InOrder::new(own.collect::<Vec<_>>().into_iter(), block, Some(Instant::now() + time))
        };
        self.reads((block, depth, queues), places, Duration::ZERO)
    }

    fn small(&mut self) -> Result<Family> {
        let mut cases = Vec::new();
        let step = if self.settings.quick { 4 } else { 1 };
        for &depth in self.depths() {
            let run = move |served: &mut Served, tree: &Tree| {
                let small: Vec<usize> = tree.small().into_iter().step_by(step).collect();
                let nodes = served.nodes(tree, &small)?;
                let outcome = served.drive(depth, &mut SmallFiles::new(&nodes))?;
                Ok(figures(outcome, "files/s", "CPU µs/file"))
            };
            cases.push(self.case(format!("depth {depth}"), run, |_, tree| {
                let files: Vec<usize> = tree.small().into_iter().step_by(step).collect();
                let run = move || Ok(figures(small_files(tree, &files)?, "files/s", "CPU µs/file"));
                vec![Contender::new(LIMIT_FILES, run)]
            })?);
        }
        Ok(Family {
            name: "small files",
            what: "Every file of up to 64 KiB once, in no order: OPEN and RELEASE where the server wants them, one READ \
                   of all of it."
                .into(),
            lead: ("files/s", true),
            cost: Some("CPU µs/file"),
            cases,
        })
    }
}

fn large_sizes(tree: &Tree) -> Vec<u64> {
    tree.large().into_iter().map(|file| tree.files[file].1).collect()
}

fn named(block: usize, depth: usize, queues: usize) -> String {
    let size = match block / KIB {
        1024 => "1 MiB".into(),
        kib => format!("{kib} KiB"),
    };
    let queues = if queues == 1 { String::new() } else { format!(", {queues} queues") };
    format!("{size}{queues}, depth {depth}")
}

/// What the machine does with the same reads; round trips of eventfds where one is asked for at a time.
fn limits<'s, P: Places>(
    files: &'s mut Files,
    queues: usize,
    block: usize,
    depth: usize,
    places: impl Fn() -> P + Clone + 's,
    round_trip: Duration,
) -> Vec<Contender<'s>> {
    let mut all = Vec::new();
    if queues == 1 {
        let files = std::rc::Rc::new(std::cell::RefCell::new(files));
        let (also, places_too) = (files.clone(), places.clone());
        all.push(Contender::new(LIMIT_PREADV, move || {
            let outcome = files.borrow_mut().preadv(places(), block, depth)?;
            Ok(figures(outcome, "requests/s", "CPU µs/request"))
        }));
        all.push(Contender::new(LIMIT_COPY, move || {
            let outcome = also.borrow_mut().copy(places_too(), block, depth)?;
            Ok(figures(outcome, "requests/s", "CPU µs/request"))
        }));
    }
    if depth == 1 && !round_trip.is_zero() {
        all.push(Contender::new(LIMIT_ROUND_TRIP, move || {
            let (outcome, cpu) = round_trips(round_trip)?;
            let mut measures = figures((outcome, cpu), "requests/s", "CPU µs/request");
            measures.iter_mut().for_each(|measures| {
                measures.retain(|(name, _)| name.ends_with("p50 µs") || name.ends_with("p99 µs"));
            });
            Ok(measures)
        }));
    }
    all
}
