//! csi-sanity, the interface's own suite (kubernetes-csi/csi-test v5.4.0), over the whole driver.

use std::time::Duration;

use ashlar_tests::csi::Driver;
use ashlar_tests::daemon::Setup;
use ashlar_tests::suites::{self, CsiSanity};
use ashlar_tests::tool::Tool;

fn run(test: &str, access: &str) {
    let mut driver = Driver::prepare(test, Setup::default().store_size("4GiB"));
    driver.set_arguments(&["--max-volumes", "10"]);
    driver.start_driver(&[]);
    let path = |name: &str| driver.root().join(name).to_str().expect("text").to_owned();
    let mutable = driver.daemon.scratch.join("mutable.yaml");
    std::fs::write(&mutable, CsiSanity::MUTABLE).expect("written");
    let suite = CsiSanity {
        socket: driver.socket().to_str().expect("text"),
        mount: &path("mount"),
        staging: &path("staging"),
        access,
        mutable: mutable.to_str().expect("text"),
    };
    let summary = suite.pass(|arguments| {
        Tool::new(suites::csi_sanity().to_str().expect("text"))
            .args(arguments)
            .limit(Duration::from_secs(1300))
            .run()
            .to_string()
    });
    println!("{summary}");
    assert_eq!(driver.leftovers(), Vec::<String>::new());
    assert_eq!(driver.remembered(), Vec::<String>::new());
}

#[test]
fn the_suite_passes_with_mounted_volumes() {
    run("sanity-mount", "mount");
}

#[test]
fn the_suite_passes_with_raw_volumes() {
    run("sanity-block", "block");
}
