//! Tensors one after the other, through a bounded set of buffers.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tensora_formats::{
    CheckpointIndex, Dtype, TensorEntry, TensorPart, Window, WindowOptions, WindowOrder,
};
use tensora_heuristics::{Policy, StreamPlan};
use tensora_io::{
    Backend, Control, FilledWindow, Placement, RangeStream, ReadExtent, ReadWindow, SourceFile,
    StreamParams, StreamStats,
};

use crate::lazy::name_tensor;
use crate::{LazyCheckpoint, Result, Sink};

/// In which order tensors are streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StreamOrder {
    /// That of the files, which is fastest.
    #[default]
    File,
    /// That of the names given to [`Loader::select_names`](crate::Loader::select_names), and after these, what else is
    /// selected, in the order of the files. Jumping about in the files costs time where tensors are small.
    Selection,
}

/// A tensor that is streamed: as it is delivered, that is, sliced where slices were asked for.
#[derive(Clone)]
pub struct StreamedTensor(Arc<Inner>);

struct Inner {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: u64,
}

impl StreamedTensor {
    pub(crate) fn new(entry: &TensorEntry, part: &TensorPart) -> Self {
        let shape = part.shape().iter();
        Self(Arc::new(Inner {
            name: entry.name.clone(),
            dtype: entry.dtype,
            shape: shape
                .map(|&count| usize::try_from(count).unwrap_or(usize::MAX))
                .collect(),
            bytes: part.bytes(),
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its element type.
    pub fn dtype(&self) -> Dtype {
        self.0.dtype
    }

    /// Its dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of bytes of its elements.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }
}

impl fmt::Debug for StreamedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamedTensor")
            .field("name", &self.0.name)
            .field("dtype", &self.0.dtype)
            .field("shape", &self.0.shape)
            .field("bytes", &self.0.bytes)
            .finish()
    }
}

/// A tensor, or a part of one that is larger than a buffer: whole elements in row-major order, little-endian.
///
/// The bytes lie in a buffer of the stream. The buffer is used again when the piece, and every clone and slice of its
/// [`bytes`](Self::bytes), is gone; until then they do not change.
#[derive(Clone, Debug)]
pub struct StreamedPiece {
    tensor: StreamedTensor,
    offset: u64,
    bytes: Bytes,
    is_last: bool,
}

impl StreamedPiece {
    /// The tensor that it belongs to.
    pub fn tensor(&self) -> &StreamedTensor {
        &self.tensor
    }

    /// Where it begins within the tensor's elements, in bytes.
    pub fn offset_bytes(&self) -> u64 {
        self.offset
    }

    /// Its bytes. Cloning or slicing them copies nothing, and keeps the buffer from being used again.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether the tensor is complete with it.
    pub fn is_last(&self) -> bool {
        self.is_last
    }

    /// Whether it is all of the tensor.
    pub fn is_whole(&self) -> bool {
        self.offset == 0 && self.is_last
    }
}

/// How the bytes of a piece get out of their window.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Delivery {
    /// They stand there, once the reader has moved them together if they did not.
    InPlace(Range<usize>),
    /// Other pieces need the same bytes as they were read, or the order is another: they are copied out.
    Copied,
}

/// What is read, what is handed out of it, and how.
#[derive(Debug)]
pub(crate) struct Cut {
    pub(crate) parts: Vec<TensorPart>,
    pub(crate) windows: Vec<Window>,
    /// The opened files by their numbers in the index; only those that are read.
    pub(crate) sources: Vec<Option<Arc<SourceFile>>>,
    pub(crate) plan: StreamPlan,
}

impl Cut {
    /// What the windows read, in bytes.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.windows.iter().map(Window::read_bytes).sum()
    }

    /// Files and windows as the reading side knows them.
    pub(crate) fn reads(&self) -> (Vec<Arc<SourceFile>>, Vec<ReadWindow>) {
        let mut numbers = vec![0; self.sources.len()];
        let mut files = Vec::new();
        for (number, source) in self.sources.iter().enumerate() {
            if let Some(source) = source {
                numbers[number] = files.len();
                files.push(Arc::clone(source));
            }
        }
        let windows = self.windows.iter().map(|window| {
            let extents = window.extents.iter().map(|extent| ReadExtent {
                file: numbers[extent.file],
                range: extent.range.clone(),
                at: position(extent.at),
            });
            ReadWindow {
                extents: extents.collect(),
                buffer_bytes: position(window.buffer_bytes),
            }
        });
        (files, windows.collect())
    }

    pub(crate) fn params(&self, lease_timeout: Option<Duration>) -> StreamParams {
        let buffer_bytes = position(self.plan.buffer_bytes);
        let (buffers, readers) = (self.plan.buffers, self.plan.readers);
        StreamParams::new(buffers, buffer_bytes, readers, self.plan.params)
            .with_lease_timeout(lease_timeout.unwrap_or(StreamParams::DEFAULT_LEASE_TIMEOUT))
    }
}

impl LazyCheckpoint {
    /// Visits the selected tensors, sliced where that was asked for, one after the other, without ever holding more than
    /// a bounded part of them: 256 MiB unless [`Loader::memory_limit_bytes`](crate::Loader::memory_limit_bytes)
    /// says otherwise. A tensor larger than a buffer comes in pieces.
    ///
    /// The elements of strided tensors are put into row-major order.
    ///
    /// # Errors
    ///
    /// When a file cannot be opened, no plan satisfies what was asked for, or a slice does not fit a tensor.
    pub fn stream(&self) -> Result<TensorStream> {
        let begun = Instant::now();
        let parts = self.ordered_parts()?;
        let tensors = parts
            .iter()
            .map(|(number, part)| StreamedTensor::new(&self.index.tensors()[*number], part))
            .collect();
        let parts = parts.into_iter().map(|(_, part)| part).collect();
        let order = self.loader.stream_order;
        let cut = self.cut(parts, &self.loader.policy, self.index_bytes, order)?;
        let control = self.loader.control(cut.read_bytes());
        let backend = self.loader.backend_of(cut.plan.backend)?;
        TensorStream::new(
            tensors,
            cut,
            Arc::clone(&self.index),
            self.loader.lease_timeout,
            backend,
            control,
            begun,
        )
    }

    /// How [`stream`](Self::stream) would read now, and why.
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream).
    pub fn stream_plan(&self) -> Result<StreamPlan> {
        let parts: Vec<_> = self.parts()?.into_iter().map(|(_, part)| part).collect();
        self.plan_cut(&parts, &self.loader.policy, self.index_bytes)
            .map(|(plan, ..)| plan)
    }

    /// Streams the selected tensors into `sink`.
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream), what keeps tensors from being read, and what the sink says.
    /// [`Error::Changed`](crate::Error::Changed), if a file was written to while it was streamed; whoever takes a
    /// [`stream`](Self::stream) apart is not told.
    pub fn stream_into(&self, sink: &mut (impl Sink + ?Sized)) -> Result<StreamReport> {
        let report = self.stream()?.drain_into(sink)?;
        self.check_opened()?;
        Ok(report)
    }

    /// The content digest of the selected tensors, streamed: in bounded memory, whatever their size.
    ///
    /// # Errors
    ///
    /// As [`stream_into`](Self::stream_into).
    #[cfg(feature = "convert")]
    pub fn digest(&self) -> Result<tensora_convert::Digest> {
        let mut sink = crate::DigestSink::new();
        self.stream_into(&mut sink)?;
        Ok(sink.digest())
    }

    /// The parts to be delivered, in the order in which they are streamed.
    fn ordered_parts(&self) -> Result<Vec<(usize, TensorPart)>> {
        let mut parts = self.parts()?;
        parts.sort_by_key(|(_, part)| (part.file(), part.hull().start));
        if self.loader.stream_order == StreamOrder::Selection {
            let names = self.loader.selection.names.iter().map(String::as_str);
            let places: HashMap<&str, usize> = names.zip(0..).collect();
            parts.sort_by_key(|(number, _)| {
                let name = self.index.tensors()[*number].name.as_str();
                places.get(name).copied().unwrap_or(usize::MAX)
            });
        }
        Ok(parts)
    }

    /// Packs parts into windows, after planning how these are read. `index_bytes` count against the limit.
    pub(crate) fn cut(
        &self,
        parts: Vec<TensorPart>,
        policy: &Policy,
        index_bytes: u64,
        order: StreamOrder,
    ) -> Result<Cut> {
        let (plan, gap_bytes, sources) = self.plan_cut(&parts, policy, index_bytes)?;
        let options = WindowOptions {
            window_bytes: plan.buffer_bytes,
            align_bytes: Placement::ALIGN_BYTES,
            gap_bytes,
            order: match order {
                StreamOrder::File => WindowOrder::File,
                StreamOrder::Selection => WindowOrder::Given,
            },
        };
        let windows = tensora_formats::windows(self.index.files(), &parts, &options)?;
        Ok(Cut {
            parts,
            windows,
            sources,
            plan,
        })
    }

    /// How to read these parts through windows; with the largest gap that is read rather than skipped, and the files.
    #[allow(clippy::type_complexity)]
    fn plan_cut(
        &self,
        parts: &[TensorPart],
        policy: &Policy,
        index_bytes: u64,
    ) -> Result<(StreamPlan, u64, Vec<Option<Arc<SourceFile>>>)> {
        self.loader.check_cancelled()?;
        let files = self.file_tasks(parts.iter().map(|part| (part.file(), part.hull())))?;
        let platform = self.platform(&files);
        let (gap_bytes, gap_decision) = tensora_heuristics::merge_gap_bytes(&platform, policy);
        let mut workload = self.workload(parts.len(), self.is_whole(parts), &files);
        crate::sliced::describe(&mut workload, parts, gap_bytes);
        workload.index_bytes = index_bytes;
        workload.destination_bytes = 0;
        let mut plan = tensora_heuristics::plan_stream(&workload, &platform, policy)?;
        if parts.iter().any(|part| !part.is_contiguous()) {
            plan.decisions.push(gap_decision);
        }
        tracing::debug!(backend = %plan.backend, buffers = plan.buffers, params = ?plan.params, "planned");
        let mut sources = vec![None; self.index.files().len()];
        for file in files {
            sources[file.number] = Some(Arc::clone(file.source));
        }
        Ok((plan, gap_bytes, sources))
    }
}

/// A position in a buffer. Buffers that this machine cannot address are refused before there are positions.
pub(crate) fn position(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}

/// How each piece of each window is delivered.
fn deliveries(cut: &Cut) -> Vec<Vec<Delivery>> {
    cut.windows
        .iter()
        .map(|window| {
            let places: Vec<_> = window
                .pieces
                .iter()
                .map(|piece| place(window, piece, &cut.parts[piece.part]))
                .collect();
            places
                .iter()
                .enumerate()
                .map(|(number, place)| match place {
                    Place::Together(range) => Delivery::InPlace(range.clone()),
                    Place::Apart { begin, .. } if is_alone(&places, number) => {
                        let len = position(window.pieces[number].bytes);
                        Delivery::InPlace(*begin..begin + len)
                    }
                    Place::Apart { .. } | Place::Backwards => Delivery::Copied,
                })
                .collect()
        })
        .collect()
}

/// Where the bytes of a piece lie in the buffer.
enum Place {
    Together(Range<usize>),
    /// In ascending runs, which can be moved together.
    Apart {
        begin: usize,
        end: usize,
    },
    Backwards,
}

fn place(window: &Window, piece: &tensora_formats::WindowPiece, part: &TensorPart) -> Place {
    let mut runs = window.copies(piece, part);
    let Some(first) = runs.next() else {
        return Place::Together(0..0);
    };
    let mut end = first.end;
    let mut is_together = true;
    for run in runs {
        is_together = false;
        if run.start < end {
            return Place::Backwards;
        }
        end = run.end;
    }
    if is_together {
        Place::Together(first)
    } else {
        Place::Apart {
            begin: first.start,
            end,
        }
    }
}

/// Whether no other piece of the window lies where this one's runs are moved about.
fn is_alone(places: &[Place], number: usize) -> bool {
    let Place::Apart { begin, end } = places[number] else {
        return false;
    };
    places.iter().enumerate().all(|(other, place)| {
        other == number
            || match place {
                Place::Together(range) => {
                    range.is_empty() || range.end <= begin || end <= range.start
                }
                Place::Apart {
                    begin: from,
                    end: to,
                } => *to <= begin || end <= *from,
                // Where it lies is not known, and it is rare.
                Place::Backwards => false,
            }
    })
}

/// The tensors of a checkpoint, piece after piece, through a bounded set of buffers that are used again and again.
///
/// Made by [`LazyCheckpoint::stream`](crate::LazyCheckpoint::stream). While the caller works on a piece, the next
/// ones are being read. An [`Iterator`] for threads, and a [`Stream`](futures_core::Stream) for tasks:
/// polling does not block. After an error the stream ends.
///
/// A piece keeps its buffer until it is dropped. A caller who keeps so many that every buffer is taken and then asks
/// for more gets [`tensora_io::Error::LeasesHeld`] after a while, and may ask again once it has let go of some.
#[derive(Debug)]
pub struct TensorStream {
    windows: RangeStream,
    tensors: Vec<StreamedTensor>,
    cut: Arc<Cut>,
    deliveries: Arc<Vec<Vec<Delivery>>>,
    /// The window that pieces are taken from, and the number of the next.
    current: Option<(FilledWindow, usize)>,
    index: Arc<CheckpointIndex>,
    begun: Instant,
    delivered_bytes: u64,
}

impl TensorStream {
    /// Begins to read. `tensors` and the parts of `cut` are the same ones in the same order.
    pub(crate) fn new(
        tensors: Vec<StreamedTensor>,
        cut: Cut,
        index: Arc<CheckpointIndex>,
        lease_timeout: Option<Duration>,
        backend: Arc<dyn Backend>,
        control: Control,
        begun: Instant,
    ) -> Result<Self> {
        let cut = Arc::new(cut);
        let deliveries = Arc::new(deliveries(&cut));
        let (files, windows) = cut.reads();
        let hook = {
            let (cut, deliveries) = (Arc::clone(&cut), Arc::clone(&deliveries));
            Arc::new(move |number: usize, buffer: &mut [u8]| {
                move_together(&cut, &deliveries[number], number, buffer);
                Ok(())
            })
        };
        let windows = RangeStream::with_hook(
            files,
            windows,
            backend,
            cut.params(lease_timeout),
            control,
            hook,
        )?;
        Ok(Self {
            windows,
            tensors,
            cut,
            deliveries,
            current: None,
            index,
            begun,
            delivered_bytes: 0,
        })
    }

    /// The tensors that are streamed, in the order in which their first pieces come.
    pub fn tensors(&self) -> &[StreamedTensor] {
        &self.tensors
    }

    /// How they are read, and why.
    pub fn plan(&self) -> &StreamPlan {
        &self.cut.plan
    }

    /// What the stream has done so far.
    pub fn report(&self) -> StreamReport {
        StreamReport {
            plan: self.cut.plan.clone(),
            tensor_count: self.tensors.len(),
            data_bytes: self.delivered_bytes,
            elapsed: self.begun.elapsed(),
            stats: self.windows.stats(),
        }
    }

    /// Hands all that is still to come to `sink`.
    ///
    /// # Errors
    ///
    /// What keeps tensors from being read, and [`Error::Sink`](crate::Error::Sink) with what the sink says.
    pub fn drain_into(mut self, sink: &mut (impl Sink + ?Sized)) -> Result<StreamReport> {
        sink.begin(&self.tensors)
            .map_err(|source| crate::Error::Sink {
                tensor: None,
                source,
            })?;
        for piece in self.by_ref() {
            let piece = piece?;
            let tensor = piece.tensor().clone();
            sink.write(piece).map_err(|source| crate::Error::Sink {
                tensor: Some(tensor.name().to_owned()),
                source,
            })?;
        }
        sink.finish().map_err(|source| crate::Error::Sink {
            tensor: None,
            source,
        })?;
        Ok(self.report())
    }

    /// Ends the stream without waiting for the reads under way, as dropping it does: for tasks, which must not hold up
    /// their executor.
    pub fn detach(self) {
        self.windows.detach();
    }

    /// The next piece of the window at hand.
    fn take_piece(&mut self) -> Option<StreamedPiece> {
        let (window, next) = self.current.as_mut()?;
        let number = window.number;
        let pieces = &self.cut.windows[number].pieces;
        let Some(piece) = pieces.get(*next) else {
            self.current = None;
            return None;
        };
        let bytes = match &self.deliveries[number][*next] {
            Delivery::InPlace(range) if range.is_empty() => Bytes::new(),
            Delivery::InPlace(range) => window.bytes.slice(range.clone()),
            Delivery::Copied => {
                let mut copied = Vec::with_capacity(position(piece.bytes));
                for run in self.cut.windows[number].copies(piece, &self.cut.parts[piece.part]) {
                    copied.extend_from_slice(&window.bytes[run]);
                }
                copied.into()
            }
        };
        *next += 1;
        let taken = StreamedPiece {
            tensor: self.tensors[piece.part].clone(),
            offset: piece.offset,
            bytes,
            is_last: piece.is_last,
        };
        if *next == pieces.len() {
            // From here on only the pieces hold the buffer.
            self.current = None;
        }
        self.delivered_bytes += taken.bytes.len() as u64;
        Some(taken)
    }

    fn named<T>(&self, result: tensora_io::Result<T>) -> Result<T> {
        result.map_err(|error| name_tensor(&self.index, error))
    }
}

/// Moves the runs of pieces that lie apart together, to where their first one is.
fn move_together(cut: &Cut, deliveries: &[Delivery], number: usize, buffer: &mut [u8]) {
    let window = &cut.windows[number];
    for (piece, delivery) in window.pieces.iter().zip(deliveries) {
        let Delivery::InPlace(range) = delivery else {
            continue;
        };
        let mut at = range.start;
        for run in window.copies(piece, &cut.parts[piece.part]) {
            let len = run.len();
            if run.start != at {
                buffer.copy_within(run, at);
            }
            at += len;
        }
    }
}

impl Iterator for TensorStream {
    type Item = Result<StreamedPiece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.take_piece() {
                return Some(Ok(piece));
            }
            let window = self.windows.next()?;
            match self.named(window) {
                Ok(window) => self.current = Some((window, 0)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl futures_core::Stream for TensorStream {
    type Item = Result<StreamedPiece>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(piece) = self.take_piece() {
                return Poll::Ready(Some(Ok(piece)));
            }
            match Pin::new(&mut self.windows).poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(window)) => match self.named(window) {
                    Ok(window) => self.current = Some((window, 0)),
                    Err(error) => return Poll::Ready(Some(Err(error))),
                },
            }
        }
    }
}

/// What a stream did, and how fast.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StreamReport {
    /// How tensors were read, and why.
    pub plan: StreamPlan,
    /// How many tensors there are.
    pub tensor_count: usize,
    /// Bytes delivered; tied tensors count each.
    pub data_bytes: u64,
    /// From when the stream was asked for.
    pub elapsed: Duration,
    /// What the readers counted, and who waited for whom.
    pub stats: StreamStats,
}

impl StreamReport {
    /// Bytes delivered per second.
    #[allow(clippy::cast_precision_loss)]
    pub fn bytes_per_second(&self) -> f64 {
        self.data_bytes as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}
