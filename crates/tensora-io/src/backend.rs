use std::fmt;
use std::str::FromStr;

use crate::{Control, Destination, Error, Result, SourceFile};

/// The four ways of moving bytes from a file into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum BackendKind {
    /// Threads taking chunks of positioned reads from one queue.
    Sync,
    /// Tokio: work grouped per file, positioned reads on the blocking pool, bounded concurrency.
    Async,
    /// Several io_uring rings, each with a worker of its own.
    IoUring,
    /// Memory mapping with parallel population.
    Mmap,
}

impl BackendKind {
    /// All kinds, in the order in which they are listed to a user.
    pub const ALL: [Self; 4] = [Self::Sync, Self::Async, Self::IoUring, Self::Mmap];

    /// The name in commands, JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Async => "async",
            Self::IoUring => "io-uring",
            Self::Mmap => "mmap",
        }
    }

    /// Whether this build contains the backend, that is, whether its cargo feature was enabled.
    pub const fn is_compiled_in(self) -> bool {
        match self {
            Self::Sync => cfg!(feature = "sync"),
            Self::Async => cfg!(feature = "async"),
            Self::IoUring => cfg!(feature = "io-uring"),
            Self::Mmap => cfg!(feature = "mmap"),
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for BackendKind {
    type Err = ParseBackendKindError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == name)
            .ok_or_else(|| ParseBackendKindError(name.to_owned()))
    }
}

/// A name that is none of the backends'.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown backend {0:?}: use one of sync, async, io-uring, mmap")]
pub struct ParseBackendKindError(String);

/// Whether reads bypass the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum DirectPolicy {
    /// Buffered reads only.
    #[default]
    Never,
    /// Direct where the file supports it; where not, buffered, recorded in [`ReadStats::fallbacks`].
    Preferred,
    /// Direct or an error.
    Required,
}

impl DirectPolicy {
    /// The name in commands, JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Preferred => "preferred",
            Self::Required => "required",
        }
    }
}

impl fmt::Display for DirectPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What direct reads do about chunks that are in the page cache when the batch begins.
///
/// Buffered reads take those from the cache anyway; for them only
/// [`CopyAndDrop`](Self::CopyAndDrop) makes a difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum ResidentPolicy {
    /// They are read from the device like all others. Nobody asks what is resident.
    #[default]
    Reread,
    /// They are copied from the page cache, the others read from the device at the same time.
    Copy,
    /// As [`Copy`](Self::Copy), and what was read through the page cache is dropped from it once it
    /// has been copied, up to a limit: room for destinations that would not fit beside it.
    CopyAndDrop {
        /// How much to drop at most, in bytes.
        limit_bytes: u64,
    },
}

/// How a batch is cut up and how much of it is under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TransferParams {
    /// Largest single read into a destination, in bytes (reads into scratch, for the ragged ends of direct
    /// ones, have a limit of their own, 256 KiB and two blocks); [`MIN_CHUNK_BYTES`](Self::MIN_CHUNK_BYTES) to
    /// [`MAX_CHUNK_BYTES`](Self::MAX_CHUNK_BYTES).
    pub chunk_bytes: u64,
    /// Reads in flight per worker, 1 to [`MAX_QUEUE_DEPTH`](Self::MAX_QUEUE_DEPTH). Only rings keep
    /// more than one in flight per worker; for the other backends it is 1 whatever stands here.
    pub queue_depth: u32,
    /// Threads, concurrent reads (async) or rings, 1 to [`MAX_WORKERS`](Self::MAX_WORKERS).
    pub workers: u32,
    /// Whether reads bypass the page cache.
    pub direct: DirectPolicy,
    /// What direct reads do about chunks that are in the page cache. Where direct reads are
    /// [required](DirectPolicy::Required) they are read from the device whatever stands here.
    #[cfg_attr(feature = "serde", serde(default))]
    pub resident: ResidentPolicy,
}

impl TransferParams {
    /// Below a page, the cost of a call exceeds that of the copy.
    pub const MIN_CHUNK_BYTES: u64 = 4 << 10;
    /// Far below the 2 GiB that one read call can return on Linux.
    pub const MAX_CHUNK_BYTES: u64 = 1 << 30;
    /// Rings are sized to this; the kernel's own limit is 32,768.
    pub const MAX_QUEUE_DEPTH: u32 = 1024;
    /// More threads than this never helped on any machine that was measured.
    pub const MAX_WORKERS: u32 = 256;

    /// Checks every parameter against its range.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidParameter`] names the parameter, the value and the range.
    pub fn validate(&self) -> Result<()> {
        let check = |parameter, value, min, max| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(Error::InvalidParameter {
                    parameter,
                    value,
                    min,
                    max,
                })
            }
        };
        check(
            "chunk_bytes",
            self.chunk_bytes,
            Self::MIN_CHUNK_BYTES,
            Self::MAX_CHUNK_BYTES,
        )?;
        check(
            "queue_depth",
            self.queue_depth.into(),
            1,
            Self::MAX_QUEUE_DEPTH.into(),
        )?;
        check("workers", self.workers.into(), 1, Self::MAX_WORKERS.into())
    }
}

/// One range of one file and the memory it goes into.
#[derive(Debug)]
pub struct ReadRequest<'a> {
    /// The file to read.
    pub file: &'a SourceFile,
    /// Where the range begins, in bytes from the start of the file. No alignment is needed.
    pub offset: u64,
    /// Where the bytes go; its length is the length of the range. No alignment is needed, but with
    /// direct I/O an address congruent to `offset` modulo the file's alignment saves a copy.
    pub destination: Destination<'a>,
}

/// What a batch took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ReadStats {
    /// Bytes delivered into destinations.
    pub bytes: u64,
    /// Bytes of those that bypassed the page cache.
    pub direct_bytes: u64,
    /// Bytes of those that went through an aligned scratch buffer, because the range, or its
    /// destination, was not aligned as direct I/O needs it.
    pub scratch_bytes: u64,
    /// Read operations issued (or, for mmap, chunks populated).
    pub operations: u64,
    /// Operations that returned fewer bytes than asked and were continued.
    pub short_reads: u64,
    /// Operations that were interrupted or refused for the moment and were issued again.
    pub retries: u64,
    /// Files that were read buffered although direct I/O was preferred, each with the reason.
    pub fallbacks: Vec<DirectFallback>,
}

impl ReadStats {
    /// Adds what another batch took. A file's fallback is kept once.
    pub fn merge(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.direct_bytes += other.direct_bytes;
        self.scratch_bytes += other.scratch_bytes;
        self.operations += other.operations;
        self.short_reads += other.short_reads;
        self.retries += other.retries;
        for fallback in other.fallbacks {
            if !self.fallbacks.contains(&fallback) {
                self.fallbacks.push(fallback);
            }
        }
    }
}

/// A file that was read buffered although direct I/O was preferred.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct DirectFallback {
    /// The file.
    pub path: std::path::PathBuf,
    /// Why it could not be read directly.
    pub reason: String,
}

/// Moves ranges of files into memory that the caller owns.
///
/// # Contract
///
/// Every implementation keeps these promises; `testing::conformance` checks them
/// (feature `testing`).
///
/// - `Ok` means that every byte of every destination was written with the file's content.
/// - `Err` names the file, the offset and the cause. Destinations then hold unspecified bytes.
/// - When the call returns or unwinds, nothing of it is in flight: neither a thread nor the kernel
///   touches a destination any more.
/// - Interrupted calls are retried, short reads continued, and a file that ends early is
///   [`Error::UnexpectedEof`].
/// - [`DirectPolicy::Required`] never reads buffered.
/// - The call may come from any thread, also from inside a Tokio runtime. It blocks its caller until
///   the batch is done; `offload` makes a future of it.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Which of the four ways this is. A wrapper answers for what it wraps.
    fn kind(&self) -> BackendKind;

    /// Reads every request, in whatever order is fastest.
    ///
    /// Requests may overlap, repeat, be empty, and name any number of files.
    ///
    /// # Errors
    ///
    /// The first failure ends the batch; see [`Error`]. [`Error::Cancelled`] when `control` was
    /// cancelled before the batch was complete.
    ///
    /// # Panics
    ///
    /// A panic of a progress callback is passed on, after everything in flight has come back.
    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats>;
}

/// `Backend` stays object-safe.
const _: [&dyn Backend; 0] = [];

/// Makes the backend of a kind.
///
/// # Errors
///
/// [`Error::BackendUnavailable`], with reason and remedy, when the backend was left out of this
/// build or the machine does not let it run.
pub fn backend(kind: BackendKind) -> Result<Box<dyn Backend>> {
    match kind {
        #[cfg(feature = "sync")]
        BackendKind::Sync => Ok(Box::new(crate::SyncBackend::new())),
        #[cfg(feature = "async")]
        BackendKind::Async => Ok(Box::new(crate::AsyncBackend::new())),
        #[cfg(all(feature = "io-uring", target_os = "linux", not(tensora_portable)))]
        BackendKind::IoUring => Ok(Box::new(crate::IoUringBackend::new()?)),
        #[cfg(all(feature = "mmap", target_os = "linux", not(tensora_portable)))]
        BackendKind::Mmap => Ok(Box::new(crate::MmapBackend::new()?)),
        #[allow(unreachable_patterns)]
        kind => Err(crate::platform::unavailable(kind)),
    }
}
