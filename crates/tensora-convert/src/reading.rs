use std::sync::Arc;

use tensora_io::{
    Backend, BackendKind, DirectPolicy, ResidentPolicy, StreamParams, TransferParams, backend,
};

use crate::{Error, Result};

/// How source files are read.
///
/// The default needs no facts about the machine: threads, direct I/O where it works. `tensora-heuristics`
/// plans something better for a machine, a checkpoint and the state of the page cache; its plans have the
/// three values that [`new`](Self::new) takes.
#[derive(Clone, Debug)]
pub struct Reading {
    /// `None` for threads, which are made when reading begins.
    backend: Option<Arc<dyn Backend>>,
    readers: u32,
    transfer: TransferParams,
}

impl Reading {
    /// `readers` windows are read at once (1 to [`StreamParams::MAX_READERS`]), each by `backend` with
    /// `transfer`.
    pub fn new(backend: Arc<dyn Backend>, readers: u32, transfer: TransferParams) -> Self {
        Self {
            backend: Some(backend),
            readers,
            transfer,
        }
    }

    pub(crate) fn backend(&self) -> Result<Arc<dyn Backend>> {
        match &self.backend {
            Some(backend) => Ok(Arc::clone(backend)),
            None => Ok(backend(BackendKind::Sync).map_err(Error::reading)?.into()),
        }
    }

    /// The same, but what is in the page cache is read from the device all the same.
    pub(crate) fn past_the_page_cache(&self) -> Self {
        let mut reading = self.clone();
        reading.transfer.direct = DirectPolicy::Preferred;
        reading.transfer.resident = ResidentPolicy::Reread;
        reading
    }

    pub(crate) fn transfer(&self) -> &TransferParams {
        &self.transfer
    }

    /// For a stream with these buffers.
    pub(crate) fn stream_params(&self, buffers: u32, buffer_bytes: usize) -> StreamParams {
        StreamParams::new(buffers, buffer_bytes, self.readers, self.transfer)
    }
}

impl Default for Reading {
    fn default() -> Self {
        Self {
            backend: None,
            // Two windows at once, so that the end of one leaves no gap.
            readers: 2,
            transfer: TransferParams {
                chunk_bytes: 1 << 20,
                queue_depth: 1,
                // About 16 MiB in flight saturate the devices that were measured.
                workers: 8,
                direct: DirectPolicy::Preferred,
                // What is in memory already need not be read from the device.
                resident: ResidentPolicy::Copy,
            },
        }
    }
}
