//! The simplest backend that keeps every promise, and ways for it to break each.

// Every test binary compiles this module and uses its part of it.
#![allow(dead_code)]
// Its panics are failed tests, like those of the tests themselves.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tensora_io::{
    Backend, BackendKind, Control, DirectFallback, DirectPolicy, DirectSupport, Error, ReadRequest,
    ReadStats, Region, Result, SourceFile, TransferParams,
};

/// What a [`Reference`] does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Defect {
    None,
    // What arrives.
    WrongLastByte,
    SkipsUnalignedHead,
    SkipsUnalignedTail,
    SkipsMisalignedDestination,
    WritesOneByteTooMany,
    ReadsTheFirstFileOnly,
    ReadsEqualRangesOnce,
    TakesAdjacentForContiguous,
    StopsAfter1024Requests,
    RoundsChunksDown,
    TruncatesOffsets,
    TruncatesLengths,
    SharesItsBuffer,
    ReopensThePath,
    // Empty things.
    PanicsOnAnEmptyBatch,
    PanicsOnAnEmptyRequest,
    FailsOnAnEmptyFile,
    // What is refused.
    ClampsParameters,
    OverflowsOffsets,
    SwallowsTheEnd,
    NamesTheLengthAtOpen,
    NamesTheFirstFile,
    NamesTheWrongRange,
    // Direct I/O.
    ReadsBufferedInstead,
    ClaimsToReadDirectly,
    RefusesToReadDirectly,
    HidesFallbacks,
    CopiesWhatIsAligned,
    // What is reported.
    ReportsTooMuchProgress,
    ReportsNoProgress,
    CountsOneByteTooMany,
    // How it ends.
    IgnoresCancellation,
    IgnoresEarlyCancellation,
    ReadsOnWhenCancelled,
    CallsCancelledComplete,
    SwallowsPanics,
    ReplacesPanics,
    DiesOfAPanic,
    WritesAfterSuccess,
    WritesAfterAnError,
    WritesAfterCancellation,
    WritesAfterAPanic,
    // Where it runs.
    Hangs,
    EntersARuntime,
    WaitsForATask,
    OwnsARuntime,
    FailsWhenInterrupted,
    FailsWithManyWorkers,
    // What it leaves behind.
    KeepsFiles,
    KeepsDescriptors,
    KeepsThreads,
    KeepsMemory,
}

use Defect as D;

/// Reads one request after the other with positioned reads.
pub(crate) struct Reference {
    defect: Defect,
    dead: AtomicBool,
    buffer: Mutex<Vec<u8>>,
    #[cfg(feature = "async")]
    runtime: Option<tokio::runtime::Runtime>,
}

impl std::fmt::Debug for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reference({:?})", self.defect)
    }
}

/// A destination, once its address can be known to threads that should not know it.
#[derive(Clone, Copy)]
struct Target {
    address: usize,
    len: usize,
}

impl Target {
    fn pointer(self, at: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address + at)
    }

    fn write(self, at: usize, bytes: &[u8]) {
        // SAFETY: callers stay within the destination, except for the defects that are about not doing so;
        // those write into the check's own memory, which lies around and outlives the destination.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer(at), bytes.len()) }
    }
}

impl Reference {
    pub(crate) fn new(defect: Defect) -> Self {
        Self {
            defect,
            dead: AtomicBool::new(false),
            buffer: Mutex::default(),
            #[cfg(feature = "async")]
            runtime: (defect == D::OwnsARuntime).then(|| {
                tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .build()
                    .unwrap()
            }),
        }
    }

    fn is(&self, defect: Defect) -> bool {
        self.defect == defect
    }

    fn read_all(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        if !self.is(D::ClampsParameters) {
            params.validate()?;
        }
        if !self.is(D::IgnoresEarlyCancellation) && !self.is(D::IgnoresCancellation) {
            control.check()?;
        }
        assert!(
            !(self.is(D::PanicsOnAnEmptyBatch) && requests.is_empty()),
            "the defect's own panic"
        );
        self.misbehave_in_a_runtime();
        if self.is(D::Hangs) {
            std::thread::sleep(Duration::from_secs(3600));
        }
        let mut stats = ReadStats::default();
        let Some(first) = requests.first().map(|request| request.file) else {
            return Ok(stats);
        };
        let mut seen: Vec<(PathBuf, u64, usize)> = Vec::new();
        let mut previous: Option<(PathBuf, u64, usize)> = None;
        for (number, mut request) in requests.into_iter().enumerate() {
            let mut file = request.file;
            let mut target = Target {
                address: request.destination.as_mut_ptr().expose_provenance(),
                len: request.destination.len(),
            };
            let range = (file.path().to_owned(), request.offset, target.len);
            match self.defect {
                D::ReadsTheFirstFileOnly => file = first,
                D::ReadsEqualRangesOnce if seen.contains(&range) => {
                    stats.bytes += target.len as u64;
                    control.advance(target.len as u64);
                    continue;
                }
                D::StopsAfter1024Requests if number >= 1024 => {
                    stats.bytes += target.len as u64;
                    control.advance(target.len as u64);
                    continue;
                }
                D::TakesAdjacentForContiguous => {
                    if let Some((path, end, address)) = &previous
                        && path == file.path()
                        && *end == request.offset
                    {
                        target.address = *address;
                    }
                    let end = request.offset + target.len as u64;
                    previous = Some((file.path().to_owned(), end, target.address + target.len));
                }
                D::PanicsOnAnEmptyRequest if target.len == 0 => panic!("the defect's own panic"),
                D::FailsOnAnEmptyFile if file.is_empty() => {
                    return Err(end_of(file, 0, 0, 0));
                }
                D::KeepsFiles => std::mem::forget(file.file().try_clone().unwrap()),
                _ => {}
            }
            seen.push(range);
            let result = self.read_one(file, request.offset, target, params, control, &mut stats);
            match (result, self.defect) {
                (Err(Error::UnexpectedEof { .. }), D::SwallowsTheEnd) => {}
                (Err(Error::Cancelled), D::CallsCancelledComplete) => return Ok(stats),
                (
                    Err(Error::UnexpectedEof {
                        offset,
                        expected_end,
                        ..
                    }),
                    D::NamesTheLengthAtOpen,
                ) => {
                    return Err(end_of(file, offset, expected_end, file.len()));
                }
                (
                    Err(Error::UnexpectedEof {
                        offset,
                        expected_end,
                        actual_end,
                        ..
                    }),
                    D::NamesTheFirstFile,
                ) => return Err(end_of(first, offset, expected_end, actual_end)),
                (Err(Error::UnexpectedEof { actual_end, .. }), D::NamesTheWrongRange) => {
                    return Err(end_of(file, 0, u64::MAX, actual_end));
                }
                (Err(error), _) => return Err(error),
                (Ok(()), _) => {}
            }
        }
        if self.is(D::ReadsOnWhenCancelled) {
            control.check()?;
        }
        if self.is(D::CountsOneByteTooMany) {
            stats.bytes += 1;
        }
        Ok(stats)
    }

    fn read_one(
        &self,
        source: &SourceFile,
        offset: u64,
        target: Target,
        params: &TransferParams,
        control: &Control,
        stats: &mut ReadStats,
    ) -> Result<()> {
        let len = target.len as u64;
        let mut end = match offset.checked_add(len) {
            Some(end) if i64::try_from(end).is_ok() => end,
            _ if self.is(D::OverflowsOffsets) => panic!("the defect's own overflow"),
            _ => {
                return Err(Error::RangeOverflow {
                    path: source.path().to_owned(),
                    offset,
                    length: len,
                });
            }
        };
        if self.is(D::TruncatesLengths) {
            end = end.min(offset + 0x7FFF_F000);
        }
        if target.len == 0 {
            return Ok(());
        }
        let direct = self.direct(source, params.direct, stats)?;
        let reopened;
        let file = match &direct {
            Some((file, _)) => file,
            None if self.is(D::ReopensThePath) => {
                reopened = File::open(source.path()).map_err(|error| Error::File {
                    operation: "open",
                    path: source.path().to_owned(),
                    source: error,
                })?;
                &reopened
            }
            None => source.file(),
        };
        let align = direct.as_ref().map_or(1, |(_, align)| *align);
        let chunk = params.chunk_bytes.clamp(4096, 1 << 30);
        let mut begin = offset;
        while begin < end {
            let checks = match self.defect {
                D::IgnoresCancellation | D::ReadsOnWhenCancelled => false,
                D::IgnoresEarlyCancellation => begin > offset,
                _ => true,
            };
            if checks {
                control.check()?;
            }
            let wanted = match (begin % align, end - begin) {
                (0, rest) if rest > align => chunk.min(rest) / align * align,
                (past, rest) => chunk.min(rest).min(align - past),
            };
            let found = self.read_chunk(file, begin, wanted, align, offset, target, stats);
            let found = found.map_err(|error| Error::Read {
                path: source.path().to_owned(),
                offset: begin,
                length: wanted,
                source: error,
            })?;
            stats.operations += 1;
            if found < wanted {
                let actual_end = source.current_len()?;
                if self.is(D::SwallowsTheEnd) {
                    stats.bytes += end - begin;
                    control.advance(end - begin);
                }
                return Err(end_of(source, offset, offset + len, actual_end));
            }
            stats.bytes += wanted;
            if direct.is_some()
                || self.is(D::ClaimsToReadDirectly) && params.direct != DirectPolicy::Never
            {
                stats.direct_bytes += wanted;
            }
            begin += wanted;
            match self.defect {
                D::ReportsNoProgress => {}
                D::ReportsTooMuchProgress => control.advance(wanted + 1),
                _ => control.advance(wanted),
            }
        }
        if self.is(D::WritesOneByteTooMany) {
            target.write(target.len, &[1]);
        }
        Ok(())
    }

    /// Reads `wanted` bytes from `begin` to their place in the destination of a request that begins at
    /// `offset`, and returns how many of them the file has.
    #[allow(clippy::too_many_arguments)]
    fn read_chunk(
        &self,
        file: &File,
        begin: u64,
        mut wanted: u64,
        align: u64,
        offset: u64,
        target: Target,
        stats: &mut ReadStats,
    ) -> std::io::Result<u64> {
        let asked = wanted;
        let at = usize::try_from(begin - offset).unwrap();
        let aligned = |number: u64| number.is_multiple_of(align);
        let address = (target.address + at) as u64;
        if align > 1
            && aligned(begin)
            && aligned(wanted)
            && aligned(address)
            && !self.is(D::CopiesWhatIsAligned)
        {
            let len = usize::try_from(wanted).unwrap();
            // SAFETY: this part of the destination is exclusively borrowed by the request, and initialised by
            // the checks, which only pretend that it is not.
            let memory = unsafe { std::slice::from_raw_parts_mut(target.pointer(at), len) };
            return Ok(read_up_to(file, memory, begin)? as u64);
        }
        if self.is(D::RoundsChunksDown) && wanted > 4096 {
            wanted = wanted / 4096 * 4096;
        }
        let first = begin - begin % align;
        let last = (begin + wanted).next_multiple_of(align);
        let skipped = usize::try_from(begin - first).unwrap();
        let position = if self.is(D::TruncatesOffsets) {
            first & 0xFFFF_FFFF
        } else {
            first
        };
        let needed = usize::try_from(last - first).unwrap();
        // A region of 2 MiB is aligned to 2 MiB, a smaller one to a page.
        let aligned_bytes = if align > 4096 { 2 << 20 } else { 0 };
        let mut scratch = Region::allocate(needed.max(aligned_bytes)).unwrap();
        let buffer = &mut scratch.as_mut_slice()[..needed];
        let found = read_up_to(file, buffer, position)?.saturating_sub(skipped);
        let found = found.min(usize::try_from(wanted).unwrap());
        if align > 1 {
            stats.scratch_bytes += found as u64;
        }
        if self.is(D::SharesItsBuffer) {
            *self.buffer.lock().unwrap() = buffer[skipped..skipped + found].to_vec();
            std::thread::sleep(Duration::from_millis(1));
            let shared = self.buffer.lock().unwrap();
            target.write(at, &shared[..found.min(shared.len())]);
        } else {
            self.deliver(begin, target, at, &mut buffer[skipped..skipped + found]);
        }
        Ok(if found as u64 == wanted {
            asked
        } else {
            found as u64
        })
    }

    fn deliver(&self, begin: u64, target: Target, at: usize, bytes: &mut [u8]) {
        const BLOCK: usize = 512;
        let head = BLOCK - usize::try_from(begin).unwrap() % BLOCK;
        let tail = (usize::try_from(begin).unwrap() + bytes.len()) % BLOCK;
        let is_last = at + bytes.len() == target.len;
        match self.defect {
            D::WrongLastByte if is_last => {
                if let Some(last) = bytes.last_mut() {
                    *last ^= 0x10;
                }
                target.write(at, bytes);
            }
            D::SkipsUnalignedHead if at == 0 && head < BLOCK => {
                let head = head.min(bytes.len());
                target.write(at + head, &bytes[head..]);
            }
            D::SkipsUnalignedTail if is_last => {
                target.write(at, &bytes[..bytes.len() - tail.min(bytes.len())]);
            }
            D::SkipsMisalignedDestination
                if (target.address as u64).wrapping_sub(begin - at as u64) % 4096 == 4095 => {}
            _ => target.write(at, bytes),
        }
    }

    /// The descriptor for direct reads and its alignment, where policy and file say so.
    fn direct(
        &self,
        source: &SourceFile,
        policy: DirectPolicy,
        stats: &mut ReadStats,
    ) -> Result<Option<(File, u64)>> {
        if policy == DirectPolicy::Never || self.is(D::ClaimsToReadDirectly) {
            return Ok(None);
        }
        let mut support = source.direct_support();
        match self.defect {
            D::RefusesToReadDirectly | D::HidesFallbacks => {
                support = DirectSupport::Unsupported {
                    reason: "a defect".to_owned(),
                };
            }
            D::ReadsBufferedInstead => return Ok(None),
            _ => {}
        }
        match support {
            DirectSupport::Supported {
                offset_align_bytes,
                memory_align_bytes,
            } => {
                let align = u64::from(offset_align_bytes.max(memory_align_bytes));
                Ok(Some((open_directly(source)?, align)))
            }
            DirectSupport::Unsupported { reason } if policy == DirectPolicy::Required => {
                Err(Error::DirectUnsupported {
                    path: source.path().to_owned(),
                    reason,
                })
            }
            DirectSupport::Unsupported { reason } => {
                if !self.is(D::HidesFallbacks) {
                    stats.fallbacks.push(DirectFallback {
                        path: source.path().to_owned(),
                        reason,
                    });
                }
                Ok(None)
            }
        }
    }

    #[cfg(feature = "async")]
    fn misbehave_in_a_runtime(&self) {
        use tokio::runtime::{Builder, Handle};
        match self.defect {
            D::EntersARuntime => Builder::new_current_thread()
                .build()
                .unwrap()
                .block_on(async {}),
            D::WaitsForATask => {
                if let Ok(handle) = Handle::try_current() {
                    let (done, is_done) = std::sync::mpsc::channel();
                    handle.spawn(async move { done.send(()) });
                    is_done.recv().unwrap();
                }
            }
            _ => {}
        }
    }

    #[cfg(not(feature = "async"))]
    fn misbehave_in_a_runtime(&self) {}

    /// What a backend with something still in flight does.
    fn write_later(targets: Vec<Target>) {
        let Some(target) = targets.into_iter().find(|target| target.len > 0) else {
            return;
        };
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: the checks keep the memory for as long as they wait for a stray write, and this
            // runs for the checks alone that do.
            let read = || unsafe { target.pointer(0).read_volatile() };
            let before = read();
            ready.send(()).unwrap();
            let begin = Instant::now();
            // Once the owner has begun to use the memory, and so will go on to hold it for a while.
            while read() == before && begin.elapsed() < Duration::from_millis(500) {
                std::hint::spin_loop();
            }
            if read() != before {
                target.write(0, &[1]);
            }
        });
        is_ready.recv().unwrap();
    }
}

impl Backend for Reference {
    fn kind(&self) -> BackendKind {
        BackendKind::Sync
    }

    fn read(
        &self,
        mut requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        match self.defect {
            D::KeepsDescriptors => std::mem::forget(File::open("/dev/null").unwrap()),
            D::KeepsThreads => drop(std::thread::spawn(std::thread::park)),
            D::KeepsMemory => std::mem::forget(std::hint::black_box(vec![1_u8; 512 << 10])),
            _ => {}
        }
        assert!(!self.dead.load(Ordering::Relaxed), "the defect's own panic");
        if self.is(D::FailsWhenInterrupted) {
            wait_without_patience();
        }
        assert!(
            !(self.is(D::FailsWithManyWorkers) && params.workers > 128),
            "the defect's own panic"
        );
        let targets = requests
            .iter_mut()
            .map(|request| Target {
                address: request.destination.as_mut_ptr().expose_provenance(),
                len: request.destination.len(),
            })
            .collect();
        let read = || self.read_all(requests, params, control);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
        let writes_later = match &outcome {
            Ok(Ok(_)) => D::WritesAfterSuccess,
            Ok(Err(Error::Cancelled)) => D::WritesAfterCancellation,
            Ok(Err(_)) => D::WritesAfterAnError,
            Err(_) => D::WritesAfterAPanic,
        };
        if self.is(writes_later) {
            Self::write_later(targets);
        }
        match (outcome, self.defect) {
            (Ok(result), _) => result,
            (Err(_), D::SwallowsPanics) => Err(Error::Cancelled),
            (Err(_), D::ReplacesPanics) => panic!("a worker died"),
            (Err(panic), _) => {
                self.dead.store(self.is(D::DiesOfAPanic), Ordering::Relaxed);
                std::panic::resume_unwind(panic)
            }
        }
    }
}

fn end_of(file: &SourceFile, offset: u64, expected_end: u64, actual_end: u64) -> Error {
    Error::UnexpectedEof {
        path: file.path().to_owned(),
        offset,
        expected_end,
        actual_end,
    }
}

/// Fills `buffer` from `offset`, as far as the file goes.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// Opens the same file for direct reads, whatever its path leads to by now.
#[cfg(target_os = "linux")]
fn open_directly(source: &SourceFile) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let descriptor = format!("/proc/self/fd/{}", source.file().as_raw_fd());
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(descriptor)
        .map_err(|error| Error::File {
            operation: "open",
            path: source.path().to_owned(),
            source: error,
        })
}

/// A wait that gives up when it is interrupted, as the wait for a ring's completions may.
#[cfg(target_os = "linux")]
fn wait_without_patience() {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 5_000_000,
    };
    // SAFETY: the time is valid, and the rest of it is not asked for.
    let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
    assert_eq!(result, 0, "the defect's own panic");
}

#[cfg(not(target_os = "linux"))]
fn wait_without_patience() {}

#[cfg(not(target_os = "linux"))]
fn open_directly(source: &SourceFile) -> Result<File> {
    unreachable!("{} has no direct reads", source.path().display())
}
