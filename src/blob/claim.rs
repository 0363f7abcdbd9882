//! Claims: which process of this host downloads what.
//!
//! A claim is a lock of the open-file-description kind (`F_OFD_SETLK`) on a range of bytes of a
//! cache file, so it ends with its owner, however that ends. Claims of one open file never
//! conflict with each other; every [`Blob`](super::Blob) opens its files anew.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};

/// Threads of one store that may wait for claims of other processes at once.
const MAX_WAITING_THREADS: usize = 16;

/// A locked range of bytes of `file`, released when dropped.
pub struct Claim {
    file: Arc<File>,
    range: Range<u64>,
}

impl Claim {
    /// `None` if another process (or another open file) holds a part of `range`, which is not
    /// empty. Does not wait.
    pub fn try_take(file: &Arc<File>, range: Range<u64>) -> io::Result<Option<Claim>> {
        match lock(file, libc::F_OFD_SETLK, libc::F_WRLCK, &range) {
            Ok(()) => Ok(Some(Claim { file: file.clone(), range })),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Waits until nobody else holds a part of `range`. Blocks the thread.
    pub fn take(file: &Arc<File>, range: Range<u64>) -> io::Result<Claim> {
        loop {
            match lock(file, libc::F_OFD_SETLKW, libc::F_WRLCK, &range) {
                Ok(()) => return Ok(Claim { file: file.clone(), range }),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(e) => return Err(e),
            }
        }
    }

    /// Splits off what lies before byte `at`, which must be inside the range or at its ends.
    pub fn split_before(&mut self, at: u64) -> Claim {
        debug_assert!(self.range.start <= at && at <= self.range.end);
        let first = Claim { file: self.file.clone(), range: self.range.start..at };
        self.range.start = at;
        first
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.range.is_empty()
            && let Err(e) = lock(&self.file, libc::F_OFD_SETLK, libc::F_UNLCK, &self.range)
        {
            log::warn!("cache: a claim is held until the file is closed: {e}");
        }
    }
}

fn lock(file: &File, command: i32, kind: i32, range: &Range<u64>) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let flock = libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(invalid)?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(invalid)?,
        l_start: i64::try_from(range.start).map_err(invalid)?,
        l_len: i64::try_from(range.end - range.start).map_err(invalid)?,
        l_pid: 0,
    };
    // SAFETY: the lock commands of fcntl read one `struct flock`, which `flock` is and which
    // outlives the call; the file is open.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const flock) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits for claims that others hold, on threads of its own: they may be stuck for as long as the
/// other process is, and must not keep a runtime from ending.
pub struct Waiters {
    threads: Arc<Semaphore>,
}

impl Default for Waiters {
    fn default() -> Self {
        Waiters { threads: Arc::new(Semaphore::new(MAX_WAITING_THREADS)) }
    }
}

impl Waiters {
    /// The claim, once nobody else holds it. If the caller stops waiting, the thread goes on until
    /// then, and gives the claim back.
    pub async fn wait(&self, file: Arc<File>, range: Range<u64>) -> io::Result<Claim> {
        let ending = || io::Error::other("the daemon is ending");
        let permit = self.threads.clone().acquire_owned().await.map_err(|_| ending())?;
        let (sender, receiver) = oneshot::channel();
        std::thread::Builder::new().name("claim-wait".into()).spawn(move || {
            let claim = Claim::take(&file, range);
            drop(permit);
            drop(sender.send(claim)); // a claim that nobody waits for any more is released
        })?;
        receiver.await.map_err(|_| ending())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> Arc<File> {
        Arc::new(
            File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap(),
        )
    }

    #[test]
    fn claims_of_two_open_files_exclude_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let (ours, theirs) = (open(&path), open(&path));
        let mut claim = Claim::try_take(&ours, 10..20).unwrap().expect("free");
        assert!(Claim::try_take(&theirs, 19..30).unwrap().is_none());
        assert!(Claim::try_take(&theirs, 20..30).unwrap().is_some());
        let first = claim.split_before(12);
        drop(first);
        assert!(Claim::try_take(&theirs, 10..12).unwrap().is_some(), "released");
        assert!(Claim::try_take(&theirs, 11..13).unwrap().is_none(), "12 is still held");
        drop(claim);
        assert!(Claim::try_take(&theirs, 0..100).unwrap().is_some());
    }

    #[tokio::test]
    async fn a_wait_ends_when_the_owner_closes_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let (ours, theirs) = (open(&path), open(&path));
        let mut claim = Claim::try_take(&ours, 5..6).unwrap().expect("free");
        drop(ours);
        let waiters = Waiters::default();
        let wait = waiters.wait(theirs.clone(), 5..6);
        tokio::pin!(wait);
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), &mut wait).await;
        assert!(early.is_err(), "granted while held");
        // As at the owner's death: the file is closed, the claim not released.
        claim.range = 0..0;
        drop(claim);
        let claim = tokio::time::timeout(std::time::Duration::from_secs(60), wait).await;
        assert!(claim.expect("the lock died with its file").is_ok());
    }
}
