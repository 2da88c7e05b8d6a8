//! Moving written frames into leaves, in order: what a checkpoint will say.
//!
//! Every entry is applied, also one that a later frame has overwritten: the later frame may yet be lost to a power
//! cut while this one was flushed.

use super::Store;
use super::format::{
    Addr, Entries, EntryKind, EntryRef, FRAME_FIXED_BYTES, FRAME_HEADER_BLOCKS, Mapping,
};
use super::index::{LeafSlot, RowId, leaf_of};
use crate::units::LEAF_BLOCKS;

/// Blocks applied in one turn: some 100 microseconds.
const BUDGET: u32 = 4096;
/// Leaves read ahead of apply.
const LOADS: usize = 64;

/// Something must be read first.
pub(super) struct Blocked;

impl Store {
    pub(super) fn advance_apply(&mut self) {
        let mut budget = BUDGET;
        while budget > 0
            && !self.checkpoint.holds_apply()
            && self.hot.applied_seq < self.hot.written_seq
        {
            let seq = self.hot.applied_seq + 1;
            let frame = self
                .hot
                .frame_mut(seq)
                .expect("a frame is held until it is applied");
            let header = frame.header;
            let first_data = Addr(frame.addr.0 + FRAME_HEADER_BLOCKS);
            let bytes = std::mem::take(&mut frame.bytes);
            let end = FRAME_FIXED_BYTES + usize::from(header.progress.entry_bytes);
            let mut blocked = false;
            while self.hot.cursor.0 < end && budget > 0 {
                let entry = Entries::at(&bytes, self.hot.cursor.0)
                    .expect("checked when the frame was made");
                match self.apply_entry(&entry, first_data, seq, &mut budget) {
                    Ok(true) => {
                        self.hot.cursor = (self.hot.cursor.0 + entry.entry.header_bytes(), 0)
                    }
                    Ok(false) => {}
                    Err(Blocked) => {
                        self.read_ahead(&bytes, end);
                        blocked = true;
                        break;
                    }
                }
            }
            let done = self.hot.cursor.0 >= end;
            let frame = self.hot.frame_mut(seq).expect("still held");
            if !done {
                frame.bytes = bytes;
            } else {
                self.reserved -= frame.reserved;
                self.hot.unapplied_blocks -= u64::from(frame.blocks);
                self.hot.cursor = (FRAME_FIXED_BYTES, 0);
                self.hot.applied_seq = seq;
                self.release_frames();
            }
            if blocked {
                return;
            }
        }
        self.more_work |= budget == 0;
    }

    /// Starts reading the leaves that the entries behind the cursor will need.
    fn read_ahead(&mut self, bytes: &[u8], end: usize) {
        let mut at = self.hot.cursor.0;
        while at < end && self.loads.len() < LOADS {
            let entry = Entries::at(bytes, at)
                .expect("checked when the frame was made")
                .entry;
            at += entry.header_bytes();
            if !matches!(entry.kind, EntryKind::Data | EntryKind::Zero) {
                continue;
            }
            let Some(row) = self.index.row_of(entry.key) else {
                continue;
            };
            for leaf in leaf_of(entry.first_block)..=leaf_of(entry.first_block + entry.count - 1) {
                if self.index.slot_of(row, leaf).is_none()
                    && self.index.row(row).leaves[leaf as usize].addr().is_stored()
                {
                    self.load_leaf(row, leaf).background = true;
                }
            }
        }
    }

    /// Applies from the cursor on; true when the entry is done.
    fn apply_entry(
        &mut self,
        entry: &EntryRef<'_>,
        first_data: Addr,
        seq: u64,
        budget: &mut u32,
    ) -> Result<bool, Blocked> {
        let e = entry.entry;
        match e.kind {
            EntryKind::Data | EntryKind::Zero => {}
            EntryKind::DropLayer => {
                self.begin_drop(e.key.layer);
                return Ok(true);
            }
            // The client stream has no others.
            EntryKind::Relocation | EntryKind::Leaf => return Ok(true),
        }
        let row = self.index.get_or_insert_row(e.key);
        while self.hot.cursor.1 < e.count {
            if *budget == 0 {
                return Ok(false);
            }
            let done = self.hot.cursor.1;
            let block = e.first_block + done;
            let leaf = leaf_of(block);
            let n = (e.count - done).min((leaf + 1) * LEAF_BLOCKS - block);
            if e.kind == EntryKind::Zero {
                self.apply_zero(row, leaf, block, n, e.version, seq)?;
            } else {
                let slot = self.writable_leaf(row, leaf)?;
                for i in 0..n {
                    let addr = Addr(first_data.0 + e.data_start + done + i);
                    let mapping = Mapping::new(addr, entry.crc(done + i), e.version);
                    self.map_block(slot, block + i, mapping);
                    self.index.clear_pending(row, block + i, seq, e.version);
                }
            }
            *budget = budget.saturating_sub(n);
            self.hot.cursor.1 += n;
        }
        Ok(true)
    }

    /// Points a block of a leaf somewhere else, unless what it has is newer.
    fn map_block(&mut self, slot: LeafSlot, block: u32, mapping: Mapping) {
        let old = {
            let entry = &mut self.index.leaf_mut(slot).entries[(block % LEAF_BLOCKS) as usize];
            if entry.version > mapping.version {
                return;
            }
            std::mem::replace(entry, mapping)
        };
        if old.addr().is_stored() {
            self.segments.sub_live(old.addr(), 1);
            self.freed(old.addr());
        }
        // What a damaged leaf mapped takes its room for good: it stays counted, as it does in its segments.
        let had = old.addr().is_stored();
        if mapping.addr().is_stored() {
            self.segments.add_live(mapping.addr(), 1);
            self.mapped += u64::from(!had);
        } else if had {
            self.unmapped_one();
        }
        self.index.mark_dirty(slot);
    }

    /// A block that was mapped to data is not any more.
    pub(super) fn unmapped_one(&mut self) {
        // A checkpoint from before lost blocks kept their count may say less than there is.
        self.mapped = self.mapped.saturating_sub(1);
    }

    /// A block of this segment is no longer wanted. Its segment is left alone until a checkpoint says the same;
    /// the broken store of the test does not wait for that.
    pub(super) fn freed(&mut self, addr: Addr) {
        if self.params.rules.quarantine_freed || !self.cold.is_quiet() {
            return;
        }
        let s = self.segments.geometry.segment_of(addr);
        if self.segments.is_empty_sealed(s, self.hot.applied_seq) {
            self.segments.reuse_at_once(s);
        }
    }

    /// The leaf in memory, ready to be changed.
    pub(super) fn writable_leaf(&mut self, row: RowId, leaf: u32) -> Result<LeafSlot, Blocked> {
        if let Some(slot) = self.index.slot_of(row, leaf)
            && !self.doubts_damage(slot)
        {
            return Ok(slot);
        }
        // A cache full of changed leaves is emptied by a checkpoint, which must come before more of them.
        if self.index.dirty_leaves >= self.params.leaf_cache.max(16) {
            self.checkpoint.want();
            return Err(Blocked);
        }
        let on_disk = self.index.row(row).leaves[leaf as usize];
        let fill = match on_disk.addr() {
            Addr::UNMAPPED => Mapping::UNMAPPED,
            Addr::ZERO => Mapping::new(Addr::ZERO, 0, on_disk.version),
            _ => {
                self.load_leaf(row, leaf).background = true;
                return Err(Blocked);
            }
        };
        self.make_room_for_leaf();
        self.index.leaf_count += 1;
        let slot = self
            .index
            .insert_leaf(row, leaf, Box::new([fill; LEAF_BLOCKS as usize]));
        self.index.mark_dirty(slot);
        Ok(slot)
    }

    fn apply_zero(
        &mut self,
        row: RowId,
        leaf: u32,
        block: u32,
        n: u32,
        version: u64,
        seq: u64,
    ) -> Result<(), Blocked> {
        let on_disk = self.index.row(row).leaves[leaf as usize].addr();
        let whole = n == LEAF_BLOCKS;
        if self.index.slot_of(row, leaf).is_some() || on_disk.is_stored() {
            let slot = self.writable_leaf(row, leaf)?;
            for b in block..block + n {
                self.map_block(slot, b, Mapping::new(Addr::ZERO, 0, version));
            }
            let entries = &self.index.leaf(slot).entries;
            if whole && entries.iter().all(|e| e.addr() == Addr::ZERO) {
                let newest = entries.iter().map(|e| e.version).fold(version, u64::max);
                self.drop_zero_leaf(row, leaf, newest);
            }
        } else if whole {
            // Nothing was ever written here: the row alone says "zeros".
            let r = &mut self.index.row_mut(row).leaves[leaf as usize];
            if r.version <= version {
                *r = Mapping::new(Addr::ZERO, 0, version);
            }
        }
        if whole {
            self.index.clear_zero_mark(row, leaf, seq, version);
        } else {
            for b in block..block + n {
                self.index.clear_pending(row, b, seq, version);
            }
        }
        Ok(())
    }

    /// Replaces a leaf that maps nothing but zeros by a mark in its row.
    fn drop_zero_leaf(&mut self, row: RowId, leaf: u32, version: u64) {
        if let Some(slot) = self.index.slot_of(row, leaf) {
            self.index.remove_leaf(slot);
        }
        let old = std::mem::replace(
            &mut self.index.row_mut(row).leaves[leaf as usize],
            Mapping::new(Addr::ZERO, 0, version),
        );
        if old.addr().is_stored() {
            self.segments.sub_leaf(old.addr());
            self.freed(old.addr());
        }
        self.index.leaf_count -= 1;
    }

    /// Points a block at its copy, if it is still the block that was copied.
    pub(super) fn relocate_block(
        &mut self,
        row: RowId,
        block: u32,
        version: u64,
        from: Addr,
        to: Addr,
    ) -> Result<(), Blocked> {
        let leaf = leaf_of(block);
        let slot = match self.index.slot_of(row, leaf) {
            Some(slot) => slot,
            None if !self.index.row(row).leaves[leaf as usize].addr().is_stored() => return Ok(()),
            None => {
                // The checkpoint that would make room waits for this: take the leaf all the same.
                self.load_leaf(row, leaf).background = true;
                return Err(Blocked);
            }
        };
        let entry = &mut self.index.leaf_mut(slot).entries[(block % LEAF_BLOCKS) as usize];
        if entry.addr() != from || entry.version != version {
            return Ok(());
        }
        *entry = Mapping::new(to, entry.crc, version);
        self.segments.sub_live(from, 1);
        self.segments.add_live(to, 1);
        self.freed(from);
        self.index.mark_dirty(slot);
        Ok(())
    }
}
