//! The store's state, its entry points, and what happens when an I/O ends.

use std::collections::{BTreeMap, VecDeque};

use hashbrown::HashMap;
use slab::Slab;

use super::append::{Hot, Waiter};
use super::checkpoint::CheckpointState;
use super::clean::Cleaner;
use super::cold::{Cold, ColdFrame};
use super::drop_layer::Dropper;
use super::format::{Addr, Geometry, Superblock};
use super::index::{Index, RowId};
use super::landing::Room;
use super::load::{Load, UnreadLeaf};
use super::read::ReadOp;
use super::scrub::Scrub;
use super::segment::{SegmentState, Segments};
use super::tail::Tail;
use super::{Action, AlignedBuf, Errno, Event, IoId, OpId, Params, StoreError, StoreStatus};
use crate::units::{Epoch, LayerId, StoreId, Version};

/// One store. Owned by one thread.
pub struct Store {
    pub(super) params: Params,
    pub(super) superblock: Superblock,
    pub(super) segments: Segments,
    pub(super) index: Index,
    pub(super) tail: Tail,
    pub(super) hot: Hot,
    pub(super) landing: Option<Room>,
    pub(super) cold: Cold,
    pub(super) ios: Slab<Io>,
    pub(super) reads: Slab<ReadOp>,
    pub(super) loads: HashMap<(RowId, u32), Load>,
    /// Leaves that the device failed to read lately; each is in `loads` too.
    pub(super) unread: BTreeMap<(RowId, u32), UnreadLeaf>,
    /// Who waits for everything up to a frame to be durable; targets never fall.
    pub(super) waiters: VecDeque<Waiter>,
    pub(super) checkpoint: CheckpointState,
    pub(super) cleaner: Cleaner,
    pub(super) dropper: Dropper,
    pub(super) scrub: Scrub,
    /// Blocks that leaves map to data, and those that damaged leaves did.
    pub(super) mapped: u64,
    /// Blocks that unapplied frames may add to `mapped` and to the leaves: an upper bound.
    pub(super) reserved: u64,
    pub(super) growth: Growth,
    /// Somebody was told [`super::WriteError::Busy`].
    pub(super) want_ready: bool,
    /// A turn's budget ended before the work did.
    pub(super) more_work: bool,
    pub(super) now_ms: u64,
    pub(super) poisoned: Option<Errno>,
    pub(super) counters: StoreStatus,
    pub(super) actions: Vec<Action>,
}

/// Making the file larger.
#[derive(Default)]
pub(super) struct Growth {
    pub(super) in_flight: bool,
    /// A write waits for it.
    pub(super) wanted: bool,
    /// Not tried again before then: it failed.
    pub(super) retry_at_ms: Option<u64>,
}

/// An I/O under way.
pub(super) enum Io {
    Append {
        first_seq: u64,
        last_seq: u64,
        durable: bool,
    },
    Sync {
        written_seq: u64,
        number: u64,
    },
    Cold(Box<ColdFrame>),
    LeafLoad {
        row: RowId,
        leaf: u32,
        buf: AlignedBuf,
    },
    /// A block that lies near a leaf that cannot be read.
    NearLeaf {
        row: RowId,
        leaf: u32,
        #[allow(dead_code, reason = "keeps the memory of the read alive")]
        buf: AlignedBuf,
    },
    Run(super::read::Run),
    /// A piece of the checkpoint area; the bytes belong to the checkpoint.
    CheckpointArea,
    Superblock(#[allow(dead_code, reason = "keeps the memory of the write alive")] AlignedBuf),
    Allocate {
        segments: u32,
    },
    CleanRead,
}

impl Store {
    pub(super) fn assemble(
        params: Params,
        superblock: Superblock,
        segments: Segments,
        index: Index,
        tail: Tail,
        hot: Hot,
    ) -> Store {
        Store {
            params,
            superblock,
            segments,
            index,
            tail,
            hot,
            landing: None,
            cold: Cold::default(),
            ios: Slab::new(),
            reads: Slab::new(),
            loads: HashMap::new(),
            unread: BTreeMap::new(),
            waiters: VecDeque::new(),
            checkpoint: CheckpointState::default(),
            cleaner: Cleaner::default(),
            dropper: Dropper::default(),
            scrub: Scrub::default(),
            mapped: 0,
            reserved: 0,
            growth: Growth::default(),
            want_ready: false,
            more_work: false,
            now_ms: 0,
            poisoned: None,
            counters: StoreStatus::default(),
            actions: Vec::new(),
        }
    }

    /// This store.
    pub fn id(&self) -> StoreId {
        self.superblock.store
    }

    /// Where its parts are.
    pub fn geometry(&self) -> Geometry {
        self.segments.geometry
    }

    pub(super) fn healthy(&self) -> Result<(), StoreError> {
        match self.poisoned {
            Some(e) => Err(StoreError::Poisoned(e)),
            None => Ok(()),
        }
    }

    /// Whether anything may still be written.
    pub(super) fn takes_changes(&self) -> Result<(), StoreError> {
        self.healthy()?;
        if self.checkpoint.is_last() {
            return Err(StoreError::Closed);
        }
        Ok(())
    }

    pub(super) fn start_io(&mut self, io: Io) -> IoId {
        self.ios.insert(io) as IoId
    }

    /// Gives the driver what is to be done. Call it once per turn of the driver's loop, after the turn's calls:
    /// writes that arrived in one turn share a frame.
    pub fn poll_actions(&mut self, out: &mut Vec<Action>) {
        if self.poisoned.is_none() {
            self.more_work = false;
            self.read_leaves_again();
            self.advance_apply();
            self.advance_clean();
            self.advance_drop();
            self.advance_checkpoint();
            self.advance_scrub();
            self.grow_if_wanted();
            self.pump();
        }
        if self.want_ready && (self.poisoned.is_some() || self.could_accept()) {
            self.want_ready = false;
            self.actions.push(Action::Ready);
        }
        out.append(&mut self.actions);
    }

    /// The time, in milliseconds since any fixed moment; never goes back.
    pub fn on_tick(&mut self, now_ms: u64) {
        debug_assert!(now_ms >= self.now_ms);
        self.now_ms = now_ms;
    }

    /// When [`Store::on_tick`] and [`Store::poll_actions`] must be called again though nothing else happened.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        if self.poisoned.is_some() {
            return None;
        }
        if self.more_work {
            return Some(self.now_ms);
        }
        let growth = self.growth.retry_at_ms.filter(|_| self.wants_growth());
        let leaf = self.leaves_again_at_ms();
        [
            self.writeback_deadline(),
            self.scrub_deadline(),
            growth,
            leaf,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// An I/O ended; `result` is the number of bytes moved (all of them) or the error.
    pub fn on_io(&mut self, io: IoId, result: Result<(), Errno>) {
        let io = self.ios.remove(io as usize);
        match (io, result) {
            (
                Io::Append {
                    first_seq,
                    last_seq,
                    durable,
                },
                Ok(()),
            ) => self.on_append(first_seq, last_seq, durable),
            (
                Io::Sync {
                    written_seq,
                    number,
                },
                Ok(()),
            ) => self.on_sync(written_seq, number),
            (Io::Cold(frame), Ok(())) => self.on_cold(*frame),
            (Io::Superblock(_), Ok(())) => self.on_superblock(),
            (Io::CheckpointArea, Ok(())) => self.on_checkpoint_area(),
            // What a failed write or sync left on the device is not known, and asking again does not tell.
            (
                Io::Append { .. }
                | Io::Sync { .. }
                | Io::Cold(_)
                | Io::Superblock(_)
                | Io::CheckpointArea,
                Err(e),
            ) => self.poison(e),
            (Io::LeafLoad { row, leaf, buf }, result) => self.on_leaf(row, leaf, buf, result),
            (Io::NearLeaf { row, leaf, .. }, result) => self.on_near_leaf(row, leaf, result),
            (Io::Run(run), result) => self.on_run(run, result),
            (Io::Allocate { segments }, result) => self.on_allocate(segments, result),
            (Io::CleanRead, result) => self.on_clean_read(result),
        }
    }

    /// Stops the store: everything that waits fails, and everything asked from now on.
    pub(super) fn poison(&mut self, error: Errno) {
        if self.poisoned.is_some() {
            return;
        }
        self.poisoned = Some(error);
        self.actions.push(Action::Event(Event::Poisoned(error)));
        let failed = StoreError::Poisoned(error);
        let mut ops: Vec<OpId> = self.waiters.drain(..).filter_map(|w| w.op).collect();
        ops.append(&mut self.checkpoint.take_waiters());
        for op in ops {
            self.actions.push(Action::Done {
                op,
                result: Err(failed.clone()),
            });
        }
        self.fail_waiting_reads(&failed);
        self.stop_scrub();
        self.want_ready = true;
    }

    pub(super) fn event(&mut self, event: Event) {
        self.actions.push(Action::Event(event));
    }

    pub(super) fn checksum_error(&mut self, error: StoreError) {
        self.counters.checksum_errors += 1;
        self.event(Event::ChecksumMismatch(error));
    }

    // -- space

    /// Blocks clients may fill, index included. 18 % is kept: cleaning at 82 % live costs what users accept, and
    /// less reserve would make it several times dearer.
    pub(super) fn capacity_blocks(&self) -> u64 {
        let geometry = &self.segments.geometry;
        // Tried again, it may grow after all.
        let failed = |at| at > self.now_ms && !self.growth.in_flight;
        let segments = if self.growth.retry_at_ms.is_some_and(failed) {
            self.segments.all.len() as u32
        } else {
            geometry.segments_max
        };
        self.capacity_of(segments)
    }

    /// What the segments that exist can hold. Nothing beyond it is admitted: the file may yet fail to grow, and what
    /// was acknowledged must find its place.
    pub(super) fn ready_blocks(&self) -> u64 {
        self.capacity_of(self.segments.all.len() as u32)
    }

    fn capacity_of(&self, segments: u32) -> u64 {
        // Of a small store the segments that are being written or emptied are a larger share.
        let segments = u64::from(segments);
        let usable = (segments * 82 / 100 - (segments / 12).min(5)).min(segments.saturating_sub(8));
        usable * u64::from(self.segments.geometry.segment_blocks) * 254 / 256
    }

    pub(super) fn used_blocks(&self) -> u64 {
        self.mapped + self.index.leaf_count * u64::from(super::format::LEAF_DISK_BLOCKS)
    }

    /// Chunks the directory has room for.
    pub(super) fn rows_max(&self) -> usize {
        let bytes =
            u64::from(self.segments.geometry.checkpoint_blocks) * crate::units::BLOCK_BYTES as u64;
        let table = u64::from(self.segments.geometry.segments_max) * 8 + 4096;
        (bytes.saturating_sub(table) / super::format::ROW_BYTES as u64) as usize
    }

    pub(super) fn wants_growth(&self) -> bool {
        let have = self.segments.all.len() as u64;
        let geometry = &self.segments.geometry;
        if have >= u64::from(geometry.segments_max) || self.growth.in_flight {
            return false;
        }
        if self.growth.wanted || self.used_blocks() + self.reserved > self.ready_blocks() * 3 / 4 {
            return true;
        }
        // Two and a half times what is used, so that cleaning finds segments that are more than half empty.
        let used = self.used_blocks() + self.reserved;
        let target = 5 * used / 2 / u64::from(geometry.segment_blocks)
            + 4 * u64::from(self.params.grow_segments);
        // Before cleaning would begin: a larger file is cheaper than copying.
        let enough = (self.params.grow_segments as usize).max(self.clean_start() + 2);
        let low = self.segments.free_count() < enough;
        low && (have < target || self.segments.free_count() < 4)
    }

    fn grow_if_wanted(&mut self) {
        if !self.wants_growth() || self.growth.retry_at_ms.is_some_and(|at| self.now_ms < at) {
            return;
        }
        let have = self.segments.all.len() as u32;
        let geometry = self.segments.geometry;
        let count = self.params.grow_segments.min(geometry.segments_max - have);
        self.growth.in_flight = true;
        let io = self.start_io(Io::Allocate { segments: count });
        let block = crate::units::BLOCK_BYTES as u64;
        self.actions.push(Action::Allocate {
            io,
            offset: geometry.segment_start(have).offset(),
            len: u64::from(count) * u64::from(geometry.segment_blocks) * block,
        });
    }

    fn on_allocate(&mut self, segments: u32, result: Result<(), Errno>) {
        self.growth.in_flight = false;
        self.growth.wanted = false;
        match result {
            Ok(()) => {
                self.growth.retry_at_ms = None;
                self.segments.grow(segments);
            }
            // It ends with a sync of the whole file, and a sync that failed may have been for what clients wrote: the
            // next one would not say so again.
            Err(e) if !e.is_want_of_room() => self.poison(e),
            Err(e) => {
                // A minute: long enough not to be a load, short enough after somebody made room.
                self.growth.retry_at_ms = Some(self.now_ms + 60_000);
                self.event(Event::GrowthFailed(e));
            }
        }
    }

    /// Gives back a read's hold on a segment.
    pub(super) fn unpin(&mut self, addr: Addr) {
        let segment = self.segments.of(addr);
        segment.reads -= 1;
        if segment.reads == 0 && segment.state == SegmentState::Freeing {
            let s = self.segments.geometry.segment_of(addr);
            if self.checkpoint.is_released(s) {
                self.checkpoint.forget_released(s);
                self.segments.release(s);
            }
        }
    }

    /// What the store says of itself.
    pub fn status(&self) -> StoreStatus {
        StoreStatus {
            capacity_blocks: self.capacity_blocks(),
            mapped_blocks: self.mapped,
            used_blocks: self.used_blocks(),
            segments: self.segments.all.len() as u32,
            segments_free: self.segments.free_count() as u32,
            segments_open: self.segments.count(SegmentState::Open),
            segments_freeing: self.segments.count(SegmentState::Freeing),
            checkpoint_seq: self.superblock.checkpoint_seq,
            checkpoint_log_blocks: self.hot.checkpoint_log_blocks,
            segment_blocks: self.segments.geometry.segment_blocks,
            tail_used_blocks: self.tail.used(),
            tail_blocks: self.tail.blocks,
            leaves_cached: self.index.leaves_cached(),
            leaves_dirty: self.index.dirty_leaves,
            pending_entries: self.index.pending_len(),
            dropping_layers: self.dropper.layers.len(),
            poisoned: self.poisoned,
            scrubbing: self.scrub.running(),
            ..self.counters.clone()
        }
    }

    /// One line on what is under way, for a test that hangs.
    #[doc(hidden)]
    pub fn debug_line(&self) -> String {
        let h = &self.hot;
        format!(
            "next {} open {:?} issued {} written {} reclaimed {} durable {} chain {} applied {} appends {}/{} sync {} waiters {:?} ios {} loads {} checkpoint {:?} cleaning {} dirty {:?} now {} block {} free {} of {} keep {} start {} batch {} growth {} used {} reserved {} more {} {}",
            h.next_seq,
            h.open.as_ref().map(|o| (o.seq, o.progress)),
            h.issued_seq,
            h.written_seq,
            h.reclaimed_seq,
            h.durable_seq,
            h.durable_chain,
            h.applied_seq,
            h.appends,
            h.durable_appends,
            h.sync_in_flight,
            self.waiters,
            self.ios.len(),
            self.loads.len(),
            self.checkpoint.phase_name(),
            self.cleaner.running(),
            h.dirty_since_ms,
            self.now_ms,
            h.next_block,
            self.segments.free_count(),
            self.segments.all.len(),
            self.keep_for_cold(),
            self.clean_start(),
            self.clean_batch(),
            self.wants_growth(),
            self.used_blocks(),
            self.reserved,
            self.more_work,
            self.debug_cleaning(),
        )
    }

    /// Layers that have blocks here, in order, each with the highest epoch that anything in it was written under.
    ///
    /// What the metadata does not know of is an orphan. A layer whose epoch is beyond its volume's is newer than the
    /// metadata (restored from a backup?): it must not be written under an epoch that was used, because an entry with a
    /// larger version is never replaced by one with a smaller.
    pub fn layers(&self) -> Vec<(LayerId, Epoch)> {
        let mut layers = std::collections::BTreeMap::new();
        for (layer, version) in self.index.versions() {
            let newest = layers.entry(layer).or_insert(Version::NONE);
            *newest = (*newest).max(version);
        }
        layers
            .into_iter()
            .map(|(layer, newest)| (layer, newest.epoch()))
            .collect()
    }

    /// The memory of its tail, from which appends are written; mapped until the store is dropped.
    pub fn tail_memory(&mut self) -> (*mut u8, usize) {
        self.tail.memory()
    }

    /// Whether nothing is under way and nothing waits, so that the store may be dropped.
    pub fn is_idle(&self) -> bool {
        self.ios.is_empty() && self.waiters.is_empty() && !self.checkpoint.running()
    }

    /// Whether nothing depends on the tail: the store was closed in order, and its log has everything that was ever
    /// acknowledged, durably. The next opening does not look at a tail then.
    pub fn needs_no_tail(&self) -> bool {
        self.poisoned.is_none()
            && self.superblock.clean
            && self.is_idle()
            && self.tail.used() == 0
            && self.hot.last_acked_seq() <= self.hot.durable_seq
    }

    /// Panics when the state contradicts itself. Cheap enough to call after every event of a test.
    pub fn check_invariants(&self) {
        self.segments.check_invariants();
        self.index.check_invariants();
        self.hot.check_invariants();
        assert!(
            self.waiters
                .iter()
                .zip(self.waiters.iter().skip(1))
                .all(|(a, b)| a.target <= b.target)
        );
        if let Some(Room::InFrame { start, count }) = &self.landing {
            let open = self.hot.open.as_ref().expect("the landing's frame is open");
            assert!(start + count <= open.placed && open.landing_header > 0);
        }
        assert!(self.unread.keys().all(|key| self.loads.contains_key(key)));
        for (i, frame) in self.hot.frames.iter().enumerate() {
            assert_eq!(frame.seq, self.hot.first_seq() + i as u64);
        }
    }

    /// Recounts live blocks of all segments from the index and compares; needs every leaf in memory or on `load`.
    /// For tests: it looks at everything.
    pub fn check_live_counts(&self, mut load: impl FnMut(Addr) -> Box<super::format::LeafEntries>) {
        let mut live = vec![0u32; self.segments.all.len()];
        let mut mapped = 0u64;
        let mut leaves = 0u64;
        let geometry = &self.segments.geometry;
        for (id, row) in self.index.rows() {
            for (i, mapping) in row.leaves.iter().enumerate() {
                let on_disk = mapping.addr().is_stored();
                if on_disk {
                    live[geometry.segment_of(mapping.addr()) as usize] +=
                        super::format::LEAF_DISK_BLOCKS;
                }
                let loaded;
                let entries = match self.index.slot_of(id, i as u32) {
                    Some(slot) => &self.index.leaf(slot).entries,
                    None if on_disk => {
                        loaded = load(mapping.addr());
                        &loaded
                    }
                    None => continue,
                };
                leaves += 1;
                for e in entries.iter().filter(|e| e.addr().is_stored()) {
                    mapped += 1;
                    live[geometry.segment_of(e.addr()) as usize] += 1;
                }
            }
        }
        for (s, segment) in self.segments.all.iter().enumerate() {
            assert_eq!(segment.live, live[s], "live blocks of segment {s}");
        }
        assert_eq!(self.mapped, mapped, "mapped blocks");
        assert_eq!(self.index.leaf_count, leaves, "leaves");
    }
}
