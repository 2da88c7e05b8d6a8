//! A data plane that the tests look into.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use ashlar_core::nbd::session::Admitted;
use ashlar_core::placement::StoreSpace;
use ashlar_core::records::{Versioned, VolumeLimits, VolumeRecord};
use ashlar_core::units::{Epoch, LayerId, StoreId, VolumeId};
use async_trait::async_trait;

use super::STORE;
use crate::volumes::{HostError, VolumeHost, VolumeRuntime, VolumeSpec, lock};

/// A data plane that serves nothing but remembers what it was told.
#[derive(Default)]
pub(super) struct Host {
    pub(super) open: Mutex<BTreeMap<VolumeId, VolumeSpec>>,
    pub(super) connections: Mutex<BTreeMap<VolumeId, u32>>,
    pub(super) layers: Mutex<BTreeSet<LayerId>>,
    /// Epochs served so far: none may come twice for one volume.
    pub(super) served: Mutex<BTreeSet<(VolumeId, Epoch)>>,
    pub(super) refuse_drops: AtomicBool,
    /// What the stores were written under.
    pub(super) written: Mutex<BTreeMap<LayerId, Epoch>>,
    /// Volumes that ask for a new epoch.
    pub(super) wanted: Mutex<Vec<VolumeId>>,
    pub(super) wants: tokio::sync::Notify,
    /// Volumes whose first change waits.
    pub(super) changing: Mutex<Vec<VolumeId>>,
    pub(super) changes: tokio::sync::Notify,
    pub(super) recorded: tokio::sync::Notify,
    pub(super) renewed: tokio::sync::Notify,
}

#[async_trait]
impl VolumeHost for Host {
    async fn open_volume(&self, spec: VolumeSpec) -> Result<(), HostError> {
        assert!(
            lock(&self.served).insert((spec.id, spec.epoch)),
            "an epoch was served twice"
        );
        lock(&self.layers).extend(spec.layers.iter().copied());
        assert!(
            lock(&self.open).insert(spec.id, spec).is_none(),
            "opened twice"
        );
        Ok(())
    }

    async fn close_volume(&self, id: VolumeId) -> Result<(), HostError> {
        match lock(&self.connections).get(&id) {
            Some(&connections) if connections > 0 => Err(HostError::Busy { connections }),
            _ => lock(&self.open)
                .remove(&id)
                .map(drop)
                .ok_or(HostError::NotOpen),
        }
    }

    async fn epoch_wanted(&self) -> Option<VolumeId> {
        loop {
            if let Some(id) = lock(&self.wanted).pop() {
                return Some(id);
            }
            self.wants.notified().await;
        }
    }

    async fn renew_epoch(&self, id: VolumeId, epoch: Epoch) -> Result<(), HostError> {
        assert!(
            lock(&self.served).insert((id, epoch)),
            "an epoch was served twice"
        );
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        assert!(spec.epoch < epoch);
        spec.epoch = epoch;
        self.renewed.notify_one();
        Ok(())
    }

    async fn admit(&self, id: VolumeId, admitted: Admitted) -> Result<(), HostError> {
        let connections = lock(&self.connections).get(&id).copied().unwrap_or(0);
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        if connections > 0 && spec.admitted == Admitted::Anyone {
            return Err(HostError::Busy { connections });
        }
        spec.admitted = admitted;
        Ok(())
    }

    async fn fence(&self, id: VolumeId, admitted: Option<Admitted>) -> Result<u32, HostError> {
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        if admitted.as_ref() == Some(&spec.admitted) {
            return Ok(0);
        }
        spec.admitted = admitted.unwrap_or_else(|| spec.admitted.clone());
        Ok(lock(&self.connections).remove(&id).unwrap_or(0))
    }

    async fn first_change(&self) -> Option<VolumeId> {
        loop {
            if let Some(id) = lock(&self.changing).pop() {
                return Some(id);
            }
            self.changes.notified().await;
        }
    }

    async fn first_change_recorded(&self, id: VolumeId) -> Result<(), HostError> {
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        spec.never_written = false;
        self.recorded.notify_one();
        Ok(())
    }

    async fn set_limits(&self, id: VolumeId, limits: VolumeLimits) -> Result<(), HostError> {
        let mut open = lock(&self.open);
        open.get_mut(&id).ok_or(HostError::NotOpen)?.limits = limits;
        Ok(())
    }

    async fn open_replicated(&self, _: crate::data::ReplicatedSpec) -> Result<(), HostError> {
        unreachable!("these volumes have one copy")
    }

    async fn replication_event(&self) -> Option<crate::replication::ReplicationEvent> {
        std::future::pending().await
    }

    fn record_seen(&self, _: VolumeId, _: Option<Versioned<VolumeRecord>>) {}

    async fn forget_replicas(&self, _: VolumeId) {}

    async fn replication(&self, _: VolumeId) -> Option<crate::data::ReplicationStatus> {
        None
    }

    async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), HostError> {
        lock(&self.open)
            .get_mut(&id)
            .map(|spec| spec.size_bytes = size_bytes)
            .ok_or(HostError::NotOpen)
    }

    fn rename_volume(&self, id: VolumeId, name: &str) {
        if let Some(spec) = lock(&self.open).get_mut(&id) {
            spec.name = name.to_owned();
        }
    }

    async fn delete_layer(&self, layer: LayerId) -> Result<(), HostError> {
        let open = lock(&self.open);
        assert!(
            open.values().all(|spec| !spec.layers.contains(&layer)),
            "a layer that is served was dropped"
        );
        if self.refuse_drops.load(Ordering::Relaxed) {
            return Err(HostError::Store {
                reason: "poisoned".to_owned(),
            });
        }
        lock(&self.layers).remove(&layer);
        Ok(())
    }

    fn runtime(&self, id: VolumeId) -> Option<VolumeRuntime> {
        let connections = lock(&self.connections).get(&id).copied().unwrap_or(0);
        lock(&self.open).get(&id).map(|_| VolumeRuntime {
            connections,
            inflight_requests: 0,
            resynced_bytes: 0,
        })
    }

    fn stores(&self) -> Vec<StoreId> {
        vec![STORE]
    }

    async fn store_groups(&self) -> Vec<Vec<StoreSpace>> {
        vec![
            vec![],
            vec![StoreSpace {
                id: STORE,
                free_blocks: 1000,
            }],
        ]
    }

    async fn layers(&self) -> Result<BTreeMap<LayerId, Epoch>, HostError> {
        let mut layers: BTreeMap<_, _> = lock(&self.layers)
            .iter()
            .map(|layer| (*layer, Epoch(0)))
            .collect();
        layers.extend(
            lock(&self.written)
                .iter()
                .map(|(layer, epoch)| (*layer, *epoch)),
        );
        Ok(layers)
    }
}
