//! What a node has, for callers that know a path or nothing at all.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::Node;
use super::state::VolumeState;
use crate::refusal::Refusal;

/// A volume that was staged here, whole or half way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub volume: Uuid,
    /// Where it was staged.
    pub staging: PathBuf,
    /// Where it was published.
    pub targets: Vec<PathBuf>,
}

impl From<VolumeState> for Held {
    fn from(state: VolumeState) -> Held {
        Held {
            volume: state.export.volume,
            staging: state.stage.path,
            targets: state
                .targets
                .into_iter()
                .map(|target| target.path)
                .collect(),
        }
    }
}

impl Node {
    /// Every volume the node remembers of this run of the kernel.
    pub fn held(&self) -> Result<Vec<Held>, Refusal> {
        let states = self.states.all()?.into_iter();
        Ok(states
            .filter(|state| state.boot_id == self.boot_id)
            .map(Held::from)
            .collect())
    }

    /// One of them.
    pub fn held_volume(&self, volume: Uuid) -> Result<Option<Held>, Refusal> {
        Ok(self.known(volume)?.map(Held::from))
    }

    /// The one that was published at `target`.
    pub fn held_at(&self, target: &Path) -> Result<Option<Held>, Refusal> {
        let mut held = self.held()?.into_iter();
        Ok(held.find(|held| held.targets.iter().any(|path| path == target)))
    }
}
