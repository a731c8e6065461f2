//! One timed way of getting at a checkpoint's tensors, as a process of its own: what `cargo xtask bench` runs.
//!
//! `cargo run --release -p tensora --example timed -- MODE ...`, where MODE is
//!
//! - `load MEMORY BACKEND PATH`: [`tensora::Loader`], as an engine uses it. MEMORY is owned, mapped or
//!   auto, BACKEND is auto, sync, async, io-uring or mmap;
//! - `stream LIMIT PATH`: the same, streamed through buffers of LIMIT bytes in all, each byte read once by the
//!   consumer, nothing kept;
//! - `digest LIMIT PATH`: the content digest, streamed likewise;
//! - `slice RULE PATH`: a load of the part of each tensor that the rule says, as in `tensora load --slice`;
//! - `ranks WORLD PATH`: so many processes, each of which loads its rank's part of the tensors, the shipped preset
//!   saying which, and which read together;
//! - `rank NAME RANK WORLD PATH`: one of them;
//! - `reassemble RULE WORLD PATH`: the parts of all ranks, one load after the other, put together again; prints the content
//!   digest of that and nothing else;
//! - `hash BYTES`: nothing but hashing so many bytes of memory, as a content digest does it, with all processors;
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
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::Serialize;
use tensora::convert::{DataHasher, StoredTensor, content_digest};
use tensora::io::{Control, ProfileFact, Region, peak_resident_bytes};
use tensora::{
    BackendChoice, DigestSink, Loader, MappingPermit, MemoryChoice, Plan, Preset, Share, Sink,
    SinkError, SliceRule, StreamReport, StreamedPiece, Tensor,
};

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
    xor: Option<u8>,
    /// What the planner chose.
    choice: Option<String>,
    /// Of a load of parts: what they are, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    needed_bytes: Option<u64>,
    /// What was read of the files for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    read_bytes: Option<u64>,
    /// What this process, and those it started, had the device read, by the kernel's count.
    #[serde(skip_serializing_if = "Option::is_none")]
    device_bytes: Option<u64>,
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Ok(bytes) = std::env::var("PRIME_BYTES") {
        prime(bytes.parse()?)?;
    }
    let printed = match arguments.split_first() {
        Some((mode, [memory, backend, path])) if mode == "load" => load(memory, backend, path)?,
        Some((mode, [bytes])) if mode == "memcpy" => copy_memory(bytes.parse()?)?,
        Some((mode, [bytes])) if mode == "hash" => hash_memory(bytes.parse()?)?,
        Some((mode, [limit, path])) if mode == "stream" => stream(limit.parse()?, path)?,
        Some((mode, [limit, path])) if mode == "digest" => digest(limit.parse()?, path)?,
        Some((mode, [rule, path])) if mode == "slice" => slice(rule, path)?,
        Some((mode, [world, path])) if mode == "ranks" => ranks(world.parse()?, path)?,
        Some((mode, [name, rank, world, path])) if mode == "rank" => {
            load_rank(name, rank.parse()?, world.parse()?, path)?
        }
        Some((mode, [rule, world, path])) if mode == "reassemble" => {
            println!("{}", reassemble(rule, world.parse()?, path)?);
            return Ok(());
        }
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

/// Reads every byte of a stream once, and keeps nothing.
#[derive(Default)]
struct Fold(u8);

impl Sink for Fold {
    fn write(&mut self, piece: StreamedPiece) -> Result<(), SinkError> {
        self.0 ^= fold(piece.bytes());
        Ok(())
    }
}

fn stream(limit_bytes: u64, path: &str) -> Outcome<Printed> {
    let begun = Instant::now();
    let mut sink = Fold::default();
    let report = Loader::new()
        .memory_limit_bytes(limit_bytes)
        .open(path)?
        .stream_into(&mut sink)?;
    Ok(streamed(begun, &report, Some(sink.0)))
}

fn digest(limit_bytes: u64, path: &str) -> Outcome<Printed> {
    let begun = Instant::now();
    let mut sink = DigestSink::new();
    let report = Loader::new()
        .memory_limit_bytes(limit_bytes)
        .open(path)?
        .stream_into(&mut sink)?;
    std::hint::black_box(sink.digest());
    Ok(streamed(begun, &report, None))
}

/// What a stream took. Every byte was touched when it ended.
fn streamed(begun: Instant, report: &StreamReport, xor: Option<u8>) -> Printed {
    let elapsed_seconds = begun.elapsed().as_secs_f64();
    let plan = &report.plan;
    Printed {
        elapsed_seconds,
        touched_seconds: elapsed_seconds,
        data_bytes: report.data_bytes,
        peak_resident_bytes: peak_resident_bytes(),
        xor,
        choice: Some(format!(
            "{}, {} × {} KiB buffers, {} readers, {} × {} × {} KiB",
            plan.backend,
            plan.buffers,
            plan.buffer_bytes >> 10,
            plan.readers,
            plan.params.workers,
            plan.params.queue_depth,
            plan.params.chunk_bytes >> 10,
        )),
        needed_bytes: None,
        read_bytes: None,
        device_bytes: None,
    }
}

fn slice(rule: &str, path: &str) -> Outcome<Printed> {
    let begun = Instant::now();
    let loader = Loader::new().slice(rule.parse::<SliceRule>()?);
    load_parts(begun, &loader, path)
}

fn load_rank(name: &str, rank: u32, world: u32, path: &str) -> Outcome<Printed> {
    let begun = Instant::now();
    let loader = Loader::new()
        .preset(Preset::find("tensor-parallel")?)
        .rank(rank, world)
        .share(Share::new(name));
    load_parts(begun, &loader, path)
}

fn load_parts(begun: Instant, loader: &Loader, path: &str) -> Outcome<Printed> {
    let checkpoint = loader.load(path)?;
    let parts: Vec<&[u8]> = checkpoint
        .iter()
        .map(|tensor| &tensor.bytes()[..])
        .collect();
    let report = checkpoint.report();
    let printed = finish(begun, &parts, Some(describe(&report.plan)));
    Ok(Printed {
        needed_bytes: Some(printed.data_bytes),
        read_bytes: Some(report.stats.bytes),
        device_bytes: device_bytes(),
        ..printed
    })
}

/// Starts the ranks, and adds up what they did.
fn ranks(world: u32, path: &str) -> Outcome<Printed> {
    let name = format!("timed-{}", std::process::id());
    let begun = Instant::now();
    let processes = (0..world)
        .map(|rank| {
            Command::new(std::env::current_exe()?)
                .args(["rank", &name, &rank.to_string(), &world.to_string(), path])
                .env_remove("PRIME_BYTES")
                .stdout(Stdio::piped())
                .spawn()
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut sum = Printed {
        elapsed_seconds: 0.0,
        touched_seconds: 0.0,
        data_bytes: 0,
        peak_resident_bytes: None,
        xor: None,
        choice: None,
        needed_bytes: Some(0),
        read_bytes: Some(0),
        device_bytes: Some(0),
    };
    let add = |sum: &mut Option<u64>, more: &serde_json::Value| {
        *sum = sum.zip(more.as_u64()).map(|(sum, more)| sum + more);
    };
    for process in processes {
        let output = process.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("a rank ended with {}", output.status).into());
        }
        let printed: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        sum.data_bytes += printed["data_bytes"].as_u64().unwrap_or(0);
        add(&mut sum.needed_bytes, &printed["needed_bytes"]);
        add(&mut sum.read_bytes, &printed["read_bytes"]);
        add(&mut sum.device_bytes, &printed["device_bytes"]);
        let peak = printed["peak_resident_bytes"].as_u64();
        sum.peak_resident_bytes = sum.peak_resident_bytes.max(peak);
    }
    sum.elapsed_seconds = begun.elapsed().as_secs_f64();
    sum.touched_seconds = sum.elapsed_seconds;
    Ok(sum)
}

/// What this process had devices read, as the kernel counts it.
fn device_bytes() -> Option<u64> {
    let counters = std::fs::read_to_string("/proc/self/io").ok()?;
    let line = counters
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes: "))?;
    line.parse().ok()
}

fn reassemble(rule: &str, world: u32, path: &str) -> Outcome<String> {
    let index = Loader::new().open(path)?;
    let mut wholes: Vec<Option<Region>> = Vec::new();
    for rank in 0..world {
        let checkpoint = Loader::new()
            .slice(rule.parse::<SliceRule>()?)
            .rank(rank, world)
            .load(path)?;
        for (number, (entry, part)) in index.index().tensors().iter().zip(&checkpoint).enumerate() {
            if wholes.len() == number {
                wholes.push(Some(Region::allocate(usize::try_from(entry.bytes)?)?));
            }
            let Some(whole) = &mut wholes[number] else {
                continue;
            };
            put_back(whole.as_mut_slice(), &entry.shape, part, rank)?;
        }
    }
    let tensors = index.index().tensors().iter().zip(&wholes);
    let stored = tensors.filter_map(|(entry, whole)| {
        Some(StoredTensor {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            strides: None,
            bytes: whole.as_ref()?.as_slice(),
        })
    });
    let threads = NonZero::new(cpus()).unwrap_or(NonZero::<usize>::MIN);
    Ok(content_digest(stored, threads, &Control::new())?.to_string())
}

/// Puts a rank's part, an even one along the one dimension in which it is shorter, where it belongs.
fn put_back(whole: &mut [u8], shape: &[u64], part: &Tensor, rank: u32) -> Outcome<()> {
    let shape: Vec<usize> = shape
        .iter()
        .map(|&count| usize::try_from(count))
        .collect::<Result<_, _>>()?;
    let Some(dimension) = (0..shape.len()).find(|&d| shape[d] != part.shape()[d]) else {
        whole.copy_from_slice(part.bytes());
        return Ok(());
    };
    let inner = whole.len() / shape[..=dimension].iter().product::<usize>();
    let (row, piece) = (inner * shape[dimension], inner * part.shape()[dimension]);
    let at = piece * rank as usize;
    for (row, piece) in whole
        .chunks_exact_mut(row)
        .zip(part.bytes().chunks_exact(piece))
    {
        row[at..at + piece.len()].copy_from_slice(piece);
    }
    Ok(())
}

/// Hashes memory, over and over, as far as `bytes` go.
fn hash_memory(bytes: usize) -> Outcome<Printed> {
    let mut source = Region::allocate(SOURCE_BYTES.min(bytes))?;
    let pieces = source.as_mut_slice().chunks_mut(PIECE_BYTES);
    each(pieces, cpus(), |piece| piece.fill(1));
    let begun = Instant::now();
    let mut hasher = DataHasher::new();
    let mut left = bytes;
    while left > 0 {
        let len = left.min(source.len());
        hasher.update(&source.as_slice()[..len]);
        left -= len;
    }
    std::hint::black_box(hasher.finish());
    let elapsed_seconds = begun.elapsed().as_secs_f64();
    Ok(Printed {
        elapsed_seconds,
        touched_seconds: elapsed_seconds,
        data_bytes: bytes as u64,
        peak_resident_bytes: peak_resident_bytes(),
        xor: None,
        choice: None,
        needed_bytes: None,
        read_bytes: None,
        device_bytes: None,
    })
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
        xor: Some(xor),
        choice,
        needed_bytes: None,
        read_bytes: None,
        device_bytes: None,
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
