//! What the volume service needs of the data plane.

use std::collections::BTreeMap;

use ashlar_core::nbd::session::Admitted;
use ashlar_core::placement::StoreSpace;
use ashlar_core::records::{Placement, Versioned, VolumeLimits, VolumeRecord};
use ashlar_core::units::{Epoch, LayerId, StoreId, VolumeId};
use async_trait::async_trait;
use thiserror::Error;

use crate::data::{ReplicatedSpec, ReplicationStatus};
use crate::replication::ReplicationEvent;

/// A volume as its head must serve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Its identity.
    pub id: VolumeId,
    /// For logs and metrics.
    pub name: String,
    /// Bytes, a multiple of a block.
    pub size_bytes: u64,
    /// The live layer first, then its parents.
    pub layers: Vec<LayerId>,
    /// Claimed for this opening and never served before.
    pub epoch: Epoch,
    /// Every acknowledgement waits for durability.
    pub write_through: bool,
    /// Changes are refused.
    pub read_only: bool,
    /// Where its chunks lie.
    pub placement: Placement,
    /// Whose connections it serves.
    pub admitted: Admitted,
    /// Nothing was ever written to it: its first change waits for [`VolumeHost::first_change_recorded`].
    pub never_written: bool,
    /// Bounds on what its clients may ask of it.
    pub limits: VolumeLimits,
}

/// What is going on with an open volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeRuntime {
    /// Open NBD connections.
    pub connections: u32,
    /// Requests taken and not yet answered.
    pub inflight_requests: u32,
    /// Copied to bring replicas up to date since the volume was opened here.
    pub resynced_bytes: u64,
}

/// Why the data plane did not do as it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HostError {
    /// Clients are connected.
    #[error("in use by {connections} connection(s)")]
    Busy {
        /// How many.
        connections: u32,
    },
    /// No such volume is open.
    #[error("the volume is not open")]
    NotOpen,
    /// The volume's placement names a store that this daemon has not opened.
    #[error("its store {} is not open in this daemon; start ashlard with that --store", store.0)]
    StoreMissing {
        /// Which.
        store: StoreId,
    },
    /// The daemon is draining.
    #[error("the daemon is shutting down")]
    ShuttingDown,
    /// A store refused or failed.
    #[error("{reason}")]
    Store {
        /// What it said.
        reason: String,
    },
}

/// The data plane, as far as volumes go.
#[async_trait]
pub trait VolumeHost: Send + Sync + 'static {
    /// Begins to serve a volume.
    async fn open_volume(&self, spec: VolumeSpec) -> Result<(), HostError>;

    /// Stops serving a volume; [`HostError::Busy`], and nothing changed, while a client is connected. From the answer
    /// on no client can attach.
    async fn close_volume(&self, id: VolumeId) -> Result<(), HostError>;

    /// The next open volume that has few versions left under its epoch; each is named once for each epoch. Waits until
    /// there is one. `None`: there will be none any more.
    async fn epoch_wanted(&self) -> Option<VolumeId>;

    /// Goes on serving a volume under an epoch that was claimed for this, clients unaware.
    async fn renew_epoch(&self, id: VolumeId, epoch: Epoch) -> Result<(), HostError>;

    /// Serves these connections from now on; [`HostError::Busy`], and nothing changed, while one is open that would not
    /// be served.
    async fn admit(&self, id: VolumeId, admitted: Admitted) -> Result<(), HostError>;

    /// Serves these connections from now on (`None`: the same as before, and ends all) and ends those it does not
    /// serve. Answers how many, when everything they had asked for is done or refused.
    async fn fence(&self, id: VolumeId, admitted: Option<Admitted>) -> Result<u32, HostError>;

    /// The next volume whose first change waits until it is recorded; each is named once for each opening. Waits until
    /// there is one. `None`: there will be none any more.
    async fn first_change(&self) -> Option<VolumeId>;

    /// It is recorded: changes go on.
    async fn first_change_recorded(&self, id: VolumeId) -> Result<(), HostError>;

    /// Changes the limits of an open volume, clients unaware but for the pace.
    async fn set_limits(&self, id: VolumeId, limits: VolumeLimits) -> Result<(), HostError>;

    /// Begins to claim a replicated volume and to serve it; the events tell what becomes of it.
    async fn open_replicated(&self, spec: ReplicatedSpec) -> Result<(), HostError>;

    /// The next thing that a head of a replicated volume tells. `None`: there will be none any more.
    async fn replication_event(&self) -> Option<ReplicationEvent>;

    /// The record of a replicated volume, as a watch saw it; `None`: it is gone.
    fn record_seen(&self, id: VolumeId, record: Option<Versioned<VolumeRecord>>);

    /// Follows no head of a volume that is being deleted any more.
    async fn forget_replicas(&self, id: VolumeId);

    /// How a replicated volume is doing, if its head is here.
    async fn replication(&self, id: VolumeId) -> Option<ReplicationStatus>;

    /// Makes an open volume larger, connected clients included.
    async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), HostError>;

    /// Tells the name that logs and metrics are to use.
    fn rename_volume(&self, id: VolumeId, name: &str);

    /// Drops a layer from every store; answers when that is durable.
    async fn delete_layer(&self, layer: LayerId) -> Result<(), HostError>;

    /// `None`: not open.
    fn runtime(&self, id: VolumeId) -> Option<VolumeRuntime>;

    /// The open stores, in the order they were configured.
    fn stores(&self) -> Vec<StoreId>;

    /// The stores and their room, in groups that may hold the chunks of one volume together.
    async fn store_groups(&self) -> Vec<Vec<StoreSpace>>;

    /// Every layer that any store holds blocks of, with the highest epoch it was written under.
    async fn layers(&self) -> Result<BTreeMap<LayerId, Epoch>, HostError>;
}
