//! Making chunks readable: from the cache file if they are there, else from the backend.
//!
//! A chunk goes through these steps, each of which leaves out what is done already:
//! [`Blob::fetch`] enlists it (one flight for all who want it) → [`look`] in the chunk map → verify
//! what is there, claim what is not → look again → [`download`](super::download) in merged requests → decompress,
//! verify and write each unit as soon as its bytes have come ([`Unit::accept`]). Nobody who waits
//! for a claim of another process holds bytes of the budget or a claim that somebody needs.

use std::collections::hash_map::Entry;
use std::future::{Future, ready};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::cache_file::{CacheFiles, Geometry};
use super::claim::Claim;
use super::counters::add;
use super::download::{self, EarlyFailure};
use super::error::{ChunkError, ChunkFailure, chain};
use super::flight::{Slot, within};
use super::gate::{Class, Permit};
use super::here;
use super::store::{Blob, ChunkData, ChunkRef};
use super::table::{Proof, Table};
use super::transfer::Admitted;
use super::unit::{Cached, ChunkResult, Keep, Unit, UnitSlot};
use crate::rafs::id::ChunkIndex;

/// How often opening the cache files is tried on a full or broken disk.
const CACHE_RETRY: Duration = Duration::from_secs(1);

impl Blob {
    /// Makes chunks readable: joins downloads on their way, starts the missing ones, verifies.
    /// Results are in the order of `chunks`; each is there by `deadline`, with an error if need be.
    ///
    /// May be polled anywhere. Dropping it gives up waiting; a download goes on while its bytes
    /// keep coming. Until it is polled nothing happens.
    pub fn fetch(
        self: &Arc<Self>,
        chunks: Vec<ChunkRef>,
        deadline: Instant,
    ) -> impl Future<Output = Vec<Result<ChunkData, Arc<ChunkError>>>> + Send + 'static {
        let blob = self.clone();
        async move { blob.fetch_chunks(&chunks, deadline).await }
    }

    async fn fetch_chunks(
        self: Arc<Self>,
        chunks: &[ChunkRef],
        deadline: Instant,
    ) -> Vec<ChunkResult> {
        let started = Instant::now();
        let Some(first) = chunks.first() else { return Vec::new() };
        let indexes: Vec<_> = chunks.iter().map(|chunk| chunk.index).collect();
        // Twice: only the table tells whether digests must be looked for in the blob itself.
        for _ in 0..2 {
            let Some(slot) = self.load_table(&indexes, deadline) else { break };
            let loaded = within(&self.store, || deadline, slot.done()).await;
            if let Err(failure) = loaded.unwrap_or_else(|| Err(timeout(started, &slot))) {
                let error = Arc::new(self.give_up(first.index.0, failure));
                return chunks.iter().map(|_| Err(error.clone())).collect();
            }
        }
        let Some(table) = self.table.get() else {
            let error = Arc::new(self.give_up(first.index.0, ChunkFailure::Abandoned));
            return chunks.iter().map(|_| Err(error.clone())).collect();
        };
        let mut sleep = pin!(self.store.sleep_until(deadline));
        let mut late: Option<Arc<ChunkError>> = None;
        let mut results = Vec::with_capacity(chunks.len());
        for (chunk, want) in chunks.iter().zip(self.enlist(table, chunks, deadline)) {
            let (slot, member) = match want {
                Want::Known(result) => {
                    results.push(result);
                    continue;
                }
                Want::Flight(slot, member) => (slot, member),
            };
            let done = tokio::select! {
                biased;
                done = slot.done() => Some(done),
                () = &mut sleep, if late.is_none() => None,
                () = ready(()), if late.is_some() => None,
            };
            results.push(match (done, &late) {
                (Some(all), _) => all.get(member).cloned().unwrap_or(Ok(ChunkData::Cached)),
                (None, Some(error)) => Err(error.clone()),
                (None, None) => {
                    let error = Arc::new(self.give_up(chunk.index.0, timeout(started, &slot)));
                    late = Some(error.clone());
                    Err(error)
                }
            });
        }
        results
    }

    /// Finds or starts the flight of each chunk.
    fn enlist(
        self: &Arc<Self>,
        table: &Table,
        chunks: &[ChunkRef],
        deadline: Instant,
    ) -> Vec<Want> {
        let mut wants = Vec::with_capacity(chunks.len());
        let (mut units, mut used) = (Vec::new(), Vec::new());
        for chunk in chunks {
            let info = table.infos.get(chunk.index);
            let (Some(info), Some(members)) = (info, table.infos.unit(chunk.index)) else {
                wants.push(self.contradiction(chunk, format!("{} chunks", table.infos.len())));
                continue;
            };
            if !chunk.agrees(&info) {
                let have =
                    format!("byte {}, {} bytes", info.uncompressed_offset, info.uncompressed_size);
                wants.push(self.contradiction(chunk, have));
                continue;
            }
            let member = usize::try_from(chunk.index.0 - members.start).expect("24 bits");
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            if self.verified.get(chunk.index.0) {
                wants.push(Want::Known(Ok(ChunkData::Cached)));
                continue;
            }
            let slot = match flights.get(&members.start) {
                Some(slot) => {
                    slot.extend(deadline);
                    add(&self.store.counters.joined_fetches_total, 1);
                    let before = slot.demand();
                    if before != Class::Demand {
                        self.link.changed.notify_waiters(); // it need not give way any more
                    }
                    if before == Class::ReadAhead {
                        used.push(chunk.index.0);
                    }
                    slot.clone()
                }
                None => {
                    let slot = Arc::new(UnitSlot::new(self.store.epoch, deadline));
                    flights.insert(members.start, slot.clone());
                    drop(flights); // making a unit of a large batch takes a moment
                    units.push(Unit::new(self.clone(), slot.clone(), members));
                    slot
                }
            };
            wants.push(Want::Flight(slot, member));
        }
        units.sort_by_key(|unit| unit.chunks.start);
        start(self, units);
        used.into_iter().for_each(|chunk| self.hit(chunk));
        wants
    }

    /// Starts a flight of each unit of `chunks` that is not here and has none.
    fn enlist_early(self: &Arc<Self>, chunks: &Range<u32>, class: Class) -> Vec<Unit> {
        let Some(table) = self.table.get() else { return Vec::new() };
        let deadline = self.store.deadline();
        let mut units = Vec::new();
        let mut next = chunks.start;
        while next < chunks.end
            && let Some(members) = table.infos.unit(ChunkIndex(next))
        {
            next = members.end;
            // A chunk that no file of the image has may be without a digest, and is of no use.
            let of_use = |i| {
                !self.verified.get(i)
                    && (!table.shareable()
                        || matches!(table.proof(ChunkIndex(i)), Proof::Digest(_)))
            };
            if !members.clone().any(of_use) {
                continue;
            }
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            let Entry::Vacant(entry) = flights.entry(members.start) else { continue };
            let slot = Arc::new(UnitSlot::of_class(class, self.store.epoch, deadline));
            entry.insert(slot.clone());
            drop(flights);
            units.push(Unit::new(self.clone(), slot, members));
        }
        units
    }

    /// Fetches `chunks`, whole units, for nobody in particular: those that are nowhere on this host
    /// and on nobody's way.
    pub(super) async fn fetch_early(
        self: Arc<Self>,
        chunks: Range<u32>,
        admitted: Admitted,
    ) -> Early {
        let mut early = Early::default();
        if self.store.degraded.load(Ordering::Relaxed) {
            early.failure = Some(EarlyFailure::NoCache);
            return early;
        }
        let class = admitted.class();
        let mut admitted = Some(admitted);
        let mut left = vec![chunks];
        while let Some(chunks) = left.pop()
            && let Some(leave) = admitted.take()
        {
            let units = self.enlist_early(&chunks, class);
            if units.is_empty() {
                admitted = Some(leave);
                continue;
            }
            let blob = self.clone();
            let Ok(found) = self.on_worker_for(class, move || look(&blob, units)).await else {
                break; // the daemon is ending
            };
            // What is here is verified when it is read; what comes to another process is its own.
            let mut not_now = found.ready;
            not_now.extend(found.elsewhere);
            let (keep, lose): (Vec<_>, Vec<_>) =
                found.missing.into_iter().partition(|unit| !matches!(unit.keep, Keep::Nowhere));
            if !lose.is_empty() {
                early.failure = Some(EarlyFailure::NoCache);
                not_now.extend(lose);
            }
            let mut parts = runs(keep, adjacent).into_iter();
            let first = parts.next().unwrap_or_default();
            // The rest has a request of its own, after this one; nothing stays claimed for it.
            for part in parts {
                if let (Some(first), Some(last)) = (part.first(), part.last()) {
                    left.push(first.chunks.start..last.chunks.end);
                }
                not_now.extend(part);
            }
            release(&self, not_now);
            if first.is_empty() {
                admitted = Some(leave);
                continue;
            }
            let bytes: u64 = first.iter().map(Unit::stored_len).sum();
            let (leave, failure) = download::download_early(&self, first, leave).await;
            if failure.is_some() {
                early.failure = failure;
                break;
            }
            early.bytes += bytes;
            admitted = leave;
        }
        early
    }

    fn contradiction(&self, chunk: &ChunkRef, have: String) -> Want {
        let said = format!("block {}, {} bytes", chunk.start_block, chunk.size);
        let failure = ChunkFailure::Contradiction { said, have };
        Want::Known(Err(Arc::new(self.give_up(chunk.index.0, failure))))
    }

    /// Makes the error of a failed read and logs it under its id.
    pub(super) fn give_up(&self, index: u32, failure: ChunkFailure) -> ChunkError {
        if matches!(failure, ChunkFailure::Timeout { .. }) {
            add(&self.store.counters.timeouts_total, 1);
        }
        let error = self.error(index, failure);
        log::error!("{}", chain(&error));
        error
    }

    /// Runs `work` on the blocking pool, after others if all workers are busy.
    pub(super) async fn on_worker<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ChunkFailure> {
        self.on_worker_for(Class::Demand, work).await
    }

    async fn on_worker_for<T: Send + 'static>(
        &self,
        class: Class,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ChunkFailure> {
        let permit = self.store.workers.pass(class, 1).await;
        let job = self.store.runtime.spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        job.await.map_err(|_| ChunkFailure::Abandoned)
    }

    /// The cache files, opened now if need be and possible. Does I/O.
    pub(super) fn cache_files(&self) -> Option<&CacheFiles> {
        if let Some(cache) = self.cache.get() {
            return Some(cache);
        }
        // Who comes meanwhile waits: without the files its chunks could not be kept.
        let mut retry = self.cache_retry.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cache) = self.cache.get() {
            return Some(cache);
        }
        let now = Instant::now();
        if retry.is_some_and(|retry| now < retry) {
            return None; // it has just failed
        }
        *retry = Some(now + CACHE_RETRY);
        let (dir, table) = (self.store.dir()?, self.table.get()?);
        let geometry = Geometry {
            blob: &self.info.id,
            chunk_count: table.infos.len(),
            uncompressed_size: self.info.uncompressed_size,
            layout: table.layout,
        };
        let opened = match table.shareable() {
            true => CacheFiles::open(dir, &geometry),
            false => CacheFiles::private(dir, &geometry),
        };
        match opened {
            Ok(cache) => drop(self.cache.set(cache)),
            Err(e) => self.store.write_failed(&self.info.id, &e),
        }
        self.cache.get()
    }
}

/// What came of asking early.
#[derive(Default)]
pub struct Early {
    /// Stored bytes that were fetched.
    pub bytes: u64,
    pub failure: Option<EarlyFailure>,
}

/// What a reader of one chunk gets.
enum Want {
    Known(ChunkResult),
    /// The flight of its unit, and its place in the unit.
    Flight(Arc<UnitSlot>, usize),
}

pub fn timeout<R: Clone>(started: Instant, slot: &Slot<R>) -> ChunkFailure {
    ChunkFailure::Timeout { waited: started.elapsed(), last: slot.last_error() }
}

/// Fails `units` with one error, which is logged once.
pub fn fail(units: Vec<Unit>, failure: ChunkFailure) {
    if let Some(first) = units.first() {
        let error = Arc::new(first.blob.give_up(first.chunks.start, failure));
        units.into_iter().for_each(|unit| unit.fail(&error));
    }
}

/// Ends units that nobody waits for, and starts those over for which somebody does by now.
pub fn release(blob: &Arc<Blob>, units: Vec<Unit>) {
    start(blob, units.into_iter().filter_map(Unit::release).collect());
}

/// Starts what makes `units` of `blob`, in the order of their chunks, readable.
fn start(blob: &Arc<Blob>, units: Vec<Unit>) {
    if units.is_empty() {
        return;
    }
    // Mostly there is room at once: then it changes threads once less.
    if let Some(worker) = blob.store.workers.pass(Class::Demand, 1).now_or_never() {
        return run(blob.clone(), units, worker);
    }
    let looker = blob.clone();
    let task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
        let worker = looker.store.workers.pass(Class::Demand, 1).await;
        run(looker, units, worker);
    });
    blob.store.runtime.spawn(task);
}

/// Looks for units on the blocking pool, and reads what is missing there, too, if the source is on this host.
/// If the daemon ends before it comes to that, the units are dropped, which fails their waiters.
fn run(blob: Arc<Blob>, units: Vec<Unit>, worker: Permit) {
    let runtime = blob.store.runtime.clone();
    runtime.spawn_blocking(move || {
        let mut found = look(&blob, units);
        drop(worker);
        found.missing = here::read(&blob, found.missing);
        proceed(&blob, found);
    });
}

fn proceed(blob: &Arc<Blob>, found: Found) {
    for unit in found.ready {
        let task = verify(blob.clone(), unit);
        blob.store.runtime.spawn(task);
    }
    let missing = found.missing.iter().map(|unit| unit.chunks.len() as u64).sum();
    add(&blob.store.counters.cache_misses_total, missing);
    let places: Vec<_> = found.missing.iter().map(|unit| unit.chunks.clone()).collect();
    download::start(blob, found.missing);
    if !places.is_empty() {
        blob.missed(&places);
    }
    for units in runs(found.elsewhere, adjacent) {
        blob.store.runtime.spawn(wait_for_claim(blob.clone(), units));
    }
}

/// Lengths of runs of units that follow each other.
fn adjacent(units: &[Unit]) -> Vec<usize> {
    let mut lens: Vec<usize> = Vec::new();
    for (i, unit) in units.iter().enumerate() {
        match lens.last_mut() {
            Some(len) if units[i - 1].chunks.end == unit.chunks.start => *len += 1,
            _ => lens.push(1),
        }
    }
    lens
}

/// Cuts `units` into runs of the lengths that `cut` gives.
pub fn runs(mut units: Vec<Unit>, cut: impl Fn(&[Unit]) -> Vec<usize>) -> Vec<Vec<Unit>> {
    let lens = cut(&units);
    let mut units = units.drain(..);
    lens.into_iter().map(|len| units.by_ref().take(len).collect()).collect()
}

/// Where units are, as far as the chunk map and claims tell.
#[derive(Default)]
struct Found {
    /// Marked as being in the cache file.
    ready: Vec<Unit>,
    /// For us to download.
    missing: Vec<Unit>,
    /// Being downloaded by another process.
    elsewhere: Vec<Unit>,
}

/// Sorts units by where they are, and claims those that are nowhere. Runs on the blocking pool.
fn look(blob: &Blob, units: Vec<Unit>) -> Found {
    let mut found = Found::default();
    let cache = blob.cache_files();
    let mut wanted: Vec<Unit> = Vec::new();
    for mut unit in units {
        match cache {
            None => found.missing.push(unit),
            Some(CacheFiles { map: None, .. }) => {
                unit.keep = Keep::Private;
                found.missing.push(unit);
            }
            Some(CacheFiles { map: Some(map), writable, .. }) => {
                match unit.marked_ready(map) {
                    Ok(true) if !unit.suspect => found.ready.push(unit),
                    Ok(_) if *writable => wanted.push(unit),
                    _ => found.missing.push(unit), // and not kept
                }
            }
        }
    }
    let Some(CacheFiles { map: Some(map), .. }) = cache else { return found };
    for units in runs(wanted, |units| {
        // All at once if they are adjacent, which they mostly are.
        let adjacent = units.windows(2).all(|pair| pair[0].chunks.end == pair[1].chunks.start);
        if adjacent && !units.is_empty() { vec![units.len()] } else { vec![1; units.len()] }
    }) {
        claim(map, units, &mut found);
    }
    found
}

/// Claims adjacent units, one by one if another process has some of them.
fn claim(map: &super::cache_file::ChunkMap, units: Vec<Unit>, found: &mut Found) {
    let (Some(first), Some(last)) = (units.first(), units.last()) else { return };
    let (file, range) = map.lock_range(&(first.chunks.start..last.chunks.end));
    match Claim::try_take(file, range) {
        Ok(Some(claim)) => claimed(claim, units, found),
        Ok(None) if units.len() > 1 => {
            for unit in units {
                claim(map, vec![unit], found);
            }
        }
        Ok(None) => found.elsewhere.extend(units),
        Err(e) => {
            log::warn!("blob {}: cannot lock the chunk map: {e}", first.blob.info.id);
            found.missing.extend(units); // and not kept
        }
    }
}

/// Hands each unit its part of the claim. What another process has finished meanwhile is ready.
fn claimed(mut claim: Claim, units: Vec<Unit>, found: &mut Found) {
    for mut unit in units {
        let blob = unit.blob.clone();
        let Some(CacheFiles { map: Some(map), data, .. }) = blob.cache.get() else { continue };
        let (_, range) = map.lock_range(&unit.chunks);
        unit.keep = Keep::Claimed(claim.split_before(range.end));
        match unit.marked_ready(map) {
            Ok(true) => match unit.verify_cached(data, map) {
                Cached::Right => (),
                Cached::Wrong => found.missing.push(unit),
                Cached::Foreign => found.missing.push(foreign(unit)),
            },
            _ => found.missing.push(unit),
        }
    }
}

/// The place of the unit in the cache file is taken by the bytes of another image.
fn foreign(mut unit: Unit) -> Unit {
    unit.keep = Keep::Nowhere;
    if !unit.blob.said_conflict.swap(true, Ordering::Relaxed) {
        log::warn!(
            "blob {}: another image on this host has other digests for its chunks (first {}); \
             they are served without caching",
            unit.blob.info.id,
            unit.chunks.start
        );
    }
    unit
}

/// Verifies a unit that is marked ready; starts over, with a claim, if it is not right.
async fn verify(blob: Arc<Blob>, mut unit: Unit) {
    let cache_of = blob.clone();
    let left = blob.on_worker(move || {
        let Some(CacheFiles { map: Some(map), data, .. }) = cache_of.cache.get() else {
            return Some(unit);
        };
        match unit.verify_cached(data, map) {
            Cached::Right => None,
            Cached::Wrong | Cached::Foreign => {
                unit.suspect = true;
                Some(unit)
            }
        }
    });
    if let Ok(Some(unit)) = left.await {
        start(&blob, vec![unit]);
    }
}

/// Waits for another process to finish adjacent units, or to die.
async fn wait_for_claim(blob: Arc<Blob>, units: Vec<Unit>) {
    let Some(CacheFiles { map: Some(map), .. }) = blob.cache.get() else { return };
    let (Some(first), Some(last)) = (units.first(), units.last()) else { return };
    add(&blob.store.counters.claim_waits_total, 1);
    let (file, range) = map.lock_range(&(first.chunks.start..last.chunks.end));
    let wait = blob.store.waiters.wait(file.clone(), range);
    let patience = units.iter().map(|unit| unit.slot.claim_patience()).max();
    let patience = patience.unwrap_or_else(Instant::now);
    match within(&blob.store, || patience, wait).await {
        Some(Ok(claim)) => {
            let work = move || {
                let mut found = Found::default();
                claimed(claim, units, &mut found);
                found
            };
            if let Ok(found) = blob.on_worker(work).await {
                proceed(&blob, found);
            }
        }
        other => {
            let reason = other.and_then(Result::err).map(|e| e.to_string());
            log::warn!(
                "blob {}: chunks {}..{}: fetched without caching, as another process keeps them \
                 claimed{}",
                blob.info.id,
                first.chunks.start,
                last.chunks.end,
                reason.map(|e| format!(": {e}")).unwrap_or_default()
            );
            let found = Found { missing: units, ..Found::default() };
            proceed(&blob, found);
        }
    }
}
