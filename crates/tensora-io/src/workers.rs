//! Running the workers of a batch.

use crate::transfer::Transfer;
use crate::{BackendKind, Error};

/// Runs `work` on `count` threads at once, the calling one among them, and returns when all have.
///
/// A thread that cannot be made fails the batch. A panic is passed on after every thread has returned.
pub(crate) fn run(
    kind: BackendKind,
    count: u32,
    transfer: &Transfer<'_>,
    work: &(dyn Fn() + Sync),
) {
    // More threads than operations would only be made and ended.
    let count = u64::from(count).min(transfer.operations());
    let guarded = || {
        let _guard = transfer.stop_on_unwind();
        work();
    };
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 1..count {
            let builder = std::thread::Builder::new().name(format!("tensora-{kind}"));
            match builder.spawn_scoped(scope, guarded) {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    transfer.fail(Error::Thread { source });
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
