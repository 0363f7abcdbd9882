//! One request to a backend: when it may start, its bytes as they come, each chunk handled as soon as
//! it is complete.
//!
//! What nobody waits for yet gives way: as long as bytes come that somebody waits for, it takes none
//! from the same source. It is held up for at most [`GIVE_WAY`] in all, as other processes may wait
//! for its chunks; and once somebody here does, it gives way no more.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};

use super::error::chain;
use super::flight::within;
use super::gate::{Class, Permit};
use super::line::OnLine;
use super::link::{Demand, Link, Stream};
use super::store::Blob;
use super::unit::{Bad, Unit, UnitSlot};
use crate::backend::{BackendError, ByteStream};
use crate::rafs::id::ChunkIndex;

/// A download that nobody waits for any more goes on as long as bytes keep coming at least this
/// often, and at most for [`MAX_LINGER`].
const STALL: Duration = Duration::from_secs(3);
const MAX_LINGER: Duration = Duration::from_secs(60);
/// Longest time in all for which a request gives way.
const GIVE_WAY: Duration = Duration::from_secs(1);
/// How often it is looked whether demand has passed, while prefetch waits for its turn.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Leave to send a request that nobody waits for.
pub struct Admitted {
    class: Class,
    #[expect(dead_code, reason = "held, not read: dropping it lets the next request start")]
    request: Permit,
    budget: Permit,
    /// Bytes that are on their way early.
    early: Permit,
    /// Its place on the link, until it is sent.
    line: Option<OnLine>,
}

impl Admitted {
    pub fn class(&self) -> Class {
        self.class
    }
}

impl Blob {
    /// Waits until a request for `chunks`, whole units, may be sent that nobody waits for. Nothing is
    /// claimed meanwhile.
    pub(super) async fn admit(&self, class: Class, chunks: &Range<u32>) -> Admitted {
        let (stored, cost) = self.size_of(chunks);
        let mut pass = pin!(self.link.early.pass(class, stored));
        let early = loop {
            tokio::select! {
                biased;
                early = &mut pass => break early,
                () = tokio::time::sleep(LOOK_AGAIN) => self.link.refresh(),
            }
        };
        let request = self.link.requests.pass(class, 1).await;
        let budget = self.store.budget.pass(class, cost).await;
        let line = Some(OnLine::new(&self.link, stored));
        Admitted { class, request, budget, early, line }
    }

    /// Stored bytes of `chunks`, and bytes of memory that it takes to make them readable.
    fn size_of(&self, chunks: &Range<u32>) -> (u64, u64) {
        let Some(table) = self.table.get().filter(|_| !chunks.is_empty()) else { return (0, 0) };
        let stored = self.neighbourhood(table).bytes(chunks);
        let place = |i: u32| table.infos.get(ChunkIndex(i));
        let uncompressed = match (place(chunks.start), place(chunks.end - 1)) {
            (Some(a), Some(b)) => b.uncompressed_end().saturating_sub(a.uncompressed_offset),
            _ => 0,
        };
        (stored, stored + uncompressed)
    }
}

/// How far a request came.
pub struct Transfer {
    /// Units whose bytes did not come.
    pub pending: Vec<Unit>,
    /// Units whose bytes were wrong.
    pub bad: Vec<(Unit, Bad)>,
    pub failure: Option<Failure>,
    /// Leave for one more request, if it came with any.
    pub admitted: Option<Admitted>,
}

pub enum Failure {
    Backend(Arc<BackendError>),
    /// Nobody waits any more, and nothing comes.
    Late,
}

/// How long a request may go on.
pub struct Limit {
    slots: Vec<Arc<UnitSlot>>,
    epoch: Instant,
    /// When bytes came last, in milliseconds since `epoch`; 0 = never.
    progress_ms: AtomicU64,
}

impl Limit {
    pub fn new(units: &[Unit], epoch: Instant) -> Self {
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

/// Why a request may be sent.
pub enum Leave {
    /// Somebody waits for it.
    Demand(OnLine),
    Early(Admitted),
}

/// Sends one request for `units`, which are in the order of their stored bytes, and handles each as
/// its bytes come.
pub async fn transfer(blob: &Arc<Blob>, units: Vec<Unit>, leave: Leave) -> Transfer {
    let (line, mut admitted) = match leave {
        Leave::Demand(line) => (Some(line), None),
        Leave::Early(mut admitted) => (admitted.line.take(), Some(admitted)),
    };
    let mut result =
        Transfer { pending: Vec::new(), bad: Vec::new(), failure: None, admitted: None };
    let limit = Limit::new(&units, blob.store.epoch);
    let (Some(first), Some(last)) = (units.first(), units.last()) else { return result };
    let range = first.stored.start..last.stored.end;
    let mut units = units.into_iter();
    let mut jobs = Vec::new();
    let work = async {
        let class = admitted.as_ref().map_or(Class::Demand, |admitted| admitted.class);
        let (mut demand_budget, mut _request) = (None, None);
        if admitted.is_none() {
            _request = Some(blob.link.requests.pass(Class::Demand, 1).await);
            let costs = units.as_slice().iter().map(cost).sum();
            demand_budget = Some(blob.store.budget.pass(Class::Demand, costs).await);
        }
        let line = line.unwrap_or_else(|| OnLine::new(&blob.link, 0));
        line.sent(range.end - range.start);
        let pace = Pace::new(blob, class, line, limit.slots.iter().cloned().collect());
        let mut incoming = Incoming::open(blob, range, pace).await?;
        limit.progress();
        while let Some(next) = units.as_slice().first() {
            let bytes = incoming.take(blob, next.stored.clone(), &limit).await?;
            let share = match (&mut admitted, &mut demand_budget) {
                (Some(admitted), _) => {
                    drop(admitted.early.split(next.stored_len()));
                    Some(admitted.budget.split(cost(next)))
                }
                (None, budget) => budget.as_mut().map(|budget| budget.split(cost(next))),
            };
            let worker = blob.store.workers.pass(incoming.pace.class(), 1).await;
            incoming.pace.taken();
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
    result.admitted = admitted;
    result
}

/// What a unit takes of the budget, in bytes: both its forms.
pub fn cost(unit: &Unit) -> u64 {
    unit.stored_len() + unit.uncompressed
}

/// How urgent a request is from moment to moment, and what it measures.
pub struct Pace {
    link: Arc<Link>,
    class: Class,
    /// Of the units that have not come.
    slots: VecDeque<Arc<UnitSlot>>,
    /// Somebody waited when it was sent, so others give way to it. To one that somebody joined later
    /// they do not: it was sent among them, and together they use the link best.
    wanted: bool,
    demand: Option<Demand>,
    line: OnLine,
    /// Once bytes have come.
    stream: Option<Stream>,
    sent: Instant,
    gave_way: Duration,
}

impl Pace {
    pub fn new(blob: &Blob, class: Class, line: OnLine, slots: VecDeque<Arc<UnitSlot>>) -> Pace {
        Pace {
            line,
            wanted: class == Class::Demand,
            demand: (class == Class::Demand).then(|| blob.link.demand()),
            link: blob.link.clone(),
            class,
            slots,
            stream: None,
            sent: Instant::now(),
            gave_way: Duration::ZERO,
        }
    }

    /// What the rest of the request is wanted for now. Demand stays demand.
    pub fn class(&mut self) -> Class {
        if self.class != Class::Demand
            && self.slots.iter().any(|slot| slot.class() == Class::Demand)
        {
            self.class = Class::Demand;
            self.demand = Some(self.link.demand());
        }
        self.class
    }

    fn taken(&mut self) {
        self.slots.pop_front();
    }

    /// Waits while somebody else should have the bandwidth.
    async fn give_way(&mut self) {
        while self.class() != Class::Demand && self.gave_way < GIVE_WAY {
            let link = self.link.clone();
            let mut changed = pin!(link.changed.notified());
            changed.as_mut().enable();
            if !link.is_wanted() || self.class() == Class::Demand {
                break;
            }
            if let Some(stream) = &mut self.stream {
                stream.pause();
            }
            let start = Instant::now();
            tokio::select! {
                () = changed => (),
                () = tokio::time::sleep(GIVE_WAY.saturating_sub(self.gave_way)) => (),
            }
            self.gave_way += start.elapsed();
        }
        if let Some(stream) = &mut self.stream {
            stream.resume();
        }
    }

    fn received(&mut self, bytes: usize) {
        self.line.received(bytes as u64);
        match &self.stream {
            Some(stream) => stream.received(bytes),
            None => {
                // Who gave way did not look when it came.
                if self.gave_way.is_zero() {
                    self.link.answered(self.sent.elapsed());
                }
                self.stream = Some(self.link.stream());
                if let Some(demand) = self.demand.as_mut().filter(|_| self.wanted) {
                    demand.streams();
                }
            }
        }
    }
}

/// The bytes of a request as they come.
pub struct Incoming {
    stream: ByteStream,
    /// Came, but not taken yet.
    buffer: Bytes,
    /// Place of `buffer` in the blob file.
    position: u64,
    end: u64,
    pub pace: Pace,
}

impl Incoming {
    pub async fn open(blob: &Blob, range: Range<u64>, mut pace: Pace) -> Result<Incoming, Failure> {
        blob.store.counters.count_request(pace.class());
        let stream = blob.answer(blob.backend.read(&blob.info.id, range.clone())).await?;
        Ok(Incoming { stream, buffer: Bytes::new(), position: range.start, end: range.end, pace })
    }

    /// The bytes `range`, which begins at or behind the end of what was taken before. Copies only
    /// what came in pieces.
    pub async fn take(
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
            self.pace.give_way().await;
            let next = self.stream.next().map(Option::transpose);
            match blob.answer(next).await? {
                Some(bytes) => {
                    if !bytes.is_empty() {
                        limit.progress();
                        self.pace.received(bytes.len());
                    }
                    blob.store.counters.count_bytes(self.pace.class(), bytes.len() as u64);
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
    pub(super) async fn answer<T>(
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

    pub(super) fn backend_failed(&self, error: BackendError) -> Failure {
        self.store.counters.count_backend_error(&error);
        if !self.backend_down.swap(true, Ordering::Relaxed) {
            log::warn!("blob {}: {}", self.info.id, chain(&error));
        }
        Failure::Backend(Arc::new(error))
    }

    pub(super) fn backend_works(&self) {
        if self.backend_down.load(Ordering::Relaxed)
            && self.backend_down.swap(false, Ordering::Relaxed)
        {
            log::info!("blob {}: {} answers again", self.info.id, self.backend.name());
        }
    }
}
