//! Loads, streams and conversions whose reads go wrong, seed after seed: each ends with the right bytes or with an
//! error that names the cause, in time, and leaves nothing. One test in a process of its own, because it counts what
//! the whole process holds.
//!
//! `TENSORA_SIMULATION_SEEDS` says how many seeds, `TENSORA_SEED` which is the first; a failure names the one that shows it again.
#![cfg(all(target_os = "linux", feature = "sync", feature = "convert"))]
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::print_stdout)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Waker};
use std::thread;
use std::time::{Duration, Instant};

use common::{Expected, LAYOUTS, skip};
use tensora::convert::{
    Checksums, ContentHasher, ConvertOptions, DataHasher, Digest, Reading, Unfinished, Verify,
};
use tensora::io::testing::{Fault, FaultBackend, Faults};
use tensora::io::{Backend, Control, Error as IoError, ResidentPolicy, TransferParams};
use tensora::{
    BackendKind, CancelToken, Checkpoint, CheckpointIndex, DirectPolicy, Dtype, Error, Format,
    Loader, StreamedPiece,
};

/// About ten seconds of work on two processors.
const SEEDS: u64 = 2000;
/// Seeds that once showed a defect: a conversion cancelled after its last read whose message was another one, and one
/// whose error was not known as a cancellation.
const FORMERLY_WRONG: [u64; 2] = [912_278_356, 888_224_047];
/// How long one seed may take before it counts as a hang. They take milliseconds.
const PATIENCE: Duration = Duration::from_secs(120);

// ---- what follows from a seed ----

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let at = self.below(of.len() as u64);
        &of[usize::try_from(at).unwrap()]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Load,
    LoadSome,
    LoadSlices,
    TensorByTensor,
    LoadInRuntime,
    FutureDropped,
    Stream,
    Digest,
    Convert,
}

const WORKS: [Work; 9] = [
    Work::Load,
    Work::LoadSome,
    Work::LoadSlices,
    Work::TensorByTensor,
    Work::LoadInRuntime,
    Work::FutureDropped,
    Work::Stream,
    Work::Digest,
    Work::Convert,
];

/// Everything about one trial.
#[derive(Debug)]
struct Scenario {
    work: Work,
    layout: usize,
    kind: BackendKind,
    faults: Faults,
    params: TransferParams,
    /// After how many bytes the caller cancels.
    cancel_after_bytes: Option<u64>,
    target: Format,
    verify: Verify,
}

impl Scenario {
    fn new(seed: u64, stage: &Stage) -> Self {
        let mut random = Random(seed);
        let layout = usize::try_from(random.below(LAYOUTS.len() as u64)).unwrap();
        let direct = *random.pick(&[DirectPolicy::Never, DirectPolicy::Preferred]);
        Self {
            work: *random.pick(&WORKS),
            layout,
            kind: *random.pick(&stage.kinds),
            faults: faults(seed, &mut random, &stage.files[layout]),
            params: TransferParams {
                chunk_bytes: 4096 << random.below(5),
                queue_depth: u32::try_from(1 + random.below(8)).unwrap(),
                workers: u32::try_from(1 + random.below(4)).unwrap(),
                direct,
                resident: ResidentPolicy::Copy,
            },
            cancel_after_bytes: (random.below(10) == 0).then(|| random.below(stage.bytes)),
            target: *random.pick(&[
                Format::Safetensors,
                Format::ServerlessLlmStore,
                Format::ServerlessLlmPartitioned,
            ]),
            verify: *random.pick(&[Verify::Skip, Verify::ReadBack]),
        }
    }
}

/// Nothing, what is survived, what ends a batch by chance, at a numbered operation, or at a byte of a file.
fn faults(seed: u64, random: &mut Random, files: &[(PathBuf, u64)]) -> Faults {
    let survived = Faults::survived(seed).with_longest_delay(Duration::from_micros(300));
    let fatal = *random.pick(&[Fault::IoError, Fault::EarlyEnd, Fault::OutOfMemory]);
    match random.below(10) {
        0 => Faults::none(seed),
        1..=4 => survived,
        5..=6 => survived.with_probability(fatal, 0.03),
        7 => survived.with_fault_at_operation(random.below(30), fatal),
        8 => Faults::none(seed).with_fault_at_operation(random.below(30), fatal),
        _ => {
            let (path, bytes) = random.pick(files);
            let at = random.below(*bytes);
            survived.with_fault_at(path, at, fatal)
        }
    }
}

// ---- what is loaded ----

/// The same tensors in every layout.
struct Stage {
    directory: tempfile::TempDir,
    /// Where conversions write: in memory where that can be, since they wait for the device.
    targets: tempfile::TempDir,
    expected: Expected,
    digest: Digest,
    bytes: u64,
    paths: Vec<PathBuf>,
    /// Of each layout, the data files and their lengths.
    files: Vec<Vec<(PathBuf, u64)>>,
    kinds: Vec<BackendKind>,
}

fn expected() -> Expected {
    let mut random = Random(7);
    let mut expected = Expected::new();
    let mut add = |name: String, dtype: Dtype, shape: &[u64]| {
        let bytes = dtype.bytes_for(shape.iter().product()).unwrap();
        let data = (0..bytes).map(|_| random.next().to_le_bytes()[3]).collect();
        expected.insert(name, (dtype, shape.to_vec(), data));
    };
    add("embedding".into(), Dtype::BF16, &[263, 129]);
    for layer in 0..9 {
        add(format!("layers.{layer}.weight"), Dtype::F32, &[37, 41]);
        add(format!("layers.{layer}.norm"), Dtype::BF16, &[41]);
        add(format!("layers.{layer}.mask"), Dtype::U8, &[5]);
    }
    add("scalar".into(), Dtype::F64, &[]);
    add("empty".into(), Dtype::F32, &[0, 4]);
    expected
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let expected = expected();
        let mut hasher = ContentHasher::new();
        for (name, (dtype, shape, data)) in &expected {
            let mut of_data = DataHasher::new();
            of_data.update(data);
            hasher
                .insert(name, *dtype, shape, of_data.finish())
                .unwrap();
        }
        let paths: Vec<_> = LAYOUTS
            .iter()
            .zip(0..)
            .map(|(layout, number)| {
                let path = directory.path().join(format!("source-{number}"));
                std::fs::create_dir(&path).unwrap();
                common::write(&expected, layout, &path);
                path
            })
            .collect();
        let files = paths.iter().map(|path| {
            let index = CheckpointIndex::open(path).unwrap();
            let files = index.files().iter().filter(|file| file.bytes > 0);
            files.map(|file| (file.path.clone(), file.bytes)).collect()
        });
        let files = files.collect();
        let kinds = BackendKind::ALL.into_iter().filter(|kind| {
            let made = tensora::io::backend(*kind);
            if let Err(error) = &made {
                skip(&format!("simulation with {kind}: {error}"));
            }
            made.is_ok()
        });
        Self {
            targets: tempfile::tempdir_in("/dev/shm")
                .or_else(|_| tempfile::tempdir())
                .unwrap(),
            bytes: expected
                .values()
                .map(|(_, _, data)| data.len() as u64)
                .sum(),
            digest: hasher.finish(),
            kinds: kinds.collect(),
            directory,
            expected,
            paths,
            files,
        }
    }

    fn check_tensor(&self, tensor: &tensora::Tensor) {
        let (dtype, shape, data) = &self.expected[tensor.name()];
        let loaded: Vec<u64> = tensor.shape().iter().map(|&n| n as u64).collect();
        assert_eq!(
            (tensor.dtype(), &loaded),
            (*dtype, shape),
            "{}",
            tensor.name()
        );
        assert!(tensor.bytes() == data, "wrong bytes in {}", tensor.name());
    }

    fn check(&self, checkpoint: &Checkpoint) {
        assert_eq!(checkpoint.len(), self.expected.len());
        checkpoint
            .iter()
            .for_each(|tensor| self.check_tensor(tensor));
    }

    fn check_piece(&self, piece: &StreamedPiece) -> u64 {
        let name = piece.tensor().name();
        let from = usize::try_from(piece.offset_bytes()).unwrap();
        let part = &self.expected[name].2[from..][..piece.bytes().len()];
        assert!(piece.bytes() == part, "wrong bytes in {name}");
        part.len() as u64
    }

    /// Some columns of every matrix of this name, gathered one element after the other.
    fn columns(&self, name: &str, columns: std::ops::Range<usize>) -> Vec<u8> {
        let (dtype, shape, data) = &self.expected[name];
        let element = usize::try_from(dtype.bytes_for(1).unwrap()).unwrap();
        let width = usize::try_from(shape[1]).unwrap();
        let elements = data.chunks(element).enumerate();
        let kept = elements.filter(|(at, _)| columns.contains(&(at % width)));
        kept.flat_map(|(_, element)| element.to_vec()).collect()
    }

    /// Every file below the source directory, by name, and the target's directory itself.
    fn files_there(&self) -> BTreeSet<PathBuf> {
        let mut found = files_below(self.directory.path());
        found.extend(files_below(self.targets.path()));
        found
    }
}

fn files_below(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        }
        found.insert(path);
    }
    found
}

// ---- a trial ----

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ending {
    Right,
    Failed,
    Cancelled,
}

struct Trial<'a> {
    stage: &'a Stage,
    scenario: &'a Scenario,
    backend: Arc<FaultBackend>,
    token: CancelToken,
}

impl Trial<'_> {
    fn path(&self) -> &Path {
        &self.stage.paths[self.scenario.layout]
    }

    fn loader(&self) -> Loader {
        let Scenario { params, .. } = self.scenario;
        let token = self.token.clone();
        let loader = Loader::new()
            .read_with(Arc::clone(&self.backend) as Arc<dyn Backend>)
            .chunk_bytes(params.chunk_bytes)
            .workers(params.workers)
            .direct(params.direct)
            .cancel_with(token.clone());
        match self.scenario.cancel_after_bytes {
            Some(bytes) => loader.on_progress(move |progress| {
                if progress.done_bytes > bytes {
                    token.cancel();
                }
            }),
            None => loader,
        }
    }

    fn run(&self) -> Result<(), Error> {
        match self.scenario.work {
            Work::Load => self.stage.check(&self.loader().load(self.path())?),
            Work::LoadSome => {
                let patterns = ["layers.3.*", "embedding", "empty"];
                let loaded = self.loader().select(patterns).load(self.path())?;
                assert_eq!(loaded.len(), 5);
                loaded
                    .iter()
                    .for_each(|tensor| self.stage.check_tensor(tensor));
            }
            Work::LoadSlices => {
                let rule = "layers.*.weight=dim:1,range:7..29".parse().unwrap();
                let loader = self.loader().select(["layers.*.weight"]).slice(rule);
                for tensor in &loader.load(self.path())? {
                    let wanted = self.stage.columns(tensor.name(), 7..29);
                    assert!(
                        *tensor.bytes() == wanted,
                        "wrong bytes in {}",
                        tensor.name()
                    );
                }
            }
            Work::TensorByTensor => {
                let opened = self.loader().open(self.path())?;
                for name in self.stage.expected.keys() {
                    self.stage.check_tensor(&opened.tensor(name)?);
                }
            }
            Work::LoadInRuntime => {
                let runtime = tokio::runtime::Builder::new_current_thread().build();
                let load = async { self.loader().load_async(self.path()).await };
                self.stage.check(&runtime.unwrap().block_on(load)?);
            }
            Work::FutureDropped => {
                let loader = self.loader();
                let mut future = pin!(loader.load_async(self.path()));
                let mut context = Context::from_waker(Waker::noop());
                if let std::task::Poll::Ready(loaded) = future.as_mut().poll(&mut context) {
                    self.stage.check(&loaded?);
                }
            }
            Work::Stream => {
                let loader = self.loader().memory_limit_bytes(1 << 20);
                let mut bytes = 0;
                // One piece is held while the next is asked for.
                let mut held = None;
                for piece in loader.open(self.path())?.stream()? {
                    let piece = piece?;
                    bytes += self.stage.check_piece(&piece);
                    if let Some(held) = held.replace(piece) {
                        self.stage.check_piece(&held);
                    }
                }
                assert_eq!(bytes, self.stage.bytes, "the stream ended early");
            }
            Work::Digest => {
                let digest = self.loader().open(self.path())?.digest()?;
                assert_eq!(digest, self.stage.digest);
            }
            Work::Convert => self.convert()?,
        }
        Ok(())
    }

    fn convert(&self) -> Result<(), Error> {
        let Scenario {
            target,
            verify,
            params,
            ..
        } = *self.scenario;
        let folder = self.stage.targets.path().join("target");
        let options = ConvertOptions::new(target)
            .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
            .checksums(Checksums::Write)
            .verify(verify);
        let options = match target {
            Format::Safetensors => options.shards(NonZero::new(3).unwrap()),
            _ => options.partition_bytes(NonZero::new(50_000).unwrap()),
        };
        let source = CheckpointIndex::open(self.path())?;
        let backend = Arc::clone(&self.backend) as Arc<dyn Backend>;
        let disturbed = options.clone().reading(Reading::new(backend, 2, params));
        let mut control = Control::new().with_cancel(self.token.clone());
        if let Some(bytes) = self.scenario.cancel_after_bytes {
            let (done, token) = (AtomicU64::new(0), self.token.clone());
            control = control.with_progress(move |more| {
                if done.fetch_add(more, Ordering::Relaxed) + more > bytes {
                    token.cancel();
                }
            });
        }
        let plan = disturbed.plan(&source, &folder)?;
        let ended = plan.run(&control);
        if ended.is_err() {
            // What is there is nothing, or what a later attempt can use, and never a checkpoint.
            assert!(CheckpointIndex::open(&folder).is_err(), "half of it opens");
            let resumed = options.unfinished(Unfinished::Resume);
            resumed.plan(&source, &folder)?.run(&Control::new())?;
        }
        let planned: BTreeSet<_> = plan
            .files()
            .iter()
            .map(|file| folder.join(&file.name))
            .collect();
        assert_eq!(files_below(&folder), planned);
        let written = Loader::new().backend(BackendKind::Sync).load(&folder)?;
        self.stage.check(&written);
        assert_eq!(written.digest()?, self.stage.digest);
        std::fs::remove_dir_all(&folder).unwrap();
        ended?;
        Ok(())
    }

    /// What happened is what was made to happen, and the error says so.
    fn judge(&self, ended: Result<(), Error>) -> Ending {
        let fatal = Fault::ALL.into_iter().filter(|fault| !fault.is_survived());
        let injected: u64 = fatal.map(|fault| self.backend.count(fault)).sum();
        let Err(error) = ended else {
            let may_end_early = self.scenario.work == Work::FutureDropped;
            assert!(
                injected == 0 || may_end_early,
                "a failed read was passed over"
            );
            return Ending::Right;
        };
        let text = error.to_string();
        if error.is_cancelled() {
            assert!(self.token.is_cancelled(), "nobody cancelled");
            return Ending::Cancelled;
        }
        let Some(cause) = cause(&error) else {
            panic!("an error of another kind: {text} ({error:?})");
        };
        let (fault, said) = match cause {
            IoError::Read { source, .. } if source.kind() == io::ErrorKind::WouldBlock => {
                (Fault::Busy, "failed")
            }
            IoError::Read { .. } => (Fault::IoError, "os error 5"),
            IoError::UnexpectedEof { .. } => (Fault::EarlyEnd, "truncated"),
            IoError::Memory { .. } => (Fault::OutOfMemory, "os error 12"),
            _ => panic!("nothing of the kind was made to happen: {text}"),
        };
        assert!(
            self.backend.count(fault) > 0,
            "{fault} did not happen: {text}"
        );
        assert!(text.contains(said), "{text:?} does not say {said:?}");
        if let Some(path) = cause.path() {
            // A conversion reads back what it wrote, too.
            let is_ours = path.starts_with(self.path())
                || self.scenario.work == Work::Convert
                    && path.starts_with(self.stage.targets.path());
            assert!(is_ours, "{text}");
            assert!(text.contains(&*path.to_string_lossy()), "{text}");
        }
        if let Error::Tensor { tensor, .. } = &error {
            assert!(self.stage.expected.contains_key(tensor), "{text}");
        }
        Ending::Failed
    }
}

fn cause(error: &Error) -> Option<&IoError> {
    match error {
        Error::Io(cause)
        | Error::Tensor { source: cause, .. }
        | Error::Convert(tensora::convert::Error::Read(cause)) => Some(cause),
        _ => None,
    }
}

// ---- what the process holds ----

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

/// Waits for work that was cancelled, and ends on threads of its own.
fn check_left(threads_before: usize, descriptors_before: usize) {
    let begun = Instant::now();
    while threads() > threads_before || descriptors() > descriptors_before {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{threads_before} threads and {descriptors_before} descriptors before, {} and {} after",
            threads(),
            descriptors()
        );
        thread::sleep(Duration::from_micros(200));
    }
}

/// Ends the process when a seed takes too long: whoever hangs cannot be asked to stop.
fn watch(current: &(AtomicU64, AtomicU64)) {
    let mut seen = (u64::MAX, Instant::now());
    loop {
        thread::sleep(Duration::from_millis(500));
        let turn = current.1.load(Ordering::Acquire);
        if turn == u64::MAX {
            return;
        }
        if turn != seen.0 {
            seen = (turn, Instant::now());
        } else if seen.1.elapsed() > PATIENCE {
            let seed = current.0.load(Ordering::Acquire);
            eprintln!(
                "seed {seed} hangs: TENSORA_SEED={seed} TENSORA_SIMULATION_SEEDS=1 shows it again"
            );
            std::process::abort();
        }
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text:?} is not a whole number")))
}

#[test]
fn every_seed_ends_with_the_right_bytes_or_the_cause() {
    /// Allocators keep some; a lost load per seed would be more than this after a hundred.
    const SLACK_BYTES: u64 = 16 << 20;

    let seeds = number_from("TENSORA_SIMULATION_SEEDS").unwrap_or(SEEDS);
    let clock = || {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap();
        u64::from(since.subsec_nanos())
    };
    let first = number_from("TENSORA_SEED").unwrap_or_else(clock);
    eprintln!("seeds from {first}, {seeds} of them");

    let stage = Stage::new();
    let files_before = stage.files_there();
    let current = Arc::new((AtomicU64::new(first), AtomicU64::new(0)));
    let watchdog = thread::spawn({
        let current = Arc::clone(&current);
        move || watch(&current)
    });
    // Hashing has a pool of threads that stays, from the first large update on.
    DataHasher::new().update(&vec![0; 16 << 20]);
    let (threads_before, descriptors_before) = (threads(), descriptors());
    let mut bytes_before = u64::MAX;
    let mut works = BTreeMap::<Work, u64>::new();
    let mut endings = BTreeMap::<Ending, u64>::new();
    let mut faults = BTreeMap::<Fault, u64>::new();
    let fresh = (0..seeds).map(|number| first.wrapping_add(number));
    for (seed, number) in FORMERLY_WRONG.into_iter().chain(fresh).zip(0..) {
        current.0.store(seed, Ordering::Release);
        current.1.store(number, Ordering::Release);
        let scenario = Scenario::new(seed, &stage);
        let inner = Arc::from(tensora::io::backend(scenario.kind).unwrap());
        let trial = Trial {
            backend: Arc::new(FaultBackend::new(inner, scenario.faults.clone())),
            stage: &stage,
            scenario: &scenario,
            token: CancelToken::new(),
        };
        let run = || {
            let ending = trial.judge(trial.run());
            check_left(threads_before, descriptors_before);
            assert_eq!(stage.files_there(), files_before, "files were left behind");
            ending
        };
        let ending = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        let Ok(ending) = ending else {
            panic!(
                "seed {seed} failed, as above; TENSORA_SEED={seed} TENSORA_SIMULATION_SEEDS=1 shows it again\n\
                 {scenario:#?}\n{}",
                trial.backend
            );
        };
        *works.entry(scenario.work).or_default() += 1;
        *endings.entry(ending).or_default() += 1;
        for fault in Fault::ALL {
            *faults.entry(fault).or_default() += trial.backend.count(fault);
        }
        if number == seeds / 5 {
            // From here on nothing is new.
            bytes_before = anonymous_bytes();
        }
    }
    current.1.store(u64::MAX, Ordering::Release);
    watchdog.join().unwrap();
    let bytes_after = anonymous_bytes();
    assert!(
        bytes_after < bytes_before.saturating_add(SLACK_BYTES),
        "{bytes_before} bytes of memory after a fifth of the seeds, {bytes_after} after all"
    );
    // `cargo xtask simulate` reads this line.
    println!("{seeds} seeds from {first}: {works:?}; {faults:?}; {endings:?}");
    if seeds >= SEEDS {
        let missing: Vec<_> = faults.iter().filter(|(_, count)| **count == 0).collect();
        assert!(missing.is_empty(), "never happened: {missing:?}");
        assert_eq!((works.len(), endings.len()), (WORKS.len(), 3));
    }
}
