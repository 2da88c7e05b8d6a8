//! Volumes with replicas on several daemons: opened by a head that claims them itself, followed by what it tells, and by
//! what the records of the cluster say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::placement::{ClusterStore, spread};
use ashlar_core::records::{
    COPIES_MAX, ClientNodeId, HeadClaim, MemberRecord, MemberState, Placement, Replica, ReplicaSet,
    SpaceRecord, Transaction, Versioned, VolumeName, VolumeRecord, VolumeState, finish_delete,
    keys,
};
use ashlar_core::replication::{News, StopReason};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BYTES, NodeId, VolumeId};

use super::diagnosis::{remembered, stopped};
use super::{Change, HostError, Serving, VolumeError, VolumeView, Volumes, unix_ms};
use crate::data::{ReplicatedSpec, ReplicationStatus};
use crate::meta::{self, Batch, Change as RecordChange, Outcome, WatchEnd};
use crate::replication::ReplicationEvent;

/// Copies of a new volume, where there are as many nodes and nobody said otherwise.
const REPLICAS_BY_DEFAULT: usize = 3;
/// Why a volume is not served while its replicas are being sealed and made alike.
const SEALING: &str = "its replicas are being sealed";
/// How long who opens or creates a volume waits for it to be served: longer than a head waits for the lease of another.
const OPENING_TIME: Duration = Duration::from_secs(15);
/// Room that was told longer ago than this is not relied on: its daemon is probably gone.
const SPACE_IS_FRESH_MS: u64 = 60_000;
/// Until a watch that ended begins anew.
const TRY_AGAIN: Duration = Duration::from_secs(1);

impl Volumes {
    /// Replica sets for a new volume of this cluster.
    pub(super) async fn place_replicas(
        &self,
        size_bytes: u64,
        replicas: u32,
    ) -> Result<(u32, Placement), VolumeError> {
        let now = unix_ms();
        let (zones, draining) = self.zones().await?;
        let heard = super::lock(&self.heard).clone();
        let mut stores = Vec::new();
        for space in meta::list::<SpaceRecord>(&*self.store, keys::SPACES).await? {
            let space = space.record;
            // What was seen to change counts; clocks of nodes are compared only where nothing was seen yet.
            let is_alive = heard
                .get(&space.node)
                .copied()
                .unwrap_or(space.at_unix_ms + SPACE_IS_FRESH_MS >= now);
            if is_alive && !draining.contains(&space.node) {
                stores.push(ClusterStore {
                    id: space.store,
                    node: space.node,
                    zone: None,
                    free_blocks: space.free_blocks,
                });
            }
        }
        for store in &mut stores {
            store.zone = zones.get(&store.node).cloned();
        }
        let chunks = size_bytes.div_ceil(CHUNK_BYTES);
        let mut nodes: Vec<NodeId> = stores.iter().map(|store| store.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let replicas = match replicas {
            0 => nodes.len().clamp(1, REPLICAS_BY_DEFAULT) as u32,
            asked if asked > COPIES_MAX => return Err(VolumeError::TooManyCopies { asked }),
            asked => asked,
        };
        let sets = spread(&stores, replicas as usize, chunks, self.head.node)?;
        let replica = |at: &usize| Replica::in_sync(stores[*at].node, stores[*at].id);
        let sets = sets.iter().map(|set| ReplicaSet {
            replicas: set.iter().map(replica).collect(),
        });
        let placement = Placement {
            stores: Vec::new(),
            sets: sets.collect(),
        };
        Ok((replicas, placement))
    }

    /// What fails together with each node, and which nodes get nothing new.
    async fn zones(&self) -> Result<(BTreeMap<NodeId, String>, Vec<NodeId>), VolumeError> {
        let (mut zones, mut not_fit) = (BTreeMap::new(), Vec::new());
        for member in meta::list::<MemberRecord>(&*self.store, keys::MEMBERS).await? {
            let member = member.record;
            if let Some(zone) = member.labels.get("zone") {
                zones.insert(member.id, zone.clone());
            }
            if member.draining || member.state == MemberState::Removed {
                not_fit.push(member.id);
            }
        }
        Ok((zones, not_fit))
    }

    /// Every volume that this daemon knows of: those with replicas, and its own.
    pub(crate) fn records(&self) -> Vec<Versioned<VolumeRecord>> {
        let all = self.catalog().all();
        all.into_iter().map(|entry| entry.current).collect()
    }

    /// Which nodes are alive, as far as watching them shows.
    pub(crate) fn set_heard(&self, heard: BTreeMap<NodeId, bool>) {
        *super::lock(&self.heard) = heard;
    }

    /// Whether a volume may be changed here in a way that takes its head's clients away.
    pub(super) fn is_here(&self, current: &Versioned<VolumeRecord>) -> Result<(), VolumeError> {
        let record = &current.record;
        let is_served = self.is_open(record.id);
        match record.head {
            Some(head)
                if record.placement.is_replicated()
                    && !is_served
                    && head.node != self.head.node =>
            {
                Err(VolumeError::Elsewhere {
                    reference: record.name.to_string(),
                    node: head.node,
                })
            }
            _ => Ok(()),
        }
    }

    /// Has a head claim a volume and serve it; the catalog says when it does.
    pub(super) async fn open_replicated(
        &self,
        current: Versioned<VolumeRecord>,
    ) -> Result<(), VolumeError> {
        let id = current.record.id;
        let reference = current.record.name.to_string();
        let spec = ReplicatedSpec {
            written: self.written_epoch(&current.record),
            admitted: current.record.admitted(),
            // A swap of an earlier head of this daemon may land late, and must not be taken for one of this head.
            claim: HeadClaim {
                incarnation: uuid::Uuid::new_v4(),
                ..self.head
            },
            record: current.clone(),
        };
        let epoch = current.record.epoch;
        self.catalog()
            .put(current.clone(), Serving::No(SEALING.to_owned()));
        self.events
            .tell_of(&current.record, None, Occurrence::VolumeClaimed { epoch });
        match self.host.open_replicated(spec).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let reason = error.to_string();
                let what = Occurrence::VolumeNotServed {
                    reason: reason.clone(),
                };
                self.events.tell_of(&current.record, None, what);
                self.catalog().put(current, Serving::No(reason.clone()));
                tracing::error!(volume = reference, id = %id.0, %error, "a volume is not served");
                Err(VolumeError::NotServed { reference, reason })
            }
        }
    }

    /// Serves a volume here, wherever it is served now: its old head is fenced, and its clients' connections end. For a
    /// client node, only when the volume is published to that one.
    pub async fn open_here(
        self: &Arc<Self>,
        reference: &str,
        client: Option<ClientNodeId>,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            service.hear_of(&reference).await?;
            let (known, _guard) = service.lock_volume(&reference).await?;
            let id = known.record.id;
            // The catalog may be behind: a node that was fenced must not take the volume from the one that has it now.
            let current = service.reread(id).await?;
            if let Some(client) = client
                && current.record.publication_of(&client).is_none()
            {
                return Err(VolumeError::NotPublished {
                    reference,
                    node: client,
                });
            }
            if !current.record.placement.is_replicated() {
                return Err(VolumeError::NotServed {
                    reference,
                    reason: "it has one copy, on the stores of one node, and is served there alone"
                        .to_owned(),
                });
            }
            service.take_over(current).await?;
            service.get(&id.0.to_string())
        })
        .await
    }

    /// Looks a volume up that another daemon may have made a moment ago.
    async fn hear_of(self: &Arc<Self>, reference: &str) -> Result<(), VolumeError> {
        if self.catalog().find(reference).is_some() {
            return Ok(());
        }
        let id = match VolumeName::parse(reference) {
            Ok(name) => self.name_holder(&name).await?.map(|held| held.volume),
            Err(_) => None,
        };
        let id = id.or_else(|| reference.parse().ok().map(VolumeId));
        if let Some(id) = id
            && let Some(current) =
                meta::read::<VolumeRecord>(&*self.store, &keys::volume(id)).await?
        {
            self.record_seen(current).await;
        }
        Ok(())
    }

    /// Serves a volume with replicas here; one that is stays as it is. Its lock is held.
    async fn take_over(&self, current: Versioned<VolumeRecord>) -> Result<(), VolumeError> {
        let id = current.record.id;
        if self.is_open(id) {
            return Ok(());
        }
        match self.open_replicated(current).await {
            // Being opened already is as good.
            Ok(()) | Err(VolumeError::NotServed { .. }) => {}
            Err(error) => return Err(error),
        }
        self.wait_until_served(id).await
    }

    /// Takes over a volume with replicas when a change of its publications is due: only its head can tell who is
    /// connected, and end that. Its lock is held.
    pub(super) async fn take_over_for(
        &self,
        record: &VolumeRecord,
        change: &Change<'_>,
    ) -> Result<(), VolumeError> {
        let is_due = record.placement.is_replicated()
            && !self.is_open(record.id)
            && self.decide(change).await?.is_some();
        if is_due {
            let current = self.reread(record.id).await?;
            self.take_over(current).await?;
        }
        Ok(())
    }

    fn is_open(&self, id: VolumeId) -> bool {
        self.catalog()
            .get(id)
            .is_some_and(|entry| entry.serving == Serving::Yes)
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

    /// How a volume with replicas is doing, if its head is here.
    pub async fn replication(&self, id: VolumeId) -> Option<ReplicationStatus> {
        self.host.replication(id).await
    }

    /// Waits until a volume that is being opened is served.
    pub(super) async fn wait_until_served(&self, id: VolumeId) -> Result<(), VolumeError> {
        let mut changes = self.served.subscribe();
        let served = async {
            loop {
                let serving = self.catalog().get(id).map(|entry| entry.serving.clone());
                match serving {
                    Some(Serving::Yes) => return Ok(()),
                    Some(Serving::No(reason)) if reason != SEALING => return Err(reason),
                    Some(Serving::No(_)) => {}
                    None => return Err("it was deleted".to_owned()),
                }
                if changes.changed().await.is_err() {
                    return Err("the daemon is shutting down".to_owned());
                }
            }
        };
        let outcome = tokio::time::timeout(OPENING_TIME, served).await;
        let reason = match outcome {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(reason)) => reason,
            Err(_) => "its replicas could not be sealed in time; `ashlar volume show` tells which are missing".to_owned(),
        };
        Err(VolumeError::NotServed {
            reference: id.0.to_string(),
            reason,
        })
    }

    /// Follows what heads tell, as long as the data plane lives.
    pub(super) fn follow_heads(self: &Arc<Self>) {
        let (host, service) = (self.host.clone(), Arc::downgrade(self));
        tokio::spawn(async move {
            while let Some(event) = host.replication_event().await {
                let Some(service) = service.upgrade() else {
                    return;
                };
                service.on_replication(event).await;
            }
        });
    }

    async fn on_replication(self: &Arc<Self>, event: ReplicationEvent) {
        match event {
            ReplicationEvent::Serving {
                volume,
                client_generation,
            } => {
                // Before anybody is let in: who comes back asks for it.
                self.catalog().raise_generation(volume, client_generation);
                self.set_serving(volume, Serving::Yes);
                self.tell(volume, None, Occurrence::VolumeServed);
                tracing::info!(id = %volume.0, "a volume is served");
            }
            ReplicationEvent::SessionsEnded {
                volume,
                client_generation,
            } => {
                self.catalog().raise_generation(volume, client_generation);
                self.tell(volume, None, Occurrence::SessionsEnded);
                tracing::error!(id = %volume.0, client_generation, "every copy lost power: writes that were answered and not flushed may be gone; the volume's clients were disconnected");
            }
            ReplicationEvent::Stopped { volume, reason } => {
                // A new head of this daemon may have begun before the end of the last one was told.
                if self.host.replication(volume).await.is_some() {
                    return;
                }
                self.tell(volume, None, stopped(reason));
                let text = match reason {
                    StopReason::Closed => "it was closed".to_owned(),
                    StopReason::Fenced { .. } => {
                        tracing::warn!(id = %volume.0, %reason, "a volume is no longer served here");
                        "another node serves it".to_owned()
                    }
                    StopReason::Deleted => {
                        self.catalog().remove(volume);
                        self.served.send_replace(());
                        return;
                    }
                    StopReason::EpochsExhausted => {
                        tracing::error!(id = %volume.0, %reason, "a volume is no longer served");
                        reason.to_string()
                    }
                };
                self.set_serving(volume, Serving::No(text));
            }
            ReplicationEvent::News { volume, node, news } => self.on_news(volume, node, &news),
        }
    }

    fn on_news(&self, volume: VolumeId, node: Option<NodeId>, news: &News) {
        self.tell(volume, node, remembered(news));
        let node = node.map_or_else(String::new, |node| node.0.to_string());
        let id = volume.0;
        match news {
            News::Failed { status, .. } => match status {
                Some(status) => {
                    tracing::warn!(%id, node, %status, "a replica failed; acknowledgements wait until it is recorded as out of sync");
                }
                None => {
                    tracing::warn!(%id, node, "a replica does not answer; acknowledgements wait until it is recorded as out of sync");
                }
            },
            News::Dropped { set, .. } => {
                tracing::warn!(%id, node, set = set.0, "a replica is out of sync");
            }
            News::ResyncStarted { set, .. } => {
                tracing::info!(%id, node, set = set.0, "a replica is being brought up to date");
            }
            News::ResyncFailed { set, .. } => {
                tracing::warn!(%id, node, set = set.0, "bringing a replica up to date was cut off; it is tried again");
            }
            News::Rejoined {
                set, copied_blocks, ..
            } => {
                tracing::info!(%id, node, set = set.0, copied_bytes = copied_blocks * BLOCK_BYTES as u64, "a replica is in sync again");
            }
            News::Removed { set, .. } => {
                tracing::info!(%id, node, set = set.0, "a replica was removed");
            }
            News::LostPower { .. } => {
                tracing::warn!(%id, node, "a replica lost power while it was open for writing");
            }
            News::Repaired {
                extent,
                first_block,
                count,
            } => {
                tracing::warn!(%id, chunk = extent.chunk.0, first_block, count, "damaged blocks were written again from a good copy");
            }
        }
        self.served.send_replace(());
    }

    fn set_serving(&self, id: VolumeId, serving: Serving) {
        {
            let mut catalog = self.catalog();
            if let Some(current) = catalog.get(id).map(|entry| entry.current.clone()) {
                catalog.put(current, serving);
            }
        }
        self.served.send_replace(());
    }

    // -- the records of a cluster

    /// Follows the records that other daemons change.
    pub(super) fn follow_records(self: &Arc<Self>) {
        tokio::spawn(follow(Arc::downgrade(self)));
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
                RecordChange::Put { key, value } => {
                    use ashlar_core::records::Record;
                    let record = VolumeRecord::decode(&key, &value).map_err(|error| {
                        crate::meta::MetadataError::Unreadable {
                            reason: error.to_string(),
                        }
                    })?;
                    let changed_at = batch.revision;
                    self.record_seen(Versioned { record, changed_at }).await;
                }
                RecordChange::Deleted { key } => {
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
    async fn record_seen(self: &Arc<Self>, current: Versioned<VolumeRecord>) {
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
            let serving = match known.map(|known| &known.serving) {
                Some(Serving::Yes) => Serving::Yes,
                Some(Serving::No(reason)) if reason == SEALING => Serving::No(reason.clone()),
                Some(Serving::No(_)) | None => Serving::No(elsewhere(record)),
            };
            let may_be_served =
                serving == Serving::Yes || serving == Serving::No(SEALING.to_owned());
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
            let service = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = service.drop_replicas(id).await {
                    tracing::error!(id = %id.0, %error, "the replicas of a deleted volume could not be dropped");
                }
            });
        }
    }

    /// Drops what this daemon has of a volume that is being deleted.
    pub(super) async fn drop_replicas(&self, id: VolumeId) -> Result<(), VolumeError> {
        let Some(entry) = self.catalog().get(id).cloned() else {
            return Ok(());
        };
        match self.host.close_volume(id).await {
            Ok(()) | Err(HostError::NotOpen) => {}
            Err(source) => {
                return Err(VolumeError::Host {
                    reference: id.0.to_string(),
                    source,
                });
            }
        }
        self.host.forget_replicas(id).await;
        let record = &entry.current.record;
        for layer in &record.layers {
            let dropped = self.host.delete_layer(*layer).await;
            dropped.map_err(|source| VolumeError::Host {
                reference: id.0.to_string(),
                source,
            })?;
        }
        // The record goes when every node that had a copy has dropped it, whichever of them is the last.
        let mine = Transaction::new().put(keys::dropped(id, self.head.node), b"{}".to_vec());
        self.store.commit(mine).await?;
        let dropped = self.store.list(&keys::dropped_by(id)).await?.entries;
        let sets = record.placement.sets.iter();
        let mut holders = sets
            .flat_map(|set| &set.replicas)
            .map(|replica| replica.node);
        let has_dropped = |node: NodeId| {
            let key = keys::dropped(id, node);
            dropped.iter().any(|entry| entry.key == key)
        };
        if holders.all(has_dropped) {
            let tombstone = match self.reread(id).await {
                // Another node saw that it was the last, too.
                Err(VolumeError::NotFound { .. }) => return Ok(()),
                read => read?,
            };
            let mut transaction = finish_delete(&tombstone);
            for entry in &dropped {
                transaction = transaction.delete(entry.key.clone());
            }
            if let Outcome::Committed(_) = self.store.commit(transaction).await? {
                self.catalog().remove(id);
                tracing::info!(volume = %record.name, id = %id.0, "volume deleted");
                self.events.tell_of(record, None, Occurrence::VolumeDeleted);
            }
        }
        Ok(())
    }
}

/// Where a volume that is not served here is served.
fn elsewhere(record: &VolumeRecord) -> String {
    match record.head {
        Some(head) => format!("node {} serves it", head.node.0),
        None => "no node serves it; open it with `ashlar volume open`".to_owned(),
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
