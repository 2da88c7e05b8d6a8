//! A cluster begins: an authority, the first node, and the records that the node kept alone.
//!
//! Every step can be done again, in this order, and a crash between any two leaves something that the next run takes up:
//! 1. the node notes which cluster it is about to found; from here on it does not start alone any more, so that no epoch
//!    is claimed while records are on their way;
//! 2. authority, then the node's own certificate, are written into the data directory;
//! 3. the cluster's record claims the place in etcd, marked as being moved; nobody serves from it;
//! 4. records are copied; those that are there already are left;
//! 5. in one transaction the mark goes and the node becomes a member;
//! 6. the node notes that it is done.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use ashlar_core::records::{
    ClusterId, ClusterRecord, MemberRecord, MemberState, MembershipRecord, Record, StoreRecord,
    Transaction, keys,
};
use ashlar_core::units::NodeId;
use rcgen::KeyPair;
use thiserror::Error;
use uuid::Uuid;

use super::authority::Authority;
use super::files::{IdentityFile, IdentityFileError, own_authority};
use super::names::Peer;
use super::{IdentityError, sha256_hex};
use crate::meta::{self, MetadataError, MetadataStore, Outcome};
use crate::volumes::unix_ms;

/// Records copied by one transaction: a condition and an effect each, within [`meta::TRANSACTION_MAX_STEPS`], and few
/// enough for etcd's largest request.
const COPIED_AT_ONCE: usize = 50;
/// What is moved. The rest of a node's records are its own.
const MOVED: [&str; 7] = [
    keys::VOLUMES,
    keys::NAMES,
    keys::ANNOTATIONS,
    keys::CLIENT_NODES,
    keys::STORES,
    keys::SCRUBS,
    keys::NEXT_LAYER,
];

/// Why a cluster did not begin.
#[derive(Debug, Error)]
pub enum InitError {
    /// Records.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The identity.
    #[error(transparent)]
    Files(#[from] IdentityFileError),
    /// The place in etcd is taken.
    #[error(
        "etcd holds another cluster ({}) under this prefix; choose another --etcd-prefix, or join that cluster",
        cluster.0
    )]
    Taken {
        /// Whose.
        cluster: ClusterId,
    },
    /// Something else is there.
    #[error(
        "etcd holds records under this prefix that are no cluster's (such as {key:?}); choose another --etcd-prefix"
    )]
    Occupied {
        /// One of them.
        key: String,
    },
    /// The node is in a cluster.
    #[error("this node is in cluster {} already; a node belongs to one cluster", cluster.0)]
    Member {
        /// Which.
        cluster: ClusterId,
    },
    /// The same key with another value.
    #[error("the record {key:?} is in etcd already and differs; nothing was overwritten")]
    Differs {
        /// Which.
        key: String,
    },
    /// Somebody else writes.
    #[error("the cluster's record changed while records were moved; run this again")]
    Contended,
}

impl From<IdentityError> for InitError {
    fn from(error: IdentityError) -> InitError {
        InitError::Files(error.into())
    }
}

/// What is needed.
pub struct Initialising<'a> {
    /// The node's data directory, locked.
    pub data_dir: &'a Path,
    /// The node's own records.
    pub local: &'a dyn MetadataStore,
    /// The cluster's.
    pub shared: &'a dyn MetadataStore,
    /// This node.
    pub node: NodeId,
    /// Names and addresses for its certificate.
    pub names: Vec<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// How long its first certificate is good for.
    pub length: Duration,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initialised {
    /// The cluster.
    pub cluster: ClusterId,
    /// Digest of its authority's certificate, hexadecimal digits.
    pub authority_sha256: String,
    /// Volumes that it begins with.
    pub volumes: usize,
}

/// Founds the cluster, or finishes founding it.
pub async fn initialise(what: &Initialising<'_>) -> Result<Initialised, InitError> {
    let membership = meta::read::<MembershipRecord>(what.local, keys::MEMBERSHIP).await?;
    let (cluster, is_complete) = match &membership {
        Some(noted) => (noted.record.cluster, noted.record.is_complete),
        None => (ClusterId(Uuid::new_v4()), false),
    };
    // Asked before anything is noted, so that a wrong prefix leaves the node as it was.
    let found = meta::read::<ClusterRecord>(what.shared, keys::CLUSTER).await?;
    match &found {
        Some(other) if membership.is_none() || other.record.id != cluster => {
            return Err(match membership {
                Some(noted) if noted.record.is_complete => InitError::Member { cluster },
                _ => InitError::Taken {
                    cluster: other.record.id,
                },
            });
        }
        None if is_complete => return Err(InitError::Member { cluster }),
        None => {
            if let Some(entry) = what.shared.list("").await?.entries.first() {
                return Err(InitError::Occupied {
                    key: entry.key.clone(),
                });
            }
        }
        Some(_) => {}
    }
    if membership.is_none() {
        note(what.local, cluster, false).await?;
    }
    let authority = match own_authority(what.data_dir, cluster)? {
        Some(authority) => authority,
        None => Authority::create(cluster, what.data_dir)?,
    };
    let authority_sha256 = sha256_hex(authority.certificate());
    if IdentityFile::read(what.data_dir)?.is_none() {
        let key = KeyPair::generate().map_err(|error| IdentityError::Unusable {
            reason: error.to_string(),
        })?;
        let peer = Peer::Node(what.node);
        let (certificate, lifetime) =
            authority.sign(&peer, key.public_key_raw(), &what.names, what.length)?;
        IdentityFile::new(
            cluster,
            what.node,
            authority.certificate(),
            &certificate,
            &key,
            lifetime,
        )
        .write(what.data_dir)?;
    }
    if found.is_none() {
        let claimed = ClusterRecord {
            id: cluster,
            authority_sha256: authority_sha256.clone(),
            created_at_unix_ms: unix_ms(),
            moving_from: Some(what.node),
        };
        let claim = Transaction::new()
            .when_absent(keys::CLUSTER)
            .put(keys::CLUSTER, claimed.encode());
        if what.shared.commit(claim).await? == Outcome::Conflict {
            return Err(InitError::Contended);
        }
    }
    move_records(what, cluster).await?;
    if !is_complete {
        note(what.local, cluster, true).await?;
    }
    let volumes = what.shared.list(keys::VOLUMES).await?.entries.len();
    Ok(Initialised {
        cluster,
        authority_sha256,
        volumes,
    })
}

async fn note(
    local: &dyn MetadataStore,
    cluster: ClusterId,
    is_complete: bool,
) -> Result<(), MetadataError> {
    let noted = MembershipRecord {
        cluster,
        is_complete,
    };
    let write = Transaction::new().put(keys::MEMBERSHIP, noted.encode());
    local.commit(write).await.map(drop)
}

/// Copies the records and then takes the mark away, if it is still there.
async fn move_records(what: &Initialising<'_>, cluster: ClusterId) -> Result<(), InitError> {
    let marked = meta::read::<ClusterRecord>(what.shared, keys::CLUSTER).await?;
    let marked = marked.ok_or(InitError::Contended)?;
    if marked.record.moving_from.is_none() {
        return Ok(());
    }
    if marked.record.id != cluster {
        return Err(InitError::Contended);
    }
    let still_marked = || Transaction::new().when_unchanged(keys::CLUSTER, marked.changed_at);
    for prefix in MOVED {
        let there = what.shared.list(prefix).await?.entries;
        let there: BTreeMap<_, _> = there.into_iter().map(|e| (e.key, e.value)).collect();
        let mut missing = Vec::new();
        for entry in what.local.list(prefix).await?.entries {
            let value = owned(&entry, what.node)?;
            match there.get(&entry.key) {
                Some(same) if *same == value => {}
                Some(_) => return Err(InitError::Differs { key: entry.key }),
                None => missing.push((entry.key, value)),
            }
        }
        for batch in missing.chunks(COPIED_AT_ONCE) {
            let copy = batch.iter().fold(still_marked(), |copy, (key, value)| {
                copy.when_absent(key.clone())
                    .put(key.clone(), value.clone())
            });
            if what.shared.commit(copy).await? == Outcome::Conflict {
                return Err(InitError::Contended);
            }
        }
    }
    let complete = ClusterRecord {
        moving_from: None,
        ..marked.record.clone()
    };
    let member = MemberRecord {
        id: what.node,
        joined_at_unix_ms: unix_ms(),
        state: MemberState::Active,
        // The daemon says where it is when it starts.
        address: None,
        is_authority: true,
        labels: what.labels.clone(),
        draining: false,
    };
    let finish = still_marked()
        .put(keys::CLUSTER, complete.encode())
        .put(keys::member(what.node), member.encode());
    if what.shared.commit(finish).await? == Outcome::Conflict {
        return Err(InitError::Contended);
    }
    Ok(())
}

/// The value of a record in the cluster: a store says there whose it is.
fn owned(entry: &meta::Entry, node: NodeId) -> Result<Vec<u8>, MetadataError> {
    if !entry.key.starts_with(keys::STORES) {
        return Ok(entry.value.clone());
    }
    let store = entry.read::<StoreRecord>()?.record;
    Ok(StoreRecord {
        node: Some(node),
        ..store
    }
    .encode())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use ashlar_core::records::{ClientNodeId, Revision, VolumeName};
    use ashlar_core::units::{StoreId, VolumeId};
    use async_trait::async_trait;

    use super::*;
    use crate::meta::{Entry, Listing, SqliteStore, Watch};

    /// A store whose commits fail from the nth on; the nth itself happens and is not known of where `applied` says so.
    struct Failing {
        inner: SqliteStore,
        left: AtomicU32,
        applied: bool,
    }

    #[async_trait]
    impl MetadataStore for Failing {
        async fn get(&self, key: &str) -> Result<Option<Entry>, MetadataError> {
            self.inner.get(key).await
        }

        async fn list(&self, prefix: &str) -> Result<Listing, MetadataError> {
            self.inner.list(prefix).await
        }

        async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError> {
            let reason = "it was to fail here".to_owned();
            match self.left.load(Ordering::Relaxed) {
                0 => Err(MetadataError::Unavailable { reason }),
                1 if self.applied => {
                    self.left.store(0, Ordering::Relaxed);
                    self.inner.commit(transaction).await?;
                    Err(MetadataError::Unknown { reason })
                }
                left => {
                    self.left.store(left - 1, Ordering::Relaxed);
                    self.inner.commit(transaction).await
                }
            }
        }

        async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError> {
            self.inner.watch(prefix, after).await
        }
    }

    fn store(dir: &Path, name: &str) -> SqliteStore {
        SqliteStore::open(&dir.join(name)).expect("open")
    }

    /// Whatever commit fails, known or unknown, on either side, a second run finishes the first one's work, and what was
    /// there alone is there in the cluster, once.
    #[tokio::test]
    async fn founding_a_cluster_survives_a_failure_of_every_step() {
        for fails_here in [true, false] {
            for applied in [false, true] {
                let mut commits = 0;
                while !fails_after(commits, fails_here, applied).await {
                    commits += 1;
                }
                assert!(commits > 1, "only {commits} commits were seen to fail");
            }
        }
    }

    /// Whether nothing failed, because the run needed no more commits.
    async fn fails_after(commits: u32, fails_here: bool, applied: bool) -> bool {
        let dir = tempfile::tempdir().expect("temporary directory");
        let node = NodeId(Uuid::from_u128(1));
        let (local, shared) = (store(dir.path(), "local"), store(dir.path(), "shared"));
        let records = StoreRecord {
            id: StoreId(Uuid::from_u128(2)),
            path: "/s".to_owned(),
            node: None,
            first_seen_unix_ms: 1,
            boot: None,
        };
        let mut fill = Transaction::new().put(keys::store(records.id), records.encode());
        for n in 0..COPIED_AT_ONCE + 1 {
            let name = VolumeName::parse(&format!("v{n}")).expect("name");
            fill = fill.put(keys::name(&name), vec![n as u8]);
        }
        // What orchestrators keep there: by the annotations they know a volume again, by the client nodes whom it is
        // published to.
        let client = ClientNodeId::parse("worker-1").expect("an id");
        let kept = [
            keys::annotations(VolumeId(Uuid::from_u128(3))),
            keys::client_node(&client),
        ];
        for key in &kept {
            fill = fill.put(key.clone(), key.clone().into_bytes());
        }
        local.commit(fill).await.expect("filled");
        let failing = |inner: SqliteStore, fails: bool| Failing {
            inner,
            left: AtomicU32::new(if fails { commits } else { u32::MAX }),
            applied: applied && fails,
        };
        let (local, shared) = (failing(local, fails_here), failing(shared, !fails_here));
        let what = Initialising {
            data_dir: dir.path(),
            local: &local,
            shared: &shared,
            node,
            names: Vec::new(),
            labels: BTreeMap::new(),
            length: Duration::from_secs(3600),
        };
        let first = initialise(&what).await;
        for store in [&local, &shared] {
            store.left.store(u32::MAX, Ordering::Relaxed);
        }
        let second = initialise(&what).await.expect("the second run");
        if let Ok(first) = &first {
            assert_eq!(*first, second);
        }
        let names = shared.list(keys::NAMES).await.expect("list").entries;
        assert_eq!(names.len(), COPIED_AT_ONCE + 1);
        for key in &kept {
            let moved = shared.get(key).await.expect("get").expect("moved");
            assert_eq!(moved.value, key.as_bytes());
        }
        let moved = shared.get(&keys::store(records.id)).await.expect("get");
        let moved = moved.expect("moved").read::<StoreRecord>().expect("read");
        assert_eq!(moved.record.node, Some(node));
        let cluster = meta::read::<ClusterRecord>(&shared, keys::CLUSTER).await;
        let cluster = cluster.expect("read").expect("there").record;
        assert_eq!((cluster.id, cluster.moving_from), (second.cluster, None));
        let noted = meta::read::<MembershipRecord>(&local, keys::MEMBERSHIP).await;
        assert!(noted.expect("read").expect("there").record.is_complete);
        let file = IdentityFile::read(dir.path())
            .expect("read")
            .expect("there");
        assert_eq!((file.cluster, file.node), (second.cluster, node));
        file.credentials().expect("key and certificate");
        first.is_ok()
    }
}
