//! The cold stream: frames of copies and of leaves, in segments of their own. What was old enough to be cleaned tends
//! to stay. Nothing here is needed by recovery: until a checkpoint refers to a copy, the original is still where it was.

use std::collections::VecDeque;

use super::apply::Blocked;
use super::format::{
    Addr, Entry, EntryKind, ExtentKey, FRAME_DATA_BLOCKS, FRAME_FIXED_BYTES, FRAME_HEADER_BLOCKS,
    FrameHeader, LEAF_DISK_BLOCKS, Progress,
};
use super::machine::Io;
use super::{Action, AlignedBuf, Store};
use crate::units::BLOCK_BYTES;

/// Frames of copies in flight at once.
pub(super) const COLD_FRAMES: usize = 4;

/// A frame of copies or leaves.
pub(super) struct ColdFrame {
    buf: AlignedBuf,
    addr: Addr,
    progress: Progress,
    data_max: u32,
    /// Each entry, and where its blocks were before.
    pub(super) entries: Vec<(Entry, Option<Addr>)>,
}

/// The cold stream.
#[derive(Default)]
pub(super) struct Cold {
    /// The segment being written, and its next block.
    pub(super) segment: Option<(u32, u32)>,
    building: Option<Box<ColdFrame>>,
    pub(super) in_flight: usize,
    seq: u64,
    /// Blocks copied that no leaf points at yet.
    pub(super) unapplied: usize,
    /// Copies that are written: key, first block, count, version, where they were, where they are.
    moved: VecDeque<Moved>,
}

struct Moved {
    key: ExtentKey,
    block: u32,
    count: u32,
    version: u64,
    from: Addr,
    to: Addr,
    /// The last of its frame, and the segment that is in.
    ends: Option<u32>,
}

impl Cold {
    /// Whether every frame is written and every copy is where reads look.
    pub(super) fn is_quiet(&self) -> bool {
        self.building.is_none() && self.in_flight == 0 && self.moved.is_empty()
    }
}

impl Store {
    /// Adds an entry and its data; the address of its first data block. `None`: no segment is free.
    pub(super) fn add_cold(
        &mut self,
        mut entry: Entry,
        data: &[u8],
        from: Option<Addr>,
    ) -> Option<Addr> {
        let blocks = (data.len() / BLOCK_BYTES) as u32;
        if self.cold.building.as_ref().is_some_and(|f| {
            FRAME_FIXED_BYTES + usize::from(f.progress.entry_bytes) + entry.header_bytes()
                > BLOCK_BYTES
                || u32::from(f.progress.data_blocks) + blocks > f.data_max
        }) {
            self.flush_cold();
        }
        if self.cold.building.is_none() {
            self.begin_cold(blocks)?;
        }
        let frame = self.cold.building.as_mut().expect("just begun");
        let start = u32::from(frame.progress.data_blocks);
        entry.data_start = start;
        let at = FRAME_FIXED_BYTES + usize::from(frame.progress.entry_bytes);
        entry.encode(&mut frame.buf[at..]);
        let mut offset = at + super::format::ENTRY_BYTES;
        for block in data.chunks_exact(BLOCK_BYTES) {
            let crc = crc32fast::hash(block);
            frame.buf[offset..offset + 4].copy_from_slice(&crc.to_le_bytes());
            offset += 4;
        }
        let to = (FRAME_HEADER_BLOCKS + start) as usize * BLOCK_BYTES;
        frame.buf[to..to + data.len()].copy_from_slice(data);
        frame.progress.entries += 1;
        frame.progress.entry_bytes = (offset - FRAME_FIXED_BYTES) as u16;
        frame.progress.data_blocks += blocks as u16;
        frame.entries.push((entry, from));
        if entry.kind == EntryKind::Relocation {
            self.cold.unapplied += blocks as usize;
        }
        Some(Addr(frame.addr.0 + FRAME_HEADER_BLOCKS + start))
    }

    fn begin_cold(&mut self, blocks: u32) -> Option<()> {
        let segment_blocks = self.segments.geometry.segment_blocks;
        let fits = |next: u32| next + FRAME_HEADER_BLOCKS + blocks <= segment_blocks;
        if !self.cold.segment.is_some_and(|(_, next)| fits(next)) {
            let fresh = self.segments.take(0)?;
            if let Some((full, _)) = self.cold.segment.replace((fresh, 0)) {
                self.segments.seal(full);
            }
        }
        let (segment, next) = self.cold.segment.expect("just set");
        let data_max = (segment_blocks - next - FRAME_HEADER_BLOCKS).min(FRAME_DATA_BLOCKS);
        self.segments.all[segment as usize].filling += 1;
        self.cold.building = Some(Box::new(ColdFrame {
            buf: AlignedBuf::blocks(FRAME_HEADER_BLOCKS + data_max),
            addr: Addr(self.segments.geometry.segment_start(segment).0 + next),
            progress: Progress {
                cold: true,
                ..Progress::default()
            },
            data_max,
            entries: Vec::new(),
        }));
        Some(())
    }

    /// Writes the frame that is being built, full or not.
    pub(super) fn flush_cold(&mut self) {
        let Some(mut frame) = self.cold.building.take() else {
            return;
        };
        self.cold.seq += 1;
        frame.progress.closed = true;
        let header = FrameHeader {
            addr: frame.addr,
            store: self.superblock.store,
            progress: frame.progress,
            incarnation: self.hot.incarnation,
            seq: self.cold.seq,
            durable_seq: 0,
            checkpoint_seq: self.superblock.checkpoint_seq,
            next_segment: 0,
        };
        header.encode(&mut frame.buf);
        FrameHeader::seal(&mut frame.buf[..BLOCK_BYTES]);
        let blocks = header.blocks();
        if let Some((_, next)) = &mut self.cold.segment {
            *next += blocks;
        }
        // Leaves are counted where they are written; their frames' headers and all copies count here.
        let leaves = frame
            .entries
            .iter()
            .filter(|(e, _)| e.kind == EntryKind::Leaf)
            .count() as u64;
        let copied = u64::from(blocks) - leaves * u64::from(LEAF_DISK_BLOCKS);
        self.counters.cleaned_blocks += copied;
        self.cleaner.copied += copied;
        self.cold.in_flight += 1;
        let (ptr, len, offset) = (
            frame.buf.as_ptr(),
            blocks as usize * BLOCK_BYTES,
            frame.addr.offset(),
        );
        let io = self.start_io(Io::Cold(frame));
        self.actions.push(Action::Write {
            io,
            offset,
            ptr,
            len,
            durable: false,
        });
    }

    pub(super) fn on_cold(&mut self, frame: ColdFrame) {
        self.cold.in_flight -= 1;
        self.leaves_written(&frame);
        let queued = self.cold.moved.len();
        for (entry, from) in &frame.entries {
            if let (EntryKind::Relocation, Some(from)) = (entry.kind, from) {
                self.cold.moved.push_back(Moved {
                    key: entry.key,
                    block: entry.first_block,
                    count: entry.count,
                    version: entry.version,
                    from: *from,
                    to: Addr(frame.addr.0 + FRAME_HEADER_BLOCKS + entry.data_start),
                    ends: None,
                });
            }
        }
        let segment = self.segments.geometry.segment_of(frame.addr);
        if self.cold.moved.len() > queued {
            let last = self.cold.moved.back_mut().expect("just pushed");
            last.ends = Some(segment);
        } else {
            self.segments.filled(segment);
        }
    }

    /// Points the leaves at the copies.
    pub(super) fn apply_moved(&mut self) {
        while let Some(moved) = self.cold.moved.front_mut() {
            if moved.count == 0 {
                if let Some(segment) = moved.ends {
                    self.segments.filled(segment);
                }
                self.cold.moved.pop_front();
                continue;
            }
            let (key, block, version, from, to) =
                (moved.key, moved.block, moved.version, moved.from, moved.to);
            let row = self
                .index
                .row_of(key)
                .filter(|&r| !self.index.row(r).dropped);
            if let Some(row) = row
                && let Err(Blocked) = self.relocate_block(row, block, version, from, to)
            {
                return;
            }
            let moved = self.cold.moved.front_mut().expect("looked at above");
            self.cold.unapplied -= 1;
            moved.block += 1;
            moved.count -= 1;
            moved.from.0 += 1;
            moved.to.0 += 1;
        }
    }
}
