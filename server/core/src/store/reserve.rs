//! How many free segments are kept for whom: clients leave room for cleaning, cleaning for the next checkpoint.

use super::Store;
use super::cold::COLD_FRAMES;
use super::format::{FRAME_DATA_BLOCKS, LEAF_DISK_BLOCKS};

/// A batch of victims is this many times as large as the leaves its checkpoint may have to write, so that these cost
/// little beside what becomes free.
const BATCH_PER_LEAVES: u64 = 20;

impl Store {
    /// Whether `blocks` more may be copied, or as many leaves changed: the next checkpoint must find room for every
    /// leaf that changed, and that will have changed when each copy is applied, and each write that finds room in the
    /// segment clients write to.
    pub(super) fn may_change(&self, blocks: u64) -> bool {
        let changing = (self.index.dirty_leaves + self.cold.unapplied) as u64 + blocks;
        let room = self.segment_blocks() - u64::from(self.hot.next_block);
        changing <= self.changed_leaves_max()
            && self.segments.free_count() > self.leaf_segments(room + blocks)
    }

    /// Segments that client writes always leave: enough to copy a whole batch of victims, and for the checkpoint that
    /// makes them free. With less, each checkpoint would free little more than it takes, and in a full store nothing.
    pub(super) fn keep_for_cold(&self) -> usize {
        let copies = self.batch_copies();
        let changing = copies + self.segment_blocks();
        copies.div_ceil(self.segment_blocks()) as usize + self.leaf_segments(changing) + 1
    }

    /// Cleaning begins when this many segments are free: what a batch will give back is there for clients meanwhile.
    pub(super) fn clean_start(&self) -> usize {
        let given_back =
            self.clean_batch() - (self.batch_copies() / self.segment_blocks()) as usize;
        self.keep_for_cold() + given_back + 1
    }

    /// Most blocks to copy out of a batch: the emptiest segments are no fuller than the average.
    fn batch_copies(&self) -> u64 {
        let written = (self.segments.all.len() - self.segments.free_count()).max(1) as u64;
        let live = self
            .used_blocks()
            .div_ceil(written)
            .min(self.segment_blocks());
        self.clean_batch() as u64 * live
    }

    /// Segments for the leaves of the next checkpoint when `more` blocks are written or copied before.
    fn leaf_segments(&self, more: u64) -> usize {
        let changing = self.index.dirty_leaves + self.index.pending_len() + self.cold.unapplied;
        // A leaf that does not exist yet comes with a block, and takes two more.
        let to_come = self.reserved / 3;
        let most = (self.index.leaf_count + to_come).min(self.changed_leaves_max());
        let leaves = (changing as u64 + more).min(most);
        self.leaf_blocks(leaves).div_ceil(self.segment_blocks()) as usize
    }

    /// A checkpoint is due when so many leaves have changed. Where not all leaves have room in memory, half of it is kept
    /// for those that are only read; where they have, changes collect, and are written once.
    pub(super) fn changed_leaves_wanted(&self) -> u64 {
        let cache = self.params.leaf_cache.max(16) as u64;
        if self.index.leaf_count <= cache / 8 * 7 {
            cache
        } else {
            cache / 2
        }
    }

    /// Leaves that may have changed when a checkpoint begins: those the cache holds, and what is on its way.
    fn changed_leaves_max(&self) -> u64 {
        let copies = (COLD_FRAMES + 1) as u64 * u64::from(FRAME_DATA_BLOCKS);
        self.params.leaf_cache.max(16) as u64 + copies
    }

    /// Segments that client writes leave just now. While a batch is emptied, clients get what it will give back as
    /// far as it is done: many short waits, none for a whole batch.
    pub(super) fn keep_for_hot(&self) -> usize {
        let least = self.keep_for_cold();
        if self.cleaner.stuck || self.segments.free_count() > self.clean_start() {
            return least;
        }
        let batch = self.clean_batch();
        let left = batch.saturating_sub(self.cleaner.coming);
        let whole = self.clean_start() - least;
        least + (whole * left / batch).saturating_sub(2)
    }

    /// Segments emptied before a checkpoint makes them free. Many, because each checkpoint writes every leaf that
    /// changed; not more, because what is kept free is not there to be half empty.
    pub(super) fn clean_batch(&self) -> usize {
        let leaves = self.index.leaf_count.min(self.changed_leaves_wanted());
        let wanted = (BATCH_PER_LEAVES * self.leaf_blocks(leaves)).div_ceil(self.segment_blocks());
        let most = (self.segments.all.len() / 20).max(2);
        (wanted as usize).clamp(2, most)
    }

    pub(super) fn segment_blocks(&self) -> u64 {
        u64::from(self.segments.geometry.segment_blocks)
    }

    /// Blocks that so many leaves take, their frames' headers included.
    pub(super) fn leaf_blocks(&self, leaves: u64) -> u64 {
        leaves * u64::from(LEAF_DISK_BLOCKS) * 129 / 128
    }
}
