//! `cargo xtask bench`: loads of generated checkpoints against hand-written reads.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use tensora_benches::{Bench, Subject};
use tensora_formats::Format;

use crate::fixtures::{self, Data};
use crate::{presets, programs};

/// The checkpoint with the most tensors: what opening is measured on.
const OPEN_PRESET: &str = "qwen3-30b-a3b";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// Which checkpoints to load; they are generated if they are missing
    #[arg(value_name = "PRESET", default_value = "qwen3-0.6b")]
    presets: Vec<String>,
    /// The format on disk; may be given several times
    #[arg(long = "layout", value_name = "FORMAT", default_value = "safetensors")]
    layouts: Vec<Format>,
    /// How often each case is timed
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: u32,
    /// Begin no further round after so many seconds
    #[arg(long, value_name = "SECONDS")]
    budget: Option<u64>,
    /// The folder that holds the fixtures; `fixtures` in the repository unless given
    #[arg(long, value_name = "DIR")]
    fixtures: Option<PathBuf>,
    /// Where to write run.json and run.md; `benches/runs/<date>-<kind of host>` unless given
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Fail if a figure misses its bound
    #[arg(long)]
    check: bool,
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
        let mut options = fixtures::Options::new(folder);
        let programs = programs::build()?;
        let mut loads = Vec::new();
        for name in &self.presets {
            let preset = presets::find(name).with_context(|| {
                format!("no preset is named {name:?}; `cargo xtask gen-fixtures` lists them")
            })?;
            for &layout in &self.layouts {
                loads.push(Subject {
                    preset: name.clone(),
                    path: fixtures::ensure(preset, layout, &options)?,
                });
            }
        }
        options.data = Data::Sparse;
        let many = presets::find(OPEN_PRESET).context("the preset with the most tensors")?;
        let opens = vec![Subject {
            preset: OPEN_PRESET.to_owned(),
            path: fixtures::ensure(many, Format::Safetensors, &options)?,
        }];

        let bench = Bench {
            loads,
            opens,
            rounds: self.rounds.max(1),
            budget: self.budget.map(Duration::from_secs),
            programs,
            command: command_line(),
        };
        let run = tensora_benches::run(&bench, &mut |line| println!("{line}"))?;
        let markdown = run.to_markdown();
        println!("\n{markdown}");

        let out = match &self.out {
            Some(out) => out.clone(),
            None => crate::tidy::repository_root()
                .join("benches/runs")
                .join(format!("{}-{}", today()?, run.host.kind())),
        };
        std::fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
        std::fs::write(out.join("run.json"), serde_json::to_vec_pretty(&run)?)?;
        std::fs::write(out.join("run.md"), markdown)?;
        println!("written to {}", out.display());

        let missed = run
            .findings()
            .into_iter()
            .filter(|finding| !finding.is_kept())
            .map(|finding| finding.what)
            .collect::<Vec<_>>();
        if self.check && !missed.is_empty() {
            bail!("bounds were missed:\n  {}", missed.join("\n  "));
        }
        Ok(())
    }
}

/// As it would be typed: paths of this machine have no place in an archive.
fn command_line() -> String {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    format!("cargo xtask {}", arguments.join(" "))
}

fn today() -> Result<String> {
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%d"])
        .output()
        .context("ask `date`")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
