//! etcd is away: a healthy volume does not notice, and what has to be decided waits for it.

use std::time::Duration;

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::wait;

use super::{LEASE, LONG, longest_pause, verifying};

#[test]
fn a_healthy_volume_does_not_notice_that_etcd_is_gone() {
    let mut trio = Trio::start("etcd-gone");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let fio = verifying(&trio, 0, "disk", 75, "8M");
    wait::until(LONG, "fio is at work", || {
        let runtime = trio.volume(0, "disk").runtime;
        let connections = runtime.map_or(0, |runtime| runtime.connections);
        if connections > 0 && trio.volume(0, "disk").ever_written {
            Ok(())
        } else {
            Err(format!("{connections} connections"))
        }
    });
    trio.etcd.kill();
    wait::pass(Duration::from_secs(60));
    trio.etcd.run();
    let pause = longest_pause(fio.finish());
    println!("longest pause {pause:?}");
    assert!(pause < LEASE / 2, "{pause:?}");
    // Everybody finds it again.
    trio.open_at(1, "disk");
    let mut client = trio.nodes[1].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    trio.wait_in_sync(1, "disk", 3);
}

/// Without etcd nobody can be left out: what clients ask waits, and is answered when etcd is back.
#[test]
fn a_node_that_dies_while_etcd_is_away_makes_clients_wait() {
    let mut trio = Trio::start("etcd-node");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    let patience = client.connection.set_read_timeout(LONG);
    patience.expect("set");
    trio.etcd.kill();
    trio.nodes[2].daemon.kill();
    let asked = std::thread::spawn(move || {
        client.write(0, &[2; 4096]).expect("written");
        assert_eq!(client.read(0, 4096).expect("read"), [2; 4096]);
        client.write(4096, &[3; 4096]).expect("written");
        client
    });
    wait::pass(LEASE * 2);
    assert!(!asked.is_finished(), "answered without the third copy");
    trio.etcd.run();
    let mut client = asked.join().expect("no error");
    trio.wait_in_sync(0, "disk", 2);
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);
    trio.open_at(2, "disk");
    assert!(client.read(0, 4096).is_err(), "it is served elsewhere");
    let mut client = trio.nodes[2].daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(client.read(0, 4096).expect("read"), [2; 4096]);
    assert_eq!(client.read(4096, 4096).expect("read"), [3; 4096]);
}

/// Nothing can be served before the records are read, and a daemon that ended over that would be started again ever later.
#[test]
fn a_daemon_that_starts_while_etcd_is_away_waits_for_it() {
    let mut trio = Trio::start("etcd-at-start");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    trio.etcd.kill();
    let daemon = &mut trio.nodes[2].daemon;
    daemon.kill();
    daemon
        .log
        .expect("nothing is served before the cluster's records");
    daemon.spawn();
    wait::until(LEASE * 4, "it says what it waits for", || {
        let status = daemon.admin().try_run(["status"]);
        let said = format!("{}{}", status.stdout, status.stderr);
        said.contains("waiting for etcd").then_some(()).ok_or(said)
    });
    assert!(daemon.is_running());
    trio.etcd.run();
    trio.nodes[2].daemon.wait_ready();
    trio.wait_in_sync(0, "disk", 3);
    assert_eq!(client.read(0, 4096).expect("read"), [1; 4096]);
}
