//! Two checkpoints against each other.

use std::collections::BTreeSet;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use tensora_formats::{CheckpointIndex, Dtype};
use tensora_io::Control;

use super::{ContentDigests, VerifyOptions, digests};
use crate::assemble::read_tensors;
use crate::{Error, Result};

/// What two checkpoints hold, and where that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Comparison {
    /// What the left one holds.
    pub left: ContentDigests,
    /// What the right one holds.
    pub right: ContentDigests,
    /// Every difference, by the names of the tensors; a tensor of which both dtype and shape differ has two.
    pub differences: Vec<Difference>,
}

impl Comparison {
    /// Whether both hold the same tensors, that is, have the same content digest.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }
}

/// How one tensor of two checkpoints differs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// The right checkpoint lacks it.
    OnlyInLeft {
        /// The tensor.
        tensor: String,
    },
    /// The left checkpoint lacks it.
    OnlyInRight {
        /// The tensor.
        tensor: String,
    },
    /// Its element types differ. Its bytes were not compared.
    Dtype {
        /// The tensor.
        tensor: String,
        /// The element type in the left checkpoint.
        left: Dtype,
        /// The element type in the right checkpoint.
        right: Dtype,
    },
    /// Its shapes differ. Its bytes were not compared.
    Shape {
        /// The tensor.
        tensor: String,
        /// The dimensions in the left checkpoint, outermost first.
        left: Vec<u64>,
        /// The dimensions in the right checkpoint, outermost first.
        right: Vec<u64>,
    },
    /// It has the same dtype and shape in both, but not the same bytes.
    Bytes {
        /// The tensor.
        tensor: String,
        /// The first byte that differs. `None` where it was not looked for, after
        /// [`VerifyOptions::MAX_LOCATED`] of them, or was not found again.
        first: Option<FirstDifference>,
    },
}

/// Where the data of two tensors of the same dtype and shape begins to differ.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FirstDifference {
    /// The byte, counted from the start of the elements in row-major order.
    pub offset: u64,
    /// The index of the element that the byte belongs to, one number for each dimension; of the first one,
    /// where several packed elements (F4, F6) share it.
    pub element: Vec<u64>,
    /// The byte in the left checkpoint.
    pub left: u8,
    /// The byte in the right checkpoint.
    pub right: u8,
}

impl Difference {
    /// The tensor that differs.
    pub fn tensor(&self) -> &str {
        match self {
            Self::OnlyInLeft { tensor }
            | Self::OnlyInRight { tensor }
            | Self::Dtype { tensor, .. }
            | Self::Shape { tensor, .. }
            | Self::Bytes { tensor, .. } => tensor,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: ", self.tensor())?;
        match self {
            Self::OnlyInLeft { .. } => f.write_str("only in the left checkpoint"),
            Self::OnlyInRight { .. } => f.write_str("only in the right checkpoint"),
            Self::Dtype { left, right, .. } => {
                write!(f, "{left} on the left, {right} on the right")
            }
            Self::Shape { left, right, .. } => {
                write!(f, "{left:?} on the left, {right:?} on the right")
            }
            Self::Bytes { first: None, .. } => f.write_str("its bytes differ"),
            Self::Bytes {
                first: Some(first), ..
            } => write!(f, "its bytes differ, {first}"),
        }
    }
}

impl fmt::Display for FirstDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            offset,
            element,
            left,
            right,
        } = self;
        write!(
            f,
            "first byte {offset}, in element {element:?}: 0x{left:02x} on the left, 0x{right:02x} on the right"
        )
    }
}

/// Digests both checkpoints, and looks for the first byte where that is all that differs.
pub(super) fn compare(
    options: &VerifyOptions,
    left: &CheckpointIndex,
    right: &CheckpointIndex,
    control: &Control,
) -> Result<Comparison> {
    let left_digests = digests::read(options, left, control)?;
    let right_digests = digests::read(options, right, control)?;
    let mut differences = differences(&left_digests, &right_digests);
    let of_bytes = differences
        .iter_mut()
        .filter_map(|difference| match difference {
            Difference::Bytes { tensor, first } => Some((tensor, first)),
            _ => None,
        });
    for (tensor, first) in of_bytes.take(VerifyOptions::MAX_LOCATED) {
        let sides = (Side::new(left, tensor), Side::new(right, tensor));
        if let (Some(left), Some(right)) = sides {
            *first = locate(options, left, right, control)?;
        }
    }
    Ok(Comparison {
        left: left_digests,
        right: right_digests,
        differences,
    })
}

/// How the tensors differ, by name, without the places where bytes do.
pub(crate) fn differences(left: &ContentDigests, right: &ContentDigests) -> Vec<Difference> {
    let (left, right) = (left.tensors(), right.tensors());
    let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let mut differences = Vec::new();
    for name in names {
        let tensor = name.clone();
        let (left, right) = match (left.get(name), right.get(name)) {
            (Some(left), Some(right)) => (left, right),
            (Some(_), None) => {
                differences.push(Difference::OnlyInLeft { tensor });
                continue;
            }
            (None, _) => {
                differences.push(Difference::OnlyInRight { tensor });
                continue;
            }
        };
        if left.dtype != right.dtype {
            differences.push(Difference::Dtype {
                tensor: tensor.clone(),
                left: left.dtype,
                right: right.dtype,
            });
        }
        if left.shape != right.shape {
            differences.push(Difference::Shape {
                tensor,
                left: left.shape.clone(),
                right: right.shape.clone(),
            });
        } else if left.dtype == right.dtype && left.digest != right.digest {
            differences.push(Difference::Bytes {
                tensor,
                first: None,
            });
        }
    }
    differences
}

/// A tensor of one of two checkpoints.
#[derive(Clone, Copy)]
struct Side<'a> {
    index: &'a CheckpointIndex,
    /// Its position in the index.
    tensor: usize,
}

impl<'a> Side<'a> {
    fn new(index: &'a CheckpointIndex, name: &str) -> Option<Self> {
        let tensor = index
            .tensors()
            .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
            .ok()?;
        Some(Self { index, tensor })
    }

    /// Reads its bytes in row-major order, with a quarter of the memory.
    fn read(
        self,
        options: &VerifyOptions,
        control: &Control,
        consume: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        read_tensors(
            self.index,
            &[self.tensor],
            &options.reading,
            options.memory_limit_bytes / 4,
            control,
            &mut |_, _, bytes| consume(bytes),
        )
    }
}

/// How much of the left tensor goes at once to where the right one is read.
const MAX_HANDED_BYTES: u64 = 256 << 10;

/// The first byte that differs in two tensors of the same dtype and shape: both are read at the same time, and
/// no further than to there.
fn locate(
    options: &VerifyOptions,
    left: Side<'_>,
    right: Side<'_>,
    control: &Control,
) -> Result<Option<FirstDifference>> {
    // Three are alive at once: one being made, one waiting, one being compared.
    let handed_bytes = MAX_HANDED_BYTES.min(options.memory_limit_bytes / 8);
    let handed_bytes = usize::try_from(handed_bytes).unwrap_or(usize::MAX);
    let (sender, receiver) = mpsc::sync_channel(1);
    let (found, left_result, right_result) = thread::scope(|scope| {
        let reader = thread::Builder::new()
            .name("tensora-compare".to_owned())
            .spawn_scoped(scope, move || {
                left.read(options, control, &mut |bytes| {
                    for part in bytes.chunks(handed_bytes) {
                        // Who receives has stopped: it has found something, or failed.
                        sender.send(part.to_vec()).map_err(|_| Error::Cancelled)?;
                    }
                    Ok(())
                })
            })
            .map_err(|source| Error::Thread { source })?;
        let mut search = Search::new(receiver);
        let right_result = right.read(options, control, &mut |bytes| search.compare(bytes));
        // Dropped in here, because the reader ends with it.
        let found = search.finish();
        let left_result = reader.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((found, left_result, right_result))
    })?;
    if let Some((offset, left_byte, right_byte)) = found {
        let entry = &left.index.tensors()[left.tensor];
        return Ok(Some(FirstDifference {
            offset,
            element: element_at(offset, entry.dtype, &entry.shape),
            left: left_byte,
            right: right_byte,
        }));
    }
    // When one side fails, the other one is told no more than to stop.
    for result in [left_result, right_result] {
        match result {
            Err(error) if !error.is_cancelled() => return Err(error),
            _ => {}
        }
    }
    control.check().map_err(Error::reading)?;
    Ok(None)
}

/// Compares what is read with what comes from the other side, which is cut at other places.
struct Search {
    other: Receiver<Vec<u8>>,
    part: Vec<u8>,
    /// How much of `part` has been compared.
    part_done: usize,
    offset: u64,
    found: Option<(u64, u8, u8)>,
}

impl Search {
    fn new(other: Receiver<Vec<u8>>) -> Self {
        Self {
            other,
            part: Vec::new(),
            part_done: 0,
            offset: 0,
            found: None,
        }
    }

    /// Stops with [`Error::Cancelled`] when there is nothing more to be found.
    fn compare(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.part_done == self.part.len() {
                self.part = self.other.recv().map_err(|_| Error::Cancelled)?;
                self.part_done = 0;
            }
            let other = &self.part[self.part_done..];
            let len = other.len().min(bytes.len());
            let (now, later) = bytes.split_at(len);
            if now != &other[..len]
                && let Some((at, (&left, &right))) = other
                    .iter()
                    .zip(now)
                    .enumerate()
                    .find(|(_, (left, right))| left != right)
            {
                self.found = Some((self.offset + at as u64, left, right));
                return Err(Error::Cancelled);
            }
            self.offset += len as u64;
            self.part_done += len;
            bytes = later;
        }
        Ok(())
    }

    /// Offset, left and right byte of the first difference.
    fn finish(self) -> Option<(u64, u8, u8)> {
        self.found
    }
}

/// The index of the element that the byte at `offset` belongs to.
fn element_at(offset: u64, dtype: Dtype, shape: &[u64]) -> Vec<u64> {
    let bit = u128::from(offset) * 8;
    // Less than the number of elements.
    let mut rest = u64::try_from(bit / u128::from(dtype.bits())).unwrap_or(u64::MAX);
    let mut element = vec![0; shape.len()];
    for (position, &count) in element.iter_mut().zip(shape).rev() {
        *position = rest % count.max(1);
        rest /= count.max(1);
    }
    element
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{Digest, TensorDigest};

    fn digests(tensors: &[(&str, Dtype, &[u64], u8)]) -> ContentDigests {
        let tensor = |&(name, dtype, shape, seed): &(&str, Dtype, &[u64], u8)| {
            let tensor = TensorDigest {
                dtype,
                shape: shape.to_vec(),
                digest: Digest::from_bytes([seed; 32]),
            };
            (name.to_owned(), tensor)
        };
        ContentDigests::new(tensors.iter().map(tensor).collect::<BTreeMap<_, _>>()).unwrap()
    }

    #[test]
    fn each_kind_of_difference_is_told_by_name() {
        let left = digests(&[
            ("bytes", Dtype::U8, &[3], 1),
            ("dtype", Dtype::F16, &[3], 1),
            ("left", Dtype::U8, &[3], 1),
            ("same", Dtype::U8, &[3], 1),
            ("shape", Dtype::U8, &[2, 3], 1),
            ("view", Dtype::U8, &[8], 1),
        ]);
        let right = digests(&[
            ("bytes", Dtype::U8, &[3], 2),
            ("dtype", Dtype::BF16, &[3], 2),
            ("right\n", Dtype::U8, &[3], 1),
            ("same", Dtype::U8, &[3], 1),
            ("shape", Dtype::U8, &[3, 2], 1),
            ("view", Dtype::F32, &[2], 1),
        ]);
        let found = differences(&left, &right);
        let text: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                r#""bytes": its bytes differ"#,
                r#""dtype": F16 on the left, BF16 on the right"#,
                r#""left": only in the left checkpoint"#,
                r#""right\n": only in the right checkpoint"#,
                r#""shape": [2, 3] on the left, [3, 2] on the right"#,
                r#""view": U8 on the left, F32 on the right"#,
                r#""view": [8] on the left, [2] on the right"#,
            ]
        );
        assert_eq!(found[3].tensor(), "right\n");
        assert_eq!(differences(&left, &left), []);
    }

    #[test]
    fn a_place_is_told_with_element_and_both_bytes() {
        let first = FirstDifference {
            offset: 11,
            element: vec![1, 2],
            left: 0,
            right: 0xa5,
        };
        let difference = Difference::Bytes {
            tensor: "t".to_owned(),
            first: Some(first),
        };
        assert_eq!(
            difference.to_string(),
            r#""t": its bytes differ, first byte 11, in element [1, 2]: 0x00 on the left, 0xa5 on the right"#
        );
    }

    #[test]
    fn a_byte_belongs_to_its_element() {
        assert_eq!(element_at(0, Dtype::F32, &[]), [0; 0]);
        assert_eq!(element_at(11, Dtype::BF16, &[3, 4]), [1, 1]);
        assert_eq!(element_at(23, Dtype::BF16, &[3, 4]), [2, 3]);
        assert_eq!(element_at(3, Dtype::F4, &[2, 4]), [1, 2]);
        // 6-bit elements 0, 1, 2, 3 begin in the bytes 0, 0, 1, 2.
        assert_eq!(element_at(1, Dtype::F6E2M3, &[4]), [1]);
        assert_eq!(element_at(2, Dtype::F6E2M3, &[4]), [2]);
    }

    #[test]
    fn a_search_does_not_mind_where_either_side_is_cut() {
        let left: Vec<u8> = (0..100).collect();
        for at in [0, 1, 49, 50, 99] {
            let mut right = left.clone();
            right[at] ^= 0x80;
            for (left_cut, right_cut) in [(1, 100), (100, 1), (7, 3), (10, 10)] {
                let (sender, receiver) = mpsc::channel();
                for part in left.chunks(left_cut) {
                    sender.send(part.to_vec()).unwrap();
                }
                let mut search = Search::new(receiver);
                let stopped = right
                    .chunks(right_cut)
                    .find_map(|part| search.compare(part).err());
                assert!(stopped.is_some_and(|error| error.is_cancelled()));
                assert_eq!(search.finish(), Some((at as u64, left[at], right[at])));
            }
        }
    }
}
