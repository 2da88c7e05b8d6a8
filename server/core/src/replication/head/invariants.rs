//! What must always hold of a head.

use super::members::Session;
use super::{MemberId, Phase, ReplicatedHead};

impl ReplicatedHead {
    /// Panics when something that must always hold does not.
    pub fn check_invariants(&self) {
        self.admission.check_invariants();
        assert_eq!(self.record.record.check_invariants(), Ok(()));
        if self.phase == Phase::Stopped {
            return;
        }
        for set in &self.sets {
            assert_eq!(
                set.failed & !set.in_sync,
                0,
                "only what is in sync has failed"
            );
            assert_eq!(
                set.mirrored & set.in_sync,
                0,
                "what is filled is not in sync"
            );
            assert_eq!(set.departing & !set.in_sync, 0, "what departs is in sync");
            assert!(set.in_sync != 0, "something is in sync");
            for place in super::ReplicaMask(set.in_sync | set.mirrored).places() {
                assert!(set.places[place].is_some(), "a place in a mask is taken");
            }
            if self.phase == Phase::Serving {
                assert!(
                    set.readable() != 0,
                    "a served set has a sound replica that stays"
                );
                for member in set.members(set.usable() | set.mirrored) {
                    assert!(
                        self.at(member).is_open(),
                        "changes are sent on open sessions"
                    );
                }
            } else {
                assert_eq!(set.mirrored, 0);
            }
        }
        for (_, op) in &self.ops {
            let set = self.set(op.set);
            assert_eq!(op.waiting & !op.targets, 0);
            assert_eq!(op.waiting & (op.applied | op.refused | op.missed), 0);
            assert_eq!(
                op.missed & !set.binding(),
                0,
                "what is out is not waited for"
            );
        }
        for resync in &self.resyncs {
            assert_eq!(self.phase, Phase::Serving);
            let set = self.set(resync.set);
            assert!(set.mirrored & set.bit_of(resync.member) != 0);
        }
        self.check_jobs();
        for (index, member) in self.members.iter().enumerate() {
            let id = MemberId(index as u8);
            if member.session != Session::None {
                assert!(member.connected || self.phase == Phase::Closing, "{id:?}");
            }
        }
    }
}
