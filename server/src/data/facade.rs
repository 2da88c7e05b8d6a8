//! The data plane as the rest of the daemon sees it.

mod replicated;
mod thread;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use ashlar_core::nbd::session::Admitted;
use ashlar_core::records::VolumeLimits;
use ashlar_core::store::StoreError;
use ashlar_core::units::{Epoch, LayerId, StoreId, VolumeId};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use thread::run_thread;

use super::cluster::ClusterTell;
use super::command::Command;
use super::config::{
    DataConfig, DataError, OpenedStore, ScrubEnd, StartError, StoreLayers, StoreReport, Tells,
    VolumeRuntime, VolumeSpec,
};
use crate::engine::Waker;
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

    /// Begins to verify a store from its start, at this rate, in place of a scrub that runs. Returns its number; progress
    /// is in the store's status.
    pub async fn start_scrub(&self, store: StoreId, blocks_per_s: u64) -> Result<u64, DataError> {
        let command = |answer| Command::StartScrub {
            store,
            blocks_per_s,
            answer,
        };
        self.thread_of_store(store)?.ask(command).await?
    }

    /// Ends the scrub of this number, if it runs.
    pub async fn stop_scrub(&self, store: StoreId, pass: u64) -> Result<(), DataError> {
        let command = |answer| Command::StopScrub {
            store,
            pass,
            answer,
        };
        self.thread_of_store(store)?.ask(command).await?
    }

    /// The next scrub that comes to its end. `None`: the threads have ended.
    pub async fn scrub_ended(&self) -> Option<ScrubEnd> {
        self.0.scrubs_ended.lock().await.recv().await
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
