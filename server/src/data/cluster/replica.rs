//! Replicas at this thread's stores: whose work they take, and the work.

use ashlar_core::replication::wire::{LeafStates, MAX_ROWS, RowVersions, Rows, RowsQuery, Status};
use ashlar_core::replication::{
    Acceptor, AcceptorAction, AcceptorEvent, Rules, Seal, SessionRef, StartedWith,
};
use ashlar_core::store::{ExtentKey, ReadInfo, ReadOutcome, StoreError, WriteError};
use ashlar_core::units::{BLOCK_BYTES, ChunkIndex, Epoch, LayerId, Version, VolumeId};

use super::super::operation::{Operation, op_id};
use super::super::pool::Buffer;
use super::super::thread::DataThread;
use super::tells::ClusterTell;
use super::{Answer, Origin};

/// A volume's replica at one of the thread's stores.
pub(in super::super) struct Replica {
    pub(in super::super) volume: VolumeId,
    pub(in super::super) store: usize,
    pub(super) acceptor: Acceptor,
    /// The layer whose chunks it holds.
    pub(in super::super) layer: LayerId,
}

impl Replica {
    /// Whom it follows, durable or about to be.
    pub(in super::super) fn seal(&self) -> Seal {
        self.acceptor.seal()
    }
}

/// A piece of work as it comes.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum ReplicaWork<'a> {
    /// `crcs`: what the head computed, little-endian, where they have to be compared.
    Write {
        extent: ExtentKey,
        first_block: u32,
        version: Version,
        crcs: Option<&'a [u8]>,
        data: &'a [u8],
        durable: bool,
    },
    Zero {
        extent: ExtentKey,
        first_block: u32,
        count: u32,
        version: Version,
        durable: bool,
    },
    Read {
        extent: ExtentKey,
        first_block: u32,
        count: u32,
    },
    Flush,
    Rows {
        from: ChunkIndex,
        query: RowsQuery,
    },
    Leaf {
        extent: ExtentKey,
        leaf: u32,
    },
}

impl ReplicaWork<'_> {
    /// The layer whose blocks it names, if it names any.
    fn layer(&self) -> Option<LayerId> {
        match self {
            ReplicaWork::Write { extent, .. }
            | ReplicaWork::Zero { extent, .. }
            | ReplicaWork::Read { extent, .. }
            | ReplicaWork::Leaf { extent, .. } => Some(extent.layer),
            ReplicaWork::Flush | ReplicaWork::Rows { .. } => None,
        }
    }
}

/// A piece of work that could not be done in the turn it came in.
pub(in super::super) struct ReplicaOperation {
    pub(in super::super) replica: usize,
    origin: Origin,
    store: usize,
    work: Waiting,
}

enum Waiting {
    /// The tail is full, or durability is awaited (`taken` is everything then).
    Write {
        extent: ExtentKey,
        first_block: u32,
        version: Version,
        buffer: Option<Buffer>,
        count: u32,
        taken: u32,
        durable: bool,
    },
    Zero {
        extent: ExtentKey,
        first_block: u32,
        version: Version,
        count: u32,
        taken: u32,
        durable: bool,
    },
    Read {
        buffer: Buffer,
        count: u32,
        holes: u32,
    },
    Flush,
    Leaf {
        extent: ExtentKey,
        leaf: u32,
    },
}

pub(super) fn status_of(error: &StoreError) -> Status {
    match error {
        StoreError::Poisoned(_) => Status::Poisoned,
        StoreError::Closed => Status::Refused,
        StoreError::Device(_) => Status::Device,
        StoreError::Corrupt { .. } | StoreError::Lost { .. } => Status::Corrupt,
        StoreError::DirectoryFull => Status::NoSpace,
    }
}

/// What a store said to a change, of which `taken` blocks were in it before.
fn refused(error: WriteError, taken: u32) -> Result<u32, Status> {
    match error {
        WriteError::Busy { accepted } => Ok(accepted),
        // Part of it is there: the others may have none of it, so this copy must not pass for one that refused.
        WriteError::NoSpace if taken > 0 => Err(Status::Device),
        WriteError::NoSpace => Err(Status::NoSpace),
        WriteError::Failed(error) => Err(status_of(&error)),
    }
}

/// Whether each block is what its checksum says.
pub(super) fn arrived_whole(crcs: &[u8], data: &[u8]) -> bool {
    crcs.chunks_exact(4)
        .zip(data.chunks_exact(BLOCK_BYTES))
        .all(|(crc, block)| crc32fast::hash(block).to_le_bytes() == *crc)
}

impl DataThread {
    /// Whether a volume's replica at a store may hold this layer: each volume has layers of its own.
    pub(super) fn may_be_replica_of(&self, volume: VolumeId, store: usize, layer: LayerId) -> bool {
        match self.cluster.replica_keys.get(&(volume, store)) {
            Some(key) => self.cluster.replicas[*key].layer == layer,
            None => {
                let mut replicas = self.cluster.replicas.iter();
                !replicas.any(|(_, replica)| replica.store == store && replica.layer == layer)
            }
        }
    }

    /// The replica of a volume at a store; made when a head first asks for it.
    pub(super) fn replica_of(&mut self, volume: VolumeId, store: usize, layer: LayerId) -> usize {
        if let Some(key) = self.cluster.replica_keys.get(&(volume, store)) {
            return *key;
        }
        let driver = &self.stores[store];
        let highest = driver.store.highest_version(layer);
        let store_epoch = (highest != Version::NONE).then(|| highest.epoch());
        let started = StartedWith {
            seal: self.cluster.seals.remove(&(volume, driver.id)),
            store_epoch,
            boot: self.cluster.boot,
            store_failed: driver.lost_answers,
        };
        let key = self.cluster.replicas.insert(Replica {
            volume,
            store,
            acceptor: Acceptor::new(Rules::default(), started),
            layer,
        });
        self.cluster.replica_keys.insert((volume, store), key);
        key
    }

    pub(super) fn acceptor_event(&mut self, replica: usize, event: AcceptorEvent) {
        let mut actions = Vec::new();
        let Some(entry) = self.cluster.replicas.get_mut(replica) else {
            return;
        };
        entry.acceptor.on_event(event, &mut actions);
        tracing::trace!(replica, ?event, ?actions, "a replica is told");
        self.carry_out_acceptor(replica, actions);
    }

    fn carry_out_acceptor(&mut self, replica: usize, actions: Vec<AcceptorAction>) {
        for action in actions {
            match action {
                AcceptorAction::Persist { serial, seal } => {
                    let entry = &self.cluster.replicas[replica];
                    let (volume, store) = (entry.volume, self.stores[entry.store].id);
                    self.cluster.tell(ClusterTell::Persist {
                        volume,
                        store,
                        serial,
                        seal,
                    });
                }
                AcceptorAction::Opened {
                    session,
                    epoch,
                    lost_power,
                } => self.opened(session, epoch, lost_power),
                AcceptorAction::Refused {
                    session,
                    status,
                    epoch,
                } => self.open_refused(session, status, epoch),
                AcceptorAction::Fenced { session, epoch } => self.fenced(session, epoch),
                AcceptorAction::Done {
                    session,
                    op,
                    status,
                } => self.acceptor_done(session, op, status),
            }
        }
    }

    /// Takes a piece of work, if it comes from whom it may come. `epoch`: the one it was sent under.
    pub(in super::super) fn replica_work(
        &mut self,
        replica: usize,
        session: SessionRef,
        epoch: Epoch,
        origin: Origin,
        work: ReplicaWork<'_>,
    ) {
        let Some(entry) = self.cluster.replicas.get_mut(replica) else {
            return self.answer(origin, Answer::Status(Status::Fenced));
        };
        let (store, layer) = (entry.store, entry.layer);
        // A session is one volume's: what it says of another's blocks was not decided by that one's acceptor.
        if work.layer().is_some_and(|named| named != layer) {
            return self.answer(origin, Answer::Status(Status::Refused));
        }
        if !entry.acceptor.admit(session, epoch) {
            return self.answer(origin, Answer::Status(Status::Fenced));
        }
        match work {
            ReplicaWork::Write {
                extent,
                first_block,
                version,
                crcs,
                data,
                durable,
            } => {
                if crcs.is_some_and(|crcs| !arrived_whole(crcs, data)) {
                    return self.work_done(replica, origin, Answer::Status(Status::Garbled));
                }
                let count = (data.len() / BLOCK_BYTES) as u32;
                let key = self.operations.vacant_key();
                let driver = &mut self.stores[store];
                let result = if driver.parked.is_empty() {
                    let op = durable.then_some(op_id(key, 0));
                    driver.store.write(extent, first_block, data, version, op)
                } else {
                    Err(WriteError::Busy { accepted: 0 })
                };
                let (taken, buffer) = match result.map_err(|error| refused(error, 0)) {
                    Ok(()) if !durable => {
                        return self.work_done(replica, origin, Answer::Status(Status::Ok));
                    }
                    Ok(()) => (count, None),
                    Err(Ok(accepted)) => {
                        let mut buffer = self.pool.take(data.len());
                        buffer.put(0, data);
                        (accepted, Some(buffer))
                    }
                    Err(Err(status)) => {
                        return self.work_done(replica, origin, Answer::Status(status));
                    }
                };
                if taken < count {
                    self.park(store, key);
                }
                self.operations.insert(Operation::Replica(ReplicaOperation {
                    replica,
                    origin,
                    store,
                    work: Waiting::Write {
                        extent,
                        first_block,
                        version,
                        buffer,
                        count,
                        taken,
                        durable,
                    },
                }));
            }
            ReplicaWork::Zero {
                extent,
                first_block,
                count,
                version,
                durable,
            } => {
                let key = self.operations.insert(Operation::Replica(ReplicaOperation {
                    replica,
                    origin,
                    store,
                    work: Waiting::Zero {
                        extent,
                        first_block,
                        version,
                        count,
                        taken: 0,
                        durable,
                    },
                }));
                if self.stores[store].parked.is_empty() {
                    self.resume_replica(key);
                } else {
                    self.park(store, key);
                }
            }
            ReplicaWork::Read {
                extent,
                first_block,
                count,
            } => self.replica_read(replica, origin, store, extent, first_block, count),
            ReplicaWork::Flush => {
                let key = self.operations.insert(Operation::Replica(ReplicaOperation {
                    replica,
                    origin,
                    store,
                    work: Waiting::Flush,
                }));
                self.stores[store].store.flush(op_id(key, 0));
            }
            ReplicaWork::Rows { from, query } => {
                let rows = self.rows(store, layer, from, query);
                self.work_done(replica, origin, rows);
            }
            ReplicaWork::Leaf { extent, leaf } => {
                let key = self.operations.insert(Operation::Replica(ReplicaOperation {
                    replica,
                    origin,
                    store,
                    work: Waiting::Leaf { extent, leaf },
                }));
                self.resume_replica(key);
            }
        }
    }

    fn replica_read(
        &mut self,
        replica: usize,
        origin: Origin,
        store: usize,
        extent: ExtentKey,
        first_block: u32,
        count: u32,
    ) {
        let buffer = self.pool.take(count as usize * BLOCK_BYTES);
        let key = self.operations.vacant_key();
        // SAFETY: the buffer is as large and nobody else has it.
        let target =
            unsafe { std::slice::from_raw_parts_mut(buffer.at(0), count as usize * BLOCK_BYTES) };
        // SAFETY: the buffer stays with the operation until the store has ended it.
        let outcome = unsafe {
            self.stores[store]
                .store
                .read(op_id(key, 0), extent, first_block, target)
        };
        match outcome {
            Ok(ReadOutcome::Done(info)) => {
                let answer = self.read_answer(buffer, count, holes_in(&info));
                self.work_done(replica, origin, answer);
            }
            Ok(ReadOutcome::Pending) => {
                self.operations.insert(Operation::Replica(ReplicaOperation {
                    replica,
                    origin,
                    store,
                    work: Waiting::Read {
                        buffer,
                        count,
                        holes: 0,
                    },
                }));
            }
            Err(error) => {
                self.pool.give(buffer);
                self.work_done(replica, origin, Answer::Status(status_of(&error)));
            }
        }
    }

    fn rows(&self, store: usize, layer: LayerId, from: ChunkIndex, query: RowsQuery) -> Answer {
        let driver = &self.stores[store].store;
        if driver.status().poisoned.is_some() {
            return Answer::Status(Status::Poisoned);
        }
        let wanted = |chunk| query.names(chunk);
        let (found, more) = driver.row_versions(layer, from, wanted, query.floor, MAX_ROWS);
        let rows = found.into_iter();
        let rows = rows.map(|(chunk, leaves)| RowVersions { chunk, leaves });
        let rows = rows.collect();
        Answer::Rows(Rows { rows, more })
    }

    /// An operation of a replica in the table may go on: its store has room, or an index page.
    pub(in super::super) fn resume_replica(&mut self, key: usize) {
        let Some(Operation::Replica(operation)) = self.operations.get_mut(key) else {
            return;
        };
        let store = operation.store;
        let driver = &mut self.stores[store];
        let step = match &mut operation.work {
            Waiting::Write {
                extent,
                first_block,
                version,
                buffer,
                count,
                taken,
                durable,
            } => {
                let from = *taken as usize * BLOCK_BYTES;
                let left = (*count - *taken) as usize * BLOCK_BYTES;
                let data = match buffer {
                    // SAFETY: filled when the operation was put into the table.
                    Some(buffer) => unsafe { buffer.bytes(from, left) },
                    None => &[],
                };
                let op = durable.then_some(op_id(key, 0));
                let result = driver
                    .store
                    .write(*extent, *first_block + *taken, data, *version, op);
                step_of(result, taken, *count, *durable)
            }
            Waiting::Zero {
                extent,
                first_block,
                version,
                count,
                taken,
                durable,
            } => {
                let op = durable.then_some(op_id(key, 0));
                let result = driver.store.write_zeroes(
                    *extent,
                    *first_block + *taken,
                    *count - *taken,
                    *version,
                    op,
                );
                step_of(result, taken, *count, *durable)
            }
            Waiting::Leaf { extent, leaf } => match driver.store.leaf_states(*extent, *leaf) {
                Ok(Some(states)) => Step::Answer(Answer::Leaf(LeafStates(states))),
                Ok(None) => Step::Index,
                Err(error) => Step::Answer(Answer::Status(status_of(&error))),
            },
            Waiting::Read { .. } | Waiting::Flush => Step::Durable,
        };
        match step {
            Step::Busy => self.park(store, key),
            Step::Index => self.stores[store].waiting_for_index.push(key),
            Step::Durable => {}
            Step::Answer(answer) => self.replica_ended(key, answer),
        }
    }

    /// The store ended an operation of a replica.
    pub(in super::super) fn replica_io_done(
        &mut self,
        key: usize,
        result: Result<ReadInfo, StoreError>,
    ) {
        let Some(Operation::Replica(operation)) = self.operations.get_mut(key) else {
            return;
        };
        if let (Waiting::Read { holes, .. }, Ok(info)) = (&mut operation.work, &result) {
            *holes = holes_in(info);
        }
        let answer = Answer::Status(match &result {
            Ok(_) => Status::Ok,
            Err(error) => status_of(error),
        });
        self.replica_ended(key, answer);
    }

    /// Takes an operation out of the table and answers it.
    fn replica_ended(&mut self, key: usize, answer: Answer) {
        let Operation::Replica(operation) = self.operations.remove(key) else {
            return;
        };
        let ReplicaOperation {
            replica,
            origin,
            work,
            ..
        } = operation;
        let answer = match (work, answer) {
            (
                Waiting::Read {
                    buffer,
                    count,
                    holes,
                },
                Answer::Status(Status::Ok),
            ) => self.read_answer(buffer, count, holes),
            (Waiting::Read { buffer, .. }, answer) => {
                self.pool.give(buffer);
                answer
            }
            (Waiting::Write { buffer, .. }, answer) => {
                if let Some(buffer) = buffer {
                    self.pool.give(buffer);
                }
                answer
            }
            (_, answer) => answer,
        };
        self.work_done(replica, origin, answer);
    }

    /// Where everything was a hole nothing need be sent.
    fn read_answer(&mut self, buffer: Buffer, count: u32, holes: u32) -> Answer {
        if holes < count {
            return Answer::Data {
                count,
                buffer: Some(buffer),
            };
        }
        self.pool.give(buffer);
        Answer::Data {
            count,
            buffer: None,
        }
    }

    /// A piece of work that was admitted is at its end.
    pub(in super::super) fn work_done(&mut self, replica: usize, origin: Origin, answer: Answer) {
        self.replica_finished(replica);
        self.answer(origin, answer);
    }

    /// The store has ended something that the acceptor admitted.
    pub(in super::super) fn replica_finished(&mut self, replica: usize) {
        let mut actions = Vec::new();
        if let Some(entry) = self.cluster.replicas.get_mut(replica) {
            entry.acceptor.finished(&mut actions);
        }
        if !actions.is_empty() {
            self.carry_out_acceptor(replica, actions);
        }
    }
}

enum Step {
    /// The tail is full again.
    Busy,
    /// An index page is on its way.
    Index,
    /// Durability is awaited.
    Durable,
    Answer(Answer),
}

fn step_of(result: Result<(), WriteError>, taken: &mut u32, count: u32, durable: bool) -> Step {
    match result.map_err(|error| refused(error, *taken)) {
        Ok(()) => {
            *taken = count;
            if durable {
                Step::Durable
            } else {
                Step::Answer(Answer::Status(Status::Ok))
            }
        }
        Err(Ok(accepted)) => {
            *taken += accepted;
            Step::Busy
        }
        Err(Err(status)) => Step::Answer(Answer::Status(status)),
    }
}

fn holes_in(info: &ReadInfo) -> u32 {
    info.holes.iter().map(|(_, count)| count).sum()
}
