//! Windows that several processes of one machine want, read once and handed to all of them.
//!
//! # The group
//!
//! Each member is a process with a rank. The first to bind the abstract Unix socket of the group's name leads: a
//! thread of it lets members in, decides who reads what into which buffer, and is told when a buffer is looked
//! at no more. The buffers are a memfd that every member maps. Abstract sockets and memfds are gone with the last
//! process that has them open, so there is nothing to clean up, whoever dies and whenever.
//!
//! | message | direction | meaning |
//! |---|---|---|
//! | `Hello` | to the leader | version, rank, world, readers, hash of the windows, fingerprint |
//! | `Refused`, `Rejected` | to the process, to the members | it does not fit the group, and why |
//! | `Start` | to members | the group begins: the ranks that are there, and the memfd |
//! | `Read` | to one member | read this window into this buffer; until it answers, the buffer is its own |
//! | `Done`, `Failed`, `Returned` | to the leader | it was read; could not be read; was not read (cancelled) |
//! | `Filled`, `WindowFailed` | to all that want it | look at it, it does not change until you release it; the error |
//! | `Released` | to the leader | looked at no more |
//! | `Waiting` | to the leader | the consumer asked for this window, and waits |
//! | `Leave` | to the leader | wants nothing more; how many windows came |
//! | `Gone`, `Stalled` | to members | who was lost; for how long others waited for your leases |
//! | `LeasesHeld` | to one member | others waited for too long: you are taken out |
//! | `Dissolved`, `Finished` | to members | read the rest alone; everything was sent |
//! | `Beat` | both ways | sent every quarter of a second: the process lives, and is not stopped |
//!
//! A buffer is free, read into by one member, or looked at by those that it was sent to. A window goes to whoever
//! reads least, in order, as soon as a buffer is free.
//!
//! # Who is lost, and what then
//!
//! - **Never comes.** The group begins without it when the leader's `join_timeout` is over.
//! - **Comes late.** The name is free once a group has begun. Whoever comes then makes a group of his own, and
//!   after `join_timeout` reads alone: right, but not shared.
//! - **Dies** (the connection ends). What it looked at is free. What it was reading is read again, by somebody
//!   else, into another buffer; its own is not used again, because the kernel may still write there. A spare
//!   buffer, of which there are as many as buffers, takes its place. Should there be no spare one, the group
//!   dissolves.
//! - **Is stopped** (no beat for `silence_timeout`). The same, but what it looks at stays its own: it may wake up.
//!   When it does, it finds itself taken out, and reads the rest alone.
//! - **Holds leases for too long.** If another member's consumer waits, nothing is being read and no buffer is free
//!   for `lease_timeout`, whoever holds the oldest window is taken out. Its next call gives an error that says
//!   so; its leases stay valid; the others go on.
//! - **Fails to read.** All that want the window get the error, at its turn, and are at their end.
//! - **Is cancelled, panics, or is dropped.** It leaves; what it was reading goes to others.
//! - **The leader dies, stops, or leaves.** Each member goes on with what was sent to it, and reads the rest
//!   alone. That is why the leading member's end comes only once all have been sent what they want.
//!
//! # What is trusted
//!
//! Peers are processes of the same user, which could write to each other's memory anyhow. Processes of other
//! users can neither join nor pose as a leader: both ends ask the kernel whose process the other one is.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::{
    Backend, Control, Error, FilledWindow, ReadStats, ReadWindow, Result, SourceFile, StreamParams,
};
#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
use absent::Member;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
use member::Member;
pub use ranks::RankSet;

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
mod absent;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod leader;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod ledger;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod member;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[allow(unsafe_code)]
mod memory;
mod ranks;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod wire;

/// How often members and leader let each other know that they live. What is timed is counted in these.
const BEAT: Duration = Duration::from_millis(250);

/// How many beats there are in a time, rounded up.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
fn beats(time: Duration) -> u64 {
    u64::try_from(time.as_millis().div_ceil(BEAT.as_millis())).unwrap_or(u64::MAX)
}

/// Which group a process joins, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedOptions {
    /// The group's name, the same in all members and of 1 to [`MAX_NAME_BYTES`](Self::MAX_NAME_BYTES) bytes without
    /// NUL. Other users' groups, and those in other network namespaces (containers), may have the same.
    pub name: String,
    /// This process's number in the group, from 0; each has its own.
    pub rank: u32,
    /// How many processes the group has, 1 to [`RankSet::MAX_WORLD`].
    pub world: u32,
    /// What identifies the files and the way they are cut, at most [`MAX_FINGERPRINT_BYTES`](Self::MAX_FINGERPRINT_BYTES)
    /// bytes: members whose fingerprint is not the leader's are refused. The windows and the lengths of the files
    /// are compared besides.
    pub fingerprint: Vec<u8>,
    /// How long to wait for the other members before the load begins without them.
    pub join_timeout: Duration,
    /// How long a member, or the leader, may give no sign of life before the others go on without it; a
    /// second at least. A process that is stopped gives none; one that waits for storage or computes does.
    pub silence_timeout: Duration,
}

impl SharedOptions {
    /// Longest name, in bytes.
    pub const MAX_NAME_BYTES: usize = 64;
    /// Longest fingerprint, in bytes.
    pub const MAX_FINGERPRINT_BYTES: usize = 1024;
    /// Time enough for processes that are started together, one of which has to read its program first.
    pub const DEFAULT_JOIN_TIMEOUT: Duration = Duration::from_secs(30);
    /// Far longer than a machine under load keeps a thread from running.
    pub const DEFAULT_SILENCE_TIMEOUT: Duration = Duration::from_secs(10);
    const MIN_SILENCE_TIMEOUT: Duration = Duration::from_secs(1);

    /// A member of a group, with the default timeouts.
    pub fn new(
        name: impl Into<String>,
        rank: u32,
        world: u32,
        fingerprint: impl Into<Vec<u8>>,
    ) -> Self {
        Self {
            name: name.into(),
            rank,
            world,
            fingerprint: fingerprint.into(),
            join_timeout: Self::DEFAULT_JOIN_TIMEOUT,
            silence_timeout: Self::DEFAULT_SILENCE_TIMEOUT,
        }
    }

    /// Waits for the other members this long.
    #[must_use]
    pub fn with_join_timeout(mut self, join_timeout: Duration) -> Self {
        self.join_timeout = join_timeout;
        self
    }

    /// Takes a member for stopped after this long.
    #[must_use]
    pub fn with_silence_timeout(mut self, silence_timeout: Duration) -> Self {
        self.silence_timeout = silence_timeout;
        self
    }

    /// Checks everything against its range.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGroup`] for the name; [`Error::InvalidParameter`] names the parameter, the value and the range.
    pub fn validate(&self) -> Result<()> {
        let reason = if self.name.is_empty() {
            Some("is empty".to_owned())
        } else if self.name.contains('\0') {
            Some("contains a NUL character".to_owned())
        } else if self.name.len() > Self::MAX_NAME_BYTES {
            Some(format!("has {} bytes", self.name.len()))
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(Error::InvalidGroup {
                group: self.name.clone(),
                reason,
                max_bytes: Self::MAX_NAME_BYTES,
            });
        }
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        for (parameter, value, min, max) in [
            ("world", self.world.into(), 1, RankSet::MAX_WORLD.into()),
            (
                "rank",
                self.rank.into(),
                0,
                u64::from(self.world.max(1)) - 1,
            ),
            (
                "fingerprint bytes",
                self.fingerprint.len() as u64,
                0,
                Self::MAX_FINGERPRINT_BYTES as u64,
            ),
            (
                "silence_timeout ms",
                milliseconds(self.silence_timeout),
                milliseconds(Self::MIN_SILENCE_TIMEOUT),
                MAX_TIMEOUT_MS,
            ),
            (
                "join_timeout ms",
                milliseconds(self.join_timeout),
                0,
                MAX_TIMEOUT_MS,
            ),
        ] {
            if !(min..=max).contains(&value) {
                return Err(Error::InvalidParameter {
                    parameter,
                    value,
                    min,
                    max,
                });
            }
        }
        Ok(())
    }

    /// The user is part of the name, so that users do not take names from each other by accident.
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    fn socket_name(&self) -> String {
        let uid = rustix::process::geteuid().as_raw();
        format!("tensora-group/{uid}/{}", self.name)
    }
}

/// A year. Times far beyond it overflow the clock.
const MAX_TIMEOUT_MS: u64 = 365 * 24 * 3600 * 1000;

/// A window and who wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedWindow {
    /// What is read.
    pub window: ReadWindow,
    /// The ranks that get it. Windows that one rank alone wants are better left out of the group, and read by
    /// that rank.
    pub wanted: RankSet,
}

/// What a member is in its group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum SharedRole {
    /// It leads: it was the first.
    Leader,
    /// It follows.
    #[default]
    Member,
}

/// How a shared load went, as far as one member knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct SharedReport {
    /// What this member is.
    pub role: SharedRole,
    /// Ranks of the members with which the load began, this one among them.
    pub members: Vec<u32>,
    /// Windows that this member read, for itself or for others.
    pub windows_read_here: u64,
    /// What reading them took.
    pub read_here: ReadStats,
    /// Windows handed out here that another member read.
    pub windows_received: u64,
    /// Ranks that died, stopped, or were taken out.
    pub died: Vec<u32>,
    /// Since when, and why, this member read alone, if it did.
    pub alone_since: Option<String>,
    /// Processes that were not let in, and why.
    pub rejected: Vec<String>,
    /// How often other members waited for this one's leases, a quarter of a second or longer.
    pub lease_stalls: u64,
    /// How long these stalls were, added up.
    pub lease_stall_elapsed: Duration,
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
impl SharedReport {
    /// Adds what a connection, or reading alone, took.
    fn add(&mut self, other: Self) {
        if !other.members.is_empty() {
            self.members = other.members;
        }
        self.windows_read_here += other.windows_read_here;
        self.read_here.merge(other.read_here);
        self.windows_received += other.windows_received;
        self.died.extend(other.died);
        self.rejected.extend(other.rejected);
        self.lease_stalls += other.lease_stalls;
        self.lease_stall_elapsed += other.lease_stall_elapsed;
    }
}

/// The windows that one rank wants of those that a group of processes reads together, in order.
///
/// Each window is read by one member, with any [`Backend`], into memory that all share, and handed to all
/// that want it. Its bytes are a lease, as those of a [`RangeStream`](crate::RangeStream): the buffer is read into again
/// once every member has dropped them. So the slowest member sets the pace, and what members keep while they
/// ask for the next must leave a buffer free: `buffers` of `world` + 1 allow each to keep one.
///
/// Members may be lost at any moment: the others go on, with the right bytes, reading alone what nobody reads
/// for them any more. [`report`](Self::report) says what happened. Memory is bounded by the buffers of
/// [`StreamParams`], those of the leader, which all share; a member that reads alone has its own
/// besides.
///
/// The leading member's end comes once every member has been sent what it wants. Ask until `None`: a leader that is
/// dropped before makes the others read the rest alone.
///
/// # Errors
///
/// A window that its reader could not read gives all that want it the error, at its turn, after the windows
/// before it: the reader the error itself, the others [`Error::ReadByPeer`]; then the stream is at its end.
/// [`Error::GroupLeasesHeld`]: the others waited for this member's leases for
/// [`lease_timeout`](StreamParams::lease_timeout) and went on without it; the stream is at its end, the leases stay
/// valid. [`Error::Cancelled`] comes at once, and is the end too. [`Error::LeasesHeld`] can come where a
/// member reads alone, and is no end.
///
/// # Panics
///
/// A panic of the backend is passed on, and is the stream's end; other members read the window.
///
/// # Dropping
///
/// Dropping it waits for the reads that it has under way, and leaves the group. Leases outlive it.
pub struct SharedStream {
    member: Member,
}

impl SharedStream {
    /// Joins the group, or makes it, and waits for the other members at most
    /// [`join_timeout`](SharedOptions::join_timeout); then the load begins.
    ///
    /// `windows` and `files` are the same in all members, those that a rank does not want included. `params` may
    /// differ: the leader's `buffers` and `lease_timeout` count, and every member's `readers` and `transfer` for what it
    /// reads. The progress of `control` counts the bytes of windows as they are handed out.
    ///
    /// When nobody else comes, or the name is taken by another user, the member reads alone.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidGroup`], [`Error::InvalidParameter`] and [`Error::InvalidWindow`] for what lies outside its range;
    /// - [`Error::GroupRefused`] when the leader's version, world, fingerprint or windows are others, or has a
    ///   member of that rank;
    /// - [`Error::Unsupported`] off Linux, and where the system refuses memfds or abstract sockets;
    /// - [`Error::Group`] and [`Error::Thread`] when a socket, shared memory or a thread cannot be had;
    /// - [`Error::Cancelled`].
    pub fn join(
        options: &SharedOptions,
        files: Vec<Arc<SourceFile>>,
        windows: Vec<SharedWindow>,
        backend: Arc<dyn Backend>,
        params: StreamParams,
        control: Control,
    ) -> Result<Self> {
        options.validate()?;
        params.validate()?;
        let member = Member::join(options, files, windows, backend, params, control)?;
        Ok(Self { member })
    }

    /// How it went so far.
    pub fn report(&self) -> SharedReport {
        self.member.report()
    }
}

impl Iterator for SharedStream {
    type Item = Result<FilledWindow>;

    /// The next window that this rank wants, waited for. Its number is its position among all windows.
    fn next(&mut self) -> Option<Self::Item> {
        self.member.next()
    }
}

impl std::iter::FusedIterator for SharedStream {}

impl fmt::Debug for SharedStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedStream")
            .field("member", &self.member)
            .finish()
    }
}
