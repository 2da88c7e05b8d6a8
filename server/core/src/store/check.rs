//! Looking at a store offline: nothing here writes.

use std::collections::BTreeMap;

use super::format::{
    Addr, ExtentKey, LEAF_DISK_BYTES, LeafEntries, Mapping, SUPERBLOCK_BLOCKS, Superblock,
};
use super::log::{LogReader, data_is_whole};
use super::open::{BlockingDisk, OpenError};
use super::root::{read_checkpoint, read_superblock, require_segments};
use super::{AlignedBuf, Geometry};
use crate::units::{BLOCK_BYTES, LEAF_BLOCKS, LayerId, StoreId};

/// What a store says of itself without being opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// This store.
    pub store: StoreId,
    /// The daemon it belongs to.
    pub node: [u8; 16],
    /// Where its parts are.
    pub geometry: Geometry,
    /// Closed in order.
    pub clean: bool,
    /// How often it was opened.
    pub incarnation: u64,
    /// When it was made, milliseconds since 1970 UTC.
    pub created_unix_ms: u64,
    /// Number of the newest checkpoint.
    pub checkpoint_seq: u64,
    /// Its bytes.
    pub checkpoint_bytes: u64,
    /// The last client frame in that checkpoint.
    pub checkpoint_frame: u64,
    /// Client frames behind it.
    pub frames: u64,
    /// Blocks these take.
    pub frame_blocks: u64,
    /// Where the log goes on.
    pub log_end: Addr,
    /// Segments allocated.
    pub segments: u32,
    /// Of these, free.
    pub segments_free: u32,
    /// Of these, damaged.
    pub segments_damaged: u32,
    /// Blocks that hold client data, as of the checkpoint.
    pub mapped_blocks: u64,
    /// Layers and the chunks each has here.
    pub layers: Vec<(LayerId, u64)>,
    /// Layers being given back.
    pub dropping: Vec<LayerId>,
}

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckFinding {
    /// A copy of the superblock is damaged; others are in use.
    #[error("superblock copy at block {0} is damaged (another copy is in use)")]
    SuperblockCopy(u32),
    /// The log is damaged behind the checkpoint.
    #[error("the log is damaged at block {}", .0.0)]
    Log(Addr),
    /// A leaf is damaged: the 2 MiB it maps cannot be found.
    #[error("the index of layer {} chunk {} blocks {first}..{} is damaged (leaf at block {})", key.layer.0, key.chunk.0, first + LEAF_BLOCKS, at.0)]
    Leaf {
        /// The chunk.
        key: ExtentKey,
        /// First block it maps.
        first: u32,
        /// Where the leaf lies.
        at: Addr,
    },
    /// A block is not what was written.
    #[error("layer {} chunk {} block {block} does not match its checksum (at block {})", key.layer.0, key.chunk.0, at.0)]
    Block {
        /// The chunk.
        key: ExtentKey,
        /// The block in it.
        block: u32,
        /// Where it lies.
        at: Addr,
    },
    /// The device could not read.
    #[error("the device failed to read {blocks} blocks at block {}: {error}", at.0)]
    Device {
        /// Where.
        at: Addr,
        /// How many.
        blocks: u32,
        /// The error.
        error: super::DiskError,
    },
}

/// Findings that a report lists one by one. A store whose device is gone has as many as blocks, and nobody reads more.
pub const CHECK_FINDINGS_MAX: usize = 1000;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong, in the order it was met; the first [`CHECK_FINDINGS_MAX`] of it.
    pub findings: Vec<CheckFinding>,
    /// What else is wrong, counted only.
    pub findings_left_out: u64,
    /// Leaves read.
    pub leaves: u64,
    /// Blocks read and compared.
    pub blocks: u64,
    /// Log frames behind the checkpoint, read and compared.
    pub frames: u64,
}

impl CheckReport {
    fn add(&mut self, finding: CheckFinding) {
        if self.findings.len() < CHECK_FINDINGS_MAX {
            self.findings.push(finding);
        } else {
            self.findings_left_out += 1;
        }
    }
}

/// Reads the superblock, the checkpoint and the headers of the log behind it.
pub fn inspect(disk: &mut impl BlockingDisk) -> Result<Inspection, OpenError> {
    let (superblock, _) = read_superblock(disk)?;
    let checkpoint = read_checkpoint(disk, &superblock)?;
    let mut reader = LogReader::new(superblock.store, superblock.geometry, &checkpoint);
    let (mut frames, mut frame_blocks) = (0, 0);
    while let Some(frame) = reader.next(disk)? {
        frames += 1;
        frame_blocks += u64::from(frame.header.blocks());
    }
    let mut layers: BTreeMap<LayerId, u64> = BTreeMap::new();
    for row in &checkpoint.rows {
        *layers.entry(row.key.layer).or_default() += 1;
    }
    let (segment, block) = reader.position();
    Ok(Inspection {
        store: superblock.store,
        node: superblock.node,
        geometry: superblock.geometry,
        clean: superblock.clean,
        incarnation: superblock.incarnation,
        created_unix_ms: superblock.created_unix_ms,
        checkpoint_seq: superblock.checkpoint_seq,
        checkpoint_bytes: superblock.checkpoint_bytes,
        checkpoint_frame: checkpoint.hot_seq,
        frames,
        frame_blocks,
        log_end: Addr(superblock.geometry.segment_start(segment).0 + block),
        segments: checkpoint.segments.len() as u32,
        segments_free: checkpoint.segments.iter().filter(|s| s.free).count() as u32,
        segments_damaged: checkpoint.segments.iter().filter(|s| s.damaged).count() as u32,
        mapped_blocks: checkpoint.mapped_blocks,
        layers: layers.into_iter().collect(),
        dropping: checkpoint.drops,
    })
}

/// Reads everything the store refers to and compares it with its checksums. `progress` is told blocks done and
/// blocks to do.
pub fn check(
    disk: &mut impl BlockingDisk,
    mut progress: impl FnMut(u64, u64),
) -> Result<CheckReport, OpenError> {
    let mut report = CheckReport::default();
    let (superblock, _) = read_superblock(disk)?;
    check_superblock_copies(disk, &superblock, &mut report);
    let checkpoint = read_checkpoint(disk, &superblock)?;
    let geometry = superblock.geometry;
    let mut reader = LogReader::new(superblock.store, geometry, &checkpoint);
    let mut frames = Vec::new();
    let unreadable = loop {
        match reader.next(disk) {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    require_segments(disk, &geometry, reader.segments)?;
    let (segment, block) = reader.position();
    let at = Addr(geometry.segment_start(segment).0 + block);
    if let Some(error) = unreadable {
        report.add(CheckFinding::Device {
            at,
            blocks: 1,
            error,
        });
    }
    if reader.end_is_damaged(disk)? {
        report.add(CheckFinding::Log(at));
    }
    // Behind the last frame known durable a power cut may have left torn frames; recovery ends the log there.
    let durable = frames
        .last()
        .map_or(checkpoint.hot_seq, |f| f.header.durable_seq);
    for frame in &frames {
        report.frames += 1;
        report.blocks += u64::from(frame.header.progress.data_blocks);
        match data_is_whole(disk, frame) {
            Ok(whole) if whole || frame.header.seq > durable => {}
            Ok(_) => report.add(CheckFinding::Log(frame.header.addr)),
            Err(error) => report.add(CheckFinding::Device {
                at: frame.header.addr,
                blocks: frame.header.blocks(),
                error,
            }),
        }
    }
    let total = checkpoint.mapped_blocks.max(1);
    let mut bytes = AlignedBuf::zeroed(LEAF_DISK_BYTES);
    for row in &checkpoint.rows {
        for (i, mapping) in row.leaves.iter().enumerate() {
            if !mapping.addr().is_stored() {
                continue;
            }
            report.leaves += 1;
            let first = i as u32 * LEAF_BLOCKS;
            let damaged = CheckFinding::Leaf {
                key: row.key,
                first,
                at: mapping.addr(),
            };
            if let Err(error) = disk.read(mapping.addr().offset(), &mut bytes) {
                report.add(CheckFinding::Device {
                    at: mapping.addr(),
                    blocks: 2,
                    error,
                });
                continue;
            }
            if crc32fast::hash(&bytes) != mapping.crc {
                report.add(damaged);
                continue;
            }
            let mut entries: Box<LeafEntries> = Box::new([Mapping::UNMAPPED; LEAF_BLOCKS as usize]);
            zerocopy::IntoBytes::as_mut_bytes(&mut *entries).copy_from_slice(&bytes);
            check_leaf(disk, &geometry, row.key, first, &entries, &mut report);
            progress(report.blocks.min(total), total);
        }
    }
    Ok(report)
}

fn check_superblock_copies(
    disk: &mut impl BlockingDisk,
    newest: &Superblock,
    report: &mut CheckReport,
) {
    let mut block = AlignedBuf::blocks(1);
    for (slot, copies) in SUPERBLOCK_BLOCKS.into_iter().enumerate() {
        for at in copies {
            let read = disk.read(Addr(at).offset(), &mut block);
            let current = slot as u64 == newest.generation % 2;
            let blank = block.iter().all(|&b| b == 0);
            let good =
                read.is_ok() && Superblock::decode(&block).is_ok_and(|s| !current || s == *newest);
            if !good && (current || !blank || read.is_err()) {
                report.add(CheckFinding::SuperblockCopy(at));
            }
        }
    }
}

fn check_leaf(
    disk: &mut impl BlockingDisk,
    geometry: &Geometry,
    key: ExtentKey,
    first: u32,
    entries: &LeafEntries,
    report: &mut CheckReport,
) {
    let mut i = 0;
    while i < entries.len() {
        let start = entries[i].addr();
        if !start.is_stored() {
            if start == Addr::LOST {
                report.add(CheckFinding::Block {
                    key,
                    block: first + i as u32,
                    at: start,
                });
            }
            i += 1;
            continue;
        }
        if !geometry.contains(start, 1) {
            report.add(CheckFinding::Block {
                key,
                block: first + i as u32,
                at: start,
            });
            i += 1;
            continue;
        }
        // Neighbours that lie side by side are read together.
        let mut n = 1;
        while i + n < entries.len() && n < 256 && entries[i + n].addr() == Addr(start.0 + n as u32)
        {
            n += 1;
        }
        let mut data = AlignedBuf::blocks(n as u32);
        match disk.read(start.offset(), &mut data) {
            Err(error) => report.add(CheckFinding::Device {
                at: start,
                blocks: n as u32,
                error,
            }),
            Ok(()) => {
                for (j, block) in data.chunks_exact(BLOCK_BYTES).enumerate() {
                    if crc32fast::hash(block) != entries[i + j].crc {
                        let at = Addr(start.0 + j as u32);
                        report.add(CheckFinding::Block {
                            key,
                            block: first + (i + j) as u32,
                            at,
                        });
                    }
                }
            }
        }
        report.blocks += n as u64;
        i += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_counted() {
        let mut report = CheckReport::default();
        for block in 0..CHECK_FINDINGS_MAX as u32 + 500 {
            report.add(CheckFinding::SuperblockCopy(block));
        }
        assert_eq!(report.findings.len(), CHECK_FINDINGS_MAX);
        assert_eq!(report.findings_left_out, 500);
        let last = CheckFinding::SuperblockCopy(CHECK_FINDINGS_MAX as u32 - 1);
        assert_eq!(report.findings.last(), Some(&last));
    }
}
