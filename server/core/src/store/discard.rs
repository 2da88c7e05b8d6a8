//! Giving back the blocks of chunks that a store is not to hold any more, while others of their layer stay: they become
//! zeros, as if they had been discarded. Their versions stay, so that what is copied here later is compared like
//! anything else.

use super::format::ExtentKey;
use super::index::{Lookup, RowId};
use super::{Store, WriteError};
use crate::units::{CHUNK_LEAVES, ChunkIndex, LEAF_BLOCKS, LayerId};

impl Store {
    /// Makes zeros of at most `limit` leaves of the chunks of a layer that are `unwanted`, from chunk `from` on. Answers
    /// the chunk to go on with; `None`: nothing is left of them. Not durable before the next flush or checkpoint.
    pub fn give_back(
        &mut self,
        layer: LayerId,
        from: ChunkIndex,
        unwanted: impl Fn(ChunkIndex) -> bool,
        limit: usize,
    ) -> Result<Option<ChunkIndex>, WriteError> {
        let mut rows: Vec<(RowId, ExtentKey)> = self
            .index
            .rows()
            .filter(|(_, row)| row.key.layer == layer && row.key.chunk >= from && !row.dropped)
            .filter(|(_, row)| unwanted(row.key.chunk))
            .map(|(id, row)| (id, row.key))
            .collect();
        rows.sort_unstable_by_key(|(_, key)| key.chunk);
        let mut done = 0;
        for (row, key) in rows {
            for leaf in 0..CHUNK_LEAVES {
                if !self.holds(row, leaf) {
                    continue;
                }
                if done == limit {
                    return Ok(Some(key.chunk));
                }
                // Not newer than what is there: versions are the heads' to give.
                let version = self.leaf_version(row, leaf);
                self.write_zeroes(key, leaf * LEAF_BLOCKS, LEAF_BLOCKS, version, None)?;
                done += 1;
            }
        }
        Ok(None)
    }

    /// Whether a block of a leaf is anything but zeros, or may be.
    fn holds(&self, row: RowId, leaf: u32) -> bool {
        let blocks = leaf * LEAF_BLOCKS..(leaf + 1) * LEAF_BLOCKS;
        let is_simple =
            self.index.slot_of(row, leaf).is_none() && !self.index.leaf_has_pending(row, leaf);
        // Without a leaf in memory and anything on its way, one block says it of all.
        let looked_at = if is_simple { 1 } else { LEAF_BLOCKS as usize };
        blocks
            .take(looked_at)
            .any(|block| !matches!(self.index.lookup(row, block), Lookup::Hole | Lookup::Zero))
    }
}
