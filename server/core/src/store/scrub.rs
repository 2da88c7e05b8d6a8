//! Scrub: read everything slowly and compare it with its checksum.

use super::format::{ExtentKey, LEAF_DISK_BLOCKS};
use super::read::Reader;
use super::{AlignedBuf, Event, ScrubOutcome, Store, StoreError};
use crate::units::{BLOCK_BYTES, CHUNK_LEAVES, ChunkIndex, LEAF_BLOCKS, LayerId};

#[derive(Default)]
pub(super) struct Scrub {
    /// The next leaf to read: its chunk and its number there.
    at: Option<(ExtentKey, u32)>,
    buf: Option<AlignedBuf>,
    /// Number of the scrub whose read is under way: it may have been ended or replaced meanwhile.
    reading: Option<u64>,
    /// Of the leaf being read: blocks that cannot be read, the first in its chunk and how many.
    damaged: Vec<(u32, u32)>,
    /// Not before then: the rate.
    next_ms: u64,
}

impl Scrub {
    pub(super) fn running(&self) -> bool {
        self.at.is_some()
    }

    pub(super) fn found_damaged(&mut self, first_block: u32, count: u32) {
        self.damaged.push((first_block, count));
    }
}

impl Store {
    /// Begins to verify everything, from the start; [`Event::ScrubFinished`] ends it, if the store does not stop before.
    /// One that runs is ended without an event. Returns the new one's number.
    pub fn start_scrub(&mut self) -> Result<u64, StoreError> {
        self.healthy()?;
        let first = ExtentKey {
            layer: LayerId(0),
            chunk: ChunkIndex(0),
        };
        self.scrub.at = Some((first, 0));
        self.scrub.next_ms = self.now_ms;
        self.counters.scrub_blocks = 0;
        self.counters.scrub_damaged = 0;
        self.counters.scrub_pass += 1;
        Ok(self.counters.scrub_pass)
    }

    /// Ends the scrub, if one runs, without an event.
    pub fn stop_scrub(&mut self) {
        self.scrub.at = None;
    }

    /// Number of the scrub that runs, if one does.
    pub fn running_scrub(&self) -> Option<u64> {
        self.scrub.running().then_some(self.counters.scrub_pass)
    }

    /// Blocks a scrub reads a second, from its next read on.
    pub fn set_scrub_rate(&mut self, blocks_per_s: u64) {
        self.params.scrub_blocks_per_s = blocks_per_s;
    }

    pub(super) fn scrub_deadline(&self) -> Option<u64> {
        (self.scrub.running() && self.scrub.reading.is_none()).then_some(self.scrub.next_ms)
    }

    pub(super) fn advance_scrub(&mut self) {
        while let Some((key, leaf)) = self.scrub.at {
            if self.scrub.reading.is_some() || self.now_ms < self.scrub.next_ms {
                return;
            }
            let Some(row) = self.index.next_row(key) else {
                self.scrub.at = None;
                self.scrub.buf = None;
                let (blocks, damaged) = (self.counters.scrub_blocks, self.counters.scrub_damaged);
                self.counters.scrub_ended = ScrubOutcome {
                    pass: self.counters.scrub_pass,
                    blocks,
                    damaged,
                };
                self.event(Event::ScrubFinished { blocks, damaged });
                return;
            };
            let found = self.index.row(row).key;
            let leaf = if found == key { leaf } else { 0 };
            self.scrub.at = Some(match leaf + 1 {
                CHUNK_LEAVES => (
                    ExtentKey {
                        chunk: ChunkIndex(found.chunk.0.saturating_add(1)),
                        ..found
                    },
                    0,
                ),
                next => (found, next),
            });
            let empty = self.index.slot_of(row, leaf).is_none()
                && !self.index.row(row).leaves[leaf as usize].addr().is_stored()
                && !self.index.leaf_has_pending(row, leaf);
            if empty {
                continue;
            }
            let mut buf = self
                .scrub
                .buf
                .take()
                .unwrap_or_else(|| AlignedBuf::zeroed(LEAF_BLOCKS as usize * BLOCK_BYTES));
            let ptr = buf.as_mut_ptr();
            self.scrub.buf = Some(buf);
            self.scrub.reading = Some(self.counters.scrub_pass);
            let id = self.start_read(Reader::Scrub, row, leaf * LEAF_BLOCKS, LEAF_BLOCKS, ptr);
            self.end_read_if_done(id);
        }
    }

    /// One leaf's blocks were read and compared.
    pub(super) fn on_scrub_read(&mut self, extent: ExtentKey, blocks: u32) {
        let read_by = self.scrub.reading.take();
        let mut damaged = std::mem::take(&mut self.scrub.damaged);
        if !self.scrub.running() {
            self.scrub.buf = None;
            return;
        }
        // The one that runs reads it again.
        if read_by != Some(self.counters.scrub_pass) {
            return;
        }
        self.counters.scrub_blocks += u64::from(blocks);
        damaged.sort_unstable();
        damaged.dedup_by(|next, before| {
            let is_adjacent = before.0 + before.1 == next.0;
            before.1 += if is_adjacent { next.1 } else { 0 };
            is_adjacent
        });
        for (first_block, count) in damaged {
            self.counters.scrub_damaged += u64::from(count);
            self.event(Event::ScrubDamaged {
                extent,
                first_block,
                count,
            });
        }
        let rate = self.params.scrub_blocks_per_s.max(1);
        let with_leaf = u64::from(blocks + LEAF_DISK_BLOCKS);
        self.scrub.next_ms = self.now_ms + with_leaf * 1000 / rate;
    }
}
