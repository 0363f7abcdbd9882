//! The cache on disk: shared between daemons, full, damaged, fed by a backend that lies.

mod support;

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::fuse_client::FuseError;
use support::hang_fs::{HangFs, Mode};
use support::image::{Guest, Image, pattern};
use support::rng::Rng;
use support::{assert_same, say};

#[test]
fn several_daemons_fetch_each_chunk_once() {
    for compressor in ["none", "zstd"] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let image =
            Image::build(scratch.path(), 16, 2 << 20, 64 << 10, compressor).expect("an image");
        let blob = fs::metadata(image.blob()).expect("the blob").len();
        let backend =
            HangFs::mount(&image.blobs, &scratch.path().join("backend")).expect("a backend");
        backend.set(Mode::Slow(Duration::from_millis(5)));
        let launch = image.launch_over(backend.path(), scratch.path()).read_ahead();
        let daemons = 4;
        std::thread::scope(|scope| {
            for n in 0..daemons {
                let (launch, image) = (launch.clone().named(&format!("d{n}")), &image);
                // Two of them in step, one backwards, one from the middle.
                let order: Vec<usize> = match n {
                    2 => (0..16).rev().collect(),
                    3 => (8..16).chain(0..8).collect(),
                    _ => (0..16).collect(),
                };
                scope.spawn(move || Guest::boot(&launch, image).check(image, order));
            }
        });
        let read = backend.total();
        say(format!(
            "{compressor}: {daemons} daemons read {} bytes of a blob of {blob} ({:.2} ×)",
            read.bytes,
            read.bytes as f64 / blob as f64
        ));
        // The context table is small, and each daemon may read it for itself.
        assert!(read.bytes < blob + blob / 10, "{} bytes read of {blob}", read.bytes);
        // And the next one on this host reads none of the data.
        backend.reset_counts();
        Guest::boot(&launch.named("late"), &image).check(&image, 0..16);
        let late = backend.total();
        assert!(late.bytes < blob / 20, "a later daemon read {} bytes of {blob}", late.bytes);
    }
}

#[test]
fn a_lying_backend_gives_eio_with_its_cause_and_recovers() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    for (compressor, name) in [("none", "plain"), ("zstd", "packed")] {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).expect("a folder");
        let image = Image::build(&dir, 4, 4 << 20, 64 << 10, compressor).expect("an image");
        let backend = HangFs::mount(&image.blobs, &dir.join("backend")).expect("a backend");
        let launch = image.launch_over(backend.path(), &dir);
        let mut guest = Guest::boot(&launch, &image);
        // One byte in the third megabyte of the data, then the first half of it all.
        for lie in [(2 << 20) + 12_345..(2 << 20) + 12_346, 0..8 << 20] {
            backend.set(Mode::Flip(vec![lie.clone()]));
            let (mut failed, mut right) = (0, 0);
            for file in 0..image.files {
                for offset in (0..image.file_size).step_by(32 << 10) {
                    match guest.fuse.read(guest.nodes[file], 0, offset, 32 << 10) {
                        Ok(got) => {
                            assert_same(&got, &pattern(file, offset, 32 << 10), name);
                            right += 1;
                        }
                        Err(FuseError::Errno(libc::EIO)) => failed += 1,
                        Err(error) => panic!("{name}, file {file} at {offset}: {error}"),
                    }
                }
                if failed > 8 {
                    break;
                }
            }
            let flipped = lie.end - lie.start;
            say(format!("{name}, {flipped} bytes flipped: {failed} reads EIO, {right} right"));
            if flipped == 1 {
                assert!(failed >= 1, "{name}: the flipped byte was not noticed");
                guest.daemon.expect_log("digest");
            }
            backend.set(Mode::Pass);
            guest.check(&image, 0..image.files);
            // Cold again for the second lie.
            drop(guest);
            fs::remove_dir_all(&launch.work_dir).expect("the cache");
            guest = Guest::boot(&launch, &image);
        }
    }
}

#[test]
fn an_outage_ends_when_the_backend_is_back() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 2 << 20, 64 << 10, "none").expect("an image");
    let backend = HangFs::mount(&image.blobs, &scratch.path().join("backend")).expect("a backend");
    let launch =
        image.launch_over(backend.path(), scratch.path()).read_timeout(Duration::from_secs(3));
    let mut guest = Guest::boot(&launch, &image);
    guest.check(&image, 0..1);
    let node = guest.nodes[3];
    for errno in [libc::EIO, libc::ENOENT, libc::ETIMEDOUT] {
        backend.set(Mode::Fail(errno));
        assert_eq!(guest.fuse.read(node, 0, 1 << 20, 4096), Err(FuseError::Errno(libc::EIO)));
        guest.check(&image, 0..1);
    }
    backend.set(Mode::Pass);
    // On a busy machine a read may take longer than its limit.
    let limit = Instant::now() + Duration::from_secs(60);
    while let Err(e) = image.check_all(&mut guest.fuse) {
        assert!(Instant::now() < limit, "{e:#}: {}", guest.daemon.log());
    }
}

/// Files below `dir`, largest first.
fn files_by_size(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).expect("the cache").map(|e| e.expect("readable")) {
            let kind = entry.file_type().expect("a type");
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                found.push((entry.metadata().expect("a size").len(), entry.path()));
            }
        }
    }
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

#[test]
fn damage_in_the_cache_directory_is_never_served() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 2 << 20, 64 << 10, "zstd").expect("an image");
    let launch = image.launch(scratch.path());
    Guest::boot(&launch, &image).check(&image, 0..4);
    let mut rng = Rng::new(3);
    // Any byte of any file, one after the other, and the next daemon reads everything right.
    for round in 0..24 {
        let files = files_by_size(&launch.work_dir);
        let victim = &files[round % files.len().min(4)];
        let len = fs::metadata(victim).expect("a size").len();
        if len == 0 {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(victim).expect("writable");
        match round / 4 {
            0..4 => {
                let at = rng.below(len);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).expect("a byte");
                file.write_all_at(&[byte[0] ^ 1 << rng.below(8)], at).expect("another byte");
            }
            4 => file.set_len(rng.below(len)).expect("a shorter file"),
            _ => {
                let noise = rng.bytes(4096);
                file.write_all_at(&noise, rng.below(len)).expect("noise");
            }
        }
        drop(file);
        Guest::boot(&launch, &image).check(&image, 0..4);
    }
}

#[test]
fn a_cache_file_cut_short_under_the_daemon_is_noticed() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 2 << 20, 64 << 10, "none").expect("an image");
    let launch = image.launch(scratch.path());
    let mut guest = Guest::boot(&launch, &image);
    guest.check(&image, 0..4);
    let data = &files_by_size(&launch.work_dir)[0];
    let file = OpenOptions::new().write(true).open(data).expect("writable");
    file.set_len(100_000).expect("a shorter file");
    guest.check(&image, 0..4);
}

/// A small tmpfs; unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(dir: &Path, bytes: u64) -> Tmpfs {
        fs::create_dir_all(dir).expect("a mount point");
        let target = CString::new(dir.as_os_str().as_bytes()).expect("no NUL");
        let options = CString::new(format!("size={bytes}")).expect("no NUL");
        // SAFETY: C strings that live across the call.
        let failed = unsafe {
            let kind = c"tmpfs".as_ptr();
            libc::mount(kind, target.as_ptr(), kind, 0, options.as_ptr().cast())
        };
        assert_eq!(failed, 0, "mounting a tmpfs: {}", std::io::Error::last_os_error());
        Tmpfs(dir.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: a C string that lives across the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_full_disk_costs_the_cache_and_one_warning() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    for (compressor, name) in [("none", "plain"), ("zstd", "packed")] {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).expect("a folder");
        let image = Image::build(&dir, 4, 2 << 20, 64 << 10, compressor).expect("an image");
        let disk = Tmpfs::mount(&dir.join("disk"), 1 << 20);
        let launch = image.launch(&dir).work_dir(&disk.0.join("cache"));
        let mut guest = Guest::boot(&launch, &image);
        for _ in 0..2 {
            guest.check(&image, 0..4);
        }
        guest.daemon.expect_log("No space left");
        let log = guest.daemon.log();
        let warnings: Vec<&str> = log
            .lines()
            .filter(|line| {
                let line = line.to_lowercase();
                (line.contains("warn") || line.contains("error"))
                    && (line.contains("space") || line.contains("full"))
            })
            .collect();
        assert_eq!(warnings.len(), 1, "{name}: {log}");
    }
}
