use std::time::Duration;

use crate::{ConversionNote, Digest};

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConversionReport {
    /// The files of the target: data, index, companions, checksums.
    pub files: usize,
    /// The tensors converted.
    pub tensors: usize,
    /// The data of all tensors as the target stores it, in bytes.
    pub data_bytes: u64,
    /// The files of the target together, with index and padding, in bytes.
    pub target_bytes: u64,
    /// The buffers that what was written went through, together, in bytes; within the memory limit, as are
    /// those that it is checked with afterwards.
    pub buffer_bytes: u64,
    /// How many files an interrupted conversion had finished, and were kept.
    pub resumed_files: usize,
    /// What these are long together, in bytes.
    pub resumed_bytes: u64,
    /// What was written past the page cache, in bytes.
    pub direct_bytes: u64,
    /// The content digest of what was read from the source, where checksums or verification were asked
    /// for.
    pub content_digest: Option<Digest>,
    /// From the first read until the checkpoint was safe on the device.
    pub elapsed: Duration,
    /// What the target lacks, and what else a user may want to know.
    pub notes: Vec<ConversionNote>,
}

/// What an interrupted conversion left to be resumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Kept {
    /// How many files are finished.
    pub files: usize,
    /// What they are long together, in bytes.
    pub bytes: u64,
}
