use std::io;
use std::sync::OnceLock;

use memmap2::MmapRaw;

use crate::mapping::{map_file, populate};
use crate::transfer::{Next, Operation, Transfer};
use crate::{
    Backend, BackendKind, Control, DirectPolicy, Error, ReadRequest, ReadStats, Result, SourceFile,
    TransferParams, positioned, probe,
};

/// Memory mapping: populates the page cache through a mapping, in parallel, and copies out of it.
///
/// For destinations that must be owned. Where a mapping may be exposed itself, [`Mapping`](crate::Mapping)
/// spares the copy. The copy is made by the kernel (`process_vm_readv` on the own process), so a file
/// that is truncated or fails while it is copied gives an error and never a `SIGBUS`.
#[derive(Clone, Copy, Debug)]
pub struct MmapBackend(());

impl MmapBackend {
    /// The backend; its mappings live only as long as a batch.
    ///
    /// # Errors
    ///
    /// [`Error::BackendUnavailable`], with the reason and what to do, when copying out of a mapping is not
    /// possible here.
    pub fn new() -> Result<Self> {
        probe::try_self_copy().map_err(|error| {
            let (reason, remedy) = probe::mmap_unavailable(&error);
            Error::BackendUnavailable {
                backend: BackendKind::Mmap,
                reason,
                remedy,
            }
        })?;
        Ok(Self(()))
    }
}

impl Backend for MmapBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Mmap
    }

    /// As [`Backend::read`]. A mapping always goes through the page cache:
    /// [`DirectPolicy::Required`] is an error, and `Preferred` reads as `Never` does, with a fallback noted
    /// for each file.
    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        let preferred = match params.direct {
            DirectPolicy::Never => false,
            DirectPolicy::Preferred => true,
            DirectPolicy::Required => {
                let file = requests
                    .iter()
                    .find(|request| !request.destination.is_empty());
                if let Some(request) = file {
                    return Err(Error::DirectUnsupported {
                        path: request.file.path().to_owned(),
                        reason: THROUGH_THE_CACHE.to_owned(),
                    });
                }
                false
            }
        };
        let params = TransferParams {
            direct: DirectPolicy::Never,
            ..*params
        };
        let transfer = Transfer::new(requests, &params, control)?;
        let maps: Vec<_> = transfer.sources().map(MappedSource::new).collect();
        transfer.run(self.kind(), params.workers, &|| {
            while let Some(operation) = transfer.next() {
                copy(&transfer, &maps, operation);
            }
        });
        let mut fallbacks = Vec::new();
        if preferred {
            fallbacks.extend(maps.iter().map(|map| crate::DirectFallback {
                path: map.file.path().to_owned(),
                reason: THROUGH_THE_CACHE.to_owned(),
            }));
        }
        let mut stats = transfer.finish()?;
        stats.fallbacks = fallbacks;
        Ok(stats)
    }
}

const THROUGH_THE_CACHE: &str = "the mmap backend reads through the page cache";

/// A file of the batch, mapped when the first operation needs it.
#[derive(Debug)]
struct MappedSource<'a> {
    file: &'a SourceFile,
    map: OnceLock<Option<MmapRaw>>,
}

impl<'a> MappedSource<'a> {
    fn new(file: &'a SourceFile) -> Self {
        Self {
            file,
            map: OnceLock::new(),
        }
    }

    /// The mapping, or `None` when the file is empty by now.
    fn map(&self) -> Result<Option<&MmapRaw>> {
        if self.map.get().is_none() {
            let made = map_file(self.file)?;
            // Another worker may have been faster; then this mapping is dropped again.
            let _ = self.map.set(made);
        }
        Ok(self.map.get().and_then(Option::as_ref))
    }
}

/// Populates and copies one operation's range.
fn copy(transfer: &Transfer<'_>, maps: &[MappedSource<'_>], mut operation: Operation) {
    let source = &maps[transfer.file_index(&operation)];
    let map = match source.map() {
        Ok(map) => map,
        Err(error) => return transfer.fail(error),
    };
    loop {
        let result = match map {
            Some(map) => copy_rest(source.file, map, &operation),
            None => Ok(0),
        };
        let next = transfer.returned(&mut operation, None, result);
        if next != Next::Again || transfer.should_stop() {
            return;
        }
    }
}

/// Copies what is left of the operation; the count of bytes copied, 0 when the file ends before them.
fn copy_rest(file: &SourceFile, map: &MmapRaw, operation: &Operation) -> io::Result<usize> {
    // A mapping of this length was made, so offsets inside it fit.
    #[allow(clippy::cast_possible_truncation)]
    let begin = operation.position() as usize;
    let (memory, len) = operation.memory(None);
    let len = len.min(map.len().saturating_sub(begin));
    if len == 0 {
        return Ok(0);
    }
    // Populating first lets the kernel read ahead in large pieces. Where it fails, the copy says why.
    let _ = populate(map, begin..begin + len);
    let local = libc::iovec {
        iov_base: memory.cast(),
        iov_len: len,
    };
    let remote = libc::iovec {
        iov_base: map.as_ptr().wrapping_add(begin).cast_mut().cast(),
        iov_len: len,
    };
    let own = rustix::process::getpid().as_raw_pid();
    // SAFETY: the kernel writes `len` bytes to `memory`: an operation is taken from its transfer once, so
    // this thread alone has that memory, and the transfer borrows the destinations. It only reads from
    // the mapping, checking each page as it goes, so one that cannot be had is an error here.
    let copied =
        unsafe { libc::process_vm_readv(own, &raw const local, 1, &raw const remote, 1, 0) };
    let copied = usize::try_from(copied).map_err(|_| io::Error::last_os_error());
    forget(map, begin..begin + len);
    // A page that the file has come to end in since it was mapped reads as zeros behind that end:
    // only what the file still has counts.
    let file_end = file.current_len().map_err(io::Error::other)?;
    let there = usize::try_from(file_end.saturating_sub(begin as u64)).unwrap_or(usize::MAX);
    match copied {
        Ok(copied) => Ok(copied.min(there)),
        Err(error) if error.raw_os_error() != Some(libc::EFAULT) => Err(error),
        Err(_) if there < len => Ok(0),
        // The page is there by the file's length, but could not be brought in. The fault does not say why, not even
        // whether it was for the moment; a read of the page does, or brings it in after all.
        Err(_) => {
            let len = len.min(rustix::param::page_size());
            // SAFETY: `memory` is this operation's alone, as above, and has at least `len` bytes.
            unsafe { positioned::read_at(file.file(), memory, len, begin as u64) }
        }
    }
}

/// Takes a range out of the page table again. Its pages stay in the page cache; but as long as they are mapped
/// they count as resident memory of this process, beside the destination.
fn forget(map: &MmapRaw, range: std::ops::Range<usize>) {
    // SAFETY: no reference into the mapping exists, here or elsewhere: only the kernel copies out of it,
    // and it faults a page in again if another worker still needs it. The mapping is of a file and
    // read-only, so no content is lost.
    let forgotten = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
    };
    // Refused for locked memory (`mlockall`), which then simply stays resident.
    drop(forgotten);
}
