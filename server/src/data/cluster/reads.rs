//! Reads of replicated volumes: which copy is asked, what if it has none to give, and what if it is no longer asked.

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{LinkId, ReadAdmission, ReplicaMask, SessionRef};
use ashlar_core::store::{ReadInfo, ReadOutcome, StoreError};
use ashlar_core::units::BLOCK_BYTES;
use smallvec::SmallVec;

use super::super::execute::note_holes;
use super::super::operation::{Operation, op_id};
use super::super::thread::DataThread;
use super::head::Way;
use super::replica::{ReplicaWork, status_of};
use super::requests::{Stage, error_of};
use super::{Answer, Asked, VolumeRef};

impl DataThread {
    pub(super) fn ask_read(&mut self, key: usize, index: u32) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        if entry.is_over {
            return;
        }
        let volume = entry.volume;
        let piece = &entry.pieces[index as usize];
        let (extent, first_block, count) = (piece.extent, piece.first_block, piece.count);
        let (tried, at, serial) = (piece.tried, piece.at, entry.serial);
        let admission = self.with_head(volume, |head, now_us, _| {
            head.admit_read(head.set_of(extent.chunk), tried, now_us)
        });
        let (member, place) = match admission {
            Some(ReadAdmission::From { member, place }) => (member, place),
            Some(ReadAdmission::Wait) => {
                if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) {
                    entry.pieces[index as usize].tried = ReplicaMask::default();
                }
                return self.wait_piece(volume, key, index);
            }
            Some(ReadAdmission::Exhausted) => {
                if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) {
                    let error = error_of(entry.pieces[index as usize].refusal);
                    entry.request.error.get_or_insert(error);
                }
                return self.piece_done(key, index);
            }
            Some(ReadAdmission::Stopped) | None => {
                return self.end_replicated(key, Some(RequestError::Fenced));
            }
        };
        let Some(session) = self.replication(volume).and_then(|r| r.session(member)) else {
            // It just ended; the head will say when to ask again.
            return self.wait_piece(volume, key, index);
        };
        if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) {
            entry.pieces[index as usize].asked = Some((session.tag, place));
        }
        let asked = Asked::Read {
            key,
            serial,
            piece: index,
        };
        let Way::Here(replica) = session.way else {
            let work = ReplicaWork::Read {
                extent,
                first_block,
                count,
            };
            return self.ask(volume, member, asked, work);
        };
        self.read_here(key, index, (replica, session.tag, session.epoch), at);
    }

    /// Reads from a store of this thread straight into the request's buffer.
    fn read_here(
        &mut self,
        key: usize,
        index: u32,
        (replica, tag, epoch): (usize, u32, ashlar_core::units::Epoch),
        at: usize,
    ) {
        let session = SessionRef {
            link: LinkId::LOCAL,
            tag,
        };
        let Some(found) = self.cluster.replicas.get_mut(replica) else {
            return;
        };
        if !found.acceptor.admit(session, epoch) {
            return self.piece_read_here(key, index, Err(Status::Fenced));
        }
        let store = found.store;
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return self.replica_finished(replica);
        };
        let piece = &entry.pieces[index as usize];
        let (extent, first_block) = (piece.extent, piece.first_block);
        let bytes = piece.count as usize * BLOCK_BYTES;
        let Some(buffer) = &entry.request.buffer else {
            return self.replica_finished(replica);
        };
        // SAFETY: pieces lie apart from each other inside the buffer.
        let target = unsafe { std::slice::from_raw_parts_mut(buffer.at(at), bytes) };
        // SAFETY: the buffer stays with the request, which stays in the table until all its pieces are done.
        let outcome = unsafe {
            self.stores[store]
                .store
                .read(op_id(key, index), extent, first_block, target)
        };
        match outcome {
            Ok(ReadOutcome::Pending) => {
                if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) {
                    entry.reads_here += 1;
                    entry.pieces[index as usize].is_here = true;
                }
            }
            Ok(ReadOutcome::Done(info)) => {
                self.replica_finished(replica);
                self.piece_read_here(key, index, Ok(info));
            }
            Err(error) => {
                self.replica_finished(replica);
                self.piece_read_here(key, index, Err(status_of(&error)));
            }
        }
    }

    /// The store of this thread ended a read of a piece.
    pub(in super::super) fn replicated_io_done(
        &mut self,
        store: usize,
        key: usize,
        index: u32,
        result: Result<ReadInfo, StoreError>,
    ) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        entry.reads_here -= 1;
        entry.pieces[index as usize].is_here = false;
        let (is_over, is_last) = (entry.is_over, entry.reads_here == 0);
        let id = self.volumes[entry.volume.key].spec.id;
        if let Some(replica) = self.cluster.replica_keys.get(&(id, store)).copied() {
            self.replica_finished(replica);
        }
        if is_over {
            if is_last {
                let error = match self.operations.get(key) {
                    Some(Operation::Replicated(entry)) => entry.request.error,
                    _ => None,
                };
                self.end_replicated(key, error);
            }
            return;
        }
        self.piece_read_here(key, index, result.map_err(|error| status_of(&error)));
    }

    fn piece_read_here(&mut self, key: usize, index: u32, result: Result<ReadInfo, Status>) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        let (volume, tag) = (entry.volume, entry.pieces[index as usize].asked);
        let is_current = self.is_session(volume, tag);
        match result {
            Ok(info) if is_current => {
                if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key)
                    && entry.stage == Stage::Body
                {
                    let first = (entry.pieces[index as usize].at / BLOCK_BYTES) as u32;
                    note_holes(&mut entry.request, first, &info);
                }
                self.piece_was_read(key, index);
            }
            Ok(_) => self.read_again(key, index),
            Err(status) => self.piece_not_read(key, index, status, is_current),
        }
    }

    fn is_session(&mut self, volume: VolumeRef, asked: Option<(u32, u8)>) -> bool {
        let Some((tag, _)) = asked else { return false };
        self.replication(volume)
            .is_some_and(|replication| replication.has_session(tag))
    }

    /// A peer answered a read of a piece.
    pub(super) fn piece_read(
        &mut self,
        key: usize,
        serial: u64,
        index: u32,
        is_current: bool,
        answer: Answer,
    ) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return self.forget_answer(answer);
        };
        if entry.serial != serial {
            return self.forget_answer(answer);
        }
        let piece = &entry.pieces[index as usize];
        let (at, bytes, count) = (piece.at, piece.count as usize * BLOCK_BYTES, piece.count);
        let in_body = entry.stage == Stage::Body;
        match answer {
            Answer::Data {
                buffer: found,
                count: given,
            } if is_current && given == count => {
                if let Some(target) = &mut entry.request.buffer {
                    match &found {
                        // SAFETY: filled when the answer was received.
                        Some(found) => target.put(at, unsafe { found.bytes(0, bytes) }),
                        None => target.zero(at, bytes),
                    }
                }
                if found.is_none() && in_body {
                    let info = ReadInfo {
                        holes: smallvec::smallvec![(0, count)],
                    };
                    note_holes(&mut entry.request, (at / BLOCK_BYTES) as u32, &info);
                }
                if let Some(found) = found {
                    self.pool.give(found);
                }
                self.piece_was_read(key, index);
            }
            other => {
                let status = self.unexpected(other);
                self.piece_not_read(key, index, status, is_current);
            }
        }
    }

    fn piece_was_read(&mut self, key: usize, index: u32) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        let piece = &entry.pieces[index as usize];
        if piece.is_damaged {
            let (extent, first_block, count) = (piece.extent, piece.first_block, piece.count);
            self.with_head(entry.volume, |head, _, actions| {
                head.repair(None, extent, first_block, count, actions);
            });
        }
        self.piece_done(key, index);
    }

    fn piece_not_read(&mut self, key: usize, index: u32, status: Status, is_current: bool) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        let piece = &mut entry.pieces[index as usize];
        if let Some((_, place)) = piece.asked.take()
            && is_current
        {
            piece.tried = ReplicaMask(piece.tried.0 | 1 << place);
            piece.is_damaged |= matches!(status, Status::Corrupt | Status::Device);
            piece.refusal = status;
        }
        self.ask_read(key, index);
    }

    fn read_again(&mut self, key: usize, index: u32) {
        if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key)
            && let Some(piece) = entry.pieces.get_mut(index as usize)
        {
            piece.asked = None;
            self.ask_read(key, index);
        }
    }

    /// Reads that were asked on a session that ended: those of peers will not be answered, those of this thread's stores
    /// will be, and are then asked again.
    pub(super) fn reads_again(&mut self, volume: VolumeRef, tag: u32) {
        for key in self.requests_of(volume) {
            let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
                continue;
            };
            let mut again: SmallVec<[u32; 4]> = SmallVec::new();
            for (index, piece) in entry.pieces.iter().enumerate() {
                let asked_there = piece.asked.is_some_and(|(asked, _)| asked == tag);
                if asked_there && !piece.is_done && !piece.is_here && !entry.is_over {
                    again.push(index as u32);
                }
            }
            for index in again {
                self.read_again(key, index);
            }
        }
    }
}
