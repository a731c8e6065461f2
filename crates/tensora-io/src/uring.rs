//! The rings. All `unsafe` that has to do with io_uring is in this file.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use crate::transfer::{Next, Operation, Transfer};
use crate::{
    Backend, BackendKind, Control, Error, ReadRequest, ReadStats, Region, Result, SourceFile,
    TransferParams, positioned, probe,
};

/// Scratch buffers in use on one ring. Deep queues of ragged pieces would otherwise take memory without
/// bound.
const MAX_SCRATCH: usize = 16;
/// `IORING_ENTER_GETEVENTS`: wait for completions.
const GET_EVENTS: u32 = 1;
/// How long to leave a ring alone that refuses work or waiting for the moment.
const BUSY_WAIT: Duration = Duration::from_millis(1);
/// How often in a row a ring may do that before the batch fails: ten seconds' worth.
const MAX_BUSY_WAITS: u32 = 10_000;

/// Several io_uring rings, each with a worker of its own.
///
/// `workers` rings each keep up to `queue_depth` reads under way, or fewer and less deep ones, where limits allow no
/// more; submissions go out in batches and completions are taken in bulk. Destination pages are faulted in by the
/// submitting worker, so two or more workers overlap that with the device. Files on FUSE are read by the workers
/// themselves, one read at a time each: there, rings can deliver wrong bytes.
#[derive(Clone, Copy, Debug)]
pub struct IoUringBackend(());

impl IoUringBackend {
    /// The backend; its rings live only as long as a batch.
    ///
    /// # Errors
    ///
    /// [`Error::BackendUnavailable`], with the reason and what to do, when no ring can be made or used here.
    pub fn new() -> Result<Self> {
        probe::try_ring()?;
        Ok(Self(()))
    }
}

impl Backend for IoUringBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::IoUring
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        let transfer = Transfer::new(requests, params, control)?;
        // A ring continues a short read by itself, as long as it may not wait. On FUSE, where the server chose
        // `direct_io` and answers short, it continues at the offset where it began: the bytes are wrong, and the
        // count is right (seen on Linux 6.18; `IOSQE_ASYNC` does not help). Nothing is lost by keeping off: such
        // reads block the submission anyway.
        let off_the_ring: Vec<bool> = transfer.sources().map(SourceFile::is_on_fuse).collect();
        let rings = AtomicUsize::new(0);
        let refused = OnceLock::new();
        transfer.run(self.kind(), params.workers, &|| {
            match make_ring(params.queue_depth) {
                Ok((ring, queue_depth)) => {
                    rings.fetch_add(1, Ordering::Relaxed);
                    Worker::new(ring, &transfer, &off_the_ring, queue_depth).run();
                }
                // Where limits allow fewer rings than there are workers, those that have one do all the work.
                Err(error) => drop(refused.set(error)),
            }
        });
        if rings.into_inner() == 0
            && let Some(error) = refused.into_inner()
        {
            transfer.fail(error);
        }
        transfer.finish()
    }
}

fn make_ring(mut queue_depth: u32) -> Result<(IoUring, u32)> {
    loop {
        match build_ring(queue_depth) {
            Ok(ring) => return Ok((ring, queue_depth)),
            Err(error) if is_out_of_memory(&error) && queue_depth > 1 => queue_depth /= 2,
            Err(error) => {
                let (reason, remedy) = probe::io_uring_unavailable(&error);
                return Err(Error::BackendUnavailable {
                    backend: BackendKind::IoUring,
                    reason,
                    remedy,
                });
            }
        }
    }
}

fn build_ring(queue_depth: u32) -> io::Result<IoUring> {
    // With these two, the kernel runs completions when the worker asks for them and does not
    // interrupt it in between (Linux 6.0); older kernels refuse them.
    IoUring::builder()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .build(queue_depth)
        .or_else(|_| IoUring::new(queue_depth))
}

fn is_out_of_memory(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NOMEM.raw_os_error())
}

/// A read that the kernel may be working on.
struct Slot {
    operation: Operation,
    scratch: Option<Region>,
}

/// One ring and the operations under way on it.
///
/// The kernel writes into the memory of every occupied slot until that slot's completion has been
/// taken. `Drop` therefore waits for all of them: no path, unwinding included, leaves the memory behind while
/// the kernel still has it.
struct Worker<'t, 'a> {
    ring: IoUring,
    transfer: &'t Transfer<'a>,
    /// Of each file of the transfer.
    off_the_ring: &'t [bool],
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Taken from the transfer, but kept back until a scratch buffer is free again.
    waiting: Option<Operation>,
    scratch_in_use: usize,
    /// What the next waits are answered with, instead of the kernel's answer, from the last one on.
    #[cfg(test)]
    refusals: Vec<io::Error>,
}

impl<'t, 'a> Worker<'t, 'a> {
    fn new(
        ring: IoUring,
        transfer: &'t Transfer<'a>,
        off_the_ring: &'t [bool],
        queue_depth: u32,
    ) -> Self {
        let slots = queue_depth as usize;
        Self {
            ring,
            transfer,
            off_the_ring,
            slots: std::iter::repeat_with(|| None).take(slots).collect(),
            free: (0..slots).rev().collect(),
            waiting: None,
            scratch_in_use: 0,
            #[cfg(test)]
            refusals: Vec::new(),
        }
    }

    /// Takes operations and completes them until there are none left or the batch stops.
    fn run(&mut self) {
        let mut busy_waits = 0;
        loop {
            self.fill();
            if self.in_flight() == 0 {
                return;
            }
            let waited = self.submit_and_wait();
            let taken = self.take_completions();
            if let Err(source) = waited
                && taken == 0
            {
                if source.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                busy_waits += 1;
                if !is_passing(&source) || busy_waits > MAX_BUSY_WAITS {
                    self.transfer.fail(Error::Backend {
                        backend: BackendKind::IoUring,
                        operation: "submit reads to a ring",
                        source,
                    });
                }
                if self.transfer.should_stop() {
                    // `Drop` waits for what the kernel has already taken.
                    return;
                }
                std::thread::sleep(BUSY_WAIT);
            } else {
                busy_waits = 0;
            }
        }
    }

    /// Submits what is queued, and waits until a completion has arrived.
    fn submit_and_wait(&mut self) -> io::Result<usize> {
        #[cfg(test)]
        if let Some(refusal) = self.refusals.pop() {
            return Err(refusal);
        }
        self.ring.submit_and_wait(1)
    }

    /// Queues operations until every slot is taken, or scratch is, or there are none left.
    fn fill(&mut self) {
        while let Some(&slot) = self.free.last() {
            let kept_back = self.waiting.take().filter(|_| !self.transfer.should_stop());
            let Some(operation) = kept_back.or_else(|| self.transfer.next()) else {
                return;
            };
            if self.off_the_ring[self.transfer.file_index(&operation)] {
                positioned::read(self.transfer, operation);
                continue;
            }
            if operation.needs_scratch() && self.scratch_in_use == MAX_SCRATCH {
                self.waiting = Some(operation);
                return;
            }
            let scratch = match self.transfer.scratch(&operation) {
                Ok(scratch) => scratch,
                Err(error) => return self.transfer.fail(error),
            };
            self.scratch_in_use += usize::from(scratch.is_some());
            self.slots[slot] = Some(Slot { operation, scratch });
            self.free.pop();
            self.push(slot);
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues the next read of the operation in `slot`.
    fn push(&mut self, slot: usize) {
        let Some(Slot { operation, scratch }) = &mut self.slots[slot] else {
            return;
        };
        let descriptor = types::Fd(self.transfer.descriptor(operation).as_raw_fd());
        let (memory, len) = operation.memory(scratch.as_mut());
        // A chunk is at most 1 GiB.
        #[allow(clippy::cast_possible_truncation)]
        let entry = opcode::Read::new(descriptor, memory, len as u32)
            .offset(operation.position())
            .build()
            .user_data(slot as u64);
        // SAFETY: `len` bytes from `memory` belong to this operation alone and stay valid until its
        // completion has been taken: destinations are borrowed by the transfer, which outlives this worker, scratch
        // is owned by the slot, and the worker's `Drop` waits for every read that was submitted
        // (one that never was is unknown to the kernel). The descriptor is borrowed from the
        // transfer's files in the same way.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // The submission queue has as many entries as there are slots and a slot has one at most;
            // if it is full all the same, the kernel must not be waited for on this slot's account.
            self.slots[slot] = None;
            self.free.push(slot);
            self.transfer.fail(Error::Backend {
                backend: BackendKind::IoUring,
                operation: "queue a read",
                source: io::ErrorKind::QuotaExceeded.into(),
            });
        }
    }

    /// Takes every completion that has arrived, reads on where one was short, and counts them.
    fn take_completions(&mut self) -> usize {
        let mut taken = 0;
        while let Some((slot, result)) = self.next_completion() {
            let Some(Slot {
                mut operation,
                scratch,
            }) = self.slots[slot].take()
            else {
                continue;
            };
            // From here on the kernel has nothing to do with the slot, so a panic of the
            // progress callback inside `returned` must find it free.
            self.free.push(slot);
            let next = self
                .transfer
                .returned(&mut operation, scratch.as_ref(), result);
            if next == Next::Again && !self.transfer.should_stop() {
                self.free.pop();
                self.slots[slot] = Some(Slot { operation, scratch });
                self.push(slot);
            } else {
                self.scratch_in_use -= usize::from(scratch.is_some());
                self.transfer.recycle(scratch);
            }
            taken += 1;
        }
        taken
    }

    fn next_completion(&mut self) -> Option<(usize, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        let result = match entry.result() {
            count @ 0.. => Ok(count.unsigned_abs() as usize),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        };
        #[allow(clippy::cast_possible_truncation)]
        Some((entry.user_data() as usize, result))
    }
}

impl Worker<'_, '_> {
    /// Waits until the kernel has nothing to do with any slot, and takes no notice of what it has read.
    fn wait_for_in_flight(&mut self) {
        // Reads that were queued but never submitted are unknown to the kernel and stay so: nothing
        // below submits.
        let unsubmitted = self.ring.submission().len();
        while self.in_flight() > unsubmitted {
            while let Some((slot, _)) = self.next_completion() {
                self.slots[slot] = None;
                self.free.push(slot);
            }
            if self.in_flight() <= unsubmitted {
                break;
            }
            // SAFETY: nothing is submitted and no signal mask is passed, so the kernel reads no
            // memory of ours; it only waits.
            let waited = unsafe { self.ring.submitter().enter::<()>(0, 1, GET_EVENTS, None) };
            if waited.is_err() {
                // Interrupted, or refused: whatever the reason, the kernel may still be writing, so there is
                // no way out but to look again. Completions arrive in shared memory all the same.
                std::thread::sleep(BUSY_WAIT);
            }
        }
    }
}

impl Drop for Worker<'_, '_> {
    fn drop(&mut self) {
        self.wait_for_in_flight();
    }
}

/// Whether a failed wait can simply be repeated, once arrived completions have been taken.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::AGAIN, Errno::BUSY]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::io::Errno;
    use tempfile::TempDir;

    use super::*;
    use crate::skip_support::skip;
    use crate::{DirectPolicy, ResidentPolicy};

    /// Longer than anything takes here that does not hang.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Files whose bytes are known, in the page cache.
    struct Samples {
        directory: TempDir,
        files: Vec<SourceFile>,
        contents: Vec<Vec<u8>>,
    }

    impl Samples {
        /// Nothing, which is counted, where there are no rings.
        fn new(what: &str, lens: &[usize]) -> Option<Self> {
            if let Err(error) = probe::try_ring() {
                skip(&format!("{what}: {error}"));
                return None;
            }
            let directory = tempfile::tempdir().unwrap();
            let contents: Vec<Vec<u8>> = lens
                .iter()
                .enumerate()
                .map(|(number, &len)| {
                    let byte = |at: usize| (at * 31 + at / 251 + number) % 255 + 1;
                    (0..len).map(|at| byte(at).to_le_bytes()[0]).collect()
                })
                .collect();
            let files = contents
                .iter()
                .enumerate()
                .map(|(number, content)| {
                    let path = directory.path().join(number.to_string());
                    std::fs::write(&path, content).unwrap();
                    SourceFile::open(path).unwrap()
                })
                .collect();
            Some(Self {
                directory,
                files,
                contents,
            })
        }

        fn set_len(&self, file: usize, len: usize) {
            let path = self.directory.path().join(file.to_string());
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_len(len as u64).unwrap();
        }

        /// Has `work` read all files by operations of so many bytes. What it returns, and the statistics if the right
        /// bytes arrived.
        fn read<T>(
            &self,
            chunk_bytes: u64,
            work: impl FnOnce(&Transfer<'_>) -> T,
        ) -> (T, Result<ReadStats>) {
            let mut memory: Vec<Vec<u8>> = self
                .contents
                .iter()
                .map(|content| vec![0; content.len()])
                .collect();
            let requests = self
                .files
                .iter()
                .zip(&mut memory)
                .map(|(file, memory)| ReadRequest {
                    file,
                    offset: 0,
                    destination: memory.as_mut_slice().into(),
                })
                .collect();
            let params = TransferParams {
                chunk_bytes,
                queue_depth: 1,
                workers: 1,
                direct: DirectPolicy::Never,
                resident: ResidentPolicy::Reread,
            };
            let control = Control::new();
            let transfer = Transfer::new(requests, &params, &control).unwrap();
            let done = work(&transfer);
            let outcome = transfer.finish();
            assert!(outcome.is_err() || memory == self.contents, "wrong bytes");
            (done, outcome)
        }
    }

    /// Fails, instead of waiting for ever, when `check` does not come to an end.
    fn in_time(check: impl FnOnce() + Send + 'static) {
        let (sender, receiver) = mpsc::channel();
        let name = std::thread::current().name().unwrap_or("test").to_owned();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            check();
            // Not sent by a panic.
            sender.send(()).unwrap();
        });
        let thread = thread.unwrap();
        match receiver.recv_timeout(PATIENCE) {
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("no end after {PATIENCE:?}"),
            _ => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    }

    #[test]
    fn what_is_missing_of_a_short_completion_is_read_from_where_it_ended() {
        let lens = [70_001, 70_002, 70_003, 70_004, 70_005];
        let Some(samples) = Samples::new("short completions", &lens) else {
            return;
        };
        let ((), outcome) = samples.read(1 << 20, |transfer| {
            let (ring, _) = make_ring(8).unwrap();
            let mut worker = Worker::new(ring, transfer, &[false; 5], 8);
            worker.fill();
            assert_eq!(worker.in_flight(), 5);
            // While the kernel reads, four of the files end early.
            for (file, end) in [1, 4095, 4096, 70_003].into_iter().enumerate() {
                samples.set_len(file, end);
            }
            worker.ring.submit_and_wait(5).unwrap();
            for (file, content) in samples.contents.iter().enumerate() {
                let path = samples.directory.path().join(file.to_string());
                std::fs::write(path, content).unwrap();
            }
            assert_eq!(worker.take_completions(), 5);
            assert_eq!(worker.in_flight(), 4, "those that were short");
            worker.run();
        });
        let stats = outcome.unwrap();
        assert_eq!((stats.short_reads, stats.operations), (4, 9), "{stats:?}");
    }

    #[test]
    fn a_ring_that_is_busy_for_a_while_is_asked_again() {
        let Some(samples) = Samples::new("a busy ring", &[300_001]) else {
            return;
        };
        for errno in [Errno::BUSY, Errno::AGAIN, Errno::INTR] {
            let (left, outcome) = samples.read(4096, |transfer| {
                let (ring, _) = make_ring(4).unwrap();
                let mut worker = Worker::new(ring, transfer, &[false], 4);
                worker.refusals.extend((0..100).map(|_| errno.into()));
                worker.run();
                worker.refusals.len()
            });
            assert_eq!(left, 0);
            outcome.unwrap_or_else(|error| panic!("{errno}: {error}"));
        }
    }

    #[test]
    fn a_ring_has_room_for_the_completions_of_all_its_slots() {
        for queue_depth in [1, 2, 3, 31, 32, 33, 1000, TransferParams::MAX_QUEUE_DEPTH] {
            if let Err(error) = probe::try_ring() {
                return skip(&format!("room for completions: {error}"));
            }
            let (ring, slots) = make_ring(queue_depth).unwrap();
            let params = ring.params();
            assert!(params.sq_entries() >= slots && params.cq_entries() >= slots);
        }
    }

    /// A worker with far more reads in flight than its ring has room for completions.
    fn overflowing<'t, 'a>(transfer: &'t Transfer<'a>) -> Worker<'t, 'a> {
        const ROOM: u32 = 4;

        let ring = IoUring::builder().setup_cqsize(ROOM).build(ROOM).unwrap();
        assert_eq!(ring.params().cq_entries(), ROOM);
        let mut worker = Worker::new(ring, transfer, &[false], ROOM);
        for _ in 0..16 {
            worker.fill();
            // Submits, and takes nothing.
            worker.ring.submit().unwrap();
            let slots = worker.slots.len();
            let more = slots..slots + ROOM as usize;
            worker.slots.extend(more.clone().map(|_| None));
            worker.free.extend(more);
        }
        let submission = worker.ring.submission();
        assert!(submission.cq_overflow(), "nothing has overflowed");
        drop(submission);
        assert_eq!(worker.in_flight(), 64);
        worker
    }

    #[test]
    fn completions_that_overflow_are_all_taken() {
        in_time(|| {
            // More operations than were in flight when it happened.
            let Some(samples) = Samples::new("overflow", &[4096 * 100 + 5]) else {
                return;
            };
            let ((), outcome) = samples.read(4096, |transfer| overflowing(transfer).run());
            assert_eq!(outcome.unwrap().operations, 101);
        });
    }

    #[test]
    fn completions_that_overflow_are_waited_for() {
        in_time(|| {
            let Some(samples) = Samples::new("overflow", &[4096 * 200 + 5]) else {
                return;
            };
            let ((), outcome) = samples.read(4096, |transfer| {
                let mut worker = overflowing(transfer);
                worker.wait_for_in_flight();
                assert_eq!(worker.in_flight(), 0);
                // And where a panic or an error ends it.
                drop(overflowing(transfer));
            });
            // Nobody has taken notice of what was read.
            assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
        });
    }
}
