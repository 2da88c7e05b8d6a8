//! A head that others have moved on from serves no stale read and takes no write.

use std::time::Duration;

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::{Failure, Request, Transmission, Wishes, wire};
use ashlar_tests::pattern::{self, BLOCK, Content};
use ashlar_tests::wait;
use rustix::process::Signal;

use super::LEASE;

const VOLUME: u64 = 7;
/// For what a daemon does at once, on a loaded machine.
const SOON: Duration = Duration::from_secs(5);

fn block(number: u64, version: u64) -> Vec<u8> {
    pattern::blocks(VOLUME, number, 1, version)
}

pub(super) fn version(client: &mut Transmission, number: u64) -> Content {
    let data = client
        .read(number * BLOCK as u64, BLOCK as u64)
        .expect("read");
    pattern::identify(&data, VOLUME, number).expect("a block of ours")
}

pub(super) fn write(client: &mut Transmission, number: u64, version: u64) {
    let bytes = block(number, version);
    client
        .write(number * BLOCK as u64, &bytes)
        .expect("written");
}

/// What became of a request that an old head was sent: its connection ended, without an answer or with a refusal.
fn ended(mut client: Transmission, what: &str) {
    loop {
        match client.complete() {
            Ok(answer) if answer.errno == 0 => panic!("{what} was answered by a fenced head"),
            Ok(_) => {}
            Err(Failure::Io(error)) if error.kind() != std::io::ErrorKind::WouldBlock => return,
            Err(other) => panic!("{what}: {other}"),
        }
    }
}

#[test]
fn a_head_that_slept_through_its_succession_answers_nothing() {
    let mut trio = Trio::start("fenced");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let open = |trio: &Trio, at: usize| trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
    let mut old = [open(&trio, 0), open(&trio, 0), open(&trio, 0)];
    for number in 0..3 {
        write(&mut old[0], number, 1);
    }
    trio.nodes[0].daemon.process().signal(Signal::STOP);
    let took = trio.open_at(1, "disk");
    println!("another node serves after {took:?}");
    let mut new = open(&trio, 1);
    for number in 0..2 {
        assert_eq!(version(&mut new, number), Content::Version(1));
        write(&mut new, number, 2);
    }
    wait::pass(LEASE);
    // They wait in the sockets of the sleeper and are the first that it sees.
    let read = Request {
        command: wire::CMD_READ,
        offset: 0,
        length: BLOCK as u64,
        ..Request::default()
    };
    let payload = block(1, 3);
    let written = Request {
        command: wire::CMD_WRITE,
        offset: BLOCK as u64,
        length: BLOCK as u64,
        payload: &payload,
        ..Request::default()
    };
    let flushed = Request {
        command: wire::CMD_FLUSH,
        ..Request::default()
    };
    old[0].submit(&read).expect("sent");
    old[1].submit(&written).expect("sent");
    old[2].submit(&flushed).expect("sent");
    trio.nodes[0].daemon.process().signal(Signal::CONT);
    let [reader, writer, flusher] = old;
    ended(reader, "a read");
    ended(writer, "a write");
    // A flush may be answered only if all that it promises is so; the head does not know, so it must not be.
    ended(flusher, "a flush");
    // The head had ended when its connections did; that it is gone is one message within the daemon from there.
    wait::until(
        SOON,
        "the volume to be gone from its old head",
        || match trio.nodes[0].daemon.try_open("disk", Wishes::SIMPLE) {
            Ok(_) => Err("it is still there".to_owned()),
            Err(_) => Ok(()),
        },
    );

    // Nothing of the old head's came through, then or when its node is brought up to date.
    let check = |client: &mut Transmission| {
        for (number, expected) in [(0, 2), (1, 2), (2, 1)] {
            assert_eq!(version(client, number), Content::Version(expected));
        }
    };
    check(&mut new);
    trio.wait_in_sync(1, "disk", 3);
    check(&mut new);
    trio.open_at(0, "disk");
    ended_by_itself(new);
    let mut again = open(&trio, 0);
    check(&mut again);
    write(&mut again, 2, 4);
    assert_eq!(version(&mut again, 2), Content::Version(4));
}

/// The connection of a client of a volume that went elsewhere ends without its asking anything.
fn ended_by_itself(mut client: Transmission) {
    let rest = client.connection.until_closed(Duration::from_secs(30));
    assert_eq!(rest.expect("closed"), b"");
}

/// The same node may serve a volume, lose it and serve it again, many times in one run of the daemon.
#[test]
fn a_volume_goes_round() {
    let trio = Trio::start("round");
    trio.create("disk", "64MiB");
    for turn in 0..12 {
        let at = turn % 3;
        if turn > 0 {
            trio.open_at(at, "disk");
        }
        let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
        if turn > 0 {
            assert_eq!(version(&mut client, 0), Content::Version(turn as u64));
        }
        write(&mut client, 0, turn as u64 + 1);
        // Asked again where it is served already, nothing changes and no client is sent away.
        trio.open_at(at, "disk");
        assert_eq!(version(&mut client, 0), Content::Version(turn as u64 + 1));
    }
}
