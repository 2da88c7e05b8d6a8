//! The controller of the run: the real one decides, from what a daemon would see, while nodes are drained, change their
//! zone, come and go.
//! What is taken out of a set is given back by its store, which is the danger that is tried here.

use std::collections::BTreeMap;

use ashlar_core::placement::ClusterStore;
use ashlar_core::records::{SetIndex, keys};
use ashlar_core::replication::controller::{
    ControllerParams, NodeView, StoreView, View, wanted_changes,
};
use ashlar_core::replication::membership::{Change, change_all};
use ashlar_core::units::NodeId;

use crate::world::{Ev, LEASE_US, World};

/// The zone that the volume is confined to.
pub(crate) const ZONE: &str = "home";
/// The node with which all are in another zone.
const ALL_WITH: usize = 1;

/// What the controller and the stores remember.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steering {
    /// Not to hold copies: its node is being drained or, of every other node, in another zone than the volume's.
    pub(crate) unwanted: Option<NodeId>,
    seen_us: BTreeMap<NodeId, u64>,
    /// Since when a node has known what it is to give back, by key: the run of its process, and the time.
    known: BTreeMap<String, (u64, u64)>,
    pub(crate) changes: u64,
}

impl World {
    /// Somebody wants another node empty or elsewhere, or none any more.
    pub(crate) fn drain_step(&mut self, node: usize) {
        let id = self.nodes[node].id;
        self.steering.unwanted = match self.steering.unwanted {
            Some(_) => None,
            None => Some(id),
        };
    }

    /// Of every other node that is not wanted: it is in another zone, instead of being drained.
    fn is_elsewhere(at: usize) -> bool {
        at % 2 == 1
    }

    /// The zone of a node. With one of them all are elsewhere: no copy has a place then, and each is kept up to date.
    fn zone(&self, node: NodeId) -> &'static str {
        let at = |id: NodeId| self.nodes.iter().position(|n| n.id == id);
        let unwanted = self
            .steering
            .unwanted
            .filter(|id| at(*id).is_some_and(Self::is_elsewhere));
        match unwanted {
            Some(id) if id == node || at(id) == Some(ALL_WITH) => "elsewhere",
            _ => ZONE,
        }
    }

    pub(crate) fn steer_step(&mut self) {
        let next_us = self.rng.between(10_000, 60_000);
        self.after(next_us, Ev::Steer);
        for n in &self.nodes {
            if n.is_up && !n.frozen {
                self.steering.seen_us.insert(n.id, self.now_us);
            }
        }
        if self.healing {
            self.steering.unwanted = None;
        }
        self.give_back();
        if self.meta.is_away {
            return;
        }
        // A watch may be late and leave something out, but it is begun anew in the end.
        if self.healing {
            self.tell_watchers();
        }
        let nodes: Vec<NodeView> = (0..)
            .zip(&self.nodes)
            .map(|(at, n)| NodeView {
                node: n.id,
                seen_at_ms: self.steering.seen_us.get(&n.id).copied().unwrap_or(0) / 1000,
                draining: self.steering.unwanted == Some(n.id) && !Self::is_elsewhere(at),
            })
            .collect();
        let stores: Vec<StoreView> = self
            .nodes
            .iter()
            .map(|n| StoreView {
                at: ClusterStore {
                    id: n.store,
                    node: n.id,
                    zone: Some(self.zone(n.id).to_owned()),
                    free_blocks: 5_000,
                },
                capacity_blocks: 10_000,
            })
            .collect();
        let params = ControllerParams {
            grace_ms: 2 * LEASE_US / 1000,
            silent_ms: LEASE_US / 2000,
            ..ControllerParams::default()
        };
        let leftovers: Vec<_> = self.meta.leftovers.values().cloned().collect();
        let volume = self.meta.record.record.clone();
        let view = View {
            now_ms: self.now_us / 1000,
            nodes: &nodes,
            stores: &stores,
            volumes: std::slice::from_ref(&volume),
            leftovers: &leftovers,
            moved: &[],
        };
        let wanted = wanted_changes(&params, &view);
        let changes: Vec<Change> = wanted
            .changes
            .into_iter()
            .map(|(_, change)| change)
            .collect();
        if changes.is_empty() {
            return;
        }
        let (_, transaction) =
            change_all(&self.meta.record, &changes).expect("changes that fit what was read");
        if self.meta.commit(&transaction).is_some() {
            self.steering.changes += changes.len() as u64;
            self.say(|| format!("the controller: {changes:?}"));
            self.tell_watchers();
        }
    }

    /// Stores give back what they have left, when nothing of before can be on its way to them any more.
    fn give_back(&mut self) {
        let leftovers: Vec<_> = self.meta.leftovers.values().cloned().collect();
        self.steering
            .known
            .retain(|key, _| self.meta.leftovers.contains_key(key));
        for left in leftovers {
            let Some(node) = self.nodes.iter().position(|n| n.store == left.store) else {
                continue;
            };
            let n = &mut self.nodes[node];
            if !n.is_up || n.frozen || n.disk.poisoned {
                continue;
            }
            let key = keys::leftover(left.volume, SetIndex(left.set), left.store);
            let since = match self.steering.known.get(&key) {
                Some((run, since_us)) if *run == n.run => *since_us,
                // A store that reaches the metadata store when the head does not may give back what the head believes
                // to be there; but first it has to hear of it.
                _ if self.meta.is_away => continue,
                _ => {
                    self.steering.known.insert(key, (n.run, self.now_us));
                    continue;
                }
            };
            if self.now_us < since + 2 * LEASE_US {
                continue;
            }
            n.disk.give_back(|chunk| left.has(chunk));
            if self.meta.is_away {
                continue;
            }
            self.meta.leftovers.remove(&key);
            self.say(|| format!("node {node} gives set {} back", left.set));
        }
    }
}
