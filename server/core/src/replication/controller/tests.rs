//! The controller with a head that does its part: fills what joins, takes out what is wished away once others suffice.

use super::*;
use crate::placement::spread;
use crate::records::{HeadClaim, Placement, Revision, Versioned, VolumeName, Zones};
use crate::replication::membership::change_all;
use crate::units::{CHUNK_BYTES, Epoch, LayerId, StoreId};
use uuid::Uuid;

struct Sim {
    now_ms: u64,
    nodes: Vec<NodeView>,
    stores: Vec<StoreView>,
    volume: VolumeRecord,
    leftovers: Vec<LeftoverRecord>,
    moved: Vec<(VolumeId, SetIndex)>,
    /// The last look.
    wanted: Wanted,
}

fn id(n: u128) -> NodeId {
    NodeId(Uuid::from_u128(n))
}

impl Sim {
    fn new(count: u128, replicas: u32) -> Sim {
        let store = |n: u128| StoreView {
            at: ClusterStore {
                id: StoreId(Uuid::from_u128(100 + n)),
                node: id(n),
                zone: None,
                free_blocks: 10_000,
            },
            capacity_blocks: 10_000,
        };
        let stores: Vec<StoreView> = (1..=count).map(store).collect();
        let places: Vec<ClusterStore> = stores.iter().map(|s| s.at.clone()).collect();
        // Opened by a node without a store: none of the others has more than its share.
        let home = NodeId(Uuid::nil());
        let chosen = spread(&places, replicas as usize, (2 << 30) / CHUNK_BYTES, home);
        let replica = |at: usize| Replica::in_sync(places[at].node, places[at].id);
        let sets = chosen.expect("places").into_iter().map(|set| ReplicaSet {
            replicas: set.into_iter().map(replica).collect(),
        });
        let volume = VolumeRecord {
            min_in_sync: 1,
            epoch: Epoch(1),
            // Its last node: the tests let the first ones die.
            head: Some(HeadClaim {
                node: id(count),
                incarnation: Uuid::from_u128(5),
            }),
            never_written: false,
            ..VolumeRecord::new(
                VolumeId(Uuid::from_u128(1)),
                VolumeName::parse("v").expect("a name"),
                2 << 30,
                LayerId(1),
                Placement {
                    stores: vec![],
                    sets: sets.collect(),
                },
            )
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
            leftovers: Vec::new(),
            moved: Vec::new(),
            wanted: Wanted::default(),
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
            let used = has.filter(|r| r.store == store.at.id).count() as u64 * 100;
            store.at.free_blocks = store.capacity_blocks - used;
        }
    }

    fn look(&mut self) -> Vec<Change> {
        let view = View {
            now_ms: self.now_ms,
            nodes: &self.nodes,
            stores: &self.stores,
            volumes: std::slice::from_ref(&self.volume),
            leftovers: &self.leftovers,
            moved: &self.moved,
        };
        self.wanted = wanted_changes(&ControllerParams::default(), &view);
        self.wanted
            .changes
            .iter()
            .map(|(_, change)| *change)
            .collect()
    }

    /// A second passes. `dead` is not heard of.
    fn second(&mut self, dead: Option<NodeId>) -> usize {
        self.now_ms += 1_000;
        for node in &mut self.nodes {
            if Some(node.node) != dead {
                node.seen_at_ms = self.now_ms;
            }
        }
        let wanted = self.look();
        let count = wanted.len();
        if count > 0 {
            self.moved.extend(&self.wanted.spread);
            let current = Versioned {
                record: self.volume.clone(),
                changed_at: Revision(1),
            };
            let (record, _) = change_all(&current, &wanted).expect("changes that can be made");
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
            let nodes = || set.replicas.iter().map(|r| r.node);
            assert!(
                nodes().all(|node| nodes().filter(|other| *other == node).count() == 1),
                "never two on one node"
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
        at: ClusterStore {
            id: StoreId(Uuid::from_u128(109)),
            node: id(9),
            zone: None,
            free_blocks: 10_000,
        },
        capacity_blocks: 10_000,
    });
    for _ in 0..400 {
        sim.second(None);
    }
    // 64 replicas on four nodes, all alike: each ends with its sixteen.
    assert_eq!(sim.on(id(9)), 16);
    assert_eq!(sim.second(None), 0, "and then it rests");
    for node in 1..=3 {
        assert_eq!(sim.on(id(node)), 16);
    }
}

#[test]
fn nodes_of_different_sizes_are_filled_in_proportion() {
    let mut sim = Sim::new(4, 2);
    sim.stores[3].capacity_blocks *= 2;
    sim.count_room();
    for _ in 0..400 {
        sim.second(None);
    }
    // 64 replicas on five shares: twice as many on the large one, to within one.
    let large = sim.on(id(4));
    assert!((24..=27).contains(&large), "{large}");
}

#[test]
fn a_drain_that_is_cancelled_leaves_what_has_not_moved() {
    let mut sim = Sim::new(4, 3);
    sim.nodes[1].draining = true;
    let before = sim.on(id(2));
    sim.second(None);
    let left = sim.on(id(2));
    assert!(left < before && left > 0, "{left} of {before}");
    sim.nodes[1].draining = false;
    for _ in 0..100 {
        sim.second(None);
    }
    let all = sim
        .volume
        .placement
        .sets
        .iter()
        .flat_map(|set| &set.replicas);
    assert!(all.clone().all(|replica| !replica.leaving));
    assert_eq!(all.count(), 96);
}

#[test]
fn what_cannot_move_is_told_and_stays() {
    let mut sim = Sim::new(3, 3);
    sim.nodes[0].draining = true;
    sim.second(None);
    sim.second(None);
    assert_eq!(sim.wanted.stuck.len(), 32);
    assert_eq!(sim.on(id(1)), 32);
    // A fourth that is full is no help.
    sim.nodes.push(NodeView {
        node: id(9),
        seen_at_ms: sim.now_ms,
        draining: false,
    });
    let mut full = sim.stores[0].clone();
    full.at.node = id(9);
    full.at.id = StoreId(Uuid::from_u128(109));
    full.at.free_blocks = 900;
    sim.stores.push(full);
    assert_eq!(sim.look(), []);
}

#[test]
fn a_node_that_was_replaced_and_comes_back_is_one_too_many() {
    let mut sim = Sim::new(4, 3);
    let dead = id(1);
    for _ in 0..601 {
        sim.second(Some(dead));
    }
    for _ in 0..100 {
        sim.second(None);
    }
    for set in &sim.volume.placement.sets {
        assert_eq!(set.replicas.len(), 3);
        assert_eq!(set.in_sync().count(), 3);
    }
}

#[test]
fn a_replica_on_its_way_to_a_node_that_dies_does_not_keep_others_waiting() {
    let mut sim = Sim::new(5, 3);
    // Four are being filled on a node that goes, and two copies of others are lost with it.
    let to = id(4);
    let mut filled = 0;
    for set in &mut sim.volume.placement.sets {
        if filled < 4 && set.replicas.iter().all(|replica| replica.node != to) {
            let store = StoreId(Uuid::from_u128(104));
            set.replicas.push(Replica::joining(to, store, Revision(1)));
            filled += 1;
        }
    }
    assert_eq!(filled, 4);
    for _ in 0..1_000 {
        sim.second(Some(to));
    }
    assert_eq!(sim.on(to), 0);
    for set in &sim.volume.placement.sets {
        assert_eq!(set.in_sync().count(), 3);
    }
}

#[test]
fn nothing_is_begun_that_nobody_would_carry_out() {
    let mut sim = Sim::new(4, 3);
    sim.nodes[1].draining = true;
    sim.volume.head = None;
    assert!(
        sim.look()
            .iter()
            .all(|change| matches!(change, Change::Leave { .. }))
    );
    assert_eq!(sim.wanted.unserved, [sim.volume.id]);
    // Its node is away, but not for long.
    sim.volume.head = Some(HeadClaim {
        node: id(3),
        incarnation: Uuid::from_u128(5),
    });
    sim.now_ms += 60_000;
    for node in [0, 1, 3] {
        sim.nodes[node].seen_at_ms = sim.now_ms;
    }
    assert!(
        sim.look()
            .iter()
            .all(|change| matches!(change, Change::Leave { .. }))
    );
    assert_eq!(sim.wanted.unserved, []);
    sim.now_ms += 600_000;
    sim.look();
    assert_eq!(sim.wanted.unserved, [sim.volume.id]);
}

#[test]
fn a_store_gets_no_set_of_which_it_has_yet_to_give_blocks_back() {
    let mut sim = Sim::new(4, 3);
    sim.nodes[1].draining = true;
    let store = |n: u128| StoreId(Uuid::from_u128(100 + n));
    for set in 0..32 {
        for n in [1, 3, 4] {
            let left = LeftoverRecord::of(&sim.volume, SetIndex(set), id(n), store(n));
            sim.leftovers.push(left);
        }
    }
    let changes = sim.look();
    assert!(
        changes
            .iter()
            .all(|change| matches!(change, Change::Leave { .. }))
    );
    sim.leftovers.clear();
    let changes = sim.look();
    assert!(
        changes
            .iter()
            .any(|change| matches!(change, Change::Add { .. }))
    );
}

/// Seconds until the controller wants nothing any more.
fn settle(sim: &mut Sim) -> usize {
    (1..2_000)
        .find(|_| sim.second(None) == 0)
        .expect("it comes to rest")
}

#[test]
fn copies_keep_to_the_zones_of_their_volume() {
    let mut sim = Sim::new(4, 3);
    let zone = |sim: &mut Sim, at: usize, zone: &str| {
        sim.stores[at].at.zone = Some(zone.to_owned());
    };
    (0..3).for_each(|at| zone(&mut sim, at, "a"));
    zone(&mut sim, 3, "b");
    let sets = sim.volume.placement.sets.len();
    assert!(sim.on(id(4)) > 0);
    // Confined: what lies elsewhere moves, and an empty store elsewhere tempts nobody.
    sim.volume.zones = Zones::check(["a".to_owned()]).expect("a zone");
    settle(&mut sim);
    assert_eq!([1, 2, 3, 4].map(|n| sim.on(id(n))), [sets, sets, sets, 0]);
    assert!(sim.wanted.stuck.is_empty());
    // A node is in another zone now, and none is left that could take its copies: they stay, and it is said.
    zone(&mut sim, 2, "b");
    settle(&mut sim);
    assert_eq!(sim.on(id(3)), sets);
    assert_eq!(sim.wanted.stuck.len(), sets);
    // It was a mistake, and nothing came of it.
    zone(&mut sim, 2, "a");
    settle(&mut sim);
    assert_eq!(sim.on(id(3)), sets);
    assert!(sim.wanted.stuck.is_empty());
    let sets_now = &sim.volume.placement.sets;
    assert!(
        sets_now
            .iter()
            .flat_map(|set| &set.replicas)
            .all(|r| !r.leaving)
    );
    // A second zone: one of them goes where there is room.
    sim.volume.zones = Zones::check(["a".to_owned(), "b".to_owned()]).expect("zones");
    settle(&mut sim);
    assert!(sim.on(id(4)) > 0);
}

#[test]
fn a_store_that_is_not_known_is_not_taken_for_one_elsewhere() {
    let mut sim = Sim::new(3, 3);
    for store in &mut sim.stores {
        store.at.zone = Some("a".to_owned());
    }
    sim.volume.zones = Zones::check(["a".to_owned()]).expect("a zone");
    sim.stores.pop();
    assert_eq!(sim.second(None), 0);
    assert!(sim.wanted.stuck.is_empty());
}

/// Of one set: a replica of each of these nodes, in the order they are named.
fn set_of(sim: &mut Sim, replicas: &[(u128, ReplicaState)]) {
    let replica = |(n, state): &(u128, ReplicaState)| {
        let mut replica = Replica::in_sync(id(*n), StoreId(Uuid::from_u128(100 + n)));
        replica.state = *state;
        replica
    };
    sim.volume.placement.sets = vec![ReplicaSet {
        replicas: replicas.iter().map(replica).collect(),
    }];
    sim.count_room();
}

#[test]
fn a_copy_that_is_nearly_made_is_given_up_only_for_another() {
    let mut sim = Sim::new(5, 3);
    use ReplicaState::{InSync, Joining};
    set_of(&mut sim, &[(1, InSync), (2, InSync), (4, Joining)]);
    sim.volume.head = Some(HeadClaim {
        node: id(1),
        incarnation: Uuid::from_u128(5),
    });
    let set = SetIndex(0);
    let store = |n: u128| StoreId(Uuid::from_u128(100 + n));
    sim.nodes.retain(|view| view.node != id(3));
    let fifth = sim.nodes.pop().expect("a node");
    sim.nodes[2].draining = true;
    assert_eq!(
        sim.look(),
        [Change::Leave {
            set,
            store: store(4),
            leaving: true
        }]
    );
    assert_eq!(sim.wanted.stuck, [(sim.volume.id, set)]);
    sim.nodes.push(fifth);
    assert_eq!(
        sim.look(),
        [
            Change::Add {
                set,
                node: id(5),
                store: store(5)
            },
            Change::Remove {
                set,
                store: store(4)
            }
        ]
    );
}

#[test]
fn what_is_missing_comes_before_what_is_astray() {
    let mut sim = Sim::new(5, 1);
    let set = |n: u128| ReplicaSet {
        replicas: vec![Replica::in_sync(id(n), StoreId(Uuid::from_u128(100 + n)))],
    };
    // Many copies are in the wrong zone, and each of them has a place in the right one.
    for store in &mut sim.stores {
        let zone = if store.at.node == id(5) { "a" } else { "b" };
        store.at.zone = Some(zone.to_owned());
    }
    sim.volume.placement.sets = (0..8).map(|at| set(1 + at % 4)).collect();
    sim.volume.zones = Zones::check(["a".to_owned()]).expect("a zone");
    sim.count_room();
    let moves = ControllerParams::default().moves;
    assert_eq!(sim.look().len(), moves);
    assert!(sim.wanted.spread.is_empty(), "not to spread the load");
    // Those of a node that is drained have no copy that stays: they are served first.
    sim.nodes[3].draining = true;
    let wanted = sim.look();
    let added = wanted
        .iter()
        .filter(|what| matches!(what, Change::Add { .. }));
    assert_eq!(added.count(), moves, "{wanted:?}");
    assert!(
        !wanted
            .iter()
            .any(|what| matches!(what, Change::Move { .. })),
        "{wanted:?}"
    );
}
