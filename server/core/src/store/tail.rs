//! The tail: a ring in memory that outlives the process.
//!
//! A write is acknowledged when its frame in the ring says so; the background append carries frames from here to
//! their segment. Frames lie one behind the other; one that could not hold a full frame before the ring's end begins
//! at its start instead, so a walker needs nothing but where the first one is.

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{
    FRAME_DATA_BLOCKS, FRAME_HEADER_BLOCKS, FormatError, FrameHeader, PROGRESS_OFFSET, Progress,
};
use crate::units::{BLOCK_BYTES, StoreId};

/// Memory that survives the process, aligned to a block and zero where it was never written.
pub trait TailMemory: Send {
    /// Where it begins.
    fn as_mut_ptr(&mut self) -> *mut u8;
    /// Its length in bytes.
    fn len(&self) -> usize;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Bytes before the ring.
pub const TAIL_HEADER_BYTES: usize = BLOCK_BYTES;
/// Ring blocks a frame may need.
const FRAME_BLOCKS: u32 = FRAME_HEADER_BLOCKS + FRAME_DATA_BLOCKS;
/// The smallest ring: four full frames, so that one fills while others are carried away.
pub(super) const MIN_RING_BLOCKS: u32 = 4 * FRAME_BLOCKS;

/// Bytes of memory for a tail that holds about `bytes` of writes; at least 4 MiB.
pub fn tail_bytes(bytes: u64) -> usize {
    let blocks = (bytes / BLOCK_BYTES as u64).clamp(u64::from(MIN_RING_BLOCKS), 1 << 22) as usize;
    TAIL_HEADER_BYTES + blocks * BLOCK_BYTES
}

const TAIL_MAGIC: [u8; 8] = *b"ASHLARTL";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawTailHeader {
    magic: [u8; 8],
    crc: U32,
    ring_blocks: U32,
    store: [u8; 16],
    boot: [u8; 16],
    incarnation: U64,
}
/// Where the word that names the oldest frame stands: its ring block in the low half, the low half of its number in
/// the high one. Written by one store, so a kill cannot tear it.
const FIRST_OFFSET: usize = 64;
const _: () = assert!(size_of::<RawTailHeader>() <= FIRST_OFFSET);

/// Who wrote a tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TailIdentity {
    pub(super) store: StoreId,
    pub(super) boot: [u8; 16],
    pub(super) incarnation: u64,
}

pub(super) struct Tail {
    memory: Box<dyn TailMemory>,
    ring: *mut u8,
    pub(super) blocks: u32,
    /// Where the next frame goes.
    head: u32,
    /// Where the oldest frame that is not reclaimed begins; equal to `head` when there is none.
    first: u32,
    /// Frames held, the open one included.
    frames: u32,
    /// The newest of them is still being filled.
    open: bool,
}

// SAFETY: `ring` points into `memory`, which moves along and is `Send`.
unsafe impl Send for Tail {}

impl Tail {
    /// Takes the memory as it is; nothing is believed or changed yet.
    pub(super) fn new(mut memory: Box<dyn TailMemory>) -> Option<Tail> {
        let blocks =
            u32::try_from(memory.len().checked_sub(TAIL_HEADER_BYTES)? / BLOCK_BYTES).ok()?;
        if blocks < MIN_RING_BLOCKS || !(memory.as_mut_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
            return None;
        }
        // SAFETY: the memory is longer than its header.
        let ring = unsafe { memory.as_mut_ptr().add(TAIL_HEADER_BYTES) };
        Some(Tail {
            memory,
            ring,
            blocks,
            head: 0,
            first: 0,
            frames: 0,
            open: false,
        })
    }

    /// All of it, mapped until `self` is dropped.
    pub(super) fn memory(&mut self) -> (*mut u8, usize) {
        (self.memory.as_mut_ptr(), self.memory.len())
    }

    fn header_mut(&mut self) -> &mut [u8] {
        // SAFETY: the first block is ours and not part of the ring.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr(), TAIL_HEADER_BYTES) }
    }

    fn word(&mut self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= TAIL_HEADER_BYTES);
        // SAFETY: in the header block, aligned, and only ever accessed by this process while it is open.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().add(offset).cast()) }
    }

    /// Who wrote what is there, if it is a tail at all.
    pub(super) fn identity(&mut self) -> Option<TailIdentity> {
        let mut raw = RawTailHeader::read_from_prefix(self.header_mut()).ok()?.0;
        let crc = std::mem::replace(&mut raw.crc, U32::ZERO);
        if raw.magic != TAIL_MAGIC
            || crc.get() != crc32fast::hash(raw.as_bytes())
            || raw.ring_blocks.get() != self.blocks
        {
            return None;
        }
        Some(TailIdentity {
            store: StoreId(uuid::Uuid::from_bytes(raw.store)),
            boot: raw.boot,
            incarnation: raw.incarnation.get(),
        })
    }

    /// Forgets everything and makes the tail that of `identity`, whose first frame will be `next_seq`.
    pub(super) fn reset(&mut self, identity: TailIdentity, next_seq: u64) {
        // Void first: a kill half-way must not leave new frames under the old name.
        self.header_mut().fill(0);
        compiler_fence(Ordering::SeqCst);
        for block in 0..self.blocks {
            // A header of the earlier life must not be taken for one of this life; data need no wiping.
            self.block_mut(block)[..8].fill(0);
        }
        self.head = 0;
        self.first = 0;
        self.frames = 0;
        self.open = false;
        self.publish_first(next_seq);
        let mut raw = RawTailHeader {
            magic: TAIL_MAGIC,
            crc: U32::ZERO,
            ring_blocks: U32::new(self.blocks),
            store: identity.store.0.into_bytes(),
            boot: identity.boot,
            incarnation: U64::new(identity.incarnation),
        };
        raw.crc = U32::new(crc32fast::hash(raw.as_bytes()));
        compiler_fence(Ordering::SeqCst);
        self.header_mut()[..size_of::<RawTailHeader>()].copy_from_slice(raw.as_bytes());
    }

    fn publish_first(&mut self, seq: u64) {
        let word = u64::from(self.first) | (seq & 0xffff_ffff) << 32;
        self.word(FIRST_OFFSET).store(word, Ordering::Release);
    }

    /// Blocks in use.
    pub(super) fn used(&self) -> u32 {
        match (
            self.frames - u32::from(self.open),
            self.head.cmp(&self.first),
        ) {
            (0, _) => 0,
            (_, std::cmp::Ordering::Greater) => self.head - self.first,
            _ => self.blocks - self.first + self.head,
        }
    }

    /// Where a new frame would begin, if a whole one fits.
    pub(super) fn place(&self) -> Option<u32> {
        let wraps = self.head + FRAME_BLOCKS > self.blocks;
        let at = if wraps { 0 } else { self.head };
        if self.frames == 0 {
            return Some(at);
        }
        let free = if wraps {
            // Room is needed at the start, before the oldest frame, which lies before the head.
            self.head > self.first && self.first >= FRAME_BLOCKS
        } else if self.head > self.first {
            true
        } else {
            self.first - self.head >= FRAME_BLOCKS
        };
        // Full: head == first with frames held.
        (free && (wraps || self.head != self.first)).then_some(at)
    }

    /// Begins a frame at `at`, as [`Tail::place`] gave it.
    pub(super) fn begin(&mut self, at: u32, seq: u64) {
        if self.frames == 0 {
            self.first = at;
            self.publish_first(seq);
        }
        self.frames += 1;
        self.open = true;
        self.head = at;
    }

    /// Ends the frame that began last; it took `blocks`.
    pub(super) fn end(&mut self, blocks: u32) {
        self.head += blocks;
        self.open = false;
        debug_assert!(self.head <= self.blocks);
    }

    /// Lets go of the oldest frame; the one after it, `next_seq`, begins at `next_at`, or there is none.
    pub(super) fn reclaim(&mut self, next: Option<u32>, next_seq: u64) {
        self.frames -= 1;
        self.first = next.unwrap_or(self.head);
        self.publish_first(next_seq);
    }

    /// One block of the ring.
    pub(super) fn block_mut(&mut self, block: u32) -> &mut [u8] {
        self.slice_mut(block, 1)
    }

    /// `count` blocks of the ring.
    pub(super) fn slice_mut(&mut self, block: u32, count: u32) -> &mut [u8] {
        assert!(block + count <= self.blocks);
        // SAFETY: inside the ring, checked above; `&mut self` makes it unique.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.ring.add(block as usize * BLOCK_BYTES),
                count as usize * BLOCK_BYTES,
            )
        }
    }

    /// `count` blocks of the ring, to read.
    pub(super) fn slice(&self, block: u32, count: u32) -> &[u8] {
        assert!(block + count <= self.blocks);
        // SAFETY: inside the ring, checked above; nothing writes to it while `&self` is held.
        unsafe {
            std::slice::from_raw_parts(
                self.ring.add(block as usize * BLOCK_BYTES),
                count as usize * BLOCK_BYTES,
            )
        }
    }

    /// Says how far the frame at `at` is filled. Everything it covers was stored before; the order holds for whoever
    /// reads the memory after this process was killed.
    pub(super) fn publish(&mut self, at: u32, progress: Progress) {
        assert!(at < self.blocks);
        // SAFETY: inside the ring; header blocks are aligned to a block, so the word is aligned.
        let word: &AtomicU64 = unsafe {
            AtomicU64::from_ptr(
                self.ring
                    .add(at as usize * BLOCK_BYTES + PROGRESS_OFFSET)
                    .cast(),
            )
        };
        word.store(progress.to_word().to_le(), Ordering::Release);
    }

    /// The low half of the number of the oldest frame that was held, or would come next.
    pub(super) fn first_seq_low(&mut self) -> u32 {
        (self.word(FIRST_OFFSET).load(Ordering::Acquire) >> 32) as u32
    }

    /// The frames of the process that died, oldest first: where each lies and its header.
    pub(super) fn walk(
        &mut self,
        identity: TailIdentity,
    ) -> Result<Vec<(u32, FrameHeader)>, FormatError> {
        let word = self.word(FIRST_OFFSET).load(Ordering::Acquire);
        let mut at = word as u32;
        let mut seq_low = (word >> 32) as u32;
        let mut found: Vec<(u32, FrameHeader)> = Vec::new();
        while found.len() < self.blocks as usize {
            if at + FRAME_BLOCKS > self.blocks {
                at = 0;
            }
            // What follows the newest frame is free space, an older frame or the data of one, which may be anything: it is
            // damage only in a frame that is the next by its name.
            let block = self.block_mut(at);
            if !FrameHeader::is_named(block, identity.store, identity.incarnation, seq_low) {
                break;
            }
            let header = FrameHeader::decode_open(block)?;
            if found
                .last()
                .is_some_and(|(_, last)| last.seq + 1 != header.seq)
            {
                break;
            }
            found.push((at, header));
            at += header.blocks();
            seq_low = seq_low.wrapping_add(1);
            if !header.progress.closed {
                break;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::AlignedBuf;

    impl TailMemory for AlignedBuf {
        fn as_mut_ptr(&mut self) -> *mut u8 {
            (**self).as_mut_ptr()
        }
        fn len(&self) -> usize {
            (**self).len()
        }
    }

    #[test]
    fn the_ring_never_gives_a_place_that_overlaps_a_frame_it_holds() {
        let mut tail =
            Tail::new(Box::new(AlignedBuf::zeroed(tail_bytes(6 << 20)))).expect("large enough");
        let mut held: std::collections::VecDeque<(u32, u32)> = Default::default();
        let mut rng = 7u64;
        for seq in 0..20_000u64 {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if let Some(at) = tail.place() {
                for &(a, n) in &held {
                    assert!(
                        at + FRAME_BLOCKS <= a || a + n <= at,
                        "{at} overlaps {a}+{n}"
                    );
                }
                assert!(at + FRAME_BLOCKS <= tail.blocks);
                tail.begin(at, seq);
                let n = 1 + (rng >> 40) as u32 % FRAME_BLOCKS;
                tail.end(n);
                held.push_back((at, n));
            }
            if rng >> 33 & 3 == 0 || tail.place().is_none() {
                let n = 1 + (rng >> 50) as usize % held.len().max(1);
                for _ in 0..n.min(held.len()) {
                    held.pop_front();
                    tail.reclaim(held.front().map(|f| f.0), seq);
                }
            }
            let sum: u32 = held.iter().map(|h| h.1).sum();
            assert!(tail.used() >= sum);
        }
    }

    #[test]
    fn a_walk_judges_nothing_but_frames_of_its_own_tail() {
        let identity = TailIdentity {
            store: StoreId(uuid::Uuid::from_u128(5)),
            boot: [1; 16],
            incarnation: 3,
        };
        let mut tail =
            Tail::new(Box::new(AlignedBuf::zeroed(tail_bytes(4 << 20)))).expect("large enough");
        tail.reset(identity, 9);
        let header = FrameHeader {
            addr: super::super::format::Addr(1000),
            store: identity.store,
            progress: Progress {
                data_blocks: 2,
                closed: true,
                ..Progress::default()
            },
            incarnation: identity.incarnation,
            seq: 9,
            durable_seq: 8,
            checkpoint_seq: 1,
            next_segment: 0,
        };
        let at = tail.place().expect("room");
        tail.begin(at, header.seq);
        header.encode(tail.block_mut(at));
        tail.end(header.blocks());
        // Behind it, data of an earlier lap that begin as a frame does and are none.
        let behind = at + header.blocks();
        let mut rng = 3u64;
        for _ in 0..1000 {
            for byte in tail.block_mut(behind) {
                rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (rng >> 56) as u8;
            }
            tail.block_mut(behind)[..8].copy_from_slice(&super::super::format::FRAME_MAGIC);
            assert_eq!(tail.walk(identity), Ok(vec![(at, header)]));
        }
        // One that is the next by its name must be possible as well.
        let next = FrameHeader {
            seq: header.seq + 1,
            ..header
        };
        next.encode(tail.block_mut(behind));
        assert_eq!(
            tail.walk(identity).map(|found| found.len()),
            Ok(2),
            "the frame behind it"
        );
        tail.block_mut(behind)[PROGRESS_OFFSET..][..8].fill(0xff);
        assert!(tail.walk(identity).is_err());
    }
}
