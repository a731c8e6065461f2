use std::fmt;

use tensora_io::{BackendKind, DirectPolicy};

use crate::Rejection;
use crate::units::Bytes;

/// What [`plan`](crate::plan()) answers with.
pub type Result<T, E = PlanError> = std::result::Result<T, E>;

/// Why there is no plan. Every message names a way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The backend that the wishes come down to cannot run here.
    #[error(
        "the backend {backend} cannot run here: {reason}; {remedy}, or leave the choice of backend \
         and memory to auto"
    )]
    BackendUnavailable {
        /// The backend.
        backend: BackendKind,
        /// What stands in the way, from the platform facts.
        reason: String,
        /// What would remove it, from the platform facts.
        remedy: String,
    },

    /// The backend that the wishes come down to is not in the platform facts at all.
    #[error(
        "the backend {backend} is left out of this build: the platform facts do not list it; \
         enable the cargo feature `{backend}`, or leave the choice of backend and memory to auto"
    )]
    BackendLeftOut {
        /// The backend.
        backend: BackendKind,
    },

    /// The choice was the planner's, and nothing is left to choose from.
    #[error(
        "no backend can run this load; remove one of these obstacles: {}",
        list(.rejected)
    )]
    NoBackend {
        /// Every backend, in order of preference, with what stands in its way.
        rejected: Vec<Rejection>,
    },

    /// Mapped memory was asked for, but the caller has not taken on the contract of mappings.
    #[error(
        "mapped memory was asked for without consent to its contract (nobody truncates or rewrites \
         the files while tensors are in use); grant the consent, or ask for owned memory"
    )]
    MappedWithoutConsent,

    /// Mapped memory was asked for together with a backend that cannot map.
    #[error(
        "mapped memory comes from the mmap backend only, but {backend} was named; \
         name mmap or leave the backend to auto, or ask for owned memory"
    )]
    MappedWithBackend {
        /// The backend that was named.
        backend: BackendKind,
    },

    /// Direct I/O was required together with mapped memory, which is the page cache itself.
    #[error(
        "direct I/O was required together with mapped memory, which is the page cache itself; \
         ask for owned memory, or drop the requirement"
    )]
    DirectWithMapped,

    /// Direct I/O was required of the mmap backend, which reads through the page cache.
    #[error(
        "direct I/O was required, but the mmap backend reads through the page cache; \
         name another backend, or drop the requirement"
    )]
    DirectWithMmap,

    /// Direct I/O was required of storage that does not support it.
    #[error(
        "direct I/O was required, but these files on {file_system} do not support it: {reason}; \
         use the policy `preferred` to fall back to buffered reads"
    )]
    DirectUnsupported {
        /// File system type.
        file_system: String,
        /// Why not, from the storage facts.
        reason: String,
    },

    /// The files shall stay in the page cache, and direct reads, which leave nothing there, were asked for.
    #[error(
        "the page cache shall keep the files, but direct I/O is {direct}, which leaves nothing in it; \
         leave the cache or direct I/O to auto"
    )]
    KeepWithDirect {
        /// The policy that was asked for.
        direct: DirectPolicy,
    },

    /// The page cache is to be bypassed, and buffered reads were asked for.
    #[error(
        "the page cache is to be bypassed, but direct I/O is never to be used, and buffered reads fill \
         it; leave the cache or direct I/O to auto"
    )]
    BypassWithBuffered,

    /// The page cache is to be bypassed, and mapped memory, which is the page cache, was asked for.
    #[error(
        "the page cache is to be bypassed, but mapped memory was asked for, which is the page cache \
         itself; ask for owned memory, or leave the cache to auto"
    )]
    BypassWithMapped,

    /// The page cache is to be bypassed, and the mmap backend was named.
    #[error(
        "the page cache is to be bypassed, but the mmap backend reads through it; name another backend, \
         or leave the cache to auto"
    )]
    BypassWithMmap,

    /// The page cache is to be bypassed, and the storage cannot do without it.
    #[error(
        "the page cache is to be bypassed, but these files on {file_system} do not support direct I/O: \
         {reason}; leave the cache to auto"
    )]
    BypassUnsupported {
        /// File system type.
        file_system: String,
        /// Why not, from the storage facts.
        reason: String,
    },

    /// A parameter was set to a value outside its limits.
    #[error(
        "{parameter} = {value} is outside its limits: use {min} to {max}, or leave it to the planner"
    )]
    ParameterOutOfRange {
        /// Name of the parameter, with its unit.
        parameter: &'static str,
        /// The value given.
        value: u64,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },

    /// Owned tensors do not fit into memory, and mapping them instead is not possible or not allowed.
    #[error(
        "the load needs {} ({needed_bytes} bytes) of memory, but {bound} leaves {} \
         ({available_bytes} bytes); {}, or {}, or {mapping}",
        Bytes(*.needed_bytes),
        Bytes(*.available_bytes),
        fewer(*.needed_bytes, *.destination_bytes, *.available_bytes),
        .bound.remedy()
    )]
    DoesNotFit {
        /// What owned tensors and the reads under way take, in bytes.
        needed_bytes: u64,
        /// The tensors' share of that, in bytes.
        destination_bytes: u64,
        /// What may be used, in bytes.
        available_bytes: u64,
        /// What leaves no more than that.
        bound: MemoryBound,
        /// What it would take to map the tensors instead, which needs no memory of the load's own.
        mapping: String,
    },
}

/// What limits the memory of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryBound {
    /// What the machine can still give.
    Machine,
    /// What the control group leaves.
    ControlGroup,
    /// What the limits of the process on address space and data leave.
    ProcessLimit,
    /// [`Policy::memory_limit_bytes`](crate::Policy::memory_limit_bytes).
    Limit,
}

impl MemoryBound {
    const fn remedy(self) -> &'static str {
        match self {
            Self::Machine => "free memory on the machine",
            Self::ControlGroup => "raise the control group's memory limit",
            Self::ProcessLimit => "raise the limits of the process (`ulimit -v`, `ulimit -d`)",
            Self::Limit => "raise the memory limit",
        }
    }
}

impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Machine => "the machine",
            Self::ControlGroup => "the control group",
            Self::ProcessLimit => "the address-space or data limit of the process",
            Self::Limit => "the memory limit that was set",
        })
    }
}

fn fewer(needed_bytes: u64, destination_bytes: u64, available_bytes: u64) -> String {
    let overhead = needed_bytes.saturating_sub(destination_bytes);
    match available_bytes.saturating_sub(overhead) {
        0 => "load fewer tensors at a time".to_owned(),
        room => format!(
            "load fewer tensors at a time, about {} of them",
            Bytes(room)
        ),
    }
}

fn list(rejected: &[Rejection]) -> String {
    rejected
        .iter()
        .map(|rejection| format!("{}: {}", rejection.choice, rejection.reason))
        .collect::<Vec<_>>()
        .join("; ")
}
