//! A member: it reads what the leader asks it to, and hands out what was read for it.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::io::Errno;

use super::leader::{Leader, wait_for};
use super::ledger::Item;
use super::memory::{Claim, Layout, SharedMemory};
use super::wire::{self, Hello, Link, Message, Received, VERSION};
use super::{BEAT, RankSet, SharedOptions, SharedReport, SharedRole, SharedWindow, beats};
use crate::control::CancelListener;
use crate::workers::lock;
use crate::{
    Backend, CancelToken, Control, Error, FilledWindow, RangeStream, ReadRequest, ReadStats,
    ReadWindow, Result, SourceFile, StreamParams,
};

/// How long a member waits for a leader that has not begun at the time of its own: the leader may have waited
/// for another member a moment longer.
const GRACE: Duration = Duration::from_secs(2);
/// Between tries to reach a leader that is being replaced, or has not begun to listen.
const RETRY: Duration = Duration::from_millis(5);

/// What is read, and how: the same in the group and alone.
#[derive(Debug)]
struct Job {
    group: String,
    rank: u32,
    files: Vec<Arc<SourceFile>>,
    windows: Vec<ReadWindow>,
    /// Numbers of the windows that this rank wants, ascending.
    wanted: Vec<u32>,
    backend: Arc<dyn Backend>,
    params: StreamParams,
    silence_timeout: Duration,
    /// The caller's.
    control: Control,
}

/// This rank's part of a load.
#[derive(Debug)]
pub(super) struct Member {
    job: Arc<Job>,
    /// Position in `wanted` of the window that comes next.
    next: usize,
    /// Present until the group is left.
    connection: Option<Connection>,
    /// Windows that came, and failed, before the group was left.
    received: BTreeMap<u32, Lease>,
    failed: BTreeMap<u32, Error>,
    /// Reads the rest, once alone.
    private: Option<Private>,
    report: SharedReport,
    ended: bool,
}

/// What is read without the group.
#[derive(Debug)]
struct Private {
    stream: RangeStream,
    /// The number in the group of each window of the stream.
    numbers: Vec<u32>,
    delivered: u64,
}

/// Threads and state of a member while it belongs to a group.
#[derive(Debug)]
struct Connection {
    shared: Arc<Shared>,
    receiver: Option<JoinHandle<()>>,
    readers: Vec<JoinHandle<()>>,
    leader: Option<JoinHandle<()>>,
    /// Stops the reads.
    stop: CancelToken,
}

/// What a member's threads share.
#[derive(Debug)]
struct Shared {
    job: Arc<Job>,
    link: Arc<Link>,
    /// For the reads: without the caller's progress, which counts what is handed out.
    control: Control,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    started: bool,
    leader: Option<u32>,
    memory: Option<Arc<SharedMemory>>,
    /// Windows to read.
    tasks: VecDeque<(u32, Claim)>,
    received: BTreeMap<u32, Lease>,
    failed: BTreeMap<u32, Error>,
    /// How many windows came, and how many were to be read.
    fills: u64,
    reads: u64,
    /// Windows that this member read and did not get yet.
    read_here: BTreeSet<u32>,
    over: Option<Over>,
    /// The threads shall end.
    closing: bool,
    /// A thread of this process leads, and has not ended.
    is_leading: bool,
    panic: Option<Panic>,
    report: SharedReport,
}

struct Panic(Box<dyn Any + Send>);

impl std::fmt::Debug for Panic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Panic")
    }
}

/// Why a member belongs to its group no more.
#[derive(Debug)]
enum Over {
    /// The leader said that all is sent.
    Finished,
    /// The rest has to be read alone.
    Alone(String),
    /// There was nobody to lead yet.
    Again(String),
    Refused(String),
    /// Others waited for leases of this member for too long.
    LeasesHeld {
        held: u32,
        waited: Duration,
    },
}

/// A window in shared memory, behind the [`Bytes`] that are handed out.
#[derive(Debug)]
struct Lease {
    /// Present until it is dropped.
    claim: Option<Claim>,
    window: u32,
    bytes: usize,
    /// By this very member.
    read_here: bool,
    link: Arc<Link>,
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        let bytes = self.claim.as_ref().map_or(&[][..], Claim::as_slice);
        bytes.get(..self.bytes).unwrap_or(bytes)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            let (window, buffer) = (self.window, claim.buffer());
            // First, because the leader may give the buffer to this very member again.
            drop(claim);
            self.link.send(&Message::Released { window, buffer });
        }
    }
}

impl CancelListener for Shared {
    fn cancelled(&self) {
        // Whoever has looked at the token under the lock waits by now.
        drop(lock(&self.state));
        self.changed.notify_all();
    }
}

impl Member {
    pub(super) fn join(
        options: &SharedOptions,
        files: Vec<Arc<SourceFile>>,
        windows: Vec<SharedWindow>,
        backend: Arc<dyn Backend>,
        params: StreamParams,
        control: Control,
    ) -> Result<Self> {
        options.validate()?;
        params.validate()?;
        if windows.len() >= u32::MAX as usize {
            return Err(Error::InvalidParameter {
                parameter: "windows",
                value: windows.len() as u64,
                min: 0,
                max: u64::from(u32::MAX) - 1,
            });
        }
        let geometry = geometry(&files, &windows);
        let mut items = Vec::with_capacity(windows.len());
        let mut reads = Vec::with_capacity(windows.len());
        let mut wanted = Vec::new();
        for (
            number,
            SharedWindow {
                window: mut read,
                wanted: ranks,
            },
        ) in (0_u32..).zip(windows)
        {
            read.prepare(number as usize, &files, params.buffer_bytes)?;
            if ranks.contains(options.rank) {
                wanted.push(number);
            }
            items.push(Item {
                wanted: ranks,
                bytes: read.read_bytes(),
                takes_buffer: read.buffer_bytes > 0,
            });
            reads.push(read);
        }
        let job = Arc::new(Job {
            group: options.name.clone(),
            rank: options.rank,
            files,
            windows: reads,
            wanted,
            backend,
            params,
            silence_timeout: options.silence_timeout,
            control,
        });
        let hello = Hello {
            version: VERSION,
            rank: options.rank,
            world: options.world,
            readers: job.params.readers.min(job.params.buffers),
            geometry,
            fingerprint: options.fingerprint.clone(),
        };
        let mut member = Self {
            job,
            next: 0,
            connection: None,
            received: BTreeMap::new(),
            failed: BTreeMap::new(),
            private: None,
            report: SharedReport {
                members: vec![options.rank],
                ..SharedReport::default()
            },
            ended: false,
        };
        member.enter(options, &hello, &items)?;
        Ok(member)
    }

    /// Finds the group, or makes one, and waits for it to begin. Nobody to be found is no error: then this
    /// member reads alone.
    fn enter(&mut self, options: &SharedOptions, hello: &Hello, items: &[Item]) -> Result<()> {
        let name = options.socket_name();
        let deadline = Instant::now() + options.join_timeout;
        let mut last = "no leader answered".to_owned();
        loop {
            self.job.control.check()?;
            let entered = match connect(&name, &self.job.group)? {
                Reached::Link(link) => Some((link, None)),
                Reached::Stranger(reason) => {
                    last = reason;
                    None
                }
                Reached::Busy => None,
                Reached::Nobody => lead(&name, options, hello, items, deadline, &self.job)?
                    .map(|(link, leader)| (link, Some(leader))),
            };
            if let Some((link, leader)) = entered {
                match self.begin(link, leader, hello, deadline + GRACE)? {
                    None => return Ok(()),
                    Some(reason) => last = reason,
                }
            }
            if Instant::now() >= deadline {
                self.report.alone_since = Some(format!("the start: {last}"));
                return self.read_alone();
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Introduces itself to a leader and waits for the start. `Some` with the reason when there was none, and
    /// another leader may be found.
    fn begin(
        &mut self,
        link: Link,
        leader: Option<Leads>,
        hello: &Hello,
        deadline: Instant,
    ) -> Result<Option<String>> {
        let is_leader = leader.is_some();
        let connection = Connection::open(&self.job, link, leader, hello)?;
        let over = connection.wait_for_start(deadline);
        self.connection = Some(connection);
        match over {
            Ok(None) => {
                if is_leader {
                    self.report.role = SharedRole::Leader;
                }
                Ok(None)
            }
            Ok(Some(Over::Again(reason))) => {
                self.leave(Reads::Cancel);
                Ok(Some(reason))
            }
            Ok(Some(Over::Refused(reason))) => {
                self.leave(Reads::Cancel);
                Err(Error::GroupRefused {
                    group: self.job.group.clone(),
                    rank: self.job.rank,
                    reason,
                })
            }
            Ok(Some(Over::Alone(reason))) => {
                self.leave(Reads::Cancel);
                if is_leader {
                    self.report.role = SharedRole::Leader;
                }
                self.report.alone_since = Some(format!("the start: {reason}"));
                self.read_alone().map(|()| None)
            }
            // Finished, or taken out, already: `next` finds out.
            Ok(Some(over)) => {
                if let Some(connection) = &self.connection {
                    lock(&connection.shared.state).over = Some(over);
                }
                Ok(None)
            }
            Err(error) => {
                self.leave(Reads::Cancel);
                Err(error)
            }
        }
    }

    pub(super) fn next(&mut self) -> Option<Result<FilledWindow>> {
        if self.ended {
            return None;
        }
        let item = self.next_or_panic();
        match &item {
            Some(Ok(window)) => {
                self.next += 1;
                let read = self
                    .job
                    .windows
                    .get(window.number)
                    .map(ReadWindow::read_bytes);
                self.job.control.advance(read.unwrap_or(0));
            }
            // The stream that reads the rest can be asked again.
            Some(Err(Error::LeasesHeld { .. })) => {}
            // Others shall not wait for a member that is at its end, whether it is dropped or not.
            Some(Err(_)) => self.end(),
            None => {
                // What it reads for others now is not read twice.
                self.leave(Reads::Finish);
                self.end();
            }
        }
        item
    }

    fn end(&mut self) {
        self.ended = true;
        self.leave(Reads::Cancel);
        self.end_private();
        self.received.clear();
    }

    fn next_or_panic(&mut self) -> Option<Result<FilledWindow>> {
        loop {
            if let Err(error) = self.job.control.check()
                && self.next < self.job.wanted.len()
            {
                return Some(Err(error));
            }
            let wanted = self.job.wanted.get(self.next).copied();
            if let Some(window) = wanted {
                let number = window as usize;
                if self
                    .job
                    .windows
                    .get(number)
                    .is_some_and(|window| window.buffer_bytes == 0)
                {
                    let bytes = Bytes::new();
                    return Some(Ok(FilledWindow { number, bytes }));
                }
                if let Some(lease) = self.received.remove(&window) {
                    return Some(Ok(self.hand_out(lease)));
                }
                if let Some(error) = self.failed.remove(&window) {
                    return Some(Err(error));
                }
            }
            let Some(connection) = &self.connection else {
                return wanted.and_then(|_| self.next_private());
            };
            match connection.wait_for(wanted) {
                Turn::Window(lease) => return Some(Ok(self.hand_out(lease))),
                Turn::Failed(error) => return Some(Err(error)),
                Turn::Cancelled => {}
                Turn::End => return None,
                Turn::Panic(Panic(panic)) => {
                    self.end();
                    resume_unwind(panic);
                }
                Turn::Over => {
                    if let Err(error) = self.part() {
                        return Some(Err(error));
                    }
                }
            }
        }
    }

    /// Leaves a group that is over, and goes on with what came and, if need be, alone.
    fn part(&mut self) -> Result<()> {
        let reason = match self.leave(Reads::Cancel) {
            Some(Over::LeasesHeld { held, waited }) => {
                return Err(Error::GroupLeasesHeld {
                    group: self.job.group.clone(),
                    rank: self.job.rank,
                    held,
                    waited,
                });
            }
            Some(Over::Alone(reason) | Over::Again(reason) | Over::Refused(reason)) => reason,
            Some(Over::Finished) | None => "the leader had finished".to_owned(),
        };
        match self.rest().first() {
            None => Ok(()),
            Some(first) => {
                self.report.alone_since = Some(format!("window {first}: {reason}"));
                self.read_alone()
            }
        }
    }

    /// The windows that have not come yet.
    fn rest(&self) -> Vec<u32> {
        let wanted = self
            .job
            .wanted
            .get(self.next..)
            .unwrap_or(&[])
            .iter()
            .copied();
        let came =
            |window: &u32| self.received.contains_key(window) || self.failed.contains_key(window);
        let takes_buffer = |window: &u32| {
            let window = self.job.windows.get(*window as usize);
            window.is_some_and(|window| window.buffer_bytes > 0)
        };
        wanted
            .filter(|window| !came(window) && takes_buffer(window))
            .collect()
    }

    /// Starts to read the rest into memory of its own.
    fn read_alone(&mut self) -> Result<()> {
        let reason = self.report.alone_since.as_deref().unwrap_or("");
        tracing::warn!(
            group = self.job.group,
            rank = self.job.rank,
            "reads alone since {reason}"
        );
        let numbers = self.rest();
        let windows = numbers
            .iter()
            .filter_map(|&number| self.job.windows.get(number as usize));
        let stream = RangeStream::new(
            self.job.files.clone(),
            windows.cloned().collect(),
            Arc::clone(&self.job.backend),
            self.job.params,
            Control::new().with_cancel(self.job.control.token().clone()),
        )?;
        self.private = Some(Private {
            stream,
            numbers,
            delivered: 0,
        });
        Ok(())
    }

    fn next_private(&mut self) -> Option<Result<FilledWindow>> {
        let private = self.private.as_mut()?;
        let next = private.stream.next()?;
        Some(next.map(|window| {
            private.delivered += 1;
            let number = private
                .numbers
                .get(window.number)
                .copied()
                .unwrap_or(u32::MAX);
            FilledWindow {
                number: number as usize,
                ..window
            }
        }))
    }

    fn hand_out(&mut self, lease: Lease) -> FilledWindow {
        let window = lease.window;
        if !lease.read_here {
            self.report.windows_received += 1;
        }
        FilledWindow {
            number: window as usize,
            bytes: Bytes::from_owner(lease),
        }
    }

    /// Leaves the group, if it is in one: ends its threads, and keeps what came. Why it was over, if it was.
    fn leave(&mut self, reads: Reads) -> Option<Over> {
        let connection = self.connection.take()?;
        let mut state = connection.close(reads);
        self.received.append(&mut state.received);
        self.failed.append(&mut state.failed);
        self.report.add(state.report);
        state.over
    }

    fn end_private(&mut self) {
        if let Some(private) = self.private.take() {
            self.report.add(private.report());
        }
    }

    pub(super) fn report(&self) -> SharedReport {
        let mut report = self.report.clone();
        if let Some(connection) = &self.connection {
            report.add(lock(&connection.shared.state).report.clone());
        }
        if let Some(private) = &self.private {
            report.add(private.report());
        }
        report
    }
}

impl Private {
    fn report(&self) -> SharedReport {
        SharedReport {
            windows_read_here: self.delivered,
            read_here: self.stream.stats().read,
            ..SharedReport::default()
        }
    }
}

/// What the consumer of a member in a group gets.
enum Turn {
    Window(Lease),
    Failed(Error),
    Panic(Panic),
    Cancelled,
    Over,
    End,
}

impl Connection {
    /// Says hello through a link, and starts the threads.
    fn open(job: &Arc<Job>, link: Link, leads: Option<Leads>, hello: &Hello) -> Result<Self> {
        let stop = job.control.token().child();
        let shared = Arc::new(Shared {
            job: Arc::clone(job),
            link: Arc::new(link),
            control: Control::new().with_cancel(stop.clone()),
            state: Mutex::new(State {
                is_leading: leads.is_some(),
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let listener: Weak<dyn CancelListener> = Arc::downgrade(&shared) as _;
        job.control.token().listen(&listener);
        shared.link.send(&Message::Hello(hello.clone()));
        let mut connection = Self {
            shared: Arc::clone(&shared),
            receiver: None,
            readers: Vec::new(),
            leader: None,
            stop,
        };
        match connection.start_threads(leads, hello.readers) {
            Ok(()) => Ok(connection),
            Err(error) => {
                // Ends those that were started.
                connection.close(Reads::Cancel);
                Err(error)
            }
        }
    }

    fn start_threads(&mut self, leads: Option<Leads>, readers: u32) -> Result<()> {
        if let Some((leader, own)) = leads {
            let shared = Arc::clone(&self.shared);
            self.leader = Some(spawn("tensora-leader", move || {
                // Should it panic, its connections close as it unwinds, and everyone reads alone.
                let _ = catch_unwind(AssertUnwindSafe(|| leader.run(own)));
                lock(&shared.state).is_leading = false;
                shared.changed.notify_all();
            })?);
        }
        let shared = Arc::clone(&self.shared);
        self.receiver = Some(spawn("tensora-member", move || shared.receive())?);
        for _ in 0..readers {
            let shared = Arc::clone(&self.shared);
            self.readers
                .push(spawn("tensora-reader", move || shared.read())?);
        }
        Ok(())
    }

    /// `None` once the group has begun, or why it has not.
    fn wait_for_start(&self, deadline: Instant) -> Result<Option<Over>> {
        let mut state = lock(&self.shared.state);
        loop {
            self.shared.job.control.check()?;
            if let Some(over) = state.over.take() {
                return Ok(Some(over));
            }
            if state.started {
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = "the leader had not begun in time".to_owned();
                return Ok(Some(Over::Alone(text)));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for a window, or for the end of the load.
    fn wait_for(&self, window: Option<u32>) -> Turn {
        let Shared { job, link, .. } = &*self.shared;
        let mut state = lock(&self.shared.state);
        let mut told = false;
        loop {
            if let Some(panic) = state.panic.take() {
                return Turn::Panic(panic);
            }
            let Some(window) = window else {
                // The others still need a leader.
                if !state.is_leading || job.control.is_cancelled() {
                    return Turn::End;
                }
                state = wait(&self.shared.changed, state);
                continue;
            };
            if let Some(lease) = state.received.remove(&window) {
                return Turn::Window(lease);
            }
            if let Some(error) = state.failed.remove(&window) {
                return Turn::Failed(error);
            }
            if state.over.is_some() {
                return Turn::Over;
            }
            if job.control.is_cancelled() {
                return Turn::Cancelled;
            }
            if !std::mem::replace(&mut told, true) {
                link.send(&Message::Waiting { window });
            }
            state = wait(&self.shared.changed, state);
        }
    }

    /// Ends the threads, waiting for reads under way, and says good-bye. What came is the caller's.
    fn close(mut self, reads: Reads) -> State {
        lock(&self.shared.state).closing = true;
        if reads == Reads::Cancel {
            self.stop.cancel();
        }
        self.shared.changed.notify_all();
        let Shared { link, state, .. } = &*self.shared;
        link.deafen();
        for thread in self.readers.drain(..).chain(self.receiver.take()) {
            let _ = thread.join();
        }
        let mut state = std::mem::take(&mut *lock(state));
        for (window, claim) in state.tasks.drain(..) {
            let buffer = claim.buffer();
            drop(claim);
            link.send(&Message::Returned { window, buffer });
        }
        link.send(&Message::Leave {
            fills: state.fills,
            reads: state.reads,
        });
        if let Some(leader) = self.leader.take() {
            let _ = leader.join();
        }
        state
    }
}

/// What becomes of reads under way when a member leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    Cancel,
    Finish,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave(Reads::Cancel);
    }
}

fn wait<'s>(changed: &Condvar, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
    changed.wait(state).unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder
        .spawn(work)
        .map_err(|source| Error::Thread { source })
}

impl Shared {
    /// The receiver: takes what the leader sends, and tells it that this member lives.
    fn receive(&self) {
        let over = self.receive_until_over();
        let mut state = lock(&self.state);
        if let Over::Alone(reason) = &over {
            tracing::debug!(rank = self.job.rank, "out of the group: {reason}");
        }
        state.over.get_or_insert(over);
        drop(state);
        self.changed.notify_all();
    }

    fn receive_until_over(&self) -> Over {
        let mut next_beat = Instant::now() + BEAT;
        let silence_beats = beats(self.job.silence_timeout);
        let mut silent_beats = 0;
        loop {
            wait_for(&mut [self.link.poll_fd()], next_beat);
            loop {
                if lock(&self.state).closing {
                    return Over::Finished;
                }
                let over = match self.link.receive() {
                    Received::Nothing => break,
                    Received::Ended => Some(self.leader_is_gone()),
                    Received::Garbled => {
                        Some(Over::Alone("the leader sent something unknown".to_owned()))
                    }
                    Received::Message(message, file) => {
                        silent_beats = 0;
                        self.take(message, file)
                    }
                };
                if let Some(over) = over {
                    return over;
                }
            }
            self.link.flush();
            if Instant::now() >= next_beat {
                next_beat = Instant::now() + BEAT;
                if !self.link.has_unsent() {
                    self.link.send(&Message::Beat);
                }
                // Counting beats, and not time, is fair to a leader that was stopped together with this member.
                silent_beats += 1;
                if silent_beats > silence_beats {
                    let waited = self.job.silence_timeout;
                    let text = format!("nothing was heard of the leader for {waited:.1?}");
                    return Over::Alone(text);
                }
            }
        }
    }

    fn leader_is_gone(&self) -> Over {
        let mut state = lock(&self.state);
        match state.leader {
            None => Over::Again("the leader left before the group began".to_owned()),
            Some(rank) => {
                state.report.died.push(rank);
                Over::Alone(format!("rank {rank}, which led, is gone"))
            }
        }
    }

    /// Acts on a message of the leader's.
    fn take(&self, message: Message, file: Option<OwnedFd>) -> Option<Over> {
        let mut state = lock(&self.state);
        let outcome = match message {
            Message::Beat => return None,
            Message::Start {
                leader,
                stride,
                buffers,
                members,
            } => self.start(&mut state, file, stride, buffers).map(|()| {
                state.leader = Some(leader);
                state.started = true;
                state.report.members = RankSet::from_bytes(&members).iter().collect();
            }),
            Message::Read { window, buffer } => self.claim(&state, window, buffer).map(|claim| {
                state.reads += 1;
                state.tasks.push_back((window, claim));
            }),
            Message::Filled { window, buffer } => self.claim(&state, window, buffer).map(|claim| {
                state.fills += 1;
                let lease = Lease {
                    claim: Some(claim),
                    window,
                    bytes: self
                        .job
                        .windows
                        .get(window as usize)
                        .map_or(0, |w| w.buffer_bytes),
                    read_here: state.read_here.remove(&window),
                    link: Arc::clone(&self.link),
                };
                state.received.insert(window, lease);
            }),
            Message::WindowFailed { window, rank, text } => {
                // The member that failed to read has the error itself.
                state.failed.entry(window).or_insert(Error::ReadByPeer {
                    rank,
                    message: text,
                });
                Ok(())
            }
            Message::Gone { rank } => {
                state.report.died.push(rank);
                Ok(())
            }
            Message::Rejected { text } => {
                state.report.rejected.push(text);
                Ok(())
            }
            Message::Stalled { beats } => {
                state.report.lease_stalls += 1;
                state.report.lease_stall_elapsed += time(beats);
                Ok(())
            }
            Message::Refused { text } => return Some(Over::Refused(text)),
            Message::LeasesHeld { held, beats } => {
                let waited = time(beats);
                return Some(Over::LeasesHeld { held, waited });
            }
            Message::Dissolved { text } => return Some(Over::Alone(text)),
            Message::Finished => return Some(Over::Finished),
            other => Err(format!(
                "the leader sent {other:?}, which only members send"
            )),
        };
        drop(state);
        self.changed.notify_all();
        outcome.err().map(Over::Alone)
    }

    fn start(
        &self,
        state: &mut State,
        file: Option<OwnedFd>,
        stride: u64,
        buffers: u32,
    ) -> Result<(), String> {
        let largest = self
            .job
            .windows
            .iter()
            .map(|window| window.buffer_bytes)
            .max();
        let layout = usize::try_from(stride)
            .ok()
            .filter(|&stride| Some(stride) >= largest)
            .and_then(|stride| Layout::from_parts(stride, buffers))
            .ok_or_else(|| format!("the leader has {buffers} buffers of {stride} bytes"))?;
        let file = file
            .ok_or("the leader sent no shared memory; raise the limit on open files (ulimit -n)")?;
        state.memory = Some(SharedMemory::map(&file, layout)?);
        Ok(())
    }

    /// A buffer that the leader names together with a window.
    fn claim(&self, state: &State, window: u32, buffer: u32) -> Result<Claim, String> {
        let claim = state
            .memory
            .as_ref()
            .and_then(|memory| memory.claim(buffer));
        claim
            .filter(|_| (window as usize) < self.job.windows.len())
            .ok_or_else(|| {
                format!("the leader gave out buffer {buffer} for window {window}, which cannot be")
            })
    }

    /// A reader: reads what the leader asks for.
    fn read(&self) {
        while let Some((window, mut claim)) = self.next_task() {
            // After a panic the buffer is whole, if not its content: it is no more than bytes.
            let fill = AssertUnwindSafe(|| self.fill(window, &mut claim));
            let outcome = catch_unwind(fill);
            let buffer = claim.buffer();
            // First, because this member may be given the buffer again, to look at.
            drop(claim);
            let message = self.conclude(window, buffer, outcome);
            self.link.send(&message);
            self.changed.notify_all();
        }
    }

    fn next_task(&self) -> Option<(u32, Claim)> {
        let mut state = lock(&self.state);
        loop {
            if state.closing || state.over.is_some() {
                return None;
            }
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            state = wait(&self.changed, state);
        }
    }

    fn fill(&self, window: u32, claim: &mut Claim) -> Result<ReadStats> {
        let Job {
            windows,
            files,
            backend,
            params,
            ..
        } = &*self.job;
        let requests = windows
            .get(window as usize)
            .map_or_else(Vec::new, |window| {
                requests(window, files, claim.as_mut_slice())
            });
        if requests.is_empty() {
            return Ok(ReadStats::default());
        }
        backend.read(requests, &params.transfer, &self.control)
    }

    /// What the leader is to know of a read.
    fn conclude(
        &self,
        window: u32,
        buffer: u32,
        outcome: std::thread::Result<Result<ReadStats>>,
    ) -> Message {
        let mut state = lock(&self.state);
        match outcome {
            Ok(Ok(stats)) => {
                state.report.windows_read_here += 1;
                state.report.read_here.merge(stats);
                if self.job.wanted.binary_search(&window).is_ok() {
                    state.read_here.insert(window);
                }
                Message::Done { window, buffer }
            }
            Ok(Err(error)) if error.is_cancelled() => Message::Returned { window, buffer },
            Ok(Err(error)) => {
                let text = error.to_string();
                state.failed.insert(window, error);
                Message::Failed {
                    window,
                    buffer,
                    text,
                }
            }
            Err(panic) => {
                state.panic.get_or_insert(Panic(panic));
                Message::Returned { window, buffer }
            }
        }
    }
}

/// What to read for a window that was checked: its extents, in the order of their places.
fn requests<'r>(
    window: &ReadWindow,
    files: &'r [Arc<SourceFile>],
    mut memory: &'r mut [u8],
) -> Vec<ReadRequest<'r>> {
    let mut requests = Vec::with_capacity(window.extents.len());
    let mut begin = 0;
    for extent in &window.extents {
        let (_, behind) = memory.split_at_mut(extent.at - begin);
        let (destination, behind) = behind.split_at_mut(extent.len());
        (memory, begin) = (behind, extent.at + extent.len());
        requests.push(ReadRequest {
            file: &files[extent.file],
            offset: extent.range.start,
            destination: destination.into(),
        });
    }
    requests
}

fn time(beats: u64) -> Duration {
    BEAT * u32::try_from(beats).unwrap_or(u32::MAX)
}

/// What answers at a group's name.
enum Reached {
    Link(Link),
    /// Somebody who cannot be talked to.
    Stranger(String),
    /// Somebody who has too many callers to be talked to now.
    Busy,
    Nobody,
}

fn connect(name: &str, group: &str) -> Result<Reached> {
    let link = match wire::connect(name) {
        Ok(link) => link,
        Err(Errno::CONNREFUSED) => return Ok(Reached::Nobody),
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Reached::Busy),
        // The security modules refuse so, where the listener is out of this process's domain.
        Err(error @ (Errno::PERM | Errno::ACCESS)) => {
            let text = format!("the socket of the group cannot be reached: {error}");
            return Ok(Reached::Stranger(text));
        }
        Err(error) => return Err(failure("connect to the leader", group, error)),
    };
    let own_uid = rustix::process::geteuid().as_raw();
    match link.peer_uid() {
        Ok(uid) if uid == own_uid => Ok(Reached::Link(link)),
        Ok(uid) => Ok(Reached::Stranger(format!(
            "its name is taken by a process of user {uid}, and this process is one of user {own_uid}"
        ))),
        Err(error) => Err(failure("find out the leader's user", group, error)),
    }
}

/// A leader to be run, and its end of the connection to its own member.
type Leads = (Leader, Link);

/// Becomes the leader, unless another process just did.
fn lead(
    name: &str,
    options: &SharedOptions,
    hello: &Hello,
    items: &[Item],
    deadline: Instant,
    job: &Job,
) -> Result<Option<(Link, Leads)>> {
    let group = &options.name;
    let listener = match wire::listen(name, options.world) {
        Ok(listener) => listener,
        Err(Errno::ADDRINUSE) => return Ok(None),
        Err(error) => return Err(failure("listen for members", group, error)),
    };
    let largest = job
        .windows
        .iter()
        .map(|window| window.buffer_bytes)
        .max()
        .unwrap_or(0);
    let used = items.iter().filter(|item| item.takes_buffer).count().max(1);
    let buffers = job
        .params
        .buffers
        .min(u32::try_from(used).unwrap_or(u32::MAX));
    // As many again take the places of those that are lost; they take memory only then.
    let layout = Layout::new(largest, buffers * 2);
    let limit = crate::probe::soft_limit(rustix::process::Resource::Fsize);
    let layout = layout.filter(|layout| limit.is_none_or(|limit| layout.bytes() as u64 <= limit));
    let file = match layout.as_ref().map(Layout::create) {
        Some(Ok(file)) => file,
        Some(Err(error)) => return Err(failure("make shared memory", group, error)),
        // Beyond the limit, the system would end the process with a signal.
        None => return Err(failure("make shared memory", group, Errno::FBIG)),
    };
    let pair = Link::pair().map_err(|error| failure("make a pair of sockets", group, error))?;
    let Some(layout) = layout else {
        return Ok(None);
    };
    let leader = Leader {
        own: hello.clone(),
        listener,
        deadline,
        join_timeout: options.join_timeout,
        silence_timeout: options.silence_timeout,
        lease_timeout: job.params.lease_timeout,
        file: Arc::new(file),
        layout,
        buffers,
        items: items.to_vec(),
    };
    Ok(Some((pair.0, (leader, pair.1))))
}

/// Tells what the machine does not let a process do from what failed for now.
fn failure(operation: &'static str, group: &str, error: Errno) -> Error {
    match error {
        Errno::PERM
        | Errno::ACCESS
        | Errno::NOSYS
        | Errno::INVAL
        | Errno::AFNOSUPPORT
        | Errno::OPNOTSUPP
        | Errno::PROTONOSUPPORT
        | Errno::SOCKTNOSUPPORT => Error::Unsupported {
            operation: "reading once for several processes",
            reason: format!("to {operation} was refused: {error}"),
            remedy: "allow memfd_create and abstract Unix sockets (SOCK_SEQPACKET) in the seccomp profile or                      security module, or let each process read for itself; the page cache shares buffered reads",
        },
        error => Error::Group {
            operation,
            group: group.to_owned(),
            source: error.into(),
        },
    }
}

/// A hash of what all members must agree on, that they were not already asked to hash by their callers: FNV-1a.
fn geometry(files: &[Arc<SourceFile>], windows: &[SharedWindow]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |number: u64| {
        for byte in number.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    add(files.len() as u64);
    for file in files {
        add(file.len());
    }
    for SharedWindow { window, wanted } in windows {
        add(window.buffer_bytes as u64);
        add(window.extents.len() as u64);
        for extent in &window.extents {
            for number in [
                extent.file as u64,
                extent.range.start,
                extent.range.end,
                extent.at as u64,
            ] {
                add(number);
            }
        }
        add(wanted.len().into());
        wanted.iter().for_each(|rank| add(rank.into()));
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_forbids_is_told_from_what_failed_for_now() {
        for error in [Errno::PERM, Errno::NOSYS, Errno::AFNOSUPPORT] {
            let error = failure("make shared memory", "group", error);
            assert!(matches!(error, Error::Unsupported { .. }));
            let text = error.to_string();
            assert!(
                text.contains("to make shared memory was refused: "),
                "{text}"
            );
            assert!(text.contains("allow memfd_create"), "{text}");
        }
        let error = failure("listen for members", "group", Errno::MFILE);
        assert!(matches!(error, Error::Group { .. }));
        let text = error.to_string();
        assert!(text.contains("could not listen for members"), "{text}");
        assert!(text.contains("ulimit -n"), "{text}");
    }
}
