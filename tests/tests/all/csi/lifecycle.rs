//! The interface's rules that csi-sanity does not try, and what an orchestrator does when things go wrong.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use ashlar_tests::csi::csi::node_client::NodeClient;
use ashlar_tests::csi::csi::volume_capability::AccessType;
use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, csi, mounted, raw, text};
use ashlar_tests::daemon::Setup;
use ashlar_tests::tool::Tool;
use tonic::Code;

use super::{SMALL, code};

#[test]
fn a_second_target_follows_the_access_mode() {
    let driver = Driver::start("csi-targets", Setup::default());
    let other = driver.root().join("other");
    for (name, mode, second) in [
        (
            "writer",
            Mode::SingleNodeWriter,
            Some(Code::FailedPrecondition),
        ),
        (
            "single",
            Mode::SingleNodeSingleWriter,
            Some(Code::FailedPrecondition),
        ),
        ("multi", Mode::SingleNodeMultiWriter, None),
    ] {
        for (kind, capability) in [("m", mounted("ext4", mode)), ("b", raw(mode))] {
            let claim = Claim::new(&driver, &format!("{name}-{kind}"), SMALL, capability);
            claim.bring_up(&driver);
            claim.publish(&driver).expect("the same again");
            let changed = claim.publish_at(&driver, &claim.target, true);
            assert_eq!(code(changed), Code::AlreadyExists, "{name} {kind}");
            let answer = claim.publish_at(&driver, &other, false);
            assert_eq!(answer.err().map(|(code, _)| code), second, "{name} {kind}");
            // Published, it is not unstaged under its user.
            assert_eq!(code(claim.unstage(&driver)), Code::FailedPrecondition);
            driver
                .unpublish(&claim.id, &other)
                .expect("undone, or never done");
            assert!(!other.exists());
            claim.take_away(&driver);
        }
    }
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn read_only_is_read_only() {
    let driver = Driver::start("csi-readonly", Setup::default());
    let claim = Claim::new(
        &driver,
        "ro",
        SMALL,
        mounted("ext4", Mode::SingleNodeMultiWriter),
    );
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    let reader = driver.root().join("reader");
    claim
        .publish_at(&driver, &reader, true)
        .expect("a reader beside the writer");
    assert_eq!(fs::read(reader.join("kept")).expect("read"), b"data");
    assert!(fs::write(reader.join("more"), b"x").is_err());
    driver.unpublish(&claim.id, &reader).expect("gone");
    claim.take_away(&driver);

    let block = Claim::new(&driver, "rob", SMALL, raw(Mode::SingleNodeMultiWriter));
    block.stage(&driver).expect("staged");
    block
        .publish_at(&driver, &block.target, true)
        .expect("published");
    let opened = fs::OpenOptions::new().write(true).open(&block.target);
    let written = opened.and_then(|mut device| {
        device.write_all(&[1; 4096])?;
        device.sync_all()
    });
    assert!(written.is_err(), "a read-only device was written");
    block.take_away(&driver);

    // Published read-only by the controller: nothing this node does can write.
    let mut whole = Claim::unpublished(
        &driver,
        "row",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    whole.publish_context = whole.controller_publish(&driver, false).expect("published");
    whole.bring_up(&driver);
    fs::write(whole.target.join("kept"), b"data").expect("written");
    whole.unpublish(&driver).expect("unpublished");
    whole.unstage(&driver).expect("unstaged");
    assert_eq!(
        code(whole.controller_publish(&driver, true)),
        Code::AlreadyExists
    );
    whole.controller_unpublish(&driver).expect("taken back");
    whole.publish_context = whole.controller_publish(&driver, true).expect("published");
    whole.bring_up(&driver);
    assert_eq!(fs::read(whole.target.join("kept")).expect("read"), b"data");
    assert!(fs::write(whole.target.join("more"), b"x").is_err());
    whole.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn hostile_paths_reach_nothing() {
    let driver = Driver::start("csi-paths", Setup::default());
    let mut claim = Claim::new(
        &driver,
        "paths",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    let outside = driver.daemon.scratch.join("outside");
    fs::create_dir(&outside).expect("made");
    fs::write(outside.join("precious"), b"data").expect("written");
    let link = driver.root().join("link");
    symlink(&outside, &link).expect("made");
    let (staging, target) = (claim.staging.clone(), claim.target.clone());
    let bad = [
        outside.clone(),
        link.clone(),
        link.join("below"),
        driver.root().join("..").join("outside"),
        "relative".into(),
        "/".into(),
    ];
    for path in &bad {
        claim.staging = path.clone();
        assert_eq!(
            code(claim.stage(&driver)),
            Code::InvalidArgument,
            "{}",
            path.display()
        );
        assert_eq!(code(claim.unstage(&driver)), Code::InvalidArgument);
    }
    claim.staging = staging;
    claim.stage(&driver).expect("staged");
    for path in &bad {
        claim.target = path.clone();
        assert_eq!(
            code(claim.publish(&driver)),
            Code::InvalidArgument,
            "{}",
            path.display()
        );
        assert_eq!(code(claim.unpublish(&driver)), Code::InvalidArgument);
    }
    claim.target = target;
    for id in ["../../../etc", "%2e%2e", "no-such-volume", "\u{1F4A3}"] {
        driver
            .unpublish(id, &claim.target)
            .expect("nothing to undo");
        driver.unstage(id, &claim.staging).expect("nothing to undo");
        driver.delete(id).expect("nothing to delete");
        assert_eq!(
            code(driver.controller_publish(
                ashlar_tests::csi::csi::ControllerPublishVolumeRequest {
                    volume_id: id.to_owned(),
                    node_id: driver.node_id().to_owned(),
                    volume_capability: Some(claim.capability.clone()),
                    ..Default::default()
                }
            )),
            Code::NotFound
        );
    }
    // Somebody else's mount at a target of ours is left alone.
    let foreign = driver.root().join("foreign");
    fs::create_dir(&foreign).expect("made");
    Tool::new("mount")
        .args(["-t", "tmpfs", "none", &text(&foreign)])
        .succeed();
    assert_eq!(
        code(driver.unpublish(&claim.id, &foreign)),
        Code::FailedPrecondition
    );
    assert_eq!(
        code(claim.publish_at(&driver, &foreign, false)),
        Code::AlreadyExists
    );
    Tool::new("umount").arg(&foreign).succeed();
    assert_eq!(fs::read(outside.join("precious")).expect("there"), b"data");
    claim.publish(&driver).expect("published");
    claim.take_away(&driver);
}

#[test]
fn a_volume_grows_when_it_is_staged() {
    let driver = Driver::start("csi-grow", Setup::default());
    for (fs_type, size) in [("ext4", 64 << 20), ("xfs", 320i64 << 20)] {
        let claim = Claim::new(
            &driver,
            &format!("grow-{fs_type}"),
            size,
            mounted(fs_type, Mode::SingleNodeWriter),
        );
        claim.bring_up(&driver);
        fs::write(claim.target.join("kept"), b"data").expect("written");
        let before = rustix::fs::statvfs(&claim.target)
            .expect("statvfs")
            .f_blocks;
        claim.unpublish(&driver).expect("unpublished");
        claim.unstage(&driver).expect("unstaged");
        let answer = driver.expand(&claim.id, 2 * size).expect("expanded");
        assert_eq!(answer.capacity_bytes, 2 * size);
        claim.bring_up(&driver);
        let after = rustix::fs::statvfs(&claim.target)
            .expect("statvfs")
            .f_blocks;
        assert!(after > before * 3 / 2, "{before} to {after} blocks");
        assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
        claim.take_away(&driver);
    }
}

#[test]
fn a_publish_without_its_stage_never_shows_the_nodes_own_disk() {
    let mut driver = Driver::start("csi-unstaged", Setup::default());
    let mut claim = Claim::new(
        &driver,
        "unstaged",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    // The orchestrator believes that it is staged: with what was published it is staged again.
    claim.publish(&driver).expect("published");
    assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    // Without, it is refused.
    let context = std::mem::take(&mut claim.publish_context);
    assert_eq!(code(claim.publish(&driver)), Code::FailedPrecondition);
    assert!(!claim.target.exists());
    claim.publish_context = context;
    // The state files are lost: what is staged is still found and taken away.
    claim.bring_up(&driver);
    driver.kill_driver();
    for name in driver.remembered() {
        fs::remove_file(driver.state_dir().join(name)).expect("removed");
    }
    driver.start_driver(&[]);
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn a_forced_detach_fences_the_old_node() {
    let driver = Driver::start("csi-fence", Setup::default());
    driver.register_node("node-b");
    let mut claim = Claim::new(&driver, "fence", SMALL, raw(Mode::SingleNodeWriter));
    claim.bring_up(&driver);
    let mut device = fs::OpenOptions::new()
        .write(true)
        .open(&claim.target)
        .expect("opened");
    device.write_all(&[7; 1 << 20]).expect("written");
    device.sync_all().expect("durable");
    // Held by A: B is told who has it.
    let to_b = ashlar_tests::csi::csi::ControllerPublishVolumeRequest {
        volume_id: claim.id.clone(),
        node_id: "node-b".to_owned(),
        volume_capability: Some(claim.capability.clone()),
        ..Default::default()
    };
    let (refused, why) = driver.controller_publish(to_b.clone()).expect_err("held");
    assert_eq!(refused, Code::FailedPrecondition);
    assert!(why.contains("node-a"), "{why}");
    let mut nowhere = to_b.clone();
    nowhere.node_id = "node-x".to_owned();
    assert_eq!(code(driver.controller_publish(nowhere)), Code::NotFound);
    assert_eq!(code(driver.delete(&claim.id)), Code::FailedPrecondition);
    // Forced away from all nodes, while A has it open.
    driver
        .controller_unpublish(&claim.id, "")
        .expect("taken from all");
    driver.controller_unpublish(&claim.id, "").expect("again");
    let given = driver.controller_publish(to_b).expect("B has it");
    let late = device
        .write_all(&[9; 1 << 20])
        .and_then(|()| device.sync_all());
    assert!(late.is_err(), "A wrote after it was fenced");
    let uri = driver.daemon.uri(&given["export"].replace('@', "%40"));
    Tool::new("nbdsh")
        .args([
            "-u",
            &uri,
            "-c",
            "assert h.pread(1 << 20, 0) == bytearray([7]) * (1 << 20)",
        ])
        .succeed();
    drop(device);
    // A's plugin can clear away what it had.
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    assert_eq!(driver.leftovers(), Vec::<String>::new());
    // And gets it back on new terms.
    driver
        .controller_unpublish(&claim.id, "node-b")
        .expect("taken from B");
    claim.publish_context = claim.controller_publish(&driver, false).expect("published");
    claim.bring_up(&driver);
    claim.take_away(&driver);
}

/// A capability with options for mount(8).
fn with_flags(fs_type: &str, flags: &[&str]) -> csi::VolumeCapability {
    let mut capability = mounted(fs_type, Mode::SingleNodeMultiWriter);
    if let Some(AccessType::Mount(mount)) = &mut capability.access_type {
        mount.mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }
    capability
}

#[test]
fn mount_options_are_kept_and_hostile_ones_refused() {
    let driver = Driver::start("csi-options", Setup::default());
    let mut claim = Claim::unpublished(&driver, "options", SMALL, with_flags("ext4", &["ro"]));
    for hostile in ["bind", "logdev=/dev/sda", "errors=panic"] {
        claim.capability = with_flags("ext4", &["noatime", hostile]);
        assert_eq!(
            code(claim.controller_publish(&driver, false)),
            Code::InvalidArgument
        );
        assert_eq!(code(claim.stage(&driver)), Code::InvalidArgument);
    }
    // It is made, and then nobody writes to it; asked again that is no damage.
    claim.capability = with_flags("ext4", &["noatime,ro"]);
    claim.publish_context = claim.controller_publish(&driver, false).expect("published");
    claim.bring_up(&driver);
    let options = |path: &std::path::Path| {
        let found = Tool::new("findmnt").args(["-no", "OPTIONS"]).arg(path);
        found.succeed()
    };
    for path in [&claim.staging, &claim.target] {
        let options = options(path);
        assert!(
            options.starts_with("ro,") && options.contains("noatime"),
            "{options}"
        );
    }
    assert!(fs::write(claim.target.join("no"), b"x").is_err());
    let before = options(&claim.staging);
    claim.bring_up(&driver);
    let other = driver.root().join("other");
    claim.publish_at(&driver, &other, false).expect("a second");
    driver.unpublish(&claim.id, &other).expect("unpublished");
    assert_eq!(options(&claim.staging), before);
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    claim.capability = with_flags("ext4", &["ro", "rw"]);
    claim.bring_up(&driver);
    fs::write(claim.target.join("yes"), b"x").expect("written");
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn the_kubelets_directory_and_the_drivers_own_may_be_links() {
    let mut driver = Driver::prepare("csi-linked", Setup::default());
    let real = driver.daemon.scratch.join("disk");
    fs::create_dir(&real).expect("made");
    symlink(&real, driver.state_dir()).expect("made");
    let link = driver.daemon.scratch.join("var");
    symlink(driver.root(), &link).expect("made");
    driver.set_arguments(&["--kubelet-dir", &text(&link)]);
    driver.start_driver(&[]);
    for (name, capability) in [
        ("m", mounted("ext4", Mode::SingleNodeMultiWriter)),
        ("b", raw(Mode::SingleNodeMultiWriter)),
    ] {
        let mut claim = Claim::new(&driver, name, SMALL, capability);
        let target = claim.target.clone();
        claim.staging = link.join(claim.staging.file_name().expect("a name"));
        claim.target = link.join(target.file_name().expect("a name"));
        claim.bring_up(&driver);
        claim.bring_up(&driver);
        assert!(driver.leftovers().len() > 2, "{:?}", driver.leftovers());
        let stats = csi::NodeGetVolumeStatsRequest {
            volume_id: claim.id.clone(),
            volume_path: text(&claim.target),
            ..Default::default()
        };
        let usage = driver.call(|channel| async move {
            NodeClient::new(channel).node_get_volume_stats(stats).await
        });
        assert!(usage.expect("told").usage[0].total > 0);
        // By the one name or the other, and after a restart.
        let (linked, claim_target) = (claim.target.clone(), target);
        claim.target = claim_target;
        claim.publish(&driver).expect("published already");
        claim.target = linked;
        driver.kill_driver();
        driver.start_driver(&[]);
        claim.bring_up(&driver);
        claim.take_away(&driver);
        assert_eq!(driver.leftovers(), Vec::<String>::new(), "{name}");
        assert_eq!(driver.remembered(), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn nothing_hangs_when_the_daemon_is_dead() {
    let mut driver = Driver::prepare("csi-dead", Setup::default());
    driver.set_arguments(&["--unstage-patience", "2"]);
    driver.start_driver(&[]);
    let claim = Claim::new(
        &driver,
        "dead",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    Tool::new("sync").arg("-f").arg(&claim.target).succeed();
    driver.daemon.kill();
    assert_eq!(driver.probe(), Ok(Some(false)));
    assert_eq!(driver.node_info().expect("known").node_id, driver.node_id());
    let begun = Instant::now();
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    assert!(
        begun.elapsed() < Duration::from_secs(110),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(driver.leftovers(), Vec::<String>::new());
    assert_eq!(code(claim.stage(&driver)), Code::Unavailable);
    driver.daemon.start();
    assert_eq!(driver.probe(), Ok(Some(true)));
    claim.bring_up(&driver);
    assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
    claim.take_away(&driver);
}

#[test]
fn a_dead_device_is_replaced_when_nobody_uses_it() {
    let mut driver = Driver::start("csi-revived", Setup::default());
    let claim = Claim::new(
        &driver,
        "revived",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    Tool::new("sync").arg("-f").arg(&claim.target).succeed();
    // nbdfuse does not connect again: the pod that has the volume sees errors, and goes.
    driver.daemon.kill();
    driver.daemon.start();
    claim.unpublish(&driver).expect("unpublished");
    // The next pod on this node is published without a new stage, as the orchestrator believes it is staged.
    claim.publish(&driver).expect("published");
    assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
    fs::write(claim.target.join("more"), b"x").expect("written");
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn work_goes_on_while_the_plugin_is_killed() {
    let mut driver = Driver::start("csi-restart", Setup::default());
    let claim = Claim::new(
        &driver,
        "restart",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&driver);
    for round in 0..3u8 {
        driver.kill_driver();
        let mut file = fs::File::create(claim.target.join(format!("file-{round}"))).expect("made");
        file.write_all(&[round; 1 << 20])
            .expect("written without the plugin");
        file.sync_all().expect("durable without the plugin");
        driver.start_driver(&[]);
        // What it finds is what it would have made.
        claim.stage(&driver).expect("staged already");
        claim.publish(&driver).expect("published already");
    }
    for round in 0..3u8 {
        let found = fs::read(claim.target.join(format!("file-{round}"))).expect("read");
        assert!(found == [round; 1 << 20]);
    }
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}
