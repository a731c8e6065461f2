//! The content digest: one value for the same tensors, whatever the format and the sharding.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::num::NonZero;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};
use tensora_formats::Dtype;
use tensora_io::Control;

use crate::row_major::{RowMajor, packed_bytes};
use crate::{Digest, Error, Result, StoredTensor};

/// Tensors are hashed in pieces of this size, each by whichever thread is free, so that one large
/// tensor keeps no thread waiting for another. A power of two of at least 1 KiB makes each piece
/// a subtree of BLAKE3's tree.
const PIECE_BYTES: u64 = 4 << 20;

/// Adds up the digests of tensors, in any order, to the content digest of a checkpoint.
///
/// The content digest is BLAKE3 over the concatenation, for every tensor in ascending bytewise order
/// of its name, of: the name's length, the name; the length of the dtype's name, the dtype's name as
/// SafeTensors spells it; the rank, each dimension; the length of the data; the 32-byte BLAKE3 of the
/// data. Lengths, rank and dimensions are little-endian `u64`; data is the elements in row-major
/// order.
///
/// [`content_digest`] does all of it for tensors that are in memory together.
#[derive(Clone, Debug, Default)]
pub struct ContentHasher {
    /// What each tensor contributes after its name.
    records: BTreeMap<String, Vec<u8>>,
}

impl ContentHasher {
    /// A hasher without tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor, given the digest of its data as [`data_digest`] computes it.
    ///
    /// # Errors
    ///
    /// [`Error::DuplicateTensor`] when the name was added before, [`Error::TensorSize`] when the size
    /// of `shape` and `dtype` overflows or fills no whole number of bytes. The hasher is then as it
    /// was.
    pub fn insert(&mut self, name: &str, dtype: Dtype, shape: &[u64], data: Digest) -> Result<()> {
        let data_bytes = packed_bytes(name, dtype, shape)?;
        match self.records.entry(name.to_owned()) {
            Entry::Occupied(_) => Err(Error::DuplicateTensor {
                tensor: name.to_owned(),
            }),
            Entry::Vacant(entry) => {
                let mut record = Vec::new();
                extend_with_text(&mut record, dtype.name());
                record.extend_from_slice(&(shape.len() as u64).to_le_bytes());
                for dimension in shape {
                    record.extend_from_slice(&dimension.to_le_bytes());
                }
                record.extend_from_slice(&data_bytes.to_le_bytes());
                record.extend_from_slice(data.as_bytes());
                entry.insert(record);
                Ok(())
            }
        }
    }

    /// The digest of everything that was added.
    pub fn finish(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        let mut encoded_name = Vec::new();
        for (name, record) in &self.records {
            encoded_name.clear();
            extend_with_text(&mut encoded_name, name);
            hasher.update(&encoded_name);
            hasher.update(record);
        }
        Digest::from_bytes(hasher.finalize().into())
    }
}

fn extend_with_text(record: &mut Vec<u8>, text: &str) {
    record.extend_from_slice(&(text.len() as u64).to_le_bytes());
    record.extend_from_slice(text.as_bytes());
}

/// The content digest of tensors in memory, in any order; see [`ContentHasher`] for what it is.
///
/// `threads` threads, the calling one among them, share the work evenly whatever the sizes of the
/// tensors. Strided tensors are gathered piece by piece, so that beside the tensors only a few
/// hundred kilobytes are used. `control` watches the bytes hashed, and stops the hashing.
///
/// ```
/// use std::num::NonZero;
/// use tensora_convert::{StoredTensor, content_digest};
/// use tensora_formats::Dtype;
/// use tensora_io::Control;
///
/// let bias = StoredTensor {
///     name: "bias",
///     dtype: Dtype::F32,
///     shape: &[2],
///     strides: None,
///     bytes: &[0; 8],
/// };
/// let digest = content_digest([bias], NonZero::<usize>::MIN, &Control::new())?;
/// assert_eq!(
///     digest.to_string(),
///     "4f2d477c615a37f39d62ebee2f367e2babed67bc67ceafb1528ca0054fa4b6aa"
/// );
/// # Ok::<(), tensora_convert::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::DuplicateTensor`]; [`Error::TensorSize`], [`Error::StrideCount`], [`Error::StoredBytes`]
/// or [`Error::PackedStrides`] when a tensor's bytes, dtype, shape and strides do not fit together;
/// [`Error::Cancelled`].
pub fn content_digest<'a>(
    tensors: impl IntoIterator<Item = StoredTensor<'a>>,
    threads: NonZero<usize>,
    control: &Control,
) -> Result<Digest> {
    let tensors: Vec<StoredTensor<'a>> = tensors.into_iter().collect();
    let elements = tensors
        .iter()
        .map(RowMajor::new)
        .collect::<Result<Vec<_>>>()?;
    let work = Work::new(elements);
    let values = work.run(threads, control)?;
    let mut hasher = ContentHasher::new();
    for (position, tensor) in tensors.iter().enumerate() {
        let digest = root(&values[work.pieces(position)]);
        hasher.insert(tensor.name, tensor.dtype, tensor.shape, digest)?;
    }
    Ok(hasher.finish())
}

/// The BLAKE3 of one tensor's elements in row-major order, for [`ContentHasher::insert`].
///
/// `threads` and `control` are as in [`content_digest`].
///
/// # Errors
///
/// As [`content_digest`], but for the name.
pub fn data_digest(
    tensor: &StoredTensor<'_>,
    threads: NonZero<usize>,
    control: &Control,
) -> Result<Digest> {
    let work = Work::new(vec![RowMajor::new(tensor)?]);
    Ok(root(&work.run(threads, control)?))
}

/// The BLAKE3 of one tensor's data as it comes, piece after piece, for [`ContentHasher::insert`].
#[derive(Clone, Debug, Default)]
pub struct DataHasher(blake3::Hasher);

impl DataHasher {
    /// Below this, distributing costs more than it gains; the `blake3` crate's documentation says as much for
    /// x86-64.
    const MIN_PARALLEL_BYTES: usize = 128 << 10;

    /// Has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next bytes of the elements in row-major order. Long pieces are hashed by all processors at once, on the
    /// threads of the `rayon` crate.
    pub fn update(&mut self, bytes: &[u8]) {
        if bytes.len() < Self::MIN_PARALLEL_BYTES {
            self.0.update(bytes);
        } else {
            self.0.update_rayon(bytes);
        }
    }

    /// The digest of all bytes so far.
    pub fn finish(&self) -> Digest {
        Digest::from_bytes(self.0.finalize().into())
    }
}

/// Tensors cut into pieces, which are numbered through all tensors.
struct Work<'a> {
    elements: Vec<RowMajor<'a>>,
    /// The number of each tensor's first piece, and of the piece after the last.
    first_pieces: Vec<usize>,
}

impl<'a> Work<'a> {
    fn new(elements: Vec<RowMajor<'a>>) -> Self {
        let mut first_pieces = vec![0];
        let mut pieces = 0usize;
        for tensor in &elements {
            // A tensor without data has one piece all the same, because it has a digest. A count past
            // the address space can only come from a stride of 0 and would take centuries to hash.
            let of_tensor = tensor.len().div_ceil(PIECE_BYTES).max(1);
            pieces = pieces.saturating_add(usize::try_from(of_tensor).unwrap_or(usize::MAX));
            first_pieces.push(pieces);
        }
        Self {
            elements,
            first_pieces,
        }
    }

    /// The numbers of a tensor's pieces.
    fn pieces(&self, tensor: usize) -> Range<usize> {
        self.first_pieces[tensor]..self.first_pieces[tensor + 1]
    }

    /// Hashes all pieces, in parallel.
    fn run(&self, threads: NonZero<usize>, control: &Control) -> Result<Vec<ChainingValue>> {
        let pieces = self.first_pieces.last().copied().unwrap_or(0);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut hashed = Vec::new();
            let mut buffer = Vec::new();
            while !control.is_cancelled() {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= pieces {
                    break;
                }
                let (value, bytes) = self.hash(piece, &mut buffer);
                hashed.push((piece, value));
                control.advance(bytes);
            }
            hashed
        };
        let mut hashed = thread::scope(|scope| {
            // Where the system refuses another thread, those that run take its share.
            let workers: Vec<_> = (1..threads.get().min(pieces))
                .map_while(|number| {
                    thread::Builder::new()
                        .name(format!("tensora-hash-{number}"))
                        .spawn_scoped(scope, work)
                        .ok()
                })
                .collect();
            let mut hashed = work();
            for worker in workers {
                match worker.join() {
                    Ok(more) => hashed.extend(more),
                    Err(panic) => resume_unwind(panic),
                }
            }
            hashed
        });
        if hashed.len() < pieces {
            return Err(Error::Cancelled);
        }
        hashed.sort_unstable_by_key(|&(piece, _)| piece);
        Ok(hashed.into_iter().map(|(_, value)| value).collect())
    }

    /// Hashes one piece: the value of its subtree, or the digest if it is the tensor's only one. Also
    /// returns its length in bytes.
    fn hash(&self, piece: usize, buffer: &mut Vec<u8>) -> (ChainingValue, u64) {
        let tensor = self.first_pieces.partition_point(|&first| first <= piece) - 1;
        let pieces = self.pieces(tensor);
        let elements = &self.elements[tensor];
        let begin = (piece - pieces.start) as u64 * PIECE_BYTES;
        let end = elements.len().min(begin + PIECE_BYTES);

        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(begin);
        elements.for_each_part(begin..end, buffer, |part| {
            hasher.update(part);
        });
        let value = if pieces.len() == 1 {
            hasher.finalize().into()
        } else {
            hasher.finalize_non_root()
        };
        (value, end - begin)
    }
}

/// The digest of a tensor whose pieces have these values.
fn root(pieces: &[ChainingValue]) -> Digest {
    Digest::from_bytes(match pieces {
        [digest] => *digest,
        _ => {
            let (left, right) = children(pieces);
            merge_subtrees_root(&left, &right, Mode::Hash).into()
        }
    })
}

fn subtree(pieces: &[ChainingValue]) -> ChainingValue {
    match pieces {
        [value] => *value,
        _ => {
            let (left, right) = children(pieces);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

/// The two subtrees of at least two pieces: to the left the largest power of two that leaves some to
/// the right.
fn children(pieces: &[ChainingValue]) -> (ChainingValue, ChainingValue) {
    let (left, right) = pieces.split_at(pieces.len().next_power_of_two() / 2);
    (subtree(left), subtree(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_give_the_digest_of_the_whole() {
        let data: Vec<u8> = (0..700_001)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        for piece_bytes in [1 << 10, 100_003, DataHasher::MIN_PARALLEL_BYTES, data.len()] {
            let mut hasher = DataHasher::new();
            for piece in data.chunks(piece_bytes) {
                hasher.update(piece);
            }
            assert_eq!(hasher.finish().as_bytes(), blake3::hash(&data).as_bytes());
        }
        let nothing = DataHasher::new().finish();
        assert_eq!(nothing.as_bytes(), blake3::hash(&[]).as_bytes());
    }

    #[test]
    fn pieces_add_up_to_the_digest_of_the_whole() {
        let piece = usize::try_from(PIECE_BYTES).unwrap();
        let data: Vec<u8> = (0..7 * piece + 1025)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        let lengths = [
            0,
            1,
            1024,
            piece - 1,
            piece,
            piece + 1,
            2 * piece,
            3 * piece,
            4 * piece,
            5 * piece - 7,
            6 * piece + 1,
            data.len(),
        ];
        for length in lengths {
            let shape = [length as u64];
            let tensor = StoredTensor {
                name: "t",
                dtype: Dtype::U8,
                shape: &shape,
                strides: None,
                bytes: &data[..length],
            };
            let threads = NonZero::new(3).unwrap();
            let digest = data_digest(&tensor, threads, &Control::new()).unwrap();
            let expected = blake3::hash(tensor.bytes);
            assert_eq!(digest.as_bytes(), expected.as_bytes(), "{length} bytes");
        }
    }
}
