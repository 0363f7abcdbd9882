//! The `fuse` room at work: requests in, answers out, over the golden images.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod content;
mod golden;
mod guest;
mod hostile;
mod listing;
mod mounts;
mod passthrough;
mod session;
