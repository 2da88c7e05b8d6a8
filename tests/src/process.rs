//! Child processes that cannot outlive, outgrow or outwait their test.

use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

/// A child that leads a process group of its own. The whole group is killed when this is dropped.
pub struct Group {
    child: Child,
    name: String,
    status: Option<ExitStatus>,
}

impl Group {
    /// Spawns `command` as the leader of a new process group. It also dies when the thread that calls this ends, which
    /// covers a test binary that is itself killed: spawn from the thread that runs the test.
    pub fn spawn(command: &mut Command) -> io::Result<Group> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.process_group(0);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                    .map_err(io::Error::from)
            });
        }
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
        Ok(Group {
            child,
            name,
            status: None,
        })
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn rustix_pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends `signal` to the leader alone.
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_none() {
            kill_process(self.rustix_pid(), signal)
                .expect("a child that was not reaped can be signalled");
        }
    }

    /// Kills the whole group and reaps the leader.
    pub fn kill(&mut self) -> ExitStatus {
        if let Some(status) = self.exited() {
            // The leader is gone, others of its group may not be.
            let _ = kill_process_group(self.rustix_pid(), Signal::KILL);
            return status;
        }
        let _ = kill_process_group(self.rustix_pid(), Signal::KILL);
        let status = self.child.wait().expect("a child can be waited for");
        self.status = Some(status);
        status
    }

    /// How it ended, if it did.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child can be waited for");
        }
        self.status
    }

    /// Waits for the end, at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        if let Some(status) = self.exited() {
            return Some(status);
        }
        let deadline = Instant::now() + limit;
        let pidfd = pidfd_open(self.rustix_pid(), PidfdFlags::empty())
            .expect("a pidfd of a child (Linux 5.3)");
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return None,
                Ok(_) => return self.exited(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll on the pidfd of {}: {error}", self.name),
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Collects what a child writes, up to a limit; past it the child's group is killed. fio writes gigabytes of complaints
/// when its NBD server dies.
pub struct Collector {
    thread: JoinHandle<Vec<u8>>,
    total: Arc<AtomicU64>,
    overflow: Arc<AtomicBool>,
}

impl Collector {
    pub fn start(
        mut source: impl Read + Send + 'static,
        limit_bytes: u64,
        group_leader: u32,
    ) -> Collector {
        let overflow = Arc::new(AtomicBool::new(false));
        let flag = overflow.clone();
        let total = Arc::new(AtomicU64::new(0));
        let count_all = total.clone();
        let thread = std::thread::spawn(move || {
            let mut kept = Vec::new();
            let mut piece = vec![0; 1 << 16];
            loop {
                match source.read(&mut piece) {
                    Ok(0) => break,
                    Ok(count) => {
                        if count_all.fetch_add(count as u64, Ordering::Relaxed) + (count as u64)
                            <= limit_bytes
                        {
                            kept.extend_from_slice(&piece[..count]);
                        } else if !flag.swap(true, Ordering::Relaxed)
                            && let Some(pid) = Pid::from_raw(group_leader as i32)
                        {
                            let _ = kill_process_group(pid, Signal::KILL);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            kept
        });
        Collector {
            thread,
            total,
            overflow,
        }
    }

    /// Bytes that came so far.
    pub fn bytes(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// All that was kept, and whether the limit was passed.
    pub fn finish(self) -> (String, bool) {
        let bytes = self.thread.join().expect("the collector does not panic");
        (
            String::from_utf8_lossy(&bytes).into_owned(),
            self.overflow.load(Ordering::Relaxed),
        )
    }
}

/// What a process used of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Resident memory, bytes.
    pub resident_bytes: u64,
    /// Processor time of all its threads since it started.
    pub processor_time: Duration,
    /// Open file descriptors.
    pub descriptors: usize,
}

/// Reads /proc. Processor time comes from the process's clock, which counts in nanoseconds, and threads that have ended too.
pub fn usage(pid: u32) -> io::Result<Usage> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .ok_or(io::Error::other("no VmRSS"))?;
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    Ok(Usage {
        resident_bytes: kib * 1024,
        processor_time: processor_time(pid)?,
        descriptors,
    })
}

/// clock_getcpuclockid(3).
fn processor_time(pid: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: it is given a place for the clock's id.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it is given a place for the time.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Words for how a process ended.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".to_owned(),
    }
}
