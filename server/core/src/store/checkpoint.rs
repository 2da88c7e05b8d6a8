//! Checkpoints: the leaves that changed, then directory and segment table, then the superblock that names them.
//!
//! While leaves are written nothing is applied, so what is written is the state at exactly one frame; clients do not
//! notice, because reads look at pending entries first. Segments that were empty at that frame may be written again
//! once the superblock is durable, and not before.

use super::cold::ColdFrame;
use super::format::{
    Addr, Checkpoint, CheckpointSegment, Entry, EntryKind, ExtentKey, LEAF_DISK_BLOCKS, Mapping,
    SUPERBLOCK_BLOCKS, Superblock, encode_checkpoint,
};
use super::index::LeafSlot;
use super::machine::Io;
use super::segment::SegmentState;
use super::{Action, AlignedBuf, Event, OpId, ReadInfo, Store};
use crate::units::{BLOCK_BYTES, CHUNK_LEAVES, LEAF_BLOCKS};

/// Frames of leaves in flight at once.
const LEAF_FRAMES: usize = 4;
/// Bytes of one write into a checkpoint area.
const AREA_PIECE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// Waiting for cleaning's frames to be written and applied.
    Quiesce,
    /// Writing leaves; nothing is applied.
    Leaves,
    /// Waiting for a sync that covers the log and the leaves.
    SyncLog {
        number: u64,
    },
    /// Writing the area.
    Area {
        pieces_left: usize,
    },
    SyncArea {
        number: u64,
    },
    Superblock {
        copies_left: u8,
    },
}

#[derive(Default)]
pub(super) struct CheckpointState {
    phase: Phase,
    wanted: bool,
    /// Wait for a checkpoint that holds every frame up to the one named.
    asked: Vec<(u64, OpId)>,
    /// Wait for the one that runs.
    serving: Vec<OpId>,
    leaves: Vec<LeafSlot>,
    leaves_written: u32,
    area: Option<AlignedBuf>,
    area_bytes: usize,
    next: Option<Superblock>,
    /// Segments this checkpoint no longer refers to.
    freeing: Vec<u32>,
    /// Segments that are free but for a read under way in them.
    released: Vec<u32>,
    /// Log that it holds and the one before did not.
    log_blocks: u64,
    started_ms: u64,
    /// Mark the store as closed in order.
    clean_close: bool,
}

impl CheckpointState {
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    /// The last one was asked for.
    pub(super) fn is_last(&self) -> bool {
        self.clean_close
    }

    pub(super) fn running(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// Segments that the checkpoint under way makes free.
    pub(super) fn segments_freeing(&self) -> usize {
        self.freeing.len()
    }

    pub(super) fn phase_name(&self) -> String {
        format!("{:?}", self.phase)
    }

    /// Whether leaves must not change now.
    pub(super) fn holds_apply(&self) -> bool {
        self.phase == Phase::Leaves
    }

    /// Whether cleaning and dropping must not start anything now.
    pub(super) fn holds_cleaning(&self) -> bool {
        matches!(self.phase, Phase::Quiesce | Phase::Leaves)
    }

    pub(super) fn take_waiters(&mut self) -> Vec<OpId> {
        let mut ops = std::mem::take(&mut self.serving);
        ops.extend(self.asked.drain(..).map(|(_, op)| op));
        ops
    }

    pub(super) fn is_released(&self, s: u32) -> bool {
        self.released.contains(&s)
    }

    pub(super) fn forget_released(&mut self, s: u32) {
        self.released.retain(|&r| r != s);
    }
}

impl Store {
    /// Takes a checkpoint that holds everything acknowledged before; `Done` when it is durable.
    pub fn checkpoint(&mut self, op: OpId) {
        if let Err(e) = self.healthy() {
            self.actions.push(Action::Done { op, result: Err(e) });
            return;
        }
        self.wait_durable(None);
        self.checkpoint.asked.push((self.hot.last_acked_seq(), op));
    }

    /// Takes the last checkpoint: it says that the store was closed in order and wants no tail. From now on every change is
    /// refused with [`super::StoreError::Closed`], so that nothing is acknowledged that only the tail has.
    pub fn close(&mut self, op: OpId) {
        self.checkpoint.clean_close = true;
        self.checkpoint(op);
    }

    pub(super) fn advance_checkpoint(&mut self) {
        match self.checkpoint.phase {
            Phase::Idle => self.start_checkpoint_if_wanted(),
            Phase::Quiesce => {
                if self.cold.is_quiet() {
                    self.collect_dirty_leaves();
                }
            }
            Phase::Leaves => self.write_leaves(),
            Phase::SyncLog { number } => {
                if self.hot.syncs_done >= number {
                    self.write_area();
                }
            }
            Phase::SyncArea { number } => {
                if self.hot.syncs_done >= number {
                    self.write_superblock();
                }
            }
            Phase::Area { .. } | Phase::Superblock { .. } => {}
        }
    }

    fn start_checkpoint_if_wanted(&mut self) {
        // What is not applied stays behind it: when most of the log is that, a checkpoint would gain little.
        let gains = self.hot.checkpoint_log_blocks - self.hot.unapplied_blocks;
        let by_log = self.hot.checkpoint_log_blocks >= self.params.checkpoint_log_blocks
            && gains >= self.params.checkpoint_log_blocks / 4;
        let by_leaves = self.index.dirty_leaves as u64 >= self.changed_leaves_wanted();
        let by_space = self.wants_checkpoint_for_space();
        let applied = self.hot.applied_seq;
        let asked = self
            .checkpoint
            .asked
            .iter()
            .any(|&(target, _)| target <= applied);
        if !(self.checkpoint.wanted || by_log || by_leaves || by_space || asked) {
            return;
        }
        self.checkpoint.wanted = false;
        let (served, waiting) = self
            .checkpoint
            .asked
            .drain(..)
            .partition(|&(target, _)| target <= applied);
        self.checkpoint.asked = waiting;
        let served: Vec<(u64, OpId)> = served;
        self.checkpoint.serving = served.into_iter().map(|(_, op)| op).collect();
        self.checkpoint.phase = Phase::Quiesce;
        self.flush_cold();
        self.advance_checkpoint();
    }

    fn collect_dirty_leaves(&mut self) {
        self.checkpoint.phase = Phase::Leaves;
        self.checkpoint.log_blocks = self.hot.checkpoint_log_blocks - self.hot.unapplied_blocks;
        self.checkpoint.started_ms = self.now_ms;
        self.checkpoint.leaves = self.index.dirty_slots();
        self.checkpoint.leaves_written = self.checkpoint.leaves.len() as u32;
        self.write_leaves();
    }

    fn write_leaves(&mut self) {
        while self.cold.in_flight < LEAF_FRAMES {
            let Some(&slot) = self.checkpoint.leaves.last() else {
                break;
            };
            let leaf = self.index.leaf(slot);
            let (row, index) = (leaf.row, leaf.index);
            let bytes = zerocopy::IntoBytes::as_bytes(&*leaf.entries);
            let crc = crc32fast::hash(bytes);
            let version = leaf.entries.iter().map(|e| e.version).max().unwrap_or(0);
            let mut copy = AlignedBuf::zeroed(bytes.len());
            copy.copy_from_slice(bytes);
            let entry = Entry {
                kind: EntryKind::Leaf,
                key: self.index.row(row).key,
                first_block: index * LEAF_BLOCKS,
                count: LEAF_BLOCKS,
                version,
                data_start: 0,
            };
            // No segment is free just now: one will be, or the store is beyond help.
            let Some(addr) = self.add_cold(entry, &copy, None) else {
                break;
            };
            self.checkpoint.leaves.pop();
            self.index.mark_clean(slot);
            self.index.leaf_mut(slot).writing = true;
            let old = std::mem::replace(
                &mut self.index.row_mut(row).leaves[index as usize],
                Mapping::new(addr, crc, version),
            );
            if old.addr().is_stored() {
                self.segments.sub_leaf(old.addr());
                self.freed(old.addr());
            }
            self.segments.add_leaf(addr);
            self.counters.checkpoint_blocks += u64::from(LEAF_DISK_BLOCKS);
        }
        if self.checkpoint.leaves.is_empty() {
            self.flush_cold();
            if self.cold.is_quiet() {
                self.serialize();
            }
        }
    }

    /// A frame of leaves was written: they may be evicted.
    pub(super) fn leaves_written(&mut self, frame: &ColdFrame) {
        for (entry, _) in &frame.entries {
            if entry.kind != EntryKind::Leaf {
                continue;
            }
            let leaf = entry.first_block / LEAF_BLOCKS;
            let slot = self
                .index
                .row_of(entry.key)
                .and_then(|row| self.index.slot_of(row, leaf));
            if let Some(slot) = slot {
                self.index.leaf_mut(slot).writing = false;
            }
        }
    }

    /// Writes down the state at frame `applied_seq`; from here on apply goes on.
    fn serialize(&mut self) {
        let geometry = self.segments.geometry;
        let next_seq = self.hot.applied_seq + 1;
        let (hot_addr, hot_next) = match (self.hot.frame(next_seq), &self.hot.open) {
            (Some(f), _) => (f.addr, f.header.next_segment),
            (None, Some(open)) => (open.addr, self.hot.next_segment),
            (None, None) => {
                let start = geometry.segment_start(self.hot.segment);
                (Addr(start.0 + self.hot.next_block), self.hot.next_segment)
            }
        };
        // A full segment's end is the next one's start: keep to the segment that was written.
        let hot_segment = match (self.hot.frame(next_seq), &self.hot.open) {
            (None, None) => self.hot.segment,
            _ => geometry.segment_of(hot_addr),
        };
        let hot_block = hot_addr.0 - geometry.segment_start(hot_segment).0;
        self.checkpoint.freeing.clear();
        let mut table = Vec::with_capacity(self.segments.all.len());
        for s in 0..self.segments.all.len() as u32 {
            let mut free = self.segments.all[s as usize].state == SegmentState::Free;
            if s != hot_segment && self.segments.is_empty_sealed(s, self.hot.applied_seq) {
                self.segments.set_freeing(s);
                self.checkpoint.freeing.push(s);
                free = true;
            }
            let segment = &self.segments.all[s as usize];
            // Still read from since an earlier checkpoint: free in this one.
            free |= segment.state == SegmentState::Freeing;
            table.push(CheckpointSegment {
                live: segment.live,
                free,
                damaged: segment.damaged,
            });
        }
        let head = Checkpoint {
            store: self.superblock.store,
            seq: self.superblock.checkpoint_seq + 1,
            hot_seq: self.hot.applied_seq,
            hot_incarnation: self.hot_incarnation_at(next_seq),
            hot_segment,
            hot_block,
            hot_next_segment: hot_next,
            mapped_blocks: self.mapped,
            segments: table,
            drops: self.dropper.layers.clone(),
            rows: Vec::new(),
        };
        let mut rows: Vec<(ExtentKey, &[Mapping; CHUNK_LEAVES as usize])> = self
            .index
            .rows()
            .filter(|(_, r)| r.leaves.iter().any(|l| l.addr() != Addr::UNMAPPED))
            .map(|(_, r)| (r.key, &r.leaves))
            .collect();
        rows.sort_unstable_by_key(|r| r.0);
        let bytes = encode_checkpoint(&head, rows.into_iter());
        let mut area = AlignedBuf::zeroed(bytes.len().next_multiple_of(BLOCK_BYTES));
        area[..bytes.len()].copy_from_slice(&bytes);
        let has_all = self.hot.last_acked_seq() <= self.hot.applied_seq;
        let clean = self.checkpoint.clean_close && !self.checkpoint.serving.is_empty() && has_all;
        self.checkpoint.next = Some(Superblock {
            generation: self.superblock.generation + 1,
            checkpoint_seq: head.seq,
            checkpoint_area: 1 - self.superblock.checkpoint_area,
            checkpoint_crc: crc32fast::hash(&bytes),
            checkpoint_bytes: bytes.len() as u64,
            clean,
            ..self.superblock
        });
        self.checkpoint.area = Some(area);
        self.checkpoint.area_bytes = bytes.len();
        let number = self.want_sync();
        self.checkpoint.phase = Phase::SyncLog { number };
    }

    /// The least incarnation frames from `seq` on may carry.
    fn hot_incarnation_at(&self, seq: u64) -> u64 {
        self.hot
            .frame(seq)
            .map_or(self.hot.incarnation, |f| f.header.incarnation)
    }

    fn write_area(&mut self) {
        let area = self.checkpoint.area.as_ref().expect("serialised");
        let start = self
            .segments
            .geometry
            .checkpoint_start(1 - self.superblock.checkpoint_area)
            .offset();
        let pieces: Vec<(usize, *const u8, usize)> = area
            .chunks(AREA_PIECE)
            .enumerate()
            .map(|(i, c)| (i * AREA_PIECE, c.as_ptr(), c.len()))
            .collect();
        assert!(
            area.len() <= self.segments.geometry.checkpoint_blocks as usize * BLOCK_BYTES,
            "rows are bounded"
        );
        self.counters.checkpoint_blocks += (area.len() / BLOCK_BYTES) as u64 + 2;
        self.checkpoint.phase = Phase::Area {
            pieces_left: pieces.len(),
        };
        for (at, ptr, len) in pieces {
            let io = self.start_io(Io::CheckpointArea);
            self.actions.push(Action::Write {
                io,
                offset: start + at as u64,
                ptr,
                len,
                durable: false,
            });
        }
    }

    pub(super) fn on_checkpoint_area(&mut self) {
        let Phase::Area { pieces_left } = &mut self.checkpoint.phase else {
            unreachable!("pieces are written in this phase only")
        };
        *pieces_left -= 1;
        if *pieces_left == 0 {
            let number = self.want_sync();
            self.checkpoint.phase = Phase::SyncArea { number };
        }
    }

    fn write_superblock(&mut self) {
        let next = self.checkpoint.next.expect("serialised");
        self.checkpoint.area = None;
        self.checkpoint.phase = Phase::Superblock { copies_left: 2 };
        for block in SUPERBLOCK_BLOCKS[(next.generation % 2) as usize] {
            let mut buf = AlignedBuf::blocks(1);
            next.encode(&mut buf);
            let (ptr, len) = (buf.as_ptr(), buf.len());
            let io = self.start_io(Io::Superblock(buf));
            self.actions.push(Action::Write {
                io,
                offset: Addr(block).offset(),
                ptr,
                len,
                durable: true,
            });
        }
    }

    pub(super) fn on_superblock(&mut self) {
        let Phase::Superblock { copies_left } = &mut self.checkpoint.phase else {
            unreachable!("superblocks are written in this phase only")
        };
        *copies_left -= 1;
        if *copies_left > 0 {
            return;
        }
        self.superblock = self.checkpoint.next.take().expect("serialised");
        for s in std::mem::take(&mut self.checkpoint.freeing) {
            if !self.segments.release(s) {
                self.checkpoint.released.push(s);
            }
        }
        self.hot.checkpoint_log_blocks -= self.checkpoint.log_blocks;
        let took_ms = self.now_ms - self.checkpoint.started_ms;
        self.counters.checkpoints += 1;
        self.counters.checkpoints_took_ms += took_ms;
        self.counters.checkpoint_took_ms = took_ms;
        self.event(Event::Checkpointed {
            seq: self.superblock.checkpoint_seq,
            leaves: self.checkpoint.leaves_written,
            bytes: self.checkpoint.area_bytes as u64,
        });
        self.on_segments_free();
        self.checkpoint.phase = Phase::Idle;
        for op in std::mem::take(&mut self.checkpoint.serving) {
            self.actions.push(Action::Done {
                op,
                result: Ok(ReadInfo::default()),
            });
        }
    }
}
