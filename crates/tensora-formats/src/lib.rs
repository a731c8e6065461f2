//! Checkpoint metadata of large language models: recognise, read, validate and lay out SafeTensors and
//! ServerlessLLM checkpoints without touching tensor data.
//!
//! [`CheckpointIndex::open`] turns a path into files and tensors whose byte ranges are known to lie
//! inside those files. [`safetensors_layout`], [`store_layout`] and [`partitioned_layout`] are the
//! other direction: they plan what a writer has to put where. [`store_record_layout`] and
//! [`partitioned_record_layout`] do so for strided tensors and for tensors that share their bytes.
//!
//! [`TensorPart`] says which bytes of a file a slice of a tensor is, and [`windows`](windows()) packs parts into
//! pieces of bounded size that a reader can read one after the other.

#![forbid(unsafe_code)]

mod dtype;
mod error;
mod file;
mod format;
mod index;
mod json;
mod layout;
mod note;
mod options;
mod quote;
mod recognise;
mod safetensors;
mod serverlessllm;
mod slice;
mod stamp;
mod windows;

pub use dtype::{Dtype, UnknownDtypeName};
pub use error::{Error, Result};
pub use format::{Format, UnknownFormatName};
pub use index::{CheckpointIndex, FileEntry, RankDirectory, TensorEntry};
pub use layout::{
    CheckpointLayout, Partitioning, PlannedFile, PlannedIndex, PlannedTensor, RecordSpec,
    RecordTensor, STORE_PARTITION_BYTES, Sharding, TensorSpec, partitioned_layout,
    partitioned_record_layout, safetensors_layout, store_layout, store_record_layout,
};
pub use note::{DamagedTensor, Note, ShortPartition};
pub use options::{
    DamagedTensors, DuplicateNames, OpenOptions, UnfinishedCheckpoint, UnlistedTensors,
};
pub use recognise::UNFINISHED_NAME;
pub use safetensors::{
    SafetensorsHeader, SafetensorsIndex, parse_safetensors_header, parse_safetensors_index,
    safetensors_header_bytes,
};
pub use serverlessllm::{ServerlessLlmIndex, parse_serverlessllm_index};
pub use slice::{DimPart, Remainder, Runs, TensorPart};
pub use stamp::{FileChange, FileStamp};
pub use windows::{Copies, Window, WindowExtent, WindowOptions, WindowOrder, WindowPiece, windows};

/// Compiles and runs the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
