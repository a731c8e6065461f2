//! Threads that do one job together.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Error, Result};

/// What the workers of one job share: whether to stop, and the error that made them.
#[derive(Debug, Default)]
pub(crate) struct Crew {
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Crew {
    /// Whether a worker failed or panicked, so that the others need not go on.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Stops the job with this error, unless it failed before.
    pub(crate) fn fail(&self, error: Error) {
        lock(&self.error).get_or_insert(error);
        self.stop.store(true, Ordering::Release);
    }

    /// Stops the job when dropped by a panic.
    pub(crate) fn stop_on_unwind(&self) -> impl Drop + '_ {
        struct Guard<'c>(&'c AtomicBool);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.store(true, Ordering::Release);
                }
            }
        }
        Guard(&self.stop)
    }

    /// Runs `work` on `count` threads at once, the calling one among them, and returns when all have.
    ///
    /// A thread that cannot be made fails the job. A panic is passed on after every thread has
    /// returned.
    pub(crate) fn run(&self, name: &str, count: u64, work: &(dyn Fn() + Sync)) {
        let guarded = || {
            let _guard = self.stop_on_unwind();
            work();
        };
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for _ in 1..count {
                let builder = std::thread::Builder::new().name(name.to_owned());
                match builder.spawn_scoped(scope, guarded) {
                    Ok(thread) => threads.push(thread),
                    Err(source) => {
                        self.fail(Error::Thread { source });
                        break;
                    }
                }
            }
            if count > 0 {
                guarded();
            }
            for thread in threads {
                if let Err(panic) = thread.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
    }

    /// The outcome, once every worker has returned.
    pub(crate) fn finish(self) -> Result<()> {
        self.error
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }
}

/// Cuts a range where multiples of `chunk_bytes` lie in the file.
pub(crate) fn chunks_of(
    range: &Range<u64>,
    chunk_bytes: u64,
) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    let mut begin = range.start;
    std::iter::from_fn(move || {
        let chunk_end = (begin - begin % chunk_bytes)
            .saturating_add(chunk_bytes)
            .min(end);
        let chunk = begin..chunk_end;
        begin = chunk_end;
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Locks, also after a panic: what the locks of this crate protect is whole between two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
