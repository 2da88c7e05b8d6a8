//! A metadata store that is not always there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ashlar_core::records::{Revision, Transaction};
use async_trait::async_trait;

use crate::meta::{Entry, Listing, MetadataError, MetadataStore, Outcome, Watch};

pub(super) struct Unsteady {
    store: Arc<dyn MetadataStore>,
    /// For so many commits from now on it is away, and does nothing.
    pub(super) away: AtomicU32,
    /// It commits, and then says that it does not know.
    is_forgetful: bool,
}

impl Unsteady {
    pub(super) fn over(store: Arc<dyn MetadataStore>) -> Unsteady {
        Unsteady {
            store,
            away: AtomicU32::new(0),
            is_forgetful: false,
        }
    }

    pub(super) fn forgetting(store: Arc<dyn MetadataStore>) -> Unsteady {
        Unsteady {
            is_forgetful: true,
            ..Unsteady::over(store)
        }
    }
}

#[async_trait]
impl MetadataStore for Unsteady {
    async fn get(&self, key: &str) -> Result<Option<Entry>, MetadataError> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, MetadataError> {
        self.store.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError> {
        let less = |left: u32| left.checked_sub(1);
        let is_away = self
            .away
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        if is_away.is_ok() {
            let reason = "away".to_owned();
            return Err(MetadataError::Unavailable { reason });
        }
        match self.store.commit(transaction).await? {
            Outcome::Committed(_) if self.is_forgetful => Err(MetadataError::Unknown {
                reason: "the answer was lost".to_owned(),
            }),
            outcome => Ok(outcome),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError> {
        self.store.watch(prefix, after).await
    }
}
