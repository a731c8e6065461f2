//! Rounds of interleaved cases.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tensora::CheckpointIndex;

use crate::case::{Case, CaseKind};
use crate::pages::{self, CacheState};
use crate::report::{Cell, Host, OpenTimes, Run, Sample};

/// A checkpoint to be loaded.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Name of the preset.
    pub preset: String,
    /// Where it is.
    pub path: PathBuf,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Checkpoints to load, each cold and warm.
    pub loads: Vec<Subject>,
    /// Checkpoints to open only: their metadata is read, again and again.
    pub opens: Vec<Subject>,
    /// How often each case is timed; at least 1.
    pub rounds: u32,
    /// No further round of a cell is begun when this is over; each cell has one round at least.
    pub budget: Option<Duration>,
    /// Folder with the release build of `tensora` and of the example `raw_read`.
    pub programs: PathBuf,
    /// The command line that reproduces the run.
    pub command: String,
}

/// Measures everything, telling `say` how far it is.
///
/// # Errors
///
/// When a program fails, a checkpoint cannot be opened, or a state of the page cache cannot be made.
pub fn run(bench: &Bench, say: &mut dyn FnMut(&str)) -> Result<Run> {
    let begun = Instant::now();
    let cases = Case::all();
    let mut cells = Vec::new();
    for subject in &bench.loads {
        for state in [CacheState::Cold, CacheState::Warm] {
            let over = || bench.budget.is_some_and(|budget| begun.elapsed() > budget);
            cells.push(measure_cell(bench, subject, state, &cases, &over, say)?);
        }
    }
    let mut opens = Vec::new();
    for subject in &bench.opens {
        say(&format!("{}: opening", subject.preset));
        opens.push(measure_open(subject, bench.rounds)?);
    }
    Ok(Run {
        host: Host::here(
            bench
                .loads
                .first()
                .or(bench.opens.first())
                .map(|s| s.path.as_path()),
        ),
        command: bench.command.clone(),
        rounds: bench.rounds,
        cells,
        opens,
    })
}

fn measure_cell(
    bench: &Bench,
    subject: &Subject,
    state: CacheState,
    cases: &[Case],
    over: &dyn Fn() -> bool,
    say: &mut dyn FnMut(&str),
) -> Result<Cell> {
    let index = CheckpointIndex::open(&subject.path)?;
    let files: Vec<_> = index.files().iter().map(|file| file.path.clone()).collect();
    let file_bytes: u64 = index.files().iter().map(|file| file.bytes).sum();
    let mut samples = Vec::new();
    for round in 0..bench.rounds {
        if round > 0 && over() {
            break;
        }
        for step in 0..cases.len() {
            // Each round begins with another case, so that none always follows the same one.
            let number = (step + round as usize) % cases.len();
            let case = &cases[number];
            if state == CacheState::Warm && case.kind == CaseKind::Ceiling {
                continue;
            }
            // What the destination takes, and what the page cache takes of a buffered read.
            pages::prime_memory(file_bytes.saturating_mul(2))?;
            pages::prepare_for_timing(&files, state)?;
            let printed = case.run(&bench.programs, &subject.path, &files)?;
            ensure!(
                printed.data_bytes >= index.data_bytes(),
                "{} read {} bytes of {}",
                case.name,
                printed.data_bytes,
                index.data_bytes()
            );
            say(&format!(
                "{} {} {state}, round {} of {}: {} {:.3} s",
                subject.preset,
                index.format(),
                round + 1,
                bench.rounds,
                case.name,
                printed.elapsed_seconds
            ));
            samples.push(Sample {
                case: case.name.clone(),
                kind: case.kind,
                round,
                elapsed_seconds: printed.elapsed_seconds,
                peak_resident_bytes: printed.peak_resident_bytes,
            });
        }
    }
    Ok(Cell {
        preset: subject.preset.clone(),
        format: index.format(),
        state,
        data_bytes: index.data_bytes(),
        file_bytes,
        samples,
    })
}

fn measure_open(subject: &Subject, rounds: u32) -> Result<OpenTimes> {
    let mut elapsed_seconds = Vec::new();
    let mut tensor_count = 0;
    for _ in 0..rounds.max(1) {
        let begun = Instant::now();
        let index = open(&subject.path)?;
        elapsed_seconds.push(begun.elapsed().as_secs_f64());
        tensor_count = index.tensors().len();
    }
    Ok(OpenTimes {
        preset: subject.preset.clone(),
        tensor_count,
        elapsed_seconds,
    })
}

fn open(path: &Path) -> Result<CheckpointIndex> {
    CheckpointIndex::open(path).with_context(|| format!("open {}", path.display()))
}
