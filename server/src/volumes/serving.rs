//! Volumes brought into the data plane and taken out of it.

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{Versioned, VolumeRecord};
use ashlar_core::units::VolumeId;

use super::changes::Change;
use super::{HostError, Serving, VolumeError, VolumeSpec, Volumes};

impl Volumes {
    /// Claims a volume and opens it. The outcome is kept for those who ask why it is not served.
    pub(super) async fn serve(&self, current: Versioned<VolumeRecord>) -> Result<(), VolumeError> {
        let id = current.record.id;
        if current.record.placement.is_replicated() {
            let current = self.reread(id).await?;
            self.open_replicated(current).await?;
            return self.wait_until_served(id).await;
        }
        let claimed = self.change(&Change::Claim { id }).await;
        let outcome = match claimed {
            Ok(Some(claimed)) => return self.open(claimed).await,
            Ok(None) => VolumeError::Contended,
            Err(error) => error,
        };
        self.catalog()
            .put(current, Serving::No(outcome.to_string()));
        Err(outcome)
    }

    /// Opens a volume under the epoch that was just claimed.
    pub(super) async fn open(&self, claimed: Versioned<VolumeRecord>) -> Result<(), VolumeError> {
        let record = &claimed.record;
        let spec = VolumeSpec {
            id: record.id,
            name: record.name.to_string(),
            size_bytes: record.size_bytes,
            layers: record.layers.clone(),
            epoch: record.epoch,
            write_through: record.write_through,
            read_only: record.read_only,
            placement: record.placement.clone(),
            admitted: record.admitted(),
            never_written: record.never_written,
            limits: record.limits,
        };
        let open_stores = self.host.stores();
        let opened = match record
            .placement
            .stores
            .iter()
            .find(|store| !open_stores.contains(store))
        {
            Some(missing) => Err(HostError::StoreMissing { store: *missing }),
            None => self.host.open_volume(spec).await,
        };
        match opened {
            Ok(()) => {
                self.events.tell_of(record, None, Occurrence::VolumeServed);
                self.catalog().put(claimed, Serving::Yes);
                Ok(())
            }
            Err(error) => {
                let reference = record.name.to_string();
                let reason = error.to_string();
                let what = Occurrence::VolumeNotServed {
                    reason: reason.clone(),
                };
                self.events.tell_of(record, None, what);
                self.catalog().put(claimed, Serving::No(reason.clone()));
                Err(VolumeError::NotServed { reference, reason })
            }
        }
    }

    /// Closes a volume in the data plane; answers how many connections kept it from being closed.
    pub(super) async fn close(&self, id: VolumeId) -> Result<u32, VolumeError> {
        match self.host.close_volume(id).await {
            Ok(()) | Err(HostError::NotOpen) => Ok(0),
            Err(HostError::Busy { connections }) => Ok(connections),
            Err(
                source @ (HostError::StoreMissing { .. }
                | HostError::ShuttingDown
                | HostError::Store { .. }),
            ) => Err(VolumeError::Host {
                reference: id.0.to_string(),
                source,
            }),
        }
    }
}
