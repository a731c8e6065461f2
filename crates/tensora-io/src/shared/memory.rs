//! The buffers that the members of a group share: a sealed memfd, mapped by each of them.
//!
//! All `unsafe` code of the shared loads is here. Two rules make it sound. Inside a process, a buffer is reached
//! only through its [`Claim`], and there is one at a time. Between processes, the leader gives a buffer to one
//! member to read into, or to several that only look at it, and never gives it out again while one of them
//! lives and holds it.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::memory::HUGE_PAGE_BYTES;

/// Nobody can make the file shorter under a mapping, which would be a `SIGBUS`, nor add or remove seals.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// Where buffers lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// From one buffer to the next, in bytes; a multiple of a page, so that buffers can be read into directly.
    stride: usize,
    count: u32,
}

impl Layout {
    /// For `count` buffers of `buffer_bytes`; `None` when no address space holds them.
    pub(super) fn new(buffer_bytes: usize, count: u32) -> Option<Self> {
        let align = if buffer_bytes >= HUGE_PAGE_BYTES {
            HUGE_PAGE_BYTES
        } else {
            rustix::param::page_size()
        };
        let stride = buffer_bytes.max(1).checked_next_multiple_of(align)?;
        Self::from_parts(stride, count)
    }

    /// As a peer describes it.
    pub(super) fn from_parts(stride: usize, count: u32) -> Option<Self> {
        let layout = Self { stride, count };
        let whole = stride > 0 && stride.is_multiple_of(rustix::param::page_size()) && count > 0;
        // No slice, and no file, may be longer than that.
        let bytes = stride.checked_mul(usize::try_from(count).ok()?)?;
        (whole && isize::try_from(bytes).is_ok()).then_some(layout)
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn bytes(&self) -> usize {
        self.stride * self.count as usize
    }

    /// Makes the file, zeroed and sealed. It takes memory as its buffers are written to.
    pub(super) fn create(&self) -> rustix::io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let name = "tensora-shared";
        // Where `vm.memfd_noexec` asks for it, the seal against execution is needed; kernels before 6.3
        // do not know it.
        let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create(name, flags)?,
            created => created?,
        };
        ftruncate(&file, self.bytes() as u64)?;
        fcntl_add_seals(&file, SEALS)?;
        Ok(file)
    }

    /// Gives the memory of a buffer that is not used again back to the system.
    pub(super) fn discard(&self, file: &OwnedFd, buffer: u32) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let start = self.stride as u64 * u64::from(buffer);
        // Where it is refused, the memory is given back with the file.
        let _ = fallocate(file, flags, start, self.stride as u64);
    }
}

/// The file, mapped.
#[derive(Debug)]
pub(super) struct SharedMemory {
    start: NonNull<u8>,
    layout: Layout,
    /// Which buffers this process reads into or looks at.
    claimed: Box<[AtomicBool]>,
}

// SAFETY: the mapping belongs to no thread, and its bytes are reached only through claims.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; a shared reference gives out claims only, each for a buffer that has no other.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps the file of a leader, after a check that it is what the leader says and cannot be shortened.
    pub(super) fn map(file: &OwnedFd, layout: Layout) -> Result<Arc<Self>, String> {
        let failed = |what: &'static str| {
            move |error: Errno| format!("{what} the shared memory failed: {error}")
        };
        let seals = fcntl_get_seals(file.as_fd()).map_err(failed("examining"))?;
        let bytes = fstat(file).map_err(failed("examining"))?.st_size;
        if !seals.contains(SEALS) || usize::try_from(bytes) != Ok(layout.bytes()) {
            return Err(format!(
                "the shared memory that the leader sent is not what it says ({bytes} bytes for {} buffers \
                 of {} bytes, {seals:?})",
                layout.count, layout.stride
            ));
        }
        // SAFETY: no address is asked for, so the kernel picks one that nothing else uses.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                layout.bytes(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        }
        .map_err(failed("mapping"))?;
        let start = NonNull::new(start.cast::<u8>()).ok_or("the shared memory has no address")?;
        if layout.stride.is_multiple_of(HUGE_PAGE_BYTES) {
            // Where the system has no huge pages for shared memory, ordinary ones do as well, only slower.
            // SAFETY: the range is the mapping made above; the advice changes no content.
            let _ =
                unsafe { madvise(start.as_ptr().cast(), layout.bytes(), Advice::LinuxHugepage) };
        }
        Ok(Arc::new(Self {
            start,
            layout,
            claimed: (0..layout.count).map(|_| AtomicBool::new(false)).collect(),
        }))
    }

    /// The only way to a buffer; `None` when this process has it already, or there is no such buffer.
    pub(super) fn claim(self: &Arc<Self>, buffer: u32) -> Option<Claim> {
        let claimed = self.claimed.get(buffer as usize)?;
        let taken = claimed.swap(true, Ordering::Acquire);
        (!taken).then(|| Claim {
            memory: Arc::clone(self),
            buffer,
        })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; claims, which hold this value, are all gone, and no backend
        // returns while I/O into what it was given is under way.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.layout.bytes()) };
        debug_assert!(result.is_ok(), "munmap of an owned mapping: {result:?}");
    }
}

/// A buffer that this process reads into or looks at, by the leader's leave.
#[derive(Debug)]
pub(super) struct Claim {
    memory: Arc<SharedMemory>,
    buffer: u32,
}

impl Claim {
    pub(super) fn buffer(&self) -> u32 {
        self.buffer
    }

    fn start(&self) -> *mut u8 {
        let offset = self.memory.layout.stride * self.buffer as usize;
        self.memory.start.as_ptr().wrapping_add(offset)
    }

    /// The bytes, for a claim on a buffer that the leader said was filled.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: `claim` checked the number, so these are `stride` bytes of the mapping, which the claim keeps;
        // they are initialised, because the file began with zeros, and do not vanish, because it is sealed.
        // Nobody writes to them: in this process there is no other claim on the buffer, and `as_mut_slice`
        // borrows this one exclusively; in the others, the leader lets nobody read into the buffer before this
        // member has released it, which it does after the claim is gone.
        unsafe { std::slice::from_raw_parts(self.start(), self.memory.layout.stride) }
    }

    /// The bytes, for a claim on a buffer that the leader gave this member to read into.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and this is the only access: in this process the claim is the only one and
        // borrowed exclusively; in the others, the leader tells nobody of the buffer before this member has
        // said that it is done, and gives it to nobody else should this member never say so.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.memory.layout.stride) }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(claimed) = self.memory.claimed.get(self.buffer as usize) {
            claimed.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_share_bytes_and_a_buffer_has_one_claim_in_each() {
        let layout = Layout::new(5000, 3).unwrap();
        assert_eq!(layout.stride() % 4096, 0);
        let file = layout.create().unwrap();
        let first = SharedMemory::map(&file, layout).unwrap();
        let second = SharedMemory::map(&file, layout).unwrap();
        let mut claim = first.claim(1).unwrap();
        assert!(first.claim(1).is_none(), "two claims on one buffer");
        assert!(first.claim(3).is_none(), "a buffer that does not exist");
        assert!(claim.as_slice().iter().all(|&byte| byte == 0));
        claim.as_mut_slice().fill(7);
        let other = second.claim(1).unwrap();
        assert!(other.as_slice().iter().all(|&byte| byte == 7));
        let neighbours = [second.claim(0).unwrap(), second.claim(2).unwrap()];
        assert!(
            neighbours
                .iter()
                .all(|claim| claim.as_slice().iter().all(|&byte| byte == 0))
        );
        drop(claim);
        assert_eq!(first.claim(1).unwrap().buffer(), 1);
    }

    #[test]
    fn a_discarded_buffer_gives_its_memory_back() {
        let layout = Layout::new(1 << 20, 2).unwrap();
        let file = layout.create().unwrap();
        let memory = SharedMemory::map(&file, layout).unwrap();
        for buffer in 0..2 {
            memory.claim(buffer).unwrap().as_mut_slice().fill(1);
        }
        let used = || fstat(&file).unwrap().st_blocks * 512;
        assert_eq!(used(), 2 << 20);
        layout.discard(&file, 0);
        assert_eq!(used(), 1 << 20);
        assert!(
            memory
                .claim(1)
                .unwrap()
                .as_slice()
                .iter()
                .all(|&byte| byte == 1)
        );
    }

    #[test]
    fn what_could_be_shortened_or_is_too_short_is_not_mapped() {
        let layout = Layout::new(4096, 2).unwrap();
        let open = memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&open, layout.bytes() as u64).unwrap();
        let error = SharedMemory::map(&open, layout).unwrap_err();
        assert!(error.contains("is not what it says"), "{error}");
        let short = Layout::new(4096, 1).unwrap().create().unwrap();
        let error = SharedMemory::map(&short, layout).unwrap_err();
        assert!(error.contains("4096 bytes for 2 buffers"), "{error}");
        assert_eq!(ftruncate(&short, 0), Err(Errno::PERM));
    }

    #[test]
    fn absurd_layouts_are_refused() {
        assert_eq!(Layout::new(usize::MAX / 2, 3), None);
        assert_eq!(Layout::new(usize::MAX, 1), None);
        assert_eq!(Layout::from_parts(4095, 1), None);
        assert_eq!(Layout::from_parts(4096, 0), None);
        assert_eq!(Layout::from_parts(0, 1), None);
    }
}
