//! What a copy has of each block, for comparison with other copies.

use super::format::Addr;
use super::index::{Lookup, RowId, leaf_of};
use super::{Store, StoreError};
use crate::replication::wire::{LeafStates, RowVersions};
use crate::replication::{BlockContent, BlockState};
use crate::units::{CHUNK_LEAVES, ChunkIndex, LEAF_BLOCKS, LayerId, Version};

use super::format::ExtentKey;

impl Store {
    /// The highest version in each leaf of the chunks of a layer, in the order of the chunks from `from` on, as far as
    /// `wanted` says yes to a row. At most `most` rows; the flag says that there are more.
    ///
    /// A version may be higher than that of any block that is still there (a leaf remembers it), never lower, except
    /// that zeros written where nothing was leave no version.
    pub fn rows_of(
        &self,
        layer: LayerId,
        from: ChunkIndex,
        most: usize,
        wanted: impl Fn(&RowVersions) -> bool,
    ) -> (Vec<RowVersions>, bool) {
        let mut rows: Vec<(ChunkIndex, RowId)> = self
            .index
            .rows()
            .filter(|(_, row)| row.key.layer == layer && row.key.chunk >= from && !row.dropped)
            .map(|(id, row)| (row.key.chunk, id))
            .collect();
        rows.sort_unstable();
        let mut found = Vec::new();
        for (chunk, row) in rows {
            let leaves = std::array::from_fn(|leaf| self.leaf_version(row, leaf as u32));
            let versions = RowVersions { chunk, leaves };
            if !wanted(&versions) {
                continue;
            }
            if found.len() == most {
                return (found, true);
            }
            found.push(versions);
        }
        (found, false)
    }

    fn leaf_version(&self, row: RowId, leaf: u32) -> Version {
        let mut highest = self.index.row(row).leaves[leaf as usize].version;
        if let Some(slot) = self.index.slot_of(row, leaf) {
            let entries = self.index.leaf(slot).entries.iter();
            highest = entries.map(|entry| entry.version).fold(highest, u64::max);
        }
        if let Some(mark) = self.index.zero_mark(row, leaf) {
            highest = highest.max(mark.version);
        }
        if self.index.leaf_has_pending(row, leaf) {
            let blocks = leaf * LEAF_BLOCKS..(leaf + 1) * LEAF_BLOCKS;
            let pending = blocks.filter_map(|block| self.index.pending(row, block));
            highest = pending.map(|entry| entry.version).fold(highest, u64::max);
        }
        Version(highest)
    }

    /// What each block of a leaf is. `None`: its page is on its way; ask again after [`super::Action::Ready`].
    pub fn leaf_states(
        &mut self,
        key: ExtentKey,
        leaf: u32,
    ) -> Result<Option<LeafStates>, StoreError> {
        assert!(leaf < CHUNK_LEAVES);
        self.healthy()?;
        let mut states = LeafStates::holes();
        let Some(row) = self.index.row_of(key) else {
            return Ok(Some(states));
        };
        let first = leaf * LEAF_BLOCKS;
        for (at, state) in (0..).zip(states.0.iter_mut()) {
            let block = first + at;
            let content = match self.index.lookup(row, block) {
                Lookup::NeedLeaf => {
                    self.load_extents(key, first, LEAF_BLOCKS);
                    return Ok(None);
                }
                Lookup::Hole => continue,
                Lookup::Zero => BlockContent::Zeros,
                Lookup::Lost => BlockContent::Lost,
                Lookup::Stored { .. } => BlockContent::Data,
            };
            *state = BlockState {
                version: self.block_version(row, block),
                content,
            };
        }
        Ok(Some(states))
    }

    /// The version of what [`super::index::Index::lookup`] finds, whose leaf is there if one is needed.
    fn block_version(&self, row: RowId, block: u32) -> Version {
        let leaf = leaf_of(block);
        let pending = self.index.pending(row, block);
        let mark = self.index.zero_mark(row, leaf);
        let version = match (pending, mark) {
            (Some(p), Some(m)) => {
                if (m.seq, m.version) > (p.seq, p.version) {
                    m.version
                } else {
                    p.version
                }
            }
            (Some(p), None) => p.version,
            (None, Some(m)) => m.version,
            (None, None) => match self.index.slot_of(row, leaf) {
                Some(slot) => self.index.leaf(slot).entries[(block % LEAF_BLOCKS) as usize].version,
                None => {
                    let mapping = self.index.row(row).leaves[leaf as usize];
                    debug_assert!(mapping.addr() == Addr::ZERO);
                    mapping.version
                }
            },
        };
        Version(version)
    }
}
