//! How much volumes with copies can take.

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
    use proptest::prelude::*;

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
