//! Requests, from admission by the head to the reply.
//!
//! What can be answered in the turn it came in never enters the table of operations: a write that the tail takes, a
//! read of what is in memory. Everything else becomes an [`Operation`] that a completion, a range lock or a store with
//! room again carries on.

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::nbd::reply::{self, Allocation, ReplyTo, Status};
use ashlar_core::nbd::request::{Command as Asked, Request as Parsed};
use ashlar_core::nbd::session::ReplyStyle;
use ashlar_core::store::{ExtentKey, MAX_WRITE_BLOCKS, ReadInfo, ReadOutcome, StoreError};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS, ChunkIndex, Version};
use ashlar_core::volume::{
    Access, Began, BlockRange, Pieces, Refusal, Started, StoreSlot, Ticket, blocks_touched,
    whole_blocks,
};
use smallvec::SmallVec;
use std::time::Instant;

use super::connection::{ConnectionRef, Phase};
use super::operation::{
    Edge, Edges, NotTaken, Operation, Request, Source, Stage, Work, Write, op_id, refusal_of,
};
use super::pool::Buffer;
use super::receiver::{covering_bytes, payload_start};
use super::thread::DataThread;
use crate::metrics::Command;

/// Blocks of real zeros written at a time.
const ZERO_BLOCKS: usize = MAX_WRITE_BLOCKS;
static ZEROS: Zeros = Zeros([0; ZERO_BLOCKS * BLOCK_BYTES]);

#[repr(align(4096))]
struct Zeros([u8; ZERO_BLOCKS * BLOCK_BYTES]);

/// Zero entries (a chunk each) and real zeros (1 MiB each) one request may cause in a turn.
const STEPS_PER_TURN: usize = 64;
/// Chunks whose index a CACHE request fetches: 64 GiB of volume, more than the leaf cache holds.
const CACHE_CHUNKS: usize = 1024;

/// How far a change got.
enum Progress {
    Complete,
    /// Waits in a store's line, or for its turn; everything is noted.
    Waits,
    Failed(RequestError),
}

/// Which part of a request a read of a store is for, as the part number of its operation id. Smaller numbers are the
/// pieces of a read, named by their first block.
const PART_FIRST_EDGE: u32 = u32::MAX;
const PART_LAST_EDGE: u32 = u32::MAX - 1;

impl DataThread {
    /// Serves one request. `payload` is that of a small write; a large one comes in `buffer`, as its blocks will lie.
    pub(super) fn request(
        &mut self,
        key: u32,
        parsed: Parsed,
        payload: &[u8],
        buffer: Option<Buffer>,
    ) {
        self.metrics.requests.add(1);
        let connection = &mut self.connections[key as usize];
        connection.in_flight += 1;
        if let Some(buffer) = &buffer {
            connection.held_bytes += buffer.capacity();
        }
        let volume = connection.volume;
        let style = connection.session.style;
        self.volumes[volume].metrics.in_flight.add(1);
        let mut request = Request {
            connection: ConnectionRef {
                key,
                serial: connection.serial,
            },
            volume,
            reply: ReplyTo {
                style,
                cookie: parsed.cookie,
                offset: parsed.offset,
            },
            command: label(parsed.command),
            length: parsed.length,
            started: self.now,
            durable: parsed.fua || self.volumes[volume].spec.write_through,
            ticket: None,
            version: Version::NONE,
            buffer,
            pending: 0,
            error: None,
            work: Work::Plain,
        };
        let (offset, length) = (parsed.offset, parsed.length);
        match parsed.command {
            Asked::Flush => self.flush(request),
            Asked::BlockStatus {
                payload_bytes: 1.., ..
            } => {
                let connection = &self.connections[key as usize];
                let completed = match &request.buffer {
                    // SAFETY: the receiver filled it from `payload_start` on with the whole payload.
                    Some(buffer) => parsed.with_status_payload(&connection.session, unsafe {
                        buffer.bytes(payload_start(offset), parsed.payload_bytes() as usize)
                    }),
                    None => parsed.with_status_payload(&connection.session, payload),
                };
                match completed {
                    Ok(completed) => {
                        request.length = completed.length;
                        self.block_status(request, completed.command);
                    }
                    Err(error) => self.answer_error(request, error),
                }
            }
            _ if length == 0 => self.answer_done(request),
            Asked::BlockStatus { .. } => self.block_status(request, parsed.command),
            Asked::Cache => {
                self.prefetch(volume, offset, length);
                self.answer_done(request);
            }
            Asked::Read { dont_fragment } => {
                request.work = Work::Read {
                    dont_fragment,
                    holes: SmallVec::new(),
                };
                self.read(request);
            }
            Asked::Write => {
                let (edges, middle) = Edges::of(offset, length);
                if edges.is_empty() && request.buffer.is_none() {
                    self.write_in_place(request, middle, payload);
                } else {
                    if request.buffer.is_none() {
                        let mut buffer =
                            self.hold(request.connection, covering_bytes(offset, length));
                        buffer.put(payload_start(offset), payload);
                        request.buffer = Some(buffer);
                    }
                    self.change(request, edges, middle, Source::Buffer);
                }
            }
            Asked::Trim => match whole_blocks(offset, length) {
                Some(middle) => self.change(request, Edges::default(), Some(middle), Source::Holes),
                None => self.answer_done(request),
            },
            Asked::WriteZeroes { no_hole, fast_only } => {
                if no_hole && fast_only {
                    // Space can only be kept by writing it.
                    self.answer_error(request, RequestError::NotFast);
                    return;
                }
                let (edges, middle) = Edges::of(offset, length);
                self.change(
                    request,
                    edges,
                    middle,
                    if no_hole {
                        Source::Zeros
                    } else {
                        Source::Holes
                    },
                );
            }
        }
    }

    /// Answers a request that was refused when it was parsed.
    pub(super) fn refuse(
        &mut self,
        key: u32,
        cookie: u64,
        offset: u64,
        _command: u16,
        error: RequestError,
    ) {
        self.metrics.requests.add(1);
        let connection = &mut self.connections[key as usize];
        let to = ReplyTo {
            style: connection.session.style,
            cookie,
            offset,
        };
        connection.outbox.push(&reply::error(to, error));
        self.make_dirty(key);
    }

    // -- reads

    fn read(&mut self, mut request: Request) {
        let Some(range) = blocks_touched(request.reply.offset, request.length) else {
            return self.answer_done(request);
        };
        let key = self.operations.vacant_key();
        match self.volumes[request.volume]
            .head
            .begin(Access::Shared, range, key as u64)
        {
            Ok(Began::Now(started)) => {
                request.ticket = Some(started.ticket);
                self.start_read(key, request);
            }
            Ok(Began::Waiting(ticket)) => {
                request.ticket = Some(ticket);
                self.operations.insert(Operation::Request(request));
            }
            Err(refusal) => self.answer_error(request, refusal_text(refusal)),
        }
    }

    /// Reads every piece; `key` is where the request is put if that takes longer.
    fn start_read(&mut self, key: usize, mut request: Request) {
        let offset = request.reply.offset;
        let skip = payload_start(offset);
        let bytes = (skip + request.length as usize).next_multiple_of(BLOCK_BYTES);
        let buffer = self.hold(request.connection, bytes);
        let mut at = 0usize;
        for piece in Pieces::new(offset, request.length) {
            let len = piece.blocks as usize * BLOCK_BYTES;
            let first = (at / BLOCK_BYTES) as u32;
            // SAFETY: inside the buffer; pieces do not overlap.
            let target = unsafe { std::slice::from_raw_parts_mut(buffer.at(at), len) };
            let (store, extent) = self.place(request.volume, piece.chunk);
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

    fn answer_read(&mut self, mut request: Request) {
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
            self.pool.give(buffer);
            return;
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
                    // Only the last run can take the buffer along; those before it are copied beside the headers.
                    // SAFETY: the store filled the buffer.
                    connection
                        .outbox
                        .push(unsafe { buffer.bytes(skip + from, len as usize) });
                }
            }
            if let Some(buffer) = buffer {
                connection.held_bytes -= buffer.capacity();
                self.pool.give(buffer);
            }
        }
        self.count_answer(key, &request, true);
    }

    // -- changes

    /// A write of whole blocks whose payload lies in the receive buffer: in the common case it goes from there into
    /// the tail and is answered.
    fn write_in_place(&mut self, mut request: Request, middle: Option<BlockRange>, payload: &[u8]) {
        let Some(range) = middle else {
            return self.answer_done(request);
        };
        let key = self.operations.vacant_key();
        let began =
            match self.volumes[request.volume]
                .head
                .begin(Access::Exclusive, range, key as u64)
            {
                Ok(began) => began,
                Err(refusal) => return self.answer_error(request, refusal_text(refusal)),
            };
        let mut taken = 0u64;
        let mut stage = Stage::Waiting;
        match began {
            Began::Now(Started {
                ticket, version, ..
            }) => {
                request.ticket = Some(ticket);
                request.version = version;
                let durable = request.durable.then_some(key);
                match self.store_blocks(
                    request.volume,
                    version,
                    range,
                    &mut taken,
                    payload,
                    durable,
                    &mut request.pending,
                    key,
                ) {
                    Progress::Complete if request.pending == 0 => return self.finish(request),
                    Progress::Complete => stage = Stage::Stored,
                    Progress::Waits => stage = Stage::Storing,
                    Progress::Failed(error) => {
                        request.error = Some(error);
                        if request.pending == 0 {
                            return self.finish(request);
                        }
                        stage = Stage::Stored;
                    }
                }
            }
            Began::Waiting(ticket) => request.ticket = Some(ticket),
        }
        if stage != Stage::Stored {
            let mut buffer = self.hold(request.connection, payload.len());
            buffer.put(0, payload);
            request.buffer = Some(buffer);
        }
        request.work = Work::Write(Write {
            edges: Edges::default(),
            middle,
            source: Source::Buffer,
            taken,
            stage,
        });
        self.put(key, request);
    }

    /// Every other change.
    fn change(
        &mut self,
        mut request: Request,
        mut edges: Edges,
        middle: Option<BlockRange>,
        source: Source,
    ) {
        let key = self.operations.vacant_key();
        let range = match (middle, edges.is_empty()) {
            (Some(middle), true) => Some(middle),
            _ => blocks_touched(request.reply.offset, request.length),
        };
        let Some(range) = range else {
            return self.answer_done(request);
        };
        if !edges.is_empty() {
            if source == Source::Buffer {
                edges.scratch =
                    covering_bytes(request.reply.offset, request.length) - 2 * BLOCK_BYTES;
            } else {
                request.buffer = Some(self.hold(request.connection, 2 * BLOCK_BYTES));
            }
        }
        let began = self.volumes[request.volume]
            .head
            .begin(Access::Exclusive, range, key as u64);
        let mut write = Write {
            edges,
            middle,
            source,
            taken: 0,
            stage: Stage::Waiting,
        };
        match began {
            Ok(Began::Now(Started {
                ticket, version, ..
            })) => {
                request.ticket = Some(ticket);
                request.version = version;
                write.stage = if edges.is_empty() {
                    Stage::Storing
                } else {
                    Stage::ReadingEdges
                };
                request.work = Work::Write(write);
                self.put(key, request);
                self.start_change(key);
            }
            Ok(Began::Waiting(ticket)) => {
                request.ticket = Some(ticket);
                request.work = Work::Write(write);
                self.put(key, request);
            }
            Err(refusal) => self.answer_error(request, refusal_text(refusal)),
        }
    }

    /// A change in the table has its range: reads its edges, or goes on to the stores.
    fn start_change(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get(key) else {
            return;
        };
        let Work::Write(write) = &request.work else {
            return;
        };
        let edges = write.edges;
        if edges.is_empty() {
            self.store_change(key);
            return;
        }
        let volume = request.volume;
        let Some(buffer) = &request.buffer else {
            return;
        };
        let targets = [
            (edges.first, buffer.at(edges.scratch), PART_FIRST_EDGE),
            (
                edges.last,
                buffer.at(edges.scratch + BLOCK_BYTES),
                PART_LAST_EDGE,
            ),
        ];
        let mut pending = 0;
        let mut error = None;
        for (edge, target, part) in targets {
            let Some(edge) = edge else { continue };
            let (store, extent, first) = self.place_block(volume, edge.block);
            // SAFETY: the scratch blocks are inside the buffer and apart from each other and from the payload.
            let target = unsafe { std::slice::from_raw_parts_mut(target, BLOCK_BYTES) };
            // SAFETY: the buffer stays with the request, which stays in the table until all its parts are done.
            match unsafe {
                self.stores[store]
                    .store
                    .read(op_id(key, part), extent, first, target)
            } {
                Ok(ReadOutcome::Done(_)) => {}
                Ok(ReadOutcome::Pending) => pending += 1,
                Err(e) => error = Some(refusal_of(&e)),
            }
        }
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        request.pending += pending;
        if error.is_some() {
            request.error = error;
        }
        if request.pending == 0 {
            self.edges_read(key);
        }
    }

    /// The edge blocks are in the scratch: put the changed bytes into them.
    fn edges_read(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        if request.error.is_some() {
            self.finish_at(key);
            return;
        }
        let offset = request.reply.offset;
        let Work::Write(write) = &mut request.work else {
            return;
        };
        write.stage = Stage::Storing;
        let (edges, source) = (write.edges, write.source);
        let Some(buffer) = &mut request.buffer else {
            return;
        };
        let first_block = offset / BLOCK_BYTES as u64;
        for (edge, scratch) in [
            (edges.first, edges.scratch),
            (edges.last, edges.scratch + BLOCK_BYTES),
        ] {
            let Some(Edge {
                block, from, to, ..
            }) = edge
            else {
                continue;
            };
            let (from, len) = (from as usize, (to - from) as usize);
            if source == Source::Buffer {
                // The payload lies in the buffer as its blocks lie in the volume.
                let payload = (block - first_block) as usize * BLOCK_BYTES + from;
                buffer.copy_within(payload, scratch + from, len);
            } else {
                buffer.zero(scratch + from, len);
            }
        }
        self.store_change(key);
    }

    /// Gives the stores what they have not yet taken of a change.
    fn store_change(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        let Work::Write(write) = &mut request.work else {
            return;
        };
        let (volume, version) = (request.volume, request.version);
        let durable = request.durable.then_some(key);
        let mut pending = request.pending;
        let (mut edges, middle, source, mut taken) =
            (write.edges, write.middle, write.source, write.taken);
        // The buffer is taken out while the stores copy from it, and put back.
        let buffer = request.buffer.take();
        let mut progress = Progress::Complete;

        for (edge, scratch) in [
            (&mut edges.first, edges.scratch),
            (&mut edges.last, edges.scratch + BLOCK_BYTES),
        ] {
            let (Some(edge), Some(buffer)) = (edge, &buffer) else {
                continue;
            };
            if edge.is_stored || !matches!(progress, Progress::Complete) {
                continue;
            }
            let Some(range) = BlockRange::new(edge.block, edge.block + 1) else {
                continue;
            };
            // SAFETY: the store read the block here and the change was put into it.
            let block = unsafe { buffer.bytes(scratch, BLOCK_BYTES) };
            let mut edge_taken = 0;
            progress = self.store_blocks(
                volume,
                version,
                range,
                &mut edge_taken,
                block,
                durable,
                &mut pending,
                key,
            );
            edge.is_stored = matches!(progress, Progress::Complete);
        }
        if let (Progress::Complete, Some(range)) = (&progress, middle) {
            progress = match (source, &buffer) {
                (Source::Buffer, Some(buffer)) => {
                    let offset = self.request_offset(key);
                    let start =
                        (range.first() - offset / BLOCK_BYTES as u64) as usize * BLOCK_BYTES;
                    // SAFETY: the payload filled every whole block of the range.
                    let data = unsafe {
                        buffer.bytes(start, (range.end() - range.first()) as usize * BLOCK_BYTES)
                    };
                    self.store_blocks(
                        volume,
                        version,
                        range,
                        &mut taken,
                        data,
                        durable,
                        &mut pending,
                        key,
                    )
                }
                (Source::Buffer, None) => Progress::Failed(RequestError::NoMemory),
                (Source::Holes, _) => self.store_holes(
                    volume,
                    version,
                    range,
                    &mut taken,
                    durable,
                    &mut pending,
                    key,
                ),
                (Source::Zeros, _) => self.store_zeros(
                    volume,
                    version,
                    range,
                    &mut taken,
                    durable,
                    &mut pending,
                    key,
                ),
            };
        }

        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        request.buffer = buffer;
        request.pending = pending;
        if let Work::Write(write) = &mut request.work {
            write.edges = edges;
            write.taken = taken;
            if !matches!(progress, Progress::Waits) {
                write.stage = Stage::Stored;
            }
        }
        if let Progress::Failed(error) = progress {
            request.error.get_or_insert(error);
        }
        if !matches!(progress, Progress::Waits) && pending == 0 {
            self.finish_at(key);
        }
    }

    fn request_offset(&self, key: usize) -> u64 {
        match self.operations.get(key) {
            Some(Operation::Request(request)) => request.reply.offset,
            _ => 0,
        }
    }

    /// Writes the blocks of `range` from the `taken`-th on. `data` holds all of them.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a request that may not be in the table yet"
    )]
    fn store_blocks(
        &mut self,
        volume: usize,
        version: Version,
        range: BlockRange,
        taken: &mut u64,
        data: &[u8],
        durable: Option<usize>,
        pending: &mut u32,
        key: usize,
    ) -> Progress {
        let block = BLOCK_BYTES as u64;
        while range.first() + *taken < range.end() {
            let (store, extent, first) = self.place_block(volume, range.first() + *taken);
            let left = range.end() - range.first() - *taken;
            let count = left
                .min(u64::from(CHUNK_BLOCKS - first))
                .min(MAX_WRITE_BLOCKS as u64);
            // Behind those that came before; while these are retried the line is empty.
            if !self.stores[store].parked.is_empty() {
                self.park(store, key);
                return Progress::Waits;
            }
            let from = (*taken * block) as usize;
            let piece = &data[from..from + (count * block) as usize];
            let result = self.stores[store].store.write(
                extent,
                first,
                piece,
                version,
                durable.map(|key| op_id(key, 0)),
            );
            match result.map_err(NotTaken::from) {
                Ok(()) => {
                    *taken += count;
                    *pending += u32::from(durable.is_some());
                    self.taken(volume, extent.chunk);
                }
                Err(NotTaken::Busy { accepted }) => {
                    *taken += u64::from(accepted);
                    if accepted > 0 {
                        self.taken(volume, extent.chunk);
                    }
                    self.park(store, key);
                    return Progress::Waits;
                }
                Err(NotTaken::Refused(error)) => return Progress::Failed(error),
            }
        }
        Progress::Complete
    }

    /// Zero entries for the blocks of `range` from the `taken`-th on.
    #[expect(clippy::too_many_arguments, reason = "as for `store_blocks`")]
    fn store_holes(
        &mut self,
        volume: usize,
        version: Version,
        range: BlockRange,
        taken: &mut u64,
        durable: Option<usize>,
        pending: &mut u32,
        key: usize,
    ) -> Progress {
        for _ in 0..STEPS_PER_TURN {
            if range.first() + *taken >= range.end() {
                return Progress::Complete;
            }
            let (store, extent, first) = self.place_block(volume, range.first() + *taken);
            let left = range.end() - range.first() - *taken;
            let count = left.min(u64::from(CHUNK_BLOCKS - first)) as u32;
            let result = self.stores[store].store.write_zeroes(
                extent,
                first,
                count,
                version,
                durable.map(|key| op_id(key, 0)),
            );
            match result.map_err(NotTaken::from) {
                Ok(()) => {
                    *taken += u64::from(count);
                    *pending += u32::from(durable.is_some());
                    self.taken(volume, extent.chunk);
                }
                Err(NotTaken::Busy { accepted }) => {
                    *taken += u64::from(accepted);
                    self.park(store, key);
                    return Progress::Waits;
                }
                Err(NotTaken::Refused(error)) => return Progress::Failed(error),
            }
        }
        if range.first() + *taken >= range.end() {
            return Progress::Complete;
        }
        self.resumable.push(key);
        Progress::Waits
    }

    /// Blocks of zeros for the blocks of `range` from the `taken`-th on.
    #[expect(clippy::too_many_arguments, reason = "as for `store_blocks`")]
    fn store_zeros(
        &mut self,
        volume: usize,
        version: Version,
        range: BlockRange,
        taken: &mut u64,
        durable: Option<usize>,
        pending: &mut u32,
        key: usize,
    ) -> Progress {
        for _ in 0..STEPS_PER_TURN {
            let from = range.first() + *taken;
            let Some(step) = BlockRange::new(from, range.end().min(from + ZERO_BLOCKS as u64))
            else {
                return Progress::Complete;
            };
            let count = step.end() - step.first();
            let mut step_taken = 0;
            let data = &ZEROS.0[..count as usize * BLOCK_BYTES];
            let progress = self.store_blocks(
                volume,
                version,
                step,
                &mut step_taken,
                data,
                durable,
                pending,
                key,
            );
            *taken += step_taken;
            if !matches!(progress, Progress::Complete) {
                return progress;
            }
        }
        if range.first() + *taken >= range.end() {
            return Progress::Complete;
        }
        self.resumable.push(key);
        Progress::Waits
    }

    fn park(&mut self, store: usize, key: usize) {
        self.metrics.parked_writes.add(1);
        self.stores[store].parked.push_back(key);
    }

    // -- flush, status, prefetch

    fn flush(&mut self, mut request: Request) {
        let key = self.operations.vacant_key();
        let volume = &mut self.volumes[request.volume];
        let plan = volume.head.flush();
        let slots: SmallVec<[StoreSlot; 4]> = plan.stores().collect();
        if slots.is_empty() {
            self.answer_done(request);
            return;
        }
        volume.unlocked += 1;
        request.pending = slots.len() as u32;
        let stores: SmallVec<[usize; 4]> = slots
            .iter()
            .map(|slot| volume.stores[usize::from(slot.0)])
            .collect();
        request.work = Work::Flush(plan);
        self.put(key, request);
        for store in stores {
            self.stores[store].store.flush(op_id(key, 0));
        }
    }

    fn block_status(&mut self, mut request: Request, command: Asked) {
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

    fn go_on_with_status(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get(key) else {
            return;
        };
        let Work::Status { one_extent } = request.work else {
            return;
        };
        let (volume, to, length) = (request.volume, request.reply, request.length);
        let mut status = Status::new(to, length, one_extent);
        'pieces: for piece in Pieces::new(to.offset, length) {
            let (store, extent) = self.place(volume, piece.chunk);
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
    fn prefetch(&mut self, volume: usize, offset: u64, length: u64) {
        for piece in Pieces::new(offset, length).take(CACHE_CHUNKS) {
            let (store, extent) = self.place(volume, piece.chunk);
            self.stores[store]
                .store
                .load_extents(extent, piece.first_block, piece.blocks);
        }
    }

    // -- going on

    /// One part of a request in the table ended.
    pub(super) fn request_done(
        &mut self,
        key: usize,
        part: u32,
        result: Result<ReadInfo, StoreError>,
    ) {
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        request.pending -= 1;
        match result {
            Ok(info) => note_holes(request, part, &info),
            Err(error) => {
                request.error.get_or_insert(refusal_of(&error));
            }
        }
        if request.pending > 0 {
            return;
        }
        match &request.work {
            Work::Write(write) => match write.stage {
                Stage::ReadingEdges => self.edges_read(key),
                Stage::Stored => self.finish_at(key),
                // The rest waits in a line.
                Stage::Waiting | Stage::Storing => {}
            },
            _ => self.finish_at(key),
        }
    }

    /// An operation in the table may go on: a store has room or an index page, or it is its turn again.
    pub(super) fn resume(&mut self, key: usize) {
        match self.operations.get(key) {
            Some(Operation::Request(request)) => match request.work {
                Work::Write(_) => self.store_change(key),
                Work::Status { .. } => self.go_on_with_status(key),
                Work::Plain | Work::Read { .. } | Work::Flush(_) => {}
            },
            Some(Operation::DropLayer { .. }) => self.try_drop_layer(key),
            Some(Operation::Task(_)) | None => {}
        }
    }

    /// The range lock let a waiting request go.
    fn start_waiting(&mut self, started: Started) {
        let key = started.tag as usize;
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        request.version = started.version;
        match &mut request.work {
            Work::Read { .. } => {
                // The key just given up is the next to be given out, so `put` finds it free.
                if let Operation::Request(request) = self.operations.remove(key) {
                    self.start_read(key, request);
                }
            }
            Work::Write(write) => {
                write.stage = if write.edges.is_empty() {
                    Stage::Storing
                } else {
                    Stage::ReadingEdges
                };
                self.start_change(key);
            }
            Work::Plain | Work::Flush(_) | Work::Status { .. } => {}
        }
    }

    /// Puts a request into the table under the key its parts were given.
    fn put(&mut self, key: usize, request: Request) {
        match self.operations.get_mut(key) {
            Some(entry) => *entry = Operation::Request(request),
            None => {
                let at = self.operations.insert(Operation::Request(request));
                assert_eq!(
                    at, key,
                    "nothing was put into the table since the key was chosen"
                );
            }
        }
    }

    fn finish_at(&mut self, key: usize) {
        if let Some(Operation::Request(_)) = self.operations.get(key) {
            if let Operation::Request(request) = self.operations.remove(key) {
                self.finish(request);
            }
        }
    }

    /// Nothing is left to do for a request, which is not in the table: give its range back and answer.
    fn finish(&mut self, mut request: Request) {
        let volume = request.volume;
        match &request.work {
            Work::Flush(plan) => {
                let head = &mut self.volumes[volume];
                head.unlocked -= 1;
                if request.error.is_none() {
                    head.head.flushed(plan);
                }
            }
            Work::Status { .. } => self.volumes[volume].unlocked -= 1,
            _ => {}
        }
        let ticket = request.ticket.take();
        match request.error {
            Some(error) => self.answer_error(request, error),
            None if matches!(request.work, Work::Read { .. }) => self.answer_read(request),
            None => self.answer_done(request),
        }
        if let Some(ticket) = ticket {
            self.release(volume, ticket);
        }
        self.volume_may_close(volume);
    }

    fn release(&mut self, volume: usize, ticket: Ticket) {
        let mut started = SmallVec::new();
        self.volumes[volume].head.finish(ticket, &mut started);
        self.started.extend(started);
        // One that is started may end at once and let others go: a loop here, not a recursion as deep as they are many.
        if self.starting {
            return;
        }
        self.starting = true;
        while let Some(next) = self.started.pop_front() {
            self.start_waiting(next);
        }
        self.starting = false;
    }

    // -- answers

    /// The connection a request came on, if it still exists.
    fn connection_of(&self, request: &Request) -> Option<u32> {
        let ConnectionRef { key, serial } = request.connection;
        self.connections
            .get(key as usize)
            .filter(|c| c.serial == serial && c.phase != Phase::Dead)
            .map(|_| key)
    }

    fn answer_done(&mut self, mut request: Request) {
        if let Some(buffer) = request.buffer.take() {
            self.give(request.connection, buffer);
        }
        let Some(key) = self.connection_of(&request) else {
            return self.forget(&request);
        };
        let header = reply::done(request.reply, request.command == Command::Read);
        self.connections[key as usize].outbox.push(&header);
        self.count_answer(key, &request, true);
    }

    fn answer_error(&mut self, mut request: Request, error: RequestError) {
        if let Some(buffer) = request.buffer.take() {
            self.give(request.connection, buffer);
        }
        let Some(key) = self.connection_of(&request) else {
            return self.forget(&request);
        };
        self.connections[key as usize]
            .outbox
            .push(&reply::error(request.reply, error));
        self.count_answer(key, &request, false);
    }

    fn count_answer(&mut self, key: u32, request: &Request, success: bool) {
        let connection = &mut self.connections[key as usize];
        connection.in_flight -= 1;
        connection.requests += 1;
        match request.command {
            Command::Read if success => connection.read_bytes += request.length,
            Command::Write if success => connection.written_bytes += request.length,
            _ => {}
        }
        self.freed |= connection.is_paused;
        let metrics = &self.volumes[request.volume].metrics;
        metrics.in_flight.sub(1);
        let counters = metrics.command(request.command);
        counters.operations.add(1);
        if success {
            counters.bytes.add(request.length);
        } else {
            counters.errors.add(1);
        }
        counters
            .latency
            .record(Instant::now().saturating_duration_since(request.started));
        self.make_dirty(key);
    }

    /// The client is gone; there is nobody to answer.
    fn forget(&mut self, request: &Request) {
        self.volumes[request.volume].metrics.in_flight.sub(1);
    }

    /// A buffer that counts against the connection, if that still exists.
    fn hold(&mut self, connection: ConnectionRef, bytes: usize) -> Buffer {
        let buffer = self.pool.take(bytes);
        if let Some(c) = self
            .connections
            .get_mut(connection.key as usize)
            .filter(|c| c.serial == connection.serial)
        {
            c.held_bytes += buffer.capacity();
        }
        buffer
    }

    fn give(&mut self, connection: ConnectionRef, buffer: Buffer) {
        if let Some(c) = self
            .connections
            .get_mut(connection.key as usize)
            .filter(|c| c.serial == connection.serial)
        {
            c.held_bytes -= buffer.capacity();
        }
        self.freed = true;
        self.pool.give(buffer);
    }

    // -- places

    /// The store of a chunk, and the chunk's name there.
    #[inline]
    fn place(&self, volume: usize, chunk: ChunkIndex) -> (usize, ExtentKey) {
        let volume = &self.volumes[volume];
        (
            volume.stores[slot_of(volume.stores.len(), chunk)],
            ExtentKey {
                layer: volume.spec.layer,
                chunk,
            },
        )
    }

    /// The store of a block of the volume, its chunk's name there, and the block in the chunk.
    #[inline]
    fn place_block(&self, volume: usize, block: u64) -> (usize, ExtentKey, u32) {
        let chunk = ChunkIndex((block / u64::from(CHUNK_BLOCKS)) as u32);
        let (store, extent) = self.place(volume, chunk);
        (store, extent, (block % u64::from(CHUNK_BLOCKS)) as u32)
    }

    #[inline]
    fn taken(&mut self, volume: usize, chunk: ChunkIndex) {
        let volume = &mut self.volumes[volume];
        let slot = slot_of(volume.stores.len(), chunk);
        volume.head.taken(StoreSlot(slot as u8));
    }
}

/// As `Placement::store_of` deals chunks out.
#[inline]
fn slot_of(stores: usize, chunk: ChunkIndex) -> usize {
    chunk.0 as usize % stores
}

fn note_holes(request: &mut Request, first: u32, info: &ReadInfo) {
    if let Work::Read { holes, .. } = &mut request.work {
        holes.extend(info.holes.iter().map(|(at, count)| (first + at, *count)));
    }
}

fn refusal_text(refusal: Refusal) -> RequestError {
    match refusal {
        Refusal::PastEnd => RequestError::PastEnd,
        Refusal::ReadOnly => RequestError::ReadOnly,
        Refusal::Draining => RequestError::ShuttingDown,
        Refusal::VersionsExhausted => RequestError::Fenced,
    }
}

fn label(command: Asked) -> Command {
    match command {
        Asked::Read { .. } => Command::Read,
        Asked::Write => Command::Write,
        Asked::Flush => Command::Flush,
        Asked::Trim => Command::Trim,
        Asked::Cache => Command::Cache,
        Asked::WriteZeroes { .. } => Command::WriteZeroes,
        Asked::BlockStatus { .. } => Command::BlockStatus,
    }
}
