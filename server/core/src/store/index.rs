//! Where every block is: directory rows, the leaves in memory, and what is written but not yet in a leaf.
//!
//! A block is looked up in this order: pending entries (newest writes), zero marks (whole leaves trimmed), the leaf.

use std::hash::{BuildHasherDefault, Hasher};

use hashbrown::HashMap;
use slab::Slab;

use super::format::{Addr, ExtentKey, LeafEntries, Mapping};
use crate::units::{CHUNK_LEAVES, LEAF_BLOCKS, LayerId, Version};

/// A directory row's place in memory.
pub(super) type RowId = u32;
/// A leaf's place in memory.
pub(super) type LeafSlot = u32;

const NO_SLOT: u32 = u32::MAX;

pub(super) struct Row {
    pub(super) key: ExtentKey,
    /// Where each leaf lies on disk.
    pub(super) leaves: [Mapping; CHUNK_LEAVES as usize],
    /// Where each leaf is in memory.
    slots: [u32; CHUNK_LEAVES as usize],
    /// Pending entries in each leaf's range.
    pub(super) pending: [u16; CHUNK_LEAVES as usize],
    /// Leaves with a zero mark.
    pub(super) zero_marks: u32,
    /// Its layer was dropped; nothing may be looked up in it any more.
    pub(super) dropped: bool,
}

/// A write that is not in a leaf yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) version: u64,
    /// The client frame that carries it.
    pub(super) seq: u64,
    pub(super) addr: Addr,
    pub(super) crc: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct ZeroMark {
    pub(super) version: u64,
    pub(super) seq: u64,
}

pub(super) struct Leaf {
    pub(super) row: RowId,
    pub(super) index: u32,
    pub(super) entries: Box<LeafEntries>,
    pub(super) dirty: bool,
    /// Being written for a checkpoint.
    pub(super) writing: bool,
    /// When it came from disk.
    pub(super) read_ms: u64,
    referenced: bool,
}

impl Leaf {
    /// Whether it was damaged, and nothing it maps was written since.
    pub(super) fn is_lost(&self) -> bool {
        self.entries.iter().all(|entry| entry.addr() == Addr::LOST)
    }
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    Hole,
    Zero,
    Lost,
    Stored {
        addr: Addr,
        crc: u32,
        seq: u64,
    },
    /// The leaf must be loaded first.
    NeedLeaf,
}

/// Hashes a block's key so that sixteen neighbours lie side by side in the table: a large write touches a few cache
/// lines, not one for each block. Keys are row numbers of ours and block numbers; no client chooses collisions.
#[derive(Default)]
pub(super) struct NeighbourHasher(u64);

impl Hasher for NeighbourHasher {
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are 64-bit numbers")
    }

    fn write_u64(&mut self, key: u64) {
        let group = (key >> 4).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = group ^ (group >> 32);
        // The table takes the place from the low bits and a tag from the top seven, which must differ between
        // neighbours, or each look-up would compare all of them.
        let tag = (mixed >> 20 ^ key) & 0x7f;
        self.0 = tag << 57 | (mixed << 4 | key & 15) & ((1 << 57) - 1);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type NeighbourMap<T> = HashMap<u64, T, BuildHasherDefault<NeighbourHasher>>;

#[derive(Default)]
pub(super) struct Index {
    rows: Slab<Row>,
    by_key: HashMap<ExtentKey, RowId>,
    leaves: Slab<Leaf>,
    clock: usize,
    pending: NeighbourMap<Pending>,
    zero_marks: NeighbourMap<ZeroMark>,
    pub(super) dirty_leaves: usize,
    /// Leaves that exist, on disk or only in memory.
    pub(super) leaf_count: u64,
}

pub(super) fn leaf_of(block: u32) -> u32 {
    block / LEAF_BLOCKS
}

fn pending_key(row: RowId, block: u32) -> u64 {
    u64::from(row) << 14 | u64::from(block)
}

impl Index {
    pub(super) fn row_of(&self, key: ExtentKey) -> Option<RowId> {
        self.by_key.get(&key).copied()
    }

    pub(super) fn row(&self, id: RowId) -> &Row {
        &self.rows[id as usize]
    }

    pub(super) fn row_mut(&mut self, id: RowId) -> &mut Row {
        &mut self.rows[id as usize]
    }

    pub(super) fn row_count(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = (RowId, &Row)> {
        self.rows.iter().map(|(id, row)| (id as RowId, row))
    }

    /// The versions of everything that is mapped, pending or marked, as far as it takes to know the highest of a layer
    /// that is not being written; layers that were dropped are left out.
    pub(super) fn versions(&self) -> impl Iterator<Item = (LayerId, Version)> {
        let leaves = self
            .rows()
            .flat_map(|(id, row)| row.leaves.iter().map(move |leaf| (id, leaf.version)));
        let pending = self
            .pending
            .iter()
            .map(|(key, entry)| ((key >> 14) as RowId, entry.version));
        let marks = self
            .zero_marks
            .iter()
            .map(|(key, mark)| ((key >> 5) as RowId, mark.version));
        let memory = self
            .leaves
            .iter()
            .flat_map(|(_, leaf)| leaf.entries.iter().map(|entry| (leaf.row, entry.version)));
        let all = leaves.chain(pending).chain(marks).chain(memory);
        all.filter_map(|(row, version)| {
            let row = self.row(row);
            (!row.dropped).then_some((row.key.layer, Version(version)))
        })
    }

    /// The row with the smallest key not before `from`; for walks that survive changes.
    pub(super) fn next_row(&self, from: ExtentKey) -> Option<RowId> {
        self.rows
            .iter()
            .filter(|(_, r)| r.key >= from && !r.dropped)
            .min_by_key(|(_, r)| r.key)
            .map(|(id, _)| id as RowId)
    }

    pub(super) fn insert_row(
        &mut self,
        key: ExtentKey,
        leaves: [Mapping; CHUNK_LEAVES as usize],
    ) -> RowId {
        self.leaf_count += leaves.iter().filter(|l| l.addr().is_stored()).count() as u64;
        let id = self.rows.insert(Row {
            key,
            leaves,
            slots: [NO_SLOT; CHUNK_LEAVES as usize],
            pending: [0; CHUNK_LEAVES as usize],
            zero_marks: 0,
            dropped: false,
        }) as RowId;
        self.by_key.insert(key, id);
        id
    }

    pub(super) fn get_or_insert_row(&mut self, key: ExtentKey) -> RowId {
        match self.row_of(key) {
            Some(id) => id,
            None => self.insert_row(key, [Mapping::UNMAPPED; CHUNK_LEAVES as usize]),
        }
    }

    /// Removes a row whose leaves are gone. What is still pending in it goes too: a tail that was saved twice, because
    /// the first save was cut off, has writes to a layer behind its end, and the row's number may be given out again.
    pub(super) fn remove_row(&mut self, id: RowId) {
        let row = self.rows.remove(id as usize);
        debug_assert!(row.slots.iter().all(|&s| s == NO_SLOT));
        if row.pending.iter().any(|&p| p > 0) {
            self.pending.retain(|key, _| (key >> 14) as RowId != id);
        }
        if row.zero_marks != 0 {
            self.zero_marks.retain(|key, _| (key >> 5) as RowId != id);
        }
        self.by_key.remove(&row.key);
    }

    // -- leaves in memory

    pub(super) fn slot_of(&self, row: RowId, leaf: u32) -> Option<LeafSlot> {
        let slot = self.rows[row as usize].slots[leaf as usize];
        (slot != NO_SLOT).then_some(slot)
    }

    pub(super) fn leaf(&self, slot: LeafSlot) -> &Leaf {
        &self.leaves[slot as usize]
    }

    pub(super) fn leaf_mut(&mut self, slot: LeafSlot) -> &mut Leaf {
        let leaf = &mut self.leaves[slot as usize];
        leaf.referenced = true;
        leaf
    }

    pub(super) fn leaves_cached(&self) -> usize {
        self.leaves.len()
    }

    pub(super) fn insert_leaf(
        &mut self,
        row: RowId,
        index: u32,
        entries: Box<LeafEntries>,
    ) -> LeafSlot {
        debug_assert!(self.slot_of(row, index).is_none());
        let slot = self.leaves.insert(Leaf {
            row,
            index,
            entries,
            dirty: false,
            writing: false,
            read_ms: 0,
            referenced: true,
        }) as LeafSlot;
        self.rows[row as usize].slots[index as usize] = slot;
        slot
    }

    pub(super) fn mark_dirty(&mut self, slot: LeafSlot) {
        let leaf = &mut self.leaves[slot as usize];
        if !leaf.dirty {
            leaf.dirty = true;
            self.dirty_leaves += 1;
        }
    }

    pub(super) fn mark_clean(&mut self, slot: LeafSlot) {
        let leaf = &mut self.leaves[slot as usize];
        if leaf.dirty {
            leaf.dirty = false;
            self.dirty_leaves -= 1;
        }
    }

    pub(super) fn remove_leaf(&mut self, slot: LeafSlot) {
        self.mark_clean(slot);
        let leaf = self.leaves.remove(slot as usize);
        self.rows[leaf.row as usize].slots[leaf.index as usize] = NO_SLOT;
    }

    /// Dirty leaves, in the order of their slots.
    pub(super) fn dirty_slots(&self) -> Vec<LeafSlot> {
        self.leaves
            .iter()
            .filter(|(_, l)| l.dirty)
            .map(|(s, _)| s as LeafSlot)
            .collect()
    }

    /// Drops clean leaves that were not used lately until at most `limit` are held, or none more can go.
    pub(super) fn evict(&mut self, limit: usize) {
        let mut looks = 2 * self.leaves.capacity();
        while self.leaves.len() > limit && looks > 0 {
            looks -= 1;
            self.clock = if self.clock + 1 >= self.leaves.capacity() {
                0
            } else {
                self.clock + 1
            };
            match self.leaves.get_mut(self.clock) {
                Some(l) if l.dirty || l.writing => {}
                Some(l) if l.referenced => l.referenced = false,
                Some(_) => self.remove_leaf(self.clock as LeafSlot),
                None => {}
            }
        }
    }

    // -- what is not in a leaf yet

    pub(super) fn pending_len(&self) -> usize {
        self.pending.len() + self.zero_marks.len()
    }

    pub(super) fn set_pending(&mut self, row: RowId, block: u32, pending: Pending) {
        if self
            .pending
            .insert(pending_key(row, block), pending)
            .is_none()
        {
            self.rows[row as usize].pending[leaf_of(block) as usize] += 1;
        }
    }

    /// The pending entry of a block, unless a newer zero mark hides it.
    pub(super) fn pending(&self, row: RowId, block: u32) -> Option<Pending> {
        if self.rows[row as usize].pending[leaf_of(block) as usize] == 0 {
            return None;
        }
        self.pending.get(&pending_key(row, block)).copied()
    }

    /// Forgets the pending entry of `block` if it is still the one that frame `seq` carries as `version`.
    pub(super) fn clear_pending(&mut self, row: RowId, block: u32, seq: u64, version: u64) {
        let key = pending_key(row, block);
        if self
            .pending
            .get(&key)
            .is_some_and(|p| p.seq == seq && p.version == version)
        {
            self.pending.remove(&key);
            self.rows[row as usize].pending[leaf_of(block) as usize] -= 1;
        }
    }

    pub(super) fn set_zero_mark(&mut self, row: RowId, leaf: u32, mark: ZeroMark) {
        self.zero_marks
            .insert(u64::from(row) << 5 | u64::from(leaf), mark);
        self.rows[row as usize].zero_marks |= 1 << leaf;
    }

    pub(super) fn zero_mark(&self, row: RowId, leaf: u32) -> Option<ZeroMark> {
        if self.rows[row as usize].zero_marks >> leaf & 1 == 0 {
            return None;
        }
        self.zero_marks
            .get(&(u64::from(row) << 5 | u64::from(leaf)))
            .copied()
    }

    pub(super) fn clear_zero_mark(&mut self, row: RowId, leaf: u32, seq: u64, version: u64) {
        let key = u64::from(row) << 5 | u64::from(leaf);
        if self
            .zero_marks
            .get(&key)
            .is_some_and(|m| m.seq == seq && m.version == version)
        {
            self.zero_marks.remove(&key);
            self.rows[row as usize].zero_marks &= !(1 << leaf);
        }
    }

    /// Whether anything of this leaf waits to be applied.
    pub(super) fn leaf_has_pending(&self, row: RowId, leaf: u32) -> bool {
        let r = &self.rows[row as usize];
        r.pending[leaf as usize] > 0 || r.zero_marks >> leaf & 1 != 0
    }

    /// Where block `block` of a row is now.
    pub(super) fn lookup(&self, row: RowId, block: u32) -> Lookup {
        let leaf = leaf_of(block);
        let r = &self.rows[row as usize];
        let pending = self.pending(row, block);
        let mark = self.zero_mark(row, leaf);
        match (pending, mark) {
            (Some(p), Some(m)) if m.seq > p.seq || (m.seq == p.seq && m.version > p.version) => {
                return Lookup::Zero;
            }
            (Some(p), _) if p.addr == Addr::ZERO => return Lookup::Zero,
            (Some(p), _) => {
                return Lookup::Stored {
                    addr: p.addr,
                    crc: p.crc,
                    seq: p.seq,
                };
            }
            (None, Some(_)) => return Lookup::Zero,
            (None, None) => {}
        }
        let mapping = match self.slot_of(row, leaf) {
            Some(slot) => self.leaves[slot as usize].entries[(block % LEAF_BLOCKS) as usize],
            None => match r.leaves[leaf as usize].addr() {
                Addr::UNMAPPED => return Lookup::Hole,
                Addr::ZERO => return Lookup::Zero,
                _ => return Lookup::NeedLeaf,
            },
        };
        match mapping.addr() {
            Addr::UNMAPPED => Lookup::Hole,
            Addr::ZERO => Lookup::Zero,
            Addr::LOST => Lookup::Lost,
            addr => Lookup::Stored {
                addr,
                crc: mapping.crc,
                seq: 0,
            },
        }
    }

    /// Marks a cached leaf as used.
    pub(super) fn touch(&mut self, row: RowId, leaf: u32) {
        if let Some(slot) = self.slot_of(row, leaf) {
            self.leaves[slot as usize].referenced = true;
        }
    }

    pub(super) fn check_invariants(&self) {
        assert_eq!(
            self.dirty_leaves,
            self.leaves.iter().filter(|(_, l)| l.dirty).count()
        );
        let mut pending = 0usize;
        for (id, row) in &self.rows {
            assert_eq!(self.by_key.get(&row.key), Some(&(id as RowId)));
            pending += row.pending.iter().map(|&p| usize::from(p)).sum::<usize>();
            for (i, &slot) in row.slots.iter().enumerate() {
                if slot != NO_SLOT {
                    let leaf = &self.leaves[slot as usize];
                    assert!(leaf.row == id as RowId && leaf.index == i as u32);
                }
            }
        }
        assert_eq!(pending, self.pending.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ChunkIndex;

    fn key(chunk: u32) -> ExtentKey {
        ExtentKey {
            layer: LayerId(1),
            chunk: ChunkIndex(chunk),
        }
    }

    fn pending(seq: u64) -> Pending {
        Pending {
            version: seq,
            seq,
            addr: Addr(7),
            crc: 0,
        }
    }

    /// Entries come and go at random places, which leaves a table of them full of places that are used up.
    #[test]
    fn the_pending_table_is_never_larger_than_what_its_bound_needs() {
        let mut index = Index::default();
        let rows: Vec<RowId> = (0..512)
            .map(|c| index.insert_row(key(c), [Mapping::UNMAPPED; CHUNK_LEAVES as usize]))
            .collect();
        let most = super::super::write::PENDING_MAX + 4096;
        let mut held = std::collections::VecDeque::new();
        let (mut random, mut largest) = (1u64, 0);
        for seq in 1..4_000_000u64 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (row, block) = (
                rows[(random >> 50) as usize % 512],
                (random >> 20) as u32 % 16_384,
            );
            index.set_pending(row, block, pending(seq));
            held.push_back((row, block, seq));
            while index.pending_len() >= most {
                let (row, block, seq) = held.pop_front().expect("something is held");
                index.clear_pending(row, block, seq, seq);
            }
            largest = largest.max(index.pending.allocation_size());
        }
        assert!(largest < 36 << 20, "{largest} bytes");
    }

    #[test]
    fn a_row_that_goes_leaves_nothing_to_the_one_that_gets_its_number() {
        let mut index = Index::default();
        let gone = index.insert_row(key(1), [Mapping::UNMAPPED; CHUNK_LEAVES as usize]);
        index.set_pending(gone, 5, pending(3));
        index.set_zero_mark(gone, 2, ZeroMark { version: 3, seq: 3 });
        index.remove_row(gone);
        let next = index.insert_row(key(2), [Mapping::UNMAPPED; CHUNK_LEAVES as usize]);
        assert_eq!(next, gone, "the number is given out again");
        index.set_pending(next, 6, pending(9));
        index.set_zero_mark(next, 3, ZeroMark { version: 9, seq: 9 });
        assert_eq!(index.lookup(next, 5), Lookup::Hole);
        assert_eq!(index.pending_len(), 2);
        // The entry of the row that is gone is applied late.
        index.clear_pending(next, 5, 3, 3);
        index.check_invariants();
    }
}
