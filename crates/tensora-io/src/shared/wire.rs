//! What members and leader say to each other, and the sockets they say it through.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType,
};

use crate::workers::lock;

/// Counts changes of the messages below. Members of other versions are refused.
pub(super) const VERSION: u64 = 1;
/// `tnsrgrup`: whatever else listens at such a name does not send it.
const MAGIC: u64 = u64::from_le_bytes(*b"tnsrgrup");
/// Kind and five numbers, little-endian.
const HEADER_BYTES: usize = 48;
/// Texts and fingerprints are cut, or refused, at this length.
const MAX_TEXT_BYTES: usize = 2048;

/// A record of the protocol; the module's documentation says who sends which when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Beat,
    // From a member to the leader.
    Hello(Hello),
    Done {
        window: u32,
        buffer: u32,
    },
    Failed {
        window: u32,
        buffer: u32,
        text: String,
    },
    Returned {
        window: u32,
        buffer: u32,
    },
    Released {
        window: u32,
        buffer: u32,
    },
    Waiting {
        window: u32,
    },
    Leave {
        fills: u64,
        reads: u64,
    },
    // From the leader to a member.
    Refused {
        text: String,
    },
    Rejected {
        text: String,
    },
    Start {
        leader: u32,
        stride: u64,
        buffers: u32,
        members: Vec<u8>,
    },
    Read {
        window: u32,
        buffer: u32,
    },
    Filled {
        window: u32,
        buffer: u32,
    },
    WindowFailed {
        window: u32,
        rank: u32,
        text: String,
    },
    Gone {
        rank: u32,
    },
    Stalled {
        beats: u64,
    },
    LeasesHeld {
        held: u32,
        beats: u64,
    },
    Dissolved {
        text: String,
    },
    Finished,
}

/// How a member introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) version: u64,
    pub(super) rank: u32,
    pub(super) world: u32,
    /// How many windows it reads at a time.
    pub(super) readers: u32,
    /// A hash of the windows and of the files' lengths.
    pub(super) geometry: u64,
    /// What the caller says identifies the files.
    pub(super) fingerprint: Vec<u8>,
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        let pair = |window: u32, buffer: u32| [window.into(), buffer.into(), 0, 0, 0];
        let (kind, numbers, text): (u64, [u64; 5], &[u8]) = match self {
            Self::Beat => (0, [0; 5], &[]),
            Self::Hello(hello) => {
                let ranks = u64::from(hello.rank) << 32 | u64::from(hello.world);
                let numbers = [
                    MAGIC,
                    hello.version,
                    ranks,
                    hello.readers.into(),
                    hello.geometry,
                ];
                (1, numbers, &hello.fingerprint)
            }
            Self::Done { window, buffer } => (2, pair(*window, *buffer), &[]),
            Self::Failed {
                window,
                buffer,
                text,
            } => (3, pair(*window, *buffer), text.as_bytes()),
            Self::Returned { window, buffer } => (4, pair(*window, *buffer), &[]),
            Self::Released { window, buffer } => (5, pair(*window, *buffer), &[]),
            Self::Waiting { window } => (6, pair(*window, 0), &[]),
            Self::Leave { fills, reads } => (7, [*fills, *reads, 0, 0, 0], &[]),
            Self::Refused { text } => (8, [0; 5], text.as_bytes()),
            Self::Rejected { text } => (9, [0; 5], text.as_bytes()),
            Self::Start {
                leader,
                stride,
                buffers,
                members,
            } => {
                let numbers = [MAGIC, VERSION, (*leader).into(), *stride, (*buffers).into()];
                (10, numbers, members)
            }
            Self::Read { window, buffer } => (11, pair(*window, *buffer), &[]),
            Self::Filled { window, buffer } => (12, pair(*window, *buffer), &[]),
            Self::WindowFailed { window, rank, text } => {
                (13, pair(*window, *rank), text.as_bytes())
            }
            Self::Gone { rank } => (14, pair(*rank, 0), &[]),
            Self::Stalled { beats } => (15, [*beats, 0, 0, 0, 0], &[]),
            Self::LeasesHeld { held, beats } => (16, [(*held).into(), *beats, 0, 0, 0], &[]),
            Self::Dissolved { text } => (17, [0; 5], text.as_bytes()),
            Self::Finished => (18, [0; 5], &[]),
        };
        let mut record = Vec::with_capacity(HEADER_BYTES + text.len());
        record.extend_from_slice(&kind.to_le_bytes());
        for number in numbers {
            record.extend_from_slice(&number.to_le_bytes());
        }
        record.extend_from_slice(cut(text));
        record
    }

    fn decode(record: &[u8]) -> Option<Self> {
        let (header, text) = record.split_at_checked(HEADER_BYTES)?;
        let mut numbers = header
            .chunks_exact(8)
            .map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes));
        let kind = numbers.next()?;
        let [a, b, c, d, e] = std::array::from_fn(|_| numbers.next().unwrap_or(0));
        let narrow = |number: u64| u32::try_from(number).ok();
        let text_string = || String::from_utf8_lossy(text).into_owned();
        Some(match kind {
            0 => Self::Beat,
            1 if a == MAGIC => Self::Hello(Hello {
                version: b,
                rank: narrow(c >> 32)?,
                world: narrow(c & u64::from(u32::MAX))?,
                readers: narrow(d)?,
                geometry: e,
                fingerprint: text.to_vec(),
            }),
            2 => Self::Done {
                window: narrow(a)?,
                buffer: narrow(b)?,
            },
            3 => Self::Failed {
                window: narrow(a)?,
                buffer: narrow(b)?,
                text: text_string(),
            },
            4 => Self::Returned {
                window: narrow(a)?,
                buffer: narrow(b)?,
            },
            5 => Self::Released {
                window: narrow(a)?,
                buffer: narrow(b)?,
            },
            6 => Self::Waiting { window: narrow(a)? },
            7 => Self::Leave { fills: a, reads: b },
            8 => Self::Refused {
                text: text_string(),
            },
            9 => Self::Rejected {
                text: text_string(),
            },
            10 if a == MAGIC && b == VERSION => Self::Start {
                leader: narrow(c)?,
                stride: d,
                buffers: narrow(e)?,
                members: text.to_vec(),
            },
            11 => Self::Read {
                window: narrow(a)?,
                buffer: narrow(b)?,
            },
            12 => Self::Filled {
                window: narrow(a)?,
                buffer: narrow(b)?,
            },
            13 => Self::WindowFailed {
                window: narrow(a)?,
                rank: narrow(b)?,
                text: text_string(),
            },
            14 => Self::Gone { rank: narrow(a)? },
            15 => Self::Stalled { beats: a },
            16 => Self::LeasesHeld {
                held: narrow(a)?,
                beats: b,
            },
            17 => Self::Dissolved {
                text: text_string(),
            },
            18 => Self::Finished,
            _ => return None,
        })
    }
}

/// At most the text that a record holds, without half a character at its end.
fn cut(text: &[u8]) -> &[u8] {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while end < text.len() && end > 0 && text[end] & 0b1100_0000 == 0b1000_0000 {
        end -= 1;
    }
    &text[..end]
}

/// What came through a link.
#[derive(Debug)]
pub(super) enum Received {
    Message(Message, Option<OwnedFd>),
    /// Nothing for now.
    Nothing,
    /// Nothing ever again: the peer closed its end, or its process is gone.
    Ended,
    /// Something that no member of this version sends.
    Garbled,
}

/// One end of a connection. Never blocks: what the peer has no room for waits here.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    unsent: Mutex<VecDeque<Unsent>>,
}

#[derive(Debug)]
struct Unsent {
    record: Vec<u8>,
    file: Option<Arc<OwnedFd>>,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            unsent: Mutex::default(),
        }
    }

    /// Two ends inside one process.
    pub(super) fn pair() -> rustix::io::Result<(Self, Self)> {
        let (first, second) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok((Self::new(first), Self::new(second)))
    }

    /// To be waited for: something to receive, or room for what waits to be sent.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, self.has_unsent());
        PollFd::new(&self.socket, flags)
    }

    /// The user that the peer's process runs as.
    pub(super) fn peer_uid(&self) -> rustix::io::Result<u32> {
        Ok(rustix::net::sockopt::socket_peercred(&self.socket)?
            .uid
            .as_raw())
    }

    pub(super) fn send(&self, message: &Message) {
        self.send_with(message, None);
    }

    /// Sends a message and, with it, a file.
    pub(super) fn send_with(&self, message: &Message, file: Option<&Arc<OwnedFd>>) {
        let mut unsent = lock(&self.unsent);
        unsent.push_back(Unsent {
            record: message.encode(),
            file: file.cloned(),
        });
        self.flush_locked(&mut unsent);
    }

    /// Sends what waits, as far as there is room now.
    pub(super) fn flush(&self) {
        self.flush_locked(&mut lock(&self.unsent));
    }

    pub(super) fn has_unsent(&self) -> bool {
        !lock(&self.unsent).is_empty()
    }

    fn flush_locked(&self, unsent: &mut VecDeque<Unsent>) {
        while let Some(first) = unsent.front() {
            match self.send_now(first) {
                Ok(()) => {
                    unsent.pop_front();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return,
                // The peer wants, or sees, nothing any more. Whether it is gone, receiving tells.
                Err(_) => unsent.clear(),
            }
        }
    }

    fn send_now(&self, unsent: &Unsent) -> rustix::io::Result<()> {
        let files = unsent.file.as_ref().map(|file| [file.as_fd()]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(files) = &files {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let record = [IoSlice::new(&unsent.record)];
        rustix::net::sendmsg(&self.socket, &record, &mut control, flags).map(|_| ())
    }

    pub(super) fn receive(&self) -> Received {
        let mut record = [0; HEADER_BYTES + MAX_TEXT_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut buffers = [IoSliceMut::new(&mut record)];
            let got = match rustix::net::recvmsg(&self.socket, &mut buffers, &mut control, flags) {
                // A peer that closed its end without having read everything resets the connection. That is told
                // once, ahead of what it sent before.
                Err(Errno::INTR | Errno::CONNRESET) => continue,
                Err(Errno::AGAIN) => return Received::Nothing,
                Err(_) => return Received::Ended,
                Ok(got) => got,
            };
            let file = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut files) => files.next(),
                _ => None,
            });
            if got.bytes == 0 {
                return Received::Ended;
            }
            let whole = !got.flags.contains(ReturnFlags::TRUNC);
            let message = record.get(..got.bytes).and_then(Message::decode);
            return match message.filter(|_| whole) {
                Some(message) => Received::Message(message, file),
                None => Received::Garbled,
            };
        }
    }

    /// Receives no more, which wakes whoever waits for something to receive. Sending goes on.
    pub(super) fn deafen(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

/// Connects to whoever listens at an abstract name.
pub(super) fn connect(name: &str) -> rustix::io::Result<Link> {
    let socket = socket()?;
    rustix::net::connect(
        &socket,
        &SocketAddrUnix::new_abstract_name(name.as_bytes())?,
    )?;
    Ok(Link::new(socket))
}

/// Listens at an abstract name. The kernel lets one socket have it, and frees it with that socket.
pub(super) fn listen(name: &str, backlog: u32) -> rustix::io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::bind(
        &socket,
        &SocketAddrUnix::new_abstract_name(name.as_bytes())?,
    )?;
    rustix::net::listen(&socket, i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(socket)
}

/// The next who wants to connect, if there is one.
pub(super) fn accept(listener: &OwnedFd) -> Option<Link> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        match rustix::net::accept_with(listener, flags) {
            Ok(socket) => return Some(Link::new(socket)),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<Message> {
        let (window, buffer, rank) = (7, u32::MAX, 1023);
        let text = "how it was: ö".to_owned();
        vec![
            Message::Beat,
            Message::Hello(Hello {
                version: VERSION + 1,
                rank,
                world: 1024,
                readers: 256,
                geometry: u64::MAX,
                fingerprint: vec![0, 255, 128],
            }),
            Message::Done { window, buffer },
            Message::Failed {
                window,
                buffer,
                text: text.clone(),
            },
            Message::Returned { window, buffer },
            Message::Released { window, buffer },
            Message::Waiting { window },
            Message::Leave {
                fills: u64::MAX,
                reads: 3,
            },
            Message::Refused { text: text.clone() },
            Message::Rejected { text: text.clone() },
            Message::Start {
                leader: rank,
                stride: 1 << 40,
                buffers: 3,
                members: vec![1, 2, 3],
            },
            Message::Read { window, buffer },
            Message::Filled { window, buffer },
            Message::WindowFailed {
                window,
                rank,
                text: text.clone(),
            },
            Message::Gone { rank },
            Message::Stalled { beats: 1 << 50 },
            Message::LeasesHeld {
                held: 9,
                beats: 1 << 50,
            },
            Message::Dissolved { text },
            Message::Finished,
        ]
    }

    #[test]
    fn every_message_arrives_as_it_was_sent_and_no_other_record_is_one() {
        let (first, second) = Link::pair().unwrap();
        for (kind, message) in one_of_each().into_iter().enumerate() {
            let record = message.encode();
            assert_eq!(record[0] as usize, kind, "in the order of their kinds");
            for cut in 0..HEADER_BYTES {
                assert_eq!(Message::decode(&record[..cut]), None);
            }
            first.send(&message);
            match second.receive() {
                Received::Message(received, None) => assert_eq!(received, message),
                other => panic!("{message:?} became {other:?}"),
            }
        }
        let mut unknown = Message::Finished.encode();
        unknown[0] += 1;
        assert_eq!(Message::decode(&unknown), None, "another kind");
        let mut stranger = one_of_each().swap_remove(1).encode();
        stranger[8] ^= 1;
        assert_eq!(Message::decode(&stranger), None, "another magic number");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let text = "ö".repeat(MAX_TEXT_BYTES);
        for text in [text.clone(), format!("x{text}")] {
            let record = Message::Refused { text: text.clone() }.encode();
            let Some(Message::Refused { text: got }) = Message::decode(&record) else {
                panic!("lost");
            };
            assert!(
                text.starts_with(&got) && got.len() + 2 > MAX_TEXT_BYTES,
                "{}",
                got.len()
            );
        }
    }

    #[test]
    fn what_finds_no_room_waits_and_what_was_sent_survives_the_sender() {
        let (first, second) = Link::pair().unwrap();
        let count = 5000_u32;
        (0..count).for_each(|window| first.send(&Message::Waiting { window }));
        assert!(first.has_unsent(), "the socket took everything");
        // Left unread, it resets the connection.
        second.send(&Message::Beat);
        let mut next = 0;
        while next < count {
            match second.receive() {
                Received::Message(message, None) => {
                    assert_eq!(message, Message::Waiting { window: next });
                    next += 1;
                }
                Received::Nothing => first.flush(),
                other => panic!("{other:?}"),
            }
        }
        first.send(&Message::Finished);
        drop(first);
        assert!(matches!(
            second.receive(),
            Received::Message(Message::Finished, None)
        ));
        assert!(matches!(second.receive(), Received::Ended));
        second.send(&Message::Beat);
        assert!(!second.has_unsent(), "nobody is there to wait for");
    }
}
