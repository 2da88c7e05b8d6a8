//! Reads: from any sound replica in sync, the local one first, while every replica in sync is known to follow this head.

use super::{Phase, ReadAdmission, ReplicaMask, ReplicatedHead};
use crate::records::SetIndex;
use crate::units::StoreId;

impl ReplicatedHead {
    /// Whether what a store has of a set may be looked at in place of a read.
    pub fn may_read_from(&self, set: SetIndex, store: StoreId) -> bool {
        let state = self.set(set);
        let readable = state.members(state.readable());
        readable
            .iter()
            .any(|member| self.at(*member).place.store == store)
    }

    /// Where a read of blocks of a set goes; the blocks are held by the caller. `tried`: replicas that could not read
    /// them. `now_us` must have been taken after the request had come in: it is what shows that no other head had
    /// answered a write before the client asked.
    #[inline]
    pub fn admit_read(&mut self, set: SetIndex, tried: ReplicaMask, now_us: u64) -> ReadAdmission {
        if self.phase != Phase::Serving {
            return if self.phase == Phase::Stopped {
                ReadAdmission::Stopped
            } else {
                self.told_to_wait = true;
                ReadAdmission::Wait
            };
        }
        self.clients_us = now_us;
        let state = self.set(set);
        let mut from = None;
        for place in ReplicaMask(state.binding()).places() {
            let member = state.member(place);
            let known = self.at(member);
            // Failed or not, as long as the record has it in sync, or may have it by now, a new head may start with it
            // alone.
            if now_us >= known.fresh_until_us {
                self.told_to_wait = true;
                return ReadAdmission::Wait;
            }
            let bit = 1u8 << place;
            if state.readable() & !tried.0 & bit != 0 && (from.is_none() || known.place.is_local) {
                from = Some(ReadAdmission::From {
                    member,
                    place: place as u8,
                });
            }
        }
        match from {
            Some(from) => from,
            None if state.readable() & !tried.0 == 0 && state.readable() != 0 => {
                ReadAdmission::Exhausted
            }
            None => {
                self.told_to_wait = true;
                ReadAdmission::Wait
            }
        }
    }
}
