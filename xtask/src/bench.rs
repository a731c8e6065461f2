//! `cargo xtask bench`: loads, measured and written down.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use clap::builder::PossibleValuesParser;
use tensora_benches::{
    Bench, Case, Finding, Host, Invocation, Peers, Run, Subject, measure_conversions, measure_open,
};
use tensora_formats::Format;
use tensora_io::CacheState;

use crate::fixtures::{self, Data};
use crate::presets::{self, Preset};
use crate::programs;

/// What opening and planning are measured on: the checkpoints with the most tensors.
const OPEN_PRESETS: &[&str] = &["qwen3-30b-a3b", "deepseek-v3"];
/// Opening takes milliseconds, so that more rounds cost nothing.
const OPEN_ROUNDS: u32 = 15;
/// What the bounds are about.
const MATRIX: &[&str] = &["qwen3-0.6b", "smollm3-3b", "qwen3-8b"];
/// What streams, slices and ranks are compared with.
const PARTS_RIVALS: &[&str] = &["ceiling-threads", "ceiling-rings", "auto"];
const STATES: [CacheState; 3] = [CacheState::Cold, CacheState::Half, CacheState::Warm];
/// The crates that loads are compared with.
const PEER_CRATES: &[&str] = &["safetensors", "memmap2"];
/// The virtual environment of the Python packages, beside the fixtures, which git ignores.
const PEERS_FOLDER: &str = "peers-venv";
/// What conversions write, beside the fixtures.
const CONVERTED_FOLDER: &str = ".converted";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// Which checkpoints to load; they are generated if they are missing. qwen3-0.6b unless given
    #[arg(value_name = "PRESET")]
    presets: Vec<String>,
    /// All that the bounds are about: three checkpoints, unless some are named, in every format
    #[arg(long)]
    matrix: bool,
    /// The format on disk; may be given several times. safetensors unless given, or all with --matrix
    #[arg(long = "layout", value_name = "FORMAT")]
    layouts: Vec<Format>,
    /// What the page cache holds: cold, half or warm; all of them unless given
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = parse_state)]
    states: Vec<CacheState>,
    /// Which cases to time, separated by commas; unless given, all but those of --parts
    #[arg(long, value_name = "CASE", value_delimiter = ',', value_parser = case_names())]
    cases: Vec<String>,
    /// Streams, slices and ranks instead of loads of everything: of the other
    /// cases only those that they are compared with
    #[arg(long, conflicts_with = "cases")]
    parts: bool,
    /// Conversions instead of loads, beside plain copies of the same files; needs as much space as
    /// the checkpoint once more
    #[arg(long, conflicts_with_all = ["cases", "parts", "states", "layouts", "budget", "peers"])]
    convert: bool,
    /// How often each case is timed
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: u32,
    /// How long to measure: what is left is divided among the cells left, each of which has one round at
    /// least. Generating fixtures and installing packages do not count
    #[arg(long, value_name = "SECONDS")]
    budget: Option<u64>,
    /// Measure Python packages too, from a virtual environment that is made for it (some gigabytes)
    #[arg(long)]
    peers: bool,
    /// The folder that holds the fixtures; `fixtures` in the repository unless given
    #[arg(long, value_name = "DIR")]
    fixtures: Option<PathBuf>,
    /// Remove each fixture as soon as its cells are measured
    #[arg(long)]
    delete_fixtures: bool,
    /// Where to write the run; `benches/runs/<date>-<kind of host>` unless given. Cells of earlier calls that
    /// are there already stay
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep cells that are there already with as many rounds and the same cases, instead of measuring them
    /// again
    #[arg(long)]
    resume: bool,
    /// Fail if a figure misses its bound
    #[arg(long)]
    check: bool,
}

fn parse_state(name: &str) -> Result<CacheState, String> {
    let state = STATES.into_iter().find(|state| state.as_str() == name);
    state.ok_or_else(|| "not one of cold, half, warm".to_owned())
}

fn case_names() -> PossibleValuesParser {
    PossibleValuesParser::new(Case::all().iter().map(|case| case.name))
}

impl BenchArguments {
    /// Generates what is missing, measures, prints, and writes the run down.
    ///
    /// # Errors
    ///
    /// When something cannot be built, generated, run or written, or, with `--check`, a bound is missed.
    pub fn run(&self) -> Result<()> {
        let folder = self
            .fixtures
            .clone()
            .unwrap_or_else(fixtures::default_folder);
        std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let presets = self.presets()?;
        let host = host(&folder)?;
        let out = match &self.out {
            Some(out) => out.clone(),
            None => crate::tidy::repository_root()
                .join("benches/runs")
                .join(format!("{}-{}", today()?, host.kind())),
        };
        let mut run = Run::resume(&out, host)?;
        run.invocations.push(Invocation {
            command: command_line(),
            revision: revision()?,
        });
        run.versions = versions()?;
        if self.convert {
            self.measure_conversions(&presets, &folder, &out, &mut run)?;
            return self.conclude(&run, &out);
        }
        let bench = Bench {
            programs: programs::build_timed()?,
            peers: self.prepare_peers(&folder)?,
            cases: self.cases(),
            rounds: self.rounds.max(1),
        };
        if let Some(peers) = &bench.peers {
            run.peers.clone_from(peers.facts());
        }

        self.measure_opens(&folder, &mut run)?;
        run.write(&out)?;
        self.measure_loads(&bench, &presets, &folder, &out, &mut run)?;
        self.conclude(&run, &out)
    }

    /// Shows what was measured, and fails where a bound that is to be checked was missed.
    fn conclude(&self, run: &Run, out: &Path) -> Result<()> {
        println!("\n{}", std::fs::read_to_string(out.join("run.md"))?);
        println!("written to {}", out.display());

        let missed: Vec<_> = run
            .findings()
            .into_iter()
            .filter(|finding: &Finding| !finding.is_kept())
            .map(|finding| finding.what)
            .collect();
        if self.check && !missed.is_empty() {
            bail!("bounds were missed:\n  {}", missed.join("\n  "));
        }
        Ok(())
    }

    fn presets(&self) -> Result<Vec<&'static Preset>> {
        let find = |name: &str| {
            presets::find(name).with_context(|| {
                format!("no preset is named {name:?}; `cargo xtask gen-fixtures` lists them")
            })
        };
        match (self.presets.is_empty(), self.matrix) {
            (false, _) => self.presets.iter().map(|name| find(name)).collect(),
            (true, true) => MATRIX.iter().map(|name| find(name)).collect(),
            (true, false) => Ok(vec![find(MATRIX[0])?]),
        }
    }

    fn layouts(&self) -> &[Format] {
        match (self.layouts.is_empty(), self.matrix) {
            (false, _) => &self.layouts,
            (true, true) => Format::ALL,
            (true, false) => &[Format::Safetensors],
        }
    }

    fn states(&self) -> &[CacheState] {
        if self.states.is_empty() && self.parts {
            &STATES[..1]
        } else if self.states.is_empty() {
            &STATES
        } else {
            &self.states
        }
    }

    /// The cases that were asked for; those of Python packages only with `--peers`.
    fn cases(&self) -> Vec<Case> {
        let wanted = |case: &&Case| {
            let named = match (self.cases.is_empty(), self.parts) {
                (false, _) => self.cases.iter().any(|name| name == case.name),
                (true, true) => case.kind.is_of_parts() || PARTS_RIVALS.contains(&case.name),
                (true, false) => !case.kind.is_of_parts(),
            };
            named && (self.peers || case.package().is_none())
        };
        Case::all().iter().filter(wanted).cloned().collect()
    }

    fn prepare_peers(&self, folder: &Path) -> Result<Option<Peers>> {
        if !self.peers {
            return Ok(None);
        }
        let script = crate::tidy::repository_root().join("benches/peers/load.py");
        let venv = folder.join(PEERS_FOLDER);
        let peers = Peers::prepare(&venv, &script, &mut |line| println!("{line}"))?;
        Ok(Some(peers))
    }

    fn measure_opens(&self, folder: &Path, run: &mut Run) -> Result<()> {
        let mut options = fixtures::Options::new(folder);
        options.data = Data::Sparse;
        for &name in OPEN_PRESETS {
            if self.resume && run.opens.iter().any(|open| open.preset == name) {
                continue;
            }
            let preset = presets::find(name).context("a preset with many tensors")?;
            let subject = Subject {
                preset: name.to_owned(),
                path: fixtures::ensure(preset, Format::Safetensors, &options)?,
            };
            println!("{name}: opening and planning");
            run.put_open(measure_open(&subject, OPEN_ROUNDS)?);
        }
        Ok(())
    }

    fn measure_conversions(
        &self,
        presets: &[&Preset],
        folder: &Path,
        out: &Path,
        run: &mut Run,
    ) -> Result<()> {
        let options = fixtures::Options::new(folder);
        let command = programs::build_command()?.join("tensora");
        let rounds = self.rounds.max(1);
        for preset in presets {
            let cell = run.conversion(preset.name);
            if self.resume && cell.is_some_and(|cell| cell.is_complete(rounds)) {
                continue;
            }
            let subject = Subject {
                preset: preset.name.to_owned(),
                path: fixtures::ensure(preset, Format::Safetensors, &options)?,
            };
            let scratch = folder.join(CONVERTED_FOLDER);
            let say = &mut |line: &str| println!("{line}");
            run.put_conversion(measure_conversions(
                &subject, &command, &scratch, rounds, say,
            )?);
            run.write(out)?;
            if self.delete_fixtures {
                std::fs::remove_dir_all(&subject.path)
                    .with_context(|| format!("remove {}", subject.path.display()))?;
            }
        }
        Ok(())
    }

    fn measure_loads(
        &self,
        bench: &Bench,
        presets: &[&Preset],
        folder: &Path,
        out: &Path,
        run: &mut Run,
    ) -> Result<()> {
        let options = fixtures::Options::new(folder);
        let is_open = |run: &Run, preset: &Preset, format, state| {
            let cell = run.cell(preset.name, format, state);
            !self.resume || cell.is_none_or(|cell| !bench.is_covered_by(cell))
        };
        let mut cells: Vec<(&Preset, Format, CacheState)> = Vec::new();
        for &preset in presets {
            for &format in self.layouts() {
                let states = self.states().iter().copied();
                let open = states.filter(|&state| is_open(run, preset, format, state));
                cells.extend(open.map(|state| (preset, format, state)));
            }
        }
        let mut measured = Duration::ZERO;
        for (number, &(preset, format, state)) in cells.iter().enumerate() {
            let subject = Subject {
                preset: preset.name.to_owned(),
                path: fixtures::ensure(preset, format, &options)?,
            };
            let limit = self.budget.map(|budget| {
                let left = Duration::from_secs(budget).saturating_sub(measured);
                left / u32::try_from(cells.len() - number).unwrap_or(u32::MAX)
            });
            let begun = Instant::now();
            let cell =
                bench.measure_cell(&subject, state, limit, &mut |line| println!("{line}"))?;
            measured += begun.elapsed();
            run.put_cell(cell);
            run.write(out)?;
            let next = cells.get(number + 1);
            let is_done = next.is_none_or(|next| (next.0.name, next.1) != (preset.name, format));
            if self.delete_fixtures && is_done {
                std::fs::remove_dir_all(&subject.path)
                    .with_context(|| format!("remove {}", subject.path.display()))?;
            }
        }
        Ok(())
    }
}

/// The machine, with the storage that the fixtures are on.
fn host(folder: &Path) -> Result<Host> {
    // Any file there tells which file system and device it is, and one is always at hand.
    let probe = folder.join(".probe");
    std::fs::write(&probe, vec![0; 1 << 16])
        .with_context(|| format!("write {}", probe.display()))?;
    let host = Host::here(&probe);
    std::fs::remove_file(&probe).with_context(|| format!("remove {}", probe.display()))?;
    host
}

/// As it would be typed: paths of this machine have no place in an archive.
fn command_line() -> String {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    format!("cargo xtask {}", arguments.join(" "))
}

/// The commit, and whether the working tree has more.
fn revision() -> Result<String> {
    output(
        "git",
        &[
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ],
    )
}

fn today() -> Result<String> {
    output("date", &["-u", "+%Y-%m-%d"])
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .current_dir(crate::tidy::repository_root())
        .args(arguments)
        .output()
        .with_context(|| format!("ask `{program}`"))?;
    ensure!(
        output.status.success(),
        "`{program} {}` failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The versions of the crates that loads are compared with, as locked.
fn versions() -> Result<BTreeMap<String, String>> {
    let path = crate::tidy::repository_root().join("Cargo.lock");
    let lock =
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let versions = locked_versions(&lock, PEER_CRATES);
    let found: BTreeSet<_> = versions.keys().map(String::as_str).collect();
    ensure!(
        PEER_CRATES.iter().all(|name| found.contains(name)),
        "{} lacks one of {PEER_CRATES:?}",
        path.display()
    );
    Ok(versions)
}

fn locked_versions(lock: &str, names: &[&str]) -> BTreeMap<String, String> {
    let value = |line: &str, key: &str| {
        let quoted = line.strip_prefix(key)?.strip_prefix(" = ")?;
        Some(quoted.trim_matches('"').to_owned())
    };
    let lines: Vec<_> = lock.lines().collect();
    lines
        .windows(2)
        .filter_map(|pair| Some((value(pair[0], "name")?, value(pair[1], "version")?)))
        .filter(|(name, _)| names.contains(&name.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_the_locked_ones() {
        let lock = "[[package]]\nname = \"safetensors\"\nversion = \"0.8.0\"\n\n\
                    [[package]]\nname = \"safetensors-more\"\nversion = \"1.0.0\"\n";
        let versions = locked_versions(lock, &["safetensors"]);
        assert_eq!(versions.len(), 1);
        assert_eq!(versions["safetensors"], "0.8.0");
        assert_eq!(super::versions().unwrap().len(), PEER_CRATES.len());
    }
}
