//! Whether a volume was ever written to, and the filesystems made on it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use ashlar_core::records::{FilesystemType, VolumeRecord};
use ashlar_core::units::VolumeId;
use uuid::Uuid;

use super::{Change, HostError, Serving, VolumeError, VolumeView, Volumes, lock};

/// Until a record that could not be written is tried again; the volume's first change waits meanwhile.
const TRY_AGAIN: Duration = Duration::from_secs(1);

impl Volumes {
    /// Announces a filesystem, if the volume was never written to or the same one was announced before.
    pub async fn begin_format(
        self: &Arc<Self>,
        reference: &str,
        kind: FilesystemType,
        uuid: Uuid,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            let (before, _guard) = service.lock_volume(&reference).await?;
            let id = before.record.id;
            service.is_served(&before.record)?;
            let change = Change::BeginFormat {
                id,
                kind: &kind,
                uuid,
            };
            if let Some(begun) = service.change(&change).await? {
                tracing::info!(volume = %begun.record.name, id = %id.0, %kind, %uuid, "a filesystem is being made");
                service.update(begun);
            }
            service.get(&id.0.to_string())
        })
        .await
    }

    /// Records that the filesystem announced is made.
    pub async fn end_format(
        self: &Arc<Self>,
        reference: &str,
        uuid: Uuid,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            let (before, _guard) = service.lock_volume(&reference).await?;
            let id = before.record.id;
            if let Some(ended) = service.change(&Change::EndFormat { id, uuid }).await? {
                tracing::info!(volume = %ended.record.name, id = %id.0, %uuid, "a filesystem was made");
                service.update(ended);
            }
            service.get(&id.0.to_string())
        })
        .await
    }

    /// Whether stores were found, at the start, to hold blocks of a volume.
    pub(super) fn stores_hold_blocks(&self, record: &VolumeRecord) -> bool {
        let found = lock(&self.written);
        record.layers.iter().any(|layer| found.contains_key(layer))
    }

    /// False only when it is certain: the record says so, its stores are open, and none holds a block of it.
    pub(super) fn ever_written(&self, record: &VolumeRecord, serving: &Serving) -> bool {
        !record.never_written || *serving != Serving::Yes || self.stores_hold_blocks(record)
    }

    /// Records for every volume that gets its first change that it is written to, as long as the data plane lives.
    pub(super) fn record_first_changes(self: &Arc<Self>) {
        let (host, service) = (self.host.clone(), Arc::downgrade(self));
        tokio::spawn(async move {
            while let Some(id) = host.first_change().await {
                tokio::spawn(record(service.clone(), id));
            }
        });
    }

    async fn record_first_change(&self, id: VolumeId) -> Result<(), VolumeError> {
        let reference = id.0.to_string();
        let (_, _guard) = self.lock_volume(&reference).await?;
        if let Some(written) = self.change(&Change::MarkWritten { id }).await? {
            self.update(written);
        }
        match self.host.first_change_recorded(id).await {
            Ok(()) | Err(HostError::NotOpen) => Ok(()),
            Err(source) => Err(VolumeError::Host { reference, source }),
        }
    }
}

/// Tries until it is done or cannot be. The change waits meanwhile: let through, it could be lost under a new filesystem.
async fn record(service: Weak<Volumes>, id: VolumeId) {
    while let Some(volumes) = service.upgrade() {
        let recorded = volumes
            .to_the_end(|service| async move { service.record_first_change(id).await })
            .await;
        let is_served = volumes.host.runtime(id).is_some();
        drop(volumes);
        match recorded {
            Ok(()) | Err(VolumeError::ShuttingDown) => return,
            Err(VolumeError::NotFound { .. }) if !is_served => return,
            Err(error) => {
                tracing::warn!(id = %id.0, %error, "that a volume is written to could not be recorded; its first write waits, trying again");
            }
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}
