//! The driver and daemons of a cluster over TCP: certificates, and another daemon when one is gone.

use std::fs;
use std::path::Path;
use std::time::Duration;

use ashlar_tests::cluster::Trio;
use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Plugin, mounted, text};
use ashlar_tests::wait;
use tonic::Code;

use super::SMALL;

const LONG: Duration = Duration::from_secs(60);

fn over_tcp(trio: &Trio, at: usize) -> String {
    format!("tcp:127.0.0.1:{}", trio.nodes[at].admin_port)
}

/// Runs the driver with these certificates, or none; what it says of its daemon's health.
fn probed(
    plugin: &mut Plugin,
    certificates: Option<&Path>,
) -> Result<Option<bool>, (Code, String)> {
    if !plugin.is_dead() {
        plugin.kill_driver();
    }
    match certificates.map(text) {
        Some(directory) => plugin.set_arguments(&["--daemon-certificates", &directory]),
        None => plugin.set_arguments(&[]),
    }
    plugin.start_driver(&[]);
    plugin.probe()
}

#[test]
fn a_cluster_is_asked_over_tcp_with_a_certificate() {
    let trio = Trio::start("csi-tls");
    let [admin, client] = [("driver", &["--role", "admin"][..]), ("reader", &[][..])]
        .map(|(name, more)| trio.nodes[0].client(name, more));
    let mut plugin = Plugin::beside(&trio.nodes[0].daemon, "node-a");
    plugin.ask(&over_tcp(&trio, 0));

    let (code, why) = probed(&mut plugin, None).expect_err("in the clear");
    assert_eq!(code, Code::FailedPrecondition, "{why}");
    assert!(why.contains("--daemon-certificates"), "{why}");
    // A certificate to use volumes with is none to administer with.
    let (code, why) = probed(&mut plugin, Some(&client)).expect_err("the wrong role");
    assert_eq!(code, Code::FailedPrecondition, "{why}");

    assert_eq!(probed(&mut plugin, Some(&admin)), Ok(Some(true)));
    let claim = Claim::new(
        &plugin,
        "secured",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&plugin);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    claim.take_away(&plugin);
    assert_eq!(plugin.leftovers(), Vec::<String>::new());

    trio.nodes[1]
        .daemon
        .admin()
        .run(["cluster", "revoke-client", "driver"]);
    wait::until(LONG, "the driver is shut out", || match plugin.probe() {
        Err((Code::FailedPrecondition, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

#[test]
fn a_controller_goes_on_to_another_daemon_of_the_cluster() {
    let mut trio = Trio::start("csi-doors");
    trio.expect_losses();
    let admin = trio.nodes[0].client("driver", &["--role", "admin"]);
    let mut controller = Plugin::beside(&trio.nodes[2].daemon, "unused");
    controller.ask(&[0, 1].map(|at| over_tcp(&trio, at)).join(","));
    controller.set_arguments(&[
        "--mode",
        "controller",
        "--daemon-certificates",
        &text(&admin),
    ]);
    controller.start_driver(&[]);
    let capability = || mounted("ext4", Mode::SingleNodeWriter);
    let create = |name: &str| {
        wait::until(LONG, "a volume", || {
            let made =
                Claim::of_class(&controller, name, SMALL, capability(), &[("replicas", "2")]);
            made.map_err(|error| format!("{error:?}"))
        })
    };
    let first = create("first");
    trio.nodes[0].daemon.kill();
    let second = create("second");
    for claim in [&first, &second] {
        wait::until(LONG, "it is deleted", || {
            controller
                .delete(&claim.id)
                .map_err(|error| format!("{error:?}"))
        });
    }
    trio.nodes[0].daemon.start();
}
