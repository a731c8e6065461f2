//! The digests of a checkpoint's tensors, from data as it is read.

use std::collections::BTreeMap;

use tensora_formats::{CheckpointIndex, Dtype, TensorEntry};
use tensora_io::Control;

use super::{VerifyOptions, check_unchanged};
use crate::assemble::read_tensors;
use crate::row_major::packed_bytes;
use crate::{ContentHasher, DataHasher, Digest, Result};

/// What one tensor is: dtype, shape and the digest of its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDigest {
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// The BLAKE3 of the elements in row-major order.
    pub digest: Digest,
}

/// What all tensors of a checkpoint are, and what they are together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentDigests {
    tensors: BTreeMap<String, TensorDigest>,
    content: Digest,
}

impl ContentDigests {
    /// # Errors
    ///
    /// [`Error::TensorSize`](crate::Error::TensorSize) for a tensor whose size overflows or fills no whole
    /// number of bytes.
    pub(crate) fn new(tensors: BTreeMap<String, TensorDigest>) -> Result<Self> {
        let mut hasher = ContentHasher::new();
        for (name, tensor) in &tensors {
            hasher.insert(name, tensor.dtype, &tensor.shape, tensor.digest)?;
        }
        Ok(Self {
            content: hasher.finish(),
            tensors,
        })
    }

    /// Each tensor's, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorDigest> {
        &self.tensors
    }

    /// The content digest, as [`content_digest`](crate::content_digest) computes it.
    pub fn content(&self) -> Digest {
        self.content
    }
}

/// The size of a tensor in row-major order, in bytes.
pub(crate) fn row_major_bytes(tensor: &TensorEntry) -> Result<u64> {
    packed_bytes(&tensor.name, tensor.dtype, &tensor.shape)
}

/// Reads all tensors and digests them.
pub(super) fn read(
    options: &VerifyOptions,
    index: &CheckpointIndex,
    control: &Control,
) -> Result<ContentDigests> {
    let mut hashers = TensorHashers::new(index)?;
    let tensors: Vec<usize> = (0..index.tensors().len()).collect();
    hashers.read(options, &tensors, control)?;
    check_unchanged(index)?;
    hashers.finish()
}

/// Digests tensors whose bytes come piece after piece, those of different tensors in any order.
pub(crate) struct TensorHashers<'a> {
    index: &'a CheckpointIndex,
    /// By the tensors' positions in the index.
    states: Vec<State>,
}

enum State {
    /// Made with a tensor's first bytes and gone with its last ones, because a hasher is large against what
    /// many tensors hold.
    Open {
        hasher: Option<Box<DataHasher>>,
        hashed_bytes: u64,
        bytes: u64,
    },
    Done(Digest),
}

impl State {
    fn new(tensor: &TensorEntry) -> Result<Self> {
        Ok(match row_major_bytes(tensor)? {
            0 => Self::Done(DataHasher::new().finish()),
            bytes => Self::Open {
                hasher: None,
                hashed_bytes: 0,
                bytes,
            },
        })
    }
}

impl<'a> TensorHashers<'a> {
    pub(crate) fn new(index: &'a CheckpointIndex) -> Result<Self> {
        let states = index
            .tensors()
            .iter()
            .map(State::new)
            .collect::<Result<_>>()?;
        Ok(Self { index, states })
    }

    /// Reads these tensors and digests them.
    pub(crate) fn read(
        &mut self,
        options: &VerifyOptions,
        tensors: &[usize],
        control: &Control,
    ) -> Result<()> {
        read_tensors(
            self.index,
            tensors,
            &options.reading,
            options.memory_limit_bytes,
            control,
            &mut |position, offset, bytes| {
                self.update(tensors[position], offset, bytes);
                control.advance(bytes.len() as u64);
                Ok(())
            },
        )
    }

    /// The next bytes of a tensor in row-major order, from `offset` on.
    pub(crate) fn update(&mut self, tensor: usize, offset: u64, next: &[u8]) {
        let State::Open {
            hasher,
            hashed_bytes,
            bytes,
        } = &mut self.states[tensor]
        else {
            assert!(next.is_empty(), "nothing comes after a tensor's end");
            return;
        };
        assert!(offset == *hashed_bytes, "pieces come in order");
        let hasher = hasher.get_or_insert_default();
        hasher.update(next);
        *hashed_bytes += next.len() as u64;
        if hashed_bytes == bytes {
            self.states[tensor] = State::Done(hasher.finish());
        }
    }

    /// Forgets what came of a tensor, which comes again from its beginning.
    pub(crate) fn restart(&mut self, tensor: usize) -> Result<()> {
        self.states[tensor] = State::new(&self.index.tensors()[tensor])?;
        Ok(())
    }

    /// The digests, once every tensor has been seen to its end.
    pub(crate) fn finish(self) -> Result<ContentDigests> {
        let entries = self.index.tensors().iter().zip(self.states);
        let tensors = entries.map(|(entry, state)| {
            let State::Done(digest) = state else {
                unreachable!("tensor {:?} was not read to its end", entry.name)
            };
            let tensor = TensorDigest {
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                digest,
            };
            (entry.name.clone(), tensor)
        });
        ContentDigests::new(tensors.collect())
    }
}
