//! The seals of this node's replicas, in the node's own database: they must be writable when the cluster's metadata store
//! is not.

use std::collections::HashMap;
use std::sync::Arc;

use ashlar_core::records::{Record, Transaction};
use ashlar_core::replication::Seal;
use ashlar_core::units::{StoreId, VolumeId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::meta::{MetadataError, MetadataStore};

/// Every seal has this prefix; then the volume's id, a slash, and the store's.
const PREFIX: &str = "replicas/";

/// A seal as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SealRecord(pub Seal);

impl Record for SealRecord {}

/// See the module text.
#[derive(Clone)]
pub struct Seals(Arc<dyn MetadataStore>);

impl Seals {
    /// Seals in the node's own database.
    pub fn new(local: Arc<dyn MetadataStore>) -> Seals {
        Seals(local)
    }

    /// All of them, at the start.
    pub async fn load(&self) -> Result<HashMap<(VolumeId, StoreId), Seal>, MetadataError> {
        let mut seals = HashMap::new();
        for entry in self.0.list(PREFIX).await?.entries {
            let ids = entry.key.strip_prefix(PREFIX).and_then(|rest| {
                let (volume, store) = rest.split_once('/')?;
                let volume = VolumeId(Uuid::try_parse(volume).ok()?);
                Some((volume, StoreId(Uuid::try_parse(store).ok()?)))
            });
            let Some(ids) = ids else {
                return Err(MetadataError::Unreadable {
                    reason: format!("{:?} is not the key of a replica's seal", entry.key),
                });
            };
            seals.insert(ids, entry.read::<SealRecord>()?.record.0);
        }
        Ok(seals)
    }

    /// Makes one durable.
    pub async fn keep(
        &self,
        volume: VolumeId,
        store: StoreId,
        seal: Seal,
    ) -> Result<(), MetadataError> {
        let key = format!("{PREFIX}{}/{}", volume.0, store.0);
        let put = Transaction::new().put(key, SealRecord(seal).encode());
        self.0.commit(put).await.map(|_| ())
    }

    /// Forgets those of a volume that is gone.
    pub async fn forget(&self, volume: VolumeId) -> Result<(), MetadataError> {
        let prefix = format!("{PREFIX}{}/", volume.0);
        for entry in self.0.list(&prefix).await?.entries {
            self.0.commit(Transaction::new().delete(entry.key)).await?;
        }
        Ok(())
    }
}
