//! Chores of the repository, each one a module and a subcommand of `cargo xtask`.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these are commands: results go to standard output, progress to standard error"
)]

pub mod bench;
pub mod demo;
pub mod features;
pub mod fixtures;
pub mod fuzz;
pub mod instructions;
pub mod presets;
pub mod programs;
pub mod simulate;
pub mod soak;
pub mod tidy;
pub mod valgrind;
