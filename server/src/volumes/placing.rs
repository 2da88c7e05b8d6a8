//! Where new volumes go, and in how many copies.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_core::placement::{ClusterStore, TooFewNodes, promised, room_for, spread};
use ashlar_core::records::{
    COPIES_MAX, ConfigureError, MemberRecord, MemberState, Placement, Replica, ReplicaSet,
    SpaceRecord, VolumeRecord, VolumeState, ZONE_LABEL, Zones, ZonesError, keys,
};
use ashlar_core::units::{CHUNK_BYTES, NodeId, StoreId, VolumeId};

use super::{VolumeError, VolumeSettings, Volumes, lock, unix_ms};
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
    /// Bytes of all volumes, each counted as often as it has copies there.
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
        settings: &VolumeSettings,
    ) -> Result<(u32, Placement), VolumeError> {
        let (replicas, zones) = (settings.replicas, &settings.zones);
        if self.is_shared {
            return self.place_replicas(size_bytes, replicas, zones).await;
        }
        if replicas > 1 {
            return Err(VolumeError::NoCluster { replicas });
        }
        if !zones.are_all() {
            return Err(ZonesError::NoCluster.into());
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
        zones: &Zones,
    ) -> Result<(u32, Placement), VolumeError> {
        let stores = self.usable_stores(zones).await?;
        let stores = stores.into_iter().map(|(space, zone)| ClusterStore {
            id: space.store,
            node: space.node,
            zone,
            free_blocks: space.free_blocks,
        });
        let stores: Vec<ClusterStore> = stores.collect();
        let chunks = size_bytes.div_ceil(CHUNK_BYTES);
        let nodes: BTreeSet<NodeId> = stores.iter().map(|store| store.node).collect();
        let replicas = copies(replicas, nodes.len())?;
        let sets = spread(&stores, replicas as usize, chunks, self.head.node)
            .map_err(|few| too_few(few, zones))?;
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

    /// Whether a volume can be confined to zones: they have nodes enough, unless it may lie in all of them already.
    pub(crate) async fn check_zones(
        &self,
        zones: &Zones,
        record: &VolumeRecord,
    ) -> Result<(), VolumeError> {
        if zones.include(&record.zones) {
            return Ok(());
        }
        if !self.is_shared {
            return Err(ZonesError::NoCluster.into());
        }
        if !record.placement.is_replicated() {
            let name = record.name.clone();
            return Err(ConfigureError::OneCopy { name }.into());
        }
        let stores = self.usable_stores(zones).await?;
        let with_room = stores.iter().filter(|(space, _)| space.free_blocks > 0);
        let mut nodes: BTreeSet<NodeId> = with_room.map(|(space, _)| space.node).collect();
        // Those that have copies of it need no room, nor to be there at this moment.
        let (labels, not_fit) = self.zones().await?;
        let sets = record.placement.sets.iter().flat_map(|set| &set.replicas);
        nodes.extend(sets.map(|replica| replica.node).filter(|node| {
            let zone = labels.get(node).map(String::as_str);
            zones.allow(zone) && !not_fit.contains(node)
        }));
        let (wanted, nodes) = (record.replicas as usize, nodes.len());
        if nodes < wanted {
            return Err(too_few(TooFewNodes { wanted, nodes }, zones));
        }
        Ok(())
    }

    /// What the stores of the nodes of some zones can hold, for volumes with so many copies (0: as many as they get by
    /// default). `None`: this daemon is on its own.
    pub(crate) async fn cluster_room(
        &self,
        replicas: u32,
        zones: &Zones,
    ) -> Result<Option<ClusterRoom>, VolumeError> {
        if !self.is_shared {
            return Ok(None);
        }
        let stores = self.usable_stores(zones).await?;
        let mut nodes: BTreeMap<NodeId, u64> = BTreeMap::new();
        for (space, _) in &stores {
            *nodes.entry(space.node).or_default() += space.free_blocks;
        }
        let copies = copies(replicas, nodes.len())?;
        let free: Vec<u64> = nodes.into_values().collect();
        // Those of other nodes that have one copy are not in the catalog.
        let volumes = meta::list::<VolumeRecord>(&*self.store, keys::VOLUMES).await?;
        let ids: BTreeSet<StoreId> = stores.iter().map(|(space, _)| space.store).collect();
        // What is being deleted is promised to nobody any more.
        let promised_bytes = volumes
            .iter()
            .map(|volume| &volume.record)
            .filter(|record| record.state == VolumeState::Active)
            .fold(0u64, |sum, record| {
                sum.saturating_add(promised(record, zones, &ids))
            });
        let sum = |blocks: fn(&SpaceRecord) -> u64| stores.iter().map(|(s, _)| blocks(s)).sum();
        Ok(Some(ClusterRoom {
            copies,
            capacity_blocks: sum(|space| space.capacity_blocks),
            free_blocks: sum(|space| space.free_blocks),
            fitting_blocks: room_for(&free, copies),
            promised_bytes,
        }))
    }

    /// The stores that new copies confined to some zones may go to, each with the zone of its node.
    async fn usable_stores(
        &self,
        allowed: &Zones,
    ) -> Result<Vec<(SpaceRecord, Option<String>)>, VolumeError> {
        let now = unix_ms();
        let (zones, not_fit) = self.zones().await?;
        let heard = lock(&self.heard).clone();
        let spaces = meta::list::<SpaceRecord>(&*self.store, keys::SPACES).await?;
        let spaces = spaces.into_iter().map(|space| {
            let zone = zones.get(&space.record.node).cloned();
            (space.record, zone)
        });
        let usable = spaces.filter(|(space, zone)| {
            // What was seen to change counts; clocks of nodes are compared only where nothing was seen yet.
            let is_alive = heard
                .get(&space.node)
                .copied()
                .unwrap_or(space.at_unix_ms + SPACE_IS_FRESH_MS >= now);
            is_alive && !not_fit.contains(&space.node) && allowed.allow(zone.as_deref())
        });
        Ok(usable.collect())
    }

    /// What fails together with each node, and which nodes get nothing new.
    async fn zones(&self) -> Result<(BTreeMap<NodeId, String>, Vec<NodeId>), VolumeError> {
        let (mut zones, mut not_fit) = (BTreeMap::new(), Vec::new());
        for member in meta::list::<MemberRecord>(&*self.store, keys::MEMBERS).await? {
            let member = member.record;
            if let Some(zone) = member.labels.get(ZONE_LABEL) {
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

/// Of all nodes, or of those of some zones.
fn too_few(source: TooFewNodes, zones: &Zones) -> VolumeError {
    if zones.are_all() {
        return source.into();
    }
    VolumeError::TooFewInZones {
        zones: zones.clone(),
        source,
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
