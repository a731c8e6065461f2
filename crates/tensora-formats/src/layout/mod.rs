//! Where each tensor of a checkpoint to be written goes: pure arithmetic, no I/O.

mod safetensors;
mod serverlessllm;

use std::collections::HashSet;

use crate::{Dtype, Error, Format, Result};

pub use self::safetensors::{Sharding, safetensors_layout};
pub use self::serverlessllm::{STORE_PARTITION_BYTES, partitioned_layout, store_layout};

/// A tensor to be written: contiguous, in row-major order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// The tensor's name, unique within the checkpoint.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// The size of the tensor's data in bytes; `None` if it overflows a `u64` or does not fill whole
    /// bytes.
    pub fn bytes(&self) -> Option<u64> {
        let elements = self
            .shape
            .iter()
            .try_fold(1, |count: u64, &dimension| count.checked_mul(dimension))?;
        self.dtype.bytes_for(elements)
    }
}

/// The files of a checkpoint to be written, byte by byte but for the tensor data itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointLayout {
    /// The format laid out.
    pub format: Format,
    /// The files that hold tensor data, in the order in which a reader numbers them.
    pub files: Vec<PlannedFile>,
    /// The index file, where the format or the number of files calls for one.
    pub index: Option<PlannedIndex>,
}

/// A data file of a [`CheckpointLayout`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedFile {
    /// The file's name, without a directory.
    pub name: String,
    /// The bytes to write at offset 0: length and header for SafeTensors, empty for ServerlessLLM.
    pub prefix: Vec<u8>,
    /// The file's length in bytes. Bytes that neither `prefix` nor a tensor covers are padding, to
    /// be written as zeros.
    pub bytes: u64,
    /// The tensors in this file, in ascending order of offset.
    pub tensors: Vec<PlannedTensor>,
}

/// The place of one tensor in a [`PlannedFile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedTensor {
    /// The tensor's position in the slice that was laid out.
    pub tensor: usize,
    /// Where its data begins, counted from the start of the file.
    pub offset: u64,
    /// The size of its data in bytes.
    pub bytes: u64,
}

/// An index file of a [`CheckpointLayout`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedIndex {
    /// The file's name, without a directory.
    pub name: String,
    /// The file's content.
    pub contents: Vec<u8>,
}

/// The data size of each spec, once names and sizes are known to be sound.
///
/// Also shows that all sizes together, with room for padding, fit into 64 bits, so that the layouts
/// can add without checking.
fn checked_sizes(specs: &[TensorSpec]) -> Result<Vec<u64>> {
    let mut names = HashSet::with_capacity(specs.len());
    let mut total_bytes = 0u64;
    specs
        .iter()
        .map(|spec| {
            if !names.insert(spec.name.as_str()) {
                return Err(Error::DuplicateSpec {
                    tensor: spec.name.clone(),
                });
            }
            let bytes = spec.bytes().ok_or_else(|| Error::SpecSize {
                tensor: spec.name.clone(),
                dtype: spec.dtype,
                shape: spec.shape.clone(),
            })?;
            total_bytes = bytes
                .checked_next_multiple_of(RECORD_ALIGNMENT_BYTES)
                .and_then(|padded| total_bytes.checked_add(padded))
                .filter(|&total| total <= MAX_TOTAL_BYTES)
                .ok_or_else(|| Error::LayoutOverflow {
                    tensor: spec.name.clone(),
                })?;
            Ok(bytes)
        })
        .collect()
}

/// Both formats keep headers and records to multiples of this.
const RECORD_ALIGNMENT_BYTES: u64 = 8;

/// What tensors may take together: leaves room for the largest header before them.
const MAX_TOTAL_BYTES: u64 = u64::MAX - 2 * crate::safetensors::HEADER_LIMIT_BYTES;

/// Compact JSON of a value that cannot fail to serialise: strings, numbers, arrays and maps with
/// string keys.
fn json(value: &impl serde::Serialize) -> Vec<u8> {
    let mut text = Vec::new();
    let written = serde_json::to_writer(&mut text, value);
    debug_assert!(written.is_ok(), "a Vec accepts every byte");
    text
}
