//! The state of the page cache, made and verified.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tensora::io::{Platform, Region, SourceFile};

/// What the page cache holds of a checkpoint when a case starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheState {
    /// Nothing.
    Cold,
    /// All of it.
    Warm,
}

impl fmt::Display for CacheState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
        })
    }
}

/// Of a cold file, no more than one part in so many may be resident.
const TOLERATED_SHARE: u64 = 1000;
/// Of warm files, at least this share must be resident for a timing to count. Some machines reclaim
/// single pages at any time.
const WARM_SHARE: f64 = 0.999;
/// How often a state is tried to be made. Pages that are being written back cannot be evicted, and some
/// machines reclaim pages at any time.
const TRIES: u32 = 5;

/// Makes the state, and says which share of the files is in the page cache then, from 0 to 1.
///
/// Of cold files next to nothing is. Warm ones that do not fit into memory beside everything else are there
/// in part; whoever measures must look.
///
/// # Errors
///
/// When a file cannot be read or evicted, or the system does not tell what is resident.
pub fn prepare(files: &[PathBuf], state: CacheState) -> Result<f64> {
    let files = files
        .iter()
        .map(SourceFile::open)
        .collect::<Result<Vec<_>, _>>()?;
    for file in &files {
        match state {
            CacheState::Cold => evict(file)?,
            CacheState::Warm => warm(file)?,
        }
    }
    let mut resident_bytes = 0;
    for file in &files {
        resident_bytes += resident(file)?;
    }
    let file_bytes: u64 = files.iter().map(SourceFile::len).sum();
    #[allow(clippy::cast_precision_loss)]
    Ok(resident_bytes as f64 / file_bytes.max(1) as f64)
}

/// [`prepare`], and an error where the state is not there well enough to time anything.
pub(crate) fn prepare_for_timing(files: &[PathBuf], state: CacheState) -> Result<()> {
    let mut share = 0.0;
    for _ in 0..TRIES {
        share = prepare(files, state)?;
        if state == CacheState::Cold || share >= WARM_SHARE {
            return Ok(());
        }
    }
    bail!(
        "only {:.1} % of the files stay in the page cache: is there enough memory?",
        share * 100.0
    );
}

fn evict(file: &SourceFile) -> Result<()> {
    for _ in 0..TRIES {
        file.evict()?;
        let resident = resident(file)?;
        if resident <= file.len() / TOLERATED_SHARE {
            return Ok(());
        }
        // Dirty pages stay: have them written, then try again.
        std::fs::File::open(file.path())?.sync_all()?;
    }
    bail!(
        "{} cannot be evicted from the page cache, so nothing can be said about cold loads here",
        file.path().display()
    );
}

fn warm(file: &SourceFile) -> Result<()> {
    if resident(file)? == file.len() {
        return Ok(());
    }
    let mut reader = std::fs::File::open(file.path())?;
    let mut buffer = vec![0; 4 << 20];
    while reader.read(&mut buffer)? > 0 {}
    Ok(())
}

fn resident(file: &SourceFile) -> Result<u64> {
    file.resident_bytes(0..file.len())
        .context("this system does not tell what is in the page cache")
}

/// Touches as much memory as a load will need, as far as the machine has it, and gives it back: a virtual
/// machine's first touch of memory that it had returned to its host is several times slower than the next.
///
/// # Errors
///
/// When that memory cannot be had after all.
pub fn prime_memory(bytes: u64) -> Result<()> {
    let usable_bytes = Platform::probe()
        .memory
        .usable_bytes()
        .map_or(u64::MAX, |(usable_bytes, _)| usable_bytes);
    let bytes = bytes.min(usable_bytes / 10 * 9);
    let mut region = Region::allocate(usize::try_from(bytes)?)?;
    region
        .as_mut_slice()
        .chunks_mut(4096)
        .for_each(|page| page[0] = 1);
    std::hint::black_box(region.as_slice());
    Ok(())
}
