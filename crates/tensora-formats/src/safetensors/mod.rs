//! Reading SafeTensors: headers, indexes, and checkpoints made of them.

mod checkpoint;
mod diagnosis;
mod header;
mod index;

pub(crate) use self::checkpoint::{data_files, open_file, open_indexed, open_unindexed};
pub(crate) use self::header::data_bytes;
pub use self::header::{SafetensorsHeader, parse_safetensors_header, safetensors_header_bytes};
pub use self::index::{SafetensorsIndex, parse_safetensors_index};

/// The length of the number before the header.
pub(crate) const LENGTH_BYTES: u64 = 8;

/// The largest header that the format allows. Index files, which grow with the same tensors, are
/// held to it too.
pub(crate) const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The header key that is no tensor.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// How data files' names end.
pub(crate) const FILE_SUFFIX: &str = ".safetensors";

/// How index files' names end.
pub(crate) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The index that a directory is opened by even if it holds others.
pub(crate) const DEFAULT_INDEX: &str = "model.safetensors.index.json";
