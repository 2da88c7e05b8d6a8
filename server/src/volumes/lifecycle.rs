//! What becomes of a volume: created, renamed, grown, set, deleted. Each is run to its end under the volume's lock.

use std::sync::Arc;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{
    NewVolume, RoundedSize, VolumeName, VolumeState, begin_delete, configure, finish_delete,
    first_annotations,
};
use ashlar_core::units::VolumeId;
use uuid::Uuid;

use super::changes::Change;
use super::{HostError, Serving, VolumeError, VolumeSettings, VolumeView, Volumes, lock, unix_ms};
use crate::meta::Outcome;

impl Volumes {
    pub(super) async fn create_now(
        &self,
        name: VolumeName,
        size: RoundedSize,
        settings: VolumeSettings,
    ) -> Result<VolumeView, VolumeError> {
        let id = VolumeId(Uuid::new_v4());
        let (replicas, placement) = self.place(id, size.bytes, &settings).await?;
        let first_annotations = first_annotations(id, &settings.annotations);
        let new = NewVolume {
            id,
            name,
            size,
            read_only: settings.read_only,
            write_through: settings.write_through,
            created_at_unix_ms: unix_ms(),
            replicas,
            min_in_sync: Some(settings.min_in_sync).filter(|wanted| *wanted != 0),
            zones: settings.zones,
            placement,
            limits: settings.limits,
            annotations: settings.annotations,
        };
        let created = self.change(&Change::Create(new)).await?;
        // `change` answers None only when the decision was to do nothing.
        let created = created.ok_or(VolumeError::Contended)?;
        let id = created.record.id;
        tracing::info!(volume = %created.record.name, id = %id.0, size_bytes = size.bytes, "volume created");
        let size_bytes = size.bytes;
        self.events.tell_of(
            &created.record,
            None,
            Occurrence::VolumeCreated { size_bytes },
        );
        if let Some((annotations, _)) = first_annotations {
            lock(&self.annotations).insert(id, Arc::new(annotations));
        }
        // Locked before anybody can see it, so that nobody changes it while it is being opened.
        let _guard = {
            let mut catalog = self.catalog();
            catalog.put(created.clone(), Serving::Opening);
            catalog
                .get(id)
                .and_then(|entry| entry.changing.clone().try_lock_owned().ok())
        };
        self.serve(created).await?;
        self.get(&id.0.to_string())
    }

    pub(super) async fn rename_now(
        &self,
        reference: &str,
        name: &VolumeName,
    ) -> Result<VolumeView, VolumeError> {
        let (before, _guard) = self.lock_volume(reference).await?;
        let id = before.record.id;
        let renamed = self.change(&Change::Rename { id, name }).await?;
        if let Some(renamed) = renamed {
            tracing::info!(volume = %name, id = %id.0, before = %before.record.name, "volume renamed");
            let before = before.record.name.to_string();
            self.events
                .tell_of(&renamed.record, None, Occurrence::VolumeRenamed { before });
            self.update(renamed);
            self.host.rename_volume(id, name.as_str());
        }
        self.get(&id.0.to_string())
    }

    pub(super) async fn resize_now(
        &self,
        reference: &str,
        size: RoundedSize,
    ) -> Result<(VolumeView, u64), VolumeError> {
        let (before, _guard) = self.lock_volume(reference).await?;
        let id = before.record.id;
        let grown = self.change(&Change::Resize { id, size }).await?;
        if let Some(grown) = grown {
            tracing::info!(volume = %grown.record.name, id = %id.0, size_bytes = size.bytes, "volume grown");
            let size_bytes = size.bytes;
            self.events
                .tell_of(&grown.record, None, Occurrence::VolumeGrown { size_bytes });
            let name = grown.record.name.to_string();
            self.update(grown);
            match self.host.resize_volume(id, size.bytes).await {
                // It gets its new size when it is opened.
                Ok(()) | Err(HostError::NotOpen) => {}
                Err(error) => {
                    let reason = format!(
                        "its new size is recorded and comes with the next start of ashlard: {error}"
                    );
                    return Err(VolumeError::NotServed {
                        reference: name,
                        reason,
                    });
                }
            }
        }
        Ok((self.get(&id.0.to_string())?, before.record.size_bytes))
    }

    pub(super) async fn configure_now(
        &self,
        reference: &str,
        read_only: Option<bool>,
        write_through: Option<bool>,
    ) -> Result<VolumeView, VolumeError> {
        let (known, _guard) = self.lock_volume(reference).await?;
        let id = known.record.id;
        // The catalog may be behind what another node made of it.
        let before = self.reread(id).await?;
        if configure(&before, self.head.node, read_only, write_through, 0)?.is_some() {
            let connections = self.close(id).await?;
            if connections == 0 {
                let closed = Serving::No("its settings are being changed".to_owned());
                self.catalog().put(before, closed);
            }
            let change = Change::Configure {
                id,
                read_only,
                write_through,
                connections,
            };
            let decided = self.change(&change).await;
            // Refused or not, a volume that was closed for this is served again.
            let reopened = match &decided {
                _ if connections > 0 => Ok(()),
                Ok(Some(configured)) => self.serve(configured.clone()).await,
                Ok(None) | Err(_) => self.serve_again(id).await,
            };
            decided?;
            reopened?;
        }
        self.get(&id.0.to_string())
    }

    pub(super) async fn delete_now(&self, reference: &str) -> Result<VolumeId, VolumeError> {
        let (known, _guard) = self.lock_volume(reference).await?;
        let id = known.record.id;
        // The catalog may be behind what another node made of it.
        let before = self.reread(id).await?;
        if before.record.state == VolumeState::Active {
            // One that is published stays open: its node may be on its way back to it.
            begin_delete(&before, self.head.node, 0)?;
            let connections = self.close(id).await?;
            match self.change(&Change::BeginDelete { id, connections }).await {
                Ok(Some(tombstone)) => {
                    tracing::info!(volume = %tombstone.record.name, id = %id.0, "volume deletion began");
                    self.catalog()
                        .put(tombstone, Serving::No("it is being deleted".to_owned()));
                }
                Ok(None) => {}
                Err(error) => {
                    if connections == 0
                        && let Err(error) = self.serve_again(id).await
                    {
                        tracing::error!(volume = reference, %error, "a volume whose deletion was refused could not be opened again");
                    }
                    return Err(error);
                }
            }
        }
        self.bury(id).await?;
        Ok(id)
    }

    /// Serves a volume that was closed for a change that came to nothing, unless another node has it by now.
    async fn serve_again(&self, id: VolumeId) -> Result<(), VolumeError> {
        let current = self.reread(id).await?;
        let record = &current.record;
        let is_elsewhere = record.placement.is_replicated()
            && record.head.is_some_and(|head| head.node != self.head.node);
        if is_elsewhere {
            let serving = Serving::elsewhere(record);
            self.catalog().put(current, serving);
            return Ok(());
        }
        self.serve(current).await
    }

    /// Drops the layers of a tombstone, then the tombstone.
    pub(super) async fn bury(&self, id: VolumeId) -> Result<(), VolumeError> {
        let Some(entry) = self.catalog().get(id).cloned() else {
            return Ok(());
        };
        if entry.current.record.placement.is_replicated() {
            // Other nodes may be away.
            self.burials.notify_one();
            return self.drop_replicas(id).await;
        }
        let name = entry.current.record.name.to_string();
        let not_freed = |reason: String| VolumeError::NotFreed {
            reference: name.clone(),
            reason,
        };
        for layer in &entry.current.record.layers {
            self.host
                .delete_layer(*layer)
                .await
                .map_err(|error| not_freed(error.to_string()))?;
        }
        let tombstone = self
            .reread(id)
            .await
            .map_err(|error| not_freed(error.to_string()))?;
        match self.store.commit(finish_delete(&tombstone)).await {
            Ok(Outcome::Committed(_)) => {}
            Ok(Outcome::Conflict) => {
                return Err(not_freed("its record changed meanwhile".to_owned()));
            }
            Err(error) => return Err(not_freed(error.to_string())),
        }
        self.catalog().remove(id);
        lock(&self.annotations).remove(&id);
        tracing::info!(volume = %name, id = %id.0, "volume deleted");
        self.events
            .tell_of(&tombstone.record, None, Occurrence::VolumeDeleted);
        Ok(())
    }
}
