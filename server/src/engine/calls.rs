//! Disk operations by system calls that block the calling thread.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use memmap2::MmapMut;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{DiskOp, ZERO_BYTES};

/// Carries an operation out from its beginning to its end: what its completion is to report.
///
/// # Safety
/// The memory of a Read or Write is valid for its length and nobody else's until this returns.
pub(super) unsafe fn carry_out(file: &OwnedFd, op: DiskOp) -> Result<u32, Errno> {
    let fd = file.as_raw_fd();
    match op {
        DiskOp::Write {
            offset,
            data,
            len,
            durable,
            ..
        } => write_all(fd, data, len, offset, durable).map(|()| len as u32),
        DiskOp::Read {
            offset, data, len, ..
        } => {
            let mut done = 0;
            while done < len {
                // SAFETY: the caller's buffer holds `len` bytes and is ours.
                let n = unsafe {
                    libc::pread64(
                        fd,
                        data.add(done).cast(),
                        len - done,
                        (offset + done as u64) as i64,
                    )
                };
                match check(n)? {
                    Some(0) => break,
                    Some(n) => done += n,
                    None => {}
                }
            }
            Ok(done as u32)
        }
        DiskOp::Sync { .. } => sync(file).map(|()| 0),
        DiskOp::Allocate { offset, len, .. } => allocate(file, offset, len).map(|()| 0),
    }
}

fn sync(fd: &OwnedFd) -> Result<(), Errno> {
    // Not repeated on an error: after a failed sync the next one says nothing about the data that failed.
    rustix::fs::fdatasync(fd)
}

fn allocate(fd: &OwnedFd, offset: u64, len: u64) -> Result<(), Errno> {
    let fallocate = || rustix::fs::fallocate(fd, FallocateFlags::empty(), offset, len);
    match rustix::io::retry_on_intr(fallocate) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::INVAL) => {}
        Err(e) => return Err(e),
    }
    let zeros = MmapMut::map_anon(ZERO_BYTES).map_err(|_| Errno::NOMEM)?;
    let mut done = 0;
    while done < len {
        let part = (len - done).min(ZERO_BYTES as u64) as usize;
        write_all(fd.as_raw_fd(), zeros.as_ptr(), part, offset + done, false)?;
        done += part as u64;
    }
    // Nothing that it says is about this range alone.
    sync(fd).map_err(|_| Errno::IO)
}

fn write_all(
    fd: RawFd,
    data: *const u8,
    len: usize,
    offset: u64,
    durable: bool,
) -> Result<(), Errno> {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    let mut done = 0;
    while done < len {
        // SAFETY: `data` holds `len` bytes (contract of `carry_out`, or the zeros above).
        let n = unsafe {
            let part = libc::iovec {
                iov_base: data.add(done).cast_mut().cast(),
                iov_len: len - done,
            };
            libc::pwritev2(fd, &raw const part, 1, (offset + done as u64) as i64, flags)
        };
        match check(n)? {
            Some(0) => return Err(Errno::IO),
            Some(n) => done += n,
            None => {}
        }
    }
    Ok(())
}

/// `None`: interrupted, do it again.
fn check(result: isize) -> Result<Option<usize>, Errno> {
    if result >= 0 {
        return Ok(Some(result as usize));
    }
    match Errno::from_io_error(&io::Error::last_os_error()) {
        Some(Errno::INTR) => Ok(None),
        Some(e) => Err(e),
        None => Err(Errno::IO),
    }
}
