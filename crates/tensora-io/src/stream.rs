//! Windows of files, read ahead by threads into a bounded set of reused buffers.
#![forbid(unsafe_code)]

mod state;
mod window;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::control::CancelListener;
use crate::{
    Backend, CancelToken, Control, Error, ReadRequest, ReadStats, Region, Result, SourceFile,
    TransferParams,
};
use state::{Failure, Shared, Turn};
pub use window::{ReadExtent, ReadWindow};

/// How a stream is read, and how much memory it takes: `buffers` times `buffer_bytes`, and scratch for ragged ends.
///
/// A reader has the reads of its own window in flight and no others, so what the device sees is `readers` times
/// the workers, queue depth and chunk of `transfer`, less what is missing at each window's end. Rings and Tokio
/// set something up for every window and want larger ones than threads do; but windows should be small enough
/// that there are at least two buffers per reader, or readers and consumer take turns instead of working at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamParams {
    /// How many buffers there are, 1 to [`MAX_BUFFERS`](Self::MAX_BUFFERS): as many windows are in memory at
    /// most, those that the consumer holds among them.
    pub buffers: u32,
    /// Size of a buffer, in bytes. Multiples of 2 MiB are made of huge pages, which direct reads profit from.
    pub buffer_bytes: usize,
    /// How many windows are read at once, each by a thread of its own, 1 to
    /// [`MAX_READERS`](Self::MAX_READERS); more than there are buffers or windows are not started.
    pub readers: u32,
    /// How each window is read. With one worker, the reader itself reads, and no thread is made per window.
    pub transfer: TransferParams,
    /// How long the consumer waits while every buffer is leased out, before it is told so with
    /// [`Error::LeasesHeld`].
    pub lease_timeout: Duration,
}

impl StreamParams {
    /// Each buffer is a mapping of memory; Linux allows a process 65,530 by default.
    pub const MAX_BUFFERS: u32 = 16 << 10;
    /// More threads than this never helped on any machine that was measured.
    pub const MAX_READERS: u32 = TransferParams::MAX_WORKERS;
    /// Longer than any consumer that still makes progress is known to hold every buffer.
    pub const DEFAULT_LEASE_TIMEOUT: Duration = Duration::from_secs(30);

    /// These parameters, with [`DEFAULT_LEASE_TIMEOUT`](Self::DEFAULT_LEASE_TIMEOUT).
    pub fn new(buffers: u32, buffer_bytes: usize, readers: u32, transfer: TransferParams) -> Self {
        Self {
            buffers,
            buffer_bytes,
            readers,
            transfer,
            lease_timeout: Self::DEFAULT_LEASE_TIMEOUT,
        }
    }

    /// Waits for leases this long.
    #[must_use]
    pub fn with_lease_timeout(mut self, lease_timeout: Duration) -> Self {
        self.lease_timeout = lease_timeout;
        self
    }

    /// Checks every parameter against its range.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidParameter`] names the parameter, the value and the range.
    pub fn validate(&self) -> Result<()> {
        for (parameter, value, max) in [
            ("buffers", self.buffers, Self::MAX_BUFFERS),
            ("readers", self.readers, Self::MAX_READERS),
        ] {
            if !(1..=max).contains(&value) {
                return Err(Error::InvalidParameter {
                    parameter,
                    value: value.into(),
                    min: 1,
                    max: max.into(),
                });
            }
        }
        self.transfer.validate()
    }
}

/// Run by a reader on each filled buffer while nobody else has it: to check it, to compact it in place, or to fill
/// in what no file holds. It is given the position of the window in the stream and the window's part of the
/// buffer. Its error comes at the window's turn and ends the stream, as that of a read does.
pub type WindowHook = Arc<dyn Fn(usize, &mut [u8]) -> Result<()> + Send + Sync>;

/// A window that was read: a lease of its buffer.
#[derive(Clone)]
pub struct FilledWindow {
    /// Position of the window in the stream, from 0.
    pub number: usize,
    /// The window's part of the buffer. The buffer is used again once the last clone and slice of these bytes is
    /// dropped; until then they do not change, whatever becomes of the stream.
    pub bytes: Bytes,
}

impl fmt::Debug for FilledWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilledWindow")
            .field("number", &self.number)
            .field("bytes", &self.bytes.len())
            .finish()
    }
}

/// What a stream took so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct StreamStats {
    /// Everything that was read, also of windows that were not handed out (yet).
    pub read: ReadStats,
    /// Windows handed out.
    pub windows: u64,
    /// How long the consumer waited for windows, from asking for one in vain to getting it.
    pub consumer_wait: Duration,
    /// How long readers waited for buffers, added up over the readers.
    pub reader_wait: Duration,
    /// How often the consumer waited while every buffer was leased out.
    pub lease_stalls: u64,
    /// How long these stalls were, added up.
    pub lease_stall_elapsed: Duration,
    /// Most buffers leased out at once.
    pub peak_leases: u32,
}

/// Windows of files, read ahead into a bounded set of buffers and handed out in order.
///
/// Threads take the windows in turn, each with a free buffer, and read them with any [`Backend`]. A window's bytes
/// are a lease: the buffer is read into again once they are dropped. Looking ahead is bounded by the buffers.
///
/// The stream is an [`Iterator`] that blocks and a [`Stream`](futures_core::Stream) that does not; both give the
/// same windows. Where the methods of both are in scope, say which is meant: `Iterator::next(&mut stream)` or
/// `StreamExt::next(&mut stream)`.
///
/// ```
/// use std::sync::Arc;
/// use tensora_io::{
///     BackendKind, Control, DirectPolicy, RangeStream, ReadExtent, ReadWindow, ResidentPolicy,
///     SourceFile, StreamParams, TransferParams, backend,
/// };
///
/// let file = Arc::new(SourceFile::open("Cargo.toml")?);
/// let transfer = TransferParams {
///     chunk_bytes: 1 << 20,
///     queue_depth: 1,
///     workers: 1,
///     direct: DirectPolicy::Never,
///     resident: ResidentPolicy::Reread,
/// };
/// let params = StreamParams::new(4, 512, 2, transfer);
/// let windows = (0..file.len())
///     .step_by(params.buffer_bytes)
///     .map(|start| {
///         let end = file.len().min(start + params.buffer_bytes as u64);
///         ReadWindow {
///             extents: vec![ReadExtent { file: 0, range: start..end, at: 0 }],
///             buffer_bytes: (end - start) as usize,
///         }
///     })
///     .collect();
/// let backend = Arc::from(backend(BackendKind::Sync)?);
/// let mut content = Vec::new();
/// for window in RangeStream::new(vec![file], windows, backend, params, Control::new())? {
///     content.extend_from_slice(&window?.bytes); // dropped here, and its buffer free again
/// }
/// assert!(content.starts_with(b"[package]"));
/// # Ok::<(), tensora_io::Error>(())
/// ```
///
/// # Errors
///
/// A window that cannot be read, or whose hook fails, gives its error at its turn, after the windows before it; then the stream is at its
/// end. [`Error::Cancelled`] comes at once, and is the end too. [`Error::LeasesHeld`] is the only one after
/// which it goes on: every buffer was leased out for [`lease_timeout`](StreamParams::lease_timeout), and the same window
/// can be asked for again.
///
/// # Panics
///
/// A panic of the hook, of the progress callback or of the backend is passed on at the turn of its window,
/// and is the stream's end.
///
/// # Dropping
///
/// Dropping the stream cancels it and waits for its threads: for the reads under way, at most a chunk in each
/// place of each queue, and for a hook that runs. [`detach`](Self::detach) does not wait. Leases outlive the stream,
/// and their memory is freed as they are dropped.
pub struct RangeStream {
    job: Arc<Job>,
    readers: Vec<JoinHandle<()>>,
    stop: CancelToken,
    waiting_since: Option<Instant>,
    consumer_wait: Duration,
}

/// What readers work on; it owns, or shares in owning, all that they touch.
struct Job {
    shared: Arc<Shared>,
    files: Vec<Arc<SourceFile>>,
    windows: Vec<ReadWindow>,
    backend: Arc<dyn Backend>,
    transfer: TransferParams,
    lease_timeout: Duration,
    /// The caller's, but also stopped by the stream's end.
    control: Control,
    hook: Option<WindowHook>,
}

impl RangeStream {
    /// Starts to read `windows` of `files`, in order.
    ///
    /// `control` watches and stops the stream like any load.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidParameter`] for a parameter outside its range;
    /// - [`Error::InvalidWindow`] for a window that is larger than a buffer, or has an extent that names no
    ///   file, does not lie inside the window's part of the buffer or overlaps another one there;
    /// - [`Error::Memory`] when there is no memory for the buffers;
    /// - [`Error::Thread`] when the system refuses a thread.
    pub fn new(
        files: Vec<Arc<SourceFile>>,
        windows: Vec<ReadWindow>,
        backend: Arc<dyn Backend>,
        params: StreamParams,
        control: Control,
    ) -> Result<Self> {
        Self::start(files, windows, backend, params, control, None)
    }

    /// The same, with a hook that readers run on each window they have read.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_hook(
        files: Vec<Arc<SourceFile>>,
        windows: Vec<ReadWindow>,
        backend: Arc<dyn Backend>,
        params: StreamParams,
        control: Control,
        hook: WindowHook,
    ) -> Result<Self> {
        Self::start(files, windows, backend, params, control, Some(hook))
    }

    fn start(
        files: Vec<Arc<SourceFile>>,
        mut windows: Vec<ReadWindow>,
        backend: Arc<dyn Backend>,
        params: StreamParams,
        control: Control,
        hook: Option<WindowHook>,
    ) -> Result<Self> {
        params.validate()?;
        for (number, window) in windows.iter_mut().enumerate() {
            window.prepare(number, &files, params.buffer_bytes)?;
        }
        let at_most =
            |limit: u32, count: usize| u32::try_from(count).map_or(limit, |n| n.min(limit));
        let filled = windows.iter().filter(|window| window.buffer_bytes > 0);
        let buffers = at_most(params.buffers, filled.count());
        // Address space only: the readers touch the pages, when and if they come to them.
        let regions = (0..buffers)
            .map(|_| Region::allocate(params.buffer_bytes))
            .collect::<Result<_>>()?;
        let shared = Arc::new(Shared::new(regions, buffers, windows.len()));
        let listener: Weak<dyn CancelListener> = Arc::downgrade(&shared) as _;
        control.token().listen(&listener);
        let stop = control.token().child();
        // Windows without a buffer still want a reader.
        let readers = at_most(params.readers, windows.len()).min(buffers.max(1));
        let job = Arc::new(Job {
            shared,
            files,
            windows,
            backend,
            transfer: params.transfer,
            lease_timeout: params.lease_timeout,
            control: control.with_cancel(stop.clone()),
            hook,
        });
        let mut stream = Self {
            job,
            readers: Vec::new(),
            stop,
            waiting_since: None,
            consumer_wait: Duration::ZERO,
        };
        for _ in 0..readers {
            let job = Arc::clone(&stream.job);
            let reader = std::thread::Builder::new()
                .name("tensora-stream".to_owned())
                .spawn(move || job.run())
                // Those that were started end with the stream that is dropped here.
                .map_err(|source| Error::Thread { source })?;
            stream.readers.push(reader);
        }
        Ok(stream)
    }

    /// What it took so far.
    pub fn stats(&self) -> StreamStats {
        let waiting = self
            .waiting_since
            .map_or(Duration::ZERO, |since| since.elapsed());
        StreamStats {
            consumer_wait: self.consumer_wait + waiting,
            ..self.job.shared.stats()
        }
    }

    /// Cancels the stream without waiting for reads under way: its threads, which own all that they touch, end
    /// by themselves. For asynchronous code, where dropping the stream would hold up its executor.
    pub fn detach(mut self) {
        self.close();
        self.readers.clear();
    }

    /// Reads no more, and begins to free everything.
    fn close(&self) {
        self.stop.cancel();
        self.job.shared.close();
    }

    /// The next window, the end, or the time at which to ask again if nothing happens before.
    fn ask(&mut self, waker: &Waker) -> Result<Option<Result<FilledWindow>>, Option<Instant>> {
        let asked = Instant::now();
        let turn = self.job.shared.poll(&self.job, waker);
        if let Turn::Pending {
            deadline,
            new_stall,
        } = turn
        {
            self.waiting_since.get_or_insert(asked);
            match new_stall {
                // The first is news; one with every window would be noise.
                Some(1) => tracing::warn!(
                    "the stream waits: all its buffers are held by windows that were handed out earlier"
                ),
                Some(stalls) => tracing::debug!(stalls, "the stream waits for leases again"),
                None => {}
            }
            return Err(deadline);
        }
        if let Some(since) = self.waiting_since.take() {
            self.consumer_wait += since.elapsed();
        }
        Ok(match turn {
            Turn::Window { number, region } => Some(Ok(self.job.lease(number, region))),
            Turn::Held {
                held,
                buffers,
                waited,
            } => {
                let error = Error::LeasesHeld {
                    held,
                    buffers,
                    waited,
                };
                tracing::warn!("{error}");
                Some(Err(error))
            }
            Turn::Failed(Failure::Error(error)) => Some(Err(error)),
            Turn::Failed(Failure::Panic(panic)) => resume_unwind(panic),
            Turn::Ended | Turn::Pending { .. } => None,
        })
    }
}

impl Iterator for RangeStream {
    type Item = Result<FilledWindow>;

    /// The next window, waited for.
    fn next(&mut self) -> Option<Self::Item> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            match self.ask(&waker) {
                Ok(item) => return item,
                Err(None) => std::thread::park(),
                Err(Some(deadline)) => {
                    std::thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
                }
            }
        }
    }
}

impl std::iter::FusedIterator for RangeStream {}

impl futures_core::Stream for RangeStream {
    type Item = Result<FilledWindow>;

    /// The next window; never waits. Needs no particular executor, and no timer: the stream's own threads wake
    /// the task, also when [`lease_timeout`](StreamParams::lease_timeout) is over.
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ask(context.waker()).map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for RangeStream {
    fn drop(&mut self) {
        self.close();
        for reader in self.readers.drain(..) {
            // What panicked was caught, and passed on to the consumer if it got that far.
            let _ = reader.join();
        }
    }
}

impl fmt::Debug for RangeStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (delivered, end) = self.job.shared.position();
        f.debug_struct("RangeStream")
            .field("backend", &self.job.backend)
            .field("delivered", &delivered)
            .field("end", &end)
            .field("readers", &self.readers.len())
            .finish_non_exhaustive()
    }
}

/// Wakes a thread that blocks.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Job {
    fn is_cancelled(&self) -> bool {
        self.control.is_cancelled()
    }

    /// Whether a window needs a buffer.
    fn takes_buffer(&self, number: usize) -> bool {
        self.windows
            .get(number)
            .is_some_and(|window| window.buffer_bytes > 0)
    }

    /// A reader: fills windows until there are none left.
    fn run(&self) {
        while let Some((number, mut region)) = self.shared.claim(self) {
            // After a panic the buffer is whole, if not its content: it is no more than bytes.
            let fill = AssertUnwindSafe(|| self.fill(number, region.as_mut()));
            let outcome = catch_unwind(fill);
            self.shared.complete(number, region, outcome);
        }
    }

    fn fill(&self, number: usize, region: Option<&mut Region>) -> Result<ReadStats> {
        let window = &self.windows[number];
        let memory = region.map_or(&mut [][..], |region| {
            &mut region.as_mut_slice()[..window.buffer_bytes]
        });
        let mut requests = Vec::with_capacity(window.extents.len());
        let (mut rest, mut rest_at) = (&mut *memory, 0);
        // In the order of their places, without overlap and inside the window, as was checked.
        for extent in &window.extents {
            let (_, behind) = std::mem::take(&mut rest).split_at_mut(extent.at - rest_at);
            let (destination, behind) = behind.split_at_mut(extent.len());
            (rest, rest_at) = (behind, extent.at + extent.len());
            requests.push(ReadRequest {
                file: &self.files[extent.file],
                offset: extent.range.start,
                destination: destination.into(),
            });
        }
        let stats = match requests.is_empty() {
            true => ReadStats::default(),
            false => self.backend.read(requests, &self.transfer, &self.control)?,
        };
        if let Some(hook) = &self.hook {
            hook(number, memory)?;
        }
        Ok(stats)
    }

    fn lease(&self, number: usize, region: Option<Region>) -> FilledWindow {
        let bytes = region.map_or_else(Bytes::new, |region| {
            Bytes::from_owner(Lease {
                region: Some(region),
                bytes: self.windows[number].buffer_bytes,
                shared: Arc::clone(&self.shared),
            })
        });
        FilledWindow { number, bytes }
    }
}

/// A buffer that is leased out, behind the [`Bytes`] of a window.
struct Lease {
    /// Present until it is dropped.
    region: Option<Region>,
    bytes: usize,
    shared: Arc<Shared>,
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        self.region
            .as_ref()
            .map_or(&[], |region| &region.as_slice()[..self.bytes])
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(region) = self.region.take() {
            self.shared.give_back(region);
        }
    }
}
