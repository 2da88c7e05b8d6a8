//! Where new volumes go, and in how many copies.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_core::placement::{ClusterStore, room_for, spread};
use ashlar_core::records::{
    COPIES_MAX, MemberRecord, MemberState, Placement, Replica, ReplicaSet, SpaceRecord,
    VolumeRecord, VolumeState, keys,
};
use ashlar_core::units::{CHUNK_BYTES, NodeId, VolumeId};

use super::{VolumeError, Volumes, lock, unix_ms};
use crate::meta;

/// Copies of a new volume, where there are as many nodes and nobody said otherwise.
const REPLICAS_BY_DEFAULT: usize = 3;

/// What the stores of a cluster can hold, and what is promised of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterRoom {
    /// Copies of each block that a new volume would have.
    pub copies: u32,
    /// Blocks of the stores, copies counted one by one.
    pub capacity_blocks: u64,
    /// Of those, the ones that can still be written.
    pub free_blocks: u64,
    /// Blocks that new volumes of so many copies can take: no node takes two copies of a block.
    pub fitting_blocks: u64,
    /// Bytes of all volumes, each counted as often as it has copies.
    pub promised_bytes: u64,
}

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
        let (zones, spaces) = self.usable_spaces().await?;
        let stores = spaces.into_iter().map(|space| ClusterStore {
            id: space.store,
            node: space.node,
            zone: zones.get(&space.node).cloned(),
            free_blocks: space.free_blocks,
        });
        let stores: Vec<ClusterStore> = stores.collect();
        let chunks = size_bytes.div_ceil(CHUNK_BYTES);
        let nodes: BTreeSet<NodeId> = stores.iter().map(|store| store.node).collect();
        let replicas = copies(replicas, nodes.len())?;
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

    /// What the stores of all nodes can hold, for volumes with so many copies (0: as many as they get by default).
    /// `None`: this daemon is on its own.
    pub(crate) async fn cluster_room(
        &self,
        replicas: u32,
    ) -> Result<Option<ClusterRoom>, VolumeError> {
        if !self.is_shared {
            return Ok(None);
        }
        let (_, spaces) = self.usable_spaces().await?;
        let mut nodes: BTreeMap<NodeId, u64> = BTreeMap::new();
        for space in &spaces {
            *nodes.entry(space.node).or_default() += space.free_blocks;
        }
        let copies = copies(replicas, nodes.len())?;
        let free: Vec<u64> = nodes.into_values().collect();
        // Those of other nodes that have one copy are not in the catalog.
        let volumes = meta::list::<VolumeRecord>(&*self.store, keys::VOLUMES).await?;
        // What is being deleted is promised to nobody any more.
        let promised = volumes
            .iter()
            .map(|volume| &volume.record)
            .filter(|record| record.state == VolumeState::Active)
            .fold(0u64, |sum, record| {
                let copies = u64::from(record.replicas.max(1));
                sum.saturating_add(record.size_bytes.saturating_mul(copies))
            });
        Ok(Some(ClusterRoom {
            copies,
            capacity_blocks: spaces.iter().map(|space| space.capacity_blocks).sum(),
            free_blocks: spaces.iter().map(|space| space.free_blocks).sum(),
            fitting_blocks: room_for(&free, copies),
            promised_bytes: promised,
        }))
    }

    /// The stores that new copies may go to, and the zones of nodes.
    async fn usable_spaces(
        &self,
    ) -> Result<(BTreeMap<NodeId, String>, Vec<SpaceRecord>), VolumeError> {
        let now = unix_ms();
        let (zones, not_fit) = self.zones().await?;
        let heard = lock(&self.heard).clone();
        let spaces = meta::list::<SpaceRecord>(&*self.store, keys::SPACES).await?;
        let spaces = spaces.into_iter().map(|space| space.record);
        let usable = spaces.filter(|space| {
            // What was seen to change counts; clocks of nodes are compared only where nothing was seen yet.
            let is_alive = heard
                .get(&space.node)
                .copied()
                .unwrap_or(space.at_unix_ms + SPACE_IS_FRESH_MS >= now);
            is_alive && !not_fit.contains(&space.node)
        });
        Ok((zones, usable.collect()))
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

/// How many copies a new volume gets where there are so many nodes.
fn copies(asked: u32, nodes: usize) -> Result<u32, VolumeError> {
    match asked {
        0 => Ok(nodes.clamp(1, REPLICAS_BY_DEFAULT) as u32),
        asked if asked > COPIES_MAX => Err(VolumeError::TooManyCopies { asked }),
        asked => Ok(asked),
    }
}
