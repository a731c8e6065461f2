use std::num::NonZero;
use std::path::Path;

use tensora_formats::{CheckpointIndex, Format};

use crate::{ConversionPlan, Error, Result};

/// What to do with a checkpoint of the same format family that the target directory already holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// Refuse the conversion.
    #[default]
    Refuse,
    /// Replace it, once the new checkpoint is completely written beside it. Until then it stays as it
    /// is, so there must be room for both.
    Replace,
}

/// What to convert a checkpoint to, and how.
///
/// [`plan`](Self::plan) decides and checks everything before a byte is written;
/// [`ConversionPlan::run`] then does it.
///
/// | from | to |
/// |---|---|
/// | SafeTensors | ServerlessLLM, store dialect |
/// | SafeTensors | ServerlessLLM, partitioned dialect |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertOptions {
    pub(crate) target: Format,
    pub(crate) partitions: Option<NonZero<u32>>,
    pub(crate) partition_bytes: Option<NonZero<u64>>,
    pub(crate) memory_limit_bytes: u64,
    pub(crate) overwrite: Overwrite,
}

impl ConvertOptions {
    /// How much memory the data passes through unless [`memory_limit_bytes`](Self::memory_limit_bytes)
    /// says otherwise.
    pub const DEFAULT_MEMORY_LIMIT_BYTES: u64 = 256 << 20;

    /// The least [`memory_limit_bytes`](Self::memory_limit_bytes).
    pub const MIN_MEMORY_LIMIT_BYTES: u64 = 1 << 20;

    /// Converts to this format, with defaults for everything else.
    pub fn new(target: Format) -> Self {
        Self {
            target,
            partitions: None,
            partition_bytes: None,
            memory_limit_bytes: Self::DEFAULT_MEMORY_LIMIT_BYTES,
            overwrite: Overwrite::default(),
        }
    }

    /// How many partitions of about equal size the partitioned dialect gets; fewer only if there are
    /// fewer tensors. By default as many as keep each at about 10 GiB.
    #[must_use]
    pub fn partitions(mut self, partitions: NonZero<u32>) -> Self {
        self.partitions = Some(partitions);
        self
    }

    /// How large a partition of the store dialect may get, in bytes; a larger tensor gets a partition
    /// of its own. By default 10 GiB, as in ServerlessLLM's own writer.
    #[must_use]
    pub fn partition_bytes(mut self, partition_bytes: NonZero<u64>) -> Self {
        self.partition_bytes = Some(partition_bytes);
        self
    }

    /// The most memory, in bytes, that data on its way takes at any time; at least
    /// [`MIN_MEMORY_LIMIT_BYTES`](Self::MIN_MEMORY_LIMIT_BYTES). Metadata, and up to 4 MiB in which
    /// direct reads align what is not aligned, come on top. Less is taken where the data is less, and
    /// never more than half of what the machine leaves to this process.
    #[must_use]
    pub fn memory_limit_bytes(mut self, memory_limit_bytes: u64) -> Self {
        self.memory_limit_bytes = memory_limit_bytes;
        self
    }

    /// What to do with a checkpoint that is already there.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Decides where every byte goes, and checks that it can go there. Writes nothing.
    ///
    /// `target` is the directory that the checkpoint is to be in. It need not exist.
    ///
    /// # Errors
    ///
    /// - [`Error::UnsupportedDirection`], [`Error::OptionNotForTarget`], [`Error::MemoryLimit`] for what
    ///   was asked for;
    /// - [`Error::Layout`] for a checkpoint that the format cannot hold, such as a dtype that it lacks;
    /// - [`Error::NotADirectory`], [`Error::TargetIsSource`], [`Error::TargetOccupied`],
    ///   [`Error::OtherCheckpoint`], [`Error::LeftOver`], [`Error::NotEnoughSpace`] and
    ///   [`Error::Target`] for a directory that it cannot be written to;
    /// - [`Error::NotEnoughMemory`] for a machine that leaves no memory for buffers.
    pub fn plan(
        &self,
        source: &CheckpointIndex,
        target: impl AsRef<Path>,
    ) -> Result<ConversionPlan> {
        ConversionPlan::new(source, target.as_ref(), self)
    }

    /// Whether the options go together.
    pub(crate) fn check(&self) -> Result<()> {
        let not_for_target = |option, instead| Error::OptionNotForTarget {
            option,
            target: self.target,
            instead,
        };
        if self.partitions.is_some() && self.target != Format::ServerlessLlmPartitioned {
            return Err(not_for_target(
                "partitions",
                "set partition_bytes for the store dialect",
            ));
        }
        if self.partition_bytes.is_some() && self.target != Format::ServerlessLlmStore {
            return Err(not_for_target(
                "partition_bytes",
                "set partitions for the partitioned dialect",
            ));
        }
        if self.memory_limit_bytes < Self::MIN_MEMORY_LIMIT_BYTES {
            return Err(Error::MemoryLimit {
                limit_bytes: self.memory_limit_bytes,
                min_bytes: Self::MIN_MEMORY_LIMIT_BYTES,
            });
        }
        Ok(())
    }
}
