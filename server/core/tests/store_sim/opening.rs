//! What a start finds on a device that is not what it was.

use ashlar_core::store::{
    BlockingDisk, DiskError, Geometry, OpenError, OpenOptions, OpenReport, Params, Store, check,
    inspect,
};
use ashlar_core::units::BLOCK_BYTES;

use crate::ram::{Ram, RamDisk};
use crate::world::NODE;

const LATER_BOOT: u8 = 2;
const BLOCKS: u32 = 300;

/// A device of any length.
struct Worn<'a> {
    disk: &'a mut RamDisk,
    len: usize,
}

impl<'a> Worn<'a> {
    fn cut_off(disk: &'a mut RamDisk, len: usize) -> Worn<'a> {
        Worn { disk, len }
    }
}

impl BlockingDisk for Worn<'_> {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        Ok(self.len as u64)
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        // As a file reads behind its end.
        let there = self.len.saturating_sub(offset as usize).min(buf.len());
        let (there, gone) = buf.split_at_mut(there);
        self.disk.read(offset, there)?;
        gone.fill(0);
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.disk.write(offset, buf)
    }
    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.len = self.len.max((offset + len) as usize);
        self.disk.allocate(offset, len)
    }
}

fn small() -> (Geometry, Params) {
    let geometry = Geometry {
        segment_blocks: 32,
        segments_max: 48,
        checkpoint_blocks: 8,
    };
    let params = Params {
        grow_segments: 1,
        // Only when told to.
        checkpoint_log_blocks: 1 << 30,
        ..Params::default()
    };
    (geometry, params)
}

fn content(block: u32, n: u32) -> Vec<u8> {
    let mut data = vec![0; BLOCK_BYTES];
    for word in data.chunks_exact_mut(8) {
        word[..4].copy_from_slice(&block.to_le_bytes());
        word[4..].copy_from_slice(&n.to_le_bytes());
    }
    data
}

/// A store in which block `b` of the first [`BLOCKS`] holds number `b`, flushed at the end, all behind its only checkpoint.
fn flushed() -> Ram {
    let (geometry, params) = small();
    let mut ram = Ram::new(geometry, params, 4);
    for block in 0..BLOCKS {
        ram.write(0, block, &content(block, block)).expect("room");
    }
    ram.flush().expect("flushes");
    ram
}

/// Drops the process and starts another one on a device like that.
fn open(
    ram: &mut Ram,
    boot: u8,
    disk: impl FnOnce(&mut RamDisk) -> Worn<'_>,
) -> Result<OpenReport, OpenError> {
    ram.store = None;
    let options = OpenOptions {
        node: NODE,
        boot: [boot; 16],
        accept_tail_loss: false,
    };
    let tail = Box::new(ram.tail.clone());
    let params = ram.params.clone();
    let (store, report) = Store::open(&mut disk(&mut ram.disk), tail, params, &options)?;
    ram.store = Some(store);
    Ok(report)
}

fn expect_flushed(ram: &mut Ram) {
    for block in 0..BLOCKS {
        let found = ram.read(0, block).expect("reads");
        assert!(found[..] == content(block, block)[..], "block {block}");
    }
}

/// Where the log of a store that is not open goes on.
fn log_end(ram: &mut Ram) -> u32 {
    ram.store = None;
    inspect(&mut ram.disk).expect("a store").log_end.0
}

#[test]
fn a_store_that_was_cut_off_is_not_opened() {
    let mut ram = flushed();
    let (geometry, _) = small();
    let end = log_end(&mut ram);
    let (disk, tail) = (ram.disk.0.clone(), ram.tail.snapshot());
    let (mut refused, mut opened) = (0, 0);
    for blocks in 1..disk.len() / BLOCK_BYTES {
        ram.disk.0.copy_from_slice(&disk);
        ram.tail.restore(&tail);
        let len = blocks * BLOCK_BYTES;
        let checked = check(&mut Worn::cut_off(&mut ram.disk, len), |_, _| {});
        match open(&mut ram, LATER_BOOT, |disk| Worn::cut_off(disk, len)) {
            Ok(_) => {
                opened += 1;
                assert_eq!(checked.map(|report| report.findings), Ok(vec![]));
                expect_flushed(&mut ram);
            }
            Err(error) => {
                let OpenError::Truncated { want, have } = error else {
                    panic!("{blocks} blocks: {error}");
                };
                refused += 1;
                assert!(have == len as u64 && want > have);
                assert_eq!(checked, Err(error));
            }
        }
    }
    // All that was ever allocated must be there: the segment the log ends in, and the one it goes on in.
    assert!(refused as u32 >= end && opened > 0, "{refused} {opened}");
    assert!(end > geometry.segment_start(8).0, "it has grown");
}
