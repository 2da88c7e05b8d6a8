//! An orchestrator with many volumes, pods that come and go on two nodes, and everything dying under it: every pod finds
//! what those before it were answered, and in the end nothing is left.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ashlar_proto::admin;
use ashlar_tests::csi::Plugin;
use ashlar_tests::daemon::Setup;
use ashlar_tests::orchestrator::{Kind, Life, World};
use ashlar_tests::rpc::Rpc;
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;

/// How long things die. `ASHLAR_TESTS_ORCHESTRATOR_SECONDS` makes it longer.
const SECONDS: u64 = 50;
const KINDS: [Kind; 10] = [
    Kind::Ext4,
    Kind::Block,
    Kind::Ext4,
    Kind::Ext4,
    Kind::Xfs,
    Kind::Block,
    Kind::Ext4,
    Kind::Ext4,
    Kind::Block,
    Kind::Xfs,
];

/// Once more alive, to die at a point of its work half of the time.
fn revive(plugin: &mut Plugin, rng: &mut Rng) {
    if rng.chance(50) {
        let point = rng.pick(&ashlar_csi::failpoint::NAMES);
        plugin.spawn_driver(&["--fail-point", point]);
    } else {
        plugin.spawn_driver(&[]);
    }
}

/// What directories are below `directory`, at any depth, but for the two that pods and stagings are in.
fn directories(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for place in ["pods", "plugins"] {
        let Ok(entries) = fs::read_dir(directory.join(place)) else {
            continue;
        };
        found.extend(
            entries
                .flatten()
                .map(|entry| entry.path().display().to_string()),
        );
    }
    found
}

#[test]
fn every_pod_gets_its_data_and_nothing_is_left() {
    let seed = seed::of_run("csi-simulated");
    let mut rng = Rng::new(seed);
    let seconds = std::env::var("ASHLAR_TESTS_ORCHESTRATOR_SECONDS")
        .map_or(SECONDS, |text| text.parse().expect("a number"));
    let mut daemon = Setup::default().store_size("2GiB").start("csi-sim");
    let mut plugins = ["node-a", "node-b"].map(|node| Plugin::of_several(&daemon, node));
    for plugin in &mut plugins {
        plugin.set_arguments(&["--unstage-patience", "1"]);
        plugin.start_driver(&[]);
    }
    let nodes = plugins.iter().map(|plugin| plugin.calls().clone());
    let world = Arc::new(World::new(nodes.collect()));
    let lives: Vec<_> = KINDS
        .iter()
        .zip(1..)
        .map(|(kind, number)| {
            let life = Life::new(&world, number, *kind, rng.split());
            std::thread::spawn(move || life.live())
        })
        .collect();
    let begun = Instant::now();
    let (mut killed, mut fallen) = (0, 0);
    let is_worth_it = |killed, fallen| world.happened("pods") > 50 && killed > 0 && fallen > 0;
    // On a machine that is busy with other things for as long as it takes, within bounds.
    while begun.elapsed() < Duration::from_secs(seconds)
        || (!is_worth_it(killed, fallen) && begun.elapsed() < Duration::from_secs(seconds * 6))
    {
        wait::pass(Duration::from_millis(rng.within(100..1500)));
        for plugin in &mut plugins {
            if plugin.is_dead() {
                plugin.wait_killed(Duration::from_secs(10));
                revive(plugin, &mut rng);
                fallen += 1;
            }
        }
        match rng.below(10) {
            0..3 => {
                let plugin = &mut plugins[rng.below(2) as usize];
                plugin.kill_driver();
                wait::pass(Duration::from_millis(rng.within(0..500)));
                revive(plugin, &mut rng);
                killed += 1;
            }
            3..5 => {
                daemon.kill();
                wait::pass(Duration::from_millis(rng.within(0..500)));
                daemon.start();
            }
            _ => {}
        }
        if lives.iter().any(|life| life.is_finished()) {
            break;
        }
    }
    world.stop();
    for plugin in &mut plugins {
        if plugin.is_dead() {
            plugin.wait_killed(Duration::from_secs(10));
        } else {
            plugin.kill_driver();
        }
        plugin.start_driver(&[]);
    }
    let ended: Vec<_> = lives.into_iter().map(|life| life.join()).collect();
    println!(
        "{}drivers killed {killed}, fallen at a fail point {fallen}",
        world.tally()
    );
    assert!(
        ended.iter().all(Result::is_ok),
        "an orchestrator's demand was not met; see above"
    );
    // Nothing is remembered by anybody.
    let mut rpc = Rpc::connect(&daemon.data_dir().join("admin.sock"));
    let volumes = rpc.list_volumes(admin::ListVolumesRequest::default());
    assert_eq!(volumes.expect("listed").volumes, []);
    let nodes = rpc.list_nodes(admin::ListNodesRequest {});
    for node in nodes.expect("listed").nodes {
        assert_eq!(node.volume_ids, Vec::<String>::new(), "{}", node.node_id);
    }
    for plugin in &plugins {
        assert_eq!(plugin.leftovers(), Vec::<String>::new());
        assert_eq!(plugin.remembered(), Vec::<String>::new());
        assert_eq!(directories(plugin.root()), Vec::<String>::new());
    }
    assert!(
        is_worth_it(killed, fallen),
        "{killed} killed, {fallen} fallen, {}",
        world.tally()
    );
}
