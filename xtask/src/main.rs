//! `cargo xtask`: the repository's chores.
#![forbid(unsafe_code)]

use std::num::NonZero;
use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser};
use tensora_formats::Format;
use xtask::bench::BenchArguments;
use xtask::demo::DemoArguments;
use xtask::fixtures::{self, Data, Existing};
use xtask::fuzz::FuzzArguments;
use xtask::instructions::InstructionsArguments;
use xtask::presets::{self, PRESETS, Preset};
use xtask::simulate::SimulateArguments;
use xtask::soak::SoakArguments;
use xtask::valgrind::ValgrindArguments;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Chores of the Tensora repository")]
enum Chore {
    /// Generate checkpoints of real geometry, with content that is the same on every machine
    GenFixtures(GenFixtures),
    /// Remove generated checkpoints
    CleanFixtures(CleanFixtures),
    /// Generate a checkpoint, load it every way, and explain the automatic choice
    Demo(DemoArguments),
    /// Measure loads against hand-written reads and write the run down
    Bench(BenchArguments),
    /// Count the instructions of what the processor bounds, beside those of the safetensors crate
    Instructions(InstructionsArguments),
    /// Load, stream, digest and convert thousands of times in one process, and watch what it holds
    Soak(SoakArguments),
    /// Run the tests in which reads go wrong, with as many seeds as time allows
    Simulate(SimulateArguments),
    /// Run every fuzz target for a while
    Fuzz(FuzzArguments),
    /// Run tests of the backends while valgrind watches every access to memory
    Valgrind(ValgrindArguments),
    /// Check the repository's invariants
    Tidy(TidyArguments),
    /// Check that every combination of cargo features compiles without warnings
    Features,
}

#[derive(Debug, Args)]
struct TidyArguments {
    /// First write what is generated from the sources: docs/UNSAFE.md
    #[arg(long)]
    write: bool,
}

impl TidyArguments {
    fn run(&self) -> Result<()> {
        if self.write {
            xtask::tidy::write()?;
        }
        xtask::tidy::run()
    }
}

#[derive(Debug, Args)]
struct GenFixtures {
    /// Which models to imitate; lists them if none is named
    #[arg(value_name = "PRESET", value_parser = preset_names())]
    presets: Vec<String>,
    /// The folder that holds the fixtures; `fixtures` in the repository unless given
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The format on disk: safetensors, serverlessllm-store or serverlessllm-partitioned
    #[arg(long, value_name = "FORMAT", default_value_t = Format::Safetensors)]
    layout: Format,
    /// The number of partitions, for serverlessllm-partitioned
    #[arg(long, value_name = "N", default_value_t = fixtures::DEFAULT_PARTITIONS)]
    partitions: NonZero<u32>,
    /// Chooses the content
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Write real headers and lengths, but holes in place of the data
    #[arg(long)]
    sparse: bool,
    /// Generate again what is complete already
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct CleanFixtures {
    /// Which to remove, in every format; all of them if none is named
    #[arg(value_name = "PRESET", value_parser = preset_names())]
    presets: Vec<String>,
    /// The folder that holds the fixtures; `fixtures` in the repository unless given
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn preset_names() -> PossibleValuesParser {
    PossibleValuesParser::new(PRESETS.iter().map(|preset| preset.name))
}

/// The parser has let only existing names through.
fn find_all(names: &[String]) -> Vec<&'static Preset> {
    names
        .iter()
        .filter_map(|name| presets::find(name))
        .collect()
}

impl GenFixtures {
    fn run(&self) -> Result<()> {
        let options = fixtures::Options {
            folder: self.out.clone().unwrap_or_else(fixtures::default_folder),
            seed: self.seed,
            partitions: self.partitions,
            data: if self.sparse {
                Data::Sparse
            } else {
                Data::Full
            },
            existing: if self.force {
                Existing::Replace
            } else {
                Existing::Reuse
            },
        };
        if self.presets.is_empty() {
            presets::list();
        }
        for preset in find_all(&self.presets) {
            fixtures::ensure(preset, self.layout, &options)?;
        }
        Ok(())
    }
}

impl CleanFixtures {
    fn run(&self) -> Result<()> {
        let folder = self.out.clone().unwrap_or_else(fixtures::default_folder);
        fixtures::clean(&folder, &find_all(&self.presets))
    }
}

fn main() -> Result<()> {
    match Chore::parse() {
        Chore::GenFixtures(arguments) => arguments.run(),
        Chore::CleanFixtures(arguments) => arguments.run(),
        Chore::Demo(arguments) => arguments.run(),
        Chore::Bench(arguments) => arguments.run(),
        Chore::Instructions(arguments) => arguments.run(),
        Chore::Soak(arguments) => arguments.run(),
        Chore::Simulate(arguments) => arguments.run(),
        Chore::Fuzz(arguments) => arguments.run(),
        Chore::Valgrind(arguments) => arguments.run(),
        Chore::Tidy(arguments) => arguments.run(),
        Chore::Features => xtask::features::run(),
    }
}
