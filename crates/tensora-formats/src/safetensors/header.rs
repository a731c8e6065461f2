use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

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
    match serde_json::from_str::<RawHeader>(text) {
        Ok(raw) => Ok((raw.tensors, raw.metadata)),
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

// The reference derives its deserialisers, and derived ones accept more than the format's text says: an
// array for a struct, `{"F32": null}` for the name of a dtype, fields that nobody knows. It also flattens
// the tensors into the header, so that every value goes through a buffer with rules of its own and twenty
// times the size of the text. These deserialisers accept the same values, without a buffer, and keep
// repeated names, so that they can be refused.

struct RawHeader {
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawHeaderVisitor;

        impl<'de> Visitor<'de> for RawHeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut metadata = None;
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA_KEY {
                        tensors.push((name, map.next_value()?));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(A::Error::duplicate_field(METADATA_KEY));
                    }
                }
                Ok(RawHeader {
                    metadata: metadata.flatten(),
                    tensors,
                })
            }
        }

        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

pub(super) struct RawTensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A field of a tensor's entry.
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    Unknown,
}

impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawTensorVisitor;

        impl<'de> Visitor<'de> for RawTensorVisitor {
            type Value = RawTensor;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a tensor's entry")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut dtype = None;
                let mut shape = None;
                let mut data_offsets = None;
                while let Some(field) = map.next_key()? {
                    let repeated = match field {
                        Field::Dtype => dtype.replace(map.next_value()?).map(|_| "dtype"),
                        Field::Shape => shape.replace(map.next_value()?).map(|_: Vec<u64>| "shape"),
                        Field::DataOffsets => data_offsets
                            .replace(map.next_value()?)
                            .map(|_| "data_offsets"),
                        Field::Unknown => map.next_value().map(|Unknown| None)?,
                    };
                    if let Some(repeated) = repeated {
                        return Err(A::Error::duplicate_field(repeated));
                    }
                }
                let missing = A::Error::missing_field;
                Ok(RawTensor {
                    dtype: dtype.ok_or_else(|| missing("dtype"))?,
                    shape: shape.ok_or_else(|| missing("shape"))?,
                    data_offsets: data_offsets.ok_or_else(|| missing("data_offsets"))?,
                })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let too_short = |length| A::Error::invalid_length(length, &"3 fields");
                Ok(RawTensor {
                    dtype: seq.next_element()?.ok_or_else(|| too_short(0))?,
                    shape: seq.next_element()?.ok_or_else(|| too_short(1))?,
                    data_offsets: seq.next_element()?.ok_or_else(|| too_short(2))?,
                })
            }
        }

        deserializer.deserialize_any(RawTensorVisitor)
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldVisitor;

        impl Visitor<'_> for FieldVisitor {
            type Value = Field;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Self::Value, E> {
                Ok(match name {
                    "dtype" => Field::Dtype,
                    "shape" => Field::Shape,
                    "data_offsets" => Field::DataOffsets,
                    _ => Field::Unknown,
                })
            }
        }

        deserializer.deserialize_identifier(FieldVisitor)
    }
}

/// The value of a field that the format does not know.
///
/// Not [`IgnoredAny`](serde::de::IgnoredAny), which lets pass what the reference refuses there: numbers
/// that are too large, broken escapes, nesting without end.
struct Unknown;

impl<'de> Deserialize<'de> for Unknown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UnknownVisitor;

        impl<'de> Visitor<'de> for UnknownVisitor {
            type Value = Unknown;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Unknown)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Unknown)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
                Ok(Unknown)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Unknown)
            }

            fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
                Ok(Unknown)
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Unknown)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                while let Some(Unknown) = seq.next_element()? {}
                Ok(Unknown)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                while let Some((Unknown, Unknown)) = map.next_entry()? {}
                Ok(Unknown)
            }
        }

        deserializer.deserialize_any(UnknownVisitor)
    }
}
