use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Dtype, FileStamp, Format, Note, OpenOptions, Result};

/// What a checkpoint on disk consists of: files, and tensors with dtype, shape and byte range.
///
/// Everything in it has been validated against the files' actual sizes: a range that it gives lies
/// inside its file. No tensor data has been read.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("model.safetensors");
/// # let header = br#"{"bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}       "#;
/// # let mut file = (header.len() as u64).to_le_bytes().to_vec();
/// # file.extend_from_slice(header);
/// # file.extend_from_slice(&[0; 8]);
/// # std::fs::write(&path, file)?;
/// use tensora_formats::{CheckpointIndex, Dtype};
///
/// let index = CheckpointIndex::open(&path)?;
/// let bias = index.tensor("bias").ok_or("no bias")?;
/// assert_eq!((bias.dtype, bias.shape.as_slice()), (Dtype::F32, &[2][..]));
/// assert_eq!(bias.range(), 72..80);
/// assert_eq!(index.files()[bias.file].path, path);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointIndex {
    pub(crate) format: Format,
    pub(crate) root: PathBuf,
    pub(crate) files: Vec<FileEntry>,
    /// Sorted bytewise by name, names unique.
    pub(crate) tensors: Vec<TensorEntry>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) notes: Vec<Note>,
    pub(crate) ranks: Vec<RankDirectory>,
}

/// One directory of a set of ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankDirectory {
    /// The directory's name relative to the checkpoint's root: `rank_0`. The names of its tensors and
    /// files begin with it and a slash.
    pub name: String,
    /// The positions of its files in [`CheckpointIndex::files`].
    pub files: Range<usize>,
}

/// A file that holds tensor data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileEntry {
    /// Where the file is; symbolic links are not resolved.
    pub path: PathBuf,
    /// The name relative to the checkpoint's root, for display.
    pub name: String,
    /// The file's length in bytes.
    pub bytes: u64,
    /// What told this file from others, and from itself after a change, when its metadata was read: of SafeTensors,
    /// the very file that the header came from. Whoever opens it later can compare.
    pub stamp: FileStamp,
}

/// Where a tensor is and what it looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorEntry {
    /// The tensor's name, unique within the checkpoint.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// The position of its file in [`CheckpointIndex::files`].
    pub file: usize,
    /// Where its bytes begin, counted from the start of that file.
    pub offset: u64,
    /// How many bytes are stored. For a contiguous tensor this is the size of `shape` and `dtype`;
    /// for others the size of the storage that the strided view looks into.
    pub bytes: u64,
    /// The stride of each dimension in elements; `None` for a contiguous (row-major) tensor.
    pub strides: Option<Vec<u64>>,
}

impl TensorEntry {
    /// The stored bytes as a range of the file.
    pub fn range(&self) -> Range<u64> {
        // Validation at open has shown that the sum does not overflow.
        self.offset..self.offset.saturating_add(self.bytes)
    }

    /// The number of elements, 1 for a scalar.
    pub fn element_count(&self) -> u64 {
        // Validation at open has shown that a product that matters does not overflow. One that a
        // zero elsewhere cancels must not overflow here either.
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape
            .iter()
            .fold(1, |count: u64, &dimension| count.saturating_mul(dimension))
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.strides.is_none()
    }
}

impl CheckpointIndex {
    /// Recognises what `path` is and reads its metadata, with default [`OpenOptions`].
    ///
    /// `path` may be a SafeTensors file, a SafeTensors or ServerlessLLM index file, a directory
    /// holding either, a directory of ServerlessLLM ranks, or a model's directory in a Hugging Face
    /// cache.
    ///
    /// # Errors
    ///
    /// [`Error`](crate::Error) says which rule of the format is broken, in which file, by which
    /// tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        OpenOptions::default().open(path)
    }

    /// The format that was recognised.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The directory that file names are relative to.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The files that hold tensor data, shards by name and partitions by number.
    pub fn files(&self) -> &[FileEntry] {
        &self.files
    }

    /// The directories of a set of ranks in the order of their numbers; empty unless several were
    /// opened side by side.
    pub fn ranks(&self) -> &[RankDirectory] {
        &self.ranks
    }

    /// The tensors, sorted bytewise by name.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        let position = self
            .tensors
            .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
            .ok()?;
        self.tensors.get(position)
    }

    /// The `__metadata__` of a SafeTensors checkpoint, merged over its shards in file order; empty
    /// for ServerlessLLM.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The stored bytes of all tensors together. Bytes that several tensors share count for each.
    pub fn data_bytes(&self) -> u64 {
        data_bytes(&self.tensors)
    }

    /// About how much memory the index itself takes, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        let of_tensor = |tensor: &TensorEntry| {
            let numbers = tensor.shape.len() + tensor.strides.as_ref().map_or(0, Vec::len);
            size_of::<TensorEntry>() + tensor.name.len() + numbers * size_of::<u64>()
        };
        let of_file = |file: &FileEntry| {
            size_of::<FileEntry>() + file.name.len() + file.path.as_os_str().len()
        };
        let tensors: usize = self.tensors.iter().map(of_tensor).sum();
        let files: usize = self.files.iter().map(of_file).sum();
        (tensors + files) as u64
    }

    /// What a user may want to know and what is no error.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }
}

/// The stored bytes of `tensors` together. Saturating, because sparse files and shared bytes can take
/// the sum past any real storage.
pub(crate) fn data_bytes(tensors: &[TensorEntry]) -> u64 {
    tensors
        .iter()
        .fold(0, |sum, tensor| sum.saturating_add(tensor.bytes))
}
