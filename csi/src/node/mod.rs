//! What happens on a node: a volume is attached and mounted once (staged), given to workloads (published), and all of it
//! undone.
//!
//! These operations know nothing of any orchestrator's protocol; the CSI node service is one caller of them. Each is
//! idempotent: called again with the same arguments, after success, failure or the death of the program, it ends in
//! the same state. The caller sees to it that one operation a volume runs at a time ([`Node::turns`]).

pub mod filesystem;
pub mod format;
mod given_up;
mod guard;
mod inspect;
mod inventory;
mod publish;
mod reconcile;
mod stage;
pub mod state;
mod unstage;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::attach::{Attach, AttachError, Device, DeviceKind, Export};
use crate::capability::{Capability, Filesystem};
use crate::daemon::Daemon;
use crate::mountinfo::{Mount, Mounts};
use crate::operations::Operations;
use crate::paths::Roots;
use crate::refusal::{Class, Refusal};
use crate::sysfs;
use state::{States, VolumeState};

pub use inspect::{Health, HealthEntry, Severity, Usage};
pub use inventory::Held;
pub use publish::PublishRequest;
pub use reconcile::keep_connected;

/// How an unmount is waited for before the device is failed under it.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);
/// Unmounting what hangs on a failed device: nothing can be waited for any more.
const UNMOUNT_FAILED_LIMIT: Duration = Duration::from_secs(20);

/// How a node works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the daemon knows this node as.
    pub node_id: String,
    /// Where the state files are.
    pub state_directory: PathBuf,
    /// Below which directories callers may name paths.
    pub roots: Vec<PathBuf>,
    /// The way in which volumes are attached from now on; what was attached in another way is still handled.
    pub preferred: DeviceKind,
    /// How long an unstage waits for a server that does not answer before it gives up what was not yet written.
    pub patience: Duration,
}

/// What staging needs to know.
#[derive(Clone, Debug)]
pub struct StageRequest {
    /// What was published to this node.
    pub export: Export,
    /// Checked by [`Node::roots`].
    pub staging: PathBuf,
    /// How the volume will be used.
    pub capability: Capability,
    /// What to make where the capability leaves it open.
    pub default_filesystem: Filesystem,
    /// More arguments for mkfs, checked by [`crate::controller::parameters`].
    pub mkfs_options: Vec<String>,
}

/// The node operations.
pub struct Node {
    settings: Settings,
    daemon: Daemon,
    attachers: Vec<Arc<dyn Attach>>,
    states: States,
    roots: Roots,
    turns: Operations,
    boot_id: String,
    /// What was found wrong with volumes that are not staged, for whoever asks after their health.
    problems: Mutex<HashMap<Uuid, Problem>>,
}

impl Node {
    /// Opens the state directory. `attachers` are all ways of attaching there are.
    pub fn new(
        settings: Settings,
        daemon: Daemon,
        attachers: Vec<Arc<dyn Attach>>,
    ) -> Result<Node, Refusal> {
        let states = States::open(&settings.state_directory)?;
        let boot_id =
            sysfs::boot_id().map_err(|error| Refusal::internal(format!("no boot id: {error}")))?;
        Ok(Node {
            roots: Roots::new(settings.roots.clone()),
            settings,
            daemon,
            attachers,
            states,
            turns: Operations::default(),
            boot_id,
            problems: Mutex::default(),
        })
    }

    /// Whose turn it is with which volume.
    pub fn turns(&self) -> &Operations {
        &self.turns
    }

    /// Where callers may name paths.
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// The daemon the node asks.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// What is known of a volume in this run of the kernel.
    fn known(&self, volume: Uuid) -> Result<Option<VolumeState>, Refusal> {
        let state = self.states.load(volume)?;
        Ok(state.filter(|state| state.boot_id == self.boot_id))
    }

    fn attacher(&self, kind: DeviceKind) -> Result<&dyn Attach, Refusal> {
        self.attachers
            .iter()
            .find(|attacher| attacher.kind() == kind)
            .map(|attacher| &**attacher)
            .ok_or_else(|| Refusal::internal(format!("no way to attach {kind:?} devices here")))
    }

    /// The device that carries a volume now, whichever way it was attached.
    async fn device_of(&self, volume: Uuid) -> Result<Option<Device>, AttachError> {
        for attacher in &self.attachers {
            if let Some(device) = attacher.find(volume).await? {
                return Ok(Some(device));
            }
        }
        Ok(None)
    }

    /// How many connections the device of a volume has when none is missing.
    fn whole_connections(&self, state: &VolumeState, device: &Device) -> Result<u32, Refusal> {
        match state.connections {
            // Of an earlier version, which gave every device as many as were set.
            0 => Ok(self.attacher(device.kind)?.connections()),
            known => Ok(known),
        }
    }

    fn set_problem(&self, volume: Uuid, problem: Option<Problem>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) => problems.insert(volume, problem),
            None => problems.remove(&volume),
        };
    }

    fn problem(&self, volume: Uuid) -> Option<Problem> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        problems.get(&volume).cloned()
    }
}

/// What is wrong with a volume: a reason that programs know, and a sentence.
type Problem = (&'static str, String);

/// The mount of `device` at `point`, if that is what one sees there.
fn mount_of<'a>(mounts: &'a Mounts, device: &Device, point: &Path) -> Option<&'a Mount> {
    let number = device.number()?;
    mounts.at(point).filter(|mount| mount.device == number)
}

/// Whether `point` is the node of `device`, bound there.
fn is_node_of(device: &Device, point: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    std::fs::symlink_metadata(point).is_ok_and(|found| {
        let number = found.rdev();
        found.file_type().is_block_device()
            && device.number() == Some((rustix::fs::major(number), rustix::fs::minor(number)))
    })
}

/// Refuses to unmount what no device of ours is under: a caller's mistake must not take somebody else's mount away.
fn is_ours(mounts: &Mounts, point: &Path) -> Result<bool, Refusal> {
    let Some(mount) = mounts.at(point) else {
        return Ok(false);
    };
    let ours = |name: &str| {
        let name = name.rsplit('/').next().unwrap_or_default();
        name.starts_with("nbd") || name.starts_with("loop")
    };
    // A bound device node shows as a part of devtmpfs, named after the device.
    if ours(&mount.source.to_string_lossy()) || ours(&mount.root.to_string_lossy()) {
        return Ok(true);
    }
    Err(Refusal::precondition(format!(
        "{} is a mount of {}, which no volume of this driver is; it is left alone",
        point.display(),
        mount.kind
    )))
}

/// An error of the system, in the words of a refusal.
fn failed(what: &str, path: &Path, error: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        Class::Internal,
        format!("{what} {}: {error}", path.display()),
    )
}
