//! How much volumes with copies can take.

use std::collections::BTreeSet;

use crate::records::{VolumeRecord, Zones};
use crate::units::StoreId;

/// Bytes that the copies of a volume may come to take of `stores`, those of some zones: its size for each copy that there
/// should be, if all of them belong there, and else for those that lie there.
pub fn promised(record: &VolumeRecord, zones: &Zones, stores: &BTreeSet<StoreId>) -> u64 {
    let size = u128::from(record.size_bytes);
    let placement = &record.placement;
    let bytes = match zones.include(&record.zones) {
        true => size * u128::from(record.replicas.max(1)),
        false => {
            let entries = placement.stores.len().max(placement.sets.len()).max(1);
            let sole = placement.stores.iter();
            let copies = placement.sets.iter().flat_map(|set| &set.replicas);
            let copies = copies.filter(|replica| !replica.leaving);
            let there = sole
                .chain(copies.map(|replica| &replica.store))
                .filter(|store| stores.contains(store));
            size * there.count() as u128 / entries as u128
        }
    };
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Blocks that volumes of `copies` copies can take together on nodes that have this much room each: no node takes two
/// copies of a block.
pub fn room_for(node_blocks: &[u64], copies: u32) -> u64 {
    let mut sorted = node_blocks.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let mut rest: u128 = sorted.iter().copied().map(u128::from).sum();
    let mut left = u128::from(copies.max(1));
    for largest in sorted.into_iter().map(u128::from) {
        // A node that has more than its share of the rest holds one copy of everything.
        if largest * left <= rest {
            break;
        }
        rest -= largest;
        left -= 1;
    }
    // With one copy left no node has more than the rest, so `left` is never 0.
    u64::try_from(rest / left).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::{Placement, Replica, ReplicaSet, VolumeName};
    use crate::units::{LayerId, NodeId, VolumeId};
    use proptest::prelude::*;
    use uuid::Uuid;

    #[test]
    fn what_is_promised_of_some_stores_is_the_copies_there() {
        let store = |n: u128| StoreId(Uuid::from_u128(n));
        let of = |stores: &[u128]| stores.iter().copied().map(store).collect::<BTreeSet<_>>();
        let volume = |placement: Placement| {
            let (id, name) = (VolumeId(Uuid::from_u128(1)), VolumeName::parse("v"));
            VolumeRecord::new(id, name.expect("a name"), 1 << 20, LayerId(1), placement)
        };
        let set = |stores: [u128; 2]| ReplicaSet {
            replicas: stores
                .map(|n| Replica::in_sync(NodeId(Uuid::from_u128(n)), store(n)))
                .to_vec(),
        };
        let mut two = volume(Placement {
            stores: Vec::new(),
            sets: vec![set([1, 2]), set([1, 3])],
        });
        let zones = |names: &[&str]| {
            Zones::check(names.iter().map(|name| (*name).to_owned())).expect("zones")
        };
        let (all, a) = (zones(&[]), zones(&["a"]));
        assert_eq!(promised(&two, &all, &of(&[1, 2, 3])), 2 << 20);
        assert_eq!(promised(&two, &a, &of(&[1])), 1 << 20);
        assert_eq!(promised(&two, &a, &of(&[2])), 1 << 19);
        assert_eq!(promised(&two, &a, &of(&[4])), 0);
        // What is on its way elsewhere is promised there.
        two.placement.sets[0].replicas[1].leaving = true;
        assert_eq!(promised(&two, &a, &of(&[2])), 0);
        // One that belongs there has its copies there sooner or later, wherever they lie now.
        two.zones = zones(&["a"]);
        assert_eq!(promised(&two, &a, &of(&[2])), 2 << 20);
        assert_eq!(promised(&two, &zones(&["b"]), &of(&[3])), 1 << 19);
        let one = volume(Placement {
            stores: vec![store(1), store(2), store(1), store(1)],
            sets: Vec::new(),
        });
        assert_eq!(promised(&one, &all, &of(&[])), 1 << 20);
        assert_eq!(promised(&one, &a, &of(&[1])), 3 << 18);
    }

    #[test]
    fn no_node_takes_two_copies() {
        assert_eq!(room_for(&[10, 10, 10], 1), 30);
        assert_eq!(room_for(&[10, 10, 10], 2), 15);
        assert_eq!(room_for(&[10, 10, 10], 3), 10);
        assert_eq!(room_for(&[10, 10, 10], 4), 0);
        assert_eq!(room_for(&[100, 3, 4], 2), 7);
        assert_eq!(room_for(&[100, 90, 4], 3), 4);
        assert_eq!(room_for(&[], 1), 0);
        assert_eq!(room_for(&[u64::MAX, u64::MAX], 1), u64::MAX);
    }

    proptest! {
        /// As many blocks fit as every node can take one copy of, and not one more.
        #[test]
        fn it_is_the_most_that_fits(
            nodes in prop::collection::vec(0u64..1000, 0..6),
            copies in 1u32..5,
        ) {
            let fits = |blocks: u64| {
                let taken: u64 = nodes.iter().map(|node| (*node).min(blocks)).sum();
                taken >= blocks * u64::from(copies)
            };
            let room = room_for(&nodes, copies);
            prop_assert!(fits(room));
            prop_assert!(!fits(room + 1));
        }
    }
}
