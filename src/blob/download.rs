//! Downloading chunks: requests to the backend, their repetition, and their bytes as they come.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::OwnedSemaphorePermit;

use super::counters::add;
use super::error::{ChunkFailure, chain};
use super::fetch::{fail, runs, timeout};
use super::flight::{Slot, within};
use super::plan;
use super::store::{Blob, Store};
use super::unit::{Bad, Unit, UnitSlot};
use crate::backend::{BackendError, ByteStream, Outage};

/// A download that nobody waits for any more goes on as long as bytes keep coming at least this
/// often, and at most for [`MAX_LINGER`].
const STALL: Duration = Duration::from_secs(3);
const MAX_LINGER: Duration = Duration::from_secs(60);
/// Pause before the first repetition of a request that failed; doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Starts the downloads of `units`.
pub fn start(blob: &Arc<Blob>, mut units: Vec<Unit>) {
    units.sort_by_key(|unit| unit.stored.start);
    for units in runs(units, |units| {
        let pieces: Vec<_> = units.iter().map(Unit::piece).collect();
        plan::requests(&pieces)
    }) {
        let task: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(download(blob.clone(), units));
        blob.store.runtime.spawn(task);
    }
}

/// Downloads units that one request covers, repeating what fails.
async fn download(blob: Arc<Blob>, mut units: Vec<Unit>) {
    let started = Instant::now();
    let mut attempts = 0;
    while !units.is_empty() {
        attempts += 1;
        let Transfer { pending, bad, failure } = transfer(&blob, units).await;
        units = pending;
        let fetched_twice = |unit: &Unit| unit.bad.is_some();
        let mut again = Vec::new();
        for (mut unit, reason) in bad {
            let another = blob.backend.mistrust(&blob.info.id, unit.stored.clone());
            if fetched_twice(&unit) && !another {
                fail(vec![unit], bad_bytes(&blob, reason));
                continue;
            }
            log::warn!(
                "blob {}: chunks {}..{}: {} from {}; fetching them again",
                blob.info.id,
                unit.chunks.start,
                unit.chunks.end,
                match &reason {
                    Bad::Digest => "wrong digest".to_owned(),
                    Bad::Codec(e) => chain(e),
                },
                blob.backend.name()
            );
            unit.bad = Some(reason);
            again.push(unit);
        }
        start(&blob, again);
        let Some(failure) = failure else { continue };
        let (Some(first), Some(last)) = (units.first(), units.last()) else { continue };
        let range = first.stored.start..last.stored.end;
        match failure {
            Failure::Late => {
                let failure = timeout(started, &first.slot);
                let error = Arc::new(blob.give_up(first.chunks.start, failure));
                let now = Instant::now();
                units = units.into_iter().filter_map(|unit| unit.expire(&error, now)).collect();
            }
            Failure::Backend(error) => {
                units.iter().for_each(|unit| unit.slot.failed_for_now(&error));
                let until = || units.iter().map(|u| u.slot.until()).max();
                if !blob.try_again(&error, attempts, || until().unwrap_or_else(Instant::now)).await
                {
                    return fail(units, fetch_failure(&blob, range, attempts, error));
                }
            }
        }
    }
}

fn bad_bytes(blob: &Blob, reason: Bad) -> ChunkFailure {
    let backend = blob.backend.name().to_owned();
    match reason {
        Bad::Digest => ChunkFailure::DigestMismatch { backend },
        Bad::Codec(e) => ChunkFailure::Codec { backend, source: Arc::new(e) },
    }
}

fn fetch_failure(
    blob: &Blob,
    range: Range<u64>,
    attempts: u32,
    source: Arc<BackendError>,
) -> ChunkFailure {
    let backend = blob.backend.name().to_owned();
    ChunkFailure::Fetch { start: range.start, end: range.end, backend, attempts, source }
}

/// How far a request came.
struct Transfer {
    /// Units whose bytes did not come.
    pending: Vec<Unit>,
    /// Units whose bytes were wrong.
    bad: Vec<(Unit, Bad)>,
    failure: Option<Failure>,
}

enum Failure {
    Backend(Arc<BackendError>),
    /// Nobody waits any more, and nothing comes.
    Late,
}

/// How long a request may go on.
struct Limit {
    slots: Vec<Arc<UnitSlot>>,
    epoch: Instant,
    /// When bytes came last, in milliseconds since `epoch`; 0 = never.
    progress_ms: AtomicU64,
}

impl Limit {
    fn new(units: &[Unit], epoch: Instant) -> Self {
        let slots = units.iter().map(|unit| unit.slot.clone()).collect();
        Limit { slots, epoch, progress_ms: AtomicU64::new(0) }
    }

    fn progress(&self) {
        let ms = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.progress_ms.store(ms, Ordering::Relaxed);
    }

    fn until(&self) -> Instant {
        let wanted = self.slots.iter().map(|slot| slot.until()).max().unwrap_or(self.epoch);
        match self.progress_ms.load(Ordering::Relaxed) {
            0 => wanted,
            ms => {
                let stalled = self.epoch + Duration::from_millis(ms) + STALL;
                wanted.max(stalled.min(wanted + MAX_LINGER))
            }
        }
    }
}

/// Sends one request for `units`, which are in the order of their stored bytes, and handles each as
/// its bytes come.
async fn transfer(blob: &Arc<Blob>, units: Vec<Unit>) -> Transfer {
    let mut result = Transfer { pending: Vec::new(), bad: Vec::new(), failure: None };
    let limit = Limit::new(&units, blob.store.epoch);
    let (Some(first), Some(last)) = (units.first(), units.last()) else { return result };
    let range = first.stored.start..last.stored.end;
    let mut units = units.into_iter();
    let mut jobs = Vec::new();
    let work = async {
        let costs: u32 = units.as_slice().iter().map(cost).sum();
        let mut budget = blob.store.reserve(costs).await.ok_or(Failure::Late)?;
        let mut incoming = Incoming::open(blob, range).await?;
        limit.progress();
        while let Some(next) = units.as_slice().first() {
            let bytes = incoming.take(blob, next.stored.clone(), &limit).await?;
            let share = budget.split(usize::try_from(cost(next)).unwrap_or(usize::MAX));
            let Ok(worker) = blob.store.workers.clone().acquire_owned().await else {
                return Err(Failure::Late);
            };
            let Some(mut unit) = units.next() else { break };
            jobs.push(blob.store.runtime.spawn_blocking(move || {
                let bad = unit.accept(&bytes).err();
                drop((bytes, worker, share));
                bad.map(|bad| (unit, bad))
            }));
        }
        Ok(())
    };
    result.failure = match within(&blob.store, || limit.until(), work).await {
        None => Some(Failure::Late),
        Some(Err(failure)) => Some(failure),
        Some(Ok(())) => None,
    };
    for job in jobs {
        if let Ok(Some(bad)) = job.await {
            result.bad.push(bad);
        }
    }
    result.pending.extend(units);
    result
}

/// What a unit takes of the budget, in KiB: both its forms.
fn cost(unit: &Unit) -> u32 {
    let bytes = (unit.stored.end - unit.stored.start) + unit.uncompressed;
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

impl Store {
    /// Waits for a share of the byte budget: `kib` of it, or all of it if it is smaller.
    async fn reserve(&self, kib: u32) -> Option<Budget> {
        let whole = u32::try_from(self.config.in_flight_bytes / 1024).unwrap_or(u32::MAX).max(1);
        let permits = self.budget.clone().acquire_many_owned(kib.min(whole)).await.ok()?;
        Some(Budget { permits })
    }
}

/// A share of the byte budget, given back when dropped.
struct Budget {
    permits: OwnedSemaphorePermit,
}

impl Budget {
    fn split(&mut self, kib: usize) -> Option<OwnedSemaphorePermit> {
        self.permits.split(kib.min(self.permits.num_permits()))
    }
}

/// The bytes of a request as they come.
struct Incoming {
    stream: ByteStream,
    /// Came, but not taken yet.
    buffer: Bytes,
    /// Place of `buffer` in the blob file.
    position: u64,
    end: u64,
}

impl Incoming {
    async fn open(blob: &Blob, range: Range<u64>) -> Result<Incoming, Failure> {
        add(&blob.store.counters.fetch_requests_total, 1);
        let stream = blob.answer(blob.backend.read(&blob.info.id, range.clone())).await?;
        Ok(Incoming { stream, buffer: Bytes::new(), position: range.start, end: range.end })
    }

    /// The bytes `range`, which begins at or behind the end of what was taken before. Copies only
    /// what came in pieces.
    async fn take(
        &mut self,
        blob: &Blob,
        range: Range<u64>,
        limit: &Limit,
    ) -> Result<Bytes, Failure> {
        let len = usize::try_from(range.end - range.start).expect("at most 16 MiB");
        let mut collected: Vec<u8> = Vec::new();
        loop {
            // Drop what nobody asked for.
            let skip = range.start.saturating_sub(self.position).min(self.buffer.len() as u64);
            drop(self.buffer.split_to(usize::try_from(skip).expect("at most the buffer")));
            self.position += skip;
            if self.position >= range.start {
                let want = (len - collected.len()).min(self.buffer.len());
                self.position += want as u64;
                let piece = self.buffer.split_to(want);
                if collected.is_empty() && want == len {
                    blob.backend_works();
                    return Ok(piece);
                }
                if collected.capacity() == 0 {
                    collected.reserve_exact(len);
                }
                collected.extend_from_slice(&piece);
                if collected.len() == len {
                    blob.backend_works();
                    return Ok(collected.into());
                }
            }
            let next = self.stream.next().map(Option::transpose);
            match blob.answer(next).await? {
                Some(bytes) => {
                    if !bytes.is_empty() {
                        limit.progress();
                    }
                    add(&blob.store.counters.fetched_bytes_total, bytes.len() as u64);
                    self.buffer = bytes;
                }
                None => {
                    return Err(blob.backend_failed(BackendError::ShortRead {
                        source_name: blob.backend.name().to_owned(),
                        got: self.position,
                        want: self.end,
                    }));
                }
            }
        }
    }
}

impl Blob {
    /// What the backend answers, unless it is silent for too long.
    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, Failure> {
        if self.backend.watches_itself() {
            return answer.await.map_err(|e| self.backend_failed(e));
        }
        let after = self.store.config.stall_timeout;
        let end = Instant::now() + after;
        let silent = || {
            let source_name = self.backend.name().to_owned();
            Err(BackendError::Timeout { source_name, after })
        };
        let answer = within(&self.store, || end, answer).await.unwrap_or_else(silent);
        answer.map_err(|e| self.backend_failed(e))
    }

    fn backend_failed(&self, error: BackendError) -> Failure {
        self.store.counters.count_backend_error(&error);
        if !self.backend_down.swap(true, Ordering::Relaxed) {
            log::warn!("blob {}: {}", self.info.id, chain(&error));
        }
        Failure::Backend(Arc::new(error))
    }

    fn backend_works(&self) {
        if self.backend_down.load(Ordering::Relaxed)
            && self.backend_down.swap(false, Ordering::Relaxed)
        {
            log::info!("blob {}: {} answers again", self.info.id, self.backend.name());
        }
    }

    /// Pauses before the next attempt; false if it is no use, or too late.
    async fn try_again(
        &self,
        error: &BackendError,
        attempts: u32,
        until: impl Fn() -> Instant,
    ) -> bool {
        let again = match self.backend.outage() {
            Outage::Deadline => error.retryable(),
            Outage::Wait => error.retryable() || matches!(error, BackendError::Denied { .. }),
            Outage::Fail { retries } => error.retryable() && attempts <= retries,
        };
        if !again {
            return false;
        }
        let pause =
            (FIRST_PAUSE * 2u32.saturating_pow(attempts.saturating_sub(1).min(16))).min(MAX_PAUSE);
        let now = Instant::now();
        let left = until().saturating_duration_since(now);
        let asked = error.retry_after().unwrap_or_default();
        if left < FIRST_PAUSE || left <= asked {
            return false;
        }
        // The last pauses are shorter, so that the time is used up to its end.
        self.store.sleep_until(now + jittered(pause).min(left / 2).max(asked)).await;
        true
    }

    /// Fetches `range` of the blob file whole, repeating what fails while somebody waits.
    pub(super) async fn read_all<R: Clone>(
        &self,
        range: Range<u64>,
        slot: &Slot<R>,
    ) -> Result<Vec<u8>, ChunkFailure> {
        self.attempt(slot, range.clone(), || async {
            let mut incoming = Incoming::open(self, range.clone()).await?;
            let len = usize::try_from(range.end - range.start).unwrap_or(0);
            let mut bytes = Vec::with_capacity(len.min(16 << 20));
            let limit = Limit::new(&[], self.store.epoch);
            while bytes.len() < len {
                let at = range.start + bytes.len() as u64;
                let piece = at..range.end.min(at + (1 << 20));
                bytes.extend_from_slice(&incoming.take(self, piece, &limit).await?);
            }
            Ok(bytes)
        })
        .await
    }

    /// Bytes of the whole blob file.
    pub(super) async fn blob_size<R: Clone>(&self, slot: &Slot<R>) -> Result<u64, ChunkFailure> {
        self.attempt(slot, 0..0, || async {
            add(&self.store.counters.fetch_requests_total, 1);
            self.answer(self.backend.size(&self.info.id)).await
        })
        .await
    }

    async fn attempt<T, R: Clone, F: Future<Output = Result<T, Failure>>>(
        &self,
        slot: &Slot<R>,
        range: Range<u64>,
        work: impl Fn() -> F,
    ) -> Result<T, ChunkFailure> {
        let started = Instant::now();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let error = match within(&self.store, || slot.until(), work()).await {
                Some(Ok(done)) => return Ok(done),
                Some(Err(Failure::Backend(error))) => error,
                None | Some(Err(Failure::Late)) => return Err(timeout(started, slot)),
            };
            slot.failed_for_now(&error);
            if !self.try_again(&error, attempts, || slot.until()).await {
                return Err(fetch_failure(self, range, attempts, error));
            }
        }
    }
}

/// Half to one and a half of `pause`, so that those who failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let random = RandomState::new().build_hasher().finish() % 1024;
    let random = u32::try_from(random).unwrap_or(512);
    pause / 2 + pause * random / 1024
}
