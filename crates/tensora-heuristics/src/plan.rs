use std::fmt;

use serde::{Serialize, Serializer};
use tensora_io::{BackendKind, DirectPolicy, MemoryKind, Platform, ResidentPolicy, TransferParams};

use crate::{Policy, Workload};

/// How to load, and why.
///
/// Its [`Display`](fmt::Display) is an explanation for people. Its JSON has the keys `backend`,
/// `memory`, `direct` ([`reads_direct`](Self::reads_direct)), `direct_policy`, `resident`
/// (`reread`, `copy` or `copy-and-drop`, and null for mmap), `drop_limit_bytes` (null unless something is
/// dropped), `chunk_bytes`, `queue_depth`, `workers`, `window_limit_bytes`, `sharing` (`memory`, `page-cache`, or null
/// where nothing is shared), `decisions`, and the inputs `workload`, `platform` and `policy`: give those three to
/// [`plan`](crate::plan()) again and the same plan comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// The backend that reads, one that can run on the platform.
    pub backend: BackendKind,
    /// The memory that tensors are delivered in; mapped only with the caller's consent, and then the
    /// backend is [`BackendKind::Mmap`].
    pub memory: MemoryKind,
    /// Parameters for the backend; they are within their limits.
    pub params: TransferParams,
    /// Memory for windows, in bytes: what is gathered out of them or shared through them takes no more than
    /// this beside the tensors, so it is the memory limit for [`plan_stream`](crate::plan_stream()) there. 0 where
    /// nothing needs windows.
    pub window_limit_bytes: u64,
    /// What the ranks that load together read through, so that each byte is read once; `None` where the
    /// workload has nothing that two of them need.
    pub sharing: Option<SharedBy>,
    /// Why, in the order in which it was decided.
    pub decisions: Vec<Decision>,
    /// What is to be read.
    pub workload: Workload,
    /// The facts that the plan rests on.
    pub platform: Platform,
    /// What the caller wished.
    pub policy: Policy,
}

impl Plan {
    /// Whether reads are expected to bypass the page cache: the parameters ask for it and the storage
    /// supports it. The backend still finds out per file.
    pub fn reads_direct(&self) -> bool {
        reads_direct(self.params.direct, &self.platform)
    }
}

/// Whether reads under this policy are expected to be direct on this platform.
pub(crate) fn reads_direct(direct: DirectPolicy, platform: &Platform) -> bool {
    match direct {
        DirectPolicy::Never => false,
        DirectPolicy::Required => true,
        DirectPolicy::Preferred => platform
            .storage
            .as_ref()
            .is_some_and(|storage| storage.direct.is_supported()),
    }
}

/// What ranks of one machine read through that need the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SharedBy {
    /// Memory that all of them map: one of them reads each window into it, and all take from it what they
    /// need.
    Memory,
    /// The page cache: whoever comes first has the kernel fetch a page, and all map it or copy out of it.
    PageCache,
}

impl SharedBy {
    /// The name in JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::PageCache => "page-cache",
        }
    }
}

impl fmt::Display for SharedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // A plan's JSON is flat: a reader of it cares about the choices, not about which of our types
        // holds them.
        #[derive(Serialize)]
        struct Json<'a> {
            backend: BackendKind,
            memory: MemoryKind,
            direct: bool,
            direct_policy: DirectPolicy,
            resident: Option<&'static str>,
            drop_limit_bytes: Option<u64>,
            chunk_bytes: u64,
            queue_depth: u32,
            workers: u32,
            window_limit_bytes: u64,
            sharing: Option<SharedBy>,
            decisions: &'a [Decision],
            workload: &'a Workload,
            platform: &'a Platform,
            policy: &'a Policy,
        }

        Json {
            backend: self.backend,
            memory: self.memory,
            direct: self.reads_direct(),
            direct_policy: self.params.direct,
            resident: (self.backend != BackendKind::Mmap)
                .then(|| resident_name(self.params.resident)),
            drop_limit_bytes: match self.params.resident {
                ResidentPolicy::CopyAndDrop { limit_bytes } => Some(limit_bytes),
                ResidentPolicy::Reread | ResidentPolicy::Copy => None,
            },
            chunk_bytes: self.params.chunk_bytes,
            queue_depth: self.params.queue_depth,
            workers: self.params.workers,
            window_limit_bytes: self.window_limit_bytes,
            sharing: self.sharing,
            decisions: &self.decisions,
            workload: &self.workload,
            platform: &self.platform,
            policy: &self.policy,
        }
        .serialize(serializer)
    }
}

/// The name in JSON and explanations.
pub(crate) const fn resident_name(policy: ResidentPolicy) -> &'static str {
    match policy {
        ResidentPolicy::Reread => "reread",
        ResidentPolicy::Copy => "copy",
        ResidentPolicy::CopyAndDrop { .. } => "copy-and-drop",
    }
}

/// One thing that was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Decision {
    /// What was decided: `memory`, `backend`, `direct`, `resident` (not for mmap), `chunk_bytes`,
    /// `workers`, `queue_depth`; `slices`, where parts of files are read, `sharing`, where ranks load together,
    /// and `profile` (`used`, `unused`, `absent` or `ignored`), where somebody looked for one. A stream has
    /// `memory_bytes`, `readers`, `buffer_bytes` and `buffers` in place of `memory` and `workers`.
    /// [`merge_gap_bytes`](crate::merge_gap_bytes()) decides `merge_gap_bytes`.
    pub field: &'static str,
    /// The choice, as it stands in JSON.
    pub chosen: String,
    /// Why, in whole sentences.
    pub reason: String,
    /// What was not chosen although it could have been thought of, best first.
    pub rejected: Vec<Rejection>,
}

/// A choice that was not made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Rejection {
    /// The choice.
    pub choice: String,
    /// What spoke against it.
    pub reason: String,
}

impl Rejection {
    pub(crate) fn new(choice: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self {
            choice: choice.to_string(),
            reason: reason.into(),
        }
    }
}
