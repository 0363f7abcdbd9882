//! The RAFS v6 format, read only: bootstraps, blob tables, chunk-info arrays, codecs.
//!
//! No threads, no sockets; nothing here trusts a byte it was given.

pub mod blob_table;
pub mod bootstrap;
pub mod chunk_table;
pub mod ci;
pub mod codec;
pub mod dir;
pub mod error;
pub mod id;
pub mod inode;
pub mod layout;
mod superblock;
pub mod toc;
pub mod walk;
pub mod xattr;

#[cfg(test)]
mod tests;

pub use blob_table::BlobInfo;
pub use bootstrap::Bootstrap;
pub use chunk_table::ChunkDigests;
pub use dir::{Dir, DirEntry};
pub use error::{FormatError, Result};
pub use inode::{FileKind, Inode};
pub use walk::{Walk, WalkError, WalkItem};
pub use xattr::{Xattr, Xattrs};
