//! Prefetch: fetching what an image, a list or the config asks for, before anybody reads it.
//!
//! Runs beside everything else and gives way to it. Chunks are asked for in the order of the list, in
//! requests over what lies together; who reads one of them meanwhile joins, or is there first. What
//! fails is tried again, later, and then left alone: a read of it starts anew.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::{AbortHandle, JoinSet};

use super::ahead::Listed;
use super::counters::add;
use super::error::chain;
use super::fetch::Early;
use super::flight::within;
use super::gate::{Class, Gate};
use super::neighbours::Places;
use super::plan;
use super::store::{Blob, Store};
use crate::rafs::id::{ChunkIndex, Nid};
use crate::rafs::{Bootstrap, FileKind, Inode};

/// Missing chunks between two that are wanted are fetched, too, if they are fewer bytes.
const GAP: u64 = 8 << 10;
/// A request counts as a part of the largest one, at least, in what runs at once.
const LEAST_PART: u64 = 4;
/// How often the log says how far it is.
const PROGRESS: Duration = Duration::from_secs(10);
/// Pause after a request that failed; doubles with each one, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// After so many failures on end it is given up.
const MAX_FAILURES: u32 = 8;
/// Symbolic links that are followed on the way to one path, as Linux does.
const MAX_LINKS: u32 = 40;

/// How a prefetch is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefetchConfig {
    /// What the log calls the image.
    pub name: String,
    /// Requests of `request_bytes` at once, at least 1; of smaller ones up to four times as many
    /// (config `threads_count`, `threads`).
    pub requests: u64,
    /// Most stored bytes of one request; a larger chunk is let through alone (config `merging_size`,
    /// `batch_size`).
    pub request_bytes: u64,
    /// Most bytes per second; `None`: no limit but the link's (config `bandwidth_rate`,
    /// `bandwidth_limit`).
    pub bytes_per_second: Option<u64>,
    /// What to fetch first; `None`: what the image's prefetch table names.
    pub paths: Option<Vec<Vec<u8>>>,
    /// Then everything else (config `prefetch_all`).
    pub everything: bool,
}

/// A prefetch on its way. Dropping it ends it; what has come stays.
pub struct Prefetch {
    task: AbortHandle,
}

impl Prefetch {
    /// Starts it; returns at once. `blobs` are those of `image.blobs()`, in this order.
    pub fn start(
        store: &Arc<Store>,
        image: &Bootstrap,
        blobs: &[Arc<Blob>],
        config: PrefetchConfig,
    ) -> Prefetch {
        let job = Job {
            store: store.clone(),
            image: image.clone(),
            blobs: blobs.to_vec(),
            lanes: {
                let all = config.requests.max(1).saturating_mul(config.request_bytes.max(1));
                Gate::new([all; 4])
            },
            due: Mutex::new(Instant::now()),
            failures: AtomicU32::new(0),
            fetched: AtomicU64::new(0),
            done: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            config,
        };
        let task = store.runtime.spawn(Arc::new(job).run());
        Prefetch { task: task.abort_handle() }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Job {
    store: Arc<Store>,
    image: Bootstrap,
    blobs: Vec<Arc<Blob>>,
    config: PrefetchConfig,
    /// Bytes of requests that run at once.
    lanes: Arc<Gate>,
    /// When the next request may start, if bytes per second are limited.
    due: Mutex<Instant>,
    /// Failures since anything worked.
    failures: AtomicU32,
    fetched: AtomicU64,
    done: AtomicU64,
    wanted: AtomicU64,
}

/// Chunks of one blob, whole units, that one request fetches.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    blob: usize,
    chunks: Range<u32>,
}

impl Job {
    async fn run(self: Arc<Self>) {
        let started = Instant::now();
        let name = &self.config.name;
        let listing = self.clone();
        let Ok(listed) = self.store.runtime.spawn_blocking(move || listing.listed_chunks()).await
        else {
            return;
        };
        let lists: Vec<_> = match listed.is_empty() {
            true => Vec::new(),
            false => self.blobs.iter().map(Listed::new).collect(),
        };
        let runs = self.plan(&listed).await;
        let mut given_up = !self.fetch_all(runs, Class::Prefetch).await;
        drop(lists);
        if self.config.everything {
            for blob in 0..self.blobs.len() {
                if given_up {
                    break;
                }
                let count = self.blobs[blob].info().chunk_count;
                let runs = self.plan(&[(blob, (0..count).collect())]).await;
                given_up = !self.fetch_all(runs, Class::Fill).await;
            }
        }
        let fetched = self.fetched.load(Ordering::Relaxed);
        let wanted = self.wanted.load(Ordering::Relaxed);
        let took = started.elapsed();
        if given_up {
            log::warn!(
                "prefetch of {name}: given up after {fetched} of {wanted} bytes, {took:.1?}; \
                 reads fetch what they need"
            );
        } else {
            log::info!(
                "prefetch of {name}: done, {fetched} of {wanted} bytes fetched in {took:.1?}, the \
                 rest was here or on its way"
            );
        }
    }

    /// Chunks of the listed files by blob, in the order of the list. Reads the bootstrap.
    fn listed_chunks(&self) -> Vec<(usize, Vec<u32>)> {
        let nids: Vec<Nid> = match &self.config.paths {
            None => self.image.prefetch_nids().collect(),
            Some(paths) => {
                let mut missing = paths.iter().filter(|path| find(&self.image, path).is_none());
                if let Some(first) = missing.next() {
                    log::warn!(
                        "prefetch of {}: {} listed paths are not in the image, the first is {}",
                        self.config.name,
                        missing.count() + 1,
                        first.escape_ascii()
                    );
                }
                paths.iter().filter_map(|path| find(&self.image, path)).collect()
            }
        };
        let files = files_below(&self.image, nids);
        let mut seen: Vec<HashSet<u32>> = vec![HashSet::new(); self.blobs.len()];
        let mut chunks: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut count = 0;
        for inode in files {
            count += 1;
            for number in 0..inode.chunk_count() {
                let Ok(addr) = inode.chunk(number) else { break };
                let Some(blob) = addr.blob().map(|blob| usize::from(blob.0)) else { continue };
                let new = seen.get_mut(blob).is_some_and(|seen| seen.insert(addr.chunk_index()));
                match chunks.last_mut() {
                    _ if !new => (),
                    Some((last, list)) if *last == blob => list.push(addr.chunk_index()),
                    _ => chunks.push((blob, vec![addr.chunk_index()])),
                }
            }
        }
        if count > 0 || !self.config.everything {
            log::info!("prefetch of {}: {count} files listed", self.config.name);
        }
        chunks
    }

    /// Requests for `chunks`, in the order in which each has its first chunk. Loads what tells where
    /// chunks are; a blob for which that fails is left out.
    async fn plan(&self, chunks: &[(usize, Vec<u32>)]) -> Vec<Run> {
        let mut first = Vec::new();
        let mut positions = 0..;
        for blob in 0..self.blobs.len() {
            let mut wanted: Vec<(u32, u32)> = Vec::new(); // (chunk, position in the list)
            for (of, list) in chunks {
                for (&chunk, position) in list.iter().zip(positions.by_ref()) {
                    if *of == blob {
                        wanted.push((chunk, position));
                    }
                }
            }
            if !wanted.is_empty() && self.table(&self.blobs[blob]).await {
                self.plan_blob(blob, wanted, &mut first);
            }
            positions = 0..;
        }
        first.sort_by_key(|(position, _)| *position);
        first.into_iter().map(|(_, run)| run).collect()
    }

    /// Adds requests for `wanted` chunks of a blob, each with the position of its first one.
    fn plan_blob(&self, number: usize, mut wanted: Vec<(u32, u32)>, into: &mut Vec<(u32, Run)>) {
        let blob = &self.blobs[number];
        let Some(table) = blob.table.get() else { return };
        let near = blob.neighbourhood(table);
        wanted.sort_unstable();
        wanted.retain(|&(chunk, _)| chunk < table.infos.len());
        let mut units: Vec<Range<u32>> = Vec::new();
        for &(chunk, _) in &wanted {
            if units.last().is_none_or(|last| last.end <= chunk) {
                units.push(Places::unit(&table.infos, chunk));
            }
        }
        let size = self.config.request_bytes.min(plan::request_size(blob.link.product()));
        for joined in near.join(&units, GAP, |i| !blob.verified.get(i)) {
            let mut rest = joined;
            while !rest.is_empty() {
                let mut run = near.following(rest.start, size, false);
                if run.is_empty() {
                    run = Places::unit(&table.infos, rest.start); // larger than any request
                }
                run.end = run.end.min(rest.end);
                rest.start = run.end;
                let from = wanted.partition_point(|&(chunk, _)| chunk < run.start);
                let to = wanted.partition_point(|&(chunk, _)| chunk < run.end);
                let bytes = near.bytes(&run);
                let position = wanted[from..to].iter().map(|&(_, position)| position).min();
                if run.clone().all(|i| blob.verified.get(i)) {
                    continue;
                }
                self.wanted.fetch_add(bytes, Ordering::Relaxed);
                add(&self.store.counters.prefetch_wanted_bytes_total, bytes);
                into.push((position.unwrap_or(u32::MAX), Run { blob: number, chunks: run }));
            }
        }
    }

    /// Loads the context table of `blob`, and its digests, if need be; says in the log if that fails.
    async fn table(&self, blob: &Arc<Blob>) -> bool {
        let count = blob.info().chunk_count;
        loop {
            // Twice: only the table tells whether digests must be looked for in the blob itself.
            let mut failed = None;
            for _ in 0..2 {
                let indexes: Vec<_> = (0..count).map(ChunkIndex).collect();
                let deadline = self.store.deadline();
                let Some(slot) = blob.load_table(&indexes, deadline) else { return true };
                match within(&self.store, || deadline, slot.done()).await {
                    Some(Ok(())) => (),
                    Some(Err(failure)) => failed = Some(chain(&failure)),
                    None => failed = Some("its context table does not come".to_owned()),
                }
            }
            match failed {
                None => return true,
                Some(reason) if !self.failed(blob, &reason).await => return false,
                Some(_) => (),
            }
        }
    }

    /// Notes a failure and pauses; false if it is time to give up.
    async fn failed(&self, blob: &Blob, reason: &str) -> bool {
        add(&self.store.counters.prefetch_failures_total, 1);
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures == 1 {
            log::warn!(
                "prefetch of {}: blob {}: {reason}; trying again",
                self.config.name,
                blob.id()
            );
        }
        if failures >= MAX_FAILURES {
            return false;
        }
        self.pause(failures).await;
        true
    }

    async fn pause(&self, failures: u32) {
        let pause = FIRST_PAUSE * 2u32.saturating_pow(failures.saturating_sub(1).min(8));
        tokio::time::sleep(pause.min(MAX_PAUSE)).await;
    }

    /// Sends the requests; false if it was given up.
    async fn fetch_all(self: &Arc<Self>, runs: Vec<Run>, class: Class) -> bool {
        let mut left = runs;
        while !left.is_empty() && self.failures.load(Ordering::Relaxed) < MAX_FAILURES {
            let mut again = Vec::new();
            let mut tasks: JoinSet<Option<Run>> = JoinSet::new();
            let mut said = Instant::now();
            for run in left {
                let failures = self.failures.load(Ordering::Relaxed);
                if failures >= MAX_FAILURES {
                    again.push(run);
                    continue;
                }
                if failures > 0 {
                    self.pause(failures).await;
                }
                self.fetch(run, class, &mut tasks).await;
                while let Some(done) = tasks.try_join_next() {
                    again.extend(done.ok().flatten());
                }
                if said.elapsed() >= PROGRESS {
                    said = Instant::now();
                    self.say_progress();
                }
            }
            while let Some(done) = tasks.join_next().await {
                again.extend(done.ok().flatten());
            }
            left = again;
        }
        left.is_empty()
    }

    /// Waits until the request may start, and starts it. The task gives it back if it failed.
    async fn fetch(self: &Arc<Self>, run: Run, class: Class, tasks: &mut JoinSet<Option<Run>>) {
        let blob = self.blobs[run.blob].clone();
        let bytes =
            blob.table.get().map_or(0, |table| blob.neighbourhood(table).bytes(&run.chunks));
        let least = self.config.request_bytes / LEAST_PART;
        let lane = self.lanes.pass(class, bytes.max(least)).await;
        self.wait_for_rate(bytes).await;
        let admitted = blob.admit(class, &run.chunks).await;
        let job = self.clone();
        // On its own: if the prefetch ends, a reader may have joined the request.
        let early =
            self.store.runtime.spawn(blob.clone().fetch_early(run.chunks.clone(), admitted));
        tasks.spawn(async move {
            let Early { bytes: fetched, failure } = early.await.unwrap_or_default();
            drop(lane);
            job.not_used(bytes.saturating_sub(fetched));
            job.fetched.fetch_add(fetched, Ordering::Relaxed);
            if let Some(failure) = failure {
                add(&job.store.counters.prefetch_failures_total, 1);
                if job.failures.fetch_add(1, Ordering::Relaxed) == 0 {
                    log::warn!(
                        "prefetch of {}: blob {}: {}; trying again later",
                        job.config.name,
                        blob.id(),
                        chain(&failure)
                    );
                }
                return Some(run);
            }
            // What was here already says nothing about the source.
            if fetched > 0 {
                job.failures.store(0, Ordering::Relaxed);
            }
            job.done.fetch_add(bytes, Ordering::Relaxed);
            add(&job.store.counters.prefetch_done_bytes_total, bytes);
            None
        });
    }

    fn time_for(&self, bytes: u64) -> Duration {
        match self.config.bytes_per_second {
            Some(rate) => Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64),
            None => Duration::ZERO,
        }
    }

    /// Waits until `bytes` more are within the limit, and counts them.
    async fn wait_for_rate(&self, bytes: u64) {
        let now = Instant::now();
        let start = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*due).max(now);
            *due = start + self.time_for(bytes);
            start
        };
        if start > now {
            tokio::time::sleep(start - now).await;
        }
    }

    /// So many of the bytes that were counted have not been fetched.
    fn not_used(&self, bytes: u64) {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        *due = due.checked_sub(self.time_for(bytes)).unwrap_or(*due);
    }

    fn say_progress(&self) {
        let (done, wanted) =
            (self.done.load(Ordering::Relaxed), self.wanted.load(Ordering::Relaxed));
        log::info!("prefetch of {}: {done} of {wanted} bytes", self.config.name);
    }
}

/// The inode at an absolute path. Symbolic links are followed, inside the image.
fn find(image: &Bootstrap, path: &[u8]) -> Option<Nid> {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> {
        let parts = path.split(|&byte| byte == b'/');
        parts.filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).rev().collect()
    };
    let mut above = vec![image.root()];
    let mut left = parts(path); // the next one is last
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == b".." {
            above.truncate(above.len().saturating_sub(1).max(1));
            continue;
        }
        let dir = image.inode(*above.last()?).ok()?.dir().ok()?;
        let entry = dir.lookup(&name).ok()??;
        let inode = dir.inode_of(&entry).ok()?;
        if inode.kind() != FileKind::Symlink {
            above.push(entry.nid);
            continue;
        }
        links += 1;
        let target = inode.symlink_target().ok()?;
        if links > MAX_LINKS {
            return None;
        }
        if target.starts_with(b"/") {
            above.truncate(1);
        }
        left.extend(parts(target));
    }
    above.last().copied()
}

/// The regular files among and below `nids`, each once, in their order. Bounded by what the image
/// holds, however damaged.
fn files_below(image: &Bootstrap, nids: Vec<Nid>) -> impl Iterator<Item = Inode<'_>> {
    let mut seen = HashSet::new();
    let mut left: Vec<Nid> = nids.into_iter().rev().collect();
    std::iter::from_fn(move || {
        while let Some(nid) = left.pop() {
            let Some(inode) = seen.insert(nid).then(|| image.inode(nid).ok()).flatten() else {
                continue;
            };
            match inode.kind() {
                FileKind::Regular => return Some(inode),
                FileKind::Directory => {
                    let entries = inode.dir().and_then(|dir| dir.entries_from(0));
                    let names = entries.into_iter().flatten().flatten();
                    let from = left.len();
                    left.extend(names.filter(|e| !matches!(e.name, b"." | b"..")).map(|e| e.nid));
                    left[from..].reverse();
                }
                _ => (),
            }
        }
        None
    })
}
