//! Whatever goes wrong on the way, the source is untouched, the checkpoint that was there stays, the error says
//! what it was, and a conversion can go on where it stopped.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;

use common::{FORMATS, Record, Tensors, tensors};
use tensora_convert::{
    ConversionPlan, ConversionReport, ConvertOptions, Error, OutputKind, Overwrite, Reading,
    Result, Unfinished, Verify,
};
use tensora_formats::{CheckpointIndex, Dtype, Format, UNFINISHED_NAME};
use tensora_io::testing::{Fault, FaultBackend, Faults};
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, ReadRequest, ReadStats,
    ResidentPolicy, SourceFile, TransferParams, backend,
};

type Snapshot = BTreeMap<PathBuf, Vec<u8>>;

/// A source of two files, and a target that may hold another checkpoint.
struct Stage {
    _directory: tempfile::TempDir,
    source: PathBuf,
    target: PathBuf,
    format: Format,
    expected: Tensors,
    source_files: Snapshot,
    old_files: Option<Snapshot>,
}

fn records(seed: u64) -> Vec<Record> {
    (0..6)
        .map(|number| {
            let name = format!("layers.{number}.weight");
            Record::plain(
                &name,
                Dtype::U8,
                &[300_007 + 50_000 * number],
                seed + number,
            )
        })
        .collect()
}

impl Stage {
    fn new(format: Format, holds_old: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        Self::with_target(directory, target, format, holds_old)
    }

    fn with_target(
        directory: tempfile::TempDir,
        target: PathBuf,
        format: Format,
        holds_old: bool,
    ) -> Self {
        let source = directory.path().join("source");
        common::write(&source, &records(1), Format::Safetensors, 2);
        if holds_old {
            common::write(&target, &records(100), format, 2);
        }
        Self {
            _directory: directory,
            source_files: common::snapshot(&source),
            old_files: holds_old.then(|| common::snapshot(&target)),
            expected: tensors(&records(1)),
            source,
            target,
            format,
        }
    }

    /// Four files, through buffers of which each file takes several.
    fn options(&self) -> ConvertOptions {
        let four = NonZero::new(4).unwrap();
        let options = ConvertOptions::new(self.format)
            .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
            .overwrite(if self.old_files.is_some() {
                Overwrite::Replace
            } else {
                Overwrite::Refuse
            });
        match self.format {
            Format::Safetensors => options.shards(four),
            Format::ServerlessLlmStore => options.partition_bytes(NonZero::new(900_000).unwrap()),
            _ => options.partitions(four),
        }
    }

    fn run(&self, options: &ConvertOptions, control: &Control) -> Result<ConversionReport> {
        let index = CheckpointIndex::open(&self.source).unwrap();
        options.plan(&index, &self.target)?.run(control)
    }

    fn staging(&self) -> PathBuf {
        self.target.join(".tensora-convert")
    }

    /// What is in the target besides the files that a conversion keeps to go on with.
    fn visible(&self) -> Snapshot {
        let mut files = common::snapshot(&self.target);
        files.retain(|name, _| !name.starts_with(".tensora-convert"));
        files
    }

    /// Everything is as it was, and of the conversion only finished files are left. Returns how many.
    fn check_stopped(&self) -> usize {
        assert!(
            common::snapshot(&self.source) == self.source_files,
            "the source was touched"
        );
        match &self.old_files {
            Some(old) => assert!(self.visible() == *old, "the old checkpoint was touched"),
            None => {
                assert!(self.visible().is_empty(), "{:?}", self.visible().keys());
                assert!(CheckpointIndex::open(&self.target).is_err());
            }
        }
        let mut left = common::names(&self.staging());
        left.retain(|name| name != ".journal" && name != ".tensora-unfinished");
        let index = CheckpointIndex::open(&self.source).unwrap();
        let resumed = self.options().unfinished(Unfinished::Resume);
        let kept = resumed.plan(&index, &self.target).unwrap().kept().unwrap();
        assert_eq!(left.len(), kept.files, "{left:?}");
        if kept.files == 0 {
            assert!(
                !self.staging().exists(),
                "nothing is finished, and yet something is left"
            );
            assert_eq!(self.target.exists(), self.old_files.is_some());
        } else {
            let refused = self
                .options()
                .plan(&index, &self.target)
                .unwrap_err()
                .to_string();
            for remedy in ["--resume", "--restart"] {
                assert!(refused.contains(remedy), "{refused}");
            }
        }
        kept.files
    }

    /// Goes on, and finds the whole checkpoint.
    fn finish(&self) -> ConversionReport {
        let resumed = self.options().unfinished(Unfinished::Resume);
        let report = self.run(&resumed, &Control::new()).unwrap();
        self.check_done();
        report
    }

    fn check_done(&self) {
        let found = common::read(&self.target);
        assert!(found.tensors == self.expected && found.format == self.format);
        assert!(!self.staging().exists());
        let listed = common::names(&self.target);
        assert_eq!(listed.len(), found.files.len() + 1, "{listed:?}");
        assert!(
            common::snapshot(&self.source) == self.source_files,
            "the source was touched"
        );
    }
}

/// Does something at one of the reports of progress.
fn at_call(number: u64, action: impl Fn() + Send + Sync + 'static) -> Control {
    let calls = AtomicU64::new(0);
    Control::new().with_progress(move |_| {
        if calls.fetch_add(1, Ordering::SeqCst) + 1 == number {
            action();
        }
    })
}

/// How many reports of progress an undisturbed conversion makes.
fn calls(format: Format) -> u64 {
    let stage = Stage::new(format, false);
    let calls = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&calls);
    let control = Control::new().with_progress(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    stage.run(&stage.options(), &control).unwrap();
    stage.check_done();
    let calls = calls.load(Ordering::SeqCst);
    assert!(calls >= 8, "only {calls} windows");
    calls
}

#[test]
fn cancelled_at_any_window_it_keeps_what_is_finished() {
    for format in FORMATS {
        let calls = calls(format);
        let mut most_kept = 0;
        for holds_old in [false, true] {
            for number in 1..=calls {
                let stage = Stage::new(format, holds_old);
                let token = CancelToken::new();
                let in_callback = token.clone();
                let control = at_call(number, move || in_callback.cancel()).with_cancel(token);
                let error = stage.run(&stage.options(), &control).unwrap_err();
                assert!(error.is_cancelled(), "{error}");
                let kept = stage.check_stopped();
                assert_eq!(stage.finish().resumed_files, kept);
                most_kept = most_kept.max(kept);
            }
        }
        assert!(most_kept > 0, "{format}: nothing was ever kept");
    }
}

#[test]
fn starting_over_keeps_nothing() {
    let stage = Stage::new(Format::ServerlessLlmStore, true);
    let token = CancelToken::new();
    let in_callback = token.clone();
    let late = calls(stage.format);
    let control = at_call(late, move || in_callback.cancel()).with_cancel(token);
    stage.run(&stage.options(), &control).unwrap_err();
    assert!(stage.check_stopped() > 0);
    let discarding = stage.options().unfinished(Unfinished::Discard);
    let report = stage.run(&discarding, &Control::new()).unwrap();
    assert_eq!(report.resumed_files, 0);
    stage.check_done();
}

#[test]
fn kept_files_that_were_damaged_since_are_written_again() {
    let stage = Stage::new(Format::ServerlessLlmPartitioned, false);
    let token = CancelToken::new();
    let in_callback = token.clone();
    let late = calls(stage.format);
    let control = at_call(late, move || in_callback.cancel()).with_cancel(token);
    stage.run(&stage.options(), &control).unwrap_err();
    let kept = stage.check_stopped();
    assert!(kept > 0);
    // One bit, in a file that keeps its length.
    let mut files = fs::read_dir(stage.staging())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let path = files
        .find(|path| path.to_string_lossy().contains("tensor.data_"))
        .unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(stage.finish().resumed_files, kept - 1);
}

#[test]
fn what_was_kept_of_another_conversion_is_not_resumed() {
    let stage = Stage::new(Format::ServerlessLlmPartitioned, false);
    let token = CancelToken::new();
    let in_callback = token.clone();
    let late = calls(stage.format);
    let control = at_call(late, move || in_callback.cancel()).with_cancel(token);
    stage.run(&stage.options(), &control).unwrap_err();
    assert!(stage.check_stopped() > 0);
    let resumed = stage.options().unfinished(Unfinished::Resume);
    let others = [
        resumed.clone().partitions(NonZero::new(3).unwrap()),
        ConvertOptions::new(Format::ServerlessLlmStore).unfinished(Unfinished::Resume),
    ];
    for other in &others {
        let error = stage.run(other, &Control::new()).unwrap_err();
        assert!(matches!(error, Error::CannotResume { .. }), "{error}");
    }
    // Another source of the same names and lengths.
    let one = stage.source.join("model-00001-of-00002.safetensors");
    let original = fs::read(&one).unwrap();
    let mut changed = original.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&one, changed).unwrap();
    let error = stage.run(&resumed, &Control::new()).unwrap_err();
    assert!(matches!(error, Error::CannotResume { .. }), "{error}");
}

#[test]
fn a_panic_of_the_callback_is_like_any_other_error() {
    for holds_old in [false, true] {
        let calls = calls(Format::ServerlessLlmStore);
        for number in [1, calls / 2, calls] {
            let stage = Stage::new(Format::ServerlessLlmStore, holds_old);
            let control = at_call(number, || panic!("of the callback"));
            let run = AssertUnwindSafe(|| stage.run(&stage.options(), &control));
            let panic = catch_unwind(run).unwrap_err();
            assert_eq!(panic.downcast_ref(), Some(&"of the callback"));
            let kept = stage.check_stopped();
            assert_eq!(stage.finish().resumed_files, kept);
        }
    }
}

fn transfer() -> TransferParams {
    TransferParams {
        chunk_bytes: 64 << 10,
        queue_depth: 1,
        workers: 2,
        direct: DirectPolicy::Never,
        resident: ResidentPolicy::Reread,
    }
}

fn faulty(faults: Faults) -> Reading {
    let inner: Arc<dyn Backend> = Arc::from(backend(BackendKind::Sync).unwrap());
    let faulty = FaultBackend::new(inner, faults);
    Reading::new(Arc::new(faulty), 2, transfer())
}

#[test]
fn a_read_error_names_file_and_cause() {
    for format in FORMATS {
        for holds_old in [false, true] {
            for (file, permille) in [(1, 10), (1, 600), (2, 5), (2, 500), (2, 999)] {
                let stage = Stage::new(format, holds_old);
                let name = format!("model-{file:05}-of-00002.safetensors");
                let path = stage.source.join(&name);
                let byte = fs::metadata(&path).unwrap().len() * permille / 1000;
                for (fault, part) in [
                    (Fault::IoError, "Input/output error"),
                    (Fault::EarlyEnd, "end"),
                ] {
                    let faults = Faults::none(1).with_fault_at(&path, byte, fault);
                    let options = stage.options().unfinished(Unfinished::Resume);
                    let error = stage
                        .run(&options.reading(faulty(faults)), &Control::new())
                        .unwrap_err();
                    assert!(matches!(error, Error::Read(_)), "{error}");
                    let text = error.to_string();
                    assert!(text.contains(&name) && text.contains(part), "{text}");
                    stage.check_stopped();
                }
                stage.finish();
            }
        }
    }
}

/// Fails every read of a file below a directory.
#[derive(Debug)]
struct Failing {
    inner: Box<dyn Backend>,
    below: PathBuf,
    errno: i32,
}

impl Backend for Failing {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> tensora_io::Result<ReadStats> {
        let failing = |request: &&ReadRequest<'_>| request.file.path().starts_with(&self.below);
        match requests.iter().find(failing) {
            Some(request) => Err(tensora_io::Error::Read {
                path: request.file.path().to_owned(),
                offset: request.offset,
                length: 1,
                source: io::Error::from_raw_os_error(self.errno),
            }),
            None => self.inner.read(requests, params, control),
        }
    }
}

/// Stops a conversion as late as possible. Returns how many files are kept.
#[cfg(unix)]
fn stop_late(stage: &Stage, calls: u64) -> usize {
    let token = CancelToken::new();
    let in_callback = token.clone();
    let control = at_call(calls, move || in_callback.cancel()).with_cancel(token);
    stage.run(&stage.options(), &control).unwrap_err();
    let kept = stage.check_stopped();
    assert!(kept > 0);
    kept
}

#[cfg(unix)]
#[test]
fn a_finished_file_is_given_up_only_for_what_is_in_it() {
    use rustix::io::Errno;
    let calls = calls(Format::ServerlessLlmPartitioned);
    for (errno, is_lost) in [
        (Errno::MFILE, false),
        (Errno::NOMEM, false),
        (Errno::ACCESS, false),
        (Errno::IO, true),
    ] {
        let stage = Stage::new(Format::ServerlessLlmPartitioned, false);
        let kept = stop_late(&stage, calls);
        let failing = Failing {
            inner: backend(BackendKind::Sync).unwrap(),
            below: stage.staging(),
            errno: errno.raw_os_error(),
        };
        let transfer = TransferParams {
            chunk_bytes: 64 << 10,
            queue_depth: 1,
            workers: 2,
            direct: DirectPolicy::Never,
            resident: ResidentPolicy::Reread,
        };
        let options = stage
            .options()
            .unfinished(Unfinished::Resume)
            .reading(Reading::new(Arc::new(failing), 2, transfer));
        let resumed = stage.run(&options, &Control::new());
        if is_lost {
            assert_eq!(resumed.unwrap().resumed_files, 0, "{errno}");
            stage.check_done();
        } else {
            let text = resumed.unwrap_err().to_string();
            assert!(text.contains(".tensora-convert"), "{text}");
            assert_eq!(stage.check_stopped(), kept, "{errno}");
            assert_eq!(stage.finish().resumed_files, kept, "{errno}");
        }
    }

    // Those that are shorter, or gone.
    let changes: [fn(&Path); 2] = [
        |path| {
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        },
        |path| fs::remove_file(path).unwrap(),
    ];
    for change in changes {
        let stage = Stage::new(Format::ServerlessLlmPartitioned, false);
        let kept = stop_late(&stage, calls);
        let mut staged = common::names(&stage.staging());
        staged.retain(|name| name.starts_with("tensor.data_"));
        change(&stage.staging().join(&staged[0]));
        assert_eq!(stage.finish().resumed_files, kept - 1);
    }
}

/// Does something once so many bytes have been reported.
fn once_arrived(bytes: u64, action: impl Fn() + Send + Sync + 'static) -> Control {
    let arrived = AtomicU64::new(0);
    Control::new().with_progress(move |more| {
        let before = arrived.fetch_add(more, Ordering::SeqCst);
        if (before..before + more).contains(&(bytes - 1)) {
            action();
        }
    })
}

/// Writes everything that is planned, and stops while that is read back.
fn stop_while_read_back(plan: &ConversionPlan) {
    let token = CancelToken::new();
    let in_callback = token.clone();
    let control = once_arrived(plan.data_bytes() + 1, move || in_callback.cancel());
    let error = plan.run(&control.with_cancel(token)).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
}

/// What a crash leaves behind that comes when the first file has got its name.
fn leave_in_commit(plan: &ConversionPlan, first: &str) {
    stop_while_read_back(plan);
    let (target, staging) = (plan.target(), plan.target().join(".tensora-convert"));
    let journal = staging.join(".journal");
    let mut text = fs::read(&journal).unwrap();
    text.extend(b"{\"event\":\"committing\"}\n");
    fs::write(journal, text).unwrap();
    fs::write(target.join(UNFINISHED_NAME), "").unwrap();
    fs::rename(staging.join(first), target.join(first)).unwrap();
}

/// A format, the first of its files, and a byte that matters in there: of a tensor, or of a header.
const FIRST_FILES: [(Format, &str, usize); 4] = [
    (Format::ServerlessLlmPartitioned, "tensor.data_0", 1000),
    (Format::ServerlessLlmStore, "tensor.data_0", 0),
    (
        Format::Safetensors,
        "model-00001-of-00004.safetensors",
        200_000,
    ),
    (Format::Safetensors, "model-00001-of-00004.safetensors", 9),
];

fn flip_bit(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_reads_differently_is_not_put_in_place() {
    for (format, first, at) in FIRST_FILES {
        for holds_old in [false, true] {
            let stage = Stage::new(format, holds_old);
            let index = CheckpointIndex::open(&stage.source).unwrap();
            let options = stage.options().verify(Verify::ReadBack);
            stop_while_read_back(&options.plan(&index, &stage.target).unwrap());
            let resumed = options.clone().unfinished(Unfinished::Resume);
            let plan = resumed.plan(&index, &stage.target).unwrap();
            // After it was found to be what the journal says.
            let damaged = stage.staging().join(first);
            let control = once_arrived(plan.data_bytes(), move || flip_bit(&damaged, at));
            let error = plan.run(&control).unwrap_err();
            assert!(
                matches!(&error, Error::NotAsRead { path, differences } if *path == stage.target && differences.len() == 1),
                "{error}"
            );
            assert!(!stage.staging().exists());
            assert!(stage.visible() == stage.old_files.clone().unwrap_or_default());
            stage.run(&options, &Control::new()).unwrap();
            stage.check_done();
        }
    }
}

#[test]
fn what_reads_differently_in_place_opens_as_no_checkpoint() {
    for (format, first, at) in FIRST_FILES {
        let stage = Stage::new(format, false);
        let index = CheckpointIndex::open(&stage.source).unwrap();
        let options = stage.options().verify(Verify::ReadBack);
        leave_in_commit(&options.plan(&index, &stage.target).unwrap(), first);
        let resumed = options.unfinished(Unfinished::Resume);
        let plan = resumed.plan(&index, &stage.target).unwrap();
        let kept = plan.kept().unwrap().files;
        let check_refused = || {
            let error = CheckpointIndex::open(&stage.target).unwrap_err();
            let is_unfinished = matches!(error, tensora_formats::Error::Unfinished { .. });
            assert!(is_unfinished, "{error}");
            assert_eq!(plan.kept().unwrap().files, kept);
        };
        check_refused();

        // After it was found to be what the journal says.
        let damaged = stage.target.join(first);
        let control = once_arrived(plan.data_bytes(), move || flip_bit(&damaged, at));
        let error = plan.run(&control).unwrap_err();
        check_refused();
        let text = error.to_string();
        assert!(
            matches!(&error, Error::PlacedNotAsRead { path, differences } if *path == stage.target && differences.len() == 1),
            "{text}"
        );
        for part in ["target", "--resume", "no checkpoint"] {
            assert!(text.contains(part), "{text}");
        }

        // Stopped by the user at the same place.
        stop_while_read_back(&plan);
        check_refused();
        let report = stage.run(&resumed, &Control::new()).unwrap();
        assert_eq!(report.resumed_files, kept);
        stage.check_done();
    }
}

#[test]
fn ranks_that_there_are_no_more_are_gone_when_the_others_are_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    let format = Format::ServerlessLlmPartitioned;
    common::write_ranks(&source, &[records(1), records(11)], format, 1);
    let old: Vec<Vec<Record>> = (0..4).map(|rank| records(100 + rank)).collect();
    common::write_ranks(&target, &old, format, 2);
    let index = CheckpointIndex::open(&source).unwrap();
    let options = ConvertOptions::new(format)
        .overwrite(Overwrite::Replace)
        .verify(Verify::ReadBack);
    leave_in_commit(
        &options.plan(&index, &target).unwrap(),
        "rank_0/tensor.data_0",
    );
    let resumed = options.unfinished(Unfinished::Resume);
    resumed
        .plan(&index, &target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
    assert!(common::read(&target).tensors == common::read(&source).tensors);
    let left = common::names(&target);
    assert!(!left.iter().any(|name| name.contains("unfinished")));
    assert!(!left.contains(&"rank_2".to_owned()), "{left:?}");
}

#[test]
fn errors_that_a_read_survives_change_nothing() {
    for seed in 0..8 {
        let stage = Stage::new(FORMATS[seed % 3], seed % 2 == 0);
        let faults = Faults::survived(seed as u64);
        let options = stage
            .options()
            .verify(Verify::ReadBack)
            .reading(faulty(faults));
        stage.run(&options, &Control::new()).unwrap();
        stage.check_done();
    }
}

/// Reads one of the files that are being converted to with a bit flipped in its middle, as from a device that does
/// not give back what was written.
#[derive(Debug)]
struct Flipping {
    inner: Box<dyn Backend>,
    directory: tempfile::TempDir,
    /// The file, and what is read in its place.
    flipped: Mutex<Option<(PathBuf, Arc<SourceFile>)>>,
}

impl Flipping {
    fn reading() -> Reading {
        let flipping = Self {
            inner: backend(BackendKind::Sync).unwrap(),
            directory: tempfile::tempdir().unwrap(),
            flipped: Mutex::default(),
        };
        Reading::new(Arc::new(flipping), 2, transfer())
    }

    fn flip(&self, path: &Path) -> (PathBuf, Arc<SourceFile>) {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        let copy = self.directory.path().join("flipped");
        fs::write(&copy, bytes).unwrap();
        (path.to_owned(), Arc::new(SourceFile::open(copy).unwrap()))
    }
}

impl Backend for Flipping {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> tensora_io::Result<ReadStats> {
        let is_staged = |path: &Path| path.to_string_lossy().contains(".tensora-convert");
        let mut flipped = self.flipped.lock().unwrap();
        let mut paths = requests.iter().map(|request| request.file.path());
        if flipped.is_none()
            && let Some(path) = paths.find(|path| is_staged(path))
        {
            *flipped = Some(self.flip(path));
        }
        let flipped_now = flipped.clone();
        drop(flipped);
        let requests = requests.into_iter().map(|request| match &flipped_now {
            Some((path, file)) if request.file.path() == path => ReadRequest {
                file,
                offset: request.offset,
                destination: request.destination,
            },
            _ => request,
        });
        self.inner.read(requests.collect(), params, control)
    }
}

#[test]
fn what_is_not_read_back_as_it_was_written_is_not_put_in_place() {
    for format in FORMATS {
        for holds_old in [false, true] {
            let stage = Stage::new(format, holds_old);
            let options = stage.options().reading(Flipping::reading());
            let verified = options.clone().verify(Verify::ReadBack);
            let error = stage.run(&verified, &Control::new()).unwrap_err();
            let Error::NotAsRead { path, differences } = &error else {
                panic!("{format}: {error}");
            };
            assert_eq!(*path, stage.target);
            let [difference] = &differences[..] else {
                panic!("{differences:?}");
            };
            assert!(
                difference.contains("layers.") && difference.contains("its bytes differ"),
                "{difference}"
            );
            assert!(error.to_string().contains("storage"), "{error}");
            assert_eq!(stage.check_stopped(), 0, "nothing of it is worth keeping");
            if holds_old {
                let old = common::read(&stage.target);
                assert!(old.tensors == tensors(&records(100)));
            }
            // Who does not ask is not told.
            stage.run(&options, &Control::new()).unwrap();
            stage.check_done();
        }
    }
}

#[test]
fn cancelled_while_it_is_read_back_it_keeps_every_file() {
    for format in FORMATS {
        for holds_old in [false, true] {
            let stage = Stage::new(format, holds_old);
            let options = stage.options().verify(Verify::ReadBack);
            let index = CheckpointIndex::open(&stage.source).unwrap();
            let plan = options.plan(&index, &stage.target).unwrap();
            let (token, seen) = (CancelToken::new(), AtomicU64::new(0));
            let (cancel, data_bytes) = (token.clone(), plan.data_bytes());
            let control = Control::new()
                .with_cancel(token)
                .with_progress(move |bytes| {
                    if seen.fetch_add(bytes, Ordering::SeqCst) + bytes > data_bytes {
                        cancel.cancel();
                    }
                });
            let error = plan.run(&control).unwrap_err();
            assert!(error.is_cancelled(), "{error}");
            let files = plan.files();
            let data = files.iter().filter(|file| file.kind == OutputKind::Data);
            let kept = stage.check_stopped();
            assert_eq!(kept, data.count(), "{format}");
            let resumed = options.unfinished(Unfinished::Resume);
            let report = stage.run(&resumed, &Control::new()).unwrap();
            assert_eq!(report.resumed_files, kept);
            let digest = report.content_digest.unwrap().to_string();
            assert_eq!(digest, common::digest(&stage.expected));
            stage.check_done();
        }
    }
}

#[test]
fn a_source_that_changes_is_not_converted() {
    type Change = fn(&Path);
    let shrink: Change = |path| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    };
    let cut: Change = |path| {
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(1000)
            .unwrap();
    };
    let grow: Change = |path| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() + 1).unwrap();
    };
    let replace: Change = |path| {
        let other = path.with_extension("other");
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&other, bytes).unwrap();
        fs::rename(other, path).unwrap();
    };
    let rewrite: Change = |path| {
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let remove: Change = |path| fs::remove_file(path).unwrap();

    let name = "model-00002-of-00002.safetensors";
    let calls = calls(Format::Safetensors);
    for (how, change) in [
        ("shrink", shrink),
        ("cut", cut),
        ("grow", grow),
        ("replace", replace),
        ("rewrite", rewrite),
        ("remove", remove),
    ] {
        for holds_old in [false, true] {
            for number in [1, calls / 2, calls] {
                let mut stage = Stage::new(Format::Safetensors, holds_old);
                let path = stage.source.join(name);
                let control = at_call(number, move || change(&path));
                let error = stage.run(&stage.options(), &control).unwrap_err();
                let text = error.to_string();
                assert!(
                    matches!(error, Error::SourceChanged { .. } | Error::Read(_)),
                    "{how}: {text}"
                );
                assert!(text.contains(name), "{how}: {text}");
                // Nothing of a source that is gone is worth keeping; after a read error that is not known.
                if let Error::SourceChanged { .. } = error {
                    assert!(!stage.staging().exists(), "{how}");
                }
                match &stage.old_files {
                    Some(old) => assert!(stage.visible() == *old, "{how}"),
                    None => assert!(stage.visible().is_empty(), "{how}"),
                }
                // With the source as it was, it can be had.
                let original = std::mem::take(&mut stage.source_files);
                fs::write(stage.source.join(name), &original[Path::new(name)]).unwrap();
                stage.source_files = original;
                let again = stage.options().unfinished(Unfinished::Discard);
                stage.run(&again, &Control::new()).unwrap();
                stage.check_done();
            }
        }
    }
}

#[test]
fn a_target_that_is_removed_underneath_is_an_error() {
    let calls = calls(Format::ServerlessLlmPartitioned);
    for holds_old in [false, true] {
        for number in [1, calls / 2, calls] {
            let stage = Stage::new(Format::ServerlessLlmPartitioned, holds_old);
            let target = stage.target.clone();
            // What is created meanwhile may stand in the way of a removal once.
            let control = at_call(
                number,
                move || while fs::remove_dir_all(&target).is_err() {},
            );
            let error = stage.run(&stage.options(), &control).unwrap_err();
            assert!(error.to_string().contains("target"), "{error}");
            assert!(CheckpointIndex::open(&stage.target).is_err());
            assert!(common::snapshot(&stage.source) == stage.source_files);
            let _ = fs::remove_dir_all(&stage.target);
            let again = Stage::options(&stage);
            stage.run(&again, &Control::new()).unwrap();
            stage.check_done();
        }
        // Only what is being written.
        let stage = Stage::new(Format::ServerlessLlmPartitioned, holds_old);
        let staging = stage.staging();
        let control = at_call(
            calls / 2,
            move || while fs::remove_dir_all(&staging).is_err() {},
        );
        let error = stage.run(&stage.options(), &control).unwrap_err();
        assert!(error.to_string().contains(".tensora-convert"), "{error}");
        let again = stage.options().unfinished(Unfinished::Discard);
        stage.run(&again, &Control::new()).unwrap();
        stage.check_done();
    }
}

/// Lets nothing be created or removed in a directory any more, or lets it again; says whether that worked.
#[cfg(target_os = "linux")]
fn freeze(directory: &Path, frozen: bool) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let mode = if frozen { 0o555 } else { 0o755 };
    let set_mode = || fs::set_permissions(directory, fs::Permissions::from_mode(mode));
    // Permissions do not bind root; the attribute does, and forbids to change them, too.
    let attribute = if frozen { "+i" } else { "-i" };
    let mut chattr = std::process::Command::new("chattr");
    chattr.arg(attribute).arg(directory);
    if frozen {
        set_mode().unwrap();
    }
    // Where it cannot be set, what can be created tells.
    let _ = chattr.output();
    if !frozen {
        set_mode().unwrap();
    }
    let probe = directory.join("probe");
    let can_create = fs::write(&probe, "").is_ok();
    let _ = fs::remove_file(probe);
    can_create != frozen
}

#[cfg(target_os = "linux")]
#[test]
fn a_target_that_becomes_read_only_is_an_error() {
    let probe = tempfile::tempdir().unwrap();
    let can_freeze = freeze(probe.path(), true);
    freeze(probe.path(), false);
    if !can_freeze {
        common::skip("nothing here makes a directory read-only for this user");
        return;
    }
    let calls = calls(Format::ServerlessLlmPartitioned);
    for holds_old in [false, true] {
        for (what, number) in [
            ("staging", 1),
            ("staging", calls),
            ("target", 1),
            ("target", calls),
        ] {
            let stage = Stage::new(Format::ServerlessLlmPartitioned, holds_old);
            let directory = match what {
                "staging" => stage.staging(),
                _ => stage.target.clone(),
            };
            let frozen = directory.clone();
            let control = at_call(number, move || assert!(freeze(&frozen, true)));
            let error = stage.run(&stage.options(), &control).unwrap_err();
            freeze(&directory, false);
            assert!(error.to_string().contains("target"), "{error}");
            assert!(
                matches!(error, Error::Target { .. } | Error::Write(_)),
                "{what} {number}: {error:?}"
            );
            match &stage.old_files {
                Some(old) => assert!(stage.visible() == *old, "{what} {number}"),
                None => assert!(stage.visible().is_empty(), "{:?}", stage.visible().keys()),
            }
            stage.finish();
        }
    }
}

#[test]
fn two_conversions_do_not_write_to_one_target() {
    for holds_old in [false, true] {
        let stage = Stage::new(Format::ServerlessLlmStore, holds_old);
        let (begun, has_begun) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let may_go_on = std::sync::Mutex::new(may_go_on);
        thread::scope(|scope| {
            let first = scope.spawn(|| {
                let control = at_call(3, move || {
                    begun.send(()).unwrap();
                    may_go_on.lock().unwrap().recv().unwrap();
                });
                stage.run(&stage.options(), &control)
            });
            has_begun.recv().unwrap();
            let others = [Unfinished::Refuse, Unfinished::Resume, Unfinished::Discard];
            let others = others.map(|unfinished| {
                let options = stage.options().unfinished(unfinished);
                (unfinished, stage.run(&options, &Control::new()))
            });
            // Before anything is asserted: a panic here would wait for the other thread.
            go_on.send(()).unwrap();
            first.join().unwrap().unwrap();
            for (unfinished, result) in others {
                let error = result.unwrap_err();
                let is_refused = matches!(error, Error::TargetBusy { .. });
                assert!(is_refused, "{unfinished:?}: {error}");
            }
        });
        stage.check_done();
    }
}

#[test]
fn of_conversions_that_start_together_one_wins() {
    for round in 0..24 {
        let stage = Stage::new(FORMATS[round % 3], false);
        let start = Barrier::new(3);
        let results: Vec<Result<ConversionReport>> = thread::scope(|scope| {
            let runs: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        stage.run(&stage.options(), &Control::new())
                    })
                })
                .collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        let won = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(won, 1, "{results:?}");
        stage.check_done();
    }
}

/// Runs a test of this program once more with `TMPFS` naming a file system of its own, of so many bytes. Says
/// whether that can be done here at all.
#[cfg(target_os = "linux")]
fn in_small_file_system(test: &str, bytes: u64) -> bool {
    use std::process::Command;
    let directory = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=$1 tmpfs \"$2\" && shift 2 && exec \"$@\"";
    let in_namespace = |command: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .arg(bytes.to_string())
            .arg(directory.path())
            .args(command)
            .env("TMPFS", directory.path());
        unshare.output()
    };
    match in_namespace(&["true"]) {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr);
            common::skip(&format!(
                "{test}: no file system of its own: {}",
                reason.trim()
            ));
            return false;
        }
        Err(error) => {
            common::skip(&format!("{test}: unshare: {error}"));
            return false;
        }
    }
    let program = std::env::current_exe().unwrap();
    let output =
        in_namespace(&[program.to_str().unwrap(), test, "--exact", "--nocapture"]).unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

/// Takes all that is free in a file system but for some bytes.
#[cfg(target_os = "linux")]
fn fill(path: &Path, leave_bytes: usize) {
    use std::io::Write;
    let mut file = fs::File::create(path).unwrap();
    let mut bytes = 0;
    while let Ok(written) = file.write(&[0; 4096]) {
        bytes += written;
    }
    file.set_len(bytes.saturating_sub(leave_bytes) as u64)
        .unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_that_can_be_resumed_from() {
    const BYTES: u64 = 12 << 20;
    let Some(file_system) = std::env::var_os("TMPFS").map(PathBuf::from) else {
        in_small_file_system("a_full_disk_is_an_error_that_can_be_resumed_from", BYTES);
        return;
    };
    for format in FORMATS {
        let calls = calls(format);
        for holds_old in [false, true] {
            for (number, leave_bytes) in [
                (1, 0),
                (1, 300_000),
                (calls / 2, 0),
                (calls / 2, 100_000),
                (calls, 0),
            ] {
                let target = file_system.join("target");
                let source = tempfile::tempdir().unwrap();
                let stage = Stage::with_target(source, target.clone(), format, holds_old);
                let ballast = file_system.join("ballast");
                let in_callback = ballast.clone();
                let control = at_call(number, move || fill(&in_callback, leave_bytes));
                match stage.run(&stage.options(), &control) {
                    // Space for all files had been taken by then.
                    Ok(_) => {
                        assert!(number > 1, "{format}: a full disk went unnoticed");
                        fs::remove_file(&ballast).unwrap();
                        stage.check_done();
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
                        for part in ["no space left", "free", "--resume", "target"] {
                            assert!(text.contains(part), "{text}");
                        }
                        fs::remove_file(&ballast).unwrap();
                        let kept = stage.check_stopped();
                        assert_eq!(stage.finish().resumed_files, kept);
                    }
                }
                fs::remove_dir_all(&target).unwrap();
            }
        }
        // Known before anything is written.
        let source = tempfile::tempdir().unwrap();
        let stage = Stage::with_target(source, file_system.join("target"), format, false);
        let ballast = file_system.join("ballast");
        fill(&ballast, 1_000_000);
        let error = stage.run(&stage.options(), &Control::new()).unwrap_err();
        assert!(matches!(error, Error::NotEnoughSpace { .. }), "{error}");
        assert!(!stage.target.exists());
        fs::remove_file(&ballast).unwrap();
    }
}
