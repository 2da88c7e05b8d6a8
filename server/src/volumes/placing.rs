//! Where new volumes go, and in how many copies.

use std::collections::BTreeMap;

use ashlar_core::placement::{ClusterStore, spread};
use ashlar_core::records::{
    COPIES_MAX, MemberRecord, MemberState, Placement, Replica, ReplicaSet, SpaceRecord, keys,
};
use ashlar_core::units::{CHUNK_BYTES, NodeId, VolumeId};

use super::{VolumeError, Volumes, lock, unix_ms};
use crate::meta;

/// Copies of a new volume, where there are as many nodes and nobody said otherwise.
const REPLICAS_BY_DEFAULT: usize = 3;

/// Room that was told longer ago than this is not relied on: its daemon is probably gone.
const SPACE_IS_FRESH_MS: u64 = 60_000;

impl Volumes {
    /// Where a new volume goes, and in how many copies; the id decides where in the deal of a single node it begins.
    pub(super) async fn place(
        &self,
        id: VolumeId,
        size_bytes: u64,
        replicas: u32,
    ) -> Result<(u32, Placement), VolumeError> {
        if self.is_shared {
            return self.place_replicas(size_bytes, replicas).await;
        }
        if replicas > 1 {
            return Err(VolumeError::NoCluster { replicas });
        }
        let groups = self.host.store_groups().await;
        let all = self.catalog().all();
        let records = all.iter().map(|entry| &entry.current.record);
        let placement = Placement::choose(&groups, records, id.0.as_u128() as u64);
        Ok((1, placement))
    }

    /// Replica sets for a new volume of this cluster.
    async fn place_replicas(
        &self,
        size_bytes: u64,
        replicas: u32,
    ) -> Result<(u32, Placement), VolumeError> {
        let now = unix_ms();
        let (zones, draining) = self.zones().await?;
        let heard = lock(&self.heard).clone();
        let mut stores = Vec::new();
        for space in meta::list::<SpaceRecord>(&*self.store, keys::SPACES).await? {
            let space = space.record;
            // What was seen to change counts; clocks of nodes are compared only where nothing was seen yet.
            let is_alive = heard
                .get(&space.node)
                .copied()
                .unwrap_or(space.at_unix_ms + SPACE_IS_FRESH_MS >= now);
            if is_alive && !draining.contains(&space.node) {
                stores.push(ClusterStore {
                    id: space.store,
                    node: space.node,
                    zone: None,
                    free_blocks: space.free_blocks,
                });
            }
        }
        for store in &mut stores {
            store.zone = zones.get(&store.node).cloned();
        }
        let chunks = size_bytes.div_ceil(CHUNK_BYTES);
        let mut nodes: Vec<NodeId> = stores.iter().map(|store| store.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let replicas = match replicas {
            0 => nodes.len().clamp(1, REPLICAS_BY_DEFAULT) as u32,
            asked if asked > COPIES_MAX => return Err(VolumeError::TooManyCopies { asked }),
            asked => asked,
        };
        let sets = spread(&stores, replicas as usize, chunks, self.head.node)?;
        let replica = |at: &usize| Replica::in_sync(stores[*at].node, stores[*at].id);
        let sets = sets.iter().map(|set| ReplicaSet {
            replicas: set.iter().map(replica).collect(),
        });
        let placement = Placement {
            stores: Vec::new(),
            sets: sets.collect(),
        };
        Ok((replicas, placement))
    }

    /// What fails together with each node, and which nodes get nothing new.
    async fn zones(&self) -> Result<(BTreeMap<NodeId, String>, Vec<NodeId>), VolumeError> {
        let (mut zones, mut not_fit) = (BTreeMap::new(), Vec::new());
        for member in meta::list::<MemberRecord>(&*self.store, keys::MEMBERS).await? {
            let member = member.record;
            if let Some(zone) = member.labels.get("zone") {
                zones.insert(member.id, zone.clone());
            }
            if member.draining || member.state == MemberState::Removed {
                not_fit.push(member.id);
            }
        }
        Ok((zones, not_fit))
    }

    /// Which nodes are alive, as far as watching them shows.
    pub(crate) fn set_heard(&self, heard: BTreeMap<NodeId, bool>) {
        *lock(&self.heard) = heard;
    }
}
