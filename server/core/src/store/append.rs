//! The client stream: frames are built in the tail, closed, appended in large pieces, and made durable.
//!
//! A flush waits for a frame number. With nothing older on its way, the append carries its own data sync; otherwise
//! the appends are plain and one sync follows. Frames become durable, and are acknowledged, in order.

use std::collections::VecDeque;

use super::format::{Addr, Entry, FRAME_FIXED_BYTES, FrameHeader, Progress};
use super::machine::Io;
use super::{Action, OpId, ReadInfo, Store};
use crate::units::BLOCK_BYTES;

/// Most blocks one append carries (2 MiB): two full frames; larger ones gain nothing on any disk measured.
const APPEND_BLOCKS: u32 = 512;
/// Durable appends in flight: while these are under way, what arrives forms the next frame (group commit).
const DURABLE_APPENDS: usize = 2;
/// A frame that is being filled.
pub(super) struct OpenFrame {
    pub(super) seq: u64,
    pub(super) addr: Addr,
    pub(super) tail_at: u32,
    pub(super) progress: Progress,
    /// Data blocks it may hold.
    pub(super) data_max: u32,
    /// Data blocks that are taken: those of its entries, and of a landing.
    pub(super) placed: u32,
    /// What a landing's entry will need of the header; 0 when there is no landing.
    pub(super) landing_header: usize,
    /// What it may add to the blocks in use.
    pub(super) reserved: u64,
}

impl OpenFrame {
    pub(super) fn header_room(&self) -> usize {
        BLOCK_BYTES
            - FRAME_FIXED_BYTES
            - usize::from(self.progress.entry_bytes)
            - self.landing_header
    }

    pub(super) fn data_room(&self) -> u32 {
        self.data_max - self.placed
    }
}

/// A closed frame that is not applied yet, or still held in the tail.
pub(super) struct Frame {
    pub(super) seq: u64,
    pub(super) addr: Addr,
    pub(super) blocks: u32,
    /// Where it lies in the tail, until it is reclaimed.
    pub(super) tail_at: Option<u32>,
    pub(super) header: FrameHeader,
    /// The used part of the header block, until it is applied.
    pub(super) bytes: Vec<u8>,
    pub(super) reserved: u64,
    pub(super) written: bool,
    /// Its append carried its own data sync.
    pub(super) synced: bool,
}

/// Who waits for the frames up to `target` to be durable.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) target: u64,
    /// `None`: the store itself, so that writes do not stay in memory for ever.
    pub(super) op: Option<OpId>,
}

/// The client stream.
pub(super) struct Hot {
    pub(super) incarnation: u64,
    pub(super) next_seq: u64,
    pub(super) segment: u32,
    /// Where the next frame begins, in blocks from the segment's start.
    pub(super) next_block: u32,
    pub(super) next_segment: u32,
    pub(super) open: Option<OpenFrame>,
    pub(super) frames: VecDeque<Frame>,
    /// Every frame up to these is issued, written, let go by the tail, durable, applied.
    pub(super) issued_seq: u64,
    pub(super) reclaimed_seq: u64,
    pub(super) written_seq: u64,
    pub(super) durable_seq: u64,
    pub(super) applied_seq: u64,
    /// Every frame up to this one is durable or in a durable append.
    pub(super) durable_chain: u64,
    pub(super) appends: usize,
    pub(super) durable_appends: usize,
    pub(super) sync_in_flight: bool,
    pub(super) syncs_started: u64,
    pub(super) syncs_done: u64,
    /// A sync somebody beside the waiters asked for: run one that starts after now.
    pub(super) sync_wanted: u64,
    pub(super) unsynced_blocks: u64,
    /// Log that the newest checkpoint does not hold: what a start would replay.
    pub(super) checkpoint_log_blocks: u64,
    /// How much of it is not applied, so that no checkpoint begun now would hold it.
    pub(super) unapplied_blocks: u64,
    /// Since when something acknowledged is not durable.
    pub(super) dirty_since_ms: Option<u64>,
    /// Turns with writes since the last flush, and whether this one has any.
    pub(super) write_turns: u32,
    pub(super) wrote: bool,
    /// Flushes in a row that each came within two such turns.
    pub(super) flush_habit: u32,
    /// Where apply stands in frame `applied_seq + 1`: header offset and blocks of that entry done.
    pub(super) cursor: (usize, u32),
}

impl Hot {
    /// A stream that goes on behind frame `last_seq`, everything up to which is durable.
    pub(super) fn new(
        incarnation: u64,
        last_seq: u64,
        segment: u32,
        next_block: u32,
        next_segment: u32,
    ) -> Hot {
        Hot {
            incarnation,
            next_seq: last_seq + 1,
            segment,
            next_block,
            next_segment,
            open: None,
            frames: VecDeque::new(),
            issued_seq: last_seq,
            reclaimed_seq: last_seq,
            written_seq: last_seq,
            durable_seq: last_seq,
            applied_seq: last_seq,
            durable_chain: last_seq,
            appends: 0,
            durable_appends: 0,
            sync_in_flight: false,
            syncs_started: 0,
            syncs_done: 0,
            sync_wanted: 0,
            unsynced_blocks: 0,
            checkpoint_log_blocks: 0,
            unapplied_blocks: 0,
            dirty_since_ms: None,
            write_turns: 0,
            wrote: false,
            flush_habit: 0,
            cursor: (FRAME_FIXED_BYTES, 0),
        }
    }

    pub(super) fn first_seq(&self) -> u64 {
        self.frames.front().map_or(self.next_seq, |f| f.seq)
    }

    /// The closed frame with this number, if it is still held.
    pub(super) fn frame(&self, seq: u64) -> Option<&Frame> {
        self.frames
            .get(usize::try_from(seq.checked_sub(self.first_seq())?).ok()?)
    }

    pub(super) fn frame_mut(&mut self, seq: u64) -> Option<&mut Frame> {
        let at = usize::try_from(seq.checked_sub(self.first_seq())?).ok()?;
        self.frames.get_mut(at)
    }

    /// The newest frame that carries something acknowledged.
    pub(super) fn last_acked_seq(&self) -> u64 {
        match &self.open {
            Some(open) if open.progress.entries > 0 => open.seq,
            Some(open) => open.seq - 1,
            None => self.next_seq - 1,
        }
    }

    pub(super) fn check_invariants(&self) {
        assert!(self.applied_seq <= self.written_seq && self.written_seq <= self.issued_seq);
        assert!(self.durable_seq <= self.written_seq && self.durable_seq <= self.durable_chain);
        assert!(self.issued_seq < self.next_seq && self.reclaimed_seq <= self.written_seq);
        let waiting = self.frames.iter().filter(|f| f.seq > self.applied_seq);
        let unapplied: u64 = waiting.map(|f| u64::from(f.blocks)).sum();
        assert_eq!(self.unapplied_blocks, unapplied);
        assert!(self.checkpoint_log_blocks >= unapplied);
    }
}

impl Store {
    /// Makes sure a frame is open that has room for an entry of `header_bytes` and, if the entry has data, for one
    /// block of it. False when the tail or the segments have no room now.
    pub(super) fn open_frame(&mut self, header_bytes: usize, with_data: bool) -> bool {
        if let Some(open) = &self.hot.open {
            if open.header_room() >= header_bytes && (!with_data || open.data_room() > 0) {
                return true;
            }
            self.close_frame();
        }
        let Some(tail_at) = self.tail.place() else {
            return false;
        };
        let segment_blocks = self.segments.geometry.segment_blocks;
        if segment_blocks - self.hot.next_block < 2 {
            // Frames name the segment after theirs, so its successor must be known before it is entered.
            let Some(after) = self.segments.take(self.keep_for_hot()) else {
                return false;
            };
            self.segments.seal(self.hot.segment);
            self.hot.segment = self.hot.next_segment;
            self.hot.next_block = 0;
            self.hot.next_segment = after;
        }
        let seq = self.hot.next_seq;
        self.hot.next_seq += 1;
        let start = self.segments.geometry.segment_start(self.hot.segment);
        let addr = Addr(start.0 + self.hot.next_block);
        self.segments.all[self.hot.segment as usize].last_seq = seq;
        let header = FrameHeader {
            addr,
            store: self.superblock.store,
            progress: Progress::default(),
            incarnation: self.hot.incarnation,
            seq,
            durable_seq: self.hot.durable_seq,
            checkpoint_seq: self.superblock.checkpoint_seq,
            next_segment: self.hot.next_segment,
        };
        self.tail.begin(tail_at, seq);
        let block = self.tail.block_mut(tail_at);
        block.fill(0);
        header.encode_nameless(block);
        self.tail.begun(tail_at, seq);
        let data_max =
            (segment_blocks - self.hot.next_block - 1).min(super::format::FRAME_DATA_BLOCKS);
        self.hot.open = Some(OpenFrame {
            seq,
            addr,
            tail_at,
            progress: Progress::default(),
            data_max,
            placed: 0,
            landing_header: 0,
            reserved: 0,
        });
        true
    }

    /// Ends the open frame; nothing is added to it any more.
    pub(super) fn close_frame(&mut self) {
        self.move_landing_apart();
        let Some(open) = self.hot.open.take() else {
            return;
        };
        let progress = Progress {
            closed: true,
            ..open.progress
        };
        let header = FrameHeader {
            addr: open.addr,
            store: self.superblock.store,
            progress,
            incarnation: self.hot.incarnation,
            seq: open.seq,
            durable_seq: self.hot.durable_seq,
            checkpoint_seq: self.superblock.checkpoint_seq,
            next_segment: self.hot.next_segment,
        };
        let still_open = FrameHeader {
            progress: open.progress,
            ..header
        };
        let block = self.tail.block_mut(open.tail_at);
        still_open.encode(block);
        FrameHeader::seal_for(block, progress);
        // A process that dies before this leaves an open frame, which has no checksum to be believed.
        self.tail.publish(open.tail_at, progress);
        let used = FRAME_FIXED_BYTES + usize::from(progress.entry_bytes);
        let bytes = self.tail.block_mut(open.tail_at)[..used].to_vec();
        let blocks = header.blocks();
        self.tail.end(blocks);
        self.hot.next_block += blocks;
        self.hot.checkpoint_log_blocks += u64::from(blocks);
        self.hot.unapplied_blocks += u64::from(blocks);
        self.counters.log_blocks += u64::from(blocks);
        self.counters.frames += 1;
        self.hot.frames.push_back(Frame {
            seq: open.seq,
            addr: open.addr,
            blocks,
            tail_at: Some(open.tail_at),
            header,
            bytes,
            reserved: open.reserved,
            written: false,
            synced: false,
        });
    }

    /// Adds an entry with its checksums to the open frame, whose data blocks were filled before.
    pub(super) fn publish_entry(&mut self, entry: &Entry, crcs: &[u32]) {
        let open = self.hot.open.as_mut().expect("a frame is open");
        let at = FRAME_FIXED_BYTES + usize::from(open.progress.entry_bytes);
        let block = self.tail.block_mut(open.tail_at);
        entry.encode(&mut block[at..]);
        let mut offset = at + super::format::ENTRY_BYTES;
        for crc in crcs {
            block[offset..offset + 4].copy_from_slice(&crc.to_le_bytes());
            offset += 4;
        }
        open.progress.entries += 1;
        open.progress.entry_bytes = (offset - FRAME_FIXED_BYTES) as u16;
        if entry.has_data() {
            let end = (entry.data_start + entry.data_blocks()) as u16;
            open.progress.data_blocks = open.progress.data_blocks.max(end);
        }
        self.tail.publish(open.tail_at, open.progress);
        self.hot.wrote = true;
        if self.hot.dirty_since_ms.is_none() {
            self.hot.dirty_since_ms = Some(self.now_ms);
        }
    }

    /// Waits for everything acknowledged so far to be durable. A flush answers only for what was acknowledged before
    /// it, and shares its sync with every other that waits.
    pub fn flush(&mut self, op: OpId) {
        if let Err(e) = self.healthy() {
            self.actions.push(Action::Done { op, result: Err(e) });
            return;
        }
        match self.hot.write_turns + u32::from(self.hot.wrote) {
            0 => {}
            1 | 2 => self.hot.flush_habit += 1,
            _ => self.hot.flush_habit = 0,
        }
        self.hot.write_turns = 0;
        self.hot.wrote = false;
        self.wait_durable(Some(op));
    }

    pub(super) fn wait_durable(&mut self, op: Option<OpId>) {
        let target = self.hot.last_acked_seq();
        if target <= self.hot.durable_seq {
            if let Some(op) = op {
                self.actions.push(Action::Done {
                    op,
                    result: Ok(ReadInfo::default()),
                });
            }
            return;
        }
        self.waiters.push_back(Waiter { target, op });
    }

    pub(super) fn writeback_deadline(&self) -> Option<u64> {
        self.hot
            .dirty_since_ms
            .map(|since| since + self.params.writeback_ms)
    }

    /// Closes, appends and syncs as far as there is reason and room.
    pub(super) fn pump(&mut self) {
        if self
            .writeback_deadline()
            .is_some_and(|at| at <= self.now_ms)
        {
            self.hot.dirty_since_ms = Some(self.now_ms);
            self.wait_durable(None);
        }
        if std::mem::take(&mut self.hot.wrote) {
            self.hot.write_turns += 1;
            if self.hot.write_turns > 2 {
                self.hot.flush_habit = 0;
            } else if self.hot.flush_habit >= self.params.flush_habit && self.waiters.is_empty() {
                // A flush will follow: begin its append while the client still hears of the write.
                self.wait_durable(None);
            }
        }
        let wanted = self.waiters.back().map_or(0, |w| w.target);
        if self
            .hot
            .open
            .as_ref()
            .is_some_and(|open| open.progress.entries > 0 && open.seq <= wanted)
            && self.hot.durable_appends < DURABLE_APPENDS
        {
            self.close_frame();
        }
        while self.hot.appends < self.params.max_appends && self.issue_append(wanted) {}
        self.sync_if_needed(wanted);
    }

    fn issue_append(&mut self, wanted: u64) -> bool {
        let first_seq = self.hot.issued_seq + 1;
        let Some(first) = self.hot.frame(first_seq) else {
            return false;
        };
        let tail_at = first.tail_at.expect("an unwritten frame is in the tail");
        let addr = first.addr;
        let mut blocks = first.blocks;
        let mut last_seq = first_seq;
        while let Some(next) = self.hot.frame(last_seq + 1) {
            // A piece is contiguous in the tail as in the segment.
            if next.tail_at != Some(tail_at + blocks)
                || next.addr != Addr(addr.0 + blocks)
                || blocks + next.blocks > APPEND_BLOCKS
            {
                break;
            }
            blocks += next.blocks;
            last_seq += 1;
        }
        let durable = first_seq <= wanted
            && self.hot.durable_chain + 1 == first_seq
            && self.params.rules.sync_before_flush;
        if durable {
            self.hot.durable_chain = last_seq;
            self.hot.durable_appends += 1;
            self.counters.syncs += 1;
        }
        self.hot.appends += 1;
        self.hot.issued_seq = last_seq;
        let io = self.start_io(Io::Append {
            first_seq,
            last_seq,
            durable,
        });
        let bytes = self.tail.slice(tail_at, blocks);
        self.actions.push(Action::Write {
            io,
            offset: addr.offset(),
            ptr: bytes.as_ptr(),
            len: bytes.len(),
            durable,
        });
        true
    }

    pub(super) fn on_append(&mut self, first_seq: u64, last_seq: u64, durable: bool) {
        self.hot.appends -= 1;
        if durable {
            self.hot.durable_appends -= 1;
        }
        let mut blocks = 0;
        for seq in first_seq..=last_seq {
            let frame = self
                .hot
                .frame_mut(seq)
                .expect("a frame is held until it is written");
            frame.written = true;
            frame.synced = durable;
            blocks += u64::from(frame.blocks);
        }
        if !durable {
            self.hot.unsynced_blocks += blocks;
        }
        while self
            .hot
            .frame(self.hot.written_seq + 1)
            .is_some_and(|f| f.written)
        {
            self.hot.written_seq += 1;
        }
        if !self.params.rules.sync_before_flush {
            // The broken store of the test: it takes "written" for "durable".
            self.answer_waiters(self.hot.written_seq);
        }
        if durable && !self.params.rules.ordered_ack {
            // The broken store of the test: it answers for a frame whose predecessor may still be lost.
            self.answer_waiters(last_seq);
        }
        self.reclaim_tail();
        self.advance_durable();
    }

    /// Lets go of tail frames whose append ended, oldest first: after a kill the tail must hold everything the log
    /// does not hold without a gap.
    fn reclaim_tail(&mut self) {
        while self.hot.reclaimed_seq < self.hot.written_seq {
            let next_seq = self.hot.reclaimed_seq + 2;
            let next = match self.hot.frame(next_seq) {
                Some(f) => f.tail_at,
                None => self.hot.open.as_ref().map(|o| o.tail_at),
            };
            self.hot.reclaimed_seq += 1;
            let seq = self.hot.reclaimed_seq;
            self.hot
                .frame_mut(seq)
                .expect("a frame is held until the tail lets go")
                .tail_at = None;
            self.tail.reclaim(next, next_seq);
        }
        self.release_frames();
    }

    /// Forgets frames that are applied and no longer in the tail.
    pub(super) fn release_frames(&mut self) {
        while self
            .hot
            .frames
            .front()
            .is_some_and(|f| f.tail_at.is_none() && f.seq <= self.hot.applied_seq)
        {
            self.hot.frames.pop_front();
        }
    }

    fn sync_if_needed(&mut self, wanted: u64) {
        if self.hot.sync_in_flight {
            return;
        }
        let for_waiters = !self.waiters.is_empty()
            && self.hot.durable_seq < wanted
            && self.hot.written_seq > self.hot.durable_seq
            // A durable append under way will answer them without a sync of its own.
            && self.waiters.front().is_some_and(|w| w.target <= self.hot.written_seq && w.target > self.hot.durable_seq);
        let background = self.hot.unsynced_blocks >= self.params.sync_log_blocks;
        let asked = self.hot.sync_wanted > self.hot.syncs_started;
        if !(for_waiters || background || asked) {
            return;
        }
        self.hot.sync_in_flight = true;
        self.hot.unsynced_blocks = 0;
        self.hot.syncs_started += 1;
        self.counters.syncs += 1;
        let io = self.start_io(Io::Sync {
            written_seq: self.hot.written_seq,
            number: self.hot.syncs_started,
        });
        self.actions.push(Action::Sync { io });
    }

    /// Asks for a sync that begins after now; its number.
    pub(super) fn want_sync(&mut self) -> u64 {
        self.hot.sync_wanted = self.hot.syncs_started + 1;
        self.hot.sync_wanted
    }

    pub(super) fn on_sync(&mut self, written_seq: u64, number: u64) {
        self.hot.sync_in_flight = false;
        self.hot.syncs_done = number;
        self.hot.durable_seq = self.hot.durable_seq.max(written_seq);
        self.advance_durable();
    }

    fn advance_durable(&mut self) {
        while self.hot.durable_seq < self.hot.written_seq
            && self
                .hot
                .frame(self.hot.durable_seq + 1)
                .is_some_and(|f| f.written && f.synced)
        {
            self.hot.durable_seq += 1;
        }
        self.hot.durable_chain = self.hot.durable_chain.max(self.hot.durable_seq);
        if self.hot.durable_seq >= self.hot.last_acked_seq() {
            self.hot.dirty_since_ms = None;
        }
        self.answer_waiters(self.hot.durable_seq);
    }

    fn answer_waiters(&mut self, up_to: u64) {
        while self.waiters.front().is_some_and(|w| w.target <= up_to) {
            if let Some(Waiter { op: Some(op), .. }) = self.waiters.pop_front() {
                self.actions.push(Action::Done {
                    op,
                    result: Ok(ReadInfo::default()),
                });
            }
        }
    }
}
