//! What a store says of versions is what was written, wherever it is: in the tail, in a leaf, in a leaf on disk, after
//! the store was opened again.

use std::collections::BTreeMap;

use ashlar_core::store::{BlockContent, BlockState, Geometry, Params};
use ashlar_core::units::{BLOCK_BYTES, ChunkIndex, LEAF_BLOCKS, LayerId, Version};

use crate::ram::{Ram, key};
use crate::rng::Rng;

/// Asks until the leaf is in memory.
fn states(ram: &mut Ram, chunk: u32, leaf: u32) -> Vec<BlockState> {
    for _ in 0..100 {
        match ram.store().leaf_states(key(chunk), leaf).expect("healthy") {
            Some(states) => return states.to_vec(),
            None => {
                ram.run();
            }
        }
    }
    panic!("the leaf is never read");
}

fn check(ram: &mut Ram, model: &BTreeMap<(u32, u32), (Version, bool)>) {
    for chunk in 0..2 {
        for leaf in 0..3 {
            let found = states(ram, chunk, leaf);
            for (block, state) in (leaf * LEAF_BLOCKS..).zip(found) {
                match model.get(&(chunk, block)) {
                    Some((version, true)) => assert_eq!(
                        state,
                        BlockState {
                            version: *version,
                            content: BlockContent::Data
                        },
                        "chunk {chunk} block {block}"
                    ),
                    _ => assert!(
                        state.reads_as_zeros(),
                        "chunk {chunk} block {block}: {state:?}"
                    ),
                }
            }
        }
    }
    // The row's word for a leaf is never below that of a block with data in it.
    let (rows, more) =
        ram.store()
            .row_versions(LayerId(1), ChunkIndex(0), |_| true, Version::NONE, 9);
    assert!(!more);
    for ((chunk, block), (version, is_data)) in model {
        if *is_data {
            let row = rows.iter().find(|(at, _)| at.0 == *chunk).expect("a row");
            assert!(row.1[(block / LEAF_BLOCKS) as usize] >= *version);
            let newest = ram.store().highest_version(LayerId(1));
            assert!(newest >= *version);
        }
    }
}

#[test]
fn a_store_knows_the_version_of_every_block() {
    for seed in 0..6 {
        let mut rng = Rng::new(seed);
        let geometry = Geometry {
            segment_blocks: 64,
            segments_max: 128,
            checkpoint_blocks: 64,
        };
        let params = Params {
            // Small, so that leaves go to disk and come back.
            leaf_cache: 16,
            checkpoint_log_blocks: 256,
            ..Params::default()
        };
        let mut ram = Ram::new(geometry, params, 64);
        let mut model: BTreeMap<(u32, u32), (Version, bool)> = BTreeMap::new();
        let data = vec![7u8; BLOCK_BYTES];
        for round in 0..400u32 {
            let chunk = rng.below(2) as u32;
            let block = rng.below(3) as u32 * LEAF_BLOCKS + rng.below(40) as u32;
            if rng.below(4) == 0 {
                let (first, count) = if rng.below(3) == 0 {
                    (block / LEAF_BLOCKS * LEAF_BLOCKS, LEAF_BLOCKS)
                } else {
                    (block, 3)
                };
                let version = ram.next_version();
                let zeroed = ram
                    .store()
                    .write_zeroes(key(chunk), first, count, version, None);
                zeroed.expect("never refused when idle");
                for at in first..first + count {
                    model.insert((chunk, at), (version, false));
                }
            } else {
                let version = ram.write(chunk, block, &data).expect("room");
                model.insert((chunk, block), (version, true));
            }
            if rng.below(20) == 0 {
                ram.flush().expect("sound");
            }
            if round % 40 == 39 {
                ram.run();
                check(&mut ram, &model);
            }
            if round % 100 == 99 {
                ram.flush().expect("sound");
                ram.run();
                ram.open().expect("opens");
                check(&mut ram, &model);
            }
        }
    }
}

/// Resync gives a block an older version than its neighbours have.
#[test]
fn an_older_write_of_another_block_is_kept() {
    let geometry = Geometry {
        segment_blocks: 64,
        segments_max: 64,
        checkpoint_blocks: 64,
    };
    let mut ram = Ram::new(geometry, Params::default(), 16);
    let old = ram.next_version();
    let data = vec![1u8; BLOCK_BYTES];
    let newer = ram.write(0, 5, &data).expect("room");
    ram.flush().expect("sound");
    let mut late = vec![2u8; BLOCK_BYTES];
    ram.store()
        .write(key(0), 6, &late, old, None)
        .expect("room");
    ram.flush().expect("sound");
    ram.open().expect("opens");
    let found = states(&mut ram, 0, 0);
    assert_eq!((found[5].version, found[6].version), (newer, old));
    assert_eq!(&ram.read(0, 6).expect("sound")[..], &late[..]);
    late.fill(0);
    assert_eq!(&ram.read(0, 7).expect("sound")[..], &late[..]);
}
