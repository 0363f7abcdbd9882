//! The same work without a device: what no daemon on this machine can beat.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use memmap2::Mmap;
use vmm_sys_util::eventfd::EventFd;

use super::load::{Outcome, Places};
use super::subject::Tree;
use crate::support::to_usize;

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

/// The large files of a tree, open and mapped.
pub struct Files {
    files: Vec<(File, Mmap)>,
    /// Where the bytes go: as many blocks in turn as a guest would have in flight.
    buffer: Vec<u8>,
}

impl Files {
    pub fn open(tree: &Tree) -> Result<Files> {
        let open = |file: &usize| -> Result<(File, Mmap)> {
            let file = File::open(tree.path(*file))?;
            // SAFETY: nobody writes to the tree while it is measured.
            let map = unsafe { memmap2::MmapOptions::new().populate().map(&file)? };
            Ok((file, map))
        };
        let files = tree.large().iter().map(open).collect::<Result<_>>()?;
        Ok(Files { files, buffer: vec![1; 32 << 20] })
    }

    fn measure(
        &mut self,
        mut places: impl Places,
        block: usize,
        depth: usize,
        mut read: impl FnMut(&(File, Mmap), u64, &mut [u8]) -> Result<()>,
    ) -> Result<(Outcome, Duration)> {
        let mut outcome = Outcome::default();
        let (start, cpu) = (Instant::now(), cpu_time());
        while let Some((file, offset)) = places.next() {
            let at = to_usize(outcome.units) % depth * block;
            read(&self.files[file], offset, &mut self.buffer[at..at + block])?;
            outcome.units += 1;
        }
        outcome.bytes = outcome.units * block as u64;
        outcome.time = start.elapsed();
        Ok((outcome, cpu_time() - cpu))
    }

    /// `preadv` from the page cache.
    pub fn preadv(
        &mut self,
        places: impl Places,
        block: usize,
        depth: usize,
    ) -> Result<(Outcome, Duration)> {
        self.measure(places, block, depth, |(file, _), offset, buffer| {
            let iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let offset = i64::try_from(offset)?;
            // SAFETY: one iovec, which names a buffer that is ours until the call returns.
            let got = unsafe { libc::preadv(file.as_raw_fd(), &raw const iov, 1, offset) };
            ensure!(usize::try_from(got).is_ok_and(|got| got == buffer.len()), "{got} bytes");
            Ok(())
        })
    }

    /// A copy from the mapped file.
    pub fn copy(
        &mut self,
        places: impl Places,
        block: usize,
        depth: usize,
    ) -> Result<(Outcome, Duration)> {
        self.measure(places, block, depth, |(_, map), offset, buffer| {
            let from = to_usize(offset);
            black_box(buffer).copy_from_slice(&map[from..from + block]);
            Ok(())
        })
    }
}

/// `open`, `pread`, `close` of files, by path.
pub fn small_files(tree: &Tree, files: &[usize]) -> Result<(Outcome, Duration)> {
    let paths: Vec<_> = files.iter().map(|file| tree.path(*file)).collect();
    let mut buffer = vec![0; 64 << 10];
    let mut outcome = Outcome::default();
    let (start, cpu) = (Instant::now(), cpu_time());
    for path in paths {
        let file = File::options().read(true).custom_flags(libc::O_NOATIME).open(path)?;
        outcome.bytes += file.read_at(&mut buffer, 0)? as u64;
        outcome.units += 1;
    }
    outcome.time = start.elapsed();
    Ok((outcome, cpu_time() - cpu))
}

/// One eventfd wakes another thread, which wakes this one with a second: what sleeping on either side costs.
pub fn round_trips(time: Duration) -> Result<(Outcome, Duration)> {
    let fds = Arc::new((EventFd::new(0)?, EventFd::new(0)?, AtomicBool::new(false)));
    let theirs = fds.clone();
    let echo = std::thread::spawn(move || -> Result<Duration> {
        while !theirs.2.load(Ordering::Relaxed) {
            theirs.0.read()?;
            theirs.1.write(1)?;
        }
        Ok(cpu_time())
    });
    let mut outcome = Outcome::default();
    let start = Instant::now();
    while start.elapsed() < time {
        let sent = Instant::now();
        fds.0.write(1)?;
        fds.1.read()?;
        outcome.waits.push(sent.elapsed());
        outcome.units += 1;
    }
    fds.2.store(true, Ordering::Relaxed);
    fds.0.write(1)?;
    outcome.time = start.elapsed();
    outcome.waits.sort();
    let cpu = echo.join().expect("no panic")?;
    Ok((outcome, cpu))
}
