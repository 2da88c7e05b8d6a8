//! What the data plane is told and what it answers, in the words of the rest of the daemon.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use ashlar_core::nbd::session::{Admitted, ReplyStyle};
use ashlar_core::records::{Placement, VolumeLimits};
use ashlar_core::replication::Seal;
use ashlar_core::store::{OpenError, OpenReport, StoreError, StoreStatus};
use ashlar_core::units::{Epoch, ExportToken, LayerId, NodeId, StoreId, VolumeId};

use tokio::sync::mpsc::UnboundedSender;

use super::cluster::{ClusterTell, ReplicationStatus};
use crate::engine::{EngineChoice, FaultPlan, OpenStoreError};
use crate::events::Events;
use crate::tail::TailError;

/// Everything needed to start the data plane.
#[derive(Clone, Debug)]
pub struct DataConfig {
    /// This daemon; its stores carry the id.
    pub node: NodeId,
    /// Data threads. Stores are dealt out to them in order; never more threads than stores.
    pub threads: usize,
    pub engine: EngineChoice,
    /// Injected faults, for tests.
    pub fault: Option<FaultPlan>,
    pub stores: Vec<StoreConfig>,
    /// The daemon's data directory; the last place for tails.
    pub data_dir: PathBuf,
    /// The only directory for new tails; `None`: the first of /run, /dev/shm and `data_dir` with room.
    pub tail_dir: Option<PathBuf>,
    /// Bytes of acknowledged writes a store's tail holds.
    pub tail_bytes: u64,
    /// Bytes of leaves each store keeps in memory.
    pub cache_bytes: u64,
    pub limits: Limits,
    /// How long a drain waits for requests under way and for clients to read their replies.
    pub drain_timeout: Duration,
    /// Open stores whose tail is missing or damaged; acknowledged writes may be lost.
    pub accept_tail_loss: bool,
    /// What going to sleep and being woken costs a data thread: a measure of how long one that has just answered looks
    /// again before it sleeps, when that has been paying. Zero: not at all.
    pub spin: Duration,
    /// What the node's database knows of its replicas.
    pub seals: HashMap<(VolumeId, StoreId), Seal>,
    /// How long a head may serve reads after a sign of life of its replicas.
    pub lease: Duration,
    /// Where it is told what happens to stores.
    pub events: Events,
    /// Bytes a second that the head of a volume copies to replicas that are being filled; 0: as fast as it goes.
    pub fill_bytes_per_second: u64,
}

impl DataConfig {
    /// The defaults for one store.
    pub fn new(node: NodeId, data_dir: PathBuf, stores: Vec<StoreConfig>) -> DataConfig {
        DataConfig {
            node,
            threads: 1,
            engine: EngineChoice::Auto,
            fault: None,
            stores,
            data_dir,
            tail_dir: None,
            tail_bytes: DataConfig::TAIL_BYTES,
            cache_bytes: DataConfig::CACHE_BYTES,
            limits: Limits::default(),
            drain_timeout: DataConfig::DRAIN_TIMEOUT,
            accept_tail_loss: false,
            spin: DataConfig::SPIN,
            seals: HashMap::new(),
            lease: DataConfig::LEASE,
            events: Events::default(),
            fill_bytes_per_second: DataConfig::FILL_BYTES_PER_SECOND,
        }
    }

    /// Default of [`DataConfig::lease`]: longer than any hiccup of a network that a client should not notice, short
    /// enough that a dead node stops a volume only for seconds. The same on all daemons of a cluster.
    pub const LEASE: Duration = Duration::from_secs(4);
    /// Default of [`DataConfig::drain_timeout`].
    pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
    /// Default of [`DataConfig::fill_bytes_per_second`]: a gigabit network's worth.
    pub const FILL_BYTES_PER_SECOND: u64 = 128 << 20;
    /// Default of [`DataConfig::spin`]: about what going to sleep and being woken costs.
    pub const SPIN: Duration = Duration::from_micros(20);
    /// Default of [`DataConfig::tail_bytes`]: what a disk of 1 GB/s carries away in 64 ms, so that bursts are taken
    /// at the speed of memory while a shut-down and a restart stay short; small enough to count as memory of the daemon.
    pub const TAIL_BYTES: u64 = 64 << 20;
    /// Default of [`DataConfig::cache_bytes`]: at 16 bytes a block, the index of 16 GiB of data.
    pub const CACHE_BYTES: u64 = 64 << 20;
}

/// One store of this daemon.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// File or block device.
    pub path: PathBuf,
    /// The store that was here before, from the metadata. With it, a missing or empty file is an error and is never
    /// formatted: its data would be gone without a word.
    pub expected: Option<StoreId>,
    /// Bytes a new file may grow to. A device is used whole. An existing store keeps what it was made with.
    pub capacity_bytes: u64,
}

/// Bounds on what clients can make the daemon hold. Exceeding one pauses the reading of a socket, never fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests of one connection taken and not yet answered. The kernel's client sends at most 128.
    pub requests_per_connection: u32,
    /// Bytes of payloads and replies held for one connection; one request more than this is let in.
    pub bytes_per_connection: usize,
    /// Bytes of buffers lent by all data threads together, each of which has its part of it. Where few buffers hold much
    /// more memory than they are large, half of that counts. A client of whom nothing is held has one request let in while
    /// those that are let in have less than half of it.
    pub bytes: usize,
    /// How long a client may neither send the rest of a payload nor read its replies while others wait for the memory
    /// it holds. Then its connection is closed.
    pub stall: Duration,
}

impl Limits {
    /// Default of [`Limits::bytes_per_connection`].
    pub const BYTES_PER_CONNECTION: u64 = 64 << 20;
    /// Default of [`Limits::bytes`].
    pub const BYTES: u64 = 128 << 20;
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            requests_per_connection: 1024,
            bytes_per_connection: Limits::BYTES_PER_CONNECTION as usize,
            bytes: Limits::BYTES as usize,
            // Longer than any hiccup of a host or a network that the client would survive itself.
            stall: Duration::from_secs(15),
        }
    }
}

/// A volume to serve, from its record.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    pub id: VolumeId,
    /// For logs and metrics.
    pub name: String,
    pub size_bytes: u64,
    /// The live layer.
    pub layer: LayerId,
    /// Claimed for this opening; never used before.
    pub epoch: Epoch,
    pub write_through: bool,
    pub read_only: bool,
    pub placement: Placement,
    /// Whose connections it serves.
    pub admitted: Admitted,
    /// The record says that nothing was ever written: the first change waits until it says so no more.
    pub never_written: bool,
    pub limits: VolumeLimits,
}

/// A store that was opened.
#[derive(Clone, Debug)]
pub struct OpenedStore {
    pub id: StoreId,
    pub path: PathBuf,
    /// Made by this start.
    pub formatted: bool,
    pub is_device: bool,
    /// False: the file system takes no O_DIRECT.
    pub direct: bool,
    pub tail_path: PathBuf,
    /// Data thread that owns it.
    pub thread: usize,
    /// How long opening took, recovery included.
    pub took: Duration,
    /// What recovery did.
    pub report: OpenReport,
}

/// A store as it is now.
#[derive(Clone, Debug)]
pub struct StoreReport {
    pub id: StoreId,
    pub path: PathBuf,
    pub thread: usize,
    /// "io_uring" or "posix".
    pub engine: &'static str,
    pub status: StoreStatus,
}

/// A scrub that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubEnd {
    pub store: StoreId,
    /// Blocks read and compared.
    pub blocks: u64,
    /// Of these, those that were not what was written.
    pub damaged: u64,
}

/// What the data threads tell by themselves. Nobody listening is no error: the daemon stops.
#[derive(Clone, Debug)]
pub(super) struct Tells {
    /// Volumes whose heads have few versions left.
    pub(super) epochs_wanted: UnboundedSender<VolumeId>,
    /// Volumes whose first change waits for its record.
    pub(super) first_changes: UnboundedSender<VolumeId>,
    pub(super) scrubs_ended: UnboundedSender<ScrubEnd>,
    /// What replicated volumes need of the control plane.
    pub(super) cluster: UnboundedSender<ClusterTell>,
    pub(super) events: Events,
}

/// A store, its layers and the highest epoch each was written under.
pub type StoreLayers = (StoreId, Vec<(LayerId, Epoch)>);

/// A volume as it is served now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRuntime {
    pub connections: Vec<ConnectionReport>,
    pub size_bytes: u64,
    pub epoch: Epoch,
    /// Requests taken and not yet answered, and how many of them wait for another.
    pub in_flight: usize,
    pub waiting: usize,
    /// Of a replicated volume.
    pub replication: Option<ReplicationStatus>,
}

/// One client of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionReport {
    /// Unique while the data plane runs, on one data thread.
    pub serial: u64,
    pub peer: String,
    pub connected_at: SystemTime,
    pub style: ReplyStyle,
    pub base_allocation: bool,
    pub read_only: bool,
    /// What it was opened by.
    pub token: Option<ExportToken>,
    pub in_flight: u32,
    pub requests: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}

/// Why the data plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    File(#[from] OpenStoreError),
    #[error(transparent)]
    Tail(#[from] TailError),
    #[error("store {path}: {source}", path = path.display())]
    Store { path: PathBuf, source: OpenError },
    #[error("store {path} is empty, but store {expected} was here before; if its data are really gone, remove it from the configuration and the metadata", path = path.display(), expected = expected.0)]
    Emptied { path: PathBuf, expected: StoreId },
    #[error("store {path} is {found}, but {expected} was here before; is another disk mounted there?", path = path.display(), found = found.0, expected = expected.0)]
    Swapped {
        path: PathBuf,
        found: StoreId,
        expected: StoreId,
    },
    #[error("{path} holds something that is not an Ashlar store; nothing was changed. Remove it, or choose another path, to have a store made", path = path.display())]
    NotAStore { path: PathBuf },
    #[error("store {path} cannot be made with {bytes} bytes: too small; give it at least 64 MiB", path = path.display())]
    TooSmall { path: PathBuf, bytes: u64 },
    #[error("{first} and {second} are the same store (a copy?); remove one from the configuration", first = first.display(), second = second.display())]
    Twice { first: PathBuf, second: PathBuf },
    #[error("no store is configured")]
    NoStore,
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: std::io::Error,
    },
}

/// Why the data plane refused something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    #[error("volume {} is not open", .0.0)]
    NotOpen(VolumeId),
    #[error("volume {} is open already", .0.0)]
    AlreadyOpen(VolumeId),
    #[error("volume {volume} is in use by {connections} connections", volume = volume.0)]
    InUse {
        volume: VolumeId,
        connections: usize,
    },
    #[error("store {} is not one of this daemon's", .0.0)]
    NoSuchStore(StoreId),
    #[error("the stores of one volume must belong to one data thread")]
    StoresApart,
    #[error("{0}")]
    Resize(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the daemon is shutting down")]
    Draining,
    #[error("socket: {0}")]
    Socket(String),
}
