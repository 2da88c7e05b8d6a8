//! Three daemons of one cluster, each with a driver beside it: volumes with copies that are forced from node to node while
//! they are written to.

use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ashlar_tests::cluster::Trio;
use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, Plugin, csi, mounted, raw};
use ashlar_tests::daemon::Setup;
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;
use ashlar_tests::workload::{Blocks, Files, direct};
use rustix::process::Signal;
use tonic::Code;

use super::SMALL;

const NAMES: [&str; 3] = ["node-a", "node-b", "node-c"];
/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(90);
/// Threads that write to a raw volume, each to blocks of its own.
const WRITERS: u64 = 4;
/// Blocks of each.
const BLOCKS: u64 = 64;
/// Requests a second that a limited volume may take.
const LIMIT_IOPS: f64 = 10.0;
/// Requests over which its rate is measured.
const LIMITED_REQUESTS: f64 = 50.0;
/// What patterns call the raw volume.
const VOLUME: u64 = 4;

/// A driver beside each daemon. Dropped before the daemons.
fn plugins(trio: &Trio) -> Vec<Plugin> {
    let nodes = trio.nodes.iter().zip(NAMES);
    let mut plugins: Vec<Plugin> = nodes
        .map(|(node, name)| Plugin::beside(&node.daemon, name))
        .collect();
    for plugin in &mut plugins {
        plugin.set_arguments(&["--unstage-patience", "2"]);
        plugin.start_driver(&[]);
    }
    plugins
}

/// Creates a volume with three copies by the driver `at`; the room of daemons that have just joined is not told at once.
fn with_copies(
    at: &Plugin,
    name: &str,
    capability: &csi::VolumeCapability,
) -> Result<Claim, (Code, String)> {
    let begun = Instant::now();
    loop {
        let made = Claim::of_class(at, name, SMALL, capability.clone(), &[("replicas", "3")]);
        match made {
            Err((Code::ResourceExhausted, _)) if begun.elapsed() < LONG => {
                wait::pass(Duration::from_millis(100));
            }
            made => return made,
        }
    }
}

/// Work on a raw and on a mounted volume, until it is refused.
struct Work {
    writers: Vec<JoinHandle<Blocks>>,
    filer: JoinHandle<Files>,
    /// Answered so far: blocks, files.
    counts: Arc<[AtomicU64; 2]>,
}

/// What was answered.
struct Done {
    blocks: Vec<Blocks>,
    files: Files,
}

impl Work {
    fn start(block: &Claim, files: &Claim, seed: u64) -> Work {
        let counts = Arc::<[AtomicU64; 2]>::default();
        let writers = (0..WRITERS).map(|writer| {
            let device = direct(&block.target).expect("a device");
            let (mut rng, counts) = (Rng::new(seed ^ writer), Arc::clone(&counts));
            std::thread::spawn(move || {
                let mut blocks = Blocks::new(VOLUME, writer * BLOCKS, BLOCKS);
                while blocks.write(&device, &mut rng).is_ok() {
                    counts[0].fetch_add(1, Ordering::Relaxed);
                }
                blocks
            })
        });
        let (directory, counted) = (files.target.clone(), Arc::clone(&counts));
        Work {
            writers: writers.collect(),
            filer: std::thread::spawn(move || {
                let mut files = Files::new(VOLUME);
                while files.write(&directory).is_ok() {
                    counted[1].fetch_add(1, Ordering::Relaxed);
                }
                files
            }),
            counts,
        }
    }

    /// Waits until a good deal was answered from now on.
    fn get_on(&self) {
        for (count, least) in self.counts.iter().zip([200, 10]) {
            let goal = count.load(Ordering::Relaxed) + least;
            wait::until(LONG, "writes get on", || {
                match count.load(Ordering::Relaxed) {
                    now if now >= goal => Ok(()),
                    now => Err(format!("{now} of {goal}")),
                }
            });
        }
    }

    /// What was answered, when every writer was refused.
    fn end(self) -> Done {
        let writers = self.writers.into_iter();
        Done {
            blocks: writers
                .map(|writer| writer.join().expect("a writer"))
                .collect(),
            files: self.filer.join().expect("the filer"),
        }
    }
}

impl Done {
    /// Demands on `block` and `files`, where they are now, everything that was answered and nothing torn.
    fn check(&mut self, block: &Claim, files: &Claim) {
        let device = direct(&block.target).expect("a device");
        let blocks = self.blocks.iter_mut();
        let doubts: u64 = blocks
            .map(|blocks| blocks.check(&device).expect("read"))
            .sum();
        self.files.check(&files.target).expect("read");
        println!(
            "as answered, but for {doubts} blocks of writes that were not; {} files",
            self.files.durable()
        );
    }
}

/// A raw and a mounted volume, published to node `at` and written to there.
fn used(plugins: &[Plugin], at: usize, seed: u64) -> (Claim, Claim, Work) {
    let claim = |name: &str, capability| {
        let created = with_copies(&plugins[2], name, &capability).expect("created");
        let mut claim = created.on(&plugins[at]);
        claim.publish_context = claim.publish_to(&plugins[2], NAMES[at]).expect("published");
        claim.bring_up(&plugins[at]);
        claim
    };
    let block = claim("block", raw(Mode::SingleNodeWriter));
    let files = claim("files", mounted("ext4", Mode::SingleNodeWriter));
    let work = Work::start(&block, &files, seed);
    work.get_on();
    (block, files, work)
}

/// Takes a volume from a node by force and gives it to another, as the claim there.
fn force(plugins: &[Plugin], claim: &Claim, from: usize, to: usize) -> Claim {
    let controller = &plugins[2];
    let held = claim.publish_to(controller, NAMES[to]).expect_err("held");
    assert_eq!(held.0, Code::FailedPrecondition);
    assert!(held.1.contains(NAMES[from]), "{held:?}");
    let begun = Instant::now();
    controller
        .controller_unpublish(&claim.id, NAMES[from])
        .expect("taken");
    let taken = begun.elapsed();
    let mut moved = claim.on(&plugins[to]);
    moved.publish_context = moved.publish_to(controller, NAMES[to]).expect("given");
    moved.bring_up(&plugins[to]);
    println!("taken after {taken:?}, used after {:?}", begun.elapsed());
    moved
}

/// Whoever is asked to publish a volume, and whoever stages it, has it served there: any node may lose one.
fn expect_moves(trio: &Trio) {
    for node in 0..trio.nodes.len() {
        trio.expect_move(node);
    }
}

fn nothing_is_left(plugins: &[Plugin]) {
    for plugin in plugins {
        assert_eq!(plugin.leftovers(), Vec::<String>::new());
        assert_eq!(plugin.remembered(), Vec::<String>::new());
    }
}

#[test]
fn a_forced_move_under_writes_loses_and_tears_nothing() {
    let seed = seed::of_run("csi-nodes");
    let mut trio = Trio::start("csi-nodes");
    trio.expect_losses();
    expect_moves(&trio);
    let plugins = plugins(&trio);
    let (block, files, work) = used(&plugins, 0, seed);
    for claim in [&block, &files] {
        // Where it is used, there it is served.
        let here = trio.volume(0, &claim.id);
        assert_eq!(here.not_served_reason, "");
        assert_eq!((here.replicas, here.replica_sets.len()), (3, 1));
    }
    let moved = [&block, &files].map(|claim| force(&plugins, claim, 0, 1));
    for claim in &moved {
        assert_eq!(trio.volume(1, &claim.id).not_served_reason, "");
    }
    let mut done = work.end();
    done.check(&moved[0], &moved[1]);
    // What the old node still has is of no use, and goes.
    let late = direct(&block.target)
        .and_then(|device| Blocks::new(VOLUME, 0, 1).write(&device, &mut Rng::new(seed)));
    assert!(late.is_err(), "the old node wrote after it was fenced");
    for claim in [&block, &files] {
        claim.unpublish(&plugins[0]).expect("unpublished");
        claim.unstage(&plugins[0]).expect("unstaged");
    }
    assert_eq!(plugins[0].leftovers(), Vec::<String>::new());
    done.check(&moved[0], &moved[1]);
    for claim in &moved {
        claim.unpublish(&plugins[1]).expect("unpublished");
        claim.unstage(&plugins[1]).expect("unstaged");
        let controller = &plugins[2];
        let taken = controller.controller_unpublish(&claim.id, NAMES[1]);
        taken.expect("taken");
        controller.delete(&claim.id).expect("deleted");
    }
    nothing_is_left(&plugins);
}

/// The old node stands still, daemon and all, and wakes when its volumes are elsewhere.
#[test]
fn a_node_that_slept_through_a_forced_move_writes_nothing() {
    let seed = seed::of_run("csi-zombie");
    let mut trio = Trio::start("csi-zombie");
    trio.expect_losses();
    expect_moves(&trio);
    let plugins = plugins(&trio);
    let (block, files, work) = used(&plugins, 0, seed);
    trio.nodes[0].daemon.process().signal(Signal::STOP);
    let moved = [&block, &files].map(|claim| force(&plugins, claim, 0, 1));
    trio.nodes[0].daemon.process().signal(Signal::CONT);
    let mut done = work.end();
    done.check(&moved[0], &moved[1]);
    for claim in [&block, &files] {
        claim.unpublish(&plugins[0]).expect("unpublished");
        claim.unstage(&plugins[0]).expect("unstaged");
    }
    fs::write(moved[1].target.join("after"), b"the move").expect("written");
    done.check(&moved[0], &moved[1]);
    for claim in &moved {
        claim.unpublish(&plugins[1]).expect("unpublished");
        claim.unstage(&plugins[1]).expect("unstaged");
    }
    nothing_is_left(&plugins);
}

/// A volume that somebody has another daemon serve comes back to where it is published.
#[test]
fn a_volume_follows_its_publication_and_classes_are_kept() {
    let mut trio = Trio::start("csi-follow");
    trio.expect_losses();
    expect_moves(&trio);
    let plugins = plugins(&trio);
    let controller = &plugins[2];
    let capability = mounted("ext4", Mode::SingleNodeWriter);
    let mut claim = with_copies(controller, "follow", &capability)
        .expect("created")
        .on(&plugins[0]);
    // Asked again it is the same; with other copies it is another.
    let again = with_copies(controller, "follow", &capability).expect("found");
    assert_eq!(again.id, claim.id);
    let other = Claim::of_class(
        controller,
        "follow",
        SMALL,
        capability.clone(),
        &[("replicas", "2")],
    );
    assert_eq!(other.err().expect("differs").0, Code::AlreadyExists);
    let lenient = [("replicas", "3"), ("minInSync", "1")];
    let made = Claim::of_class(controller, "lenient", SMALL, capability.clone(), &lenient);
    let made = made.expect("created");
    // A node is told of changes of records a moment after whoever asked for them.
    wait::until(LONG, "the volume is listed", || {
        let shown = trio.nodes[0].daemon.admin().json(["volume", "list"]);
        let mut volumes = shown.as_array().expect("a list").iter();
        let found = volumes.find(|volume| volume["id"] == made.id.as_str());
        let found = found.ok_or_else(|| shown.to_string())?;
        assert_eq!(found["min_in_sync"], 1, "{shown}");
        Ok::<(), String>(())
    });
    controller.delete(&made.id).expect("deleted");
    let readers = mounted("ext4", Mode::MultiNodeReaderOnly);
    let refused = with_copies(controller, "readers", &readers).err();
    assert_eq!(refused.expect("refused").0, Code::InvalidArgument);
    // And it left nothing that would be taken for the same.
    let single = mounted("ext4", Mode::SingleNodeWriter);
    let made = with_copies(controller, "readers", &single).expect("created");
    controller.delete(&made.id).expect("deleted");

    claim.publish_context = claim.publish_to(controller, NAMES[0]).expect("published");
    claim.bring_up(&plugins[0]);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    claim.unpublish(&plugins[0]).expect("unpublished");
    claim.unstage(&plugins[0]).expect("unstaged");
    trio.open_at(1, &claim.id);
    // A daemon that the volume is not published beside does not get it by a plugin's asking.
    let stranger = claim.on(&plugins[1]);
    let refused = stranger
        .stage(&plugins[1])
        .expect_err("not published there");
    assert_eq!(refused.0, Code::FailedPrecondition, "{refused:?}");
    assert_eq!(trio.volume(1, &claim.id).not_served_reason, "");
    claim.bring_up(&plugins[0]);
    assert_eq!(trio.volume(0, &claim.id).not_served_reason, "");
    assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");

    // What the controller's daemon is told holds where the volume is served.
    let modified = controller.modify(&claim.id, &[("iops", &LIMIT_IOPS.to_string())]);
    modified.expect("modified");
    let answered = || {
        let labels = [("id", claim.id.as_str())];
        let metrics = trio.nodes[0].daemon.metrics();
        let answered = metrics.sum("ashlar_volume_operations_total", &labels);
        answered.expect("it is served there")
    };
    let (before, begun) = (answered(), Instant::now());
    let mut come = 0.0;
    while come < LIMITED_REQUESTS {
        let file = File::create(claim.target.join("slow")).expect("made");
        file.sync_all().expect("durable");
        come = answered() - before;
    }
    let rate = come / begun.elapsed().as_secs_f64();
    println!("{rate:.1} requests a second of {LIMIT_IOPS}");
    // Above it come what was let through at once and what was under way; below it a busy machine.
    assert!(
        (LIMIT_IOPS / 3.0..LIMIT_IOPS * 1.3).contains(&rate),
        "{rate} requests a second where {LIMIT_IOPS} are allowed"
    );
    controller
        .modify(&claim.id, &[("iops", "0")])
        .expect("modified");
    controller.expand(&claim.id, 2 * SMALL).expect("expanded");
    claim.unpublish(&plugins[0]).expect("unpublished");
    claim.unstage(&plugins[0]).expect("unstaged");
    claim.bring_up(&plugins[0]);
    let blocks = rustix::fs::statvfs(&claim.target).expect("statvfs");
    assert!(blocks.f_blocks * blocks.f_frsize > SMALL as u64 * 3 / 2);
    assert_eq!(
        controller.health(&claim.id).expect("health"),
        Vec::<String>::new()
    );
    claim.unpublish(&plugins[0]).expect("unpublished");
    claim.unstage(&plugins[0]).expect("unstaged");
    let taken = controller.controller_unpublish(&claim.id, NAMES[0]);
    taken.expect("taken");
    // The daemon that serves it deletes it, wherever it is; and where that one is gone, the controller's.
    let asked = with_copies(controller, "asked", &capability).expect("created");
    for id in [&claim.id, &asked.id] {
        trio.open_at(0, id);
    }
    controller.delete(&asked.id).expect("deleted");
    trio.nodes[0].daemon.kill();
    controller.delete(&claim.id).expect("deleted");
    nothing_is_left(&plugins);
}

#[test]
fn a_single_daemon_refuses_copies_with_the_reason() {
    let driver = Driver::start("csi-no-copies", Setup::default());
    let capability = mounted("ext4", Mode::SingleNodeWriter);
    let made = Claim::of_class(
        &driver,
        "many",
        SMALL,
        capability.clone(),
        &[("replicas", "3")],
    );
    let (code, why) = made.err().expect("refused");
    assert_eq!(code, Code::InvalidArgument, "{why}");
    assert!(why.contains("cluster init"), "{why}");
    let confined = [("zones", "a")];
    let made = Claim::of_class(&driver, "far", SMALL, capability.clone(), &confined);
    let (code, why) = made.err().expect("refused");
    assert_eq!(code, Code::InvalidArgument, "{why}");
    assert!(
        why.starts_with("zones: ") && why.contains("cluster init"),
        "{why}"
    );
    let told = driver.space(&confined);
    assert_eq!(told.expect_err("refused").0, Code::InvalidArgument);
    let one = Claim::of_class(&driver, "one", SMALL, capability, &[("replicas", "1")]);
    driver.delete(&one.expect("one copy").id).expect("deleted");
}

/// What three empty nodes have together for volumes of one copy, and what the largest has.
fn rooms(trio: &Trio, controller: &Plugin) -> (u64, u64) {
    // The room of daemons that have just joined is not told at once.
    wait::until(LONG, "the room of three nodes", || {
        let listed = trio.nodes[0].daemon.admin().json(["node", "list"]);
        let nodes = listed["nodes"].as_array().expect("nodes").clone();
        let rooms: Vec<u64> = nodes
            .iter()
            .filter_map(|node| node["capacity_bytes"].as_u64())
            .filter(|room| *room > 0)
            .collect();
        let all = controller.space(&[("replicas", "1")]).expect("told") as u64;
        let sum: u64 = rooms.iter().sum();
        // Empty stores have used next to nothing.
        if rooms.len() == 3 && all > sum / 10 * 9 {
            Ok((all, *rooms.iter().max().expect("three")))
        } else {
            Err(format!("{rooms:?}, {all} can be provisioned"))
        }
    })
}

#[test]
fn a_cluster_takes_volumes_beyond_the_size_of_one_node() {
    let trio = Trio::with("csi-capacity", || Setup::default().store_size("1GiB"));
    let plugins = plugins(&trio);
    let controller = &plugins[0];
    let one_copy = [("replicas", "1")];
    let three_copies = [("replicas", "3")];
    let (all, each) = rooms(&trio, controller);
    let with_three = controller.space(&three_copies).expect("told") as u64;
    assert!(
        (each / 10 * 9..=each).contains(&with_three),
        "{with_three} of {each} for three copies"
    );
    let size = (all / 10 * 3) as i64;
    let capability = mounted("ext4", Mode::SingleNodeWriter);
    let make = |name: &str| {
        Claim::of_class(controller, name, size, capability.clone(), &one_copy).map(|claim| claim.id)
    };
    let made: Vec<String> = ["a", "b", "c"]
        .into_iter()
        .map(|name| make(name).expect("there is room"))
        .collect();
    assert_eq!(
        make("d").expect_err("all is promised").0,
        Code::ResourceExhausted
    );
    // Of what is left each byte of a volume with three copies takes three.
    let left = all - 3 * size as u64;
    let with_three = controller.space(&three_copies).expect("told") as u64;
    assert!(with_three <= left / 3, "{with_three} of {left}");
    for id in &made {
        controller.delete(id).expect("deleted");
    }
    nothing_is_left(&plugins);
}

#[test]
fn a_class_confines_its_volumes_to_zones_and_their_room() {
    let trio = Trio::with("csi-zones", || Setup::default().store_size("1GiB"));
    let plugins = plugins(&trio);
    let controller = &plugins[0];
    let (_, each) = rooms(&trio, controller);
    let ids: Vec<String> = trio.nodes.iter().map(|node| node.id()).collect();
    let admin = trio.nodes[0].daemon.admin();
    for (id, zone) in ids.iter().zip(["zone=a", "zone=a", "zone=b"]) {
        admin.run(["node", "label", id, zone]);
    }
    let space = |zones: &str, replicas: &str| {
        let class = [("zones", zones), ("replicas", replicas)];
        controller.space(&class).expect("told") as u64
    };
    let about = |told: u64, wanted: u64| (wanted / 10 * 9..=wanted).contains(&told);
    assert!(about(space("a", "1"), 2 * each) && about(space("a", "2"), each));
    assert!(about(space("b", "1"), each) && about(space("a, b", "3"), each));
    assert_eq!(
        [space("b", "2"), space("c", "1"), space("a", "3")],
        [0, 0, 0]
    );

    let capability = mounted("ext4", Mode::SingleNodeWriter);
    let make = |name: &str, class: &[(&str, &str)]| {
        Claim::of_class(controller, name, SMALL, capability.clone(), class)
    };
    let two_in_a = [("zones", "a"), ("replicas", "2")];
    let (left_a, left_b) = (space("a", "2"), space("b", "1"));
    let made = make("near", &two_in_a).expect("there is room");
    let volume = trio.volume(0, &made.id);
    assert_eq!(volume.zones, ["a"]);
    let copies = volume.replica_sets.iter().flat_map(|set| &set.replicas);
    assert!(copies.clone().count() > 0);
    assert!(
        copies.clone().all(|copy| copy.node_id != ids[2]),
        "{volume:?}"
    );
    // It takes its size of the room of its zone, and nothing of the other's.
    assert!(space("a", "2") <= left_a - SMALL as u64);
    assert_eq!(space("b", "1"), left_b);
    // By default as many copies as the zone has nodes.
    let far = make("far", &[("zones", "b")]).expect("there is room");
    let volume = trio.volume(0, &far.id);
    assert_eq!((volume.replicas, volume.zones), (1, vec!["b".to_owned()]));
    let too_many = [("zones", "a"), ("replicas", "3")];
    let (code, why) = make("more", &too_many).err().expect("refused");
    assert_eq!(code, Code::ResourceExhausted);
    assert!(why.contains("zone a"), "{why}");
    let (code, why) = make("odd", &[("zones", "Eu West")]).err().expect("refused");
    assert_eq!(code, Code::InvalidArgument);
    assert!(why.contains("Eu West"), "{why}");
    // Asked again it is the same one; of another zone it is not.
    assert_eq!(make("near", &two_in_a).expect("found").id, made.id);
    let (code, _) = make("near", &[("zones", "b"), ("replicas", "2")])
        .err()
        .expect("refused");
    assert_eq!(code, Code::AlreadyExists);
    for id in [&made.id, &far.id] {
        controller.delete(id).expect("deleted");
    }
}
