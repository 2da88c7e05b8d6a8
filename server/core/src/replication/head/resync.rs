//! Bringing a replica back: sealed first, sent every new change, given what it lacks, rid of what nobody else has,
//! flushed, and only then in sync by the record. A member goes through its sets one after another, those with the
//! fewest replicas in sync first.

use smallvec::SmallVec;

use super::claim::SwapFor;
use super::leaf::JobFor;
use super::members::Purpose;
use super::rows::{RowsOf, RowsWalk};
use super::{Action, MemberId, News, Phase, ReplicatedHead};
use crate::records::{ReplicaState, SetIndex};
use crate::units::{BLOCK_BYTES, Version};

/// So much of what fills may copy in a while they may copy at once: clocks and threads are late by some of it.
const FILL_AHEAD_US: u64 = 10_000;
/// By how much a replica that only takes another's place is filled more slowly while clients are at work: nothing is missing
/// meanwhile, and their latency is what they notice.
const MOVE_SLOWDOWN: u64 = 4;
/// Clients are at work for so long after each request.
pub(super) const CLIENTS_US: u64 = 1_000_000;

/// How far a member is with one set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// New changes go to it; those sent before are waited for, so that whatever differs is either copied or was sent.
    Barrier { before: u64 },
    /// Differences are looked for and copied.
    Copying,
    /// What it has is being made durable.
    Flushing,
    /// It is being told that it is whole.
    Whole,
    /// The record is to say that it is in sync.
    Adding,
    /// The swap is under way.
    Swapping,
}

/// A member that is being brought up to date.
#[derive(Debug)]
pub(super) struct Resync {
    pub(super) member: MemberId,
    pub(super) set: SetIndex,
    /// The replica that is copied from.
    pub(super) source: MemberId,
    pub(super) stage: Stage,
    pub(super) walk: Option<RowsWalk>,
    pub(super) copied_blocks: u64,
    pub(super) leaves_done: u64,
    /// Which of the replicas that its store may have been of this set, by [`crate::records::Replica::added_at`].
    added_at: u64,
}

impl Resync {
    /// The swap that was to add it did not. What is being filled anew since has to be filled first.
    fn add_again(&mut self) {
        if self.stage == Stage::Swapping {
            self.stage = Stage::Adding;
        }
    }
}

impl ReplicatedHead {
    pub(super) fn resync_of(&mut self, member: MemberId) -> Option<&mut Resync> {
        self.resyncs
            .iter_mut()
            .find(|resync| resync.member == member)
    }

    pub(super) fn advance_resync(&mut self, actions: &mut Vec<Action>) {
        if self.phase != Phase::Serving {
            return;
        }
        self.start_resyncs(actions);
        self.unblock_jobs(actions);
        let mut at = 0;
        while at < self.resyncs.len() {
            let member = self.resyncs[at].member;
            self.go_on_with(member, actions);
            if self.phase != Phase::Serving {
                return;
            }
            at += 1;
        }
    }

    /// Members that are open and not in sync in some set.
    fn start_resyncs(&mut self, actions: &mut Vec<Action>) {
        for id in 0..self.members.len() {
            let member = MemberId(id as u8);
            if !self.members[id].is_open() || self.resync_of(member).is_some() {
                continue;
            }
            let wanted = |head: &ReplicatedHead, set: SetIndex| {
                let state = head.set(set);
                let bit = state.bit_of(member);
                let is_out = bit != 0 && state.in_sync & bit == 0;
                is_out && head.is_to_be_whole(set, member) && state.readable() != 0
            };
            let next = self
                .set_indices()
                .filter(|set| wanted(self, *set))
                .min_by_key(|set| self.set(*set).usable().count_ones());
            let Some(set) = next else { continue };
            self.start_resync(member, set, actions);
        }
    }

    /// Whether a replica of a set is to be in sync: one that stays is and, until enough of these are, one that leaves then.
    fn is_to_be_whole(&self, set: SetIndex, member: MemberId) -> bool {
        let are_few = self.staying_in_sync(set) < self.record.record.replicas;
        let recorded = self.recorded(set, member);
        recorded.is_some_and(|replica| are_few || !replica.leaving)
    }

    fn start_resync(&mut self, member: MemberId, set: SetIndex, actions: &mut Vec<Action>) {
        let Some(source) = self.source_in(set) else {
            return;
        };
        let before = self.op_serial;
        let state = self.set_mut(set);
        state.mirrored |= state.bit_of(member);
        self.resyncs.push(Resync {
            member,
            set,
            source,
            stage: Stage::Barrier { before },
            walk: None,
            copied_blocks: 0,
            leaves_done: 0,
            added_at: self.recorded(set, member).map_or(0, |r| r.added_at),
        });
        actions.push(Action::News(News::ResyncStarted { set, member }));
        // Changes that wait for enough replicas may be sent now, and those that are held have to be sent again.
        self.settle_all(actions);
        self.retry(actions);
    }

    /// A sound replica in sync, the local one first.
    pub(super) fn source_in(&self, set: SetIndex) -> Option<MemberId> {
        let members = self.set(set).members(self.set(set).readable());
        members
            .iter()
            .copied()
            .find(|member| self.at(*member).place.is_local)
            .or_else(|| members.first().copied())
    }

    pub(super) fn go_on_with(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        let Some(resync) = self.resync_of(member) else {
            return;
        };
        let (set, source, stage) = (resync.set, resync.source, resync.stage);
        match stage {
            Stage::Barrier { before } => {
                let mut ops = self.ops.iter().map(|(_, op)| op);
                if ops
                    .any(|op| op.set == set && op.serial <= before && !self.is_held_for(op, member))
                {
                    return;
                }
                // One that lost power went back behind what it was known to have.
                let recorded = self.recorded(set, member).map(|r| r.synced_below);
                let floor = match recorded {
                    Some(floor) if !self.at(member).lost => floor,
                    _ => Version::NONE,
                };
                if let Some(resync) = self.resync_of(member) {
                    resync.stage = Stage::Copying;
                    resync.walk = Some(RowsWalk::new(set, &[source, member], floor));
                }
                self.go_on_with(member, actions);
            }
            Stage::Copying => {
                let limit = self.params.resync_leaves;
                while self.jobs_of(JobFor::Resync(member)) < limit {
                    let found = self
                        .resync_of(member)
                        .and_then(|resync| resync.walk.as_mut())
                        .and_then(|walk| walk.found.pop_front());
                    let Some((chunk, leaf)) = found else { break };
                    self.start_job(JobFor::Resync(member), set, chunk, leaf, actions);
                }
                self.go_on_walking(RowsOf::Resync(member), actions);
                let busy = self.jobs_of(JobFor::Resync(member)) > 0;
                let Some(resync) = self.resync_of(member) else {
                    return;
                };
                if busy || !resync.walk.as_ref().is_some_and(RowsWalk::is_done) {
                    return;
                }
                resync.walk = None;
                resync.stage = Stage::Flushing;
                if self.params.rules.flush_before_rejoin {
                    let query = self.ask(member, Purpose::Rejoin);
                    actions.push(Action::Flush { query, member });
                } else {
                    self.rejoin_step(member, actions);
                    self.go_on_with(member, actions);
                }
            }
            Stage::Adding => self.propose_rejoin(member, actions),
            Stage::Flushing | Stage::Whole | Stage::Swapping => {}
        }
    }

    /// Whether another window may begin at the pace of fills. If not, it says when to ask again.
    pub(super) fn may_fill(&mut self) -> bool {
        let due_us = self.filled_until_us.saturating_sub(FILL_AHEAD_US);
        let may = due_us <= self.now_us;
        if !may {
            self.fill_due_us = Some(due_us);
        }
        may
    }

    /// Blocks are about to be copied to a replica that is being filled. Answers what they cost at the pace.
    pub(super) fn count_filled(&mut self, member: MemberId, blocks: u32) -> u64 {
        let byte_us = u64::from(blocks) * BLOCK_BYTES as u64 * 1_000_000;
        // No rate is no bound.
        let cost_us = byte_us.checked_div(self.params.fill_bytes_per_second);
        let clients = self.now_us < self.clients_us + CLIENTS_US;
        let slowdown = if clients && !self.is_missing_somewhere(member) {
            MOVE_SLOWDOWN
        } else {
            1
        };
        let cost_us = cost_us.unwrap_or(0) * slowdown;
        self.filled_until_us = self.filled_until_us.max(self.now_us) + cost_us;
        cost_us
    }

    /// So much of what was counted is not copied after all.
    pub(super) fn uncount_filled(&mut self, cost_us: u64) {
        self.filled_until_us = self.filled_until_us.saturating_sub(cost_us);
    }

    /// Members that are being copied to and are missing somewhere.
    pub(super) fn urgent_fills(&self) -> SmallVec<[MemberId; 4]> {
        self.resyncs
            .iter()
            .filter(|resync| resync.stage == Stage::Copying)
            .map(|resync| resync.member)
            .filter(|member| self.is_missing_somewhere(*member))
            .collect()
    }

    /// Whether a member is to be filled in a set with fewer replicas in sync than there are to be: in this one, or in one
    /// after it. In others it takes the place of one that leaves, and nothing is missing.
    fn is_missing_somewhere(&self, member: MemberId) -> bool {
        self.set_indices().any(|index| {
            let set = self.set(index);
            let bit = set.bit_of(member);
            bit != 0
                && set.in_sync & bit == 0
                && set.readable().count_ones() < self.record.record.replicas
                && self.is_to_be_whole(index, member)
        })
    }

    /// The flush, or the word that it is whole, was answered.
    pub(super) fn rejoin_step(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        let lost = self.at(member).lost;
        let Some(resync) = self.resync_of(member) else {
            return;
        };
        let set = resync.set;
        match resync.stage {
            Stage::Flushing => {
                // With more sets to fill it is not whole yet.
                let last = self.set_indices().all(|other| {
                    let state = self.set(other);
                    let bit = state.bit_of(member);
                    other == set || bit == 0 || state.in_sync & bit != 0
                });
                let stage = if lost && last {
                    let query = self.ask(member, Purpose::Rejoin);
                    actions.push(Action::Whole { query, member });
                    Stage::Whole
                } else {
                    Stage::Adding
                };
                if let Some(resync) = self.resync_of(member) {
                    resync.stage = stage;
                }
            }
            Stage::Whole => {
                resync.stage = Stage::Adding;
                self.at_mut(member).lost = false;
            }
            _ => {}
        }
    }

    fn propose_rejoin(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        // A failed replica is recorded as out first.
        if self.swap.is_some() || self.sets.iter().any(|set| set.failed != 0) {
            return;
        }
        let Some(resync) = self.resync_of(member) else {
            return;
        };
        resync.stage = Stage::Swapping;
        let set = resync.set;
        let floor = self.settled_version();
        self.settled = self.settled.max(floor);
        let store = self.at(member).place.store;
        let mut record = self.record.record.clone();
        for replica in &mut record.placement.sets[usize::from(set.0)].replicas {
            if replica.store == store {
                replica.state = ReplicaState::InSync;
                replica.synced_below = Version::NONE;
            } else if replica.state != ReplicaState::InSync {
                // What was filled lacks the versions of zeros that it had no block for. Another that is still out may
                // have old data there, and would not be seen to differ from this one: it is compared whole.
                replica.synced_below = Version::NONE;
            }
        }
        record.settled = record.settled.max(floor);
        let state = self.set_mut(set);
        state.adding |= state.bit_of(member);
        self.propose(SwapFor::Rejoin(member), record, actions);
    }

    /// The record has passed on: whoever was being added is in sync by it, or will not be by that swap any more.
    pub(super) fn resolve_adding(&mut self, actions: &mut Vec<Action>) {
        for set in self.set_indices() {
            let adding = std::mem::take(&mut self.set_mut(set).adding);
            for member in self.set(set).members(adding) {
                let bit = self.set(set).bit_of(member);
                let added = self.set(set).in_sync & bit != 0;
                let at = self
                    .resyncs
                    .iter()
                    .position(|resync| resync.member == member && resync.set == set);
                match (added, at) {
                    (true, Some(at)) => {
                        let resync = self.resyncs.remove(at);
                        actions.push(Action::News(News::Rejoined {
                            set,
                            member,
                            copied_blocks: resync.copied_blocks,
                        }));
                    }
                    // Its session ended while the swap was under way: in sync by the record, it has failed.
                    (true, None) if self.phase == Phase::Serving => {
                        self.set_mut(set).failed |= bit;
                    }
                    (true, None) => {}
                    (false, Some(at)) => self.resyncs[at].add_again(),
                    (false, None) => self.miss_ops_of(member),
                }
            }
            let binding = self.set(set).binding();
            for (_, op) in &mut self.ops {
                if op.set == set {
                    op.missed &= binding;
                }
            }
        }
    }

    /// The record does not say that it is in sync. The swap may come to pass yet, until another one has: so long it
    /// counts as if it had.
    pub(super) fn rejoin_undone(&mut self, member: MemberId) {
        if let Some(resync) = self.resync_of(member) {
            resync.add_again();
        }
    }

    /// A member's session ended: what it was being given is at its end.
    pub(super) fn abort_resync(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        let Some(at) = self
            .resyncs
            .iter()
            .position(|resync| resync.member == member)
        else {
            return;
        };
        let resync = self.resyncs.remove(at);
        self.drop_jobs(JobFor::Resync(member), actions);
        actions.push(Action::News(News::ResyncFailed {
            set: resync.set,
            member,
        }));
    }

    /// Whom a member is copied from: its source, and one before it that is still asked or read.
    pub(super) fn sources_of(&self, resync: &Resync) -> SmallVec<[MemberId; 4]> {
        let walked = resync.walk.iter().flat_map(RowsWalk::members);
        let mut sources: SmallVec<[MemberId; 4]> =
            [resync.source].into_iter().chain(walked).collect();
        sources.extend(self.compared_for(JobFor::Resync(resync.member)));
        sources.sort_unstable();
        sources.dedup();
        sources.retain(|member| *member != resync.member);
        sources
    }

    /// A member that others were copied from was lost: they begin again from another.
    pub(super) fn jobs_lost(&mut self, source: MemberId, actions: &mut Vec<Action>) {
        let of: Vec<MemberId> = self
            .resyncs
            .iter()
            .filter(|resync| self.sources_of(resync).contains(&source))
            .map(|resync| resync.member)
            .collect();
        for member in of {
            let Some(resync) = self.resync_of(member) else {
                continue;
            };
            if !matches!(resync.stage, Stage::Barrier { .. } | Stage::Copying) {
                continue;
            }
            let set = resync.set;
            self.drop_jobs(JobFor::Resync(member), actions);
            self.queries
                .retain(|_, query| query.purpose != Purpose::Rows(RowsOf::Resync(member)));
            let next = self.source_in(set);
            let before = self.op_serial;
            if let (Some(resync), Some(next)) = (self.resync_of(member), next) {
                resync.source = next;
                resync.walk = None;
                resync.stage = Stage::Barrier { before };
            }
        }
    }

    /// Replicas that the record does not name any more are not brought up to date. One that it has got again meanwhile
    /// may have given back what it was given: it is filled from the beginning.
    pub(super) fn resyncs_follow_record(&mut self, actions: &mut Vec<Action>) {
        let all: Vec<(MemberId, SetIndex, u64)> = self
            .resyncs
            .iter()
            .map(|resync| (resync.member, resync.set, resync.added_at))
            .collect();
        for (member, set, added_at) in all {
            match self.recorded(set, member).map(|replica| replica.added_at) {
                None => self.abort_resync(member, actions),
                Some(now) if now != added_at => self.fill_anew(member, now, actions),
                Some(_) => {}
            }
        }
    }

    fn fill_anew(&mut self, member: MemberId, added_at: u64, actions: &mut Vec<Action>) {
        self.drop_jobs(JobFor::Resync(member), actions);
        self.queries.retain(|_, query| {
            query.purpose != Purpose::Rows(RowsOf::Resync(member))
                && (query.purpose != Purpose::Rejoin || query.member != member)
        });
        let before = self.op_serial;
        let Some(resync) = self.resync_of(member) else {
            return;
        };
        resync.stage = Stage::Barrier { before };
        resync.walk = None;
        resync.added_at = added_at;
        let set = resync.set;
        // It gave back what it had, a change that is held for it included: that counts for nothing, and is sent again.
        let bit = self.set(set).bit_of(member);
        for (_, op) in &mut self.ops {
            if op.set == set {
                op.waiting &= !bit;
                op.applied &= !bit;
                op.refused &= !bit;
                op.targets &= !bit;
            }
        }
        self.settle_all(actions);
    }

    /// Everything that compares and copies is given up.
    pub(super) fn abandon_work(&mut self, actions: &mut Vec<Action>) {
        self.fill_due_us = None;
        self.resyncs.clear();
        self.damages.clear();
        self.drop_all_jobs(actions);
        for set in &mut self.sets {
            set.mirrored = 0;
        }
        self.queries.clear();
    }
}
