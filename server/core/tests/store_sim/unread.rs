//! Leaves that cannot be read, or are not what was written: what that costs, and what it must not cost.

use ashlar_core::store::{BlockContent, Errno, Event, Geometry, Params, StoreError};
use ashlar_core::units::{BLOCK_BYTES, LEAF_BLOCKS};

use crate::ram::{Ram, key};
use crate::rng::Rng;

/// Blocks of the first leaf that hold data, and of the second.
const FIRST: u32 = 14;
const SECOND: u32 = 100;
const CHECKPOINT: u64 = 5;

fn content(block: u32, n: u8) -> Vec<u8> {
    let mut data = vec![n; BLOCK_BYTES];
    data[..4].copy_from_slice(&block.to_le_bytes());
    data
}

fn checkpoint(ram: &mut Ram) {
    ram.done.clear();
    ram.store().checkpoint(CHECKPOINT);
    ram.pass_time(u64::MAX);
    assert!(ram.done.contains(&(CHECKPOINT, Ok(()))), "{:?}", ram.done);
}

/// A store just opened, with two leaves on its disk, none in memory, and where the first lies.
fn with_leaves() -> (Ram, std::ops::Range<u64>) {
    let geometry = Geometry {
        segment_blocks: 64,
        segments_max: 64,
        checkpoint_blocks: 8,
    };
    let params = Params {
        leaf_cache: 16,
        ..Params::default()
    };
    let mut ram = Ram::new(geometry, params, 64);
    for block in (0..FIRST).chain(LEAF_BLOCKS..LEAF_BLOCKS + SECOND) {
        ram.write(0, block, &content(block, 1)).expect("room");
    }
    checkpoint(&mut ram);
    ram.open().expect("opens");
    ram.read(0, 0).expect("readable");
    let at = ram.leaf_read_at.expect("the leaf is on disk");
    ram.open().expect("opens");
    (ram, at..at + 2 * BLOCK_BYTES as u64)
}

/// Everything is what it was, but block `changed`, which was written again.
fn verify(ram: &mut Ram, changed: Option<u32>) {
    for block in (0..FIRST).chain(LEAF_BLOCKS..LEAF_BLOCKS + SECOND) {
        let n = if changed == Some(block) { 2 } else { 1 };
        let found = ram.read(0, block).expect("readable");
        assert!(found[..] == content(block, n)[..], "block {block}");
    }
}

fn is_poisoned(ram: &mut Ram) -> bool {
    ram.store().status().poisoned.is_some()
}

/// A bad place on the disk, a small one and one that takes its neighbours along, costs what the leaf maps; the store
/// goes on, now and when it is opened again.
#[test]
fn a_leaf_on_a_bad_place_costs_what_it_maps_and_nothing_else() {
    for around in [0, 3 * BLOCK_BYTES as u64, 16 * BLOCK_BYTES as u64] {
        let (mut ram, leaf) = with_leaves();
        ram.unreadable = Some(leaf.start - around..leaf.end + around);
        ram.write(0, 5, &content(5, 2)).expect("taken");
        ram.flush().expect("flushed");
        ram.run();
        assert_eq!(
            ram.read(0, 6).map(drop),
            Err(StoreError::Device(Errno::EIO)),
            "at once"
        );
        assert!(ram.read(0, 5).expect("it is in the log")[..] == content(5, 2)[..]);
        let begun = ram.now_ms;
        checkpoint(&mut ram);
        assert!(!is_poisoned(&mut ram), "{around} bytes around");
        let took = ram.now_ms - begun;
        assert!((9_000..20_000).contains(&took), "decided in {took} ms");
        for life in 0..3 {
            assert!(ram.read(0, 5).expect("written")[..] == content(5, 2)[..]);
            for block in [0, 4, 6, FIRST - 1] {
                let error = ram.read(0, block).map(drop).expect_err("lost");
                assert!(matches!(error, StoreError::Lost { .. }), "{error}");
            }
            // The other leaf lies beside it.
            let block = LEAF_BLOCKS + 7;
            let other = ram.read(0, block);
            assert!(around > 0 || other.expect("sound")[..] == content(block, 1)[..]);
            ram.write(0, 10 + life, &content(10 + life, 2))
                .expect("taken");
            ram.flush().expect("flushed");
            let again = ram.read(0, 10 + life).expect("written again");
            assert!(again[..] == content(10 + life, 2)[..]);
            ram.store().check_invariants();
            ram.open().expect("opens");
        }
        // The end of the layer gives back what is known of it.
        ram.store().drop_layer(9, key(0).layer).expect("taken");
        ram.pass_time(u64::MAX);
        assert!(!is_poisoned(&mut ram) && ram.store().layers().is_empty());
    }
}

/// An error that passes is not remembered: neither that of a leaf, nor that of the whole device, nor those of a device
/// that comes and goes.
#[test]
fn what_cannot_be_read_for_a_while_is_not_lost() {
    let all = 0..u64::MAX;
    for (case, lasts_ms) in [(0, 500), (0, 9_500), (1, 500), (1, 9_500), (1, 19_000)] {
        let (mut ram, leaf) = with_leaves();
        ram.unreadable = Some(if case == 0 { leaf } else { all.clone() });
        ram.write(0, 5, &content(5, 2)).expect("taken");
        ram.flush().expect("flushed");
        ram.run();
        let until = ram.now_ms + lasts_ms;
        ram.pass_time(until);
        ram.unreadable = None;
        checkpoint(&mut ram);
        assert!(!is_poisoned(&mut ram), "{case} {lasts_ms}");
        verify(&mut ram, Some(5));
        ram.open().expect("opens");
        verify(&mut ram, Some(5));
    }
    let (mut ram, _) = with_leaves();
    ram.write(0, 5, &content(5, 2)).expect("taken");
    let begun = ram.now_ms;
    for second in 0..19u64 {
        // Away when the leaf is read, every time; here in between.
        ram.unreadable = Some(0..u64::MAX);
        ram.flush().expect("flushed");
        let until = begun + second * 1000 + 500;
        ram.pass_time(until);
        ram.unreadable = None;
        assert!(!is_poisoned(&mut ram));
        // Not when the leaf is due.
        let deadline = ram.store().next_deadline_ms();
        assert!(deadline.is_some_and(|at| at > until), "{deadline:?}");
    }
    checkpoint(&mut ram);
    verify(&mut ram, Some(5));
}

/// A device that reads nothing at all is not taken for one with a bad place: the store stops, and has everything when
/// the device is there again.
#[test]
fn a_device_that_reads_nothing_stops_the_store_and_nothing_is_lost() {
    let (mut ram, _) = with_leaves();
    ram.unreadable = Some(0..u64::MAX);
    ram.write(0, 5, &content(5, 2)).expect("taken");
    ram.flush().expect("flushed");
    ram.pass_time(u64::MAX);
    assert!(ram.events.contains(&Event::Poisoned(Errno::EIO)));
    assert!(ram.now_ms < 25_000, "{}", ram.now_ms);
    ram.unreadable = None;
    ram.open().expect("opens");
    verify(&mut ram, Some(5));
    checkpoint(&mut ram);
    ram.open().expect("opens");
    verify(&mut ram, Some(5));
}

/// Whoever asks what a leaf says is answered, and the device is not asked again and again for it.
#[test]
fn a_question_about_a_leaf_that_cannot_be_read_is_answered() {
    let (mut ram, leaf) = with_leaves();
    ram.unreadable = Some(leaf);
    let before = ram.ios;
    assert_eq!(ram.store().leaf_states(key(0), 0), Ok(None));
    ram.run();
    let error = Err(StoreError::Device(Errno::EIO));
    assert_eq!(ram.store().leaf_states(key(0), 0), error);
    assert_eq!(
        ram.store().leaf_sums(key(0), 0),
        Err(StoreError::Device(Errno::EIO))
    );
    // What is not known may be data; what the other leaf says is known once it is read.
    assert!(
        ram.store()
            .extents(key(0), 0, LEAF_BLOCKS + SECOND + 1)
            .is_none()
    );
    ram.store()
        .load_extents(key(0), 0, LEAF_BLOCKS + SECOND + 1);
    ram.run();
    let runs = ram.store().extents(key(0), 0, LEAF_BLOCKS + SECOND + 1);
    assert_eq!(
        runs.expect("known").to_vec(),
        [(true, LEAF_BLOCKS + SECOND), (false, 1)]
    );
    assert_eq!(ram.ios - before, 2, "each leaf was read once");
    assert!(!is_poisoned(&mut ram));
    // Copies that differ need to know whether it is damaged: that is found out, and what is not so any more is forgotten.
    ram.pass_time(12_000);
    let states = ram.store().leaf_states(key(0), 0).expect("decided");
    let states = states.expect("here");
    assert!(states.iter().all(|s| s.content == BlockContent::Lost));
    ram.unreadable = None;
    ram.pass_time(75_000);
    verify(&mut ram, None);
    let states = ram.store().leaf_states(key(0), 0).expect("readable");
    let states = states.expect("here");
    let data = states.iter().filter(|s| s.content == BlockContent::Data);
    assert_eq!(data.count(), FIRST as usize);
}

/// Questions alone do not stop a store whose device reads nothing.
#[test]
fn questions_do_not_stop_a_store() {
    let (mut ram, _) = with_leaves();
    ram.unreadable = Some(0..u64::MAX);
    assert_eq!(ram.store().leaf_states(key(0), 0), Ok(None));
    ram.run();
    ram.pass_time(u64::MAX);
    assert!(!is_poisoned(&mut ram));
    assert!((20_000..25_000).contains(&ram.now_ms), "{}", ram.now_ms);
    ram.unreadable = None;
    verify(&mut ram, None);
}

/// Cleaning goes on beside a leaf that cannot be read, and does not record its loss: nobody wrote to what it maps.
#[test]
fn cleaning_does_not_record_that_a_leaf_is_lost() {
    let (mut ram, leaf) = with_leaves();
    ram.unreadable = Some(leaf);
    // What lies beside its blocks goes elsewhere: their segment is worth cleaning.
    for block in LEAF_BLOCKS..LEAF_BLOCKS + SECOND {
        ram.write(0, block, &content(block, 1)).expect("room");
    }
    let mut rng = Rng::new(8);
    // Until everything was moved that can be.
    for n in 0..20_000u64 {
        let block = rng.below(1500) as u32;
        ram.write(1, block, &content(block, n as u8)).expect("room");
        if n % 8 == 0 {
            ram.run();
        }
        if n % 1000 == 0 {
            ram.flush().expect("flushed");
            ram.pass_time(u64::MAX);
        }
    }
    ram.pass_time(u64::MAX);
    let status = ram.store().status();
    assert!(status.poisoned.is_none() && status.segments_cleaned > 100 && status.checkpoints > 10);
    assert!(
        ram.events
            .iter()
            .any(|event| matches!(event, Event::ChecksumMismatch(_))),
        "cleaning met the leaf"
    );
    ram.unreadable = None;
    // Still in memory as damaged; before that is recorded, the device is asked again.
    let error = ram.read(0, 0).map(drop).expect_err("lost");
    assert!(matches!(error, StoreError::Lost { .. }), "{error}");
    let until = ram.now_ms + 61_000;
    ram.pass_time(until);
    ram.write(0, 5, &content(5, 2)).expect("taken");
    ram.flush().expect("flushed");
    checkpoint(&mut ram);
    verify(&mut ram, Some(5));
    ram.open().expect("opens");
    verify(&mut ram, Some(5));
}

/// What a damaged leaf mapped stays in use, however often its blocks are trimmed; then the end of the layer gives back
/// the rest.
#[test]
fn trimming_what_a_damaged_leaf_maps_gives_nothing_back_twice() {
    let (mut ram, leaf) = with_leaves();
    ram.disk.0[leaf.start as usize + 100] ^= 1;
    let mapped = |ram: &mut Ram| ram.store().status().mapped_blocks;
    assert_eq!(mapped(&mut ram), u64::from(FIRST + SECOND));
    let version = ram.next_version();
    ram.store()
        .write_zeroes(key(0), 0, LEAF_BLOCKS - 1, version, None)
        .expect("taken");
    ram.flush().expect("flushed");
    ram.run();
    assert_eq!(mapped(&mut ram), u64::from(FIRST + SECOND));
    ram.write(0, 3, &content(3, 2)).expect("taken");
    ram.write(0, LEAF_BLOCKS - 1, &content(4, 2))
        .expect("taken");
    ram.flush().expect("flushed");
    ram.run();
    assert_eq!(mapped(&mut ram), u64::from(FIRST + SECOND) + 2);
    ram.open().expect("opens");
    ram.store().drop_layer(9, key(0).layer).expect("taken");
    ram.pass_time(u64::MAX);
    assert_eq!(mapped(&mut ram), u64::from(FIRST));
    checkpoint(&mut ram);
    ram.open().expect("opens");
    assert_eq!(mapped(&mut ram), u64::from(FIRST));
    ram.store().check_invariants();
}
