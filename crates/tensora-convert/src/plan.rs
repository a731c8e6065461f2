use std::path::{Path, PathBuf};
use std::sync::Arc;

use tensora_formats::{CheckpointIndex, Format, Note, PlannedIndex};
use tensora_io::Control;

use crate::assemble::{
    Assembly, Record, RecordContent, plan_buffers, plan_reading, read_repeatedly,
};
use crate::buffers::Buffers;
use crate::companions::{Companion, companions, left_behind};
use crate::identity;
use crate::journal::Fingerprint;
use crate::outputs::{Output, outputs};
use crate::target::{Kind, check_directory, check_occupancy, or_current};
use crate::{
    Checksums, Companions, ContentDigests, ConversionNote, ConversionReport, ConvertOptions,
    Digest, Error, Kept, Overwrite, Reading, Result, SIDECAR_NAME, TensorDigest, Unfinished,
    Verify, VerifyOptions, run, sidecar, staging,
};

/// Where every byte of a conversion goes, known to have room there. Made by [`ConvertOptions::plan`].
#[derive(Clone, Debug)]
pub struct ConversionPlan {
    pub(crate) source: Arc<CheckpointIndex>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) indexes: Vec<PlannedIndex>,
    pub(crate) companions: Vec<Companion>,
    pub(crate) kind: Kind,
    pub(crate) target: PathBuf,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) checksums: Checksums,
    pub(crate) verify: Verify,
    pub(crate) overwrite: Overwrite,
    pub(crate) unfinished: Unfinished,
    pub(crate) buffers: Buffers,
    pub(crate) memory_limit_bytes: u64,
    /// The tensors that have to be read once more to be digested, by their positions in the source's index:
    /// strided ones that the target stores as they are. Empty where nobody wants digests.
    pub(crate) read_for_digests: Vec<usize>,
    pub(crate) reading: Reading,
    /// The length of the file of checksums; 0 where there is none.
    checksums_bytes: u64,
    free_bytes: Option<u64>,
    pub(crate) notes: Vec<ConversionNote>,
}

/// A file that a conversion writes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedOutput {
    /// Relative to the target directory, with the directory of its rank.
    pub name: String,
    /// What it is for.
    pub kind: OutputKind,
    /// Its length in bytes.
    pub bytes: u64,
    /// How many tensors it holds.
    pub tensors: usize,
    /// Where its data begins, in bytes from its start: after the header.
    pub data_offset: u64,
    /// The largest power of two, at most 1 MiB, that every tensor in it begins at a multiple of, in bytes.
    /// `None` where it has no tensor with data.
    pub alignment_bytes: Option<u64>,
    /// What neither header nor data is, in bytes.
    pub padding_bytes: u64,
}

/// What a file of a target is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutputKind {
    /// Tensor data: a shard or a partition.
    Data,
    /// The index, which says where each tensor is.
    Index,
    /// A copy of a file beside the source.
    Companion,
    /// The digests of all tensors.
    Checksums,
}

impl ConversionPlan {
    pub(crate) fn new(
        source: &CheckpointIndex,
        target: &Path,
        options: &ConvertOptions,
    ) -> Result<Self> {
        options.check()?;
        let outputs = outputs(source, options)?;
        let mut notes = notes_of(source);
        notes.extend(outputs.notes);
        let beside = companions(source.root(), options.companions)?;
        let companions = match options.companions {
            Companions::Copy => beside,
            Companions::Leave => {
                if !beside.is_empty() {
                    notes.push(ConversionNote::CompanionsLeft {
                        files: beside.into_iter().map(|file| file.name).collect(),
                    });
                }
                Vec::new()
            }
        };
        let kind = Kind {
            format: options.target,
            ranks: outputs.ranks,
            companions: companions.iter().map(|file| file.name.clone()).collect(),
        };
        let target = or_current(target).to_owned();
        let free_bytes = check_directory(&target, source, &kind, options)?;
        if options.unfinished == Unfinished::Resume && !staging::is_there(&target)? {
            notes.push(ConversionNote::NothingToResume);
        }

        notes.extend(left_behind(source.root(), &target, options.checksums)?);

        let assemblies: Vec<&Assembly> = outputs.files.iter().map(|file| &file.assembly).collect();
        let buffers = plan_buffers(options.memory_limit_bytes, &assemblies)?;
        notes.extend(read_repeatedly(&assemblies, buffers));
        let read_for_digests = match (options.checksums, options.verify) {
            (Checksums::Omit, Verify::Skip) => Vec::new(),
            _ => not_in_order(source, options.target, &outputs.files),
        };
        notes.extend(plan_reading(
            source,
            &read_for_digests,
            options.memory_limit_bytes,
        )?);
        source.files().iter().try_for_each(identity::check_path)?;
        let fingerprint =
            identity::fingerprint(source, options.target, &outputs.files, &outputs.indexes);
        let checksums_bytes = match options.checksums {
            Checksums::Omit => 0,
            Checksums::Write => checksums_bytes(source)?,
        };
        let plan = Self {
            source: Arc::new(source.clone()),
            outputs: outputs.files,
            indexes: outputs.indexes,
            companions,
            kind,
            target,
            fingerprint,
            checksums: options.checksums,
            verify: options.verify,
            overwrite: options.overwrite,
            unfinished: options.unfinished,
            buffers,
            memory_limit_bytes: options.memory_limit_bytes,
            read_for_digests,
            reading: options.reading.clone(),
            checksums_bytes,
            free_bytes,
            notes,
        };
        plan.check_space()?;
        Ok(plan)
    }

    /// Converts.
    ///
    /// Data passes through a few buffers from threads that read to threads that write, so that reading and
    /// writing overlap; both go past the page cache where that works and the data is not in memory
    /// already. All files are written in a directory of their own inside the target, synced, and get their
    /// names when all of them are complete, the index last.
    ///
    /// `control` watches the bytes that have been read, which add up to [`work_bytes`](Self::work_bytes),
    /// and stops the conversion.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::SourceChanged`] and [`Error::Companion`] for the source;
    /// [`Error::DiskFull`], [`Error::FileTooLarge`], [`Error::Target`], [`Error::Write`],
    /// [`Error::TargetOccupied`], [`Error::OtherCheckpoint`], [`Error::TargetBusy`],
    /// [`Error::CannotResume`] for the target; [`Error::NotAsRead`] and [`Error::PlacedNotAsRead`] when
    /// verifying finds a difference; [`Error::Thread`]; [`Error::Cancelled`]. Files that are finished by then are kept, and
    /// [`Unfinished::Resume`] goes on from there; [`kept`](Self::kept) tells how many. Where there are none,
    /// whatever was written is removed. A checkpoint that was to be replaced is still there, unless giving
    /// files their names had begun.
    ///
    /// # Panics
    ///
    /// A panic of the progress callback is passed on, after what was written has been tidied up as above.
    pub fn run(&self, control: &Control) -> Result<ConversionReport> {
        run::run(self, control)
    }

    /// The format of the source.
    pub fn source_format(&self) -> Format {
        self.source.format()
    }

    /// The format of the target.
    pub fn target_format(&self) -> Format {
        self.kind.format
    }

    /// The directory that the checkpoint will be in.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The files to be written: data, companions and checksums, indexes.
    pub fn files(&self) -> Vec<PlannedOutput> {
        let plain = |name: &str, kind, bytes| PlannedOutput {
            name: name.to_owned(),
            kind,
            bytes,
            tensors: 0,
            data_offset: 0,
            alignment_bytes: None,
            padding_bytes: 0,
        };
        let data = self.outputs.iter().map(|output| {
            let assembly = &output.assembly;
            let records = || assembly.records.iter().filter(|record| record.bytes() > 0);
            let prefix_bytes = assembly.prefix.len() as u64;
            let covered_bytes: u64 = records().map(Record::bytes).sum();
            PlannedOutput {
                tensors: output.tensors.iter().map(Vec::len).sum(),
                data_offset: prefix_bytes,
                alignment_bytes: records()
                    .map(|record| 1 << record.at.trailing_zeros().min(20))
                    .min(),
                padding_bytes: assembly.bytes - prefix_bytes - covered_bytes,
                ..plain(&output.name, OutputKind::Data, assembly.bytes)
            }
        });
        let companions = self
            .companions
            .iter()
            .map(|file| plain(&file.name, OutputKind::Companion, file.bytes));
        let checksums = (self.checksums == Checksums::Write)
            .then(|| plain(SIDECAR_NAME, OutputKind::Checksums, self.checksums_bytes));
        let indexes = self
            .indexes
            .iter()
            .map(|index| plain(&index.name, OutputKind::Index, index.contents.len() as u64));
        data.chain(companions)
            .chain(checksums)
            .chain(indexes)
            .collect()
    }

    /// How many tensors are converted.
    pub fn tensors(&self) -> usize {
        self.source.tensors().len()
    }

    /// The data of all tensors as the target stores it, in bytes. What tensors share there counts once.
    pub fn data_bytes(&self) -> u64 {
        self.outputs
            .iter()
            .flat_map(|output| &output.assembly.records)
            .fold(0, |sum, record| sum.saturating_add(record.bytes()))
    }

    /// What [`run`](Self::run) reports as progress in the end, in bytes: the data, and what verifying it
    /// reads.
    pub fn work_bytes(&self) -> u64 {
        let verified_bytes = match self.verify {
            Verify::Skip => 0,
            Verify::ReadBack => VerifyOptions::work_bytes(&self.source),
        };
        self.data_bytes().saturating_add(verified_bytes)
    }

    /// The files of the target together, with index and padding, in bytes: what is written.
    pub fn target_bytes(&self) -> u64 {
        self.files()
            .iter()
            .fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// The padding between and after records, in bytes.
    pub fn padding_bytes(&self) -> u64 {
        self.files().iter().map(|file| file.padding_bytes).sum()
    }

    /// What the target's file system had free when the plan was made, in bytes, where it says so.
    pub fn free_bytes(&self) -> Option<u64> {
        self.free_bytes
    }

    /// What the target will lack, and what else a user may want to know beforehand.
    pub fn notes(&self) -> &[ConversionNote] {
        &self.notes
    }

    /// What an interrupted conversion has left in the target to be resumed, looked up now.
    ///
    /// # Errors
    ///
    /// [`Error::Target`] when its journal cannot be read.
    pub fn kept(&self) -> Result<Kept> {
        staging::kept(&self.target)
    }

    /// The files in the target that are gone once the conversion is complete, replaced or removed, and the
    /// directories of ranks that there are no more, each relative to the target, looked up now. There are none
    /// unless [`Overwrite::Replace`] was said, or an interrupted conversion has begun to put its files in place:
    /// then these are among them.
    ///
    /// # Errors
    ///
    /// [`Error::OtherCheckpoint`], [`Error::NotReplaceable`], [`Error::TargetIsSource`] and [`Error::Target`] for
    /// what has come to be in the target since the plan was made.
    pub fn replaced_files(&self) -> Result<Vec<PathBuf>> {
        if !self.target.is_dir() {
            return Ok(Vec::new());
        }
        let replaced = check_occupancy(&self.target, &self.source, &self.kind, Overwrite::Replace)?;
        let mut names = replaced.files;
        names.extend(replaced.directories);
        Ok(names)
    }

    fn check_space(&self) -> Result<()> {
        // What is finished takes its space already.
        let kept_bytes = match self.unfinished {
            Unfinished::Refuse => 0,
            Unfinished::Resume | Unfinished::Discard => self.kept()?.bytes,
        };
        let needed_bytes = self.target_bytes().saturating_sub(kept_bytes);
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

/// What the source's index has to say that a conversion does not say itself.
fn notes_of(source: &CheckpointIndex) -> Vec<ConversionNote> {
    source
        .notes()
        .iter()
        .filter(|note| !matches!(note, Note::NotContiguous { .. } | Note::SharedBytes { .. }))
        .cloned()
        .map(ConversionNote::Source)
        .collect()
}

/// The tensors whose elements the target does not store in row-major order.
fn not_in_order(source: &CheckpointIndex, target: Format, outputs: &[Output]) -> Vec<usize> {
    outputs
        .iter()
        .flat_map(|output| output.assembly.records.iter().zip(&output.tensors))
        .filter(|(record, _)| record.bytes() > 0)
        .flat_map(|(record, tensors)| tensors.iter().map(move |&tensor| (record, tensor)))
        .filter(|(record, tensor)| !stored_in_order(source, target, *tensor, record))
        .map(|(_, tensor)| tensor)
        .collect()
}

/// Whether a record of the target holds this tensor's elements in row-major order.
pub(crate) fn stored_in_order(
    source: &CheckpointIndex,
    target: Format,
    tensor: usize,
    record: &Record,
) -> bool {
    matches!(record.content, RecordContent::Gathered(_))
        || source.tensors()[tensor].is_contiguous()
        || target == Format::Safetensors
}

/// How large the file of checksums becomes: all digests are equally long.
fn checksums_bytes(source: &CheckpointIndex) -> Result<u64> {
    let digest = Digest::from_bytes([0; 32]);
    let tensors = source.tensors().iter().map(|tensor| {
        let digest = TensorDigest {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            digest,
        };
        (tensor.name.clone(), digest)
    });
    let digests = ContentDigests::new(tensors.collect())?;
    Ok(sidecar::sidecar(&digests).len() as u64)
}
