//! What the store counts. `daemon::metrics` renders it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::gate::Class;
use crate::backend::{BackendCause, BackendError};

/// Counters of a [`Store`](super::Store); all only grow. Bytes or events, as the name says.
#[derive(Debug, Default)]
pub struct Counters {
    /// Stored bytes of chunks and tables received from backends.
    pub fetched_bytes_total: AtomicU64,
    /// Reads sent to backends, retries included.
    pub fetch_requests_total: AtomicU64,
    /// The same bytes by what they were fetched for, in the order of [`Class::ALL`].
    class_bytes: [AtomicU64; Class::ALL.len()],
    /// The same requests by what they were sent for.
    class_requests: [AtomicU64; Class::ALL.len()],
    /// Stored bytes of chunks that were read ahead, and of those that somebody has read since.
    pub read_ahead_chunk_bytes_total: AtomicU64,
    pub read_ahead_used_bytes_total: AtomicU64,
    /// Stored bytes that prefetch was asked for, and those of them that it is done with: fetched,
    /// found in the cache, left to another process or given up.
    pub prefetch_wanted_bytes_total: AtomicU64,
    pub prefetch_done_bytes_total: AtomicU64,
    /// Requests of a prefetch that failed; a later read of the same chunks starts anew.
    pub prefetch_failures_total: AtomicU64,
    /// Chunks whose digest (or CRC) matched, however they came.
    pub chunks_verified_total: AtomicU64,
    /// Chunks verified on first use that were in the cache before.
    pub cache_hits_total: AtomicU64,
    /// Chunks downloaded because they were not, or not right, in the cache.
    pub cache_misses_total: AtomicU64,
    /// Chunks that joined a download already on its way in this process.
    pub joined_fetches_total: AtomicU64,
    /// Waits for another process of this host to finish the same download.
    pub claim_waits_total: AtomicU64,
    /// Chunks from a backend that did not match their digest.
    pub digest_mismatches_total: AtomicU64,
    /// Chunks marked ready in the cache that did not match their digest.
    pub cache_damage_total: AtomicU64,
    /// Writes to the cache that failed; the chunk was served without caching.
    pub cache_write_errors_total: AtomicU64,
    /// Chunks handed over in memory, for whatever reason.
    pub uncached_chunks_total: AtomicU64,
    /// Waits for the disk of the cache: verified bytes that the page cache had dropped.
    pub disk_waits_total: AtomicU64,
    /// Waits for chunks that ended at their deadline.
    pub timeouts_total: AtomicU64,
    backend_errors: [AtomicU64; BackendCause::ALL.len()],
}

impl Counters {
    /// Backend errors of one kind, retried ones included.
    pub fn backend_errors_total(&self, cause: BackendCause) -> u64 {
        self.backend_errors[cause as usize].load(Ordering::Relaxed)
    }

    /// Bytes received for one class of work.
    pub fn fetched_bytes_by(&self, class: Class) -> u64 {
        self.class_bytes[class as usize].load(Ordering::Relaxed)
    }

    /// Reads sent to backends for one class of work, retries included.
    pub fn fetch_requests_by(&self, class: Class) -> u64 {
        self.class_requests[class as usize].load(Ordering::Relaxed)
    }

    pub(super) fn count_bytes(&self, class: Class, bytes: u64) {
        add(&self.fetched_bytes_total, bytes);
        add(&self.class_bytes[class as usize], bytes);
    }

    pub(super) fn count_request(&self, class: Class) {
        add(&self.fetch_requests_total, 1);
        add(&self.class_requests[class as usize], 1);
    }

    pub(super) fn count_backend_error(&self, error: &BackendError) {
        add(&self.backend_errors[error.cause() as usize], 1);
    }
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
