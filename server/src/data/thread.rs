//! The event loop of a data thread: select events, call the machines, carry out their actions, send the replies.
//!
//! One turn: wait once; give completions to the stores; take requests from readable sockets; send what was answered;
//! ask the stores for actions and carry them out; send again. Nothing else waits for a device or a peer, and nothing here
//! is shared with another thread but counters.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ashlar_core::store::{Action, ExtentKey, Store, StoreError};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS, ChunkIndex, StoreId, VolumeId};
use ashlar_core::volume::{Head, Started, StoreSlot};
use slab::Slab;
use tokio::sync::oneshot;

use super::cluster::{self, Cluster, LINK_TOKEN, Replication};
use super::command::Command;
use super::config::{Limits, Tells, VolumeSpec};
use super::connection::Connection;
use super::fence::Fence;
use super::gate::{Gate, Held};
use super::habit::Habit;
use super::halves::Halves;
use super::looking::Look;
use super::operation::Operation;
use super::pool::Pool;
use super::sparse::Sparse;
use super::spin::{Sent, Spins};
use super::stores::DiskIo;
use crate::engine::{Engine, Event, FileId};
use crate::metrics::{DiskMetrics, Metrics, ThreadMetrics, VolumeMetrics};
use crate::tail::TailName;

/// Free buffers a thread keeps: enough for 128 KiB reads at depth 128 and its receive buffers.
const KEEP_BUFFER_BYTES: usize = 32 << 20;
/// A store and what the loop keeps for it.
pub(super) struct StoreDriver {
    pub(super) store: Store,
    pub(super) id: StoreId,
    pub(super) path: PathBuf,
    pub(super) file: FileId,
    pub(super) tail: TailName,
    pub(super) metrics: Arc<DiskMetrics>,
    /// Operations that found the tail full, in the order they came.
    pub(super) parked: VecDeque<usize>,
    /// Operations that wait for an index page.
    pub(super) waiting_for_index: Vec<usize>,
    /// It said so when they had been tried in this turn already.
    pub(super) is_ready: bool,
    /// Opening it found less than it had answered, without the machine having been restarted.
    pub(super) lost_answers: bool,
    /// Reads that its device failed.
    pub(super) read_failures: Sparse,
}

/// Who decides for a volume.
#[allow(
    clippy::large_enum_variant,
    reason = "the path of an unreplicated volume follows no pointer"
)]
pub(super) enum VolumeHead {
    /// All of it is on stores of this thread, one copy each.
    Single(Head),
    /// Its chunks have replicas, here or elsewhere.
    Replicated(Box<Replication>),
}

impl VolumeHead {
    /// The part that both have: order of requests, size, versions.
    #[inline]
    pub(super) fn admission(&self) -> &Head {
        match self {
            VolumeHead::Single(head) => head,
            VolumeHead::Replicated(replication) => replication.head.admission(),
        }
    }

    #[inline]
    pub(super) fn admission_mut(&mut self) -> &mut Head {
        match self {
            VolumeHead::Single(head) => head,
            VolumeHead::Replicated(replication) => replication.head.admission_mut(),
        }
    }
}

/// An open volume.
pub(super) struct Volume {
    pub(super) head: VolumeHead,
    /// Its replicated head will do nothing more.
    pub(super) head_ended: bool,
    /// What its requests have to pass first, if anything.
    pub(super) gate: Option<Box<Gate>>,
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

impl Volume {
    /// Which store of the placement a chunk is on, as `Placement::store_of` deals them out.
    #[inline]
    pub(super) fn slot_of(&self, chunk: ChunkIndex) -> StoreSlot {
        StoreSlot((chunk.0 as usize % self.stores.len()) as u8)
    }

    /// A chunk's name, wherever it is.
    #[inline]
    pub(super) fn extent(&self, chunk: ChunkIndex) -> ExtentKey {
        ExtentKey {
            layer: self.spec.layer,
            chunk,
        }
    }

    /// The store of a chunk, and the chunk's name there.
    #[inline]
    pub(super) fn place(&self, chunk: ChunkIndex) -> (usize, ExtentKey) {
        (
            self.stores[usize::from(self.slot_of(chunk).0)],
            self.extent(chunk),
        )
    }

    /// The store of a block of the volume, its chunk's name there, and the block in the chunk.
    #[inline]
    pub(super) fn place_block(&self, block: u64) -> (usize, ExtentKey, u32) {
        let chunk = ChunkIndex((block / u64::from(CHUNK_BLOCKS)) as u32);
        let (store, extent) = self.place(chunk);
        (store, extent, (block % u64::from(CHUNK_BLOCKS)) as u32)
    }
}

pub(super) struct Drain {
    pub(super) answer: oneshot::Sender<()>,
    pub(super) give_up_at: Instant,
    /// The stores are being closed.
    pub(super) closing: Option<Vec<oneshot::Receiver<Result<(), StoreError>>>>,
}

/// Bytes of ended reads that are answered before they are sent: the client begins while we go on.
const ANSWER_BYTES: usize = 4 * BLOCK_BYTES;

/// Times a turn asks the disks for what they ended at once: each may let the stores go on with work of their own, and clients
/// are not to wait for all of it.
const ROUNDS: u32 = 8;

pub(super) struct DataThread {
    pub(super) index: usize,
    pub(super) engine: Box<dyn Engine>,
    pub(super) stores: Vec<StoreDriver>,
    pub(super) ios: Slab<DiskIo>,
    pub(super) volumes: Slab<Volume>,
    pub(super) volume_keys: HashMap<VolumeId, usize>,
    pub(super) connections: Slab<Connection>,
    pub(super) next_serial: u64,
    pub(super) operations: Slab<Operation>,
    pub(super) pool: Pool,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<ThreadMetrics>,
    pub(super) registry: Metrics,
    pub(super) tells: Tells,
    pub(super) cluster: Cluster,
    pub(super) commands: mpsc::Receiver<Command>,
    /// Connections with bytes to take.
    pub(super) ready: Vec<u32>,
    /// Connections with bytes to send.
    pub(super) dirty: Vec<u32>,
    /// Connections that wait until something was given back.
    pub(super) paused: Vec<u32>,
    /// Connections whose next request may not pass its volume's gate.
    pub(super) held: Vec<Held>,
    pub(super) fences: Vec<Fence>,
    pub(super) dead: Vec<u32>,
    /// Operations that gave way to others and go on in the next turn.
    pub(super) resumable: Vec<usize>,
    /// Requests the range lock let go in this turn.
    pub(super) started: VecDeque<Started>,
    /// They are being started: see `release`.
    pub(super) starting: bool,
    /// Something else than memory of the pool was given back since the paused were last looked at.
    pub(super) freed: bool,
    pub(super) drain: Option<Drain>,
    pub(super) stop: bool,
    /// The time of this turn.
    pub(super) now: Instant,
    pub(super) born: Instant,
    pub(super) actions: Vec<Action>,
    pub(super) events: Vec<Event>,
    /// What has been learnt about looking again.
    pub(super) spins: Spins,
    /// What a look comes after.
    pub(super) sent: Sent,
    pub(super) disk_answered: bool,
    /// Reads that the disks ended in this turn.
    pub(super) reads_ended: usize,
    /// The look that comes before sleep.
    pub(super) look: Option<Look>,
    /// The look that ended in this turn.
    pub(super) found: Option<Look>,
    /// Whether the rest of a request follows at once.
    pub(super) rest: Habit,
    /// The one connection that was answered last; none when there were several.
    pub(super) hot: Option<u32>,
    pub(super) halves: Halves,
    /// Reads that the disks have not ended.
    pub(super) reads_under_way: usize,
    pub(super) next_sweep: Option<Instant>,
    /// Connections counted in `HELD_RECEIVE_BUFFERS`.
    pub(super) held_receive_buffers: usize,
}

/// What a data thread is made of.
pub(super) struct Parts {
    pub(super) index: usize,
    pub(super) engine: Box<dyn Engine>,
    pub(super) stores: Vec<StoreDriver>,
    pub(super) limits: Limits,
    pub(super) registry: Metrics,
    pub(super) tells: Tells,
    pub(super) cluster: Cluster,
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
            // Unique in the daemon: the thread in the high bits.
            next_serial: ((parts.index as u64) << 48) + 1,
            operations: Slab::with_capacity(256),
            pool: Pool::new(KEEP_BUFFER_BYTES),
            limits: parts.limits,
            metrics: parts.registry.add_thread(),
            registry: parts.registry,
            tells: parts.tells,
            cluster: parts.cluster,
            commands: parts.commands,
            ready: Vec::new(),
            dirty: Vec::new(),
            paused: Vec::new(),
            held: Vec::new(),
            fences: Vec::new(),
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
            spins: Spins::new(parts.spin),
            sent: Sent::FromDisk,
            disk_answered: false,
            reads_ended: 0,
            look: None,
            found: None,
            rest: Habit::default(),
            hot: None,
            halves: Halves::default(),
            reads_under_way: 0,
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
                    Event::Disk { tag, result } if self.is_read(tag) => {
                        self.disk_answered = true;
                        self.reads_ended += 1;
                        self.reads_under_way -= 1;
                        self.halves.push((tag, result));
                    }
                    Event::Disk { tag, result } => {
                        self.disk_answered = true;
                        self.on_disk(tag, result);
                    }
                    Event::Readable { token, hang_up } if token & LINK_TOKEN != 0 => {
                        self.on_link_readable(token, hang_up);
                    }
                    Event::Writable { token } if token & LINK_TOKEN != 0 => {
                        self.on_link_writable(token);
                    }
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
            let came = !self.ready.is_empty();
            self.halves.release(self.now, self.reads_under_way, came);
            let mut left = ANSWER_BYTES;
            while left > 0
                && let Some((tag, result)) = self.halves.next()
            {
                left = left.saturating_sub(self.on_disk(tag, result));
            }
            self.turn();
        }
        Ok(())
    }

    /// The one place where the thread may sleep.
    fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        let look = self.look.take();
        if let Some(held_until) = self.halves.deadline(self.now) {
            return self.engine.wait(Some(held_until), events);
        }
        let has_more =
            !self.ready.is_empty() || !self.resumable.is_empty() || self.links_want_a_turn();
        if !has_more {
            self.engine.work_here(events)?;
            if !events.is_empty() {
                return Ok(());
            }
        }
        let deadline = self.deadline();
        if let Some(look) = look
            && self.look(look, deadline, events)?
        {
            return Ok(());
        }
        self.engine.wait(deadline, events)
    }

    fn turn(&mut self) {
        let before = self.traffic();
        self.serve_links();
        if !self.held.is_empty() && self.holds_end().is_some_and(|end| end <= self.now) {
            self.end_holds();
        }
        self.serve_ready();
        for key in std::mem::take(&mut self.resumable) {
            self.resume(key);
        }
        let came = self.came_since(&before);
        self.end_look(came);
        // Answers from memory are short, and who waits for them waits for nothing else.
        if !self.disk_answered {
            self.send_dirty();
        }
        if came {
            self.sent = self.kind_of_answers(&before);
        }
        // The disk begins with what was asked before answers are copied out: it would stand still meanwhile.
        self.run_stores();
        self.look_at_cluster();
        // What heads want of stores, what stores answer to heads, and what disks ended at once.
        let mut rounds = ROUNDS;
        loop {
            let settled = self.settle();
            let ended = rounds > 0 && self.take_ended();
            if !settled && !ended {
                break;
            }
            rounds -= u32::from(ended);
            self.run_stores();
        }
        // One operation waits for its messages first, and for the disk, if at all, behind them. Where there are more, a disk that
        // begins later costs all of them.
        if self.links_have_little() {
            self.send_links();
        }
        self.engine.begin_queued();
        self.send_links();
        self.send_dirty();
        let freed = std::mem::take(&mut self.freed) | self.pool.take_given();
        if freed && !self.paused.is_empty() {
            for key in std::mem::take(&mut self.paused) {
                if let Some(connection) = self.connections.get_mut(key as usize) {
                    connection.is_paused = false;
                    self.make_ready(key);
                }
            }
        }
        self.sweep();
        self.bury();
        if !self.fences.is_empty() {
            self.go_on_fencing();
        }
        if self.drain.is_some() {
            self.go_on_draining();
        }
        self.begin_look(&before);
    }

    fn now_ms(&self) -> u64 {
        self.now.duration_since(self.born).as_millis() as u64
    }

    /// When the loop must turn though nothing happens.
    fn deadline(&mut self) -> Option<Instant> {
        let pauses_may_end = (self.freed || self.pool.has_given()) && !self.paused.is_empty();
        if pauses_may_end
            || self.links_want_a_turn()
            || !self.ready.is_empty()
            || !self.resumable.is_empty()
            || !self.dead.is_empty()
            || self.stores.iter().any(|driver| driver.is_ready)
        {
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
        let cluster = self.cluster.deadline_us().map(|at_us| {
            let wait_us = at_us.saturating_sub(cluster::now_us());
            Instant::now() + Duration::from_micros(wait_us)
        });
        let held = if self.held.is_empty() {
            None
        } else {
            self.holds_end()
        };
        let all = [stores, drain, held, self.next_sweep, cluster];
        all.into_iter().flatten().min()
    }

    /// The drain has come to its last step: nothing more is written.
    pub(super) fn stores_are_closing(&self) -> bool {
        self.drain
            .as_ref()
            .is_some_and(|drain| drain.closing.is_some())
    }

    pub(super) fn go_on_draining(&mut self) {
        let idle = self
            .operations
            .iter()
            .all(|(_, op)| !matches!(op, Operation::Request(_) | Operation::Replicated(_)));
        let idle = idle && self.paused.is_empty() && self.ready.is_empty();
        let sent = self.connections.iter().all(|(_, c)| c.all_sent());
        let Some(drain) = &mut self.drain else { return };
        if !(idle && sent) && self.now < drain.give_up_at {
            return;
        }
        if drain.closing.is_none() && idle && self.now < drain.give_up_at && !self.close_heads() {
            return;
        }
        self.give_heads_up();
        let Some(drain) = &mut self.drain else { return };
        match &mut drain.closing {
            None => {
                self.end_incoming_links();
                if !idle {
                    tracing::warn!("stopping with requests that are not answered");
                }
                // What is still under way may be written and answered after this: then the store must not say that it
                // was closed in order, for its tail would not be looked at.
                let answers = (0..self.stores.len())
                    .map(|store| {
                        self.task(
                            store,
                            |s, op| if idle { s.close(op) } else { s.checkpoint(op) },
                        )
                    })
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
