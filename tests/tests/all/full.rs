//! A full store, and one that is kept nearly full.

use std::time::{Duration, Instant};

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::ledger::{Ended, Ledger};
use ashlar_tests::nbd::{Transmission, Wishes, wire};
use ashlar_tests::pattern::BLOCK;
use ashlar_tests::seed::{self, Rng};

const STORE: &str = "256MiB";
const STORE_BLOCKS: u64 = (256 << 20) / BLOCK as u64;

/// Writes new blocks until the store has no room, and returns how many it took.
fn fill(ledger: &mut Ledger, client: &mut Transmission, most: u64) -> u64 {
    let mut block = 0;
    while block < most {
        match ledger.write(client, block, 16, 0) {
            Ended::Well => block += 16,
            Ended::Refused(wire::ENOSPC) => return block,
            other => panic!("block {block}: {other:?}"),
        }
    }
    block
}

#[test]
fn a_full_store_refuses_new_blocks_and_nothing_else() {
    let mut rng = Rng::new(seed::of_run("full"));
    let mut daemon = Setup::default().store_size(STORE).start("full");
    // That it is full is worth a warning.
    daemon.log.expect("full");
    daemon.log.expect("space");
    let blocks = STORE_BLOCKS * 4;
    daemon.create("disk", &(blocks * BLOCK as u64).to_string());
    let mut ledger = Ledger::new(rng.next() | 1, blocks);
    let mut client = daemon.open("disk", Wishes::STRUCTURED);
    let taken = fill(&mut ledger, &mut client, blocks);
    println!("{taken} of {STORE_BLOCKS} blocks taken before ENOSPC");
    assert!(
        taken > STORE_BLOCKS * 7 / 10,
        "the store was full with {taken} of {STORE_BLOCKS} blocks"
    );
    // Twice the store overwritten at random.
    let mut overwritten = 0;
    while overwritten < STORE_BLOCKS * 2 {
        let count = rng.logarithmic(16);
        let first = rng.below(taken - count);
        assert_eq!(
            ledger.write(&mut client, first, count, 0),
            Ended::Well,
            "overwriting {first}+{count} of {taken}"
        );
        overwritten += count;
        if rng.chance(1) {
            client.flush().unwrap();
        }
    }
    // Still no room for what is new.
    assert_eq!(
        ledger.write(&mut client, taken + 5_000, 16, 0),
        Ended::Refused(wire::ENOSPC)
    );
    // A trim makes room, as much as it frees.
    assert_eq!(
        ledger.clear(&mut client, 0, 4_000, wire::CMD_TRIM),
        Ended::Well
    );
    client.flush().unwrap();
    for n in 0..100 {
        assert_eq!(
            ledger.write(&mut client, taken + 6_000 + n * 16, 16, 0),
            Ended::Well,
            "after trimming 4,000 blocks"
        );
    }
    client.flush().unwrap();
    daemon.kill();
    daemon.start();
    let mut client = daemon.open("disk", Wishes::STRUCTURED);
    ledger.verify(&mut client).unwrap();
    // A volume deleted gives all of its space back.
    client.disconnect().unwrap();
    daemon.admin().run(["volume", "delete", "disk", "--yes"]);
    daemon.create("next", &(blocks * BLOCK as u64).to_string());
    let mut ledger = Ledger::new(rng.next() | 1, blocks);
    let again = fill(
        &mut ledger,
        &mut daemon.open("next", Wishes::SIMPLE),
        taken * 9 / 10,
    );
    assert!(
        again >= taken * 9 / 10,
        "{again} blocks taken after the volume was deleted, {taken} before"
    );
    daemon.stop();
}

fn amplification(daemon: &Daemon) -> f64 {
    let metrics = daemon.metrics();
    let found = metrics
        .samples
        .iter()
        .find(|sample| sample.name.contains("write_amplification"));
    found
        .unwrap_or_else(|| panic!("no write amplification in\n{}", metrics.text))
        .value
}

/// Overwrites at random at a given fill, and returns the longest that one write took.
fn churn(fill_percent: u64, times: u64, test: &str) -> (Daemon, Duration) {
    let mut rng = Rng::new(seed::of_run(test));
    let daemon = Setup::default().store_size(STORE).start(test);
    let blocks = STORE_BLOCKS * fill_percent / 100 / 16 * 16;
    daemon.create("disk", &(blocks * BLOCK as u64).to_string());
    let mut ledger = Ledger::new(rng.next() | 1, blocks);
    let mut client = daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(fill(&mut ledger, &mut client, blocks), blocks);
    let mut longest = Duration::ZERO;
    for _ in 0..STORE_BLOCKS * times / 4 {
        // 4 blocks at a time: random enough for the cleaner, and 4 times as quick as single ones.
        let start = Instant::now();
        let first = rng.below(blocks / 4) * 4;
        assert_eq!(ledger.write(&mut client, first, 4, 0), Ended::Well);
        longest = longest.max(start.elapsed());
    }
    client.flush().unwrap();
    ledger.verify(&mut client).unwrap();
    (daemon, longest)
}

/// The issue asks for ten times the store's size; bench does that. Here three times, which is in the steady state already.
#[test]
fn cleaning_keeps_up_at_three_quarters_full() {
    let (mut daemon, longest) = churn(75, 3, "churn-75");
    let amplification = amplification(&daemon);
    println!("75 % full: write amplification {amplification:.2}, longest write {longest:?}");
    assert!(amplification <= 2.0, "{amplification}");
    // The promise is 1 s; other tests use the same disk and processors meanwhile.
    assert!(longest < Duration::from_secs(3), "{longest:?}");
    daemon.kill();
    daemon.start();
}

#[test]
fn cleaning_is_cheap_below_half_full() {
    let (daemon, longest) = churn(45, 3, "churn-45");
    let amplification = amplification(&daemon);
    println!("45 % full: write amplification {amplification:.2}, longest write {longest:?}");
    assert!(amplification <= 1.2, "{amplification}");
}
