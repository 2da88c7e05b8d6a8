//! What the controller of a cluster wants changed: replicas of nodes that stay away are replaced after a grace time,
//! those of a node that is drained, or outside the zones of their volume, move, and load moves slowly to where there is
//! room. A replica is never taken away before its replacement is in sync: the head sees to that, which alone takes out
//! what is in sync.
//!
//! The controller looks at everything again each time, so it needs little memory of its own, and two of them for a
//! moment only meet each other's conflicts.

use std::collections::HashMap;

use super::membership::Change;
use crate::placement::ClusterStore;
use crate::records::{
    LeftoverRecord, REPLICAS_MAX, Replica, ReplicaSet, ReplicaState, SetIndex, VolumeRecord,
    VolumeState,
};
use crate::units::{BLOCK_BYTES, NodeId, StoreId, VolumeId};

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Which.
    pub node: NodeId,
    /// When it was last heard of, milliseconds by the clock of whoever looks.
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
    /// Of those, the ones that are filled only to spread the load, or to bring a copy into the zones of its volume.
    pub moves: usize,
    /// Load moves when the fullest store is fuller than the emptiest by so many hundredths of what they have on average.
    pub spread_percent: u64,
    /// A store gets nothing new beyond so many hundredths of its room: what is there grows, too.
    pub full_percent: u64,
}

impl Default for ControllerParams {
    fn default() -> ControllerParams {
        ControllerParams {
            grace_ms: 600_000,
            silent_ms: 20_000,
            fills: 4,
            moves: 2,
            spread_percent: 4,
            full_percent: 90,
        }
    }
}

/// A store and how full it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreView {
    /// Where it is, and its room.
    pub at: ClusterStore,
    /// Blocks that clients may fill altogether.
    pub capacity_blocks: u64,
}

/// A cluster as the controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Now, by the clock that the nodes were seen by.
    pub now_ms: u64,
    /// Those that belong to the cluster.
    pub nodes: &'a [NodeView],
    /// Their stores.
    pub stores: &'a [StoreView],
    /// Every volume.
    pub volumes: &'a [VolumeRecord],
    /// What stores have yet to give back.
    pub leftovers: &'a [LeftoverRecord],
    /// Sets that were moved to spread the load, and are not moved again for that: how much a set holds is an estimate,
    /// and a wrong one must not have it go round for ever.
    pub moved: &'a [(VolumeId, SetIndex)],
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Changes to be made now, the most pressing first. Carry those of a volume out with
    /// [`super::membership::change_all`].
    pub changes: Vec<(VolumeId, Change)>,
    /// Sets of which a replica moves only to spread the load.
    pub spread: Vec<(VolumeId, SetIndex)>,
    /// Sets that lack a replica, or cannot be rid of one, for want of a node that could take another.
    pub stuck: Vec<(VolumeId, SetIndex)>,
    /// Active volumes with replicas whose head is not there, and whose node has been away for longer than the grace
    /// time, or which never had one: nobody fills their replicas until one opens them.
    pub unserved: Vec<VolumeId>,
}

/// What is to be changed now.
pub fn wanted_changes(params: &ControllerParams, view: &View<'_>) -> Wanted {
    let mut plan = Plan::new(params, *view);
    // Those with the fewest copies first.
    let mut sets: Vec<(usize, &VolumeRecord, SetIndex, &ReplicaSet)> = plan
        .active()
        .flat_map(|volume| {
            (0..)
                .zip(&volume.placement.sets)
                .map(move |(index, set)| (set.in_sync().count(), volume, SetIndex(index), set))
        })
        .collect();
    sets.sort_by_key(|(in_sync, ..)| *in_sync);
    for (_, volume, index, set) in &sets {
        plan.heal(volume, *index, set);
    }
    let sets: Vec<_> = sets.iter().map(|(_, v, at, set)| (*v, *at, *set)).collect();
    for (volume, index, set) in &sets {
        plan.bring_home(volume, *index, set);
    }
    // Load moves when nothing else is to be done.
    if plan.wanted.changes.is_empty() {
        while plan.fills < plan.params.moves && plan.move_one(&sets) {}
    }
    let unserved = plan.active().filter(|volume| plan.is_abandoned(volume));
    plan.wanted.unserved = unserved.map(|volume| volume.id).collect();
    plan.wanted
}

/// What a replica of a volume may come to hold, for comparing it with others.
fn weight(volume: &VolumeRecord) -> u64 {
    let entries = volume.placement.sets.len().max(1) as u64;
    (volume.size_bytes / BLOCK_BYTES as u64 / entries).max(1)
}

/// Nothing of a set is on its way, and nothing is missing.
fn is_at_rest(volume: &VolumeRecord, set: &ReplicaSet) -> bool {
    set.replicas.len() as u32 == volume.replicas
        && set.replicas.iter().all(|r| r.is_in_sync() && !r.leaving)
}

struct Plan<'a> {
    params: &'a ControllerParams,
    view: View<'a>,
    /// Blocks in use, as they will be when what is under way has come to its end.
    used: HashMap<StoreId, u64>,
    /// What the replicas of each store may come to hold.
    weights: HashMap<StoreId, u64>,
    /// Replicas being filled, or about to be.
    fills: usize,
    wanted: Wanted,
}

impl<'a> Plan<'a> {
    fn new(params: &'a ControllerParams, view: View<'a>) -> Plan<'a> {
        let used = view.stores.iter().map(|store| {
            let used = store.capacity_blocks.saturating_sub(store.at.free_blocks);
            (store.at.id, used)
        });
        let mut plan = Plan {
            params,
            view,
            used: used.collect(),
            weights: HashMap::new(),
            fills: 0,
            wanted: Wanted::default(),
        };
        for volume in view.volumes {
            for store in &volume.placement.stores {
                let share = volume.size_bytes
                    / BLOCK_BYTES as u64
                    / volume.placement.stores.len().max(1) as u64;
                *plan.weights.entry(*store).or_default() += share;
            }
            for replica in volume.placement.sets.iter().flat_map(|set| &set.replicas) {
                if replica.state != ReplicaState::Joining {
                    *plan.weights.entry(replica.store).or_default() += weight(volume);
                }
            }
        }
        for left in view.leftovers {
            if let Some(volume) = plan.volume(left.volume) {
                *plan.weights.entry(left.store).or_default() += weight(volume);
            }
        }
        // What is under way counts as done, from the figures of before.
        let now = plan.used.clone();
        let mut arriving: Vec<(StoreId, u64)> = Vec::new();
        let mut going: Vec<(StoreId, u64)> = Vec::new();
        for volume in view.volumes {
            for set in &volume.placement.sets {
                for replica in &set.replicas {
                    if replica.state == ReplicaState::Joining {
                        arriving.push((replica.store, plan.estimate(&now, volume, set)));
                        let counts = plan.is_led(volume) && !plan.is_silent(replica.node);
                        plan.fills += usize::from(counts && volume.state == VolumeState::Active);
                    } else if replica.leaving {
                        going.push((replica.store, plan.share(&now, replica.store, volume)));
                    }
                }
            }
        }
        for left in view.leftovers {
            if let Some(volume) = plan.volume(left.volume) {
                going.push((left.store, plan.share(&now, left.store, volume)));
            }
        }
        for (store, blocks) in going {
            let used = plan.used.entry(store).or_default();
            *used = used.saturating_sub(blocks);
        }
        for (store, blocks) in arriving {
            *plan.used.entry(store).or_default() += blocks;
        }
        plan
    }

    fn active(&self) -> impl Iterator<Item = &'a VolumeRecord> + use<'a> {
        let all = self.view.volumes.iter();
        all.filter(|volume| volume.state == VolumeState::Active && volume.placement.is_replicated())
    }

    fn volume(&self, id: VolumeId) -> Option<&'a VolumeRecord> {
        self.view.volumes.iter().find(|volume| volume.id == id)
    }

    fn silence_ms(&self, node: NodeId) -> u64 {
        let seen = self.view.nodes.iter().find(|view| view.node == node);
        seen.map_or(u64::MAX, |seen| {
            self.view.now_ms.saturating_sub(seen.seen_at_ms)
        })
    }

    fn is_silent(&self, node: NodeId) -> bool {
        self.silence_ms(node) >= self.params.silent_ms
    }

    fn is_draining(&self, node: NodeId) -> bool {
        let mut nodes = self.view.nodes.iter();
        nodes.any(|view| view.node == node && view.draining)
    }

    /// It lies where the volume's copies may not: the volume was confined, or its node's label changed. What is not known
    /// to be elsewhere stays.
    fn is_astray(&self, volume: &VolumeRecord, replica: &Replica) -> bool {
        let store = self.store(replica.store);
        store.is_some_and(|store| !volume.zones.allow(store.at.zone.as_deref()))
    }

    /// It is being filled and never will be: it counts for nothing, and keeps others from being filled.
    fn is_futile(&self, replica: &Replica) -> bool {
        let store = self.store(replica.store);
        let has_no_room = store.is_some_and(|store| store.at.free_blocks == 0);
        replica.state == ReplicaState::Joining && (self.is_gone(replica) || has_no_room)
    }

    /// Its node is to hold no copy of this volume: somebody wants it empty, or it is elsewhere and holds none yet.
    fn is_unwanted(&self, volume: &VolumeRecord, replica: &Replica) -> bool {
        let is_joining = replica.state == ReplicaState::Joining;
        self.is_draining(replica.node) || (is_joining && self.is_astray(volume, replica))
    }

    fn is_gone(&self, replica: &Replica) -> bool {
        !replica.is_in_sync() && self.silence_ms(replica.node) >= self.params.grace_ms
    }

    /// Somebody is there to fill its replicas.
    fn is_led(&self, volume: &VolumeRecord) -> bool {
        volume.head.is_some_and(|head| !self.is_silent(head.node))
    }

    fn is_abandoned(&self, volume: &VolumeRecord) -> bool {
        volume
            .head
            .is_none_or(|head| self.silence_ms(head.node) >= self.params.grace_ms)
    }

    // -- room

    fn store(&self, store: StoreId) -> Option<&'a StoreView> {
        self.view.stores.iter().find(|known| known.at.id == store)
    }

    fn used(&self, store: StoreId) -> u64 {
        self.used.get(&store).copied().unwrap_or(0)
    }

    /// Of what a store has in use, the share of one replica of a volume.
    fn share(&self, used: &HashMap<StoreId, u64>, store: StoreId, volume: &VolumeRecord) -> u64 {
        let used = used.get(&store).copied().unwrap_or(0);
        let all = self.weights.get(&store).copied().unwrap_or(0).max(1);
        (u128::from(used) * u128::from(weight(volume)) / u128::from(all)) as u64
    }

    /// Blocks that a new replica of a set will take.
    fn estimate(
        &self,
        used: &HashMap<StoreId, u64>,
        volume: &VolumeRecord,
        set: &ReplicaSet,
    ) -> u64 {
        let shares = set.in_sync().map(|r| self.share(used, r.store, volume));
        let (sum, count) = shares.fold((0, 0), |(sum, count), share| (sum + share, count + 1));
        sum / std::cmp::max(count, 1)
    }

    /// How full a store would be with `more` blocks, in parts of a million million.
    fn level(&self, store: &StoreView, more: u64) -> u128 {
        let used = u128::from(self.used(store.at.id)) + u128::from(more);
        used * 1_000_000_000_000 / u128::from(store.capacity_blocks.max(1))
    }

    /// Whether a store may get a replica of a set.
    fn may_take(
        &self,
        store: &StoreView,
        volume: &VolumeRecord,
        index: SetIndex,
        blocks: u64,
    ) -> bool {
        let at = &store.at;
        let room = u128::from(store.capacity_blocks) * u128::from(self.params.full_percent) / 100;
        let has_room =
            at.free_blocks > 0 && u128::from(self.used(at.id)) + u128::from(blocks) <= room;
        let is_clean = !self
            .view
            .leftovers
            .iter()
            .any(|left| left.store == at.id && left.volume == volume.id && left.set == index.0);
        // A daemon can lead a volume only when what it has of it is in one store.
        let is_alone = volume
            .placement
            .sets
            .iter()
            .flat_map(|set| &set.replicas)
            .all(|replica| replica.node != at.node || replica.store == at.id);
        volume.zones.allow(at.zone.as_deref())
            && has_room
            && is_clean
            && is_alone
            && !self.is_draining(at.node)
            && !self.is_silent(at.node)
    }

    fn zone(&self, store: StoreId) -> Option<&str> {
        self.store(store)?.at.zone.as_deref()
    }

    /// Where one more replica of a set goes beside those that stay.
    fn place(
        &self,
        volume: &VolumeRecord,
        index: SetIndex,
        set: &ReplicaSet,
        staying: &[&Replica],
        blocks: u64,
    ) -> Option<&'a StoreView> {
        let is_new_zone = |store: &StoreView| {
            store.at.zone.is_none()
                || staying
                    .iter()
                    .all(|replica| self.zone(replica.store) != store.at.zone.as_deref())
        };
        self.view
            .stores
            .iter()
            .filter(|store| set.replicas.iter().all(|r| r.node != store.at.node))
            .filter(|store| self.may_take(store, volume, index, blocks))
            .min_by_key(|store| (!is_new_zone(store), self.level(store, blocks), store.at.id))
    }

    // -- changes

    fn want(&mut self, volume: &VolumeRecord, change: Change) {
        self.wanted.changes.push((volume.id, change));
    }

    fn heal(&mut self, volume: &VolumeRecord, index: SetIndex, set: &ReplicaSet) {
        let leave = |store, leaving| Change::Leave {
            set: index,
            store,
            leaving,
        };
        let remove = |store| Change::Remove { set: index, store };
        let is_joining = |r: &&Replica| r.state == ReplicaState::Joining;
        let futile = set.replicas.iter().filter(|r| self.is_futile(r));
        let futile: Vec<&Replica> = futile.collect();
        for replica in &futile {
            self.want(volume, remove(replica.store));
        }
        let others = || {
            let all = set.replicas.iter();
            all.filter(|r| futile.iter().all(|other| other.store != r.store))
        };
        let staying: Vec<&Replica> = others()
            .filter(|r| !r.leaving && !self.is_unwanted(volume, r) && !self.is_gone(r))
            .collect();
        let replicas = volume.replicas as usize;
        let mut is_replaced = staying.len() >= replicas;
        if !is_replaced {
            // One that is wished away for a reason that is gone stays after all.
            let may_stay =
                |r: &&Replica| r.leaving && !self.is_unwanted(volume, r) && !self.is_silent(r.node);
            let back = others().filter(may_stay);
            match back.max_by_key(|replica| replica.is_in_sync()) {
                Some(back) => self.want(volume, leave(back.store, false)),
                None => is_replaced = self.add(volume, index, set, &staying),
            }
        }
        // What is only being filled is given up when another one is; until then it may be done before that.
        for replica in others() {
            let goes = replica.leaving || self.is_unwanted(volume, replica);
            if goes && is_replaced && is_joining(&replica) {
                self.want(volume, remove(replica.store));
            } else if goes && !replica.leaving {
                self.want(volume, leave(replica.store, true));
            }
        }
        let whole = staying.iter().filter(|r| r.is_in_sync()).count();
        if whole < replicas {
            return;
        }
        // Enough are whole: what has been gone for long, or is wanted away and out of sync, is forgotten.
        for replica in others().filter(|r| !is_joining(r)) {
            if self.is_gone(replica) || (replica.leaving && !replica.is_in_sync()) {
                self.want(volume, remove(replica.store));
            }
        }
        // So is what is more than there should be: a node was replaced and came back. What is not whole yet goes first.
        let is_leaving = set.replicas.iter().any(|replica| replica.leaving);
        if staying.len() > replicas && !is_leaving {
            let dearest = |r: &&&Replica| {
                let level = self.store(r.store).map(|store| self.level(store, 0));
                (!r.is_in_sync(), self.is_astray(volume, r), level, r.store)
            };
            match staying.iter().max_by_key(dearest) {
                Some(extra) if extra.is_in_sync() => self.want(volume, leave(extra.store, true)),
                Some(extra) => self.want(volume, remove(extra.store)),
                None => {}
            }
        }
    }

    /// Of a set at rest, one replica that lies outside the zones of the volume moves into them. Until there is a place for
    /// it there it is a copy as good as any.
    fn bring_home(&mut self, volume: &VolumeRecord, index: SetIndex, set: &ReplicaSet) {
        let is_kept = |r: &Replica| !self.is_draining(r.node);
        let mut astray = set.replicas.iter().filter(|r| self.is_astray(volume, r));
        let Some(astray) = astray.next() else { return };
        if !is_at_rest(volume, set) || !set.replicas.iter().all(is_kept) {
            return;
        }
        let others = set.replicas.iter().filter(|r| r.store != astray.store);
        let others: Vec<&Replica> = others.collect();
        let blocks = self.share(&self.used, astray.store, volume);
        let Some(to) = self.place(volume, index, set, &others, blocks) else {
            self.wanted.stuck.push((volume.id, index));
            return;
        };
        if self.is_led(volume) && self.fills < self.params.moves {
            self.fills += 1;
            *self.used.entry(to.at.id).or_default() += blocks;
            let from = self.used.entry(astray.store).or_default();
            *from = from.saturating_sub(blocks);
            let change = Change::Move {
                set: index,
                from: astray.store,
                node: to.at.node,
                store: to.at.id,
            };
            self.want(volume, change);
        }
    }

    /// Wants one more replica of a set, beside those that stay. False: there is no place for it, or it has to wait.
    fn add(
        &mut self,
        volume: &VolumeRecord,
        index: SetIndex,
        set: &ReplicaSet,
        staying: &[&Replica],
    ) -> bool {
        let blocks = self.estimate(&self.used, volume, set);
        let to = self.place(volume, index, set, staying, blocks);
        let Some(to) = to.filter(|_| set.replicas.len() < REPLICAS_MAX) else {
            self.wanted.stuck.push((volume.id, index));
            return false;
        };
        // Nobody would fill it, or it would only wait for others.
        if !self.is_led(volume) || self.fills >= self.params.fills {
            return false;
        }
        self.fills += 1;
        *self.used.entry(to.at.id).or_default() += blocks;
        let (node, store) = (to.at.node, to.at.id);
        let set = index;
        self.want(volume, Change::Add { set, node, store });
        true
    }

    /// Moves one replica from a full store to an emptier one, if they are far enough apart and that brings them nearer.
    fn move_one(&mut self, sets: &[(&VolumeRecord, SetIndex, &ReplicaSet)]) -> bool {
        let mut stores: Vec<&StoreView> = self
            .view
            .stores
            .iter()
            .filter(|store| !self.is_draining(store.at.node) && !self.is_silent(store.at.node))
            .collect();
        stores.sort_by_key(|store| (self.level(store, 0), store.at.id));
        let capacity: u128 = stores.iter().map(|s| u128::from(s.capacity_blocks)).sum();
        let used: u128 = stores.iter().map(|s| u128::from(self.used(s.at.id))).sum();
        let mean = used * 1_000_000_000_000 / capacity.max(1);
        let now = self.used.clone();
        for fullest in stores.iter().rev() {
            for emptiest in &stores {
                let apart = self
                    .level(fullest, 0)
                    .saturating_sub(self.level(emptiest, 0));
                if apart * 100 <= mean * u128::from(self.params.spread_percent) {
                    break;
                }
                let best = sets
                    .iter()
                    .filter(|(volume, index, set)| {
                        self.is_movable(volume, *index, set, fullest, emptiest)
                    })
                    .map(|(volume, index, _)| {
                        let blocks = self.share(&now, fullest.at.id, volume);
                        (blocks, *volume, *index)
                    })
                    .filter(|(blocks, volume, index)| {
                        // It must not only change places with the one it leaves.
                        let after = self.used(fullest.at.id).saturating_sub(*blocks);
                        let after = u128::from(after) * 1_000_000_000_000
                            / u128::from(fullest.capacity_blocks.max(1));
                        *blocks > 0
                            && self.level(emptiest, *blocks) <= after
                            && self.may_take(emptiest, volume, *index, *blocks)
                    })
                    .max_by_key(|(blocks, volume, index)| (*blocks, volume.id, *index));
                if let Some((blocks, volume, index)) = best {
                    let from = self.used.entry(fullest.at.id).or_default();
                    *from = from.saturating_sub(blocks);
                    *self.used.entry(emptiest.at.id).or_default() += blocks;
                    self.fills += 1;
                    let change = Change::Move {
                        set: index,
                        from: fullest.at.id,
                        node: emptiest.at.node,
                        store: emptiest.at.id,
                    };
                    self.want(volume, change);
                    self.wanted.spread.push((volume.id, index));
                    return true;
                }
            }
        }
        false
    }

    /// Whether a set is at rest, and may lie on `to` instead of `from`.
    fn is_movable(
        &self,
        volume: &VolumeRecord,
        index: SetIndex,
        set: &ReplicaSet,
        from: &StoreView,
        to: &StoreView,
    ) -> bool {
        let this = (volume.id, index);
        let is_planned =
            self.wanted.changes.iter().any(
                |(id, change)| matches!(change, Change::Move { set, .. } if (*id, *set) == this),
            );
        let others = || set.replicas.iter().filter(|r| r.store != from.at.id);
        // Two that may fail together are no better than before.
        let keeps_zones = to.at.zone.is_none()
            || to.at.zone == from.at.zone
            || others().all(|r| self.zone(r.store) != to.at.zone.as_deref());
        is_at_rest(volume, set)
            && !is_planned
            && !self.view.moved.contains(&this)
            && self.is_led(volume)
            && set.replicas.iter().any(|r| r.store == from.at.id)
            && others().all(|r| r.node != to.at.node)
            && keeps_zones
    }
}

#[cfg(test)]
mod tests;
