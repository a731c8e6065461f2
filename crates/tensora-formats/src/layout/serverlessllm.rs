use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::num::NonZero;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{
    CheckpointLayout, PlannedFile, PlannedIndex, PlannedTensor, RECORD_ALIGNMENT_BYTES, TensorSpec,
    checked_sizes, json,
};
use crate::serverlessllm::{INDEX_NAME, partition_name, short_name};
use crate::{Dtype, Error, Format, Result};

/// The partition size of ServerlessLLM's own store, 10 GiB.
pub const STORE_PARTITION_BYTES: u64 = 10 << 30;

/// Lays out a ServerlessLLM checkpoint in the store dialect.
///
/// The tensors follow each other in input order, each record padded to a multiple of 8 bytes. A new
/// partition starts when a record would take the current one past `partition_bytes`, which is
/// [`STORE_PARTITION_BYTES`] in ServerlessLLM's own writer; a larger tensor gets a partition of its
/// own.
///
/// # Errors
///
/// [`Error::DtypeNotInFormat`] for a dtype that the dialect lacks, and [`Error::DuplicateSpec`],
/// [`Error::SpecSize`] or [`Error::LayoutOverflow`]; each names the tensor.
pub fn store_layout(specs: &[TensorSpec], partition_bytes: u64) -> Result<CheckpointLayout> {
    let format = Format::ServerlessLlmStore;
    let dtype_names = dtype_names(specs, format)?;
    let sizes = checked_sizes(specs)?;

    let mut files = vec![empty_partition(0)];
    let mut entries = Vec::with_capacity(specs.len());
    // The global offset at which the current partition starts.
    let mut partition_start = 0;
    for (tensor, &bytes) in sizes.iter().enumerate() {
        let record_bytes = bytes.next_multiple_of(RECORD_ALIGNMENT_BYTES);
        let mut offset = files.last().map_or(0, |file| file.bytes);
        if offset > 0 && offset + record_bytes > partition_bytes {
            partition_start += offset;
            offset = 0;
            files.push(empty_partition(files.len()));
        }
        if let Some(file) = files.last_mut() {
            file.bytes += record_bytes;
            file.tensors.push(PlannedTensor {
                tensor,
                offset,
                bytes,
            });
        }
        entries.push(EntryJson {
            spec: &specs[tensor],
            offset: partition_start + offset,
            bytes,
            dtype_name: dtype_names[tensor],
            partition: None,
        });
    }
    Ok(layout(format, files, &entries))
}

/// Lays out a ServerlessLLM checkpoint in the partitioned dialect.
///
/// The tensors are spread over `partitions` partitions of about equal size, and over one per tensor
/// where there are fewer tensors. Within a partition they follow each other in input order, each
/// record padded to a multiple of 8 bytes; none is split.
///
/// # Errors
///
/// [`Error::DtypeNotInFormat`] for a dtype that the dialect lacks, and [`Error::DuplicateSpec`],
/// [`Error::SpecSize`] or [`Error::LayoutOverflow`]; each names the tensor.
pub fn partitioned_layout(
    specs: &[TensorSpec],
    partitions: NonZero<u32>,
) -> Result<CheckpointLayout> {
    let format = Format::ServerlessLlmPartitioned;
    let dtype_names = dtype_names(specs, format)?;
    let sizes = checked_sizes(specs)?;

    let partitions = (partitions.get() as usize).min(specs.len()).max(1);
    let mut files: Vec<PlannedFile> = (0..partitions).map(empty_partition).collect();
    let mut entries = Vec::with_capacity(specs.len());
    for (tensor, partition) in balanced_partitions(&sizes, partitions)
        .into_iter()
        .enumerate()
    {
        let bytes = sizes[tensor];
        let file = &mut files[partition];
        entries.push(EntryJson {
            spec: &specs[tensor],
            offset: file.bytes,
            bytes,
            dtype_name: dtype_names[tensor],
            partition: Some(partition),
        });
        file.tensors.push(PlannedTensor {
            tensor,
            offset: file.bytes,
            bytes,
        });
        file.bytes += bytes.next_multiple_of(RECORD_ALIGNMENT_BYTES);
    }
    Ok(layout(format, files, &entries))
}

/// The partition of each tensor: the largest first, each into the emptiest partition.
///
/// Greedy in this order never leaves the fullest partition above 4/3 of the optimum (Graham, 1969).
fn balanced_partitions(sizes: &[u64], partitions: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&tensor| Reverse(sizes[tensor]));
    // The tensor count breaks ties, so that no partition stays empty among zero-size tensors.
    let mut emptiest: BinaryHeap<Reverse<(u64, usize, usize)>> = (0..partitions)
        .map(|partition| Reverse((0, 0, partition)))
        .collect();
    let mut result = vec![0; sizes.len()];
    for tensor in order {
        if let Some(mut top) = emptiest.peek_mut() {
            let Reverse((bytes, tensors, partition)) = *top;
            result[tensor] = partition;
            *top = Reverse((bytes + sizes[tensor], tensors + 1, partition));
        }
    }
    result
}

fn empty_partition(partition: usize) -> PlannedFile {
    PlannedFile {
        name: partition_name(partition as u64),
        prefix: Vec::new(),
        bytes: 0,
        tensors: Vec::new(),
    }
}

fn layout(format: Format, files: Vec<PlannedFile>, entries: &[EntryJson<'_>]) -> CheckpointLayout {
    CheckpointLayout {
        format,
        files,
        index: Some(PlannedIndex {
            name: INDEX_NAME.to_owned(),
            contents: json(&IndexJson(entries)),
        }),
    }
}

/// Each tensor's dtype as the dialect spells it.
fn dtype_names(specs: &[TensorSpec], format: Format) -> Result<Vec<&'static str>> {
    specs
        .iter()
        .map(|spec| {
            let name = match format {
                Format::ServerlessLlmStore => store_name(spec.dtype),
                _ => short_name(spec.dtype),
            };
            name.ok_or_else(|| Error::DtypeNotInFormat {
                tensor: spec.name.clone(),
                dtype: spec.dtype,
                format,
            })
        })
        .collect()
}

/// The dtypes that readers of the store dialect know. Torch has names for more, but a name that its
/// original reader cannot resolve would make a checkpoint that only Tensora loads.
fn store_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::U16 | Dtype::U32 | Dtype::U64 | Dtype::C64 => None,
        _ => dtype.torch_name(),
    }
}

/// One entry of `tensor_index.json`; six fields if it has a partition, otherwise five.
struct EntryJson<'a> {
    spec: &'a TensorSpec,
    offset: u64,
    bytes: u64,
    dtype_name: &'static str,
    partition: Option<usize>,
}

impl Serialize for EntryJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shape = &self.spec.shape;
        let store = (
            self.offset,
            self.bytes,
            shape,
            row_major_strides(shape),
            self.dtype_name,
        );
        match self.partition {
            None => store.serialize(serializer),
            Some(partition) => {
                (store.0, store.1, store.2, store.3, store.4, partition).serialize(serializer)
            }
        }
    }
}

/// The index as a map, in input order.
struct IndexJson<'a>(&'a [EntryJson<'a>]);

impl Serialize for IndexJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for entry in self.0 {
            map.serialize_entry(&entry.spec.name, entry)?;
        }
        map.end()
    }
}

/// The strides, in elements, of a contiguous tensor. A dimension of 0 counts as 1, as in torch.
fn row_major_strides(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for dimension in (1..shape.len()).rev() {
        // A shape with a zero may have other dimensions whose product overflows; no element is ever
        // found through these strides, so any value does.
        strides[dimension - 1] = strides[dimension].wrapping_mul(shape[dimension].max(1));
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn strides_are_those_of_torch() {
        assert_eq!(row_major_strides(&[]), [0; 0]);
        assert_eq!(row_major_strides(&[5]), [1]);
        assert_eq!(row_major_strides(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(row_major_strides(&[2, 0, 4]), [4, 4, 1]);
    }

    proptest! {
        #[test]
        fn partitions_are_balanced_and_used(
            sizes in prop::collection::vec(0u64..1000, 0..60),
            partitions in 1usize..9,
        ) {
            let partitions = partitions.min(sizes.len()).max(1);
            let assigned = balanced_partitions(&sizes, partitions);
            let mut loads = vec![0; partitions];
            let mut used = vec![false; partitions];
            for (&partition, &bytes) in assigned.iter().zip(&sizes) {
                loads[partition] += bytes;
                used[partition] = true;
            }
            prop_assert!(sizes.is_empty() || used.iter().all(|&used| used));
            // A lower bound on the optimum, and so an upper bound on what greedy may reach.
            let total: u64 = sizes.iter().sum();
            let largest = sizes.iter().max().copied().unwrap_or(0);
            let fullest = loads.iter().max().copied().unwrap_or(0);
            prop_assert!(fullest <= total / partitions as u64 + largest + 1);
        }
    }
}
