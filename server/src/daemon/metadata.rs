//! Opens what keeps the records: SQLite in the data directory, and etcd when the node is one of a cluster.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::{
    ClusterId, ClusterRecord, MemberRecord, MemberState, MembershipRecord, NodeRecord, Record,
    Revision, Transaction, keys, put_member,
};
use ashlar_core::units::NodeId;
use thiserror::Error;
use uuid::Uuid;

use crate::config::{Address, Config, EtcdAccess, Metadata};
use crate::identity::{
    self, Identity, IdentityError, IdentityFile, IdentityFileError, JoiningError, Peer, Sessions,
    Trust,
};
use crate::meta::{
    self, ETCD_TIMEOUT_DEFAULT, EtcdConfig, EtcdConfigError, EtcdStore, EtcdTls, MetadataError,
    MetadataStore, OpenError, Outcome, SqliteStore,
};
use crate::volumes::unix_ms;

/// The metadata in the data directory.
pub(super) const METADATA_FILE: &str = "metadata.db";

/// Rounds of reading the record of this node and making it: a second process that does the same wins one of them.
const ATTEMPTS: usize = 8;

/// Between two attempts to read a cluster's records: the first time, and the longest.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(10);

/// Why the metadata cannot be opened.
#[derive(Debug, Error)]
pub enum MetadataOpenError {
    /// The file in the data directory.
    #[error(transparent)]
    Sqlite(#[from] OpenError),
    /// How etcd is to be reached.
    #[error(transparent)]
    Etcd(#[from] EtcdConfigError),
    /// A certificate or key for etcd.
    #[error("--{setting} {}: {source}", path.display())]
    File {
        /// Which setting names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A node of a cluster that is told to be alone.
    #[error(
        "this node belongs to cluster {}, whose records are in etcd; start it with --metadata etcd:…",
        cluster.0
    )]
    InCluster {
        /// Which.
        cluster: ClusterId,
    },
    /// A node of no cluster.
    #[error(
        "this node belongs to no cluster yet: found one with `ashlar cluster init`, or join one with --join TOKEN@HOST:PORT (from `ashlar cluster token`)"
    )]
    NoCluster,
    /// A node that has something to lose.
    #[error(
        "this node has {volumes} volume(s) of its own and cannot join a cluster: delete them, or found the cluster here (`ashlar cluster init` moves them)"
    )]
    HasVolumes {
        /// How many.
        volumes: usize,
    },
    /// The move of the records did not come to its end.
    #[error(
        "founding the cluster was begun and not finished; run `ashlar cluster init` again as before"
    )]
    Unfinished,
    /// Another cluster's records, or none.
    #[error(
        "etcd holds {found} under this prefix, and this node belongs to cluster {}; is --etcd-prefix right?",
        cluster.0
    )]
    OtherCluster {
        /// The node's.
        cluster: ClusterId,
        /// What is there.
        found: String,
    },
    /// Shut out.
    #[error(
        "this node was removed from the cluster; to use the machine again, give it an empty data directory"
    )]
    Removed,
    /// The files of the identity.
    #[error(transparent)]
    IdentityFile(#[from] IdentityFileError),
    /// What is in them.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Another node did not let this one in.
    #[error(transparent)]
    Joining(#[from] JoiningError),
    /// A record.
    #[error(transparent)]
    Records(#[from] MetadataError),
}

/// What keeps the records.
pub(crate) struct OpenMetadata {
    /// The records of volumes, stores and nodes.
    pub(crate) records: Arc<dyn MetadataStore>,
    /// The node's own database: what no other node needs to know, and what must be there when the cluster's is not.
    pub(crate) local: Arc<dyn MetadataStore>,
    /// This daemon.
    pub(crate) node: NodeId,
    /// In a cluster only.
    pub(crate) identity: Option<Arc<Identity>>,
}

impl OpenMetadata {
    /// Opens it, and joins a cluster if that is asked for. The node's own identity is kept in the data directory in
    /// either case.
    ///
    /// A cluster's etcd that does not answer is waited for; `waits` is called each time.
    pub(crate) async fn open(
        config: &Config,
        waits: impl Fn(),
    ) -> Result<OpenMetadata, MetadataOpenError> {
        let local = open_local(&config.data_dir)?;
        let node = node_record(&*local).await?.id;
        let membership = meta::read::<MembershipRecord>(&*local, keys::MEMBERSHIP).await?;
        let membership = membership.map(|noted| noted.record);
        let Metadata::Etcd(access) = &config.metadata else {
            return match membership {
                Some(MembershipRecord { cluster, .. }) => {
                    Err(MetadataOpenError::InCluster { cluster })
                }
                None => Ok(OpenMetadata {
                    records: local.clone(),
                    local,
                    node,
                    identity: None,
                }),
            };
        };
        let records: Arc<dyn MetadataStore> = Arc::new(connect(access)?);
        let cluster = match membership {
            Some(noted) if noted.is_complete => noted.cluster,
            Some(_) => return Err(MetadataOpenError::Unfinished),
            None => join_cluster(config, &*local, node).await?,
        };
        let mut pause = RETRY_FIRST;
        loop {
            match open_shared(config, &records, &local, node, cluster).await {
                // Ending would have this daemon started again, by most who start daemons later each time.
                Err(MetadataOpenError::Records(error @ MetadataError::Unavailable { .. })) => {
                    waits();
                    tracing::warn!(%error, "nothing is served before the cluster's records can be read; trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_LAST);
                }
                opened => return opened,
            }
        }
    }
}

/// Reads what the cluster's records say of this node, and announces it there.
async fn open_shared(
    config: &Config,
    records: &Arc<dyn MetadataStore>,
    local: &Arc<dyn MetadataStore>,
    node: NodeId,
    cluster: ClusterId,
) -> Result<OpenMetadata, MetadataOpenError> {
    let found = meta::read::<ClusterRecord>(&**records, keys::CLUSTER).await?;
    match found.map(|found| found.record) {
        Some(found) if found.id == cluster && found.moving_from.is_none() => {}
        Some(found) if found.id == cluster => return Err(MetadataOpenError::Unfinished),
        other => {
            let found = other.map_or("no cluster".to_owned(), |other| {
                format!("cluster {}", other.id.0)
            });
            return Err(MetadataOpenError::OtherCluster { cluster, found });
        }
    }
    let sessions = Arc::new(Sessions::default());
    let trust = Trust::start(records.clone(), sessions.clone()).await?;
    if trust.check(&Peer::Node(node)).is_err() {
        return Err(MetadataOpenError::Removed);
    }
    let file = IdentityFile::read(&config.data_dir)?.ok_or(IdentityError::Unusable {
        reason: "identity/identity.json is gone".to_owned(),
    })?;
    let identity = Identity::new(&file, config.data_dir.clone(), trust, sessions)?;
    let identity = Arc::new(identity);
    announce(&**records, config, &identity).await?;
    Ok(OpenMetadata {
        records: records.clone(),
        local: local.clone(),
        node,
        identity: Some(identity),
    })
}

/// The metadata in the data directory.
pub(crate) fn open_local(data_dir: &Path) -> Result<Arc<dyn MetadataStore>, OpenError> {
    let store = SqliteStore::open(&data_dir.join(METADATA_FILE))?;
    Ok(Arc::new(store))
}

async fn join_cluster(
    config: &Config,
    local: &dyn MetadataStore,
    node: NodeId,
) -> Result<ClusterId, MetadataOpenError> {
    let setting = config.join.as_ref().ok_or(MetadataOpenError::NoCluster)?;
    let volumes = local.list(keys::VOLUMES).await?.entries.len();
    if volumes > 0 {
        return Err(MetadataOpenError::HasVolumes { volumes });
    }
    // An identity that is there is of an attempt that ended between its two last steps.
    let cluster = match IdentityFile::read(&config.data_dir)? {
        Some(file) => file.cluster,
        None => {
            let address = config.advertise.as_ref().map(ToString::to_string);
            let names = certificate_names(config);
            let labels = config.labels.clone();
            identity::join(setting, &config.data_dir, node, address, names, labels).await?
        }
    };
    let noted = MembershipRecord {
        cluster,
        is_complete: true,
    };
    let note = Transaction::new().put(keys::MEMBERSHIP, noted.encode());
    local.commit(note).await?;
    tracing::info!(cluster = %cluster.0, "joined the cluster");
    Ok(cluster)
}

/// Tells the others where this node is and whether it signs certificates.
async fn announce(
    records: &dyn MetadataStore,
    config: &Config,
    identity: &Identity,
) -> Result<(), MetadataOpenError> {
    let address = config.advertise.as_ref().map(ToString::to_string);
    let is_authority = identity.authority().is_some();
    loop {
        let member = identity::member(records, identity.node()).await?;
        let member = member.filter(|member| member.record.state == MemberState::Active);
        let member = member.ok_or(MetadataOpenError::Removed)?;
        if (&member.record.address, member.record.is_authority) == (&address, is_authority) {
            return Ok(());
        }
        let told = MemberRecord {
            address: address.clone(),
            is_authority,
            ..member.record
        };
        match records.commit(put_member(&told, member.changed_at)).await {
            Ok(Outcome::Committed(_)) => return Ok(()),
            // The next round reads what became of it.
            Ok(Outcome::Conflict) | Err(MetadataError::Unknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What this node is called by those who connect to it.
pub(crate) fn certificate_names(config: &Config) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    let uname = rustix::system::uname();
    if let Ok(host) = uname.nodename().to_str()
        && !host.is_empty()
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte))
    {
        names.push(host.trim_end_matches('.').to_owned());
    }
    names.extend(
        config
            .advertise
            .iter()
            .map(|advertised| advertised.host.clone()),
    );
    for address in config.listen_admin.iter().chain(&config.listen_nbd) {
        if let Address::Tcp(host_port) = address {
            names.push(host_port.host.clone());
        }
    }
    // Every address of the machine is no name.
    names.retain(|name| name != "0.0.0.0" && name != "::" && !name.ends_with(".internal"));
    names.sort();
    names.dedup();
    names
}

/// The store in etcd that the settings mean. Needs a tokio runtime around it; connects when it is first asked.
pub(crate) fn connect(access: &EtcdAccess) -> Result<EtcdStore, MetadataOpenError> {
    let authority = access.authority.as_deref();
    let authority = authority.map(|path| read("etcd-ca", path)).transpose()?;
    let identity = match (&access.certificate, &access.key) {
        (Some(certificate), Some(key)) => {
            Some((read("etcd-cert", certificate)?, read("etcd-key", key)?))
        }
        _ => None,
    };
    Ok(EtcdStore::new(EtcdConfig {
        endpoints: access.endpoints.clone(),
        prefix: access.prefix.clone(),
        request_timeout: ETCD_TIMEOUT_DEFAULT,
        tls: EtcdTls {
            authority,
            identity,
        },
    })?)
}

fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, MetadataOpenError> {
    std::fs::read(path).map_err(|source| MetadataOpenError::File {
        setting,
        path: path.to_owned(),
        source,
    })
}

/// Reads the daemon's own record, or makes it at the first start. A second daemon that makes it at the same moment
/// wins or loses the swap; both then have the same identity, and the lock on the store keeps one of them out.
pub(crate) async fn node_record(store: &dyn MetadataStore) -> Result<NodeRecord, MetadataError> {
    for _ in 0..ATTEMPTS {
        if let Some(known) = meta::read::<NodeRecord>(store, keys::NODE).await? {
            return Ok(known.record);
        }
        let fresh = NodeRecord {
            id: NodeId(Uuid::new_v4()),
            created_at_unix_ms: unix_ms(),
        };
        let swap = Transaction::new()
            .when_absent(keys::NODE)
            .put(keys::NODE, fresh.encode());
        if let Outcome::Committed(Revision(_)) = store.commit(swap).await? {
            return Ok(fresh);
        }
    }
    Err(MetadataError::Unavailable {
        reason: "the record of this node keeps changing".to_owned(),
    })
}
