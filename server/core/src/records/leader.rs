//! Who runs the controller of a cluster: a record that its holder renews, and that others take when it is not renewed.
//!
//! Nothing relies on there being one holder at a time: what the controller changes, it changes by compare-and-swap, so
//! two of them only meet each other's conflicts.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Record, Transaction, Versioned, keys};
use crate::units::NodeId;

/// The holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaderRecord {
    /// Its daemon.
    pub node: NodeId,
    /// Drawn afresh at each start of the daemon.
    pub incarnation: Uuid,
    /// One more at each renewal. Others look only at whether the record changes: their clocks need not agree.
    pub round: u64,
}

impl Record for LeaderRecord {}

/// What a daemon does about the record it has just read. `None`: somebody else leads. `is_silent`: the record has not
/// changed for so long that its holder is given up.
pub fn lead(
    current: Option<&Versioned<LeaderRecord>>,
    node: NodeId,
    incarnation: Uuid,
    is_silent: bool,
) -> Option<Transaction> {
    let held_by = |record: &LeaderRecord| (record.node, record.incarnation);
    let (round, transaction) = match current {
        None => (0, Transaction::new().when_absent(keys::LEADER)),
        Some(found) if is_silent || held_by(&found.record) == (node, incarnation) => (
            found.record.round + 1,
            Transaction::new().when_unchanged(keys::LEADER, found.changed_at),
        ),
        Some(_) => return None,
    };
    let record = LeaderRecord {
        node,
        incarnation,
        round,
    };
    Some(transaction.put(keys::LEADER, record.encode()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::{Condition, Effect, Revision};

    fn id(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn held(n: u128, round: u64) -> Versioned<LeaderRecord> {
        Versioned {
            record: LeaderRecord {
                node: NodeId(id(n)),
                incarnation: id(10 + n),
                round,
            },
            changed_at: Revision(5),
        }
    }

    fn put(transaction: &Transaction) -> LeaderRecord {
        match &transaction.effects[..] {
            [Effect::Put { key, value }] => LeaderRecord::decode(key, value).expect("a record"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_record_is_taken_when_there_is_none_or_its_holder_is_silent() {
        let me = (NodeId(id(1)), id(11));
        let first = lead(None, me.0, me.1, false).expect("takes it");
        assert!(matches!(first.conditions[..], [Condition::Absent { .. }]));
        assert_eq!(put(&first), held(1, 0).record);

        assert_eq!(lead(Some(&held(2, 7)), me.0, me.1, false), None);
        let taken = lead(Some(&held(2, 7)), me.0, me.1, true).expect("takes it");
        assert!(
            matches!(&taken.conditions[..], [Condition::Unchanged { changed_at, .. }] if *changed_at == Revision(5))
        );
        assert_eq!(put(&taken), held(1, 8).record);
    }

    #[test]
    fn the_holder_renews_it_and_an_earlier_run_of_its_daemon_does_not_count() {
        let renewed = lead(Some(&held(1, 3)), NodeId(id(1)), id(11), false).expect("renews");
        assert_eq!(put(&renewed).round, 4);
        assert_eq!(lead(Some(&held(1, 3)), NodeId(id(1)), id(99), false), None);
    }
}
