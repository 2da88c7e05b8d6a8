//! Making a ring.

use std::io;
use std::os::fd::RawFd;

use io_uring::IoUring;

/// Submission entries. One loop turn rarely queues more; what does not fit waits in `backlog`.
const SQ_ENTRIES: u32 = 512;
/// Completion entries: room for a turn's disk operations and a readiness event of every connection.
const CQ_ENTRIES: u32 = 4096;

/// A ring with the newest flags the kernel knows, what they are, and whether it shows waiting work in shared memory.
pub(super) fn build_ring() -> io::Result<(IoUring, &'static str, bool)> {
    let mut first_error = None;
    for (text, set_up) in [
        ("single issuer, deferred task work", 0),
        ("cooperative task work", 1),
        ("plain", 2),
    ] {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(CQ_ENTRIES).dontfork();
        match set_up {
            0 => {
                builder
                    .setup_submit_all()
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag();
            }
            1 => {
                builder
                    .setup_submit_all()
                    .setup_coop_taskrun()
                    .setup_taskrun_flag();
            }
            _ => {}
        }
        match builder.build(SQ_ENTRIES) {
            Ok(ring) => return Ok((ring, text, set_up < 2)),
            // Only "I do not know this flag" is worth another try.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => first_error = Some(e),
            Err(e) => return Err(e),
        }
    }
    Err(first_error.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

/// Registers the ring's descriptor with itself (5.18); `None` where that is unknown.
pub(super) fn register_ring(fd: RawFd) -> Option<u32> {
    const REGISTER_RING_FDS: u32 = 20;
    #[repr(C)]
    struct RsrcUpdate {
        offset: u32,
        reserved: u32,
        data: u64,
    }
    let mut update = RsrcUpdate {
        offset: u32::MAX,
        reserved: 0,
        data: fd as u64,
    };
    // SAFETY: `update` is a valid io_uring_rsrc_update that outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd,
            REGISTER_RING_FDS,
            &raw mut update,
            1,
        )
    };
    (result == 1).then_some(update.offset)
}
