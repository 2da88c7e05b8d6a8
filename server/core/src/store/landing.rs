//! Room for a large payload that is being received: in the open frame, so that it need not be copied there later.
//!
//! Until the write is entered the room is nothing: no entry names it, and other writes go behind it. A frame that has
//! to be closed meanwhile is, and what was received moves to memory of its own; the write then goes the ordinary way.
//! So whoever receives need not know where the room is, only ask for it each time.

use super::format::{ENTRY_BYTES, ExtentKey, FRAME_DATA_BLOCKS, FRAME_HEADER_BLOCKS};
use super::{AlignedBuf, OpId, Store, WriteError};
use crate::units::{BLOCK_BYTES, Version};

/// The largest payload there is room for, blocks: what a frame that is closed for the next one leaves unused stays
/// small beside it.
pub const MAX_LANDING_BLOCKS: u32 = FRAME_DATA_BLOCKS / 4 * 3;

/// A claim to the store's landing, of which there is one at a time. It is to be given back by
/// [`Store::write_landed`] or [`Store::cancel_landing`].
#[derive(Debug)]
pub struct Landing {
    count: u32,
}

impl Landing {
    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.count as usize * BLOCK_BYTES
    }
}

/// Where the landing is.
pub(super) enum Room {
    /// Data blocks of the open frame, from the `start`-th on.
    InFrame { start: u32, count: u32 },
    /// The frame was closed.
    Apart(AlignedBuf),
}

impl Store {
    /// Room for a write of `count` blocks; `None` where there is none at once. The write then goes the ordinary way.
    pub fn reserve_landing(&mut self, count: u32) -> Option<Landing> {
        if !(1..=MAX_LANDING_BLOCKS).contains(&count)
            || self.landing.is_some()
            || self.takes_changes().is_err()
        {
            return None;
        }
        if let Some(open) = &self.hot.open
            && open.data_room() < count
        {
            if open.progress.entries == 0 {
                // The end of a segment: smaller writes can have it.
                return None;
            }
            self.close_frame();
        }
        let header_bytes = ENTRY_BYTES + 4 * count as usize;
        if !self.open_frame(header_bytes, true) {
            return None;
        }
        let open = self.hot.open.as_mut().expect("just opened");
        if open.data_room() < count {
            return None;
        }
        let start = open.placed;
        open.placed += count;
        open.landing_header = header_bytes;
        self.landing = Some(Room::InFrame { start, count });
        Some(Landing { count })
    }

    /// Where its bytes go.
    pub fn landing_mut(&mut self, landing: &Landing) -> &mut [u8] {
        match self.landing.as_mut().expect("claimed") {
            Room::Apart(bytes) => bytes,
            Room::InFrame { start, count } => {
                debug_assert_eq!(*count, landing.count);
                let open = self.hot.open.as_ref().expect("the landing is in it");
                let at = open.tail_at + FRAME_HEADER_BLOCKS + *start;
                self.tail.slice_mut(at, *count)
            }
        }
    }

    /// Gives the room back unused.
    pub fn cancel_landing(&mut self, landing: Landing) {
        if let Some(Room::InFrame { start, .. }) = self.landing.take() {
            let open = self.hot.open.as_mut().expect("the landing is in it");
            open.landing_header = 0;
            if open.placed == start + landing.count {
                open.placed = start;
            }
        }
    }

    /// As [`Store::write`], of the bytes in the landing. With an error the landing is still claimed.
    pub fn write_landed(
        &mut self,
        landing: Landing,
        key: ExtentKey,
        first_block: u32,
        version: Version,
        durable: Option<OpId>,
    ) -> Result<(), (Landing, WriteError)> {
        let (start, count) = match self.landing.take().expect("claimed") {
            Room::InFrame { start, count } => (start, count),
            Room::Apart(bytes) => {
                return self
                    .write(key, first_block, &bytes, version, durable)
                    .map_err(|error| {
                        self.landing = Some(Room::Apart(bytes));
                        (landing, error)
                    });
            }
        };
        let reserve = match self.admit_write(key, first_block, count) {
            Ok(reserve) => reserve,
            Err(error) => {
                self.landing = Some(Room::InFrame { start, count });
                return Err((landing, error));
            }
        };
        let row = self.index.get_or_insert_row(key);
        let open = self.hot.open.as_mut().expect("the landing is in it");
        open.landing_header = 0;
        open.reserved += reserve;
        self.reserved += reserve;
        let at = open.tail_at + FRAME_HEADER_BLOCKS + start;
        let mut crcs = [0u32; MAX_LANDING_BLOCKS as usize];
        let data = self.tail.slice(at, count);
        for (crc, block) in crcs.iter_mut().zip(data.chunks_exact(BLOCK_BYTES)) {
            *crc = crc32fast::hash(block);
        }
        let crcs = &crcs[..count as usize];
        self.enter_data(row, key, first_block, start, version, crcs);
        self.counters.client_blocks += u64::from(count);
        if durable.is_some() {
            self.wait_durable(durable);
        }
        Ok(())
    }

    /// The open frame is about to be closed: what it holds of a payload moves out.
    pub(super) fn move_landing_apart(&mut self) {
        if let Some(Room::InFrame { start, count }) = self.landing {
            let open = self.hot.open.as_ref().expect("the landing is in it");
            let mut apart = AlignedBuf::blocks(count);
            let at = open.tail_at + FRAME_HEADER_BLOCKS + start;
            apart.copy_from_slice(self.tail.slice(at, count));
            self.landing = Some(Room::Apart(apart));
        }
    }
}
