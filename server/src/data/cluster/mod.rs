//! Replication on a data thread: carries out what the machines of `ashlar_core::replication` decide.
//!
//! A data thread has heads of volumes it serves, and replicas of volumes that are served anywhere, itself included.
//! Heads reach replicas of other daemons over links and those of this thread's stores by a call; either way a piece of
//! work is handed over with an [`Origin`], and its answer goes back there.
//!
//! - `link`: the bytes of a connection to a peer; `links`: all of them, signs of life; `outgoing`: the end where heads
//!   are; `incoming`: the end where the store is
//! - `replica`: acceptors, and work at this thread's stores
//! - `head`: what the heads ask for; `copies`: blocks that a head has copied; `leftovers`: what is given back of sets
//!   that went elsewhere
//! - `requests`: what clients ask of a replicated volume; `reads`: the reads among it

mod copies;
mod head;
mod incoming;
mod leftovers;
mod link;
mod links;
mod opening;
mod outgoing;
mod reads;
mod replica;
mod requests;
mod tells;

use std::collections::{HashMap, VecDeque};

use ashlar_core::replication::wire::{LeafStates, Rows, Status};
use ashlar_core::replication::{Action, BootId, CopyId, MemberId, OpKey, QueryId, Seal};
use ashlar_core::units::{StoreId, VolumeId};
use slab::Slab;

pub(super) use head::Replication;
pub use link::LinkPeer;
pub use links::greeting;
pub(super) use links::{Link, LinkRef};
pub(super) use opening::ClusterCommand;
pub use opening::ReplicatedSpec;
pub(super) use replica::{Replica, ReplicaOperation};
pub(super) use requests::Replicated;
pub use tells::{ClusterTell, FillStatus, LinkWish, ReplicaStatus, ReplicationStatus};

use super::pool::Buffer;

/// Which tokens of the engine are links; connections of clients have the others.
pub(super) const LINK_TOKEN: u32 = 1 << 31;

/// A volume that is served, named so that an answer that comes late finds it or nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct VolumeRef {
    pub(super) key: usize,
    pub(super) serial: u64,
}

/// What a head of this thread asked of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Change {
        op: OpKey,
        place: u8,
    },
    Flush {
        op: OpKey,
        member: MemberId,
    },
    /// Piece of a client's request in the table of operations.
    Read {
        key: usize,
        serial: u64,
        piece: u32,
    },
    Query(QueryId),
    Rows(QueryId),
    Leaf(QueryId),
    CopyRead(CopyId),
    CopyWrite {
        copy: CopyId,
        member: MemberId,
    },
}

/// Who gets the answer to a piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A head of this thread, on the session with this tag.
    Head {
        volume: VolumeRef,
        tag: u32,
        asked: Asked,
    },
    /// A head at the other end of a link.
    Peer {
        link: LinkRef,
        tag: u32,
        op: u64,
        credit_bytes: u32,
    },
}

/// What came of a piece of work.
pub(super) enum Answer {
    Status(Status),
    /// Blocks that were read; `None`: all of them are zeros.
    Data {
        count: u32,
        buffer: Option<Buffer>,
    },
    Rows(Rows),
    Leaf(LeafStates),
}

/// Both ends of a link whose greetings are over.
#[derive(Debug)]
pub struct LinkEnds {
    /// Who is at the other end, and which store the link leads to.
    pub peer: LinkPeer,
    /// The connection.
    pub stream: crate::stream::Stream,
    /// Bytes that came behind the greeting.
    pub leftover: Vec<u8>,
    /// Ends the connection when its peer is shut out of the cluster.
    pub session: Option<crate::identity::Session>,
}

/// What a data thread keeps for replication. All of it is empty on a daemon of its own.
pub(super) struct Cluster {
    pub(super) boot: BootId,
    /// As they were found at the start, until an acceptor takes them.
    pub(super) seals: HashMap<(VolumeId, StoreId), Seal>,
    pub(super) links: Slab<Link>,
    pub(super) next_link: u64,
    pub(super) next_tag: u32,
    pub(super) next_serial: u64,
    pub(super) replicas: Slab<Replica>,
    pub(super) replica_keys: HashMap<(VolumeId, usize), usize>,
    /// What heads want done, in order.
    pub(super) actions: VecDeque<(VolumeRef, Action)>,
    pub(super) scratch: Vec<Action>,
    /// Links with something to send or to read.
    pub(super) busy_links: Vec<usize>,
    /// Calls that sent on a link, for the loop to compare.
    pub(super) link_sends: u64,
    /// Calls that received something from a link.
    pub(super) link_receives: u64,
    /// When heads and links are looked at next, microseconds of [`now_us`].
    pub(super) next_look_us: Option<u64>,
    /// When a head goes on with a fill that waits for its pace, on the same clock.
    pub(super) fills_due_us: Option<u64>,
    pub(super) tell: tokio::sync::mpsc::UnboundedSender<ClusterTell>,
    pub(super) lease_us: u64,
    /// See [`super::config::DataConfig::fill_bytes_per_second`].
    pub(super) fill_bytes_per_second: u64,
}

impl Cluster {
    pub(super) fn new(
        boot: BootId,
        seals: HashMap<(VolumeId, StoreId), Seal>,
        tell: tokio::sync::mpsc::UnboundedSender<ClusterTell>,
        lease_us: u64,
        fill_bytes_per_second: u64,
    ) -> Cluster {
        Cluster {
            boot,
            seals,
            links: Slab::new(),
            next_link: 1,
            next_tag: 1,
            next_serial: 1,
            replicas: Slab::new(),
            replica_keys: HashMap::new(),
            actions: VecDeque::new(),
            scratch: Vec::new(),
            busy_links: Vec::new(),
            link_sends: 0,
            link_receives: 0,
            next_look_us: None,
            fills_due_us: None,
            tell,
            lease_us,
            fill_bytes_per_second,
        }
    }

    pub(super) fn tag(&mut self) -> u32 {
        let tag = self.next_tag;
        self.next_tag = self.next_tag.wrapping_add(1).max(1);
        tag
    }

    pub(super) fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    /// Nobody listening is no error: the daemon stops.
    pub(super) fn tell(&self, what: ClusterTell) {
        let _ = self.tell.send(what);
    }

    /// Something is to be looked at in a lease's eighth at the latest.
    pub(super) fn look_soon(&mut self, now_us: u64) {
        self.look_at(now_us + self.lease_us / 8);
    }

    /// A head goes on with a fill then.
    fn fill_at(&mut self, at_us: u64) {
        self.fills_due_us = Some(self.fills_due_us.map_or(at_us, |next| next.min(at_us)));
    }

    /// When there is something to do though nothing happens.
    pub(super) fn deadline_us(&self) -> Option<u64> {
        self.next_look_us.into_iter().chain(self.fills_due_us).min()
    }

    /// Something is to be looked at then.
    pub(super) fn look_at(&mut self, at_us: u64) {
        self.next_look_us = Some(self.next_look_us.map_or(at_us, |next| next.min(at_us)));
    }
}

/// A clock that goes on while the machine sleeps: what was promised to hold for a time must not outlive it.
pub(super) fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}
