//! What an administrator is told while nodes come and go: `ashlar explain` and `ashlar events`.

use std::time::{Duration, Instant};

use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::wait;
use rustix::process::Signal;
use serde_json::Value;

use super::LEASE;

/// An explanation waits for a silent node or metadata store, and then is there.
const EXPLAINED_LIMIT: Duration = Duration::from_secs(12);

fn explain(trio: &Trio, at: usize) -> Value {
    let start = Instant::now();
    let said = trio.nodes[at].daemon.admin().json(["explain", "disk"]);
    assert!(start.elapsed() < EXPLAINED_LIMIT, "{said}");
    said
}

fn has(said: &Value, code: &str) -> bool {
    let causes = said["causes"].as_array().expect("causes");
    causes.iter().any(|cause| cause["code"] == code)
}

/// Waits until node `at` explains the volume so, with this cause.
fn wait_explained(trio: &Trio, at: usize, condition: &str, code: &str) -> Value {
    wait::until(LEASE * 5, &format!("{condition}: {code}"), || {
        let said = explain(trio, at);
        if said["condition"] == condition && (code.is_empty() || has(&said, code)) {
            Ok(said)
        } else {
            Err(said.to_string())
        }
    })
}

/// The cause with this code, as text with its remedies.
fn told(said: &Value, code: &str) -> String {
    let causes = said["causes"].as_array().expect("causes");
    let cause = causes.iter().find(|cause| cause["code"] == code);
    cause
        .unwrap_or_else(|| panic!("no {code}: {said}"))
        .to_string()
}

#[test]
fn a_volume_says_why_it_is_as_it_is() {
    let mut trio = Trio::start("explained");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let ids: Vec<String> = trio.nodes.iter().map(|node| node.id()).collect();
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[7; 4096]).expect("written");
    // Whoever is asked, the head answers for itself.
    for at in 0..3 {
        let said = wait_explained(&trio, at, "healthy", "");
        assert!(
            said["summary"].as_str().expect("text").contains("3 of 3"),
            "{said}"
        );
        assert_eq!(said["head_node_id"], ids[0].as_str(), "{said}");
    }

    trio.nodes[2].daemon.kill();
    trio.wait_in_sync(0, "disk", 2);
    let said = wait_explained(&trio, 0, "degraded", "copy-out");
    let text = told(&said, "copy-out");
    assert!(
        text.contains(&ids[2]) && text.contains("start ashlard"),
        "{text}"
    );
    assert!(text.contains("since"), "{text}");
    let table = trio.nodes[0].daemon.admin().run(["explain", "disk"]);
    assert!(
        table.starts_with("disk is degraded: ") && table.contains("  -> start ashlard on node"),
        "{table}"
    );
    // The same from a node that neither serves it nor is away.
    wait_explained(&trio, 1, "degraded", "copy-out");

    trio.nodes[1].daemon.kill();
    // A copy is out a moment before its node is known to be away.
    wait::until(LEASE * 5, "both copies would do", || {
        let said = wait_explained(&trio, 0, "stuck", "writes-wait");
        let text = told(&said, "writes-wait");
        assert!(
            text.contains("1 of 3") && text.contains("min_in_sync is 2"),
            "{text}"
        );
        if text.contains(&ids[1]) && text.contains(&ids[2]) {
            Ok(())
        } else {
            Err(text)
        }
    });

    // Fewer may be made enough, and what waited goes on.
    let waiting = std::thread::spawn(move || {
        client.write(4096, &[8; 4096]).expect("written");
        client
    });
    let least = |n: &str| {
        let admin = trio.nodes[0].daemon.admin();
        admin.try_run(["volume", "set", "disk", "--min-in-sync", n])
    };
    let refused = least("4").to_string();
    assert!(
        refused.contains("of 3 copies 4 cannot be in sync"),
        "{refused}"
    );
    assert!(least("1").status.success());
    let client = waiting.join().expect("answered");
    wait_explained(&trio, 0, "degraded", "copy-out");
    assert!(least("2").status.success());
    wait_explained(&trio, 0, "stuck", "writes-wait");

    trio.nodes[1].daemon.start();
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);
    wait_explained(&trio, 0, "healthy", "");

    // A node that stands still has open sockets and answers nothing.
    trio.nodes[2].daemon.process().signal(Signal::STOP);
    trio.wait_in_sync(0, "disk", 2);
    let said = wait_explained(&trio, 0, "degraded", "copy-out");
    assert_eq!(said["silent_node_ids"][0], ids[2].as_str(), "{said}");
    trio.nodes[2].daemon.process().signal(Signal::CONT);
    trio.wait_in_sync(0, "disk", 3);

    drop(client);
    trio.nodes[0].daemon.kill();
    let said = wait_explained(&trio, 1, "unserved", "serving-node-away");
    let text = told(&said, "serving-node-away");
    assert!(
        text.contains(&ids[0]) && text.contains("ashlar volume open disk"),
        "{text}"
    );
    trio.nodes[0].daemon.start();
    trio.wait_served(0, "disk");
    trio.wait_in_sync(0, "disk", 3);

    trio.etcd.kill();
    let said = explain(&trio, 0);
    assert!(has(&said, "metadata-away"), "{said}");
    trio.etcd.run();
}

#[test]
fn a_volume_whose_last_copies_are_away_names_them() {
    let mut trio = Trio::start("explained-last");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let first = trio.nodes[0].id();
    for at in [1, 2] {
        trio.nodes[at].daemon.kill();
    }
    trio.wait_in_sync(0, "disk", 1);
    trio.nodes[0].daemon.kill();
    for at in [1, 2] {
        trio.nodes[at].daemon.start();
    }
    let refused = trio.nodes[1]
        .daemon
        .admin()
        .try_run(["volume", "open", "disk"]);
    assert!(!refused.status.success(), "{refused}");
    let said = wait_explained(&trio, 1, "unserved", "last-copies-away");
    let text = told(&said, "last-copies-away");
    assert!(
        text.contains(&first) && text.contains("start ashlard"),
        "{text}"
    );
    trio.nodes[0].daemon.start();
    wait_explained(&trio, 1, "healthy", "");
}

#[test]
fn what_happened_is_told_and_followed() {
    let mut trio = Trio::start("events");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    trio.create("other", "64MiB");
    let second = trio.nodes[2].id();
    let admin = trio.nodes[0].daemon.admin();
    let following = admin.tool(["events", "--follow", "disk"]).start();
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[7; 4096]).expect("written");
    trio.nodes[2].daemon.stop();
    trio.wait_in_sync(0, "disk", 2);
    client.write(0, &[8; 4096]).expect("written");
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);

    let codes = |arguments: &[&str]| {
        let events = admin.json(arguments);
        let events = events.as_array().expect("events").clone();
        let code = |event: &Value| event["code"].as_str().expect("a code").to_owned();
        (events.iter().map(code).collect::<Vec<_>>(), events)
    };
    let (of_disk, events) = wait::until(LEASE, "the copy is told to be in sync", || {
        let (codes, events) = codes(&["events", "disk"]);
        if codes.iter().any(|code| code == "copy-in-sync") {
            Ok((codes, events))
        } else {
            Err(format!("{codes:?}"))
        }
    });
    let expected = [
        "volume-created",
        "volume-claimed",
        "volume-served",
        "copy-dropped",
        "copy-filling",
        "copy-in-sync",
    ];
    let mut rest = of_disk.iter();
    for code in expected {
        assert!(rest.any(|found| found == code), "{code}: {of_disk:?}");
    }
    let dropped = events.iter().find(|event| event["code"] == "copy-dropped");
    let dropped = dropped.expect("told");
    assert_eq!(dropped["severity"], "warning");
    assert_eq!(dropped["node_id"], second.as_str());
    assert_eq!(dropped["volume_name"], "disk");
    let copied = events.iter().find(|event| event["code"] == "copy-in-sync");
    let text = copied.expect("told")["text"]
        .as_str()
        .expect("text")
        .to_owned();
    assert!(text.contains("4096 bytes copied"), "{text}");

    let (all, _) = codes(&["events"]);
    for code in ["daemon-ready", "node-joined", "volume-created"] {
        assert!(all.iter().any(|found| found == code), "{code}: {all:?}");
    }
    assert!(all.len() > of_disk.len(), "{all:?}");
    let table = admin.run(["events", "disk"]);
    assert!(
        table.contains("SEVERITY") && table.contains("volume disk"),
        "{table}"
    );

    // Following ends with the daemon, and says so.
    drop(client);
    trio.nodes[0].daemon.stop();
    let followed = following.finish();
    assert_eq!(followed.status.code(), Some(5), "{followed}");
    for text in ["is out of sync", "4096 bytes copied"] {
        assert!(followed.stdout.contains(text), "{text}: {followed}");
    }
    assert!(!followed.stdout.contains("other"), "{followed}");
    trio.nodes[0].daemon.start();
    let (again, _) = codes(&["events", "disk"]);
    assert!(
        !again.iter().any(|code| code == "volume-created"),
        "{again:?}"
    );
}
