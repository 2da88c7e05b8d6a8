//! One look at the records of a cluster, and what is known from many of them.

use std::collections::BTreeMap;
use std::time::Duration;

use ashlar_core::placement::ClusterStore;
use ashlar_core::records::{
    LeaderRecord, LeftoverRecord, MemberRecord, MemberState, SetIndex, SpaceRecord, Versioned,
    VolumeRecord, ZONE_LABEL, keys,
};
use ashlar_core::replication::controller::{
    ControllerParams, NodeView, StoreView, View, Wanted, wanted_changes,
};
use ashlar_core::replication::sightings::Sightings;
use ashlar_core::units::{NodeId, StoreId, VolumeId};

use super::{NodePicture, Picture};
use crate::meta::{self, MetadataError, MetadataStore};

/// What was read.
pub(super) struct Look {
    pub(super) leader: Option<Versioned<LeaderRecord>>,
    pub(super) members: Vec<Versioned<MemberRecord>>,
    pub(super) spaces: Vec<Versioned<SpaceRecord>>,
    pub(super) leftovers: Vec<LeftoverRecord>,
}

impl Look {
    pub(super) async fn read(records: &dyn MetadataStore) -> Result<Look, MetadataError> {
        let leader = meta::read::<LeaderRecord>(records, keys::LEADER).await?;
        let leftovers = meta::list::<LeftoverRecord>(records, keys::LEFTOVERS).await?;
        Ok(Look {
            leader,
            members: meta::list(records, keys::MEMBERS).await?,
            spaces: meta::list(records, keys::SPACES).await?,
            leftovers: leftovers.into_iter().map(|left| left.record).collect(),
        })
    }

    fn active(&self) -> impl Iterator<Item = &MemberRecord> {
        let members = self.members.iter().map(|member| &member.record);
        members.filter(|member| member.state == MemberState::Active)
    }
}

/// What many looks show: who is alive.
#[derive(Default)]
pub(super) struct Looks {
    nodes: Sightings<NodeId>,
    leader: Sightings<()>,
    last_ms: Option<u64>,
}

impl Looks {
    /// Takes a look in. `every_ms`: how far apart looks are when all is well.
    pub(super) fn note(&mut self, read: &Look, now_ms: u64, every_ms: u64) {
        // When this daemon could not look, or did not run, it could not hear anybody; and when the metadata store was
        // away, nobody could be heard.
        let gap_ms = self.last_ms.map_or(0, |last| now_ms.saturating_sub(last));
        if gap_ms > 3 * every_ms {
            self.nodes.forgive(gap_ms - every_ms);
            self.leader.forgive(gap_ms - every_ms);
        }
        self.last_ms = Some(now_ms);
        for space in &read.spaces {
            self.nodes.note(space.record.node, space.changed_at, now_ms);
        }
        if let Some(leader) = &read.leader {
            self.leader.note((), leader.changed_at, now_ms);
        }
    }

    pub(super) fn leader_is_silent(&self, now_ms: u64, limit_ms: u64) -> bool {
        let seen = self.leader.seen_at_ms(());
        seen.is_some_and(|seen| now_ms.saturating_sub(seen) >= limit_ms)
    }

    fn silent_ms(&self, node: NodeId, now_ms: u64) -> Option<u64> {
        let seen = self.nodes.seen_at_ms(node)?;
        Some(now_ms.saturating_sub(seen))
    }

    /// Of nodes that were heard of more than once: whether they are alive.
    pub(super) fn heard(&self, now_ms: u64, limit_ms: u64) -> BTreeMap<NodeId, bool> {
        let changed = self.nodes.changed();
        changed
            .map(|(node, at_ms)| (node, now_ms.saturating_sub(at_ms) < limit_ms))
            .collect()
    }

    /// The stores that can be used.
    pub(super) fn stores_there(&self, read: &Look, now_ms: u64, limit_ms: u64) -> Vec<StoreId> {
        let usable = |node: NodeId| {
            let is_heard = self
                .silent_ms(node, now_ms)
                .is_some_and(|silent| silent < limit_ms);
            is_heard && read.active().any(|m| m.id == node && !m.draining)
        };
        let mut stores: Vec<StoreId> = read
            .spaces
            .iter()
            .filter(|space| usable(space.record.node))
            .map(|space| space.record.store)
            .collect();
        stores.sort_unstable();
        stores
    }

    /// What is to be done.
    pub(super) fn wanted(
        &self,
        params: &ControllerParams,
        read: &Look,
        now_ms: u64,
        volumes: &[VolumeRecord],
        moved: &[(VolumeId, SetIndex)],
    ) -> Wanted {
        let nodes: Vec<NodeView> = read
            .active()
            .filter_map(|member| {
                Some(NodeView {
                    node: member.id,
                    seen_at_ms: self.nodes.seen_at_ms(member.id)?,
                    draining: member.draining,
                })
            })
            .collect();
        let stores: Vec<StoreView> = read
            .spaces
            .iter()
            .map(|space| &space.record)
            .filter_map(|space| {
                let member = read.active().find(|member| member.id == space.node)?;
                Some(StoreView {
                    at: ClusterStore {
                        id: space.store,
                        node: space.node,
                        zone: member.labels.get(ZONE_LABEL).cloned(),
                        free_blocks: space.free_blocks,
                    },
                    capacity_blocks: space.capacity_blocks,
                })
            })
            .collect();
        let view = View {
            now_ms,
            nodes: &nodes,
            stores: &stores,
            volumes,
            leftovers: &read.leftovers,
            moved,
        };
        wanted_changes(params, &view)
    }

    pub(super) fn picture(
        &self,
        params: &ControllerParams,
        read: &Look,
        now_ms: u64,
        wanted: &Wanted,
    ) -> Picture {
        let mut nodes: BTreeMap<NodeId, NodePicture> = BTreeMap::new();
        for member in read.active() {
            if let Some(silent_ms) = self.silent_ms(member.id, now_ms) {
                let picture = nodes.entry(member.id).or_default();
                picture.silent = Duration::from_millis(silent_ms);
                picture.is_away = silent_ms >= params.silent_ms;
            }
        }
        for space in &read.spaces {
            if let Some(picture) = nodes.get_mut(&space.record.node) {
                let (capacity, free) = (space.record.capacity_blocks, space.record.free_blocks);
                picture.capacity_blocks += capacity;
                picture.used_blocks += capacity.saturating_sub(free);
            }
        }
        for left in &read.leftovers {
            if let Some(picture) = nodes.get_mut(&left.node) {
                picture.leftovers += 1;
            }
        }
        Picture {
            leader: read.leader.as_ref().map(|leader| leader.record.node),
            is_leader: false,
            nodes,
            draining: read
                .active()
                .filter(|member| member.draining)
                .map(|member| member.id)
                .collect(),
            stuck: wanted.stuck.clone(),
            changes: 0,
        }
    }
}
