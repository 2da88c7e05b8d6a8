//! A disk that fails: every kind of I/O, at every turn, with EIO and with ENOSPC, once or for good.
//!
//! What must hold: an operation is answered rightly or with an error that a disk may give; nothing answered is lost, now
//! or after a restart on a disk that works; the log calls a human when something is broken.

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::ledger::{Ended, Ledger};
use ashlar_tests::nbd::{Wishes, wire};
use ashlar_tests::pattern::BLOCK;
use ashlar_tests::seed::{self, Rng};

const BLOCKS: u64 = 4_000;

/// What the daemon says of faults that it makes itself.
const OF_INJECTING: [&str; 2] = [
    "faults are being injected into disk operations",
    "injecting a fault",
];
/// What it says of a disk that fails.
const OF_FAILING: [&str; 3] = [
    "the device failed a read",
    "the store stopped: a write or sync failed; restart the daemon once the device is sound",
    "the store's file could not be made larger; trying again in a minute",
];

fn expect_faults(daemon: &Daemon) {
    for part in OF_INJECTING.iter().chain(&OF_FAILING) {
        daemon.log.expect(part);
    }
}

struct Failing {
    daemon: Daemon,
    ledger: Ledger,
    rng: Rng,
    armed: std::path::PathBuf,
    /// Runs in which a client saw an error.
    seen: u32,
    runs: u32,
}

impl Failing {
    fn start(test: &str) -> Failing {
        let mut rng = Rng::new(seed::of_run(test));
        let mut daemon = Setup::default().store_size("256MiB").start(test);
        expect_faults(&daemon);
        daemon.create("disk", &(BLOCKS * BLOCK as u64).to_string());
        let mut ledger = Ledger::new(rng.next() | 1, BLOCKS);
        let mut client = daemon.open("disk", Wishes::SIMPLE);
        for first in (0..BLOCKS).step_by(40) {
            assert_eq!(ledger.write(&mut client, first, 32, 0), Ended::Well);
        }
        client.flush().unwrap();
        client.disconnect().unwrap();
        daemon.stop();
        let armed = daemon.scratch.join("armed");
        Failing {
            daemon,
            ledger,
            rng,
            armed,
            seen: 0,
            runs: 0,
        }
    }

    /// Serves with `plan` under it, then without, and checks.
    fn run(&mut self, plan: &str) {
        self.runs += 1;
        let logged = self.daemon.log.text().len();
        self.daemon
            .setup
            .set_fault(Some(&format!("{plan},when={}", self.armed.display())));
        self.daemon.start();
        std::fs::write(&self.armed, "").unwrap();
        let refused = self.work(plan);
        let errors_counted = ["read_errors", "disk_errors"].map(|name| {
            let name = format!("ashlar_store_{name}_total");
            let metrics = self.daemon.metrics();
            metrics.sum(&name, &[]).expect("a counter of the store")
        });
        let killed = self.rng.chance(50);
        if killed {
            self.daemon.kill();
        } else {
            // A daemon with a broken store still ends when it is asked to, if not with success.
            self.daemon.terminate();
            self.daemon.wait_ended(std::time::Duration::from_secs(40));
        }
        std::fs::remove_file(&self.armed).unwrap();
        let said = self.daemon.log.text()[logged..].to_owned();
        assert!(!said.contains("panicked"), "{plan}:\n{said}");
        if refused {
            self.seen += 1;
            let is_told = OF_FAILING.iter().any(|part| said.contains(part));
            assert!(
                is_told,
                "{plan}: errors for clients, silence in the log:\n{said}"
            );
            // A store that was stopped or that found no room counts no read.
            assert!(
                !said.contains(OF_FAILING[0]) || errors_counted.iter().all(|count| *count > 0.0),
                "{plan}: {errors_counted:?} counted:\n{said}"
            );
        }
        self.check(plan);
    }

    /// Fails somewhere in the start; then starts without.
    fn run_start(&mut self, plan: &str) {
        self.runs += 1;
        let logged = self.daemon.log.text().len();
        self.daemon.setup.set_fault(Some(plan));
        if self.daemon.start_or_end() {
            if self.work(plan) {
                self.seen += 1;
            }
            self.daemon.kill();
        } else {
            self.seen += 1;
        }
        let said = self.daemon.log.text()[logged..].to_owned();
        assert!(!said.contains("panicked"), "{plan}:\n{said}");
        self.check(plan);
    }

    /// Some operations; says whether any was refused.
    fn work(&mut self, plan: &str) -> bool {
        let broken = |what: String| -> ! { panic!("{plan}: {what}") };
        let Ok(mut client) = self.daemon.try_open("disk", Wishes::STRUCTURED) else {
            return true;
        };
        let mut refused = false;
        for _ in 0..60 {
            match self
                .ledger
                .anything(&mut client, &mut self.rng)
                .unwrap_or_else(|what| broken(what))
            {
                Ended::Well => {}
                Ended::Refused(wire::EIO | wire::ENOSPC) => refused = true,
                Ended::Refused(errno) => broken(format!("errno {errno}")),
                Ended::Lost => broken("the connection was lost".to_owned()),
            }
        }
        refused
    }

    fn check(&mut self, plan: &str) {
        self.daemon.setup.set_fault(None);
        self.daemon.start();
        let mut client = self.daemon.open("disk", Wishes::EXTENDED);
        self.ledger
            .verify(&mut client)
            .unwrap_or_else(|what| panic!("after {plan}: {what}\n{}", self.daemon.log.tail()));
        client.disconnect().unwrap();
        self.daemon.stop();
    }
}

fn every_turn(test: &str, kind: &str) {
    let mut failing = Failing::start(test);
    for nth in [1, 2, 3, 4, 5, 7, 10, 15, 25] {
        for errno in ["EIO", "ENOSPC"] {
            let count = if failing.rng.chance(50) { "1" } else { "all" };
            failing.run(&format!("{kind}:nth={nth},count={count},errno={errno}"));
        }
    }
    println!(
        "{test}: {} of {} runs were felt by a client",
        failing.seen, failing.runs
    );
    assert!(failing.seen > 0, "no fault was felt: is anything injected?");
}

#[test]
fn writes_fail() {
    every_turn("fault-write", "write");
}

#[test]
fn syncs_fail() {
    every_turn("fault-sync", "sync");
}

#[test]
fn reads_fail() {
    every_turn("fault-read", "read");
}

#[test]
fn anything_fails_and_some_writes_are_short() {
    let mut failing = Failing::start("fault-any");
    for nth in [1, 2, 3, 5, 8, 13, 21, 34] {
        failing.run(&format!("any:nth={nth},count=all,errno=EIO"));
        failing.run(&format!("any:nth={nth},count=3,errno=ENOSPC"));
        // Half of a request done is not an error yet.
        failing.run(&format!("write:nth={nth},count=2,short=4096"));
        failing.run(&format!("read:nth={nth},count=2,short=4096"));
    }
    assert!(failing.seen > 0);
}

#[test]
fn the_start_fails() {
    let mut failing = Failing::start("fault-start");
    for nth in 1..=12 {
        failing.run_start(&format!("any:nth={nth},errno=EIO"));
    }
    for nth in [1, 2, 3, 5, 8] {
        failing.run_start(&format!("any:nth={nth},count=all,errno=ENOSPC"));
    }
    assert!(failing.seen > 0);
}

/// A store is made on a disk that fails: no half store is left that a second start would trip over.
#[test]
fn the_making_of_a_store_fails() {
    for nth in [1, 2, 3, 4, 6, 9] {
        for errno in ["EIO", "ENOSPC"] {
            let mut daemon = Setup::default()
                .store_size("256MiB")
                .prepare("fault-format");
            expect_faults(&daemon);
            daemon
                .setup
                .set_fault(Some(&format!("any:nth={nth},count=all,errno={errno}")));
            if daemon.start_or_end() {
                daemon.kill();
            }
            assert!(
                !daemon.log.text().contains("panicked"),
                "{}",
                daemon.log.tail()
            );
            daemon.setup.set_fault(None);
            daemon.start();
            daemon.create("disk", "1MiB");
            daemon
                .open("disk", Wishes::SIMPLE)
                .write(0, &[1; 4096])
                .unwrap();
        }
    }
}

/// After a failed sync the store answers errors until it is opened again, and says why; it does not try again as if
/// nothing had been.
#[test]
fn a_failed_sync_is_never_retried() {
    let mut failing = Failing::start("poison");
    failing.daemon.setup.set_fault(Some(&format!(
        "sync:nth=1,count=1,errno=EIO,when={}",
        failing.armed.display()
    )));
    failing.daemon.start();
    let mut client = failing.daemon.open("disk", Wishes::STRUCTURED);
    std::fs::write(&failing.armed, "").unwrap();
    let ledger = &mut failing.ledger;
    // Not every flush is a sync of its own, and one that fails behind the client's back shows at the next request.
    let flush_failed = (0..1_000)
        .find_map(|round| {
            let written = ledger.write(&mut client, round * 3 % 2_000, 1 + round % 60, 0);
            if written == Ended::Refused(wire::EIO) {
                return Some(false);
            }
            client.flush().is_err().then_some(true)
        })
        .expect("the failed sync is felt");
    // The disk is well again; the store is not.
    for _ in 0..3 {
        assert_eq!(
            ledger.write(&mut client, 100, 1, 0),
            Ended::Refused(wire::EIO)
        );
        // With nothing acknowledged that is not durable, there is nothing a flush could fail to do.
        if flush_failed {
            let again = client.flush().unwrap_err();
            assert_eq!(
                again.errno(),
                Some(wire::EIO),
                "a flush succeeded after a sync had failed"
            );
            assert!(again.to_string().len() > 60, "no reason is given: {again}");
        }
    }
    let status = failing.daemon.admin().try_run(["status"]);
    let status = format!("{}{}", status.stdout, status.stderr).to_lowercase();
    assert!(
        ["fail", "poison", "error"]
            .iter()
            .any(|word| status.contains(word)),
        "the status is silent:\n{status}"
    );
    failing.daemon.kill();
    std::fs::remove_file(&failing.armed).unwrap();
    failing.check("a failed sync");
}
