use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{PADDING_LIMIT_BYTES, TAIL_LIMIT_BYTES, partition_name, short_name};
use crate::json::{self, Array, Place, Text};
use crate::safetensors::data_bytes;
use crate::{
    DamagedTensor, Dtype, DuplicateNames, Error, Format, Result, ShortPartition, TensorEntry,
};

/// A parsed `tensor_index.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerlessLlmIndex {
    /// Which of the two dialects it is written in. An index without tensors is taken for the store
    /// dialect.
    pub format: Format,
    /// The tensors, sorted by name. The `file` of each is its partition's number, and its offset
    /// counts from the start of that partition.
    pub tensors: Vec<TensorEntry>,
}

/// Parses a ServerlessLLM index of either dialect and checks it against its partitions.
///
/// `partition_bytes` holds the lengths of `tensor.data_0`, `tensor.data_1`, … in bytes. `path`, the
/// path of the index, is only named in errors, as are the partitions beside it.
///
/// # Errors
///
/// One [`Error`] variant per rule of the format, naming the tensor or the partition that breaks it.
pub fn parse_serverlessllm_index(
    path: &Path,
    index: &[u8],
    partition_bytes: &[u64],
    duplicate_names: DuplicateNames,
) -> Result<ServerlessLlmIndex> {
    let (index, short) = parse(path, index, partition_bytes, duplicate_names)?;
    if short.is_empty() {
        return Ok(index);
    }
    Err(Error::PartitionsTooShort {
        path: path.to_owned(),
        partitions: short,
    })
}

/// As [`parse_serverlessllm_index`], but tolerates partitions that are too short: they are returned, and
/// the tensors in them that are not all there are left out.
pub(super) fn parse(
    path: &Path,
    index: &[u8],
    partition_bytes: &[u64],
    duplicate_names: DuplicateNames,
) -> Result<(ServerlessLlmIndex, Vec<ShortPartition>)> {
    let text = json::text(path, "index", index)?;
    let mut raw = Vec::new();
    json::object(path, text, text, "the index", |name, value| {
        raw.push((name, value));
        Ok(())
    })?;
    json::sort_unique(path, &mut raw, duplicate_names)?;

    // As many as are there, but no more than can be: what is not an entry may be shorter than one.
    let mut entries = Vec::with_capacity(raw.len().min(text.len() / SHORTEST_ENTRY_BYTES));
    for (name, value) in raw {
        entries.push(Entry::parse(path, text, name.into_owned(), value)?);
    }
    let format = dialect(path, &entries)?;
    let mut tensors = place(path, entries, partition_bytes)?;
    if format == Format::ServerlessLlmStore {
        check_coverage(path, &tensors, partition_bytes)?;
    }
    let short = split_off_damaged(&mut tensors, partition_bytes);
    Ok((ServerlessLlmIndex { format, tensors }, short))
}

/// The length of `"":[0,0,[],[],"u8"]`.
const SHORTEST_ENTRY_BYTES: usize = 19;

/// One entry, sound in itself but not yet checked against the partitions.
struct Entry {
    tensor: TensorEntry,
    /// The partition, in the dialect that names it.
    partition: Option<u64>,
}

impl Entry {
    fn parse(path: &Path, text: &str, name: String, value: &RawValue) -> Result<Self> {
        let Fields {
            offset,
            bytes,
            shape,
            strides,
            dtype: dtype_name,
            partition,
        } = match serde_json::from_str(value.get()) {
            Ok(fields) => fields,
            // Something is wrong with it. Slower, field by field, it becomes known what.
            Err(_) => Fields::examine(path, text, &name, value)?,
        };
        let Some(dtype) = parse_dtype(&dtype_name) else {
            return Err(Error::UnknownDtype {
                path: path.to_owned(),
                tensor: name,
                dtype: dtype_name.into_owned(),
            });
        };
        let strides = resolve_strides(path, &name, dtype, &shape, strides, bytes)?;
        Ok(Self {
            tensor: TensorEntry {
                name,
                dtype,
                shape,
                file: 0,
                offset,
                bytes,
                strides,
            },
            partition,
        })
    }
}

/// An entry as it is written.
struct Fields<'a> {
    offset: u64,
    bytes: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
    dtype: Cow<'a, str>,
    partition: Option<u64>,
}

impl<'a> Fields<'a> {
    fn examine(path: &Path, text: &str, tensor: &str, value: &'a RawValue) -> Result<Self> {
        let at = |field| Place {
            path,
            tensor,
            field,
        };
        let Ok(fields) = serde_json::from_str::<Array<'_, 6>>(value.get()) else {
            return Err(at("its entry").wrong_type("an array of 5 or 6 fields", value));
        };
        let (offset, bytes, shape, strides, dtype, partition) =
            match (fields.first.as_slice(), fields.count) {
                (&[offset, bytes, shape, strides, dtype], 5) => {
                    (offset, bytes, shape, strides, dtype, None)
                }
                (&[offset, bytes, shape, strides, dtype, partition], 6) => {
                    (offset, bytes, shape, strides, dtype, Some(partition))
                }
                _ => {
                    return Err(Error::FieldCount {
                        path: path.to_owned(),
                        tensor: tensor.to_owned(),
                        count: fields.count,
                    });
                }
            };
        let offset = at("offset").number(offset)?;
        let bytes = at("size").number(bytes)?;
        let shape = at("shape").numbers(shape)?;
        let strides = at("stride").numbers(strides)?;
        if json::kind(dtype) != "a string" {
            return Err(at("dtype").wrong_type("a dtype's name", dtype));
        }
        let dtype = json::string(path, text, dtype)?;
        let partition = partition
            .map(|partition| at("partition").number(partition))
            .transpose()?;
        Ok(Self {
            offset,
            bytes,
            shape,
            strides,
            dtype,
            partition,
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for FieldsVisitor<'a> {
            type Value = Fields<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of 5 or 6 fields")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
                    seq: &mut A,
                ) -> Result<T, A::Error> {
                    seq.next_element()?
                        .ok_or_else(|| A::Error::custom("too few fields"))
                }
                // In the order of the text.
                Ok(Fields {
                    offset: next(&mut seq)?,
                    bytes: next(&mut seq)?,
                    shape: next(&mut seq)?,
                    strides: next(&mut seq)?,
                    dtype: next::<Text<'_>, _>(&mut seq)?.0,
                    partition: seq.next_element()?,
                })
            }
        }

        deserializer.deserialize_seq(FieldsVisitor(PhantomData))
    }
}

/// The dtype that either dialect calls `name`.
fn parse_dtype(name: &str) -> Option<Dtype> {
    let by_short_name = || {
        Dtype::ALL
            .iter()
            .copied()
            .find(|&dtype| short_name(dtype) == Some(name))
    };
    Dtype::from_torch_name(name).or_else(by_short_name)
}

/// Checks strides and stored size against shape and dtype; returns the strides of a tensor that is
/// not contiguous.
fn resolve_strides(
    path: &Path,
    tensor: &str,
    dtype: Dtype,
    shape: &[u64],
    strides: Vec<u64>,
    stored_bytes: u64,
) -> Result<Option<Vec<u64>>> {
    if shape.len() != strides.len() {
        return Err(Error::StrideCount {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            dimensions: shape.len(),
            strides: strides.len(),
        });
    }
    let packed_bytes = data_bytes(path, tensor, dtype, shape)?;
    if is_row_major(shape, &strides) {
        if packed_bytes != stored_bytes {
            return Err(Error::SizeMismatch {
                path: path.to_owned(),
                tensor: tensor.to_owned(),
                dtype,
                shape: shape.to_owned(),
                needed_bytes: packed_bytes,
                stored_bytes,
            });
        }
        return Ok(None);
    }
    let needed_bytes = view_bytes(dtype, shape, &strides);
    if needed_bytes > stored_bytes {
        return Err(Error::StorageTooSmall {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            needed_bytes,
            stored_bytes,
        });
    }
    Ok(Some(strides))
}

/// Whether elements at `strides` lie in row-major order without gaps. The stride of a dimension of 1
/// is never used and may be anything, as may all strides if there are no elements.
pub(crate) fn is_row_major(shape: &[u64], strides: &[u64]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut packed_stride = 1u64;
    shape
        .iter()
        .zip(strides)
        .rev()
        .all(|(&dimension, &stride)| {
            let packed = dimension == 1 || stride == packed_stride;
            packed_stride = packed_stride.saturating_mul(dimension);
            packed
        })
}

/// The bytes from the start of the storage to the end of the last element; saturating. No dimension
/// may be 0.
pub(crate) fn view_bytes(dtype: Dtype, shape: &[u64], strides: &[u64]) -> u64 {
    let last_element = shape
        .iter()
        .zip(strides)
        .fold(0u64, |last, (&dimension, &stride)| {
            last.saturating_add((dimension - 1).saturating_mul(stride))
        });
    last_element
        .saturating_add(1)
        .saturating_mul(u64::from(dtype.bits() / 8))
}

/// The dialect that all entries share.
fn dialect(path: &Path, entries: &[Entry]) -> Result<Format> {
    let store = entries.iter().find(|entry| entry.partition.is_none());
    let partitioned = entries.iter().find(|entry| entry.partition.is_some());
    match (store, partitioned) {
        (Some(store), Some(partitioned)) => Err(Error::MixedDialects {
            path: path.to_owned(),
            store: store.tensor.name.clone(),
            partitioned: partitioned.tensor.name.clone(),
        }),
        (None, Some(_)) => Ok(Format::ServerlessLlmPartitioned),
        _ => Ok(Format::ServerlessLlmStore),
    }
}

/// Turns each entry's offset into one within its partition. The partition may end before the tensor
/// does, but not where another follows that the tensor would run into.
fn place(path: &Path, entries: Vec<Entry>, partition_bytes: &[u64]) -> Result<Vec<TensorEntry>> {
    // Where each partition starts in the concatenation that the store dialect counts through.
    let mut next_start = 0u64;
    let starts: Vec<u64> = partition_bytes
        .iter()
        .map(|&bytes| {
            let start = next_start;
            next_start = next_start.saturating_add(bytes);
            start
        })
        .collect();

    let mut tensors = Vec::with_capacity(entries.len());
    for Entry {
        mut tensor,
        partition,
    } in entries
    {
        let global_offset = tensor.offset;
        let file = match partition {
            Some(partition) => usize::try_from(partition).ok(),
            // The last partition that starts at or before the offset: empty ones hold nothing.
            None => starts
                .partition_point(|&start| start <= global_offset)
                .checked_sub(1),
        };
        let Some((file, &file_bytes)) =
            file.and_then(|file| Some((file, partition_bytes.get(file)?)))
        else {
            return Err(Error::MissingPartition {
                path: path.to_owned(),
                partition: partition.unwrap_or(0),
                tensor: Some(tensor.name),
                partitions: partition_bytes.len(),
            });
        };
        let start = if partition.is_none() { starts[file] } else { 0 };
        tensor.file = file;
        tensor.offset = global_offset - start;
        if global_offset.checked_add(tensor.bytes).is_none() {
            return Err(Error::RangeOverflow {
                path: path.to_owned(),
                tensor: tensor.name,
                offset: global_offset,
                bytes: tensor.bytes,
            });
        }
        if tensor.bytes == 0 {
            // Nothing of it can be lost; its range still has to lie inside the file.
            tensor.offset = tensor.offset.min(file_bytes);
        }
        let end = tensor.offset + tensor.bytes;
        if end > file_bytes && partition.is_none() && file + 1 < partition_bytes.len() {
            return Err(Error::CrossesPartition {
                path: path.to_owned(),
                tensor: tensor.name,
                offset: global_offset,
                bytes: tensor.bytes,
                partition: file as u64,
                partition_end: start.saturating_add(file_bytes),
            });
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// Removes the tensors that reach past the ends of their partitions; returns these partitions.
fn split_off_damaged(
    tensors: &mut Vec<TensorEntry>,
    partition_bytes: &[u64],
) -> Vec<ShortPartition> {
    let mut short: BTreeMap<usize, ShortPartition> = BTreeMap::new();
    tensors.retain_mut(|tensor| {
        let range = tensor.range();
        let file_bytes = partition_bytes.get(tensor.file).copied().unwrap_or(0);
        if range.end <= file_bytes {
            return true;
        }
        let partition = short.entry(tensor.file).or_insert_with(|| ShortPartition {
            file: partition_name(tensor.file as u64),
            file_bytes,
            needed_bytes: 0,
            tensors: Vec::new(),
        });
        partition.needed_bytes = partition.needed_bytes.max(range.end);
        partition.tensors.push(DamagedTensor {
            name: mem::take(&mut tensor.name),
            present_bytes: file_bytes.saturating_sub(range.start),
            range,
        });
        false
    });
    short.into_values().collect()
}

fn partition_path(index_path: &Path, partition: usize) -> PathBuf {
    index_path.with_file_name(partition_name(partition as u64))
}

/// Checks that records and their padding fill the partitions of the store dialect.
///
/// Offsets count through the concatenation, so that a partition longer or shorter than it was written
/// shifts every later tensor onto wrong bytes. Bytes without a record are the only trace of that.
fn check_coverage(path: &Path, tensors: &[TensorEntry], partition_bytes: &[u64]) -> Result<()> {
    let mut by_place: Vec<&TensorEntry> = tensors.iter().collect();
    by_place.sort_unstable_by_key(|tensor| (tensor.file, tensor.offset));
    let mut rest = by_place.as_slice();
    for (partition, &file_bytes) in partition_bytes.iter().enumerate() {
        let records;
        (records, rest) = rest.split_at(rest.partition_point(|tensor| tensor.file == partition));
        if records.is_empty() {
            // An empty checkpoint has one empty partition.
            if tensors.is_empty() && file_bytes == 0 {
                continue;
            }
            return Err(Error::UnusedPartition {
                path: partition_path(path, partition),
                bytes: file_bytes,
            });
        }
        let mut covered_to = 0;
        let is_last = partition + 1 == partition_bytes.len();
        let ranges = records
            .iter()
            .filter(|tensor| tensor.bytes > 0)
            .map(|tensor| tensor.range())
            // What is behind the very last record shifts nothing itself; it is looked at below.
            .chain((!is_last).then_some(file_bytes..file_bytes));
        for range in ranges {
            let bytes = range.start.saturating_sub(covered_to);
            if bytes > PADDING_LIMIT_BYTES {
                return Err(Error::UnusedBytes {
                    path: partition_path(path, partition),
                    begin: covered_to,
                    bytes,
                });
            }
            covered_to = covered_to.max(range.end);
        }
        // An earlier partition that was cut off between two records has moved all later tensors towards the
        // front. Nothing shows it but that as much is left over at the end.
        let bytes = file_bytes.saturating_sub(covered_to);
        if is_last && partition > 0 && bytes > TAIL_LIMIT_BYTES {
            return Err(Error::SurplusTail {
                path: partition_path(path, partition),
                begin: covered_to,
                bytes,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_major_is_what_torch_calls_contiguous() {
        assert!(is_row_major(&[], &[]));
        assert!(is_row_major(&[2, 3], &[3, 1]));
        assert!(is_row_major(&[2, 1, 3], &[3, 99, 1]));
        assert!(is_row_major(&[2, 0], &[7, 7]));
        assert!(!is_row_major(&[2, 3], &[1, 2]));
        assert!(!is_row_major(&[2, 3], &[4, 1]));
        assert!(!is_row_major(&[4], &[0]));
    }

    #[test]
    fn a_view_reaches_to_its_last_element() {
        assert_eq!(view_bytes(Dtype::F32, &[2, 3], &[1, 2]), 6 * 4);
        assert_eq!(view_bytes(Dtype::F16, &[2, 3], &[10, 2]), (10 + 4 + 1) * 2);
        assert_eq!(view_bytes(Dtype::U8, &[1 << 40], &[0]), 1);
        assert_eq!(view_bytes(Dtype::U8, &[3], &[u64::MAX]), u64::MAX);
    }

    #[test]
    fn both_spellings_of_a_dtype() {
        for &dtype in Dtype::ALL {
            for name in [dtype.torch_name(), short_name(dtype)]
                .into_iter()
                .flatten()
            {
                assert_eq!(parse_dtype(name), Some(dtype), "{name}");
            }
        }
        for name in ["BF16", "bfloat16", "f4", "", "torch.f32"] {
            assert_eq!(parse_dtype(name), None, "{name}");
        }
    }
}
