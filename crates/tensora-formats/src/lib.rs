//! tensora-formats.
