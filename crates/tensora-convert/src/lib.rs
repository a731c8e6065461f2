//! tensora-convert.
