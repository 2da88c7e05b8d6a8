//! The record and its compare-and-swaps. A swap whose outcome is not known is looked up before anything else is done.

use super::opening::Opening;
use super::{Action, Phase, ReplicatedHead, StopReason, SwapOutcome};
use crate::records::{
    self, ClaimError, LeftoverRecord, Record, Revision, Transaction, Versioned, VolumeRecord,
    VolumeState, keys,
};
use crate::units::Epoch;

/// What a swap is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SwapFor {
    /// The claim, or a further one of the same head.
    Claim,
    /// What was found while sealing.
    Opening,
    /// Replicas out of sync, or out of the set.
    Drop,
    /// A replica in sync again.
    Rejoin(super::MemberId),
    /// A new epoch for its versions.
    Renew,
}

#[derive(Debug)]
pub(super) struct PendingSwap {
    serial: u64,
    pub(super) reason: SwapFor,
    proposed: Box<VolumeRecord>,
    /// Its outcome is not known; the record is being read.
    reading: bool,
    pub(super) since_us: u64,
}

impl ReplicatedHead {
    /// Whether the record names this head as the one that claimed it.
    fn is_mine(&self, record: &VolumeRecord) -> bool {
        record.head == Some(self.params.claim)
    }

    pub(super) fn propose_claim(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Claiming;
        match records::claim(&self.record, self.params.claim, self.params.written) {
            Ok((claimed, transaction)) => {
                self.swap_in(SwapFor::Claim, claimed, transaction, actions);
            }
            Err(ClaimError::Deleting { .. }) => self.stop(StopReason::Deleted, actions),
            Err(ClaimError::EpochsExhausted { .. }) => {
                self.stop(StopReason::EpochsExhausted, actions);
            }
        }
    }

    /// Proposes a changed record under the next epoch.
    pub(super) fn propose(
        &mut self,
        reason: SwapFor,
        record: VolumeRecord,
        actions: &mut Vec<Action>,
    ) {
        self.propose_leaving(reason, record, &[], actions);
    }

    /// The same, with notes of what stores are left with.
    pub(super) fn propose_leaving(
        &mut self,
        reason: SwapFor,
        mut record: VolumeRecord,
        leftovers: &[LeftoverRecord],
        actions: &mut Vec<Action>,
    ) {
        if record.epoch >= Epoch::MAX {
            self.stop(StopReason::EpochsExhausted, actions);
            return;
        }
        record.epoch = Epoch(record.epoch.0 + 1);
        let key = keys::volume(record.id);
        let mut transaction = Transaction::new()
            .when_unchanged(key.clone(), self.record.changed_at)
            .put(key, record.encode());
        for leftover in leftovers {
            transaction = transaction.put(leftover.key(), leftover.encode());
        }
        self.swap_in(reason, record, transaction, actions);
    }

    fn swap_in(
        &mut self,
        reason: SwapFor,
        proposed: VolumeRecord,
        transaction: Transaction,
        actions: &mut Vec<Action>,
    ) {
        debug_assert!(self.swap.is_none());
        debug_assert_eq!(proposed.check_invariants(), Ok(()));
        self.swap_serial += 1;
        self.swap = Some(PendingSwap {
            serial: self.swap_serial,
            reason,
            proposed: Box::new(proposed),
            reading: false,
            since_us: self.now_us,
        });
        actions.push(Action::Swap {
            serial: self.swap_serial,
            transaction,
        });
    }

    pub(super) fn on_swapped(
        &mut self,
        serial: u64,
        outcome: SwapOutcome,
        actions: &mut Vec<Action>,
    ) {
        let Some(swap) = self
            .swap
            .as_mut()
            .filter(|swap| swap.serial == serial && !swap.reading)
        else {
            return;
        };
        match outcome {
            SwapOutcome::Done(revision) => {
                let proposed = (*swap.proposed).clone();
                self.swapped(proposed, revision, true, actions);
            }
            SwapOutcome::Conflict | SwapOutcome::Unknown => {
                swap.reading = true;
                actions.push(Action::ReadRecord);
            }
        }
    }

    /// A proposal is in the metadata store. Not always the last one: one whose outcome was not known may have come to
    /// pass after all, when the record had been read; it has the same epoch. What the record says is what counts.
    fn swapped(
        &mut self,
        record: VolumeRecord,
        changed_at: Revision,
        is_last: bool,
        actions: &mut Vec<Action>,
    ) {
        let Some(swap) = self.swap.take() else { return };
        let before = std::mem::replace(&mut self.record, Versioned { record, changed_at });
        if swap.reason == SwapFor::Claim {
            // A restored metadata store may name an epoch that the stores know already.
            self.params.written = self.params.written.max(self.record.record.epoch);
        }
        self.settled = self.settled.max(self.record.record.settled);
        self.adopt_sets(actions);
        self.tell_changes(&before.record, actions);
        self.resolve_adding(actions);
        self.resyncs_follow_record(actions);
        if self.phase == Phase::Claiming && swap.reason != SwapFor::Claim {
            // It was decided meanwhile to begin anew.
            self.propose_claim(actions);
            return;
        }
        match swap.reason {
            SwapFor::Claim => self.claimed(actions),
            SwapFor::Opening => self.recorded_opening(is_last, actions),
            SwapFor::Drop | SwapFor::Rejoin(_) => self.dropped(actions),
            SwapFor::Renew => {
                let epoch = self.record.record.epoch;
                self.admission.renew_epoch(epoch);
            }
        }
    }

    pub(super) fn on_record(
        &mut self,
        asked: bool,
        record: Option<Box<Versioned<VolumeRecord>>>,
        actions: &mut Vec<Action>,
    ) {
        let waiting = self.swap.as_ref().is_some_and(|swap| swap.reading);
        let Some(read) = record else {
            if asked || self.swap.is_none() {
                self.stop(StopReason::Deleted, actions);
            }
            return;
        };
        if read.record.check_invariants().is_err() || !read.record.placement.is_replicated() {
            // Somebody damaged it; nothing good comes of acting on it.
            self.stop(StopReason::Deleted, actions);
            return;
        }
        if asked && waiting {
            self.look_up(*read, actions);
        } else if self.swap.is_none() && read.changed_at > self.record.changed_at {
            self.adopt(*read, actions);
        }
    }

    /// What became of a swap whose outcome was not known.
    fn look_up(&mut self, read: Versioned<VolumeRecord>, actions: &mut Vec<Action>) {
        let Some(swap) = &self.swap else { return };
        if read.record.state == VolumeState::Deleting {
            // Other nodes drop their copies by now.
            return self.stop(StopReason::Deleted, actions);
        }
        // No other head has this claim, and this one proposes one epoch at a time.
        if self.is_mine(&read.record) && read.record.epoch == swap.proposed.epoch {
            let is_last = read.record == *swap.proposed;
            self.swapped(read.record, read.changed_at, is_last, actions);
            return;
        }
        let same_reign = read.record.epoch == self.record.record.epoch
            && read.record.head == self.record.record.head;
        if !same_reign {
            self.stop(
                StopReason::Fenced {
                    epoch: read.record.epoch,
                },
                actions,
            );
            return;
        }
        // It did not happen, or has yet to: then the next one meets a conflict. What it was for is decided afresh.
        let reason = swap.reason;
        self.swap = None;
        self.note_changed_by_others(read.changed_at);
        self.record = read;
        self.adopt_sets(actions);
        if self.phase == Phase::Claiming {
            for set in &mut self.sets {
                set.adding = 0;
            }
            self.propose_claim(actions);
            return;
        }
        match reason {
            SwapFor::Claim => self.propose_claim(actions),
            SwapFor::Opening => self.phase = Phase::Sealing,
            SwapFor::Drop => {}
            SwapFor::Rejoin(member) => self.rejoin_undone(member),
            SwapFor::Renew => self.renew_epoch(actions),
        }
        self.resyncs_follow_record(actions);
        if self.phase == Phase::Serving {
            self.dropped(actions);
        }
    }

    /// The record was changed by somebody else.
    fn adopt(&mut self, read: Versioned<VolumeRecord>, actions: &mut Vec<Action>) {
        if read.record.state == VolumeState::Deleting {
            self.stop(StopReason::Deleted, actions);
        } else if !self.is_mine(&read.record) || read.record.epoch < self.record.record.epoch {
            self.stop(
                StopReason::Fenced {
                    epoch: read.record.epoch,
                },
                actions,
            );
        } else if read.record.epoch > self.record.record.epoch {
            // A swap of its own that had been given up came to pass.
            self.settled = self.settled.max(read.record.settled);
            self.record = read;
            self.adopt_sets(actions);
            self.resolve_adding(actions);
            self.resyncs_follow_record(actions);
            if self.phase == Phase::Serving {
                self.dropped(actions);
            } else if matches!(self.phase, Phase::Reconciling | Phase::Mending) {
                self.seal_again(actions);
            }
        } else {
            self.note_changed_by_others(read.changed_at);
            self.record = read;
            self.adopt_sets(actions);
            self.resyncs_follow_record(actions);
            if self.phase == Phase::Serving {
                // What waited for a replica that is gone waits no more.
                self.dropped(actions);
            }
        }
    }

    /// A record that others have changed meanwhile fails every swap proposed before: what was to depart has not.
    fn note_changed_by_others(&mut self, changed_at: Revision) {
        if changed_at > self.record.changed_at {
            for set in &mut self.sets {
                set.departing = 0;
            }
        }
    }

    /// A replica is sealed at an epoch that the record does not have.
    pub(super) fn sealed_beyond(&mut self, epoch: Epoch, actions: &mut Vec<Action>) {
        // Either another head claimed and this one has not heard of it: its claim will meet a conflict. Or the record
        // is older than the stores (restored from a backup): it has to be claimed beyond what they know.
        self.params.written = self.params.written.max(epoch);
        if self.swap.is_none() && self.phase != Phase::Closing {
            self.recover(actions);
        }
    }

    /// Claims again and goes the whole way to serving once more: a set has no sound replica left, and when one comes
    /// back, what it has must be looked at like by a new head. Changes under way are undecided until then.
    pub(super) fn recover(&mut self, actions: &mut Vec<Action>) {
        self.abandon_work(actions);
        for (_, op) in &mut self.ops {
            op.waiting = 0;
            op.missed = 0;
        }
        let again: smallvec::SmallVec<[u64; 4]> =
            self.flushes.drain().map(|flush| flush.tag).collect();
        actions.extend(again.into_iter().map(|tag| Action::FlushAgain { tag }));
        self.told_to_wait = true;
        self.opening = Opening::default();
        for set in &mut self.sets {
            set.failed = 0;
        }
        for id in 0..self.members.len() {
            let member = super::MemberId(id as u8);
            if self.members[id].session != super::members::Session::None {
                if self.members[id].is_open() {
                    self.members[id].away_since_us = self.now_us;
                }
                self.members[id].session = super::members::Session::None;
                actions.push(Action::CloseSession {
                    member,
                    query: None,
                });
            }
            self.members[id].fresh_until_us = 0;
        }
        self.queries.clear();
        if self.swap.is_some() {
            // The outcome of what is under way comes first; then `claimed` or `look_up` go on from there.
            self.phase = Phase::Claiming;
            return;
        }
        self.propose_claim(actions);
    }

    /// Few versions are left of the epoch: it goes on under the next.
    pub(super) fn renew_epoch(&mut self, actions: &mut Vec<Action>) {
        if self.swap.is_none() && self.phase == Phase::Serving {
            let record = self.record.record.clone();
            self.propose(SwapFor::Renew, record, actions);
        }
    }
}
