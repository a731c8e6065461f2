//! Adaptive loading of large-language-model checkpoints.
//!
//! [`load`] looks at the checkpoint and at the machine, picks the I/O strategy, and hands out tensors
//! as zero-copy views. [`Loader`] makes every choice explicit, [`open`] reads tensors one by one, and each
//! [`Checkpoint`] carries a [`LoadReport`] that says what was done and why.
//!
//! ```no_run
//! let checkpoint = tensora::load("Qwen3-0.6B")?;
//! let embedding = checkpoint.tensor("model.embed_tokens.weight")?;
//! println!("{} {:?}", embedding.dtype(), embedding.shape());
//! println!("{}", checkpoint.report().plan);
//! # Ok::<(), tensora::Error>(())
//! ```
//!
//! This crate only wires its parts together. They can be used without it: `tensora-formats` reads
//! metadata, `tensora-io` moves bytes, `tensora-heuristics` decides, `tensora-convert` converts.
#![forbid(unsafe_code)]

mod checkpoint;
mod error;
mod lazy;
mod loader;
mod report;
mod selection;
mod share;
mod sink;
mod sliced;
mod slices;
mod stream;
mod tensor;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use lazy::LazyCheckpoint;
pub use loader::{LoadProgress, Loader, ProfileChoice};
pub use report::LoadReport;
pub use selection::Pattern;
pub use share::Share;
#[cfg(feature = "convert")]
pub use sink::DigestSink;
pub use sink::{MemoryPlace, MemorySink, Sink, SinkError};
pub use slices::{Preset, SlicePart, SliceRule, SliceRules};
pub use stream::{StreamOrder, StreamReport, StreamedPiece, StreamedTensor, TensorStream};
pub use tensor::Tensor;

#[cfg(feature = "convert")]
pub use tensora_convert as convert;
pub use tensora_formats as formats;
pub use tensora_formats::{CheckpointIndex, Dtype, Format};
pub use tensora_heuristics as heuristics;
pub use tensora_heuristics::{
    BackendChoice, CacheChoice, DirectChoice, MemoryChoice, MemoryKind, Plan,
};
pub use tensora_io as io;
#[cfg(feature = "mmap")]
pub use tensora_io::MappingPermit;
pub use tensora_io::{BackendKind, CancelToken, DirectPolicy};

/// Loads every tensor of the checkpoint at `path` into owned memory, the fastest way that the planner
/// knows for this checkpoint on this machine.
///
/// `path` is a `.safetensors` file, a directory of them with or without an index file, a Hugging Face
/// snapshot, or a ServerlessLLM directory.
///
/// # Errors
///
/// See [`Error`]; every message names what failed, where, why, and what to do.
pub fn load(path: impl AsRef<std::path::Path>) -> Result<Checkpoint> {
    Loader::new().load(path)
}

/// Opens the checkpoint at `path` for lazy access: metadata now, tensors when asked for.
///
/// # Errors
///
/// When the path is no checkpoint or its metadata is wrong.
pub fn open(path: impl AsRef<std::path::Path>) -> Result<LazyCheckpoint> {
    Loader::new().open(path)
}

/// [`load`] without blocking the caller: the work is done on threads of its own, on whatever executor
/// the future is polled. Dropping the future stops the load.
///
/// # Errors
///
/// As [`load`].
pub async fn load_async(path: impl AsRef<std::path::Path>) -> Result<Checkpoint> {
    Loader::new().load_async(path).await
}

/// What the READMEs show compiles.
#[cfg(doctest)]
mod readmes {
    #[doc = include_str!("../README.md")]
    struct OfThisCrate;

    #[doc = include_str!("../../../README.md")]
    struct OfTheRepository;
}
