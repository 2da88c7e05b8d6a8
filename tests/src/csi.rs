//! A real `ashlar-csi` over a real daemon, and everything it leaves in the system taken away at the end.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

pub use ashlar_csi::csi;
use ashlar_csi::csi::controller_client::ControllerClient;
use ashlar_csi::csi::identity_client::IdentityClient;
use ashlar_csi::csi::node_client::NodeClient;
use ashlar_csi::csi::volume_capability::access_mode::Mode;
use ashlar_csi::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::daemon::{Daemon, Setup, binary};
use crate::log::Log;
use crate::process::{Group, Usage, describe, usage};
use crate::tool::Tool;
use crate::wait;

/// Longest wait for the driver to serve. It may have devices to clear away first.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Longest call: as long as the kubelet waits.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// The driver, its daemon, and what they have in the system. The driver goes first.
pub struct Driver {
    plugin: Plugin,
    pub daemon: Daemon,
}

/// A driver beside a daemon, and what it has in the system.
pub struct Plugin {
    /// Of its daemon: below it is everything the driver makes.
    scratch: PathBuf,
    /// `--daemon`.
    admin: String,
    log: Log,
    root: PathBuf,
    node_id: String,
    arguments: Vec<String>,
    process: Option<Group>,
    runtime: tokio::runtime::Runtime,
}

/// What a call was answered: the message, or the code and its words.
pub type Answer<T> = Result<T, (Code, String)>;

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

/// The socket of a daemon's admin interface, as the driver is told it.
fn admin_of(daemon: &Daemon) -> String {
    format!("unix:{}", daemon.data_dir().join("admin.sock").display())
}

impl Plugin {
    /// A driver on the machine of a daemon, as the node `node_id`, that is not started yet. To be dropped before it.
    pub fn beside(daemon: &Daemon, node_id: &str) -> Plugin {
        let root = daemon.scratch.join("k");
        fs::create_dir(&root).expect("a directory");
        Plugin {
            scratch: daemon.scratch.path().to_owned(),
            admin: admin_of(daemon),
            log: Log::new(daemon.scratch.join("csi.log")),
            root,
            node_id: node_id.to_owned(),
            arguments: Vec::new(),
            process: None,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime"),
        }
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
            .arg(&self.root)
            .args(["--node-id", &self.node_id])
            .args(["--attach", "fuse", "--log", "info,ashlar_csi=debug"])
            .args(&self.arguments)
            .args(more);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ASHLAR_")) {
            command.env_remove(name);
        }
        command.env_remove("CSI_ENDPOINT");
        command
    }

    /// Starts the driver with `more` arguments and waits until it answers.
    pub fn start_driver(&mut self, more: &[&str]) {
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

    pub fn socket(&self) -> PathBuf {
        self.scratch.join("csi.sock")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.scratch.join("s")
    }

    /// Below which the orchestrator's paths lie.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn log_tail(&self) -> String {
        self.log.tail()
    }

    pub fn log_text(&self) -> String {
        self.log.text()
    }

    /// A connection, made when it is first used.
    pub fn channel(&self) -> Channel {
        let _inside = self.runtime.enter();
        Endpoint::from_shared(format!("unix:{}", self.socket().display()))
            .expect("an address")
            .timeout(CALL_LIMIT)
            .connect_lazy()
    }

    /// Runs many calls at once.
    pub fn together<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// Runs a call, whatever thread it comes from.
    pub fn call<T, F>(&self, work: impl FnOnce(Channel) -> F) -> Answer<T>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let channel = self.channel();
        match self.runtime.block_on(work(channel)) {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => {
                assert!(status.details().is_empty(), "details must be empty");
                assert!(
                    !status.message().is_empty(),
                    "{:?} without words",
                    status.code()
                );
                Err((status.code(), status.message().to_owned()))
            }
        }
    }

    pub fn plugin_info(&self) -> Answer<csi::GetPluginInfoResponse> {
        self.call(|channel| async move {
            IdentityClient::new(channel)
                .get_plugin_info(csi::GetPluginInfoRequest {})
                .await
        })
    }

    pub fn probe(&self) -> Answer<Option<bool>> {
        let answer = self.call(|channel| async move {
            IdentityClient::new(channel)
                .probe(csi::ProbeRequest {})
                .await
        })?;
        Ok(answer.ready)
    }

    /// Makes another node known to the daemon.
    pub fn register_node(&self, node: &str) {
        use ashlar_proto::admin;
        let address = self.admin.clone();
        let registered = self.runtime.block_on(async {
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

    pub fn expand(&self, id: &str, size: i64) -> Answer<csi::ControllerExpandVolumeResponse> {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            ..Default::default()
        };
        self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_expand_volume(request)
                .await
        })
    }

    pub fn modify(
        &self,
        id: &str,
        parameters: &[(&str, &str)],
    ) -> Answer<csi::ControllerModifyVolumeResponse> {
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: id.to_owned(),
            mutable_parameters: strings(parameters),
            ..Default::default()
        };
        self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_modify_volume(request)
                .await
        })
    }

    /// What the controller says is wrong with a volume.
    pub fn health(&self, id: &str) -> Answer<Vec<String>> {
        let request = csi::ControllerGetVolumeHealthRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_get_volume_health(request)
                .await
        })?;
        let health = answer.volume_health.expect("a volume's health");
        let entries = health.health_statuses.into_iter();
        Ok(entries.map(|entry| entry.message).collect())
    }

    pub fn create(&self, request: csi::CreateVolumeRequest) -> Answer<csi::Volume> {
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel).create_volume(request).await
        })?;
        Ok(answer.volume.expect("an answer has its volume"))
    }

    pub fn delete(&self, id: &str) -> Answer<csi::DeleteVolumeResponse> {
        let request = csi::DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            |channel| async move { ControllerClient::new(channel).delete_volume(request).await },
        )
    }

    pub fn controller_publish(
        &self,
        request: csi::ControllerPublishVolumeRequest,
    ) -> Answer<HashMap<String, String>> {
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_publish_volume(request)
                .await
        })?;
        Ok(answer.publish_context)
    }

    pub fn controller_unpublish(
        &self,
        id: &str,
        node: &str,
    ) -> Answer<csi::ControllerUnpublishVolumeResponse> {
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            ..Default::default()
        };
        self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_unpublish_volume(request)
                .await
        })
    }

    pub fn stage(
        &self,
        request: csi::NodeStageVolumeRequest,
    ) -> Answer<csi::NodeStageVolumeResponse> {
        self.call(
            |channel| async move { NodeClient::new(channel).node_stage_volume(request).await },
        )
    }

    pub fn unstage(&self, id: &str, staging: &Path) -> Answer<csi::NodeUnstageVolumeResponse> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: text(staging),
        };
        self.call(
            |channel| async move { NodeClient::new(channel).node_unstage_volume(request).await },
        )
    }

    pub fn publish(
        &self,
        request: csi::NodePublishVolumeRequest,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        self.call(
            |channel| async move { NodeClient::new(channel).node_publish_volume(request).await },
        )
    }

    pub fn unpublish(&self, id: &str, target: &Path) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: text(target),
        };
        self.call(|channel| async move {
            NodeClient::new(channel)
                .node_unpublish_volume(request)
                .await
        })
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
        if std::thread::panicking() {
            eprintln!(
                "--- the end of {}\n{}",
                self.log.path().display(),
                self.log.tail()
            );
        }
    }
}

fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("there is a /proc");
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(directory))
        .collect()
}

fn loops_below(directory: &Path) -> Vec<String> {
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

pub fn text(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

fn strings(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// A capability to mount, with the file system asked for.
pub fn mounted(fs_type: &str, mode: Mode) -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            ..Default::default()
        })),
    }
}

/// A capability to use the raw device.
pub fn raw(mode: Mode) -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

/// One volume on its way from creation to a workload and back.
pub struct Claim {
    pub id: String,
    pub capability: csi::VolumeCapability,
    pub publish_context: HashMap<String, String>,
    pub volume_context: HashMap<String, String>,
    pub staging: PathBuf,
    pub target: PathBuf,
}

impl Claim {
    /// Created and published to the node.
    pub fn new(driver: &Plugin, name: &str, size: i64, capability: csi::VolumeCapability) -> Claim {
        let mut claim = Claim::unpublished(driver, name, size, capability);
        claim.publish_context = claim.controller_publish(driver, false).expect("published");
        claim
    }

    /// Created.
    pub fn unpublished(
        driver: &Plugin,
        name: &str,
        size: i64,
        capability: csi::VolumeCapability,
    ) -> Claim {
        Claim::of_class(driver, name, size, capability, &[]).expect("created")
    }

    /// Created with the parameters of a class, or why not.
    pub fn of_class(
        driver: &Plugin,
        name: &str,
        size: i64,
        capability: csi::VolumeCapability,
        parameters: &[(&str, &str)],
    ) -> Answer<Claim> {
        let volume = driver.create(csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability.clone()],
            parameters: strings(parameters),
            ..Default::default()
        })?;
        let claim = Claim {
            id: volume.volume_id,
            capability,
            publish_context: HashMap::new(),
            volume_context: volume.volume_context,
            staging: driver.root().join(format!("staging-{name}")),
            target: driver.root().join(format!("target-{name}")),
        };
        fs::create_dir_all(&claim.staging).expect("a staging directory");
        Ok(claim)
    }

    /// The same volume where another node has it, published to nobody there yet.
    pub fn on(&self, driver: &Plugin) -> Claim {
        let moved = |path: &Path| driver.root().join(path.file_name().expect("a name"));
        let claim = Claim {
            id: self.id.clone(),
            capability: self.capability.clone(),
            publish_context: self.publish_context.clone(),
            volume_context: self.volume_context.clone(),
            staging: moved(&self.staging),
            target: moved(&self.target),
        };
        fs::create_dir_all(&claim.staging).expect("a staging directory");
        claim
    }

    /// Published to a node by the driver of another.
    pub fn publish_to(&self, driver: &Plugin, node: &str) -> Answer<HashMap<String, String>> {
        driver.controller_publish(csi::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: node.to_owned(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        })
    }

    pub fn controller_publish(
        &self,
        driver: &Plugin,
        readonly: bool,
    ) -> Answer<HashMap<String, String>> {
        driver.controller_publish(csi::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: driver.node_id.clone(),
            volume_capability: Some(self.capability.clone()),
            readonly,
            ..Default::default()
        })
    }

    pub fn stage(&self, driver: &Plugin) -> Answer<()> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: text(&self.staging),
            volume_capability: Some(self.capability.clone()),
            volume_context: self.volume_context.clone(),
            ..Default::default()
        };
        driver.stage(request).map(drop)
    }

    pub fn publish_at(&self, driver: &Plugin, target: &Path, readonly: bool) -> Answer<()> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: text(&self.staging),
            target_path: text(target),
            volume_capability: Some(self.capability.clone()),
            readonly,
            volume_context: self.volume_context.clone(),
            ..Default::default()
        };
        driver.publish(request).map(drop)
    }

    pub fn publish(&self, driver: &Plugin) -> Answer<()> {
        self.publish_at(driver, &self.target, false)
    }

    pub fn unpublish(&self, driver: &Plugin) -> Answer<()> {
        driver.unpublish(&self.id, &self.target).map(drop)
    }

    pub fn unstage(&self, driver: &Plugin) -> Answer<()> {
        driver.unstage(&self.id, &self.staging).map(drop)
    }

    pub fn controller_unpublish(&self, driver: &Plugin) -> Answer<()> {
        driver
            .controller_unpublish(&self.id, &driver.node_id)
            .map(drop)
    }

    /// All the way to a workload.
    pub fn bring_up(&self, driver: &Plugin) {
        self.stage(driver).expect("staged");
        self.publish(driver).expect("published");
    }

    /// All the way back, and deleted.
    pub fn take_away(&self, driver: &Plugin) {
        self.unpublish(driver).expect("unpublished");
        self.unstage(driver).expect("unstaged");
        self.controller_unpublish(driver)
            .expect("taken from the node");
        driver.delete(&self.id).expect("deleted");
    }
}
