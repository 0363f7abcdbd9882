//! The image tool: builds images, shows what is in them, verifies them.
//!
//! `create` takes a directory and writes a RAFS v6 bootstrap and its data blob, in this order:
//! `tree` (what is in the source) · `prefetch` (which files come first) · `chunker` (files into runs
//! of chunks) · `pipeline` (read, hash and compress them on all cores) · `dedup` (number the distinct
//! ones) · `blob_file` (their bytes and the chunk-info array) · `place` (where inodes go) · `write`
//! (the bootstrap). The same tree gives the same bytes on every run and for every number of threads.
//!
//! `inspect` and `check` read what `image_file` opens.
#![forbid(unsafe_code)]

pub mod blob_file;
pub mod check;
pub mod chunker;
pub mod create;
pub mod dedup;
pub mod dirent;
pub mod error;
pub mod image_file;
pub mod inspect;
pub mod output;
pub mod pipeline;
pub mod place;
pub mod prefetch;
pub mod source;
pub mod tree;
pub mod whiteout;
pub mod write;
pub mod xattrs;

pub use error::BuildError;
