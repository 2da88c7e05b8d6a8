//! What is known of a volume, and of the nodes it needs, at one moment.

use crate::records::VolumeRecord;
use crate::replication::wire::Status;
use crate::replication::{HeadStatus, PhaseName};
use crate::units::{Epoch, NodeId, StoreId};

/// Everything that an explanation is built on.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Milliseconds since 1970-01-01 UTC.
    pub now_unix_ms: u64,
    /// The volume's record.
    pub record: VolumeRecord,
    /// Why the record could not be read just now; then it is as it was seen last.
    pub metadata_error: Option<String>,
    /// Every node that the record names; of a single node, itself.
    pub nodes: Vec<NodeFact>,
    /// Nodes that have dropped what they had of a volume that is being deleted.
    pub dropped: Vec<NodeId>,
}

/// What a node is to its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A daemon on its own.
    Alone,
    /// One of the cluster.
    Member,
    /// Shut out for ever.
    Removed,
    /// No record of it.
    Unknown,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeFact {
    /// Which.
    pub id: NodeId,
    /// Where its admin interface is, if it told.
    pub address: Option<String>,
    /// What it is to the cluster.
    pub standing: Standing,
    /// When it last told the room of its stores, by its own clock.
    pub told_at_unix_ms: Option<u64>,
    /// What it answered, or why it did not.
    pub report: Result<NodeReport, String>,
}

/// What a daemon says of itself, as far as a volume needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// Its open stores.
    pub stores: Vec<StoreFact>,
    /// The volume there.
    pub volume: VolumeFact,
}

/// A store that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreFact {
    /// Which.
    pub id: StoreId,
    /// Where it is.
    pub path: String,
    /// What is wrong with it.
    pub trouble: Option<StoreTrouble>,
}

/// What can be wrong with a store that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreTrouble {
    /// A write or a sync failed; it changes nothing more.
    Poisoned {
        /// What the device said.
        reason: String,
    },
    /// It has no room for new blocks.
    Full,
}

/// A volume at a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeFact {
    /// Clients can reach it there.
    pub is_served: bool,
    /// Why not.
    pub unserved_reason: String,
    /// Its head, if it is there and the volume has replica sets.
    pub head: Option<HeadFact>,
    /// Open connections of clients.
    pub connections: u32,
    /// Requests taken and not answered.
    pub requests: u32,
}

/// A head, as its daemon tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadFact {
    /// Where it is on its way.
    pub phase: PhaseName,
    /// Its epoch.
    pub epoch: Epoch,
    /// Changes sent and not answered.
    pub writes_in_flight: u64,
    /// How long the oldest of them has waited.
    pub oldest_write_ms: u64,
    /// How long a change of the record has been awaited; `None`: none is.
    pub swapping_ms: Option<u64>,
    /// The stores that have copies, as the head finds them.
    pub copies: Vec<CopyFact>,
}

/// A store with copies, as a head finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyFact {
    /// Its daemon.
    pub node: NodeId,
    /// Which store.
    pub store: StoreId,
    /// A link to it is up.
    pub is_linked: bool,
    /// How long it has taken no work of this head; `None`: it takes work.
    pub away_ms: Option<u64>,
    /// How it failed last, when it said so itself.
    pub failure: Option<Status>,
    /// It lacks writes that it had answered.
    pub is_lost: bool,
    /// It is being brought up to date.
    pub filling: Option<Filling>,
}

/// How far a copy that is being brought up to date is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filling {
    /// Blocks copied.
    pub copied_blocks: u64,
    /// Leaves known to be left; more may be found.
    pub leaves_left: u64,
    /// Only its flush and the record are awaited.
    pub is_finishing: bool,
}

impl HeadFact {
    /// What a head says of itself, in the form that other daemons are told.
    pub fn of(status: &HeadStatus) -> HeadFact {
        let copies = status.members.iter().enumerate().map(|(at, member)| {
            let mut resyncs = status.resyncs.iter();
            let filling = resyncs.find(|resync| usize::from(resync.member.0) == at);
            CopyFact {
                node: member.place.node,
                store: member.place.store,
                is_linked: member.is_linked,
                away_ms: member.away_us.map(|us| us / 1000),
                failure: member.failure,
                is_lost: member.is_lost,
                filling: filling.map(|resync| Filling {
                    copied_blocks: resync.copied_blocks,
                    leaves_left: resync.leaves_left,
                    is_finishing: resync.is_finishing,
                }),
            }
        });
        HeadFact {
            phase: status.phase,
            epoch: status.epoch,
            writes_in_flight: status.writes_in_flight as u64,
            oldest_write_ms: status.oldest_write_us / 1000,
            swapping_ms: status.is_swapping.then_some(status.swapping_us / 1000),
            copies: copies.collect(),
        }
    }

    /// What it says of one store.
    pub fn copy(&self, store: StoreId) -> Option<&CopyFact> {
        self.copies.iter().find(|copy| copy.store == store)
    }
}

impl Facts {
    /// What is known of a node.
    pub fn node(&self, id: NodeId) -> Option<&NodeFact> {
        self.nodes.iter().find(|node| node.id == id)
    }
}
