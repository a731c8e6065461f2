//! Memory that a load owns.

use std::fmt;
use std::io;
use std::ptr::NonNull;

use bytes::Bytes;

use crate::{Error, Result};

/// Huge pages on x86-64 and on 64-bit Arm with 4 KiB pages.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A large, zeroed, owned piece of memory to read into, given back to the system on drop.
///
/// Regions of 2 MiB and more begin on a 2 MiB boundary and ask for huge pages, which saves most of the
/// page faults of a load; smaller ones begin on a page. No page is touched before something is
/// written to it, so faulting the pages in is spread over the workers that read into them.
///
/// ```
/// let mut region = tensora_io::Region::allocate(5 << 20)?;
/// region.as_mut_slice()[..3].copy_from_slice(b"abc");
/// let bytes = region.into_bytes(); // no copy
/// assert_eq!(&bytes[..4], b"abc\0");
/// # Ok::<(), tensora_io::Error>(())
/// ```
pub struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Region` owns its memory exclusively, like `Box<[u8]>`; nothing about it is tied to the
// thread that made it.
unsafe impl Send for Region {}
// SAFETY: through a shared reference the memory can only be read.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `len` zeroed bytes. Physical memory is taken page by page, on first write.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] when the system has no address space or refuses to commit that much.
    pub fn allocate(len: usize) -> Result<Self> {
        let align = if len >= HUGE_PAGE_BYTES {
            HUGE_PAGE_BYTES
        } else {
            1
        };
        Self::allocate_aligned(len, align, "destination memory")
    }

    /// The same, beginning at a multiple of `align`, a power of two; page alignment is the least.
    pub(crate) fn allocate_aligned(
        len: usize,
        align: usize,
        purpose: &'static str,
    ) -> Result<Self> {
        debug_assert!(align.is_power_of_two());
        if len == 0 {
            return Ok(Self {
                start: NonNull::dangling(),
                len,
            });
        }
        // No slice may be longer than that.
        let start = if isize::try_from(len).is_ok() {
            sys::allocate(len, align)
        } else {
            Err(io::ErrorKind::OutOfMemory.into())
        };
        let start = start.map_err(|source| Error::Memory {
            bytes: len as u64,
            purpose,
            source,
        })?;
        Ok(Self { start, len })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether its length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` is the beginning of `len` bytes that this region owns until it is dropped.
        // The system zeroed them, so they are initialised. For length 0 it is dangling, but aligned
        // and not null, as a slice needs it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the exclusive borrow of `self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Turns the region into shared, immutable bytes without copying. The memory is given back when
    /// the last clone or slice of them is dropped.
    pub fn into_bytes(self) -> Bytes {
        if self.is_empty() {
            Bytes::new()
        } else {
            Bytes::from_owner(self)
        }
    }
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: `start` and `len` are those of the allocation that `sys::allocate` made for this
            // region; every borrow of it has ended, and no backend returns while I/O into it is under
            // way.
            unsafe { sys::free(self.start, self.len) };
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish()
    }
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod sys {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::{HUGE_PAGE_BYTES, NonNull, io};

    /// Maps `len` bytes beginning at a multiple of `align`, and asks for huge pages where whole ones fit.
    pub(super) fn allocate(len: usize, align: usize) -> io::Result<NonNull<u8>> {
        let page = rustix::param::page_size();
        let needed = round_up(len, page)?;
        // The kernel aligns to a page; more is had by mapping too much and giving back both ends.
        let slack = if align > page { align } else { 0 };
        let mapped = needed
            .checked_add(slack)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: no address is asked for, so the kernel picks one that nothing else uses.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?
        .cast::<u8>();
        let head = base.align_offset(align.max(page));
        let tail = slack - head;
        let start = base.wrapping_add(head);
        if head > 0 {
            // SAFETY: the first `head` bytes of the mapping made above; nothing refers to them.
            unsafe { munmap(base.cast(), head) }?;
        }
        if tail > 0 {
            // SAFETY: the last `tail` bytes of the mapping made above; nothing refers to them.
            unsafe { munmap(start.wrapping_add(needed).cast(), tail) }?;
        }
        let huge = needed - needed % HUGE_PAGE_BYTES;
        if align >= HUGE_PAGE_BYTES && huge > 0 {
            // Only whole huge pages: one that is used in part would count in full as resident memory.
            // A kernel without them refuses, and ordinary pages do as well, only slower.
            // SAFETY: the range lies inside the mapping made above; the advice changes no content.
            let _ = unsafe { madvise(start.cast(), huge, Advice::LinuxHugepage) };
        }
        NonNull::new(start).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// # Safety
    ///
    /// `start` and `len` come from `allocate`, once, and nothing uses the memory any more.
    pub(super) unsafe fn free(start: NonNull<u8>, len: usize) {
        let page = rustix::param::page_size();
        let mapped = round_up(len, page).unwrap_or(len);
        // SAFETY: this is the whole mapping that `allocate` left, as the caller promises.
        let result = unsafe { munmap(start.as_ptr().cast(), mapped) };
        debug_assert!(result.is_ok(), "munmap of an owned mapping: {result:?}");
    }

    fn round_up(len: usize, page: usize) -> io::Result<usize> {
        len.checked_next_multiple_of(page)
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
mod sys {
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    use super::{NonNull, io};

    /// The largest page size in common use off Linux (16 KiB, Apple silicon).
    const ALIGN_BYTES: usize = 16 << 10;

    pub(super) fn allocate(len: usize, _align: usize) -> io::Result<NonNull<u8>> {
        let layout = layout(len).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: `len` is not 0 (checked by `Region`), so the layout's size is not.
        let start = unsafe { alloc_zeroed(layout) };
        NonNull::new(start).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// # Safety
    ///
    /// `start` and `len` come from `allocate`, once, and nothing uses the memory any more.
    pub(super) unsafe fn free(start: NonNull<u8>, len: usize) {
        if let Some(layout) = layout(len) {
            // SAFETY: the same length gave the same layout in `allocate`.
            unsafe { dealloc(start.as_ptr(), layout) };
        }
    }

    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len, ALIGN_BYTES).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zeroed_writable_and_aligned() {
        for len in [
            1,
            4095,
            4097,
            HUGE_PAGE_BYTES,
            HUGE_PAGE_BYTES + 1,
            5 * HUGE_PAGE_BYTES + 777,
        ] {
            let mut region = Region::allocate(len).unwrap();
            assert_eq!(region.len(), len);
            assert!(region.as_slice().iter().all(|&byte| byte == 0));
            region.as_mut_slice().fill(7);
            assert!(region.as_slice().iter().all(|&byte| byte == 7));
            let align = if len >= HUGE_PAGE_BYTES
                && cfg!(all(target_os = "linux", not(tensora_portable)))
            {
                HUGE_PAGE_BYTES
            } else {
                4096
            };
            assert_eq!(region.as_slice().as_ptr().align_offset(align), 0);
        }
    }

    #[test]
    fn an_empty_region_works() {
        let mut region = Region::allocate(0).unwrap();
        assert!(region.is_empty());
        assert!(region.as_mut_slice().is_empty());
        assert!(region.into_bytes().is_empty());
    }

    #[test]
    fn bytes_share_the_memory() {
        let region = Region::allocate(10_000).unwrap();
        let address = region.as_slice().as_ptr();
        let bytes = region.into_bytes();
        assert_eq!(bytes.as_ptr(), address);
        let slice = bytes.slice(5000..);
        drop(bytes);
        assert_eq!(slice.as_ptr(), address.wrapping_add(5000));
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let error = Region::allocate(usize::MAX / 2).unwrap_err();
        assert!(error.to_string().contains("destination memory"), "{error}");
    }
}
