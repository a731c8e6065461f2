//! What of a file is in the page cache.

use std::ops::Range;

use crate::{Error, Result, SourceFile};

impl SourceFile {
    /// How many bytes of `range` are in the page cache; `None` when the system does not tell.
    ///
    /// `range` is in bytes from the start of the file, and is cut off at the length that the file had when
    /// it was opened. Of pages that the range covers in part, only that part counts, so the answer for a
    /// fully resident range is its length. It is a snapshot: pages come and go.
    ///
    /// On Linux 6.5 and later (`cachestat`) it takes microseconds where nothing is there or pages are kept in large folios,
    /// and some 20 ms per gigabyte where they are kept one by one; before, and on stacked and user-space file
    /// systems, milliseconds per gigabyte (`mincore`). Linux tells only those who own the file or may
    /// write to it.
    pub fn resident_bytes(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.len());
        sys::resident_bytes(self, range.start.min(end)..end)
    }

    /// The same, if `cachestat` tells: cheap enough to ask about many short ranges. `None` where only `mincore` could, which maps
    /// what it is asked about, or nobody does.
    pub(crate) fn quick_resident_bytes(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.len());
        sys::quick_resident_bytes(self, range.start.min(end)..end)
    }

    /// Asks the system to drop a range from the page cache. Nothing depends on whether it does.
    #[cfg_attr(
        not(all(target_os = "linux", not(tensora_portable))),
        allow(clippy::unused_self)
    )]
    pub(crate) fn drop_resident(&self, range: Range<u64>) {
        let _ = sys::drop_range(self.file(), range);
    }

    /// Asks the system to drop the whole file from the page cache, for measurements of cold reads.
    ///
    /// This is a request. Pages that were written but not yet stored stay, as do pages that somebody has
    /// mapped, and file systems in memory never drop any; see what became of it with
    /// [`resident_bytes`](Self::resident_bytes). Nothing is written out: sync first what was just written.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the system refuses the request or has no such thing.
    pub fn evict(&self) -> Result<()> {
        sys::evict(self.file()).map_err(|source| Error::file("evict", self.path(), source))
    }
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
mod sys {
    use std::fs::File;
    use std::io;
    use std::ops::Range;

    use crate::SourceFile;

    pub(super) fn resident_bytes(_file: &SourceFile, _range: Range<u64>) -> Option<u64> {
        None
    }

    pub(super) fn quick_resident_bytes(_file: &SourceFile, _range: Range<u64>) -> Option<u64> {
        None
    }

    pub(super) fn evict(_file: &File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn drop_range(_file: &File, _range: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[allow(unsafe_code)]
mod sys {
    use std::fs::File;
    use std::io;
    use std::ops::Range;
    use std::os::fd::AsRawFd;
    use std::ptr::NonNull;

    use rustix::fs::{Advice, fadvise};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use crate::storage::class_by_magic;
    use crate::{FileSystemClass, SourceFile};

    pub(super) fn evict(file: &File) -> io::Result<()> {
        Ok(fadvise(file, 0, None, Advice::DontNeed)?)
    }

    pub(super) fn drop_range(file: &File, range: Range<u64>) -> io::Result<()> {
        // A length of 0 would mean everything up to the end.
        let Some(len) = std::num::NonZero::new(range.end.saturating_sub(range.start)) else {
            return Ok(());
        };
        Ok(fadvise(file, range.start, Some(len), Advice::DontNeed)?)
    }

    /// `range` lies inside the file.
    pub(super) fn resident_bytes(file: &SourceFile, range: Range<u64>) -> Option<u64> {
        quick_resident_bytes(file, range.clone()).or_else(|| by_mincore(file.file(), range))
    }

    /// `range` lies inside the file.
    pub(super) fn quick_resident_bytes(file: &SourceFile, range: Range<u64>) -> Option<u64> {
        // On a stacked file system the pages belong to the file below, and `cachestat`, asked about the
        // file above, answers 0. A mapping refers to the file that holds the pages.
        let stacked = matches!(
            class_by_magic(file),
            Some(FileSystemClass::Overlay | FileSystemClass::Fuse)
        );
        if stacked {
            return None;
        }
        by_cachestat(file.file(), range)
    }

    fn by_cachestat(file: &File, range: Range<u64>) -> Option<u64> {
        bytes_of_pages(range, page_bytes(), |pages| cachestat(file, pages))
    }

    fn by_mincore(file: &File, range: Range<u64>) -> Option<u64> {
        mincore_tells(file)?;
        bytes_of_pages(range, page_bytes(), |pages| mincore(file, pages))
    }

    fn page_bytes() -> u64 {
        rustix::param::page_size() as u64
    }

    /// Turns counts of resident pages into bytes of `range`. `resident_pages` counts in a range of whole
    /// pages, given in bytes.
    fn bytes_of_pages(
        range: Range<u64>,
        page_bytes: u64,
        mut resident_pages: impl FnMut(Range<u64>) -> Option<u64>,
    ) -> Option<u64> {
        if range.is_empty() {
            return Some(0);
        }
        let length = range.end - range.start;
        let start = range.start - range.start % page_bytes;
        let end = range.end.checked_next_multiple_of(page_bytes)?;
        let pages = resident_pages(start..end)?.min((end - start) / page_bytes);
        if pages == 0 || pages == (end - start) / page_bytes {
            return Some(if pages == 0 { 0 } else { length });
        }
        // Some are and some are not: the first and the last page may count in part.
        let mut bytes = pages * page_bytes;
        if start < range.start {
            bytes = bytes
                .saturating_sub(resident_pages(start..start + page_bytes)? * (range.start - start));
        }
        if range.end < end {
            bytes =
                bytes.saturating_sub(resident_pages(end - page_bytes..end)? * (end - range.end));
        }
        Some(bytes.min(length))
    }

    /// `cachestat(2)`, Linux 6.5. Neither libc nor rustix wraps it everywhere yet.
    fn cachestat(file: &File, pages: Range<u64>) -> Option<u64> {
        #[repr(C)]
        struct CachestatRange {
            off: u64,
            len: u64,
        }
        #[repr(C)]
        #[derive(Default)]
        struct Cachestat {
            nr_cache: u64,
            nr_dirty: u64,
            nr_writeback: u64,
            nr_evicted: u64,
            nr_recently_evicted: u64,
        }

        // The number is the same on all architectures but a few old ones, which do without.
        const NUMBER: libc::c_long = 451;
        if !cfg!(any(
            all(target_arch = "x86_64", target_pointer_width = "64"),
            target_arch = "x86",
            target_arch = "aarch64",
            target_arch = "arm",
            target_arch = "riscv64",
            target_arch = "loongarch64",
            target_arch = "powerpc64",
            target_arch = "s390x",
        )) {
            return None;
        }
        let range = CachestatRange {
            off: pages.start,
            len: pages.end - pages.start,
        };
        let mut answer = Cachestat::default();
        // SAFETY: the kernel reads one `cachestat_range` and writes one `cachestat`; both structures
        // have its layout and outlive the call. No flags are set, and the descriptor is open.
        let result = unsafe {
            libc::syscall(
                NUMBER,
                file.as_raw_fd(),
                &raw const range,
                &raw mut answer,
                0 as libc::c_uint,
            )
        };
        (result == 0).then_some(answer.nr_cache)
    }

    /// How much is mapped at once: the answer takes a byte per page.
    const WINDOW_BYTES: u64 = 1 << 30;

    fn mincore(file: &File, pages: Range<u64>) -> Option<u64> {
        let mut resident = 0;
        let mut start = pages.start;
        while start < pages.end {
            let length = WINDOW_BYTES.min(pages.end - start);
            let mapping = Mapping::new(file, start, usize::try_from(length).ok()?)?;
            resident += mapping.resident_pages()?;
            start += length;
        }
        Some(resident)
    }

    /// Whether `mincore` speaks the truth about this file. To those who may not know, it says that every
    /// page is resident, and so do some sandboxes. A page far behind the end of the file, where no huge
    /// page of its end can reach, never is: `mincore` is asked about that one.
    fn mincore_tells(file: &File) -> Option<()> {
        let page_bytes = page_bytes();
        let length = file.metadata().ok()?.len();
        let behind = length
            .checked_next_multiple_of(page_bytes)?
            .checked_add(WINDOW_BYTES)?;
        let witness = Mapping::new(file, behind, usize::try_from(page_bytes).ok()?)?;
        (witness.resident_pages()? == 0).then_some(())
    }

    /// A part of a file, mapped and never accessed.
    struct Mapping {
        start: NonNull<u8>,
        length: usize,
    }

    impl Mapping {
        /// `offset` is a multiple of the page size, `length` is not 0.
        fn new(file: &File, offset: u64, length: usize) -> Option<Self> {
            // SAFETY: no address is asked for, so the kernel picks one that nothing else uses. Nothing
            // ever refers to the memory; that its content can change or vanish is therefore harmless.
            let start = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    length,
                    ProtFlags::READ,
                    MapFlags::SHARED,
                    file,
                    offset,
                )
            };
            Some(Self {
                start: NonNull::new(start.ok()?.cast())?,
                length,
            })
        }

        fn resident_pages(&self) -> Option<u64> {
            let pages = self.length.div_ceil(rustix::param::page_size());
            let mut answer = vec![0u8; pages];
            // SAFETY: the range is the mapping that `self` owns, and the kernel writes one byte for each of
            // its pages, for which `answer` has room. The memory itself is not accessed.
            let result = unsafe {
                libc::mincore(self.start.as_ptr().cast(), self.length, answer.as_mut_ptr())
            };
            // The other bits are reserved.
            (result == 0).then(|| answer.iter().map(|flags| u64::from(flags & 1)).sum())
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: `start` and `length` are those of the mapping made in `new`; nothing refers to it.
            let result = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
            debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
        }
    }

    #[cfg(test)]
    mod tests {
        use std::io::Write;

        use proptest::prelude::*;

        use super::*;
        use crate::skip_support::skip;

        proptest! {
            #[test]
            fn counts_bytes_as_a_naive_count_does(
                resident in prop::collection::vec(any::<bool>(), 1..12),
                page_bytes in prop::sample::select(vec![8u64, 16]),
                first in 0u64..200,
                second in 0u64..200,
            ) {
                let length = resident.len() as u64 * page_bytes;
                let (start, end) = (first.min(second).min(length), first.max(second).min(length));
                let is_resident = |byte: u64| {
                    resident[usize::try_from(byte / page_bytes).unwrap()]
                };
                let naive = (start..end).filter(|&byte| is_resident(byte)).count() as u64;
                let counted = bytes_of_pages(start..end, page_bytes, |pages| {
                    assert!(pages.start % page_bytes == 0 && pages.end % page_bytes == 0);
                    assert!(pages.start < pages.end && pages.end <= length);
                    Some(pages.step_by(usize::try_from(page_bytes).unwrap())
                        .filter(|&byte| is_resident(byte))
                        .count() as u64)
                });
                prop_assert_eq!(counted, Some(naive));
            }
        }

        #[test]
        fn what_changes_meanwhile_neither_panics_nor_exceeds_the_range() {
            let mut answers = [1, 7, 7].into_iter();
            let counted = bytes_of_pages(3..17, 8, |_| answers.next());
            assert_eq!(counted, Some(0));
            assert_eq!(bytes_of_pages(3..17, 8, |_| Some(99)), Some(14));
            assert_eq!(bytes_of_pages(3..17, 8, |_| None), None);
            assert_eq!(bytes_of_pages(u64::MAX - 1..u64::MAX, 8, |_| Some(1)), None);
        }

        /// A file of a few pages and a part of one, of which some pages are resident.
        fn partly_resident() -> tempfile::NamedTempFile {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            let length = usize::try_from(64 * page_bytes()).unwrap() + 100;
            file.write_all(&vec![1; length]).unwrap();
            file.as_file().sync_all().unwrap();
            // Drops half of it; what a file system without eviction keeps does not matter here.
            let half = std::num::NonZero::new(32 * page_bytes());
            fadvise(file.as_file(), 0, half, Advice::DontNeed).unwrap();
            file
        }

        #[test]
        fn both_ways_agree() {
            let file = partly_resident();
            let file = file.as_file();
            let length = file.metadata().unwrap().len();
            let page = page_bytes();
            let by_mincore =
                |range| by_mincore(file, range).expect("mincore tells about an own file");
            if cachestat(file, 0..page).is_none() {
                skip("cachestat and mincore agree: no cachestat(2) here");
                return;
            }
            for range in [
                0..length,
                0..0,
                0..1,
                length - 1..length,
                31 * page + 5..33 * page + 7,
                32 * page..length - 50,
                40 * page + 1..40 * page + 2,
            ] {
                assert_eq!(
                    by_cachestat(file, range.clone()),
                    Some(by_mincore(range.clone())),
                    "{range:?}"
                );
            }
            assert!(by_mincore(32 * page..length) > 0);
        }

        #[test]
        fn long_files_are_looked_at_window_by_window() {
            // A hole of one and a half windows, read in two places.
            let file = tempfile::NamedTempFile::new().unwrap();
            let file = file.as_file();
            let length = WINDOW_BYTES + WINDOW_BYTES / 2;
            file.set_len(length).unwrap();
            let mut byte = [0];
            for offset in [0, length - 1] {
                std::os::unix::fs::FileExt::read_exact_at(file, &mut byte, offset).unwrap();
            }
            let all = by_mincore(file, 0..length).unwrap();
            let first = by_mincore(file, 0..WINDOW_BYTES).unwrap();
            let second = by_mincore(file, WINDOW_BYTES..length).unwrap();
            assert!(first > 0 && second > 0, "{first} + {second}");
            assert_eq!(all, first + second);
            assert!(all < length / 2, "{all}");
        }

        #[test]
        fn nothing_is_resident_behind_the_end() {
            let file = partly_resident();
            let end = 65 * page_bytes();
            assert_eq!(
                mincore(file.as_file(), end..end + 4 * page_bytes()),
                Some(0)
            );
            assert_eq!(mincore_tells(file.as_file()), Some(()));
        }
    }
}
