//! What the controller of a cluster wants changed: replicas of nodes that stay away are replaced after a grace time,
//! those of a node that is drained move, and load moves slowly to where there is room. A replica is never taken away
//! before its replacement is in sync: the head sees to that, which alone takes out what is in sync.
//!
//! The controller looks at everything again each time, so it needs no memory of its own, and two of them for a moment
//! only meet each other's conflicts.

use super::membership::Change;
use super::placement::{Candidate, place_one};
use crate::records::{Replica, ReplicaSet, ReplicaState, SetIndex, VolumeRecord, VolumeState};
use crate::units::{NodeId, VolumeId};

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Which.
    pub node: NodeId,
    /// When it was last heard of, milliseconds.
    pub seen_at_ms: u64,
    /// Somebody wants it empty.
    pub draining: bool,
}

/// How the controller behaves.
#[derive(Clone, Copy, Debug)]
pub struct ControllerParams {
    /// A node that was not heard of for so long is replaced, milliseconds. Long enough for a restart of the machine.
    pub grace_ms: u64,
    /// A node that was not heard of for so long gets nothing new, milliseconds.
    pub silent_ms: u64,
    /// Replicas being filled at once, in the whole cluster.
    pub fills: usize,
    /// Load moves when the fullest node has so many hundredths more in use than the emptiest.
    pub spread_percent: u64,
}

impl Default for ControllerParams {
    fn default() -> ControllerParams {
        ControllerParams {
            grace_ms: 600_000,
            silent_ms: 15_000,
            fills: 4,
            spread_percent: 5,
        }
    }
}

/// A store and how full it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreView {
    /// Where it is, and its room.
    pub at: Candidate,
    /// Blocks that clients may fill altogether.
    pub capacity_blocks: u64,
}

/// What is to be changed now, the most pressing first. Carry each out with [`super::membership::change`].
pub fn wanted_changes(
    params: &ControllerParams,
    now_ms: u64,
    nodes: &[NodeView],
    stores: &[StoreView],
    volumes: &[VolumeRecord],
) -> Vec<(VolumeId, Change)> {
    let view = Cluster {
        params,
        now_ms,
        nodes,
        stores,
    };
    let active = || volumes.iter().filter(|v| v.state == VolumeState::Active);
    let mut changes = Vec::new();
    let mut fills = active()
        .flat_map(|volume| &volume.placement.sets)
        .flat_map(|set| &set.replicas)
        .filter(|replica| replica.state == ReplicaState::Joining)
        .count();
    // Those with the fewest copies first.
    let mut sets: Vec<(usize, &VolumeRecord, SetIndex, &ReplicaSet)> = active()
        .flat_map(|volume| {
            (0..)
                .zip(&volume.placement.sets)
                .map(move |(index, set)| (set.in_sync().count(), volume, SetIndex(index), set))
        })
        .collect();
    sets.sort_by_key(|(in_sync, ..)| *in_sync);
    for (_, volume, index, set) in &sets {
        for change in view.heal(volume, *index, set) {
            if matches!(change, Change::Add { .. }) {
                if fills >= params.fills {
                    continue;
                }
                fills += 1;
            }
            changes.push((volume.id, change));
        }
    }
    // Load moves when there is nothing else to do, one replica at a time.
    if changes.is_empty() && fills == 0 {
        let sets: Vec<_> = sets
            .iter()
            .map(|(_, v, index, set)| (*v, *index, *set))
            .collect();
        changes.extend(view.move_one(&sets));
    }
    changes
}

struct Cluster<'a> {
    params: &'a ControllerParams,
    now_ms: u64,
    nodes: &'a [NodeView],
    stores: &'a [StoreView],
}

impl Cluster<'_> {
    fn silence_ms(&self, node: NodeId) -> u64 {
        let seen = self.nodes.iter().find(|view| view.node == node);
        seen.map_or(u64::MAX, |view| self.now_ms.saturating_sub(view.seen_at_ms))
    }

    fn is_draining(&self, node: NodeId) -> bool {
        self.nodes
            .iter()
            .any(|view| view.node == node && view.draining)
    }

    fn is_gone(&self, replica: &Replica) -> bool {
        !replica.is_in_sync() && self.silence_ms(replica.node) >= self.params.grace_ms
    }

    /// Stores that may take something new.
    fn candidates(&self) -> Vec<Candidate> {
        self.stores
            .iter()
            .filter(|store| store.at.free_blocks > 0)
            .map(|store| store.at.clone())
            .filter(|at| {
                !self.is_draining(at.node) && self.silence_ms(at.node) < self.params.silent_ms
            })
            .collect()
    }

    fn heal(&self, volume: &VolumeRecord, set_index: SetIndex, set: &ReplicaSet) -> Vec<Change> {
        let mut changes = Vec::new();
        for replica in set.replicas.iter().filter(|replica| !replica.leaving) {
            if self.is_draining(replica.node) {
                changes.push(Change::Leave {
                    set: set_index,
                    store: replica.store,
                    leaving: true,
                });
            }
        }
        let stays = |replica: &&Replica| {
            !replica.leaving && !self.is_draining(replica.node) && !self.is_gone(replica)
        };
        let staying: Vec<&Replica> = set.replicas.iter().filter(stays).collect();
        let whole = staying
            .iter()
            .filter(|replica| replica.is_in_sync())
            .count();
        if (staying.len() as u32) < volume.replicas {
            let taken: Vec<Candidate> = set
                .replicas
                .iter()
                .map(|replica| self.candidate_of(replica))
                .collect();
            let taken: Vec<&Candidate> = taken.iter().collect();
            let candidates = self.candidates();
            if let Some(at) = place_one(&candidates, &taken) {
                changes.push(Change::Add {
                    set: set_index,
                    node: candidates[at].node,
                    store: candidates[at].store,
                });
            }
        } else if whole as u32 >= volume.replicas {
            // Enough are whole: what has been gone for long, or is wanted away and out of sync, is forgotten.
            for replica in &set.replicas {
                if self.is_gone(replica) || (replica.leaving && !replica.is_in_sync()) {
                    changes.push(Change::Remove {
                        set: set_index,
                        store: replica.store,
                    });
                }
            }
        }
        changes
    }

    fn candidate_of(&self, replica: &Replica) -> Candidate {
        let known = self
            .stores
            .iter()
            .find(|store| store.at.store == replica.store);
        known.map_or_else(
            || Candidate {
                node: replica.node,
                zone: String::new(),
                store: replica.store,
                free_blocks: 0,
            },
            |store| store.at.clone(),
        )
    }

    /// Hundredths of a store that are in use.
    fn used_percent(store: &StoreView) -> u64 {
        let used = store.capacity_blocks.saturating_sub(store.at.free_blocks);
        used * 100 / store.capacity_blocks.max(1)
    }

    /// From the fullest store to the emptiest, when they are far enough apart.
    fn move_one(&self, sets: &[(&VolumeRecord, SetIndex, &ReplicaSet)]) -> Vec<(VolumeId, Change)> {
        let usable = |store: &&StoreView| {
            !self.is_draining(store.at.node)
                && self.silence_ms(store.at.node) < self.params.silent_ms
        };
        let mut by_use: Vec<&StoreView> = self.stores.iter().filter(usable).collect();
        by_use.sort_by_key(|store| Cluster::used_percent(store));
        let (Some(emptiest), Some(fullest)) = (by_use.first(), by_use.last()) else {
            return Vec::new();
        };
        let apart = Cluster::used_percent(fullest) - Cluster::used_percent(emptiest);
        if apart <= self.params.spread_percent {
            return Vec::new();
        }
        let movable = sets.iter().find(|(volume, _, set)| {
            set.replicas.len() as u32 == volume.replicas
                && set.replicas.iter().all(Replica::is_in_sync)
                && set.replicas.iter().any(|r| r.store == fullest.at.store)
                && set
                    .replicas
                    .iter()
                    .all(|r| r.node != emptiest.at.node || r.node == fullest.at.node)
        });
        let Some((volume, set, _)) = movable else {
            return Vec::new();
        };
        vec![
            (
                volume.id,
                Change::Add {
                    set: *set,
                    node: emptiest.at.node,
                    store: emptiest.at.store,
                },
            ),
            (
                volume.id,
                Change::Leave {
                    set: *set,
                    store: fullest.at.store,
                    leaving: true,
                },
            ),
        ]
    }
}

#[cfg(test)]
mod tests;
