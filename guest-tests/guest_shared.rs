//! Shared directories in real guests: an overlay as Kata's agent makes it, with its lower layer on an
//! image and its upper layer on a directory of the host; and the POSIX test suite pjdfstest, beside
//! virtiofsd on the same machine.
//!
//! They need root: a daemon that shares a directory acts as the guest's users, and the host mounts.
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
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};

use daemon::{Daemon, rafsd};
use support::guest::{Guest, Machine};
use support::parts::{Parts, run};

const TAG: &str = "kataShared";
const SHARED_CHECKS: [&str; 10] = [
    "mount",
    "image",
    "later",
    "overlay",
    "container",
    "silent",
    "lower",
    "remount",
    "gone",
    "umount",
];

#[test]
fn user_mode_linux_runs_a_container_on_an_overlay() {
    runs_a_container_on_an_overlay(Machine::Uml72, "overlay_uml");
}

#[test]
fn linux_6_1_runs_a_container_on_an_overlay() {
    runs_a_container_on_an_overlay(Machine::Qemu7Linux61, "overlay_linux_6_1");
}

fn runs_a_container_on_an_overlay(machine: Machine, module: &str) {
    let parts = Parts::install(&["guests", "overlay", "rootfs"]).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = scratch.path();
    let shared = dir.join("shared");
    fs::create_dir(&shared).unwrap();
    let bootstrap = make_image(dir, &parts.path("rootfs").unwrap());

    // In Kata's order: the daemon, the shared directory, the guest; the image when it runs.
    let daemon = Arc::new(Daemon::start(dir, rafsd(dir, "virtiofs --sock S --apisock A")));
    let body =
        format!(r#"{{"fs_type":"passthrough_fs","source":"{}","config":""}}"#, shared.display());
    assert_eq!(daemon.call("POST", "/api/v1/mount?mountpoint=%2Fcontainers", &body).0, 204);
    let host = Host::start(&daemon, &shared, &bootstrap);
    let report = Guest::new(machine, &dir.join("S"), TAG)
        .job(include_str!("init/shared-job.sh"))
        .file("guest/container", include_bytes!("init/container.sh"))
        .file("modules/overlay.ko", fs::read(parts.path(module).unwrap()).unwrap())
        .run();
    host.stop();
    let report = report.unwrap();
    report.expect(&SHARED_CHECKS);
    assert!(report.output("container").contains("the container is content"));

    let upper = |path: &str| fs::symlink_metadata(shared.join("upper").join(path)).unwrap();
    let whiteout = upper("etc/issue");
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "a whiteout");
    let version = upper("etc/debian_version");
    assert_eq!((version.uid(), version.gid(), version.len()), (12, 34, 3));
    assert!(upper("srv/fifo").file_type().is_fifo());
    assert_eq!(upper("usr/bin/ls").mode() & 0o7777, 0o4750);
    assert_eq!(
        (upper("srv/passwd").ino(), upper("srv/passwd").nlink()),
        (upper("etc/passwd").ino(), 2)
    );
    let opaque = xattr::get(shared.join("upper/etc/cron.daily"), "trusted.overlay.opaque").unwrap();
    assert_eq!(opaque.as_deref(), Some(&b"y"[..]));
    let value = xattr::get(shared.join("upper/etc/group"), "trusted.test").unwrap();
    assert_eq!(value.as_deref(), Some(&b"value"[..]));
    assert_eq!(fs::read(shared.join("after")).unwrap(), b"still\n");
    let log = Arc::into_inner(daemon).expect("the host has stopped").kill();
    assert!(!log.contains(" ERROR "), "{log}");
}

/// What the host does when the guest asks for it.
struct Host {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Host {
    fn start(daemon: &Arc<Daemon>, shared: &Path, bootstrap: &Path) -> Host {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, daemon) = (Arc::clone(&stop), Arc::clone(daemon));
        let (shared, bootstrap) = (shared.to_owned(), bootstrap.to_owned());
        let thread = std::thread::spawn(move || {
            let later = shared.join("later");
            while !stopped.load(Ordering::Relaxed) {
                for thing in ["image", "mount", "unmount"] {
                    let (please, done) = (
                        shared.join(format!("please-{thing}")),
                        shared.join(format!("done-{thing}")),
                    );
                    if !please.exists() || done.exists() {
                        continue;
                    }
                    let at = "/api/v1/mount?mountpoint=/rafs/c1/lowerdir";
                    match thing {
                        "image" => {
                            let body = mount_body(&bootstrap);
                            assert_eq!(daemon.call("POST", at, &body).0, 204);
                        }
                        "mount" => {
                            rustix::mount::mount(
                                "none",
                                &later,
                                "tmpfs",
                                MountFlags::empty(),
                                None,
                            )
                            .unwrap();
                            fs::write(later.join("file"), "on a tmpfs of the host").unwrap();
                        }
                        _ => assert_eq!(daemon.call("DELETE", at, "").0, 204),
                    }
                    fs::write(done, "").unwrap();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = rustix::mount::unmount(&later, UnmountFlags::DETACH);
        });
        Host { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// A mount request as Kata sends it: the config is a document in a string.
fn mount_body(bootstrap: &Path) -> String {
    let dir = bootstrap.parent().unwrap();
    let config = serde_json::json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": dir}},
            "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}},
        },
        "mode": "direct",
    });
    fs::create_dir_all(dir.join("cache")).unwrap();
    serde_json::json!({"fs_type": "rafs", "source": bootstrap, "config": config.to_string()})
        .to_string()
}

fn make_image(dir: &Path, tree: &Path) -> PathBuf {
    let bootstrap = dir.join("image.boot");
    run(Command::new(env!("CARGO_BIN_EXE_rafs"))
        .arg("create")
        .arg("--bootstrap")
        .arg(&bootstrap)
        .arg("--blob-dir")
        .arg(dir)
        .arg(tree))
    .unwrap();
    bootstrap
}

/// What pjdfstest may find on a shared directory, with the reason.
///
/// `open::etxtbsy` fails in the same way on virtiofsd in this guest, and the test asks for that.
const ACCEPTED: [&str; 1] = ["open::etxtbsy"];

#[test]
fn posix_test_suite_in_a_guest_beside_virtiofsd() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = scratch.path();
    fs::create_dir_all(dir.join("shared/containers")).unwrap();

    let daemon = Daemon::start(dir, rafsd(dir, "virtiofs --sock S --apisock A"));
    let body = serde_json::json!({"fs_type": "passthrough_fs", "source": dir.join("shared"), "config": ""});
    assert_eq!(
        daemon.call("POST", "/api/v1/mount?mountpoint=/containers", &body.to_string()).0,
        204
    );
    let ours = pjdfstest(&dir.join("S"), "containers");
    drop(daemon);

    let parts = Parts::install(&["virtiofsd"]).unwrap();
    let socket = dir.join("V");
    let mut peer = Command::new(parts.path("virtiofsd").unwrap())
        .args([
            "--sandbox=none",
            "--seccomp=none",
            "--xattr",
            "--cache=auto",
            "--announce-submounts",
            "--tag",
            TAG,
        ])
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", dir.join("shared").display()))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "virtiofsd does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let theirs = pjdfstest(&socket, "containers");
    let _ = peer.kill();
    let _ = peer.wait();

    for (name, said) in [("rafsd", &ours), ("virtiofsd", &theirs)] {
        eprintln!("pjdfstest on {name}: {said}");
    }
    let failed = |said: &str| -> Vec<String> {
        let names = said.lines().filter_map(|line| line.strip_suffix(" FAILED"));
        names.map(|name| name.trim().to_owned()).collect()
    };
    let (ours_failed, theirs_failed) = (failed(&ours), failed(&theirs));
    for name in &ours_failed {
        let known = ACCEPTED.contains(&name.as_str()) && theirs_failed.contains(name);
        assert!(known, "{name} fails; on virtiofsd these do: {theirs_failed:?}");
    }
    let count = format!("summary: Summary: {} failed", ours_failed.len());
    assert!(ours.contains(&count), "{ours}");
}

/// Boots a guest that runs pjdfstest in a directory of the share: what it did not find in order.
fn pjdfstest(socket: &Path, in_dir: &str) -> String {
    let parts = Parts::install(&["guests", "pjdfstest"]).unwrap();
    let program = parts.path("pjdfstest").unwrap();
    let mut guest = Guest::new(Machine::Uml72, socket, TAG)
        .job(&format!("dir={in_dir}\n{}", include_str!("init/pjdfstest-job.sh")))
        .file("bin/pjdfstest", fs::read(&program).unwrap())
        .file("guest/pjdfstest.toml", PJDFSTEST_CONFIG);
    // The libraries it needs, where it looks for them.
    let libraries = String::from_utf8(run(Command::new("ldd").arg(&program)).unwrap()).unwrap();
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        guest = guest.file(path.trim_start_matches('/'), fs::read(path).unwrap());
    }
    let report = guest.run().unwrap();
    report.expect(&["pjdfstest"]);
    report.output("pjdfstest").to_owned()
}

const PJDFSTEST_CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;
