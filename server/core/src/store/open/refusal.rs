//! Why a store is not opened.

use crate::store::Errno;
use crate::store::format::{Addr, FormatError};

/// The disk refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DiskError(pub Errno);

impl DiskError {
    /// Whether these blocks cannot be read, as a power cut while they were written can leave them; not the whole device,
    /// as far as the error tells.
    pub fn is_of_the_medium(self) -> bool {
        matches!(self.0, Errno::EIO | Errno::ENODATA | Errno::EILSEQ)
    }
}

/// Why a store cannot be opened. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is no store here.
    #[error("this is not an Ashlar store (no superblock)")]
    NotAStore,
    /// Written by a later version.
    #[error("the store has format version {0}, this daemon knows {known}; use the version of Ashlar that made it", known = crate::store::format::FORMAT_VERSION)]
    Version(u32),
    /// Every copy of the superblock is damaged.
    #[error(
        "every copy of the superblock is damaged; restore the store from another replica or a backup"
    )]
    SuperblockDamaged,
    /// The store belongs to another daemon.
    #[error("the store belongs to another daemon (node {}); point this daemon at its own data directory", uuid::Uuid::from_bytes(*owner))]
    OtherNode {
        /// Its owner.
        owner: [u8; 16],
    },
    /// The checkpoint is damaged.
    #[error(
        "checkpoint {seq} is damaged ({error}); run 'ashlar store check' and restore from another replica or a backup"
    )]
    CheckpointDamaged {
        /// Its number.
        seq: u64,
        /// What is wrong.
        error: FormatError,
    },
    /// A frame that was durable cannot be read back.
    #[error("the log is damaged at block {}: a frame that was durable cannot be read back; run 'ashlar store check' and restore from another replica or a backup", at.0)]
    LogDamaged {
        /// Where the missing frame begins.
        at: Addr,
    },
    /// A frame that may have been durable is where the device cannot read.
    #[error(
        "the device cannot read block {} of the store, where the log goes on ({error}); try again, as such an error may pass, and restore from another replica or a backup if it stays. If a power cut left the block so, what is behind it was not flushed: writing 4096 zeros to byte {} lets the log end there, and what was flushed there after all is lost", at.0, at.offset()
    )]
    LogUnreadable {
        /// The frame's first block.
        at: Addr,
        /// What the device said.
        error: DiskError,
    },
    /// The process died in this boot of the machine, and the tail with its last writes is not there.
    #[error(
        "the tail of the daemon that was killed is missing, and acknowledged writes may be in it; put the tail file back (same tail directory), or accept their loss with --accept-tail-loss"
    )]
    TailMissing,
    /// The tail does not go with the log.
    #[error(
        "the tail cannot be read ({0}); acknowledged writes may be in it; accept their loss with --accept-tail-loss"
    )]
    TailDamaged(FormatError),
    /// The memory offered for the tail is too small or not aligned.
    #[error("the tail must have at least 4 MiB of block-aligned memory")]
    TailTooSmall,
    /// The store is larger than the file or device.
    #[error("the store has {want} bytes but the file or device only {have}: it was cut off")]
    Truncated {
        /// Bytes the store refers to.
        want: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The place is too small for a store.
    #[error("a store needs at least {0} bytes")]
    TooSmall(u64),
    /// The log needs more room to save what the tail holds.
    #[error("the store has no free segment to save the tail into")]
    NoRoomForTail,
    /// The disk failed.
    #[error("the device failed: {0}")]
    Disk(#[from] DiskError),
}
