//! Daemons that stop in order while heads of others write to their stores.

use std::sync::atomic::{AtomicBool, Ordering};

use ashlar_core::units::LEAF_BLOCKS;

use super::*;

const BLOCK: usize = 4096;
/// One after the other is written to: a leaf that was written to after its daemon had stopped would be compared as a whole.
const LEAVES: u64 = 64;
const BLOCKS: u64 = LEAVES * LEAF_BLOCKS as u64;

fn offset(block: u64) -> u64 {
    let (leaf, at) = (block % LEAVES, block / LEAVES);
    (leaf * u64::from(LEAF_BLOCKS) + at) * BLOCK as u64
}

/// Writes numbered blocks one after the other until told to stop. `last`: the number that was last written to each.
fn write_until(plane: &DataPlane, stop: &AtomicBool, mut last: Vec<u64>) -> Vec<u64> {
    let mut client = Client::attach(plane, ReplyStyle::Extended, SIZE);
    let newest = last.iter().max().copied().unwrap_or(0);
    for number in newest + 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let block = number % BLOCKS;
        let bytes: Vec<u8> = number.to_le_bytes().repeat(BLOCK / 8);
        client.write(0, offset(block), &bytes);
        last[block as usize] = number;
    }
    last
}

/// What a copy acknowledged while its daemon was stopping is in it when the daemon is back: nothing else would tell that it is
/// missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_answered_that_a_stopped_daemon_does_not_have() {
    let cluster = Cluster::new().await;
    let mut one = cluster.daemon(1).await;
    let two = cluster.daemon(2).await;
    let mut three = cluster.daemon(3).await;
    cluster.volume(&[&one, &two, &three]).await;
    cluster.open(&mut one).await;
    let mut last = vec![0; BLOCKS as usize];
    for _ in 0..4 {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (plane, stop) = (one.plane.clone(), stop.clone());
            tokio::task::spawn_blocking(move || write_until(&plane, &stop, last))
        };
        cluster.stop(&three);
        three.plane.drain().await;
        stop.store(true, Ordering::Relaxed);
        cluster.in_sync(2).await;
        last = writer.await.expect("written");
        three = cluster.daemon(3).await;
        cluster.in_sync(3).await;
    }
    for daemon in [&one, &two] {
        cluster.stop(daemon);
        daemon.plane.drain().await;
    }
    cluster.open_alone(&mut three).await;
    let plane = three.plane.clone();
    blocking(move || {
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        for (block, number) in (0..).zip(&last) {
            let bytes = client.read(offset(block), 8);
            assert_eq!(bytes, number.to_le_bytes(), "block {block}");
        }
    })
    .await;
    three.plane.drain().await;
}
