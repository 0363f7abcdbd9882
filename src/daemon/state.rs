//! What the daemon is doing, as the API tells it: state, mounts, and who asked it to stop.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crossbeam_channel::Sender;
use serde::Serialize;

use super::version::{VERSION, Version};

/// State of the daemon in nydusd's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Nothing is mounted yet.
    Init,
    /// Mounted, but the VMM's socket is not served yet.
    Ready,
    /// Both sockets listen and the mounts work.
    Running,
    /// About to exit.
    Stopped,
}

/// One mounted file system, as the API shows it.
#[derive(Clone, Debug, Serialize)]
pub struct MountInfo {
    pub backend_type: &'static str,
    pub mountpoint: String,
    #[serde(serialize_with = "time_text")]
    pub mounted_time: SystemTime,
    /// Version 2 document without secrets.
    pub config: serde_json::Value,
}

/// Answer of `GET /api/v1/daemon`.
#[derive(Debug, Serialize)]
pub struct DaemonInfo {
    pub version: Version,
    pub id: Option<String>,
    pub supervisor: Option<String>,
    pub state: State,
    pub backend_collection: Option<BTreeMap<String, MountInfo>>,
}

/// Why the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Number of the signal.
    Signal(i32),
    /// `PUT /api/v1/daemon/exit`.
    Api,
}

/// Shared by the thread that runs the daemon and by the API. Each lock is held for a copy.
#[derive(Debug)]
pub struct Status {
    id: Option<String>,
    supervisor: Option<String>,
    state: Mutex<State>,
    mounts: Mutex<BTreeMap<String, MountInfo>>,
    stop: Sender<StopReason>,
}

impl Status {
    /// A daemon in [`State::Init`]; a wish to stop goes to `stop`.
    pub fn new(id: Option<String>, supervisor: Option<String>, stop: Sender<StopReason>) -> Self {
        Status {
            id,
            supervisor,
            state: Mutex::new(State::Init),
            mounts: Mutex::new(BTreeMap::new()),
            stop,
        }
    }

    pub fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves on. [`State::Stopped`] is final.
    pub fn set_state(&self, to: State) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != State::Stopped {
            *state = to;
        }
    }

    pub fn add_mount(&self, mount: MountInfo) {
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        mounts.insert(mount.mountpoint.clone(), mount);
    }

    /// Asks the daemon to end; returns at once.
    pub fn request_stop(&self, reason: StopReason) {
        // A full channel means that somebody asked already.
        let _ = self.stop.try_send(reason);
    }

    /// A snapshot; `with_mounts` is false for version 2 of the API.
    pub fn info(&self, with_mounts: bool) -> DaemonInfo {
        let mounts = || self.mounts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        DaemonInfo {
            version: VERSION,
            id: self.id.clone(),
            supervisor: self.supervisor.clone(),
            state: self.state(),
            backend_collection: with_mounts.then(mounts),
        }
    }
}

/// `2026-08-22 10:04:14.123456789 +00:00:00`: the form that nydusctl parses.
fn time_text<S: serde::Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    let text = humantime::format_rfc3339_nanos(*time).to_string();
    to.serialize_str(&text.replace('T', " ").replace('Z', " +00:00:00"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn daemon_info_has_the_members_clients_insist_on() {
        let (stop, _) = crossbeam_channel::bounded(1);
        let status = Status::new(None, Some("/run/s".into()), stop);
        status.add_mount(MountInfo {
            backend_type: "Rafs",
            mountpoint: "/".into(),
            mounted_time: UNIX_EPOCH + Duration::new(1_787_393_054, 123_456_789),
            config: serde_json::Value::Null,
        });
        status.set_state(State::Running);
        let info = serde_json::to_value(status.info(true)).unwrap();
        assert_eq!(info["state"], "RUNNING");
        assert_eq!(info["id"], serde_json::Value::Null);
        assert_eq!(info["supervisor"], "/run/s");
        for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
            assert!(info["version"][member].is_string(), "{member}");
        }
        let mount = &info["backend_collection"]["/"];
        assert_eq!(mount["mounted_time"], "2026-08-22 10:04:14.123456789 +00:00:00");
        assert_eq!(mount["backend_type"], "Rafs");
        assert!(serde_json::to_value(status.info(false)).unwrap()["backend_collection"].is_null());
    }

    #[test]
    fn stopped_is_final() {
        let (stop, asked) = crossbeam_channel::bounded(1);
        let status = Status::new(None, None, stop);
        status.set_state(State::Stopped);
        status.set_state(State::Running);
        assert_eq!(status.state(), State::Stopped);
        status.request_stop(StopReason::Api);
        status.request_stop(StopReason::Signal(15));
        assert_eq!(asked.try_recv(), Ok(StopReason::Api), "the first reason counts");
    }
}
