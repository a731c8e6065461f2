use serde::{Serialize, Serializer};
use tensora_io::{BackendKind, DirectPolicy, Platform, TransferParams};

use crate::plan::{reads_direct, resident_name};
use crate::{Decision, Policy, Workload, tuning};

/// Memory that a stream holds at most where [`Policy::memory_limit_bytes`] does not say otherwise, in bytes:
/// buffers, scratch and index.
pub const DEFAULT_STREAM_MEMORY_BYTES: u64 = tuning::STREAM_MEMORY_BYTES;

/// How to visit tensors through a bounded set of buffers, and why.
///
/// Its [`Display`](std::fmt::Display) is an explanation for people. Its JSON has the keys `backend`, `direct`
/// ([`reads_direct`](Self::reads_direct)), `direct_policy`, `resident` (`reread` or `copy`, and null for mmap),
/// `chunk_bytes`, `queue_depth`, `workers`, `readers`, `buffers`, `buffer_bytes`, `scratch_bytes`, `memory_bytes`
/// ([`memory_bytes`](Self::memory_bytes)), `decisions`, and the inputs `workload`, `platform` and `policy`: give those
/// three to [`plan_stream`](crate::plan_stream()) again and the same plan comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamPlan {
    /// The backend that reads, one that can run on the platform.
    pub backend: BackendKind,
    /// Parameters for reading one window; they are within their limits, and `workers` is 1.
    pub params: TransferParams,
    /// Windows that are read at once, each by one reader.
    pub readers: u32,
    /// Buffers in all: those being filled, those that wait, and those that the consumer holds.
    pub buffers: u32,
    /// Size of each buffer, in bytes, and so the most that a window may take; a multiple of 64 KiB.
    pub buffer_bytes: u64,
    /// What the readers take beside the buffers at most, for the unaligned ends of files, in bytes.
    pub scratch_bytes: u64,
    /// Why, in the order in which it was decided.
    pub decisions: Vec<Decision>,
    /// What is to be read.
    pub workload: Workload,
    /// The facts that the plan rests on.
    pub platform: Platform,
    /// What the caller wished.
    pub policy: Policy,
}

impl StreamPlan {
    /// All that the stream holds at most, in bytes: buffers, scratch and index.
    pub fn memory_bytes(&self) -> u64 {
        self.buffer_bytes
            .saturating_mul(self.buffers.into())
            .saturating_add(self.scratch_bytes)
            .saturating_add(self.workload.index_bytes)
    }

    /// Whether reads are expected to bypass the page cache: the parameters ask for it and the storage
    /// supports it. The backend still finds out per file.
    pub fn reads_direct(&self) -> bool {
        reads_direct(self.params.direct, &self.platform)
    }
}

impl Serialize for StreamPlan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Json<'a> {
            backend: BackendKind,
            direct: bool,
            direct_policy: DirectPolicy,
            resident: Option<&'static str>,
            chunk_bytes: u64,
            queue_depth: u32,
            workers: u32,
            readers: u32,
            buffers: u32,
            buffer_bytes: u64,
            scratch_bytes: u64,
            memory_bytes: u64,
            decisions: &'a [Decision],
            workload: &'a Workload,
            platform: &'a Platform,
            policy: &'a Policy,
        }

        Json {
            backend: self.backend,
            direct: self.reads_direct(),
            direct_policy: self.params.direct,
            resident: (self.backend != BackendKind::Mmap)
                .then(|| resident_name(self.params.resident)),
            chunk_bytes: self.params.chunk_bytes,
            queue_depth: self.params.queue_depth,
            workers: self.params.workers,
            readers: self.readers,
            buffers: self.buffers,
            buffer_bytes: self.buffer_bytes,
            scratch_bytes: self.scratch_bytes,
            memory_bytes: self.memory_bytes(),
            decisions: &self.decisions,
            workload: &self.workload,
            platform: &self.platform,
            policy: &self.policy,
        }
        .serialize(serializer)
    }
}
