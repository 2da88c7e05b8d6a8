//! The head of a replicated volume: who has acknowledged what, and what may be answered.
//!
//! It claims the volume, seals its replicas, makes them alike, and then serves: a change goes to every replica in sync
//! and is answered when all have it, or when the record says that those who have not are out. The path of one operation
//! ([`ReplicatedHead::admit_write`], [`ReplicatedHead::answered`], [`ReplicatedHead::admit_read`]) looks at a few small
//! numbers and allocates nothing; everything else happens when something fails or returns.
//!
//! What each file is about:
//! - `event`: what goes in and comes out; `members`: stores and sessions; `sets`: replica sets as the head sees them
//! - `claim`: the record and its compare-and-swaps; `opening`: from the claim to serving; `reconcile`: making copies alike
//! - `write`, `read`, `flush`: the operations of clients
//! - `insync`: dropping a replica that failed; `resync`: bringing one back; `leaf`: comparing and copying one leaf
//! - `closing`: the orderly end; `invariants`

mod claim;
mod closing;
mod event;
mod flush;
mod insync;
mod invariants;
mod leaf;
mod members;
mod opening;
mod read;
mod reconcile;
mod resync;
mod rows;
mod sets;
mod status;
#[cfg(test)]
mod tests;
mod write;

pub use event::{
    Action, CopyId, Event, FlushAdmission, MemberId, News, OpKey, Outcome, QueryId, ReadAdmission,
    ReplicaMask, StopReason, SwapOutcome, WriteAdmission,
};
pub use members::MemberPlace;
pub use status::{HeadStatus, MemberStatus, PhaseName, ResyncProgress};

use std::collections::VecDeque;

use hashbrown::HashMap;
use slab::Slab;
use smallvec::SmallVec;

use super::Rules;
use crate::records::{HeadClaim, SetIndex, Versioned, VolumeRecord};
use crate::units::{ChunkIndex, Epoch, NodeId};
use crate::volume::{self, Access, Began, BlockRange, HeadSpec, Refusal, Started, Ticket};

use claim::PendingSwap;
use flush::FlushOp;
use leaf::{Copy, Damage, LeafJob};
use members::{Member, Query};
use opening::Opening;
use resync::Resync;
use sets::Set;
use write::WriteOp;

/// Tags from here on are the head's own.
const INTERNAL_TAG: u64 = 1 << 63;

/// How a head behaves.
#[derive(Clone, Copy, Debug)]
pub struct HeadParams {
    /// The daemon it runs in.
    pub node: NodeId,
    /// Drawn for this run of the daemon.
    pub claim: HeadClaim,
    /// Which rules are kept.
    pub rules: Rules,
    /// A read is served only when every replica in sync gave a sign of life that was asked for less than this ago,
    /// microseconds. All daemons of a cluster must have the same.
    pub lease_us: u64,
    /// A replica that has not answered after this long has failed, microseconds; less than the lease.
    pub write_timeout_us: u64,
    /// The highest epoch that stores of this daemon hold blocks of the volume under, as for
    /// [`crate::records::claim`].
    pub written: Epoch,
    /// A replica that failed is not tried again for so long, microseconds.
    pub resync_backoff_us: u64,
    /// Leaves compared and copied at the same time, for one replica that returns.
    pub resync_leaves: usize,
    /// Bytes a second that are copied to replicas that are being filled, so that clients keep the disks and the network
    /// for the most part; a quarter of it while clients are at work and nothing is missing; 0: as fast as it goes.
    pub fill_bytes_per_second: u64,
}

impl HeadParams {
    /// What suits a cluster of today: a pause of a few seconds when a node dies, none for a hiccup of the network.
    pub fn new(node: NodeId, claim: HeadClaim) -> HeadParams {
        HeadParams {
            node,
            claim,
            rules: Rules::default(),
            lease_us: 4_000_000,
            write_timeout_us: 2_000_000,
            written: Epoch(0),
            resync_backoff_us: 500_000,
            // Deep enough to keep a disk and a link busy, few enough that a client's request finds them short queues.
            resync_leaves: 4,
            fill_bytes_per_second: 0,
        }
    }

    /// How long a new head waits for the reads of an old one to end: the lease, and an eighth for clocks that do not run
    /// alike.
    fn lease_wait_us(&self) -> u64 {
        self.lease_us + self.lease_us / 8
    }
}

/// Where a head is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The claim is being swapped in.
    Claiming,
    /// Replicas are being sealed; perhaps waiting for the lease.
    Sealing,
    /// What was found while sealing is being swapped into the record.
    Recording,
    /// Copies are being made alike.
    Reconciling,
    /// What had lost power is flushed and told that it is whole.
    Mending,
    /// Clients are served.
    Serving,
    /// Flushing and closing sessions in order.
    Closing,
    /// At its end.
    Stopped,
}

/// The one writer of a replicated volume.
pub struct ReplicatedHead {
    params: HeadParams,
    phase: Phase,
    /// As it is in the metadata store, to the best of the head's knowledge; once claimed, nobody else changes its epoch
    /// without stopping this head.
    record: Versioned<VolumeRecord>,
    admission: volume::Head,
    members: Vec<Member>,
    sets: Vec<Set>,
    /// Changes that were sent and are not yet answered.
    ops: Slab<WriteOp>,
    /// Rises with every change and flush.
    op_serial: u64,
    flushes: Slab<FlushOp>,
    swap: Option<PendingSwap>,
    swap_serial: u64,
    openings: u64,
    queries: HashMap<QueryId, Query>,
    query_serial: u64,
    jobs: Slab<LeafJob>,
    /// Repairs that wait for their turn.
    damages: VecDeque<Damage>,
    job_serial: u64,
    copies: HashMap<CopyId, Copy>,
    copy_serial: u64,
    /// From the claim to serving.
    opening: Opening,
    resyncs: Vec<Resync>,
    /// What was copied to replicas being filled takes until then at the pace that was set.
    filled_until_us: u64,
    /// A fill waits for its pace until then.
    fill_due_us: Option<u64>,
    /// Pauses of fills so far.
    fill_turns: u64,
    /// When a client's request came last.
    clients_us: u64,
    /// Somebody was told to wait.
    told_to_wait: bool,
    /// Versions below this were said to be settled; a change that was offered with one gets another.
    settled: crate::units::Version,
    now_us: u64,
    /// Silence before this is not held against anybody: the head itself was not running.
    grace_until_us: u64,
    /// The client generation that was announced.
    announced: Option<u64>,
    stopped: Option<StopReason>,
}

impl ReplicatedHead {
    /// A head that sets out to claim the volume, whose record was just read.
    ///
    /// # Panics
    /// When the record breaks its invariants or has no replica sets: it was checked when it was read.
    pub fn new(
        params: HeadParams,
        record: Versioned<VolumeRecord>,
        now_us: u64,
        actions: &mut Vec<Action>,
    ) -> ReplicatedHead {
        assert!(record.record.placement.is_replicated());
        let admission = volume::Head::new(HeadSpec {
            volume: record.record.id,
            size_bytes: record.record.size_bytes,
            live_layer: record.record.live_layer(),
            epoch: record.record.epoch,
            read_only: record.record.read_only,
            stores: 1,
        });
        let mut head = ReplicatedHead {
            params,
            phase: Phase::Claiming,
            record,
            admission,
            members: Vec::new(),
            sets: Vec::new(),
            ops: Slab::new(),
            op_serial: 0,
            flushes: Slab::new(),
            swap: None,
            swap_serial: 0,
            openings: 0,
            queries: HashMap::new(),
            query_serial: 0,
            jobs: Slab::new(),
            damages: VecDeque::new(),
            job_serial: 0,
            copies: HashMap::new(),
            copy_serial: 0,
            opening: Opening::default(),
            resyncs: Vec::new(),
            filled_until_us: 0,
            fill_due_us: None,
            fill_turns: 0,
            clients_us: 0,
            told_to_wait: false,
            settled: crate::units::Version::NONE,
            now_us,
            grace_until_us: 0,
            announced: None,
            stopped: None,
        };
        head.adopt_sets(actions);
        head.propose_claim(actions);
        head
    }

    /// Takes an event.
    pub fn on_event(&mut self, now_us: u64, event: Event, actions: &mut Vec<Action>) {
        self.note_time(now_us);
        if self.phase == Phase::Stopped {
            return;
        }
        match event {
            Event::Record { asked, record } => self.on_record(asked, record, actions),
            Event::Swapped { serial, outcome } => self.on_swapped(serial, outcome, actions),
            Event::LinkUp { member } => self.on_link_up(member, actions),
            Event::LinkDown { member } => self.on_link_down(member, actions),
            Event::Opened {
                member,
                opening,
                sent_at_us,
                lost_power,
            } => self.on_opened(member, opening, sent_at_us, lost_power, actions),
            Event::OpenRefused {
                member,
                opening,
                status,
                epoch,
            } => self.on_open_refused(member, opening, status, epoch, actions),
            Event::Fenced { member, epoch } => self.on_fenced(member, epoch, actions),
            Event::Alive { member, sent_at_us } => self.on_alive(member, sent_at_us, actions),
            Event::Rows { query, result } => self.on_rows(query, result, actions),
            Event::Leaf { query, result } => self.on_leaf(query, result, actions),
            Event::Done { query, status } => self.on_done(query, status, actions),
            Event::CopyRead { copy, status } => self.on_copy_read(copy, status, actions),
            Event::CopyWritten {
                copy,
                member,
                status,
            } => self.on_copy_written(copy, member, status, actions),
        }
        self.advance(actions);
    }

    /// Time passes: every limit is a good part of the lease, so an eighth of it late is early enough for all of them. A fill
    /// that waits wants it at [`ReplicatedHead::fill_due_us`].
    pub fn on_tick(&mut self, now_us: u64, actions: &mut Vec<Action>) {
        self.note_time(now_us);
        if self.phase == Phase::Stopped {
            return;
        }
        self.expire(actions);
        self.advance(actions);
    }

    /// When a fill that waits for its pace goes on, microseconds.
    #[inline]
    pub fn fill_due_us(&self) -> Option<u64> {
        self.fill_due_us
    }

    fn note_time(&mut self, now_us: u64) {
        // A head that was not run for a while has not read what was sent to it meanwhile.
        if now_us > self.now_us + self.params.lease_us / 4 {
            self.grace_until_us = now_us + self.params.lease_us / 4;
        }
        self.now_us = self.now_us.max(now_us);
    }

    /// Does what may be done now; every event and tick ends here.
    fn advance(&mut self, actions: &mut Vec<Action>) {
        self.fill_due_us = None;
        self.open_sessions(actions);
        match self.phase {
            Phase::Claiming | Phase::Recording | Phase::Stopped => {}
            Phase::Sealing => self.advance_sealing(actions),
            Phase::Reconciling => self.advance_reconcile(actions),
            Phase::Mending => self.advance_mending(actions),
            Phase::Serving => {
                self.advance_drops(actions);
                self.advance_resync(actions);
                self.advance_repairs(actions);
                self.advance_fills(actions);
            }
            Phase::Closing => self.advance_closing(actions),
        }
    }

    fn stop(&mut self, reason: StopReason, actions: &mut Vec<Action>) {
        if self.phase == Phase::Stopped {
            return;
        }
        self.phase = Phase::Stopped;
        self.fill_due_us = None;
        self.stopped = Some(reason);
        actions.push(Action::Stopped(reason));
    }

    // -- admission

    /// As [`volume::Head::begin`]; not before [`Action::Serving`]. Tags are below 2^63.
    #[inline]
    pub fn begin(&mut self, access: Access, range: BlockRange, tag: u64) -> Result<Began, Refusal> {
        debug_assert!(tag < INTERNAL_TAG);
        if !self.params.rules.range_lock && access == Access::Shared {
            return Ok(Began::Now(Started {
                ticket: Ticket::NONE,
                tag,
                version: crate::units::Version::NONE,
            }));
        }
        self.admission.begin(access, range, tag)
    }

    /// As [`volume::Head::finish`].
    #[inline]
    pub fn finish(
        &mut self,
        ticket: Ticket,
        started: &mut SmallVec<[Started; 4]>,
        actions: &mut Vec<Action>,
    ) {
        if ticket == Ticket::NONE {
            return;
        }
        let before = started.len();
        self.admission.finish(ticket, started);
        if started.len() > before && started[before..].iter().any(|s| s.tag >= INTERNAL_TAG) {
            let ours: SmallVec<[Started; 4]> = started[before..]
                .iter()
                .copied()
                .filter(|s| s.tag >= INTERNAL_TAG)
                .collect();
            started.retain(|s| s.tag < INTERNAL_TAG);
            for internal in ours {
                self.job_locked(internal, actions);
            }
        }
    }

    /// Gives back a range of the head's own.
    fn release(&mut self, ticket: Ticket, actions: &mut Vec<Action>) {
        let mut started = SmallVec::new();
        self.finish(ticket, &mut started, actions);
        actions.extend(started.into_iter().map(Action::Started));
    }

    /// Access to size, drain and the like.
    pub fn admission(&self) -> &volume::Head {
        &self.admission
    }

    /// Access to resize, drain and the like; requests begin and finish by the head's own methods.
    pub fn admission_mut(&mut self) -> &mut volume::Head {
        &mut self.admission
    }

    /// The set of a chunk.
    #[inline]
    pub fn set_of(&self, chunk: ChunkIndex) -> SetIndex {
        SetIndex((chunk.0 as usize % self.sets.len()) as u16)
    }

    /// The record as the head knows it.
    pub fn record(&self) -> &VolumeRecord {
        &self.record.record
    }

    /// Clients are served.
    pub fn is_serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// Why it is at its end.
    pub fn stopped(&self) -> Option<StopReason> {
        self.stopped
    }
}
