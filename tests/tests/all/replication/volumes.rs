//! What is done to a volume is done to its copies on all nodes.

use std::time::Duration;

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::{Wishes, wire};
use ashlar_tests::wait;

/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(60);

/// Bytes that volumes hold on the stores of node `at`.
fn held(trio: &Trio, at: usize) -> f64 {
    let metrics = trio.nodes[at].daemon.metrics();
    metrics
        .sum("ashlar_store_live_bytes", &[])
        .expect("a store")
}

fn wait_gone(trio: &Trio, at: usize) {
    wait::until(LONG, "nothing is left of the volume", || {
        let listed = trio.nodes[at].daemon.admin().json(["volume", "list"]);
        let count = listed.as_array().expect("a list").len();
        let bytes = held(trio, at);
        if count == 0 && bytes == 0.0 {
            Ok(())
        } else {
            let log = trio.nodes[at].daemon.log.tail();
            Err(format!("node {at}: {count} volumes, {bytes} bytes\n{log}"))
        }
    });
}

#[test]
fn a_deleted_volume_is_gone_from_every_node() {
    let trio = Trio::start("delete");
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &vec![1; 8 << 20]).expect("written");
    client.flush().expect("flushed");
    for at in 0..3 {
        assert!(held(&trio, at) >= 8e6, "node {at} has no copy");
    }
    // Not while it is in use, wherever that is asked.
    for node in &trio.nodes {
        let admin = node.daemon.admin();
        for command in [
            &["volume", "delete", "disk", "--yes"][..],
            &["volume", "set", "disk", "--read-only"][..],
        ] {
            let refusal = admin.refused(command);
            assert!(refusal.contains("in use"), "{refusal}");
        }
    }
    assert_eq!(client.read(0, 4096).expect("read"), [1; 4096]);
    client.disconnect().expect("left");
    // By any node.
    trio.nodes[1]
        .daemon
        .admin()
        .run(["volume", "delete", "disk", "--yes"]);
    (0..3).for_each(|at| wait_gone(&trio, at));
    // The name is free, and nothing of the old data shows.
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(client.read(0, 4096).expect("read"), [0; 4096]);
}

#[test]
fn a_node_that_was_away_drops_its_copy_when_it_returns() {
    let mut trio = Trio::start("delete-away");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &vec![1; 8 << 20]).expect("written");
    client.disconnect().expect("left");
    trio.nodes[2].daemon.kill();
    trio.nodes[0]
        .daemon
        .admin()
        .run(["volume", "delete", "disk", "--yes"]);
    wait::until(LONG, "the other copies are gone", || {
        let left = [held(&trio, 0), held(&trio, 1)];
        if left == [0.0; 2] {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    trio.nodes[2].daemon.start();
    (0..3).for_each(|at| wait_gone(&trio, at));
}

#[test]
fn a_volume_whose_node_cannot_be_asked_is_deleted_once_it_is_taken_over() {
    let mut trio = Trio::start("delete-lost");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    client.disconnect().expect("left");
    trio.nodes[0].daemon.kill();
    let admin = trio.nodes[1].daemon.admin();
    let refusal = admin.refused(["volume", "delete", "disk", "--yes"]);
    assert!(refusal.contains("cannot be asked"), "{refusal}");
    assert!(refusal.contains("ashlar volume open disk"), "{refusal}");
    trio.open_at(1, "disk");
    let admin = trio.nodes[1].daemon.admin();
    admin.run(["volume", "delete", "disk", "--yes"]);
    trio.nodes[0].daemon.start();
    (0..3).for_each(|at| wait_gone(&trio, at));
}

#[test]
fn a_node_that_is_lost_keeps_no_deleted_volume() {
    let mut trio = Trio::start("delete-gone");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &vec![1; 8 << 20]).expect("written");
    client.disconnect().expect("left");
    let lost = trio.nodes[2].id();
    trio.nodes[2].daemon.kill();
    let admin = trio.nodes[0].daemon.admin();
    admin.run(["volume", "delete", "disk", "--yes"]);
    admin.run(["node", "remove", &lost]);
    (0..2).for_each(|at| wait_gone(&trio, at));
}

#[test]
fn volumes_are_deleted_while_copies_are_brought_up_to_date() {
    let mut trio = Trio::start("delete-filling");
    trio.expect_losses();
    trio.nodes[2].daemon.kill();
    let names = ["a", "b", "c", "d"];
    for name in names {
        trio.create(name, "64MiB");
        let mut client = trio.nodes[0].daemon.open(name, Wishes::SIMPLE);
        for at in 0..48 {
            client.write(at << 20, &vec![1; 1 << 20]).expect("written");
        }
        client.disconnect().expect("left");
    }
    trio.nodes[2].daemon.start();
    wait::until(LONG, "copies are being filled", || match held(&trio, 2) {
        bytes if bytes >= 4e6 => Ok(()),
        bytes => Err(format!("{bytes} bytes")),
    });
    for name in names {
        let admin = trio.nodes[0].daemon.admin();
        admin.run(["volume", "delete", name, "--yes"]);
    }
    (0..3).for_each(|at| wait_gone(&trio, at));
}

#[test]
fn a_volume_grows_on_every_node() {
    let trio = Trio::start("resize");
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    trio.nodes[0]
        .daemon
        .admin()
        .run(["volume", "resize", "disk", "--size", "160MiB"]);
    let mut grown = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(grown.size_bytes, 160 << 20);
    let end = (160 << 20) - 4096;
    grown.write(end, &[2; 4096]).expect("written");
    // The client of before can do it too.
    client.write(end - 4096, &[3; 4096]).expect("written");
    for at in [1, 2, 0] {
        trio.open_at(at, "disk");
        let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
        assert_eq!(client.size_bytes, 160 << 20);
        assert_eq!(client.read(end, 4096).expect("read"), [2; 4096]);
        assert_eq!(client.read(end - 4096, 4096).expect("read"), [3; 4096]);
        assert_eq!(client.read(0, 4096).expect("read"), [1; 4096]);
    }
    let refusal = trio.nodes[0]
        .daemon
        .admin()
        .refused(["volume", "resize", "disk", "--size", "64MiB"]);
    assert!(refusal.contains("cannot shrink"), "{refusal}");
}

#[test]
fn read_only_holds_wherever_it_is_served() {
    let trio = Trio::start("read-only");
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    client.disconnect().expect("left");
    let set = |at: usize, value: &str| {
        let setting = format!("--read-only={value}");
        trio.nodes[at]
            .daemon
            .admin()
            .run(["volume", "set", "disk", &setting]);
    };
    set(0, "true");
    for at in [0, 1, 2] {
        if at > 0 {
            trio.open_at(at, "disk");
        }
        let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
        assert_ne!(client.flags & wire::TRANSMIT_READ_ONLY, 0);
        assert_eq!(client.read(0, 4096).expect("read"), [1; 4096]);
        let refused = client.write(0, &[2; 4096]).expect_err("read-only");
        assert_eq!(refused.errno(), Some(wire::EPERM));
        client.disconnect().expect("left");
    }
    set(2, "false");
    let mut client = trio.nodes[2].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[2; 4096]).expect("written");
}
