//! Metrics in nydusd's JSON. Clients index its arrays and members without looking, so their lengths
//! and names are the contract.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::Response;
use serde_json::{Value, json};

use super::query::Query;
use super::{Answer, ApiError, bad_request, json as answer, no_body, no_content};
use crate::backend::Backend;
use crate::blob::{Class, Counters};
use crate::daemon::image::ImageParts;
use crate::daemon::metrics;
use crate::daemon::mounted::Entry;
use crate::daemon::state::Status;
use crate::fuse::abi::opcode;
use crate::fuse::{FileNumbers, FileStats, FileStatsOptions, MountPath, OPCODES, OPERATIONS};

const READ: usize = opcode::READ as usize;

/// `GET /metrics`
pub(super) fn prometheus(status: &Status, body: &Bytes) -> Answer {
    no_body(body)?;
    let mut response = Response::new(Body::from(metrics::render(status)));
    let kind = HeaderValue::from_static(metrics::CONTENT_TYPE);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

/// What was asked of one mount.
pub(super) fn fs(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let (at, _) = mount(status, query)?;
    let totals = status.mounted().table().totals_at(&at).ok_or_else(|| unknown(&at.to_string()))?;
    let by_operation = |numbers: &[u64; OPCODES]| {
        OPERATIONS.map(|opcodes| -> u64 {
            let index = |&op: &u32| usize::try_from(op).ok();
            opcodes.iter().filter_map(index).filter_map(|op| numbers.get(op)).sum()
        })
    };
    let hits = by_operation(&totals.requests);
    let [_, _, opens, releases, ..] = hits;
    let FileStatsOptions { numbers, pattern, latest } = recorded(status, &at).1;
    Ok(answer(
        StatusCode::OK,
        &json!({
            "files_account_enabled": numbers,
            "access_pattern_enabled": pattern,
            "measure_latency": true,
            "record_latest_read_files_enabled": latest,
            "id": at.to_string(),
            "data_read": totals.read_bytes,
            "block_count_read": totals.read_sizes,
            "fop_hits": hits,
            "fop_errors": by_operation(&totals.errors),
            "fop_cumulative_latency_total": by_operation(&totals.time_us),
            "read_latency_dist": totals.read_times,
            "nr_opens": opens.saturating_sub(releases),
        }),
    ))
}

/// What was done with each file, by inode; with `latest=true` the inodes that were read since this was
/// last asked. Empty where the image's config does not ask for it.
pub(super) fn files(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let (at, _) = mount(status, query)?;
    let (stats, _) = recorded(status, &at);
    match query.get("latest")?.as_deref() {
        Some("true") => {
            let inodes = stats.map(|stats| stats.take_latest()).unwrap_or_default();
            Ok(answer(StatusCode::OK, &inodes))
        }
        None | Some("false" | "") => {
            let files = stats.map(|stats| stats.numbers()).unwrap_or_default();
            let files = files.iter().map(|(node, numbers)| (node.to_string(), file(numbers)));
            Ok(answer(StatusCode::OK, &files.collect::<serde_json::Map<_, _>>()))
        }
        Some(_) => Err(bad_request("QueryString: `latest` is true or false".into())),
    }
}

fn file(numbers: &FileNumbers) -> Value {
    json!({
        "total_fops": numbers.requests.iter().sum::<u64>(),
        "data_read": numbers.read_bytes,
        "block_count_read": numbers.read_sizes,
        "fop_hits": numbers.requests,
        "fop_errors": numbers.errors,
    })
}

/// Which files were read, in the order in which they first were. Empty where the image's config does
/// not ask for it.
pub(super) fn pattern(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let (at, _) = mount(status, query)?;
    let accesses = recorded(status, &at).0.map(|stats| stats.pattern()).unwrap_or_default();
    let list: Vec<Value> = accesses
        .iter()
        .map(|access| {
            let first = access.first.duration_since(UNIX_EPOCH).unwrap_or_default();
            json!({
                "ino": access.node,
                "nr_read": access.reads,
                "first_access_time_secs": first.as_secs(),
                "first_access_time_nanos": first.subsec_nanos(),
            })
        })
        .collect();
    Ok(answer(StatusCode::OK, &list))
}

/// What is recorded of each file of a mount.
fn recorded(status: &Status, at: &MountPath) -> (Option<Arc<FileStats>>, FileStatsOptions) {
    let stats = status.mounted().table().file_stats_at(at);
    let options = stats.as_ref().map(|stats| stats.options()).unwrap_or_default();
    (stats, options)
}

/// What was read from the backend of a config.
pub(super) fn backend(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let (_, images) = config(status, query)?;
    let (mut errors, mut bytes, mut time_ms) = (0, 0, [0u64; 8]);
    let mut reads = [[0u64; 8]; 8];
    for image in &images {
        let totals = image.backend.totals();
        errors += totals.errors;
        bytes += totals.bytes;
        for (sum, more) in time_ms.iter_mut().zip(totals.time_ms) {
            *sum += more;
        }
        for (sum, more) in reads.iter_mut().flatten().zip(totals.reads.iter().flatten()) {
            *sum += more;
        }
    }
    let by_size: [u64; 8] = std::array::from_fn(|size| reads.iter().map(|row| row[size]).sum());
    let kind = images.first().map_or("", |image| image.backend.name());
    let kind = kind.split_whitespace().next().unwrap_or_default();
    Ok(answer(
        StatusCode::OK,
        &json!({
            "id": images.first().map_or("", |image| &image.config_id),
            // nydusd's own metrics call S3 so.
            "backend_type": if kind == "s3" { "oss" } else { kind },
            "read_count": by_size.iter().sum::<u64>(),
            "read_errors": errors,
            "read_amount_total": bytes,
            "read_cumulative_latency_millis_total": time_ms.iter().sum::<u64>(),
            "read_cumulative_latency_millis_dist": time_ms,
            "read_count_block_size_dist": by_size,
            "read_latency_sizes_dist": reads,
        }),
    ))
}

/// What is in the cache of a config.
pub(super) fn blobcache(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let (mounts, images) = config(status, query)?;
    let (mut total, mut waited) = (0, 0);
    for at in &mounts {
        let Some(totals) = status.mounted().table().totals_at(at) else { continue };
        total += totals.requests[READ];
        waited += totals.waited_reads;
    }
    // An image may be mounted more than once.
    let mut blobs = BTreeMap::new();
    for blob in images.iter().flat_map(|image| &image.blobs) {
        let (ready, chunks) = blob.ready_chunks();
        let known = blobs.entry(format!("{}.blob.data", blob.id())).or_insert((0, chunks));
        known.0 = known.0.max(ready);
    }
    let ready: u64 = blobs.values().map(|&(ready, _)| u64::from(ready)).sum();
    let all_ready = blobs.values().all(|(ready, chunks)| ready == chunks);
    let first = images.first();
    let prefetched = |number: fn(&Counters, Class) -> u64| -> u64 {
        let counters = first.map(|image| image.store.counters());
        let classes = [Class::Prefetch, Class::Fill];
        counters.map_or(0, |counters| classes.iter().map(|&class| number(counters, class)).sum())
    };
    Ok(answer(
        StatusCode::OK,
        &json!({
            "id": first.map_or("", |image| &image.config_id),
            "underlying_files": blobs.keys().collect::<Vec<_>>(),
            "store_path": first.map(|image| image.work_dir.display().to_string()),
            "partial_hits": 0,
            "whole_hits": total.saturating_sub(waited),
            "total": total,
            "entries_count": ready,
            "prefetch_data_amount": prefetched(Counters::fetched_bytes_by),
            "prefetch_requests_count": prefetched(Counters::fetch_requests_by),
            "prefetch_workers": 0,
            "prefetch_unmerged_chunks": 0,
            "prefetch_cumulative_time_millis": 0,
            "prefetch_begin_time_secs": 0,
            "prefetch_begin_time_millis": 0,
            "prefetch_end_time_secs": 0,
            "prefetch_end_time_millis": 0,
            "buffered_backend_size": 0,
            "data_all_ready": all_ready,
        }),
    ))
}

/// Requests that wait for something.
pub(super) fn inflight(status: &Status, body: &Bytes) -> Answer {
    no_body(body)?;
    let parked = status.device().map_or_else(Vec::new, |counters| counters.parked.list());
    if parked.is_empty() {
        return Ok(no_content());
    }
    let list: Vec<Value> = parked
        .iter()
        .map(|request| {
            json!({
                "inode": request.nodeid,
                "opcode": request.opcode,
                "unique": request.unique,
                "timestamp_secs":
                    request.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            })
        })
        .collect();
    Ok(answer(StatusCode::OK, &list))
}

/// The mount that `id` names, or the only image.
fn mount(status: &Status, query: &Query<'_>) -> Result<(MountPath, Entry), ApiError> {
    let mut entries = status.mounted().entries();
    let id = query.get("id")?;
    match &id {
        Some(id) => {
            let at = MountPath::parse(id).map_err(|_| unknown(id))?;
            entries.retain(|(path, _)| *path == at);
        }
        None => entries.retain(|(_, entry)| entry.image.is_some()),
    }
    match (entries.pop(), entries.is_empty()) {
        (Some(found), true) => Ok(found),
        _ => Err(unknown(id.as_deref().unwrap_or("which is missing"))),
    }
}

/// Mounts and images with the config that `id` names, or the only one. If no config has it, it may be a mountpoint:
/// nydus-snapshotter calls an image that has a daemon to itself `/`, and gives another id to its config.
pub(super) fn config(
    status: &Status,
    query: &Query<'_>,
) -> Result<(Vec<MountPath>, Vec<Arc<ImageParts>>), ApiError> {
    let id = query.get("id")?;
    let images = status.mounted().entries().into_iter();
    let mut images: Vec<_> = images.filter_map(|(at, entry)| Some((at, entry.image?))).collect();
    if let Some(id) = &id {
        if images.iter().any(|(_, image)| image.config_id == *id) {
            images.retain(|(_, image)| image.config_id == *id);
        } else {
            let named = MountPath::parse(id).ok();
            images.retain(|(at, _)| Some(at) == named.as_ref());
        }
    }
    let (mounts, images): (Vec<_>, Vec<_>) = images.into_iter().unzip();
    let one = match images.split_first() {
        Some((first, rest)) => rest.iter().all(|image| image.config_id == first.config_id),
        None => false,
    };
    if !one {
        return Err(unknown(id.as_deref().unwrap_or("which is missing")));
    }
    Ok((mounts, images))
}

fn unknown(id: &str) -> ApiError {
    ApiError(StatusCode::NOT_FOUND, format!("no single instance with the id {id:?}"))
}
