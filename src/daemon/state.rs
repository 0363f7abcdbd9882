//! What the daemon is doing, as the API tells it: state, mounts, and who asked it to stop.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Sender;
use serde::Serialize;
use tokio::sync::watch;

use super::host::Host;
use super::log::Events;
use super::mounted::{MountInfo, Mounted};
use super::version::{VERSION, Version};
use crate::device;

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
    /// Somebody has unmounted what this daemon had mounted on the host.
    Unmounted,
}

/// Shared by the thread that runs the daemon and by the API. Each lock is held for a copy.
pub struct Status {
    id: Option<String>,
    supervisor: Option<String>,
    state: watch::Sender<State>,
    mounted: Arc<Mounted>,
    events: Arc<Events>,
    device: OnceLock<Arc<device::Counters>>,
    host: OnceLock<Arc<Host>>,
    stop: Sender<StopReason>,
}

impl Status {
    /// A daemon in [`State::Init`]; a wish to stop goes to `stop`.
    pub fn new(
        id: Option<String>,
        supervisor: Option<String>,
        mounted: Arc<Mounted>,
        events: Arc<Events>,
        stop: Sender<StopReason>,
    ) -> Self {
        Status {
            id,
            supervisor,
            state: watch::Sender::new(State::Init),
            mounted,
            events,
            device: OnceLock::new(),
            host: OnceLock::new(),
            stop,
        }
    }

    /// Socket of the manager, if there is one.
    pub fn supervisor(&self) -> Option<&str> {
        self.supervisor.as_deref()
    }

    /// The errors that were logged last.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Lets the API see what the device counts; the first one stays.
    pub fn set_device(&self, counters: &Arc<device::Counters>) {
        let _ = self.device.set(Arc::clone(counters));
    }

    /// What the device counts, once there is one.
    pub fn device(&self) -> Option<&device::Counters> {
        self.device.get().map(|counters| &**counters)
    }

    /// Lets the API hand over the mount on the host; the first one stays.
    pub fn set_host(&self, host: Arc<Host>) {
        let _ = self.host.set(host);
    }

    /// The mount on the host, if this is `rafsd fuse`.
    pub fn host(&self) -> Option<&Arc<Host>> {
        self.host.get()
    }

    pub fn mounted(&self) -> &Arc<Mounted> {
        &self.mounted
    }

    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Moves on. [`State::Stopped`] is final.
    pub fn set_state(&self, to: State) {
        self.state.send_if_modified(|state| {
            let moves = *state != State::Stopped;
            if moves {
                *state = to;
            }
            moves
        });
    }

    /// Waits until the start is over: [`State::Running`], or [`State::Stopped`].
    pub async fn started(&self) -> State {
        let mut states = self.state.subscribe();
        let over = |state: &State| matches!(state, State::Running | State::Stopped);
        states.wait_for(over).await.map_or(State::Stopped, |state| *state)
    }

    /// Asks the daemon to end; returns at once.
    pub fn request_stop(&self, reason: StopReason) {
        // A full channel means that somebody asked already.
        let _ = self.stop.try_send(reason);
    }

    /// A snapshot; `with_mounts` is false for version 2 of the API.
    pub fn info(&self, with_mounts: bool) -> DaemonInfo {
        DaemonInfo {
            version: VERSION,
            id: self.id.clone(),
            supervisor: self.supervisor.clone(),
            state: self.state(),
            backend_collection: with_mounts.then(|| self.mounted.infos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::config::Config;
    use super::super::image::Images;
    use super::super::mounted::What;
    use super::*;
    use crate::fuse::Cache;

    fn mounted(runtime: &tokio::runtime::Runtime) -> Arc<Mounted> {
        let images = Images::new(runtime.handle().clone(), Duration::from_secs(1), 0);
        Arc::new(Mounted::new(images, Cache::default()))
    }

    #[test]
    fn who_waits_for_the_start_is_told_how_it_went() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for end in [State::Running, State::Stopped] {
            let (stop, _) = crossbeam_channel::bounded(1);
            let status = Status::new(None, None, mounted(&runtime), Arc::default(), stop);
            let status = Arc::new(status);
            let waiting = Arc::clone(&status);
            let told = runtime.spawn(async move { waiting.started().await });
            status.set_state(State::Ready);
            std::thread::sleep(Duration::from_millis(20));
            assert!(!told.is_finished());
            status.set_state(end);
            assert_eq!(runtime.block_on(told).unwrap(), end);
        }
    }

    #[test]
    fn daemon_info_has_the_members_clients_insist_on() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (stop, _) = crossbeam_channel::bounded(1);
        let status =
            Status::new(None, Some("/run/s".into()), mounted(&runtime), Arc::default(), stop);
        let bootstrap =
            format!("{}/guest-tests/golden/v6-none/bootstrap", env!("CARGO_MANIFEST_DIR"));
        let cache = tempfile::tempdir().unwrap();
        let mut config = Config::beside(bootstrap.as_ref(), None).unwrap();
        config.work_dir = cache.path().to_owned();
        let image = What::Image {
            bootstrap: bootstrap.into(),
            config: Box::new(config),
            prefetch_files: Vec::new(),
        };
        let image = status.mounted().prepare("/rafs/c1/lowerdir", image).unwrap();
        status.mounted().mount(image).unwrap();
        status.set_state(State::Running);
        let info = serde_json::to_value(status.info(true)).unwrap();
        assert_eq!(info["state"], "RUNNING");
        assert_eq!(info["id"], serde_json::Value::Null);
        assert_eq!(info["supervisor"], "/run/s");
        for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
            assert!(info["version"][member].is_string(), "{member}");
        }
        let mount = &info["backend_collection"]["/rafs/c1/lowerdir"];
        assert_eq!(mount["mountpoint"], "/rafs/c1/lowerdir");
        assert_eq!(mount["backend_type"], "Rafs");
        assert!(serde_json::to_value(status.info(false)).unwrap()["backend_collection"].is_null());
    }

    #[test]
    fn stopped_is_final() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (stop, asked) = crossbeam_channel::bounded(1);
        let status = Status::new(None, None, mounted(&runtime), Arc::default(), stop);
        status.set_state(State::Stopped);
        status.set_state(State::Running);
        assert_eq!(status.state(), State::Stopped);
        status.request_stop(StopReason::Api);
        status.request_stop(StopReason::Signal(15));
        assert_eq!(asked.try_recv(), Ok(StopReason::Api), "the first reason counts");
    }
}
