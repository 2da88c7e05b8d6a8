//! Making the replicas in sync alike before anything is served: of each block the newest copy goes to the others.
//! What was not acknowledged may go either way, but then goes one way for good.

use super::leaf::JobFor;
use super::rows::{RowsOf, RowsWalk};
use super::{Action, Phase, ReplicatedHead};
use crate::records::SetIndex;

/// How far it is.
#[derive(Debug, Default)]
pub(super) struct Reconcile {
    next_set: u16,
    pub(super) walk: Option<RowsWalk>,
}

/// Leaves that are compared and copied at the same time.
const LEAVES: usize = 16;

impl ReplicatedHead {
    pub(super) fn start_reconcile(&mut self, actions: &mut Vec<Action>) {
        *self.opening_reconcile() = Reconcile::default();
        self.advance_reconcile(actions);
    }

    pub(super) fn advance_reconcile(&mut self, actions: &mut Vec<Action>) {
        loop {
            if self.phase != Phase::Reconciling {
                return;
            }
            while self.jobs.len() < LEAVES {
                let Some(walk) = &mut self.opening_reconcile().walk else {
                    break;
                };
                let set = walk.set;
                let Some((chunk, leaf)) = walk.found.pop_front() else {
                    break;
                };
                self.start_job(JobFor::Reconcile, set, chunk, leaf, actions);
            }
            self.go_on_walking(RowsOf::Reconcile, actions);
            let busy = !self.jobs.is_empty();
            match &self.opening_reconcile().walk {
                Some(walk) if busy || !walk.is_done() => return,
                _ => {}
            }
            let reconcile = self.opening_reconcile();
            reconcile.walk = None;
            let set = SetIndex(reconcile.next_set);
            reconcile.next_set += 1;
            if usize::from(set.0) >= self.sets.len() || !self.params.rules.reconcile {
                self.reconciled(actions);
                return;
            }
            let members = self.set(set).members(self.set(set).in_sync);
            if members.len() > 1 {
                let floor = self.record.record.settled;
                self.opening_reconcile().walk = Some(RowsWalk::new(set, &members, floor));
            }
        }
    }
}
