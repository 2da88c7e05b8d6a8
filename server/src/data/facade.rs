//! The data plane as the rest of the daemon sees it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use ashlar_core::nbd::session::Admitted;
use ashlar_core::records::{LeftoverRecord, Versioned, VolumeLimits, VolumeRecord};
use ashlar_core::replication::{BootId, SwapOutcome};
use ashlar_core::store::StoreError;
use ashlar_core::units::{ChunkIndex, Epoch, LayerId, StoreId, VolumeId};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use super::cluster::{Cluster, ClusterCommand, ClusterTell, LinkEnds, ReplicatedSpec};
use super::command::Command;
use super::config::{
    DataConfig, DataError, OpenedStore, ScrubEnd, StartError, StoreLayers, StoreReport, Tells,
    VolumeRuntime, VolumeSpec,
};
use super::open::open_store;
use super::sparse::Sparse;
use super::thread::{DataThread, Parts, StoreDriver};
use crate::engine::{self, FaultEngine, Waker};
use crate::metrics::Metrics;
use crate::nbd::{Attach, AttachError, AttachedClient};

/// Handle to the data threads. Cheap to clone; the threads end with [`DataPlane::drain`].
#[derive(Clone)]
pub struct DataPlane(Arc<Inner>);

struct Inner {
    threads: Vec<Mailbox>,
    stores: Vec<OpenedStore>,
    /// Which thread a volume is on.
    volumes: Mutex<HashMap<VolumeId, usize>>,
    metrics: Metrics,
    /// Volumes whose heads have few versions left; each is named once for each epoch, so this holds no more than there
    /// are volumes.
    epochs_wanted: tokio::sync::Mutex<UnboundedReceiver<VolumeId>>,
    /// Volumes whose first change waits, each named once for each opening.
    first_changes: tokio::sync::Mutex<UnboundedReceiver<VolumeId>>,
    scrubs_ended: tokio::sync::Mutex<UnboundedReceiver<ScrubEnd>>,
    cluster_tells: tokio::sync::Mutex<UnboundedReceiver<ClusterTell>>,
    drain_timeout: std::time::Duration,
    joins: Mutex<Vec<JoinHandle<()>>>,
}

pub(super) struct Mailbox {
    commands: mpsc::Sender<Command>,
    engine_reason: String,
    waker: Waker,
}

impl Mailbox {
    /// Fails when the thread has ended.
    fn send(&self, command: Command) -> Result<(), DataError> {
        self.commands
            .send(command)
            .map_err(|_| DataError::Draining)?;
        self.waker.wake();
        Ok(())
    }

    pub(super) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, DataError> {
        let (answer, answered) = oneshot::channel();
        self.send(command(answer))?;
        answered.await.map_err(|_| DataError::Draining)
    }
}

/// Nothing is left half-done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A panic of a data thread must not leave a daemon that looks alive and serves nothing, or serves from broken state.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "a data thread panicked; ending the daemon, which loses nothing that was acknowledged"
            );
            std::process::abort();
        }
    }
}

impl DataPlane {
    /// Opens (or makes) and recovers every store, then serves. On an error nothing is left running.
    pub async fn start(config: DataConfig) -> Result<DataPlane, StartError> {
        if config.stores.is_empty() {
            return Err(StartError::NoStore);
        }
        let count = config.threads.clamp(1, config.stores.len());
        let metrics = Metrics::new();
        let config = Arc::new(config);
        let (want_epoch, epochs_wanted) = tokio::sync::mpsc::unbounded_channel();
        let (first_change, first_changes) = tokio::sync::mpsc::unbounded_channel();
        let (end_scrub, scrubs_ended) = tokio::sync::mpsc::unbounded_channel();
        let (tell_cluster, cluster_tells) = tokio::sync::mpsc::unbounded_channel();
        let tells = Tells {
            epochs_wanted: want_epoch,
            first_changes: first_change,
            scrubs_ended: end_scrub,
            cluster: tell_cluster,
            events: config.events.clone(),
        };
        let mut starting = Vec::new();
        let mut joins = Vec::new();
        for index in 0..count {
            let (config, metrics, tells) = (config.clone(), metrics.clone(), tells.clone());
            let (started, answer) = oneshot::channel();
            let join = std::thread::Builder::new()
                .name(format!("data-{index}"))
                .spawn(move || {
                    let _abort = AbortOnPanic;
                    run_thread(index, count, &config, (metrics, tells), started);
                })
                .map_err(|source| StartError::Io {
                    what: "cannot start a data thread",
                    source,
                })?;
            joins.push(join);
            starting.push(answer);
        }
        // The threads have theirs; the receivers end with them.
        drop(tells);
        let mut threads = Vec::new();
        let mut stores: Vec<OpenedStore> = Vec::new();
        let mut failure = None;
        for answer in starting {
            match answer.await {
                Ok(Ok((mailbox, opened))) => {
                    threads.push(mailbox);
                    stores.extend(opened);
                }
                Ok(Err(error)) => {
                    failure.get_or_insert(error);
                }
                Err(_) => {
                    let source = std::io::Error::other("the thread ended");
                    failure.get_or_insert(StartError::Io {
                        what: "cannot start a data thread",
                        source,
                    });
                }
            }
        }
        for (i, store) in stores.iter().enumerate() {
            if let Some(same) = stores[..i].iter().find(|other| other.id == store.id) {
                failure.get_or_insert(StartError::Twice {
                    first: same.path.clone(),
                    second: store.path.clone(),
                });
            }
        }
        // In the order of the configuration.
        stores.sort_by_key(|store| config.stores.iter().position(|c| c.path == store.path));
        let plane = DataPlane(Arc::new(Inner {
            threads,
            stores,
            volumes: Mutex::default(),
            metrics,
            epochs_wanted: tokio::sync::Mutex::new(epochs_wanted),
            first_changes: tokio::sync::Mutex::new(first_changes),
            scrubs_ended: tokio::sync::Mutex::new(scrubs_ended),
            cluster_tells: tokio::sync::Mutex::new(cluster_tells),
            drain_timeout: config.drain_timeout,
            joins: Mutex::new(joins),
        }));
        match failure {
            None => Ok(plane),
            Some(failure) => {
                plane.drain().await;
                Err(failure)
            }
        }
    }

    /// The stores that were opened, in the order of the configuration.
    pub fn stores(&self) -> &[OpenedStore] {
        &self.0.stores
    }

    /// Stores that may hold one volume together, each group on one thread.
    pub fn store_groups(&self) -> Vec<Vec<StoreId>> {
        let mut groups = vec![Vec::new(); self.0.threads.len()];
        for store in &self.0.stores {
            groups[store.thread].push(store.id);
        }
        groups
    }

    pub(super) fn threads(&self) -> &[Mailbox] {
        &self.0.threads
    }

    pub(super) fn thread_of(&self, id: VolumeId) -> Result<&Mailbox, DataError> {
        let thread = *lock(&self.0.volumes)
            .get(&id)
            .ok_or(DataError::NotOpen(id))?;
        Ok(&self.0.threads[thread])
    }

    /// Serves a volume. Its epoch must be a fresh claim.
    pub async fn open_volume(&self, spec: VolumeSpec) -> Result<(), DataError> {
        let mut thread = None;
        for id in &spec.placement.stores {
            let of = self
                .0
                .stores
                .iter()
                .find(|store| store.id == *id)
                .ok_or(DataError::NoSuchStore(*id))?
                .thread;
            if thread.is_some_and(|thread| thread != of) {
                return Err(DataError::StoresApart);
            }
            thread = Some(of);
        }
        let thread = thread.ok_or(DataError::StoresApart)?;
        let id = spec.id;
        self.0.threads[thread]
            .ask(|answer| Command::OpenVolume(Box::new(spec), answer))
            .await??;
        lock(&self.0.volumes).insert(id, thread);
        Ok(())
    }

    /// Begins to claim a replicated volume and to serve it; it is served when [`ClusterTell::Serving`] says so.
    pub async fn open_replicated(&self, spec: ReplicatedSpec) -> Result<(), DataError> {
        let record = &spec.record.record;
        let id = record.id;
        // Where most of its copies in this daemon are; all of them must be on one thread, or none is used.
        let sets = record.placement.sets.iter();
        let mut here = sets
            .flat_map(|set| set.replicas.iter())
            .filter_map(|replica| self.0.stores.iter().find(|store| store.id == replica.store))
            .map(|store| store.thread);
        let thread = here.next().unwrap_or(0);
        if here.any(|other| other != thread) {
            return Err(DataError::StoresApart);
        }
        // Before the head is there: the outcome of its first swap must find it, and may be quicker than the answer. It
        // stays when the head has ended, of which the thread knows best.
        lock(&self.0.volumes).insert(id, thread);
        self.0.threads[thread]
            .ask(|answer| Command::Cluster(ClusterCommand::Open(Box::new(spec), answer)))
            .await?
    }

    /// Takes no work for replicas of a volume any more, whoever sends it.
    pub async fn forget_replicas(&self, volume: VolumeId) {
        for thread in &self.0.threads {
            let forget = |answer| Command::Cluster(ClusterCommand::Forget { volume, answer });
            // A thread that has ended takes no work.
            let _ = thread.ask(forget).await;
        }
    }

    /// Gives some of what a store has of a set that went elsewhere back: of one layer, from a chunk on. Answers where to go
    /// on; `None`: nothing is left of it. Durable at the store's next checkpoint.
    pub async fn give_back(
        &self,
        left: &LeftoverRecord,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<Option<ChunkIndex>, DataError> {
        let command = |answer| {
            let left = left.clone();
            Command::Cluster(ClusterCommand::GiveBack {
                left,
                layer,
                from,
                answer,
            })
        };
        self.thread_of_store(left.store)?.ask(command).await?
    }

    /// What data threads ask for replicated volumes. `None`: the threads have ended.
    pub async fn cluster_tell(&self) -> Option<ClusterTell> {
        self.0.cluster_tells.lock().await.recv().await
    }

    /// A volume's record: the answer to [`ClusterTell::ReadRecord`] (`asked`), or what a watch saw.
    pub fn record_read(
        &self,
        volume: VolumeId,
        asked: bool,
        record: Option<Versioned<VolumeRecord>>,
    ) {
        let record = record.map(Box::new);
        self.tell_volume(
            volume,
            ClusterCommand::Record {
                volume,
                asked,
                record,
            },
        );
    }

    /// [`ClusterTell::Swap`] ended.
    pub fn swapped(&self, volume: VolumeId, serial: u64, outcome: SwapOutcome) {
        self.tell_volume(
            volume,
            ClusterCommand::Swapped {
                volume,
                serial,
                outcome,
            },
        );
    }

    fn tell_volume(&self, volume: VolumeId, command: ClusterCommand) {
        if let Ok(thread) = self.thread_of(volume) {
            // A thread that has ended has no head.
            let _ = thread.send(Command::Cluster(command));
        }
    }

    /// [`ClusterTell::Persist`] is durable.
    pub fn persisted(&self, volume: VolumeId, store: StoreId, serial: u64) {
        if let Ok(thread) = self.thread_of_store(store) {
            let _ = thread.send(Command::Cluster(ClusterCommand::Persisted {
                volume,
                store,
                serial,
            }));
        }
    }

    /// A link that a thread wished for is up.
    pub fn link_up(&self, thread: usize, ends: LinkEnds) {
        if let Some(thread) = self.0.threads.get(thread) {
            let _ = thread.send(Command::Cluster(ClusterCommand::LinkUp(Box::new(ends))));
        }
    }

    /// A head of a peer wants to reach one of this daemon's stores.
    pub fn link_accepted(&self, ends: LinkEnds) -> Result<(), DataError> {
        let thread = self.thread_of_store(ends.peer.store)?;
        thread.send(Command::Cluster(ClusterCommand::LinkAccepted(Box::new(
            ends,
        ))))
    }

    /// Stops serving a volume: refused while it has connections unless `force`, which ends them after what they have
    /// in flight. Returns when nothing is in flight any more.
    pub async fn close_volume(&self, id: VolumeId, force: bool) -> Result<(), DataError> {
        let closed = self
            .thread_of(id)?
            .ask(|answer| Command::CloseVolume { id, force, answer })
            .await??;
        lock(&self.0.volumes).remove(&id);
        closed.await.map_err(|_| DataError::Draining)
    }

    /// Grows a volume. Connected clients may use the new range at once.
    pub async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DataError> {
        self.thread_of(id)?
            .ask(|answer| Command::ResizeVolume {
                id,
                size_bytes,
                answer,
            })
            .await?
    }

    /// Refuses changes from now on, or accepts them again.
    pub async fn set_read_only(&self, id: VolumeId, read_only: bool) -> Result<(), DataError> {
        self.thread_of(id)?
            .ask(|answer| Command::SetReadOnly {
                id,
                read_only,
                answer,
            })
            .await?
    }

    /// The next volume that has few versions left under its epoch. `None`: the threads have ended.
    pub async fn epoch_wanted(&self) -> Option<VolumeId> {
        self.0.epochs_wanted.lock().await.recv().await
    }

    /// Goes on serving a volume under an epoch that was claimed for this.
    pub async fn renew_epoch(&self, id: VolumeId, epoch: Epoch) -> Result<(), DataError> {
        self.thread_of(id)?
            .ask(|answer| Command::RenewEpoch { id, epoch, answer })
            .await?
    }

    /// Serves other connections from now on; [`DataError::InUse`], and nothing changed, while one is open that would
    /// not be served.
    pub async fn admit(&self, id: VolumeId, admitted: Admitted) -> Result<(), DataError> {
        self.thread_of(id)?
            .ask(|answer| Command::Admit {
                id,
                admitted,
                answer,
            })
            .await?
    }

    /// Serves other connections from now on (`None`: the same, and ends all) and ends those that it does not serve.
    /// Returns how many once everything that they had asked for is done or refused.
    pub async fn fence(&self, id: VolumeId, admitted: Option<Admitted>) -> Result<u32, DataError> {
        let (ended, done) = self
            .thread_of(id)?
            .ask(|answer| Command::Fence {
                id,
                admitted,
                answer,
            })
            .await??;
        done.await.map_err(|_| DataError::Draining)?;
        Ok(ended)
    }

    /// Changes the limits of a volume, open connections included.
    pub async fn set_limits(&self, id: VolumeId, limits: VolumeLimits) -> Result<(), DataError> {
        self.thread_of(id)?
            .ask(|answer| Command::SetLimits { id, limits, answer })
            .await?
    }

    /// The next volume whose first change waits until it is recorded. `None`: the threads have ended.
    pub async fn first_change(&self) -> Option<VolumeId> {
        self.0.first_changes.lock().await.recv().await
    }

    /// It is recorded; changes go on.
    pub async fn first_change_recorded(&self, id: VolumeId) -> Result<(), DataError> {
        self.thread_of(id)?
            .ask(|answer| Command::FirstChangeRecorded { id, answer })
            .await?
    }

    /// As if the volume's head had given so many versions under its epoch.
    #[cfg(test)]
    pub(crate) async fn set_versions_given(&self, id: VolumeId, versions: u64) {
        let command = |answer| Command::SetVersionsGiven {
            id,
            versions,
            answer,
        };
        let thread = self.thread_of(id).expect("open");
        thread.ask(command).await.expect("alive").expect("open");
    }

    /// `None`: not open.
    pub async fn volume_status(&self, id: VolumeId) -> Option<VolumeRuntime> {
        self.thread_of(id)
            .ok()?
            .ask(|answer| Command::VolumeStatus { id, answer })
            .await
            .ok()?
    }

    /// Drops a layer from every store; returns when that is durable everywhere. The space comes back in the background.
    pub async fn delete_layer(&self, layer: LayerId) -> Result<(), DataError> {
        let mut pending = Vec::new();
        for thread in &self.0.threads {
            pending.extend(
                thread
                    .ask(|answer| Command::DropLayer { layer, answer })
                    .await?,
            );
        }
        wait_all(pending).await
    }

    /// Layers with blocks and the highest epoch each was written under, by store; what the metadata does not know of is
    /// an orphan.
    pub async fn layers(&self) -> Result<Vec<StoreLayers>, DataError> {
        let mut layers = Vec::new();
        for thread in &self.0.threads {
            layers.extend(thread.ask(Command::Layers).await?);
        }
        Ok(layers)
    }

    /// Every store as it is now.
    pub async fn store_statuses(&self) -> Vec<StoreReport> {
        let mut reports = Vec::new();
        for thread in &self.0.threads {
            reports.extend(thread.ask(Command::StoreStatuses).await.unwrap_or_default());
        }
        reports
    }

    /// Begins to verify a store from its start, at this rate; progress is in its status.
    pub async fn start_scrub(&self, store: StoreId, blocks_per_s: u64) -> Result<(), DataError> {
        self.scrub(store, Some(blocks_per_s)).await
    }

    /// Ends the scrub of a store, if one runs.
    pub async fn stop_scrub(&self, store: StoreId) -> Result<(), DataError> {
        self.scrub(store, None).await
    }

    /// The next scrub that comes to its end. `None`: the threads have ended.
    pub async fn scrub_ended(&self) -> Option<ScrubEnd> {
        self.0.scrubs_ended.lock().await.recv().await
    }

    async fn scrub(&self, store: StoreId, blocks_per_s: Option<u64>) -> Result<(), DataError> {
        let command = |answer| Command::Scrub {
            store,
            blocks_per_s,
            answer,
        };
        self.thread_of_store(store)?.ask(command).await?
    }

    /// Takes a checkpoint of a store.
    pub async fn checkpoint(&self, store: StoreId) -> Result<(), DataError> {
        let command = |answer| Command::Checkpoint {
            store: Some(store),
            answer,
        };
        wait_all(self.thread_of_store(store)?.ask(command).await?).await
    }

    pub(super) fn thread_of_store(&self, id: StoreId) -> Result<&Mailbox, DataError> {
        let store = self.0.stores.iter().find(|store| store.id == id);
        Ok(&self.0.threads[store.ok_or(DataError::NoSuchStore(id))?.thread])
    }

    /// Which I/O engine the threads use, and why that one.
    pub fn engine_reason(&self) -> &str {
        self.0
            .threads
            .first()
            .map_or("", |thread| &thread.engine_reason)
    }

    /// The counters of the data path.
    pub fn metrics(&self) -> Metrics {
        self.0.metrics.clone()
    }

    /// Takes no more requests, finishes and answers those taken, closes the stores in order, closes the sockets, and
    /// ends the threads.
    pub async fn drain(&self) {
        let patience = self.0.drain_timeout;
        let mut answers = Vec::new();
        for thread in &self.0.threads {
            let (answer, answered) = oneshot::channel();
            if thread.send(Command::Drain { patience, answer }).is_ok() {
                answers.push(answered);
            }
        }
        for answer in answers {
            let _ = answer.await;
        }
        let joins = std::mem::take(&mut *lock(&self.0.joins));
        let _ = tokio::task::spawn_blocking(move || {
            joins.into_iter().for_each(|join| drop(join.join()))
        })
        .await;
    }
}

impl Attach for DataPlane {
    fn attach(&self, client: AttachedClient) -> Result<(), AttachError> {
        let thread = self
            .thread_of(client.session.volume)
            .map_err(|_| AttachError::NotOpen)?;
        thread
            .send(Command::Attach(Box::new(client)))
            .map_err(|_| AttachError::ShuttingDown)
    }
}

async fn wait_all(
    pending: Vec<oneshot::Receiver<Result<(), StoreError>>>,
) -> Result<(), DataError> {
    for answer in pending {
        answer.await.map_err(|_| DataError::Draining)??;
    }
    Ok(())
}

type Started = Result<(Mailbox, Vec<OpenedStore>), StartError>;

/// The body of a data thread: everything it owns is made here and stays here.
fn run_thread(
    index: usize,
    count: usize,
    config: &DataConfig,
    tells: (Metrics, Tells),
    started: oneshot::Sender<Started>,
) {
    let (thread, mailbox, opened) = match build_thread(index, count, config, tells) {
        Ok(built) => built,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let mut thread = thread;
    if started.send(Ok((mailbox, opened))).is_err() {
        return;
    }
    if let Err(error) = thread.run() {
        tracing::error!(%error, "the I/O engine failed; ending the daemon, which loses nothing that was acknowledged");
        std::process::abort();
    }
    thread.remove_tails();
}

fn build_thread(
    index: usize,
    count: usize,
    config: &DataConfig,
    (metrics, tells): (Metrics, Tells),
) -> Result<(DataThread, Mailbox, Vec<OpenedStore>), StartError> {
    let (engine, reason) = engine::open(config.engine).map_err(|source| StartError::Io {
        what: "no I/O engine",
        source,
    })?;
    tracing::info!(thread = index, "I/O engine {reason}");
    let mut engine = match &config.fault {
        Some(plan) => {
            tracing::warn!("faults are being injected into disk operations");
            Box::new(FaultEngine::new(engine, plan.clone()))
        }
        None => engine,
    };
    let mut drivers = Vec::new();
    let mut reports = Vec::new();
    for store in config.stores.iter().skip(index).step_by(count) {
        let opened = open_store(config, store, index)?;
        let file = engine
            .add_file(opened.fd)
            .map_err(|source| StartError::Io {
                what: "the I/O engine refused a store",
                source,
            })?;
        let report = &opened.report.report;
        let lost_answers = config.accept_tail_loss && report.tail_void && !report.clean;
        drivers.push(StoreDriver {
            store: opened.store,
            id: opened.report.id,
            path: opened.report.path.clone(),
            file,
            tail: opened.tail,
            metrics: metrics.add_store(opened.report.id),
            parked: Default::default(),
            waiting_for_index: Vec::new(),
            lost_answers,
            read_failures: Sparse::default(),
        });
        reports.push(opened.report);
    }
    let tails: Vec<(*mut u8, usize)> = drivers
        .iter_mut()
        .map(|driver| driver.store.tail_memory())
        .collect();
    // SAFETY: a store keeps its tail mapped until it is dropped, which the thread does after its engine.
    if let Err(error) = unsafe { engine.pin(&tails) } {
        tracing::info!(thread = index, %error, "the tails' memory could not be registered with io_uring (the limit on locked memory?); writes take a little more processor time");
    }
    let (commands, inbox) = mpsc::channel();
    let mailbox = Mailbox {
        commands,
        engine_reason: reason,
        waker: engine.waker(),
    };
    let mut limits = config.limits;
    limits.bytes /= count;
    // An id that is never met again: without the real one no replica can know that it kept its memory.
    let boot = crate::tail::boot_id().map_or_else(|_| uuid::Uuid::new_v4(), uuid::Uuid::from_bytes);
    let cluster = Cluster::new(
        BootId(boot),
        config.seals.clone(),
        tells.cluster.clone(),
        config.lease.as_micros() as u64,
        config.fill_bytes_per_second,
    );
    let parts = Parts {
        index,
        engine,
        stores: drivers,
        limits,
        registry: metrics,
        tells,
        cluster,
        commands: inbox,
        spin: config.spin,
    };
    Ok((DataThread::new(parts), mailbox, reports))
}
