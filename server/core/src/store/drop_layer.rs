//! Giving back the blocks of a layer that is gone.

use super::Store;
use super::apply::Blocked;
use super::index::RowId;
use crate::units::{CHUNK_LEAVES, LayerId};

/// Leaves given back in one turn.
const BUDGET: usize = 64;

#[derive(Default)]
pub(super) struct Dropper {
    /// Layers that still have rows; a checkpoint carries them.
    pub(super) layers: Vec<LayerId>,
    rows: Vec<RowId>,
}

impl Dropper {
    pub(super) fn running(&self) -> bool {
        !self.layers.is_empty()
    }
}

impl Store {
    /// The end of a layer was applied: nothing of it is pending any more.
    pub(super) fn begin_drop(&mut self, layer: LayerId) {
        if self.dropper.layers.contains(&layer) {
            return;
        }
        self.dropper.layers.push(layer);
        let rows: Vec<RowId> = self
            .index
            .rows()
            .filter(|(_, r)| r.key.layer == layer)
            .map(|(id, _)| id)
            .collect();
        for &row in &rows {
            self.index.row_mut(row).dropped = true;
        }
        self.dropper.rows.extend(rows);
    }

    pub(super) fn advance_drop(&mut self) {
        if !self.dropper.running() || self.checkpoint.holds_cleaning() {
            return;
        }
        let mut budget = BUDGET;
        while let Some(&row) = self.dropper.rows.last() {
            for leaf in 0..CHUNK_LEAVES {
                if budget == 0 {
                    self.more_work = true;
                    return;
                }
                if self.index.slot_of(row, leaf).is_none()
                    && !self.index.row(row).leaves[leaf as usize].addr().is_stored()
                {
                    continue;
                }
                budget -= 1;
                if let Err(Blocked) = self.give_back_leaf(row, leaf) {
                    return;
                }
            }
            // Reads under way still name the row.
            if self.reads.iter().any(|(_, r)| r.is_of(row))
                || self.loads.keys().any(|&(r, _)| r == row)
            {
                return;
            }
            self.index.remove_row(row);
            self.dropper.rows.pop();
        }
        self.dropper.layers.clear();
    }

    fn give_back_leaf(&mut self, row: RowId, leaf: u32) -> Result<(), Blocked> {
        let Some(slot) = self.index.slot_of(row, leaf) else {
            for ahead in leaf..CHUNK_LEAVES.min(leaf + 16) {
                if self.index.slot_of(row, ahead).is_none()
                    && self.index.row(row).leaves[ahead as usize]
                        .addr()
                        .is_stored()
                {
                    self.load_leaf(row, ahead).background = true;
                }
            }
            return Err(Blocked);
        };
        if self.index.leaf(slot).writing {
            return Err(Blocked);
        }
        for i in 0..crate::units::LEAF_BLOCKS as usize {
            let addr = self.index.leaf(slot).entries[i].addr();
            if addr.is_stored() {
                self.segments.sub_live(addr, 1);
                self.unmapped_one();
            }
        }
        self.index.remove_leaf(slot);
        let old = std::mem::replace(
            &mut self.index.row_mut(row).leaves[leaf as usize],
            super::format::Mapping::UNMAPPED,
        );
        if old.addr().is_stored() {
            self.segments.sub_leaf(old.addr());
        }
        self.index.leaf_count -= 1;
        Ok(())
    }
}
