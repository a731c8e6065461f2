//! `cargo xtask tidy`: the invariants of `docs/ARCHITECTURE.md` and of the house style that a machine can check.
//!
//! Each check is a pure function from what it looks at (a dependency tree, the text of a file) to
//! violations, tried on good and bad inputs in its own tests; `checks` feeds it the repository.

mod dependencies;
mod documents;
mod inventory;
mod source;
mod sources;
mod tracked;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// One place where the repository breaks one invariant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// The invariant, in one sentence.
    pub invariant: &'static str,
    /// A crate, or a file with a line number.
    pub place: String,
    /// What stands there, and what to do about it.
    pub found: String,
}

impl Violation {
    fn new(invariant: &'static str, place: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            invariant,
            place: place.into(),
            found: found.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} [{}]", self.place, self.found, self.invariant)
    }
}

/// One named check over a repository.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// What the check looks at.
    pub name: &'static str,
    /// Runs it on the repository at a path.
    pub run: fn(&Path) -> Result<Vec<Violation>>,
}

/// The checks of the architecture: dependency trees and Rust sources.
pub const ARCHITECTURE: &[Check] = &[
    Check {
        name: "dependencies between the crates",
        run: dependencies::check_directions,
    },
    Check {
        name: "dependency trees of the bottom crates",
        run: dependencies::check_trees,
    },
    Check {
        name: "command-line dependencies",
        run: dependencies::check_command_line,
    },
    Check {
        name: "unsafe code",
        run: sources::check_unsafe,
    },
    Check {
        name: "inventory of unsafe code",
        run: inventory::check,
    },
    Check {
        name: "vocabulary of tensora-io",
        run: sources::check_vocabulary,
    },
    Check {
        name: "purity of tensora-heuristics",
        run: sources::check_purity,
    },
];

/// The checks of the rest of the house: manifests, documents, tracked files.
pub const HOUSEKEEPING: &[Check] = &[
    Check {
        name: "package manifests",
        run: documents::check_manifests,
    },
    Check {
        name: "root files",
        run: documents::check_root_files,
    },
    Check {
        name: "links in documents",
        run: documents::check_links,
    },
    Check {
        name: "tracked files",
        run: tracked::check,
    },
];

/// Runs every check and prints what each found.
///
/// # Errors
///
/// When an invariant is broken, or when a check cannot run.
pub fn run() -> Result<()> {
    let root = repository_root();
    let mut broken = 0;
    for check in ARCHITECTURE.iter().chain(HOUSEKEEPING) {
        let violations = (check.run)(&root).with_context(|| format!("check of {}", check.name))?;
        println!(
            "{:>4}  {}",
            if violations.is_empty() { "ok" } else { "FAIL" },
            check.name
        );
        for violation in &violations {
            println!("      {violation}");
        }
        broken += violations.len();
    }
    if broken > 0 {
        bail!("{broken} violations");
    }
    Ok(())
}

/// Writes what is generated from the sources: the inventory of unsafe code.
///
/// # Errors
///
/// When a source cannot be read, or the inventory not be written.
pub fn write() -> Result<()> {
    inventory::write(&repository_root())
}

/// The root of this repository.
pub fn repository_root() -> PathBuf {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.parent().unwrap_or(manifest_dir).to_path_buf()
}
