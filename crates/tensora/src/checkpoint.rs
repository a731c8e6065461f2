use std::sync::Arc;

use tensora_formats::CheckpointIndex;

use crate::selection::position;
use crate::{LoadReport, Result, Tensor};

/// Loaded tensors, by name.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub(crate) index: Arc<CheckpointIndex>,
    /// Sorted by name, as the index is.
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) report: LoadReport,
}

impl Checkpoint {
    /// The tensor of this name.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchTensor`](crate::Error::NoSuchTensor) when the checkpoint has none, with similar names;
    /// [`Error::NotSelected`](crate::Error::NotSelected) when it has one that this load left out.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        match self.get(name) {
            Some(tensor) => Ok(tensor),
            None => {
                position(&self.index, name)?;
                Err(crate::Error::NotSelected {
                    name: name.to_owned(),
                })
            }
        }
    }

    /// The tensor of this name, if it was loaded.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors
            .binary_search_by(|tensor| tensor.name().cmp(name))
            .ok()
            .map(|number| &self.tensors[number])
    }

    /// The loaded tensors, in bytewise order of their names.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The loaded tensors, in bytewise order of their names.
    pub fn iter(&self) -> std::slice::Iter<'_, Tensor> {
        self.tensors.iter()
    }

    /// The names of the loaded tensors, in bytewise order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.iter().map(Tensor::name)
    }

    /// How many tensors were loaded.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether no tensor was loaded, because the checkpoint holds none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The content digest of the loaded tensors: the same for the same tensors, whatever the format, the
    /// sharding and the backend. Its definition stands in `docs/FORMATS.md`.
    ///
    /// # Errors
    ///
    /// When a strided tensor's bytes cannot be gathered.
    #[cfg(feature = "convert")]
    pub fn digest(&self) -> Result<tensora_convert::Digest> {
        self.digest_with(&tensora_io::Control::new())
    }

    /// [`digest`](Self::digest), watched and stopped by `control`; its progress is in bytes hashed.
    ///
    /// # Errors
    ///
    /// As [`digest`](Self::digest), and when it was cancelled.
    #[cfg(feature = "convert")]
    pub fn digest_with(&self, control: &tensora_io::Control) -> Result<tensora_convert::Digest> {
        let threads =
            std::thread::available_parallelism().unwrap_or(std::num::NonZero::<usize>::MIN);
        // Not those of the index: a slice has another shape.
        let numbers = |counts: &[usize]| counts.iter().map(|&count| count as u64).collect();
        let layouts: Vec<(Vec<u64>, Option<Vec<u64>>)> = self
            .tensors
            .iter()
            .map(|tensor| (numbers(tensor.shape()), tensor.strides().map(numbers)))
            .collect();
        let stored = self.tensors.iter().zip(&layouts);
        let stored = stored.map(|(tensor, (shape, strides))| tensora_convert::StoredTensor {
            name: tensor.name(),
            dtype: tensor.dtype(),
            shape,
            strides: strides.as_deref(),
            bytes: tensor.bytes(),
        });
        let digest = tensora_convert::content_digest(stored, threads, control)?;
        Ok(digest)
    }

    /// The metadata of the whole checkpoint, also of tensors that were not selected.
    pub fn index(&self) -> &CheckpointIndex {
        &self.index
    }

    /// What the load did, and how fast.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }
}

impl<'c> IntoIterator for &'c Checkpoint {
    type Item = &'c Tensor;
    type IntoIter = std::slice::Iter<'c, Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl IntoIterator for Checkpoint {
    type Item = Tensor;
    type IntoIter = std::vec::IntoIter<Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.tensors.into_iter()
    }
}
