//! Scrubs that are replaced, ended, or broken off by an error.

use ashlar_core::store::{Errno, Event, Geometry, Params, ScrubOutcome, StoreError};
use ashlar_core::units::{BLOCK_BYTES, LEAF_BLOCKS};

use crate::ram::Ram;

/// Blocks in each of two leaves.
const EACH: u32 = 100;

/// A store with two leaves on its disk, in the first of which one block is damaged.
fn damaged() -> Ram {
    let geometry = Geometry {
        segment_blocks: 32,
        segments_max: 48,
        checkpoint_blocks: 8,
    };
    let params = Params {
        // The second leaf waits a second for the first.
        scrub_blocks_per_s: u64::from(EACH),
        ..Params::default()
    };
    let mut ram = Ram::new(geometry, params, 6);
    for block in (0..EACH).chain(LEAF_BLOCKS..LEAF_BLOCKS + EACH) {
        let data = vec![block as u8 + 1; BLOCK_BYTES];
        ram.write(0, block, &data).expect("room");
    }
    ram.flush().expect("a healthy disk");
    ram.store().checkpoint(1);
    ram.run();
    // What the tail has is read from there.
    ram.open().expect("opens");
    let third = [3u8; BLOCK_BYTES];
    let mut blocks = ram.disk.0.chunks_exact_mut(BLOCK_BYTES);
    let stored = blocks.find(|block| **block == third).expect("on the disk");
    stored[100] ^= 8;
    ram
}

/// Until a read of the first leaf's blocks is with the disk.
fn begin_reading(ram: &mut Ram) {
    ram.begin();
    assert!(ram.end_one(), "its index is read first");
    ram.begin();
}

/// Ends what is with the disk, and lets the scrub go on for as long as it likes.
fn rest(ram: &mut Ram) {
    while ram.end_one() {}
    ram.pass_time(u64::MAX);
}

fn ended(ram: &Ram) -> Vec<(u64, u64)> {
    let ended = |event: &Event| match event {
        Event::ScrubFinished { blocks, damaged } => Some((*blocks, *damaged)),
        _ => None,
    };
    ram.events.iter().filter_map(ended).collect()
}

#[test]
fn what_was_read_for_an_earlier_scrub_does_not_count() {
    for is_ended_first in [false, true] {
        let mut ram = damaged();
        assert_eq!(ram.store().start_scrub(), Ok(1));
        begin_reading(&mut ram);
        if is_ended_first {
            ram.store().stop_scrub();
            assert_eq!(ram.store().running_scrub(), None);
        }
        assert_eq!(ram.store().start_scrub(), Ok(2));
        assert_eq!(ram.store().running_scrub(), Some(2));
        rest(&mut ram);
        assert_eq!(ended(&ram), [(u64::from(2 * EACH), 1)]);
        let status = ram.store().status();
        let whole = ScrubOutcome {
            pass: 2,
            blocks: u64::from(2 * EACH),
            damaged: 1,
        };
        assert_eq!((status.scrub_ended, status.scrubbing), (whole, false));
    }
}

#[test]
fn a_scrub_that_is_ended_tells_nothing() {
    let mut ram = damaged();
    ram.store().start_scrub().expect("a healthy store");
    begin_reading(&mut ram);
    ram.store().stop_scrub();
    rest(&mut ram);
    assert_eq!(ended(&ram), []);
    assert_eq!(ram.store().status().scrub_ended, ScrubOutcome::default());
}

#[test]
fn a_store_that_stops_has_no_scrub_any_more() {
    let mut ram = damaged();
    ram.store().start_scrub().expect("a healthy store");
    ram.run();
    assert_eq!(ram.store().running_scrub(), Some(1), "the rate");
    ram.write(0, 0, &[9; BLOCK_BYTES]).expect("room");
    ram.fail_in = Some((0, Errno::EIO));
    assert_eq!(ram.flush(), Err(StoreError::Poisoned(Errno::EIO)));
    let status = ram.store().status();
    assert_eq!((status.scrubbing, ended(&ram)), (false, vec![]));
    assert_eq!(status.scrub_ended, ScrubOutcome::default());
    // It would never come to its end.
    let refused = Err(StoreError::Poisoned(Errno::EIO));
    assert_eq!(ram.store().start_scrub(), refused);
}
