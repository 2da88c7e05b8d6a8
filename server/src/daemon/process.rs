//! This process: what it uses, and what it asks of the kernel.

use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the process uses now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Memory that is resident, mapped tails included.
    pub resident_bytes: u64,
    /// Of it, pages of this process alone; the tails and the program itself are not among them.
    pub anonymous_bytes: u64,
    /// Processor time, user and system, of all threads.
    pub cpu: Duration,
    /// Open descriptors.
    pub open_files: u64,
}

/// Reads what the process uses.
pub(crate) fn usage() -> io::Result<Usage> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let open_files = std::fs::read_dir("/proc/self/fd")?.count() as u64;
    // SAFETY: an all-zero rusage is a valid value, and getrusage writes one.
    let used = unsafe {
        let mut used: libc::rusage = std::mem::zeroed();
        if libc::getrusage(libc::RUSAGE_SELF, &raw mut used) != 0 {
            return Err(io::Error::last_os_error());
        }
        used
    };
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
    };
    Ok(Usage {
        resident_bytes: status_bytes(&status, "VmRSS:"),
        anonymous_bytes: status_bytes(&status, "RssAnon:"),
        cpu: time(used.ru_utime) + time(used.ru_stime),
        open_files,
    })
}

/// A line of /proc/self/status such as `VmRSS:     5120 kB`; 0 when there is none.
fn status_bytes(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Raises the soft limit of open files to the hard one: a connection is a descriptor, and the default of 1024 is from
/// a time of select(2), which nothing here uses.
pub(super) fn raise_open_files_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::debug!(%error, "the limit of open files stays as it is");
        }
    }
}

/// Takes the bound off locked memory where this process may: under another user than root's, io_uring counts the tails that
/// it is given once for all as such, and a container has no other way to more than the 64 KiB or 8 MiB of its engine.
pub(super) fn raise_locked_memory_limit() {
    let limit = getrlimit(Resource::Memlock);
    let free = Rlimit {
        current: None,
        maximum: None,
    };
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Without CAP_SYS_RESOURCE the hard limit stays, as with units of systemd, which set LimitMEMLOCK.
    if let Err(error) =
        setrlimit(Resource::Memlock, free).or_else(|_| setrlimit(Resource::Memlock, raised))
    {
        tracing::debug!(%error, "the limit of locked memory stays as it is");
    }
}

/// From <linux/prctl.h>; the libc crate lacks it on this platform.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks this thread, and those it makes later, as serving block I/O: the kernel then never makes them wait for memory
/// that only a write to one of our own volumes could free (prctl(2), PR_SET_IO_FLUSHER).
pub(super) fn become_io_flusher() -> io::Result<()> {
    // SAFETY: takes integers only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Says how willingly the kernel ends this process when memory is short (proc(5), oom_score_adj).
pub(super) fn adjust_oom_score(score: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read() {
        let usage = usage().expect("usage");
        assert!(
            usage.resident_bytes > 1 << 20 && usage.open_files >= 3,
            "{usage:?}"
        );
        assert!(usage.anonymous_bytes <= usage.resident_bytes);
        assert_eq!(status_bytes("A: 1 kB\nVmRSS:\t  12 kB\n", "VmRSS:"), 12288);
        assert_eq!(status_bytes("", "VmRSS:"), 0);
    }
}
