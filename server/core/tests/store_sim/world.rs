//! One store on one simulated disk, driven by a seed.

mod client;
mod tail;

use std::cell::RefCell;

use ashlar_core::store::format::{FRAME_MAGIC, LEAF_DISK_BYTES, LeafEntries, Mapping};
use ashlar_core::store::{
    Action, AlignedBuf, Event, ExtentKey, Geometry, Landing, OpenError, OpenOptions, OpenReport,
    Params, ReadOutcome, Store, StoreError, format_store,
};
use ashlar_core::units::{BLOCK_BYTES, LEAF_BLOCKS, StoreId};
pub(crate) use tail::SharedTail;

use crate::disk::{Opening, SimDisk};
use crate::oracle::{Oracle, Place};
use crate::rng::Rng;

/// An I/O the store asked for.
enum Pending {
    Write {
        io: u32,
        offset: u64,
        ptr: *const u8,
        len: usize,
        durable: bool,
    },
    Read {
        io: u32,
        offset: u64,
        ptr: *mut u8,
        len: usize,
    },
    Sync {
        io: u32,
        stamp: u64,
    },
    Allocate {
        io: u32,
        offset: u64,
        len: u64,
    },
}

enum Op {
    Flush(Vec<(Place, u64)>),
    Durable(Vec<(Place, u64)>),
    Read {
        key: ExtentKey,
        first: u32,
        since: Vec<u64>,
        buf: AlignedBuf,
    },
    Other,
}

/// A payload that is still being received.
struct Incoming {
    landing: Landing,
    key: ExtentKey,
    first: u32,
    count: u32,
}

/// A machine whose process is dead.
pub(crate) struct Machine {
    disk: SimDisk,
    tail: Vec<u8>,
    oracle: Oracle,
    boot: u8,
}

impl Machine {
    pub(crate) fn disk(&self) -> &SimDisk {
        &self.disk
    }
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) disk: RefCell<SimDisk>,
    pub(crate) tail: SharedTail,
    pub(crate) params: Params,
    pub(crate) store: Option<Store>,
    pub(crate) oracle: Oracle,
    pending: Vec<Pending>,
    ops: std::collections::HashMap<u64, Op>,
    incoming: Option<Incoming>,
    next_op: u64,
    version: u64,
    epoch: u32,
    boot: u8,
    now: u64,
    pub(crate) layer: u64,
    pub(crate) events: u64,
    pub(crate) cleaned: u64,
    pub(crate) checkpoints: u64,
    pub(crate) busy: u64,
    pub(crate) no_space: u64,
    pub(crate) landed: u64,
}

pub(crate) const NODE: [u8; 16] = [7; 16];
/// Blocks the client writes to: a handful of leaves of two chunks.
const CHUNKS: u64 = 2;
const LEAVES: u64 = 3;
const PER_LEAF: u64 = 24;

impl World {
    pub(crate) fn new(seed: u64, params: impl FnOnce(&mut Params)) -> World {
        let mut rng = Rng::new(seed);
        let geometry = Geometry {
            segment_blocks: 32,
            segments_max: 24,
            checkpoint_blocks: 4,
        };
        let mut p = Params {
            leaf_cache: 16,
            checkpoint_log_blocks: 60 + rng.below(300),
            writeback_ms: 1 + rng.below(50),
            max_appends: 1 + rng.below(6) as usize,
            sync_log_blocks: 20 + rng.below(100),
            flush_habit: rng.below(4) as u32,
            grow_segments: 1 + rng.below(4) as u32,
            ..Params::default()
        };
        params(&mut p);
        let blocks = (geometry.total_bytes() / BLOCK_BYTES as u64) as u32;
        let disk = RefCell::new(SimDisk::new(blocks));
        let id = StoreId(uuid::Uuid::from_u128(u128::from(seed) << 1 | 1));
        let mut opening = Opening {
            disk: &disk,
            lives: u64::MAX,
        };
        format_store(&mut opening, geometry, id, NODE, 6, 0).expect("a new disk takes a store");
        World {
            rng,
            disk,
            tail: SharedTail::new(),
            params: p,
            store: None,
            oracle: Oracle::default(),
            pending: Vec::new(),
            ops: Default::default(),
            incoming: None,
            next_op: 1,
            version: 0,
            epoch: 0,
            boot: 1,
            now: 0,
            layer: 1,
            events: 0,
            cleaned: 0,
            checkpoints: 0,
            busy: 0,
            no_space: 0,
            landed: 0,
        }
    }

    pub(crate) fn open(&mut self, lives: u64) -> Result<OpenReport, OpenError> {
        self.open_as_told(lives, false)
    }

    pub(crate) fn open_as_told(
        &mut self,
        lives: u64,
        accept_tail_loss: bool,
    ) -> Result<OpenReport, OpenError> {
        let mut opening = Opening {
            disk: &self.disk,
            lives,
        };
        let options = OpenOptions {
            node: NODE,
            boot: [self.boot; 16],
            accept_tail_loss,
        };
        let (mut store, report) = Store::open(
            &mut opening,
            Box::new(self.tail.clone()),
            self.params.clone(),
            &options,
        )?;
        store.check_invariants();
        store.on_tick(self.now);
        self.store = Some(store);
        self.epoch += 1;
        self.version = 0;
        Ok(report)
    }

    fn store_mut(&mut self) -> &mut Store {
        self.store.as_mut().expect("open")
    }

    /// Takes the store's actions.
    pub(crate) fn pump(&mut self) {
        let mut actions = Vec::new();
        let Some(store) = self.store.as_mut() else {
            return;
        };
        store.poll_actions(&mut actions);
        store.check_invariants();
        for action in actions {
            self.events += 1;
            match action {
                Action::Write {
                    io,
                    offset,
                    ptr,
                    len,
                    durable,
                } => {
                    self.pending.push(Pending::Write {
                        io,
                        offset,
                        ptr,
                        len,
                        durable,
                    });
                }
                Action::Read {
                    io,
                    offset,
                    ptr,
                    len,
                } => self.pending.push(Pending::Read {
                    io,
                    offset,
                    ptr,
                    len,
                }),
                Action::Sync { io } => {
                    let stamp = self.disk.borrow().stamp();
                    self.pending.push(Pending::Sync { io, stamp });
                }
                Action::Allocate { io, offset, len } => {
                    self.pending.push(Pending::Allocate { io, offset, len })
                }
                Action::Done { op, result } => self.done(op, result.map(|_| ())),
                Action::Ready => {}
                Action::Event(Event::ChecksumMismatch(e)) => panic!("the store found {e}"),
                Action::Event(Event::SegmentDamaged { segment }) => {
                    panic!("segment {segment} called damaged")
                }
                Action::Event(_) => {}
            }
        }
    }

    fn done(&mut self, op: u64, result: Result<(), StoreError>) {
        if let Err(e) = &result {
            panic!("operation {op} failed: {e}");
        }
        match self.ops.remove(&op).expect("done once") {
            Op::Flush(marks) | Op::Durable(marks) => self.oracle.flushed(&marks),
            Op::Read {
                key,
                first,
                since,
                buf,
            } => self.check_read(key, first, &since, &buf),
            Op::Other => {}
        }
    }

    /// Lets a random I/O end. False when there is none.
    pub(crate) fn complete_one(&mut self) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        let at = self.rng.below(self.pending.len() as u64) as usize;
        let io = match self.pending.swap_remove(at) {
            Pending::Write {
                io,
                offset,
                ptr,
                len,
                durable,
            } => {
                // SAFETY: the store keeps the memory of an I/O until it ends.
                let bytes = unsafe { std::slice::from_raw_parts(ptr, len) };
                self.disk.borrow_mut().write(offset, bytes, durable);
                io
            }
            Pending::Read {
                io,
                offset,
                ptr,
                len,
            } => {
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(ptr, len) };
                self.disk.borrow().read(offset, out);
                io
            }
            Pending::Sync { io, stamp } => {
                self.disk.borrow_mut().synced(stamp);
                io
            }
            Pending::Allocate { io, offset, len } => {
                self.disk
                    .borrow_mut()
                    .write(offset, &vec![0; len as usize], false);
                io
            }
        };
        self.store_mut().on_io(io, Ok(()));
        self.pump();
        true
    }

    /// Lets everything end.
    pub(crate) fn settle(&mut self) {
        let mut turns = 0;
        loop {
            while self.complete_one() {
                turns += 1;
                assert!(
                    turns < 20_000,
                    "the store never comes to rest: {:?}",
                    self.store.as_ref().map(|s| (s.debug_line(), s.status()))
                );
            }
            match self.store_mut().next_deadline_ms() {
                Some(at) if at <= self.now => self.pump(),
                Some(at) => {
                    self.now = at;
                    let now = self.now;
                    self.store_mut().on_tick(now);
                    self.pump();
                }
                None if self.pending.is_empty() => return,
                None => {}
            }
            turns += 1;
            assert!(
                turns < 20_000,
                "the store never comes to rest: {:?}",
                self.store.as_ref().map(|s| (s.debug_line(), s.status()))
            );
        }
    }

    /// Stops the process as it stands; what is under way may or may not land.
    pub(crate) fn kill(&mut self) {
        for p in std::mem::take(&mut self.pending) {
            if let Pending::Write {
                offset, ptr, len, ..
            } = p
            {
                // SAFETY: the store is still there.
                let bytes = unsafe { std::slice::from_raw_parts(ptr, len) };
                self.disk
                    .borrow_mut()
                    .interrupted_write(offset, bytes, &mut self.rng);
            }
        }
        self.note_counters();
        self.incoming = None;
        self.store = None;
        self.ops.clear();
    }

    /// Lets go of the store and of what it had under way, as if it had never been opened.
    pub(crate) fn forget(&mut self) {
        self.pending.clear();
        self.ops.clear();
        self.incoming = None;
        self.store = None;
    }

    /// Everything that outlives the process, and what it was told.
    pub(crate) fn machine(&self) -> Machine {
        Machine {
            disk: self.disk.borrow().clone(),
            tail: self.tail.snapshot(),
            oracle: self.oracle.clone(),
            boot: self.boot,
        }
    }

    /// Goes back to where the machine was, with the process dead.
    pub(crate) fn set_machine(&mut self, machine: &Machine) {
        self.forget();
        *self.disk.borrow_mut() = machine.disk.clone();
        self.tail.restore(&machine.tail);
        self.oracle = machine.oracle.clone();
        self.boot = machine.boot;
    }

    /// Changes something of the tail of the dead process; what, in words.
    pub(crate) fn damage_tail(&mut self) -> String {
        let mut tail = self.tail.snapshot();
        // Of most of it nothing is asked any more: what is changed lies where something is, or where frames are named.
        let is_used = |at: &usize| tail[at * 64..][..64].iter().any(|&byte| byte != 0);
        let used: Vec<usize> = (0..tail.len() / 64).filter(is_used).collect();
        let headers: Vec<usize> = (0..tail.len())
            .step_by(BLOCK_BYTES)
            .filter(|&at| at == 0 || tail[at..].starts_with(&FRAME_MAGIC))
            .collect();
        let at = match self.rng.below(4) {
            _ if used.is_empty() => 0,
            0 => {
                used[self.rng.below(used.len() as u64) as usize] * 64 + self.rng.below(64) as usize
            }
            1 => self.rng.below(80) as usize,
            _ => {
                headers[self.rng.below(headers.len() as u64) as usize]
                    + self.rng.below(200) as usize
            }
        };
        let what = match self.rng.below(8) {
            0 => {
                let block = at / BLOCK_BYTES * BLOCK_BYTES;
                tail[block..block + BLOCK_BYTES].fill(0);
                format!("block at byte {block} is zeros")
            }
            1 => {
                let rest = at / BLOCK_BYTES * BLOCK_BYTES;
                tail[rest..].fill(0);
                format!("all from byte {rest} is zeros")
            }
            _ => {
                let bit = self.rng.below(8);
                tail[at] ^= 1 << bit;
                format!("bit {bit} of byte {at}")
            }
        };
        self.tail.restore(&tail);
        what
    }

    pub(crate) fn note_counters(&mut self) {
        if let Some(store) = &self.store {
            let status = store.status();
            self.cleaned += status.segments_cleaned;
            self.checkpoints += status.checkpoints;
        }
    }

    /// The power goes, and with it the tail.
    pub(crate) fn power_cut(&mut self) {
        self.kill();
        self.disk.borrow_mut().power_cut(&mut self.rng);
        self.boot = self.boot.wrapping_add(1).max(1);
    }

    /// Reads everything and compares it with what clients were told.
    pub(crate) fn verify(&mut self, power: bool) -> Result<(), String> {
        for place in self.oracle.places() {
            let mut buf = AlignedBuf::blocks(1);
            let op = self.next_op + 1;
            self.next_op = op;
            // SAFETY: `buf` lives until the read ended, below.
            let outcome = unsafe {
                let slice = std::slice::from_raw_parts_mut(buf.as_mut_ptr(), buf.len());
                self.store_mut().read(op, place.0, place.1, slice)
            };
            match outcome.map_err(|e| e.to_string())? {
                ReadOutcome::Done(_) => {}
                ReadOutcome::Pending => {
                    self.ops.insert(op, Op::Other);
                    while self.ops.contains_key(&op) {
                        self.pump();
                        if !self.complete_one() && self.ops.contains_key(&op) {
                            return Err(format!("{place:?}: the read never ends"));
                        }
                    }
                }
            }
            self.oracle.recovered(place, &buf, power)?;
        }
        Ok(())
    }

    /// Recounts live blocks; needs a store at rest.
    pub(crate) fn check_live(&self) {
        let store = self.store.as_ref().expect("open");
        store.check_live_counts(|addr| {
            let mut bytes = vec![0; LEAF_DISK_BYTES];
            self.disk.borrow().read(addr.offset(), &mut bytes);
            let mut entries: Box<LeafEntries> = Box::new([Mapping::UNMAPPED; LEAF_BLOCKS as usize]);
            zerocopy::IntoBytes::as_mut_bytes(&mut *entries).copy_from_slice(&bytes);
            entries
        });
    }
}
