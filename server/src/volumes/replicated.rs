//! Volumes with replicas on several daemons: opened by a head that claims them itself, here or in the place of another.

use std::sync::Arc;
use std::time::Duration;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{ClientNodeId, HeadClaim, Versioned, VolumeRecord};
use ashlar_core::units::VolumeId;

use super::{Change, Serving, VolumeError, VolumeView, Volumes};
use crate::data::{ReplicatedSpec, ReplicationStatus};

/// How long who opens or creates a volume waits for it to be served: longer than a head waits for the lease of another.
const OPENING_TIME: Duration = Duration::from_secs(15);

impl Volumes {
    /// Has a head claim a volume and serve it; the catalog says when it does. One that is about to is left to it.
    pub(super) async fn open_replicated(
        &self,
        current: Versioned<VolumeRecord>,
    ) -> Result<(), VolumeError> {
        let id = current.record.id;
        let reference = current.record.name.to_string();
        // A swap of an earlier head of this daemon may land late, and must not be taken for one of this head.
        let incarnation = uuid::Uuid::new_v4();
        let before = {
            let mut catalog = self.catalog();
            let before = catalog.get(id).cloned();
            if matches!(&before, Some(known) if known.serving == Serving::Sealing) {
                return Ok(());
            }
            catalog.begin_sealing(current.clone(), incarnation);
            before
        };
        let spec = ReplicatedSpec {
            written: self.written_epoch(&current.record),
            admitted: current.record.admitted(),
            claim: HeadClaim {
                incarnation,
                ..self.head
            },
            record: current.clone(),
        };
        let epoch = current.record.epoch;
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
                let failed = Serving::No(reason.clone());
                self.catalog()
                    .sealing_failed(id, incarnation, failed, before.and_then(|b| b.head));
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
        if let Some(current) = self.look_up(reference).await? {
            self.record_seen(current).await;
        }
        Ok(())
    }

    /// Serves a volume with replicas here; one that is stays as it is. Its lock is held.
    async fn take_over(&self, current: Versioned<VolumeRecord>) -> Result<(), VolumeError> {
        let id = current.record.id;
        if self.is_open(id) {
            let is_ours = |head: HeadClaim| head.node == self.head.node;
            if current.record.head.is_none_or(is_ours) {
                return Ok(());
            }
            // Another node has claimed it, and the head here has not heard of that yet.
            self.host.record_seen(id, Some(current.clone()));
            self.wait_until_ended(id).await?;
        }
        self.open_replicated(current).await?;
        self.wait_until_served(id).await
    }

    /// Takes over a volume with replicas when a change of its publications is due: only its head can tell who is
    /// connected, and end that. Its lock is held.
    pub(super) async fn take_over_for(
        &self,
        record: &VolumeRecord,
        change: &Change<'_>,
    ) -> Result<(), VolumeError> {
        if !record.placement.is_replicated() {
            return Ok(());
        }
        let is_due = match self.decide(change).await {
            Err(VolumeError::Elsewhere { .. }) => true,
            decided => decided?.is_some() && !self.is_open(record.id),
        };
        if is_due {
            let current = self.reread(record.id).await?;
            self.take_over(current).await?;
        }
        Ok(())
    }

    /// Waits for the end of a head that was told that another node has claimed its volume.
    async fn wait_until_ended(&self, id: VolumeId) -> Result<(), VolumeError> {
        let mut changes = self.served.subscribe();
        let ended = async { while self.is_open(id) && changes.changed().await.is_ok() {} };
        let outcome = tokio::time::timeout(OPENING_TIME, ended).await;
        outcome.map_err(|_| VolumeError::NotServed {
            reference: id.0.to_string(),
            reason: "another node has claimed it, and its head here does not end".to_owned(),
        })
    }

    fn is_open(&self, id: VolumeId) -> bool {
        self.catalog()
            .get(id)
            .is_some_and(|entry| entry.serving == Serving::Yes)
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
                    Some(Serving::Sealing) => {}
                    Some(unserved) => return Err(unserved.to_string()),
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
}
