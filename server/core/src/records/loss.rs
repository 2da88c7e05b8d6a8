//! What a power cut took: answered writes that no flush covered. Whoever relied on them has to be told.
//!
//! A daemon that was killed still has them in its tail; a machine that lost power has not. Volumes with copies see to this
//! themselves when their copies are opened ([`crate::replication`]); this is for the others.

use uuid::Uuid;

use super::change::rewrite;
use super::{StoreRecord, Transaction, Versioned, VolumeRecord};

/// What opening a store showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedAs {
    /// The run of the machine's kernel.
    pub boot: Uuid,
    /// It had been closed in order: its log has everything.
    pub was_closed: bool,
    /// There was no tail of the last run to read.
    pub tail_is_void: bool,
}

/// Whether answered writes may be gone from a store. `record`: what was written down of it when its volumes were last
/// served. Only when all of them were told does the record get the new boot, so a start that is broken off is made good
/// by the next, which finds a tail again.
pub fn answers_may_be_gone(record: Option<&StoreRecord>, opened: OpenedAs) -> bool {
    let other_boot = record
        .and_then(|record| record.boot)
        .is_some_and(|boot| boot != opened.boot);
    !opened.was_closed && (opened.tail_is_void || other_boot)
}

/// Decides that a volume's clients must not go on: answered writes may be gone.
pub fn lose_answers(current: &Versioned<VolumeRecord>) -> (VolumeRecord, Transaction) {
    let record = VolumeRecord {
        client_generation: current.record.client_generation + 1,
        ..current.record.clone()
    };
    let transaction = rewrite(current, &record);
    (record, transaction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::StoreId;

    #[test]
    fn a_store_lost_answers_when_it_was_open_in_another_run_of_the_kernel() {
        let boot = Uuid::from_u128;
        let record = |boot| StoreRecord {
            id: StoreId(Uuid::nil()),
            path: String::new(),
            node: None,
            first_seen_unix_ms: 0,
            boot,
        };
        let gone = |before: Option<Option<Uuid>>, now, was_closed, tail_is_void| {
            let record = before.map(record);
            let opened = OpenedAs {
                boot: now,
                was_closed,
                tail_is_void,
            };
            answers_may_be_gone(record.as_ref(), opened)
        };
        // Killed, and started again.
        assert!(!gone(Some(Some(boot(1))), boot(1), false, false));
        // The machine lost power.
        assert!(gone(Some(Some(boot(1))), boot(2), false, true));
        // The same, and the first start after it was broken off.
        assert!(gone(Some(Some(boot(1))), boot(2), false, false));
        // The machine was shut down in order.
        assert!(!gone(Some(Some(boot(1))), boot(2), true, true));
        // The tail alone was lost.
        assert!(gone(Some(Some(boot(1))), boot(1), false, true));
        // New, or of a version that did not write boots down.
        assert!(!gone(None, boot(1), true, true));
        assert!(gone(Some(None), boot(1), false, true));
    }
}
