//! Publishing: a staged volume bound to where a workload looks for it.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount_bind, mount_remount};
use uuid::Uuid;

use super::filesystem;
use super::given_up::has_given_up;
use super::stage::is_in_place;
use super::state::{Target, VolumeState};
use super::{
    Node, StageRequest, UNMOUNT_FAILED_LIMIT, UNMOUNT_LIMIT, failed, is_node_of, is_ours, mount_of,
};
use crate::attach::Device;
use crate::capability::{Access, Capability};
use crate::failpoint;
use crate::paths;
use crate::refusal::Refusal;

/// What publishing needs to know.
#[derive(Clone, Debug)]
pub struct PublishRequest {
    /// Which volume.
    pub volume: Uuid,
    /// Checked by [`Node::roots`].
    pub target: PathBuf,
    /// How it is used.
    pub capability: Capability,
    /// Whether this workload may only read.
    pub read_only: bool,
    /// What to stage it with where it turns out not to be staged: orchestrators lose track over restarts.
    pub stage: Option<StageRequest>,
}

impl Node {
    /// Publishes a volume at a target path. OK when it is published there in the same way.
    pub async fn publish(&self, request: &PublishRequest) -> Result<(), Refusal> {
        let (mut state, device) = self.staged(request).await?;
        let read_only =
            request.read_only || request.capability.mode.is_reader_only() || state.export.read_only;
        if !is_same_use(&state.stage.capability, &request.capability) {
            return Err(Refusal::precondition(
                "the volume is staged with another capability",
            ));
        }
        failpoint::reach("publish-begun");
        let block = state.stage.capability.access == Access::Block;
        // What a crash left planned and not done does not count.
        state.targets.retain(|target| {
            is_bound(&device, block, &target.path) || target.path == request.target
        });
        let present = state
            .targets
            .iter()
            .find(|target| target.path == request.target);
        if let Some(present) = present
            && is_bound(&device, block, &request.target)
        {
            if present.read_only != read_only || present.mode != request.capability.mode {
                return Err(Refusal::exists(format!(
                    "the volume is published at {} in another way",
                    request.target.display()
                )));
            }
            if block || is_read_only_as_wanted(&request.target, read_only)? {
                return Ok(());
            }
        } else if filesystem::mounts()?.at(&request.target).is_some() {
            return Err(Refusal::exists(format!(
                "something else is mounted at {}",
                request.target.display()
            )));
        }
        self.may_have_another(&state, request, read_only, block)?;
        let target = Target {
            path: request.target.clone(),
            read_only,
            mode: request.capability.mode,
        };
        state.targets.retain(|other| other.path != target.path);
        state.targets.push(target);
        self.states.save(&state)?;
        let bound = if block {
            self.bind_node(&device, &request.target, read_only).await
        } else {
            bind_directory(&state.stage.path, &request.target, read_only).await
        };
        if let Err(refusal) = bound {
            // Nothing is left of an attempt that failed; what cannot be undone is found by the next one.
            let _ = filesystem::unmount(&request.target, UNMOUNT_LIMIT).await;
            let _ = paths::remove(&request.target);
            return Err(refusal);
        }
        failpoint::reach("publish-bound");
        if !is_bound(&device, block, &request.target) {
            let _ = filesystem::unmount(&request.target, UNMOUNT_LIMIT).await;
            let _ = paths::remove(&request.target);
            return Err(Refusal::internal(format!(
                "{} does not show the volume after it was bound there",
                request.target.display()
            )));
        }
        self.states.save(&state)?;
        failpoint::reach("publish-recorded");
        Ok(())
    }

    /// The state and device of a volume that is staged, staging it where it is not.
    async fn staged(&self, request: &PublishRequest) -> Result<(VolumeState, Device), Refusal> {
        for attempt in 0..2 {
            if let Some(state) = self.known(request.volume)?
                && state.stage.is_complete
                && let Some(device) = self.device_of(request.volume).await?
                && is_in_place(&state, &device)?
                && self.is_healthy(&state, &device, request).await?
            {
                return Ok((state, device));
            }
            match &request.stage {
                // An empty staging directory must never be bound: the workload would write to the node's own disk.
                Some(stage) if attempt == 0 => {
                    tracing::info!(volume = %request.volume, "a volume to be published is not staged; staging it");
                    let mut stage = stage.clone();
                    // One that only has to be mounted anew stays staged for as much as it was.
                    if let Some(state) = self.known(request.volume)?
                        && state.stage.is_complete
                        && is_same_use(&state.stage.capability, &stage.capability)
                    {
                        stage.capability = state.stage.capability;
                    }
                    self.stage(&stage).await?;
                }
                _ => break,
            }
        }
        if request.stage.is_none() {
            // Tells a volume that is not there from one that is not staged.
            self.daemon.volume(request.volume).await?;
        }
        Err(Refusal::precondition(format!(
            "volume {} is not staged on this node",
            request.volume
        )))
    }

    /// False when the device is dead for good, or its filesystem gave up after an error, and nobody uses it: then it is
    /// staged anew.
    async fn is_healthy(
        &self,
        state: &VolumeState,
        device: &Device,
        request: &PublishRequest,
    ) -> Result<bool, Refusal> {
        if self.is_beyond_help(state, device).await? {
            return Ok(request.stage.is_none());
        }
        if state.export.read_only
            || state.stage.filesystem.is_none()
            || state.stage.capability.is_mounted_read_only()
        {
            return Ok(true);
        }
        let mounts = filesystem::mounts()?;
        if !has_given_up(&mounts, &state.stage.path).await? {
            return Ok(true);
        }
        let is_mounted = |target: &&Target| mounts.at(&target.path).is_some();
        let used: Vec<&Target> = state.targets.iter().filter(is_mounted).collect();
        if used.is_empty() {
            return Ok(request.stage.is_none());
        }
        // What this very workload has stays published; its health tells the rest.
        if used.iter().any(|target| target.path == request.target) {
            return Ok(true);
        }
        Err(Refusal::internal(
            "the filesystem gave up after an error, and another workload still has it; when it ends, the filesystem is \
             checked and mounted again",
        ))
    }

    /// The interface's rules for a second target path.
    fn may_have_another(
        &self,
        state: &VolumeState,
        request: &PublishRequest,
        read_only: bool,
        block: bool,
    ) -> Result<(), Refusal> {
        let other = state
            .targets
            .iter()
            .find(|target| target.path != request.target);
        let Some(other) = other else {
            return Ok(());
        };
        if !request.capability.mode.allows_several_targets() || !other.mode.allows_several_targets()
        {
            return Err(Refusal::precondition(format!(
                "the volume is published at {}, and {} allows one target",
                other.path.display(),
                request.capability.mode.name()
            )));
        }
        // A device is read-only for all who have it or for none.
        if block && other.read_only != read_only {
            return Err(Refusal::precondition(format!(
                "the device is published {} at {}",
                if other.read_only {
                    "read-only"
                } else {
                    "writable"
                },
                other.path.display()
            )));
        }
        Ok(())
    }

    async fn bind_node(
        &self,
        device: &Device,
        target: &Path,
        read_only: bool,
    ) -> Result<(), Refusal> {
        // A read-only bind mount does not keep a device from being written; the device itself does.
        filesystem::set_read_only(&device.node(), read_only).await?;
        paths::make_file(target).map_err(|error| failed("making the target", target, error))?;
        failpoint::reach("publish-target-made");
        if is_node_of(device, target) {
            return Ok(());
        }
        bind(device.node(), target.to_owned(), false).await
    }

    /// Undoes a publishing and removes the target. OK when there is nothing to undo.
    pub async fn unpublish(&self, volume: Uuid, target: &Path) -> Result<(), Refusal> {
        failpoint::reach("unpublish-begun");
        let state = self.known(volume)?;
        if is_ours(&filesystem::mounts()?, target)? {
            let unmounted = filesystem::unmount(target, UNMOUNT_LIMIT).await;
            if let Err(refusal) = unmounted {
                if !self
                    .is_held_by_the_dead(volume, state.as_ref(), target)
                    .await?
                {
                    return Err(refusal);
                }
                self.fail_device(volume).await?;
                filesystem::unmount_once_free(target, UNMOUNT_FAILED_LIMIT).await?;
            }
        }
        failpoint::reach("unpublish-unmounted");
        paths::remove(target).map_err(|error| failed("removing the target", target, error))?;
        failpoint::reach("unpublish-target-gone");
        if let Some(mut state) = state {
            state.targets.retain(|other| other.path != target);
            self.states.save(&state)?;
        }
        Ok(())
    }

    /// Whether a target that is busy stays so because its user waits for a server that is gone: a killed process cannot
    /// die while the kernel holds its I/O. Where the volume has another target, somebody else still counts on it.
    async fn is_held_by_the_dead(
        &self,
        volume: Uuid,
        state: Option<&VolumeState>,
        target: &Path,
    ) -> Result<bool, Refusal> {
        let others =
            state.is_some_and(|state| state.targets.iter().any(|other| other.path != target));
        if others {
            return Ok(false);
        }
        match self.device_of(volume).await? {
            Some(device) => Ok(self
                .is_dead(state.map(|state| &state.export), &device)
                .await),
            None => Ok(false),
        }
    }
}

/// Two capabilities that need the same staging. The mode may differ: a caller may stage for many and publish to one.
fn is_same_use(staged: &Capability, asked: &Capability) -> bool {
    match (&staged.access, &asked.access) {
        (Access::Block, Access::Block) => true,
        (
            Access::Mount {
                filesystem: staged, ..
            },
            Access::Mount {
                filesystem: asked, ..
            },
        ) => staged == asked || asked.is_none(),
        _ => false,
    }
}

/// Whether a target shows the device, or its filesystem.
fn is_bound(device: &Device, block: bool, target: &Path) -> bool {
    if block {
        return is_node_of(device, target);
    }
    filesystem::mounts().is_ok_and(|mounts| mount_of(&mounts, device, target).is_some())
}

fn is_read_only_as_wanted(target: &Path, read_only: bool) -> Result<bool, Refusal> {
    let mounts = filesystem::mounts()?;
    Ok(mounts
        .at(target)
        .is_some_and(|mount| mount.is_read_only() || !read_only))
}

async fn bind_directory(staging: &Path, target: &Path, read_only: bool) -> Result<(), Refusal> {
    paths::make_directory(target).map_err(|error| failed("making the target", target, error))?;
    failpoint::reach("publish-target-made");
    let is_there = filesystem::mounts()?.at(target).is_some();
    if is_there {
        // Bound by an attempt that was killed before it made the mount read-only.
        return remount(target.to_owned(), read_only).await;
    }
    bind(staging.to_owned(), target.to_owned(), read_only).await
}

/// Binding reads and writes no device, so it runs here and not in a child.
async fn bind(from: PathBuf, to: PathBuf, read_only: bool) -> Result<(), Refusal> {
    let (at, done) = (
        to.clone(),
        tokio::task::spawn_blocking(move || mount_bind(&from, &to)),
    );
    match done.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(failed("binding", &at, std::io::Error::from(error))),
        Err(error) => return Err(failed("binding", &at, error)),
    }
    if read_only {
        remount(at, true).await
    } else {
        Ok(())
    }
}

async fn remount(at: PathBuf, read_only: bool) -> Result<(), Refusal> {
    if !read_only {
        return Ok(());
    }
    let point = at.clone();
    // The kernel takes away what is not named again.
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    if let Some(mount) = filesystem::mounts()?.at(&at) {
        for (option, flag) in [
            ("nosuid", MountFlags::NOSUID),
            ("nodev", MountFlags::NODEV),
            ("noexec", MountFlags::NOEXEC),
        ] {
            if mount.has_option(option) {
                flags |= flag;
            }
        }
    }
    let done = tokio::task::spawn_blocking(move || mount_remount(&point, flags, ""));
    match done.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(failed("making read-only", &at, std::io::Error::from(error))),
        Err(error) => Err(failed("making read-only", &at, error)),
    }
}
