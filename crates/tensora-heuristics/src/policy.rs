use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tensora_io::{BackendKind, DirectPolicy};

/// The name under which every choice leaves the decision to the planner.
const AUTO: &str = "auto";

/// What the caller wishes. The default leaves everything to the planner and does not allow mappings.
///
/// Whatever is named here is obeyed or refused with an error; only what is left to the planner is
/// chosen by it.
///
/// ```
/// use tensora_heuristics::{BackendChoice, Policy};
/// use tensora_io::BackendKind;
///
/// let mut policy = Policy::default();
/// policy.backend = BackendChoice::Named(BackendKind::Sync);
/// policy.memory_limit_bytes = Some(8 << 30);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Policy {
    /// Which backend reads.
    pub backend: BackendChoice,
    /// Which memory holds the tensors.
    pub memory: MemoryChoice,
    /// Whether the caller has taken on the contract of mappings.
    pub mapping: MappingConsent,
    /// Whether reads bypass the page cache.
    pub direct: DirectChoice,
    /// What the load leaves in the page cache.
    pub cache: CacheChoice,
    /// Largest single read, in bytes, instead of the planner's; limits as in
    /// [`TransferParams::chunk_bytes`](tensora_io::TransferParams::chunk_bytes).
    pub chunk_bytes: Option<u64>,
    /// Reads in flight per ring instead of the planner's; limits as in
    /// [`TransferParams::queue_depth`](tensora_io::TransferParams::queue_depth). Only rings have one.
    pub queue_depth: Option<u32>,
    /// Threads, concurrent reads or rings instead of the planner's; limits as in
    /// [`TransferParams::workers`](tensora_io::TransferParams::workers).
    pub workers: Option<u32>,
    /// Most memory that the load may own, in bytes, when that is less than what the machine leaves.
    pub memory_limit_bytes: Option<u64>,
}

/// Which backend reads. As text, `auto` or the name of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum BackendChoice {
    /// The planner chooses, and falls back where a backend cannot run.
    #[default]
    Auto,
    /// This one or an error.
    Named(BackendKind),
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => AUTO,
            Self::Named(kind) => kind.as_str(),
        })
    }
}

impl FromStr for BackendChoice {
    type Err = ParseChoiceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if name == AUTO {
            return Ok(Self::Auto);
        }
        name.parse().map(Self::Named).map_err(|_| ParseChoiceError {
            choice: "backend",
            name: name.to_owned(),
            names: "auto, sync, async, io-uring, mmap",
        })
    }
}

/// Which memory holds the tensors. As text, `auto`, `owned` or `mapped`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum MemoryChoice {
    /// Mapped where that is allowed and pays, owned otherwise.
    #[default]
    Auto,
    /// Memory of the load's own, into which the files are read.
    Owned,
    /// The page cache itself, without a copy. Needs [`MappingConsent::Granted`].
    Mapped,
}

impl fmt::Display for MemoryChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => AUTO,
            Self::Owned => "owned",
            Self::Mapped => "mapped",
        })
    }
}

impl FromStr for MemoryChoice {
    type Err = ParseChoiceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            AUTO => Ok(Self::Auto),
            "owned" => Ok(Self::Owned),
            "mapped" => Ok(Self::Mapped),
            _ => Err(ParseChoiceError {
                choice: "memory",
                name: name.to_owned(),
                names: "auto, owned, mapped",
            }),
        }
    }
}

/// Whether the caller has taken on the contract of mappings: while tensors are in use, nobody
/// truncates or rewrites the files. Without it loads are owned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MappingConsent {
    /// It has not: never expose a mapping.
    #[default]
    Denied,
    /// It has: a mapping may be exposed where that pays.
    Granted,
}

/// Whether reads bypass the page cache. As text, `auto`, `never`, `preferred` or `required`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DirectChoice {
    /// The planner chooses from what the storage supports and what the page cache holds.
    #[default]
    Auto,
    /// This policy.
    Policy(DirectPolicy),
}

impl DirectChoice {
    /// Whether a buffered read would break the caller's wish.
    pub(crate) const fn is_required(self) -> bool {
        matches!(self, Self::Policy(DirectPolicy::Required))
    }
}

impl fmt::Display for DirectChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => AUTO,
            Self::Policy(policy) => policy.as_str(),
        })
    }
}

impl FromStr for DirectChoice {
    type Err = ParseChoiceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if name == AUTO {
            return Ok(Self::Auto);
        }
        [
            DirectPolicy::Never,
            DirectPolicy::Preferred,
            DirectPolicy::Required,
        ]
        .into_iter()
        .find(|policy| policy.as_str() == name)
        .map(Self::Policy)
        .ok_or_else(|| ParseChoiceError {
            choice: "direct policy",
            name: name.to_owned(),
            names: "auto, never, preferred, required",
        })
    }
}

/// What a load leaves in the page cache. As text, `auto`, `keep` or `bypass`.
///
/// It is about what the load adds. What is there already is used in any case, and what cannot stay there
/// beside the tensors may be dropped, except with [`Keep`](Self::Keep).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum CacheChoice {
    /// Whatever is fastest for this load; the next one does not count.
    #[default]
    Auto,
    /// The files, for the next load: reads go through the page cache, or map it where that is allowed. Cold,
    /// that takes longer than direct reads.
    Keep,
    /// Nothing: files are read directly, and where the storage does not support that there is no plan. Files
    /// that live in memory have no copy in the page cache to begin with.
    Bypass,
}

impl CacheChoice {
    /// All of them, in the order in which they are listed to a user.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Keep, Self::Bypass];

    /// The name in commands, JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => AUTO,
            Self::Keep => "keep",
            Self::Bypass => "bypass",
        }
    }
}

impl fmt::Display for CacheChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for CacheChoice {
    type Err = ParseChoiceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|choice| choice.as_str() == name)
            .ok_or_else(|| ParseChoiceError {
                choice: "cache policy",
                name: name.to_owned(),
                names: "auto, keep, bypass",
            })
    }
}

/// A name that a choice does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown {choice} {name:?}: use one of {names}")]
pub struct ParseChoiceError {
    choice: &'static str,
    name: String,
    names: &'static str,
}

/// The choices stand in JSON as the words that a user types.
macro_rules! as_text {
    ($($choice:ty),+) => {$(
        impl From<$choice> for String {
            fn from(choice: $choice) -> Self {
                choice.to_string()
            }
        }

        impl TryFrom<String> for $choice {
            type Error = ParseChoiceError;

            fn try_from(name: String) -> Result<Self, Self::Error> {
                name.parse()
            }
        }
    )+};
}

as_text!(BackendChoice, MemoryChoice, DirectChoice, CacheChoice);
