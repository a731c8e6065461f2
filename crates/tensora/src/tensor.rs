use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tensora_formats::{Dtype, TensorEntry, TensorPart};

use crate::Result;

/// A loaded tensor: a view of shared memory with dtype and shape.
///
/// Cloning copies no data. The memory lives as long as any tensor, or any [`Bytes`] taken from one, that
/// lies in it; tensors of one file share one piece of memory.
#[derive(Clone)]
pub struct Tensor {
    entry: Arc<Entry>,
    data: Bytes,
}

struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Option<Vec<usize>>,
}

impl Tensor {
    pub(crate) fn new(entry: &TensorEntry, data: Bytes) -> Self {
        Self {
            entry: Arc::new(Entry {
                name: entry.name.clone(),
                dtype: entry.dtype,
                shape: to_usize(&entry.shape),
                strides: entry.strides.as_deref().map(to_usize),
            }),
            data,
        }
    }

    /// A part of a tensor, in row-major order.
    pub(crate) fn of_part(entry: &TensorEntry, part: &TensorPart, data: Bytes) -> Self {
        Self {
            entry: Arc::new(Entry {
                name: entry.name.clone(),
                dtype: entry.dtype,
                shape: to_usize(part.shape()),
                strides: None,
            }),
            data,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.entry.name
    }

    /// Its element type.
    pub fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    /// Its dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    /// For a tensor that is stored as a strided view: the stride of each dimension, in elements. `None`
    /// when it is contiguous in row-major order, as all SafeTensors are.
    pub fn strides(&self) -> Option<&[usize]> {
        self.entry.strides.as_deref()
    }

    /// Whether the bytes are the elements in row-major order.
    pub fn is_contiguous(&self) -> bool {
        self.entry.strides.is_none()
    }

    /// The bytes as stored, little-endian; for a strided view, its whole storage. Cloning them, or
    /// slicing them, copies nothing.
    pub fn bytes(&self) -> &Bytes {
        &self.data
    }

    /// The elements in row-major order: the bytes themselves where they are contiguous, a gathered copy
    /// for a strided view.
    ///
    /// # Errors
    ///
    /// When there is no memory for the copy: a stride of 0 lets few stored bytes describe any
    /// number of elements.
    pub fn to_contiguous(&self) -> Result<Bytes> {
        match &self.entry.strides {
            None => Ok(self.data.clone()),
            Some(strides) => gather(
                &self.data,
                &self.entry.shape,
                strides,
                self.entry.dtype.bits() as usize / 8,
            )
            .map(Bytes::from),
        }
    }

    /// Number of bytes of the elements in row-major order.
    pub fn contiguous_bytes(&self) -> usize {
        match self.entry.strides {
            None => self.data.len(),
            Some(_) => {
                let item_bytes = self.entry.dtype.bits() as usize / 8;
                element_count(&self.entry.shape).saturating_mul(item_bytes)
            }
        }
    }
}

/// Saturates where the product is more than any memory holds.
fn element_count(shape: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    shape
        .iter()
        .fold(1, |count, &dimension| count.saturating_mul(dimension))
}

/// Copies a strided view into row-major order. Its extent was checked against the storage when the
/// metadata was read.
fn gather(
    storage: &[u8],
    shape: &[usize],
    strides: &[usize],
    item_bytes: usize,
) -> Result<Vec<u8>> {
    let count = element_count(shape);
    let bytes = count.saturating_mul(item_bytes);
    let mut gathered = Vec::new();
    gathered
        .try_reserve_exact(bytes)
        .map_err(|_| tensora_io::Error::Memory {
            bytes: bytes as u64,
            purpose: "a strided tensor in row-major order",
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
    let mut position = vec![0_usize; shape.len()];
    for _ in 0..count {
        let element: usize = position
            .iter()
            .zip(strides)
            .map(|(at, stride)| at * stride)
            .sum();
        gathered.extend_from_slice(&storage[element * item_bytes..][..item_bytes]);
        for dimension in (0..shape.len()).rev() {
            position[dimension] += 1;
            if position[dimension] < shape[dimension] {
                break;
            }
            position[dimension] = 0;
        }
    }
    Ok(gathered)
}

fn to_usize(dimensions: &[u64]) -> Vec<usize> {
    dimensions
        .iter()
        .map(|&dimension| usize::try_from(dimension).unwrap_or(usize::MAX))
        .collect()
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("name", &self.entry.name)
            .field("dtype", &self.entry.dtype)
            .field("shape", &self.entry.shape)
            .field("bytes", &self.data.len())
            .finish_non_exhaustive()
    }
}

/// Tensors can be handed straight to the `safetensors` crate; a clone is a cheap one.
///
/// # Panics
///
/// `data` panics where [`Tensor::to_contiguous`] is an error, because the trait knows no errors: for a strided
/// view, when there is no memory for the copy.
#[cfg(feature = "safetensors")]
impl safetensors::View for Tensor {
    fn dtype(&self) -> safetensors::Dtype {
        dtype_of_reference(self.entry.dtype)
    }

    fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        if self.is_contiguous() {
            std::borrow::Cow::Borrowed(&self.data)
        } else {
            match self.to_contiguous() {
                Ok(bytes) => std::borrow::Cow::Owned(bytes.into()),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn data_len(&self) -> usize {
        self.contiguous_bytes()
    }
}

#[cfg(feature = "safetensors")]
fn dtype_of_reference(dtype: Dtype) -> safetensors::Dtype {
    use safetensors::Dtype as Reference;
    match dtype {
        Dtype::Bool => Reference::BOOL,
        Dtype::F4 => Reference::F4,
        Dtype::F6E2M3 => Reference::F6_E2M3,
        Dtype::F6E3M2 => Reference::F6_E3M2,
        Dtype::U8 => Reference::U8,
        Dtype::I8 => Reference::I8,
        Dtype::F8E5M2 => Reference::F8_E5M2,
        Dtype::F8E4M3 => Reference::F8_E4M3,
        Dtype::F8E8M0 => Reference::F8_E8M0,
        Dtype::F8E4M3Fnuz => Reference::F8_E4M3FNUZ,
        Dtype::F8E5M2Fnuz => Reference::F8_E5M2FNUZ,
        Dtype::I16 => Reference::I16,
        Dtype::U16 => Reference::U16,
        Dtype::F16 => Reference::F16,
        Dtype::BF16 => Reference::BF16,
        Dtype::I32 => Reference::I32,
        Dtype::U32 => Reference::U32,
        Dtype::F32 => Reference::F32,
        Dtype::C64 => Reference::C64,
        Dtype::F64 => Reference::F64,
        Dtype::I64 => Reference::I64,
        Dtype::U64 => Reference::U64,
        // `Dtype` may grow; a test holds that this table grows with it.
        other => unreachable!("dtype {other} has no counterpart in the safetensors crate"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "safetensors")]
    #[test]
    fn every_dtype_has_its_counterpart() {
        for &dtype in Dtype::ALL {
            let reference = dtype_of_reference(dtype);
            assert_eq!(reference.to_string(), dtype.name());
            assert_eq!(reference.bitsize(), dtype.bits() as usize);
        }
    }

    #[test]
    fn gathers_what_strides_address() {
        let storage: Vec<u8> = (0..24).collect();
        // A transposed 3 × 4 matrix of two-byte elements.
        let gathered = gather(&storage, &[4, 3], &[1, 4], 2).unwrap();
        let expected: Vec<u8> = (0..4_u8)
            .flat_map(|column| {
                (0..3_u8).flat_map(move |row| [8 * row + 2 * column, 8 * row + 2 * column + 1])
            })
            .collect();
        assert_eq!(gathered, expected);
        assert_eq!(gather(&storage, &[], &[], 2).unwrap(), [0, 1]);
        assert!(gather(&storage, &[3, 0], &[1, 1], 2).unwrap().is_empty());
        assert_eq!(gather(&storage, &[3], &[0], 1).unwrap(), [0, 0, 0]);
        assert!(gather(&storage, &[1 << 60], &[0], 8).is_err());
    }
}
