use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
#[cfg(feature = "mmap")]
use tensora_formats::FileChange;
use tensora_formats::{CheckpointIndex, FileStamp, TensorEntry};
use tensora_heuristics::{AccessPattern, MemoryKind, Plan, StorageLayout, Workload};
use tensora_io::{
    Control, Placement, Platform, ReadRequest, ReadStats, SourceFile, StorageFacts, merge_ranges,
};
#[cfg(feature = "mmap")]
use tensora_io::{Mapping, PopulateParams};

use crate::selection::position;
use crate::sliced::LoadedParts;
use crate::{Checkpoint, Error, LoadReport, Loader, Result, Tensor};

/// Tensors closer together than this in a file are read in one piece. A page: reading one that is not
/// needed costs less than another request, and padding between records is smaller.
const GAP_BYTES: u64 = 4096;

/// A checkpoint whose metadata has been read; tensors are read when asked for.
#[derive(Debug)]
pub struct LazyCheckpoint {
    pub(crate) loader: Loader,
    pub(crate) index: Arc<CheckpointIndex>,
    pub(crate) selected: Vec<usize>,
    files: Vec<LazyFile>,
    /// What was found out of the machine when something was first planned.
    platform: OnceLock<Platform>,
    /// Memory that the index takes.
    pub(crate) index_bytes: u64,
    pub(crate) open_elapsed: Duration,
}

/// A file that is opened, and mapped, when first needed.
#[derive(Debug, Default)]
struct LazyFile {
    source: OnceLock<Arc<SourceFile>>,
    #[cfg(feature = "mmap")]
    mapping: OnceLock<Mapping>,
}

/// When mapped bytes are needed.
#[derive(Clone, Copy)]
pub(crate) enum Use {
    /// All of them, when the load returns.
    Eager,
    /// As the caller comes to them.
    Lazy,
}

/// What one load reads: extents of files, with the tensors that lie in them.
struct Task<'a> {
    tensors: Vec<&'a TensorEntry>,
    files: Vec<FileTask<'a>>,
    workload: Workload,
}

/// A file that is read, by its number, and its extents that are.
pub(crate) struct FileTask<'a> {
    pub(crate) number: usize,
    pub(crate) source: &'a Arc<SourceFile>,
    pub(crate) extents: Vec<Range<u64>>,
}

impl LazyCheckpoint {
    pub(crate) fn open(loader: Loader, path: &Path) -> Result<Self> {
        let begun = Instant::now();
        if let Some((rank, world)) = loader.rank
            && rank >= world
        {
            return Err(Error::NoSuchRank { rank, world });
        }
        let index = loader.open_options.open(path)?;
        let selected = loader.selection.resolve(&index)?;
        let files = index.files().iter().map(|_| LazyFile::default()).collect();
        Ok(Self {
            loader,
            index_bytes: index.memory_bytes(),
            index: Arc::new(index),
            selected,
            files,
            platform: OnceLock::new(),
            open_elapsed: begun.elapsed(),
        })
    }

    /// The metadata of the whole checkpoint.
    pub fn index(&self) -> &CheckpointIndex {
        &self.index
    }

    /// The metadata of the selected tensors, in bytewise order of their names.
    pub fn selected(&self) -> impl ExactSizeIterator<Item = &TensorEntry> {
        self.selected
            .iter()
            .map(|&number| &self.index.tensors()[number])
    }

    /// What [`load_all`](Self::load_all) would do now, and why.
    ///
    /// # Errors
    ///
    /// When a file cannot be opened, or no plan satisfies what was asked for.
    pub fn plan(&self) -> Result<Plan> {
        if self.is_of_parts()? {
            return self.plan_parts();
        }
        self.plan_for(&self.task(&self.selected)?)
    }

    /// Whether tensors are sliced, or read together with other ranks.
    fn is_of_parts(&self) -> Result<bool> {
        if self.loader.share.is_some() && self.loader.rank.is_none() {
            return Err(Error::ShareWithoutRank);
        }
        if self.loader.share.is_some() && cfg!(not(feature = "shared")) {
            return Err(Error::SharingLeftOut);
        }
        Ok(self.loader.share.is_some() || !self.loader.slices.is_empty())
    }

    /// Loads one tensor, selected or not. A mapped one is read ahead, but not waited for.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchTensor`], and what can go wrong with a load.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let number = position(&self.index, name)?;
        let (mut tensors, ..) = self.load_task(&self.task(&[number])?, Use::Lazy)?;
        tensors.pop().ok_or_else(|| Error::NotSelected {
            name: name.to_owned(),
        })
    }

    /// Loads the selected tensors.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn load_all(&self) -> Result<Checkpoint> {
        let begun = Instant::now();
        let loaded = if self.is_of_parts()? {
            self.load_parts()?
        } else {
            let task = self.task(&self.selected)?;
            let (tensors, plan, stats, read_elapsed) = self.load_task(&task, Use::Eager)?;
            LoadedParts {
                tensors,
                plan,
                stats,
                #[cfg(feature = "shared")]
                shared: None,
                read_elapsed,
            }
        };
        let load_elapsed = begun.elapsed();
        let bytes = loaded
            .tensors
            .iter()
            .map(|tensor| tensor.bytes().len() as u64);
        let report = LoadReport {
            format: self.index.format(),
            tensor_count: loaded.tensors.len(),
            data_bytes: bytes.sum(),
            elapsed: self.open_elapsed + load_elapsed,
            open_elapsed: self.open_elapsed,
            plan_elapsed: load_elapsed.saturating_sub(loaded.read_elapsed),
            read_elapsed: loaded.read_elapsed,
            plan: loaded.plan,
            stats: loaded.stats,
            #[cfg(feature = "shared")]
            shared: loaded.shared,
        };
        tracing::debug!(
            elapsed_ms = report.elapsed.as_secs_f64() * 1e3,
            data_bytes = report.data_bytes,
            "loaded"
        );
        Ok(Checkpoint {
            index: Arc::clone(&self.index),
            tensors: loaded.tensors,
            report,
        })
    }

    /// Works out what has to be read for these tensors.
    fn task(&self, numbers: &[usize]) -> Result<Task<'_>> {
        self.loader.check_cancelled()?;
        let tensors: Vec<_> = numbers
            .iter()
            .map(|&number| &self.index.tensors()[number])
            .collect();
        let ranges = tensors.iter().map(|tensor| (tensor.file, tensor.range()));
        let files = self.file_tasks(ranges)?;
        // Headers and padding are the only other bytes of a file that is read as a whole.
        let is_whole = tensors.len() == self.index.tensors().len();
        let workload = self.workload(tensors.len(), is_whole, &files);
        Ok(Task {
            tensors,
            files,
            workload,
        })
    }

    /// The files that hold these ranges, opened, and their extents.
    pub(crate) fn file_tasks(
        &self,
        ranges: impl Iterator<Item = (usize, Range<u64>)>,
    ) -> Result<Vec<FileTask<'_>>> {
        let mut of_files = vec![Vec::new(); self.files.len()];
        for (file, range) in ranges {
            of_files[file].push(range);
        }
        let mut files = Vec::new();
        for (number, ranges) in of_files.into_iter().enumerate() {
            let extents = merge_ranges(ranges, GAP_BYTES);
            if !extents.is_empty() {
                let source = self.source(number)?;
                files.push(FileTask {
                    number,
                    source,
                    extents,
                });
            }
        }
        Ok(files)
    }

    /// In numbers, the reading of these files for so many tensors, which are all there are if it `is_whole`.
    pub(crate) fn workload(
        &self,
        tensors: usize,
        is_whole: bool,
        files: &[FileTask<'_>],
    ) -> Workload {
        let layout = if self.index.format().is_serverlessllm() {
            StorageLayout::ServerlessLlm
        } else {
            StorageLayout::SafeTensors
        };
        let lengths = || {
            let extents = files.iter().flat_map(|file| &file.extents);
            extents.map(|extent| extent.end - extent.start)
        };
        let read_bytes = lengths().sum();
        let file_bytes: u64 = files.iter().map(|file| file.source.len()).sum();
        let access = if is_whole || read_bytes == file_bytes {
            AccessPattern::WholeFiles
        } else {
            AccessPattern::Ranges
        };
        let mut workload = Workload::new(layout, access);
        workload.index_bytes = self.index_bytes;
        workload.files = u32::try_from(files.len()).unwrap_or(u32::MAX);
        workload.tensors = tensors as u64;
        workload.read_bytes = read_bytes;
        workload.requests = lengths().count() as u64;
        workload.largest_request_bytes = lengths().max().unwrap_or(0);
        workload.destination_bytes = files
            .iter()
            .map(|file| Placement::new(file.extents.clone()).bytes())
            .sum();
        workload
    }

    /// Facts about the machine and the storage of these files.
    pub(crate) fn platform(&self, files: &[FileTask<'_>]) -> Platform {
        let mut platform = match self.platform.get() {
            Some(known) => {
                let mut platform = known.clone();
                platform.refresh();
                platform
            }
            None => self.platform.get_or_init(Platform::probe).clone(),
        };
        let files: Vec<&SourceFile> = files.iter().map(|file| &**file.source).collect();
        platform.storage = (!files.is_empty()).then(|| StorageFacts::probe(&files));
        platform.profile = self.loader.profiles.find(&platform);
        platform
    }

    fn plan_for(&self, task: &Task<'_>) -> Result<Plan> {
        let platform = self.platform(&task.files);
        let plan = tensora_heuristics::plan(&task.workload, &platform, &self.loader.policy)?;
        tracing::debug!(backend = %plan.backend, memory = %plan.memory, params = ?plan.params, "planned");
        Ok(plan)
    }

    /// Plans and reads; the time that reading took comes last.
    fn load_task(
        &self,
        task: &Task<'_>,
        used: Use,
    ) -> Result<(Vec<Tensor>, Plan, ReadStats, Duration)> {
        let plan = self.plan_for(task)?;
        let begun = Instant::now();
        let (files, stats) = match plan.memory {
            MemoryKind::Owned => {
                let control = self.loader.control(task.workload.read_bytes);
                self.read(&task.files, &plan, &control)?
            }
            MemoryKind::Mapped => {
                let control = self.loader.control(task.workload.read_bytes);
                let files = self.map(&task.files, &plan, used, &control)?;
                (files, ReadStats::default())
            }
        };
        let tensors = task
            .tensors
            .iter()
            .map(|tensor| Tensor::new(tensor, files.slice(tensor.file, &tensor.range())))
            .collect();
        Ok((tensors, plan, stats, begun.elapsed()))
    }

    /// Reads every extent into memory of its file's own.
    pub(crate) fn read(
        &self,
        files: &[FileTask<'_>],
        plan: &Plan,
        control: &Control,
    ) -> Result<(Loaded, ReadStats)> {
        let backend = self.loader.backend_of(plan.backend)?;
        let placements: Vec<_> = files
            .iter()
            .map(|file| Placement::new(file.extents.clone()))
            .collect();
        let mut regions = placements
            .iter()
            .map(Placement::allocate)
            .collect::<Result<Vec<_>, _>>()?;
        let mut requests = Vec::new();
        for ((placement, region), file) in placements.iter().zip(&mut regions).zip(files) {
            let parts = placement.split(region.as_mut_slice());
            requests.extend(parts.into_iter().map(|(offset, part)| ReadRequest {
                file: file.source,
                offset,
                destination: part.into(),
            }));
        }
        let stats = backend
            .read(requests, &plan.params, control)
            .map_err(|error| name_tensor(&self.index, error))?;
        for file in files {
            self.check_unchanged(file.number, file.source)?;
        }
        for fallback in &stats.fallbacks {
            tracing::warn!(file = %fallback.path.display(), reason = fallback.reason, "read buffered");
        }
        let mut loaded = Loaded::new(self.files.len());
        for ((placement, region), file) in placements.into_iter().zip(regions).zip(files) {
            loaded.0[file.number] = Some((Some(placement), region.into_bytes()));
        }
        Ok((loaded, stats))
    }

    /// Maps every file and brings the extents into memory, or, for lazy use, begins to.
    #[cfg(feature = "mmap")]
    pub(crate) fn map(
        &self,
        files: &[FileTask<'_>],
        plan: &Plan,
        used: Use,
        control: &Control,
    ) -> Result<Loaded> {
        // The planner answers with mapped memory only where consent was given, that is, with a permit.
        let permit = self
            .loader
            .permit
            .ok_or(tensora_heuristics::PlanError::MappedWithoutConsent)?;
        let known_resident = plan
            .platform
            .storage
            .as_ref()
            .is_some_and(StorageFacts::is_resident);
        let mut loaded = Loaded::new(self.files.len());
        for task in files {
            let (file, extents) = (task.source, &task.extents);
            let lazy = &self.files[task.number].mapping;
            let mapping = match lazy.get() {
                Some(mapping) => mapping,
                None => {
                    let made = Mapping::new(file, permit)?;
                    lazy.get_or_init(|| made)
                }
            };
            let mapped_bytes = mapping.len() as u64;
            if extents.iter().any(|extent| extent.end > mapped_bytes) {
                // Shortened between opening and mapping: there is nothing to slice.
                return Err(Error::Changed {
                    path: file.path().to_owned(),
                    change: FileChange::Length {
                        before_bytes: file.len(),
                        now_bytes: mapped_bytes,
                    },
                });
            }
            match used {
                Use::Eager => mapping
                    .populate(
                        file,
                        extents,
                        &PopulateParams {
                            chunk_bytes: plan.params.chunk_bytes,
                            workers: plan.params.workers,
                            known_resident,
                        },
                        control,
                    )
                    .map_err(|error| name_tensor(&self.index, error))?,
                // Whoever asks for one tensor may want a few of its rows: no waiting for the rest.
                Use::Lazy => extents.iter().for_each(|extent| mapping.prefetch(extent)),
            }
            loaded.0[task.number] = Some((None, mapping.bytes()));
        }
        Ok(loaded)
    }

    #[cfg(not(feature = "mmap"))]
    pub(crate) fn map(
        &self,
        _files: &[FileTask<'_>],
        _plan: &Plan,
        _used: Use,
        _control: &Control,
    ) -> Result<Loaded> {
        Err(tensora_heuristics::PlanError::MappedWithoutConsent.into())
    }

    /// The opened file of this number, checked to be the one whose metadata was read.
    pub(crate) fn source(&self, number: usize) -> Result<&Arc<SourceFile>> {
        let lazy = &self.files[number].source;
        if let Some(source) = lazy.get() {
            return Ok(source);
        }
        let source = SourceFile::open(&self.index.files()[number].path)?;
        self.check_unchanged(number, &source)?;
        Ok(lazy.get_or_init(|| Arc::new(source)))
    }

    /// Checks that the files that were opened are still what they were when their metadata was read.
    pub(crate) fn check_opened(&self) -> Result<()> {
        for (number, file) in self.files.iter().enumerate() {
            if let Some(source) = file.source.get() {
                self.check_unchanged(number, source)?;
            }
        }
        Ok(())
    }

    /// Checks on the descriptor that a file is what it was when its metadata was read: before reading, because what is
    /// at its path by now may be another file of the same length, and after, because bytes that somebody wrote
    /// meanwhile are neither the old checkpoint's nor the new one's.
    fn check_unchanged(&self, number: usize, source: &SourceFile) -> Result<()> {
        let entry = &self.index.files()[number];
        let metadata = source
            .file()
            .metadata()
            .map_err(|error| tensora_io::Error::File {
                operation: "stat",
                path: entry.path.clone(),
                source: error,
            })?;
        match entry.stamp.change_until(&FileStamp::new(&metadata)) {
            None => Ok(()),
            Some(change) => Err(Error::Changed {
                path: entry.path.clone(),
                change,
            }),
        }
    }
}

/// Adds the name of the tensor that is stored where reading failed.
pub(crate) fn name_tensor(index: &CheckpointIndex, error: tensora_io::Error) -> Error {
    let place = match &error {
        tensora_io::Error::Read { path, offset, .. } => Some((path, *offset)),
        tensora_io::Error::UnexpectedEof {
            path, actual_end, ..
        } => Some((path, *actual_end)),
        _ => None,
    };
    let tensor = place.and_then(|(path, offset)| {
        let file = index.files().iter().position(|file| &file.path == path)?;
        index
            .tensors()
            .iter()
            .filter(|tensor| tensor.file == file && tensor.range().end > offset)
            .min_by_key(|tensor| tensor.offset)
    });
    match tensor {
        Some(tensor) => Error::Tensor {
            tensor: tensor.name.clone(),
            source: error,
        },
        None => error.into(),
    }
}

/// The memory of each file that was read: with the places of its extents, or, mapped, from its first byte on.
pub(crate) struct Loaded(Vec<Option<(Option<Placement>, Bytes)>>);

impl Loaded {
    fn new(files: usize) -> Self {
        Self((0..files).map(|_| None).collect())
    }

    /// The bytes of a range of a file, one of those that the extents were made of.
    pub(crate) fn slice(&self, file: usize, range: &Range<u64>) -> Bytes {
        let Some((placement, bytes)) = self.0[file].as_ref().filter(|_| !range.is_empty()) else {
            // A tensor without elements needs no memory.
            return Bytes::new();
        };
        let place = match placement {
            Some(placement) => placement.locate(range),
            None => usize::try_from(range.start)
                .ok()
                .zip(usize::try_from(range.end).ok())
                .map(|(start, end)| start..end),
        };
        // Extents are merged from these very ranges.
        bytes.slice(place.expect("the range lies inside an extent"))
    }
}
