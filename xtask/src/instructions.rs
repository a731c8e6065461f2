//! `cargo xtask instructions`: how many instructions the work takes that the processor bounds.
//!
//! Times differ from run to run and from machine to machine; counts of instructions hardly do, so that a
//! change of a few per cent shows.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use tensora_benches::{CpuCase, write_cpu_fixtures};

use crate::tidy::repository_root;

/// The most instructions that a case may take, as a multiple of what the `safetensors` crate takes to parse
/// the same headers.
const MOST_OF_REFERENCE: f64 = 1.5;

/// The function in which callgrind counts: [`tensora_benches::PreparedCase::run`], however it is mangled.
const COUNTED_FUNCTION: &str = "*PreparedCase*run";

/// Arguments of `cargo xtask instructions`.
#[derive(Debug, Args)]
pub struct InstructionsArguments {
    /// Which cases to count; all of them if none is named
    #[arg(value_name = "CASE")]
    cases: Vec<String>,
    /// Print JSON in place of a table
    #[arg(long)]
    json: bool,
    /// Fail if a case takes more than 1.5 times the instructions of the safetensors crate
    #[arg(long)]
    check: bool,
}

/// What was counted, and with what.
#[derive(Debug, Serialize)]
struct Counts {
    valgrind: String,
    rustc: String,
    processor_architecture: &'static str,
    cases: Vec<Count>,
}

#[derive(Debug, Serialize)]
struct Count {
    name: &'static str,
    instructions: u64,
    /// What the `safetensors` crate takes for the same headers.
    #[serde(skip_serializing_if = "Option::is_none")]
    reference_instructions: Option<u64>,
}

impl Count {
    fn ratio(&self) -> Option<f64> {
        Some(self.instructions as f64 / self.reference_instructions? as f64)
    }
}

impl InstructionsArguments {
    /// Builds the cases for release, runs each once under callgrind, and prints what it counted.
    ///
    /// # Errors
    ///
    /// When valgrind is not installed, when something cannot be built or run, or, with `--check`, when a
    /// case takes too many instructions.
    pub fn run(&self) -> Result<()> {
        let cases = self.selected()?;
        let valgrind = version(Command::new("valgrind")).context(
            "valgrind cannot be started: install it (`apt-get install valgrind` on Debian and Ubuntu)",
        )?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let rustc = version(Command::new(rustc)).context("ask rustc for its version")?;

        let root = repository_root();
        let mut build = Command::new(cargo);
        build
            .current_dir(&root)
            .args(["build", "--release", "--quiet"])
            .args(["--package", "tensora-benches", "--bin", "cpu_bound"]);
        let status = build.status().context("start cargo")?;
        ensure!(status.success(), "{build:?} failed: {status}");
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let program = target.join("release").join("cpu_bound");
        let fixtures = target.join("cpu-bound");
        write_cpu_fixtures(&fixtures)?;

        let count = |case: &CpuCase| {
            eprintln!("{}", case.name);
            count(&program, &fixtures, case.name)
        };
        let mut counts = Counts {
            valgrind,
            rustc,
            processor_architecture: std::env::consts::ARCH,
            cases: Vec::new(),
        };
        for case in cases {
            let instructions = count(case)?;
            let reference = case.reference.and_then(CpuCase::find);
            counts.cases.push(Count {
                name: case.name,
                instructions,
                reference_instructions: reference.map(count).transpose()?,
            });
        }

        if self.json {
            println!("{}", serde_json::to_string_pretty(&counts)?);
        } else {
            print!("{}", counts.table());
        }
        if self.check {
            counts.check()?;
        }
        Ok(())
    }

    fn selected(&self) -> Result<Vec<&'static CpuCase>> {
        let mut cases: Vec<&CpuCase> = CpuCase::all()
            .iter()
            .filter(|case| !case.mostly_kernel)
            .collect();
        let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
        if let Some(unknown) = self
            .cases
            .iter()
            .find(|name| !names.contains(&name.as_str()))
        {
            bail!(
                "no case is named {unknown:?}; the names are {}",
                names.join(", ")
            );
        }
        if self.cases.is_empty() {
            // Those of the other crate are counted beside ours.
            let references: Vec<&str> = cases.iter().filter_map(|case| case.reference).collect();
            cases.retain(|case| !references.contains(&case.name));
        } else {
            cases.retain(|case| self.cases.iter().any(|name| name == case.name));
        }
        Ok(cases)
    }
}

impl Counts {
    /// As Markdown.
    fn table(&self) -> String {
        let mut text = format!(
            "{}, {}, {}\n\n| case | instructions | safetensors crate | ratio |\n|---|---:|---:|---:|\n",
            self.valgrind, self.rustc, self.processor_architecture
        );
        for count in &self.cases {
            let reference = count.reference_instructions.map(grouped);
            let ratio = count.ratio().map(|ratio| format!("{ratio:.2}"));
            text += &format!(
                "| {} | {} | {} | {} |\n",
                count.name,
                grouped(count.instructions),
                reference.as_deref().unwrap_or("–"),
                ratio.as_deref().unwrap_or("–"),
            );
        }
        text
    }

    fn check(&self) -> Result<()> {
        let missed: Vec<String> = self
            .cases
            .iter()
            .filter_map(|count| {
                let ratio = count.ratio().filter(|ratio| *ratio > MOST_OF_REFERENCE)?;
                Some(format!("{} ({ratio:.2})", count.name))
            })
            .collect();
        ensure!(
            missed.is_empty(),
            "more than {MOST_OF_REFERENCE} times the instructions of the safetensors crate: {}",
            missed.join(", ")
        );
        Ok(())
    }
}

/// What the program says about itself.
fn version(mut command: Command) -> Result<String> {
    let output = command.arg("--version").output()?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a case under callgrind and returns the instructions that its work took.
fn count(program: &Path, fixtures: &Path, name: &str) -> Result<u64> {
    let report = fixtures.join(format!("callgrind.{name}"));
    let mut report_option = std::ffi::OsString::from("--callgrind-out-file=");
    report_option.push(&report);
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--quiet", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={COUNTED_FUNCTION}"))
        .arg(report_option)
        .arg(program)
        .arg("run")
        .arg(fixtures)
        .arg(name);
    let output = command.output().context("start valgrind")?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let text =
        std::fs::read_to_string(&report).with_context(|| format!("read {}", report.display()))?;
    total(&text)
        .filter(|&instructions| instructions > 0)
        .with_context(|| format!("callgrind met no {COUNTED_FUNCTION} in {name}"))
}

/// The sum that a report of callgrind ends with.
fn total(report: &str) -> Option<u64> {
    report
        .lines()
        .find_map(|line| line.strip_prefix("totals:"))?
        .trim()
        .parse()
        .ok()
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(instructions: u64, reference_instructions: Option<u64>) -> Counts {
        Counts {
            valgrind: "valgrind-3.19.0".to_owned(),
            rustc: "rustc 1.95.0".to_owned(),
            processor_architecture: "x86_64",
            cases: vec![Count {
                name: "open",
                instructions,
                reference_instructions,
            }],
        }
    }

    #[test]
    fn the_sum_is_found_in_a_report() {
        let report = "events: Ir\nsummary: 12\n\nfn=(1) a\n1 12\n\ntotals: 12\n";
        assert_eq!(total(report), Some(12));
        assert_eq!(total("events: Ir\n"), None);
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, expected) in [(0, "0"), (999, "999"), (1000, "1,000")] {
            assert_eq!(grouped(number), expected);
        }
        assert_eq!(grouped(1_234_567), "1,234,567");
    }

    #[test]
    fn only_what_takes_too_many_instructions_is_missed() {
        assert!(counted(150, Some(100)).check().is_ok());
        assert!(counted(u64::MAX, None).check().is_ok());
        let error = counted(151, Some(100)).check().unwrap_err().to_string();
        assert!(error.contains("open (1.51)"), "{error}");
        let table = counted(1500, Some(1000)).table();
        assert!(
            table.ends_with("| open | 1,500 | 1,000 | 1.50 |\n"),
            "{table}"
        );
    }

    #[test]
    fn names_are_checked_before_anything_is_built() {
        let arguments = |names: &[&str]| InstructionsArguments {
            cases: names.iter().map(|&name| name.to_owned()).collect(),
            json: false,
            check: false,
        };
        let all = arguments(&[]).selected().unwrap();
        assert!(
            all.iter()
                .all(|case| !case.mostly_kernel && !case.name.ends_with("-crate"))
        );
        let one = arguments(&["plan"]).selected().unwrap();
        assert_eq!(one.len(), 1);
        let error = arguments(&["plan", "flan"]).selected().unwrap_err();
        assert!(error.to_string().contains("\"flan\""), "{error}");
    }
}
