//! Thousands of loads and streams under faults, each from a seed: the right bytes, or an error that names what was
//! done to it. Never a hang, never wrong bytes, and nothing left behind.
//!
//! `TENSORA_SIMULATION_SEEDS` is their number, `TENSORA_SEED` the first one; a failure names its seed, with which
//! alone it shows again. One test in a process of its own, because it counts what the whole process holds.
#![cfg(all(
    feature = "testing",
    feature = "sync",
    target_os = "linux",
    not(tensora_portable)
))]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tensora_io::testing::{Fault, FaultBackend, Faults, Options, skip};
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, Error, FilledWindow, RangeStream,
    ReadExtent, ReadRequest, ReadWindow, Region, ResidentPolicy, SourceFile, StreamParams,
    TransferParams, WindowHook, backend,
};

/// About ten seconds' worth.
const DEFAULT_SEEDS: u64 = 3000;
/// Longer than any seed takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is made once and kept is made by these.
const WARM_UP_SEEDS: u64 = 300;
const SIZES: [usize; 7] = [0, 1, 4095, 4096, 33_333, 131_072, 300_001];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    /// True once in so many times.
    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    fn range(&mut self, len: usize) -> std::ops::Range<u64> {
        let start = self.below(len + 1);
        let most = self.pick(&[1, 500, 5000, 300_000]).min(len - start);
        start as u64..(start + self.below(most + 1)) as u64
    }
}

/// Files that every seed reads.
struct Samples {
    paths: Vec<PathBuf>,
    contents: Vec<Vec<u8>>,
}

impl Samples {
    fn new(directory: &tempfile::TempDir) -> Self {
        let mut random = Random(1);
        let contents: Vec<Vec<u8>> = SIZES
            .iter()
            .map(|&len| {
                (0..len)
                    .map(|_| random.next().to_le_bytes()[0] | 1)
                    .collect()
            })
            .collect();
        let paths: Vec<PathBuf> = (0..SIZES.len())
            .map(|number| directory.path().join(format!("data-{number}")))
            .collect();
        for (path, content) in paths.iter().zip(&contents) {
            std::fs::write(path, content).unwrap();
        }
        Self { paths, contents }
    }

    fn part(&self, file: usize, range: &std::ops::Range<u64>) -> &[u8] {
        let [start, end] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
        &self.contents[file][start..end]
    }
}

/// What a seed makes of a load or a stream.
struct Scene<'s> {
    samples: &'s Samples,
    random: Random,
    files: Vec<Arc<SourceFile>>,
    backend: Arc<FaultBackend>,
    transfer: TransferParams,
    token: CancelToken,
    control: Control,
    /// Bytes that were reported.
    progress: Arc<AtomicU64>,
}

/// How a seed ended, to be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Complete,
    Cancelled,
    Dropped,
    DeviceError,
    EarlyEnd,
    OutOfMemory,
    Hook,
}

fn faults(seed: u64, random: &mut Random) -> Faults {
    let mut faults = Faults::none(seed).with_longest_delay(Duration::from_micros(300));
    for fault in Fault::ALL {
        let probabilities: &[f64] = match fault.is_survived() {
            true => &[0.0, 0.0, 0.1, 0.6],
            false => &[0.0, 0.0, 0.0, 0.02, 0.2],
        };
        faults = faults.with_probability(fault, random.pick(probabilities));
    }
    if random.once_in(4) {
        let fault = random.pick(&Fault::ALL);
        faults = faults.with_fault_at_operation(random.next() % 20, fault);
    }
    faults.with_reordering(random.pick(&[1, 1, 2, 4]))
}

impl<'s> Scene<'s> {
    fn new(seed: u64, samples: &'s Samples, backends: &[Arc<dyn Backend>]) -> Self {
        let mut random = Random(seed);
        // Threads most of the time: rings and runtimes are set up for every batch.
        let inner = match random.once_in(3) {
            true => Arc::clone(&backends[random.below(backends.len())]),
            false => Arc::clone(&backends[0]),
        };
        let faults = faults(seed, &mut random);
        let token = CancelToken::new();
        let progress = Arc::new(AtomicU64::new(0));
        let cancel_at = match random.once_in(5) {
            true => random.next() % 200_000,
            false => u64::MAX,
        };
        let control = Control::new().with_cancel(token.clone()).with_progress({
            let (token, progress) = (token.clone(), Arc::clone(&progress));
            move |bytes| {
                if progress.fetch_add(bytes, Ordering::SeqCst) + bytes > cancel_at {
                    token.cancel();
                }
            }
        });
        Self {
            transfer: TransferParams {
                chunk_bytes: random.pick(&[4096, 16 << 10, 100_000]),
                queue_depth: random.pick(&[1, 4, 16]),
                workers: random.pick(&[1, 1, 2, 4]),
                direct: random.pick(&[DirectPolicy::Never, DirectPolicy::Preferred]),
                resident: random.pick(&[ResidentPolicy::Reread, ResidentPolicy::Copy]),
            },
            files: samples
                .paths
                .iter()
                .map(|path| Arc::new(SourceFile::open(path).unwrap()))
                .collect(),
            backend: Arc::new(FaultBackend::new(inner, faults)),
            samples,
            random,
            token,
            control,
            progress,
        }
    }

    fn count(&self, fault: Fault) -> u64 {
        self.backend.count(fault)
    }

    /// Whether something was done that ends a batch.
    fn has_fatal(&self) -> bool {
        // More than a refusal for the moment is one too, but never happens at these probabilities.
        Fault::ALL
            .iter()
            .any(|&fault| !fault.is_survived() && self.count(fault) > 0)
    }

    /// An error has to be that of a fault that happened, and to name a file.
    fn judge(&self, error: &Error) -> Outcome {
        if let Some(path) = error.path() {
            assert!(self.samples.paths.iter().any(|own| own == path), "{error}");
        }
        let (end, happened) = match error {
            Error::Cancelled => (Outcome::Cancelled, self.token.is_cancelled()),
            Error::Read { source, .. } => {
                assert_eq!(source.raw_os_error(), Some(5), "EIO, but {error}");
                (Outcome::DeviceError, self.count(Fault::IoError) > 0)
            }
            Error::UnexpectedEof { .. } => (Outcome::EarlyEnd, self.count(Fault::EarlyEnd) > 0),
            Error::Memory { .. } => (Outcome::OutOfMemory, self.count(Fault::OutOfMemory) > 0),
            Error::InvalidWindow { reason, .. } => (Outcome::Hook, reason == "as meant"),
            other => panic!("no fault explains {other:?}"),
        };
        assert!(happened, "nothing of that kind was done: {error}");
        end
    }

    fn load(&mut self) -> Outcome {
        let ranges: Vec<_> = (0..self.random.below(20))
            .map(|_| {
                let file = self.random.below(self.files.len());
                (file, self.random.range(self.samples.contents[file].len()))
            })
            .collect();
        let mut memory: Vec<Region> = ranges
            .iter()
            .map(|(_, range)| {
                Region::allocate(usize::try_from(range.end - range.start).unwrap()).unwrap()
            })
            .collect();
        let requests = ranges
            .iter()
            .zip(&mut memory)
            .map(|((file, range), memory)| ReadRequest {
                file: &self.files[*file],
                offset: range.start,
                destination: memory.as_mut_slice().into(),
            })
            .collect();
        match self.backend.read(requests, &self.transfer, &self.control) {
            Err(error) => self.judge(&error),
            Ok(stats) => {
                assert!(!self.has_fatal(), "an error was swallowed");
                for ((file, range), memory) in ranges.iter().zip(&memory) {
                    assert!(
                        memory.as_slice() == self.samples.part(*file, range),
                        "{range:?} of {file}"
                    );
                }
                let bytes: u64 = ranges
                    .iter()
                    .map(|(_, range)| range.end - range.start)
                    .sum();
                assert_eq!(stats.bytes, bytes);
                assert_eq!(self.progress.load(Ordering::SeqCst), bytes);
                Outcome::Complete
            }
        }
    }

    fn windows(&mut self) -> Vec<ReadWindow> {
        (0..self.random.below(30))
            .map(|_| {
                let mut end = 0;
                let extents = (0..self.random.below(4))
                    .map(|_| {
                        let file = self.random.below(self.files.len());
                        let range = self.random.range(self.samples.contents[file].len());
                        let at = end + self.random.pick(&[0, 0, 1, 777]);
                        end = at + usize::try_from(range.end - range.start).unwrap();
                        ReadExtent { file, range, at }
                    })
                    .collect();
                ReadWindow {
                    extents,
                    buffer_bytes: end + self.random.pick(&[0, 0, 5]),
                }
            })
            .collect()
    }

    fn stream(&mut self) -> Outcome {
        let windows = self.windows();
        let largest = windows.iter().map(|window| window.buffer_bytes).max();
        let buffers = self.random.pick(&[1, 2, 5]);
        let readers = self.random.pick(&[1, 2, 4]);
        let params = StreamParams::new(buffers, largest.unwrap_or(0), readers, self.transfer)
            .with_lease_timeout(Duration::from_millis(2));
        let fails_at = match self.random.once_in(6) {
            true => self.random.below(40),
            false => usize::MAX,
        };
        let hook: WindowHook = Arc::new(move |window, _| match window == fails_at {
            true => Err(Error::InvalidWindow {
                window,
                reason: "as meant".to_owned(),
            }),
            false => Ok(()),
        });
        let mut stream = RangeStream::with_hook(
            self.files.clone(),
            windows.clone(),
            Arc::clone(&self.backend) as _,
            params,
            self.control.clone(),
            hook,
        )
        .unwrap();
        let most = match self.random.once_in(6) {
            true => self.random.below(windows.len() + 1),
            false => usize::MAX,
        };
        let mut held: Vec<FilledWindow> = Vec::new();
        let mut next = 0;
        loop {
            if next == most {
                return Outcome::Dropped;
            }
            match stream.next() {
                None => break,
                Some(Err(Error::LeasesHeld { .. })) => held.clear(),
                Some(Err(error)) => {
                    let end = self.judge(&error);
                    assert!(stream.next().is_none(), "it goes on after {error}");
                    held.iter().for_each(|filled| self.verify(filled, &windows));
                    return end;
                }
                Some(Ok(filled)) => {
                    assert_eq!(filled.number, next);
                    next += 1;
                    self.verify(&filled, &windows);
                    if self.random.once_in(3) {
                        held.push(filled);
                    }
                }
            }
        }
        held.iter().for_each(|filled| self.verify(filled, &windows));
        assert_eq!(next, windows.len(), "it ended without an error");
        assert!(!self.has_fatal(), "an error was swallowed");
        assert!(fails_at >= windows.len(), "the hook's error was swallowed");
        Outcome::Complete
    }

    fn verify(&self, filled: &FilledWindow, windows: &[ReadWindow]) {
        for extent in &windows[filled.number].extents {
            let expected = self.samples.part(extent.file, &extent.range);
            let found = &filled.bytes[extent.at..extent.at + expected.len()];
            assert!(found == expected, "window {}, {extent:?}", filled.number);
        }
    }
}

/// Ends the process with a message when a seed takes too long: a thread that hangs cannot be stopped.
struct Watchdog {
    seed: Arc<AtomicU64>,
    since: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    begun: Instant,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watchdog {
    fn new() -> Self {
        let begun = Instant::now();
        let [seed, since] = [0, 0].map(|zero| Arc::new(AtomicU64::new(zero)));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (seed, since, stop) = (Arc::clone(&seed), Arc::clone(&since), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(50));
                    let since = Duration::from_millis(since.load(Ordering::SeqCst));
                    if begun.elapsed().saturating_sub(since) > PATIENCE {
                        let seed = seed.load(Ordering::SeqCst);
                        eprintln!("seed {seed} hangs: no end after {PATIENCE:?}");
                        std::process::abort();
                    }
                }
            })
        };
        Self {
            seed,
            since,
            stop,
            begun,
            thread: Some(thread),
        }
    }

    fn watch(&self, seed: u64) {
        self.seed.store(seed, Ordering::SeqCst);
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap();
        self.since.store(now, Ordering::SeqCst);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// What the process holds: threads, descriptors, and resident memory that belongs to no file, in bytes.
fn held() -> [u64; 3] {
    let count = |path| std::fs::read_dir(path).unwrap().count() as u64;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = kib.unwrap().trim().strip_suffix(" kB").unwrap();
    [
        count("/proc/self/task"),
        count("/proc/self/fd"),
        kib.trim().parse::<u64>().unwrap() << 10,
    ]
}

/// Whether no more is held than before, but for what allocators keep, soon.
fn settles(before: [u64; 3]) -> bool {
    const SLACK_BYTES: u64 = 16 << 20;
    (0..100).any(|_| {
        let [threads, descriptors, bytes] = held();
        let settled =
            threads <= before[0] && descriptors <= before[1] && bytes <= before[2] + SLACK_BYTES;
        if !settled {
            std::thread::sleep(Duration::from_millis(20));
        }
        settled
    })
}

#[test]
fn every_seed_ends_in_the_right_bytes_or_in_an_error_that_names_the_cause() {
    let seeds = std::env::var("TENSORA_SIMULATION_SEEDS").map_or(DEFAULT_SEEDS, |text| {
        text.parse()
            .expect("TENSORA_SIMULATION_SEEDS is a whole number")
    });
    let first = Options::default().seed;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let samples = Samples::new(&directory);
    let backends: Vec<Arc<dyn Backend>> = BackendKind::ALL
        .into_iter()
        .filter_map(|kind| match backend(kind) {
            Ok(backend) => Some(Arc::from(backend)),
            Err(error) => {
                skip(&format!("simulation: {error}"));
                None
            }
        })
        .collect();
    let watchdog = Watchdog::new();
    let mut ends: BTreeMap<Outcome, u64> = BTreeMap::new();
    let mut faults: BTreeMap<Fault, u64> = BTreeMap::new();
    let mut operations = 0;
    let mut before = held();
    for number in 0..seeds {
        let seed = first.wrapping_add(number);
        watchdog.watch(seed);
        if number == WARM_UP_SEEDS.min(seeds / 2) {
            before = held();
        }
        let mut scene = Scene::new(seed, &samples, &backends);
        let wrapper = Arc::clone(&scene.backend);
        let play = AssertUnwindSafe(|| match scene.random.once_in(2) {
            true => scene.load(),
            false => scene.stream(),
        });
        match catch_unwind(play) {
            Ok(end) => *ends.entry(end).or_default() += 1,
            Err(_) => panic!(
                "seed {seed} failed (TENSORA_SEED={seed} TENSORA_SIMULATION_SEEDS=1 shows it alone):\n{wrapper}"
            ),
        }
        for fault in Fault::ALL {
            *faults.entry(fault).or_default() += wrapper.count(fault);
        }
        operations += wrapper.operations();
    }
    println!("{seeds} seeds from {first}: {operations} operations; {faults:?}; {ends:?}");
    assert!(
        settles(before),
        "{before:?} before, {:?} after {seeds} seeds",
        held()
    );
    // A simulation in which nothing happens shows nothing.
    if seeds >= DEFAULT_SEEDS {
        for (fault, count) in faults {
            assert!(count > 50, "{fault}: {count} times");
        }
        let all = [
            Outcome::Complete,
            Outcome::Cancelled,
            Outcome::Dropped,
            Outcome::DeviceError,
            Outcome::EarlyEnd,
            Outcome::OutOfMemory,
            Outcome::Hook,
        ];
        for end in all {
            assert!(
                ends.get(&end).is_some_and(|&count| count > 20),
                "{end:?}: {ends:?}"
            );
        }
    }
}
