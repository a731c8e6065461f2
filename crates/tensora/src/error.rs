use std::path::PathBuf;

/// Why a load failed: what, on which file and tensor, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path is no checkpoint, or its metadata is wrong.
    #[error(transparent)]
    Format(#[from] tensora_formats::Error),

    /// No plan satisfies what was asked for on this machine.
    #[error(transparent)]
    Plan(#[from] tensora_heuristics::PlanError),

    /// A file could not be opened or mapped, or a backend could not run.
    #[error(transparent)]
    Io(#[from] tensora_io::Error),

    /// A digest or a conversion failed.
    #[cfg(feature = "convert")]
    #[error(transparent)]
    Convert(#[from] tensora_convert::Error),

    /// Reading failed at a place where a tensor is stored.
    #[error("loading tensor {tensor:?} failed: {source}")]
    Tensor {
        /// The tensor at that place, the first of them by offset.
        tensor: String,
        /// What failed.
        source: tensora_io::Error,
    },

    /// A file's length is no longer what it was when the metadata was read.
    #[error(
        "{} had {indexed_bytes} bytes when its metadata was read and has {actual_bytes} now: \
         it is being written or was replaced; load again when that is done",
        .path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Its length when the metadata was read, in bytes.
        indexed_bytes: u64,
        /// Its length when it was opened for reading, in bytes.
        actual_bytes: u64,
    },

    /// The checkpoint has no tensor of this name.
    #[error(
        "no tensor is named {name:?}{}; the checkpoint at {} has {tensor_count} tensors, \
         `tensora inspect` lists them",
        did_you_mean(.similar),
        .root.display()
    )]
    NoSuchTensor {
        /// The name asked for.
        name: String,
        /// Names that look like it, at most three.
        similar: Vec<String>,
        /// How many tensors there are.
        tensor_count: usize,
        /// The checkpoint.
        root: PathBuf,
    },

    /// The checkpoint has this tensor, but the load did not select it.
    #[error("tensor {name:?} was not loaded: the selection left it out; add it to the selection")]
    NotSelected {
        /// The tensor.
        name: String,
    },

    /// A pattern selects nothing.
    #[error(
        "the pattern {pattern:?} matches none of the {tensor_count} tensors of {}; \
         `*` matches any part of a name, `tensora inspect` lists the names",
        .root.display()
    )]
    NoMatch {
        /// The pattern.
        pattern: String,
        /// How many tensors there are.
        tensor_count: usize,
        /// The checkpoint.
        root: PathBuf,
    },

    /// A pattern is not a valid glob.
    #[error("the pattern {pattern:?} is not a valid glob: {reason}")]
    BadPattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the caller's own cancellation is the reason.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Io(error) | Self::Tensor { source: error, .. } if error.is_cancelled())
    }
}

fn did_you_mean(names: &[String]) -> String {
    if names.is_empty() {
        String::new()
    } else {
        format!(" (did you mean {}?)", names.join(", "))
    }
}
