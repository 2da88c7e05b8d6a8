//! Links between real machines of their own are cut: in one direction, in both, and to everybody.

use std::time::{Duration, Instant};

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::{Failure, Request, Transmission, Wishes, wire};
use ashlar_tests::network::{self, Network, Place};
use ashlar_tests::wait;

use super::fencing::{version, write};
use super::{LEASE, PAUSE_LIMIT};
use ashlar_tests::pattern::{BLOCK, Content};

fn client(trio: &Trio, at: usize) -> Transmission {
    trio.nodes[at].daemon.open("disk", Wishes::SIMPLE)
}

/// An old head is cut off from everybody while its clients still reach it. Another node serves, and both are asked, again
/// and again: the old one must answer no read with what was overwritten elsewhere, and no write at all.
#[test]
fn a_head_that_is_cut_off_serves_nothing() {
    network::demand();
    let network = Network::new(3);
    let mut trio = Trio::on("cut-off", &network);
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let mut old: Vec<Transmission> = (0..2).map(|_| client(&trio, 0)).collect();
    for number in 0..4 {
        write(&mut old[0], number, 1);
    }
    network.isolate(0);
    let cut = Instant::now();
    // Asked while it is cut off and before anybody has taken over: reads that it answers are still the newest.
    let (read, payload) = (read_of(0), ashlar_tests::pattern::blocks(7, 1, 1, 3));
    let write_of_one = Request {
        command: wire::CMD_WRITE,
        offset: BLOCK as u64,
        length: BLOCK as u64,
        payload: &payload,
        ..Request::default()
    };
    old[1].submit(&write_of_one).expect("sent");
    let took = trio.open_at(1, "disk");
    println!(
        "cut off for {:?}, another node serves after {took:?}",
        cut.elapsed()
    );
    let mut new = client(&trio, 1);
    let decided = version(&mut new, 1);
    assert!([1, 3].map(Content::Version).contains(&decided));
    write(&mut new, 0, 2);
    // From here on a read of block 0 by the old head is stale if it is answered.
    old[0].submit(&read).expect("sent");
    for _ in 0..8 {
        assert_eq!(version(&mut new, 0), Content::Version(2));
        assert_eq!(version(&mut new, 1), decided);
        wait::pass(LEASE / 4);
    }
    network.heal();
    for (mut client, what) in old.into_iter().zip(["a stale read", "a write"]) {
        loop {
            match client.complete() {
                Ok(answer) if answer.errno == 0 => panic!("{what} was answered: {answer:?}"),
                Ok(_) => {}
                Err(Failure::Io(error)) if error.kind() != std::io::ErrorKind::WouldBlock => break,
                Err(other) => panic!("{what}: {other}"),
            }
        }
    }
    trio.wait_in_sync(1, "disk", 3);
    assert_eq!(version(&mut new, 1), decided);
    trio.open_at(0, "disk");
    let mut again = client(&trio, 0);
    for (number, expected) in [
        (0, Content::Version(2)),
        (1, decided),
        (2, Content::Version(1)),
    ] {
        assert_eq!(version(&mut again, number), expected);
    }
}

fn read_of(number: u64) -> Request<'static> {
    Request {
        command: wire::CMD_READ,
        offset: number * BLOCK as u64,
        length: BLOCK as u64,
        ..Request::default()
    }
}

/// Packets are lost in one direction only, or only to etcd: nobody gets an error, and all copies are in sync again.
#[test]
fn cuts_of_every_kind_give_no_error() {
    network::demand();
    let network = Network::new(3);
    let mut trio = Trio::on("cuts", &network);
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let [head, one, other] = [0, 1, 2].map(Place::Host);
    let kinds: [(&str, Vec<(Place, Place)>); 6] = [
        ("from the head", vec![(head, one)]),
        ("to the head", vec![(one, head)]),
        ("between head and follower", vec![(head, one), (one, head)]),
        ("between followers", vec![(one, other), (other, one)]),
        (
            "of a follower from etcd",
            vec![(one, Place::Outside), (Place::Outside, one)],
        ),
        (
            "of the head from etcd",
            vec![(head, Place::Outside), (Place::Outside, head)],
        ),
    ];
    let mut client = client(&trio, 0);
    let mut at = 1;
    write(&mut client, 0, at);
    for (kind, cuts) in kinds {
        for (from, to) in cuts {
            network.cut(from, to);
        }
        let start = Instant::now();
        let mut longest = Duration::ZERO;
        while start.elapsed() < LEASE * 2 {
            let asked = Instant::now();
            at += 1;
            write(&mut client, 0, at);
            assert_eq!(version(&mut client, 0), Content::Version(at));
            longest = longest.max(asked.elapsed());
        }
        network.heal();
        let healed = trio.wait_in_sync(0, "disk", 3);
        println!("cut {kind}: longest pause {longest:?}, in sync {healed:?} after it");
        assert!(longest < PAUSE_LIMIT, "cut {kind}: {longest:?}");
    }
}
