//! Who has which buffer: what readers, the consumer and leases agree on, behind one lock.
//!
//! A buffer is in one place at a time: free, with the reader that fills it, in the slot of its window once
//! filled, or leased out. It moves as an owned [`Region`], so nobody else can reach it. Under the lock nothing
//! is read, mapped or unmapped, and no code of somebody else's runs (wakers, subscribers, what a panic
//! carried) but the clone of a waker.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::{Job, StreamStats};
use crate::control::CancelListener;
use crate::workers::lock;
use crate::{Error, ReadStats, Region, Result};

/// What became of reading a window.
pub(super) type Outcome = std::thread::Result<Result<ReadStats>>;

/// A window that a reader has claimed and that was not handed out yet.
enum Slot {
    Reading,
    /// Windows of 0 bytes have no buffer.
    Filled(Option<Region>),
    Failed(Failure),
}

/// Why a stream ends early.
pub(super) enum Failure {
    Error(Error),
    Panic(Box<dyn Any + Send>),
}

/// What the consumer finds when it asks for the next window.
pub(super) enum Turn {
    Window {
        number: usize,
        region: Option<Region>,
    },
    Failed(Failure),
    /// Every buffer was leased out for too long.
    Held {
        held: u32,
        buffers: u32,
        waited: Duration,
    },
    /// All windows were handed out, or the stream has failed.
    Ended,
    /// The window is being read, or waits for a buffer: then it is worth asking again at the deadline, and
    /// the first to hear of the stall is given its number, from 1.
    Pending {
        deadline: Option<Instant>,
        new_stall: Option<u64>,
    },
}

/// The consumer waits, and all buffers are leased out.
#[derive(Clone, Copy)]
struct Stall {
    since: Instant,
    /// When the consumer is to be told; absent where that is later than a clock can tell.
    deadline: Option<Instant>,
}

struct State {
    /// The last to come is the first to go: what was used last is still in the CPU's caches, and with a quick
    /// consumer some buffers are never touched at all.
    free: Vec<Region>,
    /// The windows `delivered..taken`, as far as they are still wanted.
    slots: VecDeque<Slot>,
    delivered: usize,
    taken: usize,
    /// Windows from here on are not read.
    end: usize,
    leased: u32,
    waker: Option<Waker>,
    stall: Option<Stall>,
    stats: StreamStats,
}

/// The state of a stream and those who wait for it to change. Leases keep it beyond the stream's end.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Readers wait here for a buffer.
    freed: Condvar,
    buffers: u32,
}

impl Shared {
    pub(super) fn new(free: Vec<Region>, buffers: u32, windows: usize) -> Self {
        Self {
            state: Mutex::new(State {
                slots: VecDeque::with_capacity(free.len()),
                free,
                delivered: 0,
                taken: 0,
                end: windows,
                leased: 0,
                waker: None,
                stall: None,
                stats: StreamStats::default(),
            }),
            freed: Condvar::new(),
            buffers,
        }
    }

    /// The next window for a reader, and a buffer if it takes one, which is waited for. `None` when nothing is
    /// left to be read.
    pub(super) fn claim(&self, job: &Job) -> Option<(usize, Option<Region>)> {
        let mut state = lock(&self.state);
        let mut waiting_since = None;
        loop {
            if state.taken >= state.end || job.is_cancelled() {
                return None;
            }
            let number = state.taken;
            let region = match job.takes_buffer(number) {
                true => state.free.pop(),
                false => None,
            };
            if region.is_none() && job.takes_buffer(number) {
                waiting_since.get_or_insert_with(Instant::now);
                state = self.wait_for_buffer(state);
                continue;
            }
            state.taken += 1;
            state.slots.push_back(Slot::Reading);
            if let Some(since) = waiting_since {
                state.stats.reader_wait += since.elapsed();
            }
            let is_last = state.taken == state.end;
            drop(state);
            if is_last {
                // The other readers wait for nothing any more.
                self.freed.notify_all();
            }
            return Some((number, region));
        }
    }

    /// Waits until a buffer may be free or the stream over. A task that waits for the end of a stall has no
    /// clock of its own: it is woken from here when its time is up.
    fn wait_for_buffer<'s>(&'s self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        let deadline = state.stall.and_then(|stall| stall.deadline);
        let Some(deadline) = deadline.filter(|_| state.waker.is_some()) else {
            return self
                .freed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left > Duration::ZERO {
            let waited = self.freed.wait_timeout(state, left);
            return waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let waker = state.waker.take();
        drop(state);
        wake(waker);
        lock(&self.state)
    }

    /// Takes note of what became of a window, and takes its buffer.
    pub(super) fn complete(&self, number: usize, region: Option<Region>, outcome: Outcome) {
        let mut state = lock(&self.state);
        let (slot, unused) = match outcome {
            Ok(Ok(stats)) => {
                state.stats.read.merge(stats);
                (Slot::Filled(region), None)
            }
            Ok(Err(error)) => (Slot::Failed(Failure::Error(error)), region),
            Err(panic) => (Slot::Failed(Failure::Panic(panic)), region),
        };
        if matches!(slot, Slot::Failed(_)) {
            // The windows before it are still wanted, those behind it no longer.
            state.end = state.end.min(number + 1);
        }
        // Never handed out before it is complete, so at or behind the next one.
        let place = number - state.delivered;
        let is_wanted = number < state.end;
        let mut unwanted = None;
        match state.slots.get_mut(place) {
            Some(place) if is_wanted => *place = slot,
            _ => unwanted = Some(slot),
        }
        let leftovers = state.take_leftovers();
        let is_over = state.taken >= state.end;
        let waker = match place {
            0 => state.waker.take(),
            _ => None,
        };
        drop(state);
        if is_over {
            self.freed.notify_all();
        }
        wake(waker);
        // After the consumer was told: giving memory back to the system takes its time.
        drop((unused, unwanted, leftovers));
    }

    /// Asks for the next window. While there is none, `waker` is kept, and woken when there is something new.
    pub(super) fn poll(&self, job: &Job, waker: &Waker) -> Turn {
        let mut state = lock(&self.state);
        let turn = self.turn(&mut state, job);
        let is_pending = matches!(turn, Turn::Pending { .. });
        let old = match &mut state.waker {
            Some(known) if is_pending && known.will_wake(waker) => None,
            known if is_pending => known.replace(waker.clone()),
            known => known.take(),
        };
        let leftovers = state.take_leftovers();
        let stalls = state.stall.is_some();
        drop(state);
        if stalls {
            // All readers wait, and one has to look at the time.
            self.freed.notify_one();
        }
        drop((old, leftovers));
        turn
    }

    fn turn(&self, state: &mut State, job: &Job) -> Turn {
        const NOT_YET: Turn = Turn::Pending {
            deadline: None,
            new_stall: None,
        };
        if state.delivered >= state.end {
            return Turn::Ended;
        }
        if job.is_cancelled() {
            state.end = state.delivered;
            return Turn::Failed(Failure::Error(Error::Cancelled));
        }
        if let Some(Slot::Reading) = state.slots.front() {
            return NOT_YET;
        }
        let Some(slot) = state.slots.pop_front() else {
            // Nobody reads. Either a reader is about to, or every buffer is leased out.
            return if job.takes_buffer(state.taken) && state.free.is_empty() {
                self.stalled(state, job.lease_timeout)
            } else {
                NOT_YET
            };
        };
        let number = state.delivered;
        state.delivered += 1;
        match slot {
            Slot::Filled(region) => {
                state.leased += u32::from(region.is_some());
                state.stats.peak_leases = state.stats.peak_leases.max(state.leased);
                state.stats.windows += 1;
                Turn::Window { number, region }
            }
            Slot::Failed(failure) => Turn::Failed(failure),
            // Seen to before it was taken out.
            Slot::Reading => Turn::Ended,
        }
    }

    fn stalled(&self, state: &mut State, patience: Duration) -> Turn {
        let now = Instant::now();
        let mut new_stall = None;
        let stall = match state.stall {
            Some(stall) => stall,
            None => {
                state.stats.lease_stalls += 1;
                new_stall = Some(state.stats.lease_stalls);
                Stall {
                    since: now,
                    deadline: now.checked_add(patience),
                }
            }
        };
        state.stall = Some(stall);
        if stall.deadline.is_none_or(|deadline| now < deadline) {
            return Turn::Pending {
                deadline: stall.deadline,
                new_stall,
            };
        }
        Turn::Held {
            held: state.leased,
            buffers: self.buffers,
            waited: state.end_stall(),
        }
    }

    /// Takes the buffer of a lease that was dropped.
    pub(super) fn give_back(&self, region: Region) {
        let mut state = lock(&self.state);
        state.leased = state.leased.saturating_sub(1);
        state.end_stall();
        state.free.push(region);
        let leftovers = state.take_leftovers();
        drop(state);
        self.freed.notify_one();
        drop(leftovers);
    }

    /// Ends the stream where it is: nothing more is read or handed out.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.end = state.end.min(state.delivered);
        let leftovers = state.take_leftovers();
        let waker = state.waker.take();
        drop(state);
        self.freed.notify_all();
        drop((leftovers, waker));
    }

    /// What happened so far.
    pub(super) fn stats(&self) -> StreamStats {
        let state = lock(&self.state);
        let mut stats = state.stats.clone();
        if let Some(stall) = state.stall {
            stats.lease_stall_elapsed += stall.since.elapsed();
        }
        stats
    }

    /// Windows handed out, and how many there would be.
    pub(super) fn position(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.delivered, state.end)
    }
}

impl State {
    /// Ends a stall, if there is one; how long it was.
    fn end_stall(&mut self) -> Duration {
        let Some(stall) = self.stall.take() else {
            return Duration::ZERO;
        };
        let elapsed = stall.since.elapsed();
        self.stats.lease_stall_elapsed += elapsed;
        elapsed
    }

    /// What no window needs any more, to be dropped without the lock.
    fn take_leftovers(&mut self) -> (VecDeque<Slot>, Vec<Region>) {
        let wanted = self.end.saturating_sub(self.delivered);
        let slots = match wanted < self.slots.len() {
            true => self.slots.split_off(wanted),
            false => VecDeque::new(),
        };
        let free = match self.taken >= self.end {
            true => std::mem::take(&mut self.free),
            false => Vec::new(),
        };
        (slots, free)
    }
}

impl CancelListener for Shared {
    fn cancelled(&self) {
        // Who looked at the token before it was cancelled had the lock, and waits by now.
        let waker = lock(&self.state).waker.take();
        self.freed.notify_all();
        wake(waker);
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
