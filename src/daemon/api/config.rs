//! Changing the config of what is mounted: rotated credentials, another proxy.

use std::collections::BTreeMap;

use axum::body::Bytes;
use axum::http::StatusCode;

use super::metrics::config;
use super::query::Query;
use super::{Answer, failed, json, no_body, no_content, parse_body};
use crate::backend::Backend;
use crate::daemon::state::Status;

/// The values in effect; secrets are not among them.
pub(super) fn get(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let (_, images) = config(status, query)?;
    let settings = images.first().map(|image| image.backend.settings()).unwrap_or_default();
    Ok(json(StatusCode::OK, &settings))
}

/// Changes values for every image with this config.
pub(super) fn put(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    let (mounts, images) = config(status, query)?;
    let values: BTreeMap<String, String> = parse_body(body)?;
    for image in &images {
        image.backend.change(&values).map_err(|e| failed(format!("config: {e}")))?;
    }
    let keys: Vec<&str> = values.keys().map(String::as_str).collect();
    for at in mounts {
        log::info!("{at}: config changed: {}", keys.join(", "));
    }
    Ok(no_content())
}
