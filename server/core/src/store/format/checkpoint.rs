//! Checkpoints: segment table and directory at one point of the log.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Addr, CHECKPOINT_MAGIC, ExtentKey, FormatError, Geometry, LEAF_DISK_BLOCKS, Mapping};
use crate::units::{BLOCK_BYTES, CHUNK_LEAVES, ChunkIndex, LayerId, StoreId};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawCheckpoint {
    magic: [u8; 8],
    store: [u8; 16],
    seq: U64,
    hot_seq: U64,
    hot_incarnation: U64,
    mapped_blocks: U64,
    hot_segment: U32,
    hot_block: U32,
    hot_next_segment: U32,
    segments: U32,
    rows: U32,
    drops: U32,
    reserved: [u8; 16],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSegment {
    live: U32,
    state: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRowKey {
    layer: U64,
    chunk: U32,
    reserved: U32,
}

/// What a checkpoint says of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointSegment {
    /// Blocks in it that a leaf or the directory refers to.
    pub live: u32,
    /// Whether it may be written.
    pub free: bool,
    /// Whether part of it could not be read back: it is never cleaned nor freed.
    pub damaged: bool,
}

/// A directory row as it lies in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRow {
    /// The chunk.
    pub key: ExtentKey,
    /// Its leaves.
    pub leaves: [Mapping; CHUNK_LEAVES as usize],
}

/// The state of a store at one point of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The store.
    pub store: StoreId,
    /// As in the superblock.
    pub seq: u64,
    /// Every client frame up to this one is in the leaves; none after it is.
    pub hot_seq: u64,
    /// Frames after `hot_seq` carry at least this incarnation.
    pub hot_incarnation: u64,
    /// Where frame `hot_seq + 1` begins.
    pub hot_segment: u32,
    /// Its first block, counted in the segment.
    pub hot_block: u32,
    /// Where the log goes on after that segment.
    pub hot_next_segment: u32,
    /// Blocks that hold data of clients.
    pub mapped_blocks: u64,
    /// The segments allocated so far.
    pub segments: Vec<CheckpointSegment>,
    /// Layers whose blocks are still being given back.
    pub drops: Vec<LayerId>,
    /// The directory.
    pub rows: Vec<CheckpointRow>,
}

/// Appends rows to a checkpoint without building a [`Checkpoint`] first.
pub fn encode_checkpoint<'a>(
    head: &Checkpoint,
    rows: impl ExactSizeIterator<Item = (ExtentKey, &'a [Mapping; CHUNK_LEAVES as usize])>,
) -> Vec<u8> {
    let count = rows.len();
    let mut out = Vec::with_capacity(
        size_of::<RawCheckpoint>()
            + head.segments.len() * size_of::<RawSegment>()
            + head.drops.len() * 8
            + count * ROW_BYTES
            + BLOCK_BYTES,
    );
    out.extend_from_slice(
        RawCheckpoint {
            magic: CHECKPOINT_MAGIC,
            store: head.store.0.into_bytes(),
            seq: U64::new(head.seq),
            hot_seq: U64::new(head.hot_seq),
            hot_incarnation: U64::new(head.hot_incarnation),
            mapped_blocks: U64::new(head.mapped_blocks),
            hot_segment: U32::new(head.hot_segment),
            hot_block: U32::new(head.hot_block),
            hot_next_segment: U32::new(head.hot_next_segment),
            segments: U32::new(head.segments.len() as u32),
            rows: U32::new(count as u32),
            drops: U32::new(head.drops.len() as u32),
            reserved: [0; 16],
        }
        .as_bytes(),
    );
    for s in &head.segments {
        let state = u8::from(s.free) | u8::from(s.damaged) << 1;
        out.extend_from_slice(
            RawSegment {
                live: U32::new(s.live),
                state,
                reserved: [0; 3],
            }
            .as_bytes(),
        );
    }
    for layer in &head.drops {
        out.extend_from_slice(&layer.0.to_le_bytes());
    }
    for (key, leaves) in rows {
        out.extend_from_slice(
            RawRowKey {
                layer: U64::new(key.layer.0),
                chunk: U32::new(key.chunk.0),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(leaves.as_bytes());
    }
    out
}

/// Bytes of a directory row in a checkpoint.
pub const ROW_BYTES: usize = size_of::<RawRowKey>() + size_of::<Mapping>() * CHUNK_LEAVES as usize;

impl Checkpoint {
    /// Reads a checkpoint whose checksum was found right.
    pub fn decode(bytes: &[u8], geometry: &Geometry) -> Result<Checkpoint, FormatError> {
        let (raw, mut rest) = RawCheckpoint::read_from_prefix(bytes)
            .map_err(|_| FormatError::Invalid("checkpoint length"))?;
        if raw.magic != CHECKPOINT_MAGIC {
            return Err(FormatError::Magic);
        }
        let segment_count = raw.segments.get();
        if segment_count > geometry.segments_max
            || raw.hot_segment.get() >= segment_count
            || raw.hot_next_segment.get() >= segment_count
            || raw.hot_block.get() > geometry.segment_blocks
        {
            return Err(FormatError::Invalid("checkpoint segments"));
        }
        let mut segments = Vec::with_capacity(segment_count as usize);
        for _ in 0..segment_count {
            let (s, left) = RawSegment::read_from_prefix(rest)
                .map_err(|_| FormatError::Invalid("segment table"))?;
            if s.live.get() > geometry.segment_blocks || s.state > 3 {
                return Err(FormatError::Invalid("segment"));
            }
            segments.push(CheckpointSegment {
                live: s.live.get(),
                free: s.state & 1 != 0,
                damaged: s.state & 2 != 0,
            });
            rest = left;
        }
        let mut drops = Vec::new();
        for _ in 0..raw.drops.get() {
            let (d, left) =
                U64::read_from_prefix(rest).map_err(|_| FormatError::Invalid("drop list"))?;
            drops.push(LayerId(d.get()));
            rest = left;
        }
        let mut rows = Vec::with_capacity((raw.rows.get() as usize).min(rest.len() / ROW_BYTES));
        for _ in 0..raw.rows.get() {
            let (k, left) =
                RawRowKey::read_from_prefix(rest).map_err(|_| FormatError::Invalid("directory"))?;
            let (leaves, left) = <[Mapping; CHUNK_LEAVES as usize]>::read_from_prefix(left)
                .map_err(|_| FormatError::Invalid("row"))?;
            for leaf in &leaves {
                let addr = leaf.addr();
                if addr != Addr::UNMAPPED
                    && addr != Addr::ZERO
                    && !geometry.contains(addr, LEAF_DISK_BLOCKS)
                {
                    return Err(FormatError::Invalid("leaf address"));
                }
            }
            let key = ExtentKey {
                layer: LayerId(k.layer.get()),
                chunk: ChunkIndex(k.chunk.get()),
            };
            rows.push(CheckpointRow { key, leaves });
            rest = left;
        }
        Ok(Checkpoint {
            store: StoreId(uuid::Uuid::from_bytes(raw.store)),
            seq: raw.seq.get(),
            hot_seq: raw.hot_seq.get(),
            hot_incarnation: raw.hot_incarnation.get(),
            hot_segment: raw.hot_segment.get(),
            hot_block: raw.hot_block.get(),
            hot_next_segment: raw.hot_next_segment.get(),
            mapped_blocks: raw.mapped_blocks.get(),
            segments,
            drops,
            rows,
        })
    }
}
