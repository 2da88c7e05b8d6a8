//! A request that could not be answered in the turn it came in, or an administrative task of a store.

use std::time::Instant;

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::nbd::reply::ReplyTo;
use ashlar_core::store::{OpId, StoreError, WriteError};
use ashlar_core::units::{LayerId, Version};
use ashlar_core::volume::{BlockRange, FlushPlan, Ticket};
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::cluster::{ReplicaOperation, Replicated};
use super::connection::ConnectionRef;
use super::landed::Landed;
use super::pool::Buffer;
use crate::metrics::Command;

/// What all requests have in common.
pub(super) struct Request {
    pub(super) connection: ConnectionRef,
    pub(super) volume: usize,
    pub(super) reply: ReplyTo,
    pub(super) command: Command,
    pub(super) length: u64,
    pub(super) started: Instant,
    /// Answered only when durable.
    pub(super) durable: bool,
    /// The range lock it holds or waits for.
    pub(super) ticket: Option<Ticket>,
    pub(super) version: Version,
    /// Payload or destination. Its capacity counts against the connection.
    pub(super) buffer: Option<Buffer>,
    /// `Done`s of stores still to come.
    pub(super) pending: u32,
    /// The first failure.
    pub(super) error: Option<RequestError>,
    pub(super) work: Work,
}

/// What is still to be done for a request.
pub(super) enum Work {
    /// Nothing, or nothing yet.
    Plain,
    Read {
        dont_fragment: bool,
        /// Runs of blocks that read as zeros, relative to the first block touched.
        holes: SmallVec<[(u32, u32); 4]>,
    },
    Write(Write),
    Flush(FlushPlan),
    Status {
        one_extent: bool,
    },
}

/// A change on its way into the stores: up to two edge blocks that are read, altered and written back, and whole
/// blocks between them.
pub(super) struct Write {
    pub(super) edges: Edges,
    pub(super) middle: Option<BlockRange>,
    pub(super) source: Source,
    /// Blocks of the middle that the stores have taken.
    pub(super) taken: u64,
    pub(super) stage: Stage,
}

/// The payload of a request that has come whole.
pub(super) enum Payload<'a> {
    /// Bytes of the receive buffer, for the time being.
    Received(&'a [u8]),
    /// In a buffer of its own, as its blocks will lie.
    Buffered(Buffer),
    /// Whole blocks of one chunk, in their store.
    Landed(Landed),
}

impl<'a> Payload<'a> {
    /// The bytes of the receive buffer.
    pub(super) fn received(&self) -> &'a [u8] {
        match self {
            Payload::Received(bytes) => bytes,
            Payload::Buffered(_) | Payload::Landed(_) => &[],
        }
    }
}

/// Where whole blocks come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The request's buffer, which begins with the first block touched.
    Buffer,
    /// Zero entries, which give the space back.
    Holes,
    /// Blocks of zeros, which keep it.
    Zeros,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Behind another request in the range lock.
    Waiting,
    /// Edge blocks are being read.
    ReadingEdges,
    /// Being given to the stores.
    Storing,
    /// The stores have all of it; durability is awaited.
    Stored,
}

/// The blocks that a range touches without covering them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Edges {
    /// Byte in the buffer where the edge blocks are read to: one block each, the first edge first.
    pub(super) scratch: usize,
    pub(super) first: Option<Edge>,
    pub(super) last: Option<Edge>,
}

/// One partly covered block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    /// Block of the volume.
    pub(super) block: u64,
    /// Bytes `from..to` of it are changed.
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) is_stored: bool,
}

impl Edges {
    /// The edge blocks of a byte range, and the whole blocks between them.
    pub(super) fn of(offset: u64, length: u64) -> (Edges, Option<BlockRange>) {
        const BLOCK: u64 = ashlar_core::units::BLOCK_BYTES as u64;
        let end = offset + length;
        let (first_block, last_block) = (offset / BLOCK, (end - 1) / BLOCK);
        let (skip, past) = ((offset % BLOCK) as u32, ((end - 1) % BLOCK + 1) as u32);
        let whole = ashlar_core::volume::whole_blocks(offset, length);
        let mut edges = Edges::default();
        if first_block == last_block {
            if whole.is_none() {
                edges.first = Some(Edge {
                    block: first_block,
                    from: skip,
                    to: past,
                    is_stored: false,
                });
            }
        } else {
            if skip > 0 {
                edges.first = Some(Edge {
                    block: first_block,
                    from: skip,
                    to: BLOCK as u32,
                    is_stored: false,
                });
            }
            if u64::from(past) < BLOCK {
                edges.last = Some(Edge {
                    block: last_block,
                    from: 0,
                    to: past,
                    is_stored: false,
                });
            }
        }
        (edges, whole)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none() && self.last.is_none()
    }
}

/// An entry of the data thread's table of operations; its key is the store's [`OpId`].
pub(super) enum Operation {
    Request(Request),
    /// Of a client, on a volume with replicas elsewhere.
    Replicated(Replicated),
    /// Of a head, at a replica of this thread.
    Replica(ReplicaOperation),
    /// Answers when the store says so.
    Task(oneshot::Sender<Result<(), StoreError>>),
    /// Of whoever compares copies.
    Survey(super::survey::Survey),
    /// A layer to be dropped, tried again when the store can take it.
    DropLayer {
        store: usize,
        layer: LayerId,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
}

/// The table key and part number in an [`OpId`].
pub(super) fn op_id(key: usize, part: u32) -> OpId {
    key as u64 | u64::from(part) << 32
}

/// The reverse of [`op_id`].
pub(super) fn op_key(op: OpId) -> (usize, u32) {
    (op as u32 as usize, (op >> 32) as u32)
}

/// The one place where what a store answers becomes what a client is told.
pub(super) fn refusal_of(error: &StoreError) -> RequestError {
    match error {
        StoreError::Poisoned(_) => RequestError::Poisoned,
        StoreError::Closed => RequestError::ShuttingDown,
        StoreError::Device(_) => RequestError::Device,
        StoreError::Corrupt { .. } | StoreError::Lost { .. } => RequestError::Corrupt,
        StoreError::DirectoryFull => RequestError::NoSpace,
    }
}

/// What a write that was not taken means.
pub(super) enum NotTaken {
    /// Try again when the store is ready; so many blocks were taken.
    Busy {
        accepted: u32,
    },
    Refused(RequestError),
}

impl From<WriteError> for NotTaken {
    fn from(error: WriteError) -> NotTaken {
        match error {
            WriteError::Busy { accepted } => NotTaken::Busy { accepted },
            WriteError::NoSpace => NotTaken::Refused(RequestError::NoSpace),
            WriteError::Failed(error) => NotTaken::Refused(refusal_of(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn edges_and_middle_cover_each_byte_once(offset in 0u64..20_000, length in 1u64..20_000) {
            let (edges, middle) = Edges::of(offset, length);
            let mut covered = Vec::new();
            for edge in [edges.first, edges.last].into_iter().flatten() {
                prop_assert!(edge.from < edge.to && edge.to <= 4096 && edge.to - edge.from < 4096);
                covered.push((edge.block * 4096 + u64::from(edge.from), edge.block * 4096 + u64::from(edge.to)));
            }
            if let Some(middle) = middle {
                covered.push((middle.first() * 4096, middle.end() * 4096));
            }
            covered.sort_unstable();
            let mut at = offset;
            for (from, to) in covered {
                prop_assert_eq!(from, at);
                at = to;
            }
            prop_assert_eq!(at, offset + length);
        }

        #[test]
        fn an_op_id_gives_back_its_parts(key in 0usize..u32::MAX as usize, part: u32) {
            prop_assert_eq!(op_key(op_id(key, part)), (key, part));
        }
    }
}
