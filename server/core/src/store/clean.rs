//! Cleaning: the live blocks of the emptiest segments are copied together, through the cold stream, so that whole
//! segments become free.

use super::apply::Blocked;
use super::cold::COLD_FRAMES;
use super::format::{
    Addr, Entries, Entry, EntryKind, FRAME_DATA_BLOCKS, FRAME_FIXED_BYTES, FRAME_HEADER_BLOCKS,
    FrameHeader, LEAF_DISK_BLOCKS,
};
use super::index::leaf_of;
use super::machine::Io;
use super::segment::{Segment, SegmentState};
use super::{Action, AlignedBuf, Errno, Event, Store, StoreError};
use crate::units::{BLOCK_BYTES, LEAF_BLOCKS};

/// Blocks copied per block that clients write, at the most: victims are at most 15/16 live.
const CREDIT: u64 = 16;
/// Blocks looked at in one turn.
const BUDGET: u32 = 2048;
/// Blocks read at once, and how many such reads are in flight.
const PIECE_BLOCKS: u32 = 256;
const PIECES: usize = 2;
/// Leaves read ahead.
const LOADS: usize = 64;

/// What cleaning is at.
#[derive(Default)]
pub(super) struct Cleaner {
    victim: Option<Victim>,
    /// Blocks copied so far.
    pub(super) copied: u64,
    /// Segments that are empty and those that the checkpoint under way makes free, when last counted.
    pub(super) coming: usize,
    /// Nothing can be copied before a checkpoint gives segments back.
    pub(super) stuck: bool,
}

impl Cleaner {
    pub(super) fn running(&self) -> bool {
        self.victim.is_some()
    }
}

struct Victim {
    segment: u32,
    buf: AlignedBuf,
    /// Blocks asked for and blocks here.
    asked: u32,
    read: u32,
    reads_in_flight: usize,
    failed: bool,
    /// The frame being looked at, its header entry, and blocks of that entry done.
    frame: u32,
    entry: usize,
    block: u32,
    /// Incarnation and number of the last frame: stale ones behind the end are smaller.
    last: (u64, u64),
}

impl Store {
    pub(super) fn advance_clean(&mut self) {
        if self.checkpoint.holds_apply() {
            return;
        }
        self.apply_moved();
        if self.checkpoint.holds_cleaning() {
            return;
        }
        if self.cleaner.victim.is_none() {
            if !self.wants_cleaning() {
                if !self.checkpoint.running() {
                    self.flush_cold();
                }
                return;
            }
            self.cleaner.coming = self.segments.count_empty(self.hot.applied_seq)
                + self.checkpoint.segments_freeing();
            if self.cleaner.coming >= self.clean_batch() {
                self.flush_cold();
                return;
            }
            let Some(segment) = self.pick_victim() else {
                self.cleaner.stuck = true;
                self.flush_cold();
                return;
            };
            self.cleaner.stuck = false;
            self.segments.all[segment as usize].reads += 1;
            self.cleaner.victim = Some(Victim {
                segment,
                buf: AlignedBuf::blocks(self.segments.geometry.segment_blocks),
                asked: 0,
                read: 0,
                reads_in_flight: 0,
                failed: false,
                frame: 0,
                entry: FRAME_FIXED_BYTES,
                block: 0,
                last: (0, 0),
            });
        }
        self.read_victim();
        self.look_at_victim();
    }

    fn wants_cleaning(&self) -> bool {
        if self.wants_growth() && self.growth.retry_at_ms.is_none() {
            return false;
        }
        // A store that cannot reach its goal must not copy for ever: at most what clients' writes can need, unless
        // one of them waits.
        let worth =
            CREDIT * (self.counters.log_blocks + u64::from(self.segments.geometry.segment_blocks));
        self.segments.free_count() <= self.clean_start()
            && (self.cleaner.copied < worth || self.want_ready)
    }

    pub(super) fn debug_cleaning(&self) -> String {
        let seq = self.superblock.checkpoint_seq;
        let count = |f: &dyn Fn(&super::segment::Segment) -> bool| {
            self.segments.all.iter().filter(|&s| f(s)).count()
        };
        format!(
            "want {} stuck {} copied {} sealed {} put off {} damaged {} quiet {} cold {:?} checkpoint {seq}",
            self.want_ready,
            self.cleaner.stuck,
            self.cleaner.copied,
            count(&|s| s.state == SegmentState::Sealed),
            count(&|s| s.clean_after > seq),
            count(&|s| s.damaged),
            self.cold.is_quiet(),
            self.cold.segment,
        )
    }

    /// Whether a checkpoint is wanted for the segments it makes free: when a batch is empty, and when
    /// cleaning cannot go on without.
    pub(super) fn wants_checkpoint_for_space(&mut self) -> bool {
        let free = self.segments.free_count();
        if free > self.clean_start() {
            return false;
        }
        let empty = self.segments.count_empty(self.hot.applied_seq);
        if empty >= self.clean_batch() {
            return true;
        }
        let changed = self.index.dirty_leaves > 0 || !self.cold.is_quiet();
        self.cleaner.stuck && (empty > 0 || changed)
    }

    /// Nothing more can be copied before a checkpoint; what was copied must be written, or no leaf would change and
    /// none would be wanted.
    fn block_cleaning(&mut self) {
        self.cleaner.stuck = true;
        self.flush_cold();
    }

    /// A checkpoint has made segments free.
    pub(super) fn on_segments_free(&mut self) {
        self.cleaner.stuck = false;
        self.cleaner.coming = self.segments.count_empty(self.hot.applied_seq);
    }

    /// The sealed segment that costs least to empty. None when all are nearly full.
    fn pick_victim(&mut self) -> Option<u32> {
        let applied = self.hot.applied_seq;
        // A block that is moved changes its leaf: the more leaves there are to the blocks, the more that costs.
        let leaves = self.index.leaf_count.min(self.mapped) * u64::from(LEAF_DISK_BLOCKS);
        let per_block = 256 + 256 * leaves / self.mapped.max(1);
        let cost = |s: &Segment| {
            u64::from(s.leaf_blocks) * 256 + u64::from(s.live - s.leaf_blocks) * per_block
        };
        let worth = self.segments.geometry.segment_blocks * 15 / 16;
        loop {
            let (s, _) = self
                .segments
                .all
                .iter()
                .enumerate()
                .filter(|(_, s)| {
                    s.state == SegmentState::Sealed
                        && s.live > 0
                        && s.live <= worth
                        && s.last_seq <= applied
                        && !s.damaged
                        && s.filling == 0
                        && s.clean_after <= self.superblock.checkpoint_seq
                })
                .min_by_key(|(_, s)| (s.cleaned, cost(s)))?;
            let segment = &mut self.segments.all[s];
            segment.cleaned += 1;
            if segment.cleaned > 2 {
                // Twice everything that could be found was copied out, and still something refers to it.
                segment.damaged = true;
                self.event(Event::SegmentDamaged { segment: s as u32 });
                continue;
            }
            return Some(s as u32);
        }
    }

    fn read_victim(&mut self) {
        let geometry = self.segments.geometry;
        loop {
            let Some(v) = self.cleaner.victim.as_mut() else {
                return;
            };
            // Pieces are read one behind the other, so that what is here is a prefix.
            if v.failed || v.asked == geometry.segment_blocks || v.reads_in_flight >= PIECES {
                return;
            }
            let n = PIECE_BLOCKS.min(geometry.segment_blocks - v.asked);
            let at = v.asked as usize * BLOCK_BYTES;
            let ptr = v.buf[at..].as_mut_ptr();
            let offset = Addr(geometry.segment_start(v.segment).0 + v.asked).offset();
            v.asked += n;
            v.reads_in_flight += 1;
            self.counters.clean_read_blocks += u64::from(n);
            let io = self.start_io(Io::CleanRead);
            self.actions.push(Action::Read {
                io,
                offset,
                ptr,
                len: n as usize * BLOCK_BYTES,
            });
        }
    }

    pub(super) fn on_clean_read(&mut self, result: Result<(), Errno>) {
        let Some(v) = self.cleaner.victim.as_mut() else {
            return;
        };
        v.reads_in_flight -= 1;
        if result.is_err() {
            v.failed = true;
            self.counters.read_errors += 1;
        }
        // With two in flight, neither is known to be here before both are.
        if v.reads_in_flight == 0 {
            v.read = v.asked;
        }
    }

    fn look_at_victim(&mut self) {
        let Some(mut v) = self.cleaner.victim.take() else {
            return;
        };
        if v.reads_in_flight > 0 {
            self.cleaner.victim = Some(v);
            return;
        }
        if v.failed {
            self.end_victim(v, true);
            return;
        }
        let mut budget = BUDGET;
        let done = loop {
            if budget == 0 {
                self.more_work = true;
                break false;
            }
            if self.cold.in_flight >= COLD_FRAMES {
                break false;
            }
            match self.look_at_frame(&mut v, &mut budget) {
                Look::Next => {}
                Look::Wait => break false,
                Look::End => break true,
            }
        };
        if done {
            self.end_victim(v, false);
        } else {
            self.cleaner.victim = Some(v);
        }
    }

    fn end_victim(&mut self, v: Victim, failed: bool) {
        self.unpin(self.segments.geometry.segment_start(v.segment));
        self.counters.segments_cleaned += 1;
        // The next is picked in a turn of its own; with nothing copied from this one, no I/O would bring it about.
        self.more_work = true;
        self.segments.all[v.segment as usize].clean_after = self.superblock.checkpoint_seq + 2;
        if failed {
            self.segments.all[v.segment as usize].damaged = true;
            self.event(Event::SegmentDamaged { segment: v.segment });
        }
    }

    fn look_at_frame(&mut self, v: &mut Victim, budget: &mut u32) -> Look {
        let segment_blocks = self.segments.geometry.segment_blocks;
        if v.frame >= segment_blocks {
            return Look::End;
        }
        let enough = (v.frame + FRAME_HEADER_BLOCKS + FRAME_DATA_BLOCKS).min(segment_blocks);
        if v.read < enough {
            return Look::Wait;
        }
        let start = self.segments.geometry.segment_start(v.segment);
        let at = v.frame as usize * BLOCK_BYTES;
        let header = match FrameHeader::decode(&v.buf[at..at + BLOCK_BYTES]) {
            Ok(h)
                if h.addr == Addr(start.0 + v.frame)
                    && h.store == self.superblock.store
                    && (h.incarnation, h.seq) >= v.last
                    && v.frame + h.blocks() <= segment_blocks =>
            {
                h
            }
            // The end of what was written; anything live behind a damaged header keeps the segment.
            _ => return Look::End,
        };
        v.last = (header.incarnation, header.seq);
        let end = FRAME_FIXED_BYTES + usize::from(header.progress.entry_bytes);
        while v.entry < end {
            if *budget == 0 || self.cold.in_flight >= COLD_FRAMES {
                return Look::Next;
            }
            let Ok(entry) = Entries::at(&v.buf[at..at + end], v.entry) else {
                break;
            };
            let e = entry.entry;
            if e.data_start + e.data_blocks() > u32::from(header.progress.data_blocks) {
                break;
            }
            let first = Addr(start.0 + v.frame + FRAME_HEADER_BLOCKS + e.data_start);
            let looked = match e.kind {
                EntryKind::Leaf => self.look_at_leaf(&e, first),
                EntryKind::Data | EntryKind::Relocation => {
                    self.look_at_blocks(v, &e, first, budget)
                }
                EntryKind::Zero | EntryKind::DropLayer => Ok(()),
            };
            if let Err(Blocked) = looked {
                self.read_leaves_ahead(v, at, end);
                return Look::Wait;
            }
            v.entry += e.header_bytes();
            v.block = 0;
        }
        v.frame += header.blocks();
        v.entry = FRAME_FIXED_BYTES;
        v.block = 0;
        Look::Next
    }

    /// A live leaf is moved by having the next checkpoint write it.
    fn look_at_leaf(&mut self, e: &Entry, at: Addr) -> Result<(), Blocked> {
        let Some(row) = self.index.row_of(e.key) else {
            return Ok(());
        };
        let leaf = leaf_of(e.first_block);
        if self.index.row(row).leaves[leaf as usize].addr() != at {
            return Ok(());
        }
        match self.index.slot_of(row, leaf) {
            Some(slot) if self.index.leaf(slot).dirty => {}
            // As long as nothing is written to what it maps, its loss need not be recorded: it may be read yet.
            Some(slot) if self.index.leaf(slot).is_lost() => {}
            Some(_) if !self.may_change(1) => {
                self.block_cleaning();
                return Err(Blocked);
            }
            Some(slot) => self.index.mark_dirty(slot),
            None => {
                self.load_leaf(row, leaf).background = true;
                return Err(Blocked);
            }
        }
        Ok(())
    }

    fn look_at_blocks(
        &mut self,
        v: &mut Victim,
        e: &Entry,
        first: Addr,
        budget: &mut u32,
    ) -> Result<(), Blocked> {
        let Some(row) = self
            .index
            .row_of(e.key)
            .filter(|&r| !self.index.row(r).dropped)
        else {
            return Ok(());
        };
        while v.block < e.count {
            let block = e.first_block + v.block;
            let leaf = leaf_of(block);
            let Some(slot) = self.index.slot_of(row, leaf) else {
                if !self.index.row(row).leaves[leaf as usize].addr().is_stored() {
                    v.block += ((leaf + 1) * LEAF_BLOCKS - block).min(e.count - v.block);
                    continue;
                }
                self.load_leaf(row, leaf).background = true;
                return Err(Blocked);
            };
            // As many live neighbours as one copy can hold, inside this leaf.
            let most = (e.count - v.block)
                .min((leaf + 1) * LEAF_BLOCKS - block)
                .min(FRAME_DATA_BLOCKS / 2);
            let entries = &self.index.leaf(slot).entries;
            let from = Addr(first.0 + v.block);
            let live =
                |i: u32| entries[((block + i) % LEAF_BLOCKS) as usize].addr() == Addr(from.0 + i);
            if !live(0) {
                v.block += 1;
                *budget = budget.saturating_sub(1);
                continue;
            }
            let n = (1..most).find(|&i| !live(i)).unwrap_or(most);
            let crcs: smallvec::SmallVec<[u32; 16]> = (0..n)
                .map(|i| entries[((block + i) % LEAF_BLOCKS) as usize].crc)
                .collect();
            let at =
                (from.0 - self.segments.geometry.segment_start(v.segment).0) as usize * BLOCK_BYTES;
            let data = &v.buf[at..at + n as usize * BLOCK_BYTES];
            let rotten = data
                .chunks_exact(BLOCK_BYTES)
                .zip(&crcs)
                .position(|(b, c)| crc32fast::hash(b) != *c);
            let good = rotten.map_or(n, |i| i as u32);
            if good > 0 {
                let copy = Entry {
                    kind: EntryKind::Relocation,
                    key: e.key,
                    first_block: block,
                    count: good,
                    version: e.version,
                    data_start: 0,
                };
                let data = &data[..good as usize * BLOCK_BYTES];
                if !self.may_change(u64::from(good))
                    || self.add_cold(copy, data, Some(from)).is_none()
                {
                    self.block_cleaning();
                    return Err(Blocked);
                }
            }
            if good < n {
                // Left where it is: a copy would carry a checksum that makes it look right.
                self.checksum_error(StoreError::Corrupt {
                    layer: e.key.layer,
                    chunk: e.key.chunk,
                    block: block + good,
                });
                v.block += 1;
            }
            v.block += good;
            *budget = budget.saturating_sub(n);
        }
        Ok(())
    }

    fn read_leaves_ahead(&mut self, v: &Victim, at: usize, end: usize) {
        let mut offset = v.entry;
        while offset < end && self.loads.len() < LOADS {
            let Ok(entry) = Entries::at(&v.buf[at..at + end], offset) else {
                return;
            };
            let e = entry.entry;
            offset += e.header_bytes();
            if !matches!(e.kind, EntryKind::Data | EntryKind::Relocation) {
                continue;
            }
            let Some(row) = self.index.row_of(e.key) else {
                continue;
            };
            let leaf = leaf_of(e.first_block);
            if self.index.slot_of(row, leaf).is_none()
                && self.index.row(row).leaves[leaf as usize].addr().is_stored()
            {
                self.load_leaf(row, leaf).background = true;
            }
        }
    }
}

enum Look {
    Next,
    Wait,
    End,
}
