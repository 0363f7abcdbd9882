//! Images mounted, unmounted and mounted anew by the API, while a guest looks on: statements 25 to
//! 32, 38, 39, 50, 61, 64 and 66 of `docs/compatibility.md`, and what holds beyond them.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod daemon;
mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use compat::{KataGo, KataRs, Nydusctl, rafs, snapshotter_config};
use daemon::{Daemon, golden, rafsd, scratch};
use serde_json::json;
use support::frontend::{Vm, VmConfig};
use support::fuse_client::Fuse;
use support::image::{Image, name, pattern};
use support::say;

/// A daemon as Kata starts it.
fn kata(dir: &Path) -> Daemon {
    Daemon::start(dir, rafsd(dir, "virtiofs --log-level info --apisock A --sock S"))
}

/// Body of a mount request for a golden image.
fn body(case: &str, cache: &Path) -> serde_json::Value {
    let dir = golden(case);
    rafs(&dir.join("bootstrap"), &snapshotter_config("/1", &dir.join("blobs"), cache))
}

fn names(fuse: &mut Fuse, node: u64) -> Vec<String> {
    let listed = fuse.list(node, 4096, true).unwrap();
    let names = listed.into_iter().map(|entry| String::from_utf8(entry.name).unwrap());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// A shared directory, and the body of a mount request for it.
fn shared(dir: &Path) -> (std::path::PathBuf, serde_json::Value) {
    let shared = dir.join("shared");
    std::fs::create_dir(&shared).unwrap();
    let body = json!({"fs_type": "passthrough_fs", "source": shared, "config": ""});
    (shared, body)
}

#[test]
fn s25_and_s26_both_runtimes_share_a_directory_at_containers() {
    for strict in [false, true] {
        let dir = scratch();
        let (shared, body) = shared(dir.path());
        let _daemon = kata(dir.path());
        let socket = dir.path().join("A");
        if strict {
            KataRs::connect(&socket).mount("/containers", &body).unwrap();
        } else {
            let answer = KataGo::connect(&socket).mount("/containers", &body);
            assert_eq!((answer.status, answer.body.as_str()), (204, ""));
        }
        let info = KataRs::connect(&socket).info().backend_collection.unwrap();
        assert_eq!(info["/containers"]["backend_type"], "PassthroughFs", "{info}");
        assert!(info["/containers"]["config"].is_null());
        let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        std::fs::write(shared.join("later"), "from the host").unwrap();
        let node = fuse.resolve(b"/containers/later").unwrap();
        let handle = fuse.open(node).unwrap();
        assert_eq!(fuse.read(node, handle, 0, 100).unwrap(), b"from the host");
        fuse.release(node, handle).unwrap();
    }
}

#[test]
fn s50_nydusctl_beside_one_image_and_one_shared_directory() {
    let dir = scratch();
    let image = golden("v6-zstd");
    let (_, body) = shared(dir.path());
    let daemon = kata(dir.path());
    KataGo::connect(&dir.path().join("A")).mount("/containers", &body);
    let nydusctl = Nydusctl::new(&dir.path().join("A"));
    let config = snapshotter_config("/1", &image.join("blobs"), &dir.path().join("cache"));
    nydusctl.mount(&image.join("bootstrap"), &config, "/rafs/c1/lowerdir", "rafs");
    assert_eq!(nydusctl.info(), ["/containers PassthroughFs", "/rafs/c1/lowerdir Rafs"]);
    nydusctl.set_log_level("debug");
    let (sizes, times) = nydusctl.fsstats();
    assert_eq!((sizes.len(), times.len()), (8, 8));
    nydusctl.backend();
    nydusctl.cache();
    nydusctl.umount("/rafs/c1/lowerdir");
    nydusctl.umount("/containers");
    assert_eq!(nydusctl.info(), [""; 0]);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.end().2.contains("DEBUG"));
}

#[test]
fn s61_the_root_lists_what_is_mounted_and_is_searched_before_it_is_listed() {
    let dir = scratch();
    let (_, shared) = shared(dir.path());
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    assert_eq!(kata.mount("/containers", &shared).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    assert!(fuse.resolve(b"/containers").is_ok(), "before any listing");
    assert_eq!(names(&mut fuse, 1), ["containers"]);
    let body = body("v6-none", &dir.path().join("cache"));
    assert_eq!(kata.mount("/rafs/c1/lowerdir", &body).status, 204);
    assert!(fuse.resolve(b"/rafs/c1/lowerdir").is_ok());
    assert_eq!(names(&mut fuse, 1), ["containers", "rafs"]);
}

#[test]
fn s66_an_image_beside_a_shared_directory_is_read_only() {
    let dir = scratch();
    let (_, shared) = shared(dir.path());
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    assert_eq!(kata.mount("/containers", &shared).status, 204);
    let body = body("v6-none", &dir.path().join("cache"));
    assert_eq!(kata.mount("/rafs/c1/lowerdir", &body).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let root = fuse.resolve(b"/rafs/c1/lowerdir").unwrap();
    // MKDIR: mode, umask, name.
    let mkdir = [&[0; 8][..], b"new\0"].concat();
    let error = fuse.call(9, root, &[&mkdir], 128).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EROFS));
    let containers = fuse.resolve(b"/containers").unwrap();
    fuse.call(9, containers, &[&mkdir], 128).unwrap();
    assert!(dir.path().join("shared/new").is_dir());
}

#[test]
fn s27_an_image_appears_after_the_guest_has_mounted_and_looked_in_vain() {
    let dir = scratch();
    let image = Image::build(dir.path(), 3, 300_000, 64 << 10, "zstd").unwrap();
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    for _ in 0..3 {
        assert_eq!(fuse.lookup(1, b"rafs").unwrap_err().errno(), Some(libc::ENOENT));
    }
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    let answer = kata.mount("/rafs/c1/lowerdir", &rafs(&image.bootstrap, &config));
    assert_eq!((answer.status, answer.body.as_str()), (204, ""), "{answer:?}");
    let root = fuse.resolve(b"/rafs/c1/lowerdir").unwrap();
    for number in 0..3 {
        let file = fuse.lookup(root, name(number).as_bytes()).unwrap().nodeid;
        assert_eq!(fuse.read_all(file, 1 << 17).unwrap(), pattern(number, 0, 300_000));
    }
}

#[test]
fn s28_a_bad_bootstrap_or_config_is_an_error_and_leaves_nothing() {
    let dir = scratch();
    let cache = dir.path().join("cache");
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    std::fs::write(dir.path().join("zeros"), [0; 8192]).unwrap();
    let good = body("v6-none", &cache);
    let source = |source: &Path| rafs(source, good["config"].as_str().unwrap());
    let config = |config: &str| rafs(&golden("v6-none").join("bootstrap"), config);
    let cases = [
        (source(Path::new("/no/such/file")), "No such file"),
        (source(dir.path()), "not a regular file"),
        (source(&dir.path().join("zeros")), "no RAFS bootstrap"),
        (config("{}"), "neither version 2"),
        (config("{"), "JSON"),
        (config(""), "version"),
        (config(r#"{"device":{"backend":{"type":"tape","config":{}}}}"#), "unknown backend"),
    ];
    for (body, want) in cases {
        let answer = kata.mount("/rafs/c1/lowerdir", &body);
        assert_eq!(answer.status, 500, "{body}: {answer:?}");
        assert!(answer.message().contains(want), "{want}: {answer:?}");
        assert_eq!(fuse.lookup(1, b"rafs").unwrap_err().errno(), Some(libc::ENOENT), "{body}");
    }
    let info = kata.call("GET", "/api/v1/daemon", None).json();
    assert_eq!(info["backend_collection"], json!({}));
    assert_eq!(kata.mount("/rafs/c1/lowerdir", &good).status, 204, "the place is free");
}

#[test]
fn s29_a_second_mount_at_one_place_is_refused() {
    let dir = scratch();
    let _daemon = kata(dir.path());
    let kata = KataRs::connect(&dir.path().join("A"));
    let body = body("v6-none", &dir.path().join("cache"));
    kata.mount("/rafs/c1/lowerdir", &body).unwrap();
    let message = kata.mount("/rafs/c1/lowerdir", &body).unwrap_err();
    assert!(message.contains("object or filesystem already exists"), "{message}");
    // Two at once: one of them wins.
    let results: Vec<_> = std::thread::scope(|scope| {
        let mounts: Vec<_> =
            (0..8).map(|_| scope.spawn(|| kata.mount("/rafs/c2/lowerdir", &body))).collect();
        mounts.into_iter().map(|mount| mount.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
}

#[test]
fn s30_an_unmounted_path_disappears_and_a_new_image_there_is_the_new_one() {
    let dir = scratch();
    let cache = dir.path().join("cache");
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    assert_eq!(kata.mount("/rafs/c1/lowerdir", &body("v6-none", &cache)).status, 204);
    let root = fuse.resolve(b"/rafs/c1/lowerdir").unwrap();
    let old = names(&mut fuse, root);
    let kept = fuse.lookup(root, b"a").unwrap().nodeid;
    let answer = kata.umount("/rafs/c1/lowerdir");
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    assert_eq!(fuse.lookup(1, b"rafs").unwrap_err().errno(), Some(libc::ENOENT));
    assert_eq!(fuse.getattr(kept).unwrap_err().errno(), Some(libc::ESTALE));

    assert_eq!(kata.mount("/rafs/c1/lowerdir", &body("v6-zstd", &cache)).status, 204);
    let root = fuse.resolve(b"/rafs/c1/lowerdir").unwrap();
    assert_ne!(names(&mut fuse, root), old);
    assert_eq!(fuse.getattr(kept).unwrap_err().errno(), Some(libc::ESTALE), "no stale inode");
}

#[test]
fn s31_unmounting_nothing_is_an_error_and_harms_nobody() {
    let dir = scratch();
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    for at in ["/rafs/c1/lowerdir", "/", "/containers"] {
        let answer = kata.umount(at);
        assert_eq!(answer.status, 500);
        assert!(answer.message().contains("object or filesystem doesn't exist"), "{answer:?}");
    }
    assert_eq!(kata.call("GET", "/api/v1/daemon", None).json()["state"], "RUNNING");
}

#[test]
fn s32_put_swaps_the_image() {
    let dir = scratch();
    let cache = dir.path().join("cache");
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let path = "/api/v1/mount?mountpoint=/rafs/c1/lowerdir";
    let missing = kata.call("PUT", path, Some(&body("v6-none", &cache)));
    assert!(missing.message().contains("doesn't exist"), "{missing:?}");
    assert_eq!(kata.mount("/rafs/c1/lowerdir", &body("v6-none", &cache)).status, 204);
    let root = fuse.resolve(b"/rafs/c1/lowerdir").unwrap();
    let old = names(&mut fuse, root);
    // The same image with another config: the guest notices nothing.
    let other = body("v6-none", &dir.path().join("other"));
    assert_eq!(kata.call("PUT", path, Some(&other)).status, 204);
    assert_eq!(names(&mut fuse, root), old);
    let info = kata.call("GET", "/api/v1/daemon", None).json();
    let config = &info["backend_collection"]["/rafs/c1/lowerdir"]["config"];
    let work_dir = config["cache"]["filecache"]["work_dir"].as_str().unwrap();
    assert!(work_dir.ends_with("/other"), "{config}");
    // Another image.
    assert_eq!(kata.call("PUT", path, Some(&body("v6-zstd", &cache))).status, 204);
    assert_eq!(fuse.getattr(root).unwrap_err().errno(), Some(libc::ESTALE));
    let root = fuse.resolve(b"/rafs/c1/lowerdir").unwrap();
    assert_ne!(names(&mut fuse, root), old);
    // What cannot be opened leaves what is there.
    let bad = rafs(Path::new("/no/such/file"), "{}");
    assert_eq!(kata.call("PUT", path, Some(&bad)).status, 500);
    assert!(fuse.getattr(root).is_ok());
}

#[test]
fn s38_an_image_that_cannot_be_opened_yet_holds_up_nothing_else() {
    let dir = scratch();
    let cache = dir.path().join("cache");
    let daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    // Opening a fifo waits for a writer that never comes, as a dead network file system does.
    let fifo = dir.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let hanging = rafs(&fifo, body("v6-none", &cache)["config"].as_str().unwrap());
    std::thread::scope(|scope| {
        for i in 0..10 {
            let (socket, hanging) = (dir.path().join("A"), &hanging);
            scope.spawn(move || {
                let kata = KataGo::connect(&socket);
                // Ends when the writer comes below.
                let answer = kata.mount(&format!("/rafs/h{i}/lowerdir"), hanging);
                assert_eq!(answer.status, 500, "{answer:?}");
            });
        }
        compat::eventually("ten threads that open", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
            let names = tasks
                .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
            names.filter(|name| name == "mount\n").count() == 10
        });
        assert_eq!(kata.call("GET", "/api/v1/daemon", None).status, 200);
        for i in 0..5 {
            let at = format!("/rafs/c{i}/lowerdir");
            assert_eq!(kata.mount(&at, &body("v6-none", &cache)).status, 204);
            assert_eq!(kata.umount(&at).status, 204);
        }
        drop(std::fs::OpenOptions::new().write(true).open(&fifo).unwrap());
    });
}

#[test]
fn s39_the_type_of_a_file_system_is_checked() {
    let dir = scratch();
    let _daemon = kata(dir.path());
    let kata = KataGo::connect(&dir.path().join("A"));
    let (_, shared) = shared(dir.path());
    for fs_type in ["passthrough", "passthroughfs", "passthrough_fs"] {
        let body = json!({"fs_type": fs_type, "source": shared["source"], "config": ""});
        assert_eq!(kata.mount("/s", &body).status, 204, "{fs_type}");
        assert_eq!(kata.umount("/s").status, 204, "{fs_type}");
    }
    for fs_type in ["", "Rafs", "RAFS", "ext4", "rafs "] {
        let body = json!({"fs_type": fs_type, "source": "/", "config": ""});
        let answer = kata.mount("/x", &body);
        assert_eq!(answer.status, 500, "{fs_type:?}: {answer:?}");
        answer.message();
    }
}

#[test]
fn fifty_images_in_one_device_come_and_go_while_the_guest_reads_others() {
    let dir = scratch();
    let image = Image::build(dir.path(), 8, 400_000, 64 << 10, "zstd").unwrap();
    let daemon = kata(dir.path());
    let kata = KataRs::connect(&dir.path().join("A"));
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    let mount = rafs(&image.bootstrap, &config);
    for i in 0..50 {
        kata.mount(&format!("/rafs/c{i}/lowerdir"), &mount).unwrap();
    }
    let mut vm =
        Vm::boot(&dir.path().join("S"), VmConfig { request_queues: 2, ..VmConfig::default() })
            .unwrap();
    let (mut fuse, mut other) = (vm.fuse(1), vm.fuse(2));
    fuse.init().unwrap();
    // Also so that each image has opened what it needs.
    for i in 0..50 {
        let node = fuse.resolve(format!("/rafs/c{i}/lowerdir/f0003").as_bytes()).unwrap();
        image.check_file(&mut fuse, 3, node).unwrap();
    }
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let reader = std::thread::spawn(move || {
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            for number in 0..8 {
                let path = format!("/rafs/c1/lowerdir/{}", name(number));
                let node = other.resolve(path.as_bytes()).unwrap();
                image.check_file(&mut other, number, node).unwrap();
            }
            rounds += 1;
        }
        rounds
    });
    // A hundred cycles; what is open in an image that goes ends with an error or the right bytes.
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "of the host").unwrap();
    let passthrough = json!({"fs_type": "passthrough_fs", "source": shared, "config": ""});
    let before = support::daemon::usage_of(daemon.child.id()).unwrap();
    for cycle in 0..100 {
        // A shared directory comes and goes, too, with a file that the guest knows.
        let at = format!("/shared/{}", cycle % 7);
        kata.mount(&at, &passthrough).unwrap();
        let node = fuse.resolve(format!("{at}/file").as_bytes()).unwrap();
        let handle = fuse.open(node).unwrap();
        assert_eq!(fuse.read(node, handle, 0, 100).unwrap(), b"of the host");
        kata.umount(&at).unwrap();
        assert_eq!(fuse.getattr(node).unwrap_err().errno(), Some(libc::ESTALE));
        let at = format!("/rafs/c{}/lowerdir", 2 + cycle % 48);
        let node = fuse.resolve(format!("{at}/f0005").as_bytes()).unwrap();
        let ticket = fuse.submit_read(node, 0, 64, 4096).unwrap();
        fuse.flush();
        kata.umount(&at).unwrap();
        let reply = fuse.wait(ticket, Duration::from_secs(60)).unwrap();
        match reply.errno {
            0 => assert_eq!(reply.bytes(), pattern(5, 64, 4096)),
            errno => assert_eq!(errno, libc::ESTALE),
        }
        fuse.recycle(reply);
        assert_eq!(fuse.read(node, 0, 0, 10).unwrap_err().errno(), Some(libc::ESTALE));
        kata.mount(&at, &mount).unwrap();
        // The same image at the same place: what the guest kept is good again.
        assert_eq!(fuse.read(node, 0, 0, 10).unwrap(), pattern(5, 0, 10));
    }
    done.store(true, Ordering::Relaxed);
    let rounds = reader.join().unwrap();
    let usage = || support::daemon::usage_of(daemon.child.id()).unwrap();
    compat::eventually("what was unmounted is closed", || {
        let after = usage();
        after.fds <= before.fds + 8 && after.threads <= before.threads + 8
    });
    let after = usage();
    say(format!("100 mounts and unmounts beside {rounds} rounds of reading: {before} to {after}"));
    assert!(after.anon_kib <= before.anon_kib + 8192, "{before} {after}");
    drop(vm);
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.end().0.code(), Some(0));
}
