//! Every node loses power: what was flushed is there, the copies become alike, and no client goes on unknowing.
//!
//! Power loss of a node is made of what it is: the processes are killed, the memory that tails lie in is gone, the disk is
//! as it was when it was last synced or has some of what came later, and the kernel has another boot id.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ashlar_tests::cluster::{Node, Trio};
use ashlar_tests::ledger::{Ended, Ledger};
use ashlar_tests::nbd::{Transmission, Wishes, wire};
use ashlar_tests::network;
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::tool::Tool;
use rustix::process::Signal;

const BLOCKS: u64 = 4096;

/// The disk of a node, as it is at this moment. The daemon stands still meanwhile.
fn image(node: &mut Node, name: &str) -> PathBuf {
    let image = node.daemon.scratch.join(name);
    node.daemon.process().signal(Signal::STOP);
    copy(&node.daemon.store(), &image);
    node.daemon.process().signal(Signal::CONT);
    image
}

fn copy(from: &Path, to: &Path) {
    Tool::new("cp")
        .args(["--force", "--sparse=always", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .succeed();
}

/// Ends a node as a power cut does. `disk`: an earlier state of its disk; `None`: all that was written got there.
fn cut_power(node: &mut Node, disk: Option<&Path>) {
    node.daemon.kill();
    for entry in std::fs::read_dir(node.daemon.scratch.memory()).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            std::fs::remove_dir_all(path).expect("removed");
        } else {
            std::fs::remove_file(path).expect("removed");
        }
    }
    if let Some(disk) = disk {
        copy(disk, &node.daemon.store());
    }
    let boot = node.daemon.scratch.join("boot_id");
    std::fs::write(&boot, format!("{}\n", uuid())).expect("a file");
    node.daemon.setup.booted_as(&boot);
    node.daemon.log.expect("lost power");
}

fn uuid() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid").expect("Linux");
    text.trim().to_owned()
}

fn work(ledger: &mut Ledger, client: &mut Transmission, rng: &mut Rng, operations: u32) {
    for _ in 0..operations {
        let ended = ledger.anything(client, rng).expect("no broken promise");
        assert_eq!(ended, Ended::Well);
    }
}

fn flush(client: &mut Transmission) {
    client.flush().expect("flushed");
}

/// What may be on the volume after all nodes lost power: what was there at the last flush, or anything written since.
#[test]
fn all_nodes_lose_power_and_what_was_flushed_is_there() {
    network::demand();
    let mut rng = Rng::new(seed::of_run("power loss of all"));
    let mut trio = Trio::start("power");
    trio.expect_losses();
    trio.create("disk", &(BLOCKS * 4096).to_string());
    let mut ledger = Ledger::new(9, BLOCKS);
    for round in 0..3 {
        let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
        work(&mut ledger, &mut client, &mut rng, 2_000);
        flush(&mut client);
        let flushed = ledger.clone();
        let first = image(&mut trio.nodes[0], "at-flush");
        work(&mut ledger, &mut client, &mut rng, 300);
        // The second node's disk has some of what came after the flush, the third's all that left its memory.
        let second = image(&mut trio.nodes[1], "later");
        work(&mut ledger, &mut client, &mut rng, 300);
        let before = trio.nodes[0].daemon.log.text().len();
        for (at, disk) in [(0, Some(&first)), (1, Some(&second)), (2, None)] {
            cut_power(&mut trio.nodes[at], disk.map(PathBuf::as_path));
        }
        for at in 0..3 {
            trio.nodes[at].daemon.spawn();
        }
        for at in 0..3 {
            trio.nodes[at].daemon.wait_ready();
        }
        trio.wait_served(0, "disk");
        trio.wait_in_sync(0, "disk", 3);
        // Each block is as it was at the flush or as it was at some time since; one read decides, on every node.
        let mut after = flushed.or_later(&ledger);
        for (turn, at) in [0, 1, 2, 0].into_iter().enumerate() {
            if turn > 0 {
                trio.open_at(at, "disk");
            }
            let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
            let verified = after.verify(&mut client);
            verified.unwrap_or_else(|error| panic!("round {round}, node {at}: {error}"));
        }
        ledger = after;
        let said = trio.nodes[0].daemon.log.text();
        assert!(said[before..].contains("lost power"), "nobody noticed");
    }
}

/// The node that serves keeps its power, the nodes with the copies lose theirs: its clients must learn of it.
#[test]
fn clients_of_a_living_head_are_sent_away_when_all_copies_lost_power() {
    network::demand();
    let mut trio = Trio::start("power-head");
    trio.expect_losses();
    let options = [
        "volume",
        "create",
        "disk",
        "--size",
        "16MiB",
        "--replicas",
        "2",
    ];
    // The nodes that have no copy are known by their stores being empty.
    trio.create("warm", "1MiB");
    trio.nodes[0].daemon.admin().run(options);
    let sets = trio.volume(0, "disk").replica_sets;
    let ids: Vec<String> = trio.nodes.iter().map(Node::id).collect();
    let holds = |id: &String| sets[0].replicas.iter().any(|r| r.node_id == *id);
    let head = (0..3).find(|at| !holds(&ids[*at])).expect("one without");
    trio.open_at(head, "disk");
    let mut client = trio.nodes[head].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 4096]).expect("written");
    flush(&mut client);
    let holders: Vec<usize> = (0..3).filter(|at| *at != head).collect();
    let disks = holders
        .iter()
        .map(|at| image(&mut trio.nodes[*at], "at-flush"))
        .collect::<Vec<_>>();
    client.write(4096, &[2; 4096]).expect("written");
    for (at, disk) in holders.iter().zip(&disks) {
        cut_power(&mut trio.nodes[*at], Some(disk));
    }
    for at in &holders {
        trio.nodes[*at].daemon.spawn();
    }
    for at in &holders {
        trio.nodes[*at].daemon.wait_ready();
    }
    trio.nodes[head].daemon.log.expect("lost power");
    let rest = client.connection.until_closed(Duration::from_secs(60));
    assert_eq!(rest.expect("the session ends"), b"");
    trio.wait_served(head, "disk");
    let mut client = trio.nodes[head].daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(client.read(0, 4096).expect("read"), [1; 4096]);
    assert_eq!(client.flags & wire::TRANSMIT_READ_ONLY, 0);
    client.write(8192, &[3; 4096]).expect("written");
    trio.wait_in_sync(head, "disk", 2);
}
