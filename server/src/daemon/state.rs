//! What the interfaces of a running daemon share: which phase it is in, and the services once they are there.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ashlar_core::records::{ReplicaState, Versioned, VolumeRecord};
use ashlar_core::units::NodeId;
use ashlar_proto::admin::{Listener, ListenerKind};
use async_trait::async_trait;
use tokio::sync::watch;

use super::process::{self, Usage};
use crate::admin::poison_reason;
use crate::config::Config;
use crate::controller::{Controller, Picture};
use crate::events::Events;
use crate::http::{ClusterScrape, ListenerCounts, Probe, Readiness, Scrape, VolumeScrape};
use crate::identity::Identity;
use crate::meta::MetadataStore;
use crate::nbd::{ConnectionCount, ListenerStats};
use crate::plane::{Plane, StoreView};
use crate::scrubs::Scrubs;
use crate::volumes::{VolumeView, Volumes, unix_ms};

/// A store with less of its capacity left than this is worth a warning.
const NEARLY_FULL: f64 = 0.05;
/// Warnings of one kind that are listed one by one.
const LISTED_MAX: usize = 10;

/// A daemon's life, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Opening stores and volumes.
    Starting,
    /// Serving.
    Ready,
    /// Finishing what was accepted.
    Draining,
}

/// What serves volumes.
#[derive(Clone)]
pub(crate) struct Services {
    /// Of a node of a cluster.
    pub(crate) controller: Option<Arc<Controller>>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) plane: Arc<dyn Plane>,
    pub(crate) scrubs: Arc<Scrubs>,
    /// Which I/O engine, and why that one.
    pub(crate) engine_reason: String,
}

/// What a daemon in a cluster has beside that.
#[derive(Clone)]
pub(crate) struct ClusterServices {
    pub(crate) identity: Arc<Identity>,
    /// The cluster's.
    pub(crate) records: Arc<dyn MetadataStore>,
}

/// One daemon's.
pub struct State {
    config: Config,
    started: Instant,
    started_at_unix_ms: u64,
    phase: watch::Sender<Phase>,
    step: Mutex<&'static str>,
    node: OnceLock<NodeId>,
    services: OnceLock<Services>,
    cluster: watch::Sender<Option<ClusterServices>>,
    listeners: Mutex<Vec<Listener>>,
    connections: ConnectionCount,
    listener_stats: Arc<ListenerStats>,
    /// Found at the start and true until the next one.
    lasting_warnings: Mutex<Vec<String>>,
    events: Events,
}

impl State {
    pub(crate) fn new(config: Config) -> State {
        State {
            connections: ConnectionCount::new(config.max_connections as usize),
            config,
            started: Instant::now(),
            started_at_unix_ms: unix_ms(),
            phase: watch::Sender::new(Phase::Starting),
            step: Mutex::new("it has just been started"),
            node: OnceLock::new(),
            services: OnceLock::new(),
            cluster: watch::Sender::new(None),
            listeners: Mutex::default(),
            listener_stats: Arc::default(),
            lasting_warnings: Mutex::default(),
            events: Events::default(),
        }
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn started_at_unix_ms(&self) -> u64 {
        self.started_at_unix_ms
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(crate) fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Done when the daemon drains.
    pub(crate) async fn draining(&self) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self
            .phases()
            .wait_for(|phase| *phase == Phase::Draining)
            .await;
    }

    /// What the start is doing, half a sentence.
    pub(crate) fn step(&self) -> &'static str {
        *lock(&self.step)
    }

    pub(crate) fn begin_step(&self, step: &'static str) {
        *lock(&self.step) = step;
        tracing::debug!(step, "starting");
    }

    pub(crate) fn node(&self) -> Option<NodeId> {
        self.node.get().copied()
    }

    pub(crate) fn set_node(&self, node: NodeId) {
        let _ = self.node.set(node);
    }

    /// `None`: a single node, or not known yet.
    pub(crate) fn cluster(&self) -> Option<ClusterServices> {
        self.cluster.borrow().clone()
    }

    pub(crate) fn set_cluster(&self, cluster: ClusterServices) {
        self.cluster.send_replace(Some(cluster));
    }

    /// The identity of this node in its cluster, once there is one.
    pub(crate) async fn identity(&self) -> Arc<Identity> {
        let mut cluster = self.cluster.subscribe();
        loop {
            if let Some(services) = &*cluster.borrow_and_update() {
                return services.identity.clone();
            }
            // The sender lives as long as `self`, so this cannot fail.
            let _ = cluster.changed().await;
        }
    }

    pub(crate) fn services(&self) -> Option<&Services> {
        self.services.get()
    }

    pub(crate) fn set_services(&self, services: Services) {
        let _ = self.services.set(services);
    }

    pub(crate) fn listeners(&self) -> Vec<Listener> {
        lock(&self.listeners).clone()
    }

    pub(crate) fn add_listener(&self, kind: ListenerKind, address: String) {
        tracing::info!(kind = kind.as_str_name(), address, "listening");
        lock(&self.listeners).push(Listener {
            kind: kind.into(),
            address,
        });
    }

    pub(crate) fn connections(&self) -> &ConnectionCount {
        &self.connections
    }

    /// What happened since the start.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    pub(crate) fn listener_stats(&self) -> &Arc<ListenerStats> {
        &self.listener_stats
    }

    pub(crate) fn add_lasting_warning(&self, warning: String) {
        tracing::warn!("{warning}");
        lock(&self.lasting_warnings).push(warning);
    }

    /// What a person should look at, one sentence each.
    pub(crate) fn warnings(&self, stores: &[StoreView]) -> Vec<String> {
        let mut warnings = lock(&self.lasting_warnings).clone();
        for view in stores {
            let (status, path) = (&view.status, view.path.display());
            warnings.extend(poison_reason(view));
            if status.checksum_errors > 0 {
                warnings.push(format!(
                    "store {path}: {} read(s) met damaged data since the start; `ashlar store scrub` lists the places",
                    status.checksum_errors
                ));
            }
            if status.read_errors > 0 {
                warnings.push(format!(
                    "store {path}: its device failed {} read(s) since the start",
                    status.read_errors
                ));
            }
            let scrubbed = self.services().and_then(|s| s.scrubs.of(view.id).last);
            if let Some(found) = scrubbed.map(|last| last.damaged_blocks).filter(|n| *n > 0) {
                warnings.push(format!(
                    "store {path}: the last scrub found {found} damaged block(s); what has other copies was written again from them: `ashlar store scrub` lists what is left; restore that from a backup"
                ));
            }
            let left = status.capacity_blocks.saturating_sub(status.used_blocks);
            if status.capacity_blocks > 0
                && (left as f64) < NEARLY_FULL * status.capacity_blocks as f64
            {
                warnings.push(format!(
                    "store {path} is nearly full: {} MiB of {} MiB are left; delete a volume, discard what is not needed (fstrim), or add a store",
                    left >> 8,
                    status.capacity_blocks >> 8
                ));
            }
        }
        if let Some(services) = self.services() {
            let own = self.node.get();
            // A volume with copies is served by one node, and that is as it should be.
            let is_elsewhere = |view: &VolumeView| {
                let head = view.record.head.map(|head| head.node);
                view.record.placement.is_replicated() && head.is_some() && head.as_ref() != own
            };
            let unserved = services
                .volumes
                .list()
                .into_iter()
                .filter(|view| !is_elsewhere(view))
                .filter_map(|view| {
                    let reason = view.serving.reason()?;
                    let name = view.record.name;
                    Some(format!("volume {name} is not served: {reason}"))
                });
            let unserved: Vec<_> = unserved.collect();
            let more = unserved.len().saturating_sub(LISTED_MAX);
            warnings.extend(unserved.into_iter().take(LISTED_MAX));
            if more > 0 {
                warnings.push(format!("{more} more volumes are not served"));
            }
            warnings.extend(out_of_sync(&services.volumes.list()));
            if let Some(controller) = &services.controller {
                let volumes = services.volumes.records();
                warnings.extend(moving(&controller.picture(), &volumes));
            }
            let unknown = services.volumes.unknown_layers();
            if !unknown.is_empty() {
                let layers: Vec<_> = unknown
                    .iter()
                    .take(LISTED_MAX)
                    .map(|layer| layer.0.to_string())
                    .collect();
                warnings.push(format!(
                    "the stores hold {} layer(s) that no volume names ({}{}); they are kept. Was the metadata restored from an old backup?",
                    unknown.len(),
                    layers.join(", "),
                    if unknown.len() > LISTED_MAX { ", …" } else { "" }
                ));
            }
        }
        warnings
    }
}

/// Volumes of which a copy does not count, one sentence each: which nodes, and what is to be done.
fn out_of_sync(views: &[VolumeView]) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut more = 0;
    for view in views {
        let record = &view.record;
        let sets = &record.placement.sets;
        let Some(fewest) = sets.iter().map(|set| set.in_sync().count()).min() else {
            continue;
        };
        let of_state = |state: ReplicaState| -> BTreeSet<String> {
            let replicas = sets.iter().flat_map(|set| &set.replicas);
            replicas
                .filter(|replica| replica.state == state)
                .map(|replica| replica.node.0.to_string())
                .collect()
        };
        let (out, joining) = (of_state(ReplicaState::Out), of_state(ReplicaState::Joining));
        // What moves, with enough in sync all the while, is told with the nodes.
        let is_moving = out.is_empty() && fewest >= record.replicas as usize;
        if is_moving || (out.is_empty() && joining.is_empty()) {
            continue;
        }
        if warnings.len() == LISTED_MAX {
            more += 1;
            continue;
        }
        let list = |nodes: BTreeSet<String>| nodes.into_iter().collect::<Vec<_>>().join(", ");
        let mut text = format!(
            "volume {} has {fewest} of {} copies in sync",
            record.name, record.replicas
        );
        if fewest < record.min_in_sync as usize {
            text.push_str(&format!(
                "; its writes wait until {} are",
                record.min_in_sync
            ));
        }
        if !joining.is_empty() {
            text.push_str(&format!("; being filled on node {}", list(joining)));
        }
        if !out.is_empty() {
            text.push_str(&format!(
                "; out of sync on node {}: see that ashlard runs there and its stores are sound; the copy is then brought up to date by itself",
                list(out)
            ));
        }
        warnings.push(text);
    }
    if more > 0 {
        warnings.push(format!("{more} more volumes have copies out of sync"));
    }
    warnings
}

/// Volumes whose zones are told where copies have no other node to go to.
const CONFINED_TOLD: usize = 3;

/// Nodes that are away or being emptied, and what cannot go on, one sentence each.
fn moving(picture: &Picture, volumes: &[Versioned<VolumeRecord>]) -> Vec<String> {
    let sets = || {
        let sets = volumes.iter().flat_map(|v| &v.record.placement.sets);
        sets.flat_map(|set| &set.replicas)
    };
    let copies_on = |node: NodeId| sets().filter(|replica| replica.node == node).count();
    let mut warnings = Vec::new();
    for (node, known) in picture.nodes.iter().filter(|(_, known)| known.is_away) {
        warnings.push(format!(
            "node {} was not heard of for {} s; it has {} copies",
            node.0,
            known.silent.as_secs(),
            copies_on(*node)
        ));
    }
    for node in &picture.draining {
        let known = picture.nodes.get(node).copied().unwrap_or_default();
        let left = match copies_on(*node) {
            0 if known.leftovers > 0 => "its blocks are being given back".to_owned(),
            0 => "no copy is left on it; `ashlar node remove` shuts it out, `ashlar node drain --cancel` keeps it".to_owned(),
            left => format!(
                "{left} copies are left on it, {} MiB are in use",
                known.used_blocks >> 8
            ),
        };
        warnings.push(format!("node {} is being drained: {left}", node.0));
    }
    let joining = sets().filter(|replica| replica.state == ReplicaState::Joining);
    let joining = joining.count();
    if joining > 0 {
        warnings.push(format!(
            "{joining} copies are being made on other nodes; `ashlar volume show` tells how far they are"
        ));
    }
    if !picture.stuck.is_empty() {
        let mut confined = volumes
            .iter()
            .map(|volume| &volume.record)
            .filter(|record| !record.zones.are_all())
            .filter(|record| picture.stuck.iter().any(|(id, _)| *id == record.id));
        let mut text = format!(
            "{} copies are to be made anew or to move, and there is no other node with room for them: add a node, or room",
            picture.stuck.len()
        );
        for record in confined.by_ref().take(CONFINED_TOLD) {
            text.push_str(&format!(
                "; those of {} may lie in {} only",
                record.name, record.zones
            ));
        }
        let more = confined.count();
        if more > 0 {
            text.push_str(&format!("; {more} more volumes are confined to zones"));
        }
        warnings.push(text);
    }
    warnings
}

#[async_trait]
impl Probe for State {
    async fn scrape(&self) -> Scrape {
        let stats = &self.listener_stats;
        let count = |counter: &std::sync::atomic::AtomicU64| {
            counter.load(std::sync::atomic::Ordering::Relaxed)
        };
        let mut scrape = Scrape {
            version: crate::VERSION,
            ready: self.phase() == Phase::Ready,
            started_at_unix_ms: self.started_at_unix_ms,
            usage: usage(),
            connections: self.connections.open() as u64,
            connections_limit: u64::from(self.config.max_connections),
            listener: ListenerCounts {
                accepted: count(&stats.accepted),
                established: count(&stats.established),
                over_limit: count(&stats.over_limit),
                evicted: count(&stats.evicted),
                too_slow: count(&stats.too_slow),
                malformed: count(&stats.malformed),
            },
            ..Scrape::default()
        };
        if let Some(services) = self.services() {
            let metrics = services.plane.metrics();
            let open = metrics.volumes();
            let volumes = services
                .volumes
                .list()
                .into_iter()
                .map(|view| VolumeScrape {
                    name: view.record.name.to_string(),
                    id: view.record.id.0.to_string(),
                    size_bytes: view.record.size_bytes,
                    metrics: open
                        .iter()
                        .find(|(id, ..)| *id == view.record.id)
                        .map(|(.., metrics)| metrics.clone()),
                });
            scrape.volumes = volumes.collect();
            let disks = metrics.stores();
            let stores = services
                .plane
                .store_views()
                .await
                .into_iter()
                .filter_map(|view| {
                    let disk = disks.iter().find(|(id, _)| *id == view.id)?.1.clone();
                    Some((view, disk))
                });
            scrape.stores = stores.collect();
            scrape.scrubs = services.scrubs.all();
            scrape.threads = metrics.threads();
            scrape.cluster = cluster_scrape(services).await;
            if let (Some(scrape), Some(own)) = (&mut scrape.cluster, &*self.cluster.borrow()) {
                scrape.certificate_expires_s = own.identity.expires_at_unix_ms() / 1000;
            }
        }
        scrape
    }

    async fn readiness(&self) -> Readiness {
        let phase = self.phase();
        let mut reasons = Vec::new();
        match phase {
            Phase::Starting => reasons.push(format!("starting: {}", self.step())),
            Phase::Draining => reasons.push("shutting down".to_owned()),
            Phase::Ready => {
                if let Some(services) = self.services() {
                    reasons = self.warnings(&services.plane.store_views().await);
                }
            }
        }
        let state = match phase {
            Phase::Starting => "starting",
            Phase::Ready => "ready",
            Phase::Draining => "draining",
        };
        Readiness {
            ready: phase == Phase::Ready,
            state,
            reasons,
        }
    }
}

/// `None` where there is no cluster.
async fn cluster_scrape(services: &Services) -> Option<ClusterScrape> {
    let picture = services.controller.as_ref()?.picture();
    let mut scrape = ClusterScrape {
        is_leader: picture.is_leader,
        changes: picture.changes,
        stuck: picture.stuck.len() as u64,
        away: picture.nodes.values().filter(|node| node.is_away).count() as u64,
        draining: picture.draining.len() as u64,
        ..ClusterScrape::default()
    };
    let mut leftovers = picture.nodes.values().map(|node| node.leftovers as u64);
    scrape.leftovers = leftovers.by_ref().sum();
    for volume in services.volumes.records() {
        let sets = &volume.record.placement.sets;
        for replica in sets.iter().flat_map(|set| &set.replicas) {
            let count = match replica.state {
                _ if replica.leaving => &mut scrape.leaving,
                ReplicaState::InSync => &mut scrape.in_sync,
                ReplicaState::Out => &mut scrape.out,
                ReplicaState::Joining => &mut scrape.joining,
            };
            *count += 1;
        }
        if !sets.is_empty()
            && let Some(status) = services.volumes.replication(volume.record.id).await
        {
            let left = status.fills.iter().map(|fill| fill.left_bytes);
            scrape.filling_bytes += left.sum::<u64>();
        }
    }
    Some(scrape)
}

/// What the process uses; zeros where /proc is not there.
pub(crate) fn usage() -> Usage {
    process::usage().unwrap_or_default()
}

/// Nothing is left half-done under these locks, so one that a panicking thread held is still good.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
