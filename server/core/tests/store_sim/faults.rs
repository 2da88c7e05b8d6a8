//! A disk that fails: at each I/O in turn, and at each bit.

use ashlar_core::store::{
    BlockingDisk, Errno, Event, Geometry, OpenError, Params, StoreError, WriteError, check,
};
use ashlar_core::units::BLOCK_BYTES;

use crate::ram::{Ram, key};
use crate::rng::Rng;
use crate::world::SharedTail;

const BLOCKS: u64 = 600;

fn small() -> (Geometry, Params) {
    let geometry = Geometry {
        segment_blocks: 32,
        segments_max: 48,
        checkpoint_blocks: 8,
    };
    let params = Params {
        checkpoint_log_blocks: 150,
        sync_log_blocks: 40,
        grow_segments: 3,
        ..Params::default()
    };
    (geometry, params)
}

/// What block `block` holds as number `n`.
fn content(block: u64, n: u64) -> Vec<u8> {
    let mut data = vec![0u8; BLOCK_BYTES];
    for word in data.chunks_exact_mut(16) {
        word[..8].copy_from_slice(&block.to_le_bytes());
        word[8..].copy_from_slice(&n.to_le_bytes());
    }
    data
}

/// Writes and flushes; returns the last number written to each block, or stops where the store does.
fn workload(ram: &mut Ram, newest: &mut [u64], ops: u64, seed: u64) -> Result<(), StoreError> {
    let mut rng = Rng::new(seed);
    for n in 1..=ops {
        let block = rng.below(BLOCKS);
        match ram.write(0, block as u32, &content(block, n)) {
            Ok(_) => newest[block as usize] = n,
            Err(WriteError::Failed(e)) => return Err(e),
            // A file that cannot grow is full sooner; nothing is lost by that.
            Err(WriteError::NoSpace) if ram.failed == Some("allocate") => {}
            Err(e) => panic!("{e}"),
        }
        if rng.below(8) == 0 {
            ram.run();
        }
        if rng.below(40) == 0 {
            ram.flush()?;
        }
    }
    ram.flush()
}

/// Every block is what was acknowledged last.
fn verify(ram: &mut Ram, newest: &[u64]) {
    for (block, &n) in newest.iter().enumerate() {
        let found = ram.read(0, block as u32).expect("readable");
        if n == 0 {
            assert!(found.iter().all(|&b| b == 0));
        } else {
            assert_eq!(
                &found[..16],
                &content(block as u64, n)[..16],
                "block {block}"
            );
        }
    }
}

#[test]
fn an_error_at_any_io_is_reported_and_what_was_acknowledged_is_there_after_reopening() {
    let (geometry, params) = small();
    let mut dry = Ram::new(geometry, params.clone(), 6);
    let mut newest = vec![0; BLOCKS as usize];
    workload(&mut dry, &mut newest, 1500, 1).expect("a healthy disk");
    assert!(
        dry.store().status().segments_cleaned > 0,
        "the workload must clean"
    );
    let ios = dry.ios;
    let (mut poisoned, mut survived) = (0, 0);
    for errno in [Errno::EIO, Errno::ENOSPC] {
        for at in 0..ios {
            let mut ram = Ram::new(geometry, params.clone(), 6);
            ram.fail_in = Some((at, errno));
            let mut newest = vec![0; BLOCKS as usize];
            let result = workload(&mut ram, &mut newest, 1500, 1);
            match ram.failed {
                // A file grows by writing and syncing: only for want of room it may fail.
                Some(what) if what != "read" && (what, errno) != ("allocate", Errno::ENOSPC) => {
                    poisoned += 1;
                    // Cleaning's own I/Os may come behind the last answer.
                    if !ram.failed_behind_flush || result.is_err() {
                        assert_eq!(result, Err(StoreError::Poisoned(errno)), "I/O {at}");
                    }
                    assert!(ram.events.contains(&Event::Poisoned(errno)));
                    // Nothing is answered any more, and nothing is tried again.
                    let before = ram.ios;
                    assert_eq!(ram.flush(), Err(StoreError::Poisoned(errno)));
                    assert!(ram.read(0, 0).is_err());
                    assert!(ram.write(0, 0, &content(0, 0)).is_err());
                    assert_eq!(ram.ios, before, "a poisoned store does no I/O");
                    ram.open().unwrap_or_else(|e| panic!("I/O {at}: {e}"));
                }
                Some("allocate") => {
                    assert_eq!(result, Ok(()), "I/O {at}: {:?}", ram.failed);
                    assert!(ram.events.contains(&Event::GrowthFailed(errno)));
                    survived += 1;
                }
                // A leaf could not be read ahead, a segment not be cleaned.
                Some("read") => {
                    assert_eq!(result, Ok(()), "I/O {at}: {:?}", ram.failed);
                    survived += 1;
                    // It is read again.
                    ram.pass_time(u64::MAX);
                }
                other => panic!("I/O {at} was {other:?}"),
            }
            verify(&mut ram, &newest);
        }
    }
    println!("{ios} I/Os, each failed twice: {poisoned} stopped the store, {survived} did not");
    assert!(poisoned > 100 && survived > 5);
}

#[test]
fn a_flipped_bit_anywhere_is_reported_and_never_returned_as_data() {
    let (geometry, params) = small();
    let mut ram = Ram::new(geometry, params.clone(), 6);
    let mut newest = vec![0; BLOCKS as usize];
    workload(&mut ram, &mut newest, 900, 2).expect("a healthy disk");
    // Some in leaves, some only in the log behind the checkpoint.
    ram.store().checkpoint(1);
    ram.run();
    workload(&mut ram, &mut newest, 0, 0).expect("a healthy disk");
    for n in 0..40u64 {
        let block = n * 7 % BLOCKS;
        ram.write(0, block as u32, &content(block, 5000 + n))
            .expect("room");
        newest[block as usize] = 5000 + n;
        ram.flush().expect("a healthy disk");
    }
    let good = ram.disk.0.clone();
    let tail = ram.tail.snapshot();
    let (mut refused, mut unreadable, mut harmless) = (0u64, 0u64, 0u64);
    let mut unseen = 0;
    let mut rng = Rng::new(11);
    let total_blocks = good.len() / BLOCK_BYTES;
    for round in 0..3 * total_blocks {
        // Every block of the store thrice, at a random bit; small structures at their start as well.
        let block = round % total_blocks;
        let bit = if round / total_blocks == 0 {
            rng.below(1024)
        } else {
            rng.below(8 * BLOCK_BYTES as u64)
        };
        ram.disk.0.copy_from_slice(&good);
        ram.disk.0[block * BLOCK_BYTES + bit as usize / 8] ^= 1 << (bit % 8);
        ram.tail.restore(&tail);
        ram.events.clear();
        ram.done.clear();
        let found_offline = match check(&mut ram.disk, |_, _| {}) {
            Ok(report) => !report.findings.is_empty(),
            Err(_) => true,
        };
        match ram.open() {
            Err(OpenError::Disk(e)) => panic!("the disk is fine: {e}"),
            Err(_) => {
                refused += 1;
                // That the newest frame had been whole only the tail knows, which is not looked at offline.
                unseen += u32::from(!found_offline);
                continue;
            }
            Ok(()) => {}
        }
        let mut errors = 0;
        for (b, &n) in newest.iter().enumerate() {
            match ram.read(0, b as u32) {
                Ok(found) if n == 0 => assert!(found.iter().all(|&x| x == 0)),
                Ok(found) => assert!(
                    found[..] == content(b as u64, n)[..],
                    "flip at {block}.{bit}: block {b} read wrong data without an error"
                ),
                Err(StoreError::Corrupt { .. } | StoreError::Lost { .. }) => errors += 1,
                Err(e) => panic!("{e}"),
            }
        }
        if errors > 0 {
            unreadable += 1;
            assert!(
                found_offline,
                "block {block} bit {bit}: unreadable, but the check saw nothing"
            );
            assert!(
                ram.events
                    .iter()
                    .any(|e| matches!(e, Event::ChecksumMismatch(_)))
            );
        } else {
            harmless += 1;
        }
    }
    println!(
        "flips: {refused} refused at open, {unreadable} reported at read, {harmless} hit nothing in use"
    );
    assert!(refused > 0 && unreadable > 100);
    assert!(
        unseen <= 6,
        "{unseen} flips outside the newest frame were not seen offline"
    );
}

/// A disk that only reads: what the offline tools get.
struct ReadOnly<'a>(&'a [u8]);

impl BlockingDisk for ReadOnly<'_> {
    fn size_bytes(&mut self) -> Result<u64, ashlar_core::store::DiskError> {
        Ok(self.0.len() as u64)
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), ashlar_core::store::DiskError> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), ashlar_core::store::DiskError> {
        panic!("offline tools never write")
    }
    fn sync(&mut self) -> Result<(), ashlar_core::store::DiskError> {
        panic!("offline tools never sync")
    }
    fn allocate(&mut self, _: u64, _: u64) -> Result<(), ashlar_core::store::DiskError> {
        panic!("offline tools never allocate")
    }
}

#[test]
fn looking_at_a_store_changes_nothing_and_finds_nothing_wrong_with_a_good_one() {
    let (geometry, params) = small();
    let mut ram = Ram::new(geometry, params, 6);
    let mut newest = vec![0; BLOCKS as usize];
    workload(&mut ram, &mut newest, 900, 2).expect("a healthy disk");
    let report = check(&mut ReadOnly(&ram.disk.0), |_, _| {}).expect("a store");
    assert_eq!(report.findings, vec![]);
    assert!(report.blocks >= newest.iter().filter(|&&n| n > 0).count() as u64 / 2);
    let seen = ashlar_core::store::inspect(&mut ReadOnly(&ram.disk.0)).expect("a store");
    assert!(!seen.clean && seen.checkpoint_seq > 1 && seen.layers.len() == 1);
}

/// The tail may be thrown away when the store was closed in order and nothing was taken since that is not durable.
#[test]
fn a_tail_is_needed_until_the_store_was_closed() {
    const CLOSE: u64 = 7;
    let (geometry, params) = small();
    let mut ram = Ram::new(geometry, params, 6);
    assert!(!ram.store().needs_no_tail(), "it is open");
    ram.write(0, 0, &[1; BLOCK_BYTES]).expect("room");
    ram.flush().expect("flushes");
    // Empty, and everything is durable; but the next start would ask for it.
    assert!(!ram.store().needs_no_tail());
    ram.write(0, 1, &[2; BLOCK_BYTES]).expect("room");
    ram.store().close(CLOSE);
    assert!(!ram.store().needs_no_tail());
    while !ram.done.contains(&(CLOSE, Ok(()))) {
        ram.run();
    }
    assert!(ram.store().needs_no_tail());
    // Closed, and without its tail: nothing is missing.
    ram.flush().expect("flushes");
    let (geometry, params) = small();
    let mut ram = Ram::new(geometry, params, 6);
    ram.write(0, 0, &[4; BLOCK_BYTES]).expect("room");
    ram.store().close(CLOSE);
    while !ram.done.contains(&(CLOSE, Ok(()))) {
        ram.run();
    }
    ram.store = None;
    ram.tail = SharedTail::new();
    ram.open().expect("opens");
    assert_eq!(ram.read(0, 0).expect("reads")[..], [4; BLOCK_BYTES]);
}

/// A store that says that its tail is not needed was given nothing after that which only the tail has: changes are refused
/// from the moment it is told to close, not from the moment it is closed.
#[test]
fn a_store_that_is_being_closed_takes_no_change() {
    const CLOSE: u64 = 7;
    let closed = Some(WriteError::Failed(StoreError::Closed));
    // However far the closing is.
    for steps in 0..40 {
        let (geometry, params) = small();
        let mut ram = Ram::new(geometry, params, 6);
        let landing = ram.store().reserve_landing(1);
        ram.write(0, 0, &[1; BLOCK_BYTES]).expect("room");
        if let Some(landing) = landing {
            ram.store().cancel_landing(landing);
        }
        ram.store().close(CLOSE);
        for _ in 0..steps {
            ram.step();
        }
        assert_eq!(ram.write(0, 0, &[2; BLOCK_BYTES]).err(), closed);
        let version = ram.next_version();
        let zeroes = ram.store().write_zeroes(key(0), 0, 1, version, None);
        assert_eq!(zeroes.err(), closed);
        assert_eq!(ram.store().drop_layer(8, key(0).layer).err(), closed);
        assert!(ram.store().reserve_landing(1).is_none());
        while !ram.done.contains(&(CLOSE, Ok(()))) {
            ram.step();
        }
        assert!(ram.store().needs_no_tail());
        ram.open().expect("opens");
        assert_eq!(ram.read(0, 0).expect("reads")[..], [1; BLOCK_BYTES]);
    }
}
