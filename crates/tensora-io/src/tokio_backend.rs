use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};

use crate::transfer::Transfer;
use crate::{
    Backend, BackendKind, Control, Error, ReadRequest, ReadStats, Result, TransferParams,
    positioned,
};

/// Tokio: one task per file, positioned reads on the blocking pool, bounded concurrency.
///
/// At most `workers` reads are under way at once over all files, and files take turns, so that many small
/// files are as fast as a few large ones. Each batch has a small runtime of its own on a thread of its own;
/// the call is therefore allowed inside a runtime, of whatever flavour, and never waits for one of its
/// tasks.
#[derive(Clone, Copy, Debug, Default)]
pub struct AsyncBackend(());

impl AsyncBackend {
    /// The backend; its runtime lives only as long as a batch.
    pub fn new() -> Self {
        Self(())
    }
}

impl Backend for AsyncBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Async
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        let transfer = Transfer::new(requests, params, control)?;
        if transfer.operations() > 0 {
            // A runtime must neither be entered nor dropped inside another one.
            std::thread::scope(|scope| {
                let driver = std::thread::Builder::new()
                    .name("tensora-async".to_owned())
                    .spawn_scoped(scope, || drive(&transfer, params.workers))
                    .map_err(|source| Error::Thread { source })?;
                driver
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
        }
        transfer.finish()
    }
}

/// Runs the transfer on a runtime that lives no longer than this call.
fn drive(transfer: &Transfer<'_>, workers: u32) -> Result<()> {
    let workers = transfer.operations().min(workers.into());
    #[allow(clippy::cast_possible_truncation)]
    let workers = workers.max(1) as usize;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(workers)
        .thread_name("tensora-async")
        .build()
        .map_err(|source| Error::Backend {
            backend: BackendKind::Async,
            operation: "start a Tokio runtime",
            source,
        })?;
    // SAFETY: tasks and blocking threads of `runtime` are the only users of this reference. The runtime
    // is dropped below before this function returns, on success, error and panic alike (the panic is
    // caught first); dropping it ends its tasks and waits for every blocking call that has begun, and this
    // thread is in no other runtime, so that wait is allowed. The transfer outlives this function.
    let shared =
        unsafe { std::mem::transmute::<&Transfer<'_>, &'static Transfer<'static>>(transfer) };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(read_files(shared, workers));
    }));
    drop(runtime);
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    Ok(())
}

/// One task per file; the permits bound the reads under way over all of them.
async fn read_files(transfer: &'static Transfer<'static>, workers: usize) {
    let permits = Arc::new(Semaphore::new(workers));
    let mut files = JoinSet::new();
    for operations in transfer.file_operations() {
        files.spawn(read_file(transfer, operations, Arc::clone(&permits)));
    }
    while let Some(file) = files.join_next().await {
        pass_on_panic(file);
    }
}

/// The operations of one file, in order, each on the blocking pool once it has a permit.
async fn read_file(
    transfer: &'static Transfer<'static>,
    operations: impl Iterator<Item = u64> + Send + 'static,
    permits: Arc<Semaphore>,
) {
    let mut reads = JoinSet::new();
    for number in operations {
        // The semaphore is never closed; if it were, there would be nothing left to do.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            break;
        };
        if transfer.should_stop() {
            break;
        }
        let read = move || {
            let _guard = transfer.stop_on_unwind();
            positioned::read(transfer, transfer.operation(number));
            drop(permit);
        };
        // Tokio panics when the system refuses the first thread of its pool.
        let spawned = catch_unwind(AssertUnwindSafe(|| drop(reads.spawn_blocking(read))));
        if spawned.is_err() {
            transfer.fail(Error::Thread {
                source: std::io::ErrorKind::WouldBlock.into(),
            });
        }
        while let Some(read) = reads.try_join_next() {
            pass_on_panic(read);
        }
    }
    while let Some(read) = reads.join_next().await {
        pass_on_panic(read);
    }
}

/// A panic of a task is passed on; nothing here cancels a task, so there is no other failure.
fn pass_on_panic(result: Result<(), JoinError>) {
    if let Err(error) = result
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}
