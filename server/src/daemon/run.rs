//! From the command line to the last byte of a drain.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_proto::admin::ListenerKind;
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::data_plane::Host;
use super::lock::{DataDirError, DataDirLock};
use super::metadata::{MetadataOpenError, OpenMetadata, certificate_names};
use super::notify::{Notice, notify};
use super::state::{ClusterServices, Phase, Services, State};
use super::stores::{self, StoreSetupError};
use super::{logging, process};
use crate::config::{
    Address, Arguments, Config, ConfigError, HttpListen, LogFormat, parse_arguments,
};
use crate::controller::Controller;
use crate::data::{DataConfig, DataPlane, Limits, StartError};
use crate::http::{self, HttpBindError};
use crate::identity::keep_renewed;
use crate::meta::MetadataError;
use crate::nbd::activation::{self, ActivationError, Purpose};
use crate::nbd::socket::{self, BindError, Bound, Reach};
use crate::nbd::{ListenerConfig, Listeners, Security};
use crate::plane::Plane;
use crate::replication::{self, Dial, Driver, LinkListenError, Network, NoPeers, Seals};
use crate::scrubs::Scrubs;
use crate::volumes::{VolumeError, VolumeHost, Volumes};

/// Exit code of a command line or configuration that makes no sense; clap's for flags it refuses.
const EXIT_USAGE: u8 = 2;
/// Exit code of everything else that keeps a daemon from starting.
const EXIT_FAILED: u8 = 1;
/// Threads of the control plane: one may wait for a name service or a disk while the other answers.
const CONTROL_THREADS: usize = 2;

/// Why a daemon did not start. One sentence each, which says what to do.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// Settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A Unix or TCP socket.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The HTTP port.
    #[error(transparent)]
    Http(#[from] HttpBindError),
    /// Sockets of the service manager.
    #[error("the sockets given by the service manager cannot be used: {0}")]
    Activation(#[from] ActivationError),
    /// Where the metadata is.
    #[error(transparent)]
    Metadata(#[from] MetadataOpenError),
    /// Links of other nodes.
    #[error(transparent)]
    Links(#[from] LinkListenError),
    /// The metadata itself.
    #[error(transparent)]
    Records(#[from] MetadataError),
    /// Where stores are to be.
    #[error(transparent)]
    StoreSetup(#[from] StoreSetupError),
    /// A store.
    #[error(transparent)]
    Data(#[from] StartError),
    /// The volumes' records.
    #[error(transparent)]
    Volumes(#[from] VolumeError),
    /// Something of the system that should always work.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

impl DaemonError {
    fn exit_code(&self) -> ExitCode {
        match self {
            DaemonError::Config(_) => ExitCode::from(EXIT_USAGE),
            _ => ExitCode::from(EXIT_FAILED),
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> DaemonError {
    move |source| DaemonError::System { what, source }
}

/// Runs `ashlard` with this command line until it has drained.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = parse_arguments(arguments);
    let config = match Config::resolve(&arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("ashlard: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if arguments.print_config {
        return print_config(&arguments, &config);
    }
    logging::start(config.log_format, &config.log_level);
    logging::abort_on_panic();
    let format = config.log_format;
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match format {
                // The sentence is all a person at a terminal needs.
                LogFormat::Text => eprintln!("ashlard: {error}"),
                // A collector of logs reads nothing but objects.
                LogFormat::Json => tracing::error!("{error}"),
            }
            error.exit_code()
        }
    }
}

fn print_config(_: &Arguments, config: &Config) -> ExitCode {
    match std::io::stdout().write_all(config.to_toml().as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read it has gone away.
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

fn serve(config: Config) -> Result<(), DaemonError> {
    // Everything this process makes is for its owner only.
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    let given = activation::take()?;
    // Before any thread is started: threads inherit it.
    if config.io_flusher
        && let Err(error) = process::become_io_flusher()
    {
        tracing::warn!(%error, "io-flusher was asked for and is not possible here (it needs CAP_SYS_RESOURCE)");
    }
    if let Some(score) = config.oom_score_adjust
        && let Err(error) = process::adjust_oom_score(score)
    {
        tracing::warn!(%error, score, "oom-score-adjust was asked for and is not possible here");
    }
    process::raise_open_files_limit();
    process::raise_locked_memory_limit();
    let _lock = DataDirLock::take(&config.data_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(system("the control threads cannot be started"))?;
    let served = runtime.block_on(Daemon::run(config, given));
    // Nothing that is still running matters any more: what was acknowledged is where it has to be.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
}

/// The signals that end a daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// A terminal that is closed.
    hang_up: Signal,
}

impl Signals {
    fn listen() -> Result<Signals, DaemonError> {
        let listen = |kind| signal(kind).map_err(system("signals cannot be received"));
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hang_up.recv() => "SIGHUP",
        }
    }
}

/// Sockets that were bound before anything else was tried, so that what is taken is told at once, and so that clients
/// that connect during a recovery wait for it instead of being refused.
struct Sockets {
    nbd: Vec<Bound>,
    admin: Vec<Bound>,
}

impl Sockets {
    fn bind(state: &State, given: Vec<activation::Activated>) -> Result<Sockets, DaemonError> {
        let config = state.config();
        let reach = if config.is_clustered() {
            Reach::Anywhere
        } else {
            Reach::Loopback
        };
        let mut sockets = Sockets {
            nbd: Vec::new(),
            admin: Vec::new(),
        };
        for socket in given {
            let bound = Bound::given(&socket.name, socket.fd)?;
            match socket.purpose {
                Purpose::Nbd => sockets.nbd.push(bound),
                Purpose::Admin => sockets.admin.push(bound),
                // One that cannot be taken would leave its clients waiting for ever.
                Purpose::Http => {
                    tracing::warn!(
                        name = socket.name,
                        "http sockets are not taken from the service manager; use --listen-http"
                    );
                }
            }
        }
        bind_others(&mut sockets.nbd, &config.listen_nbd, reach)?;
        bind_others(&mut sockets.admin, &config.listen_admin, reach)?;
        for bound in &sockets.nbd {
            state.add_listener(ListenerKind::Nbd, bound.to_string());
        }
        for bound in &sockets.admin {
            state.add_listener(ListenerKind::Admin, bound.to_string());
        }
        Ok(sockets)
    }
}

/// Binds the addresses that the service manager has no socket for: one of its takes the place of ours at the same address,
/// and of no other.
fn bind_others(
    bound: &mut Vec<Bound>,
    addresses: &[Address],
    reach: Reach,
) -> Result<(), DaemonError> {
    for address in addresses {
        let is_given = bound
            .iter()
            .any(|one| one.to_string() == address.to_string());
        if !is_given {
            bound.extend(socket::bind(address, reach)?);
        }
    }
    Ok(())
}

/// A daemon that serves.
pub(super) struct Daemon {
    state: Arc<State>,
    plane: DataPlane,
    volumes: Arc<Volumes>,
    listeners: Listeners,
    /// Ends the admin and HTTP servers, and the scrubs.
    stop_interfaces: watch::Sender<bool>,
    interfaces: tokio::task::JoinSet<()>,
}

impl Daemon {
    async fn run(config: Config, given: Vec<activation::Activated>) -> Result<(), DaemonError> {
        let mut signals = Signals::listen()?;
        let drain_timeout = config.drain_timeout;
        let starting = Daemon::start(config, given);
        let daemon = tokio::select! {
            started = starting => started?,
            // Nothing was promised to anybody yet; a store that is being recovered takes that up again.
            name = signals.next() => {
                tracing::info!(signal = name, "stopped before it was ready");
                return Ok(());
            }
        };
        notify(Notice::Ready);
        let name = signals.next().await;
        tracing::info!(
            signal = name,
            "draining: a second signal ends without waiting for clients"
        );
        notify(Notice::Stopping);
        tokio::select! {
            () = daemon.drain(drain_timeout) => tracing::info!("stopped"),
            name = signals.next() => {
                // What was acknowledged survives this as it survives SIGKILL; the next start replays the log.
                tracing::warn!(signal = name, "stopped without finishing the drain");
            }
        }
        Ok(())
    }

    pub(super) async fn start(
        config: Config,
        given: Vec<activation::Activated>,
    ) -> Result<Daemon, DaemonError> {
        tracing::info!(version = crate::VERSION, pid = std::process::id(), data_dir = %config.data_dir.display(), "ashlard starts");
        let state = Arc::new(State::new(config));
        let config = state.config();
        state.begin_step("sockets are being opened");
        let sockets = Sockets::bind(&state, given)?;
        let (stop_interfaces, stopped) = watch::channel(false);
        let mut interfaces = tokio::task::JoinSet::new();
        if let HttpListen::On(address) = &config.listen_http {
            let (listener, local) = http::bind(address)?;
            state.add_listener(ListenerKind::Http, format!("tcp:{local}"));
            if !local.ip().is_loopback() {
                tracing::info!(%local, "metrics and health can be read from other machines");
            }
            let serving = http::serve(listener, state.clone(), until(stopped.clone()));
            interfaces.spawn(watched("http", serving));
        }
        let admin = crate::admin::serve(sockets.admin, state.clone(), stopped.clone());
        interfaces.spawn(watched("admin", admin));

        let started = Daemon::start_serving(&state, sockets.nbd, stopped.clone()).await;
        let (plane, volumes, listeners) = match started {
            Ok(started) => started,
            Err(error) => {
                // Whoever asked is answered before the sockets close.
                stop(&stop_interfaces, &mut interfaces).await;
                return Err(error);
            }
        };
        if let Some(services) = state.services() {
            interfaces.spawn(services.scrubs.clone().run(until(stopped)));
        }
        state.enter(Phase::Ready);
        let events = state.events();
        events.tell_of_node(state.node(), Occurrence::DaemonReady);
        let views = volumes.list();
        tracing::info!(
            volumes = views.len(),
            took_ms = state.uptime().as_millis() as u64,
            "ready"
        );
        Ok(Daemon {
            state,
            plane,
            volumes,
            listeners,
            stop_interfaces,
            interfaces,
        })
    }

    /// Metadata, stores, volumes, NBD: one after the other.
    async fn start_serving(
        state: &Arc<State>,
        nbd: Vec<Bound>,
        stop: watch::Receiver<bool>,
    ) -> Result<(DataPlane, Arc<Volumes>, Listeners), DaemonError> {
        let config = state.config();
        state.begin_step("the metadata is being opened");
        let waits = || state.begin_step("waiting for etcd, which keeps the cluster's records");
        let metadata = OpenMetadata::open(config, waits).await?;
        let node = metadata.node;
        state.set_node(node);
        if let Some(identity) = &metadata.identity {
            identity.trust().tell_events(state.events().clone());
            state.set_cluster(ClusterServices {
                identity: identity.clone(),
                records: metadata.records.clone(),
            });
            let names = certificate_names(config);
            let length = config.certificate_lifetime;
            tokio::spawn(keep_renewed(identity.clone(), names, length));
        }

        state.begin_step("the stores are being opened");
        let known = stores::recorded(&*metadata.records, node).await?;
        let seals = Seals::new(metadata.local.clone());
        let mut data = data_config(config, node, stores::lay_out(config, &known)?);
        data.seals = seals.load().await?;
        data.events = state.events().clone();
        let plane = DataPlane::start(data).await?;
        for opened in plane.stores() {
            tracing::info!(
                store = %opened.id.0,
                path = %opened.path.display(),
                tail = %opened.tail_path.display(),
                new = opened.formatted,
                direct = opened.direct,
                took_ms = opened.took.as_millis() as u64,
                report = ?opened.report,
                "store open"
            );
        }
        let (tell, events) = tokio::sync::mpsc::unbounded_channel();
        let dial: Arc<dyn Dial> = match &metadata.identity {
            Some(identity) => Arc::new(Network::new(identity.clone(), metadata.records.clone())),
            None => Arc::new(NoPeers),
        };
        Driver::start(
            plane.clone(),
            metadata.records.clone(),
            seals.clone(),
            dial.clone(),
            tell,
        );
        let host = Arc::new(Host::new(plane.clone(), seals, events));
        if let Some(identity) = &metadata.identity {
            let listening = replication::listen(
                identity.clone(),
                plane.clone(),
                metadata.records.clone(),
                config.listen_link.clone(),
                config.advertise.clone(),
                stop.clone(),
            );
            if let Err(error) = listening.await {
                plane.drain().await;
                return Err(error.into());
            }
        }
        match Daemon::start_volumes(state, metadata, &known, host, (&plane, dial, stop), nbd).await
        {
            Ok((volumes, listeners)) => Ok((plane, volumes, listeners)),
            Err(error) => {
                // The stores are open: close them in order.
                plane.drain().await;
                Err(error)
            }
        }
    }

    async fn start_volumes(
        state: &Arc<State>,
        metadata: OpenMetadata,
        known: &[ashlar_core::records::Versioned<ashlar_core::records::StoreRecord>],
        host: Arc<Host>,
        (plane, dial, stop): (&DataPlane, Arc<dyn Dial>, watch::Receiver<bool>),
        nbd: Vec<Bound>,
    ) -> Result<(Arc<Volumes>, Listeners), DaemonError> {
        let config = state.config();
        let store = metadata.records;
        let owner = metadata.identity.is_some().then_some(metadata.node);
        for missing in stores::record(&*store, known, plane.stores(), owner).await? {
            state.add_lasting_warning(format!(
                "store {} was last at {} and is not configured any more; volumes on it are not served",
                missing.id.0, missing.path
            ));
        }
        state.begin_step("the volumes are being opened");
        let scrubs = Scrubs::load(
            host.clone() as Arc<dyn Plane>,
            store.clone(),
            config.scrub_every.interval(),
            config.scrub_bytes_per_second,
        )
        .await?;
        let records = store.clone();
        let volumes = Volumes::start(
            store.clone(),
            host.clone() as Arc<dyn VolumeHost>,
            metadata.node,
            metadata.identity.is_some(),
            &stores::that_lost_answers(known, plane.stores()),
            state.events().clone(),
        )
        .await?;
        stores::record_boot(&*records, plane.stores()).await?;
        let controller = metadata.identity.as_ref().map(|_| {
            Controller::start(
                store,
                volumes.clone(),
                plane.clone(),
                dial,
                metadata.node,
                config.replace_after,
                stop,
            )
        });
        state.set_services(Services {
            controller,
            volumes: volumes.clone(),
            plane: host as Arc<dyn Plane>,
            scrubs: Arc::new(scrubs),
            engine_reason: plane.engine_reason().to_owned(),
        });
        let listener = ListenerConfig {
            handshake_timeout: config.handshake_timeout,
            ..ListenerConfig::default()
        };
        let security = metadata.identity.map(Security::new).transpose();
        let security = security.map_err(MetadataOpenError::Identity)?;
        let listeners = Listeners::start(
            nbd,
            volumes.clone(),
            Arc::new(plane.clone()),
            listener,
            state.connections().clone(),
            state.listener_stats().clone(),
            security,
        )
        .map_err(system("the NBD sockets cannot be served"))?;
        Ok((volumes, listeners))
    }

    #[cfg(test)]
    pub(super) fn data_plane(&self) -> &DataPlane {
        &self.plane
    }

    /// Accepts no more, answers what was accepted, takes a checkpoint, closes every socket.
    pub(super) async fn drain(mut self, timeout: Duration) {
        let node = self.state.node();
        self.state
            .events()
            .tell_of_node(node, Occurrence::DaemonStopping);
        self.state.enter(Phase::Draining);
        self.listeners.stop().await;
        self.volumes.drain().await;
        if tokio::time::timeout(timeout + DRAIN_SLACK, self.plane.drain())
            .await
            .is_err()
        {
            tracing::error!(
                ?timeout,
                "the drain did not end in time; the next start replays the log"
            );
        }
        stop(&self.stop_interfaces, &mut self.interfaces).await;
    }
}

/// What the data plane may take beyond its own deadline for clients: checkpoints of large stores.
const DRAIN_SLACK: Duration = Duration::from_secs(30);

/// Ends the admin and HTTP servers.
async fn stop(stop_interfaces: &watch::Sender<bool>, interfaces: &mut tokio::task::JoinSet<()>) {
    let _ = stop_interfaces.send(true);
    while interfaces.join_next().await.is_some() {}
}

/// Runs the server of an interface; volumes are served without it, but somebody should know.
async fn watched(interface: &'static str, serving: impl Future<Output = std::io::Result<()>>) {
    if let Err(error) = serving.await {
        tracing::error!(interface, %error, "an interface is not served any more; restart ashlard");
    }
}

async fn until(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop too.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn data_config(
    config: &Config,
    node: ashlar_core::units::NodeId,
    stores: Vec<crate::data::StoreConfig>,
) -> DataConfig {
    let mut data = DataConfig::new(node, config.data_dir.clone(), stores);
    data.threads = usize::from(config.data_threads);
    data.engine = config.io_engine;
    // It was parsed when the configuration was checked.
    data.fault = config.fault.as_ref().and_then(|plan| plan.parse().ok());
    data.tail_dir = config.tail_dir.clone();
    data.tail_bytes = config.tail_bytes;
    data.accept_tail_loss = config.accept_tail_loss;
    data.cache_bytes = config.leaf_cache_bytes;
    data.limits = Limits {
        bytes_per_connection: config.max_connection_buffer_bytes as usize,
        bytes: config.max_buffer_bytes as usize,
        ..Limits::default()
    };
    data.drain_timeout = config.drain_timeout;
    data.fill_bytes_per_second = config.fill_bytes_per_second;
    data
}
