//! Leaves from disk, and what becomes of one that cannot be read.
//!
//! Whoever asks is told at once that the device failed. Applying, cleaning and the end of a layer cannot do without the
//! leaf: they wait while it is read again, for [`UNREAD_MS`] at least. An error that passes leaves no trace. A leaf that
//! cannot be read while the device reads what lies near it is damaged as if its checksum did not match; nothing else is
//! taken for that, because once it is written its loss is for ever. Where nothing near it can be read either, the device
//! is at fault, and the store stops.

use hashbrown::hash_map::Entry as MapEntry;

use super::format::{Addr, LEAF_DISK_BLOCKS, LEAF_DISK_BYTES, LeafEntries, Mapping};
use super::index::{LeafSlot, RowId};
use super::machine::Io;
use super::{Action, AlignedBuf, Errno, Store, StoreError};
use crate::units::LEAF_BLOCKS;

/// Between one try and the next. Whoever asks meanwhile gets the error of the last one.
const AGAIN_MS: u64 = 1000;
/// For so long a leaf is tried before it is taken for damaged: links and paths recover in less. When the device reads
/// nothing near it, for twice as long. Writes go on meanwhile, as long as what waits to be applied has room.
const UNREAD_MS: u64 = 10_000;
/// So often something near it must have been read right before it could not be: one time may be a device that came and
/// went.
const TIMES_ALONE: u32 = 3;
/// What lies near it: within 2 MiB, beyond what a device loses at once when a place on it goes bad.
const NEAR_SHIFT_MAX: u32 = 9;

/// What was found damaged longer ago is read again before that is recorded, or told to a client: it may have been met
/// when the device was not as well as it is now.
const DAMAGED_MS: u64 = 60_000;

/// A leaf being read, or to be read again.
#[derive(Default)]
pub(super) struct Load {
    /// Reads that wait for it.
    pub(super) reads: Vec<u32>,
    /// Apply, cleaning or a drop waits for it.
    pub(super) background: bool,
    /// Copies are compared: a damaged one is written again from the others, when it is known to be damaged.
    pub(super) compared: bool,
    /// Somebody was told to come again when it is here.
    pub(super) awaited: bool,
}

impl Load {
    /// Whether it is worth trying until it is here, or known to be damaged.
    fn is_wanted(&self) -> bool {
        self.background || self.compared
    }
}

/// A leaf that the device failed to read.
pub(super) struct UnreadLeaf {
    error: Errno,
    since_ms: u64,
    /// Not before then; `None`: a read is under way.
    again_at_ms: Option<u64>,
    tries: u32,
    /// The device has just read something near it.
    near_is_readable: bool,
    /// How often it could not be read right after that.
    alone: u32,
}

impl Store {
    /// Starts reading a leaf that lies on disk, unless that is under way or failed just now.
    pub(super) fn load_leaf(&mut self, row: RowId, leaf: u32) -> &mut Load {
        if let MapEntry::Vacant(_) = self.loads.entry((row, leaf)) {
            self.read_leaf(row, leaf);
        }
        self.loads.entry((row, leaf)).or_default()
    }

    fn read_leaf(&mut self, row: RowId, leaf: u32) {
        let mut buf = AlignedBuf::zeroed(LEAF_DISK_BYTES);
        let (ptr, len) = (buf.as_mut_ptr(), buf.len());
        let addr = self.index.row(row).leaves[leaf as usize].addr();
        debug_assert!(addr.is_stored());
        self.pin(addr, LEAF_DISK_BLOCKS, true);
        let io = self.start_io(Io::LeafLoad { row, leaf, buf });
        self.actions.push(Action::Read {
            io,
            offset: addr.offset(),
            ptr,
            len,
        });
    }

    pub(super) fn on_leaf(
        &mut self,
        row: RowId,
        leaf: u32,
        buf: AlignedBuf,
        result: Result<(), Errno>,
    ) {
        let load = self.loads.remove(&(row, leaf)).unwrap_or_default();
        let mapping = self.index.row(row).leaves[leaf as usize];
        // A leaf's address changes only when it is written, and it is written only from memory.
        self.pin(mapping.addr(), LEAF_DISK_BLOCKS, false);
        match result {
            Ok(()) => {
                let entries = self.decode_leaf(row, leaf, &buf, mapping);
                self.leaf_is_here(row, leaf, load, entries);
            }
            Err(error) => self.leaf_failed(row, leaf, load, error),
        }
    }

    fn leaf_is_here(&mut self, row: RowId, leaf: u32, load: Load, entries: Box<LeafEntries>) {
        self.unread.remove(&(row, leaf));
        self.make_room_for_leaf();
        let slot = self.index.insert_leaf(row, leaf, entries);
        self.index.leaf_mut(slot).read_ms = self.now_ms;
        for id in load.reads {
            self.resolve(id);
            self.finish_read(id);
        }
    }

    fn decode_leaf(
        &mut self,
        row: RowId,
        leaf: u32,
        bytes: &[u8],
        mapping: Mapping,
    ) -> Box<LeafEntries> {
        let mut entries: Box<LeafEntries> = Box::new([Mapping::UNMAPPED; LEAF_BLOCKS as usize]);
        if crc32fast::hash(bytes) == mapping.crc {
            zerocopy::IntoBytes::as_mut_bytes(&mut *entries).copy_from_slice(bytes);
            let geometry = self.segments.geometry;
            let sane = |m: &Mapping| !m.addr().is_stored() || geometry.contains(m.addr(), 1);
            if entries.iter().all(sane) {
                return entries;
            }
        }
        self.damaged_leaf(row, leaf)
    }

    /// What a damaged leaf mapped stays counted as live in its segments, so nothing is reused by mistake; its blocks
    /// fail to read until they are written again.
    fn damaged_leaf(&mut self, row: RowId, leaf: u32) -> Box<LeafEntries> {
        let key = self.index.row(row).key;
        self.checksum_error(StoreError::Lost {
            layer: key.layer,
            chunk: key.chunk,
            block: leaf * LEAF_BLOCKS,
        });
        Box::new([Mapping::new(Addr::LOST, 0, 0); LEAF_BLOCKS as usize])
    }

    /// Forgets that a leaf is damaged, if that is not known anew and nothing was made of it. True: it has to be read.
    #[inline]
    pub(super) fn doubts_damage(&mut self, slot: LeafSlot) -> bool {
        let leaf = self.index.leaf(slot);
        let is_doubtful = leaf.is_lost()
            && !leaf.dirty
            && !leaf.writing
            && self.now_ms - leaf.read_ms > DAMAGED_MS
            && self.index.row(leaf.row).leaves[leaf.index as usize]
                .addr()
                .is_stored();
        if is_doubtful {
            self.index.remove_leaf(slot);
        }
        is_doubtful
    }

    /// Evicts clean leaves so that one more fits.
    pub(super) fn make_room_for_leaf(&mut self) {
        let limit = self.params.leaf_cache.max(16);
        if self.index.leaves_cached() >= limit {
            self.index.evict(limit - 1);
        }
    }

    // -- leaves that cannot be read

    /// What the device said of a leaf that it failed to read lately.
    pub(super) fn leaf_error(&self, row: RowId, leaf: u32) -> Option<Errno> {
        self.unread.get(&(row, leaf)).map(|unread| unread.error)
    }

    fn leaf_failed(&mut self, row: RowId, leaf: u32, mut load: Load, error: Errno) {
        self.counters.read_errors += 1;
        for id in std::mem::take(&mut load.reads) {
            self.leaf_is_unreadable(id, error);
            self.finish_read(id);
        }
        // The next read asks the device again.
        if !load.is_wanted() && !load.awaited {
            self.unread.remove(&(row, leaf));
            return;
        }
        let now = self.now_ms;
        let unread = self.unread.entry((row, leaf)).or_insert(UnreadLeaf {
            error,
            since_ms: now,
            again_at_ms: None,
            tries: 0,
            near_is_readable: false,
            alone: 0,
        });
        unread.error = error;
        unread.tries += 1;
        unread.alone += u32::from(std::mem::take(&mut unread.near_is_readable));
        unread.again_at_ms = Some(now + AGAIN_MS);
        let (lasted_ms, alone) = (now - unread.since_ms, unread.alone);
        if load.is_wanted() && lasted_ms >= UNREAD_MS && alone >= TIMES_ALONE {
            let entries = self.damaged_leaf(row, leaf);
            return self.leaf_is_here(row, leaf, load, entries);
        }
        if lasted_ms >= 2 * UNREAD_MS {
            load.compared = false;
            if load.background {
                self.poison(error);
            }
        }
        // They come again now, and are told.
        load.awaited = false;
        self.loads.insert((row, leaf), load);
    }

    pub(super) fn leaves_again_at_ms(&self) -> Option<u64> {
        let unread = self.unread.values();
        unread.filter_map(|unread| unread.again_at_ms).min()
    }

    /// Tries leaves again whose time has come, if something cannot do without them.
    pub(super) fn read_leaves_again(&mut self) {
        if self.unread.is_empty() {
            return;
        }
        let now = self.now_ms;
        let is_due = |unread: &UnreadLeaf| unread.again_at_ms.is_some_and(|at| at <= now);
        let due = self.unread.iter().filter(|(_, unread)| is_due(unread));
        let due: Vec<(RowId, u32)> = due.map(|(key, _)| *key).collect();
        for key in due {
            if !self.loads.get(&key).is_some_and(Load::is_wanted) {
                self.loads.remove(&key);
                self.unread.remove(&key);
                continue;
            }
            self.read_near_leaf(key);
        }
    }

    /// Reads a block that lies near a leaf, before and behind it by turns, each time farther away: what went bad may be
    /// more than the leaf.
    fn read_near_leaf(&mut self, (row, leaf): (RowId, u32)) {
        let Some(unread) = self.unread.get_mut(&(row, leaf)) else {
            return;
        };
        unread.again_at_ms = None;
        let at = self.index.row(row).leaves[leaf as usize].addr().0;
        let distance = 1 << (unread.tries - 1).min(NEAR_SHIFT_MAX);
        let behind = at + LEAF_DISK_BLOCKS - 1 + distance;
        let geometry = &self.segments.geometry;
        let end = geometry.segment_start(self.segments.all.len() as u32).0;
        let near = if unread.tries % 2 == 0 && behind < end {
            behind
        } else {
            at.saturating_sub(distance)
        };
        let mut buf = AlignedBuf::blocks(1);
        let (ptr, len) = (buf.as_mut_ptr(), buf.len());
        let io = self.start_io(Io::NearLeaf { row, leaf, buf });
        self.actions.push(Action::Read {
            io,
            offset: Addr(near).offset(),
            ptr,
            len,
        });
    }

    pub(super) fn on_near_leaf(&mut self, row: RowId, leaf: u32, result: Result<(), Errno>) {
        self.counters.read_errors += u64::from(result.is_err());
        let Some(unread) = self.unread.get_mut(&(row, leaf)) else {
            return;
        };
        unread.near_is_readable = result.is_ok();
        if self.poisoned.is_none() {
            self.read_leaf(row, leaf);
        }
    }
}
