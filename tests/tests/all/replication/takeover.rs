//! The node that serves a volume is lost, and another one serves it: every answered write is there.

use std::time::Duration;

use ashlar_tests::campaign::{self, Campaign, Victim};
use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Address;
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;
use rustix::process::Signal;

use super::LEASE;

/// What happens to the node that serves.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// kill -9; another node serves at once, and the killed one returns.
    KillAndMove,
    /// kill -9, and it serves again when it is back.
    KillAndReturn,
    /// It stands still for longer than the lease; another node serves meanwhile.
    FreezeAndMove,
    /// Nothing but that another node is asked to serve.
    Move,
}

struct Served {
    trio: Trio,
    blows: Vec<Blow>,
    rng: Rng,
    at: usize,
}

impl Served {
    fn next(&mut self) -> usize {
        let other = 1 + self.rng.below(2) as usize;
        (self.at + other) % 3
    }
}

impl Victim for Served {
    fn address(&self) -> Address {
        self.trio.nodes[self.at].daemon.address()
    }

    fn export(&self) -> String {
        "disk".to_owned()
    }

    fn start(&mut self) {
        self.trio.wait_served(self.at, "disk");
    }

    fn spawn(&mut self) {
        unreachable!("the campaign does not kill starts");
    }

    /// One blow. When this returns the node that served does so no more, or anew.
    fn kill(&mut self) {
        let blow = *self.rng.pick(&self.blows);
        let (old, new) = (self.at, self.next());
        // With two of three copies out of sync nothing could be served.
        self.trio.wait_in_sync(old, "disk", 3);
        match blow {
            Blow::KillAndMove => {
                self.trio.nodes[old].daemon.kill();
                let took = self.trio.open_at(new, "disk");
                println!("{blow:?}: node {new} serves after {took:?}");
                self.at = new;
                self.trio.nodes[old].daemon.start();
            }
            Blow::KillAndReturn => {
                self.trio.nodes[old].daemon.kill();
                self.trio.nodes[old].daemon.start();
            }
            Blow::FreezeAndMove => {
                self.trio.nodes[old].daemon.process().signal(Signal::STOP);
                let took = self.trio.open_at(new, "disk");
                println!("{blow:?}: node {new} serves after {took:?}");
                self.at = new;
                wait::pass(LEASE);
                self.trio.nodes[old].daemon.process().signal(Signal::CONT);
            }
            Blow::Move => {
                let took = self.trio.open_at(new, "disk");
                println!("{blow:?}: node {new} serves after {took:?}");
                self.at = new;
            }
        }
    }

    fn words(&self) -> String {
        let logs = self.trio.nodes.iter().map(|node| node.daemon.log.tail());
        logs.collect::<Vec<_>>().join("\n---\n")
    }
}

fn campaign(test: &str, blows: &[Blow], rounds: u32) {
    let campaign = Campaign {
        rounds,
        kill_starts_percent: 0,
        ..Campaign::new(seed::of_run(test))
    };
    let mut trio = Trio::start(test);
    trio.expect_losses();
    trio.create("disk", &campaign.volume_bytes().to_string());
    let mut served = Served {
        trio,
        blows: blows.to_vec(),
        rng: Rng::new(campaign.seed ^ 1),
        at: 0,
    };
    let report = campaign::run(&campaign, &mut served).unwrap_or_else(|error| panic!("{error}"));
    println!("{report:?}");
    assert!(
        report.answered_writes > 0 && report.in_doubt > 0,
        "nothing was at stake: {report:?}"
    );
    assert!(report.longest_start < Duration::from_secs(20), "{report:?}");
    served.trio.wait_in_sync(served.at, "disk", 3);
}

#[test]
fn a_killed_head_loses_nothing_wherever_the_volume_goes() {
    campaign("head-kill", &[Blow::KillAndMove, Blow::KillAndReturn], 8);
}

#[test]
fn a_volume_that_is_moved_loses_nothing() {
    campaign("head-move", &[Blow::Move], 10);
}

#[test]
fn a_frozen_head_loses_nothing() {
    campaign("head-freeze", &[Blow::FreezeAndMove], 3);
}
