//! Volumes that this daemon does not know: the records say who has one.

use ashlar_core::records::{StoreRecord, Versioned, VolumeName, VolumeRecord, keys};
use ashlar_core::units::VolumeId;

use super::{VolumeError, VolumeView, Volumes};
use crate::{identity, meta};

impl Volumes {
    /// One volume, by name or id. Of one that is another node's alone the refusal says whose.
    pub(crate) async fn find(&self, reference: &str) -> Result<VolumeView, VolumeError> {
        match self.get(reference) {
            Err(VolumeError::NotFound { .. }) => Err(self.missing(reference).await),
            found => found,
        }
    }

    /// Why nothing of that name or id is known here.
    pub(super) async fn missing(&self, reference: &str) -> VolumeError {
        let not_found = || VolumeError::NotFound {
            reference: reference.to_owned(),
        };
        if !self.is_shared {
            return not_found();
        }
        match self.whose(reference).await {
            Ok(Some(whose)) => whose,
            Ok(None) => not_found(),
            Err(error) => {
                tracing::debug!(volume = reference, %error, "a volume that is not known here could not be looked up");
                not_found()
            }
        }
    }

    /// The record that a name or an id leads to, as the metadata store has it now.
    pub(super) async fn look_up(
        &self,
        reference: &str,
    ) -> Result<Option<Versioned<VolumeRecord>>, VolumeError> {
        let id = match VolumeName::parse(reference) {
            Ok(name) => self.name_holder(&name).await?.map(|held| held.volume),
            Err(_) => None,
        };
        let Some(id) = id.or_else(|| reference.parse().ok().map(VolumeId)) else {
            return Ok(None);
        };
        Ok(meta::read::<VolumeRecord>(&*self.store, &keys::volume(id)).await?)
    }

    /// `None`: there is no such volume, or it is no other node's alone.
    async fn whose(&self, reference: &str) -> Result<Option<VolumeError>, VolumeError> {
        let Some(volume) = self.look_up(reference).await? else {
            return Ok(None);
        };
        let Some(store) = volume.record.placement.stores.first() else {
            return Ok(None);
        };
        let store = meta::read::<StoreRecord>(&*self.store, &keys::store(*store)).await?;
        let Some(node) = store.and_then(|store| store.record.node) else {
            return Ok(None);
        };
        let member = identity::member(&*self.store, node).await?;
        Ok(Some(VolumeError::OneCopyElsewhere {
            reference: volume.record.name.to_string(),
            node,
            address: member.and_then(|member| member.record.address),
        }))
    }
}
