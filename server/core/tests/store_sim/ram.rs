//! A store over plain memory whose I/O ends at once, or fails when told to.

use std::ops::Range;

use ashlar_core::store::format::LEAF_DISK_BYTES;
use ashlar_core::store::{
    Action, AlignedBuf, BlockingDisk, DiskError, Errno, Event, ExtentKey, Geometry, OpenOptions,
    Params, ReadOutcome, Store, StoreError, WriteError, format_store,
};
use ashlar_core::units::{BLOCK_BYTES, ChunkIndex, Epoch, LayerId, StoreId, Version};

use crate::world::{NODE, SharedTail};

pub(crate) struct RamDisk(pub(crate) Vec<u8>);

impl BlockingDisk for RamDisk {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        Ok(self.0.len() as u64)
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.0[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.0[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

/// A store, its disk, and what ended.
pub(crate) struct Ram {
    pub(crate) disk: RamDisk,
    pub(crate) store: Option<Store>,
    pub(crate) tail: SharedTail,
    pub(crate) params: Params,
    pub(crate) done: Vec<(u64, Result<(), StoreError>)>,
    pub(crate) events: Vec<Event>,
    /// I/Os left before one fails, and how.
    pub(crate) fail_in: Option<(u64, Errno)>,
    pub(crate) failed: Option<&'static str>,
    /// It failed when a flush had been answered and nothing was asked since.
    pub(crate) failed_behind_flush: bool,
    pub(crate) ios: u64,
    /// The disk under the store's file is full: it does not grow.
    pub(crate) no_growth: bool,
    /// Bytes that cannot be read while the store is open.
    pub(crate) unreadable: Option<Range<u64>>,
    /// Where the newest leaf was read.
    pub(crate) leaf_read_at: Option<u64>,
    /// The store's time.
    pub(crate) now_ms: u64,
    /// I/Os begun by [`Ram::step`], oldest first.
    begun: std::collections::VecDeque<Action>,
    version: u64,
    epoch: u32,
}

/// The operation of [`Ram::flush`]; its answer stays in `done` only until the flush returns.
const FLUSH: u64 = u64::MAX - 1;

pub(crate) fn key(chunk: u32) -> ExtentKey {
    ExtentKey {
        layer: LayerId(1),
        chunk: ChunkIndex(chunk),
    }
}

impl Ram {
    pub(crate) fn new(geometry: Geometry, params: Params, initial: u32) -> Ram {
        let mut disk = RamDisk(vec![0; geometry.total_bytes() as usize]);
        let id = StoreId(uuid::Uuid::from_u128(99));
        format_store(&mut disk, geometry, id, NODE, initial, 0).expect("a store fits");
        let mut ram = Ram {
            disk,
            store: None,
            tail: SharedTail::new(),
            params,
            done: Vec::new(),
            events: Vec::new(),
            fail_in: None,
            failed: None,
            failed_behind_flush: false,
            ios: 0,
            no_growth: false,
            unreadable: None,
            leaf_read_at: None,
            now_ms: 0,
            begun: std::collections::VecDeque::new(),
            version: 0,
            epoch: 0,
        };
        ram.open().expect("opens");
        ram
    }

    pub(crate) fn open(&mut self) -> Result<(), ashlar_core::store::OpenError> {
        self.store = None;
        // Its memory is gone with it.
        self.begun.clear();
        let options = OpenOptions {
            node: NODE,
            boot: [1; 16],
            accept_tail_loss: false,
        };
        let tail = Box::new(self.tail.clone());
        let (mut store, _) = Store::open(&mut self.disk, tail, self.params.clone(), &options)?;
        store.on_tick(self.now_ms);
        self.store = Some(store);
        self.epoch += 1;
        self.version = 0;
        Ok(())
    }

    pub(crate) fn next_version(&mut self) -> Version {
        self.version += 1;
        Version::new(Epoch(self.epoch), self.version)
    }

    pub(crate) fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("open")
    }

    /// Carries out what the store wants until it wants nothing. True when something was carried out.
    pub(crate) fn run(&mut self) -> bool {
        let mut any = false;
        loop {
            let mut actions = Vec::new();
            self.store().poll_actions(&mut actions);
            if actions.is_empty() {
                return any;
            }
            any = true;
            for action in actions {
                self.carry_out(action);
            }
        }
    }

    /// Lets time pass until then, or until the store has nothing to do any more; what it wants is carried out.
    pub(crate) fn pass_time(&mut self, until_ms: u64) {
        let mut turns = 0;
        loop {
            self.run();
            match self.store().next_deadline_ms() {
                Some(at) if at <= until_ms => self.now_ms = self.now_ms.max(at),
                _ if until_ms == u64::MAX => return,
                _ => break,
            }
            let now = self.now_ms;
            self.store().on_tick(now);
            turns += 1;
            assert!(turns < 10_000, "no rest: {}", self.store().debug_line());
        }
        self.now_ms = self.now_ms.max(until_ms);
        let now = self.now_ms;
        self.store().on_tick(now);
        self.run();
    }

    /// Ends the oldest I/O under way, as a disk does that is slower than its clients. False when there is none.
    pub(crate) fn step(&mut self) -> bool {
        self.begin();
        self.end_one() || self.store().next_deadline_ms().is_some()
    }

    /// Takes the store's actions and ends none of its I/Os. True when it said that what was refused may come again.
    pub(crate) fn begin(&mut self) -> bool {
        let mut actions = Vec::new();
        self.store().poll_actions(&mut actions);
        let mut is_ready = false;
        for action in actions {
            match action {
                Action::Ready => is_ready = true,
                Action::Done { .. } | Action::Event(_) => self.carry_out(action),
                io => self.begun.push_back(io),
            }
        }
        is_ready
    }

    /// Ends the oldest I/O under way. False when there is none.
    pub(crate) fn end_one(&mut self) -> bool {
        let io = self.begun.pop_front();
        let any = io.is_some();
        if let Some(io) = io {
            self.carry_out(io);
        }
        any
    }

    /// Writes one block as soon as the store takes it; the number of I/Os that ended meanwhile.
    pub(crate) fn write_pressing(&mut self, chunk: u32, block: u32, data: &[u8]) -> u32 {
        self.try_write_pressing(chunk, block, data)
            .unwrap_or_else(|e| panic!("{e:?}: {}", self.store().debug_line()))
    }

    pub(crate) fn try_write_pressing(
        &mut self,
        chunk: u32,
        block: u32,
        data: &[u8],
    ) -> Result<u32, WriteError> {
        let version = self.next_version();
        let mut waited = 0;
        loop {
            match self.store().write(key(chunk), block, data, version, None) {
                Ok(()) => return Ok(waited),
                Err(WriteError::Busy { .. }) => {
                    let line = |ram: &mut Ram| ram.store().debug_line();
                    assert!(self.step(), "nothing is under way: {}", line(self));
                    waited += 1;
                    assert!(waited < 20_000, "busy for ever: {}", line(self));
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
        let (io, what) = match &action {
            Action::Write { io, .. } => (*io, "write"),
            Action::Read { io, .. } => (*io, "read"),
            Action::Sync { io } => (*io, "sync"),
            Action::Allocate { io, .. } => (*io, "allocate"),
            Action::Done { op, result } => {
                self.done.push((*op, result.clone().map(|_| ())));
                return;
            }
            Action::Ready => return,
            Action::Event(e) => {
                self.events.push(e.clone());
                return;
            }
        };
        self.ios += 1;
        if let Some((left, errno)) = &mut self.fail_in {
            if *left == 0 {
                let errno = *errno;
                self.fail_in = None;
                self.failed = Some(what);
                self.failed_behind_flush = self.done.iter().any(|d| d.0 == FLUSH);
                self.store().on_io(io, Err(errno));
                return;
            }
            *left -= 1;
        }
        match action {
            Action::Write {
                offset, ptr, len, ..
            } => {
                // SAFETY: the store keeps an I/O's memory until it ends.
                let bytes = unsafe { std::slice::from_raw_parts(ptr, len) };
                self.disk.0[offset as usize..][..len].copy_from_slice(bytes);
            }
            Action::Read {
                offset, ptr, len, ..
            } => {
                if len == LEAF_DISK_BYTES {
                    self.leaf_read_at = Some(offset);
                }
                let end = offset + len as u64;
                let bad = self.unreadable.as_ref();
                if bad.is_some_and(|bad| bad.start < end && offset < bad.end) {
                    self.store().on_io(io, Err(Errno::EIO));
                    return;
                }
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(ptr, len) };
                out.copy_from_slice(&self.disk.0[offset as usize..][..len]);
            }
            Action::Allocate { .. } if self.no_growth => {
                self.store().on_io(io, Err(Errno::ENOSPC));
                return;
            }
            Action::Allocate { offset, len, .. } => {
                self.disk.0[offset as usize..][..len as usize].fill(0);
            }
            _ => {}
        }
        self.store().on_io(io, Ok(()));
    }

    /// Writes, carrying out I/O while the tail is full.
    pub(crate) fn write(
        &mut self,
        chunk: u32,
        block: u32,
        data: &[u8],
    ) -> Result<Version, WriteError> {
        let version = self.next_version();
        let mut from = 0;
        let mut turns = 0;
        loop {
            let at = block + (from / BLOCK_BYTES) as u32;
            match self
                .store()
                .write(key(chunk), at, &data[from..], version, None)
            {
                Ok(()) => return Ok(version),
                Err(WriteError::Busy { accepted }) => {
                    from += accepted as usize * BLOCK_BYTES;
                    if !self.run()
                        && let Some(at) = self.store().next_deadline_ms()
                    {
                        self.pass_time(at);
                    }
                    turns += 1;
                    assert!(
                        turns < 10_000,
                        "busy for ever: {}",
                        self.store().debug_line()
                    );
                }
                Err(e) => return Err(e),
            }
        }
    }

    pub(crate) fn read(&mut self, chunk: u32, block: u32) -> Result<AlignedBuf, StoreError> {
        let mut buf = AlignedBuf::blocks(1);
        let op = u64::MAX;
        // SAFETY: `buf` outlives the read: it is carried out below.
        let outcome = unsafe {
            let slice = std::slice::from_raw_parts_mut(buf.as_mut_ptr(), buf.len());
            self.store().read(op, key(chunk), block, slice)
        }?;
        if outcome == ReadOutcome::Pending {
            loop {
                self.run();
                if let Some(at) = self.done.iter().position(|d| d.0 == op) {
                    self.done.swap_remove(at).1?;
                    break;
                }
            }
        }
        Ok(buf)
    }

    pub(crate) fn flush(&mut self) -> Result<(), StoreError> {
        let op = FLUSH;
        self.store().flush(op);
        loop {
            self.run();
            if let Some(at) = self.done.iter().position(|d| d.0 == op) {
                return self.done.swap_remove(at).1;
            }
        }
    }
}
