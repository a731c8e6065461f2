//! The backend that makes others go wrong: it keeps the contract, and each fault really happens.
#![cfg(all(feature = "testing", feature = "sync"))]
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use tensora_io::testing::{Check, Fault, FaultBackend, Faults, Options, skip};
use tensora_io::{
    Backend, BackendKind, Control, DirectPolicy, Error, ReadRequest, ReadStats, ResidentPolicy,
    Result, SourceFile, TransferParams, backend,
};

const CHUNK_BYTES: usize = 4096;
/// A file of so many operations, the last one of a single byte.
const OPERATIONS: usize = 33;
const LEN: usize = CHUNK_BYTES * (OPERATIONS - 1) + 1;

// ---- the contract ----

fn conform(kind: BackendKind, check: &Check, faults: &dyn Fn(u64) -> Faults) {
    // By design, and so no skip: what the wrapper does to a request does not depend on the backend within, and tests
    // run side by side. Several at once would take as much memory as there is, and show the same.
    if kind != BackendKind::Sync && check.name() == "a_request_over_2_gib" {
        return;
    }
    if let Err(error) = backend(kind) {
        return skip(&format!("{} with faults: {error}", check.name()));
    }
    let options = Options::default();
    let make = || -> Box<dyn Backend> {
        let inner = Arc::from(backend(kind).expect("what was available a moment ago"));
        Box::new(FaultBackend::new(inner, faults(options.seed)))
    };
    check.run(&make, &options);
}

macro_rules! conforming {
    ($($module:ident: $kind:ident, $faults:path;)*) => {
        $(mod $module {
            fn run(check: &tensora_io::testing::Check) {
                super::conform(tensora_io::BackendKind::$kind, check, &$faults);
            }

            tensora_io::conformance_tests!(run);
        })*
    };
}

conforming! {
    without_faults: Sync, tensora_io::testing::Faults::none;
    sync: Sync, tensora_io::testing::Faults::survived;
    tokio: Async, tensora_io::testing::Faults::survived;
    io_uring: IoUring, tensora_io::testing::Faults::survived;
    mmap: Mmap, tensora_io::testing::Faults::survived;
}

// ---- each fault ----

/// Where a read began, how long it was, and who made it.
type Call = (u64, usize, ThreadId);

/// Reads with threads, and remembers what it was asked for.
#[derive(Debug)]
struct Recorder {
    inner: Box<dyn Backend>,
    calls: Mutex<Vec<Call>>,
}

impl Backend for Recorder {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        let thread = std::thread::current().id();
        let calls = requests
            .iter()
            .map(|request| (request.offset, request.destination.len(), thread));
        self.calls.lock().unwrap().extend(calls);
        // So that the other threads get to work too.
        std::thread::sleep(Duration::from_millis(2));
        self.inner.read(requests, params, control)
    }
}

/// What came of reading a file of [`OPERATIONS`] operations.
struct Played {
    backend: FaultBackend,
    inner: Arc<Recorder>,
    file: SourceFile,
    content: Vec<u8>,
    _directory: tempfile::TempDir,
}

impl Played {
    fn new(faults: Faults) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        let content: Vec<u8> = (0..LEN).map(|at| (at % 251).to_le_bytes()[0]).collect();
        std::fs::write(&path, &content).unwrap();
        let inner = Arc::new(Recorder {
            inner: backend(BackendKind::Sync).unwrap(),
            calls: Mutex::default(),
        });
        Self {
            backend: FaultBackend::new(Arc::clone(&inner) as _, faults),
            inner,
            file: SourceFile::open(path).unwrap(),
            content,
            _directory: directory,
        }
    }

    /// Reads the whole file. What arrives is right, or there is an error.
    fn read(&self) -> Result<ReadStats> {
        let mut memory = vec![0; LEN];
        let request = ReadRequest {
            file: &self.file,
            offset: 0,
            destination: memory.as_mut_slice().into(),
        };
        let params = TransferParams {
            chunk_bytes: CHUNK_BYTES as u64,
            queue_depth: 1,
            workers: 4,
            direct: DirectPolicy::Never,
            resident: ResidentPolicy::Reread,
        };
        let stats = self.backend.read(vec![request], &params, &Control::new())?;
        assert!(memory == self.content, "{}", self.backend);
        assert_eq!(stats.bytes, LEN as u64);
        Ok(stats)
    }

    fn count(&self, fault: Fault) -> u64 {
        self.backend.count(fault)
    }
}

fn always(fault: Fault) -> Played {
    Played::new(Faults::none(1).with_probability(fault, 1.0))
}

fn sometimes(fault: Fault) -> Played {
    Played::new(Faults::none(1).with_probability(fault, 0.5))
}

#[test]
fn without_faults_the_batch_is_handed_on_as_it_is() {
    let played = Played::new(Faults::none(1));
    played.read().unwrap();
    let calls = played.inner.calls.lock().unwrap();
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].0, calls[0].1), (0, LEN));
    assert_eq!(calls[0].2, std::thread::current().id());
}

#[test]
fn interruptions_are_retried() {
    for played in [sometimes(Fault::Interrupted), always(Fault::Interrupted)] {
        let stats = played.read().unwrap();
        assert!(stats.retries > 5, "{}", played.backend);
        assert_eq!(stats.retries, played.count(Fault::Interrupted));
    }
}

#[test]
fn refusals_for_the_moment_are_retried_but_not_for_ever() {
    let played = sometimes(Fault::Busy);
    let stats = played.read().unwrap();
    assert!(stats.retries > 5, "{}", played.backend);
    assert_eq!(stats.retries, played.count(Fault::Busy));
    let played = always(Fault::Busy);
    let error = played.read().unwrap_err();
    assert!(matches!(error, Error::Read { .. }), "{error:?}");
    assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn short_reads_are_continued_from_single_bytes_upwards() {
    for played in [sometimes(Fault::ShortRead), always(Fault::ShortRead)] {
        let stats = played.read().unwrap();
        assert_eq!(stats.short_reads, played.count(Fault::ShortRead));
        assert!(stats.short_reads > 10, "{}", played.backend);
        let calls = played.inner.calls.lock().unwrap();
        let lens: Vec<usize> = calls.iter().map(|(_, len, _)| *len).collect();
        assert!(lens.contains(&1) && lens.iter().any(|len| (1000..4096).contains(len)));
        assert_eq!(lens.iter().sum::<usize>(), LEN);
    }
}

#[test]
fn delays_take_their_time() {
    let faults = Faults::none(1)
        .with_probability(Fault::Delay, 1.0)
        .with_longest_delay(Duration::from_millis(10));
    let played = Played::new(faults);
    let begin = Instant::now();
    played.read().unwrap();
    assert_eq!(played.count(Fault::Delay), OPERATIONS as u64);
    // Half of the longest each, on average.
    assert!(begin.elapsed() > Duration::from_millis(OPERATIONS as u64 * 2));
}

#[test]
fn a_device_error_names_its_place() {
    let faults = Faults::none(1).with_fault_at("data", 10_000, Fault::IoError);
    let played = Played::new(faults);
    for reads in 1..3 {
        let error = played.read().unwrap_err();
        assert!(
            matches!(&error, Error::Read { path, offset: 8192, length: 4096, .. } if path == played.file.path()),
            "{error:?}"
        );
        if cfg!(unix) {
            assert_eq!(error.io_error().unwrap().raw_os_error(), Some(5), "EIO");
        }
        assert_eq!(played.count(Fault::IoError), reads, "it keeps failing");
    }
    let text = played.backend.to_string();
    for said in [
        "seed 1",
        "I/O error: 2 times",
        "operation 2: I/O error at 8192..12288 of",
    ] {
        assert!(text.contains(said), "{text}");
    }
    // Of another file, or another place, nothing goes wrong.
    for (path_end, offset) in [("other", 10_000), ("data", LEN as u64), ("ata", 10_000)] {
        let faults = Faults::none(1).with_fault_at(path_end, offset, Fault::IoError);
        Played::new(faults).read().unwrap();
    }
}

#[test]
fn a_file_that_ends_early_says_where() {
    let played = Played::new(Faults::none(1).with_fault_at("data", 10_000, Fault::EarlyEnd));
    let error = played.read().unwrap_err();
    let Error::UnexpectedEof {
        path,
        offset: 8192,
        expected_end: 12_288,
        actual_end,
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!(path, played.file.path());
    assert!((8192..12_288).contains(actual_end), "{error}");
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let played = Played::new(Faults::none(1).with_fault_at("data", 0, Fault::OutOfMemory));
    let error = played.read().unwrap_err();
    assert!(
        matches!(error, Error::Memory { bytes: 4096, .. }),
        "{error:?}"
    );
    assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::OutOfMemory);
}

#[test]
fn a_numbered_operation_fails_once() {
    for number in [0, 7, OPERATIONS as u64 - 1] {
        let faults = Faults::none(1).with_fault_at_operation(number, Fault::IoError);
        let played = Played::new(faults);
        let error = played.read().unwrap_err();
        let offset = number * CHUNK_BYTES as u64;
        assert!(
            matches!(&error, Error::Read { offset: found, .. } if *found == offset),
            "{error:?}"
        );
        played.read().unwrap();
        assert_eq!(played.count(Fault::IoError), 1);
    }
}

#[test]
fn operations_are_reordered_over_several_threads() {
    let played = Played::new(Faults::none(1).with_reordering(4));
    played.read().unwrap();
    let calls = played.inner.calls.lock().unwrap();
    assert_eq!(calls.len(), OPERATIONS);
    assert!(!calls.is_sorted_by_key(|(offset, ..)| *offset), "in order");
    let first = calls[0].2;
    assert!(
        calls.iter().any(|(_, _, thread)| *thread != first),
        "one thread"
    );
}

#[test]
fn a_seed_shows_the_same_again_whatever_the_order() {
    let counts = |seed, threads| {
        let faults = Faults::none(seed)
            .with_probability(Fault::Interrupted, 0.3)
            .with_probability(Fault::Busy, 0.2)
            .with_probability(Fault::ShortRead, 0.3)
            .with_reordering(threads);
        let played = Played::new(faults);
        played.read().unwrap();
        Fault::ALL.map(|fault| played.count(fault))
    };
    let once = counts(42, 1);
    for threads in [1, 2, 4] {
        assert_eq!(counts(42, threads), once, "{threads} threads");
    }
    assert!((43..48).any(|seed| counts(seed, 1) != once));
}

#[test]
fn by_chance_faults_happen_as_often_as_they_shall() {
    for (probability, expected) in [(0.0, 0..=0), (0.02, 5..=45), (0.5, 220..=380)] {
        let mut failures = 0;
        for seed in 0..600 {
            let faults = Faults::none(seed)
                .with_probability(Fault::IoError, probability)
                .with_reordering(2);
            let played = Played::new(faults);
            let mut byte = [0];
            let request = ReadRequest {
                file: &played.file,
                offset: 5,
                destination: byte.as_mut_slice().into(),
            };
            let params = TransferParams {
                chunk_bytes: CHUNK_BYTES as u64,
                queue_depth: 1,
                workers: 1,
                direct: DirectPolicy::Never,
                resident: ResidentPolicy::Reread,
            };
            let outcome = played.backend.read(vec![request], &params, &Control::new());
            failures += usize::from(outcome.is_err());
        }
        assert!(
            expected.contains(&failures),
            "{probability}: {failures} of 600"
        );
    }
}

#[test]
#[should_panic(expected = "a probability of 1.5")]
fn a_probability_is_one() {
    let _ = Faults::none(1).with_probability(Fault::Busy, 1.5);
}
