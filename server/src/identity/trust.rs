//! Whom to let in: the nodes and clients of the cluster as the metadata store has them, watched.
//!
//! An outage of the metadata store changes nothing: what was known last is believed until something newer is read.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::records::{
    ClientRecord, MemberRecord, MemberState, Record, Revision, Versioned, keys,
};
use ashlar_core::units::NodeId;
use thiserror::Error;

use super::names::Peer;
use super::sessions::Sessions;
use crate::events::Events;
use crate::meta::{Change, MetadataError, MetadataStore};
use crate::volumes::unix_ms;

/// Pause before the records are listed again after that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TrustError {
    /// Not recorded, or removed.
    #[error("{peer} is not, or not any more, one of this cluster")]
    ShutOut {
        /// Who.
        peer: Peer,
    },
    /// The certificate is for something else.
    #[error("the certificate of {peer} is not for this")]
    WrongRole {
        /// Who.
        peer: Peer,
    },
}

#[derive(Debug, Default)]
struct Known {
    members: BTreeMap<NodeId, MemberRecord>,
    clients: BTreeMap<String, ClientRecord>,
}

/// The watched records.
#[derive(Debug)]
pub struct Trust {
    known: RwLock<Known>,
    sessions: Arc<Sessions>,
    /// Where it is told who comes and goes, once there is somebody to listen.
    events: OnceLock<Events>,
}

/// One of the two kinds of records.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Members,
    Clients,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Kind::Members => keys::MEMBERS,
            Kind::Clients => keys::CLIENTS,
        }
    }
}

impl Trust {
    /// Reads the records and follows them for as long as the trust is in use. Sessions of those who are shut out are cut.
    pub async fn start(
        records: Arc<dyn MetadataStore>,
        sessions: Arc<Sessions>,
    ) -> Result<Arc<Trust>, MetadataError> {
        let trust = Arc::new(Trust {
            known: RwLock::default(),
            sessions,
            events: OnceLock::new(),
        });
        for kind in [Kind::Members, Kind::Clients] {
            let revision = trust.list(&*records, kind).await?;
            let (trust, records) = (Arc::downgrade(&trust), records.clone());
            tokio::spawn(async move {
                let mut after = revision;
                // Ends when nobody uses the trust any more.
                while let Some(trust) = trust.upgrade() {
                    match trust.follow(&*records, kind, after).await {
                        Ok(revision) => after = revision,
                        Err(error) => {
                            tracing::debug!(%error, ?kind, "the records of the cluster are not followed for now");
                            tokio::time::sleep(PAUSE).await;
                        }
                    }
                }
            });
        }
        Ok(trust)
    }

    /// Reads all records of a kind anew.
    async fn list(
        &self,
        records: &dyn MetadataStore,
        kind: Kind,
    ) -> Result<Revision, MetadataError> {
        let listing = records.list(kind.prefix()).await?;
        let mut read = Known::default();
        for entry in &listing.entries {
            read.put(kind, &entry.key, &entry.value);
        }
        self.change(|known| match kind {
            Kind::Members => known.members = read.members,
            Kind::Clients => known.clients = read.clients,
        });
        Ok(listing.revision)
    }

    /// Follows the records until the watch ends, and then lists them once more. Answers where to go on.
    async fn follow(
        &self,
        records: &dyn MetadataStore,
        kind: Kind,
        after: Revision,
    ) -> Result<Revision, MetadataError> {
        let watch = records.watch(kind.prefix(), after).await;
        let mut watch = match watch {
            Ok(watch) => watch,
            Err(MetadataError::Compacted { .. } | MetadataError::Invalid { .. }) => {
                return self.list(records, kind).await;
            }
            Err(error) => return Err(error),
        };
        while let Ok(batch) = watch.next().await {
            self.change(|known| {
                for change in batch.changes {
                    match change {
                        Change::Put { key, value } => known.put(kind, &key, &value),
                        Change::Deleted { key } => known.forget(kind, &key),
                    }
                }
            });
        }
        self.list(records, kind).await
    }

    /// Tells of nodes that come and go from now on.
    pub(crate) fn tell_events(&self, events: Events) {
        let _ = self.events.set(events);
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        let before = self.events.get().map(|_| self.states());
        change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner));
        if let (Some(before), Some(events)) = (before, self.events.get()) {
            for (node, state) in self.states() {
                let what = match state {
                    MemberState::Active => Occurrence::NodeJoined,
                    MemberState::Removed => Occurrence::NodeRemoved,
                };
                if before.get(&node) != Some(&state) {
                    events.tell_of_node(Some(node), what);
                }
            }
        }
        self.sessions.cut(|peer| self.check(peer).is_err());
    }

    /// Whether this holder of a certificate is one of the cluster now.
    pub fn check(&self, peer: &Peer) -> Result<(), TrustError> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let is_in = match peer {
            Peer::Node(node) => known
                .members
                .get(node)
                .is_some_and(|member| member.state == MemberState::Active),
            Peer::Client {
                name,
                certificate,
                role,
            } => known.clients.get(name).is_some_and(|client| {
                client.certificate == *certificate
                    && client.role == *role
                    && unix_ms() < client.expires_at_unix_ms
            }),
        };
        if is_in {
            Ok(())
        } else {
            Err(TrustError::ShutOut { peer: peer.clone() })
        }
    }

    fn states(&self) -> BTreeMap<NodeId, MemberState> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let members = known.members.values();
        members.map(|member| (member.id, member.state)).collect()
    }

    /// Every node that is or was in the cluster.
    pub fn members(&self) -> Vec<MemberRecord> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.members.values().cloned().collect()
    }
}

impl Known {
    /// A record that cannot be read lets nobody in.
    fn put(&mut self, kind: Kind, key: &str, value: &[u8]) {
        let told =
            |error: &dyn std::fmt::Display| tracing::error!(%error, "a record is passed over");
        match kind {
            Kind::Members => match MemberRecord::decode(key, value) {
                Ok(record) => drop(self.members.insert(record.id, record)),
                Err(error) => {
                    told(&error);
                    self.forget(kind, key);
                }
            },
            Kind::Clients => match ClientRecord::decode(key, value) {
                Ok(record) => drop(self.clients.insert(record.name.clone(), record)),
                Err(error) => {
                    told(&error);
                    self.forget(kind, key);
                }
            },
        }
    }

    fn forget(&mut self, kind: Kind, key: &str) {
        let name = key.strip_prefix(kind.prefix()).unwrap_or_default();
        match kind {
            Kind::Members => self.members.retain(|id, _| id.0.to_string() != name),
            Kind::Clients => drop(self.clients.remove(name)),
        }
    }
}

/// The record of one node.
pub(crate) async fn member(
    records: &dyn MetadataStore,
    node: NodeId,
) -> Result<Option<Versioned<MemberRecord>>, MetadataError> {
    crate::meta::read(records, &keys::member(node)).await
}
