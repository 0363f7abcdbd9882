//! The chunks: makes pieces of blobs readable from local files, downloading what is missing.
//!
//! [`Store`] is one per daemon; [`Blob`] is one blob as one image sees it. A reader asks
//! [`Blob::verified`], which touches only memory; for chunks that are not there it awaits
//! [`Blob::fetch`], which holds no thread, and reads them from [`Blob::cache_file`]. What is true
//! at the edges:
//!
//! - Bytes are served only after this process has compared them with the digest that *this* image
//!   gives for the chunk. Nothing another process, image or earlier run wrote is believed.
//! - A chunk is downloaded once per host: within a process waiters join the download on its way,
//!   processes exclude each other by locks that die with their owner.
//! - Every wait ends by its deadline, whatever the backend, the disk or another process does.
//! - A full or read-only disk costs the cache, not the reader: chunks are handed over in memory.
//!
//! Files, all in `<work_dir>/rafsd/`: see [`cache_file`] for their bytes.

mod ahead;
pub mod cache_file;
mod claim;
pub mod counters;
mod download;
pub mod error;
mod fetch;
mod flight;
mod gate;
mod here;
mod line;
mod link;
mod neighbours;
mod paging;
mod plan;
mod prefetch;
mod readiness;
pub mod store;
mod table;
mod transfer;
mod unit;

pub use counters::Counters;
pub use error::{ChunkError, ChunkFailure, StoreError};
pub use gate::Class;
pub use prefetch::{Prefetch, PrefetchConfig};
pub use store::{Blob, ChunkData, ChunkRef, DigestSource, Store, StoreConfig, reopen_read_only};
