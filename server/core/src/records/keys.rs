//! The keys of the metadata store.

use super::{ClientNodeId, SetIndex, VolumeName};
use crate::units::{NodeId, StoreId, VolumeId};

/// Every [`VolumeRecord`](super::VolumeRecord) has this prefix.
pub const VOLUMES: &str = "volumes/";
/// Every [`NameRecord`](super::NameRecord) has this prefix.
pub const NAMES: &str = "names/";
/// Every [`StoreRecord`](super::StoreRecord) has this prefix.
pub const STORES: &str = "stores/";
/// Every [`ScrubRecord`](super::ScrubRecord) has this prefix.
pub const SCRUBS: &str = "scrubs/";
/// Every [`AnnotationsRecord`](super::AnnotationsRecord) has this prefix.
pub const ANNOTATIONS: &str = "annotations/";
/// Every [`ClientNodeRecord`](super::ClientNodeRecord) has this prefix.
pub const CLIENT_NODES: &str = "client-nodes/";
/// Every [`LinkRecord`](super::LinkRecord) has this prefix.
pub const LINKS: &str = "links/";
/// Every [`SpaceRecord`](super::SpaceRecord) has this prefix.
pub const SPACES: &str = "spaces/";
/// Every [`LeftoverRecord`](super::LeftoverRecord) has this prefix.
pub const LEFTOVERS: &str = "leftovers/";
/// The [`LeaderRecord`](super::LeaderRecord).
pub const LEADER: &str = "controller/leader";
/// The [`LayerCounter`](super::LayerCounter).
pub const NEXT_LAYER: &str = "layers/next";
/// The [`NodeRecord`](super::NodeRecord) of a single node.
pub const NODE: &str = "node";
/// The [`ClusterRecord`](super::ClusterRecord).
pub const CLUSTER: &str = "cluster";
/// The [`MembershipRecord`](super::MembershipRecord), which a node keeps for itself.
pub const MEMBERSHIP: &str = "membership";
/// Every [`MemberRecord`](super::MemberRecord) has this prefix.
pub const MEMBERS: &str = "nodes/";
/// Every [`TokenRecord`](super::TokenRecord) has this prefix.
pub const TOKENS: &str = "tokens/";
/// Every [`ClientRecord`](super::ClientRecord) has this prefix.
pub const CLIENTS: &str = "clients/";

/// The key of a volume's record.
pub fn volume(id: VolumeId) -> String {
    format!("{VOLUMES}{}", id.0)
}

/// The key that holds a name for one volume.
pub fn name(name: &VolumeName) -> String {
    format!("{NAMES}{name}")
}

/// Node `node` has dropped what it had of a volume that is being deleted.
pub fn dropped(volume: VolumeId, node: NodeId) -> String {
    format!("dropped/{}/{}", volume.0, node.0)
}

/// Every [`dropped`] of a volume has this prefix.
pub fn dropped_by(volume: VolumeId) -> String {
    format!("dropped/{}/", volume.0)
}

/// What a store is left with of a set of a volume.
pub fn leftover(volume: VolumeId, set: SetIndex, store: StoreId) -> String {
    format!("{LEFTOVERS}{}/{}/{}", volume.0, set.0, store.0)
}

/// Where a daemon's links are.
pub fn link(id: NodeId) -> String {
    format!("{LINKS}{}", id.0)
}

/// The room of a store.
pub fn space(id: StoreId) -> String {
    format!("{SPACES}{}", id.0)
}

/// The key of a store's record.
pub fn store(id: StoreId) -> String {
    format!("{STORES}{}", id.0)
}

/// The key of a volume's annotations.
pub fn annotations(id: VolumeId) -> String {
    format!("{ANNOTATIONS}{}", id.0)
}

/// The key of a client node's record.
pub fn client_node(id: &ClientNodeId) -> String {
    format!("{CLIENT_NODES}{id}")
}

/// The key of a cluster's node.
pub fn member(id: NodeId) -> String {
    format!("{MEMBERS}{}", id.0)
}

/// The key of a join token, by the SHA-256 of its secret in hexadecimal digits.
pub fn token(sha256: &str) -> String {
    format!("{TOKENS}{sha256}")
}

/// The key of a client's certificate.
pub fn client(name: &str) -> String {
    format!("{CLIENTS}{name}")
}

/// The key of what the last scrub of a store found.
pub fn scrub(id: StoreId) -> String {
    format!("{SCRUBS}{}", id.0)
}
