//! csi-sanity, the interface's own suite (kubernetes-csi/csi-test v5.4.0), over the whole driver.

use std::time::Duration;

use ashlar_tests::csi::Driver;
use ashlar_tests::daemon::Setup;
use ashlar_tests::suites;
use ashlar_tests::tool::Tool;

fn run(test: &str, access: &str) {
    let mut driver = Driver::prepare(test, Setup::default().store_size("4GiB"));
    driver.set_arguments(&["--max-volumes", "10"]);
    driver.start_driver(&[]);
    let path = |name: &str| driver.root().join(name).to_str().expect("text").to_owned();
    // Only what no capability of ours calls for is left out: snapshots, clones and groups skip themselves.
    let said = Tool::new(suites::csi_sanity().to_str().expect("text"))
        .arg(format!("--csi.endpoint=unix:{}", driver.socket().display()))
        .arg(format!("--csi.mountdir={}", path("mount")))
        .arg(format!("--csi.stagingdir={}", path("staging")))
        .arg(format!("--csi.testvolumeaccesstype={access}"))
        .arg(format!("--csi.testvolumesize={}", 64 << 20))
        .arg(format!("--csi.testvolumeexpandsize={}", 96 << 20))
        .arg(format!(
            "--csi.testvolumemutableparameters={}",
            mutable(&driver)
        ))
        .arg("--csi.testnodevolumeattachlimit")
        .arg("--ginkgo.no-color")
        .arg("--ginkgo.timeout=20m")
        .limit(Duration::from_secs(1300))
        .succeed();
    let summary = said
        .lines()
        .rev()
        .find(|line| line.contains("Passed"))
        .unwrap_or_else(|| panic!("no summary in {said}"));
    println!("csi-sanity {access}: {summary}");
    assert!(summary.contains("| 0 Failed |"), "{summary}");
    assert_eq!(driver.leftovers(), Vec::<String>::new());
    assert_eq!(driver.remembered(), Vec::<String>::new());
}

/// The parameters of a VolumeAttributesClass, in a file as the suite wants them.
fn mutable(driver: &Driver) -> String {
    let path = driver.daemon.scratch.join("mutable.yaml");
    std::fs::write(&path, "iops: \"2000\"\nbytesPerSecond: \"104857600\"\n").expect("written");
    path.to_str().expect("text").to_owned()
}

#[test]
fn the_suite_passes_with_mounted_volumes() {
    run("sanity-mount", "mount");
}

#[test]
fn the_suite_passes_with_raw_volumes() {
    run("sanity-block", "block");
}
