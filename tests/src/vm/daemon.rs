//! `ashlard` inside a machine.

use std::time::Duration;

use rustix::process::Signal;

use super::machine::{Machine, Outcome};
use super::wire::End;
use crate::wait;

/// Longest wait for a daemon to be ready or gone; the machine is slow and the store is formatted at its first start.
const LIMIT: Duration = Duration::from_secs(180);
const LOG: &str = "/var/log/ashlard.log";
/// As the systemd unit has it: `ashlar` and the documents' lines find the daemon without being told where it is.
const ARGUMENTS: [&str; 6] = [
    "--data-dir",
    "/var/lib/ashlar",
    "--listen-nbd",
    "unix:/run/ashlar/nbd.sock",
    "--listen-admin",
    "unix:/run/ashlar/admin.sock",
];

/// The daemon of a machine. Its data directory is the first disk, its sockets are in /run/ashlar.
pub struct GuestDaemon<'a> {
    machine: &'a Machine,
    store_size: String,
    pid: Option<u32>,
}

impl<'a> GuestDaemon<'a> {
    /// A daemon on an empty disk, which gets a file system first.
    pub fn first(machine: &'a Machine, store_size: &str) -> GuestDaemon<'a> {
        machine.sh("mkfs.ext4 -q -E nodiscard /dev/vda");
        GuestDaemon::start(machine, store_size)
    }

    /// A daemon on a disk that another machine had before.
    pub fn again(machine: &'a Machine, store_size: &str) -> GuestDaemon<'a> {
        GuestDaemon::start(machine, store_size)
    }

    fn start(machine: &'a Machine, store_size: &str) -> GuestDaemon<'a> {
        machine.sh("mkdir -p /var/lib/ashlar /run/ashlar; mount /dev/vda /var/lib/ashlar");
        machine.save(LOG);
        let mut daemon = GuestDaemon {
            machine,
            store_size: store_size.to_owned(),
            pid: None,
        };
        daemon.spawn();
        daemon.wait_ready();
        daemon
    }

    /// Starts it without waiting.
    pub fn spawn(&mut self) {
        self.spawn_with(&[]);
    }

    /// Starts it as after a power cut: what only its memory held is gone.
    pub fn spawn_without_tail(&mut self) {
        self.machine
            .sh("find /run /dev/shm -name 'ashlar-*.tail' -print -delete | grep .");
        self.spawn_with(&["--accept-tail-loss"]);
    }

    fn spawn_with(&mut self, more: &[&str]) {
        assert!(self.pid.is_none(), "already running");
        let mut argv = vec!["ashlard", "--store-size", &self.store_size];
        argv.extend(ARGUMENTS);
        argv.extend(more);
        self.pid = Some(self.machine.start(&argv, LOG));
    }

    pub fn wait_ready(&self) {
        let outcome = self
            .machine
            .run_within(&["ashlar", "status", "--wait"], LIMIT);
        assert!(
            outcome.ok(),
            "{outcome}\n{}",
            self.machine.read(LOG).unwrap_or_default()
        );
    }

    pub fn kill(&mut self) {
        self.end(Signal::KILL, End::Signal(9));
    }

    /// SIGTERM, and gone with exit code 0 when this returns.
    pub fn stop(&mut self) {
        self.end(Signal::TERM, End::Code(0));
    }

    fn end(&mut self, signal: Signal, wanted: End) {
        let pid = self.pid.take().expect("the daemon runs");
        self.machine.signal(pid, signal);
        let end = self.machine.wait(pid, LIMIT);
        assert_eq!(
            end,
            wanted,
            "after {signal:?}:\n{}",
            self.machine.read(LOG).unwrap_or_default()
        );
    }

    /// `ashlar` with `arguments`, which must succeed.
    pub fn admin(&self, arguments: &[&str]) -> String {
        self.try_admin(arguments).success()
    }

    pub fn try_admin(&self, arguments: &[&str]) -> Outcome {
        let mut argv = vec!["ashlar"];
        argv.extend(arguments);
        self.machine.try_run(&argv)
    }

    /// `ashlar … -o json`.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        let text = self.admin(&all);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
    }

    /// Waits until it knows that nobody is connected to a volume any more: a client is done before it is.
    pub fn wait_unused(&self, volume: &str) {
        wait::until(LIMIT, "nobody is connected", || {
            let all = self.json(&["connections", volume]);
            match all.as_array().map(Vec::len) {
                Some(0) => Ok(()),
                _ => Err(all.to_string()),
            }
        });
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.machine.read(LOG).unwrap_or_default()
    }
}
