//! One timed way of getting at a checkpoint's tensors, as a process of its own: what `cargo xtask bench` runs.
//!
//! `cargo run --release -p tensora --example timed -- MODE ...`, where MODE is
//!
//! - `load MEMORY BACKEND PATH`: [`tensora::Loader`], as an engine uses it. MEMORY is owned, mapped or
//!   auto, BACKEND is auto, sync, async, io-uring or mmap;
//! - `fs-read FILE...`: `std::fs::read` and the `safetensors` crate;
//! - `memmap2 FILE...`: the crates `memmap2` and `safetensors`;
//! - `raw-map FILE...`: nothing but mapping whole files and populating them, with 8 threads;
//! - `memcpy BYTES`: nothing but copying so many bytes into fresh huge pages, with a thread per processor.
//!
//! Before the clock starts, as many bytes of memory as the environment variable `PRIME_BYTES` says are touched and
//! given back, for the reasons in `docs/BENCHMARKS.md`.
//!
//! Prints one JSON object. `elapsed_seconds` ends when every tensor can be used; after that each of their
//! bytes is read once, by a thread per processor, and `touched_seconds` is both together. `xor` is the
//! exclusive or of all bytes: the same for the same tensors, however they were loaded.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::Serialize;
use tensora::io::{ProfileFact, Region, peak_resident_bytes};
use tensora::{BackendChoice, Loader, MappingPermit, MemoryChoice, Plan};

/// What one thread takes at a time, in bytes.
const PIECE_BYTES: usize = 4 << 20;
const POPULATE_THREADS: usize = 8;
/// Far more than any processor caches, and little beside the copy.
const SOURCE_BYTES: usize = 1 << 30;

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Serialize)]
struct Printed {
    elapsed_seconds: f64,
    touched_seconds: f64,
    data_bytes: u64,
    peak_resident_bytes: Option<u64>,
    xor: u8,
    /// What the planner chose.
    choice: Option<String>,
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Ok(bytes) = std::env::var("PRIME_BYTES") {
        prime(bytes.parse()?)?;
    }
    let printed = match arguments.split_first() {
        Some((mode, [memory, backend, path])) if mode == "load" => load(memory, backend, path)?,
        Some((mode, [bytes])) if mode == "memcpy" => copy_memory(bytes.parse()?)?,
        Some((mode, files)) if !files.is_empty() => {
            let files: Vec<_> = files.iter().map(PathBuf::from).collect();
            match mode.as_str() {
                "fs-read" => read_files(&files)?,
                "memmap2" => map_files(&files)?,
                "raw-map" => populate(&files)?,
                _ => return Err(format!("no mode is called {mode:?}").into()),
            }
        }
        _ => return Err("which mode, and of what?".into()),
    };
    println!("{}", serde_json::to_string(&printed)?);
    Ok(())
}

/// Touches memory and gives it back.
fn prime(bytes: usize) -> Outcome<()> {
    let mut region = Region::allocate(bytes)?;
    let pieces = region.as_mut_slice().chunks_mut(PIECE_BYTES);
    each(pieces, cpus(), |piece| piece.fill(1));
    std::hint::black_box(region.as_slice());
    Ok(())
}

fn load(memory: &str, backend: &str, path: &str) -> Outcome<Printed> {
    let memory: MemoryChoice = memory.parse()?;
    let backend: BackendChoice = backend.parse()?;
    let begun = Instant::now();
    let mut loader = Loader::new().backend_choice(backend).memory(memory);
    if memory != MemoryChoice::Owned {
        // SAFETY: whoever measures does not rewrite the files meanwhile, and this process only reads them.
        loader = loader.allow_mapping(unsafe { MappingPermit::new() });
    }
    let checkpoint = loader.load(path)?;
    let parts: Vec<&[u8]> = checkpoint
        .iter()
        .map(|tensor| &tensor.bytes()[..])
        .collect();
    Ok(finish(
        begun,
        &parts,
        Some(describe(&checkpoint.report().plan)),
    ))
}

fn describe(plan: &Plan) -> String {
    let direct = if plan.reads_direct() { ", direct" } else { "" };
    let profile = match plan.platform.profile {
        ProfileFact::Matching(_) => ", by a profile",
        _ => "",
    };
    format!(
        "{} {}{direct}, {} × {} × {} KiB, {:?}{profile}",
        plan.memory,
        plan.backend,
        plan.params.workers,
        plan.params.queue_depth,
        plan.params.chunk_bytes >> 10,
        plan.params.resident,
    )
}

fn read_files(paths: &[PathBuf]) -> Outcome<Printed> {
    let begun = Instant::now();
    let files = paths
        .iter()
        .map(std::fs::read)
        .collect::<Result<Vec<_>, _>>()?;
    let shards = files
        .iter()
        .map(|file| SafeTensors::deserialize(file))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(finish(begun, &views(&shards), None))
}

fn map_files(paths: &[PathBuf]) -> Outcome<Printed> {
    let begun = Instant::now();
    let files = paths.iter().map(map).collect::<Result<Vec<_>, _>>()?;
    let shards = files
        .iter()
        .map(|file| SafeTensors::deserialize(file))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(finish(begun, &views(&shards), None))
}

fn populate(paths: &[PathBuf]) -> Outcome<Printed> {
    let begun = Instant::now();
    let files = paths.iter().map(map).collect::<Result<Vec<_>, _>>()?;
    let pieces = files.iter().flat_map(|file| {
        (0..file.len())
            .step_by(PIECE_BYTES)
            .map(move |offset| (file, offset, PIECE_BYTES.min(file.len() - offset)))
    });
    each(pieces, POPULATE_THREADS, |(file, offset, len)| {
        populate_range(file, offset, len)
    })
    .into_iter()
    .collect::<Result<(), _>>()?;
    let parts: Vec<&[u8]> = files.iter().map(|file| &file[..]).collect();
    Ok(finish(begun, &parts, None))
}

#[cfg(target_os = "linux")]
fn populate_range(file: &Mmap, offset: usize, len: usize) -> std::io::Result<()> {
    file.advise_range(memmap2::Advice::PopulateRead, offset, len)
}

#[cfg(not(target_os = "linux"))]
fn populate_range(_file: &Mmap, _offset: usize, _len: usize) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

fn map(path: &PathBuf) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: whoever measures does not rewrite the file meanwhile, and this process only reads it.
    unsafe { Mmap::map(&file) }
}

fn copy_memory(bytes: usize) -> Outcome<Printed> {
    let mut source = Region::allocate(SOURCE_BYTES.min(bytes))?;
    each(
        source.as_mut_slice().chunks_mut(PIECE_BYTES),
        cpus(),
        |piece| {
            piece.fill(1);
        },
    );
    let begun = Instant::now();
    let mut target = Region::allocate(bytes)?;
    // The source is whole pieces, or as long as the target.
    let sources = source.as_slice().chunks(PIECE_BYTES).cycle();
    let pieces = target.as_mut_slice().chunks_mut(PIECE_BYTES).zip(sources);
    each(pieces, cpus(), |(target, source)| {
        target.copy_from_slice(&source[..target.len()]);
    });
    Ok(finish(begun, &[target.as_slice()], None))
}

fn views<'data>(shards: &[SafeTensors<'data>]) -> Vec<&'data [u8]> {
    shards
        .iter()
        .flat_map(|shard| shard.iter().map(|(_, view)| view.data()))
        .collect()
}

/// Stops the time, reads every byte, and stops it again.
fn finish(begun: Instant, parts: &[&[u8]], choice: Option<String>) -> Printed {
    let elapsed = begun.elapsed();
    let pieces = parts.iter().flat_map(|part| part.chunks(PIECE_BYTES));
    let xor = each(pieces, cpus(), fold).into_iter().fold(0, |a, b| a ^ b);
    Printed {
        elapsed_seconds: elapsed.as_secs_f64(),
        touched_seconds: begun.elapsed().as_secs_f64(),
        data_bytes: parts.iter().map(|part| part.len() as u64).sum(),
        peak_resident_bytes: peak_resident_bytes(),
        xor,
        choice,
    }
}

/// The exclusive or of all bytes; eight at a time, as fast as memory delivers them.
fn fold(bytes: &[u8]) -> u8 {
    let (words, rest) = bytes.as_chunks::<8>();
    let word = words
        .iter()
        .fold(0, |word, next| word ^ u64::from_ne_bytes(*next));
    let bytes = word.to_ne_bytes();
    bytes.iter().chain(rest).fold(0, |a, b| a ^ b)
}

/// Has threads take the items in turn; what `work` answered, in any order.
fn each<T, R: Send>(
    items: impl Iterator<Item = T> + Send,
    threads: usize,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let items = Mutex::new(items);
    let take = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        let crew: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| std::iter::from_fn(take).map(&work).collect::<Vec<R>>()))
            .collect();
        crew.into_iter()
            .flat_map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}
