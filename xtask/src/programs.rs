//! The programs that demo and bench run, built for release.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Builds the `tensora` command, and returns the folder that it is in.
///
/// # Errors
///
/// When cargo cannot be started or the build fails.
pub fn build_command() -> Result<PathBuf> {
    build(&["--package", "tensora-cli"])
}

/// Builds the programs that are timed, and returns the folder that they are in.
///
/// # Errors
///
/// When cargo cannot be started or the build fails.
pub fn build_timed() -> Result<PathBuf> {
    build(&["--package", "tensora-io", "--example", "raw_read"])?;
    let folder = build(&["--package", "tensora", "--example", "timed"])?;
    Ok(folder.join("examples"))
}

fn build(arguments: &[&str]) -> Result<PathBuf> {
    let root = crate::tidy::repository_root();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .current_dir(&root)
        .args(["build", "--release", "--quiet"])
        .args(arguments)
        .status()
        .context("start cargo")?;
    ensure!(
        status.success(),
        "cargo build {} failed",
        arguments.join(" ")
    );
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release"))
}
