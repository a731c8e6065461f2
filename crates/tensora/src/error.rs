use std::path::PathBuf;

use tensora_formats::FileChange;

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

    /// What tensors are streamed into could not go on.
    #[error("{}{source}", at_tensor(.tensor.as_deref()))]
    Sink {
        /// The tensor of which a piece was being taken; none before the first and after the last.
        tensor: Option<String>,
        /// What it says.
        source: crate::SinkError,
    },

    /// Reading together with other ranks was asked for, without saying which rank this is.
    #[error("reading together needs a rank and the number of ranks; set both with Loader::rank")]
    ShareWithoutRank,

    /// The rank is none of the ranks that there are.
    #[error("rank {rank} is none of {world} ranks; they are counted from 0")]
    NoSuchRank {
        /// The rank.
        rank: u32,
        /// How many ranks there are.
        world: u32,
    },

    /// Reading together with other ranks was asked for, and this build cannot.
    #[error(
        "reading together with other ranks is left out of this build; enable the cargo feature `shared`"
    )]
    SharingLeftOut,

    /// A file is no longer what it was when its metadata was read, so its bytes need not be what the metadata says.
    #[error(
        "{} has changed since its metadata was read: {change}; open the checkpoint again when it is completely written",
        .path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// What happened to it.
        change: FileChange,
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

    /// A pattern is not a valid glob, or regular expression.
    #[error("the pattern {pattern:?} is not a valid {}: {reason}", kind_of_pattern(.pattern))]
    BadPattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The text of a slice rule is not understood.
    #[error("the slice rule {rule:?} is not valid: {reason}")]
    BadSliceRule {
        /// The rule.
        rule: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A slice rule is about no tensor that is loaded.
    #[error(
        "the slice rule `{rule}` matches none of the {selected_count} tensors selected from {}; \
         `*` matches any part of a name, `tensora inspect` lists the names",
        .root.display()
    )]
    UnusedSliceRule {
        /// The rule.
        rule: String,
        /// How many tensors are selected.
        selected_count: usize,
        /// The checkpoint.
        root: PathBuf,
    },

    /// Two slice rules are about one tensor.
    #[error(
        "two slice rules match tensor {tensor:?}: `{first}` and `{second}`; make one of them match less"
    )]
    SliceConflict {
        /// The tensor.
        tensor: String,
        /// One rule.
        first: String,
        /// The other.
        second: String,
    },

    /// A slice rule divides a dimension among ranks, but nothing says which rank this is.
    #[error(
        "tensor {tensor:?} is to be sliced by `{rule}`{}, which needs a rank and the number of ranks; \
         give both with Loader::rank (`--rank R --world W`), or in a rule of its own (`,rank:R/W`)",
        of_preset(.preset.as_deref())
    )]
    SliceNeedsRank {
        /// The tensor.
        tensor: String,
        /// The rule.
        rule: String,
        /// The preset that the rule is from, if it is from one.
        preset: Option<String>,
    },

    /// A rule says that this tensor must not be sliced as simply as the others.
    #[error(
        "tensor {tensor:?} cannot be sliced by the rules{}: {reason}; \
         the rule `{tensor}=whole` loads it whole",
        of_preset(.preset.as_deref())
    )]
    SliceRefused {
        /// The tensor.
        tensor: String,
        /// The rule.
        rule: String,
        /// The preset that the rule is from, if it is from one.
        preset: Option<String>,
        /// Why.
        reason: String,
    },

    /// A slice rule names a dimension that the tensor does not have.
    #[error(
        "tensor {tensor:?} of shape {shape:?} has no such dimension as `{rule}`{} names: \
         from 0, the outermost, up, or from -1, the innermost, down{}",
        of_preset(.preset.as_deref()),
        own_rule(.preset.as_deref(), .tensor)
    )]
    SliceDimension {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The rule.
        rule: String,
        /// The preset that the rule is from, if it is from one.
        preset: Option<String>,
    },

    /// A tensor has no such part as a slice rule says.
    #[error(
        "tensor {tensor:?} of shape {shape:?} cannot be sliced by `{rule}`{}: {source}{}{}",
        of_preset(.preset.as_deref()),
        remainder_rule(.source),
        own_rule(.preset.as_deref(), .tensor)
    )]
    SliceDoesNotFit {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The rule.
        rule: String,
        /// The preset that the rule is from, if it is from one.
        preset: Option<String>,
        /// Why it has none.
        source: Box<tensora_formats::Error>,
    },

    /// There is no preset of this name, and no file.
    #[error(
        "no preset and no file is called {name:?}; the presets are: {}",
        crate::Preset::shipped().collect::<Vec<_>>().join(", ")
    )]
    UnknownPreset {
        /// The name asked for.
        name: String,
    },

    /// The file of a preset could not be read.
    #[error("reading the preset {} failed: {source}", .path.display())]
    PresetFile {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// The text of a preset is not understood.
    #[error(
        "the preset {preset:?} is not valid: {reason}; \
         the shipped preset tensor-parallel shows how one is written"
    )]
    BadPreset {
        /// The preset's name or path.
        preset: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the caller's own cancellation is the reason.
    pub fn is_cancelled(&self) -> bool {
        match self {
            Self::Io(error) | Self::Tensor { source: error, .. } => error.is_cancelled(),
            #[cfg(feature = "convert")]
            Self::Convert(error) => error.is_cancelled(),
            _ => false,
        }
    }
}

fn at_tensor(tensor: Option<&str>) -> String {
    tensor.map_or_else(String::new, |tensor| {
        format!("streaming tensor {tensor:?} failed: ")
    })
}

fn kind_of_pattern(pattern: &str) -> &'static str {
    if pattern.starts_with("re:") {
        "regular expression"
    } else {
        "glob"
    }
}

fn of_preset(preset: Option<&str>) -> String {
    preset.map_or_else(String::new, |preset| format!(" of the preset {preset:?}"))
}

/// How to treat one tensor other than a preset does.
fn own_rule(preset: Option<&str>, tensor: &str) -> String {
    preset.map_or_else(String::new, |_| {
        format!(
            "; a rule for this tensor alone, such as `{tensor}=whole`, comes before the preset's"
        )
    })
}

/// How a rule lets the last rank take the remainder.
fn remainder_rule(error: &tensora_formats::Error) -> &'static str {
    match error {
        tensora_formats::Error::UnevenRanks { .. } => " (`,remainder:last`)",
        _ => "",
    }
}

fn did_you_mean(names: &[String]) -> String {
    if names.is_empty() {
        String::new()
    } else {
        format!(" (did you mean {}?)", names.join(", "))
    }
}
