//! What the user can say about conversions and their verification.

use std::num::NonZero;
use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use tensora::convert::SharedTensors;
use tensora::{Format, Loader};

use super::{OpenArgs, StreamArgs, format_parser, parse_positive_size};

/// Convert a checkpoint into another format, or cut it into other files
///
/// SafeTensors and both ServerlessLLM dialects, each into each. Everything is planned and checked before the
/// first byte is written: directories, permissions, free space, dtypes, names. What the target cannot hold is
/// named. Memory does not grow with the checkpoint, and the source is only read.
///
/// The target is complete or no checkpoint, whenever the power fails: files are written to
/// TARGET/.tensora-convert, and put in their places when all of them are on the device. After an error,
/// Ctrl-C, or the signals TERM and HUP, files that were finished stay there: the same command with --resume
/// goes on from them, with --restart it begins anew.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora convert Qwen3-8B Qwen3-8B-sllm --to serverlessllm-store
  tensora convert Qwen3-8B Qwen3-8B-sllm --to serverlessllm-partitioned --partitions 8 --verify
  tensora convert Qwen3-8B-sllm Qwen3-8B-again --to safetensors --shard-bytes 2GB --companions
  tensora convert model.safetensors aligned --to safetensors --shards 1 --align 4KiB
  tensora convert Qwen3-8B Qwen3-8B-sllm --to serverlessllm-store --dry-run --json")]
pub(crate) struct ConvertArgs {
    /// The checkpoint to convert: a file or a directory
    pub(crate) source: PathBuf,

    /// The directory to write to; made if it does not exist
    pub(crate) target: PathBuf,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    #[command(flatten)]
    pub(crate) target_args: TargetArgs,

    #[command(flatten)]
    pub(crate) run: RunArgs,

    #[command(flatten)]
    pub(crate) policy: StreamArgs,
}

/// What is written.
#[derive(Debug, Args)]
#[command(next_help_heading = "Target")]
pub(crate) struct TargetArgs {
    /// The format to write
    ///
    /// safetensors: shards with an index. serverlessllm-store: what ServerlessLLM itself and vLLM read.
    /// serverlessllm-partitioned: partitions of equal size, for parallel range reads.
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    pub(crate) to: Format,

    /// Number of shards, for safetensors
    #[arg(long, value_name = "N", conflicts_with = "shard_bytes")]
    pub(crate) shards: Option<NonZero<u32>>,

    /// Largest shard, for safetensors, for example 2GB; a larger tensor gets one of its own [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_positive_size)]
    pub(crate) shard_bytes: Option<NonZero<u64>>,

    /// Begin the data of each shard at a multiple of SIZE, for safetensors, for example 4KiB [default: 8]
    ///
    /// A multiple of 8. From 4KiB on, data begins on a page, which suits direct reads; every reader of
    /// SafeTensors accepts it.
    #[arg(long, value_name = "SIZE", value_parser = parse_positive_size)]
    pub(crate) align: Option<NonZero<u64>>,

    /// Number of partitions, for serverlessllm-partitioned [default: one for each 10 GiB]
    #[arg(long, value_name = "N", conflicts_with = "partition_bytes")]
    pub(crate) partitions: Option<NonZero<u32>>,

    /// Largest partition, for either ServerlessLLM dialect, for example 1GiB [default: 10GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_positive_size)]
    pub(crate) partition_bytes: Option<NonZero<u64>>,

    /// What to do with tensors that share their bytes, for safetensors, which cannot express that
    ///
    /// refuse: name them and write nothing. duplicate: write the bytes once for each of them.
    #[arg(long, value_name = "HOW", default_value = "refuse", value_parser = tied_parser())]
    pub(crate) tied: SharedTensors,

    /// Add to the `__metadata__` of each shard, for safetensors; may be repeated
    ///
    /// What the source has there is kept, unless it has the same key.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_metadata)]
    pub(crate) metadata: Vec<(String, String)>,

    /// Also copy the small files beside the checkpoint: config.json, tokenizer and so on
    #[arg(long)]
    pub(crate) companions: bool,

    /// Also write tensora.blake3: a digest for each tensor, which `tensora verify` checks
    #[arg(long)]
    pub(crate) checksums: bool,
}

/// How it is written.
#[derive(Debug, Args)]
#[command(next_help_heading = "Conversion")]
pub(crate) struct RunArgs {
    /// Plan and check everything, show the files that would be written and those that would be replaced, and write
    /// nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Read back what was written, and put it in place only if its content is that of the source
    #[arg(long)]
    pub(crate) verify: bool,

    /// Replace the checkpoint that is in the target directory
    ///
    /// It stays until the new one is complete, so there must be room for both.
    #[arg(long)]
    pub(crate) force: bool,

    /// Go on where the same conversion was interrupted; finished files are kept if their digests agree
    #[arg(long)]
    pub(crate) resume: bool,

    /// Throw away what an interrupted conversion has left in the target directory, and begin anew
    #[arg(long, conflicts_with = "resume")]
    pub(crate) restart: bool,
}

/// Check that a checkpoint is whole, or that two hold the same tensors
///
/// With one PATH, every byte is read. What `tensora convert --checksums` wrote beside it (tensora.blake3) and the
/// names of files in a Hugging Face cache, which are SHA-256 digests, are compared with it, where there
/// are any. Tensors that a ServerlessLLM partition has lost are named one by one.
///
/// With two, names, dtypes, shapes and elements are compared, whatever the formats and the sharding, and the
/// first differences are named.
///
/// The exit status is 0 only if everything agrees. If something does not, the report is printed all the same, and the exit
/// status is 1. Memory does not grow with the checkpoints.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora verify Qwen3-8B
  tensora verify Qwen3-8B Qwen3-8B-sllm
  tensora verify Qwen3-8B Qwen3-8B-sllm --json | jq '.differences[0]'")]
pub(crate) struct VerifyArgs {
    /// The checkpoint: a file or a directory
    pub(crate) path: PathBuf,

    /// Another one, that should hold the same tensors
    pub(crate) other: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    #[command(flatten)]
    pub(crate) policy: StreamArgs,

    /// List everything that was checked or differs, not only the first 40 [JSON always has all]
    #[arg(long, help_heading = "Output")]
    pub(crate) all: bool,
}

impl OpenArgs {
    /// Opens what is asked for, and reads it as the planner says, but for these wishes.
    pub(crate) fn loader(&self, policy: &StreamArgs) -> Loader {
        policy.apply(Loader::new().open_options(self.options()))
    }
}

const TIED: [(&str, SharedTensors); 2] = [
    ("refuse", SharedTensors::Refuse),
    ("duplicate", SharedTensors::Duplicate),
];

fn tied_parser() -> impl TypedValueParser<Value = SharedTensors> {
    PossibleValuesParser::new(TIED.map(|(name, _)| name)).try_map(|name| {
        let choice = TIED.into_iter().find(|(known, _)| *known == name);
        choice.map(|(_, choice)| choice).ok_or("no such choice")
    })
}

fn parse_metadata(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE, for example author=me".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_a_key_and_a_value() {
        let pair = |key: &str, value: &str| Ok((key.to_owned(), value.to_owned()));
        assert_eq!(parse_metadata("a=b"), pair("a", "b"));
        assert_eq!(parse_metadata("a="), pair("a", ""));
        assert_eq!(parse_metadata("a=b=c"), pair("a", "b=c"));
        for text in ["", "a", "=b"] {
            assert!(parse_metadata(text).is_err(), "{text}");
        }
    }
}
