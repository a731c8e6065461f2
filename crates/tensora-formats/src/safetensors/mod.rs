//! Reading SafeTensors: headers, and indexes over several files.

/// The length of the number before the header.
pub(crate) const LENGTH_BYTES: u64 = 8;

/// The largest header that the format allows.
pub(crate) const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The header key that is no tensor.
pub(crate) const METADATA_KEY: &str = "__metadata__";
