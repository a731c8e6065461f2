use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// Exclusive memory that a read fills, initialised or not.
///
/// Made from `&mut [u8]` or `&mut [MaybeUninit<u8>]`. Backends only ever write bytes that were read,
/// so memory that was initialised stays so.
pub struct Destination<'a> {
    start: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'a mut [MaybeUninit<u8>]>,
}

// SAFETY: a `Destination` is an exclusive borrow of plain bytes, like `&mut [u8]`, which is `Send`;
// no method gives access through a shared reference.
unsafe impl Send for Destination<'_> {}

impl<'a> Destination<'a> {
    /// How many bytes go here.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing goes here.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first byte's address. Writing through it is sound for [`len`](Self::len) bytes, while the
    /// destination is not used otherwise, and only of initialised bytes.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The same memory for a shorter time, so that a wrapper can read into it more than once.
    pub fn reborrow(&mut self) -> Destination<'_> {
        Destination {
            start: self.start,
            len: self.len,
            memory: PhantomData,
        }
    }

    /// The first `mid` bytes, and the rest.
    ///
    /// # Panics
    ///
    /// When `mid` exceeds the length.
    pub fn split_at(self, mid: usize) -> (Destination<'a>, Destination<'a>) {
        assert!(mid <= self.len, "split at {mid} of {} bytes", self.len);
        // SAFETY: `mid <= len`, so the result points into the same allocation or to its end.
        let second = unsafe { self.start.add(mid) };
        (
            Destination {
                start: self.start,
                len: mid,
                memory: PhantomData,
            },
            Destination {
                start: second,
                len: self.len - mid,
                memory: PhantomData,
            },
        )
    }
}

impl<'a> From<&'a mut [u8]> for Destination<'a> {
    fn from(memory: &'a mut [u8]) -> Self {
        Self {
            len: memory.len(),
            start: NonNull::from(memory).cast(),
            memory: PhantomData,
        }
    }
}

impl<'a> From<&'a mut [MaybeUninit<u8>]> for Destination<'a> {
    fn from(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        Self {
            len: memory.len(),
            start: NonNull::from(memory).cast(),
            memory: PhantomData,
        }
    }
}

impl fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish()
    }
}
