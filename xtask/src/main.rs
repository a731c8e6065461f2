//! `cargo xtask`: the repository's chores.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    about = "Chores of the Tensora repository",
    version
)]
enum Chore {
    /// Check the repository's invariants
    Tidy,
    /// Check that every combination of cargo features compiles without warnings
    Features,
}

fn main() -> Result<()> {
    match Chore::parse() {
        Chore::Tidy => xtask::tidy::run(),
        Chore::Features => xtask::features::run(),
    }
}
