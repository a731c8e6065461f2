//! The leader's thread: it lets members in, carries out what the ledger decides, and watches over them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ledger::{Effect, Item, Ledger};
use super::memory::Layout;
use super::wire::{Hello, Link, Message, Received, VERSION, accept};
use super::{BEAT, RankSet, beats};

/// What one thread leads.
#[derive(Debug)]
pub(super) struct Leader {
    /// How the leading member introduces itself; the others must agree with it.
    pub(super) own: Hello,
    pub(super) listener: OwnedFd,
    pub(super) deadline: Instant,
    pub(super) join_timeout: Duration,
    pub(super) silence_timeout: Duration,
    pub(super) lease_timeout: Duration,
    pub(super) file: Arc<OwnedFd>,
    pub(super) layout: Layout,
    pub(super) buffers: u32,
    pub(super) items: Vec<Item>,
}

/// A connection to a member, or to somebody who has not introduced himself.
struct Connection {
    link: Link,
    hello: Option<Hello>,
    /// How many beats have passed since something was heard of it. Counting beats, and not time, is fair to
    /// members that were stopped together with the leader.
    silent_beats: u64,
    is_own: bool,
    ended: bool,
}

impl Connection {
    fn new(link: Link, is_own: bool) -> Self {
        Self {
            link,
            hello: None,
            silent_beats: 0,
            is_own,
            ended: false,
        }
    }

    fn rank(&self) -> Option<u32> {
        self.hello.as_ref().map(|hello| hello.rank)
    }
}

/// Wakes the leader every [`BEAT`] that it lives through.
struct Clock(Instant);

impl Clock {
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.0;
        if due {
            self.0 = now + BEAT;
        }
        due
    }
}

impl Leader {
    /// Leads until all have what they want, the leading member leaves, or nobody is left. `own` is the leading
    /// member's connection.
    pub(super) fn run(mut self, own: Link) {
        let mut clock = Clock(Instant::now() + BEAT);
        let connections = self.form(Connection::new(own, true), &mut clock);
        let Leader { own, .. } = &self;
        match connections {
            None => tracing::debug!(
                rank = own.rank,
                "the leading member left before the group began"
            ),
            Some(connections) => self.serve(connections, clock),
        }
    }

    /// Lets members in until all are there or it is time. `None` when the leading member left.
    fn form(&mut self, own: Connection, clock: &mut Clock) -> Option<Vec<Connection>> {
        let mut connections = vec![own];
        let silence_beats = beats(self.silence_timeout);
        loop {
            let joined = connections.iter().filter(|one| one.hello.is_some()).count();
            let now = Instant::now();
            if joined >= self.own.world as usize || (now >= self.deadline && joined > 0) {
                break;
            }
            // The leading member says hello before anything else, so it is always among those joined.
            let until = clock
                .0
                .min(self.deadline.max(now + Duration::from_millis(1)));
            wait(Some(&self.listener), &connections, until);
            while let Some(link) = accept(&self.listener) {
                self.greet(link, &mut connections);
            }
            for index in 0..connections.len() {
                self.listen_to(index, &mut connections);
            }
            if connections.first().is_none_or(|own| own.ended) {
                return None;
            }
            if clock.is_due() {
                for connection in &mut connections {
                    connection.link.send(&Message::Beat);
                    connection.silent_beats += 1;
                    connection.ended |=
                        !connection.is_own && connection.silent_beats > silence_beats;
                }
            }
            connections.retain(|connection| !connection.ended);
        }
        connections.retain(|connection| connection.hello.is_some());
        Some(connections)
    }

    /// Only processes of the same user take part.
    fn greet(&self, link: Link, connections: &mut Vec<Connection>) {
        let own_uid = rustix::process::geteuid().as_raw();
        let text = match link.peer_uid() {
            // As many as may be refused in a moment, besides all members.
            Ok(uid) if uid == own_uid && connections.len() < RankSet::MAX_WORLD as usize * 2 => {
                connections.push(Connection::new(link, false));
                return;
            }
            Ok(uid) if uid == own_uid => "too many processes want to join it at once".to_owned(),
            Ok(uid) => {
                format!("it is one of user {own_uid}, and this process is one of user {uid}")
            }
            Err(error) => format!("finding out this process's user failed: {error}"),
        };
        reject(&link, &text, connections);
    }

    /// Takes what somebody sent who may not have joined yet.
    fn listen_to(&self, index: usize, connections: &mut [Connection]) {
        loop {
            let Some(connection) = connections.get_mut(index).filter(|one| !one.ended) else {
                return;
            };
            match connection.link.receive() {
                Received::Nothing => return,
                Received::Message(Message::Hello(hello), _) if connection.hello.is_none() => {
                    let others = connections.iter().filter_map(Connection::rank);
                    match self.objection(&hello, others) {
                        None => connections[index].hello = Some(hello),
                        Some(text) => {
                            connections[index].ended = true;
                            reject(&connections[index].link, &text, connections);
                        }
                    }
                }
                Received::Message(Message::Beat | Message::Waiting { .. }, _) => {
                    connection.silent_beats = 0;
                }
                Received::Message(..) | Received::Ended | Received::Garbled => {
                    connection.ended = true;
                }
            }
        }
    }

    /// Why a member cannot join.
    fn objection(&self, hello: &Hello, mut others: impl Iterator<Item = u32>) -> Option<String> {
        let (own, rank) = (&self.own, hello.rank);
        let led_by = format!("rank {}, which leads,", own.rank);
        if hello.version != VERSION {
            Some(format!(
                "rank {rank} speaks version {} of the protocol, and {led_by} version {VERSION}; start all \
                 members from the same build",
                hello.version
            ))
        } else if hello.world != own.world {
            Some(format!(
                "rank {rank} is of a world of {}, and {led_by} of one of {}; start all members with the same \
                 world",
                hello.world, own.world
            ))
        } else if others.any(|other| other == rank) {
            Some(format!(
                "there is a member with rank {rank} already; give each member a rank of its own, and each \
                 group a name of its own"
            ))
        } else if hello.fingerprint != own.fingerprint {
            Some(format!(
                "rank {rank} reads other files than {led_by} does, or other parts of them: the fingerprints \
                 differ; give groups that load different things different names"
            ))
        } else if hello.geometry != own.geometry {
            Some(format!(
                "rank {rank} cut what it reads into other windows than {led_by} did, or has files of other \
                 lengths; start all members from the same build, with the same parameters and files"
            ))
        } else {
            None
        }
    }

    fn serve(self, connections: Vec<Connection>, mut clock: Clock) {
        // The name is free from here on: who comes late makes a group of his own.
        drop(self.listener);
        if let [alone] = connections.as_slice() {
            let timeout = self.join_timeout;
            let text = format!("nobody else joined within {timeout:.1?}");
            return alone.link.send(&Message::Dissolved { text });
        }
        let members = |connection: &Connection| {
            let hello = connection.hello.as_ref()?;
            Some((hello.rank, hello.readers))
        };
        let readers: Vec<(u32, u32)> = connections.iter().filter_map(members).collect();
        let present: RankSet = readers.iter().map(|&(rank, _)| rank).collect();
        let mut connections: BTreeMap<u32, Connection> = connections
            .into_iter()
            .filter_map(|connection| Some((connection.rank()?, connection)))
            .collect();
        let start = Message::Start {
            leader: self.own.rank,
            stride: self.layout.stride() as u64,
            buffers: self.layout.count(),
            members: present.to_bytes(),
        };
        for connection in connections.values() {
            connection.link.send_with(&start, Some(&self.file));
        }
        let mut ledger = Ledger::new(self.items, readers, self.buffers, beats(self.lease_timeout));
        let silence_beats = beats(self.silence_timeout);
        let mut finishing = false;
        loop {
            for effect in ledger.take_effects() {
                match effect {
                    Effect::Send(rank, message) => {
                        if let Some(connection) = connections.get(&rank) {
                            connection.link.send(&message);
                        }
                    }
                    Effect::Discard(buffer) => self.layout.discard(&self.file, buffer),
                    Effect::Dissolve(text) => return dissolve(&connections, &text),
                }
            }
            if ledger.is_finished() {
                if !finishing {
                    finishing = true;
                    for connection in connections.values() {
                        connection.link.send(&Message::Finished);
                    }
                }
                // Whoever does not take what was sent to it falls silent, and is taken out.
                let unsent = |(&rank, one): (&u32, &Connection)| {
                    !one.ended && ledger.is_active(rank) && one.link.has_unsent()
                };
                if !connections.iter().any(unsent) {
                    return;
                }
            }
            wait(None, connections.values(), clock.0);
            let due = clock.is_due();
            let mut led_on = true;
            for (&rank, connection) in &mut connections {
                let left = hear(rank, connection, &mut ledger);
                led_on &= !(connection.is_own && left);
                connection.link.flush();
                if due && !connection.ended {
                    beat(rank, connection, &mut ledger, silence_beats);
                }
            }
            if !led_on && !ledger.is_finished() {
                let rank = self.own.rank;
                let text = format!("rank {rank}, which led, left before all had what they wanted");
                return dissolve(&connections, &text);
            }
            if due {
                ledger.beat();
            }
        }
    }
}

/// Takes what a member sent. Whether it left.
fn hear(rank: u32, connection: &mut Connection, ledger: &mut Ledger) -> bool {
    let mut left = false;
    while !connection.ended {
        let message = match connection.link.receive() {
            Received::Nothing => break,
            Received::Message(message, _) => message,
            Received::Ended | Received::Garbled => {
                connection.ended = true;
                ledger.gone(rank);
                return true;
            }
        };
        connection.silent_beats = 0;
        match message {
            Message::Beat => {}
            Message::Done { window, buffer } => ledger.done(rank, window, buffer),
            Message::Failed {
                window,
                buffer,
                text,
            } => {
                ledger.failed(rank, window, buffer, &text);
            }
            Message::Returned { window, buffer } => ledger.returned(rank, window, buffer),
            Message::Released { window, buffer } => ledger.released(rank, window, buffer),
            Message::Waiting { window } => ledger.waiting(rank, window),
            Message::Leave { fills, reads } => {
                ledger.left(rank, fills, reads);
                left = true;
            }
            // No member of this version sends the leader anything else.
            other => {
                let text = format!("rank {rank} sent {other:?} to the leader");
                ledger.take_out(rank, Message::Dissolved { text });
            }
        }
    }
    left
}

/// A beat has passed: tells a member that the leader lives, and takes it out if it does not seem to.
fn beat(rank: u32, connection: &mut Connection, ledger: &mut Ledger, silence_beats: u64) {
    if !ledger.is_active(rank) {
        return;
    }
    // Where messages wait for room, that it lives is not what the member needs to know.
    if !connection.link.has_unsent() {
        connection.link.send(&Message::Beat);
    }
    connection.silent_beats += 1;
    if connection.silent_beats > silence_beats && !connection.is_own {
        let text = format!(
            "rank {rank} was taken out, because nothing was heard of it for {:.1?}",
            BEAT * u32::try_from(silence_beats).unwrap_or(u32::MAX)
        );
        tracing::warn!("{text}");
        ledger.take_out(rank, Message::Dissolved { text });
    }
}

/// Refuses a process, and tells the members.
fn reject(link: &Link, text: &str, connections: &[Connection]) {
    tracing::warn!("refused to let a process join the group: {text}");
    let text = text.to_owned();
    link.send(&Message::Refused { text: text.clone() });
    let rejected = Message::Rejected { text };
    for connection in connections.iter().filter(|connection| !connection.ended) {
        connection.link.send(&rejected);
    }
}

/// Sends all away, to read the rest alone.
fn dissolve(connections: &BTreeMap<u32, Connection>, text: &str) {
    tracing::warn!("the group dissolves: {text}");
    for connection in connections.values() {
        let text = text.to_owned();
        connection.link.send(&Message::Dissolved { text });
    }
}

/// Waits until somebody knocks, sends, or has room again for what waits, at most until a time.
fn wait<'c>(
    listener: Option<&OwnedFd>,
    connections: impl IntoIterator<Item = &'c Connection>,
    until: Instant,
) {
    let mut waited: Vec<PollFd<'_>> = Vec::new();
    waited
        .extend(listener.map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
    for connection in connections
        .into_iter()
        .filter(|connection| !connection.ended)
    {
        waited.push(connection.link.poll_fd());
    }
    wait_for(&mut waited, until);
}

/// Waits for one of several descriptors, at most until a time.
pub(super) fn wait_for(waited: &mut [PollFd<'_>], until: Instant) {
    let timeout = until.saturating_duration_since(Instant::now());
    // A wait that is interrupted, or refused for want of memory, ends early, and the caller looks and waits again.
    let timeout = Timespec::try_from(timeout).ok();
    let _ = poll(waited, timeout.as_ref());
}
