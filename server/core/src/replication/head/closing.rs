//! The orderly end: everything flushed, every session closed, so that a power cut afterwards costs nothing.

use super::super::wire::Status;
use super::members::Purpose;
use super::{Action, MemberId, Phase, ReplicatedHead, StopReason};

impl ReplicatedHead {
    /// Closes the volume. The caller has let no new request in and has seen every earlier one to its end. Ends with
    /// [`Action::Stopped`]; a replica that cannot be closed in order is treated at the next opening as one that was not.
    pub fn close(&mut self, now_us: u64, actions: &mut Vec<Action>) {
        self.note_time(now_us);
        if self.phase == Phase::Stopped {
            return;
        }
        if self.phase != Phase::Serving || self.swap.is_some() {
            self.stop(StopReason::Closed, actions);
            return;
        }
        self.abandon_work(actions);
        self.phase = Phase::Closing;
        for id in 0..self.members.len() {
            let member = MemberId(id as u8);
            if self.members[id].is_open() && self.is_in_sync_anywhere(member) {
                let query = self.ask(member, Purpose::Close);
                actions.push(Action::Flush { query, member });
            }
        }
        self.advance_closing(actions);
    }

    /// A member answered the flush or the close.
    pub(super) fn closed(&mut self, member: MemberId, status: Status, actions: &mut Vec<Action>) {
        let m = self.at_mut(member);
        if !m.is_open() {
            return;
        }
        m.session = super::members::Session::None;
        let query = (status == Status::Ok).then(|| self.ask(member, Purpose::Close));
        actions.push(Action::CloseSession { member, query });
    }

    pub(super) fn advance_closing(&mut self, actions: &mut Vec<Action>) {
        let waiting = self
            .queries
            .values()
            .any(|query| query.purpose == Purpose::Close);
        if !waiting {
            self.stop(StopReason::Closed, actions);
        }
    }
}
