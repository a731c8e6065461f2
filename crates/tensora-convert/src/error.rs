use std::fmt;
use std::io;
use std::path::PathBuf;

use tensora_formats::{Dtype, Format};

use crate::note::FirstOf;

/// A `Result` whose error is this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint could not be digested or converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // --- Tensors that were handed in -------------------------------------------------------
    /// Two tensors have the same name.
    #[error("tensor {tensor:?} appears twice; names are unique within a checkpoint")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor's size cannot be computed.
    #[error(
        "tensor {tensor:?}: the size of {dtype} {shape:?} overflows 64 bits or fills no whole number of bytes"
    )]
    TensorSize {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dimensions, outermost first.
        shape: Vec<u64>,
    },
    /// The bytes handed in are not as many as the tensor has, or for a strided tensor too few.
    #[error(
        "tensor {tensor:?}: {dtype} {shape:?} needs {needed_bytes} bytes, but {stored_bytes} were given"
    )]
    StoredBytes {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dimensions, outermost first.
        shape: Vec<u64>,
        /// The bytes that dtype, shape and strides call for; saturating.
        needed_bytes: u64,
        /// The bytes that were given.
        stored_bytes: u64,
    },
    /// A tensor does not have one stride per dimension.
    #[error("tensor {tensor:?}: {dimensions} dimensions, but {strides} strides")]
    StrideCount {
        /// The tensor.
        tensor: String,
        /// The number of dimensions.
        dimensions: usize,
        /// The number of strides.
        strides: usize,
    },
    /// A tensor of packed elements is not contiguous.
    #[error(
        "tensor {tensor:?}: elements of {dtype} do not begin on bytes, so they can only be stored contiguously"
    )]
    PackedStrides {
        /// The tensor.
        tensor: String,
        /// Its element type, of fewer than 8 bits.
        dtype: Dtype,
    },

    // --- What was asked for ----------------------------------------------------------------
    /// An option was set that has no meaning for the target format.
    #[error("{option} has no meaning for {target}; {instead}")]
    OptionNotForTarget {
        /// The option.
        option: &'static str,
        /// The target format.
        target: Format,
        /// What to do instead.
        instead: &'static str,
    },
    /// Two options were set that say the same thing differently.
    #[error("{first} and {second} cannot both be set; leave one of them out")]
    OptionsContradict {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// Tensors share bytes, which the target format cannot express.
    #[error(
        "tensors share bytes in the source, and SafeTensors stores each tensor for itself, which takes {bytes} bytes more: {}; allow shared tensors to be duplicated, or convert to a ServerlessLLM format",
        FirstOf(tensors)
    )]
    SharedTensors {
        /// The tensors, sorted by name.
        tensors: Vec<String>,
        /// What storing them separately takes in addition, in bytes.
        bytes: u64,
    },
    /// The memory limit is too low to work with.
    #[error("a memory limit of {limit_bytes} bytes is too low; allow at least {min_bytes}")]
    MemoryLimit {
        /// The limit given, in bytes.
        limit_bytes: u64,
        /// The lowest limit allowed, in bytes.
        min_bytes: u64,
    },
    /// There are so many windows that the list of them would take more memory than the data.
    #[error(
        "{bytes} bytes are too many to pass through buffers of {window_bytes}; allow more memory"
    )]
    TooManyWindows {
        /// What is to pass through, in bytes.
        bytes: u64,
        /// The size of a buffer, in bytes.
        window_bytes: u64,
    },
    /// The target format cannot hold the checkpoint.
    #[error(transparent)]
    Layout(tensora_formats::Error),

    // --- The source ------------------------------------------------------------------------
    /// The source could not be read.
    #[error(transparent)]
    Read(tensora_io::Error),
    /// A source file is not any more what it was when the conversion was planned, or the checkpoint opened.
    #[error("{}: changed while it was needed: {how}; let its writer finish, then start again", path.display())]
    SourceChanged {
        /// The source file.
        path: PathBuf,
        /// What is different.
        how: String,
    },
    /// A file beside the source could not be copied.
    #[error("{}: could not be read to be copied beside the converted checkpoint: {source}", path.display())]
    Companion {
        /// The file, or the directory that it is looked for in.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },

    /// The file of checksums beside a checkpoint cannot be understood.
    #[error("{}: is no file of checksums that can be used: {reason}; write it anew with `tensora convert --checksums`, or remove it", path.display())]
    Sidecar {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    // --- The target ------------------------------------------------------------------------
    /// The target, or something on the way to it, is no directory.
    #[error("{}: is not a directory; name a directory that the converted checkpoint can be written to", path.display())]
    NotADirectory {
        /// What is no directory.
        path: PathBuf,
    },
    /// The target directory is the one that the source is in, or files that would be replaced are the source's.
    #[error("{}: is the directory of the source, or holds files of it; write the converted checkpoint to another one", path.display())]
    TargetIsSource {
        /// The directory.
        path: PathBuf,
    },
    /// The target directory holds a checkpoint, and replacing it was not allowed.
    #[error("{}: holds a checkpoint already ({}); choose another directory, or allow it to be replaced", path.display(), files.join(", "))]
    TargetOccupied {
        /// The directory.
        path: PathBuf,
        /// The first files found there, sorted.
        files: Vec<String>,
    },
    /// The target directory holds a checkpoint of another kind, which is never replaced.
    #[error("{}: holds another kind of checkpoint ({}); two in one directory could not be told apart: choose another directory", path.display(), files.join(", "))]
    OtherCheckpoint {
        /// The directory.
        path: PathBuf,
        /// The first files found there, sorted.
        files: Vec<String>,
    },
    /// An interrupted conversion left finished files in the target directory.
    #[error("{}: an interrupted conversion left {} here; go on with it (--resume), or remove that and start over (--restart)", path.display(), Files(*files))]
    Interrupted {
        /// Where they are.
        path: PathBuf,
        /// How many.
        files: usize,
    },
    /// An interrupted conversion has begun to put its files in place, and cannot be undone.
    #[error("{}: a conversion was interrupted while it put its files in place; it can only be finished: repeat it with --resume, or remove the whole target", path.display())]
    OnlyToBeFinished {
        /// Where what is left of it is.
        path: PathBuf,
    },
    /// A conversion was interrupted while it put its files in place, and cannot be finished as it was.
    #[error("{}: a conversion was interrupted while it put its files in place, and cannot be finished: {what}; restore the source as it was and repeat the conversion with --resume, or remove the whole target", path.display())]
    CannotFinish {
        /// Where what is left of it is.
        path: PathBuf,
        /// Why not.
        what: &'static str,
    },
    /// What should be the directory of an interrupted conversion is none of this user's.
    #[error("{}: {what}, so it is not what an interrupted conversion leaves; remove it, or choose another directory", path.display())]
    NotStaging {
        /// What it is called.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Something is where a file of the target belongs, and cannot be replaced by one.
    #[error("{}: {what}; files get their names by being renamed, which does not work there: remove it, or choose another directory", path.display())]
    NotReplaceable {
        /// What is there.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The target is marked as incomplete, but nothing is there that could be resumed.
    #[error("{}: marks the directory as incomplete, but what an interrupted conversion had finished is gone; convert into it again with --restart, or remove it", path.display())]
    StrayMarker {
        /// The marker.
        path: PathBuf,
    },
    /// What an interrupted conversion left is of another one.
    #[error("{}: cannot be resumed: {what}; repeat that conversion as it was, or start over (--restart)", path.display())]
    CannotResume {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        what: &'static str,
    },
    /// Another conversion is writing to the target directory.
    #[error("{}: another conversion is writing here; wait for it, or choose another directory", path.display())]
    TargetBusy {
        /// Its journal.
        path: PathBuf,
    },
    /// The file system of the target does not have enough free space.
    #[error("{}: the converted checkpoint takes {needed_bytes} bytes, but only {free_bytes} are free; free {} more, or choose another file system", path.display(), needed_bytes.saturating_sub(*free_bytes))]
    NotEnoughSpace {
        /// The target directory.
        path: PathBuf,
        /// What the target's files take, in bytes.
        needed_bytes: u64,
        /// What the file system has free for this user, in bytes.
        free_bytes: u64,
    },
    /// The file system of the target became full, or a quota was reached.
    #[error("{}: no space left with {needed_bytes} bytes still to be written{}; the file has been removed: free space, then convert again (--resume keeps what is finished)", path.display(), Free(*free_bytes))]
    DiskFull {
        /// The file that could not be written.
        path: PathBuf,
        /// What remained to be written of the whole checkpoint, in bytes.
        needed_bytes: u64,
        /// What the file system had free for this user, in bytes, where it says so.
        free_bytes: Option<u64>,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A file would become larger than the process may write or the file system can hold.
    #[error("{}: larger than files may become here{}; the file has been removed: raise the limit on file sizes (ulimit -f), write smaller partitions, or choose a file system that holds larger files", path.display(), Limit(*limit_bytes))]
    FileTooLarge {
        /// The file that could not be written.
        path: PathBuf,
        /// The limit of the process on file sizes, in bytes, where there is one.
        limit_bytes: Option<u64>,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A file of the target could not be written.
    #[error(transparent)]
    Write(tensora_io::Error),
    /// What was written reads differently from what was read. It was not put in place.
    #[error("{}: what was written is not what was read: {}; the storage cannot be trusted: check it, and convert again", path.display(), differences.join("; "))]
    NotAsRead {
        /// The target directory.
        path: PathBuf,
        /// The differences, as sentences.
        differences: Vec<String>,
    },
    /// What was written reads differently from what was read, after a conversion that had been interrupted
    /// while it put its files in place was taken up again. The target stays marked as incomplete.
    #[error("{}: what was written is not what was read: {}; the directory stays incomplete, and opens as no checkpoint: check the storage, then repeat the conversion with --resume, which writes what was damaged again, or remove the whole target", path.display(), differences.join("; "))]
    PlacedNotAsRead {
        /// The target directory.
        path: PathBuf,
        /// The differences, as sentences.
        differences: Vec<String>,
    },
    /// The operating system refused an operation on the target.
    #[error("{}: could not {operation}: {source}{}", path.display(), elsewhere(source))]
    Target {
        /// What was being done, as a verb: `create`, `write`, `rename`.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },

    // --- Resources -------------------------------------------------------------------------
    /// The machine, or a limit on this process, leaves too little memory for any buffers.
    #[error(
        "a conversion needs {needed_bytes} bytes of memory, but only {available_bytes} are left; {remedy}"
    )]
    NotEnoughMemory {
        /// What the smallest buffers and everything else take, in bytes.
        needed_bytes: u64,
        /// What is left, in bytes.
        available_bytes: u64,
        /// What would leave more.
        remedy: &'static str,
    },
    /// Memory could not be had.
    #[error("no memory for {bytes} bytes of {purpose}")]
    Memory {
        /// How many bytes were asked for.
        bytes: u64,
        /// What they were for.
        purpose: &'static str,
    },
    /// The system refused another thread.
    #[error(
        "starting the writer thread failed: {source}; raise the limits on processes (ulimit -u) and on address space (ulimit -v)"
    )]
    Thread {
        /// The operating system's answer.
        source: io::Error,
    },
    /// The caller's cancellation token was set. What a conversion has finished is kept to be resumed.
    #[error("cancelled")]
    Cancelled,
}

/// What a user can do where a place cannot be written to.
fn elsewhere(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => "; choose a place that can be written to",
        io::ErrorKind::PermissionDenied => {
            "; check its permissions, or choose a place that can be written to"
        }
        _ => "",
    }
}

/// A number of files.
struct Files(usize);

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("unfinished files"),
            1 => f.write_str("1 finished file"),
            files => write!(f, "{files} finished files"),
        }
    }
}

/// How much is free, where that is known.
struct Free(Option<u64>);

impl fmt::Display for Free {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, " ({bytes} free)"),
            None => Ok(()),
        }
    }
}

/// How large a file may become, where that is known.
struct Limit(Option<u64>);

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, " ({bytes} bytes)"),
            None => Ok(()),
        }
    }
}

impl Error {
    /// What a backend reports while it reads the source.
    pub(crate) fn reading(error: tensora_io::Error) -> Self {
        if error.is_cancelled() {
            Self::Cancelled
        } else {
            Self::Read(error)
        }
    }

    /// Whether the caller's own cancellation is the reason.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }
}
