//! Many loads at once, in many runtimes, ended in every way: the bytes are right, and nothing is left. One test in a
//! process of its own, because it counts what the whole process holds.
#![cfg(all(unix, feature = "sync", feature = "mmap"))]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use common::{Expected, LAYOUTS, skip};
use tensora::io::testing::{Fault, FaultBackend, Faults};
use tensora::{
    BackendKind, Checkpoint, Error, Loader, MappingPermit, MemoryChoice, MemoryPlace, MemorySink,
    Sink, SinkError, StreamedPiece, StreamedTensor, TensorStream,
};
use tokio::runtime::Runtime;

const THREADS: usize = 64;
/// Small chunks, so that even a small checkpoint is read in many operations, from several threads.
const CHUNK_BYTES: u64 = 64 << 10;
/// Streams of the largest tensor need more than one buffer.
const STREAM_LIMIT_BYTES: u64 = 4 << 20;
/// Hardly more than the least that works, and less than the checkpoint: who keeps every piece gets stuck.
const STALL_LIMIT_BYTES: u64 = 1100 << 10;

/// The same tensors in every layout.
struct Stage {
    _directory: tempfile::TempDir,
    expected: Expected,
    paths: Vec<PathBuf>,
    kinds: Vec<BackendKind>,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let expected = common::expected();
        let paths = LAYOUTS.iter().zip(0..).map(|(layout, number)| {
            let path = directory.path().join(format!("{number}"));
            std::fs::create_dir(&path).unwrap();
            common::write(&expected, layout, &path);
            path
        });
        let paths = paths.collect();
        let available = |kind: &BackendKind| {
            let made = tensora::io::backend(*kind);
            if let Err(error) = &made {
                skip(&format!("concurrency with {kind}: {error}"));
            }
            made.is_ok()
        };
        Self {
            paths,
            expected,
            _directory: directory,
            kinds: BackendKind::ALL.into_iter().filter(available).collect(),
        }
    }

    /// Which backend and which checkpoint number `number` is about: every pair comes up.
    fn choose(&self, number: usize) -> (Loader, &PathBuf) {
        let kind = self.kinds[number % self.kinds.len()];
        let path = &self.paths[number / self.kinds.len() % self.paths.len()];
        (loader(kind), path)
    }

    fn check(&self, checkpoint: &Checkpoint) {
        assert_eq!(checkpoint.len(), self.expected.len());
        for tensor in checkpoint {
            let (dtype, shape, data) = &self.expected[tensor.name()];
            assert_eq!(tensor.dtype(), *dtype, "{}", tensor.name());
            let loaded: Vec<u64> = tensor.shape().iter().map(|&n| n as u64).collect();
            assert_eq!(&loaded, shape, "{}", tensor.name());
            assert!(tensor.bytes() == data, "wrong bytes in {}", tensor.name());
        }
    }

    fn check_piece(&self, piece: &StreamedPiece) {
        let data = &self.expected[piece.tensor().name()].2;
        let from = usize::try_from(piece.offset_bytes()).unwrap();
        let (name, part) = (piece.tensor().name(), &data[from..][..piece.bytes().len()]);
        assert!(piece.bytes() == part, "wrong bytes in {name}");
    }

    fn check_stream(&self, stream: TensorStream) {
        let mut bytes = 0;
        for piece in stream {
            let piece = piece.unwrap();
            self.check_piece(&piece);
            bytes += piece.bytes().len();
        }
        let all = self.expected.values().map(|(_, _, data)| data.len());
        assert_eq!(bytes, all.sum::<usize>());
    }
}

fn loader(kind: BackendKind) -> Loader {
    Loader::new()
        .backend(kind)
        .chunk_bytes(CHUNK_BYTES)
        .workers(3)
}

fn streaming(kind: BackendKind) -> Loader {
    loader(kind).memory_limit_bytes(STREAM_LIMIT_BYTES)
}

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
}

fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap()
}

// ---- threads ----

fn threads_at_once(stage: &Stage) {
    let barrier = Barrier::new(THREADS);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let barrier = &barrier;
            scope.spawn(move || {
                // Half of them load one checkpoint, the others all of them.
                let (loader, path) = stage.choose(number);
                let path = if number % 2 == 0 {
                    &stage.paths[0]
                } else {
                    path
                };
                barrier.wait();
                stage.check(&loader.load(path).unwrap());
                let kind = stage.kinds[number % stage.kinds.len()];
                stage.check_stream(streaming(kind).open(path).unwrap().stream().unwrap());
            });
        }
    });
}

/// One opened checkpoint, of which every thread takes all tensors, in an order of its own.
fn threads_share_one_opened_checkpoint(stage: &Stage) {
    for &kind in &stage.kinds {
        let opened = loader(kind).open(&stage.paths[1]).unwrap();
        let names: Vec<&String> = stage.expected.keys().collect();
        thread::scope(|scope| {
            for number in 0..8 {
                let (opened, names) = (&opened, &names);
                scope.spawn(move || {
                    for at in 0..names.len() {
                        let name = names[(at * 7 + number * 5) % names.len()];
                        let tensor = opened.tensor(name).unwrap();
                        assert!(*tensor.bytes() == stage.expected[name].2, "{name}");
                    }
                });
            }
        });
    }
}

// ---- runtimes ----

/// In each of many runtimes at once: futures, blocking work where it belongs, and blocking work where it does not.
fn runtimes_at_once(stage: &Stage) {
    thread::scope(|scope| {
        for number in 0..12 {
            scope.spawn(move || {
                let runtime = if number % 2 == 0 {
                    current_thread()
                } else {
                    multi_thread()
                };
                runtime.block_on(in_a_runtime(stage, number));
            });
        }
    });
}

async fn in_a_runtime(stage: &Stage, number: usize) {
    let tasks: Vec<_> = (0..stage.kinds.len())
        .map(|more| {
            let (loader, path) = stage.choose(number * 5 + more);
            let path = path.clone();
            tokio::spawn(async move { loader.load_async(path).await })
        })
        .collect();
    for task in tasks {
        stage.check(&task.await.unwrap().unwrap());
    }

    let (loader, path) = stage.choose(number);
    let blocking = {
        let (loader, path) = (loader.clone(), path.clone());
        tokio::task::spawn_blocking(move || loader.load(path))
    };
    stage.check(&blocking.await.unwrap().unwrap());
    // It holds the executor up, but it works.
    stage.check(&loader.load(path).unwrap());

    let kind = stage.kinds[number % stage.kinds.len()];
    let mut stream = streaming(kind).open(path).unwrap().stream().unwrap();
    while let Some(piece) = next_piece(&mut stream).await {
        stage.check_piece(&piece.unwrap());
    }
    let mut left = streaming(kind).open(path).unwrap().stream().unwrap();
    stage.check_piece(&next_piece(&mut left).await.unwrap().unwrap());
    left.detach();
}

async fn next_piece(stream: &mut TensorStream) -> Option<tensora::Result<StreamedPiece>> {
    poll_fn(|cx| futures_core::Stream::poll_next(Pin::new(&mut *stream), cx)).await
}

/// Loads whose futures are dropped: before they are polled, after, midway, and with the runtime that ran them.
fn futures_dropped_midway(stage: &Stage) {
    let slow = |number: usize| {
        let kind = stage.kinds[number % stage.kinds.len()];
        let inner = Arc::from(tensora::io::backend(kind).unwrap());
        let faults = Faults::none(number as u64)
            .with_probability(Fault::Delay, 1.0)
            .with_longest_delay(Duration::from_millis(4));
        let backend = Arc::new(FaultBackend::new(inner, faults));
        Loader::new().chunk_bytes(CHUNK_BYTES).read_with(backend)
    };
    for number in 0..stage.kinds.len() * 2 {
        let (path, loader) = (&stage.paths[number % stage.paths.len()], slow(number));
        drop(loader.load_async(path));
        let mut polled = pin!(loader.load_async(path));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(polled.as_mut().poll(&mut context), Poll::Pending));

        let runtime = if number % 2 == 0 {
            current_thread()
        } else {
            multi_thread()
        };
        runtime.block_on(async {
            for wait_us in [0, 300, 3000] {
                let limit = Duration::from_micros(wait_us);
                match tokio::time::timeout(limit, loader.load_async(path)).await {
                    Ok(loaded) => stage.check(&loaded.unwrap()),
                    Err(_elapsed) => {}
                }
            }
            let (loader, path) = (loader.clone(), path.clone());
            // The runtime ends while this one is under way.
            tokio::spawn(async move { loader.load_async(path).await.map(drop) });
            tokio::task::yield_now().await;
        });
        drop(runtime);
        // The token that the loader was given belongs to the caller, and is not touched.
        stage.check(&loader.load(path).unwrap());
    }
}

// ---- drops ----

fn dropped_in_any_order(stage: &Stage) {
    for number in 0..stage.kinds.len() * stage.paths.len() {
        let (loader, path) = stage.choose(number);
        let lazy = loader.open(path).unwrap();
        let one = lazy.tensor("model.embed_tokens.weight").unwrap();
        let loaded = lazy.load_all().unwrap();
        let mut stream = streaming(stage.kinds[number % stage.kinds.len()])
            .open(path)
            .unwrap()
            .stream()
            .unwrap();
        let piece = stream.next().unwrap().unwrap();
        let tensor = loaded.tensor("model.layers.3.mlp.weight").unwrap().clone();
        let part = loaded.tensor("ids").unwrap().bytes().slice(3..9);
        // What outlives the rest is intact; the last one leaves on a thread of its own.
        let checks = || {
            let data = |name: &str| &stage.expected[name].2;
            assert!(one.bytes() == data("model.embed_tokens.weight"));
            assert!(tensor.bytes() == data("model.layers.3.mlp.weight"));
            assert!(part == data("ids")[3..9]);
            stage.check_piece(&piece);
        };
        let mut rest: Vec<Box<dyn std::any::Any + Send>> =
            vec![Box::new(lazy), Box::new(loaded), Box::new(stream)];
        for turn in (1..=rest.len()).rev() {
            let gone = rest.swap_remove((number * 7 + turn) % turn);
            thread::spawn(move || drop(gone)).join().unwrap();
            checks();
        }
        let mut views: Vec<Box<dyn std::any::Any + Send>> = vec![
            Box::new(one),
            Box::new(tensor),
            Box::new(part),
            Box::new(piece),
        ];
        views.rotate_left(number % 4);
        thread::spawn(move || drop(views)).join().unwrap();
    }
}

/// A view keeps a mapping alive, whatever else is dropped.
fn mapped_tensors_outlive_their_checkpoint(stage: &Stage) {
    // SAFETY: the files are this test's own, in a fresh directory, and nobody writes to them any more.
    let permit = unsafe { MappingPermit::new() };
    let mapping = Loader::new()
        .allow_mapping(permit)
        .memory(MemoryChoice::Mapped);
    for path in &stage.paths {
        let lazy = mapping.open(path).unwrap();
        let tensor = lazy.tensor("model.embed_tokens.weight").unwrap();
        let checkpoint = lazy.load_all().unwrap();
        drop(lazy);
        stage.check(&checkpoint);
        let last = checkpoint.tensor("ids").unwrap().clone();
        drop(checkpoint);
        assert!(*tensor.bytes() == stage.expected["model.embed_tokens.weight"].2);
        drop(tensor);
        assert!(*last.bytes() == stage.expected["ids"].2);
    }
}

/// Pieces that are held on to: the stream says so, and goes on when they are let go.
fn streams_that_stall_and_go_on(stage: &Stage) {
    for (number, &kind) in stage.kinds.iter().enumerate() {
        let path = &stage.paths[number % stage.paths.len()];
        let loader = loader(kind)
            .memory_limit_bytes(STALL_LIMIT_BYTES)
            .lease_timeout(Duration::from_millis(5));
        let mut stream = loader.open(path).unwrap().stream().unwrap();
        let (mut held, mut bytes, mut stalls) = (Vec::new(), 0, 0);
        loop {
            match stream.next() {
                None => break,
                Some(Ok(piece)) => {
                    stage.check_piece(&piece);
                    bytes += piece.bytes().len();
                    held.push(piece);
                }
                Some(Err(error)) => {
                    let stalled = matches!(error, Error::Io(tensora::io::Error::LeasesHeld { .. }));
                    assert!(stalled, "{error}");
                    held.iter().for_each(|piece| stage.check_piece(piece));
                    assert!(!held.is_empty(), "stalled with nothing held");
                    held.clear();
                    stalls += 1;
                }
            }
        }
        assert!(stalls > 0, "{kind}: the stream never stalled");
        let all = stage.expected.values().map(|(_, _, data)| data.len());
        assert_eq!(bytes, all.sum::<usize>());
    }
}

// ---- panics ----

/// What the tests panic with.
#[derive(Debug, PartialEq)]
struct Ours(usize);

/// Runs what has to panic with [`Ours`].
fn must_panic(number: usize, work: impl FnOnce()) {
    let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("no panic came through");
    match panic.downcast::<Ours>() {
        Ok(ours) => assert_eq!(*ours, Ours(number)),
        Err(other) => resume_unwind(other),
    }
}

fn panics_in_callbacks(stage: &Stage) {
    for number in 0..stage.kinds.len() * 2 {
        let (loader, path) = stage.choose(number);
        let kind = stage.kinds[number % stage.kinds.len()];
        let threshold = [1, 200_000][number / stage.kinds.len()];
        let panicking = |loader: Loader| {
            loader.on_progress(move |progress| {
                if progress.done_bytes >= threshold {
                    panic_any(Ours(number));
                }
            })
        };
        must_panic(number, || drop(panicking(loader.clone()).load(path)));
        for runtime in [current_thread(), multi_thread()] {
            let load = panicking(loader.clone());
            must_panic(number, || {
                drop(runtime.block_on(async { load.load_async(path).await }));
            });
        }
        must_panic(number, || {
            let opened = panicking(streaming(kind)).open(path).unwrap();
            opened.stream().unwrap().for_each(drop);
        });
        stage.check(&loader.load(path).unwrap());
    }
}

/// When a sink gives up, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    Begin,
    Write,
    Finish,
}

#[derive(Debug)]
struct TroubledSink {
    trouble: Trouble,
    panics: bool,
    held: Vec<StreamedPiece>,
}

impl TroubledSink {
    fn at(&self, now: Trouble) -> Result<(), SinkError> {
        if now != self.trouble {
            return Ok(());
        }
        if self.panics {
            panic_any(Ours(now as usize));
        }
        Err(format!("no room at {now:?}").into())
    }
}

impl Sink for TroubledSink {
    fn begin(&mut self, _tensors: &[StreamedTensor]) -> Result<(), SinkError> {
        self.at(Trouble::Begin)
    }

    fn write(&mut self, piece: StreamedPiece) -> Result<(), SinkError> {
        // It goes down with a buffer in hand.
        if self.held.is_empty() {
            self.held.push(piece);
        }
        self.at(Trouble::Write)
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        self.at(Trouble::Finish)
    }
}

fn sinks_that_give_up(stage: &Stage) {
    for (number, &kind) in stage.kinds.iter().enumerate() {
        let opened = streaming(kind)
            .open(&stage.paths[number % stage.paths.len()])
            .unwrap();
        for trouble in [Trouble::Begin, Trouble::Write, Trouble::Finish] {
            let sink = |panics| TroubledSink {
                trouble,
                panics,
                held: Vec::new(),
            };
            must_panic(trouble as usize, || {
                drop(opened.stream_into(&mut sink(true)));
            });
            let error = opened.stream_into(&mut sink(false)).unwrap_err();
            let wanted = format!("no room at {trouble:?}");
            assert!(error.to_string().contains(&wanted), "{error}");
        }
        must_panic(number, || {
            let mut memory = [0_u8; 8];
            let mut sink = MemorySink::new(&mut memory, |_| -> Option<MemoryPlace> {
                panic_any(Ours(number))
            });
            drop(opened.stream_into(&mut sink));
        });
        stage.check_stream(opened.stream().unwrap());
    }
}

// ---- and nothing is left ----

/// What this process holds.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug)]
struct Held {
    threads: usize,
    descriptors: usize,
    anonymous_bytes: u64,
}

#[cfg(target_os = "linux")]
fn held() -> Held {
    let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
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
    Held {
        threads: count("/proc/self/task"),
        descriptors: count("/proc/self/fd"),
        anonymous_bytes: kib << 10,
    }
}

#[cfg(target_os = "linux")]
fn check_nothing_left(name: &str, before: Held) {
    /// Allocators keep some; one lost load of each of the 64 threads would be 80 MB.
    const SLACK_BYTES: u64 = 16 << 20;
    /// Work that was cancelled ends on threads of its own.
    const PATIENCE: Duration = Duration::from_secs(30);

    let begun = std::time::Instant::now();
    loop {
        let now = held();
        if now.threads <= before.threads
            && now.descriptors <= before.descriptors
            && now.anonymous_bytes <= before.anonymous_bytes + SLACK_BYTES
        {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{name} left something behind: {before:?} before, {now:?} after"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn many_loads_at_once_give_the_right_bytes_and_leave_nothing() {
    type Section = (&'static str, fn(&Stage));
    let sections: [Section; 9] = [
        ("64 threads at once", threads_at_once),
        ("one opened checkpoint", threads_share_one_opened_checkpoint),
        ("runtimes at once", runtimes_at_once),
        ("futures dropped midway", futures_dropped_midway),
        ("drops in any order", dropped_in_any_order),
        ("mapped tensors", mapped_tensors_outlive_their_checkpoint),
        ("stalled streams", streams_that_stall_and_go_on),
        ("panics in callbacks", panics_in_callbacks),
        ("sinks that give up", sinks_that_give_up),
    ];
    let stage = Stage::new();
    quiet_about_our_panics();
    #[cfg(target_os = "linux")]
    let resting = Held {
        // Allocators keep what they have once had.
        anonymous_bytes: u64::MAX >> 1,
        ..held()
    };
    for (name, section) in sections {
        // What is made once and kept is made here.
        section(&stage);
        #[cfg(target_os = "linux")]
        {
            check_nothing_left(name, resting);
            let before = held();
            section(&stage);
            check_nothing_left(name, before);
        }
        #[cfg(not(target_os = "linux"))]
        skip(&format!("what is left after {name}: counted on Linux only"));
    }
}

/// Panics with [`Ours`] are meant, and would fill pages.
fn quiet_about_our_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !info.payload().is::<Ours>() {
            usual(info);
        }
    }));
}
