//! The metadata store: one record with its notes, a revision, and swaps that may be slow, unknown, or happen later than anybody
//! thinks.

use std::collections::BTreeMap;

use ashlar_core::records::{
    Condition, Effect, LeftoverRecord, Record, Revision, Transaction, Versioned, VolumeRecord, keys,
};

#[derive(Clone, Debug)]
pub(crate) struct Meta {
    pub(crate) record: Versioned<VolumeRecord>,
    /// What stores have yet to give back, by key.
    pub(crate) leftovers: BTreeMap<String, LeftoverRecord>,
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
                Condition::Absent { key } => !self.leftovers.contains_key(key),
            });
        if !holds {
            return None;
        }
        for effect in &transaction.effects {
            let Effect::Put { key, value } = effect else {
                continue;
            };
            if key.starts_with(keys::LEFTOVERS) {
                let left = LeftoverRecord::decode(key, value).expect("a note that was encoded");
                self.leftovers.insert(key.clone(), left);
            } else {
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
