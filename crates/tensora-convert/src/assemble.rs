//! Files put together from others: which bytes come from where, delivered in windows of bounded size.
//!
//! A conversion writes the windows; a digest looks at them. Whatever is at a place of an assembled file,
//! it is found by arithmetic over its records, so that a window is never larger than its buffer.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tensora_formats::{CheckpointIndex, TensorEntry, TensorPart};
use tensora_io::{
    Backend, Control, Platform, RangeStream, ReadExtent, ReadRequest, ReadStats, ReadWindow,
    Region, SourceFile, TransferParams, WindowHook,
};

use crate::buffers::{Buffers, MAX_WINDOW_BYTES};
use crate::identity;
use crate::{ConversionNote, Error, Reading, Result};

/// Reading this much that is not needed costs less than another request.
const GAP_BYTES: u64 = 4 << 10;
/// Files are assembled from here on with at least this much between records; what is further apart is
/// of another file, so that no window is mostly gap.
const SPLIT_BYTES: u64 = 1 << 20;

/// The list of so many takes some hundred megabytes. With the default limit they hold 64 TiB.
const MAX_WINDOWS: u64 = 1 << 22;

/// How many files are open at once where tensors are read for their content alone. Each takes up to two
/// descriptors, and a source may have hundreds of files, open already.
const OPEN_FILES: usize = 16;

/// How long nothing may happen before nobody waits any more for his turn to put a window in order.
const PATIENCE: Duration = Duration::from_secs(10);

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

    /// How much of a strided tensor's storage had better be in memory at once, in bytes: all of it, unless it
    /// is used from its beginning to its end.
    fn hull_bytes(&self) -> u64 {
        let hulls = self.gathered().map(|part| match part.is_ascending() {
            true => hull_bytes(part).min(MAX_WINDOW_BYTES),
            false => hull_bytes(part),
        });
        hulls.max().unwrap_or(0)
    }

    /// The strided tensors that are put in order.
    fn gathered(&self) -> impl Iterator<Item = &TensorPart> {
        self.records
            .iter()
            .filter_map(|record| match &record.content {
                RecordContent::Stored { .. } => None,
                RecordContent::Gathered(part) => Some(&**part),
            })
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

/// The range of the source that a tensor reaches over, in bytes.
fn hull_bytes(part: &TensorPart) -> u64 {
    let hull = part.hull();
    hull.end - hull.start
}

/// The buffers for these assemblies.
///
/// # Errors
///
/// [`Error::NotEnoughMemory`], and [`Error::TooManyWindows`]: a stride of 0 makes any size out of nothing.
pub(crate) fn plan_buffers(limit_bytes: u64, assemblies: &[&Assembly]) -> Result<Buffers> {
    let file_bytes: Vec<u64> = assemblies.iter().map(|assembly| assembly.bytes).collect();
    let hulls = assemblies.iter().map(|assembly| assembly.hull_bytes());
    let buffers = Buffers::plan(
        limit_bytes,
        &file_bytes,
        hulls.max().unwrap_or(0),
        &Platform::probe().memory,
    )?;
    let bytes = file_bytes
        .iter()
        .fold(0, |sum: u64, &bytes| sum.saturating_add(bytes));
    if bytes / buffers.window_bytes > MAX_WINDOWS {
        return Err(Error::TooManyWindows {
            bytes,
            window_bytes: buffers.window_bytes,
        });
    }
    Ok(buffers)
}

/// What there is to say of the transposed tensors that do not fit into these buffers: each of their windows takes
/// all of their storage.
pub(crate) fn read_repeatedly(
    assemblies: &[&Assembly],
    buffers: Buffers,
) -> Option<ConversionNote> {
    let parts: Vec<&TensorPart> = assemblies
        .iter()
        .flat_map(|assembly| assembly.gathered())
        .filter(|part| !part.is_ascending() && hull_bytes(part) > buffers.gather_bytes)
        .collect();
    // One more than fit into it, because it need not begin with a window.
    let windows = |part: &&TensorPart| part.bytes().div_ceil(buffers.window_bytes) + 1;
    let mut tensors: Vec<String> = parts.iter().map(|part| part.name().to_owned()).collect();
    tensors.sort();
    Some(ConversionNote::ReadRepeatedly {
        tensors,
        times: parts.iter().map(windows).max()?,
        limit_bytes: Buffers::limit_for(parts.iter().map(|part| hull_bytes(part)).max()?),
    })
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
    turns: Arc<Turns>,
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
        let turns = Arc::new(Turns::default());
        let completion = Completion {
            turn_of_windows: turn_of_windows(&windows, &assemblies),
            turns: Arc::clone(&turns),
            windows: windows.clone(),
            assemblies: Arc::clone(&assemblies),
            gatherer: Gatherer {
                sources: sources.clone(),
                backend: Arc::clone(&backend),
                transfer: *reading.transfer(),
                quiet: quiet.clone(),
                limit_bytes: buffers.gather_bytes,
                held: Mutex::new(None),
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
            turns,
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
        if window.is_err() {
            // The window that failed passes no turn on.
            self.turns.end();
        }
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

impl Drop for AssemblyStream {
    fn drop(&mut self) {
        // Before the stream, which waits for its readers.
        self.turns.end();
    }
}

/// Numbers the windows that hold parts of tensors to be put in order.
fn turn_of_windows(
    windows: &[(usize, Range<u64>)],
    assemblies: &[Assembly],
) -> BTreeMap<usize, usize> {
    let gathers = |(file, range): &(usize, Range<u64>)| {
        let mut records = assemblies[*file].records_in(range);
        records.any(|(_, record)| matches!(record.content, RecordContent::Gathered(_)))
    };
    let windows = (0..windows.len()).filter(|&window| gathers(&windows[window]));
    windows.zip(0..).collect()
}

/// Lets readers put tensors in order one after the other, in the order of their windows: what one of them has in
/// memory is what the next one needs.
///
/// That only saves reads. Who has waited long enough goes on all the same, and so does everybody once the stream
/// is over: windows that were given up pass no turn on.
#[derive(Debug, Default)]
struct Turns {
    state: Mutex<TurnState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct TurnState {
    next: usize,
    /// How many turns have been taken and not yet passed on; several only once the stream is over.
    taken: usize,
    has_ended: bool,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, TurnState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all turns before this one have been passed on. It is passed on when it is dropped.
    fn take(&self, turn: usize) -> Turn<'_> {
        let mut state = self.lock();
        while state.next < turn && !state.has_ended {
            let next = state.next;
            let waited = self.changed.wait_timeout(state, PATIENCE);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            let is_stuck = state.taken == 0 && state.next == next;
            state.has_ended |= timeout.timed_out() && is_stuck;
        }
        state.taken += 1;
        Turn { turns: self, turn }
    }

    /// Lets everybody pass.
    fn end(&self) {
        self.lock().has_ended = true;
        self.changed.notify_all();
    }
}

struct Turn<'a> {
    turns: &'a Turns,
    turn: usize,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.next = state.next.max(self.turn + 1);
        state.taken -= 1;
        drop(state);
        self.turns.changed.notify_all();
    }
}

/// What is done to a window once its extents are read.
struct Completion {
    windows: Vec<(usize, Range<u64>)>,
    turn_of_windows: BTreeMap<usize, usize>,
    turns: Arc<Turns>,
    assemblies: Arc<Vec<Assembly>>,
    gatherer: Gatherer,
}

impl Completion {
    /// Fills in what was not read: prefix, padding, and tensors to be put in order. The buffer still
    /// holds what it was used for before.
    fn run(&self, window: usize, buffer: &mut [u8]) -> tensora_io::Result<()> {
        let (file, range) = &self.windows[window];
        let assembly = &self.assemblies[*file];
        let turn = self.turn_of_windows.get(&window);
        let _turn = turn.map(|&turn| self.turns.take(turn));
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
    held: Mutex<Option<Held>>,
}

/// Storage that is in memory.
struct Held {
    memory: Region,
    file: usize,
    /// Empty where there is none.
    range: Range<u64>,
}

impl Held {
    fn has(&self, file: usize, block: &Range<u64>) -> bool {
        self.file == file && self.range.start <= block.start && block.end <= self.range.end
    }

    fn bytes(&self, block: &Range<u64>) -> &[u8] {
        let range = block.start - self.range.start..block.end - self.range.start;
        &self.memory.as_slice()[index(range.start)..index(range.end)]
    }
}

impl Gatherer {
    /// Fills `content` with the bytes `delivered` of the tensor. The storage that they lie in is read a
    /// block at a time; of a tensor in ascending order each byte once. A transposed one needs all of it for every
    /// window: what fits is read for the first and held for the others, so once. Of what does not fit, all but the
    /// last block of the window before is read again, so not more often than there are windows, of which such
    /// tensors have few: see [`Buffers`].
    fn gather(
        &self,
        part: &TensorPart,
        delivered: Range<u64>,
        content: &mut [u8],
    ) -> tensora_io::Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = match &mut *held {
            Some(held) => held,
            none => none.insert(Held {
                memory: Region::allocate(index(self.limit_bytes.max(1)))?,
                file: 0,
                range: 0..0,
            }),
        };
        let storage = storage(part, &delivered);
        let block_bytes = held.memory.len();
        let begins = (storage.start..storage.end).step_by(block_bytes);
        let mut blocks: Vec<Range<u64>> = begins
            .map(|begin| begin..storage.end.min(begin.saturating_add(block_bytes as u64)))
            .collect();
        if !part.is_ascending()
            && blocks
                .last()
                .is_some_and(|last| held.has(part.file(), last))
        {
            blocks.reverse();
        }
        // How far an ascending tensor is delivered.
        let mut done = delivered.start;
        for block in blocks {
            let read = self.block(held, part.file(), &block)?;
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
        }
        Ok(())
    }

    /// The bytes of a block, read unless they are there.
    fn block<'h>(
        &self,
        held: &'h mut Held,
        file: usize,
        block: &Range<u64>,
    ) -> tensora_io::Result<&'h [u8]> {
        if !held.has(file, block) {
            // What a read that fails has left is nothing.
            held.range = 0..0;
            let read = &mut held.memory.as_mut_slice()[..index(block.end - block.start)];
            self.backend.read(
                vec![ReadRequest {
                    file: &self.sources[file],
                    offset: block.start,
                    destination: read.into(),
                }],
                &self.transfer,
                &self.quiet,
            )?;
            (held.file, held.range) = (file, block.clone());
        }
        Ok(held.bytes(block))
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
/// possible. Few files are open at a time, and none where there is nothing to read.
pub(crate) fn read_tensors(
    index: &CheckpointIndex,
    tensors: &[usize],
    reading: &Reading,
    memory_limit_bytes: u64,
    control: &Control,
    consume: &mut Consume<'_>,
) -> Result<()> {
    for (position, &number) in tensors.iter().enumerate() {
        if !has_data(&index.tensors()[number]) {
            consume(position, 0, &[])?;
        }
    }
    for group in groups(index, tensors) {
        let (assemblies, holders) = assemble_tensors(index, tensors, &group)?;
        let sources = group
            .files
            .iter()
            .map(|&file| identity::open(&index.files()[file]).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let buffers = plan_buffers(memory_limit_bytes, &assemblies.iter().collect::<Vec<_>>())?;
        let assemblies = Arc::new(assemblies);
        let stream =
            AssemblyStream::new(Arc::clone(&assemblies), sources, reading, buffers, control)?;
        for window in stream {
            let window = window?;
            for (record, content) in assemblies[window.file].records_in(&window.range) {
                let offset = content.overlap(&window.range).start;
                for &position in &holders[window.file][record] {
                    consume(position, offset, window.bytes_of(content))?;
                }
            }
        }
    }
    Ok(())
}

/// Finds beforehand what would keep [`read_tensors`] from reading these tensors within the limit, and what there is
/// to say of how it does.
pub(crate) fn plan_reading(
    index: &CheckpointIndex,
    tensors: &[usize],
    memory_limit_bytes: u64,
) -> Result<Vec<ConversionNote>> {
    let mut notes = Vec::new();
    for group in groups(index, tensors) {
        let (assemblies, _) = assemble_tensors(index, tensors, &group)?;
        let assemblies: Vec<&Assembly> = assemblies.iter().collect();
        let buffers = plan_buffers(memory_limit_bytes, &assemblies)?;
        notes.extend(read_repeatedly(&assemblies, buffers));
    }
    Ok(notes)
}

fn has_data(tensor: &TensorEntry) -> bool {
    tensor.bytes > 0 && !tensor.shape.contains(&0)
}

/// Files that are open at the same time, and what is read of them.
struct Group {
    /// Their numbers in the index, ascending.
    files: Vec<usize>,
    /// The tensors with data in them, by their positions among those that are read.
    positions: Vec<usize>,
}

/// The tensors with data, in groups of a few files.
fn groups(index: &CheckpointIndex, tensors: &[usize]) -> Vec<Group> {
    let mut of_files: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (position, &number) in tensors.iter().enumerate() {
        let tensor = &index.tensors()[number];
        if has_data(tensor) {
            of_files.entry(tensor.file).or_default().push(position);
        }
    }
    let of_files: Vec<(usize, Vec<usize>)> = of_files.into_iter().collect();
    of_files
        .chunks(OPEN_FILES)
        .map(|group| Group {
            files: group.iter().map(|(file, _)| *file).collect(),
            positions: group
                .iter()
                .flat_map(|(_, positions)| positions.iter().copied())
                .collect(),
        })
        .collect()
}

/// Which tensors, by position, have the data of each record of each assembly.
type Holders = Vec<Vec<Vec<usize>>>;

/// The tensors of a group as records of as few assemblies as possible, at places that are congruent with those in
/// the source, so that direct reads need no copy. Files have their numbers in the group.
fn assemble_tensors(
    index: &CheckpointIndex,
    tensors: &[usize],
    group: &Group,
) -> Result<(Vec<Assembly>, Holders)> {
    let mut order: Vec<(usize, &TensorEntry)> = group
        .positions
        .iter()
        .map(|&position| (position, &index.tensors()[tensors[position]]))
        .collect();
    order.sort_by_key(|(_, tensor)| (tensor.file, tensor.offset, tensor.bytes));

    let mut assemblies: Vec<Assembly> = Vec::new();
    let mut holders: Holders = Vec::new();
    // The assembly of the file that is gone through, and where its offset 0 is in that file.
    let mut current: Option<(usize, usize, u64)> = None;
    for (position, tensor) in order {
        let file = group.files.partition_point(|&file| file < tensor.file);
        if !tensor.is_contiguous() {
            let mut tensor = tensor.clone();
            tensor.file = file;
            let part = TensorPart::whole(&tensor).map_err(Error::Layout)?;
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
        let place = current.filter(|&(_, current, base)| current == file && base <= range.start);
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
                assembly.records.push(stored(at, file, tensor));
                holders[number].push(vec![position]);
                continue;
            }
        }
        // The first of its file, far behind the last, or overlapping it.
        let base = range.start - range.start % SPLIT_BYTES;
        current = Some((assemblies.len(), file, base));
        assemblies.push(Assembly {
            bytes: range.end - base,
            prefix: Vec::new(),
            records: vec![stored(range.start - base, file, tensor)],
        });
        holders.push(vec![vec![position]]);
    }
    Ok((assemblies, holders))
}

fn stored(at: u64, file: usize, tensor: &TensorEntry) -> Record {
    Record {
        at,
        content: RecordContent::Stored {
            file,
            range: tensor.range(),
        },
    }
}

/// A number of bytes within a buffer, which fits because the buffer does.
#[allow(clippy::cast_possible_truncation)]
fn index(bytes: u64) -> usize {
    bytes as usize
}
