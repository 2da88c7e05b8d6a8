//! What happened in this daemon, remembered beside the log: the one place where events are told.
//!
//! They live as long as the process; the log says the same for longer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ashlar_core::diagnosis::events::{Memory, Occurrence, Page, Subject};
use ashlar_core::records::VolumeRecord;
use ashlar_core::units::{NodeId, StoreId, VolumeId};
use tokio::sync::watch;

use crate::volumes::unix_ms;

/// Events that are remembered: a few hundred KiB, and weeks of a quiet cluster.
const REMEMBERED: usize = 4096;

/// The events of one daemon. Cheap to clone; may be told to from any thread.
#[derive(Clone, Debug)]
pub struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    memory: Mutex<Memory>,
    /// The number of the newest.
    newest: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Events {
        Events(Arc::new(Inner {
            memory: Mutex::new(Memory::new(REMEMBERED)),
            newest: watch::Sender::new(0),
        }))
    }
}

impl Events {
    /// Remembers that something happened.
    pub fn tell(&self, subject: Subject, what: Occurrence) {
        let mut memory = self.memory();
        memory.push(unix_ms(), subject, what);
        let newest = memory.newest();
        drop(memory);
        self.0.newest.send_replace(newest);
    }

    /// Something happened to a volume, or to the copy of it on `node`.
    pub fn tell_of(&self, record: &VolumeRecord, node: Option<NodeId>, what: Occurrence) {
        self.tell(
            Subject {
                volume: Some(record.id),
                volume_name: record.name.to_string(),
                node,
                store: None,
            },
            what,
        );
    }

    /// Something happened to a store of this daemon.
    pub fn tell_of_store(&self, store: StoreId, what: Occurrence) {
        self.tell(
            Subject {
                store: Some(store),
                ..Subject::default()
            },
            what,
        );
    }

    /// Something happened to a node.
    pub fn tell_of_node(&self, node: Option<NodeId>, what: Occurrence) {
        self.tell(
            Subject {
                node,
                ..Subject::default()
            },
            what,
        );
    }

    /// What came after event `seen`, of one volume or of all.
    pub fn after(&self, seen: u64, volume: Option<VolumeId>) -> Page {
        self.memory().after(seen, volume)
    }

    /// Changes with every event.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.0.newest.subscribe()
    }

    /// Nothing is left half-done under the lock.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_follows_is_woken_by_each() {
        let events = Events::default();
        let mut news = events.follow();
        events.tell(Subject::default(), Occurrence::DaemonReady);
        news.changed().await.expect("the sender lives");
        let page = events.after(0, None);
        assert_eq!(page.events.len(), 1);
        events.tell(Subject::default(), Occurrence::DaemonStopping);
        news.changed().await.expect("the sender lives");
        let page = events.after(page.seen, None);
        assert_eq!(page.events[0].what, Occurrence::DaemonStopping);
    }
}
