//! Making a store, and finding its root: superblock and checkpoint.

use super::format::{
    Addr, Checkpoint, CheckpointSegment, FormatError, Geometry, RESERVED_BLOCKS, ROW_BYTES,
    SUPERBLOCK_BLOCKS, Superblock, encode_checkpoint,
};
use super::{AlignedBuf, BlockingDisk, DiskError, OpenError};
use crate::units::{BLOCK_BYTES, CHUNK_BLOCKS, StoreId};

/// Bytes of each checkpoint area that a new store allocates, at the least: the directory of 2 TiB written densely.
const AREA_BYTES_MIN: u64 = 16 << 20;

/// Lays out a new store on `disk`, destroying what is there: `initial_segments` are allocated at once.
pub fn format_store(
    disk: &mut impl BlockingDisk,
    geometry: Geometry,
    store: StoreId,
    node: [u8; 16],
    initial_segments: u32,
    now_unix_ms: u64,
) -> Result<(), OpenError> {
    let segments = initial_segments.clamp(4, geometry.segments_max);
    // A half-made store must not look like one: the superblock is written last.
    let zeros = AlignedBuf::blocks(RESERVED_BLOCKS);
    disk.write(0, &zeros)?;
    disk.sync()?;
    disk.allocate(
        geometry.segment_start(0).offset(),
        u64::from(segments) * u64::from(geometry.segment_blocks) * BLOCK_BYTES as u64,
    )?;
    // On a file system that fills up, a checkpoint must still find its place: it is what gives space back. Four times
    // the directory of a full store; a very sparse one may come to need more.
    let chunks = u64::from(geometry.segments_max) * u64::from(geometry.segment_blocks)
        / u64::from(CHUNK_BLOCKS);
    let area_bytes = (4 * chunks * ROW_BYTES as u64 + u64::from(geometry.segments_max) * 8)
        .max(AREA_BYTES_MIN)
        .next_multiple_of(BLOCK_BYTES as u64)
        .min(u64::from(geometry.checkpoint_blocks) * BLOCK_BYTES as u64);
    for area in 0..2 {
        disk.allocate(geometry.checkpoint_start(area).offset(), area_bytes)?;
    }
    let checkpoint = Checkpoint {
        store,
        seq: 1,
        hot_seq: 0,
        hot_incarnation: 0,
        hot_segment: 0,
        hot_block: 0,
        hot_next_segment: 1,
        mapped_blocks: 0,
        segments: (0..segments)
            .map(|s| CheckpointSegment {
                live: 0,
                free: s > 1,
                damaged: false,
            })
            .collect(),
        drops: Vec::new(),
        rows: Vec::new(),
    };
    let bytes = encode_checkpoint(&checkpoint, std::iter::empty());
    let mut area = AlignedBuf::zeroed(bytes.len().next_multiple_of(BLOCK_BYTES));
    area[..bytes.len()].copy_from_slice(&bytes);
    disk.write(geometry.checkpoint_start(0).offset(), &area)?;
    disk.sync()?;
    let superblock = Superblock {
        generation: 2,
        store,
        node,
        geometry,
        clean: true,
        incarnation: 0,
        tail_incarnation: 0,
        boot: [0; 16],
        checkpoint_seq: 1,
        checkpoint_area: 0,
        checkpoint_crc: crc32fast::hash(&bytes),
        checkpoint_bytes: bytes.len() as u64,
        created_unix_ms: now_unix_ms,
    };
    write_superblock(disk, &superblock)?;
    Ok(())
}

pub(super) fn write_superblock(
    disk: &mut impl BlockingDisk,
    superblock: &Superblock,
) -> Result<(), DiskError> {
    let mut block = AlignedBuf::blocks(1);
    superblock.encode(&mut block);
    for at in SUPERBLOCK_BLOCKS[(superblock.generation % 2) as usize] {
        disk.write(Addr(at).offset(), &block)?;
    }
    disk.sync()
}

/// The newest valid superblock, and how many of the copies of its generation and the one before are damaged or cannot be
/// read. One copy of each must be readable: else the newest of all may be the one that nobody can read.
pub(super) fn read_superblock(
    disk: &mut impl BlockingDisk,
) -> Result<(Superblock, u32), OpenError> {
    let mut block = AlignedBuf::blocks(1);
    let mut newest: Option<Superblock> = None;
    let (mut damaged, mut foreign, mut version) = (0, 0, None);
    for copies in SUPERBLOCK_BLOCKS {
        let mut unreadable = 0;
        for at in copies {
            match disk.read(Addr(at).offset(), &mut block) {
                Ok(()) => {}
                Err(e) if e.is_of_the_medium() && unreadable == 0 => {
                    unreadable += 1;
                    damaged += 1;
                    continue;
                }
                Err(e) => return Err(e.into()),
            }
            match Superblock::decode(&block) {
                Ok(s) => {
                    if newest.is_none_or(|n| n.generation < s.generation) {
                        newest = Some(s);
                    }
                }
                Err(FormatError::Version(v)) => version = Some(v),
                // The slot of the other generation is blank in a store that is new.
                Err(FormatError::Magic) => foreign += 1,
                Err(_) => damaged += 1,
            }
        }
    }
    match (newest, version) {
        (_, Some(v)) => Err(OpenError::Version(v)),
        (Some(s), _) => Ok((s, damaged)),
        (None, _) if foreign == 4 => Err(OpenError::NotAStore),
        (None, _) => Err(OpenError::SuperblockDamaged),
    }
}

pub(super) fn read_checkpoint(
    disk: &mut impl BlockingDisk,
    superblock: &Superblock,
) -> Result<Checkpoint, OpenError> {
    let geometry = &superblock.geometry;
    require_bytes(disk, geometry.segment_start(0).offset())?;
    let bytes = superblock.checkpoint_bytes as usize;
    let mut area = AlignedBuf::zeroed(bytes.next_multiple_of(BLOCK_BYTES));
    let start = geometry
        .checkpoint_start(superblock.checkpoint_area)
        .offset();
    for (i, piece) in area.chunks_mut(1 << 20).enumerate() {
        disk.read(start + (i << 20) as u64, piece)?;
    }
    let seq = superblock.checkpoint_seq;
    let damaged = |error| OpenError::CheckpointDamaged { seq, error };
    if crc32fast::hash(&area[..bytes]) != superblock.checkpoint_crc {
        return Err(damaged(FormatError::Checksum));
    }
    let checkpoint = Checkpoint::decode(&area[..bytes], geometry).map_err(damaged)?;
    if checkpoint.store != superblock.store || checkpoint.seq != seq {
        return Err(damaged(FormatError::Invalid("checkpoint of another store")));
    }
    require_segments(disk, geometry, checkpoint.segments.len() as u32)?;
    Ok(checkpoint)
}

/// Refuses a file or device that ends before the end of the first `segments` segments: each of them was written once with
/// zeros before a checkpoint or a frame named it, and what is read behind the end looks like a log that ends.
pub(super) fn require_segments(
    disk: &mut impl BlockingDisk,
    geometry: &Geometry,
    segments: u32,
) -> Result<(), OpenError> {
    require_bytes(disk, geometry.segment_start(segments).offset())
}

fn require_bytes(disk: &mut impl BlockingDisk, want: u64) -> Result<(), OpenError> {
    let have = disk.size_bytes()?;
    if have < want {
        return Err(OpenError::Truncated { want, have });
    }
    Ok(())
}
