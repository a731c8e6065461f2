//! Who may depend on whom, asked of `cargo metadata` and `cargo tree`.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Violation;

const DIRECTION: &str =
    "dependencies point downwards: cli > tensora, measure > convert, heuristics > formats, io";
const SMALL_TREES: &str =
    "a crate used alone, with one backend, brings in that backend's dependencies and nothing else";
const NO_COMMAND_LINE: &str = "the libraries stay free of command-line dependencies";

/// The siblings that each library may depend on, in any dependency section.
///
/// Development dependencies count too: a cycle through them makes a crate impossible to publish.
const SIBLINGS: &[(&str, &[&str])] = &[
    ("tensora-io", &[]),
    ("tensora-formats", &[]),
    ("tensora-heuristics", &["tensora-io"]),
    ("tensora-measure", &["tensora-io"]),
    ("tensora-convert", &["tensora-formats", "tensora-io"]),
    (
        "tensora",
        &[
            "tensora-convert",
            "tensora-formats",
            "tensora-heuristics",
            "tensora-io",
        ],
    ),
    ("tensora-cli", &["tensora", "tensora-measure"]),
];

/// Crates that serve a command line and have no place in a library.
const COMMAND_LINE: &[&str] = &[
    "anyhow",
    "clap",
    "comfy-table",
    "console",
    "env_logger",
    "indicatif",
    "tracing-subscriber",
];

/// What a procedural macro brings in.
const MACROS: &[&str] = &["proc-macro2", "quote", "syn", "unicode-ident"];
/// What `tensora-io` depends on directly, whatever its features.
const IO_BASE: &[&str] = &[
    "bytes",
    "futures-core",
    "libc",
    "rustix",
    "thiserror",
    "tracing",
];
/// What those bring in. `errno` serves rustix where it makes no system calls itself.
const IO_BASE_INDIRECT: &[&str] = &[
    "bitflags",
    "errno",
    "linux-raw-sys",
    "once_cell",
    "pin-project-lite",
    "thiserror-impl",
    "tracing-core",
];

/// What one way of building one crate may bring in on Linux.
struct Tree {
    package: &'static str,
    feature: Option<&'static str>,
    /// Direct dependencies, exactly, apart from the base of `tensora-io`.
    direct: &'static [&'static str],
    /// Their own dependencies, at most.
    indirect: &'static [&'static str],
}

const TREES: &[Tree] = &[
    Tree {
        package: "tensora-io",
        feature: None,
        direct: &[],
        indirect: &[],
    },
    Tree {
        package: "tensora-io",
        feature: Some("sync"),
        direct: &[],
        indirect: &[],
    },
    Tree {
        package: "tensora-io",
        feature: Some("async"),
        direct: &["tokio"],
        indirect: &[],
    },
    Tree {
        package: "tensora-io",
        feature: Some("io-uring"),
        direct: &["io-uring"],
        indirect: &["cfg-if"],
    },
    Tree {
        package: "tensora-io",
        feature: Some("mmap"),
        direct: &["memmap2"],
        indirect: &[],
    },
    Tree {
        package: "tensora-io",
        feature: Some("profiles"),
        direct: &["serde", "serde_json"],
        indirect: &["itoa", "memchr", "serde_core", "serde_derive", "zmij"],
    },
    Tree {
        package: "tensora-formats",
        feature: None,
        direct: &["serde", "serde_json", "thiserror"],
        indirect: &[
            "itoa",
            "memchr",
            "ryu",
            "serde_core",
            "serde_derive",
            "thiserror-impl",
            "zmij",
        ],
    },
];

impl Tree {
    fn judge(&self, found: &[Dependency]) -> Vec<Violation> {
        let io = self.package == "tensora-io";
        let place = match self.feature {
            Some(feature) => format!("{} with only `{feature}`", self.package),
            None => format!("{} without features", self.package),
        };
        let base = if io { IO_BASE } else { &[] };
        let base_indirect = if io { IO_BASE_INDIRECT } else { &[] };
        let wanted: BTreeSet<&str> = base.iter().chain(self.direct).copied().collect();
        let direct: BTreeSet<&str> = found
            .iter()
            .filter(|d| d.depth == 1)
            .map(|d| d.name.as_str())
            .collect();
        let allowed: BTreeSet<&str> = wanted
            .iter()
            .chain(self.indirect)
            .chain(base_indirect)
            .chain(MACROS)
            .copied()
            .collect();
        let all: BTreeSet<&str> = found.iter().map(|d| d.name.as_str()).collect();

        let mut violations = Vec::new();
        for name in direct.difference(&wanted) {
            let found = format!("depends on {name}, which is not among {wanted:?}");
            violations.push(Violation::new(SMALL_TREES, &place, found));
        }
        for name in wanted.difference(&direct) {
            let found = format!("no longer depends on {name}: take it out of this check");
            violations.push(Violation::new(SMALL_TREES, &place, found));
        }
        for name in all
            .difference(&allowed)
            .filter(|name| !direct.contains(*name))
        {
            let found =
                format!("brings in {name} indirectly; `cargo tree -i {name}` says through whom");
            violations.push(Violation::new(SMALL_TREES, &place, found));
        }
        violations
    }
}

/// One line of `cargo tree --prefix depth`.
#[derive(Debug, PartialEq, Eq)]
struct Dependency {
    depth: usize,
    name: String,
}

fn parse_tree(text: &str) -> Result<Vec<Dependency>> {
    let parse = |line: &str| {
        let digits = line.find(|c: char| !c.is_ascii_digit())?;
        let name = line[digits..].split_whitespace().next()?;
        Some(Dependency {
            depth: line[..digits].parse().ok()?,
            name: name.to_owned(),
        })
    };
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| parse(line).with_context(|| format!("line of cargo tree: {line:?}")))
        .collect()
}

/// The part of `cargo metadata` that the checks need.
#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    pub(super) packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) description: Option<String>,
    pub(super) license: Option<String>,
    pub(super) manifest_path: std::path::PathBuf,
    dependencies: Vec<Requirement>,
}

#[derive(Debug, Deserialize)]
struct Requirement {
    name: String,
    /// `null` for an ordinary dependency.
    kind: Option<String>,
}

pub(super) fn metadata(root: &Path) -> Result<Metadata> {
    let text = cargo(root, &["metadata", "--no-deps", "--format-version", "1"])?;
    serde_json::from_str(&text).context("output of cargo metadata")
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let command = format!("cargo {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .output()
        .with_context(|| format!("start {command}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command}: {}\n{errors}",
        output.status
    );
    String::from_utf8(output.stdout).with_context(|| format!("output of {command}"))
}

fn judge_directions(packages: &[Package]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (name, allowed) in SIBLINGS {
        let Some(package) = packages.iter().find(|package| package.name == *name) else {
            violations.push(Violation::new(
                DIRECTION,
                *name,
                "the crate is missing from the workspace",
            ));
            continue;
        };
        for requirement in &package.dependencies {
            let sibling = SIBLINGS
                .iter()
                .any(|(sibling, _)| *sibling == requirement.name);
            if sibling && !allowed.contains(&requirement.name.as_str()) {
                let kind = requirement.kind.as_deref().unwrap_or("normal");
                let found = format!(
                    "{kind} dependency on {}; allowed: {allowed:?}",
                    requirement.name
                );
                violations.push(Violation::new(DIRECTION, *name, found));
            }
        }
    }
    for package in packages {
        let crate_name = package.name.starts_with("tensora") && package.name != "tensora-benches";
        if crate_name && !SIBLINGS.iter().any(|(name, _)| *name == package.name) {
            let found = "a new crate: say in this check what it may depend on";
            violations.push(Violation::new(DIRECTION, &package.name, found));
        }
    }
    violations
}

fn judge_command_line(package: &str, found: &[Dependency]) -> Vec<Violation> {
    found
        .iter()
        .filter(|dependency| COMMAND_LINE.contains(&dependency.name.as_str()))
        .map(|dependency| {
            let found = format!(
                "brings in {}; it belongs into tensora-cli or xtask",
                dependency.name
            );
            Violation::new(NO_COMMAND_LINE, package, found)
        })
        .collect()
}

/// Dependencies between the workspace's crates point one way.
pub(super) fn check_directions(root: &Path) -> Result<Vec<Violation>> {
    Ok(judge_directions(&metadata(root)?.packages))
}

/// A bottom crate built with one backend pulls in that backend's dependencies only.
pub(super) fn check_trees(root: &Path) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for tree in TREES {
        let mut arguments = vec!["-p", tree.package, "--no-default-features"];
        arguments.extend(
            tree.feature
                .iter()
                .flat_map(|feature| ["--features", feature]),
        );
        violations.extend(tree.judge(&normal_tree(root, &arguments)?));
    }
    Ok(violations)
}

/// No library pulls in what only a command line needs.
pub(super) fn check_command_line(root: &Path) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for (package, _) in SIBLINGS.iter().filter(|(name, _)| *name != "tensora-cli") {
        let found = normal_tree(root, &["-p", package, "--all-features"])?;
        violations.extend(judge_command_line(package, &found));
    }
    Ok(violations)
}

/// The normal dependencies on Linux, which is where all backends exist.
fn normal_tree(root: &Path, arguments: &[&str]) -> Result<Vec<Dependency>> {
    let mut all = vec!["tree", "--edges", "normal", "--prefix", "depth"];
    all.extend(["--target", "x86_64-unknown-linux-gnu"]);
    all.extend(arguments);
    let mut found = parse_tree(&cargo(root, &all)?)?;
    ensure!(!found.is_empty(), "cargo {} printed nothing", all.join(" "));
    // The first line is the crate itself.
    found.remove(0);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Package {
        let dependencies = dependencies
            .iter()
            .map(|(name, kind)| Requirement {
                name: (*name).into(),
                kind: kind.map(Into::into),
            })
            .collect();
        Package {
            name: name.into(),
            description: None,
            license: None,
            manifest_path: "Cargo.toml".into(),
            dependencies,
        }
    }

    fn workspace() -> Vec<Package> {
        SIBLINGS
            .iter()
            .map(|(name, allowed)| {
                let dependencies: Vec<_> = allowed.iter().map(|name| (*name, None)).collect();
                package(name, &dependencies)
            })
            .collect()
    }

    #[test]
    fn the_intended_directions_pass() {
        assert_eq!(judge_directions(&workspace()), []);
    }

    #[test]
    fn an_upward_dependency_is_found_in_every_section() {
        for kind in [None, Some("dev"), Some("build")] {
            let mut packages = workspace();
            packages[0] = package("tensora-io", &[("bytes", None), ("tensora-formats", kind)]);
            let violations = judge_directions(&packages);
            assert_eq!(violations.len(), 1, "{kind:?}");
            assert_eq!(violations[0].place, "tensora-io");
            assert!(
                violations[0].found.contains("tensora-formats"),
                "{}",
                violations[0]
            );
        }
    }

    #[test]
    fn a_missing_and_an_unknown_crate_are_found() {
        let mut packages = workspace();
        packages.remove(0);
        packages.push(package("tensora-gpu", &[]));
        let places: Vec<_> = judge_directions(&packages)
            .into_iter()
            .map(|v| v.place)
            .collect();
        assert_eq!(places, ["tensora-io", "tensora-gpu"]);
    }

    fn io_tree(extra: &str) -> Vec<Dependency> {
        parse_tree(&format!(
            "1bytes v1.12.2\n1futures-core v0.3.31\n1libc v0.2.0\n1rustix v1.1.6\n2bitflags v2.13.2\n1thiserror v2.0.21\n\
             2thiserror-impl v2.0.21 (proc-macro)\n3syn v3.0.10\n1tracing v0.1.44\n{extra}"
        ))
        .unwrap()
    }

    #[test]
    fn one_backend_brings_in_only_its_own() {
        let [none, _, tokio, ..] = TREES else {
            panic!("the table starts with tensora-io")
        };
        assert_eq!(none.judge(&io_tree("")), []);
        assert_eq!(tokio.judge(&io_tree("1tokio v1.54.1\n")), []);

        let found = none.judge(&io_tree("1tokio v1.54.1\n"));
        assert_eq!(found.len(), 1);
        assert!(found[0].found.contains("depends on tokio"), "{}", found[0]);

        let found = none.judge(&io_tree("2openssl v0.1.0\n"));
        assert_eq!(found.len(), 1);
        assert!(
            found[0].found.contains("openssl indirectly"),
            "{}",
            found[0]
        );

        let found = tokio.judge(&io_tree(""));
        assert_eq!(found.len(), 1);
        assert!(
            found[0].found.contains("no longer depends on tokio"),
            "{}",
            found[0]
        );
    }

    #[test]
    fn command_line_dependencies_are_found_at_any_depth() {
        assert_eq!(judge_command_line("tensora", &io_tree("")), []);
        let found = judge_command_line("tensora", &io_tree("3clap v4.5.0\n"));
        assert_eq!(found.len(), 1);
        assert!(found[0].found.contains("clap"), "{}", found[0]);
    }

    #[test]
    fn a_line_that_is_no_tree_is_an_error() {
        assert!(parse_tree("bytes v1\n").is_err());
        assert!(parse_tree("1\n").is_err());
    }
}
