//! The household: arguments, config, logs, signals, the HTTP API, and every thread.

pub mod api;
pub mod cli;
pub mod config;
pub mod log;
pub mod signal;
pub mod socket;
pub mod state;
pub mod version;
