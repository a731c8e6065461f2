use std::fmt;

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
        }
    }
}
