//! The image tool: builds images, shows what is in them, verifies them.
//!
//! `create` takes a directory or a tar stream and writes a RAFS v6 bootstrap and its data blob. Of a
//! directory: `scan` (what is in it) · `prefetch` (which files come first) · `chunker` (files into runs
//! of chunks). Of a stream: `tar` (its entries) · `layer` (entries into a `draft` of the tree and into
//! runs). From there the way is one: `pipeline` (read, hash and compress runs on all cores) · `dedup`
//! (number the distinct chunks, know those of a parent or dictionary) · `blob_file`, `packed` (their
//! bytes and what tells where they are) · `overlay` (a layer on those below it) · `place` (where inodes
//! go) · `write` (the bootstrap). The same source gives the same bytes on every run and for every
//! number of threads.
//!
//! `merge` makes an image of the bootstraps of layers, which `load` reads; `convert` does both from
//! registry to registry. `unpack` goes the other
//! way, `stat`, `inspect` and `check` read what `image_file` opens.
#![forbid(unsafe_code)]

pub mod blob_file;
pub mod blob_reader;
pub mod check;
pub mod chunker;
pub mod compose;
pub mod convert;
pub mod create;
pub mod dedup;
pub mod dirent;
pub mod draft;
pub mod error;
pub mod image_file;
pub mod inspect;
pub mod layer;
pub mod load;
pub mod merge;
pub mod merge_cli;
pub mod output;
pub mod overlay;
pub mod packed;
pub mod pipeline;
pub mod place;
pub mod prefetch;
pub mod scan;
pub mod source;
pub mod stat;
pub mod tar;
pub mod tree;
pub mod unpack;
pub mod used;
pub mod whiteout;
pub mod write;
pub mod xattrs;

pub use error::BuildError;
