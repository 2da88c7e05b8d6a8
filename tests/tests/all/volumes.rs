//! Volumes by the command line, and what NBD clients see of it.

use std::os::unix::fs::PermissionsExt;

use ashlar_tests::daemon::Setup;
use ashlar_tests::nbd::{self, Wishes, wire};

#[test]
fn the_life_of_a_volume() {
    let mut daemon = Setup::default().start("volumes");
    let admin = daemon.admin();
    let created = admin.json(["volume", "create", "first", "--size", "10MiB"]);
    let id = created["id"]
        .as_str()
        .unwrap_or_else(|| panic!("no id in {created}"))
        .to_owned();
    let list = admin.json(["volume", "list"]).to_string();
    assert!(list.contains("\"first\"") && list.contains(&id), "{list}");
    assert_eq!(daemon.open("first", Wishes::SIMPLE).size_bytes, 10 << 20);

    // Renamed while connected: the connection stays, the old name is gone, the id is the same.
    let mut client = daemon.open("first", Wishes::SIMPLE);
    client.write(0, b"kept").unwrap();
    admin.run(["volume", "rename", "first", "second"]);
    assert_eq!(client.read(0, 4).unwrap(), b"kept");
    assert!(daemon.try_open("first", Wishes::SIMPLE).is_err());
    assert_eq!(admin.json(["volume", "show", "second"])["id"], id.as_str());

    // Grown while connected: new connections see it, and so does the old one where it asks.
    admin.run(["volume", "resize", "second", "--size", "20MiB"]);
    let mut grown = daemon.open("second", Wishes::STRUCTURED);
    assert_eq!(grown.size_bytes, 20 << 20);
    grown.write((20 << 20) - 4096, &[5; 4096]).unwrap();
    assert_eq!(client.read(0, 4).unwrap(), b"kept");
    let smaller = admin.refused(["volume", "resize", "second", "--size", "1MiB"]);
    assert!(
        smaller.to_lowercase().contains("shrink") || smaller.to_lowercase().contains("small"),
        "{smaller}"
    );

    // Not deleted while in use, and the message says why.
    let busy = admin.refused(["volume", "delete", "second", "--yes"]);
    assert!(busy.contains("use") || busy.contains("connect"), "{busy}");
    client.read(0, 4).unwrap();
    client.disconnect().unwrap();
    grown.disconnect().unwrap();

    // All of it survives kill -9.
    daemon.kill();
    daemon.start();
    let admin = daemon.admin();
    assert_eq!(admin.json(["volume", "show", &id])["name"], "second");
    let mut client = daemon.open("second", Wishes::SIMPLE);
    assert_eq!(client.read((20 << 20) - 4096, 4096).unwrap(), [5; 4096]);
    client.disconnect().unwrap();
    admin.run(["volume", "delete", "second", "--yes"]);
    assert!(daemon.try_open("second", Wishes::SIMPLE).is_err());

    // A new volume of the old name is empty.
    daemon.create("second", "20MiB");
    let mut empty = daemon.open("second", Wishes::SIMPLE);
    assert!(
        empty
            .read(0, 1 << 20)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0),
        "data of a deleted volume is seen"
    );
    assert_eq!(empty.read((20 << 20) - 4096, 4096).unwrap(), [0; 4096]);
    empty.disconnect().unwrap();
    daemon.stop();
}

#[test]
fn names_and_sizes_are_checked() {
    let daemon = Setup::default().start("names");
    let admin = daemon.admin();
    admin.run(["volume", "create", "taken", "--size", "1MiB"]);
    let taken = admin.refused(["volume", "create", "taken", "--size", "1MiB"]);
    assert!(taken.contains("is taken by volume"), "{taken}");
    let too_long = "n".repeat(64);
    let bad = [
        "",
        "UPPER",
        "with space",
        "../up",
        "a/b",
        "-dash",
        ".",
        "..",
        &too_long,
        "new\nline",
        "naïve",
    ];
    for name in bad {
        let said = admin.refused(["volume", "create", "--size", "1MiB", "--", name]);
        assert!(
            !said.trim().is_empty() && !said.contains("panicked"),
            "{name:?}: {said}"
        );
    }
    // A name that is some volume's id would make exports ambiguous.
    let id = admin.json(["volume", "show", "taken"])["id"]
        .as_str()
        .unwrap()
        .to_owned();
    admin.refused(["volume", "create", &id, "--size", "1MiB"]);
    admin.refused(["volume", "rename", "taken", "Bad Name"]);
    for size in ["0", "-1", "lots", "1.5.2GiB", "99999999999999999999GiB"] {
        admin.refused(["volume", "create", "sized", &format!("--size={size}")]);
    }
    let rounded = admin.try_run(["volume", "create", "odd", "--size", "1000001"]);
    assert!(rounded.status.success(), "{rounded}");
    let said = format!("{}{}", rounded.stdout, rounded.stderr);
    assert!(
        said.contains("round"),
        "it does not say that it rounded up: {said}"
    );
    assert_eq!(daemon.open("odd", Wishes::SIMPLE).size_bytes, 1_003_520);
    let missing = admin.refused(["volume", "show", "no-such"]);
    assert!(missing.contains("no-such"), "{missing}");
}

#[test]
fn read_only_can_be_set_and_taken_back() {
    let daemon = Setup::default().start("set-ro");
    let admin = daemon.admin();
    daemon.create("disk", "1MiB");
    let mut client = daemon.open("disk", Wishes::SIMPLE);
    client.write(0, b"before").unwrap();
    client.disconnect().unwrap();
    admin.run(["volume", "set", "disk", "--read-only=true"]);
    let mut client = daemon.open("disk", Wishes::SIMPLE);
    assert_ne!(client.flags & wire::TRANSMIT_READ_ONLY, 0);
    assert_eq!(client.read(0, 6).unwrap(), b"before");
    assert_eq!(
        client.write(0, b"after!").unwrap_err().errno(),
        Some(wire::EPERM)
    );
    client.disconnect().unwrap();
    admin.run(["volume", "set", "disk", "--read-only=false"]);
    daemon
        .open("disk", Wishes::SIMPLE)
        .write(0, b"after!")
        .unwrap();
}

#[test]
fn what_is_printed_can_be_used() {
    let daemon = Setup::default().start("printed");
    let admin = daemon.admin();
    daemon.create("disk", "64MiB");
    let shown = admin.run(["volume", "show", "disk"]);
    for needed in ["nbd-client", "qemu", "fio", "disk"] {
        assert!(shown.contains(needed), "no {needed} in\n{shown}");
    }
    let socket = daemon.data_dir().join("nbd.sock");
    assert!(
        shown.contains(socket.to_str().unwrap()),
        "the socket is missing in\n{shown}"
    );
    let status = admin.json(["status"]).to_string();
    assert!(status.contains("0.1.0"), "{status}");
    let yaml = admin.run(["volume", "list", "-o", "yaml"]);
    assert!(yaml.contains("disk"), "{yaml}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(admin.run(["completions", shell]).contains("ashlar"));
    }
    admin.run(["top", "--once"]);
    for path in [socket, daemon.data_dir().join("admin.sock")] {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
    let mut client = daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 8192]).unwrap();
    client.read(0, 4096).unwrap();
    client.flush().unwrap();
    assert!(admin.json(["connections"]).to_string().contains("disk"));
    let metrics = daemon.metrics();
    let families = [
        "operations",
        "bytes",
        "latency",
        "inflight",
        "store_capacity",
        "cleaned",
        "amplification",
        "checkpoint",
        "opening",
        "checksum_errors",
        "connections",
    ];
    for family in families {
        assert!(
            metrics
                .samples
                .iter()
                .any(|sample| sample.name.contains(family)),
            "no {family} in\n{}",
            metrics.text
        );
    }
    assert!(
        metrics
            .samples
            .iter()
            .all(|sample| sample.name.starts_with("ashlar_") || sample.name.starts_with("process_")),
        "{}",
        metrics.text
    );
    assert!(nbd::open(&daemon.address(), "disk", Wishes::EXTENDED).is_ok());
}
