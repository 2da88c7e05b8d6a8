//! A node that holds a copy dies, freezes or is stopped in order, and returns.

use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant};

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::wait;
use rustix::process::Signal;

use super::{LEASE, LONG, PAUSE_LIMIT, longest_pause, verifying, written};

/// Bytes that are filled beside what fio writes: much more than is written while a node is away, so that it shows when
/// all is copied.
const FILLED: Range<usize> = 32 << 20..128 << 20;

fn filled(trio: &Trio) {
    trio.create("disk", "128MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    let piece = vec![0x5a; 1 << 20];
    for at in FILLED.step_by(piece.len()) {
        client.write(at as u64, &piece).expect("written");
    }
    client.flush().expect("flushed");
}

/// Lets `leave` happen to node 2 under load, then `come`; the copy must be in sync again, by no more than a bit more than
/// what was written meanwhile. Returns the longest pause.
fn away_and_back(
    test: &str,
    leave: impl FnOnce(&mut Trio),
    come: impl FnOnce(&mut Trio),
) -> Duration {
    let mut trio = Trio::start(test);
    trio.expect_losses();
    filled(&trio);
    let fio = verifying(&trio, 0, "disk", 25, "2M");
    wait::until(LONG, "fio is at work", || {
        let bytes = written(&trio);
        if bytes > FILLED.len() as f64 + 4e6 {
            Ok(())
        } else {
            Err(format!("{bytes}"))
        }
    });
    let before = written(&trio);
    let known = trio.nodes[0].copied_bytes().len();
    leave(&mut trio);
    trio.wait_in_sync(0, "disk", 2);
    wait::until(LONG, "something is written meanwhile", || {
        let bytes = written(&trio) - before;
        if bytes > 2e6 {
            Ok(())
        } else {
            Err(format!("{bytes}"))
        }
    });
    come(&mut trio);
    let took = trio.wait_in_sync(0, "disk", 3);
    // The log line comes a moment after the record.
    let copied = wait::until(LEASE, "what was copied is told", || {
        let copied = trio.nodes[0].copied_bytes();
        let told = copied.get(known).copied();
        told.ok_or_else(|| format!("{copied:?}, {known} of them of before"))
    });
    let meanwhile = written(&trio) - before;
    let pause = longest_pause(fio.finish());
    println!(
        "{test}: pause {pause:?}, copied {copied} of {meanwhile} written meanwhile, in sync after {took:?}"
    );
    assert!(copied > 0);
    assert!(
        copied as f64 <= 1.5 * meanwhile,
        "copied {copied}, written meanwhile {meanwhile}"
    );
    // What it has now is right: it serves.
    for at in [2, 0] {
        trio.open_at(at, "disk");
        let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
        for offset in FILLED.step_by(1 << 20) {
            let data = client.read(offset as u64, 1 << 20).expect("read");
            assert!(data.iter().all(|byte| *byte == 0x5a), "at {offset}");
        }
        trio.wait_in_sync(at, "disk", 3);
    }
    pause
}

#[test]
fn a_killed_node_costs_a_short_pause_and_returns_by_what_it_missed() {
    let pause = away_and_back(
        "follower-kill",
        |trio| trio.nodes[2].daemon.kill(),
        |trio| {
            trio.nodes[2].daemon.start();
        },
    );
    assert!(pause < PAUSE_LIMIT, "{pause:?}");
}

#[test]
fn a_frozen_node_is_left_out_and_taken_back() {
    let frozen = Cell::new(None::<Instant>);
    let pause = away_and_back(
        "follower-stop",
        |trio| {
            trio.nodes[2].daemon.process().signal(Signal::STOP);
            frozen.set(Some(Instant::now()));
        },
        |trio| {
            wait::pass(LEASE);
            assert!(frozen.get().expect("set").elapsed() > LEASE, "too short");
            trio.nodes[2].daemon.process().signal(Signal::CONT);
        },
    );
    assert!(pause < PAUSE_LIMIT, "{pause:?}");
}

#[test]
fn a_stopped_node_is_left_out_without_a_pause() {
    let pause = away_and_back(
        "follower-drain",
        |trio| {
            trio.nodes[2].daemon.stop();
        },
        |trio| {
            trio.nodes[2].daemon.start();
        },
    );
    assert!(pause < LEASE / 2, "{pause:?}");
}
