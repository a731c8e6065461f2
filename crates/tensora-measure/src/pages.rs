//! The state of the page cache, made and verified.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tensora_io::{CacheState, Platform, Region, SourceFile};

use crate::{Error, Result};

/// Of the bytes that shall be cold, no more than one part in so many may be resident.
const TOLERATED_COLD: u64 = 1000;
/// Of the bytes that shall be warm, all but one part in so many must be resident. Some machines
/// reclaim single pages at any time.
const TOLERATED_WARM: u64 = 1000;
/// How often a state is tried to be made: pages that are being written back cannot be evicted.
const TRIES: u32 = 5;
/// How much is brought into the page cache per read.
const READ_BYTES: usize = 4 << 20;
/// How many threads do so.
const READ_THREADS: usize = 8;
/// Where the half state is cut is rounded down to this: the largest folio of the page cache.
const CUT_BYTES: u64 = 2 << 20;

/// Puts the files into the state, and says which share of their bytes is in the page cache then, from 0 to 1.
///
/// Cold files have next to nothing in it. Files that shall be warm and do not fit into memory beside
/// everything else are there in part; whoever measures must look, or call [`require`].
///
/// # Errors
///
/// When a file cannot be read or evicted, does not stay evicted, or the system does not tell what is
/// resident.
pub fn prepare(files: &[SourceFile], state: CacheState) -> Result<f64> {
    for file in files {
        let warm = warm_range(file, state);
        let cold = warm.end..file.len();
        evict(file, &cold)?;
        read(file, &warm)?;
    }
    share(files)
}

/// [`prepare`], and an error unless the state is there well enough to time anything.
///
/// # Errors
///
/// As [`prepare`], and [`Error::StateNotMade`].
pub fn require(files: &[SourceFile], state: CacheState) -> Result<()> {
    for _ in 0..TRIES {
        prepare(files, state)?;
        if is_made(files, state)? {
            return Ok(());
        }
    }
    Err(Error::StateNotMade {
        state,
        resident_percent: share(files)? * 100.0,
        remedy: "is there enough memory, and does nobody else use these files?",
    })
}

fn is_made(files: &[SourceFile], state: CacheState) -> Result<bool> {
    let (mut warm_bytes, mut missing_bytes) = (0, 0);
    for file in files {
        let warm = warm_range(file, state);
        warm_bytes += warm.end;
        missing_bytes += warm.end - resident(file, warm)?;
    }
    Ok(missing_bytes <= warm_bytes / TOLERATED_WARM)
}

/// What shall be resident: everything before the cut.
fn warm_range(file: &SourceFile, state: CacheState) -> Range<u64> {
    let end = match state {
        CacheState::Cold => 0,
        CacheState::Half => file.len() / 2 / CUT_BYTES * CUT_BYTES,
        CacheState::Warm => file.len(),
    };
    0..end
}

/// Evicts the whole file unless no more of `range` is resident than is tolerated.
pub(crate) fn evict(file: &SourceFile, range: &Range<u64>) -> Result<()> {
    let tolerated = (range.end - range.start) / TOLERATED_COLD;
    for attempt in 0..TRIES {
        if resident(file, range.clone())? <= tolerated {
            return Ok(());
        }
        if attempt > 0 {
            // Dirty pages stay: have them written, then try again.
            File::open(file.path())
                .and_then(|file| file.sync_all())
                .map_err(|source| failed("sync", file.path(), source))?;
        }
        file.evict()?;
    }
    #[allow(clippy::cast_precision_loss)]
    let resident_percent = resident(file, range.clone())? as f64 * 100.0 / file.len().max(1) as f64;
    Err(Error::StateNotMade {
        state: CacheState::Cold,
        resident_percent,
        remedy: "somebody has them mapped or keeps reading them, or their file system keeps everything \
                 in memory: cold loads cannot be measured here",
    })
}

/// Brings `range` into the page cache.
pub(crate) fn read(file: &SourceFile, range: &Range<u64>) -> Result<()> {
    if range.is_empty() || resident(file, range.clone())? == range.end - range.start {
        return Ok(());
    }
    // Several threads reach the speed of the device; each takes the next piece, so that together they still
    // read forward.
    let next = AtomicU64::new(range.start);
    let work = || -> std::io::Result<()> {
        let mut reader = File::open(file.path())?;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let offset = next.fetch_add(READ_BYTES as u64, Ordering::Relaxed);
            if offset >= range.end {
                return Ok(());
            }
            reader.seek(SeekFrom::Start(offset))?;
            let wanted = usize::try_from(range.end - offset).unwrap_or(READ_BYTES);
            reader.read_exact(&mut buffer[..wanted.min(READ_BYTES)])?;
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let crew: Vec<_> = (0..READ_THREADS).map(|_| scope.spawn(work)).collect();
        crew.into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    let result: std::io::Result<()> = results.into_iter().collect();
    result.map_err(|source| failed("read", file.path(), source))
}

fn share(files: &[SourceFile]) -> Result<f64> {
    let mut resident_bytes = 0;
    for file in files {
        resident_bytes += resident(file, 0..file.len())?;
    }
    let file_bytes: u64 = files.iter().map(SourceFile::len).sum();
    #[allow(clippy::cast_precision_loss)]
    Ok(resident_bytes as f64 / file_bytes.max(1) as f64)
}

pub(crate) fn resident(file: &SourceFile, range: Range<u64>) -> Result<u64> {
    file.resident_bytes(range)
        .ok_or_else(|| Error::ResidencyUnknown {
            path: file.path().to_owned(),
        })
}

fn failed(operation: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// Touches as much memory as a case will need, as far as the machine has it, and gives it back: a virtual
/// machine's first touch of memory that it had returned to its host is several times slower than the next.
///
/// Some virtual machines tell their host of freed memory at once and keep little of it. Priming still takes the
/// worst off, what was freed by dropping gigabytes from the page cache, and this returns only when the telling
/// is over, which would otherwise go on while time runs.
///
/// # Errors
///
/// When that memory cannot be had after all.
pub fn prime_memory(bytes: u64) -> Result<()> {
    touch_memory(bytes)?;
    settle();
    Ok(())
}

/// What has been told to the host of free memory so far, in KiB, where the kernel counts that.
const REPORTED: &str = "/sys/module/page_reporting/parameters/reported_kib";
/// How long nothing must have been told for the telling to be over, and how long it is waited for at most.
const SETTLED: Duration = Duration::from_millis(150);
const LONGEST_SETTLING: Duration = Duration::from_secs(20);

/// Waits until the machine has given back what was freed.
fn settle() {
    let begun = Instant::now();
    let mut last = (None, begun);
    while let Ok(reported) = std::fs::read_to_string(REPORTED) {
        let now = Instant::now();
        if last.0.as_ref() != Some(&reported) {
            last = (Some(reported), now);
        }
        if now - last.1 >= SETTLED || now - begun >= LONGEST_SETTLING {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn touch_memory(bytes: u64) -> Result<()> {
    let platform = Platform::probe();
    let usable_bytes = platform
        .memory
        .usable_bytes()
        .map_or(u64::MAX, |(usable_bytes, _)| usable_bytes);
    let bytes = bytes.min(usable_bytes / 10 * 9);
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut region = Region::allocate(bytes)?;
    let workers = platform.cpus.max(1) as usize;
    let share = bytes.div_ceil(workers).max(1);
    std::thread::scope(|scope| {
        for part in region.as_mut_slice().chunks_mut(share) {
            scope.spawn(|| part.chunks_mut(4096).for_each(|page| page[0] = 1));
        }
    });
    std::hint::black_box(region.as_slice());
    Ok(())
}
