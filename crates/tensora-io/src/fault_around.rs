//! Populating by windows: a page fault in a file's mapping enters the resident pages around it into the page table,
//! too ("fault-around", 64 KiB unless the administrator says otherwise). Asking for one page of each window instead of all
//! spares the kernel a walk for each of the others; with small folios, mapping and populating then takes 0.80 to 0.92 of the
//! time, and 0.71 of that where the page table is looked at by ranges and nobody needs to ask
//! what is resident (benches/runs/2026-11-28-memory-and-pages.md).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::MmapRaw;

use crate::SourceFile;
use crate::mapping::populate;

/// What Linux faults in around a page, and how the windows are aligned, in bytes of the address space: its default
/// since 3.15. The setting itself is for root's eyes only, so what came of it is looked at each time.
const WINDOW_BYTES: usize = 64 << 10;
const ENTRY_BYTES: usize = 8;
/// After so many failures in a row the kernel does not fault around here. Fewer may be large folios that somebody has
/// locked.
const MAX_FAILURES: u32 = 4;
/// The bit of an entry that says that the page is in the page table.
const PRESENT: u64 = 1 << 63;

/// Populates chunks of resident pages by windows, as long as that works.
pub(crate) struct ByWindows {
    /// The page table of this process, as the kernel shows it.
    pagemap: File,
    page_bytes: usize,
    /// The caller has found everything in the page cache, or all of a sample, so that chunks are not asked about.
    known_resident: bool,
    /// Chunks in a row of which most pages stayed away.
    failures: AtomicU32,
}

impl ByWindows {
    /// `None` where the page table cannot be seen, or a window is no more than a page.
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    pub(crate) fn new(known_resident: bool) -> Option<Self> {
        let page_bytes = rustix::param::page_size();
        if page_bytes >= WINDOW_BYTES {
            return None;
        }
        Some(Self {
            pagemap: File::open("/proc/self/pagemap").ok()?,
            page_bytes,
            known_resident,
            failures: AtomicU32::new(0),
        })
    }

    #[cfg(not(all(target_os = "linux", not(tensora_portable))))]
    pub(crate) fn new(_known_resident: bool) -> Option<Self> {
        None
    }

    /// Brings a chunk into the page table and says whether all of it is there. It is not where pages are not resident,
    /// which would be read a window at a time, far slower than the device; where the kernel leaves some out because
    /// they are locked or marked for read-ahead; and where it does not fault around at all. Then nothing is lost but
    /// a little time: the caller populates it as a whole, and hears about errors there.
    pub(crate) fn populate(&self, file: &SourceFile, map: &MmapRaw, chunk: &Range<usize>) -> bool {
        let in_file = chunk.start as u64..chunk.end as u64;
        self.failures.load(Ordering::Relaxed) < MAX_FAILURES
            && (self.known_resident || file.resident_bytes(in_file) == Some(chunk.len() as u64))
            && self.fault_in(map, chunk).unwrap_or(false)
    }

    fn fault_in(&self, map: &MmapRaw, chunk: &Range<usize>) -> io::Result<bool> {
        let base = map.as_ptr() as usize;
        let mut at = chunk.start;
        let mut is_first = true;
        while at < chunk.end {
            // The last page of each window: the window at the start of a mapping reaches into the next, whose first page
            // then would not fault any more, and so bring nothing in.
            at = (at + WINDOW_BYTES - (base + at) % WINDOW_BYTES).min(chunk.end);
            populate(map, at - 1..at)?;
            let next_window = base + at + WINDOW_BYTES - 1;
            if is_first
                && next_window < base + chunk.end
                && self.missing(next_window / self.page_bytes, 1)? == 0
            {
                // One fault brought more in than a window: entries of 2 MiB, or the chunk is there already. As a whole
                // that is quicker.
                return Ok(false);
            }
            is_first = false;
        }
        let first_page = (base + chunk.start) / self.page_bytes;
        let page_count = (base + chunk.end).div_ceil(self.page_bytes) - first_page;
        let missing = self.missing(first_page, page_count)?;
        if missing > page_count / 2 {
            self.failures.fetch_add(1, Ordering::Relaxed);
        } else {
            self.failures.store(0, Ordering::Relaxed);
        }
        Ok(missing == 0)
    }

    /// How many of these pages of the address space are not in the page table.
    fn missing(&self, first_page: usize, page_count: usize) -> io::Result<usize> {
        let addresses = first_page * self.page_bytes..(first_page + page_count) * self.page_bytes;
        if let Ok(missing_bytes) = scan::missing_bytes(&self.pagemap, addresses) {
            return Ok(missing_bytes / self.page_bytes);
        }
        self.missing_by_entries(first_page, page_count)
    }

    /// The same before Linux 6.7. An entry tells more than its bit, and the kernel looks at every page to say it.
    fn missing_by_entries(&self, first_page: usize, page_count: usize) -> io::Result<usize> {
        let mut entries = vec![0; page_count * ENTRY_BYTES];
        read_at(&self.pagemap, &mut entries, first_page * ENTRY_BYTES)?;
        let (entries, _) = entries.as_chunks();
        let is_missing = |entry: &&[u8; ENTRY_BYTES]| u64::from_ne_bytes(**entry) & PRESENT == 0;
        Ok(entries.iter().filter(is_missing).count())
    }
}

/// What is in the page table, by ranges (`PAGEMAP_SCAN`, Linux 6.7). Neither libc nor rustix wraps it yet.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[allow(unsafe_code)]
mod scan {
    use std::fs::File;
    use std::io;
    use std::ops::Range;

    use rustix::ioctl::{Updater, ioctl, opcode};

    /// Ranges that one call can return.
    pub(super) const REGIONS: usize = 32;
    /// The category of pages that are in memory and in the page table.
    const PRESENT: u64 = 1 << 3;
    /// Numbers the request, with [`GROUP`].
    const NUMBER: u8 = 16;
    const GROUP: u8 = b'f';

    /// `struct page_region`, in bytes of the address space.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Region {
        start: u64,
        end: u64,
        categories: u64,
    }

    /// `struct pm_scan_arg`.
    #[repr(C)]
    struct Request {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        regions: u64,
        region_count: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_any_of: u64,
        returned: u64,
    }

    const OPCODE: rustix::ioctl::Opcode = opcode::read_write::<Request>(GROUP, NUMBER);

    /// How many bytes of `addresses`, which are whole pages, are not in the page table of the process that `pagemap`
    /// belongs to.
    pub(super) fn missing_bytes(pagemap: &File, addresses: Range<usize>) -> io::Result<usize> {
        let mut missing = 0;
        let mut start = addresses.start as u64;
        let end = addresses.end as u64;
        while start < end {
            let mut regions = [Region::default(); REGIONS];
            let mut request = Request {
                size: size_of::<Request>() as u64,
                flags: 0,
                start,
                end,
                walk_end: 0,
                regions: regions.as_mut_ptr().expose_provenance() as u64,
                region_count: REGIONS as u64,
                max_pages: 0,
                // Pages that lack the category.
                category_inverted: PRESENT,
                category_mask: PRESENT,
                category_any_of: 0,
                returned: PRESENT,
            };
            // SAFETY: the number is that of `PAGEMAP_SCAN`, which reads and writes a `pm_scan_arg`; `Request` has its layout.
            let scan = unsafe { Updater::<OPCODE, _>::new(&mut request) };
            // SAFETY: the kernel writes at most `region_count` of `page_region` to `regions`, which has their layout, has
            // room for so many and outlives the call; nothing else refers to it during the call. Without flags no page
            // is changed. A file that is no page map refuses the request.
            unsafe { ioctl(pagemap, scan) }?;
            if request.walk_end <= start {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // The kernel says how many it wrote by what it returns, which `Updater` drops; what it did not write is empty.
            missing += regions
                .iter()
                .map(|region| region.end.saturating_sub(region.start))
                .sum::<u64>();
            start = request.walk_end;
        }
        usize::try_from(missing).map_err(io::Error::other)
    }
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
mod scan {
    use std::fs::File;
    use std::io;
    use std::ops::Range;

    pub(super) fn missing_bytes(_pagemap: &File, _addresses: Range<usize>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], position: usize) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, position as u64)
}

#[cfg(not(unix))]
fn read_at(_file: &File, _into: &mut [u8], _position: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(test, target_os = "linux", not(tensora_portable)))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::mapping::map_file;
    use crate::skip_support::skip;

    const LEN: usize = 1 << 20;
    const PIECE_BYTES: usize = 16 << 10;

    /// A file that is resident, and a new mapping of it.
    fn mapped() -> (tempfile::NamedTempFile, SourceFile, MmapRaw) {
        let kept = tempfile::NamedTempFile::new().unwrap();
        // Piece by piece, for small folios: of one that holds the end of the file, the first fault of a page table may
        // bring in a single page (Linux 6.18).
        let mut writer = kept.as_file();
        for _ in 0..LEN / PIECE_BYTES {
            writer.write_all(&[7; PIECE_BYTES]).unwrap();
        }
        kept.as_file().sync_all().unwrap();
        let file = SourceFile::open(kept.path()).unwrap();
        let map = map_file(&file).unwrap().unwrap();
        (kept, file, map)
    }

    fn present(windows: &ByWindows, map: &MmapRaw) -> usize {
        let pages = LEN / windows.page_bytes;
        let first_page = map.as_ptr() as usize / windows.page_bytes;
        pages - windows.missing_by_entries(first_page, pages).unwrap()
    }

    #[test]
    fn resident_chunks_are_done_by_windows_where_faults_bring_neighbours() {
        let Some(windows) = ByWindows::new(false) else {
            return skip(
                "populating by windows: no page table to look at, or pages as large as a window",
            );
        };
        // A page that is locked for a moment is left out; it need not be twice.
        let neighbours = (0..20).any(|_| {
            let (_kept, _file, map) = mapped();
            populate(&map, LEN / 2..LEN / 2 + 1).unwrap();
            present(&windows, &map) * windows.page_bytes >= WINDOW_BYTES
        });
        let done = (0..20).any(|_| {
            let (_kept, file, map) = mapped();
            let windows = ByWindows::new(false).unwrap();
            let done = windows.populate(&file, &map, &(0..LEN));
            assert!(!done || present(&windows, &map) * windows.page_bytes == LEN);
            done
        });
        assert_eq!(done, neighbours);
    }

    /// More ranges than one call returns.
    #[test]
    fn both_ways_to_look_at_the_page_table_agree() {
        let Some(windows) = ByWindows::new(false) else {
            return skip("the page table by ranges: no page table to look at");
        };
        let kept = tempfile::NamedTempFile::new().unwrap();
        let len = 4 * scan::REGIONS * WINDOW_BYTES;
        for _ in 0..len / PIECE_BYTES {
            kept.as_file().write_all(&[7; PIECE_BYTES]).unwrap();
        }
        let file = SourceFile::open(kept.path()).unwrap();
        let map = map_file(&file).unwrap().unwrap();
        for at in (0..len).step_by(2 * WINDOW_BYTES) {
            populate(&map, at..at + 1).unwrap();
        }
        let first_page = map.as_ptr() as usize / windows.page_bytes;
        let pages = len / windows.page_bytes;
        for (skipped, count) in [(0, pages), (5, pages - 5), (3, 1), (20, 40), (0, 0)] {
            let first = first_page + skipped;
            let addresses = first * windows.page_bytes..(first + count) * windows.page_bytes;
            let Ok(by_scan) = scan::missing_bytes(&windows.pagemap, addresses) else {
                return skip("the page table by ranges: needs Linux 6.7");
            };
            let by_entries = windows.missing_by_entries(first, count).unwrap();
            assert_eq!(
                by_scan / windows.page_bytes,
                by_entries,
                "{skipped} {count}"
            );
            assert!(count < pages || (1..count).contains(&by_entries));
        }
    }

    #[test]
    fn chunks_that_are_not_resident_are_left_alone() {
        let Some(windows) = ByWindows::new(false) else {
            return skip(
                "populating by windows: no page table to look at, or pages as large as a window",
            );
        };
        let (kept, file, map) = mapped();
        kept.as_file().set_len(2 * LEN as u64).unwrap();
        drop((file, map));
        let file = SourceFile::open(kept.path()).unwrap();
        let map = map_file(&file).unwrap().unwrap();
        // The second half is a hole that nobody has read.
        assert!(!windows.populate(&file, &map, &(0..2 * LEN)));
        assert_eq!(present(&windows, &map), 0);
        // Who claims to know is believed.
        let known = ByWindows::new(true).unwrap();
        known.populate(&file, &map, &(0..2 * LEN));
        assert!(present(&known, &map) > 0);
    }
}
