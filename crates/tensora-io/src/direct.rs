//! Finding out, per file, whether direct I/O works and how aligned it must be.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::Error;

/// A descriptor that bypasses the page cache, and the alignment that it needs.
#[derive(Debug)]
pub(crate) struct DirectFile {
    pub(crate) file: File,
    /// A multiple of `memory_align_bytes`.
    pub(crate) offset_align_bytes: u32,
    pub(crate) memory_align_bytes: u32,
}

/// Why there is no such descriptor.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum DirectRefusal {
    /// The file cannot be read directly.
    #[error("{reason}")]
    Unsupported { reason: String },
    /// Finding out failed, for a reason that may pass.
    #[error("opening it once more for direct I/O failed: {source}{}", crate::error::remedy(.source))]
    Failed { source: Arc<io::Error> },
}

impl DirectRefusal {
    /// The error where direct I/O is required.
    pub(crate) fn into_error(self, path: &Path) -> Error {
        match self {
            Self::Unsupported { reason } => Error::DirectUnsupported {
                path: path.to_owned(),
                reason,
            },
            Self::Failed { source } => Error::File {
                operation: "open for direct I/O",
                path: path.to_owned(),
                source: match source.raw_os_error() {
                    Some(code) => io::Error::from_raw_os_error(code),
                    None => io::Error::new(source.kind(), source),
                },
            },
        }
    }
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
pub(crate) fn open(_path: &Path, _buffered: &File) -> Result<DirectFile, DirectRefusal> {
    Err(DirectRefusal::Unsupported {
        reason: "direct I/O is only supported on Linux".to_owned(),
    })
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
pub(crate) use self::open as open_for_writing;

#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) use linux::{open, open_for_writing, set_blocking};

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod linux {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};
    use rustix::io::{Errno, pread};

    use super::{Arc, DirectFile, DirectRefusal, File, Path, io};
    use crate::Region;

    /// No device in use needs more than this.
    const LARGEST_ALIGN_BYTES: u32 = 64 << 10;
    /// What a probe tries, when the kernel does not tell: logical block sizes.
    const PROBED_ALIGN_BYTES: [u32; 3] = [512, 4096, LARGEST_ALIGN_BYTES];
    /// What is assumed of an empty file, where every read ends at once and a trial shows nothing, and of
    /// one that is written, where a trial would leave something behind.
    const ASSUMED_ALIGN_BYTES: u32 = 4096;

    /// Opens the same file once more, for direct I/O.
    pub(crate) fn open(path: &Path, buffered: &File) -> Result<DirectFile, DirectRefusal> {
        let told = told_alignment(buffered).transpose()?;
        let file = reopen(path, buffered, std::fs::OpenOptions::new().read(true))?;
        let (offset, memory) = match told {
            Some(told) => told,
            None => probe_alignment(&file)?,
        };
        Ok(DirectFile {
            file,
            // Chunks begin where both are kept, and they are cut by offset.
            offset_align_bytes: offset.max(memory),
            memory_align_bytes: memory,
        })
    }

    /// Opens the same file once more, for direct writes beside buffered ones through `buffered`.
    ///
    /// Offsets are aligned to whole pages and blocks at least: what is written through the page cache is written
    /// back a page or block at a time, and would otherwise overwrite what a direct write has put beside it.
    pub(crate) fn open_for_writing(
        path: &Path,
        buffered: &File,
    ) -> Result<DirectFile, DirectRefusal> {
        let told = told_alignment(buffered).transpose()?;
        let file = reopen(path, buffered, std::fs::OpenOptions::new().write(true))?;
        let (offset, memory) = told.unwrap_or((ASSUMED_ALIGN_BYTES, ASSUMED_ALIGN_BYTES));
        let block = file.metadata().map_or(0, |metadata| metadata.blksize());
        let page = rustix::param::page_size() as u64;
        // Of network file systems it is the size of a transfer, which can be anything.
        let unit = |bytes| {
            u32::try_from(bytes)
                .ok()
                .filter(|bytes: &u32| bytes.is_power_of_two() && *bytes <= LARGEST_ALIGN_BYTES)
        };
        let units = [unit(block), unit(page), Some(memory)];
        Ok(DirectFile {
            file,
            offset_align_bytes: units.into_iter().flatten().fold(offset, u32::max),
            memory_align_bytes: memory,
        })
    }

    /// Regular files are never waited for at open; from here on, reads of this one may wait. With the flag
    /// left on, io_uring would take "may not wait" at its word on some file systems.
    pub(crate) fn set_blocking(file: &File) -> io::Result<()> {
        let flags = fcntl_getfl(file)?;
        Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
    }

    /// Through the descriptor, so that it is the same file whatever has become of its path; where
    /// `/proc` cannot be used, by the path.
    fn reopen(
        path: &Path,
        buffered: &File,
        options: &mut std::fs::OpenOptions,
    ) -> Result<File, DirectRefusal> {
        options.custom_flags((OFlags::DIRECT | OFlags::NONBLOCK).bits().cast_signed());
        let by_descriptor = format!("/proc/self/fd/{}", buffered.as_raw_fd());
        let opened = options.open(by_descriptor).or_else(|error| {
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) {
                options.open(path)
            } else {
                Err(error)
            }
        });
        let failed = |source| DirectRefusal::Failed {
            source: Arc::new(source),
        };
        let file = opened.map_err(|error| {
            if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
                unsupported("the file system refuses O_DIRECT")
            } else {
                failed(error)
            }
        })?;
        if !is_same_file(&file, buffered) {
            return Err(unsupported(
                "the path names another file than when it was opened, and /proc is not there to \
                 find the first one again",
            ));
        }
        set_blocking(&file).map_err(failed)?;
        Ok(file)
    }

    fn unsupported(reason: impl Into<String>) -> DirectRefusal {
        DirectRefusal::Unsupported {
            reason: reason.into(),
        }
    }

    fn is_same_file(first: &File, second: &File) -> bool {
        match (first.metadata(), second.metadata()) {
            (Ok(first), Ok(second)) => first.dev() == second.dev() && first.ino() == second.ino(),
            _ => false,
        }
    }

    /// What `statx` says (Linux 6.1), or `None` where it does not say.
    fn told_alignment(file: &File) -> Option<Result<(u32, u32), DirectRefusal>> {
        let facts = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        if facts.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
            return None;
        }
        let (offset, memory) = (facts.stx_dio_offset_align, facts.stx_dio_mem_align);
        if offset == 0 || memory == 0 {
            return Some(Err(unsupported(
                "the file system does not support direct I/O on it",
            )));
        }
        let sound = |align: u32| align.is_power_of_two() && align <= LARGEST_ALIGN_BYTES;
        (sound(offset) && sound(memory)).then_some(Ok((offset, memory)))
    }

    /// Tries reads of growing alignment. Memory gets the same alignment as offsets: that is never too
    /// little, and costs nothing because destinations are page-aligned.
    fn probe_alignment(file: &File) -> Result<(u32, u32), DirectRefusal> {
        let largest = LARGEST_ALIGN_BYTES as usize;
        let mut scratch = Region::allocate_aligned(largest * 2, largest, "a trial buffer")
            .map_err(|error| unsupported(error.to_string()))?;
        for align in PROBED_ALIGN_BYTES {
            // An address that is aligned to `align` and to nothing larger.
            let align_bytes = align as usize;
            let memory = &mut scratch.as_mut_slice()[align_bytes..2 * align_bytes];
            loop {
                match pread(file, &mut *memory, 0) {
                    Ok(0) => return Ok((ASSUMED_ALIGN_BYTES, ASSUMED_ALIGN_BYTES)),
                    Ok(_) => return Ok((align, align)),
                    Err(Errno::INTR) => {}
                    Err(Errno::INVAL) => break,
                    Err(errno) => {
                        return Err(unsupported(format!(
                            "a direct read for trial failed: {errno}"
                        )));
                    }
                }
            }
        }
        Err(unsupported(
            "direct reads of every alignment tried (512, 4096, 65536) are refused",
        ))
    }
}
