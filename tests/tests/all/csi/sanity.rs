//! csi-sanity, the interface's own suite (kubernetes-csi/csi-test v5.4.0), over the whole driver.

use std::path::PathBuf;
use std::time::Duration;

use ashlar_tests::csi::Driver;
use ashlar_tests::daemon::Setup;
use ashlar_tests::tool::Tool;

/// Where scripts/setup.sh puts it, or where somebody else did.
fn suite() -> PathBuf {
    if let Some(given) = std::env::var_os("ASHLAR_TESTS_CSI_SANITY") {
        return PathBuf::from(given);
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("a home directory");
    let program = cache.join("ashlar/csi-sanity-v5.4.0/csi-sanity");
    assert!(
        program.exists(),
        "{} is not there; `scripts/setup.sh test` installs it",
        program.display()
    );
    program
}

fn run(test: &str, access: &str) {
    let mut driver = Driver::prepare(test, Setup::default().store_size("4GiB"));
    driver.set_arguments(&["--max-volumes", "10"]);
    driver.start_driver(&[]);
    let path = |name: &str| driver.root().join(name).to_str().expect("text").to_owned();
    // Only what no capability of ours calls for is left out: snapshots, clones and groups skip themselves.
    let said = Tool::new(suite().to_str().expect("text"))
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
    assert!(summary.contains("0 Failed"), "{summary}");
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
