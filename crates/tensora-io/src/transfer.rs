//! What all backends share: a batch, cut into operations, and what has become of them.
//!
//! A [`Transfer`] is made from the requests of one [`Backend::read`](crate::Backend::read) call. It
//! merges ranges that are adjacent both in the file and in memory, decides per file, and where the page cache
//! counts per chunk, between direct and buffered, and cuts everything into [`Operation`]s of at most one chunk.
//! Operations are numbered, not stored, so that a batch of any size takes memory only for its requests. Each
//! operation covers memory that no other one covers; that is what makes handing them to different threads
//! sound.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::direct::DirectFile;
use crate::workers::{Crew, lock};
use crate::{
    BackendKind, Control, DirectFallback, DirectPolicy, Error, ReadRequest, ReadStats, Region,
    ResidentPolicy, Result, SourceFile, TransferParams,
};

/// Largest piece that goes through a scratch buffer in one operation. Scratch is for the ragged ends of
/// direct reads. A thread has one buffer in use, a ring at most 16: with the planner's parameters that is
/// far below the 64 MiB that a load may use beside its data.
const SCRATCH_BYTES: u64 = 256 << 10;
/// Pieces closer together than this are read in one operation: on every device measured, reading so
/// many bytes more takes less time than another operation.
const SCRATCH_GAP_BYTES: u64 = 16 << 10;
/// What is said of a file that takes `O_DIRECT` at open and refuses it at read.
const REFUSED_READS: &str = "it was opened for direct I/O, but direct reads of it fail with EINVAL";
/// What is said of one whose direct reads end where the next one cannot begin, long before the file does.
const RAGGED_READS: &str = "direct reads of it end inside a block, although the file does not";
/// Alignment of scratch buffers; at least what any device needs.
const SCRATCH_ALIGN_BYTES: usize = 64 << 10;
/// Least length that is asked about when it counts what is in the page cache: small chunks would take a system
/// call each.
const RESIDENT_GRANULE_BYTES: u64 = 256 << 10;
/// Of a granule that counts as resident, at most one part in so many may be missing from the page cache: its
/// buffered read fetches them alone, with a device's latency.
const RESIDENT_GRANULE_TOLERATED: u64 = 16;
/// How often an operation is issued again after the system refused it for the moment, and how long is
/// waited before each time: ten seconds altogether.
const MAX_BUSY_RETRIES: u32 = 1000;
const BUSY_WAIT: Duration = Duration::from_millis(10);

/// An address inside a destination of the batch.
///
/// A number and not a pointer, because destinations that follow each other in memory are merged: a
/// run of memory may then consist of several borrows, and no one pointer derives from all of them.
/// Their provenance is exposed, and the runs are only ever handed to system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address(usize);

impl Address {
    fn add(self, bytes: u64) -> Self {
        // Inside the destinations, so the offset fits.
        #[allow(clippy::cast_possible_truncation)]
        Self(self.0.wrapping_add(bytes as usize))
    }

    fn as_mut_ptr(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// A range of a file and its place in memory.
#[derive(Clone, Copy, Debug)]
struct Piece {
    file: usize,
    offset: u64,
    len: u64,
    memory: Address,
}

impl Piece {
    fn end(&self) -> u64 {
        self.offset + self.len
    }

    fn split_at(self, len: u64) -> (Self, Self) {
        debug_assert!(len <= self.len);
        (
            Self { len, ..self },
            Self {
                offset: self.offset + len,
                len: self.len - len,
                memory: self.memory.add(len),
                ..self
            },
        )
    }
}

/// A run of operations over one file.
#[derive(Debug)]
struct Segment {
    first_operation: u64,
    file: usize,
    offset: u64,
    len: u64,
    direct: bool,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    /// Straight into the destination, one operation per chunk.
    InPlace(Address),
    /// One operation through a scratch buffer, then copied to these pieces.
    Scratch(Range<usize>),
}

/// One read of at most a chunk.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    file: usize,
    offset: u64,
    /// What to ask for; more than `needed` only where a direct read runs past the end of the file.
    len: usize,
    /// What has to arrive, counted from `offset`.
    needed: usize,
    direct: bool,
    place: Place,
    done: usize,
    busy_retries: u32,
}

/// What to do with an operation after a read for it returned.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// All of it has arrived.
    Complete,
    /// Read again, from [`Operation::position`].
    Again,
    /// The batch has failed; the error is recorded.
    Failed,
}

#[derive(Debug)]
struct BatchFile<'a> {
    source: &'a SourceFile,
    direct: Option<&'a DirectFile>,
    policy: DirectPolicy,
    /// Direct reads turned out not to work although the file system had promised them.
    refused: AtomicBool,
    direct_operations: Range<u64>,
    buffered_operations: Range<u64>,
}

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    direct_bytes: AtomicU64,
    scratch_bytes: AtomicU64,
    operations: AtomicU64,
    completed: AtomicU64,
    short_reads: AtomicU64,
    retries: AtomicU64,
}

/// A batch under way.
#[derive(Debug)]
pub(crate) struct Transfer<'a> {
    files: Vec<BatchFile<'a>>,
    segments: Vec<Segment>,
    pieces: Vec<Piece>,
    chunk_bytes: u64,
    resident: ResidentPolicy,
    /// Operations have the numbers from 0; the direct ones come first.
    operations: u64,
    direct_operations: u64,
    next: AtomicU64,
    /// How much may still be dropped from the page cache, in bytes.
    drop_bytes: AtomicU64,
    crew: Crew,
    scratch: Mutex<Vec<Region>>,
    fallbacks: Mutex<Vec<DirectFallback>>,
    counters: Counters,
    control: &'a Control,
}

impl<'a> Transfer<'a> {
    /// Checks the parameters and the requests against the files' lengths, and plans the operations.
    pub(crate) fn new(
        requests: Vec<ReadRequest<'a>>,
        params: &TransferParams,
        control: &'a Control,
    ) -> Result<Self> {
        params.validate()?;
        control.check()?;
        let (mut files, pieces) = gather(requests)?;
        let mut fallbacks = Vec::new();
        for file in &mut files {
            file.policy = params.direct;
            if params.direct == DirectPolicy::Never {
                continue;
            }
            match file.source.direct() {
                Ok(direct) => file.direct = Some(direct),
                Err(refusal) if params.direct == DirectPolicy::Required => {
                    return Err(refusal.into_error(file.source.path()));
                }
                Err(refusal) => fallbacks.push(DirectFallback {
                    path: file.source.path().to_owned(),
                    reason: refusal.to_string(),
                }),
            }
        }
        let mut transfer = Self {
            files,
            segments: Vec::new(),
            pieces: Vec::new(),
            chunk_bytes: params.chunk_bytes,
            resident: params.resident,
            operations: 0,
            direct_operations: 0,
            next: AtomicU64::new(0),
            drop_bytes: AtomicU64::new(match params.resident {
                ResidentPolicy::CopyAndDrop { limit_bytes } => limit_bytes,
                ResidentPolicy::Reread | ResidentPolicy::Copy => 0,
            }),
            crew: Crew::default(),
            scratch: Mutex::new(Vec::new()),
            fallbacks: Mutex::new(fallbacks),
            counters: Counters::default(),
            control,
        };
        transfer.plan(&pieces);
        Ok(transfer)
    }

    /// Turns merged pieces, sorted by file and offset, into segments.
    fn plan(&mut self, pieces: &[Piece]) {
        let mut all_buffered = Vec::new();
        for file in 0..self.files.len() {
            let begin = pieces.partition_point(|piece| piece.file < file);
            let end = pieces.partition_point(|piece| piece.file <= file);
            let pieces = &pieces[begin..end];
            let mut buffered = Vec::new();
            let mut segments = match self.files[file].direct {
                None => {
                    buffered.extend(pieces.iter().map(buffered_segment));
                    Vec::new()
                }
                Some(direct) => {
                    let (resident, absent) = self.split_by_residency(file, direct, pieces);
                    buffered.extend(resident.iter().map(buffered_segment));
                    direct_segments(&absent, direct, &mut self.pieces)
                }
            };
            segments.sort_by_key(|segment| segment.offset);
            self.files[file].direct_operations = self.number(segments);
            all_buffered.push(buffered);
        }
        self.direct_operations = self.operations;
        for (file, segments) in all_buffered.into_iter().enumerate() {
            self.files[file].buffered_operations = self.number(segments);
        }
    }

    /// Gives the operations of these segments the next numbers.
    fn number(&mut self, segments: Vec<Segment>) -> Range<u64> {
        let first_operation = self.operations;
        for mut segment in segments {
            segment.first_operation = self.operations;
            self.operations += match segment.place {
                Place::InPlace(_) => {
                    let chunk = self.chunk_of(&segment);
                    (segment.offset % chunk + segment.len).div_ceil(chunk)
                }
                Place::Scratch(_) => 1,
            };
            self.segments.push(segment);
        }
        first_operation..self.operations
    }

    /// What of the pieces of one file is in the page cache and shall be taken from there, and what is to be
    /// read directly.
    fn split_by_residency(
        &self,
        file: usize,
        direct: &DirectFile,
        pieces: &[Piece],
    ) -> (Vec<Piece>, Vec<Piece>) {
        let file = &self.files[file];
        if self.resident == ResidentPolicy::Reread || file.policy == DirectPolicy::Required {
            return (Vec::new(), pieces.to_vec());
        }
        // Multiples of the alignment, so that cutting makes no ragged ends.
        let granule = self
            .chunk_bytes
            .max(RESIDENT_GRANULE_BYTES)
            .next_multiple_of(direct.offset_align_bytes.into());
        let mut split = Split::default();
        for &piece in pieces {
            split.add(piece, granule, &|range| file.source.resident_bytes(range));
        }
        (split.resident, split.absent)
    }

    /// The chunk size, rounded up to what direct reads of this file need.
    fn chunk_of(&self, segment: &Segment) -> u64 {
        match self.files[segment.file].direct {
            Some(direct) if segment.direct => self
                .chunk_bytes
                .next_multiple_of(direct.offset_align_bytes.into()),
            _ => self.chunk_bytes,
        }
    }

    /// How many operations the batch has.
    pub(crate) fn operations(&self) -> u64 {
        self.operations
    }

    /// The operations of each file.
    #[cfg(feature = "async")]
    pub(crate) fn file_operations(
        &self,
    ) -> impl Iterator<Item = impl Iterator<Item = u64> + use<>> + '_ {
        self.files.iter().map(|file| {
            let (direct, buffered) = (&file.direct_operations, &file.buffered_operations);
            interleaved_runs(direct.clone(), buffered.clone())
        })
    }

    /// The next operation that nobody has taken, or `None` when there is none left or the batch shall stop.
    pub(crate) fn next(&self) -> Option<Operation> {
        if self.should_stop() {
            return None;
        }
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        (turn < self.operations).then(|| {
            self.operation(interleaved(
                turn,
                0..self.direct_operations,
                self.direct_operations..self.operations,
            ))
        })
    }

    /// The operation with this number. Each number may be turned into an operation once.
    pub(crate) fn operation(&self, number: u64) -> Operation {
        let index = self
            .segments
            .partition_point(|segment| segment.first_operation <= number)
            - 1;
        let segment = &self.segments[index];
        let chunk = self.chunk_of(segment);
        let (offset, len, place) = match &segment.place {
            Place::InPlace(memory) => {
                // Cuts are at multiples of the chunk in the file: there the page cache's folios end, and, as
                // destinations are placed, huge pages of memory too, which two readers had better not
                // fault in at once.
                let skew = segment.offset % chunk;
                let place = number - segment.first_operation;
                let begin = (place * chunk).saturating_sub(skew);
                let end = ((place + 1) * chunk - skew).min(segment.len);
                (
                    segment.offset + begin,
                    end - begin,
                    Place::InPlace(memory.add(begin)),
                )
            }
            Place::Scratch(pieces) => (segment.offset, segment.len, Place::Scratch(pieces.clone())),
        };
        let needed = match &place {
            Place::InPlace(_) => len,
            // Pieces may overlap, so the last one by offset need not be the one that ends last.
            Place::Scratch(pieces) => self.pieces[pieces.clone()]
                .iter()
                .map(|piece| piece.end() - offset)
                .max()
                .unwrap_or(0),
        };
        // A chunk is at most 1 GiB, so these fit everywhere.
        #[allow(clippy::cast_possible_truncation)]
        Operation {
            file: segment.file,
            offset,
            len: len as usize,
            needed: needed as usize,
            direct: segment.direct && !self.files[segment.file].refused.load(Ordering::Relaxed),
            place,
            done: 0,
            busy_retries: 0,
        }
    }

    /// Whether no more operations shall be started.
    pub(crate) fn should_stop(&self) -> bool {
        self.crew.is_stopped() || self.control.is_cancelled()
    }

    /// Stops the batch with this error, unless it failed before.
    pub(crate) fn fail(&self, error: Error) {
        self.crew.fail(error);
    }

    /// Stops the batch when dropped by a panic, so that the other workers do not go on in vain.
    pub(crate) fn stop_on_unwind(&self) -> impl Drop + '_ {
        self.crew.stop_on_unwind()
    }

    /// Runs `work` on up to `workers` threads, see [`Crew::run`].
    pub(crate) fn run(&self, kind: BackendKind, workers: u32, work: &(dyn Fn() + Sync)) {
        // More threads than operations would only be made and ended.
        let count = u64::from(workers).min(self.operations);
        self.crew.run(&format!("tensora-{kind}"), count, work);
    }

    /// The outcome, once every worker has returned.
    pub(crate) fn finish(self) -> Result<ReadStats> {
        self.crew.finish()?;
        let counters = self.counters;
        if counters.completed.into_inner() != self.operations {
            return Err(Error::Cancelled);
        }
        Ok(ReadStats {
            bytes: counters.bytes.into_inner(),
            direct_bytes: counters.direct_bytes.into_inner(),
            scratch_bytes: counters.scratch_bytes.into_inner(),
            operations: counters.operations.into_inner(),
            short_reads: counters.short_reads.into_inner(),
            retries: counters.retries.into_inner(),
            fallbacks: self
                .fallbacks
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
        })
    }

    /// A scratch buffer for the operation, if it needs one. To be given back with
    /// [`recycle`](Self::recycle).
    pub(crate) fn scratch(&self, operation: &Operation) -> Result<Option<Region>> {
        if matches!(operation.place, Place::InPlace(_)) {
            return Ok(None);
        }
        let recycled = lock(&self.scratch).pop();
        match recycled {
            Some(region) => Ok(Some(region)),
            // One granule more than the largest piece: both ends of a window are rounded outwards.
            #[allow(clippy::cast_possible_truncation)]
            None => Region::allocate_aligned(
                SCRATCH_BYTES as usize + 2 * SCRATCH_ALIGN_BYTES,
                SCRATCH_ALIGN_BYTES,
                "scratch for unaligned direct reads",
            )
            .map(Some),
        }
    }

    /// Keeps a scratch buffer for the next operation that needs one.
    pub(crate) fn recycle(&self, scratch: Option<Region>) {
        if let Some(region) = scratch {
            lock(&self.scratch).push(region);
        }
    }

    /// The file of an operation, through the descriptor that it reads from.
    pub(crate) fn descriptor(&self, operation: &Operation) -> &std::fs::File {
        let file = &self.files[operation.file];
        match file.direct {
            Some(direct) if operation.direct => &direct.file,
            _ => file.source.file(),
        }
    }

    /// Position of the operation's file in the batch.
    #[cfg(all(
        any(feature = "io-uring", feature = "mmap"),
        target_os = "linux",
        not(tensora_portable)
    ))]
    pub(crate) fn file_index(&self, operation: &Operation) -> usize {
        operation.file
    }

    /// The files of the batch.
    #[cfg(all(
        any(feature = "io-uring", feature = "mmap"),
        target_os = "linux",
        not(tensora_portable)
    ))]
    pub(crate) fn sources(&self) -> impl Iterator<Item = &'a SourceFile> + '_ {
        self.files.iter().map(|file| file.source)
    }

    /// Takes note of what a read for the operation returned: a count of bytes or an error.
    pub(crate) fn returned(
        &self,
        operation: &mut Operation,
        scratch: Option<&Region>,
        result: io::Result<usize>,
    ) -> Next {
        self.counters.operations.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(count) => self.received(operation, scratch, count),
            Err(error) => self.refused(operation, error),
        }
    }

    fn received(&self, operation: &mut Operation, scratch: Option<&Region>, count: usize) -> Next {
        let reached = operation.done + count;
        if reached >= operation.needed {
            self.complete(operation, scratch);
            return Next::Complete;
        }
        self.counters.short_reads.fetch_add(1, Ordering::Relaxed);
        let resume = match self.files[operation.file].direct {
            // The next direct read must begin aligned again.
            Some(direct) if operation.direct => {
                reached - reached % direct.offset_align_bytes as usize
            }
            _ => reached,
        };
        if resume > operation.done {
            operation.done = resume;
            return Next::Again;
        }
        // Nothing new: the file ends here, or so it seems.
        let file = &self.files[operation.file];
        let found_end = operation.offset + reached as u64;
        let file_end = file.source.current_len().unwrap_or(found_end);
        if operation.direct && file_end > found_end {
            // File systems that fetch from elsewhere return what has arrived, wherever that ends.
            if file.policy == DirectPolicy::Preferred {
                self.give_up_direct(operation, RAGGED_READS);
                operation.done = reached;
                return Next::Again;
            }
            if count > 0 {
                self.fail(Error::DirectUnsupported {
                    path: file.source.path().to_owned(),
                    reason: RAGGED_READS.to_owned(),
                });
                return Next::Failed;
            }
        }
        self.fail(Error::UnexpectedEof {
            path: file.source.path().to_owned(),
            offset: operation.offset,
            expected_end: operation.offset + operation.needed as u64,
            actual_end: file_end.min(found_end),
        });
        Next::Failed
    }

    /// Reads this operation buffered from here on, and those of its file that come later.
    fn give_up_direct(&self, operation: &mut Operation, reason: &str) {
        let file = &self.files[operation.file];
        operation.direct = false;
        if !file.refused.swap(true, Ordering::Relaxed) {
            lock(&self.fallbacks).push(DirectFallback {
                path: file.source.path().to_owned(),
                reason: reason.to_owned(),
            });
        }
    }

    fn refused(&self, operation: &mut Operation, error: io::Error) -> Next {
        let file = &self.files[operation.file];
        match error.kind() {
            io::ErrorKind::Interrupted => {
                self.counters.retries.fetch_add(1, Ordering::Relaxed);
                return Next::Again;
            }
            io::ErrorKind::WouldBlock if operation.busy_retries < MAX_BUSY_RETRIES => {
                operation.busy_retries += 1;
                self.counters.retries.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(BUSY_WAIT);
                return Next::Again;
            }
            // Some file systems take O_DIRECT at open and refuse it at read.
            io::ErrorKind::InvalidInput
                if operation.direct && file.policy == DirectPolicy::Preferred =>
            {
                self.give_up_direct(operation, REFUSED_READS);
                return Next::Again;
            }
            io::ErrorKind::InvalidInput if operation.direct => {
                self.fail(Error::DirectUnsupported {
                    path: file.source.path().to_owned(),
                    reason: REFUSED_READS.to_owned(),
                });
                return Next::Failed;
            }
            _ => {}
        }
        let done = operation.done as u64;
        self.fail(Error::Read {
            path: file.source.path().to_owned(),
            offset: operation.offset + done,
            length: operation.needed as u64 - done,
            source: error,
        });
        Next::Failed
    }

    fn complete(&self, operation: &Operation, scratch: Option<&Region>) {
        let bytes = match (&operation.place, scratch) {
            (Place::Scratch(pieces), Some(scratch)) => {
                let mut bytes = 0;
                for piece in &self.pieces[pieces.clone()] {
                    self.scatter(operation, piece, scratch);
                    bytes += piece.len;
                }
                self.counters
                    .scratch_bytes
                    .fetch_add(bytes, Ordering::Relaxed);
                bytes
            }
            _ => operation.needed as u64,
        };
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        if operation.direct {
            self.counters
                .direct_bytes
                .fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.drop_behind(operation);
        }
        self.counters.completed.fetch_add(1, Ordering::Relaxed);
        self.control.advance(bytes);
    }

    /// Drops what a buffered operation has read from the page cache, as far as that was asked for.
    fn drop_behind(&self, operation: &Operation) {
        if !matches!(self.resident, ResidentPolicy::CopyAndDrop { .. }) {
            return;
        }
        let bytes = operation.needed as u64;
        let take = |left: u64| (left > 0).then(|| left.saturating_sub(bytes));
        let allowed = self
            .drop_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        if allowed.is_ok() {
            let begin = operation.offset;
            self.files[operation.file]
                .source
                .drop_resident(begin..begin + bytes);
        }
    }

    fn scatter(&self, operation: &Operation, piece: &Piece, scratch: &Region) {
        #[allow(clippy::cast_possible_truncation)]
        let (begin, len) = (
            (piece.offset - operation.offset) as usize,
            piece.len as usize,
        );
        let source = &scratch.as_slice()[begin..begin + len];
        // SAFETY: the memory of the piece is exclusively borrowed for the whole transfer, its provenance
        // was exposed, and it belongs to this operation only; `source` is a buffer of our own, so the
        // two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), piece.memory.as_mut_ptr(), len);
        }
    }
}

impl Operation {
    /// Whether it goes through a scratch buffer.
    #[cfg(all(feature = "io-uring", target_os = "linux", not(tensora_portable)))]
    pub(crate) fn needs_scratch(&self) -> bool {
        matches!(self.place, Place::Scratch(_))
    }

    /// Where in the file the next read for it begins.
    pub(crate) fn position(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// Where in memory the next read for it goes, and how much fits there.
    pub(crate) fn memory(&self, scratch: Option<&mut Region>) -> (*mut u8, usize) {
        let rest = self.len - self.done;
        match (&self.place, scratch) {
            (Place::InPlace(memory), _) => (memory.add(self.done as u64).as_mut_ptr(), rest),
            (Place::Scratch(_), Some(scratch)) => (
                scratch.as_mut_slice()[self.done..self.len].as_mut_ptr(),
                rest,
            ),
            // An operation that needs scratch and has none reads nothing, and so fails as a short read.
            (Place::Scratch(_), None) => (std::ptr::dangling_mut(), 0),
        }
    }
}

/// The operation whose turn it is, when the two runs of numbers take turns such that either is spread evenly
/// over the whole: while some readers wait for the device, others copy from the page cache.
fn interleaved(turn: u64, direct: Range<u64>, buffered: Range<u64>) -> u64 {
    let (count, others) = (direct.end - direct.start, buffered.end - buffered.start);
    if others == 0 {
        return direct.start + turn;
    }
    let before = |turn: u64| {
        let before = u128::from(turn) * u128::from(count) / u128::from(count + others);
        // At most `count`.
        u64::try_from(before).unwrap_or(count)
    };
    let directs = before(turn);
    if before(turn + 1) > directs {
        direct.start + directs
    } else {
        buffered.start + (turn - directs)
    }
}

/// All numbers of two runs, in the order of [`interleaved`].
#[cfg(any(feature = "async", test))]
fn interleaved_runs(direct: Range<u64>, buffered: Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let turns = (direct.end - direct.start) + (buffered.end - buffered.start);
    (0..turns).map(move |turn| interleaved(turn, direct.clone(), buffered.clone()))
}

/// Pieces, parted by whether the page cache holds them.
#[derive(Debug, Default)]
struct Split {
    resident: Vec<Piece>,
    absent: Vec<Piece>,
}

impl Split {
    /// Parts a piece at multiples of `granule` in the file. `resident_bytes` tells how much of a range is in
    /// the page cache; it is asked about halves of halves, so few times where all or nothing is.
    fn add(
        &mut self,
        piece: Piece,
        granule: u64,
        resident_bytes: &dyn Fn(Range<u64>) -> Option<u64>,
    ) {
        let resident = resident_bytes(piece.offset..piece.end()).unwrap_or(0);
        let granules = piece.offset / granule..piece.end().div_ceil(granule);
        if resident == 0 {
            return Self::push(&mut self.absent, piece);
        }
        if resident >= piece.len {
            return Self::push(&mut self.resident, piece);
        }
        if granules.end - granules.start == 1 {
            let is_resident = piece.len - resident <= piece.len / RESIDENT_GRANULE_TOLERATED;
            return Self::push(
                if is_resident {
                    &mut self.resident
                } else {
                    &mut self.absent
                },
                piece,
            );
        }
        let middle = (granules.start + (granules.end - granules.start) / 2) * granule;
        let (first, second) = piece.split_at(middle - piece.offset);
        self.add(first, granule, resident_bytes);
        self.add(second, granule, resident_bytes);
    }

    /// Adds a piece, to the last one if it continues that.
    fn push(pieces: &mut Vec<Piece>, piece: Piece) {
        match pieces.last_mut() {
            Some(last)
                if last.end() == piece.offset && last.memory.add(last.len) == piece.memory =>
            {
                last.len += piece.len;
            }
            _ => pieces.push(piece),
        }
    }
}

/// Sorts requests by file and offset, checks them against the files, and merges what is adjacent both in a
/// file and in memory.
fn gather<'a>(requests: Vec<ReadRequest<'a>>) -> Result<(Vec<BatchFile<'a>>, Vec<Piece>)> {
    let mut files: Vec<BatchFile<'a>> = Vec::new();
    let mut lengths = Vec::new();
    let mut numbers = HashMap::new();
    let mut pieces = Vec::with_capacity(requests.len());
    for mut request in requests {
        let source = request.file;
        let len = request.destination.len() as u64;
        let range_end = request.offset.checked_add(len);
        let Some(end) = range_end.filter(|&end| i64::try_from(end).is_ok()) else {
            return Err(Error::RangeOverflow {
                path: source.path().to_owned(),
                offset: request.offset,
                length: len,
            });
        };
        if len == 0 {
            // Nothing is read, so nothing can fail, or be read in another way than asked for.
            continue;
        }
        let file = *numbers
            .entry(std::ptr::from_ref(source))
            .or_insert(files.len());
        if file == files.len() {
            lengths.push(source.current_len()?);
            files.push(BatchFile {
                source,
                direct: None,
                policy: DirectPolicy::Never,
                refused: AtomicBool::new(false),
                direct_operations: 0..0,
                buffered_operations: 0..0,
            });
        }
        if end > lengths[file] {
            return Err(Error::UnexpectedEof {
                path: source.path().to_owned(),
                offset: request.offset,
                expected_end: end,
                actual_end: lengths[file],
            });
        }
        pieces.push(Piece {
            file,
            offset: request.offset,
            len,
            memory: Address(request.destination.as_mut_ptr().expose_provenance()),
        });
    }
    pieces.sort_by_key(|piece| (piece.file, piece.offset));
    Ok((files, merge(pieces)))
}

/// Merges neighbours that continue each other both in the file and in memory.
fn merge(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut merged: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match merged.last_mut() {
            // Off Linux reads go through slices, which must not span two allocations.
            Some(last)
                if cfg!(all(target_os = "linux", not(tensora_portable)))
                    && last.file == piece.file
                    && last.end() == piece.offset
                    && last.memory.add(last.len) == piece.memory =>
            {
                last.len += piece.len;
            }
            _ => merged.push(piece),
        }
    }
    merged
}

fn buffered_segment(piece: &Piece) -> Segment {
    Segment {
        first_operation: 0,
        file: piece.file,
        offset: piece.offset,
        len: piece.len,
        direct: false,
        place: Place::InPlace(piece.memory),
    }
}

/// Cuts the pieces of one file into what can be read straight into its destination and what has to go
/// through scratch: ragged ends, and everything whose address does not suit its offset.
fn direct_segments(
    pieces: &[Piece],
    direct: &DirectFile,
    scattered: &mut Vec<Piece>,
) -> Vec<Segment> {
    let align = u64::from(direct.offset_align_bytes);
    let mut segments = Vec::new();
    let mut ragged = Vec::new();
    for &piece in pieces {
        let body_begin = piece.offset.next_multiple_of(align);
        let body_end = piece.end() - piece.end() % align;
        let head_len = body_begin - piece.offset;
        let suits = body_begin < body_end
            && piece.memory.add(head_len).0 % direct.memory_align_bytes as usize == 0;
        if !suits {
            ragged.push(piece);
            continue;
        }
        let (head, rest) = piece.split_at(head_len);
        let (body, tail) = rest.split_at(body_end - body_begin);
        ragged.extend([head, tail].into_iter().filter(|part| part.len > 0));
        segments.push(Segment {
            direct: true,
            ..buffered_segment(&body)
        });
    }
    segments.extend(scratch_segments(ragged, align, scattered));
    segments
}

/// Groups pieces that lie close together into windows of at most one scratch buffer.
fn scratch_segments(ragged: Vec<Piece>, align: u64, scattered: &mut Vec<Piece>) -> Vec<Segment> {
    let mut short = Vec::with_capacity(ragged.len());
    for mut piece in ragged {
        while piece.len > SCRATCH_BYTES {
            // Cut where a block ends, so that no block is read twice.
            let cut = (piece.offset + SCRATCH_BYTES) / align * align - piece.offset;
            let (first, rest) = piece.split_at(cut);
            short.push(first);
            piece = rest;
        }
        short.push(piece);
    }
    short.sort_by_key(|piece| piece.offset);

    let mut segments: Vec<Segment> = Vec::new();
    for piece in short {
        let begin = piece.offset - piece.offset % align;
        let end = piece.end().next_multiple_of(align);
        if let Some(Segment {
            offset,
            len,
            place: Place::Scratch(pieces),
            ..
        }) = segments.last_mut()
        {
            let last_end = *offset + *len;
            if begin <= last_end + SCRATCH_GAP_BYTES && end.max(last_end) - *offset <= SCRATCH_BYTES
            {
                *len = end.max(last_end) - *offset;
                scattered.push(piece);
                pieces.end = scattered.len();
                continue;
            }
        }
        let first = scattered.len();
        segments.push(Segment {
            first_operation: 0,
            file: piece.file,
            offset: begin,
            len: end - begin,
            direct: true,
            place: Place::Scratch(first..first + 1),
        });
        scattered.push(piece);
    }
    segments
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pieces of one file over a made-up address space; addresses are only compared, never used.
    fn pieces() -> impl Strategy<Value = Vec<Piece>> {
        let piece = (0_u64..3 << 20, 1_u64..700_000, any::<bool>(), 0_usize..5000);
        prop::collection::vec(piece, 1..40).prop_map(|list| {
            let mut next_address = 1 << 30;
            let mut pieces: Vec<_> = list
                .into_iter()
                .map(|(offset, len, congruent, skew)| {
                    let base = next_address;
                    next_address += 1 << 20;
                    #[allow(clippy::cast_possible_truncation)]
                    let skew = if congruent {
                        (offset % 4096) as usize
                    } else {
                        skew
                    };
                    Piece {
                        file: 0,
                        offset,
                        len,
                        memory: Address(base + skew),
                    }
                })
                .collect();
            pieces.sort_by_key(|piece| piece.offset);
            pieces
        })
    }

    fn direct_file(align: u32) -> DirectFile {
        DirectFile {
            file: tempfile::tempfile().unwrap(),
            offset_align_bytes: align,
            memory_align_bytes: align,
        }
    }

    proptest! {
        #[test]
        fn turns_are_fair_and_reach_every_operation_once(
            direct in 0_u64..300,
            buffered in 0_u64..300,
            first in 0_u64..50,
            second in 1000_u64..1050,
        ) {
            let numbers: Vec<_> =
                interleaved_runs(first..first + direct, second..second + buffered).collect();
            let mut sorted = numbers.clone();
            sorted.sort_unstable();
            let all: Vec<_> = (first..first + direct).chain(second..second + buffered).collect();
            prop_assert_eq!(sorted, all);
            // After any number of turns, the share of direct ones is that of the whole.
            let mut directs = 0_u64;
            for (turn, number) in numbers.iter().enumerate() {
                directs += u64::from(*number < 1000);
                let due = (turn as u64 + 1) as f64 * direct as f64 / (direct + buffered) as f64;
                prop_assert!((directs as f64 - due).abs() < 1.0 + 1e-6, "{directs} of {due}");
            }
        }

        /// Parting by residency loses nothing, cuts only at granules, and agrees with a look at each granule.
        #[test]
        fn residency_parts_pieces_as_a_look_at_each_granule_does(
            pages in prop::collection::vec(any::<bool>(), 1..200),
            runs in prop::collection::vec((any::<bool>(), 1_usize..40), 0..8),
            begin in 0_u64..4096,
            cut in 0_u64..4096,
            pages_per_granule in prop::sample::select(vec![1_u64, 4, 16, 32]),
        ) {
            let mut pages = pages;
            for (is_resident, count) in runs {
                pages.extend(std::iter::repeat_n(is_resident, count));
            }
            let end = (pages.len() as u64 * 4096).saturating_sub(cut).max(begin + 1);
            let naive = |range: Range<u64>| {
                range.filter(|&byte| {
                    usize::try_from(byte / 4096).ok().and_then(|page| pages.get(page)) == Some(&true)
                }).count() as u64
            };
            // A byte at a time is slow, so ask per page.
            let resident = |range: Range<u64>| {
                let mut sum = 0;
                let mut at = range.start;
                while at < range.end {
                    let next = ((at / 4096 + 1) * 4096).min(range.end);
                    if naive(at..at + 1) == 1 { sum += next - at; }
                    at = next;
                }
                Some(sum)
            };
            let granule = pages_per_granule * 4096;
            let piece = Piece { file: 0, offset: begin, len: end - begin, memory: Address(1 << 20) };
            let mut split = Split::default();
            split.add(piece, granule, &resident);

            let mut at = begin;
            let mut parts: Vec<_> = split.resident.iter().map(|part| (*part, true))
                .chain(split.absent.iter().map(|part| (*part, false))).collect();
            parts.sort_by_key(|(part, _)| part.offset);
            for (part, _) in &parts {
                prop_assert_eq!(part.offset, at);
                prop_assert_eq!(part.memory.0 as u64 - (1 << 20), at - begin);
                prop_assert!(at == begin || at % granule == 0);
                at = part.end();
            }
            prop_assert_eq!(at, end);
            let mut granule_begin = begin;
            while granule_begin < end {
                let granule_end = ((granule_begin / granule + 1) * granule).min(end);
                let len = granule_end - granule_begin;
                let missing = len - resident(granule_begin..granule_end).unwrap();
                let expected = missing < len && missing <= len / RESIDENT_GRANULE_TOLERATED;
                let found = parts.iter()
                    .find(|(part, _)| part.offset <= granule_begin && granule_begin < part.end());
                prop_assert_eq!(found.unwrap().1, expected, "granule at {}", granule_begin);
                granule_begin = granule_end;
            }
        }

        /// Every byte of every piece is delivered exactly once, to its own address, by reads that are
        /// aligned and, where they go through scratch, fit it.
        #[test]
        fn direct_reads_are_aligned_and_deliver_each_byte_once(
            pieces in pieces(),
            align in prop::sample::select(vec![512_u32, 4096, 65536]),
        ) {
            let mut scattered = Vec::new();
            let segments = direct_segments(&pieces, &direct_file(align), &mut scattered);
            let align = u64::from(align);
            // (file offset − address) identifies the piece that a delivered run belongs to.
            let mut delivered: Vec<(usize, u64, u64)> = Vec::new();
            for segment in &segments {
                prop_assert!(segment.direct);
                prop_assert_eq!(segment.offset % align, 0);
                prop_assert_eq!(segment.len % align, 0);
                match &segment.place {
                    Place::InPlace(memory) => {
                        prop_assert_eq!(memory.0 as u64 % align, 0);
                        delivered.push((memory.0, segment.offset, segment.len));
                    }
                    Place::Scratch(range) => {
                        prop_assert!(segment.len <= SCRATCH_BYTES + 2 * SCRATCH_ALIGN_BYTES as u64);
                        for piece in &scattered[range.clone()] {
                            prop_assert!(piece.offset >= segment.offset);
                            prop_assert!(piece.end() <= segment.offset + segment.len);
                            delivered.push((piece.memory.0, piece.offset, piece.len));
                        }
                    }
                }
            }
            delivered.sort_unstable();
            let mut delivered = delivered.into_iter().peekable();
            let mut wanted = pieces.clone();
            wanted.sort_by_key(|piece| piece.memory.0);
            for piece in wanted {
                let (mut address, mut offset) = (piece.memory.0, piece.offset);
                while offset < piece.end() {
                    let (at, from, len) = delivered.next().unwrap();
                    prop_assert_eq!((at, from), (address, offset));
                    #[allow(clippy::cast_possible_truncation)]
                    { address += len as usize; }
                    offset += len;
                }
                prop_assert_eq!(offset, piece.end());
            }
            prop_assert!(delivered.peek().is_none());
        }

        /// What suits direct I/O is read in place but for less than a block at either end.
        #[test]
        fn what_suits_direct_reads_is_not_copied(pieces in pieces()) {
            let suits = |piece: &Piece| piece.memory.0 as u64 % 4096 == piece.offset % 4096;
            let pieces: Vec<_> = pieces.into_iter().filter(suits).collect();
            let mut scattered = Vec::new();
            direct_segments(&pieces, &direct_file(4096), &mut scattered);
            let copied: u64 = scattered.iter().map(|piece| piece.len).sum();
            prop_assert!(copied < 2 * 4096 * pieces.len().max(1) as u64);
        }
    }

    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    #[test]
    fn only_neighbours_in_file_and_memory_merge() {
        let piece = |file, offset, address: usize| Piece {
            file,
            offset,
            len: 10,
            memory: Address(address),
        };
        let merged = merge(vec![
            piece(0, 0, 100),
            piece(0, 10, 110),
            piece(0, 20, 200),
            piece(1, 30, 210),
        ]);
        let shape: Vec<_> = merged
            .iter()
            .map(|piece| (piece.file, piece.offset, piece.len))
            .collect();
        assert_eq!(shape, [(0, 0, 20), (0, 20, 10), (1, 30, 10)]);
    }
}
