//! The RAFS v6 format, read only: bootstraps, blob tables, chunk-info arrays, codecs.
//!
//! No threads, no sockets; nothing here trusts a byte it was given.

pub mod blob_table;
pub mod ci;
pub mod codec;
pub mod error;
pub mod id;
pub mod layout;

pub use error::{FormatError, Result};
