//! A tree of the host as text, by the script and the programs that guests use: what is equal to it was read
//! right.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::parts::{Parts, run};

/// The output of a function of `init/manifest.sh` in a directory: `metadata .`, `contents some/dir`, `edges .`.
///
/// `parts` must hold `tools`.
pub fn describe(parts: &Parts, tree: &Path, function: &str) -> Result<Vec<u8>> {
    let script =
        format!(". '{}/guest-tests/init/manifest.sh' && {function}", env!("CARGO_MANIFEST_DIR"));
    let busybox = parts.path("busybox")?;
    let tools = busybox.parent().context("a file has a directory")?;
    let path = format!("{}:/usr/bin:/bin", tools.display());
    run(Command::new("sh")
        .arg("-c")
        .arg(script)
        .env("tools", tools)
        .env("PATH", path)
        .current_dir(tree))
}
