//! What the data threads ask of the control plane for replicated volumes, and what they tell it.

use ashlar_core::records::{SetIndex, Transaction};
use ashlar_core::replication::{HeadStatus, News, Seal, StopReason};
use ashlar_core::units::{Epoch, NodeId, StoreId, VolumeId};
use uuid::Uuid;

/// Asked or told by a data thread.
#[derive(Debug)]
pub enum ClusterTell {
    /// Read the volume's record from the metadata store until that succeeds; answer by
    /// [`super::super::DataPlane::record_read`].
    ReadRecord {
        /// Which.
        volume: VolumeId,
    },
    /// Carry the transaction out once; answer by [`super::super::DataPlane::swapped`].
    Swap {
        /// Of which volume.
        volume: VolumeId,
        /// Comes back.
        serial: u64,
        /// What to do.
        transaction: Transaction,
    },
    /// Whether a link is wanted.
    Link(LinkWish),
    /// Make the seal durable in the node's own database; answer by [`super::super::DataPlane::persisted`].
    Persist {
        /// Of which volume.
        volume: VolumeId,
        /// At which store.
        store: StoreId,
        /// Comes back.
        serial: u64,
        /// What to keep.
        seal: Seal,
    },
    /// The volume is served from now on.
    Serving {
        /// Which.
        volume: VolumeId,
        /// Of the head's claim.
        incarnation: Uuid,
        /// Its clients are of this generation.
        client_generation: u64,
    },
    /// Acknowledged writes may be gone because every copy lost power; its clients were sent away.
    SessionsEnded {
        /// Which.
        volume: VolumeId,
        /// Clients of smaller generations must not come back unknowing.
        client_generation: u64,
    },
    /// The head is at its end.
    Stopped {
        /// Which volume.
        volume: VolumeId,
        /// Of its claim.
        incarnation: Uuid,
        /// Why.
        reason: StopReason,
    },
    /// For people and counters.
    News {
        /// Which volume.
        volume: VolumeId,
        /// The node that the news is about.
        node: Option<NodeId>,
        /// What.
        news: News,
    },
}

/// A link from one data thread to one store of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkWish {
    /// The thread.
    pub thread: usize,
    /// The peer.
    pub node: NodeId,
    /// Its store.
    pub store: StoreId,
    /// Wanted, until this is said with `false`.
    pub is_wanted: bool,
}

/// A replicated volume as its head sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicationStatus {
    /// Its epoch.
    pub epoch: Epoch,
    /// Clients are served.
    pub is_serving: bool,
    /// Every replica of every set.
    pub replicas: Vec<ReplicaStatus>,
    /// What the head says of itself.
    pub head: HeadStatus,
    /// Those that are being filled, or brought up to date.
    pub fills: Vec<FillStatus>,
}

/// How far a replica is that is being filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillStatus {
    /// Of which set.
    pub set: SetIndex,
    /// In which store.
    pub store: StoreId,
    /// Copied so far.
    pub copied_bytes: u64,
    /// Yet to be compared; what differs of it is copied.
    pub left_bytes: u64,
}

/// One replica of one set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Of which set.
    pub set: SetIndex,
    /// Where.
    pub node: NodeId,
    /// Where exactly.
    pub store: StoreId,
    /// Holds every acknowledged write.
    pub is_in_sync: bool,
    /// A link to it is up.
    pub is_linked: bool,
}
