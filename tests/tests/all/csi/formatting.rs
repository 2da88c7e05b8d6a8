//! A blank volume is formatted once. One that may hold anything is not, whatever the device looks like.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, mounted, raw};
use ashlar_tests::daemon::Setup;
use ashlar_tests::process::Group;
use ashlar_tests::scratch::Scratch;
use ashlar_tests::tool::Tool;
use ashlar_tests::wait;
use tonic::Code;

use super::SMALL;

/// The first two megabytes of a volume, read through its publication.
fn beginning(driver: &Driver, claim: &Claim) -> Vec<u8> {
    let out = driver.daemon.scratch.join("beginning");
    let uri = uri(driver, claim);
    let script = format!(
        "open({:?}, 'wb').write(h.pread(2 << 20, 0))",
        out.to_str().expect("text")
    );
    Tool::new("nbdsh")
        .args(["-u", &uri, "-c", &script])
        .succeed();
    fs::read(out).expect("written")
}

fn uri(driver: &Driver, claim: &Claim) -> String {
    let export = claim.publish_context["export"].replace('@', "%40");
    driver.daemon.uri(&export)
}

fn write(driver: &Driver, claim: &Claim, offset: u64, byte: u8, length: usize) {
    let script = format!("h.pwrite(bytes([{byte}]) * {length}, {offset}); h.flush()");
    Tool::new("nbdsh")
        .args(["-u", &uri(driver, claim), "-c", &script])
        .succeed();
}

/// The UUID of the file system that an image begins with.
fn uuid_of(image: &[u8]) -> &[u8] {
    if image.starts_with(b"XFSB") {
        return &image[32..48];
    }
    assert_eq!(image[1080..1082], [0x53, 0xef], "neither xfs nor ext4");
    &image[1128..1144]
}

#[test]
fn a_blank_volume_is_formatted_once() {
    let driver = Driver::start("csi-blank", Setup::default());
    for (fs_type, size) in [("ext4", SMALL), ("xfs", 320 << 20), ("", SMALL)] {
        let name = format!("blank-{fs_type}x");
        let claim = Claim::new(
            &driver,
            &name,
            size,
            mounted(fs_type, Mode::SingleNodeWriter),
        );
        claim.bring_up(&driver);
        fs::write(claim.target.join("kept"), b"data").expect("written");
        claim.unpublish(&driver).expect("unpublished");
        claim.unstage(&driver).expect("unstaged");
        let first = beginning(&driver, &claim);
        claim.bring_up(&driver);
        assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
        claim.unpublish(&driver).expect("unpublished");
        claim.unstage(&driver).expect("unstaged");
        assert_eq!(first.starts_with(b"XFSB"), fs_type == "xfs");
        assert_eq!(uuid_of(&first), uuid_of(&beginning(&driver, &claim)));
        // Another file system than it has is refused and nothing is touched.
        let other = if fs_type == "xfs" { "ext4" } else { "xfs" };
        let wrong = Claim {
            capability: mounted(other, Mode::SingleNodeWriter),
            publish_context: claim.publish_context.clone(),
            volume_context: claim.volume_context.clone(),
            id: claim.id.clone(),
            staging: claim.staging.clone(),
            target: claim.target.clone(),
        };
        assert!(wrong.stage(&driver).is_err());
        claim.bring_up(&driver);
        assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
        claim.take_away(&driver);
    }
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn a_volume_that_was_written_to_is_never_formatted() {
    let driver = Driver::start("csi-written", Setup::default());
    // Written raw, then asked for with a file system: one block far behind where any signature would be.
    let claim = Claim::new(
        &driver,
        "written",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    write(&driver, &claim, 20 << 20, 7, 4096);
    let (code, why) = claim.stage(&driver).expect_err("refused");
    assert_eq!(code, Code::FailedPrecondition, "{why}");
    assert!(why.contains("not formatted"), "{why}");
    assert!(beginning(&driver, &claim).iter().all(|byte| *byte == 0));
    // Trimmed again it reads as zeros, and still nobody can know.
    let trim = format!("h.trim({SMALL}, 0); h.flush()");
    Tool::new("nbdsh")
        .args(["-u", &uri(&driver, &claim), "-c", &trim])
        .succeed();
    assert_eq!(
        claim.stage(&driver).expect_err("refused").0,
        Code::FailedPrecondition
    );
    assert_eq!(
        driver.leftovers(),
        Vec::<String>::new(),
        "a final refusal leaves nothing attached"
    );
}

/// Writes a whole image to what is published, as a person with the secret name of the publication can.
fn put(driver: &Driver, claim: &Claim, image: &std::path::Path) {
    Tool::new("nbdcopy")
        .args(["--flush", "--destination-is-zero"])
        .arg(image)
        .arg(uri(driver, claim))
        .succeed();
}

/// Staged and killed at a point while its file system is made; then taken from the node and published anew.
fn broken_off(driver: &mut Driver, name: &str, point: &str) -> Claim {
    let capability = mounted("ext4", Mode::SingleNodeWriter);
    let mut claim = Claim::new(driver, name, SMALL, capability);
    driver.kill_driver();
    driver.start_driver(&["--fail-point", point]);
    assert!(claim.stage(driver).is_err());
    driver.wait_killed(Duration::from_secs(60));
    driver.start_driver(&[]);
    claim.controller_unpublish(driver).expect("taken");
    claim.publish_context = HashMap::new();
    // By its name it can be read and not written.
    let by_name = driver.daemon.uri(&claim.id);
    let script = "assert h.is_read_only(); h.pread(4096, 0)";
    Tool::new("nbdsh")
        .args(["-u", &by_name, "-c", script])
        .succeed();
    let script = "h.set_strict_mode(0); h.pwrite(bytes(4096), 0)";
    let written = Tool::new("nbdsh")
        .args(["-u", &by_name, "-c", script])
        .run();
    assert!(!written.status.success(), "{written:?}");
    claim.publish_context = claim.controller_publish(driver, false).expect("published");
    claim
}

#[test]
fn what_somebody_made_after_a_format_that_broke_off_is_never_thrown_away() {
    let mut driver = Driver::start("csi-begun", Setup::default());
    let scratch = driver.daemon.scratch.path().to_owned();
    let tree = scratch.join("tree");
    fs::create_dir(&tree).expect("made");
    fs::write(tree.join("precious"), b"data").expect("written");
    let image = scratch.join("image");
    for (name, program, options) in [
        ("same", "mkfs.ext4", vec!["-q".into(), "-d".into(), tree]),
        ("swap", "mkswap", Vec::new()),
    ] {
        let claim = broken_off(&mut driver, name, "format-intended");
        let file = fs::File::create(&image).expect("made");
        file.set_len(SMALL as u64).expect("sized");
        Tool::new(program).args(options).arg(&image).succeed();
        put(&driver, &claim, &image);
        let before = beginning(&driver, &claim);
        let (code, why) = claim.stage(&driver).expect_err("somebody's");
        assert_eq!(code, Code::FailedPrecondition, "{name}: {why}");
        assert!(why.contains("not touched") && why.contains("copy"), "{why}");
        assert!(
            beginning(&driver, &claim) == before,
            "{name}: it was written to"
        );
        assert_eq!(driver.leftovers(), Vec::<String>::new());
    }
    // The file system of ours was whole, and somebody used it before the driver came again.
    let claim = broken_off(&mut driver, "whole", "format-made");
    Tool::new("nbdcopy")
        .arg(uri(&driver, &claim))
        .arg(&image)
        .succeed();
    let uuid = uuid_of(&fs::read(&image).expect("read")).to_vec();
    let point = scratch.join("point");
    fs::create_dir(&point).expect("made");
    Tool::new("mount")
        .args(["-o", "loop"])
        .arg(&image)
        .arg(&point)
        .succeed();
    fs::write(point.join("precious"), b"data").expect("written");
    Tool::new("umount").arg(&point).succeed();
    put(&driver, &claim, &image);
    claim.bring_up(&driver);
    let kept = fs::read(claim.target.join("precious"));
    assert_eq!(kept.expect("it was thrown away"), b"data");
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    assert_eq!(uuid_of(&beginning(&driver, &claim)), uuid);
    // What is only half there is made again.
    let claim = broken_off(&mut driver, "half", "format-made");
    write(&driver, &claim, 4 << 10, 0, 256 << 10);
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

#[test]
fn a_damaged_superblock_is_an_error_and_no_reason_to_format() {
    let driver = Driver::start("csi-damaged", Setup::default());
    for (name, garbage) in [("zeroed", 0), ("garbage", 0xa5)] {
        let claim = Claim::new(
            &driver,
            name,
            SMALL,
            mounted("ext4", Mode::SingleNodeWriter),
        );
        claim.bring_up(&driver);
        fs::write(claim.target.join("kept"), b"data").expect("written");
        claim.unpublish(&driver).expect("unpublished");
        claim.unstage(&driver).expect("unstaged");
        let before = beginning(&driver, &claim);
        write(&driver, &claim, 0, garbage, 4096);
        let (code, why) = claim.stage(&driver).expect_err("refused");
        assert_eq!(code, Code::Internal, "{why}");
        assert!(why.contains("NOT formatted"), "{why}");
        let after = beginning(&driver, &claim);
        assert!(after[4096..] == before[4096..], "nothing else was touched");
        // Repaired by a person, it is whole again.
        let saved = driver.daemon.scratch.join("saved");
        fs::write(&saved, &before[..4096]).expect("written");
        let script = format!(
            "h.pwrite(open({:?}, 'rb').read(), 0); h.flush()",
            saved.to_str().expect("text")
        );
        Tool::new("nbdsh")
            .args(["-u", &uri(&driver, &claim), "-c", &script])
            .succeed();
        claim.bring_up(&driver);
        assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
        claim.take_away(&driver);
    }
}

#[test]
fn a_device_that_answers_errors_is_never_formatted() {
    let scratch = Scratch::new("csi-eio-when");
    let moment = scratch.join("moment");
    let mut setup = Setup::default();
    setup.set_fault(Some(&format!(
        "read:count=all,errno=EIO,when={}",
        moment.display()
    )));
    let mut driver = Driver::start("csi-eio", setup);
    driver
        .daemon
        .log
        .expect("faults are being injected into disk operations");
    driver.daemon.log.expect("injecting a fault");
    driver.daemon.log.expect("the device failed a read");
    let claim = Claim::new(
        &driver,
        "eio",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), vec![3; 1 << 20]).expect("written");
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    let before = beginning(&driver, &claim);
    // After a restart reads come from the disk and not from memory.
    driver.daemon.stop();
    driver.daemon.start();
    fs::write(&moment, b"").expect("made");
    let (code, why) = claim.stage(&driver).expect_err("refused");
    assert_eq!(code, Code::Internal, "{why}");
    assert!(why.contains("NOT formatted"), "{why}");
    fs::remove_file(&moment).expect("removed");
    assert!(beginning(&driver, &claim) == before, "nothing was touched");
    claim.bring_up(&driver);
    assert_eq!(
        fs::read(claim.target.join("kept")).expect("read"),
        vec![3; 1 << 20]
    );
    claim.take_away(&driver);
}

/// A server that serves one disk under every name, and says what it is told to say.
struct Impostor {
    disk: PathBuf,
    address: String,
    server: Group,
}

impl Impostor {
    fn start(driver: &Driver, name: &str, contents: &[u8], size: u64, more: &[&str]) -> Impostor {
        let disk = driver.daemon.scratch.join(&format!("{name}.disk"));
        let socket = driver.daemon.scratch.join(&format!("{name}.sock"));
        let file = fs::File::create_new(&disk).expect("made");
        file.set_len(size).expect("sized");
        file.write_all_at(contents, 0).expect("written");
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "-U"]);
        command.arg(&socket).args(["--filter=exportname"]);
        let (filters, settings): (Vec<&&str>, Vec<&&str>) =
            more.iter().partition(|each| each.starts_with("--"));
        command.args(filters).arg("file").arg(&disk).args(settings);
        let server = Group::spawn(&mut command).expect("nbdkit starts");
        wait::until(Duration::from_secs(30), "nbdkit serves", || {
            UnixStream::connect(&socket).map_err(|error| error.to_string())
        });
        Impostor {
            disk,
            address: format!("unix:{}", socket.display()),
            server,
        }
    }

    /// Publishes a claim by a context that leads here.
    fn lure(&self, claim: &mut Claim) {
        let servers = self.address.clone();
        claim.publish_context.insert("servers".to_owned(), servers);
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.server.kill();
    }
}

/// Its name, what is on it, its size, what nbdkit is told, and how the volume is refused.
type Disk<'a> = (&'a str, &'a [u8], u64, &'a [&'a str], Code, &'a str);

/// Leads a claim to such a disk: it is refused, the disk is as it was, and nothing stays attached.
fn refused(driver: &Driver, claim: &mut Claim, disk: Disk<'_>) {
    let (name, contents, size, more, code, words) = disk;
    let impostor = Impostor::start(driver, name, contents, size, more);
    let before = fs::read(&impostor.disk).expect("read");
    impostor.lure(claim);
    let (found, why) = claim.stage(driver).expect_err(name);
    assert!(
        found == code && why.contains(words),
        "{name}: {found:?} {why}"
    );
    assert!(
        fs::read(&impostor.disk).expect("read") == before,
        "{name}: it was written to"
    );
    assert_eq!(driver.leftovers(), Vec::<String>::new(), "{name}");
}

#[test]
fn a_wrong_device_is_never_formatted() {
    let driver = Driver::start("csi-impostor", Setup::default());
    let capability = || mounted("ext4", Mode::SingleNodeWriter);
    let mut claim = Claim::new(&driver, "victim", SMALL, capability());
    let own = claim.publish_context.clone();
    let says = format!("exportdesc=fixed:Ashlar volume {}", claim.id);
    let is_wrong = format!("exportdesc=fixed:Ashlar volume {}", uuid::Uuid::nil());
    let garbage: Vec<u8> = (0..64 << 10).map(|n| (n * 7 + n / 251) as u8).collect();
    let ext4 = {
        let image = driver.daemon.scratch.join("image");
        let file = fs::File::create_new(&image).expect("made");
        file.set_len(SMALL as u64).expect("sized");
        Tool::new("mkfs.ext4").arg("-q").arg(&image).succeed();
        fs::read(&image).expect("read")
    };
    let size = SMALL as u64;
    let cases: [Disk<'_>; 8] = [
        (
            "silent",
            b"",
            size,
            &[],
            Code::FailedPrecondition,
            "calls it",
        ),
        (
            "other",
            b"",
            size,
            &[&is_wrong],
            Code::FailedPrecondition,
            "calls it",
        ),
        (
            "short",
            b"",
            size / 2,
            &[&says],
            Code::Internal,
            "not touched",
        ),
        (
            "long",
            b"",
            size * 2,
            &[&says],
            Code::Internal,
            "not touched",
        ),
        (
            "occupied",
            &ext4,
            size,
            &[&says],
            Code::FailedPrecondition,
            "wrong device",
        ),
        (
            "raw",
            &garbage,
            size,
            &[&says],
            Code::FailedPrecondition,
            "wrong device",
        ),
        (
            "unreadable",
            &garbage,
            size,
            &[
                "--filter=error",
                &says,
                "error-pread=EIO",
                "error-pread-rate=100%",
            ],
            Code::FailedPrecondition,
            "cannot be read",
        ),
        (
            "half-readable",
            b"",
            size,
            // The first reads go well, as of a disk that is dying.
            &[
                "--filter=error",
                &says,
                "error-pread=EIO",
                "error-pread-rate=50%",
            ],
            Code::FailedPrecondition,
            "cannot be read",
        ),
    ];
    for disk in cases {
        refused(&driver, &mut claim, disk);
        claim.publish_context = own.clone();
    }
    // Nothing was announced for it: it is formatted when it is really there, ...
    claim.publish_context = own.clone();
    claim.bring_up(&driver);
    fs::write(claim.target.join("kept"), b"data").expect("written");
    claim.unpublish(&driver).expect("unpublished");
    claim.unstage(&driver).expect("unstaged");
    let made = beginning(&driver, &claim);
    let uuid = uuid_of(&made);
    // ... and with a file system of its own it takes neither a blank disk nor one with another for damage to mend.
    let says = [says.as_str()];
    let cases: [Disk<'_>; 2] = [
        ("blank", b"", size, &says, Code::Internal, "NOT formatted"),
        ("another", &ext4, size, &says, Code::Internal, "not touched"),
    ];
    for disk in cases {
        refused(&driver, &mut claim, disk);
        claim.publish_context = own.clone();
    }
    claim.publish_context = own;
    claim.bring_up(&driver);
    assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
    assert_eq!(uuid_of(&beginning(&driver, &claim)), uuid);
    claim.take_away(&driver);
    assert_eq!(driver.leftovers(), Vec::<String>::new());
}

/// What lies at the place of a device that an earlier run of the driver had begun with is not taken for it.
#[test]
fn a_device_that_somebody_put_in_its_place_is_never_formatted() {
    let mut driver = Driver::start("csi-decoy", Setup::default());
    for point in ["attach-done", "format-intended"] {
        let capability = mounted("ext4", Mode::SingleNodeWriter);
        let claim = Claim::new(&driver, point, SMALL, capability);
        driver.kill_driver();
        driver.start_driver(&["--fail-point", point]);
        assert!(claim.stage(&driver).is_err());
        driver.wait_killed(Duration::from_secs(60));
        // The device that it had attached goes, and another one of the same size is there under the same path.
        driver.clear_devices();
        let place = driver.state_dir().join("fuse").join(&claim.id);
        let decoy = place.join("nbd");
        fs::create_dir_all(&place).expect("a directory");
        let file = fs::File::create_new(&decoy).expect("made");
        file.set_len(SMALL as u64).expect("sized");
        // Nothing that a look at its ends would show.
        file.write_all_at(&[9; 4096], 16 << 20).expect("written");
        let before = fs::read(&decoy).expect("read");
        let device = Tool::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(&decoy)
            .succeed();
        driver.start_driver(&[]);
        claim.bring_up(&driver);
        fs::write(claim.target.join("kept"), b"data").expect("written");
        claim.unpublish(&driver).expect("unpublished");
        claim.unstage(&driver).expect("unstaged");
        assert!(
            fs::read(&decoy).expect("read") == before,
            "{point}: {device} was written to"
        );
        fs::remove_file(&decoy).expect("removed");
        claim.bring_up(&driver);
        assert_eq!(fs::read(claim.target.join("kept")).expect("read"), b"data");
        claim.take_away(&driver);
        assert_eq!(driver.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn an_export_of_another_volume_is_refused() {
    let driver = Driver::start("csi-wrong", Setup::default());
    let mut claim = Claim::new(
        &driver,
        "one",
        SMALL,
        mounted("ext4", Mode::SingleNodeWriter),
    );
    let other = Claim::new(&driver, "other", SMALL, raw(Mode::SingleNodeWriter));
    let own = claim.publish_context.clone();
    claim.publish_context = other.publish_context.clone();
    assert_eq!(
        claim.stage(&driver).expect_err("refused").0,
        Code::InvalidArgument
    );
    // The own id with the other's secret.
    let secret = other.publish_context["export"]
        .split('@')
        .nth(1)
        .expect("a secret");
    claim.publish_context = own.clone();
    claim
        .publish_context
        .insert("export".to_owned(), format!("{}@{secret}", claim.id));
    let (refused, why) = claim.stage(&driver).expect_err("refused");
    assert_eq!(refused, Code::FailedPrecondition, "{why}");
    claim.publish_context = own;
    claim.bring_up(&driver);
    claim.take_away(&driver);
}
