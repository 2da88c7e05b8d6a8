//! The driver killed at every step, and asked again.

use std::fs;
use std::time::Duration;

use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, mounted, raw};
use ashlar_tests::daemon::Setup;
use tonic::Code;

use super::SMALL;

const DEATH: Duration = Duration::from_secs(120);

/// The points of a volume's way there and back, and which call meets each.
const POINTS: [(&str, Step); 24] = [
    ("stage-begun", Step::Stage),
    ("stage-state-written", Step::Stage),
    ("attach-half", Step::Stage),
    ("attach-done", Step::Stage),
    ("stage-device-recorded", Step::Stage),
    ("format-intended", Step::Stage),
    ("format-made", Step::Stage),
    ("format-recorded", Step::Stage),
    ("stage-checked", Step::Stage),
    ("stage-mounted", Step::Stage),
    ("stage-grown", Step::Stage),
    ("stage-recorded", Step::Stage),
    ("publish-begun", Step::Publish),
    ("publish-target-made", Step::Publish),
    ("publish-bound", Step::Publish),
    ("publish-recorded", Step::Publish),
    ("unpublish-begun", Step::Unpublish),
    ("unpublish-unmounted", Step::Unpublish),
    ("unpublish-target-gone", Step::Unpublish),
    ("unstage-begun", Step::Unstage),
    ("unstage-unmounted", Step::Unstage),
    ("detach-half", Step::Unstage),
    ("unstage-detached", Step::Unstage),
    ("unstage-forgotten", Step::Unstage),
];

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Stage,
    Publish,
    Unpublish,
    Unstage,
}

fn take(driver: &Driver, claim: &Claim, step: Step) -> Result<(), (Code, String)> {
    match step {
        Step::Stage => claim.stage(driver),
        Step::Publish => claim.publish(driver),
        Step::Unpublish => claim.unpublish(driver),
        Step::Unstage => claim.unstage(driver),
    }
}

/// What a workload sees is what an earlier one wrote.
fn write_or_compare(claim: &Claim, block: bool, write: bool) {
    let data = vec![0x5a; 64 << 10];
    let path = if block {
        claim.target.clone()
    } else {
        claim.target.join("data")
    };
    if write {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(!block)
            .truncate(false)
            .open(&path)
            .expect("opened");
        std::io::Write::write_all(&mut file, &data).expect("written");
        file.sync_all().expect("durable");
    } else {
        let mut file = fs::File::open(&path).expect("opened");
        let mut found = vec![0; data.len()];
        std::io::Read::read_exact(&mut file, &mut found).expect("read");
        assert!(found == data, "the data changed");
    }
}

fn killed_at(driver: &mut Driver, point: &str, at: Step, block: bool) {
    let capability = if block {
        raw(Mode::SingleNodeWriter)
    } else {
        mounted("ext4", Mode::SingleNodeWriter)
    };
    let claim = Claim::new(driver, point, SMALL, capability);
    for step in [Step::Stage, Step::Publish, Step::Unpublish, Step::Unstage] {
        if step == at {
            driver.kill_driver();
            driver.start_driver(&["--fail-point", point]);
            let answer = take(driver, &claim, step);
            assert!(answer.is_err(), "{point}: answered though it died");
            driver.wait_killed(DEATH);
            driver.start_driver(&[]);
        }
        take(driver, &claim, step).unwrap_or_else(|error| panic!("{point}: again: {error:?}"));
        // And once more, for nothing.
        take(driver, &claim, step).unwrap_or_else(|error| panic!("{point}: repeated: {error:?}"));
        if step == Step::Publish {
            write_or_compare(&claim, block, true);
        }
    }
    assert!(!claim.target.exists(), "{point}: the target is left");
    assert_eq!(driver.leftovers(), Vec::<String>::new(), "{point}");
    assert_eq!(driver.remembered(), Vec::<String>::new(), "{point}");
    claim.bring_up(driver);
    write_or_compare(&claim, block, false);
    claim.take_away(driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new(), "{point}");
}

#[test]
fn a_mounted_volume_survives_a_kill_at_every_step() {
    assert_eq!(POINTS.map(|(name, _)| name), ashlar_csi::failpoint::NAMES);
    let mut driver = Driver::start("csi-killed", Setup::default());
    for (point, at) in POINTS {
        killed_at(&mut driver, point, at, false);
    }
}

#[test]
fn a_raw_volume_survives_a_kill_at_every_step() {
    let mut driver = Driver::start("csi-killed-raw", Setup::default());
    let of_filesystems = ["stage-checked", "stage-mounted", "stage-grown"];
    for (point, at) in POINTS {
        if !point.starts_with("format-") && !of_filesystems.contains(&point) {
            killed_at(&mut driver, point, at, true);
        }
    }
}
