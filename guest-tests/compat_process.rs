//! The process: statements 1 to 20 of `docs/compatibility.md`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod daemon;
mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use compat::{KataGo, KataRs, eventually, rafs, send, snapshotter_config};
use daemon::quick::ends_at_once;
use daemon::{Daemon, SOON, golden, output, rafsd, scratch};
use serde_json::{Value, json};
use support::frontend::{Vm, VmConfig, Vmm};
use support::hang_fs::{HangFs, Mode};
use support::image::Image;
use support::memory::{Layout, MIB};
use support::say;

const KATA_GO: &str = "virtiofs --log-level info --apisock A --sock S";

/// Starts a command line, looks at its state, ends it; its log.
fn start_and_end(args: &str) -> String {
    let dir = scratch();
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), args));
    UnixStream::connect(dir.path().join("S")).expect("RUNNING means that the VMM can connect");
    daemon.signal(libc::SIGTERM);
    let (status, _, log) = daemon.end();
    assert_eq!(status.code(), Some(0), "{args}: {log}");
    log
}

#[test]
fn s01_both_sockets_listen_before_the_state_is_running() {
    let dir = scratch();
    let mut child = rafsd(dir.path(), KATA_GO).spawn().unwrap();
    let begin = Instant::now();
    loop {
        assert!(begin.elapsed() < SOON);
        let Ok(stream) = UnixStream::connect(dir.path().join("A")) else { continue };
        let head = "GET /api/v1/daemon HTTP/1.1\r\nHost: unix";
        if send(&stream, head, "").json()["state"] == "RUNNING" {
            break;
        }
    }
    UnixStream::connect(dir.path().join("S")).expect("the VMM can connect");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn s02_it_is_running_soon() {
    let dir = scratch();
    let begin = Instant::now();
    let mut child = rafsd(dir.path(), KATA_GO).spawn().unwrap();
    let _kata = loop {
        assert!(begin.elapsed() < SOON);
        if dir.path().join("A").exists() {
            break KataRs::connect(&dir.path().join("A"));
        }
    };
    say(format!("from exec to RUNNING: {:?}, where Kata waits for 10 s", begin.elapsed()));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn s03_to_s06_command_lines_of_kata_start_over_stale_relative_sockets() {
    for args in [
        KATA_GO,
        "virtiofs --hybrid-mode --log-level info --apisock A --sock S",
        "virtiofs --log-level info --apisock A --sock S --thread-pool-size=1 --announce-submounts",
        "virtiofs --log-level info --apisock A --sock S --thread-pool-size=1 -o announce_submounts",
    ] {
        let dir = scratch();
        for name in ["A", "S"] {
            drop(UnixListener::bind(dir.path().join(name)).unwrap());
        }
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), args));
        let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        assert!(fuse.getattr(1).is_ok(), "{args}");
        drop(daemon);
    }
}

#[test]
fn s07_the_last_log_level_counts() {
    assert!(start_and_end(&format!("{KATA_GO} --log-level debug")).contains("DEBUG"));
    assert!(!start_and_end(&format!("{KATA_GO} --log-level error")).contains("INFO"));
}

#[test]
fn s08_a_pipe_that_is_full_or_closed_stalls_no_guest() {
    let dir = scratch();
    let image = Image::build(dir.path(), 4, 400_000, 64 << 10, "zstd").unwrap();
    let mut command = rafsd(dir.path(), "virtiofs --log-level trace --apisock A --sock S");
    // As Kata does: one pipe for both.
    let (reader, writer) = std::io::pipe().unwrap();
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let daemon = Daemon::start(dir.path(), command);
    let kata = KataGo::connect(&dir.path().join("A"));
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    // Far more lines than the pipe holds, on all sides.
    for i in 0..40 {
        let at = format!("/{}/{i}", "long".repeat(60));
        assert_eq!(kata.mount(&at, &rafs(&image.bootstrap, &config)).status, 204);
    }
    for _ in 0..300 {
        kata.call("GET", &format!("/{}", "x".repeat(5000)), None);
    }
    let read_all = |at: &str| {
        let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        for number in 0..4 {
            let path = format!("{at}/{}", support::image::name(number));
            let node = fuse.resolve(path.as_bytes()).unwrap();
            image.check_file(&mut fuse, number, node).unwrap();
        }
    };
    read_all(&format!("/{}/7", "long".repeat(60)));
    // What can be read of the pipe is whole lines of UTF-8, none too long for Kata's scanner.
    let mut lines = BufReader::new(&reader).lines();
    for _ in 0..5 {
        let line = lines.next().unwrap().expect("UTF-8");
        assert!(line.starts_with("[20") && line.len() < 64 * 1024, "{line:.200}");
    }
    drop(lines);
    drop(reader);
    read_all(&format!("/{}/8", "long".repeat(60)));
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.end().0.code(), Some(0));
}

#[test]
fn s09_it_needs_no_standard_input_and_no_terminal() {
    let dir = scratch();
    let mut command = rafsd(dir.path(), KATA_GO);
    command.stdin(Stdio::null()).process_group(0);
    let daemon = Daemon::start(dir.path(), command);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.end().0.code(), Some(0));
}

#[test]
fn s10_sigterm_ends_it_in_every_phase() {
    let phases = ["no VMM", "a VMM", "reads under way", "a backend that hangs, a mount that hangs"];
    for (phase, what) in phases.into_iter().enumerate() {
        ends_at_once(what, || end_in_phase(phase, what));
    }
}

/// How long a daemon takes to end in which more goes on from phase to phase.
fn end_in_phase(phase: usize, what: &str) -> Duration {
    let dir = scratch();
    let image = Image::build(dir.path(), 2, 4 << 20, 64 << 10, "none").unwrap();
    let backend = HangFs::mount(&image.blobs, &dir.path().join("backend")).unwrap();
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), KATA_GO));
    let kata = KataGo::connect(&dir.path().join("A"));
    let config = snapshotter_config("/1", backend.path(), &dir.path().join("cache"));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let mut visitor = (phase > 0).then(|| Vm::mounted(&dir.path().join("S")));
    if let (Some((_, fuse)), true) = (&mut visitor, phase > 1) {
        let node = fuse.resolve(b"/m/f0000").unwrap();
        if phase > 2 {
            backend.set(Mode::Hang);
            let fifo = dir.path().join("fifo");
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            let kind = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
            let socket = dir.path().join("A");
            let body = rafs(&fifo, &config);
            std::thread::spawn(move || {
                // No answer comes any more.
                let stream = UnixStream::connect(socket).unwrap();
                let body = body.to_string();
                let head = format!(
                    "POST /api/v1/mount?mountpoint=/h HTTP/1.1\r\nHost: unix\r\n\
                     Content-Length: {}",
                    body.len()
                );
                let _ = std::panic::catch_unwind(|| send(&stream, &head, &body));
            });
        }
        for i in 0..50 {
            fuse.submit_read(node, 0, i * 70_000, 65_536).unwrap();
        }
        fuse.flush();
        if phase > 2 {
            backend.wait_hanging(1, SOON).unwrap();
        }
    }
    daemon.signal(libc::SIGTERM);
    let (status, took, log) = daemon.end();
    assert_eq!(status.code(), Some(0), "{what}: {log}");
    say(format!("SIGTERM with {what}: gone after {took:?}"));
    backend.set(Mode::Pass);
    took
}

#[test]
fn s11_what_a_killed_daemon_has_cached_is_good() {
    let dir = scratch();
    let image = Image::build(dir.path(), 4, 2 << 20, 64 << 10, "zstd").unwrap();
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    for round in 0..4 {
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), KATA_GO));
        let kata = KataGo::connect(&dir.path().join("A"));
        assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
        let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        for number in 0..=round {
            let path = format!("/m/{}", support::image::name(number));
            let node = fuse.resolve(path.as_bytes()).unwrap();
            image.check_file(&mut fuse, number, node).unwrap();
        }
        if round < 3 {
            // More is on its way when it is killed.
            let path = format!("/m/{}", support::image::name(round + 1));
            let node = fuse.resolve(path.as_bytes()).unwrap();
            for i in 0..16 {
                fuse.submit_read(node, 0, i << 17, 1 << 17).unwrap();
            }
            fuse.flush();
        }
        daemon.signal(libc::SIGKILL);
        drop(daemon);
    }
}

#[test]
fn s12_nothing_that_goes_wrong_ends_it() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 400_000, 64 << 10, "none").unwrap();
    let daemon =
        Daemon::start(dir.path(), rafsd(dir.path(), &format!("{KATA_GO} --read-timeout 300ms")));
    let kata = KataGo::connect(&dir.path().join("A"));
    let parent = || {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
        status.lines().find(|line| line.starts_with("PPid:")).unwrap().to_owned()
    };
    let before = parent();
    let backend = HangFs::mount(&image.blobs, &dir.path().join("backend")).unwrap();
    let config = snapshotter_config("/1", backend.path(), &dir.path().join("cache"));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 500);
    assert_eq!(kata.mount("/n", &rafs(Path::new("/none"), &config)).status, 500);
    assert_eq!(kata.umount("/n").status, 500);
    backend.set(Mode::Fail(libc::EIO));
    for vmm in Vmm::ALL {
        let config = VmConfig { vmm, memory: Layout::flat(64 * MIB), ..VmConfig::default() };
        let mut vm = Vm::boot(&dir.path().join("S"), config).unwrap();
        let mut fuse = vm.fuse(1);
        fuse.init().unwrap();
        let node = fuse.resolve(b"/m/f0000").unwrap();
        assert_eq!(fuse.read(node, 0, 0, 10).unwrap_err().errno(), Some(libc::EIO));
        // Gone without a word.
    }
    assert_eq!(kata.call("GET", "/api/v1/daemon", None).json()["state"], "RUNNING");
    assert_eq!(parent(), before, "it stays the child of who started it");
}

#[test]
fn s13_sockets_are_removed_and_may_be_missing() {
    for missing in [false, true] {
        let dir = scratch();
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), KATA_GO));
        if missing {
            fs::remove_file(dir.path().join("A")).unwrap();
            fs::remove_file(dir.path().join("S")).unwrap();
        }
        daemon.signal(libc::SIGTERM);
        assert_eq!(daemon.end().0.code(), Some(0));
        assert!(!dir.path().join("A").exists() && !dir.path().join("S").exists());
    }
}

#[test]
fn s14_the_commit_of_version_is_that_of_the_api_under_both_names() {
    let dir = scratch();
    let nydusd = dir.path().join("nydusd");
    symlink(env!("CARGO_BIN_EXE_rafsd"), &nydusd).unwrap();
    let mut command = Command::new(&nydusd);
    command.arg("--version");
    let (code, text, _) = output(command);
    assert_eq!(code, Some(0));
    // The snapshotter's expression: `Git Commit:\s*(.+)`
    let commit = text.split_once("Git Commit:").unwrap().1.lines().next().unwrap().trim();
    let mut command = rafsd(dir.path(), KATA_GO);
    command = {
        let mut named = Command::new(&nydusd);
        named.args(command.get_args()).current_dir(dir.path());
        named.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        named
    };
    let _daemon = Daemon::start(dir.path(), command);
    let info = KataRs::connect(&dir.path().join("A")).info();
    assert_eq!(info.version.git_commit, commit);
}

#[test]
fn s15_wrong_arguments_give_2_and_failures_1() {
    let dir = scratch();
    for (args, code, what) in [
        ("virtiofs --apisock A", 2, "--sock"),
        ("virtiofs --sock S --frobnicate", 2, "--frobnicate"),
        ("virtiofs --sock /no/such/dir/S", 1, "/no/such/dir/S"),
        ("virtiofs --sock S --bootstrap /no/such/file", 1, "/no/such/file"),
        ("virtiofs --sock S --shared-dir /no/such/dir", 1, "/no/such/dir"),
        ("virtiofs --fd=77 --shared-dir /", 1, "descriptor 77"),
    ] {
        let (got, stdout, stderr) = output(rafsd(dir.path(), args));
        assert_eq!((got, stdout.as_str()), (Some(code), ""), "{args}: {stderr}");
        assert!(stderr.contains(what), "{args}: {stderr}");
    }
}

/// A directory with a file in it, and what a guest sees of it.
fn check_shared(socket: &Path, dir: &Path) {
    fs::write(dir.join("from-host"), "hello guest").unwrap();
    let (_vm, mut fuse) = Vm::mounted(socket);
    let node = fuse.resolve(b"/from-host").unwrap();
    let handle = fuse.open(node).unwrap();
    assert_eq!(fuse.read(node, handle, 0, 100).unwrap(), b"hello guest");
    fuse.release(node, handle).unwrap();
}

#[test]
fn s16_kata_s_go_runtime_passes_a_listening_socket_as_descriptor_3() {
    let dir = scratch();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let listener = UnixListener::bind(dir.path().join("S")).unwrap();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "exec \"$0\" \"$@\" 3<&0 0</dev/null", env!("CARGO_BIN_EXE_rafsd")])
        .args([
            "--syslog",
            "--cache=auto",
            "--fd=3",
            "--thread-pool-size=1",
            "--announce-submounts",
        ])
        .arg(format!("--shared-dir={}", shared.display()))
        .current_dir(dir.path())
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    check_shared(&dir.path().join("S"), &shared);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn s17_kata_s_runtime_rs_waits_for_a_line_of_virtiofsd() {
    let dir = scratch();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let args = "--socket-path S --shared-dir shared --cache auto --thread-pool-size=1 \
                -o announce_submounts --xattr --log-level error";
    let mut child = rafsd(dir.path(), args).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    assert!(line.contains("Waiting for vhost-user socket connection"), "{line}");
    check_shared(&dir.path().join("S"), &shared);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn s18_capabilities_are_json() {
    let dir = scratch();
    let (code, stdout, _) = output(rafsd(dir.path(), "--print-capabilities"));
    assert_eq!(code, Some(0));
    let capabilities: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(capabilities["type"], "fs");
    assert!(capabilities["features"].is_array());
}

#[test]
fn s19_what_is_mounted_at_start() {
    let image = golden("v6-none");
    let (boot, blobs) = (image.join("bootstrap"), image.join("blobs"));
    let (boot, blobs) = (boot.display(), blobs.display());
    let dir = scratch();
    let config = snapshotter_config("/1", &image.join("blobs"), &dir.path().join("cache"));
    fs::write(dir.path().join("config.json"), config).unwrap();
    fs::create_dir(dir.path().join("shared")).unwrap();
    let cases = [
        (format!("-B {boot}"), "/ Rafs"),
        (format!("-B {boot} -D {blobs}"), "/ Rafs"),
        (format!("-B {boot} -C config.json -m /rafs/x"), "/rafs/x Rafs"),
        ("-s shared".to_owned(), "/ PassthroughFs"),
        (format!("-s shared -B {boot} -m /containers"), "/containers PassthroughFs"),
    ];
    for (args, want) in cases {
        let args = format!("virtiofs --sock S -A A {args}");
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &args));
        let nydusctl = compat::Nydusctl::new(&dir.path().join("A"));
        assert_eq!(nydusctl.info(), [want], "{args}");
        let at = want.split(' ').next().unwrap();
        let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        let root = if at == "/" { 1 } else { fuse.resolve(at.as_bytes()).unwrap() };
        assert!(fuse.getattr(root).is_ok());
        drop(daemon);
    }
}

#[test]
fn s20_memory_does_not_grow_with_mounts() {
    let dir = scratch();
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), KATA_GO));
    let kata = KataRs::connect(&dir.path().join("A"));
    let image = golden("v6-zstd");
    let config = snapshotter_config("/1", &image.join("blobs"), &dir.path().join("cache"));
    let mount = rafs(&image.join("bootstrap"), &config);
    let usage = || support::daemon::usage_of(daemon.child.id()).unwrap();
    kata.mount("/first", &mount).unwrap();
    let one = usage();
    for i in 0..200 {
        kata.mount(&format!("/rafs/c{i}/lowerdir"), &mount).unwrap();
    }
    let many = usage();
    say(format!("one mount: {one}; 201 mounts: {many}"));
    assert!(many.anon_kib < one.anon_kib + 200 * 64, "{one} {many}");
    for i in 0..200 {
        kata.umount(&format!("/rafs/c{i}/lowerdir")).unwrap();
    }
    eventually("what was unmounted is closed", || usage().fds <= one.fds + 2);
}

#[test]
fn a_thousand_vmms_come_and_go() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 100_000, 64 << 10, "none").unwrap();
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), KATA_GO));
    let kata = KataGo::connect(&dir.path().join("A"));
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let usage = || support::daemon::usage_of(daemon.child.id()).unwrap();
    let visit = |i: usize| {
        let vmm = Vmm::ALL[i % Vmm::ALL.len()];
        let config =
            VmConfig { vmm, queue_size: 64, memory: Layout::flat(8 * MIB), ..VmConfig::default() };
        let mut vm = Vm::boot(&dir.path().join("S"), config).unwrap();
        let mut fuse = vm.fuse(1);
        fuse.init().unwrap();
        let node = fuse.resolve(b"/m/f0000").unwrap();
        image.check_file(&mut fuse, 0, node).unwrap();
        if i.is_multiple_of(2) {
            vm.stop().unwrap();
        }
    };
    (0..50).for_each(visit);
    std::thread::sleep(Duration::from_secs(1));
    let before = usage();
    let cycles = 1000;
    (0..cycles).for_each(visit);
    eventually("nothing is left of them", || {
        let after = usage();
        after.fds <= before.fds && after.threads <= before.threads
    });
    let after = usage();
    say(format!("{cycles} VMMs: {before} to {after}"));
    assert!(after.anon_kib <= before.anon_kib + 4096, "{before} {after}");
    assert_eq!(kata.call("GET", "/api/v1/daemon", None).json()["state"], json!("RUNNING"));
    daemon.signal(libc::SIGTERM);
    let (status, _, log) = daemon.end();
    assert_eq!(status.code(), Some(0));
    assert!(!log.contains("panicked"), "{log}");
}
