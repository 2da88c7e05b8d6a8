//! The machines that volumes are published to.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Record, Transaction, Versioned, keys};

/// Longest id of a client node, in bytes: CSI's bound.
const CLIENT_NODE_ID_MAX_BYTES: usize = 256;
/// Most bytes of a node's topology, keys and values together: CSI's bound for a map.
const TOPOLOGY_MAX_BYTES: usize = 4 << 10;

/// What an orchestrator calls a machine: 1 to 256 bytes without control characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClientNodeId(String);

/// What is wrong with a client node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ClientNodeError {
    /// No id.
    #[error("the id of a client node must not be empty")]
    Empty,
    /// An id that is too long.
    #[error("the id of a client node has at most {CLIENT_NODE_ID_MAX_BYTES} bytes, not {0}")]
    TooLong(usize),
    /// A character that would spoil a log or a listing.
    #[error("the id of a client node must not contain control characters")]
    Control,
    /// Too much topology.
    #[error("the topology of a client node has at most {TOPOLOGY_MAX_BYTES} bytes, not {0}")]
    TopologyTooLarge(usize),
    /// A segment without a key, or with control characters.
    #[error("a topology segment needs a key, and must not contain control characters")]
    TopologySegment,
}

impl ClientNodeId {
    /// Checks an id.
    pub fn parse(text: &str) -> Result<ClientNodeId, ClientNodeError> {
        match text.len() {
            0 => Err(ClientNodeError::Empty),
            len if len > CLIENT_NODE_ID_MAX_BYTES => Err(ClientNodeError::TooLong(len)),
            _ if text.chars().any(char::is_control) => Err(ClientNodeError::Control),
            _ => Ok(ClientNodeId(text.to_owned())),
        }
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ClientNodeId {
    type Error = ClientNodeError;

    fn try_from(text: String) -> Result<ClientNodeId, ClientNodeError> {
        ClientNodeId::parse(&text)
    }
}

impl From<ClientNodeId> for String {
    fn from(id: ClientNodeId) -> String {
        id.0
    }
}

impl fmt::Display for ClientNodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A machine that volumes are published to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientNodeRecord {
    /// Its id.
    pub id: ClientNodeId,
    /// Where it is, in the orchestrator's words.
    pub topology: BTreeMap<String, String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub registered_at_unix_ms: u64,
}

impl Record for ClientNodeRecord {}

/// Decides the registration of a node; `None`: nothing would change.
pub fn register_node(
    current: Option<&Versioned<ClientNodeRecord>>,
    id: &ClientNodeId,
    topology: &BTreeMap<String, String>,
    now_unix_ms: u64,
) -> Result<Option<(ClientNodeRecord, Transaction)>, ClientNodeError> {
    let bytes = topology.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > TOPOLOGY_MAX_BYTES {
        return Err(ClientNodeError::TopologyTooLarge(bytes));
    }
    let bad = |text: &String| text.chars().any(char::is_control);
    if topology
        .iter()
        .any(|(key, value)| key.is_empty() || bad(key) || bad(value))
    {
        return Err(ClientNodeError::TopologySegment);
    }
    if current.is_some_and(|current| current.record.topology == *topology) {
        return Ok(None);
    }
    let record = ClientNodeRecord {
        id: id.clone(),
        topology: topology.clone(),
        registered_at_unix_ms: current.map_or(now_unix_ms, |c| c.record.registered_at_unix_ms),
    };
    let key = keys::client_node(id);
    let transaction = match current {
        Some(current) => Transaction::new().when_unchanged(key.clone(), current.changed_at),
        None => Transaction::new().when_absent(key.clone()),
    };
    let transaction = transaction.put(key, record.encode());
    Ok(Some((record, transaction)))
}

/// Decides that a node is forgotten.
pub fn unregister_node(current: &Versioned<ClientNodeRecord>) -> Transaction {
    let key = keys::client_node(&current.record.id);
    Transaction::new()
        .when_unchanged(key.clone(), current.changed_at)
        .delete(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Revision;

    #[test]
    fn ids_are_bounded() {
        assert_eq!(ClientNodeId::parse(""), Err(ClientNodeError::Empty));
        assert!(ClientNodeId::parse(&"n".repeat(256)).is_ok());
        assert_eq!(
            ClientNodeId::parse(&"n".repeat(257)),
            Err(ClientNodeError::TooLong(257))
        );
        assert_eq!(ClientNodeId::parse("a\nb"), Err(ClientNodeError::Control));
        assert!(ClientNodeId::parse("ip-10-0-0-1.ec2/rack 7").is_ok());
    }

    #[test]
    fn a_node_is_registered_once_and_changed_when_it_moves() {
        let id = ClientNodeId::parse("n1").expect("id");
        let zone = |z: &str| BTreeMap::from([("zone".to_owned(), z.to_owned())]);
        let (first, transaction) = register_node(None, &id, &zone("a"), 7)
            .expect("decided")
            .expect("new");
        assert_eq!(first.registered_at_unix_ms, 7);
        assert_eq!(transaction.conditions.len(), 1);
        let stored = Versioned {
            record: ClientNodeRecord::decode("k", &first.encode()).expect("decodes"),
            changed_at: Revision(3),
        };
        assert_eq!(register_node(Some(&stored), &id, &zone("a"), 9), Ok(None));
        let (moved, _) = register_node(Some(&stored), &id, &zone("b"), 9)
            .expect("decided")
            .expect("moved");
        assert_eq!(
            (moved.registered_at_unix_ms, moved.topology),
            (7, zone("b"))
        );
        let large = BTreeMap::from([("k".to_owned(), "v".repeat(TOPOLOGY_MAX_BYTES))]);
        assert!(register_node(None, &id, &large, 1).is_err());
        assert!(
            register_node(
                None,
                &id,
                &BTreeMap::from([(String::new(), String::new())]),
                1
            )
            .is_err()
        );
    }
}
