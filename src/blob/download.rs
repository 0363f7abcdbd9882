//! Downloading chunks: which requests are sent to the backend, and their repetition.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::{ChunkFailure, chain};
use super::fetch::{fail, release, runs, timeout};
use super::flight::{Slot, within};
use super::gate::Class;
use super::line::OnLine;
use super::plan;
use super::store::Blob;
use super::transfer::{Admitted, Failure, Incoming, Leave, Limit, Pace, Transfer, transfer};
use super::unit::{Bad, Unit};
use crate::backend::{BackendError, Outage};

/// Pause before the first repetition of a request that failed; doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Starts the downloads of `units`.
pub fn start(blob: &Arc<Blob>, mut units: Vec<Unit>) {
    units.sort_by_key(|unit| unit.stored.start);
    for units in runs(units, |units| {
        let pieces: Vec<_> = units.iter().map(Unit::piece).collect();
        plan::requests(&pieces, plan::request_size(blob.link.product()))
    }) {
        // At once, so that no guess is sent before it.
        let line = OnLine::new(&blob.link, units.iter().map(Unit::stored_len).sum());
        let task: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(download(blob.clone(), units, line));
        blob.store.runtime.spawn(task);
    }
}

/// Downloads units that one request covers, repeating what fails.
async fn download(blob: Arc<Blob>, mut units: Vec<Unit>, line: OnLine) {
    let started = Instant::now();
    let mut line = Some(line);
    let mut attempts = 0;
    while !units.is_empty() {
        attempts += 1;
        let Transfer { pending, bad, failure, .. } = {
            let line = line.take().unwrap_or_else(|| OnLine::new(&blob.link, 0));
            transfer(&blob, units, Leave::Demand(line)).await
        };
        units = pending;
        let fetched_twice = |unit: &Unit| unit.bad.is_some();
        let mut again = Vec::new();
        for (mut unit, reason) in bad {
            let another = blob.backend.mistrust(&blob.info.id, unit.stored.clone());
            if fetched_twice(&unit) && !another {
                if blob.is_stored_elsewhere(&unit.slot).await && unit.relocate() {
                    unit.bad = None;
                    again.push(unit);
                    continue;
                }
                fail(vec![unit], bad_bytes(&blob, reason));
                continue;
            }
            say_bad(&unit, &reason, "fetching them again");
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

pub fn say_bad(unit: &Unit, reason: &Bad, then: &str) {
    let reason = match reason {
        Bad::Digest => "wrong digest".to_owned(),
        Bad::Codec(e) => chain(e),
    };
    let (blob, chunks) = (&unit.blob, &unit.chunks);
    log::warn!(
        "blob {}: chunks {}..{}: {reason} from {}; {then}",
        blob.info.id,
        chunks.start,
        chunks.end,
        blob.backend.name()
    );
}

/// Downloads `units`, which one request covers, for nobody in particular. Once: what fails is left to
/// those who want it, as demand if there is somebody by then. Gives the leave to send a request back.
pub async fn download_early(
    blob: &Arc<Blob>,
    units: Vec<Unit>,
    admitted: Admitted,
) -> (Option<Admitted>, Option<EarlyFailure>) {
    let Transfer { pending, bad, failure, admitted } =
        transfer(blob, units, Leave::Early(admitted)).await;
    let mut rest = pending;
    for (mut unit, reason) in bad {
        blob.backend.mistrust(&blob.info.id, unit.stored.clone());
        say_bad(&unit, &reason, "left to those who want them");
        unit.bad = Some(reason);
        rest.push(unit);
    }
    release(blob, rest);
    let failure = failure.map(|failure| match failure {
        Failure::Late => EarlyFailure::Late,
        Failure::Backend(error) => EarlyFailure::Backend(error),
    });
    (admitted, failure)
}

/// Why chunks did not come early.
#[derive(Debug, thiserror::Error)]
pub enum EarlyFailure {
    #[error(transparent)]
    Backend(Arc<BackendError>),
    #[error("nothing came for too long")]
    Late,
    #[error("the cache takes no chunks")]
    NoCache,
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

impl Blob {
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
            let _request = self.link.requests.pass(Class::Demand, 1).await;
            let line = OnLine::new(&self.link, range.end - range.start);
            let pace = Pace::new(self, Class::Demand, line, VecDeque::new());
            let mut incoming = Incoming::open(self, range.clone(), pace).await?;
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
            self.store.counters.count_request(Class::Demand);
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
