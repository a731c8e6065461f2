//! `cargo xtask soak`: thousands of loads in one process, which must hold no more at the end than at the beginning.

use std::fmt::Write as _;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tensora::convert::{ConvertOptions, DataHasher, Reading};
use tensora::formats::{CheckpointIndex, Sharding, TensorSpec, safetensors_layout};
use tensora::io::{Control, ResidentPolicy, TransferParams};
use tensora::{BackendKind, DigestSink, DirectPolicy, Dtype, Format, Loader};

/// Growth of resident memory that is an allocator's, not a leak. A lost load would be 4 MB, each.
const SLACK_BYTES: u64 = 8 << 20;
/// How often, over the whole run, what the process holds is counted.
const SAMPLES: u64 = 40;
/// The first part of the run, in which what is made once and kept is made.
const WARM_UP_PERCENT: u64 = 10;

/// Arguments of `cargo xtask soak`.
#[derive(Debug, Args)]
pub struct SoakArguments {
    /// How many loads; every second one is followed by a stream, every fourth by a digest, every eighth by a conversion
    #[arg(long, value_name = "N", default_value_t = 2000)]
    loads: u64,
    /// Stop after this many seconds, even if that is before the last load
    #[arg(long, value_name = "S")]
    budget: Option<u64>,
    /// Write the table into this file, too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// What the process held at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    loads: u64,
    anonymous_bytes: u64,
    descriptors: u64,
    threads: u64,
    /// What lies beside the checkpoints that were there in the beginning, and they themselves.
    files: u64,
}

/// How often each thing was done.
#[derive(Debug, Default)]
struct Counts {
    loads: u64,
    streams: u64,
    digests: u64,
    conversions: u64,
}

impl SoakArguments {
    /// Soaks, and prints what the process held on the way.
    ///
    /// # Errors
    ///
    /// When something gives the wrong digest or fails, or the process holds more and more.
    pub fn run(&self) -> Result<()> {
        ensure!(
            cfg!(target_os = "linux"),
            "what a process holds is read from /proc, which only Linux has"
        );
        let begun = Instant::now();
        let stage = Stage::new()?;
        let mut counts = Counts::default();
        let mut samples = vec![Sample::take(0, stage.directory.path())?];
        let every = (self.loads / SAMPLES).max(1);
        for number in 0..self.loads {
            stage.round(number, &mut counts)?;
            if (number + 1) % every == 0 {
                let folder = stage.directory.path();
                samples.push(Sample::settled(number + 1, folder, &samples)?);
            }
            let is_over = |seconds| begun.elapsed() >= Duration::from_secs(seconds);
            if self.budget.is_some_and(is_over) {
                break;
            }
        }
        let report = report(&counts, &stage.kinds, &samples, begun.elapsed())?;
        println!("{report}");
        if let Some(path) = &self.out {
            std::fs::write(path, &report).with_context(|| format!("write {}", path.display()))?;
        }
        judge(&samples)
    }
}

/// Small checkpoints of the same tensors.
struct Stage {
    directory: tempfile::TempDir,
    paths: Vec<PathBuf>,
    digest: String,
    kinds: Vec<BackendKind>,
}

impl Stage {
    fn new() -> Result<Self> {
        // Hashing has a pool of threads that stays.
        DataHasher::new().update(&vec![0; 16 << 20]);
        let directory = tempfile::tempdir()?;
        let first = directory.path().join("safetensors");
        write_checkpoint(&first)?;
        let digest = tensora::load(&first)?.digest()?.to_string();
        let mut paths = vec![first];
        let three = NonZero::<u32>::MIN.saturating_add(2);
        for (name, options) in [
            (
                "shards",
                ConvertOptions::new(Format::Safetensors).shards(three),
            ),
            ("store", ConvertOptions::new(Format::ServerlessLlmStore)),
            (
                "partitions",
                ConvertOptions::new(Format::ServerlessLlmPartitioned).partitions(three),
            ),
        ] {
            let path = directory.path().join(name);
            let index = CheckpointIndex::open(&paths[0])?;
            options.plan(&index, &path)?.run(&Control::new())?;
            paths.push(path);
        }
        let kinds: Vec<_> = BackendKind::ALL
            .into_iter()
            .filter(|kind| match tensora::io::backend(*kind) {
                Ok(_) => true,
                Err(error) => {
                    eprintln!("SKIP: soak with {kind}: {error}");
                    false
                }
            })
            .collect();
        ensure!(!kinds.is_empty(), "no backend works here");
        Ok(Self {
            directory,
            paths,
            digest,
            kinds,
        })
    }

    /// One load, and now and then more.
    fn round(&self, number: u64, counts: &mut Counts) -> Result<()> {
        let turn = usize::try_from(number)?;
        let kind = self.kinds[turn % self.kinds.len()];
        let path = &self.paths[turn / self.kinds.len() % self.paths.len()];
        let what = || format!("round {number}, {kind}, {}", path.display());
        let loader = Loader::new().backend(kind);
        let loaded = loader.load(path).with_context(what)?;
        self.check(&loaded.digest()?.to_string())
            .with_context(what)?;
        counts.loads += 1;
        if number % 2 == 1 {
            let mut sink = DigestSink::new();
            let opened = loader.clone().memory_limit_bytes(8 << 20).open(path)?;
            opened.stream_into(&mut sink).with_context(what)?;
            self.check(&sink.digest().to_string()).with_context(what)?;
            counts.streams += 1;
        }
        if number % 4 == 2 {
            let digest = loader.open(path)?.digest().with_context(what)?;
            self.check(&digest.to_string()).with_context(what)?;
            counts.digests += 1;
        }
        if number % 8 == 4 {
            self.convert(turn / 8, kind, path).with_context(what)?;
            counts.conversions += 1;
        }
        Ok(())
    }

    fn convert(&self, turn: usize, kind: BackendKind, path: &Path) -> Result<()> {
        let formats = [
            Format::Safetensors,
            Format::ServerlessLlmStore,
            Format::ServerlessLlmPartitioned,
        ];
        let target = self.directory.path().join("target");
        let transfer = TransferParams {
            chunk_bytes: 256 << 10,
            queue_depth: 4,
            workers: 2,
            direct: DirectPolicy::Preferred,
            resident: ResidentPolicy::Copy,
        };
        let backend = tensora::io::backend(kind)?.into();
        let index = CheckpointIndex::open(path)?;
        ConvertOptions::new(formats[turn % formats.len()])
            .memory_limit_bytes(2 << 20)
            .reading(Reading::new(backend, 2, transfer))
            .plan(&index, &target)?
            .run(&Control::new())?;
        self.check(&tensora::open(&target)?.digest()?.to_string())?;
        for entry in std::fs::read_dir(&target)? {
            let name = entry?.file_name();
            let is_left_over = name.as_encoded_bytes().starts_with(b".");
            ensure!(!is_left_over, "a conversion left {}", name.display());
        }
        std::fs::remove_dir_all(&target)?;
        Ok(())
    }

    fn check(&self, digest: &str) -> Result<()> {
        ensure!(
            digest == self.digest,
            "the digest is {digest}, not {}",
            self.digest
        );
        Ok(())
    }
}

/// About 4 MB: one tensor larger than a window, and many small ones.
fn write_checkpoint(folder: &Path) -> Result<()> {
    let mut specs = vec![TensorSpec {
        name: "embedding".to_owned(),
        dtype: Dtype::BF16,
        shape: vec![1531, 1024],
    }];
    for layer in 0..24 {
        for (name, shape) in [("weight", vec![97, 129]), ("norm", vec![129])] {
            specs.push(TensorSpec {
                name: format!("layers.{layer}.{name}"),
                dtype: Dtype::BF16,
                shape,
            });
        }
    }
    let layout = safetensors_layout(&specs, &Default::default(), Sharding::Single, 8)?;
    std::fs::create_dir(folder)?;
    for file in &layout.files {
        let mut bytes = file.prefix.clone();
        // Any bytes do, as long as no two places have the same ones.
        let length = usize::try_from(file.bytes)?;
        let mut state = 1_u64;
        while bytes.len() < length {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            bytes.extend_from_slice(&(state >> 32).to_le_bytes());
        }
        bytes.truncate(length);
        std::fs::write(folder.join(&file.name), bytes)?;
    }
    if let Some(index) = &layout.index {
        std::fs::write(folder.join(&index.name), &index.contents)?;
    }
    Ok(())
}

impl Sample {
    fn take(loads: u64, folder: &Path) -> Result<Self> {
        let count = |folder: &Path| -> Result<u64> {
            let entries =
                std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
            Ok(entries.count() as u64)
        };
        let status = std::fs::read_to_string("/proc/self/status")?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok(Self {
            loads,
            anonymous_bytes: kib.context("/proc/self/status has no RssAnon")? << 10,
            descriptors: count(Path::new("/proc/self/fd"))?,
            threads: count(Path::new("/proc/self/task"))?,
            files: count(folder)?,
        })
    }

    /// After threads that are just ending have ended.
    fn settled(loads: u64, folder: &Path, before: &[Self]) -> Result<Self> {
        let usual = before
            .iter()
            .map(|sample| sample.threads)
            .min()
            .unwrap_or(0);
        for _ in 0..200 {
            let sample = Self::take(loads, folder)?;
            if sample.threads <= usual {
                return Ok(sample);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Self::take(loads, folder)
    }
}

/// The samples from which on nothing is new.
fn after_warm_up(samples: &[Sample]) -> &[Sample] {
    let all = samples.last().map_or(0, |sample| sample.loads);
    let first = samples
        .iter()
        .position(|sample| sample.loads * 100 >= all * WARM_UP_PERCENT && sample.loads > 0)
        .unwrap_or(0);
    &samples[first..]
}

/// Whether the process holds no more and more.
fn judge(samples: &[Sample]) -> Result<()> {
    let [first, .., last] = after_warm_up(samples) else {
        bail!("too few loads to tell growth from a beginning; give it more time");
    };
    let grown_bytes = last.anonymous_bytes.saturating_sub(first.anonymous_bytes);
    ensure!(
        grown_bytes <= SLACK_BYTES,
        "resident memory grew by {grown_bytes} bytes between load {} and {}",
        first.loads,
        last.loads
    );
    for (what, before, after) in [
        ("descriptors", first.descriptors, last.descriptors),
        ("threads", first.threads, last.threads),
        ("files", first.files, last.files),
    ] {
        ensure!(
            after <= before,
            "{before} {what} after load {}, {after} after load {}",
            first.loads,
            last.loads
        );
    }
    Ok(())
}

fn report(
    counts: &Counts,
    kinds: &[BackendKind],
    samples: &[Sample],
    elapsed: Duration,
) -> Result<String> {
    let Counts {
        loads,
        streams,
        digests,
        conversions,
    } = counts;
    let names: Vec<String> = kinds.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "# Soak\n\n`cargo xtask soak --loads {loads}`: {loads} loads, {streams} streams, {digests} digests and \
         {conversions} conversions in one process, with {}, in {:.0} s. Every digest was right.\n\n\
         | loads | resident anonymous memory | descriptors | threads | files |\n|---:|---:|---:|---:|---:|\n",
        names.join(", "),
        elapsed.as_secs_f64()
    );
    for sample in samples {
        writeln!(
            text,
            "| {} | {} KiB | {} | {} | {} |",
            sample.loads,
            sample.anonymous_bytes >> 10,
            sample.descriptors,
            sample.threads,
            sample.files
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(count: u64) -> Vec<Sample> {
        let sample = |loads| Sample {
            loads,
            anonymous_bytes: 20 << 20,
            descriptors: 7,
            threads: 3,
            files: 4,
        };
        (0..=count).map(|number| sample(number * 50)).collect()
    }

    #[test]
    fn what_grows_is_found_and_what_is_flat_passes() {
        judge(&flat(40)).unwrap();
        let grown = |change: fn(&mut Sample)| {
            let mut samples = flat(40);
            samples.iter_mut().skip(20).for_each(change);
            judge(&samples).unwrap_err().to_string()
        };
        assert!(grown(|sample| sample.descriptors += 1).contains("7 descriptors"));
        assert!(grown(|sample| sample.threads += 1).contains("3 threads"));
        assert!(grown(|sample| sample.files += 1).contains("4 files"));
        let memory = grown(|sample| sample.anonymous_bytes += SLACK_BYTES + 1);
        assert!(memory.contains("resident memory grew"), "{memory}");
        assert!(judge(&flat(0)).is_err(), "one sample says nothing");
    }

    #[test]
    fn the_beginning_does_not_count() {
        let mut samples = flat(40);
        samples[0].threads = 1;
        samples[1].anonymous_bytes = 0;
        judge(&samples).unwrap();
    }

    #[test]
    fn a_round_does_what_it_says() {
        let stage = Stage::new().unwrap();
        let mut counts = Counts::default();
        for number in 0..9 {
            stage.round(number, &mut counts).unwrap();
        }
        let done = (
            counts.loads,
            counts.streams,
            counts.digests,
            counts.conversions,
        );
        assert_eq!(done, (9, 4, 2, 1));
        assert!(stage.check("another").is_err());
    }
}
