//! Requests, from admission by the head to the reply.
//!
//! What can be answered in the turn it came in never enters the table of operations: a write that the tail takes, a
//! read of what is in memory. Everything else becomes an [`Operation`] that a completion, a range lock or a store with
//! room again carries on.

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::nbd::reply::{self, ReplyTo};
use ashlar_core::nbd::request::{Command as Asked, Request as Parsed};
use ashlar_core::store::{ReadInfo, StoreError};
use ashlar_core::units::{ChunkIndex, Version};
use ashlar_core::volume::{Refusal, Started, Ticket, whole_blocks};
use smallvec::SmallVec;
use std::time::Instant;

use super::connection::{ConnectionRef, Phase};
use super::operation::{Edges, Operation, Payload, Request, Source, Stage, Work, refusal_of};
use super::pool::Buffer;
use super::receiver::{covering_bytes, payload_start};
use super::thread::DataThread;
use crate::metrics::Command;

impl DataThread {
    /// Serves one request.
    pub(super) fn request(&mut self, key: u32, parsed: Parsed, payload: Payload<'_>) {
        self.metrics.requests.add(1);
        let connection = &mut self.connections[key as usize];
        connection.in_flight += 1;
        let (buffer, payload) = match payload {
            Payload::Buffered(buffer) => {
                connection.held_bytes += buffer.capacity();
                (Some(buffer), Payload::Received(&[]))
            }
            payload => (None, payload),
        };
        let volume = connection.volume;
        let style = connection.session.style;
        let (now, born) = (self.now, self.born);
        let of = &mut self.volumes[volume];
        of.metrics.in_flight.add(1);
        if let Some(gate) = &mut of.gate {
            gate.passed(&parsed, now.duration_since(born).as_nanos() as u64);
        }
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
        if let Some(volume) = self.replicated(volume)
            && length > 0
            && matches!(
                parsed.command,
                Asked::Read { .. } | Asked::Write | Asked::Trim | Asked::WriteZeroes { .. }
            )
        {
            if let Asked::WriteZeroes {
                no_hole: true,
                fast_only: true,
            } = parsed.command
            {
                // Space can only be kept by writing it.
                self.answer_error(request, RequestError::NotFast);
                return;
            }
            return self.replicated_request(volume, request, parsed.command, payload);
        }
        match parsed.command {
            Asked::Flush => match self.replicated(volume) {
                Some(volume) => self.replicated_request(volume, request, parsed.command, payload),
                None => self.flush(request),
            },
            Asked::BlockStatus {
                payload_bytes: 1.., ..
            } => {
                let connection = &self.connections[key as usize];
                let completed = match &request.buffer {
                    // SAFETY: the receiver filled it from `payload_start` on with the whole payload.
                    Some(buffer) => parsed.with_status_payload(&connection.session, unsafe {
                        buffer.bytes(payload_start(offset), parsed.payload_bytes() as usize)
                    }),
                    None => parsed.with_status_payload(&connection.session, payload.received()),
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
                match middle {
                    Some(range) if edges.is_empty() && request.buffer.is_none() => {
                        self.write_whole(request, range, payload);
                    }
                    _ => {
                        if request.buffer.is_none() {
                            let mut buffer =
                                self.hold(request.connection, covering_bytes(offset, length));
                            buffer.put(payload_start(offset), payload.received());
                            request.buffer = Some(buffer);
                        }
                        self.change(request, edges, middle, Source::Buffer);
                    }
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
            Some(Operation::Replica(_)) => self.resume_replica(key),
            Some(Operation::Survey(_)) => self.go_on_with_survey(key),
            Some(Operation::Task(_) | Operation::Replicated(_)) | None => {}
        }
    }

    /// The range lock let a waiting request go.
    pub(super) fn start_waiting(&mut self, started: Started) {
        let key = started.tag as usize;
        if let Some(Operation::Replicated(_)) = self.operations.get(key) {
            return self.start_replicated(started);
        }
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
    pub(super) fn put(&mut self, key: usize, request: Request) {
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

    pub(super) fn finish_at(&mut self, key: usize) {
        if let Some(Operation::Request(_)) = self.operations.get(key)
            && let Operation::Request(request) = self.operations.remove(key)
        {
            self.finish(request);
        }
    }

    /// Nothing is left to do for a request, which is not in the table: give its range back and answer.
    pub(super) fn finish(&mut self, mut request: Request) {
        let volume = request.volume;
        match &request.work {
            Work::Flush(plan) => {
                let head = &mut self.volumes[volume];
                head.unlocked -= 1;
                if request.error.is_none() {
                    head.head.admission_mut().flushed(plan);
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

    pub(super) fn release(&mut self, volume: usize, ticket: Ticket) {
        let mut started = SmallVec::new();
        match self.replicated(volume) {
            Some(volume) => {
                self.with_head(volume, |head, _, actions| {
                    head.finish(ticket, &mut started, actions);
                });
            }
            None => {
                let head = self.volumes[volume].head.admission_mut();
                head.finish(ticket, &mut started);
            }
        }
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
    pub(super) fn connection_of(&self, request: &Request) -> Option<u32> {
        let ConnectionRef { key, serial } = request.connection;
        self.connections
            .get(key as usize)
            .filter(|c| c.serial == serial && c.phase != Phase::Dead)
            .map(|_| key)
    }

    pub(super) fn answer_done(&mut self, mut request: Request) {
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

    pub(super) fn answer_error(&mut self, mut request: Request, error: RequestError) {
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

    pub(super) fn count_answer(&mut self, key: u32, request: &Request, success: bool) {
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
    pub(super) fn forget(&mut self, request: &Request) {
        self.volumes[request.volume].metrics.in_flight.sub(1);
    }

    /// A buffer that counts against the connection, if that still exists.
    pub(super) fn hold(&mut self, connection: ConnectionRef, bytes: usize) -> Buffer {
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

    pub(super) fn give(&mut self, connection: ConnectionRef, buffer: Buffer) {
        if let Some(c) = self
            .connections
            .get_mut(connection.key as usize)
            .filter(|c| c.serial == connection.serial)
        {
            c.held_bytes -= buffer.capacity();
        }
        self.pool.give(buffer);
    }

    // -- places

    #[inline]
    pub(super) fn taken(&mut self, volume: usize, chunk: ChunkIndex) {
        let volume = &mut self.volumes[volume];
        let slot = volume.slot_of(chunk);
        volume.head.admission_mut().taken(slot);
    }
}

pub(super) fn note_holes(request: &mut Request, first: u32, info: &ReadInfo) {
    if let Work::Read { holes, .. } = &mut request.work {
        holes.extend(info.holes.iter().map(|(at, count)| (first + at, *count)));
    }
}

pub(super) fn refusal_text(refusal: Refusal) -> RequestError {
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
