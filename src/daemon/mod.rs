//! The household: arguments, config, logs, signals, the HTTP API, and every thread.

pub mod cli;
pub mod config;
pub mod version;
