//! Pure planning of checkpoint loads.
//!
//! [`plan`] takes what is to be read ([`Workload`]), where ([`Platform`](tensora_io::Platform)) and
//! what the caller wishes ([`Policy`]), and answers with a [`Plan`]: backend, memory, transfer
//! parameters and, for each of them, what was chosen, why, and what was rejected. It does no I/O and
//! reads neither a clock nor the environment: the same three inputs always give the same plan, and a
//! plan carries its inputs, so any decision can be replayed elsewhere.
//!
//! [`plan_stream`] does the same for tensors that are visited through a bounded set of buffers instead of
//! being held, and [`merge_gap_bytes`] says which gaps between needed bytes are read rather than skipped.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![forbid(unsafe_code)]

mod error;
mod explain;
mod plan;
mod planner;
mod policy;
mod stream;
mod tuning;
mod units;
mod workload;

pub use error::{MemoryBound, PlanError, Proposal, Result};
pub use plan::{Decision, Plan, Rejection, SharedBy};
pub use planner::{merge_gap_bytes, plan, plan_stream};
pub use policy::{
    BackendChoice, CacheChoice, DirectChoice, MappingConsent, MemoryChoice, ParseChoiceError,
    Policy,
};
pub use stream::{DEFAULT_STREAM_MEMORY_BYTES, StreamPlan};
pub use tensora_io::MemoryKind;
pub use workload::{AccessPattern, SharedWorkload, StorageLayout, Workload};
