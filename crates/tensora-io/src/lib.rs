//! Batched reads of file ranges into memory that the caller owns.
//!
//! Four backends ([`BackendKind`]) stand behind one object-safe trait, [`Backend`]: threads, Tokio,
//! io_uring and memory mapping, each with its own cargo feature. Around them: owned memory with huge
//! pages ([`Region`]), streams through a bounded set of buffers ([`RangeStream`]), opened files that know
//! their direct-I/O alignment ([`SourceFile`]), files that are written ([`TargetFile`]), progress and
//! cancellation ([`Control`]), and facts about the machine ([`Platform`]).
//!
//! This crate sees files, byte ranges and destinations, and knows nothing of what the bytes mean.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![deny(unsafe_code)]
// What the backends share serves each of them in part; only a full build on Linux uses all of it.
#![cfg_attr(
    not(all(
        feature = "sync",
        feature = "async",
        feature = "io-uring",
        feature = "mmap",
        target_os = "linux",
        not(tensora_portable)
    )),
    allow(dead_code)
)]

mod backend;
mod control;
#[allow(unsafe_code)]
mod destination;
mod direct;
mod error;
#[cfg(feature = "mmap")]
mod fault_around;
mod file;
#[cfg(feature = "mmap")]
#[allow(unsafe_code)]
mod mapping;
#[allow(unsafe_code)]
mod memory;
#[cfg(all(feature = "mmap", target_os = "linux", not(tensora_portable)))]
#[allow(unsafe_code)]
mod mmap;
mod offload;
mod placement;
mod platform;
#[cfg(any(
    feature = "sync",
    feature = "async",
    all(
        any(feature = "io-uring", feature = "mmap"),
        target_os = "linux",
        not(tensora_portable)
    )
))]
#[allow(unsafe_code)]
mod positioned;
mod probe;
mod profile;
#[cfg(feature = "profiles")]
mod profile_store;
mod residency;
#[cfg(feature = "shared")]
mod shared;
#[cfg(test)]
#[path = "../tests/skip_support/mod.rs"]
mod skip_support;
mod storage;
mod stream;
#[cfg(feature = "sync")]
mod sync;
mod target;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "async")]
#[allow(unsafe_code)]
mod tokio_backend;
#[cfg(any(
    feature = "sync",
    feature = "async",
    all(
        any(feature = "io-uring", feature = "mmap"),
        target_os = "linux",
        not(tensora_portable)
    )
))]
#[allow(unsafe_code)]
mod transfer;
#[cfg(all(feature = "io-uring", target_os = "linux", not(tensora_portable)))]
#[allow(unsafe_code)]
mod uring;
mod workers;

pub use backend::{
    Backend, BackendKind, DirectFallback, DirectPolicy, ParseBackendKindError, ReadRequest,
    ReadStats, ResidentPolicy, TransferParams, backend,
};
pub use control::{CancelToken, Control};
pub use destination::Destination;
pub use error::{Error, Result};
pub use file::{FileIdentity, SourceFile};
#[cfg(feature = "mmap")]
pub use mapping::{Mapping, MappingPermit, PopulateParams};
pub use memory::Region;
#[cfg(all(feature = "mmap", target_os = "linux", not(tensora_portable)))]
pub use mmap::MmapBackend;
pub use offload::{Offload, offload};
pub use placement::{Placement, merge_ranges};
pub use platform::{
    Availability, BackendFact, DirectSupport, FileSystemClass, HugePages, MemoryFacts, MemoryKind,
    MemorySource, Platform, StorageFacts,
};
pub use probe::peak_resident_bytes;
pub use profile::{CacheState, Measurement, Profile, ProfileFact, ProfileIdentity};
#[cfg(feature = "profiles")]
pub use profile_store::ProfileStore;
#[cfg(feature = "shared")]
pub use shared::{RankSet, SharedOptions, SharedReport, SharedRole, SharedStream, SharedWindow};
pub use stream::{
    FilledWindow, RangeStream, ReadExtent, ReadWindow, StreamParams, StreamStats, WindowHook,
};
#[cfg(feature = "sync")]
pub use sync::SyncBackend;
pub use target::{TargetFile, WriteStats};
#[cfg(feature = "async")]
pub use tokio_backend::AsyncBackend;
#[cfg(all(feature = "io-uring", target_os = "linux", not(tensora_portable)))]
pub use uring::IoUringBackend;
