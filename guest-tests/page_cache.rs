//! Cached data that the host has dropped from its page cache: a read of it waits for the disk, and
//! nobody else waits for that read.
//!
//! The disk is real as far as the kernel can tell: ext4 on a loop device, mounted read-only with a
//! cache that another run has filled. The device's file lies on a file system that hangs on command.

mod support;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::daemon::{Daemon, Launch};
use support::frontend::{Vm, VmConfig};
use support::fuse_client::{Fuse, FuseError};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, pattern};
use support::{assert_same, say};

/// For what an idle machine does at once.
const LIMIT: Duration = Duration::from_secs(60);
/// `--read-timeout` of the test that waits for it to pass.
const READ_TIMEOUT: Duration = Duration::from_secs(8);

fn run(program: &str, args: &[&Path]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A file system in a file, mounted over a loop device; both end with it.
struct Disk {
    device: String,
    at: PathBuf,
}

impl Disk {
    fn mount(file: &Path, at: &Path, options: &str) -> Disk {
        fs::create_dir_all(at).expect("a mountpoint");
        let device = run("losetup", &["--find".as_ref(), "--show".as_ref(), file]);
        let disk = Disk { device: device.clone(), at: at.to_owned() };
        run("mount", &["-o".as_ref(), options.as_ref(), device.as_ref(), at]);
        disk
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for (program, arg) in [("umount", self.at.as_os_str()), ("losetup", self.device.as_ref())] {
            let mut command = Command::new(program);
            let command = if program == "losetup" { command.arg("-d") } else { &mut command };
            if let Err(error) = command.arg(arg).status() {
                say(format!("{program}: {error}"));
            }
        }
    }
}

/// A guest of a daemon whose cache is on a disk that hangs on command.
struct Stage {
    image: Image,
    nodes: Vec<u64>,
    cache: PathBuf,
    daemon: Daemon,
    _vm: Vm,
    fuse: Fuse,
    _disk: Disk,
    backing: HangFs,
}

impl Stage {
    fn set(scratch: &Path, read_timeout: Duration) -> Stage {
        let image = Image::build(scratch, 4, 1 << 20, 64 << 10, "none").expect("an image");
        let (files, at) = (scratch.join("files"), scratch.join("disk"));
        fs::create_dir(&files).expect("a directory");
        let file = files.join("disk.img");
        File::create(&file).and_then(|f| f.set_len(64 << 20)).expect("a disk");
        run("mkfs.ext4", &["-q".as_ref(), &file]);
        let launch: Launch =
            image.launch(scratch).work_dir(&at.join("cache")).read_timeout(read_timeout);
        {
            let _disk = Disk::mount(&file, &at, "rw");
            let daemon = launch.spawn().expect("a daemon");
            let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
            let mut fuse = vm.fuse(1);
            fuse.init().expect("INIT");
            image.check_all(&mut fuse).expect("right data, cached from here on");
            drop((fuse, vm));
            daemon.terminate(LIMIT).expect("it ends");
        }
        let backing = HangFs::mount(&files, &scratch.join("backing")).expect("a file system");
        let disk = Disk::mount(&backing.path().join("disk.img"), &at, "ro,noload");
        let daemon = launch.spawn().expect("a daemon");
        let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let nodes = image.nodes(&mut fuse).expect("lookups");
        // Verified, and in the page cache.
        image.check_all(&mut fuse).expect("right data");
        let cache = fs::read_dir(at.join("cache")).expect("the cache");
        let cache = cache.flatten().map(|entry| entry.path());
        let cache = cache.filter(|path| path.to_string_lossy().ends_with(".layer.disk"));
        let cache = cache.last().expect("a data file");
        Stage { image, nodes, cache, daemon, _vm: vm, fuse, _disk: disk, backing }
    }

    /// The host needs its memory for something else.
    fn forget_pages(&self) {
        let file = File::open(&self.cache).expect("the data file");
        // SAFETY: no memory is involved.
        let failed =
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        assert_eq!(failed, 0);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A disk that hangs can not be unmounted.
        self.backing.set(Mode::Pass);
    }
}

#[test]
fn a_read_that_waits_for_the_disk_delays_nothing_else() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Stage::set(scratch.path(), 10 * LIMIT);
    let (node, other) = (stage.nodes[0], stage.nodes[1]);
    stage.fuse.read(other, 0, 0, 4096).expect("warm");
    stage.forget_pages();
    stage.fuse.read(other, 0, 0, 4096).expect("warm again");
    stage.backing.set(Mode::Hang);
    let (at, len) = (512 << 10, 128 << 10);
    let cold = stage.fuse.submit_read(node, 0, at, len).expect("room in the ring");
    stage.fuse.flush();
    stage.backing.wait_hanging(1, LIMIT).expect("the disk is asked");
    for round in 0..500 {
        let attr = stage.fuse.getattr(stage.nodes[round % 4]).expect("GETATTR beside it");
        assert_eq!(attr.size, stage.image.file_size);
        let bytes = stage.fuse.read(other, 0, 0, 4096).expect("a read of what is in memory");
        assert_same(&bytes, &pattern(1, 0, 4096), "a warm read");
    }
    assert_eq!(stage.fuse.in_flight(), 1, "the cold read waits");
    stage.backing.set(Mode::Pass);
    let reply = stage.fuse.wait(cold, LIMIT).expect("its answer");
    assert_same(&reply.bytes(), &pattern(0, at, len), "the cold read");
    stage.fuse.recycle(reply);
    assert!(!stage.daemon.log().contains("ERROR"), "{}", stage.daemon.log());
}

#[test]
fn a_disk_that_hangs_is_eio_at_the_deadline() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Stage::set(scratch.path(), READ_TIMEOUT);
    let node = stage.nodes[2];
    stage.forget_pages();
    stage.backing.set(Mode::Hang);
    let start = Instant::now();
    let error = stage.fuse.read(node, 0, 0, 4096).expect_err("the disk hangs");
    assert_eq!(error, FuseError::Errno(libc::EIO));
    assert!(start.elapsed() >= READ_TIMEOUT, "after {:?}", start.elapsed());
    stage.daemon.expect_log("the disk of the cache has not answered in time");
    stage.fuse.getattr(node).expect("the queue works");
    stage.backing.set(Mode::Pass);
    stage.image.check_file(&mut stage.fuse, 2, node).expect("right again");
}

/// All of an image that nobody has in memory, read in order: what is not asked for yet is on its way.
#[test]
fn a_reader_in_order_waits_for_the_disk_once_in_a_while() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Stage::set(scratch.path(), LIMIT);
    stage.forget_pages();
    stage.backing.reset_counts();
    let start = Instant::now();
    for number in 0..4 {
        let node = stage.nodes[number];
        stage.image.check_file(&mut stage.fuse, number, node).expect("right data");
    }
    let disk = stage.backing.total();
    say(format!("4 MiB in order in {:?}, {} reads of the disk", start.elapsed(), disk.reads));
    assert!(disk.bytes >= 4 << 20, "{disk:?}: that was no cold page cache");
}
