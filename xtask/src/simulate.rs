//! `cargo xtask simulate`: the tests in which reads go wrong, for as long as one likes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

/// The crates that have a test called `simulation`.
const PACKAGES: [&str; 2] = ["tensora-io", "tensora"];
/// Seeds per run of a test: some seconds of work, so that a budget is kept.
const SEEDS_AT_ONCE: u64 = 5000;

/// Arguments of `cargo xtask simulate`.
#[derive(Debug, Args)]
pub struct SimulateArguments {
    /// How many seeds each test runs
    #[arg(
        long,
        value_name = "N",
        default_value_t = 20_000,
        conflicts_with = "budget"
    )]
    seeds: u64,
    /// How many seconds each test runs, instead; the last round is finished
    #[arg(long, value_name = "S")]
    budget: Option<u64>,
    /// The first seed
    #[arg(long, value_name = "N", default_value_t = 1)]
    first: u64,
    /// Write the table into this file, too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// What a test counted, added up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    seeds: u64,
    counts: BTreeMap<String, u64>,
}

impl SimulateArguments {
    /// Runs each test, round after round.
    ///
    /// # Errors
    ///
    /// When a seed fails: the output says which.
    pub fn run(&self) -> Result<()> {
        let mut report = "# Simulation\n\n| crate | seeds | seconds | what was done, what went wrong, how it ended |\n\
                          |---|---:|---:|---|\n"
            .to_owned();
        for package in PACKAGES {
            let begun = Instant::now();
            let mut tally = Tally::default();
            loop {
                let left = match self.budget {
                    Some(seconds) if begun.elapsed() >= Duration::from_secs(seconds) => break,
                    Some(_) => SEEDS_AT_ONCE,
                    None => (self.seeds - tally.seeds).min(SEEDS_AT_ONCE),
                };
                if left == 0 {
                    break;
                }
                let first = self.first.wrapping_add(tally.seeds);
                tally.add(&simulate(package, first, left)?)?;
                eprintln!("{package}: {} seeds from {} on", tally.seeds, self.first);
            }
            let counts: Vec<String> = tally
                .counts
                .iter()
                .map(|(name, count)| format!("{name} {count}"))
                .collect();
            writeln!(
                report,
                "| {package} | {} | {:.0} | {} |",
                tally.seeds,
                begun.elapsed().as_secs_f64(),
                counts.join(", ")
            )?;
        }
        println!("{report}");
        if let Some(path) = &self.out {
            std::fs::write(path, &report).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Runs so many seeds, and returns the line in which the test says what it did.
fn simulate(package: &str, first: u64, seeds: u64) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(crate::tidy::repository_root())
        .args(["test", "--quiet", "--all-features", "--package", package])
        .args(["--test", "simulation", "--", "--nocapture"])
        .env("TENSORA_SEED", first.to_string())
        .env("TENSORA_SIMULATION_SEEDS", seeds.to_string())
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("the simulation of {package} failed:\n{text}");
    }
    let said = text.lines().find(|line| line.contains(" seeds from "));
    Ok(said
        .context("the simulation does not say what it did")?
        .to_owned())
}

impl Tally {
    /// Adds a line such as `500 seeds from 1: 900 operations; {Busy: 3}; {Right: 500}`.
    fn add(&mut self, line: &str) -> Result<()> {
        let (seeds, rest) = line.split_once(" seeds from ").context("no seeds")?;
        // The harness may have begun the line.
        let seeds = seeds.rsplit(|c: char| !c.is_ascii_digit()).next();
        self.seeds += seeds.unwrap_or("").parse::<u64>()?;
        let (_, lists) = rest.split_once(": ").context("no counts")?;
        for list in lists.split(';') {
            for count in list.trim().trim_matches(['{', '}']).split(", ") {
                let (name, count) = match (count.split_once(": "), count.split_once(' ')) {
                    (Some(pair), _) => pair,
                    (None, Some((count, name))) => (name, count),
                    (None, None) => continue,
                };
                *self.counts.entry(name.to_owned()).or_default() += count.parse::<u64>()?;
            }
        }
        ensure!(self.seeds > 0, "no seed was run");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tests_say_is_added_up() {
        let mut tally = Tally::default();
        tally
            .add("500 seeds from 1: 900 operations; {Busy: 3, Delay: 0}; {Right: 500}")
            .unwrap();
        tally
            .add("test a ... 20 seeds from 501: {Load: 7}; {Busy: 4}; {}")
            .unwrap();
        assert_eq!(tally.seeds, 520);
        let counts: Vec<_> = tally
            .counts
            .iter()
            .map(|(name, &count)| (name.as_str(), count))
            .collect();
        let wanted = [
            ("Busy", 7),
            ("Delay", 0),
            ("Load", 7),
            ("Right", 500),
            ("operations", 900),
        ];
        assert_eq!(counts, wanted);
        assert!(tally.add("nothing").is_err());
    }
}
