//! Pure planning of checkpoint loads.
//!
//! [`plan`] takes what is to be read ([`Workload`]), where ([`Platform`](tensora_io::Platform)) and
//! what the caller wishes ([`Policy`]), and answers with a [`Plan`]: backend, memory, transfer
//! parameters and, for each of them, what was chosen, why, and what was rejected. It does no I/O and
//! reads neither a clock nor the environment: the same three inputs always give the same plan, and a
//! plan carries its inputs, so any decision can be replayed elsewhere.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![forbid(unsafe_code)]

mod error;
mod explain;
mod plan;
mod planner;
mod policy;
mod tuning;
mod units;
mod workload;

pub use error::{MemoryBound, PlanError, Result};
pub use plan::{Decision, Plan, Rejection};
pub use planner::plan;
pub use policy::{
    BackendChoice, CacheChoice, DirectChoice, MappingConsent, MemoryChoice, ParseChoiceError,
    Policy,
};
pub use tensora_io::MemoryKind;
pub use workload::{AccessPattern, StorageLayout, Workload};
