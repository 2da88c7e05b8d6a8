//! One client in transmission.

use std::time::Instant;

use ashlar_core::nbd::session::Session;

use super::outbox::Outbox;
use super::receiver::Receiver;
use crate::engine::WatchId;
use crate::nbd::ConnectionSlot;
use crate::stream::Stream;

/// Names a connection from an operation that may outlive it: the key may have been given to another one since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionRef {
    pub(super) key: u32,
    pub(super) serial: u64,
}

/// How far a connection is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Open,
    /// No more requests are taken; it closes when everything taken has been answered and sent.
    Leaving,
    /// Nothing more can be received or sent; it is removed at the end of the turn.
    Dead,
}

pub(super) struct Connection {
    pub(super) stream: Stream,
    pub(super) watch: WatchId,
    pub(super) serial: u64,
    /// Key of its volume.
    pub(super) volume: usize,
    pub(super) session: Session,
    pub(super) peer: String,
    pub(super) receiver: Receiver,
    pub(super) outbox: Outbox,
    pub(super) phase: Phase,
    pub(super) connected_at: std::time::SystemTime,
    /// Requests answered.
    pub(super) requests: u64,
    /// Payload of reads answered.
    pub(super) read_bytes: u64,
    /// Payload of writes answered.
    pub(super) written_bytes: u64,
    /// Requests taken and not answered.
    pub(super) in_flight: u32,
    /// Capacity of the payload and reply buffers held for it.
    pub(super) held_bytes: usize,
    /// The socket may have bytes: since the last "would block" it has been reported readable.
    pub(super) readable: bool,
    /// The peer has closed: read to the end although the last read was a full one.
    pub(super) hang_up: bool,
    /// It stands in the list of connections to serve.
    pub(super) is_ready: bool,
    /// It stands in the list of connections with something to send.
    pub(super) is_dirty: bool,
    /// It stands in the list of connections that wait for something to be given back.
    pub(super) is_paused: bool,
    /// The socket is full; a writability event is on its way.
    pub(super) is_blocked: bool,
    /// The client was idle with the beginning of a request in the receive buffer at the last sweep.
    pub(super) was_idle: bool,
    /// It keeps its receive buffer between turns, and is counted for that.
    pub(super) keeps_buffer: bool,
    /// When bytes last moved in either direction.
    pub(super) moved_at: Instant,
    /// Ends the connection when the holder of its certificate is shut out.
    pub(super) _certified: Option<crate::identity::Session>,
    /// Its place under the daemon's connection limit.
    pub(super) _slot: ConnectionSlot,
}

impl Connection {
    /// It makes the daemon hold memory and waits for its client: for the rest of a payload, or for replies to be read.
    pub(super) fn waits_for_client(&self) -> bool {
        self.receiver.is_mid_payload() || !self.all_sent()
    }

    /// Everything taken has been answered and sent.
    pub(super) fn is_settled(&self) -> bool {
        self.in_flight == 0 && self.all_sent()
    }

    /// The socket has taken every answer.
    pub(super) fn all_sent(&self) -> bool {
        self.outbox.is_empty() && !self.stream.has_unsent()
    }
}
