//! What was measured, as it is archived.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tensora::Format;
use tensora::io::{CacheState, Platform, SourceFile, StorageFacts};

use crate::case::CaseKind;
use crate::conversion::ConversionCell;
use crate::peers::PeerFact;
use crate::{Finding, plots};

/// The machine that a run was made on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// Facts about machine and storage.
    pub platform: Platform,
}

/// One call of `cargo xtask bench`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    /// The command line that reproduces it.
    pub command: String,
    /// The commit that was measured, with `-dirty` where the working tree had changes.
    pub revision: String,
}

/// One timed process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Name of the case.
    pub case: String,
    /// On which side it stands.
    pub kind: CaseKind,
    /// The round, from 0.
    pub round: u32,
    /// From the path, or the first open, until every tensor can be used.
    pub elapsed_seconds: f64,
    /// From there until every byte was read once more; absent where nothing is kept that could be read.
    pub touched_seconds: Option<f64>,
    /// The process's peak resident memory, in bytes.
    pub peak_resident_bytes: Option<u64>,
    /// What the planner chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<String>,
    /// What was needed of the files, in bytes, where parts of tensors are loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needed_bytes: Option<u64>,
    /// What was read of them for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes: Option<u64>,
    /// What came from the device, by the kernel's count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
}

/// A case that could not be timed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Name of the case.
    pub case: String,
    /// On which side it stands.
    pub kind: CaseKind,
    /// Why.
    pub reason: String,
}

/// All samples of one checkpoint in one state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// Name of the preset.
    pub preset: String,
    /// Format of the checkpoint.
    pub format: Format,
    /// What the page cache held.
    pub state: CacheState,
    /// Bytes of all tensors.
    pub data_bytes: u64,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// How many files that are.
    pub file_count: usize,
    /// Rounds begun.
    pub rounds: u32,
    /// The samples, in the order in which they were taken.
    pub samples: Vec<Sample>,
    /// Cases that could not be timed; none of their samples is missing silently.
    pub failures: Vec<Failure>,
    /// Why measuring ended before the rounds or the time were over.
    pub cut_short: Option<String>,
}

/// How long opening and planning took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenTimes {
    /// Name of the preset.
    pub preset: String,
    /// How many tensors it has.
    pub tensor_count: usize,
    /// How many files.
    pub file_count: usize,
    /// Each round.
    pub rounds: Vec<OpenRound>,
}

/// One round of opening and planning, in one process, with the headers in the page cache.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct OpenRound {
    /// From the path to validated tensors.
    pub open_seconds: f64,
    /// Reading and parsing the same headers with the `safetensors` crate alone.
    pub crate_seconds: f64,
    /// Opening the files, examining them and the machine, and planning.
    pub probe_and_plan_seconds: f64,
    /// Of that, planning.
    pub plan_seconds: f64,
}

/// Everything that was measured on one machine, perhaps by several calls.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The machine.
    pub host: Host,
    /// The calls, in order.
    pub invocations: Vec<Invocation>,
    /// Versions of the Rust crates that loads are compared with.
    pub versions: BTreeMap<String, String>,
    /// What became of the Python packages, where they were asked for.
    pub peers: BTreeMap<String, PeerFact>,
    /// Loads.
    pub cells: Vec<Cell>,
    /// Opens.
    pub opens: Vec<OpenTimes>,
    /// Conversions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conversions: Vec<ConversionCell>,
}

impl Host {
    /// This machine, with the storage of the folder `path`.
    ///
    /// # Errors
    ///
    /// When there is no file to ask about.
    pub fn here(file: &Path) -> Result<Self> {
        let mut platform = Platform::probe();
        let file = SourceFile::open(file)?;
        platform.storage = Some(StorageFacts::probe(&[&file]));
        Ok(Self { platform })
    }

    /// A short name for the kind of machine, for folder names: processors, memory, file system.
    pub fn kind(&self) -> String {
        let gibibytes = self.platform.memory.total_bytes.unwrap_or(0) >> 30;
        let storage = self.platform.storage.as_ref();
        format!(
            "{}cpu-{gibibytes}gib-{}",
            self.platform.cpus,
            storage.map_or("unknown", |storage| storage.file_system.as_str())
        )
    }
}

impl Cell {
    /// What tells it from other cells.
    pub fn key(&self) -> (&str, Format, CacheState) {
        (&self.preset, self.format, self.state)
    }
}

impl Run {
    /// A run of this machine, of which nothing is measured yet.
    pub fn new(host: Host) -> Self {
        Self {
            host,
            invocations: Vec::new(),
            versions: BTreeMap::new(),
            peers: BTreeMap::new(),
            cells: Vec::new(),
            opens: Vec::new(),
            conversions: Vec::new(),
        }
    }

    /// What is archived in `folder`, to be added to; a new run where nothing is.
    ///
    /// # Errors
    ///
    /// When the archive cannot be read, or is of another machine.
    pub fn resume(folder: &Path, host: Host) -> Result<Self> {
        let path = folder.join("run.json");
        if !path.exists() {
            return Ok(Self::new(host));
        }
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let archived: Self = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is no run of this version of the bench: choose another folder with --out",
                path.display()
            )
        })?;
        let identity = |host: &Host| {
            (
                host.kind(),
                host.platform.kernel.clone(),
                host.platform.processor.clone(),
            )
        };
        let (there, here) = (identity(&archived.host), identity(&host));
        ensure!(
            there == here,
            "{} was measured on another machine ({there:?}, here {here:?}): choose another folder with --out",
            path.display()
        );
        Ok(archived)
    }

    /// The cell of this key, if it was measured.
    pub fn cell(&self, preset: &str, format: Format, state: CacheState) -> Option<&Cell> {
        let key = (preset, format, state);
        self.cells.iter().find(|cell| cell.key() == key)
    }

    /// Adds a cell, in place of an earlier one of the same key.
    pub fn put_cell(&mut self, cell: Cell) {
        match self.cells.iter_mut().find(|old| old.key() == cell.key()) {
            Some(old) => *old = cell,
            None => self.cells.push(cell),
        }
    }

    /// Adds the times of an open, in place of earlier ones of the same preset.
    pub fn put_open(&mut self, open: OpenTimes) {
        match self.opens.iter_mut().find(|old| old.preset == open.preset) {
            Some(old) => *old = open,
            None => self.opens.push(open),
        }
    }

    /// Writes `run.json`, `run.md` and the plots into `folder`.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        #[derive(Serialize)]
        struct Document<'a> {
            #[serde(flatten)]
            run: &'a Run,
            findings: Vec<Finding>,
        }
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let document = Document {
            run: self,
            findings: self.findings(),
        };
        let plots = plots::draw(self);
        let mut files = vec![
            (
                "run.json".to_owned(),
                serde_json::to_string_pretty(&document)?,
            ),
            ("run.md".to_owned(), self.to_markdown(&plots)),
        ];
        files.extend(plots);
        for (name, contents) in files {
            // Whole or not at all: a run that is interrupted here loses nothing.
            let partial = folder.join(format!(".{name}.partial"));
            std::fs::write(&partial, contents)
                .and_then(|()| std::fs::rename(&partial, folder.join(&name)))
                .with_context(|| format!("write {}", folder.join(&name).display()))?;
        }
        Ok(())
    }
}
