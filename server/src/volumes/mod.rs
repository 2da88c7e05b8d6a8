//! The volume service: ties the records in the metadata store to what the data plane serves.
//!
//! The order of steps keeps three promises through a crash at any point:
//! * a volume is served only under an epoch that was claimed for this opening;
//! * data is dropped only after a tombstone says so, and a tombstone goes only after the data;
//! * a layer that no record names is never touched: it is reported, for a person to decide.

mod annotations;
mod catalog;
mod changes;
mod diagnosis;
mod elsewhere;
mod epochs;
mod error;
mod exports;
mod following;
mod formats;
mod heads;
mod host;
mod lifecycle;
mod nodes;
mod placing;
mod publications;
mod replicated;
mod serving;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use ashlar_core::records::{
    Annotations, AnnotationsRecord, HeadClaim, NameRecord, Versioned, VolumeLimits, VolumeName,
    VolumeRecord, Zones, keys, round_up_to_block,
};
use ashlar_core::units::{Epoch, LayerId, NodeId, StoreId, VolumeId};
use uuid::Uuid;

pub use catalog::Serving;
use catalog::{Catalog, Entry};
use changes::Change;
pub use error::VolumeError;
pub use host::{HostError, VolumeHost, VolumeRuntime, VolumeSpec};
pub use placing::ClusterRoom;
pub use publications::Unpublished;

use crate::events::Events;
use crate::meta::{self, MetadataStore};

/// How often a change is decided again after a conflict. On one node only this process changes records, so a conflict
/// is two requests at once; each round one of them wins.
const ATTEMPTS: usize = 64;

/// How a volume is created.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeSettings {
    /// Changes are refused.
    pub read_only: bool,
    /// Every acknowledgement waits for durability.
    pub write_through: bool,
    /// Bounds on what its clients may ask of it.
    pub limits: VolumeLimits,
    /// What others keep with it.
    pub annotations: Annotations,
    /// Copies of each chunk; 0 is the daemon's default: three in a cluster of three nodes, as many as there are nodes in
    /// a smaller one, one on a single node.
    pub replicas: u32,
    /// How many of them must be in sync for a write to be answered; 0: more than half of them, and one of two.
    pub min_in_sync: u32,
    /// Where copies may lie.
    pub zones: Zones,
}

/// A volume and what is going on with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeView {
    /// As recorded.
    pub record: VolumeRecord,
    /// Whether clients can reach it.
    pub serving: Serving,
    /// `None` when it is not open.
    pub runtime: Option<VolumeRuntime>,
    /// False only when it is certain that no block of it was ever changed.
    pub ever_written: bool,
    /// What others keep with it.
    pub annotations: Arc<AnnotationsRecord>,
}

/// The volume service of one daemon.
pub struct Volumes {
    store: Arc<dyn MetadataStore>,
    host: Arc<dyn VolumeHost>,
    head: HeadClaim,
    catalog: Mutex<Catalog>,
    /// Those of volumes that have any.
    annotations: Mutex<BTreeMap<VolumeId, Arc<AnnotationsRecord>>>,
    /// Whether other daemons share the records; then new volumes have replica sets.
    is_shared: bool,
    /// Of nodes that were heard of by watching them: whether they are alive.
    heard: Mutex<BTreeMap<NodeId, bool>>,
    /// Told whenever serving a volume begins or ends.
    served: tokio::sync::watch::Sender<()>,
    /// Told whenever a volume with replicas is to be deleted.
    burials: Arc<tokio::sync::Notify>,
    /// Layers found in stores that no record names.
    unknown_layers: Mutex<Vec<LayerId>>,
    /// What the stores held at the start, and the highest epoch of each.
    written: Mutex<BTreeMap<LayerId, Epoch>>,
    draining: AtomicBool,
    /// Where it is told what happens to volumes.
    events: Events,
    /// Held for reading by every change, so that a drain can wait for them.
    changes: Arc<tokio::sync::RwLock<()>>,
}

impl Volumes {
    /// Reads every record, claims and opens every active volume, and takes unfinished deletions up again in the
    /// background. One volume that cannot be opened does not keep the others from being served. `lost`: stores from which
    /// answered writes may be gone.
    pub async fn start(
        store: Arc<dyn MetadataStore>,
        host: Arc<dyn VolumeHost>,
        node: NodeId,
        is_shared: bool,
        lost: &BTreeSet<StoreId>,
        events: Events,
    ) -> Result<Arc<Volumes>, VolumeError> {
        let head = HeadClaim {
            node,
            incarnation: Uuid::new_v4(),
        };
        let service = Arc::new(Volumes {
            store,
            host,
            head,
            catalog: Mutex::default(),
            annotations: Mutex::default(),
            is_shared,
            heard: Mutex::default(),
            served: tokio::sync::watch::Sender::new(()),
            burials: Arc::default(),
            unknown_layers: Mutex::default(),
            written: Mutex::default(),
            draining: AtomicBool::new(false),
            events,
            changes: Arc::default(),
        });
        service.load().await?;
        service.load_annotations().await?;
        service.survey_stores().await?;
        service.follow_heads();
        service.lose_answers(lost).await?;
        service.open_all().await?;
        service.resume_deletions();
        service.renew_epochs();
        service.record_first_changes();
        if is_shared {
            service.follow_records();
        }
        Ok(service)
    }

    /// Creates a volume and serves it. Answers the size it was rounded to in the record.
    pub async fn create(
        self: &Arc<Self>,
        name: &str,
        size_bytes: u64,
        settings: VolumeSettings,
    ) -> Result<VolumeView, VolumeError> {
        let name = VolumeName::parse(name)?;
        let size = round_up_to_block(size_bytes)?;
        self.to_the_end(|service| async move { service.create_now(name, size, settings).await })
            .await
    }

    /// Gives a volume another name.
    pub async fn rename(
        self: &Arc<Self>,
        reference: &str,
        name: &str,
    ) -> Result<VolumeView, VolumeError> {
        let name = VolumeName::parse(name)?;
        let reference = reference.to_owned();
        self.to_the_end(|service| async move { service.rename_now(&reference, &name).await })
            .await
    }

    /// Makes a volume larger. Answers it and its size before.
    pub async fn resize(
        self: &Arc<Self>,
        reference: &str,
        size_bytes: u64,
    ) -> Result<(VolumeView, u64), VolumeError> {
        let size = round_up_to_block(size_bytes)?;
        let reference = reference.to_owned();
        self.to_the_end(|service| async move { service.resize_now(&reference, size).await })
            .await
    }

    /// Changes settings; `None` leaves one as it is.
    pub async fn configure(
        self: &Arc<Self>,
        reference: &str,
        read_only: Option<bool>,
        write_through: Option<bool>,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            service
                .configure_now(&reference, read_only, write_through)
                .await
        })
        .await
    }

    /// Changes the limits of a volume; `None` leaves a bound as it is, 0 removes it. Nobody has to disconnect.
    pub async fn limit(
        self: &Arc<Self>,
        reference: &str,
        iops: Option<u64>,
        bytes_per_second: Option<u64>,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            let (before, _guard) = service.lock_volume(&reference).await?;
            let (id, now) = (before.record.id, before.record.limits);
            let limits = VolumeLimits::check(
                iops.unwrap_or(now.iops.unwrap_or(0)),
                bytes_per_second.unwrap_or(now.bytes_per_second.unwrap_or(0)),
            )?;
            if let Some(limited) = service.change(&Change::Limit { id, limits }).await? {
                tracing::info!(volume = %limited.record.name, id = %id.0, ?limits, "volume limited");
                service.update(limited);
            }
            match service.host.set_limits(id, limits).await {
                // It gets them when it is opened.
                Ok(()) | Err(HostError::NotOpen) => service.get(&id.0.to_string()),
                Err(source) => Err(VolumeError::Host { reference, source }),
            }
        })
        .await
    }

    /// Changes how many copies must be in sync for a write to be answered. Nobody has to disconnect; the head, wherever it
    /// is, follows the record.
    pub async fn require_in_sync(
        self: &Arc<Self>,
        reference: &str,
        min_in_sync: u32,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            let (before, _guard) = service.lock_volume(&reference).await?;
            let id = before.record.id;
            let change = Change::RequireInSync { id, min_in_sync };
            if let Some(changed) = service.change(&change).await? {
                tracing::info!(volume = %changed.record.name, id = %id.0, min_in_sync, "copies that must be in sync");
                service.record_seen(changed).await;
            }
            service.get(&id.0.to_string())
        })
        .await
    }

    /// Confines the copies of a volume to zones that `check_zones` found large enough, from now on. Nobody has to
    /// disconnect; the controller moves what lies elsewhere.
    pub async fn confine(
        self: &Arc<Self>,
        reference: &str,
        zones: Zones,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            let (before, _guard) = service.lock_volume(&reference).await?;
            let id = before.record.id;
            if let Some(changed) = service.change(&Change::Confine { id, zones: &zones }).await? {
                tracing::info!(volume = %changed.record.name, id = %id.0, %zones, "zones of its copies");
                service.record_seen(changed).await;
            }
            service.get(&id.0.to_string())
        })
        .await
    }

    /// Deletes a volume that nobody uses. Answers when its blocks are durably dropped.
    pub async fn delete(self: &Arc<Self>, reference: &str) -> Result<VolumeId, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move { service.delete_now(&reference).await })
            .await
    }

    /// One volume, by name or id.
    pub fn get(&self, reference: &str) -> Result<VolumeView, VolumeError> {
        let entry = self.catalog().find(reference).cloned();
        entry
            .map(|entry| self.view(&entry))
            .ok_or_else(|| VolumeError::NotFound {
                reference: reference.to_owned(),
            })
    }

    /// Every volume, ordered by name.
    pub fn list(&self) -> Vec<VolumeView> {
        let all = self.catalog().all();
        all.iter().map(|entry| self.view(entry)).collect()
    }

    /// Every volume that this daemon knows of: those with replicas, and its own.
    pub(crate) fn records(&self) -> Vec<Versioned<VolumeRecord>> {
        let all = self.catalog().all();
        all.into_iter().map(|entry| entry.current).collect()
    }

    /// The volume that a layer belongs to.
    pub fn owner_of(&self, layer: LayerId) -> Option<VolumeId> {
        let all = self.catalog().all();
        all.iter()
            .find(|entry| entry.current.record.layers.contains(&layer))
            .map(|entry| entry.current.record.id)
    }

    /// Layers that stores hold and no record names; never dropped by themselves.
    pub fn unknown_layers(&self) -> Vec<LayerId> {
        lock(&self.unknown_layers).clone()
    }

    /// Refuses changes and look-ups from here on, and waits for the changes under way.
    pub async fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        let _all = self.changes.write().await;
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        lock(&self.catalog)
    }

    fn view(&self, entry: &Entry) -> VolumeView {
        let record = entry.current.record.clone();
        let runtime = self.host.runtime(record.id);
        VolumeView {
            ever_written: self.ever_written(&record, &entry.serving),
            annotations: self.annotations_of(record.id),
            record,
            serving: entry.serving.clone(),
            runtime,
        }
    }

    /// Runs a change in a task of its own: a caller that goes away half-way must not leave a change half done.
    async fn to_the_end<T, F, W>(self: &Arc<Self>, work: W) -> Result<T, VolumeError>
    where
        T: Send + 'static,
        W: FnOnce(Arc<Volumes>) -> F,
        F: Future<Output = Result<T, VolumeError>> + Send + 'static,
    {
        let under_way = self.changes.clone().read_owned().await;
        if self.is_draining() {
            return Err(VolumeError::ShuttingDown);
        }
        let work = work(Arc::clone(self));
        let task = tokio::spawn(async move {
            let _under_way = under_way;
            work.await
        });
        // The task ends early only when the runtime is shut down; a panic has already brought the process down.
        task.await.unwrap_or(Err(VolumeError::ShuttingDown))
    }

    /// The volume meant, locked against other changes, as it is now.
    async fn lock_volume(
        &self,
        reference: &str,
    ) -> Result<(Versioned<VolumeRecord>, tokio::sync::OwnedMutexGuard<()>), VolumeError> {
        let known = self.catalog().find(reference).cloned();
        let Some(entry) = known else {
            return Err(self.missing(reference).await);
        };
        let guard = entry.changing.clone().lock_owned().await;
        // Whoever held the lock may have renamed or deleted it.
        let id = entry.current.record.id;
        let entry = self.catalog().get(id).cloned();
        let entry = entry.ok_or_else(|| VolumeError::NotFound {
            reference: reference.to_owned(),
        })?;
        Ok((entry.current, guard))
    }

    /// Replaces the record in the catalog, as a change that does not touch serving does.
    fn update(&self, current: Versioned<VolumeRecord>) {
        let mut catalog = self.catalog();
        // A watch may have been quicker with what came after it.
        if let Some(known) = catalog.get(current.record.id)
            && known.current.changed_at <= current.changed_at
        {
            let serving = known.serving.clone();
            catalog.put(current, serving);
        }
    }

    async fn name_holder(&self, name: &VolumeName) -> Result<Option<NameRecord>, VolumeError> {
        let held = meta::read::<NameRecord>(&*self.store, &keys::name(name)).await?;
        Ok(held.map(|held| held.record))
    }

    async fn reread(&self, id: VolumeId) -> Result<Versioned<VolumeRecord>, VolumeError> {
        let reference = || id.0.to_string();
        let current = meta::read::<VolumeRecord>(&*self.store, &keys::volume(id)).await?;
        let current = current.ok_or_else(|| VolumeError::NotFound {
            reference: reference(),
        })?;
        match current.record.check_invariants() {
            Ok(()) => Ok(current),
            Err(problem) => Err(VolumeError::BadRecord {
                reference: reference(),
                problem: problem.to_owned(),
            }),
        }
    }
}

/// Now, in milliseconds since 1970-01-01 UTC.
pub(crate) fn unix_ms() -> u64 {
    unix_ms_of(SystemTime::now())
}

/// A moment in milliseconds since 1970-01-01 UTC.
pub(crate) fn unix_ms_of(moment: SystemTime) -> u64 {
    moment
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// Nothing is left half-done under these locks, so one that a panicking thread held is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
