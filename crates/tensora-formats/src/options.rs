use std::path::Path;

use crate::safetensors::Tolerance;
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
    unlisted_tensors: UnlistedTensors,
    duplicate_names: DuplicateNames,
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
        self.unlisted_tensors = unlisted_tensors;
        self
    }

    /// What to do with a tensor name that one header or index gives twice. Names that two files
    /// share are refused in any case.
    pub fn duplicate_names(mut self, duplicate_names: DuplicateNames) -> Self {
        self.duplicate_names = duplicate_names;
        self
    }

    /// Recognises what `path` is and reads its metadata; see [`CheckpointIndex::open`].
    ///
    /// # Errors
    ///
    /// [`Error`](crate::Error) says which rule of the format is broken, in which file, by which
    /// tensor.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<CheckpointIndex> {
        let tolerance = Tolerance {
            unlisted_tensors: self.unlisted_tensors,
            duplicate_names: self.duplicate_names,
        };
        recognise::open(path.as_ref(), self.format, self.rank, tolerance)
    }
}
