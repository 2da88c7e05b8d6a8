//! What a start finds on a device that is not what it was: shorter, or with blocks that cannot be read.

use std::collections::BTreeSet;

use ashlar_core::store::format::{Addr, FRAME_MAGIC, FormatError, SUPERBLOCK_BLOCKS, Superblock};
use ashlar_core::store::{
    BlockingDisk, CheckFinding, DiskError, Errno, Geometry, OpenError, OpenOptions, OpenReport,
    Params, Store, check, inspect,
};
use ashlar_core::units::BLOCK_BYTES;

use crate::ram::{Ram, RamDisk};
use crate::world::NODE;

const SAME_BOOT: u8 = 1;
const LATER_BOOT: u8 = 2;
const BLOCKS: u32 = 300;

/// A device of any length, on which some blocks cannot be read until they are written, and which takes so many writes.
struct Worn<'a> {
    disk: &'a mut RamDisk,
    len: usize,
    writes: u32,
    unreadable: BTreeSet<u32>,
    errno: Errno,
}

impl<'a> Worn<'a> {
    fn new(disk: &'a mut RamDisk, unreadable: &[u32]) -> Worn<'a> {
        Worn {
            len: disk.0.len(),
            writes: u32::MAX,
            disk,
            unreadable: unreadable.iter().copied().collect(),
            errno: Errno::EIO,
        }
    }

    fn cut_off(disk: &'a mut RamDisk, len: usize) -> Worn<'a> {
        Worn {
            len,
            ..Worn::new(disk, &[])
        }
    }

    fn blocks(offset: u64, len: usize) -> std::ops::Range<u32> {
        let first = (offset / BLOCK_BYTES as u64) as u32;
        first..first + len.div_ceil(BLOCK_BYTES) as u32
    }
}

impl BlockingDisk for Worn<'_> {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        Ok(self.len as u64)
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let blocks = Worn::blocks(offset, buf.len());
        if self.unreadable.range(blocks).next().is_some() {
            return Err(DiskError(self.errno));
        }
        // As a file reads behind its end.
        let there = self.len.saturating_sub(offset as usize).min(buf.len());
        let (there, gone) = buf.split_at_mut(there);
        self.disk.read(offset, there)?;
        gone.fill(0);
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        if self.writes == 0 {
            return Err(DiskError(self.errno));
        }
        self.writes -= 1;
        for block in Worn::blocks(offset, buf.len()) {
            self.unreadable.remove(&block);
        }
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

/// Writes a block in a frame of its own, which the device gets without anybody having asked for that.
fn put(ram: &mut Ram, block: u32, n: u32) {
    ram.write(0, block, &content(block, n)).expect("room");
    ram.run();
    let deadline = ram.store().next_deadline_ms();
    let deadline = deadline.expect("a write does not stay in memory for ever");
    ram.store().on_tick(deadline + 60_000);
    ram.run();
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

fn failing(at: u32, errno: Errno) -> impl Fn(&mut RamDisk) -> Worn<'_> {
    move |disk| Worn {
        errno,
        ..Worn::new(disk, &[at])
    }
}

/// What is written after that many writes comes to nothing.
fn killed_after(writes: u32) -> impl Fn(&mut RamDisk) -> Worn<'_> {
    move |disk| Worn {
        writes,
        ..Worn::new(disk, &[])
    }
}

/// Drops the process and starts another one on a device like that.
fn open(
    ram: &mut Ram,
    boot: u8,
    disk: impl FnOnce(&mut RamDisk) -> Worn<'_>,
) -> Result<OpenReport, OpenError> {
    open_accepting(ram, boot, false, disk)
}

/// The same; with `accept_tail_loss` a person said that a tail may be lost.
fn open_accepting(
    ram: &mut Ram,
    boot: u8,
    accept_tail_loss: bool,
    disk: impl FnOnce(&mut RamDisk) -> Worn<'_>,
) -> Result<OpenReport, OpenError> {
    ram.store = None;
    let options = OpenOptions {
        node: NODE,
        boot: [boot; 16],
        accept_tail_loss,
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

fn newest_superblock(ram: &mut Ram) -> Superblock {
    let copies = SUPERBLOCK_BLOCKS.into_iter().flatten();
    let whole = copies.filter_map(|at| {
        Superblock::decode(&ram.disk.0[at as usize * BLOCK_BYTES..][..BLOCK_BYTES]).ok()
    });
    whole.max_by_key(|s| s.generation).expect("a store")
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

#[test]
fn a_superblock_copy_that_cannot_be_read_is_a_damaged_copy() {
    let mut ram = flushed();
    let newest = newest_superblock(&mut ram);
    let (disk, tail) = (ram.disk.0.clone(), ram.tail.snapshot());
    let mut start = |unreadable: &[u32]| {
        ram.disk.0.copy_from_slice(&disk);
        ram.tail.restore(&tail);
        let checked = check(&mut Worn::new(&mut ram.disk, unreadable), |_, _| {});
        let opened = open(&mut ram, LATER_BOOT, |disk| Worn::new(disk, unreadable));
        if opened.is_ok() {
            expect_flushed(&mut ram);
            let of = unreadable
                .iter()
                .map(|&at| CheckFinding::SuperblockCopy(at));
            assert_eq!(checked.map(|report| report.findings), Ok(of.collect()));
        }
        opened.map(|_| ())
    };
    let [even, odd] = SUPERBLOCK_BLOCKS;
    for at in even.into_iter().chain(odd) {
        assert_eq!(start(&[at]), Ok(()), "copy at {at}");
    }
    assert_eq!(start(&[even[0], odd[0]]), Ok(()));
    // Nothing says that the newest superblock was not in it: the one before may name segments that were used again.
    let gone = OpenError::Disk(DiskError(Errno::EIO));
    let slot = SUPERBLOCK_BLOCKS[(newest.generation % 2) as usize];
    assert_eq!(start(&slot), Err(gone.clone()));
    assert_eq!(start(&[even, odd].concat()), Err(gone));
}

/// The power went while a frame was written, and the device cannot read a block of it any more; or that error will pass.
#[test]
fn a_frame_that_cannot_be_read_is_a_persons_to_give_up() {
    for errno in [Errno::EIO, Errno::ENODATA] {
        // Its header, its data.
        for back in [2, 1] {
            let mut ram = flushed();
            // Not flushed.
            put(&mut ram, 7, 1000);
            let at = log_end(&mut ram) - back;
            let frame = Addr(at + back - 2);
            let tail = ram.tail.snapshot();
            for boot in [SAME_BOOT, LATER_BOOT] {
                let error = open(&mut ram, boot, failing(at, errno)).map(|_| ());
                let unreadable = OpenError::LogUnreadable {
                    at: frame,
                    error: DiskError(errno),
                };
                assert_eq!(error, Err(unreadable));
                ram.tail.restore(&tail);
            }
            // As its message says.
            ram.disk.0[frame.offset() as usize..][..BLOCK_BYTES].fill(0);
            let report = open(&mut ram, LATER_BOOT, |disk| Worn::new(disk, &[])).expect("opens");
            assert_eq!(report.unreadable_end, None);
            expect_flushed(&mut ram);
            put(&mut ram, 7, 1001);
            ram.flush().expect("flushes");
            ram.open().expect("opens");
            assert!(ram.read(0, 7).expect("reads")[..] == content(7, 1001)[..]);
        }
    }
}

/// Frames that were durable, as far as the log tells, are not given up because a block cannot be read, or is rotten.
#[test]
fn a_durable_frame_that_is_damaged_does_not_end_the_log() {
    let mut ram = flushed();
    let (geometry, _) = small();
    // Built after the flush, and it alone says so: the nine segments before it know of nothing durable.
    put(&mut ram, 7, 7);
    let end = log_end(&mut ram);
    let (disk, tail) = (ram.disk.0.clone(), ram.tail.snapshot());
    let (mut refused, mut opened) = (0, 0);
    for at in geometry.segment_start(0).0..end - 2 {
        ram.disk.0.copy_from_slice(&disk);
        ram.tail.restore(&tail);
        match open(&mut ram, LATER_BOOT, |disk| Worn::new(disk, &[at])) {
            // Its data are not looked at, so a read will tell.
            Ok(report) => {
                opened += 1;
                assert_eq!(report.unreadable_end, None);
                expect_flushed(&mut ram);
            }
            Err(error) => {
                refused += 1;
                assert!(
                    matches!(error, OpenError::LogUnreadable { .. }),
                    "block {at}: {error}"
                );
                let found = check(&mut Worn::new(&mut ram.disk, &[at]), |_, _| {});
                assert!(!found.expect("a store").findings.is_empty());
                // The same block, read without an error.
                ram.disk.0[at as usize * BLOCK_BYTES + 100] ^= 1;
                let error = open(&mut ram, LATER_BOOT, |disk| Worn::new(disk, &[]));
                let at = Addr(at);
                assert_eq!(error.err(), Some(OpenError::LogDamaged { at }));
            }
        }
    }
    assert!(refused >= 9 && opened > 250, "{refused} {opened}");
}

#[test]
fn a_block_nobody_uses_may_be_unreadable() {
    let mut ram = flushed();
    let (geometry, _) = small();
    let end = log_end(&mut ram);
    let segment = geometry.segment_of(Addr(end));
    let (disk, tail) = (ram.disk.0.clone(), ram.tail.snapshot());
    for at in end + 1..geometry.segment_start(segment + 2).0 {
        for boot in [SAME_BOOT, LATER_BOOT] {
            ram.disk.0.copy_from_slice(&disk);
            ram.tail.restore(&tail);
            let report = open(&mut ram, boot, |disk| Worn::new(disk, &[at])).expect("opens");
            assert_eq!(report.unreadable_end, None);
            expect_flushed(&mut ram);
        }
    }
}

/// What the tail still has is written over the block that cannot be read.
#[test]
fn a_kill_leaves_nothing_behind_that_an_unreadable_block_could_hide() {
    let mut ram = flushed();
    // Acknowledged, and nothing of it is on the device.
    ram.write(0, 7, &content(7, 1000)).expect("room");
    let end = log_end(&mut ram);
    let report = open(&mut ram, SAME_BOOT, |disk| Worn::new(disk, &[end])).expect("opens");
    assert_eq!((report.frames_from_tail, report.tail_void), (1, false));
    assert!(ram.read(0, 7).expect("reads")[..] == content(7, 1000)[..]);
}

/// A store as [`flushed`] leaves it, killed with every block written anew: those writes were answered, and are in the tail alone.
fn killed_with_a_full_tail() -> Ram {
    let mut ram = flushed();
    for block in 0..BLOCKS {
        let data = content(block, LATER + block);
        ram.write(0, block, &data).expect("room");
    }
    ram.store = None;
    ram
}

const LATER: u32 = 1000;

fn expect_later(ram: &mut Ram) {
    for block in 0..BLOCKS {
        let found = ram.read(0, block).expect("reads");
        assert!(
            found[..] == content(block, LATER + block)[..],
            "block {block}"
        );
    }
}

/// What a start saved that was killed is in the tail still: the next saves it in the same place.
#[test]
fn starts_that_are_killed_take_no_room() {
    let mut ram = killed_with_a_full_tail();
    let machine = (ram.disk.0.clone(), ram.tail.snapshot());
    let report = open(&mut ram, SAME_BOOT, |disk| Worn::new(disk, &[])).expect("opens");
    assert!(report.frames_from_tail > 1);
    let saved_to = log_end(&mut ram);

    ram.disk.0 = machine.0;
    ram.tail.restore(&machine.1);
    // Each write of a start is the last of ten. The second superblock says that the tail was saved.
    let mut starts = 0;
    loop {
        match open(&mut ram, SAME_BOOT, killed_after(starts / 10)) {
            Err(OpenError::Disk(_)) => starts += 1,
            Ok(_) => break,
            Err(error) => panic!("start {starts}: {error}"),
        }
    }
    assert!(starts > 60, "{starts}");
    expect_later(&mut ram);
    assert_eq!(log_end(&mut ram), saved_to);
}

/// The tail with its newest frame damaged: it no longer looks like one, or its data are not what was written.
fn damaged_tails(tail: &[u8]) -> [Vec<u8>; 2] {
    let mut blocks = tail.chunks_exact(BLOCK_BYTES);
    let newest = blocks.rposition(|block| block.starts_with(&FRAME_MAGIC));
    let newest = newest.expect("frames") * BLOCK_BYTES;
    [newest, newest + BLOCK_BYTES].map(|at| {
        let mut damaged = tail.to_vec();
        damaged[at] ^= 1;
        damaged
    })
}

/// What was saved of a tail is not let go of when the tail has lost it.
#[test]
fn a_tail_damaged_after_it_was_saved_takes_nothing_away() {
    // A start that was killed with everything saved, before it could say so.
    let mut saved = None;
    for writes in 0.. {
        let mut ram = killed_with_a_full_tail();
        let killed = open(&mut ram, SAME_BOOT, killed_after(writes));
        assert!(killed.is_err(), "it says so before it goes on");
        let machine = (ram.disk.0.clone(), ram.tail.snapshot());
        let next = open(&mut ram, SAME_BOOT, |disk| Worn::new(disk, &[]));
        if next.expect("opens").clean {
            break;
        }
        saved = Some(machine);
    }
    let (disk, tail) = saved.expect("a start writes");
    let mut ram = killed_with_a_full_tail();
    for damaged in damaged_tails(&tail) {
        ram.disk.0.copy_from_slice(&disk);
        ram.tail.restore(&damaged);
        let error = open(&mut ram, SAME_BOOT, |disk| Worn::new(disk, &[]));
        let error = error.expect_err("the tail is damaged");
        assert!(matches!(error, OpenError::TailDamaged(_)), "{error}");
        // As its message says. Nothing is lost, but nobody can know.
        let accepted = open_accepting(&mut ram, SAME_BOOT, true, |disk| Worn::new(disk, &[]));
        assert!(accepted.expect("opens").tail_void);
        expect_later(&mut ram);
    }
}

#[test]
fn that_a_damaged_tail_was_accepted_is_reported() {
    let mut ram = killed_with_a_full_tail();
    let (disk, tail) = (ram.disk.0.clone(), ram.tail.snapshot());
    let [_, damaged] = damaged_tails(&tail);
    ram.tail.restore(&damaged);
    let error = open(&mut ram, SAME_BOOT, |disk| Worn::new(disk, &[]));
    let checksum = OpenError::TailDamaged(FormatError::Checksum);
    assert_eq!(error, Err(checksum));
    assert!(ram.disk.0 == disk, "a start that refuses writes nothing");
    let accepted = open_accepting(&mut ram, SAME_BOOT, true, |disk| Worn::new(disk, &[]));
    assert!(accepted.expect("opens").tail_void);
    for block in 0..BLOCKS {
        let found = ram.read(0, block).expect("reads");
        let is = |n| found[..] == content(block, n)[..];
        assert!(is(block) || is(LATER + block), "block {block}");
    }
}

/// The checkpoint of a store that was closed in order has everything: where its log would go on nothing can be missing.
#[test]
fn a_closed_store_misses_nothing_where_its_log_would_go_on() {
    const CLOSE: u64 = 7;
    for boot in [SAME_BOOT, LATER_BOOT] {
        let mut ram = flushed();
        ram.store().close(CLOSE);
        while !ram.done.contains(&(CLOSE, Ok(()))) {
            ram.run();
        }
        let end = log_end(&mut ram);
        let report = open(&mut ram, boot, |disk| Worn::new(disk, &[end])).expect("opens");
        assert!(report.clean);
        expect_flushed(&mut ram);
    }
}
