//! On which stores of a node the chunks of a new volume go.
//!
//! The answer is a *deal*: a short list of stores in which a store may come more than once. Chunk `c` of the volume goes
//! to entry `c mod n` of the list ([`crate::records::Placement::store_of`]). A store with twice the free space comes
//! twice as often, so stores of different sizes fill up together, and every stretch of the list is as even as it can be,
//! so neighbouring chunks lie on different stores. The list is all a record has to hold, however large the volume grows.

mod room;
mod spread;

pub use room::{promised, room_for};
pub use spread::{ClusterStore, TooFewNodes, spread};

use crate::units::StoreId;

/// Longest deal, unless there are more stores. With 64 entries a store's share is right to about 1 %, and the list is
/// 2.5 KiB in a record.
const DEAL_ENTRIES: usize = 64;
/// Most entries of any deal: a head counts what is durable per entry, in a byte.
const MAX_ENTRIES: usize = 256;

/// A store and its room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreSpace {
    /// The store.
    pub id: StoreId,
    /// Blocks that can still be written.
    pub free_blocks: u64,
}

/// Deals chunks out over `stores` in proportion to their free space; empty only when `stores` is.
///
/// Stores without room are left out while others have some. `turn` says where in the list to begin (any number that
/// differs from volume to volume), so that many volumes of one chunk do not all begin on the same store.
///
/// The sequence is Sainte-Laguë's: each entry goes to the store with the largest `free / (2 * entries so far + 1)`, the
/// earlier one on a tie. Every prefix of it is proportional, which is what makes it even.
pub fn deal(stores: &[StoreSpace], turn: u64) -> Vec<StoreId> {
    let full = stores.iter().all(|store| store.free_blocks == 0);
    let weights: Vec<u128> = stores
        .iter()
        .map(|store| u128::from(if full { 1 } else { store.free_blocks }))
        .collect();
    let entries = if alike(&weights) {
        stores.len()
    } else {
        stores.len().max(DEAL_ENTRIES)
    }
    .min(MAX_ENTRIES);
    let mut dealt = vec![0u128; stores.len()];
    let mut deal = Vec::with_capacity(entries);
    for _ in 0..entries {
        let mut best = 0;
        for next in 1..stores.len() {
            let (of_best, of_next) = (2 * dealt[best] + 1, 2 * dealt[next] + 1);
            if weights[next] * of_best > weights[best] * of_next {
                best = next;
            }
        }
        dealt[best] += 1;
        deal.push(stores[best].id);
    }
    if !deal.is_empty() {
        let start = (turn % deal.len() as u64) as usize;
        deal.rotate_left(start);
    }
    deal
}

/// Within an eighth of each other: not worth more than one entry each.
fn alike(weights: &[u128]) -> bool {
    let most = weights.iter().max().copied().unwrap_or(0);
    weights.iter().all(|weight| weight * 8 >= most * 7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn spaces(free: &[u64]) -> Vec<StoreSpace> {
        (0u128..)
            .zip(free)
            .map(|(id, free_blocks)| StoreSpace {
                id: StoreId(Uuid::from_u128(id)),
                free_blocks: *free_blocks,
            })
            .collect()
    }

    fn dealt(free: &[u64], turn: u64) -> Vec<u128> {
        deal(&spaces(free), turn)
            .into_iter()
            .map(|store| store.0.as_u128())
            .collect()
    }

    #[test]
    fn stores_alike_get_one_entry_each() {
        assert_eq!(dealt(&[], 0), [0u128; 0]);
        assert_eq!(dealt(&[5], 9), [0]);
        assert_eq!(dealt(&[100, 100, 100], 0), [0, 1, 2]);
        assert_eq!(dealt(&[100, 95, 90], 1).len(), 3);
        assert_eq!(dealt(&[100, 100, 100], 4), [1, 2, 0]);
    }

    #[test]
    fn twice_the_room_is_dealt_twice_as_often_and_evenly() {
        let list = dealt(&[200, 100], 0);
        assert_eq!(list.len(), 64);
        assert!(
            list.chunks_exact(3)
                .all(|three| three.iter().filter(|s| **s == 0).count() == 2)
        );
    }

    #[test]
    fn full_stores_are_left_out_while_others_have_room() {
        assert!(dealt(&[0, 7, 0], 0).iter().all(|store| *store == 1));
        assert_eq!(dealt(&[0, 0], 0), [0, 1]);
    }

    proptest! {
        #[test]
        fn shares_follow_free_space(free in prop::collection::vec(0..1u64 << 40, 1..8), turn in any::<u64>()) {
            let list = dealt(&free, turn);
            let total: u128 = free.iter().map(|f| u128::from(*f)).sum();
            prop_assert!(!list.is_empty() && list.len() <= MAX_ENTRIES);
            if total > 0 && list.len() == DEAL_ENTRIES {
                for (store, free) in free.iter().enumerate() {
                    let entries = list.iter().filter(|s| **s == store as u128).count() as f64;
                    let fair = *free as f64 * list.len() as f64 / total as f64;
                    prop_assert!((entries - fair).abs() < 3.0, "{} entries, fair is {}", entries, fair);
                }
            }
            // The turn changes where the list begins and nothing else.
            let mut straight = dealt(&free, 0);
            let mut turned = list;
            straight.sort_unstable();
            turned.sort_unstable();
            prop_assert_eq!(straight, turned);
        }

        #[test]
        fn no_numbers_overflow(free in prop::collection::vec(any::<u64>(), 0..300), turn in any::<u64>()) {
            prop_assert_eq!(dealt(&free, turn).is_empty(), free.is_empty());
        }
    }
}
