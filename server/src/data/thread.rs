//! The event loop of a data thread: select events, call the machines, carry out their actions, send the replies.
//!
//! One turn: wait once; give completions to the stores; take requests from readable sockets; send what was answered;
//! ask the stores for actions and carry them out; send again. Nothing else blocks, and nothing here is shared with
//! another thread but counters.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ashlar_core::store::{
    Action, Errno, Event as StoreEvent, IoId, OpId, ReadInfo, Store, StoreError,
};
use ashlar_core::units::{StoreId, VolumeId};
use ashlar_core::volume::{Head, Started};
use slab::Slab;
use tokio::sync::oneshot;

use super::command::Command;
use super::config::{Limits, VolumeSpec};
use super::connection::{Connection, Phase};
use super::operation::{Operation, op_key};
use super::pool::Pool;
use super::receiver::{Next, Received};
use super::spin::Spin;
use crate::engine::{DiskOp, Engine, Event, FileId, Tag};
use crate::metrics::{Damage, DiskMetrics, Metrics, ThreadMetrics, VolumeMetrics};

/// Bytes received from one connection in a turn before the others have theirs.
const TURN_BYTES: usize = 1 << 20;
/// Free buffers a thread keeps: enough for 128 KiB reads at depth 128 and its receive buffers.
const KEEP_BUFFER_BYTES: usize = 32 << 20;
/// Connections that may keep a receive buffer between turns because the beginning of a request lies in it.
const HELD_RECEIVE_BUFFERS: usize = 32;
/// How often such connections are looked at.
const SWEEP: Duration = Duration::from_secs(1);
/// A request this small is let in even when the daemon's buffers are all lent, so that no client is starved by others.
const ALWAYS_ADMITTED_BYTES: usize = 64 << 10;

/// A store and what the loop keeps for it.
pub(super) struct StoreDriver {
    pub(super) store: Store,
    pub(super) id: StoreId,
    pub(super) path: PathBuf,
    pub(super) file: FileId,
    pub(super) metrics: Arc<DiskMetrics>,
    /// Operations that found the tail full, in the order they came.
    pub(super) parked: VecDeque<usize>,
    /// Operations that wait for an index page.
    pub(super) waiting_for_index: Vec<usize>,
}

/// A disk operation under way.
struct DiskIo {
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

/// An open volume.
pub(super) struct Volume {
    pub(super) head: Head,
    pub(super) spec: VolumeSpec,
    /// Which of the thread's stores each store of the placement is.
    pub(super) stores: Vec<usize>,
    pub(super) metrics: Arc<VolumeMetrics>,
    pub(super) connections: Vec<u32>,
    /// Flushes and status requests hold no range lock; they are counted here.
    pub(super) unlocked: usize,
    /// Answered, with the volume removed, when nothing is in flight.
    pub(super) closing: Option<oneshot::Sender<()>>,
}

pub(super) struct Drain {
    pub(super) answer: oneshot::Sender<()>,
    pub(super) give_up_at: Instant,
    /// The stores are being closed.
    pub(super) closing: Option<Vec<oneshot::Receiver<Result<(), StoreError>>>>,
}

pub(super) struct DataThread {
    pub(super) index: usize,
    pub(super) engine: Box<dyn Engine>,
    pub(super) stores: Vec<StoreDriver>,
    ios: Slab<DiskIo>,
    pub(super) volumes: Slab<Volume>,
    pub(super) volume_keys: HashMap<VolumeId, usize>,
    pub(super) connections: Slab<Connection>,
    pub(super) next_serial: u64,
    pub(super) operations: Slab<Operation>,
    pub(super) pool: Pool,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<ThreadMetrics>,
    pub(super) registry: Metrics,
    pub(super) commands: mpsc::Receiver<Command>,
    /// Connections with bytes to take.
    pub(super) ready: Vec<u32>,
    /// Connections with bytes to send.
    pub(super) dirty: Vec<u32>,
    /// Connections that wait until something was given back.
    pub(super) paused: Vec<u32>,
    pub(super) dead: Vec<u32>,
    /// Operations that gave way to others and go on in the next turn.
    pub(super) resumable: Vec<usize>,
    /// Requests the range lock let go in this turn.
    pub(super) started: VecDeque<Started>,
    /// They are being started: see `release`.
    pub(super) starting: bool,
    /// Something was given back since the paused were last looked at.
    pub(super) freed: bool,
    pub(super) drain: Option<Drain>,
    pub(super) stop: bool,
    /// The time of this turn.
    pub(super) now: Instant,
    born: Instant,
    actions: Vec<Action>,
    events: Vec<Event>,
    spin: Spin,
    spin_until: Option<Instant>,
    next_sweep: Option<Instant>,
    /// Connections counted in `HELD_RECEIVE_BUFFERS`.
    held_receive_buffers: usize,
}

/// What a data thread is made of.
pub(super) struct Parts {
    pub(super) index: usize,
    pub(super) engine: Box<dyn Engine>,
    pub(super) stores: Vec<StoreDriver>,
    pub(super) limits: Limits,
    pub(super) registry: Metrics,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) spin: Duration,
}

impl DataThread {
    pub(super) fn new(parts: Parts) -> DataThread {
        let now = Instant::now();
        DataThread {
            index: parts.index,
            engine: parts.engine,
            stores: parts.stores,
            ios: Slab::with_capacity(256),
            volumes: Slab::new(),
            volume_keys: HashMap::new(),
            connections: Slab::new(),
            next_serial: 1,
            operations: Slab::with_capacity(256),
            pool: Pool::new(KEEP_BUFFER_BYTES),
            limits: parts.limits,
            metrics: parts.registry.add_thread(),
            registry: parts.registry,
            commands: parts.commands,
            ready: Vec::new(),
            dirty: Vec::new(),
            paused: Vec::new(),
            dead: Vec::new(),
            resumable: Vec::new(),
            started: VecDeque::new(),
            starting: false,
            held_receive_buffers: 0,
            freed: false,
            drain: None,
            stop: false,
            now,
            born: now,
            actions: Vec::new(),
            events: Vec::new(),
            spin: Spin::new(parts.spin),
            spin_until: None,
            next_sweep: None,
        }
    }

    /// Runs until told to stop. An error is one of the engine's wait, after which nothing can be promised.
    pub(super) fn run(&mut self) -> io::Result<()> {
        while !self.stop {
            let mut events = std::mem::take(&mut self.events);
            self.wait(&mut events)?;
            self.now = Instant::now();
            self.metrics.turns.add(1);
            let tick = self.now_ms();
            for driver in &mut self.stores {
                driver.store.on_tick(tick);
            }
            let mut mailbox = false;
            for event in events.drain(..) {
                match event {
                    Event::Disk { tag, result } => self.on_disk(tag, result),
                    Event::Readable { token, hang_up } => self.on_readable(token, hang_up),
                    Event::Writable { token } => self.on_writable(token),
                    Event::Mailbox => mailbox = true,
                }
            }
            self.events = events;
            if mailbox {
                while let Ok(command) = self.commands.try_recv() {
                    self.command(command);
                }
            }
            self.turn();
        }
        Ok(())
    }

    /// The one place where the thread may sleep.
    fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        if let Some(until) = self.spin_until.take() {
            let begun = Instant::now();
            loop {
                // A deadline that has passed: looks and does not block.
                self.engine.wait(Some(begun), events)?;
                let now = Instant::now();
                if !events.is_empty() {
                    self.spin.learn(Some(now - begun));
                    return Ok(());
                }
                if now >= until {
                    break;
                }
            }
            self.spin.learn(None);
        }
        let deadline = self.deadline();
        self.engine.wait(deadline, events)
    }

    fn turn(&mut self) {
        let sent = self.metrics.sends.get();
        self.serve_ready();
        for key in std::mem::take(&mut self.resumable) {
            self.resume(key);
        }
        self.send_dirty();
        self.run_stores();
        self.send_dirty();
        if self.freed && !self.paused.is_empty() {
            for key in std::mem::take(&mut self.paused) {
                if let Some(connection) = self.connections.get_mut(key as usize) {
                    connection.is_paused = false;
                    self.make_ready(key);
                }
            }
        }
        self.freed = false;
        self.sweep();
        self.bury();
        if self.drain.is_some() {
            self.go_on_draining();
        }
        if self.metrics.sends.get() != sent && self.ready.is_empty() && self.resumable.is_empty() {
            self.spin_until = self.spin.look_until(Instant::now());
        }
    }

    fn now_ms(&self) -> u64 {
        self.now.duration_since(self.born).as_millis() as u64
    }

    /// When the loop must turn though nothing happens.
    fn deadline(&mut self) -> Option<Instant> {
        if !self.ready.is_empty() || !self.resumable.is_empty() || !self.dead.is_empty() {
            return Some(self.now);
        }
        let stores = self
            .stores
            .iter()
            .filter_map(|driver| driver.store.next_deadline_ms())
            .min();
        // A millisecond later, so that the store finds its deadline passed.
        let stores = stores.map(|ms| self.born + Duration::from_millis(ms + 1));
        let drain = self
            .drain
            .as_ref()
            .map(|drain| drain.give_up_at.max(self.now + Duration::from_millis(10)));
        [stores, drain, self.next_sweep].into_iter().flatten().min()
    }

    // -- stores

    fn on_disk(&mut self, tag: Tag, result: Result<u32, rustix::io::Errno>) {
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
    }

    /// Asks every store for its actions until none has any.
    fn run_stores(&mut self) {
        loop {
            let mut any = false;
            for index in 0..self.stores.len() {
                let mut actions = std::mem::take(&mut self.actions);
                self.stores[index].store.poll_actions(&mut actions);
                any |= actions
                    .iter()
                    .any(|action| matches!(action, Action::Done { .. } | Action::Ready));
                for action in actions.drain(..) {
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

    fn carry_out(&mut self, store: usize, action: Action) {
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
            Action::Event(event) => self.store_event(store, &event),
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
        // SAFETY: the store leaves the memory alone until `on_io` (contract of Action), which follows the event; the
        // engine is dropped before the stores and buffers are (order in `Drop`).
        unsafe { self.engine.submit(tag, op) };
    }

    fn done(&mut self, store: usize, op: OpId, result: Result<ReadInfo, StoreError>) {
        let (key, part) = op_key(op);
        match self.operations.get(key) {
            Some(Operation::Request(_)) => self.request_done(key, part, result),
            Some(Operation::Task(_)) => {
                if let Operation::Task(answer) = self.operations.remove(key) {
                    let _ = answer.send(result.map(|_| ()));
                }
            }
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
    fn retry_parked(&mut self, store: usize) {
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

    fn store_event(&self, store: usize, event: &StoreEvent) {
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
            StoreEvent::GrowthFailed(error) => {
                tracing::warn!(store = %id, %error, "the store's file could not be made larger; trying again in a minute");
            }
            StoreEvent::Checkpointed { seq, leaves, bytes } => {
                tracing::debug!(store = %id, seq, leaves, bytes, "checkpoint")
            }
            StoreEvent::ScrubFinished { blocks, damaged: 0 } => {
                tracing::info!(store = %id, blocks, "scrub finished, all sound")
            }
            StoreEvent::ScrubFinished { blocks, damaged } => {
                tracing::error!(store = %id, blocks, damaged, "scrub found damaged blocks")
            }
        }
    }

    // -- sockets

    pub(super) fn make_ready(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if !connection.is_ready {
            connection.is_ready = true;
            self.ready.push(key);
        }
    }

    pub(super) fn make_dirty(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if !connection.is_dirty {
            connection.is_dirty = true;
            self.dirty.push(key);
        }
    }

    pub(super) fn kill(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if connection.phase != Phase::Dead {
            connection.phase = Phase::Dead;
            self.dead.push(key);
        }
    }

    fn on_readable(&mut self, token: u32, hang_up: bool) {
        if let Some(connection) = self.connections.get_mut(token as usize) {
            connection.readable = true;
            connection.hang_up |= hang_up;
            connection.was_idle = false;
            if !connection.is_paused {
                self.make_ready(token);
            }
        }
    }

    fn on_writable(&mut self, token: u32) {
        if let Some(connection) = self.connections.get_mut(token as usize) {
            connection.is_blocked = false;
            self.make_dirty(token);
        }
    }

    fn serve_ready(&mut self) {
        let mut ready = std::mem::take(&mut self.ready);
        for key in ready.drain(..) {
            if let Some(connection) = self.connections.get_mut(key as usize) {
                connection.is_ready = false;
                if self.drain.is_none() {
                    self.serve(key);
                }
            }
        }
        // Those that were made ready meanwhile have used their share of this turn.
        ready.append(&mut self.ready);
        self.ready = ready;
    }

    /// Takes requests from one connection and receives more, until its socket is empty or its share is used.
    fn serve(&mut self, key: u32) {
        let mut left = TURN_BYTES;
        loop {
            if !self.take_requests(key) {
                return;
            }
            let connection = &mut self.connections[key as usize];
            if !connection.readable || connection.phase != Phase::Open {
                break;
            }
            if left == 0 {
                self.make_ready(key);
                return;
            }
            let received = connection.receiver.receive(connection.fd(), &mut self.pool);
            self.metrics.receives.add(1);
            let connection = &mut self.connections[key as usize];
            match received {
                Ok(Received::Bytes { count, drained }) => {
                    self.metrics.received_bytes.add(count as u64);
                    left = left.saturating_sub(count);
                    if drained && !connection.hang_up {
                        connection.readable = false;
                    }
                }
                Ok(Received::WouldBlock) => connection.readable = false,
                Ok(Received::End) => {
                    connection.readable = false;
                    if connection.receiver.is_mid_request() {
                        tracing::debug!(
                            peer = connection.peer,
                            "the client hung up in the middle of a request"
                        );
                    }
                    self.leave(key);
                    return;
                }
                Err(error) => {
                    tracing::debug!(peer = connection.peer, %error, "receiving failed");
                    self.kill(key);
                    return;
                }
            }
        }
        self.release_receive_buffer(key);
    }

    /// Hands every whole request on. False when the connection takes no more for now.
    fn take_requests(&mut self, key: u32) -> bool {
        loop {
            let connection = &mut self.connections[key as usize];
            if connection.phase != Phase::Open {
                return false;
            }
            let limits = self.limits;
            let lent = self.pool.lent_bytes();
            let (held, in_flight) = (
                connection.held_bytes + connection.outbox.header_bytes(),
                connection.in_flight,
            );
            let admit = |needs: usize| {
                // One request is always let in, whatever its size, so that every client gets on.
                let own = held == 0 || held + needs <= limits.bytes_per_connection;
                let all = lent + needs <= limits.bytes
                    || (needs <= ALWAYS_ADMITTED_BYTES && held <= ALWAYS_ADMITTED_BYTES);
                own && all && in_flight < limits.requests_per_connection
            };
            match connection
                .receiver
                .next(&connection.session, &mut self.pool, admit)
            {
                Next::Incomplete => return true,
                Next::Paused => {
                    if !connection.is_paused {
                        connection.is_paused = true;
                        self.paused.push(key);
                        self.metrics.pauses.add(1);
                    }
                    return false;
                }
                Next::Request { request, from, len } => {
                    let payload: &[u8] = match connection.receiver.buffer() {
                        // SAFETY: `from..from + len` was received, and the receive buffer is neither moved nor written
                        // to before `next` or `receive` are called again, which serving a request does not do: it
                        // never removes a connection.
                        Some(buffer) if len > 0 => unsafe {
                            std::slice::from_raw_parts(buffer.at(from), len)
                        },
                        _ => &[],
                    };
                    self.request(key, request, payload, None);
                }
                Next::Buffered { request, buffer } => self.request(key, request, &[], Some(buffer)),
                Next::Refuse {
                    cookie,
                    offset,
                    command,
                    error,
                } => self.refuse(key, cookie, offset, command, error),
                Next::Disconnect => {
                    self.leave(key);
                    return false;
                }
                Next::Close(reason) => {
                    tracing::info!(peer = connection.peer, %reason, "closing a connection");
                    self.metrics.protocol_errors.add(1);
                    self.leave(key);
                    return false;
                }
            }
        }
    }

    /// Takes no more requests; the connection ends when what was taken has been answered.
    pub(super) fn leave(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if connection.phase == Phase::Open {
            connection.phase = Phase::Leaving;
            connection.receiver.clear(&mut self.pool);
            self.freed = true;
            let settled = connection.is_settled();
            self.buffer_released(key);
            if settled {
                self.kill(key);
            }
        }
    }

    fn release_receive_buffer(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if !connection.receiver.holds_buffer() {
            return;
        }
        // A payload that is half here will go on in a moment; moving it would be a copy for nothing.
        if connection.receiver.has_bytes()
            && (connection.keeps_buffer || self.held_receive_buffers < HELD_RECEIVE_BUFFERS)
        {
            if !connection.keeps_buffer {
                connection.keeps_buffer = true;
                self.held_receive_buffers += 1;
            }
            self.next_sweep.get_or_insert(self.now + SWEEP);
            return;
        }
        self.force_release(key);
    }

    fn force_release(&mut self, key: u32) {
        let limits = self.limits;
        let lent = self.pool.lent_bytes();
        let connection = &mut self.connections[key as usize];
        let admit = |needs: usize| lent + needs <= limits.bytes;
        if connection
            .receiver
            .release(&connection.session, &mut self.pool, admit)
        {
            self.buffer_released(key);
        }
    }

    fn buffer_released(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if std::mem::take(&mut connection.keeps_buffer) {
            self.held_receive_buffers -= 1;
        }
    }

    /// Takes receive buffers from clients that stopped in the middle of a request.
    fn sweep(&mut self) {
        if self.next_sweep.is_none_or(|at| at > self.now) {
            return;
        }
        self.next_sweep = None;
        for key in 0..self.connections.capacity() {
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            if !connection.receiver.holds_buffer() || connection.is_ready || connection.is_paused {
                continue;
            }
            if std::mem::replace(&mut connection.was_idle, true) {
                self.force_release(key as u32);
            } else {
                self.next_sweep = Some(self.now + SWEEP);
            }
        }
    }

    /// One `sendmsg` for each connection with something to send.
    fn send_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for key in dirty.drain(..) {
            let Some(connection) = self.connections.get_mut(key as usize) else {
                continue;
            };
            connection.is_dirty = false;
            if connection.phase == Phase::Dead || connection.is_blocked {
                continue;
            }
            match connection.outbox.send(connection.fd(), &mut self.pool) {
                Ok(sent) => {
                    self.metrics.sends.add(sent.calls);
                    self.metrics.sent_bytes.add(sent.bytes);
                    connection.held_bytes -= sent.freed_bytes;
                    self.freed |= sent.bytes > 0;
                    if sent.blocked && !connection.outbox.is_empty() {
                        connection.is_blocked = true;
                        self.engine.watch_writable(connection.watch);
                    } else if connection.phase == Phase::Leaving && connection.is_settled() {
                        self.kill(key);
                    }
                }
                Err(error) => {
                    tracing::debug!(peer = connection.peer, %error, "sending failed");
                    self.kill(key);
                }
            }
        }
        dirty.append(&mut self.dirty);
        self.dirty = dirty;
    }

    /// Removes the connections that ended.
    fn bury(&mut self) {
        while let Some(key) = self.dead.pop() {
            self.buffer_released(key);
            let mut connection = self.connections.remove(key as usize);
            connection.receiver.clear(&mut self.pool);
            connection.outbox.clear(&mut self.pool);
            self.engine.unwatch(connection.watch);
            self.freed = true;
            self.metrics.connections.sub(1);
            if let Some(volume) = self.volumes.get_mut(connection.volume) {
                volume.connections.retain(|k| *k != key);
                volume.metrics.connections.sub(1);
            }
            tracing::debug!(peer = connection.peer, "connection closed");
            for list in [&mut self.ready, &mut self.dirty, &mut self.paused] {
                list.retain(|k| *k != key);
            }
            if self.connections.is_empty() {
                self.pool.trim();
            }
            self.volume_may_close(connection.volume);
        }
        self.metrics
            .buffered_bytes
            .set(self.pool.lent_bytes() as u64);
    }

    fn go_on_draining(&mut self) {
        let idle = self
            .operations
            .iter()
            .all(|(_, op)| !matches!(op, Operation::Request(_)));
        let sent = self.connections.iter().all(|(_, c)| c.outbox.is_empty());
        let Some(drain) = &mut self.drain else { return };
        if !(idle && sent) && self.now < drain.give_up_at {
            return;
        }
        match &mut drain.closing {
            None => {
                let answers = (0..self.stores.len())
                    .map(|store| self.task(store, |s, op| s.close(op)))
                    .collect();
                if let Some(drain) = &mut self.drain {
                    drain.closing = Some(answers);
                    drain.give_up_at = self.now;
                }
                self.run_stores();
            }
            Some(answers) => {
                answers.retain_mut(|answer| {
                    matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty))
                });
                let stores_idle = self
                    .stores
                    .iter()
                    .all(|d| d.store.status().poisoned.is_some() || d.store.is_idle());
                if answers.is_empty() && stores_idle && self.ios.is_empty() {
                    for key in 0..self.connections.capacity() {
                        if self.connections.contains(key) {
                            self.kill(key as u32);
                        }
                    }
                    self.bury();
                    if let Some(drain) = self.drain.take() {
                        let _ = drain.answer.send(());
                    }
                    self.stop = true;
                }
            }
        }
    }
}
