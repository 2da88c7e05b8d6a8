//! A real `ashlard`, started, stopped, killed and started again.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::admin::Admin;
use crate::http::{self, Metrics};
use crate::log::Log;
use crate::nbd::{self, Address, Failure, Transmission, Wishes};
use crate::process::{Group, Usage, describe, usage};
use crate::scratch::{Scratch, free_port};
use crate::wait;

/// Longest wait for a daemon to be ready. A start formats a store, which writes it once with zeros.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a daemon to drain.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// The binary `name` of the workspace, built when it is not there.
pub fn binary(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        if let Some(given) = std::env::var_os("ASHLAR_TESTS_BIN_DIR") {
            return PathBuf::from(given);
        }
        // A test runs from TARGET/PROFILE/deps; the binaries are one level up.
        let own = std::env::current_exe().expect("a test knows its own path");
        let directory = own
            .ancestors()
            .nth(2)
            .expect("TARGET/PROFILE/deps")
            .to_path_buf();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the workspace");
        let target = directory.parent().expect("TARGET");
        // Always asked for, because a stale binary would be tested in silence; cargo does nothing when it is fresh.
        let built =
            Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
                .args([
                    "build",
                    "--release",
                    "-p",
                    "ashlar-server",
                    "-p",
                    "ashlar-csi",
                    "--bins",
                    "--target-dir",
                ])
                .arg(target)
                .current_dir(workspace)
                .status()
                .expect("cargo runs");
        assert!(built.success(), "cargo build of the daemon failed");
        target.join("release")
    });
    let path = directory.join(name);
    assert!(path.exists(), "{} is not there", path.display());
    path
}

/// How to start a daemon. The default is one small store and everything else as the product has it.
#[derive(Clone, Debug)]
pub struct Setup {
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
    store_size: Option<String>,
    own_tail: bool,
    fault: Option<String>,
    nbd: Vec<String>,
    host: Ipv4Addr,
    wrapper: Vec<OsString>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            arguments: Vec::new(),
            environment: Vec::new(),
            store_size: Some("1GiB".to_owned()),
            own_tail: false,
            fault: None,
            nbd: Vec::new(),
            host: Ipv4Addr::LOCALHOST,
            wrapper: Vec::new(),
        }
    }
}

impl Setup {
    pub fn arg(mut self, argument: impl Into<OsString>) -> Setup {
        self.arguments.push(argument.into());
        self
    }

    pub fn args<S: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = S>) -> Setup {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Setup {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Size of the default store.
    pub fn store_size(mut self, size: &str) -> Setup {
        self.store_size = Some(size.to_owned());
        self
    }

    /// No `--store-size`: the test names its stores itself.
    pub fn own_stores(mut self) -> Setup {
        self.store_size = None;
        self
    }

    /// The tail in the data directory and not in memory, so that a copy of the directory is a copy of everything.
    pub fn tail_in_data_dir(mut self) -> Setup {
        self.own_tail = true;
        self
    }

    /// Also listen for NBD here (`unix:PATH` or `tcp:HOST:PORT`), beside the default socket.
    pub fn listen_nbd(mut self, address: &str) -> Setup {
        self.nbd.push(address.to_owned());
        self
    }

    /// Listens at this address of a network namespace of its own.
    pub fn in_namespace(mut self, namespace: &str, host: Ipv4Addr) -> Setup {
        self.host = host;
        let namespace = format!("--net=/run/netns/{namespace}");
        self.wrapper = vec!["nsenter".into(), namespace.into(), "--".into()];
        self
    }

    /// The address it listens at.
    pub fn host(&self) -> Ipv4Addr {
        self.host
    }

    /// From the next start on the machine seems to have been booted anew: it has this boot id (a UUID). Needs root.
    pub fn booted_as(&mut self, boot_id_file: &Path) {
        let bind = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
        self.wrapper = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            bind,
        ]
        .map(OsString::from)
        .to_vec();
        self.wrapper.push(boot_id_file.into());
    }

    /// Faults of the disk from the next start on, in the words of the daemon's hidden `--fault` setting.
    pub fn set_fault(&mut self, plan: Option<&str>) {
        self.fault = plan.map(str::to_owned);
    }

    /// A scratch directory and a daemon in it, ready.
    pub fn start(self, test: &str) -> Daemon {
        let mut daemon = self.prepare(test);
        daemon.start();
        daemon
    }

    /// A scratch directory for a daemon that is not started yet.
    pub fn prepare(self, test: &str) -> Daemon {
        let scratch = Scratch::new(test);
        let data = scratch.join("d");
        Daemon::at(self, scratch, data)
    }
}

/// A daemon and its data directory. Stops, hard, when dropped; then its log must be clean.
pub struct Daemon {
    pub setup: Setup,
    pub scratch: Scratch,
    pub log: Log,
    data: PathBuf,
    http_port: u16,
    process: Option<Group>,
}

impl Daemon {
    /// A daemon over an existing data directory.
    pub fn at(setup: Setup, scratch: Scratch, data: PathBuf) -> Daemon {
        let log = Log::new(scratch.join("ashlard.log"));
        Daemon {
            setup,
            scratch,
            log,
            data,
            http_port: free_port(),
            process: None,
        }
    }

    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    pub fn http_port(&self) -> u16 {
        self.http_port
    }

    fn http_address(&self) -> SocketAddr {
        (self.setup.host, self.http_port).into()
    }

    /// The default store.
    pub fn store(&self) -> PathBuf {
        self.data.join("stores/0")
    }

    /// The command line.
    pub fn command(&self) -> Command {
        let program = binary("ashlard").into_os_string();
        let mut line = self.setup.wrapper.iter().cloned().chain([program]);
        let mut command = Command::new(line.next().expect("at least the program"));
        command.args(line);
        command.arg("--data-dir").arg(&self.data);
        command
            .arg("--listen-http")
            .arg(self.http_address().to_string());
        if let Some(size) = &self.setup.store_size {
            command.arg("--store-size").arg(size);
        }
        if self.setup.own_tail {
            command.arg("--tail-dir").arg(self.data.join("tail"));
        } else {
            command.arg("--tail-dir").arg(self.scratch.memory());
        }
        if !self.setup.nbd.is_empty() {
            command
                .arg("--listen-nbd")
                .arg(format!("unix:{}", self.data.join("nbd.sock").display()));
        }
        for address in &self.setup.nbd {
            command.arg("--listen-nbd").arg(address);
        }
        command.args(&self.setup.arguments);
        if let Some(plan) = &self.setup.fault {
            command.arg("--fault").arg(plan);
        }
        // What the person who runs the tests has set must not decide their outcome.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ASHLAR_")) {
            command.env_remove(name);
        }
        command.envs(
            self.setup
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        );
        command.stdin(Stdio::null());
        command
    }

    /// Starts it without waiting.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "already running");
        if self.setup.own_tail {
            std::fs::create_dir_all(self.data.join("tail")).expect("a directory for the tail");
        }
        let open = || {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(self.log.path())
                .expect("the log can be opened")
        };
        let mut command = self.command();
        command.stdout(open()).stderr(open());
        self.process = Some(Group::spawn(&mut command).expect("ashlard starts"));
    }

    /// Starts it and waits until it says it is ready. Returns how long that took.
    pub fn start(&mut self) -> Duration {
        let start = Instant::now();
        self.spawn();
        self.wait_ready();
        start.elapsed()
    }

    pub fn wait_ready(&mut self) {
        let address = self.http_address();
        wait::until(READY_LIMIT, "ashlard is ready", || {
            match http::get_from(address, "/readyz") {
                Ok((200, _)) => Ok(()),
                other => {
                    if let Some(status) = self.process().exited() {
                        panic!(
                            "ashlard ended with {} before it was ready:\n{}",
                            describe(status),
                            self.log.tail()
                        );
                    }
                    Err(format!("{other:?}\n{}", self.log.tail()))
                }
            }
        });
    }

    /// Starts it and waits until it is ready (true) or has given up with an exit code (false).
    pub fn start_or_end(&mut self) -> bool {
        self.spawn();
        let address = self.http_address();
        let ready = wait::until(READY_LIMIT, "ashlard is ready or ends", || {
            if let Ok((200, _)) = http::get_from(address, "/readyz") {
                return Ok(true);
            }
            match self.process().exited() {
                Some(status) if status.code().is_some_and(|code| code != 0) => Ok(false),
                Some(status) => panic!("{}:\n{}", describe(status), self.log.tail()),
                None => Err(self.log.tail()),
            }
        });
        if !ready {
            self.process = None;
        }
        ready
    }

    /// Starts it, expects it to give up, and returns what it said.
    pub fn start_refused(&mut self) -> String {
        let before = self.log.text().len();
        self.spawn();
        let ended = self.process().wait(READY_LIMIT);
        let status =
            ended.unwrap_or_else(|| panic!("ashlard should refuse to start:\n{}", self.log.tail()));
        self.process = None;
        let said = self.log.text()[before..].to_owned();
        assert!(
            status.code().is_some_and(|code| code != 0),
            "{}:\n{said}",
            describe(status)
        );
        assert!(!said.contains("panicked at"), "{said}");
        said
    }

    pub fn process(&mut self) -> &mut Group {
        self.process.as_mut().expect("the daemon runs")
    }

    pub fn is_running(&mut self) -> bool {
        self.process
            .as_mut()
            .is_some_and(|process| process.exited().is_none())
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").pid()
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(&mut self) {
        let status = self.process().kill();
        self.process = None;
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(
            status.signal(),
            Some(9),
            "it had ended by itself: {}\n{}",
            describe(status),
            self.log.tail()
        );
    }

    /// SIGTERM, and gone with exit code 0 when this returns. Returns how long that took.
    pub fn stop(&mut self) -> Duration {
        let start = Instant::now();
        self.terminate();
        let status = self.wait_ended(STOP_LIMIT);
        assert!(
            status.success(),
            "after SIGTERM: {}\n{}",
            describe(status),
            self.log.tail()
        );
        start.elapsed()
    }

    /// Sends SIGTERM and does not wait.
    pub fn terminate(&mut self) {
        self.process().signal(Signal::TERM);
    }

    pub fn wait_ended(&mut self, limit: Duration) -> ExitStatus {
        let ended = self.process().wait(limit);
        let status =
            ended.unwrap_or_else(|| panic!("still running after {limit:?}:\n{}", self.log.tail()));
        self.process = None;
        status
    }

    pub fn usage(&self) -> Usage {
        usage(self.pid()).expect("a running process has a /proc")
    }

    /// The `ashlar` command line, pointed at this daemon.
    pub fn admin(&self) -> Admin {
        Admin::new(&self.data.join("admin.sock"))
    }

    pub fn metrics(&self) -> Metrics {
        let (code, text) =
            http::get_from(self.http_address(), "/metrics").expect("/metrics answers");
        assert_eq!(code, 200, "{text}");
        Metrics::parse(&text).expect("Prometheus text")
    }

    /// The default NBD socket.
    pub fn address(&self) -> Address {
        Address::Unix(self.data.join("nbd.sock"))
    }

    /// The NBD URI of a volume on the default socket.
    pub fn uri(&self, volume: &str) -> String {
        self.address().uri(volume)
    }

    /// A connection of the tests' own client.
    pub fn open(&self, volume: &str, wishes: Wishes) -> Transmission {
        self.try_open(volume, wishes)
            .unwrap_or_else(|error| panic!("{volume}: {error}\n{}", self.log.tail()))
    }

    /// The same, once the volume is served: in a cluster its replicas are sealed after the daemon is ready.
    pub fn open_when_served(&self, volume: &str, wishes: Wishes) -> Transmission {
        wait::until(READY_LIMIT, "the volume is served", || {
            self.try_open(volume, wishes)
                .map_err(|error| format!("{volume}: {error}\n{}", self.log.tail()))
        })
    }

    pub fn try_open(&self, volume: &str, wishes: Wishes) -> Result<Transmission, Failure> {
        nbd::open(&self.address(), volume, wishes)
    }

    /// Creates a volume.
    pub fn create(&self, volume: &str, size: &str) {
        self.admin()
            .run(["volume", "create", volume, "--size", size]);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let ended = process.exited();
            process.kill();
            if let Some(status) = ended
                && !std::thread::panicking()
            {
                panic!(
                    "ashlard had ended with {}:\n{}",
                    describe(status),
                    self.log.tail()
                );
            }
        }
        if std::thread::panicking() {
            eprintln!(
                "--- the end of {}\n{}",
                self.log.path().display(),
                self.log.tail()
            );
        } else {
            self.log.check();
        }
    }
}
