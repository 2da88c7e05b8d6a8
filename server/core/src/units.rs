//! The sizes and identities everything else is counted in.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Bytes in a block: the unit of checksum, of mapping and of atomic write.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes in a chunk: the unit of placement, replication and resync.
pub const CHUNK_BYTES: u64 = 64 << 20;
/// Blocks in a chunk.
pub const CHUNK_BLOCKS: u32 = (CHUNK_BYTES / BLOCK_BYTES as u64) as u32;
/// Blocks that one leaf maps (2 MiB): at 16 bytes an entry a leaf is exactly two blocks.
pub const LEAF_BLOCKS: u32 = 512;
/// Leaves in a chunk.
pub const CHUNK_LEAVES: u32 = CHUNK_BLOCKS / LEAF_BLOCKS;

/// A volume, for ever: names may change, this does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(pub Uuid);

/// A store: one data file or raw device of one daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoreId(pub Uuid);

/// A daemon's identity; a store belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub Uuid);

/// A layer: the blocks written to a volume between two snapshots. Given once by the metadata store, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u64);

/// Which 64 MiB range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkIndex(pub u32);

/// The number that fences: every claim of a head and every change of the in-sync set raises it. At most
/// [`Epoch::MAX`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u32);

impl Epoch {
    /// 24 bits of a [`Version`] are the epoch.
    pub const MAX: Epoch = Epoch((1 << 24) - 1);
}

/// What a head gives each write: the epoch in the high 24 bits, a counter in the low 40. Never reused; a larger
/// version is a newer write. Zero means "never written".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Version(pub u64);

impl Version {
    /// "Never written": smaller than the version of any write.
    pub const NONE: Version = Version(0);
    /// Largest counter of an epoch; a head that reaches it must claim a new epoch before it writes again.
    pub const COUNTER_MAX: u64 = (1 << 40) - 1;

    /// The version of write number `counter` under `epoch`.
    pub fn new(epoch: Epoch, counter: u64) -> Version {
        assert!(epoch <= Epoch::MAX && counter <= Version::COUNTER_MAX);
        Version((u64::from(epoch.0) << 40) | counter)
    }

    /// The epoch this version was given under.
    pub fn epoch(self) -> Epoch {
        Epoch((self.0 >> 40) as u32)
    }
}

const _: () = assert!(CHUNK_LEAVES == 32 && CHUNK_BLOCKS == 16384);

/// The secret half of the export name that a published volume is opened by: whoever has it has the volume. It appears
/// in no log, so it is printed as dots.
#[derive(Clone, Copy, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExportToken(pub Uuid);

impl PartialEq for ExportToken {
    /// Takes the same time wherever two tokens differ, so that one cannot be guessed digit by digit.
    fn eq(&self, other: &ExportToken) -> bool {
        std::hint::black_box(self.0.as_u128() ^ other.0.as_u128()) == 0
    }
}

impl std::fmt::Debug for ExportToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExportToken(…)")
    }
}
