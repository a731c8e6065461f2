//! Batched reads of file ranges into memory that the caller owns.
//!
//! Four backends ([`BackendKind`]) stand behind one object-safe trait, [`Backend`]: threads, Tokio,
//! io_uring and memory mapping, each with its own cargo feature. Around them: owned memory with huge
//! pages ([`Region`]), opened files that know their direct-I/O alignment ([`SourceFile`]), progress and
//! cancellation ([`Control`]), and facts about the machine ([`Platform`]).
//!
//! This crate sees files, byte ranges and destinations, and knows nothing of what the bytes mean.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]

mod backend;
mod control;
mod destination;
mod direct;
mod error;
mod file;
mod memory;
mod platform;

pub use backend::{
    Backend, BackendKind, DirectFallback, DirectPolicy, ParseBackendKindError, ReadRequest,
    ReadStats, TransferParams,
};
pub use control::{CancelToken, Control};
pub use destination::Destination;
pub use error::{Error, Result};
pub use file::SourceFile;
pub use memory::Region;
pub use platform::{
    Availability, BackendFact, DirectSupport, FileSystemClass, HugePages, MemoryFacts, Platform,
    StorageFacts,
};
