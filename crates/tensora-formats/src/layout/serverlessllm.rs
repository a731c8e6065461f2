use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashSet};
use std::num::NonZero;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{
    CheckpointLayout, PlannedFile, PlannedIndex, PlannedTensor, RECORD_ALIGNMENT_BYTES, RecordSpec,
    RecordTensor, TensorSpec, add_padded, check_name, json,
};
use crate::serverlessllm::{INDEX_NAME, is_row_major, partition_name, short_name, view_bytes};
use crate::{Dtype, Error, Format, Result};

/// The partition size of ServerlessLLM's own store, 10 GiB.
pub const STORE_PARTITION_BYTES: u64 = 10 << 30;

/// How the records of the partitioned dialect are divided. Records are never split, and the partitions
/// are of about equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Partitioning {
    /// This many partitions; one per record where there are fewer records.
    Count(NonZero<u32>),
    /// About as few partitions as can hold at most this many bytes each, padding included. A larger
    /// record gets a partition of its own.
    MaxBytes(NonZero<u64>),
}

/// Lays out a ServerlessLLM checkpoint in the store dialect, each tensor with bytes of its own.
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
    store_record_layout(&records_of(specs)?, partition_bytes)
}

/// Lays out records, which several tensors may share, as [`store_layout`] lays out tensors.
///
/// [`PlannedTensor::tensor`] is the position of the record.
///
/// # Errors
///
/// As [`store_layout`]; also [`Error::EmptyRecord`], [`Error::RecordStrides`] and
/// [`Error::RecordSize`], if a record and its tensors do not fit together.
pub fn store_record_layout(
    records: &[RecordSpec],
    partition_bytes: u64,
) -> Result<CheckpointLayout> {
    let format = Format::ServerlessLlmStore;
    check_records(records, format)?;

    let mut files = vec![empty_partition(0)];
    let mut places = Vec::with_capacity(records.len());
    // The global offset at which the current partition starts.
    let mut partition_start = 0;
    for (number, record) in records.iter().enumerate() {
        let record_bytes = padded(record);
        let mut offset = files.last().map_or(0, |file| file.bytes);
        if offset > 0 && offset + record_bytes > partition_bytes {
            partition_start += offset;
            offset = 0;
            files.push(empty_partition(files.len()));
        }
        if let Some(file) = files.last_mut() {
            place(file, number, record);
        }
        places.push(Place {
            offset: partition_start + offset,
            partition: None,
        });
    }
    Ok(layout(format, files, records, &places))
}

/// Lays out a ServerlessLLM checkpoint in the partitioned dialect, each tensor with bytes of its own.
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
    partitioned_record_layout(&records_of(specs)?, Partitioning::Count(partitions))
}

/// Lays out records, which several tensors may share, as [`partitioned_layout`] lays out tensors.
///
/// [`PlannedTensor::tensor`] is the position of the record.
///
/// # Errors
///
/// As [`partitioned_layout`]; also [`Error::EmptyRecord`], [`Error::RecordStrides`] and
/// [`Error::RecordSize`], if a record and its tensors do not fit together.
pub fn partitioned_record_layout(
    records: &[RecordSpec],
    partitioning: Partitioning,
) -> Result<CheckpointLayout> {
    let format = Format::ServerlessLlmPartitioned;
    check_records(records, format)?;

    let sizes: Vec<u64> = records.iter().map(padded).collect();
    let assigned = match partitioning {
        Partitioning::Count(count) => {
            let partitions = (count.get() as usize).min(sizes.len()).max(1);
            balanced_partitions(&sizes, partitions)
        }
        Partitioning::MaxBytes(max_bytes) => bounded_partitions(&sizes, max_bytes),
    };
    // At least one: an empty checkpoint has one empty partition.
    let partitions = assigned.iter().max().map_or(1, |last| last + 1);
    let mut files: Vec<PlannedFile> = (0..partitions).map(empty_partition).collect();
    let mut places = Vec::with_capacity(records.len());
    for ((number, record), partition) in records.iter().enumerate().zip(assigned) {
        places.push(Place {
            offset: files[partition].bytes,
            partition: Some(partition),
        });
        place(&mut files[partition], number, record);
    }
    Ok(layout(format, files, records, &places))
}

fn records_of(specs: &[TensorSpec]) -> Result<Vec<RecordSpec>> {
    specs.iter().cloned().map(RecordSpec::of).collect()
}

/// The size of a record with its padding.
fn padded(record: &RecordSpec) -> u64 {
    record.bytes.next_multiple_of(RECORD_ALIGNMENT_BYTES)
}

/// Puts a record behind what a file holds already.
fn place(file: &mut PlannedFile, number: usize, record: &RecordSpec) {
    file.tensors.push(PlannedTensor {
        tensor: number,
        offset: file.bytes,
        bytes: record.bytes,
    });
    file.bytes += padded(record);
}

/// Checks what a reader will check, and that all records together, with their padding, fit into 64 bits,
/// so that the layouts can add without checking.
fn check_records(records: &[RecordSpec], format: Format) -> Result<()> {
    let mut names = HashSet::with_capacity(records.len());
    let mut total_bytes = 0;
    for (number, record) in records.iter().enumerate() {
        let Some(first) = record.tensors.first() else {
            return Err(Error::EmptyRecord {
                record: number,
                bytes: record.bytes,
            });
        };
        for tensor in &record.tensors {
            dtype_name(tensor, format)?;
            check_name(&mut names, &tensor.name)?;
            check_view(tensor, record.bytes)?;
        }
        add_padded(&mut total_bytes, record.bytes, &first.name)?;
    }
    Ok(())
}

/// Checks that a tensor fits its record.
fn check_view(tensor: &RecordTensor, record_bytes: u64) -> Result<()> {
    let RecordTensor {
        name,
        dtype,
        shape,
        strides,
    } = tensor;
    // A reader multiplies the dimensions of a view too, although it may need fewer bytes.
    let packed_bytes = TensorSpec::bytes_of(*dtype, shape).ok_or_else(|| Error::SpecSize {
        tensor: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    })?;
    let row_major = match strides {
        None => true,
        Some(strides) if strides.len() != shape.len() => {
            return Err(Error::RecordStrides {
                tensor: name.clone(),
                dimensions: shape.len(),
                strides: strides.len(),
            });
        }
        Some(strides) => is_row_major(shape, strides),
    };
    let (needed_bytes, fits) = match strides {
        Some(strides) if !row_major => {
            let needed_bytes = view_bytes(*dtype, shape, strides);
            (needed_bytes, needed_bytes <= record_bytes)
        }
        _ => (packed_bytes, packed_bytes == record_bytes),
    };
    if fits {
        return Ok(());
    }
    Err(Error::RecordSize {
        tensor: name.clone(),
        needed_bytes,
        record_bytes,
    })
}

/// The partition of each record: the largest first, each into the emptiest partition.
///
/// Greedy in this order never leaves the fullest partition above 4/3 of the optimum (Graham, 1969).
fn balanced_partitions(sizes: &[u64], partitions: usize) -> Vec<usize> {
    // The record count breaks ties, so that no partition stays empty among records of no bytes.
    let mut emptiest: BinaryHeap<Reverse<(u64, usize, usize)>> = (0..partitions)
        .map(|partition| Reverse((0, 0, partition)))
        .collect();
    let mut result = vec![0; sizes.len()];
    for record in largest_first(sizes) {
        if let Some(mut top) = emptiest.peek_mut() {
            let Reverse((bytes, records, partition)) = *top;
            result[record] = partition;
            *top = Reverse((bytes + sizes[record], records + 1, partition));
        }
    }
    result
}

/// The partition of each record, so that none but those of one larger record takes more than `max_bytes`.
fn bounded_partitions(sizes: &[u64], max_bytes: NonZero<u64>) -> Vec<usize> {
    let max_bytes = max_bytes.get();
    let (larger, rest): (Vec<usize>, Vec<usize>) =
        (0..sizes.len()).partition(|&record| sizes[record] > max_bytes);
    let rest_sizes: Vec<u64> = rest.iter().map(|&record| sizes[record]).collect();

    let packed = packed_partitions(&rest_sizes, max_bytes);
    let partitions = packed.iter().max().map_or(0, |last| last + 1);
    // As many, but of equal size, if they can be had.
    let mut balanced = balanced_partitions(&rest_sizes, partitions);
    let mut loads = vec![0; partitions];
    for (&partition, bytes) in balanced.iter().zip(&rest_sizes) {
        loads[partition] += bytes;
    }
    if loads.iter().any(|&bytes| bytes > max_bytes) {
        balanced = packed;
    }

    let mut result = vec![0; sizes.len()];
    for (record, partition) in rest.into_iter().zip(balanced) {
        result[record] = partition;
    }
    for (record, partition) in larger.into_iter().zip(partitions..) {
        result[record] = partition;
    }
    result
}

/// The partition of each record: the largest first, each into the fullest partition that has room for
/// it. None may be larger than `max_bytes`.
///
/// Best fit in this order takes at most 11/9 of the fewest partitions possible, and a constant more
/// (Johnson, 1974).
fn packed_partitions(sizes: &[u64], max_bytes: u64) -> Vec<usize> {
    // The room that each partition has, and its number.
    let mut rooms: BTreeSet<(u64, usize)> = BTreeSet::new();
    let mut result = vec![0; sizes.len()];
    for record in largest_first(sizes) {
        let bytes = sizes[record];
        let fitting = rooms.range((bytes, 0)..).next().copied();
        let (room, partition) = fitting.unwrap_or((max_bytes, rooms.len()));
        rooms.remove(&(room, partition));
        rooms.insert((room - bytes, partition));
        result[record] = partition;
    }
    result
}

/// The positions of `sizes` in descending order of size.
fn largest_first(sizes: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&record| Reverse(sizes[record]));
    order
}

fn empty_partition(partition: usize) -> PlannedFile {
    PlannedFile {
        name: partition_name(partition as u64),
        prefix: Vec::new(),
        bytes: 0,
        tensors: Vec::new(),
    }
}

/// Where a record lies, as the index says it.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    /// In the dialect that names it.
    partition: Option<usize>,
}

fn layout(
    format: Format,
    files: Vec<PlannedFile>,
    records: &[RecordSpec],
    places: &[Place],
) -> CheckpointLayout {
    CheckpointLayout {
        format,
        files,
        index: Some(PlannedIndex {
            name: INDEX_NAME.to_owned(),
            contents: json(&IndexJson {
                format,
                records,
                places,
            }),
        }),
    }
}

/// A tensor's dtype as the dialect spells it.
fn dtype_name(tensor: &RecordTensor, format: Format) -> Result<&'static str> {
    let name = match format {
        Format::ServerlessLlmStore => store_name(tensor.dtype),
        _ => short_name(tensor.dtype),
    };
    name.ok_or_else(|| Error::DtypeNotInFormat {
        tensor: tensor.name.clone(),
        dtype: tensor.dtype,
        format,
    })
}

/// The dtypes that readers of the store dialect know. Torch has names for more, but a name that its
/// original reader cannot resolve would make a checkpoint that only Tensora loads.
fn store_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::U16 | Dtype::U32 | Dtype::U64 | Dtype::C64 => None,
        _ => dtype.torch_name(),
    }
}

/// The index as a map, in input order.
struct IndexJson<'a> {
    format: Format,
    records: &'a [RecordSpec],
    places: &'a [Place],
}

impl Serialize for IndexJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (record, place) in self.records.iter().zip(self.places) {
            for tensor in &record.tensors {
                let entry = EntryJson {
                    tensor,
                    bytes: record.bytes,
                    // Checked before anything was laid out.
                    dtype_name: dtype_name(tensor, self.format).unwrap_or_default(),
                    place: *place,
                };
                map.serialize_entry(&tensor.name, &entry)?;
            }
        }
        map.end()
    }
}

/// One entry of `tensor_index.json`; six fields if it has a partition, otherwise five.
struct EntryJson<'a> {
    tensor: &'a RecordTensor,
    bytes: u64,
    dtype_name: &'static str,
    place: Place,
}

impl Serialize for EntryJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shape = &self.tensor.shape;
        let strides = match &self.tensor.strides {
            Some(strides) => Cow::Borrowed(strides),
            None => Cow::Owned(row_major_strides(shape)),
        };
        let (offset, bytes, dtype) = (self.place.offset, self.bytes, self.dtype_name);
        match self.place.partition {
            None => (offset, bytes, shape, strides, dtype).serialize(serializer),
            Some(partition) => {
                (offset, bytes, shape, strides, dtype, partition).serialize(serializer)
            }
        }
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

    /// The fewest partitions of at most `max_bytes` that hold all records, by trying every set of records
    /// as the next partition.
    fn fewest_partitions(sizes: &[u64], max_bytes: u64) -> usize {
        let sets = 1usize << sizes.len();
        let bytes = |set: usize| -> u64 {
            let members = (0..sizes.len()).filter(|&record| set >> record & 1 == 1);
            members.map(|record| sizes[record]).sum()
        };
        let mut fewest = vec![usize::MAX; sets];
        fewest[0] = 0;
        for set in 1..sets {
            let mut last = set;
            while last > 0 {
                if bytes(last) <= max_bytes {
                    fewest[set] = fewest[set].min(fewest[set & !last].saturating_add(1));
                }
                last = (last - 1) & set;
            }
        }
        fewest[sets - 1]
    }

    proptest! {
        #[test]
        fn bounded_partitions_are_few(
            sizes in prop::collection::vec(0u64..100, 0..8),
            max_bytes in 1u64..200,
        ) {
            let assigned = bounded_partitions(&sizes, NonZero::new(max_bytes).unwrap());
            let partitions = assigned.iter().max().map_or(0, |last| last + 1);
            for partition in 0..partitions {
                let held: Vec<u64> = assigned
                    .iter()
                    .zip(&sizes)
                    .filter(|&(&holder, _)| holder == partition)
                    .map(|(_, &bytes)| bytes)
                    .collect();
                let bytes: u64 = held.iter().sum();
                prop_assert!(bytes <= max_bytes || held.len() == 1, "{held:?}");
                prop_assert!(!held.is_empty());
            }
            let (larger, rest): (Vec<u64>, Vec<u64>) =
                sizes.iter().partition(|&&bytes| bytes > max_bytes);
            let fewest = fewest_partitions(&rest, max_bytes);
            // The proven constant is 6/9.
            prop_assert!(9 * (partitions - larger.len()) <= 11 * fewest + 9);
        }

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
