//! Opening and planning, beside the least that a program must do to know the same tensors.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use safetensors::tensor::Metadata;
use tensora::CheckpointIndex;
use tensora::heuristics::{AccessPattern, MappingConsent, Policy, StorageLayout, Workload, plan};
use tensora::io::{Platform, SourceFile, StorageFacts};

use crate::Subject;
use crate::run::{OpenRound, OpenTimes};

/// Opens and plans the SafeTensors checkpoint `rounds` times, beside the `safetensors` crate.
///
/// # Errors
///
/// When the checkpoint cannot be opened, or the crate finds other tensors in it.
pub fn measure_open(subject: &Subject, rounds: u32) -> Result<OpenTimes> {
    let index = CheckpointIndex::open(&subject.path)
        .with_context(|| format!("open {}", subject.path.display()))?;
    let paths: Vec<&Path> = index
        .files()
        .iter()
        .map(|file| file.path.as_path())
        .collect();
    // The headers are in the page cache from here on, and both sides agree on what is in them.
    let data_bytes: u64 = open_with_crate(&paths)?
        .iter()
        .map(|shard| shard.data_len() as u64)
        .sum();
    ensure!(
        data_bytes == index.data_bytes(),
        "the crate finds {data_bytes} bytes of tensors, not {}",
        index.data_bytes()
    );
    let mut times = OpenTimes {
        preset: subject.preset.clone(),
        tensor_count: index.tensors().len(),
        file_count: paths.len(),
        rounds: Vec::new(),
    };
    let workload = workload(&index)?;
    // Such a checkpoint fits into no memory as owned tensors; what planning takes does not depend on it.
    let mut policy = Policy::default();
    policy.mapping = MappingConsent::Granted;
    for round in 0..rounds.max(1) {
        // The sides take turns in coming first.
        let (open_seconds, crate_seconds) = if round % 2 == 0 {
            let open_seconds = time(|| CheckpointIndex::open(&subject.path))?;
            (open_seconds, time(|| open_with_crate(&paths))?)
        } else {
            let crate_seconds = time(|| open_with_crate(&paths))?;
            (
                time(|| CheckpointIndex::open(&subject.path))?,
                crate_seconds,
            )
        };
        let begun = Instant::now();
        let files = paths
            .iter()
            .map(|&path| SourceFile::open(path))
            .collect::<Result<Vec<_>, _>>()?;
        let mut platform = Platform::probe();
        platform.storage = Some(StorageFacts::probe(&files.iter().collect::<Vec<_>>()));
        let probed = begun.elapsed();
        plan(&workload, &platform, &policy)?;
        let planned = begun.elapsed();
        times.rounds.push(OpenRound {
            open_seconds,
            crate_seconds,
            probe_and_plan_seconds: planned.as_secs_f64(),
            plan_seconds: (planned - probed).as_secs_f64(),
        });
    }
    Ok(times)
}

/// How long it took to get the value, not to drop it.
fn time<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<f64, E> {
    let begun = Instant::now();
    let value = work()?;
    let elapsed = begun.elapsed();
    drop(value);
    Ok(elapsed.as_secs_f64())
}

/// The crate parses one file at a time and looks at no index.
fn open_with_crate(paths: &[&Path]) -> Result<Vec<Metadata>> {
    let read = |path: &&Path| -> Result<Metadata> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut header = vec![0; usize::try_from(u64::from_le_bytes(length))?];
        file.read_exact(&mut header)?;
        // As the crate does it; without its check of the file's length, for which it wants all bytes.
        Ok(serde_json::from_str(std::str::from_utf8(&header)?)?)
    };
    paths.iter().map(read).collect()
}

fn workload(index: &CheckpointIndex) -> Result<Workload> {
    let mut workload = Workload::new(StorageLayout::SafeTensors, AccessPattern::WholeFiles);
    workload.files = u32::try_from(index.files().len())?;
    workload.tensors = index.tensors().len() as u64;
    workload.read_bytes = index.data_bytes();
    workload.requests = index.files().len() as u64;
    Ok(workload)
}
