//! What the rooms have counted, as Prometheus reads it: `GET /metrics`.
//!
//! Counters sit in the rooms that count; here they are only given names. All counters grow as long as
//! the daemon runs, also over the end of what was mounted. Times of requests come from samples, so
//! the sum of a histogram may differ a little from the number of requests.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::mounted::SourceTotals;
use super::state::Status;
use super::version::VERSION;
use crate::backend::BackendCause;
use crate::blob::Class;
use crate::{blob, device, fuse};

/// `Content-Type` of [`render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Name without prefix, unit and `_total`; help; unit; what it is.
type Row<T> = (&'static str, &'static str, Option<Unit>, fn(&T) -> &AtomicU64);

/// What the caches count.
fn cache_rows() -> [Row<blob::Counters>; 17] {
    [
        ("cache_hits", "Chunks found in the cache and verified on first use", None, |c| {
            &c.cache_hits_total
        }),
        ("cache_misses", "Chunks downloaded because the cache did not have them", None, |c| {
            &c.cache_misses_total
        }),
        ("backend_requests", "Reads sent to backends, repeated ones included", None, |c| {
            &c.fetch_requests_total
        }),
        ("chunks_verified", "Chunks whose digest matched", None, |c| &c.chunks_verified_total),
        ("joined_fetches", "Chunks that joined a download under way", None, |c| {
            &c.joined_fetches_total
        }),
        ("claim_waits", "Waits for another process to finish a download", None, |c| {
            &c.claim_waits_total
        }),
        ("digest_mismatches", "Chunks from a backend that were not right", None, |c| {
            &c.digest_mismatches_total
        }),
        ("cache_damages", "Chunks in the cache that were not right", None, |c| {
            &c.cache_damage_total
        }),
        ("cache_write_errors", "Writes to the cache that failed", None, |c| {
            &c.cache_write_errors_total
        }),
        ("uncached_chunks", "Chunks served without caching", None, |c| &c.uncached_chunks_total),
        ("disk_waits", "Reads that waited for the disk of the cache", None, |c| {
            &c.disk_waits_total
        }),
        ("chunk_timeouts", "Waits for chunks that ended at their deadline", None, |c| {
            &c.timeouts_total
        }),
        ("read_ahead", "Bytes of chunks that were read ahead", Some(Unit::Bytes), |c| {
            &c.read_ahead_chunk_bytes_total
        }),
        ("read_ahead_used", "Those of them that somebody has read since", Some(Unit::Bytes), |c| {
            &c.read_ahead_used_bytes_total
        }),
        ("prefetch_wanted", "Bytes that prefetch was asked for", Some(Unit::Bytes), |c| {
            &c.prefetch_wanted_bytes_total
        }),
        ("prefetch_done", "Those of them that it is done with", Some(Unit::Bytes), |c| {
            &c.prefetch_done_bytes_total
        }),
        ("prefetch_failures", "Requests of a prefetch that failed", None, |c| {
            &c.prefetch_failures_total
        }),
    ]
}

/// What the device counts.
fn device_rows() -> [Row<device::Counters>; 8] {
    [
        ("vmm_connections", "VMMs that connected", None, |c| &c.connections_total),
        ("requests", "Requests taken out of a ring, well-formed or not", None, |c| {
            &c.requests_total
        }),
        ("guest_calls", "Times a guest was told of answers", None, |c| &c.calls_total),
        (
            "poll_hits",
            "Times a queue looked for a request instead of sleeping, and it came",
            None,
            |c| &c.poll_hits_total,
        ),
        ("poll_misses", "Times it did not come", None, |c| &c.poll_misses_total),
        ("held_requests", "Requests that had to wait", None, |c| &c.held_total),
        ("lost_requests", "Requests whose wait broke off without a result", None, |c| {
            &c.held_lost_total
        }),
        ("panics", "Requests whose handler panicked", None, |c| &c.panics_total),
    ]
}

/// What is done with DAX windows.
fn dax_rows() -> [Row<fuse::DaxCounters>; 4] {
    [
        ("dax_filled_ranges", "Ranges of DAX windows that were filled", None, |c| &c.ranges_total),
        ("dax_failed_ranges", "Ranges of DAX windows that could not be filled", None, |c| {
            &c.failed_total
        }),
        ("dax_maps", "Mappings of cache files in DAX windows", None, |c| &c.maps_total),
        ("dax_copied", "Bytes copied for one guest's DAX window", Some(Unit::Bytes), |c| {
            &c.copied_bytes_total
        }),
    ]
}

/// What guests and VMMs do wrong, by kind.
fn ring_errors(c: &device::Counters) -> [(&'static str, &AtomicU64); 6] {
    [
        ("chain", &c.bad_chains_total),
        ("request", &c.bad_requests_total),
        ("head", &c.bad_heads_total),
        ("index", &c.bad_indexes_total),
        ("ring", &c.bad_rings_total),
        ("message", &c.bad_messages_total),
    ]
}

/// What caches have counted, some of which may be no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheTotals {
    fetched_bytes: u64,
    /// In the order of [`cache_rows`].
    numbers: [u64; 16],
    /// In the order of [`Class::ALL`].
    class_bytes: [u64; Class::ALL.len()],
    class_requests: [u64; Class::ALL.len()],
    /// In the order of [`BackendCause::ALL`].
    errors: [u64; BackendCause::ALL.len()],
}

impl CacheTotals {
    /// Adds what a cache has counted.
    pub fn add(&mut self, counters: &blob::Counters) {
        self.fetched_bytes += counters.fetched_bytes_total.load(Ordering::Relaxed);
        for (sum, (.., number)) in self.numbers.iter_mut().zip(cache_rows()) {
            *sum += number(counters).load(Ordering::Relaxed);
        }
        for class in Class::ALL {
            self.class_bytes[class as usize] += counters.fetched_bytes_by(class);
            self.class_requests[class as usize] += counters.fetch_requests_by(class);
        }
        for (sum, cause) in self.errors.iter_mut().zip(BackendCause::ALL) {
            *sum += counters.backend_errors_total(cause);
        }
    }

    /// Bytes that came from backends.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes
    }
}

/// Everything at one moment.
#[derive(Debug)]
struct Snapshot {
    mounts: u64,
    requests: fuse::OpTotals,
    times: Vec<fuse::Times>,
    cache: CacheTotals,
    sources: BTreeMap<String, SourceTotals>,
    device: Vec<(&'static str, &'static str, u64)>,
    dax: [u64; 4],
    dax_ranges: u64,
    ring_errors: Vec<(&'static str, u64)>,
    parked: u64,
}

impl Snapshot {
    fn take(status: &Status) -> Snapshot {
        let (mounted, device) = (status.mounted(), status.device());
        let value = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Snapshot {
            mounts: mounted.table().paths().len() as u64,
            requests: mounted.table().totals(),
            times: mounted.table().request_times(),
            cache: mounted.images().cache_totals(),
            sources: mounted.sources(),
            device: device.map_or_else(Vec::new, |counters| {
                let rows = device_rows().map(|(name, help, _, number)| (name, help, number));
                rows.map(|(name, help, number)| (name, help, value(number(counters)))).to_vec()
            }),
            dax: dax_rows().map(|(.., number)| value(number(mounted.table().dax_counters()))),
            dax_ranges: value(&mounted.table().dax_counters().ranges),
            ring_errors: device.map_or_else(Vec::new, |counters| {
                ring_errors(counters).map(|(kind, number)| (kind, value(number))).to_vec()
            }),
            parked: device.map_or(0, |counters| counters.parked.count() as u64),
        }
    }
}

/// The text of `GET /metrics`.
pub fn render(status: &Status) -> String {
    let mut registry = Registry::with_prefix("rafsd");
    registry.register_collector(Box::new(Snapshot::take(status)));
    let mut text = String::new();
    text::encode(&mut text, &registry).expect("a string takes everything");
    text
}

/// One number.
fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<Unit>),
    value: u64,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
    metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

/// A number for each value of a label.
fn counters<'v>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<Unit>),
    label: &'static str,
    values: impl IntoIterator<Item = (&'v str, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
    for (of, value) in values {
        let labels = [(label, of)];
        family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    value: u64,
) -> fmt::Result {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let e = &mut encoder;
        let labels = [("version", VERSION.package_ver), ("commit", VERSION.git_commit)];
        let mut info = e.encode_descriptor("build", "This binary", None, MetricType::Info)?;
        info.encode_info(&labels)?;
        gauge(e, ("mounts", "File systems that are mounted"), self.mounts)?;
        gauge(e, ("parked_requests", "Requests that wait now"), self.parked)?;

        let totals = &self.requests;
        let by_opcode = |numbers: &[u64; fuse::OPCODES]| {
            // Several opcodes are called `other`.
            let mut sums = BTreeMap::<&'static str, u64>::new();
            for (opcode, &number) in numbers.iter().enumerate().filter(|(_, n)| **n > 0) {
                *sums.entry(fuse::opcode_name(opcode)).or_default() += number;
            }
            sums
        };
        let row = ("fuse_requests", "Requests of guests", None);
        counters(e, row, "opcode", by_opcode(&totals.requests))?;
        let row = ("fuse_errors", "Requests answered with an error", None);
        counters(e, row, "opcode", by_opcode(&totals.errors))?;
        let row = ("fuse_read", "Bytes that guests have read", Some(Unit::Bytes));
        counter(e, row, totals.read_bytes)?;
        let row = ("fuse_waited_reads", "Reads that had to wait", None);
        counter(e, row, totals.waited_reads)?;
        self.encode_times(e)?;

        for (name, help, value) in &self.device {
            counter(e, (name, help, None), *value)?;
        }
        for ((name, help, unit, _), value) in dax_rows().into_iter().zip(self.dax) {
            counter(e, (name, help, unit), value)?;
        }
        gauge(e, ("dax_ranges", "Ranges of DAX windows that are in use"), self.dax_ranges)?;
        let row = ("ring_errors", "What guests and VMMs did wrong", None);
        counters(e, row, "kind", self.ring_errors.iter().copied())?;

        let row = ("fetched", "Bytes of chunks and tables from backends", Some(Unit::Bytes));
        counter(e, row, self.cache.fetched_bytes)?;
        for ((name, help, unit, _), value) in cache_rows().into_iter().zip(self.cache.numbers) {
            counter(e, (name, help, unit), value)?;
        }
        let classes = || Class::ALL.iter().map(|class| class.label());
        let row = ("class_fetched", "Fetched bytes by what they are for", Some(Unit::Bytes));
        counters(e, row, "class", classes().zip(self.cache.class_bytes))?;
        let row = ("class_requests", "Reads sent to backends by what they are for", None);
        counters(e, row, "class", classes().zip(self.cache.class_requests))?;
        let causes = BackendCause::ALL.iter().map(|cause| cause.label());
        let row = ("backend_errors", "Failed reads of backends, repeated ones included", None);
        counters(e, row, "cause", causes.zip(self.cache.errors))?;
        let of = |number: fn(&SourceTotals) -> u64| {
            self.sources.iter().map(move |(name, totals)| (name.as_str(), number(totals)))
        };
        let row = ("source_read", "Bytes that came from each source", Some(Unit::Bytes));
        counters(e, row, "source", of(|totals| totals.bytes))?;
        let row = ("source_requests", "Requests to each source", None);
        counters(e, row, "source", of(|totals| totals.requests))?;
        let help = "Requests to each source that failed";
        let mut family = e.encode_descriptor("source_errors", help, None, MetricType::Counter)?;
        for (name, totals) in &self.sources {
            for (cause, errors) in BackendCause::ALL.iter().zip(totals.errors) {
                if errors > 0 {
                    let labels = [("source", name.as_str()), ("cause", cause.label())];
                    let mut metric = family.encode_family(&labels)?;
                    metric.encode_counter::<NoLabelSet, _, u64>(&errors, None)?;
                }
            }
        }
        Ok(())
    }
}

impl Snapshot {
    fn encode_times(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Time from a request's arrival to its answer, estimated from samples";
        let unit = Unit::Seconds;
        let mut family = encoder.encode_descriptor(
            "fuse_request_duration",
            help,
            Some(&unit),
            MetricType::Histogram,
        )?;
        for times in &self.times {
            let labels = [("opcode", fuse::opcode_name(times.opcode))];
            let bounds = fuse::TIMES.iter().map(|&us| us as f64 / 1e6).chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(times.counts).collect();
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                times.sum.as_secs_f64(),
                times.counts.iter().sum(),
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}
