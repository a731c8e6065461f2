//! Finding out, per file, whether direct I/O works and how aligned it must be.

use std::fs::File;
use std::path::Path;

/// A descriptor that bypasses the page cache, and the alignment that it needs.
#[derive(Debug)]
pub(crate) struct DirectFile {
    pub(crate) file: File,
    pub(crate) offset_align_bytes: u32,
    pub(crate) memory_align_bytes: u32,
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
pub(crate) fn open(_path: &Path, _buffered: &File) -> Result<DirectFile, String> {
    Err("direct I/O is only supported on Linux".to_owned())
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) use linux::open;

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod linux {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    use rustix::fs::{AtFlags, OFlags, StatxFlags, statx};
    use rustix::io::{Errno, pread};

    use super::{DirectFile, File, Path};
    use crate::Region;

    /// No device in use needs more than this.
    const LARGEST_ALIGN_BYTES: u32 = 64 << 10;
    /// What a probe tries, when the kernel does not tell: logical block sizes.
    const PROBED_ALIGN_BYTES: [u32; 3] = [512, 4096, LARGEST_ALIGN_BYTES];

    /// Opens the same file once more, for direct I/O.
    pub(crate) fn open(path: &Path, buffered: &File) -> Result<DirectFile, String> {
        let told = told_alignment(buffered);
        if let Some(Err(reason)) = told {
            return Err(reason);
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::DIRECT | OFlags::NONBLOCK).bits().cast_signed())
            .open(path)
            .map_err(|error| {
                if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
                    "the file system refuses O_DIRECT".to_owned()
                } else {
                    format!("opening it with O_DIRECT failed: {error}")
                }
            })?;
        if !is_same_file(&file, buffered) {
            return Err("the path names another file than when it was opened".to_owned());
        }
        let (offset_align_bytes, memory_align_bytes) = match told {
            Some(told) => told?,
            None => probe_alignment(&file)?,
        };
        Ok(DirectFile {
            file,
            offset_align_bytes,
            memory_align_bytes,
        })
    }

    fn is_same_file(first: &File, second: &File) -> bool {
        match (first.metadata(), second.metadata()) {
            (Ok(first), Ok(second)) => first.dev() == second.dev() && first.ino() == second.ino(),
            _ => false,
        }
    }

    /// What `statx` says (Linux 6.1), or `None` where it does not say.
    fn told_alignment(file: &File) -> Option<Result<(u32, u32), String>> {
        let facts = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        if facts.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
            return None;
        }
        let (offset, memory) = (facts.stx_dio_offset_align, facts.stx_dio_mem_align);
        if offset == 0 || memory == 0 {
            return Some(Err(
                "the file system does not support direct I/O on it".to_owned()
            ));
        }
        let sound = |align: u32| align.is_power_of_two() && align <= LARGEST_ALIGN_BYTES;
        (sound(offset) && sound(memory)).then_some(Ok((offset, memory)))
    }

    /// Tries reads of growing alignment. Memory gets the same alignment as offsets: that is never too
    /// little, and costs nothing because destinations are page-aligned.
    fn probe_alignment(file: &File) -> Result<(u32, u32), String> {
        let largest = LARGEST_ALIGN_BYTES as usize;
        let mut scratch = Region::allocate_aligned(largest * 2, largest, "a trial buffer")
            .map_err(|error| error.to_string())?;
        for align in PROBED_ALIGN_BYTES {
            // An address that is aligned to `align` and to nothing larger.
            let align_bytes = align as usize;
            let memory = &mut scratch.as_uninit_mut()[align_bytes..2 * align_bytes];
            loop {
                match pread(file, &mut *memory, 0) {
                    Ok(_) => return Ok((align, align)),
                    Err(Errno::INTR) => {}
                    Err(Errno::INVAL) => break,
                    Err(errno) => return Err(format!("a direct read for trial failed: {errno}")),
                }
            }
        }
        Err("direct reads of every alignment tried (512, 4096, 65536) are refused".to_owned())
    }
}
