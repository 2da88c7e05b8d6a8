//! What a node tells of a volume that something is wrong with, and how that is mended.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ashlar_tests::csi::csi::node_client::NodeClient;
use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, csi, mounted};
use ashlar_tests::daemon::Setup;
use ashlar_tests::tool::Tool;
use tonic::Code;

use super::{SMALL, code};

/// The kernel's name of the device of what is mounted at a path.
fn device_at(path: &Path) -> String {
    let device = fs::metadata(path).expect("mounted").dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).expect("a device");
    let name = link.file_name().expect("a name");
    name.to_string_lossy().into_owned()
}

/// Whoever has it keeps it and is told; once nobody does, it is checked and mounted again.
#[test]
fn a_file_system_that_gave_up_is_told_and_mounted_anew() {
    let mut driver = Driver::prepare("csi-gave-up", Setup::default());
    driver.set_arguments(&["--spec", "1.13"]);
    driver.start_driver(&[]);
    let other = driver.root().join("other");
    for (kind, size) in [("ext4", SMALL), ("xfs", 320 << 20)] {
        let claim = Claim::new(
            &driver,
            kind,
            size,
            mounted(kind, Mode::SingleNodeMultiWriter),
        );
        claim.bring_up(&driver);
        let kept = claim.target.join("kept");
        fs::write(&kept, b"data").expect("written");
        fs::File::open(&kept)
            .and_then(|file| file.sync_all())
            .expect("durable");
        assert_eq!(driver.node_health(&claim.id), Ok(vec![]));
        if kind == "ext4" {
            // An error, as of metadata that make no sense.
            let device = device_at(&claim.target);
            let trigger = format!("/sys/fs/ext4/{device}/trigger_fs_error");
            fs::write(trigger, "an error").expect("triggered");
        } else {
            let xfs_io = Tool::new("xfs_io").args(["-x", "-c", "shutdown"]);
            xfs_io.arg(&claim.target).succeed();
        }
        assert!(
            fs::write(claim.target.join("more"), b"x").is_err(),
            "{kind}"
        );
        assert_eq!(
            driver.node_health(&claim.id),
            Ok(vec!["FilesystemReadOnly".to_owned()])
        );
        claim.publish(&driver).expect("it still is");
        assert_eq!(code(claim.stage(&driver)), Code::FailedPrecondition);
        let second = claim.publish_at(&driver, &other, false);
        assert_eq!(code(second), Code::Internal, "{kind}");

        claim.unpublish(&driver).expect("unpublished");
        claim.publish(&driver).expect("staged anew and published");
        assert_eq!(driver.node_health(&claim.id), Ok(vec![]));
        assert_eq!(fs::read(&kept).expect("read"), b"data");
        fs::write(claim.target.join("more"), b"x").expect("written");
        claim.take_away(&driver);
    }
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn health_is_told_as_it_is() {
    let mut driver = Driver::prepare("csi-health", Setup::default());
    driver.set_arguments(&["--spec", "1.13", "--unstage-patience", "1"]);
    driver.start_driver(&[]);
    let claim = Claim::new(
        &driver,
        "health",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&driver);
    let health = |driver: &Driver| driver.node_health(&claim.id).expect("answered");
    let storage = |driver: &Driver| {
        let answer = driver.call(|channel| async move {
            NodeClient::new(channel)
                .node_get_storage_health(csi::NodeGetStorageHealthRequest::default())
                .await
        });
        let health = answer.expect("answered").backend_health;
        health
            .into_iter()
            .map(|each| each.reason)
            .collect::<Vec<_>>()
    };
    let can = driver.call(|channel| async move {
        NodeClient::new(channel)
            .node_get_capabilities(csi::NodeGetCapabilitiesRequest {})
            .await
    });
    assert_eq!(can.expect("answered").capabilities.len(), 6);
    assert_eq!(health(&driver), Vec::<String>::new());
    assert_eq!(storage(&driver), Vec::<String>::new());
    driver.daemon.kill();
    assert!(health(&driver).contains(&"DeviceNotAnswering".to_owned()));
    assert_eq!(storage(&driver), ["DaemonUnreachable"]);
    driver.daemon.start();
    claim.take_away(&driver);
}
