//! Byte ranges of a volume, cut at chunk boundaries and rounded out to blocks.

use super::lock::BlockRange;
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, ChunkIndex};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The part of a request that falls into one chunk.
///
/// ```text
/// block:   |  first_block  |               |               |
/// covered:      ################################
///          |skip|<-------------- bytes -------->|<- tail ->|
/// ```
/// A write of a piece with `skip_bytes` or `tail_bytes` has to read those blocks first (read-modify-write).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// First block, counted from the start of the chunk.
    pub first_block: u32,
    /// Blocks touched, at least 1.
    pub blocks: u32,
    /// Bytes of the first block in front of the range.
    pub skip_bytes: u32,
    /// Bytes of the last block behind the range.
    pub tail_bytes: u32,
    /// Where the piece's first byte lies in the request's buffer.
    pub buffer_offset: u64,
    /// Bytes of the range in this piece, at least 1.
    pub bytes: u32,
}

impl Piece {
    /// Every touched block is covered wholly.
    pub fn is_aligned(&self) -> bool {
        self.skip_bytes == 0 && self.tail_bytes == 0
    }
}

/// The pieces of a byte range, in order. Together they cover each byte exactly once, and no block is in two.
#[derive(Clone, Debug)]
pub struct Pieces {
    offset: u64,
    end: u64,
    start: u64,
}

impl Pieces {
    /// `offset + length` must not overflow; the request check sees to that.
    pub fn new(offset: u64, length: u64) -> Pieces {
        Pieces {
            offset,
            end: offset + length,
            start: offset,
        }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    #[inline]
    fn next(&mut self) -> Option<Piece> {
        if self.offset >= self.end {
            return None;
        }
        let chunk = self.offset / CHUNK_BYTES;
        let chunk_start = chunk * CHUNK_BYTES;
        let from = self.offset - chunk_start;
        let to = (self.end - chunk_start).min(CHUNK_BYTES);
        let first_block = from / BLOCK;
        let past_block = to.div_ceil(BLOCK);
        let piece = Piece {
            chunk: ChunkIndex(u32::try_from(chunk).expect("a volume has at most 2^32 chunks")),
            first_block: first_block as u32,
            blocks: (past_block - first_block) as u32,
            skip_bytes: (from % BLOCK) as u32,
            tail_bytes: (past_block * BLOCK - to) as u32,
            buffer_offset: self.offset - self.start,
            bytes: (to - from) as u32,
        };
        self.offset += to - from;
        Some(piece)
    }
}

/// The blocks a byte range touches; what a read or a write locks. `None` for an empty range.
pub fn blocks_touched(offset: u64, length: u64) -> Option<BlockRange> {
    BlockRange::new(offset / BLOCK, (offset + length).div_ceil(BLOCK)).filter(|_| length > 0)
}

/// The blocks that lie wholly inside a byte range; what a trim may forget. `None` when there is none.
pub fn whole_blocks(offset: u64, length: u64) -> Option<BlockRange> {
    BlockRange::new(offset.div_ceil(BLOCK), (offset + length) / BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::CHUNK_BLOCKS;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_byte_once_and_no_block_twice(offset in 0..5 * CHUNK_BYTES, length in 0..3 * CHUNK_BYTES) {
            let mut at = offset;
            let mut last_block = None;
            for piece in Pieces::new(offset, length) {
                let chunk_start = u64::from(piece.chunk.0) * CHUNK_BYTES;
                prop_assert_eq!(chunk_start + u64::from(piece.first_block) * BLOCK + u64::from(piece.skip_bytes), at);
                prop_assert_eq!(piece.buffer_offset, at - offset);
                prop_assert!(piece.blocks >= 1 && piece.bytes >= 1);
                prop_assert!(piece.skip_bytes < BLOCK as u32 && piece.tail_bytes < BLOCK as u32);
                prop_assert!(piece.first_block + piece.blocks <= CHUNK_BLOCKS);
                prop_assert_eq!(
                    u64::from(piece.blocks) * BLOCK,
                    u64::from(piece.skip_bytes) + u64::from(piece.bytes) + u64::from(piece.tail_bytes)
                );
                let first = chunk_start / BLOCK + u64::from(piece.first_block);
                prop_assert!(last_block.is_none_or(|last| last < first));
                last_block = Some(first + u64::from(piece.blocks) - 1);
                at += u64::from(piece.bytes);
            }
            prop_assert_eq!(at, offset + length);
            match blocks_touched(offset, length) {
                None => prop_assert_eq!(length, 0),
                Some(range) => {
                    prop_assert_eq!(range.first(), offset / BLOCK);
                    prop_assert_eq!(Some(range.end() - 1), last_block);
                }
            }
        }

        #[test]
        fn whole_blocks_are_inside_and_nothing_whole_is_left_out(offset in 0..10 * BLOCK, length in 0..10 * BLOCK) {
            for block in 0..20 {
                let inside = block * BLOCK >= offset && (block + 1) * BLOCK <= offset + length;
                let named = whole_blocks(offset, length).is_some_and(|r| (r.first()..r.end()).contains(&block));
                prop_assert_eq!(inside, named, "block {}", block);
            }
        }
    }
}
