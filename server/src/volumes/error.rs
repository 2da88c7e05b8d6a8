//! Why an operation on a volume failed.

use ashlar_core::placement::TooFewNodes;
use ashlar_core::records::{
    AnnotationsError, AnnotationsMoved, COPIES_MAX, ClaimError, ClientNodeError, ClientNodeId,
    ConfigureError, CreateError, DeleteError, FilesystemTypeError, FormatError, LimitsError,
    NameError, PublishError, RenameError, ResizeError, ServedElsewhere, SizeError, UnpublishError,
    Zones, ZonesError,
};
use ashlar_core::units::NodeId;
use thiserror::Error;

use super::HostError;
use crate::meta::MetadataError;

/// Every way an operation of the volume service can end but well.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VolumeError {
    /// No such volume.
    #[error("there is no volume {reference}; `ashlar volume list` shows those there are")]
    NotFound {
        /// The name or id that was asked for.
        reference: String,
    },
    /// A name that cannot be.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A size that cannot be.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A creation was refused.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A claim was refused.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A renaming was refused.
    #[error(transparent)]
    Rename(#[from] RenameError),
    /// A resizing was refused.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// A change of settings was refused.
    #[error(transparent)]
    Configure(ConfigureError),
    /// A deletion was refused.
    #[error(transparent)]
    Delete(DeleteError),
    /// A publication was refused.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The making of a filesystem was refused.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A type of filesystem that cannot be.
    #[error(transparent)]
    FilesystemType(#[from] FilesystemTypeError),
    /// Annotations that cannot be.
    #[error(transparent)]
    Annotations(#[from] AnnotationsError),
    /// Annotations that were changed meanwhile.
    #[error(transparent)]
    AnnotationsMoved(#[from] AnnotationsMoved),
    /// Limits that cannot be.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// A client node that cannot be.
    #[error(transparent)]
    ClientNode(#[from] ClientNodeError),
    /// The metadata store failed.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A record breaks its own rules.
    #[error(
        "the record of volume {reference} is damaged: {problem}; restore the metadata from a backup"
    )]
    BadRecord {
        /// The volume.
        reference: String,
        /// What is wrong.
        problem: String,
    },
    /// Others kept changing the same records.
    #[error("the records changed too often meanwhile; try again")]
    Contended,
    /// The data plane refused.
    #[error("volume {reference}: {source}")]
    Host {
        /// The volume.
        reference: String,
        /// What it said.
        source: HostError,
    },
    /// The change is recorded, and the volume is not served.
    #[error("volume {reference} is recorded but not served: {reason}")]
    NotServed {
        /// The volume.
        reference: String,
        /// Why.
        reason: String,
    },
    /// The volume is gone from sight; its space is not back yet.
    #[error(
        "volume {reference} is deleted, but its space is not freed yet: {reason}; the next start of ashlard tries again"
    )]
    NotFreed {
        /// The volume.
        reference: String,
        /// Why.
        reason: String,
    },
    /// Copies on other nodes, and there are none.
    #[error(
        "{replicas} copies were asked for and this daemon is on its own; `ashlar cluster init` makes it the first of a cluster"
    )]
    NoCluster {
        /// Copies asked for.
        replicas: u32,
    },
    /// Not enough nodes for the copies.
    #[error(transparent)]
    TooFewNodes(#[from] TooFewNodes),
    /// The same of the zones that the volume is confined to.
    #[error("{source}, in {zones}; `ashlar node list` shows which zone each is in")]
    TooFewInZones {
        /// The zones, by name.
        zones: Zones,
        /// How few.
        source: TooFewNodes,
    },
    /// Zones that cannot be.
    #[error(transparent)]
    Zones(#[from] ZonesError),
    /// Another node's head has it.
    #[error(
        "volume {reference} is served by node {}; ask that node, or take the volume over with `ashlar volume open {reference}` first",
        node.0
    )]
    Elsewhere {
        /// The volume.
        reference: String,
        /// Where it is served.
        node: NodeId,
    },
    /// One copy, which no other node can serve.
    #[error(
        "volume {reference} has its one copy on node {}{}; ask that node",
        node.0, at(address)
    )]
    OneCopyElsewhere {
        /// The volume.
        reference: String,
        /// Whose store it is in.
        node: NodeId,
        /// Where that node can be asked, if it is known.
        address: Option<String>,
    },
    /// More than a set has places for, one being kept for the copy that replaces another.
    #[error("{asked} copies were asked for, and a volume has at most {COPIES_MAX}")]
    TooManyCopies {
        /// How many.
        asked: u32,
    },
    /// Asked for in the name of a client node that does not have it.
    #[error("volume {reference} is not published to node {node}, or not any more")]
    NotPublished {
        /// The volume.
        reference: String,
        /// Who asked.
        node: ClientNodeId,
    },
    /// The daemon is draining.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// Where a node is, after its id.
fn at(address: &Option<String>) -> String {
    address
        .as_ref()
        .map_or_else(String::new, |address| format!(" ({address})"))
}

impl From<ServedElsewhere> for VolumeError {
    fn from(ServedElsewhere { name, node }: ServedElsewhere) -> VolumeError {
        VolumeError::Elsewhere {
            reference: name.to_string(),
            node,
        }
    }
}

impl From<UnpublishError> for VolumeError {
    fn from(error: UnpublishError) -> VolumeError {
        match error {
            UnpublishError::Claim(error) => error.into(),
            UnpublishError::Elsewhere(elsewhere) => elsewhere.into(),
        }
    }
}

impl From<ConfigureError> for VolumeError {
    fn from(error: ConfigureError) -> VolumeError {
        match error {
            ConfigureError::Elsewhere(elsewhere) => elsewhere.into(),
            refused => VolumeError::Configure(refused),
        }
    }
}

impl From<DeleteError> for VolumeError {
    fn from(error: DeleteError) -> VolumeError {
        match error {
            DeleteError::Elsewhere(elsewhere) => elsewhere.into(),
            refused => VolumeError::Delete(refused),
        }
    }
}
