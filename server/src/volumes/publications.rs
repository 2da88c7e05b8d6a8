//! Volumes given to client nodes and taken back.
//!
//! Two orders keep everybody else out through a crash at any point. To publish: the data plane admits the new token
//! before the record names it, and nobody has the token before both. To unpublish: the record forgets the token, under
//! a new epoch, before the data plane ends its connections; what is asked again after a crash finds the record done and
//! the connections gone with the daemon.
//!
//! Both are the head's to do. The daemon that is asked for either takes a volume with replicas over first, which fences
//! the head that had it; the daemon beside the client node then takes it from there ([`Volumes::open_here`]).

use std::sync::Arc;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{
    AccessMode, ClientNodeId, NewPublication, Publication, Versioned, VolumeRecord, VolumeState,
};
use ashlar_core::units::{Epoch, ExportToken, VolumeId};
use uuid::Uuid;

use super::{ATTEMPTS, Change, HostError, Serving, VolumeError, VolumeView, Volumes, unix_ms};
use crate::meta::MetadataError;

/// What came of taking a volume back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpublished {
    /// Who had it until now.
    pub nodes: Vec<ClientNodeId>,
    /// The volume's epoch now.
    pub epoch: Epoch,
    /// Connections that were ended.
    pub closed_connections: u32,
}

impl Volumes {
    /// Gives a volume to a registered client node; answers the same again for the same terms.
    pub async fn publish(
        self: &Arc<Self>,
        reference: &str,
        node: ClientNodeId,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<(VolumeView, Publication), VolumeError> {
        let reference = reference.to_owned();
        let new = NewPublication {
            node,
            mode,
            read_only,
            token: ExportToken(Uuid::new_v4()),
            published_at_unix_ms: unix_ms(),
        };
        self.to_the_end(|service| async move { service.publish_now(&reference, &new).await })
            .await
    }

    /// Takes a volume back from one node or from all. Answers when nothing of theirs is under way any more.
    pub async fn unpublish(
        self: &Arc<Self>,
        reference: &str,
        node: Option<ClientNodeId>,
    ) -> Result<Unpublished, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(
            |service| async move { service.unpublish_now(&reference, node.as_ref()).await },
        )
        .await
    }

    /// Ends every connection of a volume, once what it asked for is answered; answers how many.
    pub async fn close_connections(self: &Arc<Self>, reference: &str) -> Result<u32, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            let (volume, _guard) = service.lock_volume(&reference).await?;
            let closed = service.host.fence(volume.record.id, None).await;
            let closed = closed_of(closed, volume.record.id)?;
            tracing::info!(volume = %volume.record.name, connections = closed, "connections closed");
            Ok(closed)
        })
        .await
    }

    async fn publish_now(
        &self,
        reference: &str,
        new: &NewPublication,
    ) -> Result<(VolumeView, Publication), VolumeError> {
        let (before, _guard) = self.lock_volume(reference).await?;
        let id = before.record.id;
        let change = Change::Publish { id, new };
        self.take_over_for(&before.record, &change).await?;
        if let Some((decided, _)) = self.decide(&change).await? {
            self.is_served(&before.record)?;
            // Refused while somebody is connected who came by the volume's name.
            let admit = self.host.admit(id, decided.admitted()).await;
            admit.map_err(|source| VolumeError::Host {
                reference: before.record.name.to_string(),
                source,
            })?;
            match self.change(&change).await {
                Ok(Some(published)) => {
                    tracing::info!(volume = %published.record.name, id = %id.0, node = %new.node, mode = ?new.mode, "volume published");
                    let client = new.node.to_string();
                    self.events.tell_of(
                        &published.record,
                        None,
                        Occurrence::VolumePublished { client },
                    );
                    self.update(published);
                }
                Ok(None) => {}
                Err(error) => {
                    // Where it may have been recorded after all, nobody is let in that the record would keep out.
                    if !matches!(error, VolumeError::Metadata(MetadataError::Unknown { .. }))
                        && let Err(error) =
                            self.host.fence(id, Some(before.record.admitted())).await
                    {
                        tracing::warn!(volume = reference, %error, "a publication that was not recorded could not be undone");
                    }
                    return Err(error);
                }
            }
        }
        let view = self.get(&id.0.to_string())?;
        let publication = view.record.publication_of(&new.node).cloned();
        Ok((view, publication.ok_or(VolumeError::Contended)?))
    }

    async fn unpublish_now(
        &self,
        reference: &str,
        node: Option<&ClientNodeId>,
    ) -> Result<Unpublished, VolumeError> {
        let (before, _guard) = self.lock_volume(reference).await?;
        let id = before.record.id;
        let change = Change::Unpublish { id, node };
        let ended = self.change_at_head(&before.record, &change).await?;
        let now = match &ended {
            Some(ended) => {
                self.update(ended.clone());
                &ended.record
            }
            None => &before.record,
        };
        // Also when nothing had to be recorded: an earlier attempt may have come no further than the record.
        let closed = closed_of(self.host.fence(id, Some(now.admitted())).await, id)?;
        let had = |publication: &&Publication| now.publication_of(&publication.node).is_none();
        let nodes = before.record.publications.iter().filter(had);
        let nodes: Vec<_> = nodes.map(|publication| publication.node.clone()).collect();
        if ended.is_some() {
            match self.host.renew_epoch(id, now.epoch).await {
                // It is opened under a newer one.
                Ok(()) | Err(HostError::NotOpen) => {}
                Err(source) => {
                    return Err(VolumeError::Host {
                        reference: now.name.to_string(),
                        source,
                    });
                }
            }
            for node in &nodes {
                tracing::info!(volume = %now.name, id = %id.0, %node, epoch = now.epoch.0, connections = closed, "volume unpublished");
                let what = Occurrence::VolumeUnpublished {
                    connections: closed,
                };
                self.events.tell_of(now, None, what);
            }
        }
        Ok(Unpublished {
            nodes,
            epoch: now.epoch,
            closed_connections: closed,
        })
    }

    /// Makes a change that only the node of a volume's head may make, having taken the volume over as often as another node
    /// claims it meanwhile.
    async fn change_at_head(
        &self,
        record: &VolumeRecord,
        change: &Change<'_>,
    ) -> Result<Option<Versioned<VolumeRecord>>, VolumeError> {
        for _ in 0..ATTEMPTS {
            self.take_over_for(record, change).await?;
            match self.change(change).await {
                Err(VolumeError::Elsewhere { .. }) => {}
                outcome => return outcome,
            }
        }
        Err(VolumeError::Contended)
    }

    /// What is not served can be neither opened nor vouched for.
    pub(super) fn is_served(&self, record: &VolumeRecord) -> Result<(), VolumeError> {
        let serving = self.catalog().get(record.id).map(|e| e.serving.clone());
        match serving {
            Some(Serving::Yes) | None => Ok(()),
            Some(_) if record.state != VolumeState::Active => Ok(()),
            Some(unserved) => Err(VolumeError::NotServed {
                reference: record.name.to_string(),
                reason: unserved.to_string(),
            }),
        }
    }
}

fn closed_of(fenced: Result<u32, HostError>, id: VolumeId) -> Result<u32, VolumeError> {
    match fenced {
        Ok(closed) => Ok(closed),
        Err(HostError::NotOpen) => Ok(0),
        Err(source) => Err(VolumeError::Host {
            reference: id.0.to_string(),
            source,
        }),
    }
}
