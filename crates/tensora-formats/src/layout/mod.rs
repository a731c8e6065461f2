//! Where each tensor of a checkpoint to be written goes: pure arithmetic, no I/O.

mod safetensors;
mod serverlessllm;

use std::collections::HashSet;

use crate::{Dtype, Error, Format, Result};

pub use self::safetensors::{Sharding, safetensors_layout};
pub use self::serverlessllm::{
    Partitioning, STORE_PARTITION_BYTES, partitioned_layout, partitioned_record_layout,
    store_layout, store_record_layout,
};

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
        Self::bytes_of(self.dtype, &self.shape)
    }

    fn bytes_of(dtype: Dtype, shape: &[u64]) -> Option<u64> {
        let elements = shape
            .iter()
            .try_fold(1, |count: u64, &dimension| count.checked_mul(dimension))?;
        dtype.bytes_for(elements)
    }
}

/// Bytes that are stored once, and the tensors that are made of them: one as a rule, several for
/// tied weights.
///
/// Only ServerlessLLM has such records; in SafeTensors every tensor has bytes of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RecordSpec {
    /// The size of the record in bytes.
    pub bytes: u64,
    /// The tensors in it, at least one.
    pub tensors: Vec<RecordTensor>,
}

/// A tensor to be written: a view of a [`RecordSpec`] from its first byte on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RecordTensor {
    /// The tensor's name, unique within the checkpoint.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// The stride of each dimension in elements; `None` for row-major order. A tensor whose elements
    /// lie in row-major order fills its record; any other lies inside it.
    pub strides: Option<Vec<u64>>,
}

impl RecordSpec {
    /// The record of a contiguous tensor that shares its bytes with no other.
    ///
    /// # Errors
    ///
    /// [`Error::SpecSize`] if the tensor's size overflows 64 bits or does not fill whole bytes.
    pub fn of(spec: TensorSpec) -> Result<Self> {
        let Some(bytes) = spec.bytes() else {
            return Err(Error::SpecSize {
                tensor: spec.name,
                dtype: spec.dtype,
                shape: spec.shape,
            });
        };
        Ok(Self {
            bytes,
            tensors: vec![RecordTensor {
                name: spec.name,
                dtype: spec.dtype,
                shape: spec.shape,
                strides: None,
            }],
        })
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
    /// The tensors, or records, in this file, in ascending order of offset.
    pub tensors: Vec<PlannedTensor>,
}

/// The place of one tensor, or of one record with all its tensors, in a [`PlannedFile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedTensor {
    /// The position in the slice of tensors or of records that was laid out.
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
    let mut total_bytes = 0;
    specs
        .iter()
        .map(|spec| {
            check_name(&mut names, &spec.name)?;
            let bytes = spec.bytes().ok_or_else(|| Error::SpecSize {
                tensor: spec.name.clone(),
                dtype: spec.dtype,
                shape: spec.shape.clone(),
            })?;
            add_padded(&mut total_bytes, bytes, &spec.name)?;
            Ok(bytes)
        })
        .collect()
}

/// Takes note of a name to be written, which must be the only one of its kind.
fn check_name<'a>(names: &mut HashSet<&'a str>, name: &'a str) -> Result<()> {
    if names.insert(name) {
        return Ok(());
    }
    Err(Error::DuplicateSpec {
        tensor: name.to_owned(),
    })
}

/// Adds a record of `bytes`, with its padding, to what all of them take.
fn add_padded(total_bytes: &mut u64, bytes: u64, tensor: &str) -> Result<()> {
    *total_bytes = bytes
        .checked_next_multiple_of(RECORD_ALIGNMENT_BYTES)
        .and_then(|padded| total_bytes.checked_add(padded))
        .filter(|&total| total <= MAX_TOTAL_BYTES)
        .ok_or_else(|| Error::LayoutOverflow {
            tensor: tensor.to_owned(),
        })?;
    Ok(())
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
