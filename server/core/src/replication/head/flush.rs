//! Flushes of clients: what was answered before them is durable on every replica in sync, and on those being filled.
//!
//! That is also said of what a newer head has answered, of which this one may not have heard. So a flush is never
//! answered from memory, not even when nothing was written here: it goes to all in sync of one set at least. A newer head
//! has sealed one of them before it served anybody, and that one refuses.

use smallvec::SmallVec;

use super::super::wire::Status;
use super::sets::Set;
use super::write::{op_key, op_place};
use super::{Action, FlushAdmission, MemberId, OpKey, Outcome, Phase, ReplicatedHead};

/// A flush under way.
#[derive(Clone, Debug)]
pub(super) struct FlushOp {
    serial: u64,
    pub(super) tag: u64,
    since_us: u64,
    waiting: SmallVec<[MemberId; 8]>,
    /// What each member had answered when it was asked.
    asked: SmallVec<[(MemberId, u64); 8]>,
}

impl ReplicatedHead {
    /// Where a flush goes: to the members that answered changes since they were last flushed, and to the whole of a set.
    pub fn begin_flush(&mut self, tag: u64, now_us: u64) -> FlushAdmission {
        if self.phase == Phase::Stopped {
            return FlushAdmission::Stopped;
        }
        if self.phase != Phase::Serving {
            self.told_to_wait = true;
            return FlushAdmission::Wait;
        }
        self.now_us = self.now_us.max(now_us);
        self.clients_us = self.now_us;
        let mut asked: SmallVec<[(MemberId, u64); 8]> = SmallVec::new();
        for set in &self.sets {
            for member in set.members(set.usable() | set.mirrored) {
                let m = self.at(member);
                if m.answered > m.flushed && !asked.iter().any(|(known, _)| *known == member) {
                    asked.push((member, m.answered));
                }
            }
        }
        self.add_witnesses(&mut asked);
        self.op_serial += 1;
        let flush = FlushOp {
            serial: self.op_serial,
            tag,
            since_us: self.now_us,
            waiting: asked.iter().map(|(member, _)| *member).collect(),
            asked,
        };
        let members = flush.waiting.clone();
        let serial = flush.serial;
        let place = self.flushes.insert(flush);
        FlushAdmission::Send {
            op: op_key(place, serial),
            members,
        }
    }

    /// Sees to it that everybody in sync of some set is asked; of the set that costs the fewest questions more. After a
    /// change that is the set it went to, and costs none.
    fn add_witnesses(&self, asked: &mut SmallVec<[(MemberId, u64); 8]>) {
        let missing = |set: &Set| {
            let mut members = set.members(set.witnesses());
            members.retain(|member| !asked.iter().any(|(known, _)| known == member));
            members
        };
        let fewest = self.sets.iter().map(missing).min_by_key(SmallVec::len);
        let more = fewest.into_iter().flatten();
        asked.extend(more.map(|member| (member, self.at(member).answered)));
    }

    /// A replica that failed, or that may or may not be in sync, might come to be relied on without what was flushed.
    fn nothing_failed(&self) -> bool {
        self.sets
            .iter()
            .all(|set| set.failed == 0 && set.adding & !set.mirrored == 0)
    }

    /// A member answered a flush.
    pub fn flush_answered(
        &mut self,
        op: OpKey,
        member: MemberId,
        status: Status,
        now_us: u64,
        actions: &mut Vec<Action>,
    ) -> Outcome {
        let (place, serial) = op_place(op);
        self.now_us = self.now_us.max(now_us);
        let Some(flush) = self
            .flushes
            .get_mut(place)
            .filter(|flush| flush.serial == serial)
        else {
            return Outcome::Pending;
        };
        let Some(at) = flush.waiting.iter().position(|known| *known == member) else {
            return Outcome::Pending;
        };
        if status != Status::Ok {
            self.lose(member, Some(status), actions);
            self.advance(actions);
            return Outcome::Pending;
        }
        flush.waiting.swap_remove(at);
        let asked = flush.asked.iter().find(|(known, _)| *known == member);
        if let Some(answered) = asked.map(|(_, answered)| *answered) {
            let m = self.at_mut(member);
            m.flushed = m.flushed.max(answered);
        }
        match self.conclude_flush(place) {
            Some(tag) => Outcome::Acknowledge(tag),
            None => Outcome::Pending,
        }
    }

    fn conclude_flush(&mut self, place: usize) -> Option<u64> {
        let done = self
            .flushes
            .get(place)
            .is_some_and(|flush| flush.waiting.is_empty());
        // A member that did not flush is first recorded as out.
        (done && self.phase == Phase::Serving && self.nothing_failed())
            .then(|| self.flushes.remove(place).tag)
    }

    /// Looks at every flush again: what is in sync has changed.
    pub(super) fn settle_flushes(&mut self, actions: &mut Vec<Action>) {
        let mut all: SmallVec<[(u64, usize); 8]> = self
            .flushes
            .iter()
            .map(|(place, flush)| (flush.serial, place))
            .collect();
        all.sort_unstable();
        for (_, place) in all {
            if let Some(tag) = self.conclude_flush(place) {
                actions.push(Action::Flushed { tag });
            }
        }
    }

    /// A member will not answer any more.
    pub(super) fn miss_flushes_of(&mut self, member: MemberId) {
        for (_, flush) in &mut self.flushes {
            flush.waiting.retain(|known| *known != member);
        }
    }

    pub(super) fn late_flush(&self, member: MemberId, limit_us: u64) -> bool {
        self.flushes.iter().any(|(_, flush)| {
            flush.waiting.contains(&member) && self.now_us >= flush.since_us + limit_us
        })
    }
}
