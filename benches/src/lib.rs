//! Benchmarks of whole loads, as their users see them.
//!
//! Every timed case is a process of its own, started from cold or warm files: a hand-written raw read, or
//! the `tensora` command. Cases take turns in rounds, and what is compared is the ratio to the best raw
//! read *of the same round*, so that a machine that gets slower between rounds slows both sides. Before
//! each case the state of the page cache is made and verified, and as much memory as the case needs is
//! touched and given back, because a virtual machine's first touch of returned memory is slow.
#![forbid(unsafe_code)]

mod case;
mod cpu_bound;
mod measure;
mod pages;
mod report;

pub use case::{Case, CaseKind};
pub use cpu_bound::{CpuCase, PreparedCase, write_cpu_fixtures};
pub use measure::{Bench, Subject, run};
pub use pages::{CacheState, prepare, prime_memory};
pub use report::{Cell, Finding, Host, OpenTimes, Run, Sample};
