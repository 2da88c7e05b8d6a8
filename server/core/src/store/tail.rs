//! The tail: a ring in memory that outlives the process.
//!
//! A write is acknowledged when its frame in the ring says so; the background append carries frames from here to
//! their segment. Frames lie one behind the other; one that could not hold a full frame before the ring's end begins
//! at its start instead, so a walker needs nothing but where the first one is.

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{
    FRAME_DATA_BLOCKS, FRAME_HEADER_BLOCKS, FRAME_MAGIC, FormatError, FrameHeader, PROGRESS_OFFSET,
    Progress, with_check,
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
/// The largest ring: 16 GiB.
const MAX_RING_BLOCKS: u64 = 1 << 22;
const _: () = assert!(MAX_RING_BLOCKS < 1 << FIRST_BLOCK_BITS);
/// The smallest ring: four full frames, so that one fills while others are carried away.
pub(super) const MIN_RING_BLOCKS: u32 = 4 * FRAME_BLOCKS;

/// Bytes of memory for a tail that holds about `bytes` of writes; at least 4 MiB.
pub fn tail_bytes(bytes: u64) -> usize {
    let blocks =
        (bytes / BLOCK_BYTES as u64).clamp(u64::from(MIN_RING_BLOCKS), MAX_RING_BLOCKS) as usize;
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
/// Where the word that names the oldest frame stands: its ring block in the lowest bits, the low half of its number above
/// them, and a check of both. Written by one store, so a kill cannot tear it.
const FIRST_OFFSET: usize = 64;
/// It may name the ring's end.
const FIRST_BLOCK_BITS: u32 = 23;
const FIRST_BITS: u32 = FIRST_BLOCK_BITS + 32;
/// Where the number of the newest frame stands that was begun, or that of the one before the first. Written once the
/// frame has its header, and before anything in it counts.
const LAST_OFFSET: usize = 72;
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
        let fits = (u64::from(MIN_RING_BLOCKS)..=MAX_RING_BLOCKS).contains(&u64::from(blocks));
        if !fits || !(memory.as_mut_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
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
        self.publish_last(next_seq - 1);
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
        let bits = u64::from(self.first) | (seq & 0xffff_ffff) << FIRST_BLOCK_BITS;
        let word = with_check(bits, FIRST_BITS).to_le();
        self.word(FIRST_OFFSET).store(word, Ordering::Release);
        // Nothing is written over what was let go of before this is said.
        compiler_fence(Ordering::SeqCst);
    }

    fn publish_last(&mut self, seq: u64) {
        self.word(LAST_OFFSET).store(seq.to_le(), Ordering::Release);
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
        // What was there before goes first, its name before all: it must not be taken for the frame that is being written.
        self.ring_word(at, 0).store(0, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
    }

    /// The frame that began last, `seq` at `at`, has its header but for its name, which it gets now; from then on it is
    /// missed when it is not there. A process that is killed before leaves no frame, and none half written.
    pub(super) fn begun(&mut self, at: u32, seq: u64) {
        self.ring_word(at, 0)
            .store(u64::from_ne_bytes(FRAME_MAGIC), Ordering::Release);
        self.publish_last(seq);
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
        self.ring_word(at, PROGRESS_OFFSET)
            .store(progress.to_word().to_le(), Ordering::Release);
    }

    /// A word of a frame's header, which begins at ring block `at`.
    fn ring_word(&mut self, at: u32, offset: usize) -> &AtomicU64 {
        assert!(at < self.blocks && offset.is_multiple_of(8) && offset + 8 <= BLOCK_BYTES);
        // SAFETY: inside the ring; header blocks are aligned to a block, so the word is aligned.
        unsafe { AtomicU64::from_ptr(self.ring.add(at as usize * BLOCK_BYTES + offset).cast()) }
    }

    /// Where the oldest frame that was held begins, or would have begun, and the low half of its number.
    pub(super) fn first(&mut self) -> Result<(u32, u32), FormatError> {
        let word = u64::from_le(self.word(FIRST_OFFSET).load(Ordering::Acquire));
        let bits = word & ((1 << FIRST_BITS) - 1);
        if word != with_check(bits, FIRST_BITS) {
            return Err(FormatError::Checksum);
        }
        let block = bits & ((1 << FIRST_BLOCK_BITS) - 1);
        Ok((block as u32, (bits >> FIRST_BLOCK_BITS) as u32))
    }

    /// The frames of the process that died, oldest first: where each lies and its header. An error when one that was
    /// begun is not there.
    pub(super) fn walk(
        &mut self,
        identity: TailIdentity,
    ) -> Result<Vec<(u32, FrameHeader)>, FormatError> {
        let (mut at, first_seq_low) = self.first()?;
        let mut seq_low = first_seq_low;
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
            let header = FrameHeader::decode_in_tail(block)?;
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
        let last = u64::from_le(self.word(LAST_OFFSET).load(Ordering::Acquire));
        let is_whole = match found.last() {
            // The process may have died before it said that it had begun this one.
            Some((_, header)) => {
                header.seq == last
                    || (header.seq == last.wrapping_add(1) && header.progress.entries == 0)
            }
            None => first_seq_low == (last as u32).wrapping_add(1),
        };
        if is_whole {
            Ok(found)
        } else {
            Err(FormatError::Invalid("end: a frame is missing"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

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
        let mut held: VecDeque<(u32, u32)> = VecDeque::new();
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

    /// An empty tail whose first frame will be `next_seq`, and whose it is.
    fn new_tail(next_seq: u64) -> (Tail, TailIdentity) {
        let identity = TailIdentity {
            store: StoreId(uuid::Uuid::from_u128(5)),
            boot: [1; 16],
            incarnation: 3,
        };
        let memory = AlignedBuf::zeroed(tail_bytes(4 << 20));
        let mut tail = Tail::new(Box::new(memory)).expect("large enough");
        tail.reset(identity, next_seq);
        (tail, identity)
    }

    #[test]
    fn a_walk_judges_nothing_but_frames_of_its_own_tail() {
        let (mut tail, identity) = new_tail(9);
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
        FrameHeader::seal(tail.block_mut(at));
        tail.begun(at, header.seq);
        tail.end(header.blocks());
        // Behind it, data of an earlier lap that begin as a frame does and are none.
        let behind = at + header.blocks();
        let mut rng = 3u64;
        for _ in 0..1000 {
            for byte in tail.block_mut(behind) {
                rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (rng >> 56) as u8;
            }
            tail.block_mut(behind)[..8].copy_from_slice(&FRAME_MAGIC);
            assert_eq!(tail.walk(identity), Ok(vec![(at, header)]));
        }
        // One that is the next by its name must be possible as well. It counts when it was said that it had begun.
        let next = FrameHeader {
            seq: header.seq + 1,
            ..header
        };
        next.encode(tail.block_mut(behind));
        FrameHeader::seal(tail.block_mut(behind));
        tail.begun(behind, next.seq);
        let both = vec![(at, header), (behind, next)];
        assert_eq!(tail.walk(identity), Ok(both.clone()));
        for offset in 0..BLOCK_BYTES {
            tail.block_mut(behind)[offset] ^= 1 << (offset % 8);
            assert!(tail.walk(identity).is_err(), "byte {offset}");
            tail.block_mut(behind)[offset] ^= 1 << (offset % 8);
        }
        assert_eq!(tail.walk(identity), Ok(both));
    }

    #[test]
    fn a_word_with_a_bit_changed_does_not_check() {
        let mut rng = 11u64;
        for used in 45..=FIRST_BITS {
            let mask = (1 << used) - 1;
            let checks = |word: u64| word == with_check(word & mask, used);
            assert!(!checks(0));
            for round in 0..2_000 {
                rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let bits = (rng >> 7 >> (round % 57)) & mask;
                let word = with_check(bits, used);
                assert!(checks(word));
                for bit in 0..64 {
                    assert!(!checks(word ^ 1 << bit), "bit {bit} of {word:x}");
                }
            }
        }
    }

    #[test]
    fn a_bit_that_changes_in_a_tail_is_seen() {
        let (mut tail, identity) = new_tail(100);
        let mut seq = 100;
        let mut rng = 5u64;
        let mut places = VecDeque::new();
        for _ in 0..200 {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if let Some(at) = tail.place() {
                let header = FrameHeader {
                    addr: super::super::format::Addr(1000),
                    store: identity.store,
                    progress: Progress {
                        entries: 1,
                        entry_bytes: 40,
                        data_blocks: 1 + (rng >> 60) as u16,
                        ..Progress::default()
                    },
                    incarnation: identity.incarnation,
                    seq,
                    durable_seq: 0,
                    checkpoint_seq: 1,
                    next_segment: 0,
                };
                tail.begin(at, seq);
                // Killed at each step of this, the process leaves what was there before, or a frame without entries.
                tail.block_mut(at).fill(0);
                assert_eq!(tail.walk(identity).expect("is whole").len(), places.len());
                let empty = FrameHeader {
                    progress: Progress::default(),
                    ..header
                };
                empty.encode_nameless(tail.block_mut(at));
                assert_eq!(tail.walk(identity).expect("is whole").len(), places.len());
                places.push_back(at);
                tail.block_mut(at)[..8].copy_from_slice(&FRAME_MAGIC);
                assert_eq!(tail.walk(identity).expect("is whole").len(), places.len());
                tail.begun(at, seq);
                assert_eq!(tail.walk(identity).expect("is whole").len(), places.len());
                tail.publish(at, header.progress);
                let whole = tail.walk(identity).expect("is whole");
                assert_eq!(whole.len(), places.len());
                // Of the words that name frames and of the newest one, which is open: all that says what it is.
                let words = [FIRST_OFFSET, LAST_OFFSET].map(|at| at..at + 8);
                let header_at = TAIL_HEADER_BYTES + at as usize * BLOCK_BYTES;
                let of_frame =
                    [0..8, 16..48].map(|part| header_at + part.start..header_at + part.end);
                for byte in words.into_iter().chain(of_frame).flatten() {
                    // SAFETY: inside the memory, which only this test uses.
                    let byte = unsafe { &mut *tail.memory.as_mut_ptr().add(byte) };
                    *byte ^= 1 << (rng >> 33 & 7);
                    assert!(tail.walk(identity).is_err() || tail.identity() != Some(identity));
                    *byte ^= 1 << (rng >> 33 & 7);
                }
                // And a frame that vanishes.
                let newest = tail.block_mut(at).to_vec();
                tail.block_mut(at).fill(0);
                assert!(tail.walk(identity).is_err());
                tail.block_mut(at).copy_from_slice(&newest);
                let closed = Progress {
                    closed: true,
                    ..header.progress
                };
                FrameHeader::seal_for(tail.block_mut(at), closed);
                tail.publish(at, closed);
                tail.end(header.blocks());
                assert_eq!(tail.walk(identity).expect("is whole").len(), places.len());
                seq += 1;
            }
            for _ in 0..(rng >> 50) as usize % 3 {
                if places.pop_front().is_some() {
                    let next_seq = seq - places.len() as u64;
                    tail.reclaim(places.front().copied(), next_seq);
                    assert_eq!(tail.walk(identity).expect("is whole").len(), places.len());
                }
            }
        }
    }
}
