//! What replicated volumes need beside the data threads: their records in the metadata store, the seals of this node's
//! replicas in its own database, and links to other daemons.
//!
//! Data threads ask ([`ClusterTell`]); [`Driver`] does it and answers. It decides nothing.

mod driver;
mod links;
mod network;
mod seals;

pub use driver::{Driver, ReplicationEvent};
pub use links::{Dial, GREETING_TIME, LinkRefused, NoPeers, accept, greet};
pub(crate) use network::space_records;
pub use network::{LinkListenError, Network, listen};
pub use seals::{SealRecord, Seals};

use crate::data::ClusterTell;

#[cfg(test)]
mod tests;
