//! Copies that move: off a node that is drained, to another when a node is lost for good, and to a node that joins. A
//! client verifies what it reads all the while.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ashlar_proto::admin::{self, ReplicaState};
use ashlar_tests::cluster::Trio;
use ashlar_tests::daemon::Setup;
use ashlar_tests::nbd::{Transmission, Wishes};
use ashlar_tests::network::{self, Network};
use ashlar_tests::pattern::{self, BLOCK, Content};
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;
use serde_json::Value;

use super::wait_written;

const VOLUME: u64 = 21;
/// Blocks of a chunk.
const CHUNK: u64 = 16_384;
/// A set each.
const CHUNKS: u64 = 32;
/// Blocks in use at the beginning of each chunk (4 MiB).
const USED: u64 = 1_024;
/// Blocks that are filled and read at a time.
const PIECE: u64 = 256;
/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(240);
/// How long a node is away before it is replaced, seconds.
const REPLACE_AFTER: u64 = 10;

/// The first block of each piece in use.
fn pieces() -> impl Iterator<Item = u64> {
    let in_chunk = || (0..USED).step_by(PIECE as usize);
    (0..CHUNKS).flat_map(move |chunk| in_chunk().map(move |first| chunk * CHUNK + first))
}

fn setup() -> Setup {
    Setup::default().args(["--replace-after", &REPLACE_AFTER.to_string()])
}

/// A volume of which every set holds the same, and what is known of it.
fn filled(trio: &Trio) -> HashMap<u64, u64> {
    trio.create("disk", &(CHUNKS * CHUNK * BLOCK as u64).to_string());
    let sets = trio.volume(0, "disk").replica_sets.len();
    assert_eq!(sets as u64, CHUNKS, "a set for each chunk");
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    let mut known = HashMap::new();
    for first in pieces() {
        let bytes = pattern::blocks(VOLUME, first, PIECE, 1);
        client.write(first * BLOCK as u64, &bytes).expect("written");
        known.extend((first..first + PIECE).map(|block| (block, 1)));
    }
    client.flush().expect("flushed");
    known
}

fn version_of(client: &mut Transmission, block: u64) -> u64 {
    let data = client.read(block * BLOCK as u64, BLOCK as u64);
    let data = data.expect("read");
    match pattern::identify(&data, VOLUME, block) {
        Ok(Content::Version(version)) => version,
        other => panic!("block {block}: {other:?}"),
    }
}

/// A client that writes and reads blocks at random, and knows what each must be.
struct Load {
    over: Arc<AtomicBool>,
    client: JoinHandle<(HashMap<u64, u64>, Vec<Duration>)>,
}

impl Load {
    fn start(trio: &Trio, at: usize, mut known: HashMap<u64, u64>) -> Load {
        let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
        let mut rng = Rng::new(seed::of_run("moving"));
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let client = std::thread::spawn(move || {
            let mut took = Vec::new();
            let mut version = 1;
            while !ended.load(Ordering::Acquire) {
                let block = rng.below(CHUNKS) * CHUNK + rng.below(USED);
                let start = Instant::now();
                if rng.chance(50) {
                    version += 1;
                    let bytes = pattern::blocks(VOLUME, block, 1, version);
                    client.write(block * BLOCK as u64, &bytes).expect("written");
                    known.insert(block, version);
                } else {
                    assert_eq!(version_of(&mut client, block), known[&block]);
                }
                took.push(start.elapsed());
                if rng.chance(1) {
                    client.flush().expect("flushed");
                }
                wait::pass(Duration::from_millis(1));
            }
            (known, took)
        });
        Load { over, client }
    }

    /// What every block holds now. Prints how long operations took.
    fn end(self, what: &str) -> HashMap<u64, u64> {
        self.over.store(true, Ordering::Release);
        let (known, mut took) = self.client.join().expect("a client that found no fault");
        took.sort_unstable();
        let at = |hundredths: usize| took[(took.len() - 1) * hundredths / 100];
        println!(
            "{what}: {} operations, half within {:?}, 99 of 100 within {:?}, all within {:?}",
            took.len(),
            at(50),
            at(99),
            at(100)
        );
        known
    }
}

/// Reads everything at a node, which thereby serves the volume.
fn verify_at(trio: &Trio, at: usize, known: &HashMap<u64, u64>) {
    trio.open_at(at, "disk");
    let mut client = trio.nodes[at].daemon.open("disk", Wishes::SIMPLE);
    for first in pieces() {
        let data = client.read(first * BLOCK as u64, PIECE * BLOCK as u64);
        let data = data.expect("read");
        for (block, bytes) in (first..).zip(data.chunks_exact(BLOCK)) {
            let content = pattern::identify(bytes, VOLUME, block);
            let expected = Content::Version(known[&block]);
            assert_eq!(content, Ok(expected), "block {block} at node {at}");
        }
    }
}

/// A node as node 0 tells of it.
fn node(trio: &Trio, id: &str) -> Value {
    let listed = trio.nodes[0].daemon.admin().json(["node", "list"]);
    let nodes = listed["nodes"].as_array().expect("nodes").clone();
    let found = nodes.into_iter().find(|node| node["id"] == id);
    found.expect("the node is listed")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value}"))
}

/// Copies of the volume on each node, by its id, as node 0 knows them, and whether every set is whole and at rest.
fn copies(trio: &Trio) -> (HashMap<String, usize>, bool) {
    let volume = trio.volume(0, "disk");
    let mut on: HashMap<String, usize> = HashMap::new();
    let is_whole = |set: &admin::ReplicaSet| {
        set.replicas.len() == 3
            && set
                .replicas
                .iter()
                .all(|replica| replica.state() == ReplicaState::InSync)
    };
    for replica in volume.replica_sets.iter().flat_map(|set| &set.replicas) {
        *on.entry(replica.node_id.clone()).or_default() += 1;
    }
    (on, volume.replica_sets.iter().all(is_whole))
}

/// Bytes that clients' blocks take on node `at`.
fn held(trio: &Trio, at: usize) -> f64 {
    let metrics = trio.nodes[at].daemon.metrics();
    metrics
        .sum("ashlar_store_live_bytes", &[])
        .expect("a store")
}

fn wait_given_back(trio: &Trio, at: usize) {
    wait::until(LONG, "the node gives its blocks back", || {
        let bytes = held(trio, at);
        if bytes == 0.0 {
            Ok(())
        } else {
            Err(format!("{bytes} bytes\n{}", logs(trio)))
        }
    });
}

fn logs(trio: &Trio) -> String {
    let all = trio.nodes.iter().enumerate();
    all.map(|(at, node)| format!("node {at}:\n{}\n", node.daemon.log.tail()))
        .collect()
}

#[test]
fn a_node_is_drained_under_load_and_removed() {
    network::demand();
    let network = Network::new(4);
    let mut trio = Trio::on_with("drain", &network, setup);
    trio.expect_losses();
    let known = filled(&trio);
    let going = trio.nodes[2].id();
    let load = Load::start(&trio, 0, known);
    let admin = trio.nodes[0].daemon.admin();
    // With nobody to take its copies it keeps them.
    admin.run(["node", "drain", &going]);
    wait::until(LONG, "that nobody takes them is told", || {
        let shown = node(&trio, &going);
        if number(&shown["stuck_copies"]) == CHUNKS && shown["state"] == "draining" {
            Ok(())
        } else {
            Err(format!("{shown}\n{}", logs(&trio)))
        }
    });
    assert_eq!(copies(&trio).0[&going] as u64, CHUNKS);
    let refusal = admin.refused(["node", "remove", &going]);
    assert!(refusal.contains("node drain"), "{refusal}");
    let status = admin.run(["status"]);
    assert!(status.contains("no other node"), "{status}");

    trio.join("drain", &network, setup());
    let start = Instant::now();
    let drain = admin.tool(["node", "drain", &going, "--wait"]);
    let said = drain.limit(LONG).succeed();
    println!("drained in {:?}: {said}", start.elapsed());
    // A node is told of changes of records a moment after whoever asked for them.
    wait_whole_without(&trio, &going);
    // What it had is given back.
    wait_given_back(&trio, 2);
    let known = load.end("drain");
    admin.run(["node", "remove", &going]);
    trio.nodes[2].daemon.kill();
    for at in [0, 1, 3] {
        verify_at(&trio, at, &known);
    }
}

fn wait_whole_without(trio: &Trio, lost: &str) {
    wait::until(LONG, "every set has three copies again", || {
        let (on, is_whole) = copies(trio);
        if is_whole && !on.contains_key(lost) {
            Ok(())
        } else {
            Err(format!("{on:?}\n{}", logs(trio)))
        }
    });
}

#[test]
fn a_node_that_is_lost_for_good_is_replaced() {
    network::demand();
    let network = Network::new(4);
    let mut trio = Trio::on_with("replaced", &network, setup);
    trio.expect_losses();
    let known = filled(&trio);
    trio.join("replaced", &network, setup());
    let lost = trio.nodes[2].id();
    let load = Load::start(&trio, 0, known);
    wait_written(&trio, 1e6);
    let start = Instant::now();
    trio.nodes[2].daemon.kill();
    wait_whole_without(&trio, &lost);
    let took = start.elapsed();
    println!("in full health {took:?} after a node was lost");
    assert!(took >= Duration::from_secs(REPLACE_AFTER));
    let known = load.end("replaced");
    let admin = trio.nodes[0].daemon.admin();
    admin.run(["node", "remove", &lost]);
    for at in [1, 3, 0] {
        verify_at(&trio, at, &known);
    }
}

/// The one that serves the volume is lost, and nobody opens the volume elsewhere.
#[test]
fn a_volume_whose_node_is_lost_is_looked_after() {
    network::demand();
    let network = Network::new(4);
    let mut trio = Trio::on_with("unserved", &network, setup);
    trio.expect_losses();
    let known = filled(&trio);
    trio.join("unserved", &network, setup());
    trio.open_at(2, "disk");
    let lost = trio.nodes[2].id();
    trio.nodes[2].daemon.kill();
    wait_whole_without(&trio, &lost);
    for at in [3, 0] {
        verify_at(&trio, at, &known);
    }
    // When it is back it has nothing to say, and gives back what it had.
    trio.nodes[2].daemon.start();
    wait::until(LONG, "the old copies are given back", || {
        let total: f64 = (0..4).map(|at| held(&trio, at)).sum();
        let expected = (3 * CHUNKS * USED * BLOCK as u64) as f64;
        if (total - expected).abs() < 0.01 * expected {
            Ok(())
        } else {
            Err(format!("{total} of {expected}\n{}", logs(&trio)))
        }
    });
    verify_at(&trio, 2, &known);
}

#[test]
fn a_node_that_joins_gets_its_share_under_load() {
    network::demand();
    let network = Network::new(4);
    let mut trio = Trio::on_with("spread", &network, setup);
    trio.expect_losses();
    let known = filled(&trio);
    let load = Load::start(&trio, 0, known);
    let start = Instant::now();
    trio.join("spread", &network, setup());
    let mut last = Vec::new();
    wait::until(LONG, "the load is even", || {
        let used: Vec<f64> = (0..4).map(|at| held(&trio, at)).collect();
        let most = used.iter().copied().fold(0.0, f64::max);
        let least = used.iter().copied().fold(f64::MAX, f64::min);
        let (on, is_whole) = copies(&trio);
        last.clone_from(&used);
        if is_whole && most - least <= 0.05 * most {
            Ok(())
        } else {
            Err(format!("{used:?} {on:?}\n{}", logs(&trio)))
        }
    });
    println!("even after {:?}: {last:?}", start.elapsed());
    // And there it rests. A copy that is out for a moment comes back where it was.
    let (before, _) = copies(&trio);
    wait::pass(Duration::from_secs(20));
    wait::until(LONG, "all copies are in sync", || {
        let (after, is_whole) = copies(&trio);
        assert_eq!(after, before);
        if is_whole { Ok(()) } else { Err(logs(&trio)) }
    });
    let known = load.end("spread");
    for at in [3, 1, 0] {
        verify_at(&trio, at, &known);
    }
}

/// By its id; the zone is the node's from now on.
fn label(trio: &Trio, at: usize, zone: &str) {
    let label = format!("zone={zone}");
    let admin = trio.nodes[0].daemon.admin();
    admin.run(["node", "label", &trio.nodes[at].id(), &label]);
}

#[test]
fn a_volume_that_is_confined_to_a_zone_moves_there_under_load() {
    network::demand();
    let network = Network::new(4);
    let mut trio = Trio::on_with("zones", &network, setup);
    trio.expect_losses();
    let known = filled(&trio);
    let load = Load::start(&trio, 0, known);
    for (at, zone) in [(0, "a"), (1, "a"), (2, "b")] {
        label(&trio, at, zone);
    }
    let admin = trio.nodes[0].daemon.admin();
    // Two nodes of that zone are too few for three copies.
    let refusal = admin.refused(["volume", "set", "disk", "--zone", "a"]);
    assert!(
        refusal.contains("only 2 node(s) with room are there, in a;"),
        "{refusal}"
    );
    trio.join("zones", &network, setup());
    label(&trio, 3, "a");
    // The room of a node that has just joined is not told at once.
    wait::until(LONG, "the zone is large enough", || {
        let set = admin.try_run(["volume", "set", "disk", "--zone", "a"]);
        if set.status.success() {
            Ok(())
        } else {
            Err(set.stderr)
        }
    });
    let going = trio.nodes[2].id();
    wait_whole_without(&trio, &going);
    wait_given_back(&trio, 2);
    let shown = admin.run(["volume", "show", "disk"]);
    assert!(
        shown
            .lines()
            .any(|line| line.split_whitespace().eq(["Zones:", "a"])),
        "{shown}"
    );
    // A node that cannot be replaced within the zone keeps its copies, and the status says why.
    let last = trio.nodes[3].id();
    admin.run(["node", "drain", &last]);
    wait::until(LONG, "that nobody takes them is told", || {
        let status = admin.run(["status"]);
        if status.contains("those of disk may lie in a only") {
            Ok(())
        } else {
            Err(format!("{status}\n{}", logs(&trio)))
        }
    });
    assert_eq!(copies(&trio).0[&last] as u64, CHUNKS);
    // Set free, it goes where there is room.
    admin.run(["volume", "set", "disk", "--all-zones"]);
    wait_whole_without(&trio, &last);
    let known = load.end("zones");
    for at in [2, 1, 0] {
        verify_at(&trio, at, &known);
    }
}
