//! What others than a head may change, and what they may not.

use super::*;
use crate::records::{Placement, ReplicaSet, Revision, VolumeName};
use crate::units::{Epoch, LayerId, VolumeId};
use uuid::Uuid;

fn node(n: u128) -> NodeId {
    NodeId(Uuid::from_u128(n))
}

fn store(n: u128) -> StoreId {
    StoreId(Uuid::from_u128(100 + n))
}

fn volume() -> Versioned<VolumeRecord> {
    let replicas = (1..=3).map(|n| Replica::in_sync(node(n), store(n)));
    let set = ReplicaSet {
        replicas: replicas.collect(),
    };
    Versioned {
        record: VolumeRecord {
            epoch: Epoch(4),
            never_written: false,
            ..VolumeRecord::new(
                VolumeId(Uuid::from_u128(7)),
                VolumeName::parse("v").expect("a name"),
                2 << 30,
                LayerId(1),
                Placement {
                    stores: vec![],
                    sets: vec![set.clone(), set],
                },
            )
        },
        changed_at: Revision(9),
    }
}

#[test]
fn nothing_of_it_touches_what_is_in_sync() {
    let set = SetIndex(0);
    let current = volume();
    let remove = Change::Remove {
        set,
        store: store(1),
    };
    assert_eq!(change(&current, remove), Err(ChangeError::InSync));
    let add = Change::Add {
        set,
        node: node(4),
        store: store(4),
    };
    let (added, transaction) = change(&current, add).expect("adds");
    assert_eq!(added.epoch, current.record.epoch);
    assert_eq!(added.placement.sets[0].in_sync().count(), 3);
    // Not while it has yet to give back what it had of the set.
    let left = keys::leftover(current.record.id, set, store(4));
    assert!(transaction.conditions.iter().any(|c| c.key() == left));
    assert_eq!(
        change(
            &Versioned {
                record: added,
                ..current
            },
            add
        ),
        Err(ChangeError::AlreadyThere(store(4)))
    );
}

#[test]
fn what_is_forgotten_leaves_a_note_for_its_store() {
    let mut current = volume();
    current.record.placement.sets[1].replicas[2].state = ReplicaState::Out;
    let remove = Change::Remove {
        set: SetIndex(1),
        store: store(3),
    };
    let (record, transaction) = change(&current, remove).expect("removes");
    assert_eq!(record.placement.sets[1].replicas.len(), 2);
    let left = LeftoverRecord::of(&current.record, SetIndex(1), node(3), store(3));
    assert!(transaction.effects.iter().any(|e| e.key() == left.key()));
}

#[test]
fn several_changes_are_one_transaction() {
    let current = volume();
    let moves: Vec<Change> = (0..2)
        .map(|set| Change::Move {
            set: SetIndex(set),
            from: store(1),
            node: node(4),
            store: store(4),
        })
        .collect();
    let (record, transaction) = change_all(&current, &moves).expect("moves");
    assert_eq!(transaction.twice_changed_key(), None);
    assert_eq!(transaction.conditions.len(), 3);
    assert_eq!(transaction.effects.len(), 1);
    for set in &record.placement.sets {
        assert_eq!(set.replicas.len(), 4);
        assert!(set.replicas[0].leaving);
        assert_eq!(set.check_invariants(), Ok(()));
    }
    // One that cannot be made spoils all.
    let wrong = [moves[0], moves[0]];
    assert_eq!(
        change_all(&current, &wrong),
        Err(ChangeError::AlreadyThere(store(4)))
    );
}

#[test]
fn a_store_does_not_leave_a_set_and_join_it_at_once() {
    let mut current = volume();
    current.record.placement.sets[1].replicas[2].state = ReplicaState::Out;
    let (set, store, node) = (SetIndex(1), store(3), node(3));
    let both = [
        Change::Remove { set, store },
        Change::Add { set, node, store },
    ];
    assert_eq!(change_all(&current, &both), Err(ChangeError::LeavesFirst));
}
