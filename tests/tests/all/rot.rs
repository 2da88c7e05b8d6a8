//! Bits that flip while nobody looks: whatever is damaged is reported, never returned as data.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ashlar_tests::admin;
use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::ledger::{Ended, Ledger};
use ashlar_tests::nbd::{Wishes, wire};
use ashlar_tests::pattern::BLOCK;
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::tool::Tool;
use ashlar_tests::wait;

const BLOCKS: u64 = 3_000;

/// A store that was written, rewritten and stopped, to be copied and damaged.
struct Original {
    daemon: Daemon,
    possible: Vec<(u64, u64)>,
    volume: u64,
    rng: Rng,
}

impl Original {
    fn make(test: &str) -> Original {
        let mut rng = Rng::new(seed::of_run(test));
        let mut daemon = Setup::default()
            .store_size("128MiB")
            .tail_in_data_dir()
            .start(test);
        daemon.create("disk", &(BLOCKS * BLOCK as u64).to_string());
        let volume = rng.next() | 1;
        let mut ledger = Ledger::new(volume, BLOCKS);
        let mut client = daemon.open("disk", Wishes::SIMPLE);
        for first in (0..BLOCKS - 100).step_by(100) {
            assert_eq!(ledger.write(&mut client, first, 90, 0), Ended::Well);
        }
        client.flush().unwrap();
        for _ in 0..300 {
            assert_eq!(ledger.anything(&mut client, &mut rng), Ok(Ended::Well));
        }
        client.disconnect().unwrap();
        daemon.stop();
        let possible = (0..BLOCKS)
            .map(|block| (block, ledger.certain(block).expect("no doubt")))
            .collect();
        Original {
            daemon,
            possible,
            volume,
            rng,
        }
    }

    /// A copy of the data directory with a ledger of its own.
    fn copy(&self) -> (Daemon, Ledger) {
        let scratch = ashlar_tests::scratch::Scratch::new("rot");
        let data = scratch.join("d");
        Tool::new("cp")
            .args(["-a", "--sparse=always"])
            .arg(self.daemon.data_dir())
            .arg(&data)
            .succeed();
        let daemon = Daemon::at(self.daemon.setup.clone(), scratch, data);
        for damage in [
            "checksum mismatch in layer",
            "the index of layer",
            "scrub found damaged blocks",
        ] {
            daemon.log.expect(damage);
        }
        (daemon, Ledger::known(self.volume, BLOCKS, &self.possible))
    }
}

fn flip(path: &Path, offset: u64, bit: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, offset).unwrap();
}

#[derive(Default)]
struct Outcome {
    refused: u32,
    damaged: u64,
    found: u32,
}

/// Starts on the damaged copy and reads all of it.
fn examine(daemon: &mut Daemon, ledger: &mut Ledger, what: &str, outcome: &mut Outcome) {
    let report = admin::offline([
        std::ffi::OsStr::new("store"),
        "check".as_ref(),
        daemon.store().as_os_str(),
    ]);
    let checked = format!("{}{}", report.stdout, report.stderr);
    assert!(!checked.contains("panicked"), "{what}: {checked}");
    let found = !report.status.success();
    outcome.found += u32::from(found);
    if !daemon.start_or_end() {
        let said = daemon.log.text();
        assert!(!said.contains("panicked"), "{what}: {said}");
        assert!(
            said.contains("store") && said.contains("damaged"),
            "{what}: refused without a clear word:\n{said}"
        );
        assert!(
            found,
            "{what}: the daemon refuses what the check finds sound:\n{said}\n{checked}"
        );
        outcome.refused += 1;
        return;
    }
    let mut client = daemon.open("disk", Wishes::STRUCTURED);
    let damaged = ledger
        .verify_damaged(&mut client)
        .unwrap_or_else(|error| panic!("{what}: {error}\n{}", daemon.log.tail()));
    if damaged > 0 {
        assert!(
            found,
            "{what}: {damaged} blocks cannot be read, and the check found nothing:\n{checked}"
        );
        assert!(
            daemon.log.text().contains("ERROR"),
            "{what}: nothing in the log for a human"
        );
        let metrics = daemon.metrics();
        let counted: f64 = metrics
            .samples
            .iter()
            .filter(|sample| sample.name.contains("checksum"))
            .map(|sample| sample.value)
            .sum();
        assert!(counted > 0.0, "{what}: no checksum error is counted");
    }
    outcome.damaged += damaged;
    // Damage in one place does not stop work in others, and new data heals.
    for block in [0, BLOCKS / 2, BLOCKS - 1] {
        assert_eq!(
            ledger.write(&mut client, block, 1, wire::CMD_FLAG_FUA),
            Ended::Well,
            "{what}"
        );
        assert_eq!(
            ledger.read(&mut client, block, 1),
            Ok(Ended::Well),
            "{what}"
        );
    }
    daemon.kill();
}

/// The bytes of live blocks, where they lie in the store.
#[test]
fn a_bit_flips_in_live_data() {
    let mut original = Original::make("rot-data");
    let bytes = fs::read(original.daemon.store()).unwrap();
    let mut outcome = Outcome::default();
    for _ in 0..12 {
        let (mut daemon, mut ledger) = original.copy();
        // The newest version of a block is in one place only.
        let written = ledger.written();
        let block = *original.rng.pick(&written);
        let version = ledger.certain(block).unwrap();
        let wanted = ledger.bytes(block, version);
        let places: Vec<usize> = (0..bytes.len() / BLOCK)
            .filter(|at| bytes[at * BLOCK..][..BLOCK] == wanted[..])
            .collect();
        assert!(
            !places.is_empty(),
            "version {version} of block {block} is not in the store: where is it?"
        );
        for place in &places {
            let offset = (place * BLOCK) as u64 + original.rng.below(BLOCK as u64);
            flip(&daemon.store(), offset, original.rng.below(8));
        }
        let before = outcome.damaged;
        examine(
            &mut daemon,
            &mut ledger,
            &format!("block {block} at {places:?}"),
            &mut outcome,
        );
        assert!(
            outcome.damaged > before,
            "block {block} was damaged in all its places, and was read"
        );
    }
    assert_eq!(
        outcome.refused, 0,
        "damaged data must not keep a store from opening"
    );
}

/// Anything that was ever written: superblocks, checkpoints, leaves, frame headers, old data.
#[test]
fn a_bit_flips_anywhere() {
    let mut original = Original::make("rot-any");
    let bytes = fs::read(original.daemon.store()).unwrap();
    let used: Vec<usize> = (0..bytes.len() / 512)
        .filter(|at| bytes[at * 512..][..512].iter().any(|byte| *byte != 0))
        .collect();
    let head: Vec<usize> = used
        .iter()
        .copied()
        .filter(|at| at * 512 < 1 << 20)
        .collect();
    let mut outcome = Outcome::default();
    for number in 0..40 {
        let (mut daemon, mut ledger) = original.copy();
        // Every fourth in the first megabyte, where the superblocks are.
        let sector = *original
            .rng
            .pick(if number % 4 == 0 { &head } else { &used });
        let offset = sector as u64 * 512 + original.rng.below(512);
        flip(&daemon.store(), offset, original.rng.below(8));
        examine(
            &mut daemon,
            &mut ledger,
            &format!("a bit in byte {offset}"),
            &mut outcome,
        );
    }
    println!(
        "{} found by the check, {} starts refused, {} blocks unreadable",
        outcome.found, outcome.refused, outcome.damaged
    );
    assert!(outcome.found > 0);
}

/// The tail of a daemon that was killed: what it holds was acknowledged.
#[test]
fn a_bit_flips_in_the_tail() {
    let mut original = Original::make("rot-tail");
    original.daemon.start();
    let mut ledger = Ledger::known(original.volume, BLOCKS, &original.possible);
    let mut client = original.daemon.open("disk", Wishes::SIMPLE);
    for _ in 0..100 {
        assert_eq!(
            ledger.anything(&mut client, &mut original.rng),
            Ok(Ended::Well)
        );
    }
    original.possible = (0..BLOCKS)
        .map(|block| (block, ledger.certain(block).unwrap()))
        .collect();
    original.daemon.kill();
    let mut outcome = Outcome::default();
    for _ in 0..10 {
        let (mut daemon, mut ledger) = original.copy();
        let tails: Vec<PathBuf> = fs::read_dir(daemon.data_dir().join("tail"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        let tail = original.rng.pick(&tails).clone();
        let bytes = fs::read(&tail).unwrap();
        let used: Vec<usize> = (0..bytes.len() / 512)
            .filter(|at| bytes[at * 512..][..512].iter().any(|byte| *byte != 0))
            .collect();
        let offset = *original.rng.pick(&used) as u64 * 512 + original.rng.below(512);
        flip(&tail, offset, original.rng.below(8));
        let what = format!("a bit in byte {offset} of the tail");
        if daemon.start_or_end() {
            let mut client = daemon.open("disk", Wishes::STRUCTURED);
            outcome.damaged += ledger
                .verify_damaged(&mut client)
                .unwrap_or_else(|error| panic!("{what}: {error}\n{}", daemon.log.tail()));
            daemon.kill();
        } else {
            let said = daemon.log.text();
            assert!(
                said.contains("tail") && !said.contains("panicked"),
                "{what}: {said}"
            );
            outcome.refused += 1;
        }
    }
    println!(
        "{} starts refused, {} blocks unreadable",
        outcome.refused, outcome.damaged
    );
}

/// The online scrub reads everything and finds what no client has read.
#[test]
fn scrub_finds_what_nobody_read() {
    let mut original = Original::make("rot-scrub");
    let clean = {
        original.daemon.start();
        let said = original
            .daemon
            .admin()
            .run(["store", "scrub", "--rate", "1GiB"]);
        original.daemon.stop();
        said
    };
    assert!(
        !clean.to_lowercase().contains("damaged") || clean.contains(" 0"),
        "{clean}"
    );
    let bytes = fs::read(original.daemon.store()).unwrap();
    let (mut daemon, ledger) = original.copy();
    let block = ledger.written()[7];
    let wanted = ledger.bytes(block, ledger.certain(block).unwrap());
    for place in (0..bytes.len() / BLOCK).filter(|at| bytes[at * BLOCK..][..BLOCK] == wanted[..]) {
        flip(&daemon.store(), (place * BLOCK + 100) as u64, 3);
    }
    daemon.start();
    let report = daemon.admin().try_run(["store", "scrub", "--rate", "1GiB"]);
    assert!(!report.status.success(), "{report}");
    assert!(daemon.log.text().contains("ERROR"), "{}", daemon.log.tail());
    daemon.kill();
}

/// Nobody asks for it: the daemon verifies by itself and says what it found, also after a restart.
#[test]
fn a_scheduled_scrub_finds_what_nobody_read() {
    let original = Original::make("rot-schedule");
    let bytes = fs::read(original.daemon.store()).unwrap();
    let (mut daemon, ledger) = original.copy();
    let block = ledger.written()[7];
    let wanted = ledger.bytes(block, ledger.certain(block).unwrap());
    for place in (0..bytes.len() / BLOCK).filter(|at| bytes[at * BLOCK..][..BLOCK] == wanted[..]) {
        flip(&daemon.store(), (place * BLOCK + 100) as u64, 3);
    }
    let setup = daemon.setup.clone();
    daemon.setup = setup.clone().args(["--scrub-every", "1s"]);
    daemon.start();
    let damaged = "ashlar_store_scrub_last_damaged_blocks";
    wait::until(Duration::from_secs(30), "it is verified", || {
        let found = daemon.metrics().sum(damaged, &[]);
        if found == Some(1.0) {
            Ok(())
        } else {
            Err(format!("damaged blocks found: {found:?}"))
        }
    });
    daemon.kill();
    daemon.setup = setup.args(["--scrub-every", "off"]);
    daemon.start();
    let metrics = daemon.metrics();
    assert_eq!(metrics.sum(damaged, &[]), Some(1.0));
    assert_eq!(
        metrics.sum("ashlar_store_scrub_next_time_seconds", &[]),
        None
    );
    let status = daemon.admin().run(["status"]);
    assert!(
        status.contains("1 damaged block(s)") && status.contains("never by itself"),
        "{status}"
    );
    assert!(
        status.contains("the last scrub found 1 damaged block(s)"),
        "{status}"
    );
    daemon.kill();
}

/// A store that is damaged all over is told in a bounded list, and the rest is counted.
#[test]
fn a_store_full_of_damage_is_told_within_bounds() {
    const DAMAGED: usize = 1_500;
    const LISTED: usize = 1_000;
    const MARK: &[u8] = b"this block will rot";
    let mut daemon = Setup::default()
        .store_size("128MiB")
        .start("rot-everywhere");
    daemon.create("disk", "8MiB");
    let mut data = vec![0; DAMAGED * BLOCK];
    for block in data.chunks_mut(BLOCK) {
        block[..MARK.len()].copy_from_slice(MARK);
    }
    let mut client = daemon.open("disk", Wishes::STRUCTURED);
    client.write(0, &data).unwrap();
    drop(client);
    daemon.stop();
    let store = daemon.store();
    let blocks = fs::read(&store).unwrap();
    let marked = blocks.chunks(BLOCK).enumerate();
    let marked = marked.filter(|(_, block)| block.starts_with(MARK));
    for (block, _) in marked {
        flip(&store, (block * BLOCK + BLOCK / 2) as u64, 3);
    }
    let check = |format: &str| {
        let report = admin::offline([
            "-o".as_ref(),
            format.as_ref(),
            "store".as_ref(),
            "check".as_ref(),
            store.as_os_str(),
        ]);
        assert_eq!(report.status.code(), Some(7), "{report}");
        report.stdout
    };
    let table = check("table");
    let listed = table.lines().filter(|line| line.starts_with("damaged:"));
    assert_eq!(listed.count(), LISTED);
    let last = table.lines().last().unwrap();
    assert!(
        last.ends_with("1500 damaged place(s), 500 of them not listed"),
        "{last}"
    );
    let json: serde_json::Value = serde_json::from_str(&check("json")).unwrap();
    assert_eq!(json["damages"].as_array().unwrap().len(), LISTED);
    assert_eq!(json["damages_found"], DAMAGED);
    assert_eq!(json["damages_left_out"], DAMAGED - LISTED);
}
