//! tensora-io.
