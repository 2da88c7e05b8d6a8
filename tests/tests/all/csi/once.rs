//! A volume is attached once on a node, and what was begun and came to a final answer leaves nothing.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, loops_below, mounted, raw, text};
use ashlar_tests::daemon::Setup;
use ashlar_tests::nbd::{self, Wishes};
use ashlar_tests::tool::Tool;
use tonic::Code;

use super::SMALL;

const DEATH: Duration = Duration::from_secs(120);

fn writer() -> ashlar_tests::csi::csi::VolumeCapability {
    mounted("ext4", Mode::SingleNodeWriter)
}

fn source(point: &Path) -> String {
    let found = Tool::new("findmnt").args(["-no", "SOURCE"]).arg(point);
    found.succeed().trim().to_owned()
}

/// Dies at a point of staging, and is back with what that left.
fn die_at(driver: &mut Driver, claim: &Claim, point: &str) {
    driver.kill_driver();
    driver.start_driver(&["--fail-point", point]);
    assert!(claim.stage(driver).is_err());
    driver.wait_killed(DEATH);
    driver.start_driver(&[]);
}

#[test]
fn a_device_that_is_not_known_any_more_is_not_joined_by_a_second() {
    let mut driver = Driver::start("csi-once", Setup::default());
    let claim = Claim::new(&driver, "once", SMALL, writer());
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    // All that the driver knows is where it was, as with another --state-dir.
    driver.kill_driver();
    fs::rename(driver.state_dir(), driver.daemon.scratch.join("old")).expect("moved");
    driver.start_driver(&[]);
    let before = (driver.leftovers(), source(&claim.staging));
    for attempt in 0..2 {
        let (code, why) = claim.stage(&driver).expect_err("mounted");
        assert_eq!(code, Code::FailedPrecondition, "{attempt}: {why}");
        assert!(why.contains(&before.1) && why.contains("umount"), "{why}");
    }
    claim.publish(&driver).expect_err("mounted");
    let after = (driver.leftovers(), source(&claim.staging));
    assert_eq!(after, before, "something was attached or taken away");
    fs::write(claim.target.join("more"), b"more").expect("the pod works on");
    for point in [&claim.target, &claim.staging] {
        Tool::new("umount").arg(point).succeed();
    }
    for name in loops_below(driver.daemon.scratch.path()) {
        let node = format!("/dev/{name}");
        Tool::new("losetup").args(["-d", &node]).succeed();
    }
    driver.clear_devices();
    // Nothing is mounted any more, and somebody has the volume open by the name that this node was given.
    let export = &claim.publish_context["export"];
    let open = nbd::open(&driver.daemon.address(), export, Wishes::SIMPLE).expect("open");
    let (code, why) = claim.stage(&driver).expect_err("open");
    assert_eq!(code, Code::Unavailable, "{why}");
    assert!(why.contains("connections are open"), "{why}");
    assert_eq!(driver.leftovers(), Vec::<String>::new());
    drop(open);
    claim.bring_up(&driver);
    for (name, data) in [("kept", b"data"), ("more", b"more")] {
        assert_eq!(fs::read(claim.target.join(name)).expect("read"), data);
    }
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn what_somebody_mounted_in_its_place_is_left_alone() {
    let driver = Driver::start("csi-place", Setup::default());
    let claim = Claim::new(&driver, "place", SMALL, writer());
    Tool::new("mount")
        .args(["-t", "tmpfs", "none", &text(&claim.staging)])
        .succeed();
    let (code, why) = claim.stage(&driver).expect_err("occupied");
    assert_eq!(code, Code::FailedPrecondition, "{why}");
    assert_eq!(source(&claim.staging), "none");
    Tool::new("umount").arg(&claim.staging).succeed();
    claim.bring_up(&driver);
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn a_final_answer_leaves_nothing_that_was_half_made() {
    let mut driver = Driver::start("csi-final", Setup::default());
    let nothing_is_left = |driver: &Driver| {
        assert_eq!(driver.leftovers(), Vec::<String>::new());
        assert_eq!(driver.remembered(), Vec::<String>::new());
    };
    // Taken from the node.
    let claim = Claim::new(&driver, "taken", SMALL, writer());
    die_at(&mut driver, &claim, "attach-done");
    claim.controller_unpublish(&driver).expect("taken");
    let (code, why) = claim.stage(&driver).expect_err("fenced");
    assert_eq!(code, Code::FailedPrecondition, "{why}");
    nothing_is_left(&driver);

    // Gone altogether; and while somebody keeps its device the answer is one to ask again after.
    let claim = Claim::new(&driver, "gone", SMALL, writer());
    die_at(&mut driver, &claim, "attach-done");
    claim.controller_unpublish(&driver).expect("taken");
    driver.delete(&claim.id).expect("deleted");
    let device = loops_below(driver.daemon.scratch.path());
    let held = File::open(format!("/dev/{}", device[0])).expect("opened");
    let (code, why) = claim.stage(&driver).expect_err("gone");
    assert_eq!(code, Code::Unavailable, "{why}");
    assert!(why.contains("clearing away"), "{why}");
    drop(held);
    let (code, why) = claim.stage(&driver).expect_err("gone");
    assert_eq!(code, Code::NotFound, "{why}");
    nothing_is_left(&driver);

    // What is staged as a whole, and used, stays whatever is asked.
    let mut claim = Claim::new(&driver, "used", SMALL, writer());
    claim.bring_up(&driver);
    claim.capability = raw(Mode::SingleNodeWriter);
    let (code, why) = claim.stage(&driver).expect_err("otherwise");
    assert_eq!(code, Code::AlreadyExists, "{why}");
    claim.capability = mounted("ext4", Mode::SingleNodeWriter);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    claim.take_away(&driver);
    nothing_is_left(&driver);
}

/// As after the end of the container that nbdfuse's mount was in: the kernel does not tell any more of which file a loop
/// device is.
#[test]
fn a_loop_device_whose_file_is_out_of_sight_is_found() {
    let mut driver = Driver::start("csi-sight", Setup::default());
    let claim = Claim::new(&driver, "sight", SMALL, writer());
    claim.bring_up(&driver);
    let device = source(&claim.target);
    driver.kill_driver();
    let shown = driver.state_dir().join("fuse").join(&claim.id);
    Tool::new("umount").arg("-l").arg(&shown).succeed();
    let name = device.trim_start_matches("/dev/");
    let backing = format!("/sys/block/{name}/loop/backing_file");
    let told = fs::read_to_string(&backing).expect("attached");
    assert!(!told.contains(&claim.id), "{told}");
    driver.start_driver(&[]);
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    assert!(!Path::new(&backing).exists(), "{device} is left");
    assert_eq!(driver.leftovers(), Vec::<String>::new());
    claim.bring_up(&driver);
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}
