//! A start: what the records and the stores say, and every volume claimed and opened.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::{
    LayerCounter, Record, StoreRecord, Transaction, Versioned, VolumeRecord, VolumeState, claim,
    keys, pass_over_layers,
};
use ashlar_core::units::{Epoch, LayerId, StoreId};

use super::{ATTEMPTS, Change, Serving, VolumeError, Volumes, lock};
use crate::meta::{self, MetadataError, Outcome};

/// Volumes claimed by one transaction at the start: a condition and an effect each, within
/// [`meta::TRANSACTION_MAX_STEPS`]. One sync for all of them keeps the start short.
const CLAIMS_AT_ONCE: usize = 100;
/// Bytes of their records, which name every client node: two thirds of etcd's default limit for a request.
const CLAIMED_BYTES_AT_ONCE: usize = 1 << 20;

/// How long a start waits for volumes whose replicas are on other nodes.
const START_TIME: Duration = Duration::from_secs(6);

impl Volumes {
    pub(super) async fn load(&self) -> Result<(), VolumeError> {
        let elsewhere = self.stores_elsewhere().await?;
        let listing = self.store.list(keys::VOLUMES).await?;
        for entry in listing.entries {
            let current = entry.read::<VolumeRecord>()?;
            if let Err(problem) = current.record.check_invariants() {
                let reference = current.record.name.to_string();
                return Err(VolumeError::BadRecord {
                    reference,
                    problem: problem.to_owned(),
                });
            }
            let stores = &current.record.placement.stores;
            let is_replicated = current.record.placement.is_replicated();
            if !is_replicated && stores.iter().all(|store| elsewhere.contains(store)) {
                continue;
            }
            let serving = match current.record.state {
                VolumeState::Active => Serving::Opening,
                VolumeState::Deleting => Serving::No("it is being deleted".to_owned()),
            };
            self.catalog().put(current, serving);
        }
        Ok(())
    }

    /// Stores that another node of the cluster has. A volume that lies on those alone is that node's to serve.
    async fn stores_elsewhere(&self) -> Result<BTreeSet<StoreId>, VolumeError> {
        let mut elsewhere = BTreeSet::new();
        for entry in self.store.list(keys::STORES).await?.entries {
            let record = entry.read::<StoreRecord>()?.record;
            if record.node.is_some_and(|node| node != self.head.node) {
                elsewhere.insert(record.id);
            }
        }
        Ok(elsewhere)
    }

    /// Claims and opens every active volume. The claims go in batches; a batch that does not commit is claimed one by
    /// one, so that one bad volume spoils nothing.
    pub(super) async fn open_all(&self) -> Result<(), VolumeError> {
        let all = self.catalog().all();
        let active: Vec<_> = all
            .into_iter()
            .map(|entry| entry.current)
            .filter(|current| current.record.state == VolumeState::Active)
            .collect();
        let (replicated, active): (Vec<_>, Vec<_>) = active
            .into_iter()
            .partition(|current| current.record.placement.is_replicated());
        let mut opening = Vec::new();
        for current in replicated {
            // What this node served last it serves again; what another serves is left to it.
            let (id, head) = (current.record.id, current.record.head);
            if head.is_none_or(|head| head.node != self.head.node) {
                let elsewhere = Serving::elsewhere(&current.record);
                self.catalog().put(current, elsewhere);
                continue;
            }
            match self.open_replicated(current).await {
                Ok(()) => opening.push(id),
                Err(error) => self.log_unserved(Err(error)),
            }
        }
        // Replicas that can be reached are sealed in no time; those that cannot keep nobody else waiting for long.
        let all = async {
            for id in opening {
                let _ = self.wait_until_served(id).await;
            }
        };
        if tokio::time::timeout(START_TIME, all).await.is_err() {
            tracing::warn!("volumes with replicas on other nodes are still being opened");
        }
        for batch in batches(&active) {
            match self.claim_batch(batch).await? {
                Some(claimed) => {
                    for volume in claimed {
                        self.log_unserved(self.open(volume).await);
                    }
                }
                None => {
                    for volume in batch {
                        self.log_unserved(self.serve(volume.clone()).await);
                    }
                }
            }
        }
        Ok(())
    }

    /// Before any volume is served: those that lie on `lost` tell their clients from now on that answered writes may be
    /// gone.
    pub(super) async fn lose_answers(&self, lost: &BTreeSet<StoreId>) -> Result<(), VolumeError> {
        let all = self.catalog().all();
        for entry in all {
            let record = &entry.current.record;
            let stores = &record.placement.stores;
            // Copies are looked at when their head opens them.
            if record.state != VolumeState::Active
                || record.write_through
                || record.placement.is_replicated()
                || !stores.iter().any(|store| lost.contains(store))
            {
                continue;
            }
            let told = match self.change(&Change::LoseAnswers { id: record.id }).await {
                Ok(told) => told.ok_or(VolumeError::Contended)?,
                // Deleted since it was read: nobody relies on it.
                Err(VolumeError::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            tracing::warn!(
                volume = %record.name,
                client_generation = told.record.client_generation,
                "the machine lost power: writes that were answered and not flushed may be gone; clients must attach the volume anew"
            );
            self.update(told);
        }
        Ok(())
    }

    /// `None`: not all of them could be claimed together.
    async fn claim_batch(
        &self,
        batch: &[Versioned<VolumeRecord>],
    ) -> Result<Option<Vec<Versioned<VolumeRecord>>>, VolumeError> {
        let mut transaction = Transaction::new();
        let mut records = Vec::with_capacity(batch.len());
        for volume in batch {
            let Ok((record, step)) = claim(volume, self.head, self.written_epoch(&volume.record))
            else {
                return Ok(None);
            };
            transaction = transaction.and(step);
            records.push(record);
        }
        match self.store.commit(transaction).await? {
            Outcome::Conflict => Ok(None),
            Outcome::Committed(changed_at) => {
                let claimed = |record| Versioned { record, changed_at };
                Ok(Some(records.into_iter().map(claimed).collect()))
            }
        }
    }

    fn log_unserved(&self, outcome: Result<(), VolumeError>) {
        if let Err(error) = outcome {
            tracing::error!(%error, "a volume is not served");
        }
    }

    /// Looks at what the stores hold before anything is given out or served: metadata that was restored from a backup
    /// is older than the stores, and must not give a layer or an epoch out a second time.
    pub(super) async fn survey_stores(&self) -> Result<(), VolumeError> {
        let reference = || "in the stores".to_owned();
        let found = self.host.layers().await;
        let found = found.map_err(|source| VolumeError::Host {
            reference: reference(),
            source,
        })?;
        let (unknown, overtaken) = {
            let catalog = self.catalog();
            let known: BTreeSet<_> = catalog.layers().collect();
            let unknown: Vec<_> = found
                .keys()
                .copied()
                .filter(|layer| !known.contains(layer))
                .collect();
            let overtaken = catalog.all().into_iter().map(|entry| entry.current.record);
            let overtaken = overtaken
                .filter(|record| newest_epoch(&found, record) > record.epoch)
                .count();
            (unknown, overtaken)
        };
        if overtaken > 0 {
            tracing::warn!(
                volumes = overtaken,
                "the stores are newer than the metadata (restored from a backup?); the volumes' epochs are raised past what was used"
            );
        }
        if !unknown.is_empty() {
            let layers: Vec<_> = unknown.iter().map(|layer| layer.0).collect();
            tracing::warn!(
                ?layers,
                "stores hold layers that no volume names; they are kept, see `ashlar status`"
            );
        }
        if let Some((&highest, _)) = found.last_key_value() {
            self.pass_over(highest).await?;
        }
        *lock(&self.unknown_layers) = unknown;
        *lock(&self.written) = found;
        Ok(())
    }

    /// Moves the layer counter past ids that the stores have.
    async fn pass_over(&self, used: LayerId) -> Result<(), VolumeError> {
        for _ in 0..ATTEMPTS {
            let counter = meta::read::<LayerCounter>(&*self.store, keys::NEXT_LAYER).await?;
            let Some(transaction) = pass_over_layers(counter, used) else {
                return Ok(());
            };
            match self.store.commit(transaction).await {
                Ok(Outcome::Committed(_)) => return Ok(()),
                // The next round reads what became of it.
                Ok(Outcome::Conflict) | Err(MetadataError::Unknown { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(VolumeError::Contended)
    }

    /// The highest epoch that stores were found to hold blocks of this volume of, at the start.
    pub(super) fn written_epoch(&self, record: &VolumeRecord) -> Epoch {
        newest_epoch(&lock(&self.written), record)
    }

    pub(super) fn resume_deletions(self: &Arc<Self>) {
        let all = self.catalog().all();
        for entry in all.into_iter().filter(|entry| {
            let record = &entry.current.record;
            record.state == VolumeState::Deleting && !record.placement.is_replicated()
        }) {
            let service = Arc::clone(self);
            tokio::spawn(async move {
                let _guard = entry.changing.lock().await;
                if let Err(error) = service.bury(entry.current.record.id).await {
                    tracing::error!(%error, "an unfinished deletion could not be finished");
                }
            });
        }
    }
}

/// Cut so that each is one transaction.
fn batches(volumes: &[Versioned<VolumeRecord>]) -> Vec<&[Versioned<VolumeRecord>]> {
    let mut batches = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (index, volume) in volumes.iter().enumerate() {
        let more = volume.record.encode().len();
        if index - from == CLAIMS_AT_ONCE || (index > from && bytes + more > CLAIMED_BYTES_AT_ONCE)
        {
            batches.push(&volumes[from..index]);
            (from, bytes) = (index, 0);
        }
        bytes += more;
    }
    if from < volumes.len() {
        batches.push(&volumes[from..]);
    }
    batches
}

/// The highest epoch among a volume's layers.
fn newest_epoch(found: &BTreeMap<LayerId, Epoch>, record: &VolumeRecord) -> Epoch {
    record
        .layers
        .iter()
        .filter_map(|layer| found.get(layer))
        .copied()
        .max()
        .unwrap_or(Epoch(0))
}
