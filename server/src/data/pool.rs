//! Block-aligned buffers, lent and taken back: no allocation on the path of an I/O once a size has been in use.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use ashlar_core::units::BLOCK_BYTES;

use crate::mapping::LARGE_PAGE_BYTES;

/// Smallest and largest size class that is kept: 4 KiB to 1 MiB by doublings. Larger buffers are rare (a client that
/// sends requests of many MiB) and go back to the allocator.
const SMALLEST_SHIFT: u32 = 12;
const CLASSES: usize = 9;
const LARGEST_KEPT: usize = 1 << (SMALLEST_SHIFT as usize + CLASSES - 1);

/// Memory of at least the size asked for, aligned to a block. Its contents are whatever was there before, so it is
/// handed about by address; [`Buffer::bytes`] is for what is known to have been filled.
pub(super) struct Buffer {
    start: NonNull<u8>,
    capacity: usize,
    /// What it is a part of; `None` when it is an allocation of its own.
    slab: Option<Arc<Slab>>,
}

/// Buffers from here on are cut from slabs: a disk takes each page that lies apart as a piece of its own, and virtual
/// disks take few pieces at a time.
const SLAB_SHARE_BYTES: usize = 64 << 10;
/// Of the size and alignment of a large page.
const SLAB: Layout = match Layout::from_size_align(LARGE_PAGE_BYTES, LARGE_PAGE_BYTES) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two"),
};

/// Memory of which several buffers are parts.
struct Slab(NonNull<u8>);

// SAFETY: a slab owns its memory, which is reached only through buffers whose ranges do not overlap.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    fn new() -> Slab {
        // SAFETY: the layout has a size.
        let start = unsafe { alloc(SLAB) };
        let slab = Slab(NonNull::new(start).unwrap_or_else(|| handle_alloc_error(SLAB)));
        // Without large pages it is memory like any other.
        // SAFETY: the memory just allocated, whose contents do not matter.
        unsafe { libc::madvise(start.cast(), SLAB.size(), libc::MADV_HUGEPAGE) };
        slab
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.0.as_ptr(), SLAB) };
    }
}

// SAFETY: a buffer owns its memory.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(capacity: usize) -> Buffer {
        let layout = Buffer::layout(capacity);
        // SAFETY: the layout has a size: capacities are positive multiples of a block.
        let start = unsafe { alloc(layout) };
        Buffer {
            start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)),
            capacity,
            slab: None,
        }
    }

    /// Buffers of `capacity`, a power of two, that together make up a slab.
    fn share_slab(capacity: usize) -> impl Iterator<Item = Buffer> {
        let slab = Arc::new(Slab::new());
        (0..SLAB.size()).step_by(capacity).map(move |at| Buffer {
            // SAFETY: inside the slab.
            start: unsafe { slab.0.add(at) },
            capacity,
            slab: Some(Arc::clone(&slab)),
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
        if self.slab.is_none() {
            // SAFETY: allocated by `new` with this layout.
            unsafe { dealloc(self.start.as_ptr(), Buffer::layout(self.capacity)) };
        }
    }
}

/// Free buffers by size class, and how much is lent.
pub(super) struct Pool {
    free: [Vec<Buffer>; CLASSES],
    free_bytes: usize,
    /// Most bytes of free buffers kept.
    keep_bytes: usize,
    lent_bytes: usize,
    /// Something came back since [`Pool::take_given`] was asked.
    given: bool,
}

impl Pool {
    pub(super) fn new(keep_bytes: usize) -> Pool {
        Pool {
            free: Default::default(),
            free_bytes: 0,
            keep_bytes,
            lent_bytes: 0,
            given: false,
        }
    }

    /// A buffer of at least `len` bytes (0 counts as 1).
    #[inline]
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let buffer = if len <= LARGEST_KEPT {
            let class = class_of(len);
            match self.free[class].pop() {
                Some(buffer) => {
                    self.free_bytes -= buffer.capacity;
                    buffer
                }
                None => self.make(class),
            }
        } else {
            Buffer::new(len.next_multiple_of(BLOCK_BYTES))
        };
        self.lent_bytes += buffer.capacity;
        buffer
    }

    /// A new buffer of a class. Those that share its slab are free from now on, beyond what is kept if need be: they
    /// cost nothing while the one is in use.
    fn make(&mut self, class: usize) -> Buffer {
        let capacity = 1 << (SMALLEST_SHIFT as usize + class);
        if capacity < SLAB_SHARE_BYTES {
            return Buffer::new(capacity);
        }
        let mut buffers = Buffer::share_slab(capacity);
        let first = buffers.next().expect("a slab holds at least one");
        for buffer in buffers {
            self.free_bytes += capacity;
            self.free[class].push(buffer);
        }
        first
    }

    /// Takes a buffer back.
    #[inline]
    pub(super) fn give(&mut self, buffer: Buffer) {
        self.lent_bytes -= buffer.capacity;
        self.given = true;
        if buffer.capacity <= LARGEST_KEPT && self.free_bytes + buffer.capacity <= self.keep_bytes {
            self.free_bytes += buffer.capacity;
            self.free[class_of(buffer.capacity)].push(buffer);
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

    /// Gives the free buffers back to the allocator.
    pub(super) fn trim(&mut self) {
        for class in &mut self.free {
            class.clear();
        }
        self.free_bytes = 0;
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
    use super::*;

    #[test]
    fn buffers_come_back_and_the_figures_hold() {
        let mut pool = Pool::new(3 << 20);
        for (len, capacity) in [
            (0, 4096),
            (1, 4096),
            (4096, 4096),
            (4097, 8192),
            (1 << 20, 1 << 20),
            ((1 << 20) + 1, (1 << 20) + 4096),
        ] {
            let mut buffer = pool.take(len);
            assert_eq!(buffer.capacity(), capacity, "{len}");
            assert_eq!(buffer.at(0) as usize % BLOCK_BYTES, 0);
            assert_eq!(pool.lent_bytes(), capacity);
            buffer.put(capacity - 3, b"end");
            // SAFETY: just filled.
            assert_eq!(unsafe { buffer.bytes(capacity - 3, 3) }, b"end");
            pool.give(buffer);
        }
        assert_eq!(pool.lent_bytes(), 0);
        // The last one was too large to keep, the first three were one and the same, and a slab holds two of the largest.
        assert_eq!(pool.free_bytes, 4096 + 8192 + (2 << 20));
        let again = pool.take(100);
        assert_eq!(pool.free_bytes, 8192 + (2 << 20));
        pool.give(again);
        let many: Vec<_> = (0..8).map(|_| pool.take(1 << 20)).collect();
        many.into_iter().for_each(|b| pool.give(b));
        assert!(pool.free_bytes <= 3 << 20);
        pool.trim();
        assert_eq!(pool.free_bytes, 0);
    }
}
