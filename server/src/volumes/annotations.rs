//! What others keep with volumes.

use std::sync::Arc;

use ashlar_core::records::{Annotations, AnnotationsRecord, annotate, keys};
use ashlar_core::units::VolumeId;

use super::{ATTEMPTS, VolumeError, VolumeView, Volumes, lock};
use crate::meta::{self, MetadataError, Outcome};

impl Volumes {
    /// Replaces the annotations of a volume, unless they were changed since `expected_revision`.
    pub async fn annotate(
        self: &Arc<Self>,
        reference: &str,
        expected_revision: u64,
        annotations: Annotations,
    ) -> Result<VolumeView, VolumeError> {
        let reference = reference.to_owned();
        self.to_the_end(|service| async move {
            service
                .annotate_now(&reference, expected_revision, &annotations)
                .await
        })
        .await
    }

    async fn annotate_now(
        &self,
        reference: &str,
        expected_revision: u64,
        annotations: &Annotations,
    ) -> Result<VolumeView, VolumeError> {
        let (volume, _guard) = self.lock_volume(reference).await?;
        let id = volume.record.id;
        for _ in 0..ATTEMPTS {
            let key = keys::annotations(id);
            let current = meta::read::<AnnotationsRecord>(&*self.store, &key).await?;
            let decided = annotate(id, current.as_ref(), expected_revision, annotations);
            let (record, transaction) = decided?;
            // Not for a volume that is deleted meanwhile.
            let volume = self.reread(id).await?;
            let transaction = transaction.when_unchanged(keys::volume(id), volume.changed_at);
            match self.store.commit(transaction).await {
                Ok(Outcome::Committed(_)) => {}
                Ok(Outcome::Conflict) => continue,
                Err(unknown @ MetadataError::Unknown { .. }) => {
                    let found = meta::read::<AnnotationsRecord>(&*self.store, &key).await?;
                    if found.is_none_or(|found| found.record != record) {
                        return Err(unknown.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
            lock(&self.annotations).insert(id, Arc::new(record));
            return self.get(&id.0.to_string());
        }
        Err(VolumeError::Contended)
    }

    /// Reads those of every volume.
    pub(super) async fn load_annotations(&self) -> Result<(), VolumeError> {
        let listing = self.store.list(keys::ANNOTATIONS).await?;
        for entry in listing.entries {
            let id = entry.key.strip_prefix(keys::ANNOTATIONS).unwrap_or("");
            let Ok(id) = uuid::Uuid::try_parse(id) else {
                continue;
            };
            let record = entry.read::<AnnotationsRecord>()?.record;
            lock(&self.annotations).insert(VolumeId(id), Arc::new(record));
        }
        Ok(())
    }

    /// Those of one volume.
    pub(super) fn annotations_of(&self, id: VolumeId) -> Arc<AnnotationsRecord> {
        lock(&self.annotations)
            .get(&id)
            .cloned()
            .unwrap_or_default()
    }
}
