//! Chores of the repository, each one a module and a subcommand of `cargo xtask`.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    reason = "these are commands; they talk to whoever started them"
)]

pub mod features;
pub mod fixtures;
pub mod presets;
pub mod tidy;
