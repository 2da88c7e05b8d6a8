//! Volumes given to client nodes, and taken back.
//!
//! A published volume is opened by its publications' export names alone. A publication ends only by [`unpublish`],
//! which raises the epoch: whatever its node still sends belongs to the past.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::change::{ClaimError, ServedElsewhere, check_decides, claim, rewrite};
use super::{
    ClientNodeId, ClientNodeRecord, HeadClaim, Transaction, Versioned, VolumeName, VolumeRecord,
    VolumeState, keys,
};
use crate::nbd::session::Admitted;
use crate::units::{Epoch, ExportToken, VolumeId};

/// Most nodes a volume is published to: enough for any fleet of readers that one head serves, and a record of them
/// stays far below the metadata store's bound.
pub const PUBLICATIONS_MAX: usize = 128;

/// How a volume is used where it is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessMode {
    /// Read and written on one node.
    SingleNodeWriter,
    /// Read on one node.
    SingleNodeReader,
    /// Read on any number of nodes, written on none.
    MultiNodeReader,
    /// Read and written by one user on one node.
    SingleNodeSingleWriter,
    /// Read and written by several users on one node.
    SingleNodeMultiWriter,
}

impl AccessMode {
    /// Never writes.
    pub fn only_reads(self) -> bool {
        matches!(
            self,
            AccessMode::SingleNodeReader | AccessMode::MultiNodeReader
        )
    }
}

/// One client node's right to open a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publication {
    /// Whose it is.
    pub node: ClientNodeId,
    /// How it is used.
    pub mode: AccessMode,
    /// Changes are refused. True for every mode that only reads.
    pub read_only: bool,
    /// The volume's epoch when it was published.
    pub epoch: Epoch,
    /// Milliseconds since 1970-01-01 UTC.
    pub published_at_unix_ms: u64,
    /// The secret half of its export name.
    pub token: ExportToken,
}

impl Publication {
    /// The name the volume is opened by.
    pub fn export_name(&self, volume: VolumeId) -> String {
        format!("{}@{}", volume.0, self.token.0.simple())
    }
}

/// Takes an export name of a published volume apart. `None`: it is something else.
pub fn parse_export_name(name: &str) -> Option<(VolumeId, ExportToken)> {
    let (volume, token) = name.split_once('@')?;
    let volume = uuid::Uuid::try_parse(volume).ok()?;
    let token = uuid::Uuid::try_parse(token).ok()?;
    Some((VolumeId(volume), ExportToken(token)))
}

/// A publication to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPublication {
    /// To whom.
    pub node: ClientNodeId,
    /// How it is used.
    pub mode: AccessMode,
    /// Asked for; a mode that only reads implies it.
    pub read_only: bool,
    /// Drawn afresh.
    pub token: ExportToken,
    /// Milliseconds since 1970-01-01 UTC.
    pub published_at_unix_ms: u64,
}

/// Why a volume is not published.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PublishError {
    /// Nobody registered the node.
    #[error("client node {node} is not registered; its node plugin does that when it starts")]
    UnknownNode {
        /// Which.
        node: ClientNodeId,
    },
    /// It is published to the same node on other terms.
    #[error(
        "volume {name} is published to node {node} already, with another access mode or another read-only setting; unpublish it first"
    )]
    OtherTerms {
        /// Its name.
        name: VolumeName,
        /// Which node.
        node: ClientNodeId,
    },
    /// It is published to another node.
    #[error(
        "volume {name} is published to node {node}; unpublish it from there first, which is safe even when that node is gone"
    )]
    Elsewhere {
        /// Its name.
        name: VolumeName,
        /// Who has it.
        node: ClientNodeId,
    },
    /// Changes are refused for everybody.
    #[error(
        "volume {name} is read-only; publish it read-only, or allow writes with `ashlar volume set {name} --read-only=false`"
    )]
    ReadOnly {
        /// Its name.
        name: VolumeName,
    },
    /// As many as there can be.
    #[error("volume {name} is published to {PUBLICATIONS_MAX} nodes, as many as a volume can be")]
    TooMany {
        /// Its name.
        name: VolumeName,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides a publication to a registered node. `None`: it is published to it on these terms already.
pub fn publish(
    current: &Versioned<VolumeRecord>,
    node: &Versioned<ClientNodeRecord>,
    new: &NewPublication,
) -> Result<Option<(VolumeRecord, Transaction)>, PublishError> {
    let record = &current.record;
    let name = || record.name.clone();
    if record.state == VolumeState::Deleting {
        return Err(PublishError::Deleting { name: name() });
    }
    let read_only = new.read_only || new.mode.only_reads();
    if let Some(known) = record.publication_of(&new.node) {
        return if (known.mode, known.read_only) == (new.mode, read_only) {
            Ok(None)
        } else {
            Err(PublishError::OtherTerms {
                name: name(),
                node: new.node.clone(),
            })
        };
    }
    let shares = |mode| mode == AccessMode::MultiNodeReader;
    let in_the_way = record
        .publications
        .iter()
        .find(|other| !(shares(new.mode) && shares(other.mode)));
    if let Some(other) = in_the_way {
        return Err(PublishError::Elsewhere {
            name: name(),
            node: other.node.clone(),
        });
    }
    if record.read_only && !read_only {
        return Err(PublishError::ReadOnly { name: name() });
    }
    if record.publications.len() >= PUBLICATIONS_MAX {
        return Err(PublishError::TooMany { name: name() });
    }
    let mut published = record.clone();
    published.publications.push(Publication {
        node: new.node.clone(),
        mode: new.mode,
        read_only,
        epoch: record.epoch,
        published_at_unix_ms: new.published_at_unix_ms,
        token: new.token,
    });
    // A node that is unregistered at the same moment is either still known or the publication does not happen.
    let transaction =
        rewrite(current, &published).when_unchanged(keys::client_node(&new.node), node.changed_at);
    Ok(Some((published, transaction)))
}

/// Why a volume cannot be taken back.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UnpublishError {
    /// It cannot be claimed.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// See [`ServedElsewhere`]; that head is to be fenced first.
    #[error(transparent)]
    Elsewhere(#[from] ServedElsewhere),
}

/// Decides the end of one node's publication, or of all, under a new epoch. `None`: there is nothing to end. `head` and
/// `written` as for [`claim`]. Of a volume with replicas it is decided by the node of its head alone: another one's would go on
/// letting in whom this takes away until it heard of it.
pub fn unpublish(
    current: &Versioned<VolumeRecord>,
    node: Option<&ClientNodeId>,
    head: HeadClaim,
    written: Epoch,
) -> Result<Option<(VolumeRecord, Transaction)>, UnpublishError> {
    let mut record = current.record.clone();
    record
        .publications
        .retain(|publication| node.is_some_and(|node| publication.node != *node));
    if record.publications.len() == current.record.publications.len() {
        return Ok(None);
    }
    if record.placement.is_replicated() {
        check_decides(&record, head.node)?;
        // Its head alone raises the epoch; ending the connections of the token is what fences the node.
        let transaction = super::change::rewrite(current, &record);
        return Ok(Some((record, transaction)));
    }
    let without = Versioned {
        record,
        changed_at: current.changed_at,
    };
    Ok(Some(claim(&without, head, written)?))
}

impl VolumeRecord {
    /// What a client node was given.
    pub fn publication_of(&self, node: &ClientNodeId) -> Option<&Publication> {
        self.publications
            .iter()
            .find(|publication| publication.node == *node)
    }

    /// The publication a token belongs to.
    pub fn publication_with(&self, token: ExportToken) -> Option<&Publication> {
        self.publications
            .iter()
            .find(|publication| publication.token == token)
    }

    /// Whose connections the head serves.
    pub fn admitted(&self) -> Admitted {
        if self.publications.is_empty() {
            return Admitted::Anyone;
        }
        let tokens = self.publications.iter().map(|p| p.token);
        Admitted::Holders(tokens.collect())
    }
}

/// What must hold for the publications of a record.
pub(super) fn check(publications: &[Publication]) -> Result<(), &'static str> {
    for (index, one) in publications.iter().enumerate() {
        let earlier = &publications[..index];
        if earlier.iter().any(|other| other.node == one.node) {
            return Err("published twice to one node");
        }
        if earlier.iter().any(|other| other.token == one.token) {
            return Err("one token for two publications");
        }
        if one.mode.only_reads() && !one.read_only {
            return Err("a reader that may write");
        }
        if publications.len() > 1 && one.mode != AccessMode::MultiNodeReader {
            return Err("published to several nodes, and not to readers alone");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
