//! What the volume service tells of itself: to the daemon's events, and to whoever explains a volume.

use std::collections::BTreeMap;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{NameRecord, Versioned, VolumeRecord, keys};
use ashlar_core::replication::{News, StopReason};
use ashlar_core::units::{BLOCK_BYTES, LayerId, NodeId, StoreId, VolumeId};

use super::{VolumeError, Volumes, lock};
use crate::meta;

impl Volumes {
    /// Something happened to a volume, or to its copy on `node`.
    pub(super) fn tell(&self, id: VolumeId, node: Option<NodeId>, what: Occurrence) {
        let known = self.catalog().get(id).map(|entry| entry.current.clone());
        if let Some(known) = known {
            self.events.tell_of(&known.record, node, what);
        }
    }

    /// The record of a volume as the metadata store has it now.
    pub(crate) async fn read_record(
        &self,
        id: VolumeId,
    ) -> Result<Versioned<VolumeRecord>, VolumeError> {
        self.reread(id).await
    }

    /// Every volume's record as the metadata store has it now.
    pub(crate) async fn read_records(&self) -> Result<Vec<VolumeRecord>, VolumeError> {
        let records = meta::list::<VolumeRecord>(&*self.store, keys::VOLUMES).await?;
        Ok(records.into_iter().map(|read| read.record).collect())
    }

    /// Which volume each name leads to.
    pub(crate) async fn read_names(&self) -> Result<BTreeMap<String, VolumeId>, VolumeError> {
        let mut names = BTreeMap::new();
        for entry in self.store.list(keys::NAMES).await?.entries {
            let name = entry.key.strip_prefix(keys::NAMES).unwrap_or_default();
            let volume = entry.read::<NameRecord>()?.record.volume;
            names.insert(name.to_owned(), volume);
        }
        Ok(names)
    }

    /// A layer that no record names was dropped from a store here: it is not warned of any more, unless another store
    /// still has it.
    pub(crate) async fn forget_unknown_layer(&self, layer: LayerId) {
        let held = self.host.layers().await;
        if held.is_ok_and(|held| !held.contains_key(&layer)) {
            lock(&self.unknown_layers).retain(|known| *known != layer);
        }
        let what = Occurrence::Repaired {
            what: format!("layer {}, which no record names, was dropped", layer.0),
        };
        tracing::warn!(
            layer = layer.0,
            "a layer that no record names was dropped, as somebody asked"
        );
        self.events.tell_of_node(Some(self.head.node), what);
    }

    /// A copy that was found to be wrong was put out of sync.
    pub(crate) fn distrusted(&self, id: VolumeId, store: StoreId) {
        tracing::warn!(id = %id.0, store = %store.0, "a copy that differs from the others was put out of sync, as somebody asked");
        let what = Occurrence::Repaired {
            what: format!("the copy in store {} was put out of sync", store.0),
        };
        self.tell(id, None, what);
    }

    /// Nodes that have dropped what they had of a volume that is being deleted.
    pub(crate) async fn dropped(&self, id: VolumeId) -> Result<Vec<NodeId>, VolumeError> {
        let prefix = keys::dropped_by(id);
        let entries = self.store.list(&prefix).await?.entries;
        let nodes = entries.iter().filter_map(|entry| {
            let node = entry.key.strip_prefix(&prefix)?;
            uuid::Uuid::try_parse(node).ok().map(NodeId)
        });
        Ok(nodes.collect())
    }
}

/// The end of a head, as an event.
pub(super) fn stopped(reason: StopReason) -> Occurrence {
    match reason {
        StopReason::Fenced { epoch } => Occurrence::VolumeFenced { epoch },
        StopReason::EpochsExhausted => Occurrence::VolumeNotServed {
            reason: reason.to_string(),
        },
        StopReason::Closed | StopReason::Deleted => Occurrence::VolumeClosed {
            reason: reason.to_string(),
        },
    }
}

/// News of a head, as an event.
pub(super) fn remembered(news: &News) -> Occurrence {
    match *news {
        News::Failed { status, .. } => Occurrence::CopyFailed { status },
        News::Dropped { set, .. } => Occurrence::CopyDropped { set: set.0 },
        News::ResyncStarted { set, .. } => Occurrence::CopyFilling { set: set.0 },
        News::ResyncFailed { set, .. } => Occurrence::CopyFillingFailed { set: set.0 },
        News::Rejoined {
            set, copied_blocks, ..
        } => Occurrence::CopyInSync {
            set: set.0,
            copied_bytes: copied_blocks * BLOCK_BYTES as u64,
        },
        News::Removed { set, .. } => Occurrence::CopyRemoved { set: set.0 },
        News::LostPower { .. } => Occurrence::CopyLostPower,
        News::Repaired { extent, count, .. } => Occurrence::BlocksRepaired {
            chunk: extent.chunk.0,
            count,
        },
    }
}
