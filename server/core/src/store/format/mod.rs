//! What a store's bytes mean: superblock, frame, leaf and checkpoint. `docs/on-disk.md` says the same in words.
//!
//! All numbers are little-endian. Checksums are CRC-32 (IEEE 802.3, reflected polynomial 0xEDB88320), as computed
//! by crc32fast. Everything read is untrusted until a `decode` function here returned it.

mod checkpoint;
mod frame;
mod superblock;

pub use checkpoint::{Checkpoint, CheckpointRow, CheckpointSegment, ROW_BYTES, encode_checkpoint};
pub use frame::{
    ENTRY_BYTES, Entries, Entry, EntryKind, EntryRef, FRAME_DATA_BLOCKS, FRAME_FIXED_BYTES,
    FRAME_HEADER_BLOCKS, FrameHeader, PROGRESS_OFFSET, Progress,
};
pub use superblock::Superblock;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::units::{BLOCK_BYTES, ChunkIndex, LEAF_BLOCKS, LayerId};

/// The format this code reads and writes; an unknown one is refused.
pub const FORMAT_VERSION: u32 = 1;
/// First bytes of a superblock.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"ASHLARSB";
/// First bytes of a frame header.
pub const FRAME_MAGIC: [u8; 8] = *b"ASHLARFR";
/// First bytes of a checkpoint.
pub const CHECKPOINT_MAGIC: [u8; 8] = *b"ASHLARCP";
/// Blocks before the first checkpoint area; the superblock copies live here, 256 KiB apart.
pub const RESERVED_BLOCKS: u32 = 256;
/// Where the copies of the even and the odd superblock generation are.
pub const SUPERBLOCK_BLOCKS: [[u32; 2]; 2] = [[0, 64], [128, 192]];

/// 2^64 by the golden ratio. No nine bits in a row of it are alike, so that a change of any bit it is multiplied with
/// changes the highest nine of the product.
const CHECK_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A word whose lowest `used` bits are `bits` and whose others, at least nine, check them: a word with one bit changed, or
/// one that is zero, is none of these. For words in the tail that change with one store each.
pub(crate) fn with_check(bits: u64, used: u32) -> u64 {
    debug_assert!(used <= 55 && bits >> used == 0);
    let check = bits.wrapping_add(1).wrapping_mul(CHECK_FACTOR);
    bits | check & !((1 << used) - 1)
}

/// A block's place in the store, counted in blocks from its start. 32 bits reach 16 TiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(pub u32);

impl Addr {
    /// Never written: reads as zeros, or as the parent layer.
    pub const UNMAPPED: Addr = Addr(0);
    /// Written as zeros or trimmed: reads as zeros and masks the parent layer.
    pub const ZERO: Addr = Addr(1);
    /// The mapping was damaged on disk: reads fail until the block is written again.
    pub const LOST: Addr = Addr(2);

    /// Whether this names blocks in a segment (and not one of the markers above).
    pub fn is_stored(self) -> bool {
        self.0 >= RESERVED_BLOCKS
    }

    /// Byte offset in the store.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * BLOCK_BYTES as u64
    }
}

/// Where the parts of a store are. Fixed when the store is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks in a segment; a power of two.
    pub segment_blocks: u32,
    /// How many segments the store may grow to.
    pub segments_max: u32,
    /// Blocks in each of the two checkpoint areas.
    pub checkpoint_blocks: u32,
}

impl Geometry {
    /// The largest geometry that fits in `bytes`, or `None` when that is too small to be a store.
    pub fn for_size(bytes: u64, segment_blocks: Option<u32>) -> Option<Geometry> {
        let blocks = u32::try_from(bytes / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
        // 256 to 512 segments in a small store, 16 MiB each in a large one: cleaning needs many to choose from.
        let segment_blocks =
            segment_blocks.unwrap_or_else(|| (blocks / 512).next_power_of_two().clamp(256, 4096));
        // The directory of a dense store is 0.013 % of it; 1 % leaves room for very sparse volumes.
        let checkpoint_blocks = (blocks / 100).max(64);
        let left = blocks.checked_sub(RESERVED_BLOCKS + 2 * checkpoint_blocks)?;
        let segments_max = left / segment_blocks;
        (segments_max >= 16).then_some(Geometry {
            segment_blocks,
            segments_max,
            checkpoint_blocks,
        })
    }

    /// First block of the first segment.
    pub fn first_segment_block(&self) -> u32 {
        RESERVED_BLOCKS + 2 * self.checkpoint_blocks
    }

    /// First block of segment `segment`.
    pub fn segment_start(&self, segment: u32) -> Addr {
        Addr(self.first_segment_block() + segment * self.segment_blocks)
    }

    /// The segment that holds `addr`, which must be a stored address of this store.
    pub fn segment_of(&self, addr: Addr) -> u32 {
        (addr.0 - self.first_segment_block()) >> self.segment_blocks.trailing_zeros()
    }

    /// Whether `count` blocks at `addr` lie inside one segment.
    pub fn contains(&self, addr: Addr, count: u32) -> bool {
        let first = self.first_segment_block();
        let end = first + self.segments_max * self.segment_blocks;
        count > 0
            && addr.0 >= first
            && addr.0.checked_add(count).is_some_and(|e| e <= end)
            && self.segment_of(addr) == self.segment_of(Addr(addr.0 + count - 1))
    }

    /// First block of checkpoint area 0 or 1.
    pub fn checkpoint_start(&self, area: u32) -> Addr {
        Addr(RESERVED_BLOCKS + area * self.checkpoint_blocks)
    }

    /// Bytes from the store's start to the end of its last possible segment.
    pub fn total_bytes(&self) -> u64 {
        (u64::from(self.first_segment_block())
            + u64::from(self.segments_max) * u64::from(self.segment_blocks))
            * BLOCK_BYTES as u64
    }

    fn is_sane(&self) -> bool {
        let total = u64::from(RESERVED_BLOCKS)
            + 2 * u64::from(self.checkpoint_blocks)
            + u64::from(self.segments_max) * u64::from(self.segment_blocks);
        self.segment_blocks.is_power_of_two()
            && (16..=1 << 20).contains(&self.segment_blocks)
            && self.segments_max >= 4
            && self.checkpoint_blocks > 0
            && total <= u64::from(u32::MAX)
    }
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The first bytes are those of something else.
    #[error("no Ashlar signature")]
    Magic,
    /// The checksum does not match.
    #[error("checksum mismatch")]
    Checksum,
    /// Written by a later version of Ashlar.
    #[error("format version {0} (this daemon knows {FORMAT_VERSION})")]
    Version(u32),
    /// Checksum right, content impossible.
    #[error("impossible {0}")]
    Invalid(&'static str),
}

/// A chunk of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentKey {
    /// The layer.
    pub layer: LayerId,
    /// The chunk of the volume.
    pub chunk: ChunkIndex,
}

/// Blocks of a leaf on disk.
pub const LEAF_DISK_BLOCKS: u32 = 2;
/// Bytes of a leaf on disk, and in memory.
pub const LEAF_DISK_BYTES: usize = LEAF_DISK_BLOCKS as usize * BLOCK_BYTES;

/// What a leaf says of one block, and what a directory row says of one leaf; 16 bytes on disk as in memory.
#[derive(
    FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy, Debug, PartialEq, Eq, Default,
)]
#[repr(C)]
pub struct Mapping {
    addr: u32,
    /// CRC-32 of what lies at `addr`.
    pub crc: u32,
    /// The version of the write that put it there; of a leaf, the highest in it.
    pub version: u64,
}
const _: () = assert!(size_of::<Mapping>() * LEAF_BLOCKS as usize == LEAF_DISK_BYTES);
#[cfg(not(target_endian = "little"))]
compile_error!("leaves are kept in memory as they lie on disk, little-endian");

impl Mapping {
    /// Never written.
    pub const UNMAPPED: Mapping = Mapping {
        addr: 0,
        crc: 0,
        version: 0,
    };

    /// A mapping to `addr`.
    pub fn new(addr: Addr, crc: u32, version: u64) -> Mapping {
        Mapping {
            addr: addr.0,
            crc,
            version,
        }
    }

    /// Where the block or leaf lies.
    pub fn addr(&self) -> Addr {
        Addr(self.addr)
    }
}

/// The entries of a leaf.
pub type LeafEntries = [Mapping; LEAF_BLOCKS as usize];
