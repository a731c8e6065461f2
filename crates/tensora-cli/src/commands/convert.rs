use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use tensora::convert::{ConversionPlan, ConversionReport, ConvertOptions, Overwrite};
use tensora::{CancelToken, Format};

use super::files::{FileLine, file_table};
use crate::args::ConvertArgs;
use crate::output::{Console, Report, emit, printable};
use crate::progress::Progress;
use crate::signals;
use crate::table::Facts;
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
    files: Vec<FileLine<'a>>,
    notes: Vec<String>,
    #[serde(flatten)]
    done: Option<Done>,
}

/// What only a conversion that ran can tell.
#[derive(Serialize)]
struct Done {
    elapsed_seconds: f64,
    bytes_per_second: f64,
    buffer_bytes: u64,
}

pub(crate) fn convert(arguments: &ConvertArgs, console: &Console) -> Result<()> {
    let source = arguments
        .open
        .options()
        .open(&arguments.source)
        .map_err(tensora::Error::from)?;
    let plan = options(arguments).plan(&source, &arguments.target)?;
    if arguments.dry_run {
        return emit(&Conversion::new(&plan, None), console);
    }
    let cancel = CancelToken::new();
    signals::watch(cancel.clone())?;
    signals::survive_file_size_limit()?;
    let progress = Arc::new(Progress::new("converting", console.progress));
    let control = progress.control(plan.data_bytes()).with_cancel(cancel);
    let report = plan.run(&control)?;
    progress.finish();
    emit(&Conversion::new(&plan, Some(&report)), console)
}

fn options(arguments: &ConvertArgs) -> ConvertOptions {
    let mut options = ConvertOptions::new(arguments.to);
    if let Some(partitions) = arguments.partitions {
        options = options.partitions(partitions);
    }
    if let Some(partition_bytes) = arguments.partition_bytes {
        options = options.partition_bytes(partition_bytes);
    }
    if let Some(limit_bytes) = arguments.memory_limit {
        options = options.memory_limit_bytes(limit_bytes);
    }
    if arguments.force {
        options = options.overwrite(Overwrite::Replace);
    }
    options
}

impl<'a> Conversion<'a> {
    fn new(plan: &'a ConversionPlan, report: Option<&ConversionReport>) -> Self {
        let layout = plan.layout();
        let index = layout.index.iter().map(|index| FileLine {
            path: &index.name,
            bytes: index.contents.len() as u64,
            tensor_count: 0,
        });
        let files = layout.files.iter().map(|file| FileLine {
            path: &file.name,
            bytes: file.bytes,
            tensor_count: file.tensors.len(),
        });
        let notes = report.map_or(plan.notes(), |report| &report.notes);
        Self {
            source_format: plan.source_format(),
            target_format: plan.target_format(),
            target: plan.target().display().to_string(),
            dry_run: report.is_none(),
            tensor_count: plan.tensors(),
            data_bytes: plan.data_bytes(),
            target_bytes: plan.target_bytes(),
            padding_bytes: plan.padding_bytes(),
            free_bytes: plan.free_bytes(),
            files: files.chain(index).collect(),
            notes: notes.iter().map(ToString::to_string).collect(),
            done: report.map(Done::new),
        }
    }
}

impl Done {
    #[allow(clippy::cast_precision_loss)]
    fn new(report: &ConversionReport) -> Self {
        let elapsed_seconds = report.elapsed.as_secs_f64();
        Self {
            elapsed_seconds,
            bytes_per_second: report.data_bytes as f64 / elapsed_seconds.max(f64::MIN_POSITIVE),
            buffer_bytes: report.buffer_bytes,
        }
    }
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
            );
        match &self.done {
            Some(done) => {
                facts
                    .add("time", duration(done.elapsed_seconds))
                    .add("speed", rate(done.bytes_per_second))
                    .add("buffers", size(done.buffer_bytes));
            }
            None => {
                if let Some(bytes) = self.free_bytes {
                    facts.add("free", size_exactly(bytes));
                }
                facts.add("dry run", "nothing was written");
            }
        }
        facts.add_each("note", self.notes.iter().map(|note| printable(note)));
        format!("{}\n{}", facts.text(), file_table(&self.files, usize::MAX))
    }
}
