//! What can be asked of a staged volume: use, health, growth.

use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

use super::given_up::has_given_up;
use super::state::VolumeState;
use super::{Node, filesystem, is_node_of, mount_of};
use crate::attach::Device;
use crate::capability::Access;
use crate::refusal::{Class, Refusal};

/// statvfs(3) reads no device unless the filesystem is in trouble, and then it must not take the caller with it.
const STAT_LIMIT: Duration = Duration::from_secs(10);

/// What a volume's space is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Of a block device: its size.
    Block {
        /// All of it.
        total_bytes: u64,
    },
    /// Of a filesystem.
    Mount {
        /// What it can hold.
        total_bytes: u64,
        /// What an ordinary user may still write.
        available_bytes: u64,
        /// What is taken.
        used_bytes: u64,
        /// Inodes there are.
        total_inodes: u64,
        /// Inodes left.
        available_inodes: u64,
        /// Inodes taken.
        used_inodes: u64,
    },
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// It works, with less than it should.
    Degraded,
    /// It cannot be used now.
    Inaccessible,
    /// Data is gone.
    DataLoss,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthEntry {
    /// How bad it is.
    pub severity: Severity,
    /// One CamelCase word.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

/// All that is wrong; nothing is well.
pub type Health = Vec<HealthEntry>;

impl Node {
    /// What is used of the volume that is staged or published at `path`. [`Class::NotFound`] when it is not there.
    pub async fn usage(&self, volume: Uuid, path: &Path) -> Result<Usage, Refusal> {
        let (state, device) = self.at(volume, path).await?;
        if state.stage.capability.access == Access::Block {
            return Ok(Usage::Block {
                total_bytes: device.size_bytes(),
            });
        }
        let asked = path.to_owned();
        let asking = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&asked));
        let stat = match tokio::time::timeout(STAT_LIMIT, asking).await {
            Ok(Ok(Ok(stat))) => stat,
            Ok(Ok(Err(error))) => {
                return Err(Refusal::internal(format!("{}: {error}", path.display())));
            }
            Ok(Err(error)) => return Err(Refusal::internal(error.to_string())),
            Err(_) => {
                return Err(Refusal::new(
                    Class::DeadlineExceeded,
                    format!("{} does not answer", path.display()),
                ));
            }
        };
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok(Usage::Mount {
            total_bytes: bytes(stat.f_blocks),
            available_bytes: bytes(stat.f_bavail),
            used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
            total_inodes: stat.f_files,
            available_inodes: stat.f_favail,
            used_inodes: stat.f_files.saturating_sub(stat.f_ffree),
        })
    }

    /// Makes device and filesystem as large as the volume is. Returns the size in bytes.
    pub async fn expand(
        &self,
        volume: Uuid,
        path: &Path,
        required_bytes: u64,
    ) -> Result<u64, Refusal> {
        let (state, device) = self.at(volume, path).await?;
        let attacher = self.attacher(device.kind)?;
        if attacher.reconnects() {
            // Requests of a lost connection wait for a new one, growing waits for the requests, and the kernel takes no
            // connection while it waits so. The count is the daemon's: the kernel tells of none.
            let known = self.daemon.volume(volume).await?;
            let (open, whole) = (
                known.connections_of(&self.settings.node_id),
                self.whole_connections(&state, &device)?,
            );
            if open < whole {
                return Err(Refusal::new(
                    Class::Unavailable,
                    format!(
                        "{} has {open} of its {whole} connections to the daemon; it grows when the others are back",
                        device.name
                    ),
                ));
            }
        }
        let size = attacher.grow(&device, &state.export).await?;
        if size < required_bytes {
            // The daemon beside this node hears a moment later of what the controller's daemon did.
            let class = match self.daemon.volume(volume).await?.is_replicated {
                true => Class::Unavailable,
                false => Class::OutOfRange,
            };
            return Err(Refusal::new(
                class,
                format!(
                    "the volume has {size} bytes, and {required_bytes} were asked for: it has to be expanded first"
                ),
            ));
        }
        if let Some(kind) = state.stage.filesystem
            && !state.export.read_only
            && !state.stage.capability.is_mounted_read_only()
        {
            filesystem::grow(kind, &device.node(), &state.stage.path).await?;
        }
        Ok(size)
    }

    /// What is wrong with a volume as it is seen from here. [`Class::NotFound`] when it was given a path and is not there.
    pub async fn health(&self, volume: Uuid, path: Option<&Path>) -> Result<Health, Refusal> {
        let mut health = Health::new();
        if let Some((reason, message)) = self.problem(volume) {
            health.push(HealthEntry {
                severity: Severity::Inaccessible,
                reason,
                message,
            });
        }
        let Some(state) = self.known(volume)? else {
            if health.is_empty() {
                return Err(Refusal::not_found(format!(
                    "volume {volume} is not on this node"
                )));
            }
            return Ok(health);
        };
        let Some(device) = self.device_of(volume).await? else {
            health.push(HealthEntry {
                severity: Severity::Inaccessible,
                reason: "DeviceMissing",
                message: "the volume is not attached any more".to_owned(),
            });
            return Ok(health);
        };
        if let Some(path) = path
            && !is_seen_at(&state, &device, path)?
        {
            return Err(Refusal::not_found(format!(
                "volume {volume} is not at {}",
                path.display()
            )));
        }
        let mounts = filesystem::mounts()?;
        let writable = !state.export.read_only && !state.stage.capability.is_mounted_read_only();
        if writable
            && state.stage.filesystem.is_some()
            && mount_of(&mounts, &device, &state.stage.path).is_some()
            && has_given_up(&mounts, &state.stage.path).await?
        {
            health.push(HealthEntry {
                severity: Severity::Degraded,
                reason: "FilesystemReadOnly",
                message: "the filesystem gave up after an error".to_owned(),
            });
        }
        if !filesystem::answers(&device.node()).await {
            health.push(HealthEntry {
                severity: Severity::Inaccessible,
                reason: "DeviceNotAnswering",
                message: format!("{} cannot be read", device.name),
            });
        }
        Ok(health)
    }

    /// The state and device of a volume that is staged or published at `path`.
    async fn at(&self, volume: Uuid, path: &Path) -> Result<(VolumeState, Device), Refusal> {
        let not_there =
            || Refusal::not_found(format!("volume {volume} is not at {}", path.display()));
        let state = self.known(volume)?.ok_or_else(not_there)?;
        let device = self.device_of(volume).await?.ok_or_else(not_there)?;
        if is_seen_at(&state, &device, path)? {
            Ok((state, device))
        } else {
            Err(not_there())
        }
    }
}

/// Whether the volume is what one sees at `path`.
fn is_seen_at(state: &VolumeState, device: &Device, path: &Path) -> Result<bool, Refusal> {
    Ok(match state.stage.capability.access {
        // A block volume's staging path is empty; the caller may name it all the same.
        Access::Block => is_node_of(device, path) || state.stage.path == path,
        Access::Mount { .. } => mount_of(&filesystem::mounts()?, device, path).is_some(),
    })
}
