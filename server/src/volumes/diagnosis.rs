//! What the volume service tells of itself: to the daemon's events, and to whoever explains a volume.

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{Versioned, VolumeRecord, keys};
use ashlar_core::replication::{News, StopReason};
use ashlar_core::units::{BLOCK_BYTES, NodeId, VolumeId};

use super::{VolumeError, Volumes};

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
