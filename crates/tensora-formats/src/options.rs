use std::path::Path;

use crate::{CheckpointIndex, Format, Result, recognise};

/// What to do with tensors that a shard holds and its index does not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnlistedTensors {
    /// Refuse the checkpoint: its index and its shards do not belong together.
    #[default]
    Reject,
    /// Leave them out, with a [`Note`](crate::Note).
    Ignore,
}

/// What to do with a tensor name that one header or index gives twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DuplicateNames {
    /// Refuse the checkpoint, as the format's text demands.
    #[default]
    Reject,
    /// Take the last one, as the reference implementation does.
    LastWins,
}

/// What to do with tensors whose bytes are not all there, because a ServerlessLLM partition is shorter
/// than its index needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DamagedTensors {
    /// Refuse the checkpoint, naming every such partition and tensor.
    #[default]
    Reject,
    /// Open it without them, with a [`Note::Damaged`](crate::Note::Damaged) for each partition.
    LeaveOut,
}

/// What to do with a directory that holds [`UNFINISHED_NAME`](crate::UNFINISHED_NAME).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnfinishedCheckpoint {
    /// Refuse it: its files may belong to two checkpoints.
    #[default]
    Refuse,
    /// Open what is there as if the marker were not, for the program that is about to finish it or
    /// to look into it.
    Open,
}

/// How to open a checkpoint where the defaults of [`CheckpointIndex::open`] do not do.
///
/// # Examples
///
/// ```no_run
/// use tensora_formats::{Format, OpenOptions};
///
/// let index = OpenOptions::new()
///     .format(Format::ServerlessLlmStore)
///     .rank(0)
///     .open("models/llama-tp2")?;
/// # Ok::<(), tensora_formats::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    format: Option<Format>,
    rank: Option<u32>,
    tolerance: Tolerance,
}

/// What the options tolerate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tolerance {
    pub(crate) unlisted_tensors: UnlistedTensors,
    pub(crate) duplicate_names: DuplicateNames,
    pub(crate) damaged_tensors: DamagedTensors,
    pub(crate) unfinished: UnfinishedCheckpoint,
}

impl OpenOptions {
    /// The defaults: any format, all ranks, nothing tolerated that a format forbids.
    pub fn new() -> Self {
        Self::default()
    }

    /// Accepts this format only, and chooses it where a directory holds two.
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Opens one rank of a directory of `rank_N` directories, with tensor names as that rank stores
    /// them.
    pub fn rank(mut self, rank: u32) -> Self {
        self.rank = Some(rank);
        self
    }

    /// What to do with tensors that a shard holds and its index does not list.
    pub fn unlisted_tensors(mut self, unlisted_tensors: UnlistedTensors) -> Self {
        self.tolerance.unlisted_tensors = unlisted_tensors;
        self
    }

    /// What to do with a tensor name that one header or index gives twice. Names that two files
    /// share are refused in any case.
    pub fn duplicate_names(mut self, duplicate_names: DuplicateNames) -> Self {
        self.tolerance.duplicate_names = duplicate_names;
        self
    }

    /// What to do with tensors whose bytes are not all there, because a ServerlessLLM partition is
    /// shorter than its index needs.
    pub fn damaged_tensors(mut self, damaged_tensors: DamagedTensors) -> Self {
        self.tolerance.damaged_tensors = damaged_tensors;
        self
    }

    /// What to do with a directory in which a conversion was interrupted while it put its files in
    /// place.
    pub fn unfinished(mut self, unfinished: UnfinishedCheckpoint) -> Self {
        self.tolerance.unfinished = unfinished;
        self
    }

    /// Recognises what `path` is and reads its metadata; see [`CheckpointIndex::open`].
    ///
    /// # Errors
    ///
    /// [`Error`](crate::Error) says which rule of the format is broken, in which file, by which
    /// tensor.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<CheckpointIndex> {
        recognise::open(path.as_ref(), self.format, self.rank, self.tolerance)
    }
}
