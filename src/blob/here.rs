//! Reading from a source of this host on the thread that looked for the chunks.
//!
//! Where nothing is waited for, what a small chunk costs is how often it changes threads. So one thread
//! reads the stored bytes, decompresses, verifies, writes and marks them. Whatever is in the way of that (too
//! much memory in use, a read that fails, a source that is slow) goes the way of all others.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;

use super::counters::add;
use super::download::{self, say_bad};
use super::fetch::runs;
use super::gate::Class;
use super::plan;
use super::store::Blob;
use super::transfer::cost;
use super::unit::Unit;

/// Most uncompressed bytes of several units that one thread takes; more are spread over several threads.
const MOST: u64 = 512 << 10;

/// Reads and handles `units` if their source is on this host. Gives back those that are to be downloaded. Blocks.
pub fn read(blob: &Arc<Blob>, units: Vec<Unit>) -> Vec<Unit> {
    let bytes: u64 = units.iter().map(|unit| unit.uncompressed).sum();
    if units.is_empty() || (units.len() > 1 && bytes > MOST) || !blob.link.is_here() {
        return units;
    }
    let costs = units.iter().map(cost).sum();
    let Some(mut budget) = blob.store.budget.pass(Class::Demand, costs).now_or_never() else {
        return units;
    };
    let _demand = blob.link.demand();
    let mut left = Vec::new();
    let mut units = units;
    units.sort_by_key(|unit| unit.stored.start);
    for units in runs(units, |units| {
        let pieces: Vec<_> = units.iter().map(Unit::piece).collect();
        plan::requests(&pieces, plan::request_size(0))
    }) {
        let (Some(first), Some(last)) = (units.first(), units.last()) else { continue };
        let range = first.stored.start..last.stored.end;
        let start = Instant::now();
        let Some(bytes) = blob.backend.read_here(&blob.info.id, range.clone()) else {
            left.extend(units);
            continue;
        };
        blob.link.answered_here(start.elapsed());
        blob.backend_works();
        blob.store.counters.count_request(Class::Demand);
        blob.store.counters.count_bytes(Class::Demand, bytes.len() as u64);
        for unit in units {
            add(&blob.store.counters.cache_misses_total, unit.chunks.len() as u64);
            let at = |byte: u64| usize::try_from(byte - range.start).expect("a read of megabytes");
            let stored = bytes.slice(at(unit.stored.start)..at(unit.stored.end));
            let share = budget.split(cost(&unit));
            match blob.store.workers.pass(Class::Demand, 1).now_or_never() {
                Some(_worker) => {
                    if let Some(unit) = accept(unit, &stored) {
                        download::start(blob, vec![unit]);
                    }
                }
                None => {
                    let later = blob.clone();
                    blob.store.runtime.spawn(async move {
                        let job = later.on_worker(move || accept(unit, &stored));
                        if let Ok(Some(unit)) = job.await {
                            download::start(&later, vec![unit]);
                        }
                        drop(share);
                    });
                }
            }
        }
    }
    left
}

/// Gives the unit back, to be fetched again, if the bytes are not right.
fn accept(mut unit: Unit, stored: &Bytes) -> Option<Unit> {
    let reason = unit.accept(stored).err()?;
    say_bad(&unit, &reason, "fetching them again");
    unit.bad = Some(reason);
    Some(unit)
}
