//! A real `ashlar-csi` over a real daemon, and everything it leaves in the system taken away at the end.

mod calls;
mod claim;

use std::fs::{self, OpenOptions};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

pub use ashlar_csi::csi;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::Endpoint;

pub use calls::{Answer, Calls};
pub use claim::{Claim, mounted, raw, strings, text};

use crate::daemon::{Daemon, Setup, binary};
use crate::log::Log;
use crate::process::{Group, Usage, describe, usage};
use crate::tool::Tool;
use crate::wait;

/// Longest wait for the driver to serve. It may have devices to clear away first.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// The driver, its daemon, and what they have in the system. The driver goes first.
pub struct Driver {
    plugin: Plugin,
    pub daemon: Daemon,
}

/// A driver beside a daemon, and what it has in the system.
pub struct Plugin {
    /// Below it is everything the driver makes.
    scratch: PathBuf,
    /// `--daemon`.
    admin: String,
    log: Log,
    arguments: Vec<String>,
    process: Option<Group>,
    calls: Calls,
}

impl Driver {
    /// A daemon and a driver over it, both ready.
    pub fn start(test: &str, setup: Setup) -> Driver {
        let mut driver = Driver::prepare(test, setup);
        driver.start_driver(&[]);
        driver
    }

    /// A daemon that is ready, and a driver that is not started yet.
    pub fn prepare(test: &str, setup: Setup) -> Driver {
        let daemon = setup.start(test);
        Driver {
            plugin: Plugin::beside(&daemon, "node-a"),
            daemon,
        }
    }
}

impl Deref for Driver {
    type Target = Plugin;

    fn deref(&self) -> &Plugin {
        &self.plugin
    }
}

impl DerefMut for Driver {
    fn deref_mut(&mut self) -> &mut Plugin {
        &mut self.plugin
    }
}

impl Deref for Plugin {
    type Target = Calls;

    fn deref(&self) -> &Calls {
        &self.calls
    }
}

/// The socket of a daemon's admin interface, as the driver is told it.
fn admin_of(daemon: &Daemon) -> String {
    format!("unix:{}", daemon.data_dir().join("admin.sock").display())
}

impl Plugin {
    /// A driver on the machine of a daemon, as the node `node_id`, that is not started yet. To be dropped before it.
    pub fn beside(daemon: &Daemon, node_id: &str) -> Plugin {
        Plugin::below(daemon.scratch.path(), daemon, node_id)
    }

    /// One of several nodes that use the same daemon: everything it makes is in a directory of its own.
    pub fn of_several(daemon: &Daemon, node_id: &str) -> Plugin {
        let directory = daemon.scratch.join(node_id);
        fs::create_dir(&directory).expect("a directory");
        Plugin::below(&directory, daemon, node_id)
    }

    fn below(directory: &Path, daemon: &Daemon, node_id: &str) -> Plugin {
        let root = directory.join("k");
        fs::create_dir(&root).expect("a directory");
        Plugin {
            scratch: directory.to_owned(),
            admin: admin_of(daemon),
            log: Log::new(directory.join("csi.log")),
            arguments: Vec::new(),
            process: None,
            calls: Calls::new(directory.join("csi.sock"), root, node_id),
        }
    }

    /// The calls to it.
    pub fn calls(&self) -> &Calls {
        &self.calls
    }

    /// Asks another daemon, or this one another way, from the next start on.
    pub fn ask(&mut self, admin: &str) {
        admin.clone_into(&mut self.admin);
    }

    /// More arguments from the next start on.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|each| (*each).to_owned()).collect();
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(binary("ashlar-csi"));
        command
            .arg("--endpoint")
            .arg(self.socket())
            .args(["--daemon", &self.admin])
            .arg("--state-dir")
            .arg(self.state_dir())
            .arg("--kubelet-dir")
            .arg(self.root())
            .args(["--node-id", self.node_id()])
            .args(["--attach", "fuse", "--log", "info,ashlar_csi=debug"])
            .args(&self.arguments)
            .args(more);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ASHLAR_")) {
            command.env_remove(name);
        }
        command.env_remove("CSI_ENDPOINT");
        command
    }

    /// Starts the driver with `more` arguments, without waiting.
    pub fn spawn_driver(&mut self, more: &[&str]) {
        assert!(self.process.is_none(), "already running");
        let open = || {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(self.log.path())
                .expect("the log can be opened")
        };
        let mut command = self.command(more);
        command.stdin(Stdio::null()).stdout(open()).stderr(open());
        self.process = Some(Group::spawn(&mut command).expect("ashlar-csi starts"));
    }

    /// Starts the driver with `more` arguments and waits until it answers.
    pub fn start_driver(&mut self, more: &[&str]) {
        self.spawn_driver(more);
        wait::until(READY_LIMIT, "ashlar-csi answers", || {
            if let Some(status) = self.process.as_mut().and_then(Group::exited) {
                panic!(
                    "ashlar-csi ended with {}:\n{}",
                    describe(status),
                    self.log.tail()
                );
            }
            self.plugin_info().map_err(|error| format!("{error:?}"))
        });
    }

    /// Waits until it has killed itself at its fail point.
    pub fn wait_killed(&mut self, limit: Duration) {
        use std::os::unix::process::ExitStatusExt;
        let mut process = self.process.take().expect("it runs");
        let ended = process.wait(limit);
        let status = ended.unwrap_or_else(|| panic!("it did not die:\n{}", self.log.tail()));
        assert_eq!(status.signal(), Some(9), "{}", self.log.tail());
    }

    /// True once it has ended.
    pub fn is_dead(&mut self) -> bool {
        self.process
            .as_mut()
            .is_none_or(|process| process.exited().is_some())
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill_driver(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    pub fn usage(&self) -> Usage {
        let pid = self.process.as_ref().expect("it runs").pid();
        usage(pid).expect("a running process has a /proc")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.scratch.join("s")
    }

    pub fn log_tail(&self) -> String {
        self.log.tail()
    }

    /// Makes another node known to the daemon.
    pub fn register_node(&self, node: &str) {
        use ashlar_proto::admin;
        let address = self.admin.clone();
        let registered = self.calls.together(async {
            let channel = Endpoint::from_shared(address)
                .expect("an address")
                .connect_lazy();
            admin::admin_client::AdminClient::new(channel)
                .register_node(admin::RegisterNodeRequest {
                    node_id: node.to_owned(),
                    ..Default::default()
                })
                .await
        });
        registered.expect("registered");
    }

    /// Loop devices, nbdfuse processes and mounts of this driver's, one line each. Empty when nothing is leaked.
    pub fn leftovers(&self) -> Vec<String> {
        let scratch = &self.scratch;
        let mut all: Vec<String> = mounts_below(scratch)
            .iter()
            .map(|point| format!("mount {}", point.display()))
            .collect();
        all.extend(
            loops_below(scratch)
                .iter()
                .map(|name| format!("device {name}")),
        );
        all.extend(
            servers_below(scratch)
                .iter()
                .map(|pid| format!("nbdfuse {}", pid.as_raw_nonzero())),
        );
        all
    }

    /// Takes away every mount, loop device and nbdfuse of the driver's, which does not run.
    pub fn clear_devices(&self) {
        let scratch = self.scratch.clone();
        // The mounts on devices first, then the devices, then what is under them.
        for point in mounts_below(&scratch).iter().rev() {
            if !point.starts_with(self.state_dir()) {
                Tool::new("umount").arg("-l").arg(point).run();
            }
        }
        for name in loops_below(&scratch) {
            Tool::new("losetup")
                .args(["-d", &format!("/dev/{name}")])
                .run();
        }
        for pid in servers_below(&scratch) {
            let _ = kill_process(pid, Signal::KILL);
        }
        for point in mounts_below(&scratch).iter().rev() {
            Tool::new("umount").arg("-l").arg(point).run();
        }
    }

    /// What the driver remembers: files in its state directory.
    pub fn remembered(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.state_dir()) else {
            return Vec::new();
        };
        entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != "fuse")
            .collect()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
        self.clear_devices();
        if std::thread::panicking() {
            eprintln!(
                "--- the end of {}\n{}",
                self.log.path().display(),
                self.log.tail()
            );
        } else {
            // It warns of what tests do to it on purpose. What needs a person is announced by the test that brings it about.
            self.log.expect(" WARN ");
            self.log.check();
        }
    }
}

/// What is mounted below a directory, or at it.
pub fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("there is a /proc");
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(directory))
        .collect()
}

/// Loop devices over files below a directory.
pub fn loops_below(directory: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").expect("there is a /sys");
    devices
        .flatten()
        .filter(|entry| {
            fs::read_to_string(entry.path().join("loop/backing_file"))
                .is_ok_and(|file| Path::new(file.trim()).starts_with(directory))
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn servers_below(directory: &Path) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").expect("there is a /proc");
    let wanted = directory.to_string_lossy().into_owned();
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.starts_with("nbdfuse\0") && line.contains(&wanted)
        })
        .filter_map(Pid::from_raw)
        .collect()
}
