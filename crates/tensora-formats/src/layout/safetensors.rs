use std::collections::BTreeMap;
use std::num::NonZero;
use std::ops::Range;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{
    CheckpointLayout, PlannedFile, PlannedIndex, PlannedTensor, RECORD_ALIGNMENT_BYTES, TensorSpec,
    checked_sizes, json,
};
use crate::safetensors::{HEADER_LIMIT_BYTES, LENGTH_BYTES, METADATA_KEY};
use crate::{Dtype, Error, Format, Result};

/// How a SafeTensors checkpoint is divided into files. Tensors are never split, and each shard takes
/// a run of tensors that are consecutive in the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sharding {
    /// One file, `model.safetensors`.
    #[default]
    Single,
    /// This many shards of about equal size; one per tensor where there are fewer tensors, because
    /// an index cannot name an empty shard.
    Count(NonZero<u32>),
    /// As few shards as possible with at most this many bytes of tensor data each. A larger tensor
    /// gets a shard of its own.
    MaxBytes(u64),
}

/// Lays out a SafeTensors checkpoint.
///
/// One shard becomes `model.safetensors`; several become `model-00001-of-0000N.safetensors` and so
/// on with `model.safetensors.index.json`. Within a shard the tensors are sorted as the reference
/// implementation sorts them: by dtype alignment descending, then by name. `metadata` goes into
/// every shard's `__metadata__`; if it is empty there is none.
///
/// The data of each file starts at a multiple of `data_alignment_bytes`: 0 for the 8 bytes that the
/// format asks for, or a multiple of 8, such as 4096 to let direct I/O start on a block.
///
/// # Errors
///
/// [`Error::DuplicateSpec`], [`Error::ReservedName`], [`Error::SpecSize`] and
/// [`Error::LayoutOverflow`] name the tensor that cannot be written; [`Error::DataAlignment`] and
/// [`Error::LayoutHeaderTooLarge`] give the limits.
pub fn safetensors_layout(
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    sharding: Sharding,
    data_alignment_bytes: u64,
) -> Result<CheckpointLayout> {
    if !data_alignment_bytes.is_multiple_of(RECORD_ALIGNMENT_BYTES) {
        return Err(Error::DataAlignment {
            alignment_bytes: data_alignment_bytes,
        });
    }
    let data_alignment_bytes = data_alignment_bytes.max(RECORD_ALIGNMENT_BYTES);
    if let Some(spec) = specs.iter().find(|spec| spec.name == METADATA_KEY) {
        return Err(Error::ReservedName {
            tensor: spec.name.clone(),
        });
    }
    let sizes = checked_sizes(specs)?;

    let shards = match sharding {
        Sharding::Single => bounded_runs(&sizes, u64::MAX),
        Sharding::Count(count) => balanced_runs(&sizes, count),
        Sharding::MaxBytes(max_bytes) => bounded_runs(&sizes, max_bytes),
    };
    let sharded = shards.len() > 1;
    let mut files = Vec::with_capacity(shards.len());
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1..).zip(&shards) {
        let name = if sharded {
            format!("model-{number:05}-of-{:05}.safetensors", shards.len())
        } else {
            "model.safetensors".to_owned()
        };
        let file = planned_file(
            name,
            specs,
            &sizes,
            shard.clone(),
            metadata,
            data_alignment_bytes,
        )?;
        if sharded {
            for spec in &specs[shard.clone()] {
                weight_map.insert(spec.name.clone(), file.name.clone());
            }
        }
        files.push(file);
    }

    let index = sharded.then(|| {
        let total_size: u64 = sizes.iter().sum();
        PlannedIndex {
            name: "model.safetensors.index.json".to_owned(),
            contents: json(&IndexJson {
                metadata: IndexMetadataJson { total_size },
                weight_map,
            }),
        }
    });
    Ok(CheckpointLayout {
        format: Format::Safetensors,
        files,
        index,
    })
}

/// Lays out the tensors `shard` of `specs` as one file.
fn planned_file(
    name: String,
    specs: &[TensorSpec],
    sizes: &[u64],
    shard: Range<usize>,
    metadata: &BTreeMap<String, String>,
    data_alignment_bytes: u64,
) -> Result<PlannedFile> {
    let mut order: Vec<usize> = shard.collect();
    order.sort_by(|&left, &right| {
        let (left, right) = (&specs[left], &specs[right]);
        right
            .dtype
            .cmp(&left.dtype)
            .then_with(|| left.name.cmp(&right.name))
    });

    let mut data_bytes = 0;
    let mut tensors = Vec::with_capacity(order.len());
    let mut entries = Vec::with_capacity(order.len());
    for &tensor in &order {
        let bytes = sizes[tensor];
        let end = data_bytes + bytes;
        tensors.push(PlannedTensor {
            tensor,
            offset: data_bytes,
            bytes,
        });
        entries.push((&specs[tensor], [data_bytes, end]));
        data_bytes = end;
    }

    let mut header = json(&HeaderJson {
        metadata,
        entries: &entries,
    });
    let limit_bytes = HEADER_LIMIT_BYTES;
    let data_start = (LENGTH_BYTES + header.len() as u64)
        .checked_next_multiple_of(data_alignment_bytes)
        .unwrap_or(u64::MAX);
    let header_bytes = data_start - LENGTH_BYTES;
    let padded_len = match usize::try_from(header_bytes) {
        Ok(len) if header_bytes <= limit_bytes => len,
        _ => {
            return Err(Error::LayoutHeaderTooLarge {
                file: name,
                header_bytes,
                limit_bytes,
            });
        }
    };
    header.resize(padded_len, b' ');

    let mut prefix = header_bytes.to_le_bytes().to_vec();
    prefix.append(&mut header);
    for tensor in &mut tensors {
        tensor.offset += data_start;
    }
    Ok(PlannedFile {
        name,
        prefix,
        bytes: data_start + data_bytes,
        tensors,
    })
}

/// Cuts the tensors into `count` runs, each boundary as near as possible to its even share; fewer
/// runs only if there are fewer tensors, and one if there are none.
fn balanced_runs(sizes: &[u64], count: NonZero<u32>) -> Vec<Range<usize>> {
    let runs = (count.get() as usize).min(sizes.len()).max(1);
    let total: u128 = sizes.iter().map(|&bytes| u128::from(bytes)).sum();
    let mut result = Vec::with_capacity(runs);
    let mut start = 0;
    let mut cumulative = 0u128;
    for run in 1..=runs {
        let share_end = total * run as u128 / runs as u128;
        // Each later run needs at least one tensor.
        let last_end = sizes.len() - (runs - run);
        let mut end = start;
        while end < last_end {
            let bytes = u128::from(sizes[end]);
            // Once past the middle, stopping before this tensor is nearer to the share.
            if run < runs && end > start && 2 * cumulative + bytes > 2 * share_end {
                break;
            }
            cumulative += bytes;
            end += 1;
        }
        result.push(start..end);
        start = end;
    }
    result
}

/// Cuts the tensors into runs of at most `max_bytes`, or of one larger tensor.
fn bounded_runs(sizes: &[u64], max_bytes: u64) -> Vec<Range<usize>> {
    let mut result = Vec::new();
    let mut start = 0;
    let mut run_bytes = 0;
    for (position, &bytes) in sizes.iter().enumerate() {
        if position > start && run_bytes + bytes > max_bytes {
            result.push(start..position);
            start = position;
            run_bytes = 0;
        }
        run_bytes += bytes;
    }
    result.push(start..sizes.len());
    result
}

#[derive(serde::Serialize)]
struct IndexJson {
    metadata: IndexMetadataJson,
    weight_map: BTreeMap<String, String>,
}

#[derive(serde::Serialize)]
struct IndexMetadataJson {
    total_size: u64,
}

/// The header as a map: `__metadata__` first, then the tensors in the order of their data.
struct HeaderJson<'a> {
    metadata: &'a BTreeMap<String, String>,
    entries: &'a [(&'a TensorSpec, [u64; 2])],
}

#[derive(serde::Serialize)]
struct EntryJson<'a> {
    dtype: Dtype,
    shape: &'a [u64],
    data_offsets: [u64; 2],
}

impl Serialize for HeaderJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, self.metadata)?;
        }
        for &(spec, data_offsets) in self.entries {
            let entry = EntryJson {
                dtype: spec.dtype,
                shape: &spec.shape,
                data_offsets,
            };
            map.serialize_entry(&spec.name, &entry)?;
        }
        map.end()
    }
}

#[cfg(test)]
// A list of one range is what is meant.
#[expect(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_ends_nearest_to_its_share() {
        let count = NonZero::new(2).unwrap();
        assert_eq!(balanced_runs(&[1, 1, 1, 1], count), [0..2, 2..4]);
        assert_eq!(balanced_runs(&[10, 1, 1], count), [0..1, 1..3]);
        assert_eq!(balanced_runs(&[1, 1, 10], count), [0..2, 2..3]);
        assert_eq!(balanced_runs(&[0, 0, 0], count), [0..2, 2..3]);
        assert_eq!(balanced_runs(&[5], count), [0..1]);
        assert_eq!(balanced_runs(&[], count), [0..0]);
    }

    #[test]
    fn a_bounded_run_holds_at_most_its_bytes_or_one_tensor() {
        assert_eq!(bounded_runs(&[4, 4, 4], 8), [0..2, 2..3]);
        assert_eq!(bounded_runs(&[4, 9, 4], 8), [0..1, 1..2, 2..3]);
        assert_eq!(bounded_runs(&[0, 0], 0), [0..2]);
        assert_eq!(bounded_runs(&[], 8), [0..0]);
    }

    proptest! {
        #[test]
        fn balanced_runs_cover_everything_evenly(
            sizes in prop::collection::vec(0u64..1000, 0..50),
            count in 1u32..12,
        ) {
            let runs = balanced_runs(&sizes, NonZero::new(count).unwrap());
            prop_assert_eq!(runs.len(), (count as usize).min(sizes.len()).max(1));
            let covered: Vec<usize> = runs.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..sizes.len()).collect::<Vec<_>>());
            let total: u64 = sizes.iter().sum();
            let largest = sizes.iter().max().copied().unwrap_or(0);
            for run in &runs {
                prop_assert!(!run.is_empty() || sizes.is_empty());
                let bytes: u64 = sizes[run.clone()].iter().sum();
                prop_assert!(bytes <= total / runs.len() as u64 + largest + 1, "{run:?} of {runs:?}");
            }
        }

        #[test]
        fn bounded_runs_are_as_long_as_the_bound_allows(
            sizes in prop::collection::vec(0u64..100, 0..50),
            max_bytes in 0u64..300,
        ) {
            let runs = bounded_runs(&sizes, max_bytes);
            let covered: Vec<usize> = runs.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..sizes.len()).collect::<Vec<_>>());
            for run in &runs {
                let bytes: u64 = sizes[run.clone()].iter().sum();
                prop_assert!(bytes <= max_bytes || run.len() == 1);
                if let Some(next) = sizes.get(run.end) {
                    prop_assert!(bytes + next > max_bytes);
                }
            }
        }
    }
}
