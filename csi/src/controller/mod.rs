//! What an orchestrator's volume is in the daemon's terms: names, parameters, sizes, pages.

pub mod naming;
pub mod parameters;
mod provision;
pub mod sizing;

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::attach::Export;
use crate::capability::{AccessMode, Capability};
use crate::daemon::{Daemon, Deletion, Space, Volume};
use crate::operations::Operations;
use crate::refusal::{Class, Refusal};

pub use provision::{CreateRequest, Created, NAME_KEY, Place, context_of, is_within, parameter};

/// The controller's operations; cheap to clone.
#[derive(Clone)]
pub struct Controller {
    daemon: Daemon,
    turns: Operations,
    max_volumes: u32,
}

impl Controller {
    /// Over one daemon. A node gets at most `max_volumes`; 0 is no bound.
    pub fn new(daemon: Daemon, max_volumes: u32) -> Controller {
        Controller {
            daemon,
            turns: Operations::default(),
            max_volumes,
        }
    }

    /// Whose turn it is with which volume.
    pub fn turns(&self) -> &Operations {
        &self.turns
    }

    /// The daemon it asks.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// A volume that is not being deleted.
    pub async fn volume(&self, id: Uuid) -> Result<Volume, Refusal> {
        let volume = self.daemon.volume(id).await?;
        if volume.is_deleting {
            return Err(Refusal::not_found(format!("volume {id} is being deleted")));
        }
        Ok(volume)
    }

    /// Gives a volume to a node. OK with the same answer when it has it on the same terms.
    pub async fn publish(
        &self,
        id: Uuid,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Export, Refusal> {
        // Which of the two is missing decides what the caller does; the daemon says NOT_FOUND for both.
        let volume = self.volume(id).await?;
        let nodes = self.daemon.nodes().await?;
        let Some(known) = nodes.iter().find(|known| known.id == node) else {
            return Err(Refusal::not_found(format!("there is no node {node}")));
        };
        let has_it = volume.publications.iter().any(|one| one.node_id == node);
        // Two calls at once may both find room for the last one: the bound is for the scheduler's sake, and one more
        // harms nothing.
        if self.max_volumes != 0 && !has_it && known.volumes >= self.max_volumes as usize {
            return Err(Refusal::new(
                Class::ResourceExhausted,
                format!(
                    "node {node} has {} volumes, as many as it takes",
                    known.volumes
                ),
            ));
        }
        if let Some(other) = volume
            .publications
            .iter()
            .find(|other| other.node_id != node)
            && (volume.is_replicated || !(mode.is_multi_node() && other.read_only))
        {
            return Err(Refusal::precondition(format!(
                "volume {id} is published to node {}",
                other.node_id
            )));
        }
        self.daemon.publish(id, node, mode, read_only).await
    }

    /// Takes a volume from a node, or from all, and fences it. What is not there is not published.
    pub async fn unpublish(&self, id: Uuid, node: Option<&str>) -> Result<(), Refusal> {
        match self.daemon.unpublish(id, node).await {
            Err(refusal) if refusal.class == Class::NotFound => Ok(()),
            done => done,
        }
    }

    /// Makes a volume as large as the range says; one that is large enough stays. Returns its size in bytes.
    pub async fn expand(&self, id: Uuid, range: sizing::Range) -> Result<u64, Refusal> {
        let volume = self.volume(id).await?;
        let wanted = sizing::grown(volume.size_bytes, range)?;
        if wanted == volume.size_bytes {
            return Ok(wanted);
        }
        let space = self.daemon.space(0, &[]).await?;
        if wanted > space.volume_max_bytes {
            return Err(Refusal::new(
                Class::OutOfRange,
                format!("a volume has at most {} bytes", space.volume_max_bytes),
            ));
        }
        Ok(self.daemon.resize(id, wanted).await?.size_bytes)
    }

    /// Changes the mutable parameters of a volume; the others stay.
    pub async fn modify(&self, id: Uuid, given: &BTreeMap<String, String>) -> Result<(), Refusal> {
        let changes = parameters::Mutable::parse(given)?;
        self.volume(id).await?;
        if changes != parameters::Mutable::default() {
            self.daemon
                .set_limits(id, changes.iops, changes.bytes_per_second)
                .await?;
        }
        Ok(())
    }

    /// What new volumes with these parameters may take.
    pub async fn space(&self, parameters: &parameters::Parameters) -> Result<Space, Refusal> {
        let replicas = parameters.replicas.unwrap_or(0);
        let space = self.daemon.space(replicas, &parameters.zones).await;
        space.map_err(|refusal| {
            if refusal.class == Class::FailedPrecondition && !parameters.zones.is_empty() {
                // A daemon on its own has no zones; the class is what has to change.
                return Refusal::invalid(format!("{}: {refusal}", parameters::ZONES));
            }
            refusal
        })
    }

    /// Deletes a volume; one that is not there is fine. Refused while it is published.
    pub async fn delete(&self, id: Uuid) -> Result<(), Refusal> {
        let volume = match self.daemon.volume(id).await {
            Err(refusal) if refusal.class == Class::NotFound => return Ok(()),
            found => found?,
        };
        if let Some(publication) = volume.publications.first() {
            return Err(Refusal::precondition(format!(
                "volume {id} is published to node {}",
                publication.node_id
            )));
        }
        if let Deletion::NodeNotAsked(_) = self.daemon.delete(id).await? {
            // That node may be gone for ever, and nobody was given the volume there.
            self.daemon.take_over(id).await?;
            if let Deletion::NodeNotAsked(refusal) = self.daemon.delete(id).await? {
                return Err(refusal);
            }
        }
        Ok(())
    }
}

/// Why a volume cannot be used in a way; `None` when it can.
pub fn unsupported(volume: &Volume, capability: &Capability) -> Option<String> {
    use crate::capability::Access;
    use crate::node::format::Recorded;
    if volume.is_replicated && capability.mode.is_multi_node() {
        return Some(
            "a volume with copies is served beside the node that uses it, so one node uses it at a time"
                .to_owned(),
        );
    }
    let Access::Mount {
        filesystem: Some(wanted),
        ..
    } = &capability.access
    else {
        return None;
    };
    if volume.size_bytes < wanted.minimum_bytes() {
        return Some(format!(
            "{wanted} needs {} bytes and the volume has {}",
            wanted.minimum_bytes(),
            volume.size_bytes
        ));
    }
    match &volume.filesystem {
        Recorded::Made { filesystem, .. } if filesystem != wanted.name() => {
            Some(format!("the volume has {filesystem}"))
        }
        _ => None,
    }
}
