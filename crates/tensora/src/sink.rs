//! Where streamed tensors go.

use std::collections::HashMap;

use crate::{Result, StreamedPiece, StreamedTensor};

/// What a [`Sink`] answers when it cannot go on.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Memory, a device, a socket, a hash: whatever tensors are streamed into.
///
/// [`LazyCheckpoint::stream_into`](crate::LazyCheckpoint::stream_into) calls [`begin`](Self::begin) once, then
/// [`write`](Self::write) for each piece, then [`finish`](Self::finish) once if nothing failed. The pieces of one tensor come in
/// ascending order and without gaps; every tensor has at least one, also one without elements.
///
/// A sink that copies asynchronously keeps the piece, or a clone of its
/// [`bytes`](StreamedPiece::bytes), until the copy is done: the buffer is not used again before that. Keeping
/// as many as there are buffers stalls the stream.
pub trait Sink {
    /// These tensors will come, in the order in which their first pieces will. A sink that cannot take them all says
    /// so here, before anything is read.
    ///
    /// # Errors
    ///
    /// Whatever keeps the sink from taking them; the stream is not begun.
    fn begin(&mut self, tensors: &[StreamedTensor]) -> Result<(), SinkError> {
        let _ = tensors;
        Ok(())
    }

    /// Takes a piece. While it runs, the next ones are being read.
    ///
    /// # Errors
    ///
    /// Whatever keeps the sink from going on; the stream is stopped.
    fn write(&mut self, piece: StreamedPiece) -> Result<(), SinkError>;

    /// Every piece has been written.
    ///
    /// # Errors
    ///
    /// Whatever makes the pieces written so far worthless.
    fn finish(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

/// `Sink` stays object-safe.
const _: [&dyn Sink; 0] = [];

/// Where a tensor goes in the memory of a [`MemorySink`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlace {
    /// Where its first element goes, in bytes from the start of the memory.
    pub offset: usize,
    /// The distance between neighbours along each dimension, in bytes, outermost first; `None` for row-major order
    /// without gaps. It allows a matrix with padded rows, one that is a block of a larger one, or a
    /// transposed one.
    pub strides_bytes: Option<Vec<usize>>,
}

impl MemoryPlace {
    /// In row-major order without gaps, from `offset` bytes on.
    pub fn contiguous(offset: usize) -> Self {
        Self {
            offset,
            strides_bytes: None,
        }
    }
}

/// Fills memory that the caller provides, in any layout: pinned memory, memory shared with another process, one
/// large tensor made of several.
///
/// Memory between the places is left as it is. Where places overlap, it is not specified which
/// tensor's bytes are there in the end.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("model.safetensors");
/// # let header = br#"{"a":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}         "#;
/// # let mut file = (header.len() as u64).to_le_bytes().to_vec();
/// # file.extend_from_slice(header);
/// # file.extend_from_slice(&[1, 2, 3, 4]);
/// # std::fs::write(&path, file)?;
/// use tensora::{Loader, MemoryPlace, MemorySink};
///
/// // The rows of the only tensor, [[1, 2], [3, 4]], go four bytes apart.
/// let mut memory = [0; 8];
/// let mut sink = MemorySink::new(&mut memory, |_| {
///     Some(MemoryPlace { offset: 1, strides_bytes: Some(vec![4, 1]) })
/// });
/// Loader::new().open(&path)?.stream_into(&mut sink)?;
/// assert_eq!(memory, [0, 1, 2, 0, 0, 3, 4, 0]);
/// # Ok(())
/// # }
/// ```
pub struct MemorySink<'m, F> {
    memory: &'m mut [u8],
    place: F,
    places: HashMap<String, MemoryPlace>,
}

impl<'m, F> MemorySink<'m, F>
where
    F: FnMut(&StreamedTensor) -> Option<MemoryPlace>,
{
    /// Puts each tensor where `place` says. A tensor for which it says nothing fails the stream before
    /// anything is read: nothing is dropped in silence.
    pub fn new(memory: &'m mut [u8], place: F) -> Self {
        Self {
            memory,
            place,
            places: HashMap::new(),
        }
    }
}

impl<F> Sink for MemorySink<'_, F>
where
    F: FnMut(&StreamedTensor) -> Option<MemoryPlace>,
{
    fn begin(&mut self, tensors: &[StreamedTensor]) -> Result<(), SinkError> {
        self.places.clear();
        for tensor in tensors {
            let name = tensor.name();
            let Some(place) = (self.place)(tensor) else {
                return Err(format!("there is no place for the tensor {name:?}").into());
            };
            let end = end(tensor, &place).map_err(|why| format!("the tensor {name:?}: {why}"))?;
            if end > self.memory.len() {
                return Err(format!(
                    "the tensor {name:?} would end at byte {end} of memory that has {}",
                    self.memory.len()
                )
                .into());
            }
            self.places.insert(name.to_owned(), place);
        }
        Ok(())
    }

    fn write(&mut self, piece: StreamedPiece) -> Result<(), SinkError> {
        // `begin` was told of every tensor that comes.
        let Some(place) = self.places.get(piece.tensor().name()) else {
            return Err(format!("the tensor {:?} was not announced", piece.tensor().name()).into());
        };
        let offset = usize::try_from(piece.offset_bytes())?;
        match &place.strides_bytes {
            None => {
                let begin = place.offset + offset;
                self.memory[begin..begin + piece.bytes().len()].copy_from_slice(piece.bytes());
            }
            Some(strides) => {
                scatter(self.memory, place.offset, strides, &piece, offset);
            }
        }
        Ok(())
    }
}

impl<F> std::fmt::Debug for MemorySink<'_, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemorySink")
            .field("memory_bytes", &self.memory.len())
            .field("places", &self.places.len())
            .finish_non_exhaustive()
    }
}

/// Where in the memory a tensor ends.
fn end(tensor: &StreamedTensor, place: &MemoryPlace) -> Result<usize, String> {
    const TOO_FAR: &str = "its place ends past the address space";
    let too_far = || TOO_FAR.to_owned();
    let bytes = usize::try_from(tensor.bytes()).map_err(|_| TOO_FAR.to_owned())?;
    let Some(strides) = &place.strides_bytes else {
        return place.offset.checked_add(bytes).ok_or_else(too_far);
    };
    if strides.len() != tensor.shape().len() {
        return Err(format!(
            "it has {} dimensions, and its place has {} strides",
            tensor.shape().len(),
            strides.len()
        ));
    }
    if bytes == 0 {
        return Ok(place.offset);
    }
    let bits = tensor.dtype().bits();
    if !bits.is_multiple_of(8) {
        return Err(format!(
            "elements of {} share bytes, so they cannot be put apart; give it a place without strides",
            tensor.dtype()
        ));
    }
    tensor
        .shape()
        .iter()
        .zip(strides)
        .try_fold(place.offset, |end, (&count, &stride)| {
            end.checked_add((count - 1).checked_mul(stride)?)
        })
        .and_then(|end| end.checked_add(bits as usize / 8))
        .ok_or_else(too_far)
}

/// Puts a piece, whole elements of a tensor from byte `begin` of it on, where its strides say.
fn scatter(memory: &mut [u8], base: usize, strides: &[usize], piece: &StreamedPiece, begin: usize) {
    let item_bytes = piece.tensor().dtype().bits() as usize / 8;
    let shape = piece.tensor().shape();
    // The innermost dimensions that lie in the memory as they lie in the piece are copied as one.
    let mut row = item_bytes;
    let mut outer = shape.len();
    while outer > 0 && (shape[outer - 1] == 1 || strides[outer - 1] == row) {
        row *= shape[outer - 1];
        outer -= 1;
    }
    let mut rest = &piece.bytes()[..];
    let mut at = begin;
    while !rest.is_empty() {
        let skipped = at % row;
        let len = (row - skipped).min(rest.len());
        let mut index = at / row;
        let mut target = base + skipped;
        for dimension in (0..outer).rev() {
            target += index % shape[dimension] * strides[dimension];
            index /= shape[dimension];
        }
        let (now, later) = rest.split_at(len);
        memory[target..target + len].copy_from_slice(now);
        rest = later;
        at += len;
    }
}

/// Computes the content digest of what is streamed: of a checkpoint larger than memory, for instance.
///
/// Long pieces are hashed by all processors at once. The digest is that of the tensors as they are
/// delivered, so that of slices differs from that of the whole.
#[cfg(feature = "convert")]
#[derive(Debug, Default)]
pub struct DigestSink {
    /// Of tensors of which not every piece has come.
    open: HashMap<String, tensora_convert::DataHasher>,
    hasher: tensora_convert::ContentHasher,
}

#[cfg(feature = "convert")]
impl DigestSink {
    /// A sink that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The content digest of all tensors that were streamed to the end.
    pub fn digest(&self) -> tensora_convert::Digest {
        self.hasher.finish()
    }
}

#[cfg(feature = "convert")]
impl Sink for DigestSink {
    fn begin(&mut self, _tensors: &[StreamedTensor]) -> Result<(), SinkError> {
        *self = Self::default();
        Ok(())
    }

    fn write(&mut self, piece: StreamedPiece) -> Result<(), SinkError> {
        let tensor = piece.tensor();
        let mut hasher = self.open.remove(tensor.name()).unwrap_or_default();
        hasher.update(piece.bytes());
        if piece.is_last() {
            let shape: Vec<u64> = tensor.shape().iter().map(|&count| count as u64).collect();
            self.hasher
                .insert(tensor.name(), tensor.dtype(), &shape, hasher.finish())?;
        } else {
            self.open.insert(tensor.name().to_owned(), hasher);
        }
        Ok(())
    }
}
