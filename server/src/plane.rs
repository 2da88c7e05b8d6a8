//! What the interfaces for people and programs see of the data plane.

use std::path::PathBuf;
use std::time::Duration;

use ashlar_core::diagnosis::doctor::Holdings;
use ashlar_core::store::{ExtentKey, LeafSums, OpenReport, RowOfVersions, StoreStatus};
use ashlar_core::units::{ChunkIndex, ExportToken, LayerId, StoreId, VolumeId};
use async_trait::async_trait;

use crate::data::ScrubEnd;
use crate::metrics::Metrics;
use crate::volumes::{HostError, VolumeHost};

/// A store as it is now.
#[derive(Clone, Debug)]
pub struct StoreView {
    /// As in its superblock.
    pub id: StoreId,
    /// File or device.
    pub path: PathBuf,
    /// A block device and not a file.
    pub is_device: bool,
    /// "io_uring" or "posix".
    pub engine: &'static str,
    /// Where its tail lies.
    pub tail_path: PathBuf,
    /// The tail's memory outlives the daemon without touching a disk.
    pub tail_on_tmpfs: bool,
    /// From the opening to being ready, recovery included.
    pub opening_took: Duration,
    /// What recovery did.
    pub recovery: OpenReport,
    /// Counters and state of the machine.
    pub status: StoreStatus,
}

/// An NBD connection in its transmission phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionView {
    /// Unique while the daemon runs.
    pub id: u64,
    /// `unix:pid=…,uid=…` or `tcp:ADDRESS:PORT`.
    pub peer: String,
    /// Milliseconds since 1970-01-01 UTC.
    pub connected_at_unix_ms: u64,
    /// Changes are refused.
    pub read_only: bool,
    /// What it was opened by; `None`: the volume's name or id.
    pub token: Option<ExportToken>,
    /// Replies are structured; with extended headers they always are.
    pub structured_replies: bool,
    /// 64-bit requests.
    pub extended_headers: bool,
    /// `base:allocation` was chosen.
    pub block_status: bool,
    /// Taken and not yet answered.
    pub inflight_requests: u32,
    /// Answered.
    pub requests: u64,
    /// Payload of reads answered.
    pub read_bytes: u64,
    /// Payload of writes answered.
    pub written_bytes: u64,
}

/// The data plane, as far as the interfaces go.
#[async_trait]
pub trait Plane: VolumeHost {
    /// Every open store, in the order they were configured.
    async fn store_views(&self) -> Vec<StoreView>;

    /// The connections of one volume; none when it is not open.
    async fn connections(&self, volume: VolumeId) -> Vec<ConnectionView>;

    /// Begins to verify everything a store holds, from the start, at this many bytes a second, in place of a scrub that
    /// runs. Returns its number. How far it is and what it found stand in the store's status.
    async fn start_scrub(&self, store: StoreId, bytes_per_second: u64) -> Result<u64, HostError>;

    /// Ends the scrub of this number, if it runs.
    async fn stop_scrub(&self, store: StoreId, pass: u64) -> Result<(), HostError>;

    /// The next scrub that comes to its end, whoever began it. Waits until there is one. `None`: there will be none any
    /// more. May be given up at any time without losing one.
    async fn scrub_ended(&self) -> Option<ScrubEnd>;

    /// Takes a checkpoint; answers when it is durable.
    async fn checkpoint(&self, store: StoreId) -> Result<(), HostError>;

    /// What the stores hold, and whom the copies in them follow.
    async fn holdings(&self) -> Result<Holdings, HostError>;

    /// Rows of a layer in a store from a chunk on, and whether there are more.
    async fn survey_rows(
        &self,
        store: StoreId,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<(Vec<RowOfVersions>, bool), HostError>;

    /// What a store's index says of the blocks of a few leaves.
    async fn survey_sums(
        &self,
        store: StoreId,
        extent: ExtentKey,
        leaves: Vec<u32>,
    ) -> Result<Vec<LeafSums>, HostError>;

    /// Drops a layer from one store; answers when that is durable.
    async fn drop_layer_at(&self, store: StoreId, layer: LayerId) -> Result<(), HostError>;

    /// Puts a copy of a volume whose head is here out of sync, to be compared and filled as a whole. False: the head
    /// cannot spare it.
    async fn distrust(&self, volume: VolumeId, store: StoreId) -> Result<bool, HostError>;

    /// Everything that is counted on the path of an I/O.
    fn metrics(&self) -> &Metrics;
}
