//! What grows with an image, and what does not: mount time, memory, a walk and single requests, by number of files.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::load::{Outcome, Stat, Walk, drive};
use super::report::{Contender, Measures, Series, alternate, by_measure, show};
use super::subject::Program;
use super::{Settings, say};
use crate::support::daemon::Launch;
use crate::support::fuse_abi::ROOT_ID;
use crate::support::image::create;
use crate::support::rng::Rng;

/// Files in a directory of the generated trees.
const PER_DIR: usize = 1000;

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// An image of small files, none like another, made of a tar: its bootstrap and the directory of its blob.
fn image(dir: &Path, files: usize) -> Result<(PathBuf, PathBuf)> {
    let (source, blobs, bootstrap) = (dir.join("tar"), dir.join("blobs"), dir.join("bootstrap"));
    fs::create_dir_all(&blobs)?;
    let mut tar = tar::Builder::new(BufWriter::new(File::create(&source)?));
    let mut rng = Rng::new(files as u64);
    for number in 0..files {
        let bytes = rng.bytes(8 + rng.clone().index(400));
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        let path = format!("d{:05}/f{number:07}", number / PER_DIR);
        tar.append_data(&mut header, path, bytes.as_slice())?;
    }
    tar.into_inner()?.flush()?;
    create(&[
        "-t".as_ref(),
        "tar-rafs".as_ref(),
        "-B".as_ref(),
        bootstrap.as_ref(),
        "-D".as_ref(),
        blobs.as_ref(),
        source.as_ref(),
    ])?;
    fs::remove_file(&source)?;
    Ok((bootstrap, blobs))
}

/// Names that are looked up in a run, spread over the whole tree.
const NAMES: usize = 20_000;

/// From the start of the daemon to the first answer, with an empty cache directory and a warm page cache; then
/// requests at depth 8.
fn measure_one(program: Program, launch: &Launch, files: usize) -> Result<Option<Measures>> {
    let _ = fs::remove_dir_all(&launch.work_dir);
    let start = Instant::now();
    let daemon = launch.spawn()?;
    let (_vm, mut queues) = program.guest(&daemon)?;
    let fuse = &mut queues[0];
    fuse.lookup(ROOT_ID, b"d00000").context("the first LOOKUP")?;
    let answer = start.elapsed();
    let (usage, cpu) = (daemon.usage(), daemon.cpu_time());
    let mut measures = vec![
        ("mount ms", ms(answer)),
        ("its CPU ms", ms(cpu)),
        ("RSS MiB", mib(usage.rss_kib)),
        ("of it anonymous", mib(usage.anon_kib)),
    ];
    let mut rng = Rng::new(3);
    let mut names = Vec::new();
    for _ in 0..NAMES {
        let number = rng.index(files);
        let parent = fuse.lookup(ROOT_ID, format!("d{:05}", number / PER_DIR).as_bytes())?;
        names.push((parent.nodeid, format!("f{number:07}").into_bytes()));
    }
    let ns = |outcome: &Outcome| outcome.time.as_secs_f64() * 1e9 / outcome.units as f64;
    let stat = drive(fuse, 8, &mut Stat::new(&names))?;
    let walk = drive(fuse, 8, &mut Walk::new())?;
    let usage = daemon.usage();
    measures.extend([
        ("stat ns/request", ns(&stat)),
        ("walk ns/entry", ns(&walk)),
        ("RSS after MiB", mib(usage.rss_kib)),
        ("of it anonymous after", mib(usage.anon_kib)),
    ]);
    Ok(Some(measures))
}

/// The text of the section, and its rows.
pub fn measure(settings: &Settings, runs: usize, scratch: &Path) -> Result<(String, Vec<Series>)> {
    let mut launches = Vec::new();
    for &files in &settings.files {
        let dir = scratch.join(format!("files-{files}"));
        fs::create_dir_all(&dir)?;
        let start = Instant::now();
        let (bootstrap, blobs) = image(&dir, files)?;
        say(format!("an image of {files} files was made in {:.1?}", start.elapsed()));
        for program in [Program::Rafsd, Program::Nydusd] {
            launches.push((program, program.launch(&bootstrap, &blobs, &dir)?, files));
        }
    }
    let contenders = launches.iter().map(|(program, launch, files)| {
        let name = format!("{}, {} files", program.name(), show(*files as f64));
        Contender::new(name, || measure_one(*program, launch, *files))
    });
    let all = alternate(contenders.collect(), runs)?;
    let text = format!(
        "### number of files\n\nGenerated trees of files of up to 400 bytes, {} in a directory; the cache directory is empty, \
         the page cache warm. *mount* goes from the start of the daemon to the answer to the first LOOKUP; then {} names \
         anywhere are looked up, and everything is walked, at depth 8. *RSS* includes the pages of the mapped bootstrap \
         that were touched, *anonymous* is what the daemon allocated.\n\n{}\n",
        show(PER_DIR as f64),
        show(NAMES as f64),
        by_measure("daemon", &all)
    );
    Ok((text, all))
}
