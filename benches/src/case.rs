//! What is timed.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tensora::Format;
use tensora::io::CacheState;

use crate::peers::Peers;

/// On which side of the comparisons a case stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaseKind {
    /// The device into small buffers used again: what it delivers when memory costs nothing.
    Ceiling,
    /// Processors copying as many bytes into fresh huge pages.
    Memcpy,
    /// Mapping and populating whole files, and nothing else.
    RawMapping,
    /// The planner's choice, owned memory.
    Automatic,
    /// The planner's choice, which may map.
    AutomaticMapping,
    /// A backend that was named, owned memory.
    Explicit,
    /// A backend that was named, mapped memory.
    ExplicitMapped,
    /// Somebody else's reader, which copies.
    OwnedPeer,
    /// Somebody else's reader, which maps.
    MappedPeer,
    /// Tensors through a bounded set of buffers, each byte read once by the consumer.
    Stream,
    /// Somebody else's stream.
    StreamPeer,
    /// The content digest of a stream.
    Digest,
    /// Processors hashing as many bytes of memory.
    Hash,
    /// A rank's part of every tensor: a range of rows.
    RowSlice,
    /// A rank's part of every tensor: a range of columns.
    ColumnSlice,
    /// Several processes that load their parts together.
    Ranks,
}

/// One way of reading a checkpoint.
#[derive(Clone, Debug)]
pub struct Case {
    /// How it is called on the command line and in tables.
    pub name: &'static str,
    /// On which side it stands.
    pub kind: CaseKind,
    program: Program,
}

#[derive(Clone, Copy, Debug)]
enum Program {
    /// The loader, with this memory and backend.
    Load(&'static str, &'static str),
    /// A mode of `timed` that takes files.
    Timed(&'static str),
    /// A mode of `raw_read`.
    RawRead(&'static str),
    Memcpy,
    /// A mode of `timed` that takes a limit on memory and a checkpoint.
    Bounded(&'static str),
    Hash,
    /// A load of the part that a rule says.
    Slice(&'static str),
    Ranks,
    /// A Python package.
    Python(&'static str),
    /// The same, streaming.
    PythonStream(&'static str),
}

/// Memory of a stream: what the command has by default.
const STREAM_LIMIT_BYTES: u64 = 256 << 20;
/// One of eight ranks, neither the first nor the last.
const ROWS: &str = "*=dim:0,rank:3/8";
/// The same of the columns of every matrix; vectors are whole.
const COLUMNS: &str = "{*_proj,*embed_tokens,lm_head}.weight=dim:1,rank:3/8";
const RANKS: u32 = 4;

/// The planner's choice, owned memory.
pub(crate) const AUTO: &str = "auto";
/// The same once more: how far its median is from the other's is the noise of the cell.
pub(crate) const AUTO_AGAIN: &str = "auto-again";
/// The planner's choice, which may map.
pub(crate) const AUTO_MAPPING: &str = "auto-mapping";
pub(crate) const RAW_MAP: &str = "raw-map";
pub(crate) const MEMCPY: &str = "memcpy";
pub(crate) const FS_READ: &str = "fs-read";
pub(crate) const MEMMAP2: &str = "memmap2";
pub(crate) const PY_SAFETENSORS: &str = "py-safetensors";
pub(crate) const PY_FASTSAFETENSORS: &str = "py-fastsafetensors";
pub(crate) const STREAM: &str = "stream";
pub(crate) const DIGEST: &str = "digest";
pub(crate) const HASH: &str = "hash";
pub(crate) const ROW_SLICE: &str = "row-slice";
pub(crate) const COLUMN_SLICE: &str = "column-slice";
pub(crate) const RANKS_TOGETHER: &str = "ranks";

const CASES: &[Case] = {
    use CaseKind as Kind;
    use Program as By;
    const fn case(name: &'static str, kind: CaseKind, program: Program) -> Case {
        Case {
            name,
            kind,
            program,
        }
    }
    &[
        case(
            "ceiling-threads",
            Kind::Ceiling,
            By::RawRead("ceiling-threads"),
        ),
        case("ceiling-rings", Kind::Ceiling, By::RawRead("ceiling-rings")),
        case(MEMCPY, Kind::Memcpy, By::Memcpy),
        case(RAW_MAP, Kind::RawMapping, By::Timed("raw-map")),
        case(AUTO, Kind::Automatic, By::Load("owned", "auto")),
        case("sync", Kind::Explicit, By::Load("owned", "sync")),
        case("async", Kind::Explicit, By::Load("owned", "async")),
        case("io-uring", Kind::Explicit, By::Load("owned", "io-uring")),
        case("mmap", Kind::Explicit, By::Load("owned", "mmap")),
        case(AUTO_AGAIN, Kind::Automatic, By::Load("owned", "auto")),
        case(
            AUTO_MAPPING,
            Kind::AutomaticMapping,
            By::Load("auto", "auto"),
        ),
        case(
            "mmap-mapped",
            Kind::ExplicitMapped,
            By::Load("mapped", "mmap"),
        ),
        case(FS_READ, Kind::OwnedPeer, By::Timed("fs-read")),
        case(MEMMAP2, Kind::MappedPeer, By::Timed("memmap2")),
        case(PY_SAFETENSORS, Kind::MappedPeer, By::Python("safetensors")),
        case(
            "py-runai",
            Kind::OwnedPeer,
            By::Python("runai-model-streamer"),
        ),
        case(
            PY_FASTSAFETENSORS,
            Kind::OwnedPeer,
            By::Python("fastsafetensors"),
        ),
        case(STREAM, Kind::Stream, By::Bounded("stream")),
        case(
            "py-runai-stream",
            Kind::StreamPeer,
            By::PythonStream("runai-model-streamer"),
        ),
        case(DIGEST, Kind::Digest, By::Bounded("digest")),
        case(HASH, Kind::Hash, By::Hash),
        case(ROW_SLICE, Kind::RowSlice, By::Slice(ROWS)),
        case(COLUMN_SLICE, Kind::ColumnSlice, By::Slice(COLUMNS)),
        case(RANKS_TOGETHER, Kind::Ranks, By::Ranks),
    ]
};

/// What the process printed about itself.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Printed {
    pub(crate) elapsed_seconds: f64,
    pub(crate) touched_seconds: Option<f64>,
    pub(crate) data_bytes: u64,
    pub(crate) peak_resident_bytes: Option<u64>,
    pub(crate) xor: Option<u8>,
    pub(crate) choice: Option<String>,
    /// What was needed of the files, in bytes, where less than all of them.
    #[serde(default)]
    pub(crate) needed_bytes: Option<u64>,
    /// What was read of them for that.
    #[serde(default)]
    pub(crate) read_bytes: Option<u64>,
    /// What came from the device, in bytes.
    #[serde(default)]
    pub(crate) device_bytes: Option<u64>,
}

/// What a case is run on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) checkpoint: &'a Path,
    pub(crate) files: &'a [&'a Path],
    pub(crate) data_bytes: u64,
    /// How much memory the process touches and gives back before its clock starts.
    pub(crate) primed_bytes: u64,
}

impl CaseKind {
    /// Whether it loads tensors, as opposed to whole files or nothing.
    pub(crate) fn loads_tensors(self) -> bool {
        !matches!(
            self,
            Self::Ceiling | Self::Memcpy | Self::RawMapping | Self::Hash
        ) && !self.loads_parts()
    }

    /// Whether it loads parts of tensors, each process its own.
    pub(crate) fn loads_parts(self) -> bool {
        matches!(self, Self::RowSlice | Self::ColumnSlice | Self::Ranks)
    }

    /// Whether its memory is bounded, whatever the checkpoint.
    pub(crate) fn is_bounded(self) -> bool {
        matches!(self, Self::Stream | Self::StreamPeer | Self::Digest)
    }

    /// Whether it is about streams, slices and ranks, as opposed to loads of everything.
    pub fn is_of_parts(self) -> bool {
        self.loads_parts()
            || matches!(
                self,
                Self::Stream | Self::StreamPeer | Self::Digest | Self::Hash
            )
    }

    /// Whether it is Tensora's, into owned memory.
    pub(crate) fn is_ours_and_owned(self) -> bool {
        matches!(self, Self::Automatic | Self::Explicit)
    }

    /// Whether its destination is memory of its own, as large as the data.
    pub(crate) fn fills_memory(self) -> bool {
        matches!(
            self,
            Self::Memcpy
                | Self::Automatic
                | Self::AutomaticMapping
                | Self::Explicit
                | Self::OwnedPeer
                | Self::Ranks
        )
    }
}

impl Case {
    /// Every case, in the order of tables; those of Python packages too.
    pub const fn all() -> &'static [Self] {
        CASES
    }

    /// The Python package that it needs.
    pub fn package(&self) -> Option<&'static str> {
        match self.program {
            Program::Python(package) | Program::PythonStream(package) => Some(package),
            _ => None,
        }
    }

    /// Whether it says anything about a checkpoint of this format in this state.
    pub(crate) fn applies_to(&self, format: Format, state: CacheState) -> bool {
        match self.kind {
            CaseKind::Ceiling => state == CacheState::Cold,
            CaseKind::Memcpy | CaseKind::RawMapping => state == CacheState::Warm,
            CaseKind::OwnedPeer | CaseKind::MappedPeer => format == Format::Safetensors,
            CaseKind::StreamPeer => format == Format::Safetensors && state == CacheState::Cold,
            kind if kind.is_of_parts() => state == CacheState::Cold,
            _ => true,
        }
    }

    /// Runs it once, as a process of its own; `programs` is the folder of the examples.
    pub(crate) fn run(
        &self,
        programs: &Path,
        peers: Option<&Peers>,
        target: Target<'_>,
    ) -> Result<Printed> {
        let mut command = Command::new(programs.join("timed"));
        match self.program {
            Program::Load(memory, backend) => {
                command
                    .args(["load", memory, backend])
                    .arg(target.checkpoint);
            }
            Program::Timed(mode) => {
                command.arg(mode).args(target.files);
            }
            Program::RawRead(mode) => {
                command = Command::new(programs.join("raw_read"));
                command.arg(mode).args(target.files);
            }
            Program::Memcpy => {
                command.args(["memcpy", &target.data_bytes.to_string()]);
            }
            Program::Bounded(mode) => {
                command
                    .args([mode, &STREAM_LIMIT_BYTES.to_string()])
                    .arg(target.checkpoint);
            }
            Program::Hash => {
                command.args(["hash", &target.data_bytes.to_string()]);
            }
            Program::Slice(rule) => {
                command.args(["slice", rule]).arg(target.checkpoint);
            }
            Program::Ranks => {
                command
                    .args(["ranks", &RANKS.to_string()])
                    .arg(target.checkpoint);
            }
            Program::Python(package) | Program::PythonStream(package) => {
                command = peers
                    .context("the Python packages were not asked for")?
                    .command(package);
                if matches!(self.program, Program::PythonStream(_)) {
                    command.env("STREAM", "1");
                }
                command.args(target.files);
            }
        }
        command.env("PRIME_BYTES", target.primed_bytes.to_string());
        let output = command
            .output()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        if !output.status.success() {
            bail!(
                "{}: {}",
                output.status,
                last_line(&String::from_utf8_lossy(&output.stderr))
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        // Packages may print what they like before.
        serde_json::from_str(last_line(&text))
            .with_context(|| format!("what {} printed: {:?}", self.name, last_line(&text)))
    }
}

pub(crate) fn last_line(text: &str) -> &str {
    text.trim().lines().next_back().unwrap_or_default()
}
