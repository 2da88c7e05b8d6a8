use super::*;
use crate::store::BlockState;

fn data(version: u64, crc: u32) -> BlockSum {
    BlockSum {
        state: BlockState {
            version: Version(version),
            content: BlockContent::Data,
        },
        crc,
    }
}

fn zeros(version: u64) -> BlockSum {
    BlockSum {
        state: BlockState {
            version: Version(version),
            content: BlockContent::Zeros,
        },
        crc: 0,
    }
}

fn lost() -> BlockSum {
    BlockSum {
        state: BlockState {
            version: Version(9),
            content: BlockContent::Lost,
        },
        crc: 0,
    }
}

const HOLE: BlockSum = BlockSum {
    state: BlockState::HOLE,
    crc: 0,
};

/// One block of each copy, the same at both looks.
fn settled(copies: &[BlockSum]) -> LeafVerdict {
    let leaves: Vec<LeafSums> = copies.iter().map(|sum| vec![*sum]).collect();
    compare(&leaves, &leaves)
}

#[test]
fn copies_that_read_the_same_are_alike() {
    for alike in [
        [data(3, 1), data(3, 1), data(3, 1)],
        [HOLE, zeros(3), zeros(4)],
        // One that is known to be damaged is read elsewhere and mended then.
        [data(3, 1), lost(), data(3, 1)],
        // The same bytes twice.
        [data(3, 1), data(2, 1), data(3, 1)],
    ] {
        let verdict = settled(&alike);
        assert_eq!((verdict.blocks, verdict.changing), (0, 0), "{alike:?}");
        assert!(!verdict.is_mendable);
    }
}

#[test]
fn the_older_version_is_wrong() {
    let verdict = settled(&[data(3, 1), data(2, 7), data(3, 1)]);
    assert_eq!((verdict.blocks, verdict.wrong), (1, vec![1]));
    assert!(verdict.is_mendable);
    let verdict = settled(&[HOLE, data(3, 1)]);
    assert_eq!((verdict.wrong, verdict.is_mendable), (vec![0], true));
}

#[test]
fn one_version_with_two_contents_has_no_right_copy() {
    let verdict = settled(&[data(3, 1), data(3, 2)]);
    assert_eq!((verdict.blocks, verdict.is_mendable), (1, false));
    assert!(verdict.wrong.is_empty());
    // Damage on the first does not hide that the others differ.
    let verdict = settled(&[lost(), data(3, 1), data(3, 2)]);
    assert_eq!(verdict.blocks, 1);
}

#[test]
fn copies_that_are_each_wrong_somewhere_are_not_mended() {
    let copies = [vec![data(3, 1), data(2, 1)], vec![data(2, 2), data(3, 2)]];
    let verdict = compare(&copies, &copies);
    assert_eq!((verdict.blocks, verdict.is_mendable), (2, false));
    assert!(verdict.wrong.is_empty(), "{verdict:?}");
}

#[test]
fn what_changes_between_the_looks_is_on_its_way() {
    let before = [vec![data(3, 1)], vec![data(3, 1)]];
    let after = [vec![data(4, 2)], vec![data(3, 1)]];
    let verdict = compare(&before, &after);
    assert_eq!((verdict.blocks, verdict.changing), (0, 1));
    // But one version never has two contents.
    let after = [vec![data(4, 2)], vec![data(4, 1)]];
    assert_eq!(compare(&before, &after).blocks, 1);
}

#[test]
fn a_digest_is_of_content_alone() {
    let of = |sums: &[BlockSum]| digest(&sums.to_vec());
    assert_eq!(of(&[HOLE, zeros(3)]), LeafDigest::default());
    assert_eq!(of(&[data(3, 1), HOLE]), of(&[data(4, 1), zeros(9)]));
    assert_ne!(of(&[data(3, 1), HOLE]), of(&[HOLE, data(3, 1)]));
    assert_ne!(of(&[data(3, 1)]), of(&[data(3, 2)]));
    assert_ne!(of(&[data(3, 0)]), of(&[HOLE]));
}
