use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use tensora_formats::{Format, Note};

use crate::SIDECAR_NAME;

/// Something about a conversion that is worth telling a user and is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConversionNote {
    /// What opening the source had to say: values of `__metadata__` that were dropped, files that were left
    /// alone, tensors that are damaged. What becomes of strides and shared bytes has notes of its own.
    Source(Note),
    /// The target format has no place for the source's `__metadata__`.
    MetadataDropped {
        /// The target format.
        target: Format,
        /// What the target will lack.
        metadata: BTreeMap<String, String>,
    },
    /// Strided tensors are stored in row-major order, because the target format has no strides.
    StridesDropped {
        /// The tensors, sorted by name.
        tensors: Vec<String>,
    },
    /// Tensors that share bytes in the source have bytes of their own in the target.
    Duplicated {
        /// The tensors, sorted by name.
        tensors: Vec<String>,
        /// By how much the target is larger for it, in bytes.
        bytes: u64,
    },
    /// Ranks became one checkpoint, in which names keep the rank that they are of.
    RanksJoined {
        /// How many ranks.
        ranks: usize,
    },
    /// Files beside the checkpoint are not copied.
    CompanionsLeft {
        /// Their names, sorted.
        files: Vec<String>,
    },
    /// Directories beside the checkpoint are not copied, not even with [`Companions::Copy`](crate::Companions::Copy).
    DirectoriesLeft {
        /// Their names, sorted.
        directories: Vec<String>,
    },
    /// The source has a file of checksums, which is not copied, and none is written.
    ChecksumsLeft,
    /// Transposed tensors do not fit into the memory that there is for putting them in order, and are read
    /// several times.
    ReadRepeatedly {
        /// The tensors, sorted by name.
        tensors: Vec<String>,
        /// How often the one that is read most often is read, at most.
        times: u64,
        /// The memory limit with which each is read once, in bytes.
        limit_bytes: u64,
    },
    /// There was nothing to resume, so everything is written.
    NothingToResume,
    /// A file of an interrupted conversion was not what its journal says, and is written again.
    WrittenAgain {
        /// The file, relative to the target.
        file: String,
    },
    /// A source file could not be read with direct I/O and went through the page cache.
    ReadBuffered {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file of the target could not be written with direct I/O and went through the page cache.
    WrittenBuffered {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for ConversionNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(note) => write!(f, "source: {note}"),
            Self::MetadataDropped { target, metadata } => {
                write!(f, "__metadata__ dropped, {target} has no place for it:")?;
                for (number, (key, value)) in metadata.iter().enumerate() {
                    let separator = if number == 0 { "" } else { "," };
                    write!(f, "{separator} {key:?}: {value:?}")?;
                }
                Ok(())
            }
            Self::StridesDropped { tensors } => write!(
                f,
                "strided tensors are stored in row-major order, SafeTensors has no strides: {}",
                FirstOf(tensors)
            ),
            Self::Duplicated { tensors, bytes } => write!(
                f,
                "tensors that share bytes in the source are stored separately, which takes {bytes} bytes more: {}",
                FirstOf(tensors)
            ),
            Self::RanksJoined { ranks } => write!(
                f,
                "{ranks} ranks become one checkpoint, in which names begin with rank_N/"
            ),
            Self::CompanionsLeft { files } => write!(
                f,
                "files beside the checkpoint are not copied unless asked for: {}",
                FirstOf(files)
            ),
            Self::DirectoriesLeft { directories } => write!(
                f,
                "directories beside the checkpoint are not copied: {}",
                FirstOf(directories)
            ),
            Self::ChecksumsLeft => write!(
                f,
                "{SIDECAR_NAME} beside the source is not copied; the target has one only with --checksums"
            ),
            Self::ReadRepeatedly {
                tensors,
                times,
                limit_bytes,
            } => write!(
                f,
                "transposed tensors are read up to {times} times, because they do not fit into the memory that puts them in order; with a memory limit of {limit_bytes} bytes, each is read once: {}",
                FirstOf(tensors)
            ),
            Self::NothingToResume => f.write_str("there was nothing to resume; all was written"),
            Self::WrittenAgain { file } => write!(
                f,
                "{file} was not what the interrupted conversion had recorded, and was written again"
            ),
            Self::ReadBuffered { path, reason } => {
                write!(f, "{} was read buffered: {reason}", path.display())
            }
            Self::WrittenBuffered { path, reason } => {
                write!(f, "{} was written buffered: {reason}", path.display())
            }
        }
    }
}

/// The first few of many names.
pub(crate) struct FirstOf<'a>(pub(crate) &'a [String]);

impl fmt::Display for FirstOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMED: usize = 6;
        for (number, name) in self.0.iter().take(NAMED).enumerate() {
            let separator = if number == 0 { "" } else { ", " };
            write!(f, "{separator}{name:?}")?;
        }
        match self.0.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}
