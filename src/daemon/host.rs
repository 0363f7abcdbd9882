//! `rafsd fuse`: the mount on the host, from the start to who takes it over.
//!
//! The mount belongs to a descriptor. Handed to a manager, it outlives this process: readers wait,
//! and the next daemon answers them. What goes with it says what is mounted and what was agreed with
//! the kernel; node ids of images follow from the images, so nothing else has to be remembered.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::config::Config;
use super::mounted::{Mounted, What};
use super::state::{State, Status};
use super::supervisor;
use super::{DaemonError, chain};
use crate::fuse::{Ended, HostMount, HostSession, MountHostError, Server, ServerOptions};

/// Form of the state that is handed over; others are refused.
const VERSION: u32 = 1;

/// What becomes of requests that a daemon took and did not answer before it died.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailoverPolicy {
    /// They hang, and their processes cannot be killed, until the session ends.
    None,
    /// The kernel offers them again: Linux 6.9 and newer.
    #[default]
    Resend,
    /// The kernel fails them, where it is patched for that; else as `Resend`.
    Flush,
}

/// Arguments of `rafsd fuse`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOptions {
    pub mountpoint: PathBuf,
    /// Threads that take requests: 1 to 1024.
    pub threads: usize,
    pub failover: FailoverPolicy,
    /// Wait for the session of another daemon.
    pub upgrade: bool,
    /// Mount for writing: for shared directories.
    pub writable: bool,
}

/// Why a session was not handed over or taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    #[error("there is no --supervisor to hand anything over to")]
    NoSupervisor,
    #[error("not in state {}", .0)]
    State(&'static str),
    #[error("supervisor {}", path.display())]
    Supervisor { path: PathBuf, source: io::Error },
    #[error("what the supervisor sent is not the state of a rafsd like this one: {0}")]
    Foreign(String),
    #[error("the supervisor sent no descriptor")]
    NoDescriptor,
    #[error("mounting {at} again: {reason}")]
    Mount { at: String, reason: String },
    #[error("the session cannot go on")]
    Session(#[source] io::Error),
    #[error("the session cannot go on: {0}")]
    Tree(&'static str),
}

/// The mount on the host.
pub struct Host {
    options: HostOptions,
    server: ServerOptions,
    status: Arc<Status>,
    mounted: Arc<Mounted>,
    runtime: Handle,
    on_end: Box<dyn Fn(io::Result<Ended>) + Send + Sync>,
    phase: Mutex<Phase>,
    /// A manager has a copy of the descriptor.
    handed_over: AtomicBool,
}

enum Phase {
    /// Nothing is mounted by us.
    Empty,
    /// There is a session that nobody serves yet.
    Ready(Session),
    Running(Session),
}

#[derive(Clone)]
struct Session {
    mount: HostMount,
    session: Arc<HostSession>,
}

/// What is handed over beside the descriptor.
#[derive(Serialize, Deserialize)]
struct Saved {
    rafsd: u32,
    mountpoint: PathBuf,
    /// As [`Server::agreed`].
    agreed: u64,
    mounts: Vec<SavedMount>,
}

#[derive(Serialize, Deserialize)]
struct SavedMount {
    at: String,
    #[serde(flatten)]
    what: SavedWhat,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "fs_type", rename_all = "snake_case")]
enum SavedWhat {
    Rafs {
        source: PathBuf,
        /// The document; none: the defaults that apply without one.
        config: Option<String>,
        /// For these: where blobs are looked for first.
        localfs_dir: Option<PathBuf>,
        /// `IMAGE_PULL_AUTH` applies.
        environment: bool,
        prefetch_files: Vec<String>,
    },
    PassthroughFs {
        source: PathBuf,
    },
}

impl Host {
    /// Nothing is mounted yet. Waits run on `runtime`; `on_end` is told when a session ends.
    pub fn new(
        options: HostOptions,
        writeback: bool,
        status: Arc<Status>,
        runtime: Handle,
        on_end: impl Fn(io::Result<Ended>) + Send + Sync + 'static,
    ) -> Arc<Host> {
        let mounted = Arc::clone(status.mounted());
        let server = ServerOptions { writeback, ..ServerOptions::default() };
        Arc::new(Host {
            options,
            server,
            status,
            mounted,
            runtime,
            on_end: Box::new(on_end),
            phase: Mutex::new(Phase::Empty),
            handed_over: AtomicBool::new(false),
        })
    }

    /// Whether to wait for the session of another daemon: because the command line says so, or
    /// because the daemon whose API was at `apisock` has died and a manager has its mount.
    pub fn should_wait(&self, apisock: Option<&Path>) -> bool {
        if self.options.upgrade {
            return true;
        }
        let dead = |path: &Path| {
            path.exists()
                && UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        };
        let mounted = || crate::fuse::is_mounted(&self.options.mountpoint).unwrap_or(false);
        self.status.supervisor().is_some() && apisock.is_some_and(dead) && mounted()
    }

    /// Mounts and opens the session, without serving yet.
    ///
    /// # Errors
    ///
    /// The directory cannot be mounted on.
    pub fn mount(&self) -> Result<(), DaemonError> {
        let (mount, device) = HostMount::new(&self.options.mountpoint, self.options.writable)?;
        let server = Server::new(Arc::clone(self.mounted.table()), self.server);
        let session = HostSession::new(server, device, self.runtime.clone())
            .and_then(|session| session.open().map(|()| session))
            .map_err(|source| {
                mount.unmount();
                MountHostError::Mount { path: mount.path().to_owned(), source }
            })?;
        *self.phase() = Phase::Ready(Session { mount, session });
        self.status.set_state(State::Ready);
        Ok(())
    }

    /// Serves what is mounted, on threads of its own, and says so.
    ///
    /// # Errors
    ///
    /// Nothing is mounted, or it is served already; or there is no thread.
    pub fn start(self: &Arc<Self>) -> Result<(), HandoverError> {
        let mut phase = self.phase();
        let Phase::Ready(session) = &*phase else {
            return Err(HandoverError::State("READY"));
        };
        let session = session.clone();
        let (serving, host) = (Arc::clone(&session.session), Arc::clone(self));
        thread::Builder::new()
            .name("fuse".into())
            .spawn(move || (host.on_end)(serving.serve(host.options.threads)))
            .map_err(HandoverError::Session)?;
        *phase = Phase::Running(session);
        self.status.set_state(State::Running);
        Ok(())
    }

    /// Has the kernel do what the policy says with requests of the daemon before.
    pub fn recover(&self) {
        let Phase::Running(Session { session, mount }) = &*self.phase() else { return };
        let resend = || match session.resend() {
            Ok(()) => log::info!("requests of the daemon before are served again"),
            Err(e) => log::warn!(
                "requests that the daemon before did not answer hang until the session ends: the \
                 kernel does not send them again: {e}"
            ),
        };
        match self.options.failover {
            FailoverPolicy::None => {}
            FailoverPolicy::Resend => resend(),
            FailoverPolicy::Flush => match flush(mount.path()) {
                Ok(()) => log::info!("requests of the daemon before have failed"),
                Err(e) => {
                    log::info!("this kernel cannot flush requests ({e}): they are sent again");
                    resend();
                }
            },
        }
    }

    /// Hands the session to the manager, which keeps it while this process goes on. Waits for it.
    ///
    /// # Errors
    ///
    /// There is no manager or no session, or the manager does not take it.
    pub fn hand_over(&self) -> Result<(), HandoverError> {
        let path = self.supervisor()?;
        let session = match &*self.phase() {
            Phase::Ready(session) | Phase::Running(session) => session.clone(),
            Phase::Empty => return Err(HandoverError::State("READY or RUNNING")),
        };
        let saved = Saved {
            rafsd: VERSION,
            mountpoint: session.mount.path().to_owned(),
            agreed: session.session.server().agreed(),
            mounts: self.mounted.commands().into_iter().map(|(at, what)| save(at, &what)).collect(),
        };
        let state = serde_json::to_vec(&saved).expect("our own types become JSON");
        supervisor::send(&path, &state, session.session.device())
            .map_err(|source| HandoverError::Supervisor { path, source })?;
        self.handed_over.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Takes a session that the manager has, and mounts again what it was made of, without serving
    /// yet. Waits for the manager and for disks.
    ///
    /// # Errors
    ///
    /// There is a session already, or the manager has none that can go on here. Nothing is changed
    /// then, but for images that were mounted.
    pub fn take_over(&self) -> Result<(), HandoverError> {
        let path = self.supervisor()?;
        if !matches!(&*self.phase(), Phase::Empty) {
            return Err(HandoverError::State("INIT"));
        }
        let (state, fd) = supervisor::receive(&path)
            .map_err(|source| HandoverError::Supervisor { path, source })?;
        let saved: Saved = serde_json::from_slice(&state)
            .map_err(|e| HandoverError::Foreign(format!("{:?} error", e.classify())))?;
        if saved.rafsd != VERSION {
            return Err(HandoverError::Foreign(format!("version {}", saved.rafsd)));
        }
        if saved.agreed == 0 {
            return Err(HandoverError::Foreign("a session that was not open".to_owned()));
        }
        let device = fd.ok_or(HandoverError::NoDescriptor)?;
        for SavedMount { at, what } in saved.mounts {
            let failed = |reason| HandoverError::Mount { at: at.clone(), reason };
            let what = restore(what).map_err(failed)?;
            self.mounted
                .prepare(&at, what)
                .and_then(|prepared| self.mounted.restore(prepared))
                .map_err(|e| failed(chain(&e)))?;
        }
        let session = self.resume(&saved.mountpoint, saved.agreed, device)?;
        *self.phase() = Phase::Ready(session);
        self.handed_over.store(true, Ordering::Relaxed);
        self.status.set_state(State::Ready);
        log::info!("took over the session on {}", saved.mountpoint.display());
        Ok(())
    }

    fn resume(
        &self,
        mountpoint: &Path,
        agreed: u64,
        device: OwnedFd,
    ) -> Result<Session, HandoverError> {
        let table = Arc::clone(self.mounted.table());
        let server = Server::new(table, self.server);
        server.resume(agreed).map_err(HandoverError::Tree)?;
        let session = HostSession::new(server, device, self.runtime.clone())
            .map_err(HandoverError::Session)?;
        let mount = HostMount::adopt(mountpoint).map_err(HandoverError::Session)?;
        Ok(Session { mount, session })
    }

    /// Ends the session. With `keep` the mount stays, if a manager can give it to another daemon;
    /// else it is taken out of the tree, even if it is busy.
    pub fn leave(&self, keep: bool) {
        let phase = std::mem::replace(&mut *self.phase(), Phase::Empty);
        let (Phase::Ready(session) | Phase::Running(session)) = phase else { return };
        if keep && self.handed_over.load(Ordering::Relaxed) {
            log::info!(
                "the mount on {} is left to the next daemon",
                session.mount.path().display()
            );
        } else {
            session.mount.unmount();
        }
        session.session.stop();
    }

    fn supervisor(&self) -> Result<PathBuf, HandoverError> {
        self.status.supervisor().map(PathBuf::from).ok_or(HandoverError::NoSupervisor)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn save(at: String, what: &What) -> SavedMount {
    let what = match what {
        What::Image { bootstrap, config, prefetch_files } => SavedWhat::Rafs {
            source: bootstrap.clone(),
            config: config.document.as_ref().map(|text| text.reveal().to_owned()),
            localfs_dir: config.localfs_dir.clone(),
            environment: config.environment,
            prefetch_files: prefetch_files.clone(),
        },
        What::Directory(source) => SavedWhat::PassthroughFs { source: source.clone() },
    };
    SavedMount { at, what }
}

fn restore(saved: SavedWhat) -> Result<What, String> {
    Ok(match saved {
        SavedWhat::Rafs { source, config, localfs_dir, environment, prefetch_files } => {
            let config = match config {
                Some(text) if environment => Config::parse_with_environment(&text),
                Some(text) => Config::parse(&text),
                None => Config::beside(&source, localfs_dir.as_deref()),
            };
            let config = Box::new(config.map_err(|e| chain(&e))?);
            What::Image { bootstrap: source, config, prefetch_files }
        }
        SavedWhat::PassthroughFs { source } => What::Directory(source),
    })
}

/// Has a patched kernel fail the requests of a connection.
fn flush(mountpoint: &Path) -> io::Result<()> {
    let device = rustix::fs::stat(mountpoint)?.st_dev;
    let connection = rustix::fs::minor(device);
    std::fs::write(format!("/sys/fs/fuse/connections/{connection}/flush"), "1")
}
