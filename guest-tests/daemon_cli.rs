//! The program as a process: arguments, exit codes, sockets, signals, its log.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod daemon;

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::quick::ends_at_once;
use daemon::{Daemon, golden, output, rafsd, scratch, small_image};

/// Set to write the expected texts anew; the change then shows in review.
const UPDATE: &str = "UPDATE_SNAPSHOTS";

#[test]
fn help_is_documentation() {
    let dir = scratch();
    for (args, file) in [("--help", "rafsd-help.txt"), ("-h", "rafsd-help-short.txt")] {
        let mut command = rafsd(dir.path(), args);
        command.env_remove("COLUMNS");
        let (code, stdout, stderr) = output(command);
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/daemon").join(file);
        if std::env::var_os(UPDATE).is_some() {
            fs::write(&path, &stdout).unwrap();
        }
        let want = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(stdout, want, "{args} differs from {file}; set {UPDATE}=1 to accept it");
    }
}

#[test]
fn exit_codes_tell_usage_from_failure() {
    let dir = scratch();
    fs::write(dir.path().join("not-an-image"), "hello").unwrap();
    fs::write(dir.path().join("file"), "precious").unwrap();
    let image = small_image();
    let cases = [
        ("--version".to_owned(), 0, ""),
        ("--print-capabilities".into(), 0, ""),
        ("virtiofs".into(), 2, "--sock"),
        ("virtiofs --frobnicate".into(), 2, "--frobnicate"),
        ("fuse --apisock A".into(), 2, "`--mountpoint DIR` is required"),
        ("virtiofs --sock S --bootstrap no-such-file".into(), 1, "no-such-file"),
        ("virtiofs --sock S --bootstrap not-an-image".into(), 1, "not-an-image"),
        (format!("--sock S {image} --config no-such-config"), 1, "no-such-config"),
        (format!("--sock file {image}"), 1, "file: there is a file that is not a socket"),
        (format!("--sock no/such/dir/S {image}"), 1, "no/such/dir/S"),
        (format!("--sock S --log-file file/l {image}"), 1, "file/l.log"),
        (format!("--sock S --bootstrap {}", golden("v5-lz4/bootstrap").display()), 1, "v5"),
    ];
    for (args, want, message) in cases {
        let (code, stdout, stderr) = output(rafsd(dir.path(), &args));
        assert_eq!(code, Some(want), "{args}: {stdout}{stderr}");
        assert!(stderr.contains(message), "{args}: {stderr}");
        assert!(!dir.path().join("S").exists(), "{args} leaves a socket");
    }
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"precious");
}

#[test]
fn version_has_the_lines_the_snapshotter_reads_under_both_names() {
    let dir = scratch();
    let nydusd = dir.path().join("nydusd");
    symlink(env!("CARGO_BIN_EXE_rafsd"), &nydusd).unwrap();
    let mut command = Command::new(&nydusd);
    command.arg("--version");
    let (code, renamed, _) = output(command);
    assert_eq!(code, Some(0));
    let (_, stdout, _) = output(rafsd(dir.path(), "--version"));
    assert_eq!(stdout, renamed);
    let commit = stdout.lines().find_map(|l| l.strip_prefix("Git Commit:")).unwrap().trim();

    let daemon = Daemon::small(dir.path());
    let (_, body) = daemon.call("GET", "/api/v1/daemon", "");
    let info: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(info["version"]["git_commit"], commit);
}

#[test]
fn command_lines_of_kata_start_and_sockets_may_be_stale_and_relative() {
    let image = small_image();
    for args in [
        "virtiofs --log-level info --apisock A --sock S",
        "virtiofs --hybrid-mode --log-level info --apisock A --sock S",
        "virtiofs --log-level info --apisock A --sock S --thread-pool-size=1 --announce-submounts",
        "virtiofs --log-level info --apisock A --sock S --thread-pool-size=1 -o announce_submounts",
        "virtiofs --log-level error --apisock A --sock S --log-level info",
        "--sock S --apisock A",
    ] {
        let dir = scratch();
        for name in ["A", "S"] {
            drop(UnixListener::bind(dir.path().join(name)).unwrap());
        }
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &format!("{args} {image}")));
        UnixStream::connect(dir.path().join("S")).expect("RUNNING means that the VMM can connect");
        daemon.signal(libc::SIGTERM);
        let (status, _, log) = daemon.end();
        assert_eq!(status.code(), Some(0), "{args}: {log}");
        assert!(!dir.path().join("A").exists() && !dir.path().join("S").exists(), "{args}");
    }
}

#[test]
fn a_live_socket_is_not_taken_over() {
    let dir = scratch();
    let daemon = Daemon::small(dir.path());
    let args = format!("virtiofs --sock S2 --apisock A {}", small_image());
    let (code, _, stderr) = output(rafsd(dir.path(), &args));
    assert_eq!(code, Some(1));
    assert!(stderr.contains("A: another process listens there"), "{stderr}");
    assert!(dir.path().join("A").exists() && dir.path().join("S").exists());
    assert_eq!(daemon.call("GET", "/api/v1/daemon", "").0, 200);
}

#[test]
fn signals_end_it_at_once_and_the_last_line_counts_bytes() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        ends_at_once("a signal", || {
            let dir = scratch();
            let daemon = Daemon::small(dir.path());
            // Connections of both kinds are open and idle.
            let _vmm = UnixStream::connect(dir.path().join("S")).unwrap();
            let _api = daemon.connect();
            daemon.signal(signal);
            let (status, took, log) = daemon.end();
            assert_eq!(status.code(), Some(0), "{log}");
            let last = log.lines().last().unwrap();
            assert!(last.contains("INFO") && last.contains("] fetched 0 of "), "{log}");
            assert!(last.ends_with(" bytes"), "{log}");
            assert!(!dir.path().join("A").exists() && !dir.path().join("S").exists());
            took
        });
    }
}

#[test]
fn a_signal_ends_it_while_the_start_hangs() {
    ends_at_once("a start that hangs", signal_while_the_start_hangs);
}

fn signal_while_the_start_hangs() -> Duration {
    let dir = scratch();
    // Opening a fifo waits for a writer that never comes, as a dead network file system does.
    let fifo = dir.path().join("config");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let args = format!("--sock S --apisock A {} --config config", small_image());
    let mut child = rafsd(dir.path(), &args).spawn().unwrap();
    let begin = Instant::now();
    let stream = loop {
        if let Ok(stream) = UnixStream::connect(dir.path().join("A")) {
            break stream;
        }
        assert!(begin.elapsed() < daemon::SOON);
        std::thread::sleep(Duration::from_millis(2));
    };
    let (_, body) = daemon::exchange(&stream, "GET", "/api/v1/daemon", "");
    assert!(body.contains(r#""state":"INIT""#), "{body}");
    let stop = Instant::now();
    // SAFETY: the child was not waited for yet, so the pid is still its own.
    unsafe { libc::kill(libc::pid_t::try_from(child.id()).unwrap(), libc::SIGTERM) };
    let status = child.wait().unwrap();
    let took = stop.elapsed();
    assert_eq!(status.code(), Some(0));
    assert!(!dir.path().join("A").exists());
    took
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_nothing() {
    ends_at_once("a pipe that nobody reads", end_of_one_whose_pipe_nobody_reads);
}

fn end_of_one_whose_pipe_nobody_reads() -> Duration {
    let dir = scratch();
    let mut command = rafsd(
        dir.path(),
        &format!("virtiofs --sock S --apisock A --log-level debug {}", small_image()),
    );
    // As Kata does: one pipe for both.
    let (mut reader, writer) = std::io::pipe().unwrap();
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let daemon = Daemon::start(dir.path(), command);
    let stream = daemon.connect();
    let long = "x".repeat(7000);
    // Far more than a pipe holds.
    for _ in 0..200 {
        let (status, _) = daemon::exchange(&stream, "GET", &format!("/{long}"), "");
        assert_eq!(status, 404);
    }
    // The reader comes back, and finds whole lines.
    let mut text = vec![0; 32 * 1024];
    reader.read_exact(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.lines().next().unwrap().starts_with("[20"), "{text:.200}");
    // The reader goes away for good.
    drop(reader);
    for _ in 0..50 {
        assert_eq!(daemon::exchange(&stream, "GET", &format!("/{long}"), "").0, 404);
    }
    daemon.signal(libc::SIGTERM);
    let (status, took, _) = daemon.end();
    assert_eq!(status.code(), Some(0));
    took
}

#[test]
fn no_line_is_long_and_every_line_is_utf8() {
    let dir = scratch();
    let mut command =
        rafsd(dir.path(), &format!("virtiofs --sock S --apisock A {}", small_image()));
    command.stdout(Stdio::null());
    let daemon = Daemon::start(dir.path(), command);
    let stream = daemon.connect();
    let (status, _) = daemon::exchange(&stream, "GET", &format!("/{}", "y".repeat(60_000)), "");
    assert_eq!(status, 404);
    daemon.signal(libc::SIGTERM);
    let (_, _, log) = daemon.end();
    let longest = log.lines().map(str::len).max().unwrap();
    assert!((50_000..=60 * 1024).contains(&longest), "{longest}");
}

#[test]
fn logs_can_go_to_a_file() {
    let dir = scratch();
    let args = format!("virtiofs --sock S --apisock A --log-file log {}", small_image());
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &args));
    daemon.signal(libc::SIGTERM);
    let (status, _, stderr) = daemon.end();
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
    let log = fs::read_to_string(dir.path().join("log.log")).unwrap();
    assert!(log.contains("running: serving tag kataShared on S"), "{log}");
}
