//! Volumes attached by hand with nbd-client, as docs/usage.md and `ashlar volume show` say.

use std::time::Duration;

use ashlar_tests::vm::{GuestDaemon, Machine};
use ashlar_tests::wait;
use serde_json::Value;

use crate::machine;

/// Longest wait for what the daemon does by itself.
const LIMIT: Duration = Duration::from_secs(60);

/// The lines of the first block of commands below a heading of docs/usage.md, as root types them.
fn lines_of_the_document(heading: &str) -> String {
    let text = include_str!("../../../docs/usage.md");
    let (_, below) = text.split_once(heading).expect("the heading is there");
    let (_, block) = below
        .split_once("```console\n")
        .expect("a block of commands");
    let (block, _) = block.split_once("```").expect("its end");
    let lines: Vec<&str> = block
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .collect();
    as_root(&lines.join("\n"))
}

fn as_root(lines: &str) -> String {
    lines.replace("sudo ", "")
}

/// The line that `ashlar volume show` prints for the kernel, for another device than its /dev/nbd0.
fn shown(daemon: &GuestDaemon<'_>, volume: &str, device: &str) -> String {
    let shown = daemon.json(&["volume", "show", volume]);
    let line = find(&shown, "nbd_client").expect("a line for nbd-client");
    as_root(&line).replace("/dev/nbd0", device)
}

/// The text under a key, wherever it stands.
fn find(value: &Value, key: &str) -> Option<String> {
    match value {
        Value::Object(map) => map
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
            .or_else(|| map.values().find_map(|inner| find(inner, key))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, key)),
        _ => None,
    }
}

/// Bytes of live data in the daemon's store.
fn live_bytes(daemon: &GuestDaemon<'_>) -> u64 {
    let stores = daemon.json(&["store", "list"]);
    number(&stores, "live_bytes").unwrap_or_else(|| panic!("no live_bytes in {stores}"))
}

fn number(value: &Value, key: &str) -> Option<u64> {
    match value {
        Value::Object(map) => map
            .get(key)
            .and_then(|found| found.as_u64().or_else(|| found.as_str()?.parse().ok()))
            .or_else(|| map.values().find_map(|inner| number(inner, key))),
        Value::Array(list) => list.iter().find_map(|inner| number(inner, key)),
        _ => None,
    }
}

fn queue(machine: &Machine, device: &str, name: &str) -> String {
    machine.sh(&format!("cat /sys/block/{device}/queue/{name}"))
}

#[test]
fn the_lines_of_the_documents_give_a_file_system() {
    let (machine, _scratch) = machine("by_hand");
    let daemon = GuestDaemon::first(&machine, "1GiB");
    daemon.admin(&["volume", "create", "data", "--size", "512MiB"]);

    let lines = lines_of_the_document("## Attach one");
    let (attaching, using) = lines
        .split_once("\nmkfs.")
        .expect("a line that makes a file system");
    machine.sh(attaching);
    // Before anything is asked of them: the kernel gives up a connection whose request takes longer than its timeout, which
    // can happen here where the host is busy.
    wait::until(LIMIT, "four connections are open", || {
        let connections = daemon.json(&["connections"]);
        match connections.as_array().map(Vec::len) {
            Some(4) => Ok(()),
            _ => Err(connections.to_string()),
        }
    });
    machine.sh(&format!("mkfs.{using}"));
    assert_eq!(
        machine.sh("findmnt -no SOURCE,FSTYPE /mnt"),
        "/dev/nbd0 ext4"
    );
    assert_eq!(
        machine.sh("blockdev --getsize64 /dev/nbd0"),
        (512u64 << 20).to_string()
    );
    for (name, wanted) in [
        ("logical_block_size", "4096"),
        ("physical_block_size", "4096"),
        ("write_cache", "write back"),
        ("fua", "1"),
    ] {
        assert_eq!(queue(&machine, "nbd0", name), wanted, "{name}");
    }

    // Written, synced, detached, attached again: the same bytes.
    machine.sh(
        "dd if=/dev/urandom of=/mnt/a bs=1M count=64 conv=fsync status=none; cd /mnt; sha256sum a >/run/a.sum; cd /; umount /mnt",
    );
    machine.sh("e2fsck -fn /dev/nbd0; nbd-client -d /dev/nbd0");
    machine.sh(&format!(
        "{}; mount /dev/nbd0 /mnt; cd /mnt; sha256sum --quiet -c /run/a.sum",
        shown(&daemon, "data", "/dev/nbd0")
    ));

    // What is removed and trimmed goes back to the store.
    let before = live_bytes(&daemon);
    machine.sh("rm /mnt/a; sync; fstrim /mnt");
    wait::until(LIMIT, "the store has the space back", || {
        let after = live_bytes(&daemon);
        // The kernel still writes zeros over the inode tables meanwhile, 8 MiB in all.
        if before >= after + (48 << 20) {
            return Ok(());
        }
        Err(format!("{before} bytes live before fstrim, {after} after"))
    });

    // A second device beside the first, with xfs; and copied from one to the other.
    daemon.admin(&["volume", "create", "second", "--size", "512MiB"]);
    machine.sh(&shown(&daemon, "second", "/dev/nbd1"));
    machine.sh(
        "mkfs.xfs -q /dev/nbd1; mkdir /run/x; mount /dev/nbd1 /run/x; \
         dd if=/dev/urandom of=/run/x/b bs=1M count=48 conv=fsync status=none; \
         cp /run/x/b /mnt/b; cp /mnt/b /run/x/c; sync; cmp /run/x/b /run/x/c; \
         umount /run/x; xfs_repair -n /dev/nbd1 2>/dev/null; \
         nbd-client -d /dev/nbd1",
    );
    machine.sh(&format!(
        "{}; mount /dev/nbd1 /run/x; cmp /run/x/b /run/x/c; umount /run/x",
        shown(&daemon, "second", "/dev/nbd1")
    ));

    // Grown: the device has the new size once it is attached again.
    daemon.admin(&["volume", "resize", "data", "--size", "768MiB"]);
    assert_eq!(
        machine.sh("blockdev --getsize64 /dev/nbd0"),
        (512u64 << 20).to_string()
    );
    machine.sh("umount /mnt; nbd-client -d /dev/nbd0");
    machine.sh(&format!(
        "{}; mount /dev/nbd0 /mnt; resize2fs /dev/nbd0; cmp /mnt/b <(mount -o ro /dev/nbd1 /run/x; cat /run/x/b); \
         umount /run/x /mnt; e2fsck -fn /dev/nbd0",
        shown(&daemon, "data", "/dev/nbd0")
    ));
    assert_eq!(
        machine.sh("blockdev --getsize64 /dev/nbd0"),
        (768u64 << 20).to_string()
    );
    let blocks = machine.sh("dumpe2fs -h /dev/nbd0 2>/dev/null | grep '^Block count' | tr -dc 0-9");
    assert_eq!(blocks, ((768u64 << 20) / 4096).to_string());

    // Read-only: the kernel says so, and the file system is there.
    machine.sh("nbd-client -d /dev/nbd0");
    daemon.wait_unused("data");
    daemon.admin(&["volume", "set", "data", "--read-only"]);
    machine.sh(&shown(&daemon, "data", "/dev/nbd0"));
    assert_eq!(machine.sh("blockdev --getro /dev/nbd0"), "1");
    machine
        .sh("mount -o ro /dev/nbd0 /mnt; cmp /mnt/b <(mount -o ro /dev/nbd1 /run/x; cat /run/x/b)");
    machine.try_sh("touch /mnt/new").failure();
    machine
        .try_sh("dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 oflag=direct")
        .failure();
    machine.sh("umount /mnt /run/x; nbd-client -d /dev/nbd0; nbd-client -d /dev/nbd1");
    assert_eq!(machine.held(), []);
}
