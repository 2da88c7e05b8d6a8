//! The fallback engine: epoll for sockets, a small pool of threads for the disk.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::{DiskOp, Engine, Event, FileId, Tag, Waker, WatchId, calls};

/// Most pool threads. They are started as queued operations find none idle, so a quiet daemon has few.
const MAX_WORKERS: usize = 16;
/// Readiness events taken per call.
const EPOLL_BATCH: usize = 256;

const TOKEN_MAILBOX: u64 = u64::MAX;
const TOKEN_POOL: u64 = u64::MAX - 1;

struct Watch {
    fd: RawFd,
    token: u32,
    generation: u32,
}

struct Job {
    tag: Tag,
    fd: Arc<OwnedFd>,
    op: DiskOp,
}

// SAFETY: the memory a job names is given to the pool until the job's completion is taken (contract of `submit`).
unsafe impl Send for Job {}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closing: bool,
}

struct Pool {
    queue: Mutex<Queue>,
    wake: Condvar,
    done: Mutex<Vec<(Tag, Result<u32, Errno>)>>,
    done_waker: Waker,
}

/// See the module text.
pub struct PosixEngine {
    epoll: OwnedFd,
    ready: Vec<epoll::Event>,
    files: Vec<Arc<OwnedFd>>,
    watches: slab::Slab<Watch>,
    next_generation: u32,
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    taken: Vec<(Tag, Result<u32, Errno>)>,
    waker: Waker,
}

/// A thread of this pool or a data thread that panics while it holds one of these aborts or ends the process's use of
/// it; the queues themselves are valid at every point where a lock is released.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PosixEngine {
    pub fn open() -> io::Result<PosixEngine> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let waker = Waker::new()?;
        let done_waker = Waker::new()?;
        let input = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(
            &epoll,
            &*waker.fd,
            epoll::EventData::new_u64(TOKEN_MAILBOX),
            input,
        )?;
        epoll::add(
            &epoll,
            &*done_waker.fd,
            epoll::EventData::new_u64(TOKEN_POOL),
            input,
        )?;
        Ok(PosixEngine {
            epoll,
            ready: Vec::with_capacity(EPOLL_BATCH),
            files: Vec::new(),
            watches: slab::Slab::new(),
            next_generation: 1,
            pool: Arc::new(Pool {
                queue: Mutex::default(),
                wake: Condvar::new(),
                done: Mutex::default(),
                done_waker,
            }),
            workers: Vec::new(),
            taken: Vec::new(),
            waker,
        })
    }

    fn take_done(&mut self, out: &mut Vec<Event>) {
        std::mem::swap(&mut *lock(&self.pool.done), &mut self.taken);
        out.extend(
            self.taken
                .drain(..)
                .map(|(tag, result)| Event::Disk { tag, result }),
        );
    }
}

fn key(id: WatchId) -> u64 {
    (u64::from(id.generation) << 32) | u64::from(id.slot)
}

fn input_flags() -> epoll::EventFlags {
    epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET
}

impl Engine for PosixEngine {
    fn name(&self) -> &'static str {
        "posix"
    }

    fn add_file(&mut self, file: Arc<OwnedFd>) -> io::Result<FileId> {
        self.files.push(file);
        Ok(FileId((self.files.len() - 1) as u32))
    }

    unsafe fn submit(&mut self, tag: Tag, op: DiskOp) {
        let job = Job {
            tag,
            fd: self.files[op.file().0 as usize].clone(),
            op,
        };
        let start_one = {
            let mut queue = lock(&self.pool.queue);
            queue.jobs.push_back(job);
            queue.jobs.len() > queue.idle && self.workers.len() < MAX_WORKERS
        };
        if start_one {
            let pool = self.pool.clone();
            match std::thread::Builder::new()
                .name("disk".to_owned())
                .spawn(move || work(&pool))
            {
                Ok(worker) => self.workers.push(worker),
                // The others carry on; with none at all the operation would wait for ever.
                Err(e) if self.workers.is_empty() => {
                    lock(&self.pool.queue).jobs.pop_back();
                    lock(&self.pool.done)
                        .push((tag, Err(Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))));
                    self.pool.done_waker.wake();
                }
                Err(_) => {}
            }
        }
        self.pool.wake.notify_one();
    }

    fn watch(&mut self, fd: RawFd, token: u32) -> io::Result<WatchId> {
        let generation = self.next_generation;
        // The highest generation bit stays clear, so no watch has the token of the mailbox or the pool.
        self.next_generation = (self.next_generation + 1) & 0x7fff_ffff;
        let id = WatchId {
            slot: self.watches.insert(Watch {
                fd,
                token,
                generation,
            }) as u32,
            generation,
        };
        // SAFETY: the caller keeps the socket open until `unwatch`.
        let socket = unsafe { BorrowedFd::borrow_raw(fd) };
        if let Err(e) = epoll::add(
            &self.epoll,
            socket,
            epoll::EventData::new_u64(key(id)),
            input_flags(),
        ) {
            self.watches.remove(id.slot as usize);
            return Err(e.into());
        }
        Ok(id)
    }

    fn watch_writable(&mut self, id: WatchId) {
        if let Some(&Watch { fd, generation, .. }) = self.watches.get(id.slot as usize)
            && generation == id.generation
        {
            // SAFETY: the caller keeps the socket open until `unwatch`.
            let socket = unsafe { BorrowedFd::borrow_raw(fd) };
            let flags = input_flags() | epoll::EventFlags::OUT;
            let _ = epoll::modify(
                &self.epoll,
                socket,
                epoll::EventData::new_u64(key(id)),
                flags,
            );
        }
    }

    fn unwatch(&mut self, id: WatchId) {
        if self
            .watches
            .get(id.slot as usize)
            .is_some_and(|w| w.generation == id.generation)
        {
            let Watch { fd, .. } = self.watches.remove(id.slot as usize);
            // SAFETY: the caller closes the socket only after this.
            let socket = unsafe { BorrowedFd::borrow_raw(fd) };
            let _ = epoll::delete(&self.epoll, socket);
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn wait(&mut self, deadline: Option<Instant>, out: &mut Vec<Event>) -> io::Result<()> {
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        self.ready.clear();
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut self.ready),
            timeout.as_ref(),
        ) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        for i in 0..self.ready.len() {
            let event = self.ready[i];
            let flags = event.flags;
            match event.data.u64() {
                TOKEN_MAILBOX => {
                    self.waker.take();
                    out.push(Event::Mailbox);
                }
                TOKEN_POOL => {
                    self.pool.done_waker.take();
                    self.take_done(out);
                }
                data => {
                    let id = WatchId {
                        slot: data as u32,
                        generation: (data >> 32) as u32,
                    };
                    let Some(&Watch {
                        fd,
                        token,
                        generation,
                    }) = self.watches.get(id.slot as usize)
                    else {
                        continue;
                    };
                    if generation != id.generation {
                        continue;
                    }
                    if flags.contains(epoll::EventFlags::OUT) {
                        // SAFETY: the caller keeps the socket open until `unwatch`.
                        let socket = unsafe { BorrowedFd::borrow_raw(fd) };
                        let _ = epoll::modify(
                            &self.epoll,
                            socket,
                            epoll::EventData::new_u64(data),
                            input_flags(),
                        );
                        out.push(Event::Writable { token });
                    }
                    if flags.intersects(!epoll::EventFlags::OUT) {
                        let hang_up = flags.intersects(
                            epoll::EventFlags::RDHUP
                                | epoll::EventFlags::HUP
                                | epoll::EventFlags::ERR,
                        );
                        out.push(Event::Readable { token, hang_up });
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for PosixEngine {
    /// Waits for the operations in flight and queued: their memory belongs to the caller.
    fn drop(&mut self) {
        lock(&self.pool.queue).closing = true;
        self.pool.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn work(pool: &Pool) {
    let mut queue = lock(&pool.queue);
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            drop(queue);
            // SAFETY: the contract of `submit`: the memory is the pool's until the completion is taken.
            let result = unsafe { calls::carry_out(&job.fd, job.op) };
            lock(&pool.done).push((job.tag, result));
            pool.done_waker.wake();
            queue = lock(&pool.queue);
        } else if queue.closing {
            return;
        } else {
            queue.idle += 1;
            queue = pool
                .wake
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}
