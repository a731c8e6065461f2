//! A backend that makes another one's reads go wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::fixture::{Random, as_usize, digest};
use crate::workers::{Crew, lock};
use crate::{
    Backend, BackendKind, Control, Destination, DirectPolicy, DirectSupport, Error, ReadRequest,
    ReadStats, ResidentPolicy, Result, SourceFile, TransferParams,
};

/// How often in a row an operation may be [`Busy`](Fault::Busy) before that is its error, or
/// [`Interrupted`](Fault::Interrupted) before it goes through.
const MAX_RETRIES: u32 = 64;
/// Operations handed to the wrapped backend together, at most.
const MAX_TOGETHER: usize = 8;
/// Events that are listed one by one.
const MAX_EVENTS: usize = 32;

/// What can go wrong with an operation: a read of at most a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// A signal interrupts it (EINTR), and it is issued again.
    Interrupted,
    /// The system refuses it for the moment (EAGAIN), and it is issued again; too often in a row, that is the
    /// error.
    Busy,
    /// It returns fewer bytes than were asked for, at least one, and the rest is asked for later. Direct reads
    /// are cut where the next one may begin.
    ShortRead,
    /// It takes longer.
    Delay,
    /// The device fails (EIO): [`Error::Read`].
    IoError,
    /// The file ends before it, or in the middle of it: [`Error::UnexpectedEof`].
    EarlyEnd,
    /// There is no memory for it (ENOMEM): [`Error::Memory`].
    OutOfMemory,
}

impl Fault {
    /// All faults, those that a batch survives first.
    pub const ALL: [Self; 7] = [
        Self::Interrupted,
        Self::Busy,
        Self::ShortRead,
        Self::Delay,
        Self::IoError,
        Self::EarlyEnd,
        Self::OutOfMemory,
    ];

    /// Whether a batch succeeds all the same.
    pub fn is_survived(self) -> bool {
        matches!(
            self,
            Self::Interrupted | Self::Busy | Self::ShortRead | Self::Delay
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Interrupted => "interrupted",
            Self::Busy => "busy",
            Self::ShortRead => "short read",
            Self::Delay => "delay",
            Self::IoError => "I/O error",
            Self::EarlyEnd => "early end",
            Self::OutOfMemory => "out of memory",
        })
    }
}

/// Which faults happen, and when.
///
/// By chance: whether one happens to an operation follows from the seed, the name of the file and the offset
/// alone, and not from the order in which threads come to it. So a range that fails keeps failing, as a bad
/// block does, and a seed shows the same again.
///
/// By plan: at a numbered operation, or at a byte of a file.
///
/// ```
/// use std::sync::Arc;
/// use tensora_io::testing::{Fault, FaultBackend, Faults};
/// use tensora_io::{BackendKind, backend};
///
/// let faults = Faults::survived(42).with_fault_at("data-3", 1 << 20, Fault::IoError);
/// let backend = FaultBackend::new(Arc::from(backend(BackendKind::Sync)?), faults);
/// # Ok::<(), tensora_io::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Faults {
    seed: u64,
    probabilities: BTreeMap<Fault, f64>,
    longest_delay: Duration,
    threads: u32,
    at_operations: BTreeMap<u64, Fault>,
    at_bytes: Vec<(PathBuf, u64, Fault)>,
}

impl Faults {
    /// No faults: the wrapped backend is called as it is.
    pub fn none(seed: u64) -> Self {
        Self {
            seed,
            probabilities: BTreeMap::new(),
            longest_delay: Duration::from_millis(1),
            threads: 1,
            at_operations: BTreeMap::new(),
            at_bytes: Vec::new(),
        }
    }

    /// A mixture of everything that a batch survives, out of order.
    pub fn survived(seed: u64) -> Self {
        Self::none(seed)
            .with_probability(Fault::Interrupted, 0.2)
            .with_probability(Fault::Busy, 0.2)
            .with_probability(Fault::ShortRead, 0.3)
            .with_probability(Fault::Delay, 0.02)
            .with_reordering(4)
    }

    /// Gives a fault a probability of 0 to 1, for each operation.
    ///
    /// # Panics
    ///
    /// When it is not in that range.
    #[must_use]
    pub fn with_probability(mut self, fault: Fault, probability: f64) -> Self {
        assert!(
            (0.0..=1.0).contains(&probability),
            "a probability of {probability}"
        );
        self.probabilities.insert(fault, probability);
        self
    }

    /// How long a [`Fault::Delay`] is at most; 1 ms if nothing is said.
    #[must_use]
    pub fn with_longest_delay(mut self, longest_delay: Duration) -> Self {
        self.longest_delay = longest_delay;
        self
    }

    /// Issues operations in random order from so many threads (but not from more than a batch has workers), each
    /// of which hands some of them to the wrapped backend at a time. The order is not the seed's alone.
    #[must_use]
    pub fn with_reordering(mut self, threads: u32) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// Makes the operation with this number, counted from 0 as they are issued over all batches, go wrong once.
    #[must_use]
    pub fn with_fault_at_operation(mut self, number: u64, fault: Fault) -> Self {
        self.at_operations.insert(number, fault);
        self
    }

    /// Makes every operation go wrong that covers the byte at `offset` of a file whose path ends with these
    /// components. Of those that a batch survives, each happens once per operation.
    #[must_use]
    pub fn with_fault_at(
        mut self,
        path_end: impl Into<PathBuf>,
        offset: u64,
        fault: Fault,
    ) -> Self {
        self.at_bytes.push((path_end.into(), offset, fault));
        self
    }

    /// Whether the wrapped backend can be called as it is.
    fn is_none(&self) -> bool {
        self.probabilities
            .values()
            .all(|&probability| probability == 0.0)
            && self.threads == 1
            && self.at_operations.is_empty()
            && self.at_bytes.is_empty()
    }

    /// What goes wrong with an operation when it is issued for the `attempt`th time, from 0.
    fn draw(&self, number: u64, attempt: u32, piece: &Piece<'_>) -> Option<Fault> {
        if attempt == 0 {
            if let Some(&fault) = self.at_operations.get(&number) {
                return Some(fault);
            }
            let planned = self.at_bytes.iter().find(|(path_end, offset, _)| {
                piece.file.path().ends_with(path_end) && piece.range().contains(offset)
            });
            if let Some(&(_, _, fault)) = planned {
                return Some(fault);
            }
        }
        self.probabilities
            .iter()
            // What ends a batch comes first, so that nothing else takes its place.
            .rev()
            // What ends a batch does so at once, or an operation that is issued more often would fail more often.
            .filter(|(fault, _)| attempt == 0 || fault.is_survived())
            .find(|&(&fault, &probability)| {
                let salt = u64::from(attempt) << 8 | fault as u64;
                self.random(piece, salt).below(1 << 24) as f64 / f64::from(1 << 24) < probability
            })
            .map(|(&fault, _)| fault)
    }

    /// Numbers that follow from the seed, the place of the operation and a salt.
    fn random(&self, piece: &Piece<'_>, salt: u64) -> Random {
        let name = piece.file.path().file_name().unwrap_or_default();
        let mut random = Random::new(self.seed ^ digest(&name.to_string_lossy()));
        // Each turn mixes what went in before.
        for number in [piece.offset, salt] {
            random = Random::new(random.next() ^ number);
        }
        random
    }
}

/// A part of a request that has not been read yet.
struct Piece<'a> {
    file: &'a SourceFile,
    offset: u64,
    destination: Destination<'a>,
}

impl<'a> Piece<'a> {
    fn len(&self) -> u64 {
        self.destination.len() as u64
    }

    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len()
    }

    /// The first `len` bytes, and the rest.
    fn split_at(self, len: u64) -> (Self, Self) {
        let (first, second) = self.destination.split_at(as_usize(len));
        let (file, offset) = (self.file, self.offset);
        let piece = |offset, destination| Piece {
            file,
            offset,
            destination,
        };
        (piece(offset, first), piece(offset + len, second))
    }

    /// Cut at multiples of `chunk` in the file.
    fn cut(mut self, chunk: u64, pieces: &mut Vec<Self>) {
        while self.len() > chunk - self.offset % chunk {
            let len = chunk - self.offset % chunk;
            let (first, rest) = self.split_at(len);
            pieces.push(first);
            self = rest;
        }
        if self.len() > 0 {
            pieces.push(self);
        }
    }
}

/// What was done to whom.
#[derive(Clone, Debug)]
struct Event {
    operation: u64,
    fault: Fault,
    path: PathBuf,
    range: Range<u64>,
}

#[derive(Debug, Default)]
struct Journal {
    counts: BTreeMap<Fault, u64>,
    /// The first ones.
    events: Vec<Event>,
    /// Of those that end a batch, the last one.
    fatal: Option<Event>,
}

/// Wraps a backend and makes its reads go wrong, as [`Faults`] say.
///
/// It cuts each batch into operations of at most a chunk, as backends do, and hands them to the wrapped backend
/// piece by piece. What a system would do to an operation, it does to that piece; and as every backend has to,
/// it retries what can be retried, continues what was short, and ends the batch with an error that names file, offset
/// and cause when neither helps. So what the caller sees keeps the contract of [`Backend`], and a batch with
/// faults that are [survived](Fault::is_survived) succeeds.
///
/// Its [`Display`](fmt::Display) says what it did.
pub struct FaultBackend {
    inner: Arc<dyn Backend>,
    faults: Faults,
    batches: AtomicU64,
    operations: AtomicU64,
    journal: Mutex<Journal>,
}

impl FaultBackend {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Backend>, faults: Faults) -> Self {
        Self {
            inner,
            faults,
            batches: AtomicU64::new(0),
            operations: AtomicU64::new(0),
            journal: Mutex::default(),
        }
    }

    /// How often this fault has happened so far.
    pub fn count(&self, fault: Fault) -> u64 {
        lock(&self.journal).counts.get(&fault).copied().unwrap_or(0)
    }

    /// How many operations were issued so far, for the first time each. None are counted without
    /// [faults](Faults::none).
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    fn note(&self, operation: u64, fault: Fault, path: &Path, range: Range<u64>) {
        let event = Event {
            operation,
            fault,
            path: path.to_owned(),
            range,
        };
        let mut journal = lock(&self.journal);
        *journal.counts.entry(fault).or_default() += 1;
        if !fault.is_survived() {
            journal.fatal = Some(event.clone());
        }
        if journal.events.len() < MAX_EVENTS {
            journal.events.push(event);
        }
    }
}

/// A batch under way.
struct Batch<'b, 'a> {
    backend: &'b FaultBackend,
    params: TransferParams,
    control: &'b Control,
    /// Taken from the end.
    pieces: Mutex<Vec<Piece<'a>>>,
    /// How much may still be dropped from the page cache, in bytes.
    drop_bytes: AtomicU64,
    stats: Mutex<ReadStats>,
    crew: Crew,
}

impl Backend for FaultBackend {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        self.batches.fetch_add(1, Ordering::Relaxed);
        let overflows = |request: &ReadRequest<'_>| {
            let end = request.offset.checked_add(request.destination.len() as u64);
            end.is_none_or(|end| i64::try_from(end).is_err())
        };
        if self.faults.is_none() || requests.iter().any(overflows) {
            return self.inner.read(requests, params, control);
        }
        params.validate()?;
        control.check()?;
        // Direct reads must not be made ragged.
        let chunk = params.chunk_bytes.next_multiple_of(4096);
        let mut pieces = Vec::new();
        for request in requests {
            let piece = Piece {
                file: request.file,
                offset: request.offset,
                destination: request.destination,
            };
            piece.cut(chunk, &mut pieces);
        }
        let threads = self.faults.threads.min(params.workers);
        if self.faults.threads > 1 {
            Random::new(self.faults.seed).shuffle(&mut pieces);
        } else {
            pieces.reverse();
        }
        let batch = Batch {
            backend: self,
            params: TransferParams {
                // As many reads under way as without the wrapper.
                workers: params.workers / threads,
                ..*params
            },
            control,
            pieces: Mutex::new(pieces),
            drop_bytes: AtomicU64::new(match params.resident {
                ResidentPolicy::CopyAndDrop { limit_bytes } => limit_bytes,
                ResidentPolicy::Reread | ResidentPolicy::Copy => 0,
            }),
            stats: Mutex::default(),
            crew: Crew::default(),
        };
        batch
            .crew
            .run("tensora-faults", threads.into(), &|| batch.run());
        batch.crew.finish()?;
        Ok(batch
            .stats
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner))
    }
}

impl<'a> Batch<'_, 'a> {
    /// Issues operations until there are none left, or one fails.
    fn run(&self) {
        loop {
            if self.crew.is_stopped() {
                return;
            }
            let together = match self.take() {
                Ok(pieces) if pieces.is_empty() => return,
                Ok(pieces) => pieces,
                Err(error) => return self.crew.fail(error),
            };
            if let Err(error) = self.read(together) {
                return self.crew.fail(error);
            }
        }
    }

    /// Some operations that can go to the wrapped backend, after everything was done to them.
    fn take(&self) -> Result<Vec<Piece<'a>>> {
        let mut together = Vec::new();
        while together.len() < MAX_TOGETHER {
            self.control.check()?;
            let Some(piece) = lock(&self.pieces).pop() else {
                break;
            };
            let number = self.backend.operations.fetch_add(1, Ordering::Relaxed);
            together.push(self.disturb(number, piece)?);
        }
        Ok(together)
    }

    /// Does to an operation what shall be done to it. What is left of it is what arrives.
    fn disturb(&self, number: u64, mut piece: Piece<'a>) -> Result<Piece<'a>> {
        let faults = &self.backend.faults;
        for attempt in 0.. {
            let Some(fault) = faults.draw(number, attempt, &piece) else {
                break;
            };
            let mut random = faults.random(&piece, u64::MAX - u64::from(attempt));
            let (path, range) = (piece.file.path().to_owned(), piece.range());
            let note = || self.backend.note(number, fault, &path, range.clone());
            match fault {
                Fault::Interrupted | Fault::Busy => {
                    note();
                    lock(&self.stats).retries += 1;
                    if attempt == MAX_RETRIES {
                        if fault == Fault::Interrupted {
                            break;
                        }
                        return Err(read_error(&piece, io::ErrorKind::WouldBlock.into()));
                    }
                    self.control.check()?;
                }
                Fault::ShortRead => {
                    let len = self.short_len(&piece, &mut random);
                    if len == 0 {
                        // There is no shorter read of it.
                        break;
                    }
                    note();
                    lock(&self.stats).short_reads += 1;
                    let (first, rest) = piece.split_at(len);
                    lock(&self.pieces).push(rest);
                    piece = first;
                    break;
                }
                Fault::Delay => {
                    note();
                    let part = random.below(1000) as f64 / 1000.0;
                    std::thread::sleep(faults.longest_delay.mul_f64(part));
                    break;
                }
                Fault::IoError => {
                    note();
                    return Err(read_error(&piece, system_error(EIO)));
                }
                Fault::EarlyEnd => {
                    note();
                    return Err(Error::UnexpectedEof {
                        offset: range.start,
                        expected_end: range.end,
                        actual_end: range.start + random.below(as_usize(piece.len())) as u64,
                        path,
                    });
                }
                Fault::OutOfMemory => {
                    note();
                    return Err(Error::Memory {
                        bytes: piece.len(),
                        purpose: "memory for a read",
                        source: system_error(ENOMEM),
                    });
                }
            }
        }
        Ok(piece)
    }

    /// How many bytes of the operation arrive at first, 0 if all have to.
    fn short_len(&self, piece: &Piece<'_>, random: &mut Random) -> u64 {
        // Single bytes more often than by chance.
        let len = match random.below(4) {
            0 => 1,
            _ => random.below(as_usize(piece.len())) as u64,
        };
        let align = match self.params.direct {
            DirectPolicy::Never => 1,
            DirectPolicy::Preferred | DirectPolicy::Required => match piece.file.direct_support() {
                DirectSupport::Supported {
                    offset_align_bytes, ..
                } => offset_align_bytes.into(),
                DirectSupport::Unsupported { .. } => 1,
            },
        };
        let end = piece.offset + len;
        let len = (end - end % align).saturating_sub(piece.offset);
        if len < piece.len() { len } else { 0 }
    }

    /// Reads operations to which nothing more is done.
    fn read(&self, pieces: Vec<Piece<'a>>) -> Result<()> {
        let bytes: u64 = pieces.iter().map(Piece::len).sum();
        let params = TransferParams {
            resident: self.resident(bytes),
            ..self.params
        };
        let requests = pieces
            .into_iter()
            .map(|piece| ReadRequest {
                file: piece.file,
                offset: piece.offset,
                destination: piece.destination,
            })
            .collect();
        let stats = self.backend.inner.read(requests, &params, self.control)?;
        lock(&self.stats).merge(stats);
        Ok(())
    }

    /// Divides what may be dropped from the page cache among the reads.
    fn resident(&self, bytes: u64) -> ResidentPolicy {
        if !matches!(self.params.resident, ResidentPolicy::CopyAndDrop { .. }) {
            return self.params.resident;
        }
        let take = |left: u64| (left > 0).then(|| left.saturating_sub(bytes));
        match self
            .drop_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        {
            Ok(left) => ResidentPolicy::CopyAndDrop {
                limit_bytes: left.min(bytes),
            },
            Err(_) => ResidentPolicy::Copy,
        }
    }
}

/// The same numbers on every Unix.
const EIO: i32 = 5;
const ENOMEM: i32 = 12;

fn system_error(errno: i32) -> io::Error {
    if cfg!(unix) {
        return io::Error::from_raw_os_error(errno);
    }
    match errno {
        ENOMEM => io::ErrorKind::OutOfMemory.into(),
        _ => io::ErrorKind::Other.into(),
    }
}

fn read_error(piece: &Piece<'_>, source: io::Error) -> Error {
    Error::Read {
        path: piece.file.path().to_owned(),
        offset: piece.offset,
        length: piece.len(),
        source,
    }
}

impl fmt::Debug for FaultBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultBackend")
            .field("inner", &self.inner)
            .field("seed", &self.faults.seed)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.range;
        let (fault, path) = (self.fault, self.path.display());
        write!(
            f,
            "operation {}: {fault} at {start}..{end} of {path}",
            self.operation
        )
    }
}

impl fmt::Display for FaultBackend {
    /// What was to happen, how often each fault did, and the first ones, a line each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Faults {
            seed,
            probabilities,
            threads,
            ..
        } = &self.faults;
        let journal = lock(&self.journal);
        write!(
            f,
            "{} with faults of seed {seed} from {threads} threads: {} operations in {} batches",
            self.kind(),
            self.operations(),
            self.batches.load(Ordering::Relaxed)
        )?;
        for fault in Fault::ALL {
            let count = journal.counts.get(&fault).copied().unwrap_or(0);
            let probability = probabilities.get(&fault).copied().unwrap_or(0.0);
            if count > 0 || probability > 0.0 {
                write!(f, "\n  {fault}: {count} times (probability {probability})")?;
            }
        }
        for event in &journal.events {
            write!(f, "\n  {event}")?;
        }
        let more = journal.counts.values().sum::<u64>() - journal.events.len() as u64;
        if more > 0 {
            write!(f, "\n  and {more} more")?;
        }
        if let Some(fatal) = &journal.fatal
            && more > 0
        {
            write!(f, ", the last one that ended a batch being {fatal}")?;
        }
        Ok(())
    }
}
