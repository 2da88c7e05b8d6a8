//! The metadata store: one record, a revision, and swaps that may be slow, unknown, or happen later than anybody
//! thinks.

use ashlar_core::records::{
    Condition, Effect, Record, Revision, Transaction, Versioned, VolumeRecord,
};

#[derive(Clone, Debug)]
pub(crate) struct Meta {
    pub(crate) record: Versioned<VolumeRecord>,
    /// Nobody reaches it.
    pub(crate) is_away: bool,
}

impl Meta {
    /// Carries a transaction out, if its conditions hold.
    pub(crate) fn commit(&mut self, transaction: &Transaction) -> Option<Revision> {
        let holds = transaction
            .conditions
            .iter()
            .all(|condition| match condition {
                Condition::Unchanged { changed_at, .. } => *changed_at == self.record.changed_at,
                Condition::Absent { .. } => false,
            });
        if !holds {
            return None;
        }
        for effect in &transaction.effects {
            if let Effect::Put { key, value } = effect {
                let record = VolumeRecord::decode(key, value).expect("a record that was encoded");
                assert_eq!(record.check_invariants(), Ok(()));
                assert!(
                    record.epoch >= self.record.record.epoch,
                    "an epoch never falls"
                );
                self.record = Versioned {
                    record,
                    changed_at: Revision(self.record.changed_at.0 + 1),
                };
            }
        }
        Some(self.record.changed_at)
    }
}
