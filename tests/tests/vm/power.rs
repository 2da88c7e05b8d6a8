//! The power goes while a file system on a volume is written to.

use ashlar_tests::scratch::Scratch;
use ashlar_tests::seed;
use ashlar_tests::vm::{Disk, GuestDaemon, Machine, Plan};

use crate::GIB;
use crate::load::Load;

/// How often the power goes.
const CUTS: u64 = 2;
const ATTACH: &str = "modprobe nbd; nbd-client -unix /run/ashlar/nbd.sock -name data -block-size 4096 -connections 4 /dev/nbd0";

#[test]
fn synced_files_survive_power_cuts() {
    let seed = seed::of_run("power");
    let scratch = Scratch::new("vm-disk");
    let disks = ["a", "control"].map(|name| Disk::new(scratch.path(), name, 3 * GIB));
    let mut machine = Machine::boot("power", &Plan::default(), disks.into());
    let mut daemon = GuestDaemon::first(&machine, "1GiB");
    daemon.admin(&["volume", "create", "data", "--size", "512MiB"]);
    machine.sh(ATTACH);
    machine.sh("mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /mnt");
    for cut in 0..CUTS {
        let folder = format!("/mnt/{cut}");
        machine.sh(&format!("mkdir {folder}; sync"));
        let load = Load::start(&machine, "power", &folder, seed);
        load.get_on(400, || {});
        // The second disk shows that these cuts lose what a disk may lose, and nothing else.
        machine.sh(
            "dd if=/dev/urandom of=/run/r bs=4096 count=1 status=none; dd if=/run/r of=/dev/vdb oflag=direct conv=fsync status=none; \
             dd if=/run/r of=/dev/vdb seek=1 bs=4096 oflag=direct status=none; sha256sum </run/r",
        );
        let sum = machine.sh("sha256sum </run/r");
        load.get_on(100, || {});
        let synced = load.synced();
        println!("cut {cut}: synced {synced:?}");
        drop(load);
        drop(daemon);
        let disks = machine.cut_power();

        machine = Machine::boot("power", &Plan::default(), disks);
        let zeros = machine.sh("head -c 4096 /dev/zero | sha256sum");
        let block = |at: u32| {
            machine.sh(&format!(
                "dd if=/dev/vdb bs=4096 skip={at} count=1 status=none | sha256sum"
            ))
        };
        assert_eq!(block(0), sum, "a flushed block of the control disk");
        assert_eq!(
            block(1),
            zeros,
            "a block of the control disk that was not flushed"
        );

        daemon = GuestDaemon::again(&machine, "1GiB");
        machine.sh(ATTACH);
        machine.sh("e2fsck -p /dev/nbd0 || [ $? = 1 ]; e2fsck -fn /dev/nbd0; mount /dev/nbd0 /mnt");
        println!(
            "{}",
            Load::of_before(&machine, &folder, seed).verify(&synced)
        );
    }
    machine.sh("umount /mnt; nbd-client -d /dev/nbd0");
    daemon.stop();
    machine.power_off();
}
