use crate::transfer::Transfer;
use crate::{
    Backend, BackendKind, Control, ReadRequest, ReadStats, Result, TransferParams, positioned,
};

/// Threads that take chunks of positioned reads from one queue.
///
/// `workers` threads (the calling one among them) each keep one read under way. Works everywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncBackend(());

impl SyncBackend {
    /// The backend; its threads live only as long as a batch.
    pub fn new() -> Self {
        Self(())
    }
}

impl Backend for SyncBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Sync
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        let transfer = Transfer::new(requests, params, control)?;
        transfer.run(self.kind(), params.workers, &|| {
            while let Some(operation) = transfer.next() {
                positioned::read(&transfer, operation);
            }
        });
        transfer.finish()
    }
}
