//! When each store is verified, and what came of it.
//!
//! One task and at most one timer: it waits for the moment the next store is due, begins its scrub, and writes the
//! outcome down when the data plane says that it ended. Stores are verified one after the other. A scrub that did not
//! come to its end, because the daemon stopped or somebody cancelled it, leaves no trace: the store is still due.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ashlar_core::records::{Record, ScrubRecord, StoreRecord, Transaction, keys};
use ashlar_core::units::{BLOCK_BYTES, StoreId};

use crate::data::ScrubEnd;
use crate::meta::{MetadataError, MetadataStore};
use crate::plane::Plane;
use crate::volumes::unix_ms;

/// Between two looks at a scrub under way, whether somebody ended it or the store stopped.
const LOOK_AFTER: Duration = Duration::from_secs(60);
/// A scrub that could not begin or was cancelled is tried again after this, or sooner when scrubs are more frequent.
const TRY_AGAIN: Duration = Duration::from_secs(3600);
/// A store that is due when the daemon starts waits this long, or a hundredth of the interval when that is less: others
/// need the disk then.
const AFTER_START: Duration = Duration::from_secs(300);

/// The verification of one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreScrub {
    /// The last that came to its end.
    pub last: Option<ScrubRecord>,
    /// When the next begins, milliseconds since 1970-01-01 UTC; `None`: never by itself.
    pub next_at_unix_ms: Option<u64>,
}

/// The verification of all stores of a daemon.
pub struct Scrubs {
    plane: Arc<dyn Plane>,
    metadata: Arc<dyn MetadataStore>,
    /// `None`: only when somebody asks for it.
    every: Option<Duration>,
    bytes_per_second: u64,
    stores: Mutex<BTreeMap<StoreId, StoreScrub>>,
}

impl Scrubs {
    /// Reads what came of earlier scrubs and when each open store is due.
    pub async fn load(
        plane: Arc<dyn Plane>,
        metadata: Arc<dyn MetadataStore>,
        every: Option<Duration>,
        bytes_per_second: u64,
    ) -> Result<Scrubs, MetadataError> {
        let now = unix_ms();
        let mut first_seen = BTreeMap::new();
        for entry in metadata.list(keys::STORES).await?.entries {
            let record = entry.read::<StoreRecord>()?.record;
            first_seen.insert(record.id, record.first_seen_unix_ms);
        }
        let mut stores = BTreeMap::new();
        for id in plane.stores() {
            let last = crate::meta::read::<ScrubRecord>(&*metadata, &keys::scrub(id)).await?;
            let last = last.map(|last| last.record);
            let since = match last {
                Some(last) => last.finished_at_unix_ms,
                // A store that nobody verified yet was sound when it was made.
                None => first_seen.get(&id).copied().unwrap_or(now),
            };
            let next_at_unix_ms = every.map(|every| due_at(since, every, now));
            let scrub = StoreScrub {
                last,
                next_at_unix_ms,
            };
            stores.insert(id, scrub);
        }
        Ok(Scrubs {
            plane,
            metadata,
            every,
            bytes_per_second,
            stores: Mutex::new(stores),
        })
    }

    /// What is known of one store.
    pub fn of(&self, store: StoreId) -> StoreScrub {
        self.stores().get(&store).copied().unwrap_or_default()
    }

    /// What is known of all of them.
    pub fn all(&self) -> BTreeMap<StoreId, StoreScrub> {
        self.stores().clone()
    }

    /// Begins scrubs when they are due and writes down what came of them, those that people asked for included, until
    /// `stopped` or the end of the data plane.
    pub async fn run(self: Arc<Self>, stopped: impl Future<Output = ()>) {
        tokio::pin!(stopped);
        let mut running = None;
        loop {
            let wait = match running {
                Some(_) => Some(LOOK_AFTER),
                None => self.until_next(),
            };
            let waited = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut stopped => return,
                ended = self.plane.scrub_ended() => {
                    let Some(ended) = ended else { return };
                    self.write_down(ended).await;
                    if running == Some(ended.store) {
                        running = None;
                    }
                }
                () = waited => {
                    running = match running {
                        Some(store) => self.look_after(store).await,
                        None => self.begin_next().await,
                    };
                }
            }
        }
    }

    fn stores(&self) -> MutexGuard<'_, BTreeMap<StoreId, StoreScrub>> {
        // Nothing is left half-done under this lock.
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store that is due first, and when.
    fn next(&self) -> Option<(StoreId, u64)> {
        let stores = self.stores();
        let due = stores
            .iter()
            .filter_map(|(id, scrub)| Some((*id, scrub.next_at_unix_ms?)));
        due.min_by_key(|(_, at)| *at)
    }

    fn until_next(&self) -> Option<Duration> {
        let (_, at) = self.next()?;
        Some(Duration::from_millis(at.saturating_sub(unix_ms())))
    }

    /// Answers the store whose scrub runs from here on.
    async fn begin_next(&self) -> Option<StoreId> {
        let (store, at) = self.next()?;
        // The clock of the machine may have been set back meanwhile.
        if at > unix_ms() {
            return None;
        }
        match self.state_of(store).await {
            // Somebody asked for it: its end counts as well.
            Some(true) => Some(store),
            Some(false) => match self.plane.start_scrub(store, self.bytes_per_second).await {
                Ok(_) => {
                    tracing::info!(store = %store.0, "a scrub begins, as every so often");
                    Some(store)
                }
                Err(error) => {
                    tracing::warn!(store = %store.0, %error, "a scrub that is due could not begin");
                    self.postpone(store);
                    None
                }
            },
            // It answers errors until the daemon is restarted.
            None => {
                self.postpone(store);
                None
            }
        }
    }

    /// `None` when the scrub does not run any more and will not come to its end.
    async fn look_after(&self, store: StoreId) -> Option<StoreId> {
        if self.state_of(store).await == Some(true) {
            return Some(store);
        }
        // It may have come to its end just now.
        if self
            .of(store)
            .next_at_unix_ms
            .is_some_and(|at| at <= unix_ms())
        {
            self.postpone(store);
        }
        None
    }

    /// Whether a scrub runs; `None`: the store is poisoned.
    async fn state_of(&self, store: StoreId) -> Option<bool> {
        let views = self.plane.store_views().await;
        let view = views.into_iter().find(|view| view.id == store)?;
        match view.status.poisoned {
            None => Some(view.status.scrubbing),
            Some(_) => None,
        }
    }

    fn postpone(&self, store: StoreId) {
        let wait = self.every.map_or(TRY_AGAIN, |every| every.min(TRY_AGAIN));
        if let Some(scrub) = self.stores().get_mut(&store) {
            scrub.next_at_unix_ms = Some(unix_ms() + wait.as_millis() as u64);
        }
    }

    async fn write_down(&self, ended: ScrubEnd) {
        let now = unix_ms();
        let record = ScrubRecord {
            store: ended.store,
            finished_at_unix_ms: now,
            verified_bytes: ended.blocks * BLOCK_BYTES as u64,
            damaged_blocks: ended.damaged,
        };
        let scrub = StoreScrub {
            last: Some(record),
            next_at_unix_ms: self.every.map(|every| now + every.as_millis() as u64),
        };
        let write = Transaction::new().put(keys::scrub(ended.store), record.encode());
        if let Err(error) = self.metadata.commit(write).await {
            tracing::warn!(store = %ended.store.0, %error, "what a scrub found could not be written down; the store is verified again after a restart");
        }
        // Shown only now: what was told is still told after a restart, unless there was that warning.
        self.stores().insert(ended.store, scrub);
    }
}

/// When a store is due that was sound `since`, for a daemon that starts `now`.
fn due_at(since_unix_ms: u64, every: Duration, now_unix_ms: u64) -> u64 {
    // What is said to have happened later than now happened under a clock that was wrong.
    let due = since_unix_ms.min(now_unix_ms) + every.as_millis() as u64;
    let grace = AFTER_START.min(every / 100);
    due.max(now_unix_ms + grace.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_due_an_interval_after_it_was_sound_and_not_at_once() {
        const HOUR: u64 = 3_600_000;
        let (every, now) = (Duration::from_millis(24 * HOUR), 1000 * HOUR);
        assert_eq!(due_at(990 * HOUR, every, now), 1014 * HOUR);
        // Overdue, for a little or for ever.
        assert_eq!(due_at(now - 24 * HOUR, every, now), now + 300_000);
        assert_eq!(due_at(0, every, now), now + 300_000);
        assert_eq!(due_at(0, Duration::from_secs(5), now), now + 50);
        // By a clock that was ahead.
        assert_eq!(due_at(5000 * HOUR, every, now), now + 24 * HOUR);
    }
}
