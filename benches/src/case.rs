//! What is timed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// On which side of the comparison a case stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaseKind {
    /// Into small buffers used again: the device's ceiling, for orientation.
    Ceiling,
    /// A hand-written read into kept huge pages: what loads are measured against.
    Raw,
    /// A load by Tensora, owned memory.
    Owned,
    /// A load by Tensora, mapped memory.
    Mapped,
}

/// One way of reading a checkpoint.
#[derive(Clone, Debug)]
pub struct Case {
    /// How it is called in tables.
    pub name: String,
    /// On which side it stands.
    pub kind: CaseKind,
    arguments: Vec<String>,
}

/// What the process printed about itself.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Printed {
    pub(crate) elapsed_seconds: f64,
    pub(crate) data_bytes: u64,
    pub(crate) peak_resident_bytes: u64,
}

impl Case {
    /// The raw reads, and Tensora with every backend named, left to itself, and allowed to map.
    pub fn all() -> Vec<Self> {
        let case = |name: &str, kind, arguments: &[&str]| Self {
            name: name.to_owned(),
            kind,
            arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
        };
        vec![
            case("ceiling", CaseKind::Ceiling, &["ceiling"]),
            case("raw threads", CaseKind::Raw, &["threads"]),
            case("raw rings", CaseKind::Raw, &["rings"]),
            case("auto", CaseKind::Owned, &["--memory", "owned"]),
            case(
                "sync",
                CaseKind::Owned,
                &["--memory", "owned", "--backend", "sync"],
            ),
            case(
                "async",
                CaseKind::Owned,
                &["--memory", "owned", "--backend", "async"],
            ),
            case(
                "io-uring",
                CaseKind::Owned,
                &["--memory", "owned", "--backend", "io-uring"],
            ),
            case(
                "mmap",
                CaseKind::Owned,
                &["--memory", "owned", "--backend", "mmap"],
            ),
            case(
                "auto, mapping allowed",
                CaseKind::Mapped,
                &["--memory", "auto"],
            ),
        ]
    }

    /// Runs it once, as a process of its own.
    pub(crate) fn run(
        &self,
        programs: &Path,
        checkpoint: &Path,
        files: &[PathBuf],
    ) -> Result<Printed> {
        let mut command;
        match self.kind {
            CaseKind::Ceiling | CaseKind::Raw => {
                command = Command::new(programs.join("examples").join("raw_read"));
                command.args(&self.arguments).args(files);
            }
            CaseKind::Owned | CaseKind::Mapped => {
                command = Command::new(programs.join("tensora"));
                command
                    .arg("load")
                    .arg(checkpoint)
                    .arg("--json")
                    .args(&self.arguments);
            }
        }
        let output = command
            .output()
            .with_context(|| format!("start {command:?}"))?;
        if !output.status.success() {
            bail!(
                "{command:?} failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("what {command:?} printed"))
    }
}
