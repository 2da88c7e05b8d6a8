//! kill -9 at random moments: nothing that was answered is lost, nothing goes back, what was in doubt is decided once.

use std::time::Duration;

use ashlar_tests::campaign::{self, Campaign, Ending, Victim};
use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::nbd::Address;
use ashlar_tests::seed;

/// A daemon with one volume, as something to kill.
pub(crate) struct Served(pub(crate) Daemon);

impl Served {
    pub(crate) fn new(test: &str, setup: Setup, volume_bytes: u64, options: &[&str]) -> Served {
        let daemon = setup.start(test);
        let size = volume_bytes.to_string();
        daemon.admin().run(
            ["volume", "create", "disk", "--size", &size]
                .iter()
                .chain(options),
        );
        Served(daemon)
    }
}

impl Victim for Served {
    fn address(&self) -> Address {
        self.0.address()
    }

    fn export(&self) -> String {
        "disk".to_owned()
    }

    fn start(&mut self) {
        self.0.start();
    }

    fn spawn(&mut self) {
        self.0.spawn();
    }

    fn kill(&mut self) {
        self.0.kill();
    }

    fn stop(&mut self) {
        self.0.stop();
    }

    fn words(&self) -> String {
        self.0.log.tail()
    }
}

fn check(campaign: &Campaign, mut served: Served) {
    let report = campaign::run(campaign, &mut served).unwrap_or_else(|error| panic!("{error}"));
    println!("{report:?}");
    assert_eq!(report.rounds, campaign.rounds);
    assert!(
        report.answered_writes > 0 && report.in_doubt > 0,
        "nothing was at stake: {report:?}"
    );
    assert!(report.longest_start < Duration::from_secs(20), "{report:?}");
    served.0.log.check();
}

#[test]
fn fifty_kills_lose_nothing_that_was_answered() {
    let campaign = Campaign::new(seed::of_run("fifty kills"));
    let served = Served::new("crash", Setup::default(), campaign.volume_bytes(), &[]);
    check(&campaign, served);
}

/// Longer between the kills: the tail is passed several times, segments fill, checkpoints are taken and the cleaner runs.
#[test]
fn kills_of_a_daemon_at_work() {
    let seed = seed::of_run("kills at work");
    let campaign = Campaign {
        rounds: 6,
        most_operations: 60_000,
        kill_starts_percent: 60,
        ..Campaign::new(seed)
    };
    let served = Served::new(
        "crash-work",
        Setup::default().store_size("512MiB"),
        campaign.volume_bytes(),
        &[],
    );
    check(&campaign, served);
}

#[test]
fn kills_of_a_write_through_volume() {
    let seed = seed::of_run("kills, write-through");
    let campaign = Campaign {
        rounds: 8,
        most_operations: 2_000,
        ..Campaign::new(seed)
    };
    let served = Served::new(
        "crash-wt",
        Setup::default(),
        campaign.volume_bytes(),
        &["--write-through"],
    );
    check(&campaign, served);
}

/// SIGTERM under load: no request gets an error for an answer, what was answered is there, and the end is a clean one.
#[test]
fn a_drain_loses_nothing() {
    let seed = seed::of_run("drains");
    let campaign = Campaign {
        rounds: 8,
        ending: Ending::Terminate,
        most_operations: 4_000,
        ..Campaign::new(seed)
    };
    let mut served = Served::new("drain", Setup::default(), campaign.volume_bytes(), &[]);
    let report = campaign::run(&campaign, &mut served).unwrap_or_else(|error| panic!("{error}"));
    println!("{report:?}");
    assert_eq!(report.rounds, campaign.rounds);
}
