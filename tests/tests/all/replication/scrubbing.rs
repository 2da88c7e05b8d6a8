//! Blocks of one copy that rot while nobody reads them: a scrub finds them, and they are written again from a good copy.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::tool::Finished;
use ashlar_tests::wait;

use super::{LEASE, store_file};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;
/// Bytes of one block's entry in a leaf (docs/on-disk.md).
const LEAF_ENTRY: usize = 16;
/// In three places: neighbours are told and mended together.
const ROTTEN: [u64; 4] = [7, 100, 101, 511];

/// What no other block has.
fn content(block: u64) -> Vec<u8> {
    (block + 0x5a5a_0000_0000).to_le_bytes().repeat(BLOCK / 8)
}

/// Flips a bit in each of the blocks wherever the third node's store has them.
fn rot(trio: &Trio) {
    let path = store_file(&trio.nodes[2].daemon);
    let bytes = std::fs::read(&path).expect("read");
    let file = File::options().write(true).open(&path).expect("opened");
    for block in ROTTEN {
        let wanted = content(block);
        let mut places = 0;
        for place in (0..bytes.len() / BLOCK).filter(|at| bytes[at * BLOCK..][..BLOCK] == wanted) {
            let at = place * BLOCK + 100;
            let flipped = [bytes[at] ^ 8];
            file.write_all_at(&flipped, at as u64).expect("flipped");
            places += 1;
        }
        assert!(places > 0, "block {block} is not in the store");
    }
    file.sync_all().expect("synced");
}

/// Flips a bit in the leaf of the third node's index that maps the volume's first blocks.
fn rot_leaf(trio: &Trio, written: u64) {
    let path = store_file(&trio.nodes[2].daemon);
    let bytes = std::fs::read(&path).expect("read");
    let sums: Vec<[u8; 4]> = (0..written)
        .map(|block| crc32fast::hash(&content(block)).to_le_bytes())
        .collect();
    // In a leaf, and nowhere else, the checksum of each block is an entry away from its neighbour's.
    let is_leaf = |at: &usize| {
        let mut places = sums.iter().zip((*at..).step_by(LEAF_ENTRY));
        places.all(|(sum, place)| bytes.get(place..place + 4) == Some(sum))
    };
    let leaves: Vec<usize> = (0..bytes.len()).step_by(4).filter(is_leaf).collect();
    assert!(!leaves.is_empty(), "no leaf maps the blocks");
    let file = File::options().write(true).open(&path).expect("opened");
    for at in leaves {
        let flipped = [bytes[at] ^ 8];
        file.write_all_at(&flipped, at as u64).expect("flipped");
    }
    file.sync_all().expect("synced");
}

/// What a scrub of the third node's store says.
fn scrub(trio: &Trio) -> Finished {
    let admin = trio.nodes[2].daemon.admin();
    admin.try_run(["store", "scrub", "--rate", "1GiB"])
}

/// A scrub of the third node finds the damage, the head mends it, and the next scrub finds nothing.
fn is_mended(trio: &Trio, head: usize, before: usize) {
    let said = scrub(trio);
    assert!(!said.status.success(), "{said}");
    assert!(said.to_string().contains("damaged blocks: 4"), "{said}");
    let mended = "damaged blocks were written again from a good copy";
    wait::until(LEASE * 4, "the blocks are mended", || {
        let text = trio.nodes[head].daemon.log.text();
        match text.matches(mended).count() - before {
            3 => Ok(()),
            count => Err(format!("{count} of 3 places")),
        }
    });
    let said = scrub(trio);
    assert!(said.status.success(), "{said}");
}

#[test]
fn what_a_scrub_finds_is_written_again_from_a_good_copy() {
    let mut trio = Trio::start("scrub-repair");
    trio.expect_losses();
    for node in &mut trio.nodes {
        node.daemon.log.expect("checksum mismatch");
        node.daemon.log.expect("damaged blocks");
    }
    trio.create("disk", &(BLOCKS * BLOCK as u64).to_string());
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    for block in 0..BLOCKS {
        let written = client.write(block * BLOCK as u64, &content(block));
        written.expect("written");
    }
    client.flush().expect("flushed");
    trio.wait_in_sync(0, "disk", 3);
    // What is in the tail is read from there.
    trio.nodes[2].daemon.stop();
    trio.wait_in_sync(0, "disk", 2);
    rot(&trio);
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);
    is_mended(&trio, 0, 0);

    // The same where the head is beside the damaged copy.
    trio.nodes[2].daemon.stop();
    trio.wait_in_sync(0, "disk", 2);
    rot(&trio);
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);
    trio.open_at(2, "disk");
    is_mended(&trio, 2, 0);
    let mut client = trio.nodes[2].daemon.open("disk", Wishes::SIMPLE);
    for block in 0..BLOCKS {
        let read = client.read(block * BLOCK as u64, BLOCK as u64);
        assert_eq!(read.expect("read"), content(block), "block {block}");
    }
}

#[test]
fn a_lost_leaf_is_made_again_from_a_good_copy_holes_and_all() {
    let mut trio = Trio::start("scrub-leaf");
    trio.expect_losses();
    for node in &mut trio.nodes {
        node.daemon
            .log
            .expect("the index of layer 1 chunk 0 block 0 is damaged");
        node.daemon.log.expect("damaged blocks");
    }
    trio.create("disk", &(BLOCKS * BLOCK as u64).to_string());
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    let written = BLOCKS / 4;
    for block in 0..written {
        let written = client.write(block * BLOCK as u64, &content(block));
        written.expect("written");
    }
    client.flush().expect("flushed");
    trio.wait_in_sync(0, "disk", 3);
    trio.nodes[2].daemon.stop();
    trio.wait_in_sync(0, "disk", 2);
    rot_leaf(&trio, written);
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);

    let epoch = || {
        let shown = trio.nodes[0].daemon.admin().json(["volume", "list"]);
        shown[0]["epoch"].as_u64().expect("an epoch")
    };
    let before = epoch();
    let said = scrub(&trio);
    assert!(!said.status.success(), "{said}");
    let told = said.to_string();
    assert!(told.contains("damaged blocks: 512"), "a whole leaf: {said}");
    assert!(told.contains("index of layer 1 chunk 0 block 0"), "{said}");
    wait::until(Duration::from_secs(20), "nothing is damaged", || {
        let said = scrub(&trio);
        if said.status.success() {
            Ok(())
        } else {
            Err(said.to_string())
        }
    });
    trio.wait_in_sync(0, "disk", 3);
    // Every change of what is in sync has an epoch of its own.
    assert_eq!(epoch(), before, "somebody was put out for it");
    // What was never written still takes no room.
    for node in &trio.nodes {
        let live = node.daemon.metrics().sum("ashlar_store_live_bytes", &[]);
        // What the lost leaf mapped is never counted as free again.
        let most = (2 * written + 64) as f64 * BLOCK as f64;
        assert!(live.expect("a store") < most, "{live:?}");
    }
    trio.open_at(2, "disk");
    let mut client = trio.nodes[2].daemon.open("disk", Wishes::SIMPLE);
    for block in 0..BLOCKS {
        let read = client
            .read(block * BLOCK as u64, BLOCK as u64)
            .expect("read");
        let expected = if block < written {
            content(block)
        } else {
            vec![0; BLOCK]
        };
        assert_eq!(read, expected, "block {block}");
    }
}
