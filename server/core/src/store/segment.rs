//! Which segments are free, being written, sealed, or waiting for a checkpoint before they may be used again.

use std::collections::VecDeque;

use super::format::{Addr, CheckpointSegment, Geometry, LEAF_DISK_BLOCKS};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentState {
    /// May be written.
    Free,
    /// A stream writes it, or will next.
    Open,
    /// Full, or left behind.
    Sealed,
    /// Nothing in it is live, but a durable checkpoint may still refer to it.
    Freeing,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) state: SegmentState,
    /// Blocks that leaves or the directory refer to, as of what was applied.
    pub(super) live: u32,
    /// How many of them are leaves'.
    pub(super) leaf_blocks: u32,
    /// The last client frame in it: until that one is applied `live` does not tell the whole truth.
    pub(super) last_seq: u64,
    /// Reads under way: it is not reused before they end.
    pub(super) reads: u32,
    /// Frames of copies in it that no leaf knows yet: until there are none `live` does not tell the whole truth.
    pub(super) filling: u32,
    /// Could not be read back for cleaning.
    pub(super) damaged: bool,
    /// How often it was cleaned since it was written.
    pub(super) cleaned: u8,
    /// Not cleaned again before this checkpoint: leaves in it move with the next one.
    pub(super) clean_after: u64,
    /// It is in the list of those that may be empty.
    listed: bool,
}

pub(super) struct Segments {
    pub(super) geometry: Geometry,
    pub(super) all: Vec<Segment>,
    free: VecDeque<u32>,
    /// Sealed segments that had no live block when last looked at: all of them, and some that are none any more.
    maybe_empty: Vec<u32>,
}

impl Segments {
    pub(super) fn new(geometry: Geometry, checkpoint: &[CheckpointSegment]) -> Segments {
        let all: Vec<Segment> = checkpoint
            .iter()
            .map(|s| Segment {
                state: if s.free {
                    SegmentState::Free
                } else {
                    SegmentState::Sealed
                },
                live: s.live,
                leaf_blocks: 0,
                last_seq: 0,
                reads: 0,
                filling: 0,
                damaged: s.damaged,
                cleaned: 0,
                clean_after: 0,
                listed: false,
            })
            .collect();
        let mut segments = Segments {
            geometry,
            all,
            free: VecDeque::new(),
            maybe_empty: Vec::new(),
        };
        for s in 0..segments.all.len() as u32 {
            segments.list_if_empty(s);
        }
        segments
    }

    /// Fills the list of free segments; called once the log has shown which ones it took.
    pub(super) fn collect_free(&mut self) {
        self.free = (0..self.all.len() as u32)
            .filter(|&s| self.all[s as usize].state == SegmentState::Free)
            .collect();
    }

    pub(super) fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Segments in a state.
    pub(super) fn count(&self, state: SegmentState) -> u32 {
        self.all
            .iter()
            .filter(|segment| segment.state == state)
            .count() as u32
    }

    /// Adds `count` new segments at the end of the store.
    pub(super) fn grow(&mut self, count: u32) {
        for _ in 0..count {
            self.free.push_back(self.all.len() as u32);
            self.all.push(Segment {
                state: SegmentState::Free,
                live: 0,
                leaf_blocks: 0,
                last_seq: 0,
                reads: 0,
                filling: 0,
                damaged: false,
                cleaned: 0,
                clean_after: 0,
                listed: false,
            });
        }
    }

    /// Takes a free segment for writing, when more than `keep` are left.
    pub(super) fn take(&mut self, keep: usize) -> Option<u32> {
        if self.free.len() <= keep {
            return None;
        }
        let s = self.free.pop_front()?;
        let segment = &mut self.all[s as usize];
        debug_assert!(segment.state == SegmentState::Free && segment.live == 0);
        debug_assert_eq!(segment.leaf_blocks, 0);
        segment.state = SegmentState::Open;
        segment.last_seq = 0;
        segment.cleaned = 0;
        segment.clean_after = 0;
        Some(s)
    }

    pub(super) fn of(&mut self, addr: Addr) -> &mut Segment {
        let s = self.geometry.segment_of(addr);
        &mut self.all[s as usize]
    }

    pub(super) fn add_live(&mut self, addr: Addr, blocks: u32) {
        let max = self.geometry.segment_blocks;
        let s = self.of(addr);
        s.live += blocks;
        debug_assert!(s.live <= max, "more live blocks than a segment has");
    }

    pub(super) fn sub_live(&mut self, addr: Addr, blocks: u32) {
        let s = self.of(addr);
        s.live = s
            .live
            .checked_sub(blocks)
            .expect("a block was counted before it is given back");
        if s.live == 0 {
            let s = self.geometry.segment_of(addr);
            self.list_if_empty(s);
        }
    }

    /// Nothing is written to it any more.
    pub(super) fn seal(&mut self, s: u32) {
        self.all[s as usize].state = SegmentState::Sealed;
        self.list_if_empty(s);
    }

    /// Leaves point at every copy of a frame in it.
    pub(super) fn filled(&mut self, s: u32) {
        self.all[s as usize].filling -= 1;
    }

    fn list_if_empty(&mut self, s: u32) {
        let segment = &mut self.all[s as usize];
        if segment.state == SegmentState::Sealed && segment.live == 0 && !segment.listed {
            segment.listed = true;
            self.maybe_empty.push(s);
        }
    }

    /// How many sealed segments hold nothing as of what was applied, and wait for a checkpoint.
    pub(super) fn count_empty(&mut self, applied_seq: u64) -> usize {
        let mut listed = std::mem::take(&mut self.maybe_empty);
        listed.retain(|&s| {
            let segment = &mut self.all[s as usize];
            segment.listed = segment.state == SegmentState::Sealed && segment.live == 0;
            segment.listed
        });
        let empty = |&&s: &&u32| self.is_empty_sealed(s, applied_seq);
        let count = listed.iter().filter(empty).count();
        self.maybe_empty = listed;
        count
    }

    /// Counts a leaf that is written there now.
    pub(super) fn add_leaf(&mut self, addr: Addr) {
        self.add_live(addr, LEAF_DISK_BLOCKS);
        self.of(addr).leaf_blocks += LEAF_DISK_BLOCKS;
    }

    pub(super) fn sub_leaf(&mut self, addr: Addr) {
        self.sub_live(addr, LEAF_DISK_BLOCKS);
        self.of(addr).leaf_blocks -= LEAF_DISK_BLOCKS;
    }

    /// Counts a leaf of the checkpoint, which is in `live` already.
    pub(super) fn note_leaf(&mut self, addr: Addr) {
        let s = self.geometry.segment_of(addr) as usize;
        if let Some(segment) = self.all.get_mut(s) {
            segment.leaf_blocks += LEAF_DISK_BLOCKS;
        }
    }

    /// Whether a sealed segment holds nothing at all as of what was applied.
    pub(super) fn is_empty_sealed(&self, s: u32, applied_seq: u64) -> bool {
        let segment = &self.all[s as usize];
        segment.state == SegmentState::Sealed
            && segment.live == 0
            && !segment.damaged
            && segment.filling == 0
            && segment.last_seq <= applied_seq
    }

    pub(super) fn set_freeing(&mut self, s: u32) {
        self.all[s as usize].state = SegmentState::Freeing;
    }

    /// The checkpoint that no longer refers to it is durable: it may be written, once no read is under way in it.
    pub(super) fn release(&mut self, s: u32) -> bool {
        let segment = &mut self.all[s as usize];
        debug_assert!(segment.state == SegmentState::Freeing);
        if segment.reads > 0 {
            return false;
        }
        segment.state = SegmentState::Free;
        self.free.push_back(s);
        true
    }

    /// What the broken store of the test does.
    pub(super) fn reuse_at_once(&mut self, s: u32) {
        self.set_freeing(s);
        if self.release(s) {
            self.free.rotate_right(1);
        }
    }

    pub(super) fn check_invariants(&self) {
        for &s in &self.free {
            let segment = &self.all[s as usize];
            assert!(segment.state == SegmentState::Free && segment.live == 0 && segment.reads == 0);
        }
        for segment in &self.all {
            let empty = segment.state == SegmentState::Sealed && segment.live == 0;
            assert!(segment.listed || !empty, "every empty segment is listed");
        }
        let free = self
            .all
            .iter()
            .filter(|s| s.state == SegmentState::Free)
            .count();
        assert_eq!(free, self.free.len(), "every free segment is listed once");
    }
}
