use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::{HEADER_LIMIT_BYTES, LENGTH_BYTES, METADATA_KEY, diagnosis};
use crate::{Dtype, DuplicateNames, Error, Result, TensorEntry, json};

/// A parsed SafeTensors header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SafetensorsHeader {
    /// The tensors in ascending order of offset. Offsets count from the start of the file, and the
    /// `file` of each is 0.
    pub tensors: Vec<TensorEntry>,
    /// The header's `__metadata__`; empty if there is none.
    pub metadata: BTreeMap<String, String>,
}

/// The length of a SafeTensors header in bytes, from the first 8 bytes of the file.
///
/// Call this before reading, and so before allocating for, the header itself, which is the
/// `safetensors_header_bytes` bytes from byte 8 on. `path` is only named in errors.
///
/// # Errors
///
/// [`Error::FileTooShort`], [`Error::HeaderTooLarge`] or [`Error::HeaderPastEnd`].
pub fn safetensors_header_bytes(path: &Path, start: &[u8], file_bytes: u64) -> Result<u64> {
    let Some(&length) = start.first_chunk() else {
        return Err(Error::FileTooShort {
            path: path.to_owned(),
            file_bytes,
        });
    };
    let header_bytes = u64::from_le_bytes(length);
    check_header_bytes(path, header_bytes, file_bytes)?;
    Ok(header_bytes)
}

fn check_header_bytes(path: &Path, header_bytes: u64, file_bytes: u64) -> Result<()> {
    if header_bytes > HEADER_LIMIT_BYTES {
        return Err(Error::HeaderTooLarge {
            path: path.to_owned(),
            header_bytes,
            limit_bytes: HEADER_LIMIT_BYTES,
        });
    }
    if LENGTH_BYTES + header_bytes > file_bytes {
        return Err(Error::HeaderPastEnd {
            path: path.to_owned(),
            header_bytes,
            file_bytes,
        });
    }
    Ok(())
}

/// Parses and validates a SafeTensors header.
///
/// `header` is the JSON text alone, without the 8 bytes of its length; `file_bytes` is the length of
/// the whole file. `path` is only named in errors, so that a header that came from elsewhere, an
/// object store for example, can be parsed too. Accepts what version 0.8 of the reference
/// implementation accepts, save that [`DuplicateNames::Reject`] refuses a name that appears twice.
///
/// # Errors
///
/// One [`Error`] variant per rule of the format, naming the tensor that breaks it.
pub fn parse_safetensors_header(
    path: &Path,
    header: &[u8],
    file_bytes: u64,
    duplicate_names: DuplicateNames,
) -> Result<SafetensorsHeader> {
    let header_bytes = header.len() as u64;
    check_header_bytes(path, header_bytes, file_bytes)?;
    let text = json::text(path, "header", header)?;
    let (mut tensors, metadata) = parse_entries(path, text)?;

    if has_repeated_names(&tensors) {
        match duplicate_names {
            DuplicateNames::Reject => return Err(first_repeated_name(path, &tensors)),
            DuplicateNames::LastWins => keep_last(&mut tensors),
        }
    }
    tensors.sort_by(|(left_name, left), (right_name, right)| {
        // Tensors of no bytes may share an offset; the name makes their order the same every time.
        left.data_offsets
            .cmp(&right.data_offsets)
            .then_with(|| left_name.cmp(right_name))
    });

    let data_start = LENGTH_BYTES + header_bytes;
    let data_end = validate(path, &tensors)?;
    let needed_bytes = data_start.saturating_add(data_end);
    if file_bytes < needed_bytes {
        let data_bytes = file_bytes - data_start;
        return Err(Error::Truncated {
            path: path.to_owned(),
            file_bytes,
            needed_bytes,
            damaged: tensors
                .into_iter()
                .filter(|(_, raw)| raw.data_offsets.1 > data_bytes.max(raw.data_offsets.0))
                .map(|(name, _)| name)
                .collect(),
        });
    }
    if file_bytes > needed_bytes {
        return Err(Error::TrailingBytes {
            path: path.to_owned(),
            file_bytes,
            described_bytes: needed_bytes,
        });
    }

    let tensors = tensors.into_iter().map(|(name, raw)| {
        let (begin, end) = raw.data_offsets;
        TensorEntry {
            name,
            dtype: raw.dtype,
            shape: raw.shape,
            file: 0,
            offset: data_start + begin,
            bytes: end - begin,
            strides: None,
        }
    });
    Ok(SafetensorsHeader {
        tensors: tensors.collect(),
        metadata: metadata.unwrap_or_default(),
    })
}

type Entries = (Vec<(String, RawTensor)>, Option<BTreeMap<String, String>>);

/// The entries of a header in the order of the text, repeated names included.
fn parse_entries(path: &Path, text: &str) -> Result<Entries> {
    // What this takes, the other takes too, in several times the time. What it does not take proves
    // nothing.
    if let Ok(plain) = serde_json::from_str::<PlainHeader>(text) {
        return Ok((plain.tensors, plain.metadata));
    }
    match serde_json::from_str::<RawHeader>(text) {
        Ok(raw) => Ok((raw.tensors.0, raw.metadata)),
        Err(refusal) => Err(diagnosis::diagnose(path, text, &refusal)),
    }
}

fn has_repeated_names(tensors: &[(String, RawTensor)]) -> bool {
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    // Writers sort by dtype and then by name, and this kind of sorting merges such runs in linear time.
    names.sort();
    names
        .windows(2)
        .any(|pair| matches!(pair, [left, right] if left == right))
}

/// The error about the first name, in the order of the text, that was there before.
fn first_repeated_name(path: &Path, tensors: &[(String, RawTensor)]) -> Error {
    let mut names = HashSet::with_capacity(tensors.len());
    let repeated = tensors.iter().find(|(name, _)| !names.insert(name));
    Error::DuplicateTensor {
        path: path.to_owned(),
        tensor: repeated.map(|(name, _)| name.clone()).unwrap_or_default(),
    }
}

/// Drops all but the last of the entries that share a name, before the offsets are looked at: what
/// the reference does by collecting into a map.
fn keep_last(tensors: &mut Vec<(String, RawTensor)>) {
    let last: HashMap<String, RawTensor> = tensors.drain(..).collect();
    tensors.extend(last);
}

/// Checks every tensor, in ascending order of offset, and returns where the data ends.
fn validate(path: &Path, tensors: &[(String, RawTensor)]) -> Result<u64> {
    let mut previous: Option<&str> = None;
    let mut previous_end = 0;
    for (name, raw) in tensors {
        let (begin, end) = raw.data_offsets;
        if end < begin {
            return Err(Error::ReversedOffsets {
                path: path.to_owned(),
                tensor: name.clone(),
                begin,
                end,
            });
        }
        if begin != previous_end {
            return Err(misplaced(path, name, begin, previous, previous_end));
        }
        let needed_bytes = data_bytes(path, name, raw.dtype, &raw.shape)?;
        let stored_bytes = end - begin;
        if needed_bytes != stored_bytes {
            return Err(Error::SizeMismatch {
                path: path.to_owned(),
                tensor: name.clone(),
                dtype: raw.dtype,
                shape: raw.shape.clone(),
                needed_bytes,
                stored_bytes,
            });
        }
        previous = Some(name);
        previous_end = end;
    }
    Ok(previous_end)
}

fn misplaced(
    path: &Path,
    tensor: &str,
    begin: u64,
    previous: Option<&str>,
    previous_end: u64,
) -> Error {
    let path = path.to_owned();
    let tensor = tensor.to_owned();
    match previous.map(str::to_owned) {
        None => Error::FirstOffset {
            path,
            tensor,
            begin,
        },
        Some(previous) if begin > previous_end => Error::Hole {
            path,
            tensor,
            begin,
            previous,
            previous_end,
        },
        Some(previous) => Error::Overlap {
            path,
            tensor,
            begin,
            previous,
            previous_end,
        },
    }
}

/// The size in bytes of a contiguous tensor.
pub(crate) fn data_bytes(path: &Path, tensor: &str, dtype: Dtype, shape: &[u64]) -> Result<u64> {
    // In the order of the dimensions, so that a zero rescues exactly the shapes that it rescues in
    // the reference.
    let bits = shape
        .iter()
        .try_fold(1, |count: u64, &dimension| count.checked_mul(dimension))
        .and_then(|elements| elements.checked_mul(u64::from(dtype.bits())));
    let Some(bits) = bits else {
        return Err(Error::ShapeOverflow {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            dtype,
            shape: shape.to_owned(),
        });
    };
    if !bits.is_multiple_of(8) {
        return Err(Error::PartialByte {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            dtype,
            shape: shape.to_owned(),
            bits,
        });
    }
    Ok(bits / 8)
}

// These types have the derived shapes of the reference's own, because derived deserialisers accept
// more than the format's text says (an array for a struct, `{"F32": null}` for a unit variant), and
// `flatten` goes through a buffer with rules of its own. The one difference is that repeated names
// are kept, so that they can be refused.

#[derive(serde::Deserialize)]
struct RawHeader {
    #[serde(rename = "__metadata__")]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(flatten)]
    tensors: RawTensors,
}

#[derive(serde::Deserialize)]
pub(super) struct RawTensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A header as writers write it: nothing but the fields of the format.
///
/// Without `flatten` there is no buffer between text and value, which makes parsing several times faster.
/// What the two ways treat differently are fields that the format does not know; here they are refused.
struct PlainHeader {
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainTensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for PlainHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PlainHeaderVisitor;

        impl<'de> Visitor<'de> for PlainHeaderVisitor {
            type Value = PlainHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut metadata = None;
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA_KEY {
                        let PlainTensor {
                            dtype,
                            shape,
                            data_offsets,
                        } = map.next_value()?;
                        let raw = RawTensor {
                            dtype,
                            shape,
                            data_offsets,
                        };
                        tensors.push((name, raw));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(A::Error::duplicate_field(METADATA_KEY));
                    }
                }
                Ok(PlainHeader {
                    metadata: metadata.flatten(),
                    tensors,
                })
            }
        }

        deserializer.deserialize_map(PlainHeaderVisitor)
    }
}

struct RawTensors(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawTensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawTensorsVisitor;

        impl<'de> Visitor<'de> for RawTensorsVisitor {
            type Value = RawTensors;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensor entries")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(RawTensors(entries))
            }
        }

        deserializer.deserialize_map(RawTensorsVisitor)
    }
}
