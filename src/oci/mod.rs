//! Images where they live: registries, OCI layouts and archives.
//!
//! `reference` (what a user calls an image) · `docker_config` (whose credentials) · `http` (the
//! client) · `auth` (what goes into the Authorization header) · `manifest` (what an image consists
//! of) · `registry`, `layout`, `archive` (where its bytes are) · `image` (any of them, to read from
//! or to write to).
//!
//! Whatever is named by a digest is compared with it before it is believed, and every size has a
//! bound before anything is read. Nothing here starts a thread; what waits is a future.
#![forbid(unsafe_code)]

pub mod archive;
pub mod auth;
pub mod digest;
pub mod docker_config;
pub mod error;
pub mod http;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod names;
pub mod reference;
pub mod registry;
pub mod upload;

pub use digest::Digest;
pub use error::OciError;
