//! Memory the kernel was shown once: writes from it need not have their pages looked up and held each time.

use std::io;

use io_uring::IoUring;

/// The kernel takes at most this much as one registered buffer.
const BUFFER_BYTES: usize = 1 << 30;

#[derive(Debug, Default)]
pub(super) struct Pinned {
    /// Begin and length of each registered buffer, in the order of their numbers.
    buffers: Vec<(usize, usize)>,
}

impl Pinned {
    /// Registers the pieces with the ring; once for a ring.
    ///
    /// # Safety
    /// The memory stays mapped as long as the ring exists.
    pub(super) unsafe fn register(
        ring: &IoUring,
        pieces: &[(*mut u8, usize)],
    ) -> io::Result<Pinned> {
        let buffers: Vec<(usize, usize)> = pieces
            .iter()
            .flat_map(|&(at, len)| {
                (0..len)
                    .step_by(BUFFER_BYTES)
                    .map(move |from| (at as usize + from, BUFFER_BYTES.min(len - from)))
            })
            .collect();
        let vectors: Vec<libc::iovec> = buffers
            .iter()
            .map(|&(at, len)| libc::iovec {
                iov_base: at as *mut _,
                iov_len: len,
            })
            .collect();
        if !vectors.is_empty() {
            // SAFETY: the caller's promise.
            unsafe { ring.submitter().register_buffers(&vectors)? };
        }
        Ok(Pinned { buffers })
    }

    /// The registered buffer that holds all of a range.
    #[inline]
    pub(super) fn find(&self, at: *const u8, len: usize) -> Option<u16> {
        let at = at as usize;
        let holds = |&(start, bytes): &(usize, usize)| {
            at.checked_sub(start)
                .is_some_and(|from| from + len <= bytes)
        };
        self.buffers
            .iter()
            .position(holds)
            .map(|index| index as u16)
    }
}
