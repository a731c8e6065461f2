//! Moving the data: a reader fills buffers, a writer empties them.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Instant;

use tensora_formats::{FileEntry, PlannedFile};
use tensora_io::{
    Backend, BackendKind, Control, DirectFallback, DirectPolicy, MemoryFacts, MemorySource,
    ReadRequest, Region, SourceFile, TransferParams, backend,
};

use crate::target::{Staging, check_occupancy, file_size_limit_bytes, free_bytes, refused};
use crate::{ConversionNote, ConversionPlan, ConversionReport, ConvertOptions, Error, Result};

/// One buffer is filled and one emptied, and each side may run one ahead.
const BUFFERS: u64 = 4;
/// About 16 MiB in flight saturate the devices that were measured; twice that makes the
/// pauses between buffers short.
const MAX_BUFFER_BYTES: u64 = 32 << 20;
/// Reads of one buffer: enough in flight, of a size that devices like.
const READ_CHUNK_BYTES: u64 = 1 << 20;
/// Threads that read one buffer.
const READ_WORKERS: u32 = 16;
/// Direct reads go straight into memory whose address is congruent to the file offset modulo the
/// device's alignment, which is this or a divisor of it on all common devices; regions begin on it.
const ALIGNMENT_BYTES: u64 = 4 << 10;

/// Where the data of a tensor begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// The position of the file among the source's files.
    pub(crate) file: usize,
    /// In bytes, from the start of that file.
    pub(crate) offset: u64,
}

/// Carries out a plan.
pub(crate) fn run(plan: &ConversionPlan, control: &Control) -> Result<ConversionReport> {
    let start = Instant::now();
    control.check().map_err(Error::reading)?;
    let sources = plan
        .source_files
        .iter()
        .map(open_source)
        .collect::<Result<Vec<_>>>()?;
    let mut staging = Staging::new(&plan.target)?;
    check_occupancy(&plan.target, plan.layout.format, plan.overwrite)?;

    let fallbacks = copy(plan, &sources, &mut staging, control)?;
    for (source, entry) in sources.iter().zip(&plan.source_files) {
        let actual_bytes = source.current_len().map_err(Error::reading)?;
        check_length(entry, actual_bytes)?;
    }
    if let Some(index) = &plan.layout.index {
        let (mut file, path) = staging.create(&index.name)?;
        file.write_all(&index.contents)
            .and_then(|()| file.sync_all())
            .map_err(|error| write_error(&path, index.contents.len() as u64, error))?;
    }
    control.check().map_err(Error::reading)?;
    // Again, because a long time may have passed.
    let replaced = check_occupancy(&plan.target, plan.layout.format, plan.overwrite)?;
    staging.commit(&replaced)?;

    let mut notes = plan.notes().to_vec();
    notes.extend(fallbacks.into_iter().map(buffered_note));
    Ok(ConversionReport {
        files: plan.layout.files.len() + usize::from(plan.layout.index.is_some()),
        tensors: plan.tensors(),
        data_bytes: plan.data_bytes(),
        target_bytes: plan.target_bytes(),
        buffer_bytes: plan.buffers.total_bytes(),
        elapsed: start.elapsed(),
        notes,
    })
}

fn buffered_note(fallback: DirectFallback) -> ConversionNote {
    ConversionNote::ReadBuffered {
        path: fallback.path,
        reason: fallback.reason,
    }
}

fn open_source(entry: &FileEntry) -> Result<SourceFile> {
    let source = SourceFile::open(&entry.path).map_err(Error::reading)?;
    check_length(entry, source.len())?;
    Ok(source)
}

/// Checks that a file is still as long as its index was validated against.
fn check_length(entry: &FileEntry, actual_bytes: u64) -> Result<()> {
    if actual_bytes == entry.bytes {
        return Ok(());
    }
    Err(Error::SourceChanged {
        path: entry.path.clone(),
        expected_bytes: entry.bytes,
        actual_bytes,
    })
}

/// The buffers that all data passes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffers {
    count: u64,
    /// How much of a target file passes through one of them; a multiple of the alignment.
    bytes: u64,
}

impl Buffers {
    /// What is good for target files of these lengths, within the limit and within what the machine
    /// leaves to this process.
    pub(crate) fn plan(limit_bytes: u64, file_bytes: &[u64], memory: &MemoryFacts) -> Result<Self> {
        let wanted = Self::within(limit_bytes, file_bytes);
        let Some((available_bytes, source)) = memory.usable_bytes() else {
            return Ok(wanted);
        };
        // The other half is for threads, metadata, and whoever else takes from it meanwhile.
        let room_bytes = available_bytes / 2;
        if wanted.total_bytes() <= room_bytes {
            return Ok(wanted);
        }
        if room_bytes < ConvertOptions::MIN_MEMORY_LIMIT_BYTES {
            let least_bytes = wanted
                .total_bytes()
                .min(ConvertOptions::MIN_MEMORY_LIMIT_BYTES);
            return Err(Error::NotEnoughMemory {
                needed_bytes: 2 * least_bytes,
                available_bytes,
                remedy: match source {
                    MemorySource::ControlGroup => "raise the control group's memory limit",
                    MemorySource::AddressSpace | MemorySource::Data => {
                        "raise the limits of the process (ulimit -v, ulimit -d)"
                    }
                    _ => "free memory on the machine",
                },
            });
        }
        let shrunk = Self::within(room_bytes, file_bytes);
        tracing::debug!(
            available_bytes,
            buffer_bytes = shrunk.total_bytes(),
            "memory is short, so buffers are smaller"
        );
        Ok(shrunk)
    }

    /// As many and as large as the limit allows and the files can use.
    fn within(limit_bytes: u64, file_bytes: &[u64]) -> Self {
        // Room in front, by which data moves to be congruent with its source.
        let usable = (limit_bytes / BUFFERS).saturating_sub(ALIGNMENT_BYTES);
        let allowed = (usable - usable % ALIGNMENT_BYTES).min(MAX_BUFFER_BYTES);
        let largest = file_bytes.iter().copied().max().unwrap_or(0);
        let useful = largest.min(MAX_BUFFER_BYTES);
        let bytes = useful
            .next_multiple_of(ALIGNMENT_BYTES)
            .min(allowed)
            .max(ALIGNMENT_BYTES);
        let uses = file_bytes.iter().fold(0, |sum: u64, file| {
            sum.saturating_add(file.div_ceil(bytes).max(1))
        });
        Self {
            count: uses.clamp(1, BUFFERS),
            bytes,
        }
    }

    /// What they take together.
    fn total_bytes(self) -> u64 {
        self.count * (self.bytes + ALIGNMENT_BYTES)
    }
}

/// A buffer on its way to the writer.
struct Filled {
    region: Region,
    /// Where in the region the bytes to be written are.
    bytes: Range<usize>,
    /// The target file that they follow the bytes written so far in.
    file: usize,
    ends_file: bool,
}

/// Writes all data files and syncs them. Returns the files that could not be read directly.
fn copy(
    plan: &ConversionPlan,
    sources: &[SourceFile],
    staging: &mut Staging,
    control: &Control,
) -> Result<Vec<DirectFallback>> {
    let Buffers { count, bytes } = plan.buffers;
    let backend = backend(BackendKind::Sync).map_err(Error::reading)?;
    let mut reader = Reader {
        plan,
        sources,
        backend: &*backend,
        control,
        fallbacks: Vec::new(),
    };
    let (empty_sender, empty_receiver) = mpsc::channel();
    for _ in 0..count {
        let length = usize::try_from(bytes + ALIGNMENT_BYTES).unwrap_or(usize::MAX);
        let region = Region::allocate(length).map_err(Error::reading)?;
        // The receiver is right here.
        let _ = empty_sender.send(region);
    }
    let (filled_sender, filled_receiver) = mpsc::channel();

    thread::scope(|scope| {
        let writer = thread::Builder::new()
            .name("tensora-write".to_owned())
            .spawn_scoped(scope, move || {
                write(plan, staging, &filled_receiver, &empty_sender, control)
            })
            .map_err(|source| Error::Thread { source })?;
        // Owned in here, because the writer ends when it is dropped, also by a panic of the reader.
        let filled = filled_sender;
        let read = reader.read_all(bytes, &empty_receiver, &filled);
        drop(filled);
        let written = writer.join().unwrap_or_else(|panic| resume_unwind(panic));
        // A reader that stopped early because the writer did has no error of its own.
        read.and(written)
    })?;
    Ok(reader.fallbacks)
}

/// Fills buffers with what the target files are to contain.
struct Reader<'a> {
    plan: &'a ConversionPlan,
    sources: &'a [SourceFile],
    backend: &'a dyn Backend,
    control: &'a Control,
    fallbacks: Vec<DirectFallback>,
}

/// A part of a tensor that passes through one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    /// The position of the tensor in the layout.
    tensor: usize,
    /// Where the part begins within the tensor's data.
    skipped: u64,
    /// Where it begins within the extent of the target file.
    at: u64,
    len: u64,
}

impl Reader<'_> {
    /// Sends all target files through the buffers, one after the other; each takes at least one.
    fn read_all(
        &mut self,
        buffer_bytes: u64,
        empty: &Receiver<Region>,
        filled: &Sender<Filled>,
    ) -> Result<()> {
        for (file, planned) in self.plan.layout.files.iter().enumerate() {
            let mut begin = 0;
            loop {
                let end = planned.bytes.min(begin + buffer_bytes);
                let ends_file = end == planned.bytes;
                // The writer has stopped if nothing comes back from it.
                let Ok(mut region) = empty.recv() else {
                    return Ok(());
                };
                let bytes = self.fill(planned, begin..end, &mut region)?;
                let sent = filled.send(Filled {
                    region,
                    bytes,
                    file,
                    ends_file,
                });
                if sent.is_err() {
                    return Ok(());
                }
                if ends_file {
                    break;
                }
                begin = end;
            }
        }
        Ok(())
    }

    /// Fills a buffer with the bytes of an extent, and returns where in the buffer they are.
    fn fill(
        &mut self,
        planned: &PlannedFile,
        extent: Range<u64>,
        region: &mut Region,
    ) -> Result<Range<usize>> {
        self.control.check().map_err(Error::reading)?;
        let pieces = pieces(planned, &extent);
        // One shift serves the whole buffer, and the largest piece has most to gain.
        let largest = pieces.iter().max_by_key(|piece| piece.len);
        let shift = largest.map_or(0, |piece| {
            let offset = self.plan.places[piece.tensor].offset + piece.skipped;
            offset.wrapping_sub(piece.at) % ALIGNMENT_BYTES
        });
        let bytes = index(shift)..index(shift + (extent.end - extent.start));

        let mut requests = Vec::with_capacity(pieces.len());
        let mut rest = &mut region.as_mut_slice()[bytes.clone()];
        let mut filled = 0;
        for piece in &pieces {
            let (gap, after) = rest.split_at_mut(index(piece.at - filled));
            fill_gap(gap, &planned.prefix, extent.start + filled);
            let (destination, after) = after.split_at_mut(index(piece.len));
            let place = self.plan.places[piece.tensor];
            requests.push(ReadRequest {
                file: &self.sources[place.file],
                offset: place.offset + piece.skipped,
                destination: destination.into(),
            });
            rest = after;
            filled = piece.at + piece.len;
        }
        fill_gap(rest, &planned.prefix, extent.start + filled);

        let params = TransferParams {
            chunk_bytes: READ_CHUNK_BYTES,
            queue_depth: 1,
            workers: READ_WORKERS,
            direct: self.direct_policy(largest),
            resident: tensora_io::ResidentPolicy::Reread,
        };
        let stats = self
            .backend
            .read(requests, &params, self.control)
            .map_err(Error::reading)?;
        for fallback in stats.fallbacks {
            if !self.fallbacks.contains(&fallback) {
                self.fallbacks.push(fallback);
            }
        }
        Ok(bytes)
    }

    /// Reading from the device what is in the page cache would be a waste.
    fn direct_policy(&self, largest: Option<&Piece>) -> DirectPolicy {
        let is_resident = largest.is_some_and(|piece| {
            let place = self.plan.places[piece.tensor];
            let begin = place.offset + piece.skipped;
            self.sources[place.file]
                .resident_bytes(begin..begin + piece.len)
                .is_some_and(|resident| resident >= piece.len / 2)
        });
        if is_resident {
            DirectPolicy::Never
        } else {
            DirectPolicy::Preferred
        }
    }
}

/// The parts of tensors in an extent of a target file, in ascending order.
fn pieces(planned: &PlannedFile, extent: &Range<u64>) -> Vec<Piece> {
    // Those that end before the extent; tensors ascend, so they come first.
    let first = planned
        .tensors
        .partition_point(|tensor| tensor.offset + tensor.bytes <= extent.start);
    planned.tensors[first..]
        .iter()
        .take_while(|tensor| tensor.offset < extent.end)
        .filter(|tensor| tensor.bytes > 0)
        .map(|tensor| {
            let begin = tensor.offset.max(extent.start);
            let end = (tensor.offset + tensor.bytes).min(extent.end);
            Piece {
                tensor: tensor.tensor,
                skipped: begin - tensor.offset,
                at: begin - extent.start,
                len: end - begin,
            }
        })
        .collect()
}

/// Fills what no tensor covers, which begins at `offset` of the target file: with the file's prefix,
/// and with zeros after it. The buffer still holds what it was used for before.
fn fill_gap(gap: &mut [u8], prefix: &[u8], offset: u64) {
    let prefix_left = usize::try_from(offset)
        .ok()
        .and_then(|offset| prefix.get(offset..))
        .unwrap_or_default();
    let (prefix_part, padding) = gap.split_at_mut(gap.len().min(prefix_left.len()));
    prefix_part.copy_from_slice(&prefix_left[..prefix_part.len()]);
    padding.fill(0);
}

/// A number of bytes within a buffer, which fits because the buffer does.
#[allow(clippy::cast_possible_truncation)]
fn index(bytes: u64) -> usize {
    bytes as usize
}

/// Writes buffers as they come, one file after the other, and sends them back.
fn write(
    plan: &ConversionPlan,
    staging: &mut Staging,
    filled: &Receiver<Filled>,
    empty: &Sender<Region>,
    control: &Control,
) -> Result<()> {
    let mut left_bytes = plan.target_bytes();
    let mut current: Option<(File, PathBuf)> = None;
    for Filled {
        region,
        bytes,
        file,
        ends_file,
    } in filled
    {
        control.check().map_err(Error::reading)?;
        let (file, path) = match &mut current {
            Some(current) => current,
            None => current.insert(staging.create(&plan.layout.files[file].name)?),
        };
        file.write_all(&region.as_slice()[bytes.clone()])
            .map_err(|error| write_error(path, left_bytes, error))?;
        left_bytes -= bytes.len() as u64;
        // The reader is done, or has failed, if it takes no more buffers.
        let _ = empty.send(region);
        if ends_file {
            // Errors of delayed writing come to light here, a full device among them.
            file.sync_all()
                .map_err(|error| write_error(path, left_bytes, error))?;
            current = None;
        }
    }
    Ok(())
}

/// Why a file could not be written, and how much was left to write.
fn write_error(path: &Path, needed_bytes: u64, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull {
            path: path.to_owned(),
            needed_bytes,
            free_bytes: path
                .parent()
                .and_then(|directory| free_bytes(directory).ok().flatten()),
            source,
        },
        io::ErrorKind::FileTooLarge => Error::FileTooLarge {
            path: path.to_owned(),
            limit_bytes: file_size_limit_bytes(),
            source,
        },
        _ => refused(path, "write")(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tensora_formats::{CheckpointIndex, Dtype, Format, TensorSpec, store_layout};
    use tensora_io::ReadStats;

    #[test]
    fn a_full_device_is_told_from_other_failures() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tensor.data_0");
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let error = write_error(&path, 12_345, kind.into());
            let text = error.to_string();
            assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
            assert!(text.contains("tensor.data_0"), "{text}");
            assert!(text.contains("12345 bytes"), "{text}");
            assert_eq!(text.contains(" free)"), cfg!(unix), "{text}");
        }
        let error = write_error(&path, 12_345, io::ErrorKind::FileTooLarge.into());
        let text = error.to_string();
        assert!(matches!(error, Error::FileTooLarge { .. }), "{error:?}");
        assert!(
            text.contains("tensor.data_0") && text.contains("ulimit -f"),
            "{text}"
        );
        let error = write_error(&path, 12_345, io::ErrorKind::PermissionDenied.into());
        assert!(
            matches!(
                error,
                Error::Target {
                    operation: "write",
                    ..
                }
            ),
            "{error:?}"
        );
    }

    #[test]
    fn a_gap_is_prefix_and_then_zeros() {
        let gap = |offset, len| {
            let mut gap = vec![9; len];
            fill_gap(&mut gap, b"prefix", offset);
            gap
        };
        assert_eq!(gap(0, 8), b"prefix\0\0");
        assert_eq!(gap(4, 4), b"ix\0\0");
        assert_eq!(gap(2, 2), b"ef");
        assert_eq!(gap(6, 2), [0, 0]);
        assert_eq!(gap(1 << 40, 3), [0, 0, 0]);
    }

    /// Reads nothing, and says of every file that it went through the page cache.
    #[derive(Debug)]
    struct Buffered;

    impl Backend for Buffered {
        fn kind(&self) -> BackendKind {
            BackendKind::Sync
        }

        fn read(
            &self,
            requests: Vec<ReadRequest<'_>>,
            _: &TransferParams,
            _: &Control,
        ) -> tensora_io::Result<ReadStats> {
            let mut stats = ReadStats::default();
            stats.fallbacks = requests
                .iter()
                .map(|request| DirectFallback {
                    path: request.file.path().to_owned(),
                    reason: "no alignment is known".to_owned(),
                })
                .collect();
            Ok(stats)
        }
    }

    #[test]
    fn a_file_read_buffered_is_noted_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let header = br#"{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.extend_from_slice(&[7; 64]);
        std::fs::write(&path, file).unwrap();
        let source = CheckpointIndex::open(&path).unwrap();
        let plan = ConvertOptions::new(Format::ServerlessLlmStore)
            .plan(&source, directory.path().join("target"))
            .unwrap();

        let mut reader = Reader {
            plan: &plan,
            sources: &[SourceFile::open(&path).unwrap()],
            backend: &Buffered,
            control: &Control::new(),
            fallbacks: Vec::new(),
        };
        let mut region = Region::allocate(2 * index(ALIGNMENT_BYTES)).unwrap();
        for extent in [0..32, 32..64] {
            reader
                .fill(&plan.layout.files[0], extent, &mut region)
                .unwrap();
        }
        let notes: Vec<String> = reader
            .fallbacks
            .into_iter()
            .map(|fallback| buffered_note(fallback).to_string())
            .collect();
        let expected = format!(
            "{} was read buffered: no alignment is known",
            path.display()
        );
        assert_eq!(notes, [expected]);
    }

    #[test]
    fn buffers_are_no_larger_than_the_data() {
        let unknown = MemoryFacts::default();
        let buffers = Buffers::plan(256 << 20, &[418 << 10], &unknown).unwrap();
        assert_eq!(
            buffers.total_bytes(),
            (418 << 10) + 2 * 1024 + ALIGNMENT_BYTES
        );
        let buffers = Buffers::plan(256 << 20, &[1 << 40], &unknown).unwrap();
        assert_eq!(
            buffers.total_bytes(),
            BUFFERS * (MAX_BUFFER_BYTES + ALIGNMENT_BYTES)
        );
    }

    #[test]
    fn too_little_memory_is_refused_with_the_numbers() {
        let mut memory = MemoryFacts::default();
        memory.available_bytes = Some(1 << 30);
        memory.cgroup_available_bytes = Some(1 << 20);
        let error = Buffers::plan(256 << 20, &[1 << 40], &memory).unwrap_err();
        let text = error.to_string();
        for part in ["2097152", "1048576", "control group"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // What is small needs little.
        let buffers = Buffers::plan(256 << 20, &[100_000], &memory).unwrap();
        assert!(buffers.total_bytes() < 1 << 19);
    }

    proptest! {
        #[test]
        fn all_buffers_together_stay_within_the_limit(
            limit in ConvertOptions::MIN_MEMORY_LIMIT_BYTES..1 << 30,
            available in prop::option::of(2 * ConvertOptions::MIN_MEMORY_LIMIT_BYTES..1 << 30),
            files in prop::collection::vec(prop_oneof![0u64..100_000, 0u64..1 << 40], 0..5),
        ) {
            let mut memory = MemoryFacts::default();
            memory.available_bytes = available;
            let buffers = Buffers::plan(limit, &files, &memory).unwrap();
            let total = buffers.total_bytes();
            prop_assert!(total <= limit && total <= available.map_or(u64::MAX, |bytes| bytes / 2));
            prop_assert!(buffers.bytes > 0 && buffers.bytes.is_multiple_of(ALIGNMENT_BYTES));
            // None is larger than the largest file can fill, and there is not one that nothing uses.
            let largest = files.iter().copied().max().unwrap_or(0);
            prop_assert!(buffers.bytes < largest.max(1) + ALIGNMENT_BYTES);
            let uses: u64 = files.iter().map(|file| file.div_ceil(buffers.bytes).max(1)).sum();
            prop_assert!(buffers.count >= 1 && buffers.count <= uses.max(1));
        }

        #[test]
        fn pieces_put_every_byte_of_every_tensor_in_its_place(
            sizes in prop::collection::vec(0u64..40, 0..12),
            buffer in 1u64..50,
        ) {
            let specs: Vec<TensorSpec> = sizes
                .iter()
                .enumerate()
                .map(|(number, &bytes)| TensorSpec {
                    name: number.to_string(),
                    dtype: Dtype::U8,
                    shape: vec![bytes],
                })
                .collect();
            let layout = store_layout(&specs, 100).unwrap();
            for planned in &layout.files {
                let mut found = Vec::new();
                let mut begin = 0;
                while begin < planned.bytes {
                    let extent = begin..planned.bytes.min(begin + buffer);
                    let mut reached = 0;
                    for piece in pieces(planned, &extent) {
                        prop_assert!(piece.len > 0 && piece.at >= reached);
                        reached = piece.at + piece.len;
                        prop_assert!(reached <= extent.end - extent.start);
                        found.extend((0..piece.len).map(|byte| {
                            (piece.tensor, piece.skipped + byte, extent.start + piece.at + byte)
                        }));
                    }
                    begin = extent.end;
                }
                let expected: Vec<_> = planned
                    .tensors
                    .iter()
                    .flat_map(|tensor| {
                        (0..tensor.bytes).map(|byte| (tensor.tensor, byte, tensor.offset + byte))
                    })
                    .collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
