use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::fault_around::ByWindows;
use crate::workers::{Crew, chunks_of, lock};
use crate::{Control, Error, Result, SourceFile, TransferParams};

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
    /// end, or to a page that the device cannot deliver, raises `SIGBUS`, which kills a process that has no handler
    /// for it; this library installs none. Replacing the file by renaming another one over it is fine: the mapping
    /// keeps the old one.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

/// How a mapping is populated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PopulateParams {
    /// What one thread brings in at a time, in bytes; at least a page.
    pub chunk_bytes: u64,
    /// Threads, the calling one among them; 0 counts as 1.
    pub workers: u32,
    /// Whether the caller has just found all of it in the page cache, or all of a sample, so that nobody needs to ask again.
    /// Where that is wrong, or not true any more, populating takes longer, and nothing else comes of it.
    pub known_resident: bool,
}

/// A whole file, mapped read-only and shared with the page cache: no copy is made. Clones share the
/// mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    map: Option<Arc<MmapRaw>>,
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

    /// Brings `ranges` (bytes of the file) into memory and into the page table, so that later access
    /// neither faults nor waits. For eager use; [`prefetch`](Self::prefetch) is for lazy use. `file` is the one that was mapped.
    ///
    /// # Errors
    ///
    /// [`Error::UnexpectedEof`] when a range ends past the file, or the file was shortened meanwhile;
    /// [`Error::Read`] when the device fails; [`Error::Thread`]; [`Error::Cancelled`].
    ///
    /// # Panics
    ///
    /// A panic of a progress callback is passed on.
    pub fn populate(
        &self,
        file: &SourceFile,
        ranges: &[Range<u64>],
        params: &PopulateParams,
        control: &Control,
    ) -> Result<()> {
        let mapped_end = self.len() as u64;
        if let Some(range) = ranges.iter().find(|range| range.end > mapped_end) {
            return Err(eof(file, range, mapped_end));
        }
        let chunk_bytes = params.chunk_bytes.max(TransferParams::MIN_CHUNK_BYTES);
        let chunk_count: u64 = ranges
            .iter()
            .map(|range| range.end.saturating_sub(range.start).div_ceil(chunk_bytes))
            .sum();
        let chunks = Mutex::new(
            ranges
                .iter()
                .flat_map(|range| chunks_of(range, chunk_bytes)),
        );
        let by_windows = ByWindows::new(params.known_resident);
        let crew = Crew::default();
        let threads = u64::from(params.workers.max(1)).min(chunk_count);
        crew.run("tensora-populate", threads, &|| {
            while !crew.is_stopped() {
                let Some(chunk) = lock(&chunks).next() else {
                    return;
                };
                let done = control
                    .check()
                    .and_then(|()| self.populate_chunk(file, &chunk, by_windows.as_ref()));
                match done {
                    Ok(()) => control.advance(chunk.end - chunk.start),
                    Err(error) => crew.fail(error),
                }
            }
        });
        crew.finish()
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

    fn populate_chunk(
        &self,
        file: &SourceFile,
        chunk: &Range<u64>,
        by_windows: Option<&ByWindows>,
    ) -> Result<()> {
        let Some(map) = &self.map else {
            return Ok(());
        };
        // Inside the mapping, whose length is a `usize`.
        #[allow(clippy::cast_possible_truncation)]
        let range = chunk.start as usize..chunk.end as usize;
        if by_windows.is_some_and(|by_windows| by_windows.populate(file, map, &range)) {
            return Ok(());
        }
        match populate(map, range.clone()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                // A kernel without `MADV_POPULATE_READ` (before Linux 5.14): touch every page.
                let bytes = &self.as_slice()[range];
                for byte in bytes
                    .iter()
                    .step_by(SMALLEST_PAGE_BYTES)
                    .chain(bytes.last())
                {
                    std::hint::black_box(*byte);
                }
                Ok(())
            }
            Err(source) => {
                let actual_end = file.current_len()?;
                if actual_end < chunk.end {
                    return Err(eof(file, chunk, actual_end));
                }
                // The page is there by the file's length, but could not be brought in.
                let failed_device = source.raw_os_error() == Some(EFAULT);
                Err(Error::Read {
                    path: file.path().to_owned(),
                    offset: chunk.start,
                    length: chunk.end - chunk.start,
                    source: if failed_device {
                        io::Error::from_raw_os_error(EIO)
                    } else {
                        source
                    },
                })
            }
        }
    }
}

/// The same numbers on every Unix.
const EIO: i32 = 5;
const EFAULT: i32 = 14;
/// No system has smaller pages.
const SMALLEST_PAGE_BYTES: usize = 4096;

fn eof(file: &SourceFile, range: &Range<u64>, actual_end: u64) -> Error {
    Error::UnexpectedEof {
        path: file.path().to_owned(),
        offset: range.start,
        expected_end: range.end,
        actual_end,
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
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
