//! Changes: sent to every replica in sync, answered when each of them has it or is recorded as out.

use smallvec::SmallVec;

use super::super::wire::Status;
use super::{
    Action, INTERNAL_TAG, MemberId, OpKey, Outcome, Phase, ReplicaMask, ReplicatedHead,
    WriteAdmission,
};
use crate::records::SetIndex;
use crate::store::ExtentKey;
use crate::units::Version;

/// A change that was sent and is not yet answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct WriteOp {
    pub(super) serial: u64,
    pub(super) tag: u64,
    pub(super) version: Version,
    pub(super) extent: ExtentKey,
    pub(super) first_block: u32,
    pub(super) count: u32,
    pub(super) since_us: u64,
    pub(super) set: SetIndex,
    /// Whom it was sent to.
    pub(super) targets: u8,
    /// Of those, who has not answered.
    pub(super) waiting: u8,
    /// Who has it.
    pub(super) applied: u8,
    /// Who refused it and has nothing of it.
    pub(super) refused: u8,
    /// Who may have it or not, and counts as in sync as long as the record says so.
    pub(super) missed: u8,
}

/// Where an op is, by its key: 24 bits of place, 40 bits of serial, so that an answer of an earlier op is not taken
/// for this one's.
const PLACE_BITS: u32 = 24;

pub(super) fn op_key(place: usize, serial: u64) -> OpKey {
    OpKey(serial << PLACE_BITS | place as u64)
}

pub(super) fn op_place(op: OpKey) -> (usize, u64) {
    (
        (op.0 & ((1 << PLACE_BITS) - 1)) as usize,
        op.0 >> PLACE_BITS,
    )
}

/// What an op's state asks for.
enum Settled {
    /// Answers, a swap or another replica are awaited.
    Pending,
    Acknowledge,
    Fail(Status),
    /// A replica that is being filled was not sent it: it is sent again, to all.
    Redo,
}

impl ReplicatedHead {
    /// Where a change goes. It touches blocks of one chunk, whose range is held by the caller; `version` is the one it
    /// was started with, `tag` (below 2^63) the caller's name for it.
    #[inline]
    #[allow(clippy::too_many_arguments, reason = "an operation is this much")]
    pub fn admit_write(
        &mut self,
        set: SetIndex,
        extent: ExtentKey,
        first_block: u32,
        count: u32,
        tag: u64,
        version: Version,
        now_us: u64,
    ) -> WriteAdmission {
        if self.phase != Phase::Serving {
            return self.not_serving();
        }
        let state = *self.set(set);
        let usable = state.usable();
        // With too few in sync it may still be sent where a replica is being filled, and is answered when that one is
        // in sync. Without one, nothing is applied anywhere before it can be answered.
        if usable == 0 || (usable.count_ones() < self.min_in_sync() && state.mirrored == 0) {
            self.told_to_wait = true;
            return WriteAdmission::Wait;
        }
        let targets = usable | state.mirrored;
        let version = if version < self.settled {
            // It was started before versions up to there were said to be settled.
            match self.admission.next_version() {
                Some(version) => version,
                None => {
                    self.told_to_wait = true;
                    return WriteAdmission::Wait;
                }
            }
        } else {
            version
        };
        self.now_us = self.now_us.max(now_us);
        if tag < INTERNAL_TAG {
            self.clients_us = self.now_us;
        }
        self.op_serial += 1;
        let op = WriteOp {
            serial: self.op_serial,
            tag,
            version,
            extent,
            first_block,
            count,
            since_us: self.now_us,
            set,
            targets,
            waiting: targets,
            applied: 0,
            refused: 0,
            // Those that failed and are not yet recorded as out lack it.
            missed: state.binding() & !targets,
        };
        let place = self.ops.insert(op);
        WriteAdmission::Send {
            op: op_key(place, op.serial),
            version,
            targets: ReplicaMask(targets),
        }
    }

    pub(super) fn not_serving(&mut self) -> WriteAdmission {
        if self.phase == Phase::Stopped {
            WriteAdmission::Stopped
        } else {
            self.told_to_wait = true;
            WriteAdmission::Wait
        }
    }

    /// A replica answered a change.
    #[inline]
    pub fn answered(
        &mut self,
        op: OpKey,
        place: u8,
        status: Status,
        now_us: u64,
        actions: &mut Vec<Action>,
    ) -> Outcome {
        let (at, serial) = op_place(op);
        let bit = 1u8 << place;
        let Some(known) = self
            .ops
            .get_mut(at)
            .filter(|known| known.serial == serial && known.waiting & bit != 0)
        else {
            return Outcome::Pending;
        };
        self.now_us = self.now_us.max(now_us);
        let set = known.set;
        let mut refused = known.refused != 0;
        if status == Status::Ok {
            known.waiting &= !bit;
            known.applied |= bit;
            let done = known.waiting == 0;
            let member = self.replica(set, place);
            self.at_mut(member).answered += 1;
            if !done {
                return Outcome::Pending;
            }
        } else if status == Status::NoSpace {
            known.waiting &= !bit;
            known.refused |= bit;
            refused = true;
        } else {
            let member = self.replica(set, place);
            self.lose(member, Some(status), actions);
            self.advance(actions);
            // `lose` settled it, if it can be.
            return Outcome::Pending;
        }
        let outcome = self.conclude(at, serial, actions);
        // Whoever refused what another one has is lost by that.
        if refused {
            self.advance(actions);
        }
        outcome
    }

    /// Ends an op if it can be ended, by what is returned; a `Redo` is an action.
    fn conclude(&mut self, at: usize, serial: u64, actions: &mut Vec<Action>) -> Outcome {
        let Some(op) = self.ops.get(at).copied().filter(|op| op.serial == serial) else {
            return Outcome::Pending;
        };
        let outcome = match self.settled_as(&op) {
            Settled::Pending => {
                if op.waiting == 0 && op.refused != 0 {
                    if op.tag < super::INTERNAL_TAG {
                        self.lose_refusing(at, actions);
                    } else {
                        self.ops.remove(at);
                        let refused = Outcome::Fail(op.tag, Status::NoSpace);
                        self.rewritten(op.tag, refused, actions);
                    }
                }
                return Outcome::Pending;
            }
            Settled::Acknowledge => Outcome::Acknowledge(op.tag),
            Settled::Fail(status) => Outcome::Fail(op.tag, status),
            Settled::Redo => {
                self.redo(at, actions);
                return Outcome::Pending;
            }
        };
        self.ops.remove(at);
        if op.tag >= super::INTERNAL_TAG {
            self.rewritten(op.tag, outcome, actions);
            return Outcome::Pending;
        }
        outcome
    }

    fn settled_as(&self, op: &WriteOp) -> Settled {
        if op.waiting != 0 || self.phase != Phase::Serving {
            return Settled::Pending;
        }
        let set = self.set(op.set);
        if op.refused != 0 {
            // Refused by all, it changed nothing anywhere.
            let clean = op.applied == 0 && op.missed == 0;
            return if clean {
                Settled::Fail(Status::NoSpace)
            } else {
                Settled::Pending
            };
        }
        let unsure = op.missed & set.binding() != 0;
        if unsure && self.params.rules.drop_before_ack {
            return Settled::Pending;
        }
        let has_all = set.in_sync & !set.failed & !op.applied == 0 && set.in_sync != 0;
        // A copy of the head's own makes replicas alike; that is wanted all the more with too few of them.
        let enough =
            set.in_sync.count_ones() >= self.min_in_sync() || op.tag >= super::INTERNAL_TAG;
        if has_all && enough && op.applied & set.in_sync != 0 {
            return Settled::Acknowledge;
        }
        if set.mirrored & !op.targets != 0 || !has_all {
            return if set.usable() != 0 && (set.in_sync & set.failed == 0) {
                Settled::Redo
            } else {
                Settled::Pending
            };
        }
        Settled::Pending
    }

    /// Whether a change is where it has to be, on a replica that is being filled too: it may be waiting for that one to be
    /// in sync, which must not wait for it.
    pub(super) fn is_held_for(&self, op: &WriteOp, member: MemberId) -> bool {
        let set = self.set(op.set);
        let both = set.bit_of(member) | set.usable();
        op.waiting == 0 && op.applied & both == both
    }

    /// Some took it and some had no room: those without have failed, or the copies would differ.
    fn lose_refusing(&mut self, at: usize, actions: &mut Vec<Action>) {
        let op = self.ops[at];
        let set = *self.set(op.set);
        self.ops[at].missed |= op.refused & set.binding();
        self.ops[at].refused = 0;
        for member in set.members(op.refused) {
            self.lose(member, Some(Status::NoSpace), actions);
        }
        self.settle_at(at, op.serial, actions);
    }

    /// Asks for an op to be sent again, under a new version.
    fn redo(&mut self, at: usize, actions: &mut Vec<Action>) {
        let op = self.ops.remove(at);
        if op.tag >= super::INTERNAL_TAG {
            self.rewritten(op.tag, Outcome::Pending, actions);
            return;
        }
        match self.admission.next_version() {
            Some(version) => actions.push(Action::Redo {
                tag: op.tag,
                version,
            }),
            // The old one will do where a new one cannot be had: it is newer than all that the blocks have.
            None => actions.push(Action::Redo {
                tag: op.tag,
                version: op.version,
            }),
        }
    }

    fn settle_at(&mut self, at: usize, serial: u64, actions: &mut Vec<Action>) {
        match self.conclude(at, serial, actions) {
            Outcome::Pending => {}
            Outcome::Acknowledge(tag) => actions.push(Action::Acknowledge { tag }),
            Outcome::Fail(tag, status) => actions.push(Action::Fail { tag, status }),
        }
    }

    /// Looks at every op again: what is in sync has changed. In the order in which they were sent.
    pub(super) fn settle_all(&mut self, actions: &mut Vec<Action>) {
        let mut all: SmallVec<[(u64, usize); 32]> = self
            .ops
            .iter()
            .filter(|(_, op)| op.waiting == 0)
            .map(|(at, op)| (op.serial, at))
            .collect();
        all.sort_unstable();
        for (serial, at) in all {
            self.settle_at(at, serial, actions);
        }
    }

    /// Copies were made alike without asking those under way: each is sent again.
    pub(super) fn redo_all(&mut self, actions: &mut Vec<Action>) {
        let mut all: SmallVec<[(u64, usize); 32]> =
            self.ops.iter().map(|(at, op)| (op.serial, at)).collect();
        all.sort_unstable();
        for (_, at) in all {
            self.redo(at, actions);
        }
    }

    /// A member will not answer any more what it was sent.
    pub(super) fn miss_ops_of(&mut self, member: MemberId) {
        let sets = &self.sets;
        for (_, op) in &mut self.ops {
            let set = &sets[usize::from(op.set.0)];
            let bit = set.bit_of(member);
            if op.waiting & bit != 0 {
                op.waiting &= !bit;
                op.missed |= bit & set.binding();
            }
            // Filled anew, it has to be sent this anew.
            if set.binding() & bit == 0 {
                op.applied &= !bit;
                op.targets &= !bit;
            }
        }
    }

    pub(super) fn late_op(&self, member: MemberId, limit_us: u64) -> bool {
        self.ops.iter().any(|(_, op)| {
            let bit = self.set(op.set).bit_of(member);
            op.waiting & bit != 0 && self.now_us >= op.since_us + limit_us
        })
    }
}
