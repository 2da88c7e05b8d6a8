//! Epochs of which few versions are left: claimed anew while the volume is served, before a client notices.

use std::sync::{Arc, Weak};
use std::time::Duration;

use ashlar_core::units::VolumeId;

use super::{Change, HostError, VolumeError, Volumes};

/// Until a claim that failed is tried again. The reserve of an epoch lasts for several of these at the highest rate.
const TRY_AGAIN: Duration = Duration::from_secs(1);

impl Volumes {
    /// Gives every head that asks for one a new epoch, as long as the data plane lives.
    pub(super) fn renew_epochs(self: &Arc<Self>) {
        let (host, service) = (self.host.clone(), Arc::downgrade(self));
        tokio::spawn(async move {
            while let Some(id) = host.epoch_wanted().await {
                tokio::spawn(renew(service.clone(), id));
            }
        });
    }

    /// Claims a volume that is served and tells its head. A crash between the two leaves an epoch unused.
    async fn renew_epoch_now(&self, id: VolumeId) -> Result<(), VolumeError> {
        let reference = id.0.to_string();
        let (_, _guard) = self.lock_volume(&reference).await?;
        let claimed = self.change(&Change::Claim { id }).await?;
        let claimed = claimed.ok_or(VolumeError::Contended)?;
        let (name, epoch) = (claimed.record.name.to_string(), claimed.record.epoch);
        self.update(claimed);
        match self.host.renew_epoch(id, epoch).await {
            Ok(()) => {
                tracing::info!(
                    volume = name,
                    epoch = epoch.0,
                    "the volume goes on under a new epoch"
                );
                Ok(())
            }
            // It gets a newer one when it is opened.
            Err(HostError::NotOpen) => Ok(()),
            Err(source) => Err(VolumeError::Host { reference, source }),
        }
    }
}

/// Tries until it is done or cannot be. The volume takes writes meanwhile, as long as versions are left.
async fn renew(service: Weak<Volumes>, id: VolumeId) {
    while let Some(volumes) = service.upgrade() {
        let renewed = volumes
            .to_the_end(|service| async move { service.renew_epoch_now(id).await })
            .await;
        drop(volumes);
        match renewed {
            Ok(()) | Err(VolumeError::NotFound { .. } | VolumeError::ShuttingDown) => return,
            Err(error @ (VolumeError::Metadata(_) | VolumeError::Contended)) => {
                tracing::warn!(id = %id.0, %error, "a volume could not be claimed anew; trying again");
            }
            Err(error) => {
                tracing::error!(id = %id.0, %error, "a volume cannot be claimed anew; it will refuse writes when its epoch has no versions left");
                return;
            }
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}
