//! The superblock: whose store this is, and its newest checkpoint.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FORMAT_VERSION, FormatError, Geometry, SUPERBLOCK_MAGIC};
use crate::units::{BLOCK_BYTES, StoreId};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    /// Over the whole block with this field zero.
    crc: U32,
    format: U32,
    generation: U64,
    store: [u8; 16],
    node: [u8; 16],
    segment_blocks: U32,
    segments_max: U32,
    checkpoint_blocks: U32,
    clean: U32,
    incarnation: U64,
    tail_incarnation: U64,
    boot: [u8; 16],
    checkpoint_seq: U64,
    checkpoint_area: U32,
    checkpoint_crc: U32,
    checkpoint_bytes: U64,
    created_unix_ms: U64,
    reserved: [u8; 3960],
}
const _: () = assert!(size_of::<RawSuperblock>() == BLOCK_BYTES);

/// The root of a store: who it belongs to and which checkpoint is its newest. Written as two copies, alternately to
/// two slots, so that a torn write leaves the older one and a rotten block leaves its twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Rises with every superblock written; the newest valid one counts.
    pub generation: u64,
    /// This store.
    pub store: StoreId,
    /// The daemon it belongs to.
    pub node: [u8; 16],
    /// Where the parts are.
    pub geometry: Geometry,
    /// Closed in order: the checkpoint holds everything and no tail is wanted.
    pub clean: bool,
    /// How often the store was opened; frames carry it, so that a frame of an earlier life is known as such.
    pub incarnation: u64,
    /// The incarnation whose tail holds acknowledged writes.
    pub tail_incarnation: u64,
    /// The machine's boot in which the store was last opened: a tail of another boot is void.
    pub boot: [u8; 16],
    /// Rises with every checkpoint.
    pub checkpoint_seq: u64,
    /// Which of the two areas holds it.
    pub checkpoint_area: u32,
    /// CRC-32 of its bytes.
    pub checkpoint_crc: u32,
    /// Its length in bytes.
    pub checkpoint_bytes: u64,
    /// When the store was made, milliseconds since 1970 UTC.
    pub created_unix_ms: u64,
}

impl Superblock {
    /// Writes the superblock into `block` (one block).
    pub fn encode(&self, block: &mut [u8]) {
        let mut raw = RawSuperblock {
            magic: SUPERBLOCK_MAGIC,
            crc: U32::ZERO,
            format: U32::new(FORMAT_VERSION),
            generation: U64::new(self.generation),
            store: self.store.0.into_bytes(),
            node: self.node,
            segment_blocks: U32::new(self.geometry.segment_blocks),
            segments_max: U32::new(self.geometry.segments_max),
            checkpoint_blocks: U32::new(self.geometry.checkpoint_blocks),
            clean: U32::new(u32::from(self.clean)),
            incarnation: U64::new(self.incarnation),
            tail_incarnation: U64::new(self.tail_incarnation),
            boot: self.boot,
            checkpoint_seq: U64::new(self.checkpoint_seq),
            checkpoint_area: U32::new(self.checkpoint_area),
            checkpoint_crc: U32::new(self.checkpoint_crc),
            checkpoint_bytes: U64::new(self.checkpoint_bytes),
            created_unix_ms: U64::new(self.created_unix_ms),
            reserved: [0; 3960],
        };
        raw.crc = U32::new(crc32fast::hash(raw.as_bytes()));
        block.copy_from_slice(raw.as_bytes());
    }

    /// Reads one copy of a superblock.
    pub fn decode(block: &[u8]) -> Result<Superblock, FormatError> {
        let mut raw = RawSuperblock::read_from_bytes(block)
            .map_err(|_| FormatError::Invalid("superblock length"))?;
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(FormatError::Magic);
        }
        let crc = std::mem::replace(&mut raw.crc, U32::ZERO);
        if crc32fast::hash(raw.as_bytes()) != crc.get() {
            return Err(FormatError::Checksum);
        }
        if raw.format.get() != FORMAT_VERSION {
            return Err(FormatError::Version(raw.format.get()));
        }
        let geometry = Geometry {
            segment_blocks: raw.segment_blocks.get(),
            segments_max: raw.segments_max.get(),
            checkpoint_blocks: raw.checkpoint_blocks.get(),
        };
        if !geometry.is_sane() {
            return Err(FormatError::Invalid("geometry"));
        }
        if raw.checkpoint_area.get() > 1
            || raw.checkpoint_bytes.get()
                > u64::from(geometry.checkpoint_blocks) * BLOCK_BYTES as u64
            || raw.reserved.iter().any(|&b| b != 0)
        {
            return Err(FormatError::Invalid("superblock"));
        }
        Ok(Superblock {
            generation: raw.generation.get(),
            store: StoreId(uuid::Uuid::from_bytes(raw.store)),
            node: raw.node,
            geometry,
            clean: raw.clean.get() != 0,
            incarnation: raw.incarnation.get(),
            tail_incarnation: raw.tail_incarnation.get(),
            boot: raw.boot,
            checkpoint_seq: raw.checkpoint_seq.get(),
            checkpoint_area: raw.checkpoint_area.get(),
            checkpoint_crc: raw.checkpoint_crc.get(),
            checkpoint_bytes: raw.checkpoint_bytes.get(),
            created_unix_ms: raw.created_unix_ms.get(),
        })
    }
}
