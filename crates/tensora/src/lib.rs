//! tensora.
