use std::num::NonZero;
use std::path::{Path, PathBuf};

use tensora_formats::{
    CheckpointIndex, CheckpointLayout, FileEntry, Format, STORE_PARTITION_BYTES, TensorEntry,
    TensorSpec, partitioned_layout, store_layout,
};
use tensora_io::{Control, Platform};

use crate::copy::{self, Buffers, Place};
use crate::target::{check_directory, or_current};
use crate::{ConversionNote, ConversionReport, ConvertOptions, Error, Overwrite, Result};

/// Where every byte of a conversion goes, known to have room there. Made by [`ConvertOptions::plan`].
#[derive(Clone, Debug)]
pub struct ConversionPlan {
    pub(crate) source_files: Vec<FileEntry>,
    /// Where the data of each tensor of the layout comes from.
    pub(crate) places: Vec<Place>,
    pub(crate) target: PathBuf,
    pub(crate) layout: CheckpointLayout,
    pub(crate) overwrite: Overwrite,
    pub(crate) buffers: Buffers,
    source_format: Format,
    free_bytes: Option<u64>,
    notes: Vec<ConversionNote>,
}

impl ConversionPlan {
    pub(crate) fn new(
        source: &CheckpointIndex,
        target: &Path,
        options: &ConvertOptions,
    ) -> Result<Self> {
        if source.format() != Format::Safetensors || !options.target.is_serverlessllm() {
            return Err(Error::UnsupportedDirection {
                from: source.format(),
                to: options.target,
            });
        }
        options.check()?;

        // In the order of the source, so that reading and writing both go forward.
        let mut tensors: Vec<&TensorEntry> = source.tensors().iter().collect();
        tensors.sort_by_key(|tensor| (tensor.file, tensor.offset));
        let specs: Vec<TensorSpec> = tensors
            .iter()
            .map(|tensor| TensorSpec {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
            })
            .collect();
        let layout = layout(&specs, source.data_bytes(), options)?;

        let target = or_current(target).to_owned();
        let free_bytes = check_directory(&target, source, options.target, options.overwrite)?;
        let file_bytes: Vec<u64> = layout.files.iter().map(|file| file.bytes).collect();
        let memory = Platform::probe().memory;
        let buffers = Buffers::plan(options.memory_limit_bytes, &file_bytes, &memory)?;
        let mut notes = Vec::new();
        if !source.metadata().is_empty() {
            notes.push(ConversionNote::MetadataDropped {
                target: options.target,
                metadata: source.metadata().clone(),
            });
        }
        let plan = Self {
            source_files: source.files().to_vec(),
            places: tensors
                .iter()
                .map(|tensor| Place {
                    file: tensor.file,
                    offset: tensor.offset,
                })
                .collect(),
            target,
            layout,
            overwrite: options.overwrite,
            buffers,
            source_format: source.format(),
            free_bytes,
            notes,
        };
        plan.check_space()?;
        Ok(plan)
    }

    /// Converts.
    ///
    /// Data is read with direct I/O where that works and the data is not in memory already, and passes
    /// through a few buffers to a writer, so that reading and writing overlap. All files are written
    /// under temporary names, synced, and renamed when all of them are complete, the index last.
    ///
    /// `control` watches the bytes that have been read, which add up to
    /// [`data_bytes`](Self::data_bytes), and stops the conversion.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] and [`Error::SourceChanged`] for the source; [`Error::DiskFull`], [`Error::FileTooLarge`],
    /// [`Error::Target`], [`Error::LeftOver`], [`Error::TargetOccupied`] and
    /// [`Error::OtherCheckpoint`] for the target; [`Error::Thread`]; [`Error::Cancelled`]. Whatever was
    /// written is removed before any of them is returned. A checkpoint that was to be replaced is
    /// still there, unless renaming itself failed.
    ///
    /// # Panics
    ///
    /// A panic of the progress callback is passed on, after what was written has been removed.
    pub fn run(&self, control: &Control) -> Result<ConversionReport> {
        copy::run(self, control)
    }

    /// The format of the source.
    pub fn source_format(&self) -> Format {
        self.source_format
    }

    /// The format of the target.
    pub fn target_format(&self) -> Format {
        self.layout.format
    }

    /// The directory that the checkpoint will be in.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The files to be written, with the place of each tensor. Positions of tensors count in the order
    /// in which the source stores them.
    pub fn layout(&self) -> &CheckpointLayout {
        &self.layout
    }

    /// How many tensors are converted.
    pub fn tensors(&self) -> usize {
        self.places.len()
    }

    /// The data of all tensors together, in bytes: what is read.
    pub fn data_bytes(&self) -> u64 {
        self.layout
            .files
            .iter()
            .flat_map(|file| &file.tensors)
            .map(|tensor| tensor.bytes)
            .sum()
    }

    /// The files of the target together, with index and padding, in bytes: what is written.
    pub fn target_bytes(&self) -> u64 {
        let index = self.layout.index.as_ref();
        let index_bytes = index.map_or(0, |index| index.contents.len() as u64);
        self.layout
            .files
            .iter()
            .fold(index_bytes, |sum, file| sum.saturating_add(file.bytes))
    }

    /// The padding between and after records, in bytes.
    pub fn padding_bytes(&self) -> u64 {
        let files = &self.layout.files;
        let of_files: u64 = files
            .iter()
            .map(|file| file.bytes - file.prefix.len() as u64)
            .sum();
        of_files - self.data_bytes()
    }

    /// What the target's file system had free when the plan was made, in bytes, where it says so.
    pub fn free_bytes(&self) -> Option<u64> {
        self.free_bytes
    }

    /// What the target will lack, and what else a user may want to know beforehand.
    pub fn notes(&self) -> &[ConversionNote] {
        &self.notes
    }

    fn check_space(&self) -> Result<()> {
        let needed_bytes = self.target_bytes();
        match self.free_bytes {
            Some(free_bytes) if free_bytes < needed_bytes => Err(Error::NotEnoughSpace {
                path: self.target.clone(),
                needed_bytes,
                free_bytes,
            }),
            _ => Ok(()),
        }
    }
}

fn layout(
    specs: &[TensorSpec],
    data_bytes: u64,
    options: &ConvertOptions,
) -> Result<CheckpointLayout> {
    let layout = match options.target {
        Format::ServerlessLlmPartitioned => {
            let default = || {
                u32::try_from(data_bytes.div_ceil(STORE_PARTITION_BYTES))
                    .ok()
                    .and_then(NonZero::new)
                    .unwrap_or(NonZero::<u32>::MIN)
            };
            partitioned_layout(specs, options.partitions.unwrap_or_else(default))
        }
        _ => store_layout(
            specs,
            options
                .partition_bytes
                .map_or(STORE_PARTITION_BYTES, NonZero::get),
        ),
    };
    layout.map_err(Error::Layout)
}
