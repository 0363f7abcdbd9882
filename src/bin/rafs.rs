//! The image tool.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rafsd::build;

/// Build, merge, inspect and check RAFS images.
#[derive(Parser)]
#[command(name = "rafs", version, max_term_width = 100)]
struct Cli {
    /// What to log: off, error, warn, info, debug or trace.
    #[arg(short = 'l', long, global = true, value_name = "LEVEL", default_value = "warn")]
    #[arg(display_order = 1000)]
    log_level: log::LevelFilter,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Create(build::create::Args),
    Convert(Box<build::convert::cli::Args>),
    Merge(build::merge_cli::Args),
    Unpack(build::unpack::Args),
    Stat(build::stat::Args),
    Inspect(build::inspect::Args),
    Check(Box<build::check::Args>),
}

fn main() -> ExitCode {
    // Usage errors end here, with exit code 2.
    let cli = Cli::parse();
    env_logger::Builder::new().filter_level(cli.log_level).format_timestamp(None).init();
    let result = match cli.command {
        Command::Create(args) => build::create::run(args),
        Command::Convert(args) => build::convert::cli::run(*args),
        Command::Merge(args) => build::merge_cli::run(args),
        Command::Unpack(args) => build::unpack::run(args),
        Command::Stat(args) => build::stat::run(args),
        Command::Inspect(args) => build::inspect::run(args),
        Command::Check(args) => build::check::run(*args),
    };
    result.unwrap_or_else(|e| {
        if let Some(usage) = e.downcast_ref::<clap::Error>() {
            usage.exit();
        }
        let message = format!("rafs: {e:#}\n");
        // Nobody is left to tell if this fails.
        std::io::stderr().write_all(message.as_bytes()).ok();
        ExitCode::FAILURE
    })
}
