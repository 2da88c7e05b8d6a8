//! The data plane: threads that own stores, volumes and connections, and serve requests from socket to disk and back
//! without crossing to another thread.
//!
//! [`DataPlane`] is what the rest of the daemon sees. Each thread (`thread`) runs one event loop over one
//! [`Engine`](crate::engine::Engine); `execute` carries a request from admission to reply
//! (`reads`, `changes`), `gate` and `fence` keep requests and connections out of a head, `receiver` and `outbox` are
//! the two directions of a connection, `pool` lends the buffers between them and the disk, `survey` tells what
//! stores hold.

mod changes;
mod cluster;
mod command;
mod config;
mod connection;
mod contest;
mod execute;
mod facade;
mod fence;
mod gate;
mod habit;
mod halves;
mod landed;
mod looking;
mod open;
mod operation;
mod outbox;
mod pool;
mod reads;
mod receiver;
mod sockets;
mod sparse;
mod spin;
mod stores;
mod survey;
mod thread;

pub use cluster::{
    ClusterTell, FillStatus, LinkEnds, LinkPeer, LinkWish, ReplicaStatus, ReplicatedSpec,
    ReplicationStatus, greeting,
};
pub use config::{
    ConnectionReport, DataConfig, DataError, Limits, OpenedStore, ScrubEnd, StartError,
    StoreConfig, StoreLayers, StoreReport, VolumeRuntime, VolumeSpec,
};
pub use facade::DataPlane;
pub use open::FileDisk;
pub use survey::{HeldLayers, SURVEY_LEAVES_MAX};

#[cfg(test)]
pub(crate) mod tests;
