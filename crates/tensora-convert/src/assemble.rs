//! Files put together from others: which bytes come from where, delivered in windows of bounded size.
//!
//! A conversion writes the windows; a digest looks at them. Whatever is at a place of an assembled file,
//! it is found by arithmetic over its records, so that a window is never larger than its buffer.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tensora_formats::{CheckpointIndex, TensorEntry, TensorPart};
use tensora_io::{
    Backend, Control, Platform, RangeStream, ReadExtent, ReadRequest, ReadStats, ReadWindow,
    Region, SourceFile, TransferParams, WindowHook,
};

use crate::buffers::Buffers;
use crate::identity;
use crate::{Error, Reading, Result};

/// Reading this much that is not needed costs less than another request.
const GAP_BYTES: u64 = 4 << 10;
/// Files are assembled from here on with at least this much between records; what is further apart is
/// of another file, so that no window is mostly gap.
const SPLIT_BYTES: u64 = 1 << 20;

/// The list of so many takes some hundred megabytes. With the default limit they hold 64 TiB.
const MAX_WINDOWS: u64 = 1 << 22;

/// A file to be put together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Assembly {
    /// Its length. Bytes that neither `prefix` nor a record covers are zeros.
    pub(crate) bytes: u64,
    /// The bytes at offset 0.
    pub(crate) prefix: Vec<u8>,
    /// In ascending order, none overlapping another or the prefix.
    pub(crate) records: Vec<Record>,
}

/// What one place of an assembled file holds.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Where it begins in the assembled file.
    pub(crate) at: u64,
    pub(crate) content: RecordContent,
}

#[derive(Clone, Debug)]
pub(crate) enum RecordContent {
    /// Bytes of a source file, by its number, as they are.
    Stored { file: usize, range: Range<u64> },
    /// A strided tensor in row-major order.
    Gathered(Box<TensorPart>),
}

impl Record {
    pub(crate) fn bytes(&self) -> u64 {
        match &self.content {
            RecordContent::Stored { range, .. } => range.end - range.start,
            RecordContent::Gathered(part) => part.bytes(),
        }
    }

    fn end(&self) -> u64 {
        self.at + self.bytes()
    }

    /// What lies in `range` of the assembled file, in bytes from the record's start.
    pub(crate) fn overlap(&self, range: &Range<u64>) -> Range<u64> {
        let begin = self.at.max(range.start).min(self.end());
        let end = self.end().min(range.end).max(begin);
        begin - self.at..end - self.at
    }
}

impl Assembly {
    /// The records with bytes in `range`, by their numbers, ascending.
    pub(crate) fn records_in(&self, range: &Range<u64>) -> impl Iterator<Item = (usize, &Record)> {
        // Those that end before the range; records ascend, so they come first.
        let first = self
            .records
            .partition_point(|record| record.end() <= range.start);
        let end = range.end;
        self.records
            .iter()
            .enumerate()
            .skip(first)
            .take_while(move |(_, record)| record.at < end)
            .filter(|(_, record)| record.bytes() > 0)
    }

    /// The range of the source that the largest strided tensor reaches over, in bytes.
    fn hull_bytes(&self) -> u64 {
        let hulls = self.records.iter().map(|record| match &record.content {
            RecordContent::Stored { .. } => 0,
            RecordContent::Gathered(part) => part.hull().end - part.hull().start,
        });
        hulls.max().unwrap_or(0)
    }

    /// What is read for a window: extents whose places in the buffer are those in the window.
    fn read_window(&self, window: &Range<u64>) -> ReadWindow {
        let mut extents: Vec<ReadExtent> = Vec::new();
        for (_, record) in self.records_in(window) {
            let RecordContent::Stored { file, range } = &record.content else {
                continue;
            };
            let overlap = record.overlap(window);
            let at = index(record.at + overlap.start - window.start);
            let range = range.start + overlap.start..range.start + overlap.end;
            if let Some(last) = extents.last_mut()
                && last.file == *file
                && range.start >= last.range.end
                && range.start - last.range.end <= GAP_BYTES
                // As far apart here as there. What lies between is made zero afterwards.
                && at as u64 - last.at as u64 == range.start - last.range.start
            {
                last.range.end = range.end;
            } else {
                extents.push(ReadExtent {
                    file: *file,
                    range,
                    at,
                });
            }
        }
        ReadWindow {
            extents,
            buffer_bytes: index(window.end - window.start),
        }
    }
}

/// The buffers for these assemblies.
pub(crate) fn plan_buffers(limit_bytes: u64, assemblies: &[&Assembly]) -> Result<Buffers> {
    let file_bytes: Vec<u64> = assemblies.iter().map(|assembly| assembly.bytes).collect();
    let hulls = assemblies.iter().map(|assembly| assembly.hull_bytes());
    Buffers::plan(
        limit_bytes,
        &file_bytes,
        hulls.max().unwrap_or(0),
        &Platform::probe().memory,
    )
}

/// A part of an assembled file: what it is, and its bytes, which lease a buffer.
#[derive(Debug)]
pub(crate) struct Assembled {
    /// The number of the file among those that are assembled.
    pub(crate) file: usize,
    pub(crate) range: Range<u64>,
    pub(crate) bytes: Bytes,
    pub(crate) ends_file: bool,
}

impl Assembled {
    /// The part of a record of this file that the window holds.
    pub(crate) fn bytes_of(&self, record: &Record) -> &[u8] {
        let overlap = record.overlap(&self.range);
        let begin = index(record.at + overlap.start - self.range.start);
        &self.bytes[begin..begin + index(overlap.end - overlap.start)]
    }
}

/// Assembled files, window after window, in order. A file of 0 bytes has one window.
#[derive(Debug)]
pub(crate) struct AssemblyStream {
    stream: RangeStream,
    windows: Vec<(usize, Range<u64>)>,
    assemblies: Arc<Vec<Assembly>>,
}

impl AssemblyStream {
    /// `control` stops the stream. It does not watch: what is read is not what is delivered.
    pub(crate) fn new(
        assemblies: Arc<Vec<Assembly>>,
        sources: Vec<Arc<SourceFile>>,
        reading: &Reading,
        buffers: Buffers,
        control: &Control,
    ) -> Result<Self> {
        let quiet = Control::new().with_cancel(control.token().clone());
        let bytes = assemblies
            .iter()
            .fold(0, |sum: u64, assembly| sum.saturating_add(assembly.bytes));
        // A stride of 0 makes any size out of nothing.
        if bytes / buffers.window_bytes > MAX_WINDOWS {
            return Err(Error::TooManyWindows {
                bytes,
                window_bytes: buffers.window_bytes,
            });
        }
        let mut windows = Vec::new();
        for (file, assembly) in assemblies.iter().enumerate() {
            let mut begin = 0u64;
            loop {
                let end = assembly
                    .bytes
                    .min(begin.saturating_add(buffers.window_bytes));
                windows.push((file, begin..end));
                begin = end;
                if end == assembly.bytes {
                    break;
                }
            }
        }
        let read_windows = windows
            .iter()
            .map(|(file, range)| assemblies[*file].read_window(range))
            .collect();
        let backend = reading.backend()?;
        let completion = Completion {
            windows: windows.clone(),
            assemblies: Arc::clone(&assemblies),
            gatherer: Gatherer {
                sources: sources.clone(),
                backend: Arc::clone(&backend),
                transfer: *reading.transfer(),
                quiet: quiet.clone(),
                limit_bytes: buffers.gather_bytes,
                memory: Mutex::new(None),
            },
        };
        let hook: WindowHook = Arc::new(move |window, buffer| completion.run(window, buffer));
        let stream = RangeStream::with_hook(
            sources,
            read_windows,
            backend,
            reading.stream_params(buffers.count, index(buffers.window_bytes)),
            quiet,
            hook,
        )
        .map_err(Error::reading)?;
        Ok(Self {
            stream,
            windows,
            assemblies,
        })
    }

    /// What was read so far.
    pub(crate) fn stats(&self) -> ReadStats {
        self.stream.stats().read
    }
}

impl Iterator for AssemblyStream {
    type Item = Result<Assembled>;

    fn next(&mut self) -> Option<Self::Item> {
        let window = loop {
            match self.stream.next()? {
                // Whoever holds the buffers makes progress on its own, or fails on its own.
                Err(tensora_io::Error::LeasesHeld { .. }) => {}
                other => break other,
            }
        };
        Some(window.map_err(Error::reading).map(|window| {
            let (file, range) = self.windows[window.number].clone();
            Assembled {
                file,
                ends_file: range.end == self.assemblies[file].bytes,
                range,
                bytes: window.bytes,
            }
        }))
    }
}

/// What is done to a window once its extents are read.
struct Completion {
    windows: Vec<(usize, Range<u64>)>,
    assemblies: Arc<Vec<Assembly>>,
    gatherer: Gatherer,
}

impl Completion {
    /// Fills in what was not read: prefix, padding, and tensors to be put in order. The buffer still
    /// holds what it was used for before.
    fn run(&self, window: usize, buffer: &mut [u8]) -> tensora_io::Result<()> {
        let (file, range) = &self.windows[window];
        let assembly = &self.assemblies[*file];
        let (mut rest, mut reached) = (buffer, range.start);
        for (_, record) in assembly.records_in(range) {
            let overlap = record.overlap(range);
            let begin = record.at + overlap.start;
            let (gap, behind) = rest.split_at_mut(index(begin - reached));
            fill_gap(gap, &assembly.prefix, reached);
            let (content, behind) = behind.split_at_mut(index(overlap.end - overlap.start));
            if let RecordContent::Gathered(part) = &record.content {
                self.gatherer.gather(part, overlap.clone(), content)?;
            }
            (rest, reached) = (behind, record.at + overlap.end);
        }
        fill_gap(rest, &assembly.prefix, reached);
        Ok(())
    }
}

/// Fills what no record covers, which begins at `offset` of the file: with the file's prefix, and with
/// zeros after it.
fn fill_gap(gap: &mut [u8], prefix: &[u8], offset: u64) {
    let prefix_left = usize::try_from(offset)
        .ok()
        .and_then(|offset| prefix.get(offset..))
        .unwrap_or_default();
    let (prefix_part, padding) = gap.split_at_mut(gap.len().min(prefix_left.len()));
    prefix_part.copy_from_slice(&prefix_left[..prefix_part.len()]);
    padding.fill(0);
}

/// Puts strided tensors in row-major order.
struct Gatherer {
    sources: Vec<Arc<SourceFile>>,
    backend: Arc<dyn Backend>,
    transfer: TransferParams,
    quiet: Control,
    /// How much of the storage is in memory at once.
    limit_bytes: u64,
    /// Made when first needed, and used by one reader at a time.
    memory: Mutex<Option<Region>>,
}

impl Gatherer {
    /// Fills `content` with the bytes `delivered` of the tensor. The storage that they lie in is read a
    /// block at a time; of a tensor in ascending order each byte once, of a transposed one that does not
    /// fit, every block for every window.
    fn gather(
        &self,
        part: &TensorPart,
        delivered: Range<u64>,
        content: &mut [u8],
    ) -> tensora_io::Result<()> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = match &mut *memory {
            Some(memory) => memory,
            none => none.insert(Region::allocate(index(self.limit_bytes.max(1)))?),
        };
        let storage = storage(part, &delivered);
        let mut block_begin = storage.start;
        // How far an ascending tensor is delivered.
        let mut done = delivered.start;
        while block_begin < storage.end {
            let block = block_begin..storage.end.min(block_begin + memory.len() as u64);
            let read = &mut memory.as_mut_slice()[..index(block.end - block.start)];
            self.backend.read(
                vec![ReadRequest {
                    file: &self.sources[part.file()],
                    offset: block.start,
                    destination: (&mut *read).into(),
                }],
                &self.transfer,
                &self.quiet,
            )?;
            let mut at = done - delivered.start;
            for run in part.runs(done..delivered.end) {
                let (begin, end) = (run.start.max(block.start), run.end.min(block.end));
                if begin < end {
                    let to = index(at + (begin - run.start))..index(at + (end - run.start));
                    content[to].copy_from_slice(
                        &read[index(begin - block.start)..index(end - block.start)],
                    );
                }
                if part.is_ascending() && run.end > block.end {
                    at += end.saturating_sub(run.start);
                    break;
                }
                at += run.end - run.start;
            }
            if part.is_ascending() {
                done = delivered.start + at;
            }
            block_begin = block.end;
        }
        Ok(())
    }
}

/// The range of the file that the bytes `delivered` lie in.
fn storage(part: &TensorPart, delivered: &Range<u64>) -> Range<u64> {
    if !part.is_ascending() {
        return part.hull();
    }
    let first = part.runs(delivered.clone()).next();
    let last = part.runs(delivered.end - 1..delivered.end).next();
    match (first, last) {
        (Some(first), Some(last)) => first.start..last.end,
        _ => part.hull(),
    }
}

/// Takes the position of a tensor among those that are read, an offset in its data, and the bytes from there on.
pub(crate) type Consume<'a> = dyn FnMut(usize, u64, &[u8]) -> Result<()> + 'a;

/// Reads the tensors at these positions of `index` and hands their bytes, as elements in row-major
/// order, to `consume`: the position in `tensors`, the offset within the tensor's data, and the bytes,
/// which ascend for each tensor. A tensor without data comes once, without bytes.
///
/// `control` stops the reading, and does not watch it. Bytes that tensors share are read once where that is
/// possible.
pub(crate) fn read_tensors(
    index: &CheckpointIndex,
    tensors: &[usize],
    reading: &Reading,
    memory_limit_bytes: u64,
    control: &Control,
    consume: &mut Consume<'_>,
) -> Result<()> {
    let (assemblies, holders) = assemble_tensors(index, tensors)?;
    let sources = index
        .files()
        .iter()
        .map(|file| identity::open(file).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    for (position, &number) in tensors.iter().enumerate() {
        let tensor = &index.tensors()[number];
        if tensor.shape.contains(&0) || tensor.bytes == 0 {
            consume(position, 0, &[])?;
        }
    }
    let buffers = plan_buffers(memory_limit_bytes, &assemblies.iter().collect::<Vec<_>>())?;
    let assemblies = Arc::new(assemblies);
    let stream = AssemblyStream::new(Arc::clone(&assemblies), sources, reading, buffers, control)?;
    for window in stream {
        let window = window?;
        for (record, content) in assemblies[window.file].records_in(&window.range) {
            let offset = content.overlap(&window.range).start;
            for &position in &holders[window.file][record] {
                consume(position, offset, window.bytes_of(content))?;
            }
        }
    }
    Ok(())
}

/// Which tensors, by position, have the data of each record of each assembly.
type Holders = Vec<Vec<Vec<usize>>>;

/// The tensors as records of as few assemblies as possible, at places that are congruent with those in
/// the source, so that direct reads need no copy.
fn assemble_tensors(
    index: &CheckpointIndex,
    tensors: &[usize],
) -> Result<(Vec<Assembly>, Holders)> {
    let mut order: Vec<(usize, &TensorEntry)> = tensors
        .iter()
        .enumerate()
        .map(|(position, &number)| (position, &index.tensors()[number]))
        .filter(|(_, tensor)| tensor.bytes > 0 && !tensor.shape.contains(&0))
        .collect();
    order.sort_by_key(|(_, tensor)| (tensor.file, tensor.offset, tensor.bytes));

    let mut assemblies: Vec<Assembly> = Vec::new();
    let mut holders: Holders = Vec::new();
    // The assembly of the file that is gone through, and where its offset 0 is in that file.
    let mut current: Option<(usize, usize, u64)> = None;
    for (position, tensor) in order {
        if !tensor.is_contiguous() {
            let part = TensorPart::whole(tensor).map_err(Error::Layout)?;
            assemblies.push(Assembly {
                bytes: part.bytes(),
                prefix: Vec::new(),
                records: vec![Record {
                    at: 0,
                    content: RecordContent::Gathered(Box::new(part)),
                }],
            });
            holders.push(vec![vec![position]]);
            continue;
        }
        let range = tensor.range();
        let place = current.filter(|&(_, file, base)| file == tensor.file && base <= range.start);
        if let Some((number, _, base)) = place {
            let assembly = &mut assemblies[number];
            let at = range.start - base;
            let same = |record: &Record| record.at == at && record.end() == range.end - base;
            if assembly.records.last().is_some_and(same) {
                if let Some(last) = holders[number].last_mut() {
                    last.push(position);
                }
                continue;
            }
            if at >= assembly.bytes && at - assembly.bytes <= SPLIT_BYTES {
                assembly.bytes = range.end - base;
                assembly.records.push(stored(at, tensor));
                holders[number].push(vec![position]);
                continue;
            }
        }
        // The first of its file, far behind the last, or overlapping it.
        let base = range.start - range.start % SPLIT_BYTES;
        current = Some((assemblies.len(), tensor.file, base));
        assemblies.push(Assembly {
            bytes: range.end - base,
            prefix: Vec::new(),
            records: vec![stored(range.start - base, tensor)],
        });
        holders.push(vec![vec![position]]);
    }
    Ok((assemblies, holders))
}

fn stored(at: u64, tensor: &TensorEntry) -> Record {
    Record {
        at,
        content: RecordContent::Stored {
            file: tensor.file,
            range: tensor.range(),
        },
    }
}

/// A number of bytes within a buffer, which fits because the buffer does.
#[allow(clippy::cast_possible_truncation)]
fn index(bytes: u64) -> usize {
    bytes as usize
}
