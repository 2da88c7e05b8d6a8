//! A change of the metadata store: what it relies on and what it does, applied whole or not at all.

use std::fmt;

/// The metadata store's clock: one more for each committed transaction. Zero is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A record and the revision that last changed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<R> {
    /// What was read.
    pub record: R,
    /// The revision of the transaction that wrote it.
    pub changed_at: Revision,
}

/// Something a transaction relies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// No record has this key.
    Absent {
        /// The key.
        key: String,
    },
    /// The record was last written at this revision.
    Unchanged {
        /// The key.
        key: String,
        /// Its [`Versioned::changed_at`].
        changed_at: Revision,
    },
}

impl Condition {
    /// The key looked at.
    pub fn key(&self) -> &str {
        match self {
            Condition::Absent { key } | Condition::Unchanged { key, .. } => key,
        }
    }
}

/// Something a transaction does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write this record.
    Put {
        /// The key.
        key: String,
        /// The encoded record.
        value: Vec<u8>,
    },
    /// Remove this record; nothing happens when there is none.
    Delete {
        /// The key.
        key: String,
    },
}

impl Effect {
    /// The key changed.
    pub fn key(&self) -> &str {
        match self {
            Effect::Put { key, .. } | Effect::Delete { key } => key,
        }
    }
}

/// Conditions and effects that stand or fall together. A key has at most one effect (etcd's rule too).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// All must hold for any effect to happen.
    pub conditions: Vec<Condition>,
    /// Applied in this order, under one revision.
    pub effects: Vec<Effect>,
}

impl Transaction {
    /// A transaction that relies on nothing and does nothing.
    pub fn new() -> Transaction {
        Transaction::default()
    }

    /// Relies on no record having `key`.
    pub fn when_absent(mut self, key: impl Into<String>) -> Transaction {
        self.conditions.push(Condition::Absent { key: key.into() });
        self
    }

    /// Relies on the record of `key` being the one written at `changed_at`.
    pub fn when_unchanged(mut self, key: impl Into<String>, changed_at: Revision) -> Transaction {
        self.conditions.push(Condition::Unchanged {
            key: key.into(),
            changed_at,
        });
        self
    }

    /// Writes a record.
    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>) -> Transaction {
        self.effects.push(Effect::Put {
            key: key.into(),
            value,
        });
        self
    }

    /// Removes a record.
    pub fn delete(mut self, key: impl Into<String>) -> Transaction {
        self.effects.push(Effect::Delete { key: key.into() });
        self
    }

    /// Both transactions as one, which happens whole or not at all.
    pub fn and(mut self, other: Transaction) -> Transaction {
        self.conditions.extend(other.conditions);
        self.effects.extend(other.effects);
        self
    }

    /// The first key with two effects, which makes the transaction invalid.
    pub fn twice_changed_key(&self) -> Option<&str> {
        self.effects.iter().enumerate().find_map(|(index, effect)| {
            self.effects[..index]
                .iter()
                .any(|earlier| earlier.key() == effect.key())
                .then(|| effect.key())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_key_changed_twice() {
        let transaction = Transaction::new().put("a", vec![]).delete("b");
        assert_eq!(transaction.twice_changed_key(), None);
        assert_eq!(transaction.put("b", vec![1]).twice_changed_key(), Some("b"));
    }
}
