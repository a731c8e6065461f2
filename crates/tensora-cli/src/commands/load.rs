use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use tensora::convert::Digest;
use tensora::io::{ReadStats, peak_resident_bytes};
use tensora::{BackendKind, Checkpoint, Format, LoadReport, MemoryKind, Plan};

use crate::args::LoadArgs;
use crate::output::{Console, Report, emit, printable};
use crate::progress::Progress;
use crate::table::Facts;
use crate::units::{count, duration, rate, size, size_exactly};

/// What a load did, and how fast.
#[derive(Serialize)]
struct LoadResult<'a> {
    format: Format,
    backend: BackendKind,
    memory: MemoryKind,
    tensor_count: usize,
    data_bytes: u64,
    /// From the path to usable tensors.
    elapsed_seconds: f64,
    open_seconds: f64,
    plan_seconds: f64,
    read_seconds: f64,
    bytes_per_second: f64,
    /// The most memory that this process has had, mapped files included; before any digest.
    peak_resident_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest_seconds: Option<f64>,
    stats: &'a ReadStats,
    plan: &'a Plan,
    #[serde(skip)]
    explain: bool,
}

pub(crate) fn load(arguments: &LoadArgs, console: &Console) -> Result<()> {
    let progress = Arc::new(Progress::new("loading", console.progress));
    let watched = Arc::clone(&progress);
    let checkpoint = arguments
        .policy
        .apply(arguments.source.loader())
        .on_progress(move |load| watched.update(load.done_bytes, load.total_bytes))
        .load(&arguments.source.path)?;
    progress.finish();
    let mut result = LoadResult::new(checkpoint.report());
    if arguments.digest {
        let begun = Instant::now();
        result.digest = Some(digest(&checkpoint, console)?.to_string());
        result.digest_seconds = Some(begun.elapsed().as_secs_f64());
    }
    result.explain = arguments.explain || console.explain;
    emit(&result, console)
}

/// The content digest of the loaded tensors.
fn digest(checkpoint: &Checkpoint, console: &Console) -> Result<Digest> {
    let total_bytes = checkpoint
        .iter()
        .map(|tensor| tensor.contiguous_bytes() as u64)
        .sum();
    let progress = Arc::new(Progress::new("hashing", console.progress));
    let control = progress.control(total_bytes);
    Ok(checkpoint.digest_with(&control)?)
}

impl<'a> LoadResult<'a> {
    fn new(report: &'a LoadReport) -> Self {
        Self {
            format: report.format,
            backend: report.plan.backend,
            memory: report.plan.memory,
            tensor_count: report.tensor_count,
            data_bytes: report.data_bytes,
            elapsed_seconds: report.elapsed.as_secs_f64(),
            open_seconds: report.open_elapsed.as_secs_f64(),
            plan_seconds: report.plan_elapsed.as_secs_f64(),
            read_seconds: report.read_elapsed.as_secs_f64(),
            bytes_per_second: report.bytes_per_second(),
            peak_resident_bytes: peak_resident_bytes(),
            digest: None,
            digest_seconds: None,
            stats: &report.stats,
            plan: &report.plan,
            explain: false,
        }
    }

    /// `io-uring into owned memory: 2 workers of depth 16, chunks of 1.00 MiB, direct`.
    fn strategy(&self) -> String {
        let params = &self.plan.params;
        let depth = match self.backend {
            BackendKind::IoUring => format!(" of depth {}", params.queue_depth),
            _ => String::new(),
        };
        let path = match self.memory {
            MemoryKind::Mapped => "",
            MemoryKind::Owned if self.stats.direct_bytes > 0 => ", direct",
            MemoryKind::Owned => ", buffered",
        };
        format!(
            "{} into {} memory: {}{depth}, chunks of {}{path}",
            self.backend,
            self.memory,
            count(params.workers.into(), "worker"),
            size(params.chunk_bytes)
        )
    }

    /// The decisions that a user asks about first.
    fn reasons(&self) -> impl Iterator<Item = String> {
        ["memory", "backend"].into_iter().filter_map(|field| {
            let decision = self.plan.decisions.iter().find(|d| d.field == field)?;
            Some(format!("{}: {}", decision.chosen, decision.reason))
        })
    }
}

impl Report for LoadResult<'_> {
    fn text(&self) -> String {
        let mut facts = Facts::new();
        facts
            .add("format", self.format.to_string())
            .add(
                "loaded",
                format!(
                    "{}, {}",
                    count(self.tensor_count as u64, "tensor"),
                    size_exactly(self.data_bytes)
                ),
            )
            .add("how", self.strategy())
            .add(
                "time",
                format!(
                    "{} (open {}, plan {}, read {})",
                    duration(self.elapsed_seconds),
                    duration(self.open_seconds),
                    duration(self.plan_seconds),
                    duration(self.read_seconds)
                ),
            )
            .add("speed", rate(self.bytes_per_second));
        if let (Some(digest), Some(seconds)) = (&self.digest, self.digest_seconds) {
            facts.add(
                "digest",
                format!("{digest} (in another {})", duration(seconds)),
            );
        }
        for fallback in &self.stats.fallbacks {
            let path = printable(&fallback.path.display().to_string());
            facts.add("buffered", format!("{path}: {}", fallback.reason));
        }
        if self.explain {
            return format!("{}\n{}", facts.text(), self.plan);
        }
        facts.add_each("why", self.reasons());
        facts.text()
    }
}
