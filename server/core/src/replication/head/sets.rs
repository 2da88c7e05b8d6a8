//! Replica sets as the head sees them: who is in sync by the record, who failed since, who is being filled.

use smallvec::SmallVec;

use super::{Action, MemberId, ReplicaMask, ReplicatedHead};
use crate::records::{REPLICAS_MAX, Replica, ReplicaState, SetIndex};
use crate::units::Version;

/// One set. A replica keeps its place as long as the record names it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Set {
    pub(super) places: [Option<MemberId>; REPLICAS_MAX],
    /// In sync by the record.
    pub(super) in_sync: u8,
    /// Of those, the ones that failed; the record does not say so yet.
    pub(super) failed: u8,
    /// Not in sync; changes go to them too.
    pub(super) mirrored: u8,
    /// Of those mirrored, the ones being swapped into the record; whether they are in sync is not known until that is
    /// answered.
    pub(super) adding: u8,
    /// In sync by the record, wanted away, and proposed to be taken out: its store may have given its blocks back by the
    /// time that is heard of, so nothing is read from it any more.
    pub(super) departing: u8,
}

impl Set {
    /// In sync and sound.
    #[inline]
    pub(super) fn usable(&self) -> u8 {
        self.in_sync & !self.failed
    }

    /// Sound, and believed whatever a swap under way has come to.
    #[inline]
    pub(super) fn readable(&self) -> u8 {
        self.usable() & !self.departing
    }

    /// Replicas that count as in sync for what may be answered.
    #[inline]
    pub(super) fn binding(&self) -> u8 {
        self.in_sync | self.adding
    }

    /// Sound, and in sync by the record as it is known or as it may be by now. A newer head starts with one of these, which
    /// it has sealed, or with one that failed and is not yet recorded as out.
    #[inline]
    pub(super) fn witnesses(&self) -> u8 {
        self.usable() | self.adding & self.mirrored
    }

    #[inline]
    pub(super) fn member(&self, place: usize) -> MemberId {
        self.places[place].expect("a place in a mask is taken")
    }

    pub(super) fn place_of(&self, member: MemberId) -> Option<usize> {
        self.places.iter().position(|at| *at == Some(member))
    }

    pub(super) fn bit_of(&self, member: MemberId) -> u8 {
        self.place_of(member).map_or(0, |place| 1 << place)
    }

    pub(super) fn members(&self, mask: u8) -> SmallVec<[MemberId; REPLICAS_MAX]> {
        ReplicaMask(mask)
            .places()
            .map(|place| self.member(place))
            .collect()
    }
}

impl ReplicatedHead {
    /// Makes the sets what the record says. What failed stays failed as long as the record has it in sync.
    pub(super) fn adopt_sets(&mut self, actions: &mut Vec<Action>) {
        let placement = std::mem::take(&mut self.record.record.placement);
        self.sets.resize(placement.sets.len(), Set::default());
        for (index, wanted) in placement.sets.iter().enumerate() {
            let members: SmallVec<[Option<MemberId>; REPLICAS_MAX]> = wanted
                .replicas
                .iter()
                .map(|replica| self.member_of(replica.node, replica.store))
                .collect();
            let set = &mut self.sets[index];
            let mut gone = 0;
            for (place, at) in set.places.iter_mut().enumerate() {
                if at.is_some() && !members.contains(at) {
                    gone |= 1u8 << place;
                    *at = None;
                }
            }
            set.mirrored &= !gone;
            set.adding &= !gone;
            let before = std::mem::take(&mut set.in_sync);
            for (replica, member) in wanted.replicas.iter().zip(&members) {
                let Some(member) = *member else { continue };
                let place = set.place_of(member).or_else(|| {
                    let free = set.places.iter().position(Option::is_none)?;
                    set.places[free] = Some(member);
                    Some(free)
                });
                let Some(place) = place else { continue };
                if replica.state == ReplicaState::InSync {
                    set.in_sync |= 1 << place;
                }
            }
            set.failed &= set.in_sync;
            set.departing &= set.in_sync;
            set.mirrored &= !set.in_sync;
            let bound = set.binding();
            let left = before & !set.in_sync | gone;
            // A place that may be taken anew is in no op's mask of what it lacks.
            for (_, op) in &mut self.ops {
                if usize::from(op.set.0) == index {
                    op.missed &= bound;
                    op.waiting &= !left;
                    op.applied &= !left;
                    op.refused &= !left;
                    op.targets &= !left;
                }
            }
        }
        self.record.record.placement = placement;
        let mut ended: SmallVec<[MemberId; 4]> = SmallVec::new();
        for id in 0..self.members.len() {
            let member = MemberId(id as u8);
            let wanted = self.is_wanted(member);
            if wanted == self.members[id].connected {
                continue;
            }
            self.members[id].connected = wanted;
            if wanted {
                actions.push(Action::Connect { member });
            } else {
                // Nobody waits for what it would have answered.
                self.miss_flushes_of(member);
                if self.members[id].session != super::members::Session::None {
                    self.members[id].session = super::members::Session::None;
                    ended.push(member);
                    self.queries.retain(|_, query| query.member != member);
                    actions.push(Action::CloseSession {
                        member,
                        query: None,
                    });
                }
                self.members[id].link = false;
                actions.push(Action::Disconnect { member });
            }
        }
        for member in ended {
            self.repair_without(member, |_| true, actions);
        }
    }

    pub(super) fn set(&self, set: SetIndex) -> &Set {
        &self.sets[usize::from(set.0)]
    }

    pub(super) fn set_mut(&mut self, set: SetIndex) -> &mut Set {
        &mut self.sets[usize::from(set.0)]
    }

    pub(super) fn set_indices(&self) -> impl Iterator<Item = SetIndex> + use<> {
        (0..self.sets.len() as u16).map(SetIndex)
    }

    /// The member of a replica of a set.
    #[inline]
    pub fn replica(&self, set: SetIndex, place: u8) -> MemberId {
        self.set(set).member(usize::from(place))
    }

    pub(super) fn is_wanted(&self, member: MemberId) -> bool {
        self.sets.iter().any(|set| set.place_of(member).is_some())
    }

    pub(super) fn is_in_sync_anywhere(&self, member: MemberId) -> bool {
        self.sets
            .iter()
            .any(|set| set.in_sync & set.bit_of(member) != 0)
    }

    pub(super) fn is_failed(&self, member: MemberId) -> bool {
        self.sets
            .iter()
            .any(|set| set.failed & set.bit_of(member) != 0)
    }

    pub(super) fn is_recording(&self, member: MemberId) -> bool {
        self.sets
            .iter()
            .any(|set| set.adding & set.bit_of(member) != 0)
    }

    pub(super) fn min_in_sync(&self) -> u32 {
        self.record.record.min_in_sync
    }

    /// Every block whose newest version is below this is the same on all replicas in sync: no change that was given a
    /// smaller one is under way.
    pub(super) fn settled_version(&self) -> Version {
        let oldest = self.ops.iter().map(|(_, op)| op.version).min();
        let next = self.admission.versions_from();
        oldest.map_or(next, |oldest| oldest.min(next))
    }

    /// The replica of the record that a member is in a set.
    pub(super) fn recorded(&self, set: SetIndex, member: MemberId) -> Option<&Replica> {
        let store = self.at(member).place.store;
        self.record.record.placement.sets[usize::from(set.0)]
            .replicas
            .iter()
            .find(|replica| replica.store == store)
    }
}
