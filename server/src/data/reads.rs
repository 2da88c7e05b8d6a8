//! Reads, block status, flushes and prefetching: what changes nothing.

use ashlar_core::nbd::reply::{self, Allocation, Status};
use ashlar_core::nbd::request::Command as Asked;
use ashlar_core::nbd::session::ReplyStyle;
use ashlar_core::store::{ReadOutcome, StoreError};
use ashlar_core::units::BLOCK_BYTES;
use ashlar_core::volume::{Access, Began, Pieces, StoreSlot, blocks_touched};
use smallvec::SmallVec;

use super::execute::{note_holes, refusal_text};
use super::operation::{Operation, Request, Work, op_id, refusal_of};
use super::receiver::payload_start;
use super::thread::DataThread;

/// Chunks whose index a CACHE request fetches: 64 GiB of volume, more than the leaf cache holds.
const CACHE_CHUNKS: usize = 1024;

impl DataThread {
    // -- reads

    pub(super) fn read(&mut self, mut request: Request) {
        let Some(range) = blocks_touched(request.reply.offset, request.length) else {
            return self.answer_done(request);
        };
        let key = self.operations.vacant_key();
        match self.volumes[request.volume].head.admission_mut().begin(
            Access::Shared,
            range,
            key as u64,
        ) {
            Ok(Began::Now(started)) => {
                request.ticket = Some(started.ticket);
                self.start_read(key, request);
            }
            Ok(Began::Waiting(ticket)) => {
                request.ticket = Some(ticket);
                // Held now, or reads that wait behind one write would all be let in and allocate when it ends.
                let buffer = self.hold(request.connection, read_bytes(&request));
                request.buffer = Some(buffer);
                self.operations.insert(Operation::Request(request));
            }
            Err(refusal) => self.answer_error(request, refusal_text(refusal)),
        }
    }

    /// Reads every piece; `key` is where the request is put if that takes longer.
    pub(super) fn start_read(&mut self, key: usize, mut request: Request) {
        let offset = request.reply.offset;
        let buffer = match request.buffer.take() {
            Some(buffer) => buffer,
            None => self.hold(request.connection, read_bytes(&request)),
        };
        let mut at = 0usize;
        for piece in Pieces::new(offset, request.length) {
            let len = piece.blocks as usize * BLOCK_BYTES;
            let first = (at / BLOCK_BYTES) as u32;
            // SAFETY: inside the buffer; pieces do not overlap.
            let target = unsafe { std::slice::from_raw_parts_mut(buffer.at(at), len) };
            let (store, extent) = self.volumes[request.volume].place(piece.chunk);
            // SAFETY: the buffer stays with the request, which stays until all its parts are done.
            match unsafe {
                self.stores[store]
                    .store
                    .read(op_id(key, first), extent, piece.first_block, target)
            } {
                Ok(ReadOutcome::Done(info)) => note_holes(&mut request, first, &info),
                Ok(ReadOutcome::Pending) => request.pending += 1,
                Err(error) => {
                    request.error.get_or_insert(refusal_of(&error));
                }
            }
            at += len;
        }
        request.buffer = Some(buffer);
        if request.pending == 0 {
            self.finish(request);
        } else {
            self.put(key, request);
        }
    }

    pub(super) fn answer_read(&mut self, mut request: Request) {
        let Some(buffer) = request.buffer.take() else {
            return;
        };
        let Work::Read {
            dont_fragment,
            mut holes,
        } = std::mem::replace(&mut request.work, Work::Plain)
        else {
            return;
        };
        let to = request.reply;
        let length = request.length as usize;
        let skip = payload_start(to.offset);
        let Some(key) = self.connection_of(&request) else {
            self.give(request.connection, buffer);
            return self.forget(&request);
        };
        let connection = &mut self.connections[key as usize];
        if to.style == ReplyStyle::Simple || dont_fragment || holes.is_empty() {
            let header = if to.style == ReplyStyle::Simple {
                reply::read_simple(to)
            } else {
                reply::read_data(to, to.offset, length as u32, true)
            };
            connection.outbox.push(&header);
            connection.outbox.push_payload(buffer, skip, length);
        } else {
            // Runs in bytes of the request, holes and data by turns.
            holes.sort_unstable();
            let mut runs: SmallVec<[(usize, usize, bool); 8]> = SmallVec::new();
            let mut at = 0;
            for (first, count) in holes {
                let from = (first as usize * BLOCK_BYTES)
                    .saturating_sub(skip)
                    .min(length);
                let to = ((first + count) as usize * BLOCK_BYTES - skip).min(length);
                if from > at {
                    runs.push((at, from, false));
                }
                match runs.last_mut() {
                    Some((_, end, true)) if *end == from => *end = to,
                    _ => runs.push((from, to, true)),
                }
                at = to;
            }
            if at < length {
                runs.push((at, length, false));
            }
            let last = runs.len() - 1;
            let data_runs = runs.iter().filter(|run| !run.2).count();
            let mut buffer = Some(buffer);
            let mut data_seen = 0;
            for (i, (from, until, hole)) in runs.into_iter().enumerate() {
                let (at, len) = (to.offset + from as u64, (until - from) as u32);
                if hole {
                    connection
                        .outbox
                        .push(&reply::read_hole(to, at, len, i == last));
                    continue;
                }
                connection
                    .outbox
                    .push(&reply::read_data(to, at, len, i == last));
                data_seen += 1;
                if data_seen == data_runs {
                    if let Some(buffer) = buffer.take() {
                        connection
                            .outbox
                            .push_payload(buffer, skip + from, len as usize);
                    }
                } else if let Some(buffer) = &buffer {
                    // SAFETY: the last run of data, which comes, takes the buffer along.
                    unsafe {
                        connection
                            .outbox
                            .push_early(buffer, skip + from, len as usize);
                    }
                }
            }
            if let Some(buffer) = buffer {
                connection.held_bytes -= buffer.capacity();
                self.pool.give(buffer);
            }
        }
        self.count_answer(key, &request, true);
    }

    // -- flush, status, prefetch

    pub(super) fn flush(&mut self, mut request: Request) {
        let key = self.operations.vacant_key();
        let volume = &mut self.volumes[request.volume];
        let plan = volume.head.admission().flush();
        let slots: SmallVec<[StoreSlot; 4]> = plan.stores().collect();
        if slots.is_empty() {
            self.answer_done(request);
            return;
        }
        volume.unlocked += 1;
        let mut stores: SmallVec<[usize; 4]> = slots
            .iter()
            .map(|slot| volume.stores[usize::from(slot.0)])
            .collect();
        // A store may come more than once in a placement; one sync is enough.
        stores.sort_unstable();
        stores.dedup();
        request.pending = stores.len() as u32;
        request.work = Work::Flush(plan);
        self.put(key, request);
        for store in stores {
            self.stores[store].store.flush(op_id(key, 0));
        }
    }

    pub(super) fn block_status(&mut self, mut request: Request, command: Asked) {
        let Asked::BlockStatus { one_extent, .. } = command else {
            return;
        };
        request.work = Work::Status { one_extent };
        if let Some(buffer) = request.buffer.take() {
            self.give(request.connection, buffer);
        }
        let key = self.operations.vacant_key();
        self.volumes[request.volume].unlocked += 1;
        self.put(key, request);
        self.go_on_with_status(key);
    }

    pub(super) fn go_on_with_status(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get(key) else {
            return;
        };
        let Work::Status { one_extent } = request.work else {
            return;
        };
        let (volume, to, length) = (request.volume, request.reply, request.length);
        let mut status = Status::new(to, length, one_extent);
        if let Some(replicated) = self.replicated(volume) {
            match self.replicated_status(replicated, &mut status, (to.offset, length)) {
                Ok(()) => self.answer_status(key, volume, status),
                Err((store, extent, first_block, blocks)) => {
                    let driver = &mut self.stores[store];
                    driver.store.load_extents(extent, first_block, blocks);
                    driver.waiting_for_index.push(key);
                }
            }
            return;
        }
        'pieces: for piece in Pieces::new(to.offset, length) {
            let (store, extent) = self.volumes[volume].place(piece.chunk);
            let driver = &mut self.stores[store];
            if let Some(poisoned) = driver.store.status().poisoned {
                let error = refusal_of(&StoreError::Poisoned(poisoned));
                if let Operation::Request(mut request) = self.operations.remove(key) {
                    request.error = Some(error);
                    self.finish(request);
                }
                return;
            }
            let Some(runs) = driver
                .store
                .extents(extent, piece.first_block, piece.blocks)
            else {
                driver
                    .store
                    .load_extents(extent, piece.first_block, piece.blocks);
                driver.waiting_for_index.push(key);
                return;
            };
            let mut skip = u64::from(piece.skip_bytes);
            for (mapped, blocks) in runs {
                let bytes = u64::from(blocks) * BLOCK_BYTES as u64 - std::mem::take(&mut skip);
                let allocation = if mapped {
                    Allocation::Data
                } else {
                    Allocation::Hole
                };
                if !status.push(bytes, allocation) {
                    break 'pieces;
                }
            }
        }
        self.answer_status(key, volume, status);
    }

    fn answer_status(&mut self, key: usize, volume: usize, status: Status) {
        let Operation::Request(request) = self.operations.remove(key) else {
            return;
        };
        self.volumes[volume].unlocked -= 1;
        if let Some(key) = self.connection_of(&request) {
            self.connections[key as usize]
                .outbox
                .push_with(|out| status.finish(out));
            self.count_answer(key, &request, true);
        } else {
            self.volumes[volume].metrics.in_flight.sub(1);
        }
        self.volume_may_close(volume);
    }

    /// CACHE: fetches the index of the range, so that reads of it need one disk read each.
    pub(super) fn prefetch(&mut self, volume: usize, offset: u64, length: u64) {
        for piece in Pieces::new(offset, length).take(CACHE_CHUNKS) {
            let (store, extent) = if self.replicated(volume).is_some() {
                let extent = self.volumes[volume].extent(piece.chunk);
                match self.copy_here(volume, extent) {
                    Some(store) => (store, extent),
                    None => continue,
                }
            } else {
                self.volumes[volume].place(piece.chunk)
            };
            self.stores[store]
                .store
                .load_extents(extent, piece.first_block, piece.blocks);
        }
    }
}

/// Bytes of the whole blocks that a read touches.
fn read_bytes(request: &Request) -> usize {
    let skip = payload_start(request.reply.offset);
    (skip + request.length as usize).next_multiple_of(BLOCK_BYTES)
}
