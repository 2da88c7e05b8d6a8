//! From the claim to serving: seal every replica in sync, wait for the reads of an old head to end, record what was
//! found, make the copies alike.

use smallvec::SmallVec;

use super::claim::SwapFor;
use super::members::Purpose;
use super::{Action, MemberId, News, Phase, ReplicaMask, ReplicatedHead};
use crate::records::{ReplicaState, SetIndex, VolumeRecord};
use crate::units::Version;

/// What is known on the way.
#[derive(Debug, Default)]
pub(super) struct Opening {
    /// Of each set, when the first of its replicas in sync that is not lost was sealed: from then on an old head's
    /// reads of the set are at their end within the lease.
    sealed_at_us: Vec<Option<u64>>,
    /// Sets of which every copy in sync lost power.
    all_lost: Vec<SetIndex>,
    /// Members that are flushed and told that they are whole before clients are let in: what is left to do with each.
    mending: SmallVec<[(MemberId, Mending); 4]>,
    reconcile: super::reconcile::Reconcile,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mending {
    Flush,
    Flushing,
    Whole,
    Telling,
    Done,
}

/// What becomes of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Not yet.
    Wait,
    /// With these replicas in sync, the others out.
    Keep(u8),
    /// Every copy lost power: with all of them.
    KeepLost,
}

impl ReplicatedHead {
    pub(super) fn opening_reconcile(&mut self) -> &mut super::reconcile::Reconcile {
        &mut self.opening.reconcile
    }

    /// The claim is in the record.
    pub(super) fn claimed(&mut self, actions: &mut Vec<Action>) {
        let epoch = self.record.record.epoch;
        self.admission.renew_epoch(epoch);
        self.opening = Opening {
            sealed_at_us: vec![None; self.sets.len()],
            ..Opening::default()
        };
        self.phase = Phase::Sealing;
        // With the claim recorded, no swap of before can come to pass.
        for set in &mut self.sets {
            set.departing = 0;
        }
        for member in &mut self.members {
            member.retry_at_us = 0;
            member.lost = false;
        }
        let _ = actions;
    }

    pub(super) fn note_sealed(&mut self, member: MemberId) {
        if self.at(member).lost {
            return;
        }
        for (set, sealed_at) in self.sets.iter().zip(&mut self.opening.sealed_at_us) {
            if set.in_sync & set.bit_of(member) != 0 {
                sealed_at.get_or_insert(self.now_us);
            }
        }
    }

    /// A member was lost on the way to serving.
    pub(super) fn seal_again(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Reconciling | Phase::Mending) {
            self.abandon_work(actions);
            self.phase = Phase::Sealing;
        }
    }

    fn verdict(&self, index: usize) -> Verdict {
        let set = &self.sets[index];
        let (mut good, mut lost, mut away) = (0u8, 0u8, 0u8);
        for place in ReplicaMask(set.in_sync).places() {
            let member = self.at(set.member(place));
            match (member.is_open(), member.lost) {
                (true, false) => good |= 1 << place,
                (true, true) => lost |= 1 << place,
                (false, _) => away |= 1 << place,
            }
        }
        if away == 0 {
            return if good != 0 {
                Verdict::Keep(good)
            } else if lost != 0 {
                Verdict::KeepLost
            } else {
                Verdict::Wait
            };
        }
        // Without a sound copy, one of those away may hold what was acknowledged.
        if good == 0 {
            return Verdict::Wait;
        }
        let waited = self.opening.sealed_at_us[index]
            .is_some_and(|at| self.now_us >= at + self.params.lease_wait_us());
        if waited || !self.params.rules.lease_wait {
            Verdict::Keep(good)
        } else {
            Verdict::Wait
        }
    }

    pub(super) fn advance_sealing(&mut self, actions: &mut Vec<Action>) {
        let verdicts: SmallVec<[Verdict; 8]> = (0..self.sets.len())
            .map(|index| self.verdict(index))
            .collect();
        if verdicts.contains(&Verdict::Wait) {
            return;
        }
        let mut record = self.record.record.clone();
        let mut changed = false;
        self.opening.all_lost.clear();
        for (index, verdict) in verdicts.iter().enumerate() {
            match verdict {
                Verdict::Wait => {}
                Verdict::Keep(good) => {
                    for place in ReplicaMask(self.sets[index].in_sync & !good).places() {
                        let member = self.sets[index].member(place);
                        // What the old head had under way is not known; what was settled before is.
                        let floor = if self.at(member).lost {
                            Version::NONE
                        } else {
                            record.settled
                        };
                        self.put_out(&mut record, SetIndex(index as u16), member, floor);
                        changed = true;
                    }
                }
                Verdict::KeepLost => self.opening.all_lost.push(SetIndex(index as u16)),
            }
        }
        if !self.opening.all_lost.is_empty() {
            changed = true;
            // Copies went back to what was flushed: nothing is known to be alike any more.
            record.settled = Version::NONE;
            for replica in record
                .placement
                .sets
                .iter_mut()
                .flat_map(|set| &mut set.replicas)
            {
                replica.synced_below = Version::NONE;
            }
            if self.params.rules.end_sessions {
                record.client_generation += 1;
            }
        }
        if changed {
            self.phase = Phase::Recording;
            self.propose(SwapFor::Opening, record, actions);
        } else {
            self.begin_reconcile(actions);
        }
    }

    /// Makes a replica of a proposed record one that is out of sync.
    pub(super) fn put_out(
        &self,
        record: &mut VolumeRecord,
        set: SetIndex,
        member: MemberId,
        floor: Version,
    ) {
        let store = self.at(member).place.store;
        for replica in &mut record.placement.sets[usize::from(set.0)].replicas {
            if replica.store == store {
                replica.state = ReplicaState::Out;
                replica.synced_below = floor;
            }
        }
    }

    /// The record says what was found. A member may have been lost meanwhile, or come back from a loss of power: then
    /// what was found is not so any more.
    pub(super) fn recorded_opening(&mut self, is_last: bool, actions: &mut Vec<Action>) {
        let all_open = is_last
            && self.set_indices().all(|set| {
                let may_be_lost = self.opening.all_lost.contains(&set);
                let set = self.set(set);
                set.members(set.in_sync).iter().all(|member| {
                    let member = self.at(*member);
                    member.is_open() && (may_be_lost || !member.lost)
                })
            });
        if all_open {
            self.begin_reconcile(actions);
        } else {
            self.phase = Phase::Sealing;
        }
    }

    fn begin_reconcile(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Reconciling;
        self.start_reconcile(actions);
    }

    /// Copies are alike. What had lost power and is in sync again is made durable before its mark goes.
    pub(super) fn reconciled(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Mending;
        self.opening.mending.clear();
        for id in 0..self.members.len() {
            let member = MemberId(id as u8);
            // With sets that it is out of, it is whole only when they have been filled too.
            let in_all = self.sets.iter().all(|set| {
                let bit = set.bit_of(member);
                bit == 0 || set.in_sync & bit != 0
            });
            if self.members[id].lost && in_all && self.is_wanted(member) {
                self.opening.mending.push((member, Mending::Flush));
            }
        }
        self.advance_mending(actions);
    }

    pub(super) fn mended(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        let mut whole = false;
        for (at, step) in &mut self.opening.mending {
            if *at == member {
                *step = match *step {
                    Mending::Flushing => Mending::Whole,
                    _ => Mending::Done,
                };
                whole = *step == Mending::Done;
            }
        }
        if whole {
            self.at_mut(member).lost = false;
        }
        let _ = actions;
    }

    pub(super) fn advance_mending(&mut self, actions: &mut Vec<Action>) {
        // None is told that it is whole before all are flushed: the first one's word is what the next head goes by.
        let all_flushed = self
            .opening
            .mending
            .iter()
            .all(|(_, step)| !matches!(step, Mending::Flush | Mending::Flushing));
        for at in 0..self.opening.mending.len() {
            let (member, step) = self.opening.mending[at];
            match step {
                Mending::Flush => {
                    let query = self.ask(member, Purpose::Mend);
                    actions.push(Action::Flush { query, member });
                    self.opening.mending[at].1 = Mending::Flushing;
                }
                Mending::Whole if all_flushed => {
                    let query = self.ask(member, Purpose::Mend);
                    actions.push(Action::Whole { query, member });
                    self.opening.mending[at].1 = Mending::Telling;
                }
                _ => {}
            }
        }
        if self
            .opening
            .mending
            .iter()
            .all(|(_, step)| *step == Mending::Done)
        {
            self.serve(actions);
        }
    }

    fn serve(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Serving;
        // A change that waits was begun with a version from before what the reconcile wrote: every store would drop it.
        self.settled = self.settled.max(self.admission.versions_from());
        let generation = self.record.record.client_generation;
        for set in self.opening.all_lost.drain(..) {
            for member in
                self.sets[usize::from(set.0)].members(self.sets[usize::from(set.0)].in_sync)
            {
                actions.push(Action::News(News::LostPower { member }));
            }
        }
        if self.announced.is_some_and(|before| before < generation) {
            actions.push(Action::EndSessions {
                client_generation: generation,
            });
        }
        self.announced = Some(generation);
        actions.push(Action::Serving {
            client_generation: generation,
        });
        self.redo_all(actions);
        self.told_to_wait = true;
        self.retry(actions);
    }
}
