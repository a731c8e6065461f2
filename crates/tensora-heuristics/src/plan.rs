use std::fmt;

use serde::{Serialize, Serializer};
use tensora_io::{BackendKind, DirectPolicy, MemoryKind, Platform, ResidentPolicy, TransferParams};

use crate::{Policy, Workload};

/// How to load, and why.
///
/// Its [`Display`](fmt::Display) is an explanation for people. Its JSON has the keys `backend`,
/// `memory`, `direct` ([`reads_direct`](Self::reads_direct)), `direct_policy`, `resident`
/// (`reread`, `copy` or `copy-and-drop`, and null for mmap), `drop_limit_bytes` (null unless something is
/// dropped), `chunk_bytes`, `queue_depth`, `workers`, `decisions`, and the inputs `workload`, `platform` and `policy`: give
/// those three to [`plan`](crate::plan()) again and the same plan comes out.
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
        match self.params.direct {
            DirectPolicy::Never => false,
            DirectPolicy::Required => true,
            DirectPolicy::Preferred => self
                .platform
                .storage
                .as_ref()
                .is_some_and(|storage| storage.direct.is_supported()),
        }
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
    /// `workers`, `queue_depth` or, where somebody looked for one, `profile` (`used`, `unused`, `absent` or
    /// `ignored`).
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
