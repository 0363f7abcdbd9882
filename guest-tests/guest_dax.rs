//! DAX in real guests: Linux 7.3 under QEMU 11.1, whose generic vhost-user device has a window.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod guest;
    pub mod initramfs;
    pub mod parts;
}
mod daemon;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use daemon::{Daemon, rafsd};
use support::guest::{Guest, Machine, Report};
use support::parts::{Parts, run};

const TAG: &str = "image";

/// A daemon, its image, and what a guest must see of it.
struct Stage {
    scratch: tempfile::TempDir,
    daemon: Arc<Daemon>,
    sums: Vec<u8>,
    md5: Vec<u8>,
}

impl Stage {
    /// Some 34 MB in files that are read through a window, and one that is not.
    fn set(flags: &str) -> Stage {
        let parts = Parts::install(&["guests"]).unwrap();
        let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let dir = scratch.path();
        let tree = dir.join("tree");
        fs::create_dir(&tree).unwrap();
        fs::copy(parts.path("guest_root").unwrap().join("bin/busybox"), tree.join("busybox"))
            .unwrap();
        let mut noise = 0x9e37_79b9_7f4a_7c15_u64; // xorshift: it does not compress
        for (name, len) in
            [("odd", (5 << 20) + 123), ("large", 20 << 20), ("two", 2 << 20), ("least", 256 << 10)]
        {
            let words = std::iter::repeat_with(|| {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                noise.to_le_bytes()
            });
            let mut bytes: Vec<u8> = words.take(len / 8 + 1).flatten().collect();
            bytes.truncate(len);
            fs::write(tree.join(name), bytes).unwrap();
        }
        fs::write(tree.join("zeros"), vec![0; 4 << 20]).unwrap();
        let sum = |program: &str| {
            let all = format!("cd {} && {program} *", tree.display());
            run(Command::new("sh").args(["-c", &all])).unwrap()
        };
        let (sums, md5) = (sum("sha256sum"), sum("md5sum"));
        let mut create = Command::new(env!("CARGO_BIN_EXE_rafs"));
        create.args([
            "create",
            "--chunk-size",
            "0x40000",
            "--bootstrap",
            "boot",
            "--blob-dir",
            ".",
        ]);
        run(create.arg("tree").current_dir(dir)).unwrap();
        let args = format!("virtiofs --sock S --apisock A --tag {TAG} --bootstrap boot {flags}");
        let mut command = rafsd(dir, &args);
        command.stderr(fs::File::create(dir.join("log")).unwrap());
        let daemon = Arc::new(Daemon::start(dir, command));
        Stage { daemon, sums, md5, scratch }
    }

    fn guest(&self, job: &str) -> Guest {
        Guest::new(Machine::Qemu11Linux73, &self.path("S"), TAG)
            .job(job)
            .file("expected/sums", &*self.sums)
            .file("expected/md5", &*self.md5)
            .qemu_arg("-qmp")
            .qemu_arg(&format!("unix:{},server=on,wait=off", self.path("Q").display()))
            .kernel_arg("iomem=relaxed")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn metric(&self, name: &str) -> u64 {
        metric(&self.daemon, name)
    }

    /// What the cache file of the image holds.
    fn cached(&self) -> Vec<u8> {
        let data =
            run(Command::new("find").arg(self.scratch.path()).args(["-name", "*.layer.disk"]));
        let data = String::from_utf8(data.unwrap()).unwrap();
        fs::read(data.trim_end()).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }
}

/// A number of `GET /metrics`, as `NAME{LABELS}`; 0 if it is not there.
fn metric(daemon: &Daemon, name: &str) -> u64 {
    let (status, text) = daemon.call("GET", "/metrics", "");
    assert_eq!(status, 200, "{text}");
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().expect("a number"))
}

const READS: &str = "rafsd_fuse_requests_total{opcode=\"read\"}";
const SETUPS: &str = "rafsd_fuse_requests_total{opcode=\"setupmapping\"}";

/// QEMU's monitor.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn open(path: &Path) -> Monitor {
        let mut monitor = Monitor(BufReader::new(UnixStream::connect(path).unwrap()));
        monitor.say(r#"{"execute":"qmp_capabilities"}"#);
        monitor
    }

    /// Gives a command and waits until it is done.
    fn say(&mut self, command: &str) {
        writeln!(self.0.get_mut(), "{command}").unwrap();
        let mut line = String::new();
        while !line.contains("\"return\"") {
            line.clear();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "QEMU is gone");
            assert!(!line.contains("\"error\""), "{command}: {line}");
        }
    }
}

#[test]
fn linux_reads_through_a_window_smaller_than_its_files() {
    let stage = Stage::set("--dax private --dax-window 16M");
    let (reads, setups) = (Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicU64::new(0)));
    let pauses = Arc::new(AtomicU64::new(0));
    let storm = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (daemon, monitor) = (Arc::clone(&stage.daemon), stage.path("Q"));
        let (reads, setups, pauses) =
            (Arc::clone(&reads), Arc::clone(&setups), Arc::clone(&pauses));
        move |line: &str| match line.split_once("host-please ").map(|(_, what)| what) {
            Some("pause") => {
                storm.store(true, Ordering::SeqCst);
                let (storm, pauses) = (Arc::clone(&storm), Arc::clone(&pauses));
                let mut monitor = Monitor::open(&monitor);
                std::thread::spawn(move || {
                    while storm.load(Ordering::SeqCst) {
                        monitor.say(r#"{"execute":"stop"}"#);
                        std::thread::sleep(Duration::from_millis(20));
                        monitor.say(r#"{"execute":"cont"}"#);
                        pauses.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(80));
                    }
                });
            }
            Some("go-on") => storm.store(false, Ordering::SeqCst),
            Some("count") => {
                reads.store(metric(&daemon, READS), Ordering::SeqCst);
                setups.store(metric(&daemon, SETUPS), Ordering::SeqCst);
            }
            Some("unplug") => {
                let mut monitor = Monitor::open(&monitor);
                monitor.say(r#"{"execute":"device_del","arguments":{"id":"share"}}"#);
            }
            _ => {}
        }
    };
    let report = stage.guest(include_str!("init/dax-job.sh")).with_window().watch(watcher).run();
    let report = shown(report, &stage);
    report
        .expect(&["mount", "sums", "parallel", "execute", "paused", "write", "remount", "unplug"]);
    assert_eq!(reads.load(Ordering::SeqCst), 0, "reads of files that are mapped");
    assert!(setups.load(Ordering::SeqCst) > 100, "ranges are used again and again");
    assert!(pauses.load(Ordering::SeqCst) > 5, "the guest was paused while it read");
    assert_cache_is_the_blob(&stage);
    let log = stage.log();
    assert!(!log.contains(" ERROR "), "{log}");
    assert!(log.contains("DAX: a window of 16 MiB, private"), "{log}");
}

/// The VMM is asked to share cache files, and will not: it would have to be trusted with writing to them.
#[test]
fn qemu_is_not_given_the_cache() {
    let stage = Stage::set("--dax shared --dax-fallback private --dax-window 256M");
    let job = "check mount mount -t virtiofs \"$tag\" /mnt\n\
               check sums sh -c 'cd /mnt && sha256sum -c /expected/sums'\n\
               check umount umount /mnt\n";
    let report = shown(stage.guest(job).with_window().run(), &stage);
    report.expect(&["mount", "sums", "umount"]);
    assert_eq!(stage.metric(READS), 0);
    assert_eq!(stage.metric("rafsd_dax_ranges"), 0, "the guest has unmounted");
    let log = stage.log();
    assert_eq!(log.matches("does not map files read-only").count(), 1, "{log}");
    assert!(log.contains("each guest gets copies"), "{log}");
    assert!(log.contains("DAX: a window of 256 MiB, private"), "{log}");
    assert_cache_is_the_blob(&stage);
}

/// A reset takes the window away without a word, in the middle of reads, and QEMU goes on.
#[test]
fn a_guest_that_is_reset_finds_an_empty_window() {
    let stage = Stage::set("--dax shared --dax-fallback private --dax-window 16M");
    let (boots, monitor) = (AtomicU64::new(0), stage.path("Q"));
    let report = stage
        .guest(include_str!("init/dax-reset-job.sh"))
        .with_window()
        .request_queues(2)
        .reboots()
        .watch(move |line| {
            if !line.contains("host-please reset") {
                return;
            }
            let command = match boots.fetch_add(1, Ordering::SeqCst) {
                0 => r#"{"execute":"system_reset"}"#,
                // The guest reboots by itself.
                1 => return,
                _ => r#"{"execute":"set-action","arguments":{"reboot":"shutdown"}}"#,
            };
            Monitor::open(&monitor).say(command);
        })
        .run();
    let report = shown(report, &stage);
    report.expect(&["mount", "sums", "mount", "sums", "mount", "sums"]);
    assert_eq!(stage.metric(READS), 0);
    let log = stage.log();
    assert_eq!(log.matches("DAX: a window of 16 MiB, private").count(), 3, "{log}");
    assert!(!log.contains(" ERROR "), "{log}");
    assert_cache_is_the_blob(&stage);
}

/// The usual device has no window, the same daemon serves it.
#[test]
fn a_device_without_a_window_is_read() {
    let stage = Stage::set("--dax private");
    let job = "check mount mount -t virtiofs \"$tag\" /mnt\n\
               check sums sh -c 'cd /mnt && sha256sum -c /expected/sums'\n";
    let report = shown(stage.guest(job).run(), &stage);
    report.expect(&["mount", "sums"]);
    assert_eq!(stage.metric(SETUPS), 0);
    assert!(stage.metric(READS) > 0);
    let log = stage.log();
    assert!(log.contains("DAX: no window, files are read"), "{log}");
}

/// Whatever guests did, the cache holds what was fetched.
fn assert_cache_is_the_blob(stage: &Stage) {
    let cached = stage.cached();
    let large = fs::read(stage.path("tree/large")).unwrap();
    let found = cached.windows(4096).step_by(4096).position(|block| block == &large[..4096]);
    let at = found.expect("the file is in the cache") * 4096;
    assert!(cached[at..at + large.len()] == large, "the cache was changed");
}

/// The report, or what the daemon has said.
fn shown(report: anyhow::Result<Report>, stage: &Stage) -> Report {
    report.unwrap_or_else(|e| panic!("{e:#}\n--- log of the daemon ---\n{}", stage.log()))
}
