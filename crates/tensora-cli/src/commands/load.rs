use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use tensora::convert::Digest;
use tensora::io::{DirectFallback, ReadStats, SharedReport, peak_resident_bytes};
use tensora::{BackendKind, Checkpoint, Format, MemoryKind, Plan};

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
    /// What is odd about the checkpoint, as `inspect` says it too.
    notes: Vec<String>,
    stats: &'a ReadStats,
    /// Who read what, where ranks read together.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<&'a SharedReport>,
    plan: &'a Plan,
    #[serde(skip)]
    explain: bool,
}

pub(crate) fn load(arguments: &LoadArgs, console: &Console) -> Result<()> {
    let progress = Arc::new(Progress::new("loading", console.progress));
    let watched = Arc::clone(&progress);
    let loader = arguments.parts.loader(&arguments.source)?;
    let checkpoint = arguments
        .policy
        .apply(arguments.shared.apply(loader))
        .on_progress(move |load| watched.update(load.done_bytes, load.total_bytes))
        .load(&arguments.source.path)?;
    progress.finish();
    let mut result = LoadResult::new(&checkpoint);
    if arguments.digest {
        #[cfg(target_os = "linux")]
        let _watch = crate::bus_error::watch(&checkpoint)?;
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
    fn new(checkpoint: &'a Checkpoint) -> Self {
        let report = checkpoint.report();
        let notes = checkpoint.index().notes();
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
            notes: notes.iter().map(ToString::to_string).collect(),
            stats: &report.stats,
            shared: report.shared.as_ref(),
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

/// That a file was not read as it was meant to be, as a note.
fn buffered(fallback: &DirectFallback) -> String {
    let path = fallback.path.display();
    format!("{path} was read buffered: {}", fallback.reason)
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
        let fallbacks = self.stats.fallbacks.iter().map(buffered);
        let notes = self.notes.iter().cloned().chain(fallbacks);
        facts.add_each("note", notes.map(|note| printable(&note)));
        if self.explain {
            return format!("{}\n{}", facts.text(), self.plan);
        }
        facts.add_each("why", self.reasons());
        facts.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_of_the_checkpoint_and_of_how_it_was_read() {
        let directory = tempfile::tempdir().unwrap();
        let index = r#"{"w": [0, 4, [2, 2], [1, 2], "torch.uint8"]}"#;
        std::fs::write(directory.path().join("tensor_index.json"), index).unwrap();
        std::fs::write(directory.path().join("tensor.data_0"), [0; 4]).unwrap();
        let checkpoint = tensora::load(directory.path()).unwrap();
        let mut stats = checkpoint.report().stats.clone();
        stats.fallbacks = vec![DirectFallback {
            path: "/models/a".into(),
            reason: "the file system refuses".to_owned(),
        }];
        let mut result = LoadResult::new(&checkpoint);
        result.stats = &stats;
        let text = result.text();
        assert!(text.contains("note    not contiguous (1)"), "{text}");
        let fallback = "        /models/a was read buffered: the file system refuses\n";
        assert!(text.contains(fallback), "{text}");
    }
}
