//! The data plane behind the traits that the rest of the daemon is written against.

use std::collections::BTreeMap;

use ashlar_core::diagnosis::doctor::{Holdings, LayerHolding, SealHolding, StoreHolding};
use ashlar_core::nbd::session::{Admitted, ReplyStyle};
use ashlar_core::placement::StoreSpace;
use ashlar_core::records::VolumeLimits;
use ashlar_core::store::{ExtentKey, LeafSums, RowOfVersions};
use ashlar_core::units::{BLOCK_BYTES, ChunkIndex, Epoch, LayerId, StoreId, VolumeId};
use async_trait::async_trait;

use crate::data::{self, DataError, DataPlane, ReplicatedSpec, ReplicationStatus};
use crate::metrics::Metrics;
use crate::plane::{ConnectionView, Plane, StoreView};
use crate::replication::{ReplicationEvent, Seals};
use crate::volumes::{HostError, VolumeHost, VolumeRuntime, VolumeSpec, unix_ms_of};
use ashlar_core::records::{Versioned, VolumeRecord};
use tokio::sync::mpsc::UnboundedReceiver;

/// The data plane and what does not change while it runs.
pub(super) struct Host {
    plane: DataPlane,
    metrics: Metrics,
    seals: Seals,
    replication: tokio::sync::Mutex<UnboundedReceiver<ReplicationEvent>>,
}

impl Host {
    pub(super) fn new(
        plane: DataPlane,
        seals: Seals,
        replication: UnboundedReceiver<ReplicationEvent>,
    ) -> Host {
        Host {
            metrics: plane.metrics(),
            plane,
            seals,
            replication: tokio::sync::Mutex::new(replication),
        }
    }
}

fn refusal(error: DataError) -> HostError {
    match error {
        DataError::NotOpen(_) => HostError::NotOpen,
        DataError::InUse { connections, .. } => HostError::Busy {
            connections: connections as u32,
        },
        DataError::NoSuchStore(store) => HostError::StoreMissing { store },
        DataError::Draining => HostError::ShuttingDown,
        other @ (DataError::AlreadyOpen(_)
        | DataError::StoresApart
        | DataError::Resize(_)
        | DataError::Store(_)
        | DataError::Socket(_)) => HostError::Store {
            reason: other.to_string(),
        },
    }
}

#[async_trait]
impl VolumeHost for Host {
    async fn open_volume(&self, spec: VolumeSpec) -> Result<(), HostError> {
        let spec = data::VolumeSpec {
            id: spec.id,
            name: spec.name,
            size_bytes: spec.size_bytes,
            // A record always has a live layer; parents come with snapshots.
            layer: spec.layers[0],
            epoch: spec.epoch,
            write_through: spec.write_through,
            read_only: spec.read_only,
            placement: spec.placement,
            admitted: spec.admitted,
            never_written: spec.never_written,
            limits: spec.limits,
        };
        self.plane.open_volume(spec).await.map_err(refusal)
    }

    async fn close_volume(&self, id: VolumeId) -> Result<(), HostError> {
        self.plane.close_volume(id, false).await.map_err(refusal)
    }

    async fn epoch_wanted(&self) -> Option<VolumeId> {
        self.plane.epoch_wanted().await
    }

    async fn renew_epoch(&self, id: VolumeId, epoch: Epoch) -> Result<(), HostError> {
        self.plane.renew_epoch(id, epoch).await.map_err(refusal)
    }

    async fn admit(&self, id: VolumeId, admitted: Admitted) -> Result<(), HostError> {
        self.plane.admit(id, admitted).await.map_err(refusal)
    }

    async fn fence(&self, id: VolumeId, admitted: Option<Admitted>) -> Result<u32, HostError> {
        self.plane.fence(id, admitted).await.map_err(refusal)
    }

    async fn first_change(&self) -> Option<VolumeId> {
        self.plane.first_change().await
    }

    async fn first_change_recorded(&self, id: VolumeId) -> Result<(), HostError> {
        let recorded = self.plane.first_change_recorded(id).await;
        recorded.map_err(refusal)
    }

    async fn set_limits(&self, id: VolumeId, limits: VolumeLimits) -> Result<(), HostError> {
        self.plane.set_limits(id, limits).await.map_err(refusal)
    }

    async fn open_replicated(&self, spec: ReplicatedSpec) -> Result<(), HostError> {
        self.plane.open_replicated(spec).await.map_err(refusal)
    }

    async fn replication_event(&self) -> Option<ReplicationEvent> {
        self.replication.lock().await.recv().await
    }

    fn record_seen(&self, id: VolumeId, record: Option<Versioned<VolumeRecord>>) {
        self.plane.record_read(id, false, record);
    }

    async fn forget_replicas(&self, id: VolumeId) {
        self.plane.forget_replicas(id).await;
        if let Err(error) = self.seals.forget(id).await {
            tracing::warn!(id = %id.0, %error, "the seals of a deleted volume could not be removed");
        }
    }

    async fn replication(&self, id: VolumeId) -> Option<ReplicationStatus> {
        self.plane.volume_status(id).await?.replication
    }

    async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), HostError> {
        self.plane
            .resize_volume(id, size_bytes)
            .await
            .map_err(refusal)
    }

    fn rename_volume(&self, id: VolumeId, name: &str) {
        self.metrics.rename_volume(id, name);
    }

    async fn delete_layer(&self, layer: LayerId) -> Result<(), HostError> {
        self.plane.delete_layer(layer).await.map_err(refusal)
    }

    fn runtime(&self, id: VolumeId) -> Option<VolumeRuntime> {
        let volumes = self.metrics.volumes();
        let (.., metrics) = volumes.iter().find(|(open, ..)| *open == id)?;
        Some(VolumeRuntime {
            connections: metrics.connections.get() as u32,
            inflight_requests: metrics.in_flight.get() as u32,
            resynced_bytes: metrics.resynced_blocks.get() * BLOCK_BYTES as u64,
        })
    }

    fn stores(&self) -> Vec<StoreId> {
        self.plane.stores().iter().map(|store| store.id).collect()
    }

    async fn store_groups(&self) -> Vec<Vec<StoreSpace>> {
        let reports = self.plane.store_statuses().await;
        let space = |id: StoreId| {
            let status = reports
                .iter()
                .find(|report| report.id == id)
                .map(|report| &report.status);
            let free_blocks = match status {
                Some(status) if status.poisoned.is_none() => {
                    status.capacity_blocks.saturating_sub(status.used_blocks)
                }
                // Nothing can be written there.
                _ => 0,
            };
            StoreSpace { id, free_blocks }
        };
        let groups = self.plane.store_groups().into_iter();
        groups
            .map(|group| group.into_iter().map(space).collect())
            .collect()
    }

    async fn layers(&self) -> Result<BTreeMap<LayerId, Epoch>, HostError> {
        let mut layers = BTreeMap::new();
        for (_, of_store) in self.plane.layers().await.map_err(refusal)? {
            for (layer, epoch) in of_store {
                let newest = layers.entry(layer).or_insert(epoch);
                *newest = epoch.max(*newest);
            }
        }
        Ok(layers)
    }
}

#[async_trait]
impl Plane for Host {
    async fn store_views(&self) -> Vec<StoreView> {
        let reports = self.plane.store_statuses().await;
        let view = |report: data::StoreReport| {
            let opened = self
                .plane
                .stores()
                .iter()
                .find(|opened| opened.id == report.id)?;
            Some(StoreView {
                id: report.id,
                path: report.path,
                is_device: opened.is_device,
                engine: report.engine,
                tail_on_tmpfs: opened.tail_path.parent().is_some_and(crate::tail::is_tmpfs),
                tail_path: opened.tail_path.clone(),
                opening_took: opened.took,
                recovery: opened.report.clone(),
                status: report.status,
            })
        };
        let mut views: Vec<_> = reports.into_iter().filter_map(view).collect();
        let order = self.stores();
        views.sort_by_key(|view| order.iter().position(|id| *id == view.id));
        views
    }

    async fn connections(&self, volume: VolumeId) -> Vec<ConnectionView> {
        let Some(runtime) = self.plane.volume_status(volume).await else {
            return Vec::new();
        };
        let view = |report: data::ConnectionReport| ConnectionView {
            id: report.serial,
            peer: report.peer,
            connected_at_unix_ms: unix_ms_of(report.connected_at),
            read_only: report.read_only,
            token: report.token,
            structured_replies: report.style != ReplyStyle::Simple,
            extended_headers: report.style == ReplyStyle::Extended,
            block_status: report.base_allocation,
            inflight_requests: report.in_flight,
            requests: report.requests,
            read_bytes: report.read_bytes,
            written_bytes: report.written_bytes,
        };
        runtime.connections.into_iter().map(view).collect()
    }

    async fn start_scrub(&self, store: StoreId, bytes_per_second: u64) -> Result<u64, HostError> {
        let blocks_per_second = (bytes_per_second / BLOCK_BYTES as u64).max(1);
        self.plane
            .start_scrub(store, blocks_per_second)
            .await
            .map_err(refusal)
    }

    async fn stop_scrub(&self, store: StoreId, pass: u64) -> Result<(), HostError> {
        self.plane.stop_scrub(store, pass).await.map_err(refusal)
    }

    async fn scrub_ended(&self) -> Option<data::ScrubEnd> {
        self.plane.scrub_ended().await
    }

    async fn checkpoint(&self, store: StoreId) -> Result<(), HostError> {
        self.plane.checkpoint(store).await.map_err(refusal)
    }

    async fn holdings(&self) -> Result<Holdings, HostError> {
        let stores = self.plane.held().await.map_err(refusal)?;
        let stores = stores.into_iter().map(|(store, held)| {
            let layers = held
                .into_iter()
                .map(|(layer, (chunks, newest))| LayerHolding {
                    layer,
                    chunks,
                    newest,
                });
            StoreHolding {
                store,
                layers: layers.collect(),
            }
        });
        let stores = stores.collect();
        let seals = self.plane.seals().await.map_err(refusal)?;
        let seals = seals.into_iter().map(|(volume, store, seal)| SealHolding {
            volume,
            store,
            seal,
        });
        Ok(Holdings {
            stores,
            seals: seals.collect(),
        })
    }

    async fn survey_rows(
        &self,
        store: StoreId,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<(Vec<RowOfVersions>, bool), HostError> {
        let rows = self.plane.survey_rows(store, layer, from).await;
        rows.map_err(refusal)
    }

    async fn survey_sums(
        &self,
        store: StoreId,
        extent: ExtentKey,
        leaves: Vec<u32>,
    ) -> Result<Vec<LeafSums>, HostError> {
        let sums = self.plane.survey_sums(store, extent, leaves).await;
        sums.map_err(refusal)
    }

    async fn drop_layer_at(&self, store: StoreId, layer: LayerId) -> Result<(), HostError> {
        let dropped = self.plane.drop_layer_at(store, layer).await;
        dropped.map_err(refusal)
    }

    async fn distrust(&self, volume: VolumeId, store: StoreId) -> Result<bool, HostError> {
        self.plane.distrust(volume, store).await.map_err(refusal)
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}
