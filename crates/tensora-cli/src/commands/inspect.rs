use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;
use tensora::formats::TensorEntry;
use tensora::{CheckpointIndex, Dtype, Format, LazyCheckpoint};

use super::files::{FileLine, file_table, left_out};
use crate::args::InspectArgs;
use crate::output::{Console, Report, emit, printable};
use crate::table::{Column, Facts, Table};
use crate::units::{count, grouped, parameters, share, size, size_exactly};

/// Rows of a table that are shown unless all are asked for.
const SHORT_ROWS: usize = 40;

/// What a checkpoint consists of. Counts are of the selected tensors.
#[derive(Serialize)]
struct Inspection<'a> {
    format: Format,
    root: String,
    tensor_count: usize,
    data_bytes: u64,
    parameter_count: u64,
    dtypes: Vec<DtypeTotal>,
    files: Vec<FileLine<'a>>,
    tensors: Vec<TensorLine<'a>>,
    metadata: &'a BTreeMap<String, String>,
    notes: Vec<String>,
    #[serde(skip)]
    indexed_count: usize,
    #[serde(skip)]
    rows: usize,
}

#[derive(Serialize)]
struct DtypeTotal {
    dtype: Dtype,
    tensor_count: usize,
    parameter_count: u64,
    data_bytes: u64,
}

#[derive(Serialize)]
struct TensorLine<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    strides: Option<&'a [u64]>,
    file: &'a str,
    offset: u64,
    bytes: u64,
}

pub(crate) fn inspect(arguments: &InspectArgs, console: &Console) -> Result<()> {
    let checkpoint = arguments.source.loader().open(&arguments.source.path)?;
    let rows = if arguments.all {
        usize::MAX
    } else {
        SHORT_ROWS
    };
    emit(&Inspection::new(&checkpoint, rows), console)
}

impl<'a> Inspection<'a> {
    fn new(checkpoint: &'a LazyCheckpoint, rows: usize) -> Self {
        let index = checkpoint.index();
        let selected: Vec<&TensorEntry> = checkpoint.selected().collect();
        Self {
            format: index.format(),
            root: index.root().display().to_string(),
            tensor_count: selected.len(),
            data_bytes: sum(&selected, |tensor| tensor.bytes),
            parameter_count: sum(&selected, TensorEntry::element_count),
            dtypes: dtypes(&selected),
            files: files(index, &selected),
            tensors: selected
                .iter()
                .map(|tensor| TensorLine::new(index, tensor))
                .collect(),
            metadata: index.metadata(),
            notes: index.notes().iter().map(ToString::to_string).collect(),
            indexed_count: index.tensors().len(),
            rows,
        }
    }
}

impl<'a> TensorLine<'a> {
    fn new(index: &'a CheckpointIndex, tensor: &'a TensorEntry) -> Self {
        Self {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            strides: tensor.strides.as_deref(),
            file: &index.files()[tensor.file].name,
            offset: tensor.offset,
            bytes: tensor.bytes,
        }
    }

    /// `[4096, 1024]`, with the strides of a view behind it.
    fn layout(&self) -> String {
        match self.strides {
            None => format!("{:?}", self.shape),
            Some(strides) => format!("{:?} strides {strides:?}", self.shape),
        }
    }
}

/// Saturating, because sparse files and shared bytes can take a sum past any real storage.
fn sum(tensors: &[&TensorEntry], value: impl Fn(&TensorEntry) -> u64) -> u64 {
    tensors
        .iter()
        .fold(0, |sum, tensor| sum.saturating_add(value(tensor)))
}

/// Totals of each dtype, the one with the most bytes first.
fn dtypes(tensors: &[&TensorEntry]) -> Vec<DtypeTotal> {
    let mut by_dtype = BTreeMap::<Dtype, Vec<&TensorEntry>>::new();
    for tensor in tensors {
        by_dtype.entry(tensor.dtype).or_default().push(tensor);
    }
    let mut totals: Vec<_> = by_dtype
        .into_iter()
        .map(|(dtype, tensors)| DtypeTotal {
            dtype,
            tensor_count: tensors.len(),
            parameter_count: sum(&tensors, TensorEntry::element_count),
            data_bytes: sum(&tensors, |tensor| tensor.bytes),
        })
        .collect();
    totals.sort_by_key(|total| std::cmp::Reverse(total.data_bytes));
    totals
}

fn files<'a>(index: &'a CheckpointIndex, tensors: &[&TensorEntry]) -> Vec<FileLine<'a>> {
    let mut counts = vec![0; index.files().len()];
    for tensor in tensors {
        counts[tensor.file] += 1;
    }
    let files = index.files().iter().zip(counts);
    files
        .map(|(file, tensor_count)| FileLine {
            path: &file.name,
            bytes: file.bytes,
            tensor_count,
        })
        .collect()
}

impl Report for Inspection<'_> {
    fn text(&self) -> String {
        let mut text = self.summary();
        text.push('\n');
        text.push_str(&file_table(&self.files, self.rows));
        if !self.tensors.is_empty() {
            text.push('\n');
            text.push_str(&self.tensor_table());
        }
        if !self.notes.is_empty() {
            text.push('\n');
            for note in &self.notes {
                text.push_str(&format!("note: {}\n", printable(note)));
            }
        }
        text
    }
}

impl Inspection<'_> {
    fn summary(&self) -> String {
        let file_bytes = self
            .files
            .iter()
            .fold(0, |sum: u64, file| sum.saturating_add(file.bytes));
        let tensors = if self.tensor_count == self.indexed_count {
            grouped(self.tensor_count as u64)
        } else {
            format!(
                "{} selected of {}",
                grouped(self.tensor_count as u64),
                grouped(self.indexed_count as u64)
            )
        };
        let mut facts = Facts::new();
        facts
            .add("checkpoint", printable(&self.root))
            .add("format", self.format.to_string())
            .add(
                "files",
                format!(
                    "{}, {}",
                    grouped(self.files.len() as u64),
                    size_exactly(file_bytes)
                ),
            )
            .add(
                "tensors",
                format!("{tensors}, {}", size_exactly(self.data_bytes)),
            )
            .add(
                "parameters",
                match self.parameter_count {
                    few @ 0..1_000_000 => grouped(few),
                    many => format!("{} ({})", parameters(many), grouped(many)),
                },
            )
            .add_each(
                "dtypes",
                self.dtypes.iter().map(|total| self.dtype_line(total)),
            )
            .add_each(
                "metadata",
                self.metadata
                    .iter()
                    .map(|(key, value)| printable(&format!("{key}: {value}"))),
            );
        facts.text()
    }

    /// `BF16: 311 tensors`, with its share of the bytes where there are several.
    fn dtype_line(&self, total: &DtypeTotal) -> String {
        let tensors = count(total.tensor_count as u64, "tensor");
        match self.dtypes.len() {
            1 => format!("{}: {tensors}", total.dtype),
            _ => format!(
                "{}: {tensors}, {} of the bytes",
                total.dtype,
                share(total.data_bytes, self.data_bytes)
            ),
        }
    }

    fn tensor_table(&self) -> String {
        // With one file, its name on every line would only take the room of the names.
        let several = self.files.len() > 1;
        let mut columns = vec![
            ("tensor", Column::Text),
            ("dtype", Column::Word),
            ("shape", Column::Text),
            ("file", Column::Text),
            ("offset", Column::Number),
            ("size", Column::Number),
            ("bytes", Column::Number),
        ];
        columns.retain(|(title, _)| several || *title != "file");
        let mut table = Table::new(&columns);
        table.dispense_with(&["offset", "bytes", "file"]);
        for tensor in self.tensors.iter().take(self.rows) {
            let mut row = vec![
                printable(tensor.name),
                tensor.dtype.to_string(),
                tensor.layout(),
            ];
            row.extend(several.then(|| printable(tensor.file)));
            row.extend([
                grouped(tensor.offset),
                size(tensor.bytes),
                grouped(tensor.bytes),
            ]);
            table.row(row);
        }
        table.text() + &left_out(self.tensors.len(), self.rows)
    }
}
