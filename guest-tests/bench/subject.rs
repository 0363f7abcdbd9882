//! What is measured: a tree, the image made of it, and the daemons that serve one or the other to a guest.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::guest::TAG;
use super::load::{Load, Opened, Outcome, Places, Reads, SmallFiles, drive};
use crate::support::daemon::{Daemon, Launch};
use crate::support::frontend::{Step, Vm, VmConfig};
use crate::support::fuse_abi::ROOT_ID;
use crate::support::fuse_client::{Fuse, REQUEST_MAX};
use crate::support::image::create;
use crate::support::parts::{Parts, run};
use crate::support::rng::Rng;

/// Files of this size and more are read in blocks, those up to [`SMALL`] as a whole.
const LARGE: u64 = 1 << 20;
const SMALL: u64 = 64 << 10;

/// A tree as plain files, and as an image.
pub struct Tree {
    pub root: PathBuf,
    pub bootstrap: PathBuf,
    pub blobs: PathBuf,
    /// Regular files that are not empty, relative to the root, and their sizes; in the order of a walk.
    pub files: Vec<(PathBuf, u64)>,
    /// All names in all directories.
    pub names: Vec<PathBuf>,
    pub bytes: u64,
}

impl Tree {
    /// Debian with Python, and in it Debian with Node and fio: what `scripts/parts` makes of packages.
    pub fn debian(dir: &Path) -> Result<Tree> {
        let parts = Parts::install(&["images", "fio"])?;
        let images = parts.path("images")?;
        let root = dir.join("tree");
        fs::create_dir_all(&root)?;
        let copy =
            |from: &Path, to: &Path| run(Command::new("cp").arg("-aT").arg(from).arg(to)).map(drop);
        copy(&images.join("python/tree"), &root)?;
        copy(&images.join("node/tree"), &root.join("srv/node"))?;
        copy(&parts.path("fio")?, &root.join("opt/fio"))?;
        let tree = Tree::of(root, dir, &[])?;
        let (names, mb) = (tree.names.len(), tree.bytes / 1_000_000);
        ensure!(names >= 20_000, "the tree has only {names} entries, {mb} MB");
        Ok(tree)
    }

    /// Makes an image of a tree, with more options for `rafs create`.
    pub fn of(root: PathBuf, dir: &Path, options: &[&str]) -> Result<Tree> {
        let (bootstrap, blobs) = (dir.join("bootstrap"), dir.join("blobs"));
        fs::create_dir_all(&blobs)?;
        let mut arguments: Vec<&std::ffi::OsStr> =
            vec!["--bootstrap".as_ref(), bootstrap.as_ref(), "--blob-dir".as_ref(), blobs.as_ref()];
        arguments.extend(options.iter().map(|option| std::ffi::OsStr::new(*option)));
        arguments.push(root.as_ref());
        create(&arguments)?;
        let (mut files, mut names, mut bytes) = (Vec::new(), Vec::new(), 0);
        for entry in walkdir::WalkDir::new(&root).min_depth(1).sort_by_file_name() {
            let entry = entry?;
            let name = entry.path().strip_prefix(&root)?.to_owned();
            let size = entry.metadata()?.len();
            if entry.file_type().is_file() && size > 0 {
                bytes += size;
                files.push((name.clone(), size));
            }
            names.push(name);
        }
        Ok(Tree { root, bootstrap, blobs, files, names, bytes })
    }

    fn chosen(&self, choose: impl Fn(u64) -> bool) -> Vec<usize> {
        (0..self.files.len()).filter(|&file| choose(self.files[file].1)).collect()
    }

    /// Files that are read in blocks.
    pub fn large(&self) -> Vec<usize> {
        self.chosen(|size| size >= LARGE)
    }

    /// Files that are read as a whole, in an order that is nobody's.
    pub fn small(&self) -> Vec<usize> {
        let mut small = self.chosen(|size| size <= SMALL);
        let mut rng = Rng::new(7);
        for last in (1..small.len()).rev() {
            small.swap(last, rng.index(last + 1));
        }
        small
    }

    pub fn path(&self, file: usize) -> PathBuf {
        self.root.join(&self.files[file].0)
    }
}

/// A program that serves files over vhost-user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Rafsd,
    /// rafsd that looks for the next request for a while before it sleeps, and at depth 1 a guest that looks for the
    /// answer.
    Polling,
    /// rafsd that shares the tree's directory, as virtiofsd does.
    Shared,
    Nydusd,
    /// With a pool of so many threads.
    Virtiofsd(usize),
}

impl Program {
    pub const ALL: [Program; 6] = [
        Program::Rafsd,
        Program::Polling,
        Program::Shared,
        Program::Nydusd,
        Program::Virtiofsd(0),
        Program::Virtiofsd(8),
    ];

    pub fn name(self) -> String {
        match self {
            Program::Rafsd => "rafsd".into(),
            Program::Polling => "rafsd, polling".into(),
            Program::Shared => "rafsd, directory".into(),
            Program::Nydusd => "nydusd".into(),
            Program::Virtiofsd(pool) => format!("virtiofsd, pool {pool}"),
        }
    }

    /// How `rafsd` or `nydusd`, which take the same arguments and configuration, is to serve an image.
    pub fn launch(self, bootstrap: &Path, blobs: &Path, dir: &Path) -> Result<Launch> {
        let dir = dir.join(self.name().replace(", ", "-").replace(' ', "-"));
        fs::create_dir_all(&dir)?;
        let mut launch = Launch::new(bootstrap, blobs, &dir).read_ahead();
        launch.log_level = std::env::var("RAFSD_BENCH_LOG").unwrap_or_else(|_| "warn".into());
        if self == Program::Polling {
            launch = launch.arg("--busy-poll").arg("50us");
        }
        if self == Program::Nydusd {
            launch.program = Parts::install(&["nydus"])?.path("nydusd")?;
            // It wants a million otherwise, which only root of the whole machine may have.
            launch = launch.arg("--rlimit-nofile").arg("0");
        }
        Ok(launch)
    }

    /// Starts it for a tree, with sockets and caches of its own below `dir`.
    pub fn start(self, tree: &Tree, dir: &Path) -> Result<Daemon> {
        let mut command = match self {
            Program::Shared => Command::new(env!("CARGO_BIN_EXE_rafsd")),
            Program::Virtiofsd(pool) => {
                let program = Parts::install(&["virtiofsd"])?.path("virtiofsd")?;
                let mut command = Command::new(program);
                command.arg("--thread-pool-size").arg(pool.to_string());
                // It keeps a descriptor for each name that the guest knows; file handles are its way out where this
                // machine does not let it have so many.
                let (_, limit) = descriptor_limits();
                if limit < tree.names.len() as u64 * 2 {
                    command.arg("--inode-file-handles=prefer");
                }
                command
            }
            _ => {
                let launch = self.launch(&tree.bootstrap, &tree.blobs, dir)?;
                // User-mode Linux asks the device for the name of the share.
                let tagged = self != Program::Nydusd;
                return if tagged { launch.arg("--tag").arg(TAG) } else { launch }.spawn();
            }
        };
        let sock =
            dir.join(self.name().replace(", ", "-").replace(' ', "-")).with_extension("sock");
        command.arg("--socket-path").arg(&sock).arg("--shared-dir").arg(&tree.root);
        command.args(["--tag", TAG, "--cache", "always", "--sandbox", "none"]);
        command.args(["--log-level", "error"]).stdin(Stdio::null()).stdout(Stdio::null());
        Daemon::spawn(command, &sock)
    }

    /// Request queues that it can serve.
    pub fn queues(self) -> usize {
        if self.name().starts_with("rafsd") { 2 } else { 1 }
    }

    /// A guest of a daemon that is this program: INIT is done.
    pub fn guest(self, daemon: &Daemon) -> Result<(Vm, Vec<Fuse>)> {
        let config = VmConfig { request_queues: self.queues(), ..VmConfig::default() };
        let mut vm = daemon.boot(config)?;
        // nydusd loses a kick that comes before it has enabled the ring, and does not acknowledge that it has: its
        // answer to anything says so.
        vm.step(Step::GetFeatures)?;
        let mut queues: Vec<Fuse> = (0..self.queues()).map(|queue| vm.fuse(queue + 1)).collect();
        for fuse in &mut queues {
            // nydusd gives every chain back with a length of 0.
            fuse.used_len_is_true = self != Program::Nydusd;
        }
        queues[0].init()?;
        Ok((vm, queues))
    }
}

/// How many descriptors a process may have: now, and if it asks for more.
pub fn descriptor_limits() -> (u64, u64) {
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    (limits.current.unwrap_or(u64::MAX), limits.maximum.unwrap_or(u64::MAX))
}

/// A daemon with a guest.
pub struct Served {
    pub program: Program,
    pub daemon: Daemon,
    _vm: Vm,
    pub queues: Vec<Fuse>,
    /// Longest READ that Linux would send.
    pub max_read: usize,
    resolved: HashMap<PathBuf, u64>,
    opened: HashMap<usize, Opened>,
}

impl Served {
    /// A guest of a daemon that is this program; nothing was read yet.
    pub fn of(program: Program, daemon: Daemon) -> Result<Served> {
        let (vm, queues) = program.guest(&daemon)?;
        let init = queues[0].init.context("INIT was answered")?;
        // Linux: `max_pages` pages, 32 if the server names no number.
        let pages = if init.max_pages == 0 { 32 } else { usize::from(init.max_pages) };
        Ok(Served {
            program,
            daemon,
            _vm: vm,
            queues,
            max_read: pages * 4096,
            resolved: HashMap::new(),
            opened: HashMap::new(),
        })
    }

    pub fn start(program: Program, tree: &Tree, dir: &Path) -> Result<Served> {
        let daemon = program.start(tree, dir).with_context(|| program.name())?;
        let mut served = Served::of(program, daemon).with_context(|| program.name())?;
        served.warm_up(tree).with_context(|| program.name())?;
        Ok(served)
    }

    /// Reads the files that workloads read, so that they are in caches, and compares the large ones with the tree.
    fn warm_up(&mut self, tree: &Tree) -> Result<()> {
        for file in tree.large() {
            let (path, size) = &tree.files[file];
            let opened = self.open(tree, file)?;
            let want = File::open(tree.path(file))?;
            let (mut at, mut have) = (0, vec![0; 128 << 10]);
            while at < *size {
                let got = self.queues[0].read(opened.node, opened.fh, at, have.len())?;
                ensure!(!got.is_empty(), "{}: ends at {at} of {size}", path.display());
                want.read_exact_at(&mut have[..got.len()], at)?;
                ensure!(have[..got.len()] == got, "{}: other bytes at {at}", path.display());
                at += got.len() as u64;
            }
        }
        let small = self.nodes(tree, &tree.small())?;
        let outcome = drive(&mut self.queues[0], 8, &mut SmallFiles::new(&small))?;
        ensure!(outcome.units == small.len() as u64, "{} files were read", outcome.units);
        Ok(())
    }

    /// Node of a path below the root; each directory is looked up once.
    fn resolve(&mut self, path: &Path) -> Result<u64> {
        let Some(parent) = path.parent() else { return Ok(ROOT_ID) };
        if let Some(node) = self.resolved.get(path) {
            return Ok(*node);
        }
        let parent = self.resolve(parent)?;
        let name = path.file_name().context("a name")?;
        let entry = self.queues[0].lookup(parent, name.as_bytes());
        let node = entry.with_context(|| format!("LOOKUP of {}", path.display()))?.nodeid;
        self.resolved.insert(path.to_owned(), node);
        Ok(node)
    }

    /// Files that are not open.
    pub fn nodes(&mut self, tree: &Tree, files: &[usize]) -> Result<Vec<Opened>> {
        let each = files.iter().map(|file| {
            let (path, size) = &tree.files[*file];
            Ok(Opened { node: self.resolve(path)?, fh: 0, size: *size })
        });
        each.collect()
    }

    /// A file that is open from here on.
    pub fn open(&mut self, tree: &Tree, file: usize) -> Result<Opened> {
        if let Some(opened) = self.opened.get(&file) {
            return Ok(*opened);
        }
        let (path, size) = &tree.files[file];
        let node = self.resolve(path)?;
        let opened = Opened { node, fh: self.queues[0].open(node)?, size: *size };
        self.opened.insert(file, opened);
        Ok(opened)
    }

    /// Every name, with the node of its directory.
    pub fn names(&mut self, tree: &Tree) -> Result<Vec<(u64, Vec<u8>)>> {
        let each = tree.names.iter().map(|path| {
            let parent = self.resolve(path.parent().context("below the root")?)?;
            Ok((parent, path.file_name().context("a name")?.as_bytes().to_vec()))
        });
        each.collect()
    }

    /// What a guest does when it drops its dentries: lookups are forgotten.
    pub fn forget(&mut self, nodes: &[u64]) -> Result<()> {
        let mut counts: HashMap<u64, u64> = HashMap::new();
        nodes.iter().for_each(|node| *counts.entry(*node).or_default() += 1);
        let counts: Vec<(u64, u64)> = counts.into_iter().collect();
        for some in counts.chunks((REQUEST_MAX - 64) / 16) {
            self.queues[0].batch_forget(some)?;
        }
        Ok(())
    }

    /// Runs a load on the first queue: what it did, and the daemon's CPU time.
    pub fn drive(&mut self, depth: usize, load: &mut dyn Load) -> Result<(Outcome, Duration)> {
        let before = self.daemon.cpu_time();
        let outcome = drive(&mut self.queues[0], depth, load)?;
        Ok((outcome, self.daemon.cpu_time() - before))
    }

    /// Reads with `depth` in flight, shared evenly among so many queues, each with a thread of its own, as a guest
    /// with as many CPUs has.
    pub fn read<P: Places + Send>(
        &mut self,
        files: &[Opened],
        block: usize,
        depth: usize,
        places: Vec<P>,
    ) -> Result<(Outcome, Duration)> {
        let queues = places.len();
        if self.program == Program::Polling {
            // As `halt_poll_ns` has a guest's processor wait for one answer. With more queues there is no
            // processor left for it.
            self.queues[0].busy_poll = queues == 1 && depth == 1;
        }
        let before = self.daemon.cpu_time();
        let start = Instant::now();
        let outcomes: Vec<Result<Outcome>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .queues
                .iter_mut()
                .zip(places)
                .map(|(fuse, places)| {
                    scope.spawn(move || {
                        drive(fuse, depth / queues, &mut Reads::new(files, places, block))
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let mut sum = Outcome { time: start.elapsed(), ..Outcome::default() };
        for outcome in outcomes {
            let outcome = outcome?;
            sum.units += outcome.units;
            sum.bytes += outcome.bytes;
            sum.requests += outcome.requests;
            sum.waits = outcome.waits;
        }
        Ok((sum, self.daemon.cpu_time() - before))
    }
}
