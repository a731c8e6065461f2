//! tensora-heuristics.
