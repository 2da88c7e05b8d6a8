//! The program: settings, what they make, and running it.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::address::Address;
use crate::attach::fuse::FuseLoop;
use crate::attach::kernel::{KernelNbd, Settings as KernelSettings};
use crate::attach::{Attach, DeviceKind};
use crate::daemon::Daemon;
use crate::failpoint;
use crate::node::{Node, Settings as NodeSettings, keep_connected};
use crate::service::Spec;
use crate::service::controller::Controller as ControllerService;
use crate::service::identity::Identity as IdentityService;
use crate::service::node::{Node as NodeService, Placement};
use crate::service::server::{self, Services};

/// Key of the topology that every node has. Not a segment a node: a volume is bound to the segments there are when it
/// is made, and nodes that come later shall reach it too.
const ZONE_KEY: &str = "topology.csi.ashlar.io/zone";
/// Between two attempts to make this node known to a daemon that does not answer, and after one that did: a daemon that
/// lost its records learns of the node again.
const REGISTER_RETRY: Duration = Duration::from_secs(5);
const REGISTER_AGAIN: Duration = Duration::from_secs(300);

/// The CSI driver of Ashlar.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ashlar-csi",
    version,
    after_help = "Other front ends: `ashlar-csi docker`, `ashlar-csi flexvolume COMMAND ...`, `ashlar-csi flexvolume-install DIR`, \
                  `ashlar-csi flexvolume-keep`"
)]
pub struct Arguments {
    /// Which services to serve beside Identity
    #[arg(long, env = "ASHLAR_CSI_MODE", value_enum, default_value_t = Mode::All)]
    pub mode: Mode,
    /// Where to serve: unix:///path/csi.sock
    #[arg(long, env = "CSI_ENDPOINT", value_parser = server::endpoint, default_value = "unix:///run/ashlar-csi/csi.sock")]
    pub endpoint: PathBuf,
    /// The daemon's administrative interface: unix:/path or tcp:HOST:PORT; in controller mode more than once for daemons of
    /// one cluster, of which the first that answers is asked
    #[arg(
        long,
        env = "ASHLAR_CSI_DAEMON",
        value_delimiter = ',',
        default_value = "unix:/run/ashlar/admin.sock"
    )]
    pub daemon: Vec<Address>,
    /// Directory with the certificate that a cluster's daemons want to see over TCP, as `ashlar cluster client-cert NAME
    /// --role admin` makes it
    #[arg(long, env = "ASHLAR_CSI_DAEMON_CERTIFICATES")]
    pub daemon_certificates: Option<PathBuf>,
    /// Version of the interface to advertise
    #[arg(long, env = "ASHLAR_CSI_SPEC", value_enum, default_value_t = Spec::V1_12)]
    pub spec: Spec,
    /// What the orchestrator calls this node [default: the host's name]
    #[arg(long, env = "ASHLAR_CSI_NODE_ID")]
    pub node_id: Option<String>,
    /// Where this node is: KEY=VALUE, more than once for more; topology.csi.ashlar.io/zone is `default` where not given
    #[arg(long, env = "ASHLAR_CSI_TOPOLOGY", value_parser = segment, value_delimiter = ',')]
    pub topology: Vec<(String, String)>,
    /// Volumes a node takes at a time, told to the scheduler and kept by the controller; 0 is no bound
    #[arg(long, env = "ASHLAR_CSI_MAX_VOLUMES", default_value_t = 128)]
    pub max_volumes: u32,
    /// Directory below which staging and target paths lie; more than once for more
    #[arg(
        long = "kubelet-dir",
        env = "ASHLAR_CSI_KUBELET_DIR",
        value_delimiter = ',',
        default_value = "/var/lib/kubelet"
    )]
    pub roots: Vec<PathBuf>,
    /// What the node plugin remembers over restarts
    #[arg(
        long,
        env = "ASHLAR_CSI_STATE_DIR",
        default_value = "/var/lib/ashlar-csi"
    )]
    pub state_dir: PathBuf,
    /// How to make devices: the kernel's NBD driver, or nbdfuse and a loop device where there is none
    #[arg(long, env = "ASHLAR_CSI_ATTACH", value_enum, default_value_t = Way::Auto)]
    pub attach: Way,
    /// NBD connections of a device
    #[arg(long, env = "ASHLAR_CSI_NBD_CONNECTIONS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub nbd_connections: u32,
    /// Seconds after which a request is taken for lost and sent again
    #[arg(long, env = "ASHLAR_CSI_NBD_TIMEOUT", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub nbd_timeout: u64,
    /// Seconds that requests wait for a daemon to come back before they fail
    #[arg(long, env = "ASHLAR_CSI_NBD_DEAD_TIMEOUT", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub nbd_dead_timeout: u64,
    /// Seconds that an unstage waits for a daemon that does not answer before it gives up what was not written yet
    #[arg(long, env = "ASHLAR_CSI_UNSTAGE_PATIENCE", default_value_t = 30)]
    pub unstage_patience: u64,
    /// Whether FlexVolume uses every volume, also those that were made for claims or by Docker: whoever may write a pod can then
    /// use all of them
    #[arg(long, env = "ASHLAR_CSI_FLEXVOLUME_ANY_VOLUME", default_value_t = false, action = clap::ArgAction::Set)]
    pub flexvolume_any_volume: bool,
    /// What to log, as in `info` or `ashlar_csi=debug`
    #[arg(long, env = "ASHLAR_CSI_LOG", default_value = "info")]
    pub log: String,
    /// How to log, to standard error
    #[arg(long, env = "ASHLAR_CSI_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Dies at a named point, for tests
    #[arg(long, hide = true)]
    pub fail_point: Option<String>,
}

/// Which services are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Controller.
    Controller,
    /// Node.
    Node,
    /// Both.
    All,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// How devices are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// The kernel's driver where there is one.
    Auto,
    /// The kernel's driver.
    Kernel,
    /// nbdfuse and a loop device.
    Fuse,
}

fn segment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value))
            if !key.is_empty() && !value.is_empty() && key.len() <= 127 && value.len() <= 63 =>
        {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// A bare level is meant for what this project logs, as with the daemon: at `debug` an HTTP/2 library would write a line for
/// every frame.
fn own_level(filter: &str) -> String {
    match filter.parse::<tracing::Level>() {
        Ok(level) if level > tracing::Level::INFO => format!("info,ashlar_csi={level}"),
        _ => filter.to_owned(),
    }
}

/// Starts the log, on standard error.
pub fn start_log(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    let filter =
        EnvFilter::try_new(own_level(filter)).with_context(|| format!("--log {filter}"))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// Makes a state directory, for this user alone, where there is none, and answers its real path: the kernel's tables have no
/// other.
pub fn open_state_directory(directory: &Path) -> anyhow::Result<PathBuf> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("making {}", directory.display()))?;
    directory
        .canonicalize()
        .with_context(|| format!("finding {}", directory.display()))
}

/// Runs the driver until it is told to stop.
pub async fn run(mut arguments: Arguments) -> anyhow::Result<()> {
    if let Some(name) = &arguments.fail_point {
        failpoint::arm(name).map_err(|error| anyhow!(error))?;
    }
    let daemon = the_daemon(&arguments, arguments.mode == Mode::Controller)?;
    let node = match arguments.mode {
        Mode::Controller => None,
        Mode::Node | Mode::All => {
            arguments.state_dir = open_state_directory(&arguments.state_dir)?;
            Some(prepare_node(&arguments, daemon.clone()).await?)
        }
    };
    let controller = match arguments.mode {
        Mode::Node => None,
        Mode::Controller | Mode::All => Some(ControllerService::new(
            daemon.clone(),
            arguments.max_volumes,
            arguments.spec,
        )),
    };
    if let Some(parent) = arguments.endpoint.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    let listener = server::listen(&arguments.endpoint)
        .await
        .with_context(|| format!("listening at {}", arguments.endpoint.display()))?;
    let services = Services {
        identity: IdentityService::new(daemon, arguments.spec),
        controller,
        node,
    };
    tracing::info!(endpoint = %arguments.endpoint.display(), mode = ?arguments.mode, "serving");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    };
    server::serve(listener, services, stop).await?;
    let _ = std::fs::remove_file(&arguments.endpoint);
    Ok(())
}

/// The daemon to ask. What a node uses is served by the daemon beside it, so a node has one.
pub fn the_daemon(arguments: &Arguments, may_be_several: bool) -> anyhow::Result<Daemon> {
    if arguments.daemon.len() > 1 && !may_be_several {
        return Err(anyhow!(
            "--daemon is given more than once, and a node has one daemon, the one beside it; several are for --mode controller"
        ));
    }
    Ok(Daemon::new(
        &arguments.daemon,
        arguments.daemon_certificates.as_deref(),
    )?)
}

/// Every way of attaching, and the one to use from now on. What is attached in another way is still seen and handled: a
/// device that is not seen would be made a second time.
pub async fn attachers(
    arguments: &Arguments,
) -> anyhow::Result<(Vec<Arc<dyn Attach>>, DeviceKind)> {
    let kernel_is_there = arguments.attach != Way::Fuse && KernelNbd::is_there().await;
    let preferred = match arguments.attach {
        Way::Kernel if !kernel_is_there => {
            return Err(anyhow!(
                "the kernel is older than 5.14, or has no nbd driver and the module cannot be loaded; load it on the host \
                 (modprobe nbd), or use --attach fuse"
            ));
        }
        Way::Auto | Way::Kernel if kernel_is_there => DeviceKind::KernelNbd,
        Way::Auto | Way::Kernel | Way::Fuse => DeviceKind::FuseLoop,
    };
    let fuse = FuseLoop::new(arguments.state_dir.join("fuse"), arguments.nbd_connections);
    let kernel = KernelNbd::new(KernelSettings {
        connections: arguments.nbd_connections,
        request_timeout: Duration::from_secs(arguments.nbd_timeout),
        dead_connection_timeout: Duration::from_secs(arguments.nbd_dead_timeout),
    });
    Ok((vec![Arc::new(kernel), Arc::new(fuse)], preferred))
}

/// The operations of this node, in line with the system.
pub async fn open_node(
    arguments: &Arguments,
    node_id: &str,
    daemon: Daemon,
) -> anyhow::Result<Arc<Node>> {
    let (attachers, preferred) = attachers(arguments).await?;
    let settings = NodeSettings {
        node_id: node_id.to_owned(),
        state_directory: arguments.state_dir.clone(),
        roots: arguments.roots.clone(),
        preferred,
        patience: Duration::from_secs(arguments.unstage_patience),
    };
    let node = Arc::new(Node::new(settings, daemon, attachers)?);
    node.reconcile().await?;
    tracing::info!(attach = ?preferred, "the node is in line with what it remembers");
    Ok(node)
}

/// What this node is called: as given, or the host's name with `suffix`.
pub fn node_id(arguments: &Arguments, suffix: &str) -> anyhow::Result<String> {
    let id = match &arguments.node_id {
        Some(id) => id.clone(),
        None => {
            let name = rustix::system::uname();
            let name = name
                .nodename()
                .to_str()
                .context("the host's name is not text; give --node-id")?;
            format!("{name}{suffix}")
        }
    };
    crate::service::convert::node_id(&id)?;
    Ok(id)
}

async fn prepare_node(arguments: &Arguments, daemon: Daemon) -> anyhow::Result<NodeService> {
    let node_id = node_id(arguments, "")?;
    let mut topology: BTreeMap<String, String> = arguments.topology.iter().cloned().collect();
    topology
        .entry(ZONE_KEY.to_owned())
        .or_insert_with(|| "default".to_owned());
    let placement = Placement {
        node_id,
        topology,
        max_volumes: arguments.max_volumes,
    };
    let node = open_node(arguments, &placement.node_id, daemon).await?;
    tokio::spawn(keep_connected(Arc::clone(&node)));
    tokio::spawn(keep_registered(
        node.daemon().clone(),
        placement.node_id.clone(),
        placement.topology.clone(),
    ));
    Ok(NodeService::new(node, placement, arguments.spec))
}

/// Keeps a node known to the daemon until the task is dropped.
pub async fn keep_registered(daemon: Daemon, node_id: String, topology: BTreeMap<String, String>) {
    loop {
        let next = match daemon.register(&node_id, &topology).await {
            Ok(()) => REGISTER_AGAIN,
            Err(error) => {
                tracing::debug!(%error, "the node could not be registered yet");
                REGISTER_RETRY
            }
        };
        tokio::time::sleep(next).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_is_about_this_project() {
        assert_eq!(own_level("debug"), "info,ashlar_csi=DEBUG");
        for as_it_is in ["info", "warn", "h2=trace", "info,ashlar_csi=debug"] {
            assert_eq!(own_level(as_it_is), as_it_is);
        }
    }
}
