//! The stores of a data thread: their disk operations, what ends, and who waits for room.

use std::time::Instant;

use ashlar_core::diagnosis::events::{Occurrence, Subject};
use ashlar_core::store::{Action, Errno, Event as StoreEvent, IoId, OpId, ReadInfo, StoreError};
use ashlar_core::units::{BLOCK_BYTES, LayerId, StoreId, VolumeId};
use smallvec::SmallVec;

use super::config::ScrubEnd;
use super::operation::{Operation, op_key};
use super::thread::DataThread;
use crate::engine::{DiskOp, Event, Tag};
use crate::metrics::Damage;

/// A disk operation under way.
pub(super) struct DiskIo {
    store: usize,
    io: IoId,
    kind: DiskKind,
    bytes: u64,
    started: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DiskKind {
    Read,
    Write,
    Sync,
    Allocate,
}

impl DataThread {
    // -- stores

    /// Whether a disk operation that ended was a read.
    pub(super) fn is_read(&self, tag: Tag) -> bool {
        self.ios[tag as usize].kind == DiskKind::Read
    }

    /// A disk operation ended; its length in bytes.
    pub(super) fn on_disk(&mut self, tag: Tag, result: Result<u32, rustix::io::Errno>) -> usize {
        let io = self.ios.remove(tag as usize);
        let driver = &mut self.stores[io.store];
        let took = self.now.saturating_duration_since(io.started);
        driver.metrics.in_flight.sub(1);
        let result = match result {
            Ok(bytes)
                if matches!(io.kind, DiskKind::Read | DiskKind::Write)
                    && u64::from(bytes) != io.bytes =>
            {
                Err(Errno::EIO)
            }
            Ok(_) => Ok(()),
            Err(e) => Err(Errno(e.raw_os_error())),
        };
        if let (DiskKind::Read, Err(errno)) = (io.kind, &result)
            && let Some(not_told) = driver.read_failures.tell(self.now)
        {
            tracing::error!(store = %driver.id.0, path = %driver.path.display(), %errno, not_told, "the device failed a read; see to it");
        }
        let metrics = &driver.metrics;
        if result.is_err() {
            metrics.errors.add(1);
        }
        match io.kind {
            DiskKind::Read => {
                metrics.reads.add(1);
                metrics.read_bytes.add(io.bytes);
                metrics.read_latency.record(took);
            }
            DiskKind::Write => {
                metrics.writes.add(1);
                metrics.write_bytes.add(io.bytes);
                metrics.write_latency.record(took);
            }
            DiskKind::Sync => {
                metrics.syncs.add(1);
                metrics.sync_latency.record(took);
            }
            DiskKind::Allocate => metrics.allocated_bytes.add(io.bytes),
        }
        driver.store.on_io(io.io, result);
        io.bytes as usize
    }

    /// Takes what the disks ended as soon as they were asked for it. False: nothing.
    pub(super) fn take_ended(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.engine.take_ended(&mut events);
        let any = !events.is_empty();
        if any {
            // Of other disks, and what a worker does: it goes on meanwhile.
            self.engine.begin_queued();
        }
        for event in events.drain(..) {
            if let Event::Disk { tag, result } = event {
                self.reads_under_way -= usize::from(self.is_read(tag));
                self.on_disk(tag, result);
            }
        }
        self.events = events;
        any
    }

    /// Asks every store for its actions until none has any. What waits for room in a store is tried once: whatever a
    /// store says, the thread comes back to its disks. What is ready again goes on in the next turn.
    pub(super) fn run_stores(&mut self) {
        let mut tried: SmallVec<[bool; 8]> = SmallVec::new();
        for index in 0..self.stores.len() {
            let is_ready = std::mem::take(&mut self.stores[index].is_ready);
            if is_ready {
                self.retry_parked(index);
            }
            tried.push(is_ready);
        }
        loop {
            let mut any = false;
            for index in 0..self.stores.len() {
                let mut actions = std::mem::take(&mut self.actions);
                self.stores[index].store.poll_actions(&mut actions);
                for action in actions.drain(..) {
                    match action {
                        Action::Ready if std::mem::replace(&mut tried[index], true) => {
                            self.stores[index].is_ready = true;
                            continue;
                        }
                        Action::Done { .. } | Action::Ready => any = true,
                        _ => {}
                    }
                    self.carry_out(index, action);
                }
                self.actions = actions;
            }
            // What was ended may have let others go on, who asked the stores for more.
            if !any {
                return;
            }
        }
    }

    pub(super) fn carry_out(&mut self, store: usize, action: Action) {
        let file = self.stores[store].file;
        match action {
            Action::Write {
                io,
                offset,
                ptr,
                len,
                durable,
            } => {
                self.submit(
                    store,
                    io,
                    DiskKind::Write,
                    len as u64,
                    DiskOp::Write {
                        file,
                        offset,
                        data: ptr,
                        len,
                        durable,
                    },
                );
            }
            Action::Read {
                io,
                offset,
                ptr,
                len,
            } => {
                self.submit(
                    store,
                    io,
                    DiskKind::Read,
                    len as u64,
                    DiskOp::Read {
                        file,
                        offset,
                        data: ptr,
                        len,
                    },
                );
            }
            Action::Sync { io } => self.submit(store, io, DiskKind::Sync, 0, DiskOp::Sync { file }),
            Action::Allocate { io, offset, len } => {
                self.submit(
                    store,
                    io,
                    DiskKind::Allocate,
                    len,
                    DiskOp::Allocate { file, offset, len },
                );
            }
            Action::Done { op, result } => self.done(store, op, result),
            Action::Ready => self.retry_parked(store),
            Action::Event(event) => {
                self.store_event(store, &event);
                match event {
                    StoreEvent::Poisoned(_) => self.store_failed(store),
                    StoreEvent::ScrubDamaged {
                        extent,
                        first_block,
                        count,
                    } => self.replica_is_damaged(store, extent, first_block, count),
                    _ => {}
                }
            }
        }
    }

    fn submit(&mut self, store: usize, io: IoId, kind: DiskKind, bytes: u64, op: DiskOp) {
        let tag = self.ios.insert(DiskIo {
            store,
            io,
            kind,
            bytes,
            started: self.now,
        }) as Tag;
        self.stores[store].metrics.in_flight.add(1);
        self.reads_under_way += usize::from(kind == DiskKind::Read);
        // SAFETY: the store leaves the memory alone until `on_io` (contract of Action), which follows the event; the
        // engine is dropped before the stores and buffers are (order in `Drop`).
        unsafe { self.engine.submit(tag, op) };
    }

    pub(super) fn done(&mut self, store: usize, op: OpId, result: Result<ReadInfo, StoreError>) {
        let (key, part) = op_key(op);
        match self.operations.get(key) {
            Some(Operation::Request(_)) => self.request_done(key, part, result),
            Some(Operation::Replicated(_)) => self.replicated_io_done(store, key, part, result),
            Some(Operation::Replica(_)) => self.replica_io_done(key, result),
            Some(Operation::Task(_)) => {
                if let Operation::Task(answer) = self.operations.remove(key) {
                    let _ = answer.send(result.map(|_| ()));
                }
            }
            // It asks for no operation of the store's.
            Some(Operation::Survey(_)) => {}
            Some(Operation::DropLayer { .. }) => {
                if let Operation::DropLayer { answer, .. } = self.operations.remove(key) {
                    let _ = answer.send(result.map(|_| ()));
                }
            }
            None => {
                tracing::error!(store = %self.stores[store].id.0, op, "a store ended an operation that does not exist")
            }
        }
    }

    /// Tries the operations that found the tail full, oldest first, until one finds it full again.
    pub(super) fn retry_parked(&mut self, store: usize) {
        for key in std::mem::take(&mut self.stores[store].waiting_for_index) {
            self.resume(key);
        }
        let mut waiting = std::mem::take(&mut self.stores[store].parked);
        while let Some(key) = waiting.pop_front() {
            self.resume(key);
            if !self.stores[store].parked.is_empty() {
                break;
            }
        }
        // Those not tried were there before whatever was parked meanwhile, except the one that just failed.
        let parked = &mut self.stores[store].parked;
        if let Some(first) = parked.pop_front() {
            waiting.push_front(first);
            waiting.append(parked);
        }
        *parked = waiting;
    }

    /// After the last turn: a tail that nothing depends on goes away. The stores and their tails are still locked, so
    /// nobody else can have them open; whoever is killed before this leaves a tail that the next start wipes.
    pub(super) fn remove_tails(&self) {
        for driver in &self.stores {
            if !driver.store.needs_no_tail() {
                continue;
            }
            let path = driver.tail.path();
            match driver.tail.remove() {
                Ok(()) => tracing::debug!(tail = %path.display(), "the tail is empty and removed"),
                Err(error) => {
                    tracing::warn!(tail = %path.display(), %error, "the tail is empty and cannot be removed; the next start uses it again");
                }
            }
        }
    }

    /// Tells the daemon's events what somebody may ask for later.
    fn remember(&self, store: usize, event: &StoreEvent) {
        let what = match event {
            StoreEvent::Poisoned(errno) => Occurrence::StorePoisoned(*errno),
            StoreEvent::ChecksumMismatch(error) => Occurrence::ChecksumError(error.clone()),
            StoreEvent::GrowthFailed(errno) => Occurrence::StoreNotGrown(*errno),
            StoreEvent::ScrubFinished { blocks, damaged } => Occurrence::StoreScrubbed {
                bytes: *blocks * BLOCK_BYTES as u64,
                damaged_blocks: *damaged,
            },
            StoreEvent::SegmentDamaged { .. }
            | StoreEvent::ScrubDamaged { .. }
            | StoreEvent::Checkpointed { .. } => return,
        };
        let layer = match event {
            StoreEvent::ChecksumMismatch(
                StoreError::Corrupt { layer, .. } | StoreError::Lost { layer, .. },
            ) => Some(*layer),
            _ => None,
        };
        let (volume, volume_name) = layer.and_then(|layer| self.owner_of(layer)).unzip();
        let subject = Subject {
            volume,
            volume_name: volume_name.unwrap_or_default(),
            node: None,
            store: Some(self.stores[store].id),
        };
        self.tells.events.tell(subject, what);
    }

    /// The volume that a layer belongs to, and its name where it is served here.
    fn owner_of(&self, layer: LayerId) -> Option<(VolumeId, String)> {
        let served = self.volumes.iter().map(|(_, volume)| &volume.spec);
        let mut served = served.filter(|spec| spec.layer == layer);
        if let Some(spec) = served.next() {
            return Some((spec.id, spec.name.clone()));
        }
        let mut replicas = self.cluster.replicas.iter().map(|(_, replica)| replica);
        let replica = replicas.find(|replica| replica.layer == layer)?;
        Some((replica.volume, String::new()))
    }

    pub(super) fn store_event(&self, store: usize, event: &StoreEvent) {
        self.remember(store, event);
        let id = self.stores[store].id.0;
        match event {
            StoreEvent::Poisoned(error) => {
                tracing::error!(store = %id, %error, "the store stopped: a write or sync failed; restart the daemon once the device is sound");
            }
            StoreEvent::ChecksumMismatch(error) => {
                tracing::error!(store = %id, "{error}");
                if let StoreError::Corrupt {
                    layer,
                    chunk,
                    block,
                }
                | StoreError::Lost {
                    layer,
                    chunk,
                    block,
                } = *error
                {
                    let problem = error.to_string();
                    let damage = Damage {
                        layer,
                        chunk,
                        block,
                        problem,
                    };
                    self.registry.add_damage(StoreId(id), damage);
                }
            }
            StoreEvent::SegmentDamaged { segment } => {
                tracing::error!(store = %id, segment, "part of a segment could not be read for cleaning; it is left alone");
            }
            StoreEvent::ScrubDamaged { .. } => {
                // Each block, or its leaf, was told when it was read.
            }
            StoreEvent::GrowthFailed(error) => {
                tracing::warn!(store = %id, %error, "the store's file could not be made larger; trying again in a minute");
            }
            StoreEvent::Checkpointed { seq, leaves, bytes } => {
                tracing::debug!(store = %id, seq, leaves, bytes, "checkpoint")
            }
            StoreEvent::ScrubFinished { blocks, damaged } => {
                let (blocks, damaged) = (*blocks, *damaged);
                match damaged {
                    0 => tracing::info!(store = %id, blocks, "scrub finished, all sound"),
                    _ => {
                        tracing::error!(store = %id, blocks, damaged, "scrub found damaged blocks")
                    }
                }
                let _ = self.tells.scrubs_ended.send(ScrubEnd {
                    store: StoreId(id),
                    blocks,
                    damaged,
                });
            }
        }
    }
}
