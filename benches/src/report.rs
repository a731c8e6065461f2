//! What was measured, what follows from it, and how it is written down.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use tensora::Format;
use tensora::io::{Platform, SourceFile, StorageFacts};

use crate::case::CaseKind;
use crate::pages::CacheState;

/// The machine that a run was made on.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Processor model.
    pub processor: Option<String>,
    /// Facts about machine and storage.
    pub platform: Platform,
}

/// One timed process.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Name of the case.
    pub case: String,
    /// On which side it stands.
    pub kind: CaseKind,
    /// The round, from 0.
    pub round: u32,
    /// From the path, or the first open, to the last byte in memory.
    pub elapsed_seconds: f64,
    /// The process's peak resident memory, in bytes.
    pub peak_resident_bytes: u64,
}

/// All samples of one checkpoint in one state.
#[derive(Clone, Debug, Serialize)]
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
    /// The samples, in the order in which they were taken.
    pub samples: Vec<Sample>,
}

/// How long opening a checkpoint took, each time.
#[derive(Clone, Debug, Serialize)]
pub struct OpenTimes {
    /// Name of the preset.
    pub preset: String,
    /// How many tensors it has.
    pub tensor_count: usize,
    /// From the path to validated tensors.
    pub elapsed_seconds: Vec<f64>,
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// The machine.
    pub host: Host,
    /// The command line that reproduces it.
    pub command: String,
    /// Rounds asked for.
    pub rounds: u32,
    /// Loads.
    pub cells: Vec<Cell>,
    /// Opens.
    pub opens: Vec<OpenTimes>,
}

/// A figure that has a bound.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was measured.
    pub what: String,
    /// The figure.
    pub figure: f64,
    /// It must not be larger than this.
    pub bound: f64,
}

impl Finding {
    /// Whether the bound is kept.
    pub fn is_kept(&self) -> bool {
        self.figure <= self.bound
    }
}

/// Cold loads: automatic ÷ best raw read of the round.
const AUTO_RATIO_BOUND: f64 = 1.3;
/// Cold loads: a named backend other than mmap ÷ best raw read of the round.
const NAMED_RATIO_BOUND: f64 = 1.6;
/// Peak resident memory of an owned load beyond its data.
const EXTRA_RESIDENT_BYTES_BOUND: f64 = (64 << 20) as f64;
/// Opening a checkpoint of many tensors.
const OPEN_SECONDS_BOUND: f64 = 0.1;

impl Host {
    /// This machine, with the storage of `path`'s first file where one is given.
    pub(crate) fn here(path: Option<&Path>) -> Self {
        let mut platform = Platform::probe();
        let index = path.and_then(|path| tensora::CheckpointIndex::open(path).ok());
        let file = index.and_then(|index| SourceFile::open(&index.files().first()?.path).ok());
        platform.storage = file.map(|file| StorageFacts::probe(&[&file]));
        Self {
            processor: processor(),
            platform,
        }
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

fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The middle of the values; of an even number, the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

impl Cell {
    fn case_names(&self) -> Vec<(&str, CaseKind)> {
        let mut names: Vec<(&str, CaseKind)> = Vec::new();
        for case in crate::Case::all() {
            if let Some(sample) = self.samples.iter().find(|sample| sample.case == case.name) {
                names.push((&sample.case, sample.kind));
            }
        }
        names
    }

    fn of_case(&self, case: &str) -> impl Iterator<Item = &Sample> {
        self.samples
            .iter()
            .filter(move |sample| sample.case == case)
    }

    /// Median of the case's times, in seconds.
    pub fn median_seconds(&self, case: &str) -> Option<f64> {
        median(
            self.of_case(case)
                .map(|sample| sample.elapsed_seconds)
                .collect(),
        )
    }

    /// Largest peak resident memory of the case, in bytes.
    pub fn peak_resident_bytes(&self, case: &str) -> Option<u64> {
        self.of_case(case)
            .map(|sample| sample.peak_resident_bytes)
            .max()
    }

    /// Median over the rounds of the case's time ÷ the best raw read's time of that round.
    pub fn ratio_to_raw(&self, case: &str) -> Option<f64> {
        let ratios = self.of_case(case).filter_map(|sample| {
            let best = self
                .samples
                .iter()
                .filter(|raw| raw.kind == CaseKind::Raw && raw.round == sample.round)
                .map(|raw| raw.elapsed_seconds)
                .min_by(f64::total_cmp)?;
            Some(sample.elapsed_seconds / best)
        });
        median(ratios.collect())
    }
}

impl Run {
    /// Every figure that has a bound.
    #[allow(clippy::cast_precision_loss)]
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for cell in &self.cells {
            let title = format!("{} {} {}", cell.preset, cell.format, cell.state);
            for (case, kind) in cell.case_names() {
                if kind != CaseKind::Owned {
                    continue;
                }
                let bound = match case {
                    "auto" => Some(AUTO_RATIO_BOUND),
                    "mmap" => None,
                    _ => Some(NAMED_RATIO_BOUND),
                };
                if let Some(bound) = bound.filter(|_| cell.state == CacheState::Cold)
                    && let Some(figure) = cell.ratio_to_raw(case)
                {
                    findings.push(Finding {
                        what: format!("{title}: {case} ÷ best raw read"),
                        figure,
                        bound,
                    });
                }
                if let Some(peak) = cell.peak_resident_bytes(case) {
                    findings.push(Finding {
                        what: format!("{title}: {case}, resident bytes beyond the data"),
                        figure: peak as f64 - cell.data_bytes as f64,
                        bound: EXTRA_RESIDENT_BYTES_BOUND,
                    });
                }
            }
        }
        for open in &self.opens {
            if let Some(figure) = median(open.elapsed_seconds.clone()) {
                findings.push(Finding {
                    what: format!(
                        "{}: opening {} tensors, seconds",
                        open.preset, open.tensor_count
                    ),
                    figure,
                    bound: OPEN_SECONDS_BOUND,
                });
            }
        }
        findings
    }

    /// The run as a Markdown document.
    #[allow(clippy::cast_precision_loss)]
    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        let platform = &self.host.platform;
        let _ = writeln!(text, "# Loads on {}\n", self.host.kind());
        let _ = writeln!(
            text,
            "{}; {} processors; Linux {}; {} GiB of memory; {} on {}. Made by `{}`.\n",
            self.host
                .processor
                .as_deref()
                .unwrap_or("unknown processor"),
            platform.cpus,
            platform.kernel.as_deref().unwrap_or("unknown"),
            platform.memory.total_bytes.unwrap_or(0) >> 30,
            platform
                .storage
                .as_ref()
                .map_or("unknown", |storage| &storage.file_system),
            platform
                .storage
                .as_ref()
                .and_then(|storage| storage.device.as_deref())
                .unwrap_or("an unknown device"),
            self.command,
        );
        text.push_str(
            "Seconds are medians over the rounds. A ratio is the median over the rounds of the case's \
             time ÷ the faster raw read of the same round. Peak memory is the largest of all rounds, less \
             the bytes of the tensors.\n",
        );
        for cell in &self.cells {
            let _ = writeln!(
                text,
                "\n## {}, {}, {}\n\n{} bytes of tensors, {} rounds.\n",
                cell.preset,
                cell.format,
                cell.state,
                cell.data_bytes,
                cell.samples
                    .iter()
                    .map(|sample| sample.round + 1)
                    .max()
                    .unwrap_or(0),
            );
            text.push_str("| case | seconds | GB/s | ÷ best raw | peak memory beyond data, MiB |\n|---|---:|---:|---:|---:|\n");
            for (case, _) in cell.case_names() {
                let seconds = cell.median_seconds(case).unwrap_or(f64::NAN);
                let extra =
                    cell.peak_resident_bytes(case).unwrap_or(0) as f64 - cell.data_bytes as f64;
                let _ = writeln!(
                    text,
                    "| {case} | {seconds:.3} | {:.2} | {:.2} | {:.1} |",
                    cell.data_bytes as f64 / seconds / 1e9,
                    cell.ratio_to_raw(case).unwrap_or(f64::NAN),
                    extra / f64::from(1 << 20),
                );
            }
        }
        if !self.opens.is_empty() {
            text.push_str("\n## Opening\n\n| preset | tensors | milliseconds |\n|---|---:|---:|\n");
            for open in &self.opens {
                let _ = writeln!(
                    text,
                    "| {} | {} | {:.1} |",
                    open.preset,
                    open.tensor_count,
                    median(open.elapsed_seconds.clone()).unwrap_or(f64::NAN) * 1e3
                );
            }
        }
        text.push_str("\n## Bounds\n\n| figure | measured | bound | kept |\n|---|---:|---:|---|\n");
        for finding in self.findings() {
            let _ = writeln!(
                text,
                "| {} | {:.3} | {} | {} |",
                finding.what,
                finding.figure,
                finding.bound,
                if finding.is_kept() { "yes" } else { "**no**" }
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(times: &[(&str, CaseKind, u32, f64)]) -> Cell {
        Cell {
            preset: "tiny".to_owned(),
            format: Format::Safetensors,
            state: CacheState::Cold,
            data_bytes: 1000,
            file_bytes: 1100,
            samples: times
                .iter()
                .map(|&(case, kind, round, elapsed_seconds)| Sample {
                    case: case.to_owned(),
                    kind,
                    round,
                    elapsed_seconds,
                    peak_resident_bytes: 1000,
                })
                .collect(),
        }
    }

    #[test]
    fn ratios_compare_within_a_round() {
        use CaseKind::{Owned, Raw};
        // The machine is ten times slower in round 1; each round's ratio is what it would be anyway.
        let cell = cell(&[
            ("raw threads", Raw, 0, 1.0),
            ("raw rings", Raw, 0, 2.0),
            ("auto", Owned, 0, 1.1),
            ("raw threads", Raw, 1, 30.0),
            ("raw rings", Raw, 1, 10.0),
            ("auto", Owned, 1, 13.0),
        ]);
        let ratio = cell.ratio_to_raw("auto").unwrap();
        assert!((ratio - 1.2).abs() < 1e-9, "{ratio}");
        assert_eq!(cell.ratio_to_raw("sync"), None);
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_missed_bound_is_found() {
        use CaseKind::{Owned, Raw};
        let run = |seconds| Run {
            host: Host {
                processor: None,
                platform: Platform::unknown(1, Vec::new()),
            },
            command: String::new(),
            rounds: 1,
            cells: vec![cell(&[
                ("raw threads", Raw, 0, 1.0),
                ("auto", Owned, 0, seconds),
            ])],
            opens: Vec::new(),
        };
        assert!(run(1.29).findings().iter().all(Finding::is_kept));
        assert!(!run(1.31).findings().iter().all(Finding::is_kept));
    }
}
