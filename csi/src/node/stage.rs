//! Staging: attach, make sure it is the right device, format if and only if nothing can be lost, check, mount, grow.

use std::path::Path;

use uuid::Uuid;

use super::filesystem;
use super::format::{Decision, Found, Recorded, decide};
use super::given_up::has_given_up;
use super::state::{Stage, VolumeState};
use super::{Node, StageRequest, UNMOUNT_LIMIT, failed, guard, is_node_of, mount_of};
use crate::attach::{Device, Export};
use crate::capability::{Access, Filesystem};
use crate::daemon::Volume;
use crate::failpoint;
use crate::mount_options;
use crate::paths;
use crate::refusal::{Class, Refusal};

/// A filesystem to be made or used, as a caller asked for it.
struct Wish<'a> {
    wanted: Option<Filesystem>,
    options: &'a [String],
    read_only: bool,
}

impl Node {
    /// Stages a volume. OK when it is staged there in the same way; [`Class::AlreadyExists`] when in another.
    ///
    /// After a final answer nobody comes to unstage. So what is there half made goes before one is given, and while it
    /// cannot go the answer is [`Class::Unavailable`].
    pub async fn stage(&self, request: &StageRequest) -> Result<(), Refusal> {
        let id = request.export.volume;
        match self.try_stage(request).await {
            Err(refusal) if is_final(refusal.class) => {
                match self.clear_half_made(id, &request.staging).await {
                    Ok(()) => Err(refusal),
                    Err(error) => Err(Refusal::new(
                        Class::Unavailable,
                        format!("{refusal}; clearing away what was attached failed: {error}"),
                    )),
                }
            }
            staged => staged,
        }
    }

    /// Takes away what there is of a volume that is not staged as a whole. What is staged as a whole, and what is in use,
    /// stays.
    async fn clear_half_made(&self, volume: Uuid, staging: &Path) -> Result<(), Refusal> {
        let known = self.known(volume)?;
        let device = self.device_of(volume).await?;
        match (&known, &device) {
            (None, None) => return Ok(()),
            (Some(state), Some(device))
                if state.stage.is_complete && is_in_place(state, device)? =>
            {
                return Ok(());
            }
            // Staged as a whole by a driver that has lost its memory.
            (None, Some(device)) if is_mounted(device)? => return Ok(()),
            _ => {}
        }
        let mut targets = known.iter().flat_map(|state| &state.targets);
        if let Some(target) = targets.find(|target| is_used(&target.path)) {
            return Err(Refusal::precondition(format!(
                "the volume is still published at {}",
                target.path.display()
            )));
        }
        self.take_down(volume, staging).await
    }

    async fn try_stage(&self, request: &StageRequest) -> Result<(), Refusal> {
        let id = request.export.volume;
        if let Access::Mount { options, .. } = &request.capability.access {
            mount_options::check(options)?;
        }
        let mut volume = self.daemon.volume(id).await?;
        if volume.is_deleting {
            return Err(Refusal::not_found(format!("volume {id} is being deleted")));
        }
        let mut request = request.clone();
        if volume.is_replicated {
            // Served beside this node from now on, and reached there: what was published names the daemon that was asked.
            let (served, servers) = self.daemon.open(id, &self.settings.node_id).await?;
            volume = served;
            request.export.servers = servers;
        }
        let request = &request;
        failpoint::reach("stage-begun");
        let known = self.known(id)?;
        if let Some(state) = &known
            && self.is_staged_as(state, request, &volume).await?
        {
            return Ok(());
        }
        let staged = self.stage_afresh(request, &volume, known).await;
        match &staged {
            Ok(()) => self.set_problem(id, None),
            Err(refusal) if is_final(refusal.class) => {
                let message = refusal.message.clone();
                self.set_problem(id, Some(("StagingFailed", message)));
            }
            Err(_) => {}
        }
        staged
    }

    /// True when the volume is staged just so; an error when it is staged otherwise.
    async fn is_staged_as(
        &self,
        state: &VolumeState,
        request: &StageRequest,
        volume: &Volume,
    ) -> Result<bool, Refusal> {
        let Some(device) = self.device_of(request.export.volume).await? else {
            return Ok(false);
        };
        if !state.stage.is_complete || !is_in_place(state, &device)? {
            return Ok(false);
        }
        if state.stage.path != request.staging {
            return Err(Refusal::precondition(format!(
                "the volume is staged at {}",
                state.stage.path.display()
            )));
        }
        if state.stage.capability != request.capability {
            return Err(Refusal::exists(
                "the volume is staged there with another capability",
            ));
        }
        // Published anew: the old export is fenced, and the device with it.
        if state.export.name != request.export.name {
            if let Some(target) = state.targets.iter().find(|target| is_used(&target.path)) {
                return Err(Refusal::precondition(format!(
                    "the volume was published anew while it is still mounted at {}",
                    target.path.display()
                )));
            }
            return Ok(false);
        }
        // What the kernel takes for written may be gone: nobody goes on with that device.
        if state.client_generation != volume.client_generation {
            if let Some(target) = state.targets.iter().find(|target| is_used(&target.path)) {
                return Err(Refusal::precondition(format!(
                    "the volume lost answered writes in a power cut while it was mounted at {}; end what uses it, then it \
                     is checked and mounted again",
                    target.path.display()
                )));
            }
            return Ok(false);
        }
        // A filesystem that gave up after an error is of no use until it is checked and mounted again.
        let is_broken = !request.export.read_only
            && !request.capability.is_mounted_read_only()
            && state.stage.filesystem.is_some()
            && has_given_up(&filesystem::mounts()?, &state.stage.path).await?;
        if is_broken && state.targets.iter().any(|target| is_used(&target.path)) {
            return Err(Refusal::precondition(
                "the filesystem gave up after an error and is still in use; end what uses it, then it is checked and \
                 mounted again",
            ));
        }
        Ok(!is_broken && !self.is_beyond_help(state, &device).await?)
    }

    /// True when nobody uses the volume and its device lost its server in a way that only a new device mends.
    pub(super) async fn is_beyond_help(
        &self,
        state: &VolumeState,
        device: &Device,
    ) -> Result<bool, Refusal> {
        Ok(!self.attacher(device.kind)?.reconnects()
            && !state.targets.iter().any(|target| is_used(&target.path))
            && !filesystem::answers(&device.node()).await)
    }

    async fn stage_afresh(
        &self,
        request: &StageRequest,
        volume: &Volume,
        known: Option<VolumeState>,
    ) -> Result<(), Refusal> {
        let id = volume.id;
        if request.capability.access == Access::Block
            && let Recorded::Begun { filesystem, uuid } = &volume.filesystem
        {
            // What is written raw would be thrown away when the filesystem is made again.
            return Err(Refusal::precondition(format!(
                "making {filesystem} {uuid} on the volume was begun and did not end; stage it as a mounted volume once, \
                 or delete it"
            )));
        }
        let stage = Stage {
            path: request.staging.clone(),
            capability: request.capability.clone(),
            filesystem: None,
            is_complete: false,
        };
        let mut device = self.device_of(id).await?;
        guard::nothing_else_is_mounted(request, known.as_ref(), device.as_ref())?;
        let is_same_export = known
            .as_ref()
            .is_none_or(|state| state.export.name == request.export.name);
        let is_half_way = known.as_ref().is_some_and(|state| {
            !state.stage.is_complete && state.client_generation == volume.client_generation
        });
        if let Some(found) = &device
            && !(is_same_export && is_half_way && self.is_usable(found, &request.export).await?)
        {
            // Of an earlier publication, of unknown origin, or dead.
            let place = known
                .as_ref()
                .map_or(&request.staging, |state| &state.stage.path);
            self.take_down(id, place).await?;
            device = None;
        }
        // Read before the device is made: what is lost from now on is seen.
        let mut state = VolumeState::new(
            self.boot_id.clone(),
            request.export.clone(),
            volume.client_generation,
            stage,
        );
        state.device = device.clone();
        state.connections = match (&known, &device) {
            (Some(known), Some(_)) => known.connections,
            _ => self.attacher(self.settings.preferred)?.connections(),
        };
        self.states.save(&state)?;
        failpoint::reach("stage-state-written");
        let device = match device {
            Some(device) => device,
            None => {
                // What an attempt left that broke off has no device yet and may have connections.
                for attacher in &self.attachers {
                    attacher.detach(id).await?;
                }
                self.nobody_is_connected(request, volume).await?;
                let attacher = self.attacher(self.settings.preferred)?;
                let attached = attacher.attach(&request.export).await?;
                state.connections = attached.connections;
                attached.device
            }
        };
        failpoint::reach("attach-done");
        state.device = Some(device.clone());
        self.states.save(&state)?;
        failpoint::reach("stage-device-recorded");
        if device.size_bytes() != volume.size_bytes {
            return Err(Refusal::internal(format!(
                "{} has {} bytes and the volume {}: it is not touched",
                device.name,
                device.size_bytes(),
                volume.size_bytes
            )));
        }
        if !is_node_of(&device, &device.node()) {
            return Err(Refusal::internal(format!(
                "{} is not the node of the device that was attached: it is not touched",
                device.node().display()
            )));
        }
        // The kernel keeps a read-only mark on a device's name, for whatever volume gets the name next.
        filesystem::set_read_only(&device.node(), request.export.read_only).await?;
        if let Access::Mount {
            filesystem: wanted,
            options,
        } = &request.capability.access
        {
            let wish = Wish {
                wanted: *wanted,
                options,
                read_only: request.export.read_only || request.capability.mode.is_reader_only(),
            };
            let made = self.mount_staged(request, volume, &device, &wish).await?;
            state.stage.filesystem = Some(made);
        }
        state.stage.is_complete = true;
        self.states.save(&state)?;
        failpoint::reach("stage-recorded");
        Ok(())
    }

    /// Whether a device that is attached already can be gone on with: it is of this export, it answers, and nobody has
    /// mounted it.
    async fn is_usable(&self, device: &Device, export: &Export) -> Result<bool, Refusal> {
        let Some(number) = device.number() else {
            return Ok(false);
        };
        if !self.attacher(device.kind)?.carries(device, export).await? {
            return Ok(false);
        }
        let is_mounted = filesystem::mounts()?.of_device(number).next().is_some();
        Ok(!is_mounted && filesystem::answers(&device.node()).await)
    }

    /// From an attached device to a filesystem mounted at the staging path.
    async fn mount_staged(
        &self,
        request: &StageRequest,
        volume: &Volume,
        device: &Device,
        wish: &Wish<'_>,
    ) -> Result<Filesystem, Refusal> {
        let node = device.node();
        let mut found = filesystem::look(&node, volume.size_bytes).await?;
        // Asked only where it proves something: what was written to without a signature is refused anyway.
        if found == Found::Nothing && !volume.ever_written {
            found = filesystem::look_closer(&node, volume.size_bytes).await?;
        }
        if let Recorded::Begun { uuid, .. } = &volume.filesystem {
            found = filesystem::look_inside(&node, found, *uuid).await?;
        }
        let decision = decide(
            &volume.filesystem,
            &found,
            volume.ever_written,
            wish.wanted,
            request.default_filesystem,
            wish.read_only,
        );
        let kind = match decision {
            Decision::Use(kind) => kind,
            Decision::Make => {
                let kind = wish.wanted.unwrap_or(request.default_filesystem);
                self.format(request, kind, Uuid::new_v4(), false, &node)
                    .await?;
                kind
            }
            Decision::MakeAgain(kind, uuid) => {
                self.format(request, kind, uuid, true, &node).await?;
                kind
            }
            Decision::Keep(kind, uuid) => {
                self.daemon
                    .end_format(volume.id, uuid)
                    .await
                    .map_err(|refusal| refusal.during("recording the filesystem"))?;
                kind
            }
            Decision::Refuse(problem) => {
                tracing::warn!(volume = %volume.id, %problem, "a volume is neither mounted nor formatted");
                return Err(match volume.filesystem {
                    Recorded::Nothing | Recorded::Begun { .. } => {
                        Refusal::precondition(problem.to_string())
                    }
                    Recorded::Made { .. } => Refusal::internal(problem.to_string()),
                });
            }
        };
        if !wish.read_only {
            filesystem::check(kind, &node).await?;
        }
        failpoint::reach("stage-checked");
        paths::make_directory(&request.staging)
            .map_err(|error| failed("making the staging directory", &request.staging, error))?;
        filesystem::mount(kind, &node, &request.staging, wish.options, wish.read_only).await?;
        failpoint::reach("stage-mounted");
        let mounts = filesystem::mounts()?;
        if mount_of(&mounts, device, &request.staging).is_none() {
            return Err(Refusal::internal(format!(
                "mount said it is done, and {} is not mounted at {}",
                device.name,
                request.staging.display()
            )));
        }
        if !wish.read_only
            && !mount_options::is_read_only(wish.options)
            && let Err(refusal) = filesystem::grow(kind, &node, &request.staging).await
        {
            // The kernel grows no mounted ext4 that ever saw an error, nor for who lacks CAP_SYS_RESOURCE.
            if kind != Filesystem::Ext4 || refusal.class == Class::DeadlineExceeded {
                return Err(refusal);
            }
            tracing::info!(volume = %volume.id, %refusal, "growing while it is not mounted");
            filesystem::unmount(&request.staging, UNMOUNT_LIMIT).await?;
            filesystem::check_and_grow(&node).await?;
            filesystem::mount(kind, &node, &request.staging, wish.options, wish.read_only).await?;
        }
        failpoint::reach("stage-grown");
        Ok(kind)
    }

    /// Makes a filesystem in two steps that the daemon records, so that it can never be mistaken later whether there is
    /// one: announced before the first block is written, confirmed when the last one is durable.
    async fn format(
        &self,
        request: &StageRequest,
        kind: Filesystem,
        uuid: Uuid,
        clear: bool,
        node: &Path,
    ) -> Result<(), Refusal> {
        let id = request.export.volume;
        self.daemon
            .begin_format(id, kind, uuid)
            .await
            .map_err(|refusal| refusal.during("announcing the filesystem"))?;
        failpoint::reach("format-intended");
        if clear {
            filesystem::discard(node).await?;
        }
        tracing::info!(volume = %id, filesystem = %kind, %uuid, "making a filesystem on a volume that was never used");
        // What was discarded reads as zeros too, and yet nothing is built on that.
        filesystem::make(kind, uuid, &request.mkfs_options, node, !clear).await?;
        failpoint::reach("format-made");
        self.daemon
            .end_format(id, uuid)
            .await
            .map_err(|refusal| refusal.during("recording the filesystem"))?;
        failpoint::reach("format-recorded");
        Ok(())
    }
}

/// Whether what the state says is what the system has.
pub(super) fn is_in_place(state: &VolumeState, device: &Device) -> Result<bool, Refusal> {
    match state.stage.capability.access {
        Access::Block => Ok(true),
        Access::Mount { .. } => {
            Ok(mount_of(&filesystem::mounts()?, device, &state.stage.path).is_some())
        }
    }
}

/// Whether a device's filesystem is mounted, or its node bound, anywhere.
fn is_mounted(device: &Device) -> Result<bool, Refusal> {
    let mounts = filesystem::mounts()?;
    let number = device.number();
    Ok(
        number.is_some_and(|number| mounts.of_device(number).next().is_some())
            || mounts.of_node(&device.name).next().is_some(),
    )
}

/// Whether something is mounted at a target. A table that cannot be read counts as yes.
fn is_used(path: &Path) -> bool {
    filesystem::mounts().map_or(true, |mounts| mounts.at(path).is_some())
}

/// Whether a caller takes a refusal of this class for the end of the matter.
pub(super) fn is_final(class: Class) -> bool {
    !matches!(
        class,
        Class::Aborted | Class::Unavailable | Class::DeadlineExceeded | Class::ResourceExhausted
    )
}
