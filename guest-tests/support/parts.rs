//! The real parts, installed by `scripts/parts` when a test asks for them first.
//!
//! A part that can not be installed fails the test that needs it: nothing is skipped.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The files of installed parts by the names that `scripts/parts --paths` gives them.
#[derive(Clone, Debug)]
pub struct Parts {
    values: HashMap<String, String>,
}

impl Parts {
    /// Installs what is missing of these parts or groups, as `scripts/parts` names them.
    ///
    /// Takes milliseconds if all are there; otherwise as long as the download, and one process at a time.
    pub fn install(names: &[&str]) -> Result<Parts> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/parts");
        run(Command::new(&script).args(names))?;
        let paths = run(Command::new(&script).arg("--paths"))?;
        let values = String::from_utf8(paths)?
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Ok(Parts { values })
    }

    /// The file or directory of this name.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        self.value(name).map(PathBuf::from)
    }

    /// A value that is not a path, such as `accel`.
    pub fn value(&self, name: &str) -> Result<&str> {
        let value = self.values.get(name);
        value.map(String::as_str).with_context(|| format!("no installed part has '{name}'"))
    }
}

/// Runs a command to its end: its standard output. An error holds all it said.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}
