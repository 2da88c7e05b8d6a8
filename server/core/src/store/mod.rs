//! The local store: a log of frames, an index shaped like a page table, and the rules that keep both whole.
//!
//! [`Store`] decides and does nothing: calls and completions go in, [`Action`]s come out. The driver carries them
//! out in any order it likes, several at once, and reports each by [`Store::on_io`]. Opening is the one place that
//! runs start to end, over a [`BlockingDisk`].
//!
//! What each file is about:
//! - `format`: bytes on disk; `buf`: aligned memory; `tail`: the ring of acknowledged writes
//! - `index`: directory rows, leaves in memory and what is written but not yet in a leaf
//! - `load`: leaves from disk, and what becomes of one that cannot be read
//! - `versions`: what replicas compare
//! - `segment`: which space is free; `machine`: the state and its entry points
//! - `append`: closing frames, group commit, syncs; `apply`: moving written frames into leaves
//! - `checkpoint`, `clean`, `drop_layer`, `discard`, `scrub`: background work; `root`, `log`, `open`: making a store and recovery; `check`: offline

mod append;
mod apply;
mod buf;
mod check;
mod checkpoint;
mod clean;
mod cold;
mod discard;
mod drop_layer;
pub mod format;
mod index;
mod landing;
mod load;
mod log;
mod machine;
mod open;
mod read;
mod reserve;
mod root;
mod scrub;
mod segment;
mod tail;
mod versions;
mod write;

pub use buf::AlignedBuf;
pub use check::{CHECK_FINDINGS_MAX, CheckFinding, CheckReport, Inspection, check, inspect};
pub use format::{ExtentKey, FormatError, Geometry};
pub use landing::{Landing, MAX_LANDING_BLOCKS};
pub use machine::Store;
pub use open::{BlockingDisk, DiskError, OpenError, OpenOptions, OpenReport};
pub use root::format_store;
pub use tail::{TAIL_HEADER_BYTES, TailMemory, tail_bytes};
pub use versions::{BlockContent, BlockState, BlockSum, LeafSums, RowOfVersions};

use smallvec::SmallVec;

use crate::units::{ChunkIndex, LayerId};

/// A caller's name for an operation, given back in [`Action::Done`].
pub type OpId = u64;
/// The store's name for an I/O, given back in [`Store::on_io`].
pub type IoId = u32;

/// Most blocks one call of [`Store::write`] takes (1 MiB); larger writes are cut by the caller.
pub const MAX_WRITE_BLOCKS: usize = 256;

/// What the driver must do. Memory named by an I/O belongs to the store, stays where it is and is not touched until
/// the I/O is reported done; a driver that goes away first waits for what it has in flight.
#[derive(Debug)]
pub enum Action {
    /// Write `len` bytes from `ptr` at `offset`. With `durable`, complete only when they are on stable storage.
    Write {
        io: IoId,
        offset: u64,
        ptr: *const u8,
        len: usize,
        durable: bool,
    },
    /// Read `len` bytes at `offset` into `ptr`.
    Read {
        io: IoId,
        offset: u64,
        ptr: *mut u8,
        len: usize,
    },
    /// Make everything reported written before this was issued durable (fdatasync).
    Sync { io: IoId },
    /// Make `len` bytes at `offset` exist and hold zeros, allocated, written once and durable. Only where there is no
    /// room may this end with ENOSPC, EDQUOT or EFBIG (or ENOMEM: nothing was begun); a sync that failed is
    /// [`Errno::EIO`], whatever the device called it.
    Allocate { io: IoId, offset: u64, len: u64 },
    /// An operation ended.
    Done {
        op: OpId,
        result: Result<ReadInfo, StoreError>,
    },
    /// A write that was refused with [`WriteError::Busy`] may be tried again.
    Ready,
    /// Something a person or a counter should know.
    Event(Event),
}

// SAFETY: the pointers name memory that the store owns and leaves alone until the I/O ends; moving an action to
// another thread moves that right with it.
unsafe impl Send for Action {}

/// What a read found, beside the data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadInfo {
    /// Runs of blocks that are not mapped and read as zeros, `(first, count)` relative to the read, in order.
    pub holes: SmallVec<[(u32, u32); 2]>,
}

/// What becomes of a read at once.
#[derive(Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The buffer is filled.
    Done(ReadInfo),
    /// [`Action::Done`] will tell; the buffer must stay where it is until then.
    Pending,
}

/// A write was not taken, or not whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The tail is full. The first `accepted` blocks were taken; offer the rest again after [`Action::Ready`].
    #[error("the store's tail is full for the moment")]
    Busy {
        /// Blocks taken.
        accepted: u32,
    },
    /// New blocks do not fit. Nothing was taken.
    #[error("the store has no room for new blocks")]
    NoSpace,
    /// See [`StoreError::Poisoned`].
    #[error("{0}")]
    Failed(#[from] StoreError),
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A write or sync of the store failed earlier: what is on disk is not known, so nothing is answered until the
    /// store is opened again.
    #[error(
        "the store stopped after an I/O error ({0}); restart the daemon once the device is sound"
    )]
    Poisoned(Errno),
    /// [`Store::close`] was called: what came now would lie in a tail that nobody looks at again.
    #[error("the store is being closed")]
    Closed,
    /// The device could not read.
    #[error("the device failed to read ({0})")]
    Device(Errno),
    /// What was read is not what was written.
    #[error("checksum mismatch in layer {} chunk {} block {block}", layer.0, chunk.0)]
    Corrupt {
        /// Layer of the damaged block.
        layer: LayerId,
        /// Its chunk.
        chunk: ChunkIndex,
        /// The block in the chunk.
        block: u32,
    },
    /// The mapping of this block was damaged on disk; the block is readable again once it has been written.
    #[error("the index of layer {} chunk {} block {block} is damaged", layer.0, chunk.0)]
    Lost {
        /// Layer of the damaged block.
        layer: LayerId,
        /// Its chunk.
        chunk: ChunkIndex,
        /// The block in the chunk.
        block: u32,
    },
    /// The directory has no room for one more chunk.
    #[error("the store's directory is full")]
    DirectoryFull,
}

/// An operating system's error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Input/output error.
    pub const EIO: Errno = Errno(5);
    /// No space left on device.
    pub const ENOSPC: Errno = Errno(28);
    /// What Linux says of a block that the medium cannot give back.
    pub const ENODATA: Errno = Errno(61);
    /// What Linux says of a block whose protection information does not match it.
    pub const EILSEQ: Errno = Errno(84);
    /// Disk quota exceeded.
    const EDQUOT: Errno = Errno(122);
    /// File too large.
    const EFBIG: Errno = Errno(27);
    /// Out of memory.
    const ENOMEM: Errno = Errno(12);

    /// Whether a file could not be made larger for want of room, or of memory, and nothing else is wrong.
    fn is_want_of_room(self) -> bool {
        [Errno::ENOSPC, Errno::EDQUOT, Errno::EFBIG, Errno::ENOMEM].contains(&self)
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

/// Something a person or a counter should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The store stopped; every operation fails from here on.
    Poisoned(Errno),
    /// Data or index did not match its checksum.
    ChecksumMismatch(StoreError),
    /// Part of a segment could not be read back for cleaning; it is left alone.
    SegmentDamaged {
        /// The segment.
        segment: u32,
    },
    /// The file could not be made larger; the store's capacity is what it has now.
    GrowthFailed(Errno),
    /// A checkpoint became durable.
    Checkpointed {
        /// Its number.
        seq: u64,
        /// Leaves written for it.
        leaves: u32,
        /// Bytes of its area written.
        bytes: u64,
    },
    /// A scrub found blocks that cannot be read.
    ScrubDamaged {
        /// The chunk.
        extent: ExtentKey,
        /// The first of them in the chunk.
        first_block: u32,
        /// How many.
        count: u32,
    },
    /// A scrub pass ended.
    ScrubFinished {
        /// Blocks read.
        blocks: u64,
        /// Blocks that could not be read, or did not match.
        damaged: u64,
    },
}

/// How a store behaves; every number has a default that suits a disk of today.
#[derive(Clone, Debug)]
pub struct Params {
    /// Leaves kept in memory, 8 KiB each.
    pub leaf_cache: usize,
    /// Client log between checkpoints, in blocks, and the most that may wait to be applied: a start replays at most both.
    pub checkpoint_log_blocks: u64,
    /// An open frame is appended and synced when it is this old, milliseconds.
    pub writeback_ms: u64,
    /// Appends in flight at once.
    pub max_appends: usize,
    /// After this many flushes in a row that each followed a write at once, a write is appended durably without
    /// waiting for the flush that will follow it.
    pub flush_habit: u32,
    /// A background sync is made after this many blocks were appended: bounds what is verified at open.
    pub sync_log_blocks: u64,
    /// Grow the file by this many segments at a time.
    pub grow_segments: u32,
    /// Blocks read per second by a scrub.
    pub scrub_blocks_per_s: u64,
    /// Which safety rules are kept. Only a test that wants to see one fail changes this.
    pub rules: Rules,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            // 128 MiB of leaves map 32 GiB of data.
            leaf_cache: 16384,
            // 1 GiB: a second of reading.
            checkpoint_log_blocks: 262_144,
            writeback_ms: 1000,
            max_appends: 8,
            // Few: a database's log shows its habit soon, and a wrong guess costs one small frame.
            flush_habit: 4,
            // 128 MiB.
            sync_log_blocks: 32_768,
            grow_segments: 16,
            // 32 MiB/s.
            scrub_blocks_per_s: 8192,
            rules: Rules::default(),
        }
    }
}

/// The rules whose absence the power-cut test must notice.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Sync before answering a flush.
    pub sync_before_flush: bool,
    /// Do not reuse a freed segment before a durable checkpoint no longer refers to it.
    pub quarantine_freed: bool,
    /// Acknowledge frames in order.
    pub ordered_ack: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Rules {
            sync_before_flush: true,
            quarantine_freed: true,
            ordered_ack: true,
        }
    }
}

/// What a store says of itself. Counters rise since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// Blocks clients may fill.
    pub capacity_blocks: u64,
    /// Blocks that hold client data.
    pub mapped_blocks: u64,
    /// Blocks that data and index take of the capacity.
    pub used_blocks: u64,
    /// Segments that exist.
    pub segments: u32,
    /// Segments that may be written at once.
    pub segments_free: u32,
    /// Segments being appended to.
    pub segments_open: u32,
    /// Segments with nothing live in them, waiting for the checkpoint that allows their reuse.
    pub segments_freeing: u32,
    /// Blocks in a segment.
    pub segment_blocks: u32,
    /// Blocks of the tail in use.
    pub tail_used_blocks: u32,
    /// Blocks the tail has.
    pub tail_blocks: u32,
    /// Leaves in memory.
    pub leaves_cached: usize,
    /// Of these, how many changed since the last checkpoint.
    pub leaves_dirty: usize,
    /// Entries waiting to be moved into leaves.
    pub pending_entries: usize,
    /// Client blocks written.
    pub client_blocks: u64,
    /// Blocks written to the log by clients, headers included.
    pub log_blocks: u64,
    /// Blocks written by cleaning, headers included.
    pub cleaned_blocks: u64,
    /// Blocks written for checkpoints: leaves, directory and superblock.
    pub checkpoint_blocks: u64,
    /// Blocks read by cleaning.
    pub clean_read_blocks: u64,
    /// Segments cleaned.
    pub segments_cleaned: u64,
    /// Checkpoints taken.
    pub checkpoints: u64,
    /// What all of them took together, milliseconds.
    pub checkpoints_took_ms: u64,
    /// What the newest took, milliseconds.
    pub checkpoint_took_ms: u64,
    /// Number of the newest durable checkpoint.
    pub checkpoint_seq: u64,
    /// Client log since that checkpoint, in blocks: what a restart would replay.
    pub checkpoint_log_blocks: u64,
    /// Frames appended.
    pub frames: u64,
    /// Data syncs and durable appends.
    pub syncs: u64,
    /// Blocks or leaves that did not match their checksum.
    pub checksum_errors: u64,
    /// Reads the device failed.
    pub read_errors: u64,
    /// Blocks verified by the scrub that runs, or ran last.
    pub scrub_blocks: u64,
    /// Of these, how many were damaged.
    pub scrub_damaged: u64,
    /// Whether a scrub runs.
    pub scrubbing: bool,
    /// Number of the scrub that runs or ran last, counted from the opening of the store.
    pub scrub_pass: u64,
    /// The last that came to its end; of number 0 before any did.
    pub scrub_ended: ScrubOutcome,
    /// Layers whose blocks are being given back.
    pub dropping_layers: usize,
    /// Set when the store stopped after an I/O error.
    pub poisoned: Option<Errno>,
}

/// What a scrub that came to its end had done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubOutcome {
    /// As [`StoreStatus::scrub_pass`].
    pub pass: u64,
    /// Blocks verified.
    pub blocks: u64,
    /// Of these, how many were damaged.
    pub damaged: u64,
}

impl StoreStatus {
    /// Blocks written to the device, whatever for.
    pub fn written_blocks(&self) -> u64 {
        self.log_blocks + self.cleaned_blocks + self.checkpoint_blocks
    }
}
