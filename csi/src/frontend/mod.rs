//! Orchestrators without a controller of their own: what uses a volume on this machine also takes it from the daemon.
//!
//! Each front end is a node of its own to the daemon (`HOST.docker`, `HOST.flexvolume`), so that a volume never belongs
//! to two of them at a time: neither knows when the other one is done with it.

pub mod docker;
pub mod flexvolume;

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::capability::{Access, AccessMode, Capability, Filesystem};
use crate::controller::parameters;
use crate::controller::{Controller, context_of, unsupported};
use crate::daemon::Volume;
use crate::node::filesystem::mounts;
use crate::node::{Node, PublishRequest, StageRequest};
use crate::paths;
use crate::refusal::{Class, Refusal};
use crate::run::{Arguments, node_id, open_node, the_daemon};

/// A machine that takes, mounts and gives back volumes by itself; cheap to clone.
#[derive(Clone)]
pub struct Host {
    node: Arc<Node>,
    controller: Controller,
    node_id: String,
    staging: PathBuf,
}

/// How a volume is to be mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The file system; `None` leaves it to the volume.
    pub filesystem: Option<Filesystem>,
    /// For mount(8).
    pub options: Vec<String>,
    /// Whether this user may only read.
    pub read_only: bool,
}

impl Host {
    /// Opens what is remembered and brings it in line with the system. `suffix` tells the front end's name as a node.
    pub async fn open(arguments: &Arguments, suffix: &str) -> anyhow::Result<Host> {
        let daemon = the_daemon(arguments, false)?;
        let node_id = node_id(arguments, suffix)?;
        let node = open_node(arguments, &node_id, daemon.clone()).await?;
        let staging = arguments.state_dir.join("staging");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&staging)?;
        let host = Host {
            node,
            controller: Controller::new(daemon, 0),
            node_id,
            staging,
        };
        if let Err(error) = host.settle().await {
            tracing::warn!(%error, "volumes that are not used here any more could not be given back yet");
        }
        Ok(host)
    }

    /// Gives back what was taken and is not held any more: the daemon was away, or the machine restarted. A staging
    /// directory stands for a volume that was taken.
    pub async fn settle(&self) -> Result<(), Refusal> {
        let failed =
            |error: std::io::Error| Refusal::internal(format!("listing the stagings: {error}"));
        for entry in std::fs::read_dir(&self.staging).map_err(failed)?.flatten() {
            let name = entry.file_name();
            let Some(volume) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(_turn) = self.node.turns().begin(&format!("{volume}")) else {
                continue;
            };
            if self.node.held_volume(volume)?.is_none() {
                self.controller
                    .unpublish(volume, Some(&self.node_id))
                    .await?;
                self.forget(volume)?;
            }
        }
        Ok(())
    }

    fn forget(&self, volume: Uuid) -> Result<(), Refusal> {
        let staging = self.staging.join(volume.to_string());
        paths::remove(&staging)
            .map_err(|error| Refusal::internal(format!("removing {}: {error}", staging.display())))
    }

    /// The node's operations.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The volumes' operations.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// What the daemon knows this machine as.
    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// A volume by its name or id, if there is one that is not being deleted.
    pub async fn find(&self, name: &str) -> Result<Option<Volume>, Refusal> {
        let found = self.node.daemon().volume_named(name).await?;
        Ok(found.filter(|volume| !volume.is_deleting))
    }

    /// Takes a volume to this machine and mounts it at `target`. When that fails, the volume is given back, unless it has
    /// another user here.
    pub async fn bring_up(
        &self,
        volume: &Volume,
        target: &Path,
        wish: &Wish,
    ) -> Result<(), Refusal> {
        let brought = self.try_bring_up(volume, target, wish).await;
        if brought.is_err()
            && let Err(error) = self.give_back(volume.id).await
        {
            tracing::warn!(volume = %volume.id, %error, "clearing up after a failed mount failed");
        }
        brought
    }

    async fn try_bring_up(
        &self,
        volume: &Volume,
        target: &Path,
        wish: &Wish,
    ) -> Result<(), Refusal> {
        // Many on this machine write, as containers do: whether two of them may is for those who start them to know.
        let capability = Capability {
            access: Access::Mount {
                filesystem: wish.filesystem,
                options: wish.options.clone(),
            },
            mode: AccessMode::SingleNodeMultiWriter,
        };
        if let Some(mismatch) = unsupported(volume, &capability) {
            return Err(Refusal::invalid(mismatch));
        }
        let (default_filesystem, mkfs_options) = parameters::of_context(&context_of(volume))?;
        // The daemon may have lost its records since the last time.
        self.node
            .daemon()
            .register(&self.node_id, &BTreeMap::new())
            .await?;
        let staging = self.staging.join(volume.id.to_string());
        // What is mounted there already may be a file system that answers nothing but errors.
        if mounts()?.at(&staging).is_none() {
            let making =
                |error| Refusal::internal(format!("making {}: {error}", staging.display()));
            paths::make_directory(&staging)
                .and_then(|()| std::fs::File::open(&self.staging)?.sync_all())
                .map_err(making)?;
        }
        let export = self
            .controller
            .publish(volume.id, &self.node_id, capability.mode, false)
            .await?;
        let stage = StageRequest {
            export,
            staging,
            capability: capability.clone(),
            default_filesystem,
            mkfs_options,
        };
        // First by itself: it sees when the volume was fenced and published anew.
        self.node.stage(&stage).await?;
        self.node
            .publish(&PublishRequest {
                volume: volume.id,
                target: target.to_owned(),
                capability,
                read_only: wish.read_only,
                stage: Some(stage),
            })
            .await
    }

    /// Takes a volume from `target`, and gives it back when that was its last user here.
    pub async fn take_down(&self, volume: Uuid, target: &Path) -> Result<(), Refusal> {
        self.node.unpublish(volume, target).await?;
        self.give_back(volume).await
    }

    /// Unmounts, detaches and gives back a volume that nobody uses here; one that somebody does stays.
    async fn give_back(&self, volume: Uuid) -> Result<(), Refusal> {
        let staging = self.staging.join(volume.to_string());
        if let Some(held) = self.node.held_volume(volume)? {
            // A target that was planned and never bound does not count.
            let mounts = mounts()?;
            if held.targets.iter().any(|path| mounts.at(path).is_some()) {
                return Ok(());
            }
        }
        self.node.unstage(volume, &staging).await?;
        // Fencing what no device of ours uses any more.
        match self.controller.unpublish(volume, Some(&self.node_id)).await {
            Ok(()) => self.forget(volume),
            Err(refusal)
                if matches!(refusal.class, Class::Unavailable | Class::DeadlineExceeded) =>
            {
                tracing::warn!(volume = %volume, %refusal, "the volume is given back when the daemon answers");
                Ok(())
            }
            Err(refusal) => Err(refusal),
        }
    }
}
