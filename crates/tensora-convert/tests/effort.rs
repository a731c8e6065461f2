//! What a conversion takes: how often bytes are read, which way they are written, how many files are open, and
//! whether what it reports on the way adds up.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{FORMATS, Record};
use tensora_convert::{
    Checksums, ConversionNote, ConvertOptions, OutputKind, Reading, SharedTensors, Unfinished,
    Verify, VerifyOptions,
};
use tensora_formats::{CheckpointIndex, Dtype, Format};
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, ReadRequest, ReadStats,
    ResidentPolicy, TargetFile, TransferParams, backend,
};

/// Counts the bytes that are read of each file. Every other read takes long, so that readers overtake each other.
#[derive(Debug)]
struct Counting {
    inner: Box<dyn Backend>,
    reads: AtomicU64,
    bytes: Mutex<BTreeMap<PathBuf, u64>>,
}

impl Counting {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: backend(BackendKind::Sync).unwrap(),
            reads: AtomicU64::new(0),
            bytes: Mutex::default(),
        })
    }

    /// How many bytes were read of the files in a directory, since this was last asked.
    fn take_bytes(&self, directory: &Path) -> u64 {
        let bytes = std::mem::take(&mut *self.bytes.lock().unwrap());
        let of_directory = bytes.iter().filter(|(path, _)| path.starts_with(directory));
        of_directory.map(|(_, bytes)| bytes).sum()
    }
}

impl Backend for Counting {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> tensora_io::Result<ReadStats> {
        for request in &requests {
            let mut bytes = self.bytes.lock().unwrap();
            *bytes.entry(request.file.path().to_owned()).or_default() +=
                request.destination.len() as u64;
        }
        if self.reads.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.inner.read(requests, params, control)
    }
}

fn reading(backend: Arc<dyn Backend>, readers: u32) -> Reading {
    let transfer = TransferParams {
        chunk_bytes: 1 << 20,
        queue_depth: 1,
        workers: 1,
        direct: DirectPolicy::Never,
        resident: ResidentPolicy::Reread,
    };
    Reading::new(backend, readers, transfer)
}

/// What files are long together.
fn file_bytes(index: &CheckpointIndex) -> u64 {
    index.files().iter().map(|file| file.bytes).sum()
}

/// A matrix of this many megabytes, stored with its columns one after the other.
fn transposed(name: &str, megabytes: u64, seed: u64) -> Record {
    let shape = [512, 512 * megabytes];
    Record::strided(name, Dtype::F32, &shape, &[1, 512], 0, seed)
}

#[test]
fn transposed_tensors_that_fit_are_read_once() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    let mut records: Vec<Record> = ["a", "b", "c", "d"]
        .iter()
        .zip(1..)
        .map(|(name, seed)| transposed(name, 3, seed))
        .collect();
    records.insert(2, Record::plain("plain", Dtype::F32, &[1001, 1003], 9));
    common::write(&source, &records, Format::ServerlessLlmStore, 2);
    let index = CheckpointIndex::open(&source).unwrap();
    let stored_bytes = file_bytes(&index);
    let digest = common::digest(&common::tensors(&records));
    // Windows of a bit more than a megabyte: most tensors end in the middle of one.
    let limit_bytes = 12 << 20;
    for readers in [1, 2, 5] {
        let counting = Counting::new();
        let target = directory.path().join(format!("gathered-{readers}"));
        let options = ConvertOptions::new(Format::Safetensors)
            .memory_limit_bytes(limit_bytes)
            .reading(reading(counting.clone(), readers));
        let plan = options.plan(&index, &target).unwrap();
        plan.run(&Control::new()).unwrap();
        let read_bytes = counting.take_bytes(&source);
        assert!(
            read_bytes <= stored_bytes,
            "{read_bytes} of {stored_bytes} by {readers}"
        );
        assert_eq!(common::digest(&common::read(&target).tensors), digest);

        // As they are stored, and once more for their digests.
        let target = directory.path().join(format!("stored-{readers}"));
        let options = ConvertOptions::new(Format::ServerlessLlmPartitioned)
            .memory_limit_bytes(limit_bytes)
            .checksums(Checksums::Write)
            .reading(reading(counting.clone(), readers));
        let report = options.plan(&index, &target).unwrap();
        let report = report.run(&Control::new()).unwrap();
        let read_bytes = counting.take_bytes(&source);
        assert!(
            read_bytes <= 2 * stored_bytes,
            "{read_bytes} of {stored_bytes} by {readers}"
        );
        assert_eq!(report.content_digest.unwrap().to_string(), digest);

        let digests = VerifyOptions::new()
            .memory_limit_bytes(limit_bytes)
            .reading(reading(counting.clone(), readers))
            .digests(&index, &Control::new())
            .unwrap();
        let read_bytes = counting.take_bytes(&source);
        assert!(
            read_bytes <= stored_bytes,
            "{read_bytes} of {stored_bytes} by {readers}"
        );
        assert_eq!(digests.content().to_string(), digest);
    }
}

#[test]
fn transposed_tensors_that_do_not_fit_are_read_as_often_as_was_said() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    let records = [transposed("large", 8, 1), transposed("small", 1, 2)];
    common::write(&source, &records, Format::ServerlessLlmStore, 1);
    let index = CheckpointIndex::open(&source).unwrap();
    let large_bytes = index.tensor("large").unwrap().bytes;
    let said = |notes: &[ConversionNote]| {
        let said = notes.iter().find_map(|note| match note {
            ConversionNote::ReadRepeatedly {
                tensors,
                times,
                limit_bytes,
            } => Some((tensors.clone(), *times, *limit_bytes)),
            _ => None,
        });
        said.map(|(tensors, times, limit_bytes)| {
            assert_eq!(tensors, ["large"]);
            (times, limit_bytes)
        })
    };
    for (format, checksums) in [
        (Format::Safetensors, Checksums::Omit),
        (Format::ServerlessLlmStore, Checksums::Write),
    ] {
        let counting = Counting::new();
        let options = ConvertOptions::new(format)
            .checksums(checksums)
            .reading(reading(counting.clone(), 2));
        let run = |limit_bytes: u64| {
            let target = directory.path().join(format!("{format}-{limit_bytes}"));
            let options = options.clone().memory_limit_bytes(limit_bytes);
            let plan = options.plan(&index, &target).unwrap();
            plan.run(&Control::new()).unwrap();
            let plain_bytes = match checksums {
                Checksums::Omit => 0,
                Checksums::Write => file_bytes(&index),
            };
            let read_bytes = counting.take_bytes(&source) - plain_bytes;
            assert!(common::read(&target).tensors == common::tensors(&records));
            (said(plan.notes()), read_bytes)
        };
        let (said, read_bytes) = run(4 << 20);
        let (times, enough_bytes) = said.unwrap();
        // Twice as large as the limit: no more than 6 times for each.
        assert!((2..=13).contains(&times), "{times}");
        let most_bytes = times * large_bytes + (4 << 20);
        assert!(
            (2 * large_bytes..=most_bytes).contains(&read_bytes),
            "{read_bytes}, and not {most_bytes}"
        );
        let (said, read_bytes) = run(enough_bytes);
        assert_eq!(said, None);
        assert!(read_bytes <= file_bytes(&index), "{read_bytes}");
    }
}

/// Adds up what is reported.
fn adding_up() -> (Control, Arc<AtomicU64>) {
    let sum = Arc::new(AtomicU64::new(0));
    let in_callback = Arc::clone(&sum);
    let control = Control::new().with_progress(move |bytes| {
        in_callback.fetch_add(bytes, Ordering::Relaxed);
    });
    (control, sum)
}

#[test]
fn progress_adds_up_to_the_work_whatever_is_converted() {
    let directory = tempfile::tempdir().unwrap();
    let records = [
        Record::plain("odd", Dtype::U8, &[300_007], 1),
        Record::plain("head", Dtype::F16, &[331, 501], 2).tied("embed"),
        transposed("transposed", 1, 3),
        Record::plain("empty", Dtype::F32, &[0, 3], 4),
        Record::strided("spread", Dtype::F32, &[300, 100], &[120, 1], 8, 5),
        Record::plain("scalar", Dtype::F32, &[], 6),
    ];
    let expected = common::tensors(&records);
    for (source_format, files) in [
        (Format::ServerlessLlmStore, 2),
        (Format::ServerlessLlmPartitioned, 3),
    ] {
        let source = directory.path().join(format!("{source_format}"));
        common::write(&source, &records, source_format, files);
        let index = CheckpointIndex::open(&source).unwrap();
        for format in FORMATS {
            for (checksums, verify) in [
                (Checksums::Omit, Verify::Skip),
                (Checksums::Write, Verify::Skip),
                (Checksums::Omit, Verify::ReadBack),
                (Checksums::Write, Verify::ReadBack),
            ] {
                let what = format!("{source_format} to {format}, {checksums:?}, {verify:?}");
                let target = directory.path().join("target");
                let three = NonZero::new(3).unwrap();
                let options = ConvertOptions::new(format)
                    .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
                    .shared_tensors(SharedTensors::Duplicate)
                    .checksums(checksums)
                    .verify(verify);
                let options = match format {
                    Format::Safetensors => options.shards(three),
                    Format::ServerlessLlmStore => {
                        options.partition_bytes(NonZero::new(500_000).unwrap())
                    }
                    _ => options.partitions(three),
                };
                let plan = options.plan(&index, &target).unwrap();
                let (control, sum) = adding_up();
                plan.run(&control).unwrap();
                assert_eq!(sum.load(Ordering::Relaxed), plan.work_bytes(), "{what}");
                fs::remove_dir_all(&target).unwrap();

                // With the last data, when the files before the last one are finished or about to be.
                let (token, seen) = (CancelToken::new(), AtomicU64::new(0));
                let (cancel, all_bytes) = (token.clone(), plan.data_bytes());
                let stopped = Control::new()
                    .with_cancel(token)
                    .with_progress(move |bytes| {
                        if seen.fetch_add(bytes, Ordering::Relaxed) + bytes >= all_bytes {
                            cancel.cancel();
                        }
                    });
                assert!(plan.run(&stopped).unwrap_err().is_cancelled());
                let resumed = options.unfinished(Unfinished::Resume);
                let plan = resumed.plan(&index, &target).unwrap();
                let (control, sum) = adding_up();
                plan.run(&control).unwrap();
                assert_eq!(
                    sum.load(Ordering::Relaxed),
                    plan.work_bytes(),
                    "{what}, resumed"
                );
                assert!(common::read(&target).tensors == expected, "{what}");
                fs::remove_dir_all(&target).unwrap();
            }
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn whole_blocks_are_written_past_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let probe = directory.path().join("probe");
    let align_bytes = match TargetFile::create(&probe, 1 << 20, DirectPolicy::Required) {
        Ok(probe) => u64::from(probe.direct_align_bytes().unwrap()),
        Err(error) => return common::skip(&format!("no direct writes here: {error}")),
    };
    let source = directory.path().join("source");
    let records: Vec<Record> = (0..5)
        .map(|seed| {
            let name = format!("layers.{seed}.weight");
            Record::plain(&name, Dtype::U8, &[1_500_001 + 1000 * seed], seed)
        })
        .collect();
    common::write(&source, &records, Format::Safetensors, 2);
    let index = CheckpointIndex::open(&source).unwrap();
    for format in FORMATS {
        for limit_bytes in [ConvertOptions::MIN_MEMORY_LIMIT_BYTES, 64 << 20] {
            let target = directory.path().join(format!("{format}-{limit_bytes}"));
            let options = ConvertOptions::new(format).memory_limit_bytes(limit_bytes);
            let options = match format {
                Format::Safetensors => options.shards(NonZero::new(3).unwrap()),
                _ => options.partition_bytes(NonZero::new(3_000_000).unwrap()),
            };
            let plan = options.plan(&index, &target).unwrap();
            let report = plan.run(&Control::new()).unwrap();
            let data: Vec<u64> = plan
                .files()
                .iter()
                .filter(|file| file.kind == OutputKind::Data)
                .map(|file| file.bytes)
                .collect();
            assert!(data.len() >= 3, "{data:?}");
            let whole_blocks = data.iter().map(|bytes| bytes - bytes % align_bytes).sum();
            assert!(
                report.direct_bytes >= whole_blocks,
                "{format}, {limit_bytes}: {} of {whole_blocks}",
                report.direct_bytes
            );
            let is_fallback =
                |note: &&ConversionNote| matches!(note, ConversionNote::WrittenBuffered { .. });
            assert_eq!(report.notes.iter().find(is_fallback), None);
        }
    }
}

/// A process has a limit on open files, and a source may have hundreds: they are open once, and what is read again is
/// opened a few files at a time.
#[cfg(target_os = "linux")]
#[test]
fn few_open_files_are_enough() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const CHILD: &str = "TENSORA_TEST_FEW_OPEN_FILES";
    const SHARDS: u64 = 60;
    // What a process has open anyway, and files that are being written.
    const OTHERS: u64 = 48;

    if std::env::var_os(CHILD).is_none() {
        // The limit is of the whole process.
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "few_open_files_are_enough", "--nocapture"])
            .env(CHILD, "")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    let records: Vec<Record> = (0..SHARDS)
        .map(|seed| {
            let name = format!("layers.{seed:02}.weight");
            Record::plain(&name, Dtype::U8, &[5000], seed)
        })
        .collect();
    let shards = usize::try_from(SHARDS).unwrap();
    common::write(&source, &records, Format::Safetensors, shards);
    let index = CheckpointIndex::open(&source).unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |files| {
        let current = Some(files);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    };
    let reading = reading(Arc::from(backend(BackendKind::Sync).unwrap()), 2);
    limit(OTHERS);
    let digests = VerifyOptions::new()
        .reading(reading.clone())
        .digests(&index, &Control::new())
        .unwrap();
    limit(SHARDS + OTHERS);
    let plan = ConvertOptions::new(Format::Safetensors)
        .shards(NonZero::new(60).unwrap())
        .checksums(Checksums::Write)
        .verify(Verify::ReadBack)
        .reading(reading)
        .plan(&index, directory.path().join("target"))
        .unwrap();
    let report = plan.run(&Control::new()).unwrap();
    assert_eq!(report.content_digest, Some(digests.content()));
    assert_eq!(
        digests.content().to_string(),
        common::digest(&common::tensors(&records))
    );
}
