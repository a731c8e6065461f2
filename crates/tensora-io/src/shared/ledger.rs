//! Who reads what into which buffer, and who still looks at it: the leader's decisions, without any I/O.
//!
//! Windows wait in `pending` until a buffer and a reader are free, lowest first. A buffer is free, or spare, or
//! read into by one member, or held by those it was handed to, or lost. That the lowest pending window can always be
//! read, sooner or later, is why nothing ever waits for itself: members give buffers back in the order of the
//! windows, and a window that has to be read again, after others behind it were handed out, finds the spare
//! buffer that came in place of the one it was lost with. Without a spare one, the group dissolves.

use std::collections::{BTreeMap, BTreeSet};

use super::RankSet;
use super::wire::Message;

/// A window, as far as it concerns the group.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) wanted: RankSet,
    /// How much is read for it, in bytes.
    pub(super) bytes: u64,
    /// Windows without a buffer are not handed out.
    pub(super) takes_buffer: bool,
}

/// What the leader has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Send a message to the member of a rank.
    Send(u32, Message),
    /// Give the memory of a buffer back: it is not used again.
    Discard(u32),
    /// Send everyone away, to read the rest alone, for this reason.
    Dissolve(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Buffer {
    /// Free, spare, or not used again.
    Idle,
    Reading {
        rank: u32,
        window: u32,
    },
    /// Looked at by so many members.
    Held {
        holders: u32,
    },
    /// The same, but one of them was taken out, lives, and may hold it for ever: another one is used in its place.
    Lost {
        holders: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Active,
    /// Reads nothing and is sent nothing any more, but may hold buffers.
    Left,
    /// The same, against its will; what it was reading into is not used again.
    TakenOut,
    /// Its process closed the connection, or is gone: it holds nothing.
    Gone,
}

#[derive(Debug)]
struct Peer {
    state: State,
    /// How many windows it reads at a time; 0 once it gave one back.
    readers: u32,
    reading: u32,
    read_bytes: u64,
    /// How many windows it was sent.
    fills: u64,
    /// Those it has not released, in the order sent.
    held: Vec<Held>,
    /// The window that it waits for.
    waiting: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    since_beat: u64,
    fill: u64,
    window: u32,
    buffer: u32,
}

/// Others wait, and the oldest window that is held is this one.
#[derive(Debug)]
struct Stall {
    rank: u32,
    held: Held,
    beats: u64,
}

#[derive(Debug)]
pub(super) struct Ledger {
    items: Vec<Item>,
    pending: BTreeSet<u32>,
    buffers: Vec<Buffer>,
    free: Vec<u32>,
    /// Taken in place of lost ones.
    spare: Vec<u32>,
    reading: u32,
    peers: BTreeMap<u32, Peer>,
    beats: u64,
    /// How long others wait for the holder of the oldest window, before it is taken out.
    lease_beats: u64,
    stall: Option<Stall>,
    effects: Vec<Effect>,
    dissolved: bool,
}

impl Ledger {
    /// For members given as rank and readers, and `buffers` buffers with as many spare ones behind them.
    pub(super) fn new(
        items: Vec<Item>,
        members: impl IntoIterator<Item = (u32, u32)>,
        buffers: u32,
        lease_beats: u64,
    ) -> Self {
        let peer = |readers| Peer {
            state: State::Active,
            readers,
            reading: 0,
            read_bytes: 0,
            fills: 0,
            held: Vec::new(),
            waiting: None,
        };
        let members = members
            .into_iter()
            .map(|(rank, readers)| (rank, peer(readers)));
        let pending = (0..).zip(&items).filter(|(_, item)| item.takes_buffer);
        let mut ledger = Self {
            pending: pending.map(|(window, _)| window).collect(),
            items,
            buffers: vec![Buffer::Idle; buffers as usize * 2],
            free: (0..buffers).rev().collect(),
            spare: (buffers..buffers * 2).rev().collect(),
            reading: 0,
            peers: members.collect(),
            beats: 0,
            lease_beats,
            stall: None,
            effects: Vec::new(),
            dissolved: false,
        };
        ledger.forget_unwanted();
        ledger.advance();
        ledger
    }

    /// Whether every window has been sent to all that want it, or is wanted by nobody.
    pub(super) fn is_finished(&self) -> bool {
        !self.dissolved && self.pending.is_empty() && self.reading == 0
    }

    /// Whether a member still takes part.
    pub(super) fn is_active(&self, rank: u32) -> bool {
        self.peers
            .get(&rank)
            .is_some_and(|peer| peer.state == State::Active)
    }

    pub(super) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// A member read a window: all that want it get it.
    pub(super) fn done(&mut self, rank: u32, window: u32, buffer: u32) {
        if !self.end_read(rank, window, buffer) {
            return;
        }
        let mut holders = 0;
        for (&member, peer) in &mut self.peers {
            if peer.state == State::Active && self.items[window as usize].wanted.contains(member) {
                holders += 1;
                peer.held.push(Held {
                    since_beat: self.beats,
                    fill: peer.fills,
                    window,
                    buffer,
                });
                peer.fills += 1;
                if peer.waiting == Some(window) {
                    peer.waiting = None;
                }
                let message = Message::Filled { window, buffer };
                self.effects.push(Effect::Send(member, message));
            }
        }
        if holders == 0 {
            self.free.push(buffer);
        } else {
            self.buffers[buffer as usize] = Buffer::Held { holders };
        }
        self.advance();
    }

    /// A member could not read a window: all that want it are told.
    pub(super) fn failed(&mut self, rank: u32, window: u32, buffer: u32, text: &str) {
        if !self.end_read(rank, window, buffer) {
            return;
        }
        self.free.push(buffer);
        for (&member, peer) in &self.peers {
            if peer.state == State::Active && self.items[window as usize].wanted.contains(member) {
                let text = text.to_owned();
                let message = Message::WindowFailed { window, rank, text };
                self.effects.push(Effect::Send(member, message));
            }
        }
        self.advance();
    }

    /// A member gives a window back unread, and reads no more.
    pub(super) fn returned(&mut self, rank: u32, window: u32, buffer: u32) {
        if !self.end_read(rank, window, buffer) {
            return;
        }
        self.free.push(buffer);
        self.pending.insert(window);
        if let Some(peer) = self.peers.get_mut(&rank) {
            peer.readers = 0;
        }
        self.forget_unwanted();
        self.advance();
    }

    /// A member looks at a window no more.
    pub(super) fn released(&mut self, rank: u32, window: u32, buffer: u32) {
        let Some(peer) = self.peers.get_mut(&rank) else {
            return;
        };
        let found = peer
            .held
            .iter()
            .position(|held| (held.window, held.buffer) == (window, buffer));
        if let Some(found) = found {
            peer.held.remove(found);
            self.let_go(buffer);
            self.advance();
        }
    }

    /// A member's consumer waits for a window.
    pub(super) fn waiting(&mut self, rank: u32, window: u32) {
        if let Some(peer) = self.peers.get_mut(&rank) {
            peer.waiting = Some(window);
        }
    }

    /// A member wants nothing more. Of the windows sent to it, it got the first `received`.
    pub(super) fn left(&mut self, rank: u32, received: u64) {
        let Some(peer) = self.peers.get_mut(&rank) else {
            return;
        };
        if peer.state == State::Active {
            peer.state = State::Left;
        }
        let (kept, missed) = peer.held.iter().partition(|held| held.fill < received);
        peer.held = kept;
        self.retire(rank, missed);
    }

    /// A member's connection ended: it looks at nothing any more.
    pub(super) fn gone(&mut self, rank: u32) {
        let Some(peer) = self.peers.get_mut(&rank) else {
            return;
        };
        let was_active = peer.state == State::Active;
        peer.state = State::Gone;
        let held = std::mem::take(&mut peer.held);
        if was_active {
            self.tell_others(rank);
        }
        self.retire(rank, held);
    }

    /// Takes a member out that lives, or may live: what it holds stays its own. `message` tells it.
    pub(super) fn take_out(&mut self, rank: u32, message: Message) {
        let Some(peer) = self.peers.get_mut(&rank) else {
            return;
        };
        if !matches!(peer.state, State::Active | State::Left) {
            return;
        }
        if peer.state == State::Active {
            self.effects.push(Effect::Send(rank, message));
        }
        peer.state = State::TakenOut;
        let lost: Vec<u32> = peer.held.iter().map(|held| held.buffer).collect();
        self.tell_others(rank);
        for buffer in lost {
            if let Buffer::Held { holders } = self.buffers[buffer as usize] {
                self.buffers[buffer as usize] = Buffer::Lost { holders };
                self.replace();
            }
        }
        self.retire(rank, Vec::new());
    }

    /// A beat has passed.
    pub(super) fn beat(&mut self) {
        self.beats += 1;
        let blamed = self.blamed();
        match &mut self.stall {
            Some(stall) if Some((stall.rank, stall.held)) == blamed => stall.beats += 1,
            stall => {
                let begun = blamed.map(|(rank, held)| Stall {
                    rank,
                    held,
                    beats: 0,
                });
                if let Some(over) = std::mem::replace(stall, begun).filter(|stall| stall.beats > 0)
                {
                    let message = Message::Stalled { beats: over.beats };
                    if self.is_active(over.rank) {
                        self.effects.push(Effect::Send(over.rank, message));
                    }
                }
            }
        }
        if let Some(stall) = self.stall.take_if(|stall| stall.beats >= self.lease_beats) {
            let held = self
                .peers
                .get(&stall.rank)
                .map_or(0, |peer| peer.held.len());
            let held = u32::try_from(held).unwrap_or(u32::MAX);
            let beats = stall.beats;
            self.take_out(stall.rank, Message::LeasesHeld { held, beats });
        }
    }

    /// Who holds the oldest window, while somebody waits for one that finds no buffer.
    fn blamed(&self) -> Option<(u32, Held)> {
        let mut peers = self.peers.values();
        let waits = peers.any(|peer| {
            peer.state == State::Active
                && peer
                    .waiting
                    .is_some_and(|window| self.pending.contains(&window))
        });
        if !waits || !self.free.is_empty() || self.reading > 0 {
            return None;
        }
        let holders = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.state != State::TakenOut);
        let oldest = holders.filter_map(|(&rank, peer)| Some((*peer.held.first()?, rank)));
        oldest.min().map(|(held, rank)| (rank, held))
    }

    /// Ends a read, if this member was reading this. From one that was taken out, an answer may come late.
    fn end_read(&mut self, rank: u32, window: u32, buffer: u32) -> bool {
        if !self.is_active(rank) {
            return false;
        }
        let reading = self.buffers.get_mut(buffer as usize);
        let Some(reading) = reading.filter(|state| **state == Buffer::Reading { rank, window })
        else {
            // No member of this version does that. It reads the rest alone.
            let text = format!("rank {rank} answered for a window that it was not given");
            self.take_out(rank, Message::Dissolved { text });
            return false;
        };
        *reading = Buffer::Idle;
        self.reading -= 1;
        if let Some(peer) = self.peers.get_mut(&rank) {
            peer.reading -= 1;
        }
        true
    }

    /// Takes the reads of a member that takes part no more away from it, and what it held no more.
    fn retire(&mut self, rank: u32, let_go: Vec<Held>) {
        for held in let_go {
            self.let_go(held.buffer);
        }
        for buffer in 0..self.buffers.len() {
            if let Buffer::Reading {
                rank: reader,
                window,
            } = self.buffers[buffer]
                && reader == rank
            {
                // The read may still be under way, so the buffer stays out of use, for ever.
                self.buffers[buffer] = Buffer::Idle;
                self.effects
                    .push(Effect::Discard(u32::try_from(buffer).unwrap_or(u32::MAX)));
                self.pending.insert(window);
                self.reading -= 1;
                self.replace();
            }
        }
        if let Some(peer) = self.peers.get_mut(&rank) {
            peer.reading = 0;
        }
        self.forget_unwanted();
        self.advance();
    }

    fn let_go(&mut self, buffer: u32) {
        let state = &mut self.buffers[buffer as usize];
        match state {
            Buffer::Held { holders } | Buffer::Lost { holders } if *holders > 1 => *holders -= 1,
            Buffer::Held { .. } => {
                *state = Buffer::Idle;
                self.free.push(buffer);
            }
            Buffer::Lost { .. } => {
                *state = Buffer::Idle;
                self.spare.push(buffer);
            }
            Buffer::Idle | Buffer::Reading { .. } => {}
        }
    }

    /// Puts a spare buffer in the place of one that was lost.
    fn replace(&mut self) {
        match self.spare.pop() {
            Some(buffer) => self.free.push(buffer),
            None => self.dissolve("too many buffers were lost with members that left"),
        }
    }

    fn tell_others(&mut self, rank: u32) {
        for (&member, peer) in &self.peers {
            if member != rank && peer.state == State::Active {
                self.effects
                    .push(Effect::Send(member, Message::Gone { rank }));
            }
        }
    }

    fn forget_unwanted(&mut self) {
        let (items, peers) = (&self.items, &self.peers);
        self.pending.retain(|&window| {
            let mut active = peers.iter().filter(|(_, peer)| peer.state == State::Active);
            active.any(|(&rank, _)| items[window as usize].wanted.contains(rank))
        });
    }

    fn dissolve(&mut self, reason: &str) {
        if !self.dissolved {
            self.dissolved = true;
            self.effects.push(Effect::Dissolve(reason.to_owned()));
        }
    }

    /// Gives pending windows to members to read, as long as there are buffers and readers.
    fn advance(&mut self) {
        while !self.dissolved
            && let Some(&window) = self.pending.first()
        {
            let active = || {
                self.peers
                    .iter()
                    .filter(|(_, peer)| peer.state == State::Active)
            };
            if !active().any(|(_, peer)| peer.readers > 0) {
                return self.dissolve("no member reads any more");
            }
            // Whoever reads least now, and of those, who has read least.
            let idle = active().filter(|(_, peer)| peer.reading < peer.readers);
            let reader = idle.min_by_key(|(_, peer)| (peer.reading, peer.read_bytes));
            let Some(rank) = reader.map(|(&rank, _)| rank) else {
                return;
            };
            let Some(buffer) = self.free.pop() else {
                return;
            };
            self.pending.remove(&window);
            self.buffers[buffer as usize] = Buffer::Reading { rank, window };
            self.reading += 1;
            if let Some(peer) = self.peers.get_mut(&rank) {
                peer.reading += 1;
                peer.read_bytes += self.items[window as usize].bytes;
            }
            self.effects
                .push(Effect::Send(rank, Message::Read { window, buffer }));
        }
    }
}
