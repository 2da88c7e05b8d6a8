//! The machines that volumes are published to.

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_core::records::{
    ClientNodeId, ClientNodeRecord, Versioned, keys, register_node, unregister_node,
};
use ashlar_core::units::VolumeId;

use super::{ATTEMPTS, VolumeError, Volumes, unix_ms};
use crate::meta::{self, MetadataError, Outcome};

impl Volumes {
    /// Makes a client node known, or changes its topology.
    pub async fn register_node(
        self: &Arc<Self>,
        id: ClientNodeId,
        topology: BTreeMap<String, String>,
    ) -> Result<ClientNodeRecord, VolumeError> {
        self.to_the_end(|service| async move {
            for _ in 0..ATTEMPTS {
                let current = service.client_node(&id).await?;
                let decided = register_node(current.as_ref(), &id, &topology, unix_ms())?;
                let Some((record, transaction)) = decided else {
                    // Nothing to do only where there is one.
                    return current
                        .map(|current| current.record)
                        .ok_or(VolumeError::Contended);
                };
                match service.store.commit(transaction).await {
                    Ok(Outcome::Committed(_)) => {
                        tracing::info!(node = %id, "client node registered");
                        return Ok(record);
                    }
                    // The next round reads what became of it.
                    Ok(Outcome::Conflict) | Err(MetadataError::Unknown { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(VolumeError::Contended)
        })
        .await
    }

    /// Forgets a client node; answers whether it was known.
    pub async fn unregister_node(self: &Arc<Self>, id: ClientNodeId) -> Result<bool, VolumeError> {
        self.to_the_end(|service| async move {
            for _ in 0..ATTEMPTS {
                let Some(current) = service.client_node(&id).await? else {
                    return Ok(false);
                };
                match service.store.commit(unregister_node(&current)).await {
                    Ok(Outcome::Committed(_)) => {
                        tracing::info!(node = %id, "client node unregistered");
                        return Ok(true);
                    }
                    Ok(Outcome::Conflict) | Err(MetadataError::Unknown { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(VolumeError::Contended)
        })
        .await
    }

    /// Every client node, ordered by id.
    pub async fn nodes(&self) -> Result<Vec<ClientNodeRecord>, VolumeError> {
        let listing = self.store.list(keys::CLIENT_NODES).await?;
        let mut nodes = Vec::with_capacity(listing.entries.len());
        for entry in listing.entries {
            nodes.push(entry.read::<ClientNodeRecord>()?.record);
        }
        nodes.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(nodes)
    }

    /// Which volumes are published to each client node, registered or not.
    pub fn published_to(&self) -> BTreeMap<ClientNodeId, Vec<VolumeId>> {
        let mut of_nodes: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for entry in self.catalog().all() {
            for publication in &entry.current.record.publications {
                let volumes = of_nodes.entry(publication.node.clone()).or_default();
                volumes.push(entry.current.record.id);
            }
        }
        of_nodes
    }

    pub(super) async fn client_node(
        &self,
        id: &ClientNodeId,
    ) -> Result<Option<Versioned<ClientNodeRecord>>, VolumeError> {
        Ok(meta::read::<ClientNodeRecord>(&*self.store, &keys::client_node(id)).await?)
    }
}
