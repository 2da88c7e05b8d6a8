//! Opening and closing replicated volumes, and what the control plane answers.

use ashlar_core::nbd::session::Admitted;
use ashlar_core::records::{HeadClaim, LeftoverRecord, Versioned, VolumeRecord};
use ashlar_core::replication::{
    AcceptorEvent, Event, HeadParams, ReplicatedHead, StopReason, SwapOutcome,
};
use ashlar_core::units::{ChunkIndex, Epoch, LayerId, StoreId, VolumeId};
use tokio::sync::oneshot;

use super::super::config::{DataError, VolumeSpec};
use super::super::gate::Gate;
use super::super::thread::{DataThread, Volume, VolumeHead};
use super::{Replication, VolumeRef, now_us};

/// A replicated volume to serve.
#[derive(Clone, Debug)]
pub struct ReplicatedSpec {
    /// As it was just read.
    pub record: Versioned<VolumeRecord>,
    /// This run of the daemon.
    pub claim: HeadClaim,
    /// The highest epoch that stores of this daemon hold blocks of the volume under.
    pub written: Epoch,
    /// Whose connections it serves.
    pub admitted: Admitted,
}

/// What the control plane answers and tells.
pub(in super::super) enum ClusterCommand {
    Open(Box<ReplicatedSpec>, oneshot::Sender<Result<(), DataError>>),
    Record {
        volume: VolumeId,
        asked: bool,
        record: Option<Box<Versioned<VolumeRecord>>>,
    },
    Swapped {
        volume: VolumeId,
        serial: u64,
        outcome: SwapOutcome,
    },
    Persisted {
        volume: VolumeId,
        store: StoreId,
        serial: u64,
    },
    /// Its replicas here are dropped.
    Forget {
        volume: VolumeId,
        answer: oneshot::Sender<()>,
    },
    /// Gives some of what a set has left here back; answered with where to go on.
    GiveBack {
        left: LeftoverRecord,
        layer: LayerId,
        from: ChunkIndex,
        answer: oneshot::Sender<Result<Option<ChunkIndex>, DataError>>,
    },
    LinkUp(Box<super::LinkEnds>),
    LinkAccepted(Box<super::LinkEnds>),
}

impl DataThread {
    pub(in super::super) fn cluster_command(&mut self, command: ClusterCommand) {
        match command {
            ClusterCommand::Open(spec, answer) => {
                let _ = answer.send(self.open_replicated(*spec));
            }
            ClusterCommand::Record {
                volume,
                asked,
                record,
            } => {
                if let Some(volume) = self.replicated_by_id(volume) {
                    self.head_event(volume, Event::Record { asked, record });
                    self.follow_record(volume);
                }
            }
            ClusterCommand::Swapped {
                volume,
                serial,
                outcome,
            } => {
                if let Some(volume) = self.replicated_by_id(volume) {
                    self.head_event(volume, Event::Swapped { serial, outcome });
                    self.follow_record(volume);
                }
            }
            ClusterCommand::Persisted {
                volume,
                store,
                serial,
            } => {
                let store = self.store_here(store);
                let key = store.and_then(|at| self.cluster.replica_keys.get(&(volume, at)));
                if let Some(key) = key.copied() {
                    self.acceptor_event(key, AcceptorEvent::Persisted { serial });
                }
            }
            ClusterCommand::Forget { volume, answer } => {
                // Work that is under way may still name them.
                self.cluster.replica_keys.retain(|(of, _), _| *of != volume);
                self.cluster.seals.retain(|(of, _), _| *of != volume);
                let _ = answer.send(());
            }
            ClusterCommand::GiveBack {
                left,
                layer,
                from,
                answer,
            } => {
                let _ = answer.send(self.give_leftover_back(&left, layer, from));
            }
            ClusterCommand::LinkUp(ends) => {
                if self.drain.is_none() {
                    self.add_outgoing_link(*ends);
                }
            }
            ClusterCommand::LinkAccepted(ends) => {
                if let Some(store) = self.store_here(ends.peer.store)
                    && self.drain.is_none()
                {
                    self.add_incoming_link(store, *ends);
                }
            }
        }
    }

    /// Also one that is being closed, which is not found by name any more.
    pub(in super::super) fn replicated_by_id(&self, id: VolumeId) -> Option<VolumeRef> {
        self.volumes.iter().find_map(|(key, volume)| {
            let VolumeHead::Replicated(replication) = &volume.head else {
                return None;
            };
            (volume.spec.id == id && !volume.head_ended).then_some(VolumeRef {
                key,
                serial: replication.serial,
            })
        })
    }

    fn open_replicated(&mut self, spec: ReplicatedSpec) -> Result<(), DataError> {
        if self.drain.is_some() {
            return Err(DataError::Draining);
        }
        let record = &spec.record.record;
        if self.replicated_by_id(record.id).is_some() || self.volume_keys.contains_key(&record.id) {
            return Err(DataError::AlreadyOpen(record.id));
        }
        let volume_spec = VolumeSpec {
            id: record.id,
            name: record.name.to_string(),
            size_bytes: record.size_bytes,
            layer: record.live_layer(),
            epoch: record.epoch,
            write_through: record.write_through,
            read_only: record.read_only,
            placement: record.placement.clone(),
            admitted: spec.admitted.clone(),
            never_written: record.never_written,
            limits: record.limits,
        };
        let serial = self.cluster.serial();
        let mut params = HeadParams::new(spec.claim.node, spec.claim);
        params.lease_us = self.cluster.lease_us;
        params.write_timeout_us = self.cluster.lease_us / 2;
        params.written = spec.written;
        params.fill_bytes_per_second = self.cluster.fill_bytes_per_second;
        let mut actions = Vec::new();
        let head = ReplicatedHead::new(params, spec.record, now_us(), &mut actions);
        let metrics = self.registry.add_volume(volume_spec.id, &volume_spec.name);
        let id = volume_spec.id;
        let gate = Gate::new(volume_spec.limits, volume_spec.never_written);
        let key = self.volumes.insert(Volume {
            head: VolumeHead::Replicated(Box::new(Replication::new(head, spec.claim, serial))),
            head_ended: false,
            gate,
            spec: volume_spec,
            stores: Vec::new(),
            metrics,
            connections: Vec::new(),
            unlocked: 0,
            closing: None,
        });
        self.volume_keys.insert(id, key);
        let volume = VolumeRef { key, serial };
        let named = actions.into_iter().map(|action| (volume, action));
        self.cluster.actions.extend(named);
        self.cluster.look_soon(now_us());
        Ok(())
    }

    /// What the record says beside its replicas: its size, whether it is read-only, its limits, and, before the volume is
    /// served for the first time, whom it is published to. Later the control plane tells whom to let in.
    fn follow_record(&mut self, volume: VolumeRef) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let record = replication.head.record();
        let (size_bytes, read_only, limits) = (record.size_bytes, record.read_only, record.limits);
        // What was read before the claim may be older than what was claimed.
        let admitted = (!replication.has_served).then(|| record.admitted());
        let admission = replication.head.admission_mut();
        if size_bytes > admission.size_bytes() && admission.grow(size_bytes, 1).is_err() {
            return;
        }
        admission.set_read_only(read_only);
        let size_bytes = admission.size_bytes();
        if limits != self.volumes[volume.key].spec.limits && self.drain.is_none() {
            self.volumes[volume.key].spec.limits = limits;
            self.limit(volume.key, limits);
        }
        let entry = &mut self.volumes[volume.key];
        if let Some(admitted) = admitted {
            entry.spec.admitted = admitted;
        }
        entry.spec.size_bytes = size_bytes;
        entry.spec.epoch = entry.head.admission().epoch();
        for connection in &entry.connections {
            if let Some(connection) = self.connections.get_mut(*connection as usize) {
                connection.session.size_bytes = size_bytes;
            }
        }
    }

    /// Whether a volume that is otherwise ready to go may: a replicated head first ends in order.
    pub(in super::super) fn replication_may_close(&mut self, key: usize) -> bool {
        let Some(volume) = self.replicated(key) else {
            return true;
        };
        if self.volumes[key].head_ended {
            // A store may still be writing to the buffers of its requests.
            return self.requests_of(volume).is_empty();
        }
        let is_closing = self
            .replication(volume)
            .is_none_or(|r| std::mem::replace(&mut r.is_closing, true));
        if !is_closing {
            self.with_head(volume, |head, now_us, actions| head.close(now_us, actions));
        }
        false
    }

    /// Ends every replicated head in order. True: none is left.
    pub(in super::super) fn close_heads(&mut self) -> bool {
        let open: Vec<usize> = self
            .volumes
            .iter()
            .filter(|(_, volume)| {
                matches!(volume.head, VolumeHead::Replicated(_)) && !volume.head_ended
            })
            .map(|(key, _)| key)
            .collect();
        for key in &open {
            self.replication_may_close(*key);
        }
        open.is_empty()
    }

    /// The daemon stops, and this head did not get to its end in time.
    pub(in super::super) fn give_heads_up(&mut self) {
        for key in 0..self.volumes.capacity() {
            let volume = self.replicated(key);
            if let Some(volume) = volume
                && !self.volumes[key].head_ended
            {
                self.head_stopped(volume, StopReason::Closed);
            }
        }
    }

    /// A store stopped: its replicas may have lost what they answered.
    pub(in super::super) fn store_failed(&mut self, store: usize) {
        let replicas: Vec<usize> = self
            .cluster
            .replicas
            .iter()
            .filter(|(_, replica)| replica.store == store)
            .map(|(key, _)| key)
            .collect();
        for replica in replicas {
            self.acceptor_event(replica, AcceptorEvent::StoreFailed);
        }
    }
}
