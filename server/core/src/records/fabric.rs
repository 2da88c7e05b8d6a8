//! What the daemons of a cluster tell each other through the metadata store: where their links are, and how much room
//! their stores have.

use serde::{Deserialize, Serialize};

use super::Record;
use crate::units::{NodeId, StoreId};

/// Where a daemon's stores are reached by the heads of others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkRecord {
    /// The daemon.
    pub node: NodeId,
    /// `HOST:PORT`.
    pub address: String,
}

impl Record for LinkRecord {}

/// The room of a store, as its daemon last said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceRecord {
    /// The store.
    pub store: StoreId,
    /// Its daemon.
    pub node: NodeId,
    /// Blocks that clients may fill.
    pub capacity_blocks: u64,
    /// Blocks that can still be written.
    pub free_blocks: u64,
    /// When that was, milliseconds since 1970-01-01 UTC by that daemon's clock.
    pub at_unix_ms: u64,
}

impl Record for SpaceRecord {}
