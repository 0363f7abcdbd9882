//! Runs `rafsd` as an operator would, and looks at it from outside.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::frontend::{Vm, VmConfig};

/// How long a daemon may take until its sockets exist, on a machine that is busy with other tests.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long something may take that only its log tells of.
const LOG_TIMEOUT: Duration = Duration::from_secs(60);

/// What to start: an image, where its blobs are, where the cache goes.
#[derive(Clone, Debug)]
pub struct Launch {
    pub program: PathBuf,
    pub bootstrap: PathBuf,
    /// `device.backend.type`.
    pub backend_type: String,
    /// `device.backend.config`.
    pub backend: serde_json::Value,
    pub work_dir: PathBuf,
    /// `fs_prefetch`.
    pub prefetch: Option<serde_json::Value>,
    /// `amplify_io`, bytes. 0, no read-ahead, so that tests know what was fetched; `None`: not given.
    pub amplify: Option<u64>,
    pub sock: PathBuf,
    pub config: PathBuf,
    pub log_level: String,
    pub extra: Vec<OsString>,
    pub envs: Vec<(OsString, OsString)>,
}

impl Launch {
    /// The daemon of this build, or the one that `RAFSD_TEST_PROGRAM` names, and an image with its
    /// blobs in `blob_dir`; sockets, config and cache go below `scratch`.
    pub fn new(bootstrap: &Path, blob_dir: &Path, scratch: &Path) -> Launch {
        Launch {
            program: std::env::var_os("RAFSD_TEST_PROGRAM")
                .map_or_else(|| env!("CARGO_BIN_EXE_rafsd").into(), PathBuf::from),
            bootstrap: bootstrap.to_owned(),
            backend_type: "localfs".into(),
            backend: json!({ "dir": blob_dir }),
            work_dir: scratch.join("cache"),
            prefetch: None,
            amplify: Some(0),
            sock: scratch.join("fs.sock"),
            config: scratch.join("config.json"),
            log_level: "info".into(),
            extra: Vec::new(),
            envs: Vec::new(),
        }
    }

    /// One blob under any name: the bootstrap's blob id is not the file's.
    pub fn blob_file(mut self, file: &Path) -> Launch {
        self.backend = json!({ "blob_file": file });
        self
    }

    /// Another backend than `localfs`, with its own keys.
    pub fn backend(mut self, kind: &str, config: serde_json::Value) -> Launch {
        self.backend_type = kind.into();
        self.backend = config;
        self
    }

    /// With read-ahead, as the daemon does without being told.
    pub fn read_ahead(mut self) -> Launch {
        self.amplify = None;
        self
    }

    pub fn prefetch(mut self, keys: serde_json::Value) -> Launch {
        self.prefetch = Some(keys);
        self
    }

    pub fn work_dir(mut self, dir: &Path) -> Launch {
        self.work_dir = dir.to_owned();
        self
    }

    /// Name of socket and config, so that several daemons share one scratch directory.
    pub fn named(mut self, name: &str) -> Launch {
        self.sock = self.sock.with_file_name(format!("{name}.sock"));
        self.config = self.config.with_file_name(format!("{name}.json"));
        self
    }

    pub fn arg(mut self, arg: impl Into<OsString>) -> Launch {
        self.extra.push(arg.into());
        self
    }

    /// A variable of the daemon's environment.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Launch {
        self.envs.push((name.into(), value.into()));
        self
    }

    pub fn request_queues(self, count: usize) -> Launch {
        self.arg("--num-request-queues").arg(count.to_string())
    }

    pub fn read_timeout(self, limit: Duration) -> Launch {
        self.arg("--read-timeout").arg(format!("{}ms", limit.as_millis()))
    }

    fn write_config(&self) -> Result<()> {
        fs::create_dir_all(&self.work_dir)?;
        let mut document = json!({
            "device": {
                "backend": { "type": self.backend_type, "config": self.backend },
                "cache": { "type": "blobcache", "config": { "work_dir": self.work_dir } },
            },
            "mode": "direct",
            "digest_validate": false,
            "iostats_files": false,
            "enable_xattr": true,
        });
        if let Some(amplify) = self.amplify {
            document["amplify_io"] = amplify.into();
        }
        if let Some(prefetch) = &self.prefetch {
            document["fs_prefetch"] = prefetch.clone();
        }
        fs::write(&self.config, document.to_string())?;
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("virtiofs")
            .arg("--sock")
            .arg(&self.sock)
            .arg("--bootstrap")
            .arg(&self.bootstrap)
            .arg("--config")
            .arg(&self.config)
            .arg("--log-level")
            .arg(&self.log_level)
            .args(&self.extra)
            .env_remove("RUST_LOG")
            // What is asked in a test is on this machine.
            .env("NO_PROXY", "*")
            .env("no_proxy", "*")
            .envs(self.envs.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    /// Starts the daemon and waits until its socket exists.
    pub fn spawn(&self) -> Result<Daemon> {
        self.write_config()?;
        remove_if_there(&self.sock)?;
        Daemon::spawn(self.command(), &self.sock)
    }

    /// Runs a daemon that is expected to end by itself: its exit status and stderr.
    pub fn run_to_end(&self) -> Result<(ExitStatus, String)> {
        self.write_config()?;
        remove_if_there(&self.sock)?;
        let mut child = self.command().spawn()?;
        let stderr = collect(child.stderr.take().expect("piped"));
        match wait_with_limit(&mut child, START_TIMEOUT)? {
            Some(status) => Ok((status, stderr.finish())),
            None => {
                child.kill()?;
                child.wait()?;
                bail!("still running after {START_TIMEOUT:?}: {}", stderr.finish())
            }
        }
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a process has open and uses, from `/proc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub fds: usize,
    pub threads: usize,
    /// Resident memory that is the process's own (`RssAnon`), in KiB.
    pub anon_kib: u64,
    /// All resident memory (`VmRSS`), in KiB.
    pub rss_kib: u64,
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Usage { fds, threads, anon_kib, rss_kib } = self;
        write!(f, "{fds} fds, {threads} threads, RSS {rss_kib} KiB ({anon_kib} KiB anonymous)")
    }
}

/// A running daemon. Dropping it kills it; a panic in its log then fails the test, and if the test
/// has failed already, the end of the log is printed.
pub struct Daemon {
    child: Child,
    pub sock: PathBuf,
    stderr: Option<Collector>,
    ended: bool,
}

impl Daemon {
    /// Starts any vhost-user back end and waits until its socket exists.
    pub fn spawn(mut command: Command, sock: &Path) -> Result<Daemon> {
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        let stderr = collect(child.stderr.take().expect("piped"));
        let mut daemon =
            Daemon { child, sock: sock.to_owned(), stderr: Some(stderr), ended: false };
        let deadline = Instant::now() + START_TIMEOUT;
        while !sock.exists() {
            if let Some(status) = daemon.child.try_wait()? {
                daemon.ended = true;
                let log = daemon.finish_log();
                bail!("the daemon ended at once with {status}: {log}");
            }
            if Instant::now() > deadline {
                bail!("no socket after {START_TIMEOUT:?}");
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(daemon)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn boot(&self, config: VmConfig) -> Result<Vm> {
        Vm::boot(&self.sock, config)
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        self.stderr.as_ref().map(Collector::text).unwrap_or_default()
    }

    /// Waits until the log says `what`: a line may come a moment after the answer that it is about.
    #[track_caller]
    pub fn expect_log(&self, what: &str) {
        self.expect_log_after(0, what);
    }

    /// The same, of what was logged after the first `seen` bytes.
    #[track_caller]
    pub fn expect_log_after(&self, seen: usize, what: &str) {
        let limit = Instant::now() + LOG_TIMEOUT;
        while !self.log()[seen..].contains(what) {
            let late = Instant::now() > limit;
            assert!(!late, "the log should say {what:?}:\n{}", &self.log()[seen..]);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn finish_log(&mut self) -> String {
        self.stderr.take().map(Collector::finish).unwrap_or_default()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("pids fit");
        // SAFETY: the child was not waited for yet, so the pid is still its own.
        unsafe { libc::kill(pid, signal) };
    }

    /// SIGTERM, and how long it took until the process was gone.
    pub fn terminate(mut self, limit: Duration) -> Result<(ExitStatus, Duration, String)> {
        let start = Instant::now();
        self.signal(libc::SIGTERM);
        match wait_with_limit(&mut self.child, limit)? {
            Some(status) => {
                let took = start.elapsed();
                self.ended = true;
                Ok((status, took, self.finish_log()))
            }
            None => bail!("still running {limit:?} after SIGTERM"),
        }
    }

    /// SIGKILL, as the out-of-memory killer does.
    pub fn kill(mut self) -> String {
        self.stop_hard();
        self.finish_log()
    }

    fn stop_hard(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.ended = true;
        }
    }

    pub fn usage(&self) -> Usage {
        usage_of(self.child.id()).expect("the daemon runs")
    }

    /// CPU time used so far by all threads, those that have ended included, to the nanosecond.
    pub fn cpu_time(&self) -> Duration {
        let pid = libc::pid_t::try_from(self.child.id()).expect("pids fit");
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: both calls only write the variables that they are given.
        let failed = unsafe {
            libc::clock_getcpuclockid(pid, &raw mut clock) != 0
                || libc::clock_gettime(clock, &raw mut time) != 0
        };
        if failed {
            return Duration::ZERO;
        }
        let part = |value: i64| u64::try_from(value).unwrap_or(0);
        Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop_hard();
        let log = self.finish_log();
        if std::thread::panicking() {
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(60);
            super::say(format!("--- log of the daemon ---\n{}", lines[from..].join("\n")));
        } else {
            assert!(!log.contains("panicked at"), "the daemon panicked:\n{log}");
        }
    }
}

pub fn usage_of(pid: u32) -> Result<Usage> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let count = |what: &str| -> Result<usize> { Ok(fs::read_dir(proc.join(what))?.count()) };
    let status = fs::read_to_string(proc.join("status"))?;
    let kib = |key: &str| -> Result<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(key)).context("no such line")?;
        let number = line.trim_matches([':', ' ', '\t', 'k', 'B']);
        Ok(number.parse()?)
    };
    Ok(Usage {
        fds: count("fd")?,
        threads: count("task")?,
        anon_kib: kib("RssAnon")?,
        rss_kib: kib("VmRSS")?,
    })
}

fn wait_with_limit(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reads a pipe to its end on a thread of its own, so that the writer never blocks on it.
struct Collector {
    text: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

fn collect(mut pipe: impl Read + Send + 'static) -> Collector {
    let text = Arc::new(Mutex::new(Vec::new()));
    let sink = text.clone();
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            sink.lock().expect("no panic under this lock").extend_from_slice(&buffer[..n]);
        }
    });
    Collector { text, thread }
}

impl Collector {
    fn text(&self) -> String {
        let bytes = self.text.lock().expect("no panic under this lock");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// All of it; the writer has ended.
    fn finish(self) -> String {
        let _ = self.thread.join();
        let bytes = self.text.lock().expect("no panic under this lock");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
