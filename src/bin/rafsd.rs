//! The daemon: `rafsd virtiofs --sock PATH --bootstrap FILE`. See docs/operations.md.

use std::io::Write;
use std::process::ExitCode;

use rafsd::daemon::cli::{self, Invocation};
use rafsd::daemon::run;

/// 0: stopped as asked; 1: failure; 2: wrong arguments.
fn main() -> ExitCode {
    match cli::parse(std::env::args_os()) {
        Ok(Invocation::Print(text)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        // The log has told why it failed.
        Ok(Invocation::Serve(options)) => match run::run(*options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(usage) => {
            let _ = writeln!(std::io::stderr(), "{usage}");
            ExitCode::from(2)
        }
    }
}
