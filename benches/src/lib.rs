//! Benchmarks: whole loads, as their users see them, and what the processor bounds.
//!
//! Every timed load is a process of its own: Tensora's, somebody else's, or a limit that no loader can beat. Cases
//! take turns in rounds, and what is compared is the ratio *within a round*, so that a machine that gets slower
//! between rounds slows both sides. Before each case the state of the page cache is made and verified, and
//! memory that the case needs is touched and given back. `docs/BENCHMARKS.md` is the long story.
#![forbid(unsafe_code)]

mod case;
mod conversion;
mod cpu_bound;
mod figures;
mod findings;
mod markdown;
mod measure;
mod open;
mod peers;
mod plots;
mod run;

pub use case::{Case, CaseKind};
pub use conversion::{
    ConversionCell, ConversionFailure, ConversionKind, ConversionSample, measure_conversions,
};
pub use cpu_bound::{CpuCase, PreparedCase, write_cpu_fixtures};
pub use figures::{Clock, Regret};
pub use findings::Finding;
pub use measure::{Bench, Subject};
pub use open::measure_open;
pub use peers::{PeerFact, Peers};
pub use run::{Cell, Failure, Host, Invocation, OpenRound, OpenTimes, Run, Sample};
