//! What the node plugin knows of the volumes it works on: a file a volume, written before every step that leaves a trace
//! in the system, so that whatever kills the plugin, the next one knows what to look for.
//!
//! The files are a memory, not the truth. What is attached and mounted is always asked of the kernel.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::attach::{Device, Export};
use crate::capability::{AccessMode, Capability, Filesystem};
use crate::refusal::Refusal;
use crate::stored::{self, UNFINISHED};

/// The form of the files. A file of another form is not read.
const VERSION: u32 = 1;

/// What is known of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    version: u32,
    /// The run of the kernel in which it was written: nothing survives a restart of the machine.
    pub boot_id: String,
    /// What was published to this node. Has a secret, which is why the files are for root alone.
    pub export: Export,
    /// The volume's client generation before it was attached. When the volume has a larger one, writes that the kernel takes
    /// for done may be gone.
    #[serde(default)]
    pub client_generation: u64,
    /// Connections of its device; 0 when an earlier version of this program wrote the file.
    #[serde(default)]
    pub connections: u32,
    /// The device it was last attached as.
    pub device: Option<Device>,
    /// Where it is, or is being, staged.
    pub stage: Stage,
    /// Where it is, or is being, published.
    pub targets: Vec<Target>,
}

/// A staging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The staging path.
    pub path: PathBuf,
    /// What the caller asked for.
    pub capability: Capability,
    /// What is mounted there; `None` for a block volume, or before it is known.
    pub filesystem: Option<Filesystem>,
    /// Set when every step was done.
    pub is_complete: bool,
}

/// A publishing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The target path.
    pub path: PathBuf,
    /// Whether the workload may only read.
    pub read_only: bool,
    /// What the caller asked for.
    pub mode: AccessMode,
}

impl VolumeState {
    /// A volume that is about to be staged.
    pub fn new(
        boot_id: String,
        export: Export,
        client_generation: u64,
        stage: Stage,
    ) -> VolumeState {
        VolumeState {
            version: VERSION,
            boot_id,
            export,
            client_generation,
            connections: 0,
            device: None,
            stage,
            targets: Vec::new(),
        }
    }
}

/// The directory of the files.
#[derive(Clone, Debug)]
pub struct States {
    directory: PathBuf,
}

impl States {
    /// Opens `directory`, making it when it is not there, and finishes what a crash left of an unfinished write.
    pub fn open(directory: &Path) -> Result<States, Refusal> {
        let failed = |error: io::Error| {
            Refusal::internal(format!(
                "the state directory {} cannot be used: {error}",
                directory.display()
            ))
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
        for entry in fs::read_dir(directory).map_err(failed)?.flatten() {
            if entry
                .path()
                .extension()
                .is_some_and(|ending| ending == UNFINISHED)
            {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(States {
            directory: directory.to_owned(),
        })
    }

    fn path(&self, volume: Uuid) -> PathBuf {
        self.directory.join(format!("{volume}.json"))
    }

    /// What is known of a volume. A file that makes no sense is said and taken for none: the kernel's tables have what is
    /// needed to go on.
    pub fn load(&self, volume: Uuid) -> Result<Option<VolumeState>, Refusal> {
        let path = self.path(volume);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Refusal::internal(format!(
                    "{} cannot be read: {error}",
                    path.display()
                )));
            }
        };
        match serde_json::from_slice::<VolumeState>(&bytes) {
            Ok(state) if state.version == VERSION && state.export.volume == volume => {
                Ok(Some(state))
            }
            Ok(_) | Err(_) => {
                tracing::warn!(path = %path.display(), "a state file that makes no sense is passed over");
                Ok(None)
            }
        }
    }

    /// Writes what is known. It is durable when this returns.
    pub fn save(&self, state: &VolumeState) -> Result<(), Refusal> {
        let path = self.path(state.export.volume);
        stored::replace(&path, state).map_err(|error| {
            Refusal::internal(format!("{} cannot be written: {error}", path.display()))
        })
    }

    /// Forgets a volume; one that is not known is fine.
    pub fn remove(&self, volume: Uuid) -> Result<(), Refusal> {
        let path = self.path(volume);
        stored::remove(&path).map_err(|error| {
            Refusal::internal(format!("{} cannot be removed: {error}", path.display()))
        })
    }

    /// Every volume something is known of.
    pub fn all(&self) -> Result<Vec<VolumeState>, Refusal> {
        let entries = fs::read_dir(&self.directory)
            .map_err(|error| Refusal::internal(format!("{}: {error}", self.directory.display())))?;
        let mut states = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let is_state = path.extension().is_some_and(|ending| ending == "json");
            let volume = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok());
            if let (true, Some(volume)) = (is_state, volume)
                && let Some(state) = self.load(volume)?
            {
                states.push(state);
            }
        }
        Ok(states)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability::Access;

    fn state(volume: Uuid) -> VolumeState {
        let export = Export {
            volume,
            name: format!("{volume}@secret"),
            servers: vec!["unix:/run/nbd.sock".parse().expect("an address")],
            read_only: false,
            epoch: 4,
        };
        let stage = Stage {
            path: "/staging".into(),
            capability: Capability {
                access: Access::Mount {
                    filesystem: Some(Filesystem::Xfs),
                    options: vec!["noatime".into()],
                },
                mode: AccessMode::SingleNodeWriter,
            },
            filesystem: None,
            is_complete: false,
        };
        VolumeState::new("boot".into(), export, 0, stage)
    }

    #[test]
    fn what_is_written_is_read_and_nonsense_is_not() {
        let scratch = tempfile::tempdir().expect("a directory");
        let states = States::open(scratch.path()).expect("opened");
        let volume = Uuid::from_u128(5);
        assert_eq!(states.load(volume), Ok(None));
        let written = state(volume);
        states.save(&written).expect("saved");
        assert_eq!(states.load(volume), Ok(Some(written.clone())));
        let path = scratch.path().join(format!("{volume}.json"));
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "it has a secret");
        // A file under another volume's name, one of another form, and one cut short.
        let other = Uuid::from_u128(6);
        fs::copy(&path, scratch.path().join(format!("{other}.json"))).expect("copied");
        assert_eq!(states.load(other), Ok(None));
        assert_eq!(states.all().expect("listed"), vec![written]);
        let text = fs::read_to_string(&path).expect("text");
        fs::write(&path, text.replace("\"version\":1", "\"version\":9")).expect("written");
        assert_eq!(states.load(volume), Ok(None));
        fs::write(&path, &text[..text.len() / 2]).expect("written");
        assert_eq!(states.load(volume), Ok(None));
        fs::write(path.with_extension("new"), b"half").expect("written");
        States::open(scratch.path()).expect("opened again");
        assert!(!path.with_extension("new").exists());
        states.remove(volume).expect("removed");
        states.remove(volume).expect("gone already");
        assert_eq!(states.load(volume), Ok(None));
    }
}
