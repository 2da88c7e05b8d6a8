//! Does what the data threads ask, and answers them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ashlar_core::records::{VolumeRecord, keys};
use ashlar_core::replication::{News, Seal, StopReason, SwapOutcome};
use ashlar_core::units::{NodeId, StoreId, VolumeId};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use uuid::Uuid;

use super::{ClusterTell, Dial, Seals};
use crate::data::{DataPlane, LinkWish};
use crate::meta::{self, MetadataError, MetadataStore, Outcome};

/// Until something that failed is tried again: first, and at most.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);
/// Until a seal that could not be kept is tried again.
const KEEP_AGAIN: Duration = Duration::from_secs(5);

/// What the volume service has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicationEvent {
    /// Clients may come.
    Serving {
        /// Of which volume.
        volume: VolumeId,
        /// Of the head's claim.
        incarnation: Uuid,
        /// Of this generation.
        client_generation: u64,
    },
    /// Acknowledged writes may be gone; the clients were sent away and must not come back unknowing.
    SessionsEnded {
        /// Of which volume.
        volume: VolumeId,
        /// Clients of smaller generations are meant.
        client_generation: u64,
    },
    /// The head is at its end.
    Stopped {
        /// Of which volume.
        volume: VolumeId,
        /// Of the head's claim.
        incarnation: Uuid,
        /// Why.
        reason: StopReason,
    },
    /// For people and counters.
    News {
        /// Of which volume.
        volume: VolumeId,
        /// The node it is about.
        node: Option<NodeId>,
        /// What.
        news: News,
    },
}

/// See the module text.
pub struct Driver {
    plane: DataPlane,
    records: Arc<dyn MetadataStore>,
    dial: Arc<dyn Dial>,
    persist: mpsc::UnboundedSender<(VolumeId, StoreId, u64, Seal)>,
    events: mpsc::UnboundedSender<ReplicationEvent>,
    dialling: HashMap<(usize, NodeId, StoreId), Dialling>,
}

/// A link that is wished for, until it is handed over.
struct Dialling {
    task: AbortHandle,
    /// Set before the link is handed over: from then on a wish for the same link is a new one.
    is_done: Arc<AtomicBool>,
    begun: Instant,
}

impl Driver {
    /// Works as long as the data threads live. Events go to `events`.
    pub fn start(
        plane: DataPlane,
        records: Arc<dyn MetadataStore>,
        seals: Seals,
        dial: Arc<dyn Dial>,
        events: mpsc::UnboundedSender<ReplicationEvent>,
    ) {
        let (persist, persisting) = mpsc::unbounded_channel();
        tokio::spawn(keep_seals(plane.clone(), seals, persisting));
        let driver = Driver {
            plane,
            records,
            dial,
            persist,
            events,
            dialling: HashMap::new(),
        };
        tokio::spawn(driver.run());
    }

    async fn run(mut self) {
        while let Some(tell) = self.plane.cluster_tell().await {
            match tell {
                ClusterTell::ReadRecord { volume } => {
                    tokio::spawn(read_record(
                        self.plane.clone(),
                        self.records.clone(),
                        volume,
                    ));
                }
                ClusterTell::Swap {
                    volume,
                    serial,
                    transaction,
                } => {
                    let (plane, records) = (self.plane.clone(), self.records.clone());
                    tokio::spawn(async move {
                        let outcome = match records.commit(transaction).await {
                            Ok(Outcome::Committed(revision)) => SwapOutcome::Done(revision),
                            Ok(Outcome::Conflict) => SwapOutcome::Conflict,
                            Err(error) => {
                                tracing::warn!(volume = %volume.0, %error, "a volume's record was not changed for certain");
                                SwapOutcome::Unknown
                            }
                        };
                        plane.swapped(volume, serial, outcome);
                    });
                }
                ClusterTell::Link(wish) => self.link(wish),
                ClusterTell::Persist {
                    volume,
                    store,
                    serial,
                    seal,
                } => {
                    let _ = self.persist.send((volume, store, serial, seal));
                }
                ClusterTell::Serving {
                    volume,
                    incarnation,
                    client_generation,
                } => self.event(ReplicationEvent::Serving {
                    volume,
                    incarnation,
                    client_generation,
                }),
                ClusterTell::SessionsEnded {
                    volume,
                    client_generation,
                } => self.event(ReplicationEvent::SessionsEnded {
                    volume,
                    client_generation,
                }),
                ClusterTell::Stopped {
                    volume,
                    incarnation,
                    reason,
                } => self.event(ReplicationEvent::Stopped {
                    volume,
                    incarnation,
                    reason,
                }),
                ClusterTell::News { volume, node, news } => {
                    self.event(ReplicationEvent::News { volume, node, news });
                }
            }
        }
        for (_, dialling) in self.dialling.drain() {
            dialling.task.abort();
        }
    }

    /// Nobody listens when the daemon stops.
    fn event(&self, event: ReplicationEvent) {
        let _ = self.events.send(event);
    }

    fn link(&mut self, wish: LinkWish) {
        let key = (wish.thread, wish.node, wish.store);
        if !wish.is_wanted {
            if let Some(dialling) = self.dialling.remove(&key) {
                dialling.task.abort();
            }
            return;
        }
        if let Some(dialling) = self.dialling.get(&key)
            && !dialling.is_done.load(Ordering::Acquire)
        {
            return;
        }
        // A peer that takes links and ends them at once, because it is going away, is not dialled in a tight loop.
        let pause = self.dialling.get(&key).map_or(Duration::ZERO, |last| {
            RETRY_FIRST.saturating_sub(last.begun.elapsed())
        });
        let is_done = Arc::new(AtomicBool::new(false));
        let dialling =
            dial_until_there(self.plane.clone(), self.dial.clone(), wish, is_done.clone());
        let task = tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            dialling.await;
        });
        let dialling = Dialling {
            task: task.abort_handle(),
            is_done,
            begun: Instant::now() + pause,
        };
        self.dialling.insert(key, dialling);
    }
}

async fn dial_until_there(
    plane: DataPlane,
    dial: Arc<dyn Dial>,
    wish: LinkWish,
    is_done: Arc<AtomicBool>,
) {
    let mut wait = RETRY_FIRST;
    loop {
        match dial.dial(wish.node, wish.store).await {
            Ok(ends) => {
                is_done.store(true, Ordering::Release);
                return plane.link_up(wish.thread, ends);
            }
            Err(error) => {
                tracing::debug!(node = %wish.node.0, store = %wish.store.0, %error, "no link");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MOST);
            }
        }
    }
}

async fn read_record(plane: DataPlane, records: Arc<dyn MetadataStore>, volume: VolumeId) {
    let mut wait = RETRY_FIRST;
    loop {
        match meta::read::<VolumeRecord>(&*records, &keys::volume(volume)).await {
            Ok(record) => return plane.record_read(volume, true, record),
            Err(error @ MetadataError::Unreadable { .. }) => {
                tracing::error!(volume = %volume.0, %error, "a volume's record cannot be read; the volume waits");
                return;
            }
            Err(error) => {
                tracing::debug!(volume = %volume.0, %error, "a volume's record cannot be read yet");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MOST);
            }
        }
    }
}

/// One after the other, so that a later seal is never overtaken by an earlier one. What cannot be kept is tried again until it is, or
/// a later one takes its place: a seal may say of a copy what nobody will say again.
async fn keep_seals(
    plane: DataPlane,
    seals: Seals,
    mut wanted: mpsc::UnboundedReceiver<(VolumeId, StoreId, u64, Seal)>,
) {
    let mut failed = BTreeMap::new();
    loop {
        let next = if failed.is_empty() {
            Ok(wanted.recv().await)
        } else {
            tokio::time::timeout(KEEP_AGAIN, wanted.recv()).await
        };
        let due = match next {
            Ok(None) => return,
            Ok(Some((volume, store, serial, seal))) => {
                BTreeMap::from([((volume, store), (serial, seal))])
            }
            Err(_) => std::mem::take(&mut failed),
        };
        for ((volume, store), (serial, seal)) in due {
            match seals.keep(volume, store, seal).await {
                Ok(()) => {
                    failed.remove(&(volume, store));
                    plane.persisted(volume, store, serial);
                }
                // Not answered, the head will look for another replica, or wait.
                Err(error) => {
                    tracing::error!(volume = %volume.0, store = %store.0, %error, "the seal of a replica cannot be kept; it follows no head until it can");
                    failed.insert((volume, store), (serial, seal));
                }
            }
        }
    }
}
