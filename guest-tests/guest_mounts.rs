//! A real guest that mounts the device once, and sees fifty images come, go and be replaced while it reads
//! one of them: what Kata does to it as containers are started and stopped.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod daemon;
mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod guest;
    pub mod initramfs;
    pub mod parts;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use compat::{KataRs, rafs, snapshotter_config};
use daemon::{Daemon, rafsd, scratch};
use serde_json::{Value, json};
use support::guest::{Guest, Machine};
use support::parts::run;

const JOB: &str = include_str!("init/mounts-job.sh");

/// An image with some files and `marker`; its bootstrap, and the sums of its files.
fn image(dir: &Path, marker: &str) -> (PathBuf, Vec<u8>) {
    let tree = dir.join(marker);
    fs::create_dir(&tree).unwrap();
    fs::create_dir_all(dir.join("blobs")).unwrap();
    for number in 0..8u32 {
        // Nothing that repeats, nothing that compresses.
        let words = (0..20_000u32).map(|word| {
            (u64::from(word) << 8 | u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        });
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        fs::write(tree.join(format!("f{number}")), bytes).unwrap();
    }
    let mut names = Command::new("sh");
    let sums = run(names.args(["-c", "sha256sum f*"]).current_dir(&tree)).unwrap();
    fs::write(tree.join("marker"), marker).unwrap();
    let bootstrap = dir.join(format!("{marker}.boot"));
    let mut create = Command::new(env!("CARGO_BIN_EXE_rafs"));
    create.arg("create").arg("--bootstrap").arg(&bootstrap);
    run(create.arg("--blob-dir").arg(dir.join("blobs")).arg(&tree)).unwrap();
    (bootstrap, sums)
}

fn wait_for(path: &Path) {
    let begin = Instant::now();
    while !path.exists() {
        assert!(begin.elapsed() < Duration::from_secs(240), "no {}", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn images_come_and_go_while_a_guest_reads() {
    let dir = scratch();
    let (first, sums) = image(dir.path(), "first");
    let (second, _) = image(dir.path(), "second");
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let daemon = Daemon::start(
        dir.path(),
        rafsd(dir.path(), "virtiofs --hybrid-mode --log-level info --apisock A --sock S"),
    );
    let kata = KataRs::connect(&dir.path().join("A"));
    let body = json!({"fs_type": "passthrough_fs", "source": shared, "config": ""});
    kata.mount("/containers", &body).unwrap();
    let config = snapshotter_config("/1", &dir.path().join("blobs"), &dir.path().join("cache"));
    let at = |i: usize| format!("/rafs/c{i}/lowerdir");
    let mount = |i: usize, bootstrap: &Path| kata.mount(&at(i), &rafs(bootstrap, &config)).unwrap();
    let report = std::thread::scope(|scope| {
        let host = scope.spawn(|| {
            wait_for(&shared.join("ready"));
            (0..50).for_each(|i| mount(i, &first));
            fs::write(shared.join("mounted"), "").unwrap();
            wait_for(&shared.join("reading"));
            for i in 1..50 {
                kata.umount(&at(i)).unwrap();
                mount(i, &second);
            }
            fs::write(shared.join("changed"), "").unwrap();
            wait_for(&shared.join("seen"));
            (0..50).for_each(|i| kata.umount(&at(i)).unwrap());
            fs::write(shared.join("unmounted"), "").unwrap();
        });
        let report = Guest::new(Machine::Qemu11Linux73, &dir.path().join("S"), "kataShared")
            .job(JOB)
            .file("expected/sums", sums)
            .run()
            .expect("the guest");
        host.join().unwrap();
        report
    });
    report.expect(&[
        "mount",
        "absent",
        "mounted",
        "appear",
        "read",
        "open",
        "new",
        "unmounted",
        "gone",
    ]);
    let info: Value = kata.info().backend_collection.unwrap();
    assert_eq!(info.as_object().unwrap().len(), 1, "{info}");
    daemon.signal(libc::SIGTERM);
    let (status, _, log) = daemon.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
}
