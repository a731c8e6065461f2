//! Rounds of interleaved cases.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tensora::CheckpointIndex;
use tensora::io::{CacheState, Platform, SourceFile};
use tensora_measure::{prime_memory, require, shuffled};

use crate::case::{Case, CaseKind, Printed, Target};
use crate::peers::Peers;
use crate::run::{Cell, Failure, Sample};

/// A checkpoint to be measured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Name of the preset.
    pub preset: String,
    /// Where it is.
    pub path: PathBuf,
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Folder with the release builds of the examples `timed` and `raw_read`.
    pub programs: PathBuf,
    /// The Python packages, where they shall be measured too.
    pub peers: Option<Peers>,
    /// What to time; [`Case::all`] or some of it.
    pub cases: Vec<Case>,
    /// How often each case is timed; at least 1.
    pub rounds: u32,
}

/// More than the buffers of a stream.
const STREAM_BYTES: u64 = 512 << 20;

/// What the source of a memory copy takes beside its target.
const MEMCPY_SOURCE_BYTES: u64 = 1 << 30;

impl Bench {
    /// Whether the cell has everything that measuring it again would give: the rounds, and each case, if only that
    /// it failed.
    pub fn is_covered_by(&self, cell: &Cell) -> bool {
        let has = |case: &Case| {
            cell.of_case(case.name).next().is_some()
                || cell
                    .failures
                    .iter()
                    .any(|failure| failure.case == case.name)
        };
        let mut applying = self
            .cases
            .iter()
            .filter(|case| case.applies_to(cell.format, cell.state));
        cell.cut_short.is_none() && cell.rounds >= self.rounds && applying.all(has)
    }

    /// Measures one checkpoint in one state, telling `say` how far it is. With a limit, no round is begun
    /// that would probably not be over in time; there is one round at least.
    ///
    /// Where a state of the page cache cannot be made, the cell says so and has fewer samples or none. A
    /// case that fails is recorded, and left out of the rounds that follow.
    ///
    /// # Errors
    ///
    /// When the checkpoint cannot be opened, or a case gives other tensors than the others.
    pub fn measure_cell(
        &self,
        subject: &Subject,
        state: CacheState,
        limit: Option<Duration>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Cell> {
        let index = CheckpointIndex::open(&subject.path)
            .with_context(|| format!("open {}", subject.path.display()))?;
        let paths: Vec<&Path> = index
            .files()
            .iter()
            .map(|file| file.path.as_path())
            .collect();
        let files = paths
            .iter()
            .map(|&path| SourceFile::open(path))
            .collect::<Result<Vec<_>, _>>()?;
        let target = Target {
            checkpoint: &subject.path,
            files: &paths,
            data_bytes: index.data_bytes(),
            primed_bytes: 0,
        };
        let mut cell = Cell {
            preset: subject.preset.clone(),
            format: index.format(),
            state,
            data_bytes: index.data_bytes(),
            file_bytes: files.iter().map(SourceFile::len).sum(),
            file_count: files.len(),
            rounds: 0,
            samples: Vec::new(),
            failures: Vec::new(),
            cut_short: None,
        };
        let mut cases: Vec<&Case> = self
            .cases
            .iter()
            .filter(|case| case.applies_to(cell.format, state))
            .collect();
        let begun = Instant::now();
        let mut xor = None;
        for round in 0..self.rounds.max(1) {
            let round_begun = Instant::now();
            cell.rounds = round + 1;
            let turns = cases.clone();
            for case in shuffled(turns.len(), round as usize).map(|turn| turns[turn]) {
                let primed_bytes = match make_ready(case.kind, &cell, &files) {
                    Ok(needed_bytes) => needed_bytes.min(KEPT_BYTES),
                    Err(error) => {
                        cell.cut_short = Some(format!("{}: {error}", case.name));
                        return Ok(cell);
                    }
                };
                let target = Target {
                    primed_bytes,
                    ..target
                };
                let printed = match case.run(&self.programs, self.peers.as_ref(), target) {
                    Ok(printed) => printed,
                    Err(error) => {
                        say(&format!("{}: {error:#}", case.name));
                        cell.failures.push(Failure {
                            case: case.name.to_owned(),
                            kind: case.kind,
                            reason: format!("{error:#}"),
                        });
                        cases.retain(|other| other.name != case.name);
                        continue;
                    }
                };
                check(case, &printed, &cell, &mut xor)?;
                say(&format!(
                    "{} {} {state}, round {} of {}: {} {:.3} s",
                    cell.preset,
                    cell.format,
                    round + 1,
                    self.rounds,
                    case.name,
                    printed.elapsed_seconds,
                ));
                cell.samples.push(Sample {
                    case: case.name.to_owned(),
                    kind: case.kind,
                    round,
                    elapsed_seconds: printed.elapsed_seconds,
                    touched_seconds: printed.touched_seconds,
                    peak_resident_bytes: printed.peak_resident_bytes,
                    choice: printed.choice,
                    needed_bytes: printed.needed_bytes,
                    read_bytes: printed.read_bytes,
                    device_bytes: printed.device_bytes,
                });
            }
            let next_ends = begun.elapsed() + round_begun.elapsed();
            if limit.is_some_and(|limit| next_ends > limit) {
                break;
            }
        }
        Ok(cell)
    }
}

/// How much memory the process of a case touches and gives back before its clock starts, in bytes, at most. Some
/// virtual machines keep no more than 1 GiB of what was freed; with more, they would tell their host of the rest
/// while time runs.
const KEPT_BYTES: u64 = 1_000_000_000;

/// Puts the page cache in its state, and memory that the case is going to need fresh in the machine's hands. Says
/// how much that is, in bytes.
fn make_ready(kind: CaseKind, cell: &Cell, files: &[SourceFile]) -> tensora_measure::Result<u64> {
    if kind == CaseKind::Memcpy {
        // It reads no file. Where its memory is only to be had from the page cache, that is taken before, not
        // while time runs.
        prime_memory(cell.data_bytes + MEMCPY_SOURCE_BYTES)?;
        return Ok(cell.data_bytes);
    }
    if kind == CaseKind::Hash {
        prime_memory(MEMCPY_SOURCE_BYTES)?;
        return Ok(MEMCPY_SOURCE_BYTES);
    }
    require(files, cell.state)?;
    let resident_bytes: u64 = files
        .iter()
        .filter_map(|file| file.resident_bytes(0..file.len()))
        .sum();
    // What a case is going to bring into the page cache comes out of free memory, too. Those that fill both are
    // few, and slow for other reasons: the larger of the two does, and costs half of the time.
    let mut needed_bytes = cell.file_bytes.saturating_sub(resident_bytes);
    if kind.fills_memory() {
        needed_bytes = needed_bytes.max(cell.data_bytes);
    } else if kind.is_of_parts() {
        // Buffers and an eighth of the tensors; reads bypass the page cache.
        needed_bytes = cell.data_bytes / 8 + STREAM_BYTES;
    }
    let usable_bytes = Platform::probe()
        .memory
        .usable_bytes()
        .map_or(u64::MAX, |(usable_bytes, _)| usable_bytes);
    // Priming must not push out the very pages that shall be resident. What a case then takes from the page
    // cache needs no priming: it is in use.
    let needed_bytes = needed_bytes.min(usable_bytes.saturating_sub(resident_bytes));
    if needed_bytes > 0 {
        prime_memory(needed_bytes)?;
        require(files, cell.state)?;
    }
    if kind.is_bounded() {
        // What the process touched before would count as memory that the stream took.
        return Ok(0);
    }
    Ok(needed_bytes)
}

/// All loads of a cell give the same tensors, as far as their length and the exclusive or of their bytes tell.
fn check(case: &Case, printed: &Printed, cell: &Cell, xor: &mut Option<u8>) -> Result<()> {
    if case.kind.loads_parts() {
        // How much that is, only the case itself knows.
        ensure!(
            printed.data_bytes > 0,
            "{} loaded nothing at all",
            case.name
        );
        return Ok(());
    }
    let in_memory = [CaseKind::Memcpy, CaseKind::Hash].contains(&case.kind);
    let wanted = if case.kind.loads_tensors() || in_memory {
        cell.data_bytes
    } else {
        cell.file_bytes
    };
    ensure!(
        printed.data_bytes == wanted,
        "{} read {} bytes, not {wanted}",
        case.name,
        printed.data_bytes,
    );
    if case.kind.loads_tensors() && printed.xor.is_some() {
        ensure!(
            xor.is_none() || *xor == printed.xor,
            "{} loaded other bytes than the cases before it",
            case.name
        );
        *xor = printed.xor;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::tests::cell;

    #[test]
    fn a_cell_without_a_case_that_was_asked_for_is_measured_again() {
        let mut cell = cell(CacheState::Half, &[("auto", &[1.0, 1.0, 1.0])]);
        let mut bench = Bench {
            programs: PathBuf::new(),
            peers: None,
            cases: Vec::new(),
            rounds: 3,
        };
        // Neither ceilings nor memcpy have anything to say of a half-resident checkpoint.
        let named = |name: &str| Case::all().iter().find(|case| case.name == name).cloned();
        bench.cases.extend(named("auto"));
        bench.cases.extend(named("memcpy"));
        assert!(bench.is_covered_by(&cell));
        bench.cases.extend(named("sync"));
        assert!(!bench.is_covered_by(&cell));
        cell.failures.push(Failure {
            case: "sync".to_owned(),
            kind: CaseKind::Explicit,
            reason: "no threads".to_owned(),
        });
        assert!(bench.is_covered_by(&cell));
        bench.rounds = 4;
        assert!(!bench.is_covered_by(&cell));
    }
}
