use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use tensora::heuristics::StreamPlan;
use tensora::io::{StreamStats, peak_resident_bytes};
use tensora::{DigestSink, Format};

use crate::args::DigestArgs;
use crate::output::{Console, Report, emit, printable};
use crate::progress::Progress;
use crate::table::Facts;
use crate::units::{count, duration, rate, size, size_exactly};

/// What a checkpoint's content is called, and how it was found out.
#[derive(Serialize)]
struct DigestResult {
    digest: String,
    format: Format,
    tensor_count: usize,
    data_bytes: u64,
    elapsed_seconds: f64,
    bytes_per_second: f64,
    /// The most memory that this process has had.
    peak_resident_bytes: Option<u64>,
    notes: Vec<String>,
    stats: StreamStats,
    plan: StreamPlan,
    #[serde(skip)]
    explain: bool,
}

pub(crate) fn digest(arguments: &DigestArgs, console: &Console) -> Result<()> {
    let progress = Arc::new(Progress::new("hashing", console.progress));
    let watched = Arc::clone(&progress);
    let loader = arguments.parts.loader(&arguments.source)?;
    let checkpoint = arguments
        .policy
        .apply(loader)
        .on_progress(move |load| watched.update(load.done_bytes, load.total_bytes))
        .open(&arguments.source.path)?;
    let mut sink = DigestSink::new();
    let report = checkpoint.stream_into(&mut sink)?;
    progress.finish();
    let notes = checkpoint.index().notes();
    let result = DigestResult {
        digest: sink.digest().to_string(),
        format: checkpoint.index().format(),
        tensor_count: report.tensor_count,
        data_bytes: report.data_bytes,
        elapsed_seconds: report.elapsed.as_secs_f64(),
        bytes_per_second: report.bytes_per_second(),
        peak_resident_bytes: peak_resident_bytes(),
        notes: notes.iter().map(ToString::to_string).collect(),
        stats: report.stats,
        plan: report.plan,
        explain: arguments.explain || console.explain,
    };
    emit(&result, console)
}

impl DigestResult {
    /// `sync through 15 buffers of 16.0 MiB, direct`.
    fn strategy(&self) -> String {
        let path = if self.stats.read.direct_bytes > 0 {
            "direct"
        } else {
            "buffered"
        };
        format!(
            "{} through {} of {}, {path}",
            self.plan.backend,
            count(self.plan.buffers.into(), "buffer"),
            size(self.plan.buffer_bytes)
        )
    }
}

impl Report for DigestResult {
    fn text(&self) -> String {
        let mut facts = Facts::new();
        facts
            .add("digest", self.digest.clone())
            .add("format", self.format.to_string())
            .add(
                "hashed",
                format!(
                    "{}, {}",
                    count(self.tensor_count as u64, "tensor"),
                    size_exactly(self.data_bytes)
                ),
            )
            .add("how", self.strategy())
            .add("time", duration(self.elapsed_seconds))
            .add("speed", rate(self.bytes_per_second));
        if let Some(bytes) = self.peak_resident_bytes {
            facts.add("memory", format!("{} at most", size(bytes)));
        }
        facts.add_each("note", self.notes.iter().map(|note| printable(note)));
        if self.explain {
            return format!("{}\n{}", facts.text(), self.plan);
        }
        facts.text()
    }
}
