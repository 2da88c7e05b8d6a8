//! The records of volumes with replicas, followed as other daemons change them.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{
    MemberState, Record, Transaction, Versioned, VolumeRecord, VolumeState, finish_delete, keys,
};
use ashlar_core::units::{NodeId, VolumeId};

use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::{HostError, Serving, VolumeError, Volumes};
use crate::identity;
use crate::meta::{Batch, Change, Outcome, WatchEnd};

/// Until a watch that ended begins anew.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Until a deletion that failed, or that waits for another node, is looked at again.
const BURY_AGAIN: Duration = Duration::from_secs(10);

impl Volumes {
    /// Follows the records that other daemons change.
    pub(super) fn follow_records(self: &Arc<Self>) {
        tokio::spawn(follow(Arc::downgrade(self)));
        tokio::spawn(bury(Arc::downgrade(self), Arc::clone(&self.burials)));
    }

    async fn follow_once(self: &Arc<Self>) -> Result<(), VolumeError> {
        let listing = self.store.list(keys::VOLUMES).await?;
        let revision = listing.revision;
        let mut listed = BTreeSet::new();
        for entry in listing.entries {
            let current = entry.read::<VolumeRecord>()?;
            listed.insert(current.record.id);
            self.record_seen(current).await;
        }
        // Deleted while nothing was watched. What was made here since the listing is newer than it.
        for known in self.records() {
            let id = known.record.id;
            let was_there = known.changed_at <= revision && known.record.placement.is_replicated();
            if was_there && !listed.contains(&id) {
                self.gone(id);
            }
        }
        let mut watch = self.store.watch(keys::VOLUMES, revision).await?;
        loop {
            match watch.next().await {
                Ok(batch) => self.batch_seen(batch).await?,
                Err(WatchEnd::Lagged | WatchEnd::Closed) => return Ok(()),
            }
        }
    }

    async fn batch_seen(self: &Arc<Self>, batch: Batch) -> Result<(), VolumeError> {
        for change in batch.changes {
            match change {
                Change::Put { key, value } => {
                    let record = VolumeRecord::decode(&key, &value).map_err(|error| {
                        crate::meta::MetadataError::Unreadable {
                            reason: error.to_string(),
                        }
                    })?;
                    let changed_at = batch.revision;
                    self.record_seen(Versioned { record, changed_at }).await;
                }
                Change::Deleted { key } => {
                    let id = key.strip_prefix(keys::VOLUMES).unwrap_or("");
                    if let Ok(id) = uuid::Uuid::try_parse(id) {
                        self.gone(VolumeId(id));
                    }
                }
            }
        }
        Ok(())
    }

    /// The record of a volume is not there any more.
    fn gone(&self, id: VolumeId) {
        self.host.record_seen(id, None);
        self.catalog().remove(id);
        self.served.send_replace(());
    }

    /// A record as it is now: the head, if it is here, and the catalog get to know.
    pub(super) async fn record_seen(self: &Arc<Self>, current: Versioned<VolumeRecord>) {
        let record = &current.record;
        if record.check_invariants().is_err() || !record.placement.is_replicated() {
            return;
        }
        let id = record.id;
        self.host.record_seen(id, Some(current.clone()));
        let is_deleting = record.state == VolumeState::Deleting;
        // In one step: what a head says meanwhile must not be written over by what was known before.
        let (is_published_anew, may_be_served) = {
            let mut catalog = self.catalog();
            let known = catalog.get(id);
            if known.is_some_and(|known| known.current.changed_at >= current.changed_at) {
                return;
            }
            let is_published_anew =
                known.is_some_and(|known| known.current.record.publications != record.publications);
            let is_own = record.head.is_some_and(|head| head.node == self.head.node);
            let serving = match known.map(|known| &known.serving) {
                Some(here @ (Serving::Yes | Serving::Opening | Serving::Sealing)) => here.clone(),
                // Why this node does not serve what it should.
                Some(failed @ Serving::No(_)) if is_own => failed.clone(),
                Some(Serving::No(_) | Serving::Elsewhere(_)) | None => Serving::elsewhere(record),
            };
            let may_be_served = matches!(serving, Serving::Yes | Serving::Sealing);
            catalog.put(current, serving);
            (is_published_anew, may_be_served)
        };
        if is_published_anew && may_be_served && !is_deleting {
            let service = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = service.follow_publications(id).await {
                    tracing::warn!(id = %id.0, %error, "the publications of a volume, changed elsewhere, could not be followed");
                }
            });
        }
        if is_deleting {
            self.burials.notify_one();
        }
    }

    /// Lets in whom the record names, and ends the connections of others. After another daemon changed the publications of
    /// a volume that is served here, which it does only when it was the head a moment ago.
    async fn follow_publications(&self, id: VolumeId) -> Result<(), VolumeError> {
        let (_, _guard) = self.lock_volume(&id.0.to_string()).await?;
        let current = self.reread(id).await?;
        match self.host.fence(id, Some(current.record.admitted())).await {
            Ok(_) | Err(HostError::NotOpen) => Ok(()),
            Err(source) => Err(VolumeError::Host {
                reference: current.record.name.to_string(),
                source,
            }),
        }
    }

    /// Drops what this daemon has of a volume that is being deleted, and the record when every node that had a copy has dropped
    /// it, whichever of them is the last; one that was removed from the cluster counts as well. Repeated until the record is gone.
    /// The volume's lock is held.
    pub(super) async fn drop_replicas(&self, id: VolumeId) -> Result<(), VolumeError> {
        let Some(entry) = self.catalog().get(id).cloned() else {
            return Ok(());
        };
        let record = &entry.current.record;
        let mut dropped = self.dropped(id).await?;
        if !dropped.contains(&self.head.node) {
            self.drop_own(record).await?;
            let mine = Transaction::new()
                .when_unchanged(keys::volume(id), entry.current.changed_at)
                .put(keys::dropped(id, self.head.node), b"{}".to_vec());
            if self.store.commit(mine).await? == Outcome::Conflict {
                // The last node was quicker, and took the notes of who had dropped it away with the record.
                return match self.reread(id).await {
                    Err(VolumeError::NotFound { .. }) => {
                        self.gone(id);
                        Ok(())
                    }
                    read => read.and(Err(VolumeError::Contended)),
                };
            }
            dropped = self.dropped(id).await?;
        }
        let sets = record.placement.sets.iter();
        let holders: BTreeSet<NodeId> = sets
            .flat_map(|set| &set.replicas)
            .map(|replica| replica.node)
            .collect();
        for node in holders {
            if !dropped.contains(&node) && !self.is_removed(node).await? {
                return Ok(());
            }
        }
        let tombstone = match self.reread(id).await {
            // Another node saw that it was the last, too.
            Err(VolumeError::NotFound { .. }) => {
                self.gone(id);
                return Ok(());
            }
            read => read?,
        };
        let mut transaction = finish_delete(&tombstone);
        for node in dropped {
            transaction = transaction.delete(keys::dropped(id, node));
        }
        if let Outcome::Committed(_) = self.store.commit(transaction).await? {
            self.catalog().remove(id);
            tracing::info!(volume = %record.name, id = %id.0, "volume deleted");
            self.events.tell_of(record, None, Occurrence::VolumeDeleted);
        }
        Ok(())
    }

    async fn drop_own(&self, record: &VolumeRecord) -> Result<(), VolumeError> {
        let failed = |source| VolumeError::Host {
            reference: record.id.0.to_string(),
            source,
        };
        match self.host.close_volume(record.id).await {
            Ok(()) | Err(HostError::NotOpen) => {}
            Err(source) => return Err(failed(source)),
        }
        self.host.forget_replicas(record.id).await;
        for layer in &record.layers {
            self.host.delete_layer(*layer).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn is_removed(&self, node: NodeId) -> Result<bool, VolumeError> {
        let member = identity::member(&*self.store, node).await?;
        Ok(member.is_some_and(|member| member.record.state == MemberState::Removed))
    }

    /// Volumes with replicas that are being deleted.
    fn deleting(&self) -> Vec<VolumeId> {
        let records = self.records().into_iter().map(|current| current.record);
        records
            .filter(|record| {
                record.state == VolumeState::Deleting && record.placement.is_replicated()
            })
            .map(|record| record.id)
            .collect()
    }

    async fn bury_one(&self, id: VolumeId) {
        let buried = match self.lock_volume(&id.0.to_string()).await {
            Ok((_, _guard)) => self.drop_replicas(id).await,
            Err(VolumeError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = buried {
            tracing::warn!(id = %id.0, %error, "the copies of a deleted volume could not be dropped; trying again");
        }
    }
}

/// Carries deletions to their end as long as the daemon lives: whatever fails may pass, and other nodes may be away.
async fn bury(service: Weak<Volumes>, wanted: Arc<Notify>) {
    while let Some(volumes) = service.upgrade() {
        if volumes.is_draining() {
            return;
        }
        let mut burials = JoinSet::new();
        for id in volumes.deleting() {
            let volumes = Arc::clone(&volumes);
            burials.spawn(async move { volumes.bury_one(id).await });
        }
        while burials.join_next().await.is_some() {}
        let are_left = !volumes.deleting().is_empty();
        drop(volumes);
        if are_left {
            let _ = tokio::time::timeout(BURY_AGAIN, wanted.notified()).await;
        } else {
            wanted.notified().await;
        }
    }
}

async fn follow(service: Weak<Volumes>) {
    while let Some(volumes) = service.upgrade() {
        if volumes.is_draining() {
            return;
        }
        let followed = volumes.follow_once().await;
        drop(volumes);
        if let Err(error) = followed {
            tracing::warn!(%error, "the records of volumes cannot be followed; trying again");
            if let Some(volumes) = service.upgrade() {
                let reason = error.to_string();
                let what = Occurrence::RecordsAway { reason };
                volumes.events.tell_of_node(None, what);
            }
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}
