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
        }
    }
}
