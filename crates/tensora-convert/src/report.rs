use std::time::Duration;

use crate::ConversionNote;

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConversionReport {
    /// The files written, the index among them.
    pub files: usize,
    /// The tensors converted.
    pub tensors: usize,
    /// The data of all tensors together, in bytes.
    pub data_bytes: u64,
    /// The files written together, with index and padding, in bytes.
    pub target_bytes: u64,
    /// The buffers that the data went through, together, in bytes; within the memory limit.
    pub buffer_bytes: u64,
    /// From the first read until the checkpoint was safe on the device.
    pub elapsed: Duration,
    /// What the target lacks, and what else a user may want to know.
    pub notes: Vec<ConversionNote>,
}
