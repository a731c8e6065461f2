use std::fmt;
use std::ops::Range;

use crate::quote::{FirstOf, Quoted};

/// Something about a checkpoint that is worth telling a user and is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The index states another total size than the tensors have.
    TotalSizeDiffers {
        /// The index file's name.
        index: String,
        /// `total_size` as the index states it, in bytes.
        stated_bytes: u64,
        /// The sum over the tensors that the index lists, in bytes.
        actual_bytes: u64,
    },
    /// SafeTensors files lie beside the index, and the index does not list them.
    FilesLeftAlone {
        /// The files' names, sorted.
        files: Vec<String>,
    },
    /// The shards hold tensors that the index does not list; they were ignored on request.
    TensorsIgnored {
        /// The tensors' names, in shard and offset order.
        tensors: Vec<String>,
    },
    /// Shards give different values for one `__metadata__` key; the first shard's is kept.
    MetadataConflict {
        /// The key.
        key: String,
        /// The value kept.
        kept: String,
        /// The file whose value was dropped.
        file: String,
        /// The value dropped.
        dropped: String,
    },
    /// Shards give different values for still more `__metadata__` keys.
    MoreMetadataConflicts {
        /// How many values were dropped, without those that have a note of their own.
        values: u64,
    },
    /// Tensors are strided views and must be gathered before they can be used as plain arrays.
    NotContiguous {
        /// The tensors' names, sorted.
        tensors: Vec<String>,
    },
    /// Tensors share all or part of their bytes with a tensor before them, as tied weights do.
    SharedBytes {
        /// The tensors' names in the order of files and offsets, without the first of each group.
        tensors: Vec<String>,
    },
    /// The last partition of a ServerlessLLM store goes on behind its last record.
    ///
    /// No offset counts through these bytes, so that nothing is shifted by them.
    UnusedTail {
        /// The partition's name.
        file: String,
        /// Where the last record ends, in bytes from the start of the partition.
        begin: u64,
        /// How many bytes follow.
        bytes: u64,
    },
    /// A ServerlessLLM partition is shorter than the index needs; the tensors that are not all there
    /// were left out on request.
    Damaged {
        /// The partition's name.
        file: String,
        /// Its length in bytes.
        file_bytes: u64,
        /// The length in bytes that the index needs.
        needed_bytes: u64,
        /// The tensors that are not all there, sorted by name.
        tensors: Vec<DamagedTensor>,
    },
}

/// A ServerlessLLM partition that is shorter than its index needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShortPartition {
    /// The partition's name.
    pub file: String,
    /// Its length in bytes.
    pub file_bytes: u64,
    /// The length in bytes that the index needs.
    pub needed_bytes: u64,
    /// The tensors that are not all there, sorted by name; at least one.
    pub tensors: Vec<DamagedTensor>,
}

/// A tensor whose partition ends before the last of its stored bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedTensor {
    /// The tensor's name.
    pub name: String,
    /// The bytes stored for it, as a range of the partition that reaches past the partition's end.
    pub range: Range<u64>,
    /// How many of these bytes are there: those from the start of the range on.
    pub present_bytes: u64,
}

impl From<ShortPartition> for Note {
    fn from(partition: ShortPartition) -> Self {
        Self::Damaged {
            file: partition.file,
            file_bytes: partition.file_bytes,
            needed_bytes: partition.needed_bytes,
            tensors: partition.tensors,
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TotalSizeDiffers {
                index,
                stated_bytes,
                actual_bytes,
            } => write!(
                f,
                "{} states a total_size of {stated_bytes} bytes, but its tensors have {actual_bytes}",
                Quoted(index)
            ),
            Self::FilesLeftAlone { files } => {
                write!(
                    f,
                    "left alone, the index does not list them: {}",
                    FirstOf(files)
                )
            }
            Self::TensorsIgnored { tensors } => write!(
                f,
                "ignored, the index does not list them ({}): {}",
                tensors.len(),
                FirstOf(tensors)
            ),
            Self::MetadataConflict {
                key,
                kept,
                file,
                dropped,
            } => write!(
                f,
                "__metadata__ {} differs between shards: kept {}, dropped {} of {}",
                Quoted(key),
                Quoted(kept),
                Quoted(dropped),
                Quoted(file)
            ),
            Self::MoreMetadataConflicts { values } => write!(
                f,
                "__metadata__ differs between shards in more keys: dropped {values} values of later shards"
            ),
            Self::NotContiguous { tensors } => {
                write!(
                    f,
                    "not contiguous ({}): {}",
                    tensors.len(),
                    FirstOf(tensors)
                )
            }
            Self::SharedBytes { tensors } => write!(
                f,
                "share bytes with another tensor ({}): {}",
                tensors.len(),
                FirstOf(tensors)
            ),
            Self::UnusedTail { file, begin, bytes } => write!(
                f,
                "{} goes on for {bytes} bytes after its last tensor, which ends at byte {begin}; they were left alone",
                Quoted(file)
            ),
            Self::Damaged {
                file,
                file_bytes,
                needed_bytes,
                tensors,
            } => write!(
                f,
                "{} is {file_bytes} bytes long, but the index needs {needed_bytes}; left out, not all there ({}): {}",
                Quoted(file),
                tensors.len(),
                FirstOf(
                    &tensors
                        .iter()
                        .map(|tensor| &tensor.name)
                        .collect::<Vec<_>>()
                )
            ),
        }
    }
}
