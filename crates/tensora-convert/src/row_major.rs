//! The elements of a tensor in row-major order, however it is stored.

use std::ops::Range;

use tensora_formats::Dtype;

use crate::{Error, Result};

/// How many bytes of a strided tensor are gathered at once: few enough for the second-level cache,
/// enough for the widest vectors of whoever consumes them. A multiple of every element size.
const GATHER_BYTES: usize = 64 << 10;

/// A tensor and the bytes that are stored for it, as a checkpoint gives them.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: &'a [u64],
    /// The stride of each dimension in elements; `None` for a contiguous (row-major) tensor.
    pub strides: Option<&'a [u64]>,
    /// The stored bytes: exactly the elements for a contiguous tensor, at least as far as the last
    /// element for a strided one.
    pub bytes: &'a [u8],
}

/// Copies the elements of a tensor into row-major order without gaps.
///
/// A contiguous tensor is copied as it is; a caller that can share the bytes need not call this.
///
/// ```
/// use tensora_convert::{StoredTensor, gather_row_major};
/// use tensora_formats::Dtype;
///
/// let transposed = StoredTensor {
///     name: "t",
///     dtype: Dtype::U8,
///     shape: &[3, 2],
///     strides: Some(&[1, 3]),
///     bytes: &[1, 2, 3, 4, 5, 6],
/// };
/// assert_eq!(gather_row_major(&transposed)?, [1, 4, 2, 5, 3, 6]);
/// # Ok::<(), tensora_convert::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::TensorSize`], [`Error::StrideCount`], [`Error::StoredBytes`] or [`Error::PackedStrides`]
/// when bytes, dtype, shape and strides do not fit together, and [`Error::Memory`] when the result
/// does not fit into memory: a stride of 0 lets few stored bytes describe any number of elements.
pub fn gather_row_major(tensor: &StoredTensor<'_>) -> Result<Vec<u8>> {
    let elements = RowMajor::new(tensor)?;
    let no_memory = || Error::Memory {
        bytes: elements.len(),
        purpose: "a tensor in row-major order",
    };
    let len = usize::try_from(elements.len()).map_err(|_| no_memory())?;
    let mut gathered = Vec::new();
    gathered.try_reserve_exact(len).map_err(|_| no_memory())?;
    if let Some(bytes) = elements.contiguous() {
        gathered.extend_from_slice(bytes);
    } else {
        gathered.resize(len, 0);
        elements.read_at(0, &mut gathered);
    }
    Ok(gathered)
}

/// The row-major bytes of a tensor whose bytes, dtype, shape and strides have been found to fit
/// together.
#[derive(Debug)]
pub(crate) struct RowMajor<'a> {
    stored: &'a [u8],
    len: u64,
    order: Order,
}

#[derive(Debug)]
enum Order {
    /// The first `len` stored bytes, as they are.
    Contiguous,
    Strided {
        item_bytes: usize,
        row: Dimension,
        /// The dimensions around the row, innermost first.
        around: Vec<Dimension>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dimension {
    count: u64,
    /// In elements.
    stride: u64,
}

impl<'a> RowMajor<'a> {
    pub(crate) fn new(tensor: &StoredTensor<'a>) -> Result<Self> {
        let &StoredTensor {
            dtype,
            shape,
            strides,
            bytes: stored,
            ..
        } = tensor;
        let len = packed_bytes(tensor.name, dtype, shape)?;
        let wrong_size = |needed_bytes| Error::StoredBytes {
            tensor: tensor.name.to_owned(),
            dtype,
            shape: shape.to_owned(),
            needed_bytes,
            stored_bytes: stored.len() as u64,
        };
        let order = match strides {
            None if stored.len() as u64 != len => return Err(wrong_size(len)),
            None => Order::Contiguous,
            Some(strides) if strides.len() != shape.len() => {
                return Err(Error::StrideCount {
                    tensor: tensor.name.to_owned(),
                    dimensions: shape.len(),
                    strides: strides.len(),
                });
            }
            Some(_) if len == 0 => Order::Contiguous,
            Some(strides) => match merged_dimensions(shape, strides).as_slice() {
                [] | [Dimension { stride: 1, .. }] => {
                    if (stored.len() as u64) < len {
                        return Err(wrong_size(len));
                    }
                    Order::Contiguous
                }
                &[row, ref around @ ..] => {
                    if !dtype.bits().is_multiple_of(8) {
                        return Err(Error::PackedStrides {
                            tensor: tensor.name.to_owned(),
                            dtype,
                        });
                    }
                    let item_bytes = dtype.bits() / 8;
                    let needed_bytes = strided_bytes(shape, strides, item_bytes.into());
                    if needed_bytes.is_none_or(|needed| needed > stored.len() as u64) {
                        return Err(wrong_size(needed_bytes.unwrap_or(u64::MAX)));
                    }
                    Order::Strided {
                        item_bytes: item_bytes as usize,
                        row,
                        around: around.to_owned(),
                    }
                }
            },
        };
        Ok(Self { stored, len, order })
    }

    /// The number of row-major bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// All bytes, if they are stored in row-major order.
    pub(crate) fn contiguous(&self) -> Option<&'a [u8]> {
        match self.order {
            // `new` has found that there are so many.
            Order::Contiguous => usize::try_from(self.len)
                .ok()
                .and_then(|len| self.stored.get(..len)),
            Order::Strided { .. } => None,
        }
    }

    /// Calls `consume` with the row-major bytes of `range` in order, in parts. Strided ones pass through
    /// `buffer`. Both ends of the range lie between elements.
    pub(crate) fn for_each_part(
        &self,
        range: Range<u64>,
        buffer: &mut Vec<u8>,
        mut consume: impl FnMut(&[u8]),
    ) {
        if let Some(bytes) = self.contiguous() {
            consume(&bytes[index(range.start)..index(range.end)]);
            return;
        }
        buffer.resize(GATHER_BYTES, 0);
        for begin in range.clone().step_by(GATHER_BYTES) {
            let len = (range.end - begin).min(GATHER_BYTES as u64);
            let part = &mut buffer[..index(len)];
            self.read_at(begin, part);
            consume(part);
        }
    }

    /// Fills `out` with the row-major bytes from `begin` on, of which there must be enough. Both ends
    /// lie between elements.
    pub(crate) fn read_at(&self, begin: u64, mut out: &mut [u8]) {
        debug_assert!(begin + out.len() as u64 <= self.len);
        let (item_bytes, row, around) = match &self.order {
            Order::Contiguous => {
                let begin = index(begin);
                out.copy_from_slice(&self.stored[begin..begin + out.len()]);
                return;
            }
            Order::Strided {
                item_bytes,
                row,
                around,
            } => (*item_bytes, *row, around),
        };

        // Where `begin` lies: the position in each dimension, and the row's first element.
        let element = begin / item_bytes as u64;
        let mut in_row = element % row.count;
        let mut rest = element / row.count;
        let mut row_start = 0;
        let mut positions = Vec::with_capacity(around.len());
        for dimension in around {
            let position = rest % dimension.count;
            rest /= dimension.count;
            row_start += position * dimension.stride;
            positions.push(position);
        }

        while !out.is_empty() {
            let wanted = (out.len() / item_bytes) as u64;
            let count = (row.count - in_row).min(wanted);
            let (filled, left) = out.split_at_mut(index(count) * item_bytes);
            let first = index(row_start + in_row * row.stride) * item_bytes;
            copy_row(&self.stored[first..], index(row.stride), item_bytes, filled);
            out = left;
            in_row = 0;
            // The next row, like an odometer.
            for (position, dimension) in positions.iter_mut().zip(around) {
                *position += 1;
                row_start += dimension.stride;
                if *position < dimension.count {
                    break;
                }
                *position = 0;
                row_start -= dimension.count * dimension.stride;
            }
        }
    }
}

/// An offset that lies inside a slice, and so fits.
#[allow(clippy::cast_possible_truncation)]
fn index(offset: u64) -> usize {
    offset as usize
}

/// Copies elements that are `stride` elements apart.
fn copy_row(stored: &[u8], stride: usize, item_bytes: usize, out: &mut [u8]) {
    match item_bytes {
        _ if stride == 1 => out.copy_from_slice(&stored[..out.len()]),
        1 => copy_items::<1>(stored, stride, out),
        2 => copy_items::<2>(stored, stride, out),
        4 => copy_items::<4>(stored, stride, out),
        8 => copy_items::<8>(stored, stride, out),
        _ => {
            for (i, item) in out.chunks_exact_mut(item_bytes).enumerate() {
                let at = i * stride * item_bytes;
                item.copy_from_slice(&stored[at..at + item_bytes]);
            }
        }
    }
}

/// The same with a size known to the compiler, which turns each copy into one move.
fn copy_items<const BYTES: usize>(stored: &[u8], stride: usize, out: &mut [u8]) {
    let (items, _) = out.as_chunks_mut::<BYTES>();
    for (i, item) in items.iter_mut().enumerate() {
        let at = i * stride * BYTES;
        item.copy_from_slice(&stored[at..at + BYTES]);
    }
}

/// The size in bytes of a tensor without gaps.
pub(crate) fn packed_bytes(tensor: &str, dtype: Dtype, shape: &[u64]) -> Result<u64> {
    let elements = if shape.contains(&0) {
        Some(0)
    } else {
        shape
            .iter()
            .try_fold(1u64, |count, &dimension| count.checked_mul(dimension))
    };
    elements
        .and_then(|elements| dtype.bytes_for(elements))
        .ok_or_else(|| Error::TensorSize {
            tensor: tensor.to_owned(),
            dtype,
            shape: shape.to_owned(),
        })
}

/// The bytes up to the end of the last element; `None` if they overflow. No dimension may be 0.
fn strided_bytes(shape: &[u64], strides: &[u64], item_bytes: u64) -> Option<u64> {
    shape
        .iter()
        .zip(strides)
        .try_fold(0u64, |last, (&count, &stride)| {
            last.checked_add((count - 1).checked_mul(stride)?)
        })?
        .checked_add(1)?
        .checked_mul(item_bytes)
}

/// The dimensions, innermost first, without those of one element, and with those merged that lie in
/// memory as one. Their number of elements must not overflow.
fn merged_dimensions(shape: &[u64], strides: &[u64]) -> Vec<Dimension> {
    let mut merged: Vec<Dimension> = Vec::with_capacity(shape.len());
    for (&count, &stride) in shape.iter().zip(strides).rev() {
        if count == 1 {
            continue;
        }
        if let Some(inner) = merged.last_mut()
            && inner.stride.checked_mul(inner.count) == Some(stride)
        {
            inner.count *= count;
        } else {
            merged.push(Dimension { count, stride });
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor<'a>(
        dtype: Dtype,
        shape: &'a [u64],
        strides: Option<&'a [u64]>,
        bytes: &'a [u8],
    ) -> StoredTensor<'a> {
        StoredTensor {
            name: "t",
            dtype,
            shape,
            strides,
            bytes,
        }
    }

    /// One index vector after the other, each element found by its own dot product.
    fn naive(shape: &[u64], strides: &[u64], item_bytes: u64, stored: &[u8]) -> Vec<u8> {
        let elements: u64 = shape.iter().product();
        let mut gathered = Vec::new();
        for element in 0..elements {
            let mut rest = element;
            let mut at = 0;
            for (count, stride) in shape.iter().zip(strides).rev() {
                at += rest % count * stride;
                rest /= count;
            }
            let at = usize::try_from(at * item_bytes).unwrap();
            gathered.extend_from_slice(&stored[at..][..usize::try_from(item_bytes).unwrap()]);
        }
        gathered
    }

    #[test]
    fn dimensions_that_lie_as_one_are_merged() {
        let dimension = |count, stride| Dimension { count, stride };
        assert_eq!(merged_dimensions(&[], &[]), []);
        assert_eq!(merged_dimensions(&[1, 1], &[9, 9]), []);
        assert_eq!(
            merged_dimensions(&[2, 3, 4], &[12, 4, 1]),
            [dimension(24, 1)]
        );
        assert_eq!(
            merged_dimensions(&[2, 3, 4], &[24, 4, 1]),
            [dimension(12, 1), dimension(2, 24)]
        );
        assert_eq!(
            merged_dimensions(&[2, 3, 4], &[3, 1, 6]),
            [dimension(4, 6), dimension(6, 1)]
        );
        // An overflowing product is no stride of anything.
        assert_eq!(merged_dimensions(&[2, 4], &[0, 1 << 62]).len(), 2);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let wrong = |tensor: StoredTensor<'_>| RowMajor::new(&tensor).unwrap_err();
        assert!(matches!(
            wrong(tensor(Dtype::F32, &[2], None, &[0; 7])),
            Error::StoredBytes {
                needed_bytes: 8,
                stored_bytes: 7,
                ..
            }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::F32, &[2], None, &[0; 9])),
            Error::StoredBytes { .. }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::F32, &[2], Some(&[1]), &[0; 7])),
            Error::StoredBytes { .. }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::U8, &[2, 3], Some(&[1, 2]), &[0; 5])),
            Error::StoredBytes {
                needed_bytes: 6,
                stored_bytes: 5,
                ..
            }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::U8, &[3], Some(&[u64::MAX]), &[0; 5])),
            Error::StoredBytes {
                needed_bytes: u64::MAX,
                ..
            }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::U8, &[2, 3], Some(&[1]), &[0; 6])),
            Error::StrideCount {
                dimensions: 2,
                strides: 1,
                ..
            }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::F4, &[2, 2], Some(&[1, 2]), &[0; 2])),
            Error::PackedStrides { .. }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::U16, &[1 << 63, 2], None, &[])),
            Error::TensorSize { .. }
        ));
        assert!(matches!(
            wrong(tensor(Dtype::F4, &[3], None, &[0; 2])),
            Error::TensorSize { .. }
        ));
    }

    #[test]
    fn an_expanded_tensor_too_large_for_memory_is_an_error() {
        let expanded = tensor(Dtype::U8, &[1 << 59], Some(&[0]), &[7]);
        let error = gather_row_major(&expanded).unwrap_err();
        assert!(
            matches!(error, Error::Memory { bytes, .. } if bytes == 1 << 59),
            "{error}"
        );
    }

    #[test]
    fn a_zero_cancels_other_dimensions_and_scalars_have_one_element() {
        let gather = |tensor| gather_row_major(&tensor).unwrap();
        assert!(gather(tensor(Dtype::F64, &[u64::MAX, 0, 3], None, &[])).is_empty());
        assert!(gather(tensor(Dtype::F64, &[0, 3], Some(&[1, 7]), &[])).is_empty());
        assert_eq!(gather(tensor(Dtype::U16, &[], None, &[1, 2])), [1, 2]);
        // The storage may go on after the view.
        assert_eq!(gather(tensor(Dtype::U8, &[], Some(&[]), &[1, 2])), [1]);
        assert_eq!(
            gather(tensor(Dtype::F4, &[2, 2], Some(&[2, 1]), &[1, 2])),
            [1, 2]
        );
    }

    /// Shapes with strides of any kind, and permutations of contiguous tensors, as transposing makes.
    fn views() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let permuted = prop::collection::vec(1u64..5, 0..5)
            .prop_map(|shape| {
                let mut packed = 1;
                shape
                    .into_iter()
                    .map(|count| {
                        let stride = packed;
                        packed *= count;
                        (count, stride)
                    })
                    .collect::<Vec<_>>()
            })
            .prop_shuffle();
        prop_oneof![prop::collection::vec((1u64..5, 0u64..9), 0..5), permuted]
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_gather(
            view in views(),
            dtype in prop::sample::select(vec![Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::C64]),
            extra in 0usize..5,
        ) {
            let (shape, strides): (Vec<u64>, Vec<u64>) = view.into_iter().unzip();
            let item_bytes = u64::from(dtype.bits() / 8);
            let needed = strided_bytes(&shape, &strides, item_bytes).unwrap();
            let stored: Vec<u8> = (0..usize::try_from(needed).unwrap() + extra)
                .map(|i| u8::try_from(i % 251).unwrap())
                .collect();
            let expected = naive(&shape, &strides, item_bytes, &stored);
            let tensor = tensor(dtype, &shape, Some(&strides), &stored);
            prop_assert_eq!(&gather_row_major(&tensor).unwrap(), &expected);

            // Any part of it, as streaming reads it.
            let elements = RowMajor::new(&tensor).unwrap();
            let item_bytes = usize::try_from(item_bytes).unwrap();
            let items = expected.len() / item_bytes;
            for begin in 0..items {
                let end = (begin + 1 + extra).min(items);
                let mut part = vec![0; (end - begin) * item_bytes];
                elements.read_at((begin * item_bytes) as u64, &mut part);
                prop_assert_eq!(&part, &expected[begin * item_bytes..end * item_bytes]);
            }
        }
    }
}
