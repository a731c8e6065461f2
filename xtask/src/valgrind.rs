//! `cargo xtask valgrind`: tests of the backends, while memcheck watches every access to memory.
//!
//! What the kernel writes is not seen by it, but where our own code reads or writes is: slots, scratch and
//! destinations after an error, a cancellation or a refused entry. Its warnings about debug information are of
//! mapped test files that it takes for libraries.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Errors that memcheck finds end a test program with this status, which nothing else does.
const ERROR_STATUS: &str = "99";
/// What is run: a test program of `tensora-io`, and the tests in it. Those in which reads fail while the kernel has
/// more of them, and some of ordinary reads. Not those that watch another thread wait: under memcheck one thread runs
/// at a time, and one that waits for a page of a mapping keeps the others from running.
const TESTS: &[(&str, &[&str])] = &[
    (
        "fuse_faults",
        &[
            "what_is_right_is_read",
            "a_device_error_is_named_with_its_place",
            "an_error_in_the_middle_of_a_batch_waits_for_the_rest",
            "a_ring_that_refuses_entries_waits_for_what_it_has",
        ],
    ),
    ("conformance", &["adjacent_ranges", "boundary_sizes"]),
];

/// Arguments of `cargo xtask valgrind`.
#[derive(Debug, Args)]
pub struct ValgrindArguments {
    /// Write the table into this file, too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl ValgrindArguments {
    /// Runs the tests under memcheck.
    ///
    /// # Errors
    ///
    /// When valgrind is not installed, a test fails, or memcheck finds an error.
    pub fn run(&self) -> Result<()> {
        let version = Command::new("valgrind").arg("--version").output().context(
            "valgrind cannot be started: install it (`apt-get install valgrind` on Debian and Ubuntu)",
        )?;
        let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
        let mut report = format!(
            "# Valgrind\n\n`cargo xtask valgrind`, {version}, memcheck: no error in these tests of `tensora-io`.\n\n\
             | program | tests | passed |\n|---|---|---:|\n"
        );
        for (program, tests) in TESTS {
            let passed = check(program, tests)?;
            report += &format!("| {program} | {} | {passed} |\n", tests.join(", "));
        }
        println!("{report}");
        if let Some(path) = &self.out {
            std::fs::write(path, &report).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Runs the tests whose names contain one of these words. Returns how many passed.
fn check(program: &str, tests: &[&str]) -> Result<u64> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let root = crate::tidy::repository_root();
    let runner = format!("valgrind --quiet --error-exitcode={ERROR_STATUS} --leak-check=no");
    let output = Command::new(cargo)
        .current_dir(&root)
        // rustix looks for the vDSO by itself, where valgrind has hidden it; the C library does without.
        .env("RUSTFLAGS", "--cfg=rustix_use_libc")
        .env("CARGO_TARGET_DIR", root.join("target/valgrind"))
        .args([
            "test",
            "--quiet",
            "--all-features",
            "--package",
            "tensora-io",
        ])
        .args([
            "--config",
            &format!("target.'cfg(all())'.runner = '{runner}'"),
        ])
        .args(["--test", program, "--", "--test-threads=1"])
        .args(tests)
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("start cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{program} under valgrind: {}\n{text}",
        output.status
    );
    let passed = passed(&text).context("the tests do not say how many passed")?;
    ensure!(
        passed > 0,
        "no test of {program} is called {}",
        tests.join(" or ")
    );
    Ok(passed)
}

/// The number in `test result: ok. 3 passed; …`.
fn passed(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("test result: ok. ")?;
    rest.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passed_is_read() {
        let text = "\nrunning 3 tests\n...\ntest result: ok. 3 passed; 0 failed; 0 ignored\n";
        assert_eq!(passed(text), Some(3));
        assert_eq!(passed("error: no test target"), None);
    }
}
