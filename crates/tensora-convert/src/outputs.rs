//! The files of a target: which records they hold, and where these come from.

use std::collections::HashMap;
use std::num::NonZero;
use std::ops::Range;

use tensora_formats::{
    CheckpointIndex, CheckpointLayout, Format, Partitioning, PlannedIndex, RecordSpec,
    RecordTensor, STORE_PARTITION_BYTES, Sharding, TensorEntry, TensorPart, TensorSpec,
    partitioned_record_layout, safetensors_layout, store_record_layout,
};

use crate::assemble::{Assembly, Record, RecordContent};
use crate::{ConversionNote, ConvertOptions, Error, Result, SharedTensors};

/// A data file to be written.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    /// Relative to the target, with the directory of its rank.
    pub(crate) name: String,
    pub(crate) assembly: Assembly,
    /// The tensors of each record of the assembly, by their positions in the source's index.
    pub(crate) tensors: Vec<Vec<usize>>,
}

/// Everything of a target that follows from its source's metadata.
#[derive(Clone, Debug)]
pub(crate) struct Outputs {
    pub(crate) files: Vec<Output>,
    /// Those that make a checkpoint of what is beside them, in the order in which they get their names.
    pub(crate) indexes: Vec<PlannedIndex>,
    /// The directories of ranks; empty unless there are several.
    pub(crate) ranks: Vec<String>,
    pub(crate) notes: Vec<ConversionNote>,
}

/// What is stored once.
struct Stored {
    spec: RecordSpec,
    /// Positions in the source's index, in the order of `spec.tensors`.
    tensors: Vec<usize>,
    content: RecordContent,
}

pub(crate) fn outputs(source: &CheckpointIndex, options: &ConvertOptions) -> Result<Outputs> {
    let mut notes = Vec::new();
    // In the order of the source, so that reading and writing both go forward.
    let mut order: Vec<usize> = (0..source.tensors().len()).collect();
    order.sort_by_key(|&number| {
        let tensor = &source.tensors()[number];
        (tensor.file, tensor.offset)
    });
    let ranks = source.ranks();
    let mut result = Outputs {
        files: Vec::new(),
        indexes: Vec::new(),
        ranks: Vec::new(),
        notes: Vec::new(),
    };
    if options.target.is_serverlessllm() {
        if !source.metadata().is_empty() {
            notes.push(ConversionNote::MetadataDropped {
                target: options.target,
                metadata: source.metadata().clone(),
            });
        }
        let mut overlapping = Overlaps::default();
        let whole: (&str, Range<usize>) = ("", 0..source.files().len());
        let directories: Vec<(&str, Range<usize>)> = match ranks {
            [] => vec![whole],
            ranks => ranks
                .iter()
                .map(|rank| (rank.name.as_str(), rank.files.clone()))
                .collect(),
        };
        for (rank, files) in directories {
            let prefix = match rank {
                "" => String::new(),
                rank => {
                    result.ranks.push(rank.to_owned());
                    format!("{rank}/")
                }
            };
            let of_rank = order
                .iter()
                .copied()
                .filter(|&number| files.contains(&source.tensors()[number].file));
            let stored = shared_records(source, of_rank, &prefix, &mut overlapping);
            let specs: Vec<RecordSpec> = stored.iter().map(|stored| stored.spec.clone()).collect();
            let layout = serverlessllm(&specs, options)?;
            result.add(&prefix, layout, &stored);
        }
        // A set of ranks is one once it has its first.
        result.indexes.reverse();
        notes.extend(overlapping.note());
    } else {
        let (stored, more) = separate_records(source, &order, options)?;
        notes.extend(more);
        if !ranks.is_empty() {
            notes.push(ConversionNote::RanksJoined { ranks: ranks.len() });
        }
        let layout = safetensors(source, &stored, options)?;
        result.add("", layout, &stored);
    }
    result.notes = notes;
    Ok(result)
}

impl Outputs {
    fn add(&mut self, prefix: &str, layout: CheckpointLayout, stored: &[Stored]) {
        for file in layout.files {
            let records = file.tensors.iter().map(|planned| Record {
                at: planned.offset,
                content: stored[planned.tensor].content.clone(),
            });
            self.files.push(Output {
                name: format!("{prefix}{}", file.name),
                tensors: file
                    .tensors
                    .iter()
                    .map(|planned| stored[planned.tensor].tensors.clone())
                    .collect(),
                assembly: Assembly {
                    bytes: file.bytes,
                    records: records.collect(),
                    prefix: file.prefix,
                },
            });
        }
        self.indexes.extend(layout.index.map(|mut index| {
            index.name = format!("{prefix}{}", index.name);
            index
        }));
    }
}

fn serverlessllm(records: &[RecordSpec], options: &ConvertOptions) -> Result<CheckpointLayout> {
    let partition_bytes = options
        .partition_bytes
        .or(NonZero::new(STORE_PARTITION_BYTES))
        .unwrap_or(NonZero::<u64>::MAX);
    let layout = match options.target {
        Format::ServerlessLlmPartitioned => {
            let partitioning = match options.partitions {
                Some(count) => Partitioning::Count(count),
                None => Partitioning::MaxBytes(partition_bytes),
            };
            partitioned_record_layout(records, partitioning)
        }
        _ => store_record_layout(records, partition_bytes.get()),
    };
    layout.map_err(Error::Layout)
}

fn safetensors(
    source: &CheckpointIndex,
    stored: &[Stored],
    options: &ConvertOptions,
) -> Result<CheckpointLayout> {
    let specs: Vec<TensorSpec> = stored
        .iter()
        .flat_map(|stored| &stored.spec.tensors)
        .map(|tensor| TensorSpec {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        })
        .collect();
    let mut metadata = source.metadata().clone();
    metadata.extend(options.metadata.clone());
    let sharding = match (options.shards, options.shard_bytes) {
        (Some(count), _) => Sharding::Count(count),
        (None, limit) => {
            Sharding::MaxBytes(limit.map_or(ConvertOptions::DEFAULT_SHARD_BYTES, NonZero::get))
        }
    };
    let alignment_bytes = options.data_alignment_bytes.unwrap_or(0);
    safetensors_layout(&specs, &metadata, sharding, alignment_bytes).map_err(Error::Layout)
}

/// One record for all tensors that have the same place in the source.
fn shared_records<'a>(
    source: &'a CheckpointIndex,
    order: impl Iterator<Item = usize>,
    prefix: &str,
    overlapping: &mut Overlaps<'a>,
) -> Vec<Stored> {
    let mut records: Vec<Stored> = Vec::new();
    let mut by_place = HashMap::new();
    for number in order {
        let tensor = &source.tensors()[number];
        let view = RecordTensor {
            name: tensor
                .name
                .strip_prefix(prefix)
                .unwrap_or(&tensor.name)
                .to_owned(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            strides: tensor.strides.clone(),
        };
        if tensor.bytes > 0 {
            let place = (tensor.file, tensor.offset, tensor.bytes);
            let record = *by_place.entry(place).or_insert(records.len());
            if let Some(stored) = records.get_mut(record) {
                stored.spec.tensors.push(view);
                stored.tensors.push(number);
                continue;
            }
            overlapping.add(tensor, tensor.range());
        }
        records.push(Stored {
            spec: RecordSpec {
                bytes: tensor.bytes,
                tensors: vec![view],
            },
            tensors: vec![number],
            content: stored_as_is(tensor),
        });
    }
    records
}

/// One record for each tensor, in row-major order.
fn separate_records(
    source: &CheckpointIndex,
    order: &[usize],
    options: &ConvertOptions,
) -> Result<(Vec<Stored>, Vec<ConversionNote>)> {
    let mut records = Vec::with_capacity(order.len());
    let mut strided = Vec::new();
    let mut overlapping = Overlaps::default();
    // By the beginning of what is read, which for views of one storage differs.
    let mut parts = Vec::with_capacity(order.len());
    for &number in order {
        let tensor = &source.tensors()[number];
        let part = TensorPart::whole(tensor).map_err(Error::Layout)?;
        parts.push((number, part));
    }
    parts.sort_by_key(|(_, part)| (part.file(), part.hull().start));
    for (number, part) in parts {
        let tensor = &source.tensors()[number];
        if part.bytes() > 0 {
            overlapping.add(tensor, part.hull());
        }
        let bytes = part.bytes();
        let content = if part.is_contiguous() {
            let range = part.hull();
            RecordContent::Stored {
                file: tensor.file,
                range,
            }
        } else {
            RecordContent::Gathered(Box::new(part))
        };
        if !tensor.is_contiguous() {
            strided.push(tensor.name.clone());
        }
        records.push(Stored {
            spec: RecordSpec {
                bytes,
                tensors: vec![RecordTensor {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                    strides: None,
                }],
            },
            tensors: vec![number],
            content,
        });
    }
    let note = overlapping.note();
    if let Some(ConversionNote::Duplicated { tensors, bytes }) = &note
        && options.shared_tensors == SharedTensors::Refuse
    {
        return Err(Error::SharedTensors {
            tensors: tensors.clone(),
            bytes: *bytes,
        });
    }
    let mut notes: Vec<ConversionNote> = note.into_iter().collect();
    if !strided.is_empty() {
        strided.sort();
        notes.push(ConversionNote::StridesDropped { tensors: strided });
    }
    Ok((records, notes))
}

fn stored_as_is(tensor: &TensorEntry) -> RecordContent {
    RecordContent::Stored {
        file: tensor.file,
        range: tensor.range(),
    }
}

/// Finds ranges of files that overlap, among ranges that come in ascending order.
#[derive(Default)]
struct Overlaps<'a> {
    reached: (usize, u64),
    last: Option<&'a str>,
    tensors: Vec<&'a str>,
    bytes: u64,
}

impl<'a> Overlaps<'a> {
    fn add(&mut self, tensor: &'a TensorEntry, range: Range<u64>) {
        let (file, end) = self.reached;
        if tensor.file == file && range.start < end && self.last.is_some() {
            self.tensors.extend(self.last);
            self.tensors.push(&tensor.name);
            self.bytes += range.end.min(end) - range.start;
        }
        if (tensor.file, range.end) > self.reached || self.last.is_none() {
            self.reached = (tensor.file, range.end);
            self.last = Some(&tensor.name);
        }
    }

    fn note(mut self) -> Option<ConversionNote> {
        self.tensors.sort_unstable();
        self.tensors.dedup();
        (!self.tensors.is_empty()).then(|| ConversionNote::Duplicated {
            tensors: self.tensors.iter().map(|&name| name.to_owned()).collect(),
            bytes: self.bytes,
        })
    }
}
