//! What the crate promises to its users, through its public surface only.

// `allow-unwrap-in-tests` does not reach the functions that tests share.
#![allow(clippy::unwrap_used)]

mod agreement;
mod fixture;
mod header_rules;
mod hostile;
mod layouts;
mod messages;
mod recognition;
mod records;
mod rule_table;
mod scale;
mod serverlessllm_rules;
mod shards;
mod slices;
mod windows;
