//! The CSI driver with the kernel's NBD driver: from a claim to a mounted directory and back, through deaths of the daemon and of
//! the driver.

use std::time::Duration;

use ashlar_tests::seed;
use ashlar_tests::suites::CsiSanity;
use ashlar_tests::vm::wire::End;
use ashlar_tests::vm::{GuestDaemon, Machine};
use ashlar_tests::wait;
use rustix::process::Signal;

use crate::load::Load;
use crate::{GIB, machine};

const SOCKET: &str = "/run/ashlar-csi/csi.sock";
const LOG: &str = "/var/log/ashlar-csi.log";
const NODE: &str = "node-a";
/// Longest wait for the driver to answer, or to be gone.
const LIMIT: Duration = Duration::from_secs(120);

/// `ashlar-csi` in a machine.
struct Plugin<'a> {
    machine: &'a Machine,
    /// `--attach`.
    attach: &'static str,
    arguments: Vec<&'static str>,
    pid: Option<u32>,
}

impl<'a> Plugin<'a> {
    /// With `arguments` beside the ones it always has.
    fn start(machine: &'a Machine, arguments: &[&'static str]) -> Plugin<'a> {
        machine.sh("mkdir -p /var/lib/kubelet");
        machine.save(LOG);
        let mut plugin = Plugin {
            machine,
            attach: "kernel",
            arguments: arguments.to_vec(),
            pid: None,
        };
        plugin.spawn();
        plugin
    }

    /// Starts it and waits until it answers. A socket that an earlier one left is no answer.
    fn spawn(&mut self) {
        let mut argv = vec![
            "ashlar-csi",
            "--endpoint",
            SOCKET,
            "--node-id",
            NODE,
            "--attach",
            self.attach,
            "--log",
            "info,ashlar_csi=debug",
        ];
        argv.extend(&self.arguments);
        let before = self.served();
        let pid = self.machine.start(&argv, LOG);
        self.pid = Some(pid);
        wait::until(LIMIT, "ashlar-csi serves", || {
            let end = self.machine.wait(pid, Duration::ZERO);
            assert_eq!(end, End::Running, "{}", self.log());
            if self.served() > before {
                Ok(())
            } else {
                Err(self.log())
            }
        });
    }

    /// How often one has begun to serve.
    fn served(&self) -> usize {
        self.log().matches("serving").count()
    }

    fn log(&self) -> String {
        self.machine.try_run(&["cat", LOG]).ran.stdout
    }

    fn kill(&mut self) {
        let pid = self.pid.take().expect("it runs");
        self.machine.signal(pid, Signal::KILL);
        assert_eq!(self.machine.wait(pid, LIMIT), End::Signal(9));
    }

    fn call(&self, call: &str, name: &str, more: &str) -> String {
        self.machine.sh(&line(call, name, more))
    }

    /// All the way from nothing to a pod's directory or device.
    fn bring_up(&self, name: &str, kind: &str, size: u64) {
        self.call("create", name, &format!("--kind {kind} --size {size}"));
        for call in ["controller-publish", "stage", "publish"] {
            self.call(call, name, "");
        }
    }

    /// Grows a volume; where one of its connections is just being replaced, once they are back.
    fn grow(&self, name: &str, size: u64) {
        let grown = line("expand", name, &format!("--size {size}"));
        wait::until(LIMIT, "it grows once its connections are back", || {
            let outcome = self.machine.run_within(&["bash", "-c", &grown], LIMIT);
            let said = format!("{outcome}");
            if outcome.ok() {
                return Ok(());
            }
            assert!(said.contains("connections to the daemon"), "{said}");
            Err(said)
        });
    }

    /// All the way back.
    fn take_down(&self, name: &str) {
        for call in ["unpublish", "unstage", "controller-unpublish"] {
            self.call(call, name, "");
        }
    }
}

fn line(call: &str, name: &str, more: &str) -> String {
    format!("vm-guest csi {call} --endpoint {SOCKET} --node {NODE} --name {name} {more}")
}

/// Where a claim is for its pod.
fn pod(name: &str) -> String {
    format!("/var/lib/kubelet/pods/{name}")
}

/// Devices of the NBD driver that have a server, mounts below the kubelet's directory, what the driver remembers.
fn leftovers(machine: &Machine) -> String {
    machine.sh(
        "cat /sys/block/nbd*/pid 2>/dev/null || true; findmnt -rno TARGET | grep /var/lib/kubelet || true; \
         find /var/lib/ashlar-csi /var/lib/kubelet -mindepth 2 -type f; ls /var/lib/kubelet/pods 2>/dev/null || true",
    )
}

fn no_leftovers(machine: &Machine) {
    assert_eq!(leftovers(machine), "");
    assert_eq!(machine.held(), []);
}

/// The device under a claim's mount, without /dev/.
fn device(machine: &Machine, name: &str) -> String {
    machine.sh(&format!("basename $(findmnt -no SOURCE {})", pod(name)))
}

#[test]
fn claims_live_through_deaths_of_daemon_and_driver_and_grow_online() {
    let seed = seed::of_run("csi");
    let (machine, _scratch) = machine("csi");
    let mut daemon = GuestDaemon::first(&machine, "3GiB");
    // A short request timeout, because every restart costs the load one.
    let mut plugin = Plugin::start(&machine, &["--nbd-timeout", "5"]);
    let kinds = ["ext4", "xfs"];
    for kind in kinds {
        plugin.bring_up(kind, kind, GIB);
        let found = machine.sh(&format!("findmnt -no FSTYPE {}", pod(kind)));
        assert_eq!(found, kind);
    }
    let loads = kinds.map(|kind| Load::start(&machine, kind, &pod(kind), seed));
    for round in 0..5 {
        for load in &loads {
            load.get_on(60, || {});
        }
        match round {
            // The driver dies alone, ...
            1 => {
                plugin.kill();
                plugin.spawn();
                daemon.kill();
                daemon.spawn();
            }
            // ... with the daemon, and is back only after it, ...
            3 => {
                daemon.kill();
                plugin.kill();
                daemon.spawn();
                daemon.wait_ready();
                plugin.spawn();
            }
            // ... and not at all.
            _ => {
                daemon.kill();
                daemon.spawn();
            }
        }
        daemon.wait_ready();
    }
    for load in &loads {
        load.get_on(60, || {});
    }
    for kind in kinds {
        plugin.grow(kind, 2 * GIB);
        let size = machine.sh(&format!(
            "blockdev --getsize64 /dev/{}",
            device(&machine, kind)
        ));
        assert_eq!(size, (2 * GIB).to_string(), "{kind}");
        let blocks: u64 = machine
            .sh(&format!("df -B1 --output=size {} | tail -n 1", pod(kind)))
            .trim()
            .parse()
            .expect("a number");
        assert!(
            blocks > GIB * 18 / 10,
            "{kind}: a file system of {blocks} bytes"
        );
    }
    for load in &loads {
        load.get_on(60, || {});
        load.stop(|| {});
        println!("longest wait {:?}", load.slowest());
    }
    let logged = plugin.log();
    assert!(!logged.contains("panicked"), "{logged}");

    // Unmounted and mounted again, as by a pod that moves.
    for (kind, load) in kinds.iter().zip(&loads) {
        plugin.take_down(kind);
        for call in ["controller-publish", "stage", "publish"] {
            plugin.call(call, kind, "");
        }
        println!("{}", load.verify(&load.synced()));
        plugin.take_down(kind);
    }
    // Without the driver: what the file systems' own programs say.
    for (kind, check) in [("ext4", "e2fsck -fn"), ("xfs", "xfs_repair -n")] {
        machine.sh(&format!(
            "nbd-client -unix /run/ashlar/nbd.sock -name {} -block-size 4096 -connections 2 /dev/nbd9; {check} /dev/nbd9; \
             nbd-client -d /dev/nbd9",
            volume_id(&machine, kind)
        ));
        daemon.wait_unused(&volume_id(&machine, kind));
        plugin.call("delete", kind, "");
    }
    no_leftovers(&machine);
}

fn volume_id(machine: &Machine, name: &str) -> String {
    machine.sh(&format!(
        r#"sed 's/.*"id":"\([^"]*\)".*/\1/' /run/claims/{name}"#
    ))
}

#[test]
fn raw_blocks_and_a_dead_daemon() {
    let (machine, _scratch) = machine("csi_dead");
    let mut daemon = GuestDaemon::first(&machine, "1GiB");
    let plugin = Plugin::start(&machine, &["--unstage-patience", "5", "--nbd-timeout", "5"]);
    plugin.bring_up("raw", "block", 256 << 20);
    machine.sh(&format!(
        "[ -b {0} ]; dd if=/dev/urandom of=/run/r bs=1M count=16 status=none; dd if=/run/r of={0} bs=1M oflag=direct conv=fsync status=none; \
         cmp -n 16777216 /run/r {0}",
        pod("raw")
    ));
    plugin.grow("raw", 384 << 20);
    assert_eq!(
        machine.sh(&format!("blockdev --getsize64 {}", pod("raw"))),
        (384u64 << 20).to_string()
    );
    plugin.take_down("raw");
    for call in ["controller-publish", "stage", "publish"] {
        plugin.call(call, "raw", "");
    }
    machine.sh(&format!("cmp -n 16777216 /run/r {}", pod("raw")));

    plugin.bring_up("dead", "ext4", 256 << 20);
    machine.sh(&format!("cp /run/r {0}/synced; sync -f {0}", pod("dead")));
    // From here on everything that is written fails, and the kernel says so.
    for words in ["I/O error", "EXT4-fs error", "Buffer I/O", "EXT4-fs (nbd"] {
        machine.expect(words);
    }
    daemon.kill();
    // Dirty pages with nowhere to go, and a process that waits: for them, or before it for what the kernel's own threads
    // began on the file system and cannot end.
    let stuck = machine.start(
        &[
            "dd",
            "if=/dev/zero",
            &format!("of={}/dirty", pod("dead")),
            "bs=1M",
            "count=8",
            "conv=fsync",
            "status=none",
        ],
        "/run/stuck.log",
    );
    // The pod's process is killed, as the kubelet does first; it cannot die.
    wait::until(LIMIT, "a process is held", || match machine.held() {
        held if held.is_empty() => Err(format!("{:?}", machine.processes())),
        _ => Ok(()),
    });
    machine.signal(stuck, Signal::KILL);
    for name in ["dead", "raw"] {
        for call in ["unpublish", "unstage"] {
            let argv = line(call, name, "");
            let outcome = machine.run_within(&["bash", "-c", &argv], LIMIT);
            println!("{call} {name} with a dead daemon took {:?}", outcome.took);
            assert!(outcome.ok(), "{outcome}\n{}", plugin.log());
        }
    }
    assert_eq!(machine.wait(stuck, LIMIT), End::Signal(9));
    no_leftovers(&machine);

    // What was synced is there when the daemon is back.
    daemon.spawn();
    daemon.wait_ready();
    for name in ["dead", "raw"] {
        plugin.call("controller-unpublish", name, "");
        for call in ["controller-publish", "stage", "publish"] {
            plugin.call(call, name, "");
        }
    }
    machine.sh(&format!(
        "cmp /run/r {}/synced; cmp -n 16777216 /run/r {}",
        pod("dead"),
        pod("raw")
    ));
    for name in ["dead", "raw"] {
        plugin.take_down(name);
        plugin.call("delete", name, "");
    }
    no_leftovers(&machine);
}

/// The path of the device leads to another volume's, as after a restart that numbered devices anew.
#[test]
fn a_path_that_leads_to_another_device_is_never_formatted() {
    let (machine, _scratch) = machine("csi_path");
    let daemon = GuestDaemon::first(&machine, "1GiB");
    let plugin = Plugin::start(&machine, &[]);
    daemon.admin(&["volume", "create", "other", "--size", "64MiB"]);
    machine.sh(
        "nbd-client -unix /run/ashlar/nbd.sock -name other -block-size 4096 -connections 1 /dev/nbd9; \
         for n in 0 1 2 3 4 5 6 7 8; do mv /dev/nbd$n /dev/was$n; cp -a /dev/nbd9 /dev/nbd$n; done",
    );
    plugin.call(
        "create",
        "victim",
        &format!("--kind ext4 --size {}", 64 << 20),
    );
    plugin.call("controller-publish", "victim", "");
    let argv = line("stage", "victim", "");
    let outcome = machine.run_within(&["bash", "-c", &argv], LIMIT);
    assert!(!outcome.ok(), "{outcome}");
    assert!(format!("{outcome}").contains("not touched"), "{outcome}");
    let other = daemon.json(&["volume", "show", "other"]);
    assert_eq!(other["ever_written"], false, "{other}");
    machine.sh("for n in 0 1 2 3 4 5 6 7 8; do mv /dev/was$n /dev/nbd$n; done");
    plugin.call("stage", "victim", "");
    plugin.call("publish", "victim", "");
    machine.sh(&format!(
        "[ $(findmnt -no FSTYPE {}) = ext4 ]",
        pod("victim")
    ));
    let other = daemon.json(&["volume", "show", "other"]);
    assert_eq!(other["ever_written"], false, "{other}");
    machine.sh("nbd-client -d /dev/nbd9");
    plugin.take_down("victim");
    plugin.call("delete", "victim", "");
    no_leftovers(&machine);
}

/// `--attach` is for new devices: one that the kernel has is seen, used, healed, grown and undone by a driver that is told to make
/// them otherwise, and the volume is not attached a second time.
#[test]
fn a_device_of_the_other_way_is_gone_on_with() {
    let (machine, _scratch) = machine("csi_ways");
    let mut daemon = GuestDaemon::first(&machine, "1GiB");
    let mut plugin = Plugin::start(&machine, &["--nbd-timeout", "5"]);
    plugin.bring_up("claim", "ext4", 128 << 20);
    let directory = pod("claim");
    let used = device(&machine, "claim");
    machine.sh(&format!(
        "echo before > {directory}/file; sync {directory}/file"
    ));
    plugin.kill();
    plugin.attach = "fuse";
    plugin.spawn();
    for call in ["stage", "publish", "stage"] {
        plugin.call(call, "claim", "");
    }
    assert_eq!(device(&machine, "claim"), used);
    daemon.kill();
    daemon.spawn();
    daemon.wait_ready();
    machine.sh(&format!(
        "echo after > {directory}/more; sync {directory}/more"
    ));
    plugin.grow("claim", 256 << 20);
    let size = machine.sh(&format!("blockdev --getsize64 /dev/{used}"));
    assert_eq!(size, (256 << 20).to_string());
    assert_eq!(
        machine.sh(&format!("cat {directory}/file {directory}/more")),
        "before\nafter"
    );
    plugin.take_down("claim");
    plugin.call("delete", "claim", "");
    no_leftovers(&machine);
}

/// csi-sanity, the interface's own suite, over /dev/nbdN.
fn sanity(access: &str) {
    let (machine, _scratch) = machine(&format!("csi_sanity_{access}"));
    let _daemon = GuestDaemon::first(&machine, "2GiB");
    let _plugin = Plugin::start(&machine, &["--max-volumes", "10"]);
    let mutable = "/run/mutable.yaml";
    machine.write(mutable, CsiSanity::MUTABLE);
    let suite = CsiSanity {
        socket: SOCKET,
        mount: "/var/lib/kubelet/mount",
        staging: "/var/lib/kubelet/staging",
        access,
        mutable,
    };
    let summary = suite.pass(|arguments| {
        let words: Vec<&str> = ["csi-sanity"]
            .into_iter()
            .chain(arguments.iter().map(String::as_str))
            .collect();
        machine
            .run_within(&words, Duration::from_secs(600))
            .to_string()
    });
    println!("{summary}, over the kernel's nbd");
    no_leftovers(&machine);
}

#[test]
fn the_suite_passes_with_mounted_volumes() {
    sanity("mount");
}

#[test]
fn the_suite_passes_with_raw_volumes() {
    sanity("block");
}

/// The daemon comes back without what was answered and not flushed, and the kernel lived through it: given a new connection it
/// would take for written what is gone.
#[test]
fn a_device_does_not_go_on_after_a_power_cut_of_its_server() {
    let (machine, _scratch) = machine("csi-power");
    for words in [
        "I/O error",
        "EXT4-fs",
        "Buffer I/O",
        "JBD2",
        "Aborting journal",
    ] {
        machine.expect(words);
    }
    let mut daemon = GuestDaemon::first(&machine, "2GiB");
    let plugin = Plugin::start(&machine, &[]);
    plugin.bring_up("claim", "ext4", GIB);
    let directory = pod("claim");
    machine.sh(&format!(
        "echo before > {directory}/file; sync {directory}/file"
    ));
    // A death that loses nothing: the device goes on.
    daemon.kill();
    daemon.spawn();
    daemon.wait_ready();
    machine.sh(&format!(
        "echo after > {directory}/more; sync {directory}/more"
    ));
    daemon.kill();
    daemon.spawn_without_tail();
    daemon.wait_ready();
    wait::until(LIMIT, "the device answers errors", || {
        let tried = machine.try_run(&[
            "dd",
            "if=/dev/nbd0",
            "of=/dev/null",
            "bs=4096",
            "count=1",
            "iflag=direct",
        ]);
        if tried.ok() {
            Err("it was read".to_owned())
        } else {
            Ok(())
        }
    });
    // The kernel answers before the driver has heard that it did.
    wait::until(LIMIT, "the driver says why", || match plugin.log() {
        log if log.contains("answered writes may be gone") => Ok(()),
        log => Err(log),
    });
    // Taken down and brought up again it is used as after any power cut.
    for call in ["unpublish", "unstage", "stage", "publish"] {
        plugin.call(call, "claim", "");
    }
    assert_eq!(
        machine.sh(&format!("cat {directory}/file {directory}/more")),
        "before\nafter"
    );
    machine.sh(&format!(
        "echo again > {directory}/file; sync {directory}/file"
    ));
    plugin.take_down("claim");
    plugin.call("delete", "claim", "");
    assert_eq!(leftovers(&machine), "");
}
