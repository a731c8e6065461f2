//! `cargo xtask fuzz`: every fuzz target, for a while.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub struct FuzzArguments {
    /// Which targets; all of them if none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How many seconds each target runs
    #[arg(long, value_name = "S", default_value_t = 60)]
    budget: u64,
    /// Write the table into this file, too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// What libFuzzer said at the end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    executions: u64,
    /// Edges of the program that were reached.
    coverage: u64,
    peak_mib: u64,
    /// Inputs that failed.
    artifacts: Vec<String>,
}

impl FuzzArguments {
    /// Runs the targets one after the other.
    ///
    /// # Errors
    ///
    /// When the tools are missing, a target does not build, or an input fails.
    pub fn run(&self) -> Result<()> {
        let folder = crate::tidy::repository_root().join("fuzz");
        check_tools(&folder)?;
        let manifest = std::fs::read_to_string(folder.join("Cargo.toml"))?;
        let all = targets(&manifest);
        for name in &self.targets {
            ensure!(
                all.contains(name),
                "no target is called {name}; there are {}",
                all.join(", ")
            );
        }
        let chosen = if self.targets.is_empty() {
            &all
        } else {
            &self.targets
        };
        let mut report = format!(
            "# Fuzzing\n\n`cargo xtask fuzz --budget {}`.\n\n| target | executions | edges covered | peak MiB | findings |\n\
             |---|---:|---:|---:|---|\n",
            self.budget
        );
        let mut findings = 0;
        for target in chosen {
            let found = fuzz(&folder, target, self.budget)?;
            findings += found.artifacts.len();
            let Found {
                executions,
                coverage,
                peak_mib,
                artifacts,
            } = found;
            let artifacts = if artifacts.is_empty() {
                "none".to_owned()
            } else {
                artifacts.join(", ")
            };
            writeln!(
                report,
                "| {target} | {executions} | {coverage} | {peak_mib} | {artifacts} |"
            )?;
        }
        println!("{report}");
        if let Some(path) = &self.out {
            std::fs::write(path, &report).with_context(|| format!("write {}", path.display()))?;
        }
        ensure!(
            findings == 0,
            "{findings} inputs failed; each becomes a regression test"
        );
        Ok(())
    }
}

fn check_tools(folder: &Path) -> Result<()> {
    let works = Command::new("cargo")
        .args(["+nightly", "fuzz", "--version"])
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    ensure!(
        works,
        "fuzzing needs a nightly compiler and cargo-fuzz: `rustup toolchain install nightly` and \
         `cargo install cargo-fuzz`"
    );
    Ok(())
}

/// The programs of the manifest.
fn targets(manifest: &str) -> Vec<String> {
    manifest
        .split("[[bin]]")
        .skip(1)
        .filter_map(|table| {
            let line = table
                .lines()
                .find_map(|line| line.strip_prefix("name = "))?;
            Some(line.trim_matches('"').to_owned())
        })
        .collect()
}

fn fuzz(folder: &Path, target: &str, seconds: u64) -> Result<Found> {
    eprintln!("{target}: {seconds} s");
    // What libFuzzer finds worth keeping goes below what git ignores.
    let corpus = format!("target/corpus/{target}");
    std::fs::create_dir_all(folder.join(&corpus))?;
    let mut command = Command::new("cargo");
    command
        .current_dir(folder)
        // This chore's own toolchain must not be passed on.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .args(["+nightly", "fuzz", "run", target, &corpus])
        .arg(format!("seeds/{target}"))
        .args(["--", "-print_final_stats=1"])
        .arg(format!("-max_total_time={seconds}"));
    if std::env::var_os("TMPDIR").is_none() && Path::new("/dev/shm").is_dir() {
        // One target makes directories, and memory is the fastest place for them.
        command.env("TMPDIR", "/dev/shm");
    }
    let output = command
        .stdout(Stdio::null())
        .output()
        .context("start cargo fuzz")?;
    let text = String::from_utf8_lossy(&output.stderr);
    let found = read_output(&text);
    ensure!(
        output.status.success() || !found.artifacts.is_empty(),
        "cargo fuzz run {target}: {}\n{text}",
        output.status
    );
    Ok(found)
}

fn read_output(text: &str) -> Found {
    let mut found = Found::default();
    let number = |word: &str| word.trim().parse().unwrap_or(0);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("stat::number_of_executed_units:") {
            found.executions = number(rest);
        } else if let Some(rest) = line.strip_prefix("stat::peak_rss_mb:") {
            found.peak_mib = number(rest);
        } else if let Some((_, path)) = line.split_once("Test unit written to ") {
            found.artifacts.push(path.trim().to_owned());
        } else if let Some((_, rest)) = line.split_once(" cov: ") {
            let reached = number(rest.split(' ').next().unwrap_or(""));
            found.coverage = found.coverage.max(reached);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_a_manifest() {
        let manifest = "[package]\nname = \"no\"\n\n[[bin]]\nname = \"a\"\npath = \"x\"\n\n[[bin]]\nname = \"b\"\n";
        assert_eq!(targets(manifest), ["a", "b"]);
    }

    #[test]
    fn what_libfuzzer_says_is_read() {
        let text = "#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 40Mb\n\
                    #99\tDONE   cov: 311 ft: 900 corp: 9/9b\n\
                    Test unit written to /a/crash-1\n\
                    stat::number_of_executed_units: 99\nstat::peak_rss_mb:              52\n";
        let wanted = Found {
            executions: 99,
            coverage: 311,
            peak_mib: 52,
            artifacts: vec!["/a/crash-1".to_owned()],
        };
        assert_eq!(read_output(text), wanted);
        assert_eq!(read_output(""), Found::default());
    }
}
