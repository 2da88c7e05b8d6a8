//! On which nodes the replicas of a volume go: never two of a set on one node, on different zones where there are
//! enough, and evenly by free room.

use crate::records::{PLACEMENT_ENTRIES_MAX, Replica, ReplicaSet};
use crate::units::{CHUNK_BYTES, NodeId, StoreId};

/// Most sets of a new volume. More would move smaller pieces when nodes come and go; each costs a little at every
/// heartbeat and half a kilobyte in the record.
const SETS: u64 = 32;
const _: () = assert!(SETS as usize <= PLACEMENT_ENTRIES_MAX);

/// A store that may take replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its daemon.
    pub node: NodeId,
    /// Where the daemon is; nodes with the same name may fail together. Empty: nobody said.
    pub zone: String,
    /// The store.
    pub store: StoreId,
    /// Blocks that can still be written.
    pub free_blocks: u64,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// Each replica of a set needs a node of its own.
    #[error("{replicas} replicas need {replicas} nodes with a usable store, and there are {nodes}")]
    TooFewNodes {
        /// How many were asked for.
        replicas: u32,
        /// Nodes with a store.
        nodes: u32,
    },
}

/// Chooses the sets of a new volume. `turn`: any number that differs from volume to volume, so that small volumes do not
/// all begin on the same nodes.
pub fn choose_sets(
    candidates: &[Candidate],
    replicas: u32,
    size_bytes: u64,
    turn: u64,
) -> Result<Vec<ReplicaSet>, PlacementError> {
    let mut nodes: Vec<NodeId> = candidates.iter().map(|c| c.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    if (nodes.len() as u32) < replicas || replicas == 0 {
        return Err(PlacementError::TooFewNodes {
            replicas,
            nodes: nodes.len() as u32,
        });
    }
    let sets = size_bytes.div_ceil(CHUNK_BYTES).clamp(1, SETS);
    let mut given = vec![0u64; candidates.len()];
    let start = (turn % candidates.len() as u64) as usize;
    let mut chosen = Vec::new();
    for _ in 0..sets {
        let mut set: Vec<usize> = Vec::new();
        for _ in 0..replicas {
            let taken: Vec<&Candidate> = set.iter().map(|at| &candidates[*at]).collect();
            // There are as many nodes as replicas, so there always is one.
            let Some(best) = best_for(candidates, &taken, &given, start) else {
                break;
            };
            given[best] += 1;
            set.push(best);
        }
        chosen.push(ReplicaSet {
            replicas: set
                .iter()
                .map(|at| Replica::in_sync(candidates[*at].node, candidates[*at].store))
                .collect(),
        });
    }
    Ok(chosen)
}

/// Where one more replica goes beside `taken`: a node that has none, in a zone that has none if there is one, with the
/// most room for what it was given already. `None`: every node has one.
fn best_for(
    candidates: &[Candidate],
    taken: &[&Candidate],
    given: &[u64],
    start: usize,
) -> Option<usize> {
    let count = candidates.len();
    let zone_is_free = |c: &Candidate| c.zone.is_empty() || taken.iter().all(|t| t.zone != c.zone);
    // Sainte-Laguë: room divided by what was given, so that every stretch of the list is even; a full store only when
    // nothing else is left.
    let weight =
        |at: usize| (u128::from(candidates[at].free_blocks) << 32) / u128::from(2 * given[at] + 1);
    (0..count)
        .map(|at| (at + start) % count)
        .filter(|at| taken.iter().all(|t| t.node != candidates[*at].node))
        .map(|at| (zone_is_free(&candidates[at]), weight(at), at))
        .reduce(|best, next| {
            if (next.0, next.1) > (best.0, best.1) {
                next
            } else {
                best
            }
        })
        .map(|(_, _, at)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn candidate(n: u128, zone: &str, free_blocks: u64) -> Candidate {
        Candidate {
            node: NodeId(Uuid::from_u128(n)),
            zone: zone.to_owned(),
            store: StoreId(Uuid::from_u128(1000 + n)),
            free_blocks,
        }
    }

    /// How many of `sets` sets each node should be in: in proportion to its room, but in none twice, so that what is too
    /// much for a large node falls to the others.
    fn fair_shares(free: &[u64], sets: f64, replicas: f64) -> Vec<f64> {
        let at = |level: f64| {
            free.iter()
                .map(move |free| (*free as f64 * level).min(sets))
        };
        let (mut low, mut high) = (0.0, sets);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if at(middle).sum::<f64>() < sets * replicas {
                low = middle;
            } else {
                high = middle;
            }
        }
        at(high).collect()
    }

    #[test]
    fn too_few_nodes_are_counted() {
        let two = [candidate(1, "", 9), candidate(2, "", 9)];
        assert_eq!(
            choose_sets(&two, 3, 1 << 30, 0),
            Err(PlacementError::TooFewNodes {
                replicas: 3,
                nodes: 2
            })
        );
    }

    #[test]
    fn zones_differ_where_there_are_enough() {
        let nodes = [
            candidate(1, "a", 900),
            candidate(2, "a", 900),
            candidate(3, "b", 100),
            candidate(4, "b", 100),
        ];
        for set in choose_sets(&nodes, 2, 4 << 30, 3).expect("places") {
            let zone = |replica: &Replica| {
                let node = nodes.iter().find(|c| c.node == replica.node);
                node.map(|c| c.zone.clone())
            };
            assert_ne!(zone(&set.replicas[0]), zone(&set.replicas[1]));
        }
    }

    proptest! {
        #[test]
        fn sets_are_valid_and_even(
            free in prop::collection::vec(1_000..2_000u64, 3..8),
            replicas in 1..4u32,
            turn in any::<u64>(),
        ) {
            let nodes: Vec<Candidate> = (1..)
                .zip(&free)
                .map(|(n, free)| candidate(n, "", *free))
                .collect();
            let sets = choose_sets(&nodes, replicas, 4 << 30, turn).expect("places");
            prop_assert_eq!(sets.len(), 32);
            let shares = fair_shares(&free, 32.0, f64::from(replicas));
            for set in &sets {
                prop_assert_eq!(set.check_invariants(), Ok(()));
                prop_assert_eq!(set.replicas.len() as u32, replicas);
            }
            for (node, fair) in nodes.iter().zip(shares) {
                let has = sets
                    .iter()
                    .filter(|set| set.replicas.iter().any(|replica| replica.node == node.node))
                    .count() as f64;
                prop_assert!(has >= fair * 0.6 - 2.0 && has <= fair * 1.5 + 2.0, "{has} of {fair}");
            }
        }
    }
}
