//! Block-aligned buffers, lent and taken back: no allocation on the path of an I/O once a size has been in use, as long
//! as what comes and goes stays within what is kept.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ashlar_core::units::BLOCK_BYTES;

use crate::mapping::{LARGE_PAGE_BYTES, Pages};

/// Smallest and largest size class: 4 KiB to 1 MiB by doublings. Larger buffers are at most twice what was asked for.
const SMALLEST_SHIFT: u32 = 12;
const CLASSES: usize = 9;
const LARGEST_CLASS: usize = 1 << (SMALLEST_SHIFT as usize + CLASSES - 1);

/// Buffers from here on are shares of slabs: a disk takes each page that lies apart as a piece of its own, and virtual
/// disks take few pieces at a time.
const SLAB_SHARE_BYTES: usize = 64 << 10;
const SLAB_BYTES: usize = LARGE_PAGE_BYTES;
/// Of what is kept, buffers that are smaller get one part of so many, lest the two kinds take each other's room.
const SMALL_PART: usize = 4;
/// What one share in use in each of those classes takes.
const SPARSE_BYTES: usize =
    (LARGEST_CLASS / SLAB_SHARE_BYTES).trailing_zeros() as usize * SLAB_BYTES + SLAB_BYTES;

/// Memory of at least the size asked for, aligned to a block. Its contents are whatever was there before, so it is
/// handed about by address; [`Buffer::bytes`] is for what is known to have been filled.
pub(super) struct Buffer {
    start: NonNull<u8>,
    capacity: usize,
    home: Home,
}

/// What a buffer's memory belongs to.
enum Home {
    /// The allocator.
    Heap,
    /// It is a share of this.
    Slab(Arc<Slab>),
    /// Pages of its own, which nobody asks but to hold them.
    Own { _pages: Pages },
}

/// Memory of which several buffers of one class are shares.
struct Slab {
    pages: Pages,
    /// Shares that are lent.
    lent: AtomicU32,
}

// SAFETY: a buffer owns its memory: slabs are reached only through buffers, whose ranges do not overlap.
unsafe impl Send for Buffer {}

fn pages(len: usize) -> Pages {
    Pages::new(len).unwrap_or_else(|_| handle_alloc_error(Buffer::layout(len)))
}

impl Buffer {
    fn on_heap(capacity: usize) -> Buffer {
        let layout = Buffer::layout(capacity);
        // SAFETY: the layout has a size: capacities are positive multiples of a block.
        let start = unsafe { alloc(layout) };
        Buffer {
            start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)),
            capacity,
            home: Home::Heap,
        }
    }

    fn of_own_pages(capacity: usize) -> Buffer {
        let pages = pages(capacity);
        Buffer {
            start: pages.start(),
            capacity,
            home: Home::Own { _pages: pages },
        }
    }

    /// Buffers of `capacity`, a power of two, that together make up a slab.
    fn share_slab(capacity: usize) -> impl Iterator<Item = Buffer> {
        let slab = Arc::new(Slab {
            pages: pages(SLAB_BYTES),
            lent: AtomicU32::new(0),
        });
        (0..SLAB_BYTES).step_by(capacity).map(move |at| Buffer {
            // SAFETY: inside the slab.
            start: unsafe { slab.pages.start().add(at) },
            capacity,
            home: Home::Slab(Arc::clone(&slab)),
        })
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BLOCK_BYTES)
            .expect("a buffer is smaller than the address space")
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// The address of byte `at`, which lies inside or one past the end.
    #[inline]
    pub(super) fn at(&self, at: usize) -> *mut u8 {
        assert!(at <= self.capacity);
        // SAFETY: inside the allocation or one past its end.
        unsafe { self.start.as_ptr().add(at) }
    }

    /// # Safety
    /// The range was filled since the buffer was taken, and nothing writes to it while the slice lives.
    #[inline]
    pub(super) unsafe fn bytes(&self, from: usize, len: usize) -> &[u8] {
        assert!(from + len <= self.capacity);
        // SAFETY: inside the allocation; filled, says the caller.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(from), len) }
    }

    /// Copies `data` to byte `at`.
    #[inline]
    pub(super) fn put(&mut self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.capacity);
        // SAFETY: inside the allocation; `data` cannot overlap memory that `self` owns uniquely.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.start.as_ptr().add(at), data.len())
        };
    }

    /// Fills with zeros.
    pub(super) fn zero(&mut self, at: usize, len: usize) {
        assert!(at + len <= self.capacity);
        // SAFETY: inside the allocation.
        unsafe { self.start.as_ptr().add(at).write_bytes(0, len) };
    }

    /// Copies within the buffer; the ranges may overlap. The source must have been filled.
    pub(super) fn copy_within(&mut self, from: usize, to: usize, len: usize) {
        assert!(from + len <= self.capacity && to + len <= self.capacity);
        // SAFETY: both inside the allocation.
        unsafe {
            std::ptr::copy(
                self.start.as_ptr().add(from),
                self.start.as_ptr().add(to),
                len,
            )
        };
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Home::Heap = self.home {
            // SAFETY: allocated by `on_heap` with this layout.
            unsafe { dealloc(self.start.as_ptr(), Buffer::layout(self.capacity)) };
        }
    }
}

/// What is idle and could go back to the system.
enum Idle {
    /// A slab of which no share is lent, and the class of its shares, which are all free.
    Slab(usize, Arc<Slab>),
    /// A buffer larger than any class.
    Large(Buffer),
}

/// Free buffers by size class, and how much is lent.
///
/// A slab goes back to the system as a whole. As long as one share of it is lent, the others are kept: giving them up
/// would free nothing. So a few buffers can hold more memory than they are large, see [`Pool::used_bytes`].
pub(super) struct Pool {
    free: [Vec<Buffer>; CLASSES],
    /// Of these, bytes of those that are no shares of slabs.
    free_small_bytes: usize,
    /// In the order in which they came back.
    idle: VecDeque<Idle>,
    idle_bytes: usize,
    /// Most of both that is kept.
    keep_bytes: usize,
    lent_bytes: usize,
    /// Of these, in shares of slabs.
    lent_share_bytes: usize,
    /// Of these, for what comes from clients' sockets.
    receiving_bytes: usize,
    /// Slabs of which some share is lent.
    slabs_in_use: usize,
    /// Something came back since [`Pool::take_given`] was asked.
    given: bool,
}

impl Pool {
    pub(super) fn new(keep_bytes: usize) -> Pool {
        Pool {
            free: Default::default(),
            free_small_bytes: 0,
            idle: VecDeque::new(),
            idle_bytes: 0,
            keep_bytes,
            lent_bytes: 0,
            lent_share_bytes: 0,
            receiving_bytes: 0,
            slabs_in_use: 0,
            given: false,
        }
    }

    fn keep_small_bytes(&self) -> usize {
        self.keep_bytes / SMALL_PART
    }

    fn keep_idle_bytes(&self) -> usize {
        self.keep_bytes - self.keep_small_bytes()
    }

    /// A buffer of at least `len` bytes (0 counts as 1).
    #[inline]
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let buffer = if len <= LARGEST_CLASS {
            self.take_of_class(class_of(len))
        } else {
            self.take_large(len.next_multiple_of(BLOCK_BYTES))
        };
        self.lent_bytes += buffer.capacity;
        if let Home::Slab(slab) = &buffer.home {
            self.lent_share_bytes += buffer.capacity;
            if slab.lent.fetch_add(1, Ordering::Relaxed) == 0 {
                self.slabs_in_use += 1;
                self.is_in_use(Arc::as_ptr(slab));
            }
        }
        buffer
    }

    /// As [`Pool::take`], for what comes from a client's socket; it comes back by [`Pool::give_received`].
    pub(super) fn take_to_receive(&mut self, len: usize) -> Buffer {
        let buffer = self.take(len);
        self.receiving_bytes += buffer.capacity;
        buffer
    }

    fn take_of_class(&mut self, class: usize) -> Buffer {
        let capacity = 1 << (SMALLEST_SHIFT as usize + class);
        match self.free[class].pop() {
            Some(buffer) => {
                if capacity < SLAB_SHARE_BYTES {
                    self.free_small_bytes -= capacity;
                }
                buffer
            }
            None if capacity < SLAB_SHARE_BYTES => Buffer::on_heap(capacity),
            None => {
                let mut buffers = Buffer::share_slab(capacity);
                let first = buffers.next().expect("a slab holds at least one");
                self.free[class].extend(buffers);
                first
            }
        }
    }

    /// A buffer larger than any class: a free one of about that size, or a new one.
    fn take_large(&mut self, capacity: usize) -> Buffer {
        let fits = |(at, idle): (usize, &Idle)| match idle {
            Idle::Large(buffer) if (capacity..=capacity * 2).contains(&buffer.capacity) => {
                Some((buffer.capacity, at))
            }
            Idle::Large(_) | Idle::Slab(..) => None,
        };
        let best = self.idle.iter().enumerate().rev().filter_map(fits);
        let best = best.min_by_key(|(capacity, _)| *capacity);
        match best.and_then(|(_, at)| self.idle.remove(at)) {
            Some(Idle::Large(buffer)) => {
                self.idle_bytes -= buffer.capacity;
                buffer
            }
            Some(Idle::Slab(..)) | None => Buffer::of_own_pages(capacity),
        }
    }

    /// The first share of a slab was lent.
    fn is_in_use(&mut self, slab: *const Slab) {
        let is_it =
            |idle: &Idle| matches!(idle, Idle::Slab(_, known) if Arc::as_ptr(known) == slab);
        // A new one is not there.
        if let Some(at) = self.idle.iter().rposition(is_it) {
            self.idle.remove(at);
            self.idle_bytes -= SLAB_BYTES;
        }
    }

    /// Takes a buffer back.
    #[inline]
    pub(super) fn give(&mut self, buffer: Buffer) {
        let capacity = buffer.capacity;
        self.lent_bytes -= capacity;
        self.given = true;
        if let Home::Slab(slab) = &buffer.home {
            self.lent_share_bytes -= capacity;
            let is_idle = slab.lent.fetch_sub(1, Ordering::Relaxed) == 1;
            let class = class_of(capacity);
            if is_idle {
                self.slabs_in_use -= 1;
                self.idle_bytes += SLAB_BYTES;
                self.idle.push_back(Idle::Slab(class, Arc::clone(slab)));
            }
            self.free[class].push(buffer);
        } else if capacity > LARGEST_CLASS {
            if capacity <= self.keep_idle_bytes() {
                self.idle_bytes += capacity;
                self.idle.push_back(Idle::Large(buffer));
            }
        } else if self.free_small_bytes + capacity <= self.keep_small_bytes() {
            self.free_small_bytes += capacity;
            self.free[class_of(capacity)].push(buffer);
        }
        if self.idle_bytes > self.keep_idle_bytes() {
            self.give_up_idle();
        }
    }

    /// Takes a buffer back that was taken by [`Pool::take_to_receive`].
    pub(super) fn give_received(&mut self, buffer: Buffer) {
        self.receiving_bytes -= buffer.capacity;
        self.give(buffer);
    }

    /// Gives back to the system what has been idle for longest, until no more is kept than may be.
    #[cold]
    fn give_up_idle(&mut self) {
        while self.idle_bytes > self.keep_idle_bytes() {
            match self.idle.pop_front() {
                Some(Idle::Slab(class, slab)) => {
                    self.idle_bytes -= SLAB_BYTES;
                    let is_its = |buffer: &Buffer| matches!(&buffer.home, Home::Slab(home) if Arc::ptr_eq(home, &slab));
                    self.free[class].retain(|buffer| !is_its(buffer));
                }
                Some(Idle::Large(buffer)) => self.idle_bytes -= buffer.capacity,
                None => break,
            }
        }
    }

    /// Whether something came back that nobody has been told of.
    pub(super) fn has_given(&self) -> bool {
        self.given
    }

    /// As [`Pool::has_given`]; from now on somebody knows.
    pub(super) fn take_given(&mut self) -> bool {
        std::mem::take(&mut self.given)
    }

    /// Bytes of buffers not yet given back.
    pub(super) fn lent_bytes(&self) -> usize {
        self.lent_bytes
    }

    /// Of these, bytes that are not lent for what comes from clients' sockets: they come back when requests end.
    pub(super) fn working_bytes(&self) -> usize {
        self.lent_bytes - self.receiving_bytes
    }

    /// What counts against a limit of memory: the bytes lent or, where few shares hold many slabs, half of what is held
    /// for them, beyond a slab for each class. So requests that are let in by it hold about twice a limit at most, in
    /// whatever order buffers come back.
    pub(super) fn used_bytes(&self) -> usize {
        let held = self.lent_bytes - self.lent_share_bytes + self.slabs_in_use * SLAB_BYTES;
        self.lent_bytes.max(held.saturating_sub(SPARSE_BYTES) / 2)
    }

    /// Gives the free buffers back to the system. Shares of slabs that are in use are kept.
    pub(super) fn trim(&mut self) {
        self.idle.clear();
        self.idle_bytes = 0;
        for class in &mut self.free {
            class.retain(|buffer| {
                matches!(&buffer.home, Home::Slab(slab) if slab.lent.load(Ordering::Relaxed) > 0)
            });
        }
        self.free_small_bytes = 0;
    }
}

fn class_of(len: usize) -> usize {
    (len.max(1)
        .next_power_of_two()
        .trailing_zeros()
        .max(SMALLEST_SHIFT)
        - SMALLEST_SHIFT) as usize
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::*;

    /// Counts again what the pool counts as it goes.
    fn check(pool: &Pool, lent: &[Buffer]) {
        let capacity = |buffer: &Buffer| buffer.capacity;
        assert_eq!(pool.lent_bytes, lent.iter().map(capacity).sum::<usize>());
        let mut slabs: Vec<(*const Slab, u32)> = Vec::new();
        let mut small = 0;
        let free = pool.free.iter().flatten().map(|buffer| (buffer, 0));
        for (buffer, lends) in free.chain(lent.iter().map(|buffer| (buffer, 1))) {
            match &buffer.home {
                Home::Slab(slab) => {
                    let slab = Arc::as_ptr(slab);
                    match slabs.iter_mut().find(|known| known.0 == slab) {
                        Some(known) => known.1 += lends,
                        None => slabs.push((slab, lends)),
                    }
                }
                Home::Heap if lends == 0 => small += buffer.capacity,
                Home::Heap | Home::Own { .. } => {}
            }
        }
        let in_use = slabs.iter().filter(|known| known.1 > 0).count();
        assert_eq!(pool.slabs_in_use, in_use);
        assert_eq!(pool.free_small_bytes, small);
        let mut idle_slabs: Vec<_> = slabs.iter().filter(|known| known.1 == 0).collect();
        let mut idle = 0;
        for known in &pool.idle {
            match known {
                Idle::Slab(_, slab) => {
                    let at = idle_slabs.iter().position(|of| of.0 == Arc::as_ptr(slab));
                    idle_slabs.swap_remove(at.expect("its shares are free"));
                    idle += SLAB_BYTES;
                }
                Idle::Large(buffer) => idle += buffer.capacity,
            }
        }
        assert!(idle_slabs.is_empty());
        assert_eq!(pool.idle_bytes, idle);
        assert!(idle + small <= pool.keep_bytes);
    }

    fn slab_of(buffer: &Buffer) -> Weak<Slab> {
        match &buffer.home {
            Home::Slab(slab) => Arc::downgrade(slab),
            Home::Heap | Home::Own { .. } => panic!("a share"),
        }
    }

    #[test]
    fn buffers_come_back_and_the_figures_hold() {
        let mut pool = Pool::new(8 << 20);
        for (len, capacity) in [
            (0, 4096),
            (1, 4096),
            (4096, 4096),
            (4097, 8192),
            (1 << 20, 1 << 20),
            ((1 << 20) + 1, (1 << 20) + 4096),
            (2 << 20, 2 << 20),
        ] {
            let mut buffer = pool.take(len);
            assert_eq!(buffer.capacity(), capacity, "{len}");
            assert_eq!(buffer.at(0) as usize % BLOCK_BYTES, 0);
            assert_eq!(pool.lent_bytes(), capacity);
            buffer.put(capacity - 3, b"end");
            // SAFETY: just filled.
            assert_eq!(unsafe { buffer.bytes(capacity - 3, 3) }, b"end");
            check(&pool, std::slice::from_ref(&buffer));
            pool.give(buffer);
            check(&pool, &[]);
        }
        // The first three were one and the same, and a slab holds two of the largest class.
        let kept = SLAB_BYTES + (1 << 20) + 4096 + (2 << 20);
        assert_eq!(
            (pool.free_small_bytes, pool.idle_bytes),
            (4096 + 8192, kept)
        );
        let again = [pool.take(100), pool.take((1 << 20) + 1)];
        assert_eq!(pool.free_small_bytes, 8192);
        assert_eq!(pool.idle_bytes, kept - (1 << 20) - 4096);
        check(&pool, &again);
        again.into_iter().for_each(|buffer| pool.give(buffer));
        for len in [4096, 1 << 20, 3 << 20] {
            let many: Vec<_> = (0..(12 << 20) / len).map(|_| pool.take(len)).collect();
            check(&pool, &many);
            many.into_iter().for_each(|buffer| pool.give(buffer));
            check(&pool, &[]);
        }
        pool.trim();
        assert_eq!((pool.free_small_bytes, pool.idle_bytes), (0, 0));
        check(&pool, &[]);
    }

    #[test]
    fn what_comes_back_in_any_order_is_not_held_for_long() {
        let mut pool = Pool::new(6 << 20);
        let shares = SLAB_BYTES / SLAB_SHARE_BYTES;
        let mut lent: Vec<_> = (0..shares * 20)
            .map(|_| pool.take(SLAB_SHARE_BYTES))
            .collect();
        let slabs: Vec<_> = lent.iter().step_by(shares).map(slab_of).collect();
        let alive = || slabs.iter().filter(|slab| slab.strong_count() > 0).count();
        assert_eq!((alive(), pool.used_bytes()), (20, 40 << 20));
        // One of each slab stays, so that each slab does.
        for at in (0..lent.len()).rev().filter(|at| at % shares != 7) {
            pool.give(lent.remove(at));
        }
        check(&pool, &lent);
        assert_eq!((alive(), pool.idle_bytes), (20, 0));
        assert_eq!(pool.lent_bytes(), 20 * SLAB_SHARE_BYTES);
        // It counts as more than that, though, and what is taken next is a part of them.
        assert_eq!(pool.used_bytes(), ((40 << 20) - SPARSE_BYTES) / 2);
        lent.extend((0..20 * (shares - 1)).map(|_| pool.take(SLAB_SHARE_BYTES)));
        check(&pool, &lent);
        assert_eq!(pool.used_bytes(), 40 << 20);
        // When all comes back, in an order of its own, as much is kept as may be.
        while !lent.is_empty() {
            let at = lent.len() * 13 / 17;
            pool.give(lent.swap_remove(at));
            check(&pool, &lent);
        }
        assert_eq!((alive(), pool.idle_bytes), (2, 4 << 20));
        pool.trim();
        assert_eq!(alive(), 0);
    }

    #[test]
    fn what_was_used_last_is_kept() {
        let mut pool = Pool::new(8 << 20);
        // As much as is kept, of sizes that are not asked for any more.
        for (len, count) in [(4096, 2000), (1 << 20, 6), (2 << 20, 1)] {
            let many: Vec<_> = (0..count).map(|_| pool.take(len)).collect();
            many.into_iter().for_each(|buffer| pool.give(buffer));
            check(&pool, &[]);
        }
        for len in [64 << 10, 128 << 10, 3 << 20] {
            let first = pool.take(len);
            let address = first.at(0);
            pool.give(first);
            check(&pool, &[]);
            let again = pool.take(len);
            assert_eq!(again.at(0), address, "{len}");
            pool.give(again);
        }
    }

    #[test]
    fn large_buffers_are_used_again() {
        let mut pool = Pool::new(12 << 20);
        let first = pool.take(2 << 20);
        let address = first.at(0);
        pool.give(first);
        // Not for one that is much smaller or larger.
        let others = [pool.take(3 << 20), pool.take(LARGEST_CLASS - 1)];
        assert!(others.iter().all(|other| other.at(0) != address));
        let again = pool.take((2 << 20) - 4096);
        assert_eq!(again.at(0), address);
        pool.give(again);
        others.into_iter().for_each(|buffer| pool.give(buffer));
        check(&pool, &[]);
        // One that is larger than all that is kept is not kept.
        let huge = pool.take(32 << 20);
        pool.give(huge);
        check(&pool, &[]);
    }

    #[test]
    fn what_is_lent_for_receiving_is_told_apart() {
        let mut pool = Pool::new(0);
        let received = pool.take_to_receive(256 << 10);
        let other = pool.take(4096);
        assert_eq!(
            (pool.lent_bytes(), pool.working_bytes()),
            ((256 << 10) + 4096, 4096)
        );
        pool.give_received(received);
        assert_eq!((pool.lent_bytes(), pool.working_bytes()), (4096, 4096));
        pool.give(other);
        assert_eq!((pool.lent_bytes(), pool.working_bytes()), (0, 0));
        check(&pool, &[]);
    }
}
