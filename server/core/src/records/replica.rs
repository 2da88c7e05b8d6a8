//! Replicas of a volume as its record has them: where they are, and which hold every acknowledged write.

use serde::{Deserialize, Serialize};

use super::Revision;
use crate::units::{NodeId, StoreId, Version};

/// Most replicas of one set, those that are being filled or have fallen behind included: a head keeps them in a byte
/// of bits.
pub const REPLICAS_MAX: usize = 8;
/// Most copies that anybody may ask for: one place is for the copy that replaces another.
pub const COPIES_MAX: u32 = REPLICAS_MAX as u32 - 1;

/// A replica set, by its place in the placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetIndex(pub u16);

/// What a replica is to its set. Only a head changes what is in sync, by a compare-and-swap that raises the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaState {
    /// Holds every acknowledged write.
    InSync,
    /// Fell behind; filled again by what it lacks when it returns.
    Out,
    /// New, or on its way to being in sync for the first time. Counts for nothing.
    Joining,
}

/// One copy of the chunks of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replica {
    /// The daemon that has it.
    pub node: NodeId,
    /// The store of that daemon.
    pub store: StoreId,
    /// What it counts for.
    pub state: ReplicaState,
    /// Of a replica that is not in sync: a block whose newest version is below this, here and on the replicas in sync,
    /// is the same on both, and need not be compared. Zero: compare everything.
    #[serde(default, skip_serializing_if = "nothing_known")]
    pub synced_below: Version,
    /// Wanted away: the head takes it out of the set once the others suffice without it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Of one that was added to its set: the revision of the record that it was added to. A replica that was forgotten,
    /// gave its blocks back and was added again is told by it from the one it was before.
    #[serde(default, skip_serializing_if = "never_added")]
    pub added_at: u64,
}

fn never_added(added_at: &u64) -> bool {
    *added_at == 0
}

fn nothing_known(version: &Version) -> bool {
    *version == Version::NONE
}

impl Replica {
    /// A replica of a new volume.
    pub fn in_sync(node: NodeId, store: StoreId) -> Replica {
        Replica {
            node,
            store,
            state: ReplicaState::InSync,
            synced_below: Version::NONE,
            leaving: false,
            added_at: 0,
        }
    }

    /// A replica with nothing in it yet, added to the record of that revision.
    pub fn joining(node: NodeId, store: StoreId, added_at: Revision) -> Replica {
        Replica {
            state: ReplicaState::Joining,
            added_at: added_at.0,
            ..Replica::in_sync(node, store)
        }
    }

    /// Holds every acknowledged write.
    pub fn is_in_sync(&self) -> bool {
        self.state == ReplicaState::InSync
    }
}

/// The copies of every chunk that is dealt to one entry of a placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaSet {
    /// On different stores; at least one is in sync.
    pub replicas: Vec<Replica>,
}

impl ReplicaSet {
    /// Replicas that hold every acknowledged write.
    pub fn in_sync(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(|replica| replica.is_in_sync())
    }

    /// What must hold for every set that was ever written.
    pub fn check_invariants(&self) -> Result<(), &'static str> {
        if self.replicas.is_empty() || self.replicas.len() > REPLICAS_MAX {
            return Err("a replica set is not of one to eight replicas");
        }
        if self.in_sync().next().is_none() {
            return Err("a replica set with nothing in sync");
        }
        let twice = |(index, replica): (usize, &Replica)| {
            self.replicas[..index]
                .iter()
                .any(|other| other.store == replica.store)
        };
        if self.replicas.iter().enumerate().any(twice) {
            return Err("a store twice in a replica set");
        }
        Ok(())
    }
}

/// Copies that must be in sync for a write to be answered, unless somebody chose otherwise: 1 of 1, 1 of 2, and the
/// majority from 3 on. With 2 copies a majority would be both, and the loss of either would stop all writes.
pub fn default_min_in_sync(replicas: u32) -> u32 {
    match replicas {
        0..=2 => 1,
        more => more / 2 + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn replica(n: u128, state: ReplicaState) -> Replica {
        Replica {
            state,
            ..Replica::in_sync(NodeId(Uuid::from_u128(n)), StoreId(Uuid::from_u128(n)))
        }
    }

    #[test]
    fn the_stored_form_is_fixed() {
        let set = ReplicaSet {
            replicas: vec![
                replica(1, ReplicaState::InSync),
                Replica {
                    synced_below: Version(9),
                    leaving: true,
                    ..replica(2, ReplicaState::Out)
                },
            ],
        };
        let stored = concat!(
            r#"{"replicas":[{"node":"00000000-0000-0000-0000-000000000001","store":"00000000-0000-0000-0000-000000000001","#,
            r#""state":"in-sync"},{"node":"00000000-0000-0000-0000-000000000002","#,
            r#""store":"00000000-0000-0000-0000-000000000002","state":"out","synced_below":9,"leaving":true}]}"#
        );
        assert_eq!(serde_json::to_string(&set).expect("text"), stored);
        assert_eq!(
            serde_json::from_str::<ReplicaSet>(stored).expect("set"),
            set
        );
    }

    #[test]
    fn invariants_are_seen() {
        let set = |replicas| ReplicaSet { replicas }.check_invariants();
        assert!(set(vec![]).is_err());
        assert!(set(vec![replica(1, ReplicaState::Out)]).is_err());
        assert!(
            set(vec![
                replica(1, ReplicaState::InSync),
                replica(1, ReplicaState::Joining)
            ])
            .is_err()
        );
        assert!(
            set(vec![
                replica(1, ReplicaState::InSync),
                replica(2, ReplicaState::Joining)
            ])
            .is_ok()
        );
    }

    #[test]
    fn how_many_must_be_in_sync() {
        assert_eq!([1, 2, 3, 4, 5].map(default_min_in_sync), [1, 1, 2, 3, 3]);
    }
}
