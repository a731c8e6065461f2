//! `cargo xtask features`: every combination of cargo features compiles, and without warnings.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::tidy::repository_root;

const BACKENDS: [&str; 4] = ["sync", "async", "io-uring", "mmap"];

/// One call of `cargo check`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Combination {
    package: &'static str,
    features: Vec<&'static str>,
    target: Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// This machine as it is.
    Host,
    /// This machine without what only Linux has: the code that other platforms get.
    Portable,
}

/// Every subset of the backends for `tensora-io`; for the layers above, each backend alone, none
/// and all, with and without what does not depend on the backend.
fn combinations() -> Vec<Combination> {
    let host = |package, features| Combination {
        package,
        features,
        target: Target::Host,
    };
    let mut all: Vec<Combination> = (0..1 << BACKENDS.len())
        .map(|bits: u32| {
            let chosen = BACKENDS
                .iter()
                .enumerate()
                .filter(|(i, _)| bits & (1 << i) != 0);
            host("tensora-io", chosen.map(|(_, backend)| *backend).collect())
        })
        .collect();
    all.push(host(
        "tensora-io",
        ["serde", "profiles", "testing"]
            .into_iter()
            .chain(BACKENDS)
            .collect(),
    ));
    all.push(host("tensora-io", vec!["profiles"]));
    all.push(host("tensora-io", vec!["shared"]));
    all.push(host("tensora-io", vec!["shared", "sync", "serde"]));

    let mut rows: Vec<Vec<&str>> = BACKENDS.iter().map(|backend| vec![*backend]).collect();
    rows.push(Vec::new());
    rows.push(BACKENDS.to_vec());
    for row in rows {
        all.push(host("tensora", row.clone()));
        all.push(host(
            "tensora",
            row.into_iter().chain(["convert"]).collect(),
        ));
    }
    all.push(host("tensora", vec!["sync", "safetensors"]));
    all.push(host("tensora", vec!["shared"]));
    all.push(host("tensora", vec!["sync", "shared", "convert"]));
    for package in [
        "tensora-formats",
        "tensora-heuristics",
        "tensora-convert",
        "tensora-measure",
        "tensora-cli",
    ] {
        all.push(host(package, Vec::new()));
    }
    for features in [Vec::new(), BACKENDS.to_vec(), vec!["sync", "shared"]] {
        all.push(Combination {
            package: "tensora-io",
            features,
            target: Target::Portable,
        });
    }
    all
}

/// Runs `cargo check` for every combination and prints one line for each.
///
/// # Errors
///
/// When a combination does not compile, or compiles with warnings.
pub fn run() -> Result<()> {
    let root = repository_root();
    let combinations = combinations();
    let mut broken = Vec::new();
    for combination in &combinations {
        let started = Instant::now();
        let problems = combination.check(&root)?;
        let verdict = if problems.is_empty() { "ok" } else { "FAIL" };
        println!(
            "{verdict:>4}  {} ({:.1} s)",
            combination.label(),
            started.elapsed().as_secs_f64()
        );
        if !problems.is_empty() {
            println!("{}", problems.join("\n"));
            broken.push(combination.label());
        }
    }
    if !broken.is_empty() {
        bail!(
            "{} of {} combinations fail: {}",
            broken.len(),
            combinations.len(),
            broken.join("; ")
        );
    }
    println!(
        "{} combinations compile without warnings",
        combinations.len()
    );
    Ok(())
}

impl Combination {
    fn label(&self) -> String {
        let features = if self.features.is_empty() {
            "none".into()
        } else {
            self.features.join(",")
        };
        let target = match self.target {
            Target::Host => "",
            Target::Portable => ", portable code path",
        };
        format!("{} with {features}{target}", self.package)
    }

    /// The rendered errors and warnings of the workspace's own crates.
    fn check(&self, root: &Path) -> Result<Vec<String>> {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(program);
        command
            .args([
                "check",
                "--quiet",
                "--message-format",
                "json",
                "--no-default-features",
            ])
            .args(["-p", self.package, "--features", &self.features.join(",")])
            .current_dir(root);
        if self.target == Target::Portable {
            // A folder of its own, so that the other flags do not rebuild everything twice.
            let target = std::env::var_os("CARGO_TARGET_DIR")
                .map_or_else(|| root.join("target"), |folder| root.join(folder));
            command
                .env("RUSTFLAGS", "--cfg tensora_portable")
                .env("CARGO_TARGET_DIR", target.join("portable"));
        }
        let output = command
            .output()
            .with_context(|| format!("start {command:?}"))?;
        let problems = problems(&String::from_utf8_lossy(&output.stdout));
        if problems.is_empty() {
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "{}: {}\n{errors}",
                self.label(),
                output.status
            );
        }
        Ok(problems)
    }
}

/// A line of cargo's JSON messages.
#[derive(Deserialize)]
struct Message {
    message: Option<Diagnostic>,
}

#[derive(Deserialize)]
struct Diagnostic {
    level: String,
    rendered: Option<String>,
}

/// Cargo caps the lints of foreign crates, so what is left are errors and this workspace's warnings.
fn problems(messages: &str) -> Vec<String> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.message)
        .filter(|diagnostic| diagnostic.level.starts_with("error") || diagnostic.level == "warning")
        .filter_map(|diagnostic| diagnostic.rendered)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_subset_of_backends_is_tried_once() {
        let subsets: Vec<_> = combinations()
            .into_iter()
            .filter(|c| c.package == "tensora-io" && c.target == Target::Host)
            .filter(|c| c.features.iter().all(|feature| BACKENDS.contains(feature)))
            .map(|c| c.features.into_iter().collect::<BTreeSet<_>>())
            .collect();
        assert_eq!(subsets.len(), 16);
        assert_eq!(subsets.iter().collect::<BTreeSet<_>>().len(), 16);
    }

    #[test]
    fn warnings_and_errors_count_and_notes_do_not() {
        let line = |level: &str| {
            format!(
                r#"{{"reason":"compiler-message","message":{{"level":"{level}","rendered":"{level}!"}}}}"#
            )
        };
        let text = [
            "warning",
            "error",
            "error: internal compiler error",
            "note",
            "failure-note",
        ]
        .map(line)
        .join("\n");
        let text = format!("{{\"reason\":\"compiler-artifact\"}}\nnot json\n{text}");
        assert_eq!(
            problems(&text),
            ["warning!", "error!", "error: internal compiler error!"]
        );
    }
}
