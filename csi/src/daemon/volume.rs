//! What the daemon tells, checked and in the driver's types.

use std::collections::BTreeMap;

use ashlar_proto::admin;
use uuid::Uuid;

use crate::capability::AccessMode;
use crate::node::format::Recorded;
use crate::refusal::Refusal;

/// A volume as the daemon has it.
#[derive(Clone, Debug)]
pub struct Volume {
    /// What it is called everywhere in the interface.
    pub id: Uuid,
    /// Its name in the daemon.
    pub name: String,
    /// A multiple of 4096.
    pub size_bytes: u64,
    /// False only when the store is certain that nothing was ever written.
    pub ever_written: bool,
    /// Its filesystem.
    pub filesystem: Recorded,
    /// To whom it is published.
    pub publications: Vec<Publication>,
    /// What this driver keeps with it.
    pub annotations: BTreeMap<String, String>,
    /// Bounds on what its clients may ask.
    pub limits: Limits,
    /// True when it is being deleted.
    pub is_deleting: bool,
    /// Raised whenever answered writes may be gone: a device attached under a smaller number must not go on.
    pub client_generation: u64,
    /// Why clients cannot reach it at the daemon that was asked.
    pub not_served: Option<String>,
    /// Whether it has copies on the daemons of a cluster; then any of them can serve it, one at a time.
    pub is_replicated: bool,
    /// UUID of the daemon that serves it, or served it last. Empty when none ever did.
    pub head: String,
}

impl Volume {
    /// Open connections of what is published to `node`; 0 when nothing is.
    pub fn connections_of(&self, node: &str) -> u32 {
        let mut publications = self.publications.iter();
        let of_node = publications.find(|publication| publication.node_id == node);
        of_node.map_or(0, |publication| publication.connections)
    }
}

/// A volume given to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// To whom.
    pub node_id: String,
    /// Whether its writes are refused.
    pub read_only: bool,
    /// Its open connections.
    pub connections: u32,
}

/// Bounds on a volume; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second.
    pub iops: u64,
    /// Payload a second.
    pub bytes_per_second: u64,
}

/// What a new volume shall be.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its name in the daemon.
    pub name: String,
    /// Rounded up by the daemon to a multiple of 4096.
    pub size_bytes: u64,
    /// Acknowledge only what is durable.
    pub write_through: bool,
    /// Bounds.
    pub limits: Limits,
    /// What this driver keeps with it.
    pub annotations: BTreeMap<String, String>,
    /// Copies of each chunk; 0 leaves it to the daemon.
    pub replicas: u32,
    /// How many of them must be in sync for a write to be answered; 0 leaves it to the daemon.
    pub min_in_sync: u32,
    /// Zones whose nodes may hold copies; empty is all.
    pub zones: Vec<String>,
}

/// A node that volumes can be published to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// As the node plugin called itself.
    pub id: String,
    /// Where it is.
    pub topology: BTreeMap<String, String>,
    /// Volumes published to it.
    pub volumes: usize,
}

/// Space for new volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What may still be provisioned.
    pub provisionable_bytes: u64,
    /// The largest volume.
    pub volume_max_bytes: u64,
}

/// How the daemon does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The daemon's UUID.
    pub node: String,
    /// Whether it serves.
    pub is_ready: bool,
    /// What needs a person.
    pub warnings: Vec<String>,
}

impl TryFrom<admin::Volume> for Volume {
    type Error = Refusal;

    fn try_from(volume: admin::Volume) -> Result<Volume, Refusal> {
        let is_deleting = volume.state() == admin::VolumeState::Deleting;
        let wrong = |what: &str| Refusal::internal(format!("the daemon sent a volume with {what}"));
        let filesystem = match volume.filesystem {
            None => Recorded::Nothing,
            Some(made) => {
                let uuid = made.uuid.parse().map_err(|_| wrong("an odd filesystem"))?;
                match made.state() {
                    admin::FilesystemState::Formatting => Recorded::Begun {
                        filesystem: made.r#type,
                        uuid,
                    },
                    // An unknown state is the one that allows least.
                    admin::FilesystemState::Formatted | admin::FilesystemState::Unspecified => {
                        Recorded::Made {
                            filesystem: made.r#type,
                            uuid,
                        }
                    }
                }
            }
        };
        Ok(Volume {
            id: volume.id.parse().map_err(|_| wrong("an odd id"))?,
            name: volume.name,
            size_bytes: volume.size_bytes,
            ever_written: volume.ever_written,
            filesystem,
            publications: volume
                .publications
                .into_iter()
                .map(|each| Publication {
                    node_id: each.node_id,
                    read_only: each.read_only,
                    connections: each.connections,
                })
                .collect(),
            annotations: volume.annotations.into_iter().collect(),
            limits: volume.limits.map(Limits::from).unwrap_or_default(),
            is_deleting,
            client_generation: volume.client_generation,
            not_served: Some(volume.not_served_reason).filter(|reason| !reason.is_empty()),
            is_replicated: !volume.replica_sets.is_empty(),
            head: volume.head_node_id,
        })
    }
}

impl From<admin::VolumeLimits> for Limits {
    fn from(limits: admin::VolumeLimits) -> Limits {
        Limits {
            iops: limits.iops,
            bytes_per_second: limits.bytes_per_second,
        }
    }
}

impl From<NewVolume> for admin::CreateVolumeRequest {
    fn from(new: NewVolume) -> admin::CreateVolumeRequest {
        admin::CreateVolumeRequest {
            name: new.name,
            size_bytes: new.size_bytes,
            write_through: new.write_through,
            limits: Some(admin::VolumeLimits {
                iops: new.limits.iops,
                bytes_per_second: new.limits.bytes_per_second,
            }),
            annotations: new.annotations.into_iter().collect(),
            replicas: new.replicas,
            min_in_sync: new.min_in_sync,
            zones: new.zones,
            ..admin::CreateVolumeRequest::default()
        }
    }
}

impl From<admin::ClientNode> for NodeInfo {
    fn from(node: admin::ClientNode) -> NodeInfo {
        NodeInfo {
            id: node.node_id,
            topology: node.topology.into_iter().collect(),
            volumes: node.volume_ids.len(),
        }
    }
}

impl From<admin::GetCapacityResponse> for Space {
    fn from(answer: admin::GetCapacityResponse) -> Space {
        Space {
            provisionable_bytes: answer.provisionable_bytes,
            volume_max_bytes: answer.volume_max_bytes,
        }
    }
}

impl From<admin::GetStatusResponse> for Summary {
    fn from(answer: admin::GetStatusResponse) -> Summary {
        Summary {
            node: answer.node_id.clone(),
            is_ready: answer.state() == admin::DaemonState::Ready,
            warnings: answer.warnings,
        }
    }
}

/// The daemon's name for a mode.
pub(super) fn access_mode(mode: AccessMode) -> admin::AccessMode {
    match mode {
        AccessMode::SingleNodeWriter => admin::AccessMode::SingleNodeWriter,
        AccessMode::SingleNodeReaderOnly => admin::AccessMode::SingleNodeReaderOnly,
        AccessMode::MultiNodeReaderOnly => admin::AccessMode::MultiNodeReaderOnly,
        AccessMode::SingleNodeSingleWriter => admin::AccessMode::SingleNodeSingleWriter,
        AccessMode::SingleNodeMultiWriter => admin::AccessMode::SingleNodeMultiWriter,
    }
}
