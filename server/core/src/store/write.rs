//! Client writes and zeroes: admitted, copied into the tail, and from then on readable.

use super::format::{
    Addr, ENTRY_BYTES, Entry, EntryKind, ExtentKey, FRAME_HEADER_BLOCKS, LEAF_DISK_BLOCKS,
};
use super::index::{Lookup, Pending, RowId, ZeroMark, leaf_of};
use super::{MAX_WRITE_BLOCKS, OpId, Store, StoreError, WriteError};
use crate::units::{BLOCK_BYTES, CHUNK_BLOCKS, LEAF_BLOCKS, LayerId, Version};

/// Blocks that may wait to be applied: bounds what they take in memory. A table of so many never has more than 2^20
/// places of 33 bytes, however often it was written to.
pub(super) const PENDING_MAX: usize = 1 << 18;

/// What writing these blocks of a chunk adds to the blocks in use at the most, their leaves included.
pub(super) fn most_new_blocks(first_block: u32, count: u32) -> u64 {
    let leaves = leaf_of(first_block + count - 1) - leaf_of(first_block) + 1;
    u64::from(count + leaves * LEAF_DISK_BLOCKS)
}

/// The most that one write can add: it is no longer than a leaf, so it touches two.
const MOST_NEW_BLOCKS: u64 = MAX_WRITE_BLOCKS as u64 + 2 * LEAF_DISK_BLOCKS as u64;
const _: () = assert!(MAX_WRITE_BLOCKS <= LEAF_BLOCKS as usize);

impl Store {
    /// Writes whole blocks, at most [`MAX_WRITE_BLOCKS`], inside one chunk. On `Ok` the write is acknowledged: it is
    /// in the tail, which outlives the process. With `durable`, [`super::Action::Done`] follows when it is on stable
    /// storage.
    ///
    /// `version` must be larger than that of any write to these blocks before.
    pub fn write(
        &mut self,
        key: ExtentKey,
        first_block: u32,
        data: &[u8],
        version: Version,
        durable: Option<OpId>,
    ) -> Result<(), WriteError> {
        let count = (data.len() / BLOCK_BYTES) as u32;
        assert!(
            data.len().is_multiple_of(BLOCK_BYTES)
                && (1..=MAX_WRITE_BLOCKS).contains(&(count as usize))
        );
        let reserve = self.admit_write(key, first_block, count)?;
        let row = self.index.get_or_insert_row(key);
        let mut done = 0;
        let mut left_to_reserve = reserve;
        while done < count {
            if !self.open_frame(ENTRY_BYTES + 4, true) {
                self.want_ready = true;
                return Err(WriteError::Busy { accepted: done });
            }
            let open = self.hot.open.as_mut().expect("just opened");
            let by_header = ((open.header_room() - ENTRY_BYTES) / 4) as u32;
            let n = (count - done).min(open.data_room()).min(by_header);
            let (start, at) = (open.placed, open.tail_at);
            open.placed += n;
            let reserved = left_to_reserve.min(u64::from(n) + 2 * u64::from(LEAF_DISK_BLOCKS));
            let reserved = if done + n == count {
                left_to_reserve
            } else {
                reserved
            };
            open.reserved += reserved;
            left_to_reserve -= reserved;
            self.reserved += reserved;

            let from = done as usize * BLOCK_BYTES;
            let source = &data[from..from + n as usize * BLOCK_BYTES];
            self.tail
                .slice_mut(at + FRAME_HEADER_BLOCKS + start, n)
                .copy_from_slice(source);
            let mut crcs = [0u32; MAX_WRITE_BLOCKS];
            for (crc, block) in crcs.iter_mut().zip(source.chunks_exact(BLOCK_BYTES)) {
                *crc = crc32fast::hash(block);
            }
            let crcs = &crcs[..n as usize];
            self.enter_data(row, key, first_block + done, start, version, crcs);
            done += n;
        }
        self.counters.client_blocks += u64::from(count);
        if durable.is_some() {
            self.wait_durable(durable);
        }
        Ok(())
    }

    /// Makes data blocks of the open frame, from its `start`-th on, the newest content of blocks of a chunk.
    pub(super) fn enter_data(
        &mut self,
        row: RowId,
        key: ExtentKey,
        first_block: u32,
        start: u32,
        version: Version,
        crcs: &[u32],
    ) {
        let open = self.hot.open.as_ref().expect("a frame is open");
        let (seq, first_addr) = (open.seq, open.addr.0 + FRAME_HEADER_BLOCKS + start);
        for (i, &crc) in (0..).zip(crcs) {
            let pending = Pending {
                version: version.0,
                seq,
                addr: Addr(first_addr + i),
                crc,
            };
            self.index.set_pending(row, first_block + i, pending);
        }
        let entry = Entry {
            kind: EntryKind::Data,
            key,
            first_block,
            count: crcs.len() as u32,
            version: version.0,
            data_start: start,
        };
        self.publish_entry(&entry, crcs);
    }

    /// Makes blocks of one chunk read as zeros and gives their space back. Takes effect like [`Store::write`]; never
    /// refused for want of space.
    pub fn write_zeroes(
        &mut self,
        key: ExtentKey,
        first_block: u32,
        count: u32,
        version: Version,
        durable: Option<OpId>,
    ) -> Result<(), WriteError> {
        assert!(count > 0 && first_block + count <= CHUNK_BLOCKS);
        self.takes_changes()?;
        if self.backlog_is_full() {
            self.want_ready = true;
            return Err(WriteError::Busy { accepted: 0 });
        }
        // What was never written reads as zeros already.
        if let Some(row) = self.index.row_of(key) {
            if !self.open_frame(ENTRY_BYTES, false) {
                self.want_ready = true;
                return Err(WriteError::Busy { accepted: 0 });
            }
            let seq = self.hot.open.as_ref().expect("just opened").seq;
            self.mark_zero(row, first_block, count, version.0, seq);
            let entry = Entry {
                kind: EntryKind::Zero,
                key,
                first_block,
                count,
                version: version.0,
                data_start: 0,
            };
            self.publish_entry(&entry, &[]);
        }
        if durable.is_some() {
            self.wait_durable(durable);
        }
        Ok(())
    }

    /// Notes zeros that frame `seq` carries.
    pub(super) fn mark_zero(
        &mut self,
        row: RowId,
        first_block: u32,
        count: u32,
        version: u64,
        seq: u64,
    ) {
        let mut block = first_block;
        let end = first_block + count;
        while block < end {
            let leaf = leaf_of(block);
            let leaf_end = ((leaf + 1) * LEAF_BLOCKS).min(end);
            if leaf_end - block == LEAF_BLOCKS {
                self.index
                    .set_zero_mark(row, leaf, ZeroMark { version, seq });
            } else {
                for b in block..leaf_end {
                    self.index.set_pending(
                        row,
                        b,
                        Pending {
                            version,
                            seq,
                            addr: Addr::ZERO,
                            crc: 0,
                        },
                    );
                }
            }
            block = leaf_end;
        }
    }

    /// Puts the end of a layer into the log; its space comes back in the background. `Done` follows when the end is
    /// durable. Nothing may use the layer any more.
    pub fn drop_layer(&mut self, op: OpId, layer: LayerId) -> Result<(), WriteError> {
        self.takes_changes()?;
        if !self.open_frame(ENTRY_BYTES, false) {
            self.want_ready = true;
            return Err(WriteError::Busy { accepted: 0 });
        }
        let key = ExtentKey {
            layer,
            chunk: crate::units::ChunkIndex(0),
        };
        let entry = Entry {
            kind: EntryKind::DropLayer,
            key,
            first_block: 0,
            count: 0,
            version: 0,
            data_start: 0,
        };
        self.publish_entry(&entry, &[]);
        self.wait_durable(Some(op));
        Ok(())
    }

    /// Whether clients must wait until more is applied. That bounds the memory that it takes, and the log that a start
    /// replays: to what comes between two checkpoints, and as much again.
    fn backlog_is_full(&self) -> bool {
        self.index.pending_len() > PENDING_MAX
            || self.hot.unapplied_blocks > self.params.checkpoint_log_blocks
    }

    /// Whether a write may go on, and how many blocks it may add to those in use.
    pub(super) fn admit_write(
        &mut self,
        key: ExtentKey,
        first_block: u32,
        count: u32,
    ) -> Result<u64, WriteError> {
        assert!(first_block + count <= CHUNK_BLOCKS);
        self.takes_changes()?;
        if self.backlog_is_full() {
            self.want_ready = true;
            return Err(WriteError::Busy { accepted: 0 });
        }
        self.admit(key, first_block, count)
    }

    /// Whether `count` blocks may be written, and how many blocks they may add to those in use.
    fn admit(&mut self, key: ExtentKey, first_block: u32, count: u32) -> Result<u64, WriteError> {
        let capacity = self.ready_blocks();
        let row = self.index.row_of(key);
        if row.is_none() && self.index.row_count() >= self.rows_max() {
            return Err(StoreError::DirectoryFull.into());
        }
        // Far from full, all may be new.
        let most = most_new_blocks(first_block, count);
        if self.used_blocks() + self.reserved + most <= capacity {
            return Ok(most);
        }
        // Near full, count what really is.
        let mut new = 0;
        match row {
            None => new = most,
            Some(row) => {
                for block in first_block..first_block + count {
                    match self.index.lookup(row, block) {
                        Lookup::Stored { .. } => {}
                        // What a lost block had does not come back.
                        Lookup::Hole | Lookup::Zero | Lookup::Lost => new += 1,
                        Lookup::NeedLeaf => {
                            let load = self.load_leaf(row, leaf_of(block));
                            load.background = true;
                            load.awaited = true;
                            self.want_ready = true;
                            return Err(WriteError::Busy { accepted: 0 });
                        }
                    }
                }
                for leaf in leaf_of(first_block)..=leaf_of(first_block + count - 1) {
                    let on_disk = self.index.row(row).leaves[leaf as usize].addr().is_stored();
                    if !on_disk && self.index.slot_of(row, leaf).is_none() {
                        new += u64::from(LEAF_DISK_BLOCKS);
                    }
                }
            }
        }
        if new == 0 || self.used_blocks() + self.reserved + new <= capacity {
            return Ok(new);
        }
        if capacity < self.capacity_blocks() {
            self.growth.wanted = true;
            self.want_ready = true;
            return Err(WriteError::Busy { accepted: 0 });
        }
        if self.reserved > 0 {
            // Some of what is reserved will turn out to be overwrites: look again when it is applied.
            self.wait_durable(None);
            self.want_ready = true;
            return Err(WriteError::Busy { accepted: 0 });
        }
        Err(WriteError::NoSpace)
    }

    /// Whether a writer that was told "busy" has a chance now.
    pub(super) fn could_accept(&self) -> bool {
        let leaf_is_coming = || self.loads.values().any(|load| load.awaited);
        if self.backlog_is_full() || self.growth.wanted || leaf_is_coming() {
            return false;
        }
        // Near full for any write that `admit` may have refused: told to come again though nothing has changed, it
        // would be refused again, without end.
        let near_full =
            self.used_blocks() + self.reserved + MOST_NEW_BLOCKS > self.capacity_blocks();
        if near_full && self.reserved > 0 && self.hot.applied_seq < self.hot.last_acked_seq() {
            return false;
        }
        let room_in_segment = self.segments.geometry.segment_blocks - self.hot.next_block >= 2
            || self.segments.free_count() > self.keep_for_hot();
        self.hot.open.is_some() || (self.tail.place().is_some() && room_in_segment)
    }
}
