//! The thread that owns the connection: one job after another, so every answer is serialised by construction.

use std::sync::mpsc;

use ashlar_core::records::{Condition, Effect, Revision, Transaction};
use rusqlite::{Connection, ErrorCode, OptionalExtension, params};
use tokio::sync::{mpsc as async_mpsc, oneshot};

use crate::meta::{Batch, Change, Entry, Listing, MetadataError, Outcome, Watch, WatchEnd};

/// Revisions whose changes are kept for watches that begin late. A watcher that reconnects does so within seconds;
/// 10,000 changes are hours of a busy control plane and a few MiB.
const REVISIONS_KEPT: u64 = 10_000;
/// Batches a watcher may be behind before its watch ends. Records are small and changes rare, so a watcher that is
/// this far behind has stopped reading.
const WATCH_BATCHES: usize = 1024;
/// Sorts after every key: keys are printable ASCII.
const AFTER_EVERY_KEY: &str = "\u{7f}";

type Answer<T> = oneshot::Sender<Result<T, MetadataError>>;

/// What the thread is asked. A dropped answer is no reason not to do the job.
#[derive(Debug)]
pub(super) enum Job {
    Get {
        key: String,
        answer: Answer<Option<Entry>>,
    },
    List {
        prefix: String,
        answer: Answer<Listing>,
    },
    Commit {
        transaction: Transaction,
        answer: Answer<Outcome>,
    },
    Watch {
        prefix: String,
        after: Revision,
        answer: Answer<Watch>,
    },
}

struct Watcher {
    prefix: String,
    sender: async_mpsc::Sender<Result<Batch, WatchEnd>>,
}

pub(super) struct Worker {
    connection: Connection,
    revision: u64,
    watchers: Vec<Watcher>,
    /// Why everything is refused, once an I/O error has happened.
    poisoned: Option<String>,
}

impl Worker {
    pub(super) fn new(connection: Connection) -> rusqlite::Result<Worker> {
        let revision = connection.query_row("SELECT revision FROM clock", [], |row| row.get(0))?;
        Ok(Worker {
            connection,
            revision,
            watchers: Vec::new(),
            poisoned: None,
        })
    }

    pub(super) fn run(mut self, queue: mpsc::Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            match job {
                Job::Get { key, answer } => {
                    drop(answer.send(self.guarded(|worker| worker.get(&key))))
                }
                Job::List { prefix, answer } => {
                    drop(answer.send(self.guarded(|worker| worker.list(&prefix))))
                }
                Job::Commit {
                    transaction,
                    answer,
                } => drop(answer.send(self.commit(&transaction))),
                Job::Watch {
                    prefix,
                    after,
                    answer,
                } => drop(answer.send(self.watch(prefix, after))),
            }
        }
        // Writes the WAL back into the file, so that a copy of the one file is a backup of a stopped daemon.
        if let Err((_, error)) = self.connection.close() {
            tracing::warn!(%error, "the metadata file was not closed cleanly; it is repaired at the next start");
        }
    }

    /// Runs a job that only reads, unless the store is poisoned.
    fn guarded<T>(
        &mut self,
        job: impl FnOnce(&mut Worker) -> rusqlite::Result<T>,
    ) -> Result<T, MetadataError> {
        self.check_poison()?;
        job(self).map_err(|error| self.failed(&error))
    }

    fn check_poison(&self) -> Result<(), MetadataError> {
        match &self.poisoned {
            None => Ok(()),
            Some(reason) => Err(MetadataError::Unavailable {
                reason: reason.clone(),
            }),
        }
    }

    /// Remembers an error after which nothing read or written can be relied upon, and answers what to tell.
    fn failed(&mut self, error: &rusqlite::Error) -> MetadataError {
        let reason = error.to_string();
        let is_lasting = !matches!(
            error.sqlite_error_code(),
            Some(ErrorCode::DiskFull | ErrorCode::OutOfMemory | ErrorCode::TooBig)
        );
        if is_lasting && self.poisoned.is_none() {
            tracing::error!(%error, "the metadata file failed; nothing is read or changed there until ashlard is restarted");
            self.poisoned = Some(format!(
                "{reason}; restart ashlard once the cause is dealt with"
            ));
        }
        MetadataError::Unavailable { reason }
    }

    fn get(&mut self, key: &str) -> rusqlite::Result<Option<Entry>> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT value, changed_at FROM records WHERE key = ?1")?;
        statement
            .query_row([key], |row| {
                Ok(Entry {
                    key: key.to_owned(),
                    value: row.get(0)?,
                    changed_at: Revision(row.get(1)?),
                })
            })
            .optional()
    }

    fn list(&mut self, prefix: &str) -> rusqlite::Result<Listing> {
        let mut statement = self.connection.prepare_cached(
            "SELECT key, value, changed_at FROM records WHERE key >= ?1 AND key < ?1 || ?2 ORDER BY key",
        )?;
        let entries = statement.query_map([prefix, AFTER_EVERY_KEY], |row| {
            Ok(Entry {
                key: row.get(0)?,
                value: row.get(1)?,
                changed_at: Revision(row.get(2)?),
            })
        })?;
        Ok(Listing {
            entries: entries.collect::<Result<_, _>>()?,
            revision: Revision(self.revision),
        })
    }

    fn commit(&mut self, transaction: &Transaction) -> Result<Outcome, MetadataError> {
        self.check_poison()?;
        match self.try_commit(transaction) {
            Ok(None) => Ok(Outcome::Conflict),
            Ok(Some(batch)) => {
                if !batch.changes.is_empty() {
                    self.revision = batch.revision.0;
                    self.tell_watchers(&batch);
                }
                Ok(Outcome::Committed(Revision(self.revision)))
            }
            Err(error) => {
                let told = self.failed(&error);
                // A full disk is met before the commit is durable and rolled back; of any other error nothing is sure.
                Err(match (told, self.poisoned.is_some()) {
                    (MetadataError::Unavailable { reason }, true) => {
                        MetadataError::Unknown { reason }
                    }
                    (told, _) => told,
                })
            }
        }
    }

    /// `None`: a condition did not hold. The batch is empty when the effects changed nothing.
    fn try_commit(&mut self, transaction: &Transaction) -> rusqlite::Result<Option<Batch>> {
        let sql = self.connection.transaction()?;
        for condition in &transaction.conditions {
            let found: Option<u64> = sql
                .prepare_cached("SELECT changed_at FROM records WHERE key = ?1")?
                .query_row([condition.key()], |row| row.get(0))
                .optional()?;
            let holds = match condition {
                Condition::Absent { .. } => found.is_none(),
                Condition::Unchanged { changed_at, .. } => found == Some(changed_at.0),
            };
            if !holds {
                return Ok(None);
            }
        }
        let revision = self.revision + 1;
        let mut changes = Vec::with_capacity(transaction.effects.len());
        for effect in &transaction.effects {
            let change = match effect {
                Effect::Put { key, value } => {
                    sql.prepare_cached(
                        "INSERT INTO records VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET value = ?2, changed_at = ?3",
                    )?
                    .execute(params![key, value, revision])?;
                    Change::Put {
                        key: key.clone(),
                        value: value.clone(),
                    }
                }
                Effect::Delete { key } => {
                    let removed = sql
                        .prepare_cached("DELETE FROM records WHERE key = ?1")?
                        .execute([key])?;
                    if removed == 0 {
                        continue;
                    }
                    Change::Deleted { key: key.clone() }
                }
            };
            let (key, value) = match &change {
                Change::Put { key, value } => (key, Some(value)),
                Change::Deleted { key } => (key, None),
            };
            sql.prepare_cached("INSERT INTO changes VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![revision, changes.len() as i64, key, value])?;
            changes.push(change);
        }
        if !changes.is_empty() {
            let compacted = revision.saturating_sub(REVISIONS_KEPT);
            sql.prepare_cached("DELETE FROM changes WHERE revision <= ?1")?
                .execute([compacted])?;
            sql.prepare_cached("UPDATE clock SET revision = ?1, compacted = ?2")?
                .execute([revision, compacted])?;
            sql.commit()?;
        }
        Ok(Some(Batch {
            revision: Revision(revision),
            changes,
        }))
    }

    fn tell_watchers(&mut self, batch: &Batch) {
        self.watchers.retain(|watcher| {
            let Some(batch) = of_prefix(batch, &watcher.prefix) else {
                return !watcher.sender.is_closed();
            };
            // The last place of the channel is kept for saying that the watcher lagged.
            if watcher.sender.capacity() <= 1 {
                let _ = watcher.sender.try_send(Err(WatchEnd::Lagged));
                return false;
            }
            watcher.sender.try_send(Ok(batch)).is_ok()
        });
    }

    fn watch(&mut self, prefix: String, after: Revision) -> Result<Watch, MetadataError> {
        if after.0 > self.revision {
            return Err(MetadataError::Invalid {
                reason: format!(
                    "revision {after} is in the future; the newest is {}",
                    self.revision
                ),
            });
        }
        let compacted: u64 = self.guarded(|worker| {
            worker
                .connection
                .query_row("SELECT compacted FROM clock", [], |row| row.get(0))
        })?;
        if after.0 < compacted {
            return Err(MetadataError::Compacted {
                oldest: Revision(compacted),
            });
        }
        let missed = self.guarded(|worker| worker.changes_after(after))?;
        let missed: Vec<_> = missed
            .iter()
            .filter_map(|batch| of_prefix(batch, &prefix))
            .collect();
        let (sender, receiver) = async_mpsc::channel(WATCH_BATCHES + missed.len() + 1);
        for batch in missed {
            // The channel was made large enough for these.
            let _ = sender.try_send(Ok(batch));
        }
        self.watchers.push(Watcher { prefix, sender });
        Ok(Watch::new(receiver))
    }

    fn changes_after(&mut self, after: Revision) -> rusqlite::Result<Vec<Batch>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT revision, key, value FROM changes WHERE revision > ?1 ORDER BY revision, position",
        )?;
        let mut rows = statement.query([after.0])?;
        let mut batches: Vec<Batch> = Vec::new();
        while let Some(row) = rows.next()? {
            let revision = Revision(row.get(0)?);
            let key = row.get(1)?;
            let change = match row.get(2)? {
                Some(value) => Change::Put { key, value },
                None => Change::Deleted { key },
            };
            match batches.last_mut() {
                Some(batch) if batch.revision == revision => batch.changes.push(change),
                _ => batches.push(Batch {
                    revision,
                    changes: vec![change],
                }),
            }
        }
        Ok(batches)
    }
}

/// The part of a batch that a watcher of `prefix` sees.
fn of_prefix(batch: &Batch, prefix: &str) -> Option<Batch> {
    let in_prefix = |change: &&Change| match change {
        Change::Put { key, .. } | Change::Deleted { key } => key.starts_with(prefix),
    };
    let changes: Vec<_> = batch.changes.iter().filter(in_prefix).cloned().collect();
    (!changes.is_empty()).then_some(Batch {
        revision: batch.revision,
        changes,
    })
}
