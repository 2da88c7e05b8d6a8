//! Memory that can lie in large pages: a disk takes a long write from one in a few pieces instead of one for each 4 KiB.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// A large page of x86-64 and of arm64 with 4 KiB pages. Elsewhere nothing is asked for in vain but one call.
pub(crate) const LARGE_PAGE_BYTES: usize = 2 << 20;
/// Gathers a range into large pages now, whatever the system's settings (Linux 6.1).
const MADV_COLLAPSE: libc::c_int = 25;

/// A shared mapping, readable and writable, that begins at a multiple of [`LARGE_PAGE_BYTES`].
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping owns its range of addresses and hands out references only through `&self` and `&mut self`.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a file and touches them all.
    ///
    /// # Safety
    /// Nobody else writes to the file or truncates it while the mapping exists.
    pub(crate) unsafe fn of(file: &File, len: usize) -> io::Result<Mapping> {
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a range that nothing refers to is mapped over, as large as the one that was taken.
        unsafe {
            let start = take_addresses(taken_bytes(len), libc::PROT_NONE)?;
            let mapped = libc::mmap(
                start.as_ptr().cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            );
            if mapped == libc::MAP_FAILED {
                let error = io::Error::last_os_error();
                libc::munmap(start.as_ptr().cast(), taken_bytes(len));
                return Err(error);
            }
            Ok(Mapping { start, len })
        }
    }

    /// Has the kernel put what it holds into large pages. An error changes nothing but the speed.
    pub(crate) fn use_large_pages(&mut self) -> io::Result<()> {
        let whole = self.len / LARGE_PAGE_BYTES * LARGE_PAGE_BYTES;
        // SAFETY: inside the mapping; its contents stay what they are.
        if unsafe { libc::madvise(self.start.as_ptr().cast(), whole, MADV_COLLAPSE) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// Takes a range of addresses that begins at a multiple of [`LARGE_PAGE_BYTES`]. No memory is behind them yet.
fn take_addresses(len: usize, access: libc::c_int) -> io::Result<NonNull<u8>> {
    // More than that, so that an aligned range can be chosen among them.
    let reserved = len + LARGE_PAGE_BYTES;
    // SAFETY: a new range, which nothing refers to; its ends are given back.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            reserved,
            access,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = at.align_offset(LARGE_PAGE_BYTES);
        let start = at.byte_add(before);
        let end = start.byte_add(len);
        if before > 0 {
            libc::munmap(at, before);
        }
        if before < LARGE_PAGE_BYTES {
            libc::munmap(end, LARGE_PAGE_BYTES - before);
        }
        NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory.into())
    }
}

/// Memory of nobody else, zeroed, that begins at a multiple of [`LARGE_PAGE_BYTES`] and goes back to the system when it
/// is dropped. An allocator would keep it, or put something small behind it and lose the room up to the next multiple.
#[derive(Debug)]
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: pages are reached by address only, which is up to whoever does it.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    pub(crate) fn new(len: usize) -> io::Result<Pages> {
        let start = take_addresses(taken_bytes(len), libc::PROT_READ | libc::PROT_WRITE)?;
        // Without large pages it is memory like any other.
        // SAFETY: the range just taken.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Pages { start, len })
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: taken by `new`; nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), taken_bytes(self.len)) };
    }
}

/// The addresses that a mapping takes: whole pages of whatever size the system has.
fn taken_bytes(len: usize) -> usize {
    len.next_multiple_of(64 << 10)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`; nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), taken_bytes(self.len)) };
    }
}

impl std::ops::Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` mapped bytes; the file is nobody else's, as promised to `of`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the reference unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
