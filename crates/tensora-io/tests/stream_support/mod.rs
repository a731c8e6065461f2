//! What the tests of streams share: sample files, windows over them, and a backend that does what it is told.
// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tensora_io::{
    Backend, BackendKind, Control, DirectPolicy, FilledWindow, ReadExtent, ReadRequest, ReadStats,
    ReadWindow, ResidentPolicy, Result, SourceFile, StreamParams, TransferParams, backend,
};

/// Longer than anything takes here that does not hang.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A file and what is in it.
pub(crate) struct Sample {
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<SourceFile>,
    pub(crate) content: Vec<u8>,
}

/// Writes and opens a file in which no two places are alike.
pub(crate) fn sample(directory: &TempDir, name: &str, len: usize) -> Sample {
    let mut state = name.bytes().fold(0x9E37_79B9_u64, |state, byte| {
        state.wrapping_mul(31).wrapping_add(byte.into())
    });
    let content: Vec<u8> = std::iter::repeat_with(|| {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_be_bytes()[0]
    })
    .take(len)
    .collect();
    let path = directory.path().join(name);
    std::fs::write(&path, &content).unwrap();
    Sample {
        file: Arc::new(SourceFile::open(&path).unwrap()),
        path,
        content,
    }
}

/// A window that is one range of one file.
pub(crate) fn window(file: usize, start: usize, len: usize) -> ReadWindow {
    ReadWindow {
        extents: vec![ReadExtent {
            file,
            range: start as u64..(start + len) as u64,
            at: 0,
        }],
        buffer_bytes: len,
    }
}

/// `count` windows of `len` bytes, one after the other.
pub(crate) fn row(file: usize, len: usize, count: usize) -> Vec<ReadWindow> {
    (0..count).map(|n| window(file, n * len, len)).collect()
}

pub(crate) fn transfer() -> TransferParams {
    TransferParams {
        chunk_bytes: 4096,
        queue_depth: 4,
        workers: 1,
        direct: DirectPolicy::Never,
        resident: ResidentPolicy::Reread,
    }
}

pub(crate) fn params(buffers: u32, buffer_bytes: usize, readers: u32) -> StreamParams {
    StreamParams::new(buffers, buffer_bytes, readers, transfer()).with_lease_timeout(LONG)
}

/// Every backend that runs here.
pub(crate) fn backends() -> Vec<Arc<dyn Backend>> {
    BackendKind::ALL
        .into_iter()
        .filter_map(|kind| match backend(kind) {
            Ok(backend) => Some(Arc::from(backend)),
            Err(error) => {
                #[cfg(feature = "testing")]
                tensora_io::testing::skip(&format!("streams: {error}"));
                #[cfg(not(feature = "testing"))]
                eprintln!("SKIP: streams: {error}");
                None
            }
        })
        .collect()
}

pub(crate) fn sync() -> Arc<dyn Backend> {
    Arc::from(backend(BackendKind::Sync).unwrap())
}

/// Reads with threads, but first does what a test says, given where the first range begins.
pub(crate) struct Scripted<F> {
    inner: Box<dyn Backend>,
    before: F,
}

pub(crate) fn scripted<F>(before: F) -> Arc<dyn Backend>
where
    F: Fn(usize, &Control) + Send + Sync + 'static,
{
    Arc::new(Scripted {
        inner: backend(BackendKind::Sync).unwrap(),
        before,
    })
}

impl<F: Fn(usize, &Control) + Send + Sync> Backend for Scripted<F> {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        (self.before)(usize::try_from(requests[0].offset).unwrap(), control);
        self.inner.read(requests, params, control)
    }
}

impl<F> fmt::Debug for Scripted<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scripted")
    }
}

/// A number that threads wait for.
#[derive(Clone, Default)]
pub(crate) struct Count(Arc<(Mutex<u64>, Condvar)>);

impl Count {
    pub(crate) fn add(&self) {
        *self.0.0.lock().unwrap() += 1;
        self.0.1.notify_all();
    }

    pub(crate) fn get(&self) -> u64 {
        *self.0.0.lock().unwrap()
    }

    /// Waits until it is `least` or more.
    pub(crate) fn wait_for(&self, least: u64) {
        let count = self.0.0.lock().unwrap();
        let waited = self
            .0
            .1
            .wait_timeout_while(count, LONG, |count| *count < least);
        let (count, result) = waited.unwrap();
        assert!(!result.timed_out(), "{count}, but never {least}");
    }
}

/// The bytes of a window that were read into it are those of the files.
pub(crate) fn verify(filled: &FilledWindow, window: &ReadWindow, samples: &[Sample], mask: u8) {
    assert_eq!(filled.bytes.len(), window.buffer_bytes, "{filled:?}");
    for extent in &window.extents {
        let [start, end] =
            [extent.range.start, extent.range.end].map(|at| usize::try_from(at).unwrap());
        let found = &filled.bytes[extent.at..extent.at + (end - start)];
        let expected = &samples[extent.file].content[start..end];
        let differs = found
            .iter()
            .zip(expected)
            .position(|(found, expected)| *found != expected ^ mask);
        assert_eq!(differs, None, "window {}, {extent:?}", filled.number);
    }
}

/// Fails rather than hangs when `work` does not come to its end.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, ended) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || done.send(work()));
    match ended.recv_timeout(limit) {
        Ok(value) => value,
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("no end after {limit:?}"),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(_) => unreachable!("the sender is only dropped by a panic"),
        },
    }
}

/// Whether `condition` comes true soon.
pub(crate) fn settles(condition: impl Fn() -> bool) -> bool {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > Duration::from_secs(5) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}
