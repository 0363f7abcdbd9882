//! The FUSE operations: a request's bytes in, an answer's bytes out.
//!
//! [`Request`] checks what a guest sent, [`Server`] answers it from the file systems in [`Mounts`],
//! and [`Reply`] writes the answer where the guest wants it. Nothing here blocks: a request that
//! needs chunks which are not on this host yet ends as [`Outcome::Wait`], and whoever carries
//! requests (`device`, or `host` for a mount on the host) asks again when the wait is over.
//!
//! A guest is not trusted: any bytes and any node id give an answer or an error, never a panic.

pub mod abi;
mod counters;
mod dax;
mod file_stats;
mod file_system;
mod host;
mod known;
mod listing;
mod mount_path;
mod mounts;
mod passthrough;
mod pseudo;
mod rafs_fs;
mod rafs_map;
mod rafs_read;
mod reply;
mod request;
mod server;
mod session;
mod wait;
mod zeros;

pub use counters::{OPCODES, OpTotals, TIMES, Times, opcode_name, serve_queue};
pub use dax::{
    DaxCounters, DaxOptions, DaxPolicy, MAX_PRIVATE_WINDOW, MAX_SHARED_WINDOW, MIN_WINDOW,
    MapError, SharedMemory,
};
pub use file_stats::{Access, FileNumbers, FileStats, FileStatsOptions, OPERATIONS};
pub use host::{Ended, HostMount, HostSession, MountHostError, is_mounted};
pub use mount_path::{MountPath, PathError};
pub use mounts::{AnyFs, MountError, Mounts};
pub use passthrough::{Cache, PassthroughError, PassthroughFs, PassthroughOptions};
pub use rafs_fs::{RafsFs, RafsOptions};
pub use reply::Reply;
pub use request::{Request, RequestError};
pub use server::{Outcome, Server};
pub use session::ServerOptions;
pub use wait::{Pins, Wait};
