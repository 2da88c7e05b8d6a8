//! What happens in the world, and when.

use std::collections::BTreeMap;

use ashlar_core::records::Transaction;
use ashlar_core::replication::{Seal, SessionRef, SwapOutcome};

use crate::client::ClientOp;
use crate::disk::{At, Cell};
use crate::message::{Answer, Ask, Found};

#[derive(Clone, Debug)]
pub(crate) enum Ev {
    Ask {
        conn: u64,
        node: usize,
        run: u64,
        ask: Ask,
    },
    Answer {
        conn: u64,
        node: usize,
        run: u64,
        head: u64,
        answer: Answer,
    },
    ClosedAtHead {
        conn: u64,
    },
    ClosedAtReplica {
        conn: u64,
    },
    Connect {
        node: usize,
        run: u64,
        head: u64,
        member: u8,
    },
    Persisted {
        node: usize,
        run: u64,
        serial: u64,
        seal: Seal,
    },
    Executed {
        node: usize,
        run: u64,
        session: SessionRef,
        op: u64,
        result: Box<Result<Found, ashlar_core::replication::wire::Status>>,
        synced: Option<BTreeMap<At, Cell>>,
    },
    /// A head is called for a fill that waits for its pace.
    FillDue {
        node: usize,
        run: u64,
        head: u64,
    },
    Tick {
        node: usize,
        run: u64,
        head: u64,
    },
    SwapArrives {
        node: usize,
        run: u64,
        head: u64,
        serial: u64,
        transaction: Transaction,
        is_known: bool,
    },
    Swapped {
        node: usize,
        run: u64,
        head: u64,
        serial: u64,
        outcome: SwapOutcome,
    },
    ReadRecord {
        node: usize,
        run: u64,
        head: u64,
    },
    Watch {
        node: usize,
        run: u64,
        head: u64,
    },
    Submit {
        node: usize,
        run: u64,
        head: u64,
        op: u64,
        what: ClientOp,
    },
    StartHead {
        node: usize,
    },
    StartNode {
        node: usize,
    },
    StopNode {
        node: usize,
        run: u64,
    },
    Thaw {
        node: usize,
    },
    EndCut {
        from: usize,
        to: usize,
    },
    MetaBack,
    Roomy {
        node: usize,
    },
    ReadsBack {
        node: usize,
    },
    /// A scrub at the node came to the block.
    Scrubbed {
        node: usize,
        at: At,
    },
    Client,
    Fault,
    Steer,
}

impl Ev {
    /// The node whose process has to run for it.
    pub(super) fn node(&self) -> Option<usize> {
        match self {
            Ev::Ask { node, .. }
            | Ev::Answer { node, .. }
            | Ev::Connect { node, .. }
            | Ev::Persisted { node, .. }
            | Ev::Executed { node, .. }
            | Ev::Tick { node, .. }
            | Ev::FillDue { node, .. }
            | Ev::Swapped { node, .. }
            | Ev::ReadRecord { node, .. }
            | Ev::Watch { node, .. }
            | Ev::Submit { node, .. }
            | Ev::StartHead { node } => Some(*node),
            _ => None,
        }
    }
}

pub(super) struct Queued(pub(super) u64, pub(super) u64, pub(super) Ev);

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}
