//! The household: arguments, config, logs, signals, the HTTP API, and every thread.
//!
//! [`run`](run::run) starts the pieces in an order that clients can rely on: the API answers first,
//! then the image of the command line is opened, if there is one, then the VMM's socket listens, and
//! only then the state is RUNNING. More is mounted, and unmounted, by the API.

pub mod api;
pub mod cli;
pub mod config;
pub mod host;
pub mod image;
pub mod log;
pub mod metrics;
pub mod mounted;
pub mod run;
pub mod signal;
pub mod socket;
pub mod state;
pub mod supervisor;
pub mod version;

use std::io;
use std::path::PathBuf;

use crate::blob::StoreError;
use crate::device::DeviceError;
use crate::fuse::{MountHostError, PassthroughError};
use crate::oci::OciError;
use crate::rafs::FormatError;

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Why the daemon cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    #[error("log")]
    Log(#[source] io::Error),
    #[error("{what}")]
    System { what: &'static str, source: io::Error },
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error(transparent)]
    Socket(#[from] socket::SocketError),
    #[error("bootstrap {}", path.display())]
    Bootstrap { path: PathBuf, source: FormatError },
    #[error("prefetch files {}", path.display())]
    PrefetchFiles { path: PathBuf, source: io::Error },
    #[error("backend")]
    Backend { source: OciError },
    #[error("cache")]
    Store(#[from] StoreError),
    #[error("device")]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    #[error(transparent)]
    HostMount(#[from] MountHostError),
    #[error("mount on the host")]
    Handover(#[from] host::HandoverError),
    #[error("mounting {at}")]
    Mount { at: String, source: Box<mounted::ChangeError> },
}
