//! The metadata store: a small, strongly consistent set of records, shaped like etcd.
//!
//! Two implementations stand behind [`MetadataStore`]: SQLite for one node, etcd for a cluster. What they must
//! have in common is written down as tests in [`conformance`], which every implementation has to pass.
//!
//! Fencing rests on compare-and-swap alone; there are no locks and no leases. Nothing on the path of an I/O waits for
//! this store.

pub mod conformance;
mod etcd;
mod sqlite;

use ashlar_core::records::{Record, Revision, Transaction, Versioned};
use async_trait::async_trait;
use thiserror::Error;
use tokio::sync::mpsc;

pub use etcd::{
    EtcdConfig, EtcdConfigError, EtcdStore, EtcdTls,
    REQUEST_TIMEOUT_DEFAULT as ETCD_TIMEOUT_DEFAULT,
};
#[cfg(test)]
pub(crate) use sqlite::CLOSED;
pub use sqlite::{OpenError, SqliteStore};

/// Longest key, in bytes. Ours have at most 269, a client node's id of 256 bytes among them; the bound keeps a wrong
/// caller from storing a document as a key.
pub const KEY_MAX_BYTES: usize = 512;
/// Largest record, in bytes: below etcd's default limit for a whole request (1.5 MiB), so that what one implementation
/// takes the other takes too.
pub const VALUE_MAX_BYTES: usize = 1 << 20;
/// Most conditions and effects of a transaction: etcd's default `--max-txn-ops`.
pub const TRANSACTION_MAX_STEPS: usize = 128;

/// One stored record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its encoded value.
    pub value: Vec<u8>,
    /// The revision of the transaction that wrote it last.
    pub changed_at: Revision,
}

impl Entry {
    /// Decodes the value.
    pub fn read<R: Record>(&self) -> Result<Versioned<R>, MetadataError> {
        match R::decode(&self.key, &self.value) {
            Ok(record) => Ok(Versioned {
                record,
                changed_at: self.changed_at,
            }),
            Err(error) => Err(MetadataError::Unreadable {
                reason: error.to_string(),
            }),
        }
    }
}

/// Records at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Ordered by key.
    pub entries: Vec<Entry>,
    /// The moment. A [`MetadataStore::watch`] after it misses nothing.
    pub revision: Revision,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every condition held, every effect happened and is durable. The store's revision is at least this; it is the
    /// transaction's own when it changed anything.
    Committed(Revision),
    /// A condition did not hold; nothing happened. Read again and decide again.
    Conflict,
}

/// The transactions of one revision, as far as a watch's prefix goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// When they happened.
    pub revision: Revision,
    /// In the order of the effects.
    pub changes: Vec<Change>,
}

/// One record changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was written.
    Put {
        /// Its key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
    },
    /// It was removed.
    Deleted {
        /// Its key.
        key: String,
    },
}

/// Why an operation on the metadata store failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MetadataError {
    /// Nothing was done.
    #[error("the metadata store is not available: {reason}")]
    Unavailable {
        /// What is wrong.
        reason: String,
    },
    /// The transaction may have been committed or not; read before doing anything else.
    #[error("whether the metadata store committed the change is not known: {reason}")]
    Unknown {
        /// What is wrong.
        reason: String,
    },
    /// A watch was asked to begin at changes that are no longer kept; list and watch after that.
    #[error("changes up to revision {oldest} are no longer kept; list the records again")]
    Compacted {
        /// The oldest revision that a watch can begin after.
        oldest: Revision,
    },
    /// The request itself is wrong: a fault of the caller's code.
    #[error("the metadata request is not valid: {reason}")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// A record exists and cannot be read by this version.
    #[error("{reason}")]
    Unreadable {
        /// Which and why.
        reason: String,
    },
}

/// Why a watch ended. The watcher lists again, or watches again after the last revision it saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WatchEnd {
    /// The watcher was too slow for the changes.
    #[error("the watcher fell behind")]
    Lagged,
    /// The store was closed or lost.
    #[error("the metadata store is closed")]
    Closed,
}

/// A stream of changes, every revision once and in order.
#[derive(Debug)]
pub struct Watch {
    receiver: mpsc::Receiver<Result<Batch, WatchEnd>>,
}

impl Watch {
    /// A watch fed through `receiver`, which ends after the first error.
    pub(crate) fn new(receiver: mpsc::Receiver<Result<Batch, WatchEnd>>) -> Watch {
        Watch { receiver }
    }

    /// The next batch. Cancel safe: a batch is never lost by dropping the future.
    pub async fn next(&mut self) -> Result<Batch, WatchEnd> {
        match self.receiver.recv().await {
            Some(Ok(batch)) => Ok(batch),
            Some(Err(end)) => {
                self.receiver.close();
                Err(end)
            }
            None => Err(WatchEnd::Closed),
        }
    }
}

/// The metadata store. Strictly serialisable: an operation sees every transaction that was answered before it began.
#[async_trait]
pub trait MetadataStore: Send + Sync + 'static {
    /// The record of one key.
    async fn get(&self, key: &str) -> Result<Option<Entry>, MetadataError>;

    /// Every record whose key begins with `prefix`.
    async fn list(&self, prefix: &str) -> Result<Listing, MetadataError>;

    /// Carries a transaction out, whole or not at all. An answer of [`Outcome::Committed`] is durable. Dropping the
    /// future does not stop the transaction.
    async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError>;

    /// Every change of keys beginning with `prefix` that has a revision larger than `after`.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError>;
}

/// Reads and decodes one record.
pub async fn read<R: Record>(
    store: &dyn MetadataStore,
    key: &str,
) -> Result<Option<Versioned<R>>, MetadataError> {
    store.get(key).await?.map(|entry| entry.read()).transpose()
}

/// Lists and decodes the records of one kind.
pub async fn list<R: Record>(
    store: &dyn MetadataStore,
    prefix: &str,
) -> Result<Vec<Versioned<R>>, MetadataError> {
    let listing = store.list(prefix).await?;
    listing.entries.iter().map(|entry| entry.read()).collect()
}

/// The checks that come before an implementation sees a key or prefix: printable ASCII, so that order by key is the
/// same everywhere.
fn check_key(key: &str) -> Result<(), MetadataError> {
    if key.is_empty() || key.len() > KEY_MAX_BYTES {
        return Err(MetadataError::Invalid {
            reason: format!("a key has 1 to {KEY_MAX_BYTES} bytes, not {}", key.len()),
        });
    }
    check_prefix(key)
}

fn check_prefix(prefix: &str) -> Result<(), MetadataError> {
    if !prefix.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(MetadataError::Invalid {
            reason: format!("{prefix:?} is not printable ASCII"),
        });
    }
    Ok(())
}

/// The bounds every implementation applies to a transaction.
fn check_transaction(transaction: &Transaction) -> Result<(), MetadataError> {
    use ashlar_core::records::Effect;

    let steps = transaction.conditions.len().max(transaction.effects.len());
    if steps > TRANSACTION_MAX_STEPS {
        return Err(MetadataError::Invalid {
            reason: format!(
                "{steps} steps in a transaction, at most {TRANSACTION_MAX_STEPS} are allowed"
            ),
        });
    }
    if let Some(key) = transaction.twice_changed_key() {
        return Err(MetadataError::Invalid {
            reason: format!("the key {key:?} is changed twice"),
        });
    }
    for condition in &transaction.conditions {
        check_key(condition.key())?;
    }
    for effect in &transaction.effects {
        check_key(effect.key())?;
        if let Effect::Put { key, value } = effect
            && value.len() > VALUE_MAX_BYTES
        {
            return Err(MetadataError::Invalid {
                reason: format!(
                    "the record {key:?} has {} bytes, at most {VALUE_MAX_BYTES} are allowed",
                    value.len()
                ),
            });
        }
    }
    Ok(())
}
