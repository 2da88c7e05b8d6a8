//! The io_uring engine: one ring for disk operations, socket readiness and the mailbox.

mod disk;
mod setup;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use memmap2::MmapMut;

use disk::{InFlight, Link, Step};
use setup::{build_ring, register_ring};

use super::durable::{Durable, Way};
use super::pinned::Pinned;
use super::{DiskOp, Engine, Event, FileId, Tag, Waker, WatchId, ZERO_BYTES, calls, file};

/// Longest durable write that a thread does itself.
const HERE_BYTES: usize = 64 << 10;

/// What the thread itself copies to and from files in memory between two waits, some hundred microseconds' work.
const AT_ONCE_BYTES: usize = 1 << 20;
/// Longest write of that kind unless it is durable: for others nobody waits, and a worker copies them on another processor.
const AT_ONCE_WRITE_BYTES: usize = 128 << 10;

const KIND_DISK: u64 = 0;
const KIND_READABLE: u64 = 1;
const KIND_WRITABLE: u64 = 2;
const KIND_MAILBOX: u64 = 3;
/// The removal of a readability poll, with its generation and slot.
const KIND_UNWATCHED: u64 = 4;
const KIND_IGNORED: u64 = 5;

/// `user_data` is kind (4 bits), generation (28 bits), slot (32 bits).
fn user_data(kind: u64, generation: u32, slot: u32) -> u64 {
    (kind << 60) | (u64::from(generation & GENERATION_MASK) << 32) | u64::from(slot)
}

const GENERATION_MASK: u32 = (1 << 28) - 1;

const POLL_INPUT: u32 = (libc::POLLIN | libc::POLLRDHUP) as u32;
const POLL_OUTPUT: u32 = libc::POLLOUT as u32;

struct File {
    fd: Arc<OwnedFd>,
    in_memory: bool,
}

impl File {
    /// The bytes to copy if an operation is better carried out when it is submitted. With a file in memory there is no device
    /// to wait for; but its file system does not tell the ring so, which has a worker thread do every one of them.
    fn copied_at_once(&self, op: &DiskOp) -> Option<usize> {
        if !self.in_memory {
            return None;
        }
        match *op {
            DiskOp::Write { len, durable, .. } => {
                (durable || len <= AT_ONCE_WRITE_BYTES).then_some(len)
            }
            DiskOp::Read { len, .. } => Some(len),
            DiskOp::Sync { .. } => Some(0),
            DiskOp::Allocate { .. } => None,
        }
    }
}

struct Watch {
    fd: RawFd,
    token: u32,
    generation: u32,
    /// A one-shot writability poll is armed.
    writable_armed: bool,
    /// Its last poll ended with an error.
    poll_failed: bool,
}

/// See the module text. Flags are probed when opened: single issuer with deferred task work where the kernel has it
/// (6.1), else cooperative task work (5.19), else plain.
pub struct UringEngine {
    ring: IoUring,
    /// Index of the ring's own descriptor in the registered table, sparing a descriptor lookup per call.
    registered_ring: Option<u32>,
    flags_text: &'static str,
    /// The kernel shows in shared memory that completions wait for the next call.
    tells_of_work: bool,
    durable: Durable,
    pinned: Pinned,
    files: Vec<File>,
    ops: slab::Slab<InFlight>,
    /// Operations carried out when they were submitted.
    ended: Vec<Event>,
    /// Of `AT_ONCE_BYTES`.
    at_once_left: usize,
    /// A durable write that the calling thread does when it has nothing else to do.
    here: Option<usize>,
    may_sleep_at_work: bool,
    watches: slab::Slab<Watch>,
    next_generation: u32,
    /// Entries that found the submission queue full, oldest first.
    backlog: VecDeque<squeue::Entry>,
    waker: Waker,
    /// Never written to, so the kernel backs all of it with its shared zero page.
    zeros: MmapMut,
}

impl UringEngine {
    /// Sets a ring up and proves that it works by reading from a file through it.
    pub fn open() -> io::Result<UringEngine> {
        let (ring, flags_text, tells_of_work) = build_ring()?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's io_uring is older than 5.11",
            ));
        }
        let registered_ring = register_ring(ring.as_raw_fd());
        let mut engine = UringEngine {
            ring,
            registered_ring,
            flags_text,
            tells_of_work,
            durable: Durable::default(),
            pinned: Pinned::default(),
            files: Vec::new(),
            ops: slab::Slab::with_capacity(256),
            ended: Vec::new(),
            at_once_left: AT_ONCE_BYTES,
            here: None,
            may_sleep_at_work: true,
            watches: slab::Slab::new(),
            next_generation: 1,
            backlog: VecDeque::new(),
            waker: Waker::new()?,
            zeros: MmapMut::map_anon(ZERO_BYTES)?,
        };
        engine.probe()?;
        engine.arm_mailbox();
        Ok(engine)
    }

    /// The set-up flags in force, for the log.
    pub fn flags_text(&self) -> &'static str {
        self.flags_text
    }

    fn probe(&mut self) -> io::Result<()> {
        let file = self.add_file(Arc::new(OwnedFd::from(fs::File::open("/proc/self/stat")?)))?;
        let mut buf = [0u8; 16];
        // SAFETY: `buf` outlives the wait below, which ends only with the operation's completion.
        unsafe {
            self.submit(
                0,
                DiskOp::Read {
                    file,
                    offset: 0,
                    data: buf.as_mut_ptr(),
                    len: buf.len(),
                },
            )
        };
        let mut events = Vec::new();
        while events.is_empty() {
            self.wait(None, &mut events)?;
        }
        self.files.clear();
        match events[0] {
            Event::Disk { result: Ok(n), .. } if n > 0 => Ok(()),
            Event::Disk { result: Err(e), .. } => Err(io::Error::from(e)),
            _ => Err(io::Error::other(
                "a probing read through the ring returned nothing",
            )),
        }
    }

    fn arm_mailbox(&mut self) {
        let fd = types::Fd(self.waker.raw_fd());
        let entry = opcode::PollAdd::new(fd, POLL_INPUT).multi(true).build();
        self.push(entry.user_data(user_data(KIND_MAILBOX, 0, 0)));
    }

    fn arm_readable(&mut self, slot: u32) {
        let watch = &self.watches[slot as usize];
        let entry = opcode::PollAdd::new(types::Fd(watch.fd), POLL_INPUT)
            .multi(true)
            .build();
        let data = user_data(KIND_READABLE, watch.generation, slot);
        self.push(entry.user_data(data));
    }

    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: whatever memory the entry names is kept valid by the contract of `submit`, or is owned by self.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Whether two entries would go into one submission: a link does not reach into the next.
    fn has_room_for_two(&mut self) -> bool {
        let queue = self.ring.submission();
        self.backlog.is_empty() && queue.capacity() - queue.len() >= 2
    }

    fn drain_backlog(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// Gives what was to be done by the calling thread to the kernel: it is not alone any more.
    fn hand_over(&mut self) {
        if let Some(slot) = self.here.take() {
            if let Some((way, _)) = &mut self.ops[slot].durable {
                *way = Way::Linked;
            }
            self.push_step(slot);
        }
    }

    fn on_completion(&mut self, entry: &cqueue::Entry, out: &mut Vec<Event>) {
        let data = entry.user_data();
        let slot = data as u32;
        let generation = (data >> 32) as u32 & GENERATION_MASK;
        match data >> 60 {
            KIND_DISK => self.on_disk(slot as usize, entry.result(), out),
            KIND_READABLE => {
                let Some(watch) = self.watches.get_mut(slot as usize) else {
                    return;
                };
                if watch.generation != generation {
                    return;
                }
                let result = entry.result();
                let failed_again = result < 0 && watch.poll_failed;
                watch.poll_failed = result < 0;
                if result < 0 {
                    let error = io::Error::from_raw_os_error(-result);
                    tracing::warn!(%error, again = failed_again, "the poll of a socket ended");
                }
                if failed_again {
                    // Nobody would hear of this socket any more: it ends, and whoever reads it sees that.
                    // SAFETY: the descriptor is open as long as it is watched.
                    let socket = unsafe { BorrowedFd::borrow_raw(watch.fd) };
                    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
                }
                let hangs_up = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
                out.push(Event::Readable {
                    token: watch.token,
                    hang_up: failed_again || (result >= 0 && result & i32::from(hangs_up) != 0),
                });
                // A multishot poll ends by itself when completions overflowed; arming anew reports the present state.
                if !cqueue::more(entry.flags()) && !failed_again {
                    self.arm_readable(slot);
                }
            }
            KIND_WRITABLE => {
                let Some(watch) = self.watches.get_mut(slot as usize) else {
                    return;
                };
                if watch.generation != generation {
                    return;
                }
                watch.writable_armed = false;
                out.push(Event::Writable { token: watch.token });
            }
            KIND_MAILBOX => {
                self.waker.take();
                out.push(Event::Mailbox);
                if !cqueue::more(entry.flags()) {
                    self.arm_mailbox();
                }
            }
            // The poll was just being run for an event: it was not removed and stays armed, holding the socket.
            KIND_UNWATCHED if entry.result() == -libc::EALREADY => {
                self.remove_readable(generation, slot);
            }
            _ => {}
        }
    }

    fn remove_readable(&mut self, generation: u32, slot: u32) {
        let entry = opcode::PollRemove::new(user_data(KIND_READABLE, generation, slot)).build();
        self.push(entry.user_data(user_data(KIND_UNWATCHED, generation, slot)));
    }

    /// Takes every completion that is there.
    fn reap(&mut self, out: &mut Vec<Event>) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            self.on_completion(&entry, out);
        }
    }

    /// One `io_uring_enter`: submits everything queued and waits for `want` completions or the deadline.
    fn enter(&mut self, want: u32, deadline: Option<Instant>) -> io::Result<()> {
        const ENTER_GETEVENTS: u32 = 1;
        const ENTER_EXT_ARG: u32 = 8;
        const ENTER_REGISTERED_RING: u32 = 16;
        #[repr(C)]
        struct GetEventsArg {
            sigmask: u64,
            sigmask_bytes: u32,
            min_wait_us: u32,
            timespec: u64,
        }
        let queued = self.ring.submission().len() as u32;
        let timespec;
        let mut arg = GetEventsArg {
            sigmask: 0,
            sigmask_bytes: 0,
            min_wait_us: 0,
            timespec: 0,
        };
        if want > 0
            && let Some(deadline) = deadline
        {
            let left = deadline.saturating_duration_since(Instant::now());
            timespec = libc::timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            arg.timespec = &raw const timespec as u64;
        }
        let (fd, registered) = match self.registered_ring {
            Some(index) => (index as i32, ENTER_REGISTERED_RING),
            None => (self.ring.as_raw_fd(), 0),
        };
        // SAFETY: `arg` and the timespec it points to live until the call returns; queued entries obey `submit`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                fd,
                queued,
                want,
                ENTER_GETEVENTS | ENTER_EXT_ARG | registered,
                &raw const arg,
                size_of::<GetEventsArg>(),
            )
        };
        if result >= 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Engine for UringEngine {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn take_ended(&mut self, out: &mut Vec<Event>) {
        out.append(&mut self.ended);
    }

    fn work_here(&mut self, out: &mut Vec<Event>) -> io::Result<()> {
        if !self.ended.is_empty() {
            return self.wait(Some(Instant::now()), out);
        }
        if self.ops.len() != 1 {
            self.hand_over();
        }
        let Some(slot) = self.here.take() else {
            return Ok(());
        };
        let op = &self.ops[slot];
        let DiskOp::Write {
            offset, data, len, ..
        } = op.op
        else {
            unreachable!("only writes are done here");
        };
        let piece = libc::iovec {
            iov_base: data.cast_mut().cast(),
            iov_len: len,
        };
        let fd = self.files[op.op.file().0 as usize].fd.as_raw_fd();
        // SAFETY: the contract of `submit`: the memory stays as it is until the operation was reported.
        let result =
            unsafe { libc::pwritev2(fd, &raw const piece, 1, offset as i64, libc::RWF_DSYNC) };
        let result = if result >= 0 {
            result as i32
        } else {
            -io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO)
        };
        self.on_disk(slot, result, out);
        // What came meanwhile is known in the same turn.
        let begun = Instant::now();
        self.wait(Some(begun), out)
    }

    fn may_sleep_at_work(&mut self, may: bool) {
        self.may_sleep_at_work = may;
    }

    fn begin_queued(&mut self) {
        if !self.ring.submission().is_empty() {
            // What cannot be submitted now is with the next wait, which reports what is wrong.
            let _ = self.ring.submit();
        }
    }

    fn add_file(&mut self, file: Arc<OwnedFd>) -> io::Result<FileId> {
        // What cannot be found out is taken for a disk.
        let in_memory = file::is_in_memory(&file).unwrap_or(false);
        self.files.push(File {
            fd: file,
            in_memory,
        });
        Ok(FileId((self.files.len() - 1) as u32))
    }

    unsafe fn pin(&mut self, pieces: &[(*mut u8, usize)]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        self.pinned = unsafe { Pinned::register(&self.ring, pieces)? };
        Ok(())
    }

    unsafe fn submit(&mut self, tag: Tag, op: DiskOp) {
        let file = &self.files[op.file().0 as usize];
        if let Some(bytes) = file.copied_at_once(&op)
            && let Some(left) = self.at_once_left.checked_sub(bytes)
        {
            self.at_once_left = left;
            // SAFETY: the contract of `submit`.
            let result = unsafe { calls::carry_out(&file.fd, op) };
            self.ended.push(Event::Disk { tag, result });
            return;
        }
        let step = match op {
            DiskOp::Write { .. } | DiskOp::Read { .. } => Step::Transfer,
            DiskOp::Sync { .. } => Step::Sync,
            DiskOp::Allocate { .. } => Step::Fallocate,
        };
        let durable = matches!(op, DiskOp::Write { durable: true, .. }).then(|| {
            let small = matches!(op, DiskOp::Write { len, .. } if len <= HERE_BYTES);
            let alone =
                small && self.may_sleep_at_work && self.ops.is_empty() && self.watches.len() == 1;
            (self.durable.choose(op.file(), alone), Instant::now())
        });
        let here = matches!(durable, Some((Way::Here, _)));
        let slot = self.ops.insert(InFlight {
            tag,
            op,
            done: 0,
            step,
            link: Link::None,
            durable,
        });
        if here {
            self.here = Some(slot);
        } else {
            self.push_step(slot);
        }
    }

    fn watch(&mut self, fd: RawFd, token: u32) -> io::Result<WatchId> {
        let generation = self.next_generation;
        self.next_generation = (self.next_generation + 1) & GENERATION_MASK;
        let slot = self.watches.insert(Watch {
            fd,
            generation,
            token,
            writable_armed: false,
            poll_failed: false,
        }) as u32;
        self.arm_readable(slot);
        Ok(WatchId { slot, generation })
    }

    fn watch_writable(&mut self, id: WatchId) {
        let Some(watch) = self.watches.get_mut(id.slot as usize) else {
            return;
        };
        if watch.generation != id.generation || watch.writable_armed {
            return;
        }
        watch.writable_armed = true;
        let entry = opcode::PollAdd::new(types::Fd(watch.fd), POLL_OUTPUT).build();
        self.push(entry.user_data(user_data(KIND_WRITABLE, id.generation, id.slot)));
    }

    fn unwatch(&mut self, id: WatchId) {
        let Some(watch) = self.watches.get(id.slot as usize) else {
            return;
        };
        if watch.generation != id.generation {
            return;
        }
        let writable = watch.writable_armed;
        self.watches.remove(id.slot as usize);
        // The polls hold a reference to the socket; until they are removed the peer would not see it closed.
        self.remove_readable(id.generation, id.slot);
        if writable {
            self.push(
                opcode::PollRemove::new(user_data(KIND_WRITABLE, id.generation, id.slot))
                    .build()
                    .user_data(user_data(KIND_IGNORED, 0, 0)),
            );
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn may_have_events(&mut self) -> bool {
        !self.ended.is_empty()
            || !self.tells_of_work
            || self.ring.submission().taskrun()
            || !self.ring.completion().is_empty()
    }

    fn wait(&mut self, deadline: Option<Instant>, out: &mut Vec<Event>) -> io::Result<()> {
        let before = out.len();
        self.take_ended(out);
        self.at_once_left = AT_ONCE_BYTES;
        self.hand_over();
        loop {
            self.drain_backlog();
            let passed = out.len() > before || deadline.is_some_and(|at| at <= Instant::now());
            let ready = !self.ring.completion().is_empty();
            let want = u32::from(!passed && !ready && self.backlog.is_empty());
            match self.enter(want, deadline) {
                Ok(()) => {}
                Err(e) => match e.raw_os_error() {
                    // Overflowed completions must be taken before more can be submitted; the rest are ordinary ends.
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(e),
                },
            }
            self.reap(out);
            if out.len() > before || (passed && self.backlog.is_empty()) {
                return Ok(());
            }
        }
    }
}

impl Drop for UringEngine {
    /// Waits for the disk operations in flight: their memory belongs to the caller.
    fn drop(&mut self) {
        let mut events = Vec::new();
        while !self.ops.is_empty() {
            if let Err(e) = self.wait(None, &mut events) {
                tracing::error!(error = %e, "the ring failed with disk operations in flight");
                // Returning would free memory that the kernel may still write to.
                std::process::abort();
            }
            events.clear();
        }
    }
}
