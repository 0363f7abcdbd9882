//! Handing a session to a manager, taking it from there, and going on with it.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::StatusCode;
use serde_json::json;

use super::{Answer, ApiError, bad_request, failed, no_body, no_content, not_ready, unsupported};
use crate::daemon::host::{HandoverError, Host};
use crate::daemon::state::{State, Status};
use crate::daemon::{chain, supervisor};

/// How long any of it may take. Managers wait for 30 s.
const PATIENCE: Duration = Duration::from_secs(25);

/// Starts what was taken over. A daemon that was told all on its command line starts by itself, and
/// runs already.
pub(super) async fn start(status: &Arc<Status>, body: &Bytes) -> Answer {
    no_body(body)?;
    match (status.state(), status.host()) {
        (State::Running, _) => Err(bad_request("UnexpectedEvent: the daemon runs already".into())),
        (State::Ready, Some(host)) => {
            let host = Arc::clone(host);
            off_thread(move || {
                host.start()?;
                host.recover();
                Ok(())
            })
            .await
        }
        _ => Err(not_ready()),
    }
}

pub(super) async fn take_over(status: &Arc<Status>, body: &Bytes) -> Answer {
    no_body(body)?;
    let Some(host) = status.host().map(Arc::clone) else {
        return Err(unsupported("a session of a virtual machine cannot be taken over"));
    };
    off_thread(move || host.take_over()).await
}

/// Hands over the session on the host. For a virtual machine no session can be taken over, so what
/// is sent is what is mounted, without secrets, and a file with the same: a manager that has told a
/// daemon to send waits until something comes.
pub(super) async fn send_fd(status: &Arc<Status>, body: &Bytes) -> Answer {
    no_body(body)?;
    let Some(socket) = status.supervisor().map(PathBuf::from) else {
        return Err(unsupported("there is no --supervisor to send anything to"));
    };
    match status.host() {
        Some(host) => {
            let host: Arc<Host> = Arc::clone(host);
            off_thread(move || host.hand_over()).await
        }
        None => {
            let status = Arc::clone(status);
            let work = move || {
                let failed = |source| HandoverError::Supervisor { path: socket.clone(), source };
                let state = json!({"rafsd": 1, "mounts": status.mounted().infos()}).to_string();
                let send = || {
                    let flags = rustix::fs::MemfdFlags::CLOEXEC;
                    let memory = rustix::fs::memfd_create("state", flags)?;
                    let mut file = std::fs::File::from(memory);
                    file.write_all(state.as_bytes())?;
                    supervisor::send(&socket, state.as_bytes(), file.as_fd())
                };
                send().map_err(failed)
            };
            off_thread(work).await
        }
    }
}

/// Runs what may wait for the manager or for a disk.
async fn off_thread(work: impl FnOnce() -> Result<(), HandoverError> + Send + 'static) -> Answer {
    let work = tokio::task::spawn_blocking(work);
    let late = || {
        let message = format!("it takes longer than {PATIENCE:?}");
        ApiError(StatusCode::INTERNAL_SERVER_ERROR, message)
    };
    let result = tokio::time::timeout(PATIENCE, work).await.map_err(|_| late())?;
    match result.map_err(|_| failed("it failed, see the log".into()))? {
        Ok(()) => Ok(no_content()),
        Err(error @ HandoverError::NoSupervisor) => Err(unsupported(&error.to_string())),
        Err(error @ HandoverError::State(_)) => {
            Err(bad_request(format!("UnexpectedEvent: {error}")))
        }
        Err(error) => Err(failed(chain(&error))),
    }
}
