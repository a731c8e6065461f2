//! What the user can say.

mod conversion;

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand};
use tensora::formats::{OpenOptions, UnlistedTensors};
use tensora::io::{CacheState, TransferParams};
use tensora::{
    BackendChoice, BackendKind, CacheChoice, DirectChoice, Format, Loader, MemoryChoice, Preset,
    ProfileChoice, Share, SliceRule,
};

pub(crate) use self::conversion::{ConvertArgs, VerifyArgs};
use crate::units::parse_size;

macro_rules! exit_statuses {
    () => {
        "0 on success, 1 on failure, 2 for a wrong command line, 128 and the number of the
signal when interrupted (130 for Ctrl-C)."
    };
}

/// Inspect, plan, load, convert and verify large-language-model checkpoints.
///
/// PATH is a .safetensors file, a directory of them with or without an index file, a model in a
/// Hugging Face cache, or a ServerlessLLM directory.
#[derive(Debug, Parser)]
#[command(
    name = "tensora",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = concat!("Exit status: ", exit_statuses!()),
    after_long_help = AFTER_LONG_HELP
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Print exactly one JSON object on standard output, and nothing else there
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,

    /// Trace what happens to standard error, and explain in full; -vv traces more
    ///
    /// The environment variable TENSORA_LOG chooses in detail what is traced, for example
    /// TENSORA_LOG=tensora=debug,tensora_io=trace.
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Output")]
    pub(crate) verbose: u8,
}

const AFTER_LONG_HELP: &str = concat!(
    "\
Examples:
  tensora inspect Qwen3-8B                what is in a checkpoint
  tensora plan Qwen3-8B                   how it would be loaded here, and why
  tensora load Qwen3-8B --digest          load it, and name its content
  tensora digest Qwen3-8B                 name its content, in bounded memory
  tensora convert Qwen3-8B out --to serverlessllm-store
  tensora verify Qwen3-8B out             whether both hold the same tensors
  tensora doctor Qwen3-8B                 what stands in the way of loading it fast
  tensora calibrate Qwen3-8B              measure what is fastest here, for all loads to come
  tensora bench Qwen3-8B                  compare the automatic choice with every backend

Sizes are bytes, or numbers with a unit: 1MiB, 1.5GB. KiB, MiB, GiB and TiB, or bare K, M, G and T,
count by 1024; KB, MB, GB and TB by 1000.

Exit status: ",
    exit_statuses!()
);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the files and tensors of a checkpoint; reads metadata only
    Inspect(InspectArgs),
    /// Explain how a checkpoint would be loaded on this machine, and why
    Plan(PlanArgs),
    Load(LoadArgs),
    Digest(DigestArgs),
    Convert(ConvertArgs),
    Verify(VerifyArgs),
    Doctor(DoctorArgs),
    Calibrate(CalibrateArgs),
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora inspect model.safetensors
  tensora inspect Qwen3-8B --select 'model.layers.0.*' --all
  tensora inspect Qwen3-8B --json | jq -r '.tensors[].name'")]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,

    /// List all files and tensors, not only the first 40 of each [JSON always has all]
    #[arg(long, help_heading = "Output")]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora plan Qwen3-8B
  tensora plan Qwen3-8B --backend io-uring --memory owned
  tensora plan Qwen3-8B --json | jq '.decisions[] | {field, chosen}'")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,

    #[command(flatten)]
    pub(crate) parts: PartArgs,

    #[command(flatten)]
    pub(crate) policy: PolicyArgs,
}

/// Load a checkpoint into memory, and report how fast that was
///
/// Whatever is left out is decided by the planner, from what the checkpoint looks like and what the
/// machine can do. What is named is obeyed, or fails with the reason; it is never replaced.
///
/// Unless `--memory owned` is given, tensors may be views of the mapped files. The command then takes
/// it on itself that nobody truncates or rewrites the files while it runs. If somebody rewrites one all
/// the same, it reports wrong content; if somebody truncates one while it is hashed, it says so and exits
/// with 135 (128 and the number of SIGBUS). Replacing a file by renaming another one over it is harmless.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora load Qwen3-8B
  tensora load Qwen3-8B --digest
  tensora load Qwen3-8B --backend io-uring --memory owned --direct required --chunk-bytes 1MiB
  tensora load Qwen3-8B --select 'model.layers.0.*' --select lm_head.weight --json
  tensora load Qwen3-8B --slice '*.mlp.up_proj.weight=dim:0,rank:1/4'
  tensora load Qwen3-8B --preset tensor-parallel --rank 1 --world 4

Four processes that read together, each byte once:
  for r in 0 1 2 3; do
    tensora load Qwen3-8B --preset tensor-parallel --rank $r --world 4 --shared qwen &
  done; wait")]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,

    #[command(flatten)]
    pub(crate) parts: PartArgs,

    #[command(flatten)]
    pub(crate) shared: SharedArgs,

    #[command(flatten)]
    pub(crate) policy: PolicyArgs,

    /// Compute the content digest of the loaded tensors
    ///
    /// One value for the same tensors, whatever the format, the sharding and the backend: names,
    /// dtypes, shapes and data go into it. It is computed after the load and not part of its time.
    #[arg(long)]
    pub(crate) digest: bool,

    /// Print the whole plan with all its reasons, as `tensora plan` does
    #[arg(long, help_heading = "Output")]
    pub(crate) explain: bool,
}

/// Name a checkpoint's content, in bounded memory
///
/// The digest is one value for the same tensors, whatever the format, the sharding and the backend: names,
/// dtypes, shapes and data go into it. The tensors are streamed through buffers that are used again and
/// again, and hashed by all processors; memory does not grow with the checkpoint.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora digest Qwen3-8B
  tensora digest Qwen3-8B --memory-limit 64MiB
  tensora digest Qwen3-8B --json | jq -r .digest")]
pub(crate) struct DigestArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,

    #[command(flatten)]
    pub(crate) parts: PartArgs,

    #[command(flatten)]
    pub(crate) policy: StreamArgs,

    /// Print the whole plan with all its reasons
    #[arg(long, help_heading = "Output")]
    pub(crate) explain: bool,
}

/// Examine this machine, and the storage of a checkpoint
///
/// Problems are findings, not failures: the exit status is 0. If PATH cannot be read as a checkpoint,
/// the machine is described all the same, what is wrong is a finding, and the exit status is 1.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora doctor
  tensora doctor Qwen3-8B
  tensora doctor --json | jq '.backends[] | select(.status == \"unavailable\")'")]
pub(crate) struct DoctorArgs {
    /// A checkpoint whose storage is examined too
    pub(crate) path: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Measure which ways of reading are fastest here, and keep that for all loads to come
///
/// Backends, chunks, queue depths and workers are tried on a part of the checkpoint's own files, cold
/// and warm, as any user who owns them may. The best are kept as the profile of this device and file
/// system, below $XDG_CACHE_HOME/tensora/profiles or ~/.cache/tensora/profiles. The planner prefers
/// it to its constants until the kernel or the machine changes; `--no-profile` ignores it.
///
/// Nothing is written but the profile. Files of the sample are dropped from the page cache again and
/// again, and mapped; nobody should truncate or rewrite them meanwhile (see `tensora load --help`).
/// Calibrate while the machine is idle.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora calibrate Qwen3-8B
  tensora calibrate Qwen3-8B --budget 300
  tensora calibrate Qwen3-8B --dry-run --json | jq '.plans'")]
pub(crate) struct CalibrateArgs {
    /// A checkpoint that is stored where the profile is to be about: a file or a directory
    pub(crate) path: PathBuf,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// About how long it may take, in seconds, 1 to 3600; more is more exact
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = clap::value_parser!(u32).range(1..=3600), help_heading = "Strategy")]
    pub(crate) budget: u32,

    /// Measure and show, and keep no profile
    #[arg(long, help_heading = "Strategy")]
    pub(crate) dry_run: bool,
}

/// Compare the automatic choice with every backend, on a checkpoint of yours
///
/// Each load runs in a process of its own, in interleaved rounds, from a page cache that holds nothing
/// of the files (cold), their first half (half) or all of them (warm), which is verified. Memory that a load
/// will need is touched beforehand. Compared are the medians over the rounds of ratios of times.
///
/// The checkpoint is read many times and nothing is written but the plot. What the page cache held of
/// it is dropped. Run it while the machine is idle.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensora bench Qwen3-8B
  tensora bench Qwen3-8B --states cold --rounds 9 --plot cold.svg
  tensora bench Qwen3-8B --plot Qwen3-8B.html --json > Qwen3-8B.json")]
pub(crate) struct BenchArgs {
    /// The checkpoint: a file or a directory
    pub(crate) path: PathBuf,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// How often each load is timed, 1 to 100
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(1..=100), help_heading = "Strategy")]
    pub(crate) rounds: u32,

    /// States of the page cache, separated by commas
    #[arg(long, value_name = "STATES", default_value = "cold,half,warm", value_delimiter = ',', value_parser = state_parser(), help_heading = "Strategy")]
    pub(crate) states: Vec<CacheState>,

    /// Begin no round that would end later than this, in seconds; the first round is always complete
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = clap::value_parser!(u32).range(1..=86_400), help_heading = "Strategy")]
    pub(crate) budget: u32,

    /// Draw the speeds into this file, .svg or .html (with the table)
    #[arg(long, value_name = "FILE", value_parser = parse_plot, help_heading = "Output")]
    pub(crate) plot: Option<PathBuf>,
}

/// Which tensors of which checkpoint.
#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// The checkpoint: a file or a directory
    pub(crate) path: PathBuf,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// Only tensors whose names match GLOB; may be repeated [default: all]
    ///
    /// `*` and `?` match any characters, dots and slashes too; `[0-9]` one of a set; `{a,b}` either
    /// of two. After `re:` stands a regular expression instead, which has to match all of a name. Quote it, or
    /// the shell expands it. A pattern that matches nothing is an error.
    /// Examples: --select 'model.layers.{0,1}.*', --select 're:model\.layers\.[0-9]\..*'
    #[arg(long, value_name = "GLOB", help_heading = "Checkpoint")]
    pub(crate) select: Vec<String>,
}

impl SourceArgs {
    /// Opens what is asked for, and has no wishes about how.
    pub(crate) fn loader(&self) -> Loader {
        Loader::new()
            .open_options(self.open.options())
            .select(&self.select)
    }
}

/// Which part of each tensor.
#[derive(Debug, Args)]
#[command(next_help_heading = "Parts")]
pub(crate) struct PartArgs {
    /// Only a part of each tensor that RULE is about; may be repeated
    ///
    /// RULE is PATTERN=dim:D,rank:R/W for the part of rank R of W along dimension D (0 is the outermost, -1 the innermost), or
    /// PATTERN=dim:D,range:A..B for a range; PATTERN=dim:D takes R and W from --rank and --world. PATTERN is as for
    /// --select. A dimension that does not divide evenly is an error, unless the rule ends with
    /// ,remainder:last: then the last rank takes what is left over. ,multiple:N keeps N neighbours together, such as the
    /// rows of an attention head. PATTERN=whole is for what a preset shall leave alone. Only what is needed
    /// is read.
    #[arg(long, value_name = "RULE")]
    pub(crate) slice: Vec<SliceRule>,

    /// Slice tensors by the rules of a preset: tensor-parallel, or a file of rules
    ///
    /// Rules given with --slice come before those of the preset. It needs --rank and --world.
    #[arg(long, value_name = "NAME|FILE", requires = "world")]
    pub(crate) preset: Option<String>,

    /// How many ranks there are; --rank then says which of them this is
    #[arg(long, value_name = "W", requires = "rank", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) world: Option<u32>,
}

impl PartArgs {
    /// Opens these parts of what is asked for, and has no wishes about how.
    pub(crate) fn loader(&self, source: &SourceArgs) -> anyhow::Result<Loader> {
        let mut loader = source.loader();
        if let (Some(rank), Some(world)) = (source.open.rank, self.world) {
            // With a world, a rank is no directory.
            let options = source.open.options_of(None);
            loader = loader.rank(rank, world).open_options(options);
        }
        for rule in &self.slice {
            loader = loader.slice(rule.clone());
        }
        if let Some(preset) = &self.preset {
            loader = loader.preset(Preset::find(preset)?);
        }
        Ok(loader)
    }
}

/// With whom a checkpoint is read.
#[derive(Debug, Args)]
#[command(next_help_heading = "Parts")]
pub(crate) struct SharedArgs {
    /// Read together with the ranks that give the same NAME, so that no byte is read twice
    ///
    /// Start one process for each rank, with the same checkpoint and the same rules. No server is needed, and nothing is left
    /// behind. A rank that ends or never comes does not hold up the others.
    #[arg(long, value_name = "NAME", requires = "world")]
    pub(crate) shared: Option<String>,

    /// How long to wait for the other ranks, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "30", requires = "shared", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) shared_timeout: u32,
}

impl SharedArgs {
    /// `loader`, reading with others if that was asked for.
    pub(crate) fn apply(&self, loader: Loader) -> Loader {
        let Some(name) = &self.shared else {
            return loader;
        };
        let timeout = Duration::from_secs(self.shared_timeout.into());
        loader.share(Share::new(name).join_timeout(timeout))
    }
}

/// How a path is understood.
#[derive(Debug, Args)]
#[command(next_help_heading = "Checkpoint")]
pub(crate) struct OpenArgs {
    /// Accept this format only, and choose it where a directory holds two [default: any]
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    pub(crate) format: Option<Format>,

    /// Open one rank of a directory of rank_0, rank_1, … [default: all]
    ///
    /// With --world, where there is such an option, which of the ranks this process is.
    #[arg(long, value_name = "N")]
    pub(crate) rank: Option<u32>,

    /// Leave out tensors that shards hold and their index does not list, instead of failing
    #[arg(long)]
    pub(crate) ignore_unlisted: bool,
}

impl OpenArgs {
    /// The same, for another process.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if let Some(format) = self.format {
            arguments.push(format!("--format={format}"));
        }
        if let Some(rank) = self.rank {
            arguments.push(format!("--rank={rank}"));
        }
        if self.ignore_unlisted {
            arguments.push("--ignore-unlisted".to_owned());
        }
        arguments
    }

    pub(crate) fn options(&self) -> OpenOptions {
        self.options_of(self.rank)
    }

    /// The same, but for the rank.
    fn options_of(&self, rank: Option<u32>) -> OpenOptions {
        let mut options = OpenOptions::new();
        if let Some(format) = self.format {
            options = options.format(format);
        }
        if let Some(rank) = rank {
            options = options.rank(rank);
        }
        if self.ignore_unlisted {
            options = options.unlisted_tensors(UnlistedTensors::Ignore);
        }
        options
    }
}

/// What the planner shall not decide.
#[derive(Debug, Args)]
#[command(next_help_heading = "Strategy")]
pub(crate) struct PolicyArgs {
    /// How bytes move from files into memory
    ///
    /// sync: threads with positioned reads; async: Tokio tasks, grouped per file; io-uring: rings
    /// with batched submission; mmap: mappings of the files.
    #[arg(long, value_name = "BACKEND", default_value = "auto", value_parser = backend_parser())]
    pub(crate) backend: BackendChoice,

    /// Which memory holds the tensors
    ///
    /// owned: memory of their own. mapped: the page cache itself, without a copy; the files must not
    /// be truncated or rewritten meanwhile (see `tensora load --help`). auto: mapped where that
    /// pays.
    #[arg(long, value_name = "MEMORY", default_value = "auto", value_parser = memory_parser())]
    pub(crate) memory: MemoryChoice,

    /// Whether reads bypass the page cache (direct I/O)
    ///
    /// preferred: where the files support it, buffered elsewhere. required: or fail.
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = direct_parser())]
    pub(crate) direct: DirectChoice,

    /// What the load leaves in the page cache
    ///
    /// keep: the files, for the next load; a cold load then takes longer, since reads go through the
    /// cache. bypass: nothing; reads are direct, or the load fails. auto: whatever is fastest for this
    /// load. What is in the page cache already is used in any case.
    #[arg(long, value_name = "CACHE", default_value = "auto", value_parser = cache_parser())]
    pub(crate) cache: CacheChoice,

    /// Largest single read, 4KiB to 1GiB, for example 1MiB [default: planned]
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk_size)]
    pub(crate) chunk_bytes: Option<u64>,

    /// Reads in flight per ring, 1 to 1024; io-uring only [default: planned]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(TransferParams::MAX_QUEUE_DEPTH)))]
    pub(crate) queue_depth: Option<u32>,

    /// Threads, concurrent reads or rings, 1 to 256 [default: planned]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(TransferParams::MAX_WORKERS)))]
    pub(crate) workers: Option<u32>,

    /// Refuse to own more memory than this, for example 8GiB [default: what the machine leaves]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory_limit: Option<u64>,

    /// Plan without what `tensora calibrate` has measured
    #[arg(long)]
    pub(crate) no_profile: bool,
}

impl PolicyArgs {
    /// `loader` with these wishes, mappings included.
    pub(crate) fn apply(&self, mut loader: Loader) -> Loader {
        loader = loader
            .backend_choice(self.backend)
            .memory(self.memory)
            .direct_choice(self.direct)
            .cache(self.cache);
        if let Some(chunk_bytes) = self.chunk_bytes {
            loader = loader.chunk_bytes(chunk_bytes);
        }
        if let Some(queue_depth) = self.queue_depth {
            loader = loader.queue_depth(queue_depth);
        }
        if let Some(workers) = self.workers {
            loader = loader.workers(workers);
        }
        if let Some(limit_bytes) = self.memory_limit {
            loader = loader.memory_limit_bytes(limit_bytes);
        }
        if self.no_profile {
            loader = loader.profiles(ProfileChoice::Ignore);
        }
        crate::mapping::allow_mapping(loader, self.memory)
    }
}

/// What the planner of a stream shall not decide.
#[derive(Debug, Args)]
#[command(next_help_heading = "Strategy")]
pub(crate) struct StreamArgs {
    /// How bytes move from files into buffers: auto, sync, async, io-uring or mmap
    #[arg(long, value_name = "BACKEND", default_value = "auto", value_parser = backend_parser())]
    pub(crate) backend: BackendChoice,

    /// Whether reads bypass the page cache (direct I/O): auto, never, preferred or required
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = direct_parser())]
    pub(crate) direct: DirectChoice,

    /// Most memory that buffers and index take, for example 64MiB [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory_limit: Option<u64>,

    /// Plan without what `tensora calibrate` has measured
    #[arg(long)]
    pub(crate) no_profile: bool,
}

impl StreamArgs {
    /// `loader` with these wishes.
    pub(crate) fn apply(&self, mut loader: Loader) -> Loader {
        loader = loader
            .backend_choice(self.backend)
            .direct_choice(self.direct);
        if let Some(limit_bytes) = self.memory_limit {
            loader = loader.memory_limit_bytes(limit_bytes);
        }
        if self.no_profile {
            loader = loader.profiles(ProfileChoice::Ignore);
        }
        loader
    }
}

// The names come from the libraries; naming them to clap gives help, completion and suggestions.

fn format_parser() -> impl TypedValueParser<Value = Format> {
    PossibleValuesParser::new(Format::ALL.iter().map(|format| format.as_str()))
        .try_map(|name| name.parse::<Format>())
}

fn backend_parser() -> impl TypedValueParser<Value = BackendChoice> {
    let names = BackendKind::ALL.map(BackendKind::as_str);
    PossibleValuesParser::new(["auto"].into_iter().chain(names))
        .try_map(|name| name.parse::<BackendChoice>())
}

fn memory_parser() -> impl TypedValueParser<Value = MemoryChoice> {
    PossibleValuesParser::new(["auto", "owned", "mapped"])
        .try_map(|name| name.parse::<MemoryChoice>())
}

fn direct_parser() -> impl TypedValueParser<Value = DirectChoice> {
    PossibleValuesParser::new(["auto", "never", "preferred", "required"])
        .try_map(|name| name.parse::<DirectChoice>())
}

fn cache_parser() -> impl TypedValueParser<Value = CacheChoice> {
    PossibleValuesParser::new(CacheChoice::ALL.map(CacheChoice::as_str))
        .try_map(|name| name.parse::<CacheChoice>())
}

fn state_parser() -> impl TypedValueParser<Value = CacheState> {
    const STATES: [CacheState; 3] = [CacheState::Cold, CacheState::Half, CacheState::Warm];
    PossibleValuesParser::new(STATES.map(CacheState::as_str)).try_map(|name| {
        let state = STATES.into_iter().find(|state| state.as_str() == name);
        state.ok_or("not a state of the page cache")
    })
}

fn parse_plot(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let extension = path.extension().and_then(|extension| extension.to_str());
    if extension.is_some_and(|name| {
        ["svg", "html"]
            .iter()
            .any(|known| name.eq_ignore_ascii_case(known))
    }) {
        Ok(path)
    } else {
        Err("the name has to end with .svg or .html".to_owned())
    }
}

fn parse_positive_size(text: &str) -> Result<NonZero<u64>, String> {
    NonZero::new(parse_size(text)?).ok_or_else(|| "it must be more than 0".to_owned())
}

fn parse_chunk_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    let limits = TransferParams::MIN_CHUNK_BYTES..=TransferParams::MAX_CHUNK_BYTES;
    if limits.contains(&bytes) {
        Ok(bytes)
    } else {
        Err("a read has at least 4KiB and at most 1GiB".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn chunks_stay_within_the_limits_that_the_help_names() {
        assert_eq!(
            parse_chunk_size("4KiB"),
            Ok(TransferParams::MIN_CHUNK_BYTES)
        );
        assert_eq!(
            parse_chunk_size("1GiB"),
            Ok(TransferParams::MAX_CHUNK_BYTES)
        );
        assert!(parse_chunk_size("4095").is_err());
        assert!(parse_chunk_size("1.1GiB").is_err());
    }
}
