//! What cleaning costs, that it always goes on, and what a full store still takes.

use ashlar_core::store::{Geometry, Params, WriteError};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS};

use crate::ram::{Ram, key};
use crate::rng::Rng;

/// Overwrites a store that is `percent` full at random, `times` its capacity, and tells device blocks written per
/// client block once the store is in its stride.
fn write_amplification(percent: u64, times: u64) -> f64 {
    let geometry = Geometry::for_size(512 << 20, None).expect("large enough");
    let params = Params {
        // As with a real store, much smaller than what would hold every leaf dirty between checkpoints.
        leaf_cache: 4096,
        ..Params::default()
    };
    let mut ram = Ram::new(geometry, params, 8);
    let blocks = ram.store().status().capacity_blocks * percent / 100;
    // Leaves take room as well.
    let blocks = blocks * 255 / 256 - 8;
    let data = vec![5u8; 256 * BLOCK_BYTES];
    let mut at = 0;
    while at < blocks {
        let n = (blocks - at)
            .min(256)
            .min(u64::from(CHUNK_BLOCKS) - at % u64::from(CHUNK_BLOCKS));
        let (chunk, block) = (at / u64::from(CHUNK_BLOCKS), at % u64::from(CHUNK_BLOCKS));
        ram.write(
            chunk as u32,
            block as u32,
            &data[..n as usize * BLOCK_BYTES],
        )
        .expect("there is room");
        ram.run();
        at += n;
    }
    let capacity = ram.store().status().capacity_blocks;
    let mut rng = Rng::new(percent);
    let mut before = None;
    let total = capacity * times;
    for i in 0..total {
        if i == total / 3 {
            before = Some(ram.store().status());
        }
        let b = rng.below(blocks);
        let (chunk, block) = (b / u64::from(CHUNK_BLOCKS), b % u64::from(CHUNK_BLOCKS));
        ram.write(chunk as u32, block as u32, &data[..BLOCK_BYTES])
            .expect("an overwrite is taken");
        if i % 32 == 31 {
            ram.run();
        }
    }
    let after = ram.store().status();
    let before = before.expect("taken");
    let device =
        |s: &ashlar_core::store::StoreStatus| s.log_blocks + s.cleaned_blocks + s.checkpoint_blocks;
    ram.store().check_invariants();
    let client = (after.client_blocks - before.client_blocks) as f64;
    println!(
        "{percent} % full: log {:.3} cleaned {:.3} checkpoints {:.3} ({} of {} segments)",
        (after.log_blocks - before.log_blocks) as f64 / client,
        (after.cleaned_blocks - before.cleaned_blocks) as f64 / client,
        (after.checkpoint_blocks - before.checkpoint_blocks) as f64 / client,
        after.segments,
        geometry.segments_max,
    );
    (device(&after) - device(&before)) as f64 / client
}

#[test]
fn random_overwrites_of_a_store_three_quarters_full_cost_at_most_twice_their_size() {
    let wa = write_amplification(75, 10);
    println!("write amplification at 75 %: {wa:.3}");
    assert!(wa <= 2.0, "{wa}");
}

#[test]
fn random_overwrites_of_a_store_below_half_full_cost_at_most_a_fifth_more() {
    let wa = write_amplification(45, 10);
    println!("write amplification at 45 %: {wa:.3}");
    assert!(wa <= 1.2, "{wa}");
}

#[test]
fn a_full_store_refuses_new_blocks_and_takes_overwrites_and_trims() {
    let geometry = Geometry {
        segment_blocks: 64,
        segments_max: 64,
        checkpoint_blocks: 8,
    };
    let mut ram = Ram::new(geometry, Params::default(), 8);
    let data = vec![9u8; 8 * BLOCK_BYTES];
    let mut written = 0u32;
    let refused = loop {
        match ram.write(0, written, &data) {
            Ok(_) => written += 8,
            Err(e) => break e,
        }
        ram.run();
    };
    assert_eq!(refused, WriteError::NoSpace);
    let status = ram.store().status();
    assert!(
        u64::from(written) > status.capacity_blocks * 95 / 100,
        "{written} of {status:?}"
    );
    // Overwrites, many times the store's size.
    let mut rng = Rng::new(3);
    for i in 0..30_000u32 {
        let block = rng.below(u64::from(written)) as u32;
        let fill = vec![i as u8; BLOCK_BYTES];
        ram.write(0, block, &fill)
            .expect("an overwrite is taken when the store is full");
        if i % 8 == 0 {
            ram.run();
        }
    }
    assert_eq!(ram.write(1, 0, &data).unwrap_err(), WriteError::NoSpace);
    // A trim is taken, and what it gives back may be written.
    let version = ram.next_version();
    ram.store()
        .write_zeroes(key(0), 0, 512, version, None)
        .expect("a trim is taken when the store is full");
    ram.flush().expect("a healthy disk");
    ram.write(1, 0, &data)
        .expect("trimmed blocks may be used again");
    for block in [0, 100, 511] {
        assert!(
            ram.read(0, block)
                .expect("readable")
                .iter()
                .all(|&b| b == 0)
        );
    }
    ram.flush().expect("a healthy disk");
    ram.store().check_invariants();
    // And all of it is there after the process died.
    ram.open().expect("opens");
    assert!(ram.read(1, 7).expect("readable").iter().all(|&b| b == 9));
}
