//! Before a device is made of a volume: no other one of it may be on this node.
//!
//! Two devices of one volume with a filesystem mounted from each destroy it. Devices are found in the kernel's tables, and
//! one that is not found there may be there all the same: made with another state directory, or by hand.

use std::path::Path;
use std::time::Duration;

use super::state::VolumeState;
use super::{Node, StageRequest, filesystem, is_node_of, mount_of};
use crate::address::Address;
use crate::attach::{Device, Export};
use crate::daemon::Volume;
use crate::refusal::{Class, Refusal};

/// How long connections of a device that was just let go may stay open. The daemon ends them in their own time.
const CLOSING_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Refuses while something else than `device` is mounted where a volume is, or is to be, staged or published.
pub(super) fn nothing_else_is_mounted(
    request: &StageRequest,
    known: Option<&VolumeState>,
    device: Option<&Device>,
) -> Result<(), Refusal> {
    let mounts = filesystem::mounts()?;
    let of_state = known.iter().flat_map(|state| {
        let targets = state.targets.iter().map(|target| &target.path);
        std::iter::once(&state.stage.path).chain(targets)
    });
    let is_known = |place: &Path| {
        device.is_some_and(|device| {
            mount_of(&mounts, device, place).is_some() || is_node_of(device, place)
        })
    };
    for place in std::iter::once(&request.staging).chain(of_state) {
        let Some(mount) = mounts.at(place) else {
            continue;
        };
        if is_known(place) {
            continue;
        }
        // Something of the volume's is here, and whoever comes to unstage it is to come.
        let class = if known.is_some() || device.is_some() {
            Class::Unavailable
        } else {
            Class::FailedPrecondition
        };
        return Err(Refusal::new(
            class,
            format!(
                "{} is mounted at {}, and it is no device that is known to carry volume {}: it may be an older device of \
                 the same volume, so the volume is not attached a second time. End what uses it and run `umount {}`, then \
                 ask again",
                mount.source.display(),
                place.display(),
                request.export.volume,
                place.display(),
            ),
        ));
    }
    Ok(())
}

/// Whether the daemon is on this machine: then a connection that it has is a program's that lives. Over TCP it may be one of
/// before this machine lost power.
fn is_local(export: &Export) -> bool {
    export
        .servers
        .iter()
        .any(|server| matches!(server, Address::Unix(path) if path.exists()))
}

impl Node {
    /// Waits until the daemon has no connections of this node's publication any more; refuses when some stay: something here
    /// has the volume open that is not known.
    pub(super) async fn nobody_is_connected(
        &self,
        request: &StageRequest,
        volume: &Volume,
    ) -> Result<(), Refusal> {
        if !is_local(&request.export) {
            return Ok(());
        }
        let begun = tokio::time::Instant::now();
        let mut open = volume.connections_of(&self.settings.node_id);
        while open != 0 {
            if begun.elapsed() >= CLOSING_LIMIT {
                return Err(Refusal::new(
                    Class::Unavailable,
                    format!(
                        "{open} connections are open to volume {0} as it was published to this node, and none of a device \
                         that is known here; it is not attached a second time. Find what has it open (`ashlar connections`, \
                         `nbd-client -c`, `losetup -a`) and end it, or have the volume detached from the node",
                        volume.id
                    ),
                ));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            let now = self.daemon.volume(volume.id).await?;
            open = now.connections_of(&self.settings.node_id);
        }
        Ok(())
    }
}
