//! One connection to a peer: the messages on it, in both directions, and how many bytes may be under way.
//!
//! A link has a direction: one end has heads that open sessions on it, the other a store with replicas. Messages of
//! either end are encoded into one run of bytes and leave by one send a turn as a rule; what comes is decoded where it was
//! received.

use std::collections::VecDeque;
use std::io;

use ashlar_core::replication::wire::{HEADER_BYTES, Header, Kind, WireError};
use ashlar_core::units::{NodeId, StoreId};

use crate::stream::Stream;

/// Bytes of writes that may be on their way to a store or wait in it before the head holds the rest back. What this is
/// in time (some 10 ms of a fast disk) bounds how long a sign of life waits behind writes.
pub(super) const CREDIT_BYTES: u64 = 8 << 20;
/// Credit is given back in pieces of at least this much.
const GRANT_BYTES: u64 = 512 << 10;
/// Received at a time at least.
const RECEIVE_BYTES: usize = 256 << 10;
/// An empty outbox larger than this gives its memory back.
const KEEP_BYTES: usize = 1 << 20;

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The peer closed it.
    #[error("the peer closed the link")]
    Closed,
    /// The socket or its encryption failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came is not the protocol.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// A message that has no place here.
    #[error("unexpected {0:?} message")]
    Unexpected(Kind),
    /// Nothing was heard for too long.
    #[error("no sign of life for {0} ms")]
    Silent(u64),
}

/// The bytes of a link.
pub(super) struct Wire {
    pub(super) stream: Stream,
    inbox: Vec<u8>,
    /// Received and not consumed: bytes `start..end` of the inbox.
    start: usize,
    end: usize,
    outbox: Vec<u8>,
    /// Bytes of the outbox that are sent.
    sent: usize,
    /// Messages that came into the outbox since it was empty.
    messages: u32,
    /// Messages that wait for credit, with the credit each takes, and everything behind them.
    held: VecDeque<(u64, Vec<u8>)>,
    credit: u64,
    /// Credit to be given back to the peer.
    owed: u64,
    /// The socket may have bytes.
    pub(super) readable: bool,
    pub(super) hang_up: bool,
    /// The socket is full; a writability event is on its way.
    pub(super) is_blocked: bool,
}

impl Wire {
    /// `leftover`: bytes that were received with the greeting.
    pub(super) fn new(stream: Stream, leftover: &[u8]) -> Wire {
        Wire {
            stream,
            inbox: leftover.to_vec(),
            start: 0,
            end: leftover.len(),
            outbox: Vec::new(),
            sent: 0,
            messages: 0,
            held: VecDeque::new(),
            credit: CREDIT_BYTES,
            owed: 0,
            readable: true,
            hang_up: false,
            is_blocked: false,
        }
    }

    // -- sending

    /// Appends a message whose body is `parts` one after the other.
    pub(super) fn push(&mut self, header: &Header, parts: &[&[u8]]) {
        debug_assert_eq!(
            header.body_bytes as usize,
            parts.iter().map(|part| part.len()).sum::<usize>()
        );
        let takes = if header.kind == Kind::Write {
            u64::from(header.body_bytes)
        } else {
            0
        };
        // A sign of life overtakes what waits for credit; everything else keeps its order.
        let overtakes = header.kind == Kind::Heartbeat;
        if !overtakes && (!self.held.is_empty() || takes > self.credit) {
            let mut message = Vec::with_capacity(HEADER_BYTES + header.body_bytes as usize);
            message.extend_from_slice(&header.encode());
            parts
                .iter()
                .for_each(|part| message.extend_from_slice(part));
            self.held.push_back((takes, message));
            return;
        }
        self.credit -= takes;
        self.messages = self.messages.saturating_add(1);
        self.outbox.extend_from_slice(&header.encode());
        for part in parts {
            self.outbox.extend_from_slice(part);
        }
    }

    /// The peer gave credit back.
    pub(super) fn granted(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_add(bytes).min(CREDIT_BYTES);
        while let Some((takes, _)) = self.held.front() {
            if *takes > self.credit {
                break;
            }
            if let Some((takes, message)) = self.held.pop_front() {
                self.credit -= takes;
                self.messages = self.messages.saturating_add(1);
                self.outbox.extend_from_slice(&message);
            }
        }
    }

    /// A write of the peer was executed: its bytes may be used again.
    pub(super) fn owe(&mut self, bytes: u64) {
        self.owed += bytes;
        if self.owed >= GRANT_BYTES {
            let mut header = Header::new(Kind::Credit);
            header.op = std::mem::take(&mut self.owed);
            self.push(&header, &[]);
        }
    }

    /// Whether there is something to send and the socket may take it.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.is_blocked && (self.sent < self.outbox.len() || self.stream.has_unsent())
    }

    /// Messages that are to be sent, and their bytes.
    pub(super) fn to_send(&self) -> (u32, usize) {
        (self.messages, self.outbox.len())
    }

    /// Sends as much as the socket takes. True: it is full.
    pub(super) fn send(&mut self) -> Result<bool, LinkError> {
        while self.sent < self.outbox.len() || self.stream.has_unsent() {
            let left = &self.outbox[self.sent..];
            let piece = [libc::iovec {
                iov_base: left.as_ptr().cast_mut().cast(),
                iov_len: left.len(),
            }];
            // SAFETY: the piece is the outbox, which nothing changes during the call.
            let taken = unsafe { self.stream.send(&piece)? };
            self.sent += taken.bytes;
            if taken.blocked {
                self.is_blocked = true;
                break;
            }
        }
        if self.sent == self.outbox.len() {
            self.outbox.clear();
            self.sent = 0;
            self.messages = 0;
            if self.outbox.capacity() > KEEP_BYTES {
                self.outbox = Vec::new();
            }
        } else if self.sent > KEEP_BYTES {
            self.outbox.drain(..self.sent);
            self.sent = 0;
        }
        Ok(self.is_blocked)
    }

    // -- receiving

    /// The next whole message: its header, and its body as a range of [`Wire::body`]. `None`: receive more first.
    pub(super) fn next(&mut self) -> Result<Option<(Header, std::ops::Range<usize>)>, LinkError> {
        let Some(bytes) = self.inbox[self.start..self.end].first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(bytes)?;
        let from = self.start + HEADER_BYTES;
        let until = from + header.body_bytes as usize;
        if until > self.end {
            return Ok(None);
        }
        self.start = until;
        Ok(Some((header, from..until)))
    }

    /// The body of the message that came last.
    pub(super) fn body(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.inbox[range]
    }

    /// Receives once. False: the socket is empty for now.
    pub(super) fn receive(&mut self) -> Result<bool, LinkError> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.inbox.len() - self.end < RECEIVE_BYTES {
            self.inbox.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.inbox.len() - self.end < RECEIVE_BYTES {
            self.inbox.resize(self.end + RECEIVE_BYTES, 0);
        }
        let room = &mut self.inbox[self.end..];
        let offered = room.len();
        let mut pieces = [libc::iovec {
            iov_base: room.as_mut_ptr().cast(),
            iov_len: offered,
        }];
        // SAFETY: the piece is the unused end of the inbox.
        match unsafe { self.stream.receive(&mut pieces) } {
            Ok(0) => Err(LinkError::Closed),
            Ok(count) => {
                self.end += count;
                if count < offered && !self.hang_up && !self.stream.has_ended() {
                    self.readable = false;
                }
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// An idle link holds no memory.
    pub(super) fn rest(&mut self) {
        if self.start == self.end && self.inbox.capacity() > 0 {
            self.inbox = Vec::new();
            self.start = 0;
            self.end = 0;
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkPeer {
    /// The daemon, as its certificate names it.
    pub node: NodeId,
    /// The store the link leads to: the peer's, or one of this thread.
    pub store: StoreId,
    /// For logs.
    pub address: String,
}
