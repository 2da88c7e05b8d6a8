//! What clients ask of a replicated volume: cut into pieces of one chunk each, which go to the replicas of its set.
//!
//! A request keeps its bytes until every piece is acknowledged: a piece may have to be sent again after the set has
//! changed. The range lock, reading the edges of partial blocks and the answer are as for any volume.

mod pieces;

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::nbd::reply::{Allocation, Status as BlockStatus};
use ashlar_core::nbd::request::Command as AskedFor;
use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{FlushAdmission, ReadAdmission, ReplicaMask, StopReason};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{BLOCK_BYTES, ChunkIndex};
use ashlar_core::volume::{
    Access, Began, BlockRange, Pieces, Started, blocks_touched, whole_blocks,
};
use smallvec::SmallVec;

use pieces::{Content, Piece};

use super::super::changes::put_edges;
use super::super::execute::refusal_text;
use super::super::operation::{Edges, Operation, Payload, Request, Source, Work, op_id};
use super::super::receiver::{covering_bytes, payload_start};
use super::super::thread::{DataThread, VolumeHead};
use super::replica::ReplicaWork;
use super::{Asked, VolumeRef};

/// A request of a client in the table of operations.
pub(in super::super) struct Replicated {
    pub(super) volume: VolumeRef,
    /// Tells it from another one that had its place in the table.
    pub(super) serial: u64,
    pub(in super::super) request: Request,
    pub(super) stage: Stage,
    pub(super) edges: Edges,
    pub(super) middle: Option<BlockRange>,
    pub(super) source: Source,
    pub(super) pieces: SmallVec<[Piece; 1]>,
    /// Pieces that are not at their end.
    pub(super) left: usize,
    /// Reads that a store of this thread has not ended: it writes into the buffer, which must stay until then.
    pub(super) reads_here: u32,
    /// It is over, and goes when the stores have let go of its buffer.
    pub(super) is_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Behind another request in the range lock.
    Waiting,
    /// Blocks that are partly covered by a change are being read.
    Edges,
    /// What was asked for.
    Body,
    Flush,
}

impl DataThread {
    /// Takes a request of a replicated volume.
    pub(in super::super) fn replicated_request(
        &mut self,
        volume: VolumeRef,
        mut request: Request,
        command: AskedFor,
        payload: Payload<'_>,
    ) {
        let (offset, length) = (request.reply.offset, request.length);
        if let AskedFor::Flush = command {
            let key = self.put_replicated(volume, request, Stage::Flush, Source::Buffer);
            return self.ask_flush(key);
        }
        let (access, source) = match command {
            AskedFor::Read { dont_fragment } => {
                request.work = Work::Read {
                    dont_fragment,
                    holes: SmallVec::new(),
                };
                (Access::Shared, Source::Buffer)
            }
            AskedFor::WriteZeroes { no_hole: true, .. } => (Access::Exclusive, Source::Zeros),
            AskedFor::Trim | AskedFor::WriteZeroes { .. } => (Access::Exclusive, Source::Holes),
            _ => (Access::Exclusive, Source::Buffer),
        };
        let (mut edges, middle) = match command {
            AskedFor::Read { .. } => (Edges::default(), None),
            // A trim of part of a block does nothing.
            AskedFor::Trim => (Edges::default(), whole_blocks(offset, length)),
            _ => Edges::of(offset, length),
        };
        let range = match middle {
            Some(middle) if edges.is_empty() => Some(middle),
            _ if matches!(command, AskedFor::Trim) => None,
            _ => blocks_touched(offset, length),
        };
        let Some(range) = range else {
            return self.answer_done(request);
        };
        if matches!(command, AskedFor::Write) && request.buffer.is_none() {
            let mut buffer = self.hold(request.connection, covering_bytes(offset, length));
            match &payload {
                Payload::Landed(landed) => {
                    buffer.put(payload_start(offset), landed.bytes(&mut self.stores));
                }
                _ => buffer.put(payload_start(offset), payload.received()),
            }
            request.buffer = Some(buffer);
        }
        if let Payload::Landed(landed) = payload {
            landed.cancel(&mut self.stores);
        }
        if matches!(command, AskedFor::Read { .. }) {
            let bytes = (payload_start(offset) + length as usize).next_multiple_of(BLOCK_BYTES);
            request.buffer = Some(self.hold(request.connection, bytes));
        }
        if !edges.is_empty() {
            if source == Source::Buffer {
                edges.scratch = covering_bytes(offset, length) - 2 * BLOCK_BYTES;
            } else {
                request.buffer = Some(self.hold(request.connection, 2 * BLOCK_BYTES));
            }
        }
        let key = self.put_replicated(volume, request, Stage::Waiting, source);
        if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) {
            entry.edges = edges;
            entry.middle = middle;
        }
        let began = match self.replication(volume) {
            Some(replication) => replication.head.begin(access, range, key as u64),
            None => return self.end_replicated(key, Some(RequestError::ShuttingDown)),
        };
        match began {
            Ok(Began::Now(started)) => self.start_replicated(started),
            Ok(Began::Waiting(ticket)) => {
                if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) {
                    entry.request.ticket = Some(ticket);
                }
            }
            Err(refusal) => self.end_replicated(key, Some(refusal_text(refusal))),
        }
    }

    fn put_replicated(
        &mut self,
        volume: VolumeRef,
        request: Request,
        stage: Stage,
        source: Source,
    ) -> usize {
        let serial = self.cluster.serial();
        if stage == Stage::Flush {
            self.volumes[volume.key].unlocked += 1;
        }
        self.operations.insert(Operation::Replicated(Replicated {
            volume,
            serial,
            request,
            stage,
            edges: Edges::default(),
            middle: None,
            source,
            pieces: SmallVec::new(),
            left: 0,
            reads_here: 0,
            is_over: false,
        }))
    }

    /// A request has its range.
    pub(in super::super) fn start_replicated(&mut self, started: Started) {
        let key = started.tag as usize;
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        entry.request.ticket = Some(started.ticket);
        entry.request.version = started.version;
        let is_read = matches!(entry.request.work, Work::Read { .. });
        if !is_read && !entry.edges.is_empty() {
            entry.stage = Stage::Edges;
            let scratch = entry.edges.scratch;
            let edges = [
                (entry.edges.first, scratch),
                (entry.edges.last, scratch + BLOCK_BYTES),
            ];
            for (edge, at) in edges {
                if let Some(edge) = edge {
                    self.cut(key, edge.block, 1, at, Content::Read);
                }
            }
            return self.ask_pieces(key);
        }
        self.start_body(key);
    }

    /// The edges, if there were any, are read.
    fn start_body(&mut self, key: usize) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        entry.stage = Stage::Body;
        entry.pieces.clear();
        entry.left = 0;
        let offset = entry.request.reply.offset;
        let first_block = offset / BLOCK_BYTES as u64;
        if matches!(entry.request.work, Work::Read { .. }) {
            let Some(range) = blocks_touched(offset, entry.request.length) else {
                return;
            };
            self.cut(
                key,
                range.first(),
                range.end() - range.first(),
                0,
                Content::Read,
            );
            return self.ask_pieces(key);
        }
        let (edges, middle, source) = (entry.edges, entry.middle, entry.source);
        for (edge, at) in [
            (edges.first, edges.scratch),
            (edges.last, edges.scratch + BLOCK_BYTES),
        ] {
            if let Some(edge) = edge {
                self.cut(key, edge.block, 1, at, Content::Buffer);
            }
        }
        if let Some(range) = middle {
            let (at, content) = match source {
                Source::Buffer => (
                    (range.first() - first_block) as usize * BLOCK_BYTES,
                    Content::Buffer,
                ),
                Source::Holes => (0, Content::Hole),
                Source::Zeros => (0, Content::Zeros),
            };
            self.cut(key, range.first(), range.end() - range.first(), at, content);
        }
        self.ask_pieces(key);
    }

    /// Puts the changed bytes into the edge blocks that were read.
    fn change_edges(&mut self, key: usize) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        let first_block = entry.request.reply.offset / BLOCK_BYTES as u64;
        let (edges, source) = (entry.edges, entry.source);
        let Some(buffer) = &mut entry.request.buffer else {
            return;
        };
        put_edges(buffer, &edges, source, first_block);
    }

    // -- flush and block status

    fn ask_flush(&mut self, key: usize) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        let (volume, tag) = (entry.volume, op_id(key, 0));
        let admission = self.with_head(volume, |head, now_us, _| head.begin_flush(tag, now_us));
        match admission {
            Some(FlushAdmission::Send { op, members }) => {
                for member in members {
                    let asked = Asked::Flush { op, member };
                    self.ask(volume, member, asked, ReplicaWork::Flush);
                }
            }
            Some(FlushAdmission::Wait) => self.wait_piece(volume, key, 0),
            Some(FlushAdmission::Stopped) | None => {
                self.end_replicated(key, Some(RequestError::Fenced));
            }
        }
    }

    /// Block status from the copies of this thread's stores, asked as a read would be: a hole is a promise that zeros
    /// would be read. Where no copy here may be read, blocks count as data, which is always allowed. Error: what must be
    /// loaded first.
    pub(in super::super) fn replicated_status(
        &mut self,
        volume: VolumeRef,
        status: &mut BlockStatus,
        (offset, length): (u64, u64),
    ) -> Result<(), (usize, ExtentKey, u32, u32)> {
        for piece in Pieces::new(offset, length) {
            let extent = self.volumes[volume.key].extent(piece.chunk);
            let mut skip = u64::from(piece.skip_bytes);
            let mut push = |blocks: u32, allocation| {
                let bytes = u64::from(blocks) * BLOCK_BYTES as u64 - std::mem::take(&mut skip);
                status.push(bytes, allocation)
            };
            let Some(store) = self.readable_here(volume, extent.chunk) else {
                if !push(piece.blocks, Allocation::Data) {
                    return Ok(());
                }
                continue;
            };
            let driver = &mut self.stores[store].store;
            let Some(runs) = driver.extents(extent, piece.first_block, piece.blocks) else {
                return Err((store, extent, piece.first_block, piece.blocks));
            };
            for (mapped, blocks) in runs {
                let allocation = if mapped {
                    Allocation::Data
                } else {
                    Allocation::Hole
                };
                if !push(blocks, allocation) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The store of this thread from which the head would read a chunk now.
    fn readable_here(&mut self, volume: VolumeRef, chunk: ChunkIndex) -> Option<usize> {
        let admission = self.with_head(volume, |head, now_us, _| {
            head.admit_read(head.set_of(chunk), ReplicaMask::default(), now_us)
        });
        let Some(ReadAdmission::From { member, .. }) = admission else {
            return None;
        };
        let store = self.replication(volume)?.head.member(member).store;
        self.store_here(store)
            .filter(|at| self.stores[*at].store.status().poisoned.is_none())
    }

    // -- the end

    /// Answers a request, gives its range back and removes it.
    pub(super) fn end_replicated(&mut self, key: usize, error: Option<RequestError>) {
        match self.operations.get_mut(key) {
            Some(Operation::Replicated(entry)) if entry.reads_here > 0 => {
                entry.is_over = true;
                entry.request.error = error;
                return;
            }
            _ => {}
        }
        let Operation::Replicated(entry) = self.operations.remove(key) else {
            return;
        };
        let Replicated {
            volume,
            mut request,
            stage,
            ..
        } = entry;
        if stage == Stage::Flush {
            self.volumes[volume.key].unlocked -= 1;
        }
        let ticket = request.ticket.take();
        if error == Some(RequestError::Fenced) {
            // The head is at its end, or is about to learn it. An error would say of a write that it had not happened, which
            // nobody here knows; a connection that ends sends the client to look for the volume anew.
            if let Some(connection) = self.connection_of(&request) {
                self.kill(connection);
            }
        }
        match error {
            Some(error) => self.answer_error(request, error),
            None if matches!(request.work, Work::Read { .. }) => self.answer_read(request),
            None => self.answer_done(request),
        }
        if let Some(ticket) = ticket {
            self.release(volume.key, ticket);
        }
        self.volume_may_close(volume.key);
    }

    /// The head is at its end: every request of its volume fails.
    pub(super) fn fail_requests(&mut self, volume: VolumeRef, reason: StopReason) {
        let error = match reason {
            StopReason::Closed => RequestError::ShuttingDown,
            StopReason::Fenced { .. } | StopReason::Deleted | StopReason::EpochsExhausted => {
                RequestError::Fenced
            }
        };
        for key in self.requests_of(volume) {
            // The end of one lets another begin, which a head at its end refuses at once.
            let is_there = matches!(
                self.operations.get(key),
                Some(Operation::Replicated(request)) if request.volume == volume
            );
            if is_there {
                self.end_replicated(key, Some(error));
            }
        }
    }

    /// Who a request of a volume with replicas is for.
    pub(in super::super) fn replicated(&self, volume: usize) -> Option<VolumeRef> {
        match &self.volumes.get(volume)?.head {
            VolumeHead::Replicated(replication) => Some(VolumeRef {
                key: volume,
                serial: replication.serial,
            }),
            VolumeHead::Single(_) => None,
        }
    }
}

/// What a client is told.
pub(super) fn error_of(status: Status) -> RequestError {
    match status {
        Status::NoSpace => RequestError::NoSpace,
        Status::Poisoned => RequestError::Poisoned,
        Status::Corrupt | Status::Garbled => RequestError::Corrupt,
        Status::Ok | Status::Device | Status::Refused => RequestError::Device,
        Status::Fenced => RequestError::Fenced,
    }
}
