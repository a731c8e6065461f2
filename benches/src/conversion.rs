//! Conversions, beside plain copies of the same files.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tensora::CheckpointIndex;
use tensora::io::{CacheState, Platform, SourceFile};
use tensora_measure::{median, median_ratio, require, shuffled};

use crate::Subject;
use crate::case::last_line;
use crate::run::Run;

/// On which side of the comparison a case of [`ConversionCell`] stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConversionKind {
    /// `tensora convert`.
    Conversion,
    /// A copy of the files as they are.
    Copy,
}

struct ConversionCase {
    name: &'static str,
    kind: ConversionKind,
    how: How,
}

enum How {
    /// `tensora convert --to FORMAT`, with an option that is given the number of the source's files.
    Convert(&'static str, Option<&'static str>),
    /// [`std::io::copy`] in a thread for each file.
    Threads,
    /// A process `cp` for each file.
    Processes,
}

const CASES: &[ConversionCase] = &[
    ConversionCase {
        name: "to-partitioned",
        kind: ConversionKind::Conversion,
        how: How::Convert("serverlessllm-partitioned", Some("--partitions")),
    },
    ConversionCase {
        name: "to-store",
        kind: ConversionKind::Conversion,
        how: How::Convert("serverlessllm-store", None),
    },
    ConversionCase {
        name: "to-safetensors",
        kind: ConversionKind::Conversion,
        how: How::Convert("safetensors", Some("--shards")),
    },
    ConversionCase {
        name: "copy-threads",
        kind: ConversionKind::Copy,
        how: How::Threads,
    },
    ConversionCase {
        name: "copy-cp",
        kind: ConversionKind::Copy,
        how: How::Processes,
    },
];

/// How often the memory of a process is looked at. What is read is its own high-water mark, so that only what it
/// grows in its last milliseconds is missed.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// One conversion or copy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConversionSample {
    /// Name of the case.
    pub case: String,
    /// On which side it stands.
    pub kind: ConversionKind,
    /// The round, from 0.
    pub round: u32,
    /// Until the process was over, or the last copy synced.
    pub elapsed_seconds: f64,
    /// Bytes of the files written.
    pub written_bytes: u64,
    /// The process's peak resident memory, in bytes; of conversions, where the system tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_resident_bytes: Option<u64>,
}

/// A case that failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConversionFailure {
    /// Name of the case.
    pub case: String,
    /// On which side it stands.
    pub kind: ConversionKind,
    /// Why.
    pub reason: String,
}

/// All samples of the conversions of one SafeTensors checkpoint, each of which begins with a cold page cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConversionCell {
    /// Name of the preset.
    pub preset: String,
    /// Bytes of the source's files.
    pub file_bytes: u64,
    /// How many files that are.
    pub file_count: usize,
    /// Rounds begun.
    pub rounds: u32,
    /// The samples, in the order in which they were taken.
    pub samples: Vec<ConversionSample>,
    /// Cases that failed; they are left out of the rounds that follow.
    pub failures: Vec<ConversionFailure>,
    /// Why measuring ended before the rounds were over.
    pub cut_short: Option<String>,
}

/// Measures conversions and copies of a SafeTensors checkpoint in interleaved rounds, telling `say` how far it is.
///
/// `command` is the release build of `tensora`; `scratch` a directory on the disk of the checkpoint, which is
/// removed before and after each case.
///
/// # Errors
///
/// When the checkpoint cannot be opened or the scratch directory not be removed, or when a conversion gives another
/// checkpoint than its source.
pub fn measure_conversions(
    subject: &Subject,
    command: &Path,
    scratch: &Path,
    rounds: u32,
    say: &mut dyn FnMut(&str),
) -> Result<ConversionCell> {
    let index = CheckpointIndex::open(&subject.path)
        .with_context(|| format!("open {}", subject.path.display()))?;
    let files = index
        .files()
        .iter()
        .map(|file| SourceFile::open(&file.path))
        .collect::<Result<Vec<_>, _>>()?;
    let mut cell = ConversionCell {
        preset: subject.preset.clone(),
        file_bytes: files.iter().map(SourceFile::len).sum(),
        file_count: files.len(),
        rounds: 0,
        samples: Vec::new(),
        failures: Vec::new(),
        cut_short: None,
    };
    let mut cases: Vec<&ConversionCase> = CASES.iter().collect();
    for round in 0..rounds.max(1) {
        cell.rounds = round + 1;
        let turns = cases.clone();
        for case in shuffled(turns.len(), round as usize).map(|turn| turns[turn]) {
            remove(scratch)?;
            settle(subject)?;
            if let Err(error) = require(&files, CacheState::Cold) {
                cell.cut_short = Some(format!("{}: {error}", case.name));
                return Ok(cell);
            }
            let taken = case.take(subject, &files, command, scratch);
            let sample = match taken {
                Ok(taken) => taken,
                Err(error) => {
                    say(&format!("{}: {error:#}", case.name));
                    cell.failures.push(ConversionFailure {
                        case: case.name.to_owned(),
                        kind: case.kind,
                        reason: format!("{error:#}"),
                    });
                    cases.retain(|other| other.name != case.name);
                    continue;
                }
            };
            if round == 0 {
                check(case, subject, command, scratch)?;
            }
            say(&format!(
                "{} converted, round {} of {rounds}: {} {:.3} s",
                cell.preset,
                round + 1,
                case.name,
                sample.elapsed_seconds,
            ));
            cell.samples.push(ConversionSample { round, ..sample });
        }
    }
    remove(scratch)?;
    Ok(cell)
}

impl ConversionCase {
    fn take(
        &self,
        subject: &Subject,
        files: &[SourceFile],
        command: &Path,
        scratch: &Path,
    ) -> Result<ConversionSample> {
        let begun = Instant::now();
        let mut peak_resident_bytes = None;
        match self.how {
            How::Convert(format, option) => {
                let mut convert = Command::new(command);
                convert
                    .args(["convert", "--to", format])
                    .arg(&subject.path)
                    .arg(scratch);
                if let Some(option) = option {
                    convert.args([option, &files.len().to_string()]);
                }
                peak_resident_bytes = watch(&mut convert)?;
            }
            How::Threads => copy_each(files, scratch, |from, to| {
                let (mut source, mut target) = (File::open(from)?, File::create(to)?);
                io::copy(&mut source, &mut target)?;
                target.sync_all()
            })?,
            How::Processes => copy_each(files, scratch, |from, to| {
                let status = Command::new("cp").arg(from).arg(to).status()?;
                if !status.success() {
                    return Err(io::Error::other(format!("cp: {status}")));
                }
                File::open(to)?.sync_all()
            })?,
        }
        let elapsed_seconds = begun.elapsed().as_secs_f64();
        Ok(ConversionSample {
            case: self.name.to_owned(),
            kind: self.kind,
            round: 0,
            elapsed_seconds,
            written_bytes: bytes_in(scratch)?,
            peak_resident_bytes,
        })
    }
}

/// Copies all files, the largest first, a thread for each up to the number of processors, and syncs the directory.
fn copy_each(
    files: &[SourceFile],
    scratch: &Path,
    copy: impl Fn(&Path, &Path) -> io::Result<()> + Sync,
) -> Result<()> {
    fs::create_dir(scratch).with_context(|| format!("create {}", scratch.display()))?;
    let mut largest: Vec<&SourceFile> = files.iter().collect();
    largest.sort_by_key(|file| std::cmp::Reverse(file.len()));
    let threads = largest.len().min(Platform::probe().cpus as usize).max(1);
    let queue = Mutex::new(VecDeque::from(largest));
    let next = || queue.lock().map_or(None, |mut queue| queue.pop_front());
    let work = || -> Result<()> {
        while let Some(file) = next() {
            let from = file.path();
            let name = from.file_name().context("a file with a name")?;
            copy(from, &scratch.join(name)).with_context(|| format!("copy {}", from.display()))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().unwrap_or_else(|_| bail!("a copy panicked"))?;
        }
        anyhow::Ok(())
    })?;
    File::open(scratch)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("sync {}", scratch.display()))
}

/// Runs a process to its end. Returns its peak resident memory, in bytes, where the system tells.
fn watch(command: &mut Command) -> Result<Option<u64>> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = None;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        peak = peak.max(peak_resident_bytes(&text));
        if child.try_wait()?.is_some() {
            break;
        }
        thread::sleep(LOOK_EVERY);
    }
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        last_line(&String::from_utf8_lossy(&output.stderr))
    );
    Ok(peak)
}

/// `VmHWM` of `/proc/PID/status`.
fn peak_resident_bytes(status: &str) -> Option<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Whether a case gave what it should: a conversion the same tensors, a copy as many bytes.
fn check(case: &ConversionCase, subject: &Subject, command: &Path, scratch: &Path) -> Result<()> {
    match case.kind {
        ConversionKind::Conversion => {
            let digest = |path: &Path| -> Result<String> {
                let output = Command::new(command)
                    .args(["digest", "--json"])
                    .arg(path)
                    .output()?;
                ensure!(
                    output.status.success(),
                    "digest {}: {}",
                    path.display(),
                    last_line(&String::from_utf8_lossy(&output.stderr))
                );
                let printed: serde_json::Value = serde_json::from_slice(&output.stdout)?;
                let digest = printed["digest"].as_str();
                Ok(digest.context("a digest in what was printed")?.to_owned())
            };
            ensure!(
                digest(scratch)? == digest(&subject.path)?,
                "{} wrote another checkpoint than it read",
                case.name
            );
        }
        ConversionKind::Copy => {
            let index = CheckpointIndex::open(&subject.path)?;
            for file in index.files() {
                let name = file.path.file_name().context("a file with a name")?;
                let copied = fs::metadata(scratch.join(name))?.len();
                ensure!(copied == file.bytes, "{} copied {copied} bytes", case.name);
            }
        }
    }
    Ok(())
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.with_context(|| format!("remove {}", directory.display())),
    }
}

/// Waits until the file system has nothing left to do for the case before: a removal goes on in its journal.
fn settle(subject: &Subject) -> Result<()> {
    let status = Command::new("sync")
        .arg("--file-system")
        .arg(&subject.path)
        .status()
        .context("start sync")?;
    ensure!(status.success(), "sync: {status}");
    Ok(())
}

fn bytes_in(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut open: Vec<PathBuf> = vec![directory.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                bytes += metadata.len();
            }
        }
    }
    Ok(bytes)
}

impl ConversionCell {
    /// Whether measuring it again with as many rounds would give nothing more.
    pub fn is_complete(&self, rounds: u32) -> bool {
        self.cut_short.is_none() && self.rounds >= rounds
    }

    fn of_case(&self, case: &str) -> impl Iterator<Item = &ConversionSample> {
        self.samples
            .iter()
            .filter(move |sample| sample.case == case)
    }

    /// Names of the cases of a kind that have samples, in the order of tables.
    fn names(&self, kind: ConversionKind) -> impl Iterator<Item = &'static str> {
        CASES
            .iter()
            .filter(move |case| case.kind == kind)
            .map(|case| case.name)
            .filter(|name| self.of_case(name).next().is_some())
    }

    fn median_seconds(&self, case: &str) -> Option<f64> {
        median(self.of_case(case).map(|sample| sample.elapsed_seconds))
    }

    fn peak_resident_bytes(&self, case: &str) -> Option<u64> {
        self.of_case(case)
            .filter_map(|sample| sample.peak_resident_bytes)
            .max()
    }

    /// Median over the rounds of the one case's time ÷ the other's in the same round.
    fn ratio(&self, numerator: &str, denominator: &str) -> Option<f64> {
        median_ratio(self.of_case(numerator).filter_map(|above| {
            let mut below = self.of_case(denominator);
            let below = below.find(|below| below.round == above.round)?;
            Some((above.elapsed_seconds, below.elapsed_seconds))
        }))
    }

    /// The copy that is fastest over all rounds, and the case's time ÷ its.
    fn against_copy(&self, case: &str) -> Option<(&'static str, f64)> {
        self.names(ConversionKind::Copy)
            .filter_map(|copy| Some((copy, self.ratio(case, copy)?)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Each figure that has a bound: what it is, the figure, and which bound.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn figures(&self) -> Vec<(String, f64, ConversionBound)> {
        let mut figures = Vec::new();
        for case in self.names(ConversionKind::Conversion) {
            let title = format!("{} converted: {case}", self.preset);
            if let Some((copy, ratio)) = self.against_copy(case) {
                let what = format!("{title} ÷ {copy}");
                figures.push((what, ratio, ConversionBound::Time));
            }
            if let Some(peak) = self.peak_resident_bytes(case) {
                let what = format!("{title}, resident bytes");
                figures.push((what, peak as f64, ConversionBound::ResidentBytes));
            }
        }
        for failure in &self.failures {
            if failure.kind == ConversionKind::Conversion {
                let what = format!("{} converted: {} failed", self.preset, failure.case);
                figures.push((what, f64::NAN, ConversionBound::Time));
            }
        }
        figures
    }

    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn describe(&self, text: &mut String) {
        use std::fmt::Write as _;
        let _ = writeln!(
            text,
            "\n## {} converted\n\n{} bytes in {} files, {} rounds.",
            self.preset, self.file_bytes, self.file_count, self.rounds
        );
        if let Some(reason) = &self.cut_short {
            let _ = writeln!(text, "\n**Cut short**: {reason}");
        }
        for failure in &self.failures {
            let _ = writeln!(text, "\n**{} failed**: {}", failure.case, failure.reason);
        }
        if self.samples.is_empty() {
            return;
        }
        text.push_str(
            "\n| case | seconds | GB/s | ÷ the faster copy | peak memory, MiB |\n|---|---:|---:|---:|---:|\n",
        );
        let optional = |value: Option<f64>, digits: usize| {
            value.map_or_else(String::new, |value| format!("{value:.digits$}"))
        };
        let kinds = [ConversionKind::Conversion, ConversionKind::Copy];
        for case in kinds.into_iter().flat_map(|kind| self.names(kind)) {
            let seconds = self.median_seconds(case);
            let peak = self.peak_resident_bytes(case);
            let _ = writeln!(
                text,
                "| {case} | {} | {} | {} | {} |",
                optional(seconds, 3),
                optional(seconds.map(|it| self.file_bytes as f64 / it / 1e9), 2),
                optional(self.against_copy(case).map(|(_, ratio)| ratio), 3),
                optional(peak.map(|bytes| bytes as f64 / f64::from(1 << 20)), 1),
            );
        }
    }
}

/// Which bound a figure has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConversionBound {
    Time,
    ResidentBytes,
}

impl Run {
    /// The conversions of this preset, if they were measured.
    pub fn conversion(&self, preset: &str) -> Option<&ConversionCell> {
        self.conversions.iter().find(|cell| cell.preset == preset)
    }

    /// Adds conversions, in place of earlier ones of the same preset.
    pub fn put_conversion(&mut self, cell: ConversionCell) {
        let mut cells = self.conversions.iter_mut();
        match cells.find(|old| old.preset == cell.preset) {
            Some(old) => *old = cell,
            None => self.conversions.push(cell),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Conversions of the given cases, each with a time per round and a peak of so many MiB.
    pub(crate) fn cell(times: &[(&str, &[f64])], peak_mib: u64) -> ConversionCell {
        let samples = times.iter().flat_map(|&(name, seconds)| {
            let case = CASES.iter().find(|case| case.name == name).unwrap();
            let is_conversion = case.kind == ConversionKind::Conversion;
            (0..)
                .zip(seconds)
                .map(move |(round, &elapsed_seconds)| ConversionSample {
                    case: name.to_owned(),
                    kind: case.kind,
                    round,
                    elapsed_seconds,
                    written_bytes: 1000,
                    peak_resident_bytes: is_conversion.then_some(peak_mib << 20),
                })
        });
        ConversionCell {
            preset: "tiny".to_owned(),
            file_bytes: 2_000_000_000,
            file_count: 2,
            rounds: 3,
            samples: samples.collect(),
            failures: Vec::new(),
            cut_short: None,
        }
    }

    #[test]
    fn the_copy_that_is_faster_over_all_rounds_counts() {
        // In the second round the machine is ten times slower, and the other copy is the lucky one.
        let cell = cell(
            &[
                ("to-store", &[1.1, 11.0, 1.1]),
                ("copy-threads", &[1.0, 10.5, 1.0]),
                ("copy-cp", &[1.3, 9.0, 1.3]),
            ],
            1,
        );
        let (copy, ratio) = cell.against_copy("to-store").unwrap();
        assert_eq!(copy, "copy-threads");
        assert!((ratio - 1.1).abs() < 1e-9, "{ratio}");
        let mut text = String::new();
        cell.describe(&mut text);
        assert!(
            text.contains("| to-store | 1.100 | 1.82 | 1.100 | 1.0 |"),
            "{text}"
        );
        assert!(cell.is_complete(3) && !cell.is_complete(4));
    }

    #[test]
    fn the_high_water_mark_is_found() {
        let status = "Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t   2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(peak_resident_bytes(status), Some(2 << 20));
        assert_eq!(peak_resident_bytes("Name:\tx\n"), None);
        let mut child = Command::new("true");
        watch(&mut child).unwrap();
        assert!(watch(&mut Command::new("false")).is_err());
    }

    #[test]
    fn copies_are_whole() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<SourceFile> = (0..5)
            .map(|number| {
                let path = folder.path().join(number.to_string());
                fs::write(&path, vec![number; 1000 * usize::from(number)]).unwrap();
                SourceFile::open(path).unwrap()
            })
            .collect();
        for (name, how) in [("a", How::Threads), ("b", How::Processes)] {
            let case = ConversionCase {
                name: "copy",
                kind: ConversionKind::Copy,
                how,
            };
            let subject = Subject {
                preset: String::new(),
                path: folder.path().to_owned(),
            };
            let scratch = folder.path().join(name);
            let sample = case
                .take(&subject, &files, Path::new(""), &scratch)
                .unwrap();
            assert_eq!(sample.written_bytes, 10_000);
            for number in 0..5_u8 {
                let copied = fs::read(scratch.join(number.to_string())).unwrap();
                assert_eq!(copied, vec![number; 1000 * usize::from(number)]);
            }
        }
    }
}
