use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::BackendKind;

/// What went wrong, on which file, at which offset, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call on a file failed.
    #[error("{operation} {} failed: {source}{}", .path.display(), remedy(.source))]
    File {
        /// What was attempted, as a verb: `open`, `stat`, `map`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },

    /// Reading a range of a file failed.
    #[error("read {} at offset {offset} ({length} bytes) failed: {source}{}", .path.display(), remedy(.source))]
    Read {
        /// The file.
        path: PathBuf,
        /// Where in the file the failing read began, in bytes.
        offset: u64,
        /// How many bytes were asked for there.
        length: u64,
        /// The operating system's answer.
        source: io::Error,
    },

    /// Writing a range of a file failed.
    #[error("write {} at offset {offset} ({length} bytes) failed: {source}{}", .path.display(), remedy(.source))]
    Write {
        /// The file.
        path: PathBuf,
        /// Where in the file the failing write began, in bytes.
        offset: u64,
        /// How many bytes were to be written there.
        length: u64,
        /// The operating system's answer.
        source: io::Error,
    },

    /// Room for a file that is to be written could not be had.
    #[error("reserve {bytes} bytes for {} failed: {source}{}", .path.display(), remedy(.source))]
    Reserve {
        /// The file. It is removed again.
        path: PathBuf,
        /// Its length, in bytes.
        bytes: u64,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A range that was to be written lies outside the file.
    #[error(
        "{length} bytes at offset {offset} lie outside {}, which was created with {file_bytes} bytes",
        .path.display()
    )]
    OutsideTarget {
        /// The file.
        path: PathBuf,
        /// Begin of the range, in bytes.
        offset: u64,
        /// Length of the range, in bytes.
        length: u64,
        /// Length of the file, in bytes.
        file_bytes: u64,
    },

    /// A file was finished before all of it was written.
    #[error(
        "{} is incomplete: {missing_bytes} of its {file_bytes} bytes were never written, the first at offset {offset}",
        .path.display()
    )]
    IncompleteTarget {
        /// The file.
        path: PathBuf,
        /// Where the first byte is missing, counted in bytes.
        offset: u64,
        /// How many bytes are missing.
        missing_bytes: u64,
        /// Length of the file, in bytes.
        file_bytes: u64,
    },

    /// A file has another length at its end than it was created with.
    #[error(
        "{} was written with {expected_bytes} bytes, but has {actual_bytes}: something else changes it; \
         keep other programs away from it and write it again",
        .path.display()
    )]
    ChangedTarget {
        /// The file.
        path: PathBuf,
        /// The length it was created with, in bytes.
        expected_bytes: u64,
        /// Its length, in bytes.
        actual_bytes: u64,
    },

    /// A file ended before the range that was asked for did.
    #[error(
        "{} ends at byte {actual_end}, but bytes {offset}..{expected_end} were asked for: \
         the file is truncated, or was replaced or shortened while it was read; \
         fetch it again or re-create it",
        .path.display()
    )]
    UnexpectedEof {
        /// The file.
        path: PathBuf,
        /// Begin of the range asked for, in bytes.
        offset: u64,
        /// End of the range asked for, in bytes.
        expected_end: u64,
        /// Where the file was found to end, in bytes.
        actual_end: u64,
    },

    /// A path is a directory, FIFO, socket or device, where only a regular file can be read.
    #[error("{} is a {found}, not a regular file; name a file", .path.display())]
    NotARegularFile {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },

    /// Direct I/O was required, and this file cannot be read or written that way.
    #[error(
        "direct I/O is required, but {} does not allow it: {reason}; \
         use the policy `preferred` to fall back to buffered I/O",
        .path.display()
    )]
    DirectUnsupported {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },

    /// A backend cannot run on this machine, or was left out of this build.
    #[error("the {backend} backend is unavailable: {reason}; {remedy}")]
    BackendUnavailable {
        /// The backend.
        backend: BackendKind,
        /// Why it cannot run.
        reason: String,
        /// What would make it run, or what to use instead.
        remedy: String,
    },

    /// A transfer parameter lies outside its range.
    #[error("{parameter} = {value} is outside {min}..={max}")]
    InvalidParameter {
        /// Name of the parameter, with its unit.
        parameter: &'static str,
        /// The value given.
        value: u64,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },

    /// A range ends past what a 64-bit file offset can express.
    #[error("the range at offset {offset} with {length} bytes of {} overflows a file offset", .path.display())]
    RangeOverflow {
        /// The file.
        path: PathBuf,
        /// Begin of the range, in bytes.
        offset: u64,
        /// Length of the range, in bytes.
        length: u64,
    },

    /// Memory for the destination or for a buffer could not be had.
    #[error("allocating {bytes} bytes of {purpose} failed: {source}")]
    Memory {
        /// How many bytes were asked for.
        bytes: u64,
        /// What they were for.
        purpose: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A thread, runtime or ring that a backend works with could not be made or failed.
    #[error("the {backend} backend failed to {operation}: {source}; {}", backend_remedy(.source))]
    Backend {
        /// The backend.
        backend: BackendKind,
        /// What it was doing.
        operation: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },

    /// The system refused another thread.
    #[error("starting a thread failed: {source}; raise the limit on processes (ulimit -u)")]
    Thread {
        /// The operating system's answer.
        source: io::Error,
    },

    /// A window of a stream does not fit the stream's files or buffers.
    #[error("window {window} cannot be read: {reason}")]
    InvalidWindow {
        /// Position of the window in the stream, from 0.
        window: usize,
        /// What does not fit, with the numbers.
        reason: String,
    },

    /// The next window of a stream could not be read in time, because its buffers are leased out. The
    /// stream can be asked again.
    #[error(
        "no buffer for the next window after {waited:.1?}: {held} of {buffers} are held by windows that were \
         handed out earlier; drop these (and every clone and slice of their bytes) before asking for the \
         next, copy what has to be kept, or use more buffers"
    )]
    LeasesHeld {
        /// How many buffers are leased out.
        held: u32,
        /// How many buffers there are.
        buffers: u32,
        /// How long was waited for one.
        waited: Duration,
    },

    /// The system, or this build, does not let a process do what was asked for.
    #[error("{operation} is not possible here: {reason}; {remedy}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// What stands in the way.
        reason: String,
        /// What would remove it, or what to do instead.
        remedy: &'static str,
    },

    /// The name of a group of processes cannot be one.
    #[error("the group name {group:?} {reason}; use 1 to {max_bytes} bytes without NUL")]
    InvalidGroup {
        /// The name.
        group: String,
        /// What is wrong with it.
        reason: String,
        /// The longest name allowed, in bytes.
        max_bytes: usize,
    },

    /// A group of processes did not let this one in.
    #[error("the group {group:?} refused rank {rank}: {reason}")]
    GroupRefused {
        /// Name of the group.
        group: String,
        /// Rank of this process.
        rank: u32,
        /// What does not fit, and what to do about it.
        reason: String,
    },

    /// A group of processes could not be made or joined.
    #[error("joining the group {group:?} failed: could not {operation}: {source}{}", remedy(.source))]
    Group {
        /// Name of the group.
        group: String,
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },

    /// Another member of a group failed to read a window that this one wants too.
    #[error("rank {rank}, which read for all, failed: {message}")]
    ReadByPeer {
        /// Rank of the member that read.
        rank: u32,
        /// Its error, with file and offset.
        message: String,
    },

    /// A group went on without this member, because the others waited for its leases.
    #[error(
        "rank {rank} was taken out of the group {group:?}: the others waited {waited:.1?} for the {held} windows that \
         it held; drop windows (and every clone and slice of their bytes) before asking for the next, copy what \
         has to be kept, or use more buffers or a longer lease timeout"
    )]
    GroupLeasesHeld {
        /// Name of the group.
        group: String,
        /// Rank of this process.
        rank: u32,
        /// How many windows it held.
        held: u32,
        /// How long the others waited.
        waited: Duration,
    },

    /// The caller's cancellation token was set; nothing is in flight any more.
    #[error("cancelled")]
    Cancelled,
}

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn file(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::File {
            operation,
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// Whether the caller's own cancellation is the reason.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }

    /// The file that the error is about, where there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. }
            | Self::Read { path, .. }
            | Self::Write { path, .. }
            | Self::Reserve { path, .. }
            | Self::OutsideTarget { path, .. }
            | Self::IncompleteTarget { path, .. }
            | Self::ChangedTarget { path, .. }
            | Self::UnexpectedEof { path, .. }
            | Self::NotARegularFile { path, .. }
            | Self::DirectUnsupported { path, .. }
            | Self::RangeOverflow { path, .. } => Some(path),
            _ => None,
        }
    }

    /// The operating system's answer, where there was one: its kind tells a full disk
    /// ([`StorageFull`](io::ErrorKind::StorageFull), [`QuotaExceeded`](io::ErrorKind::QuotaExceeded)) from one that
    /// fails.
    pub fn io_error(&self) -> Option<&io::Error> {
        match self {
            Self::File { source, .. }
            | Self::Read { source, .. }
            | Self::Write { source, .. }
            | Self::Reserve { source, .. }
            | Self::Memory { source, .. }
            | Self::Backend { source, .. }
            | Self::Thread { source }
            | Self::Group { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// What a user can do about the answers that the operating system gives most often.
pub(crate) fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; check the path, or whether a download is incomplete",
        io::ErrorKind::PermissionDenied => {
            "; check the permissions of the file and its directories"
        }
        io::ErrorKind::AlreadyExists => "; remove it, or name another",
        io::ErrorKind::StorageFull => "; make room on that file system, or name a place on another",
        io::ErrorKind::QuotaExceeded => {
            "; make room within the quota, have it raised, or name a place elsewhere"
        }
        io::ErrorKind::FileTooLarge => {
            "; raise the limit on file sizes (ulimit -f), or name a place on a file system for larger files"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; name a place that can be written to",
        _ if source.raw_os_error() == Some(EMFILE) => "; raise the limit on open files (ulimit -n)",
        _ => "",
    }
}

/// The same, where it is no file that was refused.
fn backend_remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        // What probing found to work was refused later.
        io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported => {
            "allow its system calls in the seccomp profile, or use another backend"
        }
        _ if source.raw_os_error() == Some(EMFILE) => {
            "raise the limit on open files (ulimit -n), or use another backend"
        }
        _ => "use another backend",
    }
}

/// "Too many open files", the same number on every Unix.
const EMFILE: i32 = 24;
