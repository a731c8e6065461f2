use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::{Control, Error, Result, SourceFile};

/// Shows that somebody has taken on the contract of exposed mappings. Without one, no [`Mapping`] can
/// be made, so the place where the promise is given can be found by looking for `unsafe`.
#[derive(Clone, Copy, Debug)]
pub struct MappingPermit(());

impl MappingPermit {
    /// Takes the contract on.
    ///
    /// # Safety
    ///
    /// Of every file mapped with this permit or a copy of it: while the mapping, or any [`Bytes`] made of
    /// it, is in use, nobody may truncate the file or write to it, in this process or any other. A write would
    /// change bytes behind a shared reference, which is undefined behaviour; access past a truncated
    /// end, or to a page that the device cannot deliver, kills the process with `SIGBUS`. Replacing the file by renaming another one over it is fine: the
    /// mapping keeps the old one.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

/// A whole file, mapped read-only and shared with the page cache: no copy is made. Clones share the
/// mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    map: Option<Arc<MmapRaw>>,
    path: Arc<Path>,
}

impl Mapping {
    /// Maps `file` from its first byte to its current end. No page is read yet.
    ///
    /// `permit` shows that the caller has taken on the contract of [`MappingPermit::new`] for this file.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the system refuses the mapping.
    pub fn new(file: &SourceFile, _permit: MappingPermit) -> Result<Self> {
        Ok(Self {
            map: map_file(file)?.map(Arc::new),
            path: file.path().into(),
        })
    }

    /// Length of the file when it was mapped, in bytes.
    pub fn len(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.len())
    }

    /// Whether the file was empty when it was mapped.
    pub fn is_empty(&self) -> bool {
        self.map.is_none()
    }

    /// The file's bytes. Reading one whose page is not resident waits for the device.
    pub fn as_slice(&self) -> &[u8] {
        match &self.map {
            // SAFETY: the mapping is `len` bytes long and lives as long as `self`; that its bytes stay
            // as they are is the promise that the permit stands for.
            Some(map) => unsafe { std::slice::from_raw_parts(map.as_ptr(), map.len()) },
            None => &[],
        }
    }

    /// Shares the file as immutable bytes; it is unmapped when the mapping, its clones, and all
    /// slices of these bytes are gone.
    pub fn bytes(&self) -> Bytes {
        if self.is_empty() {
            Bytes::new()
        } else {
            Bytes::from_owner(self.clone())
        }
    }

    /// Brings `ranges` (bytes of the file) into memory and into the page table, by `workers` threads in
    /// chunks of `chunk_bytes`, so that later access neither faults nor waits. For eager use;
    /// [`prefetch`](Self::prefetch) is for lazy use.
    ///
    /// # Errors
    ///
    /// [`Error::UnexpectedEof`] when a range ends past the file, or the file was shortened meanwhile;
    /// [`Error::Read`] when the device fails; [`Error::Cancelled`].
    pub fn populate(
        &self,
        ranges: &[Range<u64>],
        chunk_bytes: u64,
        workers: u32,
        control: &Control,
    ) -> Result<()> {
        let mut chunks = Vec::new();
        for range in ranges.iter().filter(|range| range.start < range.end) {
            if range.end > self.len() as u64 {
                return Err(self.eof(range, self.len() as u64));
            }
            chunks.extend(chunks_of(range, chunk_bytes.max(1)));
        }
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let failure = Mutex::new(None);
        let work = || {
            while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let result = control.check().and_then(|()| self.populate_chunk(chunk));
                if let Err(error) = result {
                    stop.store(true, Ordering::Release);
                    failure
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .get_or_insert(error);
                    return;
                }
                control.advance(chunk.end - chunk.start);
            }
        };
        let threads = (workers.max(1) as usize).min(chunks.len());
        std::thread::scope(|scope| {
            let spawned: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            work();
            for thread in spawned {
                if let Err(panic) = thread.join() {
                    stop.store(true, Ordering::Release);
                    std::panic::resume_unwind(panic);
                }
            }
        });
        failure
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    /// Has the kernel begin to read `range` (bytes of the file) without waiting for it. For lazy use: a
    /// page that is touched before it has arrived is waited for then.
    pub fn prefetch(&self, range: &Range<u64>) {
        let Some(map) = &self.map else {
            return;
        };
        // A range past the end is cut: there is nothing to read ahead there.
        let clamp =
            |position: u64| usize::try_from(position).map_or(map.len(), |at| at.min(map.len()));
        let (start, end) = (clamp(range.start), clamp(range.end));
        if start < end {
            advise(map, WILL_NEED, start..end);
        }
    }

    fn populate_chunk(&self, chunk: &Range<u64>) -> Result<()> {
        let Some(map) = &self.map else {
            return Ok(());
        };
        // Inside the mapping, whose length is a `usize`.
        #[allow(clippy::cast_possible_truncation)]
        let range = chunk.start as usize..chunk.end as usize;
        match populate(map, range.clone()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                // A kernel without `MADV_POPULATE_READ` (before Linux 5.14): touch every page.
                let bytes = &self.as_slice()[range];
                bytes.iter().step_by(4096).for_each(|byte| {
                    std::hint::black_box(*byte);
                });
                Ok(())
            }
            Err(source) => {
                let actual_end = std::fs::metadata(&self.path).map_or(u64::MAX, |file| file.len());
                Err(if actual_end < chunk.end {
                    self.eof(chunk, actual_end)
                } else {
                    Error::Read {
                        path: self.path.to_path_buf(),
                        offset: chunk.start,
                        length: chunk.end - chunk.start,
                        source,
                    }
                })
            }
        }
    }

    fn eof(&self, range: &Range<u64>, actual_end: u64) -> Error {
        Error::UnexpectedEof {
            path: self.path.to_path_buf(),
            offset: range.start,
            expected_end: range.end,
            actual_end,
        }
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Cuts a range where multiples of `chunk_bytes` lie in the file.
fn chunks_of(range: &Range<u64>, chunk_bytes: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    let mut begin = range.start;
    std::iter::from_fn(move || {
        let chunk_end = (begin - begin % chunk_bytes)
            .saturating_add(chunk_bytes)
            .min(end);
        let chunk = begin..chunk_end;
        begin = chunk_end;
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Maps a whole file; `None` for an empty one, which cannot be mapped.
pub(crate) fn map_file(file: &SourceFile) -> Result<Option<MmapRaw>> {
    let len = file.current_len()?;
    if len == 0 {
        return Ok(None);
    }
    let len = usize::try_from(len).map_err(|_| {
        Error::file(
            "map",
            file.path(),
            io::Error::from(io::ErrorKind::FileTooLarge),
        )
    })?;
    let map = MmapOptions::new()
        .len(len)
        .map_raw_read_only(file.file())
        .map_err(|source| Error::file("map", file.path(), source))?;
    // Where the file system keeps large folios, one entry then maps 2 MiB; elsewhere it is refused.
    advise(&map, HUGE, 0..len);
    Ok(Some(map))
}

/// Faults a range of a mapping in. `InvalidInput` where the kernel cannot do that.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) fn populate(map: &MmapRaw, range: Range<usize>) -> io::Result<()> {
    map.advise_range(Advice::PopulateRead, range.start, range.len())
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
pub(crate) fn populate(_map: &MmapRaw, _range: Range<usize>) -> io::Result<()> {
    Err(io::ErrorKind::InvalidInput.into())
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
const HUGE: Option<Advice> = Some(Advice::HugePage);
#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
const HUGE: Option<Advice> = None;
const WILL_NEED: Option<Advice> = Some(Advice::WillNeed);

/// Advice is a wish: where it is refused, everything works as before, only slower.
fn advise(map: &MmapRaw, advice: Option<Advice>, range: Range<usize>) {
    if let Some(advice) = advice {
        let _ = map.advise_range(advice, range.start, range.len());
    }
}
