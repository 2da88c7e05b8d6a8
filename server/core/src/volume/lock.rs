//! The range lock: no change runs beside anything that touches the same block.
//!
//! Reads share, changes exclude, and who came first goes first: a request waits for every earlier request it conflicts
//! with, started or not, so nothing starves. Without it a read could return a newer and then an older value of a block
//! whose write is still under way on one replica.
//!
//! Requests in flight are few and mostly do not overlap. A counting filter over hashed regions answers "certainly no
//! conflict" in a few loads; only when it cannot, the list of ranges is scanned.

use smallvec::SmallVec;

/// Blocks `first..end`; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    first: u64,
    end: u64,
}

impl BlockRange {
    /// `None` when it would be empty.
    pub fn new(first: u64, end: u64) -> Option<BlockRange> {
        (first < end).then_some(BlockRange { first, end })
    }

    /// First block.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// One past the last block.
    pub fn end(&self) -> u64 {
        self.end
    }

    fn overlaps(&self, other: &BlockRange) -> bool {
        self.first < other.end && other.first < self.end
    }
}

/// What a request does to its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads: beside other reads.
    Shared,
    /// Changes: alone.
    Exclusive,
}

/// A request that was admitted, until it is finished. Not reusable: a second finish is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    slot: u32,
    sequence: u64,
}

impl Ticket {
    /// Holds nothing: of a request that was let in without a lock.
    pub(crate) const NONE: Ticket = Ticket {
        slot: u32::MAX,
        sequence: 0,
    };
}

/// Blocks in a region of the filter (1 MiB): most requests touch one or two regions.
const REGION_SHIFT: u32 = 8;
/// Counters in the filter, a power of two. With 128 requests in flight one scan in eight is for nothing.
const FILTER_COUNTERS: usize = 1024;
/// A request of more regions than this is not counted per region (a trim of the whole volume would cost more than
/// the scans it saves); while one is there, every request scans.
const MAX_COUNTED_REGIONS: u64 = 64;

/// Counts, per hashed region, the requests that touch it.
struct Filter {
    counters: Box<[u32; FILTER_COUNTERS]>,
    /// Requests too wide to be counted per region.
    wide: u32,
}

impl Filter {
    fn new() -> Filter {
        Filter {
            counters: Box::new([0; FILTER_COUNTERS]),
            wide: 0,
        }
    }

    /// Inclusive bounds of the regions, or `None` when there are too many.
    #[inline]
    fn regions(range: &BlockRange) -> Option<(u64, u64)> {
        let first = range.first >> REGION_SHIFT;
        let last = (range.end - 1) >> REGION_SHIFT;
        (last - first < MAX_COUNTED_REGIONS).then_some((first, last))
    }

    #[inline]
    fn index(region: u64) -> usize {
        // Fibonacci hashing; the top 10 bits pick one of FILTER_COUNTERS.
        (region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize
    }

    #[inline]
    fn add(&mut self, range: &BlockRange) {
        match Filter::regions(range) {
            None => self.wide += 1,
            Some((first, last)) => {
                for region in first..=last {
                    self.counters[Filter::index(region)] += 1;
                }
            }
        }
    }

    #[inline]
    fn remove(&mut self, range: &BlockRange) {
        match Filter::regions(range) {
            None => self.wide -= 1,
            Some((first, last)) => {
                for region in first..=last {
                    self.counters[Filter::index(region)] -= 1;
                }
            }
        }
    }

    /// True when some counted request may overlap; false when certainly none does.
    #[inline]
    fn may_touch(&self, range: &BlockRange) -> bool {
        if self.wide > 0 {
            return true;
        }
        match Filter::regions(range) {
            None => true,
            Some((first, last)) => {
                (first..=last).any(|region| self.counters[Filter::index(region)] > 0)
            }
        }
    }
}

const _: () = assert!(FILTER_COUNTERS == 1 << (64 - 54));

/// What is known of a slot beside its range, which lies apart so that scans stay dense.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Order of arrival; 0 when the slot is free.
    sequence: u64,
    /// The caller's name for the request.
    tag: u64,
    access: Access,
    /// Conflicting requests that go first and are not yet finished; 0 means started.
    blockers: u32,
    /// Goes before what had come earlier and not started.
    ahead: bool,
}

impl Slot {
    /// Whether, of two conflicting requests that are both here, this one goes before the other.
    fn goes_before(&self, other: &Slot) -> bool {
        if self.sequence < other.sequence {
            !other.ahead || self.blockers == 0
        } else {
            self.ahead && other.blockers > 0
        }
    }
}

const FREE: Slot = Slot {
    sequence: 0,
    tag: 0,
    access: Access::Shared,
    blockers: 0,
    ahead: false,
};
/// A range that overlaps nothing.
const NOWHERE: BlockRange = BlockRange { first: 0, end: 0 };

/// A request that may start now because those before it have finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unblocked {
    pub(super) ticket: Ticket,
    pub(super) tag: u64,
    pub(super) access: Access,
}

/// The range lock of one volume.
pub(super) struct RangeLock {
    ranges: Vec<BlockRange>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    next_sequence: u64,
    waiting: u32,
    waiting_exclusive: u32,
    /// Every request, started or waiting.
    any: Filter,
    /// Changes only, started or waiting.
    exclusive: Filter,
}

impl RangeLock {
    pub(super) fn new() -> RangeLock {
        RangeLock {
            ranges: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            next_sequence: 1,
            waiting: 0,
            waiting_exclusive: 0,
            any: Filter::new(),
            exclusive: Filter::new(),
        }
    }

    /// Enters a request; true when it may start at once.
    #[inline]
    pub(super) fn enter(&mut self, access: Access, range: BlockRange, tag: u64) -> (Ticket, bool) {
        let filter = match access {
            Access::Shared => &self.exclusive,
            Access::Exclusive => &self.any,
        };
        let blockers = if filter.may_touch(&range) {
            self.count_conflicts(access, &range)
        } else {
            0
        };
        self.insert(access, range, tag, blockers, false)
    }

    /// Enters a change that waits only for what has started, and goes before everything else: it is part of what those
    /// that have started wait for.
    pub(super) fn enter_ahead(&mut self, range: BlockRange, tag: u64) -> (Ticket, bool) {
        let mut blockers = 0;
        for (index, other) in self.ranges.iter().enumerate() {
            if !other.overlaps(&range) {
                continue;
            }
            let slot = &mut self.slots[index];
            if slot.blockers == 0 {
                blockers += 1;
            } else {
                slot.blockers += 1;
            }
        }
        self.insert(Access::Exclusive, range, tag, blockers, true)
    }

    #[inline]
    fn insert(
        &mut self,
        access: Access,
        range: BlockRange,
        tag: u64,
        blockers: u32,
        ahead: bool,
    ) -> (Ticket, bool) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let slot = Slot {
            sequence,
            tag,
            access,
            blockers,
            ahead,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                self.ranges[index as usize] = range;
                index
            }
            None => {
                self.slots.push(slot);
                self.ranges.push(range);
                (self.slots.len() - 1) as u32
            }
        };
        self.any.add(&range);
        if access == Access::Exclusive {
            self.exclusive.add(&range);
        }
        if blockers > 0 {
            self.waiting += 1;
            self.waiting_exclusive += u32::from(access == Access::Exclusive);
        }
        (
            Ticket {
                slot: index,
                sequence,
            },
            blockers == 0,
        )
    }

    /// Takes a request out, started or not, and appends those that may start now, oldest first.
    #[inline]
    pub(super) fn leave(&mut self, ticket: Ticket, unblocked: &mut SmallVec<[Unblocked; 4]>) {
        let index = ticket.slot as usize;
        let slot = self.slots[index];
        assert_eq!(
            slot.sequence, ticket.sequence,
            "a ticket is finished exactly once"
        );
        let range = std::mem::replace(&mut self.ranges[index], NOWHERE);
        self.slots[index] = FREE;
        self.free.push(ticket.slot);
        self.any.remove(&range);
        if slot.access == Access::Exclusive {
            self.exclusive.remove(&range);
        }
        if slot.blockers > 0 {
            self.waiting -= 1;
            self.waiting_exclusive -= u32::from(slot.access == Access::Exclusive);
        }
        if self.waiting > 0 {
            self.release(&slot, &range, unblocked);
        }
    }

    #[cold]
    fn release(
        &mut self,
        gone: &Slot,
        range: &BlockRange,
        unblocked: &mut SmallVec<[Unblocked; 4]>,
    ) {
        let first_new = unblocked.len();
        for (index, other) in self.ranges.iter().enumerate() {
            let slot = &mut self.slots[index];
            if !other.overlaps(range)
                || slot.blockers == 0
                || !gone.goes_before(slot)
                || (slot.access == Access::Shared && gone.access == Access::Shared)
            {
                continue;
            }
            slot.blockers -= 1;
            if slot.blockers == 0 {
                self.waiting -= 1;
                self.waiting_exclusive -= u32::from(slot.access == Access::Exclusive);
                unblocked.push(Unblocked {
                    ticket: Ticket {
                        slot: index as u32,
                        sequence: slot.sequence,
                    },
                    tag: slot.tag,
                    access: slot.access,
                });
            }
        }
        unblocked[first_new..].sort_unstable_by_key(|entry| entry.ticket.sequence);
    }

    fn count_conflicts(&self, access: Access, range: &BlockRange) -> u32 {
        let mut count = 0;
        for (index, other) in self.ranges.iter().enumerate() {
            if other.overlaps(range)
                && (access == Access::Exclusive || self.slots[index].access == Access::Exclusive)
            {
                count += 1;
            }
        }
        count
    }

    /// Requests that have entered and not left.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Of those, the ones that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting as usize
    }

    /// Changes that wait; each will need a version when it starts.
    pub(super) fn waiting_exclusive(&self) -> u32 {
        self.waiting_exclusive
    }

    pub(super) fn check_invariants(&self) {
        let live = || {
            self.slots
                .iter()
                .zip(&self.ranges)
                .filter(|(slot, _)| slot.sequence > 0)
        };
        assert_eq!(self.slots.len(), self.ranges.len());
        assert_eq!(live().count(), self.in_flight());
        let mut any = Filter::new();
        let mut exclusive = Filter::new();
        for (slot, range) in live() {
            any.add(range);
            if slot.access == Access::Exclusive {
                exclusive.add(range);
            }
            // A request waits for exactly the conflicting ones that go before it and are still here.
            let earlier = live()
                .filter(|(other, other_range)| {
                    other.sequence != slot.sequence
                        && other.goes_before(slot)
                        && other_range.overlaps(range)
                        && (other.access == Access::Exclusive || slot.access == Access::Exclusive)
                })
                .count();
            assert_eq!(earlier, slot.blockers as usize);
        }
        assert!(any.counters == self.any.counters && any.wide == self.any.wide);
        assert!(exclusive.counters == self.exclusive.counters);
        assert_eq!(exclusive.wide, self.exclusive.wide);
        assert_eq!(
            live().filter(|(slot, _)| slot.blockers > 0).count(),
            self.waiting()
        );
        assert_eq!(
            live()
                .filter(|(slot, _)| slot.blockers > 0 && slot.access == Access::Exclusive)
                .count(),
            self.waiting_exclusive as usize
        );
    }
}
