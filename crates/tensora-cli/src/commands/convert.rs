use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Result, bail};
use serde::Serialize;
use tensora::convert::{
    Checksums, Companions, ConversionPlan, ConversionReport, ConvertOptions, OutputKind, Overwrite,
    PlannedOutput, Reading, Unfinished, Verify,
};
use tensora::heuristics::StreamPlan;
use tensora::io::peak_resident_bytes;
use tensora::{CancelToken, Format};

use crate::args::ConvertArgs;
use crate::failure::Stopped;
use crate::output::{Console, Report, emit, printable};
use crate::progress::Progress;
use crate::signals;
use crate::table::{Column, Facts, Table};
use crate::units::{count, duration, grouped, rate, size, size_exactly};

/// What a conversion wrote, or would write.
#[derive(Serialize)]
struct Conversion<'a> {
    source_format: Format,
    target_format: Format,
    target: String,
    dry_run: bool,
    tensor_count: usize,
    data_bytes: u64,
    target_bytes: u64,
    padding_bytes: u64,
    /// What the file system had free beforehand.
    free_bytes: Option<u64>,
    files: Vec<OutputLine>,
    /// What is in the target now and would be gone, relative to it; of a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    replaced_files: Option<Vec<String>>,
    notes: Vec<String>,
    #[serde(flatten)]
    done: Option<Done>,
    /// How the source is read.
    reading: &'a StreamPlan,
    #[serde(skip)]
    explain: bool,
}

/// A file of the target.
#[derive(Serialize)]
struct OutputLine {
    path: String,
    kind: &'static str,
    bytes: u64,
    tensor_count: usize,
    /// Where the data begins.
    data_offset: u64,
    /// What every tensor begins at a multiple of; none where no tensor has data.
    alignment_bytes: Option<u64>,
    padding_bytes: u64,
}

/// What only a conversion that ran can tell.
#[derive(Serialize)]
struct Done {
    elapsed_seconds: f64,
    bytes_per_second: f64,
    buffer_bytes: u64,
    /// Written past the page cache.
    direct_bytes: u64,
    resumed_files: usize,
    resumed_bytes: u64,
    /// Whether what was written was read back and agreed.
    verified: bool,
    /// The content digest, where checksums or verification needed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// The most memory that this process has had.
    peak_resident_bytes: Option<u64>,
}

pub(crate) fn convert(arguments: &ConvertArgs, console: &Console) -> Result<()> {
    check_metadata(&arguments.target_args.metadata)?;
    let loader = arguments.open.loader(&arguments.policy);
    let checkpoint = loader.open(&arguments.source)?;
    let stream = checkpoint.stream_plan()?;
    let options = options(arguments).reading(reading(&stream)?);
    let plan = options.plan(checkpoint.index(), &arguments.target)?;
    // The plan has the index; the descriptors, up to two for each file, are needed for the conversion.
    drop(checkpoint);
    let mut conversion = Conversion::new(&plan, &stream);
    conversion.explain = console.explain;
    if arguments.run.dry_run {
        let replaced = plan.replaced_files()?;
        let shown = replaced.iter().map(|path| path.display().to_string());
        conversion.replaced_files = Some(shown.collect());
        return emit(&conversion, console);
    }
    let cancel = CancelToken::new();
    signals::watch(cancel.clone())?;
    signals::survive_file_size_limit()?;
    let progress = Arc::new(Progress::new("converting", console.progress));
    let control = progress.control(plan.work_bytes()).with_cancel(cancel);
    let report = plan
        .run(&control)
        .map_err(|error| Stopped::new(error, &plan))?;
    progress.finish();
    conversion.finish(&report, arguments.run.verify);
    emit(&conversion, console)
}

/// A key has one value; which one is meant is not guessed.
fn check_metadata(metadata: &[(String, String)]) -> Result<()> {
    let mut keys = BTreeSet::new();
    match metadata.iter().find(|(key, _)| !keys.insert(key)) {
        Some((key, _)) => bail!("`--metadata` gives {key:?} twice; leave one of them out"),
        None => Ok(()),
    }
}

/// Reads as the planner of streams says.
pub(super) fn reading(stream: &StreamPlan) -> Result<Reading> {
    let backend = tensora::io::backend(stream.backend).map_err(tensora::Error::from)?;
    Ok(Reading::new(backend.into(), stream.readers, stream.params))
}

fn options(arguments: &ConvertArgs) -> ConvertOptions {
    let target = &arguments.target_args;
    let mut options = ConvertOptions::new(target.to).shared_tensors(target.tied);
    if let Some(shards) = target.shards {
        options = options.shards(shards);
    }
    if let Some(shard_bytes) = target.shard_bytes {
        options = options.shard_bytes(shard_bytes);
    }
    if let Some(alignment_bytes) = target.align {
        options = options.data_alignment_bytes(alignment_bytes.get());
    }
    if let Some(partitions) = target.partitions {
        options = options.partitions(partitions);
    }
    if let Some(partition_bytes) = target.partition_bytes {
        options = options.partition_bytes(partition_bytes);
    }
    for (key, value) in &target.metadata {
        options = options.metadata(key, value);
    }
    if target.companions {
        options = options.companions(Companions::Copy);
    }
    if target.checksums {
        options = options.checksums(Checksums::Write);
    }
    let run = &arguments.run;
    if run.verify {
        options = options.verify(Verify::ReadBack);
    }
    if run.force {
        options = options.overwrite(Overwrite::Replace);
    }
    if run.resume {
        options = options.unfinished(Unfinished::Resume);
    } else if run.restart {
        options = options.unfinished(Unfinished::Discard);
    }
    if let Some(limit_bytes) = arguments.policy.memory_limit {
        options = options.memory_limit_bytes(limit_bytes);
    }
    options
}

impl<'a> Conversion<'a> {
    /// What is going to be written.
    fn new(plan: &ConversionPlan, reading: &'a StreamPlan) -> Self {
        Self {
            source_format: plan.source_format(),
            target_format: plan.target_format(),
            target: plan.target().display().to_string(),
            dry_run: true,
            tensor_count: plan.tensors(),
            data_bytes: plan.data_bytes(),
            target_bytes: plan.target_bytes(),
            padding_bytes: plan.padding_bytes(),
            free_bytes: plan.free_bytes(),
            files: plan.files().into_iter().map(OutputLine::new).collect(),
            replaced_files: None,
            notes: plan.notes().iter().map(ToString::to_string).collect(),
            done: None,
            reading,
            explain: false,
        }
    }

    /// What has been written.
    #[allow(clippy::cast_precision_loss)]
    fn finish(&mut self, report: &ConversionReport, verified: bool) {
        let elapsed_seconds = report.elapsed.as_secs_f64();
        let written_bytes = report.target_bytes.saturating_sub(report.resumed_bytes);
        self.dry_run = false;
        self.target_bytes = report.target_bytes;
        self.notes = report.notes.iter().map(ToString::to_string).collect();
        self.done = Some(Done {
            elapsed_seconds,
            bytes_per_second: written_bytes as f64 / elapsed_seconds.max(f64::MIN_POSITIVE),
            buffer_bytes: report.buffer_bytes,
            direct_bytes: report.direct_bytes,
            resumed_files: report.resumed_files,
            resumed_bytes: report.resumed_bytes,
            verified,
            digest: report.content_digest.map(|digest| digest.to_string()),
            peak_resident_bytes: peak_resident_bytes(),
        });
    }

    fn file_table(&self) -> String {
        let mut table = Table::new(&[
            ("file", Column::Text),
            ("tensors", Column::Number),
            ("size", Column::Number),
            ("bytes", Column::Number),
            ("data at", Column::Number),
            ("aligned to", Column::Number),
            ("padding", Column::Number),
        ]);
        table.dispense_with(&["size", "data at", "aligned to", "padding"]);
        for file in &self.files {
            // Only files of tensors have data somewhere.
            let of_data = |text: String| match file.kind {
                DATA => text,
                _ => String::new(),
            };
            table.row([
                printable(&file.path),
                of_data(grouped(file.tensor_count as u64)),
                size(file.bytes),
                grouped(file.bytes),
                of_data(grouped(file.data_offset)),
                file.alignment_bytes.map(grouped).unwrap_or_default(),
                of_data(grouped(file.padding_bytes)),
            ]);
        }
        table.text()
    }
}

/// What the kind of a file that holds tensors is called.
const DATA: &str = "data";

impl OutputLine {
    fn new(output: PlannedOutput) -> Self {
        Self {
            path: output.name,
            kind: match output.kind {
                OutputKind::Data => DATA,
                OutputKind::Index => "index",
                OutputKind::Companion => "companion",
                OutputKind::Checksums => "checksums",
                _ => "other",
            },
            bytes: output.bytes,
            tensor_count: output.tensors,
            data_offset: output.data_offset,
            alignment_bytes: output.alignment_bytes,
            padding_bytes: output.padding_bytes,
        }
    }
}

/// `sync, 4 windows at once, direct`.
pub(super) fn how_read(stream: &StreamPlan) -> String {
    let path = if stream.reads_direct() {
        "direct"
    } else {
        "buffered"
    };
    let windows = count(stream.readers.into(), "window");
    format!("{}, {windows} at once, {path}", stream.backend)
}

impl Report for Conversion<'_> {
    fn text(&self) -> String {
        let mut facts = Facts::new();
        facts
            .add("from", self.source_format.to_string())
            .add("to", self.target_format.to_string())
            .add("target", printable(&self.target))
            .add(
                "tensors",
                format!(
                    "{}, {}",
                    grouped(self.tensor_count as u64),
                    size_exactly(self.data_bytes)
                ),
            )
            .add(
                "files",
                format!(
                    "{}, {}, {} of it padding",
                    grouped(self.files.len() as u64),
                    size_exactly(self.target_bytes),
                    count(self.padding_bytes, "byte")
                ),
            )
            .add("reading", how_read(self.reading));
        match &self.done {
            Some(done) => done.add_to(&mut facts),
            None => {
                if let Some(bytes) = self.free_bytes {
                    facts.add("free", size_exactly(bytes));
                }
                let replaced = self.replaced_files.iter().flatten();
                facts.add_each("replaces", replaced.map(|file| printable(file)));
                facts.add("dry run", "nothing was written");
            }
        }
        facts.add_each("note", self.notes.iter().map(|note| printable(note)));
        let mut text = format!("{}\n{}", facts.text(), self.file_table());
        if self.explain {
            text.push_str(&format!("\n{}", self.reading));
        }
        text
    }
}

impl Done {
    fn add_to(&self, facts: &mut Facts) {
        facts
            .add("time", duration(self.elapsed_seconds))
            .add("speed", format!("{} written", rate(self.bytes_per_second)))
            .add("buffers", size(self.buffer_bytes));
        if let Some(bytes) = self.peak_resident_bytes {
            facts.add("memory", format!("{} at most", size(bytes)));
        }
        if self.resumed_files > 0 {
            facts.add(
                "resumed",
                format!(
                    "{} of {} were finished before",
                    count(self.resumed_files as u64, "file"),
                    size(self.resumed_bytes)
                ),
            );
        }
        if self.verified {
            facts.add("verified", "read back, and the same as the source");
        }
        if let Some(digest) = &self.digest {
            facts.add("digest", digest.clone());
        }
    }
}
