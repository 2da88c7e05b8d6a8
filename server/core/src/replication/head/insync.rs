//! Dropping what failed: the record says that a replica is out before anything it lacks is answered.

use super::super::wire::Status;
use super::claim::SwapFor;
use super::{Action, MemberId, News, Phase, ReplicaMask, ReplicatedHead};
use crate::records::{LeftoverRecord, ReplicaState, VolumeRecord};
use crate::units::{StoreId, Version};

/// Replicas taken out of their sets by one swap: each is an effect of its transaction, which has room for some.
const LEAVING_AT_ONCE: usize = 32;

impl ReplicatedHead {
    /// The copies of a store were found to differ from the others in what they should have: they count for nothing until
    /// they were compared as a whole and filled. False, and nothing changed: the volume is not served, the store has no
    /// copy in sync that takes work, or a set has no other.
    pub fn distrust(&mut self, store: StoreId, now_us: u64, actions: &mut Vec<Action>) -> bool {
        self.note_time(now_us);
        let member = self.members().find(|(_, place)| place.store == store);
        let Some((member, _)) = member else {
            return false;
        };
        let is_needed = |set: &super::Set| {
            let bit = set.bit_of(member);
            set.usable() & bit != 0 && set.usable() == bit
        };
        if self.phase != Phase::Serving
            || !self.at(member).is_open()
            || !self.is_in_sync_anywhere(member)
            || self.sets.iter().any(is_needed)
        {
            return false;
        }
        // As one that lost power is: nothing that it has is taken for granted.
        self.at_mut(member).lost = true;
        self.lose(member, Some(Status::Corrupt), actions);
        self.advance(actions);
        true
    }

    /// A member's session ended while the volume is served.
    pub(super) fn fail_replicas_of(
        &mut self,
        member: MemberId,
        status: Option<Status>,
        actions: &mut Vec<Action>,
    ) {
        let mut failed = false;
        for set in &mut self.sets {
            let bit = set.bit_of(member);
            failed |= set.in_sync & bit != 0 && set.failed & bit == 0;
            set.failed |= set.in_sync & bit;
        }
        self.miss_ops_of(member);
        for set in &mut self.sets {
            let bit = set.bit_of(member);
            set.mirrored &= !bit;
        }
        self.miss_flushes_of(member);
        self.abort_resync(member, actions);
        if failed {
            actions.push(Action::News(News::Failed { member, status }));
        }
        if self.sets.iter().any(|set| set.readable() == 0) {
            self.recover(actions);
            return;
        }
        self.jobs_lost(member, actions);
        self.repair_without(member, |_| true, actions);
        self.settle_all(actions);
        self.settle_flushes(actions);
    }

    /// Records what failed, and takes out what is wanted away and no longer needed.
    pub(super) fn advance_drops(&mut self, actions: &mut Vec<Action>) {
        if self.swap.is_some() || self.phase != Phase::Serving {
            return;
        }
        if self.admission.asks_for_epoch() {
            self.renew_epoch(actions);
            return;
        }
        let failed = self.sets.iter().any(|set| set.failed != 0);
        let leaving = self.leaving_replicas();
        // One whose swap into the record may come to pass yet, and that has failed: any other swap rules that out.
        let doubtful = self.sets.iter().any(|set| set.adding & !set.mirrored != 0);
        if !failed && leaving.is_empty() && !doubtful {
            return;
        }
        let floor = self.settled_version();
        let mut record = self.record.record.clone();
        for set in self.set_indices() {
            for place in ReplicaMask(self.set(set).failed).places() {
                let member = self.set(set).member(place);
                let floor = if self.at(member).lost {
                    Version::NONE
                } else {
                    floor
                };
                self.put_out(&mut record, set, member, floor);
            }
        }
        let mut leftovers = Vec::new();
        for (set, member) in leaving {
            let place = self.at(member).place;
            record.placement.sets[usize::from(set.0)]
                .replicas
                .retain(|replica| replica.store != place.store);
            leftovers.push(LeftoverRecord::of(&record, set, place.node, place.store));
            // Once the record has changed, its store may give the blocks back at any moment.
            if !self.params.rules.departing_unread {
                continue;
            }
            let state = self.set_mut(set);
            state.departing |= state.bit_of(member) & state.in_sync;
            if self
                .resyncs
                .iter()
                .any(|r| r.set == set && self.sources_of(r).contains(&member))
            {
                self.jobs_lost(member, actions);
            }
            self.repair_without(member, |of| of == set, actions);
        }
        record.settled = record.settled.max(floor);
        self.settled = self.settled.max(floor);
        self.propose_leaving(SwapFor::Drop, record, &leftovers, actions);
    }

    /// Replicas of a set that are in sync and stay so, as far as is known.
    pub(super) fn staying_in_sync(&self, set: crate::records::SetIndex) -> u32 {
        let recorded = &self.record.record.placement.sets[usize::from(set.0)];
        let staying = recorded.in_sync().filter(|replica| !replica.leaving);
        (staying.count() as u32).saturating_sub(self.set(set).failed.count_ones())
    }

    /// Replicas that are wanted away from sets which have as many others in sync as they should.
    fn leaving_replicas(&self) -> Vec<(crate::records::SetIndex, MemberId)> {
        let mut leaving = Vec::new();
        for set in self.set_indices() {
            let recorded = &self.record.record.placement.sets[usize::from(set.0)];
            if self.staying_in_sync(set) < self.record.record.replicas {
                continue;
            }
            for replica in recorded.replicas.iter().filter(|replica| replica.leaving) {
                let member = self
                    .members()
                    .find(|(_, place)| place.store == replica.store)
                    .map(|(member, _)| member);
                if let Some(member) = member
                    && leaving.len() < LEAVING_AT_ONCE
                {
                    leaving.push((set, member));
                }
            }
        }
        leaving
    }

    /// The record says what is in sync now.
    pub(super) fn dropped(&mut self, actions: &mut Vec<Action>) {
        // What was being copied from a replica that has left goes on from another.
        let sources: smallvec::SmallVec<[(crate::records::SetIndex, MemberId); 4]> = self
            .resyncs
            .iter()
            .flat_map(|resync| {
                let sources = self.sources_of(resync).into_iter();
                sources.map(|source| (resync.set, source))
            })
            .collect();
        for (set, source) in sources {
            if self.set(set).usable() & self.set(set).bit_of(source) == 0 {
                self.jobs_lost(source, actions);
            }
        }
        if self.sets.iter().any(|set| set.readable() == 0) {
            self.recover(actions);
            return;
        }
        self.settle_all(actions);
        self.settle_flushes(actions);
        self.told_to_wait = true;
        self.retry(actions);
    }

    /// Says what changed between two records.
    pub(super) fn tell_changes(&mut self, before: &VolumeRecord, actions: &mut Vec<Action>) {
        for set in self.set_indices() {
            let at = usize::from(set.0);
            let now = &self.record.record.placement.sets[at];
            for replica in &before.placement.sets[at].replicas {
                let member = self
                    .members()
                    .find(|(_, place)| place.store == replica.store)
                    .map(|(member, _)| member);
                let Some(member) = member else { continue };
                match now
                    .replicas
                    .iter()
                    .find(|other| other.store == replica.store)
                {
                    None => actions.push(Action::News(News::Removed { set, member })),
                    Some(other)
                        if replica.state == ReplicaState::InSync
                            && other.state != ReplicaState::InSync =>
                    {
                        actions.push(Action::News(News::Dropped { set, member }));
                    }
                    Some(_) => {}
                }
            }
        }
    }
}
