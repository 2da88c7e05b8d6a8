//! What the metadata store holds about a cluster: its nodes, join tokens and the certificates of its clients, and which
//! changes of them are allowed.
//!
//! A certificate alone opens nothing: its holder must also be recorded here, and not be removed. So a removed node or a
//! revoked client is shut out by one changed record, whatever certificates it still has.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::{Record, Revision, Transaction, Versioned, VolumeName, keys};
use crate::units::NodeId;

/// Longest name of a client's certificate: a label of DNS, because it is part of a name in the certificate.
pub const CLIENT_NAME_MAX_BYTES: usize = 63;
/// Longest key or value of a node's label; as with Kubernetes.
pub const LABEL_MAX_BYTES: usize = 63;
/// Most labels of a node.
pub const LABELS_MAX: usize = 16;
/// How long what is left of a spent or expired token is kept, milliseconds: long enough that whoever uses it late is
/// told what is wrong with it.
pub const TOKEN_REMEMBERED_MS: u64 = 7 * 24 * 3600 * 1000;

/// A cluster's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(pub Uuid);

/// The cluster whose records these are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRecord {
    /// Its identity; in the name of every certificate.
    pub id: ClusterId,
    /// SHA-256 of the certificate of its authority (DER), in hexadecimal digits.
    pub authority_sha256: String,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_at_unix_ms: u64,
    /// Records are still being moved here from this node; nobody serves anything until that is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving_from: Option<NodeId>,
}

impl Record for ClusterRecord {}

/// A node's own note of the cluster it belongs to; kept on the node, not in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MembershipRecord {
    /// The cluster.
    pub cluster: ClusterId,
    /// Whether the node's own records are all in the cluster's metadata store, or it had none.
    pub is_complete: bool,
}

impl Record for MembershipRecord {}

/// A node of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberRecord {
    /// Its identity; in the name of its certificates.
    pub id: NodeId,
    /// Milliseconds since 1970-01-01 UTC.
    pub joined_at_unix_ms: u64,
    /// Once removed, for ever: an identity does not come back.
    pub state: MemberState,
    /// Where the others reach its admin interface, `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// It has the key of the authority and signs certificates.
    #[serde(default)]
    pub is_authority: bool,
    /// `zone`, `rack` and whatever else tells places apart.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its copies are to move elsewhere, and it gets no new ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
}

impl Record for MemberRecord {}

/// A node's life in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// One of the cluster.
    Active,
    /// Shut out.
    Removed,
}

/// A token that lets one node join. Its key is the SHA-256 of its secret, which is kept nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// Milliseconds since 1970-01-01 UTC.
    pub expires_at_unix_ms: u64,
    /// Who joined with it, if anybody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<TokenUse>,
}

impl Record for TokenRecord {}

/// The one use of a token. Using it again with the same node and key is the same use, so that a node whose answer was
/// lost can ask again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenUse {
    /// The node.
    pub node: NodeId,
    /// SHA-256 of the public key it asked a certificate for, in hexadecimal digits.
    pub public_key_sha256: String,
}

/// A certificate given to a user of volumes, or to a person who administers the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientRecord {
    /// Its name.
    pub name: String,
    /// Tells a certificate from an earlier one of the same name.
    pub certificate: Uuid,
    /// What it may do.
    pub role: ClientRole,
    /// Milliseconds since 1970-01-01 UTC.
    pub issued_at_unix_ms: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub expires_at_unix_ms: u64,
}

impl Record for ClientRecord {}

/// What a client's certificate is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientRole {
    /// NBD: every volume.
    Volumes,
    /// The admin interface.
    Admin,
}

/// Why nobody joins.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JoinError {
    /// It was never given out, or long ago.
    #[error("that join token is not known here; make one with `ashlar cluster token`")]
    UnknownToken,
    /// It is too late.
    #[error("that join token has expired; make another one with `ashlar cluster token`")]
    ExpiredToken,
    /// Another node, or the same one with another key, was quicker.
    #[error("that join token has been used; make another one with `ashlar cluster token`")]
    UsedToken,
    /// The node was here and was removed.
    #[error(
        "node {} was removed from this cluster and cannot come back under its identity; give it an empty data directory",
        node.0
    )]
    Removed {
        /// The node.
        node: NodeId,
    },
    /// A node of that identity is here already.
    #[error("node {} is in this cluster already", node.0)]
    AlreadyIn {
        /// The node.
        node: NodeId,
    },
}

/// Why a node is not changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MemberError {
    /// Not in the cluster.
    #[error(
        "there is no node {reference} in this cluster; `ashlar node list` shows those there are"
    )]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// Volumes would be lost to everybody.
    #[error(
        "node {} has {stores} store(s) with {volumes} volume(s); delete the volumes first",
        node.0
    )]
    HoldsVolumes {
        /// The node.
        node: NodeId,
        /// Its stores.
        stores: usize,
        /// Volumes on them.
        volumes: usize,
    },
    /// Copies would be lost.
    #[error(
        "node {} holds copies of {volumes} volume(s); `ashlar node drain {}` moves them to other nodes, and `ashlar node list` shows what is left",
        node.0, node.0
    )]
    HoldsCopies {
        /// The node.
        node: NodeId,
        /// Volumes with a copy there.
        volumes: usize,
    },
    /// Clients would be cut off.
    #[error(
        "node {} serves {}; open them on another node first (`ashlar volume open NAME`, asked of that node)",
        node.0, counted(volumes)
    )]
    Serves {
        /// The node.
        node: NodeId,
        /// Volumes with their head there.
        volumes: Vec<VolumeName>,
    },
    /// Shut out already.
    #[error("node {} was removed from this cluster", node.0)]
    Removed {
        /// The node.
        node: NodeId,
    },
    /// It would be shut out by itself, in the middle of its answer.
    #[error("node {} is the one you are asking; ask another node to remove it", node.0)]
    Itself {
        /// The node.
        node: NodeId,
    },
    /// Nobody could sign certificates any more.
    #[error(
        "node {} is the last one that holds the key of the authority; copy its identity/ca-key.pem to another node first",
        node.0
    )]
    LastAuthority {
        /// The node.
        node: NodeId,
    },
    /// A label that cannot be one.
    #[error(
        "{text:?} is no label: lower-case letters, digits, '-', '_', '.' and '/', at most {LABEL_MAX_BYTES} each, at most {LABELS_MAX} of them"
    )]
    Label {
        /// What was given.
        text: String,
    },
}

/// A client name that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{name:?} is no name for a certificate: 1 to {CLIENT_NAME_MAX_BYTES} lower-case letters, digits and '-', which does not stand first or last"
)]
pub struct ClientNameError {
    /// What was given.
    pub name: String,
}

/// Checks a name for a client's certificate.
pub fn check_client_name(name: &str) -> Result<(), ClientNameError> {
    let is_good = (1..=CLIENT_NAME_MAX_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if is_good {
        Ok(())
    } else {
        Err(ClientNameError {
            name: name.to_owned(),
        })
    }
}

/// Checks a label's key or value.
pub fn check_label(text: &str) -> Result<(), MemberError> {
    let is_good = (1..=LABEL_MAX_BYTES).contains(&text.len())
        && text.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_./".contains(&byte)
        });
    if is_good {
        Ok(())
    } else {
        Err(MemberError::Label {
            text: text.to_owned(),
        })
    }
}

/// A node that wants to join.
#[derive(Clone, Debug)]
pub struct Joiner {
    /// Its identity.
    pub node: NodeId,
    /// SHA-256 of its public key, in hexadecimal digits.
    pub public_key_sha256: String,
    /// Where the others are to reach it.
    pub address: Option<String>,
    /// Checked.
    pub labels: BTreeMap<String, String>,
}

/// Redeems a token. `None`: the same node did so before with the same key, and nothing is left to record.
pub fn join(
    token_sha256: &str,
    token: Option<&Versioned<TokenRecord>>,
    member: Option<&Versioned<MemberRecord>>,
    joiner: &Joiner,
    now_unix_ms: u64,
) -> Result<Option<Transaction>, JoinError> {
    let token = token.ok_or(JoinError::UnknownToken)?;
    let this_use = TokenUse {
        node: joiner.node,
        public_key_sha256: joiner.public_key_sha256.clone(),
    };
    if now_unix_ms >= token.record.expires_at_unix_ms {
        return Err(JoinError::ExpiredToken);
    }
    let removed = || JoinError::Removed { node: joiner.node };
    match &token.record.used_by {
        Some(earlier) if *earlier != this_use => return Err(JoinError::UsedToken),
        Some(_) => {
            return match member.map(|member| member.record.state) {
                Some(MemberState::Active) => Ok(None),
                Some(MemberState::Removed) | None => Err(removed()),
            };
        }
        None => {}
    }
    match member.map(|member| member.record.state) {
        None => {}
        Some(MemberState::Removed) => return Err(removed()),
        Some(MemberState::Active) => return Err(JoinError::AlreadyIn { node: joiner.node }),
    }
    let used = TokenRecord {
        used_by: Some(this_use),
        ..token.record
    };
    let member = MemberRecord {
        id: joiner.node,
        joined_at_unix_ms: now_unix_ms,
        state: MemberState::Active,
        address: joiner.address.clone(),
        is_authority: false,
        labels: joiner.labels.clone(),
        draining: false,
    };
    let key = keys::token(token_sha256);
    Ok(Some(
        Transaction::new()
            .when_unchanged(key.clone(), token.changed_at)
            .when_absent(keys::member(joiner.node))
            .put(key, used.encode())
            .put(keys::member(joiner.node), member.encode()),
    ))
}

/// Names that are told before the rest is only counted.
const NAMES_TOLD: usize = 10;

/// How many volumes, and the names of the first of them.
fn counted(volumes: &[VolumeName]) -> String {
    let names = volumes.iter().take(NAMES_TOLD).map(VolumeName::as_str);
    let names = names.collect::<Vec<_>>().join(", ");
    match volumes.len().saturating_sub(NAMES_TOLD) {
        0 => format!("{} volume(s): {names}", volumes.len()),
        more => format!("{} volume(s): {names} and {more} more", volumes.len()),
    }
}

/// What others would lose with a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Its stores.
    pub stores: usize,
    /// Volumes that are there alone.
    pub volumes: usize,
    /// Volumes with a copy there, and elsewhere.
    pub copied: usize,
    /// Copies of parts of those.
    pub copies: usize,
    /// Volumes with copies that it serves.
    pub serves: Vec<VolumeName>,
}

/// Shuts a node out. `None`: it is shut out already. `authorities` are the active nodes that hold the authority's key,
/// and `asked` is the node that is to carry this out.
pub fn remove(
    member: &Versioned<MemberRecord>,
    asked: NodeId,
    has: &Holdings,
    authorities: &[NodeId],
) -> Result<Option<Transaction>, MemberError> {
    let node = member.record.id;
    if member.record.state == MemberState::Removed {
        return Ok(None);
    }
    if node == asked {
        return Err(MemberError::Itself { node });
    }
    if has.volumes > 0 {
        return Err(MemberError::HoldsVolumes {
            node,
            stores: has.stores,
            volumes: has.volumes,
        });
    }
    if has.copied > 0 {
        return Err(MemberError::HoldsCopies {
            node,
            volumes: has.copied,
        });
    }
    if !has.serves.is_empty() {
        return Err(MemberError::Serves {
            node,
            volumes: has.serves.clone(),
        });
    }
    if authorities == [node] {
        return Err(MemberError::LastAuthority { node });
    }
    let removed = MemberRecord {
        state: MemberState::Removed,
        is_authority: false,
        ..member.record.clone()
    };
    Ok(Some(put_member(&removed, member.changed_at)))
}

/// Sets and removes labels of a node.
pub fn label(
    member: &Versioned<MemberRecord>,
    set: &BTreeMap<String, String>,
    unset: &[String],
) -> Result<Transaction, MemberError> {
    let mut labelled = member.record.clone();
    for key in unset {
        labelled.labels.remove(key);
    }
    for (key, value) in set {
        check_label(key)?;
        check_label(value)?;
        labelled.labels.insert(key.clone(), value.clone());
    }
    if labelled.labels.len() > LABELS_MAX {
        return Err(MemberError::Label {
            text: format!("{} labels", labelled.labels.len()),
        });
    }
    Ok(put_member(&labelled, member.changed_at))
}

/// Has a node emptied, or no longer. `None`: it is so already.
pub fn drain(
    member: &Versioned<MemberRecord>,
    draining: bool,
) -> Result<Option<Transaction>, MemberError> {
    let node = member.record.id;
    if member.record.state == MemberState::Removed {
        return Err(MemberError::Removed { node });
    }
    if member.record.draining == draining {
        return Ok(None);
    }
    let changed = MemberRecord {
        draining,
        ..member.record.clone()
    };
    Ok(Some(put_member(&changed, member.changed_at)))
}

/// Replaces a node's record.
pub fn put_member(record: &MemberRecord, changed_at: Revision) -> Transaction {
    let key = keys::member(record.id);
    Transaction::new()
        .when_unchanged(key.clone(), changed_at)
        .put(key, record.encode())
}

#[cfg(test)]
mod tests;
