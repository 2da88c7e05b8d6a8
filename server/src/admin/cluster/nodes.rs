//! The nodes of a cluster as its records and its controller know them.

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_core::records::{
    ClusterRecord, Holdings, MemberError, MemberRecord, MemberState, StoreRecord, Versioned,
    VolumeRecord, VolumeState, drain, keys, remove,
};
use ashlar_core::units::{BLOCK_BYTES, NodeId, StoreId};
use ashlar_proto::cluster as proto;
use tonic::Status;

use super::{ATTEMPTS, committed, contended};
use crate::admin::status;
use crate::controller::Picture;
use crate::daemon::ClusterServices;
use crate::identity::{Authority, IdentityError};
use crate::meta;

/// Least digits of an abbreviated node id.
const ABBREVIATION_MIN: usize = 4;

/// What is known of nodes beside the records.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) picture: Arc<Picture>,
    pub(super) volumes: Vec<Versioned<VolumeRecord>>,
}

impl Seen {
    /// Copies of a node for which no other node is there.
    fn stuck_on(&self, node: NodeId) -> u32 {
        let stuck = self.picture.stuck.iter();
        let of_node = stuck.filter(|(id, set)| {
            let mut volumes = self.volumes.iter().map(|volume| &volume.record);
            let volume = volumes.find(|volume| volume.id == *id);
            let set = volume.and_then(|v| v.placement.sets.get(usize::from(set.0)));
            set.is_some_and(|set| set.replicas.iter().any(|r| r.node == node))
        });
        of_node.count() as u32
    }
}

impl ClusterServices {
    pub(super) fn authority(&self) -> Result<&Authority, Status> {
        self.identity.authority().ok_or_else(|| {
            let members = self.identity.trust().members();
            let holders: Vec<_> = members
                .iter()
                .filter(|member| member.is_authority)
                .map(|member| match &member.address {
                    Some(address) => format!("{} at {address}", member.id.0),
                    None => member.id.0.to_string(),
                })
                .collect();
            let holders = holders.join(", ");
            Status::failed_precondition(IdentityError::NoAuthority { holders }.to_string())
        })
    }

    pub(super) async fn cluster_record(&self) -> Result<ClusterRecord, Status> {
        let found = meta::read::<ClusterRecord>(&*self.records, keys::CLUSTER).await;
        let found = found.map_err(status::unread)?;
        Ok(found
            .ok_or_else(|| Status::data_loss("the record of the cluster is gone"))?
            .record)
    }

    pub(super) async fn members(&self) -> Result<Vec<Versioned<MemberRecord>>, Status> {
        let listing = self
            .records
            .list(keys::MEMBERS)
            .await
            .map_err(status::unread)?;
        let read = listing.entries.iter().map(|entry| entry.read());
        read.collect::<Result<_, _>>().map_err(status::unread)
    }

    /// The one node meant by its id or the beginning of it.
    pub(super) async fn find(&self, reference: &str) -> Result<Versioned<MemberRecord>, Status> {
        let not_found = || {
            status::of_member_error(&MemberError::NotFound {
                reference: reference.to_owned(),
            })
        };
        let wanted = reference.to_ascii_lowercase();
        if wanted.len() < ABBREVIATION_MIN {
            return Err(not_found());
        }
        let members = self.members().await?;
        let mut found = members
            .into_iter()
            .filter(|member| member.record.id.0.to_string().starts_with(&wanted));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            _ => Err(not_found()),
        }
    }

    pub(super) async fn holdings(&self) -> Result<BTreeMap<NodeId, Holdings>, Status> {
        let mut owner: BTreeMap<StoreId, NodeId> = BTreeMap::new();
        let mut holdings: BTreeMap<NodeId, Holdings> = BTreeMap::new();
        for entry in self
            .records
            .list(keys::STORES)
            .await
            .map_err(status::unread)?
            .entries
        {
            let store = entry.read::<StoreRecord>().map_err(status::unread)?.record;
            if let Some(node) = store.node {
                owner.insert(store.id, node);
                holdings.entry(node).or_default().stores += 1;
            }
        }
        for entry in self
            .records
            .list(keys::VOLUMES)
            .await
            .map_err(status::unread)?
            .entries
        {
            let volume = entry.read::<VolumeRecord>().map_err(status::unread)?.record;
            let stores = &volume.placement.stores;
            let mut alone: Vec<NodeId> = stores
                .iter()
                .filter_map(|store| owner.get(store).copied())
                .collect();
            // What is left of a deleted volume goes with its node.
            let sets = volume.placement.sets.iter();
            let sets = sets.filter(|_| volume.state == VolumeState::Active);
            let replicas = sets.flat_map(|set| &set.replicas);
            let mut copied: Vec<NodeId> = replicas.map(|replica| replica.node).collect();
            for node in &copied {
                holdings.entry(*node).or_default().copies += 1;
            }
            for nodes in [&mut alone, &mut copied] {
                nodes.sort_unstable();
                nodes.dedup();
            }
            for node in alone {
                holdings.entry(node).or_default().volumes += 1;
            }
            for node in copied {
                holdings.entry(node).or_default().copied += 1;
            }
            if let Some(head) = volume.head
                && volume.placement.is_replicated()
                && volume.state == VolumeState::Active
            {
                holdings
                    .entry(head.node)
                    .or_default()
                    .serves
                    .push(volume.name);
            }
        }
        Ok(holdings)
    }

    pub(super) fn node(&self, member: MemberRecord, has: Holdings, seen: &Seen) -> proto::Node {
        let known = seen.picture.nodes.get(&member.id);
        let known = known.copied().unwrap_or_default();
        let bytes = |blocks: u64| blocks * BLOCK_BYTES as u64;
        proto::Node {
            draining: member.draining,
            copies: has.copies as u32,
            used_bytes: bytes(known.used_blocks),
            capacity_bytes: bytes(known.capacity_blocks),
            away: known.is_away,
            silent_seconds: known.silent.as_secs() as u32,
            serves: has.serves.len() as u32,
            stuck_copies: seen.stuck_on(member.id),
            leader: seen.picture.leader == Some(member.id),
            id: member.id.0.to_string(),
            joined_at_unix_ms: member.joined_at_unix_ms,
            removed: member.state == MemberState::Removed,
            address: member.address.unwrap_or_default(),
            authority: member.is_authority,
            labels: member.labels.into_iter().collect(),
            stores: has.stores as u32,
            volumes: (has.volumes + has.copied) as u32,
            self_: member.id == self.identity.node(),
        }
    }

    /// Shuts a node out that gets nothing new any more, if nothing is lost by it.
    pub(super) async fn shut_out(&self, node: NodeId) -> Result<(), Status> {
        for _ in 0..ATTEMPTS {
            let member = self.find(&node.0.to_string()).await?;
            // Every creation of a volume changes it: none may come between the look and the change.
            let layers = self
                .records
                .get(keys::NEXT_LAYER)
                .await
                .map_err(status::unread)?;
            let has = self.holdings().await?.remove(&node);
            let authorities: Vec<_> = self
                .members()
                .await?
                .into_iter()
                .map(|member| member.record)
                .filter(|record| record.is_authority && record.state == MemberState::Active)
                .map(|record| record.id)
                .collect();
            let asked = self.identity.node();
            let change = remove(&member, asked, &has.unwrap_or_default(), &authorities);
            let is_done = match change.map_err(|error| status::of_member_error(&error))? {
                Some(change) => {
                    let change = match &layers {
                        Some(layers) => change.when_unchanged(keys::NEXT_LAYER, layers.changed_at),
                        None => change.when_absent(keys::NEXT_LAYER),
                    };
                    committed(&*self.records, change).await?
                }
                None => true,
            };
            if is_done {
                return Ok(());
            }
        }
        Err(contended())
    }

    /// Has a node emptied, or no longer. Answers whether anything had to be changed.
    pub(super) async fn set_draining(&self, node: NodeId, draining: bool) -> Result<bool, Status> {
        for _ in 0..ATTEMPTS {
            let member = crate::identity::member(&*self.records, node).await;
            let member = member.map_err(status::unread)?.ok_or_else(|| {
                let reference = node.0.to_string();
                status::of_member_error(&MemberError::NotFound { reference })
            })?;
            let change =
                drain(&member, draining).map_err(|error| status::of_member_error(&error))?;
            let Some(change) = change else {
                return Ok(false);
            };
            if committed(&*self.records, change).await? {
                return Ok(true);
            }
        }
        Err(contended())
    }

    pub(super) async fn shown(
        &self,
        node: NodeId,
        seen: &Seen,
    ) -> Result<Option<proto::Node>, Status> {
        let member = crate::identity::member(&*self.records, node).await;
        let has = self.holdings().await?.remove(&node).unwrap_or_default();
        let member = member.map_err(status::unread)?;
        Ok(member.map(|member| self.node(member.record, has, seen)))
    }
}
