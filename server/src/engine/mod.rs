//! The I/O engine of a data thread: disk operations, socket readiness, a mailbox and a clock behind one wait point.
//!
//! A data thread owns exactly one engine and waits for devices, clients and peers nowhere but in it. Two engines exist: io_uring
//! ([`UringEngine`]) and, where the kernel or a seccomp profile forbids that, epoll with a small pool of threads doing
//! positional reads and writes ([`PosixEngine`]). [`open`] picks one and says why.
//!
//! Sockets are watched, not read: readiness arrives as an event and the thread calls `recv` and `sendmsg` itself.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::io::Errno;

mod calls;
mod durable;
mod fault;
mod file;
mod pinned;
mod posix;
mod uring;

pub use fault::{FaultEngine, FaultPlan, FaultPlanError};
pub use file::{OpenStoreError, StoreFile};
pub use posix::PosixEngine;
pub use uring::UringEngine;

/// Zeros written at a time by [`DiskOp::Allocate`]: large enough to run at the device's rate with one in flight.
const ZERO_BYTES: usize = 4 << 20;

/// What the caller gives an operation and gets back with its completion.
pub type Tag = u64;

/// A file the engine was given by [`Engine::add_file`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub(crate) u32);

/// A socket under watch. Never reused: events of a watch that ended are dropped by the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId {
    slot: u32,
    generation: u32,
}

/// One disk operation. Offsets and lengths are in bytes; on files opened for direct I/O they and the address are
/// multiples of the block size.
#[derive(Clone, Copy, Debug)]
pub enum DiskOp {
    /// Write all of `len` bytes; with `durable`, end when they are on stable storage.
    Write {
        file: FileId,
        offset: u64,
        data: *const u8,
        len: usize,
        durable: bool,
    },
    /// Read `len` bytes; the result is smaller only at the end of the file.
    Read {
        file: FileId,
        offset: u64,
        data: *mut u8,
        len: usize,
    },
    /// Make everything whose completion was seen before this submission durable (fdatasync).
    Sync { file: FileId },
    /// Allocate the range and write it once with zeros, then sync: the result is durable. The sync covers other
    /// writes to the file too, so its failure is EIO whatever the system calls it, and never taken for want of room.
    Allocate { file: FileId, offset: u64, len: u64 },
}

impl DiskOp {
    pub fn file(&self) -> FileId {
        match *self {
            DiskOp::Write { file, .. }
            | DiskOp::Read { file, .. }
            | DiskOp::Sync { file }
            | DiskOp::Allocate { file, .. } => file,
        }
    }
}

/// What [`Engine::wait`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A disk operation ended: bytes moved (0 for Sync and Allocate) or the error number.
    Disk {
        tag: Tag,
        result: Result<u32, Errno>,
    },
    /// The socket with this token may have become readable. `hang_up`: the peer closed or reset it, so that reading
    /// comes to an end even if the next read is a full one.
    Readable { token: u32, hang_up: bool },
    /// The socket with this token may have become writable; asked for by [`Engine::watch_writable`], reported once.
    Writable { token: u32 },
    /// Someone used the [`Waker`].
    Mailbox,
}

/// One data thread's I/O. Not `Send`: an engine lives and dies on the thread that opened it.
pub trait Engine {
    /// "io_uring" or "posix", for logs and metrics.
    fn name(&self) -> &'static str;

    /// Has the kernel begin what was submitted, where the engine would otherwise do so when it waits next.
    fn begin_queued(&mut self) {}

    /// Appends what ended as soon as it was submitted to `out`; the next wait would report it otherwise.
    fn take_ended(&mut self, _out: &mut Vec<Event>) {}

    /// Carries out, sleeping meanwhile, what is done soonest by the calling thread itself. For when nothing is left to
    /// do but wait; what ended is appended to `out`.
    fn work_here(&mut self, _out: &mut Vec<Event>) -> io::Result<()> {
        Ok(())
    }

    /// Whether [`Engine::work_here`] may sleep for as long as one small write takes; it may until told otherwise.
    fn may_sleep_at_work(&mut self, _may: bool) {}

    /// Hands a file to the engine, which closes it when dropped. `direct` says whether it takes O_DIRECT.
    fn add_file(&mut self, file: Arc<OwnedFd>) -> io::Result<FileId>;

    /// Shows the engine memory that many writes will come from, so that it can prepare it. Called once. An error
    /// changes nothing but the speed.
    ///
    /// # Safety
    /// The memory stays mapped as long as the engine exists.
    unsafe fn pin(&mut self, _pieces: &[(*mut u8, usize)]) -> io::Result<()> {
        Ok(())
    }

    /// Starts an operation. It is never refused or lost: what does not fit in a queue waits in the engine. Its end
    /// is reported by exactly one [`Event::Disk`].
    ///
    /// # Safety
    /// The memory of a Read or Write stays valid, and is not written to (Write) or touched at all (Read), until its
    /// event was returned or the engine was dropped.
    unsafe fn submit(&mut self, tag: Tag, op: DiskOp);

    /// Watches a socket for input; events carry `token`. Edge semantics: an event says that bytes, an error or a hang-up may have arrived
    /// since the last one, so the owner reads until `EAGAIN` or remembers that it stopped early. The first event
    /// comes at once if the socket is readable already. Spurious events happen.
    fn watch(&mut self, fd: RawFd, token: u32) -> io::Result<WatchId>;

    /// Reports once when the socket can take more bytes.
    fn watch_writable(&mut self, watch: WatchId);

    /// Ends a watch; to be called before the socket is closed. No event of this watch is returned afterwards.
    fn unwatch(&mut self, watch: WatchId);

    /// A handle other threads use to end a wait.
    fn waker(&self) -> Waker;

    /// Whether a wait now may find something. Costs no system call; an engine that cannot tell says yes.
    fn may_have_events(&mut self) -> bool {
        true
    }

    /// Submits what is queued and waits for at least one event, or until `deadline` (`None`: for ever; a deadline
    /// that has passed: does not block). Events are appended to `out`; returning with none is possible.
    fn wait(&mut self, deadline: Option<Instant>, out: &mut Vec<Event>) -> io::Result<()>;
}

/// Ends another thread's wait with an [`Event::Mailbox`]. Cheap when the thread was already woken and has not yet
/// looked.
#[derive(Clone)]
pub struct Waker {
    fd: Arc<OwnedFd>,
    /// True from a wake until the owner takes it; only the first wake of such a period writes to the eventfd.
    pending: Arc<AtomicBool>,
}

impl Waker {
    fn new() -> io::Result<Waker> {
        let fd = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )?;
        Ok(Waker {
            fd: Arc::new(fd),
            pending: Arc::new(AtomicBool::new(false)),
        })
    }

    /// Wakes the owner. What was sent to it before this call is seen by it after the wake.
    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // The counter cannot overflow: one write per period.
            let _ = rustix::io::write(&*self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Consumes the wake; the owner looks at its mailbox after this.
    fn take(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&*self.fd, &mut count);
        // A read-modify-write, so that what was sent before a wake that found `pending` set is seen from here on.
        self.pending.swap(false, Ordering::AcqRel);
    }

    fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Which engine a daemon is told to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// io_uring where it works, else posix.
    #[default]
    Auto,
    /// io_uring or refuse to start.
    IoUring,
    /// epoll and a pool of threads.
    Posix,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineChoice::Auto => "auto",
            EngineChoice::IoUring => "io-uring",
            EngineChoice::Posix => "posix",
        })
    }
}

impl std::str::FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<EngineChoice, String> {
        match text {
            "auto" => Ok(EngineChoice::Auto),
            "io-uring" | "io_uring" => Ok(EngineChoice::IoUring),
            "posix" => Ok(EngineChoice::Posix),
            other => Err(format!(
                "unknown engine {other:?}: use auto, io-uring or posix"
            )),
        }
    }
}

/// Opens an engine on the calling thread. The second value says which one and why, for the log.
pub fn open(choice: EngineChoice) -> io::Result<(Box<dyn Engine>, String)> {
    match choice {
        EngineChoice::Posix => Ok((
            Box::new(PosixEngine::open()?),
            "posix: asked for".to_owned(),
        )),
        EngineChoice::IoUring => {
            let engine = UringEngine::open().map_err(|e| {
                io::Error::new(
                    e.kind(),
                    format!("io_uring was asked for but does not work here: {e}"),
                )
            })?;
            let flags = engine.flags_text();
            Ok((Box::new(engine), format!("io_uring: asked for ({flags})")))
        }
        EngineChoice::Auto => match UringEngine::open() {
            Ok(engine) => {
                let flags = engine.flags_text();
                Ok((Box::new(engine), format!("io_uring: works here ({flags})")))
            }
            Err(e) => Ok((
                Box::new(PosixEngine::open()?),
                format!("posix: io_uring does not work here: {e}"),
            )),
        },
    }
}

#[cfg(test)]
mod tests;
