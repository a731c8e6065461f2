//! Operations as positioned reads on the calling thread: what the sync and async backends share, what rings do
//! with files that they had better not read, and what tells why a mapped page could not be had.

use std::fs::File;
use std::io;

use crate::transfer::{Next, Operation, Transfer};

/// Runs one operation to its end. Errors are recorded in the transfer.
pub(crate) fn read(transfer: &Transfer<'_>, mut operation: Operation) {
    let mut scratch = match transfer.scratch(&operation) {
        Ok(scratch) => scratch,
        Err(error) => return transfer.fail(error),
    };
    loop {
        let file = transfer.descriptor(&operation);
        let (memory, len) = operation.memory(scratch.as_mut());
        // SAFETY: an operation is taken from its transfer once, so this thread alone has its memory; the
        // transfer borrows the destinations, and scratch lives until after the call.
        let result = unsafe { read_at(file, memory, len, operation.position()) };
        let next = transfer.returned(&mut operation, scratch.as_ref(), result);
        if next != Next::Again || transfer.should_stop() {
            break;
        }
    }
    transfer.recycle(scratch);
}

/// Reads at most `len` bytes at `offset` to `memory`, in one call.
///
/// # Safety
///
/// `len` bytes from `memory` are writable and nobody else's during the call.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) unsafe fn read_at(
    file: &File,
    memory: *mut u8,
    len: usize,
    offset: u64,
) -> io::Result<usize> {
    use std::os::fd::AsRawFd;

    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel writes at most `len` bytes to `memory`, as the caller allows, and the
    // descriptor is open as long as `file` is borrowed.
    let count = unsafe { libc::pread64(file.as_raw_fd(), memory.cast(), len, offset) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The same with the standard library.
///
/// # Safety
///
/// As above, and the bytes are of one allocation.
#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
pub(crate) unsafe fn read_at(
    file: &File,
    memory: *mut u8,
    len: usize,
    offset: u64,
) -> io::Result<usize> {
    // The standard library reads into initialised memory only.
    // SAFETY: the caller allows writing `len` bytes to `memory`.
    unsafe { memory.write_bytes(0, len) };
    // SAFETY: the bytes were just initialised, and are nobody else's as long as the slice lives.
    let memory = unsafe { std::slice::from_raw_parts_mut(memory, len) };
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, memory, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, memory, offset);
    #[cfg(not(any(unix, windows)))]
    return Err(io::ErrorKind::Unsupported.into());
}
