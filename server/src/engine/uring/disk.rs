//! Disk operations, which may take several entries each.

use std::os::fd::AsRawFd;
use std::time::Instant;

use io_uring::{opcode, squeue, types};
use rustix::io::Errno;

use super::{KIND_DISK, UringEngine, user_data};
use crate::engine::durable::Way;
use crate::engine::{DiskOp, Event, Tag, ZERO_BYTES};

/// Most bytes of one read or write entry. The kernel stops at 2 GiB less a page; operations beyond this go in parts.
const MAX_TRANSFER_BYTES: usize = 1 << 30;

/// An operation that was submitted and not reported.
pub(super) struct InFlight {
    pub(super) tag: Tag,
    pub(super) op: DiskOp,
    /// Bytes moved so far; for Allocate, bytes zeroed.
    pub(super) done: u64,
    pub(super) step: Step,
    pub(super) link: Link,
    /// How a durable write goes, and since when.
    pub(super) durable: Option<(Way, Instant)>,
}

/// A durable write and the data sync linked behind it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    None,
    /// Both are queued; the write ends first.
    Queued,
    /// The write ended with this and took the sync along, which is yet to say so.
    Broken(i32),
}

/// What of an operation is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Transfer,
    Fallocate,
    Zero,
    Sync,
}

impl UringEngine {
    /// Queues the next piece of an operation.
    pub(super) fn push_step(&mut self, slot: usize) {
        let op = &self.ops[slot];
        let fd = types::Fd(self.files[op.op.file().0 as usize].fd.as_raw_fd());
        let done = op.done;
        let entry = match (op.step, op.op) {
            (
                Step::Transfer,
                DiskOp::Write {
                    offset, data, len, ..
                },
            ) => {
                let part = (len - done as usize).min(MAX_TRANSFER_BYTES);
                // SAFETY: `done < len`, so the address stays inside the caller's buffer.
                let at = unsafe { data.add(done as usize) };
                let way = op.durable.map(|(way, _)| way);
                let flags = match way {
                    Some(Way::Flagged | Way::Here) => libc::RWF_DSYNC,
                    _ => 0,
                };
                let write = match self.pinned.find(at, part) {
                    Some(buffer) => opcode::WriteFixed::new(fd, at, part as u32, buffer)
                        .offset(offset + done)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Write::new(fd, at, part as u32)
                        .offset(offset + done)
                        .rw_flags(flags)
                        .build(),
                };
                let linked = way == Some(Way::Linked) && done as usize + part == len;
                if linked && self.has_room_for_two() {
                    let data = user_data(KIND_DISK, 0, slot as u32);
                    self.ops[slot].link = Link::Queued;
                    self.push(write.flags(squeue::Flags::IO_LINK).user_data(data));
                    let sync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
                    self.push(sync.build().user_data(data));
                    return;
                }
                write
            }
            (
                Step::Transfer,
                DiskOp::Read {
                    offset, data, len, ..
                },
            ) => {
                let part = (len - done as usize).min(MAX_TRANSFER_BYTES);
                // SAFETY: `done < len`, so the address stays inside the caller's buffer.
                let at = unsafe { data.add(done as usize) };
                opcode::Read::new(fd, at, part as u32)
                    .offset(offset + done)
                    .build()
            }
            (Step::Fallocate, DiskOp::Allocate { offset, len, .. }) => {
                opcode::Fallocate::new(fd, len).offset(offset).build()
            }
            (Step::Zero, DiskOp::Allocate { offset, len, .. }) => {
                let part = (len - done).min(ZERO_BYTES as u64);
                opcode::Write::new(fd, self.zeros.as_ptr(), part as u32)
                    .offset(offset + done)
                    .build()
            }
            _ => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        self.push(entry.user_data(user_data(KIND_DISK, 0, slot as u32)));
    }

    fn finish(&mut self, slot: usize, result: Result<u32, Errno>, out: &mut Vec<Event>) {
        let op = self.ops.remove(slot);
        if let (Some((way, begun)), Ok(_)) = (op.durable, result) {
            self.durable.learn(op.op.file(), way, begun.elapsed());
        }
        out.push(Event::Disk {
            tag: op.tag,
            result,
        });
    }

    /// Goes on with an operation, or reports its end.
    pub(super) fn on_disk(&mut self, slot: usize, result: i32, out: &mut Vec<Event>) {
        let op = &mut self.ops[slot];
        let result = match (op.link, op.op) {
            (Link::Queued, DiskOp::Write { len, .. }) => {
                if result >= 0 && op.done + result as u64 == len as u64 {
                    op.done = len as u64;
                    op.step = Step::Sync;
                    op.link = Link::None;
                } else {
                    op.link = Link::Broken(result);
                }
                return;
            }
            (Link::Broken(of_write), _) => {
                // The sync was cancelled with the write; go on with what the write said.
                op.link = Link::None;
                of_write
            }
            _ => result,
        };
        let op = &mut self.ops[slot];
        let step = op.step;
        // A sync is not repeated: after one that failed the next says nothing about the data that failed.
        if (result == -libc::EINTR || result == -libc::EAGAIN) && step != Step::Sync {
            self.push_step(slot);
            return;
        }
        if result < 0 {
            if step == Step::Sync && matches!(op.op, DiskOp::Allocate { .. }) {
                // Nothing that it says is about this range alone.
                self.finish(slot, Err(Errno::IO), out);
                return;
            }
            // Devices and some file systems have no fallocate; zeros written below allocate just as well.
            if step == Step::Fallocate
                && matches!(-result, libc::EOPNOTSUPP | libc::ENODEV | libc::EINVAL)
            {
                op.step = Step::Zero;
                self.push_step(slot);
                return;
            }
            // An old kernel or file system that does not know the flag; nothing was written.
            if let Some((way @ (Way::Flagged | Way::Here), _)) = &mut op.durable
                && matches!(-result, libc::EOPNOTSUPP | libc::EINVAL)
            {
                *way = Way::Linked;
                self.durable.refuse_flag(op.op.file());
                self.push_step(slot);
                return;
            }
            self.finish(slot, Err(Errno::from_raw_os_error(-result)), out);
            return;
        }
        match (step, op.op) {
            (Step::Transfer, DiskOp::Write { len, .. }) => {
                op.done += result as u64;
                let linked = matches!(op.durable, Some((Way::Linked, _)));
                if op.done == len as u64 && linked {
                    op.step = Step::Sync;
                    self.push_step(slot);
                } else if op.done == len as u64 {
                    self.finish(slot, Ok(len as u32), out);
                } else if result == 0 {
                    self.finish(slot, Err(Errno::IO), out);
                } else {
                    self.push_step(slot);
                }
            }
            (Step::Transfer, DiskOp::Read { len, .. }) => {
                op.done += result as u64;
                if op.done == len as u64 || result == 0 {
                    let done = op.done as u32;
                    self.finish(slot, Ok(done), out);
                } else {
                    self.push_step(slot);
                }
            }
            (Step::Fallocate, _) => {
                op.step = Step::Zero;
                self.push_step(slot);
            }
            (Step::Zero, DiskOp::Allocate { len, .. }) => {
                op.done += result as u64;
                if result == 0 {
                    self.finish(slot, Err(Errno::IO), out);
                    return;
                }
                if op.done >= len {
                    op.step = Step::Sync;
                }
                self.push_step(slot);
            }
            (Step::Sync, DiskOp::Write { len, .. }) => self.finish(slot, Ok(len as u32), out),
            _ => self.finish(slot, Ok(0), out),
        }
    }
}
