//! Carrying out a plan: windows of the target's files come assembled, are hashed, and are written.

use std::io::{self, Read, Write};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tensora_formats::{OpenOptions, UnfinishedCheckpoint};
use tensora_io::{
    CancelToken, Control, DirectFallback, DirectPolicy, SourceFile, TargetFile, WriteStats,
};

use crate::assemble::{Assembled, Assembly, AssemblyStream, Record, RecordContent};
use crate::companions::Companion;
use crate::identity;
use crate::journal::Finished;
use crate::outputs::Output;
use crate::plan::stored_in_order;
use crate::staging::Staging;
use crate::target::{check_occupancy, free_bytes, refused};
use crate::verify::{TensorHashers, differences};
use crate::{
    Checksums, ContentDigests, ConversionNote, ConversionPlan, ConversionReport, Digest, Error,
    Overwrite, Reading, Result, SIDECAR_NAME, Verify, VerifyOptions, sidecar,
};

/// How much of a companion is in memory at once.
const COPY_BYTES: usize = 1 << 20;
/// Threads that write. Direct writes wait for the device; with more than one, it always has work.
const WRITERS: usize = 3;

pub(crate) fn run(plan: &ConversionPlan, control: &Control) -> Result<ConversionReport> {
    let start = Instant::now();
    control.check().map_err(Error::reading)?;
    let sources = plan
        .source
        .files()
        .iter()
        .map(|file| identity::open(file).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    let staging = Staging::open(&plan.target, &plan.fingerprint, plan.unfinished)?;
    if !staging.is_committing() {
        check_occupancy(&plan.target, &plan.source, &plan.kind, plan.overwrite)?;
    }

    let is_resumed_commit = staging.is_committing();
    match write_all(plan, &staging, &sources, control) {
        Ok((mut data, digests, mut report)) => {
            let mut indexes: Vec<String> =
                plan.indexes.iter().map(|file| file.name.clone()).collect();
            report.files = data.len() + indexes.len();
            // Without an index, the one shard is what makes a checkpoint of the directory.
            if indexes.is_empty() {
                indexes.extend(data.pop());
            }
            // Again, because a long time may have passed.
            let overwrite = match is_resumed_commit {
                true => Overwrite::Replace,
                false => plan.overwrite,
            };
            let replaced = check_occupancy(&plan.target, &plan.source, &plan.kind, overwrite)?;
            let placed = staging.place(&data, &indexes, &replaced)?;
            // Some files had their names already, so that they could not be read where they were staged. Nobody
            // takes them for a checkpoint yet.
            if is_resumed_commit && let (Verify::ReadBack, Some(digests)) = (plan.verify, &digests)
            {
                let differences = read_back(plan, &plan.target, digests, control)?;
                if !differences.is_empty() {
                    return Err(Error::PlacedNotAsRead {
                        path: plan.target.clone(),
                        differences,
                    });
                }
            }
            staging.complete(&placed)?;
            report.elapsed = start.elapsed();
            Ok(report)
        }
        Err(error) => {
            let error = blame(plan, &sources, error);
            // Of a source that is gone, or on storage that loses bytes.
            if matches!(error, Error::SourceChanged { .. } | Error::NotAsRead { .. }) {
                staging.discard();
            }
            Err(error)
        }
    }
}

/// A read that fails because somebody changed the file is that.
fn blame(plan: &ConversionPlan, sources: &[Arc<SourceFile>], error: Error) -> Error {
    if !matches!(error, Error::Read(_)) {
        return error;
    }
    let mut files = sources.iter().zip(plan.source.files());
    let changed = files.find_map(|(source, file)| {
        let checked = identity::check(file, source);
        checked
            .err()
            .filter(|error| matches!(error, Error::SourceChanged { .. }))
    });
    changed.unwrap_or(error)
}

/// Writes everything where it is staged. Returns the names of all files but the indexes, the shards last, the
/// digests of what was read, where somebody wants them, and what there is to report.
fn write_all(
    plan: &ConversionPlan,
    staging: &Staging,
    sources: &[Arc<SourceFile>],
    control: &Control,
) -> Result<(Vec<String>, Option<ContentDigests>, ConversionReport)> {
    let mut job = Job {
        plan,
        staging,
        control,
        hashers: match (plan.checksums, plan.verify) {
            (Checksums::Omit, Verify::Skip) => None,
            _ => Some(TensorHashers::new(&plan.source)?),
        },
        notes: plan.notes.clone(),
    };
    let mut missing = Vec::new();
    let mut resumed_bytes = 0;
    for output in &plan.outputs {
        match job.keeps(output)? {
            true => resumed_bytes += output.assembly.bytes,
            false => missing.push(output),
        }
    }
    let direct_bytes = job.write(&missing, sources)?;
    for companion in &plan.companions {
        job.copy(companion)?;
    }
    let digests = job.digests()?;
    // What a reader wants beside the data is there before the data is.
    let mut names: Vec<String> = plan
        .companions
        .iter()
        .map(|file| file.name.clone())
        .collect();
    if let (Checksums::Write, Some(digests)) = (plan.checksums, &digests) {
        job.write_small(SIDECAR_NAME, &sidecar::sidecar(digests))?;
        names.push(SIDECAR_NAME.to_owned());
    }
    names.extend(plan.outputs.iter().map(|file| file.name.clone()));
    for index in &plan.indexes {
        job.write_small(&index.name, &index.contents)?;
    }
    if !staging.is_committing()
        && let (Verify::ReadBack, Some(digests)) = (plan.verify, &digests)
    {
        let differences = read_back(plan, staging.directory(), digests, control)?;
        if !differences.is_empty() {
            return Err(Error::NotAsRead {
                path: plan.target.clone(),
                differences,
            });
        }
    }
    for (source, file) in sources.iter().zip(plan.source.files()) {
        identity::check(file, source)?;
    }
    control.check().map_err(Error::reading)?;

    let report = ConversionReport {
        files: 0,
        tensors: plan.tensors(),
        data_bytes: plan.data_bytes(),
        target_bytes: plan.target_bytes(),
        buffer_bytes: plan.buffers.total_bytes(),
        resumed_files: plan.outputs.len() - missing.len(),
        resumed_bytes,
        direct_bytes,
        content_digest: digests.as_ref().map(ContentDigests::content),
        elapsed: Duration::ZERO,
        notes: job.notes,
    };
    Ok((names, digests, report))
}

/// One run of a plan.
struct Job<'a> {
    plan: &'a ConversionPlan,
    staging: &'a Staging,
    control: &'a Control,
    /// Digests of tensors as they were read from the source, where somebody wants them.
    hashers: Option<TensorHashers<'a>>,
    notes: Vec<ConversionNote>,
}

impl Job<'_> {
    /// Whether an interrupted conversion finished this file, and it is still what it was then.
    fn keeps(&mut self, output: &Output) -> Result<bool> {
        let Some((path, finished)) = self.staging.finished(&output.name) else {
            return Ok(false);
        };
        let bytes = output.assembly.bytes;
        let is_the_same = finished.bytes == bytes
            && is_whole(&path, bytes)?
            && match self.digest(output, &path) {
                Ok(digest) => digest == finished.digest,
                Err(error) if is_lost(&error) => false,
                // It may well be what it was. Whoever has the descriptors, the memory or the permission that this
                // takes can still keep it.
                Err(error) => return Err(error),
            };
        if is_the_same {
            self.control
                .advance(record_bytes(&output.assembly, 0..bytes));
            return Ok(true);
        }
        if let Some(hashers) = &mut self.hashers {
            for &tensor in output.tensors.iter().flatten() {
                hashers.restart(tensor)?;
            }
        }
        self.staging.forget(&output.name)?;
        self.notes.push(ConversionNote::WrittenAgain {
            file: output.name.clone(),
        });
        Ok(false)
    }

    /// The digest of a file of the target that is there already. Its tensors are hashed as if they were
    /// read from the source, which they were when the file was written.
    fn digest(&mut self, output: &Output, path: &Path) -> Result<Digest> {
        let bytes = output.assembly.bytes;
        let assembly = Assembly {
            bytes,
            prefix: Vec::new(),
            records: vec![Record {
                at: 0,
                content: RecordContent::Stored {
                    file: 0,
                    range: 0..bytes,
                },
            }],
        };
        let source = SourceFile::open(path).map_err(Error::reading)?;
        let stream = AssemblyStream::new(
            Arc::new(vec![assembly]),
            vec![Arc::new(source)],
            &self.plan.reading,
            self.plan.buffers,
            self.control,
        )?;
        let mut hasher = blake3::Hasher::new();
        for window in stream {
            let window = window?;
            self.hash(output, &mut hasher, &window);
        }
        Ok(Digest::from_bytes(hasher.finalize().into()))
    }

    fn hash(&mut self, output: &Output, hasher: &mut blake3::Hasher, window: &Assembled) {
        hasher.update_rayon(&window.bytes);
        let Some(hashers) = &mut self.hashers else {
            return;
        };
        for (number, record) in output.assembly.records_in(&window.range) {
            let bytes = window.bytes_of(record);
            for &tensor in &output.tensors[number] {
                if stored_in_order(&self.plan.source, self.plan.kind.format, tensor, record) {
                    hashers.update(tensor, record.overlap(&window.range).start, bytes);
                }
            }
        }
    }

    /// Writes files that are not finished. Returns how many bytes went past the page cache.
    fn write(&mut self, outputs: &[&Output], sources: &[Arc<SourceFile>]) -> Result<u64> {
        let stop = self.control.token().child();
        let stopping = self.control.clone().with_cancel(stop.clone());
        let assemblies: Vec<Assembly> = outputs
            .iter()
            .map(|output| output.assembly.clone())
            .collect();
        let mut stream = AssemblyStream::new(
            Arc::new(assemblies),
            sources.to_vec(),
            &self.plan.reading,
            self.plan.buffers,
            &stopping,
        )?;
        let writing = Writing {
            staging: self.staging,
            stop,
            control: Control::new().with_cancel(stopping.token().clone()),
            left_bytes: AtomicU64::new(outputs.iter().map(|output| output.assembly.bytes).sum()),
            outcome: Mutex::new(Outcome::default()),
        };
        let (sender, receiver) = mpsc::channel();
        let receiver = Mutex::new(receiver);
        let read = thread::scope(|scope| {
            // Owned in here: the writers end when it is dropped, also by a panic.
            let sender = sender;
            let mut writers = Vec::new();
            for number in 0..WRITERS {
                let writer = thread::Builder::new()
                    .name(format!("tensora-write-{number}"))
                    .spawn_scoped(scope, || writing.run(&receiver));
                match writer {
                    Ok(writer) => writers.push(writer),
                    // Those that run take its share.
                    Err(_) if number > 0 => break,
                    Err(source) => return Err(Error::Thread { source }),
                }
            }
            let mut current: Option<(Arc<Writable>, blake3::Hasher)> = None;
            let read = loop {
                let window = match stream.next() {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(error),
                    Some(Ok(window)) => window,
                };
                let output = outputs[window.file];
                let (file, mut hasher) = match current.take() {
                    Some(current) => current,
                    None => match writing.create(output) {
                        Ok(file) => (Arc::new(file), blake3::Hasher::new()),
                        Err(error) => break Err(error),
                    },
                };
                self.hash(output, &mut hasher, &window);
                self.control
                    .advance(record_bytes(&output.assembly, window.range.clone()));
                let piece = if window.ends_file {
                    let _ = file
                        .digest
                        .set(Digest::from_bytes(hasher.finalize().into()));
                    Piece::new(window, file)
                } else {
                    let piece = Piece::new(window, Arc::clone(&file));
                    current = Some((file, hasher));
                    piece
                };
                if sender.send(piece).is_err() {
                    break Ok(());
                }
            };
            drop(current);
            drop(sender);
            for writer in writers {
                writer.join().unwrap_or_else(|panic| resume_unwind(panic));
            }
            read
        });
        self.notes
            .extend(stream.stats().fallbacks.into_iter().map(read_buffered));
        drop(stream);
        let outcome = writing
            .outcome
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = outcome.error {
            return Err(error);
        }
        read?;
        // Who cancels after the last read makes the writers drop what they have, and nobody else notice.
        self.control.check().map_err(Error::reading)?;
        self.notes
            .extend(outcome.fallbacks.into_iter().map(written_buffered));
        Ok(outcome.direct_bytes)
    }

    /// The digests of all tensors, those that the target stores with strides read once more.
    fn digests(&mut self) -> Result<Option<ContentDigests>> {
        let Some(mut hashers) = self.hashers.take() else {
            return Ok(None);
        };
        let strided = &self.plan.read_for_digests;
        let quiet = Control::new().with_cancel(self.control.token().clone());
        hashers.read(&self.verify_options(), strided, &quiet)?;
        hashers.finish().map(Some)
    }

    fn verify_options(&self) -> VerifyOptions {
        verify_options(self.plan, self.plan.reading.clone())
    }

    fn copy(&self, companion: &Companion) -> Result<()> {
        let failed = |source| Error::Companion {
            path: companion.path.clone(),
            source,
        };
        // A pipe may have taken its place since, and would block whoever opens it.
        let source = SourceFile::open(&companion.path).map_err(|error| {
            failed(match error {
                tensora_io::Error::File { source, .. } => source,
                tensora_io::Error::NotARegularFile { found, .. } => {
                    io::Error::other(format!("it is a {found} now, and no regular file any more"))
                }
                other => io::Error::other(other),
            })
        })?;
        let mut source = source.file();
        let (mut file, path) = self.staging.create(&companion.name)?;
        let mut left_bytes = companion.bytes;
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            self.control.check().map_err(Error::reading)?;
            let count = match source.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(failed)?,
            };
            if count as u64 > left_bytes || (count == 0 && left_bytes > 0) {
                let changed = "its length has changed since the conversion was planned";
                return Err(failed(io::Error::other(changed)));
            }
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count])
                .map_err(|error| written(&path, left_bytes, error))?;
            left_bytes -= count as u64;
        }
        file.sync_all().map_err(|error| written(&path, 0, error))
    }

    fn write_small(&self, name: &str, contents: &[u8]) -> Result<()> {
        let (mut file, path) = self.staging.create(name)?;
        file.write_all(contents)
            .and_then(|()| file.sync_all())
            .map_err(|error| written(&path, contents.len() as u64, error))
    }
}

fn verify_options(plan: &ConversionPlan, reading: Reading) -> VerifyOptions {
    VerifyOptions::new()
        .memory_limit_bytes(plan.memory_limit_bytes)
        .reading(reading)
}

/// Whether a regular file of this length is at a path.
fn is_whole(path: &Path, bytes: u64) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_file() && found.len() == bytes),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(refused(path, "access")(error)),
    }
}

/// Whether reading a file failed because of what is in it, so that trying again is of no use.
fn is_lost(error: &Error) -> bool {
    match error {
        // It has become shorter, or something else, since it was looked at.
        Error::Read(
            tensora_io::Error::UnexpectedEof { .. } | tensora_io::Error::NotARegularFile { .. },
        ) => true,
        Error::Read(
            tensora_io::Error::File { source, .. } | tensora_io::Error::Read { source, .. },
        ) => source.kind() == io::ErrorKind::NotFound || is_of_the_device(source),
        _ => false,
    }
}

/// Whether the device has lost what was to be read.
#[cfg(unix)]
fn is_of_the_device(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errors = [
        Errno::IO,
        // What Linux says of direct reads: a block cannot be read, or its checksum is wrong.
        #[cfg(target_os = "linux")]
        Errno::NODATA,
        #[cfg(target_os = "linux")]
        Errno::ILSEQ,
    ];
    errors
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(not(unix))]
fn is_of_the_device(_error: &io::Error) -> bool {
    false
}

/// Opens what was written as a checkpoint and compares its tensors with those of the source. Returns how they
/// differ, as sentences.
fn read_back(
    plan: &ConversionPlan,
    directory: &Path,
    expected: &ContentDigests,
    control: &Control,
) -> Result<Vec<String>> {
    let opened = OpenOptions::new()
        .format(plan.kind.format)
        .unfinished(UnfinishedCheckpoint::Open)
        .open(directory);
    let found = match opened {
        Ok(found) => found,
        Err(error @ tensora_formats::Error::Io { .. }) => return Err(Error::Layout(error)),
        // Headers and indexes are written as well, and are a checkpoint when they are as they were written.
        Err(error) => return Ok(vec![error.to_string()]),
    };
    for file in found.files() {
        // The device is asked, not the page cache, where the system lets us.
        let _ = SourceFile::open(&file.path).and_then(|file| file.evict());
    }
    let found =
        verify_options(plan, plan.reading.past_the_page_cache()).digests(&found, control)?;
    let differences = differences(expected, &found);
    Ok(differences.iter().map(ToString::to_string).collect())
}

fn record_bytes(assembly: &Assembly, range: std::ops::Range<u64>) -> u64 {
    let overlaps = assembly
        .records_in(&range)
        .map(|(_, record)| record.overlap(&range));
    overlaps.map(|overlap| overlap.end - overlap.start).sum()
}

fn read_buffered(fallback: DirectFallback) -> ConversionNote {
    ConversionNote::ReadBuffered {
        path: fallback.path,
        reason: fallback.reason,
    }
}

fn written_buffered(fallback: DirectFallback) -> ConversionNote {
    ConversionNote::WrittenBuffered {
        path: fallback.path,
        reason: fallback.reason,
    }
}

/// A file that is being written. Whoever has its last piece finishes it.
struct Writable {
    name: String,
    target: TargetFile,
    /// Known before the last piece is sent.
    digest: OnceLock<Digest>,
}

/// A window on its way to a writer.
struct Piece {
    file: Arc<Writable>,
    offset: u64,
    bytes: Bytes,
}

impl Piece {
    fn new(window: Assembled, file: Arc<Writable>) -> Self {
        Self {
            file,
            offset: window.range.start,
            bytes: window.bytes,
        }
    }
}

struct StopOnPanic<'a>(&'a CancelToken);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cancel();
        }
    }
}

/// What the writers share.
struct Writing<'a> {
    staging: &'a Staging,
    /// Stops the readers when writing has failed.
    stop: CancelToken,
    control: Control,
    left_bytes: AtomicU64,
    outcome: Mutex<Outcome>,
}

#[derive(Default)]
struct Outcome {
    /// The first.
    error: Option<Error>,
    fallbacks: Vec<DirectFallback>,
    direct_bytes: u64,
}

impl Writing<'_> {
    fn create(&self, output: &Output) -> Result<Writable> {
        let path = self.staging.path(&output.name)?;
        let target = TargetFile::create(&path, output.assembly.bytes, DirectPolicy::Preferred)
            .map_err(|error| self.failed(&path, error))?;
        Ok(Writable {
            name: output.name.clone(),
            target,
            digest: OnceLock::new(),
        })
    }

    /// Writes pieces as they come, until there are no more.
    fn run(&self, pieces: &Mutex<Receiver<Piece>>) {
        // Nobody would write what still comes, and the readers would wait for its buffers.
        let _guard = StopOnPanic(&self.stop);
        loop {
            let piece = pieces.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(piece) = piece else { return };
            // After a failure what still comes is dropped, so that its buffers are free.
            if !self.stop.is_cancelled() {
                self.write(piece);
            }
        }
    }

    fn fail(&self, error: Error) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        // What the user stopped, or what another writer's failure stopped, is no failure.
        if !error.is_cancelled() {
            outcome.error.get_or_insert(error);
        }
        self.stop.cancel();
    }

    fn write(&self, piece: Piece) {
        let Piece {
            file,
            offset,
            bytes,
        } = piece;
        let written = file.target.write_all_at(&bytes, offset, &self.control);
        self.left_bytes
            .fetch_sub(bytes.len() as u64, Ordering::Relaxed);
        if let Err(error) = written {
            // While the file is held, so that nobody takes it for complete meanwhile.
            self.fail(self.failed(file.target.path(), error));
            return;
        }
        drop(bytes);
        if let Some(file) = Arc::into_inner(file)
            // A piece may be among those that were dropped.
            && !self.stop.is_cancelled()
            && let Err(error) = self.finish(file)
        {
            self.fail(error);
        }
    }

    fn finish(&self, file: Writable) -> Result<()> {
        let Some(&digest) = file.digest.get() else {
            return Ok(());
        };
        let path = file.target.path().to_owned();
        let WriteStats {
            bytes,
            direct_bytes,
            fallback,
            ..
        } = file
            .target
            .finish()
            .map_err(|error| self.failed(&path, error))?;
        self.staging
            .finish(&file.name, Finished { bytes, digest })?;
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.direct_bytes += direct_bytes;
        outcome.fallbacks.extend(fallback);
        Ok(())
    }

    /// Why a file could not be written, and how much was left to write.
    fn failed(&self, path: &Path, error: tensora_io::Error) -> Error {
        if error.is_cancelled() {
            return Error::Cancelled;
        }
        let kind = error.io_error().map(io::Error::kind);
        match (kind, error.io_error().and_then(io::Error::raw_os_error)) {
            (Some(kind), Some(code)) if is_about_space(kind) => written(
                path,
                self.left_bytes.load(Ordering::Relaxed),
                io::Error::from_raw_os_error(code),
            ),
            _ => Error::Write(error),
        }
    }
}

fn is_about_space(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

fn written(path: &Path, needed_bytes: u64, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull {
            path: path.to_owned(),
            needed_bytes,
            free_bytes: path
                .parent()
                .and_then(|directory| free_bytes(directory).ok().flatten()),
            source,
        },
        io::ErrorKind::FileTooLarge => Error::FileTooLarge {
            path: path.to_owned(),
            limit_bytes: TargetFile::limit_bytes(),
            source,
        },
        _ => refused(path, "write")(source),
    }
}
