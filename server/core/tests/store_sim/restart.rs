//! What a store takes over from the life before: how much of it is known, and that it is counted.

use ashlar_core::store::format::FRAME_MAGIC;
use ashlar_core::store::{Geometry, Params, WriteError};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS};

use crate::ram::Ram;
use crate::rng::Rng;

/// Where clients write faster than the index can follow, a checkpoint holds less than the log had when it began.
#[test]
fn a_start_replays_no_more_than_the_store_said() {
    let geometry = Geometry::for_size(256 << 20, None).expect("large enough");
    let params = Params {
        leaf_cache: 32,
        ..Params::default()
    };
    let mut ram = Ram::new(geometry, params, 8);
    let mut rng = Rng::new(4);
    let mut most = 0;
    for turn in 0..8 {
        for _ in 0..6000 {
            let b = rng.below(2 * u64::from(CHUNK_BLOCKS)) as u32;
            let data = [turn as u8; BLOCK_BYTES];
            ram.write_pressing(b / CHUNK_BLOCKS, b % CHUNK_BLOCKS, &data);
        }
        let said = ram.store().status().checkpoint_log_blocks;
        ram.store().check_invariants();
        ram.open().expect("opens");
        let replayed = ram.store().status().checkpoint_log_blocks;
        most = most.max(replayed);
        // What only the tail had may be cut into other frames, each with a header, and the open frame counts now.
        assert!(
            replayed <= said + 512,
            "{replayed} blocks of log replayed, {said} said before"
        );
        ram.store().check_invariants();
    }
    assert!(most > 300, "{most}");
}

/// Blocks that were admitted before the process died take their room after it as well, though no leaf knows of them.
#[test]
fn a_start_admits_no_more_than_fits() {
    let geometry = Geometry::for_size(64 << 20, None).expect("large enough");
    let mut ram = Ram::new(geometry, Params::default(), 8);
    let data = vec![8u8; BLOCK_BYTES];
    let capacity = ram.store().status().capacity_blocks;
    let mut taken = 0u32;
    // Full but for less than the tail holds.
    while u64::from(taken) < capacity - 700 {
        let (chunk, block) = (taken / CHUNK_BLOCKS, taken % CHUNK_BLOCKS);
        ram.write(chunk, block, &data).expect("there is room");
        taken += 1;
        if taken.is_multiple_of(64) {
            ram.run();
        }
    }
    ram.run();
    for life in 0..4 {
        loop {
            let version = ram.next_version();
            let (chunk, block) = (taken / CHUNK_BLOCKS, taken % CHUNK_BLOCKS);
            let extent = crate::ram::key(chunk);
            // Nothing is carried out: the writes of each life are in the tail alone when it dies.
            match ram.store().write(extent, block, &data, version, None) {
                Ok(()) => taken += 1,
                Err(WriteError::Busy { .. } | WriteError::NoSpace) => break,
                Err(e) => panic!("{e}"),
            }
        }
        ram.open().expect("opens");
        assert!(
            u64::from(taken) <= capacity,
            "life {life}: {taken} of {capacity} blocks admitted"
        );
    }
    ram.run();
    let status = ram.store().status();
    assert!(status.used_blocks <= status.capacity_blocks, "{status:?}");
    assert_eq!(status.mapped_blocks, u64::from(taken));
}

/// What a client writes lies in the tail's ring, and after a lap of it right behind the newest frame, where a start looks for
/// the next one.
#[test]
fn a_client_that_writes_what_looks_like_a_frame_keeps_no_store_from_opening() {
    let geometry = Geometry::for_size(64 << 20, None).expect("large enough");
    let mut ram = Ram::new(geometry, Params::default(), 8);
    const PIECE_BLOCKS: u32 = 60;
    // An impossible progress, and the rest as impossible.
    let mut hostile = vec![0xff; PIECE_BLOCKS as usize * BLOCK_BYTES];
    for block in hostile.chunks_exact_mut(BLOCK_BYTES) {
        block[..FRAME_MAGIC.len()].copy_from_slice(&FRAME_MAGIC);
    }
    for life in 0..12 {
        // More than the ring holds.
        for piece in 0..24 + life {
            ram.write(0, piece * PIECE_BLOCKS, &hostile).expect("room");
        }
        // Ends the newest frame: behind one that is still being filled nobody looks.
        ram.flush().expect("flushes");
        ram.open().unwrap_or_else(|e| panic!("life {life}: {e}"));
        let found = ram.read(0, life).expect("reads");
        assert!(found[..] == hostile[..BLOCK_BYTES]);
    }
}
