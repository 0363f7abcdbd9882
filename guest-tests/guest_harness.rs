//! The guests' harness sees when a guest fails: a test on it can not pass by accident.

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod guest;
    pub mod initramfs;
    pub mod parts;
}

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::guest::{Guest, Machine};
use support::parts::Parts;

/// Long enough for User-mode Linux to boot on a busy machine.
const BOOT: Duration = Duration::from_secs(120);

/// virtiofsd on an empty directory: what these guests read does not matter.
struct Share {
    server: Child,
    dir: tempfile::TempDir,
}

impl Share {
    fn start() -> Share {
        let parts = Parts::install(&["virtiofsd"]).expect("virtiofsd");
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("socket");
        let server = Command::new(parts.path("virtiofsd").expect("its path"))
            .arg("--shared-dir")
            .arg(dir.path())
            .arg("--socket-path")
            .arg(&socket)
            .args(["--sandbox", "none"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("virtiofsd starts");
        let deadline = Instant::now() + BOOT;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "virtiofsd made no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        Share { server, dir }
    }

    fn guest(&self, job: &str) -> Guest {
        Guest::new(Machine::Uml72, &self.dir.path().join("socket"), "any")
            .memory_mib(256)
            .job(job)
            .time_limit(BOOT)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // It ends by itself when the guest does: an error means that it has.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[test]
fn a_guest_that_hangs_is_killed_at_its_limit() {
    let share = Share::start();
    let limit = Duration::from_secs(30);
    let job = "echo about-to-hang; sleep 1000";
    let error = share.guest(job).time_limit(limit).run().expect_err("it hangs").to_string();
    assert!(error.contains("was killed at its limit of 30s"), "{error}");
    assert!(error.contains("about-to-hang"), "the console is shown: {error}");
    let dir = share.dir.path().to_str().expect("plain");
    let deadline = Instant::now() + BOOT;
    loop {
        let left = processes_that_mention(dir, "linux.uml");
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "{left:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_that_panics_is_an_error() {
    let share = Share::start();
    let error = share.guest("check first true\nexit 3").run().expect_err("init ends").to_string();
    assert!(error.contains("ended before its job did"), "{error}");
    assert!(error.contains("Attempted to kill init"), "the console is shown: {error}");
}

#[test]
fn a_check_that_fails_fails_the_test() {
    let share = Share::start();
    let report =
        share.guest("check good echo fine\ncheck bad ls /absent").run().expect("the job ends");
    let outcome: Vec<_> =
        report.checks.iter().map(|check| (check.name.as_str(), check.status)).collect();
    assert_eq!(outcome, [("good", 0), ("bad", 1)]);
    assert_eq!(report.output("good"), "fine\n");
    assert_eq!(report.output("bad"), "ls: /absent: No such file or directory\n");
    std::panic::catch_unwind(|| report.expect(&["good", "bad"])).expect_err("one check failed");
}

#[test]
fn a_check_that_was_not_run_fails_the_test() {
    let share = Share::start();
    let report = share.guest("check good true").run().expect("the job ends");
    report.expect(&["good"]);
    std::panic::catch_unwind(|| report.expect(&["good", "lost"]))
        .expect_err("one check is not there");
}

/// Command lines of running processes with both words in them.
fn processes_that_mention(one: &str, other: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("/proc");
    processes
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("cmdline")).ok())
        .map(|line| line.replace('\0', " "))
        .filter(|line| line.contains(one) && line.contains(other))
        .collect()
}
