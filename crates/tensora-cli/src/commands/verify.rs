use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use tensora::convert::{
    Check, CheckOutcome, CheckSubject, CheckedBy, Comparison, ContentDigests, Difference,
    FirstDifference, Verification, VerifyOptions,
};
use tensora::formats::{DamagedTensors, Note};
use tensora::io::peak_resident_bytes;
use tensora::{CheckpointIndex, Dtype, Format, LazyCheckpoint};

use super::convert::{how_read, reading};
use super::files::left_out;
use crate::args::VerifyArgs;
use crate::output::{Console, Report, emit, printable};
use crate::progress::Progress;
use crate::table::{Column, Facts, Table};
use crate::units::{count, duration, grouped, rate, size, size_exactly};

/// Rows of a table that are shown unless all are asked for.
const SHORT_ROWS: usize = 40;

pub(crate) fn verify(arguments: &VerifyArgs, console: &Console) -> Result<ExitCode> {
    let begun = Instant::now();
    let progress = Arc::new(Progress::new("verifying", console.progress));
    let checkpoint = open(arguments, &arguments.path)?;
    let stream = checkpoint.stream_plan()?;
    let mut options = VerifyOptions::new().reading(reading(&stream)?);
    if let Some(limit_bytes) = arguments.policy.memory_limit {
        options = options.memory_limit_bytes(limit_bytes);
    }
    let rows = if arguments.all {
        usize::MAX
    } else {
        SHORT_ROWS
    };
    let index = checkpoint.index();
    let mut work_bytes = VerifyOptions::work_bytes(index);
    let run = |work_bytes: u64, begun: Instant| {
        progress.finish();
        Run::new(work_bytes, begun.elapsed(), how_read(&stream), rows)
    };
    let agrees = if let Some(other_path) = &arguments.other {
        let other = open(arguments, other_path)?;
        let other_index = other.index();
        work_bytes = work_bytes.saturating_add(VerifyOptions::work_bytes(other_index));
        let control = progress.control(work_bytes);
        let comparison = options.compare(index, other_index, &control)?;
        let left = Side::new(&arguments.path, index, &comparison.left);
        let right = Side::new(other_path, other_index, &comparison.right);
        let result = Compared::new(left, right, &comparison, run(work_bytes, begun));
        emit(&result, console)?;
        result.agrees
    } else {
        let control = progress.control(work_bytes);
        let verification = options.check(index, &control)?;
        let side = Side::new(&arguments.path, index, &verification.digests);
        let result = Checked::new(side, &verification, run(work_bytes, begun));
        emit(&result, console)?;
        result.agrees
    };
    Ok(if agrees {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Opens what is there, also where tensors are damaged: these are to be named.
fn open(arguments: &VerifyArgs, path: &Path) -> Result<LazyCheckpoint> {
    let options = arguments.open.options();
    let options = options.damaged_tensors(DamagedTensors::LeaveOut);
    let loader = arguments.open.loader(&arguments.policy);
    Ok(loader.open_options(options).open(path)?)
}

/// What it took.
#[derive(Serialize)]
struct Run {
    hashed_bytes: u64,
    elapsed_seconds: f64,
    bytes_per_second: f64,
    /// The most memory that this process has had.
    peak_resident_bytes: Option<u64>,
    #[serde(skip)]
    how: String,
    #[serde(skip)]
    rows: usize,
}

impl Run {
    #[allow(clippy::cast_precision_loss)]
    fn new(hashed_bytes: u64, elapsed: Duration, how: String, rows: usize) -> Self {
        let elapsed_seconds = elapsed.as_secs_f64();
        Self {
            hashed_bytes,
            elapsed_seconds,
            bytes_per_second: hashed_bytes as f64 / elapsed_seconds.max(f64::MIN_POSITIVE),
            peak_resident_bytes: peak_resident_bytes(),
            how,
            rows,
        }
    }

    fn add_to(&self, facts: &mut Facts) {
        facts
            .add("reading", self.how.clone())
            .add("time", duration(self.elapsed_seconds))
            .add("speed", rate(self.bytes_per_second));
        if let Some(bytes) = self.peak_resident_bytes {
            facts.add("memory", format!("{} at most", size(bytes)));
        }
    }
}

/// A checkpoint that was read.
#[derive(Serialize)]
struct Side {
    path: String,
    format: Format,
    tensor_count: usize,
    data_bytes: u64,
    digest: String,
    /// Tensors that are not all there; they are not in the digest.
    damaged: Vec<DamagedLine>,
    notes: Vec<String>,
}

/// A tensor of which its file lacks a part.
#[derive(Serialize)]
struct DamagedLine {
    tensor: String,
    file: String,
    bytes: u64,
    present_bytes: u64,
}

impl Side {
    fn new(path: &Path, index: &CheckpointIndex, digests: &ContentDigests) -> Self {
        let is_damage = |note: &&Note| matches!(note, Note::Damaged { .. });
        let notes = index.notes().iter();
        Self {
            path: path.display().to_string(),
            format: index.format(),
            tensor_count: index.tensors().len(),
            data_bytes: VerifyOptions::work_bytes(index),
            digest: digests.content().to_string(),
            damaged: notes.clone().flat_map(damaged_lines).collect(),
            notes: notes
                .filter(|note| !is_damage(note))
                .map(ToString::to_string)
                .collect(),
        }
    }

    fn add_to(&self, label: &str, facts: &mut Facts) {
        facts
            .add(label, printable(&self.path))
            .add("format", self.format.to_string())
            .add(
                "tensors",
                format!(
                    "{}, {}",
                    grouped(self.tensor_count as u64),
                    size_exactly(self.data_bytes)
                ),
            )
            .add("digest", self.digest.clone())
            .add_each("note", self.notes.iter().map(|note| printable(note)));
    }
}

fn damaged_lines(note: &Note) -> Vec<DamagedLine> {
    let Note::Damaged { file, tensors, .. } = note else {
        return Vec::new();
    };
    let line = |tensor: &tensora::formats::DamagedTensor| DamagedLine {
        tensor: tensor.name.clone(),
        file: file.clone(),
        bytes: tensor.range.end.saturating_sub(tensor.range.start),
        present_bytes: tensor.present_bytes,
    };
    tensors.iter().map(line).collect()
}

/// The damaged tensors of one side, under this title; nothing where there are none.
fn damaged_table(title: &str, damaged: &[DamagedLine], rows: usize) -> String {
    if damaged.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        (title, Column::Text),
        ("file", Column::Text),
        ("bytes", Column::Number),
        ("present", Column::Number),
    ]);
    for line in damaged.iter().take(rows) {
        table.row([
            printable(&line.tensor),
            printable(&line.file),
            grouped(line.bytes),
            grouped(line.present_bytes),
        ]);
    }
    format!("\n{}{}", table.text(), left_out(damaged.len(), rows))
}

/// One checkpoint, and what is known of it.
#[derive(Serialize)]
struct Checked {
    agrees: bool,
    #[serde(flatten)]
    side: Side,
    checks: Vec<CheckLine>,
    #[serde(flatten)]
    run: Run,
}

/// Something that was checked.
#[derive(Serialize)]
struct CheckLine {
    #[serde(flatten)]
    subject: Subject,
    by: &'static str,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual: Option<Value>,
    #[serde(skip)]
    matches: bool,
    #[serde(skip)]
    text: String,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Subject {
    Tensor(String),
    File(String),
}

/// What was expected or found.
#[derive(Serialize)]
#[serde(untagged)]
enum Value {
    Digest(String),
    Dtype(Dtype),
    Shape(Vec<u64>),
}

impl CheckLine {
    fn new(check: &Check) -> Self {
        let (outcome, values) = match &check.outcome {
            CheckOutcome::Matches => ("matches", None),
            CheckOutcome::Differs { expected, actual } => (
                "differs",
                Some([expected, actual].map(|digest| Value::Digest(digest.to_string()))),
            ),
            CheckOutcome::DtypeDiffers { expected, actual } => (
                "dtype-differs",
                Some([*expected, *actual].map(Value::Dtype)),
            ),
            CheckOutcome::ShapeDiffers { expected, actual } => (
                "shape-differs",
                Some([expected, actual].map(|shape| Value::Shape(shape.clone()))),
            ),
            CheckOutcome::Missing => ("missing", None),
            CheckOutcome::NotListed => ("not-listed", None),
            _ => ("other", None),
        };
        let (expected, actual) = values.map_or((None, None), |[expected, actual]| {
            (Some(expected), Some(actual))
        });
        Self {
            subject: match &check.subject {
                CheckSubject::Tensor(name) => Subject::Tensor(name.clone()),
                CheckSubject::File(name) => Subject::File(name.clone()),
                other => Subject::File(other.to_string()),
            },
            by: match check.by {
                CheckedBy::Sidecar => "sidecar",
                CheckedBy::BlobName => "blob-name",
                _ => "other",
            },
            outcome,
            expected,
            actual,
            matches: check.outcome.is_match(),
            text: check.to_string(),
        }
    }
}

impl Checked {
    fn new(side: Side, verification: &Verification, run: Run) -> Self {
        Self {
            agrees: verification.is_sound(),
            side,
            checks: verification.checks.iter().map(CheckLine::new).collect(),
            run,
        }
    }

    /// What was compared with what, one line for each.
    fn checked_by(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (by, noun, name) in [
            ("sidecar", "tensor", tensora::convert::SIDECAR_NAME),
            ("blob-name", "file", "the names of their blobs (SHA-256)"),
        ] {
            let checks = self.checks.iter().filter(|check| check.by == by);
            let all = checks.clone().count();
            let good = checks.filter(|check| check.matches).count();
            if all > 0 {
                let agree = if good == 1 { "agrees" } else { "agree" };
                lines.push(format!(
                    "{} of {} {agree} with {name}",
                    grouped(good as u64),
                    count(all as u64, noun)
                ));
            }
        }
        if lines.is_empty() {
            let read = match self.side.damaged.len() {
                0 => "every byte can be read",
                _ => "the other tensors can be read",
            };
            lines.push(format!("{read}; nothing here says what they should be"));
        }
        lines
    }
}

/// The first line of a report: what scripts get as exit status.
fn verdict(agrees: bool, good: &str, bad: String) -> String {
    if agrees { good.to_owned() } else { bad }
}

impl Report for Checked {
    fn text(&self) -> String {
        let bad = self.checks.iter().filter(|check| !check.matches);
        let mut problems = Vec::new();
        if !self.side.damaged.is_empty() {
            let damaged = self.side.damaged.len() as u64;
            problems.push(format!("{} not complete", count(damaged, "tensor")));
        }
        if bad.clone().count() > 0 {
            let failed = bad.clone().count() as u64;
            problems.push(format!("{} failed", count(failed, "check")));
        }
        let mut facts = Facts::new();
        facts.add(
            "verdict",
            verdict(
                self.agrees,
                "sound",
                format!("DAMAGED: {}", problems.join(", ")),
            ),
        );
        self.side.add_to("checkpoint", &mut facts);
        facts.add_each("checked", self.checked_by());
        self.run.add_to(&mut facts);
        let mut text = facts.text();
        let rows = self.run.rows;
        text.push_str(&damaged_table("damaged tensor", &self.side.damaged, rows));
        let lines: Vec<&CheckLine> = bad.collect();
        if !lines.is_empty() {
            text.push('\n');
        }
        for line in lines.iter().take(rows) {
            text.push_str(&printable(&line.text));
            text.push('\n');
        }
        text + &left_out(lines.len(), rows)
    }
}

/// Two checkpoints against each other.
#[derive(Serialize)]
struct Compared {
    agrees: bool,
    left: Side,
    right: Side,
    differences: Vec<DifferenceLine>,
    #[serde(flatten)]
    run: Run,
}

/// How a tensor differs.
#[derive(Serialize)]
struct DifferenceLine {
    tensor: String,
    #[serde(flatten)]
    how: How,
    #[serde(skip)]
    text: String,
}

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum How {
    OnlyInLeft,
    OnlyInRight,
    Dtype {
        left: Dtype,
        right: Dtype,
    },
    Shape {
        left: Vec<u64>,
        right: Vec<u64>,
    },
    Bytes {
        /// The first byte that differs, where it was looked for.
        offset: Option<u64>,
        element: Option<Vec<u64>>,
        left: Option<u8>,
        right: Option<u8>,
    },
    Other,
}

impl DifferenceLine {
    fn new(difference: &Difference) -> Self {
        let (how, text) = match difference {
            Difference::OnlyInLeft { .. } => (How::OnlyInLeft, "only in the first".to_owned()),
            Difference::OnlyInRight { .. } => (How::OnlyInRight, "only in the second".to_owned()),
            Difference::Dtype { left, right, .. } => (
                How::Dtype {
                    left: *left,
                    right: *right,
                },
                format!("dtype {left} in the first, {right} in the second"),
            ),
            Difference::Shape { left, right, .. } => (
                How::Shape {
                    left: left.clone(),
                    right: right.clone(),
                },
                format!("shape {left:?} in the first, {right:?} in the second"),
            ),
            Difference::Bytes { first, .. } => (
                How::Bytes {
                    offset: first.as_ref().map(|first| first.offset),
                    element: first.as_ref().map(|first| first.element.clone()),
                    left: first.as_ref().map(|first| first.left),
                    right: first.as_ref().map(|first| first.right),
                },
                first
                    .as_ref()
                    .map_or_else(|| "bytes".to_owned(), first_difference),
            ),
            other => (How::Other, other.to_string()),
        };
        Self {
            tensor: difference.tensor().to_owned(),
            how,
            text,
        }
    }
}

fn first_difference(first: &FirstDifference) -> String {
    format!(
        "bytes, from {} (element {:?}): {:02x} in the first, {:02x} in the second",
        grouped(first.offset),
        first.element,
        first.left,
        first.right
    )
}

impl Compared {
    fn new(left: Side, right: Side, comparison: &Comparison, run: Run) -> Self {
        let differences = comparison.differences.iter();
        Self {
            // Damaged in the same way is not the same.
            agrees: comparison.is_equal() && left.damaged.is_empty() && right.damaged.is_empty(),
            left,
            right,
            differences: differences.map(DifferenceLine::new).collect(),
            run,
        }
    }
}

impl Report for Compared {
    fn text(&self) -> String {
        let damaged = (self.left.damaged.len() + self.right.damaged.len()) as u64;
        let bad = match (self.differences.len(), damaged) {
            (0, damaged) => format!("DAMAGED: {} not complete", count(damaged, "tensor")),
            (differences, _) => format!("DIFFERENT: {}", count(differences as u64, "difference")),
        };
        let mut facts = Facts::new();
        facts.add("verdict", verdict(self.agrees, "the same tensors", bad));
        self.left.add_to("first", &mut facts);
        self.right.add_to("second", &mut facts);
        self.run.add_to(&mut facts);
        let mut text = facts.text();
        let rows = self.run.rows;
        for (title, side) in [
            ("damaged in the first", &self.left),
            ("damaged in the second", &self.right),
        ] {
            text.push_str(&damaged_table(title, &side.damaged, rows));
        }
        if !self.differences.is_empty() {
            let mut table = Table::new(&[("tensor", Column::Text), ("differs in", Column::Text)]);
            for line in self.differences.iter().take(rows) {
                table.row([printable(&line.tensor), line.text.clone()]);
            }
            text.push('\n');
            text.push_str(&table.text());
            text.push_str(&left_out(self.differences.len(), rows));
        }
        text
    }
}
