//! What cleaning costs, that it always goes on, and what a full store still takes.

use std::collections::VecDeque;

use ashlar_core::store::{Geometry, MAX_WRITE_BLOCKS, Params, WriteError};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS, Version};

use crate::ram::{Ram, key};
use crate::rng::Rng;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Disk {
    /// Whatever the store wants is done before the next writes come.
    Idle,
    /// Writes come as soon as the store takes them: cleaning has no time of its own.
    Busy,
}

/// Overwrites a store that is `percent` full at random, `times` its capacity, and tells device blocks written per
/// client block once the store is in its stride.
fn write_amplification(bytes: u64, percent: u64, times: u64, disk: Disk) -> f64 {
    write_amplification_with(4096, bytes, percent, times, disk)
}

fn write_amplification_with(
    leaf_cache: usize,
    bytes: u64,
    percent: u64,
    times: u64,
    disk: Disk,
) -> f64 {
    let geometry = Geometry::for_size(bytes, None).expect("large enough");
    let params = Params {
        leaf_cache,
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
    let mut longest = 0;
    for i in 0..total {
        if i == total / 3 {
            before = Some(ram.store().status());
        }
        let b = rng.below(blocks);
        let (chunk, block) = (b / u64::from(CHUNK_BLOCKS), b % u64::from(CHUNK_BLOCKS));
        let (chunk, block) = (chunk as u32, block as u32);
        let data = &data[..BLOCK_BYTES];
        match disk {
            Disk::Idle => {
                ram.write(chunk, block, data)
                    .expect("an overwrite is taken");
                if i % 32 == 31 {
                    ram.run();
                }
            }
            Disk::Busy => longest = longest.max(ram.write_pressing(chunk, block, data)),
        }
    }
    let after = ram.store().status();
    let before = before.expect("taken");
    let device =
        |s: &ashlar_core::store::StoreStatus| s.log_blocks + s.cleaned_blocks + s.checkpoint_blocks;
    ram.store().check_invariants();
    let client = (after.client_blocks - before.client_blocks) as f64;
    println!(
        "{} MiB, {percent} % full, {disk:?}: log {:.3} cleaned {:.3} checkpoints {:.3} ({} of {} segments), \
         {longest} I/Os for one write",
        bytes >> 20,
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
    for disk in [Disk::Idle, Disk::Busy] {
        let wa = write_amplification(512 << 20, 75, 10, disk);
        assert!(wa <= 2.0, "{disk:?}: {wa}");
    }
}

#[test]
fn random_overwrites_of_a_store_below_half_full_cost_at_most_a_fifth_more() {
    for disk in [Disk::Idle, Disk::Busy] {
        let wa = write_amplification(512 << 20, 45, 10, disk);
        assert!(wa <= 1.2, "{disk:?}: {wa}");
    }
}

/// The cache holds every leaf, with little to spare: then changes need not be written before the log asks for it.
#[test]
fn a_cache_that_holds_every_leaf_writes_each_seldom() {
    for disk in [Disk::Idle, Disk::Busy] {
        let wa = write_amplification_with(144, 512 << 20, 45, 6, disk);
        assert!(wa <= 1.2, "{disk:?}: {wa}");
    }
}

/// With every block that clients may have in use, cleaning must still gain on the checkpoints it needs.
#[test]
fn a_full_store_is_overwritten_without_end() {
    for (mib, limit) in [(64, 16.0), (128, 12.0), (256, 8.0), (512, 7.0)] {
        for disk in [Disk::Idle, Disk::Busy] {
            let wa = write_amplification(mib << 20, 100, 6, disk);
            assert!(wa <= limit, "{mib} MiB, {disk:?}: {wa}");
        }
    }
}

/// One block in each leaf: a block that is moved costs its leaf as well, three blocks for one.
#[test]
fn a_full_store_of_scattered_blocks_is_overwritten_without_end() {
    let geometry = Geometry::for_size(64 << 20, None).expect("large enough");
    let mut ram = Ram::new(geometry, Params::default(), 8);
    let place = |n: u32| (n / 32, n % 32 * 512 + n % 7);
    let data = vec![3u8; BLOCK_BYTES];
    let mut written = 0;
    while {
        let (chunk, block) = place(written);
        ram.write(chunk, block, &data).is_ok()
    } {
        written += 1;
        if written % 32 == 0 {
            ram.run();
        }
    }
    ram.run();
    let before = ram.store().status();
    assert!(
        u64::from(written) * 3 > before.capacity_blocks * 9 / 10,
        "{written}"
    );
    let mut rng = Rng::new(11);
    let mut longest = 0;
    for _ in 0..u64::from(written) * 3 {
        let (chunk, block) = place(rng.below(u64::from(written)) as u32);
        longest = longest.max(ram.write_pressing(chunk, block, &data));
    }
    let after = ram.store().status();
    let client = (after.client_blocks - before.client_blocks) as f64;
    println!(
        "{written} scattered blocks: cleaned {:.3} checkpoints {:.3}, {longest} I/Os for one write",
        (after.cleaned_blocks - before.cleaned_blocks) as f64 / client,
        (after.checkpoint_blocks - before.checkpoint_blocks) as f64 / client,
    );
    ram.store().check_invariants();
}

/// The disk under the store's file fills up while clients write: what was acknowledged finds its place, what comes
/// next is refused, and all goes on when there is room again.
#[test]
fn a_file_that_cannot_grow_refuses_writes_and_keeps_what_it_took() {
    let geometry = Geometry::for_size(512 << 20, None).expect("large enough");
    for allowed in [24, 100, 300] {
        let mut ram = Ram::new(geometry, Params::default(), 8);
        let data = vec![6u8; BLOCK_BYTES];
        let mut taken = 0;
        let mut refused = false;
        while !refused {
            ram.no_growth = ram.store().status().segments >= allowed;
            let (chunk, block) = (taken / CHUNK_BLOCKS, taken % CHUNK_BLOCKS);
            match ram.try_write_pressing(chunk, block, &data) {
                Ok(_) => taken += 1,
                Err(e) => {
                    assert_eq!(e, WriteError::NoSpace);
                    refused = true;
                }
            }
        }
        let status = ram.store().status();
        assert!(
            taken > (status.segments - 8) * 256 / 2,
            "{taken} blocks in {} segments",
            status.segments
        );
        ram.flush().expect("what was taken finds its place");
        // Overwriting is no new use.
        let mut rng = Rng::new(5);
        for _ in 0..taken {
            let b = rng.below(u64::from(taken)) as u32;
            ram.write_pressing(b / CHUNK_BLOCKS, b % CHUNK_BLOCKS, &data);
        }
        ram.flush().expect("overwrites find their place");
        ram.no_growth = false;
        ram.pass_time(61_000);
        let (chunk, block) = (taken / CHUNK_BLOCKS, taken % CHUNK_BLOCKS);
        ram.write(chunk, block, &data).expect("there is room again");
        ram.flush().expect("a healthy disk");
        ram.store().check_invariants();
    }
}

/// A write that waits, as a driver keeps it: where it goes, its version, and how much of it was taken.
struct Waiting {
    at: u32,
    version: Version,
    taken: u32,
}

/// The longest writes, several at a time, until there is no room: the last of them find less than they need of what is
/// promised to others, at whatever number of blocks the store is by then. Whoever is told to come again finds that
/// something has changed; a driver that does nothing else as long as somebody may go on comes back to its disk.
#[test]
fn long_writes_into_a_store_that_becomes_full_are_refused_in_the_end() {
    const LONG: u32 = MAX_WRITE_BLOCKS as u32;
    let geometry = Geometry {
        segment_blocks: 64,
        segments_max: 64,
        checkpoint_blocks: 8,
    };
    let data = vec![4u8; MAX_WRITE_BLOCKS * BLOCK_BYTES];
    for shift in 1..=LONG {
        let mut ram = Ram::new(geometry, Params::default(), 64);
        ram.write(1, 0, &data[..shift as usize * BLOCK_BYTES])
            .expect("there is room");
        let mut waiting: VecDeque<Waiting> = VecDeque::new();
        let (mut next, mut turns) = (0, 0);
        let mut refused = false;
        while !refused || !waiting.is_empty() {
            let mut tries = 0;
            loop {
                while !refused && waiting.len() < 3 {
                    let version = ram.next_version();
                    let (at, taken) = (next, 0);
                    waiting.push_back(Waiting { at, version, taken });
                    next += LONG;
                }
                while let Some(first) = waiting.front_mut() {
                    let left = &data[first.taken as usize * BLOCK_BYTES..];
                    let (at, version) = (first.at + first.taken, first.version);
                    match ram.store().write(key(0), at, left, version, None) {
                        Ok(()) => {}
                        Err(WriteError::Busy { accepted }) => {
                            first.taken += accepted;
                            break;
                        }
                        Err(e) => {
                            assert_eq!(e, WriteError::NoSpace);
                            refused = true;
                        }
                    }
                    waiting.pop_front();
                }
                if !ram.begin() {
                    break;
                }
                tries += 1;
                assert!(
                    tries < 100,
                    "{shift}: tried for ever: {}",
                    ram.store().debug_line()
                );
            }
            ram.end_one();
            turns += 1;
            assert!(
                turns < 20_000,
                "{shift}: busy for ever: {}",
                ram.store().debug_line()
            );
        }
        ram.flush().expect("what was taken finds its place");
        let status = ram.store().status();
        assert!(status.used_blocks <= status.capacity_blocks, "{status:?}");
        ram.store().check_invariants();
    }
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
