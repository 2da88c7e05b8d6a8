//! A full store, and one that is kept nearly full.

use std::time::Duration;

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::fio::Fio;
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

/// What overwriting at random, 4 KiB at depth 32, cost a store of 1 GiB that is filled to `percent` of its capacity.
struct Churn {
    daemon: Daemon,
    /// Bytes written to the disk for each byte that the client wrote.
    amplification: f64,
    longest: Duration,
}

fn churn(test: &str, percent: u64) -> Churn {
    let times: u64 = std::env::var("ASHLAR_TESTS_CHURN_TIMES")
        .ok()
        .map_or(3, |text| text.parse().expect("a number"));
    let daemon = Setup::default().start(test);
    let counter = |name: &str| {
        let metrics = daemon.metrics();
        metrics
            .sum(name, &[])
            .unwrap_or_else(|| panic!("no {name} in\n{}", metrics.text))
    };
    let capacity = counter("ashlar_store_capacity_bytes") as u64;
    let size = capacity * percent / 100 / (1 << 20) * (1 << 20);
    daemon.create("disk", &size.to_string());
    let uri = daemon.uri("disk");
    let limit = Duration::from_secs(300 * times);
    Fio::plain(&uri)
        .args([
            "--rw=write",
            "--bs=128k",
            "--iodepth=16",
            &format!("--size={size}"),
        ])
        .limit(limit)
        .succeed();
    daemon.open("disk", Wishes::SIMPLE).flush().unwrap();
    let count = || {
        (
            counter("ashlar_store_written_bytes_total"),
            counter("ashlar_store_client_bytes_total"),
        )
    };
    let before = count();
    let text = Fio::plain(&uri)
        .args([
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--norandommap",
            "--output-format=json",
        ])
        .args([
            format!("--size={size}"),
            format!("--io_size={}", capacity * times),
        ])
        .limit(limit)
        .succeed();
    daemon.open("disk", Wishes::SIMPLE).flush().unwrap();
    let after = count();
    let json = &text[text.find('{').expect("JSON")..];
    let report: serde_json::Value =
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {text}"));
    let nanos = report["jobs"][0]["write"]["clat_ns"]["max"]
        .as_u64()
        .expect("a longest latency");
    let amplification = (after.0 - before.0) / (after.1 - before.1);
    let longest = Duration::from_nanos(nanos);
    println!(
        "{percent} % full, overwritten {times} times: write amplification {amplification:.2}, longest write {longest:?}"
    );
    Churn {
        daemon,
        amplification,
        longest,
    }
}

/// Three times the store's size is enough to be in the steady state; `ASHLAR_TESTS_CHURN_TIMES=10` goes on for longer.
#[test]
fn cleaning_keeps_up_at_three_quarters_full() {
    let Churn {
        mut daemon,
        amplification,
        longest,
    } = churn("churn-75", 75);
    assert!(amplification <= 2.0, "{amplification}");
    // The promise is 1 s; other tests use the same disk and processors meanwhile.
    assert!(longest < Duration::from_secs(3), "{longest:?}");
    daemon.kill();
    daemon.start();
}

#[test]
fn cleaning_is_cheap_below_half_full() {
    let Churn { amplification, .. } = churn("churn-45", 45);
    assert!(amplification <= 1.2, "{amplification}");
}
