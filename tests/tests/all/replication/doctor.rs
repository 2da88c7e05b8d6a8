//! `ashlar doctor`: what it finds and mends when a node's disk went back in time or a record is gone, and that it finds
//! nothing while clients write.

use std::time::Duration;

use ashlar_core::records::{Transaction, keys};
use ashlar_core::units::VolumeId;
use ashlar_server::meta::{EtcdConfig, EtcdStore, EtcdTls, MetadataStore};
use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::wait;
use serde_json::Value;

use super::{LONG, store_file, verifying, wait_written};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 512;

/// What the doctor says, with its exit code.
fn doctor(trio: &Trio, at: usize, arguments: &[&str]) -> (Value, Option<i32>) {
    let line = [&["doctor"], arguments, &["-o", "json"]].concat();
    let finished = trio.nodes[at].daemon.admin().try_run(line);
    let said = serde_json::from_str(&finished.stdout);
    let said = said.unwrap_or_else(|error| panic!("{error}: {finished}"));
    (said, finished.status.code())
}

fn codes(said: &Value) -> Vec<String> {
    let ailments = said["ailments"].as_array().expect("ailments");
    let code = |one: &Value| one["code"].as_str().expect("a code").to_owned();
    ailments.iter().map(code).collect()
}

fn write_all(trio: &Trio, byte: u8) {
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    for first in (0..BLOCKS).step_by(64) {
        let data = vec![byte; 64 * BLOCK as usize];
        client.write(first * BLOCK, &data).expect("written");
    }
    client.flush().expect("flushed");
}

#[test]
fn a_disk_that_went_back_in_time_is_found_and_mended() {
    let mut trio = Trio::start("doctor-old");
    trio.expect_losses();
    let said = "a copy that differs from the others was put out of sync";
    trio.nodes[0].daemon.log.expect(said);
    trio.create("disk", &(BLOCKS * BLOCK).to_string());
    let third = trio.nodes[2].id();
    write_all(&trio, 0x11);
    trio.wait_in_sync(0, "disk", 3);
    trio.nodes[2].daemon.stop();
    let file = store_file(&trio.nodes[2].daemon);
    let old = trio.nodes[2].daemon.scratch.join("old-store");
    std::fs::copy(&file, &old).expect("copied");
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);
    write_all(&trio, 0x22);
    let (said, code) = doctor(&trio, 1, &["disk"]);
    assert_eq!((codes(&said), code), (vec![], Some(0)), "{said}");
    assert_eq!(said["compared"][0]["volume_name"], "disk", "{said}");

    // What the node has answered is not on its disk any more, and nothing tells it so.
    trio.nodes[2].daemon.stop();
    std::fs::copy(&old, &file).expect("copied back");
    trio.nodes[2].daemon.start();
    trio.wait_in_sync(0, "disk", 3);
    let (said, code) = doctor(&trio, 1, &["disk"]);
    assert_eq!(
        (codes(&said), code),
        (vec!["differs".to_owned()], Some(7)),
        "{said}"
    );
    let text = said["ailments"][0]["text"].as_str().expect("text");
    assert!(
        text.contains("512 block(s)") && text.contains(&third),
        "{text}"
    );
    let remedy = said["ailments"][0]["remedy"].as_str().expect("text");
    assert!(remedy.contains("--repair differing"), "{remedy}");
    // Looking changed nothing.
    trio.wait_in_sync(0, "disk", 3);
    assert_eq!(codes(&doctor(&trio, 0, &["disk"]).0), ["differs"]);

    let told = trio.nodes[0].copied_bytes().len();
    let (said, _) = doctor(&trio, 1, &["disk", "--repair", "differing"]);
    let repair = said["repairs"][0].as_str().expect("a repair");
    assert!(
        repair.starts_with("put the copy of disk") && repair.contains(&third),
        "{repair}"
    );
    let copied = wait::until(LONG, "the copy was filled", || {
        let copied = trio.nodes[0].copied_bytes();
        copied.get(told).copied().ok_or_else(String::new)
    });
    assert_eq!(copied, BLOCKS * BLOCK);
    trio.wait_in_sync(0, "disk", 3);
    let (said, code) = doctor(&trio, 0, &["disk"]);
    assert_eq!((codes(&said), code), (vec![], Some(0)), "{said}");
    trio.open_at(2, "disk");
    let mut client = trio.nodes[2].daemon.open("disk", Wishes::SIMPLE);
    let data = client.read(0, BLOCKS * BLOCK).expect("read");
    assert!(data.iter().all(|byte| *byte == 0x22), "an old block");
}

#[test]
fn layers_that_no_record_names_are_found_and_dropped_when_asked() {
    let mut trio = Trio::start("doctor-orphan");
    trio.expect_losses();
    for node in &mut trio.nodes {
        node.daemon
            .log
            .expect("a layer that no record names was dropped");
    }
    trio.create("disk", &(BLOCKS * BLOCK).to_string());
    trio.create("kept", &(BLOCKS * BLOCK).to_string());
    write_all(&trio, 0x11);
    let mut client = trio.nodes[0].daemon.open("kept", Wishes::SIMPLE);
    client.write(0, &[7; 4096]).expect("written");
    let id = trio.volume(0, "disk").id;
    let id = VolumeId(uuid::Uuid::parse_str(&id).expect("an id"));
    let (said, code) = doctor(&trio, 0, &[]);
    assert_eq!((codes(&said), code), (vec![], Some(0)), "{said}");

    // Somebody restored an etcd in which the volume never was.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let store = EtcdStore::new(EtcdConfig {
            endpoints: vec![trio.etcd.endpoint()],
            prefix: "/ashlar/".to_owned(),
            request_timeout: Duration::from_secs(30),
            tls: EtcdTls::default(),
        });
        let store = store.expect("a store");
        let gone = Transaction::new()
            .delete(keys::volume(id))
            .delete(format!("{}disk", keys::NAMES));
        store.commit(gone).await.expect("deleted");
    });
    let (said, code) = doctor(&trio, 1, &[]);
    assert_eq!(
        (codes(&said), code),
        (vec!["orphan".to_owned(); 3], Some(0)),
        "{said}"
    );
    let untidy = said["ailments"].as_array().expect("ailments");
    assert!(untidy.iter().all(|one| one["weight"] == "untidy"), "{said}");
    // It is not dropped unasked, and not when something else is asked for.
    let (said, _) = doctor(&trio, 1, &["--repair", "differing"]);
    assert_eq!(codes(&said).len(), 3, "{said}");
    let (said, _) = doctor(&trio, 1, &["--repair", "orphans", "--records-only"]);
    let repairs = said["repairs"].as_array().expect("repairs");
    assert!(
        repairs.len() == 3
            && repairs
                .iter()
                .all(|one| one.as_str().expect("text").starts_with("dropped layer")),
        "{said}"
    );
    let (said, code) = doctor(&trio, 0, &[]);
    assert_eq!((codes(&said), code), (vec![], Some(0)), "{said}");
    assert_eq!(client.read(0, 4096).expect("read"), [7; 4096]);
    let events = trio.nodes[1].daemon.admin().run(["events"]);
    assert!(events.contains("repaired on request: layer"), "{events}");
}

#[test]
fn a_busy_volume_is_compared_and_nothing_false_is_said() {
    let trio = Trio::start("doctor-busy");
    trio.create("disk", "64MiB");
    let fio = verifying(&trio, 0, "disk", 45, "8M");
    wait::until(LONG, "fio is at work", || {
        let runtime = trio.volume(0, "disk").runtime;
        if runtime.is_some_and(|runtime| runtime.connections > 0) {
            Ok(())
        } else {
            Err(String::new())
        }
    });
    wait_written(&trio, 8e6);
    let (said, code) = doctor(&trio, 1, &["disk"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said["compared"][0]["compared_bytes"].as_u64() > Some(0),
        "{said}"
    );
    let codes = codes(&said);
    assert!(codes.iter().all(|code| code == "partly-compared"), "{said}");
    println!("under load: {said}");
    fio.finish().success();
    let (said, code) = doctor(&trio, 0, &["disk"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said["ailments"].as_array().expect("ailments").is_empty(),
        "{said}"
    );
}

#[test]
fn what_cannot_be_compared_is_said() {
    let mut trio = Trio::start("doctor-away");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    write_one(&trio);
    trio.nodes[2].daemon.kill();
    trio.wait_in_sync(0, "disk", 2);
    let (said, code) = doctor(&trio, 0, &["disk"]);
    // The two that are in sync are compared; the third is not there to be asked.
    assert_eq!(
        (codes(&said), code),
        (vec!["node-silent".to_owned()], Some(0)),
        "{said}"
    );
    trio.nodes[0].daemon.kill();
    let (said, code) = doctor(&trio, 1, &["disk"]);
    assert_eq!(code, Some(0), "{said}");
    let codes = codes(&said);
    assert!(codes.contains(&"not-compared".to_owned()), "{said}");
    let refused = trio.nodes[1].daemon.admin().try_run(["doctor", "nothing"]);
    assert_eq!(refused.status.code(), Some(3), "{refused}");
}

fn write_one(trio: &Trio) {
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[7; 4096]).expect("written");
    client.flush().expect("flushed");
}
