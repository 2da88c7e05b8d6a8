//! Unstaging: unmount, let the device go, forget. Never hangs on a server that is gone.

use std::path::Path;

use uuid::Uuid;

use super::filesystem;
use super::state::VolumeState;
use super::{Node, UNMOUNT_FAILED_LIMIT, UNMOUNT_LIMIT, is_ours};
use crate::attach::handshake::{self, HandshakeError};
use crate::attach::{Device, Export, in_order};
use crate::failpoint;
use crate::refusal::{Class, Refusal};

/// Between two attempts to reach a server that does not answer.
const RETRY: std::time::Duration = std::time::Duration::from_millis(500);

impl Node {
    /// Undoes a staging. OK when there is nothing to undo.
    pub async fn unstage(&self, volume: Uuid, staging: &Path) -> Result<(), Refusal> {
        failpoint::reach("unstage-begun");
        if let Some(state) = self.known(volume)? {
            let mounts = filesystem::mounts()?;
            let used = state
                .targets
                .iter()
                .find(|target| mounts.at(&target.path).is_some());
            if let Some(used) = used {
                return Err(Refusal::precondition(format!(
                    "the volume is still published at {}",
                    used.path.display()
                )));
            }
        }
        self.take_down(volume, staging).await?;
        self.set_problem(volume, None);
        Ok(())
    }

    /// Unmounts and detaches whatever there is of a volume, and forgets it.
    pub(super) async fn take_down(&self, volume: Uuid, staging: &Path) -> Result<(), Refusal> {
        let state = self.known(volume)?;
        let device = self.device_of(volume).await?;
        let mut is_failed = false;
        if let Some(device) = &device
            && self
                .is_dead(state.as_ref().map(|state| &state.export), device)
                .await
        {
            tracing::warn!(volume = %volume, device = device.name, "the server of a device is gone; failing its I/O");
            self.fail_device(volume).await?;
            is_failed = true;
        }
        let mut points = vec![staging.to_owned()];
        points.extend(state.iter().map(|state| state.stage.path.clone()));
        for point in points {
            if is_ours(&filesystem::mounts()?, &point)? {
                is_failed |= self.unmount_staged(volume, state.as_ref(), &point).await?;
            }
        }
        failpoint::reach("unstage-unmounted");
        if let Some(device) = &device {
            let mounts = filesystem::mounts()?;
            let mounted = device
                .number()
                .and_then(|number| mounts.of_device(number).next());
            if let Some(other) = mounted.or_else(|| mounts.of_node(&device.name).next()) {
                return Err(Refusal::precondition(format!(
                    "the volume is still mounted at {}",
                    other.point.display()
                )));
            }
            if !is_failed {
                filesystem::released(&device.node(), UNMOUNT_LIMIT).await?;
            }
        }
        for attacher in &self.attachers {
            attacher.detach(volume).await?;
        }
        failpoint::reach("unstage-detached");
        self.states.remove(volume)?;
        failpoint::reach("unstage-forgotten");
        Ok(())
    }

    /// True: the device had to be failed for it. An unmount that takes long because much has to be written is not cut
    /// short: the caller asks again.
    async fn unmount_staged(
        &self,
        volume: Uuid,
        state: Option<&VolumeState>,
        point: &Path,
    ) -> Result<bool, Refusal> {
        let refusal = match filesystem::unmount(point, UNMOUNT_LIMIT).await {
            Ok(()) => return Ok(false),
            Err(refusal) => refusal,
        };
        if refusal.class != Class::DeadlineExceeded {
            return Err(refusal);
        }
        if let Some(device) = self.device_of(volume).await?
            && !self
                .is_dead(state.map(|state| &state.export), &device)
                .await
        {
            return Err(refusal);
        }
        tracing::warn!(volume = %volume, "an unmount did not end and the server is gone; failing the device under it");
        self.fail_device(volume).await?;
        filesystem::unmount(point, UNMOUNT_FAILED_LIMIT).await?;
        Ok(true)
    }

    /// Makes what waits for a volume's device end with an error.
    pub(super) async fn fail_device(&self, volume: Uuid) -> Result<(), Refusal> {
        if let Some(device) = self.device_of(volume).await? {
            self.attacher(device.kind)?.fail(&device, volume).await?;
        }
        Ok(())
    }

    /// Whether this node still has a volume. Refused all the same, it is being served elsewhere for a moment, and what was
    /// not written yet is not lost for that: [`keep_connected`](super::keep_connected) has it opened here again.
    async fn is_published(&self, volume: Uuid) -> bool {
        let known = self.daemon.volume(volume).await;
        known.is_ok_and(|known| {
            let mut publications = known.publications.iter();
            publications.any(|publication| publication.node_id == self.settings.node_id)
        })
    }

    /// Whether the server behind a device is gone for good, as far as anybody can wait: fenced at once, silent for as long
    /// as the patience lasts. A device that is slow is not dead: only an error that it returned counts.
    pub(super) async fn is_dead(&self, export: Option<&Export>, device: &Device) -> bool {
        let Some(export) = export else {
            return filesystem::fails(&device.node()).await;
        };
        let Ok(servers) = in_order(export) else {
            return true;
        };
        let begun = tokio::time::Instant::now();
        loop {
            let mut refused = 0;
            for server in &servers {
                match handshake::look(server, &export.name).await {
                    // Served: then all that can be wrong is the device's own connection.
                    Ok(_) => return filesystem::fails(&device.node()).await,
                    Err(HandshakeError::Refused { .. }) => refused += 1,
                    Err(_) => {}
                }
            }
            let is_fenced = refused == servers.len() && !self.is_published(export.volume).await;
            if is_fenced || begun.elapsed() >= self.settings.patience {
                return true;
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}
