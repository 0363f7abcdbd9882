//! Cached bytes that the host has dropped from its page cache: read back by a thread that may wait.
//!
//! Who serves requests asks the page cache only. What is not there is brought back here, on the
//! blocking pool; then the request is served again. A reader that goes on behind what was read
//! lately gets more than it asked for, so that it waits for the disk once in a while, not each time.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::{ReadWriteFlags, preadv2};
use tokio::sync::oneshot;

use super::counters::add;
use super::flight::within;
use super::gate::Class;
use super::store::Blob;

/// Threads that wait for the disk at once.
pub const MAX_THREADS: u64 = 32;
/// Bytes read at once.
const STEP: usize = 128 << 10;
/// Bytes behind the wanted ones that are read for a reader who goes on in order, once it has those.
const AHEAD: u64 = 2 << 20;

impl Blob {
    /// Whether it can be told what of the cache file is in the page cache: some file systems cannot.
    pub fn can_peek(&self) -> bool {
        self.can_peek.load(Ordering::Relaxed)
    }

    /// The file system of the cache cannot tell: then reads may wait for the disk.
    pub fn cannot_peek(&self) {
        if self.can_peek.swap(false, Ordering::Relaxed) {
            log::info!(
                "blob {}: the file system of the cache cannot say what it has in memory; reads from \
                 it may wait for the disk",
                self.info.id
            );
        }
    }

    /// Brings `bytes` of the cache file into the page cache. False if that was not done by
    /// `deadline`; what cannot be read at all is left to the reader to find out.
    pub async fn page_in(self: Arc<Self>, bytes: Range<u64>, deadline: Instant) -> bool {
        let store = self.store.clone();
        add(&store.counters.disk_waits_total, 1);
        let work = async move {
            let permit = self.store.paging.pass(Class::Demand, 1).await;
            let (there, told) = oneshot::channel();
            let blob = self.clone();
            self.store.runtime.spawn_blocking(move || {
                let in_order = blob.goes_on_at(bytes.start);
                blob.read_back(&bytes);
                let _ = there.send(()); // nobody may wait any more
                if in_order {
                    blob.read_back(&(bytes.end..bytes.end + AHEAD));
                }
                drop(permit);
            });
            let _ = told.await; // a panic is in the log; the reader will see what is there
        };
        within(&store, || deadline, work).await.is_some()
    }

    /// Whether what lies before `offset` was read lately.
    fn goes_on_at(&self, offset: u64) -> bool {
        let Some(file) = self.cache.get().map(|cache| &cache.data) else { return false };
        offset == 0 || is_in_memory(file, offset - 1)
    }

    /// Reads `bytes` as a program would: what is asked for by `fadvise` comes into pages of 4 KiB, from
    /// which later reads copy at a third of the speed.
    fn read_back(&self, bytes: &Range<u64>) {
        let Some(file) = self.cache.get().map(|cache| &cache.data) else { return };
        let mut buffer = self.store.buffer(STEP);
        let mut at = bytes.start;
        while at < bytes.end {
            let len = usize::try_from(bytes.end - at).map_or(STEP, |left| left.min(STEP));
            match file.read_at(&mut buffer[..len], at) {
                Ok(0) => break,
                Ok(n) => at += n as u64,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.store.give_back(buffer);
    }
}

/// Whether the byte at `offset` is in the page cache.
fn is_in_memory(file: &std::fs::File, offset: u64) -> bool {
    let mut byte = [0];
    let mut slices = [std::io::IoSliceMut::new(&mut byte)];
    preadv2(file, &mut slices, offset, ReadWriteFlags::NOWAIT) == Ok(1)
}
