use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::Path;

use tensora_formats::{CheckpointIndex, Format};

use crate::{ConversionPlan, Error, Reading, Result};

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

/// What to do with what an interrupted conversion left in the target directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unfinished {
    /// Refuse the conversion, and name the other two.
    #[default]
    Refuse,
    /// Keep finished files whose content is still what the journal says, and write the others. Refused
    /// if it was a conversion of something else, or to something else. Where nothing was left, all is
    /// written.
    Resume,
    /// Remove it and start over.
    Discard,
}

/// What to do with tensors that share bytes of the source (tied weights), where the target cannot
/// express that: in SafeTensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SharedTensors {
    /// Refuse the conversion.
    #[default]
    Refuse,
    /// Write the bytes once for each of them.
    Duplicate,
}

/// What to do with the files beside a checkpoint that are not part of it: `config.json`, tokenizers,
/// licences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Companions {
    /// Leave them, and name them in a note.
    #[default]
    Leave,
    /// Copy them. Hidden files, directories, and weights in any format are not companions.
    Copy,
}

/// Whether to write digests beside the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksums {
    /// Do not.
    #[default]
    Omit,
    /// Write [`SIDECAR_NAME`](crate::SIDECAR_NAME), with the BLAKE3 of each tensor as it was read from
    /// the source.
    Write,
}

/// Whether to read again what was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Do not.
    #[default]
    Skip,
    /// Open what was written as a checkpoint, read it, and compare it tensor by tensor with what was
    /// read from the source, before it gets its names. Where an interrupted conversion is finished that
    /// had begun to give them, before the directory opens as a checkpoint.
    ReadBack,
}

/// What to convert a checkpoint to, and how.
///
/// [`plan`](Self::plan) decides and checks everything before a byte is written;
/// [`ConversionPlan::run`] then does it. Every format converts to every format, and to itself: to other
/// shards or partitions, or with data that begins on a page.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    pub(crate) target: Format,
    pub(crate) partitions: Option<NonZero<u32>>,
    pub(crate) partition_bytes: Option<NonZero<u64>>,
    pub(crate) shards: Option<NonZero<u32>>,
    pub(crate) shard_bytes: Option<NonZero<u64>>,
    pub(crate) data_alignment_bytes: Option<u64>,
    pub(crate) shared_tensors: SharedTensors,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) companions: Companions,
    pub(crate) checksums: Checksums,
    pub(crate) verify: Verify,
    pub(crate) overwrite: Overwrite,
    pub(crate) unfinished: Unfinished,
    pub(crate) memory_limit_bytes: u64,
    pub(crate) reading: Reading,
}

impl ConvertOptions {
    /// How much memory the data passes through unless [`memory_limit_bytes`](Self::memory_limit_bytes)
    /// says otherwise.
    pub const DEFAULT_MEMORY_LIMIT_BYTES: u64 = 256 << 20;

    /// The least [`memory_limit_bytes`](Self::memory_limit_bytes).
    pub const MIN_MEMORY_LIMIT_BYTES: u64 = 1 << 20;

    /// How large a shard of SafeTensors gets unless told otherwise: 5 GB, the limit that Hugging Face's
    /// libraries use.
    pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

    /// Converts to this format, with defaults for everything else.
    pub fn new(target: Format) -> Self {
        Self {
            target,
            partitions: None,
            partition_bytes: None,
            shards: None,
            shard_bytes: None,
            data_alignment_bytes: None,
            shared_tensors: SharedTensors::default(),
            metadata: BTreeMap::new(),
            companions: Companions::default(),
            checksums: Checksums::default(),
            verify: Verify::default(),
            overwrite: Overwrite::default(),
            unfinished: Unfinished::default(),
            memory_limit_bytes: Self::DEFAULT_MEMORY_LIMIT_BYTES,
            reading: Reading::default(),
        }
    }

    /// How many partitions of about equal size the partitioned dialect gets; fewer only if there are
    /// fewer tensors. By default as many as keep each at about 10 GiB.
    #[must_use]
    pub fn partitions(mut self, partitions: NonZero<u32>) -> Self {
        self.partitions = Some(partitions);
        self
    }

    /// How large a partition of either ServerlessLLM dialect may get, in bytes; a larger tensor gets a
    /// partition of its own. By default 10 GiB, as in ServerlessLLM's own writer. The partitioned
    /// dialect gets as few partitions of about equal size as that allows.
    #[must_use]
    pub fn partition_bytes(mut self, partition_bytes: NonZero<u64>) -> Self {
        self.partition_bytes = Some(partition_bytes);
        self
    }

    /// How many shards of about equal size SafeTensors gets; fewer only if there are fewer tensors.
    #[must_use]
    pub fn shards(mut self, shards: NonZero<u32>) -> Self {
        self.shards = Some(shards);
        self
    }

    /// How many bytes of tensors a shard of SafeTensors may hold; a larger tensor gets a shard of its
    /// own. By default [`DEFAULT_SHARD_BYTES`](Self::DEFAULT_SHARD_BYTES).
    #[must_use]
    pub fn shard_bytes(mut self, shard_bytes: NonZero<u64>) -> Self {
        self.shard_bytes = Some(shard_bytes);
        self
    }

    /// What the data of each SafeTensors file begins at a multiple of, in bytes: a multiple of 8, by
    /// default 8. 4096 suits direct I/O.
    #[must_use]
    pub fn data_alignment_bytes(mut self, data_alignment_bytes: u64) -> Self {
        self.data_alignment_bytes = Some(data_alignment_bytes);
        self
    }

    /// What to do with tensors that share bytes. ServerlessLLM stores what has the same place in the
    /// source once, whatever is said here.
    #[must_use]
    pub fn shared_tensors(mut self, shared_tensors: SharedTensors) -> Self {
        self.shared_tensors = shared_tensors;
        self
    }

    /// Adds an entry to the `__metadata__` of SafeTensors, or replaces the source's.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// What to do with the files beside the checkpoint.
    #[must_use]
    pub fn companions(mut self, companions: Companions) -> Self {
        self.companions = companions;
        self
    }

    /// Whether to write digests beside the checkpoint.
    #[must_use]
    pub fn checksums(mut self, checksums: Checksums) -> Self {
        self.checksums = checksums;
        self
    }

    /// Whether to read again what was written.
    #[must_use]
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }

    /// The most memory, in bytes, that data on its way takes at any time; at least
    /// [`MIN_MEMORY_LIMIT_BYTES`](Self::MIN_MEMORY_LIMIT_BYTES). Metadata, and up to 16 MiB in which
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

    /// What to do with what an interrupted conversion left.
    #[must_use]
    pub fn unfinished(mut self, unfinished: Unfinished) -> Self {
        self.unfinished = unfinished;
        self
    }

    /// How source files are read.
    #[must_use]
    pub fn reading(mut self, reading: Reading) -> Self {
        self.reading = reading;
        self
    }

    /// Decides where every byte goes, and checks that it can go there. Writes nothing.
    ///
    /// `target` is the directory that the checkpoint is to be in. It need not exist.
    ///
    /// # Errors
    ///
    /// - [`Error::OptionNotForTarget`], [`Error::OptionsContradict`], [`Error::MemoryLimit`] for what was
    ///   asked for;
    /// - [`Error::Layout`] for a checkpoint that the format cannot hold, such as a dtype that it lacks,
    ///   and [`Error::SharedTensors`];
    /// - [`Error::Read`] and [`Error::Companion`] for a source that cannot be read;
    /// - [`Error::NotADirectory`], [`Error::TargetIsSource`], [`Error::TargetOccupied`],
    ///   [`Error::OtherCheckpoint`], [`Error::NotReplaceable`], [`Error::Interrupted`],
    ///   [`Error::NotEnoughSpace`] and [`Error::Target`] for a directory that it cannot be written to;
    /// - [`Error::NotEnoughMemory`] for a machine that leaves no memory for buffers, and
    ///   [`Error::TooManyWindows`] for a checkpoint that is too large for the memory allowed.
    pub fn plan(
        &self,
        source: &CheckpointIndex,
        target: impl AsRef<Path>,
    ) -> Result<ConversionPlan> {
        ConversionPlan::new(source, target.as_ref(), self)
    }

    /// Whether the options go together.
    pub(crate) fn check(&self) -> Result<()> {
        let (safetensors, serverlessllm) = (
            self.target == Format::Safetensors,
            self.target.is_serverlessllm(),
        );
        let uses = [
            (
                self.partitions.is_some(),
                self.target == Format::ServerlessLlmPartitioned,
                "partitions",
                match safetensors {
                    true => "set shards",
                    false => "set partition_bytes",
                },
            ),
            (
                self.partition_bytes.is_some(),
                serverlessllm,
                "partition_bytes",
                "set shard_bytes",
            ),
            (
                self.shards.is_some(),
                safetensors,
                "shards",
                "set partitions, or partition_bytes for the store dialect",
            ),
            (
                self.shard_bytes.is_some(),
                safetensors,
                "shard_bytes",
                "set partition_bytes",
            ),
            (
                self.data_alignment_bytes.is_some(),
                safetensors,
                "data_alignment_bytes",
                "data begins with the file there",
            ),
            (
                !self.metadata.is_empty(),
                safetensors,
                "metadata",
                "it has no place for it",
            ),
        ];
        for (is_set, has_meaning, option, instead) in uses {
            if is_set && !has_meaning {
                return Err(Error::OptionNotForTarget {
                    option,
                    target: self.target,
                    instead,
                });
            }
        }
        for (both, first, second) in [
            (
                self.partitions.is_some() && self.partition_bytes.is_some(),
                "partitions",
                "partition_bytes",
            ),
            (
                self.shards.is_some() && self.shard_bytes.is_some(),
                "shards",
                "shard_bytes",
            ),
        ] {
            if both {
                return Err(Error::OptionsContradict { first, second });
            }
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
