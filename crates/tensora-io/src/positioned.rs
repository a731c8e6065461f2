//! Operations as positioned reads on the calling thread: what the sync and async backends share.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;

use crate::transfer::{Next, Operation, Transfer};

/// Runs one operation to its end. Errors are recorded in the transfer.
pub(crate) fn read(transfer: &Transfer<'_>, mut operation: Operation) {
    let mut scratch = match transfer.scratch(&operation) {
        Ok(scratch) => scratch,
        Err(error) => return transfer.fail(error),
    };
    loop {
        let file = transfer.descriptor(&operation);
        let position = operation.position();
        // SAFETY: an operation is taken from its transfer once, so this thread alone has it; the
        // transfer borrows the destinations; the slice is gone when the call has returned.
        let memory = unsafe { operation.memory_slice(scratch.as_mut()) };
        let result = read_at(file, memory, position);
        if transfer.returned(&mut operation, scratch.as_ref(), result) != Next::Again {
            break;
        }
    }
    transfer.recycle(scratch);
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
fn read_at(file: &File, memory: &mut [MaybeUninit<u8>], offset: u64) -> io::Result<usize> {
    let (read, _) = rustix::io::pread(file, memory, offset)?;
    Ok(read.len())
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
fn read_at(file: &File, memory: &mut [MaybeUninit<u8>], offset: u64) -> io::Result<usize> {
    // The standard library reads into initialised memory only.
    memory.fill(MaybeUninit::new(0));
    // SAFETY: every byte was just initialised, and `MaybeUninit<u8>` has the layout of `u8`.
    let memory =
        unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), memory.len()) };
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, memory, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, memory, offset);
    #[cfg(not(any(unix, windows)))]
    return Err(io::ErrorKind::Unsupported.into());
}
