//! The end of a head, and what it tells until then.

use ashlar_core::records::SetIndex;
use ashlar_core::replication::{CopyId, MemberId, StopReason};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{BLOCK_BYTES, LEAF_BLOCKS};
use smallvec::SmallVec;

use super::super::super::operation::Operation;
use super::super::super::thread::{DataThread, VolumeHead};
use super::super::VolumeRef;
use super::super::tells::{ClusterTell, FillStatus, ReplicaStatus, ReplicationStatus};

impl DataThread {
    /// The head will answer nothing more: what is under way fails, its clients go.
    pub(in super::super) fn head_stopped(&mut self, volume: VolumeRef, reason: StopReason) {
        let id = self.volumes[volume.key].spec.id;
        let incarnation = self.replication(volume).map(|r| r.claim.incarnation);
        // A write that was not answered may have happened all the same: an error would say that it had not. The clients of
        // a head that was fenced see their connections end.
        let is_orderly = reason == StopReason::Closed;
        for connection in self.volumes[volume.key].connections.clone() {
            if is_orderly {
                self.leave(connection);
            } else {
                self.kill(connection);
            }
        }
        self.fail_requests(volume, reason);
        self.forget_volume(volume);
        self.volumes[volume.key].head_ended = true;
        if self.volume_keys.get(&id) == Some(&volume.key) {
            self.volume_keys.remove(&id);
        }
        if let Some(incarnation) = incarnation {
            self.cluster.tell(ClusterTell::Stopped {
                volume: id,
                incarnation,
                reason,
            });
        }
        self.volume_may_close(volume.key);
    }

    /// Ends every session of a volume and gives its links up.
    fn forget_volume(&mut self, volume: VolumeRef) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let members: SmallVec<[MemberId; 8]> = replication.connected.drain(..).collect();
        let copies: Vec<CopyId> = replication.copies.keys().copied().collect();
        for copy in copies {
            self.copy_end(volume, copy);
        }
        for member in members {
            self.end_session(volume, member, None);
            if let Some(replication) = self.replication(volume) {
                let place = replication.head.member(member);
                self.release_link(place.node, place.store);
            }
        }
    }

    /// How a replicated volume is doing.
    pub(in super::super::super) fn replication_status(
        &self,
        key: usize,
    ) -> Option<ReplicationStatus> {
        let VolumeHead::Replicated(replication) = &self.volumes.get(key)?.head else {
            return None;
        };
        let record = replication.head.record();
        let sets = record.placement.sets.iter().enumerate();
        let replicas = sets.flat_map(|(set, replicas)| {
            replicas.replicas.iter().map(move |replica| ReplicaStatus {
                set: SetIndex(set as u16),
                node: replica.node,
                store: replica.store,
                is_in_sync: replica.is_in_sync(),
                is_linked: self.store_here(replica.store).is_some()
                    || self.is_linked(replica.node, replica.store),
            })
        });
        let fills = replication.head.status().resyncs.into_iter();
        let fills = fills.map(|fill| FillStatus {
            set: fill.set,
            store: replication.head.member(fill.member).store,
            copied_bytes: fill.copied_blocks * BLOCK_BYTES as u64,
            left_bytes: fill.leaves_left * u64::from(LEAF_BLOCKS) * BLOCK_BYTES as u64,
        });
        Some(ReplicationStatus {
            fills: fills.collect(),
            epoch: record.epoch,
            is_serving: replication.head.is_serving(),
            replicas: replicas.collect(),
            head: replication.head.status(),
        })
    }

    /// The store of this thread that holds a current copy of a chunk of a replicated volume.
    pub(in super::super::super) fn copy_here(
        &self,
        key: usize,
        extent: ExtentKey,
    ) -> Option<usize> {
        let VolumeHead::Replicated(replication) = &self.volumes.get(key)?.head else {
            return None;
        };
        let set = replication.head.set_of(extent.chunk);
        let replicas = &replication.head.record().placement.sets[usize::from(set.0)];
        replicas
            .in_sync()
            .filter(|replica| replication.head.may_read_from(set, replica.store))
            .find_map(|replica| self.store_here(replica.store))
    }

    /// Requests of a replicated volume in the table.
    pub(in crate::data) fn requests_of(&self, volume: VolumeRef) -> Vec<usize> {
        self.operations
            .iter()
            .filter_map(|(key, operation)| match operation {
                Operation::Replicated(request) if request.volume == volume => Some(key),
                _ => None,
            })
            .collect()
    }
}
