use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tensora::io::{Availability, CacheState, Platform, ProfileIdentity, SourceFile, StorageFacts};
use tensora::{BackendKind, Loader, MemoryKind};
use tensora_measure::{
    Error as MeasureError, median, median_ratio, prime_memory, require, shuffled,
};

use super::bench_plot;
use crate::args::BenchArgs;
use crate::output::{Console, Report, emit, printable};
use crate::progress::Activity;
use crate::table::{Column, Facts, Table};
use crate::units::{count, duration, rate, size, size_exactly};

/// The automatic choice counts as good as the best up to this ratio of their times.
pub(super) const CLOSE: f64 = 1.10;

/// The loads of a checkpoint, compared.
#[derive(Serialize)]
pub(super) struct Comparison {
    pub(super) path: String,
    pub(super) data_bytes: u64,
    file_bytes: u64,
    version: &'static str,
    kernel: Option<String>,
    processor: Option<String>,
    cpus: u32,
    place: Option<ProfileIdentity>,
    elapsed_seconds: f64,
    rounds: u32,
    pub(super) states: Vec<StateResult>,
    notes: Vec<String>,
}

/// What was found in one state of the page cache.
#[derive(Serialize)]
pub(super) struct StateResult {
    pub(super) cache: CacheState,
    pub(super) cases: Vec<CaseResult>,
    regrets: Vec<Regret>,
}

/// One way to ask for a load.
#[derive(Serialize)]
pub(super) struct CaseResult {
    pub(super) name: String,
    /// Options of `tensora load`.
    options: Vec<&'static str>,
    pub(super) is_automatic: bool,
    backend: BackendKind,
    memory: MemoryKind,
    /// Round by round.
    elapsed_seconds: Vec<f64>,
    pub(super) median_seconds: f64,
    pub(super) bytes_per_second: f64,
    /// Median over the rounds of its time divided by the time of the best explicit case that competes with it.
    pub(super) ratio: Option<f64>,
    peak_resident_bytes: Option<u64>,
}

/// How an automatic choice compares with the best explicit one.
#[derive(Serialize)]
struct Regret {
    automatic: String,
    best: String,
    ratio: f64,
    verdict: String,
}

/// A case before it has run.
#[derive(Clone)]
struct Case {
    name: String,
    options: Vec<&'static str>,
    is_automatic: bool,
    /// Whether it may answer with mapped memory, so that mapped cases compete with it.
    may_map: bool,
}

/// What a child answers: the fields of `load --json` that are needed.
#[derive(Clone, Deserialize)]
struct Answer {
    backend: BackendKind,
    memory: MemoryKind,
    elapsed_seconds: f64,
    peak_resident_bytes: Option<u64>,
}

/// Times of one case in one state.
struct Cell {
    cache: CacheState,
    case: usize,
    answers: Vec<Answer>,
}

struct Bench<'a> {
    arguments: &'a BenchArgs,
    program: PathBuf,
    files: Vec<SourceFile>,
    file_bytes: u64,
    data_bytes: u64,
    /// Each once, in the order asked for.
    states: Vec<CacheState>,
    cases: Vec<Case>,
    /// Cases and states that cannot be timed here are missing.
    cells: Vec<Cell>,
    notes: Vec<String>,
}

pub(crate) fn bench(arguments: &BenchArgs, console: &Console) -> Result<()> {
    if let Some(path) = &arguments.plot {
        bench_plot::check(path)?;
    }
    let begun = Instant::now();
    let mut bench = Bench::prepare(arguments)?;
    bench.announce(console);
    let rounds = bench.run(begun, &Activity::new(console.progress))?;
    let comparison = bench.compare(rounds, begun.elapsed())?;
    if let Some(path) = &arguments.plot {
        bench_plot::write(&comparison, path)?;
    }
    emit(&comparison, console)
}

/// The automatic choice with and without leave to map, every backend that works here, and mapping.
fn cases(platform: &Platform) -> Vec<Case> {
    let case = |name: &str, options: &[&'static str], is_automatic, may_map| Case {
        name: name.to_owned(),
        options: options.to_vec(),
        is_automatic,
        may_map,
    };
    let works = |kind| {
        platform
            .availability(kind)
            .is_some_and(Availability::is_available)
    };
    let mut cases = vec![
        case("auto", &[], true, true),
        case("auto, owned", &["--memory", "owned"], true, false),
    ];
    for kind in BackendKind::ALL.into_iter().filter(|&kind| works(kind)) {
        let options = ["--memory", "owned", "--backend", kind.as_str()];
        cases.push(case(&format!("{kind}, owned"), &options, false, false));
    }
    if works(BackendKind::Mmap) {
        cases.push(case("mmap, mapped", &["--memory", "mapped"], false, true));
    }
    cases
}

impl<'a> Bench<'a> {
    fn prepare(arguments: &'a BenchArgs) -> Result<Self> {
        let checkpoint = Loader::new()
            .open_options(arguments.open.options())
            .open(&arguments.path)?;
        let index = checkpoint.index();
        let files = index
            .files()
            .iter()
            .map(|file| SourceFile::open(&file.path))
            .collect::<Result<Vec<_>, _>>()
            .map_err(tensora::Error::from)?;
        let cases = cases(&Platform::probe());
        let mut states = Vec::new();
        for &cache in &arguments.states {
            if !states.contains(&cache) {
                states.push(cache);
            }
        }
        let mut bench = Self {
            arguments,
            states,
            program: std::env::current_exe()
                .context("cannot find this program, to start it again")?,
            file_bytes: files.iter().map(SourceFile::len).sum(),
            data_bytes: index.data_bytes(),
            files,
            cases,
            cells: Vec::new(),
            notes: Vec::new(),
        };
        if bench.data_bytes == 0 {
            bail!("the checkpoint has no data, so there is nothing to time");
        }
        for cache in bench.states.clone() {
            match require(&bench.files, cache) {
                Ok(()) => bench.cells.extend((0..bench.cases.len()).map(|case| Cell {
                    cache,
                    case,
                    answers: Vec::new(),
                })),
                Err(error @ MeasureError::StateNotMade { .. }) => {
                    bench.notes.push(format!("{cache} is left out: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if bench.cells.is_empty() {
            bail!("nothing can be timed: {}", bench.notes.join("; "));
        }
        Ok(bench)
    }

    /// What is going to happen, for people who wait for it.
    fn announce(&self, console: &Console) {
        if console.progress {
            let loads = self.cells.len() as u64;
            let _ = writeln!(
                std::io::stderr(),
                "{} of {} in each of up to {}, up to {} read in all; no new round after {}",
                count(loads, "load"),
                size(self.data_bytes),
                count(self.arguments.rounds.into(), "round"),
                size(loads * u64::from(self.arguments.rounds) * self.file_bytes),
                duration(self.arguments.budget.into()),
            );
        }
    }

    /// Runs rounds while there is time, at least one; how many.
    fn run(&mut self, begun: Instant, activity: &Activity) -> Result<u32> {
        let budget = Duration::from_secs(self.arguments.budget.into());
        #[allow(clippy::cast_precision_loss)]
        let all_loads = self.cells.len() as f64 * f64::from(self.arguments.rounds);
        let mut done_loads = 0.0_f64;
        for round in 0..self.arguments.rounds {
            if round > 0 && begun.elapsed() + begun.elapsed() / round > budget {
                self.notes.push(format!(
                    "{} instead of {}: no more fit into {} (--budget)",
                    count(round.into(), "round"),
                    self.arguments.rounds,
                    duration(self.arguments.budget.into())
                ));
                return Ok(round);
            }
            for cache in self.states.clone() {
                let places: Vec<_> = (0..self.cells.len())
                    .filter(|&place| self.cells[place].cache == cache)
                    .collect();
                let mut failed = Vec::new();
                for turn in shuffled(places.len(), round as usize) {
                    let place = places[turn];
                    let case = self.cases[self.cells[place].case].clone();
                    let what = format!(
                        "round {} of {}, {cache}: {}",
                        round + 1,
                        self.arguments.rounds,
                        case.name
                    );
                    // How long all rounds will take, by those loads that are done.
                    let elapsed = begun.elapsed();
                    let expected = elapsed.mul_f64(all_loads / done_loads.max(1.0));
                    let what = match done_loads {
                        0.0 => what,
                        _ => {
                            let left = expected.min(budget).saturating_sub(elapsed);
                            format!("{what}; about {} left", duration(left.as_secs_f64()))
                        }
                    };
                    activity.show(what, elapsed, expected.min(budget));
                    done_loads += 1.0;
                    match self.load(cache, &case) {
                        Ok(answer) => self.cells[place].answers.push(answer),
                        Err(error) => {
                            let error = crate::failure::message(&error, ": ");
                            self.notes
                                .push(format!("{cache}, {}, is left out: {error}", case.name));
                            failed.push(place);
                        }
                    }
                }
                // From the last one, so that places before it stay.
                failed.sort_unstable();
                for place in failed.into_iter().rev() {
                    self.cells.remove(place);
                }
            }
        }
        Ok(self.arguments.rounds)
    }

    /// One load, in a process of its own: nothing that one load leaves behind serves the next.
    fn load(&self, cache: CacheState, case: &Case) -> Result<Answer> {
        let usable_bytes = Platform::probe()
            .memory
            .usable_bytes()
            .map_or(u64::MAX, |(usable_bytes, _)| usable_bytes);
        // What the page cache shall keep, priming must not drive out.
        let kept_bytes = match cache {
            CacheState::Cold => 0,
            CacheState::Half | CacheState::Warm => self.file_bytes,
        };
        prime_memory(self.data_bytes.min(usable_bytes.saturating_sub(kept_bytes)))?;
        require(&self.files, cache)?;
        let output = Command::new(&self.program)
            .arg("load")
            .arg(&self.arguments.path)
            .args(self.arguments.open.to_arguments())
            .args(&case.options)
            .arg("--json")
            // A trace would be timed.
            .env_remove("TENSORA_LOG")
            .stdin(Stdio::null())
            .output()
            .context("cannot start this program again")?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let first = errors.lines().next().unwrap_or("it was killed");
            bail!("{}", first.trim_start_matches("error: "));
        }
        serde_json::from_slice(&output.stdout).context("a load's report cannot be read")
    }

    fn compare(self, rounds: u32, elapsed: Duration) -> Result<Comparison> {
        let mut states = Vec::new();
        for &cache in &self.states {
            let cells: Vec<_> = self
                .cells
                .iter()
                .filter(|cell| cell.cache == cache)
                .collect();
            if !cells.is_empty() {
                states.push(self.compare_state(cache, &cells));
            }
        }
        if states.is_empty() {
            bail!("nothing could be timed: {}", self.notes.join("; "));
        }
        let mut platform = Platform::probe();
        platform.storage = Some(StorageFacts::probe(&self.files.iter().collect::<Vec<_>>()));
        Ok(Comparison {
            path: self.arguments.path.display().to_string(),
            data_bytes: self.data_bytes,
            file_bytes: self.file_bytes,
            version: env!("CARGO_PKG_VERSION"),
            place: ProfileIdentity::of(&platform),
            kernel: platform.kernel,
            processor: platform.processor,
            cpus: platform.cpus,
            elapsed_seconds: elapsed.as_secs_f64(),
            rounds,
            states,
            notes: self.notes,
        })
    }

    fn compare_state(&self, cache: CacheState, cells: &[&Cell]) -> StateResult {
        let case = |cell: &Cell| &self.cases[cell.case];
        let mut regrets = Vec::new();
        let mut cases = Vec::new();
        for cell in cells {
            let (own, Some(last)) = (case(cell), cell.answers.last()) else {
                continue;
            };
            let best = cells
                .iter()
                .filter(|other| !case(other).is_automatic)
                .filter(|other| own.may_map || !case(other).may_map)
                .min_by(|a, b| a.median_seconds().total_cmp(&b.median_seconds()));
            let ratio =
                best.and_then(|best| median_ratio(cell.seconds().into_iter().zip(best.seconds())));
            if let (true, Some(best), Some(ratio)) = (own.is_automatic, best, ratio) {
                let best = &case(best).name;
                regrets.push(Regret {
                    automatic: own.name.clone(),
                    best: best.clone(),
                    ratio,
                    verdict: verdict(&own.name, last, best, ratio),
                });
            }
            let median_seconds = cell.median_seconds();
            #[allow(clippy::cast_precision_loss)]
            cases.push(CaseResult {
                name: own.name.clone(),
                options: own.options.clone(),
                is_automatic: own.is_automatic,
                backend: last.backend,
                memory: last.memory,
                elapsed_seconds: cell.seconds(),
                median_seconds,
                bytes_per_second: self.data_bytes as f64 / median_seconds.max(f64::MIN_POSITIVE),
                ratio,
                peak_resident_bytes: cell
                    .answers
                    .iter()
                    .filter_map(|answer| answer.peak_resident_bytes)
                    .max(),
            });
        }
        StateResult {
            cache,
            cases,
            regrets,
        }
    }
}

impl Cell {
    fn seconds(&self) -> Vec<f64> {
        self.answers
            .iter()
            .map(|answer| answer.elapsed_seconds)
            .collect()
    }

    fn median_seconds(&self) -> f64 {
        median(self.seconds()).unwrap_or(f64::INFINITY)
    }
}

/// How good an automatic choice was, in words.
fn verdict(automatic: &str, answer: &Answer, best: &str, ratio: f64) -> String {
    let chosen = format!(
        "{automatic} (it chose {}, {})",
        answer.backend, answer.memory
    );
    let percent = (ratio - 1.0) * 100.0;
    if ratio <= 1.0 {
        format!("{chosen} was as fast as the best, {best}")
    } else if ratio <= CLOSE {
        format!("{chosen} was within {percent:.0} % of the best, {best}")
    } else {
        format!(
            "{chosen} took {percent:.0} % longer than the best, {best}; a new profile by `tensora calibrate` may help"
        )
    }
}

impl Report for Comparison {
    fn text(&self) -> String {
        let mut facts = Facts::new();
        facts
            .add("checkpoint", printable(&self.path))
            .add("data", size_exactly(self.data_bytes))
            .add(
                "timed",
                format!(
                    "{} in {}",
                    count(self.rounds.into(), "round"),
                    duration(self.elapsed_seconds)
                ),
            );
        facts.add_each("note", self.notes.iter().map(|note| printable(note)));
        for state in &self.states {
            let verdicts = state.regrets.iter().map(|regret| regret.verdict.clone());
            facts.add_each(state.cache.as_str(), verdicts);
        }
        let mut table = Table::new(&[
            ("cache", Column::Word),
            ("load", Column::Word),
            ("chosen", Column::Word),
            ("median", Column::Number),
            ("speed", Column::Number),
            ("ratio to the best", Column::Number),
            ("peak memory", Column::Number),
        ]);
        table.dispense_with(&["peak memory", "chosen"]);
        for state in &self.states {
            for case in &state.cases {
                table.row(case.columns(state.cache));
            }
        }
        format!("{}\n{}", facts.text(), table.text())
    }
}

impl CaseResult {
    /// The texts of a table's row.
    pub(super) fn columns(&self, cache: CacheState) -> [String; 7] {
        let none = || "?".to_owned();
        [
            cache.to_string(),
            self.name.clone(),
            format!("{}, {}", self.backend, self.memory),
            duration(self.median_seconds),
            rate(self.bytes_per_second),
            self.ratio.map_or_else(none, |ratio| format!("{ratio:.2}")),
            self.peak_resident_bytes.map_or_else(none, size),
        ]
    }
}

impl Comparison {
    /// What was found in words.
    pub(super) fn verdicts(&self) -> impl Iterator<Item = (CacheState, &str)> {
        self.states.iter().flat_map(|state| {
            let verdicts = state.regrets.iter();
            verdicts.map(|regret| (state.cache, regret.verdict.as_str()))
        })
    }

    /// The machine, for a plot that is looked at elsewhere.
    pub(super) fn machine(&self) -> String {
        let unknown = || "unknown".to_owned();
        let place = match &self.place {
            Some(place) => match &place.device {
                Some(device) => format!("{} on {device}", place.file_system),
                None => place.file_system.clone(),
            },
            None => unknown(),
        };
        format!(
            "{}, {}, kernel {}, {place}; tensora {}, {}",
            self.processor.clone().unwrap_or_else(unknown),
            count(self.cpus.into(), "CPU"),
            self.kernel.clone().unwrap_or_else(unknown),
            self.version,
            count(self.rounds.into(), "round"),
        )
    }
}
