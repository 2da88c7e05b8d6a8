//! What goes over links, as values; the bytes have tests of their own.

use ashlar_core::records::HeadClaim;
use ashlar_core::replication::wire::{LeafStates, Rows, RowsQuery, Status};
use ashlar_core::units::{ChunkIndex, Epoch, Version};

use crate::disk::Content;

#[derive(Clone, Debug)]
pub(crate) enum Ask {
    Open {
        tag: u32,
        claim: HeadClaim,
        epoch: Epoch,
        opening: u64,
        resync: bool,
    },
    Close {
        tag: u32,
        clean: bool,
        op: u64,
    },
    Heartbeat {
        sent_us: u64,
    },
    Op {
        tag: u32,
        epoch: Epoch,
        op: u64,
        what: What,
    },
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    Write {
        chunk: u32,
        first: u32,
        contents: Vec<Content>,
        version: Version,
        zeros: bool,
        durable: bool,
    },
    Read {
        chunk: u32,
        first: u32,
        count: u32,
    },
    Flush,
    Whole,
    Rows {
        query: RowsQuery,
        from: ChunkIndex,
    },
    Leaf {
        chunk: u32,
        leaf: u32,
    },
}

#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Opened {
        tag: u32,
        lost_power: bool,
    },
    Refused {
        tag: u32,
        status: Status,
        epoch: Epoch,
    },
    Fenced {
        tag: u32,
        epoch: Epoch,
    },
    Alive {
        sent_us: u64,
    },
    Done {
        tag: u32,
        op: u64,
        result: Result<Found, Status>,
    },
}

#[derive(Clone, Debug)]
pub(crate) enum Found {
    Nothing,
    Data(Vec<Content>),
    Rows(Rows),
    Leaf(LeafStates),
}
