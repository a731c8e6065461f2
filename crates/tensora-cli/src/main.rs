//! The `tensora` command: inspect, plan, load, convert and verify checkpoints, and examine and measure
//! the machine.
//!
//! Every subcommand computes a report and hands it to [`output::emit`], the only place that writes
//! to standard output; whatever goes wrong ends in [`failure`], on standard error.
#![deny(unsafe_code)]

mod args;
#[cfg(target_os = "linux")]
mod bus_error;
mod commands;
mod failure;
mod mapping;
mod output;
mod progress;
mod signals;
mod table;
mod units;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command};
use crate::output::Console;

/// Names what is traced, as `RUST_LOG` does elsewhere: `tensora_io=trace`.
const LOG_VARIABLE: &str = "TENSORA_LOG";

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_tracing(cli.verbose);
    let console = Console {
        json: cli.json,
        // A bar and a trace would write over each other.
        progress: std::io::stderr().is_terminal() && cli.verbose == 0,
        explain: cli.verbose > 0,
    };
    let done = |()| ExitCode::SUCCESS;
    let result = match &cli.command {
        Command::Inspect(arguments) => commands::inspect(arguments, &console).map(done),
        Command::Plan(arguments) => commands::plan(arguments, &console).map(done),
        Command::Load(arguments) => commands::load(arguments, &console).map(done),
        Command::Digest(arguments) => commands::digest(arguments, &console).map(done),
        Command::Convert(arguments) => commands::convert(arguments, &console).map(done),
        Command::Verify(arguments) => commands::verify(arguments, &console),
        Command::Doctor(arguments) => commands::doctor(arguments, &console),
        Command::Calibrate(arguments) => commands::calibrate(arguments, &console).map(done),
        Command::Bench(arguments) => commands::bench(arguments, &console).map(done),
    };
    result.unwrap_or_else(|error| failure::report(&error))
}

/// Traces to standard error, if that was asked for by option or environment.
fn start_tracing(verbose: u8) {
    let filter = match (std::env::var(LOG_VARIABLE), verbose) {
        (Ok(filter), _) if !filter.is_empty() => EnvFilter::new(filter),
        (_, 0) => return,
        (_, 1) => EnvFilter::new("debug"),
        (_, _) => EnvFilter::new("trace"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::colours(&std::io::stderr()))
        .init();
}
