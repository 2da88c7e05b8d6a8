//! What a person is told of a volume with copies: where they are, which count, which node serves it, what to do.

use std::time::Duration;

use ashlar_tests::cluster::Node;
use ashlar_tests::daemon::Setup;
use ashlar_tests::etcd::Etcd;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::scratch::Scratch;
use ashlar_tests::wait;
use serde_json::Value;

/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(120);

fn replicas(node: &Node) -> Vec<Value> {
    let shown = node.daemon.admin().json(["volume", "show", "disk"]);
    let sets = shown["replica_sets"].as_array().expect("sets").clone();
    let of_set = |set: &Value| set["replicas"].as_array().expect("replicas").clone();
    sets.iter().flat_map(of_set).collect()
}

fn all(node: &Node, what: &str, is_so: impl Fn(&Value) -> bool) {
    wait::until(LONG, what, || {
        let replicas = replicas(node);
        if replicas.iter().all(&is_so) {
            Ok(())
        } else {
            Err(format!("{replicas:?}"))
        }
    });
}

fn warnings(node: &Node) -> String {
    node.daemon.admin().json(["status"])["warnings"].to_string()
}

fn no_warnings(node: &Node) {
    wait::until(LONG, "no warnings", || match warnings(node) {
        text if text == "[]" => Ok(()),
        text => Err(text),
    });
}

#[test]
fn a_copy_that_is_away_is_told_with_what_to_do_and_comes_back() {
    let scratch = Scratch::new("copies");
    let etcd = Etcd::start(&scratch);
    let one = Node::first("copies-1", &etcd, Setup::default());
    let two = one.joined("copies-2", &etcd, Setup::default());
    let mut three = one.joined("copies-3", &etcd, Setup::default());
    for part in [
        "a replica does not answer",
        "a replica is out of sync",
        "a volume is no longer served here",
    ] {
        one.daemon.log.expect(part);
    }
    let (one_id, three_id) = (one.id(), three.id());
    let create = [
        "volume",
        "create",
        "disk",
        "--size",
        "64MiB",
        "--replicas",
        "3",
    ];
    wait::until(LONG, "room on three nodes", || {
        let created = one.daemon.admin().try_run(create);
        if created.status.success() {
            Ok(())
        } else {
            Err(created.stderr)
        }
    });
    all(&one, "links to every copy", |replica| {
        replica["state"] == "in-sync" && replica["linked"] == true
    });
    let text = one.daemon.admin().run(["volume", "show", "disk"]);
    assert!(text.contains("3 of 3"), "{text}");
    assert!(text.contains("3 now, never fewer than 2"), "{text}");
    let shown = one.daemon.admin().json(["volume", "show", "disk"]);
    assert_eq!(shown["head_node_id"], one_id.as_str());
    assert_eq!(shown["min_in_sync"], 2);
    assert!(shown["attach"]["nbd_client"].is_string(), "{shown}");
    // Where the volume is not served there is nothing to attach to, but somebody to ask.
    let text = two.daemon.admin().run(["volume", "show", "disk"]);
    for part in [
        format!("ask node {one_id}"),
        format!("Attach it at node {one_id}, or serve it here: ashlar volume open disk"),
    ] {
        assert!(text.contains(&part), "{part} in\n{text}");
    }
    assert!(!text.contains("nbd-client"), "{text}");
    let shown = two.daemon.admin().json(["volume", "show", "disk"]);
    assert_eq!(shown.get("attach"), None, "{shown}");
    assert_eq!(shown["served_elsewhere"], true);
    let text = two.daemon.admin().run(["volume", "list"]);
    assert!(
        text.contains("SERVED BY") && text.contains(&one_id),
        "{text}"
    );
    let text = one.daemon.admin().run(["volume", "list"]);
    assert!(text.contains("this node"), "{text}");
    // A node that has a copy and does not serve the volume has nothing to complain of.
    no_warnings(&two);

    let mut client = one.daemon.open("disk", Wishes::SIMPLE);
    three.daemon.kill();
    client.write(4096, b"while away").expect("write");
    all(&one, "a copy out of sync", |replica| {
        let is_away = replica["node_id"] == three_id.as_str();
        (replica["state"] == "out") == is_away
    });
    for node in [&one, &two] {
        wait::until(LONG, "a warning", || {
            let text = warnings(node);
            if text.contains("2 of 3 copies in sync") && text.contains(&three_id) {
                Ok(())
            } else {
                Err(text)
            }
        });
    }

    three.daemon.start();
    all(&one, "the copy in sync again", |replica| {
        replica["state"] == "in-sync" && replica["linked"] == true
    });
    // Who was away is looked for again every few seconds.
    no_warnings(&one);
    three.daemon.admin().run(["volume", "open", "disk"]);
    let mut elsewhere = three.daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(elsewhere.read(4096, 10).expect("read"), b"while away");
    let shown = three.daemon.admin().json(["volume", "show", "disk"]);
    assert_eq!(shown["head_node_id"], three_id.as_str());
}
