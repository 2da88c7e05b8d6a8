//! Changes of a volume's replicas that others than its head may make: they name a new replica, wish one away, or forget
//! one that counts for nothing. None of them changes what is in sync, so none raises the epoch; the head meets them as
//! a changed record.

use crate::records::{
    Condition, Effect, LeftoverRecord, REPLICAS_MAX, Record, Replica, ReplicaState, SetIndex,
    Transaction, Versioned, VolumeRecord, VolumeState, keys,
};
use crate::units::{NodeId, StoreId};

/// A change of one replica set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Fill a new replica.
    Add {
        /// Of which set.
        set: SetIndex,
        /// On which daemon.
        node: NodeId,
        /// In which store.
        store: StoreId,
    },
    /// Fill a new replica and wish another away for it.
    Move {
        /// Of which set.
        set: SetIndex,
        /// From which store.
        from: StoreId,
        /// To which daemon.
        node: NodeId,
        /// To which of its stores.
        store: StoreId,
    },
    /// Wish a replica away, or no longer.
    Leave {
        /// Of which set.
        set: SetIndex,
        /// In which store.
        store: StoreId,
        /// Away.
        leaving: bool,
    },
    /// Forget a replica that is not in sync.
    Remove {
        /// Of which set.
        set: SetIndex,
        /// In which store.
        store: StoreId,
    },
}

/// Why a change is not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The volume is being deleted.
    #[error("the volume is being deleted")]
    Deleting,
    /// It has no such set.
    #[error("the volume has no replica set {}", .0.0)]
    NoSuchSet(SetIndex),
    /// The set has no replica there.
    #[error("the replica set has nothing in store {}", .0.0)]
    NoSuchReplica(StoreId),
    /// The set has a replica there already.
    #[error("the replica set has a replica in store {} already", .0.0)]
    AlreadyThere(StoreId),
    /// The set has as many replicas as it can.
    #[error("a replica set has at most eight replicas, those being filled included")]
    TooMany,
    /// It was taken out by the same changes, and what it had has to be given back before it is filled again.
    #[error("a store that is taken out of a replica set cannot be put into it at the same time")]
    LeavesFirst,
    /// It holds acknowledged writes; only the head takes it out, when others suffice.
    #[error("the replica is in sync; wish it away, and it goes when others suffice")]
    InSync,
}

/// Decides a change.
pub fn change(
    current: &Versioned<VolumeRecord>,
    wanted: Change,
) -> Result<(VolumeRecord, Transaction), ChangeError> {
    if current.record.state == VolumeState::Deleting {
        return Err(ChangeError::Deleting);
    }
    let mut record = current.record.clone();
    let (Change::Add { set, .. }
    | Change::Move { set, .. }
    | Change::Leave { set, .. }
    | Change::Remove { set, .. }) = wanted;
    let before = &current.record;
    let key = keys::volume(record.id);
    let mut transaction = Transaction::new().when_unchanged(key.clone(), current.changed_at);
    let replicas = &mut record
        .placement
        .sets
        .get_mut(usize::from(set.0))
        .ok_or(ChangeError::NoSuchSet(set))?
        .replicas;
    let place = |store: StoreId| replicas.iter().position(|replica| replica.store == store);
    match wanted {
        Change::Add { node, store, .. } | Change::Move { node, store, .. } => {
            if place(store).is_some() {
                return Err(ChangeError::AlreadyThere(store));
            }
            if replicas.len() >= REPLICAS_MAX {
                return Err(ChangeError::TooMany);
            }
            if let Change::Move { from, .. } = wanted {
                let at = place(from).ok_or(ChangeError::NoSuchReplica(from))?;
                replicas[at].leaving = true;
            }
            replicas.push(Replica::joining(node, store, current.changed_at));
            // What it had of this set before must be gone: the store is about to give that back.
            transaction = transaction.when_absent(keys::leftover(before.id, set, store));
        }
        Change::Leave { store, leaving, .. } => {
            let at = place(store).ok_or(ChangeError::NoSuchReplica(store))?;
            replicas[at].leaving = leaving;
        }
        Change::Remove { store, .. } => {
            let at = place(store).ok_or(ChangeError::NoSuchReplica(store))?;
            if replicas[at].state == ReplicaState::InSync {
                return Err(ChangeError::InSync);
            }
            let gone = replicas.remove(at);
            let left = LeftoverRecord::of(before, set, gone.node, store);
            transaction = transaction.put(left.key(), left.encode());
        }
    }
    let transaction = transaction.put(key, record.encode());
    Ok((record, transaction))
}

/// Decides several changes of one volume, as one transaction.
pub fn change_all(
    current: &Versioned<VolumeRecord>,
    wanted: &[Change],
) -> Result<(VolumeRecord, Transaction), ChangeError> {
    let key = keys::volume(current.record.id);
    let mut now = current.clone();
    let mut all = Transaction::new().when_unchanged(key.clone(), current.changed_at);
    for one in wanted {
        let (record, transaction) = change(&now, *one)?;
        let is_put = |what: &str| {
            let mut effects = all.effects.iter();
            effects.any(|effect| matches!(effect, Effect::Put { key, .. } if key == what))
        };
        // Conditions are looked at before anything is changed: this one would not see the note of the same transaction.
        let meets_its_note = transaction
            .conditions
            .iter()
            .any(|what| matches!(what, Condition::Absent { key } if is_put(key)));
        if meets_its_note {
            return Err(ChangeError::LeavesFirst);
        }
        now.record = record;
        let (conditions, effects) = (transaction.conditions, transaction.effects);
        let others = conditions.into_iter().filter(|what| what.key() != key);
        all.conditions.extend(others);
        all.effects
            .extend(effects.into_iter().filter(|what| what.key() != key));
    }
    all = all.put(key, now.record.encode());
    Ok((now.record, all))
}

#[cfg(test)]
mod tests;
