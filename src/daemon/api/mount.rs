//! Mounting, unmounting, and mounting anew.
//!
//! Opening an image may hang with the file system that it is on. So it happens on a thread of its
//! own, a bounded number of them; a client is told after [`PATIENCE`], and what is opened later than
//! that is not mounted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::StatusCode;
use serde::Deserialize;
use tokio::sync::{Semaphore, oneshot};

use super::query::Query;
use super::{Answer, Api, ApiError, failed, no_body, no_content, not_ready, parse_body};
use crate::daemon::chain;
use crate::daemon::config::Config;
use crate::daemon::mounted::{ChangeError, Prepared, What};
use crate::daemon::state::{State, Status};

/// How long a client waits at most; Kata's clients wait for 30 s.
const PATIENCE: Duration = Duration::from_secs(25);
/// How long a request waits for the start to be over: nydus-snapshotter sends mounts to a daemon that it has started
/// again as soon as the socket is there, and each but once.
const START: Duration = Duration::from_secs(10);
/// Images being opened at once.
const OPENING: usize = 64;

/// Threads that open images.
pub(super) struct Opening(Arc<Semaphore>);

impl Default for Opening {
    fn default() -> Self {
        Opening(Arc::new(Semaphore::new(OPENING)))
    }
}

/// Body of a mount request.
#[derive(Deserialize)]
struct MountCommand {
    /// A bootstrap, or a directory of the host.
    source: String,
    #[serde(default)]
    fs_type: String,
    /// A config document, as a string.
    config: String,
    prefetch_files: Option<Vec<String>>,
}

pub(super) async fn mount(api: &Arc<Api>, query: &Query<'_>, body: &Bytes) -> Answer {
    let (at, what) = command(&api.status, query, body).await?;
    if api.status.mounted().is_restored(&at, &what) {
        return Ok(no_content());
    }
    api.status.mounted().check_free(&at).map_err(refused)?;
    let prepared = open(api, at, what).await?;
    api.status.mounted().mount(prepared).map_err(refused)?;
    Ok(no_content())
}

pub(super) async fn remount(api: &Arc<Api>, query: &Query<'_>, body: &Bytes) -> Answer {
    let (at, what) = command(&api.status, query, body).await?;
    api.status.mounted().check_mounted(&at).map_err(refused)?;
    let prepared = open(api, at, what).await?;
    api.status.mounted().remount(prepared).map_err(refused)?;
    Ok(no_content())
}

pub(super) async fn unmount(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let at = query.required("mountpoint")?;
    ready(status).await?;
    status.mounted().unmount(&at).map_err(refused)?;
    Ok(no_content())
}

/// Where, and what.
async fn command(
    status: &Status,
    query: &Query<'_>,
    body: &Bytes,
) -> Result<(String, What), ApiError> {
    let at = query.required("mountpoint")?;
    let command: MountCommand = parse_body(body)?;
    ready(status).await?;
    let what = match command.fs_type.as_str() {
        "rafs" => What::Image {
            bootstrap: PathBuf::from(command.source),
            config: Box::new(Config::parse(&command.config).map_err(|e| failed(chain(&e)))?),
            prefetch_files: command.prefetch_files.unwrap_or_default(),
        },
        // A config and files to prefetch mean nothing here; clients send empty ones.
        "passthrough_fs" | "passthrough" | "passthroughfs" => {
            What::Directory(PathBuf::from(command.source))
        }
        "" => return Err(failed("InvalidFsType: `fs_type` is missing".into())),
        _ => return Err(failed("InvalidFsType: use `rafs` or `passthrough_fs`".into())),
    };
    Ok((at, what))
}

/// Before that, the image of the command line is not there.
async fn ready(status: &Status) -> Result<(), ApiError> {
    match tokio::time::timeout(START, status.started()).await {
        Ok(State::Running) => Ok(()),
        _ => Err(not_ready()),
    }
}

async fn open(api: &Arc<Api>, at: String, what: What) -> Result<Prepared, ApiError> {
    let Ok(permit) = Arc::clone(&api.opening.0).try_acquire_owned() else {
        let message = format!("{OPENING} mounts are under way and do not end");
        return Err(ApiError(StatusCode::SERVICE_UNAVAILABLE, message));
    };
    let (done, opened) = oneshot::channel();
    let status = Arc::clone(&api.status);
    let work = move || {
        let prepared = status.mounted().prepare(&at, what);
        drop(permit);
        // Nobody may be waiting any more: then what was opened is closed.
        let _ = done.send(prepared);
    };
    std::thread::Builder::new()
        .name("mount".into())
        .spawn(work)
        .map_err(|e| failed(format!("no thread to open the image: {e}")))?;
    match tokio::time::timeout(PATIENCE, opened).await {
        Ok(Ok(prepared)) => prepared.map_err(refused),
        Ok(Err(_)) => Err(failed("opening the image failed, see the log".into())),
        Err(_) => Err(failed(format!("opening the image takes longer than {PATIENCE:?}"))),
    }
}

fn refused(error: ChangeError) -> ApiError {
    failed(chain(&error))
}
