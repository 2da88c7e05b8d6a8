//! The daemon dies and comes back under a mounted file system.

use ashlar_tests::seed;
use ashlar_tests::vm::{GuestDaemon, Machine};

use crate::load::Load;
use crate::machine;

/// `vm-guest nbd`: what a node plugin tells the kernel by netlink.
fn netlink(machine: &Machine, command: &str, device: u32, volume: &str) {
    machine.sh(&format!(
        "vm-guest nbd {command} --device {device} --socket /run/ashlar/nbd.sock --export {volume} --identifier {volume} \
         --connections 4 --timeout 5 --dead-timeout 600"
    ));
}

#[test]
fn five_restarts_under_mounted_file_systems() {
    let seed = seed::of_run("restarts");
    let (machine, _scratch) = machine("restarts");
    let mut daemon = GuestDaemon::first(&machine, "1GiB");
    machine.sh("modprobe nbd; mkdir /run/ext4 /run/xfs");
    let systems = [(0, "ext4"), (1, "xfs")];
    for (device, system) in systems {
        daemon.admin(&["volume", "create", system, "--size", "512MiB"]);
        netlink(&machine, "connect", device, system);
        machine.sh(&format!(
            "mkfs.{system} -q /dev/nbd{device}; mount /dev/nbd{device} /run/{system}"
        ));
    }
    let reconnect = || {
        for (device, system) in systems {
            netlink(&machine, "reconnect", device, system);
        }
    };
    let loads =
        systems.map(|(_, system)| Load::start(&machine, system, &format!("/run/{system}"), seed));
    for round in 0..5 {
        for load in &loads {
            load.get_on(100, reconnect);
        }
        if round % 2 == 0 {
            daemon.kill();
        } else {
            daemon.stop();
        }
        daemon.spawn();
        daemon.wait_ready();
        reconnect();
    }
    for load in &loads {
        load.get_on(100, reconnect);
        load.stop(reconnect);
        println!("longest wait {:?}", load.slowest());
    }
    // A connection whose request took too long is gone for good: nobody but this test gives new ones.
    reconnect();
    machine.sh("umount /run/ext4 /run/xfs; e2fsck -fn /dev/nbd0; xfs_repair -n /dev/nbd1");
    reconnect();
    machine.sh("mount /dev/nbd0 /run/ext4; mount /dev/nbd1 /run/xfs");
    for load in &loads {
        reconnect();
        println!("{}", load.verify(&load.synced()));
    }
    reconnect();
    machine.sh("umount /run/ext4 /run/xfs; nbd-client -d /dev/nbd0; nbd-client -d /dev/nbd1");
    assert_eq!(machine.held(), []);
}

/// What docs/usage.md says about nbd-client and restarts: it does not come back by itself, whatever `-persist` promises, and
/// nothing that was synced is lost.
#[test]
fn nbd_client_does_not_come_back_and_nothing_synced_is_lost() {
    let seed = seed::of_run("nbd_client");
    let (machine, _scratch) = machine("nbd_client");
    // The point of the test is that the kernel complains.
    for words in ["I/O error", "EXT4-fs error", "Buffer I/O"] {
        machine.expect(words);
    }
    let mut daemon = GuestDaemon::first(&machine, "1GiB");
    daemon.admin(&["volume", "create", "data", "--size", "512MiB"]);
    let attach = "nbd-client -unix /run/ashlar/nbd.sock -name data -block-size 4096 -connections 4";
    machine.sh("modprobe nbd");
    for (device, options) in [
        ("/dev/nbd0", "-persist"),
        ("/dev/nbd1", "-persist -nonetlink"),
    ] {
        // Without netlink the device gets its size a moment after nbd-client went into the background, where it may also end
        // at once without a word; a person looks and attaches it again.
        let size = device.replace("/dev/", "/sys/block/");
        let is_there = (0..5).any(|_| {
            machine.sh(&format!("{attach} {options} {device}"));
            let wait = format!("for i in {{1..200}}; do [ \"$(<{size}/size)\" = 0 ] || exit 0; sleep 0.05; done; exit 1");
            machine.try_sh(&wait).ok() || {
                machine.try_sh(&format!("nbd-client -d {device}"));
                false
            }
        });
        assert!(is_there, "{device} has no size");
        machine.sh(&format!("mkfs.ext4 -q -F {device}; mount {device} /mnt"));
        let load = Load::start(
            &machine,
            options.rsplit('-').next().expect("a word"),
            "/mnt",
            seed,
        );
        load.get_on(200, || {});
        daemon.kill();
        let said = load.failed();
        assert!(
            said.contains("os error 5") || said.contains("os error 30"),
            "{said}"
        );
        daemon.spawn();
        daemon.wait_ready();
        machine.try_sh("touch /mnt/new; sync -f /mnt").failure();

        // The way back: unmount, detach, attach, check, mount.
        let synced = load.synced();
        machine.sh(&format!("umount /mnt; nbd-client -d {device}"));
        machine.sh(&format!("{attach} {device}; e2fsck -p {device} || [ $? = 1 ]; e2fsck -fn {device}; mount {device} /mnt"));
        println!("{}", load.verify(&synced));
        machine.sh(&format!("umount /mnt; nbd-client -d {device}"));
    }
    assert_eq!(machine.held(), []);
}
