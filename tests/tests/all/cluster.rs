//! Becoming a cluster: the first node and its volumes, nodes that join and are removed, certificates of every wrong kind.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use ashlar_tests::admin::offline;
use ashlar_tests::certificate::Authority;
use ashlar_tests::cluster::{Node, found};
use ashlar_tests::daemon::Setup;
use ashlar_tests::etcd::Etcd;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::scratch::{Scratch, free_port};
use ashlar_tests::wait;

/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(120);

#[test]
fn a_single_node_becomes_the_first_of_a_cluster_and_keeps_its_volumes() {
    let scratch = Scratch::new("cluster-first");
    let etcd = Etcd::start(&scratch);
    let mut alone = Setup::default().start("cluster-first-d");
    alone.create("disk", "64MiB");
    alone
        .open("disk", Wishes::SIMPLE)
        .write(4096, b"kept")
        .expect("write");
    let data = alone.data_dir().to_str().expect("UTF-8").to_owned();
    let init = [
        "cluster",
        "init",
        "--data-dir",
        &data,
        "--metadata",
        &etcd.setting(),
    ];
    let refusal = offline(init).failure();
    assert!(refusal.contains("stop ashlard first"), "{refusal}");
    alone.stop();
    // What root makes in the directory of a service the service could not read.
    let own = rustix::process::geteuid().as_raw();
    std::os::unix::fs::chown(alone.data_dir(), Some(65534), None).expect("chown");
    let finished = offline(init);
    assert_eq!(finished.status.code(), Some(4));
    let refusal = finished.failure();
    assert!(refusal.contains("sudo -u nobody "), "{refusal}");
    assert!(!alone.data_dir().join("identity").exists());
    std::os::unix::fs::chown(alone.data_dir(), Some(own), None).expect("chown");
    // An etcd that does not answer refuses nothing.
    let nowhere = format!("etcd:http://127.0.0.1:{}", free_port());
    let mut elsewhere = init;
    elsewhere[5] = &nowhere;
    assert_eq!(offline(elsewhere).status.code(), Some(5));
    let said = found(&alone, &etcd, &["--label", "zone=a"]);
    assert_eq!(said["volumes"], 1);
    assert_eq!(
        found(&alone, &etcd, &[]),
        said,
        "the second time nothing changes"
    );

    let refusal = alone.start_refused();
    assert!(refusal.contains("belongs to cluster"), "{refusal}");
    alone.setup = alone
        .setup
        .clone()
        .args(["--metadata", &etcd.setting()])
        .args(["--listen-link", "127.0.0.1:0"]);
    alone.start();
    let mut client = alone.open_when_served("disk", Wishes::SIMPLE);
    assert_eq!(client.read(4096, 4).expect("read"), b"kept");
    let nodes = alone.admin().json(["node", "list"]);
    assert_eq!(nodes["nodes"][0]["labels"]["zone"], "a");
    assert_eq!(nodes["nodes"][0]["volumes"], 1);

    // Another node cannot found a second cluster there, nor this one be started on another etcd.
    let other = Setup::default().prepare("cluster-first-o");
    let data = other.data_dir().to_str().expect("UTF-8").to_owned();
    let init = [
        "cluster",
        "init",
        "--data-dir",
        &data,
        "--metadata",
        &etcd.setting(),
    ];
    let refusal = offline(init).failure();
    assert!(refusal.contains("holds another cluster"), "{refusal}");
    alone.stop();
    alone.setup = alone.setup.clone().args(["--etcd-prefix", "/elsewhere"]);
    let refusal = alone.start_refused();
    assert!(
        refusal.contains("no cluster under this prefix"),
        "{refusal}"
    );
    for file in ["identity/identity.json", "identity/ca-key.pem"] {
        let path = alone.data_dir().join(file);
        let mode = std::fs::metadata(&path).expect(file).permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[test]
fn a_volume_with_one_copy_is_asked_of_its_node() {
    let scratch = Scratch::new("cluster-one-copy");
    let etcd = Etcd::start(&scratch);
    let mut alone = Setup::default().start("cluster-one-copy-1");
    alone.create("disk", "64MiB");
    alone.stop();
    found(&alone, &etcd, &[]);
    let admin_port = free_port();
    let socket = format!("unix:{}", alone.data_dir().join("admin.sock").display());
    alone.setup = alone
        .setup
        .clone()
        .args(["--metadata", &etcd.setting()])
        .args(["--listen-admin", &format!("tcp:127.0.0.1:{admin_port}")])
        .args(["--listen-admin", &socket]);
    alone.start();
    let one = Node {
        daemon: alone,
        admin_port,
    };
    let two = one.joined("cluster-one-copy-2", &etcd, Setup::default());
    let holder = format!("node {} (127.0.0.1:{admin_port})", one.id());
    let id = one.daemon.admin().json(["volume", "show", "disk"])["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let asked: [&[&str]; 6] = [
        &["volume", "show", "disk"],
        &["volume", "show", &id],
        &["volume", "open", "disk"],
        &["volume", "set", "disk", "--iops", "100"],
        &["volume", "delete", "disk"],
        &["explain", "disk"],
    ];
    for command in asked {
        let finished = two.daemon.admin().try_run(command);
        assert_eq!(finished.status.code(), Some(4), "{finished:?}");
        let said = &finished.stderr;
        assert!(
            said.contains("has its one copy on") && said.contains(&holder),
            "{command:?}: {said}"
        );
    }
    let unknown = two.daemon.admin().try_run(["volume", "show", "none"]);
    assert_eq!(unknown.status.code(), Some(3), "{unknown:?}");
    one.daemon.admin().run(["volume", "delete", "disk"]);
    let gone = two.daemon.admin().try_run(["volume", "show", "disk"]);
    assert_eq!(gone.status.code(), Some(3), "{gone:?}");
}

#[test]
fn nodes_join_with_a_token_once_and_are_shut_out_when_removed() {
    let scratch = Scratch::new("cluster-join");
    let etcd = Etcd::start(&scratch);
    let one = Node::first("cluster-join-1", &etcd, Setup::default());
    let token = one.token();
    let with = |token: &str| {
        Setup::default()
            .env("ASHLAR_JOIN", token)
            .arg("--label=rack=r7")
    };
    let mut two = Node::prepare("cluster-join-2", &etcd, with(&token));
    two.daemon.start();
    let two_id = two.id();
    let listed = one.daemon.admin().json(["node", "list"]);
    let nodes = listed["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 2);
    let its = nodes
        .iter()
        .find(|node| node["id"] == two_id.as_str())
        .expect("listed");
    assert_eq!(its["labels"]["rack"], "r7");
    assert_eq!(its["address"], format!("127.0.0.1:{}", two.admin_port));

    // A token is for one node, of one cluster, for a time.
    let mut three = Node::prepare("cluster-join-3", &etcd, with(&token));
    let refusal = three.daemon.start_refused();
    assert!(refusal.contains("has been used"), "{refusal}");
    let (secret, rest) = token.split_once('.').expect("two parts");
    let (fingerprint, address) = rest.split_once('@').expect("an address");
    let mirrored: String = fingerprint.chars().rev().collect();
    for (wrong, why) in [
        (
            format!("{}.{rest}", "0".repeat(secret.len())),
            "not known here",
        ),
        (format!("{secret}.{mirrored}@{address}"), "cannot join"),
        ("secret".to_owned(), "is not TOKEN@HOST:PORT"),
    ] {
        three.daemon.setup = three.daemon.setup.clone().env("ASHLAR_JOIN", &wrong);
        let refusal = three.daemon.start_refused();
        assert!(refusal.contains(why), "{refusal}");
    }
    for log in [&one.daemon.log, &two.daemon.log, &three.daemon.log] {
        assert!(!log.text().contains(secret), "a secret in the log");
    }

    // Each node serves the volumes on its own stores, under names of the whole cluster.
    two.daemon.create("theirs", "16MiB");
    two.daemon
        .open_when_served("theirs", Wishes::SIMPLE)
        .write(0, b"x")
        .expect("write");
    let refusal = one
        .daemon
        .admin()
        .refused(["volume", "create", "theirs", "--size", "1MiB"]);
    assert!(refusal.contains("theirs"), "{refusal}");
    for part in ["a replica does not answer", "a replica is out of sync"] {
        two.daemon.log.expect(part);
    }
    two.daemon.kill();
    two.daemon.start();
    assert_eq!(
        two.daemon
            .open_when_served("theirs", Wishes::SIMPLE)
            .read(0, 1)
            .expect("read"),
        b"x"
    );

    // With the certificate of a node one may ask the others, until it is removed.
    let stolen = two.stolen();
    one.admin_over_tcp(Some(&stolen)).run(["node", "list"]);
    let refusal = one.daemon.admin().refused(["node", "remove", &two_id]);
    assert!(refusal.contains("1 volume(s)"), "{refusal}");
    two.daemon
        .admin()
        .run(["volume", "delete", "theirs", "--yes"]);
    let one_id = one.id();
    // Its copies are dropped by each node in its own time, and until then the nodes hold it.
    wait::until(LONG, "the copies to be gone", || {
        let refusal = two.daemon.admin().refused(["node", "remove", &one_id]);
        if refusal.contains("the last one that holds the key") {
            Ok(())
        } else {
            Err(refusal)
        }
    });
    let refusal = two.daemon.admin().refused(["node", "remove", &two_id]);
    assert!(refusal.contains("the one you are asking"), "{refusal}");
    one.daemon
        .admin()
        .run(["node", "label", &two_id[..8], "rack-", "zone=b"]);

    let watching = one
        .admin_over_tcp(Some(&stolen))
        .tool(["top", "-o", "json"])
        .start();
    wait::until(LONG, "the connection is in use", || {
        if watching.printed() > 0 {
            Ok(())
        } else {
            Err("nothing printed".to_owned())
        }
    });
    one.daemon.admin().run(["node", "remove", &two_id[..13]]);
    let cut = watching.finish();
    assert!(
        cut.status.code().is_some_and(|code| code != 0),
        "a connection of a removed node stayed open: {cut:?}"
    );
    let refusal = one.admin_over_tcp(Some(&stolen)).refused(["node", "list"]);
    println!("a removed node is told: {refusal}");
    two.daemon.stop();
    let refusal = two.daemon.start_refused();
    assert!(
        refusal.contains("was removed from the cluster"),
        "{refusal}"
    );
}

#[test]
fn the_admin_port_lets_in_whom_it_should() {
    let scratch = Scratch::new("cluster-admin");
    let etcd = Etcd::start(&scratch);
    let one = Node::first("cluster-admin-1", &etcd, Setup::default());
    let list = ["volume", "list"];
    let admin = one.client("ops", &["--role", "admin"]);
    one.admin_over_tcp(Some(&admin)).run(list);
    // In the clear, with a certificate for something else, of somebody else, of the past.
    let finished = one.admin_over_tcp(None).try_run(list);
    assert_eq!(finished.status.code(), Some(5), "{finished:?}");
    assert!(
        finished.stderr.contains("--certificates DIR"),
        "{finished:?}"
    );
    let user = one.client("db", &[]);
    one.admin_over_tcp(Some(&user)).refused(list);
    let names = ["x.node.y.ashlar.internal"];
    let foreign = Authority::new("somebody else");
    for (name, expired) in [("foreign", false), ("past", true)] {
        let files = foreign.issue(scratch.path(), name, &names, expired);
        let directory = scratch.join(name);
        std::fs::create_dir(&directory).expect("a directory");
        std::fs::copy(admin.join("ca-cert.pem"), directory.join("ca-cert.pem")).expect("copy");
        std::fs::copy(files.certificate, directory.join("client-cert.pem")).expect("copy");
        std::fs::copy(files.key, directory.join("client-key.pem")).expect("copy");
        one.admin_over_tcp(Some(&directory)).refused(list);
    }
    // A server that somebody else vouches for is not believed.
    let fooled = scratch.join("fooled");
    copy_all(&admin, &fooled);
    foreign.write(&fooled.join("ca-cert.pem"));
    let finished = one.admin_over_tcp(Some(&fooled)).try_run(list);
    assert_eq!(finished.status.code(), Some(5), "{finished:?}");
    assert!(finished.stderr.contains("certificates"), "{finished:?}");

    // A second certificate of a name takes the first one's place; a revoked one is worth nothing.
    let old = scratch.join("old");
    copy_all(&admin, &old);
    std::fs::remove_dir_all(&admin).expect("removed");
    let admin = one.client("ops", &["--role", "admin"]);
    one.admin_over_tcp(Some(&admin)).run(list);
    wait::until(LONG, "the earlier certificate is refused", || {
        let finished = one.admin_over_tcp(Some(&old)).try_run(list);
        if finished.status.success() {
            Err(finished.stdout)
        } else {
            Ok(())
        }
    });
    let listed = one.daemon.admin().json(["cluster", "client-certs"]);
    assert_eq!(listed["certificates"].as_array().map(Vec::len), Some(2));
    one.daemon.admin().run(["cluster", "revoke-client", "ops"]);
    wait::until(LONG, "the revoked certificate is refused", || {
        let finished = one.admin_over_tcp(Some(&admin)).try_run(list);
        if finished.status.success() {
            Err(finished.stdout)
        } else {
            Ok(())
        }
    });
    one.daemon
        .admin()
        .refused(["cluster", "revoke-client", "ops"]);
}

fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("listed") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// Of several nodes that sign, one may be gone; the one that is asked is there.
#[test]
fn a_token_names_the_node_that_was_asked_for_it_if_that_one_signs() {
    let scratch = Scratch::new("cluster-signing");
    let etcd = Etcd::start(&scratch);
    let mut one = Node::first("cluster-signing-1", &etcd, Setup::default());
    let mut two = one.joined("cluster-signing-2", &etcd, Setup::default());
    let of = |node: &Node| format!("@127.0.0.1:{}", node.admin_port);
    assert!(two.token().ends_with(&of(&one)), "the only one that signs");
    let key = "identity/ca-key.pem";
    let from = one.daemon.data_dir().join(key);
    std::fs::copy(from, two.daemon.data_dir().join(key)).expect("copied");
    two.daemon.stop();
    two.daemon.start();
    for node in [&one, &two] {
        assert!(node.token().ends_with(&of(node)), "{}", node.token());
    }
    one.daemon.stop();
    two.joined("cluster-signing-3", &etcd, Setup::default());
}

#[test]
fn certificates_of_nodes_renew_themselves() {
    let scratch = Scratch::new("cluster-renew");
    let etcd = Etcd::start(&scratch);
    let short = || Setup::default().arg("--certificate-lifetime=30");
    let one = Node::first("cluster-renew-1", &etcd, short());
    let two = one.joined("cluster-renew-2", &etcd, short());
    let first = std::fs::read(two.stolen().join("client-cert.pem")).expect("a certificate");
    wait::until(LONG, "the certificate is another one", || {
        let now = std::fs::read(two.stolen().join("client-cert.pem")).expect("a certificate");
        if now == first {
            Err("still the first".to_owned())
        } else {
            Ok(())
        }
    });
    one.admin_over_tcp(Some(&two.stolen()))
        .run(["node", "list"]);
}

#[test]
fn a_token_ends_and_a_node_with_volumes_does_not_join() {
    let scratch = Scratch::new("cluster-token");
    let etcd = Etcd::start(&scratch);
    let one = Node::first("cluster-token-1", &etcd, Setup::default());
    let said = one
        .daemon
        .admin()
        .json(["cluster", "token", "--lifetime", "30m"]);
    assert_eq!(
        said["addresses"][0],
        format!("127.0.0.1:{}", one.admin_port)
    );
    let mut full = Setup::default().start("cluster-token-2");
    full.create("own", "1MiB");
    full.stop();
    full.setup = full
        .setup
        .clone()
        .args(["--metadata", &etcd.setting()])
        .env("ASHLAR_JOIN", &one.token());
    let refusal = full.start_refused();
    assert!(refusal.contains("1 volume(s) of its own"), "{refusal}");
}
