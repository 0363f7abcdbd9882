//! `rafsd fuse`: the host's own kernel as the reader.
//!
//! These tests need root and `/dev/fuse`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod daemon;
mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use sha2::{Digest, Sha256};

use daemon::{Daemon, SOON, exchange, rafsd, scratch};
use support::golden::{Tree, case};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, name, pattern};

/// A directory with a mountpoint `M`, on which nothing is mounted once the test is over.
struct Stage(tempfile::TempDir);

impl Stage {
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path().join("M"), rustix::mount::UnmountFlags::DETACH);
    }
}

fn stage() -> Stage {
    let dir = scratch();
    fs::create_dir(dir.path().join("M")).unwrap();
    Stage(dir)
}

fn is_mounted(at: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(4) == at.to_str())
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < SOON, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn state(api: &Path) -> Option<String> {
    let stream = UnixStream::connect(api).ok()?;
    let (_, body) = exchange(&stream, "GET", "/api/v1/daemon", "");
    let info: serde_json::Value = serde_json::from_str(&body).unwrap();
    info["state"].as_str().map(str::to_owned)
}

fn put(api: &Path, path: &str) -> (u16, String) {
    exchange(&UnixStream::connect(api).expect("the API listens"), "PUT", path, "")
}

#[test]
fn golden_images_are_what_their_trees_say() {
    for name in ["v6-none", "v6-zstd", "v6-lz4", "v6-merged", "v6-sha256"] {
        let dir = stage();
        let golden = daemon::golden(name);
        write_config(dir.path(), &golden.join("blobs"));
        let bootstrap = golden.join("bootstrap");
        let line = format!(
            "fuse --bootstrap {} --config config.json --mountpoint M --apisock A",
            bootstrap.display()
        );
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
        compare(&dir.path().join("M"), &case(name).tree());
        drop(daemon);
    }
}

/// Everything that the kernel sees of a mounted image.
fn compare(at: &Path, tree: &Tree) {
    let mut listed = BTreeSet::new();
    for entry in walkdir::WalkDir::new(at).follow_links(false) {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(at).unwrap().as_os_str().as_bytes().to_vec();
        listed.insert([&b"/"[..], &path[..]].concat());
    }
    let wanted: BTreeSet<_> = tree.nodes.keys().cloned().collect();
    assert_eq!(listed, wanted);
    for node in tree.nodes.values() {
        let show = node.show();
        let path = at.join(OsStr::from_bytes(node.path.strip_prefix(b"/").unwrap()));
        let meta = fs::symlink_metadata(&path).unwrap();
        assert_eq!(meta.mode(), node.mode, "{show}");
        assert_eq!((meta.uid(), meta.gid()), (node.uid, node.gid), "{show}");
        assert_eq!(meta.nlink(), u64::from(node.nlink), "{show}");
        if node.is_file() {
            let content = fs::read(&path).unwrap();
            let digest = hex::encode(Sha256::digest(&content));
            assert_eq!(Some(digest), node.sha256, "{show}");
        }
        for (name, value) in &node.xattrs {
            let got = xattr::get(&path, OsStr::from_bytes(name)).unwrap();
            assert_eq!(got.as_ref(), Some(value), "{show}");
        }
    }
}

#[test]
fn the_snapshotters_command_line() {
    let dir = stage();
    let golden = daemon::golden("v6-none");
    write_config(dir.path(), &golden.join("blobs"));
    fs::write(dir.path().join("prefetch"), "/a\n").unwrap();
    let line = format!(
        "fuse --thread-num 2 --id d1 --config config.json --bootstrap {} --mountpoint M --apisock A \
         --log-level info --log-rotation-size 100 --supervisor U --log-file nydusd.log \
         --prefetch-files prefetch --backend-source http://x --failover-policy resend",
        golden.join("bootstrap").display()
    );
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
    assert!(dir.path().join("M/a").exists());
    let (_, info) = daemon.call("GET", "/api/v1/daemon", "");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["id"], &info["supervisor"]), (&"d1".into(), &"U".into()));
    daemon.signal(libc::SIGTERM);
    let (status, ..) = daemon.end();
    assert!(status.success());
    let log = fs::read_to_string(dir.path().join("nydusd.log")).unwrap();
    assert!(log.contains("running: mounted on"), "{log}");
}

#[test]
fn a_shared_daemon_starts_empty_and_mounts_by_the_api() {
    let dir = stage();
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), "fuse --mountpoint M --apisock A"));
    let at = dir.path().join("M");
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    assert!(fs::read(at.join("1/a")).is_err());
    for snapshot in ["/1", "/2"] {
        let path = format!("/api/v1/mount?mountpoint={}", snapshot.replace('/', "%2F"));
        let (status, body) = daemon.call("POST", &path, &mount_body("v6-none", dir.path()));
        assert_eq!(status, 204, "{body}");
    }
    assert!(at.join("1/a").exists() && at.join("2/a").exists(), "they appear at once");
    let open = fs::File::open(at.join("2/a")).unwrap();
    assert_eq!(daemon.call("DELETE", "/api/v1/mount?mountpoint=/2", "").0, 204);
    assert!(!at.join("2").exists());
    drop(open);
    assert!(at.join("1/a").exists());
    assert!(fs::write(at.join("1/new"), "x").is_err(), "the mount is read-only");
    daemon.signal(libc::SIGTERM);
    assert!(daemon.end().0.success());
    assert!(!is_mounted(&at));
}

fn mount_body(name: &str, work_dir: &Path) -> String {
    let golden = daemon::golden(name);
    let config = serde_json::json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": golden.join("blobs")}},
            "cache": {"type": "blobcache", "config": {"work_dir": work_dir}},
        },
        "mode": "direct",
    });
    let body = serde_json::json!({
        "fs_type": "rafs",
        "source": golden.join("bootstrap"),
        "config": config.to_string(),
    });
    body.to_string()
}

#[test]
fn a_signal_unmounts_even_what_is_busy() {
    let dir = stage();
    let line = format!("fuse {} --mountpoint M --apisock A", daemon::small_image());
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
    let at = dir.path().join("M");
    let open = fs::File::open(at.join("a")).unwrap();
    let mut busy = Command::new("sleep").arg("1000").current_dir(&at).spawn().unwrap();
    daemon.signal(libc::SIGTERM);
    let (status, took, log) = daemon.end();
    assert!(status.success(), "{log}");
    support::say(format!("SIGTERM to exit: {took:?}"));
    assert!(!is_mounted(&at), "{log}");
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0, "the directory below is back");
    assert!(open.read_at(&mut [0; 1], 0).is_err() || open.metadata().is_ok());
    let _ = busy.kill();
    let _ = busy.wait();
}

/// Reads that hang in the backend, reads and listings of what is cached, writes to a shared directory: all at once.
#[test]
fn a_signal_ends_it_under_load() {
    let (images, shared) = (stage(), stage());
    let image = Image::build(images.path(), 4, 1 << 20, 64 << 10, "none").unwrap();
    let backend = HangFs::mount(&image.blobs, &images.path().join("backend")).unwrap();
    write_config(images.path(), backend.path());
    let line = format!(
        "fuse --bootstrap {} --config config.json --mountpoint M --apisock A --read-timeout 600s",
        image.bootstrap.display()
    );
    fs::create_dir(shared.path().join("shared")).unwrap();
    let line_of_shared = "fuse --shared-dir shared --mountpoint M --apisock A";
    let daemons = [
        ("image", &images, Daemon::start(images.path(), rafsd(images.path(), &line))),
        (
            "shared directory",
            &shared,
            Daemon::start(shared.path(), rafsd(shared.path(), line_of_shared)),
        ),
    ];
    let (at, shared_at) = (images.path().join("M"), shared.path().join("M"));
    let warm = at.join(name(0));
    fs::read(&warm).unwrap();
    backend.set(Mode::Hang);
    let mut load = Vec::new();
    for number in 1..4 {
        let path = at.join(name(number));
        load.push(std::thread::spawn(move || assert!(fs::read(path).is_err(), "it never came")));
    }
    let goes_on = |work: Box<dyn Fn() -> std::io::Result<()> + Send>| {
        std::thread::spawn(move || while work().is_ok() {})
    };
    for number in 0..2 {
        let (file, dir) = (fs::File::open(&warm).unwrap(), at.clone());
        load.push(goes_on(Box::new(move || {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
            file.read_exact_at(&mut [0; 65536], 0)?;
            fs::read_dir(&dir).map(drop)
        })));
        // By way of a descriptor: the path leads to the directory below when the mount is gone.
        let dir = fs::File::open(&shared_at).unwrap();
        load.push(goes_on(Box::new(move || {
            let path = PathBuf::from(format!("/proc/self/fd/{}/file{number}", dir.as_raw_fd()));
            fs::write(&path, [7; 65536])?;
            fs::rename(&path, path.with_extension("old"))
        })));
    }
    backend.wait_hanging(1, SOON).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    for (what, dir, daemon) in daemons {
        daemon.signal(libc::SIGTERM);
        let (status, took, log) = daemon.end();
        support::say(format!("SIGTERM under load, {what}: gone after {took:?}"));
        assert!(status.success(), "{log}");
        assert!(!is_mounted(&dir.path().join("M")), "{log}");
    }
    // Nobody waits for an answer of somebody who is gone.
    load.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn the_mount_of_a_dead_daemon_is_replaced() {
    let dir = stage();
    let line = format!("fuse {} --mountpoint M --apisock A", daemon::small_image());
    let at = dir.path().join("M");
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
    assert!(at.join("a").exists());
    daemon.signal(libc::SIGKILL);
    daemon.end();
    let error = fs::read_dir(&at).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
    assert!(at.join("a").exists());
    // And somebody else may end it, by unmounting.
    rustix::mount::unmount(&at, rustix::mount::UnmountFlags::empty()).unwrap();
    let (status, _, log) = daemon.end();
    assert!(status.success(), "{log}");
    assert!(log.contains("somebody unmounted it"), "{log}");
}

/// So many files of `size` bytes, mounted at `M` from a backend that hangs on command.
fn over_hang_fs(dir: &Path, files: usize, size: u64) -> (Image, HangFs, Daemon) {
    let image = Image::build(dir, files, size, 64 << 10, "none").unwrap();
    let backend = HangFs::mount(&image.blobs, &dir.join("backend")).unwrap();
    write_config(dir, backend.path());
    let line = format!(
        "fuse --bootstrap {} --config config.json --mountpoint M --apisock A --thread-num 2 \
         --read-timeout 600s",
        image.bootstrap.display()
    );
    let daemon = Daemon::start(dir, rafsd(dir, &line));
    (image, backend, daemon)
}

#[test]
fn cached_reads_go_on_while_cold_ones_hang() {
    let dir = stage();
    let (image, backend, daemon) = over_hang_fs(dir.path(), 8, 2 << 20);
    let at = dir.path().join("M");
    let warm = at.join(name(0));
    let len = usize::try_from(image.file_size).unwrap();
    assert!(fs::read(&warm).unwrap() == pattern(0, 0, len));
    backend.set(Mode::Hang);
    // Many times the threads that take requests.
    let readers: Vec<_> = (1..8)
        .flat_map(|number| (0..4).map(move |part| (number, part)))
        .map(|(number, part)| {
            let path = at.join(name(number));
            std::thread::spawn(move || {
                let mut bytes = vec![0; 4096];
                let offset = part * (512 << 10);
                fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
                assert!(bytes == pattern(number, offset, 4096));
            })
        })
        .collect();
    backend.wait_hanging(1, SOON).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    // Past the kernel's cache, so that the daemon is asked.
    rustix::fs::fadvise(fs::File::open(&warm).unwrap(), 0, None, rustix::fs::Advice::DontNeed)
        .unwrap();
    assert!(fs::read(&warm).unwrap() == pattern(0, 0, len));
    assert_eq!(fs::read_dir(&at).unwrap().count(), 8);
    assert!(readers.iter().all(|reader| !reader.is_finished()), "nothing came for them");
    backend.set(Mode::Pass);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    drop(daemon);
}

/// What nydus-snapshotter does for its daemons: keeps their state and their descriptor.
struct Manager {
    listener: UnixListener,
}

struct Kept {
    bytes: Vec<u8>,
    fd: OwnedFd,
}

impl Manager {
    fn listen(at: &Path) -> Manager {
        Manager { listener: UnixListener::bind(at).unwrap() }
    }

    /// Has the daemon hand its session over.
    fn save(&self, api: &Path) -> Kept {
        let api = api.to_owned();
        let asking = std::thread::spawn(move || put(&api, "/api/v1/daemon/fuse/sendfd"));
        let (stream, _) = self.listener.accept().unwrap();
        let (mut bytes, mut fd) = (Vec::new(), None);
        loop {
            let mut buffer = vec![0; 1000];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let got = recvmsg(&stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    fd = fds.into_iter().next();
                }
            }
            if got.bytes == 0 {
                break;
            }
            bytes.extend_from_slice(&buffer[..got.bytes]);
        }
        assert_eq!(asking.join().unwrap().0, 204);
        let state: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_ne!(state["agreed"], 0, "what the kernel agreed on, however early it is asked for");
        Kept { bytes, fd: fd.expect("a descriptor") }
    }

    /// Has another daemon take it.
    fn give(&self, kept: &Kept, api: &Path) {
        let api = api.to_owned();
        let asking = std::thread::spawn(move || put(&api, "/api/v1/daemon/fuse/takeover"));
        let (stream, _) = self.listener.accept().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [kept.fd.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = sendmsg(&stream, &[IoSlice::new(&kept.bytes)], &mut control, SendFlags::empty());
        (&stream).write_all(&kept.bytes[sent.unwrap()..]).unwrap();
        drop(stream);
        let (status, body) = asking.join().unwrap();
        assert_eq!(status, 204, "{body}");
    }
}

/// Somebody who reads all files of an image again and again, and minds every error. A process of
/// its own: this one holds the descriptor of the mount, and could not even be killed while it waits
/// for itself.
struct Reader {
    child: Child,
    rounds: PathBuf,
    errors: PathBuf,
}

impl Reader {
    /// Reads what is mounted on `M` in `dir` past the kernel's cache, so that the daemon is asked, and
    /// compares it with `want`.
    fn start(dir: &Path, number: usize) -> Reader {
        fs::create_dir_all(dir.join("want")).unwrap();
        for file in 0..4 {
            let want = dir.join("want").join(name(file));
            if !want.exists() {
                fs::write(want, pattern(file, 0, 1 << 20)).unwrap();
            }
        }
        let script = format!(
            "while :; do for file in want/*; do \
                 dd if=M/${{file#want/}} bs=64K iflag=direct 2>>errors-{number} | \
                     cmp - $file >>errors-{number} 2>&1 || echo $file differs >>errors-{number}; \
             done; echo >>rounds-{number}; done"
        );
        let child = Command::new("sh").arg("-c").arg(script).current_dir(dir).spawn().unwrap();
        Reader {
            child,
            rounds: dir.join(format!("rounds-{number}")),
            errors: dir.join(format!("errors-{number}")),
        }
    }

    fn check(&self) {
        let errors = fs::read_to_string(&self.errors).unwrap_or_default();
        let bad: Vec<&str> =
            errors.lines().filter(|l| l.contains("differ") || l.contains("rror")).collect();
        assert!(bad.is_empty(), "the reader met {bad:?}");
    }

    /// Waits until it has read everything once more.
    fn goes_on(&self) {
        let rounds = || fs::metadata(&self.rounds).map_or(0, |meta| meta.len());
        let before = rounds();
        wait_until("the reader goes on", || rounds() > before + 1);
        self.check();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes a config for blobs in `blobs` and a cache in `dir`.
fn write_config(dir: &Path, blobs: &Path) {
    let config = serde_json::json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": blobs}},
            "cache": {"type": "blobcache", "config": {"work_dir": dir}},
        },
        "mode": "direct",
        // No read-ahead, so that nothing is there that nobody has read.
        "amplify_io": 0,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn image_line(dir: &Path, image: &Image, api: &str) -> String {
    write_config(dir, &image.blobs);
    format!(
        "fuse --id d1 --config config.json --bootstrap {} --mountpoint M --apisock {api} \
         --supervisor U --failover-policy resend",
        image.bootstrap.display()
    )
}

#[test]
fn an_upgrade_is_seen_by_no_reader() {
    let dir = stage();
    let image = Image::build(dir.path(), 4, 1 << 20, 64 << 10, "zstd").unwrap();
    let manager = Manager::listen(&dir.path().join("U"));
    let old = Daemon::start(dir.path(), rafsd(dir.path(), &image_line(dir.path(), &image, "A")));
    let kept = manager.save(&dir.path().join("A"));
    let reader = Reader::start(dir.path(), 0);
    reader.goes_on();

    let line = image_line(dir.path(), &image, "A1") + " --upgrade";
    let mut new = rafsd(dir.path(), &line).spawn().unwrap();
    let api = dir.path().join("A1");
    wait_until("INIT", || state(&api).as_deref() == Some("INIT"));
    assert_eq!(put(&api, "/api/v1/daemon/start").0, 503, "nothing to start yet");
    manager.give(&kept, &api);
    assert_eq!(state(&api).as_deref(), Some("READY"));
    assert_eq!(put(&dir.path().join("A"), "/api/v1/daemon/exit").0, 204);
    let (status, _, log) = old.end();
    assert!(status.success() && log.contains("is left to the next daemon"), "{log}");
    // What comes before the start is over waits for it, and is looked at then.
    let early = UnixStream::connect(&api).unwrap();
    let early = std::thread::spawn(move || {
        exchange(&early, "DELETE", "/api/v1/mount?mountpoint=/nothing", "")
    });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(put(&api, "/api/v1/daemon/start").0, 204);
    let (status, answer) = early.join().unwrap();
    assert!(status == 500 && answer.contains("doesn't exist"), "{status} {answer}");
    assert_eq!(state(&api).as_deref(), Some("RUNNING"));
    assert_eq!(put(&api, "/api/v1/daemon/start").0, 400);
    reader.goes_on();

    // The new one can be followed in turn, and ends cleanly.
    drop(kept);
    let kept = manager.save(&api);
    drop(kept);
    drop(reader);
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&new),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(new.wait().unwrap().success());
    assert!(!is_mounted(&dir.path().join("M")));
}

#[test]
fn a_daemon_that_dies_is_followed_by_another_and_no_reader_sees_it() {
    let dir = stage();
    let image = Image::build(dir.path(), 4, 1 << 20, 64 << 10, "zstd").unwrap();
    let manager = Manager::listen(&dir.path().join("U"));
    let line = image_line(dir.path(), &image, "A");
    let old = Daemon::start(dir.path(), rafsd(dir.path(), &line));
    let kept = manager.save(&dir.path().join("A"));
    let readers: Vec<_> = (0..3).map(|number| Reader::start(dir.path(), number)).collect();
    readers.iter().for_each(Reader::goes_on);
    old.signal(libc::SIGKILL);
    old.end();

    // On the same socket, without `--upgrade`: it sees for itself that somebody has died.
    let mut new = rafsd(dir.path(), &line).spawn().unwrap();
    let api = dir.path().join("A");
    wait_until("INIT", || state(&api).as_deref() == Some("INIT"));
    manager.give(&kept, &api);
    assert_eq!(put(&api, "/api/v1/daemon/start").0, 204);
    readers.iter().for_each(Reader::goes_on);
    // A manager that mounts everything again is told that it is.
    let info = exchange(&UnixStream::connect(&api).unwrap(), "GET", "/api/v1/daemon", "").1;
    assert!(info.contains(r#""mountpoint":"/""#), "{info}");
    drop(readers);
    new.kill().unwrap();
    new.wait().unwrap();
    drop(kept);
}

#[test]
fn a_takeover_that_cannot_be_is_refused() {
    let dir = stage();
    fs::create_dir(dir.path().join("N")).unwrap();
    let line = format!("fuse {} --mountpoint M --apisock A", daemon::small_image());
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
    for path in ["sendfd", "takeover"] {
        let (status, body) = daemon.call("PUT", &format!("/api/v1/daemon/fuse/{path}"), "");
        assert_eq!(status, 501, "{body}");
    }
    // What comes from the manager is not a state of ours.
    let listener = UnixListener::bind(dir.path().join("U")).unwrap();
    let line = "fuse --mountpoint N --apisock B --supervisor U --upgrade";
    let mut waiting = rafsd(dir.path(), line).spawn().unwrap();
    let api = dir.path().join("B");
    wait_until("INIT", || state(&api).as_deref() == Some("INIT"));
    for sent in
        [&b"nonsense"[..], b"", b"{\"rafsd\":7,\"mountpoint\":\"/\",\"agreed\":0,\"mounts\":[]}"]
    {
        let api = api.clone();
        let asking = std::thread::spawn(move || put(&api, "/api/v1/daemon/fuse/takeover"));
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(sent).unwrap();
        drop(stream);
        let (status, body) = asking.join().unwrap();
        assert_eq!(status, 500, "{body}");
    }
    assert_eq!(state(&api).as_deref(), Some("INIT"));
    waiting.kill().unwrap();
    waiting.wait().unwrap();
    daemon.signal(libc::SIGTERM);
    assert!(daemon.end().0.success());
}

#[test]
fn a_shared_directory_on_the_host_is_written() {
    let dir = stage();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let line = "fuse --shared-dir shared --mountpoint M --apisock A";
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), line));
    let at = dir.path().join("M");
    fs::write(at.join("file"), "content").unwrap();
    assert_eq!(fs::read(shared.join("file")).unwrap(), b"content");
    fs::rename(at.join("file"), at.join("other")).unwrap();
    assert!(!shared.join("file").exists() && shared.join("other").exists());
    let names: Vec<_> =
        fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name().into_vec()).collect();
    assert_eq!(names, [b"other".to_vec()]);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.end().0.success());
}

/// Reads the first block of a file past the kernel's cache into `out`.
fn direct_read(dir: &Path, file: usize, offset: u64, out: &str) -> Child {
    let from = format!("if=M/{}", name(file));
    let args = ["bs=4096", "count=1", "iflag=direct", "status=none"];
    let (skip, to) = (format!("skip={}", offset / 4096), format!("of={out}"));
    let mut dd = Command::new("dd");
    dd.arg(from).arg(to).arg(skip).args(args).current_dir(dir);
    dd.spawn().unwrap()
}

fn ends(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_some()
}

#[test]
fn what_becomes_of_a_request_whose_daemon_died_is_the_policy_s() {
    // Whether its reader gets the answer. Without a patch of its own the kernel can flush nothing:
    // then it offers them again.
    for (policy, answered) in [("resend", true), ("flush", true), ("none", false)] {
        let dir = stage();
        let image = Image::build(dir.path(), 4, 1 << 20, 64 << 10, "none").unwrap();
        let backend = HangFs::mount(&image.blobs, &dir.path().join("backend")).unwrap();
        let manager = Manager::listen(&dir.path().join("U"));
        let line = image_line(dir.path(), &image, "A") + " --failover-policy " + policy;
        write_config(dir.path(), backend.path());
        let old = Daemon::start(dir.path(), rafsd(dir.path(), &line));
        let kept = manager.save(&dir.path().join("A"));
        backend.set(Mode::Hang);
        let mut reader = direct_read(dir.path(), 1, 8192, "out");
        backend.wait_hanging(1, SOON).unwrap();
        old.signal(libc::SIGKILL);
        backend.set(Mode::Pass);
        old.end();

        let mut new = rafsd(dir.path(), &line).spawn().unwrap();
        let api = dir.path().join("A");
        wait_until("INIT", || state(&api).as_deref() == Some("INIT"));
        manager.give(&kept, &api);
        assert_eq!(put(&api, "/api/v1/daemon/start").0, 204, "{policy}");
        let mut other = direct_read(dir.path(), 2, 0, "other");
        assert!(other.wait().unwrap().success(), "{policy}: what comes later is answered");
        assert_eq!(fs::read(dir.path().join("other")).unwrap(), pattern(2, 0, 4096));
        if answered {
            assert!(reader.wait().unwrap().success(), "{policy}");
            assert_eq!(fs::read(dir.path().join("out")).unwrap(), pattern(1, 8192, 4096));
        } else {
            std::thread::sleep(Duration::from_millis(500));
            assert!(!ends(&mut reader), "{policy}: nobody knows of it");
        }
        new.kill().unwrap();
        new.wait().unwrap();
        // Only with the session does the kernel let go of a request that a daemon has taken.
        drop(kept);
        let _ = reader.wait().unwrap();
    }
}

#[test]
fn a_signal_ends_it_with_many_readers_on_a_backend_that_hangs() {
    let dir = stage();
    let (_, backend, daemon) = over_hang_fs(dir.path(), 4, 1 << 20);
    backend.set(Mode::Hang);
    let mut readers: Vec<Child> = (0..48)
        .map(|i| direct_read(dir.path(), i % 4, i as u64 / 4 * (64 << 10), "/dev/null"))
        .collect();
    backend.wait_hanging(1, SOON).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(!readers.iter_mut().any(ends), "all of them wait");
    daemon.signal(libc::SIGTERM);
    let (status, took, log) = daemon.end();
    support::say(format!(
        "SIGTERM to exit with {} readers on a hung backend: {took:?}",
        readers.len()
    ));
    assert!(status.success(), "{log}");
    for reader in &mut readers {
        assert!(!reader.wait().unwrap().success(), "it is told that there is nothing more");
    }
    assert!(!is_mounted(&dir.path().join("M")), "{log}");
    backend.set(Mode::Pass);
}

#[test]
fn a_shared_directory_is_cached_as_the_mode_says() {
    for mode in ["never", "metadata", "auto", "always"] {
        let dir = stage();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(shared.join("file"), "before").unwrap();
        fs::write(shared.join("gone"), "").unwrap();
        let line = format!("fuse --shared-dir shared --cache {mode} --mountpoint M --apisock A");
        let _daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
        let (file, gone) = (dir.path().join("M/file"), dir.path().join("M/gone"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "before", "{mode}");
        assert!(gone.exists());
        fs::remove_file(shared.join("gone")).unwrap();
        // Names are kept for a second, or for a day.
        if mode != "never" {
            std::thread::sleep(Duration::from_millis(1200));
        }
        assert_eq!(gone.exists(), mode == "always", "{mode}: a name that is no more");
        // Data is kept as long as times and size are the same when they are next asked for.
        fs::write(shared.join("file"), "after.").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "after.", "{mode}");
    }
}

#[test]
fn writes_are_on_the_host_at_once_unless_they_may_be_late() {
    for (flag, may_be_late) in [("", false), ("--writeback", true)] {
        let dir = stage();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        let line = format!("fuse --shared-dir shared {flag} --mountpoint M --apisock A");
        let _daemon = Daemon::start(dir.path(), rafsd(dir.path(), &line));
        // The kernel may write at any time what may be late: of many files some are.
        let mut late = 0;
        for number in 0..20 {
            let name = format!("file{number}");
            let mut file = fs::File::create(dir.path().join("M").join(&name)).unwrap();
            file.write_all(b"text").unwrap();
            let on_host = || fs::read(shared.join(&name)).unwrap();
            late += usize::from(on_host() != b"text");
            file.sync_all().unwrap();
            assert_eq!(on_host(), b"text", "{flag}: after fsync");
            file.write_all(b" and more").unwrap();
            drop(file);
            assert_eq!(on_host(), b"text and more", "{flag}: after close");
        }
        assert_eq!(late > 0, may_be_late, "{flag}: {late} of 20 after write");
    }
}

/// What FUSE passthrough and FUSE over io_uring would make cheaper does not come here any more.
#[test]
fn what_was_read_once_is_read_again_without_the_daemon() {
    let dir = stage();
    let image = Image::build(dir.path(), 2, 1 << 20, 64 << 10, "zstd").unwrap();
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &image_line(dir.path(), &image, "A")));
    let file = dir.path().join("M").join(name(1));
    let requests = || {
        let (_, body) = daemon.call("GET", "/api/v1/metrics?id=/", "");
        let stats: serde_json::Value = serde_json::from_str(&body).unwrap();
        let hits = stats["fop_hits"].as_array().unwrap();
        hits.iter().map(|n| n.as_u64().unwrap()).sum::<u64>()
    };
    let want = pattern(1, 0, 1 << 20);
    assert!(fs::read(&file).unwrap() == want);
    let before = requests();
    for _ in 0..10 {
        assert!(fs::read(&file).unwrap() == want);
    }
    assert_eq!(requests(), before, "opens and reads of what is in the page cache");
}

/// Somebody who is not root mounts with the set-uid program `fusermount3`.
#[test]
fn a_user_without_rights_mounts_and_reads() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    // As udev has it wherever there is one.
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    let dir = stage();
    let image = Image::build(dir.path(), 2, 100_000, 64 << 10, "zstd").unwrap();
    write_config(dir.path(), &image.blobs);
    // Where that user may go.
    let program = dir.path().join("program");
    fs::copy(env!("CARGO_BIN_EXE_rafsd"), &program).unwrap();
    let owner = format!("{NOBODY}:{NOBODY}");
    let owned = Command::new("chown").args(["-R", &owner]).arg(dir.path()).status();
    assert!(owned.unwrap().success());
    let line = format!(
        "fuse --bootstrap {} --config config.json --mountpoint M --apisock A",
        image.bootstrap.display()
    );
    let mut command = Command::new(&program);
    command.args(line.split_whitespace()).current_dir(dir.path()).uid(NOBODY).gid(NOBODY);
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let daemon = Daemon::start(dir.path(), command);
    let at = dir.path().join("M");
    let read = Command::new("cat").arg(at.join(name(1))).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert!(read.stdout == pattern(1, 0, 100_000), "{read:?}");
    daemon.signal(libc::SIGTERM);
    let (status, _, log) = daemon.end();
    assert!(status.success() && !is_mounted(&at), "{log}");
}
