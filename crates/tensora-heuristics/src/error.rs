use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tensora_io::{BackendKind, DirectPolicy, MemorySource};

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

    /// A stream was asked for in mapped memory.
    #[error(
        "mapped memory was asked for, but a stream reads into buffers of its own, which it uses again and \
         again; leave the memory to auto, or map the whole load instead of streaming it"
    )]
    MappedStream,

    /// Mapped memory was asked for, and some tensors lie scattered in their files.
    #[error(
        "mapped memory was asked for, but {tensors} of the tensors are slices that lie scattered in their \
         files, which no mapping can show in one piece; ask for owned memory, or select others"
    )]
    MappedWithGathered {
        /// Tensors that have to be gathered.
        tensors: u64,
    },

    /// Ranks can only share the page cache here, and reads shall not go through it.
    #[error(
        "on {os} ranks can share a read through the page cache only, and the wishes keep reads out of it; \
         leave the cache and direct I/O to auto, or load without sharing"
    )]
    SharingNeedsPageCache {
        /// The operating system.
        os: String,
    },

    /// The load would hold more memory than there is for it, and mapping the tensors instead is not
    /// possible or not allowed.
    #[error(
        "the load needs {} ({needed_bytes} bytes) of memory, {}, but {} leaves {} ({available_bytes} \
         bytes); {}{}",
        Bytes(*.needed_bytes),
        shares(*.destination_bytes, *.buffer_bytes, *.index_bytes),
        bounded(*.bound, .limit_path.as_deref()),
        Bytes(*.available_bytes),
        ways_out(.proposals),
        .bound.remedy()
    )]
    DoesNotFit {
        /// All that the load would hold, in bytes.
        needed_bytes: u64,
        /// The tensors' share of that, in bytes.
        destination_bytes: u64,
        /// The share of the reads under way, in bytes.
        buffer_bytes: u64,
        /// The share of the index, in bytes.
        index_bytes: u64,
        /// What may be used, in bytes.
        available_bytes: u64,
        /// What leaves no more than that.
        bound: MemoryBound,
        /// The file in which that limit stands, where it stands in one.
        limit_path: Option<PathBuf>,
        /// What would fit, each on its own; the best first, and empty when nothing would.
        proposals: Vec<Proposal>,
    },

    /// A stream of these tensors takes more than it may have.
    #[error(
        "a stream of these tensors takes {} ({least_bytes} bytes) of memory at least, {buffers} buffers of {} \
         and {} besides, but {} {} ({limit_bytes} bytes); {}{}",
        Bytes(*.least_bytes),
        Bytes(*.buffer_bytes),
        Bytes(.least_bytes.saturating_sub(.buffer_bytes.saturating_mul((*.buffers).into()))),
        bounded(*.bound, .limit_path.as_deref()),
        .bound.grants(*.limit_bytes),
        .bound.remedy(),
        unwish(.wishes)
    )]
    StreamDoesNotFit {
        /// The least that works, in bytes: buffers, scratch and index.
        least_bytes: u64,
        /// Buffers among that.
        buffers: u32,
        /// Size of each, in bytes.
        buffer_bytes: u64,
        /// What the stream may have, in bytes.
        limit_bytes: u64,
        /// What allows no more than that.
        bound: MemoryBound,
        /// The file in which that limit stands, where it stands in one.
        limit_path: Option<PathBuf>,
        /// Parameters that were set and raise the least.
        wishes: Vec<&'static str>,
    },
}

/// What limits the memory of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MemoryBound {
    /// What the machine can still give.
    Machine,
    /// What the control group leaves.
    ControlGroup,
    /// What the process's limit on address space leaves.
    AddressSpace,
    /// What the process's limit on data leaves.
    Data,
    /// [`Policy::memory_limit_bytes`](crate::Policy::memory_limit_bytes).
    Limit,
    /// [`DEFAULT_STREAM_MEMORY_BYTES`](crate::DEFAULT_STREAM_MEMORY_BYTES).
    StreamDefault,
}

impl MemoryBound {
    /// What a load would need from this bound, as a clause.
    pub(crate) const fn remedy(self) -> &'static str {
        match self {
            Self::Machine => "free memory on the machine",
            Self::ControlGroup => "raise the control group's memory limit",
            Self::AddressSpace => "raise the process's limit on address space (`ulimit -v`)",
            Self::Data => "raise the process's limit on data (`ulimit -d`)",
            Self::Limit | Self::StreamDefault => "raise the memory limit",
        }
    }

    /// `allows 1 MiB`, or for facts, of which a stream takes a part only, `leaves it 1 MiB`.
    pub(crate) fn grants(self, bytes: u64) -> String {
        let bytes = Bytes(bytes);
        match self {
            Self::Limit | Self::StreamDefault => format!("allows {bytes}"),
            _ => format!("leaves it {bytes}, half of what there is"),
        }
    }
}

impl From<MemorySource> for MemoryBound {
    fn from(source: MemorySource) -> Self {
        match source {
            MemorySource::ControlGroup => Self::ControlGroup,
            MemorySource::AddressSpace => Self::AddressSpace,
            MemorySource::Data => Self::Data,
            _ => Self::Machine,
        }
    }
}

impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Machine => "the machine",
            Self::ControlGroup => "the control group",
            Self::AddressSpace => "the process's limit on address space",
            Self::Data => "the process's limit on data",
            Self::Limit => "the memory limit that was set",
            Self::StreamDefault => "the default limit of a stream",
        })
    }
}

/// A way to get at the tensors within the memory that there is. Its [`Display`](fmt::Display) is a clause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Proposal {
    /// Map the files instead of reading them.
    Map {
        /// What has to be granted or dropped for that, as clauses.
        steps: Vec<String>,
    },
    /// Visit the tensors one after the other, as [`plan_stream`](crate::plan_stream()) plans it.
    Stream {
        /// Memory that the stream would hold, in bytes.
        memory_bytes: u64,
    },
    /// Load one rank's slices of the tensors.
    Slice {
        /// The smallest number of ranks, if the tensors are split evenly, of which one fits.
        world: u32,
    },
    /// Load a part of the tensors at a time.
    Select {
        /// About how much of them fits, in bytes.
        destination_bytes: u64,
    },
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map { steps } => {
                write!(f, "map the tensors instead ({})", steps.join(", "))
            }
            Self::Stream { memory_bytes } => {
                write!(f, "stream them through {} of memory", Bytes(*memory_bytes))
            }
            Self::Slice { world } => {
                write!(f, "load the slices of one rank of {world} or more")
            }
            Self::Select { destination_bytes } => write!(
                f,
                "load fewer tensors at a time, about {} of them",
                Bytes(*destination_bytes)
            ),
        }
    }
}

/// `1.4 GiB for tensors, 32 MiB for reads under way and 2 MiB for the index`.
pub(crate) fn shares(destination_bytes: u64, buffer_bytes: u64, index_bytes: u64) -> String {
    let mut text = format!("{} for tensors", Bytes(destination_bytes));
    match index_bytes {
        0 => text.push_str(&format!(" and {} for reads under way", Bytes(buffer_bytes))),
        _ => text.push_str(&format!(
            ", {} for reads under way and {} for the index",
            Bytes(buffer_bytes),
            Bytes(index_bytes)
        )),
    }
    text
}

/// `the control group (/sys/fs/cgroup/app/memory.max)`.
fn bounded(bound: MemoryBound, limit_path: Option<&Path>) -> String {
    match limit_path {
        Some(path) => format!("{bound} ({})", path.display()),
        None => bound.to_string(),
    }
}

/// Every proposal as an alternative, and an `or` for what comes after.
fn ways_out(proposals: &[Proposal]) -> String {
    proposals
        .iter()
        .map(|proposal| format!("{proposal}, or "))
        .collect()
}

fn unwish(wishes: &[&str]) -> String {
    match wishes {
        [] => String::new(),
        wishes => format!(", or leave {} to the planner", wishes.join(" and ")),
    }
}

fn list(rejected: &[Rejection]) -> String {
    rejected
        .iter()
        .map(|rejection| format!("{}: {}", rejection.choice, rejection.reason))
        .collect::<Vec<_>>()
        .join("; ")
}
