//! The metadata store of a single node: one SQLite file, one thread that owns it.
//!
//! WAL with `synchronous=FULL`: a commit is answered after its WAL frames are synced. The connection keeps SQLite's
//! exclusive lock for its whole life, so a second daemon cannot open the file, whichever path it comes by.
//!
//! After an I/O error the store refuses everything until it is opened again: what a failed sync left in the page cache
//! is not to be built upon. A full disk is no such error; SQLite rolls back and a later transaction may succeed.

mod open;
mod worker;

use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ashlar_core::records::{Revision, Transaction};
use async_trait::async_trait;
use tokio::sync::oneshot;

use super::{
    Entry, Listing, MetadataError, MetadataStore, Outcome, Watch, check_key, check_prefix,
    check_transaction,
};
pub use open::OpenError;
use worker::Job;

/// Rung when a store of this process has let go of its file.
#[cfg(test)]
pub(crate) static CLOSED: tokio::sync::Notify = tokio::sync::Notify::const_new();

/// The SQLite metadata store. Dropping it ends its thread after the jobs already handed over.
#[derive(Debug)]
pub struct SqliteStore {
    /// `None` only while dropping.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl SqliteStore {
    /// Opens the file at `path`, creating it when it does not exist or is empty. Blocks; takes milliseconds.
    pub fn open(path: &Path) -> Result<SqliteStore, OpenError> {
        let connection = open::open(path)?;
        let (jobs, queue) = mpsc::channel();
        let worker = worker::Worker::new(connection)
            .map_err(|error| open::OpenError::classify(path, &error))?;
        let thread = std::thread::Builder::new()
            .name("metadata".to_owned())
            .spawn(move || worker.run(queue))
            .map_err(|error| OpenError::Io {
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
        Ok(SqliteStore {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, MetadataError>>) -> Job,
        when_lost: impl FnOnce(String) -> MetadataError,
    ) -> Result<T, MetadataError> {
        let (answer, answered) = oneshot::channel();
        let gone = || "its thread has ended".to_owned();
        let jobs = self
            .jobs
            .as_ref()
            .ok_or_else(|| MetadataError::Unavailable { reason: gone() })?;
        jobs.send(job(answer))
            .map_err(|_| MetadataError::Unavailable { reason: gone() })?;
        answered.await.unwrap_or_else(|_| Err(when_lost(gone())))
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has already been reported by the panic hook.
            let _ = thread.join();
            #[cfg(test)]
            CLOSED.notify_waiters();
        }
    }
}

#[async_trait]
impl MetadataStore for SqliteStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, MetadataError> {
        check_key(key)?;
        let key = key.to_owned();
        self.ask(
            |answer| Job::Get { key, answer },
            |reason| MetadataError::Unavailable { reason },
        )
        .await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, MetadataError> {
        check_prefix(prefix)?;
        let prefix = prefix.to_owned();
        self.ask(
            |answer| Job::List { prefix, answer },
            |reason| MetadataError::Unavailable { reason },
        )
        .await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError> {
        check_transaction(&transaction)?;
        self.ask(
            |answer| Job::Commit {
                transaction,
                answer,
            },
            |reason| MetadataError::Unknown { reason },
        )
        .await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError> {
        check_prefix(prefix)?;
        let prefix = prefix.to_owned();
        self.ask(
            |answer| Job::Watch {
                prefix,
                after,
                answer,
            },
            |reason| MetadataError::Unavailable { reason },
        )
        .await
    }
}

#[cfg(test)]
mod tests;
