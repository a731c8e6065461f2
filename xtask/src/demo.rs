//! `cargo xtask demo`: a first look at what Tensora does.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;
use tensora_formats::{CheckpointIndex, Format};
use tensora_io::{CacheState, SourceFile};

use crate::{fixtures, presets, programs};

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Which checkpoint to load; it is generated if it is missing
    #[arg(long, value_name = "PRESET", default_value = "qwen3-0.6b")]
    preset: String,
    /// The format on disk; given several times, all must hold the same tensors
    #[arg(long = "layout", value_name = "FORMAT", default_value = "safetensors")]
    layouts: Vec<Format>,
    /// The folder that holds the fixtures; `fixtures` in the repository unless given
    #[arg(long, value_name = "DIR")]
    fixtures: Option<PathBuf>,
}

/// What `tensora load --json` prints, as far as the table shows it.
#[derive(Debug, Deserialize)]
struct Loaded {
    backend: String,
    memory: String,
    elapsed_seconds: f64,
    bytes_per_second: f64,
    digest: String,
    plan: PlanFacts,
}

#[derive(Debug, Deserialize)]
struct PlanFacts {
    direct: bool,
}

impl DemoArguments {
    /// Builds, generates, loads with every backend and automatically, and explains.
    ///
    /// # Errors
    ///
    /// When something cannot be built, generated or loaded, or two loads give different tensors.
    pub fn run(&self) -> Result<()> {
        let preset = presets::find(&self.preset).with_context(|| {
            format!(
                "no preset is named {:?}; `cargo xtask gen-fixtures` lists them",
                self.preset
            )
        })?;
        println!("Building the tensora command …");
        let tensora = programs::build_command()?.join("tensora");
        let folder = self
            .fixtures
            .clone()
            .unwrap_or_else(fixtures::default_folder);
        let options = fixtures::Options::new(folder);
        let mut digests = Vec::new();
        for &layout in &self.layouts {
            let checkpoint = fixtures::ensure(preset, layout, &options)?;
            digests.extend(show(&tensora, &checkpoint)?);
        }
        ensure!(
            digests.windows(2).all(|pair| pair[0] == pair[1]),
            "the loads gave different tensors"
        );
        println!(
            "\nAll {} loads gave the same tensors, content digest {}.",
            digests.len(),
            digests.first().map_or("", String::as_str)
        );
        Ok(())
    }
}

/// Explains the plan for one checkpoint and loads it every way; the digest of each load.
fn show(tensora: &Path, checkpoint: &Path) -> Result<Vec<String>> {
    let name = checkpoint.file_name().unwrap_or_default().display();
    println!("\n$ tensora plan {name}");
    let status = Command::new(tensora).arg("plan").arg(checkpoint).status()?;
    ensure!(status.success(), "tensora plan failed");

    println!(
        "\nEach way once, with nothing in the page cache, then again with all that fits in it."
    );
    println!("One round is a look, not a measurement; `cargo xtask bench` measures.\n");
    println!(
        "{:<10} {:<7} {:<9} {:<7} {:<7} {:>9} {:>8}  content digest",
        "asked for", "cached", "backend", "memory", "direct", "seconds", "GB/s"
    );
    let index = CheckpointIndex::open(checkpoint)?;
    let files = index
        .files()
        .iter()
        .map(|file| SourceFile::open(&file.path))
        .collect::<Result<Vec<_>, _>>()?;
    let mut digests = Vec::new();
    for state in [CacheState::Cold, CacheState::Warm] {
        for choice in ["auto", "sync", "async", "io-uring", "mmap"] {
            tensora_measure::prime_memory(index.data_bytes().saturating_mul(2))?;
            let share = tensora_measure::prepare(&files, state)?;
            let loaded = load(tensora, checkpoint, choice)?;
            println!(
                "{choice:<10} {:>5.1} % {:<9} {:<7} {:<7} {:>9.3} {:>8.2}  {}…",
                share * 100.0,
                loaded.backend,
                loaded.memory,
                if loaded.plan.direct { "yes" } else { "no" },
                loaded.elapsed_seconds,
                loaded.bytes_per_second / 1e9,
                &loaded.digest[..16.min(loaded.digest.len())],
            );
            digests.push(loaded.digest);
        }
    }
    Ok(digests)
}

fn load(tensora: &Path, checkpoint: &Path, choice: &str) -> Result<Loaded> {
    let output = Command::new(tensora)
        .arg("load")
        .arg(checkpoint)
        .args(["--backend", choice, "--digest", "--json"])
        .output()
        .context("start tensora")?;
    ensure!(
        output.status.success(),
        "tensora load --backend {choice} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    serde_json::from_slice(&output.stdout).context("what tensora load printed")
}
