//! rafsd serves RAFS container images to microVM guests over virtio-fs, lazily.
//!
//! A read walks down the rooms in this order and its answer walks back up:
//! `device` (virtqueues), `fuse` (operations), `rafs` (the format), `blob` (the chunks),
//! `backend` (the bytes). `build` is the image tool, `daemon` wires the rest together.

pub mod backend;
pub mod blob;
pub mod build;
pub mod fuse;
pub mod rafs;
