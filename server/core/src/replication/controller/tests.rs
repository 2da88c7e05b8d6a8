//! The controller with a head that does its part: fills what joins, takes out what is wished away once others suffice.

use super::*;
use crate::records::{Placement, Revision, Versioned, VolumeName};
use crate::replication::membership::change;
use crate::replication::placement::choose_sets;
use crate::units::{Epoch, LayerId, StoreId, Version};
use uuid::Uuid;

struct Sim {
    now_ms: u64,
    nodes: Vec<NodeView>,
    stores: Vec<StoreView>,
    volume: VolumeRecord,
}

fn id(n: u128) -> NodeId {
    NodeId(Uuid::from_u128(n))
}

impl Sim {
    fn new(count: u128, replicas: u32) -> Sim {
        let store = |n: u128| StoreView {
            at: Candidate {
                node: id(n),
                zone: String::new(),
                store: StoreId(Uuid::from_u128(100 + n)),
                free_blocks: 10_000,
            },
            capacity_blocks: 10_000,
        };
        let stores: Vec<StoreView> = (1..=count).map(store).collect();
        let candidates: Vec<Candidate> = stores.iter().map(|s| s.at.clone()).collect();
        let sets = choose_sets(&candidates, replicas, 2 << 30, 0).expect("places");
        let volume = VolumeRecord {
            id: VolumeId(Uuid::from_u128(1)),
            name: VolumeName::parse("v").expect("a name"),
            size_bytes: 2 << 30,
            layers: vec![LayerId(1)],
            replicas,
            min_in_sync: 1,
            client_generation: 0,
            settled: Version::NONE,
            read_only: false,
            write_through: false,
            epoch: Epoch(1),
            head: None,
            created_at_unix_ms: 0,
            never_written: false,
            filesystem: None,
            limits: Default::default(),
            publications: Vec::new(),
            state: VolumeState::Active,
            placement: Placement {
                stores: vec![],
                sets,
            },
        };
        let nodes = (1..=count)
            .map(|n| NodeView {
                node: id(n),
                seen_at_ms: 0,
                draining: false,
            })
            .collect();
        let mut sim = Sim {
            now_ms: 0,
            nodes,
            stores,
            volume,
        };
        sim.count_room();
        sim
    }

    /// Every replica of a set takes a hundred blocks.
    fn count_room(&mut self) {
        for store in &mut self.stores {
            let has = self
                .volume
                .placement
                .sets
                .iter()
                .flat_map(|set| &set.replicas);
            let used = has.filter(|r| r.store == store.at.store).count() as u64 * 100;
            store.at.free_blocks = store.capacity_blocks - used;
        }
    }

    /// A second passes. `dead` is not heard of.
    fn second(&mut self, dead: Option<NodeId>) -> usize {
        self.now_ms += 1_000;
        for node in &mut self.nodes {
            if Some(node.node) != dead {
                node.seen_at_ms = self.now_ms;
            }
        }
        let wanted = wanted_changes(
            &ControllerParams::default(),
            self.now_ms,
            &self.nodes,
            &self.stores,
            std::slice::from_ref(&self.volume),
        );
        let count = wanted.len();
        for (_, wanted) in wanted {
            let current = Versioned {
                record: self.volume.clone(),
                changed_at: Revision(1),
            };
            let (record, _) = change(&current, wanted).expect("a change that can be made");
            assert_eq!(record.check_invariants(), Ok(()));
            self.volume = record;
        }
        // The head.
        let replicas = self.volume.replicas as usize;
        for set in &mut self.volume.placement.sets {
            for replica in &mut set.replicas {
                if Some(replica.node) == dead {
                    replica.state = ReplicaState::Out;
                } else {
                    replica.state = ReplicaState::InSync;
                }
            }
            let staying = set.in_sync().filter(|r| !r.leaving).count();
            if staying >= replicas {
                set.replicas.retain(|r| !r.leaving);
            }
            assert!(
                set.in_sync().count() >= replicas - 1,
                "never fewer than was there"
            );
        }
        self.count_room();
        count
    }

    fn on(&self, node: NodeId) -> usize {
        let all = self
            .volume
            .placement
            .sets
            .iter()
            .flat_map(|set| &set.replicas);
        all.filter(|replica| replica.node == node).count()
    }
}

#[test]
fn a_node_that_is_back_within_the_grace_time_costs_nothing() {
    let mut sim = Sim::new(4, 3);
    let before = sim.volume.placement.clone();
    for _ in 0..500 {
        assert_eq!(sim.second(Some(id(1))), 0);
    }
    sim.second(None);
    assert_eq!(sim.volume.placement, before);
}

#[test]
fn a_node_that_stays_away_is_replaced_and_forgotten() {
    let mut sim = Sim::new(4, 3);
    for _ in 0..800 {
        sim.second(Some(id(1)));
    }
    assert_eq!(sim.on(id(1)), 0);
    for set in &sim.volume.placement.sets {
        assert_eq!(set.in_sync().count(), 3);
    }
}

#[test]
fn with_no_node_to_take_its_place_a_replica_is_kept() {
    let mut sim = Sim::new(3, 3);
    for _ in 0..800 {
        assert_eq!(sim.second(Some(id(1))), 0);
    }
    assert_eq!(sim.on(id(1)), 32);
}

#[test]
fn a_drained_node_ends_empty_and_never_leaves_a_copy_short() {
    let mut sim = Sim::new(4, 3);
    sim.nodes[1].draining = true;
    for _ in 0..200 {
        sim.second(None);
        for set in &sim.volume.placement.sets {
            assert!(set.in_sync().count() >= 3);
        }
    }
    assert_eq!(sim.on(id(2)), 0);
}

#[test]
fn a_new_node_gets_its_share() {
    let mut sim = Sim::new(3, 2);
    sim.nodes.push(NodeView {
        node: id(9),
        seen_at_ms: 0,
        draining: false,
    });
    sim.stores.push(StoreView {
        at: Candidate {
            node: id(9),
            zone: String::new(),
            store: StoreId(Uuid::from_u128(109)),
            free_blocks: 10_000,
        },
        capacity_blocks: 10_000,
    });
    for _ in 0..400 {
        sim.second(None);
    }
    // 64 replicas on four nodes; until the fullest and the emptiest are within a twentieth of a store (5 replicas).
    assert!((12..=20).contains(&sim.on(id(9))), "{}", sim.on(id(9)));
    assert_eq!(sim.second(None), 0, "and then it rests");
}
