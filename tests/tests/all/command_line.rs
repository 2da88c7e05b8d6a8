//! The `ashlar` program against a real daemon: what it prints, what it refuses and with which exit code.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use ashlar_tests::admin::{Admin, offline};
use ashlar_tests::daemon::{Daemon, Setup, binary};
use ashlar_tests::nbd::Wishes;
use ashlar_tests::tool::{Finished, Tool};
use ashlar_tests::wait;
use serde_json::Value;

fn start(test: &str) -> (Daemon, Admin) {
    let daemon = Setup::default().start(test);
    let admin = daemon.admin();
    (daemon, admin)
}

/// Demands an exit code and words on stderr.
fn expect(finished: &Finished, code: i32, words: &[&str]) {
    assert_eq!(finished.status.code(), Some(code), "{finished}");
    for word in words {
        assert!(
            finished.stderr.contains(word),
            "no {word:?} in what it said\n{finished}"
        );
    }
}

/// Runs a line that a person would paste into a shell, in a directory.
fn paste(line: &str, directory: &Path) -> Finished {
    Tool::new("sh")
        .args(["-c", line])
        .directory(directory)
        .limit(Duration::from_secs(60))
        .run()
}

#[test]
fn the_life_of_a_volume() {
    let (_daemon, admin) = start("cli-life");
    assert_eq!(admin.json(["volume", "list"]), Value::Array(vec![]));

    let created = admin.json([
        "volume",
        "create",
        "data",
        "--size",
        "16MiB",
        "--write-through",
    ]);
    assert_eq!(created["name"], "data");
    assert_eq!(created["size_bytes"], 16 << 20);
    assert_eq!(created["write_through"], true);
    let id = created["id"].as_str().expect("an id").to_owned();

    assert_eq!(admin.json(["volume", "show", &id])["name"], "data");
    assert_eq!(
        admin.json(["volume", "rename", "data", "archive"])["id"],
        id.as_str()
    );
    assert_eq!(
        admin.json(["volume", "set", "archive", "--write-through=false"])["write_through"],
        false
    );
    let grown = admin.json(["volume", "resize", "archive", "--size", "+16MiB"]);
    assert_eq!(
        (&grown["previous_size_bytes"], &grown["size_bytes"]),
        (&Value::from(16 << 20), &Value::from(32 << 20))
    );

    let table = admin.run(["volume", "list"]);
    assert!(
        table
            .lines()
            .any(|line| line.starts_with("archive") && line.contains("32 MiB")),
        "{table}"
    );
    let yaml = admin.run(["volume", "show", "archive", "-o", "yaml"]);
    assert!(
        yaml.contains(&format!("id: {id}\n")) && yaml.contains("size_bytes: 33554432\n"),
        "{yaml}"
    );

    assert_eq!(
        admin.json(["volume", "delete", "archive"])[0]["id"],
        id.as_str()
    );
    assert_eq!(admin.json(["volume", "list"]), Value::Array(vec![]));
}

#[test]
fn refusals_say_what_to_do_and_have_their_exit_codes() {
    let (daemon, admin) = start("cli-refusals");
    admin.run(["volume", "create", "data", "--size", "16MiB"]);

    expect(
        &admin.try_run(["volume", "create", "data", "--size", "1GiB"]),
        4,
        &["data"],
    );
    expect(
        &admin.try_run(["volume", "create", "Data", "--size", "1GiB"]),
        2,
        &["lower-case"],
    );
    expect(
        &admin.try_run(["volume", "create", "more", "--size", "10X"]),
        2,
        &["\"X\" is not a unit"],
    );
    expect(
        &admin.try_run(["volume", "create", "more", "--size", "0"]),
        2,
        &["size"],
    );
    expect(
        &admin.try_run(["volume", "show", "nothing"]),
        3,
        &["nothing"],
    );
    expect(
        &admin.try_run(["volume", "delete", "nothing"]),
        3,
        &["nothing"],
    );
    expect(
        &admin.try_run(["volume", "resize", "data", "--size", "8MiB"]),
        4,
        &[],
    );
    expect(
        &admin.try_run(["store", "scrub", "/nonexistent"]),
        3,
        &["ashlar store list"],
    );

    let connection = daemon.open("data", Wishes::default());
    expect(&admin.try_run(["volume", "delete", "data"]), 4, &["data"]);
    assert_eq!(
        admin.json(["connections", "data"]).as_array().map(Vec::len),
        Some(1)
    );
    drop(connection);

    let nowhere = Admin::new(&daemon.scratch.join("nowhere.sock"));
    expect(
        &nowhere.try_run(["status"]),
        5,
        &["no such socket", "ashlard"],
    );
}

#[test]
fn a_size_between_blocks_is_rounded_up_and_said() {
    let (_daemon, admin) = start("cli-rounding");
    let finished = admin.try_run([
        "volume", "create", "odd", "--size", "10000000", "-o", "json",
    ]);
    assert!(
        finished.stderr.contains("rounded up to 10002432 bytes"),
        "{finished}"
    );
    let created: Value = serde_json::from_str(&finished.success()).expect("JSON");
    assert_eq!(created["size_bytes"], 10_002_432);
}

#[test]
fn the_lines_of_volume_show_work() {
    let (daemon, admin) = start("cli-attach");
    admin.run(["volume", "create", "data", "--size", "16MiB"]);
    let shown = admin.json(["volume", "show", "data"]);
    let line = |name: &str| shown["attach"][name].as_str().expect(name).to_owned();
    let directory = daemon.scratch.join("paste");
    std::fs::create_dir(&directory).expect("a directory");
    std::fs::write(directory.join("image.raw"), vec![7; 16 << 20]).expect("an image");

    assert!(
        paste(&line("nbdinfo"), &directory)
            .success()
            .contains("export-size: 16777216")
    );
    assert!(
        paste(&line("qemu_img"), &directory)
            .success()
            .contains("16 MiB")
    );
    paste(&line("nbdcopy"), &directory).success();
    paste(
        &line("fio").replace("--runtime=10", "--runtime=1"),
        &directory,
    )
    .success();
    // No kernel device here; what the client would connect to is what the line names.
    let socket = daemon.data_dir().join("nbd.sock");
    assert!(line("nbd_client").contains(&format!("-unix {} -name data ", socket.display())));

    let drive = line("qemu_system");
    let options = drive
        .split("driver=")
        .nth(1)
        .expect("a drive")
        .replace(",if=virtio,cache=none", "");
    let read = Tool::new("qemu-io")
        .args([
            "--image-opts",
            &format!("driver={options}"),
            "-c",
            "read -P 7 0 16M",
        ])
        .run();
    assert!(read.success().contains("16 MiB"));
}

#[test]
fn status_stores_and_top_are_answered() {
    let (daemon, admin) = start("cli-status");
    admin.run(["volume", "create", "data", "--size", "16MiB"]);
    let status = admin.json(["status"]);
    assert_eq!(status["state"], "ready");
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(status["volumes"], 1);
    let nbd = format!("unix:{}", daemon.data_dir().join("nbd.sock").display());
    let listeners = status["listeners"].as_array().expect("a list");
    assert!(
        listeners
            .iter()
            .any(|l| l["kind"] == "nbd" && l["address"] == nbd.as_str()),
        "{listeners:?}"
    );

    let stores = admin.json(["store", "list"]);
    assert_eq!(stores[0]["state"], "open");
    assert!(
        stores[0]["available_bytes"].as_u64() > Some(0)
            && stores[0]["id"] == status["stores"][0]["id"]
    );

    assert!(admin.json(["store", "checkpoint"])["stores"] == 1);
    let scrubbed = admin.json(["store", "scrub", "--rate", "1GiB"]);
    assert_eq!(scrubbed["stores"][0]["complete"], true);
    assert_eq!(scrubbed["stores"][0]["damages"], Value::Array(vec![]));

    let sample = admin.json(["top", "--once", "--interval", "0.1"]);
    assert_eq!(sample["volumes"][0]["name"], "data");
    assert!(
        admin
            .run(["top", "--once", "--interval", "0.1"])
            .contains("VOLUME")
    );
}

#[test]
fn a_reader_that_goes_away_is_not_an_error() {
    let program = binary("ashlar");
    let line = format!(
        "set -o pipefail; {} completions bash | head -c 1 >/dev/null",
        program.display()
    );
    let finished = Tool::new("bash").args(["-c", &line]).run();
    assert!(!finished.stderr.contains("panicked"), "{finished}");
}

#[test]
fn completions_are_written_for_every_shell() {
    let program = binary("ashlar");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = Tool::new(program.to_str().expect("UTF-8"))
            .args(["completions", shell])
            .succeed();
        assert!(
            script.contains("ashlar") && script.contains("write-through"),
            "{shell}"
        );
    }
}

#[test]
fn a_scrub_that_is_broken_off_is_no_success() {
    let (daemon, admin) = start("cli-scrub");
    admin.run(["volume", "create", "data", "--size", "16MiB"]);
    let mut client = daemon.open("data", Wishes::SIMPLE);
    // Of two leaves: the second waits for the rate.
    for block in 400..600_u64 {
        client.write(block * 4096, &[7; 4096]).expect("writes");
    }
    let slow = admin.tool(["store", "scrub", "--rate", "64KiB"]).start();
    wait::until(
        Duration::from_secs(20),
        "a scrub that runs",
        || match daemon.metrics().sum("ashlar_store_scrubbing", &[]) {
            Some(1.0) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    let whole = admin.run(["store", "scrub", "--rate", "1GiB"]);
    assert!(whole.ends_with("verified, no damage\n"), "{whole}");
    let said = slow.finish().failure();
    assert!(said.contains("another one of the same store"), "{said}");
    assert!(!said.contains("no damage\n"), "{said}");
}

#[test]
fn a_flipped_bit_is_found_without_a_daemon() {
    let (mut daemon, admin) = start("cli-check");
    admin.run(["volume", "create", "data", "--size", "16MiB"]);
    let mut client = daemon.open("data", Wishes::SIMPLE);
    for block in 0..64_u8 {
        client
            .write(u64::from(block) * 4096, &[block + 1; 4096])
            .expect("writes");
    }
    client.flush().expect("flushes");
    let store = daemon.store().into_os_string();
    let open = offline(["store".as_ref(), "check".as_ref(), store.as_os_str()]);
    assert!(open.stderr.contains("is open in a daemon"), "{open}");
    drop(client);
    daemon.stop();

    let check = || {
        offline([
            "store".as_ref(),
            "check".as_ref(),
            store.as_os_str(),
            "-o".as_ref(),
            "json".as_ref(),
        ])
    };
    let sound: Value = serde_json::from_str(&check().success()).expect("JSON");
    assert_eq!(sound["damages"], Value::Array(vec![]));
    assert_eq!(sound["verified_bytes"], 64 * 4096);
    let inspected = offline(["store".as_ref(), "inspect".as_ref(), store.as_os_str()]).success();
    assert!(inspected.contains("cleanly"), "{inspected}");

    // One bit of the block that was written as the eighth.
    let bytes = std::fs::read(&store).expect("the store");
    let at = bytes
        .chunks(4096)
        .position(|block| block == [8; 4096])
        .expect("the block is in the store")
        * 4096;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&store)
        .expect("opens");
    file.write_all_at(&[8 ^ 1], at as u64 + 99).expect("writes");
    drop(file);

    let finished = check();
    assert_eq!(finished.status.code(), Some(7), "{finished}");
    let report: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    let damages = report["damages"].as_array().expect("a list");
    assert_eq!(damages.len(), 1, "{damages:?}");
    assert_eq!(damages[0]["kind"], "data");
    assert_eq!(
        (&damages[0]["chunk"], &damages[0]["block"]),
        (&Value::from(0), &Value::from(7))
    );
    assert_eq!(damages[0]["volume_offset_bytes"], 7 * 4096);
    assert_eq!(damages[0]["store_offset_bytes"], at);
}
