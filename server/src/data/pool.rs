//! Block-aligned buffers, lent and taken back: no allocation on the path of an I/O once a size has been in use.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use ashlar_core::units::BLOCK_BYTES;

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
        }
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
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), Buffer::layout(self.capacity)) };
    }
}

/// Free buffers by size class, and how much is lent.
pub(super) struct Pool {
    free: [Vec<Buffer>; CLASSES],
    free_bytes: usize,
    /// Most bytes of free buffers kept.
    keep_bytes: usize,
    lent_bytes: usize,
}

impl Pool {
    pub(super) fn new(keep_bytes: usize) -> Pool {
        Pool {
            free: Default::default(),
            free_bytes: 0,
            keep_bytes,
            lent_bytes: 0,
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
                None => Buffer::new(1 << (SMALLEST_SHIFT as usize + class)),
            }
        } else {
            Buffer::new(len.next_multiple_of(BLOCK_BYTES))
        };
        self.lent_bytes += buffer.capacity;
        buffer
    }

    /// Takes a buffer back.
    #[inline]
    pub(super) fn give(&mut self, buffer: Buffer) {
        self.lent_bytes -= buffer.capacity;
        if buffer.capacity <= LARGEST_KEPT && self.free_bytes + buffer.capacity <= self.keep_bytes {
            self.free_bytes += buffer.capacity;
            self.free[class_of(buffer.capacity)].push(buffer);
        }
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
        // The last one was too large to keep, the first three were one and the same.
        assert_eq!(pool.free_bytes, 4096 + 8192 + (1 << 20));
        let again = pool.take(100);
        assert_eq!(pool.free_bytes, 8192 + (1 << 20));
        pool.give(again);
        let many: Vec<_> = (0..8).map(|_| pool.take(1 << 20)).collect();
        many.into_iter().for_each(|b| pool.give(b));
        assert!(pool.free_bytes <= 3 << 20);
        pool.trim();
        assert_eq!(pool.free_bytes, 0);
    }
}
