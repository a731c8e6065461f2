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
        /// Which of the reads this is that the member was asked for.
        read: u64,
    },
    /// Looked at by so many members.
    Held { holders: u32 },
    /// The same, but one of them was taken out, lives, and may hold it for ever: another one is used in its place.
    Lost { holders: u32 },
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
    /// How many windows it was asked to read.
    reads: u64,
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
            reads: 0,
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

    /// A member wants nothing more. Of what was sent to it, the first `fills` windows came, and the first `reads`
    /// reads.
    pub(super) fn left(&mut self, rank: u32, fills: u64, reads: u64) {
        let Some(peer) = self.peers.get_mut(&rank) else {
            return;
        };
        if peer.state == State::Active {
            peer.state = State::Left;
        }
        let (kept, missed) = peer.held.iter().partition(|held| held.fill < fills);
        peer.held = kept;
        self.retire(rank, missed, reads);
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
        self.retire(rank, held, u64::MAX);
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
        self.retire(rank, Vec::new(), u64::MAX);
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
        let own = |state: &Buffer| match *state {
            Buffer::Reading {
                rank: reader,
                window: read,
                ..
            } => (reader, read) == (rank, window),
            _ => false,
        };
        let reading = self.buffers.get_mut(buffer as usize);
        let Some(reading) = reading.filter(|state| own(state)) else {
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

    /// Takes the reads of a member that takes part no more away from it, and what it held no more. It saw no
    /// more than the first `reads` of what it was asked to read.
    fn retire(&mut self, rank: u32, let_go: Vec<Held>, reads: u64) {
        for held in let_go {
            self.let_go(held.buffer);
        }
        for (number, index) in (0_u32..).zip(0..self.buffers.len()) {
            let Buffer::Reading {
                rank: reader,
                window,
                read,
            } = self.buffers[index]
            else {
                continue;
            };
            if reader != rank {
                continue;
            }
            self.buffers[index] = Buffer::Idle;
            self.pending.insert(window);
            self.reading -= 1;
            if read < reads {
                // The read may still be under way, so the buffer stays out of use, for ever.
                self.effects.push(Effect::Discard(number));
                self.replace();
            } else {
                self.free.push(number);
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
            let Some(peer) = self.peers.get_mut(&rank) else {
                return;
            };
            let read = peer.reads;
            self.buffers[buffer as usize] = Buffer::Reading { rank, window, read };
            self.reading += 1;
            peer.reading += 1;
            peer.reads += 1;
            peer.read_bytes += self.items[window as usize].bytes;
            self.effects
                .push(Effect::Send(rank, Message::Read { window, buffer }));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A member, played: what it was sent, and whether it still does anything about it.
    #[derive(Debug, Default)]
    struct Played {
        reads: Vec<(u32, u32)>,
        holds: Vec<(u32, u32)>,
        got: Vec<u32>,
        fills: u64,
        asked: u64,
        /// Takes part.
        active: bool,
        /// Its connection is open.
        open: bool,
    }

    /// Members that do what they are told, late, and sometimes leave, die or wake up after they were taken out.
    struct Play {
        ledger: Ledger,
        items: Vec<Item>,
        members: BTreeMap<u32, Played>,
        /// The window that was last read into a buffer.
        content: Vec<Option<u32>>,
        /// Buffers that a member which is no more may still read into.
        unsafe_buffers: BTreeSet<u32>,
        discarded: BTreeSet<u32>,
        dissolved: bool,
    }

    impl Play {
        fn obey(&mut self) {
            for effect in self.ledger.take_effects() {
                match effect {
                    Effect::Send(rank, Message::Read { window, buffer }) => {
                        assert!(
                            !self.unsafe_buffers.contains(&buffer),
                            "retired, and read into"
                        );
                        for (other, member) in self.members.iter().filter(|(_, one)| one.open) {
                            let busy = member.reads.iter().chain(&member.holds);
                            assert!(
                                busy.clone().all(|&(_, b)| b != buffer),
                                "{other} uses {buffer}"
                            );
                        }
                        let member = self.members.get_mut(&rank).unwrap();
                        assert!(member.active);
                        member.reads.push((window, buffer));
                        member.asked += 1;
                    }
                    Effect::Send(rank, Message::Filled { window, buffer }) => {
                        assert_eq!(self.content[buffer as usize], Some(window));
                        assert!(self.items[window as usize].wanted.contains(rank));
                        let member = self.members.get_mut(&rank).unwrap();
                        assert!(!member.got.contains(&window), "sent twice");
                        member.got.push(window);
                        member.holds.push((window, buffer));
                        member.fills += 1;
                    }
                    Effect::Send(rank, Message::WindowFailed { window, .. }) => {
                        self.members.get_mut(&rank).unwrap().got.push(window);
                    }
                    Effect::Send(rank, Message::Dissolved { .. } | Message::LeasesHeld { .. }) => {
                        self.members.get_mut(&rank).unwrap().active = false;
                    }
                    Effect::Send(..) => {}
                    Effect::Discard(buffer) => {
                        assert!(self.discarded.insert(buffer), "discarded twice");
                        self.unsafe_buffers.insert(buffer);
                    }
                    Effect::Dissolve(_) => self.dissolved = true,
                }
            }
        }

        fn act(&mut self, rank: u32, what: u8, which: usize) {
            let member = self.members.get_mut(&rank).unwrap();
            let pick = |list: &mut Vec<(u32, u32)>| match list.len() {
                0 => None,
                len => Some(list.remove(which % len)),
            };
            match what {
                // Answers, also when it was taken out: the ledger must not care.
                0..=5 if member.open => {
                    if let Some((window, buffer)) = pick(&mut member.reads) {
                        let is_own = member.active;
                        if is_own {
                            self.content[buffer as usize] = Some(window);
                        }
                        match what {
                            0..=3 => self.ledger.done(rank, window, buffer),
                            4 => self.ledger.failed(rank, window, buffer, "as told"),
                            _ => self.ledger.returned(rank, window, buffer),
                        }
                    }
                }
                6..=12 if member.open => {
                    if let Some((window, buffer)) = pick(&mut member.holds) {
                        self.ledger.released(rank, window, buffer);
                    }
                }
                13 if member.active => {
                    member.active = false;
                    // Some of what was sent last is still on its way. What it was to read, it gives back.
                    let unseen = member.holds.len().min(which % 3);
                    member.holds.truncate(member.holds.len() - unseen);
                    let reads = std::mem::take(&mut member.reads);
                    let fills = member.fills - unseen as u64;
                    let asked = member.asked;
                    let seen = reads.len() - reads.len().min(which % 2);
                    for &(window, buffer) in &reads[..seen] {
                        self.ledger.returned(rank, window, buffer);
                    }
                    let unseen_reads = (reads.len() - seen) as u64;
                    self.ledger.left(rank, fills, asked - unseen_reads);
                }
                14 if member.open => {
                    (member.active, member.open) = (false, false);
                    self.unsafe_buffers
                        .extend(member.reads.iter().map(|&(_, buffer)| buffer));
                    self.ledger.gone(rank);
                }
                15 if member.active => {
                    member.active = false;
                    let text = "as told".to_owned();
                    self.ledger.take_out(rank, Message::Dissolved { text });
                }
                16 => self.ledger.beat(),
                17 if member.active => {
                    let wanted = (0..)
                        .zip(&self.items)
                        .filter(|(_, item)| item.wanted.contains(rank));
                    let next = wanted
                        .map(|(window, _)| window)
                        .find(|w| !member.got.contains(w));
                    if let Some(window) = next {
                        self.ledger.waiting(rank, window);
                    }
                }
                _ => {}
            }
            self.obey();
        }
    }

    #[test]
    fn only_buffers_that_may_have_been_read_into_are_given_up() {
        let item = || Item {
            wanted: [0, 1].into_iter().collect(),
            bytes: 1,
            takes_buffer: true,
        };
        let items: Vec<Item> = (0..4).map(|_| item()).collect();
        for (seen, given_up) in [(2, 2), (1, 1), (0, 0)] {
            let mut ledger = Ledger::new(items.clone(), [(0, 2), (1, 2)], 4, 3);
            let begun = ledger.take_effects();
            let of_one = |effect: &&Effect| matches!(effect, Effect::Send(1, Message::Read { .. }));
            assert_eq!(begun.iter().filter(of_one).count(), 2);
            ledger.left(1, 0, seen);
            let effects = ledger.take_effects();
            let discards = effects
                .iter()
                .filter(|one| matches!(one, Effect::Discard(_)));
            assert_eq!(discards.count(), given_up);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Whatever members do, a buffer is never read into while somebody may use it, and those that stay get
        /// everything, unless the group dissolves.
        #[test]
        fn nothing_is_overwritten_and_nobody_is_forgotten(
            wanted in prop::collection::vec(0_u8..32, 0..40),
            world in 1_u32..6,
            readers in 1_u32..4,
            buffers in 1_u32..6,
            acts in prop::collection::vec((0_u32..5, 0_u8..18, 0_usize..100), 0..300),
        ) {
            let items: Vec<Item> = wanted.iter().map(|bits| Item {
                wanted: (0..world).filter(|rank| bits & (1 << rank) != 0).collect(),
                bytes: u64::from(*bits),
                takes_buffer: true,
            }).collect();
            let ledger = Ledger::new(items.clone(), (0..world).map(|rank| (rank, readers)), buffers, 3);
            let member = || Played { active: true, open: true, ..Played::default() };
            let mut play = Play {
                ledger,
                items: items.clone(),
                members: (0..world).map(|rank| (rank, member())).collect(),
                content: vec![None; buffers as usize * 2],
                unsafe_buffers: BTreeSet::new(),
                discarded: BTreeSet::new(),
                dissolved: false,
            };
            play.obey();
            for (rank, what, which) in acts {
                if !play.dissolved {
                    play.act(rank % world, what, which);
                }
            }
            // From here on, those that are left do as they are told, in the order of the windows.
            for _ in 0..items.len() * 8 + 64 {
                for rank in 0..world {
                    if !play.dissolved && play.members[&rank].active {
                        play.act(rank, 0, 0);
                        let next = play.members[&rank].holds.iter().min().copied();
                        if let Some(next) = next {
                            play.members.get_mut(&rank).unwrap().holds.retain(|held| *held != next);
                            play.ledger.released(rank, next.0, next.1);
                            play.obey();
                        }
                    } else if !play.dissolved && play.members[&rank].open {
                        // It may hold its leases as long as it likes.
                        play.act(rank, 17, 0);
                    }
                }
                if !play.dissolved {
                    for rank in 0..world {
                        play.act(rank, 17, 0);
                    }
                    play.act(0, 16, 0);
                }
            }
            if !play.dissolved {
                prop_assert!(play.ledger.is_finished(), "{:?}", play.ledger);
                for (&rank, member) in play.members.iter().filter(|(_, one)| one.active) {
                    let wants = |item: &Item| item.wanted.contains(rank);
                    let count = items.iter().filter(|item| wants(item)).count();
                    prop_assert_eq!(member.got.len(), count, "rank {}", rank);
                }
            }
        }
    }
}
