//! What a store has of a layer, version by version: what two replicas compare to find out where they differ. What is
//! still in the tail counts, and so do zeros.
//!
//! The version of zeros that change nothing is not kept (of blocks in a chunk or leaf that was never written), so two
//! blocks that read as zeros are alike whatever their versions.

use std::collections::BTreeMap;

use crate::units::{CHUNK_LEAVES, ChunkIndex, LEAF_BLOCKS, LayerId, Version};

use super::format::{Addr, ExtentKey};
use super::index::{Lookup, RowId};
use super::{Store, StoreError};

/// What a replica has of one block of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// Of the write that put it there.
    pub version: Version,
    /// What is there.
    pub content: BlockContent,
}

/// The kinds of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockContent {
    /// Nothing was ever written.
    Hole,
    /// Written as zeros, or trimmed.
    Zeros,
    /// Bytes.
    Data,
    /// The index of the block was damaged: it must be copied from elsewhere, whatever its version.
    Lost,
}

impl BlockState {
    /// Never written.
    pub const HOLE: BlockState = BlockState {
        version: Version::NONE,
        content: BlockContent::Hole,
    };

    /// Reads as zeros, as long as the layer has no parent.
    pub fn reads_as_zeros(self) -> bool {
        matches!(self.content, BlockContent::Hole | BlockContent::Zeros)
    }

    /// Whether both have the same content for certain.
    pub fn is_like(self, other: BlockState) -> bool {
        if self.reads_as_zeros() && other.reads_as_zeros() {
            return true;
        }
        self.content == BlockContent::Data && self == other
    }
}

/// What a replica has of one block, with the checksum of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSum {
    /// Its version, and whether there are bytes.
    pub state: BlockState,
    /// CRC-32 of the bytes; zero where there are none.
    pub crc: u32,
}

/// What a replica has of the blocks of a leaf.
pub type LeafSums = Vec<BlockSum>;

/// The highest version in each leaf of a chunk.
pub type RowOfVersions = (ChunkIndex, [Version; CHUNK_LEAVES as usize]);

impl Store {
    /// Chunks that the store has of each layer, and the newest version of it as the directory has it, which what was
    /// written since the last checkpoint may exceed.
    pub fn held(&self) -> BTreeMap<LayerId, (u32, Version)> {
        let mut held = BTreeMap::new();
        for (_, row) in self.index.rows().filter(|(_, row)| !row.dropped) {
            let (chunks, newest) = held.entry(row.key.layer).or_insert((0, Version::NONE));
            *chunks += 1;
            let versions = row.leaves.iter().map(|leaf| Version(leaf.version));
            *newest = versions.fold(*newest, Version::max);
        }
        held
    }

    /// The rows of a layer from chunk `from` on that are wanted and hold a version of at least `floor`, ascending, at
    /// most `limit`; and whether there are more.
    pub fn row_versions(
        &self,
        layer: LayerId,
        from: ChunkIndex,
        wanted: impl Fn(ChunkIndex) -> bool,
        floor: Version,
        limit: usize,
    ) -> (Vec<RowOfVersions>, bool) {
        let mut rows: Vec<(ChunkIndex, RowId)> = self
            .index
            .rows()
            .filter(|(_, row)| row.key.layer == layer && row.key.chunk >= from && !row.dropped)
            .filter(|(_, row)| wanted(row.key.chunk))
            .map(|(id, row)| (row.key.chunk, id))
            .collect();
        rows.sort_unstable();
        let mut found = Vec::new();
        for (chunk, id) in rows {
            let leaves = std::array::from_fn(|leaf| self.leaf_version(id, leaf as u32));
            if leaves.iter().all(|version| *version < floor) {
                continue;
            }
            if found.len() == limit {
                return (found, true);
            }
            found.push((chunk, leaves));
        }
        (found, false)
    }

    /// The highest version in a leaf, wherever it is.
    pub(super) fn leaf_version(&self, row: RowId, leaf: u32) -> Version {
        let mut highest = self.index.row(row).leaves[leaf as usize].version;
        if let Some(slot) = self.index.slot_of(row, leaf) {
            let entries = self.index.leaf(slot).entries.iter();
            highest = entries.map(|entry| entry.version).fold(highest, u64::max);
        }
        if self.index.leaf_has_pending(row, leaf) {
            let mark = self.index.zero_mark(row, leaf);
            highest = highest.max(mark.map_or(0, |mark| mark.version));
            let blocks = leaf * LEAF_BLOCKS..(leaf + 1) * LEAF_BLOCKS;
            let pending = blocks.filter_map(|block| self.index.pending(row, block));
            highest = pending.map(|entry| entry.version).fold(highest, u64::max);
        }
        Version(highest)
    }

    /// What the store has of each block of a leaf. `None`: the leaf has to be read first; ask again after
    /// [`super::Action::Ready`]. An error when the device cannot read it.
    pub fn leaf_states(
        &mut self,
        key: ExtentKey,
        leaf: u32,
    ) -> Result<Option<Box<[BlockState; LEAF_BLOCKS as usize]>>, StoreError> {
        assert!(leaf < CHUNK_LEAVES);
        self.healthy()?;
        let mut states = Box::new([BlockState::HOLE; LEAF_BLOCKS as usize]);
        let Some(row) = self.index.row_of(key) else {
            return Ok(Some(states));
        };
        if self.index.slot_of(row, leaf).is_none()
            && self.index.row(row).leaves[leaf as usize].addr().is_stored()
        {
            let error = self.leaf_error(row, leaf);
            self.load_leaf(row, leaf).compared = true;
            if let Some(error) = error {
                return Err(StoreError::Device(error));
            }
            self.load_extents(key, leaf * LEAF_BLOCKS, 1);
            return Ok(None);
        }
        for (block, state) in (leaf * LEAF_BLOCKS..).zip(states.iter_mut()) {
            *state = self.block_state(row, leaf, block);
        }
        Ok(Some(states))
    }

    /// What the store has of each block of a leaf, with the checksums that its index keeps; the blocks themselves are
    /// not read. `None`: the leaf has to be read first; ask again after [`super::Action::Ready`].
    pub fn leaf_sums(&mut self, key: ExtentKey, leaf: u32) -> Result<Option<LeafSums>, StoreError> {
        let Some(states) = self.leaf_states(key, leaf)? else {
            return Ok(None);
        };
        let row = self.index.row_of(key);
        let sums = (leaf * LEAF_BLOCKS..)
            .zip(states.iter())
            .map(|(block, state)| {
                let crc = match row.map(|row| self.index.lookup(row, block)) {
                    Some(Lookup::Stored { crc, .. }) => crc,
                    _ => 0,
                };
                BlockSum { state: *state, crc }
            });
        Ok(Some(sums.collect()))
    }

    /// Of a block whose leaf is in memory or does not exist. The same order as [`Lookup`]'s: pending entries, marks of
    /// zeros, the leaf.
    fn block_state(&self, row: RowId, leaf: u32, block: u32) -> BlockState {
        let content = match self.index.lookup(row, block) {
            Lookup::Hole => BlockContent::Hole,
            Lookup::Zero => BlockContent::Zeros,
            Lookup::Stored { .. } => BlockContent::Data,
            Lookup::Lost | Lookup::NeedLeaf => BlockContent::Lost,
        };
        let pending = self.index.pending(row, block);
        let mark = self.index.zero_mark(row, leaf);
        let version = match (pending, mark) {
            (Some(p), Some(m)) if m.seq > p.seq || (m.seq == p.seq && m.version > p.version) => {
                m.version
            }
            (Some(p), _) => p.version,
            (None, Some(m)) => m.version,
            (None, None) => {
                let in_row = self.index.row(row).leaves[leaf as usize];
                match self.index.slot_of(row, leaf) {
                    Some(slot) => {
                        self.index.leaf(slot).entries[(block % LEAF_BLOCKS) as usize].version
                    }
                    None if in_row.addr() == Addr::ZERO => in_row.version,
                    None => 0,
                }
            }
        };
        BlockState {
            version: Version(version),
            content,
        }
    }

    /// The highest version that the store holds of a layer; what a leaf on disk hides counts.
    pub fn highest_version(&self, layer: LayerId) -> Version {
        let versions = self.index.versions();
        let of_layer = versions.filter(|(of, _)| *of == layer);
        of_layer
            .map(|(_, version)| version)
            .max()
            .unwrap_or_default()
    }
}
