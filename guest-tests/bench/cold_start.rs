//! Cold start: how long a guest waits for the files of a program that nobody on the host has read,
//! over a link with a latency and a bandwidth.
//!
//! The image is a small Debian system with Python; the files are those that Python itself opens for
//! a few dozen modules, in this order, read whole in requests of 128 KiB by one reader who waits for
//! each: what is measured is how much of the waiting the daemon saves. The registry is the one of
//! the tests, in this process: all answers share the bandwidth. A run begins with the start of the
//! daemon and an empty cache, and ends with the last byte.

use std::collections::HashSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rafsd::rafs::Bootstrap;
use rafsd::rafs::id::{BlobIndex, ChunkIndex};
use serde_json::json;

use super::report::{Contender, Measures, Series, alternate, by_measure};
use super::subject::Program as Server;
use super::support::fault_registry::FaultRegistry;
use super::support::fuse_abi::ROOT_ID;
use super::support::image::create;
use super::support::parts::{Parts, run};

/// Files that are read.
const FILES: usize = 300;
const STEP: usize = 128 << 10;

/// What Python is to import; it prints the files that this took, in order.
const IMPORTS: &str = "
import sys, os
import json, logging, argparse, subprocess, tempfile, threading, datetime, decimal, hashlib, ssl
import asyncio, http.client, http.server, urllib.request, email.message, email.parser, sqlite3, csv
import xml.etree.ElementTree, concurrent.futures, multiprocessing, unittest, html.parser, zipfile
import tarfile, gzip, bz2, lzma, ctypes, uuid, logging.config, statistics, ftplib, smtplib, imaplib
import configparser, dataclasses, typing, pathlib, shutil, difflib, pdb, pickle, doctest, cProfile
import distutils.core, lib2to3.refactor, pydoc, wsgiref.simple_server, xmlrpc.client, zoneinfo
for name in ('yaml', 'pygments.lexers', 'pkg_resources', 'cryptography.x509', 'pip'):
    try: __import__(name)
    except Exception: pass
maps = [line.split()[-1] for line in open('/proc/self/maps') if '/' in line]
files = [os.path.realpath(sys.executable)]
files += [path for path in maps if '.so' in path and 'lib-dynload' not in path]
for module in list(sys.modules.values()):
    files.append(getattr(module, '__cached__', None) or getattr(module, '__file__', None))
for path in dict.fromkeys(os.path.realpath(path) for path in files if path):
    if os.path.isfile(path) and path.startswith('/usr/'): print(path)
";

/// How a daemon is told to fetch early.
#[derive(Clone, Copy)]
struct Variant {
    name: &'static str,
    list: bool,
    everything: bool,
}

const VARIANTS: [Variant; 3] = [
    Variant { name: "no prefetch", list: false, everything: false },
    Variant { name: "list", list: true, everything: false },
    Variant { name: "whole blob", list: false, everything: true },
];

/// The row of what no daemon can do without.
pub const LIMIT: &str = "limit: one answer, the bytes";

/// (name, latency, bytes per second)
const LINKS: [(&str, Duration, u64); 2] = [
    ("20 ms, 50 MiB/s", Duration::from_millis(20), 50 << 20),
    ("20 ms, 100 Mbit/s", Duration::from_millis(20), 12_500_000),
];

/// An image and the files that are read from it.
struct Program {
    bootstrap: PathBuf,
    blobs: PathBuf,
    files: Vec<String>,
    list: PathBuf,
    /// Stored bytes of the chunks that the files need, and how many they are.
    hot: (u64, usize),
}

impl Program {
    fn build(dir: &Path) -> Result<Program> {
        let rootfs = Parts::install(&["rootfs", "python"])?.path("rootfs")?;
        let python = Path::new("/usr/bin/python3");
        let output = run(Command::new(python).args(["-I", "-c", IMPORTS]))?;
        let files: Vec<String> =
            String::from_utf8(output)?.lines().take(FILES).map(str::to_owned).collect();
        let tree = dir.join("tree");
        run(Command::new("cp").arg("-a").arg(&rootfs).arg(&tree))?;
        let libraries = fs::read_dir("/usr/lib")?.flatten().map(|entry| entry.path());
        for library in libraries.filter(|p| p.to_string_lossy().contains("/python3")) {
            run(Command::new("cp").arg("-a").arg(&library).arg(tree.join("usr/lib")))?;
        }
        for file in &files {
            let to = tree.join(file.trim_start_matches('/'));
            if !to.exists() {
                fs::create_dir_all(to.parent().context("a directory")?)?;
                fs::copy(file, &to)?;
            }
        }
        let (bootstrap, blobs) = (dir.join("bootstrap"), dir.join("blobs"));
        fs::create_dir_all(&blobs)?;
        let arguments: [&Path; 5] =
            ["--bootstrap".as_ref(), &bootstrap, "--blob-dir".as_ref(), &blobs, &tree];
        create(&arguments.map(Path::as_os_str))?;
        fs::remove_dir_all(&tree)?;
        let list = dir.join("files");
        fs::write(&list, files.join("\n"))?;
        let hot = hot(&Bootstrap::open(&bootstrap)?, &files)?;
        let program = Program { bootstrap, blobs, files, list, hot };
        Ok(program)
    }
}

/// Stored bytes and number of the chunks of `files`.
fn hot(image: &Bootstrap, files: &[String]) -> Result<(u64, usize)> {
    let digests = image.chunk_digests(BlobIndex(0))?;
    let wanted: HashSet<&[u8]> = files.iter().map(|file| file.as_bytes()).collect();
    let (mut bytes, mut seen) = (0, HashSet::new());
    for item in image.walk() {
        let item = item?;
        if !wanted.contains(item.path().as_slice()) {
            continue;
        }
        for number in 0..item.inode.chunk_count() {
            let index = item.inode.chunk(number)?.chunk_index();
            if seen.insert(index) {
                let record = digests.record(ChunkIndex(index)).context("a chunk with a record")?;
                bytes += u64::from(record.compressed_size.get());
            }
        }
    }
    Ok((bytes, seen.len()))
}

fn start(
    server: Server,
    program: &Program,
    registry: &FaultRegistry,
    variant: Variant,
    dir: &Path,
) -> Result<Option<Measures>> {
    let backend = json!({"scheme": "http", "host": registry.host(), "repo": "python"});
    let mut launch = server.launch(&program.bootstrap, &program.blobs, dir)?;
    launch = launch.backend("registry", backend);
    if variant.list {
        launch = launch.arg("--prefetch-files").arg(&program.list);
    }
    if variant.list || variant.everything {
        launch.prefetch = Some(json!({"enable": true, "prefetch_all": variant.everything}));
    }
    let _ = fs::remove_dir_all(&launch.work_dir);
    registry.forget_seen();
    let begin = Instant::now();
    let daemon = launch.spawn()?;
    let (_vm, mut queues) = server.guest(&daemon)?;
    let fuse = &mut queues[0];
    let mut known: std::collections::HashMap<&str, u64> = std::collections::HashMap::new();
    for file in &program.files {
        // As a guest does: each directory is looked up once.
        let (mut node, mut end) = (ROOT_ID, 0);
        for part in file.split('/').filter(|part| !part.is_empty()) {
            end += part.len() + 1;
            node = match known.get(&file[..end]) {
                Some(node) => *node,
                None => {
                    let found = fuse.lookup(node, part.as_bytes()).with_context(|| file.clone())?;
                    *known.entry(&file[..end]).or_insert(found.nodeid)
                }
            };
        }
        fuse.read_all(node, STEP).with_context(|| file.clone())?;
    }
    let time = begin.elapsed();
    let cpu = daemon.cpu_time();
    drop(daemon);
    let (requests, bytes) = registry.served();
    Ok(Some(vec![
        ("seconds", time.as_secs_f64()),
        ("MB", bytes as f64 / 1e6),
        ("requests", requests as f64),
        ("CPU ms", cpu.as_secs_f64() * 1e3),
    ]))
}

/// Measures all variants over all links, alternating: the text of the section, and the rows of the first link.
pub fn measure(runs: usize, scratch: &Path) -> Result<(String, Vec<Series>)> {
    let dir = scratch.join("cold");
    fs::create_dir(&dir)?;
    let program = Program::build(&dir)?;
    let image: u64 =
        fs::read_dir(&program.blobs)?.flatten().map(|f| f.metadata().map_or(0, |m| m.len())).sum();
    let registry = FaultRegistry::start(&program.blobs)?;
    let (bytes, chunks) = program.hot;
    let mut text = format!(
        "### cold start\n\nA small Debian with the host's Python, in a registry whose answers begin after a while and share \
         one bandwidth; read are the {} files that Python opens for a few dozen imports: {chunks} chunks, {:.1} MB stored, of \
         a blob of {:.1} MB. In this order, whole, each read waiting for the one before. A run begins with the start of the \
         daemon and an empty cache. The limit is one answer and the bytes that are needed; it needs to know everything in \
         advance.\n",
        program.files.len(),
        bytes as f64 / 1e6,
        image as f64 / 1e6,
    );
    let mut first = None;
    for (name, latency, bandwidth) in LINKS {
        registry.link(latency, Some(bandwidth));
        let servers = [Server::Rafsd, Server::Nydusd];
        let contenders = VARIANTS
            .iter()
            .flat_map(|variant| servers.map(|server| (variant, server)))
            .map(|(variant, server)| {
                let name = format!("{}, {}", server.name(), variant.name);
                let (program, registry, dir) = (&program, &registry, &dir);
                Contender::new(name, move || start(server, program, registry, *variant, dir))
            });
        let mut all = alternate(contenders.collect(), runs)?;
        let limit = latency.as_secs_f64() + bytes as f64 / bandwidth as f64;
        all.push(Series {
            contender: LIMIT.to_owned(),
            runs: vec![vec![("seconds", limit), ("MB", bytes as f64 / 1e6)]],
        });
        let table = by_measure("daemon, prefetch", &all);
        write!(text, "\n{name}:\n\n{table}\n")?;
        first.get_or_insert(all);
    }
    Ok((text, first.unwrap_or_default()))
}
