use std::fmt;

use serde::{Deserialize, Serialize};

/// How a checkpoint lays its tensors out in files, as far as planning cares: the dialects of
/// ServerlessLLM are one layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StorageLayout {
    /// SafeTensors: one file or several shards, each a header and then its tensors without a gap.
    #[serde(rename = "safetensors")]
    SafeTensors,
    /// ServerlessLLM: partitions of tensor records, with an index beside them.
    #[serde(rename = "serverlessllm")]
    ServerlessLlm,
}

impl StorageLayout {
    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SafeTensors => "safetensors",
            Self::ServerlessLlm => "serverlessllm",
        }
    }

    /// The name in prose.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::SafeTensors => "SafeTensors",
            Self::ServerlessLlm => "ServerlessLLM",
        }
    }

    /// What one of its files is called.
    pub(crate) const fn file_term(self) -> &'static str {
        match self {
            Self::SafeTensors => "shard",
            Self::ServerlessLlm => "partition",
        }
    }
}

impl fmt::Display for StorageLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which part of the files is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum AccessPattern {
    /// All tensor data of every file.
    WholeFiles,
    /// Extents of the files: selected tensors, or one rank's share.
    Ranges,
}

impl AccessPattern {
    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WholeFiles => "whole-files",
            Self::Ranges => "ranges",
        }
    }
}

impl fmt::Display for AccessPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What is to be read, in numbers. Counts and sizes that are not known are 0 and claim nothing.
///
/// ```
/// use tensora_heuristics::{AccessPattern, StorageLayout, Workload};
///
/// let mut workload = Workload::new(StorageLayout::SafeTensors, AccessPattern::WholeFiles);
/// workload.files = 5;
/// workload.read_bytes = 16_381_470_720;
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Workload {
    /// How the tensors are laid out in files.
    pub layout: StorageLayout,
    /// Whether whole files are read or extents of them.
    pub access: AccessPattern,
    /// Files that are read.
    #[serde(default)]
    pub files: u32,
    /// Tensors that are delivered.
    #[serde(default)]
    pub tensors: u64,
    /// Bytes that will be read from the files.
    #[serde(default)]
    pub read_bytes: u64,
    /// Extents to read, after neighbours were merged.
    #[serde(default)]
    pub requests: u64,
    /// Length of the longest of those extents, in bytes.
    #[serde(default)]
    pub largest_request_bytes: u64,
    /// Memory that owned tensors will take, in bytes.
    #[serde(default)]
    pub destination_bytes: u64,
    /// Bytes of the files that the tensors consist of: what has to be read, without the gaps that are
    /// read because that is faster.
    #[serde(default)]
    pub needed_bytes: u64,
    /// Memory that the index takes, in bytes.
    #[serde(default)]
    pub index_bytes: u64,
    /// Tensors among those delivered that lie scattered in their file, column slices above all, and are
    /// gathered out of what is read.
    #[serde(default)]
    pub gathered_tensors: u64,
    /// Bytes of those tensors, as they are delivered.
    #[serde(default)]
    pub gathered_bytes: u64,
    /// Longest stretch of a file that has to be in one buffer for a tensor to be taken out of it, as those
    /// have to whose elements are in another order in the file, in bytes. Of ranks that share a load, the
    /// longest that any of them has.
    #[serde(default)]
    pub indivisible_bytes: u64,
    /// What other processes of this machine read of the same files for themselves, where they do so together
    /// with this one.
    #[serde(default)]
    pub shared: Option<SharedWorkload>,
}

/// How the ranks of one machine overlap that load parts of a checkpoint together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SharedWorkload {
    /// How many ranks there are.
    pub world: u32,
    /// Bytes of the files that two or more of them need.
    pub shared_bytes: u64,
    /// Bytes that one of them alone needs, all ranks taken together.
    pub exclusive_bytes: u64,
}

impl SharedWorkload {
    /// Ranks that need `shared_bytes` together and `exclusive_bytes` each for itself, in all.
    pub const fn new(world: u32, shared_bytes: u64, exclusive_bytes: u64) -> Self {
        Self {
            world,
            shared_bytes,
            exclusive_bytes,
        }
    }
}

impl Workload {
    /// A workload that reads nothing yet: fill in the counts and sizes.
    pub const fn new(layout: StorageLayout, access: AccessPattern) -> Self {
        Self {
            layout,
            access,
            files: 0,
            tensors: 0,
            read_bytes: 0,
            requests: 0,
            largest_request_bytes: 0,
            destination_bytes: 0,
            needed_bytes: 0,
            index_bytes: 0,
            gathered_tensors: 0,
            gathered_bytes: 0,
            indivisible_bytes: 0,
            shared: None,
        }
    }
}
