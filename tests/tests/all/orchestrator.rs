//! What an orchestrator's driver relies on: publications that fence, formats that destroy nothing, limits, capacity.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ashlar_proto::admin::{self, AccessMode, FilesystemState};
use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::nbd::Wishes;
use ashlar_tests::rpc::{Rpc, refusal};
use tonic::Code;

const MIB: u64 = 1 << 20;

fn rpc(daemon: &Daemon) -> Rpc {
    Rpc::connect(&daemon.data_dir().join("admin.sock"))
}

#[test]
fn a_published_volume_belongs_to_its_node_until_it_is_taken_back() {
    let mut daemon = Setup::default().start("published");
    daemon.create("v", "8MiB");
    let mut driver = rpc(&daemon);
    let writer = AccessMode::SingleNodeWriter;
    assert_eq!(refusal(driver.publish("v", "a", writer)).0, Code::NotFound);
    assert_eq!(
        refusal(driver.publish("none", "a", writer)).0,
        Code::NotFound
    );
    driver.node("a");
    driver.node("b");

    // In use by hand: refused, until whoever it is has gone.
    let mut by_hand = daemon.open("v", Wishes::SIMPLE);
    let (code, text) = refusal(driver.publish("v", "a", writer));
    assert!(
        code == Code::FailedPrecondition && text.contains("in use by 1"),
        "{text}"
    );
    by_hand.write(0, &[1; 4096]).unwrap();
    let close = admin::CloseConnectionsRequest { volume: "v".into() };
    assert_eq!(
        driver.close_connections(close).unwrap().closed_connections,
        1
    );
    assert!(by_hand.read(0, 512).is_err());

    let export = driver.publish("v", "a", writer).unwrap();
    assert_eq!(driver.publish("v", "a", writer).unwrap(), export, "again");
    let other = driver.publish("v", "a", AccessMode::MultiNodeReaderOnly);
    assert_eq!(refusal(other).0, Code::AlreadyExists);
    let (code, text) = refusal(driver.publish("v", "b", writer));
    assert!(
        code == Code::FailedPrecondition && text.contains("node a"),
        "{text}"
    );
    let refused = format!("{:?}", daemon.try_open("v", Wishes::SIMPLE).err());
    assert!(refused.contains("published to node a"), "{refused}");
    let mut a = daemon.open(&export, Wishes::EXTENDED);
    assert_eq!(a.read(0, 4096).unwrap(), [1; 4096]);
    a.write(4096, &[2; 4096]).unwrap();
    let volume = driver.volume("v");
    assert_eq!(
        (
            volume.publications[0].node_id.as_str(),
            volume.publications[0].connections
        ),
        ("a", 1)
    );
    let delete = admin::DeleteVolumeRequest { volume: "v".into() };
    assert_eq!(
        refusal(driver.delete_volume(delete)).0,
        Code::FailedPrecondition
    );

    // The daemon dies; a client that kept its export name goes on.
    daemon.kill();
    daemon.start();
    let mut driver = rpc(&daemon);
    let mut a = daemon.open(&export, Wishes::EXTENDED);
    assert_eq!(a.read(4096, 4096).unwrap(), [2; 4096]);
    assert!(daemon.try_open("v", Wishes::SIMPLE).is_err());

    // Forced away, by a driver that has forgotten the node.
    let before = driver.volume("v").epoch;
    let request = admin::UnregisterNodeRequest {
        node_id: "a".into(),
    };
    assert_eq!(driver.unregister_node(request).unwrap().volume_ids.len(), 1);
    let ended = driver.unpublish("v", "a");
    assert_eq!(
        (ended.node_ids, ended.closed_connections),
        (vec!["a".to_owned()], 1)
    );
    assert!(ended.epoch > before);
    assert!(a.write(0, &[9; 4096]).is_err(), "a fenced node wrote");
    assert!(
        daemon.try_open(&export, Wishes::SIMPLE).is_err(),
        "an old name works"
    );
    assert!(driver.unpublish("v", "").node_ids.is_empty());
    let second = driver.publish("v", "b", writer).unwrap();
    assert_ne!(second, export);
    let mut b = daemon.open(&second, Wishes::SIMPLE);
    assert_eq!(b.read(0, 8192).unwrap(), [[1; 4096], [2; 4096]].concat());
    assert!(daemon.try_open(&export, Wishes::SIMPLE).is_err());

    let shown = daemon.admin().run(["volume", "show", "v"]);
    assert!(
        shown.contains("Published to:") && shown.contains("b, single-node-writer"),
        "{shown}"
    );
    daemon
        .admin()
        .run(["volume", "unpublish", "v", "--node", "b"]);
    assert!(daemon.open("v", Wishes::SIMPLE).read(0, 512).is_ok());
    let log = daemon.log.text();
    for name in [&export, &second] {
        let secret = name.split_once('@').unwrap().1;
        assert!(!log.contains(secret), "a secret is in the log");
    }
    daemon.stop();
}

#[test]
fn readers_on_several_nodes_read_and_nothing_else() {
    let mut daemon = Setup::default().start("readers");
    daemon.create("v", "8MiB");
    daemon
        .open("v", Wishes::SIMPLE)
        .write(0, &[7; 4096])
        .unwrap();
    let mut driver = rpc(&daemon);
    let mut exports = Vec::new();
    for node in ["a", "b", "c"] {
        driver.node(node);
        let deadline = Instant::now() + Duration::from_secs(60);
        // The writer above has hung up, which the daemon learns in its own time.
        exports.push(loop {
            match driver.publish("v", node, AccessMode::MultiNodeReaderOnly) {
                Ok(export) => break export,
                Err(status) => assert!(Instant::now() < deadline, "{status}"),
            }
        });
    }
    let mut clients: Vec<_> = exports
        .iter()
        .map(|e| daemon.open(e, Wishes::STRUCTURED))
        .collect();
    for client in &mut clients {
        assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
        assert!(client.write(0, &[8; 4096]).is_err());
    }
    driver.unpublish("v", "b");
    assert!(clients[1].read(0, 512).is_err());
    for index in [0, 2] {
        assert_eq!(clients[index].read(0, 4096).unwrap(), [7; 4096]);
        daemon.open(&exports[index], Wishes::SIMPLE);
    }
    daemon.stop();
}

/// A node that does not know that it lost its volume keeps writing; what it was answered is there, and nothing else
/// arrives once the volume was taken from it.
#[test]
fn a_node_that_writes_on_is_fenced() {
    let mut daemon = Setup::default().start("fenced");
    daemon.create("v", "64MiB");
    let mut driver = rpc(&daemon);
    driver.node("a");
    driver.node("b");
    for round in 1..=5u64 {
        let export = driver
            .publish("v", "a", AccessMode::SingleNodeWriter)
            .unwrap();
        let mut a = daemon.open(&export, Wishes::SIMPLE);
        let answered = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        let contents = std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1.. {
                    let stamp = (round << 32 | number).to_le_bytes().repeat(512);
                    if a.write(number % 1024 * 4096, &stamp).is_err() {
                        break;
                    }
                    answered.store(number, Ordering::Release);
                }
                over.store(true, Ordering::Release);
            });
            while answered.load(Ordering::Acquire) < 200 * round {
                assert!(
                    !over.load(Ordering::Acquire),
                    "the writer stopped by itself"
                );
                std::thread::yield_now();
            }
            assert_eq!(driver.unpublish("v", "a").closed_connections, 1);
            let export = driver
                .publish("v", "b", AccessMode::SingleNodeWriter)
                .unwrap();
            daemon
                .open(&export, Wishes::SIMPLE)
                .read(0, 4 * MIB)
                .unwrap()
        });
        let last = answered.load(Ordering::Acquire);
        let first = last.saturating_sub(1000).max(1);
        for number in first..=last {
            let at = (number % 1024 * 4096) as usize;
            let got = u64::from_le_bytes(contents[at..at + 8].try_into().unwrap());
            // The write under way when the node was fenced may have happened; it is the next of its kind.
            assert!(
                got >= round << 32 | number,
                "write {number} of round {round} is gone"
            );
            assert!(
                contents[at..at + 4096]
                    .chunks(8)
                    .all(|c| c == got.to_le_bytes()),
                "torn"
            );
        }
        let export = driver
            .publish("v", "b", AccessMode::SingleNodeWriter)
            .unwrap();
        let now = daemon
            .open(&export, Wishes::SIMPLE)
            .read(0, 4 * MIB)
            .unwrap();
        assert!(now == contents, "something arrived after the fence");
        driver.unpublish("v", "b");
    }
    daemon.stop();
}

fn begin(
    driver: &mut Rpc,
    volume: &str,
    uuid: u128,
) -> Result<admin::BeginFormatResponse, tonic::Status> {
    driver.begin_format(admin::BeginFormatRequest {
        volume: volume.into(),
        filesystem: "ext4".into(),
        uuid: uuid::Uuid::from_u128(uuid).to_string(),
    })
}

#[test]
fn only_a_volume_that_was_never_written_is_formatted() {
    let mut daemon = Setup::default().start("formats");
    for volume in ["blank", "written", "trimmed", "zeroed", "formatted"] {
        daemon.create(volume, "8MiB");
    }
    let mut driver = rpc(&daemon);
    // Looked at and flushed, which writes nothing.
    let mut looked = daemon.open("blank", Wishes::STRUCTURED);
    looked.read(0, 1 << 20).unwrap();
    looked.flush().unwrap();
    daemon
        .open("written", Wishes::SIMPLE)
        .write(4096, &[1; 512])
        .unwrap();
    let mut trimmed = daemon.open("trimmed", Wishes::SIMPLE);
    trimmed.write(0, &[1; 4096]).unwrap();
    trimmed.trim(0, 8 * MIB).unwrap();
    trimmed.flush().unwrap();
    daemon
        .open("zeroed", Wishes::SIMPLE)
        .write_zeroes(0, 8 * MIB, 0)
        .unwrap();
    begin(&mut driver, "formatted", 1).unwrap();
    assert_eq!(
        refusal(begin(&mut driver, "formatted", 2)).0,
        Code::FailedPrecondition
    );
    // Nobody writes by its name now, and mkfs, by the name that its node was given, gets half-way.
    let mut by_hand = daemon.open("formatted", Wishes::SIMPLE);
    by_hand.read(0, 4096).unwrap();
    by_hand.write(1024, &[2; 1024]).unwrap_err();
    drop(by_hand);
    driver.node("a");
    let begun = Instant::now();
    let export = loop {
        match driver.publish("formatted", "a", AccessMode::SingleNodeWriter) {
            Ok(export) => break export,
            // The connection that was just ended.
            Err(status) => assert!(begun.elapsed() < Duration::from_secs(30), "{status}"),
        }
    };
    let mut mkfs = daemon.open(&export, Wishes::SIMPLE);
    mkfs.write(1024, &[1; 1024]).unwrap();
    begin(&mut driver, "formatted", 1).unwrap();
    for restart in 0..3 {
        if restart > 0 {
            daemon.kill();
            daemon.start();
            driver = rpc(&daemon);
        }
        assert!(!driver.volume("blank").ever_written);
        for volume in ["written", "trimmed", "zeroed"] {
            assert!(driver.volume(volume).ever_written, "{volume}");
            let (code, text) = refusal(begin(&mut driver, volume, 7));
            assert!(
                code == Code::FailedPrecondition && text.contains("could destroy data"),
                "{text}"
            );
        }
        let filesystem = driver.volume("formatted").filesystem.unwrap();
        assert_eq!(
            (filesystem.r#type.as_str(), filesystem.state()),
            ("ext4", FilesystemState::Formatting)
        );
        assert_eq!(
            refusal(begin(&mut driver, "formatted", 2)).0,
            Code::FailedPrecondition
        );
        begin(&mut driver, "formatted", 1).unwrap();
    }
    let end = |uuid: u128| admin::EndFormatRequest {
        volume: "formatted".into(),
        uuid: uuid::Uuid::from_u128(uuid).to_string(),
    };
    assert_eq!(
        refusal(driver.end_format(end(2))).0,
        Code::FailedPrecondition
    );
    driver.end_format(end(1)).unwrap();
    driver.end_format(end(1)).unwrap();
    assert_eq!(
        refusal(begin(&mut driver, "formatted", 1)).0,
        Code::FailedPrecondition
    );
    begin(&mut driver, "blank", 3).unwrap();
    let shown = daemon.admin().run(["volume", "show", "formatted"]);
    assert!(
        shown.contains("ext4 00000000-0000-0000-0000-000000000001"),
        "{shown}"
    );
    daemon.stop();
}

#[test]
fn limits_annotations_pages_and_capacity() {
    let mut daemon = Setup::default().arg("--overcommit=200").start("limits");
    let mut driver = rpc(&daemon);
    let capacity = |driver: &mut Rpc| {
        driver
            .get_capacity(admin::GetCapacityRequest::default())
            .unwrap()
    };
    let empty = capacity(&mut driver);
    assert!(empty.available_bytes <= empty.capacity_bytes && empty.promised_bytes == 0);
    assert_eq!(
        empty.provisionable_bytes,
        2 * empty.available_bytes.min(empty.capacity_bytes)
    );
    let create = |name: &str| admin::CreateVolumeRequest {
        name: name.into(),
        size_bytes: 16 * MIB,
        limits: Some(admin::VolumeLimits {
            iops: 50,
            bytes_per_second: 0,
        }),
        annotations: [("k".to_owned(), name.to_owned())].into(),
        ..Default::default()
    };
    for name in ["a", "b", "c"] {
        driver.create_volume(create(name)).unwrap();
    }
    let full = capacity(&mut driver);
    assert_eq!(
        (full.promised_bytes, full.overcommit_percent),
        (48 * MIB, 200)
    );

    // Two pages and their end.
    let mut page = admin::ListVolumesRequest {
        max_volumes: 2,
        page_token: String::new(),
    };
    let mut names = Vec::new();
    loop {
        let answer = driver.list_volumes(page.clone()).unwrap();
        names.push(
            answer
                .volumes
                .into_iter()
                .map(|v| v.name)
                .collect::<Vec<_>>()
                .join(""),
        );
        if answer.next_page_token.is_empty() {
            break;
        }
        page.page_token = answer.next_page_token;
    }
    assert_eq!(names, ["ab", "c"]);
    page.page_token = "nonsense".into();
    assert_eq!(refusal(driver.list_volumes(page)).0, Code::InvalidArgument);

    let set = |revision, text: String| admin::SetAnnotationsRequest {
        volume: "a".into(),
        expected_revision: revision,
        annotations: [("k".to_owned(), text)].into(),
    };
    assert_eq!(driver.volume("a").annotations_revision, 1);
    driver.set_annotations(set(1, "new".into())).unwrap();
    assert_eq!(
        refusal(driver.set_annotations(set(1, "late".into()))).0,
        Code::Aborted
    );
    let large = driver.set_annotations(set(2, "x".repeat(16 << 10)));
    assert_eq!(refusal(large).0, Code::InvalidArgument);
    assert_eq!(driver.volume("a").annotations["k"], "new");

    // 5 at once, one ahead, and each of the others takes 20 ms. Lifted under the open connection.
    let mut client = daemon.open("a", Wishes::SIMPLE);
    let mut time = |count: u64| {
        let begun = Instant::now();
        for _ in 0..count {
            client.read(0, 4096).unwrap();
        }
        begun.elapsed()
    };
    let limited = time(56);
    assert!(
        (Duration::from_millis(980)..Duration::from_secs(60)).contains(&limited),
        "{limited:?}"
    );
    let admin = daemon.admin();
    let refused = admin.refused(["volume", "set", "a", "--iops", "1"]);
    assert!(refused.contains("at least 10"), "{refused}");
    admin.run(["volume", "set", "a", "--iops", "0"]);
    // At 50 a second these would take 100 s.
    assert!(time(5000) < Duration::from_secs(60));
    let shown = admin.json(["volume", "show", "b"]);
    assert_eq!(shown["limits"]["iops"], 50);
    assert!(
        admin
            .run(["volume", "set", "b", "--bps", "4MiB"])
            .contains("changed b")
    );
    let shown = admin.run(["volume", "show", "b"]);
    assert!(
        shown.contains("50 IOPS, 4") && shown.contains("never written"),
        "{shown}"
    );
    daemon.kill();
    daemon.start();
    assert_eq!(
        rpc(&daemon).volume("b").limits.unwrap().bytes_per_second,
        4 * MIB
    );
    daemon.stop();
}
