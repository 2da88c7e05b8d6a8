//! On which nodes the copies of a new volume's chunks go.
//!
//! Each replica set gets stores of different nodes, of different zones while there are unused ones, the emptiest first.
//! Its first copy lies on the node that will serve the volume, where that has a store: reads need no network then.

use crate::records::PLACEMENT_ENTRIES_MAX;
use crate::units::{NodeId, StoreId};

/// Sets of a volume that is spread over more nodes than it has copies: fine enough that nodes fill evenly to about a
/// percent, few enough that a volume's record stays small.
const SETS_MAX: usize = 64;

/// Sets of a volume that has a copy on every node. The number of sets never changes in its life, so this is what can be
/// moved when nodes join.
const SETS_OF_ALL: usize = 32;
const _: () = assert!(SETS_MAX <= PLACEMENT_ENTRIES_MAX && SETS_OF_ALL <= SETS_MAX);

/// A store of a cluster, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterStore {
    /// The store.
    pub id: StoreId,
    /// Whose it is.
    pub node: NodeId,
    /// What fails together; a node without the label is a zone of its own.
    pub zone: Option<String>,
    /// Blocks that can still be written.
    pub free_blocks: u64,
}

/// Why copies cannot be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} copies were asked for and only {nodes} node(s) with room are there")]
pub struct TooFewNodes {
    /// Copies asked for.
    pub wanted: usize,
    /// Nodes with a store that has room.
    pub nodes: usize,
}

/// Replica sets for a volume of `chunks` chunks: for each the places in `stores` of its copies.
pub fn spread(
    stores: &[ClusterStore],
    replicas: usize,
    chunks: u64,
    home: NodeId,
) -> Result<Vec<Vec<usize>>, TooFewNodes> {
    let usable: Vec<usize> = (0..stores.len())
        .filter(|at| stores[*at].free_blocks > 0)
        .collect();
    let mut nodes: Vec<NodeId> = usable.iter().map(|at| stores[*at].node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    if replicas == 0 || nodes.len() < replicas {
        return Err(TooFewNodes {
            wanted: replicas,
            nodes: nodes.len(),
        });
    }
    // Where every store gets a copy of everything, sets are there only to be moved when others join.
    let most = if usable.len() == replicas {
        SETS_OF_ALL
    } else {
        SETS_MAX
    };
    let sets = most.min(usize::try_from(chunks.max(1)).unwrap_or(most));
    let mut given = vec![0u64; stores.len()];
    let mut result = Vec::with_capacity(sets);
    for _ in 0..sets {
        let mut set: Vec<usize> = Vec::with_capacity(replicas);
        while set.len() < replicas {
            let is_new_zone = |at: usize| {
                set.iter().all(|other| {
                    let (zone, other) = (&stores[at].zone, &stores[*other].zone);
                    zone.is_none() || zone != other
                })
            };
            let best = usable
                .iter()
                .copied()
                .filter(|at| {
                    set.iter()
                        .all(|other| stores[*other].node != stores[*at].node)
                })
                .min_by_key(|at| {
                    let store = &stores[*at];
                    let is_home = set.is_empty() && store.node == home;
                    // How full it would be, in parts of a million million of its room.
                    let load = u128::from(given[*at] + 1) * 1_000_000_000_000
                        / u128::from(store.free_blocks);
                    (!is_home, !is_new_zone(*at), load, *at)
                });
            // There are as many nodes as copies, and each is used once.
            let Some(best) = best else { break };
            given[best] += 1;
            set.push(best);
        }
        result.push(set);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn store(node: u128, zone: Option<&str>, free_blocks: u64) -> ClusterStore {
        ClusterStore {
            id: StoreId(Uuid::from_u128(1000 + node)),
            node: NodeId(Uuid::from_u128(node)),
            zone: zone.map(str::to_owned),
            free_blocks,
        }
    }

    #[test]
    fn copies_are_apart_and_the_first_is_at_home() {
        let stores = [
            store(1, Some("a"), 100),
            store(2, Some("a"), 100),
            store(3, Some("b"), 100),
        ];
        let home = NodeId(Uuid::from_u128(2));
        let sets = spread(&stores, 2, 1, home).expect("placed");
        assert_eq!(sets, [vec![1, 2]]);
        assert_eq!(
            spread(&stores, 4, 1, home),
            Err(TooFewNodes {
                wanted: 4,
                nodes: 3
            })
        );
        assert_eq!(spread(&stores, 3, 1000, home).expect("placed").len(), 32);
        assert_eq!(spread(&stores, 3, 2, home).expect("placed").len(), 2);
    }

    proptest! {
        #[test]
        fn no_node_twice_and_even_fill(
            free in prop::collection::vec(1u64..1 << 30, 3..12),
            replicas in 1usize..4,
            chunks in 1u64..10_000,
        ) {
            let stores: Vec<_> =
                (0..).zip(&free).map(|(n, free)| store(n, None, *free)).collect();
            let home = NodeId(Uuid::from_u128(999));
            let sets = spread(&stores, replicas, chunks, home).expect("placed");
            prop_assert!(!sets.is_empty() && sets.len() <= SETS_MAX.max(1));
            for set in &sets {
                prop_assert_eq!(set.len(), replicas);
                let mut nodes: Vec<_> = set.iter().map(|at| stores[*at].node).collect();
                nodes.sort_unstable();
                nodes.dedup();
                prop_assert_eq!(nodes.len(), replicas);
            }
        }
    }
}
